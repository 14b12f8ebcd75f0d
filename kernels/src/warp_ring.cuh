// How a warp streams tiles of 16 rows of a matrix whose rows are a multiple of that: a chunk of a tile lies in one
// piece in memory, its quants, its high bits and its scales, and so it does in shared memory. A lane reads quants
// and high bits that it copied itself, and scales that others did.
#pragma once
#include "ring.cuh"

constexpr int TILE_ROWS = 16;

// What is asked for of a tile: this lane's part of quants and high bits of a chunk, rows g and g + 8, and of scales.
template <class T> struct TileRows {
    // Bytes of a chunk of a tile, and of what scales lie together.
    static constexpr uint32_t QUANTS = 64 * LANE_QUANTS<T>, HIGHS = 64 * LANE_HIGHS<T>, SCALES = TILE_ROWS * UNIT_BYTES<T>;
    static_assert(SCALES % 16 == 0 && SCALES <= 32 * 16, "a copy of 16 bytes for each lane");
    const uint8_t *quants, *highs, *scales;

    // From chunk `first` of tile `tile` on, of a matrix of `chunks` chunks.
    __device__ __forceinline__ void aim(const Planes& planes, uint32_t chunks, uint32_t tile, uint32_t first) {
        const uint32_t lane = threadIdx.x % 32;
        const size_t chunk = static_cast<size_t>(tile) * chunks + first;
        quants = planes.quants + chunk * QUANTS + lane * LANE_QUANTS<T>;
        highs = planes.highs + chunk * HIGHS + lane * LANE_HIGHS<T>;
        scales = planes.scales + (static_cast<size_t>(tile) * (chunks / UNIT_CHUNKS<T>) + first / UNIT_CHUNKS<T>) * SCALES + lane * 16;
    }

    // To chunk `next` from the one before it.
    __device__ __forceinline__ void advance(uint32_t next) {
        quants += QUANTS, highs += HIGHS;
        if (next % UNIT_CHUNKS<T> == 0) scales += SCALES;
    }
};

// This lane's part of a chunk of a tile that lies in shared memory: of row g, or g + 8.
template <class T> __device__ __forceinline__ void take_row(uint32_t chunk, int k, Raw& raw) {
    constexpr int OF_QUANTS = LANE_QUANTS<T>, OF_HIGHS = LANE_HIGHS<T>;
    const uint32_t lane = threadIdx.x % 32;
    load_words<OF_QUANTS>(SharedAt{chunk + lane * OF_QUANTS + k * (32 * OF_QUANTS)}, raw.quants);
    if constexpr (OF_HIGHS > 0) load_words<OF_HIGHS>(SharedAt{chunk + lane * OF_HIGHS + (TileRows<T>::QUANTS + k * (32 * OF_HIGHS))}, raw.highs);
}

// The ring of one of WARPS warps: DEPTH slots for a chunk.
template <class T, int DEPTH, int WARPS> struct WarpRing {
    using Rows = TileRows<T>;
    static constexpr uint32_t CHUNK_BYTES = Rows::QUANTS + Rows::HIGHS + Rows::SCALES, SLOT = WARPS * CHUNK_BYTES, BYTES = DEPTH * SLOT;

    uint32_t start, at; // addresses in shared memory, of the first slot and of one

    __device__ __forceinline__ explicit WarpRing(const void* shared) {
        start = shared_address(shared) + threadIdx.x / 32 * CHUNK_BYTES;
        // Or else it is made anew wherever it is needed.
        asm volatile("" : "+r"(start));
        at = start;
    }

    __device__ __forceinline__ void copy(const Rows& from, bool with_scales) const {
        constexpr int OF_QUANTS = LANE_QUANTS<T>, OF_HIGHS = LANE_HIGHS<T>;
        const uint32_t lane = threadIdx.x % 32;
#pragma unroll
        for (int k = 0; k < 2; k++) {
            copy_to<OF_QUANTS>(at + lane * OF_QUANTS + k * (32 * OF_QUANTS), from.quants + k * (32 * OF_QUANTS));
            if constexpr (OF_HIGHS > 0) copy_to<OF_HIGHS>(at + lane * OF_HIGHS + (Rows::QUANTS + k * (32 * OF_HIGHS)), from.highs + k * (32 * OF_HIGHS));
        }
        if (with_scales && lane < Rows::SCALES / 16) copy_to<16>(scales().at + lane * 16, from.scales);
    }

    // What lies in a slot, rows g and g + 8.
    __device__ __forceinline__ void take(Raw raw[2]) const {
#pragma unroll
        for (int k = 0; k < 2; k++) take_row<T>(at, k, raw[k]);
    }

    // Of row 0.
    __device__ __forceinline__ SharedAt scales() const { return {at + Rows::QUANTS + Rows::HIGHS}; }

    __device__ __forceinline__ void advance() {
        at += SLOT;
        if (at == start + BYTES) at = start;
    }
};
