/* Softmax attention over [prefix | own] in one pass: no score matrix is ever stored.
 *
 * Keys are taken in tiles of 64 that start at multiples of 64 of their segment. For
 * each tile a row keeps a running origin, a sum and an unnormalised output (kernels.h,
 * softmax), so its result depends on its own keys alone: not on the other rows, nor on
 * the threads.
 *
 * A task is a KV head, up to 192 of its (row, head) pairs, the items, and a run of tiles;
 * the items share the tile, so its keys and values are laid out for the tile kernel once
 * for all of them. With several rows there is one run. A row decoded alone shares its
 * tiles out over many runs, whose number depends on the key count only; they are joined
 * in order. Its tasks take several KV heads, which lie side by side in memory: that work
 * is bound by reading, and then a run is read from end to end. */
#include "attention.h"

#include <math.h>

#define TILE ACRE_KEY_TILE
#define RUNS 64      /* most runs of tiles of one decoded row */
#define RUN_ITEMS 32 /* most heads of a task of one decoded row */

float acre_cpu_logit_scale(const acre_heads *heads) {
  return (float)(1.4426950408889634 / sqrt((double)heads->head_dim));
}

/* ---------------------------------------------------------------- what is seen */

typedef struct attend_job {
  acre_queue *queue;
  const acre_typed *T;
  void *out;
  int64_t out_stride;
  float *lse; /* nullable */
  const float *q;
  int64_t q_stride;
  acre_keys segment[2]; /* prefix (count 0 where there is none), own */
  int64_t tiles[2];     /* tiles of each segment that some row sees */
  int64_t seen;
  int64_t rows;
  const acre_heads *heads;
  int64_t group; /* query heads per KV head */
  float scale;
  int64_t items, kv_heads; /* of a task: items of each of so many KV heads */
  int64_t kv_blocks;       /* tasks that all KV heads make */
  int64_t runs, run_tiles; /* of one block of items */
  int64_t slot;            /* floats that a task of many leaves in the shared scratch */
  int64_t first, tasks;    /* of one loop over the pool */
  int64_t chunk;           /* tasks taken together */
} attend_job;

typedef struct key_tile {
  const acre_keys *keys;
  int64_t first;
  int64_t count; /* keys that the last row sees, <= 64 */
  bool causal;
} key_tile;

static key_tile tile_at(const attend_job *job, int64_t index, int64_t last_row) {
  bool causal = index >= job->tiles[0];
  const acre_keys *keys = &job->segment[causal];
  int64_t first = (causal ? index - job->tiles[0] : index) * TILE;
  int64_t end = causal ? job->seen + last_row + 1 : keys->count;
  return (key_tile){keys, first, acre_min(TILE, end - first), causal};
}

/* Keys of the tile that a row sees; may be 0 or less. */
static int64_t visible(const attend_job *job, const key_tile *tile, int64_t row) {
  if (!tile->causal) return tile->count;
  return acre_min(tile->count, job->seen + row + 1 - tile->first);
}

static const float *tile_bias(const key_tile *tile) {
  return tile->keys->bias ? tile->keys->bias + tile->first : NULL;
}

/* ---------------------------------------------------------------- a task */

/* A task's items and its worker's scratch: `count` items of each of its KV heads, one KV
 * head after the other. Rows of q and o are padded(d) apart. */
typedef struct block {
  int64_t kv_first, kv_count, item, count, run;
  void *q, *keys, *values; /* operands */
  float *s;                /* [ACRE_ROWS_LIMIT][64] */
  float *o, *origin, *sum; /* [kv_count][count][padded(d)], [kv_count][count] */
} block;

/* Wide heads take fewer items. */
static int64_t items_of(int64_t padded) {
  int64_t room = ACRE_ITEMS * 128 / padded;
  return acre_min(acre_max(room / 48 * 48, 48), ACRE_ITEMS);
}

#define ITEM_FLOATS (ACRE_ITEMS * 128) /* of q, and of o */
#define TILE_FLOATS (TILE * ACRE_HEAD_DIM_MAX)

