/* How fast the CPU kernels are, next to what this machine can do in the same run.
 *
 * First the ceilings: multiply-add peak and read bandwidth, one thread and all. Then matrix
 * products of SmolLM2-135M's shapes, window attention and one decoded row, each checked
 * against a float64 sum of a few elements before it is timed: a wrong kernel prints
 * nothing. One line per case: name, threads, milliseconds, GFLOP/s, GB/s, share of the
 * ceiling.
 *
 * bench_kernels [isa] */
#include "backend.h"
#include "cpu/kernels.h"
#include "platform.h"
#include "pool.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#define REPEATS 12
#define SECONDS \
  0.01 /* least time of a repeat: short, to fall between other programs' work */

/* Of the threads and numbers in use: the most seen so far. */
static double peaks[2], *peak_gflops = peaks, peak_gbytes;

/* One thread is timed by its own processor time, which neighbours disturb less. */
static bool alone;

static double now(void) {
  struct timespec t;
  if (!alone) return acre_clock();
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

typedef struct timed {
  void (*run)(void *context);
  void *context;
} timed;

/* Seconds of one run: the best of several repeats, each long enough to be measured. */
static double best_time(timed what) {
  double best = INFINITY;
  what.run(what.context);
  for (int i = 0; i < REPEATS; i++) {
    double start = now(), end = start;
    int64_t runs = 0;
    do {
      what.run(what.context);
      runs++;
      end = now();
    } while (end - start < SECONDS);
    double each = (end - start) / (double)runs;
    best = each < best ? each : best;
  }
  return best;
}

static void measure_peak(void);
static void use_peak_of(acre_dtype dtype);

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

/* Fourteen independent chains of multiply-adds and no memory, by the widest instruction
 * that the table uses for numbers of a type. */
#define STEPS 20000

#if defined(__x86_64__)
#define FOURTEEN(x) \
  x(0) x(1) x(2) x(3) x(4) x(5) x(6) x(7) x(8) x(9) x(10) x(11) x(12) x(13)
#define CHAINS 14
#define CLEAR(i) "vxorps %%ymm" #i ", %%ymm" #i ", %%ymm" #i "\n\t"
#define FMA_256(i) "vfmadd231ps %%ymm14, %%ymm15, %%ymm" #i "\n\t"
#define FMA_512(i) "vfmadd231ps %%zmm14, %%zmm15, %%zmm" #i "\n\t"
#define PAIRS(i) "vdpbf16ps %%zmm14, %%zmm15, %%zmm" #i "\n\t"
#define BURN(name, isa, instruction)                                                    \
  __attribute__((target(isa))) static void name(void *context, int64_t index,           \
                                                int32_t worker) {                       \
    (void)context, (void)index, (void)worker;                                           \
    int64_t n = STEPS;                                                                  \
    __asm__ volatile(                                                                   \
        FOURTEEN(CLEAR) CLEAR(14)                                                       \
            CLEAR(15) "1:\n\t" FOURTEEN(instruction) "dec %0\n\tjnz 1b\n\tvzeroupper"   \
        : "+r"(n)                                                                       \
        :                                                                               \
        : "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", \
          "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");                \
  }
BURN(burn_256, "avx2,fma", FMA_256)
BURN(burn_512, "avx512f", FMA_512)
BURN(burn_pairs, "avx512f,avx512bf16", PAIRS)
#else
#define CHAINS 1
static void burn(void *context, int64_t index, int32_t worker) {
  (void)worker;
  volatile float result;
  float x = (float)index;
  for (int64_t n = 0; n < STEPS; n++) x = fmaf(x, 0.5f, 1.0f);
  result = x;
  (void)context, (void)result;
}
#endif

/* The loop that a table's products of this type are measured by, and its operations. */
static acre_task burn_of(const char *isa, acre_dtype dtype, double *flops) {
  double lanes = strncmp(isa, "avx512", 6) == 0 ? 16 : strcmp(isa, "avx2") == 0 ? 8 : 1;
  bool pairs = dtype == ACRE_BF16 && strcmp(isa, "avx512_bf16") == 0;
  *flops = (double)STEPS * CHAINS * lanes * (pairs ? 4 : 2);
#if defined(__x86_64__)
  if (lanes == 1) *flops *= 8; /* scalar: measured by what the processor could do */
  return pairs ? burn_pairs : lanes == 16 ? burn_512 : burn_256;
#else
  return burn;
#endif
}

typedef struct loop {
  acre_pool *pool;
  acre_task task;
  void *context;
  int64_t count;
} loop;

static void run_loop(void *context) {
  const loop *l = context;
  acre_pool_run(l->pool, l->task, l->context, l->count);
}

#define READ_BYTES ((int64_t)512 << 20)
#define READ_TASKS 64

typedef struct read_job {
  const uint64_t *data;
  uint64_t sums[READ_TASKS];
} read_job;

static void read_task(void *context, int64_t index, int32_t worker) {
  (void)worker;
  read_job *job = context;
  int64_t words = READ_BYTES / 8 / READ_TASKS / 4; /* four streams, as the kernels read */
  const uint64_t *x = job->data + index * words * 4;
  uint64_t sum[4] = {0};
  for (int64_t i = 0; i < words; i += 8)
    for (int s = 0; s < 4; s++) {
      const uint64_t *line = x + s * words + i;
      __builtin_prefetch(line + 96);
      for (int j = 0; j < 8; j++) sum[s] ^= line[j];
    }
  for (int s = 1; s < 4; s++) sum[0] ^= sum[s];
  job->sums[index] = sum[0];
}

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
  double flops;
  int64_t count = acre_pool_threads(ceiling_pool);
  acre_task burn = burn_of(ceiling_isa, ceiling_dtype, &flops);
  loop burning = {ceiling_pool, burn, NULL, count};
  double gflops = (double)count * flops / best_time((timed){run_loop, &burning}) * 1e-9;
  if (gflops > *peak_gflops) *peak_gflops = gflops;
}

