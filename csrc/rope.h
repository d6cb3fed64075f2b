/* Rotary embedding: frequencies of every scaling variant, and the cos/sin tables. */
#ifndef ACRE_ROPE_H
#define ACRE_ROPE_H

#include "status.h"

acre_status acre_rope_check(const acre_rope_config *rope, acre_error *error);

/* inverse_frequencies [d/2] for sequences up to `positions`; returns the factor on cos and
 * sin (1 but for yarn). */
double acre_rope_frequencies(double *inverse_frequencies, const acre_rope_config *rope,
                             int64_t head_dim, int64_t positions);

/* cos, sin [positions, d/2]: computed in double, rounded once. */
void acre_rope_table(float *cos_table, float *sin_table, const double *inverse_frequencies,
                     double factor, int64_t head_dim, int64_t positions);

#endif
