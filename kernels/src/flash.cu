// Attention of many tokens of one sequence on tensor cores (FlashAttention-2, arXiv 2307.08691). A block
// has a tile of WARPS · 16 rows, which are the query heads over one KV head of some consecutive tokens,
// and walks along the positions that they see by KEYS at a time:
//
//   the next keys and values are on their way to shared memory
//   S = scale · Q · Kᵀ
//   M = max(M, rows of S), P = exp(S − M), the sums so far shrink to the new M
//   O += P · V
//
// Queries, keys, values and P are f16, sums f32. Positions are taken from multiples of KEYS on, so a
// token's bits do not depend on which tokens it shares a tile with. Where there are few tiles the blocks of a cluster
// take KEYS of them in turn, by their position, and add up their sums in the order of the blocks.
//
// Queries and values have rows of 2 · DIM bytes in shared memory, whose 16-byte piece p lies at p ^ row % 8;
// keys lie as in the store, [DIM / 8][KEYS][8]: no two of the eight pieces that ldmatrix takes share a bank.
#include "attention.cuh"
#include "cluster.cuh"
#include "launch.cuh"
#include "tensor_cores.cuh"

struct FlashArgs {
    AttendArgs attend;
    const uint2* runs; // first token and number of tokens of each sequence
    uint32_t tile_tokens; // tokens of a tile: as many as have all their heads in its rows
    uint32_t blocks; // of a cluster, which divide a tile's positions
};

constexpr float LOG2_E = 1.4426950408889634f;

// What a block works on.
struct FlashTile {
    uint32_t first_token, tokens, kv_head, group;

    // Blocks of the grid take tiles in descending order: the last ones of a sequence see most.
    __device__ __forceinline__ FlashTile(const FlashArgs& args) {
        uint32_t tile = gridDim.y - 1 - blockIdx.y;
        const uint2* run = args.runs;
        for (uint32_t tiles; tile >= (tiles = (run->y + args.tile_tokens - 1) / args.tile_tokens); run++) tile -= tiles;
        first_token = run->x + tile * args.tile_tokens;
        tokens = min(args.tile_tokens, run->y - tile * args.tile_tokens);
        kv_head = blockIdx.x / args.blocks;
        group = args.attend.n_heads / args.attend.store.n_kv_heads;
    }
};

template <int DIM> __device__ __forceinline__ uint8_t* piece_at(uint8_t* tile, uint32_t row, uint32_t piece) {
    return tile + row * (2 * DIM) + (piece ^ row % 8) * 16;
}

// Queries of a tile as f16; zeros for rows and elements that there are not.
template <int DIM, int ROWS> __device__ __forceinline__ void load_queries(const FlashArgs& args, const FlashTile& tile, uint8_t* to) {
    const uint32_t dim = args.attend.store.head_dim;
    for (uint32_t index = threadIdx.x; index < ROWS * (DIM / 8); index += blockDim.x) {
        const uint32_t row = index / (DIM / 8), piece = index % (DIM / 8), token = row / tile.group;
        uint4 packed = make_uint4(0, 0, 0, 0);
        if (token < tile.tokens && 8 * piece < dim) {
            const size_t head = tile.kv_head * tile.group + row % tile.group;
            const float4* from = reinterpret_cast<const float4*>(
                args.attend.heads + static_cast<size_t>(tile.first_token + token) * args.attend.head_stride + head * dim + 8 * piece);
            const float4 a = from[0], b = from[1];
            packed = make_uint4(bits_of(__floats2half2_rn(a.x, a.y)), bits_of(__floats2half2_rn(a.z, a.w)),
                                bits_of(__floats2half2_rn(b.x, b.y)), bits_of(__floats2half2_rn(b.z, b.w)));
        }
        *reinterpret_cast<uint4*>(piece_at<DIM>(to, row, piece)) = packed;
    }
}

// The pieces of a tile of keys and values that a thread brings: key(row, piece) and value(row, piece).
template <int DIM, int KEYS, typename Key, typename Value> __device__ __forceinline__ void each_own_piece(uint32_t dim, Key key, Value value) {
    const uint32_t pieces = dim / 8;
    for (uint32_t piece = threadIdx.x / KEYS; piece < pieces; piece += blockDim.x / KEYS) key(threadIdx.x % KEYS, piece);
    for (uint32_t index = threadIdx.x; index < KEYS * (DIM / 8); index += blockDim.x) {
        const uint32_t row = index / (DIM / 8), piece = index % (DIM / 8);
        if (piece < pieces) value(row, piece);
    }
}

