// What sampling needs of rows of logits beside their best token: a token drawn from all of them by
//     the first t with  sum of w(0 .. t) > draw * sum of all w,   w(i) = exp((logit(i) - largest) / temperature),
// the logit of a token, or a list of the most likely tokens. Rounding and order of sums are those of the
// CPU's sampler (src/sampling), so the token drawn is the one that the CPU draws from the same logits.
//
// weigh_rows reads a row once: sums of weights per 1024 tokens, and how many tokens lie how far below the
// largest. answer_rows cuts the list there, reads the row again to collect it, and finds the token.
#include "sample.cuh"

namespace draw {

constexpr int THREADS = 256, WARPS = THREADS / 32;
// Logits whose weights are summed in f32, by so many lanes; and of a block of the grid.
constexpr uint32_t SUM_BLOCK = 1024, LANES = 16, SUM_BLOCKS = 4, PART = SUM_BLOCKS * SUM_BLOCK;
// Tokens that a draw passes at once, inside of a sum block.
constexpr uint32_t FEW = 32, FEWS = SUM_BLOCK / FEW;
// A bin has the tokens that lie bin / BINS_PER_NAT below the largest, or a little more; the last one all others.
constexpr uint32_t BINS = 2048, OWN_BINS = BINS / THREADS;
constexpr float BINS_PER_NAT = 32;
// Weights in a bin are summed as integers, whose order does not matter. A sum that overflows is one of more
// than LIST_MAX tokens, and their list is refused anyway.
constexpr float MASS_ONE = 4194303.0f; // 2^32 / LIST_MAX - 1
constexpr uint32_t LIST_MAX = 1024, NONE = ~0u;
// Logits that a thread asks for at once.
constexpr uint32_t AHEAD = 8;

struct Question {
    uint32_t row;
    uint32_t list;  // which list it gets, or NONE
    uint32_t count; // tokens in it at least
    // It has those that lie in the bins up to `depth`, or fewer if they reach this share of all weights, where it is not 0.
    uint32_t depth;
    float mass;
    float temperature; // of weights; 0: none are summed
    uint32_t token;    // whose logit is asked for; NONE: one is drawn, if there are weights
    uint32_t unused;
    double draw; // in [0, 1)
};

struct Answer {
    uint32_t token;
    float logit;
    uint32_t list, count, bin; // the list has all tokens up to this bin; none where `count` exceeds LIST_MAX
    uint32_t unused;
    double total; // of weights
};

struct Listed {
    uint32_t id;
    float logit;
};

// One list's bins, all 0 at first.
struct Bins {
    uint32_t counts[BINS];
    uint32_t masses[BINS]; // of weights, in units of 1 / MASS_ONE
    uint32_t listed, unused[3];
};

struct Args {
    const float* logits; // [rows][vocab]
    const RowPart* parts; // [rows][parts_per_row]
    const Question* questions;
    Bins* bins;      // [lists]
    double* sums;    // [questions][sum blocks]
    Answer* answers; // [questions]
    Listed* lists;   // [lists][LIST_MAX]
    uint32_t vocab, parts_per_row;
};

// Every thread gets the same bits.
__device__ __forceinline__ RowPart whole_row(const Args& args, uint32_t row) {
    const RowPart* parts = args.parts + static_cast<size_t>(row) * args.parts_per_row;
    RowPart whole{-INFINITY, NONE, 0.0f, 0};
    for (uint32_t i = threadIdx.x % 32; i < args.parts_per_row; i += 32) whole = joined(whole, parts[i]);
    whole = warp_joined(whole);
    whole.sum = __shfl_sync(~0u, whole.sum, 0);
    return whole;
}

// exp for x <= 0 with the bits of the CPU's sampler (src/sampling/softmax.rs).
__device__ __forceinline__ float exp_nonpositive(float x) {
    constexpr float ROUND = 12582912.0f, LOG2_E = 1.44269504088896340736f;
    const float clamped = fmaxf(x, -87.0f);
    const float rounded = __fadd_rn(__fmul_rn(clamped, LOG2_E), ROUND);
    const float n = __fsub_rn(rounded, ROUND);
    const float r = __fsub_rn(__fsub_rn(clamped, __fmul_rn(n, 0.6933594f)), __fmul_rn(n, -2.1219444e-4f));
    float series = 1.0f / 5040.0f;
    series = __fadd_rn(__fmul_rn(series, r), 1.0f / 720.0f);
    series = __fadd_rn(__fmul_rn(series, r), 1.0f / 120.0f);
    series = __fadd_rn(__fmul_rn(series, r), 1.0f / 24.0f);
    series = __fadd_rn(__fmul_rn(series, r), 1.0f / 6.0f);
    series = __fadd_rn(__fmul_rn(series, r), 0.5f);
    series = __fadd_rn(__fmul_rn(__fadd_rn(__fmul_rn(series, r), 1.0f), r), 1.0f);
    const float power = __uint_as_float(__float_as_uint(series) + (__float_as_uint(rounded) << 23));
    return x < -87.0f ? 0.0f : power;
}

__device__ __forceinline__ float weight_of(float logit, float largest, float temperature) {
    return exp_nonpositive(__fdiv_rn(__fsub_rn(logit, largest), temperature));
}

// Never larger for a larger logit, so a list up to a bin has no worse token than any that is left out.
__device__ __forceinline__ uint32_t bin_of(float logit, float largest) {
    return min(__float2uint_rz(__fmul_rn(__fsub_rn(largest, logit), BINS_PER_NAT)), BINS - 1);
}

// The sum of each block's weights: in f32 by lanes, then in f64. Rows of weights are LANES longer, for other banks.
__device__ __forceinline__ void sum_blocks(const float (&weights)[SUM_BLOCKS][SUM_BLOCK + LANES], double* sums, uint32_t blocks) {
    __shared__ float lanes[SUM_BLOCKS][LANES];
    const uint32_t block = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    if (block < SUM_BLOCKS) {
        float sum = 0;
#pragma unroll 8
        for (uint32_t i = lane; i < SUM_BLOCK; i += LANES) sum = __fadd_rn(sum, weights[block][i]);
        lanes[block][lane] = sum;
    }
    __syncthreads();
    if (threadIdx.x < SUM_BLOCKS && blockIdx.x * SUM_BLOCKS + threadIdx.x < blocks) {
        double sum = 0;
        for (uint32_t i = 0; i < LANES; i++) sum = __dadd_rn(sum, lanes[threadIdx.x][i]);
        sums[blockIdx.x * SUM_BLOCKS + threadIdx.x] = sum;
    }
}

// `then` with each of a thread's logits of a part, and its place in there; those beyond the row's end are -inf.
template <class Then> __device__ __forceinline__ void for_own(const float* logits, uint32_t count, Then then) {
    for (uint32_t first = threadIdx.x; first < PART; first += AHEAD * THREADS) {
        float own[AHEAD];
#pragma unroll
        for (uint32_t i = 0; i < AHEAD; i++) {
            const uint32_t at = first + i * THREADS;
            own[i] = at < count ? logits[at] : -INFINITY;
        }
#pragma unroll
        for (uint32_t i = 0; i < AHEAD; i++) then(own[i], first + i * THREADS);
    }
}

struct Cut {
    uint32_t bin, count; // the last bin of a list, and its tokens
};

// Where a list ends; all threads take part.
__device__ __forceinline__ Cut cut_of(const Args& args, const Question& question, float total) {
    __shared__ uint32_t warp_counts[WARPS], count_bin, mass_bin, count;
    __shared__ unsigned long long warp_masses[WARPS];
    const Bins& bins = args.bins[question.list];
    const uint32_t first = threadIdx.x * OWN_BINS, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    uint32_t counts[OWN_BINS], masses[OWN_BINS], count_sum = 0;
    unsigned long long mass_sum = 0;
#pragma unroll
    for (uint32_t i = 0; i < OWN_BINS; i++) {
        counts[i] = bins.counts[first + i], masses[i] = bins.masses[first + i];
        count_sum += counts[i], mass_sum += masses[i];
    }
    const uint32_t own_count = count_sum;
    const unsigned long long own_mass = mass_sum;
#pragma unroll
    for (uint32_t distance = 1; distance < 32; distance *= 2) {
        const uint32_t count_before = __shfl_up_sync(~0u, count_sum, distance);
        const unsigned long long mass_before = __shfl_up_sync(~0u, mass_sum, distance);
        if (lane >= distance) count_sum += count_before, mass_sum += mass_before;
    }
    if (lane == 31) warp_counts[warp] = count_sum, warp_masses[warp] = mass_sum;
    if (threadIdx.x == 0) count_bin = mass_bin = BINS - 1;
    __syncthreads();
    // Of all bins before the own ones.
    uint32_t counted = count_sum - own_count;
    unsigned long long reached = mass_sum - own_mass;
    for (uint32_t w = 0; w < warp; w++) counted += warp_counts[w], reached += warp_masses[w];
    // Slightly more than asked for, because `total` is rounded.
    const unsigned long long mass = max(static_cast<unsigned long long>(1.00001f * question.mass * total * MASS_ONE), 1ull);
    const uint32_t before = counted;
#pragma unroll
    for (uint32_t i = 0; i < OWN_BINS; i++) {
        if (counted < question.count && counted + counts[i] >= question.count) count_bin = first + i;
        if (reached < mass && reached + masses[i] >= mass) mass_bin = first + i;
        counted += counts[i], reached += masses[i];
    }
    __syncthreads();
    const uint32_t bin = max(count_bin, min(question.depth, question.mass > 0 ? mass_bin : BINS - 1));
    counted = before;
#pragma unroll
    for (uint32_t i = 0; i < OWN_BINS; i++) {
        counted += counts[i];
        if (first + i == bin) count = counted;
    }
    __syncthreads();
    return {bin, count};
}

// The token with which the weights, in ascending order of id, exceed `left`. All threads take part; `left` counts
// in the first one.
__device__ __forceinline__ uint32_t token_at(
    const float* logits, uint32_t vocab, const double* sums, double left, float largest, float temperature) {
    __shared__ float weights[FEWS][FEW + 1];
    __shared__ double masses[FEWS];
    __shared__ uint32_t found_block, token, last;
    const uint32_t blocks = (vocab + SUM_BLOCK - 1) / SUM_BLOCK;
    if (threadIdx.x == 0) token = NONE, last = 0;
    for (uint32_t block = 0;; block++) {
        if (threadIdx.x == 0) {
            while (block < blocks && left >= sums[block]) left = __dsub_rn(left, sums[block++]);
            found_block = block;
        }
        __syncthreads();
        block = found_block;
        if (block >= blocks) break;
        for (uint32_t i = threadIdx.x; i < SUM_BLOCK; i += THREADS) {
            const uint32_t id = block * SUM_BLOCK + i;
            weights[i / FEW][i % FEW] = id < vocab ? weight_of(logits[id], largest, temperature) : 0.0f;
        }
        __syncthreads();
        if (threadIdx.x < FEWS) {
            double sum = 0;
            for (uint32_t i = 0; i < FEW; i++) sum = __dadd_rn(sum, weights[threadIdx.x][i]);
            masses[threadIdx.x] = sum;
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            uint32_t found = NONE;
            for (uint32_t few = 0; few < FEWS && found == NONE; few++) {
                if (left >= masses[few]) {
                    left = __dsub_rn(left, masses[few]);
                    continue;
                }
                for (uint32_t i = 0; i < FEW && found == NONE; i++) {
                    left = __dsub_rn(left, weights[few][i]);
                    if (left < 0) found = block * SUM_BLOCK + few * FEW + i;
                }
            }
            token = found;
        }
        __syncthreads();
        if (token != NONE) return token;
    }
    // Rounding may leave a last bit of the interval to the last token that can be drawn.
    for (uint32_t id = threadIdx.x; id < vocab; id += THREADS) {
        if (weight_of(logits[id], largest, temperature) > 0) atomicMax(&last, id);
    }
    __syncthreads();
    return last;
}

// Answers all but the list itself; all threads take part.
__device__ __forceinline__ void answer(const Args& args, const Question& question, const RowPart& whole, Cut cut) {
    extern __shared__ double sums[]; // [sum blocks]
    __shared__ double all;
    const uint32_t vocab = args.vocab, blocks = (vocab + SUM_BLOCK - 1) / SUM_BLOCK;
    const float* logits = args.logits + static_cast<size_t>(question.row) * vocab;
    uint32_t token = question.token;
    const bool weighs = question.temperature > 0 && !whole.spoiled;
    if (weighs) {
        const double* all_sums = args.sums + static_cast<size_t>(blockIdx.y) * blocks;
        for (uint32_t i = threadIdx.x; i < blocks; i += THREADS) sums[i] = all_sums[i];
        __syncthreads();
        if (threadIdx.x == 0) {
            double total = 0;
            for (uint32_t i = 0; i < blocks; i++) total = __dadd_rn(total, sums[i]);
            all = total;
        }
        __syncthreads();
        if (token == NONE) {
            const double left = __dmul_rn(question.draw, all);
            token = token_at(logits, vocab, sums, left, whole.largest, question.temperature);
        }
    }
    if (threadIdx.x != 0) return;
    Answer found{token, NAN, question.list, cut.count, cut.bin, 0, 0.0};
    if (token < vocab) found.logit = logits[token];
    if (weighs) found.total = all;
    args.answers[blockIdx.y] = found;
}

} // namespace draw

