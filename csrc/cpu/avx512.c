/* The AVX-512F table: the template with 16 lanes. The transposition stays AVX2's: it is
 * bound by shuffles and stores, not by width. */
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
#else
#pragma GCC pop_options
#endif

void acre_kernels_avx512(acre_kernels *table, uint32_t features) {
  if (!(features & ACRE_CPU_AVX512)) return;
  fill_table(table);
  table->isa = "avx512";
}

#else

void acre_kernels_avx512(acre_kernels *table, uint32_t features) {
  (void)table, (void)features;
}

#endif
