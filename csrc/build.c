/* Building the bi-layer cache window by window (METHOD.md, section 3).
 *
 * Takes token ids; gives a frozen cache. Its one idea: everything a window may see lies in
 * one resident timeline, [L1 | middle | window], so that a window is read by ordinary
 * causal passes and then *closed*: its L2 entries move to a page of the L2 store, its new
 * L1 entries move up behind the earlier ones, and the rest of the timeline is free again.
 * Working memory is therefore one window, however long the text.
 *
 * Where L2 lies on the host, a closed window's entries are gathered in one page on the device,
 * the outbox, and a second queue copies it to pinned memory while the next window is read.
 *
 *   resident.count == plan.m (so far) + middle + entries of the open window
 */
#include "cache.h"
#include "loss.h"

#include <math.h>
#include <string.h>

struct acre_builder {
  atomic_flag busy;
  acre_model *model;
  acre_cache *cache; /* what is being built: ids, L2 so far; resident only at the end */
  acre_nested nested;
  acre_workspace ws;
  acre_timeline resident;
  int64_t tokens;       /* n */
  int64_t first;        /* token that this builder began with */
  int64_t read;         /* tokens read */
  int64_t window_start; /* first token of the open window */
  int64_t m;            /* L1 entries so far */
  int64_t middle;       /* L2 entries between L1 and the open window */
  int32_t *nested_ids;  /* [ws.rows] */
  acre_span *spans;     /* enough for any one move */
  const void **pool;    /* [groups of a window * l] row pointers; pooled proxies only */
  acre_buffer *staging; /* [groups of a window] rows; trained proxies only */
  acre_queue *beside;   /* takes pages to the host; NULL: L2 stays on the device */
  acre_buffer *outbox;  /* the page on its way there, on the device */
  acre_loss loss;       /* open where losses are kept */
  float *losses;        /* [n], NULL: not kept */
  float *row_loss;      /* [ws.rows] */
  int32_t *targets;     /* [ws.rows] */
  bool spent;
};

static acre_status enter(acre_builder *b, acre_error *error) {
  if (!atomic_flag_test_and_set(&b->busy)) return ACRE_OK;
  return acre_fail(error, ACRE_BUSY, "builder: in use on another thread");
}

static acre_status leave(acre_builder *b, acre_status status) {
  atomic_flag_clear(&b->busy);
  return status;
}

/* ---------------------------------------------------------------- moving entries */

static void copy_rows(acre_builder *b, int which, int64_t layer, int64_t dst_row,
                      const acre_span *spans, int64_t count) {
  b->model->backend->ops->copy_rows(b->ws.queue,
                                    acre_timeline_at(&b->resident, which, layer, dst_row),
                                    spans, count, b->resident.row_bytes);
}

static void rotate(acre_builder *b, acre_timeline *timeline, int64_t layer, int64_t first,
                   int64_t rows) {
  b->model->backend->ops->rotate(
      b->ws.queue, acre_timeline_at(timeline, ACRE_ROTATED, layer, first),
      acre_timeline_at(timeline, ACRE_RAW, layer, first), acre_buffer_data(b->model->cos),
      acre_buffer_data(b->model->sin), first, rows, &b->model->heads);
}

/* Puts the last `rows` L2 entries of closed windows behind the L1 entries. The open window
 * must be empty. */
static void set_middle(acre_builder *b, int64_t rows) {
  const acre_l2 *l2 = &b->cache->l2;
  for (int64_t layer = 0; rows && layer < b->resident.layers; ++layer) {
    for (int which = 0; which < 2; ++which) {
      int64_t count = acre_l2_spans(b->spans, l2, which, layer, l2->tokens - rows, rows, 0);
      copy_rows(b, which ? ACRE_VALUES : ACRE_RAW, layer, b->m, b->spans, count);
    }
    rotate(b, &b->resident, layer, b->m, rows);
  }
  b->middle = rows;
  b->resident.count = b->m + rows;
}

/* ---------------------------------------------------------------- closing a window */

