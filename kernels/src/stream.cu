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
// Sums have the order of those in narrow.cu, and the same bits. Of a gated product each half has the tiles of one
// matrix. The activated sums of one are multiplied with those of the other; whoever finishes the second half of
// a group of 32 of these rounds it to 8 bits for the product that follows. Grid: a block per multiprocessor.
#include "narrow.cuh"
#include "rounding.cuh"

constexpr int STREAM_RANGES = 8;

// Where products are gated, the first part is the gate, whose output gets what comes of both, and the second
// what it gates.
struct StreamArgs : ProductArgs {
    EightBits rounded;     // of what is gated
    uint32_t* halves_done; // [rows / 32]: halves of groups of 32 that are there, of a gated product; zeros between launches
    uint64_t activation;
};

template <class T, bool SINGLE_, bool GATED_> struct StreamShape {
    static constexpr bool SINGLE = SINGLE_, GATED = GATED_;
    static constexpr int HALF = 32 * STREAM_RANGES, STREAMING = 2 * HALF, COLUMNS = SINGLE ? 1 : 8;
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
    // Threads that finish a tile: of gated ones others than stream, else some of those in turn.
    static constexpr int FINISHING = SINGLE ? 32 : 128, TURNS = HALF / FINISHING, THREADS = STREAMING + (GATED ? FINISHING : 0);
    using Ring = LaneRing<T, 2, DEPTH, STREAMING>;
    using X = Columns<1, 1, SINGLE>;
};

// Until COUNT threads are here, or have passed by.
template <int COUNT> __device__ __forceinline__ void meet_some(uint32_t barrier) {
    if constexpr (COUNT == 32) __syncwarp();
    if constexpr (COUNT > 32) asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(COUNT) : "memory");
}

template <int COUNT> __device__ __forceinline__ void pass_by(uint32_t barrier) { asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "n"(COUNT) : "memory"); }

// Barriers of a block: of a half; of who finishes gated tiles; where one of two places for sums has been filled,
// or read.
enum Barrier : uint32_t { OF_HALF = 1, OF_FINISHING = 3, FILLED = 4, READ = 6 };

