/* NCCL's entry points on the host: a library of its own, whose ranks are processes that meet in
 * a file that all of them map. It does nothing but when it is looked at, as slowly as the
 * interface allows: a call is through only after a look, a sum goes on only while its stream is
 * asked for, and who comes last is waited for by all. What tests may ask of it:
 *
 *   ACRE_HOST_NCCL_VERSION   what it says that it is, 22800 otherwise
 *   ACRE_HOST_NCCL_FAULT     if it is there: a meeting, and every look, finds that a peer has
 *                            failed; of the former a communicator is left
 *   -DACRE_HOST_NCCL_LACKS   a library without ncclCommFinalize */
#include "nccl.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

namespace {

constexpr int RANKS_MOST = 8, PIECE = 1024; /* numbers that are exchanged at once */

struct seat {
  long given, taken; /* pieces: put here, and read from all */
  float piece[PIECE];
};

struct meeting {
  unsigned joined, left; /* bits of ranks */
  seat seats[RANKS_MOST];
};

int made; /* ids */

template <class N>
N now(const N *number) {
  return __atomic_load_n(number, __ATOMIC_ACQUIRE);
}

}  // namespace

enum stage { JOINING, READY, SUMMING, LEAVING };

struct ncclComm {
  meeting *all;
  char path[sizeof(nccl_id)];
  int rank, world;
  stage at;
  cudaStream_t stream;
  float *x;
  size_t n, done;
  long pieces; /* through */
  bool put;    /* the next one is in our seat */
};

namespace {

bool everyone(const ncclComm *c, const unsigned *bits) {
  return now(bits) == (1u << c->world) - 1;
}

meeting *map_file(const char *path, int flags) {
  int file = open(path, O_RDWR | flags, 0600);
  if (file < 0) return NULL;
  bool sized = !(flags & O_CREAT) || ftruncate(file, sizeof(meeting)) == 0;
  void *map = sized
                  ? mmap(NULL, sizeof(meeting), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0)
                  : MAP_FAILED;
  close(file);
  return map == MAP_FAILED ? NULL : (meeting *)map;
}

bool all_have(const ncclComm *c, long seat::*count, long least) {
  for (int rank = 0; rank < c->world; rank++)
    if (now(&(c->all->seats[rank].*count)) < least) return false;
  return true;
}

/* Puts the next piece where nobody needs the one before, adds up when all have put theirs. */
bool sum_piece(ncclComm *c) {
  seat *own = &c->all->seats[c->rank];
  size_t some = c->n - c->done < PIECE ? c->n - c->done : PIECE;
  if (!c->put) {
    if (!all_have(c, &seat::taken, c->pieces)) return false;
    c->stream->access(true);
    memcpy(own->piece, c->x + c->done, some * sizeof(float));
    c->stream->access(false);
    __atomic_store_n(&own->given, c->pieces + 1, __ATOMIC_RELEASE);
    c->put = true;
  }
  if (!all_have(c, &seat::given, c->pieces + 1)) return false;
  c->stream->access(true);
  for (size_t i = 0; i < some; i++) {
    float sum = c->all->seats[0].piece[i];
    for (int rank = 1; rank < c->world; rank++) sum += c->all->seats[rank].piece[i];
    c->x[c->done + i] = sum;
  }
  c->stream->access(false);
  __atomic_store_n(&own->taken, c->pieces + 1, __ATOMIC_RELEASE);
  c->put = false, c->pieces++, c->done += some;
  return true;
}

bool sum_all(void *context) {
  ncclComm *c = (ncclComm *)context;
  while (c->done < c->n)
    if (!sum_piece(c)) return false;
  return true;
}

int join(ncclComm *c) {
  if (!everyone(c, &c->all->joined)) return NCCL_IN_PROGRESS;
  if (c->rank == 0) unlink(c->path);
  c->at = READY;
  return NCCL_SUCCESS;
}

void forget(ncclComm *c) {
  if (c->stream && c->stream->context == c) c->stream->work = NULL;
  munmap(c->all, sizeof *c->all);
  free(c);
}

}  // namespace

