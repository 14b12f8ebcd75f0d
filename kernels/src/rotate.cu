// Rotates queries in place, and stores rotated keys, and values: a kernel for each type of the store.
#include "rotate.cuh"

// One warp per head of a token: grid (heads of all kinds, tokens).
template <typename Type> __device__ __forceinline__ void rotate_head(const RotateArgs& args) {
    __shared__ float rotated[HEAD_DIM_MAX];
    let_next_start();
    const KvStore& store = args.store;
    const uint32_t head = blockIdx.x, token = blockIdx.y, dim = store.head_dim, n_kv = store.n_kv_heads, n_heads = args.n_heads;
    const uint32_t position = args.tokens.positions[token], table = args.tokens.tables[token];
    const uint32_t block = args.tokens.blocks[table + position / store.block_tokens], slot = position % store.block_tokens;
    const HeadRotation rotation(args, token, head);
    wait_for_earlier();
    rotation.rotate(args, rotated);
    if (head < n_heads) {
        turn_query<Type>(rotated, dim);
        float* const out = args.heads + (static_cast<size_t>(token) * (n_heads + 2 * n_kv) + head) * dim;
        for (uint32_t i = threadIdx.x; i < dim; i += 32) out[i] = rotated[i];
        return;
    }
    const bool is_key = head < n_heads + n_kv;
    const size_t base = store.head(block, head - n_heads - (is_key ? 0 : n_kv));
    const HeadPlace place = is_key ? store.key<Type>(base, slot) : store.value<Type>(base, slot);
    store_head<Type>(rotated, dim, is_key, place);
}

#define ROTATE(name, type)                                                                                              \
    extern "C" __global__ void __launch_bounds__(32) rotate_##name(const __grid_constant__ RotateArgs args) {           \
        rotate_head<type>(args);                                                                                        \
    }
ROTATE(f16, KvF16)
ROTATE(bf16, KvBf16)
ROTATE(fp8_e4m3, KvE4m3)
ROTATE(q8_0, KvQ8)
