// Attention of a pass of several tokens over their caches and themselves: bf16, fp16, or eight bits that become bf16 in shared
// memory, and whose scales meet scores and weights; pages as in stream.cuh. A pass is appended, so the token that comes i-th of n sees all slots of its head but the last n - 1 - i, and nothing else is masked.
//
// A tile is some tokens times the query heads of a kv head, as rows of the tensor cores; a unit is some keys and values
// that a tile takes at once. The units of all tiles of a layer lie in one order, of which each block takes an equal share
// (stream-K): a question of 40 tokens over a long text fills the card as a chunk of 2048 does. A tile that several
// blocks share is cut into parts, which go to a workspace, and a second kernel folds them in their order, a warp a row:
// the last of the blocks to be done would have to read the parts of all of them alone.

#pragma once

#include "tile.cuh"

// A tile of a layer's work.
struct alignas(16) Tile {
    uint32_t begin;    // its first unit in the order of the layer's
    uint32_t units;
    uint32_t opening;  // the first of its parts; the one that block b begins its share with is 2b, each other 2b + 1
    uint32_t parts;
};

// A text of a pass.
struct alignas(16) PassText {
    uint32_t seat;
    uint32_t tokens;
    uint32_t first;       // its first token in the pass
    uint32_t leaving;     // its newest tokens before the pass that may be beyond the window now
    uint32_t first_tile;  // of one kv head's
    uint32_t unused[3];
};

struct Pass {
    Attend attend;
    const Share *shares;  // [blocks]: of units; `head` is the tile of the first
    const Tile *tiles;    // [H][tiles]
    const uint32_t *owners;  // [tiles]: text of each
    const PassText *texts;
    float *parts;         // [2 blocks][height * (dim + 2)]
    uint32_t count;       // tiles of one kv head
    uint32_t height;      // rows of a tile
};

namespace pass {

using namespace tile;

constexpr int TEAM = 4;     // warps of a block
constexpr int FOLDERS = 8;  // warps of a block that folds
constexpr int FOLDED = 8;   // parts of a row on their way at once

// 16 bytes, or zeros.
__device__ void copy16_or_zero(uint32_t to, const void *from, bool real) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(real ? 16 : 0) : "memory");
}

__device__ uint32_t shared_word(uint32_t from) {
    uint32_t x;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(from) : "memory");
    return x;
}

__device__ void set_shared_word(uint32_t to, uint32_t x) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(x) : "memory");
}

__device__ void set_shared_chunk(uint32_t to, const uint32_t (&x)[4]) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]) : "memory");
}

// Two elements of a row of results.
__device__ void save_two(const View &out, int64_t at, float x, float y) {
    if (out.type == F32) {
        *reinterpret_cast<float2 *>(static_cast<float *>(out.data) + at) = make_float2(x, y);
    } else {
        const uint32_t both = out.type == BF16 ? Bf16::pack(x, y) : F16::pack(x, y);
        *reinterpret_cast<uint32_t *>(static_cast<__nv_bfloat16 *>(out.data) + at) = both;
    }
}

// What a tile is of, and where its rows go.
struct Place {
    Tile tile;
    PassText text;
    uint32_t kv_head;
    uint32_t owner;      // the text's number
    uint32_t first_row;  // of all rows of the text in the kv head
    uint32_t height;     // rows that are real
    uint32_t group;

    __device__ Place(const Pass &call, uint32_t index) : tile(call.tiles[index]), group(call.attend.group) {
        kv_head = index / call.count;
        const uint32_t in_head = index - kv_head * call.count;
        owner = call.owners[in_head];
        text = call.texts[owner];
        first_row = (in_head - text.first_tile) * call.height;
        height = min(call.height, text.tokens * group - first_row);
    }
    // Of the text, and of the pass.
    __device__ uint32_t token(uint32_t row) const { return (first_row + row) / group; }
    __device__ uint32_t query_head(uint32_t row) const { return kv_head * group + (first_row + row) % group; }
};

