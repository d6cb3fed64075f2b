/* The mass that a question's tokens put on each L1 entry, in two passes over the keys: the
 * first finds every item's origin and sum, the second adds weights over the items, in order,
 * into the scores of a block's own keys. */
#include "score.h"

#include <math.h>

namespace acre {
namespace {

template <class T>
struct score_call {
  float *scores;
  const float *q;
  int64_t q_stride;
  const T *keys;
  int64_t m, blocks;
  item_map map;
  float *measures; /* origin, sum */
  int kv_heads, d;
  float scale;
};

constexpr int SUMS = SCORED_END, FLOATS = SUMS + WARPS * TILE;
constexpr size_t SHARED = FLOATS * sizeof(float);

template <class T>
__global__ __launch_bounds__(TILE_THREADS,
                             TILE_BLOCKS) void measure_kernel(score_call<T> a) {
  float *memory = (float *)acre_shared();
  int lane = (int)threadIdx.x % WARP;
  for (int64_t b = blockIdx.x; b < a.blocks; b += gridDim.x) {
    int kv = (int)(b % a.kv_heads);
    int item = (int)(b / a.kv_heads) * ITEMS;
    int items = min(ITEMS, a.map.count(kv) - item);
    if (items <= 0) continue;
    running now[OWN_ITEMS];
    for (int r = 0; r < OWN_ITEMS; r++) now[r] = running{-INFINITY, 0.0f};
    for (int64_t key = 0; key < a.m; key += TILE) {
      float s[OWN_ITEMS];
      int count = dot_tile<T>(a, s, kv, item, items, key, memory);
#pragma unroll
      for (int r = 0; r < OWN_ITEMS; r++) {
        float x = lane < count ? s[r] : -INFINITY;
        float origin = fmaxf(now[r].origin, ceilf(warp_reduce(x, most())));
        float weight = lane < count ? exp2f(x - origin) : 0.0f;
        now[r].sum =
            now[r].sum * rescale(now[r].origin, origin) + warp_reduce(weight, add());
        now[r].origin = origin;
      }
    }
    for (int r = 0; r < OWN_ITEMS; r++) {
      if (lane || own_item(r) >= items) continue;
      float *measure = measure_of(a, kv, item + own_item(r));
      measure[0] = now[r].origin, measure[1] = now[r].sum;
    }
  }
}

template <class T>
__global__ __launch_bounds__(TILE_THREADS, TILE_BLOCKS) void add_kernel(score_call<T> a) {
  float *memory = (float *)acre_shared(), *sums = memory + SUMS;
  int lane = (int)threadIdx.x % WARP, warp = (int)threadIdx.x / WARP;
  for (int64_t b = blockIdx.x; b < a.blocks; b += gridDim.x) {
    float sum = 0.0f;
    int count = (int)min((int64_t)TILE, a.m - b * TILE);
    for (int kv = 0; kv < a.kv_heads; kv++) {
      for (int item = 0; item < a.map.count(kv); item += ITEMS) {
        int items = min(ITEMS, a.map.count(kv) - item);
        float s[OWN_ITEMS];
        dot_tile<T>(a, s, kv, item, items, b * TILE, memory);
        for (int r = 0; r < OWN_ITEMS; r++) {
          if (own_item(r) >= items) continue;
          const float *measure = measure_of(a, kv, item + own_item(r));
          sum += exp2f(s[r] - measure[0]) / measure[1];
        }
      }
    }
    __syncthreads();
    sums[warp * TILE + lane] = sum;
    __syncthreads();
    if (warp == 0 && lane < count) {
      for (int i = 1; i < WARPS; i++) sum += sums[i * TILE + lane];
      a.scores[b * TILE + lane] += sum;
    }
    __syncthreads();
  }
}

}  // namespace

score_space score_space_open(acre_queue *queue, const uint8_t *use, const float *pull,
                             int64_t t, int64_t m, const acre_heads *heads) {
  int64_t h = heads->heads, g = heads->kv_heads, group = h / g;
  int64_t fixed = acre_round_up((g + 1 + h) * (int64_t)sizeof(int32_t), 16);
  if (pull) fixed += acre_round_up(m * (int64_t)sizeof(float), 16);
  score_space space = {};
  for (int64_t i = 0; i < h; i++) space.used += use[i] != 0;
  int64_t each = space.used * MEASURES * (int64_t)sizeof(float);
  if (!space.used) return space;
  int64_t room = (int64_t)workspace_room(queue) - fixed;
  int64_t rows = acre_min(t, acre_max(1, room / each));
  char *memory = (char *)workspace(queue, (size_t)(fixed + rows * each));
  if (!memory) return space;
  space.rows = rows;
  space.start = (int32_t *)memory, space.list = space.start + g + 1;
  space.measures = (float *)(memory + fixed);
  sender<int32_t> starts(queue, space.start), list(queue, space.list);
  int64_t used = 0;
  for (int64_t kv = 0; kv < g; kv++) {
    int64_t before = used;
    starts.add((int32_t)used);
    for (int64_t i = kv * group; i < (kv + 1) * group; i++)
      if (use[i]) list.add((int32_t)i), used++;
    space.most = acre_max(space.most, used - before);
  }
  starts.add((int32_t)used);
  if (pull) {
    space.pull = (float *)(memory + acre_round_up((g + 1 + h) * 4, 16));
    send(queue, space.pull, pull, (size_t)m * sizeof(float));
  }
  return space;
}

}  // namespace acre

void acre_cuda_score(acre_queue *queue, float *scores, const float *q, int64_t q_stride,
                     const void *keys, const uint8_t *use, int64_t t, int64_t m,
                     const acre_heads *heads) {
  using namespace acre;
  if (t <= 0 || m <= 0) return;
  score_space space = score_space_open(queue, use, NULL, t, m, heads);
  if (!space.rows) return;
  for_dtype(heads->dtype, [&](auto zero) {
    using T = decltype(zero);
    score_call<T> a = {};
    a.scores = scores, a.q_stride = q_stride, a.keys = (const T *)keys, a.m = m;
    a.measures = space.measures;
    a.kv_heads = (int)heads->kv_heads, a.d = (int)heads->head_dim;
    a.scale = (float)((double)LOG2E / sqrt((double)a.d));
    for (int64_t row = 0; row < t; row += space.rows) {
      int64_t rows = acre_min(space.rows, t - row);
      a.q = q + row * q_stride;
      a.map = item_map{(int)rows, 0, space.list, space.start};
      a.blocks = acre_ceil_div(rows * space.most, ITEMS) * a.kv_heads;
      ACRE_LAUNCH(queue, measure_kernel<T>, a.blocks, TILE_THREADS, SHARED, a);
      a.blocks = acre_ceil_div(m, TILE);
      ACRE_LAUNCH(queue, add_kernel<T>, a.blocks, TILE_THREADS, SHARED, a);
    }
  });
}
