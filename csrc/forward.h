/* One pass of rows through the layers, written with backend operations only.
 *
 * Takes token ids (L1 tokens carry the id vocab_size), appends their keys and values to a
 * timeline, and leaves the last layer's hidden state in the workspace. It does not know
 * whether it reads a window, a question or an answer: what a row may see is [prefix | own
 * timeline up to itself], and that is all of selective attention down here. */
#ifndef ACRE_FORWARD_H
#define ACRE_FORWARD_H

#include "tape.h"

/* Scratch of one owner, for up to `rows` rows at once; allocated once. */
typedef struct acre_workspace {
  acre_queue *queue;
  int64_t rows;
  acre_buffer *block;
  float *x, *qkv;                   /* float32 */
  void *normed, *attended, *hidden; /* of T; hidden: after SwiGLU */
  void *l1_normed; /* of T; the L1 rows alone: empty without trained L1 weights */
  float *l1_qkv;
  float *logits; /* [vocab_size] of the last row asked for */
  int32_t *ids, *l1_index;
  int32_t *l1_host; /* [rows] on the host, to fill l1_index from */
} acre_workspace;

acre_status acre_workspace_open(acre_workspace *workspace, const acre_model *model,
                                int64_t rows, acre_error *error);
void acre_workspace_close(acre_workspace *workspace, const acre_model *model);
size_t acre_workspace_bytes(const acre_model *model, int64_t rows);

/* Sees a layer's queries on their way: [rows, h, d] with row stride `stride`, once before
 * and once after rotation. NULL function: nobody looks. */
typedef struct acre_probe {
  void (*look)(void *context, int64_t layer, bool rotated, const float *q, int64_t stride,
               int64_t rows);
  void *context;
} acre_probe;

/* Called before a layer attends, once its rows' keys and values are enqueued: what else the
 * layer sees may come in the queue's order until then. NULL function: it is all there. */
typedef struct acre_arrival {
  void (*arrive)(void *context, int64_t layer);
  void *context;
} acre_arrival;

/* A timeline that a row is appended to, and what the row sees before it. */
typedef struct acre_seat {
  int64_t first_position;
  const acre_timeline *prefix;
  acre_timeline *own;
} acre_seat;

typedef struct acre_pass {
  const int32_t *ids;          /* host [rows]; NULL: no L1 token, they are in ws->ids */
  int64_t rows;                /* 1 to the workspace's rows */
  int64_t first_position;      /* of the timeline's entry 0 */
  const acre_timeline *prefix; /* nullable; wholly visible, its `count` entries */
  acre_timeline *own;          /* rows are appended: own->count grows by rows */
  const acre_seat *seats; /* [rows], nullable: each row has one of its own, no two the same
                             `own`, instead of the three above; no probe, no tape */
  int64_t layers;         /* run only so many; L for a hidden state */
  bool split;             /* decoding: a lone row may be summed in another order */
  bool keys_only;         /* stop after the last layer's keys, values and probe */
  acre_probe probe;
  acre_arrival arrival;
  acre_tape *tape; /* nullable; whole, of `rows` rows, and own is its timeline, empty */
} acre_pass;

void acre_forward(const acre_model *model, acre_workspace *workspace,
                  const acre_pass *pass);

/* logits [rows, vocab_size] of workspace rows [first, first + rows), into device memory. */
void acre_head(const acre_model *model, acre_workspace *workspace, float *logits,
               int64_t first, int64_t rows);

#endif
