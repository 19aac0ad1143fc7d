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

// The words of one unit in a plane of two bits or four, from the word `word` on.
template <int BITS>
struct Unit {
  V::Words words[BITS / 2];

  Unit(const uint32_t* plane, int64_t unit, int word) {
    for (int i = 0; V::Words& part : words) part = V::load(plane + (unit * BITS / 2 + i++) * STRIP + word);
  }

  // The codes of columns 4 * INDEX and on, their lowest bits at bit TO of a byte; all other bits may be anything.
  template <int INDEX, int TO>
  V::Words at() const {
    constexpr int A_BYTE = 8 / BITS, SHIFT = INDEX % A_BYTE * BITS - TO;
    const V::Words part = words[INDEX / A_BYTE];
    if constexpr (SHIFT > 0) return V::shift_right<SHIFT>(part);
    else if constexpr (SHIFT < 0) return V::shift_left<-SHIFT>(part);
    else return part;
  }
};

// Codes of a unit that were put together two by two, in the halves of a byte: columns 0 to 3 with 8 to 11 above them,
// then the others.
struct Nibbles {
  V::Words words[2];

  // As in `Unit`.
  template <int INDEX, int TO>
  V::Words at() const {
    constexpr bool UPPER = INDEX / 2;
    if constexpr (UPPER == (TO == 4)) return words[INDEX % 2];
    else if constexpr (UPPER) return V::shift_right<4>(words[INDEX % 2]);
    else return V::shift_left<4>(words[INDEX % 2]);
  }
};

// Two bits above two others.
inline Nibbles join(V::Words top, V::Words middle, V::Words next_middle) {
  return {V::merge<0xCC>(V::shift_left<2>(top), middle), V::merge<0xCC>(top, next_middle)};
}

// The words of one unit in a plane of one bit, of which two units share a word: columns 0 to 3 and 8 to 11 at bits 0
// and 4, the others one bit above them.
template <bool ODD>
inline V::Words load_bits(const uint32_t* plane, int64_t unit, int word) {
  const V::Words both = V::load(plane + unit / 2 * STRIP + word);
  if constexpr (ODD) return V::shift_right<2>(both);
  else return both;
}

// Two bits above one, or above one and one more.
inline Nibbles join_bit(V::Words top, V::Words third) {
  return {V::merge<0x66>(V::shift_left<1>(top), third),
          V::merge<0x66>(V::shift_right<1>(top), V::shift_right<1>(third))};
}
inline Nibbles join_bits(V::Words top, V::Words third, V::Words fourth) {
  return join(top, V::merge<0x22>(V::shift_left<1>(third), fourth), V::merge<0x22>(third, V::shift_right<1>(fourth)));
}

// All bits of a code but for those of a plane of two or four below them.
template <Kind KIND, bool ODD>
inline auto load_upper(Planes strip, int64_t unit, int word) {
  constexpr Widths BITS = widths(KIND);
  const Unit<BITS.top> top(strip.top, unit, word);
  if constexpr (BITS.middle == 0) {
    return top;
  } else if constexpr (BITS.middle == 2) {
    const V::Words middle = Unit<2>(strip.middle, unit, word).words[0];
    return join(top.words[0], middle, V::shift_right<2>(middle));
  } else {
    const V::Words third = load_bits<ODD>(strip.middle, unit, word);
    if constexpr (BITS.low == 0) return join_bit(top.words[0], third);
    else return join_bits(top.words[0], third, load_bits<ODD>(strip.low, unit, word));
  }
}

// The codes of one unit, whose number is ODD or not, from the word `word` of it on, of the rows of a strip.
template <Kind KIND, bool ODD>
inline void load_codes(Planes strip, int64_t unit, int word, Codes& codes) {
  constexpr Widths BITS = widths(KIND);
  constexpr int BELOW = BITS.low > 1 ? BITS.low : 0;
  constexpr uint8_t ALL = (1 << depth(KIND)) - 1, UPPER = ALL - ((1 << BELOW) - 1);
  [&]<int... INDEX>(std::integer_sequence<int, INDEX...>) {
    if constexpr (KIND == BYTES) {
      ((codes[INDEX] = V::load(strip.top + (unit * 4 + INDEX) * STRIP + word)), ...);
    } else {
      const auto upper = load_upper<KIND, ODD>(strip, unit, word);
      ((codes[INDEX] = upper.template at<INDEX, BELOW>()), ...);
      if constexpr (BELOW > 0) {
        const Unit<BELOW> low(strip.low, unit, word);
        ((codes[INDEX] = V::merge<UPPER>(codes[INDEX], low.template at<INDEX, 0>())), ...);
      }
      if constexpr (ALL < 0xFF) ((codes[INDEX] = V::mask<ALL>(codes[INDEX])), ...);
    }
  }(std::make_integer_sequence<int, 4>());
}
template <Kind KIND>
inline void load_codes(Planes strip, int64_t unit, int word, Codes& codes) {
  if (unit % 2) load_codes<KIND, true>(strip, unit, word, codes);
  else load_codes<KIND, false>(strip, unit, word, codes);
}

}  // namespace dynaexq
