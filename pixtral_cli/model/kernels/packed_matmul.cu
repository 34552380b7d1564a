// Packed weights W [R, C] in, products with N bfloat16 vectors and decoded rows out. Knows no file and no torch.
//
// `product` is y [N, R] = x [N, C] W^T for a few vectors, on tensor cores, straight from packed memory. `decode` makes
// bfloat16 rows of W. Both are compiled once for each encoding, by nvrtc.py; cuda_packed.py says which sizes fit and
// card_layout.py lays the bytes out. The tests compile this file with g++ as well, which is why what g++ cannot read
// stands in one place, under "The machine".
//
// Units. W is cut into units of 16 rows and 256 columns; the units of 16 rows lie one after the other. A unit begins
// with its codes, four words for each of 32 lanes at a time, and ends with its scales.
//
// Codes. mma.m16n8k16 wants of lane 4 g + t the pairs of columns of row g, of row g + 8, and the next pairs of both:
// four registers. The order of the columns is ours to choose, if x has the same: of a group of columns (those with one
// scale, 32 or 16) a lane has those that follow each other from a quarter t of the group on. A code in the low bits of
// 0x4300 is the bfloat16 number 128 + code, exactly. So a word of eight 4-bit codes becomes the four registers by
// `word >> 4 j & 0x000F000F | 0x43004300`.
//
// Sums. What a code is too large by is taken off by starting a group's sums at minus that times the sum of x, which is
// a product of tensor cores too, with a constant matrix. The group's scale multiplies its sums in float32. Nothing but
// float32 sums and the bfloat16 result is rounded; nf4's table is a sum of two bfloat16 numbers (2^-17).
//
// Slots. A product has eight columns of sums, for eight vectors. With fewer, V, there are 8 / V slots: column n is
// vector n % V in slot n / V, and sees only the groups of its slot, for x is zero elsewhere. So a lane ends up with the
// sums of different groups, and multiplies those of a quarter of the groups (V = 1) with their scales, not of all.
//
// Macros: ENCODING (Q4_0, Q4_K, Q5_K, Q6_K, Q8_0, FP8, NF4), VECTORS (V: 1, 2, 4 or 8), N_TILES (of eight vectors, with V =
// 8), TILES (of 16 rows that share what is read of x), STAGES (units of a warp: the one that it multiplies with, and
// those that are on their way). A block has no more warps than a row of W has units.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;

constexpr int ROWS = 16, COLUMNS = 256, V = VECTORS, SLOTS = 8 / V;

// ---- The machine -----------------------------------------------------------------------------------------------

#ifndef EMULATED

#define INLINE __device__ __forceinline__

/// sums [16 rows, 8 vectors] += a [16 rows, 16 columns] b [16 columns, 8 vectors], in the lanes' fragments.
INLINE void mma(float (&sums)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %11, %12, %13};"
        : "=f"(sums[0]), "=f"(sums[1]), "=f"(sums[2]), "=f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(sums[0]), "f"(sums[1]), "f"(sums[2]),
          "f"(sums[3]));
}

/// Begin to copy 16 bytes; both addresses are multiples of 16.
INLINE void copy_16(u8 *shared, const u8 *global) {
    const u32 to = static_cast<u32>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}

INLINE void end_of_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

/// Wait for all groups of copies of this lane but the last LEFT.
template <int LEFT> INLINE void wait_for_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory"); }

/// (word & mask) | bits, in one instruction.
INLINE u32 and_or(u32 word, u32 mask, u32 bits) {
    u32 found;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(found) : "r"(word), "r"(mask), "r"(bits));
    return found;
}

/// word * factor (0 or 1), on the pipe of float32 numbers: that of and, or and shifts has enough to do.
INLINE u32 times(u32 word, u32 factor) {
    u32 found;
    asm("mul.lo.u32 %0, %1, %2;" : "=r"(found) : "r"(word), "r"(factor));
    return found;
}

/// The value, in a way that lets no compiler make it anew each time that it is needed, instead of keeping it.
INLINE u32 kept(u32 value) {
    u32 found;
    asm volatile("{ .reg .u32 lane; mov.u32 lane, %%laneid; shfl.sync.idx.b32 %0, %1, lane, 31, 0xFFFFFFFF; }"
                 : "=r"(found)
                 : "r"(value));
    return found;
}

/// The float16 numbers in the low and in the high half of a word.
INLINE float low_half(u32 word) {
    float found;
    asm("{ .reg .f16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, low; }" : "=f"(found) : "r"(word));
    return found;
}
INLINE float high_half(u32 word) {
    float found;
    asm("{ .reg .f16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, high; }" : "=f"(found) : "r"(word));
    return found;
}

/// Two bfloat16 numbers times 2^120, subnormal ones too; less a zero, for a card before Hopper only adds to products.
INLINE u32 raised(u32 pair) {
    u32 found;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(found) : "r"(pair), "r"(0x7B807B80), "r"(0x80008000));
    return found;
}

/// Two numbers rounded to bfloat16, to nearest or even: the first in the low half.
INLINE u32 rounded_pair(float low, float high) {
    u32 found;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(found) : "f"(high), "f"(low));
    return found;
}

