// Products of a step's experts with f16 activations on Hopper, at the speed of memory, of decoding or of tensor cores:
// out[pair][row] = Σ weight[expert of pair · rows + row][k] · x[column of pair][k].
//
// A tile is 128 rows of an expert and up to 256 of its columns, as equal parts of them as can be. How many tiles there
// are the GPU alone knows: a block for each multiprocessor counts them from the list of experts (route.cu), and takes
// every so many. Its warps have a role each, and go from tile to tile on their own, as far ahead of each other as
// shared memory allows:
//
//   three bring columns, a piece of 16 bytes at a time, from wherever they lie
//   one brings weights, a chunk of 128 rows at a time
//   two warpgroups have 64 rows each: they decode weights in registers while tensor cores multiply the ones before
//
// A tile's products have hardly more columns than it has (tile_width). A sum has its elements in one order, however many
// these are: a token's bits do not depend on what else is there.
//
// µs on an H200 for gate and up, and for down, Q4_0, weights from memory; and TFLOP/s:
//
// | tokens                 | 512                 | 2048                 |
// | 8 of 128, 768 × 2048   | 216, 129; 119, 100  | 294, 185; 350, 279   |
// | 2 of 8, 14336 × 4096   | 598, 296; 402, 406  | 1670, 855; 576, 562  |
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#include "experts.cuh"
#include "warp_ring.cuh"
#include "wgmma.cuh"

constexpr int TILE_WARPGROUPS = 2, TILE_THREADS = 128 * (TILE_WARPGROUPS + 1), GATHERING = 3;
constexpr uint32_t PIECES = 4 * TILE_WARPGROUPS, EXPERT_TILE_ROWS = TILE_ROWS * PIECES, EXPERT_TILE_COLUMNS = 256, EXPERTS_MAX = 256;
// Registers of the warpgroups by role: as many in all as they start with.
constexpr int BRINGING_REGISTERS = 56, PRODUCT_REGISTERS = 224;

// Columns in shared memory: of a chunk where there are up to 128, else of half of it.
struct ColumnTiles {
    static constexpr int WARPGROUPS = TILE_WARPGROUPS, TILES = 4, TILE = EXPERT_TILE_COLUMNS * ROW_BYTES;
    static constexpr int BYTES = TILES * TILE + 128;
};
constexpr __device__ int tile_steps(uint32_t columns) { return columns > EXPERT_TILE_COLUMNS / 2 ? 1 : 2; }

// Columns that are multiplied of tiles with some. With more of these widths ptxas 13.0 finds no registers for products
// that do not wait for each other.
constexpr __device__ uint32_t tile_width(uint32_t columns) { return columns > 192 ? 256 : columns > 128 ? (columns + 31) / 32 * 32 : columns > 64 ? 128 : 64; }

// Chunks of weights there: up to 64 KiB.
template <class T> struct WeightTiles {
    using Rows = TileRows<T>;
    static constexpr uint32_t PIECE = Rows::QUANTS + Rows::HIGHS + Rows::SCALES;
    static constexpr int WARPGROUPS = TILE_WARPGROUPS, TILE = PIECES * PIECE, TILES = 65536 / TILE < 8 ? 65536 / TILE : 8;
};

// An expert with tokens.
struct ListedExpert {
    uint32_t expert, first, count;
    uint32_t end; // of its tiles
};

__device__ __forceinline__ uint32_t parts_of(uint32_t columns) { return (columns + EXPERT_TILE_COLUMNS - 1) / EXPERT_TILE_COLUMNS; }

// Lists experts; returns how many they are. All threads of the block come here.
__device__ __forceinline__ uint32_t list_experts(const ExpertWideArgs& args, ListedExpert* listed) {
    __shared__ uint32_t tiles[EXPERTS_MAX / 32];
    const Experts& experts = args.experts;
    const uint32_t index = threadIdx.x, lane = index % 32, warp = index / 32, count = experts.routes.slots[0].count;
    ExpertSlot slot = {};
    if (index < count) slot = experts.routes.slots[1 + index];
    uint32_t end = parts_of(slot.count) * experts.row_blocks * args.product.n_parts;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
        const uint32_t other = __shfl_up_sync(~0u, end, distance);
        if (lane >= distance) end += other;
    }
    if (lane == 31 && warp < EXPERTS_MAX / 32) tiles[warp] = end;
    __syncthreads();
    if (index < count) {
        for (uint32_t other = 0; other < warp; other++) end += tiles[other];
        listed[index] = ListedExpert{slot.expert, slot.first, slot.count, end};
    }
    __syncthreads();
    return count;
}

struct ExpertTile {
    uint32_t expert, part, row; // where rows begin, of the expert's
    uint32_t first, count;      // pairs in the list
    uint32_t width;             // columns that are multiplied
};