/* Spans of the open window's L2 entries (l1 false), or of its L1 entries, counted from the
 * start of the timeline's buffer. Token i of the window lies at row i + L1 tokens before. */
static int64_t window_spans(acre_builder *b, const char *base, bool l1) {
  int64_t l = b->nested.interval, row = b->m + b->middle, count = 0, dst = 0;
  size_t bytes = b->resident.row_bytes;
  for (int64_t i = b->window_start; i < b->read;) {
    int64_t run = acre_min(b->read, (i / l + 1) * l) - i;
    bool ends_group = b->nested.l1_tokens && (i + run) % l == 0;
    if (!l1) b->spans[count++] = (acre_span){base + (size_t)row * bytes, dst, run};
    row += run;
    if (l1 && ends_group) {
      b->spans[count++] = (acre_span){base + (size_t)row * bytes, dst, 1};
    }
    row += ends_group;
    dst += l1 ? ends_group : run;
    i += run;
  }
  return count;
}

/* A page for the window's L2 entries, of which its keys take `half` bytes; *to is where they are
 * gathered: there, or in the outbox, once the page before has left it. Memory of the host is
 * allocated, which takes a while, when the window is under way on the device. */
static acre_status open_page(acre_builder *b, char **to, size_t half, int64_t tokens,
                             acre_error *error) {
  acre_backend *backend = b->model->backend;
  const acre_backend_ops *ops = backend->ops;
  bool host = b->beside != NULL;
  acre_buffer *page;
  ACRE_TRY((host ? ops->alloc_host : ops->alloc)(backend, &page, 2 * half, error));
  acre_status status = acre_l2_add(&b->cache->l2, page, 0, page, half, tokens, host, error);
  if (status != ACRE_OK) {
    acre_buffer_release(page);
    return status;
  }
  acre_buffer_retain(page); /* one for the keys, one for the values */
  *to = acre_buffer_data(host ? b->outbox : page);
  if (!host) return ACRE_OK;
  ops->follow(b->ws.queue, b->beside);
  acre_l2_last_at(&b->cache->l2, *to, *to + half);
  return ACRE_OK;
}

/* Sends the page in the outbox to its own memory. */
static void send_page(acre_builder *b) {
  if (!b->beside) return;
  const acre_backend_ops *ops = b->model->backend->ops;
  const acre_l2_page *page = &b->cache->l2.pages[b->cache->l2.count - 1];
  int64_t rows = b->resident.layers * page->tokens;
  size_t row = b->resident.row_bytes;
  char *own = acre_buffer_data(page->key_owner);
  acre_span all = {acre_buffer_data(b->outbox), 0, 2 * rows};
  ops->follow(b->beside, b->ws.queue);
  ops->copy_rows(b->beside, own, &all, 1, row);
  acre_l2_last_at(&b->cache->l2, own, own + (size_t)rows * row);
}

/* Moves the window's L2 entries into a page of their own. */
static acre_status move_l2(acre_builder *b, acre_error *error) {
  const acre_backend_ops *ops = b->model->backend->ops;
  int64_t tokens = b->read - b->window_start, layers = b->resident.layers;
  size_t row = b->resident.row_bytes, half = (size_t)(layers * tokens) * row;
  char *page;
  ACRE_TRY(open_page(b, &page, half, tokens, error));
  for (int64_t layer = 0; layer < layers; ++layer) {
    for (int which = 0; which < 2; ++which) {
      const char *base =
          acre_timeline_at(&b->resident, which ? ACRE_VALUES : ACRE_RAW, layer, 0);
      char *to = page + (which ? half : 0) + (size_t)(layer * tokens) * row;
      ops->copy_rows(b->ws.queue, to, b->spans, window_spans(b, base, false), row);
    }
  }
  return ACRE_OK;
}

/* The new L1 entries of one layer, from the window's L1 tokens. They may overlap the place
 * they go to, hence the staging. */
