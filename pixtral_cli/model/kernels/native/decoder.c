/* A few rows through all layers of a decoder in one call, each the last token of a sequence as it grows: what
 * language_model.py and layers.py say, by the functions of the other files, in their order and so with their bits.
 * Between products Python takes a tenth of such a pass in a small model.
 *
 * N rows, C hidden_size, H query heads, K key-value heads, D head_dim, F intermediate_size. */
#include <string.h>

#include "matvec.h"
#include "ops.h"

/* ctypes has these three too (native_decoder.py). */
struct layer {
    struct matrix qkv[3], output, gate_up[2], down;
    const void *input_norm, *post_attention_norm; /* [C] */
    int64_t window;                               /* 0: all */
};

struct sizes {
    int32_t type; /* of everything but the matrices: BFLOAT16 or FLOAT32 */
    float epsilon;
    int64_t layers, hidden, heads, kv_heads, dim, intermediate;
};

/* The first `tokens` of `rows` rows are tokens; the others are computed beside them and see nothing. */
struct pass {
    int64_t rows, tokens;
    void *x, *delta;              /* [N, C]; x is the input, and their sum is the output */
    const void *cosines, *sines;  /* [N, D] */
    char *keys, *values;          /* of the first layer, [slots, K, D] */
    int64_t layer_bytes;          /* from one layer's to the next one's */
    const int64_t *slots;         /* [tokens]: where the new ones go */
    const int32_t *pages;         /* as `attend_one` takes them */
    const int64_t *starts, *lengths;
    char *memory; /* of N * (C + (2 H + 2 K) D + 3 F) numbers, for what is between */
};

EXPORT void pixtral_decoder_pass(const struct layer *layers, const struct sizes *of, const struct pass *pass, int threads) {
    int type = of->type;
    int64_t n = pass->rows, c = of->hidden, d = of->dim, f = of->intermediate, size = type == BFLOAT16 ? 2 : 4;
    int64_t wide = (of->heads + 2 * of->kv_heads) * d;
    char *normed = pass->memory, *qkv = normed + n * c * size, *mixed = qkv + n * wide * size;
    char *gate_up = mixed + n * of->heads * d * size, *gated = gate_up + n * 2 * f * size;
    char *k = qkv + of->heads * d * size, *v = k + of->kv_heads * d * size;
    memset(mixed + pass->tokens * of->heads * d * size, 0, (size_t)((n - pass->tokens) * of->heads * d * size));
    for (int64_t i = 0; i < of->layers; i++) {
        const struct layer *layer = &layers[i];
        char *keys = pass->keys + i * pass->layer_bytes, *values = pass->values + i * pass->layer_bytes;
        pixtral_add_norm(type, pass->x, i ? pass->delta : NULL, layer->input_norm, pass->x, normed, n, c, of->epsilon, threads);
        pixtral_multiply(layer->qkv, 3, normed, type, n, qkv, threads);
        pixtral_rotate(type, qkv, k, pass->cosines, pass->sines, n, of->heads, of->kv_heads, d, wide, d, wide, d, threads);
        pixtral_write(keys, values, pass->slots, k, v, pass->tokens, of->kv_heads * d * size, wide * size, wide * size, threads);
        pixtral_attend_one(type, qkv, keys, values, mixed, pass->pages, pass->starts, pass->lengths, pass->tokens,
                           of->kv_heads, of->heads / of->kv_heads, d, wide, of->kv_heads * d, d, layer->window, threads);
        pixtral_multiply(&layer->output, 1, mixed, type, n, pass->delta, threads);
        pixtral_add_norm(type, pass->x, pass->delta, layer->post_attention_norm, pass->x, normed, n, c, of->epsilon, threads);
        pixtral_multiply(layer->gate_up, 2, normed, type, n, gate_up, threads);
        pixtral_silu_mul(type, gate_up, gate_up + f * size, gated, n, f, 2 * f, 2 * f, threads);
        pixtral_multiply(&layer->down, 1, gated, type, n, pass->delta, threads);
    }
}
