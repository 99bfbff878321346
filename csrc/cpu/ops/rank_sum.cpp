#include "cpu/ops/rank_sum.h"

#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/world/fold.h"

namespace pyparallel::cpu {

namespace {

DType dtype_of(Precision precision) {
  switch (precision) {
    case Precision::f32: return DType::float32;
    case Precision::bf16: return DType::bfloat16;
    default: return DType::float16;
  }
}

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

RankSum show_rows(Group& group, const void* partial, bool wide, int64_t M, int64_t H,
                  Precision precision) {
  RankSum sum{};
  sum.ranks = group.size();
  sum.M = M;
  sum.H = H;
  sum.precision = precision;
  const int64_t bytes = M * H * bytes_of(precision);
  if (bytes > group.slot_bytes()) {
    throw std::invalid_argument("rows: expected at most " + std::to_string(group.slot_bytes()) +
                                " bytes, got " + std::to_string(bytes));
  }
  if (partial != nullptr && wide) {
    kernels().from_float(static_cast<const float*>(partial), precision, M * H, group.own_slot());
  } else if (partial != nullptr) {
    std::memcpy(group.own_slot(), partial, size_t(bytes));
  }
  group.exchange(M * H, dtype_of(precision));
  for (int r = 0; r < sum.ranks; ++r) sum.parts[r] = group.slot_of(r);
  return sum;
}

void rank_sum(const RankSum& sum, const void* bias, void* y) {
  WideRows wide(sum.precision, bias == nullptr ? 0 : sum.H);
  for (int64_t m = 0; m < sum.M; ++m) {
    unsigned char* row = row_of(y, sum, m);
    sum_row(sum, m, row);
    if (bias != nullptr) wide.add(row, bias);
  }
}

void rank_sum_residual_rms_norm(const RankSum& sum, const void* residual, const float* weight,
                                float eps, void* h, void* y) {
  WideRows wide(sum.precision, sum.H);
  for (int64_t m = 0; m < sum.M; ++m) {
    unsigned char* row = row_of(h, sum, m);
    sum_row(sum, m, row);
    const float* x = wide.add(row, row_of(residual, sum, m));
    wide.rms_norm(x, weight, eps, row_of(y, sum, m));
  }
}

}  // namespace pyparallel::cpu
