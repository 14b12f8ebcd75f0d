// Row-wise passes over the activations of a step, fused with their rounding to 8 bits: norms with
// what is added to the residual stream before, gated activations, and rounding alone.
#include "quants.cuh"

constexpr int ROW_THREADS = 256;

// The 8-bit form of rows: values in rows 0..n, what they miss in rows `second` .. if that is wanted.
struct EightBits {
    int8_t* quants;     // [rows][cols]
    GroupScale* scales; // [rows][cols / 32]
    uint32_t second;
};

__device__ __forceinline__ float sum_over_warp(float value) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(~0u, value, distance);
    return value;
}

// The sum over the block, in every thread.
__device__ __forceinline__ float sum_over_block(float value) {
    __shared__ float parts[ROW_THREADS / 32];
    value = sum_over_warp(value);
    __syncthreads();
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
    __syncthreads();
    value = threadIdx.x % 32 < ROW_THREADS / 32 ? parts[threadIdx.x % 32] : 0.0f;
    return sum_over_warp(value);
}

// Rounds one group of 32 values, of which this lane has one; returns what the 8 bits miss of it.
__device__ __forceinline__ float round_group(float value, int8_t* quant, GroupScale* scale) {
    const uint32_t lane = threadIdx.x % 32;
    float amax = fabsf(value);
    bool is_finite = isfinite(value);
    is_finite = __all_sync(~0u, is_finite);
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, distance));
    constexpr float AMAX_MIN = 127.0f * 1.17549435e-38f;
    const bool is_zero = !is_finite || amax < AMAX_MIN;
    const float step = !is_finite ? __int_as_float(0x7fc00000) : is_zero ? 0.0f : __fdiv_rn(amax, 127.0f);
    const int q = is_zero ? 0 : __float2int_rn(__fmul_rn(value, __fdiv_rn(127.0f, amax)));
    quant[lane] = static_cast<int8_t>(q);
    int sum = q;
#pragma unroll
    for (int distance = 8; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
    const int upper = __shfl_sync(~0u, sum, 16);
    if (lane == 0) {
        scale->scale = step;
        scale->sums[0] = static_cast<int16_t>(sum);
        scale->sums[1] = static_cast<int16_t>(upper);
    }
    return __fmaf_rn(-step, static_cast<float>(q), value);
}

// Rounds group `group` of row `row`, and what is missing then as a row of its own.
__device__ __forceinline__ void round_row_group(float value, const EightBits& to, uint32_t row, uint32_t cols, uint32_t group) {
    const size_t groups = cols / GROUP;
    size_t at = row * groups + group;
    const float rest = round_group(value, to.quants + at * GROUP, to.scales + at);
    if (to.second) {
        at += to.second * groups;
        round_group(rest, to.quants + at * GROUP, to.scales + at);
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
    float added_eps, eps;
    uint32_t cols;
};

// One block per row; shared memory holds a row.
extern "C" __global__ void __launch_bounds__(ROW_THREADS) norm_rows(const __grid_constant__ NormArgs args) {
    extern __shared__ float row_values[];
    const uint32_t cols = args.cols, own = blockIdx.x;
    const size_t source = static_cast<size_t>(args.gather ? args.gather[own] : own) * cols;
    float scale = 1.0f;
    if (args.added_norm) {
        float squares = 0;
        for (uint32_t i = threadIdx.x; i < cols; i += ROW_THREADS) {
            const float value = args.added[source + i];
            squares = __fmaf_rn(value, value, squares);
        }
        scale = 1.0f / sqrtf(sum_over_block(squares) / static_cast<float>(cols) + args.added_eps);
    }
    float squares = 0;
    for (uint32_t i = threadIdx.x; i < cols; i += ROW_THREADS) {
        float value = args.residual[source + i];
        if (args.added) {
            const float added = args.added[source + i];
            value += args.added_norm ? added * scale * args.added_norm[i] : added;
            if (!args.gather) args.residual[source + i] = value;
        }
        row_values[i] = value;
        squares = __fmaf_rn(value, value, squares);
    }
    scale = 1.0f / sqrtf(sum_over_block(squares) / static_cast<float>(cols) + args.eps);
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < (cols + 31) / 32 * 32; i += ROW_THREADS) {
        const float value = i < cols ? row_values[i] * scale * args.weight[i] : 0.0f;
        if (args.values && i < cols) args.values[static_cast<size_t>(own) * cols + i] = value;
        if (args.eight_bits.quants) round_row_group(value, args.eight_bits, own, cols, i / GROUP);
    }
}

struct RoundArgs {
    const float* values; // [rows][cols]
    const float* up;     // [rows][cols], or null
    float* out;          // [rows][cols], or null
    EightBits eight_bits;
    uint32_t rows, cols;
    uint32_t activation; // of `values`, where `up` is given: 0 silu, 1 gelu's tanh form
};

__device__ __forceinline__ float activated(float x, uint32_t activation) {
    if (activation == 0) return x / (1.0f + expf(-x));
    const float inner = 0.7978845608028654f * (x + 0.044715f * x * x * x);
    return 0.5f * x * (1.0f + tanhf(inner));
}

// Rounds values, or activation(values) · up: one warp per group of 32.
extern "C" __global__ void __launch_bounds__(ROW_THREADS) round_rows(const __grid_constant__ RoundArgs args) {
    const uint32_t groups = (args.cols + GROUP - 1) / GROUP;
    const uint32_t index = blockIdx.x * (ROW_THREADS / 32) + threadIdx.x / 32;
    const uint32_t row = blockIdx.y, group = index, i = group * GROUP + threadIdx.x % 32;
    if (group >= groups) return;
    const size_t at = static_cast<size_t>(row) * args.cols + i;
    float value = i < args.cols ? args.values[at] : 0.0f;
    if (args.up && i < args.cols) value = activated(value, args.activation) * args.up[at];
    if (args.out && i < args.cols) args.out[at] = value;
    if (args.eight_bits.quants) round_row_group(value, args.eight_bits, row, args.cols, group);
}
