/* The small operations, written once in vectors of 16 numbers: included by a file for each set of instructions, which
 * defines OPERATIONS, the name of its table. All is computed in float32 and rounded once, and a row's bits depend on
 * nothing but the row. */
#include <math.h>
#include <string.h>

#include "ops.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#if !defined(__clang__)
#pragma GCC optimize("fp-contract=fast") /* x * y + z is rounded once where the processor can, as clang does by itself */
#endif

#define INLINE static inline __attribute__((always_inline))
#define LANES 16
#define HEADS_AT_ONCE 4
#define VECTORS_AT_ONCE 4
#define SCORES (PART + LANES) /* the last lanes are of no token */

typedef float floats __attribute__((vector_size(64)));
typedef int32_t ints __attribute__((vector_size(64)));
typedef uint32_t words __attribute__((vector_size(64)));
typedef uint16_t halves __attribute__((vector_size(32)));

/* gcc's own conversion takes eight instructions where there is one. */
INLINE words widened(halves x) {
#if defined(__AVX512F__)
    return (words)_mm512_cvtepu16_epi32((__m256i)x);
#else
    return __builtin_convertvector(x, words);
#endif
}

INLINE halves narrowed(words x) {
#if defined(__AVX512F__)
    return (halves)_mm512_cvtepi32_epi16((__m512i)x);
#else
    return __builtin_convertvector(x, halves);
#endif
}

/* Of `count` numbers from index `at` of `numbers`; the lanes beyond are zeros, and are not read. */
INLINE floats load(int type, const void *numbers, long at, long count) {
    if (type == BFLOAT16) {
        halves raw = {0};
        if (count >= LANES)
            memcpy(&raw, (const uint16_t *)numbers + at, sizeof raw);
        else
            memcpy(&raw, (const uint16_t *)numbers + at, (size_t)count * 2);
        return (floats)(widened(raw) << 16);
    }
    floats x = {0};
    if (count >= LANES)
        memcpy(&x, (const float *)numbers + at, sizeof x);
    else
        memcpy(&x, (const float *)numbers + at, (size_t)count * 4);
    return x;
}

/* To the nearest bfloat16, ties to even, as float32. */
INLINE words rounded_bits(floats x) {
    words bits = (words)x, nan = (words)(x != x);
    bits += 0x7FFF + (bits >> 16 & 1);
    return (bits & ~nan) | (nan & 0x7FC00000);
}

INLINE floats rounded(int type, floats x) {
    return type == BFLOAT16 ? (floats)(rounded_bits(x) & 0xFFFF0000) : x;
}

INLINE void store(int type, void *numbers, long at, long count, floats x) {
    if (type == BFLOAT16) {
        halves raw = narrowed(rounded_bits(x) >> 16);
        if (count >= LANES)
            memcpy((uint16_t *)numbers + at, &raw, sizeof raw);
        else
            memcpy((uint16_t *)numbers + at, &raw, (size_t)count * 2);
    } else if (count >= LANES)
        memcpy((float *)numbers + at, &x, sizeof x);
    else
        memcpy((float *)numbers + at, &x, (size_t)count * 4);
}

INLINE const void *from(int type, const void *numbers, long at) {
    return (const char *)numbers + at * (type == BFLOAT16 ? 2 : 4);
}

INLINE void *into(int type, void *numbers, long at) { return (char *)numbers + at * (type == BFLOAT16 ? 2 : 4); }

INLINE floats all_of(float x) { return x - (floats){0}; }

INLINE floats fused(floats a, floats b, floats c) { return a * b + c; }

INLINE floats chosen(ints where, floats x, floats otherwise) {
    return (floats)(((ints)x & where) | ((ints)otherwise & ~where));
}

INLINE float sum_of(floats x) {
    float sum[LANES];
    memcpy(sum, &x, sizeof x);
    for (int half = LANES / 2; half; half /= 2)
        for (int lane = 0; lane < half; lane++)
            sum[lane] += sum[lane + half];
    return sum[0];
}

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLED __builtin_shufflevector
#else
#define SHUFFLED(x, y, ...) __builtin_shuffle(x, y, (ints){__VA_ARGS__})
#endif

