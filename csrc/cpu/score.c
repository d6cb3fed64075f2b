/* The mass that a question's tokens put on each L1 entry (section 4.2), without ever
 * storing the [heads, t, m] softmax.
 *
 * Two passes over the keys: the first finds every (row, head) item's origin and sum,
 * the second adds exp2(logit - origin) / sum over the items, in order, into the 64
 * scores that a task owns. The second is worth its time: nothing grows with m, and the
 * order of the additions does not depend on the threads. */
#include "attention.h"

#include <math.h>

#define TILE ACRE_KEY_TILE

typedef struct score_job {
  acre_queue *queue;
  const acre_typed *T;
  float *scores;
  const float *q;
  int64_t q_stride;
  const void *keys;
  const acre_heads *heads;
  int64_t group, m, rows, kv_head;
  float scale;
  int64_t used;        /* heads of this KV head that count */
  int32_t *offset;     /* [used] element offset of each in a row of q */
  float *origin, *sum; /* [rows * used] */
} score_job;

/* A worker's scratch. */
typedef struct block {
  void *q;    /* [ACRE_ITEMS][padded], operands */
  void *keys; /* panels of a tile */
  float *s;   /* [ACRE_ROWS_LIMIT][64] */
} block;

_Static_assert((ACRE_ITEMS + TILE) * ACRE_HEAD_DIM_MAX + ACRE_ROWS_LIMIT * TILE <=
                   ACRE_WORKER_FLOATS,
               "scratch is too small");

static block take_block(const score_job *job, int32_t worker) {
  float *scratch = acre_cpu_scratch(job->queue, worker);
  block b = {.q = scratch, .keys = scratch + ACRE_ITEMS * ACRE_HEAD_DIM_MAX};
  b.s = scratch + (ACRE_ITEMS + TILE) * ACRE_HEAD_DIM_MAX;
  return b;
}

/* Query `i` of the block. */
static void *query(const score_job *job, const block *b, int64_t i) {
  return (char *)b->q + i * acre_padded(job->heads->head_dim) * job->T->operand;
}

static void load_items(const score_job *job, const block *b, int64_t first, int64_t count) {
  for (int64_t i = 0; i < count; i++) {
    int64_t item = first + i;
    job->T->round(query(job, b, i),
                  job->q + item / job->used * job->q_stride + job->offset[item % job->used],
                  job->heads->head_dim);
  }
}

static void load_tile(const score_job *job, const block *b, int64_t first, int64_t count) {
  job->T->keys(b->keys, acre_cpu_head(job->keys, first, job->kv_head, job->heads),
               job->heads->kv_heads * job->heads->head_dim, count, job->heads->head_dim);
}

/* Dot products of at most tile_rows items, the i-th of the block the first of them, with
 * the tile. */
static void dot_items(const score_job *job, const block *b, int64_t i, int64_t items,
                      int64_t count) {
  int64_t d = job->heads->head_dim;
  job->T->tile(b->s, TILE, query(job, b, i), acre_padded(d), b->keys, d * ACRE_PANEL, items,
               acre_ceil_div(count, ACRE_PANEL), d, false);
}

/* First pass: a block of items over all keys. */
static void measure_task(void *context, int64_t index, int32_t worker) {
  const score_job *job = context;
  const acre_typed *f32 = &job->queue->kernels->of[ACRE_F32];
  block b = take_block(job, worker);
  int64_t first = index * ACRE_ITEMS;
  int64_t items = acre_min(ACRE_ITEMS, job->rows * job->used - first);
  load_items(job, &b, first, items);
  float *origin = job->origin + first, *sum = job->sum + first;
  for (int64_t i = 0; i < items; i++) origin[i] = -INFINITY, sum[i] = 0.0f;
  for (int64_t j = 0; j < job->m; j += TILE) {
    int64_t count = acre_min(TILE, job->m - j);
    load_tile(job, &b, j, count);
    for (int64_t i = 0; i < items; i += job->T->tile_rows) {
      int64_t rows = acre_min(job->T->tile_rows, items - i);
      dot_items(job, &b, i, rows, count);
      float factor[ACRE_ROWS_LIMIT];
      f32->softmax(b.s, NULL, rows, count, job->scale, origin + i, sum + i, factor);
    }
  }
}

/* Second pass: one tile of keys over all items. */
static void add_task(void *context, int64_t index, int32_t worker) {
  const score_job *job = context;
  block b = take_block(job, worker);
  int64_t first = index * TILE, count = acre_min(TILE, job->m - first);
  int64_t items = job->rows * job->used;
  load_tile(job, &b, first, count);
  for (int64_t i = 0; i < items; i += job->T->tile_rows) {
    int64_t rows = acre_min(job->T->tile_rows, items - i);
    load_items(job, &b, i, rows);
    dot_items(job, &b, 0, rows, count);
    for (int64_t r = 0; r < rows; r++)
      job->queue->kernels->add_exp2(job->scores + first, b.s + r * TILE, count, job->scale,
                                    job->origin[i + r], 1.0f / job->sum[i + r]);
  }
}

void acre_cpu_score(acre_queue *queue, float *scores, const float *q, int64_t q_stride,
                    const void *keys, const uint8_t *use, int64_t t, int64_t m,
                    const acre_heads *heads) {
  score_job job = {.queue = queue,
                   .T = &queue->kernels->of[heads->dtype],
                   .scores = scores,
                   .q_stride = q_stride,
                   .keys = keys,
                   .heads = heads,
                   .group = heads->heads / heads->kv_heads,
                   .m = m,
                   .scale = acre_cpu_logit_scale(heads)};
  if (m <= 0) return;
  job.offset = (int32_t *)queue->shared;
  int64_t room = (ACRE_SHARED_FLOATS - job.group) / 2 / job.group; /* rows at a time */
  job.origin = queue->shared + job.group;
  job.sum = job.origin + room * job.group;
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
