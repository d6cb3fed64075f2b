/* The operations of the CPU backend but attention, for every table this processor can
 * run and for one and three threads: within a derived bound of a float64 loop, the same
 * bits for all of them, nothing written where nothing belongs, and a row's result
 * independent of the others. */
#include "backends.h"

/* ---------------------------------------------------------------- matmul */

typedef struct matmul_case {
  int64_t rows, N, K;
  acre_dtype dtype;
  bool bias, accumulate;
  acre_weights weights;
} matmul_case;

static acre_matrix *make_matrix(int i, const float *w, int64_t N, int64_t K,
                                acre_dtype dtype, acre_weights weights) {
  acre_matrix *matrix;
  bool finite = true;
  CHECK(backends[i]->ops->matrix_create(backends[i], &matrix, N, K, dtype, weights, NULL) ==
        ACRE_OK);
  int64_t cut = N / 3; /* in two parts, neither on a panel's edge */
  acre_array upper = {w, ACRE_F32, 2, {cut, K}, {K, 1}, false};
  acre_array lower = {w + cut * K, ACRE_F32, 2, {N - cut, K}, {K, 1}, false};
  backends[i]->ops->matrix_fill(matrix, 0, &upper, &finite);
  backends[i]->ops->matrix_fill(matrix, cut, &lower, &finite);
  CHECK(finite);
  return matrix;
}

/* What q8 keeps of w, in its place: the contract of acre_weights, and near w. */
static void quantize(float *w, int64_t N, int64_t K) {
  bool near = true;
  for (int64_t j = 0; j < N; j++) {
    for (int64_t first = 0; first < K; first += 32) {
      float *block = w + j * K + first, highest = 0.0f, scale;
      int64_t count = acre_min(32, K - first);
      for (int64_t i = 0; i < count; i++) highest = fmaxf(highest, fabsf(block[i]));
      scale = as(highest / 127, ACRE_BF16);
      if (scale * 127 < highest) scale = acre_from_bits(acre_bits(scale) + 0x10000);
      for (int64_t i = 0; i < count && highest > 0; i++) {
        float kept = as(rintf(block[i] / scale) * scale, ACRE_BF16);
        near &= fabsf(kept - block[i]) <= scale * 0.5001f + 0x1p-8f * fabsf(block[i]);
        block[i] = kept;
      }
    }
  }
  CHECK(near);
}

static bool matmul_right(const matmul_case *c, const float *y, int64_t stride,
                         const float *old, const void *x, const float *w,
                         const float *bias) {
  for (int64_t i = 0; i < c->rows; i++) {
    for (int64_t j = 0; j < c->N; j++) {
      double sum = 0.0, size = 0.0;
      for (int64_t k = 0; k < c->K; k++) {
        double p = (double)at(x, i * c->K + k, c->dtype) * as(w[j * c->K + k], c->dtype);
        sum += p, size += fabs(p);
      }
      double b = c->bias ? bias[j] : 0.0, o = c->accumulate ? old[i * stride + j] : 0.0;
      double error = fabs(y[i * stride + j] - (sum + b + o));
      if (!(error <= EPS * ((double)c->K * size + 3 * (size + fabs(b) + fabs(o)))))
        return false;
    }
    for (int64_t j = c->N; j < stride; j++)
      if (acre_bits(y[i * stride + j]) != 0x7fc0dead) return false;
  }
  return true;
}

