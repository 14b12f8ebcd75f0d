// Decoding of quantised weights from the device layout: 32 elements at a time, as signed bytes that
// tensor cores multiply, with their scales. The layout of each type is told in pack.rs.
#pragma once
#include <cuda_fp16.h>
#include <stdint.h>

// Elements that share one activation scale.
constexpr int GROUP = 32;

// The sum of what the lanes of a warp have, in each of them.
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(~0u, value, distance);
    return value;
}

// What a group of 32 activations has besides its 32 integers.
struct GroupScale {
    float scale;    // value of one integer step
    int16_t sums[2]; // of the integers of elements 0..16 and 16..32
};

// A matrix in the device layout. Rows lie in blocks of 16, the last of which may have fewer; of a block chunk
// after chunk, of a chunk row after row: what a warp multiplies at a time lies in one piece. The last chunk of a
// row is filled up with zeros. Scales that two chunks share lie so, too.
struct Planes {
    const uint8_t* quants;
    const uint8_t* highs;
    const uint8_t* scales;
};

enum class Min { None, One, Pair };

// A chunk is four groups of a row. Four lanes next to each other share it, as tensor cores want it:
// lane t has elements 4t .. 4t + 4 ("lower") and 16 + 4t .. 16 + 4t + 4 ("upper") of each group.
constexpr int CHUNK = 4;

// Where a row lies among `rows` rows of `units` chunks, or pairs of these: the number of its first one, and how
// many lie from one to the next.
struct RowPlace {
    uint32_t first, step;

    __device__ __forceinline__ RowPlace(uint32_t rows, uint32_t units, uint32_t row) {
        constexpr uint32_t BLOCK_ROWS = 16;
        const uint32_t block = row / BLOCK_ROWS * BLOCK_ROWS;
        step = min(BLOCK_ROWS, rows - block), first = block * units + row - block;
    }

    __device__ __forceinline__ uint32_t at(uint32_t unit) const { return first + unit * step; }
};

// What a lane has of a chunk: its quants and their high bits.
struct Raw {
    uint32_t quants[8], highs[2];
};

__device__ __forceinline__ float half_of(uint32_t bits) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}

__device__ __forceinline__ uint32_t short_at(const uint8_t* at) {
    return __ldg(reinterpret_cast<const unsigned short*>(at));
}

// BYTES bytes at a multiple of BYTES, as words.
template <int BYTES> __device__ __forceinline__ void load_words(const uint8_t* at, uint32_t* words) {
    if constexpr (BYTES == 2) words[0] = short_at(at);
    if constexpr (BYTES == 4) words[0] = __ldg(reinterpret_cast<const uint32_t*>(at));
    if constexpr (BYTES == 8) {
        const uint2 v = __ldg(reinterpret_cast<const uint2*>(at));
        words[0] = v.x, words[1] = v.y;
    }
    if constexpr (BYTES >= 16) {
        const uint4 v = __ldg(reinterpret_cast<const uint4*>(at));
        words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
    }
    if constexpr (BYTES == 32) load_words<16>(at + 16, words + 4);
}

// The same from shared memory.
template <int BYTES> __device__ __forceinline__ void copy_words(const uint8_t* at, uint32_t* words) {
    if constexpr (BYTES == 4) words[0] = *reinterpret_cast<const uint32_t*>(at);
    if constexpr (BYTES == 8) {
        const uint2 v = *reinterpret_cast<const uint2*>(at);
        words[0] = v.x, words[1] = v.y;
    }
    if constexpr (BYTES >= 16) {
        const uint4 v = *reinterpret_cast<const uint4*>(at);
        words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
    }
    if constexpr (BYTES == 32) copy_words<16>(at + 16, words + 4);
}

// Asks for a line of memory, to the second cache.
__device__ __forceinline__ void prefetch(const void* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }

// A place in shared memory by its own address.
struct SharedAt {
    uint32_t at;
    __device__ __forceinline__ SharedAt operator+(uint32_t bytes) const { return {at + bytes}; }
};