// A unit of eight bits, keys and values, to rows of bf16, which hold the same numbers. The scales of all rows go behind them.
template <class T, int D, int KEYS>
__device__ void widen_unit(uint32_t to, uint32_t from) {
    constexpr int CHUNKS = D / 8, COUNT = 2 * KEYS * CHUNKS;
    for (uint32_t row = threadIdx.x; row < 2 * KEYS; row += TEAM * LANES) {
        set_shared_word(to + 2 * KEYS * PITCH<D> + row * 4, shared_word(from + 2 * KEYS * D + row * 4));
    }
#pragma unroll 4
    for (uint32_t i = threadIdx.x; i < COUNT; i += TEAM * LANES) {
        const uint32_t row = i / CHUNKS, chunk = i - row * CHUNKS, half = row / KEYS;  // keys, then values
        uint32_t wide[4];
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const uint32_t bytes = shared_word(from + row * D + chunk * 8 + j * 4);
            const float2 even = T::unpack(T::widen(bytes << 8)), odd = T::unpack(T::widen(bytes));
            wide[2 * j] = T::pack(even.x * T::UP * T::UP, odd.x * T::UP * T::UP);
            wide[2 * j + 1] = T::pack(even.y * T::UP * T::UP, odd.y * T::UP * T::UP);
        }
        set_shared_chunk(to + half * KEYS * PITCH<D> + swizzled<D>(row % KEYS, chunk), wide);
    }
}

