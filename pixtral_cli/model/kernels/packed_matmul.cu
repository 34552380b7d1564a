// Packed weights W [R, C] in, products with N bfloat16 vectors and decoded rows out. Knows no file and no torch.
//
// `product` is y [N, R] = x [N, C] W^T for N up to 8 (times N_TILES), on tensor cores, straight from packed memory.
// `decode` makes bfloat16 rows of W. Both are compiled once for each encoding, by nvrtc.py; cuda_packed.py lays the
// bytes out and says which sizes fit. The tests compile this file with g++ as well, which is why what g++ cannot read
// stands in one place, under "The machine".
//
// Units. W is cut into units of 16 rows and 256 columns; the units of 16 rows lie one after the other. A unit begins
// with its codes, four words for each of 32 lanes at a time, and ends with its scales.
//
// Codes. mma.m16n8k16 wants of lane 4 g + t the pairs of columns of row g, of row g + 8, and the next pairs of both:
// four registers. The order of the columns is ours to choose, if x has the same: a lane has eight that follow each
// other of every 32 (8 t ..), so that it reads x 16 bytes at a time; four of every 16 in q6_k, whose groups are 16. A
// code in the low bits of 0x4300 is the bfloat16 number 128 + code, exactly. So a word of eight 4-bit codes becomes
// four registers by `word >> 4 j & 0x000F000F | 0x43004300`.
//
// Sums. What a code is too large by is taken off by starting a group's sums at minus that times the sum of x, which
// is a product of tensor cores too, with a constant matrix. The group's scale multiplies its sums in float32. Nothing
// but float32 sums and the bfloat16 result is rounded; nf4's table is a sum of two bfloat16 numbers (2^-17).
//
// Macros: ENCODING (Q4_0, Q4_K, Q6_K, Q8_0, NF4), TILES (of 16 rows that share what is read of x), N_TILES (of 8
// vectors), STAGES (units in flight for each warp, and one more that it multiplies with).

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;

constexpr int ROWS = 16, COLUMNS = 256, STEPS = COLUMNS / 32, VECTORS = 8;

// ---- The machine -----------------------------------------------------------------------------------------------

#ifndef EMULATED

#define INLINE __device__ __forceinline__

/// sums [16 rows, 8 vectors] += a [16 rows, 16 columns] b [16 columns, 8 vectors], in the lanes' fragments.
INLINE void mma(float (&sums)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
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

/// Two numbers rounded to bfloat16, to nearest or even: the first in the low half.
INLINE u32 rounded_pair(float low, float high) {
    u32 found;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(found) : "f"(high), "f"(low));
    return found;
}

#endif

// ---- Numbers ---------------------------------------------------------------------------------------------------

INLINE void read_16(u32 (&words)[4], const u8 *from) {
    const uint4 found = *reinterpret_cast<const uint4 *>(from);
    words[0] = found.x, words[1] = found.y, words[2] = found.z, words[3] = found.w;
}

INLINE float low_bfloat16(u32 word) { return __uint_as_float(word << 16); }
INLINE float high_bfloat16(u32 word) { return __uint_as_float(word & 0xFFFF0000); }

/// Constants that the compiler may not know: it would make them anew for each instruction, instead of keeping them.
struct Constants {
    u32 nibbles, upper, exponents, sixteens, float_exponent;
    /// `zero` is 0.
    INLINE explicit Constants(u32 zero)
        : nibbles(0x000F000F ^ zero), upper(0x00300030 ^ zero), exponents(0x43004300 ^ zero),
          sixteens(0x45004500 ^ zero), float_exponent(0x4B000000 ^ zero) {}
};

/// Byte `index` of a word as a number 0..255: its place in 2^23 + byte.
INLINE float byte_at(u32 word, int index, const Constants &constants) {
    return __uint_as_float(__byte_perm(word, constants.float_exponent, 0x7440 | index)) - 8388608.0f;
}

/// A word of eight 4-bit codes as four pairs of bfloat16 numbers: 128 + code.
INLINE void spread(u32 (&pairs)[4], u32 word, const Constants &constants) {
#pragma unroll
    for (int j = 0; j < 4; ++j) pairs[j] = and_or(word >> 4 * j, constants.nibbles, constants.exponents);
}

