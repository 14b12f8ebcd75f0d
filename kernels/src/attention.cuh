// The paged store of keys and values, and what kernels for attention share.
//
// Store of one layer, in elements of one type (kv_types.cuh), with head_dim a multiple of 8:
//   keys    [block][kv_head] { [head_dim / 8][block_tokens][8], scales }
//   values  [block][kv_head] { [block_tokens][head_dim], scales }
//   scales  [groups][block_tokens] f16, where the type has them
// so that 32 lanes with a token each read keys, and scales, in a row, and 32 lanes with a part of a
// head each read a token's value in a row.
#pragma once
#include "kv_types.cuh"
#include "rounding.cuh"

// Where a key or a value lies.
struct HeadPlace {
    uint8_t* pieces;
    uint16_t* scales;
    uint32_t next_piece; // bytes from one to the next
    uint32_t next_scale; // scales
};

struct KvStore {
    uint8_t* keys;
    uint8_t* values;
    uint32_t block_tokens;
    uint32_t n_kv_heads;
    uint32_t head_dim;
    uint32_t head_bytes; // of a head's keys, or values, in a block

    __device__ __forceinline__ size_t head(uint32_t block, uint32_t kv_head) const {
        return (static_cast<size_t>(block) * n_kv_heads + kv_head) * head_bytes;
    }

    // The key in slot `slot` of the block whose head is at `base`.
    template <typename Type> __device__ __forceinline__ HeadPlace key(size_t base, uint32_t slot) const {
        uint8_t* const first = keys + base;
        return {first + slot * (8 * Type::BYTES), scales<Type>(first, slot), 8 * Type::BYTES * block_tokens, block_tokens};
    }

    template <typename Type> __device__ __forceinline__ HeadPlace value(size_t base, uint32_t slot) const {
        uint8_t* const first = values + base;
        return {first + slot * (head_dim * Type::BYTES), scales<Type>(first, slot), 8 * Type::BYTES, block_tokens};
    }

    template <typename Type> __device__ __forceinline__ uint16_t* scales(uint8_t* first, uint32_t slot) const {
        return reinterpret_cast<uint16_t*>(first + head_dim * block_tokens * Type::BYTES) + slot;
    }
};

// Where each token of a step stands.
struct TokenTable {
    const uint32_t* positions; // [tokens]
    const uint32_t* tables;    // [tokens]: where its sequence's block table starts in `blocks`
    const uint32_t* blocks;
};

struct AttendArgs {
    const float* heads; // [tokens][head_stride]: queries come first
    float* out;         // [tokens][n_heads · head_dim]
    float* partials;    // [chosen][n_heads][segments][head_dim + 2], where there are several segments
    const uint32_t* chosen; // the tokens that attend, or null for all
    TokenTable tokens;
    KvStore store;
    EightBits rounded; // of `out`, or null
    __half* halves;    // of `out`, as in halves.cuh, or null
    float scale, softcap; // softcap 0: none
    uint32_t window;      // 0: none
    uint32_t n_heads, head_stride, segments, n_tokens;
};

// The positions that a token sees: from the window's start to itself.
__device__ __forceinline__ uint32_t seen_from(uint32_t position, uint32_t window) {
    return window && position + 1 > window ? position + 1 - window : 0;
}
