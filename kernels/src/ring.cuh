// How a lane streams weights: the next chunks of its rows are always on their way to shared memory, where it
// alone reads them.
#pragma once
#include "quants.cuh"
#include "tensor_cores.cuh"

// BYTES bytes, 4, 8, 16 or 32, to shared memory by its own address, which compilers do not make anew.
template <int BYTES> __device__ __forceinline__ void copy_to(uint32_t to, const uint8_t* from) {
#if __CUDA_ARCH__ >= 800
    if constexpr (BYTES >= 16) asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from));
    if constexpr (BYTES == 32) asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + 16), "l"(from + 16));
    if constexpr (BYTES < 16) asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from), "n"(BYTES));
#else
#pragma unroll
    for (int i = 0; i < BYTES / 4; i++) asm volatile("st.shared.b32 [%0], %1;" ::"r"(to + 4 * i), "r"(__ldg(reinterpret_cast<const uint32_t*>(from) + i)));
#endif
}

template <int BYTES> __device__ __forceinline__ void copy_bytes(uint8_t* to, const uint8_t* from) { copy_to<BYTES>(shared_address(to), from); }

template <class T> constexpr int LANE_BYTES = LANE_QUANTS<T> + LANE_HIGHS<T>;

// Quants and high bits of a row, from a lane's part of some chunk on.
template <class T> struct LaneRow {
    const uint8_t *quants, *highs;
    uint32_t step; // from chunk to chunk

    __device__ __forceinline__ LaneRow() {}

    // Of a matrix of `rows` rows of `chunks` chunks.
    __device__ __forceinline__ LaneRow(const Planes& planes, uint32_t rows, uint32_t chunks, uint32_t row, uint32_t first) {
        const RowPlace place(rows, chunks, row);
        const uint32_t lane = place.at(first) * 4 + threadIdx.x % 4;
        step = place.step;
        quants = planes.quants + static_cast<size_t>(lane) * LANE_QUANTS<T>, highs = planes.highs + static_cast<size_t>(lane) * LANE_HIGHS<T>;
    }
};

// DEPTH slots for a chunk of ROWS rows of each of THREADS lanes; two rows next to each other are of one block.
template <class T, int ROWS, int DEPTH, int THREADS> struct LaneRing {
    static constexpr int SLOT = ROWS * THREADS * LANE_BYTES<T>, BYTES = DEPTH * SLOT;

    uint8_t* shared; // [DEPTH][ROWS][threads] quants, and then high bits

    __device__ __forceinline__ uint8_t* quants_at(uint32_t slot, int k) const {
        return shared + slot * SLOT + (k * THREADS + threadIdx.x) * LANE_QUANTS<T>;
    }

    __device__ __forceinline__ uint8_t* highs_at(uint32_t slot, int k) const {
        return shared + slot * SLOT + ROWS * THREADS * LANE_QUANTS<T> + (k * THREADS + threadIdx.x) * LANE_HIGHS<T>;
    }

    // Asks for chunk `index` of each row.
    __device__ __forceinline__ void copy(uint32_t slot, const LaneRow<T> rows[ROWS], uint32_t index) const {
#pragma unroll
        for (int k = 0; k < ROWS; k++) {
            copy_bytes<LANE_QUANTS<T>>(quants_at(slot, k), rows[k].quants + index * rows[k / 2 * 2].step * (4 * LANE_QUANTS<T>));
            if constexpr (T::HIGH_BITS > 0) copy_bytes<LANE_HIGHS<T>>(highs_at(slot, k), rows[k].highs + index * rows[k / 2 * 2].step * (4 * LANE_HIGHS<T>));
        }
    }

    __device__ __forceinline__ void take(uint32_t slot, int k, Raw& raw) const {
        copy_words<LANE_QUANTS<T>>(quants_at(slot, k), raw.quants);
        if constexpr (T::HIGH_BITS > 0) copy_words<LANE_HIGHS<T>>(highs_at(slot, k), raw.highs);
    }
};
