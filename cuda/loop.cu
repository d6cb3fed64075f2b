/* Decoding steps that the device takes by itself: one recorded step as a graph.
 *
 * What a step enqueues is captured on the queue's stream, cuBLASLt's kernels among it, and
 * launched once per step. Kernels that depend on the position read from device memory how many
 * steps were taken; the last kernel of a step keeps its id and counts it. The ids of a launch
 * come to pinned memory behind it, so that the host reads some while later ones run. */
#include "device.h"
#include "internal.h"

#include <string.h>

namespace acre {
namespace {

constexpr int EVENTS = 4; /* launches whose ends are told apart, the latest of them */

/* Behind each step. */
__global__ void count_kernel(int32_t *steps, int32_t *ids, const int32_t *id) {
  if (threadIdx.x == 0) {
    ids[*steps] = *id;
    *steps += 1;
  }
}

}  // namespace
}  // namespace acre

struct acre_loop {
  acre_queue *queue;
  acre_buffer *memory; /* int32: steps taken, then an id for each */
  int32_t *ids;        /* pinned, [most] */
  cudaGraphExec_t graph;
  cudaEvent_t done[acre::EVENTS];
  int64_t ends[acre::EVENTS]; /* the steps of which each event tells */
  int64_t most, launched, runs;
};

namespace acre {
namespace {

acre_status open_loop(acre_loop *loop, acre_error *error) {
  backend *owner = loop->queue->owner;
  size_t bytes = (size_t)loop->most * sizeof(int32_t);
  ACRE_TRY(alloc(&owner->base, &loop->memory, bytes + sizeof(int32_t), error));
  cudaError_t failed = cudaHostAlloc(&loop->ids, bytes, cudaHostAllocDefault);
  if (failed != cudaSuccess) return refuse(error, failed, ACRE_SITE("cudaHostAlloc"));
  for (cudaEvent_t &event : loop->done) {
    failed = cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
    if (failed != cudaSuccess)
      return refuse(error, failed, ACRE_SITE("cudaEventCreateWithFlags"));
  }
  return ACRE_OK;
}

/* The graph of one step. What cannot be recorded has not run: it is refused, and the queue is
 * as it was. */
acre_status capture(acre_loop *loop, void (*step)(void *), void *context, const int32_t *id,
                    acre_error *error) {
  acre_queue *queue = loop->queue;
  if (queue->failure.failed) return report(queue, error);
  int32_t *steps = (int32_t *)acre_buffer_data(loop->memory);
  cudaError_t failed =
      cudaStreamBeginCapture(queue->stream, cudaStreamCaptureModeThreadLocal);
  if (failed != cudaSuccess)
    return refuse(error, failed, ACRE_SITE("cudaStreamBeginCapture"));
  queue->steps = steps, queue->steps_most = loop->most;
  step(context);
  queue->steps = NULL;
  ACRE_LAUNCH(queue, count_kernel, 1, WARP, 0, steps, steps + 1, id);
  failure recorded = queue->failure;
  queue->failure = {};
  cudaGraph_t graph = NULL;
  failed = cudaStreamEndCapture(queue->stream, &graph);
  acre_status status = ACRE_OK;
  if (recorded.failed) {
    cudaGetLastError();
    status = acre_fail(error, ACRE_DEVICE, "recording a step: %s", recorded.message);
  } else if (failed != cudaSuccess) {
    status = refuse(error, failed, ACRE_SITE("cudaStreamEndCapture"));
  } else {
    failed = cudaGraphInstantiate(&loop->graph, graph, 0);
    if (failed != cudaSuccess)
      status = refuse(error, failed, ACRE_SITE("cudaGraphInstantiate"));
  }
  if (graph) cudaGraphDestroy(graph);
  return status;
}

}  // namespace
}  // namespace acre

acre_status acre_cuda_loop_record(acre_queue *queue, acre_loop **out, void (*step)(void *),
                                  void *context, const int32_t *id, int64_t most,
                                  acre_error *error) {
  using namespace acre;
  *out = NULL;
  on_device scope(queue->owner->ordinal);
  acre_loop *loop = (acre_loop *)acre_alloc_zero(sizeof *loop);
  if (!loop) return acre_fail(error, ACRE_NO_MEMORY, "out of memory for a loop");
  loop->queue = queue, loop->most = most;
  acre_status status = open_loop(loop, error);
  if (status == ACRE_OK) status = capture(loop, step, context, id, error);
  if (status == ACRE_OK)
    *out = loop;
  else
    acre_cuda_loop_release(loop);
  return status;
}

void acre_cuda_loop_run(acre_loop *loop, int64_t count) {
  using namespace acre;
  acre_queue *queue = loop->queue;
  failure *kept = &queue->failure;
  on_device scope(queue->owner->ordinal);
  const int32_t *ids = (const int32_t *)acre_buffer_data(loop->memory) + 1;
  for (int64_t i = 0; i < count && !kept->failed; i++)
    check(kept, cudaGraphLaunch(loop->graph, queue->stream), ACRE_SITE("cudaGraphLaunch"));
  if (count > 0 && !kept->failed)
    check(kept,
          cudaMemcpyAsync(loop->ids + loop->launched, ids + loop->launched,
                          (size_t)count * sizeof *ids, cudaMemcpyDefault, queue->stream),
          ACRE_SITE("cudaMemcpyAsync"));
  int which = (int)(loop->runs++ % EVENTS);
  loop->launched += count;
  loop->ends[which] = loop->launched;
  if (!kept->failed)
    check(kept, cudaEventRecord(loop->done[which], queue->stream),
          ACRE_SITE("cudaEventRecord"));
}

acre_status acre_cuda_loop_read(acre_loop *loop, int32_t *ids, int64_t first, int64_t count,
                                acre_error *error) {
  using namespace acre;
  failure *kept = &loop->queue->failure;
  on_device scope(loop->queue->owner->ordinal);
  int64_t end = loop->launched + 1;
  int which = 0;
  for (int e = 0; e < EVENTS; e++) /* the earliest that tells of all of them */
    if (loop->ends[e] >= first + count && loop->ends[e] < end)
      which = e, end = loop->ends[e];
  if (!kept->failed)
    check(kept, cudaEventSynchronize(loop->done[which]), ACRE_SITE("cudaEventSynchronize"));
  if (!kept->failed) memcpy(ids, loop->ids + first, (size_t)count * sizeof *ids);
  return report(loop->queue, error);
}

void acre_cuda_loop_release(acre_loop *loop) {
  if (!loop) return;
  acre::on_device scope(loop->queue->owner->ordinal);
  cudaStreamSynchronize(loop->queue->stream);
  if (loop->graph) cudaGraphExecDestroy(loop->graph);
  for (cudaEvent_t event : loop->done)
    if (event) cudaEventDestroy(event);
  if (loop->ids) cudaFreeHost(loop->ids);
  acre_buffer_release(loop->memory);
  acre_free(loop);
}
