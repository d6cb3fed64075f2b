/* Scoring: how much a question attends to each group's L1 entry (METHOD.md, section 4).
 *
 * Rides on the question's pass over [L1 | recent] as a probe: no query state is kept. */
#ifndef ACRE_SCORE_H
#define ACRE_SCORE_H

#include "cache.h"

typedef struct acre_scoring {
  const acre_model *model;
  acre_queue *queue;
  const acre_timeline *resident;
  int64_t m;
  const uint8_t *use; /* [L, h], host */
  bool rotated;
  bool per_layer;
  int64_t first, last; /* scored rows of the whole question */
  int64_t offset;      /* rows of the question before this pass */
  acre_buffer *scores; /* [1 or L, m] float32, zeroed at open */
} acre_scoring;

/* Resolves the options into a full [L, h] mask; *layers = layers that must be run. */
acre_status acre_scoring_mask(uint8_t *use, int64_t *layers, const acre_model *model,
                              const acre_score_options *options, acre_error *error);
acre_probe acre_scoring_probe(acre_scoring *scoring);

#endif
