// Vector kernels for AVX2 + FMA: 8 lanes.
#define DSV4_VEC_NAMESPACE vec_avx2
#define DSV4_VEC_LANES 8
#include "ops/vec/vec_kernels.inl"
