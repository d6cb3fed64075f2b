/* The CUDA runtime on a machine without one: just as much of it as the sources of cuda/ use,
 * so that the same kernels run, checked, on any host (host/run.cpp).
 *
 * Device memory is host memory, a stream does everything at once or when it likes (stream.cpp),
 * and a kernel's threads are fibers.
 * What a kernel may not do on a device either (a barrier that some threads never reach, a
 * shuffle by lanes that are not there, shared memory beyond what the launch asked for) ends
 * the launch with an error. Only dynamic shared memory exists here: `__shared__` is not
 * defined. */
#ifndef ACRE_HOST_CUDA_RUNTIME_H
#define ACRE_HOST_CUDA_RUNTIME_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <tuple>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

struct __align__(16) uint4 { unsigned x, y, z, w; };

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};

/* ------------------------------------------------------------------ runtime */

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInsufficientDriver = 35,
  cudaErrorNoDevice = 100,
  cudaErrorInvalidDevice = 101,
  cudaErrorNotReady = 600,
  cudaErrorIllegalAddress = 700,
  cudaErrorLaunchFailure = 719,
  cudaErrorStreamCaptureUnsupported = 900,
};

enum cudaMemcpyKind { cudaMemcpyDefault = 4 };
enum cudaMemoryType {
  cudaMemoryTypeUnregistered = 0,
  cudaMemoryTypeHost = 1,
  cudaMemoryTypeDevice = 2,
  cudaMemoryTypeManaged = 3,
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum { cudaStreamNonBlocking = 1, cudaEventDisableTiming = 2 };
enum { cudaHostAllocDefault = 0, cudaHostAllocPortable = 1, cudaHostAllocMapped = 2 };

struct cudaPointerAttributes {
  cudaMemoryType type;
  void *devicePointer;
};

/* Its first members are for libraries that touch device memory by themselves, in the stream's
 * order and with access open. */
typedef struct acre_host_stream {
  void (*access)(bool begins);
  cudaError_t (*enqueue)(acre_host_stream *, cudaError_t (*run)(const void *),
                         const void *bytes, size_t size); /* acre_host_enqueue */
  /* What such a library has put on the stream, and goes on with when the stream is looked at:
   * true when it is through. NULL: nothing. */
  bool (*work)(void *context);
  void *context;
  struct acre_host_task *first, *last;
  int64_t asked, done; /* tasks so far */
  int64_t references;  /* the stream itself, and tasks of others that wait for it */
  cudaError_t failed;  /* of the first task that did, until it is told */
  bool late;           /* in disorder: rests until somebody waits */
  struct acre_host_graph *recorded; /* takes the tasks instead; NULL: nothing is recorded */
  acre_host_stream *next;
} *cudaStream_t;
typedef struct acre_host_graph *cudaGraph_t, *cudaGraphExec_t;
enum cudaStreamCaptureMode { cudaStreamCaptureModeThreadLocal = 1 };
typedef struct acre_host_event *cudaEvent_t;

extern "C" {
const char *cudaGetErrorName(cudaError_t error);
const char *cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError(void);
cudaError_t cudaDriverGetVersion(int *version);
cudaError_t cudaRuntimeGetVersion(int *version);
cudaError_t cudaGetDeviceCount(int *count);
cudaError_t cudaGetDevice(int *device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int device);
cudaError_t cudaMemGetInfo(size_t *free, size_t *total);
cudaError_t cudaFree(void *memory);
cudaError_t cudaFreeHost(void *memory);
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream);
cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t stream);
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes *out, const void *pointer);
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaStreamQuery(cudaStream_t stream);
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags);
cudaError_t cudaEventDestroy(cudaEvent_t event);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream);
cudaError_t cudaEventSynchronize(cudaEvent_t event);
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode);
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph);
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *out, cudaGraph_t graph,
                                 unsigned long long flags);
cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream);
cudaError_t cudaGraphDestroy(cudaGraph_t graph);
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph);
cudaError_t acre_host_malloc(void **out, size_t bytes, bool device);
cudaError_t acre_host_result(
    void); /* success, but for the one call that must not succeed */
/* What the runtime gave that memory as; unregistered: not the runtime's. */
cudaMemoryType acre_host_memory(const void *memory);
/* `run` with a copy of these bytes, in the stream's order; at once, and then with its result,
 * unless there is disorder; kept for the graph where the stream is recorded. */
cudaError_t acre_host_enqueue(cudaStream_t stream, cudaError_t (*run)(const void *),
                              const void *bytes, size_t size);
bool acre_host_in_disorder(void);
void acre_host_settle_all(void); /* waits for every stream */
/* What a device does with its memory happens between these two. */
void acre_host_access(bool begins);
}

