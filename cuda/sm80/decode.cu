/* Attention of one row, whose keys are shared out over many blocks: bound by reading keys and
 * values once.
 *
 * A block has a run of keys of one KV head with up to sixteen heads of its group; each warp
 * has every WARPS-th sixteen of them, with copies of its own under way, and waits for no other
 * warp until the end. There the warps' results are joined in order, and then, by a second
 * kernel, those of the runs. */
#include "sm80/attend.h"

namespace acre {
namespace {

constexpr int DECODE_BLOCKS = 2; /* for each multiprocessor */
constexpr int KEYS = FRAGMENT;   /* of a warp at a time */

/* Of shared memory, in numbers: the items, then of each warp two stages of keys and values.
 * At the end these become its outputs, in float32. */
template <int D>
struct decode_plan {
  static constexpr int WARPS_USED = D <= 128 ? 4 : 2;
  static constexpr int THREADS = WARPS_USED * WARP;
  static constexpr int STEP = KEYS * WARPS_USED;
  static constexpr int TILE_SIZE = KEYS * D, WARP_SIZE = 4 * TILE_SIZE;
  static constexpr int STAGES_AT = FRAGMENT * D;
  static constexpr int ROWS_AT = STAGES_AT + WARPS_USED * WARP_SIZE; /* origins, sums */
  static constexpr size_t BYTES =
      ROWS_AT * sizeof(bf16) + WARPS_USED * FRAGMENT * 2 * sizeof(float);
  static_assert(BYTES <= SHARED_MOST, "fits every chip");
};

struct decode_call {
  attend_call call;
  int runs_most;        /* that there are blocks for */
  const int32_t *steps; /* taken of a loop; nullable */
};

/* What moves on in a loop, where each step sees one key more and shares out its tiles as it
 * would alone. The call itself stays where arguments lie. */
struct decode_now {
  int own, tiles, runs; /* own keys, tiles of all keys */

