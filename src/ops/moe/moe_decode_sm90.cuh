// Packed NVFP4 words -> BF16 fragment registers, exactly. 14 issue slots per eight weights (docs/kernels/moe_sm90.md).
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#include "ops/moe/moe_layout.h"

namespace dsv4::sm90 {

__device__ __forceinline__ uint32_t mul_bf16x2(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

// Factors for shifting left on the FMA pipe: logic runs at half the rate of the issue slots on Hopper and is the busiest pipe of
// these kernels. Not const: from a constant that it knows, ptxas makes shifts again.
static __constant__ uint32_t kShiftLeft2 = 4, kShiftLeft6 = 64;

// Scale byte -> {sf * 2^118, sf * 2^118}.
__device__ __forceinline__ uint32_t decode_sf(uint32_t byte) { return byte * 0x00100010u + 0x70007000u; }

// Eight codes -> four bf16x2, each e2m1 * 2^-126, times sf. 7 logic, 2 integer and 4 bf16 multiplications.
__device__ __forceinline__ void decode_word(uint32_t word, uint32_t sf, uint32_t (&out)[4]) {
  constexpr uint32_t kMask = 0x81C081C0u;
  const uint32_t p0 = (word * kShiftLeft2) & kMask;
  const uint32_t p1 = (word * kShiftLeft6) & kMask;
  const uint32_t p2 = __funnelshift_l(word, word, 12) & kMask;
  const uint32_t p3 = (word & 0x81808180u) | ((word >> 8) & 0x00400040u);
  out[0] = mul_bf16x2(p0, sf);
  out[1] = mul_bf16x2(p1, sf);
  out[2] = mul_bf16x2(p2, sf);
  out[3] = mul_bf16x2(p3, sf);
}

// Fragments of two k16 steps, a[step][0..3] in the order of the instruction (row g / row g + 8 of columns 2t.., then of
// columns 2t + 8..), from one word of row g and one of row g + 8.
__device__ __forceinline__ void decode_half_block(uint32_t low_row, uint32_t high_row, uint32_t sf_low,
                                                  uint32_t sf_high, uint32_t (&a)[2][4]) {
  uint32_t r[4];
  decode_word(low_row, sf_low, r);
  a[0][0] = r[0], a[0][2] = r[1], a[1][0] = r[2], a[1][2] = r[3];
  decode_word(high_row, sf_high, r);
  a[0][1] = r[0], a[0][3] = r[1], a[1][1] = r[2], a[1][3] = r[3];
}

// A thread's share of one m64k64 block: fragments of its four steps.
__device__ __forceinline__ void decode_block(const uint4& codes, uint32_t scales, uint32_t (&a)[2][2][4]) {
  const uint32_t sf_low = decode_sf(scales & 0xff), sf_high = decode_sf(scales >> 8);
  decode_half_block(codes.x, codes.z, sf_low, sf_high, a[0]);
  decode_half_block(codes.y, codes.w, sf_low, sf_high, a[1]);
}

// Two binary32 -> bf16x2, to nearest even in one instruction (NaN becomes 0x7fff: the payload of codec/bf16.h is not kept).
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  uint32_t d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}

// Four 8x8 matrices of 16-bit values; lane 8 m + r names row r of matrix m.
template <int kOffset = 0>
__device__ __forceinline__ void load_matrix_x4(uint32_t* v, uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4 + %5];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(address), "n"(kOffset));
}

template <int kOffset = 0>
__device__ __forceinline__ void load_shared_16(uint4& v, uint32_t address) {
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4 + %5];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address), "n"(kOffset));
}
template <int kOffset = 0>
__device__ __forceinline__ uint32_t load_shared_u8(uint32_t address) {
  uint32_t v;
  asm volatile("ld.shared.u8 %0, [%1 + %2];" : "=r"(v) : "r"(address), "n"(kOffset));
  return v;
}
template <int kOffset = 0>
__device__ __forceinline__ int32_t load_shared_s32(uint32_t address) {
  int32_t v;
  asm volatile("ld.shared.s32 %0, [%1 + %2];" : "=r"(v) : "r"(address), "n"(kOffset));
  return v;
}
__device__ __forceinline__ uint32_t load_shared_u16(uint32_t address) {
  uint16_t v;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(address));
  return v;
}

template <class F, int... kI>
__device__ __forceinline__ void static_for_each(std::integer_sequence<int, kI...>, const F& f) {
  (f(std::integral_constant<int, kI>{}), ...);
}
// f(0), f(1), ..., f(kCount - 1), the argument known at compile time.
template <int kCount, class F>
__device__ __forceinline__ void static_for(const F& f) {
  static_for_each(std::make_integer_sequence<int, kCount>{}, f);
}

}  // namespace dsv4::sm90
