// Products of weights of any type with many columns, at the speed of tensor cores: weights and activations
// meet as f16 with sums in f32. Weights go from memory to registers, and are decoded there; activations,
// which lie as halves.cuh tells, go through shared memory.
//
// A sum has its elements in one order, whatever the tile: a column's bits do not depend on which other
// columns are there.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#include "wide_wgmma.cuh"
#define HAS_WGMMA 1
#else
#include "wide_mma.cuh"
#define HAS_WGMMA 0
#endif

template <class Loads, class Shape> __device__ __forceinline__ void wide(const WideArgs& args) {
    extern __shared__ __align__(1024) uint8_t wide_shared[];
    uint8_t* shared = wide_shared + (1024 - shared_address(wide_shared) % 1024) % 1024;
    const Part& part = part_of(args.parts, args.n_parts, blockIdx.y);
    const Walk walk{args, part, (blockIdx.y - part.first_block) * Shape::ROWS, blockIdx.x * Shape::COLUMNS};
    wide_loop<Loads, Shape>(walk, shared);
}

#define WIDE_TILE(name, Loads, rows, columns, ...)                                \
    extern "C" __global__ void __launch_bounds__(WideShape<__VA_ARGS__>::THREADS, 1) \
        wide_##name##_##rows##_##columns(const __grid_constant__ WideArgs args) { \
        wide<Loads, WideShape<__VA_ARGS__>>(args);                                \
    }
#if HAS_WGMMA
#define WIDE(name, Loads)                       \
    WIDE_TILE(name, Loads, 128, 256, 2, 256)    \
    WIDE_TILE(name, Loads, 192, 128, 3, 128)    \
    WIDE_TILE(name, Loads, 128, 128, 2, 128)
#else
#define WIDE(name, Loads)                       \
    WIDE_TILE(name, Loads, 128, 128, 128)       \
    WIDE_TILE(name, Loads, 128, 64, 64)
#endif
#define WIDE_QUANTIZED(name, T) WIDE(name, WideLoads<T>)
FOR_QUANTIZED(WIDE_QUANTIZED)
FOR_E4M3(WIDE_QUANTIZED)
WIDE(f32, WideFloats<F32>)
WIDE(f16, WideFloats<F16>)
WIDE(bf16, WideFloats<Bf16>)
