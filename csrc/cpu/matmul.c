/* y (+)= x W^T, silu(x G^T) * (x U^T), and dW += dy^T x, multiplied in blocks that fit the
 * caches.
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

/* ---------------------------------------------------------------- gradient of weights */

#define BACK_DEPTH 128  /* rows of dy and x at a time: two panels stay in L1 */
#define BACK_STRIDE 144 /* of dy^T: no power of two */
#define BACK_PANELS 24  /* of x */
#define BACK_A (BLOCK_ROWS * BACK_STRIDE) /* floats */
#define BACK_B (BACK_PANELS * BACK_DEPTH * ACRE_PANEL)

_Static_assert(BACK_A + BACK_B + ACRE_ROWS_LIMIT * ACRE_PANEL <= ACRE_WORKER_FLOATS,
               "scratch is too small");

typedef struct back_job {
  acre_queue *queue;
  const acre_typed *f32, *T;
  float *dW;
  const float *dy;
  int64_t dy_stride;
  const void *x;
  size_t size; /* of a number of T */
  int64_t rows, N, K;
  int64_t block_n, block_panels, n_blocks;
} back_job;

/* One task's part of dW, and its operands for some rows of dy and x. */
typedef struct back_block {
  int64_t n, count_n, panel, panels; /* panels: of columns of dW, the last maybe ragged */
  int64_t row, depth;
  float *a, *b, *ragged; /* dy^T, x in panels, a tile of dW's last columns */
} back_block;

static void turn_dy(const back_job *job, const back_block *b) {
  const float *dy = job->dy + b->row * job->dy_stride + b->n;
  for (int64_t first = 0; first < b->depth; first += ACRE_PANEL) {
    int64_t count = acre_min(ACRE_PANEL, b->depth - first); /* lines that stay in L1 */
    for (int64_t n = 0; n < b->count_n; n++)
      for (int64_t i = first; i < first + count; i++)
        b->a[n * BACK_STRIDE + i] = dy[i * job->dy_stride + n];
  }
}

static void cut_x(const back_job *job, const back_block *b) {
  float row[BACK_PANELS * ACRE_PANEL] = {0};
  int64_t column = b->panel * ACRE_PANEL;
  int64_t count = acre_min(b->panels * ACRE_PANEL, job->K - column);
  for (int64_t i = 0; i < b->depth; i++) {
    int64_t from = (b->row + i) * job->K + column;
    job->T->widen(row, (const char *)job->x + (size_t)from * job->size, count);
    for (int64_t p = 0; p < b->panels; p++)
      memcpy(b->b + (p * BACK_DEPTH + i) * ACRE_PANEL, row + p * ACRE_PANEL,
             ACRE_PANEL * sizeof(float));
  }
}

/* Panel p where dW has fewer than 16 columns left: by way of a tile of scratch. */
static void add_ragged(const back_job *job, const back_block *b, int64_t p, int64_t n,
                       int64_t count) {
  int64_t column = (b->panel + p) * ACRE_PANEL;
  size_t bytes = (size_t)(job->K - column) * sizeof(float);
  float *dW = job->dW + (b->n + n) * job->K + column;
  for (int64_t i = 0; i < count; i++)
    memcpy(b->ragged + i * ACRE_PANEL, dW + i * job->K, bytes);
  job->f32->tile(b->ragged, ACRE_PANEL, b->a + n * BACK_STRIDE, BACK_STRIDE,
                 b->b + p * BACK_DEPTH * ACRE_PANEL, BACK_DEPTH * ACRE_PANEL, count, 1,
                 b->depth, true);
  for (int64_t i = 0; i < count; i++)
    memcpy(dW + i * job->K, b->ragged + i * ACRE_PANEL, bytes);
}

static void add_products(const back_job *job, const back_block *b) {
  const acre_typed *f32 = job->f32;
  int64_t whole = acre_min(b->panels, job->K / ACRE_PANEL - b->panel);
  for (int64_t p = 0; p < b->panels; p += f32->tile_panels) {
    int64_t panels = acre_min(f32->tile_panels, b->panels - p);
    int64_t direct = acre_min(panels, whole - p);
    for (int64_t n = 0; n < b->count_n; n += f32->tile_rows) {
      int64_t count = acre_min(f32->tile_rows, b->count_n - n);
      if (direct > 0)
        f32->tile(job->dW + (b->n + n) * job->K + (b->panel + p) * ACRE_PANEL, job->K,
                  b->a + n * BACK_STRIDE, BACK_STRIDE, b->b + p * BACK_DEPTH * ACRE_PANEL,
                  BACK_DEPTH * ACRE_PANEL, count, direct, b->depth, true);
      if (direct < panels) add_ragged(job, b, p + panels - 1, n, count);
    }
  }
}

static void back_task(void *context, int64_t index, int32_t worker) {
  const back_job *job = context;
  float *scratch = acre_cpu_scratch(job->queue, worker);
  back_block b = {.n = index % job->n_blocks * job->block_n,
                  .panel = index / job->n_blocks * job->block_panels,
                  .a = scratch,
                  .b = scratch + BACK_A,
                  .ragged = scratch + BACK_A + BACK_B};
  b.count_n = acre_min(job->block_n, job->N - b.n);
  b.panels = acre_min(job->block_panels, acre_ceil_div(job->K, ACRE_PANEL) - b.panel);
  for (b.row = 0; b.row < job->rows; b.row += BACK_DEPTH) {
    b.depth = acre_min(BACK_DEPTH, job->rows - b.row);
    turn_dy(job, &b);
    cut_x(job, &b);
    add_products(job, &b);
  }
}

/* A sum is stored and taken up again as it is, so blocks do not show in the bits. */
void acre_cpu_matmul_back(acre_queue *queue, float *dW, const float *dy, int64_t dy_stride,
                          const void *x, int64_t rows, int64_t N, int64_t K,
                          acre_dtype dtype) {
  if (rows <= 0) return;
  back_job job = {.queue = queue,
                  .f32 = &queue->kernels->of[ACRE_F32],
                  .T = &queue->kernels->of[dtype],
                  .dW = dW,
                  .dy = dy,
                  .dy_stride = dy_stride,
                  .x = x,
                  .size = acre_dtype_size(dtype),
                  .rows = rows,
                  .N = N,
                  .K = K};
  int64_t panels = acre_ceil_div(K, ACRE_PANEL), threads = acre_pool_threads(queue->pool);
  int64_t blocks = acre_ceil_div(panels, BACK_PANELS);
  int64_t even = acre_round_up(acre_ceil_div(N, 4 * threads), job.f32->tile_rows);
  job.block_panels = acre_ceil_div(panels, blocks);
  job.block_n = acre_min(even, BLOCK_ROWS);
  job.n_blocks = acre_ceil_div(N, job.block_n);
  acre_pool_run(queue->pool, back_task, &job, job.n_blocks * blocks);
}
