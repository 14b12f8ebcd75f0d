// Row-wise passes over the activations of a step, fused with their rounding: norms with what is added to the
// residual stream before, gated activations, and rounding alone.
#include "halves.cuh"
#include "launch.cuh"
#include "norm.cuh"
#include "rounding.cuh"

constexpr int ROW_THREADS = 256;
constexpr int NORM_THREADS_MAX = 1024;

// The sum over the block, in every thread; `parts` has room for each warp.
__device__ __forceinline__ float sum_over_block(float value, float* parts) {
    value = warp_sum(value);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
    __syncthreads();
    return warp_sum(threadIdx.x % 32 < blockDim.x / 32 ? parts[threadIdx.x % 32] : 0.0f);
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

// One block per row, of which each thread holds QUADS fours.
template <int QUADS> __device__ __forceinline__ void norm_row(const NormArgs& args) {
    __shared__ float parts[2][NORM_THREADS_MAX / 32];
    const uint32_t cols = args.cols, own = blockIdx.x;
    float4 v[QUADS], a[QUADS], weight[QUADS];
    const auto at = [](int k) { return 4 * (k * blockDim.x + threadIdx.x); };
    let_next_start();
#pragma unroll
    for (int k = 0; k < QUADS; k++) weight[k] = quad_at(args.weight, at(k), cols);
    wait_for_earlier();
    const size_t source = static_cast<size_t>(args.gather ? args.gather[own] : own) * cols;
#pragma unroll
    for (int k = 0; k < QUADS; k++) {
        v[k] = quad_at(args.residual + source, at(k), cols);
        a[k] = args.added ? quad_at(args.added + source, at(k), cols) : make_float4(0, 0, 0, 0);
    }
    if (args.added_norm) {
        float squares = 0;
#pragma unroll
        for (int k = 0; k < QUADS; k++) squares = quad_squares(a[k], squares);
        const float scale = norm_scale(sum_over_block(squares, parts[0]), cols, args.added_eps);
#pragma unroll
        for (int k = 0; k < QUADS; k++) a[k] = scaled(a[k], scale, quad_at(args.added_norm, at(k), cols));
    }
    float squares = 0;
#pragma unroll
    for (int k = 0; k < QUADS; k++) {
        v[k] = sum_of_quads(v[k], a[k]);
        squares = quad_squares(v[k], squares);
    }
    const float scale = norm_scale(sum_over_block(squares, parts[1]), cols, args.eps);
#pragma unroll
    for (int k = 0; k < QUADS; k++) {
        const uint32_t i = at(k);
        if (i >= padded_groups(cols) * GROUP) break;
        if (args.added && !args.gather && i < cols) *reinterpret_cast<float4*>(args.residual + source + i) = v[k];
        const float4 normed = scaled(v[k], scale, weight[k]);
        if (args.values && i < cols) *reinterpret_cast<float4*>(args.values + static_cast<size_t>(own) * cols + i) = normed;
        if (args.halves) store_halves(normed, args.halves, gridDim.x, own, i);
        if (args.eight_bits.quants) round_row_group(normed, args.eight_bits, own, cols, i);
    }
}

#define NORM(quads)                                                                                                      \
    extern "C" __global__ void __launch_bounds__(NORM_THREADS_MAX) norm_rows_##quads(const __grid_constant__ NormArgs args) { \
        norm_row<quads>(args);                                                                                           \
    }
NORM(1)
NORM(2)
NORM(4)

struct RoundArgs {
    const float* values; // [rows][cols]
    const float* up;     // [rows][cols], or null
    float* out;          // [rows][cols], or null
    EightBits eight_bits;
    __half* halves; // as in halves.cuh, or null
    uint32_t rows, cols;
    uint32_t activation; // of `values`, where `up` is given: 0 silu, 1 gelu's tanh form
};

// Rounds values, or activation(values) · up: four elements per thread.
extern "C" __global__ void __launch_bounds__(ROW_THREADS) round_rows(const __grid_constant__ RoundArgs args) {
    const uint32_t i = 4 * (blockIdx.y * ROW_THREADS + threadIdx.x), cols = args.cols, row = blockIdx.x;
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