#endif

// ---- Lanes and numbers -----------------------------------------------------------------------------------------

/// What a lane knows of itself, and constants, of which an instruction can name only one itself: the compiler may not
/// know them, or it would make them anew for each instruction, instead of keeping them.
struct Lane {
    int index, g, t;
    u32 nibbles, exponents, minus_exponents, float_exponent;
    u32 own[SLOTS];  // 1 for the slot of the lane's column of x, else 0

    /// `zero` is 0.
    INLINE Lane(int index, u32 zero)
        : index(index), g(index / 4), t(index % 4), nibbles(kept(0x000F000F ^ zero)), exponents(kept(0x43004300 ^ zero)),
          minus_exponents(kept(0xC300C300 ^ zero)), float_exponent(kept(0x4B000000 ^ zero)) {
#pragma unroll
        for (int slot = 0; slot < SLOTS; ++slot) own[slot] = kept(g / V == slot);
    }

    /// The group whose sums the lane has in column 2 t + i.
    INLINE int group(int round, int i) const { return round * SLOTS + (2 * t + i) / V; }
};

INLINE u32 word_at(const u8 *from) { return *reinterpret_cast<const u32 *>(from); }

INLINE void read_16(u32 (&words)[4], const u8 *from) {
    const uint4 found = *reinterpret_cast<const uint4 *>(from);
    words[0] = found.x, words[1] = found.y, words[2] = found.z, words[3] = found.w;
}

INLINE float low_bfloat16(u32 word) { return __uint_as_float(word << 16); }
INLINE float high_bfloat16(u32 word) { return __uint_as_float(word & 0xFFFF0000); }

/// Byte `index` of a word as a number 0..255, less `less`: its place in 2^23 + byte.
INLINE float byte_at(u32 word, int index, const Lane &lane, int less = 0) {
    return __uint_as_float(__byte_perm(word, lane.float_exponent, 0x7440 | index)) - float(8388608 + less);
}

/// A word of eight 4-bit codes as four pairs of bfloat16 numbers, 128 + code.
INLINE void spread(u32 (&pairs)[4], u32 word, const Lane &lane) {
#pragma unroll
    for (int j = 0; j < 4; ++j) pairs[j] = and_or(word >> 4 * j, lane.nibbles, lane.exponents);
}

/// The pairs' eight numbers less `bias`, by row (g, g + 8) and column.
INLINE void codes_of(float (&codes)[2][4], const u32 (&pairs)[4], float bias) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        codes[j % 2][j / 2 * 2] = low_bfloat16(pairs[j]) - bias;
        codes[j % 2][j / 2 * 2 + 1] = high_bfloat16(pairs[j]) - bias;
    }
}

/// Sums of rows g and g + 8 and two columns, each with the scale of its group, added to the totals. `scale` gives those
/// of the two rows for a group.
template <class Scale>
INLINE void add_scaled(
    float (&totals)[N_TILES][4], const float (&sums)[N_TILES][4], int round, const Lane &lane, const Scale &scale
) {
    const float2 first = scale(lane.group(round, 0)), second = V == 1 ? scale(lane.group(round, 1)) : first;
#pragma unroll
    for (int n = 0; n < N_TILES; ++n) {
        totals[n][0] += first.x * sums[n][0], totals[n][1] += second.x * sums[n][1];
        totals[n][2] += first.y * sums[n][2], totals[n][3] += second.y * sums[n][3];
    }
}

/// The same with a scale for each row.
INLINE void add_scaled(float (&totals)[N_TILES][4], const float (&sums)[N_TILES][4], float scale, float scale_8) {
#pragma unroll
    for (int n = 0; n < N_TILES; ++n) {
        totals[n][0] += scale * sums[n][0], totals[n][1] += scale * sums[n][1];
        totals[n][2] += scale_8 * sums[n][2], totals[n][3] += scale_8 * sums[n][3];
    }
}

INLINE void clear(float (&sums)[N_TILES][4]) {
#pragma unroll
    for (int n = 0; n < N_TILES; ++n) sums[n][0] = sums[n][1] = sums[n][2] = sums[n][3] = 0;
}

// ---- Encodings -------------------------------------------------------------------------------------------------
// Each is the state of a lane that goes through a unit. `begin` starts it. `read` is called for each group, in order;
// then `multiply` adds the group's products with x to the sums, or `codes` gives what stands for its weights in a
// half of 16 columns, each to be multiplied with `scale` and lessened by `less`. `add` scales a round of sums, `finish`
// ends the unit. `start` is what codes are too large by, as two bfloat16 numbers. `SHARED` bytes of shared memory are
// filled by `prepare` once a block.

struct Plain {
    static constexpr int GROUP = 32, SHARED = 0;
    INLINE static void prepare(u8 *) {}
    INLINE void begin(const u8 *, const u8 *) {}
    INLINE void finish(const u8 *, const Lane &, float (&)[N_TILES][4]) {}
    INLINE float2 less(const u8 *, int, const Lane &) const { return {0, 0}; }
};

