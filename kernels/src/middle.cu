// Products of quantised weights with up to 128 columns on Hopper, at the speed of memory or of decoding:
// out[column][row] = Σ weight[row][k] · x[column][k] (+ bias[row]), where weights and activations meet as f16 with
// sums in f32.
//
// A block has 128 rows and all columns; two warpgroups stream weights through rings in shared memory, and decode
// them while tensor cores multiply the ones before. One thread asks for activations, tiles ahead. The blocks of a
// cluster, which are next to each other in x, divide what lies along rows, and add up their sums in their order:
// how many they are follows from the matrix alone, so a column's bits do not depend on which others are there.
// Grid: blocks of a cluster, rows / 128.
//
// µs on an H200, Q4_0, weights from memory:
//
// | rows × cols | 6144 × 4096 | 4096 × 4096 | 28672 × 4096 | 4096 × 14336 |
// | 32 columns | 13.0 | 14.3 | 43.0 | 36.5 |
// | 64 columns | 15.4 | 17.0 | 48.2 | 41.6 |
// | 128 columns | 25.9 | 26.3 | 75.6 | 59.8 |
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#include "cluster.cuh"
#include "ring.cuh"
#include "wgmma.cuh"

template <class T, int COLUMNS_> struct MiddleShape {
    static constexpr int WARPGROUPS = 2, ROWS = 64 * WARPGROUPS, THREADS = 128 * WARPGROUPS;
    // A tile of activations has the steps of a chunk, one after the other.
    static constexpr int COLUMNS = COLUMNS_, STEPS = CHUNK / STEP_GROUPS, STEP_BYTES = COLUMNS * ROW_BYTES;
    static constexpr int TILES = COLUMNS == 64 ? 3 : 4, TILE = STEPS * STEP_BYTES;
    // Chunks after which a tile is used again: by then few warps are behind.
    static constexpr int LAG = TILES - 2;
    // Products that are handed over at once.
    static constexpr int BATCH = 4;
    // Chunks of weights on their way: up to 56 KiB of a block.
    static constexpr int DEPTH = LANE_BYTES<T> < 16 ? 8 : 112 / LANE_BYTES<T>;
    static constexpr int WEIGHTS = TILES * TILE + 128;
};

// What a warp multiplies: chunks first .. first + count of two rows of each lane.
template <class T, class Shape> struct MiddleWork {
    LaneRing<T, 2, Shape::DEPTH, Shape::THREADS> weights;
    LaneRow<T> rows[2];
    ScaleRow<T> scales[2];
    uint32_t row, first, count;
    // Where a block begins: if all did with their first chunk, they would read the same places of all pages.
    uint32_t offset;

    // Number `index` of the chunks, from the first on.
    __device__ __forceinline__ uint32_t chunk(uint32_t index) const { return index + offset < count ? index + offset : index + offset - count; }

    // Asks for a chunk. Scales are read a chunk ahead: they are to be nearer by then.
    __device__ __forceinline__ void ask(uint32_t slot, uint32_t chunk) const {
        weights.copy(slot, rows, chunk);
#pragma unroll
        for (int k = 0; k < 2; k++) prefetch(scales[k].of(first + chunk));
    }

    __device__ __forceinline__ void start(const Part& part, uint32_t chunks) {
#pragma unroll
        for (uint32_t k = 0; k < 2; k++) {
            const uint32_t own = min(row + 8 * k, part.rows - 1);
            rows[k] = LaneRow<T>(part.planes, part.rows, chunks, own, first);
            scales[k] = ScaleRow<T>(part.planes, part.rows, chunks, own);
        }
#pragma unroll
        for (uint32_t slot = 0; slot < Shape::DEPTH; slot++) {
            if (slot < count) ask(slot, chunk(slot));
            commit_copies();
        }
    }
};

