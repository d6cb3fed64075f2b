/* A warp's matrix instructions on the host, lane by lane: which lane holds which numbers is
 * as the PTX manual draws it, so that a wrong index gives a wrong result.
 *
 * Lane l is of row l / 4 and of the pair of columns l % 4. */
#ifndef ACRE_HOST_MATRIX_UNIT_H
#define ACRE_HOST_MATRIX_UNIT_H

#include "bf16.h"

#include <cuda_runtime.h>
#include <stdlib.h>

/* ldmatrix .x4: four 8 x 8 matrices of 16-bit numbers. Lane 8 i + j says where row j of matrix
 * i lies; `turned`: transposed on the way. */
struct acre_host_ldmatrix {
  const void *row;
  uint32_t *to; /* [4] */
};

static inline void acre_host_load(void *const *parts, bool turned) {
  uint16_t numbers[4][8][8];
  unsigned banks[4] = {0}; /* groups of four that a matrix's rows lie in */
  for (int i = 0; i < 32; i++) {
    const void *row = ((const acre_host_ldmatrix *)parts[i])->row;
    if ((uintptr_t)row % 16 != 0) abort();
    banks[i / 8] |= 1u << ((uintptr_t)row / 16 % 8);
    memcpy(numbers[i / 8][i % 8], row, 16);
  }
  for (int i = 0; i < 4; i++)
    if (banks[i] != 0xff) acre_host_conflict();
  for (int lane = 0; lane < 32; lane++) {
    for (int i = 0; i < 4; i++) {
      int r = lane / 4, c = lane % 4 * 2;
      uint16_t low = turned ? numbers[i][c][r] : numbers[i][r][c];
      uint16_t high = turned ? numbers[i][c + 1][r] : numbers[i][r][c + 1];
      ((const acre_host_ldmatrix *)parts[lane])->to[i] = (uint32_t)high << 16 | low;
    }
  }
}

static inline void acre_host_load_straight(void *const *parts, int) {
  acre_host_load(parts, false);
}
static inline void acre_host_load_turned(void *const *parts, int) {
  acre_host_load(parts, true);
}

/* mma.m16n8k16: c [16, 8] += a [16, 16] b [16, 8]. Register i of a holds rows + 8 (i % 2) and
 * columns + 8 (i / 2), of b (k along its pairs) k + 8 i; of c the second pair is rows + 8. */
struct acre_host_mma {
  float *c;          /* [4] */
  const uint32_t *a; /* [4] */
  uint32_t b[2];
};

static inline float acre_host_half(uint32_t pair, int i) {
  return acre_from_bf16((uint16_t)(pair >> 16 * i));
}

static inline void acre_host_multiply(void *const *parts, int) {
  float a[16][16], b[8][16];
  for (int lane = 0; lane < 32; lane++) {
    const acre_host_mma *part = (const acre_host_mma *)parts[lane];
    int r = lane / 4, k = lane % 4 * 2;
    for (int i = 0; i < 8; i++)
      a[r + 8 * (i / 2 % 2)][k + 8 * (i / 4) + i % 2] =
          acre_host_half(part->a[i / 2], i % 2);
    for (int i = 0; i < 4; i++)
      b[r][k + 8 * (i / 2) + i % 2] = acre_host_half(part->b[i / 2], i % 2);
  }
  for (int lane = 0; lane < 32; lane++) {
    float *c = ((const acre_host_mma *)parts[lane])->c;
    for (int i = 0; i < 4; i++) {
      int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
      for (int k = 0; k < 16; k++) c[i] += a[row][k] * b[column][k];
    }
  }
}

#endif
