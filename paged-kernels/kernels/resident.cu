// A cache whose bookkeeping lies on the card: what a step does in every layer and head is planned there, one token a
// text, so a step can be captured into a graph and replayed, and the host waits for nothing.
//
// The rules are those of src/table.rs. A token's drop bit is obeyed a whole window after the token came, so its head's
// length, slot and need of pages are known before the step's first layer runs.

#include "resident.cuh"

namespace resident {

constexpr int PLANNERS = 512;   // threads of the block that plans a layer
constexpr int ADMITTERS = 1024;  // threads of the block that makes room for a prompt in a head
constexpr int STRETCH = 32;     // words of drop bits whose kept tokens are counted together
constexpr int COPIES = 8;       // rows on their way in a warp
constexpr int NARROWERS = 8;    // lanes that have a row that becomes eight-bit floats
constexpr int CHUNKS = 4;       // eight elements, that a lane holds of such a row at most
constexpr uint32_t LEAST = 16;       // as in src/cuda/plan.rs
constexpr uint32_t SECOND_HEAD = 8;  // as in src/cuda/plan.rs
constexpr uint32_t NO_SEAT = 0xffffffffu;

}  // namespace resident

using namespace resident;

struct Admit {
    State state;
    View keys;    // [kv heads][tokens][dim]
    View values;
    const uint32_t *drops;  // [kv heads][words]: the bit of token t is t % 32 of word t / 32
    uint32_t *starts;       // [kv heads][stretches + 1]: kept tokens before each; last, what `take` gave
    uint32_t layer;
    uint32_t seat;
    uint32_t tokens;
    uint32_t wide;  // rows may be copied 16 bytes at a time, or are bf16 that may be read so

    __device__ uint32_t words() const { return (tokens + LANES - 1) / LANES; }
    __device__ uint32_t stretches() const { return (words() + STRETCH - 1) / STRETCH; }
    __device__ uint32_t *starts_of(uint32_t kv_head) const { return starts + uint64_t(kv_head) * (stretches() + 1); }
    // Bits of the tokens of a word that stay: the newest, and those not dropped.
    __device__ uint32_t kept(uint32_t kv_head, uint32_t word) const {
        const uint32_t first = word * LANES, old = tokens - min(tokens, state.window);
        if (first >= tokens) return 0;
        uint32_t keep = ~drops[uint64_t(kv_head) * words() + word];
        if (first + LANES > old) keep |= first >= old ? ~0u : ~0u << (old - first);
        return tokens - first < LANES ? keep & ((1u << (tokens - first)) - 1) : keep;
    }
};

// Room for a prompt in one layer of a text: a block a kv head counts what stays, takes its pages and begins its ring.
extern "C" __global__ void __launch_bounds__(ADMITTERS) resident_admit(Admit call) {
    __shared__ uint32_t sums[ADMITTERS / LANES];
    settle();
    start_next();  // not before: resident_fill reads at once what was there when this one began
    const State &state = call.state;
    const uint32_t kv_head = blockIdx.x;
    uint32_t *starts = call.starts_of(kv_head), kept = 0;
    for (uint32_t base = 0; base < call.words(); base += ADMITTERS) {
        uint32_t all, word = base + threadIdx.x;
        const uint32_t before = kept + sum_before<ADMITTERS>(__popc(call.kept(kv_head, word)), sums, all);
        if (word % STRETCH == 0 && word < call.words()) starts[word / STRETCH] = before;
        kept += all;
    }
    const uint32_t len = min(kept, state.most_pages * state.pool.page_size);
    const uint64_t row = state.row(call.layer, kv_head, call.seat);
    if (threadIdx.x == 0) {
        starts[call.stretches()] = take(state, state.pages(len));
        if (len < kept) atomicAdd(state.counters + 1, int32_t(kept - len));
        state.lens[row] = len;
        if (kv_head == 0) state.ages[call.layer * state.seats + call.seat] = call.tokens;
    }
    const uint32_t places = state.places, recent = min(call.tokens, state.window);
    for (uint32_t i = threadIdx.x; i < places; i += ADMITTERS) {
        // The newest tokens; what is left of the ring is of tokens to come.
        const uint32_t token = call.tokens - recent + i, slot = kept - recent + i;
        uint32_t entry = 0;
        if (i < recent && slot < len) {
            const uint32_t word = call.drops[uint64_t(kv_head) * call.words() + token / LANES];
            entry = slot << 1 | (word >> token % LANES & 1);
        }
        state.rings[row * places + token % places] = entry;
    }
}

