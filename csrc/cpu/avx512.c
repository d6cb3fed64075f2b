/* The AVX-512 table: the template with 16 lanes, and for processors that multiply pairs
 * of bf16 the kernels that do (bf16.inc).
 *
 * Two parts of the file are compiled for two sets of instructions; a processor without
 * the second never runs into it. */
#include "kernels.h"

#if defined(__x86_64__)

#include <math.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx2,fma")
#endif

#include "simd_avx512.h"
#include "vector.inc"

#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(                                                 \
    __attribute__((target("avx512bf16,avx512bw,avx512vl,avx512f,avx2,fma"))), \
    apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512bf16,avx512bw,avx512vl,avx512f,avx2,fma")
#endif

#include "bf16.inc"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

void acre_kernels_avx512(acre_kernels *table, uint32_t features) {
  if (!(features & ACRE_CPU_AVX512)) return;
  fill_table(table);
  table->isa = "avx512";
  if (!(features & ACRE_CPU_BF16)) return;
  fill_pairs(table);
  table->isa = "avx512_bf16";
}

#else

void acre_kernels_avx512(acre_kernels *table, uint32_t features) {
  (void)table, (void)features;
}

#endif
