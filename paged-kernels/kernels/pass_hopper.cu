// Attention of a pass where most tokens are: tiles of 128 rows on a Hopper card. What pass.cuh does, of the same plan, by wgmma
// and the copy engine, since mma.sync reaches half of what the tensor cores can.
//
// A block has two warpgroups of 64 rows each, and a warp that fetches: slabs of 16 keys and values through a ring of units in
// shared memory, in the copy engine's swizzle. A warpgroup takes the scores of the next unit while the products with the values
// of the last are under way, and the softmax between them; the other's fall in between.

#include "hopper.cuh"
#include "pass.cuh"

struct HopperPass {
    hopper::Map pool;  // rows of all pages, [.., dim]
    Pass pass;
};

namespace pass_hopper {

using namespace hopper;
using namespace tile;

constexpr int GROUP = 128;     // threads of a warpgroup
constexpr int HEIGHT = 128;    // rows of a tile
constexpr int STRIPE = 64;     // elements of a row that lie together: 128 bytes
constexpr int THREADS = 3 * GROUP;  // the third group's first warp fetches; the others leave it their registers

template <int D, int KEYS>
struct Layout {
    static constexpr int STRIPES = D / STRIPE;
    static constexpr int QUERIES = HEIGHT * D * 2;  // bytes
    static constexpr int HALF = KEYS * D * 2;       // bytes of a unit's keys
};

__device__ void group_sync(uint32_t group) { asm volatile("bar.sync %0, %1;" ::"r"(group + 1), "n"(GROUP) : "memory"); }

// Whether any thread of the warpgroup says so.
__device__ bool group_any(uint32_t group, bool x) {
    uint32_t any;
    asm volatile(
        "{ .reg .pred p, q; setp.ne.u32 p, %1, 0; barrier.cta.red.or.pred q, %2, %3, p; selp.u32 %0, 1, 0, q; }"
        : "=r"(any)
        : "r"(uint32_t(x)), "r"(group + 1), "n"(GROUP)
        : "memory");
    return any;
}

// Shared memory that threads have written is read by wgmma after this.
__device__ void make_known() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

#define FOUR(c, i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define SIXTEEN(c, i) FOUR(c, i), FOUR(c, i + 4), FOUR(c, i + 8), FOUR(c, i + 12)
#define OF_TYPE(TYPE)                                                                                                    \
    /* c += a * transposed b, or c = that: 64 rows of a, 64 of b, 16 columns of both. */                                 \
    static __device__ void scores(float (&c)[32], uint64_t a, uint64_t b, uint32_t adds) {                               \
        asm volatile(                                                                                                    \
            "{ .reg .pred p; setp.ne.u32 p, %34, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " {"       \
            "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                     \
            "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31 "                            \
            "}, %32, %33, p, 1, 1, 0, 0; }"                                                                              \
            : SIXTEEN(c, 0), SIXTEEN(c, 16)                                                                              \
            : "l"(a), "l"(b), "r"(adds));                                                                                \
    }                                                                                                                    \
    /* c += a * b: 64 rows of a, in registers, 16 of b and 64 of its columns. */                                         \
    static __device__ void sums(float (&c)[32], const uint32_t (&a)[4], uint64_t b) {                                    \
        asm volatile(                                                                                                    \
            "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " {"                                             \
            "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                     \
            "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31 "                            \
            "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"                                                                  \
            : SIXTEEN(c, 0), SIXTEEN(c, 16)                                                                              \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                                       \
    }

struct Bf16 : tile::Bf16 {
    OF_TYPE("bf16")
};
struct F16 : tile::F16 {
    OF_TYPE("f16")
};

// Where a chunk of 16 bytes of a row lies in a stripe.
__device__ uint32_t chunk_at(uint32_t row, uint32_t chunk) { return row * 128 + ((chunk ^ (row & 7)) << 4); }

// The fetching warp: the units of a block's share, one after the other.
template <int D, int KEYS, int STAGES>
__device__ void fetch_share(const HopperPass &call, const Share &share, uint32_t stages, uint32_t full, uint32_t empty) {
    using L = Layout<D, KEYS>;
    constexpr int SLABS = KEYS / SLAB;
    const Attend &attend = call.pass.attend;
    const uint32_t lane = threadIdx.x % LANES, shift = slabs_log2(attend.pool), page_size = attend.pool.page_size;
    uint32_t round = 0;
    for (uint32_t at = share.begin, index = share.head; at < share.end; index++) {
        const pass::Place place(call.pass, index);
        const Head head = attend.heads[uint64_t(place.kv_head) * attend.sequences + place.owner];
        const uint32_t *table = attend.tables + head.table;
        const uint32_t slabs = (head.len + SLAB - 1) / SLAB, first = at - place.tile.begin;
        const uint32_t stop = min(place.tile.units, first + (share.end - at));
        // Each lane knows the row of a slab; those of the next 32 slabs are on their way.
        auto look_up = [&](uint32_t slab) { return slab + lane < slabs ? table[slab + lane >> shift] : 0; };
        uint32_t known = 0, next = look_up(first * SLABS);
        for (uint32_t unit = first; unit < stop; unit++, round++) {
            const uint32_t slab = (unit - first) * SLABS % LANES;
            if (slab == 0) {
                known = next;
                next = look_up(unit * SLABS + LANES);
            }
            const uint32_t stage = round % STAGES, to = stages + stage * 2 * L::HALF, barrier = full + stage * 8;
            if (round >= STAGES) barrier_wait(empty + stage * 8, (round / STAGES - 1) & 1);
            if (lane == 0) barrier_expect(barrier, 2 * L::HALF);
            __syncwarp();
            const uint32_t id = __shfl_sync(~0u, known, slab + lane % SLABS);
            // A lane a slab, and the other lanes its values.
            if (lane < 2 * SLABS) {
                const bool value = lane >= SLABS;
                const uint32_t which = lane % SLABS, in_page = unit * SLABS + which & (1u << shift) - 1;
                const uint32_t row = id * 2 * page_size + (value ? page_size : 0) + in_page * SLAB;
#pragma unroll
                for (int i = 0; i < L::STRIPES; i++) {
                    copy_box(to + (value ? L::HALF : 0) + i * KEYS * 128 + which * SLAB * 128, &call.pool, i * STRIPE,
                             row, barrier);
                }
            }
        }
        at += stop - first;
    }
}

// A warpgroup's rows of the tiles of a block's share.
template <class T, int D, int KEYS, int STAGES>
__device__ void attend_share(const HopperPass &whole, const Share &share, uint32_t queries, uint32_t stages,
                             uint32_t full, uint32_t empty) {
    using L = Layout<D, KEYS>;
    constexpr int CHUNKS = D / 8, BLOCKS = KEYS / 64;
    const Pass &call = whole.pass;
    const Attend &attend = call.attend;
    const uint32_t group = threadIdx.x / GROUP, lane = threadIdx.x % LANES, thread = threadIdx.x % GROUP;
    const uint32_t own = queries + group * 64 * 128;  // the warpgroup's rows of each stripe
    const float scale = attend.scale * LOG2E;
    uint32_t round = 0, number = share.part;
    for (uint32_t at = share.begin, index = share.head; at < share.end; index++, number = 2 * blockIdx.x + 1) {
        const pass::Place place(call, index);
        const uint32_t height = place.height, first = at - place.tile.begin;
        const uint32_t stop = min(place.tile.units, first + (share.end - at));
        const uint32_t earlier = attend.heads[uint64_t(place.kv_head) * attend.sequences + place.owner].len -
                                 place.text.tokens;
        group_sync(group);  // all have done with the last tile's queries
        for (uint32_t i = thread; i < 64 * CHUNKS; i += GROUP) {
            const uint32_t in_group = i / CHUNKS, chunk = i % CHUNKS, row = group * 64 + in_group;
            const bool real = row < height;
            const auto *from = static_cast<const __nv_bfloat16 *>(attend.queries.data);
            if (real) from += attend.queries.at(place.query_head(row), place.text.first + place.token(row)) + chunk * 8;
            pass::copy16_or_zero(own + chunk / 8 * HEIGHT * 128 + chunk_at(in_group, chunk % 8), from, real);
        }
        commit();
        const uint32_t row0 = group * 64 + thread / LANES * 16 + lane / 4;
        uint32_t visible[2];  // slots that the rows see
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const uint32_t row = row0 + half * 8;
            visible[half] = row < height ? earlier + place.token(row) + 1 : 0;
        }
        const uint32_t all_see = earlier + place.token(group * 64) + 1;  // slots that every row of the warpgroup sees
        float out[L::STRIPES][32], best[2] = {-INFINITY, -INFINITY}, sum[2] = {}, fade[2];
        float score[BLOCKS][32];
        uint32_t weights[KEYS / 16][4];
#pragma unroll
        for (int i = 0; i < L::STRIPES; i++) {
#pragma unroll
            for (int j = 0; j < 32; j++) out[i][j] = 0.0f;
        }

        auto multiply = [&](uint32_t stage) {  // queries and keys
            const uint32_t keys = stages + stage * 2 * L::HALF;
            wgmma_begin();
#pragma unroll
            for (int k = 0; k < D / 16; k++) {
#pragma unroll
                for (int b = 0; b < BLOCKS; b++) {
                    T::scores(score[b], hopper::tile(own + k / 4 * HEIGHT * 128 + k % 4 * 32),
                              hopper::tile(keys + k / 4 * KEYS * 128 + b * 64 * 128 + k % 4 * 32), k > 0);
                }
            }
            wgmma_commit();
        };
        // Scores of a unit to weights, still wide; `fade` is what the sums so far lose.
        auto soften = [&]() {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float raised = best[half];
#pragma unroll
                for (int b = 0; b < BLOCKS; b++) {
#pragma unroll
                    for (int i = 0; i < 32; i += 4) {
                        raised = fmaxf(raised, fmaxf(score[b][i + 2 * half], score[b][i + 2 * half + 1]));
                    }
                }
                raised = quad_max(raised);
                const float base = anchor(raised) * scale;
                fade[half] = exp2_of(best[half] * scale - base);
                best[half] = raised;
                float total = sum[half] * fade[half];
#pragma unroll
                for (int b = 0; b < BLOCKS; b++) {
#pragma unroll
                    for (int i = 0; i < 32; i += 4) {
                        float &p = score[b][i + 2 * half], &q = score[b][i + 2 * half + 1];
                        p = exp2_of(p * scale - base), q = exp2_of(q * scale - base);
                        total += p + q;
                    }
                }
                sum[half] = total;
            }
        };
        auto pack = [&]() {
#pragma unroll
            for (int k = 0; k < KEYS / 16; k++) {
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const float *pair = &score[k / 4][k % 4 * 8 + 2 * j];
                    weights[k][j] = T::pack(pair[0], pair[1]);
                }
            }
        };

        auto values_of = [&](uint32_t stage) { return stages + stage * 2 * L::HALF + L::HALF; };
        auto arrived = [&](uint32_t round) { barrier_wait(full + round % STAGES * 8, round / STAGES & 1); };
        auto gather = [&](uint32_t stage) {  // weights and values
            wgmma_begin();
#pragma unroll
            for (int k = 0; k < KEYS / 16; k++) {
#pragma unroll
                for (int i = 0; i < L::STRIPES; i++) {
                    T::sums(out[i], weights[k], hopper::tile(values_of(stage) + i * KEYS * 128 + k * 16 * 128));
                }
            }
            wgmma_commit();
        };
        auto scores_end = [&]() {
#pragma unroll
            for (int b = 0; b < BLOCKS; b++) wgmma_end(score[b]);
        };
        auto sums_end = [&](uint32_t stage) {
            wgmma_wait<0>();
#pragma unroll
            for (int i = 0; i < L::STRIPES; i++) wgmma_end(out[i]);
            if (lane == 0) barrier_arrive(in_block(empty + stage * 8, 0));
        };
        // Where the best score stays, as it mostly does, so do the sums.
        auto lessen = [&]() {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                if (!__any_sync(~0u, fade[half] != 1.0f)) continue;
#pragma unroll
                for (int i = 0; i < L::STRIPES; i++) {
#pragma unroll
                    for (int j = 0; j < 32; j += 4) {
                        out[i][j + 2 * half] *= fade[half], out[i][j + 2 * half + 1] *= fade[half];
                    }
                }
            }
        };

        wait<0>();
        make_known();
        group_sync(group);
        uint32_t unit = first;
        // Units that every row sees all of.
        const uint32_t seen = min(stop, all_see / KEYS);
        if (unit < seen) {
            arrived(round);
            multiply(round % STAGES);
            wgmma_wait<0>();
            scores_end();
            soften();
            pack();
#pragma unroll 1
            for (; unit + 1 < seen; unit++, round++) {
                arrived(round + 1);
                multiply((round + 1) % STAGES);
                gather(round % STAGES);
                wgmma_wait<1>();
                scores_end();
                soften();
                sums_end(round % STAGES);
                lessen();
                pack();
            }
            gather(round % STAGES);
            sums_end(round % STAGES);
            unit++, round++;
        }
        // The others, one or two of a tile.
#pragma unroll 1
        for (; unit < stop; unit++, round++) {
            arrived(round);
            multiply(round % STAGES);
            wgmma_wait<0>();
            scores_end();
#pragma unroll
            for (int b = 0; b < BLOCKS; b++) {
#pragma unroll
                for (int i = 0; i < 32; i++) {
                    const uint32_t slot = unit * KEYS + b * 64 + i / 4 * 8 + lane % 4 * 2 + (i & 1);
                    if (slot >= visible[i / 2 & 1]) score[b][i] = -INFINITY;
                }
            }
            soften();
            lessen();
            pack();
            const uint32_t values = values_of(round % STAGES);
            uint32_t odd = 0;
            for (uint32_t i = thread; i < KEYS * D / 2; i += GROUP) odd |= T::odd(pass::shared_word(values + i * 4));
            if (!group_any(group, odd != 0)) {
                gather(round % STAGES);
                sums_end(round % STAGES);
                continue;
            }
            // A value that is no number may be of a token that a row does not see, or lie past the end, and a weight of 0 does
            // not silence it: those that are seen are added one by one.
#pragma unroll
            for (int k = 0; k < KEYS / 8; k++) {
#pragma unroll 1
                for (uint32_t from = 0; from < 8; from++) {
                    const uint32_t key = k * 8 + from, slot = unit * KEYS + key, lender = lane / 4 * 4 + from / 2;
                    const float2 tops = T::unpack(__shfl_sync(~0u, weights[k / 2][k % 2 * 2], lender));
                    const float2 lows = T::unpack(__shfl_sync(~0u, weights[k / 2][k % 2 * 2 + 1], lender));
                    const float top = from & 1 ? tops.y : tops.x, low = from & 1 ? lows.y : lows.x;
#pragma unroll
                    for (int i = 0; i < L::STRIPES * 8; i++) {
                        const float2 x = T::unpack(pass::shared_word(values + i / 8 * KEYS * 128 + chunk_at(key, i % 8) +
                                                                     lane % 4 * 4));
                        float *to = &out[i / 8][i % 8 * 4];
                        if (slot < visible[0]) to[0] += top * x.x, to[1] += top * x.y;
                        if (slot < visible[1]) to[2] += low * x.x, to[3] += low * x.y;
                    }
                }
            }
            __syncwarp();
            if (lane == 0) barrier_arrive(in_block(empty + round % STAGES * 8, 0));
        }

        float *part = call.parts + uint64_t(number) * HEIGHT * (D + 2);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const uint32_t row = row0 + half * 8;
            const float total = quad_sum(sum[half]), most = best[half] * scale;
            if (row >= height) continue;
            if (place.tile.parts == 1) {
                const uint32_t token = place.text.first + place.token(row), query_head = place.query_head(row);
                const float weight = total == 0.0f ? 0.0f : 1.0f / total;
                const int64_t to = attend.out.at(query_head, token) + lane % 4 * 2;
#pragma unroll
                for (int i = 0; i < L::STRIPES * 8; i++) {
                    const float *x = &out[i / 8][i % 8 * 4 + 2 * half];
                    pass::save_two(attend.out, to + i * 8, x[0] * weight, x[1] * weight);
                }
                if (attend.lse && lane % 4 == 0) {
                    attend.lse[uint64_t(query_head) * attend.tokens + token] =
                        total == 0.0f ? -INFINITY : most * LN2 + logf(total);
                }
            } else {
                float *to = part + row * D + lane % 4 * 2;
#pragma unroll
                for (int i = 0; i < L::STRIPES * 8; i++) {
                    const float *x = &out[i / 8][i % 8 * 4 + 2 * half];
                    *reinterpret_cast<float2 *>(to + i * 8) = make_float2(x[0], x[1]);
                }
                if (lane % 4 == 0) reinterpret_cast<float2 *>(part + HEIGHT * D)[row] = make_float2(most, total);
            }
        }
        at += stop - first;
    }
}

