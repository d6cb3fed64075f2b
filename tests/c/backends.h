/* What the tests of operations share: a backend and a queue for every table that this
 * processor can run, with one thread and with three, the CUDA table as far as the host can
 * run it (cuda/host), and arrays of random numbers.
 *
 * With ACRE_TEST_PLUGIN in the environment, a file like acre/_cuda.so, the same tests compare
 * its device with the oracle alone, whose table is the scalar one of one thread. */
#ifndef ACRE_TEST_BACKENDS_H
#define ACRE_TEST_BACKENDS_H

#include "backend.h"
#include "carried.h"
#include "check.h"
#include "cpu/kernels.h"
#include "guard.h"
#ifdef ACRE_TEST_CUDA
#include "host.h"
#endif
#include "platform.h"
#include "plugin.h"

#include <math.h>
#include <stdlib.h>

#define EPS 0x1p-24
#define CPU_BACKENDS 8
#define BACKENDS (CPU_BACKENDS + 2)

static acre_backend *backends[BACKENDS];
static acre_queue *queues[BACKENDS];
static int backend_count, exact_count; /* of them, those that agree to the bit */
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

/* The plug-in under test; NULL: none, but the CUDA table of the host. */
static inline const char *plugin_under_test(void) { return getenv("ACRE_TEST_PLUGIN"); }

/* Two of its device: with little scratch and with what it comes with. */
static inline bool open_plugin(const char *plugin) {
  static const size_t scratch[2][2] = {{12288, 1024}, {0, 0}};
  for (int i = 0; i < 2; i++) {
    acre_error error = {0};
    acre_backend *backend;
    if (carried_open(&backend, plugin, getenv("ACRE_TEST_LIBRARIES"), scratch[i][0],
                     scratch[i][1], &error) != ACRE_OK) {
      printf(" %s\n", error.message);
      return false;
    }
    printf(" %s", backend->isa);
    backends[backend_count] = backend;
    if (backend->ops->queue_open(backend, &queues[backend_count++], NULL) != ACRE_OK)
      return false;
  }
  return true;
}

#ifdef ACRE_TEST_CUDA
/* Little scratch, so that work is cut into parts at small sizes, too. */
static inline bool open_cuda(void) {
  acre_cuda_options options = {sizeof options, ACRE_TEST_CUDA, 12288, 1024};
  acre_backend *backend;
  acre_error error;
  if (acre_cuda_backend_open(&backend, 0, &options, &error) != ACRE_OK) {
    printf(" cuda-host: %s\n", error.message);
    return false;
  }
  printf(" cuda-host/%s", backend->isa);
  backends[backend_count] = backend;
  return backend->ops->queue_open(backend, &queues[backend_count++], NULL) == ACRE_OK;
}

/* The same on a chip of compute capability major.minor, for its own kernels. */
static inline bool open_cuda_of(int major, int minor) {
  acre_host_is.major = major, acre_host_is.minor = minor;
  bool opened = open_cuda();
  printf("\n");
  return opened;
}
#endif

/* The random seed is the first argument, or given. */
static inline bool open_backends(int argc, char **argv, uint64_t default_seed) {
  static const char *const names[] = {"scalar", "avx2", "avx512", "avx512_bf16"};
  seed = argc > 1 ? strtoull(argv[1], NULL, 10) : default_seed;
  printf("seed %llu, backends:", (unsigned long long)seed);
  const char *plugin = plugin_under_test();
  for (int i = 0; i < (plugin ? 1 : CPU_BACKENDS); i++) {
    acre_backend *backend;
    if (acre_cpu_backend_open(&backend, i % 2 ? 3 : 1, names[i / 2], NULL) != ACRE_OK)
      continue;
    printf(" %s/%d", backend->isa, backend->threads);
    if (backend->ops->queue_open(backend, &queues[backend_count], NULL) != ACRE_OK)
      return false;
    backends[backend_count++] = backend;
  }
  exact_count = backend_count;
  bool opened = true;
  if (plugin) opened = open_plugin(plugin);
#ifdef ACRE_TEST_CUDA
  if (!plugin) opened = open_cuda();
#endif
  printf("\n");
  return opened;
}

/* The CPU's tables give the same bits; of them only the first is compared with exact values,
 * which every other device must be near, too. */
static inline bool to_the_bit(int i) { return i < exact_count; }
static inline bool judged(int i) { return i == 0 || !to_the_bit(i); }

static inline void close_backends(void) {
  for (int i = 0; i < backend_count; i++) {
    acre_error error;
    bool well = backends[i]->ops->sync(queues[i], &error) == ACRE_OK;
    CHECK(well);
    if (!well) fprintf(stderr, "  %s: %s\n", backends[i]->isa, error.message);
    backends[i]->ops->queue_close(queues[i]);
    backends[i]->ops->destroy(backends[i]);
  }
  /* A plug-in counts what it allocates for itself, though we free its buffers. */
  CHECK(plugin_under_test() || acre_alloc_live() == 0);
#ifdef ACRE_TEST_CUDA
  CHECK(acre_host_conflicts() == 0);
#endif
}

#endif
