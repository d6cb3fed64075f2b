/* Choosing a token: argmax, top and penalize on every table against plain loops, with ties,
 * infinities, NaN and odd vocabularies; and that the highest logits alone give the token that
 * all of them give. */
#include "backends.h"
#include "decode.h"

/* ---------------------------------------------------------------- rows of logits */

enum { PLAIN, TIES, HOLES, STRANGE, KINDS };

/* Ties: few values. Holes: most are -infinity. Strange: NaN, both zeros and infinities. */
static float *logits_of(int64_t n, int kind) {
  float *x = random_floats(n);
  for (int64_t i = 0; i < n; i++) {
    uint64_t r = random_bits(&seed);
    if (kind == TIES) x[i] = (float)(r % 5) - 2;
    if (kind == HOLES && r % 16) x[i] = -INFINITY;
    if (kind == STRANGE) {
      static const float odd[] = {-0.0f, 0.0f, -INFINITY, 1.0f};
      if (r % 4 == 0) x[i] = acre_from_bits(r % 8 ? 0x7fc00000u : 0xffc00000u);
      if (r % 4 == 1) x[i] = odd[r / 4 % 4];
    } else if (kind == PLAIN) {
      x[i] *= 8;
    }
  }
  return x;
}

/* Whether a comes before b. */
static bool before(const float *x, int64_t a, int64_t b) {
  if (isnan(x[a]) || isnan(x[b])) return isnan(x[a]) == isnan(x[b]) ? a < b : isnan(x[b]);
  return x[a] != x[b] ? x[a] > x[b] : a < b;
}

static const float *sorted_by;
static int by_rank(const void *a, const void *b) {
  return before(sorted_by, *(const int32_t *)a, *(const int32_t *)b) ? -1 : 1;
}

static int32_t *ranked(const float *x, int64_t n) {
  int32_t *ids = malloc((size_t)n * sizeof *ids);
  for (int64_t i = 0; i < n; i++) ids[i] = (int32_t)i;
  sorted_by = x;
  qsort(ids, (size_t)n, sizeof *ids, by_rank);
  return ids;
}

/* ---------------------------------------------------------------- the operations */

static void test_argmax(int64_t rows, int64_t vocab, int kind) {
  float *x = logits_of(rows * vocab, kind);
  for (int i = 0; i < backend_count; i++) {
    int32_t *ids = guarded_alloc((size_t)rows * sizeof *ids);
    backends[i]->ops->argmax(queues[i], ids, x, rows, vocab);
    for (int64_t r = 0; r < rows; r++) {
      int64_t best = 0;
      for (int64_t c = 1; c < vocab; c++)
        if (before(x + r * vocab, c, best)) best = c;
      CHECK(ids[r] == best);
    }
    guarded_free(ids);
  }
  guarded_free(x);
}

static void test_top(int64_t vocab, int64_t k, int kind, float scale) {
  float *x = logits_of(vocab, kind);
  int32_t *expected = ranked(x, vocab);
  double mass = 0;
  for (int64_t c = 0; c < vocab; c++)
    if (x[c] > -INFINITY) mass += exp((double)scale * ((double)x[c] - x[expected[0]]));
  for (int i = 0; i < backend_count; i++) {
    float *values = nans(k), *sum = nans(1);
    int32_t *ids = guarded_alloc((size_t)k * sizeof *ids);
    backends[i]->ops->top(queues[i], values, ids, sum, x, vocab, k, scale);
    bool right = true;
    for (int64_t j = 0; j < k; j++)
      right &= ids[j] == expected[j] && same(&values[j], &x[expected[j]], 4);
    CHECK(right);
    if (isfinite(x[expected[0]])) CHECK(fabs(*sum - mass) <= 0x1p-16 * mass);
    guarded_free(values), guarded_free(sum), guarded_free(ids);
  }
  free(expected);
  guarded_free(x);
}

static void test_penalize(int64_t vocab, int64_t count) {
  float *x = logits_of(vocab, STRANGE);
  float *expected = guarded_alloc((size_t)vocab * sizeof *x), penalty = 1.3f;
  int32_t *ids = guarded_alloc((size_t)count * sizeof *ids);
  memcpy(expected, x, (size_t)vocab * sizeof *x);
  for (int64_t i = 0; i < count; i++) {
    ids[i] = (int32_t)((i * 7 + 3) % vocab);
    float *e = &expected[ids[i]];
    *e = *e > 0 ? *e / penalty : *e * penalty;
  }
  for (int i = 0; i < backend_count; i++) {
    float *y = guarded_alloc((size_t)vocab * sizeof *x);
    memcpy(y, x, (size_t)vocab * sizeof *x);
    backends[i]->ops->penalize(queues[i], y, ids, count, penalty);
    bool right = true;
    for (int64_t c = 0; c < vocab; c++)
      right &= same(&y[c], &expected[c], 4) || (isnan(y[c]) && isnan(expected[c]));
    CHECK(right);
    guarded_free(y);
  }
  guarded_free(x), guarded_free(expected), guarded_free(ids);
}