// Rows of the tokens of a word, a bit each, as they are. `find` gives the row of the lane's token, once resident_admit has
// made room; it is asked while the first rows are on their way.
template <class Find>
__device__ void copy_rows(const Admit &call, uint32_t kv_head, int64_t first, uint32_t keep, Find find) {
    const Pool &pool = call.state.pool;
    const uint32_t lane = threadIdx.x % LANES, chunks = pool.dim * 2 / 16;  // of a key, or of a value
    auto *data = static_cast<int4 *>(pool.data);
    uint32_t row = 0;
    bool found = false;
    for (uint32_t base = 0; base < 2 * chunks; base += LANES) {
        const bool value = base + lane >= chunks, mine = base + lane < 2 * chunks;
        const uint32_t chunk = base + lane - (value ? chunks : 0);
        const View &view = value ? call.values : call.keys;
        const int64_t beyond = value ? int64_t(pool.page_size) * chunks : 0;
        for (uint32_t left = keep; left;) {
            int4 x[COPIES];
            int tokens[COPIES];
#pragma unroll
            for (int k = 0; k < COPIES; k++) {
                tokens[k] = left ? __ffs(left) - 1 : -1;
                left &= left - 1;
                if (mine && tokens[k] >= 0) {
                    const int64_t at = view.at(kv_head, first + tokens[k]);
                    const auto *from = static_cast<const __nv_bfloat16 *>(view.data) + at;
                    x[k] = __ldcs(reinterpret_cast<const int4 *>(from) + chunk);
                }
            }
            if (!found) row = find(), found = true;
#pragma unroll
            for (int k = 0; k < COPIES; k++) {
                const uint32_t to = tokens[k] >= 0 ? __shfl_sync(~0u, row, tokens[k]) : NO_ROW;
                if (mine && to != NO_ROW) data[pool.key(to) / 8 + beyond + chunk] = x[k];
            }
        }
    }
}

