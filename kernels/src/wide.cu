// Products of weights of any type with many columns, at the speed of tensor cores: weights and
// activations meet as f16 with sums in f32. A block has a tile of 128 rows and COLUMNS columns, and
// walks along them by 64 elements at a time:
//
//   the next weights are on their way to registers, the next activations to shared memory
//   tensor cores multiply this step's tiles
//   the next weights are decoded to f16 in shared memory
//
// A sum has its elements in one order, whatever the tile: a column's bits do not depend on which other
// columns are there.
//
// Tiles have 128 bytes per row; 16-byte piece p of row r lies at p ^ r % 8, so that no two of eight
// rows share a bank, as ldmatrix and wgmma want it.
#include "floats.cuh"
#include "products.cuh"
#include "tensor_cores.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define HAS_WGMMA 1
#else
#define HAS_WGMMA 0
#endif

constexpr int WIDE_THREADS = 256;
constexpr int WIDE_ROWS = 128;
constexpr int STEP_GROUPS = 2;
constexpr int ROW_BYTES = STEP_GROUPS * GROUP * 2;
constexpr int WIDE_TILE = WIDE_ROWS * ROW_BYTES;
// Weights are taken times 64 and activations come divided by 16, so that neither leaves the range in
// which f16 is precise.
constexpr float WEIGHT_UNIT = 64.0f;
constexpr float SUM_UNIT = 16.0f / WEIGHT_UNIT;

struct WideArgs {
    Part parts[PARTS];
    const __half* x; // [columns][padded · 32], see HalfColumns
    uint32_t n_parts;
    uint32_t groups;
    uint32_t padded;
    uint32_t columns;
    uint32_t cols; // elements of a row of floats
};

// scale · w + min of four signed bytes, as f16.
__device__ __forceinline__ uint2 decoded(uint32_t w, __half2 scale, __half2 min) {
    const uint32_t u = w ^ SIGNS, a = __byte_perm(u, 0x64646464u, 0x4140), b = __byte_perm(u, 0x64646464u, 0x4342);
    const __half2 offset = __float2half2_rn(-1152.0f);
    const __half2 low = __hadd2(*reinterpret_cast<const __half2*>(&a), offset);
    const __half2 high = __hadd2(*reinterpret_cast<const __half2*>(&b), offset);
    return make_uint2(bits_of(__hfma2(low, scale, min)), bits_of(__hfma2(high, scale, min)));
}

// Lane t's part of two groups of a row, on its way and then as f16: pieces of lower and upper elements.
template <class T> struct WideLoads {
    Raw raw;
    uint32_t scales[STEP_GROUPS][4];

    __device__ __forceinline__ void load(const WideArgs& args, const Planes& p, uint32_t row, uint32_t step, uint32_t t) {
        const uint32_t half = step % 2;
        const size_t lane = (static_cast<size_t>(row) * (args.padded / CHUNK) + step / 2) * 4 + t;
        load_words<LANE_QUANTS<T> / 2>(p.quants + lane * LANE_QUANTS<T> + LANE_QUANTS<T> / 2 * half, raw.quants);
        if constexpr (T::HIGH_BITS == 1) {
            load_words<4>(p.highs + lane * 4, raw.highs);
            raw.highs[0] >>= 4 * half;
        }
        if constexpr (T::HIGH_BITS == 2) load_words<4>(p.highs + lane * 8 + 4 * half, raw.highs);
#pragma unroll
        for (int k = 0; k < STEP_GROUPS; k++) load_scales<T>(p, row, args.padded, STEP_GROUPS * step + k, scales[k]);
    }

    __device__ __forceinline__ uint4 decode(uint32_t step, int k) const {
        Scales s;
        T::scales(scales[k], (STEP_GROUPS * step + k) % T::SCALE_GROUPS, s);
        const __half2 scale = __float2half2_rn(WEIGHT_UNIT * s.scale[0]), min = __float2half2_rn(T::MIN == Min::None ? 0.0f : WEIGHT_UNIT * s.min[0]);
        const uint2 lower = decoded(T::decode(raw, k, false), scale, min);
        const __half2 upper_scale = T::HALVES ? __float2half2_rn(WEIGHT_UNIT * s.scale[1]) : scale;
        const __half2 upper_min = T::MIN == Min::Pair ? __float2half2_rn(WEIGHT_UNIT * s.min[1]) : min;
        const uint2 upper = decoded(T::decode(raw, k, true), upper_scale, upper_min);
        return make_uint4(lower.x, lower.y, upper.x, upper.y);
    }
};

