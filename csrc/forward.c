#include "forward.h"

#include "platform.h"

#include <string.h>

/* ---------------------------------------------------------------- workspace */

/* Every array of the workspace, in the order in which they lie in its block. */
enum { X, QKV, NORMED, ATTENDED, HIDDEN, L1_NORMED, L1_QKV, LOGITS, IDS, L1_INDEX, ARRAYS };

/* Where each begins, and behind the last one the end, in bytes. */
typedef struct layout {
  size_t at[ARRAYS + 1];
} layout;

static layout workspace_layout(const acre_model *model, int64_t rows) {
  const acre_model_config *c = &model->config;
  int64_t l1 = acre_model_has_l1(model) ? rows : 0;
  int64_t qkv = acre_model_qkv_width(model);
  int64_t f32 = sizeof(float), T = (int64_t)acre_dtype_size(c->dtype);
  const int64_t bytes[ARRAYS] = {
      [X] = rows * c->hidden * f32,
      [QKV] = rows * qkv * f32,
      [NORMED] = rows * c->hidden * T,
      [ATTENDED] = rows * c->heads * c->head_dim * T,
      [HIDDEN] = rows * c->ffn * T,
      [L1_NORMED] = l1 * c->hidden * T,
      [L1_QKV] = l1 * qkv * f32,
      [LOGITS] = c->vocab_size * f32,
      [IDS] = rows * (int64_t)sizeof(int32_t),
      [L1_INDEX] = rows * (int64_t)sizeof(int32_t),
  };
  layout sizes = {{0}};
  for (int i = 0; i < ARRAYS; ++i) {
    sizes.at[i + 1] = sizes.at[i] + (size_t)acre_round_up(bytes[i], ACRE_ALIGN);
  }
  return sizes;
}

size_t acre_workspace_bytes(const acre_model *model, int64_t rows) {
  return workspace_layout(model, rows).at[ARRAYS];
}

acre_status acre_workspace_open(acre_workspace *workspace, const acre_model *model,
                                int64_t rows, acre_error *error) {
  acre_backend *backend = model->backend;
  memset(workspace, 0, sizeof *workspace);
  workspace->rows = rows;
  acre_status status = backend->ops->queue_open(backend, &workspace->queue, error);
  if (status == ACRE_OK) {
    status = backend->ops->alloc(backend, &workspace->block,
                                 acre_workspace_bytes(model, rows), error);
  }
  workspace->l1_host = acre_alloc((size_t)rows * sizeof(int32_t));
  if (status == ACRE_OK && !workspace->l1_host) {
    status = acre_fail(error, ACRE_NO_MEMORY, "workspace: out of memory");
  }
  if (status != ACRE_OK) {
    acre_workspace_close(workspace, model);
    return status;
  }
  layout sizes = workspace_layout(model, rows);
  char *block = acre_buffer_data(workspace->block);
  void *arrays[ARRAYS];
  for (int i = 0; i < ARRAYS; ++i) arrays[i] = block + sizes.at[i];
  workspace->x = arrays[X];
  workspace->qkv = arrays[QKV];
  workspace->normed = arrays[NORMED];
  workspace->attended = arrays[ATTENDED];
  workspace->hidden = arrays[HIDDEN];
  workspace->l1_normed = arrays[L1_NORMED];
  workspace->l1_qkv = arrays[L1_QKV];
  workspace->logits = arrays[LOGITS];
  workspace->ids = arrays[IDS];
  workspace->l1_index = arrays[L1_INDEX];
  return ACRE_OK;
}

void acre_workspace_close(acre_workspace *workspace, const acre_model *model) {
  if (workspace->queue) model->backend->ops->queue_close(workspace->queue);
  acre_buffer_release(workspace->block);
  acre_free(workspace->l1_host);
  memset(workspace, 0, sizeof *workspace);
}

/* ---------------------------------------------------------------- one pass */

/* State of a pass that is the same in every layer. */
typedef struct flow {
  const acre_model *model;
  const acre_backend_ops *ops;
  acre_workspace *ws;
  const acre_pass *pass;
  int64_t l1_rows; /* L1 tokens with weights of their own among the rows */
} flow;

/* Rows of a pass that lie on one timeline: all of them, or each alone. */
typedef struct stretch {
  int64_t row, rows;
  const acre_timeline *prefix;
  acre_timeline *own;
  int64_t seen;     /* own entries before the first row */
  int64_t position; /* of the first row */
} stretch;

