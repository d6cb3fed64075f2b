#include "model.h"

#include "platform.h"
#include "rope.h"
#include "tensor.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

/* ---------------------------------------------------------------- configuration */

acre_model_config acre_model_config_default(void) {
  acre_model_config config = {
      .struct_size = sizeof config, .rms_eps = 1e-5, .dtype = ACRE_BF16, .eos_id = -1};
  config.rope = (acre_rope_config){.theta = 10000,
                                   .factor = 1,
                                   .low_freq_factor = 1,
                                   .high_freq_factor = 4,
                                   .beta_fast = 32,
                                   .beta_slow = 1,
                                   .truncate = true};
  return config;
}

static acre_status check_range(const char *name, int64_t value, int64_t low, int64_t high,
                               acre_error *error) {
  if (value >= low && value <= high) return ACRE_OK;
  return acre_fail(error, ACRE_BAD_VALUE, "config %s: got %lld, expected %lld to %lld",
                   name, (long long)value, (long long)low, (long long)high);
}

static acre_status check_config(const acre_model_config *c, acre_error *error) {
  /* The limits keep every product below 2^63 and every token id in an int32. */
  ACRE_TRY(check_range("vocab_size", c->vocab_size, 1, INT32_MAX - 1, error));
  ACRE_TRY(check_range("hidden", c->hidden, 1, 1 << 20, error));
  ACRE_TRY(check_range("layers", c->layers, 1, 4096, error));
  ACRE_TRY(check_range("heads", c->heads, 1, 4096, error));
  ACRE_TRY(check_range("kv_heads", c->kv_heads, 1, c->heads, error));
  ACRE_TRY(check_range("head_dim", c->head_dim, 2, 512, error));
  ACRE_TRY(check_range("ffn", c->ffn, 1, 1 << 22, error));
  ACRE_TRY(check_range("w_max", c->w_max, 1, 1 << 26, error));
  ACRE_TRY(check_range("eos_id", c->eos_id, -1, c->vocab_size - 1, error));
  if (c->heads % c->kv_heads) {
    return acre_fail(error, ACRE_BAD_VALUE,
                     "config: heads %lld is no multiple of kv_heads %lld",
                     (long long)c->heads, (long long)c->kv_heads);
  }
  if (c->head_dim % 2 || (c->rope.kind == ACRE_ROPE_DYNAMIC && c->head_dim < 4)) {
    return acre_fail(error, ACRE_BAD_VALUE, "config head_dim: got %lld, expected even",
                     (long long)c->head_dim);
  }
  if (!(c->rms_eps > 0) || !isfinite(c->rms_eps)) {
    return acre_fail(error, ACRE_BAD_VALUE, "config rms_eps: got %g, expected > 0",
                     c->rms_eps);
  }
  if (c->dtype != ACRE_F32 && c->dtype != ACRE_BF16) {
    return acre_fail(error, ACRE_BAD_VALUE, "config dtype: got %s, expected f32 or bf16",
                     acre_dtype_name(c->dtype));
  }
  if (c->weights != ACRE_WEIGHTS_SAME &&
      !(c->weights == ACRE_WEIGHTS_Q8 && c->dtype == ACRE_BF16)) {
    return acre_fail(error, ACRE_BAD_VALUE, "config weights: q8 needs dtype bf16, got %s",
                     acre_dtype_name(c->dtype));
  }
  return acre_rope_check(&c->rope, error);
}

/* ---------------------------------------------------------------- the table of names */

typedef enum place { PLACE_VECTOR, PLACE_MATRIX, PLACE_TABLE } place;

/* One kind of tensor: where it goes and which shape it must have. Sizes are resolved from
 * the configuration by `slot_of`. */
typedef struct slot {
  const char *name;
  place place;
  int64_t rows; /* 0: one-dimensional */
  int64_t columns;
  int64_t offset; /* first row in a joint matrix, first element in a joint vector */
  acre_matrix **matrix;
  int64_t matrix_rows;
  acre_buffer **vector;
  int64_t vector_size;
} slot;

enum {
  INPUT_NORM,
  ATTENTION_NORM,
  Q,
  K,
  V,
  OUT,
  GATE,
  UP,
  DOWN,
  Q_BIAS,
  K_BIAS,
  V_BIAS,
  L1_Q,
  L1_K,
  L1_V,
  L1_Q_BIAS,
  L1_K_BIAS,
  L1_V_BIAS,
  LAYER_SLOTS
};
enum { EMBEDDING, NORM, HEAD, L1_EMBEDDING, MODEL_SLOTS };

