// The arithmetic of the update rules, on any vector type: `RULES` of the specification.
//
// Included once per instruction set, as vector_scalar.h is.
#ifndef HF_SPEED_UPDATE_RULES_H_
#define HF_SPEED_UPDATE_RULES_H_

#include "update.h"

namespace {

// The rows' columns: hf_speed/ops/spans.py. Column 0 says whether the span is touched.

template <class V>
struct Adam {
  using F = typename V::F;
  static constexpr int kMoments = 2;
  F scale, l2, decay, lerp, beta2, rest2, step_size, root_correction, eps;
  bool from_grad;

  HFS_INLINE Adam of(const float* row) {
    return {V::set(row[1]), V::set(row[2]), V::set(row[3]), V::set(row[4]),  V::set(row[6]),
            V::set(row[7]), V::set(row[8]), V::set(row[9]), V::set(row[10]), row[5] != 0.0f};
  }
  HFS_METHOD void average(F g, F& m, F& v) const {
    const F way = V::mul(lerp, V::sub(g, m));
    // Not a choice between two operands: the compiler would put both into memory for that.
    if (__builtin_expect(from_grad, 0)) {
      m = V::add(g, way);
    } else {
      m = V::add(m, way);
    }
    v = V::add(V::mul(v, beta2), V::mul(V::mul(rest2, g), g));
  }
  HFS_METHOD F direction(F m, F v) const {
    const F denominator = V::add(V::mul(V::sqrt(v), root_correction), eps);
    return V::div(V::mul(step_size, m), denominator);
  }
  HFS_METHOD void step(F& p, F g, F& m, F& v) const {
    g = V::mul(g, scale);
    g = V::add(g, V::mul(l2, p));
    p = V::mul(p, decay);
    average(g, m, v);
    p = V::sub(p, direction(m, v));
  }
};

template <class V>
struct Lion {
  using F = typename V::F;
  static constexpr int kMoments = 1;
  F scale, decay, beta1, rest1, beta2, rest2, lr;

  HFS_INLINE Lion of(const float* row) {
    return {V::set(row[1]), V::set(row[2]), V::set(row[3]), V::set(row[4]),
            V::set(row[5]), V::set(row[6]), V::set(row[7])};
  }
  HFS_METHOD void step(F& p, F g, F& m, F&) const {
    g = V::mul(g, scale);
    const F mixed = V::add(V::mul(m, beta1), V::mul(rest1, g));
    p = V::mul(p, decay);
    p = V::sub(p, V::mul(lr, V::sign(mixed)));
    m = V::add(V::mul(m, beta2), V::mul(rest2, g));
  }
};

template <class V>
struct Adagrad {
  using F = typename V::F;
  static constexpr int kMoments = 1;
  F scale, l2, step_size, eps;

  HFS_INLINE Adagrad of(const float* row) {
    return {V::set(row[1]), V::set(row[2]), V::set(row[3]), V::set(row[4])};
  }
  HFS_METHOD void step(F& p, F g, F& sum, F&) const {
    g = V::mul(g, scale);
    g = V::add(g, V::mul(l2, p));
    sum = V::add(sum, V::mul(g, g));
    p = V::sub(p, V::div(V::mul(step_size, g), V::add(V::sqrt(sum), eps)));
  }
};

template <class V>
struct Sgd {
  using F = typename V::F;
  static constexpr int kMoments = 1;
  F scale, l2, momentum, undamped, of_grad, of_momentum, lr;

  HFS_INLINE Sgd of(const float* row) {
    return {V::set(row[1]), V::set(row[2]), V::set(row[3]), V::set(row[4]),
            V::set(row[5]), V::set(row[6]), V::set(row[7])};
  }
  HFS_METHOD void step(F& p, F g, F& m, F&) const {
    g = V::mul(g, scale);
    g = V::add(g, V::mul(l2, p));
    m = V::add(V::mul(m, momentum), V::mul(undamped, g));
    p = V::sub(p, V::mul(lr, V::add(V::mul(of_grad, g), V::mul(of_momentum, m))));
  }
};

template <class V>
struct SgdPlain {
  using F = typename V::F;
  static constexpr int kMoments = 0;
  F scale, l2, lr;

  HFS_INLINE SgdPlain of(const float* row) {
    return {V::set(row[1]), V::set(row[2]), V::set(row[7])};
  }
  HFS_METHOD void step(F& p, F g, F&, F&) const {
    g = V::mul(g, scale);
    g = V::add(g, V::mul(l2, p));
    p = V::sub(p, V::mul(lr, g));
  }
};

// Does the rule's first moment carry a sign in its 8-bit code? The second never does.
constexpr bool first_is_signed(int rule) { return rule != HFS_ADAGRAD; }

}  // namespace

#endif  // HF_SPEED_UPDATE_RULES_H_
