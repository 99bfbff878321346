// The compute kernels of one instruction set against sums in double precision.
#pragma once

#include <cmath>
#include <cstdlib>
#include <memory>
#include <vector>

#include "check.h"
#include "core/pack.h"
#include "cpu/kernels/kernels.h"
#include "cpu/ops/rank_sum.h"
#include "cpu_weights.h"

namespace pyparallel::test {

inline std::vector<float> values(Random& random, int64_t n) {
  std::vector<float> v(static_cast<size_t>(n));
  for (float& x : v) x = float(random.below(2001) - 1000) / 1000.0f;
  return v;
}

struct Aligned {
  explicit Aligned(int64_t bytes)
      : data(std::aligned_alloc(64, size_t(round_up(max_of(bytes, 1), 64)))) {}
  ~Aligned() { std::free(data); }
  void* data;
};

// Half the distance of two fp32 numbers, of their size.
inline constexpr double kRound = 0x1p-24;

inline void check_linear(const Kernels& k, Random& random, Precision precision, bool gated) {
  const int64_t M = 1 + random.below(30), N = 1 + random.below(90);
  const int64_t K =
      in_blocks(precision) ? kBlockWeights * (1 + random.below(4)) : 1 + random.below(120);
  const auto x = values(random, M * K);
  const auto bias = values(random, N), residual = values(random, M * N);
  const std::vector<float> scale(size_t(N), 0.01f);
  std::vector<float> y(size_t(M * N));
  Aligned workspace(k.block_linear_bytes(M, K));
  LinearCall call{};
  call.x = x.data();
  call.x_stride = K;
  call.M = M;
  call.K = K;
  const bool int8 = precision == Precision::i8;
  std::unique_ptr<Packed> plain[2];
  std::unique_ptr<Woven> woven[2];
  const float* wide[2];
  const float* parts[2];
  Weight* const weights[2] = {&call.weight, &call.up};
  // Many rows take blocks by whole groups if the outputs begin with one, so half the calls do.
  const bool whole = random.below(2) == 1;
  const auto start = [&](int64_t n) {
    return random.below(n) / (whole ? kGroupRows : 1) * (whole ? kGroupRows : 1);
  };
  for (int i = 0; i < (gated ? 2 : 1); ++i) {
    Weight& weight = *weights[i];
    weight.precision = precision;
    weight.bias = i == 0 ? bias.data() : nullptr;
    if (in_blocks(precision)) {
      // Some rows of a matrix, so cut across its groups now and then.
      weight.first = random.below(2) * start(40);
      weight.rows = weight.first + N + random.below(20);
      woven[i] = std::make_unique<Woven>(k, random, weight.rows, K, precision);
      weight.data = woven[i]->data.get();
      wide[i] = woven[i]->wide.data() + weight.first * K;
      parts[i] = woven[i]->parts.data() + weight.first * K;
      std::vector<float> row(static_cast<size_t>(K));
      k.weight_row(weight, N - 1, K, row.data());
      for (int64_t j = 0; j < K; ++j) {
        // Rounded once there, and twice here.
        const int64_t at = (N - 1) * K + j;
        expect(std::fabs(row[size_t(j)] - wide[i][at]) <= 3 * kRound * parts[i][at],
               "a row of blocks is off");
      }
    } else {
      plain[i] = std::make_unique<Packed>(k, values(random, N * K), precision);
      weight.scale = int8 ? scale.data() : nullptr;
      weight.data = plain[i]->data.get();
      wide[i] = parts[i] = plain[i]->wide.data();
    }
  }
  call.act = gated ? Activation::silu : Activation::none;
  call.residual = residual.data();
  call.residual_stride = N;
  call.y = y.data();
  call.y_stride = N;
  call.begin = start(N);
  call.end = call.begin + random.below(N - call.begin + 1);
  call.workspace = workspace.data;
  for (int thin = 0; thin < 2; ++thin) {
    if (thin && M > kMaxThinRows) continue;
    (thin ? k.thin_linear : k.block_linear)(call);
    for (int64_t m = 0; m < M; ++m) {
      for (int64_t n = call.begin; n < call.end; ++n) {
        // A sum of K products is rounded K times, each time by a part of what has been added up; of blocks
        // x is rounded too, to 2^-22 of the largest, which is 1.
        double sums[2] = {}, errors[2] = {};
        for (int g = 0; g < (gated ? 2 : 1); ++g) {
          const double by = int8 ? 0.01f : 1;
          for (int64_t i = 0; i < K; ++i) {
            const double xi = x[size_t(m * K + i)], part = std::fabs(parts[g][n * K + i]);
            sums[g] += by * xi * wide[g][n * K + i];
            errors[g] += by * part * kRound *
                         (double(K + 4) * std::fabs(xi) + (in_blocks(precision) ? 4 : 0));
          }
        }
        double a = sums[0] + bias[size_t(n)], error = errors[0] + kRound * std::fabs(a);
        if (gated) {
          // |silu'| <= 1.1; exp's error is 2e-7, of the same size as those of the division and the product.
          const double gate = a / (1 + std::exp(-a));
          a = gate * sums[1];
          error = 1.1 * error * (std::fabs(sums[1]) + errors[1]) + std::fabs(gate) * errors[1] +
                  8 * kRound * std::fabs(a);
        }
        a += residual[size_t(m * N + n)];
        error += 2 * kRound * std::fabs(a);
        expect(std::fabs(a - y[size_t(m * N + n)]) <= error, "linear is off");
      }
    }
  }
}

inline void check_attention(const Kernels& k, Random& random, Precision precision) {
  const int64_t G = 1 + random.below(6), D = 1 + random.below(90), T = 1 + random.below(200);
  const int64_t M = 1 + random.below(T), start = T - M;
  const auto q = values(random, M * G * D);
  const Packed keys(k, values(random, T * D), precision), vals(k, values(random, T * D), precision);
  std::vector<float> together(size_t(M * G * D)), one(size_t(M * G * D)), state(size_t(2 * G));
  Aligned workspace(k.prefill_attention_bytes(G, D));
  AttentionCall call{};
  call.q = q.data();
  call.q_row_stride = G * D;
  call.q_head_stride = D;
  call.keys = keys.data.get();
  call.values = vals.data.get();
  call.key_stride = D;
  call.precision = precision;
  call.G = G;
  call.D = D;
  call.out = together.data();
  call.out_row_stride = G * D;
  call.out_head_stride = D;
  call.workspace = workspace.data;
  const int64_t window = random.below(2) * random.below(T + 1);
  const auto first_key = [&](int64_t m) {
    return window == 0 ? 0 : max_of(0, start + m + 1 - window);
  };
  k.prefill_attention(call, M, start, window);
  for (int64_t m = 0; m < M; ++m) {
    AttentionCall row = call;
    row.q = q.data() + m * G * D;
    row.out = one.data() + m * G * D;
    const SoftmaxState s{state.data(), state.data() + G};
    k.decode_attention(row, first_key(m), start + m + 1, s);
    k.merge_attention(row.out, G * D, s, 1, G, D, row.out, D);
  }
  for (int64_t i = 0; i < M * G; ++i) {
    const int64_t first = first_key(i / G), end = start + i / G + 1;
    std::vector<double> weights, truth(static_cast<size_t>(D));
    double largest = 0, highest = -HUGE_VAL, total = 0;
    for (int64_t t = first; t < end; ++t) {
      double score = 0, products = 0;
      for (int64_t d = 0; d < D; ++d) {
        const double product = double(q[size_t(i * D + d)]) * keys.wide[size_t(t * D + d)];
        score += product;
        products += std::fabs(product);
      }
      weights.push_back(score);
      largest = std::fmax(largest, products);
      highest = std::fmax(highest, score);
    }
    for (double& weight : weights) total += weight = std::exp(weight - highest);
    for (int64_t t = first; t < end; ++t) {
      for (int64_t d = 0; d < D; ++d)
        truth[size_t(d)] += weights[size_t(t - first)] / total * vals.wide[size_t(t * D + d)];
    }
    // A weight is off by what its score, a sum of D products, and the largest are; each of the two sums of
    // so many weights and products by as many roundings, exp by some more. No value is above 1.
    const double error = kRound * (2 * double(D + 4) * largest + 2 * double(end - first) + 16);
    for (int64_t d = 0; d < D; ++d) {
      expect(std::fabs(one[size_t(i * D + d)] - truth[size_t(d)]) <= error,
             "attention of one is off");
      expect(std::fabs(together[size_t(i * D + d)] - truth[size_t(d)]) <= error,
             "attention is off");
    }
  }
}

// Sum, residual and norm of rows that three ranks have shown, against the kernels one after another.
inline void check_rank_sum(const Kernels& k, Random& random, Precision precision) {
  const int64_t M = 1 + random.below(5), H = 1 + random.below(70), n = M * H;
  std::vector<Packed> parts;
  for (int r = 0; r < 3; ++r) parts.emplace_back(k, values(random, n), precision);
  const Packed residual(k, values(random, n), precision), bias(k, values(random, H), precision);
  const auto weight = values(random, H);
  RankSum sum{};
  for (int r = 0; r < 3; ++r) sum.parts[r] = parts[size_t(r)].data.get();
  sum.ranks = 3;
  sum.M = M;
  sum.H = H;
  sum.precision = precision;
  Packed biased(k, values(random, n), precision), h(k, values(random, n), precision),
      y(k, values(random, n), precision);
  rank_sum(sum, bias.data.get(), biased.data.get());
  rank_sum_residual_rms_norm(sum, residual.data.get(), weight.data(), 1e-5f, h.data.get(),
                             y.data.get());
  const auto rounded = [&](std::vector<float> row) { return Packed(k, row, precision).wide; };
  const auto read = [&](const Packed& rows, int64_t m) {
    std::vector<float> row(static_cast<size_t>(H));
    k.to_float(rows.data.get() + m * H * bytes_of(precision), precision, H, row.data());
    return row;
  };
  for (int64_t m = 0; m < M; ++m) {
    std::vector<float> total(static_cast<size_t>(H));
    const auto at = [&](const Packed& rows, int64_t i) { return rows.wide[size_t(m * H + i)]; };
    for (int64_t i = 0; i < H; ++i)
      total[size_t(i)] = at(parts[0], i) + at(parts[1], i) + at(parts[2], i);
    total = rounded(total);
    auto with_bias = total, with_residual = total;
    for (int64_t i = 0; i < H; ++i) {
      with_bias[size_t(i)] += bias.wide[size_t(i)];
      with_residual[size_t(i)] += at(residual, i);
    }
    with_residual = rounded(with_residual);
    std::vector<float> normed(static_cast<size_t>(H));
    k.rms_norm(with_residual.data(), weight.data(), 1e-5f, H, normed.data());
    expect(read(biased, m) == rounded(with_bias), "rank_sum has other bits");
    expect(read(h, m) == with_residual, "the residual stream has other bits");
    expect(read(y, m) == rounded(normed), "the norm has other bits");
  }
}

}  // namespace pyparallel::test