// A block's share. A warp has `ROWS` times 16 rows of a tile; a unit has `KEYS` keys.
template <class T, int D, int ROWS, int KEYS>
__device__ void attend_share(const Pass &call) {
    constexpr int CHUNKS = D / 8, THREADS = TEAM * LANES, HEIGHT = TEAM * ROWS * 16;
    constexpr bool NARROW = T::BYTES == 1;
    constexpr int HALF = KEYS * PITCH<D>;  // bytes of a unit's keys in shared memory
    constexpr int SLABS = KEYS / SLAB;     // of a unit
    constexpr int SCALES = 2 * KEYS * D;   // where they lie in a unit of eight bits, beyond keys and values
    extern __shared__ __align__(128) unsigned char shared[];
    const Attend &attend = call.attend;
    const Share share = call.shares[blockIdx.x];
    if (share.begin == share.end) return;
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    const uint32_t queries = shared_address(shared), stages = queries + HEIGHT * PITCH<D>;
    const uint32_t arriving = stages + 2 * HALF + 2 * KEYS * sizeof(float);  // a unit of eight bits
    const auto *pool = static_cast<const unsigned char *>(attend.pool.data);
    const float scale = attend.scale * LOG2E;
    const uint32_t shift = slabs_log2(attend.pool);
    const int64_t to_values = int64_t(attend.pool.page_size) * D * T::BYTES;  // bytes from a key to its value

    uint32_t index = share.head, number = share.part;
    for (uint32_t at = share.begin; at < share.end; index++, number = 2 * blockIdx.x + 1) {
        const Place place(call, index);
        const Tile &tile = place.tile;
        const uint32_t height = place.height;
        const Head head = attend.heads[uint64_t(place.kv_head) * attend.sequences + place.owner];
        const uint32_t unit0 = at - tile.begin, stop = min(tile.units, unit0 + (share.end - at));
        const uint32_t earlier = head.len - place.text.tokens, slabs = (head.len + SLAB - 1) / SLAB;
        const uint32_t *table = attend.tables + head.table;

        __syncthreads();  // shared memory is free again
        for (uint32_t i = threadIdx.x; i < HEIGHT * CHUNKS; i += THREADS) {
            const uint32_t row = i / CHUNKS, chunk = i - row * CHUNKS;
            const bool real = row < height;
            const auto *from = static_cast<const __nv_bfloat16 *>(attend.queries.data);
            if (real) from += attend.queries.at(place.query_head(row), place.text.first + place.token(row)) + chunk * 8;
            copy16_or_zero(queries + swizzled<D>(row, chunk), from, real);
        }
        uint32_t ids[SLABS];  // pages of the unit to be fetched next
        auto look_up = [&](uint32_t unit) {
#pragma unroll
            for (int i = 0; i < SLABS; i++) {
                const uint32_t slab = unit * SLABS + i;
                ids[i] = slab < slabs ? table[slab >> shift] : 0;
            }
        };
        auto fetch = [&](uint32_t unit) {
            const uint32_t to = NARROW ? arriving : stages + (unit & 1) * 2 * HALF;
#pragma unroll
            for (int s = 0; s < SLABS; s++) {
                const uint32_t inside = unit * SLABS + s & (1u << shift) - 1;  // the page, in slabs
                if constexpr (NARROW) {
                    const unsigned char *page = pool + (uint64_t(ids[s]) << shift) * (2 * SLAB * (D + sizeof(float)));
#pragma unroll 1
                    for (int i = 0; i < (2 * D + 8 + THREADS - 1) / THREADS; i++) {
                        // 16 bytes of the slab's keys, its values, the keys' scales or the values'.
                        const uint32_t chunk = i * THREADS + threadIdx.x;
                        const bool scales = chunk >= 2 * D;
                        const uint32_t length = scales ? SLAB * sizeof(float) : SLAB * D;
                        const uint32_t in_both = scales ? chunk - 2 * D : chunk, half = in_both >= length / 16;
                        const uint32_t in_half = in_both * 16 - half * length;
                        if (chunk >= 2 * D + 8) continue;
                        copy16(to + (scales ? SCALES : 0) + half * (length * SLABS) + s * length + in_half,
                               page + (scales ? 2 * to_values : 0) + (half << shift) * length + inside * length + in_half);
                    }
                    continue;
                }
                const uint64_t slab = (uint64_t(ids[s]) << shift + 1) + inside;
                const unsigned char *from = pool + slab * (SLAB * D * 2);
                if constexpr (CHUNKS * SLAB % THREADS == 0) {
#pragma unroll
                    for (int i = 0; i < CHUNKS * SLAB / THREADS; i++) {
                        const uint32_t chunk = i * THREADS + threadIdx.x, row = chunk / CHUNKS + s * SLAB;
                        copy16(to + swizzled<D>(row, chunk % CHUNKS), from + chunk * 16);
                        copy16(to + HALF + swizzled<D>(row, chunk % CHUNKS), from + to_values + chunk * 16);
                    }
                } else {
#pragma unroll
                    for (int i = 0; i < 2 * CHUNKS * SLAB / THREADS; i++) {
                        const uint32_t both = i * THREADS + threadIdx.x;  // keys, then values
                        const bool value = both >= CHUNKS * SLAB;
                        const uint32_t chunk = value ? both - CHUNKS * SLAB : both, row = chunk / CHUNKS + s * SLAB;
                        copy16(to + (value ? HALF : 0) + swizzled<D>(row, chunk % CHUNKS),
                               from + (value ? to_values : 0) + chunk * 16);
                    }
                }
            }
            commit();
        };
        look_up(unit0);
        fetch(unit0);
        look_up(unit0 + 1);

        uint32_t visible[ROWS][2];  // slots that a row sees
#pragma unroll
        for (int m = 0; m < ROWS; m++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const uint32_t row = (warp * ROWS + m) * 16 + half * 8 + lane / 4;
                visible[m][half] = row < height ? earlier + place.token(row) + 1 : 0;
            }
        }
        const uint32_t all_see = earlier + place.token(0) + 1;  // slots that every row sees
        float out[ROWS][D / 8][4], best[ROWS][2], sum[ROWS][2];
#pragma unroll
        for (int m = 0; m < ROWS; m++) {
            best[m][0] = best[m][1] = -INFINITY, sum[m][0] = sum[m][1] = 0.0f;
#pragma unroll
            for (int i = 0; i < D / 8; i++) out[m][i][0] = out[m][i][1] = out[m][i][2] = out[m][i][3] = 0.0f;
        }

#pragma unroll 1
        for (uint32_t unit = unit0; unit < stop; unit++) {
            wait<0>();
            __syncthreads();
            if constexpr (NARROW) {
                widen_unit<T, D, KEYS>(stages, arriving);
                __syncthreads();
            }
            if (unit + 1 < stop) {
                fetch(unit + 1);
                look_up(unit + 2);
            }
            const uint32_t keys = stages + (NARROW ? 0 : (unit & 1) * 2 * HALF), values = keys + HALF;
            float score[ROWS][KEYS / 8][4];
#pragma unroll
            for (int m = 0; m < ROWS; m++) {
#pragma unroll
                for (int i = 0; i < KEYS / 8; i++) score[m][i][0] = score[m][i][1] = score[m][i][2] = score[m][i][3] = 0.0f;
            }
#pragma unroll
            for (int k = 0; k < D / 16; k++) {
                uint32_t a[ROWS][4];
#pragma unroll
                for (int m = 0; m < ROWS; m++) {
                    load_matrices(a[m], queries + swizzled<D>((warp * ROWS + m) * 16 + lane % 16, 2 * k + lane / 16));
                }
#pragma unroll
                for (int i = 0; i < KEYS / 16; i++) {
                    uint32_t b[4];
                    load_matrices(b, keys + swizzled<D>(i * 16 + lane / 16 * 8 + lane % 8, 2 * k + (lane / 8 & 1)));
#pragma unroll
                    for (int m = 0; m < ROWS; m++) {
                        T::template multiply<true>(score[m][2 * i], a[m], b[0], b[1]);
                        T::template multiply<true>(score[m][2 * i + 1], a[m], b[2], b[3]);
                    }
                }
            }
            // Of rows `i * 8 + lane % 4 * 2` and the next, of the unit's keys or values.
            auto scales = [&](int i, bool value) {
                return load_pair(values + HALF + (value * KEYS + i * 8 + lane % 4 * 2) * sizeof(float));
            };
            if constexpr (NARROW) {
#pragma unroll
                for (int i = 0; i < KEYS / 8; i++) {
                    const float2 by = scales(i, false);
#pragma unroll
                    for (int m = 0; m < ROWS; m++) {
#pragma unroll
                        for (int j = 0; j < 4; j++) score[m][i][j] *= j & 1 ? by.y : by.x;
                    }
                }
            }
            const bool masked = (unit + 1) * KEYS > all_see;
            if (masked) {
#pragma unroll
                for (int m = 0; m < ROWS; m++) {
#pragma unroll
                    for (int i = 0; i < KEYS / 8; i++) {
#pragma unroll
                        for (int j = 0; j < 4; j++) {
                            const uint32_t slot = unit * KEYS + i * 8 + lane % 4 * 2 + (j & 1);
                            if (slot >= visible[m][j / 2]) score[m][i][j] = -INFINITY;
                        }
                    }
                }
            }
            uint32_t weights[ROWS][KEYS / 16][4];
#pragma unroll
            for (int m = 0; m < ROWS; m++) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    float raised = best[m][half];
#pragma unroll
                    for (int i = 0; i < KEYS / 8; i++) {
                        raised = fmaxf(raised, fmaxf(score[m][i][2 * half], score[m][i][2 * half + 1]));
                    }
                    raised = quad_max(raised);
                    const float base = anchor(raised) * scale;
                    const float fade = exp2_of(best[m][half] * scale - base);
                    best[m][half] = raised;
                    float total = sum[m][half] * fade;
#pragma unroll
                    for (int i = 0; i < KEYS / 8; i++) {
                        const float p = exp2_of(score[m][i][2 * half] * scale - base);
                        const float q = exp2_of(score[m][i][2 * half + 1] * scale - base);
                        total += p + q;
                        float2 weight = make_float2(p, q);
                        if constexpr (NARROW) {
                            // A scale that is no number is heard only where its value is seen.
                            const float2 by = scales(i, true);
                            if (!masked || score[m][i][2 * half] != -INFINITY) weight.x *= by.x;
                            if (!masked || score[m][i][2 * half + 1] != -INFINITY) weight.y *= by.y;
                        }
                        weights[m][i / 2][half + 2 * (i & 1)] = T::pack(weight.x, weight.y);
                    }
                    sum[m][half] = total;
                    // Where the best score stays, as it mostly does, so do the sums.
                    if (__any_sync(~0u, fade != 1.0f)) {
#pragma unroll
                        for (int i = 0; i < D / 8; i++) out[m][i][2 * half] *= fade, out[m][i][2 * half + 1] *= fade;
                    }
                }
            }
            if (masked) {
                // A value that is no number may be of a token that a row does not see, or lie past the end, and a weight of
                // 0 does not silence it. It is added where it is seen, and taken out of the products.
                uint32_t odd = 0;
                for (uint32_t i = threadIdx.x; i < KEYS * D / 2; i += THREADS) {
                    const uint32_t row = i / (D / 2), word = i - row * (D / 2);
                    odd |= T::odd(shared_word(values + swizzled<D>(row, word / 4) + word % 4 * 4));
                }
                if (__syncthreads_or(odd)) {
#pragma unroll 1
                    for (uint32_t row = 0; row < KEYS; row++) {
#pragma unroll
                        for (int i = 0; i < D / 8; i++) {
                            const uint32_t pair = shared_word(values + swizzled<D>(row, i) + lane % 4 * 4);
                            const uint32_t which = T::odd(pair);
                            const float2 x = T::unpack(pair);
#pragma unroll
                            for (int j = 0; which != 0 && j < 2 * ROWS; j++) {
                                if (unit * KEYS + row >= visible[j / 2][j & 1]) continue;
                                if (which & 0x8000) out[j / 2][i][2 * (j & 1)] += x.x;
                                if (which >> 31) out[j / 2][i][2 * (j & 1) + 1] += x.y;
                            }
                        }
                    }
                    __syncthreads();
                    for (uint32_t i = threadIdx.x; i < KEYS * D / 2; i += THREADS) {
                        const uint32_t row = i / (D / 2), word = i - row * (D / 2);
                        const uint32_t place = values + swizzled<D>(row, word / 4) + word % 4 * 4;
                        const uint32_t pair = shared_word(place), which = T::odd(pair);
                        const uint32_t low = which & 0x8000 ? 0 : pair & 0xffff, high = which >> 31 ? 0 : pair >> 16;
                        if (which) set_shared_word(place, high << 16 | low);
                    }
                    __syncthreads();
                }
            }
