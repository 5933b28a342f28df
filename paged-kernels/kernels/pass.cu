// The books of a pass of several tokens: what leaves the window makes room, then the pass is appended. Both in all layers at
// once, so that a pass costs two launches before its first layer.
//
// The rules are those of src/table.rs but for one: holes are closed before the pass comes and not filled by it, so that a
// pass lies in the last slots of its heads, in order.

#include "pass.cuh"
#include "resident.cuh"

namespace pass {

constexpr int CLOSERS = 256;   // threads of the block that closes a head's holes
constexpr int PLANNERS = 512;  // threads of the block that plans a layer
constexpr uint32_t LEAST = 3;  // units that are worth a block of their own

}  // namespace pass

using namespace pass;

struct Leave {
    State state;
    const PassText *texts;
    uint32_t count;  // of them
    uint32_t most;   // tokens that may leave, of any text
};

// What leaves the window in a head, seen by a block.
struct Leaving {
    uint64_t row;
    uint32_t *ring;
    uint32_t *table;
    uint32_t age, len, places;
    uint32_t begin, end;  // tokens
    uint32_t freed;       // slots
    uint32_t kept;        // the new length

    __device__ Leaving(const Leave &call, uint32_t (&sums)[CLOSERS / LANES]) {
        const State &state = call.state;
        const uint32_t kv_head = blockIdx.x % state.kv_heads, rest = blockIdx.x / state.kv_heads;
        const PassText text = call.texts[rest % call.count];
        const uint32_t layer = rest / call.count;
        row = state.row(layer, kv_head, text.seat);
        ring = state.rings + row * state.places;
        table = state.tables + row * state.most_pages;
        age = state.ages[layer * state.seats + text.seat], len = state.lens[row], places = state.places;
        end = age - min(age, state.window), begin = end - min(end, text.leaving);
        freed = 0;
        for (uint32_t base = begin; base < end; base += CLOSERS) {
            const uint32_t token = base + threadIdx.x;
            uint32_t all;
            sum_before<CLOSERS>(token < end && entry(token) & 1, sums, all);
            freed += all;
        }
        freed = min(freed, len);  // more only where slots were missing
        kept = len - freed;
    }
    __device__ uint32_t &entry(uint32_t token) const { return ring[token % places]; }
};

// Where texts share pages: those that holes are in which rows will move into are copied, before pass_leave gives any back.
extern "C" __global__ void __launch_bounds__(CLOSERS) pass_own(Leave call) {
    __shared__ uint32_t sums[CLOSERS / LANES];
    extern __shared__ uint32_t written[];  // bits of the head's pages
    const State &state = call.state;
    const Leaving leaving(call, sums);
    if (leaving.freed == 0) return;
    const uint32_t pages = state.pages(leaving.kept), lane = threadIdx.x % LANES;
    for (uint32_t i = threadIdx.x; i < (pages + LANES - 1) / LANES; i += CLOSERS) written[i] = 0;
    __syncthreads();
    for (uint32_t token = leaving.begin + threadIdx.x; token < leaving.end; token += CLOSERS) {
        const uint32_t entry = leaving.entry(token), page = (entry >> 1) / state.pool.page_size;
        if (entry & 1 && entry >> 1 < leaving.kept) atomicOr(&written[page / LANES], 1u << page % LANES);
    }
    __syncthreads();
    for (uint32_t page = threadIdx.x / LANES; page < pages; page += CLOSERS / LANES) {
        const uint32_t old = leaving.table[page];
        if (!(written[page / LANES] >> page % LANES & 1) || old == TRASH) continue;
        uint32_t own = old;
        if (lane == 0 && part_with(state, old)) own = taken(state, take(state, 1), 0);
        own = __shfl_sync(~0u, own, 0);
        if (own == old) continue;
        copy_page(state.pool, old, own);
        if (lane == 0) leaving.table[page] = own;
    }
}

