/* A session: the only file that sees all stages. One question of one cache, or one plain
 * generation: score, refill, prefill, then token by token.
 *
 * Before refilling, a session over a cache stands behind the cache's resident timeline
 * (prefix); afterwards it has spliced that into its own. The cache is only ever read.
 *
 * Sessions that were opened together share what a pass needs, and may take a step in one
 * pass: a row for each, on its own timeline. */
#include "ahead.h"
#include "desk.h"
#include "refill.h"
#include "score.h"

#include <stdio.h>
#include <string.h>

struct acre_session {
  acre_desk *desk;
  acre_model *model;
  acre_cache *cache;           /* nullable */
  const acre_timeline *prefix; /* the cache's resident entries, or NULL */
  acre_timeline own;
  acre_queue *beside; /* splices L2 that lies on the host; NULL until that is asked for */
  acre_refill refill; /* under way until the first pass behind it has met every layer */
  int64_t capacity;   /* query + answer tokens */
  int64_t used;       /* query + answer tokens in the timeline */
  int32_t *history;   /* [capacity + 1] query and answer ids, the pending one included */
  int64_t history_count;
  float *logits;   /* device [vocab], of the last row, where has_logits */
  bool has_logits; /* prefilled, and perhaps pending */
  bool pending;    /* the last of history is chosen but not processed */
  bool listed;     /* in the batch that is being checked */
  uint64_t step;   /* draws so far */
  acre_ahead ahead;
};

enum { AHEAD_AFTER = 4 }; /* tokens that the host steps to: short answers need no loop */

static acre_status enter(acre_session *s, acre_error *error) {
  if (!atomic_flag_test_and_set(&s->desk->busy)) return ACRE_OK;
  return acre_fail(error, ACRE_BUSY, "session: in use on another thread");
}

static acre_status leave(acre_session *s, acre_status status) {
  atomic_flag_clear(&s->desk->busy);
  return status;
}

/* ---------------------------------------------------------------- life */

static acre_status open_session(acre_session **out, acre_desk *d, int64_t i,
                                acre_cache *cache, int64_t capacity, acre_error *error) {
  acre_session *s = acre_alloc_zero(sizeof *s);
  if (!s) return acre_fail(error, ACRE_NO_MEMORY, "session: out of memory");
  *out = s;
  atomic_fetch_add(&d->references, 1);
  s->desk = d;
  s->model = d->model;
  s->cache = cache;
  if (cache) acre_cache_retain(cache);
  s->capacity = capacity;
  s->logits = acre_desk_logits(d, i);
  if (cache) ACRE_TRY(acre_cache_resident(&s->prefix, cache, error));
  ACRE_TRY(acre_timeline_open(&s->own, s->model, capacity, false, false, error));
  s->history = acre_alloc((size_t)(capacity + 1) * sizeof *s->history);
  if (s->history) return ACRE_OK;
  return acre_fail(error, ACRE_NO_MEMORY, "session: out of memory");
}

static acre_status check_session(const acre_model *model, const acre_cache *cache,
                                 int64_t capacity, acre_error *error) {
  if (!model->ready) return acre_fail(error, ACRE_BAD_STATE, "model: not ready");
  if (cache && cache->model != model) {
    return acre_fail(error, ACRE_BAD_VALUE, "cache: built by another model");
  }
  int64_t room = model->config.w_max;
  if (cache) room -= cache->plan.m + cache->plan.recent;
  if (capacity < 1) {
    return acre_fail(error, ACRE_BAD_VALUE, "capacity: got %lld, expected >= 1",
                     (long long)capacity);
  }
  if (capacity > room) {
    return acre_fail(error, ACRE_TOO_LONG,
                     "capacity: %lld query and answer tokens, but of the model's %lld "
                     "positions %lld are left",
                     (long long)capacity, (long long)model->config.w_max, (long long)room);
  }
  return ACRE_OK;
}

/* The refusal of one session of several, with its place. */
static acre_status of_session(int64_t i, acre_status status, acre_error *error) {
  if (status == ACRE_OK || !error) return status;
  acre_error said = *error;
  return acre_fail(error, status, "sessions[%lld]: %.440s", (long long)i, said.message);
}

