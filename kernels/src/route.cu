// Routes of a mixture of experts: from the router's logits to each token's experts and their weights, and to the
// list of pairs of token and expert by expert.
//
//   a warp for each token: n_used times the largest of its logits, of equals that of lower index
//                          weights = softmax over these, by ascending expert, times a factor
//   for each expert: pairs before its own are counted, then its own are listed, tokens ascending
//
// A token's experts are bits of a few words, so that counting is counting of bits. For up to 8 tokens one block does
// all, an expert's list a thread (route_few); for more an expert's list is a block's (choose_experts, group_pairs).
// How many threads and blocks there are follows from the numbers of tokens and experts alone.
#include "launch.cuh"
#include "routes.cuh"

constexpr int EXPERT_WORDS = 8; // 256 experts
constexpr int CHOOSE_WARPS = 8, GROUP_WARPS = 8, FEW_WARPS = 8;

struct RouteArgs {
    const float* logits; // [tokens][n_experts]
    uint32_t* masks;     // [tokens][words]
    float* weights;      // [tokens][n_used]
    ExpertSlot* slots;   // [1 + experts with tokens], see Routes
    uint32_t* pairs;     // [tokens · n_used]
    float weight_scale;
    uint32_t tokens, n_experts, n_used;
};

__device__ __forceinline__ uint32_t words_of(const RouteArgs& args) { return (args.n_experts + 31) / 32; }

// Bits of lanes below this one.
__device__ __forceinline__ uint32_t lanes_below() { return (1u << threadIdx.x % 32) - 1; }

// A number that is larger for a larger float, and never 0. Zeros of both signs have the same.
__device__ __forceinline__ uint32_t rank_of(float value) {
    const uint32_t bits = __float_as_uint(value + 0.0f);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float value_of(uint32_t rank) { return __uint_as_float(rank >> 31 ? rank & 0x7fffffffu : ~rank); }

__device__ __forceinline__ uint32_t largest_of_warp(uint32_t value) {
#if __CUDA_ARCH__ >= 800
    return __reduce_max_sync(~0u, value);
#else
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) value = max(value, __shfl_xor_sync(~0u, value, distance));
    return value;
#endif
}

// Chooses a token's experts, a warp at work; lane l has experts l, l + 32, .... Logits that are not finite choose the
// first experts with weights that are no numbers: they fail their sequence and no other.
__device__ __forceinline__ void choose(const RouteArgs& args, uint32_t token, uint32_t* masks) {
    const uint32_t lane = threadIdx.x % 32;
    const float* const own = args.logits + static_cast<size_t>(token) * args.n_experts;
    float logits[EXPERT_WORDS];
    bool is_finite = true;
#pragma unroll
    for (int k = 0; k < EXPERT_WORDS; k++) {
        const uint32_t expert = 32 * k + lane;
        logits[k] = expert < args.n_experts ? own[expert] : -INFINITY;
        if (expert < args.n_experts && !isfinite(logits[k])) is_finite = false;
    }
    is_finite = __all_sync(~0u, is_finite);
    uint32_t chosen = 0, ranks[EXPERT_WORDS]; // bit k: expert 32k + lane
#pragma unroll
    for (int k = 0; k < EXPERT_WORDS; k++) ranks[k] = 32 * k + lane < args.n_experts ? rank_of(logits[k]) : 0;
    float largest = 0;
    for (uint32_t place = 0; is_finite && place < args.n_used; place++) {
        uint32_t own = 0;
#pragma unroll
        for (int k = 0; k < EXPERT_WORDS; k++) own = max(own, ranks[k]);
        const uint32_t best = largest_of_warp(own);
        if (place == 0) largest = value_of(best);
        // Turned around, so that the lowest index is the largest.
        uint32_t last = 0;
#pragma unroll
        for (int k = 0; k < EXPERT_WORDS; k++) last = ranks[k] == best ? max(last, ~(32 * k + lane)) : last;
        const uint32_t index = ~largest_of_warp(last);
#pragma unroll
        for (int k = 0; k < EXPERT_WORDS; k++) {
            if (32 * k + lane == index) ranks[k] = 0, chosen |= 1u << k;
        }
    }
    if (!is_finite) chosen = lane < args.n_used;
    float sum = 0;
#pragma unroll
    for (int k = 0; k < EXPERT_WORDS; k++) {
        logits[k] = chosen >> k & 1 ? expf(logits[k] - largest) : 0.0f;
        sum += logits[k];
    }
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
    uint32_t before = 0;
#pragma unroll
    for (int k = 0; k < EXPERT_WORDS; k++) {
        if (k >= words_of(args)) break;
        const uint32_t mask = __ballot_sync(~0u, chosen >> k & 1);
        if (lane == 0) masks[k] = mask;
        if (chosen >> k & 1) {
            const float weight = is_finite ? logits[k] / sum * args.weight_scale : __int_as_float(0x7fc00000);
            args.weights[static_cast<size_t>(token) * args.n_used + before + __popc(mask & lanes_below())] = weight;
        }
        before += __popc(mask);
    }
}

// Bits of the experts of word k that are below an expert.
__device__ __forceinline__ uint32_t below(uint32_t expert, uint32_t k) {
    return k < expert / 32 ? ~0u : k == expert / 32 ? (1u << expert % 32) - 1 : 0u;
}

// Where an expert stands among a token's.
__device__ __forceinline__ uint32_t place_of(const uint32_t* mask, uint32_t expert) {
    uint32_t place = 0;
    for (uint32_t k = 0; k <= expert / 32; k++) place += __popc(mask[k] & below(expert, k));
    return place;
}

