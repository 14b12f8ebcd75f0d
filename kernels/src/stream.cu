// Products of quantised weights with one column of 8-bit activations, or up to eight, at the speed of memory, where
// shared memory holds all activations, rows are a multiple of 16, and activations were rounded once.
//
// A block has two halves of eight warps, which take tiles of 16 rows in turn. What lies along rows is divided into
// eight ranges of chunks, one for each warp of a half, which streams its weights through a ring in shared memory
// from one tile to the next without a pause:
//
//   for each tile, for each chunk of the range:
//     for each group: 16 rows, decoded in registers, times 8 columns on tensor cores; or, of a single column, times
//       8 groups of which 7 are zeros (single.cuh)
//     the chunk DEPTH chunks later is asked for, of this tile or another
//   the ranges' sums are added up in their order
//
// Sums have the order of those in narrow.cu, and the same bits. Of a gated product each half has the tiles of one
// matrix. The activated sums of one are multiplied with those of the other, and groups of 32 of these rounded to
// 8 bits for the product that follows. Grid: a block per multiprocessor.
//
// µs on an H200, Q4_0, weights from memory (2026-11-30), one column and eight: 28672 × 4096 17.7 (88 % of a copy's
// GB/s) and 20.4, 4096 × 14336 9.7 and 13.2, 4096 × 4096 4.6 and 5.4.
#include "rounding.cuh"
#include "single.cuh"
#include "stream_norm.cuh"
#include "warp_ring.cuh"

constexpr int STREAM_RANGES = 8;

// Where products are gated, the first part is the gate, whose output gets what comes of both, and the second
// what it gates.
struct StreamArgs : ProductArgs {
    EightBits rounded;     // of what is gated
    uint32_t* halves_done; // [rows / 32]: halves of groups of 32 that are there, of a gated product; zeros between launches
    StreamNorm norm;
    uint64_t activation;
};

template <class T, bool SINGLE_, bool GATED_> struct StreamShape {
    static constexpr bool SINGLE = SINGLE_, GATED = GATED_;
    static constexpr int HALF = 32 * STREAM_RANGES, STREAMING = 2 * HALF, COLUMNS = SINGLE ? 1 : 8;
    // Chunks on their way: so many KiB of a block, or three. What is there before the kernels ahead are done
    // need not be waited for.
#if __CUDA_ARCH__ == 900
    static constexpr int KIB = SINGLE ? 80 : 48;
#else
    static constexpr int KIB = SINGLE ? 64 : 48;
#endif
    static constexpr int FITTING = KIB / LANE_BYTES<T>, DEPTH = FITTING < 3 ? 3 : FITTING;
    // Of these, asked for before a row that is normalised on the way: it would wait for them.
    static constexpr int EARLY = 1;
    // Floats from a column to the next, where no two lanes share a bank; and of a tile.
    static constexpr int STRIDE = 16 + 4, SUMS = STREAM_RANGES * COLUMNS * STRIDE;
    // Threads that finish a tile: of gated ones others than stream, else some of those in turn.
    static constexpr int FINISHING = SINGLE ? 32 : 128, TURNS = HALF / FINISHING, THREADS = STREAMING + (GATED ? FINISHING : 0);
    using Ring = WarpRing<T, DEPTH, STREAMING / 32>;
    using X = Columns<1, 1, SINGLE>;
};

// Which tiles a block has. Of gated ones two whose rows are a group of 32 follow each other, so that it rounds the
// group by itself, and nothing of it lies between the last product and the next kernel. Pairs that do not go round
// are taken apart where that gives all blocks less to do: such a tile comes first.
template <class Shape> struct OwnTiles {
    uint32_t pairs = 0;          // that are not taken apart
    uint32_t single = UINT32_MAX; // this block's tile of one that is

    __device__ __forceinline__ explicit OwnTiles(const StreamArgs& args) {
        if constexpr (!Shape::GATED) return;
        const uint32_t rest = args.tiles / 2 % gridDim.x;
        const bool are_apart = 2 * rest <= gridDim.x;
        pairs = args.tiles / 2 - (are_apart ? rest : 0);
        if (are_apart && blockIdx.x < 2 * rest) single = 2 * pairs + blockIdx.x;
    }

    // The tile of a half in its turn `turn`; beyond the last where there is none.
    __device__ __forceinline__ uint32_t at(const StreamArgs& args, uint32_t half, uint32_t turn) const {
        if constexpr (!Shape::GATED) return blockIdx.x + (2 * turn + half) * gridDim.x;
        if (single != UINT32_MAX && turn == 0) return single;
        turn -= single != UINT32_MAX;
        const uint32_t pair = turn / 2 * gridDim.x + blockIdx.x;
        return pair < pairs ? 2 * pair + turn % 2 : args.tiles;
    }
};