_Static_assert(48 * ACRE_HEAD_DIM_MAX <= ITEM_FLOATS, "no room for 48 items");
_Static_assert(2 * ITEM_FLOATS + 2 * TILE_FLOATS + ACRE_ROWS_LIMIT * TILE +
                       2 * ACRE_ITEMS <=
                   ACRE_WORKER_FLOATS,
               "scratch is too small");
_Static_assert(RUNS *RUN_ITEMS *(ACRE_HEAD_DIM_MAX + 2) <= ACRE_SHARED_FLOATS,
               "shared scratch is too small for the runs of one block of items");

/* Where a task leaves what it keeps of a run. */
static float *slot_of(const attend_job *job, int64_t task) {
  return job->queue->shared + (task - job->first) * job->slot;
}

static block take_block(const attend_job *job, int64_t task, float *scratch) {
  int64_t heads = task / job->runs;
  block b = {.run = task % job->runs,
             .kv_first = heads % job->kv_blocks * job->kv_heads,
             .item = heads / job->kv_blocks * job->items};
  b.kv_count = acre_min(job->kv_heads, job->heads->kv_heads - b.kv_first);
  b.count = acre_min(job->items, job->rows * job->group - b.item);
  b.q = scratch;
  b.o = scratch + ITEM_FLOATS;
  b.keys = b.o + ITEM_FLOATS;
  b.values = b.o + ITEM_FLOATS + TILE_FLOATS;
  b.s = b.o + ITEM_FLOATS + 2 * TILE_FLOATS;
  b.origin = b.s + ACRE_ROWS_LIMIT * TILE;
  b.sum = b.origin + ACRE_ITEMS;
  return b;
}

/* Item i of a KV head is row i / group and its head i % group; i counts over the KV heads
 * of the block. */
static int64_t item_head(const attend_job *job, const block *b, int64_t i) {
  return (b->kv_first + i / b->count) * job->group + (b->item + i % b->count) % job->group;
}
static int64_t item_row(const attend_job *job, const block *b, int64_t i) {
  return (b->item + i % b->count) / job->group;
}

static void begin_items(const attend_job *job, const block *b) {
  int64_t d = job->heads->head_dim, padded = acre_padded(d);
  for (int64_t i = 0; i < b->kv_count * b->count; i++) {
    const float *q =
        job->q + item_row(job, b, i) * job->q_stride + item_head(job, b, i) * d;
    job->T->round((char *)b->q + i * padded * job->T->operand, q, d);
    b->origin[i] = -INFINITY;
    b->sum[i] = 0.0f;
  }
  memset(b->o, 0, (size_t)(b->kv_count * b->count * padded) * sizeof(float));
}

/* Divides an item's o by its sum and hands it over. */
static void end_item(const attend_job *job, const block *b, int64_t i, float *o, float sum,
                     float origin) {
  int64_t d = job->heads->head_dim, row = item_row(job, b, i), head = item_head(job, b, i);
  int64_t to = row * job->out_stride + head * d;
  if (job->lse) job->lse[row * job->heads->heads + head] = origin + log2f(sum);
  job->queue->kernels->scale(o, sum == 0.0f ? 0.0f : 1.0f / sum, d);
  job->T->store((char *)job->out + (size_t)to * acre_dtype_size(job->heads->dtype), o, d);
}

/* At most tile_rows items, the i-th of the block the first of them, against one tile.
 * Rows that see differently many keys are weighted apart, so that what one row must not
 * see never meets its sums, not even as a zero times it. */
