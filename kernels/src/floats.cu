// Products of float weights with f32 activations. A warp has some rows and columns, and reads each weight once for
// all its columns. A lane adds up its elements in their order, then lanes add up theirs: a column's bits do not
// depend on which others are there.
//
// µs on an H200, BF16, weights from memory, and their share of a copy's 4,200 GB/s:
//
// | rows × cols | 4096 × 4096 | 28672 × 4096 |
// | 1 column | 10.1, 79 % | 58.7, 95 % |
// | 4 columns | 20.2, 39 % | 82.0, 68 % |
// | 8 columns | 25.3, 31 % | 117.6, 47 % |
#include "floats.cuh"
#include "products.cuh"

constexpr int FLOAT_WARPS = 4;
// Elements that a warp multiplies at a time, eight of each lane.
constexpr uint32_t FLOAT_STEP = 256;

// Rows of a warp: what it reads of its columns, from the first-level cache, serves all of them.
template <int COLUMNS> constexpr int FLOAT_ROWS = COLUMNS == 1 ? 1 : COLUMNS / 2;

// acc += w · eight activations.
template <int ROWS> __device__ __forceinline__ void add_eight(float acc[ROWS], const float w[ROWS][8], float4 a, float4 b) {
    const float v[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int i = 0; i < 8; i++) acc[r] = __fmaf_rn(w[r][i], v[i], acc[r]);
}

// Adds up the lanes' sums of a column and stores them.
template <int ROWS> __device__ __forceinline__ void store_column(const FloatArgs& args, uint32_t row, uint32_t column, const float acc[ROWS]) {
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const float sum = warp_sum(acc[r]);
        if (threadIdx.x % 32 != 0 || row + r >= args.rows || column >= args.columns) continue;
        args.out[static_cast<size_t>(column) * args.stride + row + r] = sum + (args.bias ? args.bias[row + r] : 0.0f);
    }
}

// Grid: rows over warps, columns / COLUMNS; `cols` is a multiple of 8.
template <class T, int COLUMNS> __device__ __forceinline__ void float_products(const FloatArgs& args) {
    constexpr int ROWS = FLOAT_ROWS<COLUMNS>;
    const uint32_t row = (blockIdx.x * FLOAT_WARPS + threadIdx.x / 32) * ROWS, column = blockIdx.y * COLUMNS;
    if (row >= args.rows) return;
    const uint8_t* weights[ROWS];
    const float* x[COLUMNS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) weights[r] = args.weights + static_cast<size_t>(min(row + r, args.rows - 1)) * args.cols * T::BYTES;
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) x[c] = args.x + static_cast<size_t>(min(column + c, args.columns - 1)) * args.cols;
    float acc[COLUMNS][ROWS] = {};
    for (uint32_t k = threadIdx.x % 32 * 8; k < args.cols; k += FLOAT_STEP) {
        float w[ROWS][8];
#pragma unroll
        for (int r = 0; r < ROWS; r++) T::load(weights[r] + static_cast<size_t>(k) * T::BYTES, w[r]);
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) {
            add_eight<ROWS>(acc[c], w, *reinterpret_cast<const float4*>(x[c] + k), *reinterpret_cast<const float4*>(x[c] + k + 4));
        }
    }
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) store_column<ROWS>(args, row, column + c, acc[c]);
}

// With a bound on blocks the compiler asks for a single column's weights further ahead.
#define FLOAT_KERNEL(name, T, columns, ...)                                                                                    \
    extern "C" __global__ void __launch_bounds__(__VA_ARGS__) matvec_##name##_##columns(const __grid_constant__ FloatArgs args) { \
        begin();                                                                                                               \
        float_products<T, columns>(args);                                                                                      \
    }
#define FLOATS(name, T)                           \
    FLOAT_KERNEL(name, T, 1, FLOAT_WARPS * 32, 1) \
    FLOAT_KERNEL(name, T, 4, FLOAT_WARPS * 32)    \
    FLOAT_KERNEL(name, T, 8, FLOAT_WARPS * 32)
FLOATS(f32, F32)
FLOATS(f16, F16)
FLOATS(bf16, Bf16)