static const char *const layer_names[LAYER_SLOTS] = {
    "input_layernorm.weight",       "post_attention_layernorm.weight",
    "self_attn.q_proj.weight",      "self_attn.k_proj.weight",
    "self_attn.v_proj.weight",      "self_attn.o_proj.weight",
    "mlp.gate_proj.weight",         "mlp.up_proj.weight",
    "mlp.down_proj.weight",         "self_attn.q_proj.bias",
    "self_attn.k_proj.bias",        "self_attn.v_proj.bias",
    "self_attn.acre_q_proj.weight", "self_attn.acre_k_proj.weight",
    "self_attn.acre_v_proj.weight", "self_attn.acre_q_proj.bias",
    "self_attn.acre_k_proj.bias",   "self_attn.acre_v_proj.bias"};
static const char *const model_names[MODEL_SLOTS] = {"model.embed_tokens.weight",
                                                     "model.norm.weight", "lm_head.weight",
                                                     "model.acre_embed_tokens.weight"};

#define BIT(i) (1u << (i))
#define REQUIRED (BIT(DOWN + 1) - 1) /* the norms and the base matrices */
#define BIASES (BIT(Q_BIAS) | BIT(K_BIAS) | BIT(V_BIAS))
#define L1_WEIGHTS (BIT(L1_Q) | BIT(L1_K) | BIT(L1_V))
#define L1_BIASES (BIT(L1_Q_BIAS) | BIT(L1_K_BIAS) | BIT(L1_V_BIAS))

static slot layer_slot(const acre_model *model, acre_layer *layer, int kind) {
  const acre_model_config *c = &model->config;
  int64_t q = c->heads * c->head_dim, kv = c->kv_heads * c->head_dim;
  int64_t qkv_rows[3] = {q, kv, kv}, qkv_offset[3] = {0, q, q + kv};
  slot s = {.name = layer_names[kind], .place = PLACE_MATRIX, .columns = c->hidden};
  switch (kind) {
    case INPUT_NORM:
      s.place = PLACE_VECTOR;
      s.vector = &layer->input_norm;
      break;
    case ATTENTION_NORM:
      s.place = PLACE_VECTOR;
      s.vector = &layer->attention_norm;
      break;
    case OUT:
      s.matrix = &layer->out;
      s.rows = c->hidden;
      s.columns = q;
      break;
    case GATE:
      s.matrix = &layer->gate;
      s.rows = c->ffn;
      break;
    case UP:
      s.matrix = &layer->up;
      s.rows = c->ffn;
      break;
    case DOWN:
      s.matrix = &layer->down;
      s.rows = c->hidden;
      s.columns = c->ffn;
      break;
    default: {
      int part = kind <= V ? kind - Q : (kind - Q_BIAS) % 3;
      bool l1 = kind >= L1_Q;
      s.rows = qkv_rows[part];
      s.offset = qkv_offset[part];
      s.matrix = l1 ? &layer->l1_qkv : &layer->qkv;
      if ((BIASES | L1_BIASES) & BIT(kind)) {
        s.place = PLACE_VECTOR;
        s.vector = l1 ? &layer->l1_bias : &layer->qkv_bias;
        s.columns = s.rows;
        s.rows = 0;
      }
    }
  }
  bool joint = s.matrix == &layer->qkv || s.matrix == &layer->l1_qkv;
  s.matrix_rows = joint ? q + 2 * kv : s.rows;
  s.vector_size = s.columns == c->hidden && !s.rows && kind < Q ? c->hidden : q + 2 * kv;
  return s;
}

static slot model_slot(acre_model *model, int kind) {
  const acre_model_config *c = &model->config;
  slot s = {.name = model_names[kind], .columns = c->hidden, .vector_size = c->hidden};
  switch (kind) {
    case EMBEDDING:
      s.place = PLACE_TABLE;
      s.rows = c->vocab_size;
      s.vector = &model->embedding;
      s.matrix = c->tied_head ? &model->head : NULL;
      break;
    case NORM:
      s.place = PLACE_VECTOR;
      s.vector = &model->norm;
      break;
    case HEAD:
      s.place = PLACE_MATRIX;
      s.rows = c->vocab_size;
      s.matrix = &model->head;
      break;
    default:
      s.place = PLACE_TABLE;
      s.rows = 1;
      s.vector = &model->l1_embedding;
  }
  s.matrix_rows = s.rows;
  return s;
}

