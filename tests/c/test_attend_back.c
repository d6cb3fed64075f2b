/* The gradient through attention, for every backend: within a derived bound of a float64
 * loop over the same normalisers, the same bits for all of them, all of the output written
 * and nothing beyond. Also the normalisers that attention gives. */
#include "backends.h"

typedef struct back_case {
  int64_t d, kv_heads, group, prefix, rows;
  acre_dtype dtype;
  bool bias;
  float loud;    /* factor of the queries */
  int64_t shift; /* numbers in front of q, keys and values: 0 where they are aligned */
} back_case;

typedef struct back_data {
  void *q, *out; /* [rows, h, d] of T */
  float *q_f32, *dout, *lse;
  void *keys[2], *values[2]; /* prefix, own */
  float *bias[2];
  int64_t count[2];
} back_data;

/* What a backend writes, or its exact value with a bound of the error. */
typedef struct gradients {
  float *dqkv, *dk, *dv;
} gradients;

typedef struct exact {
  double *dq, *dk[2], *dv[2]; /* [rows, h, d], [count, g, d] */
} exact;

static int64_t heads_of(const back_case *c) { return c->kv_heads * c->group; }
static int64_t stride_of(const back_case *c) {
  return (heads_of(c) + 2 * c->kv_heads) * c->d;
}

static acre_heads sizes(const back_case *c) {
  return (acre_heads){heads_of(c), c->kv_heads, c->d, c->dtype};
}

static acre_keys keys_of(const back_case *c, const back_data *a, int s) {
  return (acre_keys){a->keys[s], a->values[s], c->bias ? a->bias[s] : NULL, a->count[s]};
}

/* n numbers of T behind `shift` others. */
static void *shifted(const back_case *c, int64_t n) {
  char *x = random_typed(n + c->shift, c->dtype);
  return x + c->shift * (int64_t)acre_dtype_size(c->dtype);
}

static void free_shifted(const back_case *c, void *x) {
  guarded_free((char *)x - c->shift * (int64_t)acre_dtype_size(c->dtype));
}

static back_data make_data(const back_case *c) {
  int64_t n = c->rows * heads_of(c) * c->d, width = c->kv_heads * c->d;
  back_data a = {.count = {c->prefix, c->rows}};
  a.q_f32 = random_floats(n);
  a.q = shifted(c, n);
  a.out = guarded_alloc((size_t)n * acre_dtype_size(c->dtype));
  for (int64_t i = 0; i < n; i++) {
    a.q_f32[i] = as(a.q_f32[i] * c->loud, c->dtype);
    if (c->dtype == ACRE_BF16)
      ((uint16_t *)a.q)[i] = acre_to_bf16(a.q_f32[i]);
    else
      ((float *)a.q)[i] = a.q_f32[i];
  }
  a.dout = random_floats(n);
  a.lse = nans(c->rows * heads_of(c));
  for (int s = 0; s < 2; s++) {
    a.keys[s] = shifted(c, a.count[s] * width);
    a.values[s] = shifted(c, a.count[s] * width);
    a.bias[s] = random_floats(a.count[s]);
  }
  return a;
}

static void free_data(const back_case *c, back_data *a) {
  free_shifted(c, a->q), guarded_free(a->out), guarded_free(a->q_f32);
  guarded_free(a->dout), guarded_free(a->lse);
  for (int s = 0; s < 2; s++) {
    free_shifted(c, a->keys[s]), free_shifted(c, a->values[s]);
    guarded_free(a->bias[s]);
  }
}

/* ---------------------------------------------------------------- exact values */

static void add_bounded(double *to, double value, double error) {
  to[0] += value, to[1] += error;
}

/* Sum of x[i] y[i], and in *error the bound of one added up in float32 in any order. */
static double dot(const double *x, const double *y, int64_t n, double *error) {
  double sum = 0.0, size = 0.0;
  for (int64_t i = 0; i < n; i++) sum += x[i] * y[i], size += fabs(x[i] * y[i]);
  *error = EPS * (double)(n + 18) * size;
  return sum;
}

