// What blocks do through the second-level cache, which they share.

#pragma once

#include <cstdint>

// Counts what a launch's blocks have written, and says how much it was before: by one thread between two barriers of its
// block. What any block's threads wrote before the first can then be read, past the first-level cache, after the second.
// Fences of all threads around a plain atomic do as much, 0.3 us later.
inline __device__ uint32_t arrive(uint32_t *count, uint32_t more) {
    uint32_t before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(count), "r"(more) : "memory");
    return before;
}

// Brings bytes, a multiple of 16, into it, and waits for nothing. Cards before Hopper can't.
inline __device__ void announce(const void *from, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
#endif
}