/* Lane i of the result is the sum of vector i: pairs of vectors are folded into one, four times. */
INLINE floats sums_of(const floats x[LANES]) {
    floats a[8], b[4], c[2];
    for (int i = 0; i < 8; i++)
        a[i] = SHUFFLED(x[i], x[i + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
               SHUFFLED(x[i], x[i + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    for (int i = 0; i < 4; i++)
        b[i] = SHUFFLED(a[i], a[i + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
               SHUFFLED(a[i], a[i + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
    for (int i = 0; i < 2; i++)
        c[i] = SHUFFLED(b[i], b[i + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
               SHUFFLED(b[i], b[i + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    return SHUFFLED(c[0], c[1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
           SHUFFLED(c[0], c[1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
}

/* e^x: 2^n times a polynomial of what is left of x, within 2 units in the last place; zero and infinity beyond. */
INLINE floats exponential(floats x) {
    const float shift = 12582912; /* 1.5 * 2^23: what is added to it is rounded to whole numbers */
    x = chosen(x < -104.f, all_of(-104), chosen(x > 89.f, all_of(89), x));
    floats shifted = fused(x, all_of(1.44269504f), all_of(shift)), n = shifted - shift;
    floats rest = fused(n, all_of(-0.693145752f), x);
    rest = fused(n, all_of(-1.42860677e-6f), rest);
    floats y = fused(all_of(1.98756912e-4f), rest, all_of(1.39819994e-3f));
    y = fused(y, rest, all_of(8.33345205e-3f));
    y = fused(y, rest, all_of(4.16657962e-2f));
    y = fused(y, rest, all_of(1.66666657e-1f));
    y = fused(y, rest, all_of(0.5f));
    y = fused(y, rest * rest, rest) + 1;
    ints power = (ints)shifted - (ints)all_of(shift), half = power >> 1; /* 2^power may be beyond float32 */
    return y * (floats)((half + 127) << 23) * (floats)((power - half + 127) << 23);
}

INLINE void add_norm_row(int type, const struct add_norm *of, long row) {
    long columns = of->columns;
    const void *x = from(type, of->x, row * columns);
    void *normed = into(type, of->normed, row * columns);
    floats squares[4] = {{0}};
    if (of->delta) {
        const void *delta = from(type, of->delta, row * columns);
        void *total = into(type, of->total, row * columns);
        for (long at = 0, turn = 0; at < columns; at += LANES, turn++) {
            floats sum = rounded(type, load(type, x, at, columns - at) + load(type, delta, at, columns - at));
            store(type, total, at, columns - at, sum);
            squares[turn % 4] = fused(sum, sum, squares[turn % 4]);
        }
        x = total;
    } else
        for (long at = 0, turn = 0; at < columns; at += LANES, turn++) {
            floats sum = load(type, x, at, columns - at);
            squares[turn % 4] = fused(sum, sum, squares[turn % 4]);
        }
    float mean = sum_of((squares[0] + squares[1]) + (squares[2] + squares[3])) / (float)columns;
    floats scale = all_of(1 / sqrtf(mean + of->epsilon));
    for (long at = 0; at < columns; at += LANES) {
        floats y = load(type, x, at, columns - at) * scale * load(type, of->weight, at, columns - at);
        store(type, normed, at, columns - at, y);
    }
}

static void add_norm(const void *argument, long first, long end) {
    const struct add_norm *of = argument;
    for (long row = first; row < end; row++)
        if (of->type == BFLOAT16)
            add_norm_row(BFLOAT16, of, row);
        else
            add_norm_row(FLOAT32, of, row);
}

INLINE void rotate_heads(int type, void *heads, long count, long stride, long half, const void *cosines,
                         const void *sines) {
    for (long at = 0; at < half; at += LANES) {
        floats cosine = load(type, cosines, at, half - at), sine = load(type, sines, at, half - at);
        for (long head = 0; head < count; head++) {
            void *x = into(type, heads, head * stride);
            floats left = load(type, x, at, half - at), right = load(type, x, half + at, half - at);
            store(type, x, at, half - at, left * cosine - right * sine);
            store(type, x, half + at, half - at, right * cosine + left * sine);
        }
    }
}

INLINE void rotate_row(int type, const struct rotate *of, long row) {
    const void *cosines = from(type, of->cosines, row * of->dim), *sines = from(type, of->sines, row * of->dim);
    rotate_heads(type, into(type, of->q, row * of->q_token), of->q_heads, of->q_head, of->dim / 2, cosines, sines);
    rotate_heads(type, into(type, of->k, row * of->k_token), of->k_heads, of->k_head, of->dim / 2, cosines, sines);
}

static void rotate(const void *argument, long first, long end) {
    const struct rotate *of = argument;
    for (long row = first; row < end; row++)
        if (of->type == BFLOAT16)
            rotate_row(BFLOAT16, of, row);
        else
            rotate_row(FLOAT32, of, row);
}

INLINE void silu_mul_row(int type, const struct silu_mul *of, long row) {
    const void *gates = from(type, of->gate, row * of->gate_row), *ups = from(type, of->up, row * of->up_row);
    void *out = into(type, of->out, row * of->columns);
    for (long at = 0; at < of->columns; at += LANES) {
        floats gate = load(type, gates, at, of->columns - at);
        store(type, out, at, of->columns - at, gate / (1 + exponential(-gate)) * load(type, ups, at, of->columns - at));
    }
}

static void silu_mul(const void *argument, long first, long end) {
    const struct silu_mul *of = argument;
    for (long row = first; row < end; row++)
        if (of->type == BFLOAT16)
            silu_mul_row(BFLOAT16, of, row);
        else
            silu_mul_row(FLOAT32, of, row);
}

/* Some tokens of one sequence, on one page. */
struct tokens {
    const struct attend_one *of;
    long first, count, slot; /* the slot of the first */
};

INLINE struct tokens tokens_at(const struct attend_one *of, const int32_t *pages, long first, long end) {
    long rest = PAGE - first % PAGE, count = end - first < rest ? end - first : rest;
    return (struct tokens){of, first, count > 0 ? count : 0, count > 0 ? pages[first / PAGE] * (long)PAGE + first % PAGE : 0};
}

INLINE const void *row_of(int type, const struct tokens *at, const void *side, long token, long kv) {
    return from(type, side, (at->slot + token) * at->of->store.slot + kv * at->of->store.head);
}

/* A share of the page that is needed next, brought near in the order of memory while the page before is computed. */
INLINE void fetch(int type, const struct tokens *next, const void *side, long kv) {
    long bytes = next->count * next->of->store.slot * (type == BFLOAT16 ? 2 : 4), shares = next->of->kv_heads;
    const char *begin = row_of(type, next, side, 0, 0);
    for (long byte = bytes * kv / shares; byte < bytes * (kv + 1) / shares; byte += 64)
        __builtin_prefetch(begin + byte, 0, 3);
}

/* scores[head][t] = q[head] k[t], of `heads` heads. q is float32 [heads, wide], `wide` a multiple of 16. */
INLINE void score(int type, const struct tokens *at, const float *q, long wide, long kv, int heads, float *scores) {
    const struct attend_one *of = at->of;
    floats products[HEADS_AT_ONCE][LANES]; /* of tokens that are not there: of no meaning */
    if (at->count < PAGE)
        memset(products, 0, sizeof products);
    for (long token = 0; token < at->count; token++) {
        const void *key = row_of(type, at, of->store.keys, token, kv);
        floats sums[HEADS_AT_ONCE] = {0};
        for (long i = 0; i < of->dim; i += LANES) {
            floats k = load(type, key, i, of->dim - i);
#pragma GCC unroll 4
            for (int head = 0; head < heads; head++)
                sums[head] = fused(k, load(FLOAT32, q, head * wide + i, LANES), sums[head]);
        }
#pragma GCC unroll 4
        for (int head = 0; head < heads; head++)
            products[head][token] = sums[head];
    }
#pragma GCC unroll 4
    for (int head = 0; head < heads; head++)
        store(FLOAT32, scores, head * SCORES, LANES, sums_of(products[head]));
}

/* Scores become weights e^(score - largest) -> the sum of the weights. */
INLINE float weigh(float *scores, float *largest) {
    floats most = all_of(-INFINITY), sum = {0};
    for (long t = 0; t < PART; t += LANES) {
        floats x = load(FLOAT32, scores, t, LANES);
        most = chosen(x > most, x, most);
    }
    *largest = -INFINITY;
    for (int lane = 0; lane < LANES; lane++)
        *largest = most[lane] > *largest ? most[lane] : *largest;
    for (long t = 0; t < PART; t += LANES) {
        floats weight = exponential(load(FLOAT32, scores, t, LANES) - *largest);
        store(FLOAT32, scores, t, LANES, weight);
        sum += weight;
    }
    return sum_of(sum);
}

/* mixed[head][i ...] += sum over t of weights[head][t] v[t][i ...], of `vectors` vectors; the last has `count` numbers.
 */
INLINE void mix(int type, const struct tokens *at, const float *weights, long kv, long i, long count, int heads,
                int vectors, float *mixed, long row) {
    floats sums[HEADS_AT_ONCE][VECTORS_AT_ONCE];
#pragma GCC unroll 4
    for (int head = 0; head < heads; head++)
#pragma GCC unroll 4
        for (int vector = 0; vector < vectors; vector++)
            sums[head][vector] = load(FLOAT32, mixed, head * row + i + vector * LANES, count);
    for (long token = 0; token < at->count; token++) {
        const void *value = row_of(type, at, at->of->store.values, token, kv);
#pragma GCC unroll 4
        for (int vector = 0; vector < vectors; vector++) {
            floats v = load(type, value, i + vector * LANES, count);
#pragma GCC unroll 4
            for (int head = 0; head < heads; head++)
                sums[head][vector] = fused(v, all_of(weights[head * SCORES + token]), sums[head][vector]);
        }
    }
#pragma GCC unroll 4
    for (int head = 0; head < heads; head++)
#pragma GCC unroll 4
        for (int vector = 0; vector < vectors; vector++)
            store(FLOAT32, mixed, head * row + i + vector * LANES, count, sums[head][vector]);
}

INLINE void mix_heads(int type, const struct tokens *at, const float *weights, long kv, int heads, float *mixed,
                      long row) {
    long dim = at->of->dim, i = 0;
    for (; i + VECTORS_AT_ONCE * LANES <= dim; i += VECTORS_AT_ONCE * LANES)
        mix(type, at, weights, kv, i, LANES, heads, VECTORS_AT_ONCE, mixed, row);
    for (; i < dim; i += LANES)
        mix(type, at, weights, kv, i, dim - i, heads, 1, mixed, row);
}

/* `call` for all heads that share a key head, 4, 2 or 1 at a time: `head` is the first, `heads` their number. */
#define BY_HEADS(group, call)                                                                                          \
    do {                                                                                                               \
        long head = 0;                                                                                                 \
        for (; head + 4 <= (group); head += 4)                                                                         \
            call(4);                                                                                                   \
        for (; head + 2 <= (group); head += 2)                                                                         \
            call(2);                                                                                                   \
        if (head < (group))                                                                                            \
            call(1);                                                                                                   \
    } while (0)

/* The first token that a row sees; parts begin where they do for every row of its sequence. */
INLINE long first_seen(const struct attend_one *of, long row) {
    return of->window && of->lengths[row] > of->window ? of->lengths[row] - of->window : 0;
}

/* One row over one part of its tokens, page by page, all heads together: so memory is read in its own order -> for each
 * head the weighted values, the sum of the weights, and the score whose weight is 1. */
INLINE void attend(int type, const struct attend_one *of, long part) {
    long row = part / of->splits, length = of->lengths[row], first = first_seen(of, row);
    long begin = (first / PART + part % of->splits) * PART, end = begin + PART < length ? begin + PART : length;
    first = begin > first ? begin : first;
    if (first >= end)
        return;
    const int32_t *pages = of->pages + of->starts[row];
    long group = of->group, dim = of->dim, wide = (dim + LANES - 1) / LANES * LANES, heads = of->kv_heads * group;
    float q[heads * wide], scores[heads * SCORES], *results = of->scratch + part * heads * (dim + 2);
    float scale = 1 / sqrtf((float)dim);
    for (long head = 0; head < heads; head++)
        for (long i = 0; i < wide; i += LANES)
            store(FLOAT32, q, head * wide + i, LANES,
                  i < dim ? load(type, of->q, row * of->q_token + head * dim + i, dim - i) * scale : all_of(0));
    for (long i = 0; i < heads * SCORES; i++)
        scores[i] = -INFINITY;
    memset(results, 0, (size_t)(heads * (dim + 2)) * sizeof *results);
    for (long token = first; token < end;) {
        struct tokens at = tokens_at(of, pages, token, end);
        struct tokens next = tokens_at(of, pages, token + at.count, end);
        struct tokens mixed_first = tokens_at(of, pages, first, end);
        for (long kv = 0; kv < of->kv_heads; kv++) {
            fetch(type, next.count ? &next : &mixed_first, next.count ? of->store.keys : of->store.values, kv);
#define SCORE(heads)                                                                                                   \
    score(type, &at, q + (kv * group + head) * wide, wide, kv, heads, scores + (kv * group + head) * SCORES + token - begin)
            BY_HEADS(group, SCORE);
        }
        token += at.count;
    }
    for (long head = 0; head < heads; head++) {
        for (long t = end - begin; t < PART; t++)
            scores[head * SCORES + t] = -INFINITY;
        float *last = results + head * (dim + 2) + dim;
        last[0] = weigh(scores + head * SCORES, last + 1);
    }
    for (long token = first; token < end;) {
        struct tokens at = tokens_at(of, pages, token, end);
        struct tokens next = tokens_at(of, pages, token + at.count, end);
        for (long kv = 0; kv < of->kv_heads; kv++) {
            fetch(type, &next, of->store.values, kv);
#define MIX(heads)                                                                                                     \
    mix_heads(type, &at, scores + (kv * group + head) * SCORES + token - begin, kv, heads,                             \
              results + (kv * group + head) * (dim + 2), dim + 2)
            BY_HEADS(group, MIX);
        }
        token += at.count;
    }
}

static void attend_parts(const void *argument, long first, long end) {
    const struct attend_one *of = argument;
    for (long part = first; part < end; part++)
        if (of->type == BFLOAT16)
            attend(BFLOAT16, of, part);
        else
            attend(FLOAT32, of, part);
}

/* The parts of each head of a row, weighted by e^(its largest score - the largest of all), over the sum of weights. */
INLINE void join_row(const struct attend_one *of, long row) {
    long dim = of->dim, heads = of->kv_heads * of->group, stride = heads * (dim + 2);
    long splits = (of->lengths[row] - first_seen(of, row) / PART * PART + PART - 1) / PART;
    for (long head = 0; head < heads; head++) {
        float *parts = of->scratch + row * of->splits * stride + head * (dim + 2), largest = -INFINITY, sum = 0;
        for (long split = 0; split < splits; split++) {
            float score = parts[split * stride + dim + 1];
            largest = score > largest ? score : largest;
        }
        for (long split = 0; split < splits; split++) {
            float *last = parts + split * stride + dim;
            last[1] = exponential(all_of(last[1] - largest))[0];
            sum += last[0] * last[1];
        }
        for (long at = 0; at < dim; at += LANES) {
            floats mixed = {0};
            for (long split = 0; split < splits; split++) {
                const float *part = parts + split * stride;
                mixed = fused(load(FLOAT32, part, at, dim - at), all_of(part[dim + 1]), mixed);
            }
            store(of->type, of->out, (row * heads + head) * dim + at, dim - at, mixed / sum);
        }
    }
}

static void join_parts(const void *argument, long first, long end) {
    for (long row = first; row < end; row++)
        join_row(argument, row);
}

const struct operations OPERATIONS = {add_norm, rotate, silu_mul, attend_parts, join_parts};
