// Attention of single tokens over the paged store, with what comes before and after it:
//
//   queries are rotated, and keys and values stored, where no other token of the step belongs to the sequence
//   out = softmax(softcap(scale · q · Kᵀ) + causal mask) · V per query head, and the same rounded
//
// µs on an H200 (2026-11-30), 32 heads of 128 over 8 KV heads, f16: a token with 100, 1,000 and 8,000 positions 6.0, 10.7
// and 24.6 (1,330 GB/s of keys and values); 32 tokens with 1,000 each 65 (2,020), 128 with 100 each 44.
#include "halves.cuh"
#include "rotate.cuh"

constexpr int ATTEND_WARPS = 8;
constexpr int RUN = 32; // positions of a warp, one per lane
// Positions that one block attends to; several blocks' parts are merged in ascending order. Fixed,
// so that a token's bits do not depend on what else is in the batch.
constexpr int SEGMENT = ATTEND_WARPS * RUN;

struct RotatedAttendArgs {
    AttendArgs attend;
    RotateArgs rotate;
};

// Where a block works: HEADS query heads of one KV head of one token over one segment; a warp has the positions
// `first` .. of it, of which it sees `begin` .. `end`.
struct Place {
    uint32_t token, position, segment, kv_head, first_head, heads, start, stop, first;
    size_t base; // of this lane's position, in the store
    uint32_t slot;

    template <int HEADS> static __device__ __forceinline__ Place of(const AttendArgs& args) {
        const KvStore& store = args.store;
        const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = args.n_heads / store.n_kv_heads;
        const uint32_t chunks = (group + HEADS - 1) / HEADS;
        Place at;
        at.token = args.chosen ? args.chosen[blockIdx.y] : blockIdx.y, at.segment = blockIdx.z;
        at.kv_head = blockIdx.x / chunks, at.first_head = at.kv_head * group + blockIdx.x % chunks * HEADS;
        at.heads = min(static_cast<uint32_t>(HEADS), (at.kv_head + 1) * group - at.first_head);
        at.position = args.tokens.positions[at.token];
        at.start = max(seen_from(at.position, args.window), at.segment * SEGMENT);
        at.stop = min(at.position + 1, (at.segment + 1) * SEGMENT);
        at.first = at.segment * SEGMENT + warp * RUN;
        const uint32_t own = min(at.first + lane, at.position);
        const uint32_t block = args.tokens.blocks[args.tokens.tables[at.token] + own / store.block_tokens];
        at.base = store.head(block, at.kv_head), at.slot = own % store.block_tokens;
        return at;
    }

    __device__ __forceinline__ bool has_positions() const { return first < stop && first + RUN > start; }
    __device__ __forceinline__ bool sees(uint32_t at) const { return at >= start && at < stop; }
};

