// Rotary embedding of heads, with the norms before it; and how keys and values are stored.
#pragma once
#include "attention.cuh"
#include "launch.cuh"

constexpr int HEAD_DIM_MAX = 256;

struct RotateArgs {
    float* heads; // [tokens][(n_heads + 2 n_kv_heads) · head_dim]
    const float* angles; // [tokens][angle_stride]: cosines of all pairs, then sines
    const float* query_norm; // [head_dim], or null
    const float* key_norm;   // [head_dim], or null
    TokenTable tokens;
    KvStore store;
    float query_eps, key_eps;
    uint32_t n_heads;
    uint32_t angle_stride, pairs;
    uint32_t interleaved; // elements 2i and 2i + 1 turn together; else i and i + pairs
};

// A head of a token that a warp rotates: a query, a key, or a value, which stays as it is. All that no kernel
// writes is on its way before anything is waited for.
struct HeadRotation {
    static constexpr int PER_LANE = HEAD_DIM_MAX / 32;
    const float* values; // [head_dim]
    const float* norm;   // [head_dim], or null
    float eps;
    bool turns;
    float weights[PER_LANE], cos[PER_LANE / 2], sin[PER_LANE / 2];

    // Head `head` of all kinds.
    __device__ __forceinline__ HeadRotation(const RotateArgs& args, uint32_t token, uint32_t head) {
        const uint32_t lane = threadIdx.x % 32, dim = args.store.head_dim, n_kv = args.store.n_kv_heads, n_heads = args.n_heads;
        values = args.heads + (static_cast<size_t>(token) * (n_heads + 2 * n_kv) + head) * dim;
        turns = head < n_heads + n_kv;
        norm = head < n_heads ? args.query_norm : turns ? args.key_norm : nullptr;
        eps = head < n_heads ? args.query_eps : args.key_eps;
        const float* const angles = args.angles + static_cast<size_t>(token) * args.angle_stride;
#pragma unroll
        for (int k = 0; k < PER_LANE; k++) {
            const uint32_t i = lane + 32 * k;
            weights[k] = norm && i < dim ? norm[i] : 1.0f;
            if (k >= PER_LANE / 2) continue;
            const bool own = turns && i < args.pairs;
            cos[k] = own ? angles[i] : 1.0f;
            sin[k] = own ? angles[args.pairs + i] : 0.0f;
        }
    }

    // Rotated, to shared memory `out`.
    __device__ __forceinline__ void rotate(const RotateArgs& args, float* out) const {
        const uint32_t lane = threadIdx.x % 32, dim = args.store.head_dim;
        float own[PER_LANE];
#pragma unroll
        for (int k = 0; k < PER_LANE; k++) own[k] = lane + 32 * k < dim ? values[lane + 32 * k] : 0.0f;
        float scale = 1.0f;
        if (norm) {
            float squares = 0;
#pragma unroll
            for (int k = 0; k < PER_LANE; k++) squares = __fmaf_rn(own[k], own[k], squares);
            scale = 1.0f / sqrtf(warp_sum(squares) / static_cast<float>(dim) + eps);
        }
#pragma unroll
        for (int k = 0; k < PER_LANE; k++) {
            if (lane + 32 * k < dim) out[lane + 32 * k] = norm ? own[k] * scale * weights[k] : own[k];
        }
        __syncwarp();
        if (!turns) return;
#pragma unroll
        for (int k = 0; k < PER_LANE / 2; k++) {
            const uint32_t pair = lane + 32 * k;
            if (pair >= args.pairs) break;
            const uint32_t a = args.interleaved ? 2 * pair : pair, b = args.interleaved ? 2 * pair + 1 : pair + args.pairs;
            const float x = out[a], y = out[b];
            out[a] = __fmaf_rn(x, cos[k], -(y * sin[k]));
            out[b] = __fmaf_rn(x, sin[k], y * cos[k]);
        }
        __syncwarp();
    }
};

// A warp's head, rotated where it is a key, as the store keeps it: to a place, and to another one if that is there.
template <typename Type> __device__ __forceinline__ void store_head(const float* head, uint32_t dim, bool is_key, HeadPlace to, HeadPlace also = {}) {
    const uint32_t lane = threadIdx.x % 32;
    for (uint32_t first = 0; first < dim; first += KV_GROUP) {
        const uint32_t i = first + lane;
        const Kept kept = Type::keep(i < dim ? head[i] : 0.0f, is_key && first + KV_GROUP <= dim);
#pragma unroll
        for (int copy = 0; copy < 2; copy++) {
            const HeadPlace place = copy == 1 ? also : to;
            if (i >= dim || !place.pieces) continue;
            uint8_t* const at = place.pieces + i / 8 * place.next_piece + i % 8 * Type::BYTES;
            if constexpr (Type::BYTES == 2) *reinterpret_cast<uint16_t*>(at) = kept.bits;
            else *at = kept.bits;
            if (Type::HAS_SCALES && lane == 0) place.scales[first / KV_GROUP * place.next_scale] = kept.scale;
        }
    }
}

// Queries that meet rotated keys are rotated, too: a warp's, in shared memory.
template <typename Type> __device__ __forceinline__ void turn_query(float* query, uint32_t dim) {
    if constexpr (!Type::HAS_SCALES) return;
    for (uint32_t first = 0; first + KV_GROUP <= dim; first += KV_GROUP) {
        float& own = query[first + threadIdx.x % 32];
        own = turned(own);
    }
    __syncwarp();
}
