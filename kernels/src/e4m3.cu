// Products of e4m3 weights with up to eight columns of f32 activations a block, at the speed of memory:
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
#include "ring.cuh"
#include "wide.cuh"

constexpr int E4M3_RANGES = 8, E4M3_TILES = 2, E4M3_ROWS = 16 * E4M3_TILES, E4M3_COLUMNS = 8;

struct E4m3Args { // as WideArgs
    Part parts[PARTS];
    const float* x; // [columns][cols]
    uint32_t n_parts, padded, columns, cols;
};

// What a lane, number 4g + t, has of a chunk of column g: of each half of a group elements (4t, 4t + 2) and
// (4t + 1, 4t + 3), and what f16 misses of them.
struct SplitChunk {
    uint32_t high[2 * CHUNK][2], low[2 * CHUNK][2];
    float step; // value of one

    // `x` are elements from 4t of the chunk on, of which `left` halves of groups are there.
    __device__ __forceinline__ void load(const float* x, uint32_t left) {
        float v[2 * CHUNK][4], largest = 0;
#pragma unroll
        for (int i = 0; i < 2 * CHUNK; i++) {
            const float4 four = i < left ? *reinterpret_cast<const float4*>(x + 16 * i) : make_float4(0, 0, 0, 0);
            v[i][0] = four.x, v[i][1] = four.y, v[i][2] = four.z, v[i][3] = four.w;
#pragma unroll
            for (int k = 0; k < 4; k++) largest = fmaxf(largest, fabsf(v[i][k]));
        }
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
        // Both the factor and its inverse are normal numbers.
        const uint32_t exponent = max(__float_as_uint(largest) >> 23, 15u);
        const float factor = __uint_as_float((127 + 14 + 127 - exponent) << 23);
        step = __uint_as_float((exponent - 14) << 23);
#pragma unroll
        for (int i = 0; i < 2 * CHUNK; i++)
#pragma unroll
            for (int k = 0; k < 2; k++) {
                const __half2 of = __floats2half2_rn(factor * v[i][k], factor * v[i][k + 2]);
                const float2 as = __half22float2(of);
                high[i][k] = bits_of(of);
                low[i][k] = bits_of(__floats2half2_rn(__fmaf_rn(factor, v[i][k], -as.x), __fmaf_rn(factor, v[i][k + 2], -as.y)));
            }
    }
};

// Rows g + 8k of a block, and their chunk that comes.
template <class T> struct E4m3Rows {
    LaneRow<T> rows[2 * E4M3_TILES];
    ScaleRow<T> scales_of[2 * E4M3_TILES];
    Raw raw[2 * E4M3_TILES];
    WideScales<T> scales[2 * E4M3_TILES];

    __device__ __forceinline__ E4m3Rows(const Part& part, uint32_t chunks, uint32_t row, uint32_t first) {
#pragma unroll
        for (int k = 0; k < 2 * E4M3_TILES; k++) {
            const uint32_t own = min(row + 8 * k, part.rows - 1);
            rows[k] = LaneRow<T>(part.planes, part.rows, chunks, own, first);
            scales_of[k] = ScaleRow<T>(part.planes, part.rows, chunks, own);
        }
    }

    // Chunk `index` from the first on.
    __device__ __forceinline__ void load(uint32_t first, uint32_t index) {
#pragma unroll
        for (int k = 0; k < 2 * E4M3_TILES; k++) {
            load_words<LANE_QUANTS<T>>(rows[k].quants + static_cast<size_t>(index * rows[k].step) * (4 * LANE_QUANTS<T>), raw[k].quants);
            scales[k].load(scales_of[k], first + index);
        }
    }
};

// acc += a chunk of 16 rows times the columns; `steps` are those of columns 2t and 2t + 1.
template <class T>
__device__ __forceinline__ void add_chunk(float acc[4], const Raw raw[2], const WideScales<T> scales[2], const SplitChunk& x, const float steps[2]) {
    // Halves of groups that share a scale.
    constexpr int SHARE = 2 * CHUNK / T::COUNT;
    float d[4];
#pragma unroll
    for (int i = 0; i < 2 * CHUNK; i++) {
        if (i % SHARE == 0) d[0] = d[1] = d[2] = d[3] = 0;
        __half2 upper[2], lower[2];
        split_e4m3(raw[0].quants[i], upper);
        split_e4m3(raw[1].quants[i], lower);
        const uint32_t a[4] = {bits_of(upper[0]), bits_of(lower[0]), bits_of(upper[1]), bits_of(lower[1])};
        multiply_halves(d, a, x.low[i][0], x.low[i][1]);
        multiply_halves(d, a, x.high[i][0], x.high[i][1]);
        if (i % SHARE != SHARE - 1) continue;
#pragma unroll
        for (int k = 0; k < 4; k++) acc[k] = __fmaf_rn(d[k] * steps[k % 2], scales[k / 2].of(0, i / 2).scale[0], acc[k]);
    }
}

