// Events of a step, which GPU and CPU wait for: event.rs tells what their numbers are. Flags lie in the GPU's or
// in the host's memory.
#pragma once
#include <stdint.h>

__device__ __forceinline__ uint32_t event_number(const uint32_t* base, uint32_t index) { return *base + index + 1; }

__device__ __forceinline__ bool has_reached(uint32_t value, uint32_t number) { return static_cast<int32_t>(value - number) >= 0; }

// What is read after this was written before the flag was.
__device__ __forceinline__ uint32_t load_flag(const uint32_t* flag) {
    uint32_t value;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
    return value;
}

// Two flags next to each other, in one way to the host.
__device__ __forceinline__ uint2 load_flags(const uint2* flags) {
    uint64_t both;
    asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(both) : "l"(flags) : "memory");
    return make_uint2(static_cast<uint32_t>(both), static_cast<uint32_t>(both >> 32));
}

// Whoever reads it sees what this thread wrote before, and what others wrote that it knows to be done.
__device__ __forceinline__ void store_flag(uint32_t* flag, uint32_t value) {
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}

// Between two looks at a flag.
__device__ __forceinline__ void wait_a_moment() { __nanosleep(100); }
