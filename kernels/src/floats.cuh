// Float weights in memory.
#pragma once
#include "tensor_cores.cuh"

struct FloatArgs {
    const uint8_t* weights; // [rows][cols]
    const float* x;         // [columns][cols]
    const float* bias;
    float* out; // [columns][stride]
    uint32_t rows, cols, columns, stride;
};

// Elements in a row: 8 or 4 of memory as f32, or the words of 4 times a unit as f16, even ones and then odd ones.
struct F32 {
    static constexpr int BYTES = 4;
    static __device__ __forceinline__ uint2 halves(const uint32_t words[4], float unit) {
        float w[4];
#pragma unroll
        for (int i = 0; i < 4; i++) w[i] = unit * __uint_as_float(words[i]);
        return make_uint2(bits_of(__floats2half2_rn(w[0], w[2])), bits_of(__floats2half2_rn(w[1], w[3])));
    }
    static __device__ __forceinline__ void load4(const uint8_t* at, float w[4]) {
        const float4 v = __ldg(reinterpret_cast<const float4*>(at));
        w[0] = v.x, w[1] = v.y, w[2] = v.z, w[3] = v.w;
    }
    static __device__ __forceinline__ void load(const uint8_t* at, float w[8]) {
        load4(at, w);
        load4(at + 16, w + 4);
    }
};

// Floats of two bytes, two to a word.
template <class Pair> struct ShortFloat {
    static constexpr int BYTES = 2;
    static __device__ __forceinline__ uint2 halves(const uint32_t words[2], float unit) {
        const uint32_t even = __byte_perm(words[0], words[1], 0x5410), odd = __byte_perm(words[0], words[1], 0x7632);
        return make_uint2(bits_of(Pair::times(even, unit)), bits_of(Pair::times(odd, unit)));
    }
    static __device__ __forceinline__ void load4(const uint8_t* at, float w[4]) {
        const uint2 q = __ldg(reinterpret_cast<const uint2*>(at));
        Pair::split(q.x, w);
        Pair::split(q.y, w + 2);
    }
    static __device__ __forceinline__ void load(const uint8_t* at, float w[8]) {
        const uint4 q = __ldg(reinterpret_cast<const uint4*>(at));
        Pair::split(q.x, w);
        Pair::split(q.y, w + 2);
        Pair::split(q.z, w + 4);
        Pair::split(q.w, w + 6);
    }
};

struct HalfPair {
    static __device__ __forceinline__ __half2 times(uint32_t word, float unit) {
        return __hmul2(*reinterpret_cast<const __half2*>(&word), __float2half2_rn(unit));
    }
    static __device__ __forceinline__ void split(uint32_t word, float w[2]) {
        const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&word));
        w[0] = pair.x, w[1] = pair.y;
    }
};

struct BfloatPair {
    static __device__ __forceinline__ __half2 times(uint32_t word, float unit) {
        return __floats2half2_rn(unit * __uint_as_float(word << 16), unit * __uint_as_float(word & 0xffff0000u));
    }
    static __device__ __forceinline__ void split(uint32_t word, float w[2]) {
        w[0] = __uint_as_float(word << 16);
        w[1] = __uint_as_float(word & 0xffff0000u);
    }
};

using F16 = ShortFloat<HalfPair>;
using Bf16 = ShortFloat<BfloatPair>;