static void move_l1_tokens(acre_builder *b, int64_t layer, int which) {
  const acre_backend_ops *ops = b->model->backend->ops;
  const char *base = acre_timeline_at(&b->resident, which, layer, 0);
  char *staging = acre_buffer_data(b->staging);
  int64_t count = window_spans(b, base, true);
  ops->copy_rows(b->ws.queue, staging, b->spans, count, b->resident.row_bytes);
  acre_span all = {staging, 0, count};
  copy_rows(b, which, layer, b->m, &all, 1);
}

/* The new L1 entries of one layer, as means of their groups (training-free proxies). */
static void pool_groups(acre_builder *b, int64_t layer, int which, int64_t groups) {
  const acre_model_config *c = &b->model->config;
  int64_t first = b->m * b->nested.interval, rows = groups * b->nested.interval;
  int part = which == ACRE_RAW ? ACRE_L2_KEY : ACRE_L2_VALUE;
  for (int64_t i = 0; i < rows;) {
    int64_t run;
    const char *at = acre_l2_at(&b->cache->l2, part, layer, first + i, &run);
    for (run = acre_min(run, rows - i); run > 0; --run, at += b->resident.row_bytes) {
      b->pool[i++] = at;
    }
  }
  b->model->backend->ops->pool(
      b->ws.queue, acre_timeline_at(&b->resident, which, layer, b->m), b->pool, groups,
      b->nested.interval, c->kv_heads * c->head_dim, c->dtype);
}

/* The first token in the place of L1 entry 0. Heads with nothing to look for attend to it: it
 * vanishes in a mean, and L1 tokens stand for it only as far as they were trained to. */
static void keep_sink(acre_builder *b, int64_t layer, int which) {
  int64_t run;
  int part = which == ACRE_RAW ? ACRE_L2_KEY : ACRE_L2_VALUE;
  acre_span sink = {acre_l2_at(&b->cache->l2, part, layer, 0, &run), 0, 1};
  copy_rows(b, which, layer, 0, &sink, 1);
}

static acre_status close_window(acre_builder *b, acre_error *error) {
  const acre_backend_ops *ops = b->model->backend->ops;
  ACRE_TRY(move_l2(b, error));
  int64_t groups = b->read / b->nested.interval - b->m;
  for (int64_t layer = 0; groups && layer < b->resident.layers; ++layer) {
    for (int which = ACRE_RAW; which <= ACRE_VALUES; which += ACRE_VALUES) {
      if (b->nested.l1_tokens) {
        move_l1_tokens(b, layer, which);
      } else {
        pool_groups(b, layer, which, groups);
      }
      if (!b->m && b->cache->plan.sink) keep_sink(b, layer, which);
    }
    rotate(b, &b->resident, layer, b->m, groups);
  }
  b->m += groups;
  b->window_start = b->read;
  acre_cache_fill_bias(b->model, b->ws.queue, &b->resident, b->m, &b->cache->plan);
  set_middle(b, acre_min(b->cache->plan.carry, b->cache->l2.tokens));
  send_page(b); /* all above reads it where it was gathered */
  return ops->sync(b->ws.queue, error);
}

/* ---------------------------------------------------------------- reading */

/* Tokens [read, read + taken) whose nested form fits the workspace. */
static int64_t tokens_that_fit(const acre_builder *b, int64_t end) {
  int64_t taken = acre_min(end - b->read, b->ws.rows);
  while (acre_nested_length(&b->nested, b->read, b->read + taken) > b->ws.rows) --taken;
  return taken;
}

/* A window that has all its tokens and waits to be closed. */
static bool window_full(const acre_builder *b) {
  return b->read > b->window_start &&
         b->read == acre_nested_window_end(&b->nested, b->window_start);
}

/* Losses of the tokens that the last pass's rows predict: a row predicts the entry behind it,
 * where that is a token of the text. The pass held tokens [read, read + taken). */
static void measure(acre_builder *b, int64_t rows, int64_t taken) {
  int32_t l1_id = (int32_t)b->model->config.vocab_size;
  int64_t n = b->cache->plan.n, next = b->read + taken;
  int32_t after = next < n ? b->cache->ids[next] : -1;
  for (int64_t i = 0; i < rows; ++i) {
    int32_t id = i + 1 < rows ? b->nested_ids[i + 1] : after;
    b->targets[i] = id == l1_id && b->nested.l1_tokens ? -1 : id;
  }
  acre_loss_run(&b->loss, b->row_loss, b->targets, b->model, &b->ws, rows);
  for (int64_t i = 0, token = b->read + 1; i < rows; ++i) {
    if (b->targets[i] >= 0) b->losses[token++] = b->row_loss[i];
  }
}

