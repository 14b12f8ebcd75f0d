// Routes of a mixture of experts: from the router's logits to each token's experts and their weights, and to the
// list of pairs of token and expert by expert.
//
//   a warp for each token: n_used times the largest of its logits, of equals that of lower index
//                          weights = softmax over these, by ascending expert, times a factor
//   a group for each expert: pairs before its own are counted, then its own are listed, tokens ascending
//
// A token's experts are bits of a few words, so that counting is counting of bits. Where a token is a lane's, one
// block does all (route_few), else a warp a token and a block an expert (choose_experts, group_pairs). How many
// threads and blocks there are follows from the numbers of tokens and experts alone.
#include "launch.cuh"
#include "routes.cuh"

constexpr int EXPERT_WORDS = 8; // 256 experts
constexpr int CHOOSE_WARPS = 8, GROUP_WARPS = 8, FEW_WARPS = 32;

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

__device__ __forceinline__ float largest_of_warp(float value, uint32_t& index) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
        const float other = __shfl_xor_sync(~0u, value, distance);
        const uint32_t at = __shfl_xor_sync(~0u, index, distance);
        if (other > value || (other == value && at < index)) value = other, index = at;
    }
    return value;
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
    uint32_t chosen = 0; // bit k: expert 32k + lane
    float largest = 0;
    for (uint32_t place = 0; is_finite && place < args.n_used; place++) {
        float best = -INFINITY;
        uint32_t index = ~0u;
#pragma unroll
        for (int k = 0; k < EXPERT_WORDS; k++) {
            if (!(chosen >> k & 1) && logits[k] > best) best = logits[k], index = 32 * k + lane;
        }
        best = largest_of_warp(best, index);
        if (place == 0) largest = best;
        if (index % 32 == lane) chosen |= 1u << index / 32;
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

// The sum over WARPS warps, in each thread of them; `parts` has room for each warp.
template <int WARPS> __device__ __forceinline__ uint32_t sum_of_warps(uint32_t value, uint32_t* parts) {
    if constexpr (WARPS == 1) return value;
    __syncthreads();
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
    __syncthreads();
    value = 0;
    for (int warp = 0; warp < WARPS; warp++) value += parts[warp];
    return value;
}

// Lists an expert's pairs, WARPS warps at work: the whole block, or one warp of it.
template <int WARPS> __device__ __forceinline__ void list_pairs(const RouteArgs& args, const uint32_t* masks, uint32_t expert, uint32_t* parts) {
    const uint32_t thread = threadIdx.x % (32 * WARPS), warp = thread / 32, words = words_of(args), tokens = args.tokens;
    const auto below = [&](uint32_t k) { return k < expert / 32 ? ~0u : k == expert / 32 ? (1u << expert % 32) - 1 : 0u; };
    // Pairs of experts before this one, and which experts have any.
    uint32_t before = 0, any[EXPERT_WORDS] = {};
    for (uint32_t token = thread; token < tokens; token += 32 * WARPS) {
#pragma unroll
        for (int k = 0; k < EXPERT_WORDS; k++) {
            const uint32_t mask = k < words ? masks[token * words + k] : 0;
            any[k] |= mask, before += __popc(mask & below(k));
        }
    }
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
        before += __shfl_xor_sync(~0u, before, distance);
#pragma unroll
        for (int k = 0; k < EXPERT_WORDS; k++) any[k] |= __shfl_xor_sync(~0u, any[k], distance);
    }
    const uint32_t start = sum_of_warps<WARPS>(before, parts);
    if constexpr (WARPS > 1) {
        uint32_t* const joined = parts + WARPS; // [WARPS][EXPERT_WORDS]
        if (thread % 32 < EXPERT_WORDS) {
            uint32_t own = 0;
#pragma unroll
            for (int k = 0; k < EXPERT_WORDS; k++) own = thread % 32 == k ? any[k] : own;
            joined[warp * EXPERT_WORDS + thread % 32] = own;
        }
        __syncthreads();
        for (int other = 0; other < WARPS; other++) {
#pragma unroll
            for (int k = 0; k < EXPERT_WORDS; k++) any[k] |= joined[other * EXPERT_WORDS + k];
        }
    }
    uint32_t end = start;
    for (uint32_t first = 0; first < tokens; first += 32 * WARPS) {
        const uint32_t token = first + thread;
        uint32_t place = 0, is_own = 0;
        if (token < tokens) {
            for (uint32_t k = 0; k <= expert / 32; k++) place += __popc(masks[token * words + k] & below(k));
            is_own = masks[token * words + expert / 32] >> expert % 32 & 1;
        }
        const uint32_t owners = __ballot_sync(~0u, is_own);
        uint32_t earlier = 0, all = __popc(owners);
        if constexpr (WARPS > 1) {
            all = sum_of_warps<WARPS>(all, parts);
            for (uint32_t other = 0; other < warp; other++) earlier += parts[other];
        }
        if (is_own) args.pairs[end + earlier + __popc(owners & lanes_below())] = token * args.n_used + place;
        end += all;
    }
    if (thread > 0) return;
    uint32_t slot = 0, active = 0;
#pragma unroll
    for (int k = 0; k < EXPERT_WORDS; k++) slot += __popc(any[k] & below(k)), active += __popc(any[k]);
    if (end > start) args.slots[1 + slot] = ExpertSlot{expert, start, end - start, 0};
    if (expert == 0) args.slots[0] = ExpertSlot{0, 0, active, 0};
}

extern "C" __global__ void __launch_bounds__(32 * FEW_WARPS) route_few(const __grid_constant__ RouteArgs args) {
    __shared__ uint32_t masks[32 * EXPERT_WORDS];
    const uint32_t warp = threadIdx.x / 32;
    begin();
    if (warp < args.tokens) choose(args, warp, masks + warp * words_of(args));
    __syncthreads();
    for (uint32_t expert = warp; expert < args.n_experts; expert += FEW_WARPS) list_pairs<1>(args, masks, expert, nullptr);
}

extern "C" __global__ void __launch_bounds__(32 * CHOOSE_WARPS) choose_experts(const __grid_constant__ RouteArgs args) {
    const uint32_t token = blockIdx.x * CHOOSE_WARPS + threadIdx.x / 32;
    begin();
    if (token < args.tokens) choose(args, token, args.masks + static_cast<size_t>(token) * words_of(args));
}

extern "C" __global__ void __launch_bounds__(32 * GROUP_WARPS) group_pairs(const __grid_constant__ RouteArgs args) {
    __shared__ uint32_t parts[GROUP_WARPS * (1 + EXPERT_WORDS)];
    begin();
    list_pairs<GROUP_WARPS>(args, args.masks, blockIdx.x, parts);
}
