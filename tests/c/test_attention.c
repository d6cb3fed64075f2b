/* Attention and scoring, for every backend: within a derived bound of a float64 loop,
 * the same bits for all of them, and a row's result independent of the other rows and
 * of memory that it must not see. */
#include "backends.h"

/* ---------------------------------------------------------------- attention */

typedef struct attend_case {
  int64_t d, kv_heads, group, prefix, seen, rows;
  acre_dtype dtype;
  bool bias;
  int64_t shift; /* numbers in front of all that is read: 0 where it is aligned */
} attend_case;

static int plain_count; /* of backends: those before the tables for one chip */

typedef struct attend_data {
  float *q;
  void *keys[2], *values[2]; /* prefix, own */
  float *bias[2];
  int64_t count[2];
} attend_data;

/* n random numbers of T behind `shift` others. */
static void *shifted(const attend_case *c, int64_t n, acre_dtype dtype) {
  char *x = random_typed(n + c->shift, dtype);
  return x + c->shift * (int64_t)acre_dtype_size(dtype);
}

static void free_shifted(const attend_case *c, void *x, acre_dtype dtype) {
  guarded_free((char *)x - c->shift * (int64_t)acre_dtype_size(dtype));
}

/* own holds five keys that nobody sees: NaN. */
static attend_data make_attention(const attend_case *c) {
  int64_t width = c->kv_heads * c->d;
  attend_data a = {.count = {c->prefix, c->seen + c->rows + 5}};
  a.q = shifted(c, c->rows * c->kv_heads * c->group * c->d, ACRE_F32);
  for (int64_t i = 0; i < c->rows * c->kv_heads * c->group * c->d; i++) a.q[i] *= 3.0f;
  for (int s = 0; s < 2; s++) {
    a.keys[s] = shifted(c, a.count[s] * width, c->dtype);
    a.values[s] = shifted(c, a.count[s] * width, c->dtype);
    a.bias[s] = random_floats(a.count[s]);
  }
  int64_t size = (int64_t)acre_dtype_size(c->dtype), end = c->seen + c->rows;
  memset((char *)a.keys[1] + end * width * size, 0xff, (size_t)(5 * width * size));
  memset((char *)a.values[1] + end * width * size, 0xff, (size_t)(5 * width * size));
  return a;
}

static void free_attention(const attend_case *c, attend_data *a) {
  free_shifted(c, a->q, ACRE_F32);
  for (int s = 0; s < 2; s++) {
    free_shifted(c, a->keys[s], c->dtype), free_shifted(c, a->values[s], c->dtype);
    guarded_free(a->bias[s]);
  }
}

/* Logit of key j of segment s, and the sum of |products| that its error is relative
 * to. */
static double logit_of(const attend_case *c, const attend_data *a, int64_t row,
                       int64_t head, int s, int64_t j, double *size) {
  int64_t h = c->kv_heads * c->group, kv = head / c->group;
  double sum = 0.0;
  for (int64_t x = 0; x < c->d; x++) {
    double p = (double)as(a->q[(row * h + head) * c->d + x], c->dtype) *
               at(a->keys[s], (j * c->kv_heads + kv) * c->d + x, c->dtype);
    sum += p, *size += fabs(p);
  }
  *size /= sqrt((double)c->d);
  return sum / sqrt((double)c->d) + (c->bias ? a->bias[s][j] : 0.0);
}

/* Weight of a logit relative to the highest, rounded to T (which scaling by powers of two
 * does not change); *slack = how far a logit wrong by `error` may move it. */
static double weight_of(double logit, double highest, double error, acre_dtype dtype,
                        double *slack) {
  double e = exp2(logit * 1.4426950408889634 - ceil(highest * 1.4426950408889634));
  if (dtype == ACRE_F32) {
    *slack = e * error;
    return e;
  }
  *slack = as((float)(e * (1 + error)), dtype) - as((float)(e * (1 - error)), dtype);
  return as((float)e, dtype);
}

/* Error: a softmax weight is off by the error of its logit, d+8 roundings; the weighted
 * sum and the sum of weights add one rounding per key and a few per tile of keys; at the
 * end one rounding to T. Values are at most 1. lse errs as the sum does, and by two roundings. */
