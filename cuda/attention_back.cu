/* The gradient through attention, from each row's normaliser (csrc/cpu/attend_back.c has the
 * formulas): every number is added up by one thread, in order, so it is always the same.
 *
 * Three kernels: delta, a number per item; dq, where a block has items and meets all keys; dk
 * and dv, where a block has keys and meets all items that see them. A block has CHUNK of the
 * dimensions that are written, and makes the weights for them anew: simple before fast. */
#include "internal.h"
#include "tiles.h"

#include <math.h>

namespace acre {
namespace {

template <class T>
struct back_call {
  float *dqkv, *dk, *dv, *delta; /* delta [rows, heads] */
  const float *dout, *lse;
  const T *out, *q;
  const T *keys[2], *values[2]; /* prefix, own */
  const float *bias[2];
  int64_t count[2], tiles[2];
  int64_t blocks, row_width, stride; /* of a row of q, and of dqkv */
  item_map map;
  int heads, kv_heads, d, chunks;
  float scale, factor;
};

/* Shared memory, in floats. */
constexpr int A = 0, A2 = A + ITEMS * PITCH, B = A2 + ITEMS * PITCH, P = B + TILE * PITCH,
              DS = P + ITEMS * (TILE + 1), FLOATS = DS + ITEMS * (TILE + 1);
constexpr size_t SHARED = FLOATS * sizeof(float);

template <class T>
__global__ void delta_kernel(back_call<T> a, int64_t items) {
  int64_t warps = (int64_t)gridDim.x * (blockDim.x / WARP);
  int lane = (int)threadIdx.x % WARP;
  for (int64_t i = (int64_t)blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
       i < items; i += warps) {
    float sum = 0.0f;
    for (int c = lane; c < a.d; c += WARP)
      sum += rounded<T>(a.dout[i * a.d + c]) * widen(a.out[i * a.d + c]);
    sum = warp_reduce(sum, add());
    if (lane == 0) a.delta[i] = sum;
  }
}

/* A tile of either segment, and a block of items. */
template <class T>
struct meeting {
  const T *keys, *values;
  const float *bias;
  int64_t first;
  int own, count, item, items, kv;

