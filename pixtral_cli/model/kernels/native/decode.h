/* Rows of a matrix in an encoding -> float32 or bfloat16. What files that decode share. */
#ifndef PIXTRAL_DECODE_H
#define PIXTRAL_DECODE_H

#include "native.h"

/* Decodes columns [first, first + count) of a row; both are whole blocks, and 32 weights or a
 * multiple. */
typedef void decode_floats(const struct matrix *matrix, long row, long first, long count, float *out);
typedef void decode_bfloat16s(const struct matrix *matrix, long row, long first, long count, uint16_t *out);

decode_floats pixtral_floats_portable, pixtral_floats_avx2, pixtral_floats_avx512;
decode_bfloat16s pixtral_bfloat16s_portable, pixtral_bfloat16s_avx2, pixtral_bfloat16s_avx512,
    pixtral_bfloat16s_avx512bf16;

#endif