/* To the end of the open window or of the text. A failure leaves a window that the next call
 * goes on with. */
static acre_status read_window(acre_builder *b, acre_error *error) {
  int64_t end =
      acre_min(acre_nested_window_end(&b->nested, b->window_start), b->cache->plan.n);
  while (b->read < end) {
    int64_t taken = tokens_that_fit(b, end);
    acre_nested_fill(&b->nested, b->nested_ids, b->cache->ids + b->read, b->read,
                     b->read + taken, (int32_t)b->model->config.vocab_size);
    acre_pass pass = {.ids = b->nested_ids,
                      .rows = acre_nested_length(&b->nested, b->read, b->read + taken),
                      .own = &b->resident,
                      .layers = b->model->config.layers,
                      .keys_only = !b->losses};
    acre_forward(b->model, &b->ws, &pass);
    if (b->losses) measure(b, pass.rows, taken);
    b->read += taken;
  }
  return window_full(b) ? close_window(b, error)
                        : b->model->backend->ops->sync(b->ws.queue, error);
}

acre_status acre_builder_step(acre_builder *b, int64_t *done, int64_t *total,
                              acre_error *error) {
  ACRE_TRY(enter(b, error));
  acre_status status = b->spent
                           ? acre_fail(error, ACRE_BAD_STATE, "builder: already frozen")
                           : read_window(b, error);
  if (done) *done = b->read;
  if (total) *total = b->cache->plan.n;
  return leave(b, status);
}

acre_status acre_builder_keep_losses(acre_builder *b, acre_error *error) {
  ACRE_TRY(enter(b, error));
  acre_status status = ACRE_OK;
  int64_t n = b->cache->plan.n;
  if (b->spent || b->losses || b->read != b->first) {
    status = acre_fail(error, ACRE_BAD_STATE, "losses: ask for them before reading");
  } else {
    status = acre_loss_open(&b->loss, b->model, error);
  }
  if (status != ACRE_OK) return leave(b, status);
  b->row_loss = acre_alloc((size_t)b->ws.rows * sizeof *b->row_loss);
  b->targets = acre_alloc((size_t)b->ws.rows * sizeof *b->targets);
  b->losses = b->row_loss && b->targets ? acre_alloc((size_t)n * sizeof *b->losses) : NULL;
  if (!b->losses) {
    return leave(b, acre_fail(error, ACRE_NO_MEMORY, "losses: out of memory"));
  }
  for (int64_t i = 0; i < n; ++i) b->losses[i] = NAN;
  return leave(b, ACRE_OK);
}

acre_status acre_builder_losses(float *losses, acre_builder *b, acre_error *error) {
  ACRE_TRY(enter(b, error));
  if (!b->losses) {
    return leave(b, acre_fail(error, ACRE_BAD_STATE, "losses: were not asked for"));
  }
  memcpy(losses, b->losses, (size_t)b->tokens * sizeof *losses);
  return leave(b, ACRE_OK);
}

int64_t acre_builder_tokens(const acre_builder *b) { return b->tokens; }

/* ---------------------------------------------------------------- freezing */

