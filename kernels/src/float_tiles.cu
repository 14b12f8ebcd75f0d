// Products of F16 and BF16 weights with more columns of f32 activations than one, on tensor cores:
// out[column][row] = Σ weight[row][k] · x[column][k] (+ bias[row]), nearly as exact as f32.
//
// Activations are split. With F16 weights a chunk of a column, times a power of two that brings its largest near
// 2^15, is a sum of two f16 but for its 22nd bit (e4m3.cu); with BF16 weights a number is exactly the sum of three
// bf16. All parts meet the weights on tensor cores. These cut sums in their last place, so what comes out of 32
// elements is added up in f32 beside them.
//
// A block has 128 rows and up to 64 columns. A warp has 64 of the rows and a quarter of each chunk of 128 elements,
// one of four ways, and streams its weights through a ring in shared memory that no other warp reads.
//
//   for each chunk of the block:
//     the activations of the next one, which have come, are split, and those of the one after it asked for
//     for each 8 columns: 64 rows · 32 elements, all parts, are added up (half of the warps do this first)
//     all threads meet
//   the ways' sums are added up in their order, then those of the blocks of a cluster, which divide what lies along rows
//
// How many blocks these are follows from the matrix alone: a column's bits do not depend on which others are there,
// or on how many. Grid: blocks of a cluster, columns / COLUMNS, rows / 128.
//
// µs on an H200, weights from memory (2026-11-30), F16 and BF16; beside them what floats.cu takes:
//
// | rows × cols | 1024 × 4096 | 4096 × 4096 | 28672 × 4096 | 4096 × 14336 |
// | 2 columns | 6.0, 5.8 (13) | 12.7, 12.3 (20) | 64.0, 69.7 (80) | 38.1, 39.3 (47) |
// | 8 columns | 6.2, 6.0 (21) | 12.8, 12.6 (23) | 63.7, 64.2 (125) | 36.4, 37.6 (78) |
// | 16 columns | 8.0, 8.9 | 16.3, 16.2 | 66.2, 67.2 | 45.3, 47.8 |
// | 64 columns | 14.4, 15.8 | 46.8, 51.3 | 148, 172 | 132, 151 |
// | 128 columns | 28.5, 31.1 | 69.2, 76.5 | 286, 334 | 195, 224 |
#include "cluster.cuh"
#include "e4m3.cuh"
#include "floats.cuh"
#include "launch.cuh"

struct FloatTileArgs {
    FloatArgs of;
    uint32_t depth; // of the ring, 2 to 6
};

#if __CUDA_ARCH__ >= 800

constexpr uint32_t FLOAT_CHUNK = 128, FLOAT_WAYS = 4, WAY_ELEMENTS = FLOAT_CHUNK / FLOAT_WAYS;
constexpr uint32_t FLOAT_TILE_ROWS = 128, WARP_TILES = 4, WARP_TILE_ROWS = 16 * WARP_TILES;

// Activations of a piece of eight elements, split for F16 weights.
struct HalfParts {
    static constexpr int PARTS = 2;
    SplitUnit unit;

    // `largest` is that of the chunk.
    __device__ __forceinline__ explicit HalfParts(float largest) : unit(largest) {}
    __device__ __forceinline__ float step() const { return unit.step; }
    __device__ __forceinline__ void split(float a, float b, uint32_t parts[PARTS]) const { unit.split(a, b, parts[0], parts[1]); }
    static __device__ __forceinline__ void multiply(float d[4], const uint32_t a[4], uint32_t b0, uint32_t b1) { multiply_halves(d, a, b0, b1); }
    static __device__ __forceinline__ float add(float d, float step, float sum) { return __fmaf_rn(d, step, sum); }
};

// The same for BF16 weights: 24 bits are three times eight.
struct BfloatParts {
    static constexpr int PARTS = 3;

    __device__ __forceinline__ explicit BfloatParts(float) {}
    __device__ __forceinline__ float step() const { return 1.0f; }
    __device__ __forceinline__ void split(float a, float b, uint32_t parts[PARTS]) const {
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            parts[part] = __byte_perm(__float_as_uint(a), __float_as_uint(b), 0x7632);
            a -= __uint_as_float(__float_as_uint(a) & 0xffff0000u), b -= __uint_as_float(__float_as_uint(b) & 0xffff0000u);
        }
    }
    static __device__ __forceinline__ void multiply(float d[4], const uint32_t a[4], uint32_t b0, uint32_t b1) { multiply_bfloats(d, a, b0, b1); }
    static __device__ __forceinline__ float add(float d, float, float sum) { return sum + d; }
};