__device__ __forceinline__ uint32_t short_at(SharedAt from) {
    unsigned short value;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(value) : "r"(from.at));
    return value;
}

template <int BYTES> __device__ __forceinline__ void load_words(SharedAt from, uint32_t* w) {
    if constexpr (BYTES == 2) w[0] = short_at(from);
    if constexpr (BYTES == 4) asm volatile("ld.shared.b32 %0, [%1];" : "=r"(w[0]) : "r"(from.at));
    if constexpr (BYTES == 8) asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(w[0]), "=r"(w[1]) : "r"(from.at));
    if constexpr (BYTES >= 16) {
        asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3]) : "r"(from.at));
    }
    if constexpr (BYTES == 32) load_words<16>(from + 16, w + 4);
}

// Two bits of four elements: `field` counts lower and upper of a pair of groups.
__device__ __forceinline__ uint32_t crumbs(uint32_t word, int field) { return word >> 2 * field & 0x03030303u; }

// One bit of four elements: `field` counts lower and upper of four groups.
__device__ __forceinline__ uint32_t bits(uint32_t word, int field) { return word >> field & 0x01010101u; }

// The values that four nibbles select of IQ4's codebook.
__device__ __forceinline__ uint32_t codebook(uint32_t v) {
    // -127 -104 -83 -65 | -49 -35 -22 -10 | 1 13 25 38 | 53 69 89 113
    constexpr uint32_t T0 = 0xbfad9881u, T1 = 0xf6eaddcfu, T2 = 0x26190d01u, T3 = 0x71594535u;
    const uint32_t selector = (v & 7) | (v >> 4 & 0x70) | (v >> 8 & 0x700) | (v >> 12 & 0x7000);
    const uint32_t low = __byte_perm(T0, T1, selector), high = __byte_perm(T2, T3, selector);
    const uint32_t upper = (v >> 3 & 0x01010101u) * 0xffu;
    return (low & ~upper) | (high & upper);
}

// 6-bit scale and min `i` of 8, packed in 12 bytes.
__device__ __forceinline__ void six_bits(const uint32_t packed[3], int i, uint32_t& scale, uint32_t& min) {
    const int shift = 8 * (i % 4);
    const uint32_t a = packed[0] >> shift & 255, b = packed[1] >> shift & 255, c = packed[2] >> shift & 255;
    scale = i < 4 ? a & 63 : (c & 15) | a >> 6 << 4;
    min = i < 4 ? b & 63 : c >> 4 | b >> 6 << 4;
}

// What decodes besides its integers: the scale, or one per half; and what is added per unit of the
// sum of the activations, or of each half's.
struct Scales {
    float scale[2];
    float min[2];
};

// A type: bits of an element in each plane, how its scales are shared, and how it is decoded.
// `decode` gives four elements of group j of a chunk, upper or lower, as signed bytes; they are UNIT
// times too large, so that a sign is one operation, and the scales make up for it.
struct Facts {
    static constexpr int LOW_BITS = 4, HIGH_BITS = 0, SCALE_BYTES = 2, SCALE_GROUPS = 1;
    static constexpr bool HALVES = false;
    static constexpr Min MIN = Min::None;
    // Of types whose scales are plain f16: what decoded integers are too large by.
    static constexpr int UNIT = 1;
    // Of types that have nibbles alone, the one that stands for zero.
    static constexpr int NIBBLE_ZERO = -1;
    // Whether that is another nibble for each scale, a group's being `zero`; its scale is f16 `step`.
    static constexpr bool HAS_ZEROS = false;
    // Whether elements are floats: a word is that of four.
    static constexpr bool IS_FLOAT = false;
    // The words of the scales of group `i` of the block at `block`.
    template <class At> static __device__ __forceinline__ void load_scales(At block, int, uint32_t s[4]) { load_words<2>(block, s); }
};

constexpr uint32_t SIGNS = 0x80808080u;

