/* The way back through scores (csrc/cpu/score_back.c has the formulas): a
 * pass that measures every item, then dq by blocks of items and dk by blocks of keys, each
 * number added up by one thread, in order. All in float32. */
#include "score.h"

#include <math.h>

namespace acre {
namespace {

template <class T>
struct gain_call {
  float *dq, *dk;
  int64_t dq_stride;
  const T *q, *keys;
  const float *pull;
  int64_t m, q_stride, blocks;
  item_map map;
  float *measures; /* origin, sums of exponentials p and of p * pull */
  int kv_heads, d, chunks;
  float scale, root;
};

constexpr int A = SCORED_ITEMS, B = SCORED_KEYS, S = SCORED_END,
              FLOATS = S + ITEMS * (TILE + 1);
constexpr size_t SHARED = FLOATS * sizeof(float);

template <class T>
__global__ __launch_bounds__(TILE_THREADS,
                             TILE_BLOCKS) void gain_measure_kernel(gain_call<T> a) {
  float *memory = (float *)acre_shared();
  int lane = (int)threadIdx.x % WARP;
  for (int64_t b = blockIdx.x; b < a.blocks; b += gridDim.x) {
    int kv = (int)(b % a.kv_heads);
    int item = (int)(b / a.kv_heads) * ITEMS;
    int items = min(ITEMS, a.map.count(kv) - item);
    if (items <= 0) continue;
    float origin[OWN_ITEMS], sum[OWN_ITEMS] = {0.0f}, pulled[OWN_ITEMS] = {0.0f};
    for (int r = 0; r < OWN_ITEMS; r++) origin[r] = -INFINITY;
    for (int64_t key = 0; key < a.m; key += TILE) {
      float s[OWN_ITEMS];
      int count = dot_tile<T>(a, s, kv, item, items, key, memory);
      float pull = lane < count ? a.pull[key + lane] : 0.0f;
#pragma unroll
      for (int r = 0; r < OWN_ITEMS; r++) {
        float x = lane < count ? s[r] : -INFINITY;
        float later = fmaxf(origin[r], ceilf(warp_reduce(x, most())));
        float weight = lane < count ? exp2f(x - later) : 0.0f;
        float by = rescale(origin[r], later);
        sum[r] = sum[r] * by + warp_reduce(weight, add());
        pulled[r] = pulled[r] * by + warp_reduce(weight * pull, add());
        origin[r] = later;
      }
    }
    for (int r = 0; r < OWN_ITEMS; r++) {
      if (lane || own_item(r) >= items) continue;
      float *measure = measure_of(a, kv, item + own_item(r));
      measure[0] = origin[r], measure[1] = sum[r], measure[2] = pulled[r];
    }
  }
}

/* The gradient by every logit of a meeting, to shared memory. */
template <class T>
__device__ int logit_gradients(const gain_call<T> &a, int kv, int item, int items,
                               int64_t key, float *memory) {
  float s[OWN_ITEMS];
  int lane = (int)threadIdx.x % WARP;
  int count = dot_tile<T>(a, s, kv, item, items, key, memory);
  float pull = lane < count ? a.pull[key + lane] : 0.0f;
#pragma unroll
  for (int r = 0; r < OWN_ITEMS; r++) {
    float gradient = 0.0f;
    if (lane < count && own_item(r) < items) {
      const float *measure = measure_of(a, kv, item + own_item(r));
      float whole = 1.0f / measure[1];
      gradient = exp2f(s[r] - measure[0]) * (whole * a.root) * (pull - measure[2] * whole);
    }
    memory[S + own_item(r) * (TILE + 1) + lane] = gradient;
  }
  __syncthreads();
  return count;
}

template <class T>
__global__ __launch_bounds__(TILE_THREADS,
                             TILE_BLOCKS) void gain_dq_kernel(gain_call<T> a) {
  float *memory = (float *)acre_shared();
  int column = (int)threadIdx.x % CHUNK, side = (int)threadIdx.x / CHUNK;
  for (int64_t b = blockIdx.x; b < a.blocks; b += gridDim.x) {
    int chunk = (int)(b % a.chunks) * CHUNK, kv = (int)(b / a.chunks % a.kv_heads);
    int item = (int)(b / a.chunks / a.kv_heads) * ITEMS;
    int items = min(ITEMS, a.map.count(kv) - item);
    if (items <= 0) continue;
    float sum[ITEMS / SIDES] = {0.0f};
    for (int64_t key = 0; key < a.m; key += TILE) {
      int count = logit_gradients(a, kv, item, items, key, memory);
      load_keys(memory + B, a.keys + (key * a.kv_heads + kv) * a.d,
                (int64_t)a.kv_heads * a.d, count, chunk, a.d);
      __syncthreads();
      add_keys(sum, memory + S, memory + B);
      __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < ITEMS / SIDES; i++) {
      int own = side * (ITEMS / SIDES) + i;
      if (own >= items || chunk + column >= a.d) continue;
      int64_t head = a.map.head(kv, item + own);
      a.dq[a.map.row(kv, item + own) * a.dq_stride + head * a.d + chunk + column] += sum[i];
    }
  }
}

template <class T>
__global__ __launch_bounds__(TILE_THREADS,
                             TILE_BLOCKS) void gain_dk_kernel(gain_call<T> a) {
  float *memory = (float *)acre_shared();
  int column = (int)threadIdx.x % CHUNK, side = (int)threadIdx.x / CHUNK;
  for (int64_t b = blockIdx.x; b < a.blocks; b += gridDim.x) {
    int chunk = (int)(b % a.chunks) * CHUNK, kv = (int)(b / a.chunks % a.kv_heads),
        count = 0;
    int64_t key = b / a.chunks / a.kv_heads * TILE;
    float sum[TILE / SIDES] = {0.0f};
    for (int item = 0; item < a.map.count(kv); item += ITEMS) {
      int items = min(ITEMS, a.map.count(kv) - item);
      count = logit_gradients(a, kv, item, items, key, memory);
      load_items<T>(memory + A, PITCH, a.q, a.q_stride, a.map, kv, item, items, chunk, a.d);
      __syncthreads();
      add_items(sum, memory + S, memory + A, items);
      __syncthreads();
    }
#pragma unroll
    for (int j = 0; j < TILE / SIDES; j++) {
      int own = side * (TILE / SIDES) + j;
      if (own >= count || chunk + column >= a.d) continue;
      a.dk[((key + own) * a.kv_heads + kv) * a.d + chunk + column] += sum[j];
    }
  }
}

}  // namespace
}  // namespace acre