// This lane's key, a piece at a time, and scales, on their way; and a lane's line of values, to the second cache.
template <typename Type, int DIM> struct OwnKey {
    static constexpr int GROUPS = DIM / KV_GROUP;
    typename Type::Piece packed[DIM / 8];
    uint16_t key_scales[GROUPS], value_scales[GROUPS]; // unused, and not there, where the type has none

    __device__ __forceinline__ void load(const KvStore& store, const Place& at) {
        const HeadPlace value = store.value<Type>(at.base, at.slot);
        take(store.key<Type>(at.base, at.slot), value, store.head_dim);
        const uint32_t bytes = store.head_dim * Type::BYTES;
        for (uint32_t i = 0; i < bytes; i += 128) prefetch(value.pieces + i);
    }

    // The key, and scales of the value, from some places.
    __device__ __forceinline__ void take(const HeadPlace& key, const HeadPlace& value, uint32_t dim) {
#pragma unroll
        for (int i = 0; i < DIM / 8; i++) {
            packed[i] = 8 * i < dim ? *reinterpret_cast<const typename Type::Piece*>(key.pieces + static_cast<size_t>(i) * key.next_piece) : typename Type::Piece();
        }
        if constexpr (Type::HAS_SCALES) {
#pragma unroll
            for (int g = 0; g < GROUPS; g++) {
                const bool is_there = KV_GROUP * g < dim;
                key_scales[g] = is_there ? key.scales[g * key.next_scale] : 0;
                value_scales[g] = is_there ? value.scales[g * value.next_scale] : 0;
            }
        }
    }

    // Scores for HEADS query heads from `queries` (in shared memory).
    template <int HEADS> __device__ __forceinline__ void score(const float* queries, uint32_t dim, float scores[HEADS]) const {
#pragma unroll
        for (int h = 0; h < HEADS; h++) scores[h] = 0;
#pragma unroll
        for (int i = 0; i < DIM / 8; i++) {
            const uint32_t d = 8 * i;
            if (d >= dim) break;
            float2 k[4];
            numbers_of<Type>(packed[i], k);
            if constexpr (Type::HAS_SCALES) {
                const float scale = __half2float(__ushort_as_half(key_scales[d / KV_GROUP]));
#pragma unroll
                for (int j = 0; j < 4; j++) k[j].x *= scale, k[j].y *= scale;
            }
#pragma unroll
            for (int h = 0; h < HEADS; h++) {
                const float4* q = reinterpret_cast<const float4*>(queries + h * dim + d);
                const float4 a = q[0], b = q[1];
                float sum = scores[h];
                sum = __fmaf_rn(a.x, k[0].x, sum), sum = __fmaf_rn(a.y, k[0].y, sum);
                sum = __fmaf_rn(a.z, k[1].x, sum), sum = __fmaf_rn(a.w, k[1].y, sum);
                sum = __fmaf_rn(b.x, k[2].x, sum), sum = __fmaf_rn(b.y, k[2].y, sum);
                sum = __fmaf_rn(b.z, k[3].x, sum), sum = __fmaf_rn(b.w, k[3].y, sum);
                scores[h] = sum;
            }
        }
    }
};

// What a warp knows of its positions: the largest score, the sum of the weights relative to it, and of the values
// with these weights. A lane has elements 2 · lane and the next of each 64.
template <int DIM, int HEADS> struct Running {
    float max[HEADS], weight[HEADS];
    float2 sums[HEADS][DIM / 64];
};

// Turns scores into weights. Those of positions that are not seen are zero.
template <int DIM, int HEADS> __device__ __forceinline__ void weigh(Running<DIM, HEADS>& state, float scores[HEADS], bool visible) {
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
        float top = visible ? scores[h] : -INFINITY;
        // A score that is not a number must reach the sums.
        if (visible && isnan(scores[h])) top = INFINITY;
#pragma unroll
        for (int distance = 16; distance > 0; distance /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, distance));
        state.max[h] = top;
        scores[h] = visible ? expf(scores[h] - top) : 0.0f;
        state.weight[h] = warp_sum(scores[h]);
    }
}

// What a warp has for its positions in shared memory: their weights, and the scales of their values.
struct Weighing {
    float* weights; // [RUN][HEADS]
    float* scales;  // [RUN][DIM / KV_GROUP], where the type has them
};

