/* Weight matrices in the panels of kernels.h: made, filled, read back, turned, released.
 *
 * Work is shared out by panels, so a panel is always written by one thread. */
#include "matmul.h"

#include <math.h>

acre_status acre_cpu_matrix_create(acre_backend *backend, acre_matrix **out, int64_t N,
                                   int64_t K, acre_dtype dtype, acre_weights weights,
                                   acre_error *error) {
  *out = NULL;
  if (N < 1 || K < 1)
    return acre_fail(error, ACRE_BAD_SHAPE,
                     "matrix is [%lld, %lld], expected positive sizes", (long long)N,
                     (long long)K);
  if (dtype != ACRE_F32 && dtype != ACRE_BF16)
    return acre_fail(error, ACRE_UNSUPPORTED, "matrix dtype is %s, expected f32 or bf16",
                     acre_dtype_name(dtype));
  if (weights == ACRE_WEIGHTS_Q8 && dtype != ACRE_BF16)
    return acre_fail(error, ACRE_UNSUPPORTED, "q8 weights need dtype bf16, got %s",
                     acre_dtype_name(dtype));
  acre_matrix matrix = {(cpu_backend *)backend, NULL, N, K, dtype, weights};
  int64_t bytes;
  if (K > INT64_MAX / 256 || N > INT64_MAX / 256 ||
      !acre_mul(&bytes, acre_panel_bytes(&matrix), acre_ceil_div(N, ACRE_PANEL)))
    return acre_fail(error, ACRE_NO_MEMORY, "matrix [%lld, %lld] is too large",
                     (long long)N, (long long)K);
  acre_matrix *made = acre_alloc_zero(sizeof *made);
  if (!made) return acre_fail(error, ACRE_NO_MEMORY, "out of memory for a matrix");
  acre_status status = acre_cpu_alloc(backend, &matrix.buffer, (size_t)bytes, error);
  if (status != ACRE_OK) {
    acre_free(made);
    return status;
  }
  *made = matrix;
  *out = made;
  return ACRE_OK;
}

void acre_cpu_matrix_release(acre_matrix *matrix) {
  if (!matrix) return;
  acre_buffer_release(matrix->buffer);
  acre_free(matrix);
}

static float half_to_float(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000u) << 16;
  uint32_t exponent = (h >> 10) & 31u, fraction = h & 0x3ffu;
  if (exponent == 31) return acre_from_bits(sign | 0x7f800000u | fraction << 13);
  if (exponent) return acre_from_bits(sign | (exponent + 112) << 23 | fraction << 13);
  float tiny = (float)fraction * 0x1p-24f; /* zero and denormals, exact */
  return sign ? -tiny : tiny;
}

#define FILL_CHUNK 256 /* a multiple of every pack_k: blocks stay whole */

/* to[i] = host[row, column + i] as float32. */
static void read_row(float *to, const acre_array *host, int64_t row, int64_t column,
                     int64_t count) {
  int64_t step = host->strides[1];
  int64_t first = row * host->strides[0] + column * step;
  switch (host->dtype) {
    case ACRE_F32: {
      const float *from = (const float *)host->data + first;
      for (int64_t i = 0; i < count; i++) to[i] = from[i * step];
      break;
    }
    case ACRE_BF16: {
      const uint16_t *from = (const uint16_t *)host->data + first;
      for (int64_t i = 0; i < count; i++) to[i] = acre_from_bf16(from[i * step]);
      break;
    }
    case ACRE_F16: {
      const uint16_t *from = (const uint16_t *)host->data + first;
      for (int64_t i = 0; i < count; i++) to[i] = half_to_float(from[i * step]);
      break;
    }
    case ACRE_F64: {
      const double *from = (const double *)host->data + first;
      for (int64_t i = 0; i < count; i++) to[i] = (float)from[i * step];
      break;
    }
  }
}

typedef struct fill_job {
  acre_matrix *matrix;
  const acre_array *host;
  int64_t row;
  _Atomic bool infinite;
} fill_job;

/* In T: what rounds to infinity counts. */
static bool all_finite(const float *x, int64_t count, acre_dtype dtype) {
  uint32_t worst = 0, limit = dtype == ACRE_F32 ? 0x7f800000u : 0x7f7f8000u;
  for (int64_t i = 0; i < count; i++) {
    uint32_t magnitude = acre_bits(x[i]) & 0x7fffffffu;
    worst = magnitude > worst ? magnitude : worst;
  }
  return worst < limit;
}

