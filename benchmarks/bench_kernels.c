/* How fast the CPU's operations are, next to what this machine can do in the same run.
 *
 * First the ceilings: multiply-add peak and read bandwidth, one thread and all. Then the
 * cases of tests/c/cases.h in f32, bf16 and with q8 weights, each checked before it is
 * timed: a wrong kernel prints nothing. One line per case: name, threads, milliseconds,
 * GFLOP/s, GB/s, shares of the ceilings.
 *
 * bench_kernels [isa or "best"] [part of a name] */
#include "backend.h"
#include "cases.h"
#include "peaks.h"

#include <stdio.h>

/* Of the threads and numbers in use: the most seen so far. */
static double peaks[2], *peak_gflops = peaks, peak_gbytes;

static void measure_peak(void);
static void use_peak_of(acre_dtype dtype);

static const char *filter = "";

/* The FMA peak is looked at again before every line: clocks and neighbours change. */
static void report(const char *name, int32_t threads, double seconds, double flops,
                   double bytes) {
  measure_peak();
  printf("%-40s %2d threads %9.3f ms %8.1f GFLOP/s %6.1f GB/s  %3.0f%% peak %3.0f%% read\n",
         name, threads, seconds * 1e3, flops / seconds * 1e-9, bytes / seconds * 1e-9,
         100e-9 * flops / seconds / *peak_gflops, 100e-9 * bytes / seconds / peak_gbytes);
  fflush(stdout);
}

/* ---------------------------------------------------------------- ceilings */

static void nothing(void *context, int64_t index, int32_t worker) {
  (void)context, (void)index, (void)worker;
}

static acre_pool *ceiling_pool;
static const char *ceiling_isa;
static acre_dtype ceiling_dtype;

static void use_peak_of(acre_dtype dtype) {
  ceiling_dtype = dtype;
  peak_gflops = &peaks[dtype];
}

static void measure_peak(void) {
  double flops = measure_flops(ceiling_pool, ceiling_isa, ceiling_dtype) * 1e-9;
  if (flops > *peak_gflops) *peak_gflops = flops;
}

static void measure_ceilings(int32_t threads) {
  if (acre_pool_open(&ceiling_pool, threads, NULL) != ACRE_OK) exit(1);
  loop empty = {ceiling_pool, nothing, NULL, threads};
  alone = threads == 1;
  for (int dtype = 0; dtype < 2; dtype++) {
    peaks[dtype] = 0.0;
    use_peak_of((acre_dtype)dtype);
    measure_peak();
  }
  peak_gbytes = measure_read(ceiling_pool) * 1e-9;
  double start = best_time((timed){run_loop, &empty});
  printf(
      "\n%d threads, %s: peak f32 %.1f, bf16 %.1f GFLOP/s, read %.1f GB/s, an empty "
      "loop %.2f us\n",
      threads, ceiling_isa, peaks[ACRE_F32], peaks[ACRE_BF16], peak_gbytes, start * 1e6);
}

/* ---------------------------------------------------------------- cases */

static void bench_case(const op_case *c, acre_backend *backend, acre_queue *queue) {
  char name[80];
  case_name(name, sizeof name, c);
  if (!strstr(name, filter)) return;
  op_work work = case_open(c, backend, queue);
  if (!case_check(&work)) {
    fprintf(stderr, "%s is wrong\n", name);
    exit(1);
  }
  report(name, backend->threads, best_time((timed){case_run, &work}), case_flops(c),
         case_bytes(c));
  case_close(&work);
}

static bool is_product(const op_case *c) {
  return c->kind == OP_MATMUL || c->kind == OP_SWIGLU;
}

static void bench_threads(int32_t threads, const char *isa) {
  acre_backend *backend;
  acre_queue *queue;
  acre_error error;
  if (acre_cpu_backend_open(&backend, threads, isa, &error) != ACRE_OK) {
    fprintf(stderr, "%s\n", error.message);
    exit(1);
  }
  if (backend->ops->queue_open(backend, &queue, NULL) != ACRE_OK) exit(1);
  ceiling_isa = backend->isa;
  measure_ceilings(threads);
  for (int kind = 0; kind < 3; kind++) { /* f32, bf16, q8 */
    use_peak_of(kind ? ACRE_BF16 : ACRE_F32);
    for (int64_t i = 0; i < ACRE_COUNT(model_cases); i++) {
      op_case c = model_cases[i].op;
      c.dtype = kind ? ACRE_BF16 : ACRE_F32;
      c.weights = kind == 2 ? ACRE_WEIGHTS_Q8 : ACRE_WEIGHTS_SAME;
      if (kind < 2 || is_product(&c)) bench_case(&c, backend, queue);
    }
  }
  backend->ops->queue_close(queue);
  backend->ops->destroy(backend);
  acre_pool_close(ceiling_pool);
}

int main(int argc, char **argv) {
  const char *isa = argc > 1 && strcmp(argv[1], "best") != 0 ? argv[1] : NULL;
  if (argc > 2) filter = argv[2];
  int32_t cores = acre_cpu_count();
  bench_threads(1, isa);
  if (cores > 1) bench_threads(cores, isa);
  return 0;
}
