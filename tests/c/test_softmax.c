/* The kernels of softmax, of its gradient and of the loss's sum: as test_kernels.c has it for
 * the others, within a derived bound and alike in every table. */
#include "tables.h"

/* ---------------------------------------------------------------- softmax */

typedef struct softmax_state {
  float p[2][ACRE_KEY_TILE], origin, sum, factor[2];
} softmax_state;

/* Two tiles one after the other: 64 keys, then n. */
static void run_softmax(const acre_typed *T, softmax_state *state, const float *logits,
                        const float *bias, int64_t n, float scale) {
  *state = (softmax_state){.origin = -INFINITY};
  for (int i = 0; i < 2; i++) {
    float *s = random_floats(ACRE_KEY_TILE);
    memcpy(s, logits + i * ACRE_KEY_TILE, sizeof state->p[i]);
    T->softmax(s, bias ? bias + i * ACRE_KEY_TILE : NULL, 1, i ? n : ACRE_KEY_TILE, scale,
               &state->origin, &state->sum, &state->factor[i]);
    for (int j = 0; j < ACRE_KEY_TILE; j++) state->p[i][j] = operand(T, s, j);
    guarded_free(s);
  }
}

/* Half a step of bf16 more where the weights are rounded. */
static bool softmax_right(const softmax_state *state, const float *logits,
                          const float *bias, int64_t n, float scale, acre_dtype dtype) {
  double x[2 * ACRE_KEY_TILE], max = -INFINITY, sum = 0.0;
  double half = dtype == ACRE_BF16 ? 0x1p-8 : 0.0;
  int64_t count = ACRE_KEY_TILE + n;
  for (int64_t j = 0; j < count; j++) {
    x[j] = (double)logits[j] * scale + (bias ? bias[j] * 1.4426950408889634 : 0.0);
    max = x[j] > max ? x[j] : max;
  }
  double origin = ceil(max - 1e-4); /* a maximum close to a whole number: either */
  if (state->origin != origin && state->origin != ceil(max + 1e-4)) return false;
  for (int64_t j = 0; j < count; j++) {
    double p = state->p[j / ACRE_KEY_TILE][j % ACRE_KEY_TILE];
    if (j < ACRE_KEY_TILE) p *= state->factor[1];
    double exact = exp2(x[j] - state->origin), error = EPS * (4 + 4 * fabs(x[j])) + half;
    if (!(fabs(p - exact) <= error * exact + 1e-37)) return false;
    sum += p;
  }
  for (int64_t j = n; j < ACRE_KEY_TILE; j++)
    if (state->p[1][j] != 0.0f) return false;
  return fabs(state->sum - sum) <= 1e-6 * sum;
}

static void test_softmax(acre_dtype dtype) {
  for (int64_t n = 1; n <= ACRE_KEY_TILE; n++) {
    for (int kind = 0; kind < 4; kind++) {
      float *logits = random_floats(2 * ACRE_KEY_TILE);
      float *bias = random_floats(2 * ACRE_KEY_TILE);
      const float *given = kind & 1 ? bias : NULL;
      float scale = kind & 2 ? 90.0f : 0.7f;
      softmax_state first, other;
      run_softmax(&tables[0].of[dtype], &first, logits, given, n, scale);
      CHECK(softmax_right(&first, logits, given, n, scale, dtype));
      for (int i = 1; i < table_count; i++) {
        run_softmax(&tables[i].of[dtype], &other, logits, given, n, scale);
        CHECK(memcmp(&first, &other, sizeof first) == 0);
      }
      guarded_free(logits), guarded_free(bias);
    }
  }
}

/* Nothing seen stays nothing, whatever the rubbish beyond n. */
static void test_softmax_edges(void) {
  for (int i = 0; i < 2 * table_count; i++) {
    const acre_typed *T = &tables[i / 2].of[i % 2];
    float s[ACRE_KEY_TILE], origin = -INFINITY, sum = 0.0f, factor;
    for (int j = 0; j < ACRE_KEY_TILE; j++) s[j] = j < 5 ? -INFINITY : NAN;
    T->softmax(s, NULL, 1, 5, 1.0f, &origin, &sum, &factor);
    CHECK(origin == -INFINITY && sum == 0.0f && factor == 0.0f &&
          operand(T, s, 0) == 0.0f && operand(T, s, 9) == 0.0f);
    s[0] = 2.0f, s[1] = NAN;
    T->softmax(s, NULL, 1, 1, 1.0f, &origin, &sum, &factor);
    CHECK(origin == 2.0f && sum == 1.0f && factor == 0.0f && operand(T, s, 0) == 1.0f &&
          operand(T, s, 1) == 0.0f);
    s[0] = 5.5f, s[1] = NAN;
    T->softmax(s, NULL, 1, 1, 1.0f, &origin, &sum, &factor);
    CHECK(origin == 6.0f && factor == 0x1p-4f);
    s[0] = 1.0f, s[1] = NAN;
    T->softmax(s, NULL, 1, 2, 1.0f, &origin, &sum, &factor);
    CHECK(isnan(sum));
  }
}

