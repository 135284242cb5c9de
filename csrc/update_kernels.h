// The loops of one instruction set: a file defines HFS_TARGET, a vector type and includes this.
//
//     tile -> spans -> elements: a scalar head up to a whole vector, vectors, a scalar tail
//     8-bit moments: block -> decode into 2 KiB of stack -> the same loops -> encode
//
// Functions carry the target one by one, so that no file needs compiler flags of its own.
#ifndef HF_SPEED_UPDATE_KERNELS_H_
#define HF_SPEED_UPDATE_KERNELS_H_

#include "update_isa.h"
#include "update_rules.h"
#include "vector_scalar.h"

namespace {

using hfs::Keys;
using hfs::Work;

// How many elements ahead of the loop memory is asked for, as measured: 2 KiB of each moment.
constexpr int64_t ahead(int moment) { return moment == HFS_BF16 ? 1024 : 512; }

template <class V>
HFS_INLINE typename V::F load_float(const void* values, int32_t type, int64_t i) {
  if (type == HFS_FP32) return V::load(static_cast<const float*>(values) + i);
  if (type == HFS_BF16) return V::load_bf16(static_cast<const uint16_t*>(values) + i);
  return V::load_fp16(static_cast<const uint16_t*>(values) + i);
}

template <class V>
HFS_INLINE void store_out(const Work& u, int64_t i, typename V::F p) {
  uint16_t* const at = static_cast<uint16_t*>(u.out) + i;
  if (u.out_type == HFS_BF16) {
    if (u.streams_out) {
      V::stream_bf16(at, p);
    } else {
      V::store_bf16(at, p);
    }
  }
  if (u.out_type == HFS_FP16) V::store_fp16(at, p);
}

// The moments of a loop: of the chunk, from element 0, or of a decoded block, from its first.
struct Moments {
  void* first;
  void* second;
  int64_t start;
  bool is_block;
};

// The random words of a stretch of elements whose 64-bit indices share their upper word.
template <class V>
struct Randoms {
  typename V::I counts;
  uint32_t first, second;

