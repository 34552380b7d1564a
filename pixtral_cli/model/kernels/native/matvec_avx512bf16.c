/* Rows of a matrix times vectors in bfloat16, with AVX512-BF16: 32 products of an instruction, exact, summed in float32.
 *
 * Codes are integers of at most 8 bits, which bfloat16 has exactly. A block's bytes are taken as words of 16 bits, and
 * `vpermw` looks each up in a table of 32 bfloat16: it reads no more than the lowest 5 bits of a word, so that two
 * tables of 16 side by side take a nibble without a mask, and shifting brings the next one there. What comes out is not
 * in the order of the columns, so the vectors are put into the same order before, once a call. Scales multiply the
 * float32 sums of their group; offsets multiply the group's sum of x. What has its scale in float32 alone (nf4) is left
 * to matvec_float.h. `vdpbf16ps` takes numbers below 2^-126 for zero.
 *
 * weights_cache/codecs/ has the layouts of blocks and where they come from. */
#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")
#endif
#include "matvec.h"

#define UNROLLED _Pragma("GCC unroll 8")
#define EACH_VECTOR UNROLLED for (int v = 0; v < n; v++)
#define AHEAD 4096 /* bytes that are asked for before they are needed: the processor itself stops at the end of a page */
#define SUMS 2     /* of a vector: one would wait for itself */
#define SPAN 128   /* columns that are put into order together */

/* What a piece is given: one row of the matrix, n vectors in its order, the sums that it adds to. */
#define PIECE                                                                                                             \
    const uint8_t *block, const int64_t columns, const uint16_t *const *x, const float *const *offset, __m512 (*sum)[SUMS], \
        const int n

static ALWAYS_INLINE void read_ahead(const uint8_t *at, int bytes) {
    UNROLLED for (int line = 0; line < bytes; line += 64) _mm_prefetch((const char *)at + AHEAD + line, _MM_HINT_T0);
}

static ALWAYS_INLINE __m512 times(__m512 sum, __m512i codes, const uint16_t *x) {
    return _mm512_dpbf16_ps(sum, (__m512bh)codes, (__m512bh)_mm512_loadu_si512(x));
}

static ALWAYS_INLINE __m512i from_table(__m512i table, __m512i words) { return _mm512_permutexvar_epi16(words, table); }

/* bfloat16 of `first` .. first + 31; with `repeat` the second 16 are the first 16 again. */
static ALWAYS_INLINE __m512i table_from(int first, int repeat) {
    uint16_t entries[32];
    for (int i = 0; i < 32; i++) {
        float value = (float)(first + (repeat ? i & 15 : i));
        uint32_t bits;
        memcpy(&bits, &value, 4);
        entries[i] = (uint16_t)(bits >> 16);
    }
    return _mm512_loadu_si512(entries);
}

/* 16 words of the low 32 bytes, 16 of the same 32 bytes again. */
static ALWAYS_INLINE __m512i twice(const uint8_t *at) {
    return _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)at));
}

/* Places a, b, c, d of a register, four times each. */
static ALWAYS_INLINE __m512 each_four_times(__m512 values, int a, int b, int c, int d) {
    return _mm512_permutexvar_ps(_mm512_setr_epi32(a, a, a, a, b, b, b, b, c, c, c, c, d, d, d, d), values);
}

