/* What the model thinks of the tokens that did come: -log p, without keeping logits.
 *
 * Takes the hidden rows that a pass left in its workspace and the token that follows each;
 * gives nats per token on the host. Logits exist for a few rows at a time only. */
#ifndef ACRE_LOSS_H
#define ACRE_LOSS_H

#include "forward.h"

/* Scratch of one owner; a zeroed one is closed and may be closed. */
typedef struct acre_loss {
  acre_buffer *block;
  float *logits;    /* [ACRE_LOSS_ROWS, vocab_size] */
  float *values;    /* [ACRE_LOSS_ROWS] */
  int32_t *targets; /* [ACRE_LOSS_ROWS] */
} acre_loss;

enum { ACRE_LOSS_ROWS = 64 };

acre_status acre_loss_open(acre_loss *loss, const acre_model *model, acre_error *error);
void acre_loss_close(acre_loss *loss);

/* out[i] = -log p(targets[i]) under workspace row i, for rows [0, rows), in nats; both on
 * the host. A target of -1 is passed over: its out[i] becomes 0. */
void acre_loss_run(acre_loss *loss, float *out, const int32_t *targets,
                   const acre_model *model, acre_workspace *workspace, int64_t rows);

#endif
