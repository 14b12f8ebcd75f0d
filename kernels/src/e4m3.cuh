// Products of e4m3 weights with f32 activations that are split into two f16: what kernels of whole matrices and of
// experts share. e4m3.cu tells how it is done.
#pragma once
#include "ring.cuh"
#include "wide.cuh"

constexpr int E4M3_RANGES = 8, E4M3_TILES = 2, E4M3_ROWS = 16 * E4M3_TILES, E4M3_COLUMNS = 8;

struct E4m3Args { // as WideArgs
    Part parts[PARTS];
    const float* x; // [columns][cols]
    uint32_t n_parts, padded, columns, cols;
};

// The chunks of a warp.
struct E4m3Range {
    uint32_t first, count;

    __device__ __forceinline__ explicit E4m3Range(const E4m3Args& args) {
        const uint32_t chunks = args.padded / CHUNK, each = (chunks + E4M3_RANGES - 1) / E4M3_RANGES;
        first = min(threadIdx.x / 32 * each, chunks), count = min(each, chunks - first);
    }
};

// What values of a chunk are split with: a power of two that brings their largest near 2^15, and what a one is worth
// then. Both are normal numbers.
struct SplitUnit {
    float factor, step;

    __device__ __forceinline__ explicit SplitUnit(float largest) {
        const uint32_t exponent = max(__float_as_uint(largest) >> 23, 15u);
        factor = __uint_as_float((127 + 14 + 127 - exponent) << 23);
        step = __uint_as_float((exponent - 14) << 23);
    }

    // Two values as f16, and what f16 misses of them.
    __device__ __forceinline__ void split(float a, float b, uint32_t& high, uint32_t& low) const {
        const __half2 of = __floats2half2_rn(factor * a, factor * b);
        const float2 as = __half22float2(of);
        high = bits_of(of);
        low = bits_of(__floats2half2_rn(__fmaf_rn(factor, a, -as.x), __fmaf_rn(factor, b, -as.y)));
    }
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
        const SplitUnit unit(largest);
        step = unit.step;
#pragma unroll
        for (int i = 0; i < 2 * CHUNK; i++)
#pragma unroll
            for (int k = 0; k < 2; k++) unit.split(v[i][k], v[i][k + 2], high[i][k], low[i][k]);
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

// acc += the 32 rows of `coming`, whose first chunk is on its way, times columns: over `count` chunks from `first` on.
// `x` is where this lane's part of its column begins.
template <class T>
__device__ __forceinline__ void multiply_e4m3(const E4m3Args& args, E4m3Rows<T>& coming, uint32_t first, uint32_t count, const float* x, float acc[E4M3_TILES][4]) {
    const uint32_t t = threadIdx.x % 4;
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
}

// Adds up what the warps have of eight columns: `store` gets each sum, a row of the block and a column.
template <class Store> __device__ __forceinline__ void add_e4m3_ranges(const float acc[E4M3_TILES][4], const Store& store) {
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
    float sum = sums[0][range][lane];
#pragma unroll
    for (int r = 1; r < E4M3_RANGES; r++) sum += sums[r][range][lane];
    store(range, lane, sum);
}
