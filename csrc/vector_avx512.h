// Sixteen floats at a time, with AVX-512 F, BW, DQ and VL. Each operation equals Scalar's.
#ifndef HF_SPEED_VECTOR_AVX512_H_
#define HF_SPEED_VECTOR_AVX512_H_

#include <immintrin.h>

#include "vector_scalar.h"

namespace {

struct Avx512 {
  using F = __m512;
  using I = __m512i;
  static constexpr int64_t kWidth = 16;

  HFS_INLINE F set(float x) { return _mm512_set1_ps(x); }
  HFS_INLINE F load(const float* at) { return _mm512_loadu_ps(at); }
  HFS_INLINE void store(float* at, F x) { _mm512_storeu_ps(at, x); }
  HFS_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
  HFS_INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  HFS_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  HFS_INLINE F div(F a, F b) { return _mm512_div_ps(a, b); }
  HFS_INLINE F sqrt(F a) { return _mm512_sqrt_ps(a); }
  HFS_INLINE F sign(F a) {
    const __mmask16 above = _mm512_cmp_ps_mask(a, _mm512_setzero_ps(), _CMP_GT_OQ);
    const __mmask16 below = _mm512_cmp_ps_mask(a, _mm512_setzero_ps(), _CMP_LT_OQ);
    return _mm512_mask_mov_ps(_mm512_maskz_mov_ps(above, set(1.0f)), below, set(-1.0f));
  }

  HFS_INLINE F load_bf16(const uint16_t* at) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  HFS_INLINE F load_fp16(const uint16_t* at) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
  }
  // The upper halves of `rounded`, or a quiet NaN where x is one.
  HFS_INLINE __m256i upper_halves(F x, I rounded) {
    const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    const I quiet = _mm512_or_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x400000));
    rounded = _mm512_mask_mov_epi32(rounded, is_nan, quiet);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
  }
  // The instruction for it, VCVTNEPS2BF16, flushes subnormals.
  HFS_INLINE __m256i bf16_nearest(F x) {
    const I bits = _mm512_castps_si512(x);
    const I odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const I half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF));
    return upper_halves(x, _mm512_add_epi32(bits, half));
  }
  HFS_INLINE void store_bf16(uint16_t* at, F x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), bf16_nearest(x));
  }
  HFS_INLINE void store_fp16(uint16_t* at, F x) {
    const __m256i half = _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), half);
  }

  HFS_INLINE I random(uint32_t low, uint32_t first, uint32_t second) {
    const I lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    I x = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int32_t>(low)), lanes);
    x = _mm512_xor_si512(x, _mm512_set1_epi32(static_cast<int32_t>(first)));
    x = _mm512_xor_si512(x, _mm512_srli_epi32(x, 16));
    x = _mm512_mullo_epi32(x, _mm512_set1_epi32(0x7FEB352D));
    x = _mm512_xor_si512(x, _mm512_srli_epi32(x, 15));
    x = _mm512_add_epi32(x, _mm512_set1_epi32(static_cast<int32_t>(second)));
    x = _mm512_mullo_epi32(x, _mm512_set1_epi32(static_cast<int32_t>(0x846CA68Bu)));
    return _mm512_xor_si512(x, _mm512_srli_epi32(x, 16));
  }
  HFS_INLINE I low_half(I bits) { return _mm512_and_si512(bits, _mm512_set1_epi32(0xFFFF)); }
  HFS_INLINE I high_half(I bits) { return _mm512_srli_epi32(bits, 16); }
  HFS_INLINE void store_bf16(uint16_t* at, F x, I random16) {
    const I sum = _mm512_add_epi32(_mm512_castps_si512(x), random16);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), upper_halves(x, sum));
  }

  HFS_INLINE F load_signed(const uint8_t* at) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
    const F c = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
    const F t = div(_mm512_abs_ps(c), set(127.0f));
    const __mmask16 below = _mm512_cmp_ps_mask(c, _mm512_setzero_ps(), _CMP_LT_OQ);
    const F square = mul(t, t);
    return _mm512_mask_xor_ps(square, below, square, set(-0.0f));
  }
  HFS_INLINE F load_unsigned(const uint8_t* at) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
    const F t = div(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes)), set(255.0f));
    const F u = mul(t, t);
    return mul(u, u);
  }
  // x + 0.5 rounded down, 0 for a NaN: x is not negative, so this is truncation.
  HFS_INLINE I whole(F x) {
    const __mmask16 fits = _mm512_cmp_ps_mask(x, set(256.0f), _CMP_LT_OQ);
    return _mm512_maskz_cvttps_epi32(fits, x);
  }
  HFS_INLINE void store_bytes(uint8_t* at, I codes) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(at), _mm512_cvtepi32_epi8(codes));
  }
  HFS_INLINE void store_signed(uint8_t* at, F x, F divisor) {
    const F share = div(_mm512_abs_ps(x), divisor);
    I code = whole(add(mul(sqrt(share), set(127.0f)), set(0.5f)));
    const __mmask16 below = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
    code = _mm512_mask_sub_epi32(code, below, _mm512_setzero_si512(), code);
    store_bytes(at, code);
  }
  HFS_INLINE void store_unsigned(uint8_t* at, F x, F divisor) {
    const F share = div(_mm512_abs_ps(x), divisor);
    I code = whole(add(mul(sqrt(sqrt(share)), set(255.0f)), set(0.5f)));
    const __mmask16 above = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GT_OQ);
    code = _mm512_mask_max_epi32(code, above, code, _mm512_set1_epi32(1));
    store_bytes(at, code);
  }
  // `numel` is a multiple of kWidth.
  HFS_INLINE float largest(const float* values, int64_t numel) {
    I found = _mm512_setzero_si512();
    for (int64_t i = 0; i < numel; i += kWidth) {
      const I bits = _mm512_castps_si512(load(values + i));
      found = _mm512_max_epi32(found, _mm512_and_si512(bits, _mm512_set1_epi32(0x7FFFFFFF)));
    }
    return float_of(static_cast<uint32_t>(_mm512_reduce_max_epi32(found)));
  }
};

}  // namespace

#endif  // HF_SPEED_VECTOR_AVX512_H_
