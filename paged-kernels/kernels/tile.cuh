// What attention by tensor cores is made of: asynchronous copies into swizzled shared memory, products of 16-bit tiles,
// and rows that a warp holds together.

#pragma once

#include "attend.cuh"
#include "second_level.cuh"

#include <cuda_fp16.h>

#include <type_traits>

namespace tile {

constexpr float LOG2E = 1.4426950408889634f;
constexpr float LN2 = 0.6931471805599453f;

__device__ uint32_t shared_address(const void *p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

__device__ void copy16(uint32_t to, const void *from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

// How to read what is not read again: it is the first to leave the second-level cache.
__device__ uint64_t read_once() {
    uint64_t policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

__device__ void copy16(uint32_t to, const void *from, uint64_t policy) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "l"(policy) : "memory");
}

__device__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int N>
__device__ void wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

__device__ void load_matrices(uint32_t (&r)[4], uint32_t from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(from)
                 : "memory");
}

__device__ void load_transposed(uint32_t (&r)[4], uint32_t from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(from)
                 : "memory");
}

// c += a b. Without `WIDE` the lower half of a's rows is zero, and so is that half of c: no registers are kept for it.
#define MULTIPLY(TYPE)                                                                                        \
    if constexpr (WIDE) {                                                                                     \
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE                                   \
                     ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                             \
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                         \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                         \
    } else {                                                                                                  \
        float none0, none1;                                                                                   \
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE                                   \
                     ".f32 {%0,%1,%2,%3}, {%4,%8,%5,%8}, {%6,%7}, {%0,%1,%9,%9};"                             \
                     : "+f"(c[0]), "+f"(c[1]), "=f"(none0), "=f"(none1)                                       \
                     : "r"(a[0]), "r"(a[2]), "r"(b0), "r"(b1), "r"(0), "f"(0.0f));                            \
    }

// The two types of 16 bits: products of the tensor cores, and pairs in a register.
struct Bf16 {
    static constexpr int BYTES = 2;  // of an element in a page
    template <bool WIDE>
    static __device__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { MULTIPLY("bf16") }
    static __device__ uint32_t pack(float low, float high) {
        __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
        return *reinterpret_cast<uint32_t *>(&pair);
    }
    static __device__ float2 unpack(uint32_t pair) {
        return __bfloat1622float2(*reinterpret_cast<__nv_bfloat162 *>(&pair));
    }
    // The highest bit of each half that is infinite or no number.
    static __device__ uint32_t odd(uint32_t pair) { return (pair & 0x7fff7fff) + 0x00800080 & 0x80008000; }
};

struct F16 {
    static constexpr int BYTES = 2;
    template <bool WIDE>
    static __device__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { MULTIPLY("f16") }
    static __device__ uint32_t pack(float low, float high) {
        __half2 pair = __floats2half2_rn(low, high);
        return *reinterpret_cast<uint32_t *>(&pair);
    }
    static __device__ float2 unpack(uint32_t pair) { return __half22float2(*reinterpret_cast<__half2 *>(&pair)); }
    static __device__ uint32_t odd(uint32_t pair) { return (pair & 0x7fff7fff) + 0x04000400 & 0x80008000; }
};

#undef MULTIPLY

// Eight bits in pages, bf16 in registers: e4m3's seven bits of size stand where bf16 has the low four of its exponent and
// the high three of its mantissa, which makes of it the same number 2^120 smaller. Half of that is given back to what it is
// multiplied with, `UP`, half to the product.
struct F8 : Bf16 {
    static constexpr int BYTES = 1;
    static constexpr float UP = 1152921504606846976.0f;  // 2^60
    // Of bytes 1 and 3; bytes 0 and 2 do not matter.
    static __device__ uint32_t widen(uint32_t bytes) { return bytes & 0x80008000 | bytes >> 4 & 0x07f007f0; }
};

__device__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ float quad_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

__device__ float exp2_of(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// What to take from exponents: of minus infinity from itself there is no difference. Sums that go with minus infinity
// are 0, or NaN, and a weight of 0 leaves them so.
__device__ float anchor(float best) { return best == -INFINITY ? 0.0f : best; }

// Bytes of a row in shared memory: a multiple of eight chunks of 16.
template <int D, int BYTES = 2>
constexpr int PITCH = (D * BYTES + 127) / 128 * 128;

// Where a chunk of a row lies, so that eight rows of one chunk fall into all banks.
template <int D, int BYTES = 2>
__device__ uint32_t swizzled(uint32_t row, uint32_t chunk) {
    return row * PITCH<D, BYTES> + ((chunk ^ (row & 7)) << 4);
}

__device__ float2 load_pair(uint32_t from) {
    float2 pair;
    asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];" : "=f"(pair.x), "=f"(pair.y) : "r"(from) : "memory");
    return pair;
}

// A lane's share of a row: D / 32 elements that lie together.
template <int D>
struct Lane {
    static constexpr int WIDTH = D / LANES;
    alignas(16) float x[WIDTH];

    __device__ void add(float weight, const float (&other)[WIDTH]) {
#pragma unroll
        for (int i = 0; i < WIDTH; i++) x[i] += weight * other[i];
    }
    __device__ void scale(float by) {
#pragma unroll
        for (int i = 0; i < WIDTH; i++) x[i] *= by;
    }
};

// The widest load of a lane's share; a row of 96 is not aligned for more than 4 bytes a lane.
template <int D>
using Vector = std::conditional_t<D % 128 == 0, float4, std::conditional_t<D % 64 == 0, float2, float>>;

template <int D>
__device__ void read_row(float (&x)[D / LANES], const float *row) {
    constexpr int COUNT = D / LANES * sizeof(float) / sizeof(Vector<D>);
    const auto *from = reinterpret_cast<const Vector<D> *>(row) + threadIdx.x % LANES * COUNT;
#pragma unroll
    for (int i = 0; i < COUNT; i++) reinterpret_cast<Vector<D> *>(x)[i] = from[i];
}

template <int D>
__device__ void write_row(float *row, const float (&x)[D / LANES]) {
    constexpr int COUNT = D / LANES * sizeof(float) / sizeof(Vector<D>);
    auto *to = reinterpret_cast<Vector<D> *>(row) + threadIdx.x % LANES * COUNT;
#pragma unroll
    for (int i = 0; i < COUNT; i++) to[i] = reinterpret_cast<const Vector<D> *>(x)[i];
}

// The result of a query row from its sums, by a warp.
template <int D>
__device__ void finish(const Attend &call, uint32_t query_head, uint32_t token, Lane<D> &lane_sums, float best,
                       float sum) {
    constexpr int WIDTH = D / LANES;
    const int lane = threadIdx.x % LANES;
    lane_sums.scale(sum == 0.0f ? 0.0f : 1.0f / sum);
    const int64_t at = call.out.at(query_head, token) + lane * WIDTH;
#pragma unroll
    for (int i = 0; i < WIDTH; i++) save(call.out.data, call.out.type, at + i, lane_sums.x[i]);
    if (call.lse && lane == 0) {
        call.lse[uint64_t(query_head) * call.tokens + token] = sum == 0.0f ? -INFINITY : best * LN2 + logf(sum);
    }
}

}  // namespace tile
