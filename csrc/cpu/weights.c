/* Weight matrices in the panels of kernels.h: made, filled and released.
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
