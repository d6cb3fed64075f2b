/* Every kernel of every table that this processor can run: within a derived bound of a
 * float64 loop, equal to the scalar table bit for bit, and writing nothing beyond its
 * output. Also bfloat16 and exp over whole ranges of their arguments. */
#include "check.h"
#include "guard.h"

#include "cpu/kernels.h"

#include <math.h>
#include <stdlib.h>

#define EPS 0x1p-24 /* unit roundoff of float32 */
#define CANARY 32   /* floats after an output that must stay as they were */
#define POISON 0x7fc0dead

static acre_kernels tables[3];
static int table_count;
static uint64_t seed;

/* ---------------------------------------------------------------- memory */

static float *poisoned(int64_t n) {
  float *x = guarded_alloc((size_t)(n + CANARY) * sizeof(float));
  for (int64_t i = 0; i < n + CANARY; i++) x[i] = acre_from_bits(POISON);
  return x;
}

static float *random_floats(int64_t n) {
  float *x = guarded_alloc((size_t)n * sizeof(float));
  for (int64_t i = 0; i < n; i++) x[i] = random_float(&seed);
  return x;
}

static bool unharmed(const float *x, int64_t n) {
  for (int64_t i = n; i < n + CANARY; i++)
    if (acre_bits(x[i]) != POISON) return false;
  return true;
}

static bool same(const void *a, const void *b, int64_t n) {
  return memcmp(a, b, (size_t)n * sizeof(float)) == 0;
}

/* ---------------------------------------------------------------- tiles */

typedef struct tile_case {
  int64_t rows, panels, k;
  bool add, bf16;
} tile_case;

static uint16_t *pack_bf16(const float *b, int64_t panels, int64_t k) {
  int64_t size = acre_round_up(k, 2) * ACRE_PANEL;
  uint16_t *packed = guarded_alloc((size_t)(panels * size) * sizeof *packed);
  for (int64_t p = 0; p < panels; p++)
    for (int64_t x = 0; x < k; x++)
      for (int64_t j = 0; j < ACRE_PANEL; j++)
        packed[p * size + x / 2 * 32 + j * 2 + x % 2] =
            acre_to_bf16(b[(p * k + x) * ACRE_PANEL + j]);
  return packed;
}

/* In calls of the table's own height. */
static void run_tile(const acre_kernels *t, const tile_case *c, float *y, const float *a,
                     const float *b, const uint16_t *packed) {
  int64_t stride = c->panels * ACRE_PANEL;
  for (int64_t i = 0; i < c->rows; i += t->tile_rows) {
    int64_t rows = acre_min(t->tile_rows, c->rows - i);
    if (c->bf16)
      t->tile_bf16(y + i * stride, stride, a + i * (c->k + 3), c->k + 3, packed,
                   acre_round_up(c->k, 2) * ACRE_PANEL, rows, c->panels, c->k, c->add);
    else
      t->tile(y + i * stride, stride, a + i * (c->k + 3), c->k + 3, b, ACRE_PANEL,
              c->k * ACRE_PANEL, rows, c->panels, c->k, c->add);
  }
}

