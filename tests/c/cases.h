/* Operations at the sizes of real models: what is tested here is what is timed.
 *
 * A case is one operation of the seam on random numbers, with the multiply-adds and the
 * bytes that it cannot do without. test_cases.c runs every case on every table, the
 * benchmarks (bench_kernels.c) check a case before they time it. Checks compare some of
 * the results with a float64 loop, within a bound derived from the contract. */
#ifndef ACRE_CASES_H
#define ACRE_CASES_H

#include "backend.h"
#include "bf16.h"
#include "platform.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef enum op_kind {
  OP_MATMUL,      /* y [rows, N] = x [rows, K] W^T */
  OP_SWIGLU,      /* y [rows, N], two matrices [N, K] */
  OP_ATTEND,      /* rows of h heads over N earlier keys and themselves */
  OP_SCORE,       /* rows of h heads over N entries */
  OP_ATTEND_BACK, /* the gradients of OP_ATTEND */
  OP_ROTATE,      /* rows of g keys */
  OP_COPY,        /* rows of g keys, in spans of 16 */
  OP_NORM,        /* rows of width K */
} op_kind;

typedef struct op_case {
  op_kind kind;
  int64_t rows, K, N;
  int64_t heads, kv_heads, head_dim;
  acre_dtype dtype;
  acre_weights weights;
} op_case;

/* Of SmolLM2-135M (h 9, g 3, d 64) and, where it differs, of Qwen2.5-7B (h 28, g 4,
 * d 128). `heavy`: seconds in the scalar table. */
#define PRODUCT(op, m, k, n) {.kind = op, .rows = m, .K = k, .N = n}
#define SMOL(op, m, n) \
  {.kind = op, .rows = m, .N = n, .heads = 9, .kv_heads = 3, .head_dim = 64}
#define QWEN(op, m, n) \
  {.kind = op, .rows = m, .N = n, .heads = 28, .kv_heads = 4, .head_dim = 128}
static const struct {
  op_case op;
  bool heavy;
} model_cases[] = {
    {PRODUCT(OP_MATMUL, 512, 576, 960), true},
    {PRODUCT(OP_MATMUL, 512, 576, 576), true},
    {PRODUCT(OP_MATMUL, 512, 1536, 576), true},
    {PRODUCT(OP_SWIGLU, 512, 576, 1536), true},
    {PRODUCT(OP_MATMUL, 32, 576, 960), false},
    {PRODUCT(OP_MATMUL, 5, 1536, 576), false},
    {PRODUCT(OP_MATMUL, 1, 576, 960), false},
    {PRODUCT(OP_MATMUL, 1, 1536, 576), false},
    {PRODUCT(OP_MATMUL, 1, 576, 49152), false},
    {PRODUCT(OP_SWIGLU, 1, 576, 1536), false},
    {SMOL(OP_ATTEND, 512, 2560), true},
    {SMOL(OP_ATTEND, 512, 6144), true},
    {QWEN(OP_ATTEND, 512, 2560), true},
    {SMOL(OP_ATTEND, 24, 6144), true},
    {SMOL(OP_ATTEND, 1, 6144), false},
    {SMOL(OP_ATTEND, 1, 131072), true}, /* beyond the caches */
    {QWEN(OP_ATTEND, 1, 32768), true},
    {SMOL(OP_SCORE, 24, 4096), true},
    {SMOL(OP_ATTEND, 1088, 1024), true}, /* a training example with half of it compressed */
    {SMOL(OP_ATTEND_BACK, 1088, 1024), true},
    {SMOL(OP_ROTATE, 65536, 0), false},
    {SMOL(OP_COPY, 65536, 0), false},
    {PRODUCT(OP_NORM, 512, 576, 0), false},
};

static inline int64_t case_width(const op_case *c) { return c->kv_heads * c->head_dim; }

