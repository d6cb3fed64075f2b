/* Every kernel of every table that this processor can run: within a derived bound of a
 * float64 loop, equal to the scalar table bit for bit, and writing nothing beyond its
 * output. Also bfloat16 and exp over whole ranges of their arguments. */
#include "tables.h"

/* ---------------------------------------------------------------- tiles */

typedef struct tile_case {
  int64_t rows, panels, k;
  bool add;
  acre_dtype dtype;
} tile_case;

/* b [panels][k][16] of T in packed panels. */
static void *pack(const tile_case *c, const void *b) {
  const acre_typed *T = &tables[0].of[c->dtype];
  int64_t size = acre_ceil_div(c->k, T->pack_k) * T->pack_bytes;
  char *packed = guarded_alloc((size_t)(c->panels * size));
  memset(packed, 0, (size_t)(c->panels * size));
  for (int64_t p = 0; p < c->panels; p++)
    for (int64_t x = 0; x < c->k; x++)
      for (int64_t j = 0; j < ACRE_PANEL; j++) {
        int64_t from = (p * c->k + x) * ACRE_PANEL + j;
        if (c->dtype == ACRE_F32)
          ((float *)(void *)(packed + p * size))[x * ACRE_PANEL + j] =
              ((const float *)b)[from];
        else
          ((uint16_t *)(void *)(packed + p * size))[x / 2 * 32 + j * 2 + x % 2] =
              ((const uint16_t *)b)[from];
      }
  return packed;
}

/* In calls of the table's own height; with `thin` from packed panels, else unpacked. */
static void run_tile(const acre_typed *T, const tile_case *c, float *y, const void *a,
                     const void *packed, bool thin) {
  int64_t stride = c->panels * ACRE_PANEL, a_stride = acre_round_up(c->k, 2) + 2;
  int64_t size = acre_ceil_div(c->k, T->pack_k) * T->pack_bytes, b_stride;
  void *a_x = operands(T, c->rows * a_stride);
  void *wide = operands(T, c->panels * acre_round_up(c->k, 2) * ACRE_PANEL);
  for (int64_t i = 0; i < c->rows; i++)
    T->load((char *)a_x + i * a_stride * T->operand,
            (const char *)a + (size_t)(i * c->k) * acre_dtype_size(c->dtype), c->k);
  const void *b = T->unpack(wide, &b_stride, packed, size, c->panels, c->k);
  for (int64_t i = 0; i < c->rows; i += T->tile_rows) {
    int64_t rows = acre_min(T->tile_rows, c->rows - i);
    const char *a_i = (const char *)a_x + i * a_stride * T->operand;
    if (thin)
      T->thin(T, y + i * stride, stride, a_i, a_stride, packed, size, rows, c->panels, c->k,
              c->add);
    else
      T->tile(y + i * stride, stride, a_i, a_stride, b, b_stride, rows, c->panels, c->k,
              c->add);
  }
  guarded_free(a_x), guarded_free(wide);
}

static bool tile_within_bound(const tile_case *c, const float *y, const float *old,
                              const void *a, const void *b) {
  for (int64_t i = 0; i < c->rows; i++) {
    for (int64_t j = 0; j < c->panels * ACRE_PANEL; j++) {
      int64_t at = i * c->panels * ACRE_PANEL + j;
      double sum = c->add ? old[at] : 0.0, size = fabs(sum);
      for (int64_t x = 0; x < c->k; x++) {
        double product =
            (double)value(a, i * c->k + x, c->dtype) *
            value(b, (j / ACRE_PANEL * c->k + x) * ACRE_PANEL + j % ACRE_PANEL, c->dtype);
        sum += product;
        size += fabs(product);
      }
      if (!(fabs(y[at] - sum) <= EPS * (double)(c->k + 1) * size)) return false;
    }
  }
  return true;
}

