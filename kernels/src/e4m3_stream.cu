// Products of e4m3 weights with up to eight columns of f32 activations, at the speed of memory, where a block has
// the shared memory of Hopper's and rows are a multiple of 16.
//
// What lies along rows is multiplied in segments. A block splits a segment's activations into two f16 each once
// (e4m3.cu tells how), and keeps them in shared memory for all its tiles of 16 rows. Two halves of eight warps take
// tiles in turn; the warps of a half divide the segment's chunks, and each streams its weights through a ring from
// one tile, and one segment, to the next without a pause:
//
//   for each segment:
//     its activations are split
//     for each tile, for each chunk of the warp's range: weights · what f16 has, and what it misses, of columns
//       the ranges' sums are added up in their order, and to those of the segments before
//
// Of up to four columns both parts are the eight columns of one product on tensor cores; of more there are two products,
// and two blocks split a half each, for both. All add up in the same order, so a column's bits do not depend on
// which others are there. Grid: a block per multiprocessor.
//
// µs on an H200, E4M3_128, weights from memory, and their share of a copy's 4,088 GB/s (2026-11-30):
//
// | rows × cols | 4096 × 4096 | 28672 × 4096 | 4096 × 14336 |
// | 1 column | 7.3, 58 % | 34.0, 87 % | 22.7, 65 % |
// | 8 columns | 10.5, 40 % | 37.4, 79 % | 34.9, 42 % |
#include "e4m3.cuh"
#include "stream_norm.cuh"
#include "warp_ring.cuh"

constexpr uint32_t SEGMENT_CHUNKS = 32;

struct E4m3StreamArgs {
    E4m3Args products;
    uint32_t tiles; // of 16 rows, of all parts
};

template <class T_, int COLUMNS_> struct E4m3Shape {
    using T = T_;
    static constexpr int COLUMNS = COLUMNS_, RANGES = 8, HALF = 32 * RANGES, THREADS = 2 * HALF;
    // Chunks on their way to a warp, and how many of these are asked for ahead of activations.
    static constexpr int DEPTH = COLUMNS == 4 ? 3 : 2, EARLY = 1;
    // Blocks that split columns for each other.
    static constexpr uint32_t CLUSTER = COLUMNS == 4 ? 1 : 2;
    // Floats from a column to the next, where no two lanes share a bank; and of a tile.
    static constexpr int STRIDE = 16 + 4, SUMS = RANGES * COLUMNS * STRIDE;
    // Threads that finish a tile.
    static constexpr int FINISHING = 16 * COLUMNS, TURNS = HALF / FINISHING;
    using Ring = WarpRing<T, DEPTH, THREADS / 32>;
};

// Chunks of a segment, and of these of this warp.
struct SegmentRange {
    uint32_t begin, all, first, count;

    __device__ __forceinline__ SegmentRange(const E4m3Args& args, uint32_t segment, uint32_t range, uint32_t ranges) {
        begin = segment * SEGMENT_CHUNKS, all = min(SEGMENT_CHUNKS, args.padded / CHUNK - begin);
        const uint32_t each = (all + ranges - 1) / ranges, start = min(range * each, all);
        first = begin + start, count = min(each, all - start);
    }
};

__device__ __forceinline__ uint32_t segments_of(const E4m3Args& args) { return (args.padded / CHUNK + SEGMENT_CHUNKS - 1) / SEGMENT_CHUNKS; }

// Blocks of a cluster meet: what they wrote to each other's shared memory before can be seen.
template <uint32_t CLUSTER> __device__ __forceinline__ void arrive_in_cluster() {
#if __CUDA_ARCH__ >= 900
    if constexpr (CLUSTER > 1) asm volatile("barrier.cluster.arrive.aligned;" ::: "memory");
#endif
}

template <uint32_t CLUSTER> __device__ __forceinline__ void wait_for_cluster() {
#if __CUDA_ARCH__ >= 900
    if constexpr (CLUSTER > 1) asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
#endif
}

