/* A tape: what going back through a pass needs of it, layer by layer.
 *
 * Kept are the residual stream before every layer and behind the last one, rotated queries,
 * what attention gave and its normaliser, keys and values: all that is long to compute and
 * short to keep. Norms, the MLP's inner rows and the output projection are computed again.
 *
 * A tape is filled by one pass over all its rows, from its first to its last. */
#ifndef ACRE_TAPE_H
#define ACRE_TAPE_H

#include "timeline.h"

typedef struct acre_tape {
  int64_t rows, capacity;
  int64_t hidden, heads, width; /* of one row: x, lse, q */
  size_t unit;                  /* bytes of one number of T */
  acre_timeline own;            /* the pass's keys and values: raw, rotated, values */
  acre_buffer *block;           /* all below; NULL: only keys and values are kept */
  float *x;                     /* [L + 1, rows, hidden] */
  float *lse;                   /* [L, rows, h] */
  char *q, *attended;           /* [L, rows, h d] of T */
} acre_tape;

/* With `whole` false only keys and values are kept: nothing can go back through it. */
acre_status acre_tape_open(acre_tape *tape, const acre_model *model, int64_t rows,
                           bool whole, acre_error *error);
void acre_tape_close(acre_tape *tape); /* closing a zeroed one is fine */
/* Bytes of a whole tape. */
size_t acre_tape_bytes(const acre_model *model, int64_t rows);

/* Whole tapes that wait for their next use: fresh memory costs its first touch, which for
 * tapes is a seventh of all training. A zeroed shelf is empty. */
typedef struct acre_tape_shelf {
  acre_tape *tapes;
  int64_t count, capacity;
} acre_tape_shelf;

/* A whole tape, from the shelf where one is large enough; where none is, the shelf lets one
 * go, so that together they do not grow. */
acre_status acre_tape_take(acre_tape *tape, acre_tape_shelf *shelf, const acre_model *model,
                           int64_t rows, acre_error *error);
/* Puts a tape back, or closes it where there is no room. */
void acre_tape_give(acre_tape *tape, acre_tape_shelf *shelf);
size_t acre_tape_shelf_bytes(const acre_tape_shelf *shelf, const acre_model *model);
void acre_tape_shelf_close(acre_tape_shelf *shelf);

static inline float *acre_tape_x(const acre_tape *tape, int64_t layer) {
  return tape->x + layer * tape->rows * tape->hidden;
}
static inline float *acre_tape_lse(const acre_tape *tape, int64_t layer) {
  return tape->lse + layer * tape->rows * tape->heads;
}
static inline void *acre_tape_q(const acre_tape *tape, int64_t layer) {
  return tape->q + (size_t)(layer * tape->rows * tape->width) * tape->unit;
}
static inline void *acre_tape_attended(const acre_tape *tape, int64_t layer) {
  return tape->attended + (size_t)(layer * tape->rows * tape->width) * tape->unit;
}

#endif