static void test_tile(const tile_case *c) {
  int64_t n = c->rows * c->panels * ACRE_PANEL;
  float *a_x = random_floats(c->rows * c->k);
  float *b_x = random_floats(c->panels * c->k * ACRE_PANEL);
  void *a = typed(a_x, c->rows * c->k, c->dtype);
  void *b = typed(b_x, c->panels * c->k * ACRE_PANEL, c->dtype);
  void *packed = pack(c, b);
  float *old = random_floats(n), *first = NULL;
  for (int i = 0; i < 2 * table_count; i++) {
    float *y = poisoned(n);
    if (c->add) memcpy(y, old, (size_t)n * sizeof(float));
    run_tile(&tables[i / 2].of[c->dtype], c, y, a, packed, i % 2);
    CHECK(unharmed(y, n));
    if (first) {
      CHECK(same(first, y, n));
      guarded_free(y);
    } else {
      CHECK(tile_within_bound(c, y, old, a, b));
      first = y;
    }
  }
  guarded_free(a_x), guarded_free(b_x), guarded_free(a), guarded_free(b);
  guarded_free(packed), guarded_free(old), guarded_free(first);
}

static void test_tiles(void) {
  static const int64_t depths[] = {1, 2, 3, 16, 33, 64};
  for (int64_t rows = 1; rows <= 13; rows++)
    for (int64_t panels = 1; panels <= 9; panels += panels < 5 ? 1 : 2)
      for (int64_t d = 0; d < ACRE_COUNT(depths); d++)
        for (int kind = 0; kind < 4; kind++)
          test_tile(&(tile_case){rows, panels, depths[d], kind & 1,
                                 kind >> 1 ? ACRE_BF16 : ACRE_F32});
}

/* What a row does not see may be anything, also in the other half of its last pair. */
static void test_tile_end(void) {
  for (int i = 0; i < table_count; i++) {
    const acre_typed *T = &tables[i].of[ACRE_BF16];
    float values[4] = {1.0f, 2.0f, 3.0f, NAN}, p[ACRE_KEY_TILE] = {1.0f, 1.0f, 1.0f};
    uint16_t rows[4 * 16], *a = operands(T, 4);
    for (int j = 0; j < 64; j++) rows[j] = acre_to_bf16(values[j / 16]);
    void *b = operands(T, ACRE_KEY_TILE * ACRE_PANEL);
    T->round(a, p, 3);
    T->values(b, rows, 16, 4, 16);
    float c[16];
    T->tile(c, 16, a, 4, b, ACRE_KEY_TILE * ACRE_PANEL, 1, 1, 3, false);
    for (int j = 0; j < 16; j++) CHECK(c[j] == 6.0f);
    guarded_free(a), guarded_free(b);
  }
}

/* ---------------------------------------------------------------- layouts */

/* Operands of rows, and of keys and values in panels: exact, and zero where nothing
 * belongs. */
static void test_layout(const acre_typed *T, acre_dtype dtype, int64_t rows, int64_t d) {
  int64_t stride = d + 6, padded = acre_round_up(d, ACRE_PANEL);
  float *x = random_floats(rows * stride);
  void *from = typed(x, (rows - 1) * stride + d, dtype);
  void *keys = operands(T, acre_round_up(rows, ACRE_PANEL) * d);
  void *values = operands(T, padded * ACRE_KEY_TILE);
  void *row = operands(T, acre_round_up(d, 2)), *rounded = operands(T, acre_round_up(d, 2));
  T->keys(keys, from, stride, rows, d);
  T->values(values, from, stride, rows, d);
  T->load(row, from, d);
  T->round(rounded, x, d);
  bool right = true;
  for (int64_t j = 0; j < acre_round_up(rows, ACRE_PANEL); j++)
    for (int64_t c = 0; c < d; c++) {
      const char *panel = (const char *)keys + j / ACRE_PANEL * d * ACRE_PANEL * T->operand;
      float wanted = j < rows ? value(from, j * stride + c, dtype) : 0.0f;
      right &= in_panel(T, panel, c, j % ACRE_PANEL) == wanted;
    }
  CHECK(right);
  for (int64_t j = 0; j < rows; j++)
    for (int64_t c = 0; c < padded; c++) {
      int64_t at = c / ACRE_PANEL * ACRE_KEY_TILE * ACRE_PANEL * T->operand;
      float wanted = c < d ? value(from, j * stride + c, dtype) : 0.0f;
      right &= in_panel(T, (const char *)values + at, j, c % ACRE_PANEL) == wanted;
    }
  CHECK(right);
  for (int64_t c = 0; c < d; c++) {
    right &= operand(T, row, c) == value(from, c, dtype);
    right &= operand(T, rounded, c) == value(from, c, dtype);
  }
  CHECK(right);
  guarded_free(x), guarded_free(from), guarded_free(keys), guarded_free(values);
  guarded_free(row), guarded_free(rounded);
}