/* One layer of the frozen resident timeline: [L1 | orphans | open window]. */
static void freeze_layer(acre_builder *b, acre_timeline *to, int64_t layer) {
  const acre_plan *plan = &b->cache->plan;
  const acre_backend_ops *ops = b->model->backend->ops;
  int64_t orphans = acre_plan_orphans(plan);
  int64_t open = b->resident.count - b->m - b->middle;
  for (int which = 0; which < 2; ++which) {
    int part = which ? ACRE_VALUES : ACRE_RAW;
    int64_t count = 0;
    if (b->m) {
      b->spans[count++] =
          (acre_span){acre_timeline_at(&b->resident, part, layer, 0), 0, b->m};
    }
    count += acre_l2_spans(b->spans + count, &b->cache->l2, which, layer,
                           plan->l2_tokens - orphans, orphans, b->m);
    if (open) {
      b->spans[count++] =
          (acre_span){acre_timeline_at(&b->resident, part, layer, b->m + b->middle),
                      b->m + orphans, open};
    }
    ops->copy_rows(b->ws.queue, acre_timeline_at(to, part, layer, 0), b->spans, count,
                   b->resident.row_bytes);
  }
  rotate(b, to, layer, 0, to->capacity);
}

static acre_status freeze(acre_builder *b, acre_cache **out, acre_error *error) {
  if (b->spent || b->read != b->cache->plan.n || window_full(b)) {
    return acre_fail(error, ACRE_BAD_STATE, "freeze: %lld of %lld tokens read%s",
                     (long long)b->read, (long long)b->cache->plan.n,
                     b->spent ? ", and already frozen" : "");
  }
  acre_cache *cache = b->cache;
  const acre_backend_ops *ops = b->model->backend->ops;
  acre_timeline frozen;
  ACRE_TRY(acre_timeline_begin(&frozen, b->model, b->m + cache->plan.recent,
                               acre_plan_biased(&cache->plan), error));
  if (b->beside) ops->follow(b->ws.queue, b->beside);
  acre_status status = ACRE_OK;
  for (int64_t layer = 0; status == ACRE_OK && layer < frozen.layers; ++layer) {
    status = acre_timeline_open_layer(&frozen, b->model, layer, true, error);
    if (status != ACRE_OK) break;
    b->spent = true;
    freeze_layer(b, &frozen, layer);
    status = ops->sync(b->ws.queue, error);
    for (int which = 0; which < 3; ++which) { /* so that both never exist in full */
      acre_buffer **buffer = &b->resident.buffers[which * frozen.layers + layer];
      acre_buffer_release(*buffer);
      *buffer = NULL;
    }
  }
  if (status == ACRE_OK) {
    acre_cache_fill_bias(b->model, b->ws.queue, &frozen, b->m, &cache->plan);
    status = ops->sync(b->ws.queue, error);
  }
  if (!b->spent) { /* there was no memory for the first layer: it may be tried again */
    acre_timeline_close(&frozen);
    return status;
  }
  frozen.count = frozen.capacity;
  cache->resident = frozen;
  if (status != ACRE_OK) return status;
  atomic_store(&cache->resident_ready, true);
  acre_cache_retain(cache);
  *out = cache;
  return ACRE_OK;
}

acre_status acre_builder_freeze(acre_builder *b, acre_cache **out, acre_error *error) {
  *out = NULL;
  ACRE_TRY(enter(b, error));
  return leave(b, freeze(b, out, error));
}

/* ---------------------------------------------------------------- opening */

static acre_status check_ids(const acre_model *model, const int32_t *ids, int64_t n,
                             acre_error *error) {
  for (int64_t i = 0; i < n; ++i) {
    if (ids[i] < 0 || ids[i] >= model->config.vocab_size) {
      return acre_fail(error, ACRE_BAD_VALUE, "ids[%lld]: got %d, the vocabulary has %lld",
                       (long long)i, (int)ids[i], (long long)model->config.vocab_size);
    }
  }
  return ACRE_OK;
}

/* Pages that the text before has are shared with it: they are not needed again. */
static acre_status check_memory(acre_backend *backend, const acre_plan *plan,
                                const acre_cache *from, acre_error *error) {
  bool host = plan->l2 == ACRE_PLACE_HOST;
  size_t shared = from ? from->plan.l2_bytes : 0, l2 = plan->l2_bytes - shared;
  size_t needed = plan->peak_bytes - (host ? 0 : shared);
  size_t available = backend->ops->available(backend);
  if (available && needed > available) {
    return acre_fail(
        error, ACRE_NO_MEMORY,
        "build: %lld tokens need %zu bytes of %s memory (%zu of them L2), %zu "
        "are available%s",
        (long long)plan->n, needed, backend->apart ? "device" : "host", host ? 0 : l2,
        available, backend->apart && !host ? "; l2=\"host\" puts L2 into host memory" : "");
  }
  available = host ? acre_memory_available() : 0;
  if (!available || l2 <= available) return ACRE_OK;
  return acre_fail(error, ACRE_NO_MEMORY,
                   "build: %lld tokens need %zu bytes of host memory for L2, %zu are "
                   "available",
                   (long long)plan->n, l2, available);
}