static inline void case_name(char *to, size_t size, const op_case *c) {
  const char *type = c->weights == ACRE_WEIGHTS_Q8 ? "q8" : acre_dtype_name(c->dtype);
  long long rows = c->rows, K = c->K, N = c->N, d = c->head_dim;
  switch (c->kind) {
    case OP_MATMUL:
      snprintf(to, size, "matmul %s %lldx%lld->%lld", type, rows, K, N);
      break;
    case OP_SWIGLU:
      snprintf(to, size, "swiglu %s %lldx%lld->%lld", type, rows, K, N);
      break;
    case OP_ATTEND:
      snprintf(to, size, "attend %s %lld rows, %lld keys, d %lld", type, rows, N + rows, d);
      break;
    case OP_ATTEND_BACK:
      snprintf(to, size, "attend_back %s %lld rows, %lld keys, d %lld", type, rows,
               N + rows, d);
      break;
    case OP_SCORE: snprintf(to, size, "score %s %lld rows, m %lld", type, rows, N); break;
    case OP_ROTATE: snprintf(to, size, "rotate %s %lld rows", type, rows); break;
    case OP_COPY: snprintf(to, size, "copy %s %lld rows", type, rows); break;
    case OP_NORM: snprintf(to, size, "rmsnorm %s %lldx%lld", type, rows, K); break;
  }
}

static inline double case_flops(const op_case *c) {
  double rows = (double)c->rows, K = (double)c->K, N = (double)c->N;
  double head = (double)(c->heads * c->head_dim);
  switch (c->kind) {
    case OP_MATMUL: return 2 * rows * K * N;
    case OP_SWIGLU: return 4 * rows * K * N;
    case OP_ATTEND: return 4 * rows * (N + (rows + 1) / 2) * head;
    case OP_ATTEND_BACK: return 10 * rows * (N + (rows + 1) / 2) * head;
    case OP_SCORE: return 4 * rows * N * head; /* in two passes */
    default: return 0;
  }
}

/* That must be read from memory, or written there, where they lie in no cache. */
static inline double case_bytes(const op_case *c) {
  double rows = (double)c->rows, K = (double)c->K, N = (double)c->N;
  double size =
      c->weights == ACRE_WEIGHTS_Q8 ? 17.0 / 16 : (double)acre_dtype_size(c->dtype);
  double width = (double)case_width(c) * size;
  switch (c->kind) {
    case OP_MATMUL: return K * N * size;
    case OP_SWIGLU: return 2 * K * N * size;
    case OP_ATTEND: return 2 * (N + rows) * width;
    case OP_ATTEND_BACK:
      return (N + rows) * (2 * width + 8 * (double)case_width(c)) +
             rows * (double)(c->heads * c->head_dim) * (2 * size + 8);
    case OP_SCORE: return N * width;
    case OP_NORM: return rows * K * (size + 4);
    default: return 2 * rows * width;
  }
}

/* ---------------------------------------------------------------- a case at work */

typedef struct op_work {
  op_case c;
  acre_backend *backend;
  acre_queue *queue;
  acre_matrix *W, *up;
  float *w, *w_up, *x; /* weights and input in float32 */
  void *typed_x;       /* x of T, where the operation takes that */
  void *keys, *values; /* [N + rows, g, d] of T */
  void *out;
  float *dout, *lse; /* of attended [rows, h, d] of T */
  void *attended;
  acre_span *spans;
  int64_t span_count;
  uint8_t *use;
  uint64_t seed;
} op_work;

static inline void *case_memory(size_t bytes) {
  void *memory = acre_alloc_zero(bytes ? bytes : 1);
  if (memory) return memory;
  fprintf(stderr, "out of memory\n");
  exit(1);
}

static inline float *case_floats(op_work *work, int64_t n, float scale) {
  float *x = case_memory((size_t)n * sizeof(float));
  for (int64_t i = 0; i < n; i++) {
    work->seed = work->seed * 6364136223846793005u + 1442695040888963407u;
    x[i] = scale * (float)(int32_t)(work->seed >> 32) * 0x1p-31f;
  }
  return x;
}

static inline void *case_typed(const float *x, int64_t n, acre_dtype dtype) {
  void *y = case_memory((size_t)n * acre_dtype_size(dtype));
  for (int64_t i = 0; i < n; i++) {
    if (dtype == ACRE_BF16)
      ((uint16_t *)y)[i] = acre_to_bf16(x[i]);
    else
      ((float *)y)[i] = x[i];
  }
  return y;
}

static inline double case_number(const void *x, int64_t i, acre_dtype dtype) {
  return dtype == ACRE_F32 ? (double)((const float *)x)[i]
                           : (double)acre_from_bf16(((const uint16_t *)x)[i]);
}

static inline float case_as(float x, acre_dtype dtype) {
  return dtype == ACRE_F32 ? x : acre_from_bf16(acre_to_bf16(x));
}

