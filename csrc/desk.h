/* What sessions that were opened together share: scratch for a pass, and choosing tokens.
 *
 * Tokens are chosen where the logits lie: a few bytes come to the host, all logits only where
 * the highest of them do not decide. */
#ifndef ACRE_DESK_H
#define ACRE_DESK_H

#include "decode.h"
#include "forward.h"

#include <stdatomic.h>

/* A token to be chosen. */
typedef struct acre_choice {
  float *logits;          /* device [vocab]; penalties are put on them in place */
  const int32_t *history; /* what a repetition penalty is for */
  int64_t history_count;
  acre_sampling sampling;
  uint64_t step; /* draws before this one */
  int32_t token; /* out */
} acre_choice;

/* One session, or a batch of them, is in use at a time. */
typedef struct acre_desk {
  _Atomic int64_t references;
  atomic_flag busy;
  acre_model *model;
  int64_t sessions;
  acre_workspace ws;
  acre_buffer *block;   /* [2, sessions, vocab] logits; NULL: those of the workspace */
  acre_buffer *picks;   /* [sessions] ids of the highest; of one row: values, ids, mass */
  acre_seat *seats;     /* [sessions] */
  acre_choice *choices; /* [sessions] */
  int32_t *ids;         /* host [rows of ws] */
  int32_t *picked;      /* host, as picks */
  float *logits;        /* host [vocab] */
  uint8_t *seen;        /* host [vocab], zero between calls */
  acre_candidate *candidates; /* host [vocab] */
} acre_desk;

/* With the caller's reference; for passes of `rows` >= sessions rows. */
acre_status acre_desk_open(acre_desk **out, acre_model *model, int64_t rows,
                           int64_t sessions, acre_error *error);
void acre_desk_release(acre_desk *desk);

/* The logits [vocab] of session i of those opened together; from i = sessions on, of the rows
 * of a batch's pass. */
float *acre_desk_logits(const acre_desk *desk, int64_t i);

/* The tokens of the first `count` choices; waits where any came. */
void acre_desk_choose(acre_desk *desk, int64_t count);

#endif