/// Codes of 4 bits, a word for 16 columns: [4, 32 lanes, 4 words].
struct Nibbles : Plain {
    u32 words[4];
    INLINE void read(const u8 *unit, int group, const Lane &lane) {
        if (group % 2 == 0) read_16(words, unit + group / 2 * 512 + lane.index * 16);
    }

    INLINE void multiply(int group, const u32 (&x)[N_TILES][4], float (&sums)[N_TILES][4], const Lane &lane) const {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            u32 pairs[4];
            spread(pairs, words[group % 2 * 2 + half], lane);
#pragma unroll
            for (int n = 0; n < N_TILES; ++n) mma(sums[n], pairs, x[n][2 * half], x[n][2 * half + 1]);
        }
    }
};

/// d (q - 8), d float16 [8 rows g, 8 groups, rows g and g + 8].
struct Q4_0 : Nibbles {
    static constexpr int BYTES = 2048 + 256;
    static constexpr u32 LESS = 0xC308C308;  // -136

    INLINE float2 scale(const u8 *unit, int group, const Lane &lane) const {
        const u32 both = word_at(unit + 2048 + lane.g * 32 + group * 4);
        return {low_half(both), high_half(both)};
    }

    INLINE void add(const u8 *unit, int round, const Lane &lane, const float (&sums)[N_TILES][4],
                    const float (&)[N_TILES][4], float (&totals)[N_TILES][4]) {
        add_scaled(totals, sums, round, lane, [&](int group) { return scale(unit, group, lane); });
    }

    INLINE void codes(int group, int half, const Lane &lane, float (&found)[2][4]) const {
        u32 pairs[4];
        spread(pairs, words[group % 2 * 2 + half], lane);
        codes_of(found, pairs, 136);
    }
};

/// (d s) q - (e o): s, u8 [8 rows g, 4 pairs of groups, rows g and g + 8, group], o likewise, and d and e, float16
/// [8, rows g and g + 8, 2]. SCALES is where they begin.
template <int SCALES> struct SmallScales : Nibbles {
    static constexpr int BYTES = SCALES + 128 + 128 + 64;
    static constexpr u32 LESS = 0xC300C300;  // -128
    float scaled[N_TILES][4], offset[N_TILES][4];

    INLINE void begin(const u8 *, const u8 *) { clear(scaled), clear(offset); }

    INLINE static float2 small(const u8 *bytes, int group, const Lane &lane) {
        const u32 word = word_at(bytes + lane.g * 16 + group / 2 * 4);
        return {byte_at(word, group % 2, lane), byte_at(word, 2 + group % 2, lane)};
    }

    /// The offsets are multiplied with what the sums started with: -128 times the sum of x.
    INLINE void add(const u8 *unit, int round, const Lane &lane, const float (&sums)[N_TILES][4],
                    const float (&start)[N_TILES][4], float (&)[N_TILES][4]) {
        add_scaled(scaled, sums, round, lane, [&](int group) { return small(unit + SCALES, group, lane); });
        add_scaled(offset, start, round, lane, [&](int group) { return small(unit + SCALES + 128, group, lane); });
    }

    INLINE void finish(const u8 *unit, const Lane &lane, float (&totals)[N_TILES][4]) {
        const u32 factors = word_at(unit + SCALES + 256 + lane.g * 8);
        const u32 factors_8 = word_at(unit + SCALES + 260 + lane.g * 8);
        add_scaled(totals, scaled, low_half(factors), low_half(factors_8));
        add_scaled(totals, offset, high_half(factors) / 128, high_half(factors_8) / 128);
    }

    INLINE float2 scale(const u8 *unit, int group, const Lane &lane) const {
        const float2 found = small(unit + SCALES, group, lane);
        return {low_half(word_at(unit + SCALES + 256 + lane.g * 8)) * found.x,
                low_half(word_at(unit + SCALES + 260 + lane.g * 8)) * found.y};
    }

    INLINE float2 less(const u8 *unit, int group, const Lane &lane) const {
        const float2 found = small(unit + SCALES + 128, group, lane);
        return {high_half(word_at(unit + SCALES + 256 + lane.g * 8)) * found.x,
                high_half(word_at(unit + SCALES + 260 + lane.g * 8)) * found.y};
    }
};

struct Q4_K : SmallScales<2048> {
    INLINE void codes(int group, int half, const Lane &lane, float (&found)[2][4]) const {
        u32 pairs[4];
        spread(pairs, words[group % 2 * 2 + half], lane);
        codes_of(found, pairs, 128);
    }
};

/// As Q4_K with codes of 5 bits, five words for the sixteen registers of 64 columns: four as there, then the fifth ones,
/// [32 lanes, 4 words]. Three registers are at bits 0, 5 and 10 of either half of a word; the sixteenth has its bits at
/// bit 15 of the five.
struct Q5_K : SmallScales<2048 + 512> {
    u32 fifth[4];

    INLINE void read(const u8 *unit, int group, const Lane &lane) {
        Nibbles::read(unit, group, lane);
        if (group == 0) read_16(fifth, unit + 2048 + lane.index * 16);
    }

    INLINE u32 word(int group, int index) const { return index < 4 ? words[index % 4] : fifth[group / 2]; }

