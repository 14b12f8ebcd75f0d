// Norms that products of stream.cu make on the way, and how threads of its blocks meet.
#pragma once
#include "norm.cuh"
#include "rounding.cuh"

// Until COUNT threads are here.
template <int COUNT> __device__ __forceinline__ void meet_some(uint32_t barrier) {
    if constexpr (COUNT == 32) __syncwarp();
    if constexpr (COUNT > 32) asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(COUNT) : "memory");
}

// Barriers of a block: of a half; of who finishes gated tiles; where the sums of one are there; of a norm.
enum Barrier : uint32_t { OF_HALF = 1, OF_FINISHING = 3, FILLED = 4, OF_NORM = 5 };

// What activations are the norm of, as in NormArgs: one row, which all blocks normalise for themselves.
struct StreamNorm {
    const float* residual; // [cols]
    const float* added;    // [cols], or null
    float* sum;            // [cols]: the residual stream from here on; elsewhere than `residual`
    const float* weight;   // [cols], or null: activations are there
    float eps;
    uint32_t cols;
    uint32_t threads, quads; // of the kernel that normalises rows: its sums are those of this one
};

// A row that is normalised to where X reads it, chunk after chunk, with the bits of norm_rows. A thread does the work
// of two of its threads, which have a four or two each.
template <class Shape> struct NormOnTheWay {
    static constexpr int TWICE = 2, QUADS = 2;
    const StreamNorm& norm;
    float* const parts; // [32], in shared memory
    float4 v[TWICE][QUADS], weight[TWICE][QUADS];

    __device__ __forceinline__ uint32_t at(int j, int k) const { return 4 * (k * norm.threads + j * Shape::STREAMING + threadIdx.x); }
    __device__ __forceinline__ bool is_one(int j, int k) const { return j * Shape::STREAMING + threadIdx.x < norm.threads && k < norm.quads; }

    __device__ __forceinline__ void load_weight() {
#pragma unroll
        for (int i = 0; i < TWICE * QUADS; i++) {
            if (is_one(i / QUADS, i % QUADS)) weight[i / QUADS][i % QUADS] = quad_at(norm.weight, at(i / QUADS, i % QUADS), norm.cols);
        }
    }

    __device__ __forceinline__ void load() {
#pragma unroll
        for (int i = 0; i < TWICE * QUADS; i++) {
            const int j = i / QUADS, k = i % QUADS;
            v[j][k] = make_float4(0, 0, 0, 0);
            if (!is_one(j, k)) continue;
            const float4 added = norm.added ? quad_at(norm.added, at(j, k), norm.cols) : make_float4(0, 0, 0, 0);
            v[j][k] = sum_of_quads(quad_at(norm.residual, at(j, k), norm.cols), added);
        }
    }

    // Waits for what was loaded.
    __device__ __forceinline__ void sum_squares() const {
#pragma unroll
        for (int j = 0; j < TWICE; j++) {
            float squares = 0;
#pragma unroll
            for (int k = 0; k < QUADS; k++) squares = is_one(j, k) ? quad_squares(v[j][k], squares) : squares;
            squares = warp_sum(squares);
            if (threadIdx.x % 32 == 0) parts[j * (Shape::STREAMING / 32) + threadIdx.x / 32] = squares;
        }
    }

    __device__ __forceinline__ void store(uint8_t* to) const {
        const uint32_t lane = threadIdx.x % 32, cols = norm.cols;
        meet_some<Shape::STREAMING>(OF_NORM);
        const float scale = norm_scale(warp_sum(lane < norm.threads / 32 ? parts[lane] : 0.0f), cols, norm.eps);
#pragma unroll
        for (int j = 0; j < TWICE; j++)
#pragma unroll
            for (int k = 0; k < QUADS; k++) {
                const uint32_t i = at(j, k), group = i / GROUP;
                if (!is_one(j, k) || i >= padded_groups(cols) * GROUP) continue;
                if (norm.added && blockIdx.x == 0 && i < cols) *reinterpret_cast<float4*>(norm.sum + i) = v[j][k];
                uint8_t* const slot = to + group / CHUNK * Shape::X::SLOT;
                int8_t* const pair = reinterpret_cast<int8_t*>(slot) + group % CHUNK / 2 * (2 * GROUP);
                round_group(scaled(v[j][k], scale, weight[j][k]), pair, group % 2, reinterpret_cast<GroupScale*>(slot + Shape::X::WORDS) + group % CHUNK);
            }
    }
};
