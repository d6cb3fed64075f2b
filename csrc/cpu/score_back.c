/* The way back through scores (METHOD.md, section 6), without ever storing the [heads, t, m]
 * softmax.
 *
 * With A the softmax of one item (a query row and a head that counts) and E the sum of
 * A_j pull_j, dE/d(logit_j) = A_j (pull_j - E). Two passes over the keys, as in score.c: the
 * first finds every item's origin, sum of exponentials and E, the second multiplies. A KV head is one task's, and so are its dk; the order of sums
 * does not depend on the threads. All in float32. */
#include "attention.h"

#include <math.h>

#define TILE ACRE_KEY_TILE
#define ITEMS 48 /* that meet the keys together; a multiple of every tile_rows */

typedef struct score_back_job {
  acre_queue *queue;
  const acre_typed *f32, *T;
  float *dq, *dk;
  int64_t dq_stride;
  const void *q, *keys;
  const float *pull;
  const uint8_t *use;
  const acre_heads *heads;
  int64_t t, m;
  float scale, root; /* of logits, as powers of two; of the gradient by a logit */
} score_back_job;

/* A worker's scratch: some items of a KV head, and a tile of keys. */
typedef struct block {
  int64_t kv_head, items, count; /* of keys in the tile */
  int64_t row[ITEMS], head[ITEMS];
  float origin[ITEMS], sum[ITEMS], pulled[ITEMS]; /* sums of p, of p * pull */
  float *q;                                       /* [ITEMS][padded] */
  float *q_cut;                                   /* the same in panels [ITEMS][16] */
  float *dq;                                      /* [ITEMS][padded] */
  float *k;                                       /* [64][padded]; then the tile's dk */
  float *k_turned, *k_cut;                        /* panels of f32.keys and f32.values */
  float *s;        /* [ITEMS][64]: logits, then gradients by them */
  float *s_turned; /* [64][ITEMS] */
} block;

#define QUERY_FLOATS (ITEMS * ACRE_HEAD_DIM_MAX)
#define KEY_FLOATS (TILE * ACRE_HEAD_DIM_MAX)

_Static_assert(3 * QUERY_FLOATS + 3 * KEY_FLOATS + 2 * ITEMS * TILE <= ACRE_WORKER_FLOATS,
               "scratch is too small");

static block take_block(const score_back_job *job, int32_t worker) {
  block b = {.q = acre_cpu_scratch(job->queue, worker)};
  b.q_cut = b.q + QUERY_FLOATS;
  b.dq = b.q_cut + QUERY_FLOATS;
  b.k = b.dq + QUERY_FLOATS;
  b.k_turned = b.k + KEY_FLOATS;
  b.k_cut = b.k_turned + KEY_FLOATS;
  b.s = b.k_cut + KEY_FLOATS;
  b.s_turned = b.s + ITEMS * TILE;
  return b;
}

/* c (+)= a b for any number of rows. */
static void multiply(const score_back_job *job, float *c, int64_t c_stride, const float *a,
                     int64_t a_stride, const float *b, int64_t panel_stride, int64_t rows,
                     int64_t columns, int64_t k, bool add) {
  const acre_typed *f32 = job->f32;
  for (int64_t i = 0; i < rows; i += f32->tile_rows)
    f32->tile(c + i * c_stride, c_stride, a + i * a_stride, a_stride, b, panel_stride,
              acre_min(f32->tile_rows, rows - i), acre_ceil_div(columns, ACRE_PANEL), k,
              add);
}

static void load_items(const score_back_job *job, block *b) {
  int64_t d = job->heads->head_dim, padded = acre_padded(d);
  memset(b->q, 0, (size_t)(b->items * padded) * sizeof(float));
  memset(b->dq, 0, (size_t)(b->items * padded) * sizeof(float));
  for (int64_t i = 0; i < b->items; i++) {
    int64_t at = (b->row[i] * job->heads->heads + b->head[i]) * d;
    job->T->widen(b->q + i * padded,
                  (const char *)job->q + (size_t)at * acre_dtype_size(job->heads->dtype),
                  d);
    for (int64_t x = 0; x < padded; x += ACRE_PANEL)
      memcpy(b->q_cut + x * ITEMS + i * ACRE_PANEL, b->q + i * padded + x,
             ACRE_PANEL * sizeof(float));
    b->origin[i] = -INFINITY, b->sum[i] = b->pulled[i] = 0.0f;
  }
}

/* The tile from key j on, and its logits with all items. */
static void load_tile(const score_back_job *job, block *b, int64_t j) {
  int64_t d = job->heads->head_dim, padded = acre_padded(d);
  b->count = acre_min(TILE, job->m - j);
  for (int64_t i = 0; i < b->count; i++)
    job->T->widen(b->k + i * padded,
                  acre_cpu_head(job->keys, j + i, b->kv_head, job->heads), d);
  job->f32->keys(b->k_turned, b->k, padded, b->count, d);
  multiply(job, b->s, TILE, b->q, padded, b->k_turned, d * ACRE_PANEL, b->items, b->count,
           d, false);
}

