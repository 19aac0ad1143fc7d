// What flows back through a few columns of one matrix of one expert: its rows, each times a factor, added up.
//
// A strip is decoded once and added to the sums of all activation rows that were routed to the expert. All is float32,
// whatever the arithmetic of the way forward.
#pragma once

#include "matmul.h"

namespace dynaexq {

constexpr int SPAN = 64;  // columns in one task

// sums[m] [SPAN] += the sum over `count` rows n of factors[m][row + n] * weights[n], for ROWS activation rows.
template <int ROWS>
inline void add_products(const float (*weights)[SPAN], int64_t row, int64_t count, const float* const* factors,
                         float* const* sums) {
  constexpr int VECTORS = V::FLOATS / 4, WIDTH = VECTORS * V::FLOATS;
  for (int k = 0; k < SPAN; k += WIDTH) {
    V::Floats totals[ROWS][VECTORS];
    for (int m = 0; m < ROWS; m++)
      for (int i = 0; i < VECTORS; i++) totals[m][i] = V::load(sums[m] + k + i * V::FLOATS);
    for (int64_t n = 0; n < count; n++)
      for (int m = 0; m < ROWS; m++) {
        const auto factor = V::fill(factors[m][row + n]);
        for (int i = 0; i < VECTORS; i++)
          totals[m][i] = V::multiply_add(V::load(weights[n] + k + i * V::FLOATS), factor, totals[m][i]);
      }
    for (int m = 0; m < ROWS; m++)
      for (int i = 0; i < VECTORS; i++) V::store(sums[m] + k + i * V::FLOATS, totals[m][i]);
  }
}

// The same for all activation rows.
inline void add_products(const float (*weights)[SPAN], int64_t row, int64_t count, const float* const* factors,
                         float* const* sums, int64_t num_sums) {
  int64_t m = 0;
  for (; m + 4 <= num_sums; m += 4) add_products<4>(weights, row, count, factors + m, sums + m);
  for (; m < num_sums; m++) add_products<1>(weights, row, count, factors + m, sums + m);
}

// Columns [first, first + SPAN) of a strip of codes, as weights.
template <Kind KIND>
void decode_strip(const Strip& strip, int64_t first, float (*weights)[SPAN]) {
  constexpr Meaning meaning(depth(KIND));
  uint8_t bytes[STRIP][SPAN];
  for (int k = 0; k < SPAN; k += UNIT)
    for (int word = 0; word < STRIP; word += V::FLOATS) {
      Codes codes;
      load_codes<KIND>(strip.planes, (first + k) / UNIT, word, codes);
      V::store_rows(codes, bytes[word] + k, SPAN);
    }
  for (int k = 0; k < SPAN; k += V::FLOATS) {
    float steps[STRIP], offsets[STRIP];
    for (int row = 0; row < STRIP; row += V::FLOATS) {
      const auto [scale, minimum] = grids_at(strip, (first + k) / UNIT / strip.units_a_group, row);
      V::store(steps + row, V::multiply(scale, V::fill(meaning.unit)));
      V::store(offsets + row, V::multiply_add(scale, V::fill(meaning.center), minimum));
    }
    for (int n = 0; n < STRIP; n++)
      V::store(weights[n] + k, V::multiply_add(V::floats(bytes[n] + k), V::fill(steps[n]), V::fill(offsets[n])));
  }
}

// sums[m] [SPAN] += factors[m][row] * weights[row][first : first + SPAN], over all rows.
template <Kind KIND>
void add_coded_rows(const MatrixView& matrix, int64_t first, const float* const* factors, float* const* sums,
                    int64_t num_sums, Scratch& scratch) {
  for (int64_t row = 0; row < matrix.layout->rows; row += STRIP) {
    float weights[STRIP][SPAN];
    decode_strip<KIND>(strip_at<KIND>(matrix, row, scratch), first, weights);
    add_products(weights, row, std::min<int64_t>(STRIP, matrix.layout->rows - row), factors, sums, num_sums);
  }
}

// The same for a matrix that was never coded, of which columns from `count` on are not there.
inline void add_dense_rows(const MatrixView& matrix, int64_t first, int64_t count, const float* const* factors,
                           float* const* sums, int64_t num_sums) {
  const Matrix& layout = *matrix.layout;
  for (int64_t row = 0; row < layout.rows; row++) {
    float weights[1][SPAN] = {};
    for (int64_t k = 0; k < count; k++) {
      const int64_t column = first + k;
      const int64_t index = matrix.transposed ? column * layout.rows + row : row * layout.columns + column;
      weights[0][k] = number(matrix.dense, index, matrix.dtype);
    }
    add_products(weights, row, 1, factors, sums, num_sums);
  }
}

// SPAN columns of any matrix; see above.
inline void add_rows(const MatrixView& matrix, int64_t first, const float* const* factors, float* const* sums,
                     int64_t num_sums, Scratch& scratch) {
  const Matrix& layout = *matrix.layout;
  if (matrix.kind == DENSE) {
    const int64_t count = std::min<int64_t>(SPAN, layout.columns - first);
    add_dense_rows(matrix, first, count, factors, sums, num_sums);
  }
  for_kind(matrix.kind, [&]<Kind KIND>() { add_coded_rows<KIND>(matrix, first, factors, sums, num_sums, scratch); });
}

}  // namespace dynaexq
