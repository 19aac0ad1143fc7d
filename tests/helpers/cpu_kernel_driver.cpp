// Runs the CPU kernel on a case that kernel_program.py wrote, every array in an allocation of exactly its size, so
// that a sanitizer sees each byte that is read or written outside of it.
//
//   driver FUNCTION CASE OUTPUT SIZE    CASE: arrays, each after its length in 8 bytes; SIZE: bytes of the output
//
// Which arrays a function has, and in which order, is what it reads here.
#include <cstdio>
#include <fstream>
#include <functional>
#include <map>
#include <string>
#include <thread>

#include "moe.cpp"

namespace {

using dynaexq::AfterAttention, dynaexq::Attention, dynaexq::BeforeAttention, dynaexq::Call, dynaexq::DecoderStep,
    dynaexq::DecoderSteps, dynaexq::Layer;

void run_threads(void (*work)(void*), void* data, unsigned count, unsigned) {
  std::vector<std::thread> threads;
  for (unsigned i = 1; i < count; i++) threads.emplace_back(work, data);
  work(data);
  for (auto& thread : threads) thread.join();
}

// The arrays of a case, one after the other; they stay where they are.
class Case {
 public:
  explicit Case(const char* path) : from(path, std::ios::binary) {}

  // The address of the next, or 0 where it is empty.
  int64_t next() {
    int64_t size;
    from.read((char*)&size, sizeof size);
    // Upgrades are aligned, and their sizes are multiples of 256.
    arrays.emplace_back(size % 256 ? std::malloc(size) : std::aligned_alloc(256, size), std::free);
    from.read((char*)arrays.back().get(), size);
    return size ? (int64_t)arrays.back().get() : 0;
  }

  template <typename Structure>
  Structure& structure() {
    return *(Structure*)next();
  }

  Layer& layer() {
    auto& layer = structure<Layer>();
    layer.base = next();
    return layer;
  }

  // Kinds, and one upgrade for every kind that is not 0, as entries.
  int64_t entries(const Layer& layer) {
    const int64_t entries = next();
    for (int64_t expert = 0; expert < layer.num_experts; expert++)
      if (int64_t& entry = ((int64_t*)entries)[expert]) entry |= next();
    return entries;
  }

 private:
  std::ifstream from;
  std::vector<std::unique_ptr<void, decltype(&std::free)>> arrays;
};

int forward(Case& from, int64_t output) {
  auto& layer = from.layer();
  auto& call = from.structure<Call>();
  call.hidden_states = from.next(), call.top_k_index = from.next(), call.top_k_weights = from.next();
  call.entries = from.entries(layer), call.output = output, call.team.parallel = (int64_t)run_threads;
  return dynaexq_forward(&layer, &call);
}

int attend(Case& from, int64_t output) {
  auto& call = from.structure<Attention>();
  call.query = from.next(), call.key = from.next(), call.value = from.next(), call.mask = from.next();
  call.output = output, call.team.parallel = (int64_t)run_threads;
  return dynaexq_attend(&call);
}

int before_attention(Case& from, int64_t output) {
  auto& call = from.structure<BeforeAttention>();
  call.rows = from.next(), call.cosine = from.next(), call.sine = from.next(), call.norm.weight = from.next();
  for (auto& norm : call.head_norms) norm.weight = from.next();
  std::vector<std::unique_ptr<uint16_t[]>> outputs;
  std::vector<int64_t> sizes;
  for (int i = 0; i < 3; i++) {
    auto& layer = from.layer();
    sizes.push_back(call.num_rows * layer.up.rows);
    outputs.emplace_back(new uint16_t[sizes[i]]);
    call.products[i].layer = (int64_t)&layer, call.outputs[i] = (int64_t)outputs[i].get();
  }
  call.team.parallel = (int64_t)run_threads;
  const int failed = dynaexq_before_attention(&call);
  auto* to = (uint16_t*)output;
  for (int i = 0; i < 3; i++) to = std::copy_n(outputs[i].get(), sizes[i], to);
  return failed;
}

int after_attention(Case& from, int64_t output) {
  auto& call = from.structure<AfterAttention>();
  call.attended = from.next(), call.residual = from.next(), call.norm.weight = from.next();
  call.out.layer = (int64_t)&from.layer(), call.router.layer = (int64_t)&from.layer();
  auto& experts = from.layer();
  call.experts.layer = (int64_t)&experts, call.counts = from.next(), call.entries = from.entries(experts);
  call.output = output, call.team.parallel = (int64_t)run_threads;
  return dynaexq_after_attention(&call);
}

// One layer; of its output, keys and values.
int pass_layers(Case& from, int64_t output) {
  auto& step = from.structure<DecoderStep>();
  auto& [before, attention, after] = step;
  before.rows = after.residual = from.next(), before.cosine = from.next(), before.sine = from.next();
  for (auto* norm : {&before.norm, &before.head_norms[0], &before.head_norms[1], &after.norm})
    norm->weight = from.next();
  for (auto* product : {&before.products[0], &before.products[1], &before.products[2], &after.out, &after.router})
    product->layer = (int64_t)&from.layer();
  attention.key = from.next(), attention.value = from.next(), attention.mask = from.next();
  auto& experts = from.layer();
  after.experts.layer = (int64_t)&experts, after.counts = from.next(), after.entries = from.entries(experts);
  after.output = output;
  before.team.parallel = attention.team.parallel = after.team.parallel = (int64_t)run_threads;
  const DecoderSteps steps{(int64_t)&step, 1};
  const int failed = dynaexq_pass_layers(&steps);
  const int64_t rows = before.num_rows * before.norm.columns;
  const int64_t cached = attention.batch * attention.groups * attention.keys * attention.width;
  auto* to = std::copy_n((const uint16_t*)attention.key, cached, (uint16_t*)output + rows);
  std::copy_n((const uint16_t*)attention.value, cached, to);
  return failed;
}

}  // namespace

int main(int, char** arguments) {
  const std::map<std::string, std::function<int(Case&, int64_t)>> functions{{"forward", forward},
                                                                            {"attend", attend},
                                                                            {"before_attention", before_attention},
                                                                            {"after_attention", after_attention},
                                                                            {"pass_layers", pass_layers}};
  Case from(arguments[2]);
  const int64_t size = std::stoll(arguments[4]);
  std::unique_ptr<uint8_t[]> output(new uint8_t[size]);
  const int failed = functions.at(arguments[1])(from, (int64_t)output.get());
  std::ofstream(arguments[3], std::ios::binary).write((char*)output.get(), size);
  return failed;
}