// The dropped tokens of the last pass that are beyond the window now go, rows from the head's end take their places, and
// pages go back. A block a head of a text.
extern "C" __global__ void __launch_bounds__(CLOSERS) pass_leave(Leave call) {
    __shared__ uint32_t sums[CLOSERS / LANES];
    extern __shared__ uint32_t scratch[];
    const State &state = call.state;
    const Leaving leaving(call, sums);
    const uint32_t freed = leaving.freed, kept = leaving.kept, len = leaving.len;
    if (freed == 0) return;
    const uint32_t begin = leaving.begin, end = leaving.end, words = (end - begin + LANES - 1) / LANES;
    uint32_t *holes = scratch;           // free slots that stay below the new length
    uint32_t *gone = holes + call.most;  // [words]: bits of the slots from the new length on that are free
    uint32_t *before = gone + (call.most + LANES - 1) / LANES;  // [words]: live slots from there on before each
    for (uint32_t i = threadIdx.x; i < words; i += CLOSERS) gone[i] = 0;
    __syncthreads();
    uint32_t found = 0;
    for (uint32_t base = begin; base < end; base += CLOSERS) {
        const uint32_t token = base + threadIdx.x;
        uint32_t slot = 0, all;
        bool hole = false;
        if (token < end) {
            uint32_t &entry = leaving.entry(token);
            slot = entry >> 1;
            const bool drop = entry & 1;
            entry = slot << 1;
            hole = drop && slot < kept;
            if (drop && !hole && slot - kept < freed) {
                atomicOr(&gone[(slot - kept) / LANES], 1u << (slot - kept) % LANES);
            }
        }
        const uint32_t rank = found + sum_before<CLOSERS>(hole, sums, all);
        if (hole) holes[rank] = slot;
        found += all;
    }
    __syncthreads();
    uint32_t live = 0;
    for (uint32_t base = 0; base < words; base += CLOSERS) {
        const uint32_t word = base + threadIdx.x, slots = freed - min(freed, word * LANES);
        const uint32_t inside = slots >= LANES ? ~0u : (1u << slots) - 1;
        uint32_t all;
        const uint32_t rank = live + sum_before<CLOSERS>(word < words ? __popc(~gone[word] & inside) : 0, sums, all);
        if (word < words) before[word] = rank;
        live += all;
    }
    __syncthreads();
    // Where a live slot from the new length on goes.
    auto to = [&](uint32_t slot) {
        const uint32_t i = slot - kept, word = gone[i / LANES];
        if (word >> i % LANES & 1) return slot;
        const uint32_t rank = before[i / LANES] + __popc(~word & ((1u << i % LANES) - 1));
        return rank < found ? holes[rank] : slot;
    };
    const uint32_t page_size = state.pool.page_size;
    auto place = [&](uint32_t slot) {
        return leaving.table[slot / page_size] * page_size + slot % page_size;
    };
    for (uint32_t slot = kept + threadIdx.x / LANES; slot < len; slot += CLOSERS / LANES) {
        const uint32_t other = to(slot);
        if (other == slot) continue;
        copy_row(state.pool, place(slot), place(other));
    }
    for (uint32_t token = end + threadIdx.x; token < leaving.age; token += CLOSERS) {
        uint32_t &entry = leaving.entry(token);
        if (entry >> 1 >= kept && entry >> 1 < len) entry = to(entry >> 1) << 1 | (entry & 1);
    }
    __syncthreads();
    give(state, leaving.table, state.pages(kept), state.pages(len));
    if (threadIdx.x == 0) state.lens[leaving.row] = kept;
}

struct PassBegin {
    State state;
    const PassText *texts;   // [count]
    const uint32_t *owners;  // [tiles]: text of each tile of a kv head
    Head *heads;             // [layers][kv heads][count]
    uint32_t *rows;          // [layers][kv heads][tokens]: row of the pool for each token
    uint32_t *slots;         // [layers][kv heads][tokens]
    uint64_t *marks;         // [layers][kv heads][tokens]: place in State::rings of each
    Tile *plan;              // [layers][kv heads][tiles]
    Share *shares;           // [layers][blocks]
    uint32_t count;
    uint32_t tokens;
    uint32_t tiles;
    uint32_t group;
    uint32_t height;  // rows of a tile
    uint32_t keys;    // of a unit
    uint32_t blocks;
    uint32_t cut;  // FAST, INVARIANT
};

