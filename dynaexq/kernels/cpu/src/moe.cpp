// What the library offers; `native.py`, `native_decoder.py` and `strips.py` call it.
#include <algorithm>
#include <new>

#include "attention.h"
#include "decoder.h"
#include "interface.h"
#include "layer.h"
#include "norm.h"
#include "rearrange.h"

namespace dynaexq {
namespace {

// 0, or 1 where memory ran out; nothing has been written then.
template <typename Work>
int status_of(Work work) {
  try {
    work();
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

}  // namespace
}  // namespace dynaexq

extern "C" int dynaexq_forward(const dynaexq::Layer* layer, dynaexq::Call* call) {
  return dynaexq::status_of([&] { dynaexq::Forward(*layer, *call).run(); });
}

extern "C" int dynaexq_rearrange(const dynaexq::Plane* plane) {
  return dynaexq::status_of([&] { dynaexq::rearrange(*plane); });
}

extern "C" int dynaexq_normalize(const dynaexq::Norm* norm) {
  return dynaexq::status_of(
      [&] { dynaexq::normalize(norm->kind, (const uint16_t*)norm->rows, norm->num_rows, (uint16_t*)norm->output); });
}

extern "C" int dynaexq_attend(dynaexq::Attention* attention) {
  return dynaexq::status_of([&] { dynaexq::DecodeAttention(*attention).run(); });
}

extern "C" int dynaexq_before_attention(dynaexq::BeforeAttention* call) {
  return dynaexq::status_of([&] { dynaexq::before_attention(*call); });
}

extern "C" int dynaexq_pass_layers(const dynaexq::DecoderSteps* layers) {
  return dynaexq::status_of(
      [&] { std::for_each_n((dynaexq::DecoderStep*)layers->steps, layers->count, dynaexq::pass); });
}

extern "C" int dynaexq_after_attention(dynaexq::AfterAttention* call) {
  return dynaexq::status_of([&] { dynaexq::after_attention(*call); });
}
