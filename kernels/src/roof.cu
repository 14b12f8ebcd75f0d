// What a GPU can do at most: bytes that are read from its memory, and multiply-accumulates of f16 with sums in
// f32 on its tensor cores, with the fastest instructions that it has for them: wgmma on Hopper, else mma.sync.
//
// On an H200: 4650 GB/s read from 4 GiB, 4560 from 1 GiB; 914 TFLOP/s with wgmma, 590 with mma.sync.
#include "launch.cuh"
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#include "wgmma.cuh"
#else
#include "tensor_cores.cuh"
#endif

constexpr int ROOF_READ_THREADS = 512, ROOF_READ_LOADS = 8, ROOF_READ_TILE = ROOF_READ_THREADS * ROOF_READ_LOADS;

struct RoofReadArgs {
    const uint4* from; // [count]
    uint32_t* found;   // [blocks][warps]
    uint64_t count;
};

__device__ __forceinline__ uint32_t xor_words(uint4 v) { return v.x ^ v.y ^ v.z ^ v.w; }

// found[block][warp] = XOR of the words that a warp reads; blocks take tiles in turn.
extern "C" __global__ void __launch_bounds__(ROOF_READ_THREADS) read_words(const __grid_constant__ RoofReadArgs args) {
    begin();
    const uint64_t tiles = args.count / ROOF_READ_TILE;
    uint32_t found = 0;
    for (uint64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const uint4* const from = args.from + tile * ROOF_READ_TILE + threadIdx.x;
        uint4 words[ROOF_READ_LOADS];
#pragma unroll
        for (int i = 0; i < ROOF_READ_LOADS; i++) words[i] = __ldcs(from + i * ROOF_READ_THREADS);
#pragma unroll
        for (int i = 0; i < ROOF_READ_LOADS; i++) found ^= xor_words(words[i]);
    }
    if (blockIdx.x == 0) {
        for (uint64_t i = tiles * ROOF_READ_TILE + threadIdx.x; i < args.count; i += ROOF_READ_THREADS) found ^= xor_words(args.from[i]);
    }
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) found ^= __shfl_xor_sync(~0u, found, distance);
    if (threadIdx.x % 32 == 0) args.found[blockIdx.x * (ROOF_READ_THREADS / 32) + threadIdx.x / 32] = found;
}

// All blocks multiply the same matrices, a[ROWS][DEPTH] and b[COLUMNS][DEPTH], again and again.
constexpr int ROOF_ROWS = 128, ROOF_DEPTH = 64, ROOF_MAC_THREADS = 256;

struct RoofMacArgs {
    float* sums; // [blocks][ROWS]: of a row of rounds · a · bᵀ
    uint32_t rounds;
};

// Elements of both matrices, in ±1: they have as many different bits as those of a model, on which the power that
// multiplying takes depends, and on that the clock.
__device__ __forceinline__ __half roof_element(uint32_t index) {
    index = (index ^ index >> 16) * 0x7feb352du;
    index = (index ^ index >> 15) * 0x846ca68bu;
    index ^= index >> 16;
    return __float2half_rn(static_cast<float>(index >> 8) * 0x1p-23f - 1.0f);
}

__device__ __forceinline__ __half roof_a(uint32_t row, uint32_t k) { return roof_element(row * ROOF_DEPTH + k); }

__device__ __forceinline__ __half roof_b(uint32_t column, uint32_t k) { return roof_element((ROOF_ROWS + column) * ROOF_DEPTH + k); }

// What a lane has of 16 rows of a, from `row` on, and 16 elements from k on (tensor_cores.cuh).
__device__ __forceinline__ void roof_rows(uint32_t row, uint32_t k, uint32_t a[4]) {
    const uint32_t lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const uint32_t r = row + lane / 4 + i % 2 * 8, at = k + lane % 4 * 2 + i / 2 * 8;
        a[i] = bits_of(__halves2half2(roof_a(r, at), roof_a(r, at + 1)));
    }
}

