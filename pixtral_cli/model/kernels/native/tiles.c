/* y = x W^T for many rows of x, in AVX512-BF16: a panel of 64 rows of W after the other is decoded, put in the order of
 * the product and multiplied while it is in a core's cache.
 *
 * vdpbf16ps adds products of pairs, so a panel has pairs of columns of 64 rows side by side: four registers. Six rows
 * of x take 24 registers of sums in float32; every sum adds its pairs in the order of columns, whatever stands beside
 * it. Letters: N rows of x, R rows of W, C columns. */
#include "decode.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <string.h>

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#endif

#define PANEL 64        /* rows of W */
#define AT_ONCE 6       /* rows of x */
#define DEPTH 1024      /* columns that are decoded at a time: a panel takes 128 KiB of a core's cache */
#define MOST_ROWS 1024  /* rows of x for which a panel is decoded: their sums take 256 KiB */
#define STEP 256        /* columns decoded before they are put in order: the largest block of any encoding */

struct tiles {
    const struct matrix *matrix;
    long tokens, x_stride, y_stride, parts, tokens_a_part;
    const uint16_t *x;
    uint16_t *y;
};

/* 32 columns of 16 rows, `stride` apart -> 16 pairs of columns, those of 16 rows side by side. */
static inline void put_in_order(const uint16_t *rows, long stride, uint16_t *panel) {
    __m512i a[16], b[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++)
        a[i] = _mm512_loadu_si512(rows + i * stride);
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) { /* a[i + j]: pair j of each quarter of the columns, of rows i to i + 3 */
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        __m512i even = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x88), odd = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xdd);
        __m512i even_too = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x88);
        __m512i odd_too = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xdd);
        _mm512_store_si512(panel + 2 * PANEL * j, _mm512_shuffle_i32x4(even, even_too, 0x88));
        _mm512_store_si512(panel + 2 * PANEL * (j + 4), _mm512_shuffle_i32x4(odd, odd_too, 0x88));
        _mm512_store_si512(panel + 2 * PANEL * (j + 8), _mm512_shuffle_i32x4(even, even_too, 0xdd));
        _mm512_store_si512(panel + 2 * PANEL * (j + 12), _mm512_shuffle_i32x4(odd, odd_too, 0xdd));
    }
}

/* Columns [first, first + count) of the PANEL rows from `row` on; rows that are not there are zeros. */
static void fill(const struct tiles *of, long row, long first, long count, uint16_t *panel) {
    const struct matrix *matrix = of->matrix;
    uint16_t decoded[16][STEP];
    for (int group = 0; group < PANEL; group += 16)
        for (long at = 0; at < count; at += STEP) {
            long some = count - at < STEP ? count - at : STEP, left = matrix->rows - row - group, stride = STEP;
            const uint16_t *rows = decoded[0];
            if (matrix->encoding == BFLOAT16 && left >= 16) {
                rows = (const uint16_t *)(matrix->bytes + (row + group) * matrix->row_bytes) + first + at;
                stride = matrix->row_bytes / 2;
            } else
                for (int i = 0; i < 16; i++)
                    if (i < left)
                        pixtral_bfloat16s_avx512bf16(matrix, row + group + i, first + at, some, decoded[i]);
                    else
                        memset(decoded[i], 0, sizeof decoded[i]);
            for (long c = 0; c < some; c += 32)
                put_in_order(rows + c, stride, panel + (at + c) * PANEL + 2 * group);
        }
}

/* Adds to sums [rows, PANEL] the products of `rows` rows of x with a panel of `pairs` pairs of columns; `next` is what
 * of x comes after. */
static inline __attribute__((always_inline)) void add_products(int rows, const uint16_t *x, long stride,
                                                               const uint16_t *next, const uint16_t *panel,
                                                               long pairs, int begin, float *sums) {
    __m512 sum[AT_ONCE][4];
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++)
            sum[i][j] = begin ? _mm512_setzero_ps() : _mm512_load_ps(sums + i * PANEL + 16 * j);
    for (long some = 0; some < pairs; some += 16) {
#pragma GCC unroll 6
        for (int i = 0; i < rows; i++)
            _mm_prefetch((const char *)(next + i * stride + 2 * some), _MM_HINT_T0);
#pragma GCC unroll 2
        for (long pair = some; pair < some + 16; pair++) {
            __m512bh w[4];
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++)
                w[j] = (__m512bh)_mm512_load_si512(panel + 2 * PANEL * pair + 32 * j);
#pragma GCC unroll 6
            for (int i = 0; i < rows; i++) {
                int32_t two;
                memcpy(&two, x + i * stride + 2 * pair, 4);
                __m512bh both = (__m512bh)_mm512_set1_epi32(two);
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++)
                    sum[i][j] = _mm512_dpbf16_ps(sum[i][j], both, w[j]);
            }
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++)
            _mm512_store_ps(sums + i * PANEL + 16 * j, sum[i][j]);
}

