/* The gradient through softmax attention over [prefix | own], from each row's normaliser:
 * no score matrix is ever stored.
 *
 * With p_ij = exp2(x_ij - lse_i), x the scaled logits in powers of two, and do T(dout):
 *   dp_ij = do_i v_j, delta_i = do_i out_i, ds_ij = p_ij (dp_ij - delta_i) / sqrt(d),
 *   dv_j = sum over i of T(p_ij) do_i, dk_j = sum over i of T(ds_ij) q_i,
 *   dq_i = sum over j of T(ds_ij) k_j.
 * delta is taken of the rounded dout too, so that a row's ds add up to nothing.
 *
 * A task is a KV head and a part, one of ACRE_ATTEND_PARTS fixed runs of tiles of 64 keys.
 * It alone writes the dk and dv of its keys, and leaves the dq of its keys in an array of
 * its own; the arrays are added up in order at the end, so that nothing depends on the
 * threads. A task takes its tiles a few at a time, a unit, which it lays out as operands
 * once for all blocks of (row, head) pairs, the items, that pass by; dk and dv of a unit
 * are kept transposed, [d][64], because then the weights are a product's right side, where
 * their rows lie as they were made. */
#include "attention.h"

#include <math.h>

#define TILE ACRE_KEY_TILE
#define UNIT 8           /* most tiles of a unit */
#define UNIT_WIDTH 512   /* most dimensions of its tiles side by side */
#define ITEMS_WIDTH 8192 /* most dimensions of a block's items side by side */

typedef struct back_job {
  acre_queue *queue;
  const acre_typed *T, *f32;
  float *dqkv, *dk, *dv, *scratch;
  const float *dout, *lse;
  const void *out, *q;
  acre_keys segment[2]; /* prefix (count 0 where there is none), own */
  int64_t tiles[2];     /* of each segment */
  int64_t rows;
  const acre_heads *heads;
  int64_t group;  /* query heads per KV head */
  int64_t padded; /* head_dim in whole panels */
  int64_t stride; /* of a row of dqkv */
  float scale, factor;
} back_job;

/* ---------------------------------------------------------------- a task's scratch */

typedef struct key_tile {
  int64_t first, count;
  bool own;
  const acre_keys *keys;
  void *k_t, *v_t, *k; /* operands: [d][64] of keys and of values, [64][d] of keys */
  float *dk_t, *dv_t;  /* [d][64] */
} key_tile;

typedef struct back_task {
  const back_job *job;
  int64_t kv, part;
  key_tile tiles[UNIT];
  int64_t tile_count;
  int64_t item, count;    /* the block of items */
  void *q, *dout;         /* operands [count][padded] */
  void *q_t, *dout_t;     /* operands [d][t_stride], zero beyond count */
  int64_t t_stride;       /* most items of a block */
  float *dq;              /* [count][padded], rubbish beyond d; first what is transposed */
  float *s, *dp;          /* [count][64]: logits, then weights; their derivatives */
  void *p_rows, *ds_rows; /* operands: rows of weights under each other */
  void *ds;               /* operands [count][64] */
  void *typed;            /* [count][64] of T */
  float *lse, *delta;     /* [count] */
} back_task;

/* Wide heads take fewer tiles and fewer items, of these whole panels. */
static int64_t unit_of(int64_t padded) { return acre_min(UNIT, UNIT_WIDTH / padded); }

static int64_t items_of(int64_t padded) {
  return acre_min(TILE, ITEMS_WIDTH / padded / ACRE_PANEL * ACRE_PANEL);
}

_Static_assert(UNIT_WIDTH >= ACRE_HEAD_DIM_MAX, "no room for a tile");
_Static_assert(ITEMS_WIDTH >= ACRE_PANEL * ACRE_HEAD_DIM_MAX, "no room for a block");
_Static_assert(5 * TILE * UNIT_WIDTH + 5 * ITEMS_WIDTH + 6 * TILE * TILE + 2 * TILE <=
                   ACRE_WORKER_FLOATS,
               "scratch is too small");

static float *carve(float **scratch, int64_t floats) {
  float *taken = *scratch;
  *scratch += floats;
  return taken;
}

