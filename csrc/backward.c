#include "backward.h"

#include "platform.h"

#include <stddef.h>
#include <string.h>

#define BLOCK_ROWS 288 /* rows of the MLP and of the head that go back together */

/* ---------------------------------------------------------------- the other way round */

static acre_status reverse_layer(acre_reverse_layer *to, const acre_layer *from,
                                 const acre_backend_ops *ops, acre_queue *queue,
                                 acre_error *error) {
  ACRE_TRY(ops->matrix_transpose(queue, &to->qkv, from->qkv, error));
  ACRE_TRY(ops->matrix_transpose(queue, &to->out, from->out, error));
  ACRE_TRY(ops->matrix_transpose(queue, &to->gate, from->gate, error));
  ACRE_TRY(ops->matrix_transpose(queue, &to->up, from->up, error));
  return ops->matrix_transpose(queue, &to->down, from->down, error);
}

/* The sines of the model's table, negated. */
static acre_status reverse_sines(acre_reverse *reverse, const acre_model *model,
                                 acre_queue *queue, acre_error *error) {
  const acre_backend_ops *ops = model->backend->ops;
  size_t bytes = acre_buffer_size(model->sin), count = bytes / sizeof(float);
  ACRE_TRY(ops->alloc(model->backend, &reverse->sin, bytes, error));
  float *host = acre_alloc(bytes);
  if (!host) return acre_fail(error, ACRE_NO_MEMORY, "trainer: out of memory");
  ops->download(queue, host, acre_buffer_data(model->sin), bytes);
  for (size_t i = 0; i < count; ++i) host[i] = -host[i];
  ops->upload(queue, acre_buffer_data(reverse->sin), host, bytes);
  acre_status status = ops->sync(queue, error);
  acre_free(host);
  return status;
}

acre_status acre_reverse_l1(acre_reverse *reverse, const acre_model *model,
                            acre_queue *queue, acre_error *error) {
  const acre_backend_ops *ops = model->backend->ops;
  for (int64_t i = 0; i < model->config.layers; ++i) {
    ACRE_TRY(ops->matrix_transpose(queue, &reverse->layers[i].l1_qkv,
                                   model->layers[i].l1_qkv, error));
  }
  return ops->sync(queue, error);
}

acre_status acre_reverse_open(acre_reverse *reverse, const acre_model *model,
                              acre_queue *queue, acre_error *error) {
  const acre_backend_ops *ops = model->backend->ops;
  int64_t layers = model->config.layers;
  memset(reverse, 0, sizeof *reverse);
  reverse->layers = acre_alloc_zero((size_t)layers * sizeof *reverse->layers);
  if (!reverse->layers) return acre_fail(error, ACRE_NO_MEMORY, "trainer: out of memory");
  for (int64_t i = 0; i < layers; ++i) {
    ACRE_TRY(reverse_layer(&reverse->layers[i], &model->layers[i], ops, queue, error));
  }
  ACRE_TRY(ops->matrix_transpose(queue, &reverse->head, model->head, error));
  ACRE_TRY(reverse_sines(reverse, model, queue, error));
  return acre_reverse_l1(reverse, model, queue, error);
}

void acre_reverse_close(acre_reverse *reverse, const acre_model *model) {
  const acre_backend_ops *ops = model->backend->ops;
  for (int64_t i = 0; reverse->layers && i < model->config.layers; ++i) {
    acre_reverse_layer *layer = &reverse->layers[i];
    acre_matrix *matrices[] = {layer->qkv,  layer->l1_qkv, layer->out,
                               layer->gate, layer->up,     layer->down};
    for (int j = 0; j < ACRE_COUNT(matrices); ++j) ops->matrix_release(matrices[j]);
  }
  ops->matrix_release(reverse->head);
  acre_buffer_release(reverse->sin);
  acre_free(reverse->layers);
  memset(reverse, 0, sizeof *reverse);
}

/* ---------------------------------------------------------------- memory */

