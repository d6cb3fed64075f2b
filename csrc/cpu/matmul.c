/* y (+)= x W^T, and silu(x G^T) * (x U^T), multiplied in blocks that fit the caches.
 *
 * A task owns a block of rows and a range of columns of y and goes over K in blocks. It
 * copies its rows of x, takes one group of panels at a time, as operands of the table,
 * and lets the tile kernel add into a float32 block of its own. Partial sums are stored
 * and reloaded as they are, so neither blocking nor the number of rows shows in the
 * bits: a row of a large product equals the same row alone. */
#include "matmul.h"

/* ---------------------------------------------------------------- product */

#define BLOCK_ROWS 144 /* a multiple of every tile_rows */
#define BLOCK_K \
  384                   /* float32 numbers of K, or as many bytes of bf16 ones: a multiple
                           of every pack_k; a group of panels stays in L1 */
#define BLOCK_PANELS 32 /* of one matrix, or half as many of two */
#define BLOCK_X (BLOCK_ROWS * (BLOCK_K + 32)) /* floats */
#define BLOCK_Y (BLOCK_ROWS * BLOCK_PANELS * ACRE_PANEL)
#define BLOCK_B (BLOCK_K * 2 * ACRE_PANEL)

_Static_assert(BLOCK_X + BLOCK_Y + BLOCK_B <= ACRE_WORKER_FLOATS, "scratch is too small");

typedef struct matmul_job {
  acre_queue *queue;
  const acre_typed *T;
  const void *x;
  const acre_matrix *W, *up; /* up: the second matrix of swiglu, else NULL */
  float *y;
  int64_t y_stride;
  void *product; /* y of swiglu */
  const float *bias;
  bool accumulate;
  int64_t rows;
  int64_t block_rows, block_panels, block_k;
  int64_t row_blocks;
} matmul_job;

/* What one task works on. Its rows of x from index k_first on lie side by side with a
 * stride that is no power of two; c has the panels of its range of columns. */
typedef struct block {
  int64_t row, rows, panel, panels, k_first, k;
  void *x;
  int64_t x_stride;
  float *c;
  int64_t c_stride;
  void *wide; /* a group of panels as operands */
} block;

static void load_x(const matmul_job *job, block *b) {
  int64_t K = job->W->K;
  b->x_stride = acre_round_up(b->k, 32) + 32;
  for (int64_t i = 0; i < b->rows; i++) {
    int64_t from = (b->row + i) * K + b->k_first;
    job->T->load((char *)b->x + i * b->x_stride * job->T->operand,
                 (const char *)job->x + (size_t)from * acre_dtype_size(job->W->dtype),
                 b->k);
  }
}

/* Few rows: the panels are read once, as they lie. */
static void multiply_thin(const block *b, const acre_matrix *W, float *c) {
  const acre_typed *T = acre_matrix_typed(W);
  const char *packed = acre_buffer_data(W->buffer);
  int64_t size = acre_panel_bytes(W);
  packed += b->panel * size + acre_packed_offset(W, b->k_first);
  T->thin(T, c, b->c_stride, b->x, b->x_stride, packed, size, b->rows, b->panels, b->k,
          b->k_first > 0);
}

/* Many rows: every group of panels, unpacked once, meets all rows of the block. */
static void multiply_block(const block *b, const acre_matrix *W, float *c) {
  const acre_typed *T = acre_matrix_typed(W);
  const char *packed = acre_buffer_data(W->buffer);
  int64_t size = acre_panel_bytes(W), stride;
  packed += b->panel * size + acre_packed_offset(W, b->k_first);
  for (int64_t p = 0; p < b->panels; p += T->tile_panels) {
    int64_t count = acre_min(T->tile_panels, b->panels - p);
    const void *panels = T->unpack(b->wide, &stride, packed + p * size, size, count, b->k);
    for (int64_t i = 0; i < b->rows; i += T->tile_rows)
      T->tile(c + i * b->c_stride + p * ACRE_PANEL, b->c_stride,
              (const char *)b->x + i * b->x_stride * T->operand, b->x_stride, panels,
              stride, acre_min(T->tile_rows, b->rows - i), count, b->k, b->k_first > 0);
  }
}

static void finish(const matmul_job *job, const block *b, int64_t columns) {
  const acre_kernels *kernels = job->queue->kernels;
  int64_t column = b->panel * ACRE_PANEL;
  for (int64_t i = 0; i < b->rows; i++) {
    float *c_i = b->c + i * b->c_stride;
    float *y_i = job->y + (b->row + i) * job->y_stride + column;
    if (job->bias && job->accumulate) kernels->add(c_i, c_i, job->bias + column, columns);
    if (job->accumulate)
      kernels->add(y_i, c_i, y_i, columns);
    else if (job->bias)
      kernels->add(y_i, c_i, job->bias + column, columns);
    else
      memcpy(y_i, c_i, (size_t)columns * sizeof(float));
  }
}