static inline acre_matrix *case_matrix(op_work *work, const float *w) {
  const op_case *c = &work->c;
  acre_array array = {w, ACRE_F32, 2, {c->N, c->K}, {c->K, 1}, false};
  acre_matrix *W;
  bool finite = true;
  if (work->backend->ops->matrix_create(work->backend, &W, c->N, c->K, c->dtype, c->weights,
                                        NULL) != ACRE_OK)
    exit(1);
  work->backend->ops->matrix_fill(W, 0, &array, &finite);
  return W;
}

static inline void case_open_products(op_work *work) {
  const op_case *c = &work->c;
  work->x = case_floats(work, c->rows * c->K, 1);
  work->typed_x = case_typed(work->x, c->rows * c->K, c->dtype);
  work->w = case_floats(work, c->N * c->K, 1);
  work->W = case_matrix(work, work->w);
  if (c->kind == OP_SWIGLU) {
    work->w_up = case_floats(work, c->N * c->K, 1);
    work->up = case_matrix(work, work->w_up);
  }
  work->out = case_memory((size_t)(c->rows * c->N) * sizeof(float));
}

static inline void case_open_keys(op_work *work) {
  const op_case *c = &work->c;
  int64_t count = c->N + c->rows, width = case_width(c);
  float *x = case_floats(work, count * width, 1);
  work->keys = case_typed(x, count * width, c->dtype);
  memmove(x, x + 1, (size_t)(count * width - 1) * sizeof(float));
  work->values = case_typed(x, count * width, c->dtype);
  acre_free(x);
  work->x = case_floats(work, c->rows * c->heads * c->head_dim, 2);
  work->use = case_memory((size_t)c->heads);
  memset(work->use, 1, (size_t)c->heads);
  int64_t out = c->kind == OP_SCORE ? c->N : c->rows * c->heads * c->head_dim;
  work->out = case_memory((size_t)out * sizeof(float));
}

static inline acre_heads case_heads(const op_case *c) {
  return (acre_heads){c->heads, c->kv_heads, c->head_dim, c->dtype};
}

/* Rows [first, first + count) of the keys. */
static inline acre_keys case_keys(const op_work *work, int64_t first, int64_t count) {
  size_t at = (size_t)(first * case_width(&work->c)) * acre_dtype_size(work->c.dtype);
  return (acre_keys){(char *)work->keys + at, (char *)work->values + at, NULL, count};
}

static inline void case_attend(op_work *work, void *out, float *lse) {
  const op_case *c = &work->c;
  acre_heads heads = case_heads(c);
  int64_t stride = c->heads * c->head_dim;
  acre_keys prefix = case_keys(work, 0, c->N), own = case_keys(work, c->N, c->rows);
  work->backend->ops->attend(work->queue, out, stride, lse, work->x, stride,
                             c->N ? &prefix : NULL, &own, 0, c->rows, true, &heads);
}

/* out holds dqkv, dk, dv and the scratch, one after the other. */
static inline void case_open_back(op_work *work) {
  const op_case *c = &work->c;
  case_open_keys(work);
  int64_t n = c->rows * c->heads * c->head_dim, width = case_width(c);
  work->typed_x = case_typed(work->x, n, c->dtype);
  work->dout = case_floats(work, n, 1);
  work->lse = case_memory((size_t)(c->rows * c->heads) * sizeof(float));
  work->attended = case_memory((size_t)n * acre_dtype_size(c->dtype));
  case_attend(work, work->attended, work->lse);
  acre_free(work->out);
  int64_t out = ACRE_ATTEND_PARTS * n + 2 * (c->rows + c->N) * width;
  work->out = case_memory((size_t)out * sizeof(float));
}

static inline void case_attend_back(op_work *work) {
  const op_case *c = &work->c;
  acre_heads heads = case_heads(c);
  acre_keys prefix = case_keys(work, 0, c->N), own = case_keys(work, c->N, c->rows);
  float *dqkv = work->out;
  float *dk = dqkv + c->rows * (c->heads + 2 * c->kv_heads) * c->head_dim;
  float *dv = dk + c->N * case_width(c);
  work->backend->ops->attend_back(work->queue, dqkv, dk, dv, dv + c->N * case_width(c),
                                  work->dout, work->attended, work->lse, work->typed_x,
                                  c->N ? &prefix : NULL, &own, c->rows, &heads);
}