// (w & mask) ^ bits, and (w & mask) | bits, in one instruction.
__device__ __forceinline__ uint32_t toggled(uint32_t w, uint32_t mask, uint32_t bits) {
    asm("lop3.b32 %0, %0, %1, %2, 0x6a;" : "+r"(w) : "r"(mask), "r"(bits));
    return w;
}

__device__ __forceinline__ uint32_t selected(uint32_t w, uint32_t mask, uint32_t bits) {
    asm("lop3.b32 %0, %0, %1, %2, 0xea;" : "+r"(w) : "r"(mask), "r"(bits));
    return w;
}

// Bytes of a lane of a chunk: it has 32 elements.
template <class T> constexpr int LANE_QUANTS = 4 * T::LOW_BITS;
template <class T> constexpr int LANE_HIGHS = 4 * T::HIGH_BITS;

// This lane's part of the chunk that lies at `place`.
template <class T> __device__ __forceinline__ void load_raw(const Planes& p, uint32_t place, uint32_t t, Raw& raw) {
    const size_t lane = place * 4 + t;
    load_words<LANE_QUANTS<T>>(p.quants + lane * LANE_QUANTS<T>, raw.quants);
    if constexpr (T::HIGH_BITS > 0) load_words<LANE_HIGHS<T>>(p.highs + lane * LANE_HIGHS<T>, raw.highs);
}

// Chunks whose scales lie together, and bytes of these.
template <class T> constexpr uint32_t UNIT_CHUNKS = T::SCALE_GROUPS == 1 ? 1 : T::SCALE_GROUPS / CHUNK;
template <class T> constexpr uint32_t UNIT_BYTES = T::SCALE_GROUPS == 1 ? CHUNK * T::SCALE_BYTES : T::SCALE_BYTES;

// Scales of a row.
template <class T> struct ScaleRow {
    const uint8_t* first; // of its first chunk
    uint32_t step;        // bytes from unit to unit

    __device__ __forceinline__ ScaleRow() {}
    __device__ __forceinline__ ScaleRow(const Planes& p, uint32_t rows, uint32_t chunks, uint32_t row) {
        const RowPlace place(rows, chunks / UNIT_CHUNKS<T>, row);
        first = p.scales + static_cast<size_t>(place.first) * UNIT_BYTES<T>, step = place.step * UNIT_BYTES<T>;
    }

    // Those of a chunk, or of the block that it belongs to.
    __device__ __forceinline__ const uint8_t* of(uint32_t chunk) const { return first + static_cast<size_t>(chunk / UNIT_CHUNKS<T> * step); }

    // The words of a group's.
    __device__ __forceinline__ void load(uint32_t group, uint32_t s[4]) const {
        const uint8_t* const at = of(group / CHUNK);
        if constexpr (T::SCALE_GROUPS == 1) T::load_scales(at + group % CHUNK * T::SCALE_BYTES, 0, s);
        if constexpr (T::SCALE_GROUPS > 1) T::load_scales(at, group % T::SCALE_GROUPS, s);
    }
};

struct Q4_0 : Facts {
    static constexpr int UNIT = 16, NIBBLE_ZERO = 8;
    static __device__ __forceinline__ uint32_t decode(const Raw& raw, int j, bool upper) {
        return toggled(upper ? raw.quants[j] : raw.quants[j] << 4, 0xf0f0f0f0u, SIGNS);
    }
    static __device__ __forceinline__ void scales(const uint32_t w[4], int, Scales& s) { s.scale[0] = half_of(w[0]) * (1.0f / 16); }
};

struct Q4_1 : Facts {
    static constexpr int SCALE_BYTES = 4, NIBBLE_ZERO = 0;
    static constexpr Min MIN = Min::One;
    template <class At> static __device__ __forceinline__ void load_scales(At block, int, uint32_t s[4]) { load_words<4>(block, s); }
    static __device__ __forceinline__ uint32_t decode(const Raw& raw, int j, bool upper) {
        return (upper ? raw.quants[j] >> 4 : raw.quants[j]) & 0x0f0f0f0fu;
    }
    static __device__ __forceinline__ void scales(const uint32_t w[4], int, Scales& s) {
        s.scale[0] = half_of(w[0]);
        s.min[0] = half_of(w[0] >> 16);
    }
};

