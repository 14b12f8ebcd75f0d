// Products of e4m3 weights with up to eight columns of f32 activations a block, where e4m3_stream.cu has no room:
// out[column][row] = Σ scale · weight[row][k] · x[column][k] (+ bias[row]), nearly as exact as f32.
//
// An e4m3 is an f16 without loss. Activations are split: a chunk of a column, times a power of two that brings its
// largest near 2^15, is a sum of two f16 but for its 22nd bit. Both meet the weights on tensor cores, with sums in
// f32, so that eight columns cost what one does.
//
//   for each chunk of a range:
//     the next chunk's weights are asked for
//     activations of a column, loaded in the order in which a lane multiplies them, are split
//     for 16 rows at a time: sums of what shares a scale, times that and the power of two, are added up
//
// A block has 32 rows; its eight warps divide what lies along them, and their sums are added up in their order: a
// column's bits do not depend on which others are there. Grid: rows / 32, columns / 8.
//
// µs on an H200, E4M3_128, weights from memory, and their share of a copy's 4,200 GB/s:
//
// | rows × cols | 4096 × 4096 | 28672 × 4096 |
// | 1 column | 10.4, 39 % | 41.8, 68 % |
// | 8 columns | 11.3, 36 % | 46.2, 62 % |
#include "e4m3.cuh"

template <class T> __device__ __forceinline__ void e4m3(const E4m3Args& args) {
    const Part& part = part_of(args.parts, args.n_parts, blockIdx.x);
    const uint32_t lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const uint32_t first_row = (blockIdx.x - part.first_block) * E4M3_ROWS, first_column = blockIdx.y * E4M3_COLUMNS;
    const E4m3Range range(args);
    E4m3Rows<T> coming(part, args.padded / CHUNK, first_row + g, range.first);
    let_next_start();
    if (range.count > 0) coming.load(range.first, 0);
    wait_for_earlier();
    const float* const x = args.x + static_cast<size_t>(min(first_column + g, args.columns - 1)) * args.cols + 4 * t;
    float acc[E4M3_TILES][4] = {};
    multiply_e4m3<T>(args, coming, range.first, range.count, x, acc);
    add_e4m3_ranges(acc, [&](uint32_t of_column, uint32_t of_row, float sum) {
        const uint32_t row = first_row + of_row, column = first_column + of_column;
        if (row >= part.rows || column >= args.columns) return;
        part.out[static_cast<size_t>(column) * part.stride + row] = sum + (part.bias ? part.bias[row] : 0.0f);
    });
}

// Where each group has its scales, these take many registers.
#define E4M3(name, T)                                                                              \
    extern "C" __global__ void __launch_bounds__(32 * E4M3_RANGES, T::COUNT == 1 ? 2 : 1)          \
        matvec_##name(const __grid_constant__ E4m3Args args) {                                     \
        e4m3<T>(args);                                                                             \
    }
FOR_E4M3(E4M3)
