/* Leaf kernels: what one core does to a few rows. They neither allocate nor fail.
 *
 * The table is filled with the scalar reference first and overridden by a ladder, so no
 * slot is ever empty. Every version of a kernel gives the reference's bits, because the
 * order of operations below is part of the contract:
 *   chain   one fused multiply-add after another, in index order
 *   pairs   the same over indices taken two by two, the odd one of a pair first: the
 *           order in which processors that multiply pairs of bf16 add them
 *   tree    16 lanes; lane i takes the elements c with c mod 16 == i (chains, from 0);
 *           then lanes i and i+8 are added, i and i+4, i and i+2, i and i+1
 * Formulas name each fused operation, so a compiler that contracts a*b+c cannot change
 * them; the builds pass -ffp-contract=off all the same. Not promised: which NaN comes
 * out where one comes in, and bf16 numbers and sums of their products below 2^-126,
 * which may be zero. */
#ifndef ACRE_CPU_KERNELS_H
#define ACRE_CPU_KERNELS_H

#include "../acre.h"
#include "../base.h"
#include "../bf16.h"
#include "features.h"

#include <string.h>

#define ACRE_PANEL 16      /* output columns of a panel; lanes of a tree */
#define ACRE_KEY_TILE 64   /* keys that attention takes at once */
#define ACRE_ROWS_LIMIT 16 /* no table's tile_rows exceeds it */
#define ACRE_HEAD_DIM_MAX 512

/* What a table does with numbers of one type T.
 *
 * Operands are the two sides of a product, c = a b, with the numbers as this table
 * multiplies them: as they are, or widened to float32 (`operand` bytes each).
 *   a  rows of k numbers, one zero more where T is bf16 and k odd
 *   b  panels of 16 columns: [k][16]; bf16 as it is: [ceil(k / 2)][16][2]
 * Weights are kept packed, whatever the table, in panels of ceil(K / pack_k) blocks of
 * pack_bytes: blocks of f32 are [16]; of bf16 [16][2], so that the pair (c, c + 1) lies
 * side by side; of q8 sixteen bf16 scales, then int8 [16][16][2], again in pairs, for the
 * numbers bf16(scale * q). What is missing at the end of a block, and columns beyond N,
 * are zero. Strides of T and of operands are in elements, of packed panels in bytes. */
typedef struct acre_typed acre_typed;
struct acre_typed {
  int64_t operand;
  int64_t pack_k, pack_bytes;
  int64_t tile_rows;   /* most rows of one tile call; the same for every type */
  int64_t tile_panels; /* panels per tile call that fill the registers at tile_rows */

  /* y = T(x), ties to even; y = float32(x). */
  void (*store)(void *y, const float *x, int64_t n);
  void (*widen)(float *y, const void *x, int64_t n);
  /* a = operand(x), of numbers of T; a = operand(T(x)), of float32. */
  void (*load)(void *a, const void *x, int64_t n);
  void (*round)(void *a, const float *x, int64_t n);
  /* y = T((x * (1 / sqrt(mean(x^2) + eps))) * gain); the squares in a tree, the root in
   * float64. */
  void (*rmsnorm)(void *y, const float *x, const float *gain, double eps, int64_t n);

  /* b[x][j] = keys[j][x], j < rows <= 64, x < d: ceil(rows / 16) panels, zero for j
   * beyond; d even. b[j][x] = values[j][x]: ceil(d / 16) panels, 64 * 16 elements apart,
   * zero for x beyond. stride: between rows of keys or values. */
  void (*keys)(void *b, const void *keys, int64_t stride, int64_t rows, int64_t d);
  void (*values)(void *b, const void *values, int64_t stride, int64_t rows, int64_t d);
  /* The first k rows of `panels` packed panels as operands: in b, panel after panel, or
   * where they lie. *panel_stride: between them, in elements. */
  const void *(*unpack)(void *b, int64_t *panel_stride, const void *packed,
                        int64_t packed_stride, int64_t panels, int64_t k);

