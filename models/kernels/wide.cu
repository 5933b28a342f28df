// Products of a decode step on Hopper: what step.cu computes, by the copy engine and wgmma.
//
// A tile is 64 rows of a weight for all columns, which are the columns of wgmma: 8, 16, 32 or 64 of them. A ninth warp
// fetches pieces of 64 elements of the inner dimension, rows and inputs, into a ring that runs on over the ends of tiles;
// two groups of four warps take every second piece and meet at the tile's end. Where there are too few tiles for the card,
// the blocks of a cluster share a tile's inner dimension, and then its rows. So what a column gets hangs on the product's
// shape and nothing else.
//
// Weights are asked for before the kernel before has ended, and pass through the second-level cache as what goes first. A
// ring leaves room for a block of attention beside it.

#include "product.cuh"

#include "../../paged-kernels/kernels/hopper.cuh"

namespace wide {

using namespace hopper;

constexpr uint32_t UNIT = 64;     // rows that wgmma takes
constexpr uint32_t PIECE = 64;    // of the inner dimension: 128 bytes, the width of the copy engine's swizzle
constexpr uint32_t HALF = 32;     // rows that are fetched at once: a tile's halves may be of two weights
constexpr uint32_t TEAMS = 2;     // of four warps
constexpr uint32_t WARPS = 4 * TEAMS;
constexpr uint32_t THREADS = (WARPS + 1) * LANES;
constexpr uint32_t SIXTEENS = UNIT / ROWS;

// The warps that multiply meet.
__device__ inline void meet() { asm volatile("bar.sync 1, %0;" ::"n"(WARPS * LANES) : "memory"); }

template <int GROUPS, int UNITS>
__device__ void product(const Product &call, const Map *weight, const Map *more, const Map *input) {
    constexpr uint32_t N = GROUPS * COLUMNS, WEIGHT_BYTES = UNITS * UNIT * PIECE * 2, STAGE = WEIGHT_BYTES + N * PIECE * 2;
    constexpr uint32_t PITCH = N + 8;
    extern __shared__ __align__(1024) unsigned char shared[];
    __shared__ float factors[N], squares[SIXTEENS * 4][N];
    const uint32_t stages = call.stages, base = uint32_t(__cvta_generic_to_shared(shared));
    float *const sums = reinterpret_cast<float *>(shared + stages * STAGE);  // [TEAMS][UNIT][PITCH]
    const uint32_t full = base + stages * STAGE + TEAMS * UNIT * PITCH * 4, empty = full + stages * 8;
    const uint32_t warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    const uint32_t splits = call.splits, rank = blockIdx.x % splits, first = blockIdx.x / splits, blocks = gridDim.x / splits;
    const uint32_t pieces = (call.inner + PIECE - 1) / PIECE;
    const uint32_t begin = pieces * rank / splits, own = pieces * (rank + 1) / splits - begin;
    start_next();
    if (threadIdx.x == 0) {
        for (uint32_t i = 0; i < stages; i++) {
            barrier_init(full + i * 8, 1);
            barrier_init(empty + i * 8, 4);
        }
        barriers_ready();
    }
    __syncthreads();

    if (warp == WARPS) {
        if (lane == 0) {
            ready_map(input);
            uint64_t passing;
            asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(passing));
            const uint32_t all = first < call.tiles ? (call.tiles - first + blocks - 1) / blocks * own : 0;
            // Tiles begin at another piece each: else all blocks would ask for the same inputs at a time.
            struct Walk {
                uint32_t tile, piece, at;
            };
            Walk rows = {first, 0, first % own}, columns = rows;
            const auto go_on = [&](Walk &walk) {
                if (++walk.at == own) walk.at = 0;
                if (++walk.piece < own) return;
                walk.piece = 0, walk.tile += blocks, walk.at = walk.tile % own;
            };
            const auto fetch_rows = [&](uint32_t stage) {
                const uint32_t to = base + stage * STAGE, x = (begin + rows.at) * PIECE;
                barrier_expect(full + stage * 8, STAGE);
#pragma unroll
                for (uint32_t i = 0; i < 2 * UNITS; i++) {
                    const uint32_t unit = rows.tile * UNITS + i / 2, half = i % 2;
                    const uint32_t row = call.kind == GATED ? unit * HALF + half * (call.rows / 2) : unit * UNIT + half * HALF;
                    const bool joined = row >= call.rows && call.more_rows > 0;
                    copy_box_passing(to + i * (HALF * PIECE * 2), joined ? more : weight, x, joined ? row - call.rows : row,
                                     full + stage * 8, passing);
                }
                go_on(rows);
            };
            const uint32_t early = min(stages, all);
            for (uint32_t i = 0; i < early; i++) fetch_rows(i);
            settle();
            uint32_t stage = 0, round = 0;
            for (uint32_t i = 0; i < all; i++) {
                if (i >= stages) {
                    barrier_wait(empty + stage * 8, (round - 1) & 1);
                    fetch_rows(stage);
                }
                const uint32_t x = (begin + columns.at) * PIECE, run = x / call.run;
                copy_box(base + stage * STAGE + WEIGHT_BYTES, input, x - run * call.run, 0, run, full + stage * 8);
                go_on(columns);
                if (++stage == stages) stage = 0, round++;
            }
        }
        __syncwarp();
        if (splits > 1) {
            cluster_arrive();
            cluster_wait();
            cluster_arrive();
            cluster_wait();
        }
        return;
    }

