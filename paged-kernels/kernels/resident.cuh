// Where the books of a cache lie on the card. Mirrored in src/cuda/driver/resident.rs.

#pragma once

#include "attend.cuh"

constexpr uint32_t NO_ROW = 0xffffffffu;  // of a place in the batch that nobody has

// Where everything lies. A row of a table is that of one (layer, kv head, seat); a text has a seat.
struct State {
    Pool pool;
    uint32_t *tables;   // [rows][most_pages]: a head's pages in the order of its slots
    uint32_t *lens;     // [rows]
    uint32_t *rings;    // [rows][window + 1]: slot * 2 + drop of the newest tokens; token t lies at t % (window + 1)
    uint32_t *ages;     // [layers][seats]: tokens so far
    uint32_t *free;     // a stack of pages
    int32_t *counters;  // pages on it; pages, or slots of a full table, that were wanted and not there
    uint32_t layers;
    uint32_t kv_heads;
    uint32_t seats;
    uint32_t most_pages;
    uint32_t window;
    uint32_t unused;

    __device__ uint64_t row(uint32_t layer, uint32_t kv_head, uint32_t seat) const {
        return (uint64_t(layer) * kv_heads + kv_head) * seats + seat;
    }
    __device__ uint32_t pages(uint32_t len) const { return (len + pool.page_size - 1) / pool.page_size; }
};
