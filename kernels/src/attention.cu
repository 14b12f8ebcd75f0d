// Rotary embedding, storing keys and values, and attention of single tokens over them.
#include "attention.cuh"
#include "launch.cuh"

constexpr int ATTEND_WARPS = 4;
// Positions that one block attends to; several blocks' parts are merged in ascending order. Fixed,
// so that a token's bits do not depend on what else is in the batch.
constexpr int SEGMENT = 256;
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

__device__ __forceinline__ float warp_total(float value) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(~0u, value, distance);
    return value;
}

// One warp per head of a token: grid (heads of all kinds, tokens). All that is read is on its way
// before anything is waited for.
extern "C" __global__ void __launch_bounds__(32) rotate_heads(const __grid_constant__ RotateArgs args) {
    __shared__ float head_values[HEAD_DIM_MAX];
    let_next_start();
    constexpr int PER_LANE = HEAD_DIM_MAX / 32;
    const KvStore& store = args.store;
    const uint32_t head = blockIdx.x, token = blockIdx.y, lane = threadIdx.x, dim = store.head_dim;
    const uint32_t n_kv = store.n_kv_heads, n_heads = args.n_heads;
    float* values = args.heads + (static_cast<size_t>(token) * (n_heads + 2 * n_kv) + head) * dim;
    const bool is_query = head < n_heads, is_value = head >= n_heads + n_kv;
    const float* norm = is_query ? args.query_norm : is_value ? nullptr : args.key_norm;
    const float* angles = args.angles + static_cast<size_t>(token) * args.angle_stride;
    // No kernel writes what is read up to where the earlier ones are waited for.
    const uint32_t position = args.tokens.positions[token], table = args.tokens.tables[token];
    float own[PER_LANE], weights[PER_LANE], cos[PER_LANE / 2], sin[PER_LANE / 2];
#pragma unroll
    for (int k = 0; k < PER_LANE; k++) {
        const uint32_t i = lane + 32 * k;
        weights[k] = norm && i < dim ? norm[i] : 1.0f;
        if (k >= PER_LANE / 2) continue;
        const bool turns = !is_value && i < args.pairs;
        cos[k] = turns ? angles[i] : 1.0f;
        sin[k] = turns ? angles[args.pairs + i] : 0.0f;
    }
    const uint32_t tokens = store.block_tokens, slot = position % tokens;
    const uint32_t block = args.tokens.blocks[table + position / tokens];
    wait_for_earlier();
#pragma unroll
    for (int k = 0; k < PER_LANE; k++) own[k] = lane + 32 * k < dim ? values[lane + 32 * k] : 0.0f;
    float scale = 1.0f;
    if (norm) {
        float squares = 0;
#pragma unroll
        for (int k = 0; k < PER_LANE; k++) squares = __fmaf_rn(own[k], own[k], squares);
        scale = 1.0f / sqrtf(warp_total(squares) / static_cast<float>(dim) + (is_query ? args.query_eps : args.key_eps));
    }
#pragma unroll
    for (int k = 0; k < PER_LANE; k++) {
        if (lane + 32 * k < dim) head_values[lane + 32 * k] = norm ? own[k] * scale * weights[k] : own[k];
    }
    __syncwarp();
    if (!is_value) {
#pragma unroll
        for (int k = 0; k < PER_LANE / 2; k++) {
            const uint32_t pair = lane + 32 * k;
            if (pair >= args.pairs) break;
            const uint32_t a = args.interleaved ? 2 * pair : pair, b = args.interleaved ? 2 * pair + 1 : pair + args.pairs;
            const float x = head_values[a], y = head_values[b];
            head_values[a] = __fmaf_rn(x, cos[k], -(y * sin[k]));
            head_values[b] = __fmaf_rn(x, sin[k], y * cos[k]);
        }
        __syncwarp();
    }
    const size_t base = is_query ? 0 : store.head(block, is_value ? head - n_heads - n_kv : head - n_heads);
#pragma unroll
    for (int k = 0; k < PER_LANE; k++) {
        const uint32_t i = lane + 32 * k;
        if (i >= dim) break;
        if (is_query) {
            values[i] = head_values[i];
        } else if (is_value) {
            store.values[base + static_cast<size_t>(slot) * dim + i] = __float2half_rn(head_values[i]);
        } else {
            store.keys[base + (static_cast<size_t>(i / 8) * tokens + slot) * 8 + i % 8] = __float2half_rn(head_values[i]);
        }
    }
}

// The running state of query heads: sums are kept relative to the largest score so far. A lane has
// elements 2 · lane and the next of each 64.
template <int DIM, int HEADS> struct Running {
    float max[HEADS], weight[HEADS];
    float2 sums[HEADS][DIM / 64];
};

