/* Tiles of keys and values as operands, shared by attention and scoring. */
#ifndef ACRE_CPU_ATTENTION_H
#define ACRE_CPU_ATTENTION_H

#include "cpu.h"

/* (query row, head) pairs of a task; a multiple of every tile_rows */
#define ACRE_ITEMS 192

/* d rounded up to whole panels: the row stride of everything in scratch. */
static inline int64_t acre_padded(int64_t d) { return acre_round_up(d, ACRE_PANEL); }

/* Row `first` of one head of keys or values, [.., g, d] of T. */
static inline const void *acre_cpu_head(const void *data, int64_t first, int64_t head,
                                        const acre_heads *heads) {
  int64_t at = (first * heads->kv_heads + head) * heads->head_dim;
  return (const char *)data + (size_t)at * acre_dtype_size(heads->dtype);
}

/* exp(x sqrt(1/d)) as a power of two: the factor of the exponent. */
float acre_cpu_logit_scale(const acre_heads *heads);

#endif