template <class T, int D, int KEYS, int STAGES>
__device__ void run(const HopperPass &call) {
    using L = Layout<D, KEYS>;
    extern __shared__ unsigned char bytes[];
    __shared__ __align__(8) uint64_t barriers[2 * STAGES];
    const uint32_t shared = (shared_address(bytes) + 1023) / 1024 * 1024, stages = shared + L::QUERIES;
    const uint32_t full = shared_address(barriers), empty = full + STAGES * 8;
    const Share share = call.pass.shares[blockIdx.x];
    if (share.begin == share.end) return;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) barrier_init(full + i * 8, 1), barrier_init(empty + i * 8, 2 * GROUP / LANES);
        barriers_ready();
    }
    __syncthreads();
    if (threadIdx.x >= 2 * GROUP) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (threadIdx.x < 2 * GROUP + LANES) fetch_share<D, KEYS, STAGES>(call, share, stages, full, empty);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
        attend_share<T, D, KEYS, STAGES>(call, share, shared, stages, full, empty);
    }
}

}  // namespace pass_hopper

// One block fills a multiprocessor. Mirrored in src/cuda/driver/pass.rs.
#define PASS_HOPPER(NAME, T, D, KEYS, STAGES)                                                        \
    extern "C" __global__ void __launch_bounds__(pass_hopper::THREADS, 1)                            \
        pass_hopper_##NAME(const __grid_constant__ HopperPass call) {                                \
        pass_hopper::run<pass_hopper::T, D, KEYS, STAGES>(call);                                     \
    }

PASS_HOPPER(bf16_d64, Bf16, 64, 128, 4)
PASS_HOPPER(bf16_d128, Bf16, 128, 128, 3)
PASS_HOPPER(f16_d64, F16, 64, 128, 4)
PASS_HOPPER(f16_d128, F16, 128, 128, 3)

extern "C" __global__ void pass_hopper_sizes(uint32_t *sizes) { sizes[0] = sizeof(HopperPass); }
