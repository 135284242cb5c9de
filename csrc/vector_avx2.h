// Eight floats at a time, with AVX2 and F16C. Each operation equals Scalar's.
#ifndef HF_SPEED_VECTOR_AVX2_H_
#define HF_SPEED_VECTOR_AVX2_H_

#include <immintrin.h>

#include "vector_scalar.h"

namespace {

struct Avx2 {
  using F = __m256;
  using I = __m256i;
  static constexpr int64_t kWidth = 8;

  HFS_INLINE F set(float x) { return _mm256_set1_ps(x); }
  HFS_INLINE F load(const float* at) { return _mm256_loadu_ps(at); }
  HFS_INLINE void store(float* at, F x) { _mm256_storeu_ps(at, x); }
  HFS_INLINE F add(F a, F b) { return _mm256_add_ps(a, b); }
  HFS_INLINE F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  HFS_INLINE F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  HFS_INLINE F div(F a, F b) { return _mm256_div_ps(a, b); }
  HFS_INLINE F sqrt(F a) { return _mm256_sqrt_ps(a); }
  HFS_INLINE F is_above(F a) { return _mm256_cmp_ps(a, _mm256_setzero_ps(), _CMP_GT_OQ); }
  HFS_INLINE F is_below(F a) { return _mm256_cmp_ps(a, _mm256_setzero_ps(), _CMP_LT_OQ); }
  HFS_INLINE F abs(F a) { return _mm256_andnot_ps(set(-0.0f), a); }
  HFS_INLINE F sign(F a) {
    return _mm256_or_ps(_mm256_and_ps(is_above(a), set(1.0f)),
                        _mm256_and_ps(is_below(a), set(-1.0f)));
  }

  HFS_INLINE __m128i load_halves(const uint16_t* at) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
  }
  HFS_INLINE F load_bf16(const uint16_t* at) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_halves(at)), 16));
  }
  HFS_INLINE F load_fp16(const uint16_t* at) { return _mm256_cvtph_ps(load_halves(at)); }
  // The upper halves of `rounded`, or a quiet NaN where x is one.
  HFS_INLINE __m128i upper_halves(F x, I rounded) {
    const I is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const I quiet = _mm256_or_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x400000));
    const I upper = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, is_nan), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256(upper, 1));
  }
  HFS_INLINE __m128i bf16_nearest(F x) {
    const I bits = _mm256_castps_si256(x);
    const I odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const I half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF));
    return upper_halves(x, _mm256_add_epi32(bits, half));
  }
  HFS_INLINE void store_bf16(uint16_t* at, F x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(at), bf16_nearest(x));
  }
  HFS_INLINE void store_fp16(uint16_t* at, F x) {
    const __m128i half = _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(at), half);
  }

  HFS_INLINE I random(uint32_t low, uint32_t first, uint32_t second) {
    const I lanes = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
    I x = _mm256_add_epi32(_mm256_set1_epi32(static_cast<int32_t>(low)), lanes);
    x = _mm256_xor_si256(x, _mm256_set1_epi32(static_cast<int32_t>(first)));
    x = _mm256_xor_si256(x, _mm256_srli_epi32(x, 16));
    x = _mm256_mullo_epi32(x, _mm256_set1_epi32(0x7FEB352D));
    x = _mm256_xor_si256(x, _mm256_srli_epi32(x, 15));
    x = _mm256_add_epi32(x, _mm256_set1_epi32(static_cast<int32_t>(second)));
    x = _mm256_mullo_epi32(x, _mm256_set1_epi32(static_cast<int32_t>(0x846CA68Bu)));
    return _mm256_xor_si256(x, _mm256_srli_epi32(x, 16));
  }
  HFS_INLINE I low_half(I bits) { return _mm256_and_si256(bits, _mm256_set1_epi32(0xFFFF)); }
  HFS_INLINE I high_half(I bits) { return _mm256_srli_epi32(bits, 16); }
  HFS_INLINE void store_bf16(uint16_t* at, F x, I random16) {
    const I sum = _mm256_add_epi32(_mm256_castps_si256(x), random16);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(at), upper_halves(x, sum));
  }

  HFS_INLINE __m128i load_bytes(const uint8_t* at) {
    return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(at));
  }
  HFS_INLINE F load_signed(const uint8_t* at) {
    const F c = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(load_bytes(at)));
    const F t = div(abs(c), set(127.0f));
    return _mm256_xor_ps(mul(t, t), _mm256_and_ps(is_below(c), set(-0.0f)));
  }
  HFS_INLINE F load_unsigned(const uint8_t* at) {
    const F t = div(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(load_bytes(at))), set(255.0f));
    const F u = mul(t, t);
    return mul(u, u);
  }
  // x rounded down, 0 for a NaN: x is not negative, so this is truncation.
  HFS_INLINE I whole(F x) {
    return _mm256_cvttps_epi32(_mm256_and_ps(x, _mm256_cmp_ps(x, set(256.0f), _CMP_LT_OQ)));
  }
  HFS_INLINE void store_bytes(uint8_t* at, I codes) {
    const I bytes = _mm256_and_si256(codes, _mm256_set1_epi32(0xFF));
    const __m128i halves =
        _mm_packus_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(at), _mm_packus_epi16(halves, halves));
  }
  HFS_INLINE void store_signed(uint8_t* at, F x, F divisor) {
    const I code = whole(add(mul(sqrt(div(abs(x), divisor)), set(127.0f)), set(0.5f)));
    const I below = _mm256_castps_si256(is_below(x));
    store_bytes(at, _mm256_sub_epi32(_mm256_xor_si256(code, below), below));
  }
  HFS_INLINE void store_unsigned(uint8_t* at, F x, F divisor) {
    const F root = sqrt(sqrt(div(abs(x), divisor)));
    const I code = whole(add(mul(root, set(255.0f)), set(0.5f)));
    const I least = _mm256_and_si256(_mm256_castps_si256(is_above(x)), _mm256_set1_epi32(1));
    store_bytes(at, _mm256_max_epi32(code, least));
  }
  // `numel` is a multiple of kWidth.
  HFS_INLINE float largest(const float* values, int64_t numel) {
    I found = _mm256_setzero_si256();
    for (int64_t i = 0; i < numel; i += kWidth) {
      const I bits = _mm256_castps_si256(load(values + i));
      found = _mm256_max_epi32(found, _mm256_and_si256(bits, _mm256_set1_epi32(0x7FFFFFFF)));
    }
    __m128i most = _mm_max_epi32(_mm256_castsi256_si128(found), _mm256_extracti128_si256(found, 1));
    most = _mm_max_epi32(most, _mm_shuffle_epi32(most, 0x4E));
    most = _mm_max_epi32(most, _mm_shuffle_epi32(most, 0xB1));
    return float_of(static_cast<uint32_t>(_mm_cvtsi128_si32(most)));
  }
};

}  // namespace

#endif  // HF_SPEED_VECTOR_AVX2_H_
