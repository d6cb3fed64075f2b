/* What the plain attention kernels are made of: items that meet keys, tile by tile.
 *
 * An item is a query row with one head. A block has ITEMS items of one KV head; they meet
 * TILE keys at a time, a lane of each warp having a key and a warp every WARPS-th item. Rows
 * come through shared memory in CHUNK of their dimensions at a time, so that any head_dim
 * fits, and one number more per row keeps lanes out of each other's banks. */
#ifndef ACRE_CUDA_TILES_H
#define ACRE_CUDA_TILES_H

#include "device.h"

#include "backend.h"

namespace acre {

constexpr int TILE = WARP; /* keys */
constexpr int ITEMS = 16;
constexpr int TILE_THREADS = 128;
constexpr int TILE_BLOCKS =
    3; /* of a multiprocessor at once, or more: leaves the registers needed */
constexpr int WARPS = TILE_THREADS / WARP;
constexpr int OWN_ITEMS = ITEMS / WARPS; /* of a thread */
constexpr int CHUNK = 64;                /* dimensions */
constexpr int PITCH = CHUNK + 1;
constexpr int SIDES = TILE_THREADS / CHUNK; /* threads that share a column */
constexpr int HEAD_DIM_MOST = 512;

size_t attend_shared_bytes(int d); /* attention.cu */

static_assert(ITEMS % WARPS == 0 && ITEMS % SIDES == 0 && TILE % SIDES == 0, "even shares");

/* Query rows and heads: item i of a KV head is row i / used, and of its `used` heads the
 * i % used-th: those from kv * group on, or what a list names. Items are counted in 32 bits:
 * queries of 2^31 of them fit no device. */
struct item_map {
  int rows;
  int group;            /* heads of a KV head */
  const int32_t *list;  /* heads in use, KV head after KV head; NULL: all */
  const int32_t *start; /* [kv_heads + 1], where each KV head's part of the list begins */

  __device__ unsigned used(int kv) const {
    return (unsigned)(list ? start[kv + 1] - start[kv] : group);
  }
  __device__ int count(int kv) const { return rows * (int)used(kv); }
  __device__ int row(int kv, int item) const { return (int)((unsigned)item / used(kv)); }
  __device__ int head(int kv, int item) const {
    int i = (int)((unsigned)item % used(kv));
    return list ? list[start[kv] + i] : kv * group + i;
  }
};

/* to [TILE][PITCH] = dimensions [first, first + CHUNK) of `count` keys from `from` on, `step`
 * apart; zero beyond. All threads. */
template <class T>
__device__ void load_keys(float *to, const T *from, int64_t step, int count, int first,
                          int d) {
  int columns = min(CHUNK, d - first);
  for (int i = (int)threadIdx.x; i < TILE * CHUNK; i += TILE_THREADS) {
    int key = i / CHUNK, c = i % CHUNK;
    bool there = key < count && c < columns;
    to[key * PITCH + c] = there ? widen(from[key * step + first + c]) : 0.0f;
  }
}

/* to [ITEMS][pitch] = the same dimensions of `count` items from `item` on, rounded to T, of an
 * array [rows, .., head, d] with this row stride. */
template <class T, class S>
__device__ void load_items(float *to, int pitch, const S *from, int64_t stride,
                           const item_map &map, int kv, int item, int count, int first,
                           int d) {
  int columns = min(CHUNK, d - first);
  for (int i = (int)threadIdx.x; i < ITEMS * CHUNK; i += TILE_THREADS) {
    int own = i / CHUNK, c = i % CHUNK;
    float x = 0.0f;
    if (own < count && c < columns) {
      int64_t row = map.row(kv, item + own);
      int64_t head = map.head(kv, item + own);
      x = rounded<T>(widen(from[row * stride + head * d + first + c]));
    }
    to[own * pitch + c] = x;
  }
}

/* s[r] += a [item r of this thread] . b [key of this lane], over CHUNK dimensions. */
__device__ __forceinline__ void dot_chunk(float (&s)[OWN_ITEMS], const float *a,
                                          int a_pitch, const float *b) {
  int warp = (int)threadIdx.x / WARP, lane = (int)threadIdx.x % WARP;
#pragma unroll 4
  for (int c = 0; c < CHUNK; c++) {
    float key = b[lane * PITCH + c];
#pragma unroll
    for (int r = 0; r < OWN_ITEMS; r++) s[r] += a[(warp + r * WARPS) * a_pitch + c] * key;
  }
}

/* Item r of this thread, within the block. */
__device__ __forceinline__ int own_item(int r) {
  return (int)threadIdx.x / WARP + r * WARPS;
}

/* A head's softmax so far, in powers of two: origin is whole, sum is of exp2(x - origin). */
struct running {
  float origin, sum;
};

/* Of exp2(origin - later) where the origin rises; 0 for nothing seen yet. */
__device__ __forceinline__ float rescale(float origin, float later) {
  return origin == -INFINITY ? 0.0f : exp2f(origin - later);
}

/* sum[i] += over a tile's keys of w [first_item + i][key] * b [key][this thread's column]. */
__device__ __forceinline__ void add_keys(float (&sum)[ITEMS / SIDES], const float *w,
                                         const float *b) {
  int column = (int)threadIdx.x % CHUNK, first = (int)threadIdx.x / CHUNK * (ITEMS / SIDES);
#pragma unroll 4
  for (int j = 0; j < TILE; j++) {
    float x = b[j * PITCH + column];
#pragma unroll
    for (int i = 0; i < ITEMS / SIDES; i++) sum[i] += w[(first + i) * (TILE + 1) + j] * x;
  }
}

/* sum[j] += over `count` items of w [item][first_key + j] * a [item][this thread's column]. */
__device__ __forceinline__ void add_items(float (&sum)[TILE / SIDES], const float *w,
                                          const float *a, int count) {
  int column = (int)threadIdx.x % CHUNK, first = (int)threadIdx.x / CHUNK * (TILE / SIDES);
  for (int i = 0; i < count; i++) {
    float x = a[i * PITCH + column];
#pragma unroll
    for (int j = 0; j < TILE / SIDES; j++) sum[j] += w[i * (TILE + 1) + first + j] * x;
  }
}

}  // namespace acre
#endif
