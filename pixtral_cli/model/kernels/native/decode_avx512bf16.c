/* Rows -> bfloat16 in AVX512-BF16: the same bits as decode_floats.h, some ten times as fast.
 *
 * Where a group has few codes, its 16 or 32 weights are made once, exact and then rounded, and codes look them up:
 * vpermw takes 32 codes at a time, in words of which it reads the lowest five bits. */
#if defined(__x86_64__)
#include <immintrin.h>
#include <string.h>

#include "decode.h"

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#endif

static inline float half_at(const uint8_t *at) {
    uint16_t bits;
    memcpy(&bits, at, 2);
    return _cvtsh_ss(bits);
}

static inline __m512 numbers(void) {
    return _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}

/* 16 weights, twice, as what `look_up` reads. */
static inline __m512i table_of_16(__m512 weights) {
    return _mm512_broadcast_i64x4((__m256i)_mm512_cvtneps_pbh(weights));
}

static inline __m512i table_of_32(__m512 first, __m512 second) {
    return (__m512i)_mm512_cvtne2ps_pbh(second, first);
}

static inline void look_up(__m512i table, __m512i codes, uint16_t *out) {
    _mm512_storeu_si512(out, _mm512_permutexvar_epi16(codes, table));
}

static inline __m512i words_at(const uint8_t *bytes) {
    return _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)bytes));
}

static inline void q4_0(const uint8_t *block, uint16_t *out) {
    __m512 codes = _mm512_sub_ps(numbers(), _mm512_set1_ps(8));
    __m512i table = table_of_16(_mm512_mul_ps(_mm512_set1_ps(half_at(block)), codes));
    __m256i low = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(block + 2)));
    look_up(table, _mm512_inserti64x4(_mm512_castsi256_si512(low), _mm256_srli_epi16(low, 4), 1), out);
}

static inline __m512 floats_of(__m128i bytes) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)); }

static inline void q8_0(const uint8_t *block, uint16_t *out) {
    __m512 scale = _mm512_set1_ps(half_at(block));
    __m512 first = floats_of(_mm_loadu_si128((const __m128i *)(block + 2)));
    __m512 second = floats_of(_mm_loadu_si128((const __m128i *)(block + 18)));
    _mm512_storeu_si512(out, table_of_32(_mm512_mul_ps(first, scale), _mm512_mul_ps(second, scale)));
}

/* q4_k and q5_k: of each group of a block, its scale and its offset. */
struct groups {
    float scales[8], offsets[8];
};

static inline struct groups groups_of(const uint8_t *block) {
    uint32_t first, second, third;
    memcpy(&first, block + 4, 4), memcpy(&second, block + 8, 4), memcpy(&third, block + 12, 4);
    uint32_t lower = first & 0x3f3f3f3f, upper = (third & 0x0f0f0f0f) | (first >> 2 & 0x30303030);
    uint64_t scales = lower | (uint64_t)upper << 32;
    lower = second & 0x3f3f3f3f, upper = (third >> 4 & 0x0f0f0f0f) | (second >> 2 & 0x30303030);
    uint64_t offsets = lower | (uint64_t)upper << 32;
    __m512 whole = floats_of(_mm_set_epi64x((long long)offsets, (long long)scales));
    __m256 scale = _mm256_set1_ps(half_at(block)), offset = _mm256_set1_ps(half_at(block + 2));
    __m512 units = _mm512_insertf32x8(_mm512_castps256_ps512(scale), offset, 1);
    struct groups found;
    _mm512_storeu_ps(&found, _mm512_mul_ps(whole, units));
    return found;
}

static inline void q4_k(const uint8_t *block, uint16_t *out) {
    struct groups of = groups_of(block);
    for (int group = 0; group < 8; group += 2) {
        __m512i low = words_at(block + 16 + 16 * group), high = _mm512_srli_epi16(low, 4);
        for (int g = group; g < group + 2; g++) {
            __m512 weights = _mm512_fmsub_ps(_mm512_set1_ps(of.scales[g]), numbers(), _mm512_set1_ps(of.offsets[g]));
            look_up(table_of_16(weights), g == group ? low : high, out + 32 * g);
        }
    }
}

static inline void q5_k(const uint8_t *block, uint16_t *out) {
    struct groups of = groups_of(block);
    __m512i fifth = words_at(block + 16), sixteen = _mm512_set1_epi16(16), nibble = _mm512_set1_epi16(15);
    __m512 upper = _mm512_add_ps(numbers(), _mm512_set1_ps(16));
    for (int g = 0; g < 8; g++) {
        __m512i codes = words_at(block + 48 + 32 * (g / 2));
        codes = _mm512_and_si512(g % 2 ? _mm512_srli_epi16(codes, 4) : codes, nibble);
        __m512i bit = _mm512_srl_epi16(_mm512_slli_epi16(fifth, 4), _mm_cvtsi32_si128(g));
        codes = _mm512_or_si512(codes, _mm512_and_si512(bit, sixteen));
        __m512 scale = _mm512_set1_ps(of.scales[g]), offset = _mm512_set1_ps(of.offsets[g]);
        __m512 first = _mm512_fmsub_ps(scale, numbers(), offset), second = _mm512_fmsub_ps(scale, upper, offset);
        look_up(table_of_32(first, second), codes, out + 32 * g);
    }
}

