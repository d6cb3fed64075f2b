/* The trainer: L1 parameters, their gradients and moments, and the example under way.
 *
 * Master parameters are float32; the model that examples run through is a fork that holds them
 * in T. Everything lies on the device in vectors of one layout: the embedding row, then per
 * layer the joint q, k, v matrix and, where the model has biases, the joint bias. */
#include "sweep.h"

#include "platform.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

enum { VECTORS = ACRE_SECOND_MOMENTS + 1 };

struct acre_trainer {
  atomic_flag busy;
  acre_model *model; /* the fork */
  acre_queue *queue;
  acre_peers *peers; /* that gradients are summed with; NULL: none */
  bool waiting;      /* for them: the queue is theirs */
  acre_reverse reverse;
  int64_t size, layer_size; /* numbers: of a vector, of one layer in it */
  acre_buffer *vectors[VECTORS];
  acre_l1_gradients gradients; /* where they lie in their vector */
  acre_workspace workspace;    /* as large as the largest example so far */
  acre_back_space space;
  acre_tape_shelf shelf;
  acre_sweep sweep;
};

static acre_status hold(acre_trainer *t, acre_error *error) {
  if (!atomic_flag_test_and_set(&t->busy)) return ACRE_OK;
  return acre_fail(error, ACRE_BUSY, "trainer: in use on another thread");
}

static acre_status leave(acre_trainer *t, acre_status status) {
  atomic_flag_clear(&t->busy);
  return status;
}

static acre_status enter(acre_trainer *t, acre_error *error) {
  ACRE_TRY(hold(t, error));
  if (!t->waiting) return ACRE_OK;
  return leave(t, acre_fail(error, ACRE_BAD_STATE,
                            "trainer: it waits for its peers; wait or leave first"));
}

/* ---------------------------------------------------------------- layout of a vector */

static int64_t weights_offset(const acre_trainer *t, int64_t layer) {
  return t->model->config.hidden + layer * t->layer_size;
}

static int64_t bias_offset(const acre_trainer *t, int64_t layer) {
  return weights_offset(t, layer) +
         acre_model_qkv_width(t->model) * t->model->config.hidden;
}

static float *vector_at(const acre_trainer *t, int part, int64_t offset) {
  return (float *)acre_buffer_data(t->vectors[part]) + offset;
}

static int64_t entries_per_layer(const acre_trainer *t) {
  return acre_model_has_bias(t->model) ? 6 : 3;
}

int64_t acre_trainer_size(const acre_trainer *t) { return t->size; }

int64_t acre_trainer_entries(const acre_trainer *t) {
  return 1 + t->model->config.layers * entries_per_layer(t);
}

acre_status acre_trainer_entry_at(acre_trainer_entry *out, const acre_trainer *t,
                                  int64_t index, acre_error *error) {
  const acre_model_config *c = &t->model->config;
  int64_t q = c->heads * c->head_dim, kv = c->kv_heads * c->head_dim;
  const int64_t rows[3] = {q, kv, kv}, before[3] = {0, q, q + kv};
  if (index < 0 || index >= acre_trainer_entries(t)) {
    return acre_fail(error, ACRE_BAD_VALUE, "entry: got %lld, there are %lld",
                     (long long)index, (long long)acre_trainer_entries(t));
  }
  *out = (acre_trainer_entry){.rows = 1, .columns = c->hidden};
  snprintf(out->name, sizeof out->name, "model.acre_embed_tokens.weight");
  if (!index) return ACRE_OK;
  int64_t layer = (index - 1) / entries_per_layer(t);
  int kind = (int)((index - 1) % entries_per_layer(t)), part = kind % 3;
  bool bias = kind >= 3;
  snprintf(out->name, sizeof out->name, "model.layers.%lld.self_attn.acre_%c_proj.%s",
           (long long)layer, "qkv"[part], bias ? "bias" : "weight");
  out->rows = bias ? 0 : rows[part];
  out->columns = bias ? rows[part] : c->hidden;
  out->offset = bias ? bias_offset(t, layer) + before[part]
                     : weights_offset(t, layer) + before[part] * c->hidden;
  return ACRE_OK;
}

/* ---------------------------------------------------------------- parameters */

