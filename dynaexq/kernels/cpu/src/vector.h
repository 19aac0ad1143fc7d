// Vectors of this machine: half-words that hold codes, floats that hold sums. It knows no format.
//
// `Avx512` and `Avx2` offer the same operations at two widths. On top of them an *arithmetic* says what rows and
// decoded weights are made of: `Float32`, for rows of any dtype, or `Bfloat16`, where the machine multiplies pairs.
#pragma once

#include <immintrin.h>

#include <bit>
#include <cstdint>

namespace dynaexq {

inline float from_bfloat16(uint16_t bits) { return std::bit_cast<float>(uint32_t(bits) << 16); }

// Round to nearest, ties to even; NaN stays NaN.
inline uint16_t to_bfloat16(float value) {
  uint32_t bits = std::bit_cast<uint32_t>(value);
  uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  return uint16_t(value == value ? rounded : (bits >> 16) | 0x40);
}

#if defined(__AVX512BW__)

struct Avx512 {
  static constexpr int HALFWORDS = 32;
  static constexpr int FLOATS = 16;
  using Halfwords = __m512i;
  using Floats = __m512;

  static Halfwords load(const uint16_t* from) { return _mm512_loadu_si512(from); }
  static Halfwords fill(uint16_t value) { return _mm512_set1_epi16(short(value)); }

  // WIDTH half-words, 8 or 16 of them, over and over.
  template <int WIDTH>
  static Halfwords repeat(const uint16_t* from) {
    if constexpr (WIDTH == 8) return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)from));
    return _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)from));
  }

  template <int BITS>
  static Halfwords shift_right(Halfwords v) {
    return _mm512_srli_epi16(v, BITS);
  }
  template <int BITS>
  static Halfwords shift_left(Halfwords v) {
    return _mm512_slli_epi16(v, BITS);
  }

  // Runs of WIDTH half-words, each shifted right by STEP more than the one before, the first by FIRST.
  template <int WIDTH, int FIRST, int STEP>
  static Halfwords shift_runs(Halfwords v) {
    constexpr auto quarter = [](int i) { return 0x0001000100010001LL * (FIRST + STEP * (i * 8 / WIDTH)); };
    return _mm512_srlv_epi16(v, _mm512_setr_epi64(quarter(0), quarter(0), quarter(1), quarter(1), quarter(2),
                                                  quarter(2), quarter(3), quarter(3)));
  }

  // (v & mask) | rest
  static Halfwords merge(Halfwords v, Halfwords mask, Halfwords rest) {
    return _mm512_ternarylogic_epi32(v, mask, rest, 0xEA);
  }

  // bfloat16 numbers as floats.
  static Floats even_numbers(Halfwords v) { return _mm512_castsi512_ps(_mm512_slli_epi32(v, 16)); }
  static Floats odd_numbers(Halfwords v) {
    return _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(0xFFFF0000)));
  }

  static Floats even(Halfwords v) { return _mm512_cvtepi32_ps(_mm512_and_si512(v, _mm512_set1_epi32(0xFFFF))); }
  static Floats odd(Halfwords v) { return _mm512_cvtepi32_ps(_mm512_srli_epi32(v, 16)); }

  // Sums of neighboring products of 16-bit integers, added to 32-bit ones.
  using Ints = __m512i;
  static Ints no_ints() { return _mm512_setzero_si512(); }
  static Ints add_products(Ints sums, Halfwords a, Halfwords b) {
    return _mm512_add_epi32(sums, _mm512_madd_epi16(a, b));
  }
  static Floats floats(Ints v) { return _mm512_cvtepi32_ps(v); }

  static Floats zero() { return _mm512_setzero_ps(); }
  static Floats fill(float value) { return _mm512_set1_ps(value); }
  static Floats load(const float* from) { return _mm512_loadu_ps(from); }
  static void store(float* to, Floats v) { _mm512_storeu_ps(to, v); }
  static Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
  static Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }

  // The sums over the lanes of four vectors; each in the same order, whatever its place.
  static __m128 sums(Floats a, Floats b, Floats c, Floats d) {
    __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    __m512 abcd = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xEE));
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  }

  // FLOATS interleaved float16 pairs, as floats.
  static void load_pairs(const uint16_t* from, Floats& first, Floats& second) {
    __m512i pairs = _mm512_loadu_si512(from);
    first = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(pairs));
    second = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(pairs, 16)));
  }
};

using Vector = Avx512;

#elif defined(__AVX2__)

struct Avx2 {
  static constexpr int HALFWORDS = 16;
  static constexpr int FLOATS = 8;
  using Halfwords = __m256i;
  using Floats = __m256;

  static Halfwords load(const uint16_t* from) { return _mm256_loadu_si256((const __m256i*)from); }
  static Halfwords fill(uint16_t value) { return _mm256_set1_epi16(short(value)); }

