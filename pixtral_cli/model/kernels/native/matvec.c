/* `pixtral_multiply`: a few vectors times one matrix or several, straight from the bytes of a file, on all threads.
 *
 * Here are the order of x, the sharing out of rows, and the rounding of results; the arithmetic is in the kernels. */
#define _GNU_SOURCE
#include <math.h>
#include <stdbool.h>
#include <stdlib.h>

#include "matvec.h"

#define MOST_MATRICES 4
#define CHUNK 65536 /* bytes of a matrix that a thread takes at a time */
#define BLOCK_ROWS 16 /* that stay in a core's cache while more than AT_ONCE vectors are multiplied with them */
#define ALONE 65536 /* bytes for which a second thread costs more than it saves */

struct call {
    const struct matrix *matrices;
    int count;
    bool narrow; /* x and y are bfloat16, else float32 */
    const void *x;
    int64_t n;
    void *y;
    int64_t y_stride;
    struct vectors prepared[MOST_MATRICES];
    multiply_rows *kernels[MOST_MATRICES];
    int64_t chunk_rows[MOST_MATRICES];
};

static multiply_rows *float_kernel(int encoding) {
#if defined(__x86_64__)
    if (instructions >= AVX512)
        return pixtral_avx512_kernel(encoding);
    if (instructions >= AVX2)
        return pixtral_avx2_kernel(encoding);
#endif
    return pixtral_portable_kernel(encoding);
}

/* Whether bfloat16 is multiplied as it is; else x is made float32 first. */
static multiply_rows *narrow_kernel(int encoding) {
#if defined(__x86_64__)
    if (instructions >= AVX512BF16)
        return pixtral_avx512bf16_kernel(encoding);
#endif
    (void)encoding;
    return NULL;
}

static uint16_t rounded(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000)
        return (uint16_t)(bits >> 16 | 0x40); /* not a number, and stays one */
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* One vector in float32, in the order of the kernels of matvec_float.h. */
static void widen(int encoding, bool narrow, const void *x, int64_t columns, float *wide) {
    if (narrow)
        for (int64_t i = 0; i < columns; i++)
            wide[i] = as_float((uint32_t)((const uint16_t *)x)[i] << 16);
    else
        memcpy(wide, x, (size_t)columns * 4);
    if (encoding == NF4)
        for (float *part = wide; part < wide + columns; part += 32) {
            float odd[16];
            for (int i = 0; i < 16; i++) {
                odd[i] = part[2 * i + 1];
                part[i] = part[2 * i];
            }
            memcpy(part + 16, odd, sizeof odd);
        }
}

static const void *vector(const struct call *call, int64_t columns, int64_t v) {
    return (const uint8_t *)call->x + v * columns * (call->narrow ? 2 : 4);
}

/* By the definition: the decoded weights, in float32. Where an infinity or a NaN is about, scaling sums is another thing
 * than scaling weights. */
static float exactly(const struct call *call, const struct matrix *matrix, int64_t row, int64_t v, float otherwise) {
    float *wide = malloc((size_t)matrix->columns * 4), sums[AT_ONCE];
    if (wide == NULL)
        return otherwise;
    widen(matrix->encoding, call->narrow, vector(call, matrix->columns, v), matrix->columns, wide);
    struct vectors x = {.data = wide, .stride = matrix->columns};
    float_kernel(matrix->encoding)(matrix, row, row + 1, x, 1, sums);
    free(wide);
    return sums[0];
}

static void multiply_block(const struct call *call, int which, int64_t first_of_y, int64_t first, int64_t end) {
    const struct matrix *matrix = &call->matrices[which];
    float sums[BLOCK_ROWS * AT_ONCE];
    for (int64_t from = 0; from < call->n; from += AT_ONCE) {
        int n = (int)(call->n - from < AT_ONCE ? call->n - from : AT_ONCE);
        struct vectors x = call->prepared[which];
        x.data = (const uint8_t *)x.data + from * x.stride * (narrow_kernel(matrix->encoding) && call->narrow ? 2 : 4);
        x.offsets += from * x.offset_stride;
        call->kernels[which](matrix, first, end, x, n, sums);
        for (int v = 0; v < n; v++)
            for (int64_t row = first; row < end; row++) {
                float sum = sums[(row - first) * AT_ONCE + v];
                if (!isfinite(sum))
                    sum = exactly(call, matrix, row, from + v, sum);
                int64_t place = (from + v) * call->y_stride + first_of_y + row;
                if (call->narrow)
                    ((uint16_t *)call->y)[place] = rounded(sum);
                else
                    ((float *)call->y)[place] = sum;
            }
    }
}