acre_status acre_kv_gradients_open(acre_kv_gradients *kv, const acre_model *model,
                                   int64_t rows, acre_error *error) {
  int64_t numbers =
      model->config.layers * rows * model->heads.kv_heads * model->heads.head_dim;
  memset(kv, 0, sizeof *kv);
  if (!rows) return ACRE_OK;
  ACRE_TRY(model->backend->ops->alloc(model->backend, &kv->buffer,
                                      2 * (size_t)numbers * sizeof(float), error));
  kv->rows = rows;
  kv->keys = acre_buffer_data(kv->buffer);
  kv->values = kv->keys + numbers;
  return ACRE_OK;
}

void acre_kv_gradients_close(acre_kv_gradients *kv) {
  acre_buffer_release(kv->buffer);
  memset(kv, 0, sizeof *kv);
}

/* The arrays of the space: where each pointer is, and how much it points at. */
typedef struct piece {
  size_t pointer; /* offset in acre_back_space */
  int64_t bytes;
} piece;

enum { PIECES = 24 };

static int pieces_of(piece out[PIECES], const acre_model *model, int64_t rows,
                     int64_t prefix) {
  const acre_model_config *c = &model->config;
  int64_t f32 = (int64_t)sizeof(float), T = (int64_t)acre_dtype_size(c->dtype);
  int64_t q = c->heads * c->head_dim, kv = c->kv_heads * c->head_dim, qkv = q + 2 * kv;
  int64_t block = acre_min(rows, BLOCK_ROWS);
#define AT(name) offsetof(acre_back_space, name)
  const piece pieces[] = {
      {AT(dx), rows * c->hidden * f32},
      {AT(dn), rows * c->hidden * f32},
      {AT(dout), rows * q * f32},
      {AT(dqkv), rows * qkv * f32},
      {AT(parts), (ACRE_ATTEND_PARTS - 1) * rows * q * f32},
      {AT(dk), prefix * kv * f32},
      {AT(dv), prefix * kv * f32},
      {AT(mid), block * c->hidden * f32},
      {AT(gate), block * c->ffn * f32},
      {AT(up), block * c->ffn * f32},
      {AT(dh), block * c->ffn * f32},
      {AT(logits), block * c->vocab_size * f32},
      {AT(l1_x), rows * c->hidden * f32},
      {AT(l1_dqkv), rows * qkv * f32},
      {AT(l1_dn), rows * c->hidden * f32},
      {AT(typed), rows * acre_max(qkv, c->hidden) * T},
      {AT(normed), rows * c->hidden * T},
      {AT(dgate), block * c->ffn * T},
      {AT(dup), block * c->ffn * T},
      {AT(dlogits), block * c->vocab_size * T},
      {AT(index), rows * (int64_t)sizeof(int32_t)},
      {AT(zeros), rows * (int64_t)sizeof(int32_t)},
      {AT(targets), rows * (int64_t)sizeof(int32_t)},
      {AT(weights), 2 * rows * f32},
  };
#undef AT
  _Static_assert(sizeof pieces / sizeof *pieces == PIECES, "count the pieces");
  memcpy(out, pieces, sizeof pieces);
  return PIECES;
}

size_t acre_back_space_bytes(const acre_model *model, int64_t rows, int64_t prefix) {
  piece pieces[PIECES];
  int count = pieces_of(pieces, model, rows, prefix);
  size_t bytes = 0;
  for (int i = 0; i < count; ++i) {
    bytes += (size_t)acre_round_up(pieces[i].bytes, ACRE_ALIGN);
  }
  return bytes;
}

