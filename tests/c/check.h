/* The smallest test harness: CHECK counts, check_report prints the closing line. */
#ifndef ACRE_CHECK_H
#define ACRE_CHECK_H

#ifdef __cplusplus
#include <atomic>
using std::atomic_fetch_add;
using std::atomic_int;
#else
#include <stdatomic.h>
#endif
#include <stdint.h>
#include <stdio.h>

static atomic_int check_passed, check_failed;

#define CHECK(condition)                                                      \
  do {                                                                        \
    if (condition) {                                                          \
      atomic_fetch_add(&check_passed, 1);                                     \
    } else if (atomic_fetch_add(&check_failed, 1) < 20) {                     \
      fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
    }                                                                         \
  } while (0)

static inline int check_report(void) {
  printf("%d passed, %d failed\n", (int)check_passed, (int)check_failed);
  return check_failed != 0;
}

/* splitmix64, and a float in [-1, 1). */
static inline uint64_t random_bits(uint64_t *state) {
  uint64_t z = (*state += 0x9e3779b97f4a7c15u);
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return z ^ z >> 31;
}
static inline float random_float(uint64_t *state) {
  return (float)(int32_t)(random_bits(state) >> 32) * 0x1p-31f;
}

#endif
