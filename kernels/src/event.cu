// Kernels of one thread that wait for an event of a step, or say that one took place.
#include "event.cuh"
#include "launch.cuh"

struct EventArgs {
    uint32_t* flag;
    const uint32_t* released; // ends waits when it is not 0
    const uint32_t* base;
    uint32_t index, unused;
};

extern "C" __global__ void __launch_bounds__(1) await_event(const __grid_constant__ EventArgs args) {
    begin();
    const uint32_t number = event_number(args.base, args.index);
    while (!has_reached(load_flag(args.flag), number) && load_flag(args.released) == 0) wait_a_moment();
}

// All kernels before it are done.
extern "C" __global__ void __launch_bounds__(1) raise_event(const __grid_constant__ EventArgs args) {
    begin();
    store_flag(args.flag, event_number(args.base, args.index));
}
