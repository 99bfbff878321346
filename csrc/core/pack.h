// Element types and 16-byte packs: what one lane loads, folds and stores at a time.
//
// Half and BFloat16 are storage only; arithmetic is done in Accumulator<T>, and rounded once to the
// nearest even when stored. NaNs stay NaNs (payloads are not kept).
#pragma once

#include <cstdint>
#include <cstring>

#include "core/part.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace pyparallel {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// The type a sum over ranks is carried in.
template <class T>
struct AccumulatorOf {
  using type = T;
};
template <>
struct AccumulatorOf<Half> {
  using type = float;
};
template <>
struct AccumulatorOf<BFloat16> {
  using type = float;
};
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

PP_HOST_DEVICE uint32_t bits_of(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

PP_HOST_DEVICE float float_of(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

template <class T>
PP_HOST_DEVICE T widen(T value) {
  return value;
}

PP_HOST_DEVICE float widen(BFloat16 value) { return float_of(uint32_t(value.bits) << 16); }

PP_HOST_DEVICE float widen(Half value) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(value.bits));
#else
  // Multiplying by 2^112 moves the exponent from bias 15 to bias 127 and normalises subnormals.
  const uint32_t sign = uint32_t(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = uint32_t(value.bits & 0x7fffu) << 13;
  const float scaled = float_of(magnitude) * float_of(0x77800000u);
  const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
  return float_of(sign | special | bits_of(scaled));
#endif
}

template <class T>
PP_HOST_DEVICE T narrow(Accumulator<T> value) {
  return value;
}

template <>
PP_HOST_DEVICE BFloat16 narrow<BFloat16>(float value) {
#if defined(__CUDA_ARCH__)
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
#else
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {uint16_t(value != value ? (bits >> 16) | 0x40u : rounded)};
#endif
}

template <>
PP_HOST_DEVICE Half narrow<Half>(float value) {
#if defined(__CUDA_ARCH__)
  return {__half_as_ushort(__float2half_rn(value))};
#else
  const uint32_t bits = bits_of(value);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {uint16_t(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};
  if (magnitude < 0x38800000u) {
    // Adding 0.5 lets the addition itself round to a multiple of 2^-24, the half subnormal step.
    const uint32_t sum = bits_of(float_of(magnitude) + 0.5f);
    return {uint16_t(sign | (sum - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u;
  return {uint16_t(sign | (rounded >> 13))};
#endif
}

constexpr int kPackBytes = 16;

template <class T>
struct alignas(kPackBytes) Pack {
  static constexpr int kSize = kPackBytes / int(sizeof(T));
  T at[kSize];
};

PP_HOST_DEVICE bool is_pack_aligned(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % kPackBytes == 0;
}

}  // namespace pyparallel
