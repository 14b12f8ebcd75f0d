// How blocks of a cluster meet, and read each other's shared memory: Hopper and later.
#pragma once
#include "tensor_cores.cuh"

constexpr uint32_t CLUSTER_MAX = 8;

// Until all threads of the cluster are here, and what they wrote can be seen.
__device__ __forceinline__ void meet_cluster() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// What lies at this address in the shared memory of block `rank` of the cluster.
__device__ __forceinline__ float4 load_from(uint32_t rank, uint32_t address) {
    float4 v = make_float4(0, 0, 0, 0);
#if __CUDA_ARCH__ >= 900
    uint32_t there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(there));
#endif
    return v;
}