static void test_layouts(void) {
  static const int64_t rows[] = {1, 2, 15, 16, 17, 33, 64},
                       dims[] = {2, 16, 30, 64, 80, 90};
  for (int i = 0; i < 2 * table_count; i++)
    for (int64_t r = 0; r < ACRE_COUNT(rows); r++)
      for (int64_t d = 0; d < ACRE_COUNT(dims); d++)
        test_layout(&tables[i / 2].of[i % 2], (acre_dtype)(i % 2), rows[r], dims[d]);
}

/* ---------------------------------------------------------------- vectors */

static void call_adamw(const acre_kernels *t, float *y, int64_t n, float *const x[4]) {
  acre_adamw_factors by = {0.5f, 0.9f, 0.1f, 0.95f, 0.05f, 0.01f, 1.5f, 1e-8f, 0.001f};
  memcpy(y, x[0], (size_t)n * 4);
  memcpy(y + n, x[1], (size_t)n * 4);
  for (int64_t i = 0; i < n; i++) y[2 * n + i] = fabsf(x[2][i]);
  t->adamw(y, y + n, y + 2 * n, x[3], n, &by);
}

/* Kernels on rows of n numbers. */
static void call_kernel(const acre_kernels *t, int which, float *y, int64_t n,
                        float *const x[4]) {
  const acre_typed *f32 = &t->of[ACRE_F32], *bf16 = &t->of[ACRE_BF16];
  switch (which) {
    case 0: bf16->store(y, x[0], n); break;
    case 1: bf16->widen(y, x[0], n); break;
    case 2: f32->store(y, x[0], n); break;
    case 3: t->add(y, x[0], x[1], n); break;
    case 4: memcpy(y, x[0], (size_t)n * 4), t->scale(y, 0.3f, n); break;
    case 5: memcpy(y, x[0], (size_t)n * 4), t->add_scaled(y, x[1], 0.3f, n); break;
    case 6: memcpy(y, x[0], (size_t)n * 4), t->add_exp2(y, x[1], n, 3.0f, 4, 0.7f); break;
    case 7: f32->rmsnorm(y, x[0], x[1], 1e-5, n); break;
    case 8: t->swiglu(y, x[2], x[1], n); break;
    case 9: t->rope(y, x[0], x[1], x[3], n); break;
    case 10: bf16->rmsnorm(y, x[0], x[1], 1e-5, n); break;
    case 11: y[0] = t->dot(x[0], x[1], n); break;
    case 12: t->exp_scaled(y, x[2], n, t->highest(x[2], n), 0.3f); break;
    case 13:
      memcpy(y, x[3], (size_t)n * 4), t->rmsnorm_back(y, x[0], x[1], x[2], 1e-5, n);
      break;
    case 14: t->swiglu_back(y, y + n, x[2], x[1], x[0], n); break;
    case 15: call_adamw(t, y, n, x); break;
  }
}

static int64_t written(int which, int64_t n) {
  if (which == 9 || which == 14) return 2 * n;
  if (which == 11) return 1;
  if (which == 15) return 3 * n;
  return which == 0 || which == 10 ? acre_ceil_div(n, 2) : n;
}

