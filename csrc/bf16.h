/* A float's bits, and bfloat16: the upper half of a float32. */
#ifndef ACRE_BF16_H
#define ACRE_BF16_H

#include <stdint.h>
#include <string.h>

static inline uint32_t acre_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

static inline float acre_from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

static inline float acre_from_bf16(uint16_t half) {
  return acre_from_bits((uint32_t)half << 16);
}

/* Rounds to nearest even; NaN stays NaN. */
static inline uint16_t acre_to_bf16(float value) {
  uint32_t bits = acre_bits(value);
  if (value != value) return (uint16_t)(bits >> 16 | 0x40); /* quiet */
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

#endif
