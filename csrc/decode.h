/* Choosing the next token from logits: greedy, or sampling as users expect it. */
#ifndef ACRE_DECODE_H
#define ACRE_DECODE_H

#include "status.h"

typedef struct acre_candidate {
  float logit;
  int32_t id;
} acre_candidate;

acre_status acre_sampling_check(const acre_sampling *sampling, acre_error *error);

/* Divides positive and multiplies negative logits of the ids seen (each once; `seen` is a
 * zeroed [vocab] scratch that is zeroed again on return). */
void acre_penalize(float *logits, uint8_t *seen, const int32_t *ids, int64_t count,
                   float penalty);

/* In this order: temperature, top-k, top-p, draw number `step` of the seed. candidates:
 * scratch [vocab]. Ties go to the lower id. No logit above -inf: id 0. */
int32_t acre_sample(const float *logits, acre_candidate *candidates, int64_t vocab,
                    const acre_sampling *sampling, uint64_t step);

#endif