static void test_matmul(const matmul_case *c) {
  int64_t stride = c->N + 3, n = c->rows * stride;
  float *w = random_floats(c->N * c->K);
  void *x = random_typed(c->rows * c->K, c->dtype);
  float *kept = random_floats(c->N * c->K);
  memcpy(kept, w, (size_t)(c->N * c->K) * sizeof(float));
  float *bias = random_floats(c->N), *old = nans(n), *first = NULL;
  if (c->accumulate)
    for (int64_t i = 0; i < c->rows; i++)
      for (int64_t j = 0; j < c->N; j++) old[i * stride + j] = random_float(&seed);
  for (int i = 0; i < backend_count; i++) {
    acre_matrix *W = make_matrix(i, w, c->N, c->K, c->dtype, c->weights);
    float *y = guarded_alloc((size_t)n * sizeof(float)), *row = nans(c->N);
    const acre_backend_ops *ops = backends[i]->ops;
    memcpy(y, old, (size_t)n * sizeof(float));
    ops->matmul(queues[i], y, stride, x, W, c->bias ? bias : NULL, c->rows, c->accumulate);
    if (i == 0 && c->weights == ACRE_WEIGHTS_Q8) quantize(kept, c->N, c->K);
    if (judged(i)) CHECK(matmul_right(c, y, stride, old, x, kept, bias));
    CHECK(!first || !to_the_bit(i) || same(first, y, n * 4));
    int64_t r = c->rows / 2; /* alone */
    memcpy(row, old + r * stride, (size_t)c->N * sizeof(float));
    const char *x_r = (const char *)x + (size_t)(r * c->K) * acre_dtype_size(c->dtype);
    ops->matmul(queues[i], row, c->N, x_r, W, c->bias ? bias : NULL, 1, c->accumulate);
    CHECK(!to_the_bit(i) || same(row, y + r * stride, c->N * 4));
    ops->matrix_release(W);
    guarded_free(row);
    if (first)
      guarded_free(y);
    else
      first = y;
  }
  guarded_free(x), guarded_free(w), guarded_free(kept), guarded_free(bias);
  guarded_free(old), guarded_free(first);
}

static void test_matmuls(void) {
  static const int64_t rows[] = {1, 2, 3, 5, 6, 7, 13, 40};
  static const int64_t sizes[][2] = {{1, 1}, {16, 2}, {17, 33}, {100, 65}, {37, 770}};
  for (int64_t r = 0; r < ACRE_COUNT(rows); r++)
    for (int64_t s = 0; s < ACRE_COUNT(sizes); s++)
      for (int kind = 0; kind < 12; kind++)
        test_matmul(&(matmul_case){rows[r], sizes[s][0], sizes[s][1],
                                   kind & 1 || kind >= 8 ? ACRE_BF16 : ACRE_F32, kind & 2,
                                   kind & 4, kind >= 8});
  test_matmul(&(matmul_case){130, 70, 40, ACRE_BF16, true, false, ACRE_WEIGHTS_SAME});
  test_matmul(&(matmul_case){125, 600, 9, ACRE_F32, false, true, ACRE_WEIGHTS_SAME});
  test_matmul(&(matmul_case){125, 70, 1000, ACRE_BF16, false, true, ACRE_WEIGHTS_Q8});
}

/* silu(x G^T) (x U^T), rounded: within the bound of its two products, and every backend
 * and any number of rows alike. */
static void test_swiglu(int64_t rows, int64_t N, int64_t K, acre_dtype dtype) {
  int64_t size = (int64_t)acre_dtype_size(dtype), n = rows * N;
  float *g = random_floats(N * K), *u = random_floats(N * K);
  void *x = random_typed(rows * K, dtype);
  char *first = NULL;
  for (int i = 0; i < backend_count; i++) {
    const acre_backend_ops *ops = backends[i]->ops;
    acre_matrix *gate = make_matrix(i, g, N, K, dtype, ACRE_WEIGHTS_SAME),
                *up = make_matrix(i, u, N, K, dtype, ACRE_WEIGHTS_SAME);
    char *y = guarded_alloc((size_t)(n * size)), *row = guarded_alloc((size_t)(N * size));
    ops->swiglu(queues[i], y, x, gate, up, rows);
    ops->swiglu(queues[i], row, (char *)x + rows / 2 * K * size, gate, up, 1);
    CHECK(!to_the_bit(i) || same(row, y + rows / 2 * N * size, N * size));
    bool right = true;
    for (int64_t j = 0; judged(i) && j < n; j++) {
      double a = 0.0, b = 0.0, a_size = 0.0, b_size = 0.0;
      for (int64_t k = 0; k < K; k++) {
        double x_k = at(x, j / N * K + k, dtype);
        a += x_k * as(g[j % N * K + k], dtype), b += x_k * as(u[j % N * K + k], dtype);
        a_size += fabs(x_k * g[j % N * K + k]), b_size += fabs(x_k * u[j % N * K + k]);
      }
      double e = EPS * (double)(K + 8), exact = a / (1 + exp(-a)) * b; /* |silu'| < 1.1 */
      double error = e * (1.1 * a_size * fabs(b) + b_size * fabs(a)) + 8 * e * fabs(exact);
      double unit = dtype == ACRE_F32 ? 0.0 : 0x1p-8;
      right &= fabs(at(y, j, dtype) - exact) <= error + unit * fabs(exact) + 1e-7;
    }
    CHECK(right);
    CHECK(!first || !to_the_bit(i) || same(first, y, n * size));
    ops->matrix_release(gate), ops->matrix_release(up);
    guarded_free(row);
    if (first)
      guarded_free(y);
    else
      first = y;
  }
  guarded_free(g), guarded_free(u), guarded_free(x), guarded_free(first);
}