/* Rows to be moved or rotated; cos and sin lie in x. */
static inline void case_open_rows(op_work *work) {
  const op_case *c = &work->c;
  int64_t width = case_width(c);
  float *x = case_floats(work, c->rows * width, 1);
  work->keys = case_typed(x, c->rows * width, c->dtype);
  acre_free(x);
  work->x = case_floats(work, c->rows * c->head_dim, 1);
  work->out = case_memory((size_t)(c->rows * width) * acre_dtype_size(c->dtype));
  work->span_count = c->rows / 16;
  work->spans = case_memory((size_t)work->span_count * sizeof *work->spans);
  size_t row = (size_t)width * acre_dtype_size(c->dtype);
  for (int64_t i = 0; i < work->span_count; i++) { /* scattered, as chosen groups are */
    int64_t from = i * 7 % work->span_count;
    work->spans[i] =
        (acre_span){(const char *)work->keys + (size_t)(from * 16) * row, i * 16, 16};
  }
}

static inline op_work case_open(const op_case *c, acre_backend *backend,
                                acre_queue *queue) {
  op_work work = {.c = *c, .backend = backend, .queue = queue, .seed = 1};
  switch (c->kind) {
    case OP_MATMUL:
    case OP_SWIGLU: case_open_products(&work); break;
    case OP_ATTEND:
    case OP_SCORE: case_open_keys(&work); break;
    case OP_ATTEND_BACK: case_open_back(&work); break;
    case OP_ROTATE:
    case OP_COPY: case_open_rows(&work); break;
    case OP_NORM:
      work.x = case_floats(&work, c->rows * c->K, 1);
      work.w = case_floats(&work, c->K, 1);
      work.out = case_memory((size_t)(c->rows * c->K) * sizeof(float));
  }
  return work;
}

static inline void case_close(op_work *work) {
  if (work->W) work->backend->ops->matrix_release(work->W);
  if (work->up) work->backend->ops->matrix_release(work->up);
  void *memory[] = {work->w,    work->w_up,   work->x,   work->typed_x,
                    work->keys, work->values, work->out, work->spans,
                    work->use,  work->dout,   work->lse, work->attended};
  for (size_t i = 0; i < sizeof memory / sizeof *memory; i++) acre_free(memory[i]);
}

static inline void case_run(void *context) {
  op_work *work = context;
  const op_case *c = &work->c;
  const acre_backend_ops *ops = work->backend->ops;
  acre_heads heads = case_heads(c);
  switch (c->kind) {
    case OP_MATMUL:
      ops->matmul(work->queue, work->out, c->N, work->typed_x, work->W, NULL, c->rows,
                  false);
      break;
    case OP_SWIGLU:
      ops->swiglu(work->queue, work->out, work->typed_x, work->W, work->up, c->rows);
      break;
    case OP_ATTEND: case_attend(work, work->out, NULL); break;
    case OP_ATTEND_BACK: case_attend_back(work); break;
    case OP_SCORE:
      memset(work->out, 0, (size_t)c->N * sizeof(float));
      ops->score(work->queue, work->out, work->x, c->heads * c->head_dim, work->keys,
                 work->use, c->rows, c->N, &heads);
      break;
    case OP_ROTATE:
      ops->rotate(work->queue, work->out, work->keys, work->x,
                  work->x + c->rows * c->head_dim / 2, 0, c->rows, &heads);
      break;
    case OP_COPY:
      ops->copy_rows(work->queue, work->out, work->spans, work->span_count,
                     (size_t)case_width(c) * acre_dtype_size(c->dtype));
      break;
    case OP_NORM:
      ops->rmsnorm(work->queue, work->out, work->x, work->w, 1e-5, c->rows, c->K, c->dtype);
  }
}

/* ---------------------------------------------------------------- checks */

#define CASE_EPS 0x1p-24

/* Half a step of T. */
static inline double case_unit(acre_dtype dtype) {
  return dtype == ACRE_F32 ? CASE_EPS : 0x1p-8;
}

/* x[i, :] w[j, :], and the sum of |products|. Not for q8, whose numbers are others. */
static inline double case_dot(const op_work *work, const float *w, int64_t i, int64_t j,
                              double *size) {
  double sum = 0.0;
  for (int64_t k = 0; k < work->c.K; k++) {
    double p = case_number(work->typed_x, i * work->c.K + k, work->c.dtype) *
               case_as(w[j * work->c.K + k], work->c.dtype);
    sum += p, *size += fabs(p);
  }
  return sum;
}

