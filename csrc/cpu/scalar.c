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

static void tile_f32(float *c, int64_t c_stride, const void *a, int64_t a_stride,
                     const void *b, int64_t panel_stride, int64_t rows, int64_t panels,
                     int64_t k, bool add) {
  for (int64_t i = 0; i < rows; i++) {
    const float *a_i = (const float *)a + i * a_stride;
    for (int64_t j = 0; j < ACRE_PANEL * panels; j++) {
      const float *b_j = (const float *)b + j / ACRE_PANEL * panel_stride + j % ACRE_PANEL;
      float sum = add ? c[i * c_stride + j] : 0.0f;
      for (int64_t x = 0; x < k; x++) sum = fmaf(a_i[x], b_j[x * ACRE_PANEL], sum);
      c[i * c_stride + j] = sum;
    }
  }
}

static void thin_f32(const acre_typed *self, float *c, int64_t c_stride, const void *a,
                     int64_t a_stride, const void *packed, int64_t packed_stride,
                     int64_t rows, int64_t panels, int64_t k, bool add) {
  (void)self;
  tile_f32(c, c_stride, a, a_stride, packed, packed_stride / (int64_t)sizeof(float), rows,
           panels, k, add);
}

/* Operands of bf16 are widened here: a pair is a[x], a[x + 1] and rows x, x + 1 of b. */
static void tile_bf16(float *c, int64_t c_stride, const void *a, int64_t a_stride,
                      const void *b, int64_t panel_stride, int64_t rows, int64_t panels,
                      int64_t k, bool add) {
  for (int64_t i = 0; i < rows; i++) {
    const float *a_i = (const float *)a + i * a_stride;
    for (int64_t j = 0; j < ACRE_PANEL * panels; j++) {
      const float *b_j = (const float *)b + j / ACRE_PANEL * panel_stride + j % ACRE_PANEL;
      float sum = add ? c[i * c_stride + j] : 0.0f;
      for (int64_t x = 0; x < k; x += 2) {
        if (x + 1 < k) sum = fmaf(a_i[x + 1], b_j[(x + 1) * ACRE_PANEL], sum);
        sum = fmaf(a_i[x], b_j[x * ACRE_PANEL], sum);
      }
      c[i * c_stride + j] = sum;
    }
  }
}

static void thin_bf16(const acre_typed *self, float *c, int64_t c_stride, const void *a,
                      int64_t a_stride, const void *packed, int64_t packed_stride,
                      int64_t rows, int64_t panels, int64_t k, bool add) {
  (void)self;
  for (int64_t i = 0; i < rows; i++) {
    const float *a_i = (const float *)a + i * a_stride;
    for (int64_t j = 0; j < ACRE_PANEL * panels; j++) {
      const char *panel = (const char *)packed + j / ACRE_PANEL * packed_stride;
      const uint16_t *b_j = (const uint16_t *)(const void *)panel + j % ACRE_PANEL * 2;
      float sum = add ? c[i * c_stride + j] : 0.0f;
      for (int64_t x = 0; x < k; x += 2, b_j += 2 * ACRE_PANEL) {
        if (x + 1 < k) sum = fmaf(a_i[x + 1], acre_from_bf16(b_j[1]), sum);
        sum = fmaf(a_i[x], acre_from_bf16(b_j[0]), sum);
      }
      c[i * c_stride + j] = sum;
    }
  }
}

/* ---------------------------------------------------------------- layout and types */

static void copy_f32(void *y, const void *x, int64_t n) {
  memcpy(y, x, (size_t)n * sizeof(float));
}
static void store_f32(void *y, const float *x, int64_t n) { copy_f32(y, x, n); }
static void widen_f32(float *y, const void *x, int64_t n) { copy_f32(y, x, n); }

static void store_bf16(void *y, const float *x, int64_t n) {
  for (int64_t i = 0; i < n; i++) ((uint16_t *)y)[i] = acre_to_bf16(x[i]);
}

static void widen_bf16(float *y, const void *x, int64_t n) {
  for (int64_t i = 0; i < n; i++) y[i] = acre_from_bf16(((const uint16_t *)x)[i]);
}