/* The least bf16 >= x / 127, so that x / scale is at most 127. */
static uint16_t q8_scale(float x) {
  uint16_t scale = acre_to_bf16(x / 127);
  return acre_from_bf16(scale) * 127 < x ? scale + 1 : scale;
}

/* Column j of one block of q8. What is not finite is stored as 0: the caller is told. */
static void store_q8(char *block, int64_t j, const float *x, int64_t count) {
  float highest = 0.0f;
  for (int64_t i = 0; i < count; i++) highest = fmaxf(highest, fabsf(x[i]));
  uint16_t scale = q8_scale(highest);
  memcpy(block + j * (int64_t)sizeof scale, &scale, sizeof scale);
  int8_t *q = (int8_t *)block + 2 * ACRE_PANEL;
  for (int64_t i = 0; i < count; i++) {
    float quotient = rintf(x[i] / acre_from_bf16(scale)); /* 0 / 0 in a block of zeros */
    if (!(fabsf(quotient) <= 127)) quotient = 0.0f;
    q[i / 2 * (2 * ACRE_PANEL) + 2 * j + i % 2] = (int8_t)quotient;
  }
}

/* Stores values x[0..count) of column j (within its panel) from index `first` of K
 * on. */
static void store_column(const acre_matrix *matrix, char *panel, int64_t j, int64_t first,
                         const float *x, int64_t count) {
  char *block = panel + acre_packed_offset(matrix, first);
  if (matrix->weights == ACRE_WEIGHTS_Q8) {
    for (int64_t i = 0; i < count; i += ACRE_Q8_K, block += ACRE_Q8_BYTES)
      store_q8(block, j, x + i, acre_min(ACRE_Q8_K, count - i));
  } else if (matrix->dtype == ACRE_F32) {
    float *to = (float *)(void *)block + j;
    for (int64_t i = 0; i < count; i++) to[i * ACRE_PANEL] = x[i];
  } else {
    uint16_t *to = (uint16_t *)(void *)block + 2 * j;
    for (int64_t i = 0; i < count; i++)
      to[i / 2 * (2 * ACRE_PANEL) + i % 2] = acre_to_bf16(x[i]);
  }
}

/* One panel: the rows of host that fall into it. */
static void fill_task(void *context, int64_t index, int32_t worker) {
  (void)worker;
  fill_job *job = context;
  const acre_matrix *matrix = job->matrix;
  int64_t panel = job->row / ACRE_PANEL + index;
  int64_t begin = acre_max(job->row, panel * ACRE_PANEL);
  int64_t end = acre_min(job->row + job->host->shape[0], (panel + 1) * ACRE_PANEL);
  char *data = acre_buffer_data(matrix->buffer);
  data += panel * acre_panel_bytes(matrix);
  for (int64_t c = 0; c < matrix->K; c += FILL_CHUNK) {
    int64_t count = acre_min(FILL_CHUNK, matrix->K - c);
    for (int64_t n = begin; n < end; n++) {
      float x[FILL_CHUNK];
      read_row(x, job->host, n - job->row, c, count);
      if (!all_finite(x, count, matrix->dtype)) atomic_store(&job->infinite, true);
      store_column(matrix, data, n % ACRE_PANEL, c, x, count);
    }
  }
}

void acre_cpu_matrix_fill(acre_matrix *matrix, int64_t row, const acre_array *host,
                          bool *finite) {
  fill_job job = {matrix, host, row, false};
  int64_t end = row + host->shape[0];
  if (end > row)
    acre_pool_run(matrix->backend->pool, fill_task, &job,
                  acre_ceil_div(end, ACRE_PANEL) - row / ACRE_PANEL);
  if (atomic_load(&job.infinite)) *finite = false;
}

/* ---------------------------------------------------------------- and back */

/* Column j of one block of q8, as bf16 numbers. */
static void read_q8(const char *block, int64_t j, float *x, int64_t count) {
  uint16_t scale;
  memcpy(&scale, block + j * (int64_t)sizeof scale, sizeof scale);
  const int8_t *q = (const int8_t *)block + 2 * ACRE_PANEL;
  for (int64_t i = 0; i < count; i++) {
    float number =
        acre_from_bf16(scale) * (float)q[i / 2 * (2 * ACRE_PANEL) + 2 * j + i % 2];
    x[i] = acre_from_bf16(acre_to_bf16(number));
  }
}