static back_task take_task(const back_job *job, int64_t index, float *scratch) {
  int64_t padded = job->padded, items = items_of(padded);
  back_task t = {.job = job,
                 .kv = index / ACRE_ATTEND_PARTS,
                 .part = index % ACRE_ATTEND_PARTS,
                 .t_stride = items};
  for (int64_t i = 0; i < unit_of(padded); i++) {
    key_tile *tile = &t.tiles[i];
    tile->k_t = carve(&scratch, TILE * padded);
    tile->v_t = carve(&scratch, TILE * padded);
    tile->k = carve(&scratch, TILE * padded);
    tile->dk_t = carve(&scratch, TILE * padded);
    tile->dv_t = carve(&scratch, TILE * padded);
  }
  t.q = carve(&scratch, items * padded);
  t.dout = carve(&scratch, items * padded);
  t.dq = carve(&scratch, items * padded);
  t.q_t = carve(&scratch, items * padded);
  t.dout_t = carve(&scratch, items * padded);
  t.lse = carve(&scratch, TILE);
  t.delta = carve(&scratch, TILE);
  t.s = carve(&scratch, items * TILE);
  t.dp = carve(&scratch, items * TILE);
  t.p_rows = carve(&scratch, TILE * TILE);
  t.ds_rows = carve(&scratch, TILE * TILE);
  t.ds = carve(&scratch, items * TILE);
  t.typed = carve(&scratch, items * TILE);
  return t;
}

static void *operand_at(const acre_typed *T, const void *a, int64_t i) {
  return (char *)a + i * T->operand;
}

static const void *typed_at(const back_job *job, const void *x, int64_t i) {
  return (const char *)x + (size_t)i * acre_dtype_size(job->heads->dtype);
}

/* c [rows][16 panels] = or += a b, any number of rows. */
static void product(const acre_typed *T, float *c, int64_t c_stride, const void *a,
                    int64_t a_stride, const void *b, int64_t panel_stride, int64_t rows,
                    int64_t panels, int64_t k, bool add) {
  for (int64_t i = 0; i < rows; i += T->tile_rows)
    T->tile(c + i * c_stride, c_stride, operand_at(T, a, i * a_stride), a_stride, b,
            panel_stride, acre_min(T->tile_rows, rows - i), panels, k, add);
}

/* ---------------------------------------------------------------- items */

/* Item i of the block is row i / group and head i % group of the KV head, i counted from
 * the block's first. */
static int64_t item_row(const back_task *t, int64_t i) {
  return (t->item + i) / t->job->group;
}
static int64_t item_head(const back_task *t, int64_t i) {
  return t->kv * t->job->group + (t->item + i) % t->job->group;
}

/* Where this part's dq of a row and head lies. */
static float *dq_at(const back_task *t, int64_t row, int64_t head) {
  const back_job *job = t->job;
  int64_t d = job->heads->head_dim, width = job->heads->heads * d;
  if (!t->part) return job->dqkv + row * job->stride + head * d;
  return job->scratch + ((t->part - 1) * job->rows + row) * width + head * d;
}

/* A panel's row of operands; of a size known here, so that it is a move. */
static void copy_row(const acre_typed *T, void *to, const void *from) {
  if (T->operand == sizeof(float))
    memcpy(to, from, ACRE_PANEL * sizeof(float));
  else
    memcpy(to, from, ACRE_PANEL * sizeof(uint16_t));
}

/* a [d][t_stride] = T(x^T), with zeros beyond count. x [count][padded]. */
static void transpose_items(const back_task *t, void *a, const float *x) {
  const acre_typed *T = t->job->T;
  int64_t d = t->job->heads->head_dim, panels = acre_ceil_div(t->count, ACRE_PANEL);
  for (int64_t c = 0; c < d; c += TILE) {
    int64_t n = acre_min(TILE, d - c);
    t->job->f32->keys(t->s, x + c, t->job->padded, t->count, n);
    T->round(t->dp, t->s, panels * n * ACRE_PANEL);
    for (int64_t p = 0; p < panels; p++)
      for (int64_t r = 0; r < n; r++)
        copy_row(T, operand_at(T, a, (c + r) * t->t_stride + p * ACRE_PANEL),
                 operand_at(T, t->dp, (p * n + r) * ACRE_PANEL));
  }
}