    INLINE void pairs_of(u32 (&pairs)[4], int group, int half, const Lane &lane) const {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int index = group % 2 * 8 + half * 4 + j;
            if (index < 15) {
                pairs[j] = and_or(word(group, index / 3) >> 5 * (index % 3), 0x001F001F, lane.exponents);
            } else {
                pairs[j] = lane.exponents;
#pragma unroll
                for (int bit = 0; bit < 5; ++bit)
                    pairs[j] = and_or(word(group, bit) >> (15 - bit), 0x00010001 << bit, pairs[j]);
            }
        }
    }

    INLINE void multiply(int group, const u32 (&x)[N_TILES][4], float (&sums)[N_TILES][4], const Lane &lane) const {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            u32 pairs[4];
            pairs_of(pairs, group, half, lane);
#pragma unroll
            for (int n = 0; n < N_TILES; ++n) mma(sums[n], pairs, x[n][2 * half], x[n][2 * half + 1]);
        }
    }

    INLINE void codes(int group, int half, const Lane &lane, float (&found)[2][4]) const {
        u32 pairs[4];
        pairs_of(pairs, group, half, lane);
        codes_of(found, pairs, 128);
    }
};

/// (d s) (q - 32) in groups of 16. Codes of 6 bits, three words for the eight registers of 32 columns, [2, 3, 32 lanes, 4
/// words]: registers 0, 1 and 2, 3 and 4, 5 at bits 0 and 6 of either half; 6 and 7 have their lower four bits at bit
/// 12 of the first and second word, the upper two at bits 12 and 14 of the third. Then s + 128, u8 [8 rows g, 8 pairs of
/// groups, rows g and g + 8, group], and d, float16 [8, 2].
struct Q6_K : Plain {
    static constexpr int GROUP = 16, BYTES = 3072 + 256 + 32;
    static constexpr u32 LESS = 0xC320C320;  // -160
    u32 words[3][4];
    float scaled[N_TILES][4];

    INLINE void begin(const u8 *, const u8 *) { clear(scaled); }

    INLINE void read(const u8 *unit, int group, const Lane &lane) {
        if (group % 8 > 0) return;
#pragma unroll
        for (int i = 0; i < 3; ++i) read_16(words[i], unit + (group / 8 * 3 + i) * 512 + lane.index * 16);
    }

    INLINE u32 word(int index) const { return words[index / 4][index % 4]; }

    INLINE void pairs_of(u32 (&pairs)[4], int group, const Lane &lane) const {
        const int first = group / 2 % 4 * 3;
        const u32 a = word(first), b = word(first + 1), c = word(first + 2);
        constexpr u32 SIX = 0x003F003F, UPPER = 0x00300030;
        pairs[0] = and_or(group % 2 ? c : a, SIX, lane.exponents);
        pairs[1] = and_or((group % 2 ? c : a) >> 6, SIX, lane.exponents);
        if (group % 2) {
            pairs[2] = and_or(c >> 8, UPPER, and_or(a >> 12, lane.nibbles, lane.exponents));
            pairs[3] = and_or(c >> 10, UPPER, and_or(b >> 12, lane.nibbles, lane.exponents));
        } else {
            pairs[2] = and_or(b, SIX, lane.exponents);
            pairs[3] = and_or(b >> 6, SIX, lane.exponents);
        }
    }

    INLINE void multiply(int group, const u32 (&x)[N_TILES][4], float (&sums)[N_TILES][4], const Lane &lane) const {
        u32 pairs[4];
        pairs_of(pairs, group, lane);
#pragma unroll
        for (int n = 0; n < N_TILES; ++n) mma(sums[n], pairs, x[n][0], x[n][1]);
    }

    INLINE static float2 small(const u8 *unit, int group, const Lane &lane) {
        const u32 word = word_at(unit + 3072 + lane.g * 32 + group / 2 * 4);
        return {byte_at(word, group % 2, lane, 128), byte_at(word, 2 + group % 2, lane, 128)};
    }

    INLINE void add(const u8 *unit, int round, const Lane &lane, const float (&sums)[N_TILES][4],
                    const float (&)[N_TILES][4], float (&)[N_TILES][4]) {
        add_scaled(scaled, sums, round, lane, [&](int group) { return small(unit, group, lane); });
    }

    INLINE void finish(const u8 *unit, const Lane &lane, float (&totals)[N_TILES][4]) {
        const u32 factors = word_at(unit + 3328 + lane.g * 4);
        add_scaled(totals, scaled, low_half(factors), high_half(factors));
    }

    INLINE float2 scale(const u8 *unit, int group, const Lane &lane) const {
        const float2 found = small(unit, group, lane);
        const u32 factors = word_at(unit + 3328 + lane.g * 4);
        return {low_half(factors) * found.x, high_half(factors) * found.y};
    }

    INLINE void codes(int group, int, const Lane &lane, float (&found)[2][4]) const {
        u32 pairs[4];
        pairs_of(pairs, group, lane);
        codes_of(found, pairs, 160);
    }
};

/// d q: q as bytes, a word for two registers and 16 columns, [8, 32 lanes, 4 words]; then d as in Q4_0. The lower seven
/// bits give 128 + q, or 256 + q where q is negative, and the sign gives as much as that is too large by.
struct Q8_0 : Plain {
    static constexpr int BYTES = 4096 + 256;
    static constexpr u32 LESS = 0;
    u32 words[4];

