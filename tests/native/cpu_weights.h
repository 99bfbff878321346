// Weights for the kernels' tests, on the heap and of exactly their size, so that a byte too far is seen.
#pragma once

#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "check.h"
#include "core/part.h"
#include "cpu/kernels/kernels.h"

namespace pyparallel::test {

using namespace cpu;

// n numbers in a row.
struct Packed {
  Packed(const Kernels& k, const std::vector<float>& from, Precision precision)
      : precision(precision) {
    const int64_t n = int64_t(from.size()), bytes = bytes_of(precision, n);
    data.reset(new unsigned char[size_t(bytes)]);
    if (precision == Precision::i8) {
      for (int64_t i = 0; i < n; ++i)
        reinterpret_cast<int8_t*>(data.get())[i] = int8_t(from[size_t(i)] * 100);
    } else {
      k.from_float(from.data(), precision, n, data.get());
    }
    wide.resize(from.size());
    k.to_float(data.get(), precision, n, wide.data());
  }
  Precision precision;
  std::unique_ptr<unsigned char[]> data;
  std::vector<float> wide;
};

// Random blocks of [N, K], woven: what csrc/cpu/kernels/gguf_blocks.inl says, written down once more, a byte at a time.
struct Woven {
  Woven(const Kernels& k, Random& random, int64_t N, int64_t K, Precision precision)
      : data(new unsigned char[size_t(N * bytes_of(precision, K))]),
        wide(size_t(N * K)),
        parts(size_t(N * K)) {
    const bool bytes = precision == Precision::q8_0;
    const int64_t scales = precision == Precision::q4_1 ? 2 : 1, quants = bytes ? 32 : 16,
                  blocks = K / kBlockWeights;
    for (int64_t n = 0; n < N; ++n) {
      const int64_t lane = n % kGroupRows, rows = min_of(kGroupRows, N - (n - lane));
      for (int64_t b = 0; b < blocks; ++b) {
        unsigned char* group =
            data.get() + (n - lane) * bytes_of(precision, K) + b * rows * (2 * scales + quants);
        float scale[2] = {float(random.below(100)) / (bytes ? 51200 : 6400),
                          scales == 2 ? float(random.below(100) - 50) / 1000 : 0};
        for (int64_t s = 0; s < scales; ++s) {
          uint16_t half;
          k.from_float(scale + s, Precision::f16, 1, &half);
          k.to_float(&half, Precision::f16, 1, scale + s);
          std::memcpy(group + 2 * (s * rows + lane), &half, 2);
        }
        const int64_t at = n * K + b * kBlockWeights;
        float* to = wide.data() + at;
        for (int64_t i = 0; i < kBlockWeights; ++i) {
          parts[size_t(at + i)] = (bytes ? 256.0f : 16.0f) * scale[0] + std::fabs(scale[1]);
        }
        for (int64_t i = 0; i < quants; ++i) {
          const int value = int(random.below(256));
          group[2 * scales * rows + 4 * (i / 4 * rows + lane) + i % 4] =
              static_cast<unsigned char>(value);
          const int bias = precision == Precision::q4_0 ? 8 : 0;
          if (bytes) {
            to[i] = float(int8_t(value)) * scale[0];
          } else {
            to[i] = float((value & 15) - bias) * scale[0] + scale[1];
            to[16 + i] = float((value >> 4) - bias) * scale[0] + scale[1];
          }
        }
      }
    }
  }
  std::unique_ptr<unsigned char[]> data;
  std::vector<float> wide;
  // What a weight is made of: |d| times the most a quantum is, and |m|, which the kernels add up apart.
  std::vector<float> parts;
};

}  // namespace pyparallel::test