/* The reverse of store_column; of q8 the bf16 numbers that it stands for. */
static void read_column(const acre_matrix *matrix, const char *panel, int64_t j,
                        int64_t first, float *x, int64_t count) {
  const char *block = panel + acre_packed_offset(matrix, first);
  if (matrix->weights == ACRE_WEIGHTS_Q8) {
    for (int64_t i = 0; i < count; i += ACRE_Q8_K, block += ACRE_Q8_BYTES)
      read_q8(block, j, x + i, acre_min(ACRE_Q8_K, count - i));
  } else if (matrix->dtype == ACRE_F32) {
    const float *from = (const float *)(const void *)block + j;
    for (int64_t i = 0; i < count; i++) x[i] = from[i * ACRE_PANEL];
  } else {
    const uint16_t *from = (const uint16_t *)(const void *)block + 2 * j;
    for (int64_t i = 0; i < count; i++)
      x[i] = acre_from_bf16(from[i / 2 * (2 * ACRE_PANEL) + i % 2]);
  }
}

typedef struct get_job {
  const acre_matrix *matrix;
  float *x;
  int64_t row, rows;
} get_job;

/* One panel: the rows of x that lie in it. */
static void get_task(void *context, int64_t index, int32_t worker) {
  (void)worker;
  const get_job *job = context;
  int64_t K = job->matrix->K, panel = job->row / ACRE_PANEL + index;
  int64_t begin = acre_max(job->row, panel * ACRE_PANEL);
  int64_t end = acre_min(job->row + job->rows, (panel + 1) * ACRE_PANEL);
  const char *data = acre_buffer_data(job->matrix->buffer);
  data += panel * acre_panel_bytes(job->matrix);
  for (int64_t n = begin; n < end; n++)
    read_column(job->matrix, data, n % ACRE_PANEL, 0, job->x + (n - job->row) * K, K);
}

void acre_cpu_matrix_get(acre_queue *queue, float *x, const acre_matrix *W, int64_t row,
                         int64_t rows) {
  if (rows <= 0) return;
  get_job job = {W, x, row, rows};
  acre_pool_run(queue->pool, get_task, &job,
                acre_ceil_div(row + rows, ACRE_PANEL) - row / ACRE_PANEL);
}

void acre_cpu_matrix_set(acre_queue *queue, acre_matrix *W, int64_t row, const float *x,
                         int64_t rows) {
  (void)queue;
  bool finite;
  acre_array host = {x, ACRE_F32, 2, {rows, W->K}, {W->K, 1}, false};
  acre_cpu_matrix_fill(W, row, &host, &finite);
}

/* ---------------------------------------------------------------- transposed */

#define TURN_K 32 /* numbers of K that a task turns into rows: a multiple of every pack_k */
_Static_assert(TURN_K % ACRE_PANEL == 0 && TURN_K % ACRE_Q8_K == 0, "whole panels, blocks");

typedef struct turn_job {
  const acre_matrix *from, *to;
} turn_job;

/* Columns [first, first + TURN_K) of one panel become 16 numbers of as many rows. */
static void turn_block(const turn_job *job, int64_t panel, int64_t first) {
  const acre_matrix *from = job->from, *to = job->to;
  int64_t rows = acre_min(ACRE_PANEL, from->N - panel * ACRE_PANEL);
  int64_t columns = acre_min(TURN_K, from->K - first);
  const char *source = acre_buffer_data(from->buffer);
  char *target = acre_buffer_data(to->buffer);
  float x[ACRE_PANEL][TURN_K];
  source += panel * acre_panel_bytes(from);
  target += first / ACRE_PANEL * acre_panel_bytes(to);
  for (int64_t j = 0; j < rows; j++) read_column(from, source, j, first, x[j], columns);
  for (int64_t c = 0; c < columns; c++) {
    float column[ACRE_PANEL];
    for (int64_t j = 0; j < rows; j++) column[j] = x[j][c];
    store_column(to, target + c / ACRE_PANEL * acre_panel_bytes(to), c % ACRE_PANEL,
                 panel * ACRE_PANEL, column, rows);
  }
}

static void turn_task(void *context, int64_t index, int32_t worker) {
  (void)worker;
  const turn_job *job = context;
  for (int64_t panel = 0; panel < acre_ceil_div(job->from->N, ACRE_PANEL); panel++)
    turn_block(job, panel, index * TURN_K);
}

acre_status acre_cpu_matrix_transpose(acre_queue *queue, acre_matrix **out,
                                      const acre_matrix *W, acre_error *error) {
  if (!*out) {
    ACRE_TRY(acre_cpu_matrix_create(&W->backend->base, out, W->K, W->N, W->dtype,
                                    ACRE_WEIGHTS_SAME, error));
  }
  turn_job job = {W, *out};
  acre_pool_run(queue->pool, turn_task, &job, acre_ceil_div(W->K, TURN_K));
  return ACRE_OK;
}
