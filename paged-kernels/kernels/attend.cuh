// What the kernels share: elements, views, the pool, and the arrays of a step. Mirrored in src/cuda/driver.rs.
//
// A page is [2 (keys, values)][page size][dim]; a row number counts rows of all pages, page * page size + row in page.
// Offsets of elements are 64 bits wide: pools hold more than 2^32.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

enum : uint32_t { F32 = 0, BF16 = 1, F16 = 2 };
constexpr int LANES = 32;
constexpr int WARPS = 4;
constexpr int SLAB = 16;  // rows of a page that the fast kernels take at once

inline __device__ float load(const void *data, uint32_t type, int64_t i) {
    if (type == F32) return static_cast<const float *>(data)[i];
    if (type == BF16) return __bfloat162float(static_cast<const __nv_bfloat16 *>(data)[i]);
    return __half2float(static_cast<const __half *>(data)[i]);
}

inline __device__ void save(void *data, uint32_t type, int64_t i, float x) {
    if (type == F32) {
        static_cast<float *>(data)[i] = x;
    } else if (type == BF16) {
        static_cast<__nv_bfloat16 *>(data)[i] = __float2bfloat16(x);
    } else {
        static_cast<__half *>(data)[i] = __float2half(x);
    }
}

// Hopper starts a kernel while the one before still runs. What that one writes may be read only after `settle`.
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

    // First element of a row's key; its value lies page_size * dim further.
    __device__ int64_t key(uint32_t row) const {
        int64_t page = row / page_size;
        return (page * 2 * page_size + row % page_size) * dim;
    }
};

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
    float *parts;         // [parts][group * (dim + 2)]
    uint32_t *arrivals;   // [H][sequences]: parts of a head that are done; 0 between launches
    uint32_t cut;
    uint32_t unused;
};
