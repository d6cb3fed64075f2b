/* How fast the CPU kernels are, next to what this machine can do in the same run.
 *
 * First the ceilings: multiply-add peak and read bandwidth, one thread and all. Then matrix
 * products of SmolLM2-135M's shapes, window attention and one decoded row, each checked
 * against a float64 sum of a few elements before it is timed: a wrong kernel prints
 * nothing. One line per case: name, threads, milliseconds, GFLOP/s, GB/s, share of the
 * ceiling.
 *
 * bench_kernels [isa or "best"] [part of a name] */
#include "backend.h"
#include "cpu/kernels.h"
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
  printf("%-34s %2d threads %9.3f ms %8.1f GFLOP/s %6.1f GB/s  %3.0f%% peak %3.0f%% read\n",
         name, threads, seconds * 1e3, flops / seconds * 1e-9, bytes / seconds * 1e-9,
         100e-9 * flops / seconds / *peak_gflops, 100e-9 * bytes / seconds / peak_gbytes);
  fflush(stdout);
}

static uint64_t state = 1;

static float next_float(void) {
  state = state * 6364136223846793005u + 1442695040888963407u;
  return (float)(int32_t)(state >> 32) * 0x1p-31f;
}

static float *floats(int64_t n) {
  float *x = acre_alloc((size_t)n * sizeof(float));
  for (int64_t i = 0; x && i < n; i++) x[i] = next_float();
  if (!x) exit(1);
  return x;
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

/* ---------------------------------------------------------------- products */

typedef struct product {
  acre_backend *backend;
  acre_queue *queue;
  acre_matrix *W;
  float *x, *y, *bias;
  void *typed_x;
  int64_t rows, N;
} product;

static void run_product(void *context) {
  const product *p = context;
  p->backend->ops->matmul(p->queue, p->y, p->N, p->typed_x, p->W, p->bias, p->rows, false);
}

static float as(float x, acre_dtype dtype) {
  return dtype == ACRE_F32 ? x : acre_from_bf16(acre_to_bf16(x));
}

static void check_product(const product *p, const float *w, int64_t K, acre_dtype dtype) {
  for (int64_t i = 0; i < p->rows; i += acre_max(1, p->rows / 3)) {
    for (int64_t j = 0; j < p->N; j += 97) {
      double sum = 0.0, size = 0.0;
      for (int64_t k = 0; k < K; k++) {
        double product = (double)as(p->x[i * K + k], dtype) * as(w[j * K + k], dtype);
        sum += product, size += fabs(product);
      }
      if (!(fabs(p->y[i * p->N + j] - sum) <= (double)K * 0x1p-24 * size + 1e-30)) {
        fprintf(stderr, "matmul is wrong at %lld, %lld\n", (long long)i, (long long)j);
        exit(1);
      }
    }
  }
}

static void *typed(const float *x, int64_t n, acre_dtype dtype) {
  if (dtype == ACRE_F32) return memcpy(floats(n), x, (size_t)n * sizeof(float));
  uint16_t *y = acre_alloc((size_t)n * sizeof *y);
  for (int64_t i = 0; y && i < n; i++) y[i] = acre_to_bf16(x[i]);
  return y;
}

static void bench_product(acre_backend *backend, acre_queue *queue, int64_t K, int64_t N,
                          acre_dtype dtype) {
  float *w = floats(N * K);
  product p = {.backend = backend, .queue = queue, .N = N};
  acre_array array = {w, ACRE_F32, 2, {N, K}, {K, 1}};
  bool finite = true;
  if (backend->ops->matrix_create(backend, &p.W, N, K, dtype, ACRE_WEIGHTS_SAME, NULL) !=
      ACRE_OK)
    exit(1);
  backend->ops->matrix_fill(p.W, 0, &array, &finite);
  static const int64_t rows[] = {512, 32, 5, 1};
  p.x = floats(512 * K);
  p.typed_x = typed(p.x, 512 * K, dtype);
  p.y = floats(512 * N);
  for (int64_t i = 0; i < ACRE_COUNT(rows); i++) {
    char name[64];
    p.rows = rows[i];
    snprintf(name, sizeof name, "matmul %s %lldx%lld->%lld", acre_dtype_name(dtype),
             (long long)p.rows, (long long)K, (long long)N);
    if (!strstr(name, filter)) continue;
    run_product(&p);
    check_product(&p, w, K, dtype);
    double flops = 2.0 * (double)(p.rows * N * K);
    double bytes = (double)(N * K) * (double)acre_dtype_size(dtype);
    report(name, backend->threads, best_time((timed){run_product, &p}), flops, bytes);
  }
  backend->ops->matrix_release(p.W);
  acre_free(w), acre_free(p.x), acre_free(p.typed_x), acre_free(p.y);
}

/* ---------------------------------------------------------------- attention */

typedef struct attention {
  acre_backend *backend;
  acre_queue *queue;
  void *out;
  float *q;
  acre_keys prefix, own;
  int64_t rows;
  acre_heads heads;
} attention;

static void run_attention(void *context) {
  const attention *a = context;
  int64_t stride = a->heads.heads * a->heads.head_dim;
  a->backend->ops->attend(a->queue, a->out, stride, a->q, stride, &a->prefix, &a->own, 0,
                          a->rows, true, &a->heads);
}

static double element(const void *x, int64_t i, acre_dtype dtype) {
  return dtype == ACRE_F32 ? ((const float *)x)[i]
                           : acre_from_bf16(((const uint16_t *)x)[i]);
}

/* Values are all 1 in the last dimension: so must be the outputs. */
static void check_attention(const attention *a) {
  int64_t d = a->heads.head_dim, n = a->rows * a->heads.heads;
  for (int64_t i = 0; i < n; i++)
    if (!(fabs(element(a->out, i * d + d - 1, a->heads.dtype) - 1.0) < 1e-3)) {
      fprintf(stderr, "attention is wrong at %lld\n", (long long)i);
      exit(1);
    }
}

static void bench_attention(acre_backend *backend, acre_queue *queue, int64_t rows,
                            int64_t prefix, acre_dtype dtype) {
  int64_t h = 9, g = 3, d = 64, width = g * d;
  char name[64];
  snprintf(name, sizeof name, "attend %s %lld rows, prefix %lld", acre_dtype_name(dtype),
           (long long)rows, (long long)prefix);
  if (!strstr(name, filter)) return;
  float *x = floats((prefix + rows) * width);
  attention a = {
      .backend = backend, .queue = queue, .rows = rows, .heads = {h, g, d, dtype}};
  void *keys = typed(x, (prefix + rows) * width, dtype);
  for (int64_t i = d - 1; i < (prefix + rows) * width; i += d) x[i] = 1.0f;
  void *values = typed(x, (prefix + rows) * width, dtype);
  size_t offset = (size_t)(prefix * width) * acre_dtype_size(dtype);
  a.prefix = (acre_keys){keys, values, NULL, prefix};
  a.own = (acre_keys){(char *)keys + offset, (char *)values + offset, NULL, rows};
  a.q = floats(rows * h * d);
  a.out = floats(rows * h * d);
  run_attention(&a);
  check_attention(&a);
  double seen = (double)rows * ((double)prefix + (double)(rows + 1) / 2);
  report(name, backend->threads, best_time((timed){run_attention, &a}),
         4.0 * seen * (double)(h * d),
         2.0 * (double)((prefix + rows) * width) * (double)acre_dtype_size(dtype));
  acre_free(x), acre_free(keys), acre_free(values), acre_free(a.q), acre_free(a.out);
}

static void bench_threads(int32_t threads, const char *isa) {
  static const int64_t shapes[][2] = {
      {576, 960}, {576, 576}, {576, 3072}, {1536, 576}, {576, 49152}};
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
  for (int kind = 0; kind < 2; kind++) {
    acre_dtype dtype = kind ? ACRE_BF16 : ACRE_F32;
    use_peak_of(dtype);
    for (int64_t i = 0; i < ACRE_COUNT(shapes); i++)
      bench_product(backend, queue, shapes[i][0], shapes[i][1], dtype);
    bench_attention(backend, queue, 512, 2560, dtype);
    bench_attention(backend, queue, 512, 6144, dtype);
    bench_attention(backend, queue, 1, 6144, dtype);
    bench_attention(backend, queue, 1, 131072, dtype); /* beyond the caches */
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
