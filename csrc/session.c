/* A session: the only file that sees all stages. One question of one cache, or one plain
 * generation: score, refill, prefill, then token by token.
 *
 * Before refilling, a session over a cache stands behind the cache's resident timeline
 * (prefix); afterwards it has spliced that into its own. The cache is only ever read. */
#include "decode.h"
#include "refill.h"
#include "score.h"

#include <string.h>

struct acre_session {
  atomic_flag busy;
  acre_model *model;
  acre_cache *cache;           /* nullable */
  const acre_timeline *prefix; /* the cache's resident entries, or NULL */
  acre_workspace ws;
  acre_timeline own;
  acre_queue *beside; /* splices L2 that lies on the host; NULL until that is asked for */
  acre_refill refill; /* under way until the first pass behind it has met every layer */
  int64_t capacity;   /* query + answer tokens */
  int64_t used;       /* query + answer tokens in the timeline */
  int32_t *history;   /* [capacity + 1] query and answer ids, the pending one included */
  int64_t history_count;
  bool has_logits; /* logits of the last row are in the workspace */
  bool pending;    /* the last of history is chosen but not processed */
  uint64_t step;   /* draws so far */
  float *logits;   /* host [vocab] */
  uint8_t *seen;   /* host [vocab] */
  acre_candidate *candidates;
};

static acre_status enter(acre_session *s, acre_error *error) {
  if (!atomic_flag_test_and_set(&s->busy)) return ACRE_OK;
  return acre_fail(error, ACRE_BUSY, "session: in use on another thread");
}

static acre_status leave(acre_session *s, acre_status status) {
  atomic_flag_clear(&s->busy);
  return status;
}

/* ---------------------------------------------------------------- life */

static acre_status open_session(acre_session *s, acre_error *error) {
  if (s->cache) ACRE_TRY(acre_cache_resident(&s->prefix, s->cache, error));
  int64_t vocab = s->model->config.vocab_size;
  int64_t rows = acre_min(s->model->backend->rows_max, s->capacity);
  ACRE_TRY(acre_workspace_open(&s->ws, s->model, rows, error));
  ACRE_TRY(acre_timeline_open(&s->own, s->model, s->capacity, false, false, error));
  s->history = acre_alloc((size_t)(s->capacity + 1) * sizeof *s->history);
  s->logits = acre_alloc((size_t)vocab * sizeof *s->logits);
  s->seen = acre_alloc_zero((size_t)vocab);
  s->candidates = acre_alloc((size_t)vocab * sizeof *s->candidates);
  if (!s->history || !s->logits || !s->seen || !s->candidates) {
    return acre_fail(error, ACRE_NO_MEMORY, "session: out of memory");
  }
  return ACRE_OK;
}

acre_status acre_session_open(acre_session **out, acre_model *model, acre_cache *cache,
                              int64_t capacity, acre_error *error) {
  *out = NULL;
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
  acre_session *s = acre_alloc_zero(sizeof *s);
  if (!s) return acre_fail(error, ACRE_NO_MEMORY, "session: out of memory");
  atomic_flag_clear(&s->busy);
  s->model = acre_model_keep(model);
  s->cache = cache;
  if (cache) acre_cache_retain(cache);
  s->capacity = capacity;
  acre_status status = open_session(s, error);
  if (status != ACRE_OK) {
    acre_session_release(s);
    return status;
  }
  *out = s;
  return ACRE_OK;
}