// Keys and values of a tile in shared memory, and where their positions are. Past `end` the last one comes again.
struct KeyTile {
    uint8_t *keys, *values;
    uint32_t first, end;

    __device__ __forceinline__ uint8_t* key(uint32_t piece, uint32_t row, uint32_t rows) const { return keys + (piece * rows + row) * 16; }
    __device__ __forceinline__ uint32_t position(uint32_t row) const { return min(first + row, end - 1); }
};

// Starts copying a piece: what is shorter than f16 to the end of its room, and to the start the scale of its group,
// with that of the position beside it.
template <typename Type> __device__ __forceinline__ void start_piece(uint8_t* to, const HeadPlace& from, uint32_t piece, uint32_t position) {
    const uint8_t* const source = from.pieces + static_cast<size_t>(piece) * from.next_piece;
    if constexpr (Type::BYTES == 2) copy_16_bytes(to, source);
    else copy_bytes<8>(to + 8, source);
    if constexpr (Type::HAS_SCALES) copy_bytes<4>(to, from.scales + 8 * piece / KV_GROUP * from.next_scale - position % 2);
}

// Turns a piece that has come into f16.
template <typename Type> __device__ __forceinline__ void finish_piece(uint8_t* at, uint32_t position) {
    if constexpr (Type::IS_HALF) return;
    else {
        const uint4 raw = *reinterpret_cast<const uint4*>(at);
        __half2 halves[4];
        halves_of<Type>(raw, halves);
        if constexpr (Type::HAS_SCALES) {
            const __half2 scale = __half2half2(__ushort_as_half(raw.x >> 16 * (position % 2))), max = __float2half2_rn(F16_MAX);
#pragma unroll
            for (int i = 0; i < 4; i++) halves[i] = __hmax2_nan(__hmin2_nan(__hmul2(halves[i], scale), max), __hneg2(max));
        }
        *reinterpret_cast<uint4*>(at) = make_uint4(bits_of(halves[0]), bits_of(halves[1]), bits_of(halves[2]), bits_of(halves[3]));
    }
}

// Starts copies of KEYS keys and values.
template <typename Type, int DIM, int KEYS>
__device__ __forceinline__ void start_keys(const AttendArgs& args, const uint32_t* table, uint32_t kv_head, const KeyTile& tile) {
    const KvStore& store = args.store;
    const uint32_t tokens = store.block_tokens, own = tile.position(threadIdx.x % KEYS);
    const HeadPlace from = store.key<Type>(store.head(table[own / tokens], kv_head), own % tokens);
    each_own_piece<DIM, KEYS>(
        store.head_dim, [&](uint32_t row, uint32_t piece) { start_piece<Type>(tile.key(piece, row, KEYS), from, piece, own); },
        [&](uint32_t row, uint32_t piece) {
            const uint32_t at = tile.position(row);
            const HeadPlace value = store.value<Type>(store.head(table[at / tokens], kv_head), at % tokens);
            start_piece<Type>(piece_at<DIM>(tile.values, row, piece), value, piece, at);
        });
}

// Makes what this thread has brought f16. Where not all rows see all of the tile, a value that is not finite would
// reach those that do not see it, since 0 · NaN is NaN: then it becomes 0, and its key NaN, which who sees it gets.
template <typename Type, int DIM, int KEYS> __device__ __forceinline__ void finish_keys(const KeyTile& tile, uint32_t dim, bool all_seen) {
    if constexpr (!Type::IS_HALF) {
        each_own_piece<DIM, KEYS>(
            dim, [&](uint32_t row, uint32_t piece) { finish_piece<Type>(tile.key(piece, row, KEYS), tile.position(row)); },
            [&](uint32_t row, uint32_t piece) { finish_piece<Type>(piece_at<DIM>(tile.values, row, piece), tile.position(row)); });
    }
    if (all_seen) return __syncthreads();
    // Exponents of ones overflow into the sign's place.
    const auto is_finite = [&](uint32_t row, uint32_t piece) {
        const uint4 at = *reinterpret_cast<const uint4*>(piece_at<DIM>(tile.values, row, piece));
        const auto over = [](uint32_t pair) { return (pair & 0x7c007c00) + 0x04000400; };
        return ((over(at.x) | over(at.y) | over(at.z) | over(at.w)) & 0x80008000) == 0;
    };
    const auto ignore = [](uint32_t, uint32_t) {};
    bool are_finite = true;
    each_own_piece<DIM, KEYS>(dim, ignore, [&](uint32_t row, uint32_t piece) { are_finite &= is_finite(row, piece); });
    if (__syncthreads_and(are_finite)) return;
    each_own_piece<DIM, KEYS>(dim, ignore, [&](uint32_t row, uint32_t piece) {
        if (is_finite(row, piece)) return;
        *reinterpret_cast<uint4*>(piece_at<DIM>(tile.values, row, piece)) = make_uint4(0, 0, 0, 0);
        *reinterpret_cast<uint16_t*>(tile.key(0, row, KEYS)) = 0x7e00;
    });
    __syncthreads();
}

