/* The operations of training, in every table and for one and three threads: within a derived
 * bound of a float64 loop, the same bits on any CPU, nothing written where nothing belongs.
 * Gradients through formulas are also compared with central differences of the formula. */
#include "backends.h"

#define HALF(dtype) ((dtype) == ACRE_F32 ? 0.0 : 0x1p-8) /* relative rounding to T, more */

static int64_t bytes_of(int64_t n, acre_dtype dtype) {
  return n * (int64_t)acre_dtype_size(dtype);
}

static void *copy_of(const void *x, int64_t bytes) {
  return memcpy(guarded_alloc((size_t)bytes), x, (size_t)bytes);
}

/* n elements of T, all of them NaN. */
static void *poisoned(int64_t n, acre_dtype dtype) {
  void *y = guarded_alloc((size_t)bytes_of(n, dtype));
  return memset(y, 0xff, (size_t)bytes_of(n, dtype));
}

/* Keeps the first backend's result, to which those of other tables must be equal. */
static void keep_first(int i, void **first, void *y, int64_t bytes) {
  if (!*first) {
    *first = y;
    return;
  }
  CHECK(!to_the_bit(i) || same(*first, y, bytes));
  guarded_free(y);
}

/* ---------------------------------------------------------------- matrices */

typedef struct matrix_case {
  int64_t N, K;
  acre_dtype dtype;
  acre_weights weights;
} matrix_case;

static acre_matrix *make_matrix(int i, const matrix_case *c, const float *w) {
  acre_matrix *matrix;
  bool finite = true;
  acre_array host = {w, ACRE_F32, 2, {c->N, c->K}, {c->K, 1}, false};
  CHECK(backends[i]->ops->matrix_create(backends[i], &matrix, c->N, c->K, c->dtype,
                                        c->weights, NULL) == ACRE_OK);
  backends[i]->ops->matrix_fill(matrix, 0, &host, &finite);
  CHECK(finite);
  return matrix;
}

/* [N, K], column by column: products with the rows of a unit matrix, which are exact. */
static float *by_products(int i, const acre_matrix *W, int64_t N, int64_t K,
                          acre_dtype dtype) {
  float *unit = guarded_alloc((size_t)(K * K) * sizeof(float)), *y = nans(K * N);
  uint16_t *half = guarded_alloc((size_t)(K * K) * sizeof *half);
  for (int64_t k = 0; k < K * K; k++)
    unit[k] = k / K == k % K, half[k] = acre_to_bf16(unit[k]);
  const void *x = dtype == ACRE_F32 ? (void *)unit : half;
  backends[i]->ops->matmul(queues[i], y, N, x, W, NULL, K, false);
  float *w = guarded_alloc((size_t)(N * K) * sizeof(float));
  for (int64_t n = 0; n < N; n++)
    for (int64_t k = 0; k < K; k++) w[n * K + k] = y[k * N + n];
  guarded_free(unit), guarded_free(half), guarded_free(y);
  return w;
}

static void check_transpose(int i, const acre_matrix *W, const float *w,
                            const matrix_case *c) {
  const acre_backend_ops *ops = backends[i]->ops;
  acre_matrix *turned = NULL;
  CHECK(ops->matrix_transpose(queues[i], &turned, W, NULL) == ACRE_OK);
  float *rows = nans(c->K * c->N);
  float *products = by_products(i, turned, c->K, c->N, c->dtype);
  ops->matrix_get(queues[i], rows, turned, 0, c->K);
  CHECK(same(rows, products, c->K * c->N * 4));
  bool right = true;
  for (int64_t n = 0; n < c->N; n++)
    for (int64_t k = 0; k < c->K; k++) right &= rows[k * c->N + n] == w[n * c->K + k];
  CHECK(right);
  ops->matrix_release(turned);
  guarded_free(rows), guarded_free(products);
}