/* Finds the slot of `name`; *bound is the mask and *bit its bit. */
static acre_status find_slot(slot *out, uint32_t **bound, uint32_t *bit, acre_model *model,
                             const char *name, acre_error *error) {
  for (int kind = 0; kind < MODEL_SLOTS; ++kind) {
    if (strcmp(name, model_names[kind]) != 0) continue;
    if (kind == HEAD && model->config.tied_head) break;
    *out = model_slot(model, kind);
    *bound = &model->bound;
    *bit = BIT(kind);
    return ACRE_OK;
  }
  long long index = -1;
  int used = 0;
  if (sscanf(name, "model.layers.%9lld.%n", &index, &used) == 1 && used) {
    if (index < 0 || index >= model->config.layers) {
      return acre_fail(error, ACRE_BAD_VALUE,
                       "name: '%.100s', but the model has %lld layers", name,
                       (long long)model->config.layers);
    }
    acre_layer *layer = &model->layers[index];
    for (int kind = 0; kind < LAYER_SLOTS; ++kind) {
      if (strcmp(name + used, layer_names[kind]) != 0) continue;
      *out = layer_slot(model, layer, kind);
      *bound = &layer->bound;
      *bit = BIT(kind);
      return ACRE_OK;
    }
  }
  return acre_fail(error, ACRE_BAD_VALUE, "name: '%.100s' is no tensor of this model%s",
                   name, strcmp(name, "lm_head.weight") == 0 ? " (its head is tied)" : "");
}

/* ---------------------------------------------------------------- binding */

static acre_status need_buffer(acre_model *model, acre_buffer **buffer, size_t bytes,
                               acre_error *error) {
  if (*buffer) return ACRE_OK;
  return model->backend->ops->alloc(model->backend, buffer, bytes, error);
}

static acre_status fill_matrix(acre_model *model, const slot *s, const acre_array *array,
                               bool *finite, acre_error *error) {
  const acre_backend_ops *ops = model->backend->ops;
  if (!*s->matrix) {
    ACRE_TRY(ops->matrix_create(model->backend, s->matrix, s->matrix_rows, s->columns,
                                model->config.dtype, model->config.weights, error));
  }
  ops->matrix_fill(*s->matrix, s->offset, array, finite);
  return array->on_device ? ops->sync(model->queue, error) : ACRE_OK;
}

/* Vectors are kept in float32, tables in T. */
static acre_status fill_rows(acre_model *model, const slot *s, const acre_array *array,
                             bool *finite, acre_error *error) {
  acre_dtype dtype = s->place == PLACE_TABLE ? model->config.dtype : ACRE_F32;
  int64_t rows = s->place == PLACE_TABLE ? s->rows : 1;
  int64_t size = s->place == PLACE_TABLE ? rows * s->columns : s->vector_size;
  size_t unit = acre_dtype_size(dtype);
  ACRE_TRY(need_buffer(model, s->vector, (size_t)size * unit, error));
  char *data = acre_buffer_data(*s->vector);
  if (array->on_device && model->backend->apart) {
    model->backend->ops->store_array(model->backend, data + (size_t)s->offset * unit, dtype,
                                     array, finite);
    return model->backend->ops->sync(model->queue, error);
  }
  float *row = acre_alloc((size_t)s->columns * (sizeof *row + unit));
  if (!row) return acre_fail(error, ACRE_NO_MEMORY, "%s: out of memory", s->name);
  void *packed = row + s->columns;
  for (int64_t i = 0; i < rows; ++i) {
    acre_array_row(row, array, i);
    *finite &= acre_store_row(packed, dtype, row, s->columns);
    size_t at = (size_t)(s->offset + i * s->columns) * unit;
    model->backend->ops->upload(model->queue, data + at, packed, (size_t)s->columns * unit);
  }
  acre_free(row);
  return ACRE_OK;
}

