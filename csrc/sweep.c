#include "sweep.h"

#include "platform.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

/* ---------------------------------------------------------------- checking */

static acre_status check_tokens(const char *name, const int32_t *ids, int64_t count,
                                int64_t vocab, acre_error *error) {
  for (int64_t i = 0; i < count; ++i) {
    if (ids[i] >= 0 && ids[i] < vocab) continue;
    return acre_fail(error, ACRE_BAD_VALUE, "%s[%lld]: got %d, the vocabulary has %lld",
                     name, (long long)i, (int)ids[i], (long long)vocab);
  }
  return ACRE_OK;
}

static acre_status check_sizes(const acre_example *e, acre_error *error) {
  const struct {
    const char *name;
    int64_t value, low, high;
  } limits[] = {{"n (tokens)", e->n, 1, 1 << 26},
                {"questions (count)", e->question_count, 0, 1 << 20},
                {"window", e->window, 1, 1 << 24},
                {"stride", e->stride, 1, 1 << 24},
                {"carry", e->carry, 0, e->stride}};
  for (int i = 0; i < ACRE_COUNT(limits); ++i) {
    if (limits[i].value >= limits[i].low && limits[i].value <= limits[i].high) continue;
    return acre_fail(error, ACRE_BAD_VALUE, "%s: got %lld, expected %lld to %lld",
                     limits[i].name, (long long)limits[i].value, (long long)limits[i].low,
                     (long long)limits[i].high);
  }
  return ACRE_OK;
}

static acre_nested nested_of(const acre_example *e, int64_t interval) {
  return (acre_nested){interval, e->window, e->stride, true};
}

/* Windows that n tokens make, a partial one included. */
static int64_t windows_of(const acre_example *e) {
  acre_nested nested = nested_of(e, 1);
  int64_t full = acre_nested_windows(&nested, e->n);
  return full + (acre_nested_closed(&nested, e->n) < e->n);
}

static acre_status check_intervals(const acre_example *e, acre_error *error) {
  if (e->windows != windows_of(e)) {
    return acre_fail(error, ACRE_BAD_VALUE,
                     "intervals: got %lld, but %lld tokens make %lld windows",
                     (long long)e->windows, (long long)e->n, (long long)windows_of(e));
  }
  for (int64_t i = 0; i < e->windows; ++i) {
    if (e->intervals[i] >= 1 && e->intervals[i] <= 1 << 24) continue;
    return acre_fail(error, ACRE_BAD_VALUE, "intervals[%lld]: got %lld, expected 1 or more",
                     (long long)i, (long long)e->intervals[i]);
  }
  return ACRE_OK;
}

static acre_status check_weights(const char *name, const float *weights, int64_t count,
                                 acre_error *error) {
  for (int64_t i = 0; weights && i < count; ++i) {
    if (isfinite(weights[i]) && weights[i] >= 0) continue;
    return acre_fail(error, ACRE_BAD_VALUE, "%s[%lld]: got %g, expected 0 or more", name,
                     (long long)i, (double)weights[i]);
  }
  return ACRE_OK;
}

static acre_status check_question(const acre_example *e, int64_t index, int64_t vocab,
                                  acre_error *error) {
  const acre_question *q = &e->questions[index];
  char name[64];
  if (q->t < 1 || q->t > 1 << 24) {
    return acre_fail(error, ACRE_BAD_VALUE,
                     "questions[%lld]: got %lld tokens, expected 1 to %d", (long long)index,
                     (long long)q->t, 1 << 24);
  }
  snprintf(name, sizeof name, "questions[%lld]: ids", (long long)index);
  ACRE_TRY(check_tokens(name, q->ids, q->t, vocab, error));
  snprintf(name, sizeof name, "questions[%lld]: weights", (long long)index);
  ACRE_TRY(check_weights(name, q->weights, q->t, error));
  if (!q->evidence || (q->first >= 0 && q->first < q->last && q->last <= q->t)) {
    return ACRE_OK;
  }
  return acre_fail(error, ACRE_BAD_VALUE,
                   "questions[%lld]: query: got [%lld, %lld), expected some of its %lld "
                   "tokens",
                   (long long)index, (long long)q->first, (long long)q->last,
                   (long long)q->t);
}

