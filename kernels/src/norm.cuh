// What kernels that normalise rows share.
#pragma once
#include "quants.cuh"

// Four elements in a row of `cols`, zeros beyond it; `cols` is a multiple of four.
__device__ __forceinline__ float4 quad_at(const float* row, uint32_t i, uint32_t cols) {
    return i < cols ? *reinterpret_cast<const float4*>(row + i) : make_float4(0, 0, 0, 0);
}

__device__ __forceinline__ float quad_squares(float4 v, float sum) {
    return __fmaf_rn(v.w, v.w, __fmaf_rn(v.z, v.z, __fmaf_rn(v.y, v.y, __fmaf_rn(v.x, v.x, sum))));
}

__device__ __forceinline__ float4 sum_of_quads(float4 a, float4 b) { return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w); }

__device__ __forceinline__ float4 scaled(float4 v, float scale, float4 weight) {
    return make_float4(v.x * scale * weight.x, v.y * scale * weight.y, v.z * scale * weight.z, v.w * scale * weight.w);
}

__device__ __forceinline__ float norm_scale(float squares, uint32_t cols, float eps) { return 1.0f / sqrtf(squares / static_cast<float>(cols) + eps); }