// The same of float weights, row after row.
template <class T> struct WideFloats {
    float values[STEP_GROUPS][8];

    __device__ __forceinline__ void load(const WideArgs& args, const Planes& p, uint32_t row, uint32_t step, uint32_t t) {
#pragma unroll
        for (int i = 0; i < 2 * STEP_GROUPS; i++) {
            const uint32_t at = step * STEP_GROUPS * GROUP + 16 * i + 4 * t;
            float* to = values[i / 2] + 4 * (i % 2);
            if (at < args.cols) {
                T::load4(p.quants + (static_cast<size_t>(row) * args.cols + at) * T::BYTES, to);
            } else {
                to[0] = to[1] = to[2] = to[3] = 0;
            }
        }
    }

    __device__ __forceinline__ uint4 decode(uint32_t, int k) const {
        uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            words[i] = bits_of(__floats2half2_rn(WEIGHT_UNIT * values[k][2 * i], WEIGHT_UNIT * values[k][2 * i + 1]));
        }
        return make_uint4(words[0], words[1], words[2], words[3]);
    }
};

// What a block works on.
struct Walk {
    const WideArgs& args;
    const Part& part;
    uint32_t first_row, first_column;
};

// Row and lane of a chunk that a thread brings: rows r and r + 4 next to each other, whose pieces lie
// in different banks.
__device__ __forceinline__ uint32_t brought_row(uint32_t index) { return index / 32 * 8 + index % 32 / 8 + index / 4 % 2 * 4; }

constexpr int BROUGHT = WIDE_ROWS * 4 / WIDE_THREADS;

template <class Loads> __device__ __forceinline__ void start_weights(const Walk& walk, uint32_t step, Loads loads[BROUGHT]) {
#pragma unroll
    for (int i = 0; i < BROUGHT; i++) {
        const uint32_t index = i * WIDE_THREADS + threadIdx.x;
        const uint32_t row = min(walk.first_row + brought_row(index), walk.part.rows - 1);
        loads[i].load(walk.args, walk.part.planes, row, step, index % 4);
    }
}

template <class Loads> __device__ __forceinline__ void finish_weights(uint32_t step, uint8_t* tile, const Loads loads[BROUGHT]) {
#pragma unroll
    for (int i = 0; i < BROUGHT; i++) {
        const uint32_t index = i * WIDE_THREADS + threadIdx.x, row = brought_row(index);
#pragma unroll
        for (int k = 0; k < STEP_GROUPS; k++) {
            *reinterpret_cast<uint4*>(tile + row * ROW_BYTES + ((4 * k + index % 4) ^ (row % 8)) * 16) = loads[i].decode(step, k);
        }
    }
}

template <int COLUMNS> __device__ __forceinline__ void start_columns(const Walk& walk, uint32_t step, uint8_t* tile) {
    const WideArgs& args = walk.args;
#pragma unroll
    for (int i = 0; i < COLUMNS * 8 / WIDE_THREADS; i++) {
        const uint32_t index = i * WIDE_THREADS + threadIdx.x, column = index / 8, piece = index % 8;
        const size_t from = min(walk.first_column + column, args.columns - 1);
        copy_16_bytes(tile + column * ROW_BYTES + (piece ^ column % 8) * 16, args.x + (from * args.padded + STEP_GROUPS * step) * GROUP + 8 * piece);
    }
}

__device__ __forceinline__ void store_sum(const Walk& walk, uint32_t row, uint32_t column, float sum) {
    const Part& part = walk.part;
    row += walk.first_row, column += walk.first_column;
    if (row >= part.rows || column >= walk.args.columns) return;
    part.out[static_cast<size_t>(column) * part.stride + row] = sum * SUM_UNIT + (part.bias ? part.bias[row] : 0.0f);
}