static void test_swiglus(void) {
  static const int64_t sizes[][3] = {{1, 1, 1}, {3, 40, 70}, {13, 17, 33}, {130, 300, 20}};
  for (int64_t s = 0; s < ACRE_COUNT(sizes); s++)
    for (int dtype = 0; dtype < 2; dtype++)
      test_swiglu(sizes[s][0], sizes[s][1], sizes[s][2], (acre_dtype)dtype);
}

/* Any dtype and strides; NaN, infinity, and what overflows T. */
static void test_fill(int i) {
  double source[6 * 4];
  uint16_t halves[4] = {0x3c00, 0xc500, 0x0001, 0x7bff}; /* 1, -5, 2^-24, 65504 */
  for (int j = 0; j < 24; j++) source[j] = j - 7.5;
  const acre_backend_ops *ops = backends[i]->ops;
  acre_matrix *W;
  CHECK(ops->matrix_create(backends[i], &W, 4, 3, ACRE_F32, ACRE_WEIGHTS_SAME, NULL) ==
        ACRE_OK);
  acre_array turned = {source + 1, ACRE_F64, 2, {4, 3}, {1, 8}, false};
  bool finite = true;
  ops->matrix_fill(W, 0, &turned, &finite);
  float x[3] = {1, 10, 100}, y[4];
  ops->matmul(queues[i], y, 4, x, W, NULL, 1, false);
  for (int j = 0; j < 4; j++)
    CHECK(y[j] == (float)(source[1 + j] + 10 * source[9 + j] + 100 * source[17 + j]));
  acre_array half = {halves, ACRE_F16, 2, {1, 3}, {3, 1}, false};
  ops->matrix_fill(W, 2, &half, &finite);
  ops->matmul(queues[i], y, 4, x, W, NULL, 1, false);
  CHECK(finite && y[2] == 1 - 50 + 100 * 0x1p-24f &&
        y[3] == (float)(source[4] + 10 * source[12] + 100 * source[20]));
  float bad[3] = {1, 2, NAN};
  acre_array array = {bad, ACRE_F32, 2, {1, 3}, {3, 1}, false};
  ops->matrix_fill(W, 1, &array, &finite);
  CHECK(!finite);
  finite = true, bad[2] = 3.4e38f; /* fits float32, rounds to infinity in bfloat16 */
  ops->matrix_fill(W, 1, &array, &finite);
  CHECK(finite);
  ops->matrix_release(W);
  CHECK(ops->matrix_create(backends[i], &W, 4, 3, ACRE_BF16, ACRE_WEIGHTS_SAME, NULL) ==
        ACRE_OK);
  ops->matrix_fill(W, 1, &array, &finite);
  CHECK(!finite);
  ops->matrix_release(W);
  float worse[6] = {1, NAN, -INFINITY, 0, 0, 0}; /* q8: told, and stored as something */
  acre_array rows = {worse, ACRE_F32, 2, {2, 3}, {3, 1}, false};
  CHECK(ops->matrix_create(backends[i], &W, 4, 3, ACRE_BF16, ACRE_WEIGHTS_Q8, NULL) ==
        ACRE_OK);
  finite = true;
  ops->matrix_fill(W, 0, &rows, &finite);
  CHECK(!finite);
  rows.data = worse + 3, rows.shape[0] = 1, finite = true; /* a block of zeros */
  ops->matrix_fill(W, 0, &rows, &finite);
  uint16_t ones[3] = {0x3f80, 0x3f80, 0x3f80};
  ops->matmul(queues[i], y, 4, ones, W, NULL, 1, false);
  CHECK(finite && y[0] == 0.0f && y[3] == 0.0f);
  ops->matrix_release(W);
  acre_error error;
  CHECK(ops->matrix_create(backends[i], &W, 4, 3, ACRE_F32, ACRE_WEIGHTS_Q8, &error) ==
            ACRE_UNSUPPORTED &&
        !W);
  CHECK(ops->matrix_create(backends[i], &W, 4, 3, ACRE_F16, ACRE_WEIGHTS_SAME, &error) ==
            ACRE_UNSUPPORTED &&
        !W);
  CHECK(ops->matrix_create(backends[i], &W, INT64_MAX / 2, 64, ACRE_F32, ACRE_WEIGHTS_SAME,
                           &error) == ACRE_NO_MEMORY);
}