acre_status acre_back_space_open(acre_back_space *space, const acre_model *model,
                                 int64_t rows, int64_t prefix, acre_error *error) {
  memset(space, 0, sizeof *space);
  ACRE_TRY(model->backend->ops->alloc(model->backend, &space->block,
                                      acre_back_space_bytes(model, rows, prefix), error));
  piece pieces[PIECES];
  int count = pieces_of(pieces, model, rows, prefix);
  char *at = acre_buffer_data(space->block);
  for (int i = 0; i < count; ++i) {
    memcpy((char *)space + pieces[i].pointer, &at, sizeof at);
    at += acre_round_up(pieces[i].bytes, ACRE_ALIGN);
  }
  space->rows = rows;
  space->prefix = prefix;
  space->losses = space->weights + rows;
  space->host_index = acre_alloc(2 * (size_t)rows * sizeof *space->host_index);
  space->host_weights = acre_alloc(2 * (size_t)rows * sizeof *space->host_weights);
  if (!space->host_index || !space->host_weights) {
    acre_back_space_close(space);
    return acre_fail(error, ACRE_NO_MEMORY, "trainer: out of memory");
  }
  space->host_losses = space->host_weights + rows;
  return ACRE_OK;
}

void acre_back_space_close(acre_back_space *space) {
  acre_buffer_release(space->block);
  acre_free(space->host_index);
  acre_free(space->host_weights);
  memset(space, 0, sizeof *space);
}

/* ---------------------------------------------------------------- one pass back */

typedef struct flow {
  const acre_model *model;
  const acre_model_config *c;
  const acre_backend_ops *ops;
  const acre_reverse *reverse;
  acre_queue *queue;
  acre_back_space *s;
  const acre_back_pass *pass;
  const acre_l1_gradients *gradients;
  int64_t rows, seen; /* of the pass; prefix entries that it saw */
  int64_t q, kv, qkv; /* numbers of a row's queries, of its keys, of all three */
} flow;

static const float *floats(const acre_buffer *buffer) {
  return buffer ? acre_buffer_data(buffer) : NULL;
}

/* Row `row` of an array of T with `width` numbers a row. */
static const void *typed_row(const flow *f, const void *x, int64_t row, int64_t width) {
  return (const char *)x + (size_t)(row * width) * acre_dtype_size(f->c->dtype);
}

/* dn (+)= dy W, where dy [rows, N] is float32 and `back` is W^T. */
static void through(flow *f, float *dn, const acre_matrix *back, const float *dy,
                    int64_t rows, int64_t N, int64_t K) {
  f->ops->round(f->queue, f->s->typed, N, dy, N, rows, N, f->c->dtype);
  f->ops->matmul(f->queue, dn, K, f->s->typed, back, NULL, rows, false);
}

/* ---------------------------------------------------------------- loss */

/* Rows of the pass that have a loss, to s->index, with what they predict; their number. */
static int64_t rows_with_loss(flow *f) {
  acre_back_space *s = f->s;
  int32_t *index = s->host_index, *targets = s->host_index + s->rows;
  int64_t count = 0;
  for (int64_t i = 0; i < f->rows; ++i) {
    if (f->pass->targets[i] < 0 || f->pass->weights[i] == 0.0f) continue;
    index[count] = (int32_t)i;
    targets[count] = f->pass->targets[i];
    s->host_weights[count++] = f->pass->weights[i];
  }
  f->ops->upload(f->queue, s->index, index, (size_t)count * sizeof *index);
  f->ops->upload(f->queue, s->targets, targets, (size_t)count * sizeof *targets);
  f->ops->upload(f->queue, s->weights, s->host_weights, (size_t)count * sizeof(float));
  return count;
}

/* Rows [first, first + count) of those with a loss: logits, their gradient, and back through
 * the head and the last norm to dn, which has their rows side by side. */