/* Rows [first, first + rows) read, overwritten, read again; the others stay. */
static void check_get_set(int i, acre_matrix *W, const float *w, const matrix_case *c) {
  const acre_backend_ops *ops = backends[i]->ops;
  int64_t first = c->N / 3, rows = acre_ceil_div(c->N, 2), K = c->K;
  float *x = nans(rows * K), *all = nans(c->N * K), *new = random_floats(rows * K);
  ops->matrix_get(queues[i], x, W, first, rows);
  CHECK(same(x, w + first * K, rows * K * 4));
  ops->matrix_get(queues[i], NULL, W, first, 0);
  if (c->weights != ACRE_WEIGHTS_Q8) {
    ops->matrix_set(queues[i], W, first, new, rows);
    ops->matrix_set(queues[i], W, first, NULL, 0);
    ops->matrix_get(queues[i], all, W, 0, c->N);
    bool right = true;
    for (int64_t j = 0; j < c->N * K; j++) {
      int64_t n = j / K - first;
      right &= all[j] == (n < 0 || n >= rows ? w[j] : as(new[j - first * K], c->dtype));
    }
    CHECK(right);
    float *products = by_products(i, W, c->N, K, c->dtype);
    CHECK(same(products, all, c->N * K * 4));
    guarded_free(products);
  }
  guarded_free(x), guarded_free(all), guarded_free(new);
}

static void test_matrix(matrix_case c) {
  float *w = random_floats(c.N * c.K);
  for (int i = 0; i < backend_count; i++) {
    acre_matrix *W = make_matrix(i, &c, w);
    float *kept = by_products(i, W, c.N, c.K, c.dtype);
    bool right = true;
    for (int64_t j = 0; j < c.N * c.K; j++)
      right &= c.weights == ACRE_WEIGHTS_Q8 ? fabsf(kept[j] - w[j]) < 0.01f
                                            : kept[j] == as(w[j], c.dtype);
    CHECK(right);
    check_transpose(i, W, kept, &c);
    check_get_set(i, W, kept, &c);
    backends[i]->ops->matrix_release(W);
    guarded_free(kept);
  }
  guarded_free(w);
}

static void test_matrices(void) {
  static const int64_t sizes[][2] = {{1, 1},   {16, 32}, {17, 33}, {50, 3},
                                     {5, 100}, {7, 1},   {1, 7}};
  for (int64_t s = 0; s < ACRE_COUNT(sizes); s++) {
    int64_t N = sizes[s][0], K = sizes[s][1];
    test_matrix((matrix_case){N, K, ACRE_F32, ACRE_WEIGHTS_SAME});
    test_matrix((matrix_case){N, K, ACRE_BF16, ACRE_WEIGHTS_SAME});
    test_matrix((matrix_case){N, K, ACRE_BF16, ACRE_WEIGHTS_Q8});
  }
  acre_matrix *turned = NULL;
  acre_matrix *W = make_matrix(0, &(matrix_case){2, 3, ACRE_F32, 0}, (float[6]){0});
  for (int64_t n = 1; n <= 3; n++) {
    acre_alloc_fail_at(n);
    acre_status status = backends[0]->ops->matrix_transpose(queues[0], &turned, W, NULL);
    CHECK(status == ACRE_NO_MEMORY && !turned);
  }
  acre_alloc_fail_at(0);
  backends[0]->ops->matrix_release(W);
}

/* ---------------------------------------------------------------- rows */

static void test_round(int64_t rows, int64_t width, acre_dtype dtype) {
  int64_t x_stride = width + 5, y_stride = width + 3, n = rows * y_stride;
  float *x = random_floats(rows * x_stride);
  for (int i = 0; i < backend_count; i++) {
    void *y = poisoned(n, dtype);
    backends[i]->ops->round(queues[i], y, y_stride, x, x_stride, rows, width, dtype);
    bool right = true;
    for (int64_t j = 0; j < n; j++) {
      float wanted = as(x[j / y_stride * x_stride + j % y_stride % x_stride], dtype);
      right &= j % y_stride < width ? at(y, j, dtype) == wanted : isnan(at(y, j, dtype));
    }
    CHECK(right);
    guarded_free(y);
  }
  guarded_free(x);
}

