// Rotates queries in place, and stores rotated keys, and values.
#include "rotate.cuh"

// One warp per head of a token: grid (heads of all kinds, tokens).
extern "C" __global__ void __launch_bounds__(32) rotate_heads(const __grid_constant__ RotateArgs args) {
    __shared__ float rotated[HEAD_DIM_MAX];
    let_next_start();
    const KvStore& store = args.store;
    const uint32_t head = blockIdx.x, token = blockIdx.y, dim = store.head_dim, n_kv = store.n_kv_heads, n_heads = args.n_heads;
    const uint32_t position = args.tokens.positions[token], table = args.tokens.tables[token];
    const uint32_t block = args.tokens.blocks[table + position / store.block_tokens];
    const HeadRotation rotation(args, token, head);
    wait_for_earlier();
    rotation.rotate(args, rotated);
    if (head < n_heads) {
        float* const out = args.heads + (static_cast<size_t>(token) * (n_heads + 2 * n_kv) + head) * dim;
        for (uint32_t i = threadIdx.x; i < dim; i += 32) out[i] = rotated[i];
        return;
    }
    const bool is_value = head >= n_heads + n_kv;
    store_head(store, rotated, store.head(block, head - n_heads - (is_value ? n_kv : 0)), position % store.block_tokens, is_value);
}