#pragma unroll
            for (int k = 0; k < KEYS / 16; k++) {
#pragma unroll
                for (int i = 0; i < D / 16; i++) {
                    uint32_t b[4];
                    load_transposed(b, values + swizzled<D>(k * 16 + (lane / 8 & 1) * 8 + lane % 8, 2 * i + lane / 16));
#pragma unroll
                    for (int m = 0; m < ROWS; m++) {
                        T::template multiply<true>(out[m][2 * i], weights[m][k], b[0], b[1]);
                        T::template multiply<true>(out[m][2 * i + 1], weights[m][k], b[2], b[3]);
                    }
                }
            }
        }

        float *part = call.parts + uint64_t(number) * HEIGHT * (D + 2);
#pragma unroll
        for (int m = 0; m < ROWS; m++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const uint32_t row = (warp * ROWS + m) * 16 + half * 8 + lane / 4;
                const float total = quad_sum(sum[m][half]), most = best[m][half] * scale;
                if (row >= height) continue;
                if (tile.parts == 1) {
                    const uint32_t token = place.text.first + place.token(row), query_head = place.query_head(row);
                    const float weight = total == 0.0f ? 0.0f : 1.0f / total;
                    const int64_t to = attend.out.at(query_head, token) + lane % 4 * 2;
#pragma unroll
                    for (int i = 0; i < D / 8; i++) {
                        save_two(attend.out, to + i * 8, out[m][i][2 * half] * weight, out[m][i][2 * half + 1] * weight);
                    }
                    if (attend.lse && lane % 4 == 0) {
                        attend.lse[uint64_t(query_head) * attend.tokens + token] =
                            total == 0.0f ? -INFINITY : most * LN2 + logf(total);
                    }
                } else {
                    float *to = part + row * D + lane % 4 * 2;
#pragma unroll
                    for (int i = 0; i < D / 8; i++) {
                        *reinterpret_cast<float2 *>(to + i * 8) =
                            make_float2(out[m][i][2 * half], out[m][i][2 * half + 1]);
                    }
                    if (lane % 4 == 0) {
                        reinterpret_cast<float2 *>(part + HEIGHT * D)[row] = make_float2(most, total);
                    }
                }
            }
        }
        at += stop - unit0;
    }
}