// The same of bf16 that becomes eight-bit floats. Rows are multiples of eight, up to 256 elements.
template <class Find>
__device__ void narrow_rows(const Admit &call, uint32_t kv_head, int64_t first, uint32_t keep, Find find) {
    const Pool &pool = call.state.pool;
    const uint32_t lane = threadIdx.x % LANES, part = lane % NARROWERS, chunks = pool.dim / 8;
    uint32_t row = 0;
    for (uint32_t left = keep; left;) {
        const bool began = left != keep;
        uint32_t mine = left;  // the lane's token and later ones
#pragma unroll
        for (uint32_t k = 0; k < LANES / NARROWERS; k++) {
            if (k < lane / NARROWERS) mine &= mine - 1;
            left &= left - 1;
        }
        const int token = mine ? __ffs(mine) - 1 : 0;
        int4 x[2][CHUNKS];  // of a key, and of a value
#pragma unroll
        for (int value = 0; value < 2; value++) {
            const View &view = value ? call.values : call.keys;
            const auto *from = static_cast<const __nv_bfloat16 *>(view.data) + view.at(kv_head, first + token);
#pragma unroll
            for (int i = 0; i < CHUNKS; i++) {
                const uint32_t chunk = part + i * NARROWERS;
                x[value][i] = mine && chunk < chunks ? __ldcs(reinterpret_cast<const int4 *>(from) + chunk) : int4{};
            }
        }
        if (!began) row = find();
        const uint32_t to = __shfl_sync(~0u, row, token);
        const bool is = mine && to != NO_ROW;
#pragma unroll
        for (int value = 0; value < 2; value++) {
            float most = 0.0f, odd = 0.0f;
#pragma unroll
            for (int i = 0; i < CHUNKS * 4; i++) {
                const float2 two = __bfloat1622float2(reinterpret_cast<const __nv_bfloat162 *>(x[value])[i]);
                most = fmaxf(most, fmaxf(fabsf(two.x), fabsf(two.y)));
                odd += (two.x - two.x) + (two.y - two.y);
            }
            const float scale = row_scale<NARROWERS>(most, odd), inverse = 1.0f / scale;
            if (is && part == 0) *pool.scale(to, value) = scale;
            auto *at = reinterpret_cast<uint2 *>(static_cast<uint8_t *>(pool.data) + pool.key_or_value(is ? to : 0, value));
#pragma unroll
            for (int i = 0; i < CHUNKS; i++) {
                uint32_t words[2] = {};
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    float2 two = __bfloat1622float2(reinterpret_cast<const __nv_bfloat162 *>(x[value])[4 * i + j]);
                    two.x *= inverse, two.y *= inverse;
                    const uint32_t bytes = __nv_cvt_float2_to_fp8x2(two, __NV_SATFINITE, __NV_E4M3);
                    words[j / 2] |= bytes << j % 2 * 16;
                }
                const bool number = scale == scale;  // as `save` has it
                const uint32_t chunk = part + i * NARROWERS;
                if (is && chunk < chunks) at[chunk] = number ? uint2{words[0], words[1]} : uint2{};
            }
        }
    }
}

// The rows of a prompt into the pages that resident_admit has taken, and these into the tables. A warp has 32 tokens of a
// head.
template <bool NARROW>
__device__ void fill(const Admit &call) {
    start_next();
    const State &state = call.state;
    const Pool &pool = state.pool;
    const uint32_t blocks = (call.words() + WARPS - 1) / WARPS, kv_head = blockIdx.x / blocks;
    const uint32_t lane = threadIdx.x % LANES;
    const uint32_t word = blockIdx.x % blocks * WARPS + threadIdx.x / LANES, stretch = word / STRETCH;
    if (word >= call.words()) return;
    const uint32_t keep = call.kept(kv_head, word);
    const uint32_t earlier = lane < word % STRETCH ? __popc(call.kept(kv_head, stretch * STRETCH + lane)) : 0;
    const uint32_t in_stretch = __reduce_add_sync(~0u, earlier) + __popc(keep & ((1u << lane) - 1));
    auto find = [&]() -> uint32_t {
        settle();
        const uint32_t *starts = call.starts_of(kv_head);
        const uint32_t slot = starts[stretch] + in_stretch, number = slot / pool.page_size, inside = slot % pool.page_size;
        const int32_t had = starts[call.stretches()];
        if (!(keep >> lane & 1) || number >= state.most_pages) return NO_ROW;
        const uint32_t page = taken(state, had, number);
        if (inside == 0) state.tables[state.row(call.layer, kv_head, call.seat) * state.most_pages + number] = page;
        return page * pool.page_size + inside;
    };
    const int64_t first = int64_t(word) * LANES;
    if (call.wide && keep) {
        if constexpr (NARROW) narrow_rows(call, kv_head, first, keep, find);
        else copy_rows(call, kv_head, first, keep, find);
        return;
    }
    const uint32_t row = find();
    for (uint32_t left = keep; left; left &= left - 1) {
        const int token = __ffs(left) - 1;
        const uint32_t to = __shfl_sync(~0u, row, token);
        if (to != NO_ROW) store_row(pool, call.keys, call.values, kv_head, first + token, to);
    }
}

extern "C" __global__ void resident_fill(Admit call) { fill<false>(call); }
extern "C" __global__ void resident_fill_narrow(Admit call) { fill<true>(call); }