// Adds up the values of a warp's positions. The value of position `own_at`, if it is one of them, is `own_value`.
template <typename Type, int DIM, int HEADS>
__device__ __forceinline__ void add_values(Running<DIM, HEADS>& state, const KvStore& store, const Place& at, const float scores[HEADS],
                                           const OwnKey<Type, DIM>& key, const Weighing& room, const uint8_t* own_value, uint32_t own_at) {
    constexpr int GROUPS = DIM / KV_GROUP;
    const uint32_t lane = threadIdx.x % 32, dim = store.head_dim;
#pragma unroll
    for (int h = 0; h < HEADS; h++) room.weights[lane * HEADS + h] = scores[h];
    if constexpr (Type::HAS_SCALES) {
#pragma unroll
        for (int g = 0; g < GROUPS; g++) room.scales[lane * GROUPS + g] = __half2float(__ushort_as_half(key.value_scales[g]));
    }
    __syncwarp();
    const size_t value = at.base + at.slot * (dim * Type::BYTES);
    const uint32_t begin = at.start > at.first ? at.start - at.first : 0, end = min(at.stop - at.first, static_cast<uint32_t>(RUN));
    constexpr int AT_ONCE = DIM > 128 ? 8 : 16;
    for (uint32_t first = begin; first < end; first += AT_ONCE) {
        uint32_t v[AT_ONCE][DIM / 64];
#pragma unroll
        for (int p = 0; p < AT_ONCE; p++) {
            const size_t from = __shfl_sync(~0u, value, (first + p) % 32);
            const uint8_t* const source = first + p == own_at ? own_value : store.values + from;
#pragma unroll
            for (int d = 0; d < DIM / 64; d++) {
                const uint32_t i = 2 * lane + 64 * d;
                v[p][d] = i < dim && first + p < end ? load_pair<Type>(source + i * Type::BYTES) : 0;
            }
        }
#pragma unroll
        for (int p = 0; p < AT_ONCE; p++) {
            if (first + p >= end) break;
            float2 of[DIM / 64];
#pragma unroll
            for (int d = 0; d < DIM / 64; d++) {
                of[d] = Type::template pair<0>(v[p][d]);
                if constexpr (Type::HAS_SCALES) {
                    const float scale = room.scales[(first + p) * GROUPS + 2 * d + lane / 16];
                    of[d].x *= scale, of[d].y *= scale;
                }
            }
#pragma unroll
            for (int h = 0; h < HEADS; h++) {
                const float weight = room.weights[(first + p) * HEADS + h];
#pragma unroll
                for (int d = 0; d < DIM / 64; d++) {
                    state.sums[h][d].x = __fmaf_rn(weight, of[d].x, state.sums[h][d].x);
                    state.sums[h][d].y = __fmaf_rn(weight, of[d].y, state.sums[h][d].y);
                }
            }
        }
    }
}

// Four elements of a token's result, from element i of all on, and the same rounded.
__device__ __forceinline__ void store_attended(const AttendArgs& args, uint32_t token, uint32_t i, float4 v, bool stores) {
    const uint32_t cols = args.n_heads * args.store.head_dim;
    if (stores) *reinterpret_cast<float4*>(args.out + static_cast<size_t>(token) * cols + i) = v;
    if (args.halves) store_halves(v, args.halves, args.n_tokens, token, i, stores);
    if (args.rounded.quants) round_row_group(v, args.rounded, token, cols, i, stores);
}

// The warps' states, merged in their order: a warp for each head.
template <int HEADS> __device__ __forceinline__ void merge_warps(const AttendArgs& args, const Place& at, const float* states) {
    const uint32_t lane = threadIdx.x % 32, dim = args.store.head_dim, width = dim + 2;
    for (uint32_t h = threadIdx.x / 32; h < at.heads; h += ATTEND_WARPS) {
        const float* const of = states + h * width;
        constexpr uint32_t NEXT = HEADS;
        float max = -INFINITY, weight = 0, factors[ATTEND_WARPS];
#pragma unroll
        for (int w = 0; w < ATTEND_WARPS; w++) max = fmaxf(max, of[w * NEXT * width + dim]);
#pragma unroll
        for (int w = 0; w < ATTEND_WARPS; w++) {
            const float top = of[w * NEXT * width + dim];
            factors[w] = top == -INFINITY ? 0.0f : expf(top - max);
            weight = __fmaf_rn(of[w * NEXT * width + dim + 1], factors[w], weight);
        }
        const uint32_t head = at.first_head + h;
        const size_t row = static_cast<size_t>(blockIdx.y) * args.n_heads + head;
        float* const partial = args.partials + (row * args.segments + at.segment) * width;
        for (uint32_t base = 0; base < dim; base += 128) {
            const uint32_t i = base + 4 * lane;
            float v[4] = {};
#pragma unroll
            for (int k = 0; k < 4; k++) {
                if (i >= dim) break;
#pragma unroll
                for (int w = 0; w < ATTEND_WARPS; w++) v[k] = __fmaf_rn(of[w * NEXT * width + i + k], factors[w], v[k]);
                if (args.segments > 1) partial[i + k] = v[k];
            }
            if (args.segments > 1) continue;
            store_attended(args, at.token, head * dim + i, make_float4(v[0] / weight, v[1] / weight, v[2] / weight, v[3] / weight), i < dim);
        }
        if (args.segments > 1 && lane == 0) partial[dim] = max, partial[dim + 1] = weight;
    }
}