// The tiles of this block.
struct TileWalk {
    const ListedExpert* listed;
    uint32_t experts, index, tile;

    __device__ __forceinline__ bool next(const ExpertWideArgs& args, ExpertTile& to) {
        while (index < experts && tile >= listed[index].end) index++;
        if (index >= experts) return false;
        const ListedExpert own = listed[index];
        const uint32_t place = tile - (index > 0 ? listed[index - 1].end : 0), parts = parts_of(own.count), each = (own.count + parts - 1) / parts;
        // Tiles with the same rows come one after the other.
        const uint32_t block = place / parts, start = place % parts * each, row_blocks = args.experts.row_blocks;
        to.expert = own.expert, to.part = block / row_blocks, to.row = block % row_blocks * EXPERT_TILE_ROWS;
        to.first = own.first + start, to.count = min(each, own.count - start), to.width = tile_width(each);
        tile += gridDim.x;
        return true;
    }
};

// Copies what a plane has of a chunk, BYTES of each 16 rows; a warp comes here. `from` is what the first rows have, and
// `step` bytes after it have the next ones, of which `last` are the last that are there.
template <int BYTES, int PIECE> __device__ __forceinline__ void copy_plane(uint32_t to, const uint8_t* from, uint32_t step, uint32_t last) {
    constexpr int EACH = BYTES / 16, ALL = PIECES * EACH;
    // Or else each copy's place is kept from chunk to chunk, in more registers than there are.
    asm volatile("" : "+r"(last));
#pragma unroll
    for (int i = 0; i < ALL; i += 32) {
        const uint32_t index = i + threadIdx.x % 32, piece = index / EACH, at = index % EACH * 16;
        if (ALL % 32 == 0 || index < ALL) copy_to<16>(to + piece * PIECE + at, from + static_cast<size_t>(min(piece, last)) * step + at);
    }
}

// Brings the chunks of all tiles.
template <class T> __device__ __forceinline__ void bring_weights(const ExpertWideArgs& args, TileWalk walk, TileRing<WeightTiles<T>> ring) {
    using Rows = TileRows<T>;
    constexpr int PIECE = WeightTiles<T>::PIECE;
    const uint32_t chunks = args.product.padded / CHUNK, units = chunks / UNIT_CHUNKS<T>, of_expert = args.experts.rows / TILE_ROWS;
    for (ExpertTile tile; walk.next(args, tile);) {
        const Planes& planes = args.product.parts[tile.part].planes;
        const uint32_t block = tile.expert * of_expert + tile.row / TILE_ROWS, last = of_expert - tile.row / TILE_ROWS - 1;
        const size_t first = static_cast<size_t>(block) * chunks;
        const uint8_t *quants = planes.quants + first * Rows::QUANTS, *highs = planes.highs + first * Rows::HIGHS;
        const uint8_t* const scales = planes.scales + static_cast<size_t>(block) * units * Rows::SCALES;
        for (uint32_t chunk = 0; chunk < chunks; chunk++, ring.advance()) {
            wait_at(ring.free(), ring.parity ^ 1);
            copy_plane<Rows::QUANTS, PIECE>(ring.tile(), quants, chunks * Rows::QUANTS, last);
            if constexpr (Rows::HIGHS > 0) copy_plane<Rows::HIGHS, PIECE>(ring.tile() + Rows::QUANTS, highs, chunks * Rows::HIGHS, last);
            const uint32_t unit = chunk / UNIT_CHUNKS<T> * Rows::SCALES;
            copy_plane<Rows::SCALES, PIECE>(ring.tile() + Rows::QUANTS + Rows::HIGHS, scales + unit, units * Rows::SCALES, last);
            arrive_with_copies(ring.full());
            quants += Rows::QUANTS, highs += Rows::HIGHS;
        }
    }
}

// Brings the columns of all tiles: each thread one piece of every twelfth.
struct ColumnGatherer {
    static constexpr int AT_ONCE = 4 * GATHERING, EACH = (EXPERT_TILE_COLUMNS + AT_ONCE - 1) / AT_ONCE, LOOKED_UP = (4 * EACH + 31) / 32;
    // Tiles that are on their way before one is told to be there.
    static constexpr int LAG = 1;
    static constexpr uint32_t NONE = ~0u;

    const ExpertWideArgs& args;
    uint32_t pairs[LOOKED_UP]; // of the next tile: a lane's of those that its warp brings pieces of

    __device__ __forceinline__ void look_up(const ExpertTile& tile) {
        const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
#pragma unroll
        for (int k = 0; k < LOOKED_UP; k++) {
            const uint32_t column = (8 * k + lane / 4) * AT_ONCE + 4 * warp + lane % 4;
            pairs[k] = column < tile.count ? args.experts.routes.pairs[tile.first + column] : NONE;
        }
    }