/* The additions have an order, so the result has one value. */
static void test_add_rows(int64_t rows, int64_t width, bool indexed) {
  enum { TARGETS = 7 };
  int64_t x_stride = width + 5, y_stride = width + 3;
  int64_t n = acre_max(rows, TARGETS) * y_stride;
  float *x = random_floats(rows * x_stride), *old = random_floats(n);
  float *wanted = copy_of(old, n * 4);
  int32_t *index = guarded_alloc((size_t)rows * sizeof *index);
  for (int64_t i = 0; i < rows; i++) {
    index[i] = (int32_t)(random_bits(&seed) % TARGETS);
    float *to = wanted + (indexed ? index[i] : i) * y_stride;
    for (int64_t c = 0; c < width; c++) to[c] += x[i * x_stride + c];
  }
  for (int i = 0; i < backend_count; i++) {
    float *y = copy_of(old, n * 4);
    backends[i]->ops->add_rows(queues[i], y, y_stride, x, x_stride, indexed ? index : NULL,
                               rows, width);
    CHECK(same(y, wanted, n * 4));
    guarded_free(y);
  }
  guarded_free(x), guarded_free(old), guarded_free(wanted), guarded_free(index);
}

/* ---------------------------------------------------------------- rmsnorm */

/* sum of dy * rmsnorm(x), of which rmsnorm_back gives the gradient by x. */
static double norm_loss(const double *x, const float *dy, const float *gain, int64_t n) {
  double squares = 0.0, sum = 0.0;
  for (int64_t i = 0; i < n; i++) squares += x[i] * x[i];
  double factor = 1 / sqrt(squares / (double)n + 1e-5);
  for (int64_t i = 0; i < n; i++) sum += dy[i] * x[i] * factor * gain[i];
  return sum;
}

static void check_norm_row(const float *dx, const float *old, const float *dy,
                           const float *x, const float *gain, int64_t n) {
  double wide[2048], squares = 0.0, sum = 0.0, size = 0.0;
  for (int64_t i = 0; i < n; i++) {
    double d = (double)dy[i] * gain[i];
    wide[i] = x[i], squares += wide[i] * wide[i];
    sum += d * x[i], size += fabs(d * x[i]);
  }
  double factor = 1 / sqrt(squares / (double)n + 1e-5),
         roundings = 4 * ((double)n / 16 + 8);
  bool right = true;
  for (int64_t i = 0; i < n; i++) {
    double own = (double)dy[i] * gain[i] * factor, cube = factor * factor * factor * x[i];
    double exact = old[i] + own - cube * sum / (double)n;
    double error = roundings * (fabs(own) + fabs(cube) * size / (double)n) + fabs(exact);
    right &= fabs(dx[i] - exact) <= EPS * error;
  }
  CHECK(right);
  for (int64_t i = 0; i < n; i += acre_max(1, n / 5)) {
    double h = 1e-4, kept = wide[i], up, down;
    wide[i] = kept + h, up = norm_loss(wide, dy, gain, n);
    wide[i] = kept - h, down = norm_loss(wide, dy, gain, n);
    wide[i] = kept;
    double slope = (up - down) / (2 * h), got = (double)dx[i] - old[i];
    right &= fabs(got - slope) <= 1e-5 * (1 + factor * factor * factor);
  }
  CHECK(right);
}

static void test_rmsnorm_back(int64_t rows, int64_t n) {
  float *dy = random_floats(rows * n), *x = random_floats(rows * n);
  float *gain = random_floats(n), *old = random_floats(rows * n);
  void *first = NULL;
  for (int i = 0; i < backend_count; i++) {
    float *dx = copy_of(old, rows * n * 4);
    backends[i]->ops->rmsnorm_back(queues[i], dx, dy, x, gain, 1e-5, rows, n);
    for (int64_t r = 0; judged(i) && r < rows; r++)
      check_norm_row(dx + r * n, old + r * n, dy + r * n, x + r * n, gain, n);
    keep_first(i, &first, dx, rows * n * 4);
  }
  guarded_free(dy), guarded_free(x), guarded_free(gain), guarded_free(old);
  guarded_free(first);
}

/* ---------------------------------------------------------------- swiglu */