  template <int WIDTH>
  static Halfwords repeat(const uint16_t* from) {
    static_assert(WIDTH == 8);
    return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)from));
  }

  template <int BITS>
  static Halfwords shift_right(Halfwords v) {
    return _mm256_srli_epi16(v, BITS);
  }
  template <int BITS>
  static Halfwords shift_left(Halfwords v) {
    return _mm256_slli_epi16(v, BITS);
  }

  template <int WIDTH, int FIRST, int STEP>
  static Halfwords shift_runs(Halfwords v) {
    return _mm256_blend_epi32(_mm256_srli_epi16(v, FIRST), _mm256_srli_epi16(v, FIRST + STEP), 0xF0);
  }

  static Halfwords merge(Halfwords v, Halfwords mask, Halfwords rest) {
    return _mm256_or_si256(_mm256_and_si256(v, mask), rest);
  }

  static Floats even_numbers(Halfwords v) { return _mm256_castsi256_ps(_mm256_slli_epi32(v, 16)); }
  static Floats odd_numbers(Halfwords v) {
    return _mm256_castsi256_ps(_mm256_and_si256(v, _mm256_set1_epi32(0xFFFF0000)));
  }

  static Floats even(Halfwords v) { return _mm256_cvtepi32_ps(_mm256_and_si256(v, _mm256_set1_epi32(0xFFFF))); }
  static Floats odd(Halfwords v) { return _mm256_cvtepi32_ps(_mm256_srli_epi32(v, 16)); }

  using Ints = __m256i;
  static Ints no_ints() { return _mm256_setzero_si256(); }
  static Ints add_products(Ints sums, Halfwords a, Halfwords b) {
    return _mm256_add_epi32(sums, _mm256_madd_epi16(a, b));
  }
  static Floats floats(Ints v) { return _mm256_cvtepi32_ps(v); }

  static Floats zero() { return _mm256_setzero_ps(); }
  static Floats fill(float value) { return _mm256_set1_ps(value); }
  static Floats load(const float* from) { return _mm256_loadu_ps(from); }
  static void store(float* to, Floats v) { _mm256_storeu_ps(to, v); }
  static Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
  static Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }

  static __m128 sums(Floats a, Floats b, Floats c, Floats d) {
    __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
    __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
    __m256 abcd = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xEE));
    return _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1));
  }

  static void load_pairs(const uint16_t* from, Floats& first, Floats& second) {
    __m256i pairs = _mm256_loadu_si256((const __m256i*)from);
    auto halves = [](__m256i words) {
      __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(words, words), 0x08);
      return _mm256_cvtph_ps(_mm256_castsi256_si128(packed));
    };
    first = halves(_mm256_and_si256(pairs, _mm256_set1_epi32(0xFFFF)));
    second = halves(_mm256_srli_epi32(pairs, 16));
  }
};

using Vector = Avx2;

#else
#error "needs AVX2 or AVX-512"
#endif

// Rows and weights in float32. In memory every run of HALFWORDS values holds the even ones first, then the odd ones,
// which is how a vector of codes falls apart.
struct Float32 : Vector {
  using Element = float;
  struct Operand {
    Floats even, odd;
  };
  static constexpr uint16_t HIGH_MAGIC = 0, LOW_MAGIC = 0;

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
  static void store_operand(Element* to, Floats even, Floats odd) { store(to, even), store(to + FLOATS, odd); }

  static Floats dot(Floats sum, Operand weights, Operand row) {
    return multiply_add(weights.odd, row.odd, multiply_add(weights.even, row.even, sum));
  }

  // A code enters a product with this added, and the excess is taken away again at the end. Here it is moved to the
  // middle of its range, so that sums stay small and keep their last bits.
  static constexpr float excess(int depth) { return -float(1 << (depth - 1)); }
  template <int DEPTH>
  static Floats dot_code(Floats sum, Halfwords code, Operand row) {
    const Floats center = fill(excess(DEPTH));
    return dot(sum, {add(even(code), center), add(odd(code), center)}, row);
  }
  static Floats dot_digits(Floats sum, Halfwords high, Halfwords low, Operand row) {
    return dot_code<8>(sum, merge(shift_left<4>(high), fill(uint16_t(0xF0)), low), row);
  }
};

#if defined(__AVX512BF16__)

// Rows and weights in bfloat16, in their own order, multiplied in pairs and added up in float32.
//
// A digit q of four bits under the exponent of 128 is the bfloat16 number 128 + q, under that of 2048 it is
// 2048 + 16 q; an or makes it a number. The excess times the sum of the row is taken away again at the end.
struct Bfloat16 : Vector {
  using Element = uint16_t;
  using Operand = __m512bh;
  static constexpr uint16_t HIGH_MAGIC = 0x4500, LOW_MAGIC = 0x4300;

  static int64_t place(int64_t column) { return column; }
  static Element element(float value) { return to_bfloat16(value); }
  static float value(Element element) { return from_bfloat16(element); }

  static Operand operand(const Element* from) { return (__m512bh)load(from); }
  static void store_operand(Element* to, Floats even, Floats odd) {
    const __m512i zip = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                         21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(zip, (__m512i)_mm512_cvtne2ps_pbh(odd, even)));
  }

  static Floats dot(Floats sum, Operand weights, Operand row) { return _mm512_dpbf16_ps(sum, weights, row); }

  static constexpr float excess(int depth) { return depth == 8 ? 2048 + 128 : 128; }
  template <int>
  static Floats dot_code(Floats sum, Halfwords code, Operand row) {
    return dot(sum, (__m512bh)code, row);
  }
  static Floats dot_digits(Floats sum, Halfwords high, Halfwords low, Operand row) {
    return dot(dot(sum, (__m512bh)high, row), (__m512bh)low, row);
  }
};

#endif

#if defined(DYNAEXQ_BFLOAT16)
using Arithmetic = Bfloat16;
#else
using Arithmetic = Float32;
#endif

}  // namespace dynaexq
