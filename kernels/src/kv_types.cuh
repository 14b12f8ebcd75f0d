// The types of KV elements, as kernels that store and read them take them.
//
//   KvF16    16-bit floats
//   KvBf16   16-bit floats with the range of f32
//   KvE4m3   8-bit floats: sign, 4 bits of exponent, 3 of fraction, up to ±448, no scale
//   KvQ8     8-bit integers in groups of 32 along the head, each with an f16 scale; whole groups of keys, and of
//            the queries that meet them, are rotated first. The bits are those of cpu_kernels/src/attention/write.rs
//
// Elements are rounded to the nearest, ties to even; what exceeds a type's range becomes its largest number, and NaN
// stays NaN. Eight elements are a piece, whose words hold pairs: one where an element has two bytes, else two.
#pragma once
#include "tensor_cores.cuh"

constexpr uint32_t KV_GROUP = 32; // elements that share a scale
constexpr float F16_MAX = 65504.0f;

// What a lane keeps of its element, and of the group that its warp has.
struct Kept {
    uint32_t bits, scale;
};

__device__ __forceinline__ float within(float x, float max) { return fabsf(x) > max ? copysignf(max, x) : x; }

__device__ __forceinline__ __half2 halves_of(uint32_t bits) { return *reinterpret_cast<const __half2*>(&bits); }

// The group of a warp, an element per lane, times a Hadamard matrix / √32: its own inverse.
__device__ __forceinline__ float turned(float x) {
#pragma unroll
    for (uint32_t half = 1; half < 32; half *= 2) {
        const float other = __shfl_xor_sync(~0u, x, half);
        x = threadIdx.x & half ? __fsub_rn(other, x) : __fadd_rn(x, other);
    }
    return __fmul_rn(x, 0.17677669f);
}

// Types with two bytes an element have one pair in a word, others two. `pair` and `half_pair` have pair INDEX of it.
struct KvF16 {
    using Piece = uint4;
    static constexpr uint32_t BYTES = 2;
    static constexpr bool IS_HALF = true;
    static constexpr bool HAS_SCALES = false;

    static __device__ __forceinline__ Kept keep(float x, bool) { return {__half_as_ushort(__float2half_rn(within(x, F16_MAX))), 0}; }
    template <int INDEX> static __device__ __forceinline__ float2 pair(uint32_t word) { return __half22float2(halves_of(word)); }
};

struct KvBf16 {
    using Piece = uint4;
    static constexpr uint32_t BYTES = 2;
    static constexpr bool IS_HALF = false;
    static constexpr bool HAS_SCALES = false;

    static __device__ __forceinline__ Kept keep(float x, bool) {
        constexpr float MAX = 3.38953139e38f;
        const uint32_t bits = __float_as_uint(within(x, MAX));
        return {(isnan(x) ? bits | 0x400000 : bits + 0x7fff + (bits >> 16 & 1)) >> 16, 0};
    }
    template <int INDEX> static __device__ __forceinline__ float2 pair(uint32_t word) {
        return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000));
    }
    template <int INDEX> static __device__ __forceinline__ __half2 half_pair(uint32_t word) {
        const float2 both = pair<INDEX>(word);
        return __floats2half2_rn(within(both.x, F16_MAX), within(both.y, F16_MAX));
    }
};

struct KvE4m3 {
    using Piece = uint2;
    static constexpr uint32_t BYTES = 1;
    static constexpr bool IS_HALF = false;
    static constexpr bool HAS_SCALES = false;

    static __device__ __forceinline__ Kept keep(float x, bool) {
        constexpr float MAX = 448.0f, NORMAL_MIN = 1.0f / 64, STEP_MIN = 1.0f / 512;
        const float size = fminf(fabsf(x), MAX);
        // Rounded to three bits of the fraction; the exponent's bias is 7, not 127.
        const uint32_t bits = __float_as_uint(size), normal = (bits + 0x7ffff + (bits >> 20 & 1)) >> 20;
        const uint32_t magnitude = size < NORMAL_MIN ? __float2int_rn(size / STEP_MIN) : normal - (120 << 3);
        return {(isnan(x) ? 0x7f : magnitude) | (__float_as_uint(x) >> 31 << 7), 0};
    }
    template <int INDEX> static __device__ __forceinline__ float2 pair(uint32_t word) { return __half22float2(half_pair<INDEX>(word)); }
    template <int INDEX> static __device__ __forceinline__ __half2 half_pair(uint32_t word) {
        uint32_t both;
#if __CUDA_ARCH__ >= 890
        const uint16_t two = static_cast<uint16_t>(word >> 16 * INDEX);
        asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(both) : "h"(two));
#else
        // The same exponent and fraction in f16 are 2^8 too small, subnormal numbers too; a NaN would be 480.
        const uint32_t at_top = __byte_perm(word, 0, INDEX ? 0x3424 : 0x1404), size = at_top & 0x7f007f00;
        const uint32_t nan = (size + 0x01000100) & 0x80008000;
        both = bits_of(__hmul2(halves_of((at_top & 0x80008000) | size >> 1), __float2half2_rn(256.0f))) | (nan - (nan >> 15));
#endif
        return halves_of(both);
    }
};

