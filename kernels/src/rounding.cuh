// Rounding of activations to 8 bits for the products that follow, by the kernels that make them; and what gates
// do to activations.
#pragma once
#include "quants.cuh"

// The 8-bit form of rows: values in the first pass, what they miss in the second, if that is wanted.
// A row has whole chunks of groups, the last of them zeros where need be; how a pair of groups lies is
// told in products.rs.
struct EightBits {
    int8_t* quants;     // [passes][padded / 4][stride][128]
    GroupScale* scales; // [passes][padded / 4][stride][4]
    uint32_t stride;    // rows that there is room for
    uint32_t passes;    // 2: what 8 bits miss of values is rounded in turn
};

__device__ __forceinline__ uint32_t padded_groups(uint32_t cols) { return (cols + CHUNK * GROUP - 1) / (CHUNK * GROUP) * CHUNK; }

// The step that products take: one whose product with MAGIC_VALUE is exact.
__device__ __forceinline__ float short_step(float step) { return __int_as_float(__float_as_int(step) & ~3); }

// Rounds one group of 32 values, of which eight lanes have four each, into its place in a pair of
// groups, if that is there; returns what the 8 bits miss of them. All lanes of a warp come here.
__device__ __forceinline__ float4 round_group(float4 v, int8_t* pair, uint32_t index, GroupScale* scale) {
    const uint32_t lane = threadIdx.x % 32, own = lane % 8;
    const float values[4] = {v.x, v.y, v.z, v.w};
    float amax = fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w)));
    const bool own_finite = isfinite(v.x) && isfinite(v.y) && isfinite(v.z) && isfinite(v.w);
    const bool is_finite = (__ballot_sync(~0u, !own_finite) >> (lane & ~7u) & 255u) == 0;
#pragma unroll
    for (int distance = 4; distance > 0; distance /= 2) amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, distance));
    constexpr float AMAX_MIN = 127.0f * 1.17549435e-38f;
    const bool is_zero = !is_finite || amax < AMAX_MIN;
    const float step = !is_finite ? __int_as_float(0x7fc00000) : is_zero ? 0.0f : short_step(__fdiv_rn(amax, 127.0f));
    const float factor = is_zero ? 0.0f : __fdiv_rn(127.0f, amax);
    int q[4];
    float rest[4];
    uint32_t packed = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        q[i] = is_zero ? 0 : __float2int_rn(__fmul_rn(values[i], factor));
        packed |= static_cast<uint32_t>(q[i] & 255) << 8 * i;
        rest[i] = __fmaf_rn(-step, static_cast<float>(q[i]), values[i]);
    }
    if (pair) *reinterpret_cast<uint32_t*>(pair + own % 4 * 16 + index * 8 + own / 4 * 4) = packed;
    int sum = q[0] + q[1] + q[2] + q[3];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    const int upper = __shfl_xor_sync(~0u, sum, 4);
    if (pair && own == 0) {
        const uint32_t sums = static_cast<uint32_t>(sum & 0xffff) | static_cast<uint32_t>(upper) << 16;
        *reinterpret_cast<uint2*>(scale) = make_uint2(__float_as_uint(step), sums);
    }
    return make_float4(rest[0], rest[1], rest[2], rest[3]);
}

// Rounds the group that has element i of row `row`, and what is missing then in a pass of its own. Lanes with
// nothing to store come with the others.
__device__ __forceinline__ void round_row_group(float4 v, const EightBits& to, uint32_t row, uint32_t cols, uint32_t i, bool stores = true) {
    const uint32_t chunks = padded_groups(cols) / CHUNK, group = i / GROUP % CHUNK;
    size_t at = static_cast<size_t>(i / GROUP / CHUNK) * to.stride + row;
    for (uint32_t pass = 0; pass < to.passes; pass++, at += static_cast<size_t>(chunks) * to.stride) {
        int8_t* const pair = stores ? to.quants + (at * CHUNK + group / 2 * 2) * GROUP : nullptr;
        v = round_group(v, pair, group % 2, to.scales + at * CHUNK + group);
    }
}

__device__ __forceinline__ float activated(float x, uint32_t activation) {
    if (activation == 0) return x / (1.0f + expf(-x));
    const float inner = 0.7978845608028654f * (x + 0.044715f * x * x * x);
    return 0.5f * x * (1.0f + tanhf(inner));
}
