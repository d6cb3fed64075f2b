/* Small things every file may use: sizes, bounds, checked arithmetic. */
#ifndef ACRE_BASE_H
#define ACRE_BASE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define ACRE_ALIGN 64 /* every buffer starts on a cache line; widest vector in use */
#define ACRE_COUNT(array) ((int64_t)(sizeof(array) / sizeof(array)[0]))

static inline int64_t acre_min(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t acre_max(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t acre_ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t acre_round_up(int64_t a, int64_t b) {
  return acre_ceil_div(a, b) * b;
}

/* Product of non-negative counts, or false where it leaves int64 (or size_t). */
static inline bool acre_mul(int64_t *out, int64_t a, int64_t b) {
  return !__builtin_mul_overflow(a, b, out) && *out >= 0;
}

/* Fields of a caller's option struct beyond its struct_size keep their defaults: older
 * callers stay valid when fields are added at the end. */
#define ACRE_TAKE_OPTIONS(target, defaults, source)                      \
  do {                                                                   \
    (target) = (defaults);                                               \
    if (source) {                                                        \
      size_t size_ = (source)->struct_size;                              \
      __builtin_memcpy(&(target), (source),                              \
                       size_ < sizeof(target) ? size_ : sizeof(target)); \
      (target).struct_size = sizeof(target);                             \
    }                                                                    \
  } while (0)

#endif
