/* The arguments of the small operations, and one table of them for each set of instructions. `type` is BFLOAT16 or
 * FLOAT32, of every tensor of a call. Strides count elements; the last dimension lies together.
 *
 * N tokens, C hidden_size, H query heads, K key-value heads, G = H / K, D head_dim, F intermediate_size. */
#ifndef PIXTRAL_OPS_H
#define PIXTRAL_OPS_H

#include "native.h"

struct add_norm { /* x, delta, total, normed [N, C] without gaps, weight [C]; delta and total NULL: nothing is added */
    int type;
    const void *x, *delta, *weight;
    void *total, *normed;
    long columns;
    float epsilon;
};

struct rotate { /* q [N, H, D] and k [N, K, D], in place; cosines and sines [N, D] without gaps, their halves alike */
    int type;
    void *q, *k;
    const void *cosines, *sines;
    long q_heads, k_heads, dim, q_token, q_head, k_token, k_head;
};

struct silu_mul { /* gate, up, out [N, F] */
    int type;
    const void *gate, *up;
    void *out;
    long columns, gate_row, up_row;
};

/* Keys and values of token t of a sequence lie in slot pages[t / PAGE] * PAGE + t % PAGE of [slots, K, D]. */
enum { PAGE = 16 };

/* Tokens that one row attends to in one piece of work: a multiple of PAGE. */
enum { PART = 64 };

/* The largest D and the most H that attention is computed for: what belongs to them lies on the stack. */
enum { MOST_DIM = 256, MOST_HEADS = 192 };

struct store {
    const void *keys, *values;
    long slot, head; /* strides */
};

struct attend_one { /* q, out [N, H, D]: row n is the last of the lengths[n] tokens in the pages from starts[n] on */
    int type;
    const void *q;
    void *out;
    struct store store;
    const int32_t *pages;
    const int64_t *starts, *lengths;
    long kv_heads, group, dim, q_token, window; /* window 0: all */
    long splits;
    float *scratch; /* [N, splits, H, D + 2]: sums, their weight and the largest score of each part */
};

/* Each computes items first to end: rows, or parts of rows. */
typedef void items_function(const void *argument, long first, long end);

struct operations {
    items_function *add_norm, *rotate, *silu_mul, *attend_parts, *join_parts;
};

/* What ctypes calls (native_ops.py), in ops.c: see the structures above. */
EXPORT void pixtral_add_norm(int type, const void *x, const void *delta, const void *weight, void *total, void *normed,
                             long rows, long columns, float epsilon, int threads);
EXPORT void pixtral_rotate(int type, void *q, void *k, const void *cosines, const void *sines, long rows, long q_heads,
                           long k_heads, long dim, long q_row, long q_head, long k_row, long k_head, int threads);
EXPORT void pixtral_silu_mul(int type, const void *gate, const void *up, void *out, long rows, long columns,
                             long gate_row, long up_row, int threads);
EXPORT void pixtral_write(void *keys, void *values, const int64_t *slots, const void *k, const void *v, long rows,
                          long bytes, long k_row, long v_row, int threads);
EXPORT void pixtral_attend_one(int type, const void *q, const void *keys, const void *values, void *out,
                               const int32_t *pages, const int64_t *starts, const int64_t *lengths, long rows,
                               long kv_heads, long group, long dim, long q_row, long slot, long head, long window,
                               int threads);

extern const struct operations operations_portable, operations_avx2, operations_avx512;

#endif
