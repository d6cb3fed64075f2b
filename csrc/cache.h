/* The bi-layer cache, frozen: immutable, shared by any number of sessions.
 *
 *   resident  per layer [ L1 0..m ) | orphans | partial window ]: m + r entries, keys raw
 *             and rotated by index, values; bias log(l) on pooled L1 entries
 *   l2        every L2 entry of the closed windows, read only by refilling
 *
 * A cache that was restored maps its parts and fills `resident` at first use. */
#ifndef ACRE_CACHE_H
#define ACRE_CACHE_H

#include "l2.h"
#include "platform.h"
#include "select.h"

#include <stdatomic.h>

struct acre_cache {
  _Atomic int64_t references;
  acre_model *model;
  acre_plan plan;
  acre_proxy proxy;
  int32_t *ids; /* [n] */
  acre_l2 l2;
  acre_timeline resident;
  acre_mutex *once; /* guards the first use of a restored cache */
  _Atomic bool resident_ready;
  acre_buffer *stored[6]; /* a restored cache's blocks, by acre_part */
  size_t stored_offset[6];
};

/* An empty cache of this plan that owns a copy of ids[0..n). */
acre_status acre_cache_new(acre_cache **out, acre_model *model, const acre_plan *plan,
                           acre_proxy proxy, const int32_t *ids, acre_error *error);
/* The resident timeline, made now if it is not there yet. */
acre_status acre_cache_resident(const acre_timeline **out, const acre_cache *cache,
                                acre_error *error);
/* Sets the biases of a resident timeline whose first m entries are L1 entries: log(weight),
 * but none on a sink. */
void acre_cache_fill_bias(const acre_model *model, acre_queue *queue,
                          acre_timeline *timeline, int64_t m, const acre_plan *plan);
static inline bool acre_plan_biased(const acre_plan *plan) { return plan->weight > 1; }

#endif