/* The fork takes over the master parameters. */
static acre_status apply(acre_trainer *t, acre_error *error) {
  const acre_backend_ops *ops = t->model->backend->ops;
  const acre_model_config *c = &t->model->config;
  int64_t width = acre_model_qkv_width(t->model);
  ops->round(t->queue, acre_buffer_data(t->model->l1_embedding), c->hidden,
             vector_at(t, ACRE_PARAMETERS, 0), c->hidden, 1, c->hidden, c->dtype);
  for (int64_t i = 0; i < c->layers; ++i) {
    acre_layer *layer = &t->model->layers[i];
    ops->matrix_set(t->queue, layer->l1_qkv, 0,
                    vector_at(t, ACRE_PARAMETERS, weights_offset(t, i)), width);
    if (!layer->l1_bias) continue;
    ops->round(t->queue, acre_buffer_data(layer->l1_bias), width,
               vector_at(t, ACRE_PARAMETERS, bias_offset(t, i)), width, 1, width, ACRE_F32);
  }
  return acre_reverse_l1(&t->reverse, t->model, t->queue, error);
}

/* The master parameters as the fork has them at first. */
static acre_status take_initial(acre_trainer *t, acre_error *error) {
  const acre_backend_ops *ops = t->model->backend->ops;
  const acre_model_config *c = &t->model->config;
  int64_t width = acre_model_qkv_width(t->model);
  int32_t l1_id = (int32_t)c->vocab_size;
  acre_buffer *id;
  ACRE_TRY(ops->alloc(t->model->backend, &id, sizeof l1_id, error));
  ops->upload(t->queue, acre_buffer_data(id), &l1_id, sizeof l1_id);
  ops->embed(t->queue, vector_at(t, ACRE_PARAMETERS, 0), acre_buffer_data(id),
             acre_buffer_data(t->model->embedding),
             acre_buffer_data(t->model->l1_embedding), 1, c->vocab_size, c->hidden,
             c->dtype);
  for (int64_t i = 0; i < c->layers; ++i) {
    const acre_layer *layer = &t->model->layers[i];
    ops->matrix_get(t->queue, vector_at(t, ACRE_PARAMETERS, weights_offset(t, i)),
                    layer->l1_qkv, 0, width);
    if (!layer->l1_bias) continue;
    ops->round(t->queue, vector_at(t, ACRE_PARAMETERS, bias_offset(t, i)), width,
               acre_buffer_data(layer->l1_bias), width, 1, width, ACRE_F32);
  }
  acre_status status = ops->sync(t->queue, error);
  acre_buffer_release(id);
  return status;
}

acre_status acre_trainer_read(float *out, acre_trainer *t, acre_trainer_part part,
                              acre_error *error) {
  ACRE_TRY(enter(t, error));
  t->model->backend->ops->download(t->queue, out, vector_at(t, (int)part, 0),
                                   (size_t)t->size * sizeof *out);
  return leave(t, t->model->backend->ops->sync(t->queue, error));
}

static acre_status check_values(const acre_trainer *t, acre_trainer_part part,
                                const float *values, acre_error *error) {
  bool typed = part == ACRE_PARAMETERS && t->model->config.dtype == ACRE_BF16;
  double limit = typed ? 0x1.ffp127 : 0x1.fffffep127; /* above it: infinity in T */
  for (int64_t i = 0; i < t->size; ++i) {
    if (fabs((double)values[i]) < limit) continue;
    return acre_fail(error, ACRE_BAD_VALUE,
                     "values[%lld]: got %g, expected a finite number", (long long)i,
                     (double)values[i]);
  }
  return ACRE_OK;
}

acre_status acre_trainer_write(acre_trainer *t, acre_trainer_part part, const float *values,
                               acre_error *error) {
  ACRE_TRY(check_values(t, part, values, error));
  ACRE_TRY(enter(t, error));
  t->model->backend->ops->upload(t->queue, vector_at(t, (int)part, 0), values,
                                 (size_t)t->size * sizeof *values);
  if (part == ACRE_PARAMETERS) return leave(t, apply(t, error));
  return leave(t, t->model->backend->ops->sync(t->queue, error));
}

/* ---------------------------------------------------------------- an example */

acre_example acre_example_default(void) {
  return (acre_example){
      .struct_size = sizeof(acre_example), .window = 4096, .stride = 2048};
}