  __device__ __forceinline__ decode_now(const decode_call &d, int step) {
    const segments &keys = d.call.seen_keys;
    own = keys.count[1] + (d.steps ? *d.steps : 0);
    tiles = keys.tiles[0] + (own + step - 1) / step;
    runs = min(d.runs_most, tiles);
  }
};

/* A warp's part of the `index`-th tile. */
template <int D>
__device__ __forceinline__ key_tile part_of(const attend_call &a, const decode_now &now,
                                            int kv, int index) {
  using plan = decode_plan<D>;
  key_tile tile(a.seen_keys, kv, index, plan::STEP, now.own);
  int skip = (int)threadIdx.x / WARP * KEYS;
  tile.count = min(KEYS, tile.count - skip);
  int64_t at = (int64_t)skip * a.kv_heads * D;
  if (tile.count > 0) {
    tile.keys += at, tile.values += at;
    if (tile.bias) tile.bias += skip;
  }
  return tile;
}

template <int D>
__device__ __forceinline__ void load_part(const attend_call &a, const decode_now &now,
                                          int kv, int index, int end, bf16 *stages) {
  if (index < end) {
    key_tile tile = part_of<D>(a, now, kv, index);
    bf16 *to = stages + (index % 2) * 2 * decode_plan<D>::TILE_SIZE;
    int64_t step = (int64_t)a.kv_heads * D;
    int lane = (int)threadIdx.x % WARP;
    load_tile<D, KEYS, WARP>(to, tile.keys, step, tile.count, lane, a.seen_keys.wide);
    load_tile<D, KEYS, WARP>(to + decode_plan<D>::TILE_SIZE, tile.values, step, tile.count,
                             lane, a.seen_keys.wide);
  }
  copies_commit();
}

/* A warp's results to shared memory. */
template <int D>
__device__ __forceinline__ void leave_results(const softmax_rows<1> &now,
                                              const product<1, D> &o, float *rows,
                                              float *outputs) {
#pragma unroll
  for (int r = 0; r < 2; r++) {
    float sum = row_reduce(now.sum[0][r], add());
    int own = row_of(0, 2 * r);
    rows[2 * own] = now.origin[0][r], rows[2 * own + 1] = sum;
#pragma unroll
    for (int n = 0; n < D / COLUMNS; n++)
#pragma unroll
      for (int i = 0; i < 2; i++) outputs[own * D + column_of(n, i)] = o[0][n][2 * r + i];
  }
}

/* `count` results, each `step` after the other, as one, for number c of D: 0 to D - 1 of the
 * output, D of the origin, D + 1 of the sum. left: {origin, sum} of the first. */
__device__ __forceinline__ float join(const float *left, int64_t left_step, const float *o,
                                      int64_t o_step, int count, float *origin,
                                      float *sum) {
  float highest = -INFINITY, all = 0.0f, weights = 0.0f;
  for (int i = 0; i < count; i++) highest = fmaxf(highest, left[i * left_step]);
  for (int i = 0; i < count; i++) {
    float by = rescale(left[i * left_step], highest);
    weights += left[i * left_step + 1] * by;
    all += o[i * o_step] * by;
  }
  *origin = highest, *sum = weights;
  return all;
}

/* The joined result of a block's warps: to `out`, or of several runs to `partial`. */
template <int D>
__device__ __forceinline__ void write_run(const attend_call &a, int kv, int item, int count,
                                          int run, bool alone, const float *rows,
                                          const float *outputs) {
  using plan = decode_plan<D>;
  constexpr int EACH = plan::WARP_SIZE / 2; /* floats of a warp */
  for (int i = (int)threadIdx.x; i < count * D; i += plan::THREADS) {
    int own = i / D, c = i % D, head = a.map.head(kv, item + own);
    float origin, sum;
    float o = join(rows + 2 * own, 2 * FRAGMENT, outputs + i, EACH, plan::WARPS_USED,
                   &origin, &sum);
    if (!alone) {
      float *to = a.partial + ((int64_t)run * a.heads + head) * (D + 2);
      to[c] = o;
      if (c == 0) to[D] = origin, to[D + 1] = sum;
    } else {
      a.out[(int64_t)head * D + c] = narrow<bf16>(o / sum);
      if (c == 0 && a.lse) a.lse[head] = origin + log2f(sum);
    }
  }
}

template <int D>
__global__ __launch_bounds__(decode_plan<D>::THREADS) void decode_kernel(decode_call d) {
  using plan = decode_plan<D>;
  const attend_call &a = d.call;
  const decode_now now(d, plan::STEP);
  bf16 *memory = (bf16 *)acre_shared();
  int warp = (int)threadIdx.x / WARP;
  bf16 *stages = memory + plan::STAGES_AT + warp * plan::WARP_SIZE;
  float *rows = (float *)(memory + plan::ROWS_AT);
  for (int64_t b = blockIdx.x; b < a.blocks; b += gridDim.x) {
    int run = (int)(b / a.kv_heads % d.runs_most);
    if (run >= now.runs) continue;
    int kv = (int)(b % a.kv_heads), item = (int)(b / a.kv_heads / d.runs_most) * FRAGMENT;
    int count = min(FRAGMENT, a.map.count(kv) - item);
    int64_t tiles = now.tiles;
    int first = (int)(run * tiles / now.runs), end = (int)((run + 1) * tiles / now.runs);
    product<1, D> o = {};
    softmax_rows<1> rows_now;
    load_part<D>(a, now, kv, first, end, stages);
    load_queries<D, FRAGMENT, plan::THREADS>(memory, a, kv, item, count);
    __syncthreads();
    for (int index = first; index < end; index++) {
      load_part<D>(a, now, kv, index + 1, end, stages);
      copies_wait<1>();
      __syncwarp();
      key_tile tile = part_of<D>(a, now, kv, index);
      if (tile.count > 0) {
        const bf16 *stage = stages + (index % 2) * 2 * plan::TILE_SIZE;
        const int limit[1][2] = {{tile.count, tile.count}};
        int lane = lane_anew();
        product<1, KEYS> s = {};
        packed<1, KEYS> w;
        add_dots<D, 1, KEYS>(s, memory, 0, stage, lane);
        scale_logits<1, KEYS>(s, a.scale, tile.bias, tile.count);
        if (tile.count < KEYS) mask_logits<1, KEYS>(s, limit);
        weigh<1, KEYS, D>(w, s, rows_now, o);
        add_weighted<D, 1, KEYS, D>(o, w, stage + plan::TILE_SIZE, 0, lane);
      }
      __syncwarp();
    }
    leave_results<D>(rows_now, o, rows + warp * 2 * FRAGMENT, (float *)stages);
    __syncthreads();
    write_run<D>(a, kv, item, count, run, now.runs == 1, rows,
                 (const float *)(memory + plan::STAGES_AT));
    __syncthreads();
  }
}

/* Joins the runs, a head at a time. */
template <int D>
__global__ void join_kernel(decode_call d) {
  const attend_call &a = d.call;
  const decode_now now(d, decode_plan<D>::STEP);
  if (now.runs < 2) return;
  for (int64_t head = blockIdx.x; head < a.heads; head += gridDim.x) {
    const float *left = a.partial + head * (D + 2);
    int64_t step = (int64_t)a.heads * (D + 2);
    for (int c = (int)threadIdx.x; c < D; c += (int)blockDim.x) {
      float origin, sum;
      float o = join(left + D, step, left + c, step, now.runs, &origin, &sum);
      a.out[head * D + c] = narrow<bf16>(o / sum);
      if (c == 0 && a.lse) a.lse[head] = origin + log2f(sum);
    }
  }
}

/* As many runs as keep the chip busy, as far as there are tiles and workspace. */
int runs_of(const acre_queue *queue, int64_t tiles, int64_t blocks, int64_t bytes) {
  int64_t wanted = acre_ceil_div(DECODE_BLOCKS * queue->owner->chip.processors, blocks);
  int64_t room = (int64_t)workspace_room(queue) / bytes;
  return (int)acre_max(acre_min(acre_min(wanted, tiles), room), 1);
}

}  // namespace

void decode(acre_queue *queue, attend_call *a, const acre_keys *prefix,
            const acre_keys &own) {
  for_head_dim(a->seen_keys.d, [&](auto dim) {
    constexpr int D = decltype(dim)::value;
    using plan = decode_plan<D>;
    if (prefix) a->seen_keys.set(0, *prefix, prefix->count, plan::STEP);
    a->seen_keys.set(1, own, a->seen + 1, plan::STEP);
    int64_t bytes = (int64_t)a->heads * (D + 2) * (int64_t)sizeof(float);
    a->blocks = acre_ceil_div(a->map.group, FRAGMENT) * a->kv_heads;
    const segments &keys = a->seen_keys;
    int64_t tiles = keys.tiles[0] + keys.tiles[1], most = tiles;
    if (queue->steps)
      most =
          keys.tiles[0] + acre_ceil_div(keys.count[1] + queue->steps_most - 1, plan::STEP);
    decode_call d = {*a, runs_of(queue, most, a->blocks, bytes), queue->steps};
    if (d.runs_most > 1)
      d.call.partial = (float *)workspace(queue, (size_t)(d.runs_most * bytes));
    d.call.blocks *= d.runs_most;
    ACRE_LAUNCH(queue, decode_kernel<D>, d.call.blocks, plan::THREADS, plan::BYTES, d);
    if (d.call.partial)
      ACRE_LAUNCH(queue, join_kernel<D>, a->heads, threads_for(D * PACK), 0, d);
  });
}

}  // namespace acre