static inline void q6_k(const uint8_t *block, uint16_t *out) {
    float scales[16];
    __m512 step = _mm512_set1_ps(half_at(block + 208));
    _mm512_storeu_ps(scales, _mm512_mul_ps(floats_of(_mm_loadu_si128((const __m128i *)(block + 192))), step));
    const __m256i nibble = _mm256_set1_epi8(15), pair = _mm256_set1_epi8(48), middle = _mm256_set1_epi8(32);
    for (int half = 0; half < 2; half++) {
        __m256i upper = _mm256_loadu_si256((const __m256i *)(block + 128 + 32 * half));
        for (int part = 0; part < 4; part++) {
            __m256i lower = _mm256_loadu_si256((const __m256i *)(block + 64 * half + 32 * (part % 2)));
            lower = _mm256_and_si256(part < 2 ? lower : _mm256_srli_epi16(lower, 4), nibble);
            __m256i high = part < 2 ? _mm256_slli_epi16(upper, 4 - 2 * part) : _mm256_srli_epi16(upper, 2 * part - 4);
            __m256i codes = _mm256_sub_epi8(_mm256_or_si256(lower, _mm256_and_si256(high, pair)), middle);
            int group = 8 * half + 2 * part;
            __m512 first = _mm512_mul_ps(floats_of(_mm256_castsi256_si128(codes)), _mm512_set1_ps(scales[group]));
            __m512 second =
                _mm512_mul_ps(floats_of(_mm256_extracti128_si256(codes, 1)), _mm512_set1_ps(scales[group + 1]));
            _mm512_storeu_si512(out + 16 * group, table_of_32(first, second));
        }
    }
}

/* The table of 16 weights of one block of NF4. A magnitude can be so small that its weights are subnormal, which the
 * instruction for bfloat16 takes for zero: rounded by whole numbers. */
static inline __m512i nf4_table(float magnitude) {
    const __m512 values = _mm512_setr_ps(
        -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
        -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
        0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
        0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f);
    __m512 weights = _mm512_mul_ps(values, _mm512_set1_ps(magnitude));
    __m512i bits = (__m512i)weights, odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    __mmask16 none = _mm512_cmp_ps_mask(weights, weights, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, none, bits, _mm512_set1_epi32(0x00400000));
    return _mm512_broadcast_i64x4(_mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}

static void nf4(const struct matrix *matrix, long row, long first, long count, uint16_t *out) {
    const uint8_t *codes = matrix->bytes + row * matrix->row_bytes + first / 2;
    long place = row * matrix->columns + first, block = -1;
    int shift = __builtin_ctz((unsigned)matrix->block);
    __m512i table = _mm512_setzero_si512();
    for (long at = 0; at < count; at += 32) {
        if ((place + at) >> shift != block) {
            block = (place + at) >> shift;
            table = nf4_table(matrix->magnitudes[block]);
        }
        __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(codes + at / 2)));
        look_up(table, _mm512_or_si512(_mm512_srli_epi32(bytes, 4), _mm512_slli_epi32(bytes, 16)), out + at);
    }
}

/* 32 e4m3 codes, each in the low half of a word, as bfloat16 numbers. Those with the exponent 0 are looked up by the
 * lowest 5 bits. */
static inline __m512i from_e4m3(__m512i words) {
    const __m512i whole = _mm512_broadcast_i32x4( /* 0 to 7 times 2^-9 */
        _mm_setr_epi16(0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60));
    __m512i others = _mm512_and_si512(_mm512_slli_epi16(words, 4), _mm512_set1_epi16(0x07f0));
    others = _mm512_add_epi16(others, _mm512_set1_epi16(120 << 7));
    __mmask32 small = _mm512_testn_epi16_mask(words, _mm512_set1_epi16(0x78));
    __m512i found = _mm512_mask_permutexvar_epi16(others, small, words, whole);
    return _mm512_or_si512(found, _mm512_and_si512(_mm512_slli_epi16(words, 8), _mm512_set1_epi16((short)0x8000)));
}

static inline __m512 widened(__m256i bfloat16s) {
    return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bfloat16s), 16);
}

static void fp8(const struct matrix *matrix, long row, long first, long count, uint16_t *out) {
    const uint8_t *codes = matrix->bytes + row * matrix->row_bytes + first;
    const float *scales = scales_of(matrix, row);
    for (long at = 0; at < count; at += 32) {
        float one = scales[(first + at) / matrix->block];
        if (!(one > 0x1p-110f)) { /* weights may be subnormal, which the instruction takes for zero */
            pixtral_bfloat16s_avx512(matrix, row, first + at, 32, out + at);
            continue;
        }
        __m512i numbers = from_e4m3(words_at(codes + at));
        __m512 scale = _mm512_set1_ps(one);
        __m512 low = widened(_mm512_castsi512_si256(numbers)), high = widened(_mm512_extracti64x4_epi64(numbers, 1));
        _mm512_storeu_si512(out + at, table_of_32(_mm512_mul_ps(low, scale), _mm512_mul_ps(high, scale)));
    }
}

#define BLOCKS(decode, weights, bytes) \
    for (long at = 0; at < count; at += weights) \
        decode(data + (first + at) / weights * bytes, out + at); \
    break

void pixtral_bfloat16s_avx512bf16(const struct matrix *matrix, long row, long first, long count, uint16_t *out) {
    const uint8_t *data = matrix->bytes + row * matrix->row_bytes;
    switch (matrix->encoding) {
    case Q4_0: BLOCKS(q4_0, 32, 18);
    case Q8_0: BLOCKS(q8_0, 32, 34);
    case Q4_K: BLOCKS(q4_k, 256, 144);
    case Q5_K: BLOCKS(q5_k, 256, 176);
    case Q6_K: BLOCKS(q6_k, 256, 210);
    case NF4: nf4(matrix, row, first, count, out); break;
    case FP8: fp8(matrix, row, first, count, out); break;
    default: pixtral_bfloat16s_avx512(matrix, row, first, count, out);
    }
}

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
