/* The gradient through attention by matrix units, from each row's normaliser
 * (csrc/cpu/attend_back.c has the formulas): seven products, and every number is added up by one
 * thread, in order, so it is always the same.
 *
 * First delta, a number per item, and dout rounded. Then one kernel twice: a block keeps a tile
 * of rows (items, for dq; keys, for dk and dv) and meets the others in a stream of smaller tiles,
 * the next one on its way while one is worked on. What it keeps are the rows of both first
 * products, so weights and their gradients come out as the left side of the next ones. */
#include "sm80/attend.h"
#include "sm80/sm80.h"

namespace acre {
namespace {

struct back_call {
  float *dqkv, *dk, *dv;
  const bf16 *q, *dout; /* [rows, heads, d] */
  const float *lse, *delta;
  segments all;
  int64_t blocks, stride; /* of a row of dqkv */
  item_map map;
  int heads, kv_heads;
  bool wide; /* q and dout sixteen bytes at a time */
  float scale, factor;
};

/* Of shared memory, in numbers: two kept tiles, then two stages of two that come by. */
template <int D>
struct back_plan {
  static constexpr int KEPT = FRAGMENT * MMA_WARPS;
  static constexpr int STEP = D <= 128 ? 32 : 16;
  static constexpr int OUT = D <= 128 ? D : 128; /* columns of dk and dv of a block */
  static constexpr int BLOCKS =
      D <= 128 ? 2 : 1; /* of a multiprocessor: as memory allows */
  static constexpr int STAGES_AT = 2 * KEPT * D, TILE_SIZE = STEP * D;
  static constexpr int NUMBERS_AT =
      STAGES_AT + 4 * TILE_SIZE; /* lse, delta of two stages */
  static constexpr size_t BYTES = NUMBERS_AT * sizeof(bf16) + 4 * STEP * sizeof(float);
  static_assert(BYTES <= SHARED_MOST, "fits every chip");
};

/* ------------------------------------------------------------------ delta */

struct delta_call {
  const float *dout;
  const bf16 *out;
  float *delta;
  bf16 *rounded; /* dout */
  int64_t items;
  int d;
};

__global__ void delta_kernel(delta_call a) {
  int64_t warps = (int64_t)gridDim.x * (blockDim.x / WARP);
  int lane = (int)threadIdx.x % WARP;
  for (int64_t i = (int64_t)blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
       i < a.items; i += warps) {
    float sum = 0.0f;
    for (int c = lane; c < a.d; c += WARP) {
      bf16 x = narrow<bf16>(a.dout[i * a.d + c]);
      a.rounded[i * a.d + c] = x;
      sum += widen(x) * widen(a.out[i * a.d + c]);
    }
    sum = warp_reduce(sum, add());
    if (lane == 0) a.delta[i] = sum;
  }
}

/* ------------------------------------------------------------------ tiles of items */

struct item_tile {
  int kv, item, count;
  __device__ item_tile(const back_call &a, int kv_head, int from, int size) {
    kv = kv_head, item = from;
    count = min(size, a.map.count(kv) - from);
  }
  /* Where item i is among all rows and heads. */
  __device__ int64_t at(const back_call &a, int i) const {
    return (int64_t)a.map.row(kv, item + i) * a.heads + a.map.head(kv, item + i);
  }
};

/* Queries, and right behind them gradients of outputs; zeros from the tile's count on. */
template <int D, int ROWS>
__device__ __forceinline__ void load_items_pair(bf16 *to, const back_call &a,
                                                const item_tile &tile) {
  constexpr int PIECES = D / PIECE;
#pragma unroll 1
  for (int i = (int)threadIdx.x; i < ROWS * PIECES; i += MMA_THREADS) {
    int own = i / PIECES, column = i % PIECES * PIECE;
    bool there = own < tile.count;
    int64_t from = there ? tile.at(a, own) * D + column : 0;
    bf16 *place = to + tile_at<D>(own, column);
    copy_piece(place, a.q + from, there, a.wide);
    copy_piece(place + ROWS * D, a.dout + from, there, a.wide);
  }
}

template <int D, int ROWS>
__device__ __forceinline__ void load_keys_pair(bf16 *to, const back_call &a,
                                               const key_tile &tile) {
  int64_t step = (int64_t)a.kv_heads * D;
  int thread = (int)threadIdx.x;
  load_tile<D, ROWS, MMA_THREADS>(to, tile.keys, step, tile.count, thread, a.all.wide);
  load_tile<D, ROWS, MMA_THREADS>(to + ROWS * D, tile.values, step, tile.count, thread,
                                  a.all.wide);
}

/* ------------------------------------------------------------------ weights */

/* p and ds of one pair: x the logit in powers of two, less the normaliser. */
__device__ __forceinline__ void weigh_pair(float x, float dp, float delta, float factor,
                                           bool seen, float *p, float *ds) {
  float weight = power(fminf(x, 1.0f));
  *p = seen ? weight : 0.0f;
  *ds = seen ? weight * factor * (dp - delta) : 0.0f;
}

/* Rounded pairs of a row's neighbouring columns. */
struct pairs {
  float p[2], ds[2];
};

/* Where the rows are items: their own numbers, and the columns' bias. */
template <int STEP>
struct item_rows {
  float lse[2], delta[2];
  int sees[2]; /* own keys; negative: none of either segment */

