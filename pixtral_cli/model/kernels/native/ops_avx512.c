/* The small operations for processors with AVX512 (F, BW, DQ, VL). */
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#define OPERATIONS operations_avx512
#include "ops_template.h"
#endif