static acre_status check_scoring(const acre_example *e, const acre_model *model,
                                 acre_error *error) {
  if (!isfinite(e->evidence_weight) || e->evidence_weight < 0) {
    return acre_fail(error, ACRE_BAD_VALUE, "evidence_weight: got %g, expected 0 or more",
                     e->evidence_weight);
  }
  int64_t used = 0, all = model->config.layers * model->config.heads;
  for (int64_t i = 0; e->heads && i < all; ++i) used += e->heads[i] != 0;
  if (!e->heads || used) return ACRE_OK;
  return acre_fail(error, ACRE_BAD_VALUE, "heads: got none, expected one or more");
}

static acre_status check_example(const acre_example *e, const acre_model *model,
                                 acre_error *error) {
  int64_t vocab = model->config.vocab_size;
  ACRE_TRY(check_sizes(e, error));
  ACRE_TRY(check_tokens("ids", e->ids, e->n, vocab, error));
  ACRE_TRY(check_intervals(e, error));
  ACRE_TRY(check_weights("weights", e->weights, e->n, error));
  for (int64_t i = 0; i < e->question_count; ++i) {
    ACRE_TRY(check_question(e, i, vocab, error));
  }
  return check_scoring(e, model, error);
}

/* ---------------------------------------------------------------- laying out */

static bool is_question(const acre_sweep_pass *p) { return p->interval == 0; }

/* Row of token i among the nested rows of its window. */
static int64_t row_of(const acre_sweep_pass *p, int64_t i) {
  return i - p->first + i / p->interval - p->first / p->interval;
}

static acre_status out_of_memory(acre_error *error) {
  return acre_fail(error, ACRE_NO_MEMORY, "example: out of memory");
}

/* The host arrays of a pass, in one block that starts with its ids. */
static acre_status alloc_pass(acre_sweep_pass *p, acre_error *error) {
  p->ids = acre_alloc((size_t)(4 * acre_max(p->rows, 1)) * sizeof *p->ids);
  if (!p->ids) return out_of_memory(error);
  p->targets = p->ids + p->rows;
  p->l1_rows = p->ids + 2 * p->rows;
  p->weights = (float *)(void *)(p->ids + 3 * p->rows);
  return ACRE_OK;
}

/* What each row predicts: the entry behind it, where that is a token. `next` follows the last
 * row (-1: nothing); weights[0] belongs to the token of which `at` is the index. */
static void aim(acre_sweep *s, acre_sweep_pass *p, int32_t next, const float *weights,
                int64_t at) {
  int32_t l1_id = (int32_t)s->model->config.vocab_size;
  for (int64_t i = 0; i < p->rows; ++i) {
    int32_t id = i + 1 < p->rows ? p->ids[i + 1] : next;
    bool token = id >= 0 && id != l1_id;
    p->targets[i] = token ? id : -1;
    p->weights[i] = token && weights ? weights[at] : 1.0f;
    if (token) s->result.weight += (double)p->weights[i];
    at += token;
  }
}

static acre_status lay_window(acre_sweep *s, acre_sweep_pass *p, const acre_example *e,
                              acre_error *error) {
  acre_nested nested = nested_of(e, p->interval);
  int32_t l1_id = (int32_t)s->model->config.vocab_size;
  p->rows = acre_nested_length(&nested, p->first, p->last);
  ACRE_TRY(alloc_pass(p, error));
  acre_nested_fill(&nested, p->ids, e->ids + p->first, p->first, p->last, l1_id);
  for (int64_t i = 0; i < p->rows; ++i) {
    if (p->ids[i] == l1_id) p->l1_rows[p->l1_count++] = (int32_t)i;
  }
  aim(s, p, p->last < e->n ? e->ids[p->last] : -1, e->weights, p->first + 1);
  return ACRE_OK;
}

static acre_status lay_question(acre_sweep *s, acre_sweep_pass *p, const acre_example *e,
                                const acre_question *q, acre_error *error) {
  p->first = p->last = e->n;
  p->rows = q->t;
  ACRE_TRY(alloc_pass(p, error));
  memcpy(p->ids, q->ids, (size_t)q->t * sizeof *p->ids);
  aim(s, p, -1, q->weights, 1);
  return ACRE_OK;
}

/* Entry `row` of pass `pass` becomes the next one of p's middle. */
static void add_middle(acre_sweep_pass *p, int64_t pass, int64_t row) {
  acre_sweep_span *last = p->span_count ? &p->spans[p->span_count - 1] : NULL;
  if (last && last->pass == pass && last->row + last->rows == row) {
    ++last->rows;
  } else {
    p->spans[p->span_count++] = (acre_sweep_span){pass, row, p->seen, 1};
  }
  ++p->seen;
}