  __device__ void set_tile(const back_call<T> &a, int64_t index) {
    own = index >= a.tiles[0];
    first = (own ? index - a.tiles[0] : index) * TILE;
    count = (int)min((int64_t)TILE, a.count[own] - first);
    int64_t at = (first * a.kv_heads + kv) * a.d;
    keys = a.keys[own] + at, values = a.values[own] + at;
    bias = a.bias[own] ? a.bias[own] + first : NULL;
  }
  __device__ void set_items(const back_call<T> &a, int from) {
    item = from;
    items = min(ITEMS, a.map.count(kv) - from);
  }
  __device__ bool sees(const back_call<T> &a, int i, int key) const {
    return i < items && key < count && (!own || first + key <= a.map.row(kv, item + i));
  }
};

/* P and DS of a meeting, rounded to T, in shared memory; all threads. */
template <class T>
__device__ void weigh(const back_call<T> &a, const meeting<T> &m, float *memory) {
  int64_t step = (int64_t)a.kv_heads * a.d;
  int lane = (int)threadIdx.x % WARP;
  float s[OWN_ITEMS] = {0.0f}, dp[OWN_ITEMS] = {0.0f};
  for (int first = 0; first < a.d; first += CHUNK) {
    __syncthreads();
    load_items<T>(memory + A, PITCH, a.q, a.row_width, a.map, m.kv, m.item, m.items, first,
                  a.d);
    load_keys(memory + B, m.keys, step, m.count, first, a.d);
    __syncthreads();
    dot_chunk(s, memory + A, PITCH, memory + B);
    __syncthreads();
    load_items<T>(memory + A, PITCH, a.dout, a.row_width, a.map, m.kv, m.item, m.items,
                  first, a.d);
    load_keys(memory + B, m.values, step, m.count, first, a.d);
    __syncthreads();
    dot_chunk(dp, memory + A, PITCH, memory + B);
  }
  float bias = m.bias && lane < m.count ? m.bias[lane] * LOG2E : 0.0f;
#pragma unroll
  for (int r = 0; r < OWN_ITEMS; r++) {
    int own = own_item(r);
    float p = 0.0f, ds = 0.0f;
    if (m.sees(a, own, lane)) {
      int64_t at =
          (int64_t)a.map.row(m.kv, m.item + own) * a.heads + a.map.head(m.kv, m.item + own);
      p = exp2f(fminf(s[r] * a.scale + bias - a.lse[at], 1.0f));
      ds = p * a.factor * (dp[r] - a.delta[at]);
    }
    memory[P + own * (TILE + 1) + lane] = rounded<T>(p);
    memory[DS + own * (TILE + 1) + lane] = rounded<T>(ds);
  }
  __syncthreads();
}

template <class T>
__global__ __launch_bounds__(TILE_THREADS, TILE_BLOCKS) void dq_kernel(back_call<T> a) {
  float *memory = (float *)acre_shared();
  int column = (int)threadIdx.x % CHUNK, side = (int)threadIdx.x / CHUNK;
  for (int64_t b = blockIdx.x; b < a.blocks; b += gridDim.x) {
    int chunk = (int)(b % a.chunks) * CHUNK;
    meeting<T> m;
    m.kv = (int)(b / a.chunks % a.kv_heads);
    m.set_items(a, (int)(b / a.chunks / a.kv_heads) * ITEMS);
    int64_t last_row = a.map.row(m.kv, m.item + m.items - 1);
    int64_t end = a.tiles[0] + last_row / TILE + 1;
    float sum[ITEMS / SIDES] = {0.0f};
    for (int64_t index = 0; index < end; index++) {
      m.set_tile(a, index);
      weigh(a, m, memory);
      load_keys(memory + B, m.keys, (int64_t)a.kv_heads * a.d, m.count, chunk, a.d);
      __syncthreads();
      add_keys(sum, memory + DS, memory + B);
      __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < ITEMS / SIDES; i++) {
      int own = side * (ITEMS / SIDES) + i;
      if (own >= m.items || chunk + column >= a.d) continue;
      int64_t head = a.map.head(m.kv, m.item + own);
      a.dqkv[a.map.row(m.kv, m.item + own) * a.stride + head * a.d + chunk + column] =
          sum[i];
    }
  }
}

template <class T>
__global__ __launch_bounds__(TILE_THREADS, TILE_BLOCKS) void dkv_kernel(back_call<T> a) {
  float *memory = (float *)acre_shared();
  int column = (int)threadIdx.x % CHUNK, side = (int)threadIdx.x / CHUNK;
  for (int64_t b = blockIdx.x; b < a.blocks; b += gridDim.x) {
    int chunk = (int)(b % a.chunks) * CHUNK;
    meeting<T> m;
    m.kv = (int)(b / a.chunks % a.kv_heads);
    m.set_tile(a, b / a.chunks / a.kv_heads);
    float dk[TILE / SIDES] = {0.0f}, dv[TILE / SIDES] = {0.0f};
    int from = m.own ? (int)(m.first * a.map.group) / ITEMS * ITEMS : 0;
    for (int item = from; item < a.map.count(m.kv); item += ITEMS) {
      m.set_items(a, item);
      weigh(a, m, memory);
      load_items<T>(memory + A, PITCH, a.q, a.row_width, a.map, m.kv, m.item, m.items,
                    chunk, a.d);
      load_items<T>(memory + A2, PITCH, a.dout, a.row_width, a.map, m.kv, m.item, m.items,
                    chunk, a.d);
      __syncthreads();
      add_items(dk, memory + DS, memory + A, m.items);
      add_items(dv, memory + P, memory + A2, m.items);
      __syncthreads();
    }
    int64_t step = m.own ? a.stride : (int64_t)a.kv_heads * a.d;
    int64_t at =
        (m.first + side * (TILE / SIDES)) * step + m.kv * (int64_t)a.d + chunk + column;
    float *to_k = m.own ? a.dqkv + (int64_t)a.heads * a.d : a.dk;
    float *to_v = m.own ? to_k + (int64_t)a.kv_heads * a.d : a.dv;
#pragma unroll
    for (int j = 0; j < TILE / SIDES; j++) {
      if (side * (TILE / SIDES) + j >= m.count || chunk + column >= a.d) continue;
      to_k[at + j * step] = dk[j], to_v[at + j * step] = dv[j];
    }
  }
}

template <class T>
void set_keys(back_call<T> *a, int segment, const acre_keys &keys) {
  a->keys[segment] = (const T *)keys.rotated;
  a->values[segment] = (const T *)keys.values;
  a->bias[segment] = keys.bias;
  a->count[segment] = keys.count;
  a->tiles[segment] = acre_ceil_div(keys.count, TILE);
}

}  // namespace
}  // namespace acre

/* delta takes the place of the parts of dq that the scratch is meant for. */
void acre_cuda_attend_back(acre_queue *queue, float *dqkv, float *dk, float *dv,
                           float *scratch, const float *dout, const void *out,
                           const float *lse, const void *q, const acre_keys *prefix,
                           const acre_keys *own, int64_t rows, const acre_heads *heads) {
  using namespace acre;
  if (rows <= 0) return;
  for_dtype(heads->dtype, [&](auto zero) {
    using T = decltype(zero);
    back_call<T> a = {};
    a.dqkv = dqkv, a.dk = dk, a.dv = dv, a.delta = scratch;
    a.dout = dout, a.lse = lse, a.out = (const T *)out, a.q = (const T *)q;
    a.heads = (int)heads->heads, a.kv_heads = (int)heads->kv_heads;
    a.d = (int)heads->head_dim, a.chunks = (a.d + CHUNK - 1) / CHUNK;
    a.row_width = (int64_t)a.heads * a.d;
    a.stride = (int64_t)(a.heads + 2 * a.kv_heads) * a.d;
    a.scale = (float)((double)LOG2E / sqrt((double)a.d));
    a.factor = (float)(1.0 / sqrt((double)a.d));
    a.map = item_map{(int)rows, a.heads / a.kv_heads, NULL, NULL};
    if (prefix) set_keys(&a, 0, *prefix);
    set_keys(&a, 1, *own);
    int64_t items = rows * a.heads, across = (int64_t)a.kv_heads * a.chunks;
    ACRE_LAUNCH(queue, delta_kernel<T>, blocks_for(items, WARPS), TILE_THREADS, 0, a,
                items);
    a.blocks = acre_ceil_div(rows * a.map.group, ITEMS) * across;
    ACRE_LAUNCH(queue, dq_kernel<T>, a.blocks, TILE_THREADS, SHARED, a);
    a.blocks = (a.tiles[0] + a.tiles[1]) * across;
    ACRE_LAUNCH(queue, dkv_kernel<T>, a.blocks, TILE_THREADS, SHARED, a);
  });
}
