/* Window attention on Hopper, of bf16 and head_dim 64 or 128.
 *
 * A block has one warpgroup that only asks the bulk copy engine for tiles of keys and values,
 * and two that consume them, 64 items (row, head of one KV head) each. While the products of
 * one consumer run, the other has the softmax of its last tile to do: they take turns by two
 * named barriers. Within a consumer the scores of a tile are issued before the values of the
 * tile before, so the matrix units have both to do. Weights go from the registers of one
 * product to those of the next. Blocks stay, and take the longest items first.
 *
 * A row's result depends on its own keys alone: tiles begin at the same keys for every row, a
 * tile that a row does not see adds zeros to it, and masked tiles are computed as others are. So
 * this kernel takes any number of rows, and only leaves a split row to others. */
#include "sm90/attend.h"

#include "fragment.h"
#include "sm80/sm80.h"
#include "tiles.h"

#include <math.h>

namespace acre {
namespace sm90 {
namespace {

constexpr int ORDER = 1, OWN = ORDER + CONSUMERS; /* names of barriers, one per consumer */
constexpr int SCORES = KEYS / 2;                  /* accumulators of a thread */
constexpr int STEPS = KEYS / PRODUCT_DEPTH;       /* products of weights and values */

struct window_call {
  CUtensorMap keys[2], values[2]; /* prefix, own */
  const float *bias[2];           /* nullable */
  const float *q;
  int64_t q_stride;
  bf16 *out;
  int64_t out_stride;
  float *lse; /* nullable */
  int prefix, prefix_tiles, seen, heads, kv_heads, blocks;
  item_map map;
  float scale,
      bias_scale; /* logits to powers of two; a bias to what `scale` is applied to */
};

/* A share of the work: BLOCK_ITEMS items of a KV head, the last of all first. */
struct window_block {
  int kv, item, count, tiles;
  __device__ window_block(const window_call &a, int work) {
    kv = work % a.kv_heads;
    item = (a.blocks / a.kv_heads - 1 - work / a.kv_heads) * BLOCK_ITEMS;
    count = min(BLOCK_ITEMS, a.map.count(kv) - item);
    int end = a.seen + a.map.row(kv, item + count - 1) + 1;
    tiles = a.prefix_tiles + (end + KEYS - 1) / KEYS;
  }
};

struct window_tile {
  int own, first;
  __device__ window_tile(const window_call &a, int index) {
    own = index >= a.prefix_tiles;
    first = (own ? index - a.prefix_tiles : index) * KEYS;
  }
  __device__ int visible(const window_call &a, int row) const {
    return (own ? a.seen + row + 1 : a.prefix) - first;
  }
};

/* Where one is in a ring: a slot, and which of two phases it is in. */
template <int STAGES>
struct ring {
  int slot = 0;
  unsigned parity = 0;
  __device__ void next(void) {
    if (++slot == STAGES) slot = 0, parity ^= 1;
  }
};

/* The tiles of keys (side 0) and of values (side 1). */
template <int D>
struct rings {
  using plan = window_plan<D>;
  unsigned char *memory;
  __device__ unsigned char *tile(int side, int slot) const {
    return memory + plan::RINGS + (side * plan::STAGES + slot) * plan::TILE_BYTES;
  }
  __device__ uint64_t *full(int side, int slot) const {
    return (uint64_t *)(memory + plan::BARRIERS) + (side * plan::STAGES + slot) * 2;
  }
  __device__ uint64_t *empty(int side, int slot) const { return full(side, slot) + 1; }
};

/* ------------------------------------------------------------------ the producer */

template <int D>
__device__ __forceinline__ void fetch(const rings<D> &to, int side,
                                      const ring<window_plan<D>::STAGES> &at,
                                      const CUtensorMap *map, int column, int row) {
  using plan = window_plan<D>;
  barrier_wait(to.empty(side, at.slot), at.parity ^ 1);
  barrier_expect(to.full(side, at.slot), plan::TILE_BYTES);
#pragma unroll
  for (int box = 0; box < plan::BOXES; box++)
    box_copy(to.tile(side, at.slot) + box * plan::KEY_BOX, map, column + box * BOX_COLUMNS,
             row, to.full(side, at.slot));
}

template <int D>
__device__ __forceinline__ void produce(const window_call &a, const rings<D> &to) {
  ring<window_plan<D>::STAGES> at;
  for (int work = (int)blockIdx.x; work < a.blocks; work += (int)gridDim.x) {
    window_block block(a, work);
    for (int index = 0; index < block.tiles; index++, at.next()) {
      window_tile tile(a, index);
      fetch<D>(to, 0, at, &a.keys[tile.own], block.kv * D, tile.first);
      fetch<D>(to, 1, at, &a.values[tile.own], block.kv * D, tile.first);
    }
  }
}

/* ------------------------------------------------------------------ a consumer */

/* The items of a consumer, and what a thread has of two of them. */
struct window_items {
  int kv, first, count; /* count: of PRODUCT_ROWS, may be none */
  int item[2], row[2];
  int least; /* the first row: sees the fewest keys */
  __device__ window_items(const window_call &a, const window_block &block, int group) {
    int warp = (int)threadIdx.x % WARPGROUP / WARP, lane = (int)threadIdx.x % WARP;
    int last = a.map.count(block.kv) - 1;
    kv = block.kv, first = block.item + group * PRODUCT_ROWS;
    count = min(PRODUCT_ROWS, block.count - group * PRODUCT_ROWS);
    for (int r = 0; r < 2; r++) {
      item[r] = warp * 16 + lane / 4 + r * 8;
      row[r] = a.map.row(kv, min(first + item[r], last));
    }
    least = a.map.row(kv, min(first, last));
  }
};

/* This consumer's queries, rounded, swizzled; those that are not there are zero. */
template <int D>
__device__ __forceinline__ void load_queries(const window_call &a,
                                             const window_items &items, unsigned char *to,
                                             int name) {
  constexpr int UNITS = D / PACK, BOX_UNITS = BOX_COLUMNS / PACK;
  name_sync(name, WARPGROUP); /* the last ones have been read */
  for (int i = (int)threadIdx.x % WARPGROUP; i < PRODUCT_ROWS * UNITS; i += WARPGROUP) {
    int item = i / UNITS, unit = i % UNITS;
    float x[PACK] = {0.0f};
    if (item < items.count) {
      int64_t row = a.map.row(items.kv, items.first + item);
      int head = a.map.head(items.kv, items.first + item);
      load<PACK>(x, a.q + row * a.q_stride + head * D + unit * PACK);
    }
    unsigned char *box = to + unit / BOX_UNITS * window_plan<D>::QUERY_BOX;
    store<PACK>((bf16 *)(box + swizzled(item, unit % BOX_UNITS)), x);
  }
  proxy_fence();
  name_sync(name, WARPGROUP);
}

/* s = q . keys, under way. */
template <int D>
__device__ __forceinline__ void issue_scores(float (&s)[SCORES], uint64_t q,
                                             uint64_t keys) {
  using plan = window_plan<D>;
  constexpr int BOX_STEPS = BOX_COLUMNS / PRODUCT_DEPTH;
  hold(s);
  products_fence();
#pragma unroll
  for (int k = 0; k < D / PRODUCT_DEPTH; k++) {
    int box = k / BOX_STEPS, within = k % BOX_STEPS * PRODUCT_DEPTH * (int)sizeof(bf16);
    product<false>(s, matrix_after(q, box * plan::QUERY_BOX + within),
                   matrix_after(keys, box * plan::KEY_BOX + within), k > 0);
  }
  products_commit();
}

/* o += weights . values, under way. */
template <int D>
__device__ __forceinline__ void issue_values(float (&o)[D / 2],
                                             const uint32_t (&p)[STEPS][4],
                                             uint64_t values) {
  products_fence();
#pragma unroll
  for (int k = 0; k < STEPS; k++)
    product<true>(o, p[k], matrix_after(values, k * PRODUCT_DEPTH * BOX_ROW_BYTES), true);
  products_commit();
}

/* Logits with their bias, and no logit for what a row does not see. */
__device__ __forceinline__ void adjust(const window_call &a, const window_tile &tile,
                                       const window_items &items, float (&s)[SCORES]) {
  int lane = (int)threadIdx.x % WARP;
  int visible[2] = {tile.visible(a, items.row[0]), tile.visible(a, items.row[1])};
  if (const float *bias = a.bias[tile.own]) {
    int most = visible[1]; /* of the later row */
#pragma unroll
    for (int i = 0; i < SCORES; i++) {
      int key = fragment_column(i, lane);
      float x = key < most ? bias[tile.first + key] : 0.0f;
      s[i] = fmaf(x, a.bias_scale, s[i]);
    }
  }
  if (tile.visible(a, items.least) >= KEYS) return;
#pragma unroll
  for (int i = 0; i < SCORES; i++)
    if (fragment_column(i, lane) >= visible[fragment_row(i)]) s[i] = -INFINITY;
}

/* One step of the online softmax: weights, and what o must be scaled by. */
__device__ __forceinline__ void weigh(float (&s)[SCORES], float scale, running (&now)[2],
                                      float (&factor)[2]) {
  float origin[2];
#pragma unroll
  for (int r = 0; r < 2; r++) {
    float highest = -INFINITY;
#pragma unroll
    for (int i = 0; i < SCORES; i++)
      if (fragment_row(i) == r) highest = fmaxf(highest, s[i]);
    float later = fmaxf(now[r].origin, ceilf(row_reduce(highest, most()) * scale));
    factor[r] = rescale(now[r].origin, later);
    now[r].origin = later, now[r].sum *= factor[r];
    origin[r] = later == -INFINITY ? 0.0f : later;
  }
#pragma unroll
  for (int i = 0; i < SCORES; i++)
    s[i] = power(fmaf(s[i], scale, -origin[fragment_row(i)]));
}

/* The weights as a product takes them, rounded, and their sum. Not before the last product that
 * took p is over: the compiler would not let it run beside others. */
__device__ __forceinline__ void round_weights(uint32_t (&p)[STEPS][4],
                                              const float (&s)[SCORES], running (&now)[2]) {
#pragma unroll
  for (int i = 0; i < SCORES; i += 2) {
    uint32_t both = pair_of(s[i], s[i + 1]);
    now[fragment_row(i)].sum += low_of(both) + high_of(both);
    p[i / 8][i / 2 % 4] = both;
  }
}

/* Origins are whole, so most tiles leave them where they are. */
template <int D>
__device__ __forceinline__ void scale_by(float (&o)[D / 2], const float (&factor)[2]) {
  if (factor[0] == 1.0f && factor[1] == 1.0f) return;
#pragma unroll
  for (int i = 0; i < D / 2; i++) o[i] *= factor[fragment_row(i)];
}

template <int D>
__device__ __forceinline__ void write_items(const window_call &a, const window_items &items,
                                            const float (&o)[D / 2],
                                            const running (&now)[2]) {
  int lane = (int)threadIdx.x % WARP;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    float sum = row_reduce(now[r].sum, add()), by = 1.0f / sum;
    if (items.item[r] >= items.count) continue;
    int head = a.map.head(items.kv, items.first + items.item[r]);
    bf16 *out = a.out + items.row[r] * a.out_stride + head * D;
    if (a.lse && lane % 4 == 0)
      a.lse[(int64_t)items.row[r] * a.heads + head] = now[r].origin + log2f(sum);
#pragma unroll
    for (int i = 0; i < D / 2; i += 2)
      if (fragment_row(i) == r)
        *(uint32_t *)(out + fragment_column(i, lane)) = pair_of(o[i] * by, o[i + 1] * by);
  }
}

/* This warp has read the tile. */
__device__ __forceinline__ void release(uint64_t *empty) {
  if (threadIdx.x % WARP == 0) barrier_arrive(empty);
}

template <int D>
struct consumer {
  using plan = window_plan<D>;
  rings<D> from;
  ring<plan::STAGES> keys, values;
  int group;
  uint64_t q;

