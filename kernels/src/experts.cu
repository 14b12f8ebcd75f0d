// Products of the experts of a step with the tokens that go through them. An expert is some rows of a matrix that has
// the rows of all experts; its columns are those that the list of its pairs names (route.cu), brought together as they
// come to shared memory. Grid: blocks of rows of one or two matrices × slots, of which slot i has the i-th expert with
// tokens, so that one token's experts fill the GPU; slots without one end at once.
//
// Steps with activations in 8 bits (expert_narrow): as narrow.cu, up to 8 columns at a time. Rows of up to 32 chunks
// have two ranges, so that a warp has some chunks to stream, and a block 64 of them; longer ones eight, and 16 rows.
//
// Steps with f16 activations, on Hopper with few columns for each expert (expert_wide; else expert_tiles.cu): 64 rows and
// up to 16 columns at a time, or 128 and 64, a warp for each 16 rows, in chunks of 128 elements:
//
//   activations and weights of a later chunk are asked for
//   for each 16 elements: weights, decoded in registers, times 16 columns at a time on tensor cores
//
// Float weights meet f32 activations in both (expert_floats), a warp a row; and e4m3 weights in the first (expert_e4m3), as
// in e4m3.cu.
//
// A sum has its elements in one order, however many columns an expert has: a token's bits do not depend on them.
//
// µs on an H200 for gate and up, and for down, Q4_0, weights from memory; and GB/s of the experts that have tokens:
//
// | tokens                 | 1                  | 8                    | 64                     | 128                    |
// | 8 of 128, 768 × 2048   | 9.0, 5.7; 1600     | 39, 26; 2400, 1800   | 101, 56; 2200, 2000    | 109, 60; 2100, 1900    |
// | 2 of 8, 14336 × 4096   | 48, 24; 2800       | 159, 80; 3000        | 325, 181; 1600, 1500   | 407, 229; 1300, 1150   |
#include "e4m3.cuh"
#include "experts.cuh"
#include "narrow.cuh"

struct ExpertNarrowArgs {
    ProductArgs product;
    Experts experts;
};

// Up to eight columns from anywhere, as Columns has them; those beyond `count` are whatever is there, which no other
// column sees.
struct GatheredColumns : Columns<1, 1, false> {
    const uint4* words_from[2];
    const int4* scales_from;
    uint32_t count;

    __device__ __forceinline__ GatheredColumns(const ProductArgs& args, uint8_t* shared, const ExpertWalk& walk, uint32_t first)
        : Columns<1, 1, false>(args, shared, 0, threadIdx.x % 32), count(min(walk.count - first, COUNT)) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const uint32_t column = 4 * i + member / 8;
            words_from[i] = words - member / 8 * 8 + (column < count ? walk.column(first + column) * 8 : 0);
        }
        const uint32_t column = member / 2;
        scales_from = scales - column * 2 + (column < count ? walk.column(first + column) * 2 : 0);
    }

    __device__ __forceinline__ void copy(uint32_t slot, uint32_t chunk) const {
        const uint32_t piece = member % 8, pair = member % 2, of_scales = member / 2;
        const size_t columns = static_cast<size_t>(chunk) * stride;
        uint8_t* const to = ring + slot * SLOT;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const uint32_t column = 4 * i + member / 8;
            if (column < count) copy_16_bytes(to + column * 128 + (piece ^ column % 2 * 4) * 16, words_from[i] + columns * 8);
        }
        if (of_scales < count) copy_16_bytes(to + WORDS + ((pair * 2 + of_scales % 2) * HALF + of_scales / 2) * 16, scales_from + columns * 2);
    }
};