static bool tile_within_bound(const tile_case *c, const float *y, const float *old,
                              const float *a, const float *b) {
  for (int64_t i = 0; i < c->rows; i++) {
    for (int64_t j = 0; j < c->panels * ACRE_PANEL; j++) {
      int64_t at = i * c->panels * ACRE_PANEL + j;
      double sum = c->add ? old[at] : 0.0, size = fabs(sum);
      for (int64_t x = 0; x < c->k; x++) {
        float w = b[(j / ACRE_PANEL * c->k + x) * ACRE_PANEL + j % ACRE_PANEL];
        if (c->bf16) w = acre_from_bf16(acre_to_bf16(w));
        double product = (double)a[i * (c->k + 3) + x] * w;
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
  float *a = random_floats(c->rows * (c->k + 3));
  float *b = random_floats(c->panels * c->k * ACRE_PANEL);
  float *old = random_floats(n), *first = NULL;
  uint16_t *packed = pack_bf16(b, c->panels, c->k);
  for (int i = 0; i < table_count; i++) {
    float *y = poisoned(n);
    if (c->add) memcpy(y, old, (size_t)n * sizeof(float));
    run_tile(&tables[i], c, y, a, b, packed);
    CHECK(unharmed(y, n));
    if (first) {
      CHECK(same(first, y, n));
      guarded_free(y);
    } else {
      CHECK(tile_within_bound(c, y, old, a, b));
      first = y;
    }
  }
  guarded_free(a), guarded_free(b), guarded_free(old), guarded_free(packed),
      guarded_free(first);
}

static void test_tiles(void) {
  static const int64_t depths[] = {1, 2, 3, 16, 33, 64};
  for (int64_t rows = 1; rows <= 13; rows++)
    for (int64_t panels = 1; panels <= 9; panels += panels < 5 ? 1 : 2)
      for (int64_t d = 0; d < ACRE_COUNT(depths); d++)
        for (int kind = 0; kind < 4; kind++)
          test_tile(&(tile_case){rows, panels, depths[d], kind & 1, kind >> 1});
}

/* ---------------------------------------------------------------- vectors */

/* Every other kernel, called on rows of n elements (dots: n keys). */
static void call_kernel(const acre_kernels *t, int which, float *y, int64_t n,
                        float *const x[4]) {
  switch (which) {
    case 0: t->round(y, x[0], n); break;
    case 1: t->widen(y, (const uint16_t *)x[0], n); break;
    case 2: t->narrow((uint16_t *)y, x[0], n); break;
    case 3: t->add(y, x[0], x[1], n); break;
    case 4: memcpy(y, x[0], (size_t)n * 4), t->scale(y, 0.3f, n); break;
    case 5: t->dots(y, x[0], x[1], 83, n, 80); break;
    case 6: memcpy(y, x[0], (size_t)n * 4), t->add_exp(y, x[1], n, 3.0f, 1.5f, 0.7f); break;
    case 7: t->rmsnorm(y, x[0], x[1], 1e-5, n); break;
    case 8: t->swiglu(y, x[2], x[1], n); break;
    case 9: t->expand(y, (const uint16_t *)x[3], n); break;
    case 10: t->transpose(y, x[1], 83, acre_min(n, 16), n); break;
    case 11: t->rope(y, x[0], x[1], x[3], n); break;
  }
}

static int64_t written(int which, int64_t n) {
  if (which == 9 || which == 10) return n * ACRE_PANEL;
  if (which == 11) return 2 * n;
  return which == 2 ? acre_ceil_div(n, 2) : n;
}

/* Reference of output element i in float64, with the size that its error is relative to
 * and the number of roundings; false for kernels that only move values. */
static bool reference(int which, int64_t n, int64_t i, float *const x[4], double *value,
                      double *error) {
  if (which == 9 || which == 10) return false;
  double a = x[0][i], b = x[1][i], sum = 0.0, size = 0.0;
  switch (which) {
    case 3: *value = a + b, *error = EPS * fabs(*value); return true;
    case 4: *value = a * 0.3f, *error = EPS * fabs(*value); return true;
    case 5:
      for (int c = 0; c < 80; c++) {
        sum += (double)x[0][c] * x[1][i * 83 + c];
        size += fabs((double)x[0][c] * x[1][i * 83 + c]);
      }
      *value = sum, *error = 10 * EPS * size;
      return true;
    case 6:
      sum = exp((double)x[1][i] * 3.0f - 1.5f) * 0.7f; /* exponent: error 4.5 EPS */
      *value = a + sum, *error = EPS * (8 * sum + fabs(*value));
      return true;
    case 7:
      for (int64_t c = 0; c < n; c++) sum += (double)x[0][c] * x[0][c];
      *value = a / sqrt(sum / (double)n + 1e-5) * b;
      *error = EPS * (4 + (double)n / 16 + 4) * fabs(*value);
      return true;
    case 8:
      a = x[2][i];
      *value = a / (1.0 + exp(-a)) * b;
      *error = 8 * EPS * fabs(*value) + 1e-35; /* exp(88) stands for all above */
      return true;
    case 11:
      if (i < n) {
        b = x[0][n + i];
        *value = a * x[1][i] - b * x[3][i];
        *error = 2 * EPS * (fabs(a * x[1][i]) + fabs(b * x[3][i]));
      } else {
        b = x[0][i - n];
        *value = a * x[1][i - n] + b * x[3][i - n];
        *error = 2 * EPS * (fabs(a * x[1][i - n]) + fabs(b * x[3][i - n]));
      }
      return true;
  }
  return false;
}

static bool within_bound(int which, int64_t n, const float *y, float *const x[4]) {
  double value, error;
  for (int64_t i = 0; i < written(which, n); i++)
    if (reference(which, n, i, x, &value, &error) && !(fabs(y[i] - value) <= error))
      return false;
  return true;
}

static void test_vectors(void) {
  for (int64_t n = 1; n <= 83; n += n < 20 ? 1 : 7) {
    float *x[4] = {random_floats(2 * 83), random_floats(83 * 83), random_floats(83),
                   random_floats(83 * 16)};
    for (int i = 0; i < 83; i++) x[2][i] *= 100.0f;
    for (int which = 0; which <= 11; which++) {
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

/* ---------------------------------------------------------------- softmax */

typedef struct softmax_state {
  float s[2][ACRE_KEY_TILE], max, sum, factor[2];
} softmax_state;

/* Two tiles one after the other: 64 keys, then n. */
static void run_softmax(const acre_kernels *t, softmax_state *state, const float *logits,
                        const float *bias, int64_t n, float scale) {
  *state = (softmax_state){.max = -INFINITY};
  for (int i = 0; i < 2; i++) {
    memcpy(state->s[i], logits + i * ACRE_KEY_TILE, sizeof state->s[i]);
    t->softmax(state->s[i], bias ? bias + i * ACRE_KEY_TILE : NULL, 1,
               i ? n : ACRE_KEY_TILE, scale, &state->max, &state->sum, &state->factor[i]);
  }
}

static bool softmax_right(const softmax_state *state, const float *logits,
                          const float *bias, int64_t n, float scale) {
  double l[2 * ACRE_KEY_TILE], max = -INFINITY, sum = 0.0, bound = 1e-30;
  int64_t count = ACRE_KEY_TILE + n;
  for (int64_t j = 0; j < count; j++) {
    l[j] = (double)logits[j] * scale + (bias ? bias[j] : 0.0);
    max = l[j] > max ? l[j] : max;
  }
  for (int64_t j = 0; j < count; j++) sum += exp(l[j] - max);
  for (int64_t j = 0; j < count; j++) {
    double p = state->s[j / ACRE_KEY_TILE][j % ACRE_KEY_TILE];
    if (j < ACRE_KEY_TILE) p *= state->factor[1];
    double exact = exp(l[j] - max), error = EPS * (8 + 4 * fabs(l[j]) + fabs(max)) * 2;
    if (!(fabs(p - exact) <= error * exact + bound)) return false;
  }
  for (int64_t j = n; j < ACRE_KEY_TILE; j++)
    if (state->s[1][j] != 0.0f) return false;
  return fabs(state->sum - sum) <= 1e-5 * sum;
}

static void test_softmax(void) {
  for (int64_t n = 1; n <= ACRE_KEY_TILE; n++) {
    for (int kind = 0; kind < 4; kind++) {
      float *logits = random_floats(2 * ACRE_KEY_TILE);
      float *bias = random_floats(2 * ACRE_KEY_TILE);
      const float *given = kind & 1 ? bias : NULL;
      float scale = kind & 2 ? 60.0f : 0.5f;
      softmax_state first, other;
      run_softmax(&tables[0], &first, logits, given, n, scale);
      CHECK(softmax_right(&first, logits, given, n, scale));
      for (int i = 1; i < table_count; i++) {
        run_softmax(&tables[i], &other, logits, given, n, scale);
        CHECK(memcmp(&first, &other, sizeof first) == 0);
      }
      guarded_free(logits), guarded_free(bias);
    }
  }
}

/* Nothing seen stays nothing, whatever the rubbish beyond n. */
static void test_softmax_edges(void) {
  for (int i = 0; i < table_count; i++) {
    float s[ACRE_KEY_TILE], max = -INFINITY, sum = 0.0f, factor;
    for (int j = 0; j < ACRE_KEY_TILE; j++) s[j] = j < 5 ? -INFINITY : NAN;
    tables[i].softmax(s, NULL, 1, 5, 1.0f, &max, &sum, &factor);
    CHECK(max == -INFINITY && sum == 0.0f && factor == 0.0f && s[0] == 0.0f &&
          s[9] == 0.0f);
    s[0] = 2.0f, s[1] = NAN;
    tables[i].softmax(s, NULL, 1, 1, 1.0f, &max, &sum, &factor);
    CHECK(max == 2.0f && sum == 1.0f && s[0] == 1.0f && s[1] == 0.0f);
    s[0] = 1.0f, s[1] = NAN;
    tables[i].softmax(s, NULL, 1, 2, 1.0f, &max, &sum, &factor);
    CHECK(isnan(sum));
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
                       1e-45f,
                       acre_from_bits(0x7f800001),
                       acre_from_bits(0xffffffff),
                       1.0f};
  for (int i = 1; i < table_count; i++) {
    uint16_t a[16], b[16];
    tables[0].narrow(a, special, 16);
    tables[i].narrow(b, special, 16);
    CHECK(memcmp(a, b, sizeof a) == 0);
  }
}

int main(int argc, char **argv) {
  uint64_t first_seed = argc > 1 ? strtoull(argv[1], NULL, 10) : 20250712;
  seed = first_seed;
  static const uint32_t rungs[] = {0, ACRE_CPU_AVX2, ACRE_CPU_AVX2 | ACRE_CPU_AVX512};
  for (int i = 0; i < 3; i++)
    if ((acre_cpu_features() & rungs[i]) == rungs[i])
      tables[table_count++] = acre_cpu_kernels(rungs[i]);
  printf("seed %llu, tables:", (unsigned long long)first_seed);
  for (int i = 0; i < table_count; i++) printf(" %s", tables[i].isa);
  printf("\n");
  test_bf16();
  test_exp();
  test_tiles();
  test_vectors();
  test_softmax();
  test_softmax_edges();
  return check_report();
}