/* Operands of a block as float32; x is room for them. */
static const float *floats_of(const back_task *t, float *x, const void *a) {
  const back_job *job = t->job;
  if (job->T->operand == sizeof(float)) return a;
  job->T->widen(x, a, t->count * job->padded);
  return x;
}

static void load_items(const back_task *t) {
  const back_job *job = t->job;
  int64_t d = job->heads->head_dim;
  float x[ACRE_HEAD_DIM_MAX];
  for (int64_t i = 0; i < t->count; i++) {
    int64_t item = item_row(t, i) * job->heads->heads + item_head(t, i);
    job->T->load(operand_at(job->T, t->q, i * job->padded), typed_at(job, job->q, item * d),
                 d);
    job->T->round(operand_at(job->T, t->dout, i * job->padded), job->dout + item * d, d);
    t->lse[i] = job->lse[item];
  }
  transpose_items(t, t->q_t, floats_of(t, t->dq, t->q));
  const float *dout = floats_of(t, t->dq, t->dout);
  transpose_items(t, t->dout_t, dout);
  for (int64_t i = 0; i < t->count; i++) {
    int64_t item = item_row(t, i) * job->heads->heads + item_head(t, i);
    job->T->widen(x, typed_at(job, job->out, item * d), d);
    t->delta[i] = job->queue->kernels->dot(dout + i * job->padded, x, d);
  }
}

/* ---------------------------------------------------------------- a block and a tile */

/* Keys of the tile that a row sees; may be 0 or less. */
static int64_t visible(const key_tile *tile, int64_t row) {
  return tile->own ? acre_min(tile->count, row + 1 - tile->first) : tile->count;
}

/* s and dp become p and ds. Rows that see differently many keys are taken apart. */
static void weigh(const back_task *t, const key_tile *tile) {
  const back_job *job = t->job;
  const float *bias = tile->keys->bias ? tile->keys->bias + tile->first : NULL;
  int64_t most = visible(tile, item_row(t, t->count - 1));
  for (int64_t i = 0, end; i < t->count; i = end) {
    int64_t n = visible(tile, item_row(t, i));
    for (end = n == most ? t->count : i + 1; end < t->count; end++)
      if (visible(tile, item_row(t, end)) != n) break;
    job->queue->kernels->softmax_back(t->s + i * TILE, t->dp + i * TILE, bias, end - i,
                                      acre_max(n, 0), job->scale, job->factor, t->lse + i,
                                      t->delta + i);
  }
}

/* Rows of weights as b-panels, item under item; returns them as rows of T. */
static const void *lay_out(const back_task *t, void *panels, const float *x) {
  const back_job *job = t->job;
  const void *rows = x;
  if (job->heads->dtype != ACRE_F32) {
    job->T->store(t->typed, x, t->count * TILE);
    rows = t->typed;
  }
  job->T->values(panels, rows, TILE, t->count, TILE);
  return rows;
}

static void back_tile(const back_task *t, const key_tile *tile) {
  const back_job *job = t->job;
  const acre_typed *T = job->T;
  int64_t d = job->heads->head_dim, padded = job->padded, across = TILE * ACRE_PANEL;
  int64_t keys = visible(tile, item_row(t, t->count - 1));
  if (keys <= 0) return;
  int64_t panels = acre_ceil_div(keys, ACRE_PANEL);
  product(T, t->s, TILE, t->q, padded, tile->k_t, d * ACRE_PANEL, t->count, panels, d,
          false);
  product(T, t->dp, TILE, t->dout, padded, tile->v_t, d * ACRE_PANEL, t->count, panels, d,
          false);
  weigh(t, tile);
  lay_out(t, t->p_rows, t->s);
  T->load(t->ds, lay_out(t, t->ds_rows, t->dp), t->count * TILE);
  product(T, t->dq, padded, t->ds, TILE, tile->k, across, t->count, padded / ACRE_PANEL,
          keys, true);
  product(T, tile->dv_t, TILE, t->dout_t, t->t_stride, t->p_rows, across, d, panels,
          t->count, true);
  product(T, tile->dk_t, TILE, t->q_t, t->t_stride, t->ds_rows, across, d, panels, t->count,
          true);
}