// acc += an expert's 16 rows times some columns, over a range.
template <class T, int DEPTH, class Weights> __device__ __forceinline__ void multiply_range(Weights& stream, const GatheredColumns& x, TileSums<1, 1, false>& acc) {
    stream.start();
#pragma unroll
    for (uint32_t slot = 0; slot < DEPTH; slot++) {
        if (slot < stream.count) x.copy(slot, stream.first + slot);
        commit_copies();
    }
    uint32_t slot = 0;
    for (uint32_t index = 0; index < stream.count; index++) {
        wait_for_copies<DEPTH - 1>();
        __syncwarp();
        Raw raw[2];
        float factors[2][CHUNK][Counts<T>::ALL];
        stream.take(slot, raw);
#pragma unroll
        for (int k = 0; k < 2; k++) stream.scales[k].factors(stream.first + index, factors[k]);
        stream.load_scales_of(index + 1);
        multiply_slot<T, 1, 1, false>(raw, factors, x, slot, acc);
        __syncwarp();
        if (index + DEPTH < stream.count) {
            x.copy(slot, stream.first + index + DEPTH);
            stream.ring.copy(slot, stream.rows, index + DEPTH);
        }
        commit_copies();
        slot = slot + 1 == DEPTH ? 0 : slot + 1;
    }
}

template <class T, int RANGES> __device__ __forceinline__ void expert_narrow(const ExpertNarrowArgs& args) {
    constexpr int ROWS = 16 * ROW_WARPS<RANGES>, DEPTH = LANE_BYTES<T> > 16 ? 2 : 3;
    using Weights = Stream<T, RANGES, 2, DEPTH>;
    extern __shared__ __align__(128) uint8_t expert_ring[];
    begin();
    ExpertSlot slot;
    if (!args.experts.routes.take(blockIdx.y, slot)) return;
    const ExpertWalk walk(args.experts, slot);
    const Part& part = args.product.parts[blockIdx.x / args.experts.row_blocks];
    const uint32_t first_row = blockIdx.x % args.experts.row_blocks * ROWS, warp = threadIdx.x / 32, range = warp % RANGES;
    Weights stream(args.product, part, expert_ring, range, walk.first_row + first_row + warp / RANGES * 16 + threadIdx.x % 32 / 4);
    for (uint32_t first = 0; first < walk.count; first += 8) {
        const GatheredColumns x(args.product, expert_ring + Weights::BYTES + warp * DEPTH * GatheredColumns::SLOT, walk, first);
        TileSums<1, 1, false> acc;
        multiply_range<T, DEPTH>(stream, x, acc);
        add_ranges<RANGES, 1, 1, false>(acc, expert_ring, [&](uint32_t column, uint32_t row, float sum) {
            const uint32_t at = first_row + row;
            if (column < x.count && at < args.experts.rows) part.out[static_cast<size_t>(walk.pairs[first + column]) * part.stride + at] = sum;
        });
        __syncthreads();
    }
}

constexpr int EXPERT_WARPS = 8, EXPERT_THREADS = 32 * EXPERT_WARPS;

// Columns of a tile, warps of a block, and how many chunks of activations and weights have places in shared memory.
template <class T, int COLUMNS_> struct ExpertShape {
    static constexpr int COLUMNS = COLUMNS_, WARPS = COLUMNS == 16 ? 4 : 8, THREADS = 32 * WARPS, DEPTH = COLUMNS == 16 ? 3 : 2;
    static constexpr int STEP = COLUMNS * ROW_BYTES, X_BYTES = CHUNK / STEP_GROUPS * STEP;
    // Blocks of a multiprocessor that leave registers enough.
    static constexpr int BLOCKS = COLUMNS == 64 ? 2 : T::HALVES ? 4 : 6;
    using Ring = LaneRing<T, 2, DEPTH, THREADS>;
};

// This thread's part of the activations of a tile of columns: a piece of each of some columns.
template <class Shape> struct GatheredHalves {
    static constexpr int EACH = Shape::COLUMNS * 8 / Shape::THREADS;

    const __half* from[EACH];
    uint32_t to[EACH], columns;
    bool is_there[EACH];

    __device__ __forceinline__ GatheredHalves(const WideArgs& args, const ExpertWalk& walk, uint32_t first) : columns(args.columns) {
        const uint32_t piece = threadIdx.x % 8;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const uint32_t column = (i * Shape::THREADS + threadIdx.x) / 8;
            is_there[i] = first + column < walk.count;
            const uint32_t source = is_there[i] ? walk.column(first + column) : 0;
            from[i] = args.x + static_cast<size_t>(source) * STEP_ELEMENTS + (piece ^ source % 8) * 8;
            to[i] = column * ROW_BYTES + (piece ^ column % 8) * 16;
        }
    }

    __device__ __forceinline__ void copy(uint8_t* slot, uint32_t chunk) const {
#pragma unroll
        for (int step = 0; step < CHUNK / STEP_GROUPS; step++) {
            const size_t offset = static_cast<size_t>(chunk * (CHUNK / STEP_GROUPS) + step) * columns * STEP_ELEMENTS;
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                if (is_there[i]) copy_16_bytes(slot + step * Shape::STEP + to[i], from[i] + offset);
            }
        }
    }
};