static void load_bf16(void *a, const void *x, int64_t n) {
  widen_bf16(a, x, n);
  if (n % 2) ((float *)a)[n] = 0.0f;
}

static void round_bf16(void *a, const float *x, int64_t n) {
  float *to = a;
  for (int64_t i = 0; i < n; i++) to[i] = acre_from_bf16(acre_to_bf16(x[i]));
  if (n % 2) to[n] = 0.0f;
}

static float element(const void *x, int64_t i, bool bf16) {
  return bf16 ? acre_from_bf16(((const uint16_t *)x)[i]) : ((const float *)x)[i];
}

static void transpose(float *b, const void *keys, int64_t stride, int64_t rows, int64_t d,
                      bool bf16) {
  for (int64_t j = 0; j < acre_round_up(rows, ACRE_PANEL); j++)
    for (int64_t x = 0; x < d; x++)
      b[(j / ACRE_PANEL * d + x) * ACRE_PANEL + j % ACRE_PANEL] =
          j < rows ? element(keys, j * stride + x, bf16) : 0.0f;
}

static void cut(float *b, const void *values, int64_t stride, int64_t rows, int64_t d,
                bool bf16) {
  for (int64_t j = 0; j < rows; j++)
    for (int64_t x = 0; x < acre_round_up(d, ACRE_PANEL); x++)
      b[(x / ACRE_PANEL * ACRE_KEY_TILE + j) * ACRE_PANEL + x % ACRE_PANEL] =
          x < d ? element(values, j * stride + x, bf16) : 0.0f;
}

static void keys_f32(void *b, const void *keys, int64_t stride, int64_t rows, int64_t d) {
  transpose(b, keys, stride, rows, d, false);
}
static void keys_bf16(void *b, const void *keys, int64_t stride, int64_t rows, int64_t d) {
  transpose(b, keys, stride, rows, d, true);
}
static void values_f32(void *b, const void *values, int64_t stride, int64_t rows,
                       int64_t d) {
  cut(b, values, stride, rows, d, false);
}
static void values_bf16(void *b, const void *values, int64_t stride, int64_t rows,
                        int64_t d) {
  cut(b, values, stride, rows, d, true);
}

static const void *unpack_f32(void *b, int64_t *panel_stride, const void *packed,
                              int64_t packed_stride, int64_t panels, int64_t k) {
  (void)b, (void)panels, (void)k;
  *panel_stride = packed_stride / (int64_t)sizeof(float);
  return packed;
}

static const void *unpack_bf16(void *b, int64_t *panel_stride, const void *packed,
                               int64_t packed_stride, int64_t panels, int64_t k) {
  *panel_stride = k * ACRE_PANEL;
  for (int64_t p = 0; p < panels; p++) {
    const void *panel = (const char *)packed + p * packed_stride;
    float *to = (float *)b + p * *panel_stride;
    for (int64_t x = 0; x < k; x++)
      for (int64_t j = 0; j < ACRE_PANEL; j++)
        to[x * ACRE_PANEL + j] =
            element(panel, x / 2 * (2 * ACRE_PANEL) + 2 * j + x % 2, true);
  }
  return b;
}

static const void *unpack_q8(void *b, int64_t *panel_stride, const void *packed,
                             int64_t packed_stride, int64_t panels, int64_t k) {
  *panel_stride = k * ACRE_PANEL;
  for (int64_t p = 0; p < panels; p++) {
    const char *panel = (const char *)packed + p * packed_stride;
    float *to = (float *)b + p * *panel_stride;
    for (int64_t x = 0; x < k; x++) {
      const char *block = panel + x / ACRE_Q8_K * ACRE_Q8_BYTES;
      const int8_t *q = (const int8_t *)block + 2 * ACRE_PANEL;
      for (int64_t j = 0; j < ACRE_PANEL; j++) {
        int64_t at = x % ACRE_Q8_K / 2 * (2 * ACRE_PANEL) + 2 * j + x % 2;
        float number = element(block, j, true) * (float)q[at];
        to[x * ACRE_PANEL + j] = acre_from_bf16(acre_to_bf16(number));
      }
    }
  }
  return b;
}

