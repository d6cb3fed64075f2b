/* Refilling: L1 with the chosen groups' L2 entries spliced in (METHOD.md, section 4.4). */
#ifndef ACRE_REFILL_H
#define ACRE_REFILL_H

#include "cache.h"

/* Refuses groups that are not ascending, distinct and in [0, m). */
acre_status acre_refill_check(const acre_cache *cache, const int32_t *groups, int64_t k,
                              bool per_layer, acre_error *error);

/* Opens a timeline [L1 with groups | recent] with room for `extra` more entries. Keys are
 * rotated by their new positions; the cache is only read. */
acre_status acre_refill_open(acre_timeline *out, const acre_cache *cache, acre_queue *queue,
                             const int32_t *groups, int64_t k, bool per_layer,
                             int64_t extra, acre_error *error);

#endif