// The rows of the tiles that several blocks share, a warp a row. The second of a tile's blocks names it.
template <int D>
__device__ void fold_rows(const Pass &call) {
    const uint32_t slices = call.height / FOLDERS, block = blockIdx.x / slices;
    const uint32_t row = blockIdx.x % slices * FOLDERS + threadIdx.x / LANES;
    const Share share = call.shares[block];
    if (share.begin == share.end) return;
    const Place place(call, share.head);
    const Tile &tile = place.tile;
    if (tile.parts == 1 || tile.opening / 2 + 1 != block || row >= place.height) return;
    Lane<D> all = {};
    float most = -INFINITY, total = 0.0f;
    for (uint32_t j = 0; j < tile.parts; j += FOLDED) {
        float theirs[FOLDED][D / LANES];
        float2 their[FOLDED];
        float top = most;
#pragma unroll
        for (int k = 0; k < FOLDED; k++) {
            const uint32_t which = j + k == 0 ? tile.opening : (tile.opening & ~1u) + 2 * (j + k);
            const float *from = call.parts + uint64_t(which) * call.height * (D + 2);
            their[k] = make_float2(-INFINITY, 0.0f);
            if (j + k < tile.parts) {
                read_row<D>(theirs[k], from + row * D);
                their[k] = reinterpret_cast<const float2 *>(from + call.height * D)[row];
            } else {
#pragma unroll
                for (int i = 0; i < D / LANES; i++) theirs[k][i] = 0.0f;
            }
        }
#pragma unroll
        for (int k = 0; k < FOLDED; k++) top = fmaxf(top, their[k].x);
        const float base = anchor(top), old = exp2_of(most - base);
        most = top;
        total *= old;
        all.scale(old);
#pragma unroll
        for (int k = 0; k < FOLDED; k++) {
            const float weight = exp2_of(their[k].x - base);
            total += weight * their[k].y;
            all.add(weight, theirs[k]);
        }
    }
    finish<D>(call.attend, place.query_head(row), place.text.first + place.token(row), all, most, total);
}

}  // namespace pass