/// The same as 2048 + 16 code.
INLINE void spread_sixteens(u32 (&pairs)[4], u32 word, const Constants &constants) {
#pragma unroll
    for (int j = 0; j < 4; ++j) pairs[j] = and_or(word >> 4 * j, constants.nibbles, constants.sixteens);
}

/// Sums of a group of rows g and g + 8, scaled, added to the totals.
INLINE void add_scaled(float (&totals)[4], const float (&sums)[4], float scale, float scale_8) {
    totals[0] += scale * sums[0], totals[1] += scale * sums[1];
    totals[2] += scale_8 * sums[2], totals[3] += scale_8 * sums[3];
}

/// x of 32 columns as the lanes hold it, for each 8 vectors, and for two halves of them what the sums start with.
struct Vectors {
    u32 x[N_TILES][4];
    float start[N_TILES][2][4];

    /// One start for all 32 columns: minus `less` times the sum of x.
    INLINE void start_whole(u32 less) {
        const u32 constant[4] = {less, less, less, less};
#pragma unroll
        for (int n = 0; n < N_TILES; ++n) {
            float(&sums)[4] = start[n][0];
            sums[0] = sums[1] = sums[2] = sums[3] = 0;
            mma(sums, constant, x[n][0], x[n][1]);
            mma(sums, constant, x[n][2], x[n][3]);
        }
    }

    /// One for each 16 columns.
    INLINE void start_halves(u32 less) {
        const u32 constant[4] = {less, less, less, less};
#pragma unroll
        for (int n = 0; n < N_TILES; ++n) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float(&sums)[4] = start[n][half];
                sums[0] = sums[1] = sums[2] = sums[3] = 0;
                mma(sums, constant, x[n][2 * half], x[n][2 * half + 1]);
            }
        }
    }

    INLINE void read_start(float (&sums)[4], int n, int half) const {
        sums[0] = start[n][half][0], sums[1] = start[n][half][1];
        sums[2] = start[n][half][2], sums[3] = start[n][half][3];
    }
};

// ---- Encodings -------------------------------------------------------------------------------------------------
// Each is the state of a lane that goes through a unit: `begin` reads scales, `multiply` takes 32 columns on, `finish`
// ends the unit. `decode` gives the lane's eight weights of those columns, of row g and of row g + 8. `SHARED` bytes
// of shared memory are filled by `prepare` once a block. ADJACENT: columns of a lane that follow each other.

struct Plain {
    Constants constants{0};
    static constexpr int ADJACENT = 8, SHARED = 0;
    INLINE static void prepare(u8 *) {}
    INLINE void finish(float (&)[N_TILES][4]) {}
};

/// Codes of 4 bits, one word for 16 columns: [4, 32 lanes, 4 words]; a step of 32 columns has two of the words.
struct Nibbles : Plain {
    u32 words[4];
    INLINE void read_codes(const u8 *unit, int step, int lane) {
        if (step % 2 == 0) read_16(words, unit + step / 2 * 512 + lane * 16);
    }
};

/// A scale for 32 columns, float16 [8 rows g, 8 groups, rows g and g + 8].
struct HalfScales {
    u32 low[4], high[4];
    INLINE void read(const u8 *scales, int lane) {
        read_16(low, scales + lane / 4 * 32);
        read_16(high, scales + lane / 4 * 32 + 16);
    }
    INLINE u32 at(int step) const { return step < 4 ? low[step & 3] : high[step & 3]; }
};

/// d (q - 8)
struct Q4_0 : Nibbles {
    static constexpr int BYTES = 2048 + 256;
    static constexpr u32 LESS = 0xC308C308;  // -136
    HalfScales scales;

    INLINE void begin(const u8 *unit, const u8 *, int lane) { scales.read(unit + 2048, lane); }
    INLINE static void start(Vectors &vectors) { vectors.start_whole(LESS); }

    INLINE void multiply(const u8 *unit, int step, int lane, const Vectors &vectors, float (&totals)[N_TILES][4]) {
        read_codes(unit, step, lane);
        u32 first[4], second[4];
        spread(first, words[step % 2 * 2], constants);
        spread(second, words[step % 2 * 2 + 1], constants);
        const float scale = low_half(scales.at(step)), scale_8 = high_half(scales.at(step));
#pragma unroll
        for (int n = 0; n < N_TILES; ++n) {
            float sums[4];
            vectors.read_start(sums, n, 0);
            mma(sums, first, vectors.x[n][0], vectors.x[n][1]);
            mma(sums, second, vectors.x[n][2], vectors.x[n][3]);
            add_scaled(totals[n], sums, scale, scale_8);
        }
    }

