// Marks codec functions as callable from host and device; both sides compile the same text, so bytes agree.
#pragma once

#if defined(__CUDACC__)
#define DSV4_HD __host__ __device__
#else
#define DSV4_HD
#endif
