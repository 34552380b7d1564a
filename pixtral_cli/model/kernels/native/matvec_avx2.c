/* Rows of a matrix times vectors, with AVX2, FMA and F16C. */
#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define L 8
#define TABLE pixtral_avx2_kernel
#include "matvec_float.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
