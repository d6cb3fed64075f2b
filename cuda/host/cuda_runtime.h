/* The CUDA runtime on a machine without one: just as much of it as the sources of cuda/ use,
 * so that the same kernels run, checked, on any host (host/run.cpp).
 *
 * Device memory is host memory, copies happen at once, and a kernel's threads are fibers.
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
  cudaErrorIllegalAddress = 700,
  cudaErrorLaunchFailure = 719,
  cudaErrorStreamCaptureUnsupported = 900,
};

enum cudaMemcpyKind { cudaMemcpyDefault = 4 };
enum cudaMemoryType { cudaMemoryTypeUnregistered = 0, cudaMemoryTypeDevice = 2 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum { cudaStreamNonBlocking = 1, cudaEventDisableTiming = 2, cudaHostAllocDefault = 0 };

struct cudaPointerAttributes {
  cudaMemoryType type;
};

typedef struct acre_host_stream {
  /* For libraries that touch device memory by themselves. */
  void (*access)(bool begins);
  /* Whether what run(arguments) does is kept for a graph that is recorded, instead of being
   * done now; `size` bytes of arguments are copied. */
  bool (*keep)(acre_host_stream *stream, void (*run)(const void *), const void *arguments,
               size_t size);
  struct acre_host_graph *recorded; /* NULL: nothing is */
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

/* What a part of a graph came to. */
extern "C" void acre_host_replayed(cudaError_t error);

/* A launch: the call that each thread makes, and its arguments. */
struct acre_host_work {
  const char *name;
  dim3 grid, block;
  size_t shared;
  void (*call)(const void *);
};

extern "C" cudaError_t acre_host_run(const acre_host_work *kernel, const void *arguments);

template <class... P>
struct acre_host_call {
  acre_host_work launch;
  void (*kernel)(P...);
  std::tuple<P...> arguments;
  static void run(const void *call) {
    const acre_host_call *self = (const acre_host_call *)call;
    std::apply(self->kernel, self->arguments);
  }
  static void replay(const void *call) {
    const acre_host_call *self = (const acre_host_call *)call;
    acre_host_replayed(acre_host_run(&self->launch, call));
  }
};

template <class... P, class... A>
cudaError_t acre_host_enqueue(const char *name, cudaStream_t stream, void (*kernel)(P...),
                              dim3 grid, dim3 block, size_t shared, A... arguments) {
  acre_host_call<P...> call = {{name, grid, block, shared, acre_host_call<P...>::run},
                               kernel,
                               std::tuple<P...>(arguments...)};
  if (stream && stream->keep(stream, acre_host_call<P...>::replay, &call, sizeof call))
    return cudaSuccess;
  return acre_host_run(&call.launch, &call);
}

/* On no stream: at once. */
template <class... P, class... A>
cudaError_t acre_host_launch(const char *name, void (*kernel)(P...), dim3 grid, dim3 block,
                             size_t shared, A... arguments) {
  return acre_host_enqueue(name, NULL, kernel, grid, block, shared, arguments...);
}

#endif