    INLINE void decode(const u8 *unit, int step, int lane, float (&weights)[2][8]) {
        read_codes(unit, step, lane);
        const float scale[2] = {low_half(scales.at(step)), high_half(scales.at(step))};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            u32 pairs[4];
            spread(pairs, words[step % 2 * 2 + half], constants);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int row = j % 2, at = 4 * half + j / 2 * 2;
                weights[row][at] = scale[row] * (low_bfloat16(pairs[j]) - 136.0f);
                weights[row][at + 1] = scale[row] * (high_bfloat16(pairs[j]) - 136.0f);
            }
        }
    }
};

/// (d s) q - (e o): after the codes s, u8 [8 rows g, rows g and g + 8, 8 groups], o likewise, float16 [8, 2, d and e].
struct Q4_K : Nibbles {
    static constexpr int BYTES = 2048 + 128 + 128 + 64;
    static constexpr u32 LESS = 0xC300C300;  // -128
    u32 scales[4], offsets[4];
    uint2 units;
    float scaled[N_TILES][4], offset[N_TILES][4];

    INLINE void begin(const u8 *unit, const u8 *, int lane) {
        read_16(scales, unit + 2048 + lane / 4 * 16);
        read_16(offsets, unit + 2176 + lane / 4 * 16);
        units = *reinterpret_cast<const uint2 *>(unit + 2304 + lane / 4 * 8);
#pragma unroll
        for (int n = 0; n < N_TILES; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) scaled[n][i] = offset[n][i] = 0;
    }
    INLINE static void start(Vectors &vectors) { vectors.start_whole(LESS); }

    INLINE void multiply(const u8 *unit, int step, int lane, const Vectors &vectors, float (&)[N_TILES][4]) {
        read_codes(unit, step, lane);
        u32 first[4], second[4];
        spread(first, words[step % 2 * 2], constants);
        spread(second, words[step % 2 * 2 + 1], constants);
        const float scale = byte_at(scales[step / 4], step % 4, constants), scale_8 = byte_at(scales[2 + step / 4], step % 4, constants);
        const float less = byte_at(offsets[step / 4], step % 4, constants), less_8 = byte_at(offsets[2 + step / 4], step % 4, constants);
#pragma unroll
        for (int n = 0; n < N_TILES; ++n) {
            float sums[4], start[4];
            vectors.read_start(start, n, 0);
            vectors.read_start(sums, n, 0);
            mma(sums, first, vectors.x[n][0], vectors.x[n][1]);
            mma(sums, second, vectors.x[n][2], vectors.x[n][3]);
            add_scaled(scaled[n], sums, scale, scale_8);
            add_scaled(offset[n], start, less, less_8);
        }
    }

    /// The offsets were multiplied with -128 times the sum of x.
    INLINE void finish(float (&totals)[N_TILES][4]) {
        const float d = low_half(units.x), d_8 = low_half(units.y);
        const float e = high_half(units.x) / 128, e_8 = high_half(units.y) / 128;
#pragma unroll
        for (int n = 0; n < N_TILES; ++n) {
            add_scaled(totals[n], scaled[n], d, d_8);
            add_scaled(totals[n], offset[n], e, e_8);
        }
    }

    INLINE void decode(const u8 *unit, int step, int lane, float (&weights)[2][8]) {
        read_codes(unit, step, lane);
        const float scale[2] = {low_half(units.x) * byte_at(scales[step / 4], step % 4, constants),
                                low_half(units.y) * byte_at(scales[2 + step / 4], step % 4, constants)};
        const float less[2] = {high_half(units.x) * byte_at(offsets[step / 4], step % 4, constants),
                               high_half(units.y) * byte_at(offsets[2 + step / 4], step % 4, constants)};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            u32 pairs[4];
            spread(pairs, words[step % 2 * 2 + half], constants);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int row = j % 2, at = 4 * half + j / 2 * 2;
                weights[row][at] = scale[row] * (low_bfloat16(pairs[j]) - 128.0f) - less[row];
                weights[row][at + 1] = scale[row] * (high_bfloat16(pairs[j]) - 128.0f) - less[row];
            }
        }
    }
};