template <class T>
cudaError_t cudaMalloc(T **out, size_t bytes) {
  return acre_host_malloc((void **)out, bytes, true);
}
template <class T>
cudaError_t cudaHostAlloc(T **out, size_t bytes, unsigned) {
  return acre_host_malloc((void **)out, bytes, false);
}
template <class F>
cudaError_t cudaFuncSetAttribute(F *, cudaFuncAttribute, int) {
  return cudaSuccess;
}

/* ------------------------------------------------------------------ inside a kernel */

struct acre_host_thread {
  dim3 index, block, block_size, grid;
};

/* What a thread may wait for. */
enum acre_host_wait {
  ACRE_WAIT_BARRIER,
  ACRE_WAIT_WARP,
  ACRE_WAIT_XOR,
  ACRE_WAIT_SHUFFLE,
  ACRE_WAIT_MATRIX,
  ACRE_WAIT_NAME,
  ACRE_WAIT_MBARRIER,
  ACRE_WAIT_WGMMA,
  ACRE_WAITS
};

extern "C" {
const acre_host_thread *acre_host_current(void);
unsigned char *acre_host_shared(void);
void acre_host_barrier(void);
/* What lane `source` of this warp gives, once all lanes of `mask` came here. */
uint32_t acre_host_exchange(unsigned mask, uint32_t value, int source, acre_host_wait kind);
/* What a whole warp does at once: `act`, for the parts of all its lanes, by the last to come. */
typedef void (*acre_host_act)(void *const *parts, int warp);
void acre_host_together(acre_host_act act, void *part, acre_host_wait kind);
void acre_host_conflict(void); /* of banks of shared memory: slow, not wrong */
/* `bytes` bytes and zeros up to `room`, seen from the first __syncthreads or __syncwarp on
 * behind the thread's wait for the group that it is of; a group ends at a commit, and a wait
 * leaves the latest `under_way` groups under way. */
void acre_host_copy(void *to, const void *from, size_t bytes, size_t room);
void acre_host_copies_commit(void);
void acre_host_copies_wait(int under_way);
}

#define threadIdx (acre_host_current()->index)
#define blockIdx (acre_host_current()->block)
#define blockDim (acre_host_current()->block_size)
#define gridDim (acre_host_current()->grid)

static inline void __syncthreads(void) { acre_host_barrier(); }
static inline void __syncwarp(unsigned mask = 0xffffffffu) {
  acre_host_exchange(mask, 0, (int)(threadIdx.x % 32), ACRE_WAIT_WARP);
}

template <class T>
static inline T acre_host_shuffle(unsigned mask, T value, int source, acre_host_wait kind) {
  static_assert(sizeof(T) == 4, "only 4-byte shuffles are here");
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  bits = acre_host_exchange(mask, bits, source, kind);
  memcpy(&value, &bits, sizeof bits);
  return value;
}
template <class T>
static inline T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return acre_host_shuffle(mask, value, (int)(threadIdx.x % 32) ^ lanes, ACRE_WAIT_XOR);
}
template <class T>
static inline T __shfl_sync(unsigned mask, T value, int source) {
  return acre_host_shuffle(mask, value, source % 32, ACRE_WAIT_SHUFFLE);
}

static inline unsigned __float_as_uint(float value) {
  unsigned bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

static inline float __uint_as_float(unsigned bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

template <class T>
static inline T min(T a, T b) {
  return b < a ? b : a;
}

/* ------------------------------------------------------------------ launching */

extern "C" cudaError_t acre_host_run(const char *name, dim3 grid, dim3 block, size_t shared,
                                     void (*call)(const void *), const void *arguments);

/* The call of a kernel, whole, so that it may be run later. */
template <class... P>
struct acre_host_call {
  const char *name;
  dim3 grid, block;
  size_t shared;
  void (*kernel)(P...);
  std::tuple<P...> arguments;
  static void apply(const void *call) {
    const acre_host_call *self = (const acre_host_call *)call;
    std::apply(self->kernel, self->arguments);
  }
  static cudaError_t run(const void *call) {
    const acre_host_call *self = (const acre_host_call *)call;
    return acre_host_run(self->name, self->grid, self->block, self->shared, apply, call);
  }
};

template <class... P, class... A>
cudaError_t acre_host_launch_on(cudaStream_t stream, const char *name, void (*kernel)(P...),
                                dim3 grid, dim3 block, size_t shared, A... arguments) {
  acre_host_call<P...> call = {name,   grid,   block,
                               shared, kernel, std::tuple<P...>(arguments...)};
  cudaError_t refused = acre_host_result();
  if (refused != cudaSuccess) return refused;
  return acre_host_enqueue(stream, acre_host_call<P...>::run, &call, sizeof call);
}

/* The same at once, for tests of kernels alone. */
template <class... P, class... A>
cudaError_t acre_host_launch(const char *name, void (*kernel)(P...), dim3 grid, dim3 block,
                             size_t shared, A... arguments) {
  acre_host_call<P...> call = {name,   grid,   block,
                               shared, kernel, std::tuple<P...>(arguments...)};
  return acre_host_call<P...>::run(&call);
}

#endif