static void finish_swiglu(const matmul_job *job, const block *b, float *up,
                          int64_t columns) {
  int64_t column = b->panel * ACRE_PANEL;
  for (int64_t i = 0; i < b->rows; i++) {
    float *gate_i = b->c + i * b->c_stride, *up_i = up + i * b->c_stride;
    int64_t to = (b->row + i) * job->W->N + column;
    job->queue->kernels->swiglu(gate_i, gate_i, up_i, columns);
    job->T->store((char *)job->product + (size_t)to * acre_dtype_size(job->W->dtype),
                  gate_i, columns);
  }
}

static void matmul_task(void *context, int64_t index, int32_t worker) {
  const matmul_job *job = context;
  const acre_matrix *W = job->W;
  block b = {.row = index % job->row_blocks * job->block_rows,
             .panel = index / job->row_blocks * job->block_panels};
  b.rows = acre_min(job->block_rows, job->rows - b.row);
  b.panels = acre_min(job->block_panels, acre_ceil_div(W->N, ACRE_PANEL) - b.panel);
  b.c_stride = b.panels * ACRE_PANEL;
  b.c = acre_cpu_scratch(job->queue, worker);
  b.x = b.c + BLOCK_Y;
  b.wide = b.c + BLOCK_Y + BLOCK_X;
  float *up = b.c + BLOCK_Y / 2;
  bool thin = job->rows <= job->T->tile_rows;
  for (b.k_first = 0; b.k_first < W->K; b.k_first += job->block_k) {
    b.k = acre_min(job->block_k, W->K - b.k_first);
    load_x(job, &b);
    (thin ? multiply_thin : multiply_block)(&b, W, b.c);
    if (job->up) (thin ? multiply_thin : multiply_block)(&b, job->up, up);
  }
  int64_t columns = acre_min(b.c_stride, W->N - b.panel * ACRE_PANEL);
  if (job->up)
    finish_swiglu(job, &b, up, columns);
  else
    finish(job, &b, columns);
}

/* Blocks as large as the scratch allows, but enough tasks to keep every thread busy. */
static void choose_blocks(matmul_job *job) {
  int64_t threads = acre_pool_threads(job->queue->pool);
  int64_t panels = acre_ceil_div(job->W->N, ACRE_PANEL);
  if (job->rows <= job->T->tile_rows) {
    job->block_rows = job->rows;
    job->block_k = (BLOCK_X / job->rows - 64) / 32 * 32;
  } else {
    int64_t blocks = acre_ceil_div(job->rows, BLOCK_ROWS);
    job->block_rows = acre_round_up(acre_ceil_div(job->rows, blocks), job->T->tile_rows);
    job->block_k = BLOCK_K * (int64_t)sizeof(float) / job->T->operand;
  }
  job->row_blocks = acre_ceil_div(job->rows, job->block_rows);
  int64_t wanted = acre_ceil_div(4 * threads, job->row_blocks); /* ranges of columns */
  int64_t each = acre_round_up(acre_ceil_div(panels, wanted), 4);
  job->block_panels = acre_min(acre_max(each, 4), BLOCK_PANELS / (job->up ? 2 : 1));
}

static void multiply(matmul_job *job) {
  if (job->rows <= 0) return;
  job->T = acre_matrix_typed(job->W);
  choose_blocks(job);
  int64_t panels = acre_ceil_div(job->W->N, ACRE_PANEL);
  acre_pool_run(job->queue->pool, matmul_task, job,
                job->row_blocks * acre_ceil_div(panels, job->block_panels));
}

void acre_cpu_matmul(acre_queue *queue, float *y, int64_t y_stride, const void *x,
                     const acre_matrix *W, const float *bias, int64_t rows,
                     bool accumulate) {
  matmul_job job = {.queue = queue,
                    .x = x,
                    .W = W,
                    .y = y,
                    .y_stride = y_stride,
                    .bias = bias,
                    .accumulate = accumulate,
                    .rows = rows};
  multiply(&job);
}

void acre_cpu_swiglu(acre_queue *queue, void *y, const void *x, const acre_matrix *gate,
                     const acre_matrix *up, int64_t rows) {
  matmul_job job = {
      .queue = queue, .x = x, .W = gate, .up = up, .product = y, .rows = rows};
  multiply(&job);
}