/* Tokens [from, to), of windows before p. */
static void add_tokens(acre_sweep *s, acre_sweep_pass *p, int64_t from, int64_t to) {
  int64_t pass = 0;
  for (int64_t i = from; i < to; ++i) {
    while (s->passes[pass].last <= i) ++pass;
    add_middle(p, pass, row_of(&s->passes[pass], i));
  }
}

/* First token of closed windows that no L1 token stands for. */
static int64_t orphans_from(const acre_sweep *s, int64_t closed) {
  for (int64_t w = closed; w-- > 0;) {
    const acre_sweep_pass *p = &s->passes[w];
    int64_t end = p->last / p->interval * p->interval;
    if (end > p->first) return end;
  }
  return 0;
}

static acre_status lay_middle(acre_sweep *s, int64_t index, const acre_example *e,
                              acre_error *error) {
  acre_sweep_pass *p = &s->passes[index];
  acre_nested nested = nested_of(e, 1);
  int64_t from = acre_max(p->first - e->carry, 0), to = p->first;
  int64_t full = acre_nested_windows(&nested, e->n), extra = 0;
  bool partial = full < e->windows;
  if (is_question(p)) {
    to = acre_nested_closed(&nested, e->n);
    from = orphans_from(s, full);
    extra = partial ? s->passes[full].rows : 0;
  }
  p->seen = p->m;
  p->spans = acre_alloc((size_t)acre_max(to - from + extra, 1) * sizeof *p->spans);
  if (!p->spans) return out_of_memory(error);
  add_tokens(s, p, from, to);
  for (int64_t i = 0; i < extra; ++i) add_middle(p, full, i);
  int64_t w_max = s->model->config.w_max;
  if (p->seen + p->rows <= w_max) return ACRE_OK;
  return acre_fail(error, ACRE_TOO_LONG,
                   "example: %s %lld needs %lld positions (%lld L1 entries + %lld others + "
                   "%lld rows), the model has %lld",
                   is_question(p) ? "a question behind window" : "window",
                   (long long)(is_question(p) ? e->windows - 1 : index),
                   (long long)(p->seen + p->rows), (long long)p->m,
                   (long long)(p->seen - p->m), (long long)p->rows, (long long)w_max);
}

static acre_status lay_passes(acre_sweep *s, const acre_example *e, acre_error *error) {
  acre_nested nested = nested_of(e, 1);
  int64_t full = acre_nested_windows(&nested, e->n), m = 0;
  for (int64_t i = 0; i < s->count; ++i) {
    acre_sweep_pass *p = &s->passes[i];
    p->m = m;
    if (i < e->windows) {
      p->first = i ? s->passes[i - 1].last : 0;
      p->last = acre_min(acre_nested_window_end(&nested, p->first), e->n);
      p->interval = e->intervals[i];
      ACRE_TRY(lay_window(s, p, e, error));
      p->joined = i < full ? p->l1_count : 0;
    } else {
      ACRE_TRY(lay_question(s, p, e, &e->questions[i - e->windows], error));
    }
    m += p->joined;
    ACRE_TRY(lay_middle(s, i, e, error));
    s->longest = acre_max(s->longest, p->rows);
    s->seen = acre_max(s->seen, p->seen);
    s->result.rows += p->rows;
  }
  s->m = m;
  return ACRE_OK;
}

/* The pull's first meaning, a mean over the L1 entries whose tokens, those since the one
 * before, hold evidence; false where there are none: all of it lies behind the last entry. */
static bool aim_pull(const acre_sweep *s, float *pull, const uint8_t *evidence) {
  int64_t j = 0, wanted = 0;
  bool held = false;
  for (int64_t w = 0; j < s->m; ++w) {
    const acre_sweep_pass *p = &s->passes[w];
    for (int64_t i = p->first; i < p->last && j < s->m; ++i) {
      held |= evidence[i] != 0;
      if ((i + 1) % p->interval) continue;
      pull[j++] = held ? 1.0f : 0.0f;
      wanted += held;
      held = false;
    }
  }
  for (j = 0; j < s->m && wanted; ++j) pull[j] /= (float)wanted;
  return wanted > 0;
}