    INLINE void read(const u8 *unit, int group, const Lane &lane) {
        read_16(words, unit + group * 512 + lane.index * 16);
    }

    INLINE void pairs_of(u32 (&pairs)[4], u32 (&signs)[4], int half, const Lane &lane) const {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const u32 word = words[2 * half + j / 2] >> 8 * (j % 2);
            pairs[j] = and_or(word, 0x007F007F, lane.exponents);
            signs[j] = and_or(word, 0x00800080, lane.minus_exponents);
        }
    }

    INLINE void multiply(int, const u32 (&x)[N_TILES][4], float (&sums)[N_TILES][4], const Lane &lane) const {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            u32 pairs[4], signs[4];
            pairs_of(pairs, signs, half, lane);
#pragma unroll
            for (int n = 0; n < N_TILES; ++n) {
                mma(sums[n], signs, x[n][2 * half], x[n][2 * half + 1]);
                mma(sums[n], pairs, x[n][2 * half], x[n][2 * half + 1]);
            }
        }
    }

    INLINE float2 scale(const u8 *unit, int group, const Lane &lane) const {
        const u32 both = word_at(unit + 4096 + lane.g * 32 + group * 4);
        return {low_half(both), high_half(both)};
    }

    INLINE void add(const u8 *unit, int round, const Lane &lane, const float (&sums)[N_TILES][4],
                    const float (&)[N_TILES][4], float (&totals)[N_TILES][4]) {
        add_scaled(totals, sums, round, lane, [&](int group) { return scale(unit, group, lane); });
    }

    INLINE void codes(int, int half, const Lane &lane, float (&found)[2][4]) const {
        u32 pairs[4], signs[4];
        float less[2][4];
        pairs_of(pairs, signs, half, lane);
        codes_of(found, pairs, 0);
        codes_of(less, signs, 0);
#pragma unroll
        for (int row = 0; row < 2; ++row)
#pragma unroll
            for (int i = 0; i < 4; ++i) found[row][i] += less[row][i];
    }
};

/// s q: q as in Q8_0, but e4m3; then s of 128 columns, float32 [8 rows g, 2, rows g and g + 8]. With its bits moved, q is
/// 2^-120 of itself as a bfloat16 number.
struct FP8 : Plain {
    static constexpr int BYTES = 4096 + 128;
    static constexpr u32 LESS = 0;
    u32 words[4];

    INLINE void read(const u8 *unit, int group, const Lane &lane) {
        read_16(words, unit + group * 512 + lane.index * 16);
    }

    INLINE void pairs_of(u32 (&pairs)[4], int half) const {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const u32 word = j % 2 ? words[2 * half + j / 2] : words[2 * half + j / 2] << 8;
            pairs[j] = raised(and_or(word >> 4, 0x07F007F0, word & 0x80008000));
        }
    }

    INLINE void multiply(int, const u32 (&x)[N_TILES][4], float (&sums)[N_TILES][4], const Lane &) const {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            u32 pairs[4];
            pairs_of(pairs, half);
#pragma unroll
            for (int n = 0; n < N_TILES; ++n) mma(sums[n], pairs, x[n][2 * half], x[n][2 * half + 1]);
        }
    }

    INLINE float2 scale(const u8 *unit, int group, const Lane &lane) const {
        return *reinterpret_cast<const float2 *>(unit + 4096 + lane.g * 16 + group / 4 * 8);
    }

    INLINE void add(const u8 *unit, int round, const Lane &lane, const float (&sums)[N_TILES][4],
                    const float (&)[N_TILES][4], float (&totals)[N_TILES][4]) {
        add_scaled(totals, sums, round, lane, [&](int group) { return scale(unit, group, lane); });
    }

    INLINE void codes(int, int half, const Lane &, float (&found)[2][4]) const {
        u32 pairs[4];
        pairs_of(pairs, half);
        codes_of(found, pairs, 0);
    }
};

__constant__ float NF4_TABLE[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
    -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
    0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f,
};

/// a TABLE[code]: after the codes, a byte for a register, the magnitudes a of 64 columns, float32 [8 rows g, 4, rows g
/// and g + 8]. A byte of two codes is looked up in shared memory, in a copy of the table for each lane (its banks), as
/// the pair of bfloat16 numbers and the pair of what is left of them.
struct NF4 : Nibbles {
    static constexpr int BYTES = 2048 + 256, SHARED = 256 * 32 * 8;
    static constexpr u32 LESS = 0;
    const u8 *table;

    INLINE static void prepare(u8 *shared) {
        u32 *table = reinterpret_cast<u32 *>(shared);
        for (int i = threadIdx.x; i < 256 * 32; i += blockDim.x) {
            const float first = NF4_TABLE[i / 32 & 15], second = NF4_TABLE[i / 512];
            table[i] = rounded_pair(first, second);
            table[256 * 32 + i] = rounded_pair(first - low_bfloat16(table[i]), second - high_bfloat16(table[i]));
        }
        __syncthreads();
    }