// Scores of this lane's position for HEADS query heads from `queries` (in shared memory).
template <int DIM, int HEADS>
__device__ __forceinline__ void score(const __half* keys, uint32_t tokens, uint32_t dim, const float* queries, float scores[HEADS]) {
#pragma unroll
    for (int h = 0; h < HEADS; h++) scores[h] = 0;
#pragma unroll
    for (uint32_t start = 0; start < DIM; start += 64) {
        uint4 packed[8];
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const uint32_t d = start + 8 * i;
            packed[i] = d < dim ? *reinterpret_cast<const uint4*>(keys + static_cast<size_t>(d) * tokens) : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const uint32_t d = start + 8 * i, words[4] = {packed[i].x, packed[i].y, packed[i].z, packed[i].w};
            if (d >= dim) break;
            float2 k[4];
#pragma unroll
            for (int j = 0; j < 4; j++) k[j] = __half22float2(*reinterpret_cast<const __half2*>(&words[j]));
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
}

// Adds up to 32 positions, one per lane, to the state. `visible` says whether this lane's counts, and
// `value` is where its value starts.
template <int DIM, int HEADS>
__device__ __forceinline__ void add_positions(Running<DIM, HEADS>& state, float scores[HEADS], bool visible, uint32_t count,
                                              const __half* values, size_t value, uint32_t dim) {
    const uint32_t lane = threadIdx.x % 32;
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
        float top = visible ? scores[h] : -INFINITY;
        // A score that is not a number must reach the sums.
        if (visible && isnan(scores[h])) top = INFINITY;
#pragma unroll
        for (int distance = 16; distance > 0; distance /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, distance));
        const float max = fmaxf(state.max[h], top);
        const float shrink = state.max[h] == -INFINITY ? 0.0f : expf(state.max[h] - max);
        const float weight = visible ? expf(scores[h] - max) : 0.0f;
        state.max[h] = max;
        state.weight[h] = __fmaf_rn(state.weight[h], shrink, warp_total(weight));
#pragma unroll
        for (int d = 0; d < DIM / 64; d++) state.sums[h][d].x *= shrink, state.sums[h][d].y *= shrink;
        scores[h] = weight;
    }
    constexpr int AT_ONCE = DIM > 128 ? 4 : 8;
    for (uint32_t first = 0; first < count; first += AT_ONCE) {
        __half2 v[AT_ONCE][DIM / 64];
#pragma unroll
        for (int p = 0; p < AT_ONCE; p++) {
            const size_t from = __shfl_sync(~0u, value, first + p);
#pragma unroll
            for (int d = 0; d < DIM / 64; d++) {
                const uint32_t i = 2 * lane + 64 * d;
                v[p][d] = i < dim && first + p < count ? *reinterpret_cast<const __half2*>(values + from + i) : __half2();
            }
        }
#pragma unroll
        for (int p = 0; p < AT_ONCE; p++) {
#pragma unroll
            for (int h = 0; h < HEADS; h++) {
                const float weight = __shfl_sync(~0u, scores[h], first + p);
#pragma unroll
                for (int d = 0; d < DIM / 64; d++) {
                    const float2 of = __half22float2(v[p][d]);
                    state.sums[h][d].x = __fmaf_rn(weight, of.x, state.sums[h][d].x);
                    state.sums[h][d].y = __fmaf_rn(weight, of.y, state.sums[h][d].y);
                }
            }
        }
    }
}

// One block: HEADS query heads of one KV head of one token over one segment. The warps take runs of
// 32 positions in turn.
template <int DIM, int HEADS> __device__ __forceinline__ void attend(const AttendArgs& args) {
    extern __shared__ float shared[];
    let_next_start();
    const KvStore& store = args.store;
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, dim = store.head_dim, tokens = store.block_tokens;
    const uint32_t token = args.chosen ? args.chosen[blockIdx.y] : blockIdx.y, segment = blockIdx.z, group = args.n_heads / store.n_kv_heads;
    const uint32_t chunks = (group + HEADS - 1) / HEADS;
    const uint32_t kv_head = blockIdx.x / chunks, first_head = kv_head * group + blockIdx.x % chunks * HEADS;
    const uint32_t heads = min(static_cast<uint32_t>(HEADS), (kv_head + 1) * group - first_head);
    const uint32_t position = args.tokens.positions[token];
    const uint32_t from = seen_from(position, args.window);
    const uint32_t start = max(from, segment * SEGMENT), end = min(position + 1, (segment + 1) * SEGMENT);
    // No kernel writes tables: they are on their way while the queries are.
    const uint32_t* table = args.tokens.blocks + args.tokens.tables[token];
    const auto block_of = [&](uint32_t run) { return table[min(run * 32 + lane, position) / tokens]; };
    uint32_t block = block_of(start / 32 + warp);
    wait_for_earlier();
    if (args.segments > 1 && start >= end) return;
    // Queries, with zeros for heads that do not exist.
    for (uint32_t i = threadIdx.x; i < HEADS * dim; i += ATTEND_WARPS * 32) {
        const uint32_t h = i / dim;
        shared[i] = h < heads ? args.heads[static_cast<size_t>(token) * args.head_stride + first_head * dim + i] : 0.0f;
    }
    __syncthreads();
    Running<DIM, HEADS> state;
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
        state.max[h] = -INFINITY, state.weight[h] = 0;
#pragma unroll
        for (int d = 0; d < DIM / 64; d++) state.sums[h][d] = make_float2(0, 0);
    }
    for (uint32_t run = start / 32 + warp; run * 32 < end; run += ATTEND_WARPS) {
        const uint32_t first = run * 32, own = first + lane;
        const bool visible = own >= start && own < end;
        const uint32_t slot = min(own, position);
        const size_t base = store.head(block, kv_head);
        block = block_of(run + ATTEND_WARPS);
        float scores[HEADS];
        score<DIM, HEADS>(store.keys + base + static_cast<size_t>(slot % tokens) * 8, tokens, dim, shared, scores);
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
            scores[h] *= args.scale;
            if (args.softcap > 0) scores[h] = args.softcap * tanhf(scores[h] / args.softcap);
        }
        const size_t value = base + static_cast<size_t>(slot % tokens) * dim;
        add_positions<DIM, HEADS>(state, scores, visible, min(32u, end - first), store.values, value, dim);
    }
    // The warps' states, merged by the first warp in their order.
    __syncthreads();
    const uint32_t width = dim + 2;
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
        float* own = shared + (warp * HEADS + h) * width;
        if (lane == 0) own[dim] = state.max[h], own[dim + 1] = state.weight[h];
