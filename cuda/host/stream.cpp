/* Streams on the host: tasks in a row.
 *
 * At first a stream does at once what is asked of it. In disorder (host.h) it keeps a mood for
 * a while: early, and all that it was asked for is done by the next call, whatever other
 * streams still have to do; or late, and nothing is done before somebody waits for it, by when
 * all that it should have seen may be gone. A task that waits for an event has the event's
 * stream do what is before it; so what no event orders comes in either order.
 *
 * Copies between the device and memory that is not pinned wait, as the runtime's do.
 *
 * A stream that is recorded gives its tasks to a graph, whose launch asks for them again. */
#include "cuda_runtime.h"
#include "host.h"
#include "platform.h"

#include <pthread.h>
#include <stdlib.h>

struct acre_host_task {
  cudaError_t (*run)(const void *);
  acre_host_task *next;
  size_t size;
  alignas(128) char bytes[]; /* as a kernel's arguments may want it */
};

struct acre_host_graph {
  acre_host_task *first, *last;
};

struct acre_host_event {
  cudaStream_t stream;
  int64_t after; /* of its tasks */
};

namespace {

uint64_t disorder;
cudaStream_t streams; /* all that are open */
pthread_mutex_t of_streams = PTHREAD_MUTEX_INITIALIZER;

uint64_t random_number(void) { /* splitmix64 */
  uint64_t z = (disorder += 0x9e3779b97f4a7c15u);
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return z ^ z >> 31;
}

template <class T>
cudaError_t create(T **out) {
  *out = NULL;
  cudaError_t error = acre_host_result();
  if (error != cudaSuccess) return error;
  *out = (T *)acre_alloc_zero(sizeof **out);
  return *out ? cudaSuccess : cudaErrorMemoryAllocation;
}

void leave(cudaStream_t stream) {
  if (--stream->references == 0) acre_free(stream);
}

/* Its tasks up to `after`, oldest first. A task may run others of other streams, never of its
 * own: an event that it waits for was recorded before. */
void run_until(cudaStream_t stream, int64_t after) {
  while (stream->done < after && stream->first) {
    acre_host_task *task = stream->first;
    stream->first = task->next;
    if (!stream->first) stream->last = NULL;
    cudaError_t error = task->run(task->bytes);
    if (stream->failed == cudaSuccess) stream->failed = error;
    stream->done++;
    free(task);
  }
}

void settle(cudaStream_t stream) { run_until(stream, stream->asked); }

/* A task behind the last of a list, which begins at *first. */
cudaError_t append(acre_host_task **first, acre_host_task **last,
                   cudaError_t (*run)(const void *), const void *bytes, size_t size) {
  void *memory = NULL;
  size_t whole = (sizeof(acre_host_task) + size + 127) / 128 * 128;
  if (posix_memalign(&memory, 128, whole) != 0) return cudaErrorMemoryAllocation;
  acre_host_task *task = (acre_host_task *)memory;
  task->run = run, task->next = NULL, task->size = size;
  memcpy(task->bytes, bytes, size);
  (*last ? (*last)->next : *first) = task;
  *last = task;
  return cudaSuccess;
}

void free_graph(acre_host_graph *graph) {
  for (acre_host_task *task = graph ? graph->first : NULL; task;) {
    acre_host_task *next = task->next;
    free(task);
    task = next;
  }
  acre_free(graph);
}

/* What a stream that is recorded cannot do. */
cudaError_t unrecorded(const acre_host_stream *stream) {
  cudaError_t error = acre_host_result();
  return stream->recorded ? cudaErrorStreamCaptureUnsupported : error;
}

struct wait_task {
  cudaStream_t stream;
  int64_t after;
};

cudaError_t run_wait(const void *bytes) {
  const wait_task *wait = (const wait_task *)bytes;
  run_until(wait->stream, wait->after);
  leave(wait->stream);
  return cudaSuccess;
}

struct bytes_task {
  void *to;
  const void *from; /* NULL: `value` */
  int value;
  size_t bytes;
};

cudaError_t run_bytes(const void *bytes) {
  const bytes_task *task = (const bytes_task *)bytes;
  acre_host_access(true);
  if (task->from)
    memcpy(task->to, task->from, task->bytes);
  else
    memset(task->to, task->value, task->bytes);
  acre_host_access(false);
  return cudaSuccess;
}

}  // namespace