/* ---------------------------------------------------------------- rows, timeline */

/* Runs every row operation into one buffer: leaf kernels are tested elsewhere, here it
 * is strides, indices, types and threads. */
static float *run_rows(int i, const float *x, const void *table, const float *angles,
                       const int32_t *index, acre_dtype dtype, int64_t size) {
  enum { ROWS = 37, VOCAB = 50, H = 6, G = 2, D = 10, WIDTH = G * D };
  const acre_backend_ops *ops = backends[i]->ops;
  acre_queue *queue = queues[i];
  acre_heads heads = {H, G, D, dtype};
  float *y = nans(size), *end = y;
  const float *cos = angles, *sin = angles + 500;
  ops->embed(queue, end, index, table, (const char *)table + 40, ROWS, VOCAB, WIDTH, dtype);
  end += ROWS * WIDTH;
  ops->rmsnorm(queue, end, x, angles, 1e-5, ROWS, WIDTH, dtype), end += ROWS * WIDTH;
  ops->gather_rows(queue, end, x, index, ROWS, 92), end += ROWS * 23;
  ops->scatter_rows(queue, end, x, index, ROWS, 92), end += VOCAB * 23;
  memcpy(end, x, ROWS * 70 * sizeof(float));
  ops->rope(queue, end, 70, cos, sin, 3, ROWS, H, D), end += ROWS * 70;
  for (int part = 0; part < 2; part++) {
    void *raw = end, *rotated = end + ROWS * WIDTH, *values = end + 2 * ROWS * WIDTH;
    void *again = end + 3 * ROWS * WIDTH;
    ops->store_kv(queue, part ? raw : NULL, rotated, values, x, x + 20, 50, cos, sin, 2,
                  ROWS, &heads);
    if (part) {
      ops->rotate(queue, again, raw, cos, sin, 2, ROWS, &heads);
      CHECK(same(again, rotated, ROWS * WIDTH * (int64_t)acre_dtype_size(dtype)));
    }
    end += 4 * ROWS * WIDTH;
  }
  const void *sources[12];
  for (int j = 0; j < 12; j++)
    sources[j] = (const char *)table + (j * 7 % 40) * WIDTH * (int)acre_dtype_size(dtype);
  ops->pool(queue, end, sources, 4, 3, WIDTH, dtype), end += 4 * WIDTH;
  acre_span spans[3] = {{table, 5, 2}, {x, 0, 0}, {x, 0, 3}};
  ops->copy_rows(queue, end, spans, 3, 12), end += 7 * 3;
  CHECK(end <= y + size);
  return y;
}

/* The gain lies where the angles do. */
static bool norm_right(const void *y, const float *x, const float *gain, acre_dtype dtype) {
  bool right = true;
  for (int64_t i = 0; i < 37; i++) {
    double squares = 0.0, unit = dtype == ACRE_F32 ? 0.0 : 0x1p-8;
    for (int64_t c = 0; c < 20; c++) squares += (double)x[i * 20 + c] * x[i * 20 + c];
    for (int64_t c = 0; c < 20; c++) {
      double exact_y = x[i * 20 + c] / sqrt(squares / 20 + 1e-5) * gain[c];
      right &=
          fabs(at(y, i * 20 + c, dtype) - exact_y) <= (20 * EPS + unit) * fabs(exact_y);
    }
  }
  return right;
}