#if HAS_WGMMA
// Tensor cores of a warpgroup read tiles themselves and work while the warps go on.
__device__ __forceinline__ uint64_t tile_descriptor(const void* tile) {
    constexpr uint64_t EIGHT_ROWS = 8 * ROW_BYTES / 16, SWIZZLE_128 = 1;
    return (shared_address(tile) >> 4 & 0x3fff) | 1ull << 16 | EIGHT_ROWS << 32 | SWIZZLE_128 << 62;
}

// d[64 rows, 128 columns] += 16 elements of a · b.
__device__ __forceinline__ void multiply_async(float (&d)[16][4], uint64_t a, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, "
                 "%8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, "
                 "%24, %25, %26, %27, %28, %29, %30, %31, "
                 "%32, %33, %34, %35, %36, %37, %38, %39, "
                 "%40, %41, %42, %43, %44, %45, %46, %47, "
                 "%48, %49, %50, %51, %52, %53, %54, %55, "
                 "%56, %57, %58, %59, %60, %61, %62, %63}, "
                 "%64, %65, 1, 1, 1, 0, 0;"
                 : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]),
                   "+f"(d[1][0]), "+f"(d[1][1]), "+f"(d[1][2]), "+f"(d[1][3]),
                   "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]),
                   "+f"(d[3][0]), "+f"(d[3][1]), "+f"(d[3][2]), "+f"(d[3][3]),
                   "+f"(d[4][0]), "+f"(d[4][1]), "+f"(d[4][2]), "+f"(d[4][3]),
                   "+f"(d[5][0]), "+f"(d[5][1]), "+f"(d[5][2]), "+f"(d[5][3]),
                   "+f"(d[6][0]), "+f"(d[6][1]), "+f"(d[6][2]), "+f"(d[6][3]),
                   "+f"(d[7][0]), "+f"(d[7][1]), "+f"(d[7][2]), "+f"(d[7][3]),
                   "+f"(d[8][0]), "+f"(d[8][1]), "+f"(d[8][2]), "+f"(d[8][3]),
                   "+f"(d[9][0]), "+f"(d[9][1]), "+f"(d[9][2]), "+f"(d[9][3]),
                   "+f"(d[10][0]), "+f"(d[10][1]), "+f"(d[10][2]), "+f"(d[10][3]),
                   "+f"(d[11][0]), "+f"(d[11][1]), "+f"(d[11][2]), "+f"(d[11][3]),
                   "+f"(d[12][0]), "+f"(d[12][1]), "+f"(d[12][2]), "+f"(d[12][3]),
                   "+f"(d[13][0]), "+f"(d[13][1]), "+f"(d[13][2]), "+f"(d[13][3]),
                   "+f"(d[14][0]), "+f"(d[14][1]), "+f"(d[14][2]), "+f"(d[14][3]),
                   "+f"(d[15][0]), "+f"(d[15][1]), "+f"(d[15][2]), "+f"(d[15][3])
                 : "l"(a), "l"(b));
}

__device__ __forceinline__ void multiply_async(float (&d)[8][4], uint64_t a, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, "
                 "%8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, "
                 "%24, %25, %26, %27, %28, %29, %30, %31}, "
                 "%32, %33, 1, 1, 1, 0, 0;"
                 : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]),
                   "+f"(d[1][0]), "+f"(d[1][1]), "+f"(d[1][2]), "+f"(d[1][3]),
                   "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]),
                   "+f"(d[3][0]), "+f"(d[3][1]), "+f"(d[3][2]), "+f"(d[3][3]),
                   "+f"(d[4][0]), "+f"(d[4][1]), "+f"(d[4][2]), "+f"(d[4][3]),
                   "+f"(d[5][0]), "+f"(d[5][1]), "+f"(d[5][2]), "+f"(d[5][3]),
                   "+f"(d[6][0]), "+f"(d[6][1]), "+f"(d[6][2]), "+f"(d[6][3]),
                   "+f"(d[7][0]), "+f"(d[7][1]), "+f"(d[7][2]), "+f"(d[7][3])
                 : "l"(a), "l"(b));
}

