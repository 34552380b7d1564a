/* The small operations for processors with AVX2, FMA and F16C. */
#if defined(__x86_64__)
#include <immintrin.h>
#include <math.h>
#include <string.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define OPERATIONS operations_avx2
#include "ops_template.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
