// What the kernels share: elements, views, the pool, and the arrays of a step. Mirrored in src/cuda/driver.rs.
//
// A page is [2 (keys, values)][page size][dim], and of eight-bit floats then [2][page size] scales; a row number counts rows of all pages, page * page size + row in page.
// Offsets of elements are 64 bits wide: pools hold more than 2^32.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cfloat>
#include <cstdint>

enum : uint32_t { F32 = 0, BF16 = 1, F16 = 2, F8 = 3 };
constexpr int LANES = 32;
constexpr int WARPS = 4;
constexpr int SLAB = 16;  // rows of a page that the fast kernels take at once

// An element of a view, or one of a row before its scale.
inline __device__ float load(const void *data, uint32_t type, int64_t i) {
    if (type == F32) return static_cast<const float *>(data)[i];
    if (type == BF16) return __bfloat162float(static_cast<const __nv_bfloat16 *>(data)[i]);
    if (type == F16) return __half2float(static_cast<const __half *>(data)[i]);
    const uint32_t bits = static_cast<const uint8_t *>(data)[i];
    // Bits of a half 2^8 too small, subnormal where the eight bits are.
    return __half2float(__ushort_as_half(uint16_t((bits & 0x80) << 8 | (bits & 0x7f) << 7))) * 256.0f;
}

inline __device__ void save(void *data, uint32_t type, int64_t i, float x) {
    if (type == F32) {
        static_cast<float *>(data)[i] = x;
    } else if (type == BF16) {
        static_cast<__nv_bfloat16 *>(data)[i] = __float2bfloat16(x);
    } else if (type == F16) {
        static_cast<__half *>(data)[i] = __float2half(x);
    } else {
        static_cast<uint8_t *>(data)[i] = isnan(x) ? 0 : __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3);
    }
}

// Hopper starts a kernel while the one before still runs. What that one writes may be read only after `settle`.
#if __CUDA_ARCH__ >= 900
constexpr bool OVERLAPS = true;
#else
constexpr bool OVERLAPS = false;
#endif

inline __device__ void settle() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

inline __device__ void start_next() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Elements [heads][tokens][dim], the first two strides free.
struct View {
    void *data;
    int64_t head_stride;
    int64_t token_stride;
    uint32_t type;
    uint32_t unused;

    __device__ int64_t at(int64_t head, int64_t token) const { return head * head_stride + token * token_stride; }
};

struct Pool {
    void *data;
    uint32_t type;
    uint32_t page_size;
    uint32_t dim;
    uint32_t unused;

    __device__ uint32_t element() const { return type == F32 ? 4 : type == F8 ? 1 : 2; }
    // Elements of a page; those of one byte have a scale a row behind them, of the keys and then of the values.
    __device__ int64_t page() const {
        const int64_t elements = int64_t(2) * page_size * dim;
        return type == F8 ? (elements + 3) / 4 * 4 + 2 * page_size * int64_t(sizeof(float)) : elements;
    }
    // First element of a row's key; its value lies page_size * dim further.
    __device__ int64_t key(uint32_t row) const { return row / page_size * page() + row % page_size * int64_t(dim); }
    __device__ int64_t key_or_value(uint32_t row, bool value) const {
        return key(row) + (value ? int64_t(page_size) * dim : 0);
    }
    // What the elements of a key or a value are multiplied by.
    __device__ float *scale(uint32_t row, bool value) const {
        auto *page_end = static_cast<unsigned char *>(data) + (row / page_size + 1) * page();
        return reinterpret_cast<float *>(page_end) - (value ? 1 : 2) * page_size + row % page_size;
    }
};

// The scale of a row of which each of so many lanes has seen the largest size `most`, and has added x - x of each x to
// `odd`: NaN if one of them is not finite. Mirrors src/e4m3.rs.
template <int SEEN_BY = LANES>
__device__ float row_scale(float most, float odd) {
#pragma unroll
    for (int i = SEEN_BY / 2; i > 0; i /= 2) {
        most = fmaxf(most, __shfl_xor_sync(~0u, most, i));
        odd += __shfl_xor_sync(~0u, odd, i);
    }
    return fmaxf(most / 448.0f, FLT_MIN) + odd;
}

