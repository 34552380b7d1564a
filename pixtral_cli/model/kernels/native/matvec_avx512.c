/* Rows of a matrix times vectors, with AVX-512 (F, BW, DQ, VL). */
#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
#define L 16
#define TABLE pixtral_avx512_kernel
#include "matvec_float.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
