// How products with few columns read: what lies along rows is divided into ranges of chunks; a warp streams the
// weights of its rows and range, and with the other warps of the range its activations, to shared memory, a
// chunk at a time, with some chunks always on their way.
#pragma once
#include "products.cuh"
#include "ring.cuh"

constexpr int NARROW_WARPS = 8;

// A lane's scales of a chunk of one row, as they come from memory. Of types with a scale for each group, or
// those of a chunk together, it has those of all four groups, of others that of group t.
template <class T> struct ChunkScales {
    static constexpr bool OWN = T::SCALE_GROUPS == 1, HAS_ALL = T::SCALE_GROUPS <= CHUNK;
    uint32_t words[OWN ? CHUNK * T::SCALE_BYTES / 4 : 4];

    template <class Row> __device__ __forceinline__ void load(const Row& row, uint32_t chunk) {
        if constexpr (OWN) load_words<CHUNK * T::SCALE_BYTES>(row.of(chunk), words);
        if constexpr (!OWN) T::load_scales(row.of(chunk), chunk % UNIT_CHUNKS<T> * CHUNK + threadIdx.x % 4, words);
    }

    // Scales and offsets of all groups.
    __device__ __forceinline__ void factors(uint32_t chunk, float out[CHUNK][Counts<T>::ALL]) const {
        const uint32_t lane = threadIdx.x % 32;
        Scales s;
        if constexpr (!HAS_ALL) T::scales(words, chunk % UNIT_CHUNKS<T> * CHUNK + lane % 4, s);
#pragma unroll
        for (int j = 0; j < CHUNK; j++) {
            if constexpr (HAS_ALL && !OWN) T::scales(words, j, s);
            if constexpr (OWN) {
                const uint32_t own[4] = {T::SCALE_BYTES == 2 ? words[j / 2] >> 16 * (j % 2) & 0xffff : words[j]};
                T::scales(own, 0, s);
            }
#pragma unroll
            for (int i = 0; i < Counts<T>::ALL; i++) {
                const float own = i < Counts<T>::SCALES ? s.scale[i] : s.min[i - Counts<T>::SCALES];
                out[j][i] = HAS_ALL ? own : __shfl_sync(~0u, own, (lane & ~3) + j);
            }
        }
    }
};

constexpr int STREAM_THREADS = 32 * NARROW_WARPS;

// ROWS rows of a range per lane: quants of DEPTH chunks of each are on their way to shared memory, of which a
// lane reads only what it copied itself; and scales of the next chunk, to registers.
template <class T, int RANGES, int ROWS, int DEPTH> struct Stream {
    using Ring = LaneRing<T, ROWS, DEPTH, STREAM_THREADS>;
    static constexpr int BYTES = Ring::BYTES;

    Ring ring;
    uint32_t first, count; // chunks
    LaneRow<T> rows[ROWS];
    ScaleRow<T> scales_of[ROWS];
    ChunkScales<T> scales[ROWS];

    // Rows `row`, `row` + 8, ..., of which two at a time are of one block of rows.
    __device__ __forceinline__ Stream(const ProductArgs& args, const Part& part, uint8_t* shared, uint32_t range, uint32_t row) : ring{shared} {
        const uint32_t chunks = args.padded / CHUNK, each = (chunks + RANGES - 1) / RANGES;
        first = min(range * each, chunks), count = min(each, chunks - first);
#pragma unroll
        for (int k = 0; k < ROWS; k++) {
            const uint32_t own = min(row + k * 8, part.rows - 1);
            rows[k] = LaneRow<T>(part.planes, part.rows, chunks, own, first);
            scales_of[k] = ScaleRow<T>(part.planes, part.rows, chunks, own);
        }
    }

    // Past the end of the range the last one's come.
    __device__ __forceinline__ void load_scales_of(uint32_t index) {
        if (count == 0) return;
#pragma unroll
        for (int k = 0; k < ROWS; k++) scales[k].load(scales_of[k], first + min(index, count - 1));
    }

    __device__ __forceinline__ void take(uint32_t slot, Raw raw[ROWS]) const {
#pragma unroll
        for (int k = 0; k < ROWS; k++) ring.take(slot, k, raw[k]);
    }

    // Asks for the first chunks: weights may come before the kernel ahead of this one is done.
    __device__ __forceinline__ void start() {
#pragma unroll
        for (uint32_t slot = 0; slot < DEPTH; slot++) {
            if (slot < count) ring.copy(slot, rows, slot);
            commit_copies();
        }
        load_scales_of(0);
    }
};

