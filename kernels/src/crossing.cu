// Rows cross between GPU and CPU inside a step, through host memory that kernels read and write themselves: copy
// engines are busy with weights. A few blocks suffice for what the bus carries, and more of them hinder each other
// when they look at the flag: on an H200, where a thread had 4 fours at a time, 8 rows of 4096 went to the CPU and
// back in 12.4 us with 4 blocks of 256 threads, 21.4 with 16 and 37.3 with 64.
#include "event.cuh"
#include "launch.cuh"

struct CrossingArgs {
    const float4* from;
    float4* to;
    uint32_t* flags;      // `handed`; or `done`, and `released` next to it
    const uint32_t* base;
    uint32_t* finished;   // blocks of hand_over that are done; 0 between launches
    uint32_t quads, index;
};

// Fours that a thread has on their way at a time: what is read takes long to come.
constexpr int AT_ONCE = 8;

// What the host wrote, not what any cache remembers.
__device__ __forceinline__ float4 load_fresh(const float4* at) {
    float4 v;
    asm volatile("ld.relaxed.sys.global.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(at) : "memory");
    return v;
}

template <class Load> __device__ __forceinline__ void copy_quads(const CrossingArgs& args, Load load) {
    const uint32_t step = gridDim.x * blockDim.x;
    for (uint32_t first = blockIdx.x * blockDim.x + threadIdx.x; first < args.quads; first += AT_ONCE * step) {
        float4 quads[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            if (first + i * step < args.quads) quads[i] = load(args.from + first + i * step);
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            if (first + i * step < args.quads) args.to[first + i * step] = quads[i];
        }
    }
}

// Rows to the host; the last block that is done raises `handed`.
extern "C" __global__ void __launch_bounds__(512) hand_over(const __grid_constant__ CrossingArgs args) {
    begin();
    copy_quads(args, [](const float4* at) { return *at; });
    __syncthreads();
    if (threadIdx.x != 0) return;
    __threadfence();
    if (atomicAdd(args.finished, 1) != gridDim.x - 1) return;
    __threadfence();
    *args.finished = 0;
    store_flag(args.flags, event_number(args.base, args.index));
}

// Rows from the host, once `done` is raised or `released` set.
extern "C" __global__ void __launch_bounds__(512) take_back(const __grid_constant__ CrossingArgs args) {
    begin();
    if (threadIdx.x == 0) {
        const uint32_t number = event_number(args.base, args.index);
        const uint2* const flags = reinterpret_cast<const uint2*>(args.flags);
        for (uint2 both = load_flags(flags); !has_reached(both.x, number) && both.y == 0; both = load_flags(flags)) wait_a_moment();
    }
    __syncthreads();
    copy_quads(args, load_fresh);
}
