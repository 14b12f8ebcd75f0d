// Rows of an embedding, which a step starts from, in f32: of a matrix in the device layout.
#include "floats.cuh"
#include "launch.cuh"
#include "quants.cuh"

struct EmbedArgs {
    Planes planes;
    const uint32_t* rows; // the matrix's row of each token; null: token t has row t
    float* out;           // [tokens][cols]
    uint32_t cols;
    uint32_t padded; // groups of a row in memory
    float scale;
    uint32_t table_rows;
};

constexpr int EMBED_THREADS = 128;

// Four elements as they are before scales.
template <class T> __device__ __forceinline__ void numbers(uint32_t word, float v[4]) {
    if constexpr (T::IS_FLOAT) {
        __half2 pairs[2];
        split_e4m3(word, pairs);
#pragma unroll
        for (int i = 0; i < 4; i++) v[i] = i < 2 ? __low2float(pairs[i]) : __high2float(pairs[i - 2]);
    } else {
#pragma unroll
        for (int i = 0; i < 4; i++) v[i] = static_cast<float>(static_cast<int8_t>(word >> 8 * i));
    }
}

// A lane of a chunk per thread: grid (lanes of a row over threads, tokens).
template <class T> __device__ __forceinline__ void embed(const EmbedArgs& args) {
    const uint32_t index = blockIdx.x * EMBED_THREADS + threadIdx.x, t = index % 4, chunk = index / 4;
    begin();
    if (chunk >= args.padded / CHUNK) return;
    const size_t row = args.rows ? args.rows[blockIdx.y] : blockIdx.y;
    Raw raw;
    const uint32_t chunks = args.padded / CHUNK;
    load_raw<T>(args.planes, RowPlace(args.table_rows, chunks, row).at(chunk), t, raw);
    const ScaleRow<T> scales(args.planes, args.table_rows, chunks, row);
    float* out = args.out + static_cast<size_t>(blockIdx.y) * args.cols;
#pragma unroll
    for (int j = 0; j < CHUNK; j++) {
        const uint32_t group = CHUNK * chunk + j;
        if (group * GROUP >= args.cols) return;
        uint32_t words[4];
        scales.load(group, words);
        Scales s;
        T::scales(words, group % T::SCALE_GROUPS, s);
#pragma unroll
        for (int upper = 0; upper < 2; upper++) {
            const uint32_t quants = T::decode(raw, j, upper);
            const float scale = s.scale[T::HALVES ? upper : 0];
            const float min = T::MIN == Min::None ? 0.0f : s.min[T::MIN == Min::Pair ? upper : 0];
            float v[4];
            numbers<T>(quants, v);
#pragma unroll
            for (int i = 0; i < 4; i++) v[i] = args.scale * __fmaf_rn(scale, v[i], min);
            *reinterpret_cast<float4*>(out + group * GROUP + 16 * upper + 4 * t) = make_float4(v[0], v[1], v[2], v[3]);
        }
    }
}

// Four elements per thread.
template <class T> __device__ __forceinline__ void embed_floats(const EmbedArgs& args) {
    const uint32_t i = 4 * (blockIdx.x * EMBED_THREADS + threadIdx.x);
    begin();
    if (i >= args.cols) return;
    const size_t row = args.rows ? args.rows[blockIdx.y] : blockIdx.y;
    float v[4];
    T::load4(args.planes.quants + (row * args.cols + i) * T::BYTES, v);
    *reinterpret_cast<float4*>(args.out + static_cast<size_t>(blockIdx.y) * args.cols + i) =
        make_float4(args.scale * v[0], args.scale * v[1], args.scale * v[2], args.scale * v[3]);
}

#define EMBED_WITH(name, body)                                                                                      \
    extern "C" __global__ void __launch_bounds__(EMBED_THREADS) embed_##name(const __grid_constant__ EmbedArgs args) { \
        body(args);                                                                                                 \
    }
#define EMBED(name, T) EMBED_WITH(name, embed<T>)
FOR_QUANTIZED(EMBED)
FOR_E4M3(EMBED)
EMBED_WITH(f32, embed_floats<F32>)
EMBED_WITH(f16, embed_floats<F16>)
EMBED_WITH(bf16, embed_floats<Bf16>)
