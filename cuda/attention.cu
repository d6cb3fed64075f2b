/* Softmax attention over [prefix | own] in one pass, for any device and any head_dim: no score
 * matrix is ever stored, and no matrix unit is used.
 *
 * For each tile of keys an item keeps a whole origin, a sum and an output that is not yet
 * divided (csrc/cpu/kernels.h, softmax), so its result depends on its own keys alone. A row
 * decoded alone shares its tiles out over runs, whose results a second kernel joins in
 * order. */
#include "internal.h"
#include "tiles.h"

#include <math.h>

namespace acre {
namespace {

constexpr int64_t RUNS = 64; /* most runs of one decoded row */

template <class T>
struct attend_call {
  T *out;
  int64_t out_stride;
  float *lse; /* nullable */
  const float *q;
  int64_t q_stride;
  const T *keys[2], *values[2]; /* prefix, own */
  const float *bias[2];         /* nullable */
  int64_t count[2], tiles[2];   /* that some row sees */
  int64_t seen, blocks;
  item_map map;
  int heads, kv_heads, d;
  float scale;
  float *partial;       /* [runs][heads][d + 2], where there are several runs */
  int64_t runs_most;    /* that there are blocks for */
  const int32_t *steps; /* taken of a loop; nullable */
};

/* What moves on in a loop, where each step sees one key more and shares out its tiles as it
 * would alone. The call itself stays where arguments lie. */
struct attend_now {
  int64_t seen, tiles, runs;

  template <class T>
  __device__ explicit attend_now(const attend_call<T> &a) {
    int64_t moved = a.steps ? *a.steps : 0;
    seen = a.seen + moved;
    tiles = a.tiles[0] + (a.count[1] + moved + TILE - 1) / TILE;
    runs = min(a.runs_most, tiles);
  }
};

/* Where everything lies in shared memory, in floats. */
struct attend_plan {
  int pitch, q, o, chunk, p, factor, floats;
  __host__ __device__ explicit attend_plan(int d) {
    pitch = (d + CHUNK - 1) / CHUNK * CHUNK + 1;
    q = 0;
    o = q + ITEMS * pitch;
    chunk = o + ITEMS * pitch;
    p = chunk + TILE * PITCH;
    factor = p + ITEMS * (TILE + 1);
    floats = factor + ITEMS;
  }
};

template <class T>
struct attend_tile {
  const T *keys, *values; /* of the KV head */
  const float *bias;
  int64_t first, seen;
  int own, count; /* count: keys that the block's last row sees */

