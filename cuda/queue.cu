/* Device memory, and queues: a stream, its first failure, scratch, and staging memory.
 *
 * What comes from the host is copied to pinned staging memory at once, so the caller's array
 * is free when the call returns, and goes on from there in the queue's order. The staging
 * memory has a few parts; one is taken again when its copies have arrived. */
#include "gemm.h"

#include <stdio.h>
#include <string.h>

namespace acre {

/* ------------------------------------------------------------------ failures */

bool check(failure *kept, cudaError_t error, const site &at) {
  if (error == cudaSuccess) return true;
  if (kept->failed) return false;
  kept->failed = true;
  snprintf(kept->message, sizeof kept->message, "%.200s at %s:%d: %s (%s)", at.call,
           at.file, at.line, cudaGetErrorName(error), cudaGetErrorString(error));
  return false;
}

acre_status report(acre_queue *queue, acre_error *error) {
  failure *loading = &queue->owner->loader->failure;
  failure *worst = queue->failure.failed ? &queue->failure : loading;
  if (!worst->failed) return ACRE_OK;
  bool told = __atomic_exchange_n(&worst->told, true, __ATOMIC_ACQ_REL);
  return acre_fail(
      error, ACRE_DEVICE, "%s%s",
      told ? "the device failed before: " : "the device failed: ", worst->message);
}

acre_status refuse(acre_error *error, cudaError_t from, const site &at) {
  cudaGetLastError(); /* what was refused is no failure of what comes next */
  acre_status status = from == cudaErrorMemoryAllocation ? ACRE_NO_MEMORY : ACRE_DEVICE;
  return acre_fail(error, status, "%.200s at %s:%d: %s (%s)", at.call, at.file, at.line,
                   cudaGetErrorName(from), cudaGetErrorString(from));
}

/* ------------------------------------------------------------------ memory */

void leave(backend *owner) {
  if (__atomic_sub_fetch(&owner->references, 1, __ATOMIC_ACQ_REL) != 0) return;
  gemm_library_close(owner->gemm);
  nccl_close(owner->nccl);
  acre_free(owner->libraries);
  acre_mutex_free(owner->loading);
  acre_free(owner);
}

namespace {

/* Device memory, or pinned memory of the host. */
struct allocation {
  backend *owner;
  void *data;
  size_t bytes;
  bool pinned;
};

acre_account *account_of(const allocation *made) {
  return made->pinned ? &made->owner->base.host : &made->owner->base.account;
}

/* cudaFree waits for what still runs; of pinned memory nobody says so. */
void free_allocation(void *context) {
  allocation *made = (allocation *)context;
  backend *owner = made->owner;
  on_device scope(owner->ordinal);
  acre_account_remove(account_of(made), made->bytes);
  made->pinned ? cudaFreeHost(made->data) : cudaFree(made->data);
  acre_free(made);
  leave(owner);
}

acre_status no_memory(acre_error *error, size_t bytes) {
  size_t available = 0, total = 0;
  cudaGetLastError();
  cudaMemGetInfo(&available, &total);
  return acre_fail(error, ACRE_NO_MEMORY,
                   "out of device memory: %zu bytes were wanted, %zu of %zu are free",
                   bytes, available, total);
}

acre_status no_pinned_memory(acre_error *error, size_t bytes) {
  cudaGetLastError();
  return acre_fail(error, ACRE_NO_MEMORY,
                   "out of pinned host memory: %zu bytes were wanted, %zu are available",
                   bytes, acre_memory_available());
}

/* Pinned memory is mapped, so kernels read it over the bus at the address that the host has. */
cudaError_t take(void **data, size_t bytes, bool pinned) {
  return pinned ? cudaHostAlloc(data, bytes, cudaHostAllocPortable | cudaHostAllocMapped)
                : cudaMalloc(data, bytes);
}

acre_status allocate(backend *owner, acre_buffer **out, size_t bytes, bool pinned,
                     acre_error *error) {
  *out = NULL;
  allocation *made = (allocation *)acre_alloc_zero(sizeof *made);
  if (!made) return acre_fail(error, ACRE_NO_MEMORY, "out of memory for a buffer");
  void *data = NULL;
  cudaError_t failed = take(&data, bytes ? bytes : 1, pinned);
  if (failed != cudaSuccess) {
    acre_free(made);
    if (failed != cudaErrorMemoryAllocation)
      return refuse(error, failed, ACRE_SITE(pinned ? "cudaHostAlloc" : "cudaMalloc"));
    return pinned ? no_pinned_memory(error, bytes) : no_memory(error, bytes);
  }
  *made = allocation{owner, data, bytes, pinned};
  acre_status status = acre_buffer_wrap(out, data, bytes, free_allocation, made, error);
  if (status != ACRE_OK) {
    pinned ? cudaFreeHost(data) : cudaFree(data);
    acre_free(made);
    return status;
  }
  __atomic_add_fetch(&owner->references, 1, __ATOMIC_RELAXED);
  acre_account_add(account_of(made), bytes);
  return ACRE_OK;
}

}  // namespace

/* Zeroed on a stream of its own, and waited for: any queue may use it. */
acre_status alloc(acre_backend *base, acre_buffer **out, size_t bytes, acre_error *error) {
  backend *owner = (backend *)base;
  on_device scope(owner->ordinal);
  ACRE_TRY(allocate(owner, out, bytes, false, error));
  acre_mutex_lock(owner->loading);
  cudaError_t failed =
      cudaMemsetAsync(acre_buffer_data(*out), 0, bytes, owner->loader->stream);
  if (failed == cudaSuccess) failed = cudaStreamSynchronize(owner->loader->stream);
  acre_mutex_unlock(owner->loading);
  if (failed == cudaSuccess) return ACRE_OK;
  acre_buffer_release(*out);
  *out = NULL;
  return refuse(error, failed, ACRE_SITE("cudaMemsetAsync"));
}

acre_status alloc_host(acre_backend *base, acre_buffer **out, size_t bytes,
                       acre_error *error) {
  backend *owner = (backend *)base;
  on_device scope(owner->ordinal);
  return allocate(owner, out, bytes, true, error);
}

/* Of the whole device, so what other programs hold is out of it, too. */
size_t available(acre_backend *base) {
  on_device scope(((backend *)base)->ordinal);
  size_t bytes = 0, total = 0;
  if (cudaMemGetInfo(&bytes, &total) == cudaSuccess) return bytes;
  cudaGetLastError(); /* alloc will tell */
  return 0;
}

/* ------------------------------------------------------------------ queues */

namespace {

/* The part of the workspace that is the products'. */
size_t products_bytes(const acre_queue *queue) {
  return queue->gemm ? acre_buffer_size(queue->workspace) / 3 / ACRE_ALIGN * ACRE_ALIGN : 0;
}

acre_status open_parts(acre_queue *queue, size_t bytes, bool products, acre_error *error) {
  backend *owner = queue->owner;
  cudaError_t failed = cudaStreamCreateWithFlags(&queue->stream, cudaStreamNonBlocking);
  if (failed != cudaSuccess)
    return refuse(error, failed, ACRE_SITE("cudaStreamCreateWithFlags"));
  for (cudaEvent_t &event : queue->staging.free) {
    failed = cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
    if (failed != cudaSuccess)
      return refuse(error, failed, ACRE_SITE("cudaEventCreateWithFlags"));
  }
  failed = cudaEventCreateWithFlags(&queue->reached, cudaEventDisableTiming);
  if (failed != cudaSuccess)
    return refuse(error, failed, ACRE_SITE("cudaEventCreateWithFlags"));
  failed = cudaHostAlloc(&queue->staging.memory, STAGES * owner->staging_bytes,
                         cudaHostAllocDefault);
  if (failed != cudaSuccess) return refuse(error, failed, ACRE_SITE("cudaHostAlloc"));
  queue->staging.bytes = owner->staging_bytes;
  ACRE_TRY(allocate(owner, &queue->workspace, bytes, false, error));
  if (!products) return ACRE_OK;
  char *scratch = (char *)acre_buffer_data(queue->workspace);
  return gemm_open(&queue->gemm, owner->gemm, scratch, bytes / 3 / ACRE_ALIGN * ACRE_ALIGN,
                   error);
}

}  // namespace

acre_status queue_open_with(backend *owner, size_t workspace_bytes, bool products,
                            acre_queue **out, acre_error *error) {
  *out = NULL;
  on_device scope(owner->ordinal);
  acre_queue *queue = (acre_queue *)acre_alloc_zero(sizeof *queue);
  if (!queue) return acre_fail(error, ACRE_NO_MEMORY, "out of memory for a queue");
  queue->owner = owner;
  acre_status status = open_parts(queue, workspace_bytes, products, error);
  if (status != ACRE_OK) {
    queue_close(queue);
    return status;
  }
  *out = queue;
  return ACRE_OK;
}

acre_status queue_open(acre_backend *base, acre_queue **out, acre_error *error) {
  backend *owner = (backend *)base;
  return queue_open_with(owner, owner->workspace_bytes, true, out, error);
}

acre_status mover_open(acre_backend *base, acre_queue **out, acre_error *error) {
  return queue_open_with((backend *)base, MOVER_BYTES, false, out, error);
}

void queue_close(acre_queue *queue) {
  if (!queue) return;
  on_device scope(queue->owner->ordinal);
  if (queue->stream) cudaStreamSynchronize(queue->stream);
  gemm_close(queue->gemm);
  acre_buffer_release(queue->workspace);
  if (queue->staging.memory) cudaFreeHost(queue->staging.memory);
  for (cudaEvent_t event : queue->staging.free)
    if (event) cudaEventDestroy(event);
  if (queue->reached) cudaEventDestroy(queue->reached);
  if (queue->stream) cudaStreamDestroy(queue->stream);
  acre_free(queue);
}

/* An event may be recorded again at once: who waits for it waits for what it was. */
void follow(acre_queue *later, acre_queue *earlier) {
  on_device scope(later->owner->ordinal);
  if (!earlier->failure.failed)
    check(&earlier->failure, cudaEventRecord(earlier->reached, earlier->stream),
          ACRE_SITE("cudaEventRecord"));
  if (earlier->failure.failed && !later->failure.failed) later->failure = earlier->failure;
  if (later->failure.failed) return;
  check(&later->failure, cudaStreamWaitEvent(later->stream, earlier->reached, 0),
        ACRE_SITE("cudaStreamWaitEvent"));
}

size_t workspace_room(const acre_queue *queue) {
  return acre_buffer_size(queue->workspace) - products_bytes(queue);
}

void *workspace(acre_queue *queue, size_t bytes) {
  if (bytes <= workspace_room(queue))
    return (char *)acre_buffer_data(queue->workspace) + products_bytes(queue);
  char call[100];
  snprintf(call, sizeof call, "a workspace of %zu bytes, where %zu are needed",
           workspace_room(queue), bytes);
  check(&queue->failure, cudaErrorMemoryAllocation, site{call, __FILE__, __LINE__});
  return NULL;
}

/* ------------------------------------------------------------------ copies */

namespace {

/* Room for at least one byte in the staging memory. */
char *stage(acre_queue *queue, size_t *room) {
  staging *s = &queue->staging;
  if (s->used == s->bytes) {
    check(&queue->failure, cudaEventRecord(s->free[s->current], queue->stream),
          ACRE_SITE("cudaEventRecord"));
    s->current = (s->current + 1) % STAGES;
    check(&queue->failure, cudaEventSynchronize(s->free[s->current]),
          ACRE_SITE("cudaEventSynchronize"));
    s->used = 0;
  }
  *room = s->bytes - s->used;
  return s->memory + (size_t)s->current * s->bytes + s->used;
}

}  // namespace

void send(acre_queue *queue, void *to, const void *host, size_t bytes) {
  if (!bytes || queue->failure.failed) return;
  on_device scope(queue->owner->ordinal);
  for (size_t at = 0; at < bytes && !queue->failure.failed;) {
    size_t room;
    char *part = stage(queue, &room);
    size_t some = room < bytes - at ? room : bytes - at;
    memcpy(part, (const char *)host + at, some);
    check(&queue->failure,
          cudaMemcpyAsync((char *)to + at, part, some, cudaMemcpyDefault, queue->stream),
          ACRE_SITE("cudaMemcpyAsync"));
    at += some;
    size_t used = queue->staging.used + some; /* the next one starts aligned */
    used = (used + ACRE_ALIGN - 1) / ACRE_ALIGN * ACRE_ALIGN;
    queue->staging.used = used < queue->staging.bytes ? used : queue->staging.bytes;
  }
}

bool device_reads(const void *memory) {
  cudaPointerAttributes is;
  if (cudaPointerGetAttributes(&is, memory) == cudaSuccess)
    return is.type == cudaMemoryTypeDevice || is.type == cudaMemoryTypeManaged ||
           (is.type == cudaMemoryTypeHost && is.devicePointer == memory);
  cudaGetLastError();
  return false;
}

void copy(acre_queue *queue, void *to, const void *from, size_t bytes) {
  if (!bytes || queue->failure.failed) return;
  on_device scope(queue->owner->ordinal);
  if (!device_reads(from)) return send(queue, to, from, bytes);
  check(&queue->failure, cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, queue->stream),
        ACRE_SITE("cudaMemcpyAsync"));
}

/* Through the staging memory, which is free once the queue has come to rest. */
void download(acre_queue *queue, void *host, const void *src, size_t bytes) {
  on_device scope(queue->owner->ordinal);
  staging *s = &queue->staging;
  size_t room = STAGES * s->bytes;
  if (!queue->failure.failed)
    check(&queue->failure, cudaStreamSynchronize(queue->stream),
          ACRE_SITE("cudaStreamSynchronize"));
  s->used = 0, s->current = 0;
  for (size_t at = 0; at < bytes && !queue->failure.failed; at += room) {
    size_t some = room < bytes - at ? room : bytes - at;
    if (check(&queue->failure,
              cudaMemcpyAsync(s->memory, (const char *)src + at, some, cudaMemcpyDefault,
                              queue->stream),
              ACRE_SITE("cudaMemcpyAsync")) &&
        check(&queue->failure, cudaStreamSynchronize(queue->stream),
              ACRE_SITE("cudaStreamSynchronize")))
      memcpy((char *)host + at, s->memory, some);
  }
  if (queue->failure.failed) memset(host, 0, bytes); /* nothing is made of old bytes */
}

}  // namespace acre