static bool head_right(const attend_case *c, const attend_data *a, int64_t row,
                       int64_t head, const void *out, float lse) {
  int64_t counts[2] = {c->prefix, c->seen + row + 1}, keys = counts[0] + counts[1];
  double *o = calloc((size_t)c->d, sizeof *o), *logits = calloc((size_t)keys, sizeof *o);
  double worst = 0.0, highest = -INFINITY, sum = 0.0, slack, slacks = 0.0;
  for (int64_t i = 0; i < keys; i++) {
    int s = i >= counts[0];
    double size = 0.0;
    logits[i] = logit_of(c, a, row, head, s, s ? i - counts[0] : i, &size);
    worst = fmax(worst, size), highest = fmax(highest, logits[i]);
  }
  double error = EPS * 2 * (double)(c->d + 8) * (worst + 2);
  for (int64_t i = 0; i < keys; i++) {
    int s = i >= counts[0];
    int64_t j = (s ? i - counts[0] : i) * c->kv_heads + head / c->group;
    double weight = weight_of(logits[i], highest, error, c->dtype, &slack);
    sum += weight, slacks += slack;
    for (int64_t x = 0; x < c->d; x++)
      o[x] += weight * at(a->values[s], j * c->d + x, c->dtype);
  }
  double bound = 2 * slacks / sum + EPS * ((double)keys * 17 / 16 + 20);
  double unit = c->dtype == ACRE_F32 ? 0.0 : 0x1p-8; /* the last rounding */
  double exact = ceil(highest * 1.4426950408889634) + log2(sum);
  bool right = fabs((double)lse - exact) <= 1.5 * bound + EPS * 2 * (fabs(exact) + 16);
  for (int64_t x = 0; x < c->d; x++)
    right &= fabs(at(out, x, c->dtype) - o[x] / sum) <= bound + unit * fabs(o[x] / sum);
  free(o), free(logits);
  return right;
}

/* A table for one chip is here for what it does in its own way. */
static bool concerned(int i, const attend_case *c) {
  return i < plain_count || (c->dtype == ACRE_BF16 && (c->d == 64 || c->d == 128));
}

static void run_attend(int i, const attend_case *c, const attend_data *a, void *out,
                       float *lse, int64_t first, int64_t rows, bool split) {
  int64_t h = c->kv_heads * c->group, stride = h * c->d;
  acre_heads heads = {h, c->kv_heads, c->d, c->dtype};
  acre_keys prefix = {a->keys[0], a->values[0], c->bias ? a->bias[0] : NULL, c->prefix};
  acre_keys own = {a->keys[1], a->values[1], c->bias ? a->bias[1] : NULL, a->count[1]};
  backends[i]->ops->attend(queues[i], out, stride + 2 + c->shift, lse,
                           a->q + first * stride, stride, c->prefix ? &prefix : NULL, &own,
                           c->seen + first, rows, split, &heads);
}

/* n bytes of a pattern that must stay where nothing is written. */
static char *untouched(int64_t n) {
  char *x = guarded_alloc((size_t)n);
  memset(x, 0x7f, (size_t)n);
  return x;
}

static void attend_right(const attend_case *c, bool split) {
  int64_t size = (int64_t)acre_dtype_size(c->dtype), h = c->kv_heads * c->group;
  int64_t stride = (h * c->d + 2 + c->shift) * size, n = c->rows * stride;
  attend_data a = make_attention(c);
  char *first = NULL;
  for (int i = 0; i < backend_count; i++) {
    if (!concerned(i, c)) continue;
    char *out = untouched(n);
    float *lse = nans(c->rows * h);
    run_attend(i, c, &a, out, lse, 0, c->rows, split);
    if (judged(i)) {
      bool right = true;
      for (int64_t r = 0; r < c->rows; r++)
        for (int64_t head = 0; head < h; head++)
          right &= head_right(c, &a, r, head, out + r * stride + head * c->d * size,
                              lse[r * h + head]);
      CHECK(right);
      if (!right)
        fprintf(stderr,
                "  d %d g %d group %d prefix %d seen %d rows %d bf16 %d bias %d "
                "shift %d\n",
                (int)c->d, (int)c->kv_heads, (int)c->group, (int)c->prefix, (int)c->seen,
                (int)c->rows, c->dtype == ACRE_BF16, c->bias, (int)c->shift);
    }
    CHECK(!first || !to_the_bit(i) || same(first, out, n));
    for (int64_t r = 0; r < c->rows; r++)
      CHECK(out[r * stride + stride - 1] == 0x7f &&
            out[(r + 1) * stride - 2 * size] == 0x7f);
    for (int64_t some = 1; some <= c->rows - 2; some += acre_max(c->rows - 3, 1)) {
      char *alone = untouched(n); /* rows 1.. without the others: the same bits */
      run_attend(i, c, &a, alone, NULL, 1, some, false);
      CHECK(same(alone, out + stride, some * stride));
      guarded_free(alone);
    }
    guarded_free(lse);
    if (first)
      guarded_free(out);
    else
      first = out;
  }
  free_attention(c, &a);
  guarded_free(first);
}

