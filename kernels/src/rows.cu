// Row-wise passes over the activations of a step, fused with their rounding to 8 bits: norms with
// what is added to the residual stream before, gated activations, and rounding alone.
#include "halves.cuh"
#include "launch.cuh"
#include "quants.cuh"

constexpr int ROW_THREADS = 256;
constexpr int NORM_THREADS = 512;

// The 8-bit form of rows: values in rows 0..n, what they miss in rows `second` .. if that is wanted.
// A row has whole chunks of groups, the last of them zeros where need be; how a pair of groups lies is
// told in products.rs.
struct EightBits {
    int8_t* quants;     // [passes][padded / 4][stride][128]
    GroupScale* scales; // [passes][padded / 4][stride][4]
    uint32_t stride;    // rows that there is room for
    uint32_t passes;    // 2: what 8 bits miss of values is rounded in turn
};

__device__ __forceinline__ uint32_t padded_groups(uint32_t cols) { return (cols + CHUNK * GROUP - 1) / (CHUNK * GROUP) * CHUNK; }

__device__ __forceinline__ float sum_over_warp(float value) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(~0u, value, distance);
    return value;
}

// The sum over the block, in every thread.
__device__ __forceinline__ float sum_over_block(float value) {
    __shared__ float parts[NORM_THREADS / 32];
    value = sum_over_warp(value);
    __syncthreads();
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
    __syncthreads();
    value = threadIdx.x % 32 < NORM_THREADS / 32 ? parts[threadIdx.x % 32] : 0.0f;
    return sum_over_warp(value);
}

// Four elements in a row of `cols`, zeros beyond it; `cols` is a multiple of four.
__device__ __forceinline__ float4 quad_at(const float* row, uint32_t i, uint32_t cols) {
    return i < cols ? *reinterpret_cast<const float4*>(row + i) : make_float4(0, 0, 0, 0);
}

__device__ __forceinline__ float quad_squares(float4 v, float sum) {
    return __fmaf_rn(v.w, v.w, __fmaf_rn(v.z, v.z, __fmaf_rn(v.y, v.y, __fmaf_rn(v.x, v.x, sum))));
}

// The step that products take: one whose product with MAGIC_VALUE is exact.
__device__ __forceinline__ float short_step(float step) { return __int_as_float(__float_as_int(step) & ~3); }

// Rounds one group of 32 values, of which eight lanes have four each, into its place in a pair of
// groups; returns what the 8 bits miss of them.
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
    *reinterpret_cast<uint32_t*>(pair + own % 4 * 16 + index * 8 + own / 4 * 4) = packed;
    int sum = q[0] + q[1] + q[2] + q[3];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    const int upper = __shfl_xor_sync(~0u, sum, 4);
    if (own == 0) {
        const uint32_t sums = static_cast<uint32_t>(sum & 0xffff) | static_cast<uint32_t>(upper) << 16;
        *reinterpret_cast<uint2*>(scale) = make_uint2(__float_as_uint(step), sums);
    }
    return make_float4(rest[0], rest[1], rest[2], rest[3]);
}

// Rounds the group that has element i of row `row`, and what is missing then in a pass of its own.
__device__ __forceinline__ void round_row_group(float4 v, const EightBits& to, uint32_t row, uint32_t cols, uint32_t i) {
    const uint32_t chunks = padded_groups(cols) / CHUNK, group = i / GROUP % CHUNK;
    size_t at = static_cast<size_t>(i / GROUP / CHUNK) * to.stride + row;
    for (uint32_t pass = 0; pass < to.passes; pass++, at += static_cast<size_t>(chunks) * to.stride) {
        v = round_group(v, to.quants + (at * CHUNK + group / 2 * 2) * GROUP, group % 2, to.scales + at * CHUNK + group);
    }
}

struct NormArgs {
    float* residual;         // [rows][cols]
    const float* added;      // [rows][cols], or null
    const float* added_norm; // [cols], or null: the norm of what is added
    const float* weight;     // [cols]
    const uint32_t* gather;  // [n]: rows of residual and added; or null for all. Residual stays then.
    float* values;           // [n][cols], or null
    EightBits eight_bits;
    __half* halves; // as in halves.cuh, or null
    float added_eps, eps;
    uint32_t cols;
};

// Loads that a thread has in flight.
constexpr int QUADS = 2;

