/* What kernels share: numbers of T as float32, sixteen bytes at a time, and reductions.
 *
 * T is float or bf16; arithmetic is float32. Shared memory is always dynamic, its size part
 * of the launch, so that a plan of it can be checked on the host. Indices that may pass 2^31
 * are int64_t; a block takes rows blockIdx.x, blockIdx.x + gridDim.x, ... so that a grid of
 * any size is right. */
#ifndef ACRE_CUDA_DEVICE_H
#define ACRE_CUDA_DEVICE_H

#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <stdint.h>

typedef __nv_bfloat16 bf16;

#ifdef __CUDACC__
extern __shared__ __align__(16) unsigned char acre_shared_bytes[];
static __device__ __forceinline__ unsigned char *acre_shared(void) {
  return acre_shared_bytes;
}
#else
static inline unsigned char *acre_shared(void) { return acre_host_shared(); }
#endif

namespace acre {

#ifdef __CUDACC__
/* As instructions take it. */
__device__ __forceinline__ unsigned shared_address(const void *shared) {
  return (unsigned)__cvta_generic_to_shared(shared);
}
#endif

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr int PACK = 8;        /* numbers that a thread takes at once */
constexpr int PACK_BYTES = 16; /* of one access */
constexpr float LOG2E = 1.4426950408889634f;
constexpr float EXP_HIGH = 88.0f; /* exp of it is finite */

/* ------------------------------------------------------------------ numbers */

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(bf16 x) { return __bfloat162float(x); }

template <class T>
__device__ __forceinline__ T narrow(float x);
template <>
__device__ __forceinline__ float narrow<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ bf16 narrow<bf16>(float x) {
  return __float2bfloat16_rn(x);
}

/* T(x), as float32. */
template <class T>
__device__ __forceinline__ float rounded(float x) {
  return widen(narrow<T>(x));
}

/* N numbers: one, or PACK of them from an address that is a multiple of sixteen. */
template <int N, class T>
__device__ __forceinline__ void load(float (&to)[N], const T *from) {
  if constexpr (N == 1) {
    to[0] = widen(*from);
  } else {
    constexpr int EACH = PACK_BYTES / (int)sizeof(T);
    union {
      uint4 bytes[N / EACH];
      T numbers[N];
    } pack;
#pragma unroll
    for (int i = 0; i < N / EACH; i++) pack.bytes[i] = ((const uint4 *)from)[i];
#pragma unroll
    for (int i = 0; i < N; i++) to[i] = widen(pack.numbers[i]);
  }
}

template <int N, class T>
__device__ __forceinline__ void store(T *to, const float (&from)[N]) {
  if constexpr (N == 1) {
    *to = narrow<T>(from[0]);
  } else {
    constexpr int EACH = PACK_BYTES / (int)sizeof(T);
    union {
      uint4 bytes[N / EACH];
      T numbers[N];
    } pack;
#pragma unroll
    for (int i = 0; i < N; i++) pack.numbers[i] = narrow<T>(from[i]);
#pragma unroll
    for (int i = 0; i < N / EACH; i++) ((uint4 *)to)[i] = pack.bytes[i];
  }
}

/* ------------------------------------------------------------------ reductions */

struct add {
  __device__ float operator()(float a, float b) const { return a + b; }
};
struct most {
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

/* Of the warp's values, to all its lanes, always in the same order. */
template <class F>
__device__ __forceinline__ float warp_reduce(float x, F by) {
#pragma unroll
  for (int lanes = WARP / 2; lanes > 0; lanes /= 2)
    x = by(x, __shfl_xor_sync(ALL_LANES, x, lanes));
  return x;
}

/* Of the block's values, to all its threads; whole warps. scratch: a number per warp. */
template <class N, class F>
__device__ __forceinline__ N block_gather(N x, N *scratch, F by) {
  int warps = (int)blockDim.x / WARP;
  if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = x;
  __syncthreads();
  N all = scratch[0];
  for (int i = 1; i < warps; i++) all = by(all, scratch[i]);
  __syncthreads();
  return all;
}

template <class F>
__device__ __forceinline__ float block_reduce(float x, float *scratch, F by) {
  return block_gather(warp_reduce(x, by), scratch, by);
}

}  // namespace acre
#endif
