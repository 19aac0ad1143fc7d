// Vectors of Arm's NEON with dot products of bytes (Armv8.2). See `vector.h`.
#pragma once

#include <arm_neon.h>

#include <cstdint>

#include "numbers.h"

namespace dynaexq {

struct Neon {
  static constexpr int HALFWORDS = 8;
  static constexpr int FLOATS = 4;
  static constexpr int ROWS = 8;
  using Halfwords = uint16x8_t;
  using Floats = float32x4_t;

  static Halfwords load(const uint16_t* from) { return vld1q_u16(from); }

  using Words = uint32x4_t;
  static Words load(const uint32_t* from) { return vld1q_u32(from); }
  static void store(uint32_t* to, Words v) { vst1q_u32(to, v); }
  static Words repeat(const void* word) { return vdupq_n_u32(uint32_t(unaligned(word))); }

  static uint8x16_t bytes(Words v) { return vreinterpretq_u8_u32(v); }
  static Words words(uint8x16_t v) { return vreinterpretq_u32_u8(v); }

  template <int BITS>
  static Words shift_right(Words v) {
    return words(vshrq_n_u8(bytes(v), BITS));
  }
  template <int BITS>
  static Words shift_left(Words v) {
    return words(vshlq_n_u8(bytes(v), BITS));
  }
  template <uint8_t MASK>
  static Words mask(Words v) {
    return words(vandq_u8(bytes(v), vdupq_n_u8(MASK)));
  }
  template <uint8_t MASK>
  static Words merge(Words v, Words rest) {
    return words(vbslq_u8(vdupq_n_u8(MASK), bytes(v), bytes(rest)));
  }

  using Ints = int32x4_t;
  static Ints no_ints() { return vdupq_n_s32(0); }
  static Ints add(Ints a, Ints b) { return vaddq_s32(a, b); }
  template <int DEPTH>
  static Ints add_products(Ints sums, Words codes, const int8_t* row) {
    const int8x16_t numbers = vreinterpretq_s8_u32(repeat(row));
#if defined(__ARM_FEATURE_MATMUL_INT8)
    return vusdotq_s32(sums, bytes(codes), numbers);
#else
    auto small = [](Words v) { return vreinterpretq_s8_u32(v); };  // its bytes are below 2**7
    if constexpr (DEPTH < 8) return vdotq_s32(sums, small(codes), numbers);
    const Ints high = vdotq_s32(no_ints(), small(shift_right<4>(codes)), numbers);
    return vaddq_s32(vdotq_s32(sums, small(mask<0x0F>(codes)), numbers), vshlq_n_s32(high, 4));
#endif
  }
  template <int DEPTH>
  static Ints add_products(Ints sums, Words codes, const int16_t* row) {
    const Words even = mask_halves(codes), odd = mask_halves(vshrq_n_u32(codes, 8));
    return add_pairs(add_pairs(sums, even, row), odd, row + 2);
  }
  static Floats floats(Ints v) { return vcvtq_f32_s32(v); }

  template <int INDEX>
  static Floats floats_of(Words v) {
    if constexpr (INDEX > 0) v = vshrq_n_u32(v, 8 * INDEX);
    return vcvtq_f32_u32(vandq_u32(v, vdupq_n_u32(0xFF)));
  }
  static Floats floats(const uint8_t* from) { return vcvtq_f32_u32(vmovl_u16(halves(from))); }

  static void store_rows(const Words (&columns)[4], uint8_t* to, int64_t stride) {
    const uint32x4x2_t ac = vzipq_u32(columns[0], columns[2]), bd = vzipq_u32(columns[1], columns[3]);
    const uint32x4x2_t upper = vzipq_u32(ac.val[0], bd.val[0]), lower = vzipq_u32(ac.val[1], bd.val[1]);
    const Words rows[4] = {upper.val[0], upper.val[1], lower.val[0], lower.val[1]};
    for (int i = 0; i < 4; i++) vst1q_u8(to + i * stride, bytes(rows[i]));
  }

  static Floats even_numbers(Halfwords v) { return vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_u16(v), 16)); }
  static Floats odd_numbers(Halfwords v) {
    return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_u16(v), vdupq_n_u32(0xFFFF0000)));
  }

  static Floats zero() { return vdupq_n_f32(0); }
  static Floats fill(float value) { return vdupq_n_f32(value); }
  static Floats load(const float* from) { return vld1q_f32(from); }
  static void store(float* to, Floats v) { vst1q_f32(to, v); }
  static Floats add(Floats a, Floats b) { return vaddq_f32(a, b); }
  static Floats multiply(Floats a, Floats b) { return vmulq_f32(a, b); }
  static Floats multiply_add(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }

  static void store_sums(float* to, Floats a, Floats b, Floats c, Floats d) {
    vst1q_f32(to, vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d)));
  }

  static Floats load_float16(const uint16_t* from) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from))); }
  static Floats load_middle_bytes(const uint8_t* from) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vshl_n_u16(halves(from), BYTE_IN_FLOAT16)));
  }

 private:
  // FLOATS bytes, each in 16 bits.
  static uint16x4_t halves(const uint8_t* from) {
    const uint8x8_t four = vreinterpret_u8_u32(vdup_n_u32(uint32_t(unaligned(from))));
    return vget_low_u16(vmovl_u8(four));
  }
  static Words mask_halves(Words v) { return vandq_u32(v, vdupq_n_u32(0x00FF00FF)); }
  // The products of both halves of each word with the two numbers.
  static Ints add_pairs(Ints sums, Words halves, const int16_t* numbers) {
    const int16x8_t codes = vreinterpretq_s16_u32(halves), row = vreinterpretq_s16_u32(repeat(numbers));
    const Ints low = vmull_s16(vget_low_s16(codes), vget_low_s16(row)), high = vmull_high_s16(codes, row);
    return vaddq_s32(sums, vpaddq_s32(low, high));
  }
};

}  // namespace dynaexq
