#include "refill.h"

#include <math.h>
#include <string.h>

acre_status acre_refill_check(const acre_cache *cache, const int32_t *groups, int64_t k,
                              bool per_layer, acre_error *error) {
  int64_t m = cache->plan.m, lists = per_layer ? cache->model->config.layers : 1;
  if (k < 0 || k > m) {
    return acre_fail(error, ACRE_BAD_VALUE, "groups: got %lld, the cache has m = %lld",
                     (long long)k, (long long)m);
  }
  for (int64_t list = 0; list < lists; ++list) {
    int64_t before = -1;
    for (int64_t i = 0; i < k; ++i) {
      int64_t group = groups[list * k + i];
      if (group <= before || group >= m) {
        return acre_fail(error, ACRE_BAD_VALUE,
                         "groups: %lld after %lld, expected ascending groups below %lld",
                         (long long)group, (long long)before, (long long)m);
      }
      before = group;
    }
  }
  return ACRE_OK;
}

/* Spans of one layer: L1 up to the group, the group's L2, and so on; the last L1 run takes
 * the recent entries with it. */
static int64_t layer_spans(const acre_refill *s, const int32_t *groups, int which,
                           int64_t layer) {
  int64_t l = s->cache->plan.interval, l1 = 0, row = 0, count = 0;
  int part = which == ACRE_RAW ? ACRE_L2_KEY : ACRE_L2_VALUE;
  for (int64_t i = 0; i <= s->k; ++i) {
    int64_t stop = i < s->k ? groups[i] : s->from->count;
    if (stop > l1) {
      s->spans[count++] =
          (acre_span){acre_timeline_at(s->from, which, layer, l1), row, stop - l1};
      row += stop - l1;
      l1 = stop;
    }
    if (i == s->k) break;
    count +=
        acre_l2_spans(s->spans + count, &s->cache->l2, part, layer, groups[i] * l, l, row);
    row += l;
  }
  return count;
}

/* Pooled L1 entries keep their weight; a sink, L2 and recent entries have none. */
static void layer_bias(const acre_refill *s, const int32_t *groups, int64_t layer) {
  int64_t l = s->cache->plan.interval, m = s->cache->plan.m, row = 0, next = 0;
  float weight = (float)log((double)s->cache->plan.weight);
  for (int64_t j = 0; j < m; ++j) {
    if (next < s->k && groups[next] == j) {
      for (int64_t i = 0; i < l; ++i) s->bias[row++] = 0;
      ++next;
    }
    s->bias[row++] = j < s->cache->plan.sink ? 0 : weight;
  }
  float *to = acre_buffer_data(s->to.bias);
  s->cache->model->backend->ops->upload(s->queue, to + layer * s->to.bias_stride, s->bias,
                                        (size_t)row * sizeof *to);
}

static void splice_layer(const acre_refill *s, const int32_t *groups, int64_t layer) {
  const acre_model *model = s->cache->model;
  const acre_backend_ops *ops = model->backend->ops;
  int64_t count = layer_spans(s, groups, ACRE_RAW, layer);
  char *keys = acre_timeline_at(&s->to, ACRE_ROTATED, layer, 0);
  ops->copy_rows(s->queue, keys, s->spans, count, s->to.row_bytes);
  ops->rotate(s->queue, keys, keys, acre_buffer_data(model->cos),
              acre_buffer_data(model->sin), 0, s->to.count, &model->heads);
  count = layer_spans(s, groups, ACRE_VALUES, layer);
  ops->copy_rows(s->queue, acre_timeline_at(&s->to, ACRE_VALUES, layer, 0), s->spans, count,
                 s->to.row_bytes);
}

void acre_refill_layer(const acre_refill *s, int64_t layer) {
  const int32_t *groups = s->groups + (s->per_layer ? layer * s->k : 0);
  if (s->to.bias && (s->per_layer || layer == 0)) layer_bias(s, groups, layer);
  splice_layer(s, groups, layer);
}

void acre_refill_close(acre_refill *s) {
  acre_free(s->spans);
  acre_free(s->bias);
  acre_free(s->groups);
  memset(s, 0, sizeof *s);
}

static acre_status open_scratch(acre_refill *s, const int32_t *groups, acre_error *error) {
  int64_t l = s->cache->plan.interval, k = s->k;
  size_t lists = s->per_layer ? (size_t)s->cache->model->config.layers : 1;
  size_t bytes = lists * (size_t)k * sizeof *groups;
  /* A group may straddle pages; at worst each of its tokens lies in a page of its own. */
  s->spans =
      acre_alloc((size_t)(k * acre_min(l, s->cache->l2.count) + k + 2) * sizeof *s->spans);
  s->bias = acre_alloc((size_t)acre_max(s->to.count, 1) * sizeof *s->bias);
  s->groups = acre_alloc(bytes);
  if (!s->spans || !s->bias || !s->groups) {
    return acre_fail(error, ACRE_NO_MEMORY, "refill: out of memory");
  }
  memcpy(s->groups, groups, bytes);
  return ACRE_OK;
}

acre_status acre_refill_open(acre_refill *s, acre_timeline *out, const acre_cache *cache,
                             acre_queue *queue, const int32_t *groups, int64_t k,
                             bool per_layer, int64_t extra, acre_error *error) {
  const acre_model *model = cache->model;
  *s = (acre_refill){.cache = cache, .queue = queue, .k = k, .per_layer = per_layer};
  ACRE_TRY(acre_cache_resident(&s->from, cache, error));
  int64_t entries = s->from->count + k * cache->plan.interval;
  ACRE_TRY(acre_timeline_open(out, model, entries + extra, false, false, error));
  out->count = entries;
  acre_status status = ACRE_OK;
  if (acre_plan_biased(&cache->plan)) {
    int64_t layers = per_layer ? model->config.layers : 1;
    out->bias_stride = per_layer ? out->capacity : 0;
    status =
        model->backend->ops->alloc(model->backend, &out->bias,
                                   (size_t)(layers * out->capacity) * sizeof(float), error);
  }
  s->to = *out;
  if (status == ACRE_OK) status = open_scratch(s, groups, error);
  if (status == ACRE_OK) return ACRE_OK;
  acre_refill_close(s);
  acre_timeline_close(out);
  return status;
}