static void widen(double *to, const void *x, int64_t first, int64_t n, acre_dtype dtype) {
  for (int64_t i = 0; i < n; i++) to[i] = at(x, first + i, dtype);
}

/* One item with what one key gives it. The exponent is off by the error of the logit and
 * three roundings; from there on p and ds by it and what exp2 and products round, then by
 * half a step of T. A sum of n such terms adds n roundings of its size. */
typedef struct pair_sums {
  double q[ACRE_HEAD_DIM_MAX], dout[ACRE_HEAD_DIM_MAX], lse, delta, delta_error;
} pair_sums;

static void add_pair(const back_case *c, const back_data *a, const pair_sums *item,
                     const exact *e, int64_t item_first, int s, int64_t j, int64_t kv) {
  double k[ACRE_HEAD_DIM_MAX], v[ACRE_HEAD_DIM_MAX], logit_error, dp_error;
  int64_t d = c->d, first = (j * c->kv_heads + kv) * d;
  double unit = c->dtype == ACRE_F32 ? 0.0 : 0x1p-8, root = sqrt((double)d);
  double sums = EPS * (double)(a->count[0] + a->count[1] + c->rows * c->group + 8);
  widen(k, a->keys[s], first, d, c->dtype), widen(v, a->values[s], first, d, c->dtype);
  double logit = dot(item->q, k, d, &logit_error) / root;
  double bias = c->bias ? a->bias[s][j] : 0.0;
  double x = (logit + bias) * 1.4426950408889634 - item->lse;
  double off = logit_error / root + EPS * 4 * (fabs(logit) + fabs(bias) + fabs(item->lse));
  double p = exp2(x), p_off = 1.1 * off + EPS * 2, p_error = p * (p_off + unit);
  double dp = dot(item->dout, v, d, &dp_error), gap = dp - item->delta;
  double ds = p * gap / root, ds_error = p_off + EPS * 4;
  ds_error = ds_error * fabs(ds) + p / root * (dp_error + item->delta_error) * 1.1;
  ds_error += unit * (fabs(ds) + ds_error);
  for (int64_t i = 0; i < d; i++) {
    add_bounded(&e->dv[s][2 * (first + i)], p * item->dout[i],
                (p_error + sums * p) * fabs(item->dout[i]));
    add_bounded(&e->dk[s][2 * (first + i)], ds * item->q[i],
                (ds_error + sums * fabs(ds)) * fabs(item->q[i]));
    add_bounded(&e->dq[2 * (item_first + i)], ds * k[i],
                (ds_error + sums * fabs(ds)) * fabs(k[i]));
  }
}

/* Numbers and their bounds, side by side. */
static exact exact_gradients(const back_case *c, const back_data *a) {
  int64_t h = heads_of(c), d = c->d, width = c->kv_heads * d;
  exact e = {.dq = calloc((size_t)(2 * c->rows * h * d), sizeof(double))};
  for (int s = 0; s < 2; s++) {
    e.dk[s] = calloc((size_t)(2 * a->count[s] * width + 1), sizeof(double));
    e.dv[s] = calloc((size_t)(2 * a->count[s] * width + 1), sizeof(double));
  }
  for (int64_t i = 0; i < c->rows * h; i++) {
    pair_sums item = {.lse = a->lse[i]};
    double out[ACRE_HEAD_DIM_MAX];
    widen(item.q, a->q, i * d, d, c->dtype), widen(out, a->out, i * d, d, c->dtype);
    for (int64_t x = 0; x < d; x++) item.dout[x] = as(a->dout[i * d + x], c->dtype);
    item.delta = dot(item.dout, out, d, &item.delta_error);
    for (int64_t j = 0; j < c->prefix; j++)
      add_pair(c, a, &item, &e, i * d, 0, j, i % h / c->group);
    for (int64_t j = 0; j <= i / h; j++)
      add_pair(c, a, &item, &e, i * d, 1, j, i % h / c->group);
  }
  return e;
}

static void free_exact(exact *e) {
  free(e->dq);
  for (int s = 0; s < 2; s++) free(e->dk[s]), free(e->dv[s]);
}

