// What sampling the best token needs of rows of logits, so that rows need not leave the device: the
// largest, the first of equals, and the sum of exponentials.
#include "launch.cuh"
#include <stdint.h>

constexpr int MEASURE_THREADS = 256;

// What one block finds in its part of a row.
struct RowPart {
    float largest;
    uint32_t first; // the first token with it
    float sum;      // of exp(logit - largest)
    uint32_t spoiled; // whether a logit is not finite
};

struct MeasureArgs {
    const float* logits; // [rows][vocab]
    RowPart* parts;      // [rows][blocks]
    uint32_t vocab;
    float softcap; // 0: none
};

// Of two parts that lie one behind the other.
__device__ __forceinline__ RowPart joined(RowPart a, RowPart b) {
    const float largest = fmaxf(a.largest, b.largest);
    RowPart both;
    both.largest = largest;
    both.first = a.largest == b.largest ? min(a.first, b.first) : a.largest > b.largest ? a.first : b.first;
    both.sum = (a.sum > 0 ? a.sum * expf(a.largest - largest) : 0.0f) + (b.sum > 0 ? b.sum * expf(b.largest - largest) : 0.0f);
    both.spoiled = a.spoiled | b.spoiled;
    return both;
}

// One part of one row per block: grid (parts, rows).
extern "C" __global__ void __launch_bounds__(MEASURE_THREADS) measure_rows(const __grid_constant__ MeasureArgs args) {
    __shared__ RowPart warps[MEASURE_THREADS / 32];
    begin();
    const uint32_t vocab = args.vocab, row = blockIdx.y;
    const float* logits = args.logits + static_cast<size_t>(row) * vocab;
    RowPart own{-INFINITY, 0xffffffffu, 0.0f, 0};
    // Ascending, so that the first of equals stays.
    for (uint32_t i = blockIdx.x * MEASURE_THREADS + threadIdx.x; i < vocab; i += gridDim.x * MEASURE_THREADS) {
        float logit = logits[i];
        if (args.softcap > 0) logit = args.softcap * tanhf(logit / args.softcap);
        own.spoiled |= !isfinite(logit);
        if (logit > own.largest) {
            own.sum = own.sum * expf(own.largest - logit) + 1.0f;
            own.largest = logit, own.first = i;
        } else {
            own.sum += expf(logit - own.largest);
        }
    }
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
        RowPart other;
        other.largest = __shfl_xor_sync(~0u, own.largest, distance);
        other.first = __shfl_xor_sync(~0u, own.first, distance);
        other.sum = __shfl_xor_sync(~0u, own.sum, distance);
        other.spoiled = __shfl_xor_sync(~0u, own.spoiled, distance);
        own = joined(own, other);
    }
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = own;
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (int w = 1; w < MEASURE_THREADS / 32; w++) own = joined(own, warps[w]);
    args.parts[static_cast<size_t>(row) * gridDim.x + blockIdx.x] = own;
}
