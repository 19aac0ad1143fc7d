// One mixture-of-experts layer on packed experts: sort the choices by expert, first matrix, activation, second matrix.
//
// The work is cut into tasks that any thread may take: TILE columns of the hidden layer of one expert, then TILE
// columns of the output over all experts. Every number is computed inside one task, in an order that depends on the
// routing alone, so the result does not depend on the number of threads.
#include <time.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <functional>
#include <memory>
#include <new>
#include <numeric>
#include <thread>
#include <vector>

#include "activation.h"
#include "backward.h"
#include "interface.h"
#include "matmul.h"

namespace dynaexq {
namespace {

// The choices of one expert: `pairs[first : first + count]`, each token * top_k + choice, in the order of tokens.
struct Segment {
  int64_t expert, first, count;
};

using Task = std::function<void(int64_t task, Scratch& scratch)>;
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);  // OpenMP's GOMP_parallel

constexpr int64_t WORTH_A_THREAD = 1 << 18;  // multiplications below which waking another one costs more

void write(void* to, int64_t index, int64_t dtype, float value) {
  if (dtype == FLOAT32) ((float*)to)[index] = value;
  else ((uint16_t*)to)[index] = dtype == BFLOAT16 ? to_bfloat16(value) : _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT);
}

int64_t nanoseconds(clockid_t clock) {
  timespec now;
  clock_gettime(clock, &now);
  return now.tv_sec * 1'000'000'000 + now.tv_nsec;
}

