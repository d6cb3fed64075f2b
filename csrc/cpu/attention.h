/* Tiles of keys and values in float32, shared by attention and scoring. */
#ifndef ACRE_CPU_ATTENTION_H
#define ACRE_CPU_ATTENTION_H

#include "cpu.h"

#define ACRE_ITEMS 96 /* (query row, head) pairs of a task; a multiple of every tile_rows */

/* d rounded up to whole panels: the row stride of everything in scratch. */
static inline int64_t acre_padded(int64_t d) { return acre_round_up(d, ACRE_PANEL); }

/* Rows [first, first + rows) of one head of `data`, [.., g, d] of T, as float32 rows of
 * acre_padded(d) elements, zero beyond d. Returns where they lie: in `to`, or in `data`
 * itself where that is already so; *stride is then the distance between rows. */
const float *acre_cpu_load_rows(const acre_kernels *kernels, float *to, int64_t *stride,
                                const void *data, int64_t first, int64_t rows, int64_t head,
                                const acre_heads *heads);

/* The same rows as panels of 16 keys, [ceil(rows / 16)][d][16]; `rows_scratch` holds
 * them row by row in between. */
void acre_cpu_load_panels(const acre_kernels *kernels, float *panels, float *rows_scratch,
                          const void *data, int64_t first, int64_t rows, int64_t head,
                          const acre_heads *heads);

#endif