/* Rows of `width` of what was got, y_stride apart, against rows of pairs. */
static bool near(const float *got, int64_t got_stride, const double *right, int64_t rows,
                 int64_t width) {
  for (int64_t i = 0; i < rows; i++)
    for (int64_t x = 0; x < width; x++) {
      const double *y = right + 2 * (i * width + x);
      if (!(fabs(got[i * got_stride + x] - y[0]) <= y[1] + 1e-30)) return false;
    }
  return true;
}

/* ---------------------------------------------------------------- one case */

/* log2 of the sum of exponentials; its error is that of a logit and of the sum: a
 * rounding per key, and half a step of T of the weights. */
static bool lse_right(const back_case *c, const back_data *a, int64_t i) {
  int64_t h = heads_of(c), d = c->d, row = i / h, kv = i % h / c->group;
  double q[ACRE_HEAD_DIM_MAX], k[ACRE_HEAD_DIM_MAX], sum = 0.0, worst = 0.0, error;
  widen(q, a->q, i * d, d, c->dtype);
  for (int64_t j = 0; j < c->prefix + row + 1; j++) {
    int s = j >= c->prefix;
    int64_t key = s ? j - c->prefix : j;
    widen(k, a->keys[s], (key * c->kv_heads + kv) * d, d, c->dtype);
    double logit = dot(q, k, d, &error) + 0.0, bias = c->bias ? a->bias[s][key] : 0.0;
    logit = logit / sqrt((double)d) + bias;
    sum += exp(logit);
    worst = fmax(worst, error + EPS * 4 * (fabs(logit) + fabs(bias)));
  }
  double unit = c->dtype == ACRE_F32 ? 0.0 : 0x1p-8;
  double bound = worst + unit + EPS * (double)(c->prefix + row + 20);
  return fabs(a->lse[i] - log2(sum)) <= 1.5 * bound + 2 * EPS * fabs(log2(sum));
}

/* out and lse as attention gives them. */
static void attend(const back_case *c, back_data *a, int i) {
  int64_t width = heads_of(c) * c->d;
  acre_heads heads = sizes(c);
  acre_keys prefix = keys_of(c, a, 0), own = keys_of(c, a, 1);
  backends[i]->ops->attend(queues[i], a->out, width, a->lse, a->q_f32, width,
                           c->prefix ? &prefix : NULL, &own, 0, c->rows, false, &heads);
}

static gradients run_back(const back_case *c, const back_data *a, int i) {
  int64_t n = c->kv_heads * c->d * c->prefix;
  gradients y = {nans(c->rows * stride_of(c)), nans(n), nans(n)};
  float *scratch = nans((ACRE_ATTEND_PARTS - 1) * c->rows * heads_of(c) * c->d);
  acre_heads heads = sizes(c);
  acre_keys prefix = keys_of(c, a, 0), own = keys_of(c, a, 1);
  backends[i]->ops->attend_back(queues[i], y.dqkv, y.dk, y.dv, scratch, a->dout, a->out,
                                a->lse, a->q, c->prefix ? &prefix : NULL, &own, c->rows,
                                &heads);
  guarded_free(scratch);
  return y;
}

static void free_gradients(gradients *y) {
  guarded_free(y->dqkv), guarded_free(y->dk), guarded_free(y->dv);
}

static bool gradients_right(const back_case *c, const back_data *a, const gradients *y) {
  int64_t g = c->kv_heads, h = heads_of(c), d = c->d, stride = stride_of(c);
  exact e = exact_gradients(c, a);
  bool right = near(y->dqkv, stride, e.dq, c->rows, h * d) &&
               near(y->dqkv + h * d, stride, e.dk[1], c->rows, g * d) &&
               near(y->dqkv + (h + g) * d, stride, e.dv[1], c->rows, g * d) &&
               near(y->dk, g * d, e.dk[0], c->prefix, g * d) &&
               near(y->dv, g * d, e.dv[0], c->prefix, g * d);
  free_exact(&e);
  return right;
}