  __device__ item_rows(const back_call &a, const item_tile &items, int first) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      int own = first + row_of(0, 2 * r);
      bool there = own < items.count;
      int64_t at = items.at(a, there ? own : 0);
      lse[r] = a.lse[at], delta[r] = a.delta[at];
      sees[r] = there ? a.map.row(items.kv, items.item + own) + 1 : -1;
    }
  }

  __device__ __forceinline__ void weigh(const back_call &a, const key_tile &keys, bool edge,
                                        const product<1, STEP> &s,
                                        const product<1, STEP> &dp,
                                        packed<1, STEP> &ds) const {
#pragma unroll
    for (int n = 0; n < STEP / COLUMNS; n++) {
      float bias[2] = {0.0f, 0.0f};
      for (int i = 0; keys.bias && i < 2; i++)
        if (column_of(n, i) < keys.count) bias[i] = keys.bias[column_of(n, i)] * LOG2E;
#pragma unroll
      for (int r = 0; r < 2; r++) {
        pairs x;
#pragma unroll
        for (int i = 0; i < 2; i++) {
          int key = column_of(n, i);
          bool seen = !edge || (key < keys.count && sees[r] >= 0 &&
                                (!keys.own || keys.first + key < sees[r]));
          weigh_pair(s[0][n][2 * r + i] * a.scale + bias[i] - lse[r], dp[0][n][2 * r + i],
                     delta[r], a.factor, seen, &x.p[i], &x.ds[i]);
        }
        ds[0][n][r] = pair_of(x.ds[0], x.ds[1]);
      }
    }
  }
};

/* Where the rows are keys: their bias; the columns' numbers are in shared memory. */
template <int STEP>
struct key_rows {
  float bias[2];
  bool there[2];
  int least[2]; /* row of the first query that sees it */

