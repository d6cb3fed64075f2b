/* What the attention kernels of compute capability 8.0 share: the call, its tiles of keys, its
 * queries in shared memory, and one step of the online softmax on fragments. */
#ifndef ACRE_CUDA_SM80_ATTEND_H
#define ACRE_CUDA_SM80_ATTEND_H

#include "internal.h"
#include "sm80/mma.h"
#include "tiles.h"

#include <math.h>

namespace acre {

/* head_dim as a constant; false where there are no kernels for it. */
template <int D>
struct head_dim {
  static constexpr int value = D;
};

template <class F>
bool for_head_dim(int64_t d, F call) {
  switch (d) {
    case 64: call(head_dim<64>()); return true;
    case 80: call(head_dim<80>()); return true;
    case 96: call(head_dim<96>()); return true;
    case 128: call(head_dim<128>()); return true;
    case 256: call(head_dim<256>()); return true;
  }
  return false;
}

/* ------------------------------------------------------------------ keys */

/* Both segments of keys, cut into tiles of `step`. Keys are counted in 32 bits: 2^31 of them
 * fit no device. */
struct segments {
  const bf16 *keys[2], *values[2]; /* prefix, own */
  const float *bias[2];            /* nullable */
  int count[2], tiles[2];
  int kv_heads, d;
  bool wide; /* sixteen bytes at a time */

  void set(int segment, const acre_keys &from, int64_t n, int step) {
    keys[segment] = (const bf16 *)from.rotated, values[segment] = (const bf16 *)from.values;
    bias[segment] = from.bias;
    count[segment] = (int)n, tiles[segment] = (int)acre_ceil_div(n, step);
    wide = wide && (n == 0 || (aligned(from.rotated, 0) && aligned(from.values, 0)));
  }
};

struct key_tile {
  const bf16 *keys, *values; /* of the KV head */
  const float *bias;
  int first, own, count;

  /* The `index`-th tile; own keys from `end` on are not seen. */
  __device__ key_tile(const segments &s, int kv, int index, int step, int end) {
    own = index >= s.tiles[0];
    first = (own ? index - s.tiles[0] : index) * step;
    count = min(step, (own ? end : s.count[0]) - first);
    int64_t at = ((int64_t)first * s.kv_heads + kv) * s.d;
    keys = s.keys[own] + at, values = s.values[own] + at;
    bias = s.bias[own] ? s.bias[own] + first : NULL;
  }
};

/* ------------------------------------------------------------------ a call of attend */

struct attend_call {
  bf16 *out;
  int64_t out_stride;
  float *lse; /* nullable */
  const float *q;
  int64_t q_stride;
  segments seen_keys;
  int64_t blocks;
  item_map map;
  int seen, runs, heads, kv_heads;
  bool wide, out_pairs; /* queries by sixteen bytes, output by four */
  float scale;
  float *partial; /* [runs][heads][d + 2], where there are several runs */
};

/* Items as rows of a tile, rounded; zeros from `count` on. */
template <int D, int ROWS, int THREADS>
__device__ __forceinline__ void load_queries(bf16 *tile, const attend_call &a, int kv,
                                             int item, int count) {
  constexpr int PIECES = D / PIECE;
#pragma unroll 1
  for (int i = (int)threadIdx.x; i < ROWS * PIECES; i += THREADS) {
    int own = i / PIECES, column = i % PIECES * PIECE;
    float x[PIECE] = {0.0f};
    if (own < count) {
      const float *from = a.q + a.map.row(kv, item + own) * a.q_stride +
                          (int64_t)a.map.head(kv, item + own) * D + column;
      if (a.wide) {
        load<PIECE>(x, from);
      } else {
        for (int j = 0; j < PIECE; j++) x[j] = from[j];
      }
    }
    store<PIECE>(tile + tile_at<D>(own, column), x);
  }
}

/* ------------------------------------------------------------------ softmax */

/* Of the rows of a product that this lane has; `sum` is of this lane's columns alone. */
template <int M>
struct softmax_rows {
  float origin[M][2], sum[M][2];
  __device__ softmax_rows() {
#pragma unroll
    for (int m = 0; m < M; m++)
      for (int r = 0; r < 2; r++) origin[m][r] = -INFINITY, sum[m][r] = 0.0f;
  }
};

/* s = s * scale + bias * log2(e), for the first `count` columns. */
template <int M, int N>
__device__ __forceinline__ void scale_logits(product<M, N> &s, float scale,
                                             const float *bias, int count) {
#pragma unroll
  for (int n = 0; n < N / COLUMNS; n++) {
    float more[2] = {0.0f, 0.0f};
    for (int i = 0; bias && i < 2; i++)
      if (column_of(n, i) < count) more[i] = bias[column_of(n, i)] * LOG2E;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int i = 0; i < 4; i++) s[m][n][i] = s[m][n][i] * scale + more[i % 2];
  }
}

/* Columns from limit[row] on are not seen. */
template <int M, int N>
__device__ __forceinline__ void mask_logits(product<M, N> &s, const int (&limit)[M][2]) {
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int n = 0; n < N / COLUMNS; n++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        if (column_of(n, i) >= limit[m][i / 2]) s[m][n][i] = -INFINITY;
}

/* Logits become weights; what the rows had so far, in `now` and `o`, follows the origin. */
template <int M, int N, int D>
__device__ __forceinline__ void weigh(packed<M, N> &w, const product<M, N> &s,
                                      softmax_rows<M> &now, product<M, D> &o) {
#pragma unroll
  for (int m = 0; m < M; m++) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float top = -INFINITY, sum = 0.0f;
#pragma unroll
      for (int n = 0; n < N / COLUMNS; n++)
        top = fmaxf(top, fmaxf(s[m][n][2 * r], s[m][n][2 * r + 1]));
      float origin = fmaxf(now.origin[m][r], ceilf(row_reduce(top, most())));
      float from = origin == -INFINITY ? 0.0f : origin; /* nothing seen yet */
#pragma unroll
      for (int n = 0; n < N / COLUMNS; n++) {
        w[m][n][r] =
            pair_of(power(s[m][n][2 * r] - from), power(s[m][n][2 * r + 1] - from));
        sum += low_of(w[m][n][r]) + high_of(w[m][n][r]);
      }
      float by = rescale(now.origin[m][r], from);
      now.sum[m][r] = now.sum[m][r] * by + sum;
      now.origin[m][r] = origin;
      if (by == 1.0f) continue;
#pragma unroll
      for (int n = 0; n < D / COLUMNS; n++) o[m][n][2 * r] *= by, o[m][n][2 * r + 1] *= by;
    }
  }
}

/* decode.cu: one row, its keys shared out over many blocks. */
void decode(acre_queue *queue, attend_call *a, const acre_keys *prefix,
            const acre_keys &own);

}  // namespace acre
#endif
