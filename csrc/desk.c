#include "desk.h"

#include "platform.h"

#include <string.h>

/* ---------------------------------------------------------------- life */

void acre_desk_release(acre_desk *d) {
  if (!d || atomic_fetch_sub(&d->references, 1) != 1) return;
  acre_workspace_close(&d->ws, d->model);
  acre_buffer_release(d->block);
  acre_buffer_release(d->picks);
  acre_free(d->seats);
  acre_free(d->choices);
  acre_free(d->ids);
  acre_free(d->picked);
  acre_free(d->logits);
  acre_free(d->seen);
  acre_free(d->candidates);
  acre_model_release(d->model);
  acre_free(d);
}

static acre_status fill(acre_desk *d, int64_t rows, acre_error *error) {
  acre_backend *backend = d->model->backend;
  int64_t vocab = d->model->config.vocab_size, sessions = d->sessions;
  ACRE_TRY(acre_workspace_open(&d->ws, d->model, rows, error));
  size_t bytes = (size_t)(2 * sessions * vocab) * sizeof(float);
  if (sessions > 1) ACRE_TRY(backend->ops->alloc(backend, &d->block, bytes, error));
  size_t picks = (size_t)(sessions + 2 * ACRE_TOP_MOST + 1) * sizeof(int32_t);
  ACRE_TRY(backend->ops->alloc(backend, &d->picks, picks, error));
  d->seats = acre_alloc((size_t)sessions * sizeof *d->seats);
  d->choices = acre_alloc((size_t)sessions * sizeof *d->choices);
  d->ids = acre_alloc((size_t)rows * sizeof *d->ids);
  d->picked = acre_alloc(picks);
  d->logits = acre_alloc((size_t)vocab * sizeof *d->logits);
  d->seen = acre_alloc_zero((size_t)vocab);
  d->candidates = acre_alloc((size_t)vocab * sizeof *d->candidates);
  bool all = d->seats && d->choices && d->ids && d->picked && d->logits && d->seen &&
             d->candidates;
  return all ? ACRE_OK : acre_fail(error, ACRE_NO_MEMORY, "session: out of memory");
}

acre_status acre_desk_open(acre_desk **out, acre_model *model, int64_t rows,
                           int64_t sessions, acre_error *error) {
  *out = NULL;
  acre_desk *d = acre_alloc_zero(sizeof *d);
  if (!d) return acre_fail(error, ACRE_NO_MEMORY, "session: out of memory");
  atomic_flag_clear(&d->busy);
  d->references = 1;
  d->sessions = sessions;
  d->model = acre_model_keep(model);
  acre_status status = fill(d, rows, error);
  if (status == ACRE_OK)
    *out = d;
  else
    acre_desk_release(d);
  return status;
}

float *acre_desk_logits(const acre_desk *d, int64_t i) {
  if (!d->block) return d->ws.logits;
  return (float *)acre_buffer_data(d->block) + i * d->model->config.vocab_size;
}

/* ---------------------------------------------------------------- choosing */

/* On the device, each id of the history once. */
static void penalize(acre_desk *d, const acre_choice *c) {
  acre_workspace *ws = &d->ws;
  const acre_backend_ops *ops = d->model->backend->ops;
  int64_t count = 0;
  for (int64_t i = 0; i < c->history_count; ++i) {
    if (!d->seen[c->history[i]]) d->ids[count++] = c->history[i];
    d->seen[c->history[i]] = 1;
    if (count < ws->rows && i + 1 < c->history_count) continue;
    ops->upload(ws->queue, ws->ids, d->ids, (size_t)count * sizeof *d->ids);
    ops->penalize(ws->queue, c->logits, ws->ids, count, c->sampling.repetition_penalty);
    count = 0;
  }
  for (int64_t i = 0; i < c->history_count; ++i) d->seen[c->history[i]] = 0;
}

/* From the k highest logits alone; -1 where they do not decide. */
static int32_t sample_top(acre_desk *d, const acre_choice *c, int64_t k) {
  const acre_backend_ops *ops = d->model->backend->ops;
  int64_t vocab = d->model->config.vocab_size;
  float *values = (float *)acre_buffer_data(d->picks) + d->sessions, mass;
  ops->top(d->ws.queue, values, (int32_t *)(values + k), values + 2 * k, c->logits, vocab,
           k, 1 / c->sampling.temperature);
  ops->download(d->ws.queue, d->picked, values, (size_t)(2 * k + 1) * sizeof *d->picked);
  for (int64_t i = 0; i < k; ++i) {
    memcpy(&d->candidates[i].logit, &d->picked[i], sizeof(float));
    d->candidates[i].id = d->picked[k + i];
  }
  memcpy(&mass, &d->picked[2 * k], sizeof mass);
  return acre_sample_top(d->candidates, k, vocab, mass, &c->sampling, c->step);
}

static int32_t sample(acre_desk *d, const acre_choice *c) {
  int64_t vocab = d->model->config.vocab_size, k = acre_sampling_top(&c->sampling, vocab);
  int32_t token = k ? sample_top(d, c, k) : -1;
  if (token >= 0) return token;
  d->model->backend->ops->download(d->ws.queue, d->logits, c->logits,
                                   (size_t)vocab * sizeof *d->logits);
  return acre_sample(d->logits, d->candidates, vocab, &c->sampling, c->step);
}

/* The greedy ones come to the host together. */
void acre_desk_choose(acre_desk *d, int64_t count) {
  const acre_backend_ops *ops = d->model->backend->ops;
  int64_t vocab = d->model->config.vocab_size, greedy = 0;
  int32_t *best = acre_buffer_data(d->picks);
  for (int64_t i = 0; i < count; ++i) {
    const acre_choice *c = &d->choices[i];
    if (c->sampling.repetition_penalty != 1) penalize(d, c);
    if (c->sampling.temperature == 0)
      ops->argmax(d->ws.queue, best + greedy++, c->logits, 1, vocab);
  }
  if (greedy)
    ops->download(d->ws.queue, d->picked, best, (size_t)greedy * sizeof *d->picked);
  greedy = 0;
  for (int64_t i = 0; i < count; ++i) {
    acre_choice *c = &d->choices[i];
    if (c->sampling.temperature == 0) c->token = d->picked[greedy++];
  }
  for (int64_t i = 0; i < count; ++i) {
    acre_choice *c = &d->choices[i];
    if (c->sampling.temperature != 0) c->token = sample(d, c);
  }
}
