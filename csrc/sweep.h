/* A sweep: one training example under way, its passes read in order and then gone back through
 * (METHOD.md, section 6).
 *
 * A pass is a window, or behind them a question with its answer. What a pass sees beside itself
 * lies in one prefix timeline, [L1 entries | middle], the middle being rows of windows: carried
 * tokens, and for questions, alike for all of them, the orphans and the partial window. So the
 * way back needs to know nothing of windows: gradients of L1 entries wait in one array until
 * the pass that made them, those of middle rows in one of the pass that they belong to. */
#ifndef ACRE_SWEEP_H
#define ACRE_SWEEP_H

#include "backward.h"
#include "loss.h"
#include "nested.h"

/* Rows of the prefix that are rows of an earlier pass. */
typedef struct acre_sweep_span {
  int64_t pass, row, prefix_row, rows;
} acre_sweep_span;

typedef struct acre_sweep_pass {
  int64_t first, last; /* tokens of the text; of a question first == last == n */
  int64_t interval;    /* l of a window; 0 for a question */
  int64_t rows;
  int64_t m;              /* L1 entries of earlier, closed windows */
  int64_t joined;         /* L1 entries that it adds: those of its L1 tokens if it closes */
  int64_t seen;           /* prefix entries in all */
  int32_t *ids, *targets; /* [rows] on the host */
  float *weights;         /* [rows] */
  int32_t *l1_rows;       /* [l1_count] */
  int64_t l1_count;
  acre_sweep_span *spans; /* the middle */
  int64_t span_count;
  acre_tape tape;
  acre_kv_gradients kv; /* open while later passes may ask something of its rows */
  /* pull NULL: none. Until the pass has scored, it is 1 / their number at the entries that
   * hold evidence and 0 elsewhere. */
  acre_evidence evidence;
} acre_sweep_pass;

typedef struct acre_sweep {
  acre_model *model;      /* a fork; the trainer's */
  acre_tape_shelf *shelf; /* the trainer's */
  bool gradients;
  acre_sweep_pass *passes;
  int64_t count;      /* of passes */
  int64_t done;       /* steps taken */
  int64_t m, longest; /* L1 entries in all; most rows of a pass */
  int64_t seen;       /* most prefix entries that a pass sees */
  acre_timeline prefix;
  acre_kv_gradients l1;
  acre_span *spans; /* enough for any one move */
  acre_loss loss;   /* where no gradients are asked for */
  float *losses;    /* [longest] on the host */
  uint8_t *heads;   /* [L, h] */
  double evidence_weight;
  acre_buffer *scores; /* [m]; NULL: no question has evidence */
  bool placed;         /* the prefix holds what questions see */
  acre_example_result result;
} acre_sweep;

/* Checks the example and lays it out; copies what it needs. A zeroed sweep is closed. */
acre_status acre_sweep_open(acre_sweep *sweep, acre_model *model, acre_tape_shelf *shelf,
                            const acre_example *example, bool gradients, acre_error *error);
void acre_sweep_close(acre_sweep *sweep);

/* Bytes that it holds at most, beside the caller's workspace and space. */
size_t acre_sweep_bytes(const acre_sweep *sweep);
int64_t acre_sweep_steps(const acre_sweep *sweep); /* in all */

/* The next step. workspace and space are as large as the sweep's longest pass. */
acre_status acre_sweep_step(acre_sweep *sweep, const acre_reverse *reverse,
                            acre_workspace *workspace, acre_back_space *space,
                            const acre_l1_gradients *gradients, acre_error *error);

#endif