// One block per row; shared memory holds a row.
extern "C" __global__ void __launch_bounds__(NORM_THREADS) norm_rows(const __grid_constant__ NormArgs args) {
    extern __shared__ float row_values[];
    const uint32_t cols = args.cols, own = blockIdx.x;
    let_next_start();
    // A cache line each.
    for (uint32_t i = 32 * threadIdx.x; i < cols; i += 32 * NORM_THREADS) asm volatile("prefetch.global.L2 [%0];" ::"l"(args.weight + i));
    wait_for_earlier();
    const size_t source = static_cast<size_t>(args.gather ? args.gather[own] : own) * cols;
    float* residual = args.residual + source;
    const float* added = args.added ? args.added + source : nullptr;
    float scale = 1.0f;
    if (args.added_norm) {
        float squares = 0;
        for (uint32_t i = 4 * threadIdx.x; i < cols; i += 4 * NORM_THREADS) squares = quad_squares(quad_at(added, i, cols), squares);
        scale = 1.0f / sqrtf(sum_over_block(squares) / static_cast<float>(cols) + args.added_eps);
    }
    float squares = 0;
    for (uint32_t base = 0; base < cols; base += 4 * NORM_THREADS * QUADS) {
        float4 v[QUADS], a[QUADS];
#pragma unroll
        for (int k = 0; k < QUADS; k++) {
            const uint32_t i = base + 4 * (k * NORM_THREADS + threadIdx.x);
            v[k] = quad_at(residual, i, cols);
            a[k] = added ? quad_at(added, i, cols) : make_float4(0, 0, 0, 0);
        }
#pragma unroll
        for (int k = 0; k < QUADS; k++) {
            const uint32_t i = base + 4 * (k * NORM_THREADS + threadIdx.x);
            if (i >= cols) break;
            if (args.added_norm) {
                const float4 weight = *reinterpret_cast<const float4*>(args.added_norm + i);
                a[k] = make_float4(a[k].x * scale * weight.x, a[k].y * scale * weight.y, a[k].z * scale * weight.z, a[k].w * scale * weight.w);
            }
            v[k] = make_float4(v[k].x + a[k].x, v[k].y + a[k].y, v[k].z + a[k].z, v[k].w + a[k].w);
            if (added && !args.gather) *reinterpret_cast<float4*>(residual + i) = v[k];
            *reinterpret_cast<float4*>(row_values + i) = v[k];
            squares = quad_squares(v[k], squares);
        }
    }
    scale = 1.0f / sqrtf(sum_over_block(squares) / static_cast<float>(cols) + args.eps);
    __syncthreads();
    for (uint32_t i = 4 * threadIdx.x; i < padded_groups(cols) * GROUP; i += 4 * NORM_THREADS) {
        float4 v = quad_at(row_values, i, cols);
        const float4 weight = quad_at(args.weight, i, cols);
        v = make_float4(v.x * scale * weight.x, v.y * scale * weight.y, v.z * scale * weight.z, v.w * scale * weight.w);
        if (args.values && i < cols) *reinterpret_cast<float4*>(args.values + static_cast<size_t>(own) * cols + i) = v;
        if (args.halves) store_halves(v, args.halves, gridDim.x, own, i);
        if (args.eight_bits.quants) round_row_group(v, args.eight_bits, own, cols, i);
    }
}

struct RoundArgs {
    const float* values; // [rows][cols]
    const float* up;     // [rows][cols], or null
    float* out;          // [rows][cols], or null
    EightBits eight_bits;
    __half* halves; // as in halves.cuh, or null
    uint32_t rows, cols;
    uint32_t activation; // of `values`, where `up` is given: 0 silu, 1 gelu's tanh form
};

__device__ __forceinline__ float activated(float x, uint32_t activation) {
    if (activation == 0) return x / (1.0f + expf(-x));
    const float inner = 0.7978845608028654f * (x + 0.044715f * x * x * x);
    return 0.5f * x * (1.0f + tanhf(inner));
}

// Rounds values, or activation(values) · up: four elements per thread.
extern "C" __global__ void __launch_bounds__(ROW_THREADS) round_rows(const __grid_constant__ RoundArgs args) {
    const uint32_t i = 4 * (blockIdx.x * ROW_THREADS + threadIdx.x), cols = args.cols, row = blockIdx.y;
    begin();
    if (i >= padded_groups(cols) * GROUP) return;
    const size_t start = static_cast<size_t>(row) * cols;
    float4 v = quad_at(args.values + start, i, cols);
    if (args.up) {
        const float4 up = quad_at(args.up + start, i, cols);
        v = make_float4(activated(v.x, args.activation) * up.x, activated(v.y, args.activation) * up.y,
                        activated(v.z, args.activation) * up.z, activated(v.w, args.activation) * up.w);
    }
    if (args.out && i < cols) *reinterpret_cast<float4*>(args.out + start + i) = v;
    if (args.halves) store_halves(v, args.halves, args.rows, row, i);
    if (args.eight_bits.quants) round_row_group(v, args.eight_bits, row, cols, i);
}
