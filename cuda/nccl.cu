/* Sums over the GPUs of several processes, by NCCL, which is loaded when peers are first asked
 * for and never linked.
 *
 * Communicators do not block: every call only begins, and one loop (peers_wait) looks, up to a
 * limit of time, whether the library has gone on and then whether the stream has come to rest.
 * So a peer that died or never came is the caller's to notice, never a hang. What was not waited
 * for to its end is aborted, which also ends what runs of it on the device. */
#include "nccl.h"

#include "internal.h"
#include "library.h"

#include <stdio.h>
#include <string.h>

struct acre_nccl {
  void *handle;
#define MEMBER(result, name, arguments) result(*name) arguments;
  NCCL_FUNCTIONS(MEMBER)
#undef MEMBER
};

struct acre_peers {
  const acre_nccl *nccl;
  acre_queue *queue;
  nccl_comm communicator;
  const char *call;     /* the last one that began something */
  int result;           /* what it gave */
  bool waiting, summed; /* until it is through; and the stream is part of it */
};

namespace acre {
namespace {

constexpr const char *NAME = "libnccl.so.2";
constexpr double LOOK_AGAIN = 1e-4; /* seconds */
constexpr double CLOSING = 5.0;     /* seconds that a last goodbye may take */
static_assert(sizeof(nccl_id) == ACRE_PEERS_ID, "an id of ours holds one of NCCL's");

/* ------------------------------------------------------------------ the library */

acre_status check_library(const acre_nccl *nccl, const char *missing, acre_error *error) {
  if (missing)
    return acre_fail(error, ACRE_UNSUPPORTED, "device: the NCCL found has no %s", missing);
  int version = 0, result = nccl->ncclGetVersion(&version);
  if (result != NCCL_SUCCESS)
    return acre_fail(error, ACRE_UNSUPPORTED, "device: NCCL does not start: %s",
                     nccl->ncclGetErrorString(result));
  int hundred = version >= 10000 ? 100 : 10; /* 2.9 was the first with two digits */
  int major = version / (100 * hundred), minor = version / 100 % hundred;
  if (version < NCCL_LEAST || major != NCCL_LEAST / 10000)
    return acre_fail(error, ACRE_UNSUPPORTED,
                     "device: NCCL is of version %d.%d, expected 2.%d or a later 2", major,
                     minor, NCCL_LEAST / 100 % 100);
  return ACRE_OK;
}

acre_status open_library(acre_nccl **out, const char *directories, acre_error *error) {
  void *handle = library_open(directories, NAME);
  if (!handle)
    return acre_fail(error, ACRE_UNSUPPORTED,
                     "device: NCCL was not found (%s); install it with pip install "
                     "\"acre[nccl]\", or put it where the loader looks",
                     NAME);
  acre_nccl *nccl = (acre_nccl *)acre_alloc_zero(sizeof *nccl);
  if (!nccl) {
    dlclose(handle);
    return acre_fail(error, ACRE_NO_MEMORY, "out of memory for NCCL");
  }
  nccl->handle = handle;
  const char *missing = NULL;
#define FIND(result, name, arguments) \
  if (!library_find(&nccl->name, handle, #name)) missing = #name;
  NCCL_FUNCTIONS(FIND)
#undef FIND
  acre_status status = check_library(nccl, missing, error);
  if (status == ACRE_OK)
    *out = nccl;
  else
    acre_free(nccl);
  return status;
}

/* The backend's, opened once: it is large, and few ever need it. */
acre_status library_of(const acre_nccl **out, backend *owner, acre_error *error) {
  acre_mutex_lock(owner->loading);
  acre_status status =
      owner->nccl ? ACRE_OK : open_library(&owner->nccl, owner->libraries, error);
  *out = owner->nccl;
  acre_mutex_unlock(owner->loading);
  return status;
}

/* ------------------------------------------------------------------ waiting */

acre_status fail(const acre_nccl *nccl, nccl_comm communicator, const char *call,
                 int result, acre_error *error) {
  const char *more = nccl->ncclGetLastError(communicator);
  return acre_fail(error, ACRE_NO_PEER, "NCCL, %s: %s%s%.200s", call,
                   nccl->ncclGetErrorString(result), more && *more ? ": " : "",
                   more ? more : "");
}

/* What the library has come to with the last call. */
int look(acre_peers *peers) {
  if (peers->result != NCCL_IN_PROGRESS && peers->result != NCCL_SUCCESS)
    return peers->result;
  int state = NCCL_SUCCESS;
  int asked = peers->nccl->ncclCommGetAsyncError(peers->communicator, &state);
  return asked == NCCL_SUCCESS ? state : asked;
}

/* Whether the stream has come to rest; a failure of the device stays in the queue. */
bool at_rest(acre_queue *queue) {
  cudaError_t state = cudaStreamQuery(queue->stream);
  if (state == cudaErrorNotReady) {
    cudaGetLastError(); /* it counts as an error, and is none */
    return false;
  }
  return check(&queue->failure, state, ACRE_SITE("cudaStreamQuery"));
}

void begin(acre_peers *peers, const char *call, int result) {
  peers->call = call, peers->result = result, peers->waiting = true;
}

/* One look; *done, or neither done nor refused. */
acre_status go_on(acre_peers *peers, bool *done, acre_error *error) {
  int state = look(peers);
  *done = false;
  if (state == NCCL_IN_PROGRESS) return ACRE_OK;
  if (state != NCCL_SUCCESS)
    return fail(peers->nccl, peers->communicator, peers->call, state, error);
  acre_queue *queue = peers->queue;
  *done = !queue->failure.failed && (!peers->summed || at_rest(queue));
  if (queue->failure.failed)
    return acre_fail(error, ACRE_DEVICE, "the device failed: %s", queue->failure.message);
  peers->waiting = peers->waiting && !*done;
  return ACRE_OK;
}

acre_status wait(acre_peers *peers, bool *done, double seconds, acre_error *error) {
  double end = acre_clock() + seconds;
  for (;;) {
    ACRE_TRY(go_on(peers, done, error));
    if (*done || acre_clock() >= end) return ACRE_OK;
    acre_sleep(LOOK_AGAIN);
  }
}

/* In peace: all that was sent has gone out. False where that takes too long. */
bool finalize(acre_peers *peers) {
  bool done = false;
  if (peers->waiting || peers->queue->failure.failed) return false;
  peers->summed = false;
  begin(peers, "ncclCommFinalize", peers->nccl->ncclCommFinalize(peers->communicator));
  return wait(peers, &done, CLOSING, NULL) == ACRE_OK && done;
}

}  // namespace

void nccl_close(acre_nccl *nccl) { acre_free(nccl); }

}  // namespace acre

/* ------------------------------------------------------------------ operations */

acre_status acre_cuda_peers_invite(acre_backend *base, uint8_t id[ACRE_PEERS_ID],
                                   acre_error *error) {
  acre::backend *owner = (acre::backend *)base;
  const acre_nccl *nccl;
  nccl_id made;
  ACRE_TRY(acre::library_of(&nccl, owner, error));
  acre::on_device scope(owner->ordinal);
  int result = nccl->ncclGetUniqueId(&made);
  if (result != NCCL_SUCCESS)
    return acre::fail(nccl, NULL, "ncclGetUniqueId", result, error);
  memcpy(id, made.bytes, sizeof made.bytes);
  return ACRE_OK;
}

acre_status acre_cuda_peers_open(acre_queue *queue, acre_peers **out, int64_t rank,
                                 int64_t world, const uint8_t id[ACRE_PEERS_ID],
                                 acre_error *error) {
  *out = NULL;
  const acre_nccl *nccl;
  ACRE_TRY(acre::library_of(&nccl, queue->owner, error));
  acre_peers *peers = (acre_peers *)acre_alloc_zero(sizeof *peers);
  if (!peers) return acre_fail(error, ACRE_NO_MEMORY, "out of memory for peers");
  peers->nccl = nccl, peers->queue = queue;
  acre::on_device scope(queue->owner->ordinal);
  nccl_id given;
  memcpy(given.bytes, id, sizeof given.bytes);
  nccl_config config = {sizeof config, NCCL_MAGIC, NCCL_LEAST, 0};
  int result = nccl->ncclCommInitRankConfig(&peers->communicator, (int)world, given,
                                            (int)rank, &config);
  acre::begin(peers, "ncclCommInitRankConfig", result);
  if (result == NCCL_SUCCESS || result == NCCL_IN_PROGRESS) {
    *out = peers;
    return ACRE_OK;
  }
  acre_status status = acre::fail(nccl, NULL, "ncclCommInitRankConfig", result, error);
  /* The library works in a thread of its own, which may have failed by now. */
  if (peers->communicator) nccl->ncclCommAbort(peers->communicator);
  acre_free(peers);
  return status;
}

void acre_cuda_peers_close(acre_peers *peers) {
  if (!peers) return;
  acre::on_device scope(peers->queue->owner->ordinal);
  if (acre::finalize(peers))
    peers->nccl->ncclCommDestroy(peers->communicator);
  else
    peers->nccl->ncclCommAbort(peers->communicator);
  acre_free(peers);
}

void acre_cuda_peers_sum(acre_peers *peers, float *x, int64_t n) {
  acre_queue *queue = peers->queue;
  acre::on_device scope(queue->owner->ordinal);
  peers->summed = true;
  if (queue->failure.failed) return acre::begin(peers, "ncclAllReduce", NCCL_IN_PROGRESS);
  acre::begin(peers, "ncclAllReduce",
              peers->nccl->ncclAllReduce(x, x, (size_t)n, NCCL_FLOAT32, NCCL_SUM,
                                         peers->communicator, queue->stream));
}

acre_status acre_cuda_peers_wait(acre_peers *peers, bool *done, double seconds,
                                 acre_error *error) {
  acre::on_device scope(peers->queue->owner->ordinal);
  return acre::wait(peers, done, seconds, error);
}