    INLINE void begin(const u8 *, const u8 *shared) { table = shared; }

    INLINE void multiply(int group, const u32 (&x)[N_TILES][4], float (&sums)[N_TILES][4], const Lane &lane) const {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            u32 pairs[4], left[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const u32 word = words[group % 2 * 2 + half];
                const u8 *const place = table + and_or(j == 0 ? word << 7 : word >> (8 * j - 7), 0x7F80, lane.index * 4);
                pairs[j] = word_at(place), left[j] = word_at(place + 256 * 32 * 4);
            }
#pragma unroll
            for (int n = 0; n < N_TILES; ++n) {
                mma(sums[n], left, x[n][2 * half], x[n][2 * half + 1]);
                mma(sums[n], pairs, x[n][2 * half], x[n][2 * half + 1]);
            }
        }
    }

    INLINE float2 scale(const u8 *unit, int group, const Lane &lane) const {
        return *reinterpret_cast<const float2 *>(unit + 2048 + lane.g * 32 + group / 2 * 8);
    }

    INLINE void add(const u8 *unit, int round, const Lane &lane, const float (&sums)[N_TILES][4],
                    const float (&)[N_TILES][4], float (&totals)[N_TILES][4]) {
        add_scaled(totals, sums, round, lane, [&](int group) { return scale(unit, group, lane); });
    }

    /// The table is here of float32, a copy for each lane.
    INLINE void codes(int group, int half, const Lane &lane, float (&found)[2][4]) const {
        const float *values = reinterpret_cast<const float *>(table) + lane.index;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const u32 both = words[group % 2 * 2 + half] >> 8 * j;
            found[j % 2][j / 2 * 2] = values[(both & 15) * 32];
            found[j % 2][j / 2 * 2 + 1] = values[(both >> 4 & 15) * 32];
        }
    }
};

using Encoding = ENCODING;
constexpr int GROUP = Encoding::GROUP, ROUNDS = COLUMNS / GROUP / SLOTS, HALVES = GROUP / 16;

// ---- Products --------------------------------------------------------------------------------------------------

/// What the lane multiplies with in a group, from the first column on that is its own.
INLINE void read_x(u32 (&x)[4], const u8 *from) {
    if (GROUP == 32) {
        const uint4 found = __ldg(reinterpret_cast<const uint4 *>(from));
        x[0] = found.x, x[1] = found.y, x[2] = found.z, x[3] = found.w;
    } else {
        const uint2 found = __ldg(reinterpret_cast<const uint2 *>(from));
        x[0] = found.x, x[1] = found.y;
    }
}

/// Minus what codes are too large by (`less`) times the sums of x in the groups of a round.
INLINE void start_sums(float (&start)[N_TILES][4], const u32 (&x)[N_TILES][4], const u32 (&less)[4]) {
    clear(start);
    if (Encoding::LESS == 0) return;
#pragma unroll
    for (int n = 0; n < N_TILES; ++n)
#pragma unroll
        for (int half = 0; half < HALVES; ++half) mma(start[n], less, x[n][2 * half], x[n][2 * half + 1]);
}

/// Add the products of TILES units with x to the totals; `x` is where the lane's columns of them begin.
INLINE void multiply_units(
    float (&totals)[TILES][N_TILES][4], const u8 *units, const u8 *shared, const u8 *const (&x)[N_TILES],
    const u32 (&less)[4], const Lane &lane
) {
    Encoding tiles[TILES];
#pragma unroll
    for (int m = 0; m < TILES; ++m) tiles[m].begin(units + m * Encoding::BYTES, shared);
#pragma unroll
    for (int round = 0; round < ROUNDS; ++round) {
        u32 part[N_TILES][4];
        float start[N_TILES][4], sums[TILES][N_TILES][4];
#pragma unroll
        for (int n = 0; n < N_TILES; ++n) read_x(part[n], x[n] + round * SLOTS * GROUP * 2);
        start_sums(start, part, less);
#pragma unroll
        for (int m = 0; m < TILES; ++m)
#pragma unroll
            for (int n = 0; n < N_TILES; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) sums[m][n][i] = start[n][i];
#pragma unroll
        for (int slot = 0; slot < SLOTS; ++slot) {
            const int group = round * SLOTS + slot;
            u32 own[N_TILES][4];
#pragma unroll
            for (int n = 0; n < N_TILES; ++n)
#pragma unroll
                for (int i = 0; i < 2 * HALVES; ++i)
                    own[n][i] = SLOTS == 1 ? part[n][i] : times(part[n][i], lane.own[slot]);
#pragma unroll
            for (int m = 0; m < TILES; ++m) {
                tiles[m].read(units + m * Encoding::BYTES, group, lane);
                tiles[m].multiply(group, own, sums[m], lane);
            }
        }
#pragma unroll
        for (int m = 0; m < TILES; ++m)
            tiles[m].add(units + m * Encoding::BYTES, round, lane, sums[m], start, totals[m]);
    }
#pragma unroll
    for (int m = 0; m < TILES; ++m) tiles[m].finish(units + m * Encoding::BYTES, lane, totals[m]);
}