static acre_status lay_evidence(acre_sweep *s, acre_sweep_pass *p, const acre_question *q,
                                acre_error *error) {
  if (!q->evidence || !s->m) return ACRE_OK;
  float *pull = acre_alloc((size_t)s->m * sizeof *pull);
  if (!pull) return out_of_memory(error);
  if (!aim_pull(s, pull, q->evidence)) {
    acre_free(pull);
    return ACRE_OK;
  }
  p->evidence = (acre_evidence){q->first, q->last - q->first, s->m, pull, s->heads};
  if (s->scores) return ACRE_OK;
  return s->model->backend->ops->alloc(s->model->backend, &s->scores,
                                       (size_t)s->m * sizeof(float), error);
}

static acre_status lay_scoring(acre_sweep *s, const acre_example *e, acre_error *error) {
  const acre_model_config *c = &s->model->config;
  size_t all = (size_t)(c->layers * c->heads);
  s->heads = acre_alloc_zero(all);
  if (!s->heads) return out_of_memory(error);
  if (e->heads) {
    for (size_t i = 0; i < all; ++i) s->heads[i] = e->heads[i] != 0;
  } else {
    memset(s->heads + (c->layers - 1) * c->heads, 1, (size_t)c->heads);
  }
  s->evidence_weight = e->evidence_weight;
  for (int64_t i = 0; i < e->question_count; ++i) {
    ACRE_TRY(lay_evidence(s, &s->passes[e->windows + i], &e->questions[i], error));
  }
  return ACRE_OK;
}

static acre_status open_memory(acre_sweep *s, acre_error *error) {
  ACRE_TRY(
      acre_timeline_open(&s->prefix, s->model, acre_max(s->seen, 1), true, false, error));
  int64_t spans = s->seen + s->longest;
  s->spans = acre_alloc((size_t)spans * sizeof *s->spans);
  s->losses = acre_alloc((size_t)s->longest * sizeof *s->losses);
  if (!s->spans || !s->losses) return out_of_memory(error);
  if (s->gradients) return acre_kv_gradients_open(&s->l1, s->model, s->m, error);
  return acre_loss_open(&s->loss, s->model, error);
}

acre_status acre_sweep_open(acre_sweep *s, acre_model *model, acre_tape_shelf *shelf,
                            const acre_example *example, bool gradients,
                            acre_error *error) {
  memset(s, 0, sizeof *s);
  ACRE_TRY(check_example(example, model, error));
  s->model = model;
  s->shelf = shelf;
  s->gradients = gradients;
  s->count = example->windows + example->question_count;
  s->passes = acre_alloc_zero((size_t)s->count * sizeof *s->passes);
  if (!s->passes) return out_of_memory(error);
  acre_status status = lay_passes(s, example, error);
  if (status == ACRE_OK) status = lay_scoring(s, example, error);
  if (status == ACRE_OK) status = open_memory(s, error);
  if (status != ACRE_OK) acre_sweep_close(s);
  return status;
}

static void close_pass(acre_sweep *s, acre_sweep_pass *p) {
  acre_tape_give(&p->tape, s->shelf);
  acre_kv_gradients_close(&p->kv);
  acre_free(p->ids);
  acre_free(p->spans);
  acre_free(p->evidence.pull);
  p->ids = NULL, p->spans = NULL, p->evidence.pull = NULL;
}

void acre_sweep_close(acre_sweep *s) {
  for (int64_t i = 0; s->passes && i < s->count; ++i) close_pass(s, &s->passes[i]);
  acre_timeline_close(&s->prefix);
  acre_kv_gradients_close(&s->l1);
  acre_loss_close(&s->loss);
  acre_buffer_release(s->scores);
  acre_free(s->passes);
  acre_free(s->spans);
  acre_free(s->losses);
  acre_free(s->heads);
  memset(s, 0, sizeof *s);
}

size_t acre_sweep_bytes(const acre_sweep *s) {
  const acre_model *model = s->model;
  size_t bytes = acre_timeline_bytes(model, acre_max(s->seen, 1), true), widest = 0;
  size_t kv =
      2 * sizeof(float) *
      (size_t)(model->config.layers * model->heads.kv_heads * model->heads.head_dim);
  for (int64_t i = 0; i < s->count; ++i) {
    const acre_sweep_pass *p = &s->passes[i];
    bytes += s->gradients ? acre_tape_bytes(model, p->rows)
                          : acre_timeline_bytes(model, p->rows, true);
    if (p->span_count) widest = acre_max((int64_t)widest, p->seen - p->m + s->longest);
  }
  return bytes + (s->gradients ? kv * ((size_t)s->m + widest) : 0);
}

int64_t acre_sweep_steps(const acre_sweep *s) { return s->count * (s->gradients ? 2 : 1); }

