// Products of quantised weights with a few columns of 8-bit activations. A warp has ROWS rows; its
// lanes share out the groups of 32 elements, so that a load of the warp is 512 bytes in a row:
//
//   for each group of this lane:
//     ROWS times 8 words of weights, decoded in registers
//     for each column: 8 words of activations, ROWS · 8 dp4a, scales, one sum per row
//   sums over the lanes
//
// A sum has the same order whatever COLUMNS is, so a column's bits do not depend on the batch.
#include "quants.cuh"

constexpr int WARPS = 4;
constexpr int ROWS = 2;
constexpr int PARTS = 3;

// One of several matrices over the same activations.
struct Part {
    Planes planes;
    const float* bias; // [rows], or null
    float* out;        // [column][stride]
    uint32_t rows;
    uint32_t stride;
    uint32_t first_block; // of the grid
    uint32_t unused;
};

struct MatvecArgs {
    Part parts[PARTS];
    const int8_t* quants;     // [columns][groups · 32]
    const GroupScale* scales; // [columns][groups]
    uint32_t n_parts;
    uint32_t groups;
    uint32_t columns;
    uint32_t second; // columns from a value's to what its 8 bits miss; 0 if that is not wanted
};

__device__ __forceinline__ int dot4(int a, int b, int sum) { return __dp4a(a, b, sum); }

// One group of one row times one column, added to `acc`.
template <class T>
__device__ __forceinline__ float add_group(const int w[8], const Scales& s, const int x[8], const GroupScale& of_x, float acc) {
    constexpr int PARTS_OF_GROUP = T::HALVES ? 2 : 1;
#pragma unroll
    for (int part = 0; part < PARTS_OF_GROUP; part++) {
        int sum = T::HALVES ? of_x.sums[part] : of_x.sums[0] + of_x.sums[1];
        int dot = -T::ZERO * sum;
#pragma unroll
        for (int i = part * 8 / PARTS_OF_GROUP; i < (part + 1) * 8 / PARTS_OF_GROUP; i++) dot = dot4(w[i], x[i], dot);
        acc = __fmaf_rn(static_cast<float>(dot), s.scale[part] * of_x.scale, acc);
    }
    if constexpr (T::MIN == Min::One) {
        acc = __fmaf_rn(s.min, of_x.scale * static_cast<float>(of_x.sums[0] + of_x.sums[1]), acc);
    }
    if constexpr (T::MIN == Min::Pair) {
        const int dot = s.pair[0] * of_x.sums[0] + s.pair[1] * of_x.sums[1];
        acc = __fmaf_rn(static_cast<float>(dot), s.min * of_x.scale, acc);
    }
    return acc;
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(~0u, value, distance);
    return value;
}

// The sums of ROWS rows and COLUMNS columns from `first` on, in every lane.
template <class T, int COLUMNS>
__device__ __forceinline__ void dot_rows(const MatvecArgs& args, const Part& part, uint32_t row, uint32_t first,
                                         uint32_t last, float acc[ROWS][COLUMNS]) {
    const uint32_t lane = threadIdx.x % 32, groups = args.groups;
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) acc[r][c] = 0;
    for (uint32_t g = lane; g < groups; g += 32) {
        int w[ROWS][8];
        Scales s[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const size_t group = static_cast<size_t>(min(row + r, part.rows - 1)) * groups + g;
            T::quants(part.planes, group, w[r]);
            T::scales(part.planes, group / T::SCALE_GROUPS, g % T::SCALE_GROUPS, s[r]);
        }
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) {
            const size_t at = static_cast<size_t>(min(first + c, last)) * groups + g;
            const int4* quants = reinterpret_cast<const int4*>(args.quants) + 2 * at;
            const int4 a = __ldg(quants), b = __ldg(quants + 1);
            const int x[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
            const int2 packed = __ldg(reinterpret_cast<const int2*>(args.scales) + at);
            GroupScale of_x;
            of_x.scale = __int_as_float(packed.x);
            of_x.sums[0] = static_cast<int16_t>(packed.y);
            of_x.sums[1] = static_cast<int16_t>(packed.y >> 16);
#pragma unroll
            for (int r = 0; r < ROWS; r++) acc[r][c] = add_group<T>(w[r], s[r], x, of_x, acc[r][c]);
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) acc[r][c] = warp_sum(acc[r][c]);
}

