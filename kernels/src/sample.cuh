// What is known of rows of logits after measure_rows.
#pragma once
#include "launch.cuh"
#include <stdint.h>

// What one block finds in its part of a row.
struct RowPart {
    float largest;
    uint32_t first; // the first token with it
    float sum;      // of exp(logit - largest)
    uint32_t spoiled; // whether a logit is not finite
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

// Of the parts that the threads of a warp have; the first one has the whole.
__device__ __forceinline__ RowPart warp_joined(RowPart own) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
        RowPart other;
        other.largest = __shfl_xor_sync(~0u, own.largest, distance);
        other.first = __shfl_xor_sync(~0u, own.first, distance);
        other.sum = __shfl_xor_sync(~0u, own.sum, distance);
        other.spoiled = __shfl_xor_sync(~0u, own.spoiled, distance);
        own = joined(own, other);
    }
    return own;
}
