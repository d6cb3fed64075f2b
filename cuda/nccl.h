/* As much of NCCL's interface as is used here, as its documentation gives it: the library is
 * found at run time, and no header of its own is asked for. */
#ifndef ACRE_CUDA_NCCL_H
#define ACRE_CUDA_NCCL_H

#include <cuda_runtime.h>
#include <stddef.h>

enum { /* ncclResult_t */
       NCCL_SUCCESS = 0,
       NCCL_INVALID_ARGUMENT = 4,
       NCCL_REMOTE_ERROR = 6,
       NCCL_IN_PROGRESS = 7,
};
enum { NCCL_FLOAT32 = 7 };        /* ncclDataType_t */
enum { NCCL_SUM = 0 };            /* ncclRedOp_t */
enum { NCCL_LEAST = 21400 };      /* 2.14: communicators that do not block */
enum { NCCL_MAGIC = 0xcafebeef }; /* of a configuration */

struct nccl_id {
  char bytes[128];
};

/* ncclConfig_t as of 2.14, which later libraries take for what it says it is. */
struct nccl_config {
  size_t size;
  unsigned magic, version;
  int blocking;
};

typedef struct ncclComm *nccl_comm;

/* X(result, name, arguments): every entry point that is used. */
#define NCCL_FUNCTIONS(X)                                                    \
  X(int, ncclGetVersion, (int *))                                            \
  X(const char *, ncclGetErrorString, (int))                                 \
  X(const char *, ncclGetLastError, (nccl_comm))                             \
  X(int, ncclGetUniqueId, (nccl_id *))                                       \
  X(int, ncclCommInitRankConfig,                                             \
    (nccl_comm *, int world, nccl_id, int rank, nccl_config *))              \
  X(int, ncclCommGetAsyncError, (nccl_comm, int *))                          \
  X(int, ncclAllReduce,                                                      \
    (const void *from, void *to, size_t count, int type, int how, nccl_comm, \
     cudaStream_t))                                                          \
  X(int, ncclCommFinalize, (nccl_comm))                                      \
  X(int, ncclCommDestroy, (nccl_comm))                                       \
  X(int, ncclCommAbort, (nccl_comm))

#endif