static void check_rows(const float *y, const float *x, const void *table, const float *cos,
                       const int32_t *index, acre_dtype dtype) {
  bool right = true;
  const float *sin = cos + 500;
  for (int64_t i = 0; i < 37; i++)
    for (int64_t c = 0; c < 20; c++)
      right &= y[i * 20 + c] == at(table, index[i] * 20 + c, dtype);
  CHECK(right);
  CHECK(norm_right(y + 37 * 20, x, cos, dtype));
  y += 2 * 37 * 20;
  for (int64_t i = 0; i < 37; i++) {
    right &= same(y + i * 23, x + index[i] * 23, 92);
    right &= same(y + 37 * 23 + index[i] * 23, x + i * 23, 92);
  }
  CHECK(right);
  y += 37 * 23 + 50 * 23;
  for (int64_t i = 0; i < 37; i++)
    for (int64_t head = 0; head < 6; head++)
      for (int64_t c = 0; c < 5; c++) {
        const float *from = x + i * 70 + head * 10 + c, *to = y + i * 70 + head * 10 + c;
        double co = cos[(3 + i) * 5 + c], si = sin[(3 + i) * 5 + c];
        right &= fabs(to[0] - (from[0] * co - from[5] * si)) <= 4 * EPS;
        right &= fabs(to[5] - (from[5] * co + from[0] * si)) <= 4 * EPS;
      }
  CHECK(right);
  y += 37 * 70;
  const void *rotated = y + 37 * 20, *values = y + 2 * 37 * 20;
  for (int64_t i = 0; i < 37; i++)
    for (int64_t c = 0; c < 20; c++) {
      double k = as(x[i * 50 + c], dtype);
      double other = as(x[i * 50 + c + (c % 10 < 5 ? 5 : -5)], dtype);
      double co = cos[(2 + i) * 5 + c % 5], si = sin[(2 + i) * 5 + c % 5];
      double exact = k * co + (c % 10 < 5 ? -other : other) * si;
      double unit = dtype == ACRE_F32 ? 4 * EPS : 0x1p-8;
      right &= fabs(at(rotated, i * 20 + c, dtype) - exact) <= unit;
      right &= at(values, i * 20 + c, dtype) == as(x[20 + i * 50 + c], dtype);
    }
  CHECK(right);
  y += 8 * 37 * 20;
  for (int64_t j = 0; j < 4; j++)
    for (int64_t c = 0; c < 20; c++) {
      float sum = 0.0f;
      for (int64_t i = 0; i < 3; i++)
        sum += at(table, (j * 3 + i) * 7 % 40 * 20 + c, dtype);
      right &= at(y, j * 20 + c, dtype) == as(sum / 3.0f, dtype);
    }
  y += 4 * 20;
  right &= same(y, x, 36) && same(y + 15, table, 24) && acre_bits(y[9]) == 0x7fc0dead;
  CHECK(right);
}

/* Of the first size numbers the same ones are written. */
static bool same_written(const float *a, const float *b, int64_t size) {
  bool right = true;
  for (int64_t i = 0; i < size; i++)
    right &= (acre_bits(a[i]) == 0x7fc0dead) == (acre_bits(b[i]) == 0x7fc0dead);
  return right;
}

static void test_rows(acre_dtype dtype) {
  int64_t size = 20000;
  float *x = random_floats(50 * 100), *angles = random_floats(1000), *first = NULL;
  void *table = random_typed(51 * 20, dtype);
  int32_t index[37];
  for (int i = 0; i < 37; i++) index[i] = (i * 13 + 1) % 50;
  int32_t with_l1[37];
  memcpy(with_l1, index, sizeof index);
  for (int i = 0; i < backend_count; i++) {
    float *y = run_rows(i, x, table, angles, index, dtype, size);
    if (judged(i)) check_rows(y, x, table, angles, index, dtype);
    if (!first) {
      first = y;
      continue;
    }
    CHECK(to_the_bit(i) ? same(first, y, size * 4) : same_written(first, y, size));
    guarded_free(y);
  }
  for (int i = 0; i < 37; i += 5) with_l1[i] = 50;
  float *y = nans(37 * 20), row[20];
  void *l1 = random_typed(20, dtype);
  for (int i = 0; i < backend_count; i++) {
    backends[i]->ops->embed(queues[i], y, with_l1, table, l1, 37, 50, 20, dtype);
    for (int c = 0; c < 20; c++) row[c] = at(l1, c, dtype);
    CHECK(same(y, row, 80) && same(y + 35 * 20, row, 80) && same(y + 20, first + 20, 80));
  }
  guarded_free(x), guarded_free(angles), guarded_free(table), guarded_free(first),
      guarded_free(y), guarded_free(l1);
}