acre_status acre_model_bind(acre_model *model, const char *name, const acre_array *array,
                            acre_error *error) {
  slot s = {0};
  uint32_t *bound = NULL, bit = 0;
  if (model->ready) {
    return acre_fail(error, ACRE_BAD_STATE, "bind: the model is ready and fixed");
  }
  ACRE_TRY(find_slot(&s, &bound, &bit, model, name, error));
  int64_t shape[2] = {s.rows ? s.rows : s.columns, s.columns};
  ACRE_TRY(acre_array_expect(array, name, s.rows ? 2 : 1, shape, error));
  bool finite = true;
  *bound &= ~bit;
  if (s.place != PLACE_MATRIX) ACRE_TRY(fill_rows(model, &s, array, &finite, error));
  if (s.place != PLACE_VECTOR && s.matrix) {
    ACRE_TRY(fill_matrix(model, &s, array, &finite, error));
  }
  if (!finite) {
    return acre_fail(error, ACRE_BAD_VALUE, "%s: holds NaN, infinity or a value beyond %s",
                     name, acre_dtype_name(model->config.dtype));
  }
  *bound |= bit;
  return ACRE_OK;
}

/* ---------------------------------------------------------------- completeness */

static acre_status missing(const char *prefix, const char *name, acre_error *error) {
  return acre_fail(error, ACRE_BAD_STATE, "model is not whole: %s%s is missing", prefix,
                   name);
}

/* All of `group` must have come, or none; *any tells which. */
static acre_status all_or_none(bool *any, uint32_t bound, uint32_t group, bool required,
                               const char *prefix, const char *const *names, int count,
                               acre_error *error) {
  *any = (bound & group) != 0;
  if (!*any && !required) return ACRE_OK;
  for (int kind = 0; kind < count; ++kind) {
    if ((group & BIT(kind)) && !(bound & BIT(kind))) {
      return missing(prefix, names[kind], error);
    }
  }
  return ACRE_OK;
}

static acre_status check_layer(acre_model *model, int64_t index, bool want_l1,
                               acre_error *error) {
  acre_layer *layer = &model->layers[index];
  char prefix[48];
  bool any, has_bias;
  snprintf(prefix, sizeof prefix, "model.layers.%lld.", (long long)index);
#define GROUP(any, group, required)                                             \
  ACRE_TRY(all_or_none(any, layer->bound, group, required, prefix, layer_names, \
                       LAYER_SLOTS, error))
  GROUP(&any, REQUIRED, true);
  GROUP(&has_bias, BIASES, false);
  GROUP(&any, L1_WEIGHTS, want_l1);
  if (any != want_l1) return missing("", model_names[L1_EMBEDDING], error);
  GROUP(&any, L1_BIASES, want_l1 && has_bias);
#undef GROUP
  if (!want_l1 && any) return missing(prefix, layer_names[L1_Q], error);
  return ACRE_OK;
}

/* An untrained L1 token looks like the end of the text. */
static acre_status default_l1_embedding(acre_model *model, acre_error *error) {
  const acre_model_config *c = &model->config;
  size_t bytes = (size_t)c->hidden * acre_dtype_size(c->dtype);
  ACRE_TRY(need_buffer(model, &model->l1_embedding, bytes, error));
  int64_t row = acre_max(c->eos_id, 0);
  acre_span span = {(const char *)acre_buffer_data(model->embedding) + (size_t)row * bytes,
                    0, 1};
  model->backend->ops->copy_rows(model->queue, acre_buffer_data(model->l1_embedding), &span,
                                 1, bytes);
  return model->backend->ops->sync(model->queue, error);
}

acre_status acre_model_ready(acre_model *model, acre_error *error) {
  if (model->ready) return ACRE_OK;
  for (int kind = EMBEDDING; kind <= HEAD; ++kind) {
    bool needed = kind != HEAD || !model->config.tied_head;
    if (needed && !(model->bound & BIT(kind))) return missing("", model_names[kind], error);
  }
  bool want_l1 = (model->bound & BIT(L1_EMBEDDING)) != 0;
  for (int64_t i = 0; i < model->config.layers; ++i) {
    ACRE_TRY(check_layer(model, i, want_l1, error));
  }
  if (!want_l1) ACRE_TRY(default_l1_embedding(model, error));
  model->ready = true;
  return ACRE_OK;
}

bool acre_model_has_bias(const acre_model *model) {
  return (model->layers[0].bound & BIASES) != 0;
}

bool acre_model_has_l1(const acre_model *model) {
  return (model->bound & BIT(L1_EMBEDDING)) != 0;
}

