/* A timeline: the keys and values of consecutive positions, layer by layer.
 *
 * Entry i stands at position first + i. Keys are kept rotated by their position; where
 * entries will move to other positions later they are kept before RoPE as well.
 *
 *   raw, rotated, values: per layer [capacity, g, d] of T         bias: float32, [capacity]
 * for all layers alike, or [L, capacity]
 *   0 <= count <= capacity
 */
#ifndef ACRE_TIMELINE_H
#define ACRE_TIMELINE_H

#include "model.h"

typedef struct acre_timeline {
  int64_t layers;
  int64_t capacity;
  int64_t count;
  size_t row_bytes;      /* of one entry's keys in one layer */
  acre_buffer **buffers; /* [3 * layers]: raw (NULL without), rotated, values */
  acre_buffer *bias;     /* NULL: no entry has one */
  int64_t bias_stride;   /* 0: the layers share their biases; else capacity */
} acre_timeline;

enum { ACRE_RAW = 0, ACRE_ROTATED, ACRE_VALUES };

acre_status acre_timeline_open(acre_timeline *timeline, const acre_model *model,
                               int64_t capacity, bool keep_raw, bool with_bias,
                               acre_error *error);
/* The same in parts: without its layers' memory, and then that of one layer. */
acre_status acre_timeline_begin(acre_timeline *timeline, const acre_model *model,
                                int64_t capacity, bool with_bias, acre_error *error);
acre_status acre_timeline_open_layer(acre_timeline *timeline, const acre_model *model,
                                     int64_t layer, bool keep_raw, acre_error *error);
void acre_timeline_close(acre_timeline *timeline); /* closing a zeroed one is fine */

static inline acre_buffer *acre_timeline_buffer(const acre_timeline *timeline, int which,
                                                int64_t layer) {
  return timeline->buffers[which * timeline->layers + layer];
}
/* First byte of entry `row`; NULL where that kind is not kept. */
char *acre_timeline_at(const acre_timeline *timeline, int which, int64_t layer,
                       int64_t row);
/* What queries of this layer see of entries [0, count). */
acre_keys acre_timeline_keys(const acre_timeline *timeline, int64_t layer, int64_t count);

/* Bytes that a timeline of this shape takes. */
size_t acre_timeline_bytes(const acre_model *model, int64_t capacity, bool keep_raw);

#endif
