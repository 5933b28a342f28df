// Scores of an MLP on Hopper, by clusters, the copy engine and wgmma; see scores.cuh.

#include "scores.cuh"

#include "hopper.cuh"

#include <type_traits>

namespace scores {

using namespace hopper;

// Hopper starts a kernel while the one before still runs. What that one writes may be read only after `settle`, and what
// it reads be written only then.
__device__ void settle() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ void start_next() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// An MLP for few tokens: a cluster of 8 blocks has 32 units and 8 * TILES tokens, and shares the columns. Weights are on
// their way before the kernel before has ended. Sums meet by warp, then by block, in order; then each block goes on with
// 8 tokens, if there are as many.
constexpr uint32_t SHORT_UNITS = 32;
constexpr uint32_t SHORT_BLOCKS = 8;
constexpr uint32_t SHORT_PITCH = 36;

template <int TILES>
__device__ void few(const Scores &call) {
    constexpr uint32_t TOKENS = TILES * 8;
    extern __shared__ __align__(128) float shared_floats[];
    float *sums = shared_floats;                            // [TOKENS][SHORT_PITCH]: the block's
    float *theirs = shared_floats + TOKENS * SHORT_PITCH;   // [TEAM][TOKENS][SHORT_PITCH]: the warps'
    const uint32_t lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, g = lane / 4, c = lane % 4;
    const uint32_t share = blockIdx.x / SHORT_BLOCKS, shares = gridDim.x / SHORT_BLOCKS;
    const uint32_t first_unit = share * SHORT_UNITS;
    start_next();

    uint32_t k = (cluster_rank() * TEAM + warp) * 64;
    uint4 a[4][2] = {};
    auto load_weights = [&]() {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint32_t row = min(first_unit + g + 8 * i, call.width - 1);
            const bf16 *from = call.first + uint64_t(row) * call.dim + c * 8 + k;
#pragma unroll
            for (int j = 0; j < 2; j++) a[i][j] = __ldg(reinterpret_cast<const uint4 *>(from + j * 32));
        }
    };
    if (k < call.dim) load_weights();
    settle();
    float c_sums[TILES][2][4] = {};
    uint32_t row = g;
    while (k < call.dim) {
#pragma unroll
        for (int t = 0; t < TILES; t++) {
            // Registers for all loads at once there are none.
            if (t % 2 == 0) asm volatile("" : "+r"(row));  // where rows lie is not known early either
            const uint32_t token = min(row + t * 8, call.tokens - 1);
            const bf16 *hidden = call.hidden + token * call.stride + k + c * 8;
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const uint4 x = *reinterpret_cast<const uint4 *>(hidden + j * 32);
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const uint4 &low = a[2 * i][j], &high = a[2 * i + 1][j];
                    multiply(c_sums[t][i], low.x, high.x, low.y, high.y, x.x, x.y);
                    multiply(c_sums[t][i], low.z, high.z, low.w, high.w, x.z, x.w);
                }
            }
        }
        k += SHORT_BLOCKS * TEAM * 64;
        if (k < call.dim) load_weights();
    }
#pragma unroll
    for (int t = 0; t < TILES; t++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float *to = theirs + (warp * TOKENS + t * 8 + c * 2) * SHORT_PITCH + i * 16 + g;
            to[0] = c_sums[t][i][0], to[SHORT_PITCH] = c_sums[t][i][1];
            to[8] = c_sums[t][i][2], to[SHORT_PITCH + 8] = c_sums[t][i][3];
        }
    }
    __syncthreads();