// One range of TILES · 8 columns, or of a single one: words have 128 bytes a column, whose 16-byte piece p lies
// at p ^ 4 (column % 2); then come scales of pairs of groups, [pair][column % 2][column / 2]. No two of eight
// lanes share a bank. The lanes of WARPS warps copy and read together.
template <int WARPS, int TILES, bool SINGLE> struct Columns {
    static constexpr int COUNT = SINGLE ? 1 : 8 * TILES, HALF = COUNT / 2, LANES = 32 * WARPS;
    static constexpr int WORDS = COUNT * CHUNK * GROUP, SLOT = WORDS + COUNT * CHUNK * static_cast<int>(sizeof(GroupScale));

    uint8_t* ring;
    const uint4* words;
    const int4* scales;
    uint32_t stride, member;

    // Columns from `first` on; this is lane `member` of all. To be made when activations are there: no load of
    // them comes before.
    template <class Args>
    __device__ __forceinline__ Columns(const Args& args, uint8_t* shared, uint32_t first, uint32_t member) : ring(shared), stride(args.stride), member(member) {
        const int8_t* quants = args.quants;
        const GroupScale* from = args.scales;
        asm volatile("" : "+l"(quants), "+l"(from)::"memory");
        words = reinterpret_cast<const uint4*>(quants + static_cast<size_t>(first) * (CHUNK * GROUP)) + member;
        scales = reinterpret_cast<const int4*>(from + static_cast<size_t>(first) * CHUNK) + member;
    }

    // Asks for a chunk; `chunk` counts those of earlier passes, too.
    __device__ __forceinline__ void copy(uint32_t slot, uint32_t chunk) const {
        const uint32_t column = member / 8, piece = member % 8, of_scales = member / 2, pair = member % 2;
        const size_t columns = static_cast<size_t>(chunk) * stride;
        uint8_t* to = ring + slot * SLOT;
        if constexpr (SINGLE) {
            if (member < 8) copy_16_bytes(to + member * 16, words + columns * 8);
            if (member < 2) copy_16_bytes(to + WORDS + pair * 16, scales + columns * 2);
            return;
        }
        uint8_t* words_to = to + column * 128 + (piece ^ column % 2 * 4) * 16;
#pragma unroll
        for (int i = 0; i < COUNT * 8 / LANES; i++) copy_16_bytes(words_to + i * LANES * 16, words + columns * 8 + i * LANES);
        uint8_t* scales_to = to + WORDS + ((pair * 2 + of_scales % 2) * HALF + of_scales / 2) * 16;
#pragma unroll
        for (int i = 0; i < (COUNT * 2 + LANES - 1) / LANES; i++) {
            if (COUNT * 2 >= LANES || member < COUNT * 2) copy_16_bytes(scales_to + i * (LANES / 4) * 16, scales + columns * 2 + i * LANES);
        }
    }

    // Where piece `index` of 16 bytes of all columns' words, and then of their scales, belongs in a slot.
    static __device__ __forceinline__ uint32_t place_of(uint32_t index) {
        if (SINGLE) return index * 16;
        if (index < COUNT * 8) return index / 8 * 128 + (index % 8 ^ index / 8 % 2 * 4) * 16;
        const uint32_t column = (index - COUNT * 8) / 2;
        return WORDS + ((index % 2 * 2 + column % 2) * HALF + column / 2) * 16;
    }

    // A lane's words of a pair of groups of tile n: of column g, or the only one.
    __device__ __forceinline__ uint4 words_of(uint32_t slot, int pair, int n) const {
        const uint32_t g = SINGLE ? 0 : threadIdx.x % 32 / 4, t = threadIdx.x % 4;
        return *reinterpret_cast<const uint4*>(ring + slot * SLOT + (8 * n + g) * 128 + ((4 * pair + t) ^ g % 2 * 4) * 16);
    }

    // Scales and sums of column 2t + i of tile n, or of the only one.
    __device__ __forceinline__ int4 scales_of(uint32_t slot, int pair, int n, int i) const {
        const uint32_t place = SINGLE ? pair : (pair * 2 + i) * HALF + 4 * n + threadIdx.x % 4;
        return *reinterpret_cast<const int4*>(ring + slot * SLOT + WORDS + place * 16);
    }
};