// Grid: (parts of draw::PART logits, questions).
extern "C" __global__ void __launch_bounds__(draw::THREADS) weigh_rows(const __grid_constant__ draw::Args args) {
    using namespace draw;
    __shared__ uint32_t counts[BINS], masses[BINS];
    __shared__ float weights[SUM_BLOCKS][SUM_BLOCK + LANES];
    begin();
    const Question question = args.questions[blockIdx.y];
    const bool lists = question.list != NONE, weighs = question.temperature > 0;
    if (!lists && !weighs) return;
    const uint32_t vocab = args.vocab, start = blockIdx.x * PART;
    const float* logits = args.logits + static_cast<size_t>(question.row) * vocab + start;
    const float largest = whole_row(args, question.row).largest;
    for (uint32_t i = threadIdx.x; i < BINS; i += THREADS) counts[i] = masses[i] = 0;
    __syncthreads();
    for_own(logits, vocab - start, [&](float logit, uint32_t i) {
        const bool exists = start + i < vocab;
        const float weight = weighs && exists ? weight_of(logit, largest, question.temperature) : 0.0f;
        weights[i / SUM_BLOCK][i % SUM_BLOCK] = weight;
        if (!lists || !exists) return;
        const uint32_t bin = bin_of(logit, largest);
        atomicAdd(&counts[bin], 1u);
        if (question.mass > 0) atomicAdd(&masses[bin], __float2uint_rz(weight * MASS_ONE));
    });
    __syncthreads();
    const uint32_t blocks = (vocab + SUM_BLOCK - 1) / SUM_BLOCK;
    if (weighs) sum_blocks(weights, args.sums + static_cast<size_t>(blockIdx.y) * blocks, blocks);
    if (!lists) return;
    Bins& bins = args.bins[question.list];
    for (uint32_t i = threadIdx.x; i < BINS; i += THREADS) {
        if (counts[i] > 0) atomicAdd(&bins.counts[i], counts[i]);
        if (masses[i] > 0) atomicAdd(&bins.masses[i], masses[i]);
    }
}

// Grid: (parts of draw::PART logits and one more, questions). Lists come in any order.
extern "C" __global__ void __launch_bounds__(draw::THREADS) answer_rows(const __grid_constant__ draw::Args args) {
    using namespace draw;
    begin();
    const Question question = args.questions[blockIdx.y];
    const bool lists = question.list != NONE, answers = blockIdx.x == gridDim.x - 1;
    if (!lists && !answers) return;
    const RowPart whole = whole_row(args, question.row);
    const Cut cut = lists ? cut_of(args, question, whole.sum) : Cut{0, 0};
    if (answers) return answer(args, question, whole, cut);
    if (cut.count > LIST_MAX) return;
    const uint32_t vocab = args.vocab, start = blockIdx.x * PART;
    const float* logits = args.logits + static_cast<size_t>(question.row) * vocab + start;
    Listed* list = args.lists + static_cast<size_t>(question.list) * LIST_MAX;
    for_own(logits, vocab - start, [&](float logit, uint32_t i) {
        if (start + i >= vocab || bin_of(logit, whole.largest) > cut.bin) return;
        const uint32_t at = atomicAdd(&args.bins[question.list].listed, 1u);
        if (at < LIST_MAX) list[at] = {start + i, logit};
    });
}