template <class Parts_, uint32_t COLUMNS_> struct FloatTile {
    using Parts = Parts_;
    static constexpr uint32_t COLUMNS = COLUMNS_, TILES = COLUMNS / 8, THREADS = 32 * FLOAT_WAYS * FLOAT_TILE_ROWS / WARP_TILE_ROWS;
    // Bytes of a part of a chunk of all columns; of all parts, with the value of one of each column.
    static constexpr uint32_t PLANE = COLUMNS * FLOAT_CHUNK * 2, SPLIT = Parts::PARTS * PLANE + COLUMNS * sizeof(float);
    // A slot of the ring: a way's part of eight rows, of all rows of a warp, and for all warps.
    static constexpr uint32_t COPY = 8 * WAY_ELEMENTS * 2, WARP_SLOT = 2 * WARP_TILES * COPY, SLOT = THREADS / 32 * WARP_SLOT;
    // Pieces of eight elements that a thread splits, threads that split a column, and all columns.
    static constexpr uint32_t PIECES = COLUMNS <= 16 ? 1 : COLUMNS / 16, SPLITTING = FLOAT_CHUNK / 8 / PIECES, SPLITTERS = COLUMNS * SPLITTING;
    // Of a multiprocessor: one waits for activations while the other multiplies.
    static constexpr uint32_t BLOCKS = COLUMNS <= 16 ? 2 : 1;
    // Floats from a column to the next, where no two lanes share a bank.
    static constexpr uint32_t STRIDE = FLOAT_TILE_ROWS + 4;
};

// Which chunks a block has.
struct FloatWalk {
    const FloatArgs& args;
    uint32_t first_row, first_column, first, count;
    // Where it begins: if all did with their first chunk, they would read the same places of all pages.
    uint32_t offset;

    __device__ __forceinline__ FloatWalk(const FloatArgs& args, uint32_t columns)
        : args(args), first_row(blockIdx.z * FLOAT_TILE_ROWS), first_column(blockIdx.y * columns) {
        const uint32_t chunks = (args.cols + FLOAT_CHUNK - 1) / FLOAT_CHUNK, each = (chunks + gridDim.x - 1) / gridDim.x;
        first = min(blockIdx.x * each, chunks), count = min(each, chunks - first);
        offset = count > 0 ? 5 * blockIdx.z % count : 0;
    }

    // Element that number `index` of its chunks begins with.
    __device__ __forceinline__ uint32_t start(uint32_t index) const {
        const uint32_t chunk = index + offset < count ? index + offset : index + offset - count;
        return (first + chunk) * FLOAT_CHUNK;
    }
};

// 16 bytes to shared memory, or as many zeros.
__device__ __forceinline__ void copy_or_clear(uint32_t to, const uint8_t* from, bool is_there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(is_there ? 16 : 0));
}

