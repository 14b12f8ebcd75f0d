// Products of quantised weights with a few columns of 8-bit activations, at the speed of memory. A
// block has ROWS rows; its warps share out what lies along them in bites of 16 rows times 8 groups, or
// 32 rows times 4. For each bite of a warp:
//
//   the next bite's weights are loaded, and wait in registers
//   for each group: tiles of 16 rows, decoded in registers, times 8 columns at a time on tensor cores
//
// and in the end the warps' sums are added in their order. The order of a sum does not depend on the
// number of columns: neither do a column's bits.
#include "products.cuh"

constexpr int NARROW_WARPS = 8;
// Chunks of 16 rows in a bite.
constexpr int BITE = 2;
// Floats from a column to the next where the warps' sums meet: no two lanes share a bank.
constexpr int SUM_STRIDE = 36;

// A lane's part of a bite: of rows g and g + 8 of each tile, quants of four groups and the scales of
// group t.
template <class T> struct Bite {
    Raw raw[BITE][2];
    uint32_t scales[BITE][2][4];
};

// Tile i of a bite: where it lies along the rows, and which rows it has.
template <int ROWS> struct Tiles {
    static constexpr int DOWN = ROWS / 16, ALONG = BITE / DOWN;
    static __device__ __forceinline__ uint32_t chunk(uint32_t bite, int i) { return bite * ALONG + i / DOWN; }
};

template <class T, int ROWS>
__device__ __forceinline__ void load_bite(const ProductArgs& args, const Part& part, uint32_t first_row, uint32_t bite, Bite<T>& to) {
    const uint32_t lane = threadIdx.x % 32, chunks = args.padded / CHUNK;
#pragma unroll
    for (int i = 0; i < BITE; i++) {
        const uint32_t chunk = min(Tiles<ROWS>::chunk(bite, i), chunks - 1);
#pragma unroll
        for (int k = 0; k < 2; k++) {
            const uint32_t row = min(first_row + i % Tiles<ROWS>::DOWN * 16 + lane / 4 + 8 * k, part.rows - 1);
            load_raw<T>(part.planes, static_cast<size_t>(row) * chunks + chunk, lane % 4, to.raw[i][k]);
            load_scales<T>(part.planes, row, args.padded, CHUNK * chunk + lane % 4, to.scales[i][k]);
        }
    }
}

// A pair of groups of 8 columns: words for both, and scales of columns 2t and 2t + 1.
template <class T> struct ColumnPair {
    uint4 words;
    int4 scales[2];

    __device__ __forceinline__ void load(const ProductArgs& args, uint32_t first, uint32_t last, uint32_t pair) {
        const uint32_t lane = threadIdx.x % 32, padded = args.padded;
        const size_t own = min(first + lane / 4, last);
        words = __ldg(reinterpret_cast<const uint4*>(args.quants + (own * padded + 2 * pair) * GROUP) + lane % 4);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const size_t column = min(first + lane % 4 * 2 + i, last);
            scales[i] = __ldg(reinterpret_cast<const int4*>(args.scales + column * padded + 2 * pair));
        }
    }
};

// acc += a chunk of DOWN tiles, from tile `start` of the bite on, times TILES · 8 columns from `first`.
template <class T, int ROWS, int TILES>
__device__ __forceinline__ void multiply_chunk(const ProductArgs& args, const Bite<T>& bite, int start, uint32_t chunk,
                                               uint32_t first, uint32_t last, float acc[ROWS / 16][TILES][4]) {
    constexpr int DOWN = Tiles<ROWS>::DOWN, ALL = Counts<T>::ALL;
    const uint32_t lane = threadIdx.x % 32;
    float own[DOWN][ALL][2];
#pragma unroll
    for (int m = 0; m < DOWN; m++)
#pragma unroll
        for (int k = 0; k < 2; k++) {
            Scales s;
            T::scales(bite.scales[start + m][k], (CHUNK * chunk + lane % 4) % T::SCALE_GROUPS, s);
#pragma unroll
            for (int i = 0; i < ALL; i++) own[m][i][k] = i < Counts<T>::SCALES ? s.scale[i] : s.min[i - Counts<T>::SCALES];
        }
#pragma unroll
    for (int pair = 0; pair < CHUNK / 2; pair++) {
        uint32_t a[2][DOWN][4];
        float scale[2][DOWN][ALL][2];
#pragma unroll
        for (int k = 0; k < 2; k++)
#pragma unroll
            for (int m = 0; m < DOWN; m++) {
                const int group = 2 * pair + k;
#pragma unroll
                for (int word = 0; word < 4; word++) a[k][m][word] = T::decode(bite.raw[start + m][word % 2], group, word / 2);
#pragma unroll
                for (int i = 0; i < 2 * ALL; i++) {
                    scale[k][m][i / 2][i % 2] = __shfl_sync(~0u, own[m][i / 2][i % 2], (lane & ~3) + group);
                }
            }
#pragma unroll
        for (int n = 0; n < TILES; n++) {
            ColumnPair<T> columns;
            columns.load(args, first + 8 * n, last, chunk * (CHUNK / 2) + pair);
#pragma unroll
            for (int k = 0; k < 2; k++) {
                ColumnScale<T> x[2];
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    x[i].set(k ? columns.scales[i].z : columns.scales[i].x, k ? columns.scales[i].w : columns.scales[i].y);
                }
                const uint32_t b0 = k ? columns.words.z : columns.words.x, b1 = k ? columns.words.w : columns.words.y;
#pragma unroll
                for (int m = 0; m < DOWN; m++) add_group<T>(acc[m][n], a[k][m], b0, b1, scale[k][m], x);
            }
        }
    }
}

