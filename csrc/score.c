#include "score.h"

#include <math.h>
#include <stdlib.h>
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

acre_probe acre_scoring_probe(acre_scoring *scoring) {
  return (acre_probe){look, scoring};
}

/* ---------------------------------------------------------------- choosing */

typedef struct ranked {
  float score;
  int32_t group;
} ranked;

/* Better first; NaN is worse than any number, ties go to the lower position. */
static int by_score(const void *a, const void *b) {
  const ranked *x = a, *y = b;
  float p = isnan(x->score) ? -INFINITY : x->score;
  float q = isnan(y->score) ? -INFINITY : y->score;
  if (p != q) return p > q ? -1 : 1;
  return x->group < y->group ? -1 : 1;
}

static int by_position(const void *a, const void *b) {
  int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;
  return x < y ? -1 : x > y;
}

acre_status acre_select_groups(int32_t *groups, const float *scores, int64_t m, int64_t k,
                               acre_error *error) {
  if (m < 0 || m > INT32_MAX || k < 0 || k > m) {
    return acre_fail(error, ACRE_BAD_VALUE, "k: got %lld, expected 0 to m = %lld",
                     (long long)k, (long long)m);
  }
  ranked *order = acre_alloc((size_t)acre_max(m, 1) * sizeof *order);
  if (!order) return acre_fail(error, ACRE_NO_MEMORY, "select: out of memory");
  for (int64_t j = 0; j < m; ++j) order[j] = (ranked){scores[j], (int32_t)j};
  qsort(order, (size_t)m, sizeof *order, by_score);
  for (int64_t i = 0; i < k; ++i) groups[i] = order[i].group;
  acre_free(order);
  qsort(groups, (size_t)k, sizeof *groups, by_position);
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
