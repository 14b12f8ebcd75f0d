// Products with many columns on GPUs other than Hopper: weights are decoded to registers, activations come
// to shared memory a step ahead. A warp has 16 rows and all columns of the tile.
#pragma once
#include "wide.cuh"

template <int COLUMNS_> struct WideShape {
    static constexpr int COLUMNS = COLUMNS_, THREADS = 256, ROWS = 128, TILE = COLUMNS * ROW_BYTES;
};

template <class Shape> __device__ __forceinline__ void start_columns(const Walk& walk, uint32_t step, uint8_t* tile) {
    const WideArgs& args = walk.args;
#pragma unroll
    for (int i = 0; i < Shape::TILE / 16 / Shape::THREADS; i++) {
        const uint32_t index = i * Shape::THREADS + threadIdx.x, column = index / 8, piece = index % 8;
        const size_t from = static_cast<size_t>(step) * args.columns + min(walk.first_column + column, args.columns - 1);
        copy_16_bytes(tile + 16 * index, args.x + from * STEP_ELEMENTS + 8 * piece);
    }
    commit_copies();
}

template <class Loads, class Shape> __device__ __forceinline__ void wide_loop(const Walk& walk, uint8_t* memory) {
    const uint32_t steps = walk.args.padded / STEP_GROUPS, lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
    float sums[Shape::COLUMNS / 8][4] = {};
    RowPair<Loads> loads, coming;
    let_next_start();
    coming.load(walk, row, 0);
    wait_for_earlier();
    start_columns<Shape>(walk, 0, memory);
    for (uint32_t chunk = 0; chunk < walk.args.padded / CHUNK; chunk++) {
#pragma unroll
        for (int j = 0; j < CHUNK; j++) {
            constexpr int UNIT = Loads::UNIT_GROUPS;
            const uint32_t unit = (chunk * CHUNK + j) / UNIT, step = (chunk * CHUNK + j) / STEP_GROUPS;
            if (j % STEP_GROUPS == 0) {
                wait_for_copies<0>();
                __syncthreads();
                if (step + 1 < steps) start_columns<Shape>(walk, step + 1, memory + (step + 1) % 2 * Shape::TILE);
            }
            if (j % UNIT == 0) {
                loads = coming;
                coming.load(walk, row, unit + 1);
            }
            const uint8_t* const tile = memory + step % 2 * Shape::TILE;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                uint32_t a[4];
                loads.decode(unit, j % UNIT, half, a);
#pragma unroll
                for (int n = 0; n < Shape::COLUMNS / 16; n++) {
                    const uint32_t column = 16 * n + lane / 16 * 8 + lane % 8, piece = j % STEP_GROUPS * 4 + 2 * half + lane / 8 % 2;
                    uint32_t b[4];
                    load_matrices_at(b, tile + column * ROW_BYTES + (piece ^ column % 8) * 16);
                    multiply_halves(sums[2 * n], a, b[0], b[1]);
                    multiply_halves(sums[2 * n + 1], a, b[2], b[3]);
                }
            }
        }
    }
    store_sums(walk, row, sums);
}