  __device__ __forceinline__ uint64_t scores_of(void) const {
    return matrix_at(from.tile(0, keys.slot), 0);
  }
  __device__ __forceinline__ uint64_t values_of(void) const {
    return matrix_at(from.tile(1, values.slot), plan::KEY_BOX);
  }
  __device__ __forceinline__ void my_turn(void) const {
    name_sync(ORDER + group, CONSUMERS * WARPGROUP);
  }
  __device__ __forceinline__ void your_turn(void) const {
    name_arrive(ORDER + 1 - group, CONSUMERS * WARPGROUP);
  }
  __device__ __forceinline__ void keys_done(void) {
    release(from.empty(0, keys.slot));
    keys.next();
  }
  __device__ __forceinline__ void values_done(void) {
    release(from.empty(1, values.slot));
    values.next();
  }
  __device__ __forceinline__ void wait_for_keys(void) const {
    barrier_wait(from.full(0, keys.slot), keys.parity);
  }
  __device__ __forceinline__ void wait_for_values(void) const {
    barrier_wait(from.full(1, values.slot), values.parity);
  }

  /* All tiles of this consumer's items; o is not yet divided. */
  __device__ __forceinline__ void attend(const window_call &a, const window_block &block,
                                         const window_items &items, float (&o)[D / 2],
                                         running (&now)[2]) {
    float s[SCORES] = {0.0f}, factor[2];
    uint32_t p[STEPS][4];
    wait_for_keys();
    my_turn();
    issue_scores<D>(s, q, scores_of());
    your_turn();
    products_wait<0>();
    hold(s);
    keys_done();
    adjust(a, window_tile(a, 0), items, s);
    weigh(s, a.scale, now, factor);
    round_weights(p, s, now);
    for (int index = 1; index < block.tiles; index++) {
      wait_for_keys();
      my_turn();
      hold(o), hold(p); /* ready before the first product: else they run one by one */
      issue_scores<D>(s, q, scores_of());
      wait_for_values();
      issue_values<D>(o, p, values_of());
      your_turn();
      products_wait<1>();
      hold(s);
      keys_done();
      adjust(a, window_tile(a, index), items, s);
      weigh(s, a.scale, now, factor);
      products_wait<0>();
      hold(o);
      values_done();
      scale_by<D>(o, factor);
      round_weights(p, s, now);
    }
    wait_for_values();
    hold(o), hold(p);
    issue_values<D>(o, p, values_of());
    products_wait<0>();
    hold(o);
    values_done();
  }
};

template <int D>
__device__ __forceinline__ void consume(const window_call &a, const rings<D> &from,
                                        int group) {
  using plan = window_plan<D>;
  unsigned char *queries =
      from.memory + plan::QUERIES + group * plan::BOXES * plan::QUERY_BOX;
  consumer<D> self = {from, {}, {}, group, matrix_at(queries, 0)};
  if (group == 1) self.your_turn(); /* the other one begins */
  for (int work = (int)blockIdx.x; work < a.blocks; work += (int)gridDim.x) {
    window_block block(a, work);
    window_items items(a, block, group);
    running now[2] = {{-INFINITY, 0.0f}, {-INFINITY, 0.0f}};
    float o[D / 2] = {0.0f};
    load_queries<D>(a, items, queries, OWN + group);
    self.attend(a, block, items, o, now);
    write_items<D>(a, items, o, now);
  }
  if (group == 0) self.my_turn(); /* nobody leaves a barrier half full */
}

/* ------------------------------------------------------------------ the kernel */

template <int D>
__device__ __forceinline__ void open_rings(const rings<D> &all) {
  for (int side = 0; side < 2; side++) {
    for (int slot = 0; slot < window_plan<D>::STAGES; slot++) {
      barrier_init(all.full(side, slot), 1);
      barrier_init(all.empty(side, slot), CONSUMERS * WARPGROUP / WARP);
    }
  }
  barriers_ready();
}

template <int D>
__global__ __launch_bounds__(BLOCK_THREADS,
                             1) void window_kernel(const __grid_constant__ window_call a) {
  unsigned char *memory = acre_shared();
  unsigned off = shared_address(memory) % SWIZZLE_BYTES;
  rings<D> all = {memory + (SWIZZLE_BYTES - off) % SWIZZLE_BYTES};
  int role = __shfl_sync(ALL_LANES, (int)threadIdx.x / WARPGROUP, 0);
  if (threadIdx.x == 0) open_rings(all);
  __syncthreads();
  if (role == 0) {
    fewer_registers<PRODUCER_REGISTERS>();
    if (threadIdx.x == 0) produce<D>(a, all);
  } else {
    more_registers<CONSUMER_REGISTERS>();
    consume<D>(a, all, role - 1);
  }
}

/* ------------------------------------------------------------------ the call */

typedef CUresult (*encode_function)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *,
                                    const cuuint64_t *, const cuuint64_t *,
                                    const cuuint32_t *, const cuuint32_t *,
                                    CUtensorMapInterleave, CUtensorMapSwizzle,
                                    CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

/* Tiles of one KV head of [count, g, d]; rows beyond `count` come as zeros. */
void map_tiles(acre_queue *queue, CUtensorMap *map, const void *data, int64_t count,
               const acre_heads *heads) {
  cuuint64_t width = (cuuint64_t)(heads->kv_heads * heads->head_dim);
  cuuint64_t sizes[] = {width, (cuuint64_t)count}, strides[] = {width * sizeof(bf16)};
  cuuint32_t box[] = {BOX_COLUMNS, KEYS}, steps[] = {1, 1};
  CUresult result = ((encode_function)queue->owner->tensor_maps)(
      map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, (void *)(uintptr_t)data, sizes, strides,
      box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    check(&queue->failure, cudaErrorInvalidValue, ACRE_SITE("cuTensorMapEncodeTiled"));
}

void set_keys(acre_queue *queue, window_call *a, int segment, const acre_keys &keys,
              int64_t count, const acre_heads *heads) {
  map_tiles(queue, &a->keys[segment], keys.rotated, count, heads);
  map_tiles(queue, &a->values[segment], keys.values, count, heads);
  a->bias[segment] = keys.bias;
}

bool fits(const acre_keys *keys) {
  return !keys || (aligned(keys->rotated, 0) && aligned(keys->values, 0));
}

template <int D>
void launch_windows(acre_queue *queue, const window_call &a) {
  int64_t blocks = acre_min(a.blocks, queue->owner->chip.processors);
  ACRE_LAUNCH(queue, window_kernel<D>, blocks, BLOCK_THREADS, window_plan<D>::ASKED, a);
}

}  // namespace

void *find_tensor_maps(void) {
  void *found = NULL;
  cudaDriverEntryPointQueryResult result;
  if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000,
                                       cudaEnableDefault, &result) != cudaSuccess ||
      result != cudaDriverEntryPointSuccess)
    return NULL;
  return found;
}

}  // namespace sm90
}  // namespace acre

