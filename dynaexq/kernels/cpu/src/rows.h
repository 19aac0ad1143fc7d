// Activation rows as products with codes want them: whole numbers with a scale for each group, or floats as they are.
//
// A group of a row is `scale` times its numbers. Int8 takes a quarter of the instructions of float32 and half of those
// of int16; int16 loses nothing that counts of a row of 16-bit floats.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>

#include "codes.h"

namespace dynaexq {

inline float number(const void* from, int64_t index, Dtype dtype) {
  if (dtype == FLOAT32) return ((const float*)from)[index];
  uint16_t bits = ((const uint16_t*)from)[index];
  return dtype == BFLOAT16 ? from_bfloat16(bits) : from_float16(bits);
}

// `count` numbers from `index` on, as floats.
inline void read_numbers(const void* from, int64_t index, int64_t count, Dtype dtype, float* to) {
  const auto* halves = (const uint16_t*)from + index;
  switch (dtype) {
    case FLOAT32: std::copy_n((const float*)from + index, count, to); break;
    case BFLOAT16:
      for (int64_t i = 0; i < count; i++) to[i] = from_bfloat16(halves[i]);
      break;
    case FLOAT16:
      for (int64_t i = 0; i < count; i++) to[i] = from_float16(halves[i]);
      break;
  }
}

// What a row is made of, and its product with the four codes of a word.
struct Int8 {
  using Number = int8_t;
  using Sums = V::Ints;
  static constexpr float LARGEST = 127;
  static constexpr int PLACES[4] = {0, 1, 2, 3};
  static Sums zero() { return V::no_ints(); }
  static V::Floats floats(Sums sums) { return V::floats(sums); }

  // What is taken away from every code of so many bits.
  static constexpr float middle(int) { return 0; }

  template <int DEPTH>
  static Sums dot(Sums sums, V::Words codes, const Number* row) {
    return V::add_products<DEPTH>(sums, codes, row);
  }
};

struct Int16 : Int8 {
  using Number = int16_t;
  static constexpr float LARGEST = 32767;
  static constexpr int PLACES[4] = {0, 2, 1, 3};  // what pairs of bytes fall apart into

  template <int DEPTH>
  static Sums dot(Sums sums, V::Words codes, const Number* row) {
    return V::add_products<DEPTH>(sums, codes, row);
  }
};

struct Plain {
  using Number = float;
  using Sums = V::Floats;
  static Sums zero() { return V::zero(); }
  static V::Floats floats(Sums sums) { return sums; }

  // Codes are moved to the middle of their range, so that sums stay small and keep their last bits.
  static constexpr float middle(int depth) { return float(1 << (depth - 1)); }

  template <int DEPTH>
  static Sums dot(Sums sums, V::Words codes, const Number* row) {
    const auto center = V::fill(-middle(DEPTH));
    auto add = [&](V::Floats code, float number) {
      sums = V::multiply_add(V::add(code, center), V::fill(number), sums);
    };
    add(V::floats_of<0>(codes), row[0]), add(V::floats_of<1>(codes), row[1]);
    add(V::floats_of<2>(codes), row[2]), add(V::floats_of<3>(codes), row[3]);
    return sums;
  }
};

// One row; group g of it adds up to `sums[g]`.
struct Row {
  const void* numbers;  // [padded] of the `Number` of its kind
  const float *scales, *sums;
};

// Many rows of one kind, in memory of their own.
class Rows {
 public:
  // Room for `count` rows of `padded` numbers.
  void reserve(Precision precision, int64_t count, int64_t padded, int64_t group) {
    this->precision = precision, this->padded = padded, this->group = group;
    numbers.reset(new uint8_t[count * padded * size()]);
    factors.reset(new float[2 * count * groups()]);
  }

  // Row `index`, of `padded` values.
  void set(int64_t index, const float* values) {
    void* to = numbers.get() + index * padded * size();
    float *scales = factors.get() + 2 * index * groups(), *sums = scales + groups();
    for (int64_t g = 0; g < groups(); g++) {
      const float* from = values + g * group;
      switch (precision) {
        case INT8: round<Int8>(from, (int8_t*)to + g * group, scales[g], sums[g]); break;
        case INT16: round<Int16>(from, (int16_t*)to + g * group, scales[g], sums[g]); break;
        case FLOATS: keep(from, (float*)to + g * group, scales[g], sums[g]); break;
      }
    }
  }

  Row at(int64_t index) const {
    const float* scales = factors.get() + 2 * index * groups();
    return {numbers.get() + index * padded * size(), scales, scales + groups()};
  }

  explicit operator bool() const { return numbers != nullptr; }

 private:
  static constexpr int MOST_GROUP = 128;
  int64_t groups() const { return padded / group; }
  int64_t size() const { return precision == INT8 ? 1 : precision == INT16 ? 2 : 4; }

  template <typename Kind>
  void round(const float* from, typename Kind::Number* to, float& scale, float& sum) const {
    uint32_t most = 0;  // as bits, which order as numbers do; infinity and NaN are larger than all
    for (int64_t k = 0; k < group; k++) most = std::max(most, std::bit_cast<uint32_t>(from[k]) & 0x7FFFFFFF);
    const float largest = std::bit_cast<float>(most), inverse = largest > 1e-30f ? Kind::LARGEST / largest : 0;
    constexpr float ROUND = 0x1.8p23f;  // adding it leaves an integer in the lowest bits
    int32_t whole[MOST_GROUP], total = 0;
    for (int64_t k = 0; k < group; k++) {
      whole[k] = std::bit_cast<int32_t>(from[k] * inverse + ROUND) - std::bit_cast<int32_t>(ROUND);
      total += whole[k];
    }
    for (int64_t k = 0; k < group; k += 4)
      for (int i = 0; i < 4; i++) to[k + Kind::PLACES[i]] = typename Kind::Number(whole[k + i]);
    scale = largest / Kind::LARGEST, sum = scale * float(total);
  }

  void keep(const float* from, float* to, float& scale, float& sum) const {
    float lanes[16] = {};
    for (int64_t k = 0; k < group; k += 16)
      for (int i = 0; i < 16; i++) lanes[i] += from[k + i];
    std::copy_n(from, group, to);
    scale = 1, sum = 0;
    for (float lane : lanes) sum += lane;
  }

  Precision precision = FLOATS;
  int64_t padded = 0, group = 1;
  std::unique_ptr<uint8_t[]> numbers;
  std::unique_ptr<float[]> factors;
};

}  // namespace dynaexq
