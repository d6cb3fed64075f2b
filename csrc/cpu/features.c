/* Asks the processor and the system (which must save the wide registers) once per
 * call. */
#include "features.h"

uint32_t acre_cpu_features(void) {
  uint32_t features = 0;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    features |= ACRE_CPU_AVX2;
  if (features && __builtin_cpu_supports("avx512f")) features |= ACRE_CPU_AVX512;
  if (features & ACRE_CPU_AVX512 && __builtin_cpu_supports("avx512bf16") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
    features |= ACRE_CPU_BF16;
#endif
  return features;
}
