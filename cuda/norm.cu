/* RMSNorm and the gradient through it: a block per row, its sums in a fixed order. */
#include "device.h"
#include "internal.h"

namespace acre {
namespace {

constexpr size_t SCRATCH = WARP * sizeof(float); /* a number per warp of a block */

/* 1 / sqrt(mean + eps), in float64 as on the CPU. */
__device__ float norm_factor(float squares, double eps, int64_t width) {
  return (float)(1.0 / sqrt((double)squares / (double)width + eps));
}

template <class T, int N>
__global__ void rmsnorm_kernel(T *y, const float *x, const float *gain, double eps,
                               int64_t rows, int64_t width) {
  float *scratch = (float *)acre_shared();
  int64_t first = threadIdx.x * N, step = (int64_t)blockDim.x * N;
  for (int64_t i = blockIdx.x; i < rows; i += gridDim.x) {
    const float *from = x + i * width;
    float numbers[N], by[N], squares = 0.0f;
    for (int64_t c = first; c < width; c += step) {
      load(numbers, from + c);
#pragma unroll
      for (int k = 0; k < N; k++) squares += numbers[k] * numbers[k];
    }
    float factor = norm_factor(block_reduce(squares, scratch, add()), eps, width);
    for (int64_t c = first; c < width; c += step) {
      load(numbers, from + c);
      load(by, gain + c);
#pragma unroll
      for (int k = 0; k < N; k++) numbers[k] = numbers[k] * factor * by[k];
      store(y + i * width + c, numbers);
    }
  }
}

/* dx += dy gain factor - x factor^3 / width * sum of dy gain x. */
template <int N>
__global__ void rmsnorm_back_kernel(float *dx, const float *dy, const float *x,
                                    const float *gain, double eps, int64_t rows,
                                    int64_t width) {
  float *scratch = (float *)acre_shared();
  int64_t first = threadIdx.x * N, step = (int64_t)blockDim.x * N;
  for (int64_t i = blockIdx.x; i < rows; i += gridDim.x) {
    const float *from = x + i * width, *by = dy + i * width;
    float *to = dx + i * width;
    float a[N], b[N], g[N], old[N], squares = 0.0f, sum = 0.0f;
    for (int64_t c = first; c < width; c += step) {
      load(a, from + c), load(b, by + c), load(g, gain + c);
#pragma unroll
      for (int k = 0; k < N; k++) squares += a[k] * a[k], sum += b[k] * g[k] * a[k];
    }
    squares = block_reduce(squares, scratch, add());
    sum = block_reduce(sum, scratch, add());
    float factor = norm_factor(squares, eps, width);
    double r = (double)factor;
    float inner = (float)(-r * r * r * (double)sum / (double)width);
    for (int64_t c = first; c < width; c += step) {
      load(a, from + c), load(b, by + c), load(g, gain + c), load(old, to + c);
#pragma unroll
      for (int k = 0; k < N; k++) old[k] += a[k] * inner + b[k] * g[k] * factor;
      store(to + c, old);
    }
  }
}

}  // namespace
}  // namespace acre

void acre_cuda_rmsnorm(acre_queue *queue, void *y, const float *x, const float *gain,
                       double eps, int64_t rows, int64_t width, acre_dtype dtype) {
  using namespace acre;
  for_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    bool packs = width % PACK == 0 && aligned(x, 0) && aligned(gain, 0) && aligned(y, 0);
    if (packs)
      ACRE_LAUNCH(queue, (rmsnorm_kernel<T, PACK>), rows, threads_for(width), SCRATCH,
                  (T *)y, x, gain, eps, rows, width);
    else
      ACRE_LAUNCH(queue, (rmsnorm_kernel<T, 1>), rows, threads_for(width), SCRATCH, (T *)y,
                  x, gain, eps, rows, width);
  });
}

void acre_cuda_rmsnorm_back(acre_queue *queue, float *dx, const float *dy, const float *x,
                            const float *gain, double eps, int64_t rows, int64_t width) {
  using namespace acre;
  bool packs = width % PACK == 0 && aligned(x, 0) && aligned(gain, 0) && aligned(dx, 0) &&
               aligned(dy, 0);
  if (packs)
    ACRE_LAUNCH(queue, (rmsnorm_back_kernel<PACK>), rows, threads_for(width), SCRATCH, dx,
                dy, x, gain, eps, rows, width);
  else
    ACRE_LAUNCH(queue, (rmsnorm_back_kernel<1>), rows, threads_for(width), SCRATCH, dx, dy,
                x, gain, eps, rows, width);
}
