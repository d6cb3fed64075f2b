#include "ahead.h"

/* Tokens of one launch: the host reads those of one while the device makes the next. A token
 * comes at most so many steps late, and twice as many are in vain when an answer ends. */
enum { AT_ONCE = 4 };

typedef struct decode_step {
  const acre_model *model;
  acre_workspace *ws;
  acre_pass pass;
  float *logits;
} decode_step;

static void enqueue(void *context) {
  decode_step *s = context;
  acre_forward(s->model, s->ws, &s->pass);
  acre_head(s->model, s->ws, s->logits, 0, 1);
  s->model->backend->ops->argmax(s->ws->queue, s->ws->ids, s->logits, 1,
                                 s->model->config.vocab_size);
}

void acre_ahead_begin(acre_ahead *ahead, const acre_model *model, acre_workspace *ws,
                      const acre_timeline *prefix, acre_timeline *own, float *logits,
                      int32_t token, int64_t most) {
  const acre_backend_ops *ops = model->backend->ops;
  *ahead = (acre_ahead){.own = own, .most = most, .spent = true};
  if (!ops->loop_record) return;
  decode_step s = {.model = model, .ws = ws, .logits = logits};
  s.pass = (acre_pass){.rows = 1,
                       .first_position = prefix ? prefix->count : 0,
                       .prefix = prefix,
                       .own = own,
                       .layers = model->config.layers,
                       .split = true};
  int64_t count = own->count;
  ops->upload(ws->queue, ws->ids, &token, sizeof token);
  ops->loop_record(ws->queue, &ahead->loop, enqueue, &s, ws->ids, most, NULL);
  own->count = count; /* recorded, not run */
}

acre_status acre_ahead_next(acre_ahead *ahead, const acre_model *model, int32_t *token,
                            acre_error *error) {
  const acre_backend_ops *ops = model->backend->ops;
  while (ahead->run < ahead->most && ahead->run - ahead->taken <= AT_ONCE) {
    int64_t count = acre_min(AT_ONCE, ahead->most - ahead->run);
    ops->loop_run(ahead->loop, count);
    ahead->run += count;
  }
  ACRE_TRY(ops->loop_read(ahead->loop, token, ahead->taken, 1, error));
  ahead->taken += 1;
  ahead->own->count += 1;
  return ACRE_OK;
}

void acre_ahead_drop(acre_ahead *ahead, const acre_model *model) {
  if (ahead->loop) model->backend->ops->loop_release(ahead->loop);
  ahead->loop = NULL;
}