// A key or a value into its row, by a warp; `x` gives its elements.
template <class Elements>
__device__ void save_row(const Pool &pool, uint32_t row, bool value, Elements x) {
    const int64_t at = pool.key_or_value(row, value);
    const uint32_t lane = threadIdx.x % LANES;
    if (pool.type != F8) {
        for (uint32_t d = lane; d < pool.dim; d += LANES) save(pool.data, pool.type, at + d, x(d));
        return;
    }
    float most = 0.0f, odd = 0.0f;
    for (uint32_t d = lane; d < pool.dim; d += LANES) most = fmaxf(most, fabsf(x(d))), odd += x(d) - x(d);
    const float scale = row_scale(most, odd);
    if (lane == 0) *pool.scale(row, value) = scale;
    const float inverse = 1.0f / scale;
    for (uint32_t d = lane; d < pool.dim; d += LANES) save(pool.data, F8, at + d, x(d) * inverse);
}

// A token's key and value into a row, by a warp.
inline __device__ void store_row(const Pool &pool, const View &keys, const View &values, int64_t head, int64_t token,
                                 uint32_t row) {
    save_row(pool, row, false, [&](uint32_t d) { return load(keys.data, keys.type, keys.at(head, token) + d); });
    save_row(pool, row, true, [&](uint32_t d) { return load(values.data, values.type, values.at(head, token) + d); });
}

// A row to another, by a warp.
inline __device__ void copy_row(const Pool &pool, uint32_t from, uint32_t to) {
    const uint32_t lane = threadIdx.x % LANES, bytes = pool.dim * pool.element();
#pragma unroll
    for (int half = 0; half < 2; half++) {
        auto *source = static_cast<unsigned char *>(pool.data) + pool.key_or_value(from, half) * pool.element();
        auto *target = static_cast<unsigned char *>(pool.data) + pool.key_or_value(to, half) * pool.element();
        if (bytes % 16 == 0 && pool.page() * pool.element() % 16 == 0) {
            for (uint32_t i = lane; i < bytes / 16; i += LANES) {
                reinterpret_cast<int4 *>(target)[i] = reinterpret_cast<const int4 *>(source)[i];
            }
        } else {
            for (uint32_t i = lane; i < bytes; i += LANES) target[i] = source[i];
        }
        if (pool.type == F8 && lane == 0) *pool.scale(to, half) = *pool.scale(from, half);
    }
}

// The logarithm of the slabs of a page; fast kernels are for powers of two.
inline __device__ uint32_t slabs_log2(const Pool &pool) { return 31 - __clz(pool.page_size / SLAB); }

// One kv head of one sequence of the step.
struct Head {
    uint32_t slabs;    // its first slab in the order of the layer's, head after head
    uint32_t len;      // live rows
    uint32_t first;    // its first token in the step
    uint32_t tokens;
    uint32_t kv_head;
    uint32_t parts;    // that its slabs are cut into in stream_attend
    uint32_t opening;  // the first of them
    uint32_t table;    // where its pages begin in Attend::tables
};

struct Attend {
    Pool pool;
    View queries;  // [Hq][tokens][dim]
    View out;      // [Hq][tokens][dim]
    float *lse;    // [Hq][tokens], or null
    const Head *heads;       // [H][sequences]
    const uint32_t *tables;  // pages of each head
    const uint32_t *slots;   // [H][tokens]: where each token of the step lies in its head
    const uint32_t *owners;  // [tokens]: its sequence
    uint32_t sequences;
    uint32_t group;
    uint32_t tokens;
    float scale;
};

// A block's share of a layer's work in stream_attend.
struct alignas(16) Share {
    uint32_t begin;  // in the order of the layer's slabs; begin == end is a block without work
    uint32_t end;
    uint32_t head;   // index of the head that owns slab `begin`
    uint32_t part;   // the number of its first part
};

// Heads are cut into parts in stream_attend, in one of two ways. Fast: at the ends of equal shares of a layer's slabs,
// whatever heads they fall into; block b has parts 2b and 2b + 1, of the heads that it begins and ends in. Invariant: each
// head by its own length alone, into pieces, so that its bits do not depend on its neighbours; a block has any number.
enum : uint32_t { FAST = 0, INVARIANT = 1 };

// Slabs of a piece. A head has no more than 32, so that the folding stays short.
inline __device__ uint32_t piece_of(uint32_t slabs) { return max(16u, (slabs + 31) / 32); }

struct Stream {
    Attend attend;
    const Share *shares;  // [blocks]
    float *parts;         // [parts][group * (dim + 2)], each a multiple of four; 0 between launches
    uint32_t cut;
    uint32_t early;  // Attend::slots are rows of the pool, and the kernel before writes no other rows
};