template <uint32_t CLUSTER> __device__ __forceinline__ void meet_in_cluster() {
    if constexpr (CLUSTER == 1) __syncthreads();
    arrive_in_cluster<CLUSTER>();
    wait_for_cluster<CLUSTER>();
}

// Stores to the same place of each block of a cluster.
template <uint32_t CLUSTER> __device__ __forceinline__ void store_in_cluster(void* to, uint4 v) {
    if constexpr (CLUSTER == 1) *static_cast<uint4*>(to) = v;
#if __CUDA_ARCH__ >= 900
#pragma unroll
    for (uint32_t block = 0; block < CLUSTER && CLUSTER > 1; block++) {
        uint32_t there;
        asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(to)), "r"(block));
        asm volatile("st.shared::cluster.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(there), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
    }
#endif
}

template <uint32_t CLUSTER> __device__ __forceinline__ void store_in_cluster(float* to, float v) {
    if constexpr (CLUSTER == 1) *to = v;
#if __CUDA_ARCH__ >= 900
#pragma unroll
    for (uint32_t block = 0; block < CLUSTER && CLUSTER > 1; block++) {
        uint32_t there;
        asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(to)), "r"(block));
        asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(there), "f"(v) : "memory");
    }
#endif
}

// What a warp streams, and what is to be asked for next: chunks of its range of tiles `first_tile`, + `step`, ..., of
// one segment after the other.
template <class Shape> struct E4m3Weights {
    using T = typename Shape::T;
    typename Shape::Ring ring;
    uint32_t first_tile, step, range;
    uint32_t segment = 0, tile = 0, chunk = 0, left = 0;
    TileRows<T> next{};

    __device__ __forceinline__ E4m3Weights(const E4m3StreamArgs& args, const void* shared, uint32_t first_tile, uint32_t step)
        : ring(shared), first_tile(first_tile), step(step), range(threadIdx.x / 32 % Shape::RANGES), tile(first_tile) {
        aim(args);
    }

    // To this warp's chunks of the tile and segment, or of the segments after it.
    __device__ __forceinline__ void aim(const E4m3StreamArgs& args) {
        const E4m3Args& products = args.products;
        for (; first_tile < args.tiles && segment < segments_of(products); segment++, tile = first_tile) {
            const SegmentRange of(products, segment, range, Shape::RANGES);
            if (of.count == 0) continue;
            const Part& part = part_of(products.parts, products.n_parts, tile);
            next.aim(part.planes, products.padded / CHUNK, tile - part.first_block, of.first);
            chunk = of.first, left = of.count;
            return;
        }
    }

    // Asks for a chunk, to take the place of the one that was taken last.
    __device__ __forceinline__ void ask(const E4m3StreamArgs& args) {
        if (left > 0) {
            ring.copy(next, true);
            next.advance(++chunk);
            if (--left == 0) {
                tile += step;
                if (tile >= args.tiles) segment++, tile = first_tile;
                aim(args);
            }
        }
        commit_copies();
        ring.advance();
    }
};