  __device__ attend_tile(const attend_call<T> &a, const attend_now &now, int kv,
                         int64_t index, int64_t last_row)
      : seen(now.seen) {
    own = index >= a.tiles[0];
    first = (own ? index - a.tiles[0] : index) * TILE;
    int64_t end = own ? seen + last_row + 1 : a.count[0];
    count = (int)min((int64_t)TILE, end - first);
    int64_t at = (first * a.kv_heads + kv) * a.d;
    keys = a.keys[own] + at, values = a.values[own] + at;
    bias = a.bias[own] ? a.bias[own] + first : NULL;
  }
  __device__ int visible(int64_t row) const {
    return own ? (int)min((int64_t)count, seen + row + 1 - first) : count;
  }
};

/* One step of the online softmax: weights to shared memory. */
template <class T>
__device__ void weigh(const attend_call<T> &a, const attend_tile<T> &tile, int kv, int item,
                      int count, const float (&s)[OWN_ITEMS], running (&now)[OWN_ITEMS],
                      float *p, float *factor) {
  int lane = (int)threadIdx.x % WARP;
  float bias = tile.bias && lane < tile.count ? tile.bias[lane] * LOG2E : 0.0f;
#pragma unroll
  for (int r = 0; r < OWN_ITEMS; r++) {
    int own = own_item(r);
    int n = own < count ? tile.visible(a.map.row(kv, item + own)) : 0;
    float x = lane < n ? s[r] * a.scale + bias : -INFINITY;
    float origin = fmaxf(now[r].origin, ceilf(warp_reduce(x, most())));
    float weight = lane < n ? rounded<T>(exp2f(x - origin)) : 0.0f;
    float by = rescale(now[r].origin, origin);
    now[r].sum = now[r].sum * by + warp_reduce(weight, add());
    now[r].origin = origin;
    p[own * (TILE + 1) + lane] = weight;
    if (lane == 0) factor[own] = by;
  }
}

/* o = o * factor + p v, in chunks of columns; a thread always has the same numbers of o. */
template <class T>
__device__ void add_values(const attend_call<T> &a, const attend_tile<T> &tile,
                           float *memory, const attend_plan &plan) {
  int column = (int)threadIdx.x % CHUNK, side = (int)threadIdx.x / CHUNK;
  for (int first = 0; first < a.d; first += CHUNK) {
    __syncthreads();
    load_keys(memory + plan.chunk, tile.values, (int64_t)a.kv_heads * a.d, tile.count,
              first, a.d);
    __syncthreads();
    float *o = memory + plan.o + side * (ITEMS / SIDES) * plan.pitch + first + column;
    const float *factor = memory + plan.factor + side * (ITEMS / SIDES);
    float sum[ITEMS / SIDES];
#pragma unroll
    for (int i = 0; i < ITEMS / SIDES; i++) sum[i] = o[i * plan.pitch] * factor[i];
    add_keys(sum, memory + plan.p, memory + plan.chunk);
#pragma unroll
    for (int i = 0; i < ITEMS / SIDES; i++) o[i * plan.pitch] = sum[i];
  }
}

/* What the block has, to `out` or, of several runs, to `partial`. */
template <class T>
__device__ void write_items(const attend_call<T> &a, int kv, int item, int count,
                            int64_t run, bool alone, const running (&now)[OWN_ITEMS],
                            float *memory, const attend_plan &plan) {
  float *sums = memory + plan.factor;
  int lane = (int)threadIdx.x % WARP;
  __syncthreads();
#pragma unroll
  for (int r = 0; r < OWN_ITEMS; r++) {
    int own = own_item(r);
    if (lane || own >= count) continue;
    int64_t row = a.map.row(kv, item + own);
    int head = a.map.head(kv, item + own);
    if (!alone) {
      float *left = a.partial + ((run * a.heads + head) * (a.d + 2) + a.d);
      left[0] = now[r].origin, left[1] = now[r].sum;
    } else if (a.lse) {
      a.lse[row * a.heads + head] = now[r].origin + log2f(now[r].sum);
    }
    sums[own] = now[r].sum;
  }
  __syncthreads();
  for (int i = (int)threadIdx.x; i < count * a.d; i += TILE_THREADS) {
    int own = i / a.d, c = i % a.d;
    int head = a.map.head(kv, item + own);
    float o = memory[plan.o + own * plan.pitch + c];
    if (!alone)
      a.partial[(run * a.heads + head) * (a.d + 2) + c] = o;
    else
      a.out[a.map.row(kv, item + own) * a.out_stride + (int64_t)head * a.d + c] =
          narrow<T>(o / sums[own]);
  }
  __syncthreads();
}

template <class T>
__global__ __launch_bounds__(TILE_THREADS,
                             TILE_BLOCKS) void attend_kernel(attend_call<T> a) {
  float *memory = (float *)acre_shared();
  attend_plan plan(a.d);
  const attend_now moved(a);
  for (int64_t b = blockIdx.x; b < a.blocks; b += gridDim.x) {
    int64_t run = b % a.runs_most;
    if (run >= moved.runs) continue;
    int item = (int)(b / a.runs_most / a.kv_heads) * ITEMS;
    int kv = (int)(b / a.runs_most % a.kv_heads);
    int count = min(ITEMS, a.map.count(kv) - item);
    int64_t last_row = a.map.row(kv, item + count - 1);
    running now[OWN_ITEMS];
    for (int r = 0; r < OWN_ITEMS; r++) now[r] = running{-INFINITY, 0.0f};
    for (int i = (int)threadIdx.x; i < ITEMS * plan.pitch; i += TILE_THREADS)
      memory[plan.o + i] = 0.0f;
    for (int first = 0; first < a.d; first += CHUNK)
      load_items<T>(memory + plan.q + first, plan.pitch, a.q, a.q_stride, a.map, kv, item,
                    count, first, a.d);
    int64_t end = (run + 1) * moved.tiles / moved.runs;
    for (int64_t index = run * moved.tiles / moved.runs; index < end; index++) {
      attend_tile<T> tile(a, moved, kv, index, last_row);
      if (tile.count <= 0) break;
      float s[OWN_ITEMS] = {0.0f};
      for (int first = 0; first < a.d; first += CHUNK) {
        __syncthreads();
        load_keys(memory + plan.chunk, tile.keys, (int64_t)a.kv_heads * a.d, tile.count,
                  first, a.d);
        __syncthreads();
        dot_chunk(s, memory + plan.q + first, plan.pitch, memory + plan.chunk);
      }
      weigh(a, tile, kv, item, count, s, now, memory + plan.p, memory + plan.factor);
      add_values(a, tile, memory, plan);
    }
    write_items(a, kv, item, count, run, moved.runs == 1, now, memory, plan);
  }
}

/* Joins the runs of one row, a head at a time. */
template <class T>
__global__ void join_kernel(attend_call<T> a) {
  const attend_now moved(a);
  if (moved.runs < 2) return;
  for (int64_t head = blockIdx.x; head < a.heads; head += gridDim.x) {
    const float *left = a.partial + head * (a.d + 2);
    int64_t step = (int64_t)a.heads * (a.d + 2);
    float origin = -INFINITY, sum = 0.0f;
    for (int64_t run = 0; run < moved.runs; run++)
      origin = fmaxf(origin, left[run * step + a.d]);
    for (int64_t run = 0; run < moved.runs; run++)
      sum += left[run * step + a.d + 1] * rescale(left[run * step + a.d], origin);
    for (int c = (int)threadIdx.x; c < a.d; c += (int)blockDim.x) {
      float o = 0.0f;
      for (int64_t run = 0; run < moved.runs; run++)
        o += left[run * step + c] * rescale(left[run * step + a.d], origin);
      a.out[head * a.d + c] = narrow<T>(o / sum);
    }
    if (a.lse && threadIdx.x == 0) a.lse[head] = origin + log2f(sum);
  }
}

template <class T>
void set_keys(attend_call<T> *a, int segment, const acre_keys &keys, int64_t count) {
  a->keys[segment] = (const T *)keys.rotated;
  a->values[segment] = (const T *)keys.values;
  a->bias[segment] = keys.bias;
  a->count[segment] = count;
  a->tiles[segment] = acre_ceil_div(count, TILE);
}

/* Several runs where one row has few heads and many keys, as far as the workspace goes. */
template <class T>
void share_out(acre_queue *queue, attend_call<T> *a) {
  int64_t bytes = (int64_t)a->heads * (a->d + 2) * (int64_t)sizeof(float);
  int64_t room = (int64_t)workspace_room(queue) / bytes;
  int64_t tiles = a->tiles[0] + a->tiles[1], most = tiles;
  if (a->steps)
    most = a->tiles[0] + acre_ceil_div(a->count[1] + queue->steps_most - 1, TILE);
  a->runs_most = acre_max(acre_min(acre_min(RUNS, most), room), 1);
  if (a->runs_most > 1)
    a->partial = (float *)workspace(queue, (size_t)(a->runs_most * bytes));
}

}  // namespace

size_t attend_shared_bytes(int d) { return (size_t)attend_plan(d).floats * sizeof(float); }

}  // namespace acre