/// (d s) (q - 32) in groups of 16. After the low four bits the upper two, [2, 32 lanes, 4 words], one word for 32
/// columns, whose field of register j (of 8) is at bit 4 + 2 j of either half, and turns round at bit 16. Then s + 128,
/// u8 [8 rows g, rows g and g + 8, 16 groups], and d, float16 [8, 2].
struct Q6_K : Nibbles {
    static constexpr int ADJACENT = 4, BYTES = 2048 + 1024 + 256 + 32;
    static constexpr u32 LESS = 0xC320C320;  // -160
    u32 upper[4], scales[4], scales_8[4], units;
    float scaled[N_TILES][4];

    INLINE void begin(const u8 *unit, const u8 *, int lane) {
        read_16(scales, unit + 3072 + lane / 4 * 32);
        read_16(scales_8, unit + 3072 + lane / 4 * 32 + 16);
        units = *reinterpret_cast<const u32 *>(unit + 3328 + lane / 4 * 4);
#pragma unroll
        for (int n = 0; n < N_TILES; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) scaled[n][i] = 0;
    }
    INLINE static void start(Vectors &vectors) { vectors.start_halves(LESS); }

    INLINE void read(const u8 *unit, int step, int lane) {
        read_codes(unit, step, lane);
        if (step % 4 == 0) read_16(upper, unit + 2048 + step / 4 * 512 + lane * 16);
    }

    INLINE void pairs_of(u32 (&pairs)[4], int step, int half) const {
        spread(pairs, words[step % 2 * 2 + half], constants);
        const u32 above = upper[step % 4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int field = 4 * half + j;
            const u32 moved = field < 6 ? above >> 2 * field : above << (16 - 2 * field);
            pairs[j] = and_or(moved, constants.upper, pairs[j]);
        }
    }

    INLINE float scale(const u32 (&bytes)[4], int group) const { return byte_at(bytes[group / 4], group % 4, constants) - 128; }

    INLINE void multiply(const u8 *unit, int step, int lane, const Vectors &vectors, float (&)[N_TILES][4]) {
        read(unit, step, lane);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            u32 pairs[4];
            pairs_of(pairs, step, half);
            const float scale_0 = scale(scales, 2 * step + half), scale_8 = scale(scales_8, 2 * step + half);
#pragma unroll
            for (int n = 0; n < N_TILES; ++n) {
                float sums[4];
                vectors.read_start(sums, n, half);
                mma(sums, pairs, vectors.x[n][2 * half], vectors.x[n][2 * half + 1]);
                add_scaled(scaled[n], sums, scale_0, scale_8);
            }
        }
    }

    INLINE void finish(float (&totals)[N_TILES][4]) {
#pragma unroll
        for (int n = 0; n < N_TILES; ++n) add_scaled(totals[n], scaled[n], low_half(units), high_half(units));
    }

    INLINE void decode(const u8 *unit, int step, int lane, float (&weights)[2][8]) {
        read(unit, step, lane);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            u32 pairs[4];
            pairs_of(pairs, step, half);
            const int group = 2 * step + half;
            const float by[2] = {low_half(units) * scale(scales, group), high_half(units) * scale(scales_8, group)};
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int row = j % 2, at = 4 * half + j / 2 * 2;
                weights[row][at] = by[row] * (low_bfloat16(pairs[j]) - 160.0f);
                weights[row][at + 1] = by[row] * (high_bfloat16(pairs[j]) - 160.0f);
            }
        }
    }
};

/// d q: the low four bits of q + 128 like codes of 4 bits, then the upper four, then the scales.
struct Q8_0 : Nibbles {
    static constexpr int BYTES = 2048 + 2048 + 256;
    static constexpr u32 LESS = 0xC510C510;  // -2304 = -(128 + 2048 + 128)
    u32 upper[4];
    HalfScales scales;

    INLINE void begin(const u8 *unit, const u8 *, int lane) { scales.read(unit + 4096, lane); }
    INLINE static void start(Vectors &vectors) { vectors.start_whole(LESS); }

