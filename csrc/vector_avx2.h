// Sixteen floats at a time, in two registers, with AVX2 and F16C. Each operation equals Scalar's.
#ifndef HF_SPEED_VECTOR_AVX2_H_
#define HF_SPEED_VECTOR_AVX2_H_

#include <immintrin.h>

#include "vector_scalar.h"

namespace {

struct Avx2 {
  struct F {
    __m256 a, b;
  };
  struct I {
    __m256i a, b;
  };
  static constexpr int64_t kWidth = 16;

  HFS_INLINE F set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  HFS_INLINE F load(const float* at) { return {_mm256_loadu_ps(at), _mm256_loadu_ps(at + 8)}; }
  HFS_INLINE void store(float* at, F x) {
    _mm256_storeu_ps(at, x.a);
    _mm256_storeu_ps(at + 8, x.b);
  }
  HFS_INLINE F add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
  HFS_INLINE F sub(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
  HFS_INLINE F mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
  HFS_INLINE F div(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
  HFS_INLINE F sqrt(F x) { return {_mm256_sqrt_ps(x.a), _mm256_sqrt_ps(x.b)}; }
  HFS_INLINE __m256 is_above(__m256 x) { return _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_GT_OQ); }
  HFS_INLINE __m256 is_below(__m256 x) { return _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_LT_OQ); }
  HFS_INLINE __m256 abs(__m256 x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
  HFS_INLINE __m256 sign(__m256 x) {
    return _mm256_or_ps(_mm256_and_ps(is_above(x), _mm256_set1_ps(1.0f)),
                        _mm256_and_ps(is_below(x), _mm256_set1_ps(-1.0f)));
  }
  HFS_INLINE F sign(F x) { return {sign(x.a), sign(x.b)}; }

  HFS_INLINE __m128i load_halves(const uint16_t* at) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
  }
  HFS_INLINE __m256 widen(__m128i halves) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
  }
  HFS_INLINE F load_bf16(const uint16_t* at) {
    return {widen(load_halves(at)), widen(load_halves(at + 8))};
  }
  HFS_INLINE F load_fp16(const uint16_t* at) {
    return {_mm256_cvtph_ps(load_halves(at)), _mm256_cvtph_ps(load_halves(at + 8))};
  }