// Lists the pairs of all experts, a thread for each; the block has a thread for each.
__device__ __forceinline__ void list_few(const RouteArgs& args, const uint32_t* masks) {
    __shared__ uint32_t pairs[FEW_WARPS], active[FEW_WARPS];
    const uint32_t expert = threadIdx.x, lane = expert % 32, warp = expert / 32, words = words_of(args);
    const auto has = [&](uint32_t token) { return expert < args.n_experts && masks[token * words + warp] >> lane & 1; };
    uint32_t count = 0;
    for (uint32_t token = 0; token < args.tokens; token++) count += has(token);
    uint32_t end = count;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
        const uint32_t other = __shfl_up_sync(~0u, end, distance);
        if (lane >= distance) end += other;
    }
    const uint32_t some = __ballot_sync(~0u, count > 0);
    if (lane == 31) pairs[warp] = end, active[warp] = __popc(some);
    __syncthreads();
    uint32_t first = end - count, slot = __popc(some & lanes_below());
    for (uint32_t other = 0; other < warp; other++) first += pairs[other], slot += active[other];
    if (count > 0) args.slots[1 + slot] = ExpertSlot{expert, first, count, 0};
    // The last thread has seen all.
    if (expert == blockDim.x - 1) args.slots[0] = ExpertSlot{0, 0, slot + (count > 0), 0};
    for (uint32_t token = 0; token < args.tokens; token++) {
        if (has(token)) args.pairs[first++] = token * args.n_used + place_of(masks + token * words, expert);
    }
}

// The sum over the block, in each thread; `parts` has room for each warp.
__device__ __forceinline__ uint32_t sum_of_block(uint32_t value, uint32_t* parts) {
    __syncthreads();
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
    __syncthreads();
    value = 0;
    for (int warp = 0; warp < GROUP_WARPS; warp++) value += parts[warp];
    return value;
}

// Lists an expert's pairs, the whole block at work.
__device__ __forceinline__ void list_many(const RouteArgs& args, uint32_t expert) {
    __shared__ uint32_t parts[GROUP_WARPS], joined[GROUP_WARPS][EXPERT_WORDS];
    constexpr uint32_t THREADS = 32 * GROUP_WARPS;
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, words = words_of(args), tokens = args.tokens;
    // Pairs of experts before this one, and which experts have any.
    uint32_t before = 0, any[EXPERT_WORDS] = {};
    for (uint32_t token = threadIdx.x; token < tokens; token += THREADS) {
#pragma unroll
        for (int k = 0; k < EXPERT_WORDS; k++) {
            const uint32_t mask = k < words ? args.masks[token * words + k] : 0;
            any[k] |= mask, before += __popc(mask & below(expert, k));
        }
    }
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
        before += __shfl_xor_sync(~0u, before, distance);
#pragma unroll
        for (int k = 0; k < EXPERT_WORDS; k++) any[k] |= __shfl_xor_sync(~0u, any[k], distance);
    }
#pragma unroll
    for (int k = 0; k < EXPERT_WORDS; k++) {
        if (lane == k) joined[warp][k] = any[k];
    }
    const uint32_t start = sum_of_block(before, parts);
    uint32_t end = start;
    for (uint32_t first = 0; first < tokens; first += THREADS) {
        const uint32_t token = first + threadIdx.x;
        const uint32_t* const mask = args.masks + static_cast<size_t>(token) * words;
        const bool is_own = token < tokens && mask[expert / 32] >> expert % 32 & 1;
        const uint32_t owners = __ballot_sync(~0u, is_own), all = sum_of_block(__popc(owners), parts);
        uint32_t earlier = __popc(owners & lanes_below());
        for (uint32_t other = 0; other < warp; other++) earlier += parts[other];
        if (is_own) args.pairs[end + earlier] = token * args.n_used + place_of(mask, expert);
        end += all;
    }
    if (threadIdx.x > 0) return;
    uint32_t slot = 0, active = 0;
    for (uint32_t k = 0; k < words; k++) {
        uint32_t some = 0;
        for (int other = 0; other < GROUP_WARPS; other++) some |= joined[other][k];
        slot += __popc(some & below(expert, k)), active += __popc(some);
    }
    if (end > start) args.slots[1 + slot] = ExpertSlot{expert, start, end - start, 0};
    if (expert == 0) args.slots[0] = ExpertSlot{0, 0, active, 0};
}

extern "C" __global__ void __launch_bounds__(32 * FEW_WARPS) route_few(const __grid_constant__ RouteArgs args) {
    __shared__ uint32_t masks[FEW_WARPS * EXPERT_WORDS];
    const uint32_t warp = threadIdx.x / 32;
    begin();
    if (warp < args.tokens) choose(args, warp, masks + warp * words_of(args));
    __syncthreads();
    list_few(args, masks);
}

extern "C" __global__ void __launch_bounds__(32 * CHOOSE_WARPS) choose_experts(const __grid_constant__ RouteArgs args) {
    const uint32_t token = blockIdx.x * CHOOSE_WARPS + threadIdx.x / 32;
    begin();
    if (token < args.tokens) choose(args, token, args.masks + static_cast<size_t>(token) * words_of(args));
}

extern "C" __global__ void __launch_bounds__(32 * GROUP_WARPS) group_pairs(const __grid_constant__ RouteArgs args) {
    begin();
    list_many(args, blockIdx.x);
}