// sums += a chunk of 16 rows times the first `count` columns, in sixteens.
template <class T, class Shape> __device__ __forceinline__ void multiply_chunk(const WideLoads<T> rows[2], uint32_t chunk, const uint8_t* x, uint32_t count,
                                                                               float sums[Shape::COLUMNS / 8][4]) {
    const uint32_t lane = threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < CHUNK; j++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const uint2 upper = rows[0].decode(chunk, j, half), lower = rows[1].decode(chunk, j, half);
            const uint32_t a[4] = {upper.x, lower.x, upper.y, lower.y};
            const uint8_t* const step = x + j / STEP_GROUPS * Shape::STEP;
            const uint32_t piece = j % STEP_GROUPS * 4 + 2 * half + lane / 8 % 2;
#pragma unroll
            for (int n = 0; n < Shape::COLUMNS / 16; n++) {
                if (16 * n >= count) break;
                const uint32_t column = 16 * n + lane / 16 * 8 + lane % 8;
                uint32_t b[4];
                load_matrices_at(b, step + column * ROW_BYTES + (piece ^ column % 8) * 16);
                multiply_halves(sums[2 * n], a, b[0], b[1]);
                multiply_halves(sums[2 * n + 1], a, b[2], b[3]);
            }
        }
}

// What was read of shared memory is read before what is asked for afterwards comes there.
__device__ __forceinline__ void taken_before_copies() { asm volatile("" ::: "memory"); }

// A tile of columns from `first` on, times the rows of which this lane has `row` and `row` + 8.
template <class T, class Shape>
__device__ __forceinline__ void expert_tile(const ExpertWideArgs& args, const ExpertWalk& walk, const Part& part, uint32_t row, uint32_t first) {
    using Ring = typename Shape::Ring;
    constexpr int DEPTH = Shape::DEPTH;
    extern __shared__ __align__(128) uint8_t expert_tiles[];
    uint8_t* const x_tiles = expert_tiles + Ring::BYTES;
    const uint32_t chunks = args.product.padded / CHUNK, count = min(walk.count - first, Shape::COLUMNS);
    const GatheredHalves<Shape> x(args.product, walk, first);
    const Ring ring{expert_tiles};
    LaneRow<T> rows[2];
    ScaleRow<T> scales[2];
    WideLoads<T> own[2], coming[2];
#pragma unroll
    for (int k = 0; k < 2; k++) {
        const uint32_t at = min(walk.first_row + row + 8 * k, part.rows - 1);
        rows[k] = LaneRow<T>(part.planes, part.rows, chunks, at, 0);
        scales[k] = ScaleRow<T>(part.planes, part.rows, chunks, at);
        coming[k].scales.load(scales[k], 0);
    }
    const auto ask_for_x = [&](uint32_t slot, uint32_t chunk) {
        if (chunk < chunks) x.copy(x_tiles + slot * Shape::X_BYTES, chunk);
        commit_copies();
    };
    const auto ask_for_weights = [&](uint32_t slot, uint32_t chunk) {
        if (chunk < chunks) ring.copy(slot, rows, chunk);
        commit_copies();
    };
#pragma unroll
    for (uint32_t slot = 0; slot < DEPTH - 1; slot++) {
        ask_for_x(slot, slot);
        ask_for_weights(slot, slot);
    }
    ask_for_weights(DEPTH - 1, DEPTH - 1);
    float sums[Shape::COLUMNS / 8][4] = {};
    uint32_t slot = 0;
    for (uint32_t chunk = 0; chunk < chunks; chunk++) {
        // Behind those of this chunk come weights of the next, then activations and weights of later ones.
        wait_for_copies<2 * DEPTH - 3>();
        // All warps are done with the slot before.
        __syncthreads();
        ask_for_x(slot == 0 ? DEPTH - 1 : slot - 1, chunk + DEPTH - 1);
#pragma unroll
        for (int k = 0; k < 2; k++) {
            own[k].scales = coming[k].scales;
            coming[k].scales.load(scales[k], min(chunk + 1, chunks - 1));
            ring.take(slot, k, own[k].raw);
        }
        taken_before_copies();
        ask_for_weights(slot, chunk + DEPTH);
        multiply_chunk<T, Shape>(own, chunk, x_tiles + slot * Shape::X_BYTES, count, sums);
        slot = slot + 1 == DEPTH ? 0 : slot + 1;
    }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < Shape::COLUMNS / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint32_t column = 8 * n + threadIdx.x % 4 * 2 + i % 2, at = row + i / 2 * 8;
            if (column < count && at < args.experts.rows) part.out[static_cast<size_t>(walk.pairs[first + column]) * part.stride + at] = sums[n][i] * SUM_UNIT;
        }
}

