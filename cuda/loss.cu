/* -log of a token's probability, and its gradient: a block per row of logits.
 *
 * Exponentials of differences to the row's highest logit are added in float32, a few dozen
 * at a time, and those sums in float64. */
#include "device.h"
#include "internal.h"

namespace acre {
namespace {

constexpr int THREADS = 256;
constexpr int AT_ONCE = 64; /* exponentials that are added up in float32 */
constexpr size_t SCRATCH = (THREADS / WARP) * sizeof(float) + THREADS * sizeof(double);

__device__ float highest_of(const float *logits, int64_t vocab, float *scratch) {
  float highest = -INFINITY;
  for (int64_t c = threadIdx.x; c < vocab; c += blockDim.x)
    highest = fmaxf(highest, logits[c]);
  return block_reduce(highest, scratch, most());
}

/* The sum over the row, to all threads; sums: a number per thread. */
__device__ double sum_of(const float *logits, int64_t vocab, float highest, double *sums) {
  double sum = 0.0;
  int64_t step = (int64_t)blockDim.x * AT_ONCE;
  for (int64_t c = threadIdx.x; c < vocab; c += step) {
    float part = 0.0f;
    for (int64_t at = c; at < c + step && at < vocab; at += blockDim.x)
      part += expf(logits[at] - highest);
    sum += (double)part;
  }
  sums[threadIdx.x] = sum;
  for (int half = (int)blockDim.x / 2; half > 0; half /= 2) {
    __syncthreads();
    if ((int)threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  __syncthreads();
  double all = sums[0];
  __syncthreads();
  return all;
}

/* dlogits and weight: NULL where only the loss is wanted. */
template <class T>
__global__ void loss_kernel(T *dlogits, float *out, const float *logits,
                            const int32_t *target, const float *weight, int64_t rows,
                            int64_t vocab) {
  double *sums = (double *)acre_shared();
  float *scratch = (float *)(sums + THREADS);
  for (int64_t i = blockIdx.x; i < rows; i += gridDim.x) {
    const float *row = logits + i * vocab;
    T *to = dlogits ? dlogits + i * vocab : NULL;
    int64_t wanted = target[i];
    if (wanted < 0) {
      if (threadIdx.x == 0) out[i] = 0.0f;
      for (int64_t c = threadIdx.x; to && c < vocab; c += blockDim.x)
        to[c] = narrow<T>(0.0f);
      continue;
    }
    float highest = highest_of(row, vocab, scratch);
    double sum = sum_of(row, vocab, highest, sums);
    if (threadIdx.x == 0)
      out[i] = (float)(log(sum) + (double)highest - (double)row[wanted]);
    if (!to) continue;
    float by = weight[i], share = (float)((double)by / sum);
    for (int64_t c = threadIdx.x; c < vocab; c += blockDim.x) {
      float gradient = expf(row[c] - highest) * share;
      to[c] = narrow<T>(c == wanted ? gradient - by : gradient);
    }
  }
}

}  // namespace
}  // namespace acre

void acre_cuda_cross_entropy(acre_queue *queue, float *out, const float *logits,
                             const int32_t *target, int64_t rows, int64_t vocab) {
  using namespace acre;
  ACRE_LAUNCH(queue, loss_kernel<float>, rows, THREADS, SCRATCH, (float *)NULL, out, logits,
              target, (const float *)NULL, rows, vocab);
}

void acre_cuda_cross_entropy_back(acre_queue *queue, void *dlogits, float *out,
                                  const float *logits, const int32_t *target,
                                  const float *weight, int64_t rows, int64_t vocab,
                                  acre_dtype dtype) {
  using namespace acre;
  for_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    ACRE_LAUNCH(queue, loss_kernel<T>, rows, THREADS, SCRATCH, (T *)dlogits, out, logits,
                target, weight, rows, vocab);
  });
}