  /* c[i, j] = (add ? c[i, j] : 0) + sum over x < k of a[i, x] * b[x, j], a chain over x
   * (bf16: pairs); i < rows <= tile_rows, j < 16 * panels. */
  void (*tile)(float *c, int64_t c_stride, const void *a, int64_t a_stride, const void *b,
               int64_t panel_stride, int64_t rows, int64_t panels, int64_t k, bool add);
  /* The same with b in packed panels, for few rows; `self` is this set of kernels. */
  void (*thin)(const acre_typed *self, float *c, int64_t c_stride, const void *a,
               int64_t a_stride, const void *packed, int64_t packed_stride, int64_t rows,
               int64_t panels, int64_t k, bool add);

  /* One step of the online softmax of `rows` <= tile_rows rows, each over n <= 64
   * logits, in powers of two: x_j = fma(s_j, scale, bias_j * log2(e)) (bias nullable:
   * 0). origin becomes the least whole number >= origin and all x; p_j = T(exp2(x_j -
   * origin)), and 0 for j in [n, 64); sum = fma(sum, factor, sum of p), where factor =
   * 2^(old origin - origin), a power of two, is what the row's earlier results must be
   * scaled by: so no result depends on how the keys were cut into tiles, but for the
   * order of sums. An origin of -infinity counts as 0: nothing seen stays nothing.
   * Sum of p: a tree; bf16: lane i of 16 takes pairs i mod 16, each odd one first.
   * s [rows][64] in float32 becomes p as operands, a row's in the place of its logits. */
  void (*softmax)(float *s, const float *bias, int64_t rows, int64_t n, float scale,
                  float *origin, float *sum, float *factor);
};

/* A step of AdamW: rest = 1 - beta, rate = lr / (1 - beta1^step), unbias = 1 / (1 -
 * beta2^step), decay = lr * weight_decay; scale is the gradient's. */
typedef struct acre_adamw_factors {
  float scale, beta1, rest1, beta2, rest2, rate, unbias, eps, decay;
} acre_adamw_factors;

#define ACRE_SUM_BLOCK 64 /* numbers that sum_exp adds up in float32 */

typedef struct acre_kernels {
  const char *isa;
  acre_typed of[2]; /* by acre_dtype: ACRE_F32, ACRE_BF16 */
  acre_typed q8;    /* of[ACRE_BF16], with weights kept as q8 */

  /* y = c + addend. */
  void (*add)(float *y, const float *c, const float *addend, int64_t n);
  /* y *= factor. */
  void (*scale)(float *y, float factor, int64_t n);
  /* y = fma(x, factor, y). */
  void (*add_scaled)(float *y, const float *x, float factor, int64_t n);
  /* total[j] = fma(exp2(s[j] * scale - origin), weight, total[j]); origin whole. */
  void (*add_exp2)(float *total, const float *s, int64_t n, float scale, float origin,
                   float weight);

  /* The sum of x[i] * y[i], in a tree. */
  float (*dot)(const float *x, const float *y, int64_t n);
  /* Through the softmax of `rows` rows of n <= 64 logits, in powers of two, whose sum is
   * known: p_j = exp2(min(x_j - lse, 1)) with x_j as in softmax, and ds_j = (p_j * factor) *
   * (dp_j - delta); both 0 for j in [n, 64). x_j exceeds lse by rounding alone. s [rows][64]
   * becomes p, dp [rows][64] ds; lse and delta [rows]. */
  void (*softmax_back)(float *s, float *dp, const float *bias, int64_t rows, int64_t n,
                       float scale, float factor, const float *lse, const float *delta);

  /* y = gate / (1 + exp(-gate)) * up. y may be gate. */
  void (*swiglu)(float *y, const float *gate, const float *up, int64_t n);
  /* y[i] = fma(-b, sin, a cos), y[i + half] = fma(b, cos, a sin) with a = x[i],
   * b = x[i + half]. y may be x. */
  void (*rope)(float *y, const float *x, const float *cos, const float *sin, int64_t half);

  /* The highest of n > 0 numbers; a NaN is passed over. */
  float (*highest)(const float *x, int64_t n);
  /* The sum of exp(x[i] - origin): 64 at a time in a tree, those sums in order in
   * float64. x <= origin. */
  double (*sum_exp)(const float *x, int64_t n, float origin);
  /* y = exp(x - origin) * factor. */
  void (*exp_scaled)(float *y, const float *x, int64_t n, float origin, float factor);

  /* dx = dx + fma(x, inner, (dy * gain) * factor): factor that of rmsnorm, and inner =
   * -factor^3 * sum / n in float64, left to right, where sum is of fma(dy * gain, x) in a
   * tree. */
  void (*rmsnorm_back)(float *dx, const float *dy, const float *x, const float *gain,
                       double eps, int64_t n);
  /* With e = exp(-gate) and s = 1 / (1 + e): dup = dy * (gate * s), and
   * dgate = (dy * up) * (s * fma(gate, e * s, 1)). */
  void (*swiglu_back)(float *dgate, float *dup, const float *gate, const float *up,
                      const float *dy, int64_t n);
  /* g = gradient * scale; first = fma(first, beta1, g * rest1);
   * second = fma(second, beta2, (g * rest2) * g);
   * w = w - fma(w, decay, (first * rate) / (sqrt(second * unbias) + eps)). */
  void (*adamw)(float *w, float *first, float *second, const float *gradient, int64_t n,
                const acre_adamw_factors *by);
} acre_kernels;

