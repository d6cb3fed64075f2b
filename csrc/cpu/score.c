/* The mass that a question's tokens put on each L1 entry (section 4.2), without ever
 * storing the [heads, t, m] softmax.
 *
 * Two passes over the keys: the first finds every (row, head) item's maximum and sum,
 * the second adds exp(logit - maximum) / sum over the items, in order, into the 64
 * scores that a task owns. The second is worth its time: nothing grows with m, and the
 * order of the additions does not depend on the threads. */
#include "attention.h"

#include <math.h>

#define TILE ACRE_KEY_TILE

typedef struct score_job {
  acre_queue *queue;
  float *scores;
  const float *q;
  int64_t q_stride;
  const void *keys;
  const acre_heads *heads;
  int64_t group, m, rows, kv_head;
  float scale;
  int64_t used;     /* heads of this KV head that count */
  int32_t *offset;  /* [used] element offset of each in a row of q */
  float *max, *sum; /* [rows * used] */
} score_job;

/* A worker's scratch. */
typedef struct block {
  float *q;    /* [ACRE_ITEMS][padded] */
  float *keys; /* panels of a tile */
  float *rows;
  float *s; /* [ACRE_ROWS_LIMIT][64] */
} block;

static block take_block(const score_job *job, int32_t worker) {
  int64_t padded = acre_padded(job->heads->head_dim);
  block b;
  b.q = acre_cpu_scratch(job->queue, worker);
  b.keys = b.q + ACRE_ITEMS * padded;
  b.rows = b.keys + TILE * padded;
  b.s = b.rows + TILE * padded;
  return b;
}

static void load_items(const score_job *job, float *to, int64_t first, int64_t count) {
  int64_t d = job->heads->head_dim, padded = acre_padded(d);
  for (int64_t i = 0; i < count; i++) {
    int64_t item = first + i;
    memcpy(to + i * padded,
           job->q + item / job->used * job->q_stride + job->offset[item % job->used],
           (size_t)d * sizeof(float));
  }
}

static void load_tile(const score_job *job, const block *b, int64_t first, int64_t count) {
  acre_cpu_load_panels(job->queue->kernels, b->keys, b->rows, job->keys, first, count,
                       job->kv_head, job->heads);
}

/* Dot products of at most tile_rows items (their queries at q) with the tile. */
static void dot_items(const score_job *job, const block *b, const float *q, int64_t items,
                      int64_t count) {
  int64_t d = job->heads->head_dim;
  job->queue->kernels->tile(b->s, TILE, q, acre_padded(d), b->keys, ACRE_PANEL,
                            d * ACRE_PANEL, items, acre_ceil_div(count, ACRE_PANEL), d,
                            false);
}

/* First pass: a block of items over all keys. */
static void measure_task(void *context, int64_t index, int32_t worker) {
  const score_job *job = context;
  const acre_kernels *kernels = job->queue->kernels;
  block b = take_block(job, worker);
  int64_t padded = acre_padded(job->heads->head_dim), first = index * ACRE_ITEMS;
  int64_t items = acre_min(ACRE_ITEMS, job->rows * job->used - first);
  load_items(job, b.q, first, items);
  float *max = job->max + first, *sum = job->sum + first;
  for (int64_t i = 0; i < items; i++) max[i] = -INFINITY, sum[i] = 0.0f;
  for (int64_t j = 0; j < job->m; j += TILE) {
    int64_t count = acre_min(TILE, job->m - j);
    load_tile(job, &b, j, count);
    for (int64_t i = 0; i < items; i += kernels->tile_rows) {
      int64_t rows = acre_min(kernels->tile_rows, items - i);
      dot_items(job, &b, b.q + i * padded, rows, count);
      float factor[ACRE_ROWS_LIMIT];
      kernels->softmax(b.s, NULL, rows, count, job->scale, max + i, sum + i, factor);
    }
  }
}

/* Second pass: one tile of keys over all items. */
static void add_task(void *context, int64_t index, int32_t worker) {
  const score_job *job = context;
  const acre_kernels *kernels = job->queue->kernels;
  block b = take_block(job, worker);
  int64_t first = index * TILE, count = acre_min(TILE, job->m - first);
  int64_t items = job->rows * job->used;
  load_tile(job, &b, first, count);
  for (int64_t i = 0; i < items; i += kernels->tile_rows) {
    int64_t rows = acre_min(kernels->tile_rows, items - i);
    load_items(job, b.q, i, rows);
    dot_items(job, &b, b.q, rows, count);
    for (int64_t r = 0; r < rows; r++)
      kernels->add_exp(job->scores + first, b.s + r * TILE, count, job->scale,
                       job->max[i + r], 1.0f / job->sum[i + r]);
  }
}

void acre_cpu_score(acre_queue *queue, float *scores, const float *q, int64_t q_stride,
                    const void *keys, const uint8_t *use, int64_t t, int64_t m,
                    const acre_heads *heads) {
  score_job job = {.queue = queue,
                   .scores = scores,
                   .q_stride = q_stride,
                   .keys = keys,
                   .heads = heads,
                   .group = heads->heads / heads->kv_heads,
                   .m = m,
                   .scale = (float)(1.0 / sqrt((double)heads->head_dim))};
  if (m <= 0) return;
  job.offset = (int32_t *)queue->shared;
  int64_t room = (ACRE_SHARED_FLOATS - job.group) / 2 / job.group; /* rows at a time */
  job.max = queue->shared + job.group;
  job.sum = job.max + room * job.group;
  for (int64_t row = 0; row < t; row += room) {
    job.rows = acre_min(room, t - row);
    job.q = q + row * q_stride;
    for (job.kv_head = 0; job.kv_head < heads->kv_heads; job.kv_head++) {
      job.used = 0;
      for (int64_t c = job.kv_head * job.group; c < (job.kv_head + 1) * job.group; c++)
        if (use[c]) job.offset[job.used++] = (int32_t)(c * heads->head_dim);
      if (!job.used) continue;
      acre_pool_run(queue->pool, measure_task, &job,
                    acre_ceil_div(job.rows * job.used, ACRE_ITEMS));
      acre_pool_run(queue->pool, add_task, &job, acre_ceil_div(m, TILE));
    }
  }
}