// Where a warp's rows begin in a tile.
template <class T, class Shape> __device__ __forceinline__ void aim(TileRows<T>& rows, const StreamArgs& args, uint32_t tile, uint32_t first) {
    if (tile >= args.tiles) return;
    const Part& part = Shape::GATED ? args.parts[threadIdx.x / Shape::HALF] : part_of(args.parts, args.n_parts, tile);
    rows.aim(part.planes, args.padded / CHUNK, tile - (Shape::GATED ? 0 : part.first_block), first);
}

// What a warp streams: chunks `first` .. `first + count` of its half's tiles; and what is to be asked for next.
template <class T, class Shape> struct Streaming {
    typename Shape::Ring ring;
    OwnTiles<Shape> tiles;
    uint32_t first, count, tile;
    uint32_t turn = 0, chunk = 0;
    TileRows<T> next{};

    __device__ __forceinline__ uint32_t own_tile(const StreamArgs& args, uint32_t turn) const { return tiles.at(args, threadIdx.x / Shape::HALF, turn); }

    // Whether the scales of a chunk are there with it, or with the one before.
    __device__ __forceinline__ bool has_scales(uint32_t chunk) const { return !Shape::SINGLE || UNIT_CHUNKS<T> == 1 || chunk % 2 == 0 || chunk == first; }

    // Asks for a chunk, to take the place of the one that was taken last.
    __device__ __forceinline__ void ask(const StreamArgs& args) {
        if (tile < args.tiles && count > 0) {
            ring.copy(next, has_scales(first + chunk));
            if (++chunk == count) {
                chunk = 0, tile = own_tile(args, ++turn);
                aim<T, Shape>(next, args, tile, first);
            } else {
                next.advance(first + chunk);
            }
        }
        commit_copies();
        ring.advance();
    }

    // Asks for some of the first chunks.
    __device__ __forceinline__ void ask_first(const StreamArgs& args, uint32_t count) {
#pragma unroll 1
        for (uint32_t i = 0; i < count; i++) ask(args);
    }

    // Waits for the next chunk.
    __device__ __forceinline__ void wait() const {
        wait_for_copies<Shape::DEPTH - 1>();
        __syncwarp();
    }
};

// Keeps the sums of a tile's range where those of all ranges are added up.
template <class Shape> __device__ __forceinline__ void keep_sums(float* sums, const TileSums<1, 1, true>& acc) {
    const uint32_t lane = threadIdx.x % 32, range = threadIdx.x / 32 % STREAM_RANGES;
#pragma unroll
    for (int i = 0; i < 4; i++) sums[(range * Shape::COLUMNS + lane % 4 * 2 + i % 2) * Shape::STRIDE + i / 2 * 8 + lane / 4] = acc.total(0, 0, i);
}