// A segment of columns in shared memory, split: [chunk][pair of halves of groups][high, low][column][t], of each lane
// t what it multiplies of both halves; and the value of one of each chunk, [chunk][column].
template <class Shape> struct SplitColumns {
    static constexpr uint32_t LANES = 16, AT_ONCE = 4, CLUSTER = Shape::CLUSTER, APART = CLUSTER * (Shape::THREADS / LANES);
    uint8_t* shared;
    float* steps;
    uint32_t columns;

    // Where the parts of a column's pair of halves lie: high, and so far behind it low.
    __device__ __forceinline__ uint32_t place(uint32_t chunk, uint32_t pair, uint32_t column) const { return ((chunk * CHUNK + pair) * 2 * columns + column) * 64; }
    __device__ __forceinline__ uint32_t low() const { return columns * 64; }

    // All threads of the blocks of a cluster split `count` chunks from `first` on: 16 of them a chunk of a column. `then`
    // is done when the first activations are on their way, and before any are stored.
    template <class Then> __device__ __forceinline__ void fill(const E4m3Args& args, uint32_t first, uint32_t count, const Then& then) const {
        const uint32_t own = threadIdx.x % LANES, pair = own / 4, t = own % 4, all = count * columns;
        const uint32_t member = blockIdx.x % CLUSTER * (Shape::THREADS / LANES) + threadIdx.x / LANES;
        for (uint32_t start = 0; start < all; start += AT_ONCE * APART) {
            float4 v[AT_ONCE][2];
#pragma unroll
            for (uint32_t k = 0; k < AT_ONCE; k++) {
                const uint32_t index = start + k * APART + member;
                const uint32_t element = (first + index % count) * (CHUNK * GROUP) + pair * GROUP + 4 * t;
                const float* const x = args.x + static_cast<size_t>(index / count) * args.cols + element;
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const bool is_one = index < all && element + 16 * half < args.cols;
                    v[k][half] = is_one ? __ldcg(reinterpret_cast<const float4*>(x + 16 * half)) : make_float4(0, 0, 0, 0);
                }
            }
            if (start == 0) then();
#pragma unroll
            for (uint32_t k = 0; k < AT_ONCE; k++) {
                const uint32_t index = start + k * APART + member;
                split(v[k], index % count, pair, index / count, index < all);
            }
        }
    }

    __device__ __forceinline__ void split(const float4 v[2], uint32_t chunk, uint32_t pair, uint32_t column, bool stores) const {
        float largest = 0;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float4 of = v[half];
            largest = fmaxf(fmaxf(largest, fmaxf(fabsf(of.x), fabsf(of.y))), fmaxf(fabsf(of.z), fabsf(of.w)));
        }
#pragma unroll
        for (uint32_t distance = 1; distance < LANES; distance *= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, distance));
        if (!stores) return;
        const SplitUnit unit(largest);
        uint32_t high[4], low_part[4];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            unit.split(v[half].x, v[half].z, high[2 * half], low_part[2 * half]);
            unit.split(v[half].y, v[half].w, high[2 * half + 1], low_part[2 * half + 1]);
        }
        uint8_t* const to = shared + place(chunk, pair, column) + threadIdx.x % 4 * 16;
        store_in_cluster<CLUSTER>(to, make_uint4(high[0], high[1], high[2], high[3]));
        store_in_cluster<CLUSTER>(to + low(), make_uint4(low_part[0], low_part[1], low_part[2], low_part[3]));
        if (threadIdx.x % LANES == 0) store_in_cluster<CLUSTER>(steps + chunk * columns + column, unit.step);
    }
};

// What a lane reads of columns: of a product with eight columns those of number g, or with four both parts of these; and
// the values of one of those that it has sums of.
template <class Shape> struct LaneColumns {
    static constexpr int PARTS_APART = Shape::COLUMNS == 8 ? 2 : 1;
    uint32_t words, low, each, steps[2], columns;

    __device__ __forceinline__ explicit LaneColumns(const SplitColumns<Shape>& of) : columns(of.columns) {
        const uint32_t g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, last = columns - 1;
        low = of.low(), each = 2 * low;
        words = shared_address(of.shared) + min(g % Shape::COLUMNS, last) * 64 + t * 16 + (g < Shape::COLUMNS ? 0 : low);
#pragma unroll
        for (uint32_t i = 0; i < 2; i++) steps[i] = shared_address(of.steps) + min((2 * t + i) % Shape::COLUMNS, last) * 4;
        asm volatile("" : "+r"(words), "+r"(steps[0]), "+r"(steps[1]));
    }

    __device__ __forceinline__ void load(uint32_t chunk, uint32_t pair, uint32_t x[PARTS_APART][4]) const {
        const uint32_t at = words + (chunk * CHUNK + pair) * each;
#pragma unroll
        for (int part = 0; part < PARTS_APART; part++) load_words<16>(SharedAt{at + part * low}, x[part]);
    }

    __device__ __forceinline__ float step(uint32_t chunk, int i) const {
        uint32_t bits;
        load_words<4>(SharedAt{steps[i] + chunk * columns * 4}, &bits);
        return __uint_as_float(bits);
    }
};