// Adds up the warps' sums and stores them.
template <int ROWS, int TILES>
__device__ __forceinline__ void store_sums(const Part& part, uint32_t first_row, uint32_t first, uint32_t last,
                                           const float acc[ROWS / 16][TILES][4]) {
    constexpr int AT_ONCE = TILES < 2 ? TILES : 2, COLUMNS = AT_ONCE * 8;
    __shared__ float sums[NARROW_WARPS][COLUMNS][SUM_STRIDE];
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int start = 0; start < TILES; start += AT_ONCE) {
        __syncthreads();
#pragma unroll
        for (int n = 0; n < AT_ONCE; n++)
#pragma unroll
            for (int m = 0; m < ROWS / 16; m++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    sums[warp][8 * n + lane % 4 * 2 + i % 2][16 * m + i / 2 * 8 + lane / 4] = acc[m][start + n][i];
                }
        __syncthreads();
        for (uint32_t index = threadIdx.x; index < COLUMNS * ROWS; index += NARROW_WARPS * 32) {
            const uint32_t column = index / ROWS, row = index % ROWS, at = first + start * 8 + column;
            float sum = sums[0][column][row];
#pragma unroll
            for (int w = 1; w < NARROW_WARPS; w++) sum += sums[w][column][row];
            if (first_row + row >= part.rows || at > last) continue;
            const float bias = part.bias ? part.bias[first_row + row] : 0.0f;
            part.out[static_cast<size_t>(at) * part.stride + first_row + row] = sum + bias;
        }
    }
}

template <class T, int ROWS, int TILES> __device__ __forceinline__ void narrow(const ProductArgs& args) {
    const Part& part = part_of(args, blockIdx.x);
    const uint32_t first_row = (blockIdx.x - part.first_block) * ROWS, warp = threadIdx.x / 32;
    const uint32_t first = blockIdx.y * TILES * 8, last = args.columns - 1, chunks = args.padded / CHUNK;
    constexpr int DOWN = Tiles<ROWS>::DOWN, ALONG = Tiles<ROWS>::ALONG;
    const uint32_t bites = (chunks + ALONG - 1) / ALONG;
    float acc[DOWN][TILES][4] = {};
    Bite<T> bite, next;
    if (warp < bites) load_bite<T, ROWS>(args, part, first_row, warp, bite);
    for (uint32_t index = warp; index < bites; index += NARROW_WARPS) {
        if (index + NARROW_WARPS < bites) load_bite<T, ROWS>(args, part, first_row, index + NARROW_WARPS, next);
#pragma unroll
        for (int i = 0; i < BITE; i += DOWN) {
            const uint32_t chunk = Tiles<ROWS>::chunk(index, i);
            if (chunk >= chunks) break;
            multiply_chunk<T, ROWS, TILES>(args, bite, i, chunk, first, last, acc);
            if (args.second) multiply_chunk<T, ROWS, TILES>(args, bite, i, chunk, first + args.second, last + args.second, acc);
        }
        bite = next;
    }
    store_sums<ROWS, TILES>(part, first_row, first, last, acc);
}

#define NARROW_TILES(name, T, rows, tiles)                                                     \
    extern "C" __global__ void __launch_bounds__(NARROW_WARPS * 32)                            \
        narrow_##name##_##rows##_##tiles(const __grid_constant__ ProductArgs args) {           \
        narrow<T, rows, tiles>(args);                                                          \
    }
#define NARROW(name, T)           \
    NARROW_TILES(name, T, 16, 1)  \
    NARROW_TILES(name, T, 16, 2)  \
    NARROW_TILES(name, T, 16, 4)  \
    NARROW_TILES(name, T, 16, 8)  \
    NARROW_TILES(name, T, 32, 1)  \
    NARROW_TILES(name, T, 32, 2)  \
    NARROW_TILES(name, T, 32, 4)  \
    NARROW_TILES(name, T, 32, 8)
FOR_QUANTIZED(NARROW)
