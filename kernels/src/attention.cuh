// The paged store of keys and values, and what kernels for attention share.
//
// Store of one layer, in f16, with head_dim a multiple of 8:
//   keys    [block][kv_head][head_dim / 8][block_tokens][8]
//   values  [block][kv_head][block_tokens][head_dim]
// so that 32 lanes with a token each read keys in 512 bytes in a row, and 32 lanes with a part of a
// head each read a token's value in a row.
#pragma once
#include "rounding.cuh"
#include <cuda_fp16.h>
#include <stdint.h>

struct KvStore {
    __half* keys;
    __half* values;
    uint32_t block_tokens;
    uint32_t n_kv_heads;
    uint32_t head_dim;
    uint32_t unused;

    __device__ size_t head(uint32_t block, uint32_t kv_head) const {
        return (static_cast<size_t>(block) * n_kv_heads + kv_head) * head_dim * block_tokens;
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