acre_status acre_sessions_open(acre_session **out, acre_model *model,
                               acre_cache *const *caches, const int64_t *capacities,
                               int64_t count, acre_error *error) {
  if (count < 1 || count > model->backend->rows_max) {
    return acre_fail(error, ACRE_BAD_VALUE, "sessions: got %lld, expected 1 to %lld",
                     (long long)count, (long long)model->backend->rows_max);
  }
  memset(out, 0, (size_t)count * sizeof *out);
  int64_t rows = count;
  for (int64_t i = 0; i < count; ++i) {
    acre_status status =
        check_session(model, caches ? caches[i] : NULL, capacities[i], error);
    if (status != ACRE_OK) return count == 1 ? status : of_session(i, status, error);
    rows = acre_max(rows, acre_min(capacities[i], model->backend->rows_max));
  }
  acre_desk *d;
  ACRE_TRY(acre_desk_open(&d, model, rows, count, error));
  acre_status status = ACRE_OK;
  for (int64_t i = 0; status == ACRE_OK && i < count; ++i) {
    status = open_session(&out[i], d, i, caches ? caches[i] : NULL, capacities[i], error);
  }
  for (int64_t i = 0; status != ACRE_OK && i < count; ++i) {
    acre_session_release(out[i]);
    out[i] = NULL;
  }
  acre_desk_release(d);
  return status;
}

acre_status acre_session_open(acre_session **out, acre_model *model, acre_cache *cache,
                              int64_t capacity, acre_error *error) {
  return acre_sessions_open(out, model, &cache, &capacity, 1, error);
}

void acre_session_release(acre_session *s) {
  if (!s) return;
  acre_ahead_drop(&s->ahead, s->model);
  s->model->backend->ops->queue_close(s->beside); /* waits: then nobody uses what goes */
  acre_refill_close(&s->refill);
  acre_timeline_close(&s->own);
  acre_free(s->history);
  acre_cache_release(s->cache);
  acre_desk_release(s->desk);
  acre_free(s);
}

/* Where the device does not tell what it has, all may try. */
int64_t acre_sessions_fit(const acre_model *model, const acre_cache *cache, int64_t k,
                          int64_t capacity, int64_t wanted) {
  size_t available = model->backend->ops->available(model->backend);
  int64_t entries = capacity;
  if (cache && k > 0) {
    entries += cache->plan.m + cache->plan.recent + k * cache->plan.interval;
  }
  size_t each = acre_timeline_bytes(model, acre_max(entries, 1), false);
  int64_t most = available ? (int64_t)(available / each) : wanted;
  return acre_max(acre_min(most, wanted), 1);
}

int64_t acre_session_count(const acre_session *s) {
  return (s->prefix ? s->prefix->count : 0) + s->own.count;
}

/* ---------------------------------------------------------------- checks */

static acre_status check_query(const acre_session *s, const int32_t *ids, int64_t t,
                               acre_error *error) {
  if (t < 1)
    return acre_fail(error, ACRE_BAD_VALUE, "ids: empty, expected a token or more");
  for (int64_t i = 0; i < t; ++i) {
    if (ids[i] < 0 || ids[i] >= s->model->config.vocab_size) {
      return acre_fail(error, ACRE_BAD_VALUE, "ids[%lld]: got %d, the vocabulary has %lld",
                       (long long)i, (int)ids[i], (long long)s->model->config.vocab_size);
    }
  }
  return ACRE_OK;
}

static acre_status check_room(const acre_session *s, int64_t t, acre_error *error) {
  int64_t left = s->capacity - s->used;
  if (t <= left) return ACRE_OK;
  return acre_fail(error, ACRE_TOO_LONG,
                   "ids: %lld tokens, the session has room for %lld of its capacity %lld",
                   (long long)t, (long long)left, (long long)s->capacity);
}

/* ---------------------------------------------------------------- score */

static acre_status run_scoring(acre_session *s, acre_scoring *scoring, acre_timeline *own,
                               const int32_t *ids, int64_t t, int64_t layers,
                               acre_error *error) {
  acre_ahead_drop(&s->ahead, s->model);
  for (int64_t i = 0; i < t; i += s->desk->ws.rows) {
    scoring->offset = i;
    acre_pass pass = {.ids = ids + i,
                      .rows = acre_min(t - i, s->desk->ws.rows),
                      .first_position = scoring->resident->count,
                      .prefix = scoring->resident,
                      .own = own,
                      .layers = layers,
                      .split = true,
                      .keys_only = true,
                      .probe = acre_scoring_probe(scoring)};
    acre_forward(s->model, &s->desk->ws, &pass);
  }
  return s->model->backend->ops->sync(s->desk->ws.queue, error);
}