/// The totals of all slots, in the columns of the first: each lane has a vector's part of two rows, or of a few groups.
INLINE void join_slots(float (&totals)[4]) {
    if (V == 1) totals[0] += totals[1], totals[2] += totals[3];
#pragma unroll
    for (int i = 0; i < 4; i += V == 1 ? 2 : 1) {
        if (V <= 2) totals[i] += __shfl_xor_sync(0xFFFFFFFF, totals[i], 1);
        if (V <= 4) totals[i] += __shfl_xor_sync(0xFFFFFFFF, totals[i], 2);
    }
}

/// The units that a warp copies, one after the other: every `warps`th of a block's rows, then those of its next rows.
struct Copies {
    const u8 *weight, *from;  // `from` is of this lane
    u8 *stages;
    int row_tiles, units, warp, warps, lane, group, unit, slot;

    INLINE Copies(const u8 *weight, u8 *stages, int row_tiles, int units, int warp, int warps, int lane)
        : weight(weight), stages(stages), row_tiles(row_tiles), units(units), warp(warp), warps(warps), lane(lane),
          slot(0) {
        go_to(blockIdx.x);
    }

    INLINE void go_to(int rows) {
        group = rows, unit = warp;
        from = weight + (static_cast<long long>(group) * TILES * units + warp) * Encoding::BYTES + lane * 16;
    }

    /// Begin to copy the next unit of TILES into the next slot; nothing after the last one.
    INLINE void begin() {
        if (group * TILES < row_tiles) {
#pragma unroll
            for (int m = 0; m < TILES; ++m) {
                const int tile = min(m, row_tiles - 1 - group * TILES);  // where there are no more, the last again
                const u8 *const source = from + static_cast<long long>(tile) * units * Encoding::BYTES;
                u8 *const to = stages + slot + m * Encoding::BYTES + lane * 16;
#pragma unroll
                for (int at = 0; at < Encoding::BYTES; at += 512)
                    if (at + 512 <= Encoding::BYTES || at + lane * 16 < Encoding::BYTES) copy_16(to + at, source + at);
            }
        }
        end_of_copies();
        slot = slot == (STAGES - 1) * TILES * Encoding::BYTES ? 0 : slot + TILES * Encoding::BYTES;
        unit += warps, from += warps * Encoding::BYTES;
        if (unit >= units) go_to(group + gridDim.x);
    }
};

/// y [vectors, 16 row_tiles] = x [vectors, 256 units] W^T. The warps of a block share the columns; a block goes on to
/// further rows. Shared memory: Encoding::SHARED, then sums of each warp, then STAGES units of TILES for each warp.
extern "C" __global__ void __launch_bounds__(512) product(
    const u8 *__restrict__ weight, const u8 *__restrict__ x, u16 *__restrict__ y, int row_tiles, int units, int vectors
) {
    extern __shared__ __align__(16) u8 shared[];
    constexpr int FRAGMENTS = TILES * N_TILES, SLOT = TILES * Encoding::BYTES;
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const Lane lane(threadIdx.x % 32, row_tiles >> 31);
    const int groups = (row_tiles + TILES - 1) / TILES;
    u8 *const sums = shared + Encoding::SHARED;
    u8 *const stages = sums + warps * FRAGMENTS * 512 + warp * STAGES * SLOT;

    Copies copies(weight, stages, row_tiles, units, warp, warps, lane.index);
#pragma unroll
    for (int i = 0; i < STAGES - 1; ++i) copies.begin();
    Encoding::prepare(shared);

    // Four registers with the same number, which the compiler would copy from one again and again if it knew that.
    const int positive[4] = {row_tiles, units, vectors, static_cast<int>(gridDim.x)};
    u32 less[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) less[i] = kept(Encoding::LESS ^ (positive[i] >> 31));

    const u8 *rows[N_TILES];  // where there are not so many vectors the last of them: what comes of it is not written
#pragma unroll
    for (int n = 0; n < N_TILES; ++n) {
        const int vector = min(n * V + lane.g % V, vectors - 1);
        rows[n] = x + static_cast<long long>(vector) * units * (2 * COLUMNS) + 2 * GROUP * (lane.g / V) +
                  GROUP / 2 * lane.t;
    }

    int slot = 0;
    for (int group = blockIdx.x; group < groups; group += gridDim.x) {
        float totals[TILES][N_TILES][4] = {};
        for (int unit = warp; unit < units; unit += warps) {
            copies.begin();
            const u8 *part[N_TILES];
#pragma unroll
            for (int n = 0; n < N_TILES; ++n) part[n] = rows[n] + unit * (2 * COLUMNS);
            wait_for_copies<STAGES - 1>();
            __syncwarp();
            multiply_units(totals, stages + slot, shared, part, less, lane);
            __syncwarp();  // the slot is filled again in the next round
            slot = slot == (STAGES - 1) * SLOT ? 0 : slot + SLOT;
        }

#pragma unroll
        for (int m = 0; m < TILES; ++m)
#pragma unroll
            for (int n = 0; n < N_TILES; ++n) {
                float(&part)[4] = totals[m][n];
                join_slots(part);
                float4 *const to = reinterpret_cast<float4 *>(sums + (warp * FRAGMENTS + m * N_TILES + n) * 512);
                to[lane.index] = {part[0], part[1], part[2], part[3]};
            }
        __syncthreads();
        for (int i = threadIdx.x; i < FRAGMENTS * ROWS * V; i += blockDim.x) {
            const int row = i % ROWS, column = i / ROWS % V, fragment = i / (ROWS * V);
            const int tile = group * TILES + fragment / N_TILES, vector = fragment % N_TILES * V + column;
            if (vector >= vectors || tile >= row_tiles) continue;
            const int place = (row % 8 * 4 + column / 2) * 4 + row / 8 * 2 + column % 2;
            float total = 0;
            for (int w = 0; w < warps; ++w)
                total += reinterpret_cast<const float *>(sums + (w * FRAGMENTS + fragment) * 512)[place];
            y[(static_cast<long long>(vector) * row_tiles + tile) * ROWS + row] = rounded_pair(total, 0) & 0xFFFF;
        }
        __syncthreads();
    }
}

