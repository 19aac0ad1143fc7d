// From planes of bits to vectors of codes. The layout is that of formats/packing.py, and nothing else is known here.
#pragma once

#include "interface.h"
#include "vector.h"

namespace dynaexq {

constexpr bool has_middle(Kind kind) { return kind == TOP2_MIDDLE2 || kind == TOP2_MIDDLE2_LOW4; }
constexpr bool has_low(Kind kind) { return kind == TOP4_LOW4 || kind == TOP2_MIDDLE2_LOW4; }
constexpr int top_bits(Kind kind) { return kind == TOP4 || kind == TOP4_LOW4 ? 4 : 2; }
constexpr int depth(Kind kind) { return has_low(kind) ? 8 : has_middle(kind) ? 4 : top_bits(kind); }

// One row of a matrix, or one block of it, in each of its planes.
struct Planes {
  const uint16_t *top, *middle, *low;

  // `codes` codes further along the planes.
  Planes at(Kind kind, int64_t codes) const {
    return {top + codes * top_bits(kind) / 16, has_middle(kind) ? middle + codes / 8 : nullptr,
            has_low(kind) ? low + codes / 4 : nullptr};
  }
};

// Field CHUNK of a block of BLOCK codes: HALFWORDS neighbors, each in the low bits of its half-word, not yet masked.
template <int BITS, int BLOCK, int CHUNK>
inline Vector::Halfwords field(const uint16_t* block) {
  constexpr int run = BLOCK * BITS / 16, first = CHUNK * Vector::HALFWORDS;
  if constexpr (run >= Vector::HALFWORDS)
    return Vector::shift_right<first / run * BITS>(Vector::load(block + first % run));
  else return Vector::shift_runs<run, first / run * BITS, BITS>(Vector::repeat<run>(block));
}

// The upper four bits of the codes, or the code itself where it has no more, over the bits of `magic`.
template <Kind KIND, int BLOCK, int CHUNK>
inline Vector::Halfwords high_digit(Planes block, uint16_t magic) {
  auto top = field<top_bits(KIND), BLOCK, CHUNK>(block.top);
  auto mask = Vector::fill(uint16_t((1 << top_bits(KIND)) - 1)), rest = Vector::fill(magic);
  if constexpr (!has_middle(KIND)) return Vector::merge(top, mask, rest);
  rest = Vector::merge(Vector::shift_left<2>(top), Vector::fill(uint16_t(0xC)), rest);
  return Vector::merge(field<2, BLOCK, CHUNK>(block.middle), mask, rest);
}

template <Kind KIND, int BLOCK, int CHUNK>
inline Vector::Halfwords low_digit(Planes block, uint16_t magic) {
  return Vector::merge(field<4, BLOCK, CHUNK>(block.low), Vector::fill(uint16_t(0xF)), Vector::fill(magic));
}

// The whole codes as plain numbers.
template <Kind KIND, int BLOCK, int CHUNK>
inline Vector::Halfwords code(Planes block) {
  auto high = high_digit<KIND, BLOCK, CHUNK>(block, 0);
  if constexpr (!has_low(KIND)) return high;
  auto low = low_digit<KIND, BLOCK, CHUNK>(block, 0);
  return Vector::merge(Vector::shift_left<4>(high), Vector::fill(uint16_t(0xF0)), low);
}

}  // namespace dynaexq
