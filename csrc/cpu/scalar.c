/* The reference: every kernel as its contract in kernels.h reads, one element at a
 * time.
 *
 * Nothing is blocked or reordered here. What a faster table computes is defined as
 * equal to this. */
#include "kernels.h"

#include <math.h>

/* ---------------------------------------------------------------- sums */

/* Adds lanes i and i + 8, i + 4, i + 2, i + 1. */
static float tree(float lanes[ACRE_PANEL]) {
  for (int width = ACRE_PANEL / 2; width > 0; width /= 2)
    for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
  return lanes[0];
}

static void tile(float *c, int64_t c_stride, const float *a, int64_t a_stride,
                 const float *b, int64_t b_stride, int64_t panel_stride, int64_t rows,
                 int64_t panels, int64_t k, bool add) {
  for (int64_t i = 0; i < rows; i++) {
    for (int64_t j = 0; j < ACRE_PANEL * panels; j++) {
      const float *b_j = b + (j / ACRE_PANEL) * panel_stride + j % ACRE_PANEL;
      float sum = add ? c[i * c_stride + j] : 0.0f;
      for (int64_t x = 0; x < k; x++)
        sum = fmaf(a[i * a_stride + x], b_j[x * b_stride], sum);
      c[i * c_stride + j] = sum;
    }
  }
}

static void tile_bf16(float *c, int64_t c_stride, const float *a, int64_t a_stride,
                      const uint16_t *b, int64_t panel_stride, int64_t rows, int64_t panels,
                      int64_t k, bool add) {
  for (int64_t i = 0; i < rows; i++) {
    for (int64_t j = 0; j < ACRE_PANEL * panels; j++) {
      const uint16_t *b_j = b + (j / ACRE_PANEL) * panel_stride + j % ACRE_PANEL * 2;
      float sum = add ? c[i * c_stride + j] : 0.0f;
      for (int64_t x = 0; x < k; x++) {
        float b_xj = acre_from_bf16(b_j[x / 2 * (2 * ACRE_PANEL) + x % 2]);
        sum = fmaf(a[i * a_stride + x], b_xj, sum);
      }
      c[i * c_stride + j] = sum;
    }
  }
}

static void dots(float *s, const float *q, const float *keys, int64_t stride, int64_t rows,
                 int64_t k) {
  for (int64_t j = 0; j < rows; j++) {
    float lanes[ACRE_PANEL] = {0};
    for (int64_t x = 0; x < k; x++)
      lanes[x % ACRE_PANEL] = fmaf(q[x], keys[j * stride + x], lanes[x % ACRE_PANEL]);
    s[j] = tree(lanes);
  }
}

/* ---------------------------------------------------------------- layout and types */

static void expand(float *b, const uint16_t *panel, int64_t k) {
  for (int64_t x = 0; x < k; x++)
    for (int64_t j = 0; j < ACRE_PANEL; j++)
      b[x * ACRE_PANEL + j] =
          acre_from_bf16(panel[x / 2 * (2 * ACRE_PANEL) + j * 2 + x % 2]);
}

static void transpose(float *b, const float *keys, int64_t stride, int64_t rows,
                      int64_t k) {
  for (int64_t x = 0; x < k; x++)
    for (int64_t j = 0; j < ACRE_PANEL; j++)
      b[x * ACRE_PANEL + j] = j < rows ? keys[j * stride + x] : 0.0f;
}

static void round_to_bf16(float *y, const float *x, int64_t n) {
  for (int64_t i = 0; i < n; i++) y[i] = acre_from_bf16(acre_to_bf16(x[i]));
}

static void widen(float *y, const uint16_t *x, int64_t n) {
  for (int64_t i = 0; i < n; i++) y[i] = acre_from_bf16(x[i]);
}

static void narrow(uint16_t *y, const float *x, int64_t n) {
  for (int64_t i = 0; i < n; i++) y[i] = acre_to_bf16(x[i]);
}

static void add(float *y, const float *c, const float *addend, int64_t n) {
  for (int64_t i = 0; i < n; i++) y[i] = c[i] + addend[i];
}

static void scale_by(float *y, float factor, int64_t n) {
  for (int64_t i = 0; i < n; i++) y[i] *= factor;
}

/* ---------------------------------------------------------------- softmax */