/* Reference of output element i in float64, with the size that its error is relative to
 * and the number of roundings; false for kernels that only move values. */
static bool reference(int which, int64_t n, int64_t i, float *const x[4], double *result,
                      double *error) {
  double a = x[0][i], b = x[1][i], sum = 0.0;
  switch (which) {
    case 3: *result = a + b, *error = EPS * fabs(*result); return true;
    case 4: *result = a * 0.3f, *error = EPS * fabs(*result); return true;
    case 5: *result = a + b * 0.3f, *error = EPS * fabs(*result); return true;
    case 6:
      sum = exp2((double)x[1][i] * 3.0f - 4) * 0.7f; /* exponent: error 3 EPS ln 2 */
      *result = a + sum, *error = EPS * (6 * sum + fabs(*result));
      return true;
    case 7:
      for (int64_t c = 0; c < n; c++) sum += (double)x[0][c] * x[0][c];
      *result = a / sqrt(sum / (double)n + 1e-5) * b;
      *error = EPS * (4 + (double)n / 16 + 4) * fabs(*result);
      return true;
    case 8:
      a = x[2][i];
      *result = a / (1.0 + exp(-a)) * b;
      *error = 8 * EPS * fabs(*result) + 1e-35; /* exp(88) stands for all above */
      return true;
    case 9:
      if (i < n) {
        b = x[0][n + i];
        *result = a * x[1][i] - b * x[3][i];
        *error = 2 * EPS * (fabs(a * x[1][i]) + fabs(b * x[3][i]));
      } else {
        b = x[0][i - n];
        *result = a * x[1][i - n] + b * x[3][i - n];
        *error = 2 * EPS * (fabs(a * x[1][i - n]) + fabs(b * x[3][i - n]));
      }
      return true;
    case 11:
      for (int64_t c = 0; c < n; c++) sum += fabs((double)x[0][c] * x[1][c]);
      *error = EPS * ((double)n / 16 + 5) * sum, *result = 0.0;
      for (int64_t c = 0; c < n; c++) *result += (double)x[0][c] * x[1][c];
      return true;
  }
  return false;
}

/* The kernels of training, from 12 on, are compared in test_learn.c. */
static bool within_bound(int which, int64_t n, const float *y, float *const x[4]) {
  double result, error;
  if (which > 11) return true;
  for (int64_t i = 0; i < written(which, n); i++)
    if (reference(which, n, i, x, &result, &error) && !(fabs(y[i] - result) <= error))
      return false;
  return true;
}

/* The normed row in bf16 is the float32 one, rounded. */
static void test_norm_rounds(int64_t n, float *const x[4]) {
  float wide[83];
  uint16_t narrow[83], wanted[83];
  tables[0].of[ACRE_F32].rmsnorm(wide, x[0], x[1], 1e-5, n);
  tables[0].of[ACRE_BF16].rmsnorm(narrow, x[0], x[1], 1e-5, n);
  tables[0].of[ACRE_BF16].store(wanted, wide, n);
  CHECK(memcmp(narrow, wanted, (size_t)n * 2) == 0);
}

static void test_vectors(void) {
  for (int64_t n = 1; n <= 83; n += n < 20 ? 1 : 7) {
    float *x[4] = {random_floats(2 * 83), random_floats(2 * 83), random_floats(83),
                   random_floats(83)};
    for (int i = 0; i < 83; i++) x[2][i] *= 100.0f;
    test_norm_rounds(n, x);
    for (int which = 0; which <= 15; which++) {
      int64_t size = written(which, n);
      float *first = poisoned(size);
      call_kernel(&tables[0], which, first, n, x);
      CHECK(within_bound(which, n, first, x));
      CHECK(unharmed(first, size));
      for (int i = 1; i < table_count; i++) {
        float *y = poisoned(size);
        call_kernel(&tables[i], which, y, n, x);
        bool equal = same(first, y, size) && unharmed(y, size);
        CHECK(equal);
        if (!equal) fprintf(stderr, "  kernel %d, n %d\n", which, (int)n);
        guarded_free(y);
      }
      guarded_free(first);
    }
    for (int i = 0; i < 4; i++) guarded_free(x[i]);
  }
}