extern "C" {

bool acre_host_in_disorder(void) { return disorder != 0; }

void acre_host_disorder(uint64_t seed) {
  acre_host_settle_all();
  disorder = seed;
}

void acre_host_settle_all(void) {
  if (!disorder) return;
  pthread_mutex_lock(&of_streams);
  for (cudaStream_t stream = streams; stream; stream = stream->next) settle(stream);
  pthread_mutex_unlock(&of_streams);
}

cudaError_t acre_host_enqueue(cudaStream_t stream, cudaError_t (*run)(const void *),
                              const void *bytes, size_t size) {
  acre_host_graph *graph = stream->recorded;
  if (graph) return append(&graph->first, &graph->last, run, bytes, size);
  if (!disorder) return run(bytes);
  cudaError_t error = append(&stream->first, &stream->last, run, bytes, size);
  if (error != cudaSuccess) return error;
  stream->asked++;
  if (random_number() % 16 == 0) stream->late = random_number() % 2;
  if (!stream->late) settle(stream);
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *out, unsigned) {
  cudaError_t error = create(out);
  if (error != cudaSuccess) return error;
  (*out)->access = acre_host_access;
  (*out)->enqueue = acre_host_enqueue;
  (*out)->references = 1;
  (*out)->late = disorder && random_number() % 2;
  pthread_mutex_lock(&of_streams);
  (*out)->next = streams;
  streams = *out;
  pthread_mutex_unlock(&of_streams);
  return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  settle(stream);
  pthread_mutex_lock(&of_streams);
  cudaStream_t *at = &streams;
  while (*at != stream) at = &(*at)->next;
  *at = stream->next;
  pthread_mutex_unlock(&of_streams);
  leave(stream);
  return cudaSuccess;
}

cudaError_t cudaStreamQuery(cudaStream_t stream) {
  cudaError_t error = unrecorded(stream);
  if (error != cudaSuccess) return error;
  settle(stream);
  if (stream->work && !stream->work(stream->context)) return cudaErrorNotReady;
  stream->work = NULL;
  error = stream->failed;
  stream->failed = cudaSuccess;
  return error;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  cudaError_t error;
  while ((error = cudaStreamQuery(stream)) == cudaErrorNotReady) acre_sleep(1e-4);
  return error;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *out, unsigned) { return create(out); }

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  acre_free(event);
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  cudaError_t error = unrecorded(stream);
  if (error != cudaSuccess) return error;
  event->stream = stream;
  event->after = stream->asked;
  return cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  if (event->stream) run_until(event->stream, event->after);
  return acre_host_result();
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  cudaError_t error = acre_host_result();
  if (error != cudaSuccess || !event->stream || !disorder) return error;
  wait_task wait = {event->stream, event->after};
  event->stream->references++;
  return acre_host_enqueue(stream, run_wait, &wait, sizeof wait);
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind,
                            cudaStream_t stream) {
  cudaError_t error = acre_host_result();
  if (error != cudaSuccess || !bytes) return error;
  bool waits = disorder && !stream->recorded &&
               (acre_host_memory(to) == cudaMemoryTypeUnregistered ||
                acre_host_memory(from) == cudaMemoryTypeUnregistered);
  if (waits) settle(stream);
  bytes_task task = {to, from, 0, bytes};
  return waits ? run_bytes(&task)
               : acre_host_enqueue(stream, run_bytes, &task, sizeof task);
}

cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t stream) {
  cudaError_t error = acre_host_result();
  bytes_task task = {to, NULL, value, bytes};
  if (error != cudaSuccess) return error;
  return acre_host_enqueue(stream, run_bytes, &task, sizeof task);
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  cudaError_t error = unrecorded(stream);
  return error == cudaSuccess ? create(&stream->recorded) : error;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *out) {
  acre_host_graph *graph = stream->recorded;
  stream->recorded = NULL, *out = NULL;
  cudaError_t error = acre_host_result();
  if (error == cudaSuccess && !graph) error = cudaErrorStreamCaptureUnsupported;
  if (error == cudaSuccess)
    *out = graph;
  else
    free_graph(graph);
  return error;
}

/* Takes the tasks over. */
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *out, cudaGraph_t graph,
                                 unsigned long long) {
  cudaError_t error = create(out);
  if (error != cudaSuccess) return error;
  **out = *graph;
  *graph = {NULL, NULL};
  return error;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
  cudaError_t error = unrecorded(stream);
  for (acre_host_task *task = graph->first; task && error == cudaSuccess; task = task->next)
    error = acre_host_enqueue(stream, task->run, task->bytes, task->size);
  return error;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  free_graph(graph);
  return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) { return cudaGraphDestroy(graph); }
}
