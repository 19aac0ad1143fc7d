// What flows back through a few columns of one matrix of one expert: its rows, each times a factor, added up.
//
// A row is decoded once and added to the sums of all activation rows that were routed to the expert. All is float32,
// whatever the arithmetic of the way forward; sums lie in the places of `Float32`, even columns before odd ones.
#pragma once

#include "matmul.h"

namespace dynaexq {

constexpr int SPAN = 256;  // columns in one task, or fewer where a block of codes is smaller

// sums[m] [BLOCK] += factors[m][row] * weights[row][first : first + BLOCK], over all rows.
template <Kind KIND, int BLOCK>
void add_coded_rows(const MatrixView& matrix, int64_t first, const float* const* factors, float* const* sums,
                    int64_t num_sums, Scratch& scratch) {
  using V = Vector;
  const Matrix& layout = *matrix.layout;
  for (int64_t tile = 0; tile < layout.rows; tile += TILE) {
    const int64_t count = std::min<int64_t>(TILE, layout.rows - tile);
    read_affine(matrix, tile, count, scratch);
    for (int64_t n = 0; n < count; n++) {
      const Planes block = matrix.planes.at(KIND, (tile + n) * layout.padded + first);
      auto chunk = [&]<int CHUNK>() __attribute__((always_inline)) {
        const int64_t group = (first + CHUNK * V::HALFWORDS) / layout.group * TILE + n;
        auto step = V::fill(scratch.step[group]), offset = V::fill(scratch.offset[group]);
        auto codes = code<KIND, BLOCK, CHUNK>(block);
        auto even = V::multiply_add(V::even(codes), step, offset), odd = V::multiply_add(V::odd(codes), step, offset);
        for (int64_t m = 0; m < num_sums; m++) {
          float* to = sums[m] + CHUNK * V::HALFWORDS;
          auto factor = V::fill(factors[m][tile + n]);
          V::store(to, V::multiply_add(even, factor, V::load(to)));
          V::store(to + V::FLOATS, V::multiply_add(odd, factor, V::load(to + V::FLOATS)));
        }
      };
      [&]<int... CHUNKS>(std::integer_sequence<int, CHUNKS...>) __attribute__((always_inline)) {
        (chunk.template operator()<CHUNKS>(), ...);
      }(std::make_integer_sequence<int, BLOCK / V::HALFWORDS>());
    }
  }
}

// The same for a matrix that was never coded, of which columns from `count` on are not there.
inline void add_dense_rows(const MatrixView& matrix, int64_t first, int64_t count, const float* const* factors,
                           float* const* sums, int64_t num_sums) {
  const Matrix& layout = *matrix.layout;
  for (int64_t row = 0; row < layout.rows; row++) {
    float weights[SPAN];
    for (int64_t k = 0; k < count; k++) {
      const int64_t column = first + k;
      const int64_t index = matrix.transposed ? column * layout.rows + row : row * layout.columns + column;
      weights[k] = number(matrix.dense, index, matrix.dtype);
    }
    for (int64_t m = 0; m < num_sums; m++)
      for (int64_t k = 0; k < count; k++) sums[m][Float32::place(k)] += factors[m][row] * weights[k];
  }
}

template <Kind KIND>
void add_coded_rows(const MatrixView& matrix, int64_t first, const float* const* factors, float* const* sums,
                    int64_t num_sums, Scratch& scratch) {
  switch (matrix.layout->block) {
    case 256: return add_coded_rows<KIND, 256>(matrix, first, factors, sums, num_sums, scratch);
    case 128: return add_coded_rows<KIND, 128>(matrix, first, factors, sums, num_sums, scratch);
    case 64: return add_coded_rows<KIND, 64>(matrix, first, factors, sums, num_sums, scratch);
  }
}

// One block of columns of any matrix; see above.
inline void add_rows(const MatrixView& matrix, int64_t first, const float* const* factors, float* const* sums,
                     int64_t num_sums, Scratch& scratch) {
  const Matrix& layout = *matrix.layout;
  switch (matrix.kind) {
    case TOP2: return add_coded_rows<TOP2>(matrix, first, factors, sums, num_sums, scratch);
    case TOP4: return add_coded_rows<TOP4>(matrix, first, factors, sums, num_sums, scratch);
    case TOP2_MIDDLE2: return add_coded_rows<TOP2_MIDDLE2>(matrix, first, factors, sums, num_sums, scratch);
    case TOP4_LOW4: return add_coded_rows<TOP4_LOW4>(matrix, first, factors, sums, num_sums, scratch);
    case TOP2_MIDDLE2_LOW4: return add_coded_rows<TOP2_MIDDLE2_LOW4>(matrix, first, factors, sums, num_sums, scratch);
    case DENSE:
      const int64_t count = std::min<int64_t>(layout.block, layout.columns - first);
      return add_dense_rows(matrix, first, count, factors, sums, num_sums);
  }
}

}  // namespace dynaexq