// ---- Rows ------------------------------------------------------------------------------------------------------

/// A lane's weights of a unit, as bfloat16 numbers: `write` gets 0 for row g or 1 for g + 8, the byte of a row at which
/// they begin, and a group's numbers in pairs.
template <class Write> INLINE void decode_unit(const u8 *unit, const u8 *shared, const Lane &lane, const Write &write) {
    Encoding state;
    state.begin(unit, shared);
#pragma unroll
    for (int group = 0; group < COLUMNS / GROUP; ++group) {
        state.read(unit, group, lane);
        const float2 scale = state.scale(unit, group, lane), less = state.less(unit, group, lane);
        u32 pairs[2][4];
#pragma unroll
        for (int half = 0; half < HALVES; ++half) {
            float codes[2][4];
            state.codes(group, half, lane, codes);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const float(&upper)[4] = codes[0], (&lower)[4] = codes[1];
                pairs[0][2 * half + i] =
                    rounded_pair(scale.x * upper[2 * i] - less.x, scale.x * upper[2 * i + 1] - less.x);
                pairs[1][2 * half + i] =
                    rounded_pair(scale.y * lower[2 * i] - less.y, scale.y * lower[2 * i + 1] - less.y);
            }
        }
#pragma unroll
        for (int row = 0; row < 2; ++row) write(row, 2 * GROUP * group + GROUP / 2 * lane.t, pairs[row]);
    }
}

INLINE void write_pairs(u8 *to, const u32 (&pairs)[4]) {
    if (GROUP == 32)
        *reinterpret_cast<uint4 *>(to) = {pairs[0], pairs[1], pairs[2], pairs[3]};
    else
        *reinterpret_cast<uint2 *>(to) = {pairs[0], pairs[1]};
}

/// nf4's table in float32, a copy for each lane, in 2048 bytes of shared memory.
INLINE void prepare_exact(u8 *shared) {
    if (Encoding::SHARED == 0) return;
    for (int i = threadIdx.x; i < 16 * 32; i += blockDim.x) reinterpret_cast<float *>(shared)[i] = NF4_TABLE[i / 32];
    __syncthreads();
}

/// bfloat16 rows [16 row_tiles, 256 units] of W, from its row tile `first` on: a warp for each unit.
extern "C" __global__ void __launch_bounds__(256) decode(
    const u8 *__restrict__ weight, u8 *__restrict__ rows, int first, int row_tiles, int units
) {
    extern __shared__ __align__(16) u8 shared[];
    const Lane lane(threadIdx.x % 32, row_tiles >> 31);
    prepare_exact(shared);
    const long long place = static_cast<long long>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
    if (place >= static_cast<long long>(row_tiles) * units) return;
    const long long row_bytes = 2ll * COLUMNS * units;
    u8 *const to = rows + (place / units * ROWS + lane.g) * row_bytes + place % units * (2 * COLUMNS);
    decode_unit(
        weight + (static_cast<long long>(first) * units + place) * Encoding::BYTES, shared, lane,
        [&](int row, int at, const u32(&pairs)[4]) { write_pairs(to + row * 8 * row_bytes + at, pairs); }
    );
}

/// bfloat16 rows [tokens, 256 units]: those of W [16 row_tiles, 256 units] that `ids` name, a warp for each unit.
extern "C" __global__ void __launch_bounds__(256) look_up(
    const u8 *__restrict__ weight, const long long *__restrict__ ids, u8 *__restrict__ rows, int tokens, int row_tiles,
    int units
) {
    extern __shared__ __align__(16) u8 shared[];
    const Lane lane(threadIdx.x % 32, units >> 31);
    prepare_exact(shared);
    const long long place = static_cast<long long>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
    if (place >= static_cast<long long>(tokens) * units) return;
    const long long id = min(max(ids[place / units], 0ll), ROWS * static_cast<long long>(row_tiles) - 1);
    u8 *const to = rows + place * (2 * COLUMNS);
    decode_unit(
        weight + (id / ROWS * units + place % units) * Encoding::BYTES, shared, lane,
        [&](int row, int at, const u32(&pairs)[4]) {
            if (8 * row + lane.g == id % ROWS) write_pairs(to + at, pairs);
        }
    );
}