static acre_status open_outbox(acre_builder *b, acre_error *error) {
  acre_backend *backend = b->model->backend;
  size_t bytes = acre_plan_page_bytes(&b->cache->plan, b->model);
  ACRE_TRY(backend->ops->alloc(backend, &b->outbox, bytes, error));
  return backend->ops->mover_open(backend, &b->beside, error);
}

static acre_status open_scratch(acre_builder *b, acre_error *error) {
  const acre_plan *plan = &b->cache->plan;
  acre_proxy proxy = b->cache->proxy;
  int64_t longest = acre_nested_longest(&b->nested, plan->n);
  int64_t groups = acre_plan_groups(plan, proxy);
  ACRE_TRY(
      acre_workspace_open(&b->ws, b->model, acre_plan_rows(plan, proxy, b->model), error));
  ACRE_TRY(acre_timeline_open(&b->resident, b->model, acre_plan_capacity(plan, proxy), true,
                              acre_plan_biased(plan), error));
  if (plan->l2 == ACRE_PLACE_HOST) ACRE_TRY(open_outbox(b, error));
  if (b->nested.l1_tokens) {
    ACRE_TRY(b->model->backend->ops->alloc(b->model->backend, &b->staging,
                                           (size_t)groups * b->resident.row_bytes, error));
  } else {
    b->pool = acre_alloc((size_t)(groups * plan->interval) * sizeof *b->pool);
  }
  /* Most spans: one per group and one per page that carry, orphans or thawing touch. */
  int64_t spans = longest + groups + plan->carry + plan->interval + 4;
  b->spans = acre_alloc((size_t)spans * sizeof *b->spans);
  b->nested_ids = acre_alloc((size_t)b->ws.rows * sizeof *b->nested_ids);
  if (!b->spans || !b->nested_ids || (!b->pool && !b->nested.l1_tokens)) {
    return acre_fail(error, ACRE_NO_MEMORY, "builder: out of memory");
  }
  return ACRE_OK;
}

/* Continues `from`: its L1 entries, and `keep` - closed tokens of its open window. */
static acre_status thaw(acre_builder *b, const acre_cache *from, int64_t keep,
                        acre_error *error) {
  const acre_timeline *old;
  ACRE_TRY(acre_cache_resident(&old, from, error));
  ACRE_TRY(acre_l2_share(&b->cache->l2, &from->l2, error));
  b->m = from->plan.m;
  b->window_start = from->plan.l2_tokens;
  for (int64_t layer = 0; b->m && layer < old->layers; ++layer) {
    for (int which = 0; which < 3; ++which) {
      acre_span span = {acre_timeline_at(old, which, layer, 0), 0, b->m};
      copy_rows(b, which, layer, 0, &span, 1);
    }
  }
  acre_cache_fill_bias(b->model, b->ws.queue, &b->resident, b->m, &from->plan);
  set_middle(b, acre_min(from->plan.carry, b->cache->l2.tokens));
  int64_t open = acre_nested_length(&b->nested, b->window_start, keep);
  int64_t old_row = b->m + acre_plan_orphans(&from->plan), row = b->resident.count;
  for (int64_t layer = 0; open && layer < old->layers; ++layer) {
    for (int which = ACRE_RAW; which <= ACRE_VALUES; which += ACRE_VALUES) {
      acre_span span = {acre_timeline_at(old, which, layer, old_row), 0, open};
      copy_rows(b, which, layer, row, &span, 1);
    }
    rotate(b, &b->resident, layer, row, open);
  }
  b->resident.count += open;
  b->read = b->first = keep;
  return b->model->backend->ops->sync(b->ws.queue, error);
}

