// Decoding of quantised weights from the device layout: 32 elements at a time, as bytes that dp4a
// multiplies, with their scales. The layout of each type is told in layout.rs.
#pragma once
#include <cuda_fp16.h>
#include <stdint.h>

// Elements that share one activation scale.
constexpr int GROUP = 32;

// What a group of 32 activations has besides its 32 integers.
struct GroupScale {
    float scale;    // value of one integer step
    int16_t sums[2]; // of the integers of elements 0..16 and 16..32
};

// A matrix in the device layout. Planes hold all groups of all rows, row after row.
struct Planes {
    const uint8_t* quants;
    const uint8_t* highs;
    const uint8_t* scales;
};

enum class Min { None, One, Pair };

__device__ __forceinline__ float half_at(const uint8_t* at) {
    return __half2float(*reinterpret_cast<const __half*>(at));
}

// 32 nibbles: low ones are elements 0..16, high ones 16..32.
__device__ __forceinline__ void nibbles(const uint8_t* quants, size_t group, int w[8]) {
    const int4 q = __ldg(reinterpret_cast<const int4*>(quants) + group);
    const int words[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        w[i] = words[i] & 0x0f0f0f0f;
        w[i + 4] = words[i] >> 4 & 0x0f0f0f0f;
    }
}

// 32 crumbs of 2 bits: byte j has elements j, j + 8, j + 16, j + 24.
__device__ __forceinline__ void crumbs(const uint8_t* plane, size_t group, int w[8]) {
    const int2 q = __ldg(reinterpret_cast<const int2*>(plane) + group);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        w[2 * i] = q.x >> 2 * i & 0x03030303;
        w[2 * i + 1] = q.y >> 2 * i & 0x03030303;
    }
}

// Adds bit `element` of a word to each element, as bit `BIT`.
template <int BIT> __device__ __forceinline__ void add_bits(const uint8_t* plane, size_t group, int w[8]) {
    const uint32_t bits = __ldg(reinterpret_cast<const uint32_t*>(plane) + group);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const uint32_t four = bits >> 4 * i & 15;
        w[i] |= static_cast<int>((four * 0x00204081u & 0x01010101u) << BIT);
    }
}

// Replaces nibbles by the values that they select of IQ4's codebook.
__device__ __forceinline__ void codebook(int w[8]) {
    // -127 -104 -83 -65 | -49 -35 -22 -10 | 1 13 25 38 | 53 69 89 113
    constexpr uint32_t T0 = 0xbfad9881u, T1 = 0xf6eaddcfu, T2 = 0x26190d01u, T3 = 0x71594535u;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const uint32_t v = static_cast<uint32_t>(w[i]);
        const uint32_t selector = (v & 7) | (v >> 4 & 0x70) | (v >> 8 & 0x700) | (v >> 12 & 0x7000);
        const uint32_t low = __byte_perm(T0, T1, selector), high = __byte_perm(T2, T3, selector);
        const uint32_t upper = (v >> 3 & 0x01010101u) * 0xffu;
        w[i] = static_cast<int>((low & ~upper) | (high & upper));
    }
}

// 6-bit scale and min `i` of 8, packed in 12 bytes.
__device__ __forceinline__ void six_bits(const uint8_t* packed, int i, int& scale, int& min) {
    if (i < 4) {
        scale = packed[i] & 63;
        min = packed[i + 4] & 63;
        return;
    }
    const int low = packed[i + 4];
    scale = (low & 15) | packed[i - 4] >> 6 << 4;
    min = low >> 4 | packed[i] >> 6 << 4;
}

// A type: the bytes of a group in each plane, how its scales are shared, and how it is decoded.
struct Facts {
    static constexpr int QUANT_BYTES = 16, HIGH_BYTES = 0, SCALE_BYTES = 2, SCALE_GROUPS = 1;
    static constexpr int ZERO = 0;
    static constexpr bool HALVES = false;
    static constexpr Min MIN = Min::None;
};

// What decodes besides its integers. `min` is the offset, or the scale of the pair's.
struct Scales {
    float scale[2];
    float min;
    int pair[2];
};

struct Q4_0 : Facts {
    static constexpr int ZERO = 8;
    static __device__ __forceinline__ void quants(const Planes& p, size_t g, int w[8]) { nibbles(p.quants, g, w); }
    static __device__ __forceinline__ void scales(const Planes& p, size_t b, int, Scales& s) { s.scale[0] = half_at(p.scales + 2 * b); }
};

struct Q4_1 : Facts {
    static constexpr int SCALE_BYTES = 4;
    static constexpr Min MIN = Min::One;
    static __device__ __forceinline__ void quants(const Planes& p, size_t g, int w[8]) { nibbles(p.quants, g, w); }
    static __device__ __forceinline__ void scales(const Planes& p, size_t b, int, Scales& s) {
        s.scale[0] = half_at(p.scales + 4 * b);
        s.min = half_at(p.scales + 4 * b + 2);
    }
};

struct Q5_0 : Facts {
    static constexpr int HIGH_BYTES = 4, ZERO = 16;
    static __device__ __forceinline__ void quants(const Planes& p, size_t g, int w[8]) {
        nibbles(p.quants, g, w);
        add_bits<4>(p.highs, g, w);
    }
    static __device__ __forceinline__ void scales(const Planes& p, size_t b, int, Scales& s) { s.scale[0] = half_at(p.scales + 2 * b); }
};

