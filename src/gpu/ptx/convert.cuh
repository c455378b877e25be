// Conversions between float formats, packed bf16 arithmetic, and a few single instructions (PTX ISA 9.7.9.22, 9.7.3).
//
// The only place that asks which architecture is being compiled: cvt to e2m1 exists on arch-specific Blackwell targets only.
#pragma once

#include <cstdint>

namespace dsv4::ptx {

#if defined(__CUDA_ARCH_SPECIFIC__) && __CUDA_ARCH_SPECIFIC__ >= 1000
inline constexpr bool kHasCvtE2m1 = true;
#else
inline constexpr bool kHasCvtE2m1 = false;
#endif

// Low nibble = even, high nibble = odd; RNE, saturates, NaN -> 0x7. Only where kHasCvtE2m1.
__device__ __forceinline__ uint32_t cvt_e2m1x2(float even, float odd) {
#if defined(__CUDA_ARCH_SPECIFIC__) && __CUDA_ARCH_SPECIFIC__ >= 1000
  uint32_t result;
  asm("{\n .reg .b8 byte;\n cvt.rn.satfinite.e2m1x2.f32 byte, %1, %2;\n cvt.u32.u8 %0, byte;\n}"
      : "=r"(result)
      : "f"(odd), "f"(even));
  return result;
#else
  (void)even, (void)odd;
  return 0;
#endif
}

// Low byte = even; RNE, saturates to 448, NaN -> 0x7f.
__device__ __forceinline__ uint32_t cvt_e4m3x2(float even, float odd) {
  uint16_t result;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(result) : "f"(odd), "f"(even));
  return result;
}

// Two e4m3 in the low 16 bits -> two f16, exact; NaN -> NaN.
__device__ __forceinline__ uint32_t cvt_f16x2_e4m3x2(uint32_t codes) {
  uint32_t result;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(result) : "h"(static_cast<uint16_t>(codes)));
  return result;
}
// The two halves of an f16x2, widened.
__device__ __forceinline__ float2 cvt_f32_f16x2(uint32_t pair) {
  float2 result;
  asm("{\n .reg .b16 lo, hi;\n mov.b32 {lo, hi}, %2;\n cvt.f32.f16 %0, lo;\n cvt.f32.f16 %1, hi;\n}"
      : "=f"(result.x), "=f"(result.y)
      : "r"(pair));
  return result;
}

// Low half = even; RNE. NaN -> 0x7fff.
__device__ __forceinline__ uint32_t cvt_bf16x2(float even, float odd) {
  uint32_t result;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(odd), "f"(even));
  return result;
}
__device__ __forceinline__ float low_bf16(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_bf16(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }
// Exact.
__device__ __forceinline__ double cvt_f64_bf16(uint32_t bits) {
  double result;
  asm("cvt.f64.bf16 %0, %1;" : "=d"(result) : "h"(static_cast<uint16_t>(bits)));
  return result;
}

// Packed bf16 product, each half rounded once; subnormals kept.
__device__ __forceinline__ uint32_t mul_bf16x2(uint32_t a, uint32_t b) {
  uint32_t result;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
}

// Packed bf16 minimum and maximum: NaN if either is (_nan), else the number of a number and a NaN.
__device__ __forceinline__ uint32_t max_nan_bf16x2(uint32_t a, uint32_t b) {
  uint32_t result;
  asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
}
// Larger magnitude of each half, under the product of their signs; NaN if either is.
__device__ __forceinline__ uint32_t max_magnitude_bf16x2(uint32_t a, uint32_t b) {
  uint32_t result;
  asm("max.NaN.xorsign.abs.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
}
__device__ __forceinline__ uint32_t min_nan_bf16x2(uint32_t a, uint32_t b) {
  uint32_t result;
  asm("min.NaN.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
}

// Each half of a brought into [-|b|, |b|]; sign of a if b is positive; NaN if either is.
__device__ __forceinline__ uint32_t clamp_bf16x2(uint32_t a, uint32_t b) {
  uint32_t result;
  asm("min.NaN.xorsign.abs.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
}

// Larger of the two; NaN if either is.
__device__ __forceinline__ float max_nan(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}
// Smaller of the two; NaN if either is.
__device__ __forceinline__ float min_nan(float a, float b) {
  float result;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}
// 1/x within 1 ulp.
__device__ __forceinline__ float rcp_approx(float x) {
  float result;
  asm("rcp.approx.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
// 1/sqrt(x) within 2 ulp.
__device__ __forceinline__ float rsqrt_approx(float x) {
  float result;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
// The same; subnormal numbers and results become 0. One instruction where the one above takes six.
__device__ __forceinline__ float rcp_approx_ftz(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// 2^x within 2 ulp; results below 2^-126 become 0.
__device__ __forceinline__ float exp2_approx(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// a * b + c in one instruction, also where b is a power of two.
__device__ __forceinline__ uint64_t multiply_add_wide(uint32_t a, uint32_t b, uint64_t c) {
  uint64_t result;
  asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(result) : "r"(a), "r"(b), "l"(c));
  return result;
}
__device__ __forceinline__ uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  return __byte_perm(a, b, selector);
}

}  // namespace dsv4::ptx
