/* What the tests of operations share: a backend and a queue for every table that this
 * processor can run, with one thread and with three, and arrays of random numbers. */
#ifndef ACRE_TEST_BACKENDS_H
#define ACRE_TEST_BACKENDS_H

#include "backend.h"
#include "check.h"
#include "cpu/kernels.h"
#include "guard.h"
#include "platform.h"

#include <math.h>
#include <stdlib.h>

#define EPS 0x1p-24
#define BACKENDS 8

static acre_backend *backends[BACKENDS];
static acre_queue *queues[BACKENDS];
static int backend_count;
static uint64_t seed;

/* ---------------------------------------------------------------- arrays, guarded */

static inline float *random_floats(int64_t n) {
  float *x = guarded_alloc((size_t)n * sizeof(float));
  for (int64_t i = 0; i < n; i++) x[i] = random_float(&seed);
  return x;
}

static inline float *nans(int64_t n) {
  float *x = guarded_alloc((size_t)n * sizeof(float));
  for (int64_t i = 0; i < n; i++) x[i] = acre_from_bits(0x7fc0dead);
  return x;
}

/* n random elements of T, and the float64 value of any of them. */
static inline void *random_typed(int64_t n, acre_dtype dtype) {
  float *x = random_floats(n);
  if (dtype == ACRE_F32) return x;
  uint16_t *y = guarded_alloc((size_t)n * sizeof *y);
  for (int64_t i = 0; i < n; i++) y[i] = acre_to_bf16(x[i]);
  guarded_free(x);
  return y;
}

static inline float at(const void *x, int64_t i, acre_dtype dtype) {
  return dtype == ACRE_F32 ? ((const float *)x)[i]
                           : acre_from_bf16(((const uint16_t *)x)[i]);
}

static inline float as(float x, acre_dtype dtype) {
  return dtype == ACRE_F32 ? x : acre_from_bf16(acre_to_bf16(x));
}

static inline bool same(const void *a, const void *b, int64_t bytes) {
  return memcmp(a, b, (size_t)bytes) == 0;
}

/* The random seed is the first argument, or given. */
static inline bool open_backends(int argc, char **argv, uint64_t default_seed) {
  static const char *const names[] = {"scalar", "avx2", "avx512", "avx512_bf16"};
  seed = argc > 1 ? strtoull(argv[1], NULL, 10) : default_seed;
  printf("seed %llu, backends:", (unsigned long long)seed);
  for (int i = 0; i < BACKENDS; i++) {
    acre_backend *backend;
    if (acre_cpu_backend_open(&backend, i % 2 ? 3 : 1, names[i / 2], NULL) != ACRE_OK)
      continue;
    printf(" %s/%d", backend->isa, backend->threads);
    if (backend->ops->queue_open(backend, &queues[backend_count], NULL) != ACRE_OK)
      return false;
    backends[backend_count++] = backend;
  }
  printf("\n");
  return true;
}

static inline void close_backends(void) {
  for (int i = 0; i < backend_count; i++) {
    backends[i]->ops->queue_close(queues[i]);
    backends[i]->ops->destroy(backends[i]);
  }
  CHECK(acre_alloc_live() == 0);
}

#endif