// Grid: beside rows and slots, tiles of columns that are taken in turn.
template <class T, int COLUMNS> __device__ __forceinline__ void expert_wide(const ExpertWideArgs& args) {
    begin();
    ExpertSlot slot;
    if (!args.experts.routes.take(blockIdx.y, slot)) return;
    const ExpertWalk walk(args.experts, slot);
    const Part& part = args.product.parts[blockIdx.x / args.experts.row_blocks];
    using Shape = ExpertShape<T, COLUMNS>;
    const uint32_t row = (blockIdx.x % args.experts.row_blocks * Shape::WARPS + threadIdx.x / 32) * 16 + threadIdx.x % 32 / 4;
    for (uint32_t first = blockIdx.z * COLUMNS; first < walk.count; first += gridDim.z * COLUMNS) {
        expert_tile<T, Shape>(args, walk, part, row, first);
    }
}

struct ExpertE4m3Args {
    E4m3Args product;
    Experts experts;
};

template <class T> __device__ __forceinline__ void expert_e4m3(const ExpertE4m3Args& args) {
    begin();
    ExpertSlot slot;
    if (!args.experts.routes.take(blockIdx.y, slot)) return;
    const ExpertWalk walk(args.experts, slot);
    const E4m3Args& product = args.product;
    const Part& part = product.parts[blockIdx.x / args.experts.row_blocks];
    const uint32_t first_row = blockIdx.x % args.experts.row_blocks * E4M3_ROWS, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const E4m3Range range(product);
    E4m3Rows<T> coming(part, product.padded / CHUNK, walk.first_row + first_row + g, range.first);
    for (uint32_t first = 0; first < walk.count; first += E4M3_COLUMNS) {
        if (range.count > 0) coming.load(range.first, 0);
        const float* const x = product.x + static_cast<size_t>(walk.column(min(first + g, walk.count - 1))) * product.cols + 4 * t;
        float acc[E4M3_TILES][4] = {};
        multiply_e4m3<T>(product, coming, range.first, range.count, x, acc);
        add_e4m3_ranges(acc, [&](uint32_t column, uint32_t row, float sum) {
            const uint32_t at = first_row + row;
            if (first + column < walk.count && at < args.experts.rows) part.out[static_cast<size_t>(walk.pairs[first + column]) * part.stride + at] = sum;
        });
        __syncthreads();
    }
}

struct ExpertFloatArgs {
    const uint8_t* weights[2]; // [experts · rows][cols]
    float* out[2];             // [pairs][rows]
    const float* x;            // [columns][cols]
    Experts experts;
    uint32_t cols, unused;
};