    INLINE void read(const u8 *unit, int step, int lane) {
        read_codes(unit, step, lane);
        if (step % 2 == 0) read_16(upper, unit + 2048 + step / 2 * 512 + lane * 16);
    }

    INLINE void multiply(const u8 *unit, int step, int lane, const Vectors &vectors, float (&totals)[N_TILES][4]) {
        read(unit, step, lane);
        const float scale = low_half(scales.at(step)), scale_8 = high_half(scales.at(step));
        u32 ones[2][4], sixteens[2][4];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            spread(ones[half], words[step % 2 * 2 + half], constants);
            spread_sixteens(sixteens[half], upper[step % 2 * 2 + half], constants);
        }
#pragma unroll
        for (int n = 0; n < N_TILES; ++n) {
            float sums[4];
            vectors.read_start(sums, n, 0);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                mma(sums, sixteens[half], vectors.x[n][2 * half], vectors.x[n][2 * half + 1]);
                mma(sums, ones[half], vectors.x[n][2 * half], vectors.x[n][2 * half + 1]);
            }
            add_scaled(totals[n], sums, scale, scale_8);
        }
    }

    INLINE void decode(const u8 *unit, int step, int lane, float (&weights)[2][8]) {
        read(unit, step, lane);
        const float scale[2] = {low_half(scales.at(step)), high_half(scales.at(step))};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            u32 ones[4], sixteens[4];
            spread(ones, words[step % 2 * 2 + half], constants);
            spread_sixteens(sixteens, upper[step % 2 * 2 + half], constants);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int row = j % 2, at = 4 * half + j / 2 * 2;
                weights[row][at] = scale[row] * (low_bfloat16(ones[j]) + low_bfloat16(sixteens[j]) - 2304.0f);
                weights[row][at + 1] = scale[row] * (high_bfloat16(ones[j]) + high_bfloat16(sixteens[j]) - 2304.0f);
            }
        }
    }
};

__constant__ float NF4_TABLE[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
    -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
    0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f,
};

/// a TABLE[code] for 64 columns of a row: after the codes, a byte for a register, the magnitudes a, float32 [8 rows g,
/// 4 groups, rows g and g + 8]. A byte of two codes is looked up in shared memory, in a copy of the table for each
/// lane (its bank), as the pair of bfloat16 numbers and the pair of what is left of them.
struct NF4 : Nibbles {
    static constexpr int BYTES = 2048 + 256, SHARED = 256 * 32 * 8;
    u32 low[4], high[4];
    float sums[N_TILES][4];
    const u8 *table;

    INLINE static void prepare(u8 *shared) {
        uint2 *table = reinterpret_cast<uint2 *>(shared);
        for (int i = threadIdx.x; i < 256 * 32; i += blockDim.x) {
            const float first = NF4_TABLE[i / 32 & 15], second = NF4_TABLE[i / 512];
            const u32 pair = rounded_pair(first, second);
            table[i] = {pair, rounded_pair(first - low_bfloat16(pair), second - high_bfloat16(pair))};
        }
        __syncthreads();
    }

    INLINE void begin(const u8 *unit, const u8 *shared, int lane) {
        table = shared;
        read_16(low, unit + 2048 + lane / 4 * 32);
        read_16(high, unit + 2048 + lane / 4 * 32 + 16);
    }
    INLINE static void start(Vectors &) {}

    INLINE float magnitude(int step, int row) const {
        return __uint_as_float(step < 4 ? low[step / 2 * 2 + row] : high[step / 2 * 2 + row - 4]);
    }

    INLINE void multiply(const u8 *unit, int step, int lane, const Vectors &vectors, float (&totals)[N_TILES][4]) {
        read_codes(unit, step, lane);
        if (step % 2 == 0) {
#pragma unroll
            for (int n = 0; n < N_TILES; ++n) sums[n][0] = sums[n][1] = sums[n][2] = sums[n][3] = 0;
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            u32 pairs[4], left[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const u32 word = words[step % 2 * 2 + half];
                const u32 place = and_or(j == 0 ? word << 8 : word >> 8 * (j - 1), 0xFF00, lane * 8);
                const uint2 found = *reinterpret_cast<const uint2 *>(table + place);
                pairs[j] = found.x, left[j] = found.y;
            }
#pragma unroll
            for (int n = 0; n < N_TILES; ++n) {
                mma(sums[n], left, vectors.x[n][2 * half], vectors.x[n][2 * half + 1]);
                mma(sums[n], pairs, vectors.x[n][2 * half], vectors.x[n][2 * half + 1]);
            }
        }
        if (step % 2 == 1) {
#pragma unroll
            for (int n = 0; n < N_TILES; ++n)
                add_scaled(totals[n], sums[n], magnitude(step, 0), magnitude(step, 1));
        }
    }