static void fetch(const void *x, size_t bytes) {
  for (size_t at = 0; at < bytes; at += 64)
    __builtin_prefetch((const char *)x + at, 0,
                       2); /* not in the way of what is worked on */
}

/* Fetches what the next block will load, the share-th of as many parts as the unit has
 * tiles: its rows lie too far apart for the processor to foresee. */
static void fetch_ahead(const back_task *t, int64_t share) {
  const back_job *job = t->job;
  int64_t first = item_row(t, t->count), head = t->kv * job->group;
  int64_t rows = acre_min(t->count / job->group + 1, job->rows - first);
  int64_t end = first + (share + 1) * rows / t->tile_count;
  size_t n = (size_t)(job->group * job->heads->head_dim);
  size_t typed = n * acre_dtype_size(job->heads->dtype);
  for (int64_t row = first + share * rows / t->tile_count; row < end; row++) {
    int64_t at = (row * job->heads->heads + head) * job->heads->head_dim;
    fetch(typed_at(job, job->q, at), typed);
    fetch(typed_at(job, job->out, at), typed);
    fetch(job->dout + at, n * sizeof(float));
    fetch(dq_at(t, row, head), n * sizeof(float));
  }
}

/* A block of items against the unit. */
static void back_block(const back_task *t) {
  const back_job *job = t->job;
  int64_t d = job->heads->head_dim;
  size_t bytes = (size_t)d * sizeof(float);
  if (visible(&t->tiles[0], item_row(t, t->count - 1)) <= 0) return;
  load_items(t);
  for (int64_t i = 0; i < t->count; i++)
    memcpy(t->dq + i * job->padded, dq_at(t, item_row(t, i), item_head(t, i)), bytes);
  for (int64_t i = 0; i < t->tile_count; i++) {
    fetch_ahead(t, i);
    back_tile(t, &t->tiles[i]);
  }
  for (int64_t i = 0; i < t->count; i++)
    memcpy(dq_at(t, item_row(t, i), item_head(t, i)), t->dq + i * job->padded, bytes);
}

/* ---------------------------------------------------------------- a unit */

static void load_tile(const back_task *t, key_tile *tile, int64_t index) {
  const back_job *job = t->job;
  const acre_heads *heads = job->heads;
  int64_t d = heads->head_dim, step = heads->kv_heads * d;
  tile->own = index >= job->tiles[0];
  tile->keys = &job->segment[tile->own];
  tile->first = (tile->own ? index - job->tiles[0] : index) * TILE;
  tile->count = acre_min(TILE, tile->keys->count - tile->first);
  const void *k = acre_cpu_head(tile->keys->rotated, tile->first, t->kv, heads);
  const void *v = acre_cpu_head(tile->keys->values, tile->first, t->kv, heads);
  job->T->keys(tile->k_t, k, step, tile->count, d);
  job->T->keys(tile->v_t, v, step, tile->count, d);
  job->T->values(tile->k, k, step, tile->count, d);
  memset(tile->dk_t, 0, (size_t)(d * TILE) * sizeof(float));
  memset(tile->dv_t, 0, (size_t)(d * TILE) * sizeof(float));
}

/* Rows of y, one for each key of the tile, from x [d][64]. */
static void write_keys(const back_task *t, float *y, int64_t stride, const float *x,
                       int64_t count) {
  int64_t d = t->job->heads->head_dim;
  float *turned = t->p_rows; /* panels of [64][16] */
  for (int64_t c = 0; c < d; c += TILE) {
    int64_t n = acre_min(TILE, d - c);
    t->job->f32->keys(turned, x + c * TILE, TILE, n, TILE);
    for (int64_t p = 0; p < n; p += ACRE_PANEL)
      for (int64_t j = 0; j < count; j++)
        memcpy(y + j * stride + c + p, turned + p * TILE + j * ACRE_PANEL,
               (size_t)acre_min(ACRE_PANEL, n - p) * sizeof(float));
  }
}

