// Runs the CPU kernel on a case that kernel_program.py wrote, every array in an allocation of exactly its size, so
// that a sanitizer sees each byte that is read or written outside of it.
//
//   driver FUNCTION CASE OUTPUT SIZE    CASE: arrays, each after its length in 8 bytes; SIZE: bytes of the output
//
// For `forward` the arrays are: layer, call, base, kinds, rows, ids, weights, one upgrade for every kind that is not
// 0; for `attend`: the call, queries, keys, values, the mask.
#include <cstdio>
#include <fstream>
#include <string>
#include <thread>

#include "moe.cpp"

namespace {

using Bytes = std::unique_ptr<uint8_t[]>;

Bytes read(std::ifstream& from, int64_t& size) {
  from.read((char*)&size, sizeof size);
  Bytes bytes(new uint8_t[size]);
  from.read((char*)bytes.get(), size);
  return bytes;
}

void run_threads(void (*work)(void*), void* data, unsigned count, unsigned) {
  std::vector<std::thread> threads;
  for (unsigned i = 1; i < count; i++) threads.emplace_back(work, data);
  work(data);
  for (auto& thread : threads) thread.join();
}

int forward(std::ifstream& from, int64_t output) {
  int64_t size;
  Bytes layer_bytes = read(from, size), call_bytes = read(from, size);
  auto& layer = *(dynaexq::Layer*)layer_bytes.get();
  auto& call = *(dynaexq::Call*)call_bytes.get();
  Bytes base = read(from, size), kinds = read(from, size), rows = read(from, size), ids = read(from, size),
        weights = read(from, size);
  std::vector<void*> upgrades;
  for (int64_t expert = 0; expert < layer.num_experts; expert++) {
    int64_t& entry = ((int64_t*)kinds.get())[expert];
    if (!entry) continue;
    Bytes upgrade = read(from, size);
    upgrades.push_back(std::aligned_alloc(256, size));  // sizes are multiples of 256
    std::copy_n(upgrade.get(), size, (uint8_t*)upgrades.back());
    entry |= (int64_t)upgrades.back();
  }
  layer.base = (int64_t)base.get();
  call.hidden_states = (int64_t)rows.get(), call.top_k_index = call.top_k_index ? (int64_t)ids.get() : 0;
  call.top_k_weights = (int64_t)weights.get(), call.entries = (int64_t)kinds.get();
  call.output = output, call.parallel = (int64_t)run_threads;
  const int failed = dynaexq_forward(&layer, &call);
  for (void* upgrade : upgrades) std::free(upgrade);
  return failed;
}

int attend(std::ifstream& from, int64_t output) {
  int64_t size;
  Bytes bytes = read(from, size);
  auto& call = *(dynaexq::Attention*)bytes.get();
  Bytes query = read(from, size), key = read(from, size), value = read(from, size), mask = read(from, size);
  call.query = (int64_t)query.get(), call.key = (int64_t)key.get(), call.value = (int64_t)value.get();
  call.mask = (int64_t)mask.get(), call.output = output, call.parallel = (int64_t)run_threads;
  return dynaexq_attend(&call);
}

}  // namespace

int main(int, char** arguments) {
  std::ifstream from(arguments[2], std::ios::binary);
  const int64_t size = std::stoll(arguments[4]);
  Bytes output(new uint8_t[size]);
  const bool attends = arguments[1] == std::string("attend");
  const int failed = (attends ? attend : forward)(from, (int64_t)output.get());
  std::ofstream(arguments[3], std::ios::binary).write((char*)output.get(), size);
  return failed;
}
