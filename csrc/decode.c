#include "decode.h"

#include <math.h>
#include <stdlib.h>

acre_sampling acre_sampling_default(void) {
  return (acre_sampling){sizeof(acre_sampling), 0, 0, 1, 1, 0};
}

acre_status acre_sampling_check(const acre_sampling *s, acre_error *error) {
  if (!(s->temperature >= 0) || !isfinite(s->temperature)) {
    return acre_fail(error, ACRE_BAD_VALUE, "temperature: got %g, expected >= 0",
                     (double)s->temperature);
  }
  if (s->top_k < 0) {
    return acre_fail(error, ACRE_BAD_VALUE, "top_k: got %d, expected >= 0", (int)s->top_k);
  }
  if (!(s->top_p > 0 && s->top_p <= 1)) {
    return acre_fail(error, ACRE_BAD_VALUE, "top_p: got %g, expected in (0, 1]",
                     (double)s->top_p);
  }
  if (!(s->repetition_penalty > 0) || !isfinite(s->repetition_penalty)) {
    return acre_fail(error, ACRE_BAD_VALUE, "repetition_penalty: got %g, expected > 0",
                     (double)s->repetition_penalty);
  }
  return ACRE_OK;
}

/* splitmix64 of (seed, step): every draw is a pure function, so answers replay. */
static double uniform(uint64_t seed, uint64_t step) {
  uint64_t z = seed + (step + 1) * 0x9e3779b97f4a7c15u;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  z ^= z >> 31;
  return (double)(z >> 11) * 0x1p-53;
}

static int32_t greedy(const float *logits, int64_t vocab) {
  int32_t best = 0;
  for (int64_t i = 1; i < vocab; ++i) {
    if (logits[i] > logits[best] || (isnan(logits[best]) && !isnan(logits[i]))) {
      best = (int32_t)i;
    }
  }
  return best;
}

static int better_first(const void *a, const void *b) {
  const acre_candidate *x = a, *y = b;
  if (x->logit != y->logit) return x->logit > y->logit ? -1 : 1;
  return x->id < y->id ? -1 : 1;
}

/* Keeps the candidates that could be among the k best or the top-p nucleus, cheaply, before
 * sorting: those below mass (1 - p)/vocab together weigh less than 1 - p. */
static int64_t shortlist(acre_candidate *candidates, const float *logits, int64_t vocab,
                         float top, double mass, const acre_sampling *s) {
  double cut = (1 - (double)s->top_p) / (double)vocab * mass;
  float floor_logit =
      s->top_k == 0 && cut > 0 ? top + (float)log(cut) * s->temperature - 1e-3f : -INFINITY;
  int64_t count = 0;
  for (int64_t i = 0; i < vocab; ++i) {
    if (logits[i] > -INFINITY && logits[i] >= floor_logit) {
      candidates[count++] = (acre_candidate){logits[i], (int32_t)i};
    }
  }
  return count;
}

static double weight(const acre_candidate *c, float top, const acre_sampling *s) {
  return exp((double)(c->logit - top) / s->temperature);
}

static double mass_of(const acre_candidate *candidates, int64_t count, float top,
                      const acre_sampling *s) {
  double mass = 0;
  for (int64_t i = 0; i < count; ++i) mass += weight(&candidates[i], top, s);
  return mass;
}

/* How many of the candidates, in order, hold the share top_p of the mass. */
static int64_t nucleus_of(const acre_candidate *candidates, int64_t count, float top,
                          double mass, const acre_sampling *s, double *kept) {
  int64_t nucleus = 0;
  *kept = 0;
  while (nucleus < count && (nucleus == 0 || *kept < (double)s->top_p * mass)) {
    *kept += weight(&candidates[nucleus++], top, s);
  }
  return nucleus;
}

static int32_t draw(const acre_candidate *candidates, int64_t nucleus, double kept,
                    float top, const acre_sampling *s, uint64_t step) {
  double target = uniform(s->seed, step) * kept, sum = 0;
  for (int64_t i = 0; i < nucleus; ++i) {
    sum += weight(&candidates[i], top, s);
    if (target < sum) return candidates[i].id;
  }
  return candidates[nucleus - 1].id;
}

int32_t acre_sample(const float *logits, acre_candidate *candidates, int64_t vocab,
                    const acre_sampling *s, uint64_t step) {
  int32_t best = greedy(logits, vocab);
  float top = logits[best];
  if (s->temperature == 0 || !(top > -INFINITY) || isinf(top)) return best;
  double mass = 0, kept;
  for (int64_t i = 0; i < vocab; ++i) {
    if (logits[i] > -INFINITY) mass += exp((double)(logits[i] - top) / s->temperature);
  }
  int64_t count = shortlist(candidates, logits, vocab, top, mass, s);
  if (s->top_k || s->top_p < 1) {
    qsort(candidates, (size_t)count, sizeof *candidates, better_first);
  }
  if (s->top_k && count > s->top_k) {
    count = s->top_k;
    mass = mass_of(candidates, count, top, s);
  }
  int64_t nucleus = nucleus_of(candidates, count, top, mass, s, &kept);
  return draw(candidates, nucleus, kept, top, s, step);
}

/* ---------------------------------------------------------------- from the highest alone */

enum { NUCLEUS_TOP = 256 };               /* of a top-p without a top-k */
static const double MASS_ERROR = 0x1p-15; /* of a mass that is not ours, and more */

int64_t acre_sampling_top(const acre_sampling *s, int64_t vocab) {
  if (s->temperature == 0) return 1;
  if (s->top_k == 0 && s->top_p == 1) return 0;
  int64_t count = s->top_k ? (int64_t)s->top_k + 1 : NUCLEUS_TOP;
  if (count > vocab) count = vocab;
  return count <= ACRE_TOP_MOST ? count : 0;
}

static int lower_first(const void *a, const void *b) {
  const acre_candidate *x = a, *y = b;
  return x->id < y->id ? -1 : 1;
}

/* Summed as acre_sample does where it has them all. */
static double mass_by_id(acre_candidate *best, int64_t count, float top,
                         const acre_sampling *s) {
  qsort(best, (size_t)count, sizeof *best, lower_first);
  double mass = mass_of(best, count, top, s);
  qsort(best, (size_t)count, sizeof *best, better_first);
  return mass;
}

int32_t acre_sample_top(acre_candidate *best, int64_t count, int64_t vocab, double mass,
                        const acre_sampling *s, uint64_t step) {
  float top = best[0].logit;
  if (s->temperature == 0 || !(top > -INFINITY) || isinf(top)) return best[0].id;
  int64_t live = 0;
  while (live < count && best[live].logit > -INFINITY) ++live;
  double error = 0, kept, less;
  if (s->top_k && live > s->top_k) {
    live = s->top_k;
    mass = mass_of(best, live, top, s);
  } else if (count == vocab || live < count) { /* what is not here weighs nothing */
    mass = mass_by_id(best, live, top, s);
  } else {
    if (!(mass > 0.5 && isfinite(mass))) return -1; /* the highest alone weighs 1 */
    error = MASS_ERROR;
  }
  int64_t nucleus = nucleus_of(best, live, top, mass * (1 + error), s, &kept);
  if (error > 0) {
    if (kept < (double)s->top_p * mass * (1 + error)) return -1; /* goes on beyond these */
    if (nucleus_of(best, live, top, mass * (1 - error), s, &less) != nucleus) return -1;
  }
  return draw(best, nucleus, kept, top, s, step);
}
