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

extern const struct operations operations_portable, operations_avx2, operations_avx512;

#endif