float acre_exp(float x) {
  if (x < ACRE_EXP_LOW) return 0.0f;
  if (x > ACRE_EXP_HIGH) x = ACRE_EXP_HIGH;
  float shifted = fmaf(x, ACRE_EXP_LOG2E, ACRE_EXP_MAGIC);
  uint32_t n = acre_bits(shifted) - acre_bits(ACRE_EXP_MAGIC);
  float whole = shifted - ACRE_EXP_MAGIC;
  float r = fmaf(whole, -ACRE_EXP_LN2_HIGH, x);
  r = fmaf(whole, -ACRE_EXP_LN2_LOW, r);
  float p = fmaf(ACRE_EXP_C4, r, ACRE_EXP_C3);
  p = fmaf(p, r, ACRE_EXP_C2);
  p = fmaf(p, r, ACRE_EXP_C1);
  p = fmaf(p, r, ACRE_EXP_C0);
  p = fmaf(p, r * r, r) + 1.0f;
  return p * acre_from_bits((n + 127u) << 23);
}

/* One row; returns the factor. */
static float softmax_row(float *s, const float *bias, int64_t n, float scale, float *max,
                         float *sum) {
  float highest = *max;
  for (int64_t j = 0; j < n; j++) {
    s[j] = fmaf(s[j], scale, bias ? bias[j] : 0.0f);
    if (s[j] > highest) highest = s[j];
  }
  float origin = highest == -INFINITY ? 0.0f : highest;
  float lanes[ACRE_PANEL] = {0};
  for (int64_t j = 0; j < ACRE_KEY_TILE; j++) {
    s[j] = j < n ? acre_exp(s[j] - origin) : 0.0f;
    lanes[j % ACRE_PANEL] += s[j];
  }
  float factor = acre_exp(*max - origin);
  *sum = fmaf(*sum, factor, tree(lanes));
  *max = highest;
  return factor;
}

static void softmax(float *s, const float *bias, int64_t rows, int64_t n, float scale,
                    float *max, float *sum, float *factor) {
  for (int64_t r = 0; r < rows; r++)
    factor[r] = softmax_row(s + r * ACRE_KEY_TILE, bias, n, scale, &max[r], &sum[r]);
}

static void add_exp(float *total, const float *s, int64_t n, float scale, float max,
                    float weight) {
  for (int64_t j = 0; j < n; j++)
    total[j] = fmaf(acre_exp(fmaf(s[j], scale, -max)), weight, total[j]);
}

/* -------------------------------------------------------------- rows of activations */

static void rmsnorm(float *y, const float *x, const float *gain, double eps, int64_t n) {
  float lanes[ACRE_PANEL] = {0};
  for (int64_t i = 0; i < n; i++)
    lanes[i % ACRE_PANEL] = fmaf(x[i], x[i], lanes[i % ACRE_PANEL]);
  float factor = (float)(1.0 / sqrt((double)tree(lanes) / (double)n + eps));
  for (int64_t i = 0; i < n; i++) y[i] = x[i] * factor * gain[i];
}

static void swiglu(float *y, const float *gate, const float *up, int64_t n) {
  for (int64_t i = 0; i < n; i++) y[i] = gate[i] / (1.0f + acre_exp(-gate[i])) * up[i];
}

static void rope(float *y, const float *x, const float *cos, const float *sin,
                 int64_t half) {
  for (int64_t i = 0; i < half; i++) {
    float a = x[i], b = x[i + half];
    y[i] = fmaf(-b, sin[i], a * cos[i]);
    y[i + half] = fmaf(b, cos[i], a * sin[i]);
  }
}

/* ---------------------------------------------------------------- table */

void acre_kernels_scalar(acre_kernels *table) {
  *table = (acre_kernels){
      .isa = "scalar",
      .tile_rows = 4,
      .tile_panels = 1,
      .tile = tile,
      .tile_bf16 = tile_bf16,
      .expand = expand,
      .transpose = transpose,
      .round = round_to_bf16,
      .widen = widen,
      .narrow = narrow,
      .add = add,
      .scale = scale_by,
      .dots = dots,
      .softmax = softmax,
      .add_exp = add_exp,
      .rmsnorm = rmsnorm,
      .swiglu = swiglu,
      .rope = rope,
  };
}

acre_kernels acre_cpu_kernels(uint32_t features) {
  acre_kernels table;
  acre_kernels_scalar(&table);
  acre_kernels_avx2(&table, features);
  acre_kernels_avx512(&table, features);
  return table;
}
