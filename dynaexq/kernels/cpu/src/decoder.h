// What few tokens pass in a decoder layer before attention and after it, rounded where Transformers' models round.
//
// Attention in between may be whatever the model has, or attention.h's over a cache that has room.
#pragma once

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "attention.h"
#include "interface.h"
#include "layer.h"
#include "norm.h"
#include "numbers.h"

namespace dynaexq {

using Rows16 = std::vector<uint16_t>;  // of bfloat16

// Rows of bfloat16 times the matrix of a layer that has one.
inline void multiply(const Product& product, const uint16_t* rows, int64_t num_rows, uint16_t* to, Team& team) {
  const int64_t no_upgrade = 0;
  Call call{.hidden_states = (int64_t)rows,
            .entries = (int64_t)&no_upgrade,
            .output = (int64_t)to,
            .num_tokens = num_rows,
            .top_k = 1,
            .dtype = BFLOAT16,
            .stage = UP_ONLY,
            .precisions = {product.precisions[0], product.precisions[1]},
            .team = team};
  Forward(*(const Layer*)product.layer, call).run();
  team = call.team;
}

inline int64_t outputs_of(const Product& product) { return ((const Layer*)product.layer)->up.rows; }

// A head, in place, by the angles of its position (Su et al., "RoFormer", 2021): column k with column k + width / 2.
inline void rotate(uint16_t* head, int64_t width, const uint16_t* cosine, const uint16_t* sine) {
  const int64_t half = width / 2;
  auto rounded = [](float value) { return from_bfloat16(to_bfloat16(value)); };
  auto product = [&](float value, uint16_t factor) { return rounded(value * from_bfloat16(factor)); };
  for (int64_t k = 0; k < half; k++) {
    const float first = from_bfloat16(head[k]), second = from_bfloat16(head[k + half]);
    head[k] = to_bfloat16(product(first, cosine[k]) + product(-second, sine[k]));
    head[k + half] = to_bfloat16(product(second, cosine[k + half]) + product(first, sine[k + half]));
  }
}

inline void before_attention(BeforeAttention& call) {
  Rows16 normal(call.num_rows * call.norm.columns);
  normalize(call.norm, (const uint16_t*)call.rows, call.num_rows, normal.data());
  for (int i = 0; i < 3; i++)
    multiply(call.products[i], normal.data(), call.num_rows, (uint16_t*)call.outputs[i], call.team);
  for (int i = 0; i < 2; i++) {
    auto* outputs = (uint16_t*)call.outputs[i];
    const int64_t heads = outputs_of(call.products[i]) / call.width;
    if (call.head_norms[i].weight) normalize(call.head_norms[i], outputs, call.num_rows * heads, outputs);
    for (int64_t head = 0; head < call.num_rows * heads; head++) {
      const int64_t angles = head / heads % call.positions * call.width;
      rotate(outputs + head * call.width, call.width, (const uint16_t*)call.cosine + angles,
             (const uint16_t*)call.sine + angles);
    }
  }
}

// The `top_k` largest probabilities of a softmax, the largest first. Of equal ones those that PyTorch's `topk` takes,
// whose steps these are, with the same library of C++.
inline void choose(const uint16_t* logits, int64_t count, const AfterAttention& call, int64_t* ids, float* weights) {
  using Choice = std::pair<float, int64_t>;
  std::vector<Choice> choices(count);
  float largest = -INFINITY, total = 0, chosen = 0;
  for (int64_t i = 0; i < count; i++) largest = std::max(largest, from_bfloat16(logits[i]));
  for (int64_t i = 0; i < count; i++) {
    choices[i] = {std::exp(from_bfloat16(logits[i]) - largest), i};
    total += choices[i].first;
  }
  for (Choice& choice : choices) choice.first /= total;
  auto before = [](const Choice& one, const Choice& other) {
    return (std::isnan(one.first) && !std::isnan(other.first)) || one.first > other.first;
  };
  const auto end = choices.begin() + call.top_k;
  if (call.top_k * 64 <= count) {
    std::partial_sort(choices.begin(), end, choices.end(), before);
  } else {
    std::nth_element(choices.begin(), end - 1, choices.end(), before);
    std::sort(choices.begin(), end - 1, before);
  }
  for (int64_t c = 0; c < call.top_k; c++) {
    ids[c] = choices[c].second, weights[c] = choices[c].first;
    chosen += weights[c];
  }
  for (int64_t c = 0; c < call.top_k; c++) {
    if (call.normalized) weights[c] /= chosen;
    if (call.rounded) weights[c] = from_bfloat16(to_bfloat16(weights[c]));
  }
}

inline void add(const uint16_t* rows, int64_t count, uint16_t* to) {
  for (int64_t i = 0; i < count; i++) to[i] = to_bfloat16(from_bfloat16(to[i]) + from_bfloat16(rows[i]));
}

inline void after_attention(AfterAttention& call) {
  const int64_t hidden = outputs_of(call.out), num_experts = outputs_of(call.router), count = call.num_rows * hidden;
  Rows16 sum(count), normal(count), logits(call.num_rows * num_experts);
  multiply(call.out, (const uint16_t*)call.attended, call.num_rows, sum.data(), call.team);
  add((const uint16_t*)call.residual, count, sum.data());
  normalize(call.norm, sum.data(), call.num_rows, normal.data());
  multiply(call.router, normal.data(), call.num_rows, logits.data(), call.team);
  std::vector<int64_t> ids(call.num_rows * call.top_k);
  std::vector<float> weights(ids.size());
  for (int64_t row = 0; row < call.num_rows; row++)
    choose(logits.data() + row * num_experts, num_experts, call, ids.data() + row * call.top_k,
           weights.data() + row * call.top_k);
  Call experts{.hidden_states = (int64_t)normal.data(),
               .top_k_index = (int64_t)ids.data(),
               .top_k_weights = (int64_t)weights.data(),
               .entries = call.entries,
               .output = call.output,
               .num_tokens = call.num_rows,
               .top_k = call.top_k,
               .dtype = BFLOAT16,
               .stage = WHOLE,
               .precisions = {call.experts.precisions[0], call.experts.precisions[1]},
               .counts = call.counts,
               .unit = call.unit,
               .largest = call.largest,
               .team = call.team};
  Forward(*(const Layer*)call.experts.layer, experts).run();
  call.team = experts.team;
  add(sum.data(), count, (uint16_t*)call.output);
}

// Rows [batch * queries, groups * width] to the last tokens of [batch, groups, keys, width].
inline void append(const Rows16& rows, const Attention& call, int64_t width, int64_t to, const int64_t (&strides)[3]) {
  const uint16_t* from = rows.data();
  for (int64_t batch = 0; batch < call.batch; batch++)
    for (int64_t token = call.keys - call.queries; token < call.keys; token++)
      for (int64_t group = 0; group < call.groups; group++, from += width)
        std::copy_n(from, width, (uint16_t*)to + batch * strides[0] + group * strides[1] + token * strides[2]);
}

inline void pass(DecoderStep& step) {
  auto& [before, attention, after] = step;
  const int64_t rows = before.num_rows;
  Rows16 query(rows * attention.heads * attention.width), key(rows * attention.groups * attention.width),
      value(rows * attention.groups * attention.value_width), attended(rows * attention.heads * attention.value_width);
  before.outputs[0] = (int64_t)query.data(), before.outputs[1] = (int64_t)key.data();
  before.outputs[2] = (int64_t)value.data();
  before_attention(before);
  append(key, attention, attention.width, attention.key, attention.key_strides);
  append(value, attention, attention.value_width, attention.value, attention.value_strides);
  attention.query = (int64_t)query.data(), attention.output = after.attended = (int64_t)attended.data();
  DecodeAttention(attention).run();
  after_attention(after);
}

}  // namespace dynaexq