static double silu(double g) { return g / (1 + exp(-g)); }

static void check_swiglu_back(double dgate, double dup, double g, double u, double dy,
                              acre_dtype dtype, bool *right) {
  double s = 1 / (1 + exp(-g)), by_up = dy * g * s, h = 1e-4;
  double by_gate = dy * u * s * (1 + g * (1 - s));
  double size = fabs(dy * u) * s * (1 + fabs(g) * (1 - s));
  *right &= fabs(dup - by_up) <= (8 * EPS + HALF(dtype)) * fabs(by_up) + 1e-35;
  *right &= fabs(dgate - by_gate) <= 16 * EPS * size + HALF(dtype) * fabs(by_gate) + 1e-35;
  double slope = dy * u * (silu(g + h) - silu(g - h)) / (2 * h);
  *right &= fabs(dgate - slope) <= (1e-6 + HALF(dtype)) * (1 + fabs(slope));
}

static void test_swiglu_back(int64_t rows, int64_t width, acre_dtype dtype) {
  int64_t n = rows * width, bytes = bytes_of(n, dtype);
  float *gate = random_floats(n), *up = random_floats(n), *dy = random_floats(n);
  void *first_gate = NULL, *first_up = NULL;
  float most = dtype == ACRE_F32 ? 100.0f : 60.0f; /* no bf16 below 2^-126 */
  for (int64_t i = 0; i < n; i++) gate[i] *= i % 3 ? 4.0f : most;
  for (int i = 0; i < backend_count; i++) {
    void *dgate = poisoned(n, dtype), *dup = poisoned(n, dtype);
    backends[i]->ops->swiglu_back(queues[i], dgate, dup, gate, up, dy, rows, width, dtype);
    bool right = true;
    for (int64_t j = 0; judged(i) && j < n; j++)
      check_swiglu_back(at(dgate, j, dtype), at(dup, j, dtype), gate[j], up[j], dy[j],
                        dtype, &right);
    CHECK(right);
    keep_first(i, &first_gate, dgate, bytes), keep_first(i, &first_up, dup, bytes);
  }
  guarded_free(gate), guarded_free(up), guarded_free(dy);
  guarded_free(first_gate), guarded_free(first_up);
}

/* ---------------------------------------------------------------- cross entropy */

static double row_loss(const float *logits, int64_t vocab, int64_t target, int64_t moved,
                       double by) {
  double sum = 0.0, own = (double)logits[target] + (target == moved ? by : 0.0);
  for (int64_t c = 0; c < vocab; c++)
    sum += exp((double)logits[c] + (c == moved ? by : 0.0) - own);
  return log(sum);
}

static void check_loss_row(const void *dlogits, int64_t from, float out,
                           const float *logits, int64_t target, double weight,
                           int64_t vocab, acre_dtype dtype) {
  bool right = true;
  double loss = target < 0 ? 0.0 : row_loss(logits, vocab, target, -1, 0.0);
  right &= fabs(out - loss) <= 16 * EPS * (1 + fabs(loss));
  for (int64_t c = 0; c < vocab; c++) {
    double got = at(dlogits, from + c, dtype);
    if (target < 0) {
      right &= got == 0.0;
      continue;
    }
    double p = exp((double)logits[c] - logits[target] - loss);
    double exact = weight * (p - (c == target));
    double error = EPS * (100 * p + (c == target)) * fabs(weight);
    right &= fabs(got - exact) <= error + HALF(dtype) * fabs(exact) + 1e-37;
    if (c % acre_max(1, vocab / 7) != 0 && c != target) continue;
    double up = row_loss(logits, vocab, target, c, 1e-4);
    double slope = weight * (up - row_loss(logits, vocab, target, c, -1e-4)) / 2e-4;
    right &= fabs(got - slope) <= (1e-6 + HALF(dtype)) * (1 + fabs(slope));
  }
  CHECK(right);
}

