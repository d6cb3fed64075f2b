/* Softmax attention over [prefix | own] by matrix units, in one pass: bf16, for the head_dims
 * of attend.h.
 *
 * A block has a tile of items of one KV head (a query row with one of the group's heads), so
 * all heads of the group share what is read of keys and values. These come tile by tile, the
 * next one on its way while one is worked on; the items' outputs stay in registers. A row's
 * result depends on its own keys alone: tiles begin where the segments do, and origins are
 * whole, so that rescaling is exact. docs/CUDA.md has the numbers that it is bound by. */
#include "sm80/attend.h"
#include "sm80/sm80.h"

namespace acre {
namespace {

/* Of shared memory, in numbers: the items, then two stages of keys and values. */
template <int D>
struct attend_plan {
  static constexpr int M = D <= 128 ? 2 : 1;     /* fragments of items of a warp */
  static constexpr int STEP = D <= 64 ? 64 : 32; /* keys of a tile */
  static constexpr int ROWS = M * FRAGMENT;      /* items of a warp */
  static constexpr int BLOCK = ROWS * MMA_WARPS; /* and of a block */
  static constexpr int BLOCKS =
      D <= 128 ? 2 : 1; /* of a multiprocessor: as memory allows */
  static constexpr int STAGES_AT = BLOCK * D, TILE_SIZE = STEP * D;
  static constexpr size_t BYTES = (STAGES_AT + 4 * TILE_SIZE) * sizeof(bf16);
  static_assert(BYTES <= SHARED_MOST, "fits every chip");
};

/* What a block works on, and a warp's rows of it. */
template <int D>
struct attend_place {
  using plan = attend_plan<D>;
  int kv, item, count; /* of the block */
  int first;           /* item of the warp, within the block */
  int end, tiles;      /* own keys that the block sees, and tiles that it meets */
  int low, high;       /* own keys that all of the warp's rows see, that some do */

  __device__ attend_place(const attend_call &a, int64_t b) {
    int64_t parts = a.blocks / a.kv_heads;
    kv = (int)(b % a.kv_heads);
    item = (int)(parts - 1 - b / a.kv_heads) * plan::BLOCK; /* those with most keys first */
    count = min(plan::BLOCK, a.map.count(kv) - item);
    first = (int)threadIdx.x / WARP * plan::ROWS;
    end = a.seen + a.map.row(kv, item + count - 1) + 1;
    tiles = a.seen_keys.tiles[0] + (end + plan::STEP - 1) / plan::STEP;
    int last = min(first + plan::ROWS, count) - 1;
    low = a.seen + a.map.row(kv, item + min(first, count - 1)) + 1;
    high = a.seen + a.map.row(kv, item + (last < 0 ? 0 : last)) + 1;
  }
};

template <int D>
__device__ __forceinline__ void load_stage(const attend_call &a, const attend_place<D> &at,
                                           int index, bf16 *memory) {
  using plan = attend_plan<D>;
  if (index < at.tiles) {
    key_tile tile(a.seen_keys, at.kv, index, plan::STEP, at.end);
    bf16 *to = memory + plan::STAGES_AT + (index % 2) * 2 * plan::TILE_SIZE;
    int64_t step = (int64_t)a.kv_heads * D;
    int thread = (int)threadIdx.x;
    load_tile<D, plan::STEP, MMA_THREADS>(to, tile.keys, step, tile.count, thread,
                                          a.seen_keys.wide);
    load_tile<D, plan::STEP, MMA_THREADS>(to + plan::TILE_SIZE, tile.values, step,
                                          tile.count, thread, a.seen_keys.wide);
  }
  copies_commit();
}

/* Where rows of the warp do not see all of a tile. */
template <int D, int M, int N>
__device__ __forceinline__ void mask_edge(product<M, N> &s, const attend_call &a,
                                          const attend_place<D> &at, const key_tile &tile) {
  int limit[M][2];
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int r = 0; r < 2; r++) {
      int own = min(at.first + row_of(m, 2 * r), at.count - 1);
      int sees = a.seen + a.map.row(at.kv, at.item + own) + 1 - tile.first;
      limit[m][r] = tile.own ? min(tile.count, sees) : tile.count;
    }
  mask_logits<M, N>(s, limit);
}

template <int D, int M>
__device__ __forceinline__ void write_items(const attend_call &a, const attend_place<D> &at,
                                            const softmax_rows<M> &now,
                                            const product<M, D> &o) {
#pragma unroll
  for (int m = 0; m < M; m++) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float sum = row_reduce(now.sum[m][r], add());
      int own = at.first + row_of(m, 2 * r);
      if (own >= at.count) continue;
      int64_t row = a.map.row(at.kv, at.item + own);
      int head = a.map.head(at.kv, at.item + own);
      if (a.lse && threadIdx.x % 4 == 0)
        a.lse[row * a.heads + head] = now.origin[m][r] + log2f(sum);
      float by = 1.0f / sum;
      bf16 *out = a.out + row * a.out_stride + (int64_t)head * D;
#pragma unroll
      for (int n = 0; n < D / COLUMNS; n++) {
        uint32_t pair = pair_of(o[m][n][2 * r] * by, o[m][n][2 * r + 1] * by);
        bf16 *to = out + column_of(n, 0);
        if (a.out_pairs) {
          *(uint32_t *)to = pair;
        } else {
          to[0] = narrow<bf16>(low_of(pair));
          to[1] = narrow<bf16>(high_of(pair));
        }
      }
    }
  }
}