/* ---------------------------------------------------------------- the prefix */

/* Puts rows of earlier passes at prefix rows [first, first + rows), which `spans` names. */
static void place(acre_sweep *s, acre_queue *queue, const acre_sweep_span *spans,
                  int64_t count, int64_t first, int64_t rows) {
  const acre_backend_ops *ops = s->model->backend->ops;
  acre_timeline *to = &s->prefix;
  for (int64_t layer = 0; rows && layer < to->layers; ++layer) {
    for (int which = ACRE_RAW; which <= ACRE_VALUES; which += ACRE_VALUES) {
      for (int64_t i = 0; i < count; ++i) {
        const acre_timeline *own = &s->passes[spans[i].pass].tape.own;
        s->spans[i] = (acre_span){acre_timeline_at(own, which, layer, spans[i].row),
                                  spans[i].prefix_row, spans[i].rows};
      }
      ops->copy_rows(queue, acre_timeline_at(to, which, layer, 0), s->spans, count,
                     to->row_bytes);
    }
    ops->rotate(queue, acre_timeline_at(to, ACRE_ROTATED, layer, first),
                acre_timeline_at(to, ACRE_RAW, layer, first),
                acre_buffer_data(s->model->cos), acre_buffer_data(s->model->sin), first,
                rows, &s->model->heads);
  }
}

/* Makes the prefix what pass p sees: its L1 entries are there. */
static void set_middle(acre_sweep *s, acre_queue *queue, const acre_sweep_pass *p) {
  bool placed = s->placed && is_question(p);
  if (!placed) place(s, queue, p->spans, p->span_count, p->m, p->seen - p->m);
  s->placed = is_question(p);
  s->prefix.count = p->seen;
}

/* The L1 entries of a closed window, behind those of earlier ones. */
static acre_status join(acre_sweep *s, acre_queue *queue, int64_t index,
                        acre_error *error) {
  const acre_sweep_pass *p = &s->passes[index];
  if (!p->joined || p->m + p->joined > s->prefix.capacity) return ACRE_OK; /* nobody sees */
  acre_sweep_span *spans = acre_alloc((size_t)p->joined * sizeof *spans);
  if (!spans) return out_of_memory(error);
  for (int64_t i = 0; i < p->joined; ++i) {
    spans[i] = (acre_sweep_span){index, p->l1_rows[i], p->m + i, 1};
  }
  place(s, queue, spans, p->joined, p->m, p->joined);
  acre_free(spans);
  return ACRE_OK;
}

/* ---------------------------------------------------------------- forward */

typedef struct scorer {
  const acre_sweep *sweep;
  const acre_evidence *evidence;
  acre_queue *queue;
} scorer;

static void score_evidence(void *context, int64_t layer, bool rotated, const float *q,
                           int64_t stride, int64_t rows) {
  (void)rows;
  const scorer *to = context;
  const acre_sweep *s = to->sweep;
  const acre_evidence *e = to->evidence;
  const uint8_t *use = e->heads + layer * s->model->config.heads;
  if (!rotated || !memchr(use, 1, (size_t)s->model->config.heads)) return;
  s->model->backend->ops->score(to->queue, acre_buffer_data(s->scores),
                                q + e->first * stride, stride,
                                acre_timeline_at(&s->prefix, ACRE_ROTATED, layer, 0), use,
                                e->count, e->m, &s->model->heads);
}

#define LEAST_SHARE 1e-6 /* where an entry gets less, its pull grows no further */

/* The pass has scored: its share of the mass on evidence, and the pulls. */
static acre_status settle_evidence(acre_sweep *s, acre_sweep_pass *p, acre_queue *queue,
                                   acre_error *error) {
  const acre_backend_ops *ops = s->model->backend->ops;
  size_t bytes = (size_t)s->m * sizeof(float);
  float *scores = acre_alloc(bytes);
  if (!scores) return out_of_memory(error);
  ops->download(queue, scores, acre_buffer_data(s->scores), bytes);
  float *pull = p->evidence.pull;
  double all = 0.0, wanted = 0.0;
  for (int64_t j = 0; j < s->m; ++j) {
    all += (double)scores[j];
    if (pull[j] > 0) wanted += (double)scores[j];
  }
  for (int64_t j = 0; j < s->m; ++j) {
    double mass = fmax((double)scores[j], LEAST_SHARE * all);
    pull[j] = (float)(-s->evidence_weight * (double)pull[j] / mass);
  }
  acre_free(scores);
  s->result.evidence += wanted / all;
  ++s->result.known;
  return ACRE_OK;
}