// The head that a slab is of: the last that begins at or before it.
__device__ uint32_t owner_of(const Head *heads, uint32_t count, uint32_t slab) {
    uint32_t low = 0, high = count;
    while (high - low > 1) {
        const uint32_t middle = (low + high) / 2;
        if (heads[middle].slabs <= slab) low = middle;
        else high = middle;
    }
    return low;
}

struct Begin {
    State state;
    const uint32_t *batch;  // [texts]: their seats, or NO_SEAT
    Head *heads;            // [layers][kv heads][texts]
    Share *shares;          // [layers][blocks]
    uint32_t *rows;         // [layers][kv heads][texts]: row of the pool for each new token
    uint64_t *marks;        // [layers][kv heads][texts]: place in State::rings of each
    uint32_t texts;
    uint32_t blocks;
    uint32_t cut;  // FAST, INVARIANT
    uint32_t unused;
};

// A step of one token a text. A block plans a layer: what `Plan::of` and `shares` in src/cuda/plan.rs give.
extern "C" __global__ void __launch_bounds__(PLANNERS, 1) resident_begin(Begin call) {
    __shared__ uint32_t sums[PLANNERS / LANES], cuts[SECOND_HEAD + 1];
    __shared__ int32_t had;
    const State &state = call.state;
    const uint32_t layer = blockIdx.x, count = state.kv_heads * call.texts, page_size = state.pool.page_size;
    Head *heads = call.heads + uint64_t(layer) * count;
    Share *shares = call.shares + uint64_t(layer) * call.blocks;
    if (threadIdx.x <= SECOND_HEAD) cuts[threadIdx.x] = 0;

    uint32_t listed = 0;  // slabs of the heads so far
    for (uint32_t base = 0; base < count; base += PLANNERS) {
        const uint32_t i = base + threadIdx.x, kv_head = i / call.texts, text = i - kv_head * call.texts;
        const uint32_t seat = i < count ? call.batch[text] : NO_SEAT;
        const bool active = seat != NO_SEAT;
        uint32_t slot = 0, len = 0;
        uint64_t row = 0, mark = 0;
        bool grows = false;
        if (active) {
            row = state.row(layer, kv_head, seat);
            const uint32_t places = state.places, age = state.ages[layer * state.seats + seat];
            mark = row * places + age % places;
            // Of the token that came a window before the last; a ring begins with zeros.
            uint32_t &oldest = state.rings[row * places + (age + places - state.window - 1) % places];
            const uint32_t leaving = oldest;
            oldest = leaving & ~1u;
            len = state.lens[row];
            grows = !(leaving & 1);
            slot = grows ? len++ : leaving >> 1;
            if (slot == state.most_pages * page_size) {
                // The table is full: the token takes a live one's place, and that is counted.
                grows = false, slot = 0, len--;
                atomicAdd(state.counters + 1, 1);
            }
            state.rings[mark] = slot << 1;
            if (grows) state.lens[row] = len;
        }
        const uint64_t table = row * state.most_pages;
        const bool opens = grows && slot % page_size == 0;
        const uint32_t old = active && !opens ? state.tables[table + slot / page_size] : TRASH;
        // A page that another text reads too is copied before it is written to.
        const bool copies = old != TRASH && part_with(state, old), wants = opens || copies;
        uint32_t wanted, listed_here;
        const uint32_t rank = sum_before<PLANNERS>(wants, sums, wanted);
        if (threadIdx.x == 0) had = take(state, wanted);
        const uint32_t first = listed + sum_before<PLANNERS>(state.slabs(len), sums, listed_here);
        listed += listed_here;
        const uint32_t page = wants ? taken(state, had, rank) : old;
        if (wants) state.tables[table + slot / page_size] = page;
        for (uint32_t left = __ballot_sync(~0u, copies); left; left &= left - 1) {
            const int lane = __ffs(left) - 1;
            copy_page(state.pool, __shfl_sync(~0u, old, lane), __shfl_sync(~0u, page, lane));
        }
        if (i < count) {
            heads[i] = {first, len, text, active, kv_head, 0, 0, uint32_t(table)};
            call.rows[uint64_t(layer) * count + i] = active ? page * page_size + slot % page_size : NO_ROW;
            call.marks[uint64_t(layer) * count + i] = mark;
        }
    }
    __syncthreads();
    for (uint32_t text = threadIdx.x; text < call.texts; text += PLANNERS) {
        const uint32_t seat = call.batch[text];
        if (seat != NO_SEAT) state.ages[layer * state.seats + seat]++;
    }

    if (call.cut == INVARIANT) {
        uint32_t parts_so_far = 0;
        for (uint32_t base = 0; base < count; base += PLANNERS) {
            const uint32_t i = base + threadIdx.x, slabs = i < count ? state.slabs(heads[i].len) : 0;
            uint32_t all;
            const uint32_t parts = slabs == 0 ? 0 : (slabs + piece_of(slabs) - 1) / piece_of(slabs);
            const uint32_t opening = parts_so_far + sum_before<PLANNERS>(parts, sums, all);
            parts_so_far += all;
            if (parts > 0) heads[i].parts = parts, heads[i].opening = opening;
        }
        __syncthreads();
        // Equal shares, each cut moved on to the next end of a piece.
        const uint32_t used = min(call.blocks, listed);
        auto cut = [&](uint32_t block) {
            const uint32_t slab = listed * block / used;
            if (slab == listed) return listed;
            const Head &head = heads[owner_of(heads, count, slab)];
            const uint32_t slabs = state.slabs(head.len), piece = piece_of(slabs);
            return head.slabs + min((slab - head.slabs + piece - 1) / piece * piece, slabs);
        };
        for (uint32_t block = threadIdx.x; block < call.blocks; block += PLANNERS) {
            Share share = {0, 0, 0, 0};
            if (block < used) {
                const uint32_t begin = cut(block), end = cut(block + 1);
                if (begin < end) {
                    const uint32_t owner = owner_of(heads, count, begin);
                    const uint32_t piece = piece_of(state.slabs(heads[owner].len));
                    share = {begin, end, owner, heads[owner].opening + (begin - heads[owner].slabs) / piece};
                }
            }
            shares[block] = share;
        }
        return;
    }

    // Shares of equal size, or of a few slabs more if all heads can then be cut apart. A thread meets the heads that it wrote.
    const uint32_t equal = max((listed + call.blocks - 1) / call.blocks, LEAST);
    uint32_t cut[SECOND_HEAD + 1] = {};
    for (uint32_t i = threadIdx.x; i < count; i += PLANNERS) {
        const uint32_t slabs = state.slabs(heads[i].len);
#pragma unroll
        for (uint32_t k = 0; k <= SECOND_HEAD; k++) cut[k] += (slabs + equal + k - 1) / (equal + k);
    }
#pragma unroll
    for (uint32_t k = 0; k <= SECOND_HEAD; k++) {
        cut[k] = __reduce_add_sync(~0u, cut[k]);
        if (threadIdx.x % LANES == 0) atomicAdd(&cuts[k], cut[k]);
    }
    __syncthreads();
    uint32_t extra = 0;
    while (extra <= SECOND_HEAD && cuts[extra] > call.blocks) extra++;
    uint32_t used = 0;
    if (extra <= SECOND_HEAD) {
        const uint32_t most = equal + extra;
        for (uint32_t base = 0; base < count; base += PLANNERS) {
            const uint32_t i = base + threadIdx.x;
            const uint32_t first = i < count ? heads[i].slabs : 0, slabs = i < count ? state.slabs(heads[i].len) : 0;
            const uint32_t parts = (slabs + most - 1) / most;
            uint32_t all;
            const uint32_t opening = used + sum_before<PLANNERS>(parts, sums, all);
            used += all;
            if (parts > 0) heads[i].parts = parts, heads[i].opening = 2 * opening;
            uint32_t begin = first;
            for (uint32_t part = 0; part < parts; part++) {
                const uint32_t end = first + slabs * (part + 1) / parts;
                shares[opening + part] = {begin, end, i, 2 * (opening + part)};
                begin = end;
            }
        }
    } else {
        used = min(call.blocks, (listed + LEAST - 1) / LEAST);
        auto begin = [&](uint32_t block) { return listed * block / used; };
        auto owner = [&](uint32_t slab) { return ((slab + 1) * used - 1) / listed; };
        for (uint32_t i = threadIdx.x; i < count; i += PLANNERS) {
            const uint32_t first = heads[i].slabs, slabs = state.slabs(heads[i].len);
            if (slabs == 0) continue;
            const uint32_t opening = owner(first);
            heads[i].parts = owner(first + slabs - 1) - opening + 1;
            heads[i].opening = 2 * opening + (begin(opening) < first);
        }
        for (uint32_t block = threadIdx.x; block < used; block += PLANNERS) {
            shares[block] = {begin(block), begin(block + 1), owner_of(heads, count, begin(block)), 2 * block};
        }
    }
    for (uint32_t block = used + threadIdx.x; block < call.blocks; block += PLANNERS) shares[block] = {0, 0, 0, 0};
}