#define THIN_PANELS 8 /* as many as a single row keeps in flight */
#define THIN_K 64

void acre_thin_unpacked(const acre_typed *self, float *c, int64_t c_stride, const void *a,
                        int64_t a_stride, const void *packed, int64_t packed_stride,
                        int64_t rows, int64_t panels, int64_t k, bool add) {
  float b[THIN_PANELS * THIN_K * ACRE_PANEL];
  for (int64_t p = 0; p < panels; p += THIN_PANELS) {
    int64_t count = acre_min(THIN_PANELS, panels - p), stride;
    for (int64_t x = 0; x < k; x += THIN_K) {
      const char *from = (const char *)packed + p * packed_stride;
      const void *unpacked =
          self->unpack(b, &stride, from + x / self->pack_k * self->pack_bytes,
                       packed_stride, count, acre_min(THIN_K, k - x));
      self->tile(c + p * ACRE_PANEL, c_stride, (const char *)a + x * self->operand,
                 a_stride, unpacked, stride, rows, count, acre_min(THIN_K, k - x),
                 add || x > 0);
    }
  }
}

static void add(float *y, const float *c, const float *addend, int64_t n) {
  for (int64_t i = 0; i < n; i++) y[i] = c[i] + addend[i];
}

static void scale_by(float *y, float factor, int64_t n) {
  for (int64_t i = 0; i < n; i++) y[i] *= factor;
}

static void add_scaled(float *y, const float *x, float factor, int64_t n) {
  for (int64_t i = 0; i < n; i++) y[i] = fmaf(x[i], factor, y[i]);
}

/* ---------------------------------------------------------------- softmax */

