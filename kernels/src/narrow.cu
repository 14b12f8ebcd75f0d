// Products of quantised weights with a few columns of 8-bit activations, at the speed of memory. What lies along
// rows is divided into RANGES ranges of chunks; a block has RANGES warps for each MTILES · 16 rows. For each
// chunk of a range:
//
//   later chunks of weights and activations are asked for
//   for each group: 16 rows, decoded in registers, times 8 columns at a time on tensor cores
//
// A single column stands in for all eight: each lane then adds up its own sum alone. Within a range, groups are
// added up in their order, of up to eight columns in four sums; then the ranges' sums are, in theirs. Kernels for
// up to 8 columns have eight ranges, those for up to 32 four, and that for more two. So a column's bits do not depend
// on how many columns there are among up to 8, up to 32, and more.
//
// Fewer ranges for more columns keep a chunk of all ranges' activations at 20 KiB, so that two chunks fit where a
// block has 99 KiB of shared memory, of types with up to 24 bytes a lane where it has 64.
#include "narrow.cuh"

// Until all lanes of the warps with range `range` are here.
template <int RANGES> __device__ __forceinline__ void meet(uint32_t range) {
    if constexpr (ROW_WARPS<RANGES> == 1) {
        __syncwarp();
    } else {
        asm volatile("bar.sync %0, %1;" ::"r"(1 + range), "n"(32 * ROW_WARPS<RANGES>) : "memory");
    }
}

template <class T, int RANGES, int MTILES, int TILES, int DEPTH, bool SINGLE> __device__ __forceinline__ void narrow(const ProductArgs& args) {
    using Weights = Stream<T, RANGES, 2 * MTILES, DEPTH>;
    using X = Columns<ROW_WARPS<RANGES>, TILES, SINGLE>;
    extern __shared__ __align__(128) uint8_t narrow_ring[];
    const Part& part = part_of(args.parts, args.n_parts, blockIdx.x);
    const uint32_t lane = threadIdx.x % 32, range = threadIdx.x / 32 % RANGES, row_warp = threadIdx.x / 32 / RANGES;
    const uint32_t first_row = (blockIdx.x - part.first_block) * (16 * MTILES * ROW_WARPS<RANGES>), first = blockIdx.y * (SINGLE ? 1 : TILES * 8);
    Weights stream(args, part, narrow_ring, range, first_row + row_warp * (16 * MTILES) + lane / 4);
    let_next_start();
    stream.start();
    wait_for_earlier();
    const X x(args, narrow_ring + Weights::BYTES + range * DEPTH * X::SLOT, first, row_warp * 32 + lane);
    const uint32_t chunks = args.padded / CHUNK, passes = args.passes, steps = stream.count * passes;
    // Chunks of activations: of both passes in turn.
    const auto ask = [&](uint32_t slot, uint32_t step) { x.copy(slot, passes == 1 ? stream.first + step : step % 2 * chunks + stream.first + step / 2); };
#pragma unroll
    for (uint32_t step = 0; step < DEPTH; step++) {
        if (step < steps) ask(step, step);
        commit_copies();
    }
    TileSums<MTILES, TILES, TILES == 1> acc;
    Raw raw[2 * MTILES];
    float factors[2 * MTILES][CHUNK][Counts<T>::ALL];
    uint32_t slot = 0, weights_slot = 0;
    for (uint32_t step = 0; step < steps; step++) {
        wait_for_copies<DEPTH - 1>();
        meet<RANGES>(range);
        const uint32_t index = passes == 1 ? step : step / 2;
        const bool is_last_pass = passes == 1 || step % 2;
        if (passes == 1 || step % 2 == 0) {
            stream.take(weights_slot, raw);
#pragma unroll
            for (int k = 0; k < 2 * MTILES; k++) stream.scales[k].factors(stream.first + index, factors[k]);
            stream.load_scales_of(index + 1);
        }
        multiply_slot<T, MTILES, TILES, SINGLE>(raw, factors, x, slot, acc);
        if (is_last_pass) acc.turn();
        meet<RANGES>(range);
        if (step + DEPTH < steps) ask(slot, step + DEPTH);
        if (is_last_pass) {
            if (index + DEPTH < stream.count) stream.ring.copy(weights_slot, stream.rows, index + DEPTH);
            weights_slot = weights_slot + 1 == DEPTH ? 0 : weights_slot + 1;
        }
        commit_copies();
        slot = slot + 1 == DEPTH ? 0 : slot + 1;
    }
    add_ranges<RANGES, MTILES, TILES, SINGLE>(acc, narrow_ring, [&](uint32_t column, uint32_t row, float sum) {
        const uint32_t at = first + column;
        if (first_row + row >= part.rows || at >= args.columns) return;
        const float bias = part.bias ? part.bias[first_row + row] : 0.0f;
        part.out[static_cast<size_t>(at) * part.stride + first_row + row] = sum + bias;
    });
}

// Blocks of a multiprocessor that leave registers enough.
template <class T> constexpr int NARROW_BLOCKS = T::HALVES || T::MIN != Min::None ? 2 : 3;

template <class T> constexpr int SINGLE_DEPTH = LANE_BYTES<T> > 16 ? 3 : 4;
// Tiles of rows of a warp with up to eight columns.
template <class T> constexpr int FEW_MTILES = LANE_BYTES<T> > 20 ? 1 : 2;

#define NARROW_KERNEL(name, blocks, ...)                                                                    \
    extern "C" __global__ void __launch_bounds__(NARROW_WARPS * 32, blocks) name(const __grid_constant__ ProductArgs args) { \
        narrow<__VA_ARGS__>(args);                                                                          \
    }
#define NARROW(name, T)                                                              \
    NARROW_KERNEL(narrow_##name##_0, NARROW_BLOCKS<T>, T, 8, 1, 1, SINGLE_DEPTH<T>, true) \
    NARROW_KERNEL(narrow_##name##_1, 2, T, 8, FEW_MTILES<T>, 1, 2, false)            \
    NARROW_KERNEL(narrow_##name##_2, 2, T, 4, 1, 2, 2, false)                        \
    NARROW_KERNEL(narrow_##name##_4, 1, T, 4, 1, 4, 2, false)                        \
    NARROW_KERNEL(narrow_##name##_8, 1, T, 2, 1, 8, 2, false)
FOR_QUANTIZED(NARROW)