// What a warp streams; a lane asks for 16 bytes of rows g + 8j each. The four pieces of two rows next to each other, 128
// bytes, lie so that no two of eight rows share a bank.
template <class Tile> struct FloatRing {
    const FloatWalk& walk;
    const uint8_t* rows; // of the block
    uint32_t row, start, end, asked, taken, next = 0;

    __device__ __forceinline__ FloatRing(const FloatWalk& walk, const void* shared, uint32_t depth) : walk(walk) {
        const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        rows = walk.args.weights + static_cast<size_t>(walk.first_row) * walk.args.cols * 2;
        row = warp / FLOAT_WAYS * WARP_TILE_ROWS + lane / 4;
        start = shared_address(shared) + warp * Tile::WARP_SLOT, end = start + depth * Tile::SLOT;
        asked = taken = start;
    }

    static __device__ __forceinline__ uint32_t place(uint32_t row, uint32_t piece) { return row * (WAY_ELEMENTS * 2) + (piece ^ row / 2) * 16; }

    __device__ __forceinline__ void advance(uint32_t& slot) const {
        slot += Tile::SLOT;
        if (slot == end) slot = start;
    }

    // Asks for the chunk that comes next, to take the place of the one that was taken last.
    __device__ __forceinline__ void ask() {
        if (next < walk.count) {
            const uint32_t k = walk.start(next++) + threadIdx.x / 32 % FLOAT_WAYS * WAY_ELEMENTS + threadIdx.x % 4 * 8;
            const bool is_there = k < walk.args.cols;
            const uint8_t* const from = rows + (is_there ? k : 0) * 2;
            const uint32_t last = walk.args.rows - 1 - walk.first_row;
#pragma unroll
            for (uint32_t j = 0; j < 2 * WARP_TILES; j++) {
                copy_or_clear(asked + j * Tile::COPY + place(threadIdx.x % 32 / 4, threadIdx.x % 4), from + static_cast<size_t>(min(row + 8 * j, last)) * (walk.args.cols * 2), is_there);
            }
        }
        commit_copies();
        advance(asked);
    }

    // Waits until all but the last `depth - 1` of what was asked for are there.
    static __device__ __forceinline__ void wait(uint32_t depth) {
        if (depth == 2) wait_for_copies<1>();
        else if (depth == 3) wait_for_copies<2>();
        else if (depth == 4) wait_for_copies<3>();
        else if (depth == 5) wait_for_copies<4>();
        else wait_for_copies<5>();
    }

    // As tensor cores take them: 16 rows, and 16 elements.
    __device__ __forceinline__ void take(uint32_t w[WARP_TILES][2][4]) {
        const uint32_t lane = threadIdx.x % 32, row = lane % 8, of = lane / 8;
        __syncwarp();
#pragma unroll
        for (uint32_t m = 0; m < WARP_TILES; m++)
#pragma unroll
            for (uint32_t half = 0; half < 2; half++) load_matrices_at(w[m][half], taken + (2 * m + of % 2) * Tile::COPY + place(row, 2 * half + of / 2));
        __syncwarp();
        advance(taken);
    }
};

// A chunk of all columns on its way to being split: [part][column][16 pieces of eight elements], which lie so that no
// two of eight columns share a bank; and the value of one of each column.
template <class Tile> struct FloatColumns {
    using Parts = typename Tile::Parts;
    const FloatWalk& walk;
    float v[Tile::PIECES][8];

    static __device__ __forceinline__ uint32_t place(uint32_t column, uint32_t piece) { return column * (FLOAT_CHUNK * 2) + (piece ^ column % 8) * 16; }
    static __device__ __forceinline__ uint32_t number(uint32_t piece) { return piece * Tile::SPLITTING + threadIdx.x % Tile::SPLITTING; }

    __device__ __forceinline__ void load(uint32_t index) {
        const FloatArgs& args = walk.args;
        const uint32_t column = min(walk.first_column + threadIdx.x / Tile::SPLITTING, args.columns - 1);
#pragma unroll
        for (uint32_t piece = 0; piece < Tile::PIECES; piece++) {
            const uint32_t k = walk.start(index) + number(piece) * 8;
            const float4* const from = reinterpret_cast<const float4*>(args.x + static_cast<size_t>(column) * args.cols + k);
#pragma unroll
            for (uint32_t i = 0; i < 2; i++) {
                const float4 four = k < args.cols ? __ldcg(from + i) : make_float4(0, 0, 0, 0);
                v[piece][4 * i] = four.x, v[piece][4 * i + 1] = four.y, v[piece][4 * i + 2] = four.z, v[piece][4 * i + 3] = four.w;
            }
        }
    }

    __device__ __forceinline__ void split(uint8_t* to) const {
        const uint32_t column = threadIdx.x / Tile::SPLITTING;
        float largest = 0;
        if constexpr (Parts::PARTS == 2) {
#pragma unroll
            for (uint32_t i = 0; i < 8 * Tile::PIECES; i++) largest = fmaxf(largest, fabsf(v[i / 8][i % 8]));
#pragma unroll
            for (uint32_t distance = 1; distance < Tile::SPLITTING; distance *= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, distance));
        }
        const Parts parts(largest);
#pragma unroll
        for (uint32_t piece = 0; piece < Tile::PIECES; piece++) {
            uint32_t words[4][Parts::PARTS];
#pragma unroll
            for (uint32_t i = 0; i < 4; i++) parts.split(v[piece][2 * i], v[piece][2 * i + 1], words[i]);
            uint8_t* const at = to + place(column, number(piece));
#pragma unroll
            for (uint32_t part = 0; part < Parts::PARTS; part++) {
                *reinterpret_cast<uint4*>(at + part * Tile::PLANE) = make_uint4(words[0][part], words[1][part], words[2][part], words[3][part]);
            }
        }
        if (threadIdx.x % Tile::SPLITTING == 0) reinterpret_cast<float*>(to + Parts::PARTS * Tile::PLANE)[column] = parts.step();
    }
};

