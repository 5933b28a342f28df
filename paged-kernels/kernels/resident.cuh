// Where the books of a cache lie on the card, and what its kernels do with them. Mirrored in src/cuda/driver/resident.rs.

#pragma once

#include "attend.cuh"

constexpr uint32_t NO_ROW = 0xffffffffu;  // of a place in the batch that nobody has

// Where everything lies. A row of a table is that of one (layer, kv head, seat); a text has a seat.
struct State {
    Pool pool;
    uint32_t *tables;   // [rows][most_pages]: a head's pages in the order of its slots
    uint32_t *lens;     // [rows]
    uint32_t *rings;    // [rows][places]: slot * 2 + drop of the newest tokens; token t lies at t % places
    uint32_t *ages;     // [layers][seats]: tokens so far
    uint32_t *free;     // a stack of pages
    int32_t *sharers;   // [pages]: heads that hold a page beside the first
    int32_t *counters;  // pages on it; pages, or slots of a full table, that were wanted and not there
    uint32_t layers;
    uint32_t kv_heads;
    uint32_t seats;
    uint32_t most_pages;
    uint32_t window;
    uint32_t places;    // of a ring: the window's, and those of the longest pass

    __device__ uint64_t row(uint32_t layer, uint32_t kv_head, uint32_t seat) const {
        return (uint64_t(layer) * kv_heads + kv_head) * seats + seat;
    }
    __device__ uint32_t pages(uint32_t len) const { return (len + pool.page_size - 1) / pool.page_size; }
    __device__ uint32_t slabs(uint32_t len) const { return (len + SLAB - 1) / SLAB; }
};

constexpr uint32_t TRASH = 0;  // the page that stands for those that were not there

// Takes pages off the stack and says how many there were before, which may be too few, or negative. A page that is not
// there is counted, and the trash stands for it.
inline __device__ int32_t take(const State &state, uint32_t wanted) {
    if (wanted == 0) return 0;
    const int32_t had = atomicSub(state.counters, int32_t(wanted)), missing = int32_t(wanted) - max(had, 0);
    if (missing > 0) {
        atomicAdd(state.counters, missing);
        atomicAdd(state.counters + 1, missing);
    }
    return had;
}

inline __device__ uint32_t taken(const State &state, int32_t had, uint32_t rank) {
    const int32_t at = had - 1 - int32_t(rank);
    return at >= 0 ? state.free[at] : TRASH;
}

// Lets go of a page; says whether others hold it still. It is then theirs, else the caller's alone.
inline __device__ bool part_with(const State &state, uint32_t page) {
    if (state.sharers[page] <= 0) return false;
    if (atomicSub(state.sharers + page, 1) > 0) return true;
    atomicAdd(state.sharers + page, 1);  // they have let go meanwhile
    return false;
}

// The rows of a page into another, by a warp.
inline __device__ void copy_page(const Pool &pool, uint32_t from, uint32_t to) {
    const uint32_t words = pool.page() * pool.element() / 4;
    const uint32_t *source = static_cast<const uint32_t *>(pool.data) + uint64_t(from) * words;
    uint32_t *target = static_cast<uint32_t *>(pool.data) + uint64_t(to) * words;
#pragma unroll 4
    for (uint32_t i = threadIdx.x % LANES; i < words; i += LANES) target[i] = source[i];
}

// Gives pages of a table back, from the `first` to before the `last`, by a block of whole warps. Those that nobody else
// holds go onto the stack. Never in a launch that takes pages: a page is on the stack before it can be read there.
inline __device__ void give(const State &state, const uint32_t *table, uint32_t first, uint32_t last) {
    const uint32_t lane = threadIdx.x % LANES;
    for (uint32_t base = first + threadIdx.x - lane; base < last; base += blockDim.x) {
        uint32_t page = base + lane < last ? table[base + lane] : TRASH;
        if (page != TRASH && part_with(state, page)) page = TRASH;
        const uint32_t real = __ballot_sync(~0u, page != TRASH);
        int32_t at = lane == 0 ? atomicAdd(state.counters, int32_t(__popc(real))) : 0;
        at = __shfl_sync(~0u, at, 0);
        if (page != TRASH) state.free[at + __popc(real & ((1u << lane) - 1))] = page;
    }
}

// The sum of `x` over the threads before this one, and over all of the block.
template <int THREADS>
__device__ uint32_t sum_before(uint32_t x, uint32_t (&sums)[THREADS / LANES], uint32_t &all) {
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    uint32_t sum = x;
#pragma unroll
    for (int i = 1; i < LANES; i *= 2) {
        const uint32_t other = __shfl_up_sync(~0u, sum, i);
        if (lane >= i) sum += other;
    }
    if (lane == LANES - 1) sums[warp] = sum;
    __syncthreads();
    uint32_t before = 0;
    all = 0;
#pragma unroll
    for (int w = 0; w < THREADS / LANES; w++) {
        if (w < warp) before += sums[w];
        all += sums[w];
    }
    __syncthreads();  // `sums` is free again
    return before + sum - x;
}