static void multiply(long rows, const uint16_t *x, long stride, const uint16_t *panel, long pairs, int begin,
                     float *sums) {
    for (; rows >= AT_ONCE; rows -= AT_ONCE, x += AT_ONCE * stride, sums += AT_ONCE * PANEL) {
        const uint16_t *next = rows >= 2 * AT_ONCE ? x + AT_ONCE * stride : x;
        add_products(AT_ONCE, x, stride, next, panel, pairs, begin, sums);
    }
    switch (rows) {
    case 1: add_products(1, x, stride, x, panel, pairs, begin, sums); break;
    case 2: add_products(2, x, stride, x, panel, pairs, begin, sums); break;
    case 3: add_products(3, x, stride, x, panel, pairs, begin, sums); break;
    case 4: add_products(4, x, stride, x, panel, pairs, begin, sums); break;
    case 5: add_products(5, x, stride, x, panel, pairs, begin, sums); break;
    }
}

static void round_into(const float *sums, long tokens, long rows, uint16_t *y, long stride) {
    for (long n = 0; n < tokens; n++)
        for (long j = 0; j < rows; j += 16) {
            __mmask16 there = rows - j < 16 ? (__mmask16)((1 << (rows - j)) - 1) : 0xffff;
            __m256i rounded = (__m256i)_mm512_cvtneps_pbh(_mm512_load_ps(sums + n * PANEL + j));
            _mm256_mask_storeu_epi16(y + n * stride + j, there, rounded);
        }
}

static void multiply_panel(void *argument, long chunk) {
    const struct tiles *of = argument;
    long columns = of->matrix->columns, row = chunk / of->parts * PANEL, token = chunk % of->parts * of->tokens_a_part;
    long rows = of->matrix->rows - row < PANEL ? of->matrix->rows - row : PANEL;
    long tokens = of->tokens - token < of->tokens_a_part ? of->tokens - token : of->tokens_a_part;
    uint16_t *panel = pixtral_scratch(PANEL * (DEPTH * sizeof(uint16_t) + (size_t)tokens * sizeof(float)));
    float *sums = (float *)(panel + PANEL * DEPTH);
    const uint16_t *x = of->x + token * of->x_stride;
    for (long first = 0; first < columns; first += DEPTH) {
        long depth = columns - first < DEPTH ? columns - first : DEPTH;
        fill(of, row, first, depth, panel);
        multiply(tokens, x + first, of->x_stride, panel, depth / 2, first == 0, sums);
    }
    round_into(sums, tokens, rows, of->y + token * of->y_stride + row, of->y_stride);
}

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif

/* x [N, C] and y [N, R] in bfloat16, whose rows lie `x_stride` and `y_stride` numbers apart; C is a multiple of 32.
 * Where the instructions in use reach to AVX512-BF16; 0 where they do not, and nothing is written. */
EXPORT int pixtral_multiply_tiles(const struct matrix *matrix, const uint16_t *x, long x_stride, long tokens,
                                  uint16_t *y, long y_stride, int threads) {
#if defined(__x86_64__)
    if (instructions >= AVX512BF16) {
        long panels = (matrix->rows + PANEL - 1) / PANEL, parts = (tokens + MOST_ROWS - 1) / MOST_ROWS;
        long tokens_a_part = parts ? (tokens + parts - 1) / parts : 0;
        struct tiles job = {matrix, tokens, x_stride, y_stride, parts, tokens_a_part, x, y};
        pixtral_parallel_for(multiply_panel, &job, panels * parts, threads);
        return 1;
    }
#endif
    (void)matrix, (void)x, (void)x_stride, (void)tokens, (void)y, (void)y_stride, (void)threads;
    return 0;
}
