// One mixture-of-experts layer on packed experts: sort the choices by expert, first matrix, activation, second matrix.
//
// The work is cut into tasks that any thread may take: a tile of columns of the hidden layer of one expert, then one
// of the output over all experts. Every number is computed inside one task, in an order that depends on the routing
// alone, so the result does not depend on the number of threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <numeric>
#include <vector>

#include "activation.h"
#include "backward.h"
#include "interface.h"
#include "matmul.h"
#include "parallel.h"

namespace dynaexq {

// The choices of one expert: `pairs[first : first + count]`, each token * top_k + choice, in the order of tokens.
struct Segment {
  int64_t expert, first, count;
};

inline void write(void* to, int64_t index, int64_t dtype, float value) {
  if (dtype == FLOAT32) ((float*)to)[index] = value;
  else ((uint16_t*)to)[index] = dtype == BFLOAT16 ? to_bfloat16(value) : to_float16(value);
}

inline const uint8_t* find(const Part& part, const uint8_t* base, const uint8_t* upgrade) {
  return part.offset < 0 ? nullptr : (part.in_upgrade ? upgrade : base) + part.offset;
}

class Forward {
 public:
  Forward(const Layer& layer, Call& call)
      : layer(layer), call(call), inner(layer.down.padded), width(std::max(layer.up.padded, layer.down.padded)) {
    sort_choices();
    reserve_scratch();
  }

  void run() {
    if (call.counts) count_routing();
    if (segments.empty()) return clear_output();
    if (call.stage == DOWN_BACK) return back_through_down();
    if (call.stage == UP_BACK) return back_through_up();
    if (call.stage == DOWN_ONLY) {
      prepare_rows(layer.down, call.num_tokens * call.top_k);
    } else {
      prepare_rows(layer.up, call.num_tokens);
      project_up();
    }
    if (call.stage != UP_ONLY) project_down();
  }

 private:
  void sort_choices() {
    if (!call.top_k_index) return take_all_rows();
    const auto* ids = (const int64_t*)call.top_k_index;
    const int64_t num_pairs = call.num_tokens * call.top_k;
    std::vector<int64_t> next(layer.num_experts + 1);
    auto is_ours = [&](int64_t id) { return id >= 0 && id < layer.num_experts; };
    for (int64_t p = 0; p < num_pairs; p++)
      if (is_ours(ids[p])) next[ids[p] + 1]++;
    for (int64_t expert = 0; expert < layer.num_experts; expert++) {
      const int64_t count = next[expert + 1];
      next[expert + 1] += next[expert];
      if (count) segments.push_back({expert, next[expert], count});
      most_rows = std::max(most_rows, count);
    }
    pairs.resize(next[layer.num_experts]);
    for (int64_t p = 0; p < num_pairs; p++)
      if (is_ours(ids[p])) pairs[next[ids[p]]++] = p;
  }

  // A layer of one matrix: every row goes through it.
  void take_all_rows() {
    if (call.num_tokens) segments.push_back({0, 0, call.num_tokens});
    most_rows = call.num_tokens;
    pairs.resize(call.num_tokens);
    std::iota(pairs.begin(), pairs.end(), 0);
  }

  // As memory/routing_counter.py counts; other threads may be counting in the same place.
  void count_routing() const {
    auto* counts = (int64_t*)call.counts;
    auto add = [&](int64_t to, int64_t amount) {
      std::atomic_ref<int64_t>(counts[to]).fetch_add(amount, std::memory_order_relaxed);
    };
    for (int64_t p = 0; p < call.num_tokens * call.top_k; p++) {
      const int64_t id = ((const int64_t*)call.top_k_index)[p];
      const float weight = ((const float*)call.top_k_weights)[p];
      const float mass = std::isfinite(weight) ? std::clamp(weight, 0.0f, float(call.largest)) : 0;
      add(id >= 0 && id < layer.num_experts ? id : layer.num_experts, std::llrint(mass * float(call.unit)));
    }
    add(layer.num_experts + 1, call.num_tokens);
  }