// Adds a warp's part of a chunk, of as many times eight columns as there are.
template <class Tile>
__device__ __forceinline__ void add_tiles(float (&acc)[Tile::TILES][WARP_TILES][4], const uint32_t w[WARP_TILES][2][4], uint32_t split, uint32_t tiles) {
    using Parts = typename Tile::Parts;
    const uint32_t lane = threadIdx.x % 32, way = threadIdx.x / 32 % FLOAT_WAYS;
    const uint32_t words = split + FloatColumns<Tile>::place(lane % 8, way * (WAY_ELEMENTS / 8) + lane / 8), steps = split + Parts::PARTS * Tile::PLANE + lane % 4 * 8;
#pragma unroll
    for (uint32_t n = 0; n < Tile::TILES; n++) {
        if (n >= tiles) break;
        float d[WARP_TILES][4] = {};
        uint32_t step[2];
        if constexpr (Parts::PARTS == 2) load_words<8>(SharedAt{steps + n * 8 * 4}, step);
        // What is small comes first.
#pragma unroll
        for (int part = Parts::PARTS - 1; part >= 0; part--) {
            uint32_t b[4];
            load_matrices_at(b, words + part * Tile::PLANE + n * (8 * FLOAT_CHUNK * 2));
#pragma unroll
            for (uint32_t half = 0; half < 2; half++)
#pragma unroll
                for (uint32_t m = 0; m < WARP_TILES; m++) Parts::multiply(d[m], w[m][half], b[2 * half], b[2 * half + 1]);
        }
#pragma unroll
        for (uint32_t m = 0; m < WARP_TILES; m++)
#pragma unroll
            for (uint32_t i = 0; i < 4; i++) acc[n][m][i] = Parts::add(d[m][i], __uint_as_float(step[i % 2]), acc[n][m][i]);
    }
}

// Stores the sums of four rows of a column.
__device__ __forceinline__ void store_four(const FloatWalk& walk, uint32_t column, uint32_t row, float4 sum) {
    const FloatArgs& args = walk.args;
    const uint32_t at = walk.first_row + row;
    const float of[4] = {sum.x, sum.y, sum.z, sum.w};
    float* const out = args.out + static_cast<size_t>(walk.first_column + column) * args.stride + at;
#pragma unroll
    for (uint32_t i = 0; i < 4; i++) {
        if (at + i < args.rows) out[i] = of[i] + (args.bias ? args.bias[at + i] : 0.0f);
    }
}

__device__ __forceinline__ float4 sum_of_fours(float4 a, float4 b) { return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w); }

