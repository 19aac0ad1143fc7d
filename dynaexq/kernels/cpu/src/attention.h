// Attention of a few new tokens in bfloat16: grouped heads, whose keys and values are read once, where they lie.
//
// The keys are cut into spans. All query rows that share a head of keys go through a span together, a block of keys at
// a time, beside the running maximum of their scores (Milakov and Gimelshein, "Online normalizer calculation for
// softmax", 2018); a row's spans are put together at the end (Dao et al., "Flash-Decoding", 2023). Sums are float32,
// and their order does not depend on the number of threads.
#pragma once

#include <algorithm>
#include <limits>
#include <memory>

#include "activation.h"
#include "parallel.h"
#include "vector.h"

namespace dynaexq {

class DecodeAttention {
 public:
  explicit DecodeAttention(Attention& call)
      : call(call),
        heads_a_group(call.heads / call.groups),
        rows(heads_a_group * call.queries),
        spans((call.keys + SPAN - 1) / SPAN),
        threads(threads_for(call.batch * call.heads * call.queries * call.keys * (call.width + call.value_width),
                            call.team)),
        elements(new Element[call.batch * call.groups * rows * call.width]),
        scores(new float[threads * rows * BLOCK]),
        partial(new Partial[call.batch * call.groups * spans * rows]),
        sums(new float[call.batch * call.groups * spans * rows * call.value_width]()) {}

  void run() {
    const int64_t groups = call.batch * call.groups;
    for (int64_t group = 0; group < groups; group++) take_queries(group);
    distribute(groups * spans, threads, call.team,
               [&](int64_t task, int64_t thread) { attend(task, scores.get() + thread * rows * BLOCK); });
    distribute(groups, threads, call.team, [&](int64_t group, int64_t) { put_together(group); });
  }

 private:
  using V = Vector;
  using A = Arithmetic;
  using Element = A::Element;

  static constexpr int64_t SPAN = 256;  // keys of one task
  static constexpr int64_t BLOCK = 64;  // keys whose scores are kept at a time
  static constexpr int LANES = 16;
  static constexpr int KEYS = 4;  // multiplied at a time
  static constexpr float NOTHING = -std::numeric_limits<float>::infinity();

  // What a row has of the keys of one span: their sum of `e**(score - largest)`; `sums` has that of the values.
  struct Partial {
    float largest = NOTHING, total = 0;
  };

  const uint16_t* key(int64_t group, int64_t index) const {
    return at(call.key, call.key_strides, group / call.groups, group % call.groups, index);
  }
  const uint16_t* value(int64_t group, int64_t index) const {
    return at(call.value, call.value_strides, group / call.groups, group % call.groups, index);
  }
  static const uint16_t* at(int64_t address, const int64_t (&strides)[3], int64_t batch, int64_t head, int64_t token) {
    return (const uint16_t*)address + batch * strides[0] + head * strides[1] + token * strides[2];
  }
  int64_t head_of(int64_t group, int64_t row) const {
    return group % call.groups * heads_a_group + row / call.queries;
  }

  // The rows of a group as products with keys want them.
  void take_queries(int64_t group) {
    for (int64_t row = 0; row < rows; row++) {
      const uint16_t* from =
          at(call.query, call.query_strides, group / call.groups, head_of(group, row), row % call.queries);
      Element* to = elements.get() + (group * rows + row) * call.width;
      for (int64_t k = 0; k < call.width; k++) to[A::place(k)] = A::element(from_bfloat16(from[k]));
    }
  }

  void attend(int64_t task, float* block) {
    const int64_t group = task / spans, first = task % spans * SPAN, end = std::min(first + SPAN, call.keys);
    Partial* of = partial.get() + task * rows;
    float* to = sums.get() + task * rows * call.value_width;
    for (int64_t from = first; from < end; from += BLOCK) {
      const int64_t count = std::min(BLOCK, end - from);
      if (is_hidden(group, from, count)) continue;
      score(group, from, count, block);
      for (int64_t row = 0; row < rows; row++) {
        const float kept = weigh(group, row, from, count, block + row * BLOCK, of[row]);
        if (kept != 1)
          for (int64_t d = 0; d < call.value_width; d++) to[row * call.value_width + d] *= kept;
      }
      int64_t row = 0;
      for (; row + V::ROWS <= rows; row += V::ROWS) add_values<V::ROWS>(group, from, count, block, row, to);
      for (; row < rows; row++) add_values<1>(group, from, count, block, row, to);
    }
  }

