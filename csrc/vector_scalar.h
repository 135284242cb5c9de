// One float at a time: the plain meaning of every vector operation, and the ends of vector loops.
//
// Included once per instruction set, with HFS_INLINE naming it. No name here may leave its file:
// functions of different targets must never be merged by the linker.
#ifndef HF_SPEED_VECTOR_SCALAR_H_
#define HF_SPEED_VECTOR_SCALAR_H_

#include <stdint.h>
#include <string.h>

namespace {

HFS_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

HFS_INLINE float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

HFS_INLINE uint16_t bf16_nearest(float x) {
  const uint32_t bits = bits_of(x);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

HFS_INLINE float float_of_fp16(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16;
  const uint32_t rest = half & 0x7FFFu;
  if (rest >= 0x7C00u) {  // infinity, or a NaN, made quiet
    return float_of(sign | 0x7F800000u | ((rest & 0x3FFu) << 13) |
                    (rest > 0x7C00u ? 0x400000u : 0));
  }
  if (rest >= 0x400u) return float_of(sign | ((rest << 13) + 0x38000000u));
  const float tiny = static_cast<float>(rest) * 0x1p-24f;  // exact: a subnormal half
  return float_of(sign | bits_of(tiny));
}

HFS_INLINE uint16_t fp16_nearest(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t rest = bits & 0x7FFFFFFFu;
  uint32_t half;
  if (rest > 0x7F800000u) {
    half = 0x7E00u | ((rest >> 13) & 0x3FFu);
  } else if (rest >= 0x477FF000u) {  // rounds to 65536 or more
    half = 0x7C00u;
  } else if (rest >= 0x38800000u) {  // normal
    half = (rest - 0x38000000u + 0xFFFu + ((rest >> 13) & 1u)) >> 13;
  } else {  // subnormal: adding 0.5 leaves the multiples of 2^-24 in the low bits, rounded
    half = bits_of(float_of(rest) + 0.5f) - 0x3F000000u;
  }
  return static_cast<uint16_t>(sign | half);
}

// c / 127 and c / 255, rounded to nearest, are c * high + c * low for every whole c up to 255: c *
// high is exact. Dividing would take most of the time of decoding.
constexpr float k127High = 0x1.0204p-7f, k127Low = 0x1.020408p-28f;
constexpr float k255High = 0x1.01p-8f, k255Low = 0x1.010102p-24f;

struct Scalar {
  using F = float;
  static constexpr int64_t kWidth = 1;

  HFS_INLINE F set(float x) { return x; }
  HFS_INLINE F load(const float* at) { return *at; }
  HFS_INLINE void store(float* at, F x) { *at = x; }
  HFS_INLINE F add(F a, F b) { return a + b; }
  HFS_INLINE F sub(F a, F b) { return a - b; }
  HFS_INLINE F mul(F a, F b) { return a * b; }
  HFS_INLINE F div(F a, F b) { return a / b; }
  HFS_INLINE F sqrt(F a) { return __builtin_sqrtf(a); }
  HFS_INLINE F sign(F a) { return (a > 0.0f ? 1.0f : 0.0f) - (a < 0.0f ? 1.0f : 0.0f); }

  HFS_INLINE F load_bf16(const uint16_t* at) { return float_of(uint32_t{*at} << 16); }
  HFS_INLINE F load_fp16(const uint16_t* at) { return float_of_fp16(*at); }
  HFS_INLINE void store_bf16(uint16_t* at, F x) { *at = bf16_nearest(x); }
  HFS_INLINE void stream_bf16(uint16_t* at, F x) { *at = bf16_nearest(x); }
  HFS_INLINE void store_fp16(uint16_t* at, F x) { *at = fp16_nearest(x); }

  // The lower words of the elements' indices, and those of the next vector.
  using I = uint32_t;
  HFS_INLINE I count_from(uint32_t start) { return start; }
  HFS_INLINE I advance(I counts) { return counts + 1; }
  // 32 random bits for each; the upper word is mixed into the keys.
  HFS_INLINE I random(I low, uint32_t first, uint32_t second) {
    uint32_t x = low ^ first;
    x ^= x >> 16;
    x *= 0x7FEB352Du;
    x ^= x >> 15;
    x += second;
    x *= 0x846CA68Bu;
    return x ^ (x >> 16);
  }
  HFS_INLINE I low_half(I bits) { return bits & 0xFFFFu; }
  HFS_INLINE I high_half(I bits) { return bits >> 16; }
  // Rounds stochastically, by 16 random bits.
  HFS_INLINE void store_bf16(uint16_t* at, F x, I random16) {
    const uint32_t bits = bits_of(x);
    const bool is_nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
    *at = static_cast<uint16_t>(is_nan ? (bits >> 16) | 0x40u : (bits + random16) >> 16);
  }

  // 8-bit codes of values in a block of scale 1, and back.
  HFS_INLINE F load_signed(const uint8_t* at) {
    const float c = static_cast<float>(static_cast<int8_t>(*at));
    const float magnitude = c < 0 ? -c : c;
    const float t = magnitude * k127High + magnitude * k127Low;
    const float square = t * t;
    return c < 0 ? -square : square;
  }
  HFS_INLINE F load_unsigned(const uint8_t* at) {
    const float c = static_cast<float>(*at);
    const float t = c * k255High + c * k255Low;
    const float u = t * t;
    return u * u;
  }
  // A cast of NaN, or of what no code holds, is undefined; such blocks hold no numbers anyway.
  HFS_INLINE int32_t whole(float x) { return x < 256.0f ? static_cast<int32_t>(x) : 0; }
  HFS_INLINE void store_signed(uint8_t* at, F x, F divisor) {
    const float share = float_of(bits_of(x) & 0x7FFFFFFFu) / divisor;
    const int32_t code = whole(__builtin_sqrtf(share) * 127.0f + 0.5f);
    *at = static_cast<uint8_t>(x < 0.0f ? -code : code);
  }
  HFS_INLINE void store_unsigned(uint8_t* at, F x, F divisor) {
    const float share = float_of(bits_of(x) & 0x7FFFFFFFu) / divisor;
    const int32_t code = whole(__builtin_sqrtf(__builtin_sqrtf(share)) * 255.0f + 0.5f);
    *at = static_cast<uint8_t>(x > 0.0f && code < 1 ? 1 : code);
  }
  // The largest magnitude of `numel` values, by bits: a NaN is larger than every number.
  HFS_INLINE float largest(const float* values, int64_t numel) {
    uint32_t found = 0;
    for (int64_t i = 0; i < numel; ++i) {
      const uint32_t magnitude = bits_of(values[i]) & 0x7FFFFFFFu;
      found = magnitude > found ? magnitude : found;
    }
    return float_of(found);
  }
};

}  // namespace

#endif  // HF_SPEED_VECTOR_SCALAR_H_
