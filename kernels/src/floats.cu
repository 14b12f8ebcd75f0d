// Products of float weights with f32 activations. A warp has some rows and columns, and reads each weight once
// for all its columns. A lane adds up its elements in their order, then lanes add up theirs: a column's bits do
// not depend on which others are there.
#include "floats.cuh"
#include "products.cuh"

constexpr int FLOAT_WARPS = 4;

struct FloatArgs {
    const uint8_t* weights; // [rows][cols]
    const float* x;         // [columns][cols]
    const float* bias;
    float* out; // [columns][stride]
    uint32_t rows, cols, columns, stride;
};

// Rows of a warp: activations come from the first-level cache, 32 bytes of a column for all rows' eight elements.
template <int COLUMNS> constexpr int FLOAT_ROWS = COLUMNS == 1 ? 1 : COLUMNS / 2;

// Grid: rows over warps, columns / COLUMNS; `cols` is a multiple of 8.
template <class T, int COLUMNS> __device__ __forceinline__ void float_products(const FloatArgs& args) {
    constexpr int ROWS = FLOAT_ROWS<COLUMNS>;
    const uint32_t row = (blockIdx.x * FLOAT_WARPS + threadIdx.x / 32) * ROWS, column = blockIdx.y * COLUMNS, lane = threadIdx.x % 32;
    if (row >= args.rows) return;
    const uint8_t* weights[ROWS];
    const float* x[COLUMNS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) weights[r] = args.weights + static_cast<size_t>(min(row + r, args.rows - 1)) * args.cols * T::BYTES;
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) x[c] = args.x + static_cast<size_t>(min(column + c, args.columns - 1)) * args.cols;
    // Weights come a step ahead.
    uint32_t coming[ROWS][2 * T::BYTES];
    const auto ask = [&](uint32_t k) {
#pragma unroll
        for (int r = 0; r < ROWS; r++) load_words<8 * T::BYTES>(weights[r] + static_cast<size_t>(k) * T::BYTES, coming[r]);
    };
    float acc[ROWS][COLUMNS] = {};
    if (lane * 8 < args.cols) ask(lane * 8);
    for (uint32_t k = lane * 8; k < args.cols; k += 256) {
        float w[ROWS][8];
#pragma unroll
        for (int r = 0; r < ROWS; r++) T::unpack(coming[r], w[r]);
        if (k + 256 < args.cols) ask(k + 256);
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) {
            const float4 a = *reinterpret_cast<const float4*>(x[c] + k), b = *reinterpret_cast<const float4*>(x[c] + k + 4);
            const float v[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
            for (int r = 0; r < ROWS; r++)
#pragma unroll
                for (int i = 0; i < 8; i++) acc[r][c] = __fmaf_rn(w[r][i], v[i], acc[r][c]);
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        if (row + r >= args.rows) return;
        const float bias = args.bias ? args.bias[row + r] : 0.0f;
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) {
            const float sum = warp_sum(acc[r][c]);
            if (lane == 0 && column + c < args.columns) args.out[static_cast<size_t>(column + c) * args.stride + row + r] = sum + bias;
        }
    }
}

#define FLOAT_KERNEL(name, T, columns)                                                                                             \
    extern "C" __global__ void __launch_bounds__(FLOAT_WARPS * 32) matvec_##name##_##columns(const __grid_constant__ FloatArgs args) { \
        begin();                                                                                                                   \
        float_products<T, columns>(args);                                                                                          \
    }
#define FLOATS(name, T)       \
    FLOAT_KERNEL(name, T, 1)  \
    FLOAT_KERNEL(name, T, 4)  \
    FLOAT_KERNEL(name, T, 8)
FLOATS(f32, F32)
FLOATS(f16, F16)
FLOATS(bf16, Bf16)
