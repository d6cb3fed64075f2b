/* The AVX2 table: the template with 8 lanes, and the transposition, which is all
 * shuffles.
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

/* to[x][j] = from[j][x], 8 by 8. */
static void transpose_8x8(float *to, int64_t to_stride, const float *from, int64_t stride) {
  __m256 a[8], b[8];
  for (int i = 0; i < 4; i++) { /* rows i and i + 4 side by side, both halves of x */
    const float *upper = from + i * stride, *lower = from + (i + 4) * stride;
    a[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(upper)),
                                _mm_loadu_ps(lower), 1);
    a[i + 4] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(upper + 4)),
                                    _mm_loadu_ps(lower + 4), 1);
  }
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    float *to_i = to + i * to_stride;
    _mm256_storeu_ps(to_i, _mm256_shuffle_ps(b[i], b[i + 2], 0x44));
    _mm256_storeu_ps(to_i + to_stride, _mm256_shuffle_ps(b[i], b[i + 2], 0xee));
    _mm256_storeu_ps(to_i + 2 * to_stride, _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44));
    _mm256_storeu_ps(to_i + 3 * to_stride, _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee));
  }
}

static void transpose(float *b, const float *keys, int64_t stride, int64_t rows,
                      int64_t k) {
  int64_t first = 0;
  if (rows == ACRE_PANEL)
    for (; first + 8 <= k; first += 8) {
      transpose_8x8(b + first * ACRE_PANEL, ACRE_PANEL, keys + first, stride);
      transpose_8x8(b + first * ACRE_PANEL + 8, ACRE_PANEL, keys + first + 8 * stride,
                    stride);
    }
  for (int64_t x = first; x < k; x++)
    for (int64_t j = 0; j < ACRE_PANEL; j++)
      b[x * ACRE_PANEL + j] = j < rows ? keys[j * stride + x] : 0.0f;
}

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

void acre_kernels_avx2(acre_kernels *table, uint32_t features) {
  if (!(features & ACRE_CPU_AVX2)) return;
  fill_table(table);
  table->isa = "avx2";
  table->transpose = transpose;
}

#else

void acre_kernels_avx2(acre_kernels *table, uint32_t features) {
  (void)table, (void)features;
}

#endif