static void test_attend(const attend_case *c) {
  attend_right(c, false);
  if (c->rows == 1) attend_right(c, true);
}

/* Windows: more items than a block has, more tiles than a ring, edges everywhere. */
static void test_windows(void) {
  test_attend(&(attend_case){64, 1, 8, 200, 0, 64, ACRE_BF16, true, 0});
  test_attend(&(attend_case){128, 2, 3, 77, 130, 100, ACRE_BF16, false, 0});
  test_attend(&(attend_case){64, 2, 1, 0, 7, 200, ACRE_BF16, false, 0});
  test_attend(&(attend_case){128, 1, 5, 128, 0, 130, ACRE_BF16, true, 0});
  test_attend(&(attend_case){64, 1, 2, 129, 1, 128, ACRE_BF16, false, 0});
  test_attend(&(attend_case){64, 1, 1, 0, 126, 130, ACRE_BF16, false, 0}); /* all but one */
  test_attend(&(attend_case){128, 1, 7, 1, 300, 65, ACRE_BF16, false, 0});
}

static void test_attends(void) {
  static const int64_t dims[] = {2, 16, 64, 80, 90, 96, 128};
  static const int64_t rows[] = {1, 2, 5, 40};
  static const int64_t prefixes[] = {0, 1, 64, 300};
  int64_t index = 0;
  for (int64_t d = 0; d < ACRE_COUNT(dims); d++)
    for (int64_t r = 0; r < ACRE_COUNT(rows); r++)
      for (int64_t p = 0; p < ACRE_COUNT(prefixes); p++, index++)
        test_attend(&(attend_case){dims[d], 1 + index % 3, 1 + index % 8, prefixes[p],
                                   index % 4 * 25, rows[r],
                                   index % 2 ? ACRE_BF16 : ACRE_F32, index / 2 % 2, 0});
  test_attend(&(attend_case){64, 1, 3, 2500, 17, 1, ACRE_BF16, true, 0}); /* many runs */
  test_attend(&(attend_case){16, 2, 40, 70, 3, 1, ACRE_F32, false, 0});   /* many heads */
  test_attend(&(attend_case){16, 1, 110, 70, 3, 5, ACRE_F32, false, 0});
  test_attend(&(attend_case){512, 1, 1, 30, 3, 7, ACRE_BF16, true, 0});
  test_attend(&(attend_case){512, 1, 2, 300, 3, 1, ACRE_F32, true, 0});
}

/* What matrix units do, in all ways that their tiles may be cut. */
static void test_tiles(void) {
  static const int64_t dims[] = {64, 80, 96, 128, 256};
  static const int64_t prefixes[] = {0, 1, 31, 64, 65, 130};
  for (int64_t i = 0; i < 40; i++) {
    int64_t group = 1 + i % 8, rows = i % 4 ? 1 + i * 7 % (160 / group) : 1;
    int64_t seen = (int64_t)(random_bits(&seed) % 70);
    test_attend(&(attend_case){dims[i % 5], 1 + i / 3 % 2, group, prefixes[i * 5 / 7 % 6],
                               i % 3 ? seen : 0, rows, ACRE_BF16, i / 2 % 2, i % 7 == 6});
  }
  test_attend(&(attend_case){64, 1, 19, 200, 90, 1, ACRE_BF16, true, 1}); /* many heads */
  test_attend(&(attend_case){256, 1, 2, 700, 3, 1, ACRE_BF16, false, 0}); /* many runs */
}

