/* Rows -> float32 exactly as weights_cache/codecs decodes them, and rounded once to bfloat16: plain C, which a compiler
 * turns into the instructions of the file that includes this. That defines NAME, which makes names of functions.
 *
 * block_quants.py, k_quants.py, nf4.py and fp8.py of the codecs tell how blocks lie. A scale times a code never needs more
 * than the 24 bits of a float, so nothing is rounded but the difference to an offset, fused or not. */
#include <math.h>
#include <string.h>

#include "decode.h"

static inline float half_at(const uint8_t *at) {
    uint16_t bits;
    memcpy(&bits, at, 2);
    uint32_t magnitude = bits & 0x7fff, sign = (uint32_t)(bits & 0x8000) << 16, found;
    float value;
    if (magnitude >= 0x7c00) { /* infinite or no number */
        found = sign | magnitude << 13 | 0x7f800000;
    } else if (magnitude >= 0x0400) {
        found = sign | ((magnitude << 13) + (112u << 23));
    } else { /* subnormal: a whole number of 2^-24 */
        value = (float)magnitude * 0x1p-24f;
        memcpy(&found, &value, 4);
        found |= sign;
    }
    memcpy(&value, &found, 4);
    return value;
}

static inline void q4_0(const uint8_t *block, float *out) {
    float scale = half_at(block);
    for (int i = 0; i < 16; i++) {
        out[i] = scale * (float)((block[2 + i] & 15) - 8);
        out[16 + i] = scale * (float)((block[2 + i] >> 4) - 8);
    }
}

static inline void q8_0(const uint8_t *block, float *out) {
    float scale = half_at(block);
    for (int i = 0; i < 32; i++)
        out[i] = scale * (float)(int8_t)block[2 + i];
}

/* What the codes of group 0..7 of q4_k and q5_k are multiplied with, and what is taken off then. */
static inline void scale_and_offset(const uint8_t *block, int group, float *scale, float *offset) {
    const uint8_t *packed = block + 4, *s = packed + group % 4, *o = s + 4, *low = s + 8;
    int first = group < 4;
    *scale = half_at(block) * (float)(first ? *s & 63 : (*low & 15) | *s >> 6 << 4);
    *offset = half_at(block + 2) * (float)(first ? *o & 63 : *low >> 4 | *o >> 6 << 4);
}

static inline void q4_k(const uint8_t *block, float *out) {
    for (int group = 0; group < 8; group++) {
        const uint8_t *codes = block + 16 + 32 * (group / 2);
        float scale, offset;
        scale_and_offset(block, group, &scale, &offset);
        for (int i = 0; i < 32; i++)
            out[32 * group + i] = scale * (float)(codes[i] >> 4 * (group % 2) & 15) - offset;
    }
}

static inline void q5_k(const uint8_t *block, float *out) {
    for (int group = 0; group < 8; group++) {
        const uint8_t *fifth = block + 16, *codes = block + 48 + 32 * (group / 2);
        float scale, offset;
        scale_and_offset(block, group, &scale, &offset);
        for (int i = 0; i < 32; i++) {
            int code = (codes[i] >> 4 * (group % 2) & 15) | (fifth[i] >> group & 1) << 4;
            out[32 * group + i] = scale * (float)code - offset;
        }
    }
}

static inline void q6_k(const uint8_t *block, float *out) {
    float step = half_at(block + 208);
    for (int group = 0; group < 16; group++) { /* of each half: four times two groups under one run of upper bits */
        int half = group / 8, part = group / 2 % 4, at = 16 * (group % 2);
        const uint8_t *low = block + 64 * half + 32 * (part % 2) + at, *high = block + 128 + 32 * half + at;
        float scale = step * (float)(int8_t)block[192 + group];
        for (int i = 0; i < 16; i++) {
            int code = (low[i] >> 4 * (part / 2) & 15) | (high[i] >> 2 * part & 3) << 4;
            out[16 * group + i] = scale * (float)(code - 32);
        }
    }
}

static const float nf4_values[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
    -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
    0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f,
};

static inline void nf4(const uint8_t *codes, float magnitude, float *out) {
    for (int i = 0; i < 16; i++) {
        out[2 * i] = nf4_values[codes[i] >> 4] * magnitude;
        out[2 * i + 1] = nf4_values[codes[i] & 15] * magnitude;
    }
}

/* 32 e4m3 codes that are numbers: where the exponent is 0, a whole number of 2^-9. Without a branch, for that is guessed
 * wrongly too often. */
static inline void fp8(const uint8_t *codes, float scale, float *out) {
    for (int i = 0; i < 32; i++) {
        uint32_t magnitude = codes[i] & 127, small = magnitude < 8 ? ~0u : 0, bits;
        float value = (float)(int32_t)magnitude * 0x1p-9f;
        memcpy(&bits, &value, 4);
        bits = (bits & small) | (((magnitude << 20) + (120u << 23)) & ~small) | (uint32_t)(codes[i] & 128) << 24;
        memcpy(&value, &bits, 4);
        out[i] = value * scale;
    }
}

static inline uint16_t rounded(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t up = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 64 : up);
}

#define BLOCKS(decode, weights, bytes) \
    for (long at = 0; at < count; at += weights) \
        decode(data + (first + at) / weights * bytes, out + at); \
    break

void NAME(pixtral_floats)(const struct matrix *matrix, long row, long first, long count, float *out) {
    const uint8_t *data = matrix->bytes + row * matrix->row_bytes;
    switch (matrix->encoding) {
    case Q4_0: BLOCKS(q4_0, 32, 18);
    case Q8_0: BLOCKS(q8_0, 32, 34);
    case Q4_K: BLOCKS(q4_k, 256, 144);
    case Q5_K: BLOCKS(q5_k, 256, 176);
    case Q6_K: BLOCKS(q6_k, 256, 210);
    case NF4:
        for (long at = first; at < first + count; at += 32)
            nf4(data + at / 2, matrix->magnitudes[(row * matrix->columns + at) / matrix->block],
                out + at - first);
        break;
    case FP8: {
        const float *scales = scales_of(matrix, row);
        for (long at = 0; at < count; at += 32)
            fp8(data + first + at, scales[(first + at) / matrix->block], out + at);
        break;
    }
    case BFLOAT16:
        for (long at = 0; at < count; at++) {
            uint16_t half;
            memcpy(&half, data + 2 * (first + at), 2);
            uint32_t bits = (uint32_t)half << 16;
            memcpy(out + at, &bits, 4);
        }
        break;
    case FLOAT32: memcpy(out, data + 4 * first, 4 * (size_t)count); break;
    default: break;
    }
}

void NAME(pixtral_bfloat16s)(const struct matrix *matrix, long row, long first, long count, uint16_t *out) {
    float exact[256];
    for (long at = 0; at < count; at += 256) {
        long some = count - at < 256 ? count - at : 256;
        NAME(pixtral_floats)(matrix, row, first + at, some, exact);
        for (long i = 0; i < some; i++)
            out[at + i] = rounded(exact[i]);
    }
}