struct Q5_1 : Q4_1 {
    static constexpr int HIGH_BYTES = 4;
    static __device__ __forceinline__ void quants(const Planes& p, size_t g, int w[8]) { Q5_0::quants(p, g, w); }
};

struct Q8_0 : Facts {
    static constexpr int QUANT_BYTES = 32;
    static __device__ __forceinline__ void quants(const Planes& p, size_t g, int w[8]) {
        const int4* q = reinterpret_cast<const int4*>(p.quants) + 2 * g;
        const int4 a = __ldg(q), b = __ldg(q + 1);
        w[0] = a.x, w[1] = a.y, w[2] = a.z, w[3] = a.w, w[4] = b.x, w[5] = b.y, w[6] = b.z, w[7] = b.w;
    }
    static __device__ __forceinline__ void scales(const Planes& p, size_t b, int, Scales& s) { s.scale[0] = half_at(p.scales + 2 * b); }
};

struct Iq4Nl : Q4_0 {
    static constexpr int ZERO = 0;
    static __device__ __forceinline__ void quants(const Planes& p, size_t g, int w[8]) {
        nibbles(p.quants, g, w);
        codebook(w);
    }
};

struct Iq4Xs : Facts {
    static constexpr int SCALE_BYTES = 8, SCALE_GROUPS = 8;
    static __device__ __forceinline__ void quants(const Planes& p, size_t g, int w[8]) { Iq4Nl::quants(p, g, w); }
    static __device__ __forceinline__ void scales(const Planes& p, size_t b, int i, Scales& s) {
        const uint2 packed = __ldg(reinterpret_cast<const uint2*>(p.scales) + b);
        const int high = packed.x >> (16 + 2 * i) & 3, low = packed.y >> 4 * i & 15;
        const float d = __half2float(__ushort_as_half(static_cast<unsigned short>(packed.x)));
        s.scale[0] = d * static_cast<float>((low | high << 4) - 32);
    }
};

struct Q4K : Facts {
    static constexpr int SCALE_BYTES = 16, SCALE_GROUPS = 8;
    static constexpr Min MIN = Min::One;
    static __device__ __forceinline__ void quants(const Planes& p, size_t g, int w[8]) { nibbles(p.quants, g, w); }
    static __device__ __forceinline__ void scales(const Planes& p, size_t b, int i, Scales& s) {
        const uint8_t* block = p.scales + 16 * b;
        int scale, min;
        six_bits(block + 4, i, scale, min);
        s.scale[0] = half_at(block) * static_cast<float>(scale);
        s.min = -(half_at(block + 2) * static_cast<float>(min));
    }
};

struct Q5K : Q4K {
    static constexpr int HIGH_BYTES = 4;
    static __device__ __forceinline__ void quants(const Planes& p, size_t g, int w[8]) { Q5_0::quants(p, g, w); }
};

struct Q6K : Facts {
    static constexpr int HIGH_BYTES = 8, SCALE_BYTES = 18, SCALE_GROUPS = 8, ZERO = 32;
    static constexpr bool HALVES = true;
    static __device__ __forceinline__ void quants(const Planes& p, size_t g, int w[8]) {
        int high[8];
        nibbles(p.quants, g, w);
        crumbs(p.highs, g, high);
#pragma unroll
        for (int i = 0; i < 8; i++) w[i] |= high[i] << 4;
    }
    static __device__ __forceinline__ void scales(const Planes& p, size_t b, int i, Scales& s) {
        const uint8_t* block = p.scales + 18 * b;
        const float d = half_at(block + 16);
        s.scale[0] = d * static_cast<float>(static_cast<int8_t>(block[2 * i]));
        s.scale[1] = d * static_cast<float>(static_cast<int8_t>(block[2 * i + 1]));
    }
};

struct Q3K : Facts {
    static constexpr int QUANT_BYTES = 8, HIGH_BYTES = 4, SCALE_BYTES = 14, SCALE_GROUPS = 8, ZERO = 4;
    static constexpr bool HALVES = true;
    static __device__ __forceinline__ void quants(const Planes& p, size_t g, int w[8]) {
        crumbs(p.quants, g, w);
        add_bits<2>(p.highs, g, w);
    }
    static __device__ __forceinline__ float scale(const uint8_t* block, int i) {
        const int low = block[i % 8] >> 4 * (i / 8) & 15, high = block[8 + i % 4] >> 2 * (i / 4) & 3;
        return half_at(block + 12) * static_cast<float>((low | high << 4) - 32);
    }
    static __device__ __forceinline__ void scales(const Planes& p, size_t b, int i, Scales& s) {
        s.scale[0] = scale(p.scales + 14 * b, 2 * i);
        s.scale[1] = scale(p.scales + 14 * b, 2 * i + 1);
    }
};

struct Q2K : Facts {
    static constexpr int QUANT_BYTES = 8, SCALE_BYTES = 20, SCALE_GROUPS = 8;
    static constexpr bool HALVES = true;
    static constexpr Min MIN = Min::Pair;
    static __device__ __forceinline__ void quants(const Planes& p, size_t g, int w[8]) { crumbs(p.quants, g, w); }
    static __device__ __forceinline__ void scales(const Planes& p, size_t b, int i, Scales& s) {
        const uint8_t* block = p.scales + 20 * b;
        const float d = half_at(block + 16);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int packed = block[2 * i + half];
            s.scale[half] = d * static_cast<float>(packed & 15);
            s.pair[half] = packed >> 4;
        }
        s.min = -half_at(block + 18);
    }
};