struct Append {
    State state;
    View keys;    // [kv heads][texts][dim]
    View values;
    const uint32_t *drops;  // [kv heads][words of texts], or null if all stay
    const uint32_t *rows;   // [kv heads][texts]: the layer's, of Begin
    const uint64_t *marks;
    uint32_t texts;
    uint32_t wide;  // rows may be copied 16 bytes at a time
};

// A step's keys and values into their rows, and the drop bits into the ring. A warp a row.
extern "C" __global__ void resident_append(Append call) {
    const State &state = call.state;
    const Pool &pool = state.pool;
    const uint32_t i = blockIdx.x * WARPS + threadIdx.x / LANES, lane = threadIdx.x % LANES;
    if (i >= state.kv_heads * call.texts) return;
    const uint32_t row = call.rows[i], kv_head = i / call.texts, text = i - kv_head * call.texts;
    if (row == NO_ROW) return;
    if (lane == 0 && call.drops) {
        const uint32_t words = (call.texts + LANES - 1) / LANES;
        const uint32_t drop = call.drops[uint64_t(kv_head) * words + text / LANES] >> text % LANES & 1;
        if (drop) state.rings[call.marks[i]] |= 1;
    }
    if (!call.wide) return store_row(pool, call.keys, call.values, kv_head, text, row);
    const uint32_t chunks = pool.dim * 2 / 16;
    auto *data = static_cast<int4 *>(pool.data) + pool.key(row) / 8;
    for (uint32_t c = lane; c < 2 * chunks; c += LANES) {
        const bool value = c >= chunks;
        const uint32_t chunk = value ? c - chunks : c;
        const View &view = value ? call.values : call.keys;
        const auto *from = static_cast<const __nv_bfloat16 *>(view.data) + view.at(kv_head, text);
        data[(value ? int64_t(pool.page_size) * chunks : 0) + chunk] = reinterpret_cast<const int4 *>(from)[chunk];
    }
}

