/* What scoring and its gradient share: the heads that count, on the device, and where the
 * workspace keeps what is measured of every item. */
#ifndef ACRE_CUDA_SCORE_H
#define ACRE_CUDA_SCORE_H

#include "internal.h"
#include "tiles.h"

namespace acre {

constexpr int MEASURES = 3; /* floats kept of an item */

/* The workspace of scoring: [start | list | wanted | measures]. */
struct score_space {
  int32_t *start, *list;
  uint8_t *wanted;    /* [m] */
  float *measures;    /* [MEASURES] of each of `rows` rows' items, KV head after KV head */
  int64_t rows;       /* at a time; 0: nothing can be done */
  int64_t used, most; /* heads that count; the most of one KV head */
};

/* Sends `use` and (nullable) `wanted`. */
score_space score_space_open(acre_queue *queue, const uint8_t *use, const uint8_t *wanted,
                             int64_t t, int64_t m, const acre_heads *heads);

}  // namespace acre
#endif
