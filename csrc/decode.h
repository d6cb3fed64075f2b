/* Choosing the next token from logits: greedy, or sampling as users expect it. */
#ifndef ACRE_DECODE_H
#define ACRE_DECODE_H

#include "backend.h"

typedef struct acre_candidate {
  float logit;
  int32_t id;
} acre_candidate;

acre_status acre_sampling_check(const acre_sampling *sampling, acre_error *error);

/* In this order: temperature, top-k, top-p, draw number `step` of the seed. candidates:
 * scratch [vocab]. Ties go to the lower id. No logit above -inf: id 0. */
int32_t acre_sample(const float *logits, acre_candidate *candidates, int64_t vocab,
                    const acre_sampling *sampling, uint64_t step);

/* How many of the highest logits are likely to decide: 1 where the highest does; 0 where all
 * are needed. No more than vocab and ACRE_TOP_MOST. */
int64_t acre_sampling_top(const acre_sampling *sampling, int64_t vocab);
/* What acre_sample would choose, from the `count` highest logits alone, in order, of
 * acre_sampling_top, and the mass that backend.h's `top` gives for scale = 1 / temperature;
 * -1 where these do not decide it. May reorder `best`. */
int32_t acre_sample_top(acre_candidate *best, int64_t count, int64_t vocab, double mass,
                        const acre_sampling *sampling, uint64_t step);

#endif
