// Weights from the order of their file, or from the CPU's layout, into the device layout, after they have been
// copied there: one thread per lane of a chunk. Interleaved [14336, 4096] take 30 us as Q4_0 on an H200, 28 as Q4_K
// and 62 as Q6_K: 14 to 20 times as fast as the bus brings them.
#include "launch.cuh"
#include "quants.cuh"
#include "rows16.cuh"

// Blocks of a file, of GROUPS groups each: `low` and `high` are the bits of element e of group `index` of a block;
// byte i of the scales that lie together is at `scale(i)` of the first of their blocks, or nowhere.
template <class T> struct File;
constexpr int NOWHERE = -1;

// Nibbles as `Q4_0` has them, of a group's 16 bytes.
__device__ __forceinline__ int own_nibble(const uint8_t* bytes, int e) { return bytes[e % 16] >> e / 16 * 4 & 15; }

// Blocks of 32 elements: scales, high bits, then quants.
template <class T> struct PlainFile {
    static constexpr int GROUPS = 1, HIGHS = T::SCALE_BYTES, QUANTS = HIGHS + 4 * T::HIGH_BITS, BLOCK_BYTES = QUANTS + 4 * T::LOW_BITS;
    static __device__ int scale(int i) { return i; }
    static __device__ int low(const uint8_t* block, int, int e) {
        return T::LOW_BITS == 8 ? block[QUANTS + e] : own_nibble(block + QUANTS, e);
    }
    static __device__ int high(const uint8_t* block, int, int e) { return block[HIGHS + e / 8] >> e % 8 & 1; }
};
template <> struct File<Q4_0> : PlainFile<Q4_0> {};
template <> struct File<Q4_1> : PlainFile<Q4_1> {};
template <> struct File<Q5_0> : PlainFile<Q5_0> {};
template <> struct File<Q5_1> : PlainFile<Q5_1> {};
template <> struct File<Q8_0> : PlainFile<Q8_0> {};
template <> struct File<Iq4Nl> : PlainFile<Iq4Nl> {};

// Blocks of nibbles behind scales and zero points.
template <int GROUPS_, int QUANTS> struct Int4File {
    static constexpr int GROUPS = GROUPS_, BLOCK_BYTES = QUANTS + 16 * GROUPS;
    static __device__ int low(const uint8_t* block, int index, int e) { return own_nibble(block + QUANTS + 16 * index, e); }
};
template <> struct File<Int4<128>> : Int4File<4, 3> {
    static __device__ int scale(int i) { return i < 3 ? i : NOWHERE; }
};
template <> struct File<Int4<64>> : Int4File<2, 3> {
    static __device__ int scale(int i) { return i < 4 ? i / 2 * BLOCK_BYTES + i % 2 : (i - 4) * BLOCK_BYTES + 2; }
};
template <> struct File<Int4<32>> : Int4File<2, 5> {
    static __device__ int scale(int i) { return i < 8 ? i / 4 * BLOCK_BYTES + i % 4 : (i - 8) * BLOCK_BYTES + 4; }
};

// Blocks of a scale and elements.
template <int SHARE> struct File<E4m3<SHARE>> {
    static constexpr int GROUPS = SHARE / GROUP, BLOCK_BYTES = 4 + SHARE;
    static __device__ int low(const uint8_t* block, int index, int e) { return block[4 + GROUP * index + e]; }
    static __device__ int scale(int i) { return i / 4 * BLOCK_BYTES + i % 4; }
};

// Blocks of eight groups, whose scales lie together.
template <int BYTES, int SCALES> struct BlockFile {
    static constexpr int GROUPS = 8, BLOCK_BYTES = BYTES;
    static __device__ int scale(int i) { return SCALES + i; }
};

// Nibble of element `e` in group `index` of a K block: two groups share 32 bytes.
__device__ __forceinline__ int paired_nibble(const uint8_t* bytes, int index, int e) {
    return bytes[32 * (index / 2) + e] >> 4 * (index % 2) & 15;
}

// Two bits of element `e` in group `index`: four groups share 32 bytes.
__device__ __forceinline__ int shared_crumb(const uint8_t* bytes, int index, int e) {
    return bytes[32 * (index / 4) + e] >> 2 * (index % 4) & 3;
}

template <> struct File<Iq4Xs> : BlockFile<136, 0> {
    static __device__ int low(const uint8_t* block, int index, int e) { return own_nibble(block + 8 + 16 * index, e); }
};