  __device__ key_rows(const key_tile &keys, int first) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      int own = first + row_of(0, 2 * r);
      there[r] = own < keys.count;
      bias[r] = keys.bias && there[r] ? keys.bias[own] * LOG2E : 0.0f;
      least[r] = keys.own ? keys.first + own : 0;
    }
  }

  __device__ __forceinline__ void weigh(const back_call &a, const item_tile &items,
                                        bool edge, const float *lse, const float *delta,
                                        const product<1, STEP> &s,
                                        const product<1, STEP> &dp, packed<1, STEP> &p,
                                        packed<1, STEP> &ds) const {
#pragma unroll
    for (int n = 0; n < STEP / COLUMNS; n++) {
      pairs x[2];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        int item = column_of(n, i);
        int row = edge ? a.map.row(items.kv, items.item + item) : 0;
#pragma unroll
        for (int r = 0; r < 2; r++) {
          bool seen = !edge || (there[r] && item < items.count && row >= least[r]);
          weigh_pair(s[0][n][2 * r + i] * a.scale + bias[r] - lse[item],
                     dp[0][n][2 * r + i], delta[item], a.factor, seen, &x[r].p[i],
                     &x[r].ds[i]);
        }
      }
#pragma unroll
      for (int r = 0; r < 2; r++) {
        p[0][n][r] = pair_of(x[r].p[0], x[r].p[1]);
        ds[0][n][r] = pair_of(x[r].ds[0], x[r].ds[1]);
      }
    }
  }
};

/* Numbers [0, N) of the lane's rows, the first of which is `row`, below `count` of them. */
template <int N>
__device__ __forceinline__ void write_rows(float *to, int64_t step, int row, int count,
                                           const product<1, N> &from) {
#pragma unroll
  for (int r = 0; r < 2; r++) {
    int own = row + row_of(0, 2 * r);
    if (own >= count) continue;
#pragma unroll
    for (int n = 0; n < N / COLUMNS; n++)
#pragma unroll
      for (int i = 0; i < 2; i++) to[own * step + column_of(n, i)] = from[0][n][2 * r + i];
  }
}

/* ------------------------------------------------------------------ dq */

template <int D>
__device__ __forceinline__ void load_keys_stage(const back_call &a, int kv, int index,
                                                int tiles, int end, bf16 *memory) {
  using plan = back_plan<D>;
  if (index < tiles) {
    key_tile tile(a.all, kv, index, plan::STEP, end);
    load_keys_pair<D, plan::STEP>(
        memory + plan::STAGES_AT + index % 2 * 2 * plan::TILE_SIZE, a, tile);
  }
  copies_commit();
}

template <int D>
__device__ __forceinline__ void write_dq(const back_call &a, const item_tile &items,
                                         int first, const product<1, D> &dq) {
#pragma unroll
  for (int r = 0; r < 2; r++) {
    int own = first + row_of(0, 2 * r);
    if (own >= items.count) continue;
    float *to = a.dqkv + a.map.row(items.kv, items.item + own) * a.stride +
                (int64_t)a.map.head(items.kv, items.item + own) * D;
#pragma unroll
    for (int n = 0; n < D / COLUMNS; n++)
#pragma unroll
      for (int i = 0; i < 2; i++) to[column_of(n, i)] = dq[0][n][2 * r + i];
  }
}

template <int D>
__global__ __launch_bounds__(MMA_THREADS,
                             back_plan<D>::BLOCKS) void dq_kernel(back_call a) {
  using plan = back_plan<D>;
  constexpr int STEP = plan::STEP;
  bf16 *memory = (bf16 *)acre_shared();
  int first = (int)threadIdx.x / WARP * FRAGMENT;
  for (int64_t b = blockIdx.x; b < a.blocks; b += gridDim.x) {
    int part = (int)(a.blocks / a.kv_heads - 1 - b / a.kv_heads); /* most keys first */
    item_tile items(a, (int)(b % a.kv_heads), part * plan::KEPT, plan::KEPT);
    int low = a.map.row(items.kv, items.item);
    int end = a.map.row(items.kv, items.item + items.count - 1) + 1;
    int tiles = a.all.tiles[0] + (end + STEP - 1) / STEP;
    product<1, D> dq = {};
    load_items_pair<D, plan::KEPT>(memory, a, items);
    load_keys_stage<D>(a, items.kv, 0, tiles, end, memory);
    item_rows<STEP> rows(a, items, first);
    for (int index = 0; index < tiles; index++) {
      load_keys_stage<D>(a, items.kv, index + 1, tiles, end, memory);
      copies_wait<1>();
      __syncthreads();
      key_tile keys(a.all, items.kv, index, STEP, end);
      const bf16 *stage = memory + plan::STAGES_AT + index % 2 * 2 * plan::TILE_SIZE;
      bool edge = items.count < plan::KEPT || keys.count < STEP ||
                  (keys.own && keys.first + STEP > low + 1);
      int lane = lane_anew();
      product<1, STEP> s = {}, dp = {};
      packed<1, STEP> ds;
      add_dots<D, 1, STEP>(s, memory, first, stage, lane);
      add_dots<D, 1, STEP>(dp, memory + plan::KEPT * D, first, stage + plan::TILE_SIZE,
                           lane);
      rows.weigh(a, keys, edge, s, dp, ds);
      add_weighted<D, 1, STEP, D>(dq, ds, stage, 0, lane);
      __syncthreads();
    }
    write_dq<D>(a, items, first, dq);
  }
}