template <class Shape> __device__ __forceinline__ void keep_sums(float* sums, const float acc[2]) {
    const uint32_t lane = threadIdx.x % 32, range = threadIdx.x / 32 % STREAM_RANGES;
#pragma unroll
    for (int k = 0; k < 2; k++) {
        float sum = acc[k];
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        if (lane % 4 == 0) sums[range * Shape::STRIDE + k * 8 + lane / 4] = sum;
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

// Rounds a group of each column; `from` gives four of a column's elements, from some place of the group on.
template <class Shape, class From> __device__ __forceinline__ void round_gated(const StreamArgs& args, uint32_t group, From from) {
    const uint32_t index = threadIdx.x % Shape::FINISHING, column = index / 8, first = index % 8 * 4;
    if (index >= 64) return;
    const bool stores = column < args.columns;
    round_row_group(from(stores ? column : 0, first), args.rounded, column, args.parts[0].rows, group * GROUP + first, stores);
}

// The same of two matrices, whose sums lie one after the other. Whoever has the second half of a group rounds it.
template <class Shape> __device__ __forceinline__ void finish_gated(const StreamArgs& args, const float* sums, uint32_t tile, bool has_both) {
    __shared__ uint32_t earlier_halves;
    __shared__ __align__(16) float kept[Shape::COLUMNS][GROUP]; // of a group of which this block has both
    const uint32_t index = threadIdx.x % Shape::FINISHING, column = index / 16, row = index % 16, at = tile * 16 + row;
    const Part &gate = args.parts[0], &up = args.parts[1];
    if (column < args.columns) {
        const float of_gate = sum_of<Shape>(sums, column, row) + (gate.bias ? gate.bias[at] : 0.0f);
        const float of_up = sum_of<Shape>(sums + Shape::SUMS, column, row) + (up.bias ? up.bias[at] : 0.0f);
        const float gated = activated(of_gate, args.activation) * of_up;
        gate.out[static_cast<size_t>(column) * gate.stride + at] = gated;
        kept[column][at % GROUP] = gated;
        if (!has_both) __threadfence();
    }
    if (has_both && tile % 2 == 0) return;
    meet_some<Shape::FINISHING>(OF_FINISHING);
    if (has_both) {
        return round_gated<Shape>(args, tile / 2, [&](uint32_t column, uint32_t i) { return *reinterpret_cast<const float4*>(&kept[column][i]); });
    }
    // Counts to two, and is zero again.
    if (index == 0) earlier_halves = atomicInc(args.halves_done + tile / 2, 1);
    meet_some<Shape::FINISHING>(OF_FINISHING);
    if (earlier_halves == 0) return;
    __threadfence();
    round_gated<Shape>(args, tile / 2, [&](uint32_t column, uint32_t i) {
        return __ldcg(reinterpret_cast<const float4*>(gate.out + static_cast<size_t>(column) * gate.stride + tile / 2 * GROUP + i));
    });
}

// Finishes all gated tiles of a block. Sums have two places, which are filled and read in turn: when all meet because
// one is full, the other one has been read.
template <class Shape> __device__ __forceinline__ void finish_all_gated(const StreamArgs& args, const float* sums) {
    const OwnTiles<Shape> tiles(args);
    wait_for_earlier();
    __syncthreads();
    for (uint32_t turn = 0, tile; (tile = tiles.at(args, 0, turn)) < args.tiles; turn++) {
        meet_some<Shape::THREADS>(FILLED);
        finish_gated<Shape>(args, sums + turn % 2 * (2 * Shape::SUMS), tile, tile != tiles.single);
    }
}

// Brings a range's chunks of activations to where X reads them; both halves bring some for both. Not by the way
// of the weights, which come in the order in which they were asked for.
template <class Shape> struct Activations {
    static constexpr uint32_t WORDS = Shape::COLUMNS * 8, PIECES = Shape::COLUMNS * 10, AT_ONCE = 4, LANES = 64;
    uint32_t first, all, member;
    uint4 pieces[AT_ONCE];

    __device__ __forceinline__ Activations(uint32_t first, uint32_t count) : first(first), all(count * PIECES) {
        member = threadIdx.x % 32 + threadIdx.x / Shape::HALF * 32;
    }

    // Some of them, from number `start` on.
    __device__ __forceinline__ void load(const StreamArgs& args, uint32_t start) {
#pragma unroll
        for (uint32_t k = 0; k < AT_ONCE; k++) {
            const uint32_t index = start + member + LANES * k, slot = index / PIECES, piece = index % PIECES;
            if (index >= all) break;
            const size_t column = static_cast<size_t>(first + slot) * args.stride;
            const uint4* const words = reinterpret_cast<const uint4*>(args.quants) + column * 8;
            const uint4* const scales = reinterpret_cast<const uint4*>(args.scales) + column * 2;
            pieces[k] = __ldcg(piece < WORDS ? words + piece : scales + piece - WORDS);
        }
    }

    __device__ __forceinline__ void store(uint8_t* to, uint32_t start) const {
#pragma unroll
        for (uint32_t k = 0; k < AT_ONCE; k++) {
            const uint32_t index = start + member + LANES * k, slot = index / PIECES, piece = index % PIECES;
            if (index >= all) break;
            *reinterpret_cast<uint4*>(to + slot * Shape::X::SLOT + Shape::X::place_of(piece)) = pieces[k];
        }
    }
};

// Hands over the sums of a tile, the `turn`-th of this half of the block.
template <class Shape, class Sums>
__device__ __forceinline__ void hand_over(const StreamArgs& args, float* sums, const Sums& acc, uint32_t tile, uint32_t turn) {
    // Those of the turn before may still be read.
    const uint32_t half = threadIdx.x / Shape::HALF;
    float* const kept = sums + (turn % 2 * 2 + half) * Shape::SUMS;
    if constexpr (Shape::GATED) {
        keep_sums<Shape>(kept, acc);
        meet_some<Shape::THREADS>(FILLED);
    } else {
        keep_sums<Shape>(kept, acc);
        meet_some<Shape::HALF>(OF_HALF + half);
        finish_tile<Shape>(args, kept, tile, turn);
    }
}

// A warp's part of all tiles: of a single column.
template <class T, class Shape>
__device__ __forceinline__ void multiply_single(const StreamArgs& args, Streaming<T, Shape>& weights, const SingleColumn& x, float* sums) {
    const uint32_t begin = x.first / 2, end = (x.end + 1) / 2;
    for (uint32_t turn = 0, tile; (tile = weights.own_tile(args, turn)) < args.tiles; turn++) {
        float acc[2] = {};
        for (uint32_t pair = begin; pair < end; pair++) {
            PairSums<T> of;
            of.start();
            PairScales<T> scales;
#pragma unroll
            for (uint32_t parity = 0; parity < 2; parity++) {
                const uint32_t chunk = 2 * pair + parity;
                if (chunk < x.first || chunk >= x.end) continue;
                Raw raw[2];
                weights.wait();
                weights.ring.take(raw);
                if (weights.has_scales(chunk)) scales.load(weights.ring.scales(), chunk);
                of.add(raw, x.words_of(chunk));
                __syncwarp();
                weights.ask(args);
            }
            add_pair(acc, of, scales, x.scales_of(pair));
        }
        hand_over<Shape>(args, sums, acc, tile, turn);
    }
}

// Scales of a row of a chunk that has come.
template <class T> struct TakenScaleRow {
    SharedAt at;
    __device__ __forceinline__ SharedAt of(uint32_t) const { return at; }
};

// The same of up to eight columns.
template <class T, class Shape>
__device__ __forceinline__ void multiply_columns(const StreamArgs& args, Streaming<T, Shape>& weights, const typename Shape::X& x, float* sums) {
    const uint32_t first = weights.first, count = weights.count, g = threadIdx.x % 32 / 4;
    for (uint32_t turn = 0, tile; (tile = weights.own_tile(args, turn)) < args.tiles; turn++) {
        TileSums<1, 1, true> acc;
        for (uint32_t chunk = 0; chunk < count; chunk++) {
            Raw raw[2];
            float factors[2][CHUNK][Counts<T>::ALL];
            weights.wait();
            weights.ring.take(raw);
#pragma unroll
            for (int k = 0; k < 2; k++) {
                ChunkScales<T> scales;
                scales.load(TakenScaleRow<T>{weights.ring.scales() + (g + 8 * k) * UNIT_BYTES<T>}, first + chunk);
                scales.factors(first + chunk, factors[k]);
            }
            __syncwarp();
            multiply_slot<T, 1, 1, false>(raw, factors, x, chunk, acc);
            acc.turn();
            weights.ask(args);
        }
        hand_over<Shape>(args, sums, acc, tile, turn);
    }
}

template <class T, class Shape> __device__ __forceinline__ void stream(const StreamArgs& args) {
    extern __shared__ __align__(128) uint8_t stream_shared[];
    float* const sums = reinterpret_cast<float*>(stream_shared + Shape::Ring::BYTES);
    let_next_start();
    if (Shape::GATED && threadIdx.x >= Shape::STREAMING) return finish_all_gated<Shape>(args, sums);
    const uint32_t half = threadIdx.x / Shape::HALF, range = threadIdx.x / 32 % STREAM_RANGES;
    const uint32_t chunks = args.padded / CHUNK, each = (chunks + STREAM_RANGES - 1) / STREAM_RANGES;
    const uint32_t first = min(range * each, chunks), count = min(each, chunks - first);
    const OwnTiles<Shape> tiles(args);
    Streaming<T, Shape> weights{typename Shape::Ring(stream_shared), tiles, first, count, tiles.at(args, half, 0)};
    aim<T, Shape>(weights.next, args, weights.tile, first);
    uint8_t* const all = stream_shared + Shape::Ring::BYTES + 4 * Shape::SUMS * sizeof(float);
    uint8_t* const activations = all + range * each * Shape::X::SLOT;
    // What is loaded waits for all that was asked for before: so most chunks are asked for when it is there.
    if (Shape::SINGLE && args.norm.weight) {
        __shared__ float parts[32];
        NormOnTheWay<Shape> row{args.norm, parts};
        row.load_weight();
        weights.ask_first(args, Shape::EARLY);
        wait_for_earlier();
        row.load();
        row.sum_squares();
        weights.ask_first(args, Shape::DEPTH - Shape::EARLY);
        row.store(all);
    } else {
        using X = Activations<Shape>;
        X x(first, count);
        weights.ask_first(args, Shape::DEPTH);
        wait_for_earlier();
        x.load(args, 0);
        x.store(activations, 0);
        for (uint32_t start = X::LANES * X::AT_ONCE; start < x.all; start += X::LANES * X::AT_ONCE) {
            x.load(args, start);
            x.store(activations, start);
        }
    }
    __syncthreads();
    if constexpr (Shape::SINGLE) multiply_single<T, Shape>(args, weights, SingleColumn(activations, first, first + count), sums);
    if constexpr (!Shape::SINGLE) multiply_columns<T, Shape>(args, weights, {args, activations, 0, threadIdx.x % 32}, sums);
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