#pragma unroll
    for (uint32_t i = 0; i < TILES; i++) {
        const uint32_t t = i * TEAM + warp;
        float x = 0.0f;
#pragma unroll
        for (int w = 0; w < TEAM; w++) x += theirs[(w * TOKENS + t) * SHORT_PITCH + lane];
        sums[t * SHORT_PITCH + lane] = x;
    }
    cluster_arrive();
    // What the second layer wants is fetched while the others come.
    const uint32_t rank = cluster_rank(), unit = first_unit + lane, token = rank * 8 + warp;
    const bool is = unit < call.width;
    const float bias = is ? call.first_bias[unit] : 0.0f;
    float weights[GROUP];
    auto load_second = [&](uint32_t group) {
#pragma unroll
        for (int i = 0; i < GROUP; i++) {
            weights[i] = is ? __bfloat162float(call.second[uint64_t(group + i) * call.pitch + unit]) : 0.0f;
        }
    };
    load_second(0);
    cluster_wait();

    const uint32_t bytes = call.words * 4;
    auto *bits = reinterpret_cast<uint8_t *>(call.bits);
    const bool busy = rank * 8 < call.tokens;
    float x = 0.0f;
    if (busy) {
#pragma unroll
        for (uint32_t r = 0; r < SHORT_BLOCKS; r++) {
            x += read(in_block(shared_address(sums + token * SHORT_PITCH + lane), r));
        }
    }
    cluster_arrive();  // nothing of the others is read any more
    if (busy) {
        x = is ? activate(call, x, bias) : 0.0f;
        float mine = 0.0f;
        for (uint32_t group = 0; group < call.heads; group += GROUP) {
            if (group) load_second(group);
#pragma unroll
            for (int i = 0; i < GROUP; i++) {
                const float sum = warp_sum(x * weights[i]);
                if (lane == group + i) mine = sum;
            }
        }
        // [8 blocks][shares][8 tokens][heads]
        float *parts = call.parts + uint64_t(rank) * shares * 8 * call.heads;
        if (lane < call.heads) leave(parts + (share * 8 + warp) * call.heads + lane, {mine});
        if (share == shares - 1) {
            const uint32_t t = threadIdx.x % 8, head = threadIdx.x / 8;
            float sum = 0.0f;
            if (head < call.heads) sum = collect<16>(parts + t * call.heads + head, shares, 8 * call.heads);
            const bool drop = head < call.heads && rank * 8 + t < call.tokens && drops(call, head, rank * 8 + t, sum);
            const uint32_t four = __ballot_sync(~0u, drop);
            if (t == 0 && head < call.heads) bits[uint64_t(head) * bytes + rank] = uint8_t(four >> lane);
        }
    } else if (share == 0 && threadIdx.x < call.heads && rank < bytes) {
        bits[uint64_t(threadIdx.x) * bytes + rank] = 0;
    }
    __syncwarp();
    cluster_wait();
}

// An MLP for more tokens: a block has ROWS of them, a multiple of 64, and N * BOXES units. The copy engine fills a pipeline of
// tiles of 64 columns; four warps multiply 64 tokens, a ninth fetches. `COLUMNS` blocks of a cluster have the same tokens and
// fetch a part of them for each other, since what the L2 can deliver is what bounds this; `SHARERS` have the same tokens and
// units and share the columns, where there would be too few blocks. Then each sharer goes on with its part of the tokens: sums
// meet in the order of the sharers, products of the second layer in the order of the units, within the cluster and then,
// where it has not all units, through memory.
//
// The grid is [tiles of tokens, a cluster each][clusters of all units].

// Registers go from the warps that fetch to those that multiply, where those want more than an equal share.
template <uint32_t COUNT>
__device__ void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT)); }
template <uint32_t COUNT>
__device__ void leave_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT)); }