static void test_cross_entropy_back(int64_t rows, int64_t vocab, acre_dtype dtype) {
  int64_t n = rows * vocab;
  float *logits = random_floats(n), *weight = random_floats(rows), *alone = nans(rows);
  int32_t *target = guarded_alloc((size_t)rows * sizeof *target);
  void *first = NULL, *first_out = NULL;
  for (int64_t i = 0; i < n; i++) logits[i] *= 20;
  for (int64_t i = 0; i < rows; i++)
    target[i] = i % 4 == 1 ? -1 : (int32_t)(random_bits(&seed) % (uint64_t)vocab);
  for (int i = 0; i < backend_count; i++) {
    void *dlogits = poisoned(n, dtype);
    float *out = nans(rows);
    backends[i]->ops->cross_entropy_back(queues[i], dlogits, out, logits, target, weight,
                                         rows, vocab, dtype);
    for (int64_t r = 0; judged(i) && r < rows; r++)
      check_loss_row(dlogits, r * vocab, out[r], logits + r * vocab, target[r], weight[r],
                     vocab, dtype);
    backends[i]->ops->cross_entropy(queues[i], alone, logits, target, rows, vocab);
    CHECK(!to_the_bit(i) || same(alone, out, rows * 4));
    keep_first(i, &first, dlogits, bytes_of(n, dtype)),
        keep_first(i, &first_out, out, rows * 4);
  }
  guarded_free(logits), guarded_free(weight), guarded_free(target), guarded_free(alone);
  guarded_free(first), guarded_free(first_out);
}

/* ---------------------------------------------------------------- matmul */

static bool products_right(const float *dW, const float *old, const float *dy,
                           int64_t stride, const void *x, int64_t rows, int64_t N,
                           int64_t K, acre_dtype dtype) {
  for (int64_t at_W = 0; at_W < N * K; at_W++) {
    double sum = old[at_W], size = fabs(sum);
    for (int64_t i = 0; i < rows; i++) {
      double p = (double)dy[i * stride + at_W / K] * at(x, i * K + at_W % K, dtype);
      sum += p, size += fabs(p);
    }
    if (!(fabs(dW[at_W] - sum) <= EPS * (double)(rows + 1) * size)) return false;
  }
  return true;
}

/* In two calls it is the same chain as in one. */
static void test_matmul_back(int64_t rows, int64_t N, int64_t K, acre_dtype dtype) {
  int64_t stride = N + 3, cut = rows / 3;
  float *dy = random_floats(rows * stride), *old = random_floats(N * K);
  void *x = random_typed(rows * K, dtype), *first = NULL;
  const void *x_cut = (const char *)x + bytes_of(cut * K, dtype);
  for (int i = 0; i < backend_count; i++) {
    const acre_backend_ops *ops = backends[i]->ops;
    float *dW = copy_of(old, N * K * 4), *parts = copy_of(old, N * K * 4);
    ops->matmul_back(queues[i], dW, dy, stride, x, rows, N, K, dtype);
    if (judged(i)) CHECK(products_right(dW, old, dy, stride, x, rows, N, K, dtype));
    ops->matmul_back(queues[i], parts, dy, stride, x, cut, N, K, dtype);
    ops->matmul_back(queues[i], parts, dy + cut * stride, stride, x_cut, rows - cut, N, K,
                     dtype);
    CHECK(!to_the_bit(i) || same(parts, dW, N * K * 4));
    guarded_free(parts);
    keep_first(i, &first, dW, N * K * 4);
  }
  guarded_free(dy), guarded_free(old), guarded_free(x), guarded_free(first);
}

static void test_matmul_backs(void) {
  static const int64_t sizes[][3] = {{1, 1, 1},     {3, 17, 15},   {40, 33, 48},
                                     {129, 50, 70}, {7, 300, 401}, {260, 13, 19}};
  for (int64_t s = 0; s < ACRE_COUNT(sizes); s++)
    for (int dtype = 0; dtype < 2; dtype++)
      test_matmul_back(sizes[s][0], sizes[s][1], sizes[s][2], (acre_dtype)dtype);
}

/* ---------------------------------------------------------------- score */

typedef struct score_case {
  int64_t t, m;
  acre_heads heads;
  const void *q, *keys;
  const float *pull;
  const uint8_t *use;
} score_case;