// Asks for the activations of a chunk.
template <class Shape> __device__ __forceinline__ void bring_chunk(const Walk& walk, const TileRing<Shape>& ring, uint32_t chunk) {
    const uint32_t bytes = walk.args.columns * ROW_BYTES;
    expect_bytes(ring.full(), Shape::STEPS * bytes);
#pragma unroll
    for (int i = 0; i < Shape::STEPS; i++) {
        const __half* from;
        // Written out: ptxas 13.0 loses the upper half of a sum of pointer and step here.
        asm volatile("mad.wide.u32 %0, %1, %2, %3;" : "=l"(from) : "r"(chunk * Shape::STEPS + i), "r"(bytes), "l"(walk.args.x));
        copy_bytes(ring.tile() + i * Shape::STEP_BYTES, from, bytes, ring.full());
    }
}

// Adds up a warp's products.
template <class T, class Shape>
__device__ __forceinline__ void multiply_chunks(const Walk& walk, TileRing<Shape> ring, const MiddleWork<T, Shape>& work, float (&sums)[Shape::COLUMNS / 8][4]) {
    // Products of a chunk, of a step, and that have registers.
    constexpr int ALL = 2 * CHUNK, STEP = ALL / Shape::STEPS, BATCH = Shape::BATCH, SETS = 2 * BATCH;
    WideScales<T> coming[2];
    const auto load_scales = [&](uint32_t chunk) {
#pragma unroll
        for (int k = 0; k < 2; k++) coming[k].load(work.scales[k], chunk);
    };
    if (work.count > 0) load_scales(work.first + work.chunk(0));
    hold(sums);
    uint32_t a[SETS][4], slot = 0;
    RowPair<WideLoads<T>> loads;
    TileRing<Shape> done = ring, again = ring;
    for (uint32_t index = 0; index < work.count; index++) {
        wait_for_copies<Shape::DEPTH - 1>();
#pragma unroll
        for (int k = 0; k < 2; k++) {
            work.weights.take(slot, k, loads.rows[k].raw);
            loads.rows[k].scales = coming[k];
        }
        load_scales(work.first + work.chunk(min(index + 1, work.count - 1)));
        uint64_t b = 0;
#pragma unroll
        for (int i = 0; i < ALL; i++) {
            loads.decode(work.first + work.chunk(index), i / 2, i % 2, a[i % SETS]);
            if (i % BATCH != BATCH - 1) continue;
            if (i < BATCH) {
                wait_at(ring.full(), ring.parity);
                b = tile_descriptor(ring.tile());
            }
            start_products();
#pragma unroll
            for (int k = i - BATCH + 1; k <= i; k++) multiply_async(sums, a[k % SETS], b + (k / STEP * Shape::STEP_BYTES + k % STEP * 32) / 16);
            commit_products();
            // Then the batch before is done: what it read may change.
            wait_for_products<1>();
        }
        ring.advance();
        if (index + Shape::DEPTH < work.count) work.ask(slot, work.chunk(index + Shape::DEPTH));
        commit_copies();
        slot = slot + 1 == Shape::DEPTH ? 0 : slot + 1;
        if (index == 0) continue;
        if (threadIdx.x % 32 == 0) arrive_at(done.free());
        done.advance();
        if (index < Shape::LAG) continue;
        const uint32_t next = index - Shape::LAG + Shape::TILES;
        if (threadIdx.x == 0 && next < work.count) {
            wait_at(again.free(), again.parity);
            bring_chunk(walk, again, work.first + work.chunk(next));
        }
        __syncwarp();
        again.advance();
    }
    wait_for_products<0>();
    hold(sums);
}