static int64_t stretches(const acre_pass *pass) { return pass->seats ? pass->rows : 1; }

static stretch stretch_at(const acre_pass *pass, int64_t i) {
  acre_seat seat = {pass->first_position, pass->prefix, pass->own};
  if (pass->seats) seat = pass->seats[i];
  return (stretch){.row = pass->seats ? i : 0,
                   .rows = pass->seats ? 1 : pass->rows,
                   .prefix = seat.prefix,
                   .own = seat.own,
                   .seen = seat.own->count,
                   .position = seat.first_position + seat.own->count};
}

static void embed(flow *f) {
  const acre_model_config *c = &f->model->config;
  const acre_pass *pass = f->pass;
  f->l1_rows = 0;
  if (pass->ids) {
    f->ops->upload(f->ws->queue, f->ws->ids, pass->ids,
                   (size_t)pass->rows * sizeof(int32_t));
  }
  if (pass->ids && acre_model_has_l1(f->model)) {
    for (int64_t i = 0; i < pass->rows; ++i) {
      if (pass->ids[i] != c->vocab_size) continue;
      f->ws->l1_host[f->l1_rows++] = (int32_t)i;
    }
    f->ops->upload(f->ws->queue, f->ws->l1_index, f->ws->l1_host,
                   (size_t)f->l1_rows * sizeof(int32_t));
  }
  f->ops->embed(f->ws->queue, f->ws->x, f->ws->ids, acre_buffer_data(f->model->embedding),
                acre_buffer_data(f->model->l1_embedding), pass->rows, c->vocab_size,
                c->hidden, c->dtype);
}

static const float *floats(const acre_buffer *buffer) {
  return buffer ? acre_buffer_data(buffer) : NULL;
}

/* qkv of all rows; L1 rows go through their own projection. */
static void project(flow *f, const acre_layer *layer) {
  acre_workspace *ws = f->ws;
  int64_t hidden = f->model->config.hidden, width = acre_model_qkv_width(f->model);
  f->ops->rmsnorm(ws->queue, ws->normed, ws->x, floats(layer->input_norm),
                  f->model->config.rms_eps, f->pass->rows, hidden, f->model->config.dtype);
  f->ops->matmul(ws->queue, ws->qkv, width, ws->normed, layer->qkv, floats(layer->qkv_bias),
                 f->pass->rows, false);
  if (!f->l1_rows) return;
  f->ops->gather_rows(ws->queue, ws->l1_normed, ws->normed, ws->l1_index, f->l1_rows,
                      (size_t)hidden * acre_dtype_size(f->model->config.dtype));
  f->ops->matmul(ws->queue, ws->l1_qkv, width, ws->l1_normed, layer->l1_qkv,
                 floats(layer->l1_bias), f->l1_rows, false);
  f->ops->scatter_rows(ws->queue, ws->qkv, ws->l1_qkv, ws->l1_index, f->l1_rows,
                       (size_t)width * sizeof(float));
}

static void look(const flow *f, int64_t layer, bool rotated) {
  const acre_probe *probe = &f->pass->probe;
  if (!probe->look) return;
  probe->look(probe->context, layer, rotated, f->ws->qkv, acre_model_qkv_width(f->model),
              f->pass->rows);
}

/* Keeps the residual stream before this layer, or behind the last one. */
static void record(const flow *f, int64_t layer) {
  if (!f->pass->tape) return;
  acre_span all = {f->ws->x, 0, f->pass->rows};
  f->ops->copy_rows(f->ws->queue, acre_tape_x(f->pass->tape, layer), &all, 1,
                    (size_t)f->model->config.hidden * sizeof(float));
}

/* Rotates the queries and appends the keys and values to their timelines. */
static void place(flow *f, int64_t layer) {
  const acre_model_config *c = &f->model->config;
  int64_t width = acre_model_qkv_width(f->model);
  const float *cos = floats(f->model->cos), *sin = floats(f->model->sin);
  look(f, layer, false);
  for (int64_t i = 0; i < stretches(f->pass); ++i) {
    stretch at = stretch_at(f->pass, i);
    float *q = f->ws->qkv + at.row * width;
    f->ops->rope(f->ws->queue, q, width, cos, sin, at.position, at.rows, c->heads,
                 c->head_dim);
    const float *k = q + c->heads * c->head_dim;
    f->ops->store_kv(f->ws->queue, acre_timeline_at(at.own, ACRE_RAW, layer, at.seen),
                     acre_timeline_at(at.own, ACRE_ROTATED, layer, at.seen),
                     acre_timeline_at(at.own, ACRE_VALUES, layer, at.seen), k,
                     k + c->kv_heads * c->head_dim, width, cos, sin, at.position, at.rows,
                     &f->model->heads);
  }
  look(f, layer, true);
}