  void reserve_scratch() {
    const int64_t work = int64_t(pairs.size()) * layer.up.padded * layer.up.rows;
    threads = threads_for(work, call.team);
    const int64_t groups = std::max(layer.up.padded / layer.up.group, layer.down.padded / layer.down.group);
    const int64_t words = STRIP * width / 4, halves = 2 * groups * STRIP, floats = most_rows * TILE;
    panels.reset(new Element[threads * PANEL * width]);
    strips.reset(new uint32_t[threads * 2 * words]);
    metas.reset(new uint16_t[threads * halves]);
    results.reset(new float[threads * 3 * floats]);
    scratches.resize(threads);
    for (int64_t i = 0; i < threads; i++) {
      uint32_t* strip = strips.get() + i * 2 * words;
      float* result = results.get() + i * 3 * floats;
      scratches[i] = {.panel = panels.get() + i * PANEL * width,
                      .bytes = strip,
                      .widened = strip + words,
                      .meta = metas.get() + i * halves,
                      .first = result,
                      .second = result + floats,
                      .strip = result + 2 * floats};
    }
    elements_of.resize(threads, std::vector<const Element*>(most_rows));
    rows_of.resize(threads, std::vector<Row>(most_rows));
  }

  // Run tasks 0 .. count - 1, each with the scratch of its thread.
  template <typename Work>
  void distribute(int64_t count, const Work& work) {
    dynaexq::distribute(count, threads, call.team,
                        [&](int64_t task, int64_t thread) { work(task, scratches[thread]); });
  }

  // Whether any expert of this call reads `matrix` in a way that is `wanted`.
  template <typename Wanted>
  bool any_reads(const Matrix& matrix, const Wanted& wanted) const {
    return std::any_of(segments.begin(), segments.end(), [&](const Segment& segment) {
      const int64_t entry = ((const int64_t*)call.entries)[segment.expert];
      return wanted(Kind(matrix.readings[(entry & 0xFF) != 0].kind));
    });
  }

  // `count` rows as products with `matrix` want them; `read(row, to)` gives the `matrix.padded` floats of one.
  template <typename Read>
  void prepare(const Matrix& matrix, int64_t count, const Read& read) {
    const bool dense = !elements && any_reads(matrix, [](Kind kind) { return kind == DENSE; });
    for (int deep = 0; deep < 2; deep++) {
      coded[deep] = {};
      if (any_reads(matrix, [&](Kind kind) { return kind != DENSE && is_deep(kind) == deep; }))
        coded[deep].reserve(Precision(call.precisions[deep]), count, matrix.padded, matrix.group);
    }
    if (dense) prepared.reset(new Element[count * matrix.padded]);
    if (!coded[0] && !coded[1] && !dense) return;
    floats_of.resize(threads, std::vector<float>(width));
    distribute(count, [&](int64_t row, Scratch& scratch) {
      float* values = floats_of[thread_of(scratch)].data();
      read(row, values);
      for (auto& rows : coded)
        if (rows) rows.set(row, values);
      if (dense)
        for (int64_t k = 0; k < matrix.padded; k++)
          prepared[row * matrix.padded + A::place(k)] = A::element(values[k]);
    });
    if (dense) elements = prepared.get();
  }

  // The rows that came in.
  void prepare_rows(const Matrix& matrix, int64_t count) {
    const auto dtype = Dtype(call.dtype);
    if (sizeof(Element) == 2 && matrix.columns == matrix.padded) elements = (const Element*)call.hidden_states;
    prepare(matrix, count, [&](int64_t row, float* to) {
      read_numbers((const void*)call.hidden_states, row * matrix.columns, matrix.columns, dtype, to);
      std::fill(to + matrix.columns, to + matrix.padded, 0.0f);
    });
  }

  // The rows between the two matrices.
  void prepare_hidden() {
    elements = nullptr;
    prepare(layer.down, int64_t(pairs.size()),
            [&](int64_t row, float* to) { std::copy_n(hidden.get() + row * inner, inner, to); });
  }

  int64_t thread_of(const Scratch& scratch) const { return &scratch - scratches.data(); }

  MatrixView view(const Matrix& matrix, int64_t expert) const {
    const int64_t entry = ((const int64_t*)call.entries)[expert];
    const auto* base = (const uint8_t*)(layer.base + expert * layer.base_nbytes);
    const auto* upgrade = (const uint8_t*)(entry & ~int64_t(0xFF));
    const Reading& reading = matrix.readings[(entry & 0xFF) != 0];
    const uint8_t* planes[3];
    for (int i = 0; i < 3; i++) planes[i] = find(reading.planes[i], base, upgrade);
    return {.layout = &matrix,
            .kind = Kind(reading.kind),
            .planes = {(const uint32_t*)planes[0], (const uint32_t*)planes[1], (const uint32_t*)planes[2]},
            .dense = planes[0],
            .meta = find(reading.meta, base, upgrade),
            .unit = (const float*)find(reading.unit, base, upgrade),
            .bias = find(reading.bias, base, upgrade),
            .dtype = Dtype(layer.dtype),
            .transposed = layer.transposed != 0};
  }

