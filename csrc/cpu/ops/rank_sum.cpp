#include "cpu/ops/rank_sum.h"

#include <vector>

#include "cpu/world/fold.h"

namespace pyparallel::cpu {

namespace {

// to = the parts' row m, summed.
void sum_row(const RankSum& sum, int64_t m, void* to) {
  const auto fold = [&](auto zero) {
    using T = decltype(zero);
    const T* rows[kMaxRanks];
    for (int r = 0; r < sum.ranks; ++r) rows[r] = static_cast<const T*>(sum.parts[r]) + m * sum.H;
    folds().get<Sum, T>()(static_cast<T*>(to), rows, sum.ranks, sum.H);
  };
  switch (sum.precision) {
    case Precision::f32: return fold(float{});
    case Precision::bf16: return fold(BFloat16{});
    default: return fold(Half{});
  }
}

// Rows in fp32: those that are fp32 are worked on where they lie, others through rows of their own.
class WideRows {
 public:
  WideRows(Precision precision, int64_t n) : precision_(precision), n_(n) {
    if (precision != Precision::f32) memory_.resize(size_t(2 * n));
  }

  // row += other, rounded once; returns row in fp32.
  const float* add(void* row, const void* other) {
    float* a = wide(row, 0);
    const float* b = wide(const_cast<void*>(other), n_);
    kernels().add_parts(a, &b, 1, nullptr, n_);
    if (precision_ == Precision::f32) return a;
    kernels().from_float(a, precision_, n_, row);
    return wide(row, 0);
  }

  void rms_norm(const float* x, const float* weight, float eps, void* y) {
    float* to = precision_ == Precision::f32 ? static_cast<float*>(y) : memory_.data() + n_;
    kernels().rms_norm(x, weight, eps, n_, to);
    if (precision_ != Precision::f32) kernels().from_float(to, precision_, n_, y);
  }

 private:
  float* wide(void* row, int64_t at) {
    if (precision_ == Precision::f32) return static_cast<float*>(row);
    kernels().to_float(row, precision_, n_, memory_.data() + at);
    return memory_.data() + at;
  }

  Precision precision_;
  int64_t n_;
  std::vector<float> memory_;
};

unsigned char* row_of(const void* rows, const RankSum& sum, int64_t m) {
  return static_cast<unsigned char*>(const_cast<void*>(rows)) + m * sum.H * bytes_of(sum.precision);
}

}  // namespace

void rank_sum(const RankSum& sum, const void* bias, void* y) {
  WideRows wide(sum.precision, bias == nullptr ? 0 : sum.H);
  for (int64_t m = 0; m < sum.M; ++m) {
    unsigned char* row = row_of(y, sum, m);
    sum_row(sum, m, row);
    if (bias != nullptr) wide.add(row, bias);
  }
}

void rank_sum_residual_rms_norm(const RankSum& sum, const void* residual, const float* weight, float eps,
                                void* h, void* y) {
  WideRows wide(sum.precision, sum.H);
  for (int64_t m = 0; m < sum.M; ++m) {
    unsigned char* row = row_of(h, sum, m);
    sum_row(sum, m, row);
    const float* x = wide.add(row, row_of(residual, sum, m));
    wide.rms_norm(x, weight, eps, row_of(y, sum, m));
  }
}

}  // namespace pyparallel::cpu
