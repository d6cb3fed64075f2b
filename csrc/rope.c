#include "rope.h"

#include <math.h>

#define PI 3.14159265358979323846

acre_status acre_rope_check(const acre_rope_config *rope, acre_error *error) {
  if (!(rope->theta > 0) || !isfinite(rope->theta)) {
    return acre_fail(error, ACRE_BAD_VALUE, "rope.theta: got %g, expected > 0",
                     rope->theta);
  }
  if (rope->kind < ACRE_ROPE_DEFAULT || rope->kind > ACRE_ROPE_YARN) {
    return acre_fail(error, ACRE_BAD_VALUE, "rope.kind: got %d", (int)rope->kind);
  }
  if (rope->kind != ACRE_ROPE_DEFAULT && !(rope->factor >= 1 && isfinite(rope->factor))) {
    return acre_fail(error, ACRE_BAD_VALUE, "rope.factor: got %g, expected >= 1",
                     rope->factor);
  }
  if (rope->kind >= ACRE_ROPE_DYNAMIC && rope->original_positions < 1) {
    return acre_fail(error, ACRE_BAD_VALUE,
                     "rope.original_positions: got %lld, expected >= 1",
                     (long long)rope->original_positions);
  }
  if (rope->kind == ACRE_ROPE_LLAMA3 &&
      !(rope->low_freq_factor > 0 && rope->high_freq_factor > rope->low_freq_factor)) {
    return acre_fail(error, ACRE_BAD_VALUE,
                     "rope: low_freq_factor %g and high_freq_factor %g, expected "
                     "0 < low < high",
                     rope->low_freq_factor, rope->high_freq_factor);
  }
  if (rope->kind == ACRE_ROPE_YARN && !(rope->beta_fast > 0 && rope->beta_slow > 0)) {
    return acre_fail(error, ACRE_BAD_VALUE, "rope: beta_fast and beta_slow must be > 0");
  }
  return ACRE_OK;
}

/* Llama 3: long wavelengths are stretched by `factor`, short ones kept, those between
 * interpolated in the number of turns over the original length. */
static double llama3(double frequency, const acre_rope_config *rope) {
  double turns = (double)rope->original_positions * frequency / (2 * PI);
  if (turns > rope->high_freq_factor) return frequency;
  if (turns < rope->low_freq_factor) return frequency / rope->factor;
  double smooth =
      (turns - rope->low_freq_factor) / (rope->high_freq_factor - rope->low_freq_factor);
  return (1 - smooth) * frequency / rope->factor + smooth * frequency;
}

/* The dimension (real-valued) that makes `turns` turns over the original length. */
static double yarn_dimension(double turns, const acre_rope_config *rope, int64_t head_dim) {
  return (double)head_dim * log((double)rope->original_positions / (turns * 2 * PI)) /
         (2 * log(rope->theta));
}

static void yarn(double *frequencies, const acre_rope_config *rope, int64_t head_dim) {
  double low = yarn_dimension(rope->beta_fast, rope, head_dim);
  double high = yarn_dimension(rope->beta_slow, rope, head_dim);
  if (rope->truncate) {
    low = floor(low);
    high = ceil(high);
  }
  low = fmax(low, 0);
  high = fmin(high, (double)(head_dim - 1));
  if (low == high) high += 0.001; /* a ramp needs a width */
  for (int64_t i = 0; i < head_dim / 2; ++i) {
    double ramp = fmin(fmax(((double)i - low) / (high - low), 0), 1);
    frequencies[i] *= ramp / rope->factor + (1 - ramp);
  }
}

double acre_rope_frequencies(double *frequencies, const acre_rope_config *rope,
                             int64_t head_dim, int64_t positions) {
  double theta = rope->theta;
  if (rope->kind == ACRE_ROPE_DYNAMIC && positions > rope->original_positions) {
    double stretch = rope->factor * (double)positions / (double)rope->original_positions;
    theta *= pow(stretch - (rope->factor - 1), (double)head_dim / (double)(head_dim - 2));
  }
  for (int64_t i = 0; i < head_dim / 2; ++i) {
    frequencies[i] = pow(theta, -2.0 * (double)i / (double)head_dim);
    if (rope->kind == ACRE_ROPE_LINEAR) frequencies[i] /= rope->factor;
    if (rope->kind == ACRE_ROPE_LLAMA3) frequencies[i] = llama3(frequencies[i], rope);
  }
  if (rope->kind != ACRE_ROPE_YARN) return 1;
  yarn(frequencies, rope, head_dim);
  if (rope->attention_factor > 0) return rope->attention_factor;
  return rope->factor > 1 ? 0.1 * log(rope->factor) + 1 : 1;
}

void acre_rope_table(float *cos_table, float *sin_table, const double *frequencies,
                     double factor, int64_t head_dim, int64_t positions) {
  int64_t half = head_dim / 2;
  for (int64_t p = 0; p < positions; ++p) {
    for (int64_t i = 0; i < half; ++i) {
      double angle = (double)p * frequencies[i];
      cos_table[p * half + i] = (float)(cos(angle) * factor);
      sin_table[p * half + i] = (float)(sin(angle) * factor);
    }
  }
}
