// The order of f16 activations that wide products read: [steps of 64 elements][columns][64], so that the
// columns of a tile, at one step, lie next to each other and come to shared memory as one copy.
//
// The 64 elements of a column lie in 8 pieces of 8. Piece p is at p ^ column % 8, so that no two of eight
// columns share a bank. Number 2t + i of piece 4g + 2h + b is element 32g + 16h + 4t + 2i + b: then a lane's
// four weights next to each other, every second of which is decoded at once, are two words of what tensor
// cores multiply (see products.cuh).
#pragma once
#include <cuda_fp16.h>
#include <stdint.h>

constexpr uint32_t STEP_ELEMENTS = 64;

// Place of an element, the first or second of four, which the second one after it follows.
__device__ __forceinline__ size_t half_place(uint32_t columns, uint32_t column, uint32_t element) {
    const uint32_t piece = element % 64 / 16 * 2 + element % 2;
    const size_t start = (static_cast<size_t>(element / STEP_ELEMENTS) * columns + column) * STEP_ELEMENTS;
    return start + (piece ^ column % 8) * 8 + element / 4 % 4 * 2;
}

// A sixteenth of elements i .. i + 4 of a column as f16. All lanes of a warp come here, those next to each other
// with fours next to each other; some have nothing to store.
__device__ __forceinline__ void store_halves(float4 v, __half* halves, uint32_t columns, uint32_t column, uint32_t i, bool stores = true) {
    constexpr float UNIT = 1.0f / 16;
    const __half2 even = __floats2half2_rn(v.x * UNIT, v.z * UNIT), odd = __floats2half2_rn(v.y * UNIT, v.w * UNIT);
    // Two fours have two pairs in each of two pieces: each lane writes what lies together.
    const bool is_odd = i / 4 % 2;
    const __half2 other = __shfl_xor_sync(~0u, is_odd ? even : odd, 1);
    const __half2 pairs[2] = {is_odd ? other : even, is_odd ? odd : other};
    const size_t place = half_place(columns, column, is_odd ? i - 3 : i);
    if (stores) *reinterpret_cast<uint2*>(halves + place) = *reinterpret_cast<const uint2*>(pairs);
}