/* ------------------------------------------------------------------ dk, dv */

template <int D>
__device__ __forceinline__ void load_items_stage(const back_call &a, int kv, int part,
                                                 int parts, bf16 *memory) {
  using plan = back_plan<D>;
  constexpr int STEP = plan::STEP;
  if (part < parts) {
    item_tile items(a, kv, part * STEP, STEP);
    load_items_pair<D, STEP>(memory + plan::STAGES_AT + part % 2 * 2 * plan::TILE_SIZE, a,
                             items);
    float *numbers = (float *)(memory + plan::NUMBERS_AT) + part % 2 * 2 * STEP;
    int i = (int)threadIdx.x;
    if (i < STEP) {
      int64_t at = items.at(a, i < items.count ? i : 0);
      numbers[i] = a.lse[at], numbers[STEP + i] = a.delta[at];
    }
  }
  copies_commit();
}

template <int D>
__global__ __launch_bounds__(MMA_THREADS,
                             back_plan<D>::BLOCKS) void dkv_kernel(back_call a) {
  using plan = back_plan<D>;
  constexpr int STEP = plan::STEP, OUT = plan::OUT, CHUNKS = D / OUT;
  bf16 *memory = (bf16 *)acre_shared();
  int first = (int)threadIdx.x / WARP * FRAGMENT;
  for (int64_t b = blockIdx.x; b < a.blocks; b += gridDim.x) {
    int chunk = (int)(b % CHUNKS) * OUT, kv = (int)(b / CHUNKS % a.kv_heads);
    int index = (int)(b / CHUNKS / a.kv_heads);
    key_tile keys(a.all, kv, index, plan::KEPT, a.all.count[1]);
    int part = keys.own ? keys.first * a.map.group / STEP : 0;
    int parts = (a.map.count(kv) + STEP - 1) / STEP;
    product<1, OUT> dk = {}, dv = {};
    load_keys_pair<D, plan::KEPT>(memory, a, keys);
    load_items_stage<D>(a, kv, part, parts, memory);
    key_rows<STEP> rows(keys, first);
    for (; part < parts; part++) {
      load_items_stage<D>(a, kv, part + 1, parts, memory);
      copies_wait<1>();
      __syncthreads();
      item_tile items(a, kv, part * STEP, STEP);
      const bf16 *stage = memory + plan::STAGES_AT + part % 2 * 2 * plan::TILE_SIZE;
      const float *numbers =
          (const float *)(memory + plan::NUMBERS_AT) + part % 2 * 2 * STEP;
      bool edge = keys.count < plan::KEPT || items.count < STEP ||
                  (keys.own && keys.first + plan::KEPT > a.map.row(kv, items.item) + 1);
      int lane = lane_anew();
      product<1, STEP> s = {}, dp = {};
      packed<1, STEP> p, ds;
      add_dots<D, 1, STEP>(s, memory, first, stage, lane);
      add_dots<D, 1, STEP>(dp, memory + plan::KEPT * D, first, stage + plan::TILE_SIZE,
                           lane);
      rows.weigh(a, items, edge, numbers, numbers + STEP, s, dp, p, ds);
      add_weighted<D, 1, STEP, OUT>(dv, p, stage + plan::TILE_SIZE, chunk, lane);
      add_weighted<D, 1, STEP, OUT>(dk, ds, stage, chunk, lane);
      __syncthreads();
    }
    int64_t step = keys.own ? a.stride : (int64_t)a.kv_heads * D;
    int64_t at = keys.first * step + (int64_t)kv * D + chunk;
    float *to_k = keys.own ? a.dqkv + (int64_t)a.heads * D : a.dk;
    float *to_v = keys.own ? to_k + (int64_t)a.kv_heads * D : a.dv;
    write_rows<OUT>(to_k + at, step, first, keys.count, dk);
    write_rows<OUT>(to_v + at, step, first, keys.count, dv);
  }
}