  HFS_INLINE Randoms from(Keys keys, int64_t element) {
    const uint64_t index = static_cast<uint64_t>(element);
    const uint32_t upper = static_cast<uint32_t>(index >> 32);
    return {V::count_from(static_cast<uint32_t>(index)), keys.first ^ (upper * 0x85EBCA6Bu),
            keys.second + upper * 0x9E3779B9u};
  }
  HFS_METHOD typename V::I next() {
    const typename V::I found = V::random(counts, first, second);
    counts = V::advance(counts);
    return found;
  }
};

template <class V, int kMoment>
HFS_INLINE void store_moment(void* values, int64_t i, typename V::F x, typename V::I random16) {
  if (kMoment == HFS_BF16) {
    V::store_bf16(static_cast<uint16_t*>(values) + i, x, random16);
  } else {
    V::store(static_cast<float*>(values) + i, x);
  }
}

template <class V, int kMoment, template <class> class Rule>
HFS_INLINE void update_vector(const Work& u, const Moments& moments, const Rule<V>& rule,
                              Randoms<V>& randoms, int64_t i) {
  using F = typename V::F;
  const int64_t k = i - moments.start;
  F p = V::load(u.master + i);
  const F g = load_float<V>(u.grad, u.grad_type, i);
  F m = V::set(0.0f), v = V::set(0.0f);
  if (Rule<V>::kMoments > 0) m = load_float<V>(moments.first, kMoment, k);
  if (Rule<V>::kMoments > 1) v = load_float<V>(moments.second, kMoment, k);
  rule.step(p, g, m, v);
  V::store(u.master + i, p);
  typename V::I random = {};
  if (kMoment == HFS_BF16) random = randoms.next();
  if (Rule<V>::kMoments > 0) {
    store_moment<V, kMoment>(moments.first, k, m, V::low_half(random));
  }
  if (Rule<V>::kMoments > 1) {
    store_moment<V, kMoment>(moments.second, k, v, V::high_half(random));
  }
  store_out<V>(u, i, p);
}

// Asks for the lines of `numel` elements at `i` of one stream. Past its end nothing happens.
HFS_INLINE void prefetch(const void* values, int32_t type, int64_t i, int64_t numel) {
  const int64_t size = type == HFS_FP32 ? 4 : 2;
  const uintptr_t at = reinterpret_cast<uintptr_t>(values) + i * size;
  for (int64_t line = 0; line < numel * size; line += 64) {
    __builtin_prefetch(reinterpret_cast<const void*>(at + line));
  }
}

template <int kMoment, template <class> class Rule>
HFS_TARGET void update_span(const Work& work, const Moments& of, const float* row, int64_t begin,
                            int64_t end) {
  constexpr int64_t kWidth = Vector::kWidth, kAhead = ahead(kMoment);
  // Copies, whose addresses nobody has: no store through a pointer can change them.
  const Work u = work;
  const Moments moments = of;
  const Rule<Scalar> one = Rule<Scalar>::of(row);
  const Rule<Vector> many = Rule<Vector>::of(row);
  int64_t i = begin;
  Randoms<Scalar> heads = Randoms<Scalar>::from(u.keys, u.offset + i);
  for (; i < end && i % kWidth != 0; ++i) {
    update_vector<Scalar, kMoment, Rule>(u, moments, one, heads, i);
  }
  Randoms<Vector> randoms = Randoms<Vector>::from(u.keys, u.offset + i);
  for (; i + kWidth <= end; i += kWidth) {
    prefetch(u.master, HFS_FP32, i + kAhead, kWidth);
    prefetch(u.grad, u.grad_type, i + kAhead, kWidth);
    if (Rule<Vector>::kMoments > 0 && !moments.is_block) {
      prefetch(moments.first, kMoment, i + kAhead, kWidth);
      if (Rule<Vector>::kMoments > 1) prefetch(moments.second, kMoment, i + kAhead, kWidth);
    }
    update_vector<Vector, kMoment, Rule>(u, moments, many, randoms, i);
  }
  Randoms<Scalar> tails = Randoms<Scalar>::from(u.keys, u.offset + i);
  for (; i < end; ++i) update_vector<Scalar, kMoment, Rule>(u, moments, one, tails, i);
}

template <template <class> class Rule>
HFS_TARGET void update_rule(const Work& u, const Moments& moments, int32_t type, const float* row,
                            int64_t begin, int64_t end) {
  if (Rule<Scalar>::kMoments > 0 && type == HFS_BF16) {
    update_span<HFS_BF16, Rule>(u, moments, row, begin, end);
  } else {
    update_span<HFS_FP32, Rule>(u, moments, row, begin, end);
  }
}

// Elements of an untouched span keep everything; their `out` is written like any other.
HFS_TARGET void write_out(const Work& u, int64_t begin, int64_t end) {
  if (u.out_type == HFS_NONE) return;
  int64_t i = begin;
  for (; i < end && i % Vector::kWidth != 0; ++i)
    store_out<Scalar>(u, i, Scalar::load(u.master + i));
  for (; i + Vector::kWidth <= end; i += Vector::kWidth) {
    store_out<Vector>(u, i, Vector::load(u.master + i));
  }
  for (; i < end; ++i) store_out<Scalar>(u, i, Scalar::load(u.master + i));
}

HFS_TARGET void update_part(const Work& u, const Moments& moments, int32_t type, const float* row,
                            int64_t begin, int64_t end) {
  if (row[0] == 0.0f) return write_out(u, begin, end);
  switch (u.rule) {
    case HFS_ADAM:
      return update_rule<Adam>(u, moments, type, row, begin, end);
    case HFS_LION:
      return update_rule<Lion>(u, moments, type, row, begin, end);
    case HFS_ADAGRAD:
      return update_rule<Adagrad>(u, moments, type, row, begin, end);
    case HFS_SGD:
      return update_rule<Sgd>(u, moments, type, row, begin, end);
    default:
      return update_rule<SgdPlain>(u, moments, type, row, begin, end);
  }
}

// The first span that ends after `element`.
HFS_INLINE int32_t span_of(const HfsUpdate& u, int64_t element) {
  int32_t low = 0, high = u.num_spans - 1;
  while (low < high) {
    const int32_t middle = (low + high) / 2;
    if (u.stops[middle] > element) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

HFS_TARGET void update_spans(const Work& u, const Moments& moments, int32_t type, int64_t begin,
                             int64_t end) {
  int32_t span = span_of(u, begin);
  for (int64_t i = begin; i < end; ++span) {
    const int64_t stop = u.stops[span] < end ? u.stops[span] : end;
    update_part(u, moments, type, u.rows + int64_t{span} * HFS_ROW, i, stop);
    i = stop;
  }
}

template <class V, bool kSigned>
HFS_TARGET void decode(const uint8_t* codes, float scale, float* values) {
  for (int64_t i = 0; i < HFS_BLOCK; i += V::kWidth) {
    const typename V::F x = kSigned ? V::load_signed(codes + i) : V::load_unsigned(codes + i);
    V::store(values + i, V::mul(x, V::set(scale)));
  }
}

template <class V, bool kSigned>
HFS_TARGET float encode(const float* values, uint8_t* codes) {
  const float scale = V::largest(values, HFS_BLOCK);
  const typename V::F divisor = V::set(scale > 0.0f ? scale : 1.0f);
  for (int64_t i = 0; i < HFS_BLOCK; i += V::kWidth) {
    if (kSigned) {
      V::store_signed(codes + i, V::load(values + i), divisor);
    } else {
      V::store_unsigned(codes + i, V::load(values + i), divisor);
    }
  }
  return scale;
}

// One 8-bit moment of one block, decoded.
struct Block {
  alignas(64) float values[HFS_BLOCK];
};

// A block's codes where they lie, or, of a short one, in `spare` with zeros behind them.
HFS_INLINE uint8_t* codes_at(void* codes, uint8_t* spare, int64_t begin, int64_t numel) {
  uint8_t* const at = static_cast<uint8_t*>(codes) + begin;
  if (numel == HFS_BLOCK) return at;
  memset(spare, 0, HFS_BLOCK);
  memcpy(spare, at, numel);
  return spare;
}

HFS_TARGET void open_block(Block& block, void* codes, const float* scales, bool is_signed,
                           int64_t begin, int64_t numel) {
  alignas(64) uint8_t spare[HFS_BLOCK];
  const uint8_t* const at = codes_at(codes, spare, begin, numel);
  const float scale = scales[begin / HFS_BLOCK];
  if (is_signed) {
    decode<Vector, true>(at, scale, block.values);
  } else {
    decode<Vector, false>(at, scale, block.values);
  }
  // Where the scale is no number, what lies past the end must not be one either way.
  for (int64_t i = numel; i < HFS_BLOCK; ++i) block.values[i] = 0.0f;
}

HFS_TARGET void close_block(Block& block, void* codes, float* scales, bool is_signed, int64_t begin,
                            int64_t numel) {
  alignas(64) uint8_t spare[HFS_BLOCK];
  uint8_t* const at = codes_at(codes, spare, begin, numel);
  scales[begin / HFS_BLOCK] =
      is_signed ? encode<Vector, true>(block.values, at) : encode<Vector, false>(block.values, at);
  if (at == spare) memcpy(static_cast<uint8_t*>(codes) + begin, spare, numel);
}

HFS_INLINE bool is_touched(const HfsUpdate& u, int64_t begin, int64_t end) {
  for (int32_t span = span_of(u, begin);; ++span) {
    if (u.rows[int64_t{span} * HFS_ROW] != 0.0f) return true;
    if (u.stops[span] >= end) return false;
  }
}

HFS_TARGET void update_blocks(const Work& u, int64_t begin, int64_t end) {
  const bool is_signed = first_is_signed(u.rule);
  Block first, second;
  for (int64_t i = begin; i < end; i += HFS_BLOCK) {
    const int64_t numel = end - i < HFS_BLOCK ? end - i : HFS_BLOCK;
    if (!is_touched(u, i, i + numel)) {
      write_out(u, i, i + numel);
      continue;
    }
    const Moments moments = {first.values, second.values, i, true};
    open_block(first, u.first, u.first_scale, is_signed, i, numel);
    if (u.second != nullptr) open_block(second, u.second, u.second_scale, false, i, numel);
    update_spans(u, moments, HFS_FP32, i, i + numel);
    close_block(first, u.first, u.first_scale, is_signed, i, numel);
    if (u.second != nullptr) close_block(second, u.second, u.second_scale, false, i, numel);
  }
}

HFS_TARGET void update_stretch(const Work& u, int64_t begin, int64_t end) {
  if (u.moment_type == HFS_INT8) {
    update_blocks(u, begin, end);
  } else {
    update_spans(u, {u.first, u.second, 0, false}, u.moment_type, begin, end);
  }
}

// Random words are counted by the lower words of indices: cut where those begin again.
HFS_TARGET void update(const Work& u, int64_t begin, int64_t end) {
  const int64_t wrap = (((u.offset + begin) >> 32) + 1) * (INT64_C(1) << 32) - u.offset;
  if (wrap >= end) return update_stretch(u, begin, end);
  update_stretch(u, begin, wrap);
  update_stretch(u, wrap, end);
}

constexpr int64_t kLanes = 32;

// `row` values of a tile, squared and added lane by lane, then the lanes by halves. The square of
// an fp32 number is exact in fp64.
template <class V>
HFS_TARGET double square_tile(const void* values, int32_t type, int64_t numel) {
  double lanes[kLanes] = {};
  float x[kLanes];
  for (int64_t i = 0; i < numel; i += kLanes) {
    if (i + kLanes <= numel) {
      for (int64_t k = 0; k < kLanes; k += V::kWidth) {
        V::store(x + k, load_float<V>(values, type, i + k));
      }
    } else {
      for (int64_t k = 0; k < kLanes; ++k) {
        x[k] = i + k < numel ? load_float<Scalar>(values, type, i + k) : 0.0f;
      }
    }
    for (int64_t k = 0; k < kLanes; ++k) {
      lanes[k] += static_cast<double>(x[k]) * static_cast<double>(x[k]);
    }
  }
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t k = 0; k < half; ++k) lanes[k] += lanes[k + half];
  }
  return lanes[0];
}

HFS_TARGET double square_sum(const void* values, int32_t type, int64_t numel) {
  return square_tile<Vector>(values, type, numel);
}

template <class V>
HFS_INLINE typename V::F direction(const HfsUpdate& u, const Adam<V>& rule, int64_t i) {
  const typename V::F p = V::load(u.master + i);
  const typename V::F g = V::mul(load_float<V>(u.grad, u.grad_type, i), rule.scale);
  typename V::F m = load_float<V>(u.first, u.moment_type, i);
  typename V::F v = load_float<V>(u.second, u.moment_type, i);
  rule.average(g, m, v);
  return V::add(rule.direction(m, v), V::mul(rule.l2, p));
}

HFS_TARGET void norms(const HfsUpdate& u, const float* row, int64_t begin, int64_t end,
                      double sums[2]) {
  alignas(64) float masters[HFS_TILE] = {}, directions[HFS_TILE] = {};
  const Adam<Scalar> one = Adam<Scalar>::of(row);
  const Adam<Vector> many = Adam<Vector>::of(row);
  const int64_t start = begin / HFS_TILE * HFS_TILE;
  memcpy(masters + (begin - start), u.master + begin, (end - begin) * sizeof(float));
  int64_t i = begin;
  for (; i + Vector::kWidth <= end; i += Vector::kWidth) {
    Vector::store(directions + (i - start), direction<Vector>(u, many, i));
  }
  for (; i < end; ++i) directions[i - start] = direction<Scalar>(u, one, i);
  sums[0] = square_sum(masters, HFS_FP32, end - start);
  sums[1] = square_sum(directions, HFS_FP32, end - start);
}

}  // namespace

#endif  // HF_SPEED_UPDATE_KERNELS_H_
