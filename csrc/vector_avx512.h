// Thirty-two floats at a time, in two registers, with AVX-512 F, BW, DQ and VL. Each operation
// equals Scalar's. Pairs, because 32 bf16 fill a register and a cache line.
#ifndef HF_SPEED_VECTOR_AVX512_H_
#define HF_SPEED_VECTOR_AVX512_H_

#include <immintrin.h>

#include "vector_scalar.h"

namespace {

struct Avx512 {
  struct F {
    __m512 a, b;
  };
  struct I {
    __m512i a, b;
  };
  static constexpr int64_t kWidth = 32;

  HFS_INLINE F set(float x) { return {_mm512_set1_ps(x), _mm512_set1_ps(x)}; }
  HFS_INLINE F load(const float* at) { return {_mm512_loadu_ps(at), _mm512_loadu_ps(at + 16)}; }
  HFS_INLINE void store(float* at, F x) {
    _mm512_storeu_ps(at, x.a);
    _mm512_storeu_ps(at + 16, x.b);
  }
  HFS_INLINE F add(F x, F y) { return {_mm512_add_ps(x.a, y.a), _mm512_add_ps(x.b, y.b)}; }
  HFS_INLINE F sub(F x, F y) { return {_mm512_sub_ps(x.a, y.a), _mm512_sub_ps(x.b, y.b)}; }
  HFS_INLINE F mul(F x, F y) { return {_mm512_mul_ps(x.a, y.a), _mm512_mul_ps(x.b, y.b)}; }
  HFS_INLINE F div(F x, F y) { return {_mm512_div_ps(x.a, y.a), _mm512_div_ps(x.b, y.b)}; }
  HFS_INLINE F sqrt(F x) { return {_mm512_sqrt_ps(x.a), _mm512_sqrt_ps(x.b)}; }
  HFS_INLINE __m512 sign(__m512 x) {
    const __mmask16 above = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GT_OQ);
    const __mmask16 below = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
    const __m512 one = _mm512_maskz_mov_ps(above, _mm512_set1_ps(1.0f));
    return _mm512_mask_mov_ps(one, below, _mm512_set1_ps(-1.0f));
  }
  HFS_INLINE F sign(F x) { return {sign(x.a), sign(x.b)}; }

