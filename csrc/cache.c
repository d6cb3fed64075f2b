#include "cache.h"

#include "tensor.h"

#include <math.h>
#include <string.h>

acre_status acre_cache_new(acre_cache **out, acre_model *model, const acre_plan *plan,
                           acre_proxy proxy, const int32_t *ids, acre_error *error) {
  *out = NULL;
  acre_cache *cache = acre_alloc_zero(sizeof *cache);
  if (!cache) return acre_fail(error, ACRE_NO_MEMORY, "cache: out of memory");
  cache->references = 1;
  cache->model = acre_model_keep(model);
  cache->plan = *plan;
  cache->proxy = proxy;
  acre_l2_open(&cache->l2, model);
  cache->once = acre_mutex_new();
  cache->ids = acre_alloc((size_t)plan->n * sizeof *cache->ids);
  if (!cache->ids || !cache->once) {
    acre_cache_release(cache);
    return acre_fail(error, ACRE_NO_MEMORY, "cache: no memory for %lld ids",
                     (long long)plan->n);
  }
  memcpy(cache->ids, ids, (size_t)plan->n * sizeof *ids);
  *out = cache;
  return ACRE_OK;
}

void acre_cache_retain(acre_cache *cache) { atomic_fetch_add(&cache->references, 1); }

void acre_cache_release(acre_cache *cache) {
  if (!cache || atomic_fetch_sub(&cache->references, 1) != 1) return;
  acre_l2_close(&cache->l2);
  acre_timeline_close(&cache->resident);
  for (int i = 0; i < 6; ++i) acre_buffer_release(cache->stored[i]);
  if (cache->once) acre_mutex_free(cache->once);
  acre_free(cache->ids);
  acre_model_release(cache->model);
  acre_free(cache);
}

const acre_plan *acre_cache_plan(const acre_cache *cache) { return &cache->plan; }
acre_proxy acre_cache_proxy(const acre_cache *cache) { return cache->proxy; }
const int32_t *acre_cache_ids(const acre_cache *cache) { return cache->ids; }
int64_t acre_cache_closed_tokens(const acre_cache *cache) { return cache->plan.l2_tokens; }
int64_t acre_cache_pages(const acre_cache *cache) { return cache->l2.count; }

size_t acre_cache_bytes(const acre_cache *cache) {
  const acre_plan *plan = &cache->plan;
  return plan->l1_bytes + plan->l2_bytes + plan->recent_bytes;
}

/* ---------------------------------------------------------------- bias */

void acre_cache_fill_bias(const acre_model *model, acre_queue *queue,
                          acre_timeline *timeline, int64_t m, const acre_plan *plan) {
  if (!timeline->bias) return;
  float block[256], weight = (float)log((double)plan->weight);
  float *at = acre_buffer_data(timeline->bias);
  for (int64_t i = 0; i < ACRE_COUNT(block); ++i) block[i] = i < plan->sink ? 0 : weight;
  for (int64_t i = 0; i < m; i += ACRE_COUNT(block)) {
    int64_t rows = acre_min(m - i, ACRE_COUNT(block));
    model->backend->ops->upload(queue, at + i, block, (size_t)rows * sizeof *block);
    block[0] = weight;
  }
}

/* ---------------------------------------------------------------- views */

/* Rows of each part in a whole cache. */
static int64_t part_rows(const acre_plan *plan, int part) {
  if (part <= ACRE_L1_VALUES) return plan->m;
  return part <= ACRE_L2_VALUES ? plan->l2_tokens : plan->recent;
}

