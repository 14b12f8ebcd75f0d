// Weights from the order of their file into the device layout, after they have been copied there:
// one thread per group of 32 elements.
#include "quants.cuh"

// Nibble of element `e` in group `index` of a K block: two groups share 32 bytes.
__device__ __forceinline__ int paired_nibble(const uint8_t* bytes, int index, int e) {
    return bytes[32 * (index / 2) + e] >> 4 * (index % 2) & 15;
}

// Two bits of element `e` in group `index`: four groups share 32 bytes.
__device__ __forceinline__ int shared_crumb(const uint8_t* bytes, int index, int e) {
    return bytes[32 * (index / 4) + e] >> 2 * (index % 4) & 3;
}

__device__ void copy_bytes(uint8_t* to, const uint8_t* from, int bytes) {
    for (int i = 0; i < bytes; i++) to[i] = from[i];
}

template <class Get> __device__ void write_nibbles(uint8_t* to, Get get) {
    for (int j = 0; j < 16; j++) to[j] = static_cast<uint8_t>(get(j) | get(j + 16) << 4);
}

template <class Get> __device__ void write_crumbs(uint8_t* to, Get get) {
    for (int j = 0; j < 8; j++) {
        to[j] = static_cast<uint8_t>(get(j) | get(j + 8) << 2 | get(j + 16) << 4 | get(j + 24) << 6);
    }
}

template <class Get> __device__ void write_bits(uint8_t* to, Get get) {
    uint32_t bits = 0;
    for (int e = 0; e < 32; e++) bits |= static_cast<uint32_t>(get(e)) << e;
    for (int j = 0; j < 4; j++) to[j] = static_cast<uint8_t>(bits >> 8 * j);
}

// What writes one group; `index` counts the groups of a block. The first group writes the scales.
template <class T> struct Pack;

// Types with blocks of 32: scale bytes, high bits, quants, as they lie in the file.
template <class T> struct PackPlain {
    static constexpr int BLOCK_BYTES = T::SCALE_BYTES + T::HIGH_BYTES + T::QUANT_BYTES;
    static __device__ void group(const uint8_t* block, int, uint8_t* quants, uint8_t* highs, uint8_t* scales) {
        copy_bytes(scales, block, T::SCALE_BYTES);
        copy_bytes(highs, block + T::SCALE_BYTES, T::HIGH_BYTES);
        copy_bytes(quants, block + T::SCALE_BYTES + T::HIGH_BYTES, T::QUANT_BYTES);
    }
};
template <> struct Pack<Q4_0> : PackPlain<Q4_0> {};
template <> struct Pack<Q4_1> : PackPlain<Q4_1> {};
template <> struct Pack<Q5_0> : PackPlain<Q5_0> {};
template <> struct Pack<Q5_1> : PackPlain<Q5_1> {};
template <> struct Pack<Q8_0> : PackPlain<Q8_0> {};
template <> struct Pack<Iq4Nl> : PackPlain<Iq4Nl> {};

template <> struct Pack<Iq4Xs> {
    static constexpr int BLOCK_BYTES = 136;
    static __device__ void group(const uint8_t* block, int index, uint8_t* quants, uint8_t*, uint8_t* scales) {
        if (index == 0) copy_bytes(scales, block, 8);
        copy_bytes(quants, block + 8 + 16 * index, 16);
    }
};

template <> struct Pack<Q4K> {
    static constexpr int BLOCK_BYTES = 144;
    static __device__ void group(const uint8_t* block, int index, uint8_t* quants, uint8_t*, uint8_t* scales) {
        if (index == 0) copy_bytes(scales, block, 16);
        write_nibbles(quants, [&](int e) { return paired_nibble(block + 16, index, e); });
    }
};

template <> struct Pack<Q5K> {
    static constexpr int BLOCK_BYTES = 176;
    static __device__ void group(const uint8_t* block, int index, uint8_t* quants, uint8_t* highs, uint8_t* scales) {
        if (index == 0) copy_bytes(scales, block, 16);
        write_nibbles(quants, [&](int e) { return paired_nibble(block + 48, index, e); });
        write_bits(highs, [&](int e) { return block[16 + e] >> index & 1; });
    }
};

template <> struct Pack<Q6K> {
    static constexpr int BLOCK_BYTES = 210;
    static __device__ void group(const uint8_t* block, int index, uint8_t* quants, uint8_t* highs, uint8_t* scales) {
        const int half = index / 4, quarter = index % 4;
        if (index == 0) copy_bytes(scales, block + 192, 18);
        write_nibbles(quants, [&](int e) {
            return block[64 * half + 32 * (quarter % 2) + e] >> 4 * (quarter / 2) & 15;
        });
        write_crumbs(highs, [&](int e) { return shared_crumb(block + 128, index, e); });
    }
};

template <> struct Pack<Q3K> {
    static constexpr int BLOCK_BYTES = 110;
    static __device__ void group(const uint8_t* block, int index, uint8_t* quants, uint8_t* highs, uint8_t* scales) {
        if (index == 0) copy_bytes(scales, block + 96, 14);
        write_crumbs(quants, [&](int e) { return shared_crumb(block + 32, index, e); });
        write_bits(highs, [&](int e) { return block[e] >> index & 1; });
    }
};

template <> struct Pack<Q2K> {
    static constexpr int BLOCK_BYTES = 84;
    static __device__ void group(const uint8_t* block, int index, uint8_t* quants, uint8_t*, uint8_t* scales) {
        if (index == 0) {
            copy_bytes(scales, block, 16);
            copy_bytes(scales + 16, block + 80, 4);
        }
        write_crumbs(quants, [&](int e) { return shared_crumb(block + 16, index, e); });
    }
};

struct PackArgs {
    const uint8_t* file; // the blocks of groups `first` on
    uint64_t first, count;
    uint8_t *quants, *highs, *scales;
};

// Groups `first .. first + count` of a matrix, one per thread.
template <class T> __device__ void pack(const PackArgs& args) {
    const uint64_t own = static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (own >= args.count) return;
    const uint64_t group = args.first + own;
    const uint8_t* block = args.file + own / T::SCALE_GROUPS * Pack<T>::BLOCK_BYTES;
    Pack<T>::group(block, static_cast<int>(own % T::SCALE_GROUPS), args.quants + group * T::QUANT_BYTES,
                   args.highs + group * T::HIGH_BYTES, args.scales + group / T::SCALE_GROUPS * T::SCALE_BYTES);
}

#define PACK(name, T) \
    extern "C" __global__ void pack_##name(const __grid_constant__ PackArgs args) { pack<T>(args); }
PACK(q4_0, Q4_0)
PACK(q4_1, Q4_1)
PACK(q5_0, Q5_0)
PACK(q5_1, Q5_1)
PACK(q8_0, Q8_0)
PACK(iq4_nl, Iq4Nl)
PACK(iq4_xs, Iq4Xs)
PACK(q2_k, Q2K)
PACK(q3_k, Q3K)
PACK(q4_k, Q4K)
PACK(q5_k, Q5K)
PACK(q6_k, Q6K)