// s[16 rows, KEYS] = Q · Kᵀ
template <int DIM, int KEYS> __device__ __forceinline__ void multiply_keys(uint8_t* queries, uint32_t first_row, const uint8_t* keys, float s[KEYS / 8][4]) {
    const uint32_t lane = threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < KEYS / 8; j++) s[j][0] = s[j][1] = s[j][2] = s[j][3] = 0;
#pragma unroll
    for (int k = 0; k < DIM / 16; k++) {
        uint32_t a[4];
        load_matrices_at(a, piece_at<DIM>(queries, first_row + lane % 16, 2 * k + lane / 16));
#pragma unroll
        for (int j = 0; j < KEYS / 8; j += 2) {
            uint32_t b[4];
            load_matrices_at(b, keys + ((2 * k + lane / 8 % 2) * KEYS + 8 * (j + lane / 16) + lane % 8) * 16);
            multiply_halves(s[j], a, b[0], b[1]);
            multiply_halves(s[j + 1], a, b[2], b[3]);
        }
    }
}

// o[16 rows, DIM] += P · V
template <int DIM, int KEYS> __device__ __forceinline__ void add_values(const float p[KEYS / 8][4], uint8_t* values, float o[DIM / 8][4]) {
    const uint32_t lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < KEYS / 16; k++) {
        uint32_t a[4];
#pragma unroll
        for (int i = 0; i < 4; i++) a[i] = bits_of(__floats2half2_rn(p[2 * k + i / 2][i % 2 * 2], p[2 * k + i / 2][i % 2 * 2 + 1]));
#pragma unroll
        for (int d = 0; d < DIM / 8; d += 2) {
            uint32_t b[4];
            load_transposed_at(b, piece_at<DIM>(values, 16 * k + lane % 16, d + lane / 16));
            multiply_halves(o[d], a, b[0], b[1]);
            multiply_halves(o[d + 1], a, b[2], b[3]);
        }
    }
}

// The two rows of a lane: g and g + 8 of its warp's.
struct FlashRows {
    uint32_t from[2], position[2]; // what they see: both ends included
    float max[2], weight[2];       // in units of log 2; the weight is this lane's part
};

// Scores to weights: p = 2^(score − max), with what no row sees at 0; sums so far shrink.
template <int DIM, int KEYS>
__device__ __forceinline__ void weigh(const AttendArgs& args, uint32_t first_key, bool all_seen, FlashRows& rows, float p[KEYS / 8][4], float o[DIM / 8][4]) {
    const uint32_t lane = threadIdx.x % 32;
    const float scale = args.softcap > 0 ? args.scale / args.softcap : args.scale * LOG2_E;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float max = rows.max[r];
#pragma unroll
        for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
            for (int i = 2 * r; i < 2 * r + 2; i++) {
                float score = p[j][i] * scale;
                if (args.softcap > 0) score = args.softcap * LOG2_E * tanhf(score);
                const uint32_t key = first_key + 8 * j + lane % 4 * 2 + i % 2;
                if (!all_seen && (key < rows.from[r] || key > rows.position[r])) score = -INFINITY;
                p[j][i] = score;
                max = fmaxf(max, score);
            }
        max = fmaxf(max, __shfl_xor_sync(~0u, max, 1));
        max = fmaxf(max, __shfl_xor_sync(~0u, max, 2));
        // A row that has seen nothing yet has no largest score.
        const float base = max == -INFINITY ? 0.0f : max, shrink = exp2f(rows.max[r] - base);
        rows.max[r] = max;
        float weight = rows.weight[r] * shrink;
#pragma unroll
        for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
            for (int i = 2 * r; i < 2 * r + 2; i++) {
                p[j][i] = exp2f(p[j][i] - base);
                weight += p[j][i];
            }
        rows.weight[r] = weight;
        if (__all_sync(~0u, shrink == 1.0f)) continue;
#pragma unroll
        for (int d = 0; d < DIM / 8; d++) o[d][2 * r] *= shrink, o[d][2 * r + 1] *= shrink;
    }
}

