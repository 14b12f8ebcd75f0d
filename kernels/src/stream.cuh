// How products with few columns read: what lies along rows is divided into ranges of chunks; a warp streams the
// weights of its rows and range, and with the other warps of the range its activations, to shared memory, a
// chunk at a time, with some chunks always on their way.
#pragma once
#include "products.cuh"
#include "tensor_cores.cuh"

constexpr int NARROW_WARPS = 8;

// A lane's scales of a chunk of one row, as they come from memory. Of types with a scale for each group it
// has those of all four groups, of others that of group t.
template <class T> struct ChunkScales {
    static constexpr bool HAS_ALL = T::SCALE_GROUPS == 1;
    uint32_t words[HAS_ALL ? CHUNK * T::SCALE_BYTES / 4 : 4];

    // Of chunk `chunk` of the row whose scales start at `row`.
    __device__ __forceinline__ void load(const uint8_t* row, uint32_t chunk) {
        if constexpr (HAS_ALL) {
            load_words<CHUNK * T::SCALE_BYTES>(row + chunk * (CHUNK * T::SCALE_BYTES), words);
        } else {
            T::load_scales(row + chunk / 2 * T::SCALE_BYTES, chunk % 2 * CHUNK + threadIdx.x % 4, words);
        }
    }

    // Scales and offsets of all groups.
    __device__ __forceinline__ void factors(uint32_t chunk, float out[CHUNK][Counts<T>::ALL]) const {
        const uint32_t lane = threadIdx.x % 32;
        Scales s;
        if constexpr (!HAS_ALL) T::scales(words, chunk % 2 * CHUNK + lane % 4, s);
#pragma unroll
        for (int j = 0; j < CHUNK; j++) {
            if constexpr (HAS_ALL) {
                const uint32_t own[4] = {T::SCALE_BYTES == 2 ? words[j / 2] >> 16 * (j % 2) & 0xffff : words[j]};
                T::scales(own, 0, s);
            }
#pragma unroll
            for (int i = 0; i < Counts<T>::ALL; i++) {
                const float own = i < Counts<T>::SCALES ? s.scale[i] : s.min[i - Counts<T>::SCALES];
                out[j][i] = HAS_ALL ? own : __shfl_sync(~0u, own, (lane & ~3) + j);
            }
        }
    }
};

// BYTES bytes to shared memory: 4, 8, 16 or 32.
template <int BYTES> __device__ __forceinline__ void copy_bytes(uint8_t* to, const uint8_t* from) {
    if constexpr (BYTES > 16) {
        copy_16_bytes(to, from);
        copy_16_bytes(to + 16, from + 16);
    } else if constexpr (BYTES == 16) {
        copy_16_bytes(to, from);
    } else {
#if __CUDA_ARCH__ >= 800
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared_address(to)), "l"(from), "n"(BYTES));
#else
        for (int i = 0; i < BYTES / 4; i++) reinterpret_cast<uint32_t*>(to)[i] = reinterpret_cast<const uint32_t*>(from)[i];
#endif
    }
}

constexpr int STREAM_THREADS = 32 * NARROW_WARPS;

template <class T> constexpr int LANE_BYTES = LANE_QUANTS<T> + LANE_HIGHS<T>;

// ROWS rows of a range per lane: quants of DEPTH chunks of each are on their way to shared memory, of which a
// lane reads only what it copied itself; and scales of the next chunk, to registers.
template <class T, int RANGES, int ROWS, int DEPTH> struct Stream {
    static constexpr int SLOT = ROWS * STREAM_THREADS * LANE_BYTES<T>, BYTES = DEPTH * SLOT;

    uint8_t* ring; // [DEPTH][ROWS][threads] quants, and then high bits: from this lane's on
    uint32_t first, count; // chunks
    const uint8_t *quants[ROWS], *highs[ROWS], *scales_of[ROWS];
    ChunkScales<T> scales[ROWS];

    __device__ __forceinline__ Stream(const ProductArgs& args, const Part& part, uint8_t* shared, uint32_t range, uint32_t row, uint32_t distance) : ring(shared) {
        const uint32_t chunks = args.padded / CHUNK, each = (chunks + RANGES - 1) / RANGES, t = threadIdx.x % 4;
        first = min(range * each, chunks), count = min(each, chunks - first);
#pragma unroll
        for (int k = 0; k < ROWS; k++) {
            const size_t own = min(row + k * distance, part.rows - 1), lane = (own * chunks + first) * 4 + t;
            quants[k] = part.planes.quants + lane * LANE_QUANTS<T>;
            highs[k] = part.planes.highs + lane * LANE_HIGHS<T>;
            scales_of[k] = part.planes.scales + own * (args.padded / T::SCALE_GROUPS) * T::SCALE_BYTES;
        }
    }

    __device__ __forceinline__ uint8_t* quants_at(uint32_t slot, int k) const {
        return ring + slot * SLOT + threadIdx.x * LANE_QUANTS<T> + k * STREAM_THREADS * LANE_QUANTS<T>;
    }

    __device__ __forceinline__ uint8_t* highs_at(uint32_t slot, int k) const {
        return ring + slot * SLOT + ROWS * STREAM_THREADS * LANE_QUANTS<T> + threadIdx.x * LANE_HIGHS<T> + k * STREAM_THREADS * LANE_HIGHS<T>;
    }

    // Asks for chunk `index` of the range.
    __device__ __forceinline__ void copy(uint32_t slot, uint32_t index) {
#pragma unroll
        for (int k = 0; k < ROWS; k++) {
            copy_bytes<LANE_QUANTS<T>>(quants_at(slot, k), quants[k] + index * (4 * LANE_QUANTS<T>));
            if constexpr (T::HIGH_BITS > 0) copy_bytes<LANE_HIGHS<T>>(highs_at(slot, k), highs[k] + index * (4 * LANE_HIGHS<T>));
        }
    }

    // Past the end of the range the last one's come.
    __device__ __forceinline__ void load_scales_of(uint32_t index) {
        if (count == 0) return;
#pragma unroll
        for (int k = 0; k < ROWS; k++) scales[k].load(scales_of[k], first + min(index, count - 1));
    }

    __device__ __forceinline__ void take(uint32_t slot, Raw raw[ROWS]) const {
#pragma unroll
        for (int k = 0; k < ROWS; k++) {
            copy_words<LANE_QUANTS<T>>(quants_at(slot, k), raw[k].quants);
            if constexpr (T::HIGH_BITS > 0) copy_words<LANE_HIGHS<T>>(highs_at(slot, k), raw[k].highs);
        }
    }

    // Asks the second cache for scales of 512 bytes of each row, which most ranges don't exceed.
    __device__ __forceinline__ void expect_scales() const {
        constexpr uint32_t LINE = 128;
#pragma unroll
        for (int k = 0; k < ROWS; k++) {
            const uint8_t* from = scales_of[k] + first * CHUNK / T::SCALE_GROUPS * T::SCALE_BYTES;
            const uint32_t at = threadIdx.x % 4 * LINE;
            if (at < count * CHUNK * T::SCALE_BYTES / T::SCALE_GROUPS) asm volatile("prefetch.global.L2 [%0];" ::"l"(from + at));
        }
    }

    // Asks for the first chunks: weights may come before the kernel ahead of this one is done.
    __device__ __forceinline__ void start() {
        expect_scales();
#pragma unroll
        for (uint32_t slot = 0; slot < DEPTH; slot++) {
            if (slot < count) copy(slot, slot);
            commit_copies();
        }
        load_scales_of(0);
    }
};