void acre_cuda_sm90_attend(acre_queue *queue, void *out, int64_t out_stride, float *lse,
                           const float *q, int64_t q_stride, const acre_keys *prefix,
                           const acre_keys *own, int64_t seen, int64_t rows, bool split,
                           const acre_heads *heads) {
  using namespace acre::sm90;
  int64_t d = heads->head_dim, group = heads->heads / heads->kv_heads;
  int64_t most = INT32_MAX - KEYS, before = prefix ? prefix->count : 0;
  bool made_for = heads->dtype == ACRE_BF16 && (d == 64 || d == 128) &&
                  !(split && rows == 1) && before < most && seen + rows < most &&
                  rows * group < most && fits(prefix) && fits(own) &&
                  acre::aligned(q, q_stride * (int64_t)sizeof(float)) &&
                  ((uintptr_t)out | (uintptr_t)(out_stride * 2)) % 4 == 0;
  if (!made_for)
    return acre_cuda_sm80_attend(queue, out, out_stride, lse, q, q_stride, prefix, own,
                                 seen, rows, split, heads);
  if (rows <= 0) return;
  window_call a = {};
  a.q = q, a.q_stride = q_stride, a.out = (bf16 *)out, a.out_stride = out_stride;
  a.lse = lse, a.seen = (int)seen, a.prefix = (int)before;
  a.prefix_tiles = (int)acre_ceil_div(before, KEYS);
  a.heads = (int)heads->heads, a.kv_heads = (int)heads->kv_heads;
  a.map = acre::item_map{(int)rows, (int)group, NULL, NULL};
  a.blocks = (int)(acre_ceil_div(rows * group, BLOCK_ITEMS) * heads->kv_heads);
  a.bias_scale = sqrtf((float)d);
  a.scale = (float)((double)acre::LOG2E / sqrt((double)d));
  if (before) set_keys(queue, &a, 0, *prefix, before, heads);
  set_keys(queue, &a, 1, *own, seen + rows, heads);
  if (d == 64)
    launch_windows<64>(queue, a);
  else
    launch_windows<128>(queue, a);
}
