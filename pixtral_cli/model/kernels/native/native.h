/* What the files of this library share. Knows no Python: functions marked EXPORT are bound by ctypes (native.py).
 *
 * Plain C11 with pthreads, for gcc and clang. A file that needs more than the instructions of every x86-64 says so at
 * its top, and is only called where `instructions` reaches that far. */
#ifndef PIXTRAL_NATIVE_H
#define PIXTRAL_NATIVE_H

#include <stddef.h>
#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))

/* Each includes those before it. avx2 means fma and f16c too; avx512 means f, bw, dq and vl. */
enum instructions { PORTABLE, AVX2, AVX512, AVX512BF16 };
extern enum instructions instructions; /* those in use; the best that this processor has until something else is said */

EXPORT int pixtral_best_instructions(void);
EXPORT void pixtral_use_instructions(int wanted);

/* ggml's numbers of tensor types (weights_cache/encodings.py), and two of our own. */
enum encoding {
    FLOAT32 = 0,
    FLOAT16 = 1,
    Q4_0 = 2,
    Q8_0 = 8,
    Q4_K = 12,
    Q5_K = 13,
    Q6_K = 14,
    BFLOAT16 = 30,
    NF4 = 1000,
    FP8 = 1001
};

/* R x C weights. The bytes may begin anywhere; rows follow each other. ctypes has the same (native_matrix.py). */
struct matrix {
    const uint8_t *bytes;
    const float *magnitudes; /* nf4: of each block of the flattened matrix; fp8: the scales, row by row; else NULL */
    int64_t rows, columns, row_bytes;
    int32_t encoding;
    int32_t block; /* nf4: weights that share a magnitude, a power of two of 32 or more; fp8: columns that share a
                      scale, a multiple of 64, or all */
};

/* fp8: the scales of a row. */
static inline const float *scales_of(const struct matrix *matrix, int64_t row) {
    return matrix->magnitudes + row * ((matrix->columns + matrix->block - 1) / matrix->block);
}

/* The calling thread's own memory of `size` bytes, with whatever was last in it: fresh pages are dear. It begins at a
 * line of the cache, and holds until the thread's next call. */
void *pixtral_scratch(size_t size);

/* Calls function(argument, chunk) once for each chunk of 0 .. chunks - 1, on at most `most_threads` threads, the
 * caller's among them, and returns when all are done. Chunks are taken in order, one after the other, by whoever is
 * free. Safe after fork, and for several callers at once: while the pool works for one, others compute alone. */
typedef void chunk_function(void *argument, long chunk);
EXPORT void pixtral_parallel_for(chunk_function *function, void *argument, long chunks, int most_threads);

#endif