/* q4_0: four blocks of 18 bytes at a time. Words 0, 9, 18 and 27 of their 72 bytes are scales, the others codes. */
static ALWAYS_INLINE void q4_0_blocks(PIECE, int64_t column, int which) {
    const __m512i table = table_from(-8, 1);
    const __m512i words = _mm512_set_epi16(39, 38, 37, 36, 35, 34, 33, 32, 26, 25, 24, 23, 22, 21, 20, 19, 17, 16, 15, 14, 13,
                                           12, 11, 10, 8, 7, 6, 5, 4, 3, 2, 1); /* 32: word 28, of the second register */
    const __m256i scales = _mm256_setr_epi16(0, 0, 0, 0, 9, 9, 9, 9, 18, 18, 18, 18, 27, 27, 27, 27);
    (void)columns, (void)offset;
    __m512i first = _mm512_loadu_si512(block);
    __m512i second = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)(block + 56))); /* few lines read twice */
    __m512i codes = _mm512_permutex2var_epi16(first, words, second);
    __m512 scale = _mm512_cvtph_ps(_mm512_castsi512_si256(_mm512_permutexvar_epi16(_mm512_castsi256_si512(scales), first)));
    __m512i w0 = from_table(table, codes), w1 = from_table(table, _mm512_srli_epi16(codes, 8));
    __m512i w2 = from_table(table, _mm512_srli_epi16(codes, 4)), w3 = from_table(table, _mm512_srli_epi16(codes, 12));
    EACH_VECTOR {
        __m512 group = times(_mm512_setzero_ps(), w0, x[v] + column);
        group = times(group, w1, x[v] + column + 32);
        group = times(group, w2, x[v] + column + 64);
        group = times(group, w3, x[v] + column + 96);
        sum[v][which] = _mm512_fmadd_ps(group, scale, sum[v][which]);
    }
}

static ALWAYS_INLINE void q4_0(PIECE) {
    int64_t column = 0;
    for (; column + 2 * SPAN <= columns; column += 2 * SPAN, block += 144) {
        read_ahead(block, 144);
        q4_0_blocks(block, columns, x, offset, sum, n, column, 0);
        q4_0_blocks(block + 72, columns, x, offset, sum, n, column + SPAN, 1);
    }
    for (; column < columns; column += SPAN, block += 72) {
        uint8_t rest[72] = {0}; /* scales of zero where the row has ended */
        memcpy(rest, block, column + SPAN <= columns ? 72 : (size_t)(columns - column) / 32 * 18);
        q4_0_blocks(rest, columns, x, offset, sum, n, column, 0);
    }
}

/* The scales d s of a block of q4_k or q5_k, in places 0 to 7, and its offsets e o in places 8 to 15. */
static ALWAYS_INLINE __m512 six_bits(const uint8_t *block) {
    __m128i head = _mm_loadu_si128((const __m128i *)block); /* words: d and e, and the three a, b, c of 6-bit fields */
    __m128i low = _mm_srlv_epi32(_mm_shuffle_epi32(head, _MM_SHUFFLE(3, 2, 3, 1)), _mm_setr_epi32(0, 0, 0, 4));
    __m128i high = _mm_srli_epi32(_mm_shuffle_epi32(head, _MM_SHUFFLE(2, 2, 1, 1)), 2);
    low = _mm_and_si128(low, _mm_setr_epi32(0x3f3f3f3f, 0x0f0f0f0f, 0x3f3f3f3f, 0x0f0f0f0f));
    high = _mm_and_si128(high, _mm_setr_epi32(0, 0x30303030, 0, 0x30303030));
    __m512 fields = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_or_si128(low, high)));
    __m512 steps = _mm512_castps128_ps512(_mm_cvtph_ps(head));
    return _mm512_mul_ps(fields, _mm512_permutexvar_ps(_mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1), steps));
}

/* 128 weights of q4_k, q5_k or q6_k, in two times two registers that each have scales of their own. */
static ALWAYS_INLINE void two_pairs(const __m512i codes[4], __m512 first, __m512 second, const uint16_t *const *x,
                                    int64_t column, __m512 (*sum)[SUMS], const int n) {
    EACH_VECTOR {
        __m512 group = times(times(_mm512_setzero_ps(), codes[0], x[v] + column), codes[1], x[v] + column + 32);
        sum[v][0] = _mm512_fmadd_ps(group, first, sum[v][0]);
        group = times(times(_mm512_setzero_ps(), codes[2], x[v] + column + 64), codes[3], x[v] + column + 96);
        sum[v][1] = _mm512_fmadd_ps(group, second, sum[v][1]);
    }
}