/* ---------------------------------------------------------------- numbers */

static double ulp(double x) { return ldexp(1.0, (int)floor(log2(x)) - 23); }

static void test_exp(void) {
  double worst = 0.0;
  for (int64_t i = 0; i <= 2000000; i++) {
    float x = -87.3f + (float)i * (175.3f / 2000000.0f);
    if (x > 88.0f) continue;
    double exact = exp((double)x), error = fabs(acre_exp(x) - exact) / ulp(exact);
    worst = error > worst ? error : worst;
  }
  printf("exp: worst error %.3f ulp\n", worst);
  CHECK(worst < 1.1);
  CHECK(acre_exp(0.0f) == 1.0f && acre_exp(-INFINITY) == 0.0f && acre_exp(-87.4f) == 0.0f);
  CHECK(acre_exp(INFINITY) == acre_exp(88.0f) && isnan(acre_exp(NAN)));
}

static void test_exp2(void) {
  double worst = 0.0;
  for (int64_t i = 0; i <= 2000000; i++) {
    float x = -125.4f + (float)i * (140.0f / 2000000.0f);
    double exact = exp2((double)x - 15),
           error = fabs(acre_exp2(x, 15) - exact) / ulp(exact);
    if (rintf(x) - 15 >= -125) worst = error > worst ? error : worst;
  }
  printf("exp2: worst error %.3f ulp\n", worst);
  CHECK(worst < 0.8);
  CHECK(acre_exp2(3.0f, 3.0f) == 1.0f && acre_exp2(-INFINITY, 0.0f) == 0.0f);
  CHECK(acre_exp2(-126.0f, 0.0f) == 0.0f && acre_exp2(0.25f, 200.0f) == 0.0f);
  CHECK(isnan(acre_exp2(NAN, 0.0f)));
  for (int e = 0; e < 100; e++) /* the fraction does not depend on the origin */
    CHECK(acre_exp2(0.3f, (float)(e + 1)) == ldexpf(acre_exp2(0.3f, 1), -e));
}

/* Every bf16, and the values around and between two of them. */
static void test_bf16(void) {
  bool right = true;
  for (uint32_t h = 0; h < 0x10000; h++) {
    float x = acre_from_bf16((uint16_t)h);
    if (isnan(x)) {
      right &= isnan(acre_from_bf16(acre_to_bf16(x)));
      continue;
    }
    uint32_t u = h << 16, odd = h & 1;
    right &= acre_to_bf16(x) == h;
    if (isinf(x)) continue;
    right &= acre_to_bf16(acre_from_bits(u + 0x7fff)) == h;
    right &= acre_to_bf16(acre_from_bits(u + 0x8000)) == h + odd;
    right &= acre_to_bf16(acre_from_bits(u + 0x8001)) == h + 1;
  }
  CHECK(right);
  float special[16] = {NAN,
                       -NAN,
                       INFINITY,
                       -INFINITY,
                       0x1.fffffep127f,
                       -0.0f,
                       0x1p-126f,
                       acre_from_bits(0x7f800001),
                       acre_from_bits(0xffffffff),
                       1.0f};
  for (int i = 1; i < table_count; i++) {
    uint16_t a[16], b[16];
    tables[0].of[ACRE_BF16].store(a, special, 16);
    tables[i].of[ACRE_BF16].store(b, special, 16);
    CHECK(memcmp(a, b, sizeof a) == 0);
  }
}

int main(int argc, char **argv) {
  open_tables(argc, argv);
  test_bf16();
  test_exp();
  test_exp2();
  test_tiles();
  test_tile_end();
  test_layouts();
  test_vectors();
  return check_report();
}