__device__ float2 read_pair(uint32_t there) {
    float2 x;
    asm volatile("ld.shared::cluster.v2.f32 {%0,%1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(there));
    return x;
}

// Sums over all lanes of as many numbers as each has, of which COUNT are left: lane i gets that of x[i * COUNT / 32].
template <int COUNT, int MASK = LANES / 2>
__device__ float sum_each(float *x) {
    if constexpr (COUNT > 1) {
        const bool upper = threadIdx.x & MASK;
#pragma unroll
        for (int i = 0; i < COUNT / 2; i++) {
            const float mine = upper ? x[i + COUNT / 2] : x[i], other = upper ? x[i] : x[i + COUNT / 2];
            x[i] = mine + __shfl_xor_sync(~0u, other, MASK);
        }
    } else {
        x[0] += __shfl_xor_sync(~0u, x[0], MASK);
    }
    if constexpr (MASK > 1) return sum_each<COUNT / 2 + COUNT % 2, MASK / 2>(x);
    return x[0];
}

// The threads that multiply and decide meet; those that fetch need not, and stand elsewhere.
__device__ void meet() { asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory"); }

template <int N, int BOXES, int COLUMNS, int SHARERS, int ROWS>
__device__ void many(const Scores &call, const Map *hidden, const Map *first) {
    constexpr uint32_t UNITS = N * BOXES, HIDDEN_BYTES = ROWS * 128, STAGE = HIDDEN_BYTES + UNITS * 128;
    constexpr uint32_t PITCH = (UNITS + 31) / 32 * 32 + 8, TOKENS = ROWS / SHARERS, DECIDED = TOKENS / COLUMNS;
    constexpr uint32_t WARPS = ROWS / 64 * 4;  // that multiply
    extern __shared__ __align__(1024) unsigned char shared[];
    float *products = reinterpret_cast<float *>(shared) + ROWS * PITCH;  // [TOKENS][heads], behind [ROWS][PITCH] sums, over the tiles
    const uint32_t base = shared_address(shared), stages = call.stages, full = base + stages * STAGE, empty = full + stages * 8;
    const uint32_t lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    const uint32_t rank = cluster_rank(), column = rank % COLUMNS, sharer = rank / COLUMNS;
    const uint32_t first_unit = (blockIdx.y * COLUMNS + column) * UNITS, first_token = blockIdx.x / (COLUMNS * SHARERS) * ROWS;
    const uint32_t steps = (call.dim + 63) / 64, from = steps * sharer / SHARERS, count = steps * (sharer + 1) / SHARERS - from;
    start_next();
    auto fetch_weights = [&](uint32_t i, uint32_t stage) {
        barrier_expect(full + stage * 8, STAGE);
#pragma unroll
        for (int box = 0; box < BOXES; box++) {
            copy_box(base + stage * STAGE + HIDDEN_BYTES + box * N * 128, first, (from + i) * 64, first_unit + box * N, full + stage * 8);
        }
    };
    const bool fetches = threadIdx.x == THREADS;
    if (fetches) {
        for (uint32_t i = 0; i < stages; i++) {
            barrier_init(full + i * 8, 1);
            barrier_init(empty + i * 8, COLUMNS * WARPS);
        }
        barriers_ready();
        // Weights wait neither for the kernel before nor for the cluster.
        for (uint32_t i = 0; i < min(stages, count); i++) fetch_weights(i, i);
    }
    __syncwarp();
    if constexpr (COLUMNS > 1) {
        cluster_arrive();
        cluster_wait();
    } else {
        __syncthreads();  // what a sharer has is read only once all have met
    }

    if (warp >= TEAM) {
        if constexpr (BOXES > 1) leave_registers<24>();
        if (fetches) {
            settle();
            uint32_t stage = 0, round = 0;
            for (uint32_t i = 0; i < count; i++) {
                if (round > 0) {
                    barrier_wait(empty + stage * 8, (round - 1) & 1);
                    fetch_weights(i, stage);
                }
                const uint32_t to = base + stage * STAGE + column * (HIDDEN_BYTES / COLUMNS), token = first_token + column * (ROWS / COLUMNS);
                if constexpr (COLUMNS > 1) {
                    copy_box_to(to, hidden, (from + i) * 64, token, full + stage * 8, ((1 << COLUMNS) - 1) << sharer * COLUMNS);
                } else {
                    copy_box(to, hidden, (from + i) * 64, token, full + stage * 8);
                }
                if (++stage == stages) stage = 0, round++;
            }
        }
        __syncwarp();
        // As the clusters of the others meet below.
        cluster_arrive();
        cluster_wait();
        cluster_arrive();
        cluster_wait();
        return;
    }
    if constexpr (BOXES > 1) take_registers<240>();
    settle();
    float sums[BOXES][N / 2] = {};
    const bool multiplies = WARPS == TEAM || warp < WARPS;
    if (multiplies) {
        uint32_t stage = 0, round = 0, before = 0;
#pragma unroll 1
        for (uint32_t i = 0; i < count; i++) {
            barrier_wait(full + stage * 8, round & 1);
            const uint64_t a = tile(base + stage * STAGE + warp / 4 * 64 * 128);
            const uint64_t b = tile(base + stage * STAGE + HIDDEN_BYTES);
            wgmma_begin();
#pragma unroll
            for (int k = 0; k < 4; k++) {
#pragma unroll
                for (int box = 0; box < BOXES; box++) wgmma<N>(sums[box], a + k * 2, b + box * N * 8 + k * 2);
            }
            wgmma_commit();
            wgmma_wait<1>();
            // The warp's word that a stage is free, to all blocks that write into it.
            if (i > 0 && lane < COLUMNS) barrier_arrive(in_block(empty + before * 8, sharer * COLUMNS + lane));
            before = stage;
            if (++stage == stages) stage = 0, round++;
        }
        wgmma_wait<0>();
#pragma unroll
        for (int box = 0; box < BOXES; box++) wgmma_end(sums[box]);
    }
    meet();  // all tiles have come and been read
    if (multiplies) {
        float *to = reinterpret_cast<float *>(shared) + (warp * 16 + lane / 4) * PITCH + lane % 4 * 2;
#pragma unroll
        for (int box = 0; box < BOXES; box++) {
#pragma unroll
            for (int i = 0; i < N / 8; i++) {
                const float *four = sums[box] + 4 * i;
                *reinterpret_cast<float2 *>(to + box * N + i * 8) = make_float2(four[0], four[1]);
                *reinterpret_cast<float2 *>(to + box * N + i * 8 + 8 * PITCH) = make_float2(four[2], four[3]);
            }
        }
    }
    // A lane's units are a pair in every 64. What the second layer wants is fetched while the others come.
    constexpr uint32_t PAIRS = (UNITS + 63) / 64;
    float2 bias[PAIRS], weights[PAIRS][GROUP];
    auto is = [&](uint32_t i) {
        return (UNITS % 64 == 0 || lane * 2 + i * 64 < UNITS) && first_unit + lane * 2 + i * 64 < call.width;
    };
    auto load_second = [&](uint32_t group) {
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            const uint32_t unit = first_unit + lane * 2 + i * 64;
            if (group == 0) bias[i] = is(i) ? *reinterpret_cast<const float2 *>(call.first_bias + unit) : float2{};
#pragma unroll
            for (int head = 0; head < GROUP; head++) {
                const bf16 *two = call.second + uint64_t(group + head) * call.pitch + unit;
                const uint32_t pair = is(i) ? *reinterpret_cast<const uint32_t *>(two) : 0;
                weights[i][head] = make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
            }
        }
    };
    if constexpr (SHARERS > 1) {
        cluster_arrive();
        load_second(0);
        cluster_wait();
    } else {
        load_second(0);
        meet();
    }
    const uint32_t own_token = first_token + sharer * TOKENS;
    const uint32_t all = (call.heads * DECIDED + LANES - 1) / LANES * LANES, decided_from = column * DECIDED;
    // Products that other blocks add to: [clusters of units][heads][DECIDED].
    float *parts = call.parts + uint64_t(blockIdx.x) * gridDim.y * all, *own_part = parts + blockIdx.y * all;
    // The last cluster of a tile decides. It waits for the others, which wait for nobody, so there is always room for them.
    const bool decides = blockIdx.y == gridDim.y - 1;
    // A warp has several tokens at once, since what it waits for is longer than what it computes.
    constexpr uint32_t TOGETHER = TOKENS / TEAM < 4 ? TOKENS / TEAM : 4;
    auto second_layer = [&](uint32_t group, auto torch) {
#pragma unroll 1
        for (uint32_t t = warp * TOGETHER; t < TOKENS; t += TEAM * TOGETHER) {
            float product[TOGETHER * GROUP] = {};
            const uint32_t at = (sharer * TOKENS + t) * PITCH + lane * 2;
#pragma unroll
            for (uint32_t i = 0; i < PAIRS; i++) {
                if (!is(i)) continue;
                float2 x[TOGETHER] = {};
#pragma unroll
                for (uint32_t j = 0; j < TOGETHER; j++) {
                    const uint32_t here = at + j * PITCH + i * 64;
                    if constexpr (SHARERS == 1) {
                        x[j] = *reinterpret_cast<const float2 *>(reinterpret_cast<const float *>(shared) + here);
                    } else {
#pragma unroll
                        for (uint32_t other = 0; other < SHARERS; other++) {
                            const float2 theirs = read_pair(in_block(base + here * 4, other));
                            x[j].x += theirs.x, x[j].y += theirs.y;
                        }
                    }
                }
#pragma unroll
                for (uint32_t j = 0; j < TOGETHER; j++) {
                    const float a = activate<decltype(torch)::value>(x[j].x, bias[i].x);
                    const float b = activate<decltype(torch)::value>(x[j].y, bias[i].y);
#pragma unroll
                    for (int head = 0; head < GROUP; head++) {
                        product[j * GROUP + head] += a * weights[i][head].x + b * weights[i][head].y;
                    }
                }
            }
            const float sum = sum_each<TOGETHER * GROUP>(product);
            const uint32_t which = lane * TOGETHER * GROUP / LANES, head = group + which % GROUP;
            if (lane % (LANES / TOGETHER / GROUP) == 0 && head < call.heads) {
                const uint32_t token = t + which / GROUP;
                if (COLUMNS > 1 || decides) products[token * call.heads + head] = sum;
                else leave(own_part + head * DECIDED + token, {sum});
            }
        }
    };
    for (uint32_t group = 0; group < call.heads; group += GROUP) {
        if (group > 0) load_second(group);
        if (call.torch) {
            second_layer(group, std::true_type());
        } else {
            second_layer(group, std::false_type());
        }
    }
    // Now of each head and token; a block of a column decides on its part of the tokens.
    __syncwarp();
    cluster_arrive();
    if constexpr (SHARERS == 1) {
        cluster_wait();
    } else {
        static_assert(COLUMNS == 1, "a third meeting");
        if (decides) meet();
    }
    auto product_of = [&](uint32_t head, uint32_t t) {
        float sum = 0.0f;
#pragma unroll
        for (uint32_t c = 0; c < COLUMNS; c++) {
            const uint32_t at = shared_address(products + (decided_from + t) * call.heads + head);
            sum += COLUMNS > 1 ? read(in_block(at, c)) : products[(decided_from + t) * call.heads + head];
        }
        return sum;
    };
    if (COLUMNS > 1 && !decides) {
        for (uint32_t i = threadIdx.x; i < call.heads * DECIDED; i += THREADS) {
            leave(own_part + i, {product_of(i / DECIDED, i % DECIDED)});
        }
    }
    if (decides) {
        for (uint32_t i = threadIdx.x; i < all; i += THREADS) {
            const uint32_t head = i / DECIDED, token = own_token + decided_from + i % DECIDED;
            const bool here = head < call.heads && token < call.tokens;
            float sum = 0.0f;
            if (head < call.heads) sum = collect<4>(parts + i, blockIdx.y, all) + product_of(head, i % DECIDED);
            const uint32_t found = __ballot_sync(~0u, here && drops(call, head, token, sum));
            if (head >= call.heads || token / 32 >= call.words) continue;
            uint32_t *words = call.bits + uint64_t(head) * call.words;
            if constexpr (DECIDED == 8) {
                if (lane % 8 == 0) reinterpret_cast<uint8_t *>(words)[token / 8] = uint8_t(found >> lane);
            } else if constexpr (DECIDED == 16) {
                if (lane % 16 == 0) reinterpret_cast<uint16_t *>(words)[token / 16] = uint16_t(found >> lane);
            } else {
                if (lane == 0) words[token / 32] = found;
            }
        }
    }
    // Nobody leaves while others read what is theirs.
    __syncwarp();
    if constexpr (SHARERS == 1) cluster_arrive();
    cluster_wait();
}

}  // namespace scores