/* q4_k: 64 bytes are the nibbles of groups g and g + 1, then of g + 2 and g + 3; even bytes are even weights. */
static ALWAYS_INLINE void q4_k(PIECE) {
    const __m512i table = table_from(0, 1);
    for (int64_t column = 0, at = 0; column < columns; column += 256, at += 16, block += 144) {
        read_ahead(block, 144);
        __m512 scales = six_bits(block);
        EACH_VECTOR sum[v][0] = _mm512_fmadd_ps(scales, _mm512_loadu_ps(offset[v] + at), sum[v][0]);
        UNROLLED for (int half = 0; half < 2; half++) {
            __m512i words = _mm512_loadu_si512(block + 16 + 64 * half);
            __m512i codes[4] = {from_table(table, words), from_table(table, _mm512_srli_epi16(words, 8)),
                                from_table(table, _mm512_srli_epi16(words, 4)), from_table(table, _mm512_srli_epi16(words, 12))};
            int g = 4 * half;
            two_pairs(codes, each_four_times(scales, g, g, g + 2, g + 2), each_four_times(scales, g + 1, g + 1, g + 3, g + 3), x,
                      column + SPAN * half, sum, n);
        }
    }
}

/* The lowest 4 bits of each byte of `nibbles`, and whatever `upper` has above them. */
static ALWAYS_INLINE __m512i below(__m512i nibbles, __m512i upper) {
    return _mm512_ternarylogic_epi32(_mm512_set1_epi32(0x0f0f0f0f), nibbles, upper, 0xca);
}

/* 16 words each shifted left by `low`, and 16 by `high`; those that are negative to the right. */
static ALWAYS_INLINE __m512i shifted(__m512i words, int low, int high) {
    __m512i left = _mm512_inserti64x4(_mm512_set1_epi16(low > 0 ? low : 0), _mm256_set1_epi16(high > 0 ? high : 0), 1);
    __m512i right = _mm512_inserti64x4(_mm512_set1_epi16(low < 0 ? -low : 0), _mm256_set1_epi16(high < 0 ? -high : 0), 1);
    if (low > 0 || high > 0)
        words = _mm512_sllv_epi16(words, left);
    return low < 0 || high < 0 ? _mm512_srlv_epi16(words, right) : words;
}

/* q5_k: as q4_k, with the fifth bits of 32 weights of group g in bit g of 32 bytes. */
static ALWAYS_INLINE void q5_k(PIECE) {
    const __m512i table = table_from(0, 0);
    for (int64_t column = 0, at = 0; column < columns; column += 256, at += 16, block += 176) {
        read_ahead(block, 176);
        __m512 scales = six_bits(block);
        EACH_VECTOR sum[v][0] = _mm512_fmadd_ps(scales, _mm512_loadu_ps(offset[v] + at), sum[v][0]);
        __m512i fifth = twice(block + 16);
        UNROLLED for (int half = 0; half < 2; half++) {
            int g = 4 * half;
            __m512i words = _mm512_loadu_si512(block + 48 + 64 * half);
            __m512i low = below(words, shifted(fifth, 4 - g, 2 - g));
            __m512i high = below(_mm512_srli_epi16(words, 4), shifted(fifth, 3 - g, 1 - g));
            __m512i codes[4] = {from_table(table, low), from_table(table, _mm512_srli_epi16(low, 8)), from_table(table, high),
                                from_table(table, _mm512_srli_epi16(high, 8))};
            two_pairs(codes, each_four_times(scales, g, g, g + 2, g + 2), each_four_times(scales, g + 1, g + 1, g + 3, g + 3), x,
                      column + SPAN * half, sum, n);
        }
    }
}

/* q6_k: 64 bytes of low nibbles, of 32 weights each, then the same bytes' high ones; of 32 bytes, two upper bits each.
 * Two tables of 32 take the 6 bits. */
