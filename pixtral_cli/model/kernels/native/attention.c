/* Attention of many tokens in bfloat16, by blocks of keys, with sums in float32 (Dao 2023, FlashAttention-2): prompts
 * over the pages of keys and values, patches over those of their image. For processors with AVX512-BF16.
 *
 * A task is a block of rows (queries, each with the G heads that share a key head) and a key head. It lays KEYS keys
 * and values at a time out in pairs, as the instruction reads them, and takes all of its rows through them, ROWS at a
 * time. What one row gets depends on no other row: the blocks of keys begin at multiples of KEYS. */
#include "native.h"
#include "ops.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <math.h>
#include <string.h>

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")
#endif

#define INLINE static inline __attribute__((always_inline))
#define LANES 16
#define VECTORS 4 /* of one row, that are computed together: 64 keys or dimensions */
#define WIDE (VECTORS * LANES)
#define ROWS 6 /* with VECTORS: 24 sums in registers, 4 loads for 24 products */
#define KEYS 128
#define BLOCK 192 /* rows of a task: laying keys and values out costs a fiftieth of it */
#define LOWEST (-127.f) /* of powers of two: nothing beside the largest, which is 0 */

struct attend_block { /* q, out [N, H, D]: of a sequence of before + N tokens, the last N */
    const uint16_t *q;
    uint16_t *out;
    const uint16_t *keys, *values;
    const int32_t *pages; /* NULL: token t lies in slot t */
    long tokens, before, kv_heads, group, dim, q_token, q_head, slot, head, window;
    int causal;
};

_Static_assert(BLOCK >= MOST_HEADS, "a task has all heads that share a key head");

struct block { /* what a task keeps of its rows, and of the keys at hand */
    float sums[BLOCK][MOST_DIM];
    float largest[BLOCK], weights[BLOCK];
    uint32_t keys[MOST_DIM / 2][KEYS];   /* pairs of dimensions */
    uint32_t values[KEYS / 2][MOST_DIM]; /* pairs of keys */
};

INLINE const uint16_t *row_of(const struct attend_block *of, const uint16_t *side, long kv, long token) {
    long slot = of->pages ? (long)of->pages[token / PAGE] * PAGE + token % PAGE : token;
    return side + slot * of->slot + kv * of->head;
}

/* Columns of a 16 x 16 matrix of words become rows. */
INLINE void transpose(__m512i x[LANES]) {
    __m512i y[LANES];
    for (int i = 0; i < LANES; i += 2)
        y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]), y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    for (int i = 0; i < LANES; i += 4) {
        x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]), x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
        x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]), x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        y[i] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0x88), y[i + 4] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0xDD);
        y[i + 8] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0x88);
        y[i + 12] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0xDD);
    }
    for (int i = 0; i < 8; i++) {
        x[i] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0x88);
        x[i + 8] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0xDD);
    }
}

/* Keys `first` to `first + count` into pairs of dimensions; the keys after them are zeros, as are dimensions after D. */
static void lay_keys(const struct attend_block *of, struct block *block, long kv, long first, long count) {
    for (long key = 0; key < KEYS; key += LANES)
        for (long pair = 0; pair < of->dim / 2; pair += LANES) {
            long pairs = of->dim / 2 - pair < LANES ? of->dim / 2 - pair : LANES;
            __mmask16 inside = (__mmask16)((1u << pairs) - 1);
            __m512i x[LANES];
            for (int i = 0; i < LANES; i++)
                x[i] = key + i < count
                           ? _mm512_maskz_loadu_epi32(inside, row_of(of, of->keys, kv, first + key + i) + 2 * pair)
                           : _mm512_setzero_si512();
            transpose(x);
            for (int i = 0; i < LANES; i++)
                if (i < pairs)
                    _mm512_storeu_si512(&block->keys[pair + i][key], x[i]);
        }
}

static void lay_values(const struct attend_block *of, struct block *block, long kv, long first, long count) {
    static const uint16_t order[2][32] = {
        {0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47},
        {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63}};
    __m512i low = _mm512_loadu_si512(order[0]), high = _mm512_loadu_si512(order[1]);
    for (long key = 0; key < count; key += 2)
        for (long at = 0; at < of->dim; at += 32) {
            __mmask32 inside = of->dim - at < 32 ? (__mmask32)((1u << (of->dim - at)) - 1) : ~(__mmask32)0;
            __m512i a = _mm512_maskz_loadu_epi16(inside, row_of(of, of->values, kv, first + key) + at);
            __m512i b = key + 1 < count ? _mm512_maskz_loadu_epi16(inside, row_of(of, of->values, kv, first + key + 1) + at)
                                        : _mm512_setzero_si512();
            _mm512_storeu_si512(&block->values[key / 2][at], _mm512_permutex2var_epi16(a, low, b));
            _mm512_storeu_si512(&block->values[key / 2][at + LANES], _mm512_permutex2var_epi16(a, high, b));
        }
}