template <int TILES> __device__ __forceinline__ void store_roof_sums(const RoofMacArgs& args, uint32_t row, const float (&d)[TILES][4]) {
    float sums[2] = {};
#pragma unroll
    for (int j = 0; j < TILES; j++) sums[0] += d[j][0] + d[j][1], sums[1] += d[j][2] + d[j][3];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        sums[i] += __shfl_xor_sync(~0u, sums[i], 1);
        sums[i] += __shfl_xor_sync(~0u, sums[i], 2);
        if (threadIdx.x % 4 == 0) args.sums[blockIdx.x * ROOF_ROWS + row + threadIdx.x % 32 / 4 + 8 * i] = sums[i];
    }
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr int ROOF_COLUMNS = 256;

// Two warpgroups with 64 rows each; b lies in shared memory, as tile_descriptor tells.
extern "C" __global__ void __launch_bounds__(ROOF_MAC_THREADS, 1) multiply_rounds(const __grid_constant__ RoofMacArgs args) {
    extern __shared__ __align__(1024) uint8_t wide_shared[];
    uint8_t* const tile = wide_shared + (1024 - shared_address(wide_shared) % 1024) % 1024;
    begin();
    for (uint32_t i = threadIdx.x; i < ROOF_COLUMNS * ROOF_DEPTH; i += ROOF_MAC_THREADS) {
        const uint32_t column = i / ROOF_DEPTH, k = i % ROOF_DEPTH;
        *reinterpret_cast<__half*>(tile + column * ROW_BYTES + (k / 8 ^ column % 8) * 16 + k % 8 * 2) = roof_b(column, k);
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
    const uint32_t row = threadIdx.x / 32 * 16;
    uint32_t a[ROOF_DEPTH / 16][4];
#pragma unroll
    for (int k = 0; k < ROOF_DEPTH / 16; k++) roof_rows(row, 16 * k, a[k]);
    float d[ROOF_COLUMNS / 8][4] = {};
    hold(d);
    const uint64_t b = tile_descriptor(shared_address(tile));
    for (uint32_t round = 0; round < args.rounds; round++) {
        start_products();
#pragma unroll
        for (int k = 0; k < ROOF_DEPTH / 16; k++) multiply_async(d, a[k], b + 2 * k);
        commit_products();
        wait_for_products<1>();
    }
    wait_for_products<0>();
    hold(d);
    store_roof_sums(args, row, d);
}
#else
constexpr int ROOF_COLUMNS = 32;

// A warp has 16 rows, and both matrices in registers.
extern "C" __global__ void __launch_bounds__(ROOF_MAC_THREADS, 2) multiply_rounds(const __grid_constant__ RoofMacArgs args) {
    begin();
    const uint32_t row = threadIdx.x / 32 * 16, lane = threadIdx.x % 32;
    uint32_t a[ROOF_DEPTH / 16][4], b[ROOF_DEPTH / 16][ROOF_COLUMNS / 8][2];
#pragma unroll
    for (int k = 0; k < ROOF_DEPTH / 16; k++) {
        roof_rows(row, 16 * k, a[k]);
#pragma unroll
        for (int i = 0; i < ROOF_COLUMNS / 8 * 2; i++) {
            const uint32_t column = i / 2 * 8 + lane / 4, at = 16 * k + lane % 4 * 2 + i % 2 * 8;
            b[k][i / 2][i % 2] = bits_of(__halves2half2(roof_b(column, at), roof_b(column, at + 1)));
        }
    }
    float d[ROOF_COLUMNS / 8][4] = {};
    for (uint32_t round = 0; round < args.rounds; round++) {
#pragma unroll
        for (int k = 0; k < ROOF_DEPTH / 16; k++)
#pragma unroll
            for (int j = 0; j < ROOF_COLUMNS / 8; j++) multiply_halves(d[j], a[k], b[k][j][0], b[k][j][1]);
    }
    store_roof_sums(args, row, d);
}
#endif
