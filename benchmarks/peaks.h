/* What this machine can do, measured in the same run as what is compared with it:
 * multiply-adds per second by the widest instruction of a table, bytes read per second
 * from memory, and the best time of a repeated call. Shared by the C benchmarks. */
#ifndef ACRE_PEAKS_H
#define ACRE_PEAKS_H

#include "acre.h"
#include "platform.h"
#include "pool.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define REPEATS 12
#define SECONDS \
  0.01 /* least time of a repeat: short, to fall between other programs' work */

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

/* Operations per second, a multiply-add counting as two. */
static double measure_flops(acre_pool *pool, const char *isa, acre_dtype dtype) {
  double flops;
  int64_t count = acre_pool_threads(pool);
  acre_task burn = burn_of(isa, dtype, &flops);
  loop burning = {pool, burn, NULL, count};
  return (double)count * flops / best_time((timed){run_loop, &burning});
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

/* Bytes per second that all threads together read from memory. */
static double measure_read(acre_pool *pool) {
  read_job job = {0};
  uint64_t *data = acre_alloc((size_t)READ_BYTES);
  if (!data) exit(1);
  for (int64_t i = 0; i < READ_BYTES / 8; i++) data[i] = (uint64_t)i * 0x9e3779b97f4a7c15u;
  job.data = data;
  loop reading = {pool, read_task, &job, READ_TASKS};
  double seconds = best_time((timed){run_loop, &reading});
  acre_free(data);
  return (double)READ_BYTES / seconds;
}

#endif
