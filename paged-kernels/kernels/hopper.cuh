// What only Hopper has, as functions: barriers in shared memory that count bytes, the copy engine, clusters, and wgmma.

#pragma once

#include <cstdint>

namespace hopper {

// A CUtensorMap, which the host makes; its header is not among nvcc's own.
struct alignas(128) Map {
    uint64_t words[16];
};

__device__ inline void barrier_init(uint32_t barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes barriers known to the copy engine and to the cluster.
__device__ inline void barriers_ready() {
    asm volatile("fence.mbarrier_init.release.cluster; fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ inline void barrier_expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ inline void barrier_wait(uint32_t barrier, uint32_t parity) {
    asm volatile(
        "{ .reg .pred done; again: "
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1; "
        "@!done bra again; }" ::"r"(barrier), "r"(parity) : "memory");
}

// The same place of shared memory in another block of the cluster.
__device__ inline uint32_t in_block(uint32_t address, uint32_t rank) {
    uint32_t there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    return there;
}

// At a barrier of any block of the cluster; `there` is of in_block. It orders what the block itself has seen, no more:
// a wider scope is a fence of the whole card each time.
__device__ inline void barrier_arrive(uint32_t there) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(there) : "memory");
}

__device__ inline float read(uint32_t there) {
    float x;
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(x) : "r"(there) : "memory");
    return x;
}

// Asked for again each time, not kept in a register.
__device__ inline uint32_t cluster_rank() {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

__device__ inline void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ inline void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// A box of a matrix, its corner at column x and row y.
__device__ inline void copy_box(uint32_t to, const Map *map, uint32_t x, uint32_t y, uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
        "l"(map), "r"(x), "r"(y), "r"(barrier)
        : "memory");
}

// As copy_box, to the same place in every block of the cluster that `blocks` has a bit for.
__device__ inline void copy_box_to(uint32_t to, const Map *map, uint32_t x, uint32_t y, uint32_t barrier,
                                   uint16_t blocks) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, "
        "%3}], [%4], %5;" ::"r"(to),
        "l"(map), "r"(x), "r"(y), "r"(barrier), "h"(blocks)
        : "memory");
}

// What wgmma is told of a tile of rows of 128 bytes in the copy engine's swizzle: its address, and 1024 bytes from
// eight rows to the next eight.
__device__ inline uint64_t tile(uint32_t address) {
    return uint64_t((address & 0x3ffff) >> 4) | uint64_t(1) << 16 | uint64_t(64) << 32 | uint64_t(1) << 62;
}

__device__ inline void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits for all but the last `N` groups.
template <int N>
__device__ inline void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// Sums may be read from here on: the compiler does not know that a wait stands between them and wgmma.
template <int COUNT>
__device__ inline void wgmma_end(float (&c)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) asm volatile("" : "+f"(c[i])::"memory");
}

// c += a * transposed b: 64 rows of a and N of b, 16 columns of both.
template <int N>
__device__ void wgmma(float (&c)[N / 2], uint64_t a, uint64_t b);

// Operands by number: the first that many are the sums, then come a and b.
#define FIRST_32 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15" \
    ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FIRST_64 FIRST_32 \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
    ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FIRST_80 FIRST_64 \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define FIRST_88 FIRST_80 \
    ", %80, %81, %82, %83, %84, %85, %86, %87"
#define FIRST_108 FIRST_88 \
    ", %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103" \
    ", %104, %105, %106, %107"
#define FIRST_128 FIRST_108 \
    ", %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123" \
    ", %124, %125, %126, %127"
#define FOUR(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define SIXTEEN(i) FOUR(i), FOUR(i + 4), FOUR(i + 8), FOUR(i + 12)
#define WGMMA(N, A, B, ...)                                                                                     \
    template <>                                                                                                 \
    __device__ inline void wgmma<N>(float (&c)[N / 2], uint64_t a, uint64_t b) {                                \
        asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" FIRST_##A " }, %" #A ", %" #B  \
                     ", 1, 1, 1, 0, 0;"                                                                         \
                     : __VA_ARGS__                                                                              \
                     : "l"(a), "l"(b));                                                                         \
    }

WGMMA(64, 32, 33, SIXTEEN(0), SIXTEEN(16))
WGMMA(128, 64, 65, SIXTEEN(0), SIXTEEN(16), SIXTEEN(32), SIXTEEN(48))
WGMMA(160, 80, 81, SIXTEEN(0), SIXTEEN(16), SIXTEEN(32), SIXTEEN(48), SIXTEEN(64))
WGMMA(176, 88, 89, SIXTEEN(0), SIXTEEN(16), SIXTEEN(32), SIXTEEN(48), SIXTEEN(64), FOUR(80), FOUR(84))
WGMMA(216, 108, 109, SIXTEEN(0), SIXTEEN(16), SIXTEEN(32), SIXTEEN(48), SIXTEEN(64), SIXTEEN(80), FOUR(96), FOUR(100), FOUR(104))
WGMMA(256, 128, 129, SIXTEEN(0), SIXTEEN(16), SIXTEEN(32), SIXTEEN(48), SIXTEEN(64), SIXTEEN(80), SIXTEEN(96), SIXTEEN(112))

#undef WGMMA
#undef SIXTEEN
#undef FOUR
#undef FIRST_128
#undef FIRST_108
#undef FIRST_88
#undef FIRST_80
#undef FIRST_64
#undef FIRST_32

}  // namespace hopper
