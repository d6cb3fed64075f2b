/* Leaf kernels: what one core does to a few rows. They neither allocate nor fail.
 *
 * The table is filled with the scalar reference first and overridden by a ladder, so no
 * slot is ever empty. Every version of a kernel gives the reference's bits, because the
 * order of operations below is part of the contract:
 *   chain   one fused multiply-add after another, in index order
 *   tree    16 lanes; lane i takes the elements c with c mod 16 == i (chains, from 0);
 *           then lanes i and i+8 are added, i and i+4, i and i+2, i and i+1
 * Formulas name each fused operation, so a compiler that contracts a*b+c cannot change
 * them; the builds pass -ffp-contract=off all the same. Where a NaN comes in a NaN
 * comes out, but which one, and so its bits, is not promised.
 *
 * Packed weights: panels of 16 output columns j.
 *   f32     [N/16][K][16]
 *   bf16    [N/16][ceil(K/2)][16][2]: pairs (c, c+1) side by side, so that one shift or
 *           one mask widens 16 columns, and a dot-product instruction for pairs reads
 *           the same bytes
 * Columns beyond N and the odd last c are zero. */
#ifndef ACRE_CPU_KERNELS_H
#define ACRE_CPU_KERNELS_H

#include "../base.h"
#include "../bf16.h"
#include "features.h"

#include <string.h>

#define ACRE_PANEL 16      /* output columns of a packed panel; lanes of a tree */
#define ACRE_KEY_TILE 64   /* keys that attention takes at once */
#define ACRE_ROWS_LIMIT 16 /* no table's tile_rows exceeds it */

typedef struct acre_kernels {
  const char *isa;
  int64_t tile_rows;   /* most rows of one tile call */
  int64_t tile_panels; /* panels per tile call that fill the registers at tile_rows */

  /* c[i, j] = (add ? c[i, j] : 0) + sum over x < k of a[i, x] * b[x, j], a chain over
   * x; i < rows <= tile_rows, j < 16 * panels. Panel p of b is [k][16] with row stride
   * b_stride and begins at b + p * panel_stride. Strides in elements. */
  void (*tile)(float *c, int64_t c_stride, const float *a, int64_t a_stride, const float *b,
               int64_t b_stride, int64_t panel_stride, int64_t rows, int64_t panels,
               int64_t k, bool add);
  /* The same with b in packed bf16 panels. */
  void (*tile_bf16)(float *c, int64_t c_stride, const float *a, int64_t a_stride,
                    const uint16_t *b, int64_t panel_stride, int64_t rows, int64_t panels,
                    int64_t k, bool add);
  /* b[k][16] = the float32 values of a packed bf16 panel. */
  void (*expand)(float *b, const uint16_t *panel, int64_t k);
  /* b[x][j] = keys[j][x], j < 16, x < k; zero where j >= rows. b [k][16]. */
  void (*transpose)(float *b, const float *keys, int64_t stride, int64_t rows, int64_t k);

  /* y = float32(bfloat16(x)); y = float32(x); y = bfloat16(x). Ties to even. */
  void (*round)(float *y, const float *x, int64_t n);
  void (*widen)(float *y, const uint16_t *x, int64_t n);
  void (*narrow)(uint16_t *y, const float *x, int64_t n);

  /* y = c + addend. */
  void (*add)(float *y, const float *c, const float *addend, int64_t n);
  /* y *= factor. */
  void (*scale)(float *y, float factor, int64_t n);

  /* s[j] = sum over x < k of q[x] * keys[j][x], a tree; j < rows, 16 divides k. */
  void (*dots)(float *s, const float *q, const float *keys, int64_t stride, int64_t rows,
               int64_t k);
  /* One step of the online softmax of `rows` <= tile_rows rows, each over n <= 64
   * logits: l_j = fma(s_j, scale, bias_j) (bias nullable: 0); max becomes max(max, l);
   * s_j becomes exp(l_j - max), and zero for j in [n, 64); sum = fma(sum, factor, tree
   * sum of s), where factor = exp(old max - max) is what the row's earlier results must
   * be scaled by. A maximum of -infinity counts as 0, so that nothing seen stays
   * nothing. s [rows][64]; max, sum, factor [rows]. */
  void (*softmax)(float *s, const float *bias, int64_t rows, int64_t n, float scale,
                  float *max, float *sum, float *factor);
  /* total[j] = fma(exp(s[j] * scale - max), weight, total[j]). */
  void (*add_exp)(float *total, const float *s, int64_t n, float scale, float max,
                  float weight);

  /* y = (x * (1 / sqrt(mean(x^2) + eps))) * gain; the squares in a tree, the root in
   * float64. */
  void (*rmsnorm)(float *y, const float *x, const float *gain, double eps, int64_t n);
  /* y = gate / (1 + exp(-gate)) * up. */
  void (*swiglu)(float *y, const float *gate, const float *up, int64_t n);
  /* y[i] = fma(-b, sin, a cos), y[i + half] = fma(b, cos, a sin) with a = x[i],
   * b = x[i + half]. y may be x. */
  void (*rope)(float *y, const float *x, const float *cos, const float *sin, int64_t half);
} acre_kernels;

/* The table for these features: fills with the reference, then climbs the ladder. */
acre_kernels acre_cpu_kernels(uint32_t features);

void acre_kernels_scalar(acre_kernels *table);
void acre_kernels_avx2(acre_kernels *table, uint32_t features);
void acre_kernels_avx512(acre_kernels *table, uint32_t features);

/* ---------------------------------------------------------------- shared arithmetic */

/* exp(x), error < 1.1 ulp on [ACRE_EXP_LOW, ACRE_EXP_HIGH]; below it 0 (never a
 * denormal), above it exp(ACRE_EXP_HIGH). x = n ln 2 + r with |r| <= ln 2 / 2, and
 * exp(r) = 1 + r + r^2 p(r) with p of degree 4, fitted for the least relative error
 * (0.05 ulp). n comes from the low bits of x log2(e) + 1.5 * 2^23. */
#define ACRE_EXP_LOW -87.3f
#define ACRE_EXP_HIGH 88.0f
#define ACRE_EXP_LOG2E 0x1.715476p+0f
#define ACRE_EXP_MAGIC 0x1.8p+23f
#define ACRE_EXP_LN2_HIGH 0x1.62e4p-1f
#define ACRE_EXP_LN2_LOW 0x1.7f7d1cp-20f
#define ACRE_EXP_C0 0x1.fffffcp-2f
#define ACRE_EXP_C1 0x1.555492p-3f
#define ACRE_EXP_C2 0x1.5558f2p-5f
#define ACRE_EXP_C3 0x1.1239e2p-7f
#define ACRE_EXP_C4 0x1.6a2434p-10f

float acre_exp(float x); /* the scalar reference */

#endif