// Queries to shared memory, with zeros for heads that do not exist.
template <int HEADS> __device__ __forceinline__ void load_queries(const AttendArgs& args, const Place& at, float* queries) {
    const uint32_t dim = args.store.head_dim;
    for (uint32_t i = threadIdx.x; i < HEADS * dim; i += ATTEND_WARPS * 32) {
        queries[i] = i / dim < at.heads ? args.heads[static_cast<size_t>(at.token) * args.head_stride + at.first_head * dim + i] : 0.0f;
    }
}

// The key and value of the token itself as the store keeps them, in shared memory.
template <typename Type> struct OwnHeads {
    uint8_t* first;
    uint32_t dim;

    __device__ __forceinline__ HeadPlace of(bool is_key) const {
        const uint32_t bytes = dim * Type::BYTES, groups = (dim + KV_GROUP - 1) / KV_GROUP;
        uint16_t* const scales = reinterpret_cast<uint16_t*>(first + 2 * bytes);
        return {first + (is_key ? 0 : bytes), scales + (is_key ? 0 : groups), 8 * Type::BYTES, 1};
    }
};

// The same, rotated; with the token's key and value behind them, also as they are kept to `own` and, once, to the store.
template <typename Type, int HEADS>
__device__ __forceinline__ void rotate_queries(const RotateArgs& args, const Place& at, const HeadRotation& rotation, float* queries, const OwnHeads<Type>& own) {
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, dim = args.store.head_dim, group = args.n_heads / args.store.n_kv_heads;
    static_assert(HEADS + 2 <= ATTEND_WARPS, "a warp for each head");
    if (warp >= HEADS + 2) return;
    float* const out = queries + warp * dim;
    if (warp < HEADS && warp >= at.heads) {
        for (uint32_t i = lane; i < dim; i += 32) out[i] = 0;
        return;
    }
    rotation.rotate(args, out);
    if (warp < HEADS) return turn_query<Type>(out, dim);
    const bool is_key = warp == HEADS;
    const uint32_t tokens = args.store.block_tokens, slot = at.position % tokens;
    const uint32_t block = args.tokens.blocks[args.tokens.tables[at.token] + at.position / tokens];
    const size_t base = args.store.head(block, at.kv_head);
    HeadPlace stored = is_key ? args.store.key<Type>(base, slot) : args.store.value<Type>(base, slot);
    if (at.position / SEGMENT != at.segment || at.first_head != at.kv_head * group) stored.pieces = nullptr;
    store_head<Type>(out, dim, is_key, own.of(is_key), stored);
}

// Shared memory: queries, and keys and values of the token; weights of each warp's positions; states of the warps;
// scales of values.
template <typename Type, int DIM, int HEADS, bool ROTATES> __device__ __forceinline__ void attend(const AttendArgs& args, const RotateArgs* rotate) {
    extern __shared__ __align__(16) float attend_shared[];
    let_next_start();
    const KvStore& store = args.store;
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, dim = store.head_dim, width = dim + 2;
    float *const queries = attend_shared, *const weights = queries + (HEADS + 3) * dim, *const states = weights + SEGMENT * HEADS;
    const OwnHeads<Type> own = {reinterpret_cast<uint8_t*>(queries + (HEADS + 2) * dim), dim};
    // No kernel of the step writes tables; and none but this one keys and values, where it rotates.
    const Place at = Place::of<HEADS>(args);
    OwnKey<Type, DIM> key;
    if constexpr (ROTATES) {
        const uint32_t head = warp < HEADS ? at.first_head + min(warp, at.heads - 1) : args.n_heads + (warp > HEADS ? store.n_kv_heads : 0) + at.kv_head;
        const HeadRotation rotation(*rotate, at.token, head);
        if (at.has_positions()) key.load(store, at);
        wait_for_earlier();
        if (args.segments > 1 && at.start >= at.stop) return;
        rotate_queries<Type, HEADS>(*rotate, at, rotation, queries, own);
    } else {
        wait_for_earlier();
        if (args.segments > 1 && at.start >= at.stop) return;
        if (at.has_positions()) key.load(store, at);
        load_queries<HEADS>(args, at, queries);
    }
    __syncthreads();
    Running<DIM, HEADS> state = {};
#pragma unroll
    for (int h = 0; h < HEADS; h++) state.max[h] = -INFINITY;
    if (at.has_positions()) {
        const uint32_t own_at = ROTATES ? at.position - at.first : ~0u;
        if (ROTATES && lane == own_at) key.take(own.of(true), own.of(false), dim);
        float scores[HEADS];
        key.template score<HEADS>(queries, dim, scores);
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
            scores[h] *= args.scale;
            if (args.softcap > 0) scores[h] = args.softcap * tanhf(scores[h] / args.softcap);
        }
        weigh<DIM, HEADS>(state, scores, at.sees(at.first + lane));
        const Weighing room = {weights + warp * RUN * HEADS, states + ATTEND_WARPS * HEADS * width + warp * RUN * (DIM / KV_GROUP)};
        add_values<Type, DIM, HEADS>(state, store, at, scores, key, room, own.of(false).pieces, own_at);
    }
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
        float* const of = states + (warp * HEADS + h) * width;
        if (lane == 0) of[dim] = state.max[h], of[dim + 1] = state.weight[h];