/* Long spans and uploads, which are cut among threads. */
static void test_copies(void) {
  int64_t rows = 5000, bytes = 600;
  uint8_t *from = guarded_alloc((size_t)(rows * bytes)),
          *to = guarded_alloc((size_t)(rows * bytes));
  for (int64_t i = 0; i < rows * bytes; i++) from[i] = (uint8_t)(i * 2654435761u >> 13);
  acre_span spans[3] = {
      {from, 1000, 4000}, {from + 4000 * bytes, 0, 700}, {from + 4700 * bytes, 700, 300}};
  for (int i = 0; i < backend_count; i++) {
    memset(to, 0, (size_t)(rows * bytes));
    backends[i]->ops->copy_rows(queues[i], to, spans, 3, (size_t)bytes);
    CHECK(same(to + 1000 * bytes, from, 4000 * bytes));
    CHECK(same(to, from + 4000 * bytes, 1000 * bytes));
    backends[i]->ops->upload(queues[i], to, from, (size_t)(rows * bytes));
    CHECK(same(to, from, rows * bytes));
    backends[i]->ops->download(queues[i], to, from + 1, 999);
    CHECK(same(to, from + 1, 999) && to[999] == from[999]);
  }
  guarded_free(from), guarded_free(to);
}

/* ---------------------------------------------------------------- memory */

static void test_memory(void) {
  acre_backend *backend;
  acre_buffer *buffer, *none;
  acre_error error;
  int64_t live = acre_alloc_live();
  CHECK(acre_cpu_backend_open(&backend, 2, NULL, &error) == ACRE_OK);
  CHECK(backend->ops->alloc(backend, &buffer, 1 << 20, &error) == ACRE_OK);
  CHECK(backend->account.held == 1 << 20 &&
        ((uintptr_t)acre_buffer_data(buffer) & 63) == 0);
  CHECK(backend->ops->alloc(backend, &none, SIZE_MAX / 2 + 1, &error) == ACRE_NO_MEMORY);
  CHECK(!none && error.status == ACRE_NO_MEMORY && backend->account.held == 1 << 20);
  for (int64_t n = 1; n <= 3; n++) {
    acre_alloc_fail_at(n);
    CHECK(backend->ops->alloc(backend, &none, 64, NULL) == ACRE_NO_MEMORY && !none);
    acre_queue *queue;
    acre_alloc_fail_at(n);
    CHECK(backend->ops->queue_open(backend, &queue, NULL) == ACRE_NO_MEMORY && !queue);
  }
  acre_alloc_fail_at(0);
  backend->ops->destroy(backend); /* the buffer outlives it */
  memset(acre_buffer_data(buffer), 1, 1 << 20);
  acre_buffer_release(buffer);
  for (int64_t n = 1; n <= 4; n++) {
    acre_alloc_fail_at(n);
    CHECK(acre_cpu_backend_open(&backend, 3, NULL, NULL) == ACRE_NO_MEMORY && !backend);
  }
  acre_alloc_fail_at(0);
  CHECK(acre_cpu_backend_open(&backend, 1, "sse9", &error) == ACRE_BAD_VALUE && !backend);
  CHECK(acre_cpu_backend_open(&backend, -1, NULL, &error) == ACRE_BAD_VALUE);
  if (!(acre_cpu_features() & ACRE_CPU_AVX512))
    CHECK(acre_cpu_backend_open(&backend, 1, "avx512", &error) == ACRE_UNSUPPORTED);
  if (!(acre_cpu_features() & ACRE_CPU_BF16))
    CHECK(acre_cpu_backend_open(&backend, 1, "avx512_bf16", &error) == ACRE_UNSUPPORTED);
  CHECK(acre_alloc_live() == live);
}