extern "C" {

/* Communicators: that are, that were aborted, that began to part in peace. */
int acre_host_nccl_live, acre_host_nccl_aborted, acre_host_nccl_parting;

int ncclGetVersion(int *version) {
  const char *said = getenv("ACRE_HOST_NCCL_VERSION");
  *version = said ? atoi(said) : 22800;
  return NCCL_SUCCESS;
}
const char *ncclGetErrorString(int result) {
  return result == NCCL_REMOTE_ERROR ? "remote process exited or there was a network error"
                                     : "invalid argument";
}
const char *ncclGetLastError(nccl_comm) { return "as the host tells it"; }

int ncclGetUniqueId(nccl_id *out) {
  memset(out, 0, sizeof *out);
  snprintf(out->bytes, sizeof out->bytes, "/tmp/acre-nccl-%d-%d", (int)getpid(), made++);
  meeting *all = map_file(out->bytes, O_CREAT | O_EXCL);
  if (!all) return NCCL_INVALID_ARGUMENT;
  munmap(all, sizeof *all);
  return NCCL_SUCCESS;
}

int ncclCommInitRankConfig(nccl_comm *out, int world, nccl_id id, int rank,
                           nccl_config *config) {
  *out = NULL;
  if (config->size != sizeof *config || config->magic != NCCL_MAGIC ||
      config->version != NCCL_LEAST || config->blocking)
    return NCCL_INVALID_ARGUMENT;
  if (world < 1 || world > RANKS_MOST || rank < 0 || rank >= world ||
      !memchr(id.bytes, 0, sizeof id.bytes))
    return NCCL_INVALID_ARGUMENT;
  meeting *all = map_file(id.bytes, 0);
  if (!all) return NCCL_INVALID_ARGUMENT;
  unsigned bit = 1u << rank;
  ncclComm *c = (ncclComm *)calloc(1, sizeof *c);
  if (!c || (__atomic_fetch_or(&all->joined, bit, __ATOMIC_ACQ_REL) & bit)) {
    free(c);
    munmap(all, sizeof *all);
    return NCCL_INVALID_ARGUMENT; /* a rank that is there already */
  }
  c->all = all, c->rank = rank, c->world = world;
  memcpy(c->path, id.bytes, sizeof c->path);
  *out = c;
  acre_host_nccl_live++;
  return getenv("ACRE_HOST_NCCL_FAULT") ? NCCL_REMOTE_ERROR : NCCL_IN_PROGRESS;
}

int ncclCommGetAsyncError(nccl_comm c, int *state) {
  *state = NCCL_SUCCESS;
  if (getenv("ACRE_HOST_NCCL_FAULT")) {
    *state = NCCL_REMOTE_ERROR;
    return NCCL_SUCCESS;
  }
  if (c->at == JOINING) *state = join(c);
  if (c->at == LEAVING && !everyone(c, &c->all->left)) *state = NCCL_IN_PROGRESS;
  if (c->at == SUMMING) { /* only now the stream knows of it */
    c->stream->work = sum_all, c->stream->context = c;
    c->at = READY;
  }
  return NCCL_SUCCESS;
}

int ncclAllReduce(const void *from, void *to, size_t count, int type, int how, nccl_comm c,
                  cudaStream_t stream) {
  if (c->at != READY || stream->work || from != to || type != NCCL_FLOAT32 ||
      how != NCCL_SUM)
    return NCCL_INVALID_ARGUMENT;
  c->stream = stream, c->x = (float *)to, c->n = count, c->done = 0;
  c->at = SUMMING;
  return NCCL_IN_PROGRESS;
}

#ifndef ACRE_HOST_NCCL_LACKS
int ncclCommFinalize(nccl_comm c) {
  if (c->at != READY) return NCCL_INVALID_ARGUMENT;
  __atomic_fetch_or(&c->all->left, 1u << c->rank, __ATOMIC_ACQ_REL);
  c->at = LEAVING;
  acre_host_nccl_parting++;
  return NCCL_IN_PROGRESS;
}
#endif

int ncclCommDestroy(nccl_comm c) {
  if (c->at != LEAVING || !everyone(c, &c->all->left)) return NCCL_INVALID_ARGUMENT;
  acre_host_nccl_live--;
  forget(c);
  return NCCL_SUCCESS;
}

int ncclCommAbort(nccl_comm c) {
  acre_host_nccl_live--, acre_host_nccl_aborted++;
  if (c->at == JOINING && c->rank == 0) unlink(c->path);
  forget(c);
  return NCCL_SUCCESS;
}
}