void acre_session_release(acre_session *s) {
  if (!s) return;
  acre_workspace_close(&s->ws, s->model); /* both wait: then nobody uses what goes */
  s->model->backend->ops->queue_close(s->beside);
  acre_refill_close(&s->refill);
  acre_timeline_close(&s->own);
  acre_free(s->history);
  acre_free(s->logits);
  acre_free(s->seen);
  acre_free(s->candidates);
  acre_cache_release(s->cache);
  acre_model_release(s->model);
  acre_free(s);
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
  for (int64_t i = 0; i < t; i += s->ws.rows) {
    scoring->offset = i;
    acre_pass pass = {.ids = ids + i,
                      .rows = acre_min(t - i, s->ws.rows),
                      .first_position = scoring->resident->count,
                      .prefix = scoring->resident,
                      .own = own,
                      .layers = layers,
                      .split = true,
                      .keys_only = true,
                      .probe = acre_scoring_probe(scoring)};
    acre_forward(s->model, &s->ws, &pass);
  }
  return s->model->backend->ops->sync(s->ws.queue, error);
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
                          .queue = s->ws.queue,
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
      s->model->backend->ops->download(s->ws.queue, scores,
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
  s->model->backend->ops->follow(s->ws.queue, s->beside);
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
  acre_queue *queue = beside ? s->beside : s->ws.queue;
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
    acre_head(s->model, &s->ws, block, i, count);
    s->model->backend->ops->download(s->ws.queue, host + i * vocab, block,
                                     (size_t)(count * vocab) * sizeof *host);
  }
}

static void run(acre_session *s, const int32_t *ids, int64_t t, float *host, float *block) {
  int64_t vocab = s->model->config.vocab_size;
  for (int64_t i = 0; i < t; i += s->ws.rows) {
    int64_t rows = acre_min(t - i, s->ws.rows);
    acre_pass pass = {.ids = ids + i,
                      .rows = rows,
                      .first_position = s->prefix ? s->prefix->count : 0,
                      .prefix = s->prefix,
                      .own = &s->own,
                      .layers = s->model->config.layers,
                      .split = true};
    if (acre_refill_under_way(&s->refill)) pass.arrival = (acre_arrival){arrive, s};
    acre_forward(s->model, &s->ws, &pass);
    acre_refill_close(&s->refill);
    if (i + rows == t) acre_head(s->model, &s->ws, s->ws.logits, rows - 1, 1);
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
  acre_status status = ops->sync(s->ws.queue, error);
  acre_buffer_release(block);
  return status;
}

acre_status acre_session_prefill(acre_session *s, const int32_t *ids, int64_t t,
                                 float *logits, acre_error *error) {
  ACRE_TRY(enter(s, error));
  return leave(s, prefill(s, ids, t, logits, error));
}

/* Processes the token chosen last; afterwards the logits are those of the next one. */
static acre_status catch_up(acre_session *s, acre_error *error) {
  if (!s->pending) {
    if (s->has_logits) return ACRE_OK;
    return acre_fail(error, ACRE_BAD_STATE, "session: prefill comes first");
  }
  ACRE_TRY(check_room(s, 1, error));
  run(s, &s->history[s->history_count - 1], 1, NULL, NULL);
  s->pending = false;
  return s->model->backend->ops->sync(s->ws.queue, error);
}

static void fetch_logits(acre_session *s, float *host) {
  s->model->backend->ops->download(s->ws.queue, host, s->ws.logits,
                                   (size_t)s->model->config.vocab_size * sizeof *host);
}

static acre_status next(acre_session *s, int32_t *token, const acre_sampling *given,
                        acre_error *error) {
  acre_sampling sampling;
  ACRE_TAKE_OPTIONS(sampling, acre_sampling_default(), given);
  ACRE_TRY(acre_sampling_check(&sampling, error));
  ACRE_TRY(catch_up(s, error));
  fetch_logits(s, s->logits);
  if (sampling.repetition_penalty != 1) {
    acre_penalize(s->logits, s->seen, s->history, s->history_count,
                  sampling.repetition_penalty);
  }
  *token = acre_sample(s->logits, s->candidates, s->model->config.vocab_size, &sampling,
                       s->step++);
  s->history[s->history_count++] = *token;
  s->pending = true;
  return ACRE_OK;
}

acre_status acre_session_next(acre_session *s, int32_t *token, const acre_sampling *given,
                              acre_error *error) {
  ACRE_TRY(enter(s, error));
  return leave(s, next(s, token, given, error));
}

acre_status acre_session_logits(acre_session *s, float *logits, acre_error *error) {
  ACRE_TRY(enter(s, error));
  acre_status status = catch_up(s, error);
  if (status == ACRE_OK) fetch_logits(s, logits);
  return leave(s, status);
}