// Adds up the sums of all blocks of the cluster; each stores a part of the columns.
template <class Shape>
__device__ __forceinline__ void add_blocks(const Walk& walk, uint8_t* memory, const float (&sums)[Shape::COLUMNS / 8][4]) {
    // Floats from a column to the next: no two lanes share a bank.
    constexpr uint32_t STRIDE = Shape::ROWS + 4;
    static_assert(Shape::COLUMNS * STRIDE * sizeof(float) <= Shape::TILES * Shape::TILE, "no place of a barrier holds sums");
    float* const own = reinterpret_cast<float*>(memory);
    const uint32_t lane = threadIdx.x % 32, blocks = gridDim.x, each = (walk.args.columns + blocks - 1) / blocks, first = blockIdx.x * each;
    __syncthreads();
#pragma unroll
    for (int j = 0; j < Shape::COLUMNS / 8; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) own[(8 * j + lane % 4 * 2 + i % 2) * STRIDE + threadIdx.x / 32 * 16 + i / 2 * 8 + lane / 4] = sums[j][i];
    meet_cluster();
    // Four rows of a column for each thread, of all blocks at once.
    constexpr uint32_t FOURS = Shape::ROWS / 4;
    const uint32_t row = threadIdx.x % FOURS * 4, at = walk.first_row + row;
    float bias[4];
#pragma unroll
    for (int i = 0; i < 4; i++) bias[i] = walk.part.bias && at + i < walk.part.rows ? walk.part.bias[at + i] : 0.0f;
    for (uint32_t column = first + threadIdx.x / FOURS; column < min(first + each, walk.args.columns); column += Shape::THREADS / FOURS) {
        float4 of[CLUSTER_MAX];
#pragma unroll
        for (uint32_t rank = 0; rank < CLUSTER_MAX; rank++) {
            of[rank] = rank < blocks ? load_from(rank, shared_address(own + column * STRIDE + row)) : make_float4(0, 0, 0, 0);
        }
        float sum[4] = {};
#pragma unroll
        for (uint32_t rank = 0; rank < CLUSTER_MAX; rank++) sum[0] += of[rank].x, sum[1] += of[rank].y, sum[2] += of[rank].z, sum[3] += of[rank].w;
        float* const out = walk.part.out + static_cast<size_t>(column) * walk.part.stride + at;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (at + i < walk.part.rows) out[i] = sum[i] * SUM_UNIT + bias[i];
        }
    }
    // Others read this block's.
    __syncwarp();
    meet_cluster();
}

template <class T, class Shape> __device__ __forceinline__ void middle(const WideArgs& args) {
    extern __shared__ __align__(1024) uint8_t middle_shared[];
    uint8_t* const memory = middle_shared + (1024 - shared_address(middle_shared) % 1024) % 1024;
    const Part& part = part_of(args.parts, args.n_parts, blockIdx.y);
    const Walk walk{args, part, (blockIdx.y - part.first_block) * Shape::ROWS, 0};
    const uint32_t chunks = args.padded / CHUNK, each = (chunks + gridDim.x - 1) / gridDim.x;
    const uint32_t first = min(blockIdx.x * each, chunks), count = min(each, chunks - first);
    const uint32_t row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
    MiddleWork<T, Shape> work{{memory + Shape::WEIGHTS}, {}, {}, walk.first_row + row, first, count, count > 0 ? 5 * blockIdx.y % count : 0};
    TileRing<Shape> ring{shared_address(memory)};
    let_next_start();
    work.start(part, chunks);
    if (threadIdx.x == 0) start_barriers(ring);
    __syncthreads();
    wait_for_earlier();
    if (threadIdx.x == 0) {
        for (uint32_t i = 0; i < min(count, static_cast<uint32_t>(Shape::TILES)); i++, ring.advance()) bring_chunk(walk, ring, first + work.chunk(i));
        ring.index = 0, ring.parity = 0;
    }
    __syncwarp();
    float sums[Shape::COLUMNS / 8][4] = {};
    multiply_chunks<T, Shape>(walk, ring, work, sums);
    if (gridDim.x > 1) {
        add_blocks<Shape>(walk, memory, sums);
    } else {
        store_sums(walk, row, sums);
    }
}

#define MIDDLE_TILE(name, T, columns)                                                                     \
    extern "C" __global__ void __launch_bounds__(MiddleShape<T, columns>::THREADS, columns == 128 ? 1 : 2) \
        middle_##name##_##columns(const __grid_constant__ WideArgs args) {                                \
        middle<T, MiddleShape<T, columns>>(args);                                                         \
    }
#define MIDDLE(name, T)          \
    MIDDLE_TILE(name, T, 32)     \
    MIDDLE_TILE(name, T, 64)     \
    MIDDLE_TILE(name, T, 128)
FOR_QUANTIZED(MIDDLE)
FOR_E4M3(MIDDLE)
#endif
