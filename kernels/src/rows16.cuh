// The CPU's layout of quantised weights, which cpu_kernels/src/repack.rs tells: 16 rows interleaved block by block.
// Byte `at` of a block becomes 16 bytes at 16·at of a packed one: the same byte of 16 rows, half of an f16's, or a
// quarter of those of four bytes.
#pragma once
#include "quants.cuh"

constexpr int INTERLEAVED_ROWS = 16;

// Where the fields of a block begin and end that are interleaved by f16 and by four bytes, and where 32 bits lie
// whose order the CPU changes; what remains goes byte by byte.
constexpr int NO_BITS = -4;
template <int HALVES_, int HALVES_END_, int WORDS_, int WORDS_END_, int BITS_ = NO_BITS> struct Fields {
    static constexpr int HALVES = HALVES_, HALVES_END = HALVES_END_, WORDS = WORDS_, WORDS_END = WORDS_END_, BITS = BITS_;
};
template <class T> struct Interleaved;
template <> struct Interleaved<Q4_0> : Fields<0, 2, 2, 18> {};
template <> struct Interleaved<Iq4Nl> : Fields<0, 2, 2, 18> {};
template <> struct Interleaved<Q4_1> : Fields<0, 4, 4, 20> {};
template <> struct Interleaved<Q5_0> : Fields<0, 2, 6, 22, 2> {};
template <> struct Interleaved<Q5_1> : Fields<0, 4, 8, 24, 4> {};
template <> struct Interleaved<Q8_0> : Fields<0, 2, 2, 34> {};
template <> struct Interleaved<Q2K> : Fields<80, 84, 16, 80> {};
template <> struct Interleaved<Q3K> : Fields<108, 110, 0, 96> {};
template <> struct Interleaved<Q4K> : Fields<0, 4, 16, 144> {};
template <> struct Interleaved<Q5K> : Fields<0, 4, 16, 176> {};
template <> struct Interleaved<Q6K> : Fields<208, 210, 0, 192> {};
template <> struct Interleaved<Iq4Xs> : Fields<0, 4, 8, 136> {};
template <> struct Interleaved<Int4<128>> : Fields<0, 2, 3, 67> {};
template <> struct Interleaved<Int4<64>> : Fields<0, 2, 3, 35> {};
template <> struct Interleaved<Int4<32>> : Fields<0, 4, 5, 37> {};

// Blocks in file order, so far apart and so shifted in shared memory that the fields of words lie at multiples of 4.
template <class T, int BLOCK_BYTES> struct ApartBlocks {
    static constexpr int SHIFT = (4 - Interleaved<T>::WORDS % 4) % 4, STRIDE = (SHIFT + BLOCK_BYTES + 3) / 4 * 4;
};

// Bit `w` of byte `b` to bit `4w + b`: as `gather_bits` of the CPU.
__device__ __forceinline__ uint32_t gather_bits(uint32_t spread) {
    uint32_t mask = 0;
#pragma unroll
    for (int byte = 0; byte < 4; byte++) {
        const uint32_t own = spread >> 8 * byte & 0xff, fours = (own | own << 12) & 0x000f000fu;
        const uint32_t pairs = (fours | fours << 6) & 0x03030303u;
        mask |= ((pairs | pairs << 3) & 0x11111111u) << byte;
    }
    return mask;
}

// Puts the 16 bytes that byte `at` has become back into the blocks of their rows, which lie STRIDE bytes apart.
template <class T, int STRIDE> __device__ __forceinline__ void put_apart(uint8_t* blocks, int at, uint4 bytes) {
    using F = Interleaved<T>;
    const uint32_t words[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
    const bool is_bits = F::BITS >= 0 && at >= F::BITS && at < F::BITS + 4;
    if (is_bits || (at >= F::WORDS && at < F::WORDS_END)) {
        const int place = at - (is_bits ? F::BITS : F::WORDS), start = at - place % 4;
        uint8_t* const to = blocks + place % 4 * 4 * STRIDE + start;
#pragma unroll
        for (int i = 0; i < 4; i++) *reinterpret_cast<uint32_t*>(to + i * STRIDE) = is_bits ? gather_bits(words[i]) : words[i];
    } else if (at >= F::HALVES && at < F::HALVES_END) {
        const int place = at - F::HALVES;
        uint8_t* const to = blocks + place % 2 * 8 * STRIDE + at - place % 2;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const uint32_t half = words[i / 2] >> 16 * (i % 2);
            // They lie at any byte in blocks of an odd length.
            to[i * STRIDE] = half, to[i * STRIDE + 1] = half >> 8;
        }
    } else {
#pragma unroll
        for (int i = 0; i < INTERLEAVED_ROWS; i++) blocks[i * STRIDE + at] = words[i / 4] >> 8 * (i % 4);
    }
}