static ALWAYS_INLINE void q6_k(PIECE) {
    const __m512i table = table_from(-32, 0), second = table_from(0, 0);
    (void)offset;
    for (int64_t column = 0; column < columns; column += 256, block += 210) {
        read_ahead(block, 210);
        __m512 scales = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(block + 192))));
        scales = _mm512_mul_ps(scales, _mm512_set1_ps(_cvtsh_ss((uint16_t)(block[208] | block[209] << 8))));
        UNROLLED for (int half = 0; half < 2; half++) {
            __m512i words = _mm512_loadu_si512(block + 64 * half), pairs = twice(block + 128 + 32 * half);
            __m512i low = below(words, shifted(pairs, 4, 2)), high = below(_mm512_srli_epi16(words, 4), shifted(pairs, 0, -2));
            __m512i codes[4] = {_mm512_permutex2var_epi16(table, low, second),
                                _mm512_permutex2var_epi16(table, _mm512_srli_epi16(low, 8), second),
                                _mm512_permutex2var_epi16(table, high, second),
                                _mm512_permutex2var_epi16(table, _mm512_srli_epi16(high, 8), second)};
            int s = 8 * half;
            two_pairs(codes, each_four_times(scales, s, s + 1, s + 2, s + 3), each_four_times(scales, s + 4, s + 5, s + 6, s + 7), x,
                      column + SPAN * half, sum, n);
        }
    }
}

/* q8_0: a scale and 32 signed bytes. */
static ALWAYS_INLINE void q8_0_block(PIECE, int64_t column, int which) {
    (void)columns, (void)offset;
    __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(block + 2))));
    __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(block + 18))));
    __m512i codes = (__m512i)_mm512_cvtne2ps_pbh(high, low);
    __m512 scale = _mm512_cvtph_ps(_mm256_set1_epi16((int16_t)(block[0] | block[1] << 8)));
    EACH_VECTOR {
        __m512 group = times(_mm512_setzero_ps(), codes, x[v] + column);
        sum[v][which] = _mm512_fmadd_ps(group, scale, sum[v][which]);
    }
}

static ALWAYS_INLINE void q8_0(PIECE) {
    int64_t column = 0;
    for (; column + 64 <= columns; column += 64, block += 68) {
        read_ahead(block, 68);
        q8_0_block(block, columns, x, offset, sum, n, column, 0);
        q8_0_block(block + 34, columns, x, offset, sum, n, column + 32, 1);
    }
    if (column < columns)
        q8_0_block(block, columns, x, offset, sum, n, column, 0);
}

static ALWAYS_INLINE void bfloat16(PIECE) {
    int64_t column = 0;
    (void)offset;
    for (; column + 64 <= columns; column += 64, block += 128) {
        read_ahead(block, 128);
        __m512i first = _mm512_loadu_si512(block), second = _mm512_loadu_si512(block + 64);
        EACH_VECTOR sum[v][0] = times(sum[v][0], first, x[v] + column);
        EACH_VECTOR sum[v][1] = times(sum[v][1], second, x[v] + column + 32);
    }
    for (; column < columns; column += 32, block += 64) {
        __mmask32 there = columns - column < 32 ? (1u << (columns - column)) - 1 : ~0u;
        __m512i rest = _mm512_maskz_loadu_epi16(there, block);
        EACH_VECTOR sum[v][0] = times(sum[v][0], rest, x[v] + column);
    }
}

/* 32 e4m3 codes, each in the low half of a word, times 2^-8. Those with the exponent 0 are looked up by the lowest 5
 * bits. `signs` has their signs in the highest bits of its words. */
static ALWAYS_INLINE __m512i from_e4m3(__m512i words, __m512i signs) {
    const __m512i whole = _mm512_broadcast_i32x4( /* 0 to 7 times 2^-17 */
        _mm_setr_epi16(0, 0x3700, 0x3780, 0x37c0, 0x3800, 0x3820, 0x3840, 0x3860));
    __m512i others = _mm512_ternarylogic_epi32(_mm512_slli_epi16(words, 4), _mm512_set1_epi16(0x07f0),
                                               _mm512_set1_epi16(112 << 7), 0xea);
    __mmask32 small = _mm512_testn_epi16_mask(words, _mm512_set1_epi16(0x78));
    __m512i found = _mm512_mask_permutexvar_epi16(others, small, words, whole);
    return _mm512_ternarylogic_epi32(signs, _mm512_set1_epi16((short)0x8000), found, 0xea);
}