static void test_operations(void) {
  for (int kind = 0; kind < KINDS; kind++) {
    test_argmax(1, 1, kind), test_argmax(3, 259, kind), test_argmax(2, 5003, kind);
    test_top(1, 1, kind, 1), test_top(37, 37, kind, 0.5f), test_top(2600, 9, kind, 2);
  }
  test_argmax(0, 7, PLAIN);
  test_top(5003, 1024, TIES, 1), test_top(4099, 1, TIES, 1);
  test_top(3001, 256, PLAIN, 0.01f), test_top(2049, 1023, PLAIN, 30);
  test_penalize(97, 90), test_penalize(7, 0), test_penalize(1301, 1300);
}

/* ---------------------------------------------------------------- the same token */

/* As a session does it, from the CPU's table. */
static int32_t from_top(const float *x, int64_t vocab, const acre_sampling *s,
                        uint64_t step) {
  float values[ACRE_TOP_MOST], mass;
  int32_t ids[ACRE_TOP_MOST];
  acre_candidate best[ACRE_TOP_MOST];
  int64_t k = acre_sampling_top(s, vocab);
  if (!k) return -1;
  backends[0]->ops->top(queues[0], values, ids, &mass, x, vocab, k, 1 / s->temperature);
  for (int64_t i = 0; i < k; i++) best[i] = (acre_candidate){values[i], ids[i]};
  return acre_sample_top(best, k, vocab, mass, s, step);
}

static void test_same_token(void) {
  static const float temperatures[] = {0, 1e-42f, 0.3f, 1, 2, 1e6f};
  static const float top_ps[] = {1, 0.999f, 0.9f, 0.5f, 1e-6f};
  static const int32_t top_ks[] = {0, 1, 7, 300, 1023, 5000};
  static const int64_t vocabs[] = {1, 5, 61, 300, 3001};
  int decided = 0, all = 0;
  for (int trial = 0; trial < 1500; trial++) {
    int64_t vocab = vocabs[random_bits(&seed) % 5];
    float *x = logits_of(vocab, (int)(random_bits(&seed) % KINDS));
    acre_candidate *candidates = malloc((size_t)vocab * sizeof *candidates);
    acre_sampling s = acre_sampling_default();
    s.temperature = temperatures[random_bits(&seed) % 6];
    s.top_p = top_ps[random_bits(&seed) % 5];
    s.top_k = top_ks[random_bits(&seed) % 6];
    s.seed = random_bits(&seed);
    int32_t token = from_top(x, vocab, &s, (uint64_t)trial);
    int32_t expected = acre_sample(x, candidates, vocab, &s, (uint64_t)trial);
    CHECK(token == expected || token == -1);
    bool needs_all = s.temperature != 0 && s.top_k == 0;
    if (!needs_all && s.top_k < ACRE_TOP_MOST) CHECK(token >= 0);
    decided += token >= 0, all++;
    free(candidates);
    guarded_free(x);
  }
  CHECK(decided > all / 2 && decided < all);
}

/* Peaked as a model's are: a nucleus is decided by the highest of them; a mass that is off by
 * more than is allowed for would choose others. */
static void test_nucleus(void) {
  int64_t vocab = 5003;
  int decided = 0;
  acre_candidate *candidates = malloc((size_t)vocab * sizeof *candidates);
  for (int trial = 0; trial < 200; trial++) {
    float *x = random_floats(vocab);
    for (int64_t c = 0; c < vocab; c++) x[c] = 12 * x[c] * x[c] * x[c];
    acre_sampling s = acre_sampling_default();
    s.temperature = 0.7f, s.top_p = 0.9f, s.seed = (uint64_t)trial;
    int32_t token = from_top(x, vocab, &s, 3);
    CHECK(token == -1 || token == acre_sample(x, candidates, vocab, &s, 3));
    decided += token >= 0;
    guarded_free(x);
  }
  CHECK(decided > 150);
  free(candidates);
}

int main(int argc, char **argv) {
  if (!open_backends(argc, argv, 31)) return 1;
  test_operations();
  test_same_token();
  test_nucleus();
  close_backends();
  return check_report();
}
