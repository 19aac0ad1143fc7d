// From planes of bits to bytes that hold codes. The layout is that of `InStrips` in quantization/arrangement.py, and
// nothing else is known here.
#pragma once

#include "interface.h"
#include "vector.h"

namespace dynaexq {

using V = Vector;

constexpr int STRIP = 16;  // rows whose codes lie together
constexpr int UNIT = 16;   // columns that are put together at a time

// Codes that have been put together already, a byte each. Python hands over no such matrix.
constexpr Kind BYTES = Kind(-1);

constexpr bool has_middle(Kind kind) { return kind == TOP2_MIDDLE2 || kind == TOP2_MIDDLE2_LOW4; }
constexpr bool has_low(Kind kind) { return kind == TOP4_LOW4 || kind == TOP2_MIDDLE2_LOW4; }
constexpr int top_bits(Kind kind) { return kind == BYTES ? 8 : kind == TOP4 || kind == TOP4_LOW4 ? 4 : 2; }
constexpr int depth(Kind kind) { return has_low(kind) ? 8 : has_middle(kind) ? 4 : top_bits(kind); }

constexpr bool is_deep(Kind kind) { return has_low(kind); }

// A strip of a matrix, or a whole matrix, in each of its planes.
struct Planes {
  const uint32_t *top, *middle, *low;

  // `codes` codes further along the planes.
  Planes at(Kind kind, int64_t codes) const {
    return {top + codes * top_bits(kind) / 32, has_middle(kind) ? middle + codes / 16 : nullptr,
            has_low(kind) ? low + codes / 8 : nullptr};
  }
};

// UNIT columns of the rows of a vector: four columns to each of its words, a byte a code.
using Codes = V::Words[4];

// Two planes of two bits as nibbles: columns 0 to 3 and 8 to 11, then the others.
inline void join_pairs(V::Words top, V::Words middle, V::Words (&nibbles)[2]) {
  nibbles[0] = V::merge<0xCC>(V::shift_left<2>(top), middle);
  nibbles[1] = V::merge<0xCC>(top, V::shift_right<2>(middle));
}

// The codes of one unit, from the word `word` of it on, of the rows of a strip.
template <Kind KIND>
inline void load_codes(Planes strip, int64_t unit, int word, Codes& codes) {
  auto plane = [&](const uint32_t* from, int bits, int part) {
    return V::load(from + (unit * bits / 2 + part) * STRIP + word);
  };
  if constexpr (KIND == BYTES) {
    for (int i = 0; i < 4; i++) codes[i] = plane(strip.top, 8, i);
  } else if constexpr (KIND == TOP2) {
    const auto top = plane(strip.top, 2, 0);
    codes[0] = V::mask<0x03>(top), codes[1] = V::mask<0x03>(V::shift_right<2>(top));
    codes[2] = V::mask<0x03>(V::shift_right<4>(top)), codes[3] = V::mask<0x03>(V::shift_right<6>(top));
  } else {
    V::Words nibbles[2];
    if constexpr (has_middle(KIND)) join_pairs(plane(strip.top, 2, 0), plane(strip.middle, 2, 0), nibbles);
    else nibbles[0] = plane(strip.top, 4, 0), nibbles[1] = plane(strip.top, 4, 1);
    for (int i = 0; i < 4; i++) {
      const auto pair = nibbles[has_middle(KIND) ? i % 2 : i / 2];
      const bool upper = has_middle(KIND) ? i / 2 : i % 2;
      if constexpr (!has_low(KIND)) {
        codes[i] = V::mask<0x0F>(upper ? V::shift_right<4>(pair) : pair);
      } else {
        const auto low = plane(strip.low, 4, i / 2);
        codes[i] = V::merge<0xF0>(upper ? pair : V::shift_left<4>(pair), i % 2 ? V::shift_right<4>(low) : low);
      }
    }
  }
}

}  // namespace dynaexq