/* fp8: bytes that are codes, of 64 columns first the even ones; scales multiply the sums of their columns. */
static ALWAYS_INLINE void fp8_columns(__m512i words, const uint16_t *const *x, int64_t column, __m512 (*sum)[SUMS],
                                      const int n) {
    __m512i upper = _mm512_srli_epi16(words, 8);
    __m512i even = from_e4m3(words, _mm512_slli_epi16(words, 8)), odd = from_e4m3(upper, words);
    EACH_VECTOR sum[v][0] = times(sum[v][0], even, x[v] + column);
    EACH_VECTOR sum[v][1] = times(sum[v][1], odd, x[v] + column + 32);
}

static ALWAYS_INLINE void fp8(const struct matrix *matrix, int64_t row, const uint16_t *const *x, float *totals,
                              const int n) {
    const uint8_t *codes = matrix->bytes + row * matrix->row_bytes;
    const float *scales = scales_of(matrix, row);
    __m512 total[AT_ONCE];
    EACH_VECTOR total[v] = _mm512_setzero_ps();
    for (int64_t column = 0; column < matrix->columns; scales++) {
        __m512 sum[AT_ONCE][SUMS];
        EACH_VECTOR UNROLLED for (int i = 0; i < SUMS; i++) sum[v][i] = _mm512_setzero_ps();
        int64_t end = column + matrix->block < matrix->columns ? column + matrix->block : matrix->columns;
        for (; column + 64 <= end; column += 64) {
            read_ahead(codes + column, 64);
            fp8_columns(_mm512_loadu_si512(codes + column), x, column, sum, n);
        }
        if (column < end) { /* 32 columns at the end of the row */
            fp8_columns(_mm512_maskz_loadu_epi8(0xffffffff, codes + column), x, column, sum, n);
            column = end;
        }
        __m512 scale = _mm512_set1_ps(*scales * 256);
        EACH_VECTOR total[v] = _mm512_fmadd_ps(_mm512_add_ps(sum[v][0], sum[v][1]), scale, total[v]);
    }
    EACH_VECTOR totals[v] = _mm512_reduce_add_ps(total[v]);
}

static void fp8_kernel(const struct matrix *matrix, int64_t first, int64_t end, struct vectors vectors, int n,
                       float *sums) {
    const uint16_t *x[AT_ONCE];
    for (int v = 0; v < AT_ONCE; v++)
        x[v] = (const uint16_t *)vectors.data + (v < n ? v : 0) * vectors.stride;
    for (int64_t row = first; row < end; row++, sums += AT_ONCE)
        switch (n) {
        case 1: fp8(matrix, row, x, sums, 1); break;
        case 2: fp8(matrix, row, x, sums, 2); break;
        case 3: fp8(matrix, row, x, sums, 3); break;
        default: fp8(matrix, row, x, sums, 4);
        }
}

#define KERNEL(PIECE_NAME)                                                                                              \
    static ALWAYS_INLINE void PIECE_NAME##_rows(const struct matrix *matrix, int64_t first, int64_t end,                \
                                                struct vectors vectors, float *sums, const int n) {                     \
        const uint16_t *x[AT_ONCE];                                                                                     \
        const float *offset[AT_ONCE];                                                                                   \
        EACH_VECTOR {                                                                                                   \
            x[v] = (const uint16_t *)vectors.data + v * vectors.stride;                                                 \
            offset[v] = vectors.offsets + v * vectors.offset_stride;                                                    \
        }                                                                                                               \
        for (int64_t row = first; row < end; row++) {                                                                   \
            __m512 sum[AT_ONCE][SUMS];                                                                                  \
            EACH_VECTOR UNROLLED for (int i = 0; i < SUMS; i++) sum[v][i] = _mm512_setzero_ps();                        \
            PIECE_NAME(matrix->bytes + row * matrix->row_bytes, matrix->columns, x, offset, sum, n);                    \
            EACH_VECTOR sums[(row - first) * AT_ONCE + v] = _mm512_reduce_add_ps(_mm512_add_ps(sum[v][0], sum[v][1]));  \
        }                                                                                                               \
    }                                                                                                                   \
    static void PIECE_NAME##_kernel(const struct matrix *matrix, int64_t first, int64_t end, struct vectors x, int n,   \
                                    float *sums) {                                                                      \
        switch (n) {                                                                                                    \
        case 1: PIECE_NAME##_rows(matrix, first, end, x, sums, 1); break;                                               \
        case 2: PIECE_NAME##_rows(matrix, first, end, x, sums, 2); break;                                               \
        case 3: PIECE_NAME##_rows(matrix, first, end, x, sums, 3); break;                                               \
        default: PIECE_NAME##_rows(matrix, first, end, x, sums, 4);                                                     \
        }                                                                                                               \
    }

