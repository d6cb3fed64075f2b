/* The matrix unit and the asynchronous copies of compute capability 8.0, and tiles of shared
 * memory that suit both.
 *
 * A warp multiplies fragments: a [16, 16] (4 registers), b [16, 8] (2), c [16, 8] (4 floats);
 * lane l has row l / 4 and the pair of columns l % 4 of every 8 x 8 part. On the host
 * (host/matrix_unit.h) the same calls move the same numbers between lanes.
 *
 * A tile is rows of D numbers, 16 bytes a piece, pieces of neighbouring rows exchanged so that
 * the eight rows that ldmatrix reads at once lie in different banks. */
#ifndef ACRE_CUDA_SM80_MMA_H
#define ACRE_CUDA_SM80_MMA_H

#include "fragment.h"

#ifndef __CUDACC__
#include "matrix_unit.h"
#endif

namespace acre {

constexpr int PIECE = 8;     /* numbers of bf16 in 16 bytes */
constexpr int FRAGMENT = 16; /* rows and depth of a product of fragments */
constexpr int COLUMNS = 8;   /* and its columns */
constexpr int MMA_THREADS = 128;
constexpr int MMA_WARPS = MMA_THREADS / WARP;

/* ------------------------------------------------------------------ instructions */

/* Four 8 x 8 matrices; `row`: row lane % 8 of matrix lane / 8, in shared memory. */
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const bf16 *row) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
#else
  acre_host_ldmatrix part = {row, to};
  acre_host_together(acre_host_load_straight, &part, ACRE_WAIT_MATRIX);
#endif
}

/* The same, each of them transposed. */
__device__ __forceinline__ void load_turned(uint32_t (&to)[4], const bf16 *row) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
#else
  acre_host_ldmatrix part = {row, to};
  acre_host_together(acre_host_load_turned, &part, ACRE_WAIT_MATRIX);
#endif
}

/* c += a b. */
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1) {
#ifdef __CUDACC__
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
      "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  acre_host_mma part = {c, a, {b0, b1}};
  acre_host_together(acre_host_multiply, &part, ACRE_WAIT_MATRIX);
#endif
}

/* Sixteen bytes to shared memory, some time before the wait for their group; zeros where they
 * are not there. Both addresses are multiples of sixteen. */
__device__ __forceinline__ void copy_async(void *to, const void *from, bool there) {
#ifdef __CUDACC__
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(shared_address(to)), "l"(from), "r"(there ? 16 : 0)
               : "memory");
#else
  acre_host_copy(to, from, there ? 16 : 0, 16);
#endif
}

/* Ends a group of this thread's copies. */
__device__ __forceinline__ void copies_commit(void) {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  acre_host_copies_commit();
#endif
}

/* All groups but the latest N have arrived. Other threads see that after a barrier. */
template <int N>
__device__ __forceinline__ void copies_wait(void) {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#else
  acre_host_copies_wait(N);
#endif
}

/* ------------------------------------------------------------------ tiles */

/* Where number (row, column) of a tile lies; column a multiple of PIECE. Rows whose pitch is
 * a multiple of 128, 64 or 32 bytes repeat their banks every 1, 2 or 4 rows. */
template <int D>
__device__ __forceinline__ int tile_at(int row, int column) {
  constexpr int SWAPS = D % 64 == 0 ? 8 : D % 32 == 0 ? 4 : 2;
  static_assert(D % FRAGMENT == 0, "whole fragments");
  return row * D + ((column / PIECE ^ row / (PIECE / SWAPS) % SWAPS) * PIECE);
}

/* A piece of a tile, or zeros. */
__device__ __forceinline__ void copy_piece(bf16 *to, const bf16 *from, bool there,
                                           bool wide) {
  if (wide) {
    copy_async(to, from, there);
  } else {
    for (int j = 0; j < PIECE; j++) to[j] = there ? from[j] : narrow<bf16>(0.0f);
  }
}

/* Rows of a tile from `from` on, `step` apart, the first `count` of ROWS; zeros beyond. By
 * `threads` threads of which this is number `thread`. */