static inline bool check_products(const op_work *work) {
  const op_case *c = &work->c;
  bool gated = c->kind == OP_SWIGLU;
  /* q8: a number is off by half a step, 1/254 of the highest of its block. */
  double loose = c->weights == ACRE_WEIGHTS_Q8 ? 1.0 / 200 : (double)c->K * CASE_EPS;
  for (int64_t i = 0; i < c->rows; i += acre_max(1, c->rows / 3))
    for (int64_t j = 0; j < c->N; j += 97) {
      double size = 1e-30, up_size = 1e-30, sum = case_dot(work, work->w, i, j, &size);
      double error = loose * size, exact = sum;
      if (gated) {
        double up = case_dot(work, work->w_up, i, j, &up_size),
               silu = sum / (1 + exp(-sum));
        exact = silu * up;
        error = 1.1 * error * (fabs(up) + loose * up_size) + loose * up_size * fabs(silu) +
                (8 * CASE_EPS + case_unit(c->dtype)) * fabs(exact);
      }
      double got = case_number(work->out, i * c->N + j, gated ? c->dtype : ACRE_F32);
      if (!(fabs(got - exact) <= error + 1e-6)) return false;
    }
  return true;
}

/* Logit of key j in powers of two. */
static inline double case_logit(const op_work *work, int64_t row, int64_t head, int64_t j) {
  const op_case *c = &work->c;
  int64_t kv = head / (c->heads / c->kv_heads);
  double sum = 0.0;
  for (int64_t x = 0; x < c->head_dim; x++)
    sum += (double)case_as(work->x[(row * c->heads + head) * c->head_dim + x], c->dtype) *
           case_number(work->keys, (j * c->kv_heads + kv) * c->head_dim + x, c->dtype);
  return sum * 1.4426950408889634 / sqrt((double)c->head_dim);
}

/* One head of some rows. Weights and the result are each off by half a step of T, the
 * weights' errors meeting at random; values are at most 1. */
static inline bool check_attend(const op_work *work) {
  const op_case *c = &work->c;
  int64_t d = c->head_dim, kv_group = c->heads / c->kv_heads;
  double *p = case_memory((size_t)(c->N + c->rows) * sizeof *p);
  bool right = true;
  for (int64_t i = 0; i < c->rows; i += acre_max(1, c->rows / 2)) {
    int64_t head = (i * 5 + c->heads - 1) % c->heads, keys = c->N + i + 1;
    double sum = 0.0, bound = 2e-5 + 2 * case_unit(c->dtype) / sqrt((double)keys);
    for (int64_t j = 0; j < keys; j++) sum += p[j] = exp2(case_logit(work, i, head, j));
    for (int64_t x = 0; x < d; x += 13) {
      double o = 0.0;
      for (int64_t j = 0; j < keys; j++)
        o += p[j] * case_number(work->values, (j * c->kv_heads + head / kv_group) * d + x,
                                c->dtype);
      double got = case_number(work->out, (i * c->heads + head) * d + x, c->dtype);
      right &= fabs(got - o / sum) <= bound + case_unit(c->dtype) * fabs(o / sum);
    }
  }
  acre_free(p);
  return right;
}

/* The weight of key j for a row and head, and the derivative of its logit. */
static inline double case_weight(const op_work *work, int64_t row, int64_t head, int64_t j,
                                 double *ds) {
  const op_case *c = &work->c;
  int64_t d = c->head_dim, item = row * c->heads + head;
  int64_t key = j * c->kv_heads + head / (c->heads / c->kv_heads);
  double gap = 0.0, p = exp2(case_logit(work, row, head, j) - work->lse[item]);
  for (int64_t x = 0; x < d; x++)
    gap += case_as(work->dout[item * d + x], c->dtype) *
           (case_number(work->values, key * d + x, c->dtype) -
            case_number(work->attended, item * d + x, c->dtype));
  *ds = p * gap / sqrt((double)d);
  return p;
}

/* A sum whose terms are each off by a step of T, mostly less. */
static inline bool case_near(const op_work *work, float got, double sum, double size) {
  return fabs(got - sum) <= (2 * case_unit(work->c.dtype) + 1e-4) * size + 1e-6;
}

