/* Refilling: L1 with the chosen groups' L2 entries spliced in (METHOD.md, section 4.4). */
#ifndef ACRE_REFILL_H
#define ACRE_REFILL_H

#include "cache.h"

/* Refuses groups that are not ascending, distinct and in [0, m). */
acre_status acre_refill_check(const acre_cache *cache, const int32_t *groups, int64_t k,
                              bool per_layer, acre_error *error);

/* One refill under way: its timeline is there, its layers are spliced one by one. */
typedef struct acre_refill {
  const acre_cache *cache;
  const acre_timeline *from; /* the cache's resident entries */
  acre_timeline to;          /* borrowed: the caller's, as it was opened */
  acre_queue *queue;
  acre_span *spans;
  float *bias;     /* host, [entries] */
  int32_t *groups; /* [k], or [L, k] */
  int64_t k;
  bool per_layer;
} acre_refill;

/* Opens a timeline [L1 with groups | recent] with room for `extra` more entries, which the
 * caller closes. */
acre_status acre_refill_open(acre_refill *refill, acre_timeline *out,
                             const acre_cache *cache, acre_queue *queue,
                             const int32_t *groups, int64_t k, bool per_layer,
                             int64_t extra, acre_error *error);
/* Enqueues the splicing of one layer; those of the first layer and of the others in order.
 * Keys are rotated by their new positions; the cache is only read. */
void acre_refill_layer(const acre_refill *refill, int64_t layer);
static inline bool acre_refill_under_way(const acre_refill *refill) {
  return refill->spans != NULL;
}
void acre_refill_close(acre_refill *refill); /* closing a zeroed one is fine */

#endif
