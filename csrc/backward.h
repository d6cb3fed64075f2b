/* Back through one pass: from its tape and what its loss asks for to the gradients of the L1
 * parameters, and of the keys and values of earlier passes that it saw.
 *
 * The mirror of forward.h, and like it written with backend operations only. Rows of the MLP
 * are independent and go in blocks; attention takes the whole pass at once. */
#ifndef ACRE_BACKWARD_H
#define ACRE_BACKWARD_H

#include "forward.h"

/* A model's matrices the other way round, for dx = dy W. Those of L1 tokens follow their
 * parameters by acre_reverse_l1, which after opening cannot fail. A zeroed one is closed. */
typedef struct acre_reverse_layer {
  acre_matrix *qkv, *l1_qkv, *out, *gate, *up, *down;
} acre_reverse_layer;

typedef struct acre_reverse {
  acre_reverse_layer *layers;
  acre_matrix *head;
  acre_buffer *sin; /* of the opposite angles */
} acre_reverse;

acre_status acre_reverse_open(acre_reverse *reverse, const acre_model *model,
                              acre_queue *queue, acre_error *error);
acre_status acre_reverse_l1(acre_reverse *reverse, const acre_model *model,
                            acre_queue *queue, acre_error *error);
void acre_reverse_close(acre_reverse *reverse, const acre_model *model);

/* Where gradients of the L1 parameters are added up, float32. */
typedef struct acre_l1_gradients {
  float *embedding; /* [hidden] */
  float **weights;  /* [L] of [(h + 2g) d, hidden] */
  float **bias;     /* [L] of [(h + 2g) d], or NULL: the model has none */
} acre_l1_gradients;

/* Gradients of keys and values of one pass, per layer [rows, g, d] float32; of raw keys,
 * except where said otherwise. */
typedef struct acre_kv_gradients {
  int64_t rows;
  acre_buffer *buffer; /* NULL: nothing came yet */
  float *keys, *values;
} acre_kv_gradients;

acre_status acre_kv_gradients_open(acre_kv_gradients *kv, const acre_model *model,
                                   int64_t rows, acre_error *error);
void acre_kv_gradients_close(acre_kv_gradients *kv);

/* Rows of the prefix that are rows of an earlier pass. */
typedef struct acre_origin {
  int64_t prefix_row, row, rows;
  acre_kv_gradients *kv; /* open */
} acre_origin;

/* Scratch for passes of up to `rows` rows behind up to `prefix` entries. */
typedef struct acre_back_space {
  int64_t rows, prefix;
  acre_buffer *block;
  float *dx, *dn, *dout, *dqkv, *parts;         /* of all rows */
  float *dk, *dv;                               /* [prefix, g, d] */
  float *mid, *gate, *up, *dh, *logits;         /* of a block of rows */
  float *l1_x, *l1_dqkv, *l1_dn;                /* of L1 rows */
  void *typed, *normed, *dgate, *dup, *dlogits; /* of T */
  int32_t *index, *zeros, *targets;             /* [rows] */
  float *weights, *losses;                      /* [rows] */
  int32_t *host_index;                          /* [2 rows] on the host */
  float *host_weights, *host_losses;            /* [rows] on the host */
} acre_back_space;

acre_status acre_back_space_open(acre_back_space *space, const acre_model *model,
                                 int64_t rows, int64_t prefix, acre_error *error);
void acre_back_space_close(acre_back_space *space);
size_t acre_back_space_bytes(const acre_model *model, int64_t rows, int64_t prefix);

/* Scoring's part in the loss: rows [first, first + count) of the pass score the first m prefix
 * entries at the heads in use, and the loss's derivative by scores[j] is pull[j]. */
typedef struct acre_evidence {
  int64_t first, count, m;
  float *pull;          /* host [m] */
  const uint8_t *heads; /* host [L, h] */
} acre_evidence;

typedef struct acre_back_pass {
  const acre_tape *tape;
  const acre_timeline *prefix; /* as it was in the pass */
  const int32_t *targets;      /* host [rows]: the token that each row predicts, or -1 */
  const float *weights;        /* host [rows], of its loss */
  const int32_t *l1_rows;      /* host [l1_count]: rows with L1 weights, ascending */
  int64_t l1_count;
  int64_t m;                  /* prefix entries that are L1 entries */
  int64_t joined;             /* this pass's L1 rows behind them, the first so many */
  acre_kv_gradients *l1;      /* of all L1 entries; keys as rotated for later passes */
  const acre_origin *origins; /* of prefix rows from m on */
  int64_t origin_count;
  const acre_kv_gradients
      *own; /* what later passes ask of this one's rows; may be closed */
  const acre_evidence *evidence; /* nullable */
} acre_back_pass;

/* Adds to the gradients; returns the sum of weight * -log p. */
double acre_backward(const acre_model *model, const acre_reverse *reverse,
                     acre_workspace *workspace, acre_back_space *space,
                     const acre_back_pass *pass, const acre_l1_gradients *gradients);

#endif