// Sums of MTILES · 16 rows and TILES · 8 columns. Where they are SPLIT, those of the first two groups of a chunk and of
// the last two are apart, and so are every other chunk's: the order in which single.cuh adds, too.
template <int MTILES, int TILES, bool SPLIT> struct TileSums {
    static constexpr int HALVES = SPLIT ? 2 : 1;
    float own[HALVES][MTILES][TILES][4] = {}, other[HALVES][MTILES][TILES][4] = {};

    // Between one chunk and the next.
    __device__ __forceinline__ void turn() {
        if constexpr (!SPLIT) return;
#pragma unroll
        for (int i = 0; i < HALVES * MTILES * TILES * 4; i++) {
            float &a = (&own[0][0][0][0])[i], &b = (&other[0][0][0][0])[i];
            const float kept = a;
            a = b, b = kept;
        }
    }

    // All of them; it is the same whose turn it is.
    __device__ __forceinline__ float total(int m, int n, int i) const {
        if constexpr (!SPLIT) return own[0][m][n][i];
        const float of_own = own[0][m][n][i] + own[HALVES - 1][m][n][i], of_other = other[0][m][n][i] + other[HALVES - 1][m][n][i];
        return of_own + of_other;
    }
};

// acc += a chunk of MTILES · 16 rows times the columns of a slot.
template <class T, int MTILES, int TILES, bool SINGLE, bool SPLIT, class X>
__device__ __forceinline__ void multiply_slot(const Raw raw[2 * MTILES], const float factors[2 * MTILES][CHUNK][Counts<T>::ALL],
                                              const X& x, uint32_t slot, TileSums<MTILES, TILES, SPLIT>& acc) {
    constexpr int ALL = Counts<T>::ALL, SUMS = SINGLE ? 1 : 2;
#pragma unroll
    for (int pair = 0; pair < CHUNK / 2; pair++) {
        uint32_t a[2][MTILES][4];
#pragma unroll
        for (int k = 0; k < 2; k++)
#pragma unroll
            for (int m = 0; m < MTILES; m++)
#pragma unroll
                for (int word = 0; word < 4; word++) a[k][m][word] = T::decode(raw[2 * m + word % 2], 2 * pair + k, word / 2);
#pragma unroll
        for (int n = 0; n < TILES; n++) {
            const uint4 words = x.words_of(slot, pair, n);
            int4 scales[SUMS];
#pragma unroll
            for (int i = 0; i < SUMS; i++) scales[i] = x.scales_of(slot, pair, n, i);
#pragma unroll
            for (int k = 0; k < 2; k++) {
                ColumnScale<T> of[SUMS];
#pragma unroll
                for (int i = 0; i < SUMS; i++) of[i].set(k ? scales[i].z : scales[i].x, k ? scales[i].w : scales[i].y);
#pragma unroll
                for (int m = 0; m < MTILES; m++) {
                    float scale[ALL][2];
#pragma unroll
                    for (int i = 0; i < 2 * ALL; i++) scale[i / 2][i % 2] = factors[2 * m + i % 2][2 * pair + k][i / 2];
                    add_group<T, SUMS>(acc.own[SPLIT ? pair : 0][m][n], a[k][m], k ? words.z : words.x, k ? words.w : words.y, scale, of);
                }
            }
        }
    }
}

// Warps with the same range.
template <int RANGES> constexpr int ROW_WARPS = NARROW_WARPS / RANGES;

// Adds up the sums that the warps of each range have, of ranges in their order, and stores them: `store` takes a column,
// a row and its sum. `shared` is where weights and activations came.
template <int RANGES, int MTILES, int TILES, bool SINGLE, bool SPLIT, class Store>
__device__ __forceinline__ void add_ranges(const TileSums<MTILES, TILES, SPLIT>& acc, uint8_t* shared, const Store& store) {
    // Floats from a column to the next: no two lanes share a bank.
    constexpr int ROWS = 16 * MTILES * ROW_WARPS<RANGES>, COLUMNS = SINGLE ? 1 : TILES * 8, STRIDE = ROWS + 4;
    float (*sums)[COLUMNS][STRIDE] = reinterpret_cast<float (*)[COLUMNS][STRIDE]>(shared);
    const uint32_t lane = threadIdx.x % 32, range = threadIdx.x / 32 % RANGES, own = threadIdx.x / 32 / RANGES * (16 * MTILES);
    __syncthreads();
#pragma unroll
    for (int m = 0; m < MTILES; m++)
#pragma unroll
        for (int n = 0; n < TILES; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                if (SINGLE && (i % 2 || lane % 4)) continue;
                sums[range][SINGLE ? 0 : 8 * n + lane % 4 * 2 + i % 2][own + 16 * m + i / 2 * 8 + lane / 4] = acc.total(m, n, i);
            }
    __syncthreads();
    for (uint32_t index = threadIdx.x; index < COLUMNS * ROWS; index += NARROW_WARPS * 32) {
        const uint32_t column = index / ROWS, row = index % ROWS;
        float sum = sums[0][column][row];
#pragma unroll
        for (int r = 1; r < RANGES; r++) sum += sums[r][column][row];
        store(column, row, sum);
    }
}