INLINE __m512bh pair_of(const void *numbers) {
    int32_t pair;
    memcpy(&pair, numbers, sizeof pair);
    return (__m512bh)_mm512_set1_epi32(pair);
}

/* sums[r] += rows[r] times `pairs` pairs of rows of `right`, which lie `stride` words apart. */
INLINE void multiply(__m512 sums[ROWS][VECTORS], const uint16_t *const rows[ROWS], const uint32_t *right, long stride,
                     long pairs) {
    for (long pair = 0; pair < pairs; pair++) {
        __m512bh b[VECTORS];
#pragma GCC unroll 4
        for (int vector = 0; vector < VECTORS; vector++)
            b[vector] = (__m512bh)_mm512_loadu_si512(right + pair * stride + vector * LANES);
#pragma GCC unroll 6
        for (int row = 0; row < ROWS; row++) {
            __m512bh a = pair_of(rows[row] + 2 * pair);
#pragma GCC unroll 4
            for (int vector = 0; vector < VECTORS; vector++)
                sums[row][vector] = _mm512_dpbf16_ps(sums[row][vector], a, b[vector]);
        }
    }
}

/* 2^x, with a relative error of 4e-6; powers below LOWEST are that. */
INLINE __m512 power(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(LOWEST), x);
    __m512 whole = _mm512_roundscale_ps(x, 0), rest = _mm512_sub_ps(x, whole);
    __m512 y = _mm512_set1_ps(0.0095828503f);
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0.055906428f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0.24024099f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0.69312419f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(1.f));
    return _mm512_scalef_ps(y, whole);
}

/* Scores of one row become bfloat16 weights 2^(score * scale - largest); keys outside [low, high) weigh nothing
 * -> what the sums so far are to be multiplied with. */
INLINE float weigh(const float scores[KEYS], long low, long high, float scale, float *largest, float *weights,
                   uint16_t out[KEYS]) {
    __m512 x[KEYS / LANES], most = _mm512_set1_ps(-INFINITY);
    __m512i key = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    if (low >= high || low >= KEYS || high <= 0) {
        memset(out, 0, KEYS * sizeof *out);
        return 1;
    }
    int all = low <= 0 && high >= KEYS;
#pragma GCC unroll 8
    for (int i = 0; i < KEYS / LANES; i++) {
        x[i] = _mm512_mul_ps(_mm512_loadu_ps(scores + i * LANES), _mm512_set1_ps(scale));
        if (!all) {
            __m512i here = _mm512_add_epi32(key, _mm512_set1_epi32(i * LANES));
            __mmask16 seen = _mm512_cmpge_epi32_mask(here, _mm512_set1_epi32((int)low)) &
                             _mm512_cmplt_epi32_mask(here, _mm512_set1_epi32((int)high));
            x[i] = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), seen, x[i]);
        }
        most = _mm512_max_ps(most, x[i]);
    }
    float peak = _mm512_reduce_max_ps(most), before = *largest;
    peak = peak > before ? peak : before;
    __m512 sum = _mm512_setzero_ps();
#pragma GCC unroll 8
    for (int i = 0; i < KEYS / LANES; i++) {
        __m512 weight = power(_mm512_sub_ps(x[i], _mm512_set1_ps(peak)));
        sum = _mm512_add_ps(sum, weight);
        _mm256_storeu_si256((__m256i *)(out + i * LANES), (__m256i)_mm512_cvtneps_pbh(weight));
    }
    float fade = before == peak ? 1 : _mm512_cvtss_f32(power(_mm512_set1_ps(before - peak)));
    *largest = peak;
    *weights = *weights * fade + _mm512_reduce_add_ps(sum);
    return fade;
}

