// Launches overlap on GPUs of compute capability 9.0 and above: a kernel may start while the one before
// it still works (gpu.rs asks for that), so that its own start costs nothing. Every kernel therefore calls
// begin(), or let_next_start() and then wait_for_earlier(): before the latter it touches nothing that any
// earlier kernel writes, and all its blocks come past it. Weights may be asked for before: products of matrices
// that change inside a step are not started early (`DeviceMatrix::changing`).
#pragma once

__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Until all earlier kernels are done and what they wrote can be seen.
__device__ __forceinline__ void wait_for_earlier() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void begin() {
    let_next_start();
    wait_for_earlier();
}