static void measure_ceilings(int32_t threads, const uint64_t *data) {
  static read_job job;
  job.data = data;
  if (acre_pool_open(&ceiling_pool, threads, NULL) != ACRE_OK) exit(1);
  loop reading = {ceiling_pool, read_task, &job, READ_TASKS};
  loop empty = {ceiling_pool, nothing, NULL, threads};
  alone = threads == 1;
  for (int dtype = 0; dtype < 2; dtype++) {
    peaks[dtype] = 0.0;
    use_peak_of((acre_dtype)dtype);
    measure_peak();
  }
  peak_gbytes = (double)READ_BYTES / best_time((timed){run_loop, &reading}) * 1e-9;
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
  if (backend->ops->matrix_create(backend, &p.W, N, K, dtype, NULL) != ACRE_OK) exit(1);
  backend->ops->matrix_fill(p.W, 0, &array, &finite);
  static const int64_t rows[] = {512, 32, 5, 1};
  p.x = floats(512 * K);
  p.typed_x = typed(p.x, 512 * K, dtype);
  p.y = floats(512 * N);
  for (int64_t i = 0; i < ACRE_COUNT(rows); i++) {
    char name[64];
    p.rows = rows[i];
    run_product(&p);
    check_product(&p, w, K, dtype);
    double flops = 2.0 * (double)(p.rows * N * K);
    double bytes = (double)(N * K) * (double)acre_dtype_size(dtype);
    snprintf(name, sizeof name, "matmul %s %lldx%lld->%lld", acre_dtype_name(dtype),
             (long long)p.rows, (long long)K, (long long)N);
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
  char name[64];
  snprintf(name, sizeof name, "attend %s %lld rows, prefix %lld", acre_dtype_name(dtype),
           (long long)rows, (long long)prefix);
  report(name, backend->threads, best_time((timed){run_attention, &a}),
         4.0 * seen * (double)(h * d),
         2.0 * (double)((prefix + rows) * width) * (double)acre_dtype_size(dtype));
  acre_free(x), acre_free(keys), acre_free(values), acre_free(a.q), acre_free(a.out);
}

static void bench_threads(int32_t threads, const char *isa, const uint64_t *data) {
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
  measure_ceilings(threads, data);
  for (int kind = 0; kind < 2; kind++) {
    acre_dtype dtype = kind ? ACRE_BF16 : ACRE_F32;
    use_peak_of(dtype);
    for (int64_t i = 0; i < ACRE_COUNT(shapes); i++)
      bench_product(backend, queue, shapes[i][0], shapes[i][1], dtype);
    bench_attention(backend, queue, 512, 2560, dtype);
    bench_attention(backend, queue, 512, 6144, dtype);
    bench_attention(backend, queue, 1, 6144, dtype);
  }
  backend->ops->queue_close(queue);
  backend->ops->destroy(backend);
  acre_pool_close(ceiling_pool);
}

int main(int argc, char **argv) {
  const char *isa = argc > 1 ? argv[1] : NULL;
  uint64_t *data = acre_alloc((size_t)READ_BYTES);
  if (!data) return 1;
  for (int64_t i = 0; i < READ_BYTES / 8; i++) data[i] = (uint64_t)i * 0x9e3779b97f4a7c15u;
  int32_t cores = acre_cpu_count();
  bench_threads(1, isa, data);
  if (cores > 1) bench_threads(cores, isa, data);
  acre_free(data);
  return 0;
}
