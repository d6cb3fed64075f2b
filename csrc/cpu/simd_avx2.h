/* The template's vocabulary in AVX2 and FMA: 8 lanes, so a panel of 16 is two
 * vectors. */
#ifndef ACRE_SIMD_AVX2_H
#define ACRE_SIMD_AVX2_H

#include <immintrin.h>

#define V_LANES 8
#define V_MAX_ROWS 6 /* rows of the largest tile: 12 accumulators */
#define V_GROUP(rows) ((rows) == 1 ? 4 : (rows) <= 3 ? 2 : 1) /* panels at once */
#define V_INLINE static inline __attribute__((always_inline))

typedef __m256 vf;

V_INLINE vf v_zero(void) { return _mm256_setzero_ps(); }
V_INLINE vf v_set1(float x) { return _mm256_set1_ps(x); }
V_INLINE vf v_load(const float *from) { return _mm256_loadu_ps(from); }
V_INLINE void v_store(float *to, vf x) { _mm256_storeu_ps(to, x); }
V_INLINE vf v_add(vf a, vf b) { return _mm256_add_ps(a, b); }
V_INLINE vf v_sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
V_INLINE vf v_mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
V_INLINE vf v_div(vf a, vf b) { return _mm256_div_ps(a, b); }
V_INLINE vf v_sqrt(vf x) { return _mm256_sqrt_ps(x); }
V_INLINE vf v_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
V_INLINE vf v_negate(vf x) { return _mm256_xor_ps(x, _mm256_set1_ps(-0.0f)); }
/* The second operand where either is NaN. */
V_INLINE vf v_max(vf a, vf b) { return _mm256_max_ps(a, b); }
V_INLINE vf v_min(vf a, vf b) { return _mm256_min_ps(a, b); }
/* x, but 0 where y < limit. */
V_INLINE vf v_zero_below(vf x, vf y, vf limit) {
  return _mm256_andnot_ps(_mm256_cmp_ps(y, limit, _CMP_LT_OQ), x);
}

/* The first n < 8 lanes. */
V_INLINE __m256i v_mask(int64_t n) {
  __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), lane);
}
V_INLINE vf v_load_first(const float *from, int64_t n, vf rest) {
  __m256i mask = v_mask(n);
  return _mm256_blendv_ps(rest, _mm256_maskload_ps(from, mask), _mm256_castsi256_ps(mask));
}
V_INLINE void v_store_first(float *to, vf x, int64_t n) {
  _mm256_maskstore_ps(to, v_mask(n), x);
}
V_INLINE vf v_keep_first(vf x, int64_t n, vf rest) {
  return _mm256_blendv_ps(rest, x, _mm256_castsi256_ps(v_mask(n)));
}

V_INLINE vf v_rint(vf x) { /* ties to even */
  return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
/* p * 2^n, n whole and <= 127; 0 where n < low. */
V_INLINE vf v_times_power(vf p, vf n, vf low) {
  __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  vf y = _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
  return v_zero_below(y, n, low);
}
V_INLINE bool v_any_above(vf a, vf b) {
  return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)) != 0;
}
/* Lanes 0, 2, 4, ... and 1, 3, 5, ... of a, then of b. */
V_INLINE vf v_even(vf a, vf b) {
  __m256d x = _mm256_castps_pd(_mm256_shuffle_ps(a, b, 0x88));
  return _mm256_castpd_ps(_mm256_permute4x64_pd(x, 0xd8));
}
V_INLINE vf v_odd(vf a, vf b) {
  __m256d x = _mm256_castps_pd(_mm256_shuffle_ps(a, b, 0xdd));
  return _mm256_castpd_ps(_mm256_permute4x64_pd(x, 0xd8));
}

/* 2^n for the whole n in the low bits of shifted = n + 1.5 * 2^23. */
V_INLINE vf v_power(vf shifted) {
  __m256i bias = _mm256_set1_epi32(127 - 0x4b400000);
  __m256i n = _mm256_add_epi32(_mm256_castps_si256(shifted), bias);
  return _mm256_castsi256_ps(_mm256_slli_epi32(n, 23));
}

/* Halves of 8 bf16 pairs, and 8 bf16 in a row. */
V_INLINE vf v_load_even(const uint16_t *pairs) {
  __m256i x = _mm256_loadu_si256((const __m256i *)pairs);
  return _mm256_castsi256_ps(_mm256_slli_epi32(x, 16));
}
V_INLINE vf v_load_odd(const uint16_t *pairs) {
  __m256i x = _mm256_loadu_si256((const __m256i *)pairs);
  return _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32((int)0xffff0000u)));
}
V_INLINE vf v_widen(const uint16_t *from) {
  __m256i x = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)from));
  return _mm256_castsi256_ps(_mm256_slli_epi32(x, 16));
}

/* Halves of 8 int8 pairs. */
V_INLINE vf v_even_q8(const int8_t *pairs) {
  __m256i x = _mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i *)(const void *)pairs));
  return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(x, 24), 24));
}
V_INLINE vf v_odd_q8(const int8_t *pairs) {
  __m256i x = _mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i *)(const void *)pairs));
  return _mm256_cvtepi32_ps(_mm256_srai_epi32(x, 8));
}

/* bfloat16(x) in the upper half of each lane; the lower half is rubbish. */
V_INLINE __m256i v_round_bits(vf x) {
  __m256i u = _mm256_castps_si256(x);
  __m256i tie = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  __m256i up = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), tie);
  __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
  __m256 nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
  return _mm256_blendv_epi8(up, quiet, _mm256_castps_si256(nan));
}
V_INLINE vf v_round(vf x) {
  __m256i mask = _mm256_set1_epi32((int)0xffff0000u);
  return _mm256_castsi256_ps(_mm256_and_si256(v_round_bits(x), mask));
}
V_INLINE void v_narrow(uint16_t *to, vf x) {
  __m256i u = _mm256_srli_epi32(v_round_bits(x), 16);
  __m128i packed =
      _mm_packus_epi32(_mm256_castsi256_si128(u), _mm256_extracti128_si256(u, 1));
  _mm_storeu_si128((__m128i *)to, packed);
}

/* x[i][j] = x[j][i], 8 by 8. */
V_INLINE void v_transpose(vf x[8]) {
  vf a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
    a[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) { /* halves of columns i % 4, of rows i to i + 3 */
    b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
    b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
    b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
    b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
  }
  for (int i = 0; i < 4; i++) {
    x[i] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
    x[i + 4] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
  }
}

V_INLINE float v_first(vf x) { return _mm_cvtss_f32(_mm256_castps256_ps128(x)); }

/* First step of a tree: lanes i and i + 8 of the 16 in x. */
V_INLINE __m256 v_fold(const vf x[2]) { return _mm256_add_ps(x[0], x[1]); }
V_INLINE float v_highest(vf x) {
  __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_max_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}

#endif
