/* Rows of a matrix times vectors in float32: exactly the weights that the codec decodes, multiplied and summed in float32.
 *
 * A file that includes this says which instructions there are, and defines L, the numbers in a register: 16 (avx512), 8
 * (avx2) or 4 (any processor), and TABLE, the name of the function that finds a kernel. Each encoding has one piece
 * here, which turns a row into registers of weights; STEP multiplies each with every vector. The layouts of blocks, and
 * their source, are told in weights_cache/codecs/. */
#include "matvec.h"

#if L > 4
#include <immintrin.h>
#endif

typedef float floats __attribute__((vector_size(4 * L)));
typedef int32_t integers __attribute__((vector_size(4 * L)));
typedef float eight_floats __attribute__((vector_size(32)));
typedef uint8_t eight_bytes __attribute__((vector_size(8)));

#if L == 16
#define MOST 4 /* vectors at once: their sums must fit into registers */
static ALWAYS_INLINE floats multiply_add(floats a, floats b, floats c) {
    return (floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
static ALWAYS_INLINE float half(const uint8_t *at) { return _cvtsh_ss((uint16_t)(at[0] | at[1] << 8)); }
static ALWAYS_INLINE integers unsigned_codes(const uint8_t *at) {
    return (integers)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)at));
}
static ALWAYS_INLINE integers signed_codes(const uint8_t *at) {
    return (integers)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)at));
}
static ALWAYS_INLINE integers unsigned_words(const uint8_t *at) {
    return (integers)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)at));
}
static ALWAYS_INLINE floats from_e4m3(const uint8_t *at) {
    __m256i words = _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)at)), 7);
    return (floats)_mm512_cvtph_ps(_mm256_and_si256(words, _mm256_set1_epi16((short)0xbfff)));
}
static ALWAYS_INLINE floats look_up(const float *table, integers index) {
    return (floats)_mm512_permutexvar_ps((__m512i)index, _mm512_loadu_ps(table));
}
static ALWAYS_INLINE float total(floats sum) { return _mm512_reduce_add_ps((__m512)sum); }
#elif L == 8
#define MOST 2
static ALWAYS_INLINE floats multiply_add(floats a, floats b, floats c) {
    return (floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
static ALWAYS_INLINE float half(const uint8_t *at) { return _cvtsh_ss((uint16_t)(at[0] | at[1] << 8)); }
static ALWAYS_INLINE integers unsigned_codes(const uint8_t *at) {
    return (integers)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)at));
}
static ALWAYS_INLINE integers signed_codes(const uint8_t *at) {
    return (integers)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)at));
}
static ALWAYS_INLINE integers unsigned_words(const uint8_t *at) {
    return (integers)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)at));
}
static ALWAYS_INLINE floats from_e4m3(const uint8_t *at) {
    __m128i words = _mm_slli_epi16(_mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i *)at)), 7);
    return (floats)_mm256_cvtph_ps(_mm_and_si128(words, _mm_set1_epi16((short)0xbfff)));
}
static ALWAYS_INLINE floats look_up(const float *table, integers index) {
    __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), (__m256i)index);
    __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), (__m256i)index);
    return (floats)_mm256_blendv_ps(low, high, (__m256)(index << 28)); /* bit 3 is now the sign */
}
static ALWAYS_INLINE float total(floats sum) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128((__m256)sum), _mm256_extractf128_ps((__m256)sum, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
#else
#define MOST 2
static ALWAYS_INLINE floats multiply_add(floats a, floats b, floats c) { return a * b + c; }
static ALWAYS_INLINE float half(const uint8_t *at) {
    uint32_t bits = at[0] | (uint32_t)at[1] << 8, sign = (bits & 0x8000) << 16, rest = (bits & 0x7fff) << 13;
    if (rest >= 0x7c00u << 13) /* infinite, or not a number */
        return as_float(sign | 0x7f800000 | rest);
    float magnitude = as_float(rest) * 0x1p112f; /* exact, for subnormal ones as well */
    return sign ? -magnitude : magnitude;
}
static ALWAYS_INLINE integers unsigned_codes(const uint8_t *at) { return (integers){at[0], at[1], at[2], at[3]}; }
static ALWAYS_INLINE integers signed_codes(const uint8_t *at) {
    return (integers){(int8_t)at[0], (int8_t)at[1], (int8_t)at[2], (int8_t)at[3]};
}
static ALWAYS_INLINE integers unsigned_words(const uint8_t *at) {
    return unsigned_codes((const uint8_t[4]){at[0], at[2], at[4], at[6]}) |
           unsigned_codes((const uint8_t[4]){at[1], at[3], at[5], at[7]}) << 8;
}
static ALWAYS_INLINE floats from_e4m3(const uint8_t *at) { /* where the exponent is 0, a whole number of 2^-17 */
    integers code = unsigned_codes(at), magnitude = code & 127, small = magnitude < 8;
    integers whole = (integers)(__builtin_convertvector(magnitude, floats) * 0x1p-17f);
    return (floats)((whole & small) | (((magnitude << 20) + (112 << 23)) & ~small) | (code & 128) << 24);
}
static ALWAYS_INLINE floats look_up(const float *table, integers index) {
    index &= 15;
    return (floats){table[index[0]], table[index[1]], table[index[2]], table[index[3]]};
}
static ALWAYS_INLINE float total(floats sum) { return (sum[0] + sum[2]) + (sum[1] + sum[3]); }
#endif
/* multiply_add(a, b, c) is a * b + c; half, a float16 of two bytes; the next three, L numbers from bytes; from_e4m3, 2^-8
 * of L codes that are numbers; look_up, table[the low 4 bits of each index]; total, the sum of a register. */

#define SUMS 4 /* of a vector: one would wait for itself */
#define UNROLLED _Pragma("GCC unroll 8")
#define EACH_VECTOR UNROLLED for (int v = 0; v < n; v++)
#define LOAD(type, at)                         \
    ({                                         \
        type loaded;                           \
        memcpy(&loaded, (at), sizeof(type));   \
        loaded;                                \
    })
#define AS_FLOATS(values) __builtin_convertvector(values, floats)
#define STEP(which, column, weights)                                                                        \
    do {                                                                                                    \
        floats decoded = (weights);                                                                            \
        EACH_VECTOR sum[v][which] = multiply_add(decoded, LOAD(floats, x[v] + (column)), sum[v][which]);       \
    } while (0)

/* What a piece is given: row `row`, the n vectors, and the sums that it adds to. */
#define PIECE const struct matrix *matrix, int64_t row, const float *const *x, floats (*sum)[SUMS], const int n
#define BLOCKS(columns_of_block, bytes_of_block)                                                              \
    const uint8_t *block = matrix->bytes + row * matrix->row_bytes;                                           \
    for (int64_t column = 0; column < matrix->columns; column += (columns_of_block), block += (bytes_of_block))

static ALWAYS_INLINE floats all(float value) { return value - (floats){0}; }
static ALWAYS_INLINE floats from_bfloat16(const uint8_t *at) { return (floats)(unsigned_words(at) << 16); }

static ALWAYS_INLINE void float32(PIECE) {
    const uint8_t *weights = matrix->bytes + row * matrix->row_bytes;
    int64_t column = 0;
    for (; column + SUMS * L <= matrix->columns; column += SUMS * L)
        UNROLLED for (int i = 0; i < SUMS; i++) STEP(i, column + L * i, LOAD(floats, weights + 4 * (column + L * i)));
    for (; column < matrix->columns; column++) {
        float weight;
        memcpy(&weight, weights + 4 * column, 4);
        EACH_VECTOR sum[v][0][0] += weight * x[v][column];
    }
}

static ALWAYS_INLINE void bfloat16(PIECE) {
    const uint8_t *weights = matrix->bytes + row * matrix->row_bytes;
    int64_t column = 0;
    for (; column + SUMS * L <= matrix->columns; column += SUMS * L)
        UNROLLED for (int i = 0; i < SUMS; i++) STEP(i, column + L * i, from_bfloat16(weights + 2 * (column + L * i)));
    for (; column < matrix->columns; column++) {
        float weight = as_float((uint32_t)weights[2 * column] << 16 | (uint32_t)weights[2 * column + 1] << 24);
        EACH_VECTOR sum[v][0][0] += weight * x[v][column];
    }
}

/* d (q - 8): low nibbles are the first 16 weights, high ones the others. */
static ALWAYS_INLINE void q4_0(PIECE) {
    BLOCKS(32, 18) {
        floats scale = all(half(block));
        UNROLLED for (int part = 0; part < 16; part += L) {
            integers pair = unsigned_codes(block + 2 + part);
            STEP(part / L & 1, column + part, AS_FLOATS((pair & 15) - 8) * scale);
            STEP(2 + (part / L & 1), column + 16 + part, AS_FLOATS((pair >> 4) - 8) * scale);
        }
    }
}

/* d q */
static ALWAYS_INLINE void q8_0(PIECE) {
    BLOCKS(32, 34) {
        floats scale = all(half(block));
        UNROLLED for (int part = 0; part < 32; part += L)
            STEP(part / L & 3, column + part, AS_FLOATS(signed_codes(block + 2 + part)) * scale);
    }
}

/* The 8 scales d s and offsets e o of a block of q4_k or q5_k. */
static ALWAYS_INLINE void six_bits(const uint8_t *block, float scales[8], float offsets[8]) {
    uint32_t first = word(block + 4), second = word(block + 8), third = word(block + 12);
    uint32_t words[4] = {first & 0x3f3f3f3f, (third & 0x0f0f0f0f) | (first >> 2 & 0x30303030), second & 0x3f3f3f3f,
                         (third >> 4 & 0x0f0f0f0f) | (second >> 2 & 0x30303030)};
    eight_floats scale = half(block) - (eight_floats){0}, offset = half(block + 2) - (eight_floats){0};
    scale *= __builtin_convertvector(LOAD(eight_bytes, words), eight_floats);
    offset *= __builtin_convertvector(LOAD(eight_bytes, words + 2), eight_floats);
    memcpy(scales, &scale, sizeof scale);
    memcpy(offsets, &offset, sizeof offset);
}

/* (d s) q - (e o), s and o for 32 weights: of each 32 bytes the low nibbles, then the high ones. */
static ALWAYS_INLINE void q4_k(PIECE) {
    BLOCKS(256, 144) {
        float scales[8], offsets[8];
        six_bits(block, scales, offsets);
        for (int group = 0; group < 8; group += 2)
            UNROLLED for (int part = 0; part < 32; part += L) {
                integers pair = unsigned_codes(block + 16 + 16 * group + part);
                int64_t at = column + 32 * group + part;
                STEP(part / L & 1, at, AS_FLOATS(pair & 15) * all(scales[group]) - all(offsets[group]));
                STEP(2 + (part / L & 1), at + 32, AS_FLOATS(pair >> 4) * all(scales[group + 1]) - all(offsets[group + 1]));
            }
    }
}

/* As q4_k, with a fifth bit: bit g of byte i is that of weight i of group g. */
static ALWAYS_INLINE void q5_k(PIECE) {
    BLOCKS(256, 176) {
        float scales[8], offsets[8];
        six_bits(block, scales, offsets);
        for (int group = 0; group < 8; group += 2)
            UNROLLED for (int part = 0; part < 32; part += L) {
                integers pair = unsigned_codes(block + 48 + 16 * group + part);
                integers fifth = unsigned_codes(block + 16 + part) >> group;
                integers low = (pair & 15) | (fifth & 1) << 4, high = pair >> 4 | (fifth & 2) << 3;
                int64_t at = column + 32 * group + part;
                STEP(part / L & 1, at, AS_FLOATS(low) * all(scales[group]) - all(offsets[group]));
                STEP(2 + (part / L & 1), at + 32, AS_FLOATS(high) * all(scales[group + 1]) - all(offsets[group + 1]));
            }
    }
}

/* (d s) (q - 32), s for 16 weights. Each half block is four times 32 weights: the low nibbles of two runs of 32 bytes,
 * then their high nibbles, all under the four pairs of upper bits of one run. */
static ALWAYS_INLINE void q6_k(PIECE) {
    BLOCKS(256, 210) {
        float step = half(block + 208), scales[16];
        for (int i = 0; i < 16; i++)
            scales[i] = step * (int8_t)block[192 + i];
        for (int half_block = 0; half_block < 2; half_block++)
            UNROLLED for (int part = 0; part < 32; part += L) {
                const uint8_t *nibbles = block + 64 * half_block + part, *upper = block + 128 + 32 * half_block + part;
                integers first = unsigned_codes(nibbles), second = unsigned_codes(nibbles + 32), pairs = unsigned_codes(upper);
                integers some[4] = {(first & 15) | (pairs & 3) << 4, (second & 15) | (pairs & 12) << 2,
                                    first >> 4 | (pairs & 48), second >> 4 | (pairs & 192) >> 2};
                UNROLLED for (int i = 0; i < 4; i++)
                    STEP(i, column + 128 * half_block + 32 * i + part,
                         AS_FLOATS(some[i] - 32) * all(scales[8 * half_block + 2 * i + part / 16]));
            }
    }
}

static const float NF4_TABLE[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f, -0.18477343022823334f,
    -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

/* table[q] times the magnitude of the block. High nibbles are the even weights, low ones the odd: of each 32 columns, x
 * has the 16 even ones before the odd ones. */
static ALWAYS_INLINE void nf4(PIECE) {
    const uint8_t *block = matrix->bytes + row * matrix->row_bytes;
    int64_t first = row * matrix->columns;
    int shift = __builtin_ctz((unsigned)matrix->block);
    for (int64_t column = 0; column < matrix->columns; column += 32, block += 16) {
        floats magnitude = all(matrix->magnitudes[(first + column) >> shift]);
        UNROLLED for (int part = 0; part < 16; part += L) {
            integers pair = unsigned_codes(block + part);
            STEP(part / L & 1, column + part, look_up(NF4_TABLE, pair >> 4) * magnitude);
            STEP(2 + (part / L & 1), column + 16 + part, look_up(NF4_TABLE, pair) * magnitude);
        }
    }
}

/* s q. As a float16 a code is 2^-8 of what it is as e4m3; 256 s is finite, for 448 s is. */
static ALWAYS_INLINE void fp8(PIECE) {
    const uint8_t *codes = matrix->bytes + row * matrix->row_bytes;
    const float *scales = scales_of(matrix, row);
    for (int64_t first = 0; first < matrix->columns; first += matrix->block, scales++) {
        floats scale = all(*scales * 256);
        int64_t end = first + matrix->block < matrix->columns ? first + matrix->block : matrix->columns;
        for (int64_t column = first; column < end; column += 32)
            UNROLLED for (int part = 0; part < 32; part += L)
                STEP(part / L & 3, column + part, from_e4m3(codes + column + part) * scale);
    }
}

#define KERNEL(PIECE_NAME)                                                                                      \
    static ALWAYS_INLINE void PIECE_NAME##_rows(const struct matrix *matrix, int64_t first, int64_t end,        \
                                                struct vectors vectors, int from, float *sums, const int n) {   \
        const float *x[MOST];                                                                                   \
        EACH_VECTOR x[v] = (const float *)vectors.data + (from + v) * vectors.stride;                           \
        for (int64_t row = first; row < end; row++) {                                                           \
            floats sum[MOST][SUMS];                                                                             \
            EACH_VECTOR UNROLLED for (int i = 0; i < SUMS; i++) sum[v][i] = (floats){0};                        \
            PIECE_NAME(matrix, row, x, sum, n);                                                                 \
            EACH_VECTOR sums[(row - first) * AT_ONCE + from + v] = total((sum[v][0] + sum[v][1]) + (sum[v][2] + sum[v][3]));                              \
        }                                                                                                       \
    }                                                                                                           \
    static void PIECE_NAME##_kernel(const struct matrix *matrix, int64_t first, int64_t end,                    \
                                    struct vectors x, int n, float *sums) {                                     \
        for (int from = 0; from < n; from += MOST)                                                              \
            switch (n - from < MOST ? n - from : MOST) {                                                        \
            case 1: PIECE_NAME##_rows(matrix, first, end, x, from, sums, 1); break;                             \
            case 2: PIECE_NAME##_rows(matrix, first, end, x, from, sums, 2); break;                             \
            case 3: PIECE_NAME##_rows(matrix, first, end, x, from, sums, MOST < 3 ? MOST : 3); break;           \
            default: PIECE_NAME##_rows(matrix, first, end, x, from, sums, MOST);                                \
            }                                                                                                   \
    }

KERNEL(float32)
KERNEL(bfloat16)
KERNEL(q4_0)
KERNEL(q8_0)
KERNEL(q4_k)
KERNEL(q5_k)
KERNEL(q6_k)
KERNEL(nf4)
KERNEL(fp8)

multiply_rows *TABLE(int encoding) {
    switch (encoding) {
    case FLOAT32: return float32_kernel;
    case BFLOAT16: return bfloat16_kernel;
    case Q4_0: return q4_0_kernel;
    case Q8_0: return q8_0_kernel;
    case Q4_K: return q4_k_kernel;
    case Q5_K: return q5_k_kernel;
    case Q6_K: return q6_k_kernel;
    case NF4: return nf4_kernel;
    case FP8: return fp8_kernel;
    default: return NULL;
    }
}
