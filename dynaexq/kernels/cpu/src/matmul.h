// A few rows of one matrix of one expert, times the activation rows that were routed to it.
//
// Few rows: codes are multiplied as they are unpacked, group by group, and scaled afterwards, so that a weight costs
// about one instruction (`multiply_codes`); by 16-bit integers where the machine has no products of bfloat16 and the
// rows came in 16 bit (`multiply_ints`). Many rows: weights are decoded once to a small panel that stays in cache
// and multiplied from there (`multiply_panel`), as are matrices that were never coded.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <utility>

#include "codes.h"

namespace dynaexq {

using A = Arithmetic;
using Element = A::Element;

constexpr int TILE = 64;      // rows of a matrix in one task
constexpr int PANEL = 16;     // of which so many are decoded at a time
constexpr int FEW_ROWS = 8;   // activation rows up to which decoding once does not pay
constexpr int ROW_BLOCK = 4;  // activation rows that share a decoded weight
constexpr int AHEAD = 16;     // rows of a matrix to fetch ahead, into the second cache: the first has too few misses
                              // in flight to keep up with the memory

// One matrix of one expert, found in the expert's bytes.
struct MatrixView {
  const Matrix* layout;
  Kind kind;
  Planes planes;         // row 0
  const void* dense;     // [rows, columns], or [columns, rows] where transposed
  const uint16_t* meta;  // float16 [num_groups, rows, 2]: scale, minimum
  const void* bias;      // [rows], or null
  Dtype dtype;
  bool transposed;
};

// An activation row as 16-bit integers, in the order of columns: each group is `scales[group]` times its values, which
// add up to `sums[group]`. Rows of bfloat16 or float16 lose nothing that counts.
struct IntRow {
  const int16_t* values;  // [padded]
  const float *scales, *sums;
};

// The activation rows of one expert; as integers, too, where `ints` is not null.
struct Rows {
  const Element* const* elements;
  const IntRow* ints;
};

// Room for one task of one thread.
struct Scratch {
  Element* panel;         // [PANEL, padded]
  float *step, *offset;   // [num_groups, TILE]
  float* sums;            // [ROW_BLOCK, num_groups]
  float *first, *second;  // [rows, TILE]: results
};

// Many rows as integers, in memory of their own.
class IntRows {
 public:
  // Room for `count` rows of `padded` values.
  void reserve(int64_t count, int64_t padded, int64_t group) {
    this->padded = padded, this->group = group;
    values.reset(new int16_t[count * padded]);
    factors.reset(new float[2 * count * groups()]);
  }

  // Row `index`, of which `value(column)` gives the numbers.
  template <typename Value>
  void set(int64_t index, const Value& value) {
    int16_t* to = values.get() + index * padded;
    float* scales = factors.get() + 2 * index * groups();
    for (int64_t g = 0; g < groups(); g++) {
      float numbers[MOST_GROUP], largest = 0;
      for (int64_t k = 0; k < group; k++) {
        numbers[k] = value(g * group + k);
        largest = std::max(largest, std::abs(numbers[k]));
      }
      const float scale = largest / 32767, inverse = largest > 0 ? 32767 / largest : 0;
      int32_t sum = 0;
      for (int64_t k = 0; k < group; k++) sum += to[g * group + k] = int16_t(std::lrint(numbers[k] * inverse));
      scales[g] = scale, scales[groups() + g] = scale * float(sum);
    }
  }

  IntRow at(int64_t index) const {
    const float* scales = factors.get() + 2 * index * groups();
    return {values.get() + index * padded, scales, scales + groups()};
  }

  explicit operator bool() const { return values != nullptr; }

 private:
  static constexpr int MOST_GROUP = 128;
  int64_t groups() const { return padded / group; }