// Sums of 16 rows, as tensor cores leave them: of both parts, or of eight columns that are both parts of four.
template <class Shape> struct SplitSums {
    static constexpr int PARTS_APART = LaneColumns<Shape>::PARTS_APART;
    float of[PARTS_APART][4] = {};

    // Adds a chunk, number `chunk` of its segment.
    __device__ __forceinline__ void add(const Raw raw[2], const uint32_t scales[2][4], const LaneColumns<Shape>& x, uint32_t chunk) {
        using T = typename Shape::T;
        constexpr int SHARE = CHUNK / T::COUNT; // pairs of halves that share a scale
        const float steps[2] = {x.step(chunk, 0), x.step(chunk, 1)};
        float d[PARTS_APART][4];
#pragma unroll
        for (int pair = 0; pair < CHUNK; pair++) {
            uint32_t words[PARTS_APART][4];
            x.load(chunk, pair, words);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                __half2 upper[2], lower[2];
                split_e4m3(raw[0].quants[2 * pair + half], upper);
                split_e4m3(raw[1].quants[2 * pair + half], lower);
                const uint32_t a[4] = {bits_of(upper[0]), bits_of(lower[0]), bits_of(upper[1]), bits_of(lower[1])};
#pragma unroll
                for (int part = 0; part < PARTS_APART; part++) {
                    if (pair % SHARE == 0 && half == 0) d[part][0] = d[part][1] = d[part][2] = d[part][3] = 0;
                    multiply_halves(d[part], a, words[part][2 * half], words[part][2 * half + 1]);
                }
            }
            if (pair % SHARE != SHARE - 1) continue;
#pragma unroll
            for (int part = 0; part < PARTS_APART; part++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    Scales scale;
                    T::scales(scales[i / 2], pair, scale);
                    of[part][i] = __fmaf_rn(d[part][i] * steps[i % 2], scale.scale[0], of[part][i]);
                }
        }
    }

    // Keeps both parts' sums where those of all ranges are added up.
    __device__ __forceinline__ void keep(float* sums) const {
        const uint32_t lane = threadIdx.x % 32, range = threadIdx.x / 32 % Shape::RANGES;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint32_t column = lane % 4 * 2 + i % 2;
            const float sum = of[0][i] + (PARTS_APART == 2 ? of[PARTS_APART - 1][i] : __shfl_xor_sync(~0u, of[0][i], 2));
            if (column < Shape::COLUMNS) sums[(range * Shape::COLUMNS + column) * Shape::STRIDE + i / 2 * 8 + lane / 4] = sum;
        }
    }
};

// Stores a tile, or adds it to what earlier segments have left; `turn` counts those of this half of the block in a segment:
// the same thread has an element in all of them.
template <class Shape>
__device__ __forceinline__ void finish_e4m3_tile(const E4m3StreamArgs& args, const float* sums, uint32_t tile, uint32_t turn, uint32_t segment) {
    if (threadIdx.x % Shape::HALF / Shape::FINISHING != turn % Shape::TURNS) return;
    const E4m3Args& products = args.products;
    const uint32_t index = threadIdx.x % Shape::FINISHING, column = index / 16, row = index % 16;
    const Part& part = part_of(products.parts, products.n_parts, tile);
    const uint32_t at = (tile - part.first_block) * 16 + row;
    if (column >= products.columns) return;
    float sum = sums[column * Shape::STRIDE + row];
#pragma unroll
    for (int range = 1; range < Shape::RANGES; range++) sum += sums[(range * Shape::COLUMNS + column) * Shape::STRIDE + row];
    float* const out = part.out + static_cast<size_t>(column) * part.stride + at;
    if (segment > 0) sum = *out + sum;
    *out = sum + (part.bias && segment + 1 == segments_of(products) ? part.bias[at] : 0.0f);
}