struct Q5_0 : Facts {
    static constexpr int HIGH_BITS = 1, UNIT = 8;
    static __device__ __forceinline__ uint32_t decode(const Raw& raw, int j, bool upper) {
        const uint32_t low = (upper ? raw.quants[j] >> 1 : raw.quants[j] << 3) & 0x78787878u;
        return (low | bits(raw.highs[0], 2 * j + upper) << 7) ^ SIGNS;
    }
    static __device__ __forceinline__ void scales(const uint32_t w[4], int, Scales& s) { s.scale[0] = half_of(w[0]) * (1.0f / 8); }
};

struct Q5_1 : Q4_1 {
    static constexpr int HIGH_BITS = 1, NIBBLE_ZERO = -1;
    static __device__ __forceinline__ uint32_t decode(const Raw& raw, int j, bool upper) {
        return Q4_1::decode(raw, j, upper) | bits(raw.highs[0], 2 * j + upper) << 4;
    }
};

struct Q8_0 : Facts {
    static constexpr int LOW_BITS = 8;
    static __device__ __forceinline__ uint32_t decode(const Raw& raw, int j, bool upper) { return raw.quants[2 * j + upper]; }
    static __device__ __forceinline__ void scales(const uint32_t w[4], int, Scales& s) { s.scale[0] = half_of(w[0]); }
};

struct Iq4Nl : Facts {
    static __device__ __forceinline__ uint32_t decode(const Raw& raw, int j, bool upper) { return codebook(Q4_1::decode(raw, j, upper)); }
    static __device__ __forceinline__ void scales(const uint32_t w[4], int, Scales& s) { s.scale[0] = half_of(w[0]); }
};

struct Iq4Xs : Iq4Nl {
    static constexpr int SCALE_BYTES = 8, SCALE_GROUPS = 8;
    template <class At> static __device__ __forceinline__ void load_scales(At block, int, uint32_t s[4]) { load_words<8>(block, s); }
    static __device__ __forceinline__ void scales(const uint32_t w[4], int i, Scales& s) {
        const int high = w[0] >> (16 + 2 * i) & 3, low = w[1] >> 4 * i & 15;
        s.scale[0] = half_of(w[0]) * static_cast<float>((low | high << 4) - 32);
    }
};

struct Q4K : Facts {
    static constexpr int SCALE_BYTES = 16, SCALE_GROUPS = 8, NIBBLE_ZERO = 0;
    static constexpr Min MIN = Min::One;
    template <class At> static __device__ __forceinline__ void load_scales(At block, int, uint32_t s[4]) { load_words<16>(block, s); }
    static __device__ __forceinline__ uint32_t decode(const Raw& raw, int j, bool upper) { return Q4_1::decode(raw, j, upper); }
    static __device__ __forceinline__ void scales(const uint32_t w[4], int i, Scales& s) {
        uint32_t scale, min;
        six_bits(w + 1, i, scale, min);
        s.scale[0] = half_of(w[0]) * static_cast<float>(scale);
        s.min[0] = -(half_of(w[0] >> 16) * static_cast<float>(min));
    }
};

struct Q5K : Q4K {
    static constexpr int HIGH_BITS = 1, NIBBLE_ZERO = -1;
    static __device__ __forceinline__ uint32_t decode(const Raw& raw, int j, bool upper) { return Q5_1::decode(raw, j, upper); }
};

