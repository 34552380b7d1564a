/* The small operations of decoder and tower, which are not products with weights: add_norm, rotate, silu_mul, attention
 * of single tokens over the pages of keys and values. Their arguments are in ops.h; here they are given to the form for
 * this processor, in chunks. Other processors than x86-64 take the portable one. */
#include <string.h>

#define OPERATIONS operations_portable
#include "ops_template.h"

#define CHUNK 32768 /* numbers of one chunk: some microseconds, so that sharing it out is worth it */

static const struct operations *operations(void) {
#if defined(__x86_64__)
    if (instructions >= AVX512)
        return &operations_avx512;
    if (instructions >= AVX2)
        return &operations_avx2;
#endif
    return &operations_portable;
}

struct items {
    items_function *function;
    const void *argument;
    long count, step;
};

static void some_items(void *argument, long chunk) {
    const struct items *of = argument;
    long first = chunk * of->step, end = first + of->step;
    of->function(of->argument, first, end < of->count ? end : of->count);
}

/* Items that read `numbers` numbers each, as many in a chunk as are worth it. */
static void shared_out(items_function *function, const void *argument, long count, long numbers, int threads) {
    long step = numbers < CHUNK ? CHUNK / numbers : 1;
    struct items of = {function, argument, count, step};
    pixtral_parallel_for(some_items, &of, (count + step - 1) / step, threads);
}

EXPORT void pixtral_add_norm(int type, const void *x, const void *delta, const void *weight, void *total, void *normed,
                             long rows, long columns, float epsilon, int threads) {
    struct add_norm of = {type, x, delta, weight, total, normed, columns, epsilon};
    shared_out(operations()->add_norm, &of, rows, columns, threads);
}

EXPORT void pixtral_rotate(int type, void *q, void *k, const void *cosines, const void *sines, long rows, long q_heads,
                           long k_heads, long dim, long q_row, long q_head, long k_row, long k_head, int threads) {
    struct rotate of = {type, q, k, cosines, sines, q_heads, k_heads, dim, q_row, q_head, k_row, k_head};
    shared_out(operations()->rotate, &of, rows, (q_heads + k_heads) * dim, threads);
}

EXPORT void pixtral_silu_mul(int type, const void *gate, const void *up, void *out, long rows, long columns,
                             long gate_row, long up_row, int threads) {
    struct silu_mul of = {type, gate, up, out, columns, gate_row, up_row};
    shared_out(operations()->silu_mul, &of, rows, columns, threads);
}

struct copies {
    char *keys, *values;
    const char *k, *v;
    const int64_t *slots;
    size_t bytes, k_row, v_row;
};

static void copy_rows(const void *argument, long first, long end) {
    const struct copies *of = argument;
    for (long row = first; row < end; row++) {
        size_t slot = (size_t)of->slots[row] * of->bytes;
        memcpy(of->keys + slot, of->k + (size_t)row * of->k_row, of->bytes);
        memcpy(of->values + slot, of->v + (size_t)row * of->v_row, of->bytes);
    }
}

/* Rows of k and v, `bytes` each and k_row and v_row bytes apart, into their slots of keys and values. */
EXPORT void pixtral_write(void *keys, void *values, const int64_t *slots, const void *k, const void *v, long rows,
                          long bytes, long k_row, long v_row, int threads) {
    struct copies of = {keys, values, k, v, slots, (size_t)bytes, (size_t)k_row, (size_t)v_row};
    shared_out(copy_rows, &of, rows, bytes, threads);
}

/* See struct attend_one; `slot` and `head` are strides of the store. */
EXPORT void pixtral_attend_one(int type, const void *q, const void *keys, const void *values, void *out,
                              const int32_t *pages, const int64_t *starts, const int64_t *lengths, long rows,
                              long kv_heads, long group, long dim, long q_row, long slot, long head, long window,
                              int threads) {
    struct attend_one of = {type, q, out, {keys, values, slot, head}, pages, starts, lengths, kv_heads, group, dim,
                            q_row, window, 1, NULL};
    for (long row = 0; row < rows; row++) {
        long first = window && lengths[row] > window ? lengths[row] - window : 0;
        long parts = (lengths[row] + PART - 1) / PART - first / PART;
        of.splits = parts > of.splits ? parts : of.splits;
    }
    long parts = rows * of.splits, heads = kv_heads * group;
    of.scratch = pixtral_scratch((size_t)(parts * heads * (dim + 2)) * sizeof(float));
    long tokens = lengths[0] < PART ? lengths[0] : PART;
    shared_out(operations()->attend_parts, &of, parts, tokens * kv_heads * dim * 2, threads);
    shared_out(operations()->join_parts, &of, rows, of.splits * heads * dim, threads);
}
