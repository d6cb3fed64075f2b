/* y (+)= T(x) W^T: packs weights once, multiplies in blocks that fit the caches.
 *
 * A task owns a block of rows and a range of columns of y and goes over K in blocks. It
 * copies (and rounds) its rows of x, takes one group of panels at a time, widened to
 * float32 where many rows share them, and lets the tile kernel add into a float32 block
 * of its own. Partial sums are stored and reloaded as they are, so neither blocking nor
 * the number of rows shows in the bits: a row of a large product equals the same row
 * alone. */
#include "matmul.h"

/* ---------------------------------------------------------------- weights */

acre_status acre_cpu_matrix_create(acre_backend *backend, acre_matrix **out, int64_t N,
                                   int64_t K, acre_dtype dtype, acre_error *error) {
  *out = NULL;
  if (N < 1 || K < 1)
    return acre_fail(error, ACRE_BAD_SHAPE,
                     "matrix is [%lld, %lld], expected positive sizes", (long long)N,
                     (long long)K);
  if (dtype != ACRE_F32 && dtype != ACRE_BF16)
    return acre_fail(error, ACRE_UNSUPPORTED, "matrix dtype is %s, expected f32 or bf16",
                     acre_dtype_name(dtype));
  acre_matrix matrix = {(cpu_backend *)backend, NULL, N, K, dtype};
  int64_t bytes;
  if (K > INT64_MAX / 64 || N > INT64_MAX / 64 ||
      !acre_mul(&bytes, acre_panel_size(&matrix), acre_ceil_div(N, ACRE_PANEL)) ||
      !acre_mul(&bytes, bytes, (int64_t)acre_dtype_size(dtype)))
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

#define FILL_CHUNK 256 /* even: pairs of bf16 stay whole */

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

static bool all_finite(const float *x, int64_t count) {
  uint32_t worst = 0;
  for (int64_t i = 0; i < count; i++) {
    uint32_t magnitude = acre_bits(x[i]) & 0x7fffffffu;
    worst = magnitude > worst ? magnitude : worst;
  }
  return worst < 0x7f800000u;
}

/* Stores values x[0..count) of column j (within its panel) from index `first` of K
 * on. */
static void store_column(const acre_matrix *matrix, void *panel, int64_t j, int64_t first,
                         const float *x, int64_t count) {
  if (matrix->dtype == ACRE_F32) {
    float *to = (float *)panel + first * ACRE_PANEL + j;
    for (int64_t i = 0; i < count; i++) to[i * ACRE_PANEL] = x[i];
    return;
  }
  uint16_t *to = (uint16_t *)panel + first * ACRE_PANEL + 2 * j;
  for (int64_t i = 0; i < count; i++)
    to[i / 2 * (2 * ACRE_PANEL) + i % 2] = acre_to_bf16(x[i]);
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
  data += panel * acre_panel_size(matrix) * (int64_t)acre_dtype_size(matrix->dtype);
  for (int64_t c = 0; c < matrix->K; c += FILL_CHUNK) {
    int64_t count = acre_min(FILL_CHUNK, matrix->K - c);
    for (int64_t n = begin; n < end; n++) {
      float x[FILL_CHUNK];
      read_row(x, job->host, n - job->row, c, count);
      if (matrix->dtype == ACRE_BF16) matrix->backend->kernels.round(x, x, count);
      if (!all_finite(x, count)) atomic_store(&job->infinite, true);
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

/* ---------------------------------------------------------------- product */

#define BLOCK_ROWS 120 /* a multiple of every tile_rows */
#define BLOCK_K 384    /* even; a widened panel group stays in L1 */
#define BLOCK_PANELS 32
#define BLOCK_X (BLOCK_ROWS * (BLOCK_K + 16))
#define BLOCK_Y (BLOCK_ROWS * BLOCK_PANELS * ACRE_PANEL)
#define BLOCK_B (BLOCK_K * 2 * ACRE_PANEL)

_Static_assert(BLOCK_X + BLOCK_Y + BLOCK_B <= ACRE_WORKER_FLOATS, "scratch is too small");

typedef struct matmul_job {
  acre_queue *queue;
  float *y;
  int64_t y_stride;
  const float *x;
  const acre_matrix *W;
  const float *bias;
  bool accumulate;
  int64_t rows;
  int64_t block_rows, block_panels, block_k;
  int64_t row_blocks;
} matmul_job;

/* Rows of T(x) from index k_first on, side by side with a stride that is no power of
 * two. */
static int64_t load_x(const matmul_job *job, float *to, int64_t row, int64_t rows,
                      int64_t k_first, int64_t k) {
  const acre_kernels *kernels = job->queue->kernels;
  int64_t K = job->W->K, stride = acre_round_up(k, 16) + 16;
  for (int64_t i = 0; i < rows; i++) {
    const float *x_i = job->x + (row + i) * K + k_first;
    if (job->W->dtype == ACRE_BF16)
      kernels->round(to + i * stride, x_i, k);
    else
      memcpy(to + i * stride, x_i, (size_t)k * sizeof(float));
  }
  return stride;
}

/* Few rows: the panels are read once, as they lie. */
static void multiply_thin(const matmul_job *job, float *c, int64_t c_stride, const float *x,
                          int64_t x_stride, int64_t rows, int64_t panel, int64_t panels,
                          int64_t k_first, int64_t k) {
  const acre_kernels *kernels = job->queue->kernels;
  int64_t size = acre_panel_size(job->W), first = panel * size + k_first * ACRE_PANEL;
  const void *data = acre_buffer_data(job->W->buffer);
  bool add = k_first > 0;
  if (job->W->dtype == ACRE_BF16)
    kernels->tile_bf16(c, c_stride, x, x_stride, (const uint16_t *)data + first, size, rows,
                       panels, k, add);
  else
    kernels->tile(c, c_stride, x, x_stride, (const float *)data + first, ACRE_PANEL, size,
                  rows, panels, k, add);
}

/* Many rows: every group of panels, widened once, meets all rows of the block. */
static void multiply_block(const matmul_job *job, float *c, int64_t c_stride,
                           const float *x, int64_t x_stride, float *wide, int64_t rows,
                           int64_t panel, int64_t panels, int64_t k_first, int64_t k) {
  const acre_kernels *kernels = job->queue->kernels;
  int64_t size = acre_panel_size(job->W), group = kernels->tile_panels;
  const void *data = acre_buffer_data(job->W->buffer);
  for (int64_t p = 0; p < panels; p += group) {
    int64_t count = acre_min(group, panels - p);
    int64_t first = (panel + p) * size + k_first * ACRE_PANEL;
    const float *b = (const float *)data + first;
    int64_t b_size = size;
    if (job->W->dtype == ACRE_BF16) {
      b = wide;
      b_size = k * ACRE_PANEL;
      for (int64_t i = 0; i < count; i++)
        kernels->expand(wide + i * b_size, (const uint16_t *)data + first + i * size, k);
    }
    for (int64_t i = 0; i < rows; i += kernels->tile_rows)
      kernels->tile(c + i * c_stride + p * ACRE_PANEL, c_stride, x + i * x_stride, x_stride,
                    b, ACRE_PANEL, b_size, acre_min(kernels->tile_rows, rows - i), count, k,
                    k_first > 0);
  }
}

static void finish(const matmul_job *job, float *c, int64_t c_stride, int64_t row,
                   int64_t rows, int64_t column, int64_t columns) {
  const acre_kernels *kernels = job->queue->kernels;
  for (int64_t i = 0; i < rows; i++) {
    float *c_i = c + i * c_stride;
    float *y_i = job->y + (row + i) * job->y_stride + column;
    if (job->bias && job->accumulate) kernels->add(c_i, c_i, job->bias + column, columns);
    if (job->accumulate)
      kernels->add(y_i, c_i, y_i, columns);
    else if (job->bias)
      kernels->add(y_i, c_i, job->bias + column, columns);
    else
      memcpy(y_i, c_i, (size_t)columns * sizeof(float));
  }
}

static void matmul_task(void *context, int64_t index, int32_t worker) {
  const matmul_job *job = context;
  const acre_matrix *W = job->W;
  float *x = acre_cpu_scratch(job->queue, worker), *c = x + BLOCK_X, *wide = c + BLOCK_Y;
  int64_t row = index % job->row_blocks * job->block_rows;
  int64_t rows = acre_min(job->block_rows, job->rows - row);
  int64_t panel = index / job->row_blocks * job->block_panels;
  int64_t panels = acre_min(job->block_panels, acre_ceil_div(W->N, ACRE_PANEL) - panel);
  int64_t c_stride = panels * ACRE_PANEL;
  for (int64_t k_first = 0; k_first < W->K; k_first += job->block_k) {
    int64_t k = acre_min(job->block_k, W->K - k_first);
    int64_t x_stride = load_x(job, x, row, rows, k_first, k);
    if (job->rows <= job->queue->kernels->tile_rows)
      multiply_thin(job, c, c_stride, x, x_stride, rows, panel, panels, k_first, k);
    else
      multiply_block(job, c, c_stride, x, x_stride, wide, rows, panel, panels, k_first, k);
  }
  int64_t column = panel * ACRE_PANEL;
  finish(job, c, c_stride, row, rows, column, acre_min(c_stride, W->N - column));
}

/* Blocks as large as the scratch allows, but enough tasks to keep every thread busy. */
static void choose_blocks(matmul_job *job) {
  int64_t threads = acre_pool_threads(job->queue->pool);
  int64_t panels = acre_ceil_div(job->W->N, ACRE_PANEL);
  int64_t tile_rows = job->queue->kernels->tile_rows;
  if (job->rows <= tile_rows) {
    job->block_rows = job->rows;
    job->block_k = (BLOCK_X / job->rows - 32) / 16 * 16;
  } else {
    int64_t blocks = acre_ceil_div(job->rows, BLOCK_ROWS);
    job->block_rows = acre_round_up(acre_ceil_div(job->rows, blocks), tile_rows);
    job->block_k = BLOCK_K;
  }
  job->row_blocks = acre_ceil_div(job->rows, job->block_rows);
  int64_t wanted = acre_ceil_div(4 * threads, job->row_blocks); /* ranges of columns */
  int64_t each = acre_round_up(acre_ceil_div(panels, wanted), 4);
  job->block_panels = acre_min(acre_max(each, 4), BLOCK_PANELS);
}

void acre_cpu_matmul(acre_queue *queue, float *y, int64_t y_stride, const float *x,
                     const acre_matrix *W, const float *bias, int64_t rows,
                     bool accumulate) {
  if (rows <= 0) return;
  matmul_job job = {.queue = queue,
                    .y = y,
                    .y_stride = y_stride,
                    .x = x,
                    .W = W,
                    .bias = bias,
                    .accumulate = accumulate,
                    .rows = rows};
  choose_blocks(&job);
  int64_t panels = acre_ceil_div(W->N, ACRE_PANEL);
  acre_pool_run(queue->pool, matmul_task, &job,
                job.row_blocks * acre_ceil_div(panels, job.block_panels));
}
