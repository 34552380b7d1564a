/* What the kernels of `pixtral_multiply` are given: rows of a matrix, as the file has them, and vectors in an order that
 * suits their encoding. matvec.c shares out the work, matvec_float.h and matvec_avx512bf16.c do it.
 *
 * Letters: R rows of the matrix, C columns, N vectors (rows of x). */
#ifndef PIXTRAL_MATVEC_H
#define PIXTRAL_MATVEC_H

#include <string.h>

#include "native.h"

#define ALWAYS_INLINE inline __attribute__((always_inline))
#define AT_ONCE 4 /* the most vectors that a kernel multiplies with at a time */

/* Vectors of a call in the order of a kernel. */
struct vectors {
    const void *data; /* [N, stride] bfloat16 or float32 */
    int64_t stride;   /* numbers */
    const float *offsets; /* [N, offset_stride]: what each block's offsets are multiplied with; NULL or empty where the
                             kernel wants none */
    int64_t offset_stride;
};

/* sums[(row - first) * AT_ONCE + v] = row `row` times vector v, for rows first .. end - 1 and v < n <= AT_ONCE. The same
 * vector gives the same bits whatever n is. */
typedef void multiply_rows(const struct matrix *matrix, int64_t first, int64_t end, struct vectors x, int n, float *sums);

/* Tables by encoding; NULL if there is no such kernel. */
multiply_rows *pixtral_portable_kernel(int encoding);
#if defined(__x86_64__)
multiply_rows *pixtral_avx2_kernel(int encoding);
multiply_rows *pixtral_avx512_kernel(int encoding);

/* Those for vectors in bfloat16, and how they want them: `stride` and `offset_stride` for C columns, and one vector
 * x [C] put into that order. */
multiply_rows *pixtral_avx512bf16_kernel(int encoding);
int64_t pixtral_avx512bf16_stride(int64_t columns);
int64_t pixtral_avx512bf16_offset_stride(int encoding, int64_t columns);
void pixtral_avx512bf16_prepare(int encoding, const uint16_t *x, int64_t columns, uint16_t *ordered, float *offsets);
/* Whether two encodings want the same order. */
int pixtral_avx512bf16_order(int encoding);
#endif

static ALWAYS_INLINE uint32_t word(const uint8_t *at) {
    uint32_t found;
    memcpy(&found, at, 4);
    return found;
}

static ALWAYS_INLINE float as_float(uint32_t bits) {
    float found;
    memcpy(&found, &bits, 4);
    return found;
}

#endif
