// What products with many columns share on all GPUs: their arguments, and weights on their way to f16 in
// registers, as tensor cores take them.
#pragma once
#include "floats.cuh"
#include "halves.cuh"
#include "products.cuh"
#include "tensor_cores.cuh"

// Weights are taken times 64 and activations come divided by 16, so that neither leaves the range in
// which f16 is precise.
constexpr float WEIGHT_UNIT = 64.0f;
constexpr float SUM_UNIT = 16.0f / WEIGHT_UNIT;
constexpr int STEP_GROUPS = STEP_ELEMENTS / GROUP;
constexpr int ROW_BYTES = STEP_ELEMENTS * 2;

struct WideArgs {
    Part parts[PARTS];
    const __half* x; // see halves.cuh
    uint32_t n_parts;
    uint32_t padded;
    uint32_t columns;
    uint32_t cols; // elements of a row of floats
};

// What a block works on.
struct Walk {
    const WideArgs& args;
    const Part& part;
    uint32_t first_row, first_column;
};

// The words of the scales of a row's chunk, in as few registers as they fit in: four groups side by side;
// or what all groups of a block share; or, of types with two scales per group, word 0 of each group (16
// bits), word 1 of even and of odd ones, and word 2, which is the block's.
template <class T> struct WideScales {
    static constexpr bool OWN = T::SCALE_GROUPS == 1;
    uint32_t words[OWN ? T::SCALE_BYTES : T::HALVES ? 5 : 4];

    __device__ __forceinline__ void load(const ScaleRow<T>& row, uint32_t chunk) { load_from(row.of(chunk), chunk); }

    // From where those of the chunk's block lie.
    template <class At> __device__ __forceinline__ void load_from(At block, uint32_t chunk) {
        if constexpr (OWN) {
            load_words<CHUNK * T::SCALE_BYTES>(block, words);
        } else {
            if constexpr (!T::HALVES) T::load_scales(block, 0, words);
            if constexpr (T::HALVES) {
                uint32_t s[CHUNK][4];
#pragma unroll
                for (int j = 0; j < CHUNK; j++) T::load_scales(block, chunk % 2 * CHUNK + j, s[j]);
                words[0] = s[0][0] | s[1][0] << 16, words[1] = s[2][0] | s[3][0] << 16;
                words[2] = s[0][1], words[3] = s[1][1], words[4] = s[0][2];
            }
        }
    }

    // Of group j of the chunk, where groups share blocks.
    __device__ __forceinline__ Scales of(uint32_t chunk, int j) const {
        Scales scales;
        const int group = (CHUNK * chunk + j) % T::SCALE_GROUPS;
        if constexpr (T::HALVES) {
            const uint32_t own[3] = {words[j / 2] >> 16 * (j % 2), words[2 + j % 2], words[4]};
            T::scales(own, group, scales);
        } else {
            T::scales(words, group, scales);
        }
        return scales;
    }
};

__device__ __forceinline__ __half2 pair_of(uint32_t bits) { return *reinterpret_cast<__half2*>(&bits); }

// Four signed bytes as f16: the first and third, and the other two.
__device__ __forceinline__ void split_bytes(uint32_t w, __half2 pairs[2]) {
    const __half2 offset = __float2half2_rn(-1152.0f);
    const uint32_t u = w ^ SIGNS;
    pairs[0] = __hadd2(pair_of(__byte_perm(u, 0x64646464u, 0x4240)), offset);
    pairs[1] = __hadd2(pair_of(__byte_perm(u, 0x64646464u, 0x4341)), offset);
}

// The same of the lower or upper nibbles of four bytes: where their bits lie, they are the last of 1024 and more,
// whole or in sixteenths. What is added is minus 1024 or 64, and minus what stands for zero.
__device__ __forceinline__ void split_nibbles(uint32_t w, bool upper, __half2 added, __half2 pairs[2]) {
    const uint32_t mask = upper ? 0x00f000f0u : 0x000f000fu;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const __half2 of = pair_of(selected(w >> 8 * i, mask, 0x64006400u));
        pairs[i] = upper ? __hfma2(of, __float2half2_rn(1.0f / 16), added) : __hadd2(of, added);
    }
}

// What is added for a zero point of one byte: an integer's bits are the last of 1024 and more.
__device__ __forceinline__ __half2 added_for(uint32_t zero, bool upper) {
    const __half2 lower = pair_of(0xe400e400u | zero * 0x10001u);
    return upper ? __hadd2(lower, __float2half2_rn(1024.0f - 64.0f)) : lower;
}

