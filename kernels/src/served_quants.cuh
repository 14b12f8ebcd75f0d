// Types of AWQ, GPTQ and FP8 checkpoints. Included by quants.cuh alone, which has what they are made of.
#pragma once

// Nibbles of AWQ and GPTQ: every SHARE elements of a chunk have an f16 d and a zero point z. These lie together,
// first all d and then all z, as bytes or, of four, as nibbles. d·q and −d·z are exact in f32.
template <int SHARE> struct Int4 : Q4_1 {
    static constexpr int COUNT = CHUNK * GROUP / SHARE, SCALE_BYTES = COUNT == 1 ? 4 : COUNT == 2 ? 6 : 10, SCALE_GROUPS = CHUNK;
    static constexpr bool HAS_ZEROS = true;
    template <class At> static __device__ __forceinline__ void load_scales(At block, int, uint32_t s[4]) {
        if constexpr (COUNT == 1) {
            load_words<4>(block, s);
        } else {
            s[0] = short_at(block) | short_at(block + 2) << 16;
            if constexpr (COUNT == 4) s[1] = short_at(block + 4) | short_at(block + 6) << 16;
            s[COUNT / 2] = short_at(block + 2 * COUNT);
        }
    }
    static __device__ __forceinline__ uint32_t step(const uint32_t w[4], int j) {
        const int i = j * COUNT / CHUNK;
        return w[i / 2] >> 16 * (i % 2) & 0xffff;
    }
    static __device__ __forceinline__ uint32_t zero(const uint32_t w[4], int j) {
        if constexpr (COUNT == 1) return w[0] >> 16;
        constexpr int BITS = COUNT == 2 ? 8 : 4;
        return w[COUNT / 2] >> BITS * (j * COUNT / CHUNK) & ((1 << BITS) - 1);
    }
    static __device__ __forceinline__ void scales(const uint32_t w[4], int j, Scales& s) {
        s.scale[0] = half_of(step(w, j));
        s.min[0] = -(s.scale[0] * static_cast<float>(zero(w, j)));
    }
};

// Bytes of FP8 models: every SHARE elements have an f32 scale, those of a chunk lie together.
template <int SHARE> struct E4m3 : Facts {
    static constexpr int LOW_BITS = 8, COUNT = CHUNK * GROUP / SHARE, SCALE_BYTES = 4 * COUNT, SCALE_GROUPS = CHUNK;
    static constexpr bool IS_FLOAT = true;
    template <class At> static __device__ __forceinline__ void load_scales(At block, int, uint32_t s[4]) { load_words<4 * COUNT>(block, s); }
    static __device__ __forceinline__ uint32_t decode(const Raw& raw, int j, bool upper) { return raw.quants[2 * j + upper]; }
    static __device__ __forceinline__ void scales(const uint32_t w[4], int j, Scales& s) { s.scale[0] = __uint_as_float(w[j * COUNT / CHUNK]); }
};

// Four e4m3 as f16 with the same bits, which are 1/256 of them, exactly: the first and third, and the other two.
__device__ __forceinline__ void split_e4m3(uint32_t w, __half2 pairs[2]) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const uint32_t tops = i == 0 ? w << 8 : w, bits = tops & 0x80008000u | tops >> 1 & 0x3f803f80u;
        pairs[i] = *reinterpret_cast<const __half2*>(&bits);
    }
}