// One range of TILES · 8 columns, or of a single one: words have 128 bytes a column, whose 16-byte piece p lies
// at p ^ 4 (column % 2); then come scales of pairs of groups, [pair][column % 2][column / 2]. No two of eight
// lanes share a bank. The lanes of WARPS warps copy and read together.
template <int WARPS, int TILES, bool SINGLE> struct Columns {
    static constexpr int COUNT = SINGLE ? 1 : 8 * TILES, HALF = COUNT / 2, LANES = 32 * WARPS;
    static constexpr int WORDS = COUNT * CHUNK * GROUP, SLOT = WORDS + COUNT * CHUNK * static_cast<int>(sizeof(GroupScale));

    uint8_t* ring;
    const uint4* words;
    const int4* scales;
    uint32_t stride, member;

    // Columns from `first` on; this is lane `member` of all. To be made when activations are there: no load of
    // them comes before.
    __device__ __forceinline__ Columns(const ProductArgs& args, uint8_t* shared, uint32_t first, uint32_t member) : ring(shared), stride(args.stride), member(member) {
        const int8_t* quants = args.quants;
        const GroupScale* from = args.scales;
        asm volatile("" : "+l"(quants), "+l"(from)::"memory");
        words = reinterpret_cast<const uint4*>(quants + static_cast<size_t>(first) * (CHUNK * GROUP)) + member;
        scales = reinterpret_cast<const int4*>(from + static_cast<size_t>(first) * CHUNK) + member;
    }

    // Asks for a chunk; `chunk` counts those of earlier passes, too.
    __device__ __forceinline__ void copy(uint32_t slot, uint32_t chunk) const {
        const uint32_t column = member / 8, piece = member % 8, of_scales = member / 2, pair = member % 2;
        const size_t columns = static_cast<size_t>(chunk) * stride;
        uint8_t* to = ring + slot * SLOT;
        if constexpr (SINGLE) {
            if (member < 8) copy_16_bytes(to + member * 16, words + columns * 8);
            if (member < 2) copy_16_bytes(to + WORDS + pair * 16, scales + columns * 2);
            return;
        }
        uint8_t* words_to = to + column * 128 + (piece ^ column % 2 * 4) * 16;
#pragma unroll
        for (int i = 0; i < COUNT * 8 / LANES; i++) copy_16_bytes(words_to + i * LANES * 16, words + columns * 8 + i * LANES);
        uint8_t* scales_to = to + WORDS + ((pair * 2 + of_scales % 2) * HALF + of_scales / 2) * 16;
#pragma unroll
        for (int i = 0; i < (COUNT * 2 + LANES - 1) / LANES; i++) {
            if (COUNT * 2 >= LANES || member < COUNT * 2) copy_16_bytes(scales_to + i * (LANES / 4) * 16, scales + columns * 2 + i * LANES);
        }
    }

    // A lane's words of a pair of groups of tile n: of column g, or the only one.
    __device__ __forceinline__ uint4 words_of(uint32_t slot, int pair, int n) const {
        const uint32_t g = SINGLE ? 0 : threadIdx.x % 32 / 4, t = threadIdx.x % 4;
        return *reinterpret_cast<const uint4*>(ring + slot * SLOT + (8 * n + g) * 128 + ((4 * pair + t) ^ g % 2 * 4) * 16);
    }

    // Scales and sums of column 2t + i of tile n, or of the only one.
    __device__ __forceinline__ int4 scales_of(uint32_t slot, int pair, int n, int i) const {
        const uint32_t place = SINGLE ? pair : (pair * 2 + i) * HALF + 4 * n + threadIdx.x % 4;
        return *reinterpret_cast<const int4*>(ring + slot * SLOT + WORDS + place * 16);
    }
};