static acre_status check_memory(const acre_trainer *t, acre_error *error) {
  const acre_sweep *s = &t->sweep;
  acre_backend *backend = t->model->backend;
  size_t available = backend->ops->available(backend), needed = acre_sweep_bytes(s);
  if (s->longest > t->workspace.rows) needed += acre_workspace_bytes(t->model, s->longest);
  if (s->gradients && (s->longest > t->space.rows || s->seen > t->space.prefix)) {
    needed += acre_back_space_bytes(t->model, s->longest, s->seen);
  }
  needed -= (size_t)acre_min((int64_t)needed,
                             (int64_t)acre_tape_shelf_bytes(&t->shelf, t->model));
  if (!available || needed <= available) return ACRE_OK;
  return acre_fail(error, ACRE_NO_MEMORY,
                   "example: %lld rows need %zu bytes, %zu are available",
                   (long long)s->result.rows, needed, available);
}

/* Workspaces large enough for the sweep. */
static acre_status open_space(acre_trainer *t, acre_error *error) {
  const acre_sweep *s = &t->sweep;
  ACRE_TRY(check_memory(t, error));
  if (s->longest > t->workspace.rows) {
    acre_workspace_close(&t->workspace, t->model);
    ACRE_TRY(acre_workspace_open(&t->workspace, t->model, s->longest, error));
  }
  if (!s->gradients || (s->longest <= t->space.rows && s->seen <= t->space.prefix)) {
    return ACRE_OK;
  }
  int64_t rows = acre_max(s->longest, t->space.rows);
  int64_t prefix = acre_max(s->seen, t->space.prefix);
  acre_back_space_close(&t->space);
  return acre_back_space_open(&t->space, t->model, rows, prefix, error);
}

acre_status acre_trainer_begin(acre_trainer *t, const acre_example *given, bool gradients,
                               acre_error *error) {
  acre_example example;
  ACRE_TAKE_OPTIONS(example, acre_example_default(), given);
  ACRE_TRY(enter(t, error));
  acre_sweep_close(&t->sweep);
  acre_status status =
      acre_sweep_open(&t->sweep, t->model, &t->shelf, &example, gradients, error);
  if (status == ACRE_OK) status = open_space(t, error);
  if (status != ACRE_OK) acre_sweep_close(&t->sweep);
  return leave(t, status);
}

static acre_status under_way(const acre_trainer *t, acre_error *error) {
  if (t->sweep.passes) return ACRE_OK;
  return acre_fail(error, ACRE_BAD_STATE, "trainer: no example is under way");
}

acre_status acre_trainer_step(acre_trainer *t, int64_t *done, int64_t *total,
                              acre_error *error) {
  ACRE_TRY(enter(t, error));
  acre_status status = under_way(t, error);
  if (status == ACRE_OK) {
    status = acre_sweep_step(&t->sweep, &t->reverse, &t->workspace, &t->space,
                             &t->gradients, error);
    *done = t->sweep.done;
    *total = acre_sweep_steps(&t->sweep);
  }
  return leave(t, status);
}

acre_status acre_trainer_result(acre_example_result *out, acre_trainer *t,
                                acre_error *error) {
  ACRE_TRY(enter(t, error));
  acre_status status = under_way(t, error);
  if (status == ACRE_OK && t->sweep.done < acre_sweep_steps(&t->sweep)) {
    status = acre_fail(error, ACRE_BAD_STATE, "trainer: the example is not through");
  }
  if (status == ACRE_OK) *out = t->sweep.result;
  return leave(t, status);
}

/* ---------------------------------------------------------------- the optimiser */

acre_adamw acre_adamw_default(void) {
  return (acre_adamw){sizeof(acre_adamw), 1, 1e-4, 0.9, 0.95, 1e-8, 0.0};
}

static acre_status check_adamw(const acre_adamw *a, double divisor, double clip,
                               acre_error *error) {
  const struct {
    const char *name;
    double value, low, high;
  } limits[] = {
      {"step", (double)a->step, 1, 1e15},  {"lr", a->lr, 0, 1e3},
      {"beta1", a->beta1, 0, 1 - 1e-9},    {"beta2", a->beta2, 0, 1 - 1e-9},
      {"eps", a->eps, 1e-30, 1},           {"weight_decay", a->weight_decay, 0, 1e3},
      {"divisor", divisor, 1e-300, 1e300}, {"clip", clip, 0, 1e30}};
  for (int i = 0; i < ACRE_COUNT(limits); ++i) {
    if (limits[i].value >= limits[i].low && limits[i].value <= limits[i].high) continue;
    return acre_fail(error, ACRE_BAD_VALUE, "%s: got %g, expected %g to %g", limits[i].name,
                     limits[i].value, limits[i].low, limits[i].high);
  }
  return ACRE_OK;
}

