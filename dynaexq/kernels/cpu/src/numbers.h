// 16-bit floats, one at a time.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace dynaexq {

inline float from_bfloat16(uint16_t bits) { return std::bit_cast<float>(uint32_t(bits) << 16); }

// Round to nearest, ties to even; NaN stays NaN.
inline uint16_t to_bfloat16(float value) {
  uint32_t bits = std::bit_cast<uint32_t>(value);
  uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  return uint16_t(value == value ? rounded : (bits >> 16) | 0x40);
}

#if defined(__F16C__)
inline float from_float16(uint16_t bits) { return _cvtsh_ss(bits); }
inline uint16_t to_float16(float value) { return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT); }
#else
inline float from_float16(uint16_t bits) { return std::bit_cast<__fp16>(bits); }
inline uint16_t to_float16(float value) { return std::bit_cast<uint16_t>(__fp16(value)); }
#endif

// A byte has the lowest three bits of a float16's exponent and the topmost five of its mantissa.
constexpr int BYTE_IN_FLOAT16 = 5;

inline int32_t unaligned(const void* from) {
  int32_t word;
  std::memcpy(&word, from, sizeof word);
  return word;
}

}  // namespace dynaexq