    // Where this thread's pieces lie of a step of 64 elements, in bytes; see halves.cuh.
    __device__ __forceinline__ void places(uint32_t (&from)[EACH]) const {
        const uint32_t lane = threadIdx.x % 32, piece = lane % 8;
        uint32_t sources[LOOKED_UP];
#pragma unroll
        for (int k = 0; k < LOOKED_UP; k++) sources[k] = pairs[k] == NONE ? NONE : pairs[k] / args.experts.sharing;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const uint32_t source = __shfl_sync(~0u, sources[i / 8], i % 8 * 4 + lane / 8);
            from[i] = source == NONE ? NONE : source * ROW_BYTES + (piece ^ source % 8) * 16;
        }
    }

    // What this thread copied is there, also for tensor cores.
    static __device__ __forceinline__ void tell(TileRing<ColumnTiles>& told) {
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        __syncwarp();
        if (threadIdx.x % 32 == 0) arrive_at(told.full());
        told.advance();
    }

    __device__ __forceinline__ void bring(TileWalk walk, TileRing<ColumnTiles> ring) {
        const uint32_t column = threadIdx.x % 128 / 8, to = column * ROW_BYTES + (threadIdx.x % 8 ^ column % 8) * 16;
        static_assert(AT_ONCE % 8 == 4, "every second piece of a thread is swizzled the other way");
        const uint32_t all_steps = args.product.padded / STEP_GROUPS;
        const size_t step_bytes = static_cast<size_t>(args.product.columns) * ROW_BYTES;
        TileRing<ColumnTiles> told = ring;
        uint32_t untold = 0;
        ExpertTile tile;
        bool is_tile = walk.next(args, tile);
        if (is_tile) look_up(tile);
        while (is_tile) {
            uint32_t from[EACH];
            places(from);
            const uint32_t steps = tile_steps(tile.width), tile_bytes = tile.width * ROW_BYTES;
            is_tile = walk.next(args, tile);
            if (is_tile) look_up(tile);
            const uint8_t* x = reinterpret_cast<const uint8_t*>(args.product.x);
            for (uint32_t first = 0; first < all_steps; first += steps, ring.advance()) {
                wait_at(ring.free(), ring.parity ^ 1);
                for (uint32_t step = 0; step < steps; step++, x += step_bytes) {
                    const uint32_t at[2] = {ring.tile() + step * tile_bytes + to, ring.tile() + step * tile_bytes + (to ^ 64)};
#pragma unroll
                    for (int i = 0; i < EACH; i++) {
                        if (from[i] != NONE) copy_to<16>(at[i % 2] + i * (AT_ONCE * ROW_BYTES), x + from[i]);
                    }
                }
                commit_copies();
                if (untold++ < LAG) continue;
                wait_for_copies<LAG>();
                tell(told), untold--;
            }
        }
        wait_for_copies<0>();
        for (; untold > 0; untold--) tell(told);
    }
};

// Stores the sums of a tile, as tensor cores leave them. `pairs` are those of the columns, 32 a lane.
template <int TILES>
__device__ __forceinline__ void store_pairs(const ExpertWideArgs& args, const ExpertTile& tile, const uint32_t (&pairs)[TILES / 4], const float (&sums)[TILES][4]) {
    const Part& part = args.product.parts[tile.part];
    const uint32_t lane = threadIdx.x % 32, row = tile.row + threadIdx.x / 32 * TILE_ROWS + lane / 4;
    float* const out = part.out + row;
#pragma unroll
    for (int j = 0; j < TILES; j++)
#pragma unroll
        for (int k = 0; k < 2; k++) {
            const uint32_t column = 8 * j + lane % 4 * 2 + k;
            float* const to = out + static_cast<size_t>(__shfl_sync(~0u, pairs[j / 4], column % 32)) * part.stride;
            // Rows are a multiple of 16.
            if (column >= tile.count || row >= args.experts.rows) continue;
#pragma unroll
            for (int i = 0; i < 2; i++) to[8 * i] = sums[j][2 * i + k] * SUM_UNIT;
        }
}