static void head_back(flow *f, int64_t first, int64_t count) {
  acre_back_space *s = f->s;
  const acre_model_config *c = f->c;
  const float *gain = floats(f->model->norm);
  float *x = s->l1_x, *dx = s->l1_dn + first * c->hidden;
  f->ops->gather_rows(f->queue, x, acre_tape_x(f->pass->tape, c->layers), s->index + first,
                      count, (size_t)c->hidden * sizeof(float));
  f->ops->rmsnorm(f->queue, s->normed, x, gain, c->rms_eps, count, c->hidden, c->dtype);
  f->ops->matmul(f->queue, s->logits, c->vocab_size, s->normed, f->model->head, NULL, count,
                 false);
  f->ops->cross_entropy_back(f->queue, s->dlogits, s->losses + first, s->logits,
                             s->targets + first, s->weights + first, count, c->vocab_size,
                             c->dtype);
  f->ops->matmul(f->queue, s->dn, c->hidden, s->dlogits, f->reverse->head, NULL, count,
                 false);
  f->ops->clear(f->queue, dx, (size_t)(count * c->hidden) * sizeof(float));
  f->ops->rmsnorm_back(f->queue, dx, s->dn, x, gain, c->rms_eps, count, c->hidden);
}

/* Fills dx, the gradient behind the last layer; returns the weighted loss. */
static double loss_back(flow *f) {
  acre_back_space *s = f->s;
  size_t row = (size_t)f->c->hidden * sizeof(float);
  int64_t count = rows_with_loss(f);
  double sum = 0.0;
  f->ops->clear(f->queue, s->dx, (size_t)f->rows * row);
  for (int64_t i = 0; i < count; i += BLOCK_ROWS) {
    head_back(f, i, acre_min(BLOCK_ROWS, count - i));
  }
  f->ops->scatter_rows(f->queue, s->dx, s->l1_dn, s->index, count, row);
  f->ops->download(f->queue, s->host_losses, s->losses, (size_t)count * sizeof(float));
  for (int64_t i = 0; i < count; ++i) {
    sum += (double)s->host_weights[i] * (double)s->host_losses[i];
  }
  return sum;
}

/* ---------------------------------------------------------------- the MLP */

/* Rows [first, first + rows): dx from behind the layer to before the MLP, and dout. */
static void mlp_back(flow *f, int64_t layer, int64_t first, int64_t rows) {
  acre_back_space *s = f->s;
  const acre_model_config *c = f->c;
  const acre_layer *weights = &f->model->layers[layer];
  const acre_reverse_layer *back = &f->reverse->layers[layer];
  const float *gain = floats(weights->attention_norm);
  float *dx = s->dx + first * c->hidden;
  acre_span before = {acre_tape_x(f->pass->tape, layer) + first * c->hidden, 0, rows};
  f->ops->copy_rows(f->queue, s->mid, &before, 1, (size_t)c->hidden * sizeof(float));
  f->ops->matmul(f->queue, s->mid, c->hidden,
                 typed_row(f, acre_tape_attended(f->pass->tape, layer), first, f->q),
                 weights->out, NULL, rows, true);
  f->ops->rmsnorm(f->queue, s->normed, s->mid, gain, c->rms_eps, rows, c->hidden, c->dtype);
  f->ops->matmul(f->queue, s->gate, c->ffn, s->normed, weights->gate, NULL, rows, false);
  f->ops->matmul(f->queue, s->up, c->ffn, s->normed, weights->up, NULL, rows, false);
  through(f, s->dh, back->down, dx, rows, c->hidden, c->ffn);
  f->ops->swiglu_back(f->queue, s->dgate, s->dup, s->gate, s->up, s->dh, rows, c->ffn,
                      c->dtype);
  f->ops->matmul(f->queue, s->dn, c->hidden, s->dgate, back->gate, NULL, rows, false);
  f->ops->matmul(f->queue, s->dn, c->hidden, s->dup, back->up, NULL, rows, true);
  f->ops->rmsnorm_back(f->queue, dx, s->dn, s->mid, gain, c->rms_eps, rows, c->hidden);
  through(f, s->dout + first * f->q, back->out, dx, rows, c->hidden, f->q);
}

/* ---------------------------------------------------------------- attention */

static void rotate_back(flow *f, float *x, int64_t stride, int64_t position, int64_t rows,
                        int64_t heads) {
  f->ops->rope(f->queue, x, stride, floats(f->model->cos), floats(f->reverse->sin),
               position, rows, heads, f->c->head_dim);
}