acre_status acre_cache_view_in_place(const acre_cache *cache, acre_part part, int64_t layer,
                                     int64_t page, acre_array *view, int64_t *first,
                                     acre_buffer **owner, acre_error *error) {
  const acre_model_config *c = &cache->model->config;
  bool l2 = part == ACRE_L2_KEYS || part == ACRE_L2_VALUES;
  int64_t pages = l2 ? cache->l2.count : 1;
  *owner = NULL;
  if ((int)part < ACRE_L1_KEYS || part > ACRE_RECENT_VALUES || layer < 0 ||
      layer >= c->layers || page < 0 || page >= pages) {
    return acre_fail(error, ACRE_BAD_VALUE,
                     "view: part %d, layer %lld, page %lld; the cache has 6 parts, %lld "
                     "layers, %lld pages",
                     (int)part, (long long)layer, (long long)page, (long long)c->layers,
                     (long long)pages);
  }
  bool values =
      part == ACRE_L1_VALUES || part == ACRE_L2_VALUES || part == ACRE_RECENT_VALUES;
  int64_t width = c->kv_heads * c->head_dim;
  *view = (acre_array){.dtype = c->dtype,
                       .ndim = 3,
                       .shape = {part_rows(&cache->plan, part), c->kv_heads, c->head_dim},
                       .strides = {width, c->head_dim, 1},
                       .on_device = cache->model->backend->apart};
  *first = 0;
  if (l2) {
    const acre_l2_page *at = &cache->l2.pages[page];
    view->shape[0] = at->tokens;
    view->data = acre_l2_at(&cache->l2, values ? ACRE_L2_VALUE : ACRE_L2_KEY, layer,
                            at->first, NULL);
    *first = at->first;
    view->on_device &= !at->on_host;
    *owner = values ? at->value_owner : at->key_owner;
  } else {
    const acre_timeline *resident;
    ACRE_TRY(acre_cache_resident(&resident, cache, error));
    int which = values ? ACRE_VALUES : ACRE_RAW;
    int64_t row = part <= ACRE_L1_VALUES ? 0 : cache->plan.m;
    view->data = acre_timeline_at(resident, which, layer, row);
    *owner = acre_timeline_buffer(resident, which, layer);
  }
  acre_buffer_retain(*owner);
  return ACRE_OK;
}

acre_status acre_cache_view(const acre_cache *cache, acre_part part, int64_t layer,
                            int64_t page, acre_array *view, int64_t *first,
                            acre_buffer **owner, acre_error *error) {
  ACRE_TRY(acre_cache_view_in_place(cache, part, layer, page, view, first, owner, error));
  if (!view->on_device) return ACRE_OK;
  acre_buffer *there = *owner;
  acre_status status = acre_engine_copy(cache->model->engine, view, true, owner, error);
  acre_buffer_release(there);
  return status;
}

/* ---------------------------------------------------------------- restoring */

static acre_status check_block(const acre_cache_parts *parts, const acre_plan *plan,
                               int part, const acre_model *model, acre_error *error) {
  static const char *const names[6] = {"l1_keys",   "l1_values",   "l2_keys",
                                       "l2_values", "recent_keys", "recent_values"};
  size_t unit = acre_dtype_size(model->config.dtype);
  size_t need =
      (size_t)(part_rows(plan, part) * model->config.layers) * acre_model_row_bytes(model);
  if (need == 0) return ACRE_OK;
  const acre_buffer *block = parts->blocks[part];
  size_t offset = parts->offsets[part];
  size_t have =
      block && acre_buffer_size(block) >= offset ? acre_buffer_size(block) - offset : 0;
  if (have < need || offset % unit) {
    return acre_fail(error, ACRE_BAD_SHAPE,
                     "%s: %zu bytes at offset %zu, expected %zu bytes at a multiple of %zu",
                     names[part], have, offset, need, unit);
  }
  return ACRE_OK;
}

static acre_status keep_blocks(acre_cache *cache, const acre_cache_parts *parts,
                               acre_error *error) {
  for (int part = 0; part < 6; ++part) {
    ACRE_TRY(check_block(parts, &cache->plan, part, cache->model, error));
    cache->stored[part] = parts->blocks[part];
    cache->stored_offset[part] = parts->offsets[part];
    if (parts->blocks[part]) acre_buffer_retain(parts->blocks[part]);
  }
  if (cache->plan.l2_tokens == 0) return ACRE_OK;
  acre_buffer *keys = parts->blocks[ACRE_L2_KEYS], *values = parts->blocks[ACRE_L2_VALUES];
  ACRE_TRY(acre_l2_add(&cache->l2, keys, parts->offsets[ACRE_L2_KEYS], values,
                       parts->offsets[ACRE_L2_VALUES], cache->plan.l2_tokens, true, error));
  acre_buffer_retain(keys);
  acre_buffer_retain(values);
  return ACRE_OK;
}

