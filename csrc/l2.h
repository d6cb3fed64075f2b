/* The L2 store: detailed keys (before RoPE) and values of every closed window, in pages.
 *
 * A page holds consecutive tokens of all layers and never changes once added, so stores
 * share pages by reference: a text that is read on shares those of the text before. A page
 * may be memory of the device, pinned memory of the host or a mapped file; operations cannot
 * tell.
 *
 *   pages[p].first + pages[p].tokens == pages[p + 1].first,   pages[0].first == 0 */
#ifndef ACRE_L2_H
#define ACRE_L2_H

#include "model.h"

typedef struct acre_l2_page {
  acre_buffer *key_owner, *value_owner;
  const char *keys, *values; /* [L, tokens, g, d] of T */
  int64_t first, tokens;
  bool on_host; /* the host can read it, also where the device lies apart */
} acre_l2_page;

typedef struct acre_l2 {
  acre_l2_page *pages;
  int64_t count, capacity;
  int64_t tokens;   /* in all pages */
  size_t row_bytes; /* one token's keys in one layer */
} acre_l2;

enum { ACRE_L2_KEY = 0, ACRE_L2_VALUE };

void acre_l2_open(acre_l2 *l2, const acre_model *model);
void acre_l2_close(acre_l2 *l2);
/* Another store over the same pages. */
acre_status acre_l2_share(acre_l2 *out, const acre_l2 *l2, acre_error *error);
/* Takes over one reference to each owner on success. */
acre_status acre_l2_add(acre_l2 *l2, acre_buffer *key_owner, size_t key_offset,
                        acre_buffer *value_owner, size_t value_offset, int64_t tokens,
                        bool on_host, acre_error *error);
/* Where the last page is read from now on: its owners' memory may be filled later. */
void acre_l2_last_at(acre_l2 *l2, const char *keys, const char *values);
/* Keys or values of `token` in `layer`; *run (nullable) = tokens that lie behind it without
 * a gap, itself included. */
const char *acre_l2_at(const acre_l2 *l2, int which, int64_t layer, int64_t token,
                       int64_t *run);
/* Appends spans that copy tokens [first, first + rows) to dst_row...; returns how many (at
 * most rows). */
int64_t acre_l2_spans(acre_span *spans, const acre_l2 *l2, int which, int64_t layer,
                      int64_t first, int64_t rows, int64_t dst_row);

#endif
