/* silu(gate) * up of products that lie in float32, and the gradient through it. */
#include "device.h"
#include "internal.h"

namespace acre {
namespace {

constexpr int THREADS = 256;

/* exp(-gate), finite: its product with 0 must stay 0. */
__device__ __forceinline__ float exp_minus(float gate) {
  return expf(fminf(-gate, EXP_HIGH));
}

template <class T, int N>
__global__ void gated_kernel(T *y, const float *gate, const float *up, int64_t n) {
  int64_t step = (int64_t)gridDim.x * blockDim.x * N;
  for (int64_t i = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * N; i < n; i += step) {
    float g[N], u[N];
    load(g, gate + i), load(u, up + i);
#pragma unroll
    for (int k = 0; k < N; k++) g[k] = g[k] / (1.0f + exp_minus(g[k])) * u[k];
    store(y + i, g);
  }
}

template <class T, int N>
__global__ void swiglu_back_kernel(T *dgate, T *dup, const float *gate, const float *up,
                                   const float *dy, int64_t n) {
  int64_t step = (int64_t)gridDim.x * blockDim.x * N;
  for (int64_t i = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * N; i < n; i += step) {
    float g[N], u[N], d[N], by_up[N];
    load(g, gate + i), load(u, up + i), load(d, dy + i);
#pragma unroll
    for (int k = 0; k < N; k++) {
      float e = exp_minus(g[k]), s = 1.0f / (1.0f + e);
      by_up[k] = d[k] * (g[k] * s);
      g[k] = d[k] * u[k] * (s * (g[k] * (e * s) + 1.0f));
    }
    store(dgate + i, g), store(dup + i, by_up);
  }
}

}  // namespace
}  // namespace acre

void acre_cuda_gated(acre_queue *queue, void *y, const float *gate, const float *up,
                     int64_t n, acre_dtype dtype) {
  using namespace acre;
  bool packs = n % PACK == 0 && aligned(y, 0) && aligned(gate, 0) && aligned(up, 0);
  int64_t blocks = blocks_for(n, THREADS * (packs ? PACK : 1));
  for_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    if (packs)
      ACRE_LAUNCH(queue, (gated_kernel<T, PACK>), blocks, THREADS, 0, (T *)y, gate, up, n);
    else
      ACRE_LAUNCH(queue, (gated_kernel<T, 1>), blocks, THREADS, 0, (T *)y, gate, up, n);
  });
}

void acre_cuda_swiglu_back(acre_queue *queue, void *dgate, void *dup, const float *gate,
                           const float *up, const float *dy, int64_t rows, int64_t width,
                           acre_dtype dtype) {
  using namespace acre;
  int64_t n = rows * width;
  bool packs = n % PACK == 0 && aligned(dgate, 0) && aligned(dup, 0) && aligned(gate, 0) &&
               aligned(up, 0) && aligned(dy, 0);
  int64_t blocks = blocks_for(n, THREADS * (packs ? PACK : 1));
  for_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    if (packs)
      ACRE_LAUNCH(queue, (swiglu_back_kernel<T, PACK>), blocks, THREADS, 0, (T *)dgate,
                  (T *)dup, gate, up, dy, n);
    else
      ACRE_LAUNCH(queue, (swiglu_back_kernel<T, 1>), blocks, THREADS, 0, (T *)dgate,
                  (T *)dup, gate, up, dy, n);
  });
}
