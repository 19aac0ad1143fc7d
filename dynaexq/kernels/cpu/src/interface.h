// What Python hands over; `native.py` mirrors it. Every field is 64 bits wide, so that both sides agree on offsets.
#pragma once

#include <cstdint>

namespace dynaexq {

enum Dtype : int64_t { BFLOAT16, FLOAT16, FLOAT32 };

// What activation rows are rounded to where they meet codes.
enum Precision : int64_t { INT8, INT16, FLOATS };

// What a mask is made of: truths, which let a score be seen, or numbers that are added to it.
enum MaskKind : int64_t { NO_MASK, TRUTHS, BFLOAT16_NUMBERS, FLOAT32_NUMBERS };

// Which planes make up a code (see quantization/plane_codec.py); DENSE is a plain matrix of the layer's dtype.
enum Kind : int64_t {
  TOP2,
  TOP2_THIRD1,
  TOP2_THIRD1_FOURTH1,
  TOP2_MIDDLE2,
  TOP2_MIDDLE2_LOW4,
  TOP4,
  TOP4_FIFTH2,
  TOP4_LOW4,
  DENSE
};

enum Activation : int64_t { SILU, GELU, GELU_TANH, RELU, RELU2 };

// The whole layer; or only the first matrix, with one row of output a choice; or only the second, with one row of
// input a choice. Or back again, in float32: through the second matrix, from one row a token to one a choice, or
// through the first, from one row a choice to one a token.
enum Stage : int64_t { WHOLE, UP_ONLY, DOWN_ONLY, DOWN_BACK, UP_BACK };

// Bytes of a block where an array begins; -1 where there is no such array.
struct Part {
  int64_t offset, in_upgrade;
};

// The three planes are top, middle, low; a DENSE matrix is the first of them.
// What codes mean lies in `meta`, as bytes where there is a `unit` for them, else as float16
// (quantization/grid_format.py).
struct Reading {
  int64_t kind;
  Part planes[3], meta, unit, bias;
};

// See quantization/layout.MatrixLayout; codes and what they mean lie in strips (quantization/arrangement.py).
// `readings[1]` is how an expert is read that has its upgrade.
struct Matrix {
  int64_t rows, columns, padded, group;
  Reading readings[2];
};

// The threads that there are, and the address of OpenMP's `GOMP_parallel`, or 0 for one thread. Added to where several
// ran: nanoseconds in parallel regions, and those of them in which the caller waited for others or was not on a core.
struct Team {
  int64_t num_threads, parallel, took, lost;
};

struct Layer {
  Matrix up, down;
  int64_t num_experts, base, base_nbytes, dtype, transposed, gated, activation;
};

// Addresses of: rows of `dtype`, int64 ids [tokens, top_k] or 0 where there is one matrix for all, float32 weights
// [tokens, top_k], int64 entries [num_experts], output of `dtype`.
struct Call {
  int64_t hidden_states, top_k_index, top_k_weights, entries, output;
  int64_t num_tokens, top_k, dtype, stage;

  // What rows are rounded to where they meet codes of at most four bits, and of eight.
  int64_t precisions[2];

  // int64 [num_experts + 2]: routing mass of each expert, of foreign ids, and tokens, all to be added to; or 0.
  // A weight counts as that many units, `largest` at most.
  int64_t counts, unit, largest;

  Team team;
};

// How a row of so many columns of bfloat16 is normalized: divided by its root mean square, times `weight + added`; the
// quotient is rounded before that, or only the product. Columns are a multiple of 16.
struct NormKind {
  int64_t weight, columns, added, rounded;
  double epsilon;
};

struct Norm {
  NormKind kind;
  int64_t rows, output, num_rows;
};

// Queries [batch, heads, queries, width], keys and values [batch, groups, keys, width or value_width] of bfloat16,
// whose last dimension lies in a row, and a mask [batch, heads, queries, keys]; strides are in elements. Output
// [batch, queries, heads, value_width], in a row. Both widths are multiples of 32.
struct Attention {
  int64_t query, key, value, mask, output;
  int64_t batch, heads, groups, queries, keys, width, value_width, mask_kind;
  int64_t query_strides[3], key_strides[3], value_strides[3], mask_strides[4];
  double scale;
  Team team;
};

// A layer, and `Call.precisions` of what is multiplied by it.
struct Product {
  int64_t layer, precisions[2];
};

// What a decoder layer computes before attention, of rows [num_rows, columns] of bfloat16: their norm; queries, keys
// and values [num_rows, heads * width]; norms of each head of the first two, unless their weight is 0; and the first
// two rotated by `cosine` and `sine` [positions, width], of which row r has number r % positions.
struct BeforeAttention {
  int64_t rows, num_rows;
  NormKind norm;
  Product products[3];
  int64_t outputs[3];
  NormKind head_norms[2];
  int64_t width, cosine, sine, positions;
  Team team;
};

// What it computes after attention: the product of what was attended to, added to `residual`; the norm of that;
// routing by the `top_k` largest of its products with the router (kernels/top_k_routing.py); the experts' sum, added
// to it. The other fields are as in `Call`.
struct AfterAttention {
  int64_t attended, residual, output, num_rows;
  Product out;
  NormKind norm;
  Product router;
  int64_t top_k, normalized, rounded;
  Product experts;
  int64_t entries, counts, unit, largest;
  Team team;
};

// A whole decoder layer. New keys and values are written behind those that there are, as the last of `attention.keys`;
// what lies between the parts, heads and what was attended to, is found a place.
struct DecoderStep {
  BeforeAttention before;
  Attention attention;
  AfterAttention after;
};

// So many of them, of which each begins with the output of the one before.
struct DecoderSteps {
  int64_t steps, count;
};

// One plane of a matrix, int32 words [rows, padded * bits / 32], and whether it is to be laid in strips or taken out.
struct Plane {
  int64_t words, rows, padded, block, bits, to_strips;
};

}  // namespace dynaexq