template <> struct File<Q4K> : BlockFile<144, 0> {
    static __device__ int low(const uint8_t* block, int index, int e) { return paired_nibble(block + 16, index, e); }
};

template <> struct File<Q5K> : BlockFile<176, 0> {
    static __device__ int low(const uint8_t* block, int index, int e) { return paired_nibble(block + 48, index, e); }
    static __device__ int high(const uint8_t* block, int index, int e) { return block[16 + e] >> index & 1; }
};

template <> struct File<Q6K> : BlockFile<210, 192> {
    static __device__ int low(const uint8_t* block, int index, int e) {
        return block[64 * (index / 4) + 32 * (index % 2) + e] >> 4 * (index % 4 / 2) & 15;
    }
    static __device__ int high(const uint8_t* block, int index, int e) { return shared_crumb(block + 128, index, e); }
};

template <> struct File<Q3K> : BlockFile<110, 96> {
    static __device__ int low(const uint8_t* block, int index, int e) { return shared_crumb(block + 32, index, e); }
    static __device__ int high(const uint8_t* block, int index, int e) { return block[e] >> index & 1; }
};

template <> struct File<Q2K> : BlockFile<84, 0> {
    // d and m are behind 64 bytes of quants.
    static __device__ int scale(int i) { return i < 16 ? i : i + 64; }
    static __device__ int low(const uint8_t* block, int index, int e) { return shared_crumb(block + 16, index, e); }
};

struct PackArgs {
    const uint8_t* file; // rows `first_row` on
    uint8_t *quants, *highs, *scales;
    uint64_t first_row, rows;
    uint32_t groups;   // of a row in the file
    uint32_t all_rows; // of the matrix
};

// Stores COUNT words at a multiple of their bytes, or of 16.
template <int COUNT> __device__ __forceinline__ void store_words(uint8_t* to, const uint32_t* words) {
    if constexpr (COUNT == 1) *reinterpret_cast<uint32_t*>(to) = words[0];
    if constexpr (COUNT == 2) *reinterpret_cast<uint2*>(to) = make_uint2(words[0], words[1]);
    if constexpr (COUNT >= 4) *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
    if constexpr (COUNT == 8) store_words<4>(to + 16, words + 4);
}

// Packs what a lane has of a chunk: BITS bits of each element, in the order of `decode`.
template <int BITS, class Get> __device__ __forceinline__ void pack_lane(uint8_t* to, uint32_t t, Get get) {
    uint32_t words[BITS] = {};
#pragma unroll
    for (int j = 0; j < CHUNK; j++) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const uint32_t value = get(j, 16 * (i / 4) + 4 * t + i % 4);
            // Bytes are those of four elements; fields of a byte count lower and upper of each group.
            const uint32_t field = 2 * j + i / 4, fields = 8 / BITS;
            words[field / fields] |= value << (8 * (i % 4) + field % fields * BITS);
        }
    }
    store_words<BITS>(to, words);
}

// Lane t of a chunk of a row, and the scales of its group t; those that several groups have together go
// along with the first group. `block(i)` is block i of the row.
template <class T, class Block>
__device__ __forceinline__ void pack_chunk(const PackArgs& args, uint32_t row, uint32_t chunk, uint32_t t, Block block) {
    constexpr int GROUPS = File<T>::GROUPS, BLOCK_BYTES = File<T>::BLOCK_BYTES;
    const uint32_t chunks = (args.groups + CHUNK - 1) / CHUNK;
    const uint64_t lane = RowPlace(args.all_rows, chunks, row).at(chunk) * uint64_t{4} + t;
    const auto block_of = [&](int j) { return block((CHUNK * chunk + j) / GROUPS); };
    const auto is_there = [&](int j) { return CHUNK * chunk + j < args.groups; };
    pack_lane<T::LOW_BITS>(args.quants + lane * LANE_QUANTS<T>, t, [&](int j, int e) -> uint32_t {
        return is_there(j) ? File<T>::low(block_of(j), (CHUNK * chunk + j) % GROUPS, e) : 0;
    });
    if constexpr (T::HIGH_BITS > 0) {
        pack_lane<T::HIGH_BITS>(args.highs + lane * LANE_HIGHS<T>, t, [&](int j, int e) -> uint32_t {
            return is_there(j) ? File<T>::high(block_of(j), (CHUNK * chunk + j) % GROUPS, e) : 0;
        });
    }
    const uint32_t group = CHUNK * chunk + t;
    if (group % T::SCALE_GROUPS != 0) return;
    const Planes planes{args.quants, args.highs, args.scales};
    const size_t start = ScaleRow<T>(planes, args.all_rows, chunks, row).of(chunk) - args.scales + (T::SCALE_GROUPS == 1 ? t * T::SCALE_BYTES : 0);
    for (int i = 0; i < T::SCALE_BYTES; i++) {
        const int place = File<T>::scale(i);
        const bool is_some = place != NOWHERE && group + place / BLOCK_BYTES * GROUPS < args.groups;
        args.scales[start + i] = is_some ? block(group / GROUPS + place / BLOCK_BYTES)[place % BLOCK_BYTES] : 0;
    }
}