    /// The table is here of float32, a copy for each lane.
    INLINE void decode(const u8 *unit, int step, int lane, float (&weights)[2][8]) {
        read_codes(unit, step, lane);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const u32 codes = words[step % 2 * 2 + half] >> 8 * j;
                const int row = j % 2, at = 4 * half + j / 2 * 2;
                const float *values = reinterpret_cast<const float *>(table) + lane;
                weights[row][at] = values[(codes & 15) * 32] * magnitude(step, row);
                weights[row][at + 1] = values[(codes >> 4 & 15) * 32] * magnitude(step, row);
            }
        }
    }
};

using Encoding = ENCODING;

// ---- Products --------------------------------------------------------------------------------------------------

/// Units that a warp goes through: every `warps`th of a block's rows, then those of the block's next rows.
struct Place {
    int group, unit;
    INLINE void advance(int warp, int warps, int units) {
        unit += warps;
        if (unit >= units) unit = warp, group += gridDim.x;
    }
};

/// What the lane multiplies with in 32 columns, from the first of them that are its own.
INLINE void read_x(u32 (&x)[4], const u8 *from) {
    if (Encoding::ADJACENT == 8) {
        const uint4 found = __ldg(reinterpret_cast<const uint4 *>(from));
        x[0] = found.x, x[1] = found.y, x[2] = found.z, x[3] = found.w;
    } else {
        const uint2 first = __ldg(reinterpret_cast<const uint2 *>(from));
        const uint2 second = __ldg(reinterpret_cast<const uint2 *>(from + 32));
        x[0] = first.x, x[1] = first.y, x[2] = second.x, x[3] = second.y;
    }
}