/* The warp's rows meet a tile that has arrived. */
template <int D, int M>
__device__ __forceinline__ void meet(const attend_call &a, const attend_place<D> &at,
                                     const key_tile &tile, const bf16 *queries,
                                     const bf16 *stage, softmax_rows<M> &now,
                                     product<M, D> &o) {
  using plan = attend_plan<D>;
  constexpr int STEP = plan::STEP;
  int lane = lane_anew();
  product<M, STEP> s = {};
  packed<M, STEP> w;
  add_dots<D, M, STEP>(s, queries, at.first, stage, lane);
  scale_logits<M, STEP>(s, a.scale, tile.bias, tile.count);
  if (tile.count < STEP || (tile.own && tile.first + STEP > at.low))
    mask_edge<D, M, STEP>(s, a, at, tile);
  weigh<M, STEP, D>(w, s, now, o);
  add_weighted<D, M, STEP, D>(o, w, stage + plan::TILE_SIZE, 0, lane);
}

template <int D>
__global__ __launch_bounds__(MMA_THREADS,
                             attend_plan<D>::BLOCKS) void attend_kernel(attend_call a) {
  using plan = attend_plan<D>;
  constexpr int M = plan::M;
  bf16 *memory = (bf16 *)acre_shared();
  for (int64_t b = blockIdx.x; b < a.blocks; b += gridDim.x) {
    attend_place<D> at(a, b);
    product<M, D> o = {};
    softmax_rows<M> now;
    load_stage(a, at, 0, memory);
    load_queries<D, plan::BLOCK, MMA_THREADS>(memory, a, at.kv, at.item, at.count);
    for (int index = 0; index < at.tiles; index++) {
      load_stage(a, at, index + 1, memory);
      copies_wait<1>();
      __syncthreads();
      key_tile tile(a.seen_keys, at.kv, index, plan::STEP, at.end);
      const bf16 *stage = memory + plan::STAGES_AT + (index % 2) * 2 * plan::TILE_SIZE;
      if (at.first < at.count && !(tile.own && tile.first >= at.high))
        meet<D, M>(a, at, tile, memory, stage, now, o);
      __syncthreads();
    }
    write_items<D, M>(a, at, now, o);
  }
}

}  // namespace
}  // namespace acre

void acre_cuda_sm80_attend(acre_queue *queue, void *out, int64_t out_stride, float *lse,
                           const float *q, int64_t q_stride, const acre_keys *prefix,
                           const acre_keys *own, int64_t seen, int64_t rows, bool split,
                           const acre_heads *heads) {
  using namespace acre;
  auto matrix_units = [&](auto dim) {
    constexpr int D = decltype(dim)::value;
    using plan = attend_plan<D>;
    attend_call a = {};
    a.out = (bf16 *)out, a.out_stride = out_stride, a.lse = lse;
    a.out_pairs = ((uintptr_t)out / 2 | (uintptr_t)out_stride) % 2 == 0;
    a.q = q, a.q_stride = q_stride, a.wide = aligned(q, q_stride * 4);
    a.heads = (int)heads->heads, a.kv_heads = (int)heads->kv_heads;
    a.scale = (float)((double)LOG2E / sqrt((double)D));
    a.map = item_map{(int)rows, a.heads / a.kv_heads, NULL, NULL};
    a.seen = (int)seen, a.runs = 1;
    a.seen_keys.kv_heads = a.kv_heads, a.seen_keys.d = D, a.seen_keys.wide = true;
    if (split && rows == 1) return decode(queue, &a, prefix, *own);
    if (prefix) a.seen_keys.set(0, *prefix, prefix->count, plan::STEP);
    a.seen_keys.set(1, *own, seen + rows, plan::STEP);
    a.blocks = acre_ceil_div(rows * a.map.group, plan::BLOCK) * a.kv_heads;
    ACRE_LAUNCH(queue, attend_kernel<D>, a.blocks, MMA_THREADS, plan::BYTES, a);
  };
  if (rows <= 0) return;
  if (heads->dtype != ACRE_BF16 || !for_head_dim(heads->head_dim, matrix_units))
    acre_cuda_attend(queue, out, out_stride, lse, q, q_stride, prefix, own, seen, rows,
                     split, heads);
}
