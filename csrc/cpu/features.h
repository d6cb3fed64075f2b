/* What this processor offers, as bits: an argument of the kernel table, never a
 * global. */
#ifndef ACRE_CPU_FEATURES_H
#define ACRE_CPU_FEATURES_H

#include <stdint.h>

#define ACRE_CPU_AVX2 1u   /* AVX2 and FMA */
#define ACRE_CPU_AVX512 2u /* AVX-512F, and all of the above */
#define ACRE_CPU_BF16 4u   /* AVX-512 BF16, BW and VL, and all of the above */

uint32_t acre_cpu_features(void);

#endif
