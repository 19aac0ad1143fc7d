// A few rows of one matrix of one expert, times the activation rows that were routed to it.
//
// Codes: a strip of rows at a time, a row of it in each lane, so that nothing crosses lanes and a group is scaled once
// for all of them (`multiply_strip`). For many activation rows the codes are put together once, to bytes that stay in
// cache. Every product is added up in the same order however many rows there are. Matrices that were never coded are
// multiplied in panels (`multiply_panel`).
#pragma once

#include <algorithm>
#include <memory>

#include "rows.h"

namespace dynaexq {

using A = Arithmetic;
using Element = A::Element;

constexpr int TILE = 128;      // rows of a matrix in one task, at most
constexpr int PANEL = 16;      // of a matrix that was never coded: rows that are copied at a time, where they must be
constexpr int MANY_ROWS = 16;  // activation rows above which codes are put together once
constexpr int64_t AHEAD = 64;  // units of codes that are fetched beforehand

// One matrix of one expert, its planes found.
struct MatrixView {
  const Matrix* layout;
  Kind kind;
  Planes planes;        // of all rows
  const void* dense;    // [rows, columns], or [columns, rows] where transposed
  const uint8_t* meta;  // of each strip [num_groups, 2, rows of the strip], float16 or bytes: scales, minima or zeros
  const float* unit;    // of scales that are bytes, or null
  const void* bias;     // [rows], or null
  Dtype dtype;
  bool transposed;
};

// The activation rows of one expert; null where it is not read like that.
struct Inputs {
  const Row* coded;  // for products with codes, of so much precision
  Precision precision;
  const Element* const* elements;  // for products with 16-bit weights
};

// Room for one task of one thread.
struct Scratch {
  Element* panel;             // [PANEL, padded]
  uint32_t *bytes, *widened;  // [padded / 4, STRIP]: codes put together; the planes of a strip of fewer rows
  uint16_t* meta;             // [num_groups, 2, STRIP], or as many bytes: of such a strip
  float *first, *second;      // [rows, TILE]: results
  float* strip;               // [rows, TILE]: those of a strip of which some are not wanted
};

// STRIP rows of a matrix; where it ends before, the last of them are of no matter.
struct Strip {
  Planes planes;
  const uint8_t* meta;            // [num_groups, 2, STRIP], float16 or bytes
  float unit;                     // of bytes, or 0
  int64_t groups, units_a_group;  // the latter an even number
};

// What the codes of a group mean: weight = scale / 16 * code + minimum.
struct Grid {
  V::Floats scale, minimum;
};

// Of the rows of a strip from `row` on, as many as a vector holds. A call would take the vectors over the stack.
[[gnu::always_inline]] inline Grid grids_at(const Strip& strip, int64_t group, int row) {
  const int64_t scales = group * 2 * STRIP + row, others = scales + STRIP;
  if (strip.unit == 0) {
    const auto* halves = (const uint16_t*)strip.meta;
    return {V::load_float16(halves + scales), V::load_float16(halves + others)};
  }
  const auto scale = V::multiply(V::load_middle_bytes(strip.meta + scales), V::fill(strip.unit));
  return {scale, V::multiply(scale, V::multiply(V::floats(strip.meta + others), V::fill(-1.0f / 16)))};
}

// `lines` times `width` words, each line to the beginning of one of STRIP words.
template <typename Word>
inline const Word* widen(const Word* from, int64_t lines, int64_t width, Word* to) {
  for (int64_t i = 0; i < lines; i++)
    for (int64_t k = 0; k < STRIP; k++) to[i * STRIP + k] = k < width ? from[i * width + k] : Word(0);
  return to;
}

// The strip that begins at row `first`, a multiple of STRIP.
template <Kind KIND>
inline Strip strip_at(const MatrixView& matrix, int64_t first, Scratch& scratch) {
  constexpr Widths BITS = widths(KIND);
  const Matrix& layout = *matrix.layout;
  const int64_t groups = layout.padded / layout.group, height = std::min<int64_t>(STRIP, layout.rows - first);
  Planes planes = matrix.planes.at(BITS, first * layout.padded);
  const int64_t bytes = matrix.unit ? 1 : 2;  // of a scale
  const uint8_t* meta = matrix.meta + first * groups * 2 * bytes;
  if (height < STRIP) {
    const int64_t lines = layout.padded / 32;  // for each bit of a plane
    uint32_t* room = scratch.widened;
    auto widened = [&](const uint32_t* plane, int bits) {
      const uint32_t* to = widen(plane, lines * bits, height, room);
      room += lines * bits * STRIP;
      return to;
    };
    planes = {widened(planes.top, BITS.top), widened(planes.middle, BITS.middle), widened(planes.low, BITS.low)};
    if (matrix.unit) meta = widen(meta, groups * 2, height, (uint8_t*)scratch.meta);
    else meta = (const uint8_t*)widen((const uint16_t*)meta, groups * 2, height, scratch.meta);
  }
  return {planes, meta, matrix.unit ? *matrix.unit : 0, groups, layout.group / UNIT};
}

// What a code of so many bits stands for: weight = scale * unit * (code - middle) + (scale * center + minimum).
struct Meaning {
  float unit, center;
  explicit constexpr Meaning(int bits, float middle = 0)
      : unit(16.0f / float(1 << bits)), center((256.0f / float(1 << bits) - 1) / 32 + unit * middle) {}
};

// Bring what is needed AHEAD units later into the second cache: one unit of codes.
template <Kind KIND>
inline void fetch_codes(Planes strip, int64_t unit) {
  auto fetch = [&](const uint32_t* plane, int bits) {
    const char* from = (const char*)(plane + (unit + AHEAD) * STRIP * bits / 2);
    for (int line = 0; line < 2 * STRIP * bits; line += 64) __builtin_prefetch(from + line, 0, 2);
  };
  constexpr Widths BITS = widths(KIND);
  fetch(strip.top, BITS.top);
  // A plane of one bit comes by itself, and to ask for it took a quarter longer.
  if constexpr (BITS.middle > 1) fetch(strip.middle, BITS.middle);
  if constexpr (BITS.low > 1) fetch(strip.low, BITS.low);
}

// The same for the grids of one group.
inline void fetch_grids(const Strip& strip, int64_t group) {
  const int64_t nbytes = 2 * STRIP * (strip.unit == 0 ? 2 : 1);
  __builtin_prefetch(strip.meta + (group + AHEAD / strip.units_a_group) * nbytes, 0, 2);
}

// A strip of codes times ROWS activation rows: out [ROWS, TILE], of which STRIP are written. `bits` of a code.
template <Kind KIND, int DEPTH, typename Of, int ROWS>
void multiply_strip(const Strip& strip, const Row* rows, float* out) {
  constexpr int CHAINS = ROWS == 1 ? 4 : ROWS == 2 ? 2 : 1;  // sums that need not wait for one another
  constexpr Meaning meaning(DEPTH, Of::middle(DEPTH));
  for (int word = 0; word < STRIP; word += V::FLOATS) {
    V::Floats totals[ROWS];
    for (auto& total : totals) total = V::zero();
    for (int64_t group = 0; group < strip.groups; group++) {
      typename Of::Sums parts[ROWS][CHAINS];
      for (auto& of_row : parts)
        for (auto& part : of_row) part = Of::zero();
      auto add = [&]<bool ODD>(int64_t unit) {
        Codes codes;
        load_codes<KIND, ODD>(strip.planes, unit, word, codes);
        if constexpr (KIND != BYTES) fetch_codes<KIND>(strip.planes, unit);
        for (int i = 0; i < 4; i++)
          for (int m = 0; m < ROWS; m++) {
            auto& part = parts[m][i % CHAINS];
            const auto* numbers = (const typename Of::Number*)rows[m].numbers + unit * UNIT + 4 * i;
            part = Of::template dot<DEPTH>(part, codes[i], numbers);
          }
      };
      const int64_t first = group * strip.units_a_group, end = first + strip.units_a_group;
      for (int64_t unit = first; unit < end; unit += 2) {
        add.template operator()<false>(unit);
        add.template operator()<true>(unit + 1);
      }
      fetch_grids(strip, group);
      const auto [scale, minimum] = grids_at(strip, group, word);
      const auto step = V::multiply(scale, V::fill(meaning.unit));
      const auto offset = V::multiply_add(scale, V::fill(meaning.center), minimum);
      for (int m = 0; m < ROWS; m++) {
        for (int i = 1; i < CHAINS; i++) parts[m][0] = V::add(parts[m][0], parts[m][i]);
        const auto factor = V::multiply(step, V::fill(rows[m].scales[group]));
        totals[m] = V::multiply_add(offset, V::fill(rows[m].sums[group]), totals[m]);
        totals[m] = V::multiply_add(Of::floats(parts[m][0]), factor, totals[m]);
      }
    }
    for (int m = 0; m < ROWS; m++) V::store(out + m * TILE + word, totals[m]);
  }
}

template <Kind KIND, int DEPTH, typename Of>
void multiply_strip(const Strip& strip, const Row* rows, int64_t num_rows, float* out) {
  constexpr int MOST = V::ROWS;
  int64_t m = 0;
  for (; m + MOST <= num_rows; m += MOST) multiply_strip<KIND, DEPTH, Of, MOST>(strip, rows + m, out + m * TILE);
  if constexpr (MOST > 4)
    for (; m + 4 <= num_rows; m += 4) multiply_strip<KIND, DEPTH, Of, 4>(strip, rows + m, out + m * TILE);
  for (; m + 2 <= num_rows; m += 2) multiply_strip<KIND, DEPTH, Of, 2>(strip, rows + m, out + m * TILE);
  for (; m < num_rows; m++) multiply_strip<KIND, DEPTH, Of, 1>(strip, rows + m, out + m * TILE);
}

template <Kind KIND, int DEPTH>
void multiply_strip(const Strip& strip, const Inputs& inputs, int64_t num_rows, float* out) {
  switch (inputs.precision) {
    case INT8: return multiply_strip<KIND, DEPTH, Int8>(strip, inputs.coded, num_rows, out);
    case INT16: return multiply_strip<KIND, DEPTH, Int16>(strip, inputs.coded, num_rows, out);
    case FLOATS: return multiply_strip<KIND, DEPTH, Plain>(strip, inputs.coded, num_rows, out);
  }
}

// The codes of a strip, put together.
template <Kind KIND>
Strip joined(const Strip& strip, uint32_t* bytes) {
  for (int64_t unit = 0; unit < strip.groups * strip.units_a_group; unit++)
    for (int word = 0; word < STRIP; word += V::FLOATS) {
      Codes codes;
      load_codes<KIND>(strip.planes, unit, word, codes);
      for (int i = 0; i < 4; i++) V::store(bytes + (unit * 4 + i) * STRIP + word, codes[i]);
    }
  return {{bytes, nullptr, nullptr}, strip.meta, strip.unit, strip.groups, strip.units_a_group};
}

// Rows [first, first + count) of codes, wherever strips begin.
template <Kind KIND>
void multiply_coded_tile(const MatrixView& matrix, int64_t first, int64_t count, const Inputs& inputs,
                         int64_t num_rows, Scratch& scratch, float* out) {
  for (int64_t begin = first / STRIP * STRIP; begin < first + count; begin += STRIP) {
    const int64_t skipped = std::max<int64_t>(0, first - begin), to = begin + skipped - first;
    const int64_t wanted = std::min<int64_t>(STRIP - skipped, count - to);
    const Strip strip = strip_at<KIND>(matrix, begin, scratch);
    float* results = wanted == STRIP ? out + to : scratch.strip;
    if (num_rows > MANY_ROWS)
      multiply_strip<BYTES, depth(KIND)>(joined<KIND>(strip, scratch.bytes), inputs, num_rows, results);
    else multiply_strip<KIND, depth(KIND)>(strip, inputs, num_rows, results);
    if (wanted == STRIP) continue;
    for (int64_t m = 0; m < num_rows; m++) std::copy_n(results + m * TILE + skipped, wanted, out + m * TILE + to);
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
        if (ROWS == 1) __builtin_prefetch(weights[i] + k + 4 * padded, 0, 2);
      }
      for (int m = 0; m < ROWS; m++) {
        A::Operand row = A::operand(rows[m] + k);
        for (int i = 0; i < 4; i++) sums[m][i] = A::dot(sums[m][i], weight[i], row);
      }
    }
    for (int m = 0; m < ROWS; m++) A::store_sums(out + m * TILE + n, sums[m][0], sums[m][1], sums[m][2], sums[m][3]);
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

// Rows [first, first + count) of a matrix, at most TILE of them, times `num_rows` activation rows of `padded`
// elements: out [num_rows, TILE], bias included.
inline void multiply_tile(const MatrixView& matrix, int64_t first, int64_t count, const Inputs& inputs,
                          int64_t num_rows, Scratch& scratch, float* out) {
  if (matrix.kind == DENSE) multiply_dense_tile(matrix, first, count, inputs.elements, num_rows, scratch, out);
  for_kind(matrix.kind,
           [&]<Kind KIND>() { multiply_coded_tile<KIND>(matrix, first, count, inputs, num_rows, scratch, out); });
  if (!matrix.bias) return;
  for (int64_t n = 0; n < count; n++) {
    const float bias = number(matrix.bias, first + n, matrix.dtype);
    for (int64_t m = 0; m < num_rows; m++) out[m * TILE + n] += bias;
  }
}

}  // namespace dynaexq
