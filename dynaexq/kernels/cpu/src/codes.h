// From planes of bits to bytes that hold codes. The layout is that of `InStrips` in quantization/arrangement.py, and
// nothing else is known here.
#pragma once

#include <utility>

#include "interface.h"
#include "vector.h"

namespace dynaexq {

using V = Vector;

constexpr int STRIP = 16;  // rows whose codes lie together
constexpr int UNIT = 16;   // columns that are put together at a time

// Codes that have been put together already, a byte each. Python hands over no such matrix.
constexpr Kind BYTES = Kind(-1);

// Bits that each plane of a kind has of a code, the topmost first; 0 where there is no such plane.
struct Widths {
  int top, middle, low;
};
constexpr Widths widths(Kind kind) {
  switch (kind) {
    case TOP2: return {2, 0, 0};
    case TOP2_THIRD1: return {2, 1, 0};
    case TOP2_THIRD1_FOURTH1: return {2, 1, 1};
    case TOP2_MIDDLE2: return {2, 2, 0};
    case TOP2_MIDDLE2_LOW4: return {2, 2, 4};
    case TOP4: return {4, 0, 0};
    case TOP4_FIFTH2: return {4, 0, 2};
    case TOP4_LOW4: return {4, 0, 4};
    case BYTES: return {8, 0, 0};
    default: return {0, 0, 0};
  }
}
constexpr int depth(Kind kind) { return widths(kind).top + widths(kind).middle + widths(kind).low; }

constexpr bool is_deep(Kind kind) { return depth(kind) > 4; }

// Calls `work.operator()<KIND>()`, if `kind` is one of codes that come in planes.
template <typename Work>
void for_kind(Kind kind, const Work& work) {
  switch (kind) {
    case TOP2: return work.template operator()<TOP2>();
    case TOP2_THIRD1: return work.template operator()<TOP2_THIRD1>();
    case TOP2_THIRD1_FOURTH1: return work.template operator()<TOP2_THIRD1_FOURTH1>();
    case TOP2_MIDDLE2: return work.template operator()<TOP2_MIDDLE2>();
    case TOP2_MIDDLE2_LOW4: return work.template operator()<TOP2_MIDDLE2_LOW4>();
    case TOP4: return work.template operator()<TOP4>();
    case TOP4_FIFTH2: return work.template operator()<TOP4_FIFTH2>();
    case TOP4_LOW4: return work.template operator()<TOP4_LOW4>();
    default: return;
  }
}

// A strip of a matrix, or a whole matrix, in each of its planes.
struct Planes {
  const uint32_t *top, *middle, *low;

  // `codes` codes further along the planes.
  Planes at(Widths bits, int64_t codes) const {
    return {top + codes * bits.top / 32, middle + codes * bits.middle / 32, low + codes * bits.low / 32};
  }
};

// UNIT columns of the rows of a vector: four columns to each of its words, a byte a code.
using Codes = V::Words[4];

// The words of one unit in a plane of BITS bits, from the word `word` on. Two units share a word of one bit.
template <int BITS>
struct Unit {
  static constexpr int A_BYTE = 8 / BITS;
  V::Words words[BITS > 2 ? BITS / 2 : 1];

  Unit(const uint32_t* plane, int64_t unit, int word) {
    for (int i = 0; V::Words& part : words) part = V::load(plane + (unit * BITS / 2 + i++) * STRIP + word);
    if (BITS == 1 && unit % 2) words[0] = V::shift_right<4>(words[0]);
  }

  // The codes of columns 4 * INDEX and on, their lowest bits at bit TO of a byte; all other bits may be anything.
  template <int INDEX, int TO>
  V::Words at() const {
    constexpr int SHIFT = INDEX % A_BYTE * BITS - TO;
    const V::Words part = words[INDEX / A_BYTE];
    if constexpr (SHIFT > 0) return V::shift_right<SHIFT>(part);
    else if constexpr (SHIFT < 0) return V::shift_left<-SHIFT>(part);
    else return part;
  }
};

// The four bits of two planes of two: columns 0 to 3 with 8 to 11 above them, then the others.
struct Nibbles {
  V::Words words[2];

  Nibbles(V::Words top, V::Words middle)
      : words{V::merge<0xCC>(V::shift_left<2>(top), middle), V::merge<0xCC>(top, V::shift_right<2>(middle))} {}

  template <int INDEX, int TO>
  V::Words at() const {
    constexpr bool UPPER = INDEX / 2;
    if constexpr (UPPER == (TO == 4)) return words[INDEX % 2];
    else if constexpr (UPPER) return V::shift_right<4>(words[INDEX % 2]);
    else return V::shift_left<4>(words[INDEX % 2]);
  }
};

constexpr uint8_t topmost(int bits, int depth) { return (1 << depth) - (1 << (depth - bits)); }

// The codes of one unit, from the word `word` of it on, of the rows of a strip.
template <Kind KIND>
inline void load_codes(Planes strip, int64_t unit, int word, Codes& codes) {
  constexpr Widths BITS = widths(KIND);
  constexpr int DEPTH = depth(KIND), UPPER = BITS.top + BITS.middle;
  const auto upper = [&] {
    const Unit<BITS.top> top(strip.top, unit, word);
    if constexpr (BITS.middle == 2) return Nibbles(top.words[0], Unit<2>(strip.middle, unit, word).words[0]);
    else return top;
  }();
  [&]<int... INDEX>(std::integer_sequence<int, INDEX...>) {
    ((codes[INDEX] = upper.template at<INDEX, DEPTH - (BITS.middle == 2 ? UPPER : BITS.top)>()), ...);
    if constexpr (BITS.middle == 1) {
      const Unit<1> middle(strip.middle, unit, word);
      constexpr uint8_t ABOVE = topmost(BITS.top, DEPTH);
      ((codes[INDEX] = V::merge<ABOVE>(codes[INDEX], middle.template at<INDEX, DEPTH - UPPER>())), ...);
    }
    if constexpr (BITS.low > 0) {
      const Unit<BITS.low> low(strip.low, unit, word);
      constexpr uint8_t ABOVE = topmost(UPPER, DEPTH);
      ((codes[INDEX] = V::merge<ABOVE>(codes[INDEX], low.template at<INDEX, 0>())), ...);
    }
    if constexpr (DEPTH < 8) ((codes[INDEX] = V::mask<topmost(DEPTH, DEPTH)>(codes[INDEX])), ...);
  }(std::make_integer_sequence<int, 4>());
}

}  // namespace dynaexq