acre_status acre_cache_restore(acre_cache **out, acre_model *model,
                               const acre_cache_parts *parts, acre_error *error) {
  acre_plan plan;
  *out = NULL;
  if (!model->ready) return acre_fail(error, ACRE_BAD_STATE, "model: not ready");
  if (parts->options.interval < 1) {
    return acre_fail(error, ACRE_BAD_VALUE, "interval: got %lld, expected >= 1",
                     (long long)parts->options.interval);
  }
  acre_build_options options = parts->options;
  options.l2 = ACRE_PLACE_HOST; /* in a file, or wherever the caller's blocks are */
  ACRE_TRY(acre_plan_build(&plan, model, &options, parts->n, error));
  for (int64_t i = 0; i < parts->n; ++i) {
    if (parts->ids[i] >= 0 && parts->ids[i] < model->config.vocab_size) continue;
    return acre_fail(error, ACRE_BAD_VALUE, "ids[%lld]: got %d, the vocabulary has %lld",
                     (long long)i, (int)parts->ids[i], (long long)model->config.vocab_size);
  }
  acre_cache *cache;
  ACRE_TRY(acre_cache_new(&cache, model, &plan, parts->options.proxy, parts->ids, error));
  acre_status status = keep_blocks(cache, parts, error);
  if (status != ACRE_OK) {
    acre_cache_release(cache);
    return status;
  }
  *out = cache;
  return ACRE_OK;
}

/* Copies one layer's stored L1 and recent entries behind one another. */
static void fill_layer(acre_cache *cache, acre_queue *queue, int which, int64_t layer) {
  const acre_plan *plan = &cache->plan;
  const acre_backend_ops *ops = cache->model->backend->ops;
  size_t row = cache->resident.row_bytes;
  int parts[2] = {which == ACRE_RAW ? ACRE_L1_KEYS : ACRE_L1_VALUES,
                  which == ACRE_RAW ? ACRE_RECENT_KEYS : ACRE_RECENT_VALUES};
  acre_span spans[2];
  int64_t count = 0, at = 0;
  for (int i = 0; i < 2; ++i) {
    int64_t rows = part_rows(plan, parts[i]);
    if (rows == 0) continue;
    const char *block = acre_buffer_data(cache->stored[parts[i]]);
    block += cache->stored_offset[parts[i]] + (size_t)(layer * rows) * row;
    spans[count++] = (acre_span){block, at, rows};
    at += rows;
  }
  ops->copy_rows(queue, acre_timeline_at(&cache->resident, which, layer, 0), spans, count,
                 row);
}

static acre_status fill_resident(acre_cache *cache, acre_error *error) {
  const acre_model *model = cache->model;
  const acre_backend_ops *ops = model->backend->ops;
  const acre_plan *plan = &cache->plan;
  int64_t entries = plan->m + plan->recent;
  acre_queue *queue;
  ACRE_TRY(ops->mover_open(model->backend, &queue, error));
  acre_status status = acre_timeline_open(&cache->resident, model, entries, true,
                                          acre_plan_biased(plan), error);
  if (status == ACRE_OK) {
    for (int64_t layer = 0; layer < model->config.layers; ++layer) {
      fill_layer(cache, queue, ACRE_RAW, layer);
      fill_layer(cache, queue, ACRE_VALUES, layer);
      ops->rotate(queue, acre_timeline_at(&cache->resident, ACRE_ROTATED, layer, 0),
                  acre_timeline_at(&cache->resident, ACRE_RAW, layer, 0),
                  acre_buffer_data(model->cos), acre_buffer_data(model->sin), 0, entries,
                  &model->heads);
    }
    acre_cache_fill_bias(model, queue, &cache->resident, plan->m, plan);
    cache->resident.count = entries;
    status = ops->sync(queue, error);
    if (status != ACRE_OK) acre_timeline_close(&cache->resident);
  }
  ops->queue_close(queue);
  return status;
}

acre_status acre_cache_resident(const acre_timeline **out, const acre_cache *cache,
                                acre_error *error) {
  acre_cache *self = (acre_cache *)cache; /* the lazy part of an immutable value */
  acre_status status = ACRE_OK;
  if (!atomic_load_explicit(&self->resident_ready, memory_order_acquire)) {
    acre_mutex_lock(self->once);
    if (!self->resident_ready) status = fill_resident(self, error);
    if (status == ACRE_OK) {
      atomic_store_explicit(&self->resident_ready, true, memory_order_release);
    }
    acre_mutex_unlock(self->once);
  }
  *out = &self->resident;
  return status;
}
