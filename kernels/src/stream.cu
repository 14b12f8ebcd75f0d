// Products of quantised weights with one column of 8-bit activations, or up to eight, at the speed of memory, where
// shared memory holds all activations.
//
// A block has two halves of eight warps, which take tiles of 16 rows in turn. What lies along rows is divided into
// eight ranges of chunks, one for each warp of a half, which streams its weights through a ring in shared memory
// from one tile to the next without a pause:
//
//   for each tile, for each chunk of the range:
//     for each group: 16 rows, decoded in registers, times 8 columns on tensor cores
//     the chunk DEPTH chunks later is asked for, of this tile or another
//   the ranges' sums are added up in their order
//
// Sums have the order of those in narrow.cu, and the same bits. Grid: a block per multiprocessor.
//
// µs on an H200, weights from memory, and their share of a copy's 4,200 GB/s:
//
// | rows × cols | 6144 × 4096 | 4096 × 4096 | 28672 × 4096 | 4096 × 14336 |
// | Q4_0, 1 column | 7.7, 44 % | 5.2, 43 % | 23.1, 68 % | 13.2, 59 % |
// | Q4_0, 8 columns | 9.1, 37 % | 6.7, 33 % | 25.2, 62 % | 15.5, 51 % |
// | Q6_K, 1 and 8 columns | – | – | 30.9, 74 %; 33.7, 68 % | – |
#include "narrow.cuh"

constexpr int STREAM_RANGES = 8;

struct StreamArgs {
    Part parts[PARTS];
    const int8_t* quants; // as in ProductArgs
    const GroupScale* scales;
    uint32_t n_parts, padded, columns, stride, passes;
    uint32_t tiles;
};

template <class T, bool SINGLE_> struct StreamShape {
    static constexpr bool SINGLE = SINGLE_;
    static constexpr int HALF = 32 * STREAM_RANGES, THREADS = 2 * HALF, COLUMNS = SINGLE ? 1 : 8;
    // Chunks on their way: so many KiB of a block, or three. What is there before the kernels ahead are done
    // need not be waited for.
#if __CUDA_ARCH__ == 900
    static constexpr int KIB = SINGLE ? 128 : 48;
#else
    static constexpr int KIB = SINGLE ? 64 : 48;
#endif
    static constexpr int FITTING = KIB / LANE_BYTES<T>, DEPTH = FITTING < 3 ? 3 : FITTING;
    // Floats from a column to the next, where no two lanes share a bank; and of a tile.
    static constexpr int STRIDE = 16 + 4, SUMS = STREAM_RANGES * COLUMNS * STRIDE;
    // Warps that finish a tile, of all that do so in turn.
    static constexpr int FINISHING = SINGLE ? 1 : 4, TURNS = STREAM_RANGES / FINISHING;
    using Ring = LaneRing<T, 2, DEPTH, THREADS>;
    using X = Columns<1, 1, SINGLE>;
};

// Until COUNT threads are here.
template <int COUNT> __device__ __forceinline__ void meet_some(uint32_t barrier) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(COUNT) : "memory");
}

// A place in a warp's stream: a chunk of its range of a tile, and where the rows of this lane begin there.
template <class T, class Shape> struct StreamPlace {
    uint32_t tile, chunk = 0;
    LaneRow<T> rows[2];
    ScaleRow<T> scales[2];

    __device__ __forceinline__ void aim(const StreamArgs& args, uint32_t first) {
        if (tile >= args.tiles) return;
        const uint32_t chunks = args.padded / CHUNK, lane = threadIdx.x % 32;
        const Part& part = part_of(args.parts, args.n_parts, tile);
#pragma unroll
        for (int k = 0; k < 2; k++) {
            const uint32_t row = min((tile - part.first_block) * 16 + lane / 4 + 8 * k, part.rows - 1);
            rows[k] = LaneRow<T>(part.planes, part.rows, chunks, row, first);
            scales[k] = ScaleRow<T>(part.planes, part.rows, chunks, row);
        }
    }

    // To the next chunk; whether it is another tile's.
    __device__ __forceinline__ bool advance(uint32_t count) {
        if (++chunk < count) return false;
        chunk = 0, tile += 2 * gridDim.x;
        return true;
    }
};

// Keeps the sums of a tile's range where those of all ranges are added up.
template <class Shape> __device__ __forceinline__ void keep_sums(float* sums, const float acc[1][1][4]) {
    const uint32_t lane = threadIdx.x % 32, range = threadIdx.x / 32 % STREAM_RANGES;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if (Shape::SINGLE && (i % 2 || lane % 4)) continue;
        const uint32_t column = Shape::SINGLE ? 0 : lane % 4 * 2 + i % 2;
        sums[(range * Shape::COLUMNS + column) * Shape::STRIDE + i / 2 * 8 + lane / 4] = acc[0][0][i];
    }
}

template <class Shape> __device__ __forceinline__ float sum_of(const float* sums, uint32_t column, uint32_t row) {
    float sum = sums[column * Shape::STRIDE + row];
#pragma unroll
    for (int range = 1; range < STREAM_RANGES; range++) sum += sums[(range * Shape::COLUMNS + column) * Shape::STRIDE + row];
    return sum;
}

