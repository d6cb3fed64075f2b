/* Greedy decoding that the device goes on with by itself, a few tokens ahead of the host.
 *
 * A step is recorded once (backend.h, loop_record): it processes a token, chooses the next
 * and feeds it to itself. The timeline's count stays the host's: what the device has added
 * beyond it is not there for anybody else, and written anew when it comes to be. */
#ifndef ACRE_AHEAD_H
#define ACRE_AHEAD_H

#include "forward.h"

typedef struct acre_ahead {
  acre_loop *loop; /* NULL: the host takes the steps */
  acre_timeline *own;
  int64_t most, run, taken; /* steps: there is room for, enqueued, given out */
  bool spent;               /* one loop was begun since the last prefill, or could not be */
} acre_ahead;

/* Records steps that begin with processing `token` on `own`, at most `most` of them, and leave
 * logits in `logits`. Where the device cannot, or has no memory, there is no loop. While there
 * is one, nobody else uses the workspace. */
void acre_ahead_begin(acre_ahead *ahead, const acre_model *model, acre_workspace *workspace,
                      const acre_timeline *prefix, acre_timeline *own, float *logits,
                      int32_t token, int64_t most);
/* One step more: *token is what it chose, and own's count has grown by one. */
acre_status acre_ahead_next(acre_ahead *ahead, const acre_model *model, int32_t *token,
                            acre_error *error);
/* Ends the loop, if there is one. */
void acre_ahead_drop(acre_ahead *ahead, const acre_model *model);

#endif
