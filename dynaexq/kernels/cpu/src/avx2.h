// Vectors of AVX2. See `vector.h`.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "numbers.h"

namespace dynaexq {

struct Avx2 {
  static constexpr int HALFWORDS = 16;
  static constexpr int FLOATS = 8;
  static constexpr int ROWS = 4;
  using Halfwords = __m256i;
  using Floats = __m256;

  static Halfwords load(const uint16_t* from) { return _mm256_loadu_si256((const __m256i*)from); }

  using Words = __m256i;
  static Words load(const uint32_t* from) { return _mm256_loadu_si256((const __m256i*)from); }
  static void store(uint32_t* to, Words v) { _mm256_storeu_si256((__m256i*)to, v); }
  static Words repeat(const void* word) { return _mm256_set1_epi32(unaligned(word)); }

  template <int BITS>
  static Words shift_right(Words v) {
    return _mm256_srli_epi16(v, BITS);
  }
  template <int BITS>
  static Words shift_left(Words v) {
    return _mm256_slli_epi16(v, BITS);
  }
  template <uint8_t MASK>
  static Words mask(Words v) {
    return _mm256_and_si256(v, _mm256_set1_epi8(char(MASK)));
  }
  template <uint8_t MASK>
  static Words merge(Words v, Words rest) {
    return _mm256_or_si256(mask<MASK>(v), mask<uint8_t(~MASK)>(rest));
  }

  using Ints = __m256i;
  static Ints no_ints() { return _mm256_setzero_si256(); }
  static Ints add(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
  template <int DEPTH>
  static Ints add_products(Ints sums, Words codes, const int8_t* row) {
    const Words ones = _mm256_set1_epi16(1), numbers = repeat(row);
    if constexpr (DEPTH < 8) return add(sums, _mm256_madd_epi16(_mm256_maddubs_epi16(codes, numbers), ones));
    const Words low = _mm256_maddubs_epi16(mask<0x0F>(codes), numbers);
    const Words high = _mm256_maddubs_epi16(mask<0x0F>(shift_right<4>(codes)), numbers);
    sums = add(sums, _mm256_madd_epi16(low, ones));
    return add(sums, _mm256_madd_epi16(high, _mm256_set1_epi16(16)));
  }
  template <int DEPTH>
  static Ints add_products(Ints sums, Words codes, const int16_t* row) {
    const Words bytes = _mm256_set1_epi32(0x00FF00FF);
    const Words even = _mm256_and_si256(codes, bytes), odd = _mm256_and_si256(_mm256_srli_epi32(codes, 8), bytes);
    sums = add(sums, _mm256_madd_epi16(even, repeat(row)));
    return add(sums, _mm256_madd_epi16(odd, repeat(row + 2)));
  }
  static Floats floats(Ints v) { return _mm256_cvtepi32_ps(v); }

  template <int INDEX>
  static Floats floats_of(Words v) {
    return floats(_mm256_and_si256(_mm256_srli_epi32(v, 8 * INDEX), _mm256_set1_epi32(0xFF)));
  }
  static Floats floats(const uint8_t* from) {
    return floats(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from)));
  }

  static void store_rows(const Words (&columns)[4], uint8_t* to, int64_t stride) {
    const Words ab = _mm256_unpacklo_epi32(columns[0], columns[1]), AB = _mm256_unpackhi_epi32(columns[0], columns[1]);
    const Words cd = _mm256_unpacklo_epi32(columns[2], columns[3]), CD = _mm256_unpackhi_epi32(columns[2], columns[3]);
    const Words rows[4] = {_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd), _mm256_unpacklo_epi64(AB, CD),
                           _mm256_unpackhi_epi64(AB, CD)};
    for (int i = 0; i < 4; i++) {
      _mm_storeu_si128((__m128i*)(to + i * stride), _mm256_castsi256_si128(rows[i]));
      _mm_storeu_si128((__m128i*)(to + (4 + i) * stride), _mm256_extracti128_si256(rows[i], 1));
    }
  }

  static Floats even_numbers(Halfwords v) { return _mm256_castsi256_ps(_mm256_slli_epi32(v, 16)); }
  static Floats odd_numbers(Halfwords v) {
    return _mm256_castsi256_ps(_mm256_and_si256(v, _mm256_set1_epi32(0xFFFF0000)));
  }

  static Floats zero() { return _mm256_setzero_ps(); }
  static Floats fill(float value) { return _mm256_set1_ps(value); }
  static Floats load(const float* from) { return _mm256_loadu_ps(from); }
  static void store(float* to, Floats v) { _mm256_storeu_ps(to, v); }
  static Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
  static Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
  static Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }

  static void store_sums(float* to, Floats a, Floats b, Floats c, Floats d) {
    __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
    __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
    __m256 abcd = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xEE));
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1)));
  }

  static Floats load_float16(const uint16_t* from) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from)); }
  static Floats load_middle_bytes(const uint8_t* from) {
    const __m128i halves = _mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i*)from));
    return _mm256_cvtph_ps(_mm_slli_epi16(halves, BYTE_IN_FLOAT16));
  }
};

using Vector = Avx2;

}  // namespace dynaexq
