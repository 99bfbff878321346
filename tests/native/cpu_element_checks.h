// Conversions and argmax of one instruction set. What a half precision number is, and which is nearest, is
// said here once more, in doubles.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "check.h"
#include "cpu/kernels/kernels.h"

namespace pyparallel::test {

using namespace pyparallel::cpu;

// A format of 16 bits: sign, exponent, then `fraction` bits.
struct HalfFormat {
  int fraction;
  int bias;

  double value_of(uint16_t bits) const {
    const int exponent = (bits & 0x7fff) >> fraction, low = bits & ((1 << fraction) - 1);
    const double sign = bits & 0x8000 ? -1 : 1;
    if (exponent == 0x7fff >> fraction) {
      return low != 0 ? std::numeric_limits<double>::quiet_NaN()
                      : sign * std::numeric_limits<double>::infinity();
    }
    if (exponent == 0) return sign * std::ldexp(low, 1 - bias - fraction);
    return sign * std::ldexp(low + (1 << fraction), exponent - bias - fraction);
  }

  // The nearest value, of two the even one; infinity from half a step above the largest on.
  double nearest(double x) const {
    if (!std::isfinite(x) || x == 0) return x;
    const int exponent = std::max(std::ilogb(x), 1 - bias);
    const double step = std::ldexp(1.0, exponent - fraction), y = std::nearbyint(x / step) * step;
    const double largest = value_of(uint16_t((0x7fff >> fraction << fraction) - 1));
    return std::fabs(y) > largest ? std::copysign(std::numeric_limits<double>::infinity(), x) : y;
  }
};

inline bool is_same(double a, double b) {
  return std::isnan(a) ? std::isnan(b) : a == b && std::signbit(a) == std::signbit(b);
}

// Every pattern to fp32; random patterns of fp32, and numbers between two of the format and in their middle,
// from it.
inline void check_conversions(const Kernels& k, Random& random, Precision precision) {
  const HalfFormat format = precision == Precision::bf16 ? HalfFormat{7, 127} : HalfFormat{10, 15};
  std::vector<uint16_t> patterns(1 << 16);
  for (size_t i = 0; i < patterns.size(); ++i) patterns[i] = uint16_t(i);
  std::vector<float> wide(patterns.size());
  k.to_float(patterns.data(), precision, int64_t(patterns.size()), wide.data());
  for (size_t i = 0; i < patterns.size(); ++i) {
    expect(is_same(wide[i], format.value_of(patterns[i])), "a number is widened to another");
  }
  std::vector<float> from = {0.0f, -0.0f, 3e38f, -3e38f};
  for (int i = 0; i < 100003; ++i) {
    const auto bits = uint32_t(random.next() >> 16);
    from.push_back(std::bit_cast<float>(bits));
  }
  for (size_t i = 1; i < wide.size(); ++i) {
    from.push_back((wide[i - 1] + wide[i]) / 2);
    from.push_back(wide[i] * (1 + std::ldexp(float(random.below(1 << 20)), -20 - format.fraction)));
  }
  std::vector<uint16_t> narrow(from.size());
  k.from_float(from.data(), precision, int64_t(from.size()), narrow.data());
  for (size_t i = 0; i < from.size(); ++i) {
    expect(is_same(format.value_of(narrow[i]), format.nearest(from[i])),
           "a number is rounded to another");
  }
}

// The first of the largest, wherever it stands.
inline void check_argmax(const Kernels& k, Random& random) {
  const int64_t n = 1 + random.below(200), first = random.below(2) * random.below(n);
  std::vector<float> x(static_cast<size_t>(n));
  for (float& each : x) each = -float(random.below(1000));
  for (int64_t i = first; i < n; i += 1 + random.below(9)) x[size_t(i)] = 1;
  expect(k.argmax(x.data(), n) == first, "argmax is another than the first of the largest");
}

}  // namespace pyparallel::test
