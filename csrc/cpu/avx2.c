/* The AVX2 table: the template with 8 lanes.
 *
 * Instructions are enabled here and not by the build, so that every file of the library
 * is compiled with the same flags. */
#include "kernels.h"

#if defined(__x86_64__)

#include <math.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

#include "simd_avx2.h"
#include "vector.inc"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

void acre_kernels_avx2(acre_kernels *table, uint32_t features) {
  if (!(features & ACRE_CPU_AVX2)) return;
  fill_table(table);
  table->isa = "avx2";
}

#else

void acre_kernels_avx2(acre_kernels *table, uint32_t features) {
  (void)table, (void)features;
}

#endif
