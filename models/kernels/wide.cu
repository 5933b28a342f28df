// Products of a decode step on Hopper: what step.cu computes, by wgmma.
//
// A tile is 64 rows of a weight for all columns, which are the columns of wgmma: 8, 16, 32 or 64 of them. Two teams of four
// warps take every second piece of the inner dimension and meet at the tile's end. Each has a ring of asynchronous copies of
// its own, rows and inputs, that runs on over the ends of tiles. The copy engine would fetch with less ado, but waits for so
// little at a time that memory idles (BENCHMARKS.md). Where there are too few tiles for the card, the blocks of a cluster
// share a tile's inner dimension, and then its rows. So what a column gets hangs on the product's shape and nothing else.
//
// Weights are asked for before the kernel before has ended, and pass through the second-level cache as what goes first. A
// ring leaves room for a block of attention beside it.

#include "product.cuh"

#include "../../paged-kernels/kernels/hopper.cuh"

namespace wide {

using namespace hopper;

constexpr uint32_t TILE = 64;                  // rows
constexpr uint32_t SIXTEENS = TILE / ROWS;     // of them
constexpr uint32_t PIECE = 64;                 // of the inner dimension: 128 bytes, the width of wgmma's swizzle
constexpr uint32_t CHUNKS = PIECE / 8;         // copies of 16 bytes in a row of a piece
constexpr uint32_t TEAMS = 2;
constexpr uint32_t TEAM = 4 * LANES;           // threads
constexpr uint32_t LINES = TEAM / CHUNKS;      // rows that a team copies at once
constexpr uint32_t TOGETHER = 8;               // inputs on their way to a thread at once, before a kernel's first pieces

// Waits until no more than the `later` stages are under way.
__device__ inline void await(uint32_t later) {
    switch (later) {
    case 0: asm volatile("cp.async.wait_group 0;" ::: "memory"); break;
    case 1: asm volatile("cp.async.wait_group 1;" ::: "memory"); break;
    case 2: asm volatile("cp.async.wait_group 2;" ::: "memory"); break;
    case 3: asm volatile("cp.async.wait_group 3;" ::: "memory"); break;
    case 4: asm volatile("cp.async.wait_group 4;" ::: "memory"); break;
    case 5: asm volatile("cp.async.wait_group 5;" ::: "memory"); break;
    default: asm volatile("cp.async.wait_group 6;" ::: "memory"); break;
    }
}

__device__ inline void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int GROUPS>
__device__ void product(const Product &call) {
    constexpr uint32_t N = GROUPS * COLUMNS, ROW_BYTES = PIECE * 2, WEIGHT_BYTES = TILE * ROW_BYTES;
    constexpr uint32_t STAGE = WEIGHT_BYTES + N * ROW_BYTES, PITCH = N + 8;
    extern __shared__ __align__(1024) unsigned char shared[];
    __shared__ float factors[N], squares[SIXTEENS * 4][N];
    const uint32_t warp = threadIdx.x / LANES, lane = threadIdx.x % LANES, team = threadIdx.x / TEAM;
    const uint32_t stages = call.stages, inner = call.inner, total = call.rows + call.more_rows;
    const uint32_t ring = uint32_t(__cvta_generic_to_shared(shared)) + team * stages * STAGE;
    float *const sums = reinterpret_cast<float *>(shared + TEAMS * stages * STAGE);  // [TEAMS][TILE][PITCH]
    const uint32_t splits = call.splits, rank = blockIdx.x % splits, first = blockIdx.x / splits, blocks = gridDim.x / splits;
    // The block's pieces of a tile, of which the team takes every second one.
    const uint32_t pieces = (inner + PIECE - 1) / PIECE;
    const uint32_t begin = pieces * rank / splits + team, all = pieces * (rank + 1) / splits + TEAMS - 1, own = (all - begin) / TEAMS;
    start_next();
    uint64_t passing;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(passing));

