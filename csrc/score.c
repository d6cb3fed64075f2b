#include "score.h"

#include <math.h>
#include <string.h>

acre_score_options acre_score_options_default(void) {
  return (acre_score_options){sizeof(acre_score_options), ACRE_SELECT_SHARED, true, NULL};
}

static bool any_head(const uint8_t *use, int64_t heads) {
  for (int64_t i = 0; i < heads; ++i) {
    if (use[i]) return true;
  }
  return false;
}

acre_status acre_scoring_mask(uint8_t *use, int64_t *layers, const acre_model *model,
                              const acre_score_options *options, acre_error *error) {
  int64_t L = model->config.layers, h = model->config.heads;
  size_t all = (size_t)L * (size_t)h;
  bool per_layer = options->select == ACRE_SELECT_PER_LAYER;
  if (!per_layer && options->select != ACRE_SELECT_SHARED) {
    return acre_fail(error, ACRE_BAD_VALUE, "select: got %d, expected shared or per_layer",
                     (int)options->select);
  }
  if (options->heads) {
    memcpy(use, options->heads, all);
    if (!per_layer && !any_head(use, L * h)) {
      return acre_fail(error, ACRE_BAD_VALUE, "heads: none of the %lld is chosen",
                       (long long)(L * h));
    }
  } else {
    for (size_t i = 0; i < all; ++i) use[i] = i >= all - (size_t)h;
  }
  *layers = 0;
  for (int64_t i = 0; i < L; ++i) {
    uint8_t *row = use + i * h;
    bool any = any_head(row, h);
    for (int64_t head = 0; per_layer && !any && head < h; ++head) row[head] = 1;
    if (any || per_layer) *layers = i + 1;
  }
  return ACRE_OK;
}

static void look(void *context, int64_t layer, bool rotated, const float *q, int64_t stride,
                 int64_t rows) {
  const acre_scoring *s = context;
  const uint8_t *use = s->use + layer * s->model->config.heads;
  int64_t from = acre_max(s->first - s->offset, 0);
  int64_t to = acre_min(s->last - s->offset, rows);
  if (rotated != s->rotated || from >= to || !any_head(use, s->model->config.heads)) return;
  float *scores = acre_buffer_data(s->scores);
  s->model->backend->ops->score(
      s->queue, scores + (s->per_layer ? layer * s->m : 0), q + from * stride, stride,
      acre_timeline_at(s->resident, rotated ? ACRE_ROTATED : ACRE_RAW, layer, 0), use,
      to - from, s->m, &s->model->heads);
}

acre_probe acre_scoring_probe(acre_scoring *scoring) { return (acre_probe){look, scoring}; }

/* ---------------------------------------------------------------- choosing */

/* a is chosen before b: higher score, then lower index; NaN below everything. */
static bool before(const float *scores, int32_t a, int32_t b) {
  float x = isnan(scores[a]) ? -INFINITY : scores[a];
  float y = isnan(scores[b]) ? -INFINITY : scores[b];
  if (x != y) return x > y;
  if (isnan(scores[a]) != isnan(scores[b])) return isnan(scores[b]);
  return a < b;
}

/* Order of the heap's root: the worst of the chosen, or without scores the highest index. */
static bool above(const float *scores, int32_t a, int32_t b) {
  return scores ? before(scores, b, a) : a > b;
}

static void sift(int32_t *heap, int64_t count, int64_t at, const float *scores) {
  int32_t moved = heap[at];
  for (;;) {
    int64_t child = 2 * at + 1;
    if (child >= count) break;
    if (child + 1 < count && above(scores, heap[child + 1], heap[child])) ++child;
    if (!above(scores, heap[child], moved)) break;
    heap[at] = heap[child];
    at = child;
  }
  heap[at] = moved;
}

static void heapify(int32_t *heap, int64_t count, const float *scores) {
  for (int64_t i = count / 2; i-- > 0;) sift(heap, count, i, scores);
}

/* The answer itself is the heap of the best so far; then it is heap-sorted by index. */
acre_status acre_select_groups(int32_t *groups, const float *scores, int64_t m, int64_t k,
                               acre_error *error) {
  if (m < 0 || m > INT32_MAX || k < 0 || k > m) {
    return acre_fail(error, ACRE_BAD_VALUE, "k: got %lld, expected 0 to m = %lld",
                     (long long)k, (long long)m);
  }
  if (k == 0) return ACRE_OK;
  for (int64_t i = 0; i < k; ++i) groups[i] = (int32_t)i;
  heapify(groups, k, scores);
  for (int64_t i = k; i < m; ++i) {
    if (!before(scores, (int32_t)i, groups[0])) continue;
    groups[0] = (int32_t)i;
    sift(groups, k, 0, scores);
  }
  heapify(groups, k, NULL);
  for (int64_t end = k - 1; end > 0; --end) {
    int32_t highest = groups[0];
    groups[0] = groups[end];
    groups[end] = highest;
    sift(groups, end, 0, NULL);
  }
  return ACRE_OK;
}

acre_status acre_refill_count(int64_t *k, const acre_cache *cache, int64_t eta,
                              acre_error *error) {
  const acre_plan *p = acre_cache_plan(cache);
  if (eta < 0 || (eta > 0 && eta < p->interval)) {
    return acre_fail(error, ACRE_BAD_VALUE,
                     "eta: got %lld L2 tokens, expected 0 or at least the interval %lld",
                     (long long)eta, (long long)p->interval);
  }
  int64_t room = cache->model->config.w_max - p->m - p->recent - p->reserve;
  int64_t budget = acre_min(eta, acre_max(room, 0));
  *k = acre_min(budget / p->interval, p->m);
  return ACRE_OK;
}