  HFS_INLINE __m256i load_halves(const uint16_t* at) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
  }
  HFS_INLINE F load_bf16(const uint16_t* at) {
    const __m512i all = _mm512_loadu_si512(at);
    const __m512i a = _mm512_set_epi16(15, 0, 14, 0, 13, 0, 12, 0, 11, 0, 10, 0, 9, 0, 8, 0, 7, 0,
                                       6, 0, 5, 0, 4, 0, 3, 0, 2, 0, 1, 0, 0, 0);
    const __m512i b = _mm512_add_epi16(a, _mm512_set1_epi16(16));
    constexpr __mmask32 kUpper = 0xAAAAAAAA;
    return {_mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(kUpper, a, all)),
            _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(kUpper, b, all))};
  }
  HFS_INLINE F load_fp16(const uint16_t* at) {
    return {_mm512_cvtph_ps(load_halves(at)), _mm512_cvtph_ps(load_halves(at + 16))};
  }

  HFS_INLINE __m512i quiet_nan(__m512 x, __m512i otherwise) {
    const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_mask_or_epi32(otherwise, is_nan, _mm512_castps_si512(x),
                                _mm512_set1_epi32(0x400000));
  }
  // The upper halves of `rounded`, or a quiet NaN where x is one.
  HFS_INLINE __m512i upper_halves(F x, I rounded) {
    if (__builtin_expect(_mm512_cmp_ps_mask(x.a, x.b, _CMP_UNORD_Q) != 0, 0)) {
      rounded = {quiet_nan(x.a, rounded.a), quiet_nan(x.b, rounded.b)};
    }
    const __m512i odd =
        _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27,
                         25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    return _mm512_permutex2var_epi16(rounded.a, odd, rounded.b);
  }
  HFS_INLINE __m512i to_nearest(__m512 x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i up = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF));
    const __mmask16 is_odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
    return _mm512_mask_add_epi32(up, is_odd, up, _mm512_set1_epi32(1));
  }
  // The instruction for it, VCVTNE2PS2BF16, flushes subnormals.
  HFS_INLINE __m512i bf16_nearest(F x) {
    return upper_halves(x, {to_nearest(x.a), to_nearest(x.b)});
  }
  HFS_INLINE void store_bf16(uint16_t* at, F x) { _mm512_storeu_si512(at, bf16_nearest(x)); }
  // Past the caches; `at` starts a cache line.
  HFS_INLINE void stream_bf16(uint16_t* at, F x) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(at), bf16_nearest(x));
  }
  HFS_INLINE void store_fp16(uint16_t* at, F x) {
    constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), _mm512_cvtps_ph(x.a, kNearest));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(at + 16), _mm512_cvtps_ph(x.b, kNearest));
  }

  HFS_INLINE __m512i set_bits(uint32_t x) { return _mm512_set1_epi32(static_cast<int32_t>(x)); }
  HFS_INLINE I count_from(uint32_t start) {
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    return {_mm512_add_epi32(set_bits(start), lanes),
            _mm512_add_epi32(set_bits(start + 16), lanes)};
  }
  HFS_INLINE I advance(I counts) {
    const __m512i width = _mm512_set1_epi32(kWidth);
    return {_mm512_add_epi32(counts.a, width), _mm512_add_epi32(counts.b, width)};
  }
  HFS_INLINE __m512i random(__m512i low, uint32_t first, uint32_t second) {
    __m512i x = _mm512_xor_si512(low, set_bits(first));
    x = _mm512_xor_si512(x, _mm512_srli_epi32(x, 16));
    x = _mm512_mullo_epi32(x, set_bits(0x7FEB352Du));
    x = _mm512_xor_si512(x, _mm512_srli_epi32(x, 15));
    x = _mm512_add_epi32(x, set_bits(second));
    x = _mm512_mullo_epi32(x, set_bits(0x846CA68Bu));
    return _mm512_xor_si512(x, _mm512_srli_epi32(x, 16));
  }
  HFS_INLINE I random(I low, uint32_t first, uint32_t second) {
    return {random(low.a, first, second), random(low.b, first, second)};
  }
  HFS_INLINE I low_half(I bits) {
    const __m512i mask = _mm512_set1_epi32(0xFFFF);
    return {_mm512_and_si512(bits.a, mask), _mm512_and_si512(bits.b, mask)};
  }
  HFS_INLINE I high_half(I bits) {
    return {_mm512_srli_epi32(bits.a, 16), _mm512_srli_epi32(bits.b, 16)};
  }
  HFS_INLINE void store_bf16(uint16_t* at, F x, I random16) {
    const I sum = {_mm512_add_epi32(_mm512_castps_si512(x.a), random16.a),
                   _mm512_add_epi32(_mm512_castps_si512(x.b), random16.b)};
    _mm512_storeu_si512(at, upper_halves(x, sum));
  }

  HFS_INLINE __m128i load_bytes(const uint8_t* at) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
  }
  HFS_INLINE __m512 share_of(__m512 c, float high, float low) {
    return _mm512_add_ps(_mm512_mul_ps(c, _mm512_set1_ps(high)),
                         _mm512_mul_ps(c, _mm512_set1_ps(low)));
  }
  HFS_INLINE __m512 decode_signed(__m128i bytes) {
    const __m512i c = _mm512_cvtepi8_epi32(bytes);
    const __m512 t = share_of(_mm512_cvtepi32_ps(_mm512_abs_epi32(c)), k127High, k127Low);
    const __m512 square = _mm512_mul_ps(t, t);
    return _mm512_mask_xor_ps(square, _mm512_movepi32_mask(c), square, _mm512_set1_ps(-0.0f));
  }
  HFS_INLINE __m512 decode_unsigned(__m128i bytes) {
    const __m512 t = share_of(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes)), k255High, k255Low);
    const __m512 u = _mm512_mul_ps(t, t);
    return _mm512_mul_ps(u, u);
  }
  HFS_INLINE F load_signed(const uint8_t* at) {
    return {decode_signed(load_bytes(at)), decode_signed(load_bytes(at + 16))};
  }
  HFS_INLINE F load_unsigned(const uint8_t* at) {
    return {decode_unsigned(load_bytes(at)), decode_unsigned(load_bytes(at + 16))};
  }
  // Rounded to the nearest code, 0 for a NaN: the root is not negative, so this is truncation.
  HFS_INLINE __m512i nearest_code(__m512 root, float top) {
    const __m512 scaled = _mm512_mul_ps(root, _mm512_set1_ps(top));
    const __m512 x = _mm512_add_ps(scaled, _mm512_set1_ps(0.5f));
    const __mmask16 fits = _mm512_cmp_ps_mask(x, _mm512_set1_ps(256.0f), _CMP_LT_OQ);
    return _mm512_maskz_cvttps_epi32(fits, x);
  }
  HFS_INLINE __m128i encode_signed(__m512 x, __m512 divisor) {
    const __m512 share = _mm512_div_ps(_mm512_abs_ps(x), divisor);
    const __m512i code = nearest_code(_mm512_sqrt_ps(share), 127.0f);
    const __mmask16 below = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
    return _mm512_cvtepi32_epi8(_mm512_mask_sub_epi32(code, below, _mm512_setzero_si512(), code));
  }
  HFS_INLINE __m128i encode_unsigned(__m512 x, __m512 divisor) {
    const __m512 share = _mm512_div_ps(_mm512_abs_ps(x), divisor);
    const __m512i code = nearest_code(_mm512_sqrt_ps(_mm512_sqrt_ps(share)), 255.0f);
    const __mmask16 above = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GT_OQ);
    return _mm512_cvtepi32_epi8(_mm512_mask_max_epi32(code, above, code, _mm512_set1_epi32(1)));
  }
  HFS_INLINE void store_bytes(uint8_t* at, __m128i bytes) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(at), bytes);
  }
  HFS_INLINE void store_signed(uint8_t* at, F x, F divisor) {
    store_bytes(at, encode_signed(x.a, divisor.a));
    store_bytes(at + 16, encode_signed(x.b, divisor.b));
  }
  HFS_INLINE void store_unsigned(uint8_t* at, F x, F divisor) {
    store_bytes(at, encode_unsigned(x.a, divisor.a));
    store_bytes(at + 16, encode_unsigned(x.b, divisor.b));
  }
  // `numel` is a multiple of 16.
  HFS_INLINE float largest(const float* values, int64_t numel) {
    __m512i found = _mm512_setzero_si512();
    for (int64_t i = 0; i < numel; i += 16) {
      const __m512i magnitude = _mm512_castps_si512(_mm512_abs_ps(_mm512_loadu_ps(values + i)));
      found = _mm512_max_epi32(found, magnitude);
    }
    return float_of(static_cast<uint32_t>(_mm512_reduce_max_epi32(found)));
  }
};

}  // namespace

#endif  // HF_SPEED_VECTOR_AVX512_H_
