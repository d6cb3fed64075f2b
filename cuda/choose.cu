/* Choosing a token where the logits lie: the highest, the k highest, and penalties.
 *
 * A logit and its id become one integer that is larger for a higher logit and, of equals, for
 * the lower id: no two are the same, so whatever the order of work the result is one. Blocks
 * take their shares of a row and leave what they found in the workspace; one block joins it. */
#include "device.h"
#include "internal.h"

#include <math.h>

namespace acre {
namespace {

constexpr int THREADS = 256;
constexpr int SORTED = 2 * ACRE_TOP_MOST; /* keys that a block has in shared memory */
constexpr int64_t SHARE_LEAST = 4 * THREADS;
constexpr size_t SORTED_BYTES = SORTED * sizeof(uint64_t) + sizeof(int);

/* ------------------------------------------------------------------ keys */

/* Integers in the order of floats: -0 as 0, NaN below all; 0 is lower than any key. */
__device__ __forceinline__ uint64_t key_of(float x, int64_t id) {
  uint32_t bits = 0;
  if (x == x) {
    bits = __float_as_uint(x == 0.0f ? 0.0f : x);
    bits = bits >> 31 ? ~bits : bits | 0x80000000u;
  }
  return (uint64_t)bits << 32 | (uint32_t) ~(uint32_t)id;
}

__device__ __forceinline__ int32_t id_of(uint64_t key) { return (int32_t) ~(uint32_t)key; }

/* The highest of the block's keys, to all its threads. */
__device__ uint64_t highest_of(uint64_t key, uint64_t *scratch) {
  scratch[threadIdx.x] = key;
  for (int half = THREADS / 2; half > 0; half /= 2) {
    __syncthreads();
    if ((int)threadIdx.x < half && scratch[threadIdx.x + half] > scratch[threadIdx.x])
      scratch[threadIdx.x] = scratch[threadIdx.x + half];
  }
  __syncthreads();
  uint64_t all = scratch[0];
  __syncthreads();
  return all;
}

/* ------------------------------------------------------------------ the highest */

/* found [rows][shares]: of each share of each row. */
__global__ __launch_bounds__(THREADS) void best_kernel(uint64_t *found, const float *logits,
                                                       int64_t rows, int64_t vocab,
                                                       int64_t shares) {
  uint64_t *scratch = (uint64_t *)acre_shared();
  for (int64_t b = blockIdx.x; b < rows * shares; b += gridDim.x) {
    const float *row = logits + b / shares * vocab;
    int64_t share = b % shares, end = (share + 1) * vocab / shares;
    uint64_t best = 0;
    for (int64_t c = share * vocab / shares + threadIdx.x; c < end; c += THREADS) {
      uint64_t key = key_of(row[c], c);
      best = key > best ? key : best;
    }
    best = highest_of(best, scratch);
    if (threadIdx.x == 0) found[b] = best;
  }
}

__global__ __launch_bounds__(THREADS) void best_join_kernel(int32_t *id,
                                                            const uint64_t *found,
                                                            int64_t rows, int64_t shares) {
  uint64_t *scratch = (uint64_t *)acre_shared();
  for (int64_t i = blockIdx.x; i < rows; i += gridDim.x) {
    uint64_t best = 0;
    for (int64_t s = threadIdx.x; s < shares; s += THREADS)
      best = found[i * shares + s] > best ? found[i * shares + s] : best;
    best = highest_of(best, scratch);
    if (threadIdx.x == 0) id[i] = id_of(best);
  }
}

/* ------------------------------------------------------------------ the k highest */

/* Puts SORTED keys in order, the highest first (bitonic). All threads, after a barrier. */
__device__ void sort(uint64_t *keys) {
  for (int size = 2; size <= SORTED; size *= 2) {
    for (int step = size / 2; step > 0; step /= 2) {
      for (int i = (int)threadIdx.x; i < SORTED / 2; i += THREADS) {
        int low = 2 * i - i % step, high = low + step;
        bool falls = (low & size) == 0;
        uint64_t a = keys[low], b = keys[high];
        if ((a < b) == falls) keys[low] = b, keys[high] = a;
      }
      __syncthreads();
    }
  }
}

/* Leaves the k highest of keys(first), ..., keys(end - 1), the highest first, in the first k
 * of shared memory; 0 where there are fewer. Those that come next lie behind the k. */
template <class F>
__device__ void highest_k(uint64_t *sorted, int k, int64_t first, int64_t end, F keys) {
  int *better = (int *)(sorted + SORTED);
  for (int i = (int)threadIdx.x; i < k; i += THREADS) sorted[i] = 0;
  for (int64_t at = first; at < end; at += SORTED - k) {
    if (threadIdx.x == 0) *better = 0;
    __syncthreads();
    uint64_t least = sorted[k - 1];
    for (int i = k + (int)threadIdx.x; i < SORTED; i += THREADS) {
      int64_t c = at + i - k;
      uint64_t key = c < end ? keys(c) : 0;
      sorted[i] = key;
      if (key > least) *better = 1; /* whoever says it */
    }
    __syncthreads();
    if (*better) sort(sorted);
  }
  __syncthreads();
}

/* found [shares][k]. */
__global__ __launch_bounds__(THREADS) void top_kernel(uint64_t *found, const float *logits,
                                                      int64_t vocab, int64_t shares,
                                                      int k) {
  uint64_t *sorted = (uint64_t *)acre_shared();
  for (int64_t share = blockIdx.x; share < shares; share += gridDim.x) {
    highest_k(sorted, k, share * vocab / shares, (share + 1) * vocab / shares,
              [&](int64_t c) { return key_of(logits[c], c); });
    for (int i = (int)threadIdx.x; i < k; i += THREADS) found[share * k + i] = sorted[i];
    __syncthreads();
  }
}

__global__ __launch_bounds__(THREADS) void top_join_kernel(float *values, int32_t *ids,
                                                           const uint64_t *found,
                                                           const float *logits,
                                                           int64_t shares, int k) {
  uint64_t *sorted = (uint64_t *)acre_shared();
  highest_k(sorted, k, 0, shares * k, [&](int64_t c) { return found[c]; });
  for (int i = (int)threadIdx.x; i < k; i += THREADS) {
    ids[i] = id_of(sorted[i]);
    values[i] = logits[ids[i]];
  }
}

/* ------------------------------------------------------------------ their mass */

/* The sum of the block's numbers, in a fixed order, to thread 0. */
__device__ double sum_of(double x, double *scratch) {
  scratch[threadIdx.x] = x;
  for (int half = THREADS / 2; half > 0; half /= 2) {
    __syncthreads();
    if ((int)threadIdx.x < half) scratch[threadIdx.x] += scratch[threadIdx.x + half];
  }
  return scratch[0];
}

/* found [shares]; *highest is the row's highest logit. */
__global__ __launch_bounds__(THREADS) void mass_kernel(double *found, const float *logits,
                                                       const float *highest, int64_t vocab,
                                                       int64_t shares, float scale) {
  double *scratch = (double *)acre_shared();
  for (int64_t share = blockIdx.x; share < shares; share += gridDim.x) {
    int64_t end = (share + 1) * vocab / shares;
    double sum = 0.0;
    for (int64_t c = share * vocab / shares + threadIdx.x; c < end; c += THREADS)
      if (logits[c] > -INFINITY) sum += (double)expf((logits[c] - *highest) * scale);
    sum = sum_of(sum, scratch);
    if (threadIdx.x == 0) found[share] = sum;
    __syncthreads();
  }
}

__global__ __launch_bounds__(THREADS) void mass_join_kernel(float *mass,
                                                            const double *found,
                                                            int64_t shares) {
  double *scratch = (double *)acre_shared();
  double sum = 0.0;
  for (int64_t s = threadIdx.x; s < shares; s += THREADS) sum += found[s];
  sum = sum_of(sum, scratch);
  if (threadIdx.x == 0) *mass = (float)sum;
}

/* ------------------------------------------------------------------ penalties */

__global__ void penalize_kernel(float *logits, const int32_t *ids, int64_t count,
                                float penalty) {
  int64_t step = (int64_t)gridDim.x * blockDim.x;
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) {
    float *x = &logits[ids[i]];
    *x = *x > 0.0f ? *x / penalty : *x * penalty;
  }
}

/* Shares of a row: enough for each to be worth a block, as far as the workspace goes. */
int64_t shares_of(const acre_queue *queue, int64_t vocab, int64_t least, size_t bytes) {
  int64_t wanted = acre_min(vocab / least, 2 * queue->owner->chip.processors);
  return acre_max(acre_min(wanted, (int64_t)(workspace_room(queue) / bytes)), 1);
}

}  // namespace
}  // namespace acre