// A row's sums in shared memory, [ROWS][DIM] f32, in pieces of four: no two of eight rows share a bank.
template <int DIM> __device__ __forceinline__ float* sums_at(float* sums, uint32_t row, uint32_t piece) { return sums + row * DIM + (piece ^ row % 8) * 4; }

// Adds up the sums of the cluster's blocks, each of which stores a part of the rows, through all of their shared memory.
template <int DIM, int ROWS>
__device__ __forceinline__ void merge_blocks(const FlashArgs& args, const FlashTile& tile, float4* kept, float* sums, const FlashRows& rows, const float o[DIM / 8][4]) {
    const AttendArgs& attend = args.attend;
    const uint32_t lane = threadIdx.x % 32, first_row = threadIdx.x / 32 * 16, dim = attend.store.head_dim;
    // A block without positions comes here while others of its threads still fill that memory.
    __syncthreads();
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const uint32_t row = first_row + lane / 4 + 8 * r;
        if (lane % 4 == 0) kept[row] = make_float4(rows.max[r], rows.weight[r], 0, 0);
#pragma unroll
        for (int d = 0; d < DIM / 8; d++) {
            *reinterpret_cast<float2*>(sums_at<DIM>(sums, row, 2 * d + lane % 4 / 2) + lane % 2 * 2) = make_float2(o[d][2 * r], o[d][2 * r + 1]);
        }
    }
    meet_cluster();
    const uint32_t each = ROWS / args.blocks;
    for (uint32_t index = threadIdx.x; index < each * (DIM / 4); index += blockDim.x) {
        const uint32_t row = blockIdx.x % args.blocks * each + index / (DIM / 4), piece = index % (DIM / 4), token = row / tile.group;
        if (token >= tile.tokens || 4 * piece >= dim) continue;
        float4 of[CLUSTER_MAX], own[CLUSTER_MAX];
        float max = -INFINITY, weight = 0;
#pragma unroll
        for (uint32_t rank = 0; rank < CLUSTER_MAX; rank++) {
            if (rank >= args.blocks) break;
            own[rank] = load_from(rank, shared_address(kept + row));
            of[rank] = load_from(rank, shared_address(sums_at<DIM>(sums, row, piece)));
            max = fmaxf(max, own[rank].x);
        }
        float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
        for (uint32_t rank = 0; rank < CLUSTER_MAX; rank++) {
            if (rank >= args.blocks) break;
            // A block whose positions the row does not see has nothing.
            const float shrink = exp2f(own[rank].x - (max == -INFINITY ? 0.0f : max));
            weight += shrink * own[rank].y;
            sum.x += shrink * of[rank].x, sum.y += shrink * of[rank].y, sum.z += shrink * of[rank].z, sum.w += shrink * of[rank].w;
        }
        const size_t head = static_cast<size_t>(tile.first_token + token) * attend.n_heads + tile.kv_head * tile.group + row % tile.group;
        *reinterpret_cast<float4*>(attend.out + head * dim + 4 * piece) = make_float4(sum.x / weight, sum.y / weight, sum.z / weight, sum.w / weight);
    }
    // Others read this block's.
    __syncwarp();
    meet_cluster();
}