/* ---------------------------------------------------------------- life */

static acre_status make_rope(acre_model *model, acre_error *error) {
  const acre_model_config *c = &model->config;
  int64_t half = c->head_dim / 2;
  size_t bytes = (size_t)(c->w_max * half) * sizeof(float);
  float *host = acre_alloc(2 * bytes + (size_t)half * sizeof(double));
  if (!host) return acre_fail(error, ACRE_NO_MEMORY, "rope: no %zu bytes", 2 * bytes);
  float *host_sin = host + c->w_max * half;
  double *frequencies = (double *)(void *)(host_sin + c->w_max * half);
  double factor = acre_rope_frequencies(frequencies, &c->rope, c->head_dim, c->w_max);
  acre_rope_table(host, host_sin, frequencies, factor, c->head_dim, c->w_max);
  acre_status status = need_buffer(model, &model->cos, bytes, error);
  if (status == ACRE_OK) status = need_buffer(model, &model->sin, bytes, error);
  if (status == ACRE_OK) {
    const acre_backend_ops *ops = model->backend->ops;
    ops->upload(model->queue, acre_buffer_data(model->cos), host, bytes);
    ops->upload(model->queue, acre_buffer_data(model->sin), host_sin, bytes);
    status = ops->sync(model->queue, error);
  }
  acre_free(host);
  return status;
}

acre_status acre_model_create(acre_model **out, acre_engine *engine,
                              const acre_model_config *given, acre_error *error) {
  acre_model_config config;
  ACRE_TAKE_OPTIONS(config, acre_model_config_default(), given);
  *out = NULL;
  ACRE_TRY(check_config(&config, error));
  acre_model *model = acre_alloc_zero(sizeof *model);
  if (!model) return acre_fail(error, ACRE_NO_MEMORY, "model: out of memory");
  model->references = 1;
  model->engine = acre_engine_retain(engine);
  model->backend = engine->backend;
  model->config = config;
  model->heads = (acre_heads){config.heads, config.kv_heads, config.head_dim, config.dtype};
  acre_status status =
      engine->backend->ops->queue_open(engine->backend, &model->queue, error);
  model->layers = acre_alloc_zero((size_t)config.layers * sizeof *model->layers);
  if (status == ACRE_OK && !model->layers) {
    status = acre_fail(error, ACRE_NO_MEMORY, "model: out of memory");
  }
  if (status == ACRE_OK) status = make_rope(model, error);
  if (status != ACRE_OK) {
    acre_model_release(model);
    return status;
  }
  *out = model;
  return ACRE_OK;
}

acre_model *acre_model_keep(acre_model *model) {
  atomic_fetch_add(&model->references, 1);
  return model;
}

/* The layer's L1 matrix and bias: copies of the base's own for L1 tokens, or of q, k, v. */
static acre_status fork_layer(acre_model *fork, int64_t index, float *scratch,
                              acre_error *error) {
  const acre_backend_ops *ops = fork->backend->ops;
  const acre_layer *base = &fork->parent->layers[index];
  acre_layer *layer = &fork->layers[index];
  const acre_matrix *from = base->l1_qkv ? base->l1_qkv : base->qkv;
  const acre_buffer *bias = base->l1_qkv ? base->l1_bias : base->qkv_bias;
  int64_t width = acre_model_qkv_width(fork);
  layer->bound |= L1_WEIGHTS;
  ACRE_TRY(ops->matrix_create(fork->backend, &layer->l1_qkv, width, fork->config.hidden,
                              fork->config.dtype, ACRE_WEIGHTS_SAME, error));
  ops->matrix_get(fork->queue, scratch, from, 0, width);
  ops->matrix_set(fork->queue, layer->l1_qkv, 0, scratch, width);
  if (!bias) return ACRE_OK;
  layer->bound |= L1_BIASES;
  size_t bytes = (size_t)width * sizeof(float);
  ACRE_TRY(ops->alloc(fork->backend, &layer->l1_bias, bytes, error));
  acre_span all = {acre_buffer_data(bias), 0, 1};
  ops->copy_rows(fork->queue, acre_buffer_data(layer->l1_bias), &all, 1, bytes);
  return ACRE_OK;
}