// Slots, pages and work of a pass. A block plans a layer, a warp of it a head of a text.
extern "C" __global__ void __launch_bounds__(PLANNERS) pass_begin(PassBegin call) {
    __shared__ uint32_t sums[PLANNERS / LANES];
    const State &state = call.state;
    const uint32_t layer = blockIdx.x, lane = threadIdx.x % LANES, page_size = state.pool.page_size;
    Head *heads = call.heads + uint64_t(layer) * state.kv_heads * call.count;
    for (uint32_t i = threadIdx.x / LANES; i < state.kv_heads * call.count; i += PLANNERS / LANES) {
        const uint32_t kv_head = i / call.count, which = i - kv_head * call.count;
        const PassText text = call.texts[which];
        const uint64_t row = state.row(layer, kv_head, text.seat);
        const uint32_t age = state.ages[layer * state.seats + text.seat], len = state.lens[row];
        const uint32_t room = state.most_pages * page_size - len, fits = min(text.tokens, room);
        const uint32_t held = state.pages(len), opened = state.pages(len + fits) - held;
        uint32_t *table = state.tables + row * state.most_pages;
        // The head's last page is copied if another text reads it too.
        const uint32_t last = fits > 0 && len % page_size != 0 ? table[len / page_size] : TRASH;
        int32_t had = 0;
        uint32_t copies = 0;
        if (lane == 0) {
            copies = last != TRASH && part_with(state, last);
            had = take(state, opened + copies);
            // The table is full: the tokens that do not fit are forgotten, and counted.
            if (fits < text.tokens) atomicAdd(state.counters + 1, int32_t(text.tokens - fits));
            state.lens[row] = len + fits;
            heads[i] = {0, len + fits, text.first, text.tokens, kv_head, 0, 0, uint32_t(row * state.most_pages)};
        }
        had = __shfl_sync(~0u, had, 0);
        for (uint32_t page = lane; page < opened; page += LANES) table[held + page] = taken(state, had, page);
        if (__shfl_sync(~0u, copies, 0)) {
            const uint32_t own = taken(state, had, opened);
            copy_page(state.pool, last, own);
            if (lane == 0) table[len / page_size] = own;
        }
        __syncwarp();
        for (uint32_t token = lane; token < text.tokens; token += LANES) {
            const uint32_t slot = len + token;
            const uint64_t at = (uint64_t(layer) * state.kv_heads + kv_head) * call.tokens + text.first + token;
            const uint64_t mark = row * state.places + (age + token) % state.places;
            call.slots[at] = slot;
            call.marks[at] = mark;
            call.rows[at] = token < fits ? table[slot / page_size] * page_size + slot % page_size : NO_ROW;
            state.rings[mark] = token < fits ? slot << 1 : 0;
        }
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < call.count; i += PLANNERS) {
        state.ages[layer * state.seats + call.texts[i].seat] += call.texts[i].tokens;
    }

    const uint32_t tiles = state.kv_heads * call.tiles;
    Tile *plan = call.plan + uint64_t(layer) * tiles;
    uint32_t units_so_far = 0;
    for (uint32_t base = 0; base < tiles; base += PLANNERS) {
        const uint32_t i = base + threadIdx.x;
        uint32_t units = 0, all;
        if (i < tiles) {
            const uint32_t kv_head = i / call.tiles, tile = i - kv_head * call.tiles, owner = call.owners[tile];
            const PassText text = call.texts[owner];
            const uint32_t last = ((tile - text.first_tile + 1) * call.height - 1) / call.group;
            // A head that lacks slots for its pass has fewer than the pass has tokens.
            const uint32_t len = max(heads[kv_head * call.count + owner].len, text.tokens);
            units = (len - text.tokens + min(last + 1, text.tokens) + call.keys - 1) / call.keys;
        }
        const uint32_t begin = units_so_far + sum_before<PLANNERS>(units, sums, all);
        units_so_far += all;
        if (i < tiles) plan[i] = {begin, units, 0, 1};
    }
    __syncthreads();
    const uint64_t units = units_so_far;
    const uint32_t used = min(uint64_t(call.blocks), (units + LEAST - 1) / LEAST);
    // The tile that a unit is of: the last that begins at or before it.
    auto tile_of = [&](uint32_t unit) {
        uint32_t low = 0, high = tiles;
        while (high - low > 1) {
            const uint32_t middle = (low + high) / 2;
            if (plan[middle].begin <= unit) low = middle;
            else high = middle;
        }
        return low;
    };
    auto cut = [&](uint32_t block) -> uint32_t {
        const uint32_t unit = units * block / used;
        if (call.cut == FAST || unit == units) return unit;
        const uint32_t tile = tile_of(unit);  // a tile is a block's own
        return plan[tile].begin == unit ? unit : tile + 1 == tiles ? units_so_far : plan[tile + 1].begin;
    };
    auto block_of = [&](uint32_t unit) { return uint32_t(((uint64_t(unit) + 1) * used - 1) / units); };
    for (uint32_t block = threadIdx.x; block < call.blocks; block += PLANNERS) {
        Share share = {0, 0, 0, 0};
        if (block < used) {
            const uint32_t begin = cut(block), end = cut(block + 1);
            if (begin < end) share = {begin, end, tile_of(begin), 2 * block};
        }
        call.shares[uint64_t(layer) * call.blocks + block] = share;
    }
    if (call.cut != FAST) return;
    for (uint32_t i = threadIdx.x; i < tiles; i += PLANNERS) {
        const uint32_t begin = plan[i].begin, opening = block_of(begin);
        plan[i].parts = block_of(begin + plan[i].units - 1) - opening + 1;
        plan[i].opening = 2 * opening + (cut(opening) < begin);
    }
}

// Sizes of the structs above, in their order: the host's mirror must agree.
extern "C" __global__ void pass_sizes(uint32_t *sizes) {
    sizes[0] = sizeof(Leave);
    sizes[1] = sizeof(PassBegin);
}