/* The table for these features: fills with the reference, then climbs the ladder. Of q8 a
 * rung fills `unpack` and `thin`; the rest follows from bf16. */
acre_kernels acre_cpu_kernels(uint32_t features);

void acre_kernels_scalar(acre_kernels *table);
void acre_kernels_avx2(acre_kernels *table, uint32_t features);
void acre_kernels_avx512(acre_kernels *table, uint32_t features);

/* ---------------------------------------------------------------- shared arithmetic */

/* A block of q8. */
#define ACRE_Q8_K 32
#define ACRE_Q8_BYTES (ACRE_PANEL * (2 + ACRE_Q8_K))

/* `thin` by unpacking a few panels at a time: for weights that no table multiplies as
 * they lie. */
void acre_thin_unpacked(const acre_typed *self, float *c, int64_t c_stride, const void *a,
                        int64_t a_stride, const void *packed, int64_t packed_stride,
                        int64_t rows, int64_t panels, int64_t k, bool add);

/* exp(x), error < 1.1 ulp on [ACRE_EXP_LOW, ACRE_EXP_HIGH]; below it 0 (never a
 * denormal), above it exp(ACRE_EXP_HIGH). x = n ln 2 + r with |r| <= ln 2 / 2, and
 * exp(r) = 1 + r + r^2 p(r) with p of degree 4, fitted for the least relative error
 * (0.05 ulp). n comes from the low bits of x log2(e) + 1.5 * 2^23. */
#define ACRE_LOG2E 0x1.715476p+0f
#define ACRE_EXP_LOW -87.3f
#define ACRE_EXP_HIGH 88.0f
#define ACRE_EXP_MAGIC 0x1.8p+23f
#define ACRE_EXP_LN2_HIGH 0x1.62e4p-1f
#define ACRE_EXP_LN2_LOW 0x1.7f7d1cp-20f
#define ACRE_EXP_C0 0x1.fffffcp-2f
#define ACRE_EXP_C1 0x1.555492p-3f
#define ACRE_EXP_C2 0x1.5558f2p-5f
#define ACRE_EXP_C3 0x1.1239e2p-7f
#define ACRE_EXP_C4 0x1.6a2434p-10f

/* exp2(x - origin) for x <= origin, origin whole: error < 0.8 ulp; 0 below 2^-125 (never
 * a denormal). x = n + r with |r| <= 1/2, n rounded to even, and 2^r = 1 + r p(r) with p
 * of degree 5, fitted for the least relative error (0.06 ulp); the exponent is n -
 * origin, so the bits of the fraction do not depend on the origin. */
#define ACRE_EXP2_LOW -125.0f
#define ACRE_EXP2_C0 0x1.62e43p-1f
#define ACRE_EXP2_C1 0x1.ebfbd6p-3f
#define ACRE_EXP2_C2 0x1.c6af76p-5f
#define ACRE_EXP2_C3 0x1.3b320ap-7f
#define ACRE_EXP2_C4 0x1.5f0b86p-10f
#define ACRE_EXP2_C5 0x1.3eb2ap-13f

/* What rmsnorm_back calls inner. */
static inline float acre_norm_inner(float factor, float sum, int64_t n) {
  double r = (double)factor;
  return (float)(-r * r * r * (double)sum / (double)n);
}

float acre_exp(float x); /* the scalar references */
float acre_exp2(float x, float origin);

#endif
