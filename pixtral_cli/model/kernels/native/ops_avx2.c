/* The small operations for processors with AVX2, FMA and F16C. */
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")
#define OPERATIONS operations_avx2
#include "ops_template.h"
#endif
