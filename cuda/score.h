/* What scoring and its gradient share: the heads that count, on the device, and where the
 * workspace keeps what is measured of every item. */
#ifndef ACRE_CUDA_SCORE_H
#define ACRE_CUDA_SCORE_H

#include "internal.h"
#include "tiles.h"

namespace acre {

constexpr int MEASURES = 3; /* floats kept of an item */

/* The workspace of scoring: [start | list | pull | measures]. */
struct score_space {
  int32_t *start, *list;
  float *pull;        /* [m] */
  float *measures;    /* [MEASURES] of each of `rows` rows' items, KV head after KV head */
  int64_t rows;       /* at a time; 0: nothing can be done */
  int64_t used, most; /* heads that count; the most of one KV head */
};

/* Sends `use` and (nullable) `pull`. */
score_space score_space_open(acre_queue *queue, const uint8_t *use, const float *pull,
                             int64_t t, int64_t m, const acre_heads *heads);

/* Where a block's items and keys lie in shared memory, in floats, and what follows them. */
constexpr int SCORED_ITEMS = 0, SCORED_KEYS = ITEMS * PITCH,
              SCORED_END = SCORED_KEYS + TILE * PITCH;

/* Logits, as powers of two, of the block's items with the keys from `key` on; returns how many
 * keys there are. C is the call of a kernel: q, q_stride, keys, m, map, kv_heads, d, scale. */
template <class T, class C>
__device__ int dot_tile(const C &a, float (&s)[OWN_ITEMS], int kv, int item, int items,
                        int64_t key, float *memory) {
  int count = (int)min((int64_t)TILE, a.m - key);
  const T *keys = a.keys + (key * a.kv_heads + kv) * a.d;
  for (int r = 0; r < OWN_ITEMS; r++) s[r] = 0.0f;
  for (int first = 0; first < a.d; first += CHUNK) {
    __syncthreads();
    load_items<T>(memory + SCORED_ITEMS, PITCH, a.q, a.q_stride, a.map, kv, item, items,
                  first, a.d);
    load_keys(memory + SCORED_KEYS, keys, (int64_t)a.kv_heads * a.d, count, first, a.d);
    __syncthreads();
    dot_chunk(s, memory + SCORED_ITEMS, PITCH, memory + SCORED_KEYS);
  }
  for (int r = 0; r < OWN_ITEMS; r++) s[r] *= a.scale;
  return count;
}

/* What is measured of an item. C has map and measures. */
template <class C>
__device__ float *measure_of(const C &a, int kv, int item) {
  return a.measures + ((int64_t)a.map.rows * a.map.start[kv] + item) * MEASURES;
}

}  // namespace acre
#endif