// Stores a tile; `turn` counts those of this half of the block. Not the same warps do it in a row.
template <class Shape> __device__ __forceinline__ void finish_tile(const StreamArgs& args, const float* sums, uint32_t tile, uint32_t turn) {
    if (threadIdx.x % Shape::HALF / (32 * Shape::FINISHING) != turn % Shape::TURNS) return;
    const uint32_t index = threadIdx.x % (32 * Shape::FINISHING), column = index / 16, row = index % 16;
    const Part& part = part_of(args.parts, args.n_parts, tile);
    const uint32_t at = (tile - part.first_block) * 16 + row;
    if (column >= args.columns || at >= part.rows) return;
    const float bias = part.bias ? part.bias[at] : 0.0f;
    part.out[static_cast<size_t>(column) * part.stride + at] = sum_of<Shape>(sums, column, row) + bias;
}

template <class T, class Shape> __device__ __forceinline__ void stream(const StreamArgs& args) {
    constexpr int DEPTH = Shape::DEPTH;
    extern __shared__ __align__(128) uint8_t stream_shared[];
    const uint32_t half = threadIdx.x / Shape::HALF, range = threadIdx.x / 32 % STREAM_RANGES, lane = threadIdx.x % 32, passes = args.passes;
    const uint32_t chunks = args.padded / CHUNK, each = (chunks + STREAM_RANGES - 1) / STREAM_RANGES;
    const uint32_t first = min(range * each, chunks), count = min(each, chunks - first);
    const typename Shape::Ring ring{stream_shared};
    float* const sums = reinterpret_cast<float*>(stream_shared + Shape::Ring::BYTES);
    // A half's first tile, and how far it is to its next.
    const uint32_t start = blockIdx.x + half * gridDim.x, step = 2 * gridDim.x;
    // Where chunks are asked for, how many of these are left, and where scales are.
    StreamPlace<T, Shape> next{start}, own{start};
    next.aim(args, first);
    own.aim(args, first);
    uint32_t left = start < args.tiles ? (args.tiles - start + step - 1) / step * count : 0;
    const auto ask = [&](uint32_t slot) {
        if (left > 0) {
            ring.copy(slot, next.rows, next.chunk);
            left--;
            if (next.advance(count)) next.aim(args, first);
        }
        commit_copies();
    };
    let_next_start();
#pragma unroll
    for (uint32_t slot = 0; slot < DEPTH; slot++) ask(slot);
    ChunkScales<T> scales[2];
    const auto load_scales = [&] {
        if (own.tile >= args.tiles) return;
#pragma unroll
        for (int k = 0; k < 2; k++) scales[k].load(own.scales[k], first + own.chunk);
    };
    if (count > 0) load_scales();
    wait_for_earlier();
    // Both halves bring a range's activations for both.
    const typename Shape::X x(args, stream_shared + Shape::Ring::BYTES + 4 * Shape::SUMS * sizeof(float) + range * each * passes * Shape::X::SLOT, 0, lane);
    for (uint32_t i = half; i < count * passes; i += 2) x.copy(i, i % passes * chunks + first + i / passes);
    commit_copies();
    wait_for_copies<0>();
    __syncthreads();
    uint32_t slot = 0;
    for (uint32_t tile = start, turn = 0; tile < args.tiles; tile += step, turn++) {
        float acc[1][1][4] = {};
        for (uint32_t chunk = 0; chunk < count; chunk++) {
            wait_for_copies<DEPTH - 1>();
            Raw raw[2];
            float factors[2][CHUNK][Counts<T>::ALL];
#pragma unroll
            for (int k = 0; k < 2; k++) {
                ring.take(slot, k, raw[k]);
                scales[k].factors(first + chunk, factors[k]);
            }
            if (own.advance(count)) own.aim(args, first);
            load_scales();
            for (uint32_t pass = 0; pass < passes; pass++) multiply_slot<T, 1, 1, Shape::SINGLE>(raw, factors, x, chunk * passes + pass, acc);
            ask(slot);
            slot = slot + 1 == DEPTH ? 0 : slot + 1;
        }
        // Those of the turn before may still be read.
        float* const kept = sums + turn % 2 * (2 * Shape::SUMS);
        keep_sums<Shape>(kept + half * Shape::SUMS, acc);
        meet_some<Shape::HALF>(1 + half);
        finish_tile<Shape>(args, kept + half * Shape::SUMS, tile, turn);
    }
}

#define STREAM_KERNEL(kernel, T, ...)                                                                                       \
    extern "C" __global__ void __launch_bounds__(StreamShape<T, __VA_ARGS__>::THREADS, 1) kernel(const __grid_constant__ StreamArgs args) { \
        stream<T, StreamShape<T, __VA_ARGS__>>(args);                                                                       \
    }
#define STREAM(name, T)                           \
    STREAM_KERNEL(stream_##name##_1, T, true)     \
    STREAM_KERNEL(stream_##name##_8, T, false)
FOR_QUANTIZED(STREAM)