/* Any length; a NaN shows in the sum, -infinity adds nothing to it. */
static void test_sum_exp(void) {
  for (int64_t n = 1; n <= 200; n += n < 70 ? 1 : 13) {
    float *x = random_floats(n), most = -INFINITY;
    double exact = 0.0, first = tables[0].sum_exp(x, n, 1.0f);
    for (int64_t i = 0; i < n; i++) most = fmaxf(most, x[i]), exact += exp(x[i] - 1.0);
    CHECK(fabs(first - exact) <= 12 * EPS * exact);
    for (int i = 0; i < table_count; i++) {
      CHECK(tables[i].highest(x, n) == most && tables[i].sum_exp(x, n, 1.0f) == first);
      float kept = x[n / 2];
      x[n / 2] = NAN;
      CHECK(isnan(tables[i].sum_exp(x, n, 1.0f)));
      CHECK(n == 1 || tables[i].highest(x, n) > -1.0f);
      x[n / 2] = -INFINITY;
      CHECK(n == 1 || tables[i].sum_exp(x, n, 1.0f) < first);
      x[n / 2] = kept;
    }
    guarded_free(x);
  }
}

enum { BACK_ROWS = 3 };

/* Each row's p and ds, side by side. */
typedef struct softmax_gradient {
  float p[BACK_ROWS][ACRE_KEY_TILE], ds[BACK_ROWS][ACRE_KEY_TILE];
} softmax_gradient;

/* What lies beyond n must not matter: NaN. */
static softmax_gradient run_softmax_back(const acre_kernels *t, const float *s,
                                         const float *dp, const float *bias, int64_t n,
                                         const float *lse, const float *delta) {
  softmax_gradient y;
  memcpy(y.p, s, sizeof y.p), memcpy(y.ds, dp, sizeof y.ds);
  for (int r = 0; r < BACK_ROWS; r++)
    for (int64_t j = n; j < ACRE_KEY_TILE; j++) y.p[r][j] = y.ds[r][j] = NAN;
  t->softmax_back(y.p[0], y.ds[0], bias, BACK_ROWS, n, 3.0f, 0.3f, lse, delta);
  return y;
}

static bool softmax_back_right(const softmax_gradient *y, const float *s, const float *dp,
                               const float *bias, int64_t n, const float *lse,
                               const float *delta) {
  for (int r = 0; r < BACK_ROWS; r++)
    for (int j = 0; j < ACRE_KEY_TILE; j++) {
      int i = r * ACRE_KEY_TILE + j;
      double x = (double)s[i] * 3.0 + (bias && j < n ? bias[j] * 1.4426950408889634 : 0.0);
      double p = j < n ? exp2(fmin(x - lse[r], 1.0)) : 0.0;
      double ds = j < n ? p * 0.3f * ((double)dp[i] - delta[r]) : 0.0;
      double off = EPS * (6 + 3 * fabs(x) + fabs(x - lse[r]));
      if (!(fabs(y->p[r][j] - p) <= off * p)) return false;
      if (!(fabs(y->ds[r][j] - ds) <= (off + 4 * EPS) * fabs(ds))) return false;
    }
  return true;
}

static void test_softmax_back(void) {
  int64_t size = BACK_ROWS * ACRE_KEY_TILE;
  float lse[BACK_ROWS] = {4.25f, 2.5f, 0.0f}; /* the last: exponents above 1 */
  for (int64_t n = 0; n <= ACRE_KEY_TILE; n++)
    for (int kind = 0; kind < 2; kind++) {
      float *s = random_floats(size), *dp = random_floats(size);
      float *delta = random_floats(BACK_ROWS), *bias = random_floats(n);
      const float *given = kind ? bias : NULL;
      softmax_gradient first = run_softmax_back(&tables[0], s, dp, given, n, lse, delta);
      CHECK(softmax_back_right(&first, s, dp, given, n, lse, delta));
      for (int i = 1; i < table_count; i++) {
        softmax_gradient y = run_softmax_back(&tables[i], s, dp, given, n, lse, delta);
        CHECK(memcmp(&first, &y, sizeof y) == 0);
      }
      guarded_free(s), guarded_free(dp), guarded_free(delta), guarded_free(bias);
    }
}

int main(int argc, char **argv) {
  open_tables(argc, argv);
  test_softmax(ACRE_F32);
  test_softmax(ACRE_BF16);
  test_softmax_edges();
  test_sum_exp();
  test_softmax_back();
  return check_report();
}