static acre_status update(acre_trainer *t, const acre_adamw *adamw, double divisor,
                          double clip, double *norm, acre_error *error) {
  const acre_backend_ops *ops = t->model->backend->ops;
  double squares;
  ops->sum_squares(t->queue, &squares, vector_at(t, ACRE_GRADIENTS, 0), t->size);
  *norm = sqrt(squares) / divisor;
  if (!isfinite(*norm)) {
    return acre_fail(error, ACRE_BAD_VALUE, "update: the gradients' norm is %g", *norm);
  }
  double scale = clip > 0 && *norm > clip ? clip / *norm : 1.0;
  ops->adamw(t->queue, vector_at(t, ACRE_PARAMETERS, 0),
             vector_at(t, ACRE_FIRST_MOMENTS, 0), vector_at(t, ACRE_SECOND_MOMENTS, 0),
             vector_at(t, ACRE_GRADIENTS, 0), t->size, (float)(scale / divisor), adamw);
  ops->clear(t->queue, vector_at(t, ACRE_GRADIENTS, 0), (size_t)t->size * sizeof(float));
  return apply(t, error);
}

acre_status acre_trainer_update(acre_trainer *t, const acre_adamw *given, double divisor,
                                double clip, double *norm, acre_error *error) {
  acre_adamw adamw;
  ACRE_TAKE_OPTIONS(adamw, acre_adamw_default(), given);
  ACRE_TRY(check_adamw(&adamw, divisor, clip, error));
  ACRE_TRY(enter(t, error));
  return leave(t, update(t, &adamw, divisor, clip, norm, error));
}

acre_status acre_trainer_clear(acre_trainer *t, acre_error *error) {
  const acre_backend_ops *ops = t->model->backend->ops;
  ACRE_TRY(enter(t, error));
  ops->clear(t->queue, vector_at(t, ACRE_GRADIENTS, 0), (size_t)t->size * sizeof(float));
  return leave(t, ops->sync(t->queue, error));
}

/* ---------------------------------------------------------------- peers */

static void part(acre_trainer *t) {
  if (t->peers) t->model->backend->ops->peers_close(t->peers);
  t->peers = NULL;
  t->waiting = false;
}

static acre_status check_device(const acre_trainer *t, acre_error *error) {
  const acre_backend_ops *ops = t->model->backend->ops;
  if (ops->peers_invite) return ACRE_OK;
  return acre_fail(error, ACRE_UNSUPPORTED,
                   "device: '%s' has no sums over processes of its own", ops->name);
}

acre_status acre_trainer_invite(uint8_t *id, acre_trainer *t, acre_error *error) {
  ACRE_TRY(check_device(t, error));
  ACRE_TRY(enter(t, error));
  return leave(t, t->model->backend->ops->peers_invite(t->model->backend, id, error));
}

static acre_status join(acre_trainer *t, int64_t rank, int64_t world, const uint8_t *id,
                        acre_error *error) {
  if (t->peers) return acre_fail(error, ACRE_BAD_STATE, "trainer: it has joined already");
  ACRE_TRY(t->model->backend->ops->peers_open(t->queue, &t->peers, rank, world, id, error));
  t->waiting = true;
  return ACRE_OK;
}

acre_status acre_trainer_join(acre_trainer *t, int64_t rank, int64_t world,
                              const uint8_t *id, acre_error *error) {
  if (world < 1 || world > INT32_MAX) {
    return acre_fail(error, ACRE_BAD_VALUE, "world: got %lld, expected 1 to %d",
                     (long long)world, INT32_MAX);
  }
  if (rank < 0 || rank >= world) {
    return acre_fail(error, ACRE_BAD_VALUE, "rank: got %lld, expected 0 to %lld",
                     (long long)rank, (long long)world - 1);
  }
  ACRE_TRY(check_device(t, error));
  ACRE_TRY(enter(t, error));
  return leave(t, join(t, rank, world, id, error));
}

static acre_status share(acre_trainer *t, acre_error *error) {
  if (!t->peers) return acre_fail(error, ACRE_BAD_STATE, "trainer: it has joined no peers");
  t->model->backend->ops->peers_sum(t->peers, vector_at(t, ACRE_GRADIENTS, 0), t->size);
  t->waiting = true;
  return ACRE_OK;
}