static void attend_rows(const attend_job *job, const block *b, const key_tile *tile,
                        int64_t i, int64_t count) {
  const acre_typed *T = job->T;
  int64_t d = job->heads->head_dim, padded = acre_padded(d);
  int64_t p_stride = TILE * (int64_t)sizeof(float) / T->operand;
  T->tile(b->s, TILE, (const char *)b->q + i * padded * T->operand, padded, b->keys,
          d * ACRE_PANEL, count, acre_ceil_div(tile->count, ACRE_PANEL), d, false);
  for (int64_t run = 0, end; run < count; run = end) { /* rows that see equally many */
    int64_t keys = visible(job, tile, item_row(job, b, i + run));
    for (end = run + 1; end < count; end++)
      if (visible(job, tile, item_row(job, b, i + end)) != keys) break;
    if (keys <= 0) continue;
    float factor[ACRE_ROWS_LIMIT];
    T->softmax(b->s + run * TILE, tile_bias(tile), end - run, keys, job->scale,
               b->origin + i + run, b->sum + i + run, factor);
    for (int64_t r = run; r < end; r++)
      if (factor[r - run] != 1.0f)
        job->queue->kernels->scale(b->o + (i + r) * padded, factor[r - run], padded);
    T->tile(b->o + (i + run) * padded, padded, b->s + run * TILE, p_stride, b->values,
            TILE * ACRE_PANEL, end - run, padded / ACRE_PANEL, keys, true);
  }
}

/* All items of the block against one tile. */
static void attend_tile(const attend_job *job, const block *b, const key_tile *tile) {
  const acre_heads *heads = job->heads;
  int64_t step = heads->kv_heads * heads->head_dim, rows = job->T->tile_rows;
  const acre_keys *keys = tile->keys;
  for (int64_t kv = 0; kv < b->kv_count; kv++) {
    job->T->keys(b->keys,
                 acre_cpu_head(keys->rotated, tile->first, b->kv_first + kv, heads), step,
                 tile->count, heads->head_dim);
    job->T->values(b->values,
                   acre_cpu_head(keys->values, tile->first, b->kv_first + kv, heads), step,
                   tile->count, heads->head_dim);
    for (int64_t i = 0; i < b->count; i += rows)
      attend_rows(job, b, tile, kv * b->count + i, acre_min(rows, b->count - i));
  }
}

static void attend_run(const attend_job *job, int64_t task, int32_t worker) {
  int64_t padded = acre_padded(job->heads->head_dim);
  block b = take_block(job, task, acre_cpu_scratch(job->queue, worker));
  int64_t all = b.kv_count * b.count;
  float *slot = slot_of(job, task);
  if (job->runs > 1) /* what joins the runs later reads it there */
    b.origin = slot, b.sum = slot + all, b.o = slot + 2 * all;
  begin_items(job, &b);
  int64_t last_row = item_row(job, &b, b.count - 1);
  int64_t tiles = job->tiles[0] + acre_ceil_div(job->seen + last_row + 1, TILE);
  int64_t end = acre_min((b.run + 1) * job->run_tiles, tiles);
  for (int64_t t = b.run * job->run_tiles; t < end; t++) {
    key_tile tile = tile_at(job, t, last_row);
    attend_tile(job, &b, &tile);
  }
  for (int64_t i = 0; job->runs == 1 && i < all; i++)
    end_item(job, &b, i, b.o + i * padded, b.sum[i], b.origin[i]);
}

/* Some runs that follow one another: the prefetch at the end of each is of use to the
 * next. */
static void attend_task(void *context, int64_t index, int32_t worker) {
  const attend_job *job = context;
  int64_t end = acre_min((index + 1) * job->chunk, job->tasks);
  for (int64_t task = index * job->chunk; task < end; task++)
    attend_run(job, job->first + task, worker);
}

/* ---------------------------------------------------------------- joining runs */

/* The runs of one item: each counts by its origin, a power of two. */
static void join_task(void *context, int64_t index, int32_t worker) {
  const attend_job *job = context;
  int64_t padded = acre_padded(job->heads->head_dim), most = job->kv_heads * job->items;
  int64_t task = job->first + index / most * job->runs, i = index % most;
  block b = take_block(job, task, acre_cpu_scratch(job->queue, worker));
  int64_t all = b.kv_count * b.count;
  if (i >= all) return;
  const float *first = slot_of(job, task);
  float origin = -INFINITY, sum = 0.0f;
  for (int64_t r = 0; r < job->runs; r++) origin = fmaxf(origin, first[r * job->slot + i]);
  if (origin == -INFINITY) origin = 0.0f;
  memset(b.o, 0, (size_t)padded * sizeof(float));
  for (int64_t r = 0; r < job->runs; r++) {
    const float *run = first + r * job->slot;
    float factor = acre_exp2(run[i], origin);
    sum = fmaf(run[all + i], factor, sum);
    job->queue->kernels->add_scaled(b.o, run + 2 * all + i * padded, factor, padded);
  }
  end_item(job, &b, i, b.o, sum, origin);
}