#ifdef ACRE_TEST_CUDA
/* What Hopper's kernel is not made for, the table for its chip does as that of 8.0 does. */
static void test_left_to_others(void) {
  static const attend_case cases[] = {{96, 2, 3, 70, 5, 40, ACRE_BF16, true, 0},
                                      {128, 1, 7, 300, 20, 1, ACRE_BF16, false, 0},
                                      {64, 1, 5, 65, 9, 30, ACRE_BF16, true, 1}};
  static const char *const kernels[] = {"attend_kernel<D>", "join_kernel<D>",
                                        "attend_kernel<D>"};
  for (int64_t k = 0; k < ACRE_COUNT(cases); k++) {
    const attend_case *c = &cases[k];
    int64_t n = c->rows * (c->kv_heads * c->group * c->d + 2 + c->shift) * 2;
    attend_data a = make_attention(c);
    char *out[2] = {untouched(n), untouched(n)};
    for (int i = 0; i < 2; i++) {
      run_attend(plain_count - 1 + i, c, &a, out[i], NULL, 0, c->rows, c->rows == 1);
      CHECK(strcmp(acre_host_kernel(), kernels[k]) == 0);
    }
    CHECK(same(out[0], out[1], n));
    guarded_free(out[0]), guarded_free(out[1]);
    free_attention(c, &a);
  }
}
#endif

/* ---------------------------------------------------------------- scoring */

static void test_score(int64_t t, int64_t m, int64_t d, acre_dtype dtype) {
  int64_t g = 2, group = 3, h = g * group;
  attend_case c = {d, g, group, m, 0, t, dtype, false, 0};
  attend_data a = make_attention(&c);
  uint8_t use[6] = {1, 0, 1, 0, 0, 1};
  float *old = random_floats(m), *first = NULL;
  double *exact = calloc((size_t)m, sizeof *exact), *p = calloc((size_t)m, sizeof *p);
  for (int64_t r = 0; r < t; r++) {
    for (int64_t head = 0; head < h; head++) {
      double sum = 0.0, size = 0.0;
      for (int64_t j = 0; j < m; j++)
        sum += p[j] = exp(logit_of(&c, &a, r, head, 0, j, &size));
      for (int64_t j = 0; use[head] && j < m; j++) exact[j] += p[j] / sum;
    }
  }
  acre_heads heads = {h, g, d, dtype};
  for (int i = 0; i < plain_count; i++) {
    float *scores = guarded_alloc((size_t)m * sizeof(float));
    memcpy(scores, old, (size_t)m * sizeof(float));
    backends[i]->ops->score(queues[i], scores, a.q, h * d, a.keys[0], use, t, m, &heads);
    bool right = true;
    for (int64_t j = 0; j < m; j++)
      right &= fabs(scores[j] - (old[j] + exact[j])) <=
               EPS * ((double)(4 * d + 40) * 8 + (double)t * 3) * (exact[j] + 1e-3) + 1e-6;
    CHECK(right);
    CHECK(!first || !to_the_bit(i) || same(first, scores, m * 4));
    if (first)
      guarded_free(scores);
    else
      first = scores;
  }
  free_attention(&c, &a);
  guarded_free(first), guarded_free(old), free(exact), free(p);
}

int main(int argc, char **argv) {
  if (!open_backends(argc, argv, 8)) return 1;
  plain_count = backend_count;
#ifdef ACRE_TEST_CUDA
  if (!plugin_under_test() && !open_cuda_of(9, 0)) return 1;
#endif
  test_attends();
  test_tiles();
  test_windows();
#ifdef ACRE_TEST_CUDA
  if (!plugin_under_test()) test_left_to_others();
#endif
  test_score(1, 1, 64, ACRE_F32);
  test_score(40, 300, 64, ACRE_BF16);
  test_score(7, 130, 90, ACRE_F32);
  test_score(130, 64, 16, ACRE_BF16);
  test_score(300, 40, 6, ACRE_F32); /* many items */
  close_backends();
  return check_report();
}
