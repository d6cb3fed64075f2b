/* The template's vocabulary in AVX-512F: 16 lanes, so a panel is one vector. */
#ifndef ACRE_SIMD_AVX512_H
#define ACRE_SIMD_AVX512_H

#include <immintrin.h>

#define V_LANES 16
#define V_MAX_ROWS 12 /* with two panels: 24 accumulators */
#define V_GROUP(rows) ((rows) == 1 ? 8 : (rows) <= 6 ? 4 : 2)
#define V_INLINE static inline __attribute__((always_inline))

typedef __m512 vf;

V_INLINE vf v_zero(void) { return _mm512_setzero_ps(); }
V_INLINE vf v_set1(float x) { return _mm512_set1_ps(x); }
V_INLINE vf v_load(const float *from) { return _mm512_loadu_ps(from); }
V_INLINE void v_store(float *to, vf x) { _mm512_storeu_ps(to, x); }
V_INLINE vf v_add(vf a, vf b) { return _mm512_add_ps(a, b); }
V_INLINE vf v_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
V_INLINE vf v_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
V_INLINE vf v_div(vf a, vf b) { return _mm512_div_ps(a, b); }
V_INLINE vf v_sqrt(vf x) { return _mm512_sqrt_ps(x); }
V_INLINE vf v_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
V_INLINE vf v_negate(vf x) {
  __m512i sign = _mm512_set1_epi32((int)0x80000000u);
  return _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(x), sign));
}
/* The second operand where either is NaN. */
V_INLINE vf v_max(vf a, vf b) { return _mm512_max_ps(a, b); }
V_INLINE vf v_min(vf a, vf b) { return _mm512_min_ps(a, b); }
/* x, but 0 where y < limit. */
V_INLINE vf v_zero_below(vf x, vf y, vf limit) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(y, limit, _CMP_NLT_UQ), x);
}

/* The first n < 16 lanes. */
V_INLINE __mmask16 v_mask(int64_t n) { return (__mmask16)((1u << n) - 1u); }
V_INLINE vf v_load_first(const float *from, int64_t n, vf rest) {
  return _mm512_mask_loadu_ps(rest, v_mask(n), from);
}
V_INLINE void v_store_first(float *to, vf x, int64_t n) {
  _mm512_mask_storeu_ps(to, v_mask(n), x);
}
V_INLINE vf v_keep_first(vf x, int64_t n, vf rest) {
  return _mm512_mask_mov_ps(rest, v_mask(n), x);
}

V_INLINE vf v_rint(vf x) { /* ties to even */
  return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
/* p * 2^n, n whole and <= 127; 0 where n < low. */
V_INLINE vf v_times_power(vf p, vf n, vf low) {
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(n, low, _CMP_NLT_UQ), p, n);
}
V_INLINE bool v_any_above(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0; }
/* Lanes 0, 2, 4, ... and 1, 3, 5, ... of a, then of b. */
V_INLINE vf v_even(vf a, vf b) {
  __m512i lanes =
      _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  return _mm512_permutex2var_ps(a, lanes, b);
}
V_INLINE vf v_odd(vf a, vf b) {
  __m512i lanes =
      _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  return _mm512_permutex2var_ps(a, lanes, b);
}

/* 2^n for the whole n in the low bits of shifted = n + 1.5 * 2^23. */
V_INLINE vf v_power(vf shifted) {
  __m512i bias = _mm512_set1_epi32(127 - 0x4b400000);
  __m512i n = _mm512_add_epi32(_mm512_castps_si512(shifted), bias);
  return _mm512_castsi512_ps(_mm512_slli_epi32(n, 23));
}

/* Halves of 16 bf16 pairs, and 16 bf16 in a row. */
V_INLINE vf v_load_even(const uint16_t *pairs) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(pairs), 16));
}
V_INLINE vf v_load_odd(const uint16_t *pairs) {
  __m512i mask = _mm512_set1_epi32((int)0xffff0000u);
  return _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(pairs), mask));
}
V_INLINE vf v_widen(const uint16_t *from) {
  __m512i x = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
}

/* Halves of 16 int8 pairs. */
V_INLINE vf v_even_q8(const int8_t *pairs) {
  const __m256i *from = (const __m256i *)(const void *)pairs;
  __m512i x = _mm512_cvtepi16_epi32(_mm256_loadu_si256(from));
  return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(x, 24), 24));
}
V_INLINE vf v_odd_q8(const int8_t *pairs) {
  const __m256i *from = (const __m256i *)(const void *)pairs;
  __m512i x = _mm512_cvtepi16_epi32(_mm256_loadu_si256(from));
  return _mm512_cvtepi32_ps(_mm512_srai_epi32(x, 8));
}

/* bfloat16(x) in the upper half of each lane; the lower half is rubbish. */
V_INLINE __m512i v_round_bits(vf x) {
  __m512i u = _mm512_castps_si512(x);
  __m512i tie = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  __m512i up = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), tie);
  __m512i quiet = _mm512_or_si512(u, _mm512_set1_epi32(0x400000));
  return _mm512_mask_mov_epi32(up, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), quiet);
}
V_INLINE vf v_round(vf x) {
  __m512i mask = _mm512_set1_epi32((int)0xffff0000u);
  return _mm512_castsi512_ps(_mm512_and_si512(v_round_bits(x), mask));
}
V_INLINE void v_narrow(uint16_t *to, vf x) {
  __m256i packed = _mm512_cvtepi32_epi16(_mm512_srli_epi32(v_round_bits(x), 16));
  _mm256_storeu_si256((__m256i *)to, packed);
}

/* x[i][j] = x[j][i], 16 by 16. */
V_INLINE void v_transpose(vf x[16]) {
  vf a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
    a[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) { /* quarters of columns i % 4, of rows i to i + 3 */
    b[i] = _mm512_shuffle_ps(a[i], a[i + 2], 0x44);
    b[i + 1] = _mm512_shuffle_ps(a[i], a[i + 2], 0xee);
    b[i + 2] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0x44);
    b[i + 3] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0xee);
  }
  for (int i = 0; i < 4; i++) { /* quarters of rows i, i + 4, i + 8, i + 12 */
    vf c = _mm512_shuffle_f32x4(b[i], b[i + 4], 0x88);
    vf d = _mm512_shuffle_f32x4(b[i], b[i + 4], 0xdd);
    vf e = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0x88);
    vf f = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0xdd);
    x[i] = _mm512_shuffle_f32x4(c, e, 0x88);
    x[i + 8] = _mm512_shuffle_f32x4(c, e, 0xdd);
    x[i + 4] = _mm512_shuffle_f32x4(d, f, 0x88);
    x[i + 12] = _mm512_shuffle_f32x4(d, f, 0xdd);
  }
}

V_INLINE float v_first(vf x) { return _mm_cvtss_f32(_mm512_castps512_ps128(x)); }

/* First step of a tree: lanes i and i + 8 of the 16 in x. */
V_INLINE __m256 v_fold(const vf x[1]) {
  __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x[0]), 1));
  return _mm256_add_ps(_mm512_castps512_ps256(x[0]), high);
}
V_INLINE float v_highest(vf x) {
  __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x), 1));
  __m256 z = _mm256_max_ps(_mm512_castps512_ps256(x), high);
  __m128 y = _mm_max_ps(_mm256_castps256_ps128(z), _mm256_extractf128_ps(z, 1));
  y = _mm_max_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}

#endif