struct Release {
    State state;
    uint32_t seat;
    uint32_t unused;
};

// A text's pages back onto the stack. A warp a head.
extern "C" __global__ void __launch_bounds__(LANES) resident_release(Release call) {
    const State &state = call.state;
    const uint32_t layer = blockIdx.x / state.kv_heads, kv_head = blockIdx.x % state.kv_heads, lane = threadIdx.x;
    const uint64_t row = state.row(layer, kv_head, call.seat);
    const uint32_t pages = state.pages(state.lens[row]);
    give(state, state.tables + row * state.most_pages, 0, pages);
    for (uint32_t i = lane; i < state.places; i += LANES) state.rings[row * state.places + i] = 0;
    if (lane == 0) state.lens[row] = 0;
    if (lane == 0 && kv_head == 0) state.ages[layer * state.seats + call.seat] = 0;
}

struct Fork {
    State state;
    uint32_t from;  // seats
    uint32_t to;
};

// A second text that goes on from where another is, in the same pages. A block a head.
extern "C" __global__ void resident_fork(Fork call) {
    const State &state = call.state;
    const uint32_t layer = blockIdx.x / state.kv_heads, kv_head = blockIdx.x % state.kv_heads;
    const uint64_t from = state.row(layer, kv_head, call.from), to = state.row(layer, kv_head, call.to);
    const uint32_t len = state.lens[from];
    for (uint32_t i = threadIdx.x; i < state.pages(len); i += blockDim.x) {
        const uint32_t page = state.tables[from * state.most_pages + i];
        state.tables[to * state.most_pages + i] = page;
        if (page != TRASH) atomicAdd(state.sharers + page, 1);
    }
    for (uint32_t i = threadIdx.x; i < state.places; i += blockDim.x) {
        state.rings[to * state.places + i] = state.rings[from * state.places + i];
    }
    if (threadIdx.x == 0) state.lens[to] = len;
    uint32_t *ages = state.ages + uint64_t(layer) * state.seats;
    if (threadIdx.x == 0 && kv_head == 0) ages[call.to] = ages[call.from];
}