// Sums are not read, or written, across this.
template <int TILES> __device__ __forceinline__ void hold(float (&d)[TILES][4]) {
#pragma unroll
    for (int j = 0; j < TILES; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) asm volatile("" : "+f"(d[j][i])::"memory");
}

template <class Loads, int COLUMNS> __device__ __forceinline__ void wide_loop(const Walk& walk, uint8_t* shared) {
    // Activations are asked for AHEAD steps before they are used. A tile is free again two steps after it
    // was: then all warps have seen its products done.
    constexpr int AHEAD = COLUMNS == 128 ? 2 : 3, COLUMN_TILES = AHEAD + 2, WEIGHT_TILES = 3;
    constexpr int COLUMN_TILE = COLUMNS * ROW_BYTES, WIDTH = COLUMNS < 128 ? COLUMNS : 128, PARTS_N = COLUMNS / WIDTH;
    uint8_t* const column_tiles = shared + WEIGHT_TILES * WIDE_TILE;
    const uint32_t steps = walk.args.padded / STEP_GROUPS, group = threadIdx.x / 128;
    float acc[PARTS_N][WIDTH / 8][4] = {};
    Loads loads[BROUGHT];
    let_next_start();
    start_weights(walk, 0, loads);
    wait_for_earlier();
#pragma unroll
    for (uint32_t step = 0; step < AHEAD; step++) {
        if (step < steps) start_columns<COLUMNS>(walk, step, column_tiles + step * COLUMN_TILE);
        commit_copies();
    }
    finish_weights(0, shared, loads);
    start_weights(walk, min(1u, steps - 1), loads);
    uint32_t weight_tile = 0, column_tile = 0, coming_tile = AHEAD;
    for (uint32_t step = 0; step < steps; step++) {
        const uint8_t* tile = shared + weight_tile * WIDE_TILE;
        const uint8_t* columns = column_tiles + column_tile * COLUMN_TILE;
        weight_tile = weight_tile + 1 == WEIGHT_TILES ? 0 : weight_tile + 1;
        column_tile = column_tile + 1 == COLUMN_TILES ? 0 : column_tile + 1;
        wait_for_copies<AHEAD - 1>();
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        __syncthreads();
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
        const uint64_t a = tile_descriptor(tile + group * 64 * ROW_BYTES), b = tile_descriptor(columns);
#pragma unroll
        for (int k = 0; k < 4; k++)
#pragma unroll
            for (int n = 0; n < PARTS_N; n++) multiply_async(acc[n], a + 2 * k, b + 2 * k + n * (WIDTH * ROW_BYTES / 16));
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        // All warps have come past the barrier, so the step before the last is done: its tile is free.
        if (step + AHEAD < steps) start_columns<COLUMNS>(walk, step + AHEAD, column_tiles + coming_tile * COLUMN_TILE);
        commit_copies();
        coming_tile = coming_tile + 1 == COLUMN_TILES ? 0 : coming_tile + 1;
        if (step + 1 < steps) {
            finish_weights(step + 1, shared + weight_tile * WIDE_TILE, loads);
            start_weights(walk, min(step + 2, steps - 1), loads);
        }
        asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
    for (int n = 0; n < PARTS_N; n++) hold(acc[n]);
    const uint32_t lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
#pragma unroll
    for (int n = 0; n < PARTS_N; n++)
#pragma unroll
        for (int j = 0; j < WIDTH / 8; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) store_sum(walk, row + i / 2 * 8, n * WIDTH + 8 * j + lane % 4 * 2 + i % 2, acc[n][j][i]);
}
#else
// Four 8×8 matrices of a tile.
__device__ __forceinline__ void load_matrices(uint32_t words[4], const uint8_t* tile, uint32_t row, uint32_t piece) {
    load_matrices_at(words, tile + row * ROW_BYTES + (piece ^ row % 8) * 16);
}

template <class Loads, int COLUMNS> __device__ __forceinline__ void wide_loop(const Walk& walk, uint8_t* shared) {
    constexpr int STAGE = WIDE_TILE + COLUMNS * ROW_BYTES, WARPS_N = COLUMNS / 32, TILES_M = WIDE_ROWS / 16 * WARPS_N / 8, TILES_N = 4;
    const uint32_t steps = walk.args.padded / STEP_GROUPS, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint32_t row = warp / WARPS_N * TILES_M * 16, column = warp % WARPS_N * 32;
    float acc[TILES_M][TILES_N][4] = {};
    Loads loads[BROUGHT];
    let_next_start();
    start_weights(walk, 0, loads);
    wait_for_earlier();
    start_columns<COLUMNS>(walk, 0, shared + WIDE_TILE);
    commit_copies();
    finish_weights(0, shared, loads);
    for (uint32_t step = 0; step < steps; step++) {
        const uint8_t* tile = shared + step % 2 * STAGE;
        uint8_t* next = shared + (step + 1) % 2 * STAGE;
        wait_for_copies<0>();
        __syncthreads();
        if (step + 1 < steps) {
            start_columns<COLUMNS>(walk, step + 1, next + WIDE_TILE);
            commit_copies();
            start_weights(walk, step + 1, loads);
        }
#pragma unroll
        for (int k = 0; k < 4; k++) {
            uint32_t b[TILES_N / 2][4];
#pragma unroll
            for (int n = 0; n < TILES_N / 2; n++) {
                load_matrices(b[n], tile + WIDE_TILE, column + 16 * n + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2);
            }
#pragma unroll
            for (int m = 0; m < TILES_M; m++) {
                uint32_t a[4];
                load_matrices(a, tile, row + 16 * m + lane % 16, 2 * k + lane / 16);
#pragma unroll
                for (int n = 0; n < TILES_N; n++) multiply_halves(acc[m][n], a, b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
            }
        }
        if (step + 1 < steps) finish_weights(step + 1, next, loads);
    }
#pragma unroll
    for (int m = 0; m < TILES_M; m++)
#pragma unroll
        for (int n = 0; n < TILES_N; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                store_sum(walk, row + 16 * m + i / 2 * 8 + lane / 4, column + 8 * n + lane % 4 * 2 + i % 2, acc[m][n][i]);
            }
}
#endif

template <class Loads, int COLUMNS> __device__ __forceinline__ void wide(const WideArgs& args) {
    extern __shared__ __align__(1024) uint8_t wide_shared[];
    uint8_t* shared = wide_shared + (1024 - shared_address(wide_shared) % 1024) % 1024;
    uint32_t index = 0;
    while (index + 1 < args.n_parts && blockIdx.y >= args.parts[index + 1].first_block) index++;
    const Part& part = args.parts[index];
    const Walk walk{args, part, (blockIdx.y - part.first_block) * WIDE_ROWS, blockIdx.x * COLUMNS};
    wide_loop<Loads, COLUMNS>(walk, shared);
}

#define WIDE_COLUMNS(name, Loads, columns, blocks)                               \
    extern "C" __global__ void __launch_bounds__(WIDE_THREADS, blocks)           \
        wide_##name##_##columns(const __grid_constant__ WideArgs args) {         \
        wide<Loads, columns>(args);                                              \
    }
#if HAS_WGMMA
#define WIDE_256(name, Loads) WIDE_COLUMNS(name, Loads, 256, 1)
#else
#define WIDE_256(name, Loads)
#endif
#define WIDE(name, Loads)              \
    WIDE_COLUMNS(name, Loads, 64, 2)   \
    WIDE_COLUMNS(name, Loads, 128, 2)  \
    WIDE_256(name, Loads)
#define WIDE_QUANTIZED(name, T) WIDE(name, WideLoads<T>)
FOR_QUANTIZED(WIDE_QUANTIZED)
WIDE(f32, WideFloats<F32>)
WIDE(f16, WideFloats<F16>)
WIDE(bf16, WideFloats<Bf16>)
