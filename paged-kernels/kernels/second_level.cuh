// What blocks do through the second-level cache, which they share.

#pragma once

#include <cstdint>

// What blocks hand to each other lies in places that are 0 between launches. No number that has been left there is +0, so each
// says by itself that it has come: nobody counts, and nobody fences. Who looks for them until all are there clears their
// places, and waits only for blocks of lower number, which wait for none of a higher one. A wide access is several of single words.
//
// Code that runs once comes as late as what it loads, so all of this is short, and has predicates for branches.
template <int N>
constexpr int WIDE = N % 4 == 0 ? 4 : N % 2 == 0 ? 2 : 1;

#define ONLY_IF(N, ACCESS) "{ .reg .pred is; setp.ne.u32 is, %" #N ", 0; @is " ACCESS "; }"

// Loads past the first-level cache, if it is.
template <int N>
__device__ void look(bool is, float (&x)[N], const void *from) {
#pragma unroll
    for (int i = 0; i < N; i += WIDE<N>) {
        const auto *at = static_cast<const float *>(from) + i;
        if constexpr (WIDE<N> == 4) {
            asm volatile(ONLY_IF(5, "ld.relaxed.gpu.global.v4.f32 {%0, %1, %2, %3}, [%4]")
                         : "+f"(x[i]), "+f"(x[i + 1]), "+f"(x[i + 2]), "+f"(x[i + 3]) : "l"(at), "r"(uint32_t(is)));
        } else if constexpr (WIDE<N> == 2) {
            asm volatile(ONLY_IF(3, "ld.relaxed.gpu.global.v2.f32 {%0, %1}, [%2]")
                         : "+f"(x[i]), "+f"(x[i + 1]) : "l"(at), "r"(uint32_t(is)));
        } else {
            asm volatile(ONLY_IF(2, "ld.relaxed.gpu.global.f32 %0, [%1]") : "+f"(x[i]) : "l"(at), "r"(uint32_t(is)));
        }
    }
}

// Stores, if it is.
template <int N>
__device__ void put(bool is, void *to, const float (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; i += WIDE<N>) {
        auto *at = static_cast<float *>(to) + i;
        if constexpr (WIDE<N> == 4) {
            asm volatile(ONLY_IF(5, "st.relaxed.gpu.global.v4.f32 [%4], {%0, %1, %2, %3}")
                         ::"f"(x[i]), "f"(x[i + 1]), "f"(x[i + 2]), "f"(x[i + 3]), "l"(at), "r"(uint32_t(is)));
        } else if constexpr (WIDE<N> == 2) {
            asm volatile(ONLY_IF(3, "st.relaxed.gpu.global.v2.f32 [%2], {%0, %1}")
                         ::"f"(x[i]), "f"(x[i + 1]), "l"(at), "r"(uint32_t(is)));
        } else {
            asm volatile(ONLY_IF(2, "st.relaxed.gpu.global.f32 [%1], %0") ::"f"(x[i]), "l"(at), "r"(uint32_t(is)));
        }
    }
}

#undef ONLY_IF

// For another block, to a place that is 0.
template <int N>
__device__ void leave(void *to, const float (&x)[N]) {
    float left[N];
#pragma unroll
    for (int i = 0; i < N; i++) left[i] = x[i] == 0.0f ? -0.0f : x[i];
    put(true, to, left);
}

// Of what `look` has loaded.
template <int N>
__device__ bool have_come(const float (&x)[N]) {
    bool all = true;
#pragma unroll
    for (int i = 0; i < N; i++) all = all & __float_as_uint(x[i]) != 0;
    return all;
}

// For the next launch, if it is.
template <int N>
__device__ void clear(bool is, void *to) {
    const float none[N] = {};
    put(is, to, none);
}

// Brings bytes, a multiple of 16, into it, and waits for nothing. Cards before Hopper can't.
inline __device__ void announce(const void *from, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
#endif
}