// Adds up the sums of all ways, and of all blocks of the cluster, which store a part of the columns each.
template <class Tile>
__device__ __forceinline__ void add_ways(const FloatWalk& walk, float* sums, const float (&acc)[Tile::TILES][WARP_TILES][4], uint32_t columns) {
    constexpr uint32_t FOURS = FLOAT_TILE_ROWS / 4, AT_ONCE = Tile::THREADS / FOURS, WAY = Tile::COLUMNS * Tile::STRIDE;
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = threadIdx.x % FOURS * 4, blocks = gridDim.x;
    float* const own = sums + warp % FLOAT_WAYS * WAY + warp / FLOAT_WAYS * WARP_TILE_ROWS + lane / 4;
#pragma unroll
    for (uint32_t n = 0; n < Tile::TILES; n++)
#pragma unroll
        for (uint32_t m = 0; m < WARP_TILES; m++)
#pragma unroll
            for (uint32_t i = 0; i < 4; i++) own[(8 * n + lane % 4 * 2 + i % 2) * Tile::STRIDE + 16 * m + i / 2 * 8] = acc[n][m][i];
    __syncthreads();
    for (uint32_t column = threadIdx.x / FOURS; column < columns; column += AT_ONCE) {
        float4* const of = reinterpret_cast<float4*>(sums + column * Tile::STRIDE + row);
        float4 sum = *of;
#pragma unroll
        for (uint32_t way = 1; way < FLOAT_WAYS; way++) sum = sum_of_fours(sum, of[way * (WAY / 4)]);
        if (blocks == 1) store_four(walk, column, row, sum);
        else *of = sum;
    }
    if (blocks == 1) return;
    meet_cluster();
    const uint32_t each = (columns + blocks - 1) / blocks, first = blockIdx.x * each;
    for (uint32_t column = first + threadIdx.x / FOURS; column < min(first + each, columns); column += AT_ONCE) {
        float4 of[CLUSTER_MAX], sum = make_float4(0, 0, 0, 0);
#pragma unroll
        for (uint32_t rank = 0; rank < CLUSTER_MAX; rank++) {
            if (rank < blocks) of[rank] = load_from(rank, shared_address(sums + column * Tile::STRIDE + row));
        }
#pragma unroll
        for (uint32_t rank = 0; rank < CLUSTER_MAX; rank++) {
            if (rank < blocks) sum = sum_of_fours(sum, of[rank]);
        }
        store_four(walk, column, row, sum);
    }
    // Others read this block's.
    __syncwarp();
    meet_cluster();
}

template <class Tile> __device__ __forceinline__ void float_tiles(const FloatTileArgs& all) {
    extern __shared__ __align__(128) uint8_t float_shared[];
    const FloatWalk walk(all.of, Tile::COLUMNS);
    FloatRing<Tile> ring(walk, float_shared + 2 * Tile::SPLIT, all.depth);
    let_next_start();
#pragma unroll 1
    for (uint32_t i = 0; i < all.depth; i++) ring.ask();
    wait_for_earlier();
    const uint32_t columns = min(Tile::COLUMNS, walk.args.columns - walk.first_column), tiles = (columns + 7) / 8;
    FloatColumns<Tile> coming{walk};
    float acc[Tile::TILES][WARP_TILES][4] = {};
    const bool splits = threadIdx.x < Tile::SPLITTERS;
    if (splits && walk.count > 0) {
        coming.load(0);
        coming.split(float_shared);
    }
    if (splits && walk.count > 1) coming.load(1);
    __syncthreads();
    // Of two warps that share a part of the multiprocessor one splits while the other multiplies.
    const bool is_early = threadIdx.x < Tile::THREADS / 2;
    for (uint32_t index = 0; index < walk.count; index++) {
        const auto split_next = [&] {
            if (!splits) return;
            if (index + 1 < walk.count) coming.split(float_shared + (index + 1) % 2 * Tile::SPLIT);
            if (index + 2 < walk.count) coming.load(index + 2);
        };
        if (is_early) split_next();
        uint32_t w[WARP_TILES][2][4];
        ring.wait(all.depth);
        ring.take(w);
        ring.ask();
        add_tiles<Tile>(acc, w, shared_address(float_shared) + index % 2 * Tile::SPLIT, tiles);
        if (!is_early) split_next();
        __syncthreads();
    }
    add_ways<Tile>(walk, reinterpret_cast<float*>(float_shared), acc, columns);
}

#define FLOAT_TILE(name, Parts, columns)                                                            \
    extern "C" __global__ void __launch_bounds__(FloatTile<Parts, columns>::THREADS, FloatTile<Parts, columns>::BLOCKS) \
        float_tiles_##name##_##columns(const __grid_constant__ FloatTileArgs args) {                \
        float_tiles<FloatTile<Parts, columns>>(args);                                               \
    }
#define FLOAT_TILES(name, Parts)  \
    FLOAT_TILE(name, Parts, 8)    \
    FLOAT_TILE(name, Parts, 16)   \
    FLOAT_TILE(name, Parts, 32)   \
    FLOAT_TILE(name, Parts, 64)
FLOAT_TILES(f16, HalfParts)
FLOAT_TILES(bf16, BfloatParts)
#endif