static acre_status score(acre_session *s, float *scores, const int32_t *ids, int64_t t,
                         int64_t first, int64_t last, const acre_score_options *given,
                         acre_error *error) {
  acre_score_options options;
  ACRE_TAKE_OPTIONS(options, acre_score_options_default(), given);
  const acre_model_config *c = &s->model->config;
  if (!s->cache) return acre_fail(error, ACRE_BAD_STATE, "score: the session has no cache");
  ACRE_TRY(check_query(s, ids, t, error));
  if (t > s->capacity) return check_room(s, t + s->used, error);
  if (first < 0 || last > t || first >= last) {
    return acre_fail(
        error, ACRE_BAD_VALUE,
        "scored tokens: got [%lld, %lld), expected within [0, %lld) and not empty",
        (long long)first, (long long)last, (long long)t);
  }
  int64_t m = s->cache->plan.m, layers;
  bool per_layer = options.select == ACRE_SELECT_PER_LAYER;
  size_t bytes = (size_t)(m * (per_layer ? c->layers : 1)) * sizeof *scores;
  uint8_t *use = acre_alloc((size_t)(c->layers * c->heads));
  if (!use) return acre_fail(error, ACRE_NO_MEMORY, "score: out of memory");
  acre_scoring scoring = {.model = s->model,
                          .queue = s->desk->ws.queue,
                          .m = m,
                          .use = use,
                          .rotated = options.rotated,
                          .per_layer = per_layer,
                          .first = first,
                          .last = last};
  acre_timeline own = {0};
  acre_status status = acre_scoring_mask(use, &layers, s->model, &options, error);
  if (status == ACRE_OK) status = acre_cache_resident(&scoring.resident, s->cache, error);
  if (status == ACRE_OK && m) {
    status =
        s->model->backend->ops->alloc(s->model->backend, &scoring.scores, bytes, error);
    if (status == ACRE_OK)
      status = acre_timeline_open(&own, s->model, t, false, false, error);
    if (status == ACRE_OK) status = run_scoring(s, &scoring, &own, ids, t, layers, error);
    if (status == ACRE_OK) {
      s->model->backend->ops->download(s->desk->ws.queue, scores,
                                       acre_buffer_data(scoring.scores), bytes);
    }
  }
  acre_timeline_close(&own);
  acre_buffer_release(scoring.scores);
  acre_free(use);
  return status;
}

acre_status acre_session_score(acre_session *s, float *scores, const int32_t *ids,
                               int64_t t, int64_t first, int64_t last,
                               const acre_score_options *given, acre_error *error) {
  ACRE_TRY(enter(s, error));
  return leave(s, score(s, scores, ids, t, first, last, given, error));
}

/* ---------------------------------------------------------------- refill */

/* Where L2 lies on the host, a layer's entries come over the bus by a queue of their own,
 * beside the question's pass: the pass waits for a layer's before it attends, while those of
 * the layers behind it are under way. */
static void arrive(void *context, int64_t layer) {
  acre_session *s = context;
  s->model->backend->ops->follow(s->desk->ws.queue, s->beside);
  if (layer + 1 < s->model->config.layers) acre_refill_layer(&s->refill, layer + 1);
}

/* Gives up the refill that may be under way. */
static acre_status stop_refill(acre_session *s, acre_error *error) {
  if (!acre_refill_under_way(&s->refill)) return ACRE_OK;
  acre_refill_close(&s->refill);
  return s->model->backend->ops->sync(s->beside, error);
}

