/* A model: its configuration and its tensors bound to layers, on a backend.
 *
 * Takes tensors one at a time by Hugging Face name, in any order; gives an immutable set of
 * packed matrices. q, k, v lie in one matrix, and gate and up are multiplied together, so
 * that a layer is four multiplications. Refuses wrong shapes, values that are not finite, unknown names, and a
 * model that is not whole. */
#ifndef ACRE_MODEL_H
#define ACRE_MODEL_H

#include "backend.h"
#include "engine.h"

#include <stdatomic.h>

typedef struct acre_layer {
  acre_buffer *input_norm;     /* [hidden] float32 */
  acre_buffer *attention_norm; /* [hidden] float32, before the MLP */
  acre_matrix *qkv;            /* [(h + 2g) d, hidden] */
  acre_matrix *l1_qkv;         /* the same for L1 tokens; NULL: untrained, use qkv */
  acre_buffer *qkv_bias;       /* [(h + 2g) d] float32, zeros where none came */
  acre_buffer *l1_bias;
  acre_matrix *out;  /* [hidden, h d] */
  acre_matrix *gate; /* [ffn, hidden] */
  acre_matrix *up;   /* [ffn, hidden] */
  acre_matrix *down; /* [hidden, ffn] */
  uint32_t bound;    /* bit i: row i of the table of names came */
} acre_layer;

struct acre_model {
  _Atomic int64_t references;
  acre_model *parent; /* a fork's: owner of all but the L1 parameters; else NULL */
  acre_engine *engine;
  acre_backend *backend;
  acre_queue *queue; /* uploads while binding */
  acre_model_config config;
  acre_heads heads;
  acre_layer *layers;
  acre_buffer *embedding;    /* [vocab, hidden] of T */
  acre_buffer *l1_embedding; /* [hidden] of T */
  acre_buffer *norm;         /* [hidden] float32 */
  acre_matrix *head;         /* [vocab, hidden] */
  acre_buffer *cos, *sin;    /* [w_max, d/2] float32 */
  uint32_t bound;            /* as in a layer, for the tensors outside the layers */
  bool ready;
};

/* Sizes that every stage asks for. */
static inline int64_t acre_model_qkv_width(const acre_model *model) {
  const acre_model_config *c = &model->config;
  return (c->heads + 2 * c->kv_heads) * c->head_dim;
}
/* Bytes of one token's keys (or values) in one layer. */
static inline size_t acre_model_row_bytes(const acre_model *model) {
  const acre_model_config *c = &model->config;
  return (size_t)(c->kv_heads * c->head_dim) * acre_dtype_size(c->dtype);
}

acre_model *acre_model_keep(acre_model *model);

/* A model that shares everything with `base` but the L1 parameters, which are its own and may
 * be changed by its one owner: base's at first, or where it has none those of METHOD.md,
 * section 2. */
acre_status acre_model_fork(acre_model **out, acre_model *base, acre_error *error);
/* Whether q, k and v have biases, those of L1 tokens too. */
bool acre_model_has_bias(const acre_model *model);

#endif