// Lane t's part of a row, UNIT_GROUPS groups of it: on its way, and then as f16, of a lower or upper half of
// a group elements (4t, 4t + 2) and (4t + 1, 4t + 3).
template <class T> struct WideLoads {
    static constexpr int UNIT_GROUPS = CHUNK;
    Raw raw;
    WideScales<T> scales;

    __device__ __forceinline__ void load(const WideArgs& args, const Part& part, uint32_t row, uint32_t chunk, uint32_t t) {
        const uint32_t chunks = args.padded / CHUNK;
        load_raw<T>(part.planes, RowPlace(part.rows, chunks, row).at(chunk), t, raw);
        scales.load(ScaleRow<T>(part.planes, part.rows, chunks, row), chunk);
    }

    __device__ __forceinline__ uint2 decode(uint32_t chunk, int j, int half) const {
        constexpr bool HAS_NIBBLES = T::NIBBLE_ZERO >= 0, HAS_MIN = T::MIN != Min::None && !T::HAS_ZEROS;
        if constexpr (T::IS_FLOAT) return decode_float(chunk, j, half);
        __half2 pairs[2], scale, min;
        if constexpr (T::HAS_ZEROS) {
            split_nibbles(raw.quants[j], half, added_for(T::zero(scales.words, j), half), pairs);
        } else if constexpr (HAS_NIBBLES) {
            split_nibbles(raw.quants[j], half, __float2half2_rn((half ? -64.0f : -1024.0f) - T::NIBBLE_ZERO), pairs);
        } else {
            split_bytes(T::decode(raw, j, half), pairs);
        }
        if constexpr (T::HAS_ZEROS) {
            // A difference of integers is exact, so a weight is rounded once.
            scale = __hmul2(pair_of(T::step(scales.words, j) * 0x10001u), __float2half2_rn(WEIGHT_UNIT));
        } else if constexpr (T::SCALE_GROUPS == 1) {
            constexpr float FACTOR = WEIGHT_UNIT / (HAS_NIBBLES ? 1 : T::UNIT);
            const uint32_t word = scales.words[HAS_MIN ? j : j / 2], selector = !HAS_MIN && j % 2 ? 0x3232 : 0x1010;
            scale = __hmul2(pair_of(__byte_perm(word, 0, selector)), __float2half2_rn(FACTOR));
            if constexpr (HAS_MIN) min = __hmul2(pair_of(__byte_perm(word, 0, 0x3232)), __float2half2_rn(WEIGHT_UNIT));
        } else {
            const Scales s = scales.of(chunk, j);
            scale = __float2half2_rn(WEIGHT_UNIT * s.scale[T::HALVES ? half : 0]);
            if constexpr (HAS_MIN) min = __float2half2_rn(WEIGHT_UNIT * s.min[T::MIN == Min::Pair ? half : 0]);
        }
#pragma unroll
        for (int i = 0; i < 2; i++) pairs[i] = HAS_MIN ? __hfma2(pairs[i], scale, min) : __hmul2(pairs[i], scale);
        return make_uint2(bits_of(pairs[0]), bits_of(pairs[1]));
    }

    // Scales are f32: their products are rounded once.
    __device__ __forceinline__ uint2 decode_float(uint32_t chunk, int j, int half) const {
        __half2 pairs[2];
        split_e4m3(T::decode(raw, j, half), pairs);
        const float unit = WEIGHT_UNIT * scales.of(chunk, j).scale[0];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float2 pair = __half22float2(pairs[i]);
            pairs[i] = __floats2half2_rn(unit * pair.x, unit * pair.y);
        }
        return make_uint2(bits_of(pairs[0]), bits_of(pairs[1]));
    }
};

// The same of float weights, row after row.
template <class T> struct WideFloats {
    static constexpr int UNIT_GROUPS = 4 / T::BYTES;
    uint32_t words[UNIT_GROUPS][2][T::BYTES];

    __device__ __forceinline__ void load(const WideArgs& args, const Part& part, uint32_t row, uint32_t unit, uint32_t t) {
        const uint32_t first = unit * UNIT_GROUPS * GROUP + 4 * t;
        const uint8_t* const from = part.planes.quants + (static_cast<size_t>(row) * args.cols + first) * T::BYTES;
#pragma unroll
        for (int i = 0; i < 2 * UNIT_GROUPS; i++) {
            uint32_t* const to = words[i / 2][i % 2];
#pragma unroll
            for (int k = 0; k < T::BYTES; k++) to[k] = 0;
            if (first + 16 * i < args.cols) load_words<4 * T::BYTES>(from + 16 * i * T::BYTES, to);
        }
    }

    __device__ __forceinline__ uint2 decode(uint32_t, int j, int half) const { return T::halves(words[j][half], WEIGHT_UNIT); }
};

// Rows g and g + 8 of 16, of which lane 4g + t multiplies a part with all columns of a tile.
template <class Loads> struct RowPair {
    Loads rows[2];

    __device__ __forceinline__ void load(const Walk& walk, uint32_t row, uint32_t unit) {
        const uint32_t last = walk.part.rows - 1, t = threadIdx.x % 4;
        unit = min(unit, walk.args.padded / Loads::UNIT_GROUPS - 1);
#pragma unroll
        for (int i = 0; i < 2; i++) rows[i].load(walk.args, walk.part, min(walk.first_row + row + 8 * i, last), unit, t);
    }

    // A half of group j of the unit, as tensor cores take it.
    __device__ __forceinline__ void decode(uint32_t unit, int j, int half, uint32_t a[4]) const {
        const uint2 upper = rows[0].decode(unit, j, half), lower = rows[1].decode(unit, j, half);
        a[0] = upper.x, a[1] = lower.x, a[2] = upper.y, a[3] = lower.y;
    }
};

// Sums as tensor cores leave them: of each 8 columns 2t and 2t + 1, of rows `row` and `row` + 8.
template <int TILES> __device__ __forceinline__ void store_sums(const Walk& walk, uint32_t row, const float (&sums)[TILES][4]) {
    const Part& part = walk.part;
    const uint32_t column = walk.first_column + threadIdx.x % 4 * 2, columns = walk.args.columns;
    row += walk.first_row;
    float bias[2];
#pragma unroll
    for (int i = 0; i < 2; i++) bias[i] = part.bias && row + 8 * i < part.rows ? part.bias[row + 8 * i] : 0.0f;
    float* out = part.out + static_cast<size_t>(column) * part.stride + row;
#pragma unroll
    for (int j = 0; j < TILES; j++) {
#pragma unroll
        for (int k = 0; k < 2; k++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                if (row + 8 * i < part.rows && column + 8 * j + k < columns) out[k * part.stride + 8 * i] = sums[j][2 * i + k] * SUM_UNIT + bias[i];
            }
        out += 8 * static_cast<size_t>(part.stride);
    }
}