    settle();
    const uint32_t team = warp / 4, mine = SIXTEENS / splits, half = threadIdx.x / 128;
    // Of the block's sixteens and the groups of columns, four warps take every second pair.
    constexpr uint32_t MOST = (SIXTEENS * GROUPS + 1) / 2;
    if (call.kind != ADD) factors_of<GROUPS>(call, warp * GROUPS, factors);
    uint32_t stage = team % stages, round = team / stages, next = team;  // of the pieces of all tiles, those of the team
    for (uint32_t tile = first; tile < call.tiles; tile += blocks) {
        Added added[MOST] = {};
        if (UNITS == 1 && call.kind == ADD) {
#pragma unroll
            for (uint32_t n = 0; n < MOST; n++) {
                const uint32_t pair = half + 2 * n, sixteen = tile * SIXTEENS + rank * mine + pair / GROUPS;
                if (pair < mine * GROUPS) added[n] = ask_added(call, sixteen * ROWS + place_row(), pair % GROUPS * COLUMNS + place_column());
            }
        }
        float c[UNITS][N / 2] = {};
        uint32_t before = stages;
#pragma unroll 1
        for (; next < own; next += TEAMS) {
            barrier_wait(full + stage * 8, round & 1);
            const uint64_t a = hopper::tile(base + stage * STAGE), b = hopper::tile(base + stage * STAGE + WEIGHT_BYTES);
            wgmma_begin();
#pragma unroll
            for (uint32_t k = 0; k < PIECE / 16; k++) {
#pragma unroll
                for (uint32_t u = 0; u < UNITS; u++) wgmma<N>(c[u], a + u * (UNIT * 8) + k * 2, b + k * 2);
            }
            wgmma_commit();
            wgmma_wait<1>();
            if (before < stages && lane == 0) barrier_arrive(in_block(empty + before * 8, rank));
            before = stage;
            stage += TEAMS;
            if (stage >= stages) stage -= stages, round++;
        }
        next -= own;
        wgmma_wait<0>();
#pragma unroll
        for (uint32_t u = 0; u < UNITS; u++) wgmma_end(c[u]);
        if (before < stages && lane == 0) barrier_arrive(in_block(empty + before * 8, rank));
#pragma unroll
        for (uint32_t u = 0; u < UNITS; u++) {
            const uint32_t unit = tile * UNITS + u;
            meet();  // the sums before have been read
            float *to = sums + (team * UNIT + warp % 4 * 16 + lane / 4) * PITCH + lane % 4 * 2;
#pragma unroll
            for (uint32_t i = 0; i < N / 8; i++) {
                *reinterpret_cast<float2 *>(to + i * 8) = make_float2(c[u][4 * i], c[u][4 * i + 1]);
                *reinterpret_cast<float2 *>(to + i * 8 + 8 * PITCH) = make_float2(c[u][4 * i + 2], c[u][4 * i + 3]);
            }
            if (splits > 1) {
                __syncwarp();
                cluster_arrive();
                cluster_wait();
            } else {
                meet();
            }
#pragma unroll
            for (uint32_t n = 0; n < MOST; n++) {
                const uint32_t pair = half + 2 * n, within = rank * mine + pair / GROUPS, group = pair % GROUPS;
                if (pair >= mine * GROUPS) break;
                const float square = finish(call, unit * SIXTEENS + within, group, factors, added[n], [&](uint32_t i) {
                    // A gated tile's halves are the products' halves.
                    const uint32_t row = call.kind == GATED ? i / 8 * HALF + within * 8 + i % 8 : within * ROWS + i;
                    const float *const at = sums + row * PITCH + group * COLUMNS + place_column();
                    float sum = 0.0f;
                    if (splits == 1) {
#pragma unroll
                        for (uint32_t t = 0; t < TEAMS; t++) sum += at[t * UNIT * PITCH];
                    } else {
                        const uint32_t there = uint32_t(__cvta_generic_to_shared(at));
                        for (uint32_t r = 0; r < splits; r++) {
#pragma unroll
                            for (uint32_t t = 0; t < TEAMS; t++) sum += read(in_block(there + t * UNIT * PITCH * 4, r));
                        }
                    }
                    return sum;
                });
                if (call.kind == ADD && lane < COLUMNS) squares[pair / GROUPS * 4 + warp % 4][group * COLUMNS + lane] = square;
            }
            if (call.kind != ADD) continue;
            meet();
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
    }
    if (splits > 1) {
        __syncwarp();
        cluster_arrive();  // nobody leaves while others read what is theirs
        cluster_wait();
    }
}

}  // namespace wide

// By the columns that they have room for.
#define WIDE(COUNT)                                                                                          \
    extern "C" __global__ void __launch_bounds__(wide::THREADS, 1) wide_product_##COUNT(                        \
        Product call, const __grid_constant__ hopper::Map weight, const __grid_constant__ hopper::Map more,   \
        const __grid_constant__ hopper::Map input) {                                                          \
        wide::product<COUNT / COLUMNS, 1>(call, &weight, &more, &input);                                      \
    }

WIDE(8)
WIDE(16)
WIDE(32)
WIDE(64)