struct KvQ8 {
    using Piece = uint2;
    static constexpr uint32_t BYTES = 1;
    static constexpr bool IS_HALF = false;
    static constexpr bool HAS_SCALES = true;

    // All lanes come here, also those that the last group has no element for, with 0.
    static __device__ __forceinline__ Kept keep(float x, bool turns) {
        constexpr float STEPS = 127.0f;
        x = within(x, F16_MAX * STEPS);
        if (turns) x = turned(x);
        const bool is_nan = __any_sync(~0u, isnan(x));
        float largest = fabsf(x);
#pragma unroll
        for (int distance = 16; distance > 0; distance /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, distance));
        const __half scale = __float2half_rn(fminf(__fdiv_rn(largest, STEPS), F16_MAX));
        const float step = __half2float(scale), inverse = step == 0 ? 0.0f : __fdiv_rn(1.0f, step);
        const int steps = __float2int_rn(fminf(fmaxf(__fmul_rn(x, inverse), -STEPS), STEPS));
        return {is_nan ? 0 : static_cast<uint32_t>(steps & 255), is_nan ? 0x7e00u : __half_as_ushort(scale)};
    }
    // Integers: in the lowest bits of a float beside 2^23, or 2^10 of f16, which goes again.
    template <int INDEX> static __device__ __forceinline__ float2 pair(uint32_t word) {
        const uint32_t biased = word ^ 0x80808080;
        const uint32_t a = __byte_perm(biased, 0x4b000000, 0x7440 + 2 * INDEX), b = __byte_perm(biased, 0x4b000000, 0x7441 + 2 * INDEX);
        return make_float2(__uint_as_float(a) - 8388736.0f, __uint_as_float(b) - 8388736.0f);
    }
    template <int INDEX> static __device__ __forceinline__ __half2 half_pair(uint32_t word) {
        const uint32_t both = __byte_perm(word ^ 0x80808080, 0x64646464, INDEX ? 0x4342 : 0x4140);
        return __hsub2(halves_of(both), __float2half2_rn(1152.0f));
    }
};

// A piece as numbers, scales aside.
template <typename Type> __device__ __forceinline__ void numbers_of(const typename Type::Piece& piece, float2 numbers[4]) {
    if constexpr (Type::BYTES == 2) {
        numbers[0] = Type::template pair<0>(piece.x), numbers[1] = Type::template pair<0>(piece.y);
        numbers[2] = Type::template pair<0>(piece.z), numbers[3] = Type::template pair<0>(piece.w);
    } else {
        numbers[0] = Type::template pair<0>(piece.x), numbers[1] = Type::template pair<1>(piece.x);
        numbers[2] = Type::template pair<0>(piece.y), numbers[3] = Type::template pair<1>(piece.y);
    }
}

// The same as f16; a piece that is shorter is the end of `words`.
template <typename Type> __device__ __forceinline__ void halves_of(const uint4& words, __half2 halves[4]) {
    if constexpr (Type::BYTES == 2) {
        halves[0] = Type::template half_pair<0>(words.x), halves[1] = Type::template half_pair<0>(words.y);
        halves[2] = Type::template half_pair<0>(words.z), halves[3] = Type::template half_pair<0>(words.w);
    } else {
        halves[0] = Type::template half_pair<0>(words.z), halves[1] = Type::template half_pair<1>(words.z);
        halves[2] = Type::template half_pair<0>(words.w), halves[3] = Type::template half_pair<1>(words.w);
    }
}

// A pair of elements where it lies, as the first of a word.
template <typename Type> __device__ __forceinline__ uint32_t load_pair(const uint8_t* at) {
    if constexpr (Type::BYTES == 2) return *reinterpret_cast<const uint32_t*>(at);
    else return *reinterpret_cast<const uint16_t*>(at);
}
