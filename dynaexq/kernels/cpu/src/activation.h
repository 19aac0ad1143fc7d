// Activations between the two matrices, in float32, in plain loops that the compiler vectorizes.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>

#include "interface.h"

namespace dynaexq {

// e**x to within 2 units in the last place; Cephes' reduction and polynomial (S. L. Moshier, expf).
inline float exponential(float x) {
  constexpr float ROUND = 0x1.8p23f;  // adding and subtracting it rounds to an integer
  x = std::min(std::max(x, -87.0f), 88.0f);
  float shifted = x * 1.44269504f + ROUND;
  float power = shifted - ROUND;
  float r = x - power * 0.693359375f + power * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  uint32_t exponent = std::bit_cast<uint32_t>(shifted) - std::bit_cast<uint32_t>(ROUND) + 127;
  return p * std::bit_cast<float>(exponent << 23);
}

template <Activation KIND>
inline float activated(float x) {
  if constexpr (KIND == SILU) return x / (1.0f + exponential(-x));
  if constexpr (KIND == GELU) return 0.5f * x * (1.0f + std::erf(x * 0.707106781f));
  if constexpr (KIND == GELU_TANH)  // 0.5 (1 + tanh z) = 1 / (1 + e**-2z)
    return x / (1.0f + exponential(-1.59576912f * (x + 0.044715f * x * x * x)));
  if constexpr (KIND == RELU) return std::max(x, 0.0f);
  if constexpr (KIND == RELU2) return std::max(x, 0.0f) * std::max(x, 0.0f);
}

template <Activation KIND>
inline void activate(float* values, const float* factors, int64_t count) {
  if (factors)
    for (int64_t i = 0; i < count; i++) values[i] = activated<KIND>(values[i]) * factors[i];
  else
    for (int64_t i = 0; i < count; i++) values[i] = activated<KIND>(values[i]);
}

// values = activation(values), times `factors` where there is a gate.
inline void activate(int64_t kind, float* values, const float* factors, int64_t count) {
  switch (kind) {
    case SILU: return activate<SILU>(values, factors, count);
    case GELU: return activate<GELU>(values, factors, count);
    case GELU_TANH: return activate<GELU_TANH>(values, factors, count);
    case RELU: return activate<RELU>(values, factors, count);
    case RELU2: return activate<RELU2>(values, factors, count);
  }
}

}  // namespace dynaexq