static acre_status open_refill(acre_session *s, acre_refill *refill, acre_timeline *own,
                               const int32_t *groups, int64_t k, bool per_layer,
                               acre_error *error) {
  acre_backend *backend = s->model->backend;
  bool beside = s->cache->plan.l2 == ACRE_PLACE_HOST;
  if (beside && !s->beside) ACRE_TRY(backend->ops->mover_open(backend, &s->beside, error));
  acre_queue *queue = beside ? s->beside : s->desk->ws.queue;
  ACRE_TRY(acre_refill_open(refill, own, s->cache, queue, groups, k, per_layer, s->capacity,
                            error));
  acre_refill_layer(refill, 0);
  if (beside) return ACRE_OK;
  for (int64_t i = 1; i < s->model->config.layers; ++i) acre_refill_layer(refill, i);
  acre_refill_close(refill);
  acre_status status = backend->ops->sync(queue, error);
  if (status != ACRE_OK) acre_timeline_close(own);
  return status;
}

static acre_status refill(acre_session *s, const int32_t *groups, int64_t k, bool per_layer,
                          acre_error *error) {
  if (!s->cache)
    return acre_fail(error, ACRE_BAD_STATE, "refill: the session has no cache");
  ACRE_TRY(acre_refill_check(s->cache, groups, k, per_layer, error));
  const acre_plan *plan = acre_cache_plan(s->cache);
  int64_t need = plan->m + plan->recent + k * plan->interval + s->capacity;
  if (need > s->model->config.w_max) {
    return acre_fail(error, ACRE_TOO_LONG,
                     "groups: %lld groups of %lld need %lld positions with the query and "
                     "answer, the model has %lld",
                     (long long)k, (long long)plan->interval, (long long)need,
                     (long long)s->model->config.w_max);
  }
  acre_timeline own;
  acre_refill under_way = {0};
  const acre_timeline *prefix = NULL;
  if (k == 0) { /* nothing to splice: stay behind the cache itself */
    ACRE_TRY(acre_cache_resident(&prefix, s->cache, error));
    ACRE_TRY(acre_timeline_open(&own, s->model, s->capacity, false, false, error));
  } else {
    ACRE_TRY(open_refill(s, &under_way, &own, groups, k, per_layer, error));
  }
  acre_status status = stop_refill(s, error);
  if (status != ACRE_OK) {
    acre_refill_close(&under_way);
    acre_timeline_close(&own);
    return status;
  }
  acre_ahead_drop(&s->ahead, s->model);
  acre_timeline_close(&s->own);
  s->own = own;
  s->refill = under_way;
  s->prefix = prefix;
  s->used = s->history_count = 0;
  s->has_logits = s->pending = false;
  s->step = 0;
  return ACRE_OK;
}

acre_status acre_session_refill(acre_session *s, const int32_t *groups, int64_t k,
                                bool per_layer, acre_error *error) {
  ACRE_TRY(enter(s, error));
  return leave(s, refill(s, groups, k, per_layer, error));
}

/* ---------------------------------------------------------------- prefill, decode */

enum { HEAD_ROWS = 64 }; /* rows of logits at once: bounds the scratch */

/* Logits of workspace rows [0, rows) to the host. */
static void download_logits(acre_session *s, float *host, float *block, int64_t rows) {
  int64_t vocab = s->model->config.vocab_size;
  for (int64_t i = 0; i < rows; i += HEAD_ROWS) {
    int64_t count = acre_min(rows - i, HEAD_ROWS);
    acre_head(s->model, &s->desk->ws, block, i, count);
    s->model->backend->ops->download(s->desk->ws.queue, host + i * vocab, block,
                                     (size_t)(count * vocab) * sizeof *host);
  }
}

static void run(acre_session *s, const int32_t *ids, int64_t t, float *host, float *block) {
  acre_ahead_drop(&s->ahead, s->model);
  int64_t vocab = s->model->config.vocab_size;
  for (int64_t i = 0; i < t; i += s->desk->ws.rows) {
    int64_t rows = acre_min(t - i, s->desk->ws.rows);
    acre_pass pass = {.ids = ids + i,
                      .rows = rows,
                      .first_position = s->prefix ? s->prefix->count : 0,
                      .prefix = s->prefix,
                      .own = &s->own,
                      .layers = s->model->config.layers,
                      .split = true};
    if (acre_refill_under_way(&s->refill)) pass.arrival = (acre_arrival){arrive, s};
    acre_forward(s->model, &s->desk->ws, &pass);
    acre_refill_close(&s->refill);
    if (i + rows == t) acre_head(s->model, &s->desk->ws, s->logits, rows - 1, 1);
    if (host) download_logits(s, host + i * vocab, block, rows);
  }
  s->used += t;
}