float acre_exp(float x) {
  if (x < ACRE_EXP_LOW) return 0.0f;
  if (x > ACRE_EXP_HIGH) x = ACRE_EXP_HIGH;
  float shifted = fmaf(x, ACRE_LOG2E, ACRE_EXP_MAGIC);
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

float acre_exp2(float x, float origin) {
  float whole = rintf(x), r = x - whole, exponent = whole - origin;
  if (exponent < ACRE_EXP2_LOW) return 0.0f;
  float p = fmaf(ACRE_EXP2_C5, r, ACRE_EXP2_C4);
  p = fmaf(p, r, ACRE_EXP2_C3);
  p = fmaf(p, r, ACRE_EXP2_C2);
  p = fmaf(p, r, ACRE_EXP2_C1);
  p = fmaf(p, r, ACRE_EXP2_C0);
  p = fmaf(p, r, 1.0f);
  if (isnan(p)) return p;
  return p * acre_from_bits((uint32_t)((int32_t)exponent + 127) << 23);
}

/* 2^(before - origin), which is whole; no origin before: 0. */
static float rescaling(float before, float origin) {
  return before == origin ? 1.0f : acre_exp2(before, origin);
}

/* One row; returns the factor. */
static float softmax_row(float *s, const float *bias, int64_t n, float scale, bool bf16,
                         float *origin, float *sum) {
  float before = *origin;
  for (int64_t j = 0; j < n; j++) {
    s[j] = fmaf(s[j], scale, bias ? bias[j] * ACRE_LOG2E : 0.0f);
    if (s[j] > *origin) *origin = ceilf(s[j]);
  }
  float from = *origin == -INFINITY ? 0.0f : *origin;
  float lanes[ACRE_PANEL] = {0};
  for (int64_t j = 0; j < ACRE_KEY_TILE; j++) {
    s[j] = j < n ? acre_exp2(s[j], from) : 0.0f;
    if (bf16) s[j] = acre_from_bf16(acre_to_bf16(s[j]));
  }
  for (int64_t j = 0; j < ACRE_KEY_TILE; j++) {
    if (bf16)
      lanes[j / 2 % ACRE_PANEL] += s[j ^ 1];
    else
      lanes[j % ACRE_PANEL] += s[j];
  }
  float factor = rescaling(before, from);
  *sum = fmaf(*sum, factor, tree(lanes));
  return factor;
}

static void softmax_f32(float *s, const float *bias, int64_t rows, int64_t n, float scale,
                        float *origin, float *sum, float *factor) {
  for (int64_t r = 0; r < rows; r++)
    factor[r] =
        softmax_row(s + r * ACRE_KEY_TILE, bias, n, scale, false, &origin[r], &sum[r]);
}

static void softmax_bf16(float *s, const float *bias, int64_t rows, int64_t n, float scale,
                         float *origin, float *sum, float *factor) {
  for (int64_t r = 0; r < rows; r++)
    factor[r] =
        softmax_row(s + r * ACRE_KEY_TILE, bias, n, scale, true, &origin[r], &sum[r]);
}

static void add_exp2(float *total, const float *s, int64_t n, float scale, float origin,
                     float weight) {
  for (int64_t j = 0; j < n; j++)
    total[j] = fmaf(acre_exp2(s[j] * scale, origin), weight, total[j]);
}

static float dot(const float *x, const float *y, int64_t n) {
  float lanes[ACRE_PANEL] = {0};
  for (int64_t i = 0; i < n; i++)
    lanes[i % ACRE_PANEL] = fmaf(x[i], y[i], lanes[i % ACRE_PANEL]);
  return tree(lanes);
}

static void softmax_back(float *s, float *dp, const float *bias, int64_t rows, int64_t n,
                         float scale, float factor, const float *lse, const float *delta) {
  for (int64_t r = 0; r < rows; r++, s += ACRE_KEY_TILE, dp += ACRE_KEY_TILE) {
    for (int64_t j = 0; j < n; j++) {
      float x = fmaf(s[j], scale, bias ? bias[j] * ACRE_LOG2E : 0.0f) - lse[r];
      s[j] = acre_exp2(x > 1.0f ? 1.0f : x, 0.0f);
      dp[j] = s[j] * factor * (dp[j] - delta[r]);
    }
    for (int64_t j = n; j < ACRE_KEY_TILE; j++) s[j] = dp[j] = 0.0f;
  }
}

/* -------------------------------------------------------------- rows of activations */

static float norm_factor(const float *x, double eps, int64_t n) {
  return (float)(1.0 / sqrt((double)dot(x, x, n) / (double)n + eps));
}

static void rmsnorm_f32(void *y, const float *x, const float *gain, double eps, int64_t n) {
  float factor = norm_factor(x, eps, n);
  for (int64_t i = 0; i < n; i++) ((float *)y)[i] = x[i] * factor * gain[i];
}

static void rmsnorm_bf16(void *y, const float *x, const float *gain, double eps,
                         int64_t n) {
  float factor = norm_factor(x, eps, n);
  for (int64_t i = 0; i < n; i++)
    ((uint16_t *)y)[i] = acre_to_bf16(x[i] * factor * gain[i]);
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

/* ---------------------------------------------------------------- learning */

static float highest(const float *x, int64_t n) {
  float most = -INFINITY;
  for (int64_t i = 0; i < n; i++) most = x[i] > most ? x[i] : most;
  return most;
}

static double sum_exp(const float *x, int64_t n, float origin) {
  double sum = 0.0;
  for (int64_t first = 0; first < n; first += ACRE_SUM_BLOCK) {
    float lanes[ACRE_PANEL] = {0};
    for (int64_t i = first; i < acre_min(n, first + ACRE_SUM_BLOCK); i++)
      lanes[i % ACRE_PANEL] += acre_exp(x[i] - origin);
    sum += (double)tree(lanes);
  }
  return sum;
}

static void exp_scaled(float *y, const float *x, int64_t n, float origin, float factor) {
  for (int64_t i = 0; i < n; i++) y[i] = acre_exp(x[i] - origin) * factor;
}

static void rmsnorm_back(float *dx, const float *dy, const float *x, const float *gain,
                         double eps, int64_t n) {
  float factor = norm_factor(x, eps, n), lanes[ACRE_PANEL] = {0};
  for (int64_t i = 0; i < n; i++)
    lanes[i % ACRE_PANEL] = fmaf(dy[i] * gain[i], x[i], lanes[i % ACRE_PANEL]);
  float inner = acre_norm_inner(factor, tree(lanes), n);
  for (int64_t i = 0; i < n; i++) dx[i] += fmaf(x[i], inner, dy[i] * gain[i] * factor);
}

static void swiglu_back(float *dgate, float *dup, const float *gate, const float *up,
                        const float *dy, int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    float e = acre_exp(-gate[i]), s = 1.0f / (1.0f + e);
    dup[i] = dy[i] * (gate[i] * s);
    dgate[i] = dy[i] * up[i] * (s * fmaf(gate[i], e * s, 1.0f));
  }
}

static void adamw(float *w, float *first, float *second, const float *gradient, int64_t n,
                  const acre_adamw_factors *by) {
  for (int64_t i = 0; i < n; i++) {
    float g = gradient[i] * by->scale;
    first[i] = fmaf(first[i], by->beta1, g * by->rest1);
    second[i] = fmaf(second[i], by->beta2, g * by->rest2 * g);
    float step = first[i] * by->rate / (sqrtf(second[i] * by->unbias) + by->eps);
    w[i] -= fmaf(w[i], by->decay, step);
  }
}

/* ---------------------------------------------------------------- table */

void acre_kernels_scalar(acre_kernels *table) {
  *table = (acre_kernels){
      .isa = "scalar",
      .of[ACRE_F32] = {.operand = sizeof(float),
                       .pack_k = 1,
                       .pack_bytes = ACRE_PANEL * sizeof(float),
                       .tile_rows = 4,
                       .tile_panels = 1,
                       .store = store_f32,
                       .widen = widen_f32,
                       .load = copy_f32,
                       .round = store_f32,
                       .rmsnorm = rmsnorm_f32,
                       .keys = keys_f32,
                       .values = values_f32,
                       .unpack = unpack_f32,
                       .tile = tile_f32,
                       .thin = thin_f32,
                       .softmax = softmax_f32},
      .of[ACRE_BF16] = {.operand = sizeof(float),
                        .pack_k = 2,
                        .pack_bytes = 2 * ACRE_PANEL * sizeof(uint16_t),
                        .tile_rows = 4,
                        .tile_panels = 1,
                        .store = store_bf16,
                        .widen = widen_bf16,
                        .load = load_bf16,
                        .round = round_bf16,
                        .rmsnorm = rmsnorm_bf16,
                        .keys = keys_bf16,
                        .values = values_bf16,
                        .unpack = unpack_bf16,
                        .tile = tile_bf16,
                        .thin = thin_bf16,
                        .softmax = softmax_bf16},
      .add = add,
      .scale = scale_by,
      .add_scaled = add_scaled,
      .add_exp2 = add_exp2,
      .dot = dot,
      .softmax_back = softmax_back,
      .swiglu = swiglu,
      .rope = rope,
      .highest = highest,
      .sum_exp = sum_exp,
      .exp_scaled = exp_scaled,
      .rmsnorm_back = rmsnorm_back,
      .swiglu_back = swiglu_back,
      .adamw = adamw,
  };
  table->q8.unpack = unpack_q8;
  table->q8.thin = acre_thin_unpacked;
}

/* q8 is bf16 but for how weights are kept. */
static void complete_q8(acre_kernels *table) {
  acre_typed q8 = table->of[ACRE_BF16];
  q8.pack_k = ACRE_Q8_K;
  q8.pack_bytes = ACRE_Q8_BYTES;
  q8.unpack = table->q8.unpack;
  q8.thin = table->q8.thin;
  table->q8 = q8;
}

acre_kernels acre_cpu_kernels(uint32_t features) {
  acre_kernels table;
  acre_kernels_scalar(&table);
  acre_kernels_avx2(&table, features);
  acre_kernels_avx512(&table, features);
  complete_q8(&table);
  return table;
}