acre_status acre_trainer_share(acre_trainer *t, acre_error *error) {
  ACRE_TRY(enter(t, error));
  return leave(t, share(t, error));
}

static acre_status wait_for(acre_trainer *t, bool *done, double seconds,
                            acre_error *error) {
  if (!t->waiting) {
    return acre_fail(error, ACRE_BAD_STATE, "trainer: it does not wait for peers");
  }
  acre_status status = t->model->backend->ops->peers_wait(t->peers, done, seconds, error);
  if (status != ACRE_OK) part(t);
  if (status == ACRE_OK && *done) t->waiting = false;
  return status;
}

acre_status acre_trainer_wait(bool *done, acre_trainer *t, double seconds,
                              acre_error *error) {
  *done = false;
  if (!(seconds >= 0 && seconds <= 1e6)) {
    return acre_fail(error, ACRE_BAD_VALUE, "seconds: got %g, expected 0 to 1e6", seconds);
  }
  ACRE_TRY(hold(t, error));
  return leave(t, wait_for(t, done, seconds, error));
}

acre_status acre_trainer_leave(acre_trainer *t, acre_error *error) {
  ACRE_TRY(hold(t, error));
  part(t);
  return leave(t, ACRE_OK);
}

/* ---------------------------------------------------------------- life */

static acre_status open_vectors(acre_trainer *t, acre_error *error) {
  const acre_backend_ops *ops = t->model->backend->ops;
  const acre_model_config *c = &t->model->config;
  int64_t width = acre_model_qkv_width(t->model), layers = c->layers;
  bool bias = acre_model_has_bias(t->model);
  t->layer_size = width * (c->hidden + bias);
  t->size = c->hidden + layers * t->layer_size;
  for (int i = 0; i < VECTORS; ++i) {
    ACRE_TRY(ops->alloc(t->model->backend, &t->vectors[i], (size_t)t->size * sizeof(float),
                        error));
  }
  t->gradients.weights = acre_alloc((size_t)layers * sizeof *t->gradients.weights);
  t->gradients.bias = bias ? acre_alloc((size_t)layers * sizeof *t->gradients.bias) : NULL;
  if (!t->gradients.weights || (bias && !t->gradients.bias)) {
    return acre_fail(error, ACRE_NO_MEMORY, "trainer: out of memory");
  }
  t->gradients.embedding = vector_at(t, ACRE_GRADIENTS, 0);
  for (int64_t i = 0; i < layers; ++i) {
    t->gradients.weights[i] = vector_at(t, ACRE_GRADIENTS, weights_offset(t, i));
    if (bias) t->gradients.bias[i] = vector_at(t, ACRE_GRADIENTS, bias_offset(t, i));
  }
  return ACRE_OK;
}

static acre_status open_trainer(acre_trainer *t, acre_model *model, acre_error *error) {
  ACRE_TRY(acre_model_fork(&t->model, model, error));
  ACRE_TRY(model->backend->ops->queue_open(model->backend, &t->queue, error));
  ACRE_TRY(acre_reverse_open(&t->reverse, t->model, t->queue, error));
  ACRE_TRY(open_vectors(t, error));
  return take_initial(t, error);
}

acre_status acre_trainer_open(acre_trainer **out, acre_model *model, acre_error *error) {
  *out = NULL;
  if (!model->ready) return acre_fail(error, ACRE_BAD_STATE, "model: not ready");
  acre_trainer *t = acre_alloc_zero(sizeof *t);
  if (!t) return acre_fail(error, ACRE_NO_MEMORY, "trainer: out of memory");
  atomic_flag_clear(&t->busy);
  acre_status status = open_trainer(t, model, error);
  if (status != ACRE_OK) {
    acre_trainer_release(t);
    return status;
  }
  *out = t;
  return ACRE_OK;
}

void acre_trainer_release(acre_trainer *t) {
  if (!t) return;
  if (t->model) {
    part(t);
    acre_sweep_close(&t->sweep);
    acre_tape_shelf_close(&t->shelf);
    acre_back_space_close(&t->space);
    acre_workspace_close(&t->workspace, t->model);
    acre_reverse_close(&t->reverse, t->model);
    if (t->queue) t->model->backend->ops->queue_close(t->queue);
    for (int i = 0; i < VECTORS; ++i) acre_buffer_release(t->vectors[i]);
    acre_model_release(t->model);
  }
  acre_free(t->gradients.weights);
  acre_free(t->gradients.bias);
  acre_free(t);
}