/* Adds one item's gradients, and the sizes that their errors are relative to. */
static void add_item(const score_case *c, int64_t row, int64_t head, double *dq, double *dk,
                     double *dq_size, double *dk_size) {
  int64_t d = c->heads.head_dim, g = c->heads.kv_heads, h = c->heads.heads;
  int64_t q_at = (row * h + head) * d, kv = head / (h / g);
  double *A = malloc((size_t)c->m * sizeof *A), sum = 0.0, E = 0.0, sizes = 0.0,
         worst = 0.0;
  for (int64_t j = 0; j < c->m; j++) {
    double dot = 0.0, size = 0.0;
    for (int64_t x = 0; x < d; x++) {
      double p = (double)at(c->q, q_at + x, c->heads.dtype) *
                 at(c->keys, (j * g + kv) * d + x, c->heads.dtype);
      dot += p, size += fabs(p);
    }
    A[j] = exp(dot / sqrt((double)d));
    worst = fmax(worst, (double)(d + 4) * size / sqrt((double)d));
    sum += A[j];
  }
  for (int64_t j = 0; j < c->m; j++) {
    A[j] /= sum;
    E += A[j] * c->pull[j], sizes += A[j] * fabs((double)c->pull[j]);
  }
  double root = sqrt((double)d);
  double roundings = 4 * worst + 3 * (double)c->m + (double)c->t * 3 + 60;
  for (int64_t j = 0; j < c->m; j++) {
    double by_logit = A[j] * (c->pull[j] - E) / root;
    double by_size = A[j] * (fabs((double)c->pull[j]) + sizes) / root;
    for (int64_t x = 0; x < d; x++) {
      int64_t k_at = (j * g + kv) * d + x;
      double by_q = by_logit * at(c->keys, k_at, c->heads.dtype);
      double by_k = by_logit * at(c->q, q_at + x, c->heads.dtype);
      double q_size = by_size * fabs((double)at(c->keys, k_at, c->heads.dtype));
      double k_size = by_size * fabs((double)at(c->q, q_at + x, c->heads.dtype));
      dq[q_at + x] += by_q, dq_size[q_at + x] += roundings * q_size;
      dk[k_at] += by_k, dk_size[k_at] += roundings * k_size;
    }
  }
  free(A);
}

static bool score_right(const score_case *c, const float *dq, int64_t stride,
                        const float *dk, const float *old_q, const float *old_k) {
  int64_t width = c->heads.heads * c->heads.head_dim;
  int64_t n_q = c->t * width, n_k = c->m * c->heads.kv_heads * c->heads.head_dim;
  double *exact = calloc((size_t)(2 * (n_q + n_k)), sizeof *exact);
  double *size = exact + n_q + n_k;
  for (int64_t row = 0; row < c->t; row++)
    for (int64_t head = 0; head < c->heads.heads; head++)
      if (c->use[head]) add_item(c, row, head, exact, exact + n_q, size, size + n_q);
  bool right = true;
  for (int64_t j = 0; j < c->t * stride; j++) {
    int64_t from = j / stride * width + j % stride;
    double change = j % stride < width ? exact[from] : 0.0;
    double error = j % stride < width ? size[from] : 0.0;
    right &= fabs(dq[j] - (old_q[j] + change)) <= EPS * (error + 2 * fabs(old_q[j]));
  }
  for (int64_t j = 0; j < n_k; j++)
    right &= fabs(dk[j] - (old_k[j] + exact[n_q + j])) <=
             EPS * (size[n_q + j] + (double)(c->t + 2) * fabs(old_k[j]));
  free(exact);
  return right;
}

