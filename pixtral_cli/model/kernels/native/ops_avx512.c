/* The small operations for processors with AVX512 (F, BW, DQ, VL). */
#if defined(__x86_64__)
#include <immintrin.h>
#include <math.h>
#include <string.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#endif
#define OPERATIONS operations_avx512
#include "ops_template.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