  // Rows `index(0)`, `index(1)`, ... of those that were prepared for `matrix`.
  template <typename Index>
  Inputs gather(const MatrixView& matrix, int64_t count, const Index& index, const Scratch& scratch) {
    auto& rows = rows_of[thread_of(scratch)];
    auto& pointers = elements_of[thread_of(scratch)];
    const bool deep = is_deep(matrix.kind);
    for (int64_t i = 0; i < count; i++) {
      if (coded[deep]) rows[i] = coded[deep].at(index(i));
      if (elements) pointers[i] = elements + index(i) * matrix.layout->padded;
    }
    return {rows.data(), Precision(call.precisions[deep]), pointers.data()};
  }

  // Rows of a matrix in one task, of so many in all: half where threads would go without a task, or where results of
  // many activation rows have to stay in the cache.
  int64_t tile_height(int64_t rows) const {
    return most_rows > MANY_ROWS || rows < 2 * threads * TILE ? TILE / 2 : TILE;
  }

  void project_up() {
    const int64_t columns = call.stage == WHOLE ? layer.down.columns : layer.up.rows;
    const int64_t height = tile_height(columns * int64_t(segments.size())), tiles = (columns + height - 1) / height;
    if (call.stage == WHOLE) hidden.reset(new float[pairs.size() * inner]());
    distribute(int64_t(segments.size()) * tiles, [&](int64_t task, Scratch& scratch) {
      const Segment& segment = segments[task / tiles];
      const int64_t first = task % tiles * height, count = std::min(height, columns - first);
      auto token = [&](int64_t i) { return pairs[segment.first + i] / call.top_k; };
      const MatrixView up = view(layer.up, segment.expert);
      const Inputs inputs = gather(up, segment.count, token, scratch);
      multiply_tile(up, first, count, inputs, segment.count, scratch, scratch.first);
      if (call.stage == WHOLE) {
        if (layer.gated) multiply_tile(up, columns + first, count, inputs, segment.count, scratch, scratch.second);
        keep_hidden(segment, first, count, scratch);
      } else {
        for (int64_t i = 0; i < segment.count; i++)
          for (int64_t n = 0; n < count; n++)
            write((void*)call.output, pairs[segment.first + i] * columns + first + n, call.dtype,
                  scratch.first[i * TILE + n]);
      }
    });
  }

  void keep_hidden(const Segment& segment, int64_t first, int64_t count, Scratch& scratch) {
    for (int64_t i = 0; i < segment.count; i++) {
      float* values = scratch.first + i * TILE;
      activate(layer.activation, values, layer.gated ? scratch.second + i * TILE : nullptr, count);
      std::copy_n(values, count, hidden.get() + (segment.first + i) * inner + first);
    }
  }

  void project_down() {
    const int64_t columns = layer.down.rows, height = tile_height(columns), tiles = (columns + height - 1) / height;
    if (call.stage == WHOLE) prepare_hidden();
    const auto* weights = (const float*)call.top_k_weights;
    totals.reset(new float[threads * call.num_tokens * TILE]);
    distribute(tiles, [&](int64_t task, Scratch& scratch) {
      const int64_t first = task * height, count = std::min(height, columns - first);
      float* total = totals.get() + thread_of(scratch) * call.num_tokens * TILE;
      std::fill_n(total, call.num_tokens * TILE, 0.0f);
      for (const Segment& segment : segments) {
        auto row = [&](int64_t i) { return call.stage == WHOLE ? segment.first + i : pairs[segment.first + i]; };
        const MatrixView down = view(layer.down, segment.expert);
        const Inputs inputs = gather(down, segment.count, row, scratch);
        multiply_tile(down, first, count, inputs, segment.count, scratch, scratch.first);
        for (int64_t i = 0; i < segment.count; i++) {
          const int64_t pair = pairs[segment.first + i];
          float* to = total + pair / call.top_k * TILE;
          for (int64_t n = 0; n < count; n++) to[n] += weights[pair] * scratch.first[i * TILE + n];
        }
      }
      for (int64_t t = 0; t < call.num_tokens; t++)
        for (int64_t n = 0; n < count; n++)
          write((void*)call.output, t * columns + first + n, call.dtype, total[t * TILE + n]);
    });
  }

