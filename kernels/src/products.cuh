// What the kernels for products of quantised weights share: their arguments, and the multiplication
// of a tile of weights with 8 columns of activations on tensor cores.
#pragma once
#include "launch.cuh"
#include "quants.cuh"

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

struct ProductArgs {
    Part parts[PARTS];
    const int8_t* quants;     // [passes][padded / 4][stride][128], see EightBits
    const GroupScale* scales; // [passes][padded / 4][stride][4]
    uint32_t n_parts;
    uint32_t padded; // the same as whole chunks: what weights and activations have in memory
    uint32_t columns;
    uint32_t stride; // columns that there is room for
    uint32_t passes; // 2 where what 8 bits miss of values is multiplied, too
    uint32_t tiles;  // blocks of rows of all parts, or of those that are gated
};

// The matrix that a block works on.
__device__ __forceinline__ const Part& part_of(const Part parts[PARTS], uint32_t n_parts, uint32_t block) {
    static_assert(PARTS == 3, "two borders");
    return parts[(n_parts > 1 && block >= parts[1].first_block) + (n_parts > 2 && block >= parts[2].first_block)];
}

// Integers come out of tensor cores as floats: sums start at this float's bits, and each unit that
// is added is one unit in its last place. Exact below 2^22.
constexpr int MAGIC = 0x4b400000;
constexpr float MAGIC_VALUE = 12582912.0f;

// A step of activations, whose last two bits are zero, and minus its exact product with MAGIC_VALUE.
__device__ __forceinline__ float2 step_and_offset(float step) { return make_float2(step, -MAGIC_VALUE * step); }

// sums += a · b for 16 rows, 8 columns and 32 elements: lane 4g + t has of a, in words of four elements,
// (row g, word t), (g + 8, t), (g, t + 4), (g + 8, t + 4); of b words t and t + 4 of column g; of sums
// (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
__device__ __forceinline__ void accumulate_group(int sums[4], const uint32_t a[4], uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
#pragma unroll
    for (int half = 0; half < 2; half++) {
#pragma unroll
        for (int k = 0; k < 2; k++) {
            asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0,%1}, {%2}, {%3}, {%0,%1};"
                : "+r"(sums[2 * half]), "+r"(sums[2 * half + 1]) : "r"(a[half + 2 * k]), "r"(k ? b1 : b0));
        }
    }
#endif
}

// The same for 16 elements: a has two words, b one.
__device__ __forceinline__ void accumulate_half(int sums[4], const uint32_t a[2], uint32_t b) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(b));
#else
#pragma unroll
    for (int half = 0; half < 2; half++) {
        asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0,%1}, {%2}, {%3}, {%0,%1};"
            : "+r"(sums[2 * half]), "+r"(sums[2 * half + 1]) : "r"(a[half]), "r"(b));
    }
#endif
}

// d = a · b + MAGIC, as floats.
__device__ __forceinline__ void multiply_group(float d[4], const uint32_t a[4], uint32_t b0, uint32_t b1) {
    int sums[4] = {MAGIC, MAGIC, MAGIC, MAGIC};
    accumulate_group(sums, a, b0, b1);
#pragma unroll
    for (int i = 0; i < 4; i++) d[i] = __int_as_float(sums[i]);
}

__device__ __forceinline__ void multiply_half(float d[4], const uint32_t a[2], uint32_t b) {
    int sums[4] = {MAGIC, MAGIC, MAGIC, MAGIC};
    accumulate_half(sums, a, b);
#pragma unroll
    for (int i = 0; i < 4; i++) d[i] = __int_as_float(sums[i]);
}

// How many scales, and how many offsets, a group of a row has.
template <class T> struct Counts {
    static constexpr int SCALES = T::HALVES ? 2 : 1;
    static constexpr int MINS = T::MIN == Min::None ? 0 : T::MIN == Min::One ? 1 : 2;
    static constexpr int ALL = SCALES + MINS;
};

// What a group of a column adds with: its step, and sums of its values for each offset.
template <class T> struct ColumnScale {
    float2 step; // and offset
    float sums[2];

    __device__ __forceinline__ void set(int scale, int packed) {
        const float value = __int_as_float(scale);
        step = step_and_offset(value);
        const int lower = static_cast<int16_t>(packed), upper = packed >> 16;
        if constexpr (T::MIN == Min::One) sums[0] = value * static_cast<float>(lower + upper);
        if constexpr (T::MIN == Min::Pair) sums[0] = value * static_cast<float>(lower), sums[1] = value * static_cast<float>(upper);
    }
};

// acc[16 rows, 8 columns] += weights · activations of one group. `scale` has, for rows g and g + 8, the scales
// and then the offsets; x those of columns 2t and 2t + 1, or, with one sum, of the only column.
template <class T, int SUMS>
__device__ __forceinline__ void add_group(float acc[4], const uint32_t a[4], uint32_t b0, uint32_t b1,
                                          const float scale[Counts<T>::ALL][2], const ColumnScale<T> x[SUMS]) {
    float d[Counts<T>::SCALES][4];
    if constexpr (T::HALVES) {
        multiply_half(d[0], a, b0);
        multiply_half(d[1], a + 2, b1);
    } else {
        multiply_group(d[0], a, b0, b1);
    }
#pragma unroll
    for (int i = 0; i < 4; i += 3 - SUMS) {
        const ColumnScale<T>& of = x[i % 2];
#pragma unroll
        for (int s = 0; s < Counts<T>::SCALES; s++) {
            acc[i] = __fmaf_rn(__fmaf_rn(d[s][i], of.step.x, of.step.y), scale[s][i / 2], acc[i]);
        }
#pragma unroll
        for (int m = 0; m < Counts<T>::MINS; m++) {
            acc[i] = __fmaf_rn(scale[Counts<T>::SCALES + m][i / 2], of.sums[m], acc[i]);
        }
    }
}