static void add_losses(acre_sweep *s, acre_workspace *workspace, const acre_sweep_pass *p) {
  acre_loss_run(&s->loss, s->losses, p->targets, s->model, workspace, p->rows);
  for (int64_t i = 0; i < p->rows; ++i) {
    if (p->targets[i] >= 0) {
      s->result.loss += (double)p->weights[i] * (double)s->losses[i];
    }
  }
}

static acre_status read_pass(acre_sweep *s, int64_t index, acre_workspace *workspace,
                             acre_error *error) {
  acre_sweep_pass *p = &s->passes[index];
  scorer to = {s, &p->evidence, workspace->queue};
  ACRE_TRY(s->gradients ? acre_tape_take(&p->tape, s->shelf, s->model, p->rows, error)
                        : acre_tape_open(&p->tape, s->model, p->rows, false, error));
  set_middle(s, workspace->queue, p);
  acre_pass pass = {.ids = p->ids,
                    .rows = p->rows,
                    .first_position = p->seen,
                    .prefix = p->seen ? &s->prefix : NULL,
                    .own = &p->tape.own,
                    .layers = s->model->config.layers,
                    .tape = s->gradients ? &p->tape : NULL};
  bool scored = p->evidence.pull != NULL;
  if (scored) {
    s->model->backend->ops->clear(workspace->queue, acre_buffer_data(s->scores),
                                  (size_t)s->m * sizeof(float));
    pass.probe = (acre_probe){score_evidence, &to};
  }
  acre_forward(s->model, workspace, &pass);
  if (scored) ACRE_TRY(settle_evidence(s, p, workspace->queue, error));
  if (!s->gradients) add_losses(s, workspace, p);
  ACRE_TRY(join(s, workspace->queue, index, error));
  return s->model->backend->ops->sync(workspace->queue, error);
}

/* ---------------------------------------------------------------- back */

/* What p asks of its middle rows goes to the passes that they belong to. */
static acre_status open_origins(acre_sweep *s, acre_origin *origins,
                                const acre_sweep_pass *p, acre_error *error) {
  for (int64_t i = 0; i < p->span_count; ++i) {
    const acre_sweep_span *span = &p->spans[i];
    acre_sweep_pass *owner = &s->passes[span->pass];
    if (!owner->kv.buffer) {
      ACRE_TRY(acre_kv_gradients_open(&owner->kv, s->model, owner->rows, error));
    }
    origins[i] = (acre_origin){span->prefix_row, span->row, span->rows, &owner->kv};
  }
  return ACRE_OK;
}

static acre_status go_back(acre_sweep *s, int64_t index, const acre_reverse *reverse,
                           acre_workspace *workspace, acre_back_space *space,
                           const acre_l1_gradients *gradients, acre_error *error) {
  acre_sweep_pass *p = &s->passes[index];
  acre_origin *origins = acre_alloc((size_t)acre_max(p->span_count, 1) * sizeof *origins);
  acre_status status = origins ? open_origins(s, origins, p, error) : out_of_memory(error);
  if (status == ACRE_OK) {
    set_middle(s, workspace->queue, p);
    acre_back_pass pass = {.tape = &p->tape,
                           .prefix = p->seen ? &s->prefix : NULL,
                           .targets = p->targets,
                           .weights = p->weights,
                           .l1_rows = p->l1_rows,
                           .l1_count = p->l1_count,
                           .m = p->m,
                           .joined = p->joined,
                           .l1 = &s->l1,
                           .origins = origins,
                           .origin_count = p->span_count,
                           .own = &p->kv,
                           .evidence = p->evidence.pull ? &p->evidence : NULL};
    s->result.loss += acre_backward(s->model, reverse, workspace, space, &pass, gradients);
    status = s->model->backend->ops->sync(workspace->queue, error);
  }
  acre_free(origins);
  close_pass(s, p);
  return status;
}

acre_status acre_sweep_step(acre_sweep *s, const acre_reverse *reverse,
                            acre_workspace *workspace, acre_back_space *space,
                            const acre_l1_gradients *gradients, acre_error *error) {
  int64_t step = s->done;
  if (step >= acre_sweep_steps(s)) return ACRE_OK;
  ++s->done;
  if (step < s->count) return read_pass(s, step, workspace, error);
  return go_back(s, 2 * s->count - 1 - step, reverse, workspace, space, gradients, error);
}
