/* The loss, and what training adds to the operations on rows: gradients through them, sums
 * of gradients, and the optimiser.
 *
 * Sums never cross from one thread to another: gradients of a row are one thread's, rows
 * that may be added to the same row are shared out by columns, and the sum of squares is of
 * chunks of a fixed size, added in order. */
#include "rows.h"

#include <math.h>

#define CLEAR_GRAIN (1 << 20) /* bytes that are worth a task */
#define CHUNK 1024            /* float32 numbers that wait on the stack to be rounded */

/* ---------------------------------------------------------------- rows */

static void clear_part(const rows_job *job, int64_t first, int64_t count) {
  memset((char *)job->y + first, 0, (size_t)count);
}

void acre_cpu_clear(acre_queue *queue, void *dst, size_t bytes) {
  rows_job job = {
      .task = clear_part, .rows = (int64_t)bytes, .step = CLEAR_GRAIN, .y = dst};
  acre_cpu_run_steps(queue, &job);
}

static void round_some(const rows_job *job, int64_t first, int64_t count) {
  int64_t row_bytes = job->y_stride * (int64_t)acre_dtype_size(job->dtype);
  for (int64_t i = first; i < first + count; i++)
    job->T->store((char *)job->y + i * row_bytes, (const float *)job->x + i * job->x_stride,
                  job->width);
}

void acre_cpu_round(acre_queue *queue, void *y, int64_t y_stride, const float *x,
                    int64_t x_stride, int64_t rows, int64_t width, acre_dtype dtype) {
  rows_job job = {.task = round_some,
                  .rows = rows,
                  .y = y,
                  .y_stride = y_stride,
                  .x = x,
                  .x_stride = x_stride,
                  .width = width,
                  .dtype = dtype};
  acre_cpu_run_rows(queue, &job, width);
}

/* Here a `row` of the job is 16 columns, a cache line; heads holds the rows of x. */
static void add_columns(const rows_job *job, int64_t first, int64_t count) {
  int64_t column = first * ACRE_PANEL;
  int64_t columns = acre_min(count * ACRE_PANEL, job->width - column);
  for (int64_t i = 0; i < job->heads; i++) {
    int64_t to = job->index ? job->index[i] : i;
    float *y_i = (float *)job->y + to * job->y_stride + column;
    job->kernels->add(y_i, y_i, (const float *)job->x + i * job->x_stride + column,
                      columns);
  }
}

void acre_cpu_add_rows(acre_queue *queue, float *y, int64_t y_stride, const float *x,
                       int64_t x_stride, const int32_t *index, int64_t rows,
                       int64_t width) {
  rows_job job = {.task = add_columns,
                  .rows = acre_ceil_div(width, ACRE_PANEL),
                  .y = y,
                  .y_stride = y_stride,
                  .x = x,
                  .x_stride = x_stride,
                  .index = index,
                  .heads = rows,
                  .width = width};
  acre_cpu_run_rows(queue, &job, rows * ACRE_PANEL);
}

static void rmsnorm_back_some(const rows_job *job, int64_t first, int64_t count) {
  for (int64_t i = first; i < first + count; i++) {
    int64_t at = i * job->width;
    job->kernels->rmsnorm_back((float *)job->y + at, (const float *)job->other + at,
                               (const float *)job->x + at, job->gain, job->eps, job->width);
  }
}

void acre_cpu_rmsnorm_back(acre_queue *queue, float *dx, const float *dy, const float *x,
                           const float *gain, double eps, int64_t rows, int64_t width) {
  rows_job job = {.task = rmsnorm_back_some,
                  .rows = rows,
                  .y = dx,
                  .other = dy,
                  .x = x,
                  .gain = gain,
                  .eps = eps,
                  .width = width};
  acre_cpu_run_rows(queue, &job, 2 * width);
}

/* The rows are dense, so to this operation they are one. */
static void swiglu_back_some(const rows_job *job, int64_t first, int64_t count) {
  size_t size = acre_dtype_size(job->dtype);
  for (int64_t c = first * job->width; c < (first + count) * job->width; c += CHUNK) {
    float dgate[CHUNK], dup[CHUNK];
    int64_t n = acre_min(CHUNK, (first + count) * job->width - c);
    job->kernels->swiglu_back(dgate, dup, (const float *)job->x + c,
                              (const float *)job->table + c, (const float *)job->other + c,
                              n);
    job->T->store((char *)job->y + (size_t)c * size, dgate, n);
    job->T->store((char *)job->values + (size_t)c * size, dup, n);
  }
}

void acre_cpu_swiglu_back(acre_queue *queue, void *dgate, void *dup, const float *gate,
                          const float *up, const float *dy, int64_t rows, int64_t width,
                          acre_dtype dtype) {
  rows_job job = {.task = swiglu_back_some,
                  .rows = rows,
                  .y = dgate,
                  .values = dup,
                  .x = gate,
                  .table = up,
                  .other = dy,
                  .width = width,
                  .dtype = dtype};
  acre_cpu_run_rows(queue, &job, 2 * width);
}

/* ---------------------------------------------------------------- loss */

/* T(weight * (softmax - onehot)); sum is that of the exponentials. */
static void row_gradient(const rows_job *job, char *to, const float *logits, int64_t target,
                         float highest, double sum, float weight) {
  float factor = (float)((double)weight / sum), dlogits[CHUNK];
  for (int64_t c = 0; c < job->vocab; c += CHUNK) {
    int64_t n = acre_min(CHUNK, job->vocab - c), own = target - c;
    job->kernels->exp_scaled(dlogits, logits + c, n, highest, factor);
    if (own >= 0 && own < n)
      dlogits[own] = fmaf(acre_exp(logits[target] - highest), factor, -weight);
    job->T->store(to + (size_t)c * acre_dtype_size(job->dtype), dlogits, n);
  }
}