  // Whether a mask of truths lets no row see any of these keys, as of those that a static cache has not got yet.
  bool is_hidden(int64_t group, int64_t from, int64_t count) const {
    if (call.mask_kind != TRUTHS) return false;
    const int64_t different = call.mask_strides[1] ? rows : call.queries;
    for (int64_t row = 0; row < different; row++) {
      const auto* mask = (const uint8_t*)call.mask + mask_offset(group, row, from);
      for (int64_t t = 0; t < count; t++)
        if (mask[t * call.mask_strides[3]]) return false;
    }
    return true;
  }

  // Products of all rows and keys `from ..`, to `block [rows, BLOCK]`.
  void score(int64_t group, int64_t from, int64_t count, float* block) const {
    constexpr int ROWS = V::ROWS / 2;
    const Element* queries = elements.get() + group * rows * call.width;
    for (int64_t t = 0; t < count; t += KEYS) {
      const uint16_t* keys[KEYS];
      for (int i = 0; i < KEYS; i++) {
        const int64_t index = from + std::min(t + i, count - 1);
        keys[i] = key(group, index);
        fetch(value(group, index));
      }
      int64_t row = 0;
      for (; row + ROWS <= rows; row += ROWS)
        multiply<ROWS>(queries + row * call.width, keys, block + row * BLOCK + t);
      for (; row < rows; row++) multiply<1>(queries + row * call.width, keys, block + row * BLOCK + t);
    }
  }

  // Bring a value into the cache while keys are multiplied; it is read a few columns at a time.
  void fetch(const uint16_t* value) const {
    for (int64_t d = 0; d < call.value_width; d += 32) __builtin_prefetch(value + d);
  }

  template <int ROWS>
  void multiply(const Element* queries, const uint16_t* const (&keys)[KEYS], float* to) const {
    V::Floats products[ROWS][KEYS];
    for (auto& row : products)
      for (auto& product : row) product = V::zero();
    for (int64_t k = 0; k < call.width; k += V::HALFWORDS) {
      A::Operand columns[KEYS];
      for (int i = 0; i < KEYS; i++) columns[i] = A::operand(keys[i] + k);
      for (int row = 0; row < ROWS; row++) {
        const A::Operand query = A::operand(queries + row * call.width + k);
        for (int i = 0; i < KEYS; i++) products[row][i] = A::dot(products[row][i], columns[i], query);
      }
    }
    for (int row = 0; row < ROWS; row++)
      V::store_sums(to + row * BLOCK, products[row][0], products[row][1], products[row][2], products[row][3]);
  }

  // Products of one row to what its values are weighed with. What it had of its span until now is to be multiplied by
  // the number that is returned.
  float weigh(int64_t group, int64_t row, int64_t from, int64_t count, float* scores, Partial& of) const {
    const int64_t padded = (count + LANES - 1) / LANES * LANES;
    for (int64_t t = 0; t < count; t++) scores[t] *= float(call.scale);
    apply_mask(mask_offset(group, row, from), count, scores);
    std::fill(scores + count, scores + padded, NOTHING);
    float lanes[LANES], largest = of.largest, total = 0;
    std::fill_n(lanes, LANES, NOTHING);
    for (int64_t t = 0; t < padded; t += LANES)
      for (int i = 0; i < LANES; i++) lanes[i] = std::max(scores[t + i], lanes[i]);
    for (float lane : lanes) largest = std::max(lane, largest);
    if (largest == NOTHING) {
      std::fill_n(scores, padded, 0.0f);
      return 1;
    }
    std::fill_n(lanes, LANES, 0.0f);
    for (int64_t t = 0; t < padded; t += LANES)
      for (int i = 0; i < LANES; i++) {
        const float weight = exponential(scores[t + i] - largest);
        scores[t + i] = scores[t + i] == NOTHING ? 0 : weight;
        lanes[i] += scores[t + i];
      }
    for (float lane : lanes) total += lane;
    const float kept = of.largest == largest ? 1 : of.largest == NOTHING ? 0 : exponential(of.largest - largest);
    of = {largest, of.total * kept + total};
    return kept;
  }

