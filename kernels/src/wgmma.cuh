// What kernels share that multiply with Hopper's asynchronous tensor cores: these take weights from registers,
// to which they are decoded, and f16 activations from shared memory, to which others have them copied, tiles
// ahead.
#pragma once
#include "wide.cuh"

// Barriers in shared memory that count arrivals and bytes.
__device__ __forceinline__ void start_barrier(uint32_t barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void wait_at(uint32_t barrier, uint32_t parity) {
    uint32_t is_done;
    do {
        asm volatile("{\n.reg .pred p;\n"
                     "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
                     "selp.u32 %0, 1, 0, p;\n}"
                     : "=r"(is_done) : "r"(barrier), "r"(parity) : "memory");
    } while (!is_done);
}

__device__ __forceinline__ void arrive_at(uint32_t barrier) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory"); }

// Arrives, and lets a barrier wait for bytes, too.
__device__ __forceinline__ void expect_bytes(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Arrives when all copies that this thread has asked for so far are there.
__device__ __forceinline__ void arrive_with_copies(uint32_t barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// Copies bytes to shared memory, and tells a barrier when they are there.
__device__ __forceinline__ void copy_bytes(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}

// Tiles of activations, which go round. One is full when its bytes are there, and free when all warps
// have multiplied with it.
template <class Shape> struct TileRing {
    uint32_t shared; // tiles, then a barrier `full` and one `free` for each
    uint32_t index = 0, parity = 0;

    __device__ __forceinline__ uint32_t tile() const { return shared + index * Shape::TILE; }
    __device__ __forceinline__ uint32_t full() const { return shared + Shape::TILES * Shape::TILE + 8 * index; }
    __device__ __forceinline__ uint32_t free() const { return full() + 8 * Shape::TILES; }

    __device__ __forceinline__ void advance() {
        if (++index == Shape::TILES) index = 0, parity ^= 1;
    }
};

// `bringing` tell when a tile is there, `leaving` when it is free.
template <class Shape> __device__ __forceinline__ void start_barriers(TileRing<Shape> ring, uint32_t bringing = 1, uint32_t leaving = 4 * Shape::WARPGROUPS) {
    for (int i = 0; i < Shape::TILES; i++, ring.advance()) {
        start_barrier(ring.full(), bringing);
        start_barrier(ring.free(), leaving);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Shared memory as tensor cores are told of it: rows of 128 bytes whose pieces are swizzled.
__device__ __forceinline__ uint64_t tile_descriptor(uint32_t tile) {
    constexpr uint64_t EIGHT_ROWS = 8 * ROW_BYTES / 16, SWIZZLE_128 = 1;
    return (tile >> 4 & 0x3fff) | 1ull << 16 | EIGHT_ROWS << 32 | SWIZZLE_128 << 62;
}

#define SUMS_OF(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define SUMS_OF_4(j) SUMS_OF(j), SUMS_OF(j + 1), SUMS_OF(j + 2), SUMS_OF(j + 3)
#define SUMS_32 SUMS_OF_4(0)
#define SUMS_64 SUMS_32, SUMS_OF_4(4)
#define SUMS_96 SUMS_64, SUMS_OF_4(8)
#define SUMS_128 SUMS_96, SUMS_OF_4(12)
#define SUMS_160 SUMS_128, SUMS_OF_4(16)
#define SUMS_192 SUMS_160, SUMS_OF_4(20)
#define SUMS_224 SUMS_192, SUMS_OF_4(24)
#define SUMS_256 SUMS_224, SUMS_OF_4(28)
// As operands.
#define NUMBERS_32 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define NUMBERS_64 NUMBERS_32 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NUMBERS_96 NUMBERS_64 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define NUMBERS_128 NUMBERS_96 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define NUMBERS_160 NUMBERS_128 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define NUMBERS_192 NUMBERS_160 ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define NUMBERS_224 NUMBERS_192 ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define NUMBERS_256 NUMBERS_224 ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// d[64 rows, columns] += 16 elements of a · b. Neither a nor d is touched before the product is done.
#define MULTIPLY_ASYNC(columns, operands)                                                                                  \
    __device__ __forceinline__ void multiply_async(float (&d)[columns / 8][4], const uint32_t a[4], uint64_t b) {          \
        asm volatile("wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32.f16.f16 {" NUMBERS_##columns "}, " operands ", 1, 1, 1, 0;" \
                     : SUMS_##columns                                                                                      \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                                 \
    }
MULTIPLY_ASYNC(32, "{%16, %17, %18, %19}, %20")
MULTIPLY_ASYNC(64, "{%32, %33, %34, %35}, %36")
MULTIPLY_ASYNC(96, "{%48, %49, %50, %51}, %52")
MULTIPLY_ASYNC(128, "{%64, %65, %66, %67}, %68")
MULTIPLY_ASYNC(160, "{%80, %81, %82, %83}, %84")
MULTIPLY_ASYNC(192, "{%96, %97, %98, %99}, %100")
MULTIPLY_ASYNC(224, "{%112, %113, %114, %115}, %116")
MULTIPLY_ASYNC(256, "{%128, %129, %130, %131}, %132")

#undef MULTIPLY_ASYNC

__device__ __forceinline__ void start_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until all but the last PENDING of what was committed are done.
template <int PENDING> __device__ __forceinline__ void wait_for_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Sums are not read, or written, across this.
template <int TILES> __device__ __forceinline__ void hold(float (&d)[TILES][4]) {
#pragma unroll
    for (int j = 0; j < TILES; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) asm volatile("" : "+f"(d[j][i])::"memory");
}
