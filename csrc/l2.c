#include "l2.h"

#include "platform.h"

#include <string.h>

void acre_l2_open(acre_l2 *l2, const acre_model *model) {
  *l2 = (acre_l2){.row_bytes = acre_model_row_bytes(model)};
}

void acre_l2_close(acre_l2 *l2) {
  for (int64_t i = 0; i < l2->count; ++i) {
    acre_buffer_release(l2->pages[i].key_owner);
    acre_buffer_release(l2->pages[i].value_owner);
  }
  acre_free(l2->pages);
  memset(l2, 0, sizeof *l2);
}

static acre_status reserve(acre_l2 *l2, int64_t capacity, acre_error *error) {
  if (capacity <= l2->capacity) return ACRE_OK;
  capacity = acre_max(capacity, 2 * l2->capacity);
  acre_l2_page *pages = acre_alloc((size_t)capacity * sizeof *pages);
  if (!pages) return acre_fail(error, ACRE_NO_MEMORY, "L2: out of memory");
  if (l2->count) memcpy(pages, l2->pages, (size_t)l2->count * sizeof *pages);
  acre_free(l2->pages);
  l2->pages = pages;
  l2->capacity = capacity;
  return ACRE_OK;
}

acre_status acre_l2_share(acre_l2 *out, const acre_l2 *l2, acre_error *error) {
  *out = (acre_l2){.row_bytes = l2->row_bytes};
  if (l2->count == 0) return ACRE_OK;
  ACRE_TRY(reserve(out, l2->count, error));
  memcpy(out->pages, l2->pages, (size_t)l2->count * sizeof *out->pages);
  out->count = l2->count;
  out->tokens = l2->tokens;
  for (int64_t i = 0; i < out->count; ++i) {
    acre_buffer_retain(out->pages[i].key_owner);
    acre_buffer_retain(out->pages[i].value_owner);
  }
  return ACRE_OK;
}

acre_status acre_l2_add(acre_l2 *l2, acre_buffer *key_owner, size_t key_offset,
                        acre_buffer *value_owner, size_t value_offset, int64_t tokens,
                        bool on_host, acre_error *error) {
  ACRE_TRY(reserve(l2, l2->count + 1, error));
  l2->pages[l2->count++] =
      (acre_l2_page){.key_owner = key_owner,
                     .value_owner = value_owner,
                     .keys = (const char *)acre_buffer_data(key_owner) + key_offset,
                     .values = (const char *)acre_buffer_data(value_owner) + value_offset,
                     .first = l2->tokens,
                     .tokens = tokens,
                     .on_host = on_host};
  l2->tokens += tokens;
  return ACRE_OK;
}

void acre_l2_last_at(acre_l2 *l2, const char *keys, const char *values) {
  acre_l2_page *last = &l2->pages[l2->count - 1];
  last->keys = keys;
  last->values = values;
}

static const acre_l2_page *page_of(const acre_l2 *l2, int64_t token) {
  int64_t low = 0, high = l2->count - 1;
  while (low < high) {
    int64_t middle = low + (high - low + 1) / 2;
    if (l2->pages[middle].first <= token) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return &l2->pages[low];
}

const char *acre_l2_at(const acre_l2 *l2, int which, int64_t layer, int64_t token,
                       int64_t *run) {
  const acre_l2_page *page = page_of(l2, token);
  int64_t row = token - page->first;
  if (run) *run = page->tokens - row;
  const char *base = which == ACRE_L2_KEY ? page->keys : page->values;
  return base + (size_t)(layer * page->tokens + row) * l2->row_bytes;
}

int64_t acre_l2_spans(acre_span *spans, const acre_l2 *l2, int which, int64_t layer,
                      int64_t first, int64_t rows, int64_t dst_row) {
  int64_t count = 0;
  while (rows > 0) {
    int64_t run;
    const char *source = acre_l2_at(l2, which, layer, first, &run);
    run = acre_min(run, rows);
    spans[count++] = (acre_span){source, dst_row, run};
    first += run;
    dst_row += run;
    rows -= run;
  }
  return count;
}