template <int D, int ROWS, int THREADS>
__device__ __forceinline__ void load_tile(bf16 *tile, const bf16 *from, int64_t step,
                                          int count, int thread, bool wide) {
  constexpr int PIECES = D / PIECE;
#pragma unroll 1
  for (int i = thread; i < ROWS * PIECES; i += THREADS) {
    int row = i / PIECES, column = i % PIECES * PIECE;
    bool there = row < count;
    copy_piece(tile + tile_at<D>(row, column), from + (there ? row * step + column : 0),
               there, wide);
  }
}

/* This thread's lane, of which the compiler knows nothing: what follows from it is made anew,
 * not kept in registers from one turn of a loop to the next. */
__device__ __forceinline__ int lane_anew(void) {
  int lane = (int)threadIdx.x % WARP;
#ifdef __CUDACC__
  asm volatile("" : "+r"(lane));
#endif
  return lane;
}

/* Rows [row, row + 16), columns [column, column + 16) of a tile as fragment a. */
template <int D>
__device__ __forceinline__ void load_a(uint32_t (&a)[4], const bf16 *tile, int row,
                                       int column, int lane) {
  load_matrices(a, tile + tile_at<D>(row + lane % 16, column + lane / 16 * PIECE));
}

/* Two fragments b whose columns are rows [row, row + 16) of the tile, and whose depth are
 * columns [column, column + 16): b[0], b[1] of the first eight, b[2], b[3] of the rest. */
template <int D>
__device__ __forceinline__ void load_b(uint32_t (&b)[4], const bf16 *tile, int row,
                                       int column, int lane) {
  load_matrices(b, tile + tile_at<D>(row + lane / 16 * PIECE + lane % PIECE,
                                     column + lane / PIECE % 2 * PIECE));
}

/* The same with depth along rows and columns along columns. */
template <int D>
__device__ __forceinline__ void load_b_turned(uint32_t (&b)[4], const bf16 *tile, int row,
                                              int column, int lane) {
  load_turned(b, tile + tile_at<D>(row + lane % 16, column + lane / 16 * PIECE));
}

/* Numbers of a product that this lane has, and the same rounded, ready to be a fragment a:
 * M times 16 rows, N columns. */
template <int M, int N>
using product = float[M][N / COLUMNS][4];
template <int M, int N>
using packed = uint32_t[M][N / COLUMNS][2];

/* Column of number i of the n-th eight, and row of it. */
__device__ __forceinline__ int column_of(int n, int i) {
  return n * COLUMNS + (int)threadIdx.x % 4 * 2 + i % 2;
}
__device__ __forceinline__ int row_of(int m, int i) {
  return m * FRAGMENT + (int)threadIdx.x % WARP / 4 + i / 2 * COLUMNS;
}

/* s += rows of tile `a` from `row` on . rows [0, N) of tile `b`. */
template <int D, int M, int N>
__device__ __forceinline__ void add_dots(product<M, N> &s, const bf16 *a, int row,
                                         const bf16 *b, int lane) {
#pragma unroll
  for (int x = 0; x < D; x += FRAGMENT) {
    uint32_t left[M][4], right[4];
#pragma unroll
    for (int m = 0; m < M; m++) load_a<D>(left[m], a, row + m * FRAGMENT, x, lane);
#pragma unroll
    for (int n = 0; n < N / COLUMNS; n += 2) {
      load_b<D>(right, b, n * COLUMNS, x, lane);
#pragma unroll
      for (int m = 0; m < M; m++) {
        multiply(s[m][n], left[m], right[0], right[1]);
        multiply(s[m][n + 1], left[m], right[2], right[3]);
      }
    }
  }
}

/* o += w [.., K] . columns [column, column + N) of rows [0, K) of tile `b`. */
template <int D, int M, int K, int N>
__device__ __forceinline__ void add_weighted(product<M, N> &o, const packed<M, K> &w,
                                             const bf16 *b, int column, int lane) {
#pragma unroll
  for (int k = 0; k < K / COLUMNS; k += 2) {
#pragma unroll
    for (int n = 0; n < N / COLUMNS; n += 2) {
      uint32_t right[4];
      load_b_turned<D>(right, b, k * COLUMNS, column + n * COLUMNS, lane);
#pragma unroll
      for (int m = 0; m < M; m++) {
        const uint32_t left[4] = {w[m][k][0], w[m][k][1], w[m][k + 1][0], w[m][k + 1][1]};
        multiply(o[m][n], left, right[0], right[1]);
        multiply(o[m][n + 1], left, right[2], right[3]);
      }
    }
  }
}

}  // namespace acre
#endif