  HFS_INLINE __m256i quiet_nan(__m256 x, __m256i otherwise) {
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const __m256i quiet = _mm256_or_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x400000));
    return _mm256_blendv_epi8(otherwise, quiet, is_nan);
  }
  // The upper halves of `rounded`, or a quiet NaN where x is one.
  HFS_INLINE __m256i upper_halves(F x, I rounded) {
    if (__builtin_expect(_mm256_movemask_ps(_mm256_cmp_ps(x.a, x.b, _CMP_UNORD_Q)) != 0, 0)) {
      rounded = {quiet_nan(x.a, rounded.a), quiet_nan(x.b, rounded.b)};
    }
    const __m256i packed =
        _mm256_packus_epi32(_mm256_srli_epi32(rounded.a, 16), _mm256_srli_epi32(rounded.b, 16));
    return _mm256_permute4x64_epi64(packed, 0xD8);
  }
  HFS_INLINE __m256i to_nearest(__m256 x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
  }
  HFS_INLINE __m256i bf16_nearest(F x) {
    return upper_halves(x, {to_nearest(x.a), to_nearest(x.b)});
  }
  HFS_INLINE void store_bf16(uint16_t* at, F x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), bf16_nearest(x));
  }
  // Past the caches; `at` is a multiple of 32 bytes.
  HFS_INLINE void stream_bf16(uint16_t* at, F x) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(at), bf16_nearest(x));
  }
  HFS_INLINE void store_fp16(uint16_t* at, F x) {
    constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    _mm_storeu_si128(reinterpret_cast<__m128i*>(at), _mm256_cvtps_ph(x.a, kNearest));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(at + 8), _mm256_cvtps_ph(x.b, kNearest));
  }

  HFS_INLINE __m256i set_bits(uint32_t x) { return _mm256_set1_epi32(static_cast<int32_t>(x)); }
  HFS_INLINE I count_from(uint32_t start) {
    const __m256i lanes = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
    return {_mm256_add_epi32(set_bits(start), lanes), _mm256_add_epi32(set_bits(start + 8), lanes)};
  }
  HFS_INLINE I advance(I counts) {
    const __m256i width = _mm256_set1_epi32(kWidth);
    return {_mm256_add_epi32(counts.a, width), _mm256_add_epi32(counts.b, width)};
  }
  HFS_INLINE __m256i random(__m256i low, uint32_t first, uint32_t second) {
    __m256i x = _mm256_xor_si256(low, set_bits(first));
    x = _mm256_xor_si256(x, _mm256_srli_epi32(x, 16));
    x = _mm256_mullo_epi32(x, set_bits(0x7FEB352Du));
    x = _mm256_xor_si256(x, _mm256_srli_epi32(x, 15));
    x = _mm256_add_epi32(x, set_bits(second));
    x = _mm256_mullo_epi32(x, set_bits(0x846CA68Bu));
    return _mm256_xor_si256(x, _mm256_srli_epi32(x, 16));
  }
  HFS_INLINE I random(I low, uint32_t first, uint32_t second) {
    return {random(low.a, first, second), random(low.b, first, second)};
  }
  HFS_INLINE I low_half(I bits) {
    const __m256i mask = _mm256_set1_epi32(0xFFFF);
    return {_mm256_and_si256(bits.a, mask), _mm256_and_si256(bits.b, mask)};
  }
  HFS_INLINE I high_half(I bits) {
    return {_mm256_srli_epi32(bits.a, 16), _mm256_srli_epi32(bits.b, 16)};
  }
  HFS_INLINE void store_bf16(uint16_t* at, F x, I random16) {
    const I sum = {_mm256_add_epi32(_mm256_castps_si256(x.a), random16.a),
                   _mm256_add_epi32(_mm256_castps_si256(x.b), random16.b)};
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), upper_halves(x, sum));
  }

  HFS_INLINE __m128i load_bytes(const uint8_t* at) {
    return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(at));
  }
  HFS_INLINE __m256 share_of(__m256 c, float high, float low) {
    return _mm256_add_ps(_mm256_mul_ps(c, _mm256_set1_ps(high)),
                         _mm256_mul_ps(c, _mm256_set1_ps(low)));
  }
  HFS_INLINE __m256 decode_signed(__m128i bytes) {
    const __m256 c = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
    const __m256 t = share_of(abs(c), k127High, k127Low);
    return _mm256_xor_ps(_mm256_mul_ps(t, t), _mm256_and_ps(c, _mm256_set1_ps(-0.0f)));
  }
  HFS_INLINE __m256 decode_unsigned(__m128i bytes) {
    const __m256 t = share_of(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)), k255High, k255Low);
    const __m256 u = _mm256_mul_ps(t, t);
    return _mm256_mul_ps(u, u);
  }
  HFS_INLINE F load_signed(const uint8_t* at) {
    return {decode_signed(load_bytes(at)), decode_signed(load_bytes(at + 8))};
  }
  HFS_INLINE F load_unsigned(const uint8_t* at) {
    return {decode_unsigned(load_bytes(at)), decode_unsigned(load_bytes(at + 8))};
  }
  // Rounded to the nearest code, 0 for a NaN: the root is not negative, so this is truncation.
  HFS_INLINE __m256i nearest_code(__m256 root, float top) {
    const __m256 scaled = _mm256_mul_ps(root, _mm256_set1_ps(top));
    const __m256 x = _mm256_add_ps(scaled, _mm256_set1_ps(0.5f));
    const __m256 fits = _mm256_cmp_ps(x, _mm256_set1_ps(256.0f), _CMP_LT_OQ);
    return _mm256_cvttps_epi32(_mm256_and_ps(x, fits));
  }
  HFS_INLINE __m256i encode_signed(__m256 x, __m256 divisor) {
    const __m256 share = _mm256_div_ps(abs(x), divisor);
    const __m256i code = nearest_code(_mm256_sqrt_ps(share), 127.0f);
    const __m256i below = _mm256_castps_si256(is_below(x));
    return _mm256_sub_epi32(_mm256_xor_si256(code, below), below);
  }
  HFS_INLINE __m256i encode_unsigned(__m256 x, __m256 divisor) {
    const __m256 share = _mm256_div_ps(abs(x), divisor);
    const __m256i code = nearest_code(_mm256_sqrt_ps(_mm256_sqrt_ps(share)), 255.0f);
    const __m256i least = _mm256_srli_epi32(_mm256_castps_si256(is_above(x)), 31);
    return _mm256_max_epi32(code, least);
  }
  HFS_INLINE void store_bytes(uint8_t* at, __m256i a, __m256i b) {
    const __m256i mask = _mm256_set1_epi32(0xFF);
    __m256i packed = _mm256_packus_epi32(_mm256_and_si256(a, mask), _mm256_and_si256(b, mask));
    packed = _mm256_permute4x64_epi64(packed, 0xD8);
    _mm_storeu_si128(
        reinterpret_cast<__m128i*>(at),
        _mm_packus_epi16(_mm256_castsi256_si128(packed), _mm256_extracti128_si256(packed, 1)));
  }
  HFS_INLINE void store_signed(uint8_t* at, F x, F divisor) {
    store_bytes(at, encode_signed(x.a, divisor.a), encode_signed(x.b, divisor.b));
  }
  HFS_INLINE void store_unsigned(uint8_t* at, F x, F divisor) {
    store_bytes(at, encode_unsigned(x.a, divisor.a), encode_unsigned(x.b, divisor.b));
  }
  // `numel` is a multiple of 8.
  HFS_INLINE float largest(const float* values, int64_t numel) {
    __m256i found = _mm256_setzero_si256();
    for (int64_t i = 0; i < numel; i += 8) {
      found = _mm256_max_epi32(found, _mm256_castps_si256(abs(_mm256_loadu_ps(values + i))));
    }
    __m128i most = _mm_max_epi32(_mm256_castsi256_si128(found), _mm256_extracti128_si256(found, 1));
    most = _mm_max_epi32(most, _mm_shuffle_epi32(most, 0x4E));
    most = _mm_max_epi32(most, _mm_shuffle_epi32(most, 0xB1));
    return float_of(static_cast<uint32_t>(_mm_cvtsi128_si32(most)));
  }
};

}  // namespace

#endif  // HF_SPEED_VECTOR_AVX2_H_