void acre_cuda_argmax(acre_queue *queue, int32_t *id, const float *logits, int64_t rows,
                      int64_t vocab) {
  using namespace acre;
  if (rows <= 0) return;
  size_t bytes = (size_t)rows * sizeof(uint64_t);
  int64_t shares = shares_of(queue, vocab, SHARE_LEAST, bytes);
  uint64_t *found = (uint64_t *)workspace(queue, (size_t)shares * bytes);
  if (!found) return;
  size_t shared = THREADS * sizeof(uint64_t);
  ACRE_LAUNCH(queue, best_kernel, rows * shares, THREADS, shared, found, logits, rows,
              vocab, shares);
  ACRE_LAUNCH(queue, best_join_kernel, rows, THREADS, shared, id, found, rows, shares);
}

void acre_cuda_top(acre_queue *queue, float *values, int32_t *ids, float *mass,
                   const float *logits, int64_t vocab, int64_t k, float scale) {
  using namespace acre;
  size_t bytes = (size_t)k * sizeof(uint64_t);
  int64_t shares = shares_of(queue, vocab, SORTED, bytes);
  uint64_t *found = (uint64_t *)workspace(queue, (size_t)shares * bytes);
  if (!found) return;
  ACRE_LAUNCH(queue, top_kernel, shares, THREADS, SORTED_BYTES, found, logits, vocab,
              shares, (int)k);
  ACRE_LAUNCH(queue, top_join_kernel, 1, THREADS, SORTED_BYTES, values, ids, found, logits,
              shares, (int)k);
  size_t shared = THREADS * sizeof(double);
  shares = shares_of(queue, vocab, SHARE_LEAST, sizeof(double));
  double *sums = (double *)workspace(queue, (size_t)shares * sizeof(double));
  if (!sums) return;
  ACRE_LAUNCH(queue, mass_kernel, shares, THREADS, shared, sums, logits, values, vocab,
              shares, scale);
  ACRE_LAUNCH(queue, mass_join_kernel, 1, THREADS, shared, mass, sums, shares);
}

void acre_cuda_penalize(acre_queue *queue, float *logits, const int32_t *ids, int64_t count,
                        float penalty) {
  using namespace acre;
  ACRE_LAUNCH(queue, penalize_kernel, blocks_for(count, THREADS), THREADS, 0, logits, ids,
              count, penalty);
}
