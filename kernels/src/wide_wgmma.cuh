// Products with many columns on Hopper: out[column][row] = Σ weight[row][k] · x[column][k] (+ bias[row]).
//
// Tensor cores take weights from registers, to which they are decoded, and activations from shared memory,
// to which one thread has them copied, tiles ahead. A warpgroup has 64 rows, and decodes weights while
// tensor cores multiply the ones before. Grid: columns / COLUMNS, rows / ROWS; blocks next to each other
// have the same weights.
//
// TFLOP/s on an H200, whose tensor cores reach about 790 on random f16, by tokens, in the tile that is
// chosen for each (products.rs); `rows × weights`:
//
// |      | 28672 × 4096, 512 tokens | 2048 | 6144 × 4096, 512 | 2048 | 4096 × 4096, 512 | 2048 | 4096 × 14336, 512 | 2048 |
// | Q4_0 | 644 | 712 | 660 | 710 | 608 | 710 | 616 | 760 |
// | Q6_K | 540 | – | – | – | – | – | – | – |
#pragma once
#include "wgmma.cuh"

// How a block is made: warpgroups that multiply, and one that asks for activations; columns.
template <int WARPGROUPS_, int COLUMNS_> struct WideShape {
    static constexpr int WARPGROUPS = WARPGROUPS_, COLUMNS = COLUMNS_;
    static constexpr int THREADS = 128 * (WARPGROUPS + 1), ROWS = 64 * WARPGROUPS;
    static constexpr int TILES = 6, TILE = COLUMNS * ROW_BYTES;
    // A block has no more registers than it starts with: what the asking warpgroup leaves, the others take.
    static constexpr int START = 65536 / THREADS / 8 * 8, ASKING_REGISTERS = 24;
    static constexpr int REGISTERS = (START * (WARPGROUPS + 1) - ASKING_REGISTERS) / WARPGROUPS / 8 * 8;
    // Products of 16 elements that are handed over at once, and how many times so many may be under way
    // while the next weights are decoded. Few columns are multiplied too soon for a hand-over of each.
    static constexpr int BATCH = COLUMNS == 256 ? 1 : 4, PENDING = COLUMNS == 256 ? 3 : 1;
};

// Multiplies the rows of a warp, of which this lane has `row` and the 8th after it, with all columns.
template <class Loads, class Shape>
__device__ __forceinline__ void multiply_rows(const Walk& walk, TileRing<Shape> ring, uint32_t row, RowPair<Loads>& coming) {
    // Numbers of products: of a tile; of a batch; that may be under way; that have registers.
    constexpr int STEP = 2 * STEP_GROUPS, BATCH = Shape::BATCH, LATE = Shape::PENDING * BATCH, SETS = LATE + BATCH;
    constexpr int UNIT = Loads::UNIT_GROUPS;
    float sums[Shape::COLUMNS / 8][4] = {};
    hold(sums);
    uint32_t a[SETS][4];
    uint64_t b = 0;
    TileRing<Shape> done = ring;
    RowPair<Loads> loads;
    for (uint32_t chunk = 0; chunk < walk.args.padded / CHUNK; chunk++) {
#pragma unroll
        for (int i = 0; i < 2 * CHUNK; i++) {
            const uint32_t unit = (chunk * CHUNK + i / 2) / UNIT;
            if (i % (2 * UNIT) == 0) {
                loads = coming;
                coming.load(walk, row, unit + 1);
            }
            loads.decode(unit, i / 2 % UNIT, i % 2, a[i % SETS]);
            if (i % BATCH != BATCH - 1) continue;
            const int first = i - BATCH + 1;
            if (first % STEP == 0) {
                wait_at(ring.full(), ring.parity);
                b = tile_descriptor(ring.tile());
                ring.advance();
            }
            start_products();
#pragma unroll
            for (int k = first; k <= i; k++) multiply_async(sums, a[k % SETS], b + k % STEP * 2);
            commit_products();
            wait_for_products<Shape::PENDING>();
            // All up to number i − LATE are done: the last one of a tile, now and then.
            constexpr int LAST = LATE + STEP - 1;
            if (i % STEP == LAST % STEP && 2 * CHUNK * chunk + i >= LAST) {
                if (threadIdx.x % 32 == 0) arrive_at(done.free());
                done.advance();
            }
        }
    }
    wait_for_products<0>();
    hold(sums);
    store_sums(walk, row, sums);
}

// Asks for all tiles of activations, one after the other.
template <class Shape> __device__ __forceinline__ void bring_columns(const Walk& walk, TileRing<Shape> ring) {
    const WideArgs& args = walk.args;
    const uint32_t bytes = min(args.columns - walk.first_column, static_cast<uint32_t>(Shape::COLUMNS)) * ROW_BYTES;
    const __half* from = args.x + static_cast<size_t>(walk.first_column) * STEP_ELEMENTS;
    for (uint32_t step = 0; step < args.padded / STEP_GROUPS; step++, ring.advance()) {
        wait_at(ring.free(), ring.parity ^ 1);
        expect_bytes(ring.full(), bytes);
        copy_bytes(ring.tile(), from, bytes, ring.full());
        from += static_cast<size_t>(args.columns) * STEP_ELEMENTS;
    }
}

template <class Loads, class Shape> __device__ __forceinline__ void wide_loop(const Walk& walk, uint8_t* memory) {
    const uint32_t warp = threadIdx.x / 32, row = warp * 16 + threadIdx.x % 32 / 4;
    const bool multiplies = warp < 4 * Shape::WARPGROUPS;
    const TileRing<Shape> ring{shared_address(memory)};
    RowPair<Loads> coming;
    let_next_start();
    if (multiplies) coming.load(walk, row, 0);
    if (threadIdx.x == 0) start_barriers(ring);
    __syncthreads();
    wait_for_earlier();
    if (multiplies) {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Shape::REGISTERS));
        multiply_rows<Loads, Shape>(walk, ring, row, coming);
    } else {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Shape::ASKING_REGISTERS));
        if (threadIdx.x % 128 == 0) bring_columns(walk, ring);
    }
}