#pragma unroll
        for (int d = 0; d < DIM / 64; d++) {
            const uint32_t i = 2 * lane + 64 * d;
            if (i < dim) of[i] = state.sums[h][d].x, of[i + 1] = state.sums[h][d].y;
        }
    }
    __syncthreads();
    merge_warps<HEADS>(args, at, states);
}

#define ATTEND(name, type, dims, heads)                                                                           \
    extern "C" __global__ void __launch_bounds__(ATTEND_WARPS * 32, dims > 128 ? 1 : 2)                           \
        attend_##name##_##dims##_##heads(const __grid_constant__ AttendArgs args) {                               \
        attend<type, dims, heads, false>(args, nullptr);                                                          \
    }                                                                                                             \
    extern "C" __global__ void __launch_bounds__(ATTEND_WARPS * 32, dims > 128 ? 1 : 2)                           \
        rotate_attend_##name##_##dims##_##heads(const __grid_constant__ RotatedAttendArgs args) {                 \
        attend<type, dims, heads, true>(args.attend, &args.rotate);                                               \
    }
#define ATTEND_TYPE(name, type) \
    ATTEND(name, type, 64, 1)   \
    ATTEND(name, type, 64, 4)   \
    ATTEND(name, type, 128, 1)  \
    ATTEND(name, type, 128, 4)  \
    ATTEND(name, type, 256, 1)  \
    ATTEND(name, type, 256, 4)
ATTEND_TYPE(f16, KvF16)
ATTEND_TYPE(bf16, KvBf16)
ATTEND_TYPE(fp8_e4m3, KvE4m3)
ATTEND_TYPE(q8_0, KvQ8)

// Merges the segments of one head of one token: grid (heads, tokens), one warp.
extern "C" __global__ void __launch_bounds__(32) merge_segments(const __grid_constant__ AttendArgs args) {
    begin();
    const uint32_t head = blockIdx.x, lane = threadIdx.x, dim = args.store.head_dim, width = dim + 2;
    const uint32_t token = args.chosen ? args.chosen[blockIdx.y] : blockIdx.y;
    const float* partials = args.partials + (static_cast<size_t>(blockIdx.y) * args.n_heads + head) * args.segments * width;
    const uint32_t position = args.tokens.positions[token];
    const uint32_t first = seen_from(position, args.window) / SEGMENT, last = position / SEGMENT;
    float max = -INFINITY, weight = 0;
    for (uint32_t s = first; s <= last; s++) max = fmaxf(max, partials[s * width + dim]);
    for (uint32_t s = first; s <= last; s++) weight = __fmaf_rn(partials[s * width + dim + 1], expf(partials[s * width + dim] - max), weight);
    for (uint32_t base = 0; base < dim; base += 128) {
        const uint32_t i = base + 4 * lane;
        float v[4] = {};
        if (i < dim) {
            for (uint32_t s = first; s <= last; s++) {
                const float factor = expf(partials[s * width + dim] - max);
#pragma unroll
                for (int k = 0; k < 4; k++) v[k] = __fmaf_rn(partials[s * width + i + k], factor, v[k]);
            }
        }
        store_attended(args, token, head * dim + i, make_float4(v[0] / weight, v[1] / weight, v[2] / weight, v[3] / weight), i < dim);
    }
}