/// y [vectors, 16 row_tiles] = x [vectors, 256 units] W^T. The warps of a block share the columns; a block goes on to
/// further rows. Shared memory: Encoding::SHARED, then sums of each warp, then STAGES units of TILES for each warp.
extern "C" __global__ void __launch_bounds__(512) product(
    const u8 *__restrict__ weight, const u8 *__restrict__ x, u16 *__restrict__ y, int row_tiles, int units, int vectors
) {
    extern __shared__ __align__(16) u8 shared[];
    constexpr int FRAGMENTS = TILES * N_TILES, SLOT = TILES * Encoding::BYTES;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int groups = (row_tiles + TILES - 1) / TILES;
    u8 *const sums = shared + Encoding::SHARED;
    u8 *const stages = sums + warps * FRAGMENTS * 512 + warp * STAGES * SLOT;

    const auto fetch = [&](const Place &place, int slot) {
        if (place.group < groups) {
#pragma unroll
            for (int m = 0; m < TILES; ++m) {
                const int tile = min(place.group * TILES + m, row_tiles - 1);
                const u8 *from = weight + (static_cast<long long>(tile) * units + place.unit) * Encoding::BYTES;
                u8 *const to = stages + slot * SLOT + m * Encoding::BYTES;
#pragma unroll
                for (int at = 0; at < Encoding::BYTES; at += 512)
                    if (at + 512 <= Encoding::BYTES || at + lane * 16 < Encoding::BYTES)
                        copy_16(to + at + lane * 16, from + at + lane * 16);
            }
        }
        end_of_copies();
    };

    Place next = {static_cast<int>(blockIdx.x), warp};
#pragma unroll
    for (int slot = 0; slot < STAGES - 1; ++slot) {
        fetch(next, slot);
        next.advance(warp, warps, units);
    }
    Encoding::prepare(shared);

    const Constants constants(row_tiles >> 31);
    const u8 *x_rows[N_TILES];  // where there are not so many vectors the last of them: what comes of it is not written
#pragma unroll
    for (int n = 0; n < N_TILES; ++n) {
        const int vector = min(n * VECTORS + lane / 4, vectors - 1);
        x_rows[n] = x + static_cast<long long>(vector) * units * (2 * COLUMNS) + lane % 4 * (2 * Encoding::ADJACENT);
    }

    int slot = 0;
    for (int group = blockIdx.x; group < groups; group += gridDim.x) {
        float totals[TILES][N_TILES][4] = {};
        for (int unit = warp; unit < units; unit += warps) {
            fetch(next, slot == 0 ? STAGES - 1 : slot - 1);
            next.advance(warp, warps, units);
            wait_for_copies<STAGES - 1>();
            __syncwarp();
            const u8 *const here = stages + slot * SLOT;
            Encoding tiles[TILES];
#pragma unroll
            for (int m = 0; m < TILES; ++m) {
                tiles[m].constants = constants;
                tiles[m].begin(here + m * Encoding::BYTES, shared, lane);
            }
            const u8 *x_here[N_TILES];
#pragma unroll
            for (int n = 0; n < N_TILES; ++n) x_here[n] = x_rows[n] + unit * (2 * COLUMNS);
#pragma unroll
            for (int step = 0; step < STEPS; ++step) {
                Vectors part;
#pragma unroll
                for (int n = 0; n < N_TILES; ++n) read_x(part.x[n], x_here[n] + step * 64);
                Encoding::start(part);
#pragma unroll
                for (int m = 0; m < TILES; ++m)
                    tiles[m].multiply(here + m * Encoding::BYTES, step, lane, part, totals[m]);
            }
#pragma unroll
            for (int m = 0; m < TILES; ++m) tiles[m].finish(totals[m]);
            __syncwarp();  // the slot is filled again in the next round
            slot = slot == STAGES - 1 ? 0 : slot + 1;
        }

#pragma unroll
        for (int m = 0; m < TILES; ++m)
#pragma unroll
            for (int n = 0; n < N_TILES; ++n) {
                float4 *const to = reinterpret_cast<float4 *>(sums + (warp * FRAGMENTS + m * N_TILES + n) * 512);
                to[lane] = {totals[m][n][0], totals[m][n][1], totals[m][n][2], totals[m][n][3]};
            }
        __syncthreads();
        for (int i = threadIdx.x; i < FRAGMENTS * 128; i += blockDim.x) {
            const int row = i % ROWS, fragment = i / 128, column = i / ROWS % VECTORS;
            const int tile = group * TILES + fragment / N_TILES, vector = fragment % N_TILES * VECTORS + column;
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

/// bfloat16 rows [16 row_tiles, 256 units] of W, from its row tile `first` on: a warp for each unit. Shared memory: 2048
/// bytes in nf4.
extern "C" __global__ void __launch_bounds__(256) decode(
    const u8 *__restrict__ weight, u8 *__restrict__ rows, int first, int row_tiles, int units
) {
    extern __shared__ __align__(16) u8 shared[];
    const int lane = threadIdx.x % 32;
    if (Encoding::SHARED > 0) {
        for (int i = threadIdx.x; i < 16 * 32; i += blockDim.x)
            reinterpret_cast<float *>(shared)[i] = NF4_TABLE[i / 32];
        __syncthreads();
    }
    const long long place = static_cast<long long>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
    if (place >= static_cast<long long>(row_tiles) * units) return;
    const u8 *const unit = weight + (static_cast<long long>(first) * units + place) * Encoding::BYTES;
    const long long row_bytes = 2ll * COLUMNS * units;
    u8 *const to = rows + (place / units * ROWS + lane / 4) * row_bytes + place % units * (2 * COLUMNS);
    Encoding state;
    state.begin(unit, shared, lane);
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
        float weights[2][8];
        state.decode(unit, step, lane, weights);
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            u32 pairs[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) pairs[i] = rounded_pair(weights[row][2 * i], weights[row][2 * i + 1]);
            u8 *const at = to + row * 8 * row_bytes + 64 * step;
            if (Encoding::ADJACENT == 8) {
                *reinterpret_cast<uint4 *>(at + lane % 4 * 16) = {pairs[0], pairs[1], pairs[2], pairs[3]};
            } else {
                *reinterpret_cast<uint2 *>(at + lane % 4 * 8) = {pairs[0], pairs[1]};
                *reinterpret_cast<uint2 *>(at + 32 + lane % 4 * 8) = {pairs[2], pairs[3]};
            }
        }
    }
}