static acre_status open_builder(acre_builder *b, const acre_plan *plan, acre_proxy proxy,
                                const acre_cache *from, int64_t keep, const int32_t *ids,
                                acre_error *error) {
  ACRE_TRY(check_memory(b->model->backend, plan, from, error));
  b->nested = acre_plan_nested(plan, proxy);
  b->tokens = plan->n;
  ACRE_TRY(acre_cache_new(&b->cache, b->model, plan, proxy, ids, error));
  ACRE_TRY(open_scratch(b, error));
  return from ? thaw(b, from, keep, error) : ACRE_OK;
}

static acre_status check_continuation(const acre_model *model, const acre_cache *from,
                                      int64_t keep, const acre_build_options *given,
                                      acre_error *error) {
  if (from->model != model) {
    return acre_fail(error, ACRE_BAD_VALUE, "from: a cache of another model");
  }
  if (given) {
    return acre_fail(error, ACRE_BAD_VALUE, "options: a continuation keeps those it has");
  }
  if (keep < from->plan.l2_tokens || keep > from->plan.n) {
    return acre_fail(error, ACRE_BAD_VALUE, "keep: got %lld, expected %lld to %lld",
                     (long long)keep, (long long)from->plan.l2_tokens,
                     (long long)from->plan.n);
  }
  return ACRE_OK;
}

acre_status acre_builder_open(acre_builder **out, acre_model *model,
                              const acre_build_options *given, const acre_cache *from,
                              int64_t keep, const int32_t *ids, int64_t n,
                              acre_error *error) {
  acre_build_options options;
  ACRE_TAKE_OPTIONS(options, acre_build_options_default(), given);
  *out = NULL;
  if (!model->ready) return acre_fail(error, ACRE_BAD_STATE, "model: not ready");
  if (n < 1)
    return acre_fail(error, ACRE_BAD_VALUE, "ids: empty, expected a token or more");
  ACRE_TRY(check_ids(model, ids, n, error));
  if (from) {
    const acre_plan *p = &from->plan;
    ACRE_TRY(check_continuation(model, from, keep, given, error));
    options = (acre_build_options){sizeof options, from->proxy, p->interval, p->window,
                                   p->stride,      p->carry,    p->eta,      p->reserve,
                                   p->weight,      p->sink,     p->l2};
  }
  int64_t kept = from ? keep : 0;
  acre_plan plan;
  ACRE_TRY(acre_plan_build(&plan, model, &options, kept + n, error));
  acre_builder *b = acre_alloc_zero(sizeof *b);
  int32_t *all = acre_alloc((size_t)plan.n * sizeof *all);
  acre_status status = ACRE_OK;
  if (!b || !all) status = acre_fail(error, ACRE_NO_MEMORY, "builder: out of memory");
  if (status == ACRE_OK) {
    atomic_flag_clear(&b->busy);
    b->model = acre_model_keep(model);
    if (kept) memcpy(all, from->ids, (size_t)kept * sizeof *all);
    memcpy(all + kept, ids, (size_t)n * sizeof *all);
    status = open_builder(b, &plan, options.proxy, from, keep, all, error);
  }
  acre_free(all);
  if (status != ACRE_OK) {
    acre_builder_release(b);
    return status;
  }
  *out = b;
  return ACRE_OK;
}

void acre_builder_release(acre_builder *b) {
  if (!b) return;
  if (b->model) {
    acre_workspace_close(&b->ws, b->model); /* both wait: then nobody uses what goes */
    b->model->backend->ops->queue_close(b->beside);
    acre_timeline_close(&b->resident);
    acre_buffer_release(b->staging);
    acre_buffer_release(b->outbox);
    acre_loss_close(&b->loss);
    acre_cache_release(b->cache);
    acre_model_release(b->model);
  }
  acre_free(b->spans);
  acre_free(b->pool);
  acre_free(b->nested_ids);
  acre_free(b->losses);
  acre_free(b->row_loss);
  acre_free(b->targets);
  acre_free(b);
}
