/* `pixtral_multiply`: a few vectors times one matrix or several, straight from the bytes of a file, on all threads.
 *
 * Here are the order of x, the sharing out of rows, and the rounding of results; the arithmetic is in the kernels. */
#define _GNU_SOURCE
#include <math.h>
#include <stdbool.h>
#include <stdlib.h>

#include "matvec.h"

#define MOST_MATRICES 4
#define LEAST 16384 /* bytes of a matrix that a thread takes at a time */
#define AHEAD 4096 /* bytes at the beginning of a part that are asked for at once; the kernels ask for those that follow */
#define BLOCK_ROWS 16 /* that stay in a core's cache while more than AT_ONCE vectors are multiplied with them */
#define ALONE 65536 /* bytes for which a second thread costs more than it saves */

/* Rows of a matrix that one thread multiplies with. */
struct part {
    int which;
    int64_t first, end;
};

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
    int64_t first_of_y[MOST_MATRICES];
    struct part *parts;
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

static void multiply_block(const struct call *call, int which, int64_t first, int64_t end) {
    const struct matrix *matrix = &call->matrices[which];
    float sums[BLOCK_ROWS * AT_ONCE];
    for (int64_t from = 0; from < call->n; from += AT_ONCE) {
        int n = (int)(call->n - from < AT_ONCE ? call->n - from : AT_ONCE);
        struct vectors x = call->prepared[which];
        x.data = (const uint8_t *)x.data + from * x.stride * (narrow_kernel(matrix->encoding) && call->narrow ? 2 : 4);
        if (x.offset_stride)
            x.offsets += from * x.offset_stride;
        call->kernels[which](matrix, first, end, x, n, sums);
        for (int v = 0; v < n; v++)
            for (int64_t row = first; row < end; row++) {
                float sum = sums[(row - first) * AT_ONCE + v];
                if (!isfinite(sum))
                    sum = exactly(call, matrix, row, from + v, sum);
                int64_t place = (from + v) * call->y_stride + call->first_of_y[which] + row;
                if (call->narrow)
                    ((uint16_t *)call->y)[place] = rounded(sum);
                else
                    ((float *)call->y)[place] = sum;
            }
    }
}

static void multiply_part(void *argument, long number) {
    const struct call *call = argument;
    const struct part *part = &call->parts[number];
    const struct matrix *matrix = &call->matrices[part->which];
    for (int64_t at = 0; at < AHEAD; at += 64)
        __builtin_prefetch(matrix->bytes + part->first * matrix->row_bytes + at);
    for (int64_t row = part->first; row < part->end; row += BLOCK_ROWS)
        multiply_block(call, part->which, row, row + BLOCK_ROWS < part->end ? row + BLOCK_ROWS : part->end);
}

/* Parts in the order in which they are taken: large at first, for memory is read fastest in long runs, and ever smaller,
 * so that all threads end together. Their number; where there is room for them they are written. */
static int64_t divide(struct call *call, int64_t bytes, int threads) {
    int64_t parts = 0;
    for (int which = 0; which < call->count; which++) {
        const struct matrix *matrix = &call->matrices[which];
        for (int64_t row = 0; row < matrix->rows; parts++) {
            int64_t size = bytes / (2 * threads) > LEAST ? bytes / (2 * threads) : LEAST;
            int64_t rows = size / matrix->row_bytes > 1 ? size / matrix->row_bytes : 1;
            rows = rows < matrix->rows - row ? rows : matrix->rows - row;
            if (call->parts)
                call->parts[parts] = (struct part){which, row, row + rows};
            row += rows;
            bytes -= rows * matrix->row_bytes;
        }
    }
    return parts;
}

/* Puts x into the order that matrix `which` wants, in memory that begins at *free_memory, unless one before wants the same. */
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
    int64_t bytes = 0;
    for (int which = 0; which < count; which++) {
        if (float_kernel(matrices[which].encoding) == NULL)
            return 1;
        call.first_of_y[which] = call.y_stride;
        call.y_stride += matrices[which].rows;
        bytes += matrices[which].rows * matrices[which].row_bytes;
    }
    int threads = bytes * n <= ALONE || most_threads < 1 ? 1 : most_threads;
    int64_t parts = divide(&call, bytes, threads), for_x = count * n * (matrices[0].columns + 128) * 4;
    uint8_t *memory = pixtral_scratch((size_t)(for_x + parts * (int64_t)sizeof(struct part)));
    call.parts = (struct part *)(memory + for_x);
    divide(&call, bytes, threads);
    for (int which = 0; which < count; which++)
        prepare(&call, which, &memory);
    pixtral_parallel_for(multiply_part, &call, parts, threads);
    return 0;
}
