// Root mean square norms of a few rows of bfloat16, rounded where Transformers' models round.
#pragma once

#include <cmath>
#include <vector>

#include "interface.h"
#include "numbers.h"

namespace dynaexq {

// Rows [num_rows, columns], to `to`, which may be where they are.
inline void normalize(const NormKind& kind, const uint16_t* rows, int64_t num_rows, uint16_t* to) {
  constexpr int LANES = 16;
  const int64_t columns = kind.columns;
  std::vector<float> weight(columns), row(columns);
  for (int64_t k = 0; k < columns; k++) weight[k] = from_bfloat16(((const uint16_t*)kind.weight)[k]) + kind.added;
  for (int64_t n = 0; n < num_rows; n++, rows += columns, to += columns) {
    float squares[LANES] = {}, sum = 0;
    for (int64_t k = 0; k < columns; k += LANES)
      for (int i = 0; i < LANES; i++) row[k + i] = from_bfloat16(rows[k + i]), squares[i] += row[k + i] * row[k + i];
    for (float square : squares) sum += square;
    const float factor = 1 / std::sqrt(sum / columns + float(kind.epsilon));
    if (kind.rounded)
      for (int64_t k = 0; k < columns; k++)
        to[k] = to_bfloat16(from_bfloat16(to_bfloat16(row[k] * factor)) * weight[k]);
    else
      for (int64_t k = 0; k < columns; k++) to[k] = to_bfloat16(row[k] * factor * weight[k]);
  }
}

}  // namespace dynaexq