struct Q6K : Facts {
    static constexpr int HIGH_BITS = 2, SCALE_BYTES = 18, SCALE_GROUPS = 8;
    static constexpr bool HALVES = true;
    template <class At> static __device__ __forceinline__ void load_scales(At block, int i, uint32_t s[4]) {
        s[0] = short_at(block + 2 * i);
        s[1] = short_at(block + 16);
    }
    static __device__ __forceinline__ uint32_t decode(const Raw& raw, int j, bool upper) {
        const uint32_t low = (upper ? raw.quants[j] >> 2 : raw.quants[j] << 2) & 0x3c3c3c3cu;
        return (low | crumbs(raw.highs[j / 2], j % 2 * 2 + upper) << 6) ^ SIGNS;
    }
    static __device__ __forceinline__ void scales(const uint32_t w[4], int, Scales& s) {
        const float d = half_of(w[1]) * (1.0f / 4);
        s.scale[0] = d * static_cast<float>(static_cast<int8_t>(w[0]));
        s.scale[1] = d * static_cast<float>(static_cast<int8_t>(w[0] >> 8));
    }
};

struct Q3K : Facts {
    static constexpr int LOW_BITS = 2, HIGH_BITS = 1, SCALE_BYTES = 14, SCALE_GROUPS = 8;
    static constexpr bool HALVES = true;
    template <class At> static __device__ __forceinline__ void load_scales(At block, int i, uint32_t s[4]) {
        s[0] = short_at(block + 2 * i % 8);
        s[1] = short_at(block + 8 + 2 * i % 4);
        s[2] = short_at(block + 12);
    }
    static __device__ __forceinline__ uint32_t decode(const Raw& raw, int j, bool upper) {
        return (crumbs(raw.quants[j / 2], j % 2 * 2 + upper) << 5 | bits(raw.highs[0], 2 * j + upper) << 7) ^ SIGNS;
    }
    static __device__ __forceinline__ void scales(const uint32_t w[4], int i, Scales& s) {
        const float d = half_of(w[2]) * (1.0f / 32);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int low = w[0] >> (8 * half + i / 4 * 4) & 15, high = w[1] >> (8 * half + i / 2 * 2) & 3;
            s.scale[half] = d * static_cast<float>((low | high << 4) - 32);
        }
    }
};

struct Q2K : Facts {
    static constexpr int LOW_BITS = 2, SCALE_BYTES = 20, SCALE_GROUPS = 8;
    static constexpr bool HALVES = true;
    static constexpr Min MIN = Min::Pair;
    template <class At> static __device__ __forceinline__ void load_scales(At block, int i, uint32_t s[4]) {
        s[0] = short_at(block + 2 * i);
        load_words<4>(block + 16, s + 1);
    }
    static __device__ __forceinline__ uint32_t decode(const Raw& raw, int j, bool upper) {
        return crumbs(raw.quants[j / 2], j % 2 * 2 + upper);
    }
    static __device__ __forceinline__ void scales(const uint32_t w[4], int, Scales& s) {
        const float d = half_of(w[1]), m = -half_of(w[1] >> 16);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            s.scale[half] = d * static_cast<float>(w[0] >> 8 * half & 15);
            s.min[half] = m * static_cast<float>(w[0] >> (8 * half + 4) & 15);
        }
    }
};

#include "served_quants.cuh"

#define FOR_QUANTIZED(DEFINE) \
    DEFINE(q4_0, Q4_0)        \
    DEFINE(q4_1, Q4_1)        \
    DEFINE(q5_0, Q5_0)        \
    DEFINE(q5_1, Q5_1)        \
    DEFINE(q8_0, Q8_0)        \
    DEFINE(iq4_nl, Iq4Nl)     \
    DEFINE(iq4_xs, Iq4Xs)     \
    DEFINE(q2_k, Q2K)         \
    DEFINE(q3_k, Q3K)         \
    DEFINE(q4_k, Q4K)         \
    DEFINE(q5_k, Q5K)         \
    DEFINE(q6_k, Q6K)         \
    DEFINE(int4_128, Int4<128>) \
    DEFINE(int4_64, Int4<64>) \
    DEFINE(int4_32, Int4<32>)

#define FOR_E4M3(DEFINE)        \
    DEFINE(e4m3_128, E4m3<128>) \
    DEFINE(e4m3_32, E4m3<32>)