// Of rows one after the other: a thread has a lane of a chunk.
template <class T> __device__ void pack(const PackArgs& args) {
    const uint64_t index = static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    const uint32_t chunks = (args.groups + CHUNK - 1) / CHUNK;
    const uint64_t row = index / 4 / chunks;
    if (row >= args.rows) return;
    constexpr int BLOCK_BYTES = File<T>::BLOCK_BYTES;
    const uint8_t* const blocks = args.file + row * (args.groups / File<T>::GROUPS) * BLOCK_BYTES;
    pack_chunk<T>(args, args.first_row + row, index / 4 % chunks, index % 4, [&](uint32_t i) { return blocks + i * BLOCK_BYTES; });
}

// Chunks of 16 rows that a block of threads has.
constexpr uint32_t ROWS16_CHUNKS = 8;

// Of 16 interleaved rows: their blocks are put apart in shared memory, where lanes read them.
template <class T> __device__ void pack_rows16(const PackArgs& args) {
    constexpr uint32_t GROUPS = File<T>::GROUPS, BLOCK_BYTES = File<T>::BLOCK_BYTES, BLOCKS = ROWS16_CHUNKS * CHUNK / GROUPS;
    using Apart = ApartBlocks<T, BLOCK_BYTES>;
    constexpr uint32_t COLUMN_BYTES = INTERLEAVED_ROWS * Apart::STRIDE;
    __shared__ __align__(16) uint8_t apart[BLOCKS * COLUMN_BYTES];
    const uint32_t chunks = (args.groups + CHUNK - 1) / CHUNK, tiles = (chunks + ROWS16_CHUNKS - 1) / ROWS16_CHUNKS;
    const uint32_t row_group = blockIdx.x / tiles, first_chunk = blockIdx.x % tiles * ROWS16_CHUNKS;
    const uint32_t row_blocks = args.groups / GROUPS, first_block = first_chunk * CHUNK / GROUPS;
    const uint32_t count = min(BLOCKS, row_blocks - first_block);
    const size_t start = (static_cast<size_t>(row_group) * row_blocks + first_block) * BLOCK_BYTES;
    const uint4* const packed = reinterpret_cast<const uint4*>(args.file) + start;
#pragma unroll 4
    for (uint32_t i = threadIdx.x; i < count * BLOCK_BYTES; i += blockDim.x) {
        put_apart<T, Apart::STRIDE>(apart + i / BLOCK_BYTES * COLUMN_BYTES + Apart::SHIFT, i % BLOCK_BYTES, packed[i]);
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < 4 * INTERLEAVED_ROWS * ROWS16_CHUNKS; i += blockDim.x) {
        const uint32_t own = i / 4 % INTERLEAVED_ROWS, row = row_group * INTERLEAVED_ROWS + own;
        const uint32_t chunk = first_chunk + i / (4 * INTERLEAVED_ROWS);
        if (row >= args.all_rows || chunk >= chunks) continue;
        const uint8_t* const blocks = apart + own * Apart::STRIDE + Apart::SHIFT;
        pack_chunk<T>(args, row, chunk, i % 4, [&](uint32_t block) { return blocks + (block - first_block) * COLUMN_BYTES; });
    }
}

#define PACK(name, T)                                                                                      \
    extern "C" __global__ void __launch_bounds__(256) pack_##name(const __grid_constant__ PackArgs args) { \
        begin();                                                                                           \
        pack<T>(args);                                                                                     \
    }
FOR_QUANTIZED(PACK)
FOR_E4M3(PACK)

#define PACK_ROWS16(name, T)                                                                                      \
    extern "C" __global__ void __launch_bounds__(256) pack_rows16_##name(const __grid_constant__ PackArgs args) { \
        begin();                                                                                                  \
        pack_rows16<T>(args);                                                                                     \
    }
FOR_QUANTIZED(PACK_ROWS16)