static acre_status prefill(acre_session *s, const int32_t *ids, int64_t t, float *logits,
                           acre_error *error) {
  ACRE_TRY(check_query(s, ids, t, error));
  ACRE_TRY(check_room(s, t, error));
  if (s->pending) {
    return acre_fail(error, ACRE_BAD_STATE, "prefill: after the answer has begun");
  }
  acre_buffer *block = NULL;
  const acre_backend_ops *ops = s->model->backend->ops;
  if (logits) {
    size_t bytes = (size_t)(acre_min(t, HEAD_ROWS) * s->model->config.vocab_size);
    ACRE_TRY(ops->alloc(s->model->backend, &block, bytes * sizeof *logits, error));
  }
  run(s, ids, t, logits, block ? acre_buffer_data(block) : NULL);
  memcpy(s->history + s->history_count, ids, (size_t)t * sizeof *ids);
  s->history_count += t;
  s->has_logits = true;
  s->ahead.spent = false;
  acre_status status = ops->sync(s->desk->ws.queue, error);
  acre_buffer_release(block);
  return status;
}

acre_status acre_session_prefill(acre_session *s, const int32_t *ids, int64_t t,
                                 float *logits, acre_error *error) {
  ACRE_TRY(enter(s, error));
  return leave(s, prefill(s, ids, t, logits, error));
}

/* Whether `next` may come: something was prefilled, and the token chosen last fits. */
static acre_status check_next(const acre_session *s, acre_error *error) {
  if (!s->has_logits)
    return acre_fail(error, ACRE_BAD_STATE, "session: prefill comes first");
  return s->pending ? check_room(s, 1, error) : ACRE_OK;
}

/* Processes the token chosen last; afterwards the logits are those of the next one. */
static void catch_up(acre_session *s) {
  if (!s->pending) return;
  run(s, &s->history[s->history_count - 1], 1, NULL, NULL);
  s->pending = false;
}

static void fetch_logits(acre_session *s, float *host, const float *logits) {
  s->model->backend->ops->download(s->desk->ws.queue, host, logits,
                                   (size_t)s->model->config.vocab_size * sizeof *host);
}

static acre_status take_sampling(acre_sampling *out, const acre_sampling *given,
                                 acre_error *error) {
  ACRE_TAKE_OPTIONS(*out, acre_sampling_default(), given);
  return acre_sampling_check(out, error);
}

/* What the session's next token is to be chosen from; the sampling was checked. */
static void ask_for(acre_choice *out, const acre_session *s, float *logits,
                    const acre_sampling *given) {
  *out = (acre_choice){.logits = logits,
                       .history = s->history,
                       .history_count = s->history_count,
                       .step = s->step};
  take_sampling(&out->sampling, given, NULL);
}

/* The tokens of desk->choices, in this order, into histories. */
static acre_status choose(acre_session *const *sessions, int64_t count, int32_t *tokens,
                          acre_error *error) {
  acre_desk *d = sessions[0]->desk;
  acre_desk_choose(d, count);
  for (int64_t i = 0; i < count; ++i) {
    acre_session *s = sessions[i];
    s->history[s->history_count++] = d->choices[i].token;
    s->pending = true;
    s->step++;
  }
  ACRE_TRY(d->model->backend->ops->sync(d->ws.queue, error));
  for (int64_t i = 0; i < count; ++i) tokens[i] = d->choices[i].token;
  return ACRE_OK;
}

/* Whether the device may go on by itself: greedy, and nobody else at the desk. */
static bool goes_ahead(acre_session *s, const acre_sampling *sampling) {
  if (sampling->temperature != 0 || sampling->repetition_penalty != 1) return false;
  if (!s->pending || s->step < AHEAD_AFTER || s->desk->sessions > 1) return false;
  if (!s->ahead.spent) {
    acre_ahead_begin(&s->ahead, s->model, &s->desk->ws, s->prefix, &s->own, s->logits,
                     s->history[s->history_count - 1], s->capacity - s->used);
  }
  return s->ahead.loop != NULL;
}