template <class T, int COLUMNS> __device__ __forceinline__ void stream_e4m3(const E4m3StreamArgs& args) {
    using Shape = E4m3Shape<T, COLUMNS>;
    extern __shared__ __align__(128) uint8_t e4m3_shared[];
    float* const sums = reinterpret_cast<float*>(e4m3_shared + Shape::Ring::BYTES);
    arrive_in_cluster<Shape::CLUSTER>();
    let_next_start();
    const E4m3Args& products = args.products;
    const uint32_t half = threadIdx.x / Shape::HALF, first_tile = blockIdx.x + half * gridDim.x, step = 2 * gridDim.x;
    E4m3Weights<Shape> weights(args, e4m3_shared, first_tile, step);
#pragma unroll 1
    for (int i = 0; i < Shape::EARLY; i++) weights.ask(args);
    wait_for_earlier();
    float* const steps = sums + 4 * Shape::SUMS;
    const SplitColumns<Shape> columns{reinterpret_cast<uint8_t*>(steps + SEGMENT_CHUNKS * COLUMNS), steps, products.columns};
    const LaneColumns<Shape> x(columns);
    for (uint32_t segment = 0, all_turns = 0; segment < segments_of(products); segment++) {
        const SegmentRange own(products, segment, weights.range, Shape::RANGES);
        // All are done with the segment before, or have begun.
        if (segment > 0) meet_in_cluster<Shape::CLUSTER>();
        columns.fill(products, own.begin, own.all, [&] {
            if (segment > 0) return;
#pragma unroll 1
            for (int i = Shape::EARLY; i < Shape::DEPTH; i++) weights.ask(args);
            wait_for_cluster<Shape::CLUSTER>();
        });
        meet_in_cluster<Shape::CLUSTER>();
        for (uint32_t tile = first_tile, turn = 0; tile < args.tiles; tile += step, turn++, all_turns++) {
            SplitSums<Shape> acc;
            for (uint32_t chunk = own.first - own.begin; chunk < own.first - own.begin + own.count; chunk++) {
                Raw raw[2];
                uint32_t scales[2][4];
                wait_for_copies<Shape::DEPTH - 1>();
                __syncwarp();
                weights.ring.take(raw);
#pragma unroll
                for (int k = 0; k < 2; k++) T::load_scales(weights.ring.scales() + (threadIdx.x % 32 / 4 + 8 * k) * UNIT_BYTES<T>, 0, scales[k]);
                __syncwarp();
                weights.ask(args);
                acc.add(raw, scales, x, chunk);
            }
            // Those of the turn before may still be read.
            float* const kept = sums + (all_turns % 2 * 2 + half) * Shape::SUMS;
            acc.keep(kept);
            meet_some<Shape::HALF>(OF_HALF + half);
            finish_e4m3_tile<Shape>(args, kept, tile, turn, segment);
        }
    }
}

#define E4M3_STREAM_KERNEL(kernel, T, columns)                                                                        \
    extern "C" __global__ void __launch_bounds__(E4m3Shape<T, columns>::THREADS, 1) kernel(const __grid_constant__ E4m3StreamArgs args) { \
        stream_e4m3<T, columns>(args);                                                                                \
    }
#define E4M3_STREAM(name, T)                      \
    E4M3_STREAM_KERNEL(stream_##name##_4, T, 4)   \
    E4M3_STREAM_KERNEL(stream_##name##_8, T, 8)
FOR_E4M3(E4M3_STREAM)