// Kernels of a type: tiles of 128 rows, and of 64 where that is enough or registers are short. Mirrored in
// src/cuda/driver/pass.rs.
#define PASS_ATTEND(NAME, T, D, ROWS, KEYS, BLOCKS)                                                             \
    extern "C" __global__ void __launch_bounds__(pass::TEAM *LANES, BLOCKS) pass_attend_##NAME(Pass call) {     \
        pass::attend_share<pass::T, D, ROWS, KEYS>(call);                                                       \
    }
#define PASS_FOLD(D)                                                                                     \
    extern "C" __global__ void __launch_bounds__(pass::FOLDERS *LANES) pass_fold_d##D(Pass call) {       \
        pass::fold_rows<D>(call);                                                                        \
    }
#define PASS_KERNELS(T)                          \
    PASS_ATTEND(tall_d64, T, 64, 2, 64, 2)       \
    PASS_ATTEND(d64, T, 64, 1, 64, 2)            \
    PASS_ATTEND(tall_d96, T, 96, 2, 32, 2)       \
    PASS_ATTEND(d96, T, 96, 1, 64, 2)            \
    PASS_ATTEND(tall_d128, T, 128, 2, 64, 2)     \
    PASS_ATTEND(d128, T, 128, 1, 64, 2)          \
    PASS_ATTEND(d256, T, 256, 1, 32, 2)          \
    PASS_FOLD(64)                                \
    PASS_FOLD(96)                                \
    PASS_FOLD(128)                               \
    PASS_FOLD(256)                               \
                                                 \
    extern "C" __global__ void pass_attend_sizes(uint32_t *sizes) { \
        sizes[0] = sizeof(Tile);                 \
        sizes[1] = sizeof(PassText);             \
        sizes[2] = sizeof(Pass);                 \
    }
