/* A tiny random model for tests of the core: 2 layers, 4 query and 2 KV heads. */
#ifndef ACRE_TINY_H
#define ACRE_TINY_H

#include "acre.h"
#include "check.h"

#include <stdlib.h>
#include <string.h>

enum { TINY_VOCAB = 61, TINY_LAYERS = 2, TINY_W_MAX = 512 };

static acre_model_config tiny_config(acre_dtype dtype) {
  acre_model_config c = acre_model_config_default();
  c.vocab_size = TINY_VOCAB;
  c.hidden = 32;
  c.layers = TINY_LAYERS;
  c.heads = 4;
  c.kv_heads = 2;
  c.head_dim = 8;
  c.ffn = 48;
  c.w_max = TINY_W_MAX;
  c.tied_head = true;
  c.dtype = dtype;
  c.eos_id = 1;
  return c;
}

static acre_status tiny_bind(acre_model *model, const char *name, int64_t rows,
                             int64_t columns, float scale, float shift, uint64_t *seed,
                             acre_error *error) {
  int64_t count = (rows ? rows : 1) * columns;
  float *data = malloc((size_t)count * sizeof *data);
  for (int64_t i = 0; i < count; ++i) data[i] = shift + scale * random_float(seed);
  acre_array array = {.data = data, .dtype = ACRE_F32, .ndim = rows ? 2 : 1};
  array.shape[0] = rows ? rows : columns;
  array.shape[1] = columns;
  array.strides[0] = rows ? columns : 1;
  array.strides[1] = 1;
  acre_status status = acre_model_bind(model, name, &array, error);
  free(data);
  return status;
}

static acre_status tiny_fill(acre_model *model, bool trained, uint64_t seed,
                             acre_error *error) {
  static const struct {
    const char *name;
    int64_t rows, columns;
    bool trained;
  } kinds[] = {
      {"input_layernorm.weight", 0, 32, false},
      {"post_attention_layernorm.weight", 0, 32, false},
      {"self_attn.q_proj.weight", 32, 32, false},
      {"self_attn.k_proj.weight", 16, 32, false},
      {"self_attn.v_proj.weight", 16, 32, false},
      {"self_attn.o_proj.weight", 32, 32, false},
      {"mlp.gate_proj.weight", 48, 32, false},
      {"mlp.up_proj.weight", 48, 32, false},
      {"mlp.down_proj.weight", 32, 48, false},
      {"self_attn.acre_q_proj.weight", 32, 32, true},
      {"self_attn.acre_k_proj.weight", 16, 32, true},
      {"self_attn.acre_v_proj.weight", 16, 32, true},
  };
  acre_status status =
      tiny_bind(model, "model.embed_tokens.weight", TINY_VOCAB, 32, 1, 0, &seed, error);
  if (status != ACRE_OK) return status;
  status = tiny_bind(model, "model.norm.weight", 0, 32, 0.1f, 1, &seed, error);
  if (status != ACRE_OK) return status;
  if (trained) {
    status = tiny_bind(model, "model.acre_embed_tokens.weight", 1, 32, 1, 0, &seed, error);
    if (status != ACRE_OK) return status;
  }
  for (int layer = 0; layer < TINY_LAYERS; ++layer) {
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; ++i) {
      if (kinds[i].trained && !trained) continue;
      char name[96];
      snprintf(name, sizeof name, "model.layers.%d.%s", layer, kinds[i].name);
      bool norm = kinds[i].rows == 0;
      status = tiny_bind(model, name, kinds[i].rows, kinds[i].columns, norm ? 0.1f : 0.3f,
                         norm ? 1 : 0, &seed, error);
      if (status != ACRE_OK) return status;
    }
  }
  return acre_model_ready(model, error);
}

/* A ready model, or NULL with *error filled; nothing is retained on failure. */
static acre_model *tiny_model(acre_engine *engine, acre_dtype dtype, bool trained,
                              acre_error *error) {
  acre_model_config config = tiny_config(dtype);
  acre_model *model = NULL;
  if (acre_model_create(&model, engine, &config, error) != ACRE_OK) return NULL;
  if (tiny_fill(model, trained, 7, error) == ACRE_OK) return model;
  acre_model_release(model);
  return NULL;
}

static inline acre_build_options tiny_options(acre_proxy proxy) {
  acre_build_options options = acre_build_options_default();
  options.proxy = proxy;
  options.interval = 4;
  options.window = 32;
  options.stride = 16;
  options.eta = 32;
  options.reserve = 64;
  return options;
}

static void tiny_ids(int32_t *ids, int64_t n, uint64_t seed) {
  for (int64_t i = 0; i < n; ++i) ids[i] = (int32_t)(random_bits(&seed) % TINY_VOCAB);
}

/* The whole build; NULL with *error filled. */
static inline acre_cache *tiny_build(acre_model *model, const acre_build_options *options,
                                     const acre_cache *from, int64_t keep,
                                     const int32_t *ids, int64_t n, acre_error *error) {
  acre_builder *builder = NULL;
  acre_cache *cache = NULL;
  int64_t done = 0, total = 1;
  acre_status status =
      acre_builder_open(&builder, model, options, from, keep, ids, n, error);
  while (status == ACRE_OK && done < total) {
    status = acre_builder_step(builder, &done, &total, error);
  }
  if (status == ACRE_OK) acre_builder_freeze(builder, &cache, error);
  acre_builder_release(builder);
  return cache;
}

/* Score, refill, prefill and a few tokens of a question; logits [TINY_VOCAB] at the end. */
static inline acre_status tiny_ask(acre_model *model, acre_cache *cache,
                                   const int32_t *question, int64_t t, int64_t eta,
                                   int32_t *answer, int64_t count, float *logits,
                                   acre_error *error) {
  acre_session *session = NULL;
  float scores[TINY_W_MAX];
  int32_t groups[TINY_W_MAX];
  int64_t k = 0, m = acre_cache_plan(cache)->m;
  acre_status status = acre_session_open(&session, model, cache, t + count, error);
  if (status == ACRE_OK) {
    status = acre_session_score(session, scores, question, t, 0, t, NULL, error);
  }
  if (status == ACRE_OK) status = acre_refill_count(&k, cache, eta, error);
  if (status == ACRE_OK) status = acre_select_groups(groups, scores, m, k, error);
  if (status == ACRE_OK) status = acre_session_refill(session, groups, k, false, error);
  if (status == ACRE_OK) status = acre_session_prefill(session, question, t, NULL, error);
  for (int64_t i = 0; status == ACRE_OK && i < count; ++i) {
    status = acre_session_next(session, &answer[i], NULL, error);
  }
  if (status == ACRE_OK && logits) status = acre_session_logits(session, logits, error);
  acre_session_release(session);
  return status;
}

#endif