/* What the rows of a stretch see, to `attended`. */
static void attend_stretch(flow *f, int64_t layer, const stretch *at, void *attended,
                           float *lse) {
  const acre_model_config *c = &f->model->config;
  int64_t width = c->heads * c->head_dim, qkv = acre_model_qkv_width(f->model);
  size_t row_bytes = (size_t)width * acre_dtype_size(c->dtype);
  acre_keys own = acre_timeline_keys(at->own, layer, at->seen + at->rows);
  acre_keys prefix = {0};
  if (at->prefix) prefix = acre_timeline_keys(at->prefix, layer, at->prefix->count);
  f->ops->attend(f->ws->queue, (char *)attended + (size_t)at->row * row_bytes, width, lse,
                 f->ws->qkv + at->row * qkv, qkv, prefix.count ? &prefix : NULL, &own,
                 at->seen, at->rows, f->pass->split, &f->model->heads);
}

static void attend(flow *f, int64_t layer, const acre_layer *weights) {
  acre_workspace *ws = f->ws;
  const acre_pass *pass = f->pass;
  const acre_model_config *c = &f->model->config;
  int64_t width = c->heads * c->head_dim;
  void *attended = ws->attended;
  float *lse = NULL;
  if (pass->tape) {
    attended = acre_tape_attended(pass->tape, layer);
    lse = acre_tape_lse(pass->tape, layer);
    f->ops->round(ws->queue, acre_tape_q(pass->tape, layer), width, ws->qkv,
                  acre_model_qkv_width(f->model), pass->rows, width, c->dtype);
  }
  for (int64_t i = 0; i < stretches(pass); ++i) {
    stretch at = stretch_at(pass, i);
    attend_stretch(f, layer, &at, attended, lse);
  }
  f->ops->matmul(ws->queue, ws->x, c->hidden, attended, weights->out, NULL, pass->rows,
                 true);
}

static void feed_forward(flow *f, const acre_layer *weights) {
  acre_workspace *ws = f->ws;
  const acre_model_config *c = &f->model->config;
  int64_t rows = f->pass->rows;
  f->ops->rmsnorm(ws->queue, ws->normed, ws->x, floats(weights->attention_norm), c->rms_eps,
                  rows, c->hidden, c->dtype);
  f->ops->swiglu(ws->queue, ws->hidden, ws->normed, weights->gate, weights->up, rows);
  f->ops->matmul(ws->queue, ws->x, c->hidden, ws->hidden, weights->down, NULL, rows, true);
}

void acre_forward(const acre_model *model, acre_workspace *workspace,
                  const acre_pass *pass) {
  flow f = {.model = model, .ops = model->backend->ops, .ws = workspace, .pass = pass};
  embed(&f);
  for (int64_t i = 0; i < pass->layers; ++i) {
    const acre_layer *layer = &model->layers[i];
    record(&f, i);
    project(&f, layer);
    place(&f, i);
    if (pass->keys_only && i + 1 == pass->layers) break;
    if (pass->arrival.arrive) pass->arrival.arrive(pass->arrival.context, i);
    attend(&f, i, layer);
    feed_forward(&f, layer);
  }
  if (!pass->keys_only) record(&f, pass->layers);
  for (int64_t i = 0; i < stretches(pass); ++i) {
    stretch at = stretch_at(pass, i);
    at.own->count += at.rows;
  }
}

void acre_head(const acre_model *model, acre_workspace *workspace, float *logits,
               int64_t first, int64_t rows) {
  const acre_model_config *c = &model->config;
  const float *x = workspace->x + first * c->hidden;
  char *normed = workspace->normed;
  normed += (size_t)(first * c->hidden) * acre_dtype_size(c->dtype);
  model->backend->ops->rmsnorm(workspace->queue, normed, x, floats(model->norm), c->rms_eps,
                               rows, c->hidden, c->dtype);
  model->backend->ops->matmul(workspace->queue, logits, c->vocab_size, normed, model->head,
                              NULL, rows, false);
}