static acre_status next(acre_session *s, int32_t *token, const acre_sampling *given,
                        acre_error *error) {
  acre_sampling sampling;
  ACRE_TRY(take_sampling(&sampling, given, error));
  ACRE_TRY(check_next(s, error));
  if (goes_ahead(s, &sampling)) {
    ACRE_TRY(acre_ahead_next(&s->ahead, s->model, token, error));
    s->history[s->history_count++] = *token;
    s->used++;
    s->step++;
    return ACRE_OK;
  }
  catch_up(s);
  ask_for(&s->desk->choices[0], s, s->logits, given);
  return choose(&s, 1, token, error);
}

acre_status acre_session_next(acre_session *s, int32_t *token, const acre_sampling *given,
                              acre_error *error) {
  ACRE_TRY(enter(s, error));
  return leave(s, next(s, token, given, error));
}

acre_status acre_session_logits(acre_session *s, float *logits, acre_error *error) {
  ACRE_TRY(enter(s, error));
  acre_status status = check_next(s, error);
  if (status == ACRE_OK) {
    catch_up(s);
    fetch_logits(s, logits, s->logits);
    status = s->model->backend->ops->sync(s->desk->ws.queue, error);
  }
  return leave(s, status);
}

/* ---------------------------------------------------------------- several at once */

static acre_status check_batch(acre_session *const *sessions, int64_t count,
                               const acre_sampling *const *samplings, acre_error *error) {
  for (int64_t i = 0; i < count; ++i) sessions[i]->listed = false;
  for (int64_t i = 0; i < count; ++i) {
    acre_session *s = sessions[i];
    acre_sampling unused;
    acre_status status = ACRE_OK;
    if (s->listed) status = acre_fail(error, ACRE_BAD_VALUE, "came before");
    s->listed = true;
    if (status == ACRE_OK) status = check_next(s, error);
    if (status == ACRE_OK)
      status = take_sampling(&unused, samplings ? samplings[i] : NULL, error);
    if (status != ACRE_OK) return of_session(i, status, error);
  }
  return ACRE_OK;
}

/* One pass for all sessions with a token that is not processed; what each is to choose from,
 * of the pass or from before, to desk->choices. */
static void catch_up_all(acre_session *const *sessions, int64_t count,
                         const acre_sampling *const *samplings) {
  acre_desk *d = sessions[0]->desk;
  float *logits = acre_desk_logits(d, d->sessions);
  int64_t rows = 0;
  for (int64_t i = 0; i < count; ++i) {
    acre_session *s = sessions[i];
    const acre_sampling *sampling = samplings ? samplings[i] : NULL;
    ask_for(&d->choices[i], s, s->logits, sampling);
    acre_ahead_drop(&s->ahead, s->model);
    if (!s->pending) continue;
    d->choices[i].logits = logits + rows * d->model->config.vocab_size;
    d->ids[rows] = s->history[s->history_count - 1];
    d->seats[rows++] = (acre_seat){s->prefix ? s->prefix->count : 0, s->prefix, &s->own};
    s->used += 1;
  }
  if (!rows) return;
  acre_pass pass = {.ids = d->ids,
                    .rows = rows,
                    .seats = d->seats,
                    .layers = d->model->config.layers,
                    .split = true};
  acre_forward(d->model, &d->ws, &pass);
  acre_head(d->model, &d->ws, logits, 0, rows);
}

static acre_status next_all(acre_session *const *sessions, int64_t count, int32_t *tokens,
                            const acre_sampling *const *samplings, acre_error *error) {
  ACRE_TRY(check_batch(sessions, count, samplings, error));
  catch_up_all(sessions, count, samplings);
  return choose(sessions, count, tokens, error);
}

acre_status acre_sessions_next(acre_session *const *sessions, int64_t count,
                               int32_t *tokens, const acre_sampling *const *samplings,
                               acre_error *error) {
  if (count < 1) {
    return acre_fail(error, ACRE_BAD_VALUE, "sessions: got %lld, expected one or more",
                     (long long)count);
  }
  for (int64_t i = 1; i < count; ++i) {
    if (sessions[i]->desk == sessions[0]->desk) continue;
    return acre_fail(error, ACRE_BAD_VALUE,
                     "sessions[%lld]: was not opened together with sessions[0]",
                     (long long)i);
  }
  ACRE_TRY(enter(sessions[0], error));
  return leave(sessions[0], next_all(sessions, count, tokens, samplings, error));
}
