// Products of float weights with f32 activations.
#include "floats.cuh"
#include "products.cuh"

constexpr int FLOAT_WARPS = 4;

struct FloatArgs {
    const uint8_t* weights; // [rows][cols]
    const float* x;         // [columns][cols]
    const float* bias;
    float* out; // [columns][stride]
    uint32_t rows, cols, columns, stride;
};

// One row per warp, one column per grid row; `cols` is a multiple of 8.
template <class T> __device__ __forceinline__ void float_matvec(const FloatArgs& args) {
    const uint32_t row = blockIdx.x * FLOAT_WARPS + threadIdx.x / 32, column = blockIdx.y;
    if (row >= args.rows) return;
    const uint8_t* weights = args.weights + static_cast<size_t>(row) * args.cols * T::BYTES;
    const float* x = args.x + static_cast<size_t>(column) * args.cols;
    float acc = 0;
    for (uint32_t k = threadIdx.x % 32 * 8; k < args.cols; k += 256) {
        float w[8];
        T::load(weights + static_cast<size_t>(k) * T::BYTES, w);
        const float4 a = *reinterpret_cast<const float4*>(x + k), b = *reinterpret_cast<const float4*>(x + k + 4);
        const float v[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
        for (int i = 0; i < 8; i++) acc = __fmaf_rn(w[i], v[i], acc);
    }
    acc = warp_sum(acc);
    if (threadIdx.x % 32 == 0) {
        args.out[static_cast<size_t>(column) * args.stride + row] = acc + (args.bias ? args.bias[row] : 0.0f);
    }
}

#define FLOAT_MATVEC(name, T)                                                                                          \
    extern "C" __global__ void __launch_bounds__(FLOAT_WARPS * 32) matvec_##name(const __grid_constant__ FloatArgs args) { \
        begin();                                                                                                       \
        float_matvec<T>(args);                                                                                         \
    }
FLOAT_MATVEC(f32, F32)
FLOAT_MATVEC(f16, F16)
FLOAT_MATVEC(bf16, Bf16)