template <typename Type, int DIM, int WARPS, int KEYS> __device__ __forceinline__ void flash(const FlashArgs& args) {
    constexpr int ROWS = 16 * WARPS, TILE = KEYS * DIM * 2;
    extern __shared__ __align__(128) uint8_t flash_shared[];
    uint8_t *const queries = flash_shared, *const keys = queries + ROWS * DIM * 2, *const values = keys + 2 * TILE;
    begin();
    const AttendArgs& attend = args.attend;
    const FlashTile tile(args);
    const uint32_t lane = threadIdx.x % 32, first_row = threadIdx.x / 32 * 16, dim = attend.store.head_dim;
    const uint32_t base = attend.tokens.positions[tile.first_token], end = base + tile.tokens;
    const uint32_t* table = attend.tokens.blocks + attend.tokens.tables[tile.first_token];
    const uint32_t first_step = seen_from(base, attend.window) / KEYS;
    const uint32_t turn = (args.blocks + blockIdx.x % args.blocks - first_step % args.blocks) % args.blocks;
    const uint32_t first = (first_step + turn) * KEYS, next_keys = args.blocks * KEYS;
    if (first < end) start_keys<Type, DIM, KEYS>(attend, table, tile.kv_head, {keys, values, first, end});
    commit_copies();
    load_queries<DIM, ROWS>(args, tile, queries);
    // Keys beyond a head's elements meet queries of zeros: they must be numbers.
    for (uint32_t i = dim / 8 * KEYS + threadIdx.x; i < DIM / 8 * KEYS; i += blockDim.x) {
        reinterpret_cast<uint4*>(keys)[i] = reinterpret_cast<uint4*>(keys + TILE)[i] = make_uint4(0, 0, 0, 0);
    }
    FlashRows rows;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        rows.position[r] = base + (first_row + lane / 4 + 8 * r) / tile.group;
        rows.from[r] = seen_from(rows.position[r], attend.window);
        rows.max[r] = -INFINITY, rows.weight[r] = 0;
    }
    // What all rows of this warp see, and what any does.
    const uint32_t lowest = base + first_row / tile.group, highest = min(base + (first_row + 15) / tile.group, end - 1);
    const uint32_t seen_by_any = seen_from(lowest, attend.window), seen_by_all = seen_from(highest, attend.window);
    const bool has_rows = lowest < end;
    float o[DIM / 8][4] = {};
    uint32_t stage = 0;
    for (uint32_t at = first; at < end; at += next_keys, stage ^= 1) {
        const KeyTile now = {keys + stage * TILE, values + stage * TILE, at, end};
        const KeyTile next = {keys + (stage ^ 1) * TILE, values + (stage ^ 1) * TILE, at + next_keys, end};
        if (next.first < end) start_keys<Type, DIM, KEYS>(attend, table, tile.kv_head, next);
        commit_copies();
        wait_for_copies<1>();
        finish_keys<Type, DIM, KEYS>(now, dim, at + KEYS - 1 <= base && at >= seen_from(end - 1, attend.window));
        if (has_rows && at <= highest && at + KEYS > seen_by_any) {
            float p[KEYS / 8][4];
            multiply_keys<DIM, KEYS>(queries, first_row, now.keys, p);
            const bool all_seen = at >= seen_by_all && at + KEYS - 1 <= lowest;
            weigh<DIM, KEYS>(attend, at, all_seen, rows, p, o);
            add_values<DIM, KEYS>(p, now.values, o);
        }
        __syncthreads();
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        rows.weight[r] += __shfl_xor_sync(~0u, rows.weight[r], 1);
        rows.weight[r] += __shfl_xor_sync(~0u, rows.weight[r], 2);
    }
    if (args.blocks > 1) return merge_blocks<DIM, ROWS>(args, tile, reinterpret_cast<float4*>(queries), reinterpret_cast<float*>(keys), rows, o);
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const float weight = rows.weight[r];
        const uint32_t row = first_row + lane / 4 + 8 * r, token = row / tile.group;
        if (token >= tile.tokens) continue;
        const size_t head = static_cast<size_t>(tile.first_token + token) * attend.n_heads + tile.kv_head * tile.group + row % tile.group;
#pragma unroll
        for (int d = 0; d < DIM / 8; d++) {
            const uint32_t i = 8 * d + lane % 4 * 2;
            if (i < dim) *reinterpret_cast<float2*>(attend.out + head * dim + i) = make_float2(o[d][2 * r] / weight, o[d][2 * r + 1] / weight);
        }
    }
}

#define FLASH(name, type, dims, warps, keys)                                          \
    extern "C" __global__ void __launch_bounds__(32 * warps)                          \
        flash_##name##_##dims##_##warps(const __grid_constant__ FlashArgs args) {     \
        flash<type, dims, warps, keys>(args);                                         \
    }
#define FLASH_DIM(name, type, dims) \
    FLASH(name, type, dims, 4, 32)  \
    FLASH(name, type, dims, 8, 64)
#define FLASH_TYPE(name, type)  \
    FLASH_DIM(name, type, 64)   \
    FLASH_DIM(name, type, 128)  \
    FLASH_DIM(name, type, 256)
FLASH_TYPE(f16, KvF16)
FLASH_TYPE(bf16, KvBf16)
FLASH_TYPE(fp8_e4m3, KvE4m3)
FLASH_TYPE(q8_0, KvQ8)