/* ------------------------------------------------------------------ launches */

/* delta and the rounded dout take the place of the parts of dq that scratch is meant for. */
void prepare(acre_queue *queue, back_call *a, float *scratch, const float *dout,
             const void *out, int64_t items, int d) {
  delta_call first = {};
  first.rounded = (bf16 *)(((uintptr_t)scratch + 15) / 16 * 16);
  first.delta = (float *)(first.rounded + items * d);
  first.dout = dout, first.out = (const bf16 *)out, first.items = items, first.d = d;
  a->delta = first.delta, a->dout = first.rounded;
  ACRE_LAUNCH(queue, delta_kernel, blocks_for(items, MMA_WARPS), MMA_THREADS, 0, first);
}

/* Tiles of `step` keys. */
void cut(back_call *a, const acre_keys *prefix, const acre_keys &own, int step) {
  a->all.wide = true;
  if (prefix) a->all.set(0, *prefix, prefix->count, step);
  a->all.set(1, own, own.count, step);
}

}  // namespace
}  // namespace acre

void acre_cuda_sm80_attend_back(acre_queue *queue, float *dqkv, float *dk, float *dv,
                                float *scratch, const float *dout, const void *out,
                                const float *lse, const void *q, const acre_keys *prefix,
                                const acre_keys *own, int64_t rows,
                                const acre_heads *heads) {
  using namespace acre;
  auto matrix_units = [&](auto dim) {
    constexpr int D = decltype(dim)::value;
    using plan = back_plan<D>;
    back_call a = {};
    a.dqkv = dqkv, a.dk = dk, a.dv = dv;
    a.q = (const bf16 *)q, a.lse = lse, a.wide = aligned(q, 0);
    a.heads = (int)heads->heads, a.kv_heads = (int)heads->kv_heads;
    a.stride = (int64_t)(a.heads + 2 * a.kv_heads) * D;
    a.scale = (float)((double)LOG2E / sqrt((double)D));
    a.factor = (float)(1.0 / sqrt((double)D));
    a.map = item_map{(int)rows, a.heads / a.kv_heads, NULL, NULL};
    a.all.kv_heads = a.kv_heads, a.all.d = D;
    prepare(queue, &a, scratch, dout, out, rows * a.heads, D);
    cut(&a, prefix, *own, plan::STEP);
    a.blocks = acre_ceil_div(rows * a.map.group, plan::KEPT) * a.kv_heads;
    ACRE_LAUNCH(queue, dq_kernel<D>, a.blocks, MMA_THREADS, plan::BYTES, a);
    cut(&a, prefix, *own, plan::KEPT);
    a.blocks = (int64_t)(a.all.tiles[0] + a.all.tiles[1]) * a.kv_heads * (D / plan::OUT);
    ACRE_LAUNCH(queue, dkv_kernel<D>, a.blocks, MMA_THREADS, plan::BYTES, a);
  };
  if (rows <= 0) return;
  if (heads->dtype != ACRE_BF16 || !for_head_dim(heads->head_dim, matrix_units))
    acre_cuda_attend_back(queue, dqkv, dk, dv, scratch, dout, out, lse, q, prefix, own,
                          rows, heads);
}
