// What sampling the best token needs of rows of logits, so that rows need not leave the device: the
// largest, the first of equals, and the sum of exponentials. A soft cap is put on the logits on the way.
#include "sample.cuh"

constexpr int MEASURE_THREADS = 256;

struct MeasureArgs {
    float* logits;  // [rows][vocab]
    RowPart* parts; // [rows][blocks]
    uint32_t vocab;
    float softcap; // 0: none
};

// One part of one row per block: grid (parts, rows).
extern "C" __global__ void __launch_bounds__(MEASURE_THREADS) measure_rows(const __grid_constant__ MeasureArgs args) {
    __shared__ RowPart warps[MEASURE_THREADS / 32];
    begin();
    const uint32_t vocab = args.vocab, row = blockIdx.y;
    float* logits = args.logits + static_cast<size_t>(row) * vocab;
    RowPart own{-INFINITY, 0xffffffffu, 0.0f, 0};
    // Ascending, so that the first of equals stays.
    for (uint32_t i = blockIdx.x * MEASURE_THREADS + threadIdx.x; i < vocab; i += gridDim.x * MEASURE_THREADS) {
        float logit = logits[i];
        if (args.softcap > 0) logits[i] = logit = args.softcap * tanhf(logit / args.softcap);
        own.spoiled |= !isfinite(logit);
        if (logit > own.largest) {
            own.sum = own.sum * expf(own.largest - logit) + 1.0f;
            own.largest = logit, own.first = i;
        } else {
            own.sum += expf(logit - own.largest);
        }
    }
    own = warp_joined(own);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = own;
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (int w = 1; w < MEASURE_THREADS / 32; w++) own = joined(own, warps[w]);
    args.parts[static_cast<size_t>(row) * gridDim.x + blockIdx.x] = own;
}
