/* One small kernel of the AVX2 table, a hundred times, for an instruction counter.
 *
 *     valgrind --tool=callgrind --toggle-collect=measured count_kernels NAME
 *
 * Takes a name of the list below (none: prints the list). Counts do not depend on what
 * else the machine does, so they can be a hard gate where times cannot; AVX2, because
 * the counter does not know wider registers. Sizes are SmolLM2-135M's. */
#include "cpu/kernels.h"

#include <stdio.h>
#include <stdlib.h>

#define TIMES 100
#define FLOATS (1 << 16)

static acre_kernels table;
static float *x, *y, *z;
static float origin[ACRE_ROWS_LIMIT], sum[ACRE_ROWS_LIMIT], factor[ACRE_ROWS_LIMIT];

static void rmsnorm(void) { table.of[ACRE_BF16].rmsnorm(y, x, z, 1e-5, 576); }
static void swiglu(void) { table.swiglu(y, x, z, 1536); }
static void store(void) { table.of[ACRE_BF16].store(y, x, 1536); }
static void widen(void) { table.of[ACRE_BF16].widen(y, x, 1536); }
static void rope(void) { table.rope(y, x, z, z + 32, 32); }
static void add(void) { table.add(y, x, z, 576); }
static void keys(void) { table.of[ACRE_BF16].keys(y, x, 192, 64, 64); }
static void values(void) { table.of[ACRE_BF16].values(y, x, 192, 64, 64); }
static void softmax(void) {
  table.of[ACRE_BF16].softmax(y, NULL, 6, 64, 0.18f, origin, sum, factor);
}
static void add_exp2(void) { table.add_exp2(y, x, 64, 0.18f, 3.0f, 0.01f); }

static const struct {
  const char *name;
  void (*run)(void);
} kernels[] = {{"rmsnorm", rmsnorm},  {"swiglu", swiglu}, {"store", store},
               {"widen", widen},      {"rope", rope},     {"add", add},
               {"keys", keys},        {"values", values}, {"softmax", softmax},
               {"add_exp2", add_exp2}};

__attribute__((noinline)) void measured(void (*run)(void));
void measured(void (*run)(void)) {
  for (int i = 0; i < TIMES; i++) run();
}

int main(int argc, char **argv) {
  table = acre_cpu_kernels(ACRE_CPU_AVX2);
  x = calloc(FLOATS, sizeof *x), y = calloc(FLOATS, sizeof *y);
  z = calloc(FLOATS, sizeof *z);
  if (!x || !y || !z) return 1;
  for (int64_t i = 0; i < ACRE_COUNT(kernels); i++) {
    if (argc < 2) puts(kernels[i].name);
    if (argc == 2 && strcmp(argv[1], kernels[i].name) == 0) measured(kernels[i].run);
  }
  free(x), free(y), free(z);
  return 0;
}