/* Returns the row's loss; its gradient goes to `to`, where that is wanted. */
static float row_loss(const rows_job *job, int64_t i, char *to) {
  int64_t vocab = job->vocab, target = job->index[i];
  if (target < 0) {
    if (to) memset(to, 0, (size_t)vocab * acre_dtype_size(job->dtype));
    return 0.0f;
  }
  const float *logits = (const float *)job->x + i * vocab;
  float highest = job->kernels->highest(logits, vocab);
  double sum = job->kernels->sum_exp(logits, vocab, highest);
  if (to) row_gradient(job, to, logits, target, highest, sum, job->gain[i]);
  return (float)(log(sum) + (double)highest - (double)logits[target]);
}

/* y holds the gradients, values the losses, gain the weights. */
static void cross_entropy_some(const rows_job *job, int64_t first, int64_t count) {
  size_t row_bytes = (size_t)job->vocab * acre_dtype_size(job->dtype);
  for (int64_t i = first; i < first + count; i++) {
    char *to = job->y ? (char *)job->y + (size_t)i * row_bytes : NULL;
    ((float *)job->values)[i] = row_loss(job, i, to);
  }
}

void acre_cpu_cross_entropy_back(acre_queue *queue, void *dlogits, float *out,
                                 const float *logits, const int32_t *target,
                                 const float *weight, int64_t rows, int64_t vocab,
                                 acre_dtype dtype) {
  rows_job job = {.task = cross_entropy_some,
                  .rows = rows,
                  .y = dlogits,
                  .values = out,
                  .x = logits,
                  .index = target,
                  .gain = weight,
                  .vocab = vocab,
                  .dtype = dtype};
  acre_cpu_run_rows(queue, &job, vocab);
}

void acre_cpu_cross_entropy(acre_queue *queue, float *out, const float *logits,
                            const int32_t *target, int64_t rows, int64_t vocab) {
  acre_cpu_cross_entropy_back(queue, NULL, out, logits, target, NULL, rows, vocab,
                              ACRE_F32);
}

/* ---------------------------------------------------------------- optimiser */

#define SUM_CHUNK 16384 /* numbers whose squares are added up at once */
#define SUM_LANES 8     /* sums side by side, or each addition would wait for the last */

/* A `row` is a chunk; vocab holds the numbers in all. */
static void square_chunks(const rows_job *job, int64_t first, int64_t count) {
  for (int64_t chunk = first; chunk < first + count; chunk++) {
    const float *x = (const float *)job->x + chunk * SUM_CHUNK;
    int64_t n = acre_min(SUM_CHUNK, job->vocab - chunk * SUM_CHUNK), i = 0;
    double sum[SUM_LANES] = {0};
    for (; i + SUM_LANES <= n; i += SUM_LANES)
      for (int lane = 0; lane < SUM_LANES; lane++)
        sum[lane] += (double)x[i + lane] * (double)x[i + lane];
    for (; i < n; i++) sum[i % SUM_LANES] += (double)x[i] * (double)x[i];
    for (int lane = 1; lane < SUM_LANES; lane++) sum[0] += sum[lane];
    ((double *)job->y)[chunk] = sum[0];
  }
}

void acre_cpu_sum_squares(acre_queue *queue, double *out, const float *x, int64_t n) {
  const int64_t room = ACRE_SHARED_FLOATS / 2; /* sums of chunks */
  double *sums = (double *)(void *)queue->shared, total = 0.0;
  for (int64_t at = 0; at < n; at += room * SUM_CHUNK) {
    rows_job job = {.task = square_chunks, .y = sums, .x = x + at};
    job.vocab = acre_min(room * SUM_CHUNK, n - at);
    job.rows = acre_ceil_div(job.vocab, SUM_CHUNK);
    acre_cpu_run_rows(queue, &job, SUM_CHUNK);
    for (int64_t chunk = 0; chunk < job.rows; chunk++) total += sums[chunk];
  }
  *out = total;
}

static void adamw_some(const rows_job *job, int64_t first, int64_t count) {
  job->kernels->adamw((float *)job->y + first, (float *)job->raw + first,
                      (float *)job->values + first, (const float *)job->x + first, count,
                      job->other);
}

void acre_cpu_adamw(acre_queue *queue, float *w, float *first, float *second,
                    const float *gradient, int64_t n, float scale,
                    const acre_adamw *adamw) {
  double step = (double)adamw->step;
  acre_adamw_factors factors = {.scale = scale,
                                .beta1 = (float)adamw->beta1,
                                .rest1 = (float)(1 - adamw->beta1),
                                .beta2 = (float)adamw->beta2,
                                .rest2 = (float)(1 - adamw->beta2),
                                .rate = (float)(adamw->lr / (1 - pow(adamw->beta1, step))),
                                .unbias = (float)(1 / (1 - pow(adamw->beta2, step))),
                                .eps = (float)adamw->eps,
                                .decay = (float)(adamw->lr * adamw->weight_decay)};
  rows_job job = {.task = adamw_some,
                  .rows = n,
                  .y = w,
                  .raw = first,
                  .values = second,
                  .x = gradient,
                  .other = &factors};
  acre_cpu_run_rows(queue, &job, 1);
}
