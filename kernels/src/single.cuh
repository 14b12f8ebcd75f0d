// Products of a single column on tensor cores, whose tiles have eight: the columns of a tile stand for eight groups
// of the only one, each with zeros where the others are. So the eight sums of a row and a pair of chunks lie in four
// lanes, and each scale is met once, by the lane that has it.
#pragma once
#include "narrow.cuh"
#include "warp_ring.cuh"

// Integer sums of 16 rows and a pair of chunks, the first of which is even: lane 4g + t has, of rows g and g + 8,
// those of groups 2t and 2t + 1. They begin at MAGIC.
template <class T> struct PairSums {
    int of[Counts<T>::SCALES][4];

    __device__ __forceinline__ void start() {
#pragma unroll
        for (int s = 0; s < Counts<T>::SCALES; s++)
#pragma unroll
            for (int i = 0; i < 4; i++) of[s][i] = MAGIC;
    }

    // Adds a chunk; `words` are this lane's of group g % 4, or zeros where g is not of this chunk.
    __device__ __forceinline__ void add(const Raw raw[2], uint2 words) {
        const uint32_t own = threadIdx.x % 16 / 4;
#pragma unroll
        for (int j = 0; j < CHUNK; j++) {
            uint32_t a[4];
#pragma unroll
            for (int word = 0; word < 4; word++) a[word] = T::decode(raw[word % 2], j, word / 2);
            const uint32_t lower = own == j ? words.x : 0, upper = own == j ? words.y : 0;
            if constexpr (T::HALVES) {
                accumulate_half(of[0], a, lower);
                accumulate_half(of[1], a + 2, upper);
            } else {
                accumulate_group(of[0], a, lower, upper);
            }
        }
    }
};

// Scales of two rows and of groups 2t and 2t + 1 of a pair of chunks, as they come from memory.
template <class T> struct PairScales {
    static constexpr bool HAS_ALL = T::SCALE_GROUPS == 1;
    uint32_t words[2][HAS_ALL ? 1 : 2][HAS_ALL ? T::SCALE_BYTES / 2 : 4] = {};

    // From where those of a chunk lie, row after row, or where they are of both chunks. A lane keeps those of its
    // own: of the first chunk all take some, so that nobody keeps another row's.
    __device__ __forceinline__ void load(SharedAt rows, uint32_t chunk) {
        const uint32_t g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
        if (UNIT_CHUNKS<T> == 1 && chunk % 2 == 1 && t < 2) return;
#pragma unroll
        for (int k = 0; k < 2; k++) {
            const SharedAt row = rows + (g + 8 * k) * UNIT_BYTES<T>;
            if constexpr (HAS_ALL) load_words<2 * T::SCALE_BYTES>(row + t % 2 * (2 * T::SCALE_BYTES), words[k][0]);
            if constexpr (!HAS_ALL) {
#pragma unroll
                for (int i = 0; i < 2; i++) T::load_scales(row, (2 * t + i) % T::SCALE_GROUPS, words[k][i]);
            }
        }
    }

    __device__ __forceinline__ Scales of(int k, int i) const {
        Scales s;
        if constexpr (HAS_ALL) {
            const uint32_t own[4] = {T::SCALE_BYTES == 2 ? words[k][0][0] >> 16 * i & 0xffff : words[k][0][i]};
            T::scales(own, 0, s);
        } else {
            T::scales(words[k][i], (2 * (threadIdx.x % 4) + i) % T::SCALE_GROUPS, s);
        }
        return s;
    }
};

// acc[rows g and g + 8] += the groups of this lane. `x` has step and sums of both.
template <class T> __device__ __forceinline__ void add_pair(float acc[2], const PairSums<T>& sums, const PairScales<T>& scales, int4 x) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        ColumnScale<T> of;
        of.set(i ? x.z : x.x, i ? x.w : x.y);
#pragma unroll
        for (int k = 0; k < 2; k++) {
            const Scales scale = scales.of(k, i);
#pragma unroll
            for (int s = 0; s < Counts<T>::SCALES; s++) {
                acc[k] = __fmaf_rn(__fmaf_rn(__int_as_float(sums.of[s][2 * k + i]), of.step.x, of.step.y), scale.scale[s], acc[k]);
            }
#pragma unroll
            for (int m = 0; m < Counts<T>::MINS; m++) acc[k] = __fmaf_rn(scale.min[m], of.sums[m], acc[k]);
        }
    }
}

// Activations of a single column in shared memory: chunks `first` .. `end`, as Columns has them.
struct SingleColumn {
    static constexpr int WORDS = CHUNK * GROUP, SLOT = WORDS + CHUNK * static_cast<int>(sizeof(GroupScale));
    uint32_t first, end;
    uint32_t words; // addresses in shared memory of what this lane has of a chunk 0: its words, and scales
    uint32_t scales;

    __device__ __forceinline__ SingleColumn(const uint8_t* slots, uint32_t first, uint32_t end) : first(first), end(end) {
        const uint32_t group = threadIdx.x % 16 / 4, t = threadIdx.x % 4, start = shared_address(slots) - first * SLOT;
        words = start + (group / 2 * 4 + t) * 16 + group % 2 * 8;
        scales = start + t / 2 * SLOT + WORDS + t % 2 * 16;
        asm volatile("" : "+r"(words), "+r"(scales));
    }

    // What PairSums adds of a chunk.
    __device__ __forceinline__ uint2 words_of(uint32_t chunk) const {
        uint32_t w[2];
        load_words<8>(SharedAt{words + chunk * SLOT}, w);
        return threadIdx.x % 32 / 16 == chunk % 2 ? make_uint2(w[0], w[1]) : make_uint2(0, 0);
    }

    // Steps and sums of groups 2t and 2t + 1 of a pair of chunks; zeros where they are another range's.
    __device__ __forceinline__ int4 scales_of(uint32_t pair) const {
        const uint32_t chunk = 2 * pair + threadIdx.x % 4 / 2;
        uint32_t w[4] = {};
        if (chunk >= first && chunk < end) load_words<16>(SharedAt{scales + pair * (2 * SLOT)}, w);
        return make_int4(w[0], w[1], w[2], w[3]);
    }
};