static float *kv_row(const flow *f, float *base, const acre_kv_gradients *kv, int64_t layer,
                     int64_t row) {
  return base + (layer * kv->rows + row) * f->kv;
}

/* What this pass asks of the prefix: L1 entries as rotated, the others of their raw keys. */
static void give_to_prefix(flow *f, int64_t layer) {
  const acre_back_pass *pass = f->pass;
  acre_back_space *s = f->s;
  if (pass->m) {
    f->ops->add_rows(f->queue, kv_row(f, pass->l1->keys, pass->l1, layer, 0), f->kv, s->dk,
                     f->kv, NULL, pass->m, f->kv);
    f->ops->add_rows(f->queue, kv_row(f, pass->l1->values, pass->l1, layer, 0), f->kv,
                     s->dv, f->kv, NULL, pass->m, f->kv);
  }
  rotate_back(f, s->dk + pass->m * f->kv, f->kv, pass->m, f->seen - pass->m,
              f->c->kv_heads);
  for (int64_t i = 0; i < pass->origin_count; ++i) {
    const acre_origin *o = &pass->origins[i];
    f->ops->add_rows(f->queue, kv_row(f, o->kv->keys, o->kv, layer, o->row), f->kv,
                     s->dk + o->prefix_row * f->kv, f->kv, NULL, o->rows, f->kv);
    f->ops->add_rows(f->queue, kv_row(f, o->kv->values, o->kv, layer, o->row), f->kv,
                     s->dv + o->prefix_row * f->kv, f->kv, NULL, o->rows, f->kv);
  }
}

/* What later passes ask of this one's keys and values, added to dqkv. */
static void take_from_later(flow *f, int64_t layer) {
  const acre_back_pass *pass = f->pass;
  float *dk = f->s->dqkv + f->q, *dv = dk + f->kv;
  if (pass->own && pass->own->buffer) {
    f->ops->add_rows(f->queue, dk, f->qkv, kv_row(f, pass->own->keys, pass->own, layer, 0),
                     f->kv, NULL, f->rows, f->kv);
    f->ops->add_rows(f->queue, dv, f->qkv,
                     kv_row(f, pass->own->values, pass->own, layer, 0), f->kv, NULL,
                     f->rows, f->kv);
  }
  if (!pass->joined) return;
  float *keys = kv_row(f, pass->l1->keys, pass->l1, layer, pass->m);
  rotate_back(f, keys, f->kv, pass->m, pass->joined, f->c->kv_heads);
  f->ops->add_rows(f->queue, dk, f->qkv, keys, f->kv, f->s->index, pass->joined, f->kv);
  f->ops->add_rows(f->queue, dv, f->qkv,
                   kv_row(f, pass->l1->values, pass->l1, layer, pass->m), f->kv,
                   f->s->index, pass->joined, f->kv);
}

static void evidence_back(flow *f, int64_t layer, const acre_keys *prefix) {
  const acre_evidence *e = f->pass->evidence;
  if (!e) return;
  f->ops->score_back(f->queue, f->s->dqkv + e->first * f->qkv, f->qkv, f->s->dk, e->pull,
                     typed_row(f, acre_tape_q(f->pass->tape, layer), e->first, f->q),
                     prefix->rotated, e->heads + layer * f->c->heads, e->count, e->m,
                     &f->model->heads);
}

/* From dout to dqkv, before RoPE, with all that later passes ask. */
static void attention_back(flow *f, int64_t layer) {
  const acre_tape *tape = f->pass->tape;
  acre_back_space *s = f->s;
  acre_keys own = acre_timeline_keys(&tape->own, layer, f->rows), prefix = {0};
  if (f->seen) prefix = acre_timeline_keys(f->pass->prefix, layer, f->seen);
  f->ops->attend_back(f->queue, s->dqkv, s->dk, s->dv, s->parts, s->dout,
                      acre_tape_attended(tape, layer), acre_tape_lse(tape, layer),
                      acre_tape_q(tape, layer), f->seen ? &prefix : NULL, &own, f->rows,
                      &f->model->heads);
  evidence_back(f, layer, &prefix);
  if (f->seen) give_to_prefix(f, layer);
  rotate_back(f, s->dqkv, f->qkv, f->seen, f->rows, f->c->heads + f->c->kv_heads);
  take_from_later(f, layer);
}