using namespace scores;

// Two blocks must fit a multiprocessor, or the next kernel can't start while this one ends.
#define SCORES_FEW(NAME, TILES)                                                                               \
    extern "C" __global__ void __cluster_dims__(8, 1, 1) __launch_bounds__(THREADS, 2) scores_few_##NAME(Scores call) { \
        few<TILES>(call);                                                                                     \
    }
SCORES_FEW(8, 1)
SCORES_FEW(32, 4)

// Named by the units of a block, how many have its tokens, and how many share its columns. Mirrored in src/cuda/driver/scores.rs.
#define SCORES_MANY(NAME, N, BOXES, COLUMNS, SHARERS, ROWS)                                                      \
    extern "C" __global__ void __cluster_dims__(COLUMNS * SHARERS, 1, 1)                                        \
        __launch_bounds__(THREADS + (BOXES > 1 ? 128 : LANES), 1) scores_many_##NAME(                           \
            Scores call, const __grid_constant__ Map hidden, const __grid_constant__ Map first) {                \
        many<N, BOXES, COLUMNS, SHARERS, ROWS>(call, &hidden, &first);                                           \
    }
SCORES_MANY(64_1_8, 64, 1, 1, 8, 64)
SCORES_MANY(128_1_8, 128, 1, 1, 8, 128)
SCORES_MANY(128_1_4, 128, 1, 1, 4, 128)
SCORES_MANY(176_1_4, 176, 1, 1, 4, 128)
SCORES_MANY(216_1_4, 216, 1, 1, 4, 128)
SCORES_MANY(128_1_2, 128, 1, 1, 2, 128)
SCORES_MANY(160_1_2, 160, 1, 1, 2, 128)
SCORES_MANY(128_2_1, 128, 1, 2, 1, 128)
SCORES_MANY(160_2_1, 160, 1, 2, 1, 128)
SCORES_MANY(256_2_1, 256, 1, 2, 1, 128)
SCORES_MANY(320_2_1, 160, 2, 2, 1, 128)
SCORES_MANY(256_4_1, 256, 1, 4, 1, 128)