static int64_t chunks_of(const struct call *call, int which) {
    return (call->matrices[which].rows + call->chunk_rows[which] - 1) / call->chunk_rows[which];
}

static void multiply_chunk(void *argument, long chunk) {
    const struct call *call = argument;
    int which = 0;
    int64_t first_of_y = 0;
    for (; chunk >= chunks_of(call, which); which++) {
        chunk -= chunks_of(call, which);
        first_of_y += call->matrices[which].rows;
    }
    const struct matrix *matrix = &call->matrices[which];
    int64_t end = (chunk + 1) * call->chunk_rows[which];
    end = end < matrix->rows ? end : matrix->rows;
    for (int64_t row = chunk * call->chunk_rows[which]; row < end; row += BLOCK_ROWS)
        multiply_block(call, which, first_of_y, row, row + BLOCK_ROWS < end ? row + BLOCK_ROWS : end);
}

/* Puts x into the order that matrix `which` wants, in memory from *free_memory on, unless one before wants the same. */
static void prepare(struct call *call, int which, uint8_t **free_memory) {
    const struct matrix *matrix = &call->matrices[which];
    struct vectors *x = &call->prepared[which];
    multiply_rows *narrow = call->narrow ? narrow_kernel(matrix->encoding) : NULL;
    call->kernels[which] = narrow ? narrow : float_kernel(matrix->encoding);
#if defined(__x86_64__)
    if (narrow) {
        int order = pixtral_avx512bf16_order(matrix->encoding);
        for (int before = 0; before < which; before++)
            if (pixtral_avx512bf16_order(call->matrices[before].encoding) == order) {
                *x = call->prepared[before];
                return;
            }
        x->stride = pixtral_avx512bf16_stride(matrix->columns);
        x->offset_stride = pixtral_avx512bf16_offset_stride(matrix->encoding, matrix->columns);
        x->data = *free_memory;
        x->offsets = (float *)(*free_memory + call->n * x->stride * 2);
        *free_memory += call->n * (x->stride * 2 + x->offset_stride * 4);
        for (int64_t v = 0; v < call->n; v++)
            pixtral_avx512bf16_prepare(matrix->encoding, vector(call, matrix->columns, v), matrix->columns,
                                       (uint16_t *)x->data + v * x->stride,
                                       x->offset_stride ? (float *)x->offsets + v * x->offset_stride : NULL);
        return;
    }
#endif
    x->stride = matrix->columns;
    x->data = *free_memory;
    *free_memory += call->n * x->stride * 4;
    for (int64_t v = 0; v < call->n; v++)
        widen(matrix->encoding, call->narrow, vector(call, matrix->columns, v), matrix->columns,
              (float *)x->data + v * x->stride);
}

/* y [N, rows of all matrices, one beside the other] = x [N, C] times each of `count` matrices of C columns, with x and y
 * contiguous, both bfloat16 or both float32. 0, or 1 where there is no kernel. */
EXPORT int pixtral_multiply(const struct matrix *matrices, int count, const void *x, int x_encoding, int64_t n, void *y,
                            int most_threads) {
    if (count < 1 || count > MOST_MATRICES)
        return 1;
    struct call call = {.matrices = matrices, .count = count, .narrow = x_encoding == BFLOAT16, .x = x, .n = n, .y = y};
    int64_t columns = matrices[0].columns, chunks = 0, bytes = 0;
    uint8_t *free_memory = pixtral_scratch((size_t)(count * n * (columns + 128) * 4));
    for (int which = 0; which < count; which++) {
        const struct matrix *matrix = &matrices[which];
        if (float_kernel(matrix->encoding) == NULL)
            return 1;
        prepare(&call, which, &free_memory);
        int64_t rows = CHUNK / matrix->row_bytes;
        call.chunk_rows[which] = rows > 1 ? rows : 1;
        call.y_stride += matrix->rows;
        chunks += chunks_of(&call, which);
        bytes += matrix->rows * matrix->row_bytes;
    }
    pixtral_parallel_for(multiply_chunk, &call, chunks, bytes * n <= ALONE ? 1 : most_threads);
    return 0;
}