static bool same_gradients(const back_case *c, const gradients *a, const gradients *b) {
  int64_t n = c->kv_heads * c->d * c->prefix * (int64_t)sizeof(float);
  return same(a->dqkv, b->dqkv, c->rows * stride_of(c) * (int64_t)sizeof(float)) &&
         same(a->dk, b->dk, n) && same(a->dv, b->dv, n);
}

/* Against exact values: first what attention gives, then the gradient from there. */
static bool judge(const back_case *c, back_data *a, int i, gradients *y) {
  bool right = true;
  attend(c, a, i);
  for (int64_t j = 0; j < c->rows * heads_of(c); j++) right &= lse_right(c, a, j);
  CHECK(right);
  *y = run_back(c, a, i);
  right &= gradients_right(c, a, y);
  CHECK(right);
  return right;
}

static void test_case(const back_case *c) {
  back_data a = make_data(c);
  gradients first, y;
  bool right = judge(c, &a, 0, &first);
  for (int i = 1; i < backend_count; i++) {
    if (judged(i)) {
      right &= judge(c, &a, i, &y);
    } else {
      y = run_back(c, &a, i);
      bool equal = same_gradients(c, &y, &first);
      CHECK(equal);
      right &= equal;
    }
    free_gradients(&y);
  }
  if (!right)
    fprintf(stderr, "  d %d g %d group %d prefix %d rows %d bf16 %d bias %d\n", (int)c->d,
            (int)c->kv_heads, (int)c->group, (int)c->prefix, (int)c->rows,
            c->dtype == ACRE_BF16, c->bias);
  free_gradients(&first);
  free_data(c, &a);
}

static void test_shapes(void) {
  static const int64_t dims[] = {2, 6, 16, 64, 80, 90, 128};
  int64_t index = 0;
  for (int64_t n = 0; n < ACRE_COUNT(dims); n++)
    for (int64_t i = 0; i < 8; i++, index++) {
      int64_t group = 1 + index % 8, prefix = (int64_t)(random_bits(&seed) % 201);
      int64_t rows = 1 + (int64_t)(random_bits(&seed) % (uint64_t)(150 / group));
      test_case(&(back_case){dims[n], 1 + index % 3, group, i % 3 ? prefix : 0, rows,
                             i % 2 ? ACRE_BF16 : ACRE_F32, i / 2 % 2, 3.0f, 0});
    }
  test_case(&(back_case){16, 1, 3, 200, 150, ACRE_BF16, true, 3.0f, 0});
  test_case(&(back_case){16, 2, 1, 64, 128, ACRE_F32, false, 30.0f, 0}); /* sharp weights */
  test_case(&(back_case){64, 1, 1, 900, 65, ACRE_BF16, false, 1.0f, 0}); /* many units */
  for (int dtype = 0; dtype < 2; dtype++) {
    test_case(&(back_case){256, 1, 2, 70, 40, (acre_dtype)dtype, true, 3.0f, 0});
    test_case(&(back_case){270, 1, 3, 5, 9, (acre_dtype)dtype, true, 3.0f, 0});
    test_case(&(back_case){512, 1, 2, 66, 20, (acre_dtype)dtype, false, 3.0f, 0});
    test_case(&(back_case){32, 2, 2, 0, 1, (acre_dtype)dtype, false, 3.0f, 0});
  }
}

/* What matrix units do, in all ways that their tiles may be cut. */
static void test_tiles(void) {
  static const int64_t dims[] = {64, 80, 96, 128, 256};
  static const int64_t prefixes[] = {0, 1, 31, 64, 65, 130};
  for (int64_t i = 0; i < 20; i++) {
    int64_t group = 1 + i * 3 % 8, rows = 1 + (int64_t)(random_bits(&seed) % (130 / group));
    test_case(&(back_case){dims[i % 5], 1 + i / 3 % 2, group, prefixes[i * 5 / 7 % 6], rows,
                           ACRE_BF16, i / 2 % 2, i % 6 ? 3.0f : 20.0f, i % 7 == 6});
  }
}

int main(int argc, char **argv) {
  if (!open_backends(argc, argv, 10)) return 1;
  test_shapes();
  test_tiles();
  close_backends();
  return check_report();
}