/* ---------------------------------------------------------------- operation */

/* Several rows: fewer items per task where there would be too few tasks, and as many in
 * each. */
static void choose_items(attend_job *job, int64_t items) {
  int64_t threads = acre_pool_threads(job->queue->pool), g = job->heads->kv_heads;
  job->items = items_of(acre_padded(job->heads->head_dim));
  while (job->items > 24 && acre_ceil_div(items, job->items) * g < 2 * threads)
    job->items /= 2;
  int64_t even = acre_ceil_div(items, acre_ceil_div(items, job->items));
  job->items = acre_round_up(even, job->T->tile_rows);
}

/* One row: runs of tiles; their number, which the bits depend on, follows from the keys
 * alone. */
static void choose_runs(attend_job *job) {
  int64_t tiles = job->tiles[0] + job->tiles[1];
  job->items = acre_min(RUN_ITEMS, job->group);
  job->kv_heads = acre_min(RUN_ITEMS / job->items, job->heads->kv_heads);
  job->run_tiles = acre_ceil_div(tiles, RUNS);
  job->runs = acre_ceil_div(tiles, job->run_tiles);
  job->slot = job->kv_heads * job->items * (acre_padded(job->heads->head_dim) + 2);
}

static void run_tasks(attend_job *job, int64_t tasks) {
  acre_pool *pool = job->queue->pool;
  job->chunk = 1;
  job->tasks = tasks;
  if (job->runs == 1) {
    acre_pool_run(pool, attend_task, job, tasks);
    return;
  }
  int64_t batch = ACRE_SHARED_FLOATS / (job->runs * job->slot) * job->runs;
  for (; job->first < tasks; job->first += batch) {
    job->tasks = acre_min(batch, tasks - job->first);
    job->chunk = acre_ceil_div(job->tasks, 2 * acre_pool_threads(pool));
    acre_pool_run(pool, attend_task, job, acre_ceil_div(job->tasks, job->chunk));
    acre_pool_run(pool, join_task, job,
                  job->tasks / job->runs * job->kv_heads * job->items);
  }
}

void acre_cpu_attend(acre_queue *queue, void *out, int64_t out_stride, float *lse,
                     const float *q, int64_t q_stride, const acre_keys *prefix,
                     const acre_keys *own, int64_t seen, int64_t rows, bool split,
                     const acre_heads *heads) {
  if (rows <= 0) return;
  attend_job job = {.queue = queue,
                    .T = &queue->kernels->of[heads->dtype],
                    .out = out,
                    .out_stride = out_stride,
                    .lse = lse,
                    .q = q,
                    .q_stride = q_stride,
                    .seen = seen,
                    .rows = rows,
                    .heads = heads,
                    .group = heads->heads / heads->kv_heads,
                    .scale = acre_cpu_logit_scale(heads),
                    .kv_heads = 1,
                    .runs = 1};
  if (prefix) job.segment[0] = *prefix;
  job.segment[1] = *own;
  job.tiles[0] = acre_ceil_div(job.segment[0].count, TILE);
  job.tiles[1] = acre_ceil_div(seen + rows, TILE);
  job.run_tiles = job.tiles[0] + job.tiles[1];
  int64_t items = rows * job.group;
  if (split && rows == 1)
    choose_runs(&job);
  else
    choose_items(&job, items);
  job.kv_blocks = acre_ceil_div(heads->kv_heads, job.kv_heads);
  run_tasks(&job, acre_ceil_div(items, job.items) * job.kv_blocks * job.runs);
}