void acre_cuda_attend(acre_queue *queue, void *out, int64_t out_stride, float *lse,
                      const float *q, int64_t q_stride, const acre_keys *prefix,
                      const acre_keys *own, int64_t seen, int64_t rows, bool split,
                      const acre_heads *heads) {
  using namespace acre;
  if (rows <= 0) return;
  for_dtype(heads->dtype, [&](auto zero) {
    using T = decltype(zero);
    attend_call<T> a = {};
    a.out = (T *)out, a.out_stride = out_stride, a.lse = lse;
    a.q = q, a.q_stride = q_stride, a.seen = seen;
    a.heads = (int)heads->heads, a.kv_heads = (int)heads->kv_heads;
    a.d = (int)heads->head_dim;
    a.scale = (float)((double)LOG2E / sqrt((double)a.d));
    a.map = item_map{(int)rows, a.heads / a.kv_heads, NULL, NULL};
    if (prefix) set_keys(&a, 0, *prefix, prefix->count);
    set_keys(&a, 1, *own, seen + rows);
    a.runs_most = 1, a.steps = queue->steps;
    if (split && rows == 1) share_out(queue, &a);
    a.blocks = acre_ceil_div(rows * a.map.group, ITEMS) * a.kv_heads * a.runs_most;
    ACRE_LAUNCH(queue, attend_kernel<T>, a.blocks, TILE_THREADS, attend_shared_bytes(a.d),
                a);
    if (a.partial)
      ACRE_LAUNCH(queue, join_kernel<T>, a.heads, threads_for(a.d * PACK), 0, a);
  });
}