/* ---------------------------------------------------------------- cross entropy */

/* Of the sum: 7 additions in float32, two roundings of exp, and of the differences. */
static void test_cross_entropy(int64_t rows, int64_t vocab) {
  float *logits = random_floats(rows * vocab), *first = NULL;
  int32_t *target = guarded_alloc((size_t)rows * sizeof *target);
  for (int64_t i = 0; i < rows * vocab; i++) logits[i] *= 40;
  for (int64_t i = 0; i < rows; i++) target[i] = (int32_t)((i * 7919 + 3) % vocab);
  target[rows / 2] = -1;
  for (int i = 0; i < backend_count; i++) {
    float *out = nans(rows);
    backends[i]->ops->cross_entropy(queues[i], out, logits, target, rows, vocab);
    for (int64_t r = 0; judged(i) && r < rows; r++) {
      double sum = 0.0, expected = 0.0;
      for (int64_t c = 0; c < vocab; c++) sum += exp((double)logits[r * vocab + c]);
      if (target[r] >= 0) expected = log(sum) - (double)logits[r * vocab + target[r]];
      CHECK(fabs(out[r] - expected) <= 16 * EPS * (1 + fabs(expected)));
    }
    CHECK(!first || !to_the_bit(i) || same(first, out, rows * 4));
    if (first)
      guarded_free(out);
    else
      first = out;
  }
  guarded_free(logits), guarded_free(target), guarded_free(first);
}

static void test_clear(int64_t bytes) {
  for (int i = 0; i < backend_count; i++) {
    uint8_t *x = guarded_alloc((size_t)bytes + 1);
    memset(x, 0xff, (size_t)bytes + 1);
    backends[i]->ops->clear(queues[i], x + 1, (size_t)bytes);
    bool right = x[0] == 0xff;
    for (int64_t c = 1; c <= bytes; c++) right &= x[c] == 0;
    CHECK(right);
    guarded_free(x);
  }
}

/* A transposed matrix follows its matrix's new numbers, and takes no memory for it. */
static void test_transpose_follows(void) {
  float old[6] = {0}, news[6] = {1, 2, 3, 4, 5, 6}, rows[6];
  for (int i = 0; i < backend_count; i++) {
    const acre_backend_ops *ops = backends[i]->ops;
    acre_matrix *W, *turned = NULL;
    CHECK(ops->matrix_create(backends[i], &W, 2, 3, ACRE_F32, ACRE_WEIGHTS_SAME, NULL) ==
          ACRE_OK);
    ops->matrix_set(queues[i], W, 0, old, 2);
    CHECK(ops->matrix_transpose(queues[i], &turned, W, NULL) == ACRE_OK);
    ops->matrix_set(queues[i], W, 0, news, 2);
    acre_alloc_fail_at(1);
    CHECK(ops->matrix_transpose(queues[i], &turned, W, NULL) == ACRE_OK);
    acre_alloc_fail_at(0);
    ops->matrix_get(queues[i], rows, turned, 0, 3);
    CHECK(ops->sync(queues[i], NULL) == ACRE_OK);
    CHECK(rows[0] == 1 && rows[1] == 4 && rows[2] == 2 && rows[5] == 6);
    ops->matrix_release(turned);
    ops->matrix_release(W);
  }
}

int main(int argc, char **argv) {
  if (!open_backends(argc, argv, 7)) return 1;
  test_memory();
  test_matmuls();
  test_swiglus();
  for (int i = 0; i < backend_count; i++)
    if (judged(i)) test_fill(i);
  test_rows(ACRE_F32);
  test_rows(ACRE_BF16);
  test_copies();
  test_cross_entropy(1, 1);
  test_cross_entropy(3, 37);
  test_cross_entropy(130, 1003);
  test_clear(0);
  test_clear(1);
  test_clear(3000001);
  test_transpose_follows();
  close_backends();
  return check_report();
}