void acre_cuda_score_back(acre_queue *queue, float *dq, int64_t dq_stride, float *dk,
                          const float *pull, const void *q, const void *keys,
                          const uint8_t *use, int64_t t, int64_t m,
                          const acre_heads *heads) {
  using namespace acre;
  if (t <= 0 || m <= 0) return;
  score_space space = score_space_open(queue, use, pull, t, m, heads);
  if (!space.rows) return;
  for_dtype(heads->dtype, [&](auto zero) {
    using T = decltype(zero);
    gain_call<T> a = {};
    a.dk = dk, a.dq_stride = dq_stride, a.keys = (const T *)keys, a.m = m;
    a.pull = space.pull, a.measures = space.measures;
    a.kv_heads = (int)heads->kv_heads, a.d = (int)heads->head_dim;
    a.chunks = (a.d + CHUNK - 1) / CHUNK, a.q_stride = heads->heads * a.d;
    a.scale = (float)((double)LOG2E / sqrt((double)a.d));
    a.root = 1.0f / sqrtf((float)a.d);
    for (int64_t row = 0; row < t; row += space.rows) {
      int64_t rows = acre_min(space.rows, t - row);
      int64_t blocks = acre_ceil_div(rows * space.most, ITEMS) * a.kv_heads;
      a.q = (const T *)q + row * a.q_stride, a.dq = dq + row * dq_stride;
      a.map = item_map{(int)rows, 0, space.list, space.start};
      a.blocks = blocks;
      ACRE_LAUNCH(queue, gain_measure_kernel<T>, a.blocks, TILE_THREADS, SHARED, a);
      a.blocks = blocks * a.chunks;
      ACRE_LAUNCH(queue, gain_dq_kernel<T>, a.blocks, TILE_THREADS, SHARED, a);
      a.blocks = acre_ceil_div(m, TILE) * a.kv_heads * a.chunks;
      ACRE_LAUNCH(queue, gain_dk_kernel<T>, a.blocks, TILE_THREADS, SHARED, a);
    }
  });
}