// Adds up what the warps have of a column, and stores it.
__device__ __forceinline__ void add_ranges(const E4m3Args& args, const Part& part, uint32_t first_row, const float acc[E4M3_TILES][4]) {
    // Floats from a column to the next: no two lanes share a bank.
    constexpr int STRIDE = E4M3_ROWS + 4;
    static_assert(E4M3_ROWS == 32 && E4M3_COLUMNS == E4M3_RANGES, "a thread for each sum");
    __shared__ float sums[E4M3_RANGES][E4M3_COLUMNS][STRIDE];
    const uint32_t lane = threadIdx.x % 32, range = threadIdx.x / 32;
#pragma unroll
    for (int m = 0; m < E4M3_TILES; m++)
#pragma unroll
        for (int i = 0; i < 4; i++) sums[range][lane % 4 * 2 + i % 2][16 * m + i / 2 * 8 + lane / 4] = acc[m][i];
    __syncthreads();
    const uint32_t row = first_row + lane, column = blockIdx.y * E4M3_COLUMNS + range;
    if (row >= part.rows || column >= args.columns) return;
    float sum = sums[0][range][lane];
#pragma unroll
    for (int r = 1; r < E4M3_RANGES; r++) sum += sums[r][range][lane];
    part.out[static_cast<size_t>(column) * part.stride + row] = sum + (part.bias ? part.bias[row] : 0.0f);
}

template <class T> __device__ __forceinline__ void e4m3(const E4m3Args& args) {
    const Part& part = part_of(args.parts, args.n_parts, blockIdx.x);
    const uint32_t lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, range = threadIdx.x / 32;
    const uint32_t first_row = (blockIdx.x - part.first_block) * E4M3_ROWS;
    const uint32_t chunks = args.padded / CHUNK, each = (chunks + E4M3_RANGES - 1) / E4M3_RANGES;
    const uint32_t first = min(range * each, chunks), count = min(each, chunks - first);
    E4m3Rows<T> coming(part, chunks, first_row + g, first);
    let_next_start();
    if (count > 0) coming.load(first, 0);
    wait_for_earlier();
    const float* const x = args.x + static_cast<size_t>(min(blockIdx.y * E4M3_COLUMNS + g, args.columns - 1)) * args.cols + 4 * t;
    float acc[E4M3_TILES][4] = {};
    for (uint32_t index = 0; index < count; index++) {
        const uint32_t element = (first + index) * (CHUNK * GROUP);
        SplitChunk split;
        split.load(x + element, (args.cols - element) / (GROUP / 2));
        float steps[2];
#pragma unroll
        for (int i = 0; i < 2; i++) steps[i] = __shfl_sync(~0u, split.step, 4 * (2 * t + i));
        Raw raw[2 * E4M3_TILES];
        WideScales<T> scales[2 * E4M3_TILES];
#pragma unroll
        for (int k = 0; k < 2 * E4M3_TILES; k++) raw[k] = coming.raw[k], scales[k] = coming.scales[k];
        coming.load(first, min(index + 1, count - 1));
#pragma unroll
        for (int m = 0; m < E4M3_TILES; m++) add_chunk<T>(acc[m], raw + 2 * m, scales + 2 * m, split, steps);
    }
    add_ranges(args, part, first_row, acc);
}

// Where each group has its scales, these take many registers.
#define E4M3(name, T)                                                                              \
    extern "C" __global__ void __launch_bounds__(32 * E4M3_RANGES, T::COUNT == 1 ? 2 : 1)          \
        matvec_##name(const __grid_constant__ E4m3Args args) {                                     \
        e4m3<T>(args);                                                                             \
    }
FOR_E4M3(E4M3)