static void end_tile(const back_task *t, const key_tile *tile) {
  const back_job *job = t->job;
  int64_t h = job->heads->heads, g = job->heads->kv_heads, d = job->heads->head_dim;
  int64_t stride = tile->own ? job->stride : g * d;
  int64_t at = tile->first * stride + t->kv * d;
  write_keys(t, tile->own ? job->dqkv + at + h * d : job->dk + at, stride, tile->dk_t,
             tile->count);
  write_keys(t, tile->own ? job->dqkv + at + (h + g) * d : job->dv + at, stride, tile->dv_t,
             tile->count);
}

static void back_unit(back_task *t, int64_t first) {
  int64_t items = t->job->rows * t->job->group, most = items_of(t->job->padded);
  for (int64_t i = 0; i < t->tile_count; i++) load_tile(t, &t->tiles[i], first + i);
  for (t->item = 0; t->item < items; t->item += most) {
    t->count = acre_min(most, items - t->item);
    back_block(t);
  }
  for (int64_t i = 0; i < t->tile_count; i++) end_tile(t, &t->tiles[i]);
}

static void run_task(void *context, int64_t index, int32_t worker) {
  const back_job *job = context;
  back_task t = take_task(job, index, acre_cpu_scratch(job->queue, worker));
  size_t bytes = (size_t)(job->group * job->heads->head_dim) * sizeof(float);
  for (int64_t row = 0; row < job->rows; row++) /* also where the part has no keys */
    memset(dq_at(&t, row, t.kv * job->group), 0, bytes);
  int64_t tiles = job->tiles[0] + job->tiles[1], unit = unit_of(job->padded);
  int64_t first = t.part * tiles / ACRE_ATTEND_PARTS;
  int64_t end = (t.part + 1) * tiles / ACRE_ATTEND_PARTS;
  for (; first < end; first += t.tile_count) { /* units of like size */
    int64_t units = acre_ceil_div(end - first, unit);
    t.tile_count = acre_ceil_div(end - first, units);
    back_unit(&t, first);
  }
}

/* ---------------------------------------------------------------- operation */

/* Adds up the parts of one row's dq. */
static void join_task(void *context, int64_t row, int32_t worker) {
  (void)worker;
  const back_job *job = context;
  int64_t width = job->heads->heads * job->heads->head_dim;
  float *dq = job->dqkv + row * job->stride;
  for (int64_t part = 0; part + 1 < ACRE_ATTEND_PARTS; part++)
    job->queue->kernels->add(dq, dq, job->scratch + (part * job->rows + row) * width,
                             width);
}

void acre_cpu_attend_back(acre_queue *queue, float *dqkv, float *dk, float *dv,
                          float *scratch, const float *dout, const void *out,
                          const float *lse, const void *q, const acre_keys *prefix,
                          const acre_keys *own, int64_t rows, const acre_heads *heads) {
  if (rows <= 0) return;
  back_job job = {.queue = queue,
                  .T = &queue->kernels->of[heads->dtype],
                  .f32 = &queue->kernels->of[ACRE_F32],
                  .dqkv = dqkv,
                  .dk = dk,
                  .dv = dv,
                  .scratch = scratch,
                  .dout = dout,
                  .lse = lse,
                  .out = out,
                  .q = q,
                  .rows = rows,
                  .heads = heads,
                  .group = heads->heads / heads->kv_heads,
                  .padded = acre_padded(heads->head_dim),
                  .stride = (heads->heads + 2 * heads->kv_heads) * heads->head_dim,
                  .scale = acre_cpu_logit_scale(heads),
                  .factor = (float)(1.0 / sqrt((double)heads->head_dim))};
  if (prefix) job.segment[0] = *prefix;
  job.segment[1] = *own;
  for (int i = 0; i < 2; i++) job.tiles[i] = acre_ceil_div(job.segment[i].count, TILE);
  acre_pool_run(queue->pool, run_task, &job, heads->kv_heads * ACRE_ATTEND_PARTS);
  acre_pool_run(queue->pool, join_task, &job, rows);
}