// A tile's products, for one of the warpgroups that multiply.
template <class T, int COLUMNS>
__device__ __forceinline__ void multiply_tile(const ExpertWideArgs& args, const ExpertTile& tile, TileRing<ColumnTiles>& x, TileRing<WeightTiles<T>>& weights) {
    // Products of 16 elements: of a step; of a tile of columns; that are handed over at once; that may be under way
    // while the next weights are decoded; that have registers. Few columns are multiplied soon.
    constexpr int STEP = 2 * STEP_GROUPS, ALL = tile_steps(COLUMNS) * STEP;
    constexpr int BATCH = COLUMNS == 256 ? 1 : COLUMNS > 128 ? 2 : 4, LATE = COLUMNS == 256 ? 3 : BATCH, SETS = LATE + BATCH;
    using Rows = TileRows<T>;
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float sums[COLUMNS / 8][4] = {};
    hold(sums);
    uint32_t a[SETS][4];
    uint64_t b = 0;
    TileRing<ColumnTiles> done = x;
    for (uint32_t chunk = 0; chunk < args.product.padded / CHUNK; chunk++) {
        RowPair<WideLoads<T>> loads;
        const uint32_t piece = weights.tile() + warp * WeightTiles<T>::PIECE;
        wait_at(weights.full(), weights.parity);
#pragma unroll
        for (int k = 0; k < 2; k++) {
            take_row<T>(piece, k, loads.rows[k].raw);
            loads.rows[k].scales.load_from(SharedAt{piece + Rows::QUANTS + Rows::HIGHS + (lane / 4 + 8 * k) * UNIT_BYTES<T>}, chunk);
        }
        // Each lane for what it read itself: compute-sanitizer does not follow one that speaks for a warp.
        arrive_at(weights.free());
        weights.advance();
#pragma unroll
        for (int i = 0; i < 2 * CHUNK; i++) {
            loads.decode(chunk, i / 2, i % 2, a[i % SETS]);
            if (i % BATCH != BATCH - 1) continue;
            const int first = i - BATCH + 1;
            if (first % ALL == 0) {
                wait_at(x.full(), x.parity);
                b = tile_descriptor(x.tile());
                x.advance();
            }
            start_products();
#pragma unroll
            for (int k = first; k <= i; k++) multiply_async(sums, a[k % SETS], b + (k % ALL / STEP * COLUMNS * ROW_BYTES + k % STEP * 32) / 16);
            commit_products();
            wait_for_products<LATE / BATCH>();
            // All up to number i − LATE are done: the last one of a tile of columns, now and then.
            constexpr int LAST = LATE + ALL - 1;
            if (i % ALL == LAST % ALL && 2 * CHUNK * chunk + i >= LAST) {
                if (lane == 0) arrive_at(done.free());
                done.advance();
            }
        }
    }
    uint32_t pairs[COLUMNS / 32];
#pragma unroll
    for (int k = 0; k < COLUMNS / 32; k++) pairs[k] = args.experts.routes.pairs[tile.first + min(32 * k + lane, tile.count - 1)];
    wait_for_products<0>();
    // What is not told yet of, LATE being less than a tile, is the last one.
    if (lane == 0) arrive_at(done.free());
    hold(sums);
    store_pairs(args, tile, pairs, sums);
}

// With as many columns as the tile has.
template <class T, int COLUMNS>
__device__ __forceinline__ void multiply_as_wide(const ExpertWideArgs& args, const ExpertTile& tile, TileRing<ColumnTiles>& x, TileRing<WeightTiles<T>>& weights) {
    if constexpr (COLUMNS < EXPERT_TILE_COLUMNS) {
        if (tile.width > COLUMNS) return multiply_as_wide<T, tile_width(COLUMNS + 1)>(args, tile, x, weights);
    }
    multiply_tile<T, COLUMNS>(args, tile, x, weights);
}

template <class T> __device__ __forceinline__ void expert_tiles(const ExpertWideArgs& args) {
    extern __shared__ __align__(1024) uint8_t expert_tiles_shared[];
    __shared__ ListedExpert listed[EXPERTS_MAX];
    const uint32_t start = shared_address(expert_tiles_shared), memory = start + (1024 - start % 1024) % 1024;
    TileRing<ColumnTiles> x{memory};
    TileRing<WeightTiles<T>> weights{memory + ColumnTiles::BYTES};
    begin();
    if (threadIdx.x == 0) start_barriers(x, GATHERING), start_barriers(weights, 32, 32 * PIECES);
    TileWalk walk{listed, list_experts(args, listed), 0, blockIdx.x};
    const uint32_t warp = threadIdx.x / 32;
    if (warp < PIECES) {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(PRODUCT_REGISTERS));
        for (ExpertTile tile; walk.next(args, tile);) multiply_as_wide<T, tile_width(1)>(args, tile, x, weights);
    } else {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(BRINGING_REGISTERS));
        if (warp < PIECES + GATHERING) {
            ColumnGatherer{args}.bring(walk, x);
        } else {
            bring_weights<T>(args, walk, weights);
        }
    }
}

#define EXPERT_TILES(name, T)                                                                                                        \
    extern "C" __global__ void __launch_bounds__(TILE_THREADS, 1) expert_tiles_##name(const __grid_constant__ ExpertWideArgs args) { \
        expert_tiles<T>(args);                                                                                                       \
    }
FOR_QUANTIZED(EXPERT_TILES)
FOR_E4M3(EXPERT_TILES)
#endif