// A place in a warp's stream: a chunk of its range of a tile, and where the rows of this lane begin there.
template <class T, class Shape> struct StreamPlace {
    uint32_t tile, chunk = 0;
    LaneRow<T> rows[2];
    ScaleRow<T> scales[2];

    __device__ __forceinline__ void aim(const StreamArgs& args, uint32_t first) {
        if (tile >= args.tiles) return;
        const uint32_t chunks = args.padded / CHUNK, lane = threadIdx.x % 32;
        const Part& part = Shape::GATED ? args.parts[threadIdx.x / Shape::HALF] : part_of(args.parts, args.n_parts, tile);
#pragma unroll
        for (int k = 0; k < 2; k++) {
            const uint32_t row = min((tile - (Shape::GATED ? 0 : part.first_block)) * 16 + lane / 4 + 8 * k, part.rows - 1);
            rows[k] = LaneRow<T>(part.planes, part.rows, chunks, row, first);
            scales[k] = ScaleRow<T>(part.planes, part.rows, chunks, row);
        }
    }

    // To the next chunk; whether it is another tile's.
    __device__ __forceinline__ bool advance(uint32_t count) {
        if (++chunk < count) return false;
        chunk = 0, tile += Shape::GATED ? gridDim.x : 2 * gridDim.x;
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
    if (threadIdx.x % Shape::HALF / Shape::FINISHING != turn % Shape::TURNS) return;
    const uint32_t index = threadIdx.x % Shape::FINISHING, column = index / 16, row = index % 16;
    const Part& part = part_of(args.parts, args.n_parts, tile);
    const uint32_t at = (tile - part.first_block) * 16 + row;
    if (column >= args.columns || at >= part.rows) return;
    const float bias = part.bias ? part.bias[at] : 0.0f;
    part.out[static_cast<size_t>(column) * part.stride + at] = sum_of<Shape>(sums, column, row) + bias;
}

// The same of two matrices, whose sums lie one after the other. Rounds a group of 32 whose other half is there.
template <class Shape> __device__ __forceinline__ void finish_gated(const StreamArgs& args, const float* sums, uint32_t tile) {
    __shared__ uint32_t earlier_halves;
    const uint32_t index = threadIdx.x % Shape::FINISHING, column = index / 16, row = index % 16, at = tile * 16 + row;
    const Part &gate = args.parts[0], &up = args.parts[1];
    if (column < args.columns) {
        const float of_gate = sum_of<Shape>(sums, column, row) + (gate.bias ? gate.bias[at] : 0.0f);
        const float of_up = sum_of<Shape>(sums + Shape::SUMS, column, row) + (up.bias ? up.bias[at] : 0.0f);
        gate.out[static_cast<size_t>(column) * gate.stride + at] = activated(of_gate, args.activation) * of_up;
        __threadfence();
    }
    meet_some<Shape::FINISHING>(OF_FINISHING);
    // Counts to two, and is zero again.
    if (index == 0) earlier_halves = atomicInc(args.halves_done + tile / 2, 1);
    meet_some<Shape::FINISHING>(OF_FINISHING);
    if (earlier_halves == 0 || index >= 64) return;
    __threadfence();
    const uint32_t rounded = index / 8, first = tile / 2 * GROUP + index % 8 * 4;
    const bool stores = rounded < args.columns;
    const float* const from = gate.out + static_cast<size_t>(stores ? rounded : 0) * gate.stride + first;
    round_row_group(__ldcg(reinterpret_cast<const float4*>(from)), args.rounded, rounded, gate.rows, first, stores);
}

// Finishes all gated tiles of a block. Sums have two places, which are filled and read in turn.
template <class Shape> __device__ __forceinline__ void finish_all_gated(const StreamArgs& args, const float* sums) {
    wait_for_earlier();
    __syncthreads();
    uint32_t turn = 0;
    for (uint32_t tile = blockIdx.x; tile < args.tiles; tile += gridDim.x, turn++) {
        meet_some<Shape::THREADS>(FILLED + turn % 2);
        finish_gated<Shape>(args, sums + turn % 2 * (2 * Shape::SUMS), tile);
        // Where a tile is to come there.
        if (tile + 2 * gridDim.x < args.tiles) pass_by<Shape::THREADS>(READ + turn % 2);
    }
}

// Brings a warp's chunks of activations to where X reads them; both halves bring some for both. Not by the way
// of the weights, which come in the order in which they were asked for.
template <class Shape>
__device__ __forceinline__ void bring_activations(const StreamArgs& args, uint8_t* to, uint32_t first, uint32_t count, uint32_t half) {
    constexpr uint32_t WORDS = Shape::COLUMNS * 8, PIECES = Shape::COLUMNS * 10, AT_ONCE = 4, LANES = 64;
    const uint32_t chunks = args.padded / CHUNK, all = count * args.passes * PIECES;
    for (uint32_t start = threadIdx.x % 32 + 32 * half; start < all; start += LANES * AT_ONCE) {
        uint4 pieces[AT_ONCE];
#pragma unroll
        for (uint32_t k = 0; k < AT_ONCE; k++) {
            const uint32_t index = start + LANES * k, slot = index / PIECES, piece = index % PIECES;
            if (index >= all) break;
            const size_t column = static_cast<size_t>(slot % args.passes * chunks + first + slot / args.passes) * args.stride;
            const uint4* const words = reinterpret_cast<const uint4*>(args.quants) + column * 8;
            const uint4* const scales = reinterpret_cast<const uint4*>(args.scales) + column * 2;
            pieces[k] = __ldcg(piece < WORDS ? words + piece : scales + piece - WORDS);
        }
#pragma unroll
        for (uint32_t k = 0; k < AT_ONCE; k++) {
            const uint32_t index = start + LANES * k, slot = index / PIECES, piece = index % PIECES;
            if (index >= all) break;
            *reinterpret_cast<uint4*>(to + slot * Shape::X::SLOT + Shape::X::place_of(piece)) = pieces[k];
        }
    }
}

template <class T, class Shape> __device__ __forceinline__ void stream(const StreamArgs& args) {
    constexpr int DEPTH = Shape::DEPTH;
    extern __shared__ __align__(128) uint8_t stream_shared[];
    float* const sums = reinterpret_cast<float*>(stream_shared + Shape::Ring::BYTES);
    let_next_start();
    if (Shape::GATED && threadIdx.x >= Shape::STREAMING) return finish_all_gated<Shape>(args, sums);
    const uint32_t half = threadIdx.x / Shape::HALF, range = threadIdx.x / 32 % STREAM_RANGES, lane = threadIdx.x % 32, passes = args.passes;
    const uint32_t chunks = args.padded / CHUNK, each = (chunks + STREAM_RANGES - 1) / STREAM_RANGES;
    const uint32_t first = min(range * each, chunks), count = min(each, chunks - first);
    const typename Shape::Ring ring{stream_shared};
    // A half's first tile, and how far it is to its next.
    const uint32_t start = blockIdx.x + (Shape::GATED ? 0 : half * gridDim.x), step = Shape::GATED ? gridDim.x : 2 * gridDim.x;
    // Where chunks are asked for, how many of these are left, and where scales are.
    StreamPlace<T, Shape> next{start}, own{start};
    next.aim(args, first);
    own.aim(args, first);
    uint32_t left = start < args.tiles ? (args.tiles - start + step - 1) / step * count : 0;
    const auto ask = [&](uint32_t slot) {
        if (left > 0) {
            ring.copy(slot, next.rows, next.chunk);
            // Scales are read a chunk ahead: they are to be as near as that by then.
#pragma unroll
            for (int k = 0; k < 2; k++) prefetch(next.scales[k].of(first + next.chunk));
            left--;
            if (next.advance(count)) next.aim(args, first);
        }
        commit_copies();
    };
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
    uint8_t* const activations = stream_shared + Shape::Ring::BYTES + 4 * Shape::SUMS * sizeof(float) + range * each * passes * Shape::X::SLOT;
    bring_activations<Shape>(args, activations, first, count, half);
    const typename Shape::X x(args, activations, 0, lane);
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
        if constexpr (Shape::GATED) {
            if (turn >= 2) meet_some<Shape::THREADS>(READ + turn % 2);
            keep_sums<Shape>(kept + half * Shape::SUMS, acc);
            pass_by<Shape::THREADS>(FILLED + turn % 2);
        } else {
            keep_sums<Shape>(kept + half * Shape::SUMS, acc);
            meet_some<Shape::HALF>(OF_HALF + half);
            finish_tile<Shape>(args, kept + half * Shape::SUMS, tile, turn);
        }
    }
}

#define STREAM_KERNEL(kernel, T, ...)                                                                                       \
    extern "C" __global__ void __launch_bounds__(StreamShape<T, __VA_ARGS__>::THREADS, 1) kernel(const __grid_constant__ StreamArgs args) { \
        stream<T, StreamShape<T, __VA_ARGS__>>(args);                                                                       \
    }
#define STREAM(name, T)                                  \
    STREAM_KERNEL(stream_##name##_1, T, true, false)     \
    STREAM_KERNEL(stream_##name##_8, T, false, false)    \
    STREAM_KERNEL(gated_##name##_1, T, true, true)       \
    STREAM_KERNEL(gated_##name##_8, T, false, true)
FOR_QUANTIZED(STREAM)
