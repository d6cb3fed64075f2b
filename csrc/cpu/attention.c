/* Softmax attention over [prefix | own] in one pass: no score matrix is ever stored.
 *
 * Keys are taken in tiles of 64 that start at multiples of 64 of their segment. For
 * each tile a row keeps a running maximum, a sum and an unnormalised output (kernels.h,
 * softmax), so its result depends on its own keys alone: not on the other rows, nor on
 * the threads.
 *
 * Several rows: a task is a KV head and 96 (row, head) pairs, which share the tile;
 * scores and weighted values both come from the tile kernel. One row: a task is a KV
 * head and a run of tiles; the runs, whose number depends on the key count only, are
 * joined in order. */
#include "attention.h"

#include <math.h>

#define TILE ACRE_KEY_TILE
#define SPLITS 64     /* most runs of tiles of one decoded row */
#define SPLIT_TILES 4 /* least tiles of a run */
#define UNIT_HEADS 32 /* query heads of one task of a decoded row */

/* ---------------------------------------------------------------- tiles */

const float *acre_cpu_load_rows(const acre_kernels *kernels, float *to, int64_t *stride,
                                const void *data, int64_t first, int64_t rows, int64_t head,
                                const acre_heads *heads) {
  int64_t d = heads->head_dim, step = heads->kv_heads * d, padded = acre_padded(d);
  int64_t offset = first * step + head * d;
  if (heads->dtype == ACRE_F32 && d == padded) {
    *stride = step;
    return (const float *)data + offset;
  }
  *stride = padded;
  for (int64_t i = 0; i < rows; i++) {
    float *to_i = to + i * padded;
    if (heads->dtype == ACRE_F32)
      memcpy(to_i, (const float *)data + offset + i * step, (size_t)d * sizeof(float));
    else
      kernels->widen(to_i, (const uint16_t *)data + offset + i * step, d);
    for (int64_t x = d; x < padded; x++) to_i[x] = 0.0f;
  }
  return to;
}

void acre_cpu_load_panels(const acre_kernels *kernels, float *panels, float *rows_scratch,
                          const void *data, int64_t first, int64_t rows, int64_t head,
                          const acre_heads *heads) {
  int64_t stride, d = heads->head_dim;
  const float *from =
      acre_cpu_load_rows(kernels, rows_scratch, &stride, data, first, rows, head, heads);
  for (int64_t i = 0; i < rows; i += ACRE_PANEL)
    kernels->transpose(panels + i * d, from + i * stride, stride,
                       acre_min(ACRE_PANEL, rows - i), d);
}

/* ---------------------------------------------------------------- what is seen */

