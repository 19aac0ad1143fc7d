// Planes from row by row, as files have them, to strips and back, in place. The layouts are those of
// quantization/bitplanes.py and quantization/arrangement.py.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "interface.h"

namespace dynaexq {

// Codes of a block that lies in half-words, a byte each; and back.
template <int BITS>
void spread(const uint16_t* halves, int64_t block, uint8_t* codes) {
  const int64_t run = block * BITS / 16;
  for (int field = 0; field < 16 / BITS; field++)
    for (int64_t i = 0; i < run; i++) codes[field * run + i] = halves[i] >> (field * BITS) & ((1 << BITS) - 1);
}
template <int BITS>
void gather(const uint8_t* codes, int64_t block, uint16_t* halves) {
  const int64_t run = block * BITS / 16;
  for (int64_t i = 0; i < run; i++) {
    uint16_t half = 0;
    for (int field = 0; field < 16 / BITS; field++) half |= uint16_t(codes[field * run + i]) << (field * BITS);
    halves[i] = half;
  }
}

// Where a byte of a strip has a field. Of one bit, 2 and 3 have changed places with 4 and 5, so that those of one unit
// meet their codes' other bits (`codes.h`).
template <int BITS>
constexpr int place(int field) {
  return BITS > 1 ? field * BITS : (field & 4) >> 1 | (field & 2) << 1 | (field & 1);
}

// Codes of one row of a strip of `height` rows, from and to the words that it has there.
template <int BITS>
void from_strip(const uint32_t* words, int64_t count, int64_t height, uint8_t* codes) {
  for (int64_t i = 0; i < count; i++)
    for (int field = 0; field < 8 / BITS; field++) {
      const uint32_t four = words[i * height] >> place<BITS>(field) & 0x01010101u * ((1 << BITS) - 1);
      std::memcpy(codes + (i * (8 / BITS) + field) * 4, &four, 4);
    }
}
template <int BITS>
void to_strip(const uint8_t* codes, int64_t count, int64_t height, uint32_t* words) {
  for (int64_t i = 0; i < count; i++) {
    uint32_t word = 0;
    for (int field = 0; field < 8 / BITS; field++) {
      uint32_t four;
      std::memcpy(&four, codes + (i * (8 / BITS) + field) * 4, 4);
      word |= four << place<BITS>(field);
    }
    words[i * height] = word;
  }
}

template <int BITS>
void rearrange(const Plane& plane) {
  constexpr int64_t STRIP_ROWS = 16;
  const int64_t width = plane.padded * BITS / 32, block_words = plane.block * BITS / 32;
  std::vector<uint8_t> codes(STRIP_ROWS * plane.padded);
  for (int64_t first = 0; first < plane.rows; first += STRIP_ROWS) {
    auto* words = (uint32_t*)plane.words + first * width;
    const int64_t height = std::min(STRIP_ROWS, plane.rows - first), blocks = plane.padded / plane.block;
    for (int64_t row = 0; row < height; row++) {
      uint8_t* to = codes.data() + row * plane.padded;
      if (!plane.to_strips) from_strip<BITS>(words + row, width, height, to);
      for (int64_t b = 0; plane.to_strips && b < blocks; b++)
        spread<BITS>((uint16_t*)(words + row * width + b * block_words), plane.block, to + b * plane.block);
    }
    for (int64_t row = 0; row < height; row++) {
      const uint8_t* from = codes.data() + row * plane.padded;
      if (plane.to_strips) to_strip<BITS>(from, width, height, words + row);
      for (int64_t b = 0; !plane.to_strips && b < blocks; b++)
        gather<BITS>(from + b * plane.block, plane.block, (uint16_t*)(words + row * width + b * block_words));
    }
  }
}

inline void rearrange(const Plane& plane) {
  switch (plane.bits) {
    case 1: return rearrange<1>(plane);
    case 2: return rearrange<2>(plane);
    case 4: return rearrange<4>(plane);
  }
}

}  // namespace dynaexq