/* kind: what is pulled at, 0 few keys, 1 none, 2 all. */
static void test_score_back(int64_t t, int64_t m, acre_heads heads, int kind) {
  int64_t d = heads.head_dim, stride = heads.heads * d + 3;
  int64_t n_q = t * stride, n_k = m * heads.kv_heads * d;
  void *q = random_typed(t * heads.heads * d, heads.dtype);
  void *keys = random_typed(n_k, heads.dtype), *first_q = NULL, *first_k = NULL;
  float *old_q = random_floats(n_q), *old_k = random_floats(n_k);
  float *pull = guarded_alloc((size_t)m * sizeof *pull);
  uint8_t use[16];
  for (int64_t j = 0; j < m; j++)
    pull[j] = kind == 2 || (kind == 0 && j % 150 < 2) ? 0.5f - (float)(j % 7) : 0.0f;
  for (int64_t head = 0; head < heads.heads; head++) use[head] = head % 3 != 1;
  for (int64_t j = 0; j < n_q; j++) old_q[j] *= 1e-3f;
  for (int64_t j = 0; j < n_k; j++) old_k[j] *= 1e-3f;
  score_case c = {t, m, heads, q, keys, pull, use};
  for (int i = 0; i < backend_count; i++) {
    float *dq = copy_of(old_q, n_q * 4), *dk = copy_of(old_k, n_k * 4);
    backends[i]->ops->score_back(queues[i], dq, stride, dk, pull, q, keys, use, t, m,
                                 &heads);
    if (judged(i)) CHECK(score_right(&c, dq, stride, dk, old_q, old_k));
    keep_first(i, &first_q, dq, n_q * 4), keep_first(i, &first_k, dk, n_k * 4);
  }
  guarded_free(q), guarded_free(keys), guarded_free(old_q), guarded_free(old_k);
  guarded_free(pull), guarded_free(first_q), guarded_free(first_k);
}

static void test_score_backs(void) {
  for (int dtype = 0; dtype < 2; dtype++) {
    acre_dtype T = (acre_dtype)dtype;
    test_score_back(1, 1, (acre_heads){1, 1, 2, T}, 2);
    test_score_back(5, 200, (acre_heads){6, 2, 10, T}, 0);
    test_score_back(37, 131, (acre_heads){9, 3, 64, T}, 0);
    test_score_back(3, 70, (acre_heads){2, 2, 80, T}, 1);
    test_score_back(2, 65, (acre_heads){4, 1, 512, T}, 2);
    test_score_back(260, 40, (acre_heads){9, 3, 6, T}, 0); /* many items */
  }
}

/* ---------------------------------------------------------------- optimiser */

static void test_sum_squares(int64_t n) {
  float *x = random_floats(n);
  double exact = 0.0, first = -1.0, sum;
  for (int64_t i = 0; i < n; i++) exact += (double)x[i] * x[i];
  for (int i = 0; i < backend_count; i++) {
    backends[i]->ops->sum_squares(queues[i], &sum, x, n);
    CHECK(fabs(sum - exact) <= 1e-12 * exact);
    CHECK(first < 0 || !to_the_bit(i) || sum == first);
    first = sum;
  }
  guarded_free(x);
}

static void check_adamw(const float *new, const float *old, float gradient, float scale,
                        const acre_adamw *by, bool *right) {
  double g = (double)gradient * scale, step = (double)by->step;
  double m_old = by->beta1 * old[1], m_new = (1 - by->beta1) * g;
  double m = m_old + m_new, s = by->beta2 * old[2] + (1 - by->beta2) * g * g;
  double rate = by->lr / (1 - pow(by->beta1, step));
  double root = sqrt(s / (1 - pow(by->beta2, step))) + by->eps;
  double decay = by->lr * by->weight_decay * old[0], w = old[0] - decay - rate * m / root;
  double m_error = 4 * EPS * (fabs(m_old) + fabs(m_new));
  *right &= fabs(new[1] - m) <= m_error;
  *right &= fabs(new[2] - s) <= 8 * EPS * s;
  double w_error = rate * (m_error + 16 * EPS * fabs(m)) / root + 4 * EPS * fabs(decay);
  *right &= fabs(new[0] - w) <= w_error + EPS * fabs(w);
}