typedef struct attend_job {
  acre_queue *queue;
  float *out;
  int64_t out_stride;
  const float *q;
  int64_t q_stride;
  acre_keys segment[2]; /* prefix (count 0 where there is none), own */
  int64_t tiles[2];     /* tiles of each segment that some row sees */
  int64_t seen;
  int64_t rows;
  const acre_heads *heads;
  int64_t group; /* query heads per KV head */
  float scale;
  int64_t items;                                /* several rows: pairs of a task */
  int64_t unit_first, units, splits, run, slot; /* one row, see below */
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

/* ---------------------------------------------------------------- several rows */

/* A worker's scratch for one task. Rows of q and o are padded(d) apart. */
typedef struct block {
  float *q, *o;
  float *keys;   /* panels of a tile */
  float *values; /* rows of a tile */
  float *rows;   /* keys on their way into panels */
  float *s;      /* [ACRE_ROWS_LIMIT][64] */
  float *max, *sum;
} block;

_Static_assert((2 * ACRE_ITEMS + 3 * TILE) * ACRE_HEAD_DIM_MAX + ACRE_ROWS_LIMIT * TILE +
                       4 * ACRE_ITEMS <=
                   ACRE_WORKER_FLOATS,
               "scratch is too small");

/* Narrow heads leave room for twice the items: a tile's loading is shared by more. */
static int64_t items_of(int64_t padded) {
  return 2 * padded <= ACRE_HEAD_DIM_MAX ? 2 * ACRE_ITEMS : ACRE_ITEMS;
}

static block take_block(float *scratch, int64_t padded) {
  block b;
  b.q = scratch;
  b.o = b.q + items_of(padded) * padded;
  b.keys = b.o + items_of(padded) * padded;
  b.values = b.keys + TILE * padded;
  b.rows = b.values + TILE * padded;
  b.s = b.rows + TILE * padded;
  b.max = b.s + ACRE_ROWS_LIMIT * TILE;
  b.sum = b.max + items_of(padded);
  return b;
}

/* Item i of a KV head is row i / group and its head i % group. */
static const float *item_query(const attend_job *job, int64_t kv_head, int64_t item) {
  int64_t head = kv_head * job->group + item % job->group;
  return job->q + item / job->group * job->q_stride + head * job->heads->head_dim;
}

static float *item_out(const attend_job *job, int64_t kv_head, int64_t item) {
  int64_t head = kv_head * job->group + item % job->group;
  return job->out + item / job->group * job->out_stride + head * job->heads->head_dim;
}

static void begin_items(const attend_job *job, const block *b, int64_t kv_head,
                        int64_t first, int64_t count) {
  int64_t d = job->heads->head_dim, padded = acre_padded(d);
  for (int64_t i = 0; i < count; i++) {
    memcpy(b->q + i * padded, item_query(job, kv_head, first + i),
           (size_t)d * sizeof(float));
    b->max[i] = -INFINITY;
    b->sum[i] = 0.0f;
  }
  memset(b->o, 0, (size_t)(count * padded) * sizeof(float));
}

static void end_items(const attend_job *job, const block *b, int64_t kv_head, int64_t first,
                      int64_t count) {
  const acre_kernels *kernels = job->queue->kernels;
  int64_t d = job->heads->head_dim, padded = acre_padded(d);
  for (int64_t i = 0; i < count; i++) {
    float *o_i = b->o + i * padded;
    kernels->scale(o_i, b->sum[i] == 0.0f ? 0.0f : 1.0f / b->sum[i], d);
    memcpy(item_out(job, kv_head, first + i), o_i, (size_t)d * sizeof(float));
  }
}

/* At most tile_rows items, `item` the first of them in the KV head, against one tile.
 * Rows that see differently many keys are weighted apart, so that what one row must not
 * see never meets its sums, not even as a zero times it. */
static void attend_rows(const attend_job *job, const block *b, const key_tile *tile,
                        const float *values, int64_t v_stride, int64_t item, int64_t i,
                        int64_t count) {
  const acre_kernels *kernels = job->queue->kernels;
  int64_t d = job->heads->head_dim, padded = acre_padded(d);
  kernels->tile(b->s, TILE, b->q + i * padded, padded, b->keys, ACRE_PANEL, d * ACRE_PANEL,
                count, acre_ceil_div(tile->count, ACRE_PANEL), d, false);
  for (int64_t run = 0, end; run < count; run = end) { /* rows that see equally many */
    int64_t keys = visible(job, tile, (item + run) / job->group);
    for (end = run + 1; end < count; end++)
      if (visible(job, tile, (item + end) / job->group) != keys) break;
    if (keys <= 0) continue;
    float factor[ACRE_ROWS_LIMIT];
    kernels->softmax(b->s + run * TILE, tile_bias(tile), end - run, keys, job->scale,
                     b->max + i + run, b->sum + i + run, factor);
    for (int64_t r = run; r < end; r++)
      if (factor[r - run] != 1.0f)
        kernels->scale(b->o + (i + r) * padded, factor[r - run], padded);
    kernels->tile(b->o + (i + run) * padded, padded, b->s + run * TILE, TILE, values,
                  v_stride, ACRE_PANEL, end - run, padded / ACRE_PANEL, keys, true);
  }
}

static void attend_task(void *context, int64_t index, int32_t worker) {
  const attend_job *job = context;
  const acre_heads *heads = job->heads;
  const acre_kernels *kernels = job->queue->kernels;
  int64_t kv_head = index % heads->kv_heads;
  int64_t first = index / heads->kv_heads * job->items;
  int64_t count = acre_min(job->items, job->rows * job->group - first);
  int64_t last_row = (first + count - 1) / job->group;
  int64_t tiles = job->tiles[0] + acre_ceil_div(job->seen + last_row + 1, TILE);
  block b = take_block(acre_cpu_scratch(job->queue, worker), acre_padded(heads->head_dim));
  begin_items(job, &b, kv_head, first, count);
  for (int64_t t = 0; t < tiles; t++) {
    key_tile tile = tile_at(job, t, last_row);
    acre_cpu_load_panels(kernels, b.keys, b.rows, tile.keys->rotated, tile.first,
                         tile.count, kv_head, heads);
    int64_t v_stride;
    const float *values =
        acre_cpu_load_rows(kernels, b.values, &v_stride, tile.keys->values, tile.first,
                           tile.count, kv_head, heads);
    for (int64_t i = 0; i < count; i += kernels->tile_rows)
      attend_rows(job, &b, &tile, values, v_stride, first + i, i,
                  acre_min(kernels->tile_rows, count - i));
  }
  end_items(job, &b, kv_head, first, count);
}

static void attend_many(attend_job *job) {
  int64_t threads = acre_pool_threads(job->queue->pool);
  int64_t items = job->rows * job->group, g = job->heads->kv_heads;
  job->items = items_of(acre_padded(job->heads->head_dim));
  while (job->items > ACRE_ITEMS / 4 && acre_ceil_div(items, job->items) * g < 2 * threads)
    job->items /= 2;
  acre_pool_run(job->queue->pool, attend_task, job, acre_ceil_div(items, job->items) * g);
}

/* ---------------------------------------------------------------- one row */

/* A unit is a KV head and at most 32 of its query heads. */
typedef struct unit {
  int64_t kv_head, head, heads; /* query heads [head, head + heads) */
} unit;

/* What a unit keeps of a run of tiles, in the shared scratch. */
typedef struct partial {
  float *max, *sum; /* [heads] */
  float *o;         /* [heads][padded(d)] */
} partial;

static unit unit_at(const attend_job *job, int64_t index) {
  int64_t per_kv = acre_ceil_div(job->group, UNIT_HEADS);
  int64_t within = index % per_kv * UNIT_HEADS;
  return (unit){index / per_kv, index / per_kv * job->group + within,
                acre_min(UNIT_HEADS, job->group - within)};
}

static partial partial_at(const attend_job *job, int64_t unit_index, int64_t split,
                          int64_t heads) {
  int64_t slot = (unit_index - job->unit_first) * job->splits + split;
  float *max = job->queue->shared + slot * job->slot;
  return (partial){max, max + heads, max + 2 * heads};
}

static void decode_tile(const attend_job *job, const unit *u, const key_tile *tile,
                        float *scratch, const partial *p, const float *queries) {
  const acre_kernels *kernels = job->queue->kernels;
  int64_t padded = acre_padded(job->heads->head_dim), stride, v_stride;
  float *s = scratch, *key_rows = s + ACRE_ROWS_LIMIT * TILE;
  float *value_rows = key_rows + TILE * padded;
  const float *keys = acre_cpu_load_rows(kernels, key_rows, &stride, tile->keys->rotated,
                                         tile->first, tile->count, u->kv_head, job->heads);
  const float *values =
      acre_cpu_load_rows(kernels, value_rows, &v_stride, tile->keys->values, tile->first,
                         tile->count, u->kv_head, job->heads);
  for (int64_t c = 0; c < u->heads; c += kernels->tile_rows) {
    int64_t rows = acre_min(kernels->tile_rows, u->heads - c);
    float factor[ACRE_ROWS_LIMIT];
    for (int64_t r = 0; r < rows; r++)
      kernels->dots(s + r * TILE, queries + (c + r) * padded, keys, stride, tile->count,
                    padded);
    kernels->softmax(s, tile_bias(tile), rows, tile->count, job->scale, p->max + c,
                     p->sum + c, factor);
    for (int64_t r = 0; r < rows; r++)
      if (factor[r] != 1.0f) kernels->scale(p->o + (c + r) * padded, factor[r], padded);
    kernels->tile(p->o + c * padded, padded, s, TILE, values, v_stride, ACRE_PANEL, rows,
                  padded / ACRE_PANEL, tile->count, true);
  }
}

_Static_assert(ACRE_ROWS_LIMIT *TILE + 2 * TILE * ACRE_HEAD_DIM_MAX +
                       UNIT_HEADS * ACRE_HEAD_DIM_MAX <=
                   ACRE_WORKER_FLOATS,
               "scratch is too small");
_Static_assert(SPLITS *UNIT_HEADS *(ACRE_HEAD_DIM_MAX + 2) <= ACRE_SHARED_FLOATS,
               "shared scratch is too small for one unit");

static void decode_task(void *context, int64_t index, int32_t worker) {
  const attend_job *job = context;
  int64_t d = job->heads->head_dim, padded = acre_padded(d);
  int64_t unit_index = job->unit_first + index / job->splits, split = index % job->splits;
  unit u = unit_at(job, unit_index);
  partial p = partial_at(job, unit_index, split, u.heads);
  float *queries = acre_cpu_scratch(job->queue, worker);
  float *scratch = queries + UNIT_HEADS * padded;
  memset(p.sum, 0, (size_t)(u.heads * (padded + 1)) * sizeof(float)); /* and o */
  memset(queries, 0, (size_t)(u.heads * padded) * sizeof(float));
  for (int64_t c = 0; c < u.heads; c++) {
    p.max[c] = -INFINITY;
    memcpy(queries + c * padded, job->q + (u.head + c) * d, (size_t)d * sizeof(float));
  }
  int64_t end = acre_min((split + 1) * job->run, job->tiles[0] + job->tiles[1]);
  for (int64_t t = split * job->run; t < end; t++) {
    key_tile tile = tile_at(job, t, 0);
    decode_tile(job, &u, &tile, scratch, &p, queries);
  }
}

/* Joins the runs of head c of a unit: a softmax over their maxima gives their
 * weights. */
static void join_head(const attend_job *job, const partial *first, int64_t c,
                      float *scratch, float *out) {
  const acre_kernels *kernels = job->queue->kernels;
  int64_t d = job->heads->head_dim, padded = acre_padded(d);
  float weights[TILE], sums[TILE] = {0}, max = -INFINITY, sum = 0.0f, factor;
  for (int64_t s = 0; s < job->splits; s++) {
    weights[s] = first->max[s * job->slot + c];
    sums[s] = first->sum[s * job->slot + c];
  }
  kernels->softmax(weights, NULL, 1, job->splits, 1.0f, &max, &sum, &factor);
  kernels->dots(&sum, weights, sums, TILE, 1, TILE);
  kernels->tile(scratch, padded, weights, TILE, first->o + c * padded, job->slot,
                ACRE_PANEL, 1, padded / ACRE_PANEL, job->splits, false);
  kernels->scale(scratch, sum == 0.0f ? 0.0f : 1.0f / sum, d);
  memcpy(out, scratch, (size_t)d * sizeof(float));
}

static void join_task(void *context, int64_t index, int32_t worker) {
  const attend_job *job = context;
  int64_t unit_index = job->unit_first + index;
  unit u = unit_at(job, unit_index);
  partial first = partial_at(job, unit_index, 0, u.heads);
  float *scratch = acre_cpu_scratch(job->queue, worker);
  for (int64_t c = 0; c < u.heads; c++)
    join_head(job, &first, c, scratch, job->out + (u.head + c) * job->heads->head_dim);
}

_Static_assert(SPLITS <= TILE, "the runs' weights must fit one softmax");

static void attend_one(attend_job *job) {
  int64_t tiles = job->tiles[0] + job->tiles[1];
  int64_t units = job->heads->kv_heads * acre_ceil_div(job->group, UNIT_HEADS);
  job->run = acre_max(SPLIT_TILES, acre_ceil_div(tiles, SPLITS));
  job->splits = acre_ceil_div(tiles, job->run);
  job->slot = acre_min(job->group, UNIT_HEADS) * (acre_padded(job->heads->head_dim) + 2);
  int64_t batch = ACRE_SHARED_FLOATS / (job->splits * job->slot);
  for (int64_t first = 0; first < units; first += batch) {
    job->unit_first = first;
    job->units = acre_min(batch, units - first);
    acre_pool_run(job->queue->pool, decode_task, job, job->units * job->splits);
    acre_pool_run(job->queue->pool, join_task, job, job->units);
  }
}

/* ---------------------------------------------------------------- operation */

void acre_cpu_attend(acre_queue *queue, float *out, int64_t out_stride, const float *q,
                     int64_t q_stride, const acre_keys *prefix, const acre_keys *own,
                     int64_t seen, int64_t rows, bool split, const acre_heads *heads) {
  if (rows <= 0) return;
  attend_job job = {.queue = queue,
                    .out = out,
                    .out_stride = out_stride,
                    .q = q,
                    .q_stride = q_stride,
                    .seen = seen,
                    .rows = rows,
                    .heads = heads,
                    .group = heads->heads / heads->kv_heads,
                    .scale = (float)(1.0 / sqrt((double)heads->head_dim))};
  if (prefix) job.segment[0] = *prefix;
  job.segment[1] = *own;
  job.tiles[0] = acre_ceil_div(job.segment[0].count, TILE);
  job.tiles[1] = acre_ceil_div(seen + rows, TILE);
  if (split && rows == 1)
    attend_one(&job);
  else
    attend_many(&job);
}