  // A choice's share of a gradient `[tokens, down.rows]`, on the other side of the second matrix.
  void back_through_down() {
    const Matrix& matrix = layer.down;
    const int64_t blocks = matrix.padded / SPAN;
    const auto* gradient = (const float*)call.hidden_states;
    totals.reset(new float[threads * most_rows * SPAN]);
    distribute(int64_t(segments.size()) * blocks, [&](int64_t task, Scratch& scratch) {
      const Segment& segment = segments[task / blocks];
      const int64_t first = task % blocks * SPAN;
      float* total = totals.get() + thread_of(scratch) * most_rows * SPAN;
      std::vector<const float*> factors(segment.count);
      std::vector<float*> sums(segment.count);
      std::fill_n(total, segment.count * SPAN, 0.0f);
      for (int64_t i = 0; i < segment.count; i++) {
        factors[i] = gradient + pairs[segment.first + i] / call.top_k * matrix.rows;
        sums[i] = total + i * SPAN;
      }
      add_rows(view(matrix, segment.expert), first, factors.data(), sums.data(), segment.count, scratch);
      for (int64_t i = 0; i < segment.count; i++) write_block(matrix, pairs[segment.first + i], first, sums[i]);
    });
  }

  // The sum over a token's choices of their gradients `[choices, up.rows]`, on the other side of the first matrix.
  void back_through_up() {
    const Matrix& matrix = layer.up;
    const auto* gradient = (const float*)call.hidden_states;
    totals.reset(new float[threads * call.num_tokens * SPAN]);
    distribute(matrix.padded / SPAN, [&](int64_t task, Scratch& scratch) {
      const int64_t first = task * SPAN;
      float* total = totals.get() + thread_of(scratch) * call.num_tokens * SPAN;
      std::vector<const float*> factors(most_rows);
      std::vector<float*> sums(most_rows);
      std::fill_n(total, call.num_tokens * SPAN, 0.0f);
      for (const Segment& segment : segments) {
        for (int64_t i = 0; i < segment.count; i++) {
          const int64_t pair = pairs[segment.first + i];
          factors[i] = gradient + pair * matrix.rows;
          sums[i] = total + pair / call.top_k * SPAN;
        }
        add_rows(view(matrix, segment.expert), first, factors.data(), sums.data(), segment.count, scratch);
      }
      for (int64_t t = 0; t < call.num_tokens; t++) write_block(matrix, t, first, total + t * SPAN);
    });
  }

  // Row `row` of the output, from column `first` on.
  void write_block(const Matrix& matrix, int64_t row, int64_t first, const float* sums) const {
    const int64_t count = std::clamp<int64_t>(matrix.columns - first, 0, SPAN);
    std::copy_n(sums, count, (float*)call.output + row * matrix.columns + first);
  }

  int64_t output_elements() const {
    switch (call.stage) {
      case UP_ONLY: return call.num_tokens * call.top_k * layer.up.rows;
      case DOWN_BACK: return call.num_tokens * call.top_k * layer.down.columns;
      case UP_BACK: return call.num_tokens * layer.up.columns;
      default: return call.num_tokens * layer.down.rows;
    }
  }

  void clear_output() {
    const int64_t count = output_elements();
    for (int64_t i = 0; i < count; i++) write((void*)call.output, i, call.dtype, 0);
  }

  const Layer& layer;
  Call& call;
  const int64_t inner, width;  // elements of a hidden row; of the widest row
  int64_t most_rows = 0, threads = 1;
  std::vector<int64_t> pairs;
  std::vector<Segment> segments;
  std::unique_ptr<Element[]> panels, prepared;
  std::unique_ptr<uint32_t[]> strips;
  std::unique_ptr<uint16_t[]> metas;
  std::unique_ptr<float[]> results, hidden, totals;
  std::vector<Scratch> scratches;
  std::vector<std::vector<float>> floats_of;
  std::vector<std::vector<const Element*>> elements_of;
  std::vector<std::vector<Row>> rows_of;
  Rows coded[2];  // as in `Call.precisions`
  const Element* elements = nullptr;
};

}  // namespace dynaexq