/* Of key N + j and its first KV head: dk, dv; of row j and head 0: dq. In column x. */
static inline bool check_gradients(const op_work *work, int64_t j, int64_t x) {
  const op_case *c = &work->c;
  int64_t d = c->head_dim, h = c->heads, group = h / c->kv_heads;
  const float *got = (float *)work->out + j * (h + 2 * c->kv_heads) * d + x;
  double ds, sum[3] = {0}, size[3] = {1e-30, 1e-30, 1e-30};
  for (int64_t item = j * group; item < c->rows * group; item++) {
    int64_t at = (item / group * h + item % group) * d + x;
    double p = case_weight(work, item / group, item % group, c->N + j, &ds);
    double k = ds * case_number(work->typed_x, at, c->dtype);
    double v = p * case_as(work->dout[at], c->dtype);
    sum[1] += k, size[1] += fabs(k), sum[2] += v, size[2] += fabs(v);
  }
  for (int64_t key = 0; key <= c->N + j; key++) {
    case_weight(work, j, 0, key, &ds);
    double q = ds * case_number(work->keys, key * case_width(c) + x, c->dtype);
    sum[0] += q, size[0] += fabs(q);
  }
  return case_near(work, got[0], sum[0], size[0]) &&
         case_near(work, got[h * d], sum[1], size[1]) &&
         case_near(work, got[(h + c->kv_heads) * d], sum[2], size[2]);
}

static inline bool check_attend_back(const op_work *work) {
  bool right = true;
  for (int64_t j = 0; j < work->c.rows; j += acre_max(1, work->c.rows / 5))
    right &= check_gradients(work, j, j % work->c.head_dim);
  return right;
}

static inline bool check_score(const op_work *work) {
  const op_case *c = &work->c;
  double *scores = case_memory((size_t)c->N * sizeof *scores);
  double *p = case_memory((size_t)c->N * sizeof *p);
  for (int64_t i = 0; i < c->rows * c->heads; i++) {
    double sum = 0.0;
    for (int64_t j = 0; j < c->N; j++)
      sum += p[j] = exp2(case_logit(work, i / c->heads, i % c->heads, j));
    for (int64_t j = 0; j < c->N; j++) scores[j] += p[j] / sum;
  }
  bool right = true;
  for (int64_t j = 0; j < c->N; j++)
    right &= fabs(((const float *)work->out)[j] - scores[j]) <= 1e-4 * scores[j];
  acre_free(scores), acre_free(p);
  return right;
}

static inline bool check_rotate(const op_work *work) {
  const op_case *c = &work->c;
  int64_t half = c->head_dim / 2, heads = c->kv_heads;
  bool right = true;
  for (int64_t i = 0; i < c->rows * heads; i += 101)
    for (int64_t x = 0; x < half; x += 7) {
      double a = case_number(work->keys, i * 2 * half + x, c->dtype);
      double b = case_number(work->keys, i * 2 * half + half + x, c->dtype);
      double cosine = work->x[i / heads * half + x];
      double sine = work->x[(c->rows + i / heads) * half + x];
      double got = case_number(work->out, i * 2 * half + x, c->dtype);
      right &= fabs(got - (a * cosine - b * sine)) <= 2 * case_unit(c->dtype);
    }
  return right;
}

static inline bool check_copy(const op_work *work) {
  const op_case *c = &work->c;
  size_t bytes = (size_t)(16 * case_width(c)) * acre_dtype_size(c->dtype);
  bool right = true;
  for (int64_t i = 0; i < work->span_count; i++)
    right &=
        memcmp((char *)work->out + (size_t)i * bytes, work->spans[i].source, bytes) == 0;
  return right;
}

static inline bool check_norm(const op_work *work) {
  const op_case *c = &work->c;
  bool right = true;
  for (int64_t i = 0; i < c->rows; i += 37) {
    double sum = 0.0;
    for (int64_t k = 0; k < c->K; k++) sum += pow(work->x[i * c->K + k], 2);
    for (int64_t k = 0; k < c->K; k++) {
      double exact = work->x[i * c->K + k] / sqrt(sum / (double)c->K + 1e-5) * work->w[k];
      double error = (case_unit(c->dtype) + 50 * CASE_EPS) * fabs(exact) + 1e-30;
      right &= fabs(case_number(work->out, i * c->K + k, c->dtype) - exact) <= error;
    }
  }
  return right;
}

static inline bool case_check(op_work *work) {
  case_run(work);
  switch (work->c.kind) {
    case OP_MATMUL:
    case OP_SWIGLU: return check_products(work);
    case OP_ATTEND: return check_attend(work);
    case OP_ATTEND_BACK: return check_attend_back(work);
    case OP_SCORE: return check_score(work);
    case OP_ROTATE: return check_rotate(work);
    case OP_COPY: return check_copy(work);
    case OP_NORM: return check_norm(work);
  }
  return false;
}

#endif
