// Enough of a CUDA card for packed_matmul.cu to run on a CPU: every thread of a block is a fiber, blocks run one
// after the other, and a barrier switches fibers. Copies to shared memory are only made when they are waited for.

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <utility>
#include <vector>

#define INLINE inline
#define __global__
#define __device__
#define __constant__ static const
#define __shared__
#define __restrict__
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)

using std::max;
using std::min;
struct alignas(8) uint2 { uint32_t x, y; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
struct Index { unsigned x; } threadIdx, blockIdx, blockDim, gridDim;

alignas(16) unsigned char shared[232448];

namespace emulated {

constexpr int STACK = 1 << 17;

struct Barrier {
    int size = 0, arrived = 0, generation = 0;
    void wait();
};

struct Warp {
    Barrier barrier;
    uint32_t a[2][32][4], b[2][32][2];
    float values[2][32];
};

using Copies = std::vector<std::pair<unsigned char *, const unsigned char *>>;

struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    bool ended = false;
    unsigned products = 0, shuffles = 0;
    Copies open;
    std::deque<Copies> groups;
};

std::vector<Fiber> fibers;
std::vector<Warp> warps;
Barrier block;
ucontext_t scheduler;
void *kernel;
long arguments[6];

inline Fiber &self() { return fibers[threadIdx.x]; }
inline Warp &warp() { return warps[threadIdx.x / 32]; }
inline void pause() { swapcontext(&self().context, &scheduler); }

void Barrier::wait() {
    const int mine = generation;
    if (++arrived == size) {
        arrived = 0, ++generation;
        return;
    }
    while (generation == mine) pause();
}

void enter() {
    using Kernel = void (*)(long, long, long, long, long, long);
    const long *a = arguments;
    reinterpret_cast<Kernel>(kernel)(a[0], a[1], a[2], a[3], a[4], a[5]);
    self().ended = true;
    pause();
}

void run_block(int threads) {
    fibers = std::vector<Fiber>(threads);
    warps = std::vector<Warp>(threads / 32);
    block = Barrier{threads};
    for (Warp &each : warps) each.barrier.size = 32;
    for (Fiber &fiber : fibers) {
        fiber.stack.resize(STACK);
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = STACK;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, enter, 0);
    }
    for (bool running = true; running;) {
        running = false;
        for (unsigned i = 0; i < fibers.size(); ++i) {
            if (fibers[i].ended) continue;
            running = true;
            threadIdx.x = i;
            swapcontext(&scheduler, &fibers[i].context);
        }
    }
}

inline float bfloat16(uint32_t bits) {
    bits <<= 16;
    float found;
    std::memcpy(&found, &bits, 4);
    return found;
}

inline uint32_t rounded(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (std::isnan(value)) return 0x7FFF;
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}

inline float half(uint32_t bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const float size = exponent == 31 ? (fraction ? NAN : INFINITY)
                       : exponent     ? std::ldexp(1024.0f + fraction, exponent - 25)
                                      : std::ldexp(float(fraction), -24);
    return bits & 0x8000 ? -size : size;
}

}  // namespace emulated

/// Run `kernel` with these six arguments (addresses or integers; those that it does not have are not looked at).
extern "C" void launch(void *kernel, int blocks, int threads, int bytes, const long *arguments) {
    emulated::kernel = kernel;
    std::copy(arguments, arguments + 6, emulated::arguments);
    gridDim.x = blocks, blockDim.x = threads;
    for (int i = 0; i < blocks; ++i) {
        blockIdx.x = i;
        std::memset(shared, 0xFF, bytes);  // numbers that are none: nothing may be read before it is written
        emulated::run_block(threads);
    }
}

inline void __syncthreads() { emulated::block.wait(); }
inline void __syncwarp() { emulated::warp().barrier.wait(); }
template <class T> inline T __ldg(const T *from) { return *from; }

inline float __uint_as_float(uint32_t bits) {
    float found;
    std::memcpy(&found, &bits, 4);
    return found;
}

inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
    const uint64_t both = x | uint64_t(y) << 32;
    uint32_t found = 0;
    for (int i = 0; i < 4; ++i) found |= uint32_t(both >> 8 * (selector >> 4 * i & 7) & 0xFF) << 8 * i;
    return found;
}

/// Fragments as the PTX manual has them for m16n8k16: see "Matrix Fragments for mma.m16n8k16 with floating point type".
inline void mma(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    using namespace emulated;
    Warp &all = warp();
    const int lane = threadIdx.x % 32, turn = self().products++ % 2;
    std::copy(a, a + 4, all.a[turn][lane]);
    all.b[turn][lane][0] = b0, all.b[turn][lane][1] = b1;
    all.barrier.wait();
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        for (int k = 0; k < 16; ++k) {
            const uint32_t left = all.a[turn][row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
            const uint32_t right = all.b[turn][column * 4 + k % 8 / 2][k / 8];
            sums[i] += bfloat16(left >> 16 * (k % 2) & 0xFFFF) * bfloat16(right >> 16 * (k % 2) & 0xFFFF);
        }
    }
}

inline void copy_16(unsigned char *to, const unsigned char *from) { emulated::self().open.emplace_back(to, from); }

inline void end_of_copies() {
    emulated::self().groups.push_back(std::move(emulated::self().open));
    emulated::self().open.clear();
}

template <int LEFT> inline void wait_for_copies() {
    auto &groups = emulated::self().groups;
    for (; groups.size() > LEFT; groups.pop_front())
        for (const auto &[to, from] : groups.front()) std::memcpy(to, from, 16);
}

inline float __shfl_xor_sync(uint32_t, float value, int bits) {
    emulated::Warp &all = emulated::warp();
    const int lane = threadIdx.x % 32, turn = emulated::self().shuffles++ % 2;
    all.values[turn][lane] = value;
    all.barrier.wait();
    return all.values[turn][lane ^ bits];
}

inline uint32_t kept(uint32_t value) { return value; }
inline uint32_t times(uint32_t word, uint32_t factor) { return word * factor; }
inline uint32_t and_or(uint32_t word, uint32_t mask, uint32_t bits) { return (word & mask) | bits; }
inline float low_half(uint32_t word) { return emulated::half(word & 0xFFFF); }
inline float high_half(uint32_t word) { return emulated::half(word >> 16); }
inline uint32_t raised(uint32_t pair) {
    const float low = emulated::bfloat16(pair & 0xFFFF), high = emulated::bfloat16(pair >> 16);
    return emulated::rounded(low * 0x1p120f) | emulated::rounded(high * 0x1p120f) << 16;
}
inline uint32_t rounded_pair(float low, float high) {
    return emulated::rounded(low) | emulated::rounded(high) << 16;
}