/* state: w, first, second, each of n. */
static void test_adamw(int64_t n, int64_t step) {
  float *old = random_floats(3 * n), *gradient = random_floats(n);
  acre_adamw by = {sizeof by, step, 3e-2, 0.9, 0.95, 1e-8, 0.1};
  void *first = NULL;
  for (int64_t i = 2 * n; i < 3 * n; i++) old[i] *= old[i];
  gradient[n / 2] = 0.0f, old[2 * n + n / 2] = 0.0f;
  for (int i = 0; i < backend_count; i++) {
    float *x = copy_of(old, 3 * n * 4);
    backends[i]->ops->adamw(queues[i], x, x + n, x + 2 * n, gradient, n, 0.3f, &by);
    bool right = true;
    for (int64_t j = 0; judged(i) && j < n; j++)
      check_adamw((float[3]){x[j], x[n + j], x[2 * n + j]},
                  (float[3]){old[j], old[n + j], old[2 * n + j]}, gradient[j], 0.3f, &by,
                  &right);
    CHECK(right);
    keep_first(i, &first, x, 3 * n * 4);
  }
  guarded_free(old), guarded_free(gradient), guarded_free(first);
}

/* ---------------------------------------------------------------- nothing */

static void test_no_rows(void) {
  acre_heads heads = {2, 1, 16, ACRE_F32};
  acre_adamw by = {sizeof by, 1, 1, 0.9, 0.9, 1e-8, 0};
  uint8_t use[2] = {1, 1};
  float pull[3] = {1, 0, 1};
  for (int i = 0; i < backend_count; i++) {
    const acre_backend_ops *ops = backends[i]->ops;
    acre_queue *q = queues[i];
    double sum = NAN;
    float dk[3 * 16], keys[3 * 16] = {0};
    for (int j = 0; j < 48; j++) dk[j] = (float)j;
    ops->clear(q, NULL, 0);
    ops->round(q, NULL, 8, NULL, 8, 0, 8, ACRE_BF16);
    ops->add_rows(q, NULL, 8, NULL, 8, NULL, 0, 8);
    ops->rmsnorm_back(q, NULL, NULL, NULL, NULL, 1e-5, 0, 8);
    ops->swiglu_back(q, NULL, NULL, NULL, NULL, NULL, 0, 8, ACRE_F32);
    ops->cross_entropy_back(q, NULL, NULL, NULL, NULL, NULL, 0, 8, ACRE_F32);
    ops->cross_entropy(q, NULL, NULL, NULL, 0, 8);
    ops->matmul_back(q, NULL, NULL, 8, NULL, 0, 8, 8, ACRE_F32);
    ops->score_back(q, NULL, 32, dk, pull, NULL, keys, use, 0, 3, &heads);
    ops->score_back(q, NULL, 32, NULL, NULL, NULL, NULL, use, 0, 0, &heads);
    ops->adamw(q, NULL, NULL, NULL, NULL, 0, 1.0f, &by);
    ops->sum_squares(q, &sum, NULL, 0);
    CHECK(sum == 0.0);
    for (int j = 0; j < 48; j++) CHECK(dk[j] == (float)j);
  }
}

static void test_row_operations(acre_dtype dtype) {
  static const int64_t sizes[][2] = {{1, 1}, {3, 37}, {1, 16}, {130, 300}, {17, 1029}};
  for (int64_t s = 0; s < ACRE_COUNT(sizes); s++) {
    int64_t rows = sizes[s][0], width = sizes[s][1];
    test_round(rows, width, dtype);
    test_swiglu_back(rows, width, dtype);
    test_cross_entropy_back(rows, width, dtype);
    if (dtype == ACRE_BF16) continue;
    test_add_rows(rows, width, true), test_add_rows(rows, width, false);
    test_rmsnorm_back(rows, width);
  }
}

int main(int argc, char **argv) {
  if (!open_backends(argc, argv, 11)) return 1;
  test_no_rows();
  test_matrices();
  test_row_operations(ACRE_F32), test_row_operations(ACRE_BF16);
  test_matmul_backs();
  test_score_backs();
  test_sum_squares(1), test_sum_squares(16390), test_sum_squares(200003);
  test_adamw(1, 1), test_adamw(83, 2), test_adamw(100001, 50);
  close_backends();
  return check_report();
}
