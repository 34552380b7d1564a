/* Rows of a matrix in any encoding -> float32 or bfloat16, looked up by number or one after the other. */
#include "decode.h"

static decode_floats *const floats[] = {
    pixtral_floats_portable,
#if defined(__x86_64__)
    pixtral_floats_avx2, pixtral_floats_avx512, pixtral_floats_avx512,
#endif
};

static decode_bfloat16s *const bfloat16s[] = {
    pixtral_bfloat16s_portable,
#if defined(__x86_64__)
    pixtral_bfloat16s_avx2, pixtral_bfloat16s_avx512, pixtral_bfloat16s_avx512bf16,
#endif
};

struct decoding {
    const struct matrix *matrix;
    const int64_t *ids;
    void *out;
    long first, count, at_once;
    int to_float32;
};

static void decode_some(void *argument, long chunk) {
    const struct decoding *job = argument;
    const struct matrix *matrix = job->matrix;
    long end = (chunk + 1) * job->at_once < job->count ? (chunk + 1) * job->at_once : job->count;
    for (long i = chunk * job->at_once; i < end; i++) {
        long row = job->ids ? (long)job->ids[i] : job->first + i, place = i * matrix->columns;
        if (job->to_float32)
            floats[instructions](matrix, row, 0, matrix->columns, (float *)job->out + place);
        else
            bfloat16s[instructions](matrix, row, 0, matrix->columns, (uint16_t *)job->out + place);
    }
}

/* The `count` rows `ids`, or where that is NULL those from `first` on, into out [count, columns]; 0 if there is no such
 * row. */
EXPORT int pixtral_decode(const struct matrix *matrix, const int64_t *ids, long first, long count, void *out,
                          int to_float32, int threads) {
    for (long i = 0; ids && i < count; i++)
        if (ids[i] < 0 || ids[i] >= matrix->rows)
            return 0;
    long at_once = 32768 / matrix->columns + 1;
    struct decoding job = {matrix, ids, out, first, count, at_once, to_float32};
    pixtral_parallel_for(decode_some, &job, (count + at_once - 1) / at_once, threads);
    return 1;
}