template <class T, int COLUMNS> __device__ __forceinline__ void matvec(const MatvecArgs& args) {
    uint32_t index = 0;
    while (index + 1 < args.n_parts && blockIdx.x >= args.parts[index + 1].first_block) index++;
    const Part& part = args.parts[index];
    const uint32_t row = ((blockIdx.x - part.first_block) * WARPS + threadIdx.x / 32) * ROWS;
    const uint32_t first = blockIdx.y * COLUMNS, last = args.columns - 1;
    if (row >= part.rows) return;
    float acc[ROWS][COLUMNS];
    dot_rows<T, COLUMNS>(args, part, row, first, last, acc);
    if (args.second) {
        float rest[ROWS][COLUMNS];
        dot_rows<T, COLUMNS>(args, part, row, first + args.second, last + args.second, rest);
#pragma unroll
        for (int r = 0; r < ROWS; r++)
#pragma unroll
            for (int c = 0; c < COLUMNS; c++) acc[r][c] += rest[r][c];
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) {
            const bool own = threadIdx.x % 32 == r * COLUMNS + c;
            if (!own || row + r >= part.rows || first + c > last) continue;
            const float bias = part.bias ? part.bias[row + r] : 0.0f;
            part.out[static_cast<size_t>(first + c) * part.stride + row + r] = acc[r][c] + bias;
        }
    }
}

#define MATVEC_COLUMNS(name, T, columns)                                                                      \
    extern "C" __global__ void __launch_bounds__(WARPS * 32)                                                  \
        matvec_##name##_##columns(const __grid_constant__ MatvecArgs args) {                                  \
        matvec<T, columns>(args);                                                                             \
    }
#define MATVEC(name, T)          \
    MATVEC_COLUMNS(name, T, 1)   \
    MATVEC_COLUMNS(name, T, 2)   \
    MATVEC_COLUMNS(name, T, 4)   \
    MATVEC_COLUMNS(name, T, 8)
MATVEC(q4_0, Q4_0)
MATVEC(q4_1, Q4_1)
MATVEC(q5_0, Q5_0)
MATVEC(q5_1, Q5_1)
MATVEC(q8_0, Q8_0)
MATVEC(iq4_nl, Iq4Nl)
MATVEC(iq4_xs, Iq4Xs)
MATVEC(q2_k, Q2K)
MATVEC(q3_k, Q3K)
MATVEC(q4_k, Q4K)
MATVEC(q5_k, Q5K)
MATVEC(q6_k, Q6K)

// Floats: a lane has 8 elements in a row at a time.
struct F32 {
    static __device__ __forceinline__ void load(const uint8_t* at, float w[8]) {
        const float4* q = reinterpret_cast<const float4*>(at);
        const float4 a = __ldg(q), b = __ldg(q + 1);
        w[0] = a.x, w[1] = a.y, w[2] = a.z, w[3] = a.w, w[4] = b.x, w[5] = b.y, w[6] = b.z, w[7] = b.w;
    }
    static constexpr int BYTES = 4;
};
struct F16 {
    static __device__ __forceinline__ void load(const uint8_t* at, float w[8]) {
        const uint4 q = __ldg(reinterpret_cast<const uint4*>(at));
        const uint32_t words[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
        for (int i = 0; i < 8; i++) w[i] = __half2float(__ushort_as_half(static_cast<unsigned short>(words[i / 2] >> 16 * (i % 2))));
    }
    static constexpr int BYTES = 2;
};
struct Bf16 {
    static __device__ __forceinline__ void load(const uint8_t* at, float w[8]) {
        const uint4 q = __ldg(reinterpret_cast<const uint4*>(at));
        const uint32_t words[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
        for (int i = 0; i < 8; i++) w[i] = __uint_as_float(i % 2 ? words[i / 2] & 0xffff0000u : words[i / 2] << 16);
    }
    static constexpr int BYTES = 2;
};

struct FloatArgs {
    const uint8_t* weights; // [rows][cols]
    const float* x;         // [columns][cols]
    const float* bias;
    float* out; // [columns][stride]
    uint32_t rows, cols, columns, stride;
};

// One row per warp, one column per grid row; `cols` is a multiple of 8.
template <class T> __device__ __forceinline__ void float_matvec(const FloatArgs& args) {
    const uint32_t row = blockIdx.x * WARPS + threadIdx.x / 32, column = blockIdx.y;
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
    extern "C" __global__ void __launch_bounds__(WARPS * 32) matvec_##name(const __grid_constant__ FloatArgs args) { \
        float_matvec<T>(args);                                                                                         \
    }
FLOAT_MATVEC(f32, F32)
FLOAT_MATVEC(f16, F16)
FLOAT_MATVEC(bf16, Bf16)