/* ---------------------------------------------------------------- projections */

/* L1 rows: their parameters' gradients, and their rows of dn, whose weights are others. */
static void l1_back(flow *f, int64_t layer) {
  acre_back_space *s = f->s;
  const acre_model_config *c = f->c;
  int64_t count = f->pass->l1_count;
  if (!count) return;
  f->ops->gather_rows(f->queue, s->l1_x, acre_tape_x(f->pass->tape, layer), s->index, count,
                      (size_t)c->hidden * sizeof(float));
  f->ops->gather_rows(f->queue, s->l1_dqkv, s->dqkv, s->index, count,
                      (size_t)f->qkv * sizeof(float));
  f->ops->rmsnorm(f->queue, s->normed, s->l1_x, floats(f->model->layers[layer].input_norm),
                  c->rms_eps, count, c->hidden, c->dtype);
  f->ops->matmul_back(f->queue, f->gradients->weights[layer], s->l1_dqkv, f->qkv, s->normed,
                      count, f->qkv, c->hidden, c->dtype);
  if (f->gradients->bias) {
    f->ops->add_rows(f->queue, f->gradients->bias[layer], f->qkv, s->l1_dqkv, f->qkv,
                     s->zeros, count, f->qkv);
  }
  through(f, s->l1_dn, f->reverse->layers[layer].l1_qkv, s->l1_dqkv, count, f->qkv,
          c->hidden);
  f->ops->scatter_rows(f->queue, s->dn, s->l1_dn, s->index, count,
                       (size_t)c->hidden * sizeof(float));
}

static void layer_back(flow *f, int64_t layer) {
  acre_back_space *s = f->s;
  const acre_model_config *c = f->c;
  for (int64_t i = 0; i < f->rows; i += BLOCK_ROWS) {
    mlp_back(f, layer, i, acre_min(BLOCK_ROWS, f->rows - i));
  }
  attention_back(f, layer);
  through(f, s->dn, f->reverse->layers[layer].qkv, s->dqkv, f->rows, f->qkv, c->hidden);
  l1_back(f, layer);
  f->ops->rmsnorm_back(f->queue, s->dx, s->dn, acre_tape_x(f->pass->tape, layer),
                       floats(f->model->layers[layer].input_norm), c->rms_eps, f->rows,
                       c->hidden);
}

double acre_backward(const acre_model *model, const acre_reverse *reverse,
                     acre_workspace *workspace, acre_back_space *space,
                     const acre_back_pass *pass, const acre_l1_gradients *gradients) {
  const acre_model_config *c = &model->config;
  flow f = {.model = model,
            .c = c,
            .ops = model->backend->ops,
            .reverse = reverse,
            .queue = workspace->queue,
            .s = space,
            .pass = pass,
            .gradients = gradients,
            .rows = pass->tape->rows,
            .seen = pass->prefix ? pass->prefix->count : 0,
            .q = c->heads * c->head_dim,
            .kv = c->kv_heads * c->head_dim,
            .qkv = acre_model_qkv_width(model)};
  double loss = loss_back(&f);
  f.ops->clear(f.queue, space->zeros, (size_t)f.rows * sizeof(int32_t));
  f.ops->upload(f.queue, space->index, pass->l1_rows,
                (size_t)pass->l1_count * sizeof(int32_t));
  for (int64_t layer = c->layers; layer-- > 0;) layer_back(&f, layer);
  f.ops->gather_rows(f.queue, space->l1_x, space->dx, space->index, pass->l1_count,
                     (size_t)c->hidden * sizeof(float));
  f.ops->add_rows(f.queue, gradients->embedding, c->hidden, space->l1_x, c->hidden,
                  space->zeros, pass->l1_count, c->hidden);
  return loss;
}