template <class T> __device__ __forceinline__ void expert_floats(const ExpertFloatArgs& args) {
    begin();
    ExpertSlot slot;
    if (!args.experts.routes.take(blockIdx.y, slot)) return;
    const ExpertWalk walk(args.experts, slot);
    const uint32_t matrix = blockIdx.x / args.experts.row_blocks, cols = args.cols;
    const uint32_t row = blockIdx.x % args.experts.row_blocks * EXPERT_WARPS + threadIdx.x / 32;
    if (row >= args.experts.rows) return;
    const uint8_t* const weights = args.weights[matrix] + static_cast<size_t>(walk.first_row + row) * cols * T::BYTES;
    for (uint32_t index = 0; index < walk.count; index++) {
        const float* const x = args.x + static_cast<size_t>(walk.column(index)) * cols;
        float acc = 0;
        for (uint32_t k = threadIdx.x % 32 * 8; k < cols; k += 256) {
            float w[8];
            T::load(weights + static_cast<size_t>(k) * T::BYTES, w);
            const float4 a = *reinterpret_cast<const float4*>(x + k), b = *reinterpret_cast<const float4*>(x + k + 4);
            const float v[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
            for (int i = 0; i < 8; i++) acc = __fmaf_rn(w[i], v[i], acc);
        }
        acc = warp_sum(acc);
        if (threadIdx.x % 32 == 0) args.out[matrix][static_cast<size_t>(walk.pairs[index]) * args.experts.rows + row] = acc;
    }
}

struct SumArgs {
    const float* products; // [tokens · n_used][cols]
    const float* weights;  // [tokens][n_used]
    float* out;            // [tokens][cols]
    uint32_t cols, n_used;
};

// Adds up what a token's experts made, by ascending expert: four elements a thread. Grid: tokens × parts of a row.
extern "C" __global__ void __launch_bounds__(EXPERT_THREADS) sum_experts(const __grid_constant__ SumArgs args) {
    const uint32_t token = blockIdx.x, i = 4 * (blockIdx.y * EXPERT_THREADS + threadIdx.x);
    begin();
    if (i >= args.cols) return;
    float4 sum = make_float4(0, 0, 0, 0);
    for (uint32_t place = 0; place < args.n_used; place++) {
        const size_t pair = static_cast<size_t>(token) * args.n_used + place;
        const float weight = args.weights[pair];
        const float4 v = *reinterpret_cast<const float4*>(args.products + pair * args.cols + i);
        sum.x += __fmul_rn(v.x, weight), sum.y += __fmul_rn(v.y, weight);
        sum.z += __fmul_rn(v.z, weight), sum.w += __fmul_rn(v.w, weight);
    }
    *reinterpret_cast<float4*>(args.out + static_cast<size_t>(token) * args.cols + i) = sum;
}

#define EXPERT_KERNEL(kernel, Args, threads, blocks, ...)                                                            \
    extern "C" __global__ void __launch_bounds__(threads, blocks) kernel(const __grid_constant__ Args args) { __VA_ARGS__(args); }
#define EXPERT_WIDE(kernel, T, columns) \
    EXPERT_KERNEL(kernel, ExpertWideArgs, (ExpertShape<T, columns>::THREADS), (ExpertShape<T, columns>::BLOCKS), expert_wide<T, columns>)
#define EXPERT_PRODUCTS(name, T)                                                                     \
    EXPERT_KERNEL(expert_narrow_##name##_2, ExpertNarrowArgs, EXPERT_THREADS, 2, expert_narrow<T, 2>) \
    EXPERT_KERNEL(expert_narrow_##name##_8, ExpertNarrowArgs, EXPERT_THREADS, 2, expert_narrow<T, 8>) \
    EXPERT_WIDE(expert_wide_##name##_16, T, 16)                                                      \
    EXPERT_WIDE(expert_wide_##name##_64, T, 64)
FOR_QUANTIZED(EXPERT_PRODUCTS)
EXPERT_KERNEL(expert_floats_f32, ExpertFloatArgs, EXPERT_THREADS, 1, expert_floats<F32>)
EXPERT_KERNEL(expert_floats_f16, ExpertFloatArgs, EXPERT_THREADS, 1, expert_floats<F16>)
EXPERT_KERNEL(expert_floats_bf16, ExpertFloatArgs, EXPERT_THREADS, 1, expert_floats<Bf16>)
#define EXPERT_E4M3(name, T)                                                                                     \
    EXPERT_KERNEL(expert_##name, ExpertE4m3Args, 32 * E4M3_RANGES, T::COUNT == 1 ? 2 : 1, expert_e4m3<T>)         \
    EXPERT_WIDE(expert_wide_##name##_16, T, 16)                                                                  \
    EXPERT_WIDE(expert_wide_##name##_64, T, 64)
FOR_E4M3(EXPERT_E4M3)