    // A thread copies a chunk of every sixteenth row, and of every sixteenth column.
    const uint32_t chunk = threadIdx.x % CHUNKS, line = threadIdx.x % TEAM / CHUNKS;
    const uint32_t place = line * ROW_BYTES + ((chunk ^ line % 8) << 4);
    // What is asked for next: it runs ahead of what is multiplied. Tiles begin at another piece each, or all blocks would ask
    // for the same inputs at a time.
    struct Walk {
        uint32_t tile, piece, at;
    };
    Walk rows = {first, 0, 0}, columns = rows;
    const auto go_on = [&](Walk &walk) {
        if (walk.piece == 0) walk.at = walk.tile % own;
        const uint32_t at = (begin + walk.at * TEAMS) * PIECE + chunk * 8;
        if (++walk.at == own) walk.at = 0;
        if (++walk.piece == own) walk.piece = 0, walk.tile += blocks;
        return at;
    };
    const char *from[SIXTEENS];
    uint32_t there = 0;
    const auto ask_rows = [&](uint32_t stage) {
        if (rows.tile >= call.tiles || own == 0) return;
        if (rows.piece == 0) {
            there = 0;
#pragma unroll
            for (uint32_t s = 0; s < SIXTEENS; s++) {
                const uint32_t row = call.row(rows.tile * SIXTEENS + s, line);
                const bool more = row >= call.rows;
                from[s] = reinterpret_cast<const char *>((more ? call.more : call.weight) + uint64_t(more ? row - call.rows : row) * inner);
                there |= uint32_t(row < total) << s;
            }
        }
        const uint32_t at = go_on(rows), to = ring + stage * STAGE + place;
        const uint32_t here = at < inner ? there : 0;  // past the last row and the last element are zeros
#pragma unroll
        for (uint32_t s = 0; s < SIXTEENS; s++) {
            const bool exists = here >> s & 1;
            asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::256B [%0], [%1], 16, %2, %3;" ::"r"(to + s * ROWS * ROW_BYTES),
                         "l"(exists ? from[s] + at * 2 : reinterpret_cast<const char *>(call.weight)), "r"(exists ? 16 : 0), "l"(passing)
                         : "memory");
        }
    };
    // Where a thread's inputs of a piece come from, and whether they exist.
    constexpr uint32_t EACH = (N + LINES - 1) / LINES;
    const bool feeds = N >= LINES || line < N;
    const auto input_of = [&](uint32_t at, uint32_t i, bool &exists) {
        const uint32_t column = line + i * LINES, run = __umulhi(at, call.run_inverse);
        exists = at < inner && column < call.columns;
        return exists ? call.input + run * call.run_stride + at - run * call.run + column * call.column_stride : call.input;
    };
    const uint32_t inputs = ring + WEIGHT_BYTES + place;
    const auto ask_inputs = [&](uint32_t stage) {
        if (!feeds || columns.tile >= call.tiles || own == 0) return;
        const uint32_t at = go_on(columns);
#pragma unroll
        for (uint32_t i = 0; i < EACH; i++) {
            bool exists;
            const bf16 *const source = input_of(at, i, exists);
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(inputs + stage * STAGE + i * LINES * ROW_BYTES),
                         "l"(source), "r"(exists ? 16 : 0) : "memory");
        }
    };
    for (uint32_t i = 0; i < stages; i++) ask_rows(i), commit();
    settle();
    // The first inputs are not asked for behind the rows: copies are waited for in their order.
    for (uint32_t begun = 0; feeds && begun < stages; begun += TOGETHER / EACH) {
        uint4 x[TOGETHER];
#pragma unroll
        for (uint32_t k = 0; k < TOGETHER / EACH; k++) {
            const bool asks = begun + k < stages && columns.tile < call.tiles && own > 0;
            const uint32_t at = asks ? go_on(columns) : inner;
#pragma unroll
            for (uint32_t i = 0; i < EACH; i++) {
                bool exists;
                const bf16 *const source = input_of(at, i, exists);
                x[k * EACH + i] = exists ? *reinterpret_cast<const uint4 *>(source) : make_uint4(0, 0, 0, 0);
            }
        }
#pragma unroll
        for (uint32_t k = 0; k < TOGETHER / EACH; k++) {
            if (begun + k >= stages) break;
#pragma unroll
            for (uint32_t i = 0; i < EACH; i++) {
                const uint4 &y = x[k * EACH + i];
                asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(inputs + (begun + k) * STAGE + i * LINES * ROW_BYTES),
                             "r"(y.x), "r"(y.y), "r"(y.z), "r"(y.w) : "memory");
            }
        }
    }

    if (call.kind != ADD) factors_of<GROUPS>(call, warp * GROUPS, factors);
    // Of the block's sixteens and the groups of columns, four warps finish every second pair.
    constexpr uint32_t MOST = (SIXTEENS * GROUPS + 1) / 2;
    const uint32_t mine = SIXTEENS / splits;
    uint32_t stage = 0, before = stages;
    for (uint32_t tile = first; tile < call.tiles; tile += blocks) {
        Added added[MOST] = {};
        if (call.kind == ADD) {
#pragma unroll
            for (uint32_t n = 0; n < MOST; n++) {
                const uint32_t pair = team + 2 * n, sixteen = tile * SIXTEENS + rank * mine + pair / GROUPS;
                if (pair < mine * GROUPS) added[n] = ask_added(call, sixteen * ROWS + place_row(), pair % GROUPS * COLUMNS + place_column());
            }
        }
        float c[N / 2] = {};
#pragma unroll 1
        for (uint32_t i = 0; i < own; i++) {
            await(stages - 2);
            wgmma_wait<0>();                                              // the stage before has been multiplied
            asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // what was copied is there for wgmma
            if (team == 0) {
                asm volatile("bar.sync 1, %0;" ::"n"(TEAM) : "memory");
            } else {
                asm volatile("bar.sync 2, %0;" ::"n"(TEAM) : "memory");
            }
            const uint64_t a = hopper::tile(ring + stage * STAGE), b = hopper::tile(ring + stage * STAGE + WEIGHT_BYTES);
            wgmma_begin();
#pragma unroll
            for (uint32_t k = 0; k < PIECE / 16; k++) wgmma<N>(c, a + k * 2, b + k * 2);
            wgmma_commit();
            if (before < stages) ask_rows(before), ask_inputs(before), commit();
            before = stage;
            if (++stage == stages) stage = 0;
        }
        wgmma_wait<0>();
        wgmma_end(c);
        __syncthreads();  // the sums before have been read
        float *to = sums + (team * TILE + warp % 4 * ROWS + lane / 4) * PITCH + lane % 4 * 2;
#pragma unroll
        for (uint32_t i = 0; i < N / 8; i++) {
            *reinterpret_cast<float2 *>(to + i * 8) = make_float2(c[4 * i], c[4 * i + 1]);
            *reinterpret_cast<float2 *>(to + i * 8 + 8 * PITCH) = make_float2(c[4 * i + 2], c[4 * i + 3]);
        }
        if (splits > 1) {
            __syncwarp();
            cluster_arrive();
            cluster_wait();
        } else {
            __syncthreads();
        }
#pragma unroll
        for (uint32_t n = 0; n < MOST; n++) {
            const uint32_t pair = team + 2 * n, within = rank * mine + pair / GROUPS, group = pair % GROUPS;
            if (pair >= mine * GROUPS) break;
            const float square = finish(call, tile * SIXTEENS + within, group, factors, added[n], [&](uint32_t i) {
                const float *const at = sums + (within * ROWS + i) * PITCH + group * COLUMNS + place_column();
                float sum = 0.0f;
                if (splits == 1) {
#pragma unroll
                    for (uint32_t t = 0; t < TEAMS; t++) sum += at[t * TILE * PITCH];
                } else {
                    const uint32_t there = uint32_t(__cvta_generic_to_shared(at));
                    for (uint32_t r = 0; r < splits; r++) {
#pragma unroll
                        for (uint32_t t = 0; t < TEAMS; t++) sum += read(in_block(there + t * TILE * PITCH * 4, r));
                    }
                }
                return sum;
            });
            if (call.kind == ADD && lane < COLUMNS) squares[pair / GROUPS * 4 + warp % 4][group * COLUMNS + lane] = square;
        }
        if (call.kind != ADD) continue;
        __syncthreads();
        if (threadIdx.x < call.columns) {
            float sum = 0.0f;
            for (uint32_t i = 0; i < mine * 4; i++) sum += squares[i][threadIdx.x];
            float *const parts = call.next_squares + threadIdx.x * call.next_parts;
            parts[tile * splits + rank] = sum;
            if (tile == 0 && rank == 0) {
                for (uint32_t i = call.tiles * splits; i < call.next_parts; i++) parts[i] = 0.0f;
            }
        }
    }
    if (splits > 1) {
        __syncwarp();
        cluster_arrive();  // nobody leaves while others read what is theirs
        cluster_wait();
    }
}

}  // namespace wide

// By the columns that they have room for.
#define WIDE(COUNT, REGISTERS)                                                                 \
    extern "C" __global__ void __maxnreg__(REGISTERS) wide_product_##COUNT(Product call) {     \
        wide::product<COUNT / COLUMNS>(call);                                                  \
    }

WIDE(8, 128)
WIDE(16, 128)
WIDE(32, 128)
WIDE(64, 168)
