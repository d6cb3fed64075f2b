/* What tests of leaf kernels share: the tables, random and poisoned memory, numbers of T. */
#ifndef ACRE_TABLES_H
#define ACRE_TABLES_H

#include "check.h"
#include "guard.h"

#include "cpu/kernels.h"

#include <math.h>
#include <stdlib.h>

#define EPS 0x1p-24 /* unit roundoff of float32 */
#define CANARY 32   /* floats after an output that must stay as they were */
#define POISON 0x7fc0dead

static acre_kernels tables[4];
static int table_count;
static uint64_t seed;

/* ---------------------------------------------------------------- memory */

static inline float *poisoned(int64_t n) {
  float *x = guarded_alloc((size_t)(n + CANARY) * sizeof(float));
  for (int64_t i = 0; i < n + CANARY; i++) x[i] = acre_from_bits(POISON);
  return x;
}

static inline float *random_floats(int64_t n) {
  float *x = guarded_alloc((size_t)n * sizeof(float));
  for (int64_t i = 0; i < n; i++) x[i] = random_float(&seed);
  return x;
}

static inline bool unharmed(const float *x, int64_t n) {
  for (int64_t i = n; i < n + CANARY; i++)
    if (acre_bits(x[i]) != POISON) return false;
  return true;
}

static inline bool same(const void *a, const void *b, int64_t n) {
  return memcmp(a, b, (size_t)n * sizeof(float)) == 0;
}

/* ---------------------------------------------------------------- numbers of T */

static inline void *typed(const float *x, int64_t n, acre_dtype dtype) {
  size_t size = acre_dtype_size(dtype);
  void *y = guarded_alloc((size_t)n * size);
  tables[0].of[dtype].store(y, x, n);
  return y;
}

static inline float value(const void *x, int64_t i, acre_dtype dtype) {
  return dtype == ACRE_F32 ? ((const float *)x)[i]
                           : acre_from_bf16(((const uint16_t *)x)[i]);
}

/* Operands, as this table keeps them: room for n, and the i-th. */
static inline void *operands(const acre_typed *T, int64_t n) {
  uint8_t *a = guarded_alloc((size_t)(n * T->operand));
  memset(a, 0x7f, (size_t)(n * T->operand));
  return a;
}

static inline float operand(const acre_typed *T, const void *a, int64_t i) {
  return value(a, i, T->operand == 2 ? ACRE_BF16 : ACRE_F32);
}

/* b[x][j] of a panel of operands. */
static inline float in_panel(const acre_typed *T, const void *panel, int64_t x, int64_t j) {
  int64_t pairs = x / 2 * (2 * ACRE_PANEL) + 2 * j + x % 2;
  return operand(T, panel, T->operand == 2 ? pairs : x * ACRE_PANEL + j);
}

/* The tables that this processor can run; a seed may be given on the command line. */
static inline void open_tables(int argc, char **argv) {
  seed = argc > 1 ? strtoull(argv[1], NULL, 10) : 20250712;
  static const uint32_t rungs[] = {0, ACRE_CPU_AVX2, ACRE_CPU_AVX2 | ACRE_CPU_AVX512,
                                   ACRE_CPU_AVX2 | ACRE_CPU_AVX512 | ACRE_CPU_BF16};
  printf("seed %llu, tables:", (unsigned long long)seed);
  for (int i = 0; i < 4; i++)
    if ((acre_cpu_features() & rungs[i]) == rungs[i]) {
      tables[table_count] = acre_cpu_kernels(rungs[i]);
      printf(" %s", tables[table_count++].isa);
    }
  printf("\n");
}

#endif
