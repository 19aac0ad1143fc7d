// One layer of experts as llama.cpp computes it, behind a C interface: a product of all chosen experts for each of the
// three matrices, SwiGLU between them, routing weights, and a sum over the choices. Built by llama_experts.py.
#include <strings.h>

#include <map>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

namespace {

struct Graph {
  ggml_cgraph* nodes;
  ggml_tensor *rows, *ids, *weights, *output;
};

class Experts {
 public:
  Experts(ggml_type type, int experts, int hidden, int inner, int top_k, int threads)
      : hidden(hidden), top_k(top_k), backend(ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr)) {
    ggml_backend_cpu_set_n_threads(backend, threads);
    auto matrices = [&](ggml_backend_buffer_type_t room) {
      ggml_context* context = ggml_init({4 * ggml_tensor_overhead(), nullptr, true});
      gate = ggml_new_tensor_3d(context, type, hidden, inner, experts);
      up = ggml_new_tensor_3d(context, type, hidden, inner, experts);
      down = ggml_new_tensor_3d(context, type, inner, hidden, experts);
      return ggml_backend_alloc_ctx_tensors_from_buft(context, room);
    };
    // What llama.cpp takes by itself: rows interleaved, where it has kernels for that.
    ggml_backend_buffer_type_t interleaved = interleaving_buffers();
    ggml_backend_buffer_t buffer = interleaved ? matrices(interleaved) : nullptr;
    if (!buffer || !gate->extra) buffer = matrices(ggml_backend_get_default_buffer_type(backend));
    ggml_backend_buffer_set_usage(buffer, GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    for (ggml_tensor* matrix : {gate, up, down}) fill(matrix);
  }

  int64_t nbytes_per_expert() const { return (ggml_nbytes(gate) + ggml_nbytes(up) + ggml_nbytes(down)) / gate->ne[2]; }

  void run(int tokens, const float* rows, const int32_t* ids, const float* weights, float* output) {
    Graph& graph = graph_for(tokens);
    ggml_backend_tensor_set(graph.rows, rows, 0, ggml_nbytes(graph.rows));
    ggml_backend_tensor_set(graph.ids, ids, 0, ggml_nbytes(graph.ids));
    ggml_backend_tensor_set(graph.weights, weights, 0, ggml_nbytes(graph.weights));
    if (ggml_backend_graph_compute(backend, graph.nodes) != GGML_STATUS_SUCCESS) throw std::runtime_error("failed");
    ggml_backend_tensor_get(graph.output, output, 0, ggml_nbytes(graph.output));
  }

 private:
  static ggml_backend_buffer_type_t interleaving_buffers() {
    ggml_backend_dev_t device = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    auto* types = (ggml_backend_dev_get_extra_bufts_t)ggml_backend_reg_get_proc_address(
        ggml_backend_dev_backend_reg(device), "ggml_backend_dev_get_extra_bufts");
    for (auto* type = types ? types(device) : nullptr; type && *type; type++)
      if (ggml_backend_buft_name(*type) == std::string("CPU_REPACK")) return *type;
    return nullptr;
  }

  // Sixteen random rows, over and over: what weights mean changes no time.
  static void fill(ggml_tensor* matrix) {
    const int64_t columns = matrix->ne[0], rows = ggml_nrows(matrix);
    std::mt19937 random(1);
    std::normal_distribution<float> normal(0, 0.02f);
    std::vector<float> values(16 * columns), importance(columns, 1);
    for (float& value : values) value = normal(random);
    std::vector<char> some(16 * ggml_row_size(matrix->type, columns)), all;
    ggml_quantize_chunk(matrix->type, values.data(), some.data(), 0, 16, columns, importance.data());
    for (int64_t row = 0; row < rows; row += 16) all.insert(all.end(), some.begin(), some.end());
    ggml_backend_tensor_set(matrix, all.data(), 0, all.size());
  }

  Graph& graph_for(int tokens) {
    auto [place, is_new] = graphs.try_emplace(tokens);
    Graph& graph = place->second;
    if (!is_new) return graph;
    ggml_context* context = ggml_init({64 * ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true});
    graph.rows = ggml_new_tensor_3d(context, GGML_TYPE_F32, hidden, 1, tokens);
    graph.ids = ggml_new_tensor_2d(context, GGML_TYPE_I32, top_k, tokens);
    graph.weights = ggml_new_tensor_3d(context, GGML_TYPE_F32, 1, top_k, tokens);
    ggml_tensor* gated = ggml_swiglu_split(context, ggml_mul_mat_id(context, gate, graph.rows, graph.ids),
                                           ggml_mul_mat_id(context, up, graph.rows, graph.ids));
    ggml_tensor* all = ggml_mul(context, ggml_mul_mat_id(context, down, gated, graph.ids), graph.weights);
    graph.output = nullptr;
    for (int choice = 0; choice < top_k; choice++) {
      ggml_tensor* one = ggml_view_2d(context, all, hidden, tokens, all->nb[2], choice * all->nb[1]);
      graph.output = graph.output ? ggml_add(context, graph.output, one) : one;
    }
    graph.nodes = ggml_new_graph(context);
    ggml_build_forward_expand(graph.nodes, graph.output);
    ggml_backend_alloc_ctx_tensors(context, backend);
    return graph;
  }

  const int hidden, top_k;
  ggml_backend_t backend;
  ggml_tensor *gate = nullptr, *up = nullptr, *down = nullptr;
  std::map<int, Graph> graphs;
};

}  // namespace

// Null where there is no type of this name.
extern "C" void* experts_new(const char* type, int experts, int hidden, int inner, int top_k, int threads) {
  for (int i = 0; i < GGML_TYPE_COUNT; i++) {
    const char* name = ggml_type_name(ggml_type(i));
    if (name && !strcasecmp(name, type)) return new Experts(ggml_type(i), experts, hidden, inner, top_k, threads);
  }
  return nullptr;
}

extern "C" int64_t experts_nbytes(const void* experts) { return ((const Experts*)experts)->nbytes_per_expert(); }

extern "C" void experts_run(void* experts, int tokens, const float* rows, const int32_t* ids, const float* weights,
                            float* output) {
  ((Experts*)experts)->run(tokens, rows, ids, weights, output);
}