/* First pass: sums of p and of p * pull. A tile that nothing pulls at, which is nearly every
 * one, adds to the first only. */
static void measure_tile(const score_back_job *job, block *b, int64_t j) {
  const float *pull = job->pull + j;
  bool any = false;
  for (int64_t i = 0; i < b->count; i++) any |= pull[i] != 0.0f;
  for (int64_t i = 0; i < b->items; i++) {
    float *s = b->s + i * TILE, sum[ACRE_PANEL] = {0}, factor;
    job->f32->softmax(s, NULL, 1, b->count, job->scale, &b->origin[i], &b->sum[i], &factor);
    b->pulled[i] *= factor;
    if (!any) continue;
    for (int64_t c = 0; c < b->count; c++) sum[c % ACRE_PANEL] += s[c] * pull[c];
    for (int lane = 1; lane < ACRE_PANEL; lane++) sum[0] += sum[lane];
    b->pulled[i] += sum[0];
  }
}

/* Logits become the gradient by them. */
static void logit_gradients(const score_back_job *job, block *b, int64_t j) {
  for (int64_t i = 0; i < b->items; i++) {
    float *s = b->s + i * TILE, p[TILE] = {0};
    float whole = 1.0f / b->sum[i], mean = b->pulled[i] * whole;
    job->queue->kernels->add_exp2(p, s, b->count, job->scale, b->origin[i],
                                  whole * job->root);
    for (int64_t c = 0; c < b->count; c++) {
      s[c] = p[c] * (job->pull[j + c] - mean);
      b->s_turned[c * ITEMS + i] = s[c];
    }
  }
}

/* Second pass: dq of the items, and the tile's dk. */
static void multiply_tile(const score_back_job *job, block *b, int64_t j) {
  int64_t d = job->heads->head_dim, padded = acre_padded(d);
  logit_gradients(job, b, j);
  job->f32->values(b->k_cut, b->k, padded, b->count, d);
  multiply(job, b->dq, padded, b->s, TILE, b->k_cut, TILE * ACRE_PANEL, b->items, d,
           b->count, true);
  multiply(job, b->k, padded, b->s_turned, ITEMS, b->q_cut, ITEMS * ACRE_PANEL, b->count, d,
           b->items, false);
  for (int64_t i = 0; i < b->count; i++) {
    float *dk = job->dk + ((j + i) * job->heads->kv_heads + b->kv_head) * d;
    job->queue->kernels->add(dk, dk, b->k + i * padded, d);
  }
}

static void do_items(const score_back_job *job, block *b) {
  int64_t d = job->heads->head_dim;
  load_items(job, b);
  for (int64_t j = 0; j < job->m; j += TILE) {
    load_tile(job, b, j);
    measure_tile(job, b, j);
  }
  for (int64_t j = 0; j < job->m; j += TILE) {
    load_tile(job, b, j);
    multiply_tile(job, b, j);
  }
  for (int64_t i = 0; i < b->items; i++) {
    float *dq = job->dq + b->row[i] * job->dq_stride + b->head[i] * d;
    job->queue->kernels->add(dq, dq, b->dq + i * acre_padded(d), d);
  }
  b->items = 0;
}

/* One KV head, ITEMS at a time. */
static void score_back_task(void *context, int64_t index, int32_t worker) {
  const score_back_job *job = context;
  int64_t group = job->heads->heads / job->heads->kv_heads;
  block b = take_block(job, worker);
  b.kv_head = index;
  for (int64_t row = 0; row < job->t; row++) {
    for (int64_t head = index * group; head < (index + 1) * group; head++) {
      if (!job->use[head]) continue;
      b.row[b.items] = row, b.head[b.items] = head;
      if (++b.items == ITEMS) do_items(job, &b);
    }
  }
  if (b.items) do_items(job, &b);
}

void acre_cpu_score_back(acre_queue *queue, float *dq, int64_t dq_stride, float *dk,
                         const float *pull, const void *q, const void *keys,
                         const uint8_t *use, int64_t t, int64_t m,
                         const acre_heads *heads) {
  if (m <= 0) return;
  score_back_job job = {.queue = queue,
                        .f32 = &queue->kernels->of[ACRE_F32],
                        .T = &queue->kernels->of[heads->dtype],
                        .dq = dq,
                        .dk = dk,
                        .dq_stride = dq_stride,
                        .q = q,
                        .keys = keys,
                        .pull = pull,
                        .use = use,
                        .heads = heads,
                        .t = t,
                        .m = m,
                        .scale = acre_cpu_logit_scale(heads),
                        .root = 1.0f / sqrtf((float)heads->head_dim)};
  acre_pool_run(queue->pool, score_back_task, &job, heads->kv_heads);
}
