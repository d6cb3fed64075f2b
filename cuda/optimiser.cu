/* AdamW, and the norm of a gradient: sums of a fixed number of parts, added in order. */
#include "device.h"
#include "internal.h"

#include <math.h>

namespace acre {
namespace {

constexpr int THREADS = 256;
constexpr int PARTS = 1024; /* of a sum, whatever the device: so it has one value */

__global__ void square_parts_kernel(double *parts, const float *x, int64_t n) {
  double *sums = (double *)acre_shared();
  double sum = 0.0;
  int64_t step = (int64_t)gridDim.x * blockDim.x;
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += step)
    sum += (double)x[i] * (double)x[i];
  sums[threadIdx.x] = sum;
  for (int half = (int)blockDim.x / 2; half > 0; half /= 2) {
    __syncthreads();
    if ((int)threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x == 0) parts[blockIdx.x] = sums[0];
}

/* A step's numbers, ready to be multiplied with. */
struct factors {
  float scale, beta1, rest1, beta2, rest2, rate, unbias, eps, decay;
};

__global__ void adamw_kernel(float *w, float *first, float *second, const float *gradient,
                             int64_t n, factors by) {
  int64_t step = (int64_t)gridDim.x * blockDim.x;
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += step) {
    float g = gradient[i] * by.scale;
    float m = first[i] * by.beta1 + g * by.rest1;
    float s = second[i] * by.beta2 + g * by.rest2 * g;
    first[i] = m, second[i] = s;
    w[i] -= w[i] * by.decay + m * by.rate / (sqrtf(s * by.unbias) + by.eps);
  }
}

}  // namespace
}  // namespace acre

/* The last PARTS numbers are added on the host, which waits for them anyway. */
void acre_cuda_sum_squares(acre_queue *queue, double *out, const float *x, int64_t n) {
  using namespace acre;
  *out = 0.0;
  int64_t blocks = acre_min(acre_ceil_div(n, THREADS), PARTS);
  double *parts = (double *)workspace(queue, PARTS * sizeof(double)), host[PARTS];
  if (blocks <= 0 || !parts) return;
  ACRE_LAUNCH(queue, square_parts_kernel, blocks, THREADS, THREADS * sizeof(double), parts,
              x, n);
  queue->owner->base.ops->download(queue, host, parts, (size_t)blocks * sizeof(double));
  for (int64_t i = 0; i < blocks; i++) *out += host[i];
}

void acre_cuda_adamw(acre_queue *queue, float *w, float *first, float *second,
                     const float *gradient, int64_t n, float scale,
                     const acre_adamw *adamw) {
  using namespace acre;
  double step = (double)adamw->step;
  factors by = {scale,
                (float)adamw->beta1,
                (float)(1 - adamw->beta1),
                (float)adamw->beta2,
                (float)(1 - adamw->beta2),
                (float)(adamw->lr / (1 - pow(adamw->beta1, step))),
                (float)(1 / (1 - pow(adamw->beta2, step))),
                (float)adamw->eps,
                (float)(adamw->lr * adamw->weight_decay)};
  ACRE_LAUNCH(queue, adamw_kernel, blocks_for(n, THREADS), THREADS, 0, w, first, second,
              gradient, n, by);
}
