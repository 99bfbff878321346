// The activations and their derivatives, in fp32.
#pragma once

#include <cmath>

#include "core/activation.h"
#include "core/part.h"

namespace pyparallel::cuda {

constexpr float kSqrtHalf = 0.70710678118654752f;
constexpr float kSqrtTwoOverPi = 0.79788456080286536f;
constexpr float kInvSqrtTwoPi = 0.39894228040143268f;
constexpr float kGeluCubic = 0.044715f;

PP_HOST_DEVICE float activate(Activation kind, float x) {
  switch (kind) {
    case Activation::relu: return x > 0.0f ? x : (x != x ? x : 0.0f);
    case Activation::silu: return x / (1.0f + expf(-x));
    case Activation::gelu: return 0.5f * x * (1.0f + erff(x * kSqrtHalf));
    case Activation::gelu_tanh:
      return 0.5f * x * (1.0f + tanhf(kSqrtTwoOverPi * (x + kGeluCubic * x * x * x)));
    default: return x;
  }
}

// d activate / d x.
PP_HOST_DEVICE float activation_slope(Activation kind, float x) {
  switch (kind) {
    case Activation::relu: return x > 0.0f ? 1.0f : 0.0f;
    case Activation::silu: {
      const float s = 1.0f / (1.0f + expf(-x));
      return s * (1.0f + x * (1.0f - s));
    }
    case Activation::gelu:
      return 0.5f * (1.0f + erff(x * kSqrtHalf)) + x * kInvSqrtTwoPi * expf(-0.5f * x * x);
    case Activation::gelu_tanh: {
      const float t = tanhf(kSqrtTwoOverPi * (x + kGeluCubic * x * x * x));
      const float inner = kSqrtTwoOverPi * (1.0f + 3.0f * kGeluCubic * x * x);
      return 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * inner;
    }
    default: return 1.0f;
  }
}

}  // namespace pyparallel::cuda
