// Vectors of this machine: words of four codes, 16-bit numbers, floats that hold sums. It knows no format.
//
// `Avx512`, `Avx2` and `Neon` offer the same operations at three widths; the first says what each is. On top of them
// an *arithmetic* says what rows and 16-bit weights are made of: `Float32`, for rows of any dtype, or `Bfloat16`,
// where the machine multiplies pairs.
#pragma once

#if defined(__AVX512BW__)
#include "avx512.h"
#elif defined(__AVX2__)
#include "avx2.h"
#elif defined(__ARM_FEATURE_DOTPROD)
#include "neon.h"
#else
#error "needs AVX2, AVX-512, or NEON with dot products"
#endif

namespace dynaexq {

#if defined(__AVX512BW__)
using Vector = Avx512;
#elif defined(__AVX2__)
using Vector = Avx2;
#else
using Vector = Neon;
#endif

// Rows and weights in float32. In memory every run of HALFWORDS values holds the even ones first, then the odd ones,
// which is how a vector of bfloat16 falls apart.
struct Float32 : Vector {
  using Element = float;
  struct Operand {
    Floats even, odd;
  };

  static int64_t place(int64_t column) {
    int64_t lane = column % HALFWORDS;
    return column - lane + lane / 2 + lane % 2 * FLOATS;
  }
  static Element element(float value) { return value; }
  static float value(Element element) { return element; }

  static Operand operand(const Element* from) { return {load(from), load(from + FLOATS)}; }
  static Operand operand(const uint16_t* bfloat16) {
    const Halfwords numbers = load(bfloat16);
    return {even_numbers(numbers), odd_numbers(numbers)};
  }

  static Floats dot(Floats sum, Operand weights, Operand row) {
    return multiply_add(weights.odd, row.odd, multiply_add(weights.even, row.even, sum));
  }
};

#if defined(__AVX512BF16__)

// Rows and weights in bfloat16, in their own order, multiplied in pairs and added up in float32.
struct Bfloat16 : Vector {
  using Element = uint16_t;
  using Operand = __m512bh;

  static int64_t place(int64_t column) { return column; }
  static Element element(float value) { return to_bfloat16(value); }
  static float value(Element element) { return from_bfloat16(element); }

  static Operand operand(const Element* from) { return (__m512bh)load(from); }

  static Floats dot(Floats sum, Operand weights, Operand row) { return _mm512_dpbf16_ps(sum, weights, row); }
};

#endif

#if defined(DYNAEXQ_BFLOAT16)
using Arithmetic = Bfloat16;
#else
using Arithmetic = Float32;
#endif

}  // namespace dynaexq