  int64_t padded = 0, group = 1;
  std::unique_ptr<int16_t[]> values;
  std::unique_ptr<float[]> factors;
};

inline float number(const void* from, int64_t index, Dtype dtype) {
  if (dtype == FLOAT32) return ((const float*)from)[index];
  uint16_t bits = ((const uint16_t*)from)[index];
  return dtype == BFLOAT16 ? from_bfloat16(bits) : _cvtsh_ss(bits);
}

// weight = step * code + offset, for `rows` rows from `first` on.
inline void read_affine(const MatrixView& matrix, int64_t first, int64_t rows, Scratch& scratch) {
  const Matrix& layout = *matrix.layout;
  const int bits = depth(matrix.kind);
  const float unit = std::ldexp(1.0f, 4 - bits), center = (std::ldexp(1.0f, 8 - bits) - 1) / 32;
  for (int64_t group = 0; group < layout.padded / layout.group; group++) {
    const uint16_t* pairs = matrix.meta + (group * layout.rows + first) * 2;
    float *step = scratch.step + group * TILE, *offset = scratch.offset + group * TILE;
    int64_t row = 0;
    for (; row + A::FLOATS <= rows; row += A::FLOATS) {
      A::Floats scale, minimum;
      A::load_pairs(pairs + 2 * row, scale, minimum);
      A::store(step + row, A::multiply_add(scale, A::fill(unit), A::zero()));
      A::store(offset + row, A::multiply_add(scale, A::fill(center), minimum));
    }
    for (; row < rows; row++) {
      float scale = _cvtsh_ss(pairs[2 * row]);
      step[row] = scale * unit;
      offset[row] = std::fma(scale, center, _cvtsh_ss(pairs[2 * row + 1]));
    }
  }
}

// Sum of each group of a row, in float32.
inline void sum_groups(const Element* row, int64_t padded, int64_t group, float* sums) {
  for (int64_t first = 0; first < padded; first += group) {
    float lanes[A::FLOATS] = {};
    for (int64_t k = first; k < first + group; k += A::FLOATS)
      for (int i = 0; i < A::FLOATS; i++) lanes[i] += A::value(row[k + i]);
    float sum = 0;
    for (float lane : lanes) sum += lane;
    *sums++ = sum;
  }
}

// What does not depend on single codes: offsets, and the excess that the arithmetic added to them.
template <int ROWS>
inline void start_codes(const Matrix& layout, float excess, const Element* const* rows, const Scratch& scratch,
                        float* out) {
  const int64_t groups = layout.padded / layout.group;
  for (int m = 0; m < ROWS; m++) {
    sum_groups(rows[m], layout.padded, layout.group, scratch.sums);
    float* to = out + m * TILE;
    for (int n = 0; n < TILE; n++) to[n] = 0;
    for (int64_t g = 0; g < groups; g++)
      for (int n = 0; n < TILE; n++)
        to[n] += scratch.sums[g] * (scratch.offset[g * TILE + n] - excess * scratch.step[g * TILE + n]);
  }
}

// Bring NBYTES into the second cache.
template <int NBYTES>
inline void fetch(const void* from) {
  for (int line = 0; line < NBYTES; line += 64) _mm_prefetch((const char*)from + line, _MM_HINT_T1);
}

template <int WEIGHTS, int ROWS>
inline void add_sums(const A::Floats (&sums)[ROWS][WEIGHTS], float* out) {
  if constexpr (WEIGHTS == 4) {
    for (int m = 0; m < ROWS; m++) {
      const auto& s = sums[m];
      float* to = out + m * TILE;
      _mm_storeu_ps(to, _mm_add_ps(_mm_loadu_ps(to), A::sums(s[0], s[1], s[2], s[3])));
    }
  } else {
    for (int m = 0; m < ROWS; m += 2) {
      float four[4];
      _mm_storeu_ps(four, A::sums(sums[m][0], sums[m][1], sums[m + 1][0], sums[m + 1][1]));
      for (int i = 0; i < 4; i++) out[(m + i / 2) * TILE + i % 2] += four[i];
    }
  }
}

// WEIGHTS rows of codes times ROWS activation rows, added to `out [ROWS, TILE]`.
template <Kind KIND, int BLOCK, int WEIGHTS, int ROWS>
inline void multiply_codes_block(const Matrix& layout, const Planes (&weights)[WEIGHTS], int64_t ahead,
                                 const Element* const* rows, const float* step, float* out) {
  A::Floats sums[ROWS][WEIGHTS], part[ROWS][WEIGHTS];
  for (int m = 0; m < ROWS; m++)
    for (int n = 0; n < WEIGHTS; n++) sums[m][n] = part[m][n] = A::zero();
  const int64_t chunks_a_group = layout.group / A::HALFWORDS;
  const uint16_t high_magic = has_low(KIND) ? A::HIGH_MAGIC : A::LOW_MAGIC;

  for (int64_t k = 0; k < layout.padded; k += BLOCK) {
    Planes block[WEIGHTS];
    for (int n = 0; n < WEIGHTS; n++) {
      block[n] = weights[n].at(KIND, k);
      Planes next = block[n].at(KIND, ahead);
      fetch<BLOCK * top_bits(KIND) / 8>(next.top);
      if constexpr (has_middle(KIND)) fetch<BLOCK / 4>(next.middle);
      if constexpr (has_low(KIND)) fetch<BLOCK / 2>(next.low);
    }
    auto chunk = [&]<int CHUNK>() __attribute__((always_inline)) {
      A::Operand row[ROWS];
      for (int m = 0; m < ROWS; m++) row[m] = A::operand(rows[m] + k + CHUNK * A::HALFWORDS);
      for (int n = 0; n < WEIGHTS; n++) {
        auto high = high_digit<KIND, BLOCK, CHUNK>(block[n], high_magic);
        if constexpr (has_low(KIND)) {
          auto low = low_digit<KIND, BLOCK, CHUNK>(block[n], A::LOW_MAGIC);
          for (int m = 0; m < ROWS; m++) part[m][n] = A::dot_digits(part[m][n], high, low, row[m]);
        } else {
          for (int m = 0; m < ROWS; m++) part[m][n] = A::dot_code<depth(KIND)>(part[m][n], high, row[m]);
        }
      }
      if (((CHUNK + 1) & (chunks_a_group - 1)) == 0) {
        for (int n = 0; n < WEIGHTS; n++)
          for (int m = 0; m < ROWS; m++) {
            sums[m][n] = A::multiply_add(part[m][n], A::fill(step[n]), sums[m][n]);
            part[m][n] = A::zero();
          }
        step += TILE;
      }
    };
    [&]<int... CHUNKS>(std::integer_sequence<int, CHUNKS...>) __attribute__((always_inline)) {
      (chunk.template operator()<CHUNKS>(), ...);
    }(std::make_integer_sequence<int, BLOCK / A::HALFWORDS>());
  }
  add_sums<WEIGHTS, ROWS>(sums, out);
}

// WEIGHTS rows of codes times ROWS rows of integers, added to `out [ROWS, TILE]`.
template <Kind KIND, int BLOCK, int WEIGHTS, int ROWS>
inline void multiply_ints_block(const Matrix& layout, const Planes (&weights)[WEIGHTS], int64_t ahead,
                                const IntRow* rows, const float* step, float* out) {
  using V = Vector;
  V::Floats sums[ROWS][WEIGHTS];
  V::Ints part[ROWS][WEIGHTS];
  for (int m = 0; m < ROWS; m++)
    for (int n = 0; n < WEIGHTS; n++) sums[m][n] = V::zero(), part[m][n] = V::no_ints();
  const int64_t chunks_a_group = layout.group / V::HALFWORDS;
  int64_t group = 0;

  for (int64_t k = 0; k < layout.padded; k += BLOCK) {
    Planes block[WEIGHTS];
    for (int n = 0; n < WEIGHTS; n++) {
      block[n] = weights[n].at(KIND, k);
      Planes next = block[n].at(KIND, ahead);
      fetch<BLOCK * top_bits(KIND) / 8>(next.top);
      if constexpr (has_middle(KIND)) fetch<BLOCK / 4>(next.middle);
      if constexpr (has_low(KIND)) fetch<BLOCK / 2>(next.low);
    }
    auto chunk = [&]<int CHUNK>() __attribute__((always_inline)) {
      for (int n = 0; n < WEIGHTS; n++) {
        auto codes = code<KIND, BLOCK, CHUNK>(block[n]);
        for (int m = 0; m < ROWS; m++) {
          auto row = V::load((const uint16_t*)rows[m].values + k + CHUNK * V::HALFWORDS);
          part[m][n] = V::add_products(part[m][n], codes, row);
        }
      }
      if (((CHUNK + 1) & (chunks_a_group - 1)) == 0) {
        for (int m = 0; m < ROWS; m++)
          for (int n = 0; n < WEIGHTS; n++) {
            auto factor = V::fill(step[n] * rows[m].scales[group]);
            sums[m][n] = V::multiply_add(V::floats(part[m][n]), factor, sums[m][n]);
            part[m][n] = V::no_ints();
          }
        step += TILE, group++;
      }
    };
    [&]<int... CHUNKS>(std::integer_sequence<int, CHUNKS...>) __attribute__((always_inline)) {
      (chunk.template operator()<CHUNKS>(), ...);
    }(std::make_integer_sequence<int, BLOCK / V::HALFWORDS>());
  }
  add_sums<WEIGHTS, ROWS>(sums, out);
}

// `count` rows of codes from `first` on, times ROWS rows of integers, to `out [ROWS, TILE]`.
template <Kind KIND, int BLOCK, int ROWS>
void multiply_ints(const MatrixView& matrix, int64_t first, int64_t count, const IntRow* rows, const Scratch& scratch,
                   float* out) {
  constexpr int WEIGHTS = 4;
  const Matrix& layout = *matrix.layout;
  for (int m = 0; m < ROWS; m++) {
    float* to = out + m * TILE;
    for (int n = 0; n < TILE; n++) to[n] = 0;
    for (int64_t g = 0; g < layout.padded / layout.group; g++)
      for (int n = 0; n < TILE; n++) to[n] += rows[m].sums[g] * scratch.offset[g * TILE + n];
  }
  for (int64_t n = 0; n < count; n += WEIGHTS) {
    Planes weights[WEIGHTS];
    for (int i = 0; i < WEIGHTS; i++)
      weights[i] = matrix.planes.at(KIND, (first + std::min(n + i, count - 1)) * layout.padded);
    multiply_ints_block<KIND, BLOCK, WEIGHTS, ROWS>(layout, weights, AHEAD * layout.padded, rows, scratch.step + n,
                                                    out + n);
  }
}

// `count` rows of codes from `first` on, times ROWS activation rows, to `out [ROWS, TILE]`.
template <Kind KIND, int BLOCK, int ROWS>
void multiply_codes(const MatrixView& matrix, int64_t first, int64_t count, const Element* const* rows,
                    Scratch& scratch, float* out) {
  constexpr int WEIGHTS = ROWS < ROW_BLOCK ? 4 : 2;  // as many sums as registers hold
  const Matrix& layout = *matrix.layout;
  start_codes<ROWS>(layout, A::excess(depth(KIND)), rows, scratch, out);
  for (int64_t n = 0; n < count; n += WEIGHTS) {
    Planes weights[WEIGHTS];
    for (int i = 0; i < WEIGHTS; i++)
      weights[i] = matrix.planes.at(KIND, (first + std::min(n + i, count - 1)) * layout.padded);
    multiply_codes_block<KIND, BLOCK, WEIGHTS, ROWS>(layout, weights, AHEAD * layout.padded, rows, scratch.step + n,
                                                     out + n);
  }
}

// Row `row` of a tile that begins at `first`, decoded to `to [padded]`.
template <Kind KIND, int BLOCK>
void decode_row(const MatrixView& matrix, int64_t first, int64_t row, const Scratch& scratch, Element* to) {
  const Matrix& layout = *matrix.layout;
  const Planes planes = matrix.planes.at(KIND, (first + row) * layout.padded);
  for (int64_t k = 0; k < layout.padded; k += BLOCK) {
    const Planes block = planes.at(KIND, k);
    auto chunk = [&]<int CHUNK>() __attribute__((always_inline)) {
      const int64_t column = k + CHUNK * A::HALFWORDS, group = column / layout.group * TILE + row;
      auto step = A::fill(scratch.step[group]), offset = A::fill(scratch.offset[group]);
      auto codes = code<KIND, BLOCK, CHUNK>(block);
      A::store_operand(to + column, A::multiply_add(A::even(codes), step, offset),
                       A::multiply_add(A::odd(codes), step, offset));
    };
    [&]<int... CHUNKS>(std::integer_sequence<int, CHUNKS...>) __attribute__((always_inline)) {
      (chunk.template operator()<CHUNKS>(), ...);
    }(std::make_integer_sequence<int, BLOCK / A::HALFWORDS>());
  }
}

// Row `row` of a matrix that was never coded, to `to [padded]`.
inline void copy_dense_row(const MatrixView& matrix, int64_t row, Element* to) {
  const Matrix& layout = *matrix.layout;
  for (int64_t k = 0; k < layout.columns; k++) {
    int64_t index = matrix.transposed ? k * layout.rows + row : row * layout.columns + k;
    to[A::place(k)] = A::element(number(matrix.dense, index, matrix.dtype));
  }
  for (int64_t k = layout.columns; k < layout.padded; k++) to[A::place(k)] = A::element(0);
}

// `count` rows of a panel, of elements or of bfloat16, times ROWS activation rows, to `out [ROWS, TILE]`.
template <int ROWS, typename Weight>
void multiply_panel(const Weight* panel, int64_t count, int64_t padded, const Element* const* rows, float* out) {
  for (int64_t n = 0; n < count; n += 4) {
    const Weight* weights[4];
    for (int i = 0; i < 4; i++) weights[i] = panel + std::min(n + i, count - 1) * padded;
    A::Floats sums[ROWS][4];
    for (auto& of_row : sums)
      for (auto& sum : of_row) sum = A::zero();
    for (int64_t k = 0; k < padded; k += A::HALFWORDS) {
      A::Operand weight[4];
      for (int i = 0; i < 4; i++) {
        weight[i] = A::operand(weights[i] + k);
        if (ROWS == 1) fetch<64>(weights[i] + k + AHEAD * padded);
      }
      for (int m = 0; m < ROWS; m++) {
        A::Operand row = A::operand(rows[m] + k);
        for (int i = 0; i < 4; i++) sums[m][i] = A::dot(sums[m][i], weight[i], row);
      }
    }
    for (int m = 0; m < ROWS; m++)
      _mm_storeu_ps(out + m * TILE + n, A::sums(sums[m][0], sums[m][1], sums[m][2], sums[m][3]));
  }
}

template <typename Weight>
inline void multiply_panel(const Weight* panel, int64_t count, int64_t padded, const Element* const* rows,
                           int64_t num_rows, float* out) {
  int64_t m = 0;
  for (; m + 4 <= num_rows; m += 4) multiply_panel<4>(panel, count, padded, rows + m, out + m * TILE);
  for (; m + 2 <= num_rows; m += 2) multiply_panel<2>(panel, count, padded, rows + m, out + m * TILE);
  for (; m < num_rows; m++) multiply_panel<1>(panel, count, padded, rows + m, out + m * TILE);
}

template <Kind KIND, int BLOCK>
void multiply_coded_tile(const MatrixView& matrix, int64_t first, int64_t count, const Rows& all, int64_t num_rows,
                         Scratch& scratch, float* out) {
  read_affine(matrix, first, count, scratch);
  const Element* const* rows = all.elements;
  if (num_rows <= FEW_ROWS && all.ints) {
    int64_t m = 0;  // four at once need more registers than AVX2 has, and are no faster
    for (; m + 2 <= num_rows; m += 2)
      multiply_ints<KIND, BLOCK, 2>(matrix, first, count, all.ints + m, scratch, out + m * TILE);
    for (; m < num_rows; m++)
      multiply_ints<KIND, BLOCK, 1>(matrix, first, count, all.ints + m, scratch, out + m * TILE);
    return;
  }
  if (num_rows <= FEW_ROWS) {
    int64_t m = 0;
    for (; m + 4 <= num_rows; m += 4)
      multiply_codes<KIND, BLOCK, 4>(matrix, first, count, rows + m, scratch, out + m * TILE);
    for (; m + 2 <= num_rows; m += 2)
      multiply_codes<KIND, BLOCK, 2>(matrix, first, count, rows + m, scratch, out + m * TILE);
    for (; m < num_rows; m++) multiply_codes<KIND, BLOCK, 1>(matrix, first, count, rows + m, scratch, out + m * TILE);
    return;
  }
  const int64_t padded = matrix.layout->padded;
  for (int64_t n = 0; n < count; n += PANEL) {
    const int64_t height = std::min<int64_t>(PANEL, count - n);
    for (int64_t i = 0; i < height; i++)
      decode_row<KIND, BLOCK>(matrix, first, n + i, scratch, scratch.panel + i * padded);
    multiply_panel(scratch.panel, height, padded, rows, num_rows, out + n);
  }
}

inline void multiply_dense_tile(const MatrixView& matrix, int64_t first, int64_t count, const Element* const* rows,
                                int64_t num_rows, Scratch& scratch, float* out) {
  const Matrix& layout = *matrix.layout;
  // Either arithmetic takes bfloat16 as it is stored.
  const bool in_place = matrix.dtype == BFLOAT16 && !matrix.transposed && layout.columns == layout.padded;
  for (int64_t n = 0; n < count; n += PANEL) {
    const int64_t height = std::min<int64_t>(PANEL, count - n);
    if (in_place) {
      const auto* panel = (const uint16_t*)matrix.dense + (first + n) * layout.columns;
      multiply_panel(panel, height, layout.padded, rows, num_rows, out + n);
      continue;
    }
    for (int64_t i = 0; i < height; i++) copy_dense_row(matrix, first + n + i, scratch.panel + i * layout.padded);
    multiply_panel(scratch.panel, height, layout.padded, rows, num_rows, out + n);
  }
}

template <Kind KIND>
void multiply_coded_tile(const MatrixView& matrix, int64_t first, int64_t count, const Rows& rows, int64_t num_rows,
                         Scratch& scratch, float* out) {
  switch (matrix.layout->block) {
    case 256: return multiply_coded_tile<KIND, 256>(matrix, first, count, rows, num_rows, scratch, out);
    case 128: return multiply_coded_tile<KIND, 128>(matrix, first, count, rows, num_rows, scratch, out);
    case 64: return multiply_coded_tile<KIND, 64>(matrix, first, count, rows, num_rows, scratch, out);
  }
}

// Rows [first, first + count) of a matrix, at most TILE of them, times `num_rows` activation rows of `padded`
// elements: out [num_rows, TILE], bias included.
inline void multiply_tile(const MatrixView& matrix, int64_t first, int64_t count, const Rows& rows, int64_t num_rows,
                          Scratch& scratch, float* out) {
  switch (matrix.kind) {
    case TOP2: multiply_coded_tile<TOP2>(matrix, first, count, rows, num_rows, scratch, out); break;
    case TOP4: multiply_coded_tile<TOP4>(matrix, first, count, rows, num_rows, scratch, out); break;
    case TOP2_MIDDLE2: multiply_coded_tile<TOP2_MIDDLE2>(matrix, first, count, rows, num_rows, scratch, out); break;
    case TOP4_LOW4: multiply_coded_tile<TOP4_LOW4>(matrix, first, count, rows, num_rows, scratch, out); break;
    case TOP2_MIDDLE2_LOW4:
      multiply_coded_tile<TOP2_MIDDLE2_LOW4>(matrix, first, count, rows, num_rows, scratch, out);
      break;
    case DENSE: multiply_dense_tile(matrix, first, count, rows.elements, num_rows, scratch, out); break;
  }
  if (!matrix.bias) return;
  for (int64_t n = 0; n < count; n++) {
    const float bias = number(matrix.bias, first + n, matrix.dtype);
    for (int64_t m = 0; m < num_rows; m++) out[m * TILE + n] += bias;
  }
}

}  // namespace dynaexq
