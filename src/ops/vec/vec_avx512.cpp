// Vector kernels for AVX-512: 16 lanes.
#define DSV4_VEC_NAMESPACE vec_avx512
#define DSV4_VEC_LANES 16
#include "ops/vec/vec_kernels.inl"