/* Rows `first` to `first + ROWS` of the block through the keys at hand, which are `begin` to `begin + count`. */
INLINE void attend_rows(const struct attend_block *of, struct block *block, const uint16_t *const q[ROWS],
                        const long low[ROWS], const long high[ROWS], long first, long begin, long count) {
    float scores[ROWS][KEYS];
    uint16_t weights[ROWS][KEYS];
    const uint16_t *rows[ROWS];
    for (long at = 0; at < count; at += WIDE) {
        __m512 sums[ROWS][VECTORS] = {{{0}}};
        multiply(sums, q, &block->keys[0][at], KEYS, of->dim / 2);
#pragma GCC unroll 6
        for (int row = 0; row < ROWS; row++)
#pragma GCC unroll 4
            for (int vector = 0; vector < VECTORS; vector++)
                _mm512_storeu_ps(scores[row] + at + vector * LANES, sums[row][vector]);
    }
    float fade[ROWS], scale = 1.44269504f / sqrtf((float)of->dim);
    for (int row = 0; row < ROWS; row++) {
        long end = high[row] - begin < count ? high[row] - begin : count;
        fade[row] = weigh(scores[row], low[row] - begin, end, scale, &block->largest[first + row],
                          &block->weights[first + row], weights[row]);
        rows[row] = weights[row];
    }
    for (long at = 0; at < of->dim; at += WIDE) {
        __m512 sums[ROWS][VECTORS];
#pragma GCC unroll 6
        for (int row = 0; row < ROWS; row++)
#pragma GCC unroll 4
            for (int vector = 0; vector < VECTORS; vector++)
                sums[row][vector] = _mm512_mul_ps(_mm512_loadu_ps(&block->sums[first + row][at + vector * LANES]),
                                                  _mm512_set1_ps(fade[row]));
        multiply(sums, rows, &block->values[0][at], MOST_DIM, (count + 1) / 2);
#pragma GCC unroll 6
        for (int row = 0; row < ROWS; row++)
#pragma GCC unroll 4
            for (int vector = 0; vector < VECTORS; vector++)
                _mm512_storeu_ps(&block->sums[first + row][at + vector * LANES], sums[row][vector]);
    }
}

/* The first and the one after the last key that query n sees. */
INLINE long low_of(const struct attend_block *of, long n) {
    long end = of->before + n + 1;
    return of->window && end > of->window ? end - of->window : 0;
}

INLINE long high_of(const struct attend_block *of, long n) {
    return of->before + (of->causal ? n + 1 : of->tokens);
}

static void write_row(const struct attend_block *of, const struct block *block, long row, uint16_t *out) {
    __m512 over = _mm512_set1_ps(1 / block->weights[row]);
    for (long at = 0; at < of->dim; at += LANES) {
        __mmask16 inside = of->dim - at < LANES ? (__mmask16)((1u << (of->dim - at)) - 1) : (__mmask16)0xFFFF;
        __m512 mixed = _mm512_mul_ps(_mm512_loadu_ps(&block->sums[row][at]), over);
        _mm256_mask_storeu_epi16(out + at, inside, (__m256i)_mm512_cvtneps_pbh(mixed));
    }
}

/* Task `chunk`: row r of the block is query r / G, head r % G of those that share a key head. */
static void attend_block(void *argument, long chunk) {
    const struct attend_block *of = argument;
    long queries = BLOCK / of->group, blocks = (of->tokens + queries - 1) / queries;
    long kv = chunk / blocks, first_query = chunk % blocks * queries;
    long end_query = first_query + queries < of->tokens ? first_query + queries : of->tokens;
    long count = (end_query - first_query) * of->group, wide = (of->dim + WIDE - 1) / WIDE * WIDE;
    struct block block;
    for (long row = 0; row < BLOCK; row++) {
        memset(block.sums[row], 0, (size_t)wide * sizeof(float));
        block.largest[row] = -INFINITY, block.weights[row] = 0;
    }
    if (wide > of->dim)
        memset(block.values, 0, sizeof block.values);
    long last = high_of(of, end_query - 1);
    for (long begin = low_of(of, first_query) / KEYS * KEYS; begin < last; begin += KEYS) {
        long keys = last - begin < KEYS ? last - begin : KEYS;
        lay_keys(of, &block, kv, begin, keys);
        lay_values(of, &block, kv, begin, keys);
        for (long first = 0; first < count; first += ROWS) {
            const uint16_t *q[ROWS];
            long low[ROWS], high[ROWS];
            for (int row = 0; row < ROWS; row++) { /* rows after the last are the last again, and go nowhere */
                long at = first + row < count ? first + row : count - 1;
                long query = first_query + at / of->group, head = kv * of->group + at % of->group;
                q[row] = of->q + query * of->q_token + head * of->q_head;
                low[row] = low_of(of, query), high[row] = high_of(of, query);
            }
            if (high[ROWS - 1] > begin && low[0] < begin + keys)
                attend_rows(of, &block, q, low, high, first, begin, keys);
        }
    }
    for (long row = 0; row < count; row++) {
        long query = first_query + row / of->group, head = kv * of->group + row % of->group;
        write_row(of, &block, row, of->out + (query * of->kv_heads * of->group + head) * of->dim);
    }
}

EXPORT void pixtral_attend_block(const void *q, const void *keys, const void *values, void *out, const int32_t *pages,
                                 long tokens, long before, long kv_heads, long group, long dim, long q_token,
                                 long q_head, long slot, long head, long window, int causal, int threads) {
    struct attend_block of = {q,     out, keys,    values, pages, tokens, before, kv_heads, group,
                              dim, q_token, q_head, slot,   head,  window, causal};
    long queries = BLOCK / group, blocks = (tokens + queries - 1) / queries;
    pixtral_parallel_for(attend_block, &of, kv_heads * blocks, threads);
}

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
