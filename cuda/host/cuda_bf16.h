/* bfloat16 as CUDA names it, on the host. */
#ifndef ACRE_HOST_CUDA_BF16_H
#define ACRE_HOST_CUDA_BF16_H

#include "bf16.h"

struct __nv_bfloat16 {
  uint16_t bits;
};

static inline float __bfloat162float(__nv_bfloat16 x) { return acre_from_bf16(x.bits); }
static inline __nv_bfloat16 __float2bfloat16_rn(float x) { return {acre_to_bf16(x)}; }

#endif