const uint8_t* find(const Part& part, const uint8_t* base, const uint8_t* upgrade) {
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

  // As memory/counter.py counts; other threads may be counting in the same place.
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
    threads = call.parallel ? std::clamp<int64_t>(work / WORTH_A_THREAD, 1, call.num_threads) : 1;
    const int64_t groups = std::max(layer.up.padded / layer.up.group, layer.down.padded / layer.down.group);
    const int64_t floats = 2 * groups * TILE + ROW_BLOCK * groups + 2 * most_rows * TILE;
    panels.reset(new Element[threads * PANEL * width]);
    numbers.reset(new float[threads * floats]);
    scratches.resize(threads);
    rows_of.resize(threads, std::vector<const Element*>(most_rows));
    ints_of.resize(threads, std::vector<IntRow>(most_rows));
    for (int64_t i = 0; i < threads; i++) {
      float* at = numbers.get() + i * floats;
      Scratch& scratch = scratches[i];
      scratch.panel = panels.get() + i * PANEL * width;
      scratch.step = at, scratch.offset = at += groups * TILE;
      scratch.sums = at += groups * TILE;
      scratch.first = at += ROW_BLOCK * groups;
      scratch.second = at + most_rows * TILE;
    }
  }

  // Run tasks 0 .. count - 1, each on the first thread that is free.
  void distribute(int64_t count, const Task& task) {
    struct Shared {
      std::atomic<int64_t> next_task{0}, next_thread{0};
      int64_t count;
      const Task& task;
      std::vector<Scratch>& scratches;
      std::thread::id caller = std::this_thread::get_id();
      int64_t caller_ended = 0;
    } shared{.count = count, .task = task, .scratches = scratches};
    auto work = [](void* data) {
      auto& shared = *(Shared*)data;
      Scratch& scratch = shared.scratches[shared.next_thread++];
      for (int64_t i; (i = shared.next_task++) < shared.count;) shared.task(i, scratch);
      if (std::this_thread::get_id() == shared.caller) shared.caller_ended = nanoseconds(CLOCK_MONOTONIC);
    };
    if (std::min(threads, count) <= 1) return work(&shared);
    const int64_t began = nanoseconds(CLOCK_MONOTONIC), ran = nanoseconds(CLOCK_THREAD_CPUTIME_ID);
    Parallel(call.parallel)(work, &shared, unsigned(std::min(threads, count)), 0);
    const int64_t ended = nanoseconds(CLOCK_MONOTONIC);
    const int64_t off_core = ended - began - (nanoseconds(CLOCK_THREAD_CPUTIME_ID) - ran);
    call.took += ended - began;
    call.lost += std::max(ended - shared.caller_ended, off_core);
  }

  // Whether few rows are multiplied as integers: machines that multiply bfloat16 need not, float32 must not.
  bool wants_ints() const {
    const bool few = std::any_of(segments.begin(), segments.end(), [](auto& s) { return s.count <= FEW_ROWS; });
    return few && sizeof(Element) == 4 && call.dtype != FLOAT32;
  }

  // The input rows as the arithmetic wants them: where they lie, or copied, converted and padded.
  void prepare_rows(const Matrix& matrix, int64_t count) {
    rows_width = matrix.padded;
    if (matrix.readings[0].kind != DENSE && wants_ints()) {
      int_rows.reserve(count, matrix.padded, matrix.group);
      distribute(count, [&](int64_t row, Scratch&) {
        int_rows.set(row, [&](int64_t k) {
          const int64_t index = row * matrix.columns + k;
          return k < matrix.columns ? number((const void*)call.hidden_states, index, Dtype(call.dtype)) : 0;
        });
      });
      if (most_rows <= FEW_ROWS && matrix.readings[1].kind != DENSE) return;
    }
    if (sizeof(Element) == 2 && matrix.columns == matrix.padded) {
      rows = (const Element*)call.hidden_states;
      return;
    }
    prepared.reset(new Element[count * matrix.padded]());
    distribute(count, [&](int64_t row, Scratch&) {
      for (int64_t k = 0; k < matrix.columns; k++)
        prepared[row * matrix.padded + A::place(k)] =
            A::element(number((const void*)call.hidden_states, row * matrix.columns + k, Dtype(call.dtype)));
    });
    rows = prepared.get();
  }

  MatrixView view(const Matrix& matrix, int64_t expert) const {
    const int64_t entry = ((const int64_t*)call.entries)[expert];
    const auto* base = (const uint8_t*)(layer.base + expert * layer.base_nbytes);
    const auto* upgrade = (const uint8_t*)(entry & ~int64_t(0xFF));
    const Reading& reading = matrix.readings[(entry & 0xFF) != 0];
    const uint8_t* planes[3];
    for (int i = 0; i < 3; i++) planes[i] = find(reading.planes[i], base, upgrade);
    return {.layout = &matrix,
            .kind = Kind(reading.kind),
            .planes = {(const uint16_t*)planes[0], (const uint16_t*)planes[1], (const uint16_t*)planes[2]},
            .dense = planes[0],
            .meta = (const uint16_t*)find(reading.meta, base, upgrade),
            .bias = find(reading.bias, base, upgrade),
            .dtype = Dtype(layer.dtype),
            .transposed = layer.transposed != 0};
  }

  // Rows `index(0)`, `index(1)`, ... of `elements`, and of `ints` if it has any.
  template <typename Index>
  Rows gather(const Element* elements, int64_t row_width, const IntRows& ints, int64_t count, const Index& index,
              const Scratch& scratch) {
    const int64_t thread = &scratch - scratches.data();
    for (int64_t i = 0; i < count; i++) {
      if (elements) rows_of[thread][i] = elements + index(i) * row_width;
      if (ints) ints_of[thread][i] = ints.at(index(i));
    }
    return {rows_of[thread].data(), ints ? ints_of[thread].data() : nullptr};
  }

  void project_up() {
    const int64_t columns = call.stage == WHOLE ? layer.down.columns : layer.up.rows;
    const int64_t tiles = (columns + TILE - 1) / TILE;
    if (call.stage == WHOLE) hidden.reset(new Element[pairs.size() * inner]());
    distribute(int64_t(segments.size()) * tiles, [&](int64_t task, Scratch& scratch) {
      const Segment& segment = segments[task / tiles];
      const int64_t first = task % tiles * TILE, count = std::min<int64_t>(TILE, columns - first);
      auto token = [&](int64_t i) { return pairs[segment.first + i] / call.top_k; };
      const Rows inputs = gather(rows, rows_width, int_rows, segment.count, token, scratch);
      const MatrixView up = view(layer.up, segment.expert);
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
      Element* to = hidden.get() + (segment.first + i) * inner;
      for (int64_t n = 0; n < count; n++) to[A::place(first + n)] = A::element(values[n]);
    }
  }

  void project_down() {
    const int64_t columns = layer.down.rows, tiles = (columns + TILE - 1) / TILE;
    if (call.stage == WHOLE && layer.down.readings[0].kind != DENSE && wants_ints()) {
      int_hidden.reserve(int64_t(pairs.size()), inner, layer.down.group);
      distribute(int64_t(pairs.size()), [&](int64_t row, Scratch&) {
        int_hidden.set(row, [&](int64_t k) { return A::value(hidden[row * inner + A::place(k)]); });
      });
    }
    const auto* weights = (const float*)call.top_k_weights;
    totals.reset(new float[threads * call.num_tokens * TILE]);
    distribute(tiles, [&](int64_t task, Scratch& scratch) {
      const int64_t first = task * TILE, count = std::min<int64_t>(TILE, columns - first);
      float* total = totals.get() + (&scratch - scratches.data()) * call.num_tokens * TILE;
      std::fill_n(total, call.num_tokens * TILE, 0.0f);
      for (const Segment& segment : segments) {
        auto place = [&](int64_t i) { return segment.first + i; };
        auto pair = [&](int64_t i) { return pairs[segment.first + i]; };
        const Rows inputs = call.stage == WHOLE
                                ? gather(hidden.get(), inner, int_hidden, segment.count, place, scratch)
                                : gather(rows, rows_width, int_rows, segment.count, pair, scratch);
        multiply_tile(view(layer.down, segment.expert), first, count, inputs, segment.count, scratch, scratch.first);
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
    const int64_t blocks = matrix.padded / matrix.block;
    const auto* gradient = (const float*)call.hidden_states;
    totals.reset(new float[threads * most_rows * SPAN]);
    distribute(int64_t(segments.size()) * blocks, [&](int64_t task, Scratch& scratch) {
      const Segment& segment = segments[task / blocks];
      const int64_t first = task % blocks * matrix.block;
      float* total = totals.get() + (&scratch - scratches.data()) * most_rows * SPAN;
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
    distribute(matrix.padded / matrix.block, [&](int64_t task, Scratch& scratch) {
      const int64_t first = task * matrix.block;
      float* total = totals.get() + (&scratch - scratches.data()) * call.num_tokens * SPAN;
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
    float* to = (float*)call.output + row * matrix.columns + first;
    const int64_t count = std::min<int64_t>(matrix.block, matrix.columns - first);
    for (int64_t k = 0; k < count; k++) to[k] = sums[Float32::place(k)];
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
  int64_t most_rows = 0, threads = 1, rows_width = 0;
  std::vector<int64_t> pairs;
  std::vector<Segment> segments;
  std::unique_ptr<Element[]> panels, prepared, hidden;
  std::unique_ptr<float[]> numbers, totals;
  std::vector<Scratch> scratches;
  std::vector<std::vector<const Element*>> rows_of;
  std::vector<std::vector<IntRow>> ints_of;
  IntRows int_rows, int_hidden;
  const Element* rows = nullptr;
};

}  // namespace
}  // namespace dynaexq

// 0, or 1 where memory ran out; nothing has been written then.
extern "C" int dynaexq_forward(const dynaexq::Layer* layer, dynaexq::Call* call) {
  try {
    dynaexq::Forward(*layer, *call).run();
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}