KERNEL(bfloat16)
KERNEL(q4_0)
KERNEL(q8_0)
KERNEL(q4_k)
KERNEL(q5_k)
KERNEL(q6_k)

multiply_rows *pixtral_avx512bf16_kernel(int encoding) {
    switch (encoding) {
    case BFLOAT16: return bfloat16_kernel;
    case Q4_0: return q4_0_kernel;
    case Q8_0: return q8_0_kernel;
    case Q4_K: return q4_k_kernel;
    case Q5_K: return q5_k_kernel;
    case Q6_K: return q6_k_kernel;
    case FP8: return fp8_kernel;
    default: return NULL;
    }
}

/* Which of SPAN columns the place `place` has. */
static int column_of(int encoding, int place) {
    int word = place % 32, odd = place / 32 % 2, high = place / 64;
    switch (encoding) {
    case Q4_0: return word / 8 * 32 + word % 8 * 2 + odd + 16 * high;
    case Q4_K: case Q5_K: return word / 16 * 64 + word % 16 * 2 + odd + 32 * high;
    case Q6_K: return word / 16 * 32 + word % 16 * 2 + odd + 64 * high;
    case FP8: return 64 * high + 2 * word + odd;
    default: return place;
    }
}

int64_t pixtral_avx512bf16_stride(int64_t columns) { return (columns + SPAN - 1) / SPAN * SPAN; }

int64_t pixtral_avx512bf16_offset_stride(int encoding, int64_t columns) {
    return encoding == Q4_K || encoding == Q5_K ? columns / 256 * 16 : 0;
}

int pixtral_avx512bf16_order(int encoding) { return encoding == Q5_K ? Q4_K : encoding == Q8_0 ? BFLOAT16 : encoding; }

void pixtral_avx512bf16_prepare(int encoding, const uint16_t *x, int64_t columns, uint16_t *ordered, float *offsets) {
    uint16_t places[SPAN], rest[SPAN] = {0};
    for (int place = 0; place < SPAN; place++)
        places[place] = (uint16_t)column_of(encoding, place);
    memcpy(rest, x + columns / SPAN * SPAN, (size_t)(columns % SPAN) * 2);
    for (int64_t column = 0; column < columns; column += SPAN) {
        const uint16_t *from = column + SPAN <= columns ? x + column : rest;
        __m512i a = _mm512_loadu_si512(from), b = _mm512_loadu_si512(from + 32), c = _mm512_loadu_si512(from + 64),
                d = _mm512_loadu_si512(from + 96);
        UNROLLED for (int part = 0; part < 4; part++) {
            __m512i place = _mm512_loadu_si512(places + 32 * part);
            __mmask32 later = _mm512_test_epi16_mask(place, _mm512_set1_epi16(64));
            __m512i found = _mm512_mask_blend_epi16(later, _mm512_permutex2var_epi16(a, place, b), _mm512_permutex2var_epi16(c, place, d));
            _mm512_storeu_si512(ordered + column + 32 * part, found);
        }
    }
    if (offsets == NULL)
        return;
    /* Of each 256 columns the negative sums of 32, in the places where `six_bits` has the offsets. */
    const __m512i ones = _mm512_set1_epi16(0x3f80);
    for (int64_t group = 0; group < columns / 32; group++) {
        float sum = _mm512_reduce_add_ps(times(_mm512_setzero_ps(), ones, x + 32 * group));
        offsets[group / 8 * 16 + group % 8] = 0;
        offsets[group / 8 * 16 + 8 + group % 8] = -sum;
    }
}
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