struct Swap {
    State state;
    uint32_t *pages;         // of all heads, one after the other, as words
    uint32_t *rings;         // [layers][kv heads][places]
    uint32_t *ages;          // [layers]
    const uint32_t *lens;    // [layers][kv heads]
    const uint32_t *starts;  // [layers][kv heads]: pages before each
    uint32_t seat;
    uint32_t comes;  // into the cache, or out of it
};

// A text's rows out of the cache, or into pages that are taken for them. A block a head.
extern "C" __global__ void resident_swap(Swap call) {
    __shared__ int32_t had;
    const State &state = call.state;
    const uint32_t head = blockIdx.x, layer = head / state.kv_heads;
    const uint64_t row = state.row(layer, head % state.kv_heads, call.seat);
    const uint32_t pages = state.pages(call.lens[head]), places = state.places;
    const uint32_t words = state.pool.page() * state.pool.element() / 4;
    uint32_t *table = state.tables + row * state.most_pages;
    uint32_t *age = state.ages + uint64_t(layer) * state.seats + call.seat;
    const bool first = head % state.kv_heads == 0;
    if (threadIdx.x == 0 && call.comes) {
        had = take(state, pages);
        state.lens[row] = call.lens[head];
        if (first) *age = call.ages[layer];
    } else if (threadIdx.x == 0 && first) {
        call.ages[layer] = *age;
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x; call.comes && i < pages; i += blockDim.x) table[i] = taken(state, had, i);
    for (uint32_t i = threadIdx.x; i < places; i += blockDim.x) {
        uint32_t &here = state.rings[row * places + i], &there = call.rings[uint64_t(head) * places + i];
        if (call.comes) here = there;
        else there = here;
    }
    __syncthreads();
    for (uint32_t page = 0; page < pages; page++) {
        uint32_t *here = static_cast<uint32_t *>(state.pool.data) + uint64_t(table[page]) * words;
        uint32_t *there = call.pages + uint64_t(call.starts[head] + page) * words;
        for (uint32_t i = threadIdx.x; i < words; i += blockDim.x) {
            if (call.comes) here[i] = there[i];
            else there[i] = here[i];
        }
    }
}

// Sizes of the structs above, in their order: the host's mirror must agree.
extern "C" __global__ void resident_sizes(uint32_t *sizes) {
    sizes[0] = sizeof(State);
    sizes[1] = sizeof(Admit);
    sizes[2] = sizeof(Begin);
    sizes[3] = sizeof(Append);
    sizes[4] = sizeof(Release);
    sizes[5] = sizeof(Fork);
    sizes[6] = sizeof(Swap);
}
