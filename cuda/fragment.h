/* What the products of every matrix unit have in common: pairs of bf16 in a register, and rows
 * of an 8 x 8 part of an accumulator that four neighbouring lanes have, two columns each. */
#ifndef ACRE_CUDA_FRAGMENT_H
#define ACRE_CUDA_FRAGMENT_H

#include "device.h"

namespace acre {

/* Two numbers, rounded, the first in the lower half. */
__device__ __forceinline__ uint32_t pair_of(float low, float high) {
#ifdef __CUDACC__
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#else
  return (uint32_t)narrow<bf16>(high).bits << 16 | narrow<bf16>(low).bits;
#endif
}

__device__ __forceinline__ float low_of(uint32_t pair) {
  return __uint_as_float(pair << 16);
}
__device__ __forceinline__ float high_of(uint32_t pair) {
  return __uint_as_float(pair & 0xffff0000u);
}

/* Of the four lanes that have a row. */
template <class F>
__device__ __forceinline__ float row_reduce(float x, F by) {
  x = by(x, __shfl_xor_sync(ALL_LANES, x, 1));
  return by(x, __shfl_xor_sync(ALL_LANES, x, 2));
}

/* 2^x, within two units of the last place; 0 below 2^-126. */
__device__ __forceinline__ float power(float x) {
#ifdef __CUDACC__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

}  // namespace acre
#endif