  int64_t mask_offset(int64_t group, int64_t row, int64_t from) const {
    const auto& strides = call.mask_strides;
    return group / call.groups * strides[0] + head_of(group, row) * strides[1] + row % call.queries * strides[2] +
           from * strides[3];
  }

  void apply_mask(int64_t offset, int64_t count, float* scores) const {
    const int64_t stride = call.mask_strides[3];
    if (call.mask_kind == TRUTHS) {
      const auto* mask = (const uint8_t*)call.mask + offset;
      for (int64_t t = 0; t < count; t++) scores[t] = mask[t * stride] ? scores[t] : NOTHING;
    } else if (call.mask_kind == BFLOAT16_NUMBERS) {
      const auto* mask = (const uint16_t*)call.mask + offset;
      for (int64_t t = 0; t < count; t++) scores[t] += from_bfloat16(mask[t * stride]);
    } else if (call.mask_kind == FLOAT32_NUMBERS) {
      const auto* mask = (const float*)call.mask + offset;
      for (int64_t t = 0; t < count; t++) scores[t] += mask[t * stride];
    }
  }

  // Values times their weights to the sums of rows `row ..`, each run of HALFWORDS with the even ones first.
  template <int ROWS>
  void add_values(int64_t group, int64_t from, int64_t count, const float* weights, int64_t row, float* to) const {
    const uint16_t* values = value(group, from);
    weights += row * BLOCK;
    to += row * call.value_width;
    for (int64_t d = 0; d < call.value_width; d += V::HALFWORDS) {
      V::Floats even[ROWS], odd[ROWS];
      for (int i = 0; i < ROWS; i++) {
        even[i] = V::load(to + i * call.value_width + d);
        odd[i] = V::load(to + i * call.value_width + d + V::FLOATS);
      }
      for (int64_t t = 0; t < count; t++) {
        const V::Halfwords numbers = V::load(values + t * call.value_strides[2] + d);
        const V::Floats evens = V::even_numbers(numbers), odds = V::odd_numbers(numbers);
        for (int i = 0; i < ROWS; i++) {
          const V::Floats weight = V::fill(weights[i * BLOCK + t]);
          even[i] = V::multiply_add(evens, weight, even[i]);
          odd[i] = V::multiply_add(odds, weight, odd[i]);
        }
      }
      for (int i = 0; i < ROWS; i++) {
        V::store(to + i * call.value_width + d, even[i]);
        V::store(to + i * call.value_width + d + V::FLOATS, odd[i]);
      }
    }
  }

  // The output of a group's rows; zeros for one that sees no key.
  void put_together(int64_t group) {
    const int64_t width = call.value_width;
    for (int64_t row = 0; row < rows; row++) {
      const Partial* of = partial.get() + group * spans * rows + row;
      float* first = sums.get() + (group * spans * rows + row) * width;
      float largest = NOTHING, total = 0;
      for (int64_t span = 0; span < spans; span++) largest = std::max(of[span * rows].largest, largest);
      for (int64_t span = 0; span < spans; span++) {
        const Partial& part = of[span * rows];
        const float kept = part.largest == NOTHING ? 0 : exponential(part.largest - largest);
        const float* from = first + span * rows * width;
        total += kept * part.total;
        for (int64_t d = 0; d < width; d++) first[d] = kept * from[d] + (span ? first[d] : 0);
      }
      const int64_t token = group / call.groups * call.queries + row % call.queries;
      auto* to = (uint16_t*)call.output + (token * call.heads + head_of(group, row)) * width;
      const float share = total == 0 ? 0 : 1 / total;
      for (int64_t d = 0; d < width; d++) to[d] = to_bfloat16(first[Float32::place(d)] * share);
    }
  }

  Attention& call;
  const int64_t heads_a_group, rows, spans, threads;  // rows: of queries that share a head of keys
  std::unique_ptr<Element[]> elements;
  std::unique_ptr<float[]> scores;
  std::unique_ptr<Partial[]> partial;
  std::unique_ptr<float[]> sums;
};

}  // namespace dynaexq
