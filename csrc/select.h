/* Selective attention as arithmetic: what a build of n tokens needs, and whether it fits.
 *
 * Inside a window a nested token sees all earlier L1 entries, `carry` L2 entries and its own
 * window up to itself. Kept as one resident timeline per layer,
 *
 *   [ L1 entries 0..m ) | middle: the last few L2 entries | this window's nested tokens ]
 *
 * with entry i at position i, that is plain causal attention over everything resident: no
 * mask exists anywhere. Here the interval is chosen, and texts are refused that would
 * reach a position beyond w_max (METHOD.md, section 3). */
#ifndef ACRE_SELECT_H
#define ACRE_SELECT_H

#include "forward.h"
#include "nested.h"

/* The windows of a resolved plan. */
acre_nested acre_plan_nested(const acre_plan *plan, acre_proxy proxy);
/* L2 tokens of closed windows whose group is not complete; they stay with the recent. */
static inline int64_t acre_plan_orphans(const acre_plan *plan) {
  return plan->l2_tokens - plan->m * plan->interval;
}
/* Entries that the resident timeline must hold while n tokens are built. */
int64_t acre_plan_capacity(const acre_plan *plan, acre_proxy proxy);
/* Rows of one forward pass while building. */
int64_t acre_plan_rows(const acre_plan *plan, acre_proxy proxy, const acre_model *model);
/* Most groups that one window completes. */
int64_t acre_plan_groups(const acre_plan *plan, acre_proxy proxy);
/* Bytes of the largest L2 page: of a window's tokens. */
size_t acre_plan_page_bytes(const acre_plan *plan, const acre_model *model);

#endif
