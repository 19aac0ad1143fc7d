// Vectors of AVX-512. See `vector.h`.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "numbers.h"

namespace dynaexq {

struct Avx512 {
  static constexpr int HALFWORDS = 32;
  static constexpr int FLOATS = 16;
  static constexpr int ROWS = 8;  // activation rows whose sums stay in registers
  using Halfwords = __m512i;
  using Floats = __m512;

  static Halfwords load(const uint16_t* from) { return _mm512_loadu_si512(from); }

  // FLOATS words of four bytes each.
  using Words = __m512i;
  static Words load(const uint32_t* from) { return _mm512_loadu_si512(from); }
  static void store(uint32_t* to, Words v) { _mm512_storeu_si512(to, v); }
  static Words repeat(const void* word) { return _mm512_set1_epi32(unaligned(word)); }

  // Every byte, but for what comes in from its neighbor.
  template <int BITS>
  static Words shift_right(Words v) {
    return _mm512_srli_epi16(v, BITS);
  }
  template <int BITS>
  static Words shift_left(Words v) {
    return _mm512_slli_epi16(v, BITS);
  }
  template <uint8_t MASK>
  static Words mask(Words v) {
    return _mm512_and_si512(v, _mm512_set1_epi8(char(MASK)));
  }
  // The bits of MASK from `v`, all others from `rest`.
  template <uint8_t MASK>
  static Words merge(Words v, Words rest) {
    return _mm512_ternarylogic_epi32(v, rest, _mm512_set1_epi8(char(MASK)), 0xE4);
  }

  // Sums of 32 bits, to each of which four products are added: of the four codes of a word, below 2**DEPTH, and the
  // four numbers of `row`.
  using Ints = __m512i;
  static Ints no_ints() { return _mm512_setzero_si512(); }
  static Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
  template <int DEPTH>
  static Ints add_products(Ints sums, Words codes, const int8_t* row) {
#if defined(__AVX512VNNI__)
    return _mm512_dpbusd_epi32(sums, codes, repeat(row));
#else
    const Words ones = _mm512_set1_epi16(1), numbers = repeat(row);
    if constexpr (DEPTH < 8) return add(sums, _mm512_madd_epi16(_mm512_maddubs_epi16(codes, numbers), ones));
    const Words low = _mm512_maddubs_epi16(mask<0x0F>(codes), numbers);
    const Words high = _mm512_maddubs_epi16(mask<0x0F>(shift_right<4>(codes)), numbers);
    sums = add(sums, _mm512_madd_epi16(low, ones));
    return add(sums, _mm512_madd_epi16(high, _mm512_set1_epi16(16)));
#endif
  }
  // The numbers of the columns 0, 2, 1, 3.
  template <int DEPTH>
  static Ints add_products(Ints sums, Words codes, const int16_t* row) {
    const Words bytes = _mm512_set1_epi32(0x00FF00FF);
    const Words even = _mm512_and_si512(codes, bytes), odd = _mm512_and_si512(_mm512_srli_epi32(codes, 8), bytes);
#if defined(__AVX512VNNI__)
    return _mm512_dpwssd_epi32(_mm512_dpwssd_epi32(sums, even, repeat(row)), odd, repeat(row + 2));
#else
    sums = add(sums, _mm512_madd_epi16(even, repeat(row)));
    return add(sums, _mm512_madd_epi16(odd, repeat(row + 2)));
#endif
  }
  static Floats floats(Ints v) { return _mm512_cvtepi32_ps(v); }

  // Byte INDEX of each word.
  template <int INDEX>
  static Floats floats_of(Words v) {
    return floats(_mm512_and_si512(_mm512_srli_epi32(v, 8 * INDEX), _mm512_set1_epi32(0xFF)));
  }

  // FLOATS bytes.
  static Floats floats(const uint8_t* from) {
    return floats(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from)));
  }

  // Four vectors of which each holds the next four columns of every row, to `to [FLOATS, stride]`, a row a row.
  static void store_rows(const Words (&columns)[4], uint8_t* to, int64_t stride) {
    const Words ab = _mm512_unpacklo_epi32(columns[0], columns[1]), AB = _mm512_unpackhi_epi32(columns[0], columns[1]);
    const Words cd = _mm512_unpacklo_epi32(columns[2], columns[3]), CD = _mm512_unpackhi_epi32(columns[2], columns[3]);
    const Words rows[4] = {_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd), _mm512_unpacklo_epi64(AB, CD),
                           _mm512_unpackhi_epi64(AB, CD)};
    for (int i = 0; i < 4; i++) {
      _mm_storeu_si128((__m128i*)(to + i * stride), _mm512_castsi512_si128(rows[i]));
      _mm_storeu_si128((__m128i*)(to + (4 + i) * stride), _mm512_extracti32x4_epi32(rows[i], 1));
      _mm_storeu_si128((__m128i*)(to + (8 + i) * stride), _mm512_extracti32x4_epi32(rows[i], 2));
      _mm_storeu_si128((__m128i*)(to + (12 + i) * stride), _mm512_extracti32x4_epi32(rows[i], 3));
    }
  }

  // bfloat16 numbers as floats.
  static Floats even_numbers(Halfwords v) { return _mm512_castsi512_ps(_mm512_slli_epi32(v, 16)); }
  static Floats odd_numbers(Halfwords v) {
    return _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(0xFFFF0000)));
  }

  static Floats zero() { return _mm512_setzero_ps(); }
  static Floats fill(float value) { return _mm512_set1_ps(value); }
  static Floats load(const float* from) { return _mm512_loadu_ps(from); }
  static void store(float* to, Floats v) { _mm512_storeu_ps(to, v); }
  static Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
  static Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  static Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }

  // The sums over the lanes of four vectors, to `to [4]`; each in the same order, whatever its place.
  static void store_sums(float* to, Floats a, Floats b, Floats c, Floats d) {
    __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    __m512 abcd = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xEE));
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
  }

  // FLOATS numbers of float16.
  static Floats load_float16(const uint16_t* from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
  }
  // FLOATS bytes in the middle of float16 numbers.
  static Floats load_middle_bytes(const uint8_t* from) {
    const __m256i halves = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)from));
    return _mm512_cvtph_ps(_mm256_slli_epi16(halves, BYTE_IN_FLOAT16));
  }
};

using Vector = Avx512;

}  // namespace dynaexq