#pragma unroll
        for (int d = 0; d < DIM / 64; d++) {
            const uint32_t i = 2 * lane + 64 * d;
            if (i < dim) own[i] = state.sums[h][d].x, own[i + 1] = state.sums[h][d].y;
        }
    }
    __syncthreads();
    for (uint32_t h = warp; h < heads; h += ATTEND_WARPS) {
        float max = -INFINITY, weight = 0;
        for (int w = 0; w < ATTEND_WARPS; w++) max = fmaxf(max, shared[(w * HEADS + h) * width + dim]);
        float factors[ATTEND_WARPS];
        for (int w = 0; w < ATTEND_WARPS; w++) {
            const float* of = shared + (w * HEADS + h) * width;
            factors[w] = of[dim] == -INFINITY ? 0.0f : expf(of[dim] - max);
            weight = __fmaf_rn(of[dim + 1], factors[w], weight);
        }
        const size_t head = static_cast<size_t>(token) * args.n_heads + first_head + h;
        const size_t row = static_cast<size_t>(blockIdx.y) * args.n_heads + first_head + h;
        float* partial = args.partials + (row * args.segments + segment) * width;
        for (uint32_t i = lane; i < dim; i += 32) {
            float sum = 0;
            for (int w = 0; w < ATTEND_WARPS; w++) sum = __fmaf_rn(shared[(w * HEADS + h) * width + i], factors[w], sum);
            if (args.segments == 1) {
                args.out[head * dim + i] = sum / weight;
            } else {
                partial[i] = sum;
            }
        }
        if (args.segments > 1 && lane == 0) partial[dim] = max, partial[dim + 1] = weight;
    }
}

#define ATTEND(dims, heads)                                                                    \
    extern "C" __global__ void __launch_bounds__(ATTEND_WARPS * 32)                            \
        attend_##dims##_##heads(const __grid_constant__ AttendArgs args) {                     \
        attend<dims, heads>(args);                                                             \
    }
ATTEND(64, 1)
ATTEND(64, 4)
ATTEND(128, 1)
ATTEND(128, 4)
ATTEND(256, 1)
ATTEND(256, 4)

// Merges the segments of one head of one token: grid (heads, tokens), one warp.
extern "C" __global__ void __launch_bounds__(32) merge_segments(const __grid_constant__ AttendArgs args) {
    begin();
    const uint32_t head = blockIdx.x, lane = threadIdx.x, dim = args.store.head_dim, width = dim + 2;
    const uint32_t token = args.chosen ? args.chosen[blockIdx.y] : blockIdx.y;
    const size_t index = static_cast<size_t>(token) * args.n_heads + head;
    const float* partials = args.partials + (static_cast<size_t>(blockIdx.y) * args.n_heads + head) * args.segments * width;
    const uint32_t position = args.tokens.positions[token];
    const uint32_t first = seen_from(position, args.window) / SEGMENT, last = position / SEGMENT;
    float max = -INFINITY, weight = 0;
    for (uint32_t s = first; s <= last; s++) max = fmaxf(max, partials[s * width + dim]);
    for (uint32_t s = first; s <= last; s++) weight = __fmaf_rn(partials[s * width + dim + 1], expf(partials[s * width + dim] - max), weight);
    for (uint32_t i = lane; i < dim; i += 32) {
        float sum = 0;
        for (uint32_t s = first; s <= last; s++) sum = __fmaf_rn(partials[s * width + i], expf(partials[s * width + dim] - max), sum);
        args.out[index * dim + i] = sum / weight;
    }
}