static acre_status fork_parameters(acre_model *fork, acre_error *error) {
  const acre_model_config *c = &fork->config;
  const acre_backend_ops *ops = fork->backend->ops;
  acre_span row = {acre_buffer_data(fork->parent->l1_embedding), 0, 1};
  size_t bytes = (size_t)c->hidden * acre_dtype_size(c->dtype);
  acre_buffer *scratch;
  ACRE_TRY(ops->alloc(fork->backend, &fork->l1_embedding, bytes, error));
  ops->copy_rows(fork->queue, acre_buffer_data(fork->l1_embedding), &row, 1, bytes);
  ACRE_TRY(ops->alloc(fork->backend, &scratch,
                      (size_t)(acre_model_qkv_width(fork) * c->hidden) * sizeof(float),
                      error));
  acre_status status = ACRE_OK;
  for (int64_t i = 0; status == ACRE_OK && i < c->layers; ++i) {
    status = fork_layer(fork, i, acre_buffer_data(scratch), error);
  }
  if (status == ACRE_OK) status = ops->sync(fork->queue, error);
  acre_buffer_release(scratch);
  return status;
}

acre_status acre_model_fork(acre_model **out, acre_model *base, acre_error *error) {
  *out = NULL;
  acre_model *fork = acre_alloc_zero(sizeof *fork);
  if (!fork) return acre_fail(error, ACRE_NO_MEMORY, "model: out of memory");
  int64_t layers = base->config.layers;
  fork->references = 1;
  fork->parent = acre_model_keep(base);
  fork->engine = acre_engine_retain(base->engine);
  fork->backend = base->backend;
  fork->config = base->config, fork->heads = base->heads;
  fork->embedding = base->embedding, fork->norm = base->norm, fork->head = base->head;
  fork->cos = base->cos, fork->sin = base->sin;
  fork->bound = base->bound | BIT(L1_EMBEDDING);
  fork->ready = true;
  acre_status status = base->backend->ops->queue_open(base->backend, &fork->queue, error);
  fork->layers = acre_alloc_zero((size_t)layers * sizeof *fork->layers);
  if (status == ACRE_OK && !fork->layers) {
    status = acre_fail(error, ACRE_NO_MEMORY, "model: out of memory");
  }
  for (int64_t i = 0; fork->layers && i < layers; ++i) {
    fork->layers[i] = base->layers[i];
    fork->layers[i].l1_qkv = NULL, fork->layers[i].l1_bias = NULL;
  }
  if (status == ACRE_OK) status = fork_parameters(fork, error);
  if (status != ACRE_OK) {
    acre_model_release(fork);
    return status;
  }
  *out = fork;
  return ACRE_OK;
}

static void release_layer(const acre_backend_ops *ops, acre_layer *layer, bool fork) {
  acre_buffer_release(layer->l1_bias);
  ops->matrix_release(layer->l1_qkv);
  if (fork) return;
  acre_buffer *buffers[] = {layer->input_norm, layer->attention_norm, layer->qkv_bias};
  acre_matrix *matrices[] = {layer->qkv, layer->out, layer->gate, layer->up, layer->down};
  for (int i = 0; i < ACRE_COUNT(buffers); ++i) acre_buffer_release(buffers[i]);
  for (int i = 0; i < ACRE_COUNT(matrices); ++i) ops->matrix_release(matrices[i]);
}

void acre_model_retain(acre_model *model) { acre_model_keep(model); }

void acre_model_release(acre_model *model) {
  if (!model || atomic_fetch_sub(&model->references, 1) != 1) return;
  const acre_backend_ops *ops = model->backend->ops;
  for (int64_t i = 0; model->layers && i < model->config.layers; ++i) {
    release_layer(ops, &model->layers[i], model->parent != NULL);
  }
  acre_buffer_release(model->l1_embedding);
  acre_buffer *buffers[] = {model->embedding, model->norm, model->cos, model->sin};
  for (int i = 0; !model->parent && i < ACRE_COUNT(buffers); ++i) {
    acre_buffer_release(buffers[i]);
  }
  if (!model->parent) ops->matrix_release(model->head);
  if (model->queue) ops->queue_close(model->queue);
  acre_free(model->layers);
  acre_engine_release(model->engine);
  acre_model_release(model->parent);
  acre_free(model);
}

const acre_model_config *acre_model_get_config(const acre_model *model) {
  return &model->config;
}
acre_engine *acre_model_engine(const acre_model *model) { return model->engine; }
