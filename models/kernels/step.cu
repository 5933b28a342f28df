// What a decode step does besides attention, for a few new tokens, the columns: every kernel here reads weights once and is
// as fast as memory. Mirrored in src/card/driver.rs.
//
// A product's tile is 16 rows of a weight for all columns. Eight warps share its inner dimension and meet in shared memory,
// so what a column gets is the same whatever its neighbours and however many they are. A multiprocessor has one block, which
// goes from tile to tile, each warp with a ring of asynchronous copies of its own that runs on over their ends, so deep that
// memory is busy while the warps meet. Weights are asked for before the kernel before has ended: a ring leaves room for a block
// of attention beside it. They pass through the second-level cache as what goes first, so that what is read again stays. Columns
// are the rows of mma.sync, and the order of the inner dimension is free as long as both sides have the same, so a lane takes
// eight neighbouring elements where the instruction's own order would give it pairs.
//
// A norm's factor is one number a column, so it is applied to the sums: what adds to the residual stream also leaves the
// stream times the next norm's weight, and each tile's sum of squares.

#include <cuda_bf16.h>

#include <cstdint>

#include "launch.cuh"
#include "rank.cuh"

namespace step {

constexpr int LANES = 32;
constexpr int WARPS = 8;
constexpr int THREADS = WARPS * LANES;
constexpr int ROWS = 16;     // of a tile, or of each half of a tall one
constexpr int COLUMNS = 8;   // of a group
constexpr int PARTS = 4;     // of a column's squares that a tile, or a token, brings: a warp each
constexpr int CHUNK = 32;   // of the inner dimension: eight elements for each lane of four

using bf16 = __nv_bfloat16;

// c += a * b: 16 columns, a, and 8 rows of a weight, b.
__device__ void multiply(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

}  // namespace step

using namespace step;

// What becomes of the sums.
enum Kind : uint32_t {
    STORE,  // out: bf16 [columns][rows + more], times the norm's factor, with bias
    GATED,  // out: bf16 [columns][rows / 2] = silu(first half) * second half, times the norm's factor
    ADD,    // residual += sums + bias; and what the next norm needs
    SCORE,  // out: f32 [columns][rows], times the norm's factor; and the best of each column
};

struct Product {
    const bf16 *weight;     // [rows][inner]
    const bf16 *more;       // [more_rows][inner], rows that follow; or null
    const bf16 *bias;       // [rows], or null
    const bf16 *more_bias;  // [more_rows], or null
    const bf16 *input;      // element i of column c: i / run * run_stride + c * column_stride + i % run
    const float *squares;   // [columns][parts]: of the inputs before their norm; null where there is none
    void *out;
    float *residual;        // [columns][rows]
    const bf16 *norm;       // [rows]: the next norm's weight
    bf16 *normed;           // [columns][rows]: residual * norm
    float *next_squares;    // [columns][next_parts]
    unsigned long long *best;  // [columns]
    uint32_t tiles;
    uint32_t rows;
    uint32_t more_rows;
    uint32_t inner;
    uint32_t columns;
    uint32_t run;
    uint32_t run_stride;
    uint32_t column_stride;
    uint32_t parts;
    uint32_t vocabulary;  // tokens below it may be the best
    float epsilon;
    uint32_t stages;  // of a ring
    uint32_t kind;
    uint32_t next_parts;   // PARTS for each 16 rows
    uint32_t run_inverse;  // 2^32 / run, rounded up
    uint32_t unused;

    __device__ uint32_t row(uint32_t tile, uint32_t i) const {
        // A tile of a gated product is eight rows of each half.
        if (kind == GATED) return tile * (ROWS / 2) + i % 8 + (i < 8 ? 0 : rows / 2);
        return tile * ROWS + i;
    }
};

// The factor of a column's norm, by a warp.
__device__ float factor(const Product &call, uint32_t column) {
    const float4 *parts = reinterpret_cast<const float4 *>(call.squares + column * call.parts);
    float sum = 0.0f;
#pragma unroll 8
    for (uint32_t i = threadIdx.x % LANES; i < call.parts / PARTS; i += LANES) {
        const float4 part = parts[i];
        sum += (part.x + part.y) + (part.z + part.w);
    }
    return rsqrtf(warp_sum(sum) / float(call.inner) + call.epsilon);
}

// 32 elements of the inner dimension of each group's columns, a lane its eight.
template <int GROUPS>
__device__ void columns_of(const Product &call, uint32_t inner, uint4 (&a)[GROUPS]) {
    const uint32_t lane = threadIdx.x % LANES, at = inner + lane % 4 * 8, run = __umulhi(at, call.run_inverse);
    const bf16 *from = call.input + run * call.run_stride + at - run * call.run;
#pragma unroll
    for (int g = 0; g < GROUPS; g++) {
        const uint32_t column = g * COLUMNS + lane / 4;
        const bool there = at < call.inner && column < call.columns;
        a[g] = there ? *reinterpret_cast<const uint4 *>(from + column * call.column_stride) : make_uint4(0, 0, 0, 0);
    }
}

// What a thread adds to its rows, on its way while the tile is multiplied. A thread a row and column; four warps take a group
// of columns, and every second one.
template <int GROUPS>
struct Added {
    float residual[(GROUPS + 1) / 2];
    float bias;
    float norm;
};

template <int GROUPS>
__device__ void ask_added(const Product &call, uint32_t tile, Added<GROUPS> &added) {
    const uint32_t row = tile * ROWS + threadIdx.x % 128 / COLUMNS;
    if (row >= call.rows) return;
    added.bias = call.bias ? __bfloat162float(call.bias[row]) : 0.0f;
    added.norm = __bfloat162float(call.norm[row]);
#pragma unroll
    for (int i = 0; i < (GROUPS + 1) / 2; i++) {
        const uint32_t g = threadIdx.x / 128 + 2 * i, column = g * COLUMNS + threadIdx.x % COLUMNS;
        if (g < GROUPS && column < call.columns) added.residual[i] = call.residual[uint64_t(column) * call.rows + row];
    }
}

// What becomes of a tile's sums.
template <int GROUPS>
__device__ void finish(const Product &call, uint32_t tile, const float *sums, const float *factors,
                       const Added<GROUPS> &added) {
    const uint32_t warp = threadIdx.x / LANES, lane = threadIdx.x % LANES, total = call.rows + call.more_rows;
    const uint32_t i = threadIdx.x % 128 / COLUMNS, within = threadIdx.x % COLUMNS, row = call.row(tile, i);
#pragma unroll
    for (int n = 0; n < (GROUPS + 1) / 2; n++) {
        const uint32_t g = threadIdx.x / 128 + 2 * n;
        if (g >= GROUPS) break;
        const uint32_t column = g * COLUMNS + within;
        const bool there = row < total && column < call.columns;
        const auto sum_of = [&](uint32_t i) {
            float sum = 0.0f;
#pragma unroll
            for (int w = 0; w < WARPS; w++) sum += sums[(w * ROWS + i) * GROUPS * COLUMNS + column];
            return sum;
        };
        if (call.kind == GATED) {
            if (i >= 8 || column >= call.columns || row >= call.rows / 2) continue;
            const float gate = sum_of(i) * factors[column], up = sum_of(i + 8) * factors[column];
            static_cast<bf16 *>(call.out)[uint64_t(column) * (call.rows / 2) + row] =
                __float2bfloat16(gate / (1.0f + __expf(-gate)) * up);
            continue;
        }
        float sum = sum_of(i);
        if (call.kind == STORE) {
            if (!there) continue;
            sum *= factors[column];
            if (row < call.rows) sum += call.bias ? __bfloat162float(call.bias[row]) : 0.0f;
            else sum += call.more_bias ? __bfloat162float(call.more_bias[row - call.rows]) : 0.0f;
            static_cast<bf16 *>(call.out)[uint64_t(column) * total + row] = __float2bfloat16(sum);
        } else if (call.kind == SCORE) {
            if (there) static_cast<float *>(call.out)[uint64_t(column) * total + row] = sum *= factors[column];
            unsigned long long best = there && row < call.vocabulary ? ranked(sum, row) : 0;
            best = max(best, __shfl_xor_sync(~0u, best, 8));
            best = max(best, __shfl_xor_sync(~0u, best, 16));
            // Most tiles see at a glance that another was better.
            if (lane < 8 && column < call.columns && best > *(volatile unsigned long long *)(call.best + column))
                atomicMax(call.best + column, best);
        } else {
            float square = 0.0f;
            if (there) {
                const uint64_t at = uint64_t(column) * call.rows + row;
                sum += added.residual[n] + added.bias;
                call.residual[at] = sum;
                call.normed[at] = __float2bfloat16(sum * added.norm);
                square = sum * sum;
            }
            square += __shfl_xor_sync(~0u, square, 8);
            square += __shfl_xor_sync(~0u, square, 16);
            if (lane < 8 && column < call.columns && tile * PARTS < call.next_parts)
                call.next_squares[column * call.next_parts + tile * PARTS + warp % 4] = square;
        }
    }
}

// With more columns the inputs, which lie in the second-level cache, would take longer than the weights. Tiles are then twice
// as tall, and stages half as long.
template <int GROUPS>
constexpr int TALL = GROUPS > 2 ? 2 : 1;

// A warp's part of the ring: stages of a tile's rows times a piece of the inner dimension, whose 16 bytes lie so that no two
// lanes that read at once meet in a bank.
constexpr int STRETCH = 128;  // of the inner dimension: what warps have whole ones of
template <int GROUPS>
constexpr int PIECE = STRETCH / TALL<GROUPS>;
constexpr int STAGE_BYTES = ROWS * STRETCH * 2;    // of a warp
constexpr int LINES = STAGE_BYTES / (16 * LANES);  // copies of a lane for a stage

template <int GROUPS>
__device__ uint32_t place_of(uint32_t row, uint32_t sixteenth) {
    return row * (PIECE<GROUPS> * 2) + (sixteenth ^ (row & 1) << 2) * 16;
}

// Waits for the oldest of as many stages as are under way.
__device__ void await(uint32_t stages) {
    switch (stages) {
    case 2: asm volatile("cp.async.wait_group 1;" ::: "memory"); break;
    case 3: asm volatile("cp.async.wait_group 2;" ::: "memory"); break;
    case 4: asm volatile("cp.async.wait_group 3;" ::: "memory"); break;
    case 5: asm volatile("cp.async.wait_group 4;" ::: "memory"); break;
    default: asm volatile("cp.async.wait_group 5;" ::: "memory"); break;
    }
}

// Inputs of DEPTH pieces are asked for early: behind a ring that asks for all that memory gives they take as long as it does.
// With few columns that gains nothing.
template <int GROUPS, int DEPTH>
__device__ void product(const Product &call) {
    constexpr int SETS = DEPTH > 0 ? DEPTH : 1;
    constexpr int PIECE = ::PIECE<GROUPS>, TALL = ::TALL<GROUPS>, SUMS = WARPS * ROWS * GROUPS * COLUMNS;
    constexpr int ROW_LANES = PIECE / 8, LINE_ROWS = LANES / ROW_LANES;  // a copy of all lanes is of so many rows
    constexpr int EIGHTS = 2 * TALL, EIGHT_LINES = LINES / EIGHTS;       // rows of a tile, eight by eight
    extern __shared__ __align__(128) char shared[];
    // [2][warp][row][column]: of one tile and the next, or of a tall one's halves
    float *const sums = reinterpret_cast<float *>(shared + call.stages * WARPS * STAGE_BYTES);
    __shared__ float factors[GROUPS * COLUMNS];
    const uint32_t warp = threadIdx.x / LANES, lane = threadIdx.x % LANES, quad = lane % 4;
    const uint32_t total = call.rows + call.more_rows, inner = call.inner, stretches = (inner + STRETCH - 1) / STRETCH;
    // The warp's pieces of the inner dimension.
    const uint32_t first = warp * stretches / WARPS * TALL, own = (warp + 1) * stretches / WARPS * TALL - first;
    const uint32_t ring = uint32_t(__cvta_generic_to_shared(shared)) + warp * call.stages * STAGE_BYTES;
    start_next();
    uint64_t passing;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(passing));

    // What is asked for next: it runs ahead of what is multiplied, over the ends of tiles too.
    uint32_t asked_tile = blockIdx.x, asked = 0, asked_stage = 0;
    const char *from[EIGHTS];  // where rows begin, each eight of which lie in one matrix
    uint32_t there = 0;        // bits of the lines whose row exists
    const auto begin_tile = [&]() {
        there = 0;
#pragma unroll
        for (int e = 0; e < EIGHTS; e++) {
            const uint32_t row = call.row(asked_tile * TALL + e / 2, e % 2 * 8 + lane / ROW_LANES);
            const bool more = row >= call.rows;
            from[e] = reinterpret_cast<const char *>((more ? call.more : call.weight) + uint64_t(more ? row - call.rows : row) * inner);
#pragma unroll
            for (int i = 0; i < EIGHT_LINES; i++) there |= uint32_t(row + i * LINE_ROWS < total) << (e * EIGHT_LINES + i);
        }
    };
    const auto ask = [&]() {
        if (asked_tile < call.tiles && own > 0) {
            if (asked == 0) begin_tile();
            const uint32_t at = (first + asked) * PIECE + lane % ROW_LANES * 8;
            const uint32_t to = ring + asked_stage * STAGE_BYTES + place_of<GROUPS>(lane / ROW_LANES, lane % ROW_LANES);
            const uint32_t here = at < inner ? there : 0;  // past the last row and the last element are zeros
#pragma unroll
            for (int i = 0; i < LINES; i++) {
                const char *line = from[i / EIGHT_LINES] + uint64_t(i % EIGHT_LINES * LINE_ROWS * 2) * inner + at * 2;
                const bool exists = here >> i & 1;
                asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::256B [%0], [%1], 16, %2, %3;" ::"r"(to + i * 16 * LANES),
                             "l"(exists ? line : reinterpret_cast<const char *>(call.weight)), "r"(exists ? 16 : 0), "l"(passing)
                             : "memory");
            }
            if (++asked == own) asked = 0, asked_tile += gridDim.x;
            if (++asked_stage == call.stages) asked_stage = 0;
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    };
    for (uint32_t i = 0; i < call.stages; i++) ask();
    settle();

    uint4 a[SETS][PIECE / CHUNK][GROUPS];
    const auto ask_inputs = [&](int set, int j, uint32_t piece) {
        columns_of<GROUPS>(call, (first + piece) * PIECE + j * CHUNK, a[set][j]);
    };
#pragma unroll
    for (int set = 0; set < DEPTH; set++) {
#pragma unroll
        for (int j = 0; j < PIECE / CHUNK; j++) ask_inputs(set, j, set);
    }
    uint32_t stage = 0, turn = 0;
    for (uint32_t tile = blockIdx.x; tile < call.tiles; tile += gridDim.x) {
        Added<GROUPS> added = {};
        if (call.kind == ADD && TALL == 1) ask_added(call, tile, added);
        float c[(GROUPS + 1) / 2][EIGHTS][4] = {};
        for (uint32_t begin = 0; begin < own; begin += SETS) {
#pragma unroll
            for (int set = 0; set < SETS; set++) {
                const uint32_t piece = begin + set;
                if (set > 0 && piece == own) break;
                const uint32_t later = piece + DEPTH < own ? piece + DEPTH : set;  // of this tile, or of the next
                if constexpr (DEPTH == 0) {
#pragma unroll
                    for (int j = 0; j < PIECE / CHUNK; j++) ask_inputs(set, j, piece);
                }
                await(call.stages);
                __syncwarp();
#pragma unroll
                for (int j = 0; j < PIECE / CHUNK; j++) {
#pragma unroll
                    for (int e = 0; e < EIGHTS; e++) {
                        uint4 b;
                        const uint32_t place = ring + stage * STAGE_BYTES + place_of<GROUPS>(e * 8 + lane / 4, j * 4 + quad);
                        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                                     : "=r"(b.x), "=r"(b.y), "=r"(b.z), "=r"(b.w) : "r"(place) : "memory");
#pragma unroll
                        for (int g = 0; g < GROUPS; g += 2) {
                            const uint4 none = make_uint4(0, 0, 0, 0), x = a[set][j][g], y = g + 1 < GROUPS ? a[set][j][g + 1] : none;
                            multiply(c[g / 2][e], x.x, y.x, x.y, y.y, b.x, b.y);
                            multiply(c[g / 2][e], x.z, y.z, x.w, y.w, b.z, b.w);
                        }
                    }
                    if constexpr (DEPTH > 0) ask_inputs(set, j, later);
                }
                __syncwarp();
                ask();
                if (++stage == call.stages) stage = 0;
            }
        }
        float *const mine = sums + turn * SUMS;
        if (TALL == 1) turn ^= 1;
        else __syncthreads();  // the sums before have been read
#pragma unroll
        for (int g = 0; g < GROUPS; g++) {
#pragma unroll
            for (int i = 0; i < 2 * EIGHTS; i++) {
                const uint32_t row = i / 2 % 2 * 8 + quad * 2 + i % 2, column = g * COLUMNS + lane / 4;
                mine[i / 4 * SUMS + (warp * ROWS + row) * GROUPS * COLUMNS + column] = c[g / 2][i / 2][g % 2 * 2 + i % 2];
            }
        }
        for (uint32_t column = warp; call.kind != ADD && tile == blockIdx.x && column < call.columns; column += WARPS) {
            const float x = call.squares ? factor(call, column) : 1.0f;
            if (lane == 0) factors[column] = x;
        }
        __syncthreads();
#pragma unroll 1
        for (int half = 0; half < TALL; half++) {
            if (call.kind == ADD && TALL > 1) ask_added(call, tile * TALL + half, added);
            finish<GROUPS>(call, tile * TALL + half, mine + half * SUMS, factors, added);
        }
    }
}

// By the columns that they have room for. What is asked for early wants registers.
#define PRODUCT(COUNT, DEPTH, REGISTERS)                                                       \
    extern "C" __global__ void REGISTERS step_product_##COUNT(Product call) {                  \
        product<COUNT / COLUMNS, DEPTH>(call);                                                 \
    }

PRODUCT(8, 0, __launch_bounds__(THREADS, 1))
PRODUCT(16, 1, __maxnreg__(152))
PRODUCT(32, 2, __launch_bounds__(THREADS, 1))
PRODUCT(64, 1, __maxnreg__(192))

struct Embed {
    const bf16 *embedding;  // [vocabulary][width]
    const uint32_t *tokens;  // [columns]
    float *residual;         // [columns][width]
    const bf16 *norm;        // [width]: of the first layer
    bf16 *normed;            // [columns][width]
    float *squares;          // [columns][PARTS]
    uint32_t width;
    uint32_t vocabulary;
};

// A block a column.
extern "C" __global__ void __launch_bounds__(THREADS) step_embed(Embed call) {
    __shared__ float sums[WARPS];
    start_next();
    settle();
    // A token that is none has been reported; whatever stands for it must lie within.
    const uint32_t token = min(call.tokens[blockIdx.x], call.vocabulary - 1);
    const bf16 *from = call.embedding + uint64_t(token) * call.width;
    const uint64_t to = uint64_t(blockIdx.x) * call.width;
    float sum = 0.0f;
    for (uint32_t i = threadIdx.x; i < call.width; i += THREADS) {
        const float x = __bfloat162float(from[i]);
        call.residual[to + i] = x;
        call.normed[to + i] = __float2bfloat16(x * __bfloat162float(call.norm[i]));
        sum += x * x;
    }
    sum = warp_sum(sum);
    if (threadIdx.x % LANES == 0) sums[threadIdx.x / LANES] = sum;
    __syncthreads();
    if (threadIdx.x > 0) return;
    for (int i = 1; i < WARPS; i++) sum += sums[i];
    reinterpret_cast<float4 *>(call.squares)[blockIdx.x] = make_float4(sum, 0.0f, 0.0f, 0.0f);
}

struct Seat {
    uint32_t *tokens;       // [columns]: of the batch before, then of the next
    const int32_t *from;    // [columns]: the place before of a text that goes on; negative for a new one
    const uint32_t *fresh;  // [columns]: the tokens of new ones
    uint32_t columns;
};

// Seats another batch. One block, a thread a column.
extern "C" __global__ void step_seat(Seat call) {
    const uint32_t i = threadIdx.x;
    const int32_t from = i < call.columns ? call.from[i] : -1;
    const uint32_t token = from >= 0 ? call.tokens[from] : i < call.columns ? call.fresh[i] : 0;
    __syncthreads();
    if (i < call.columns) call.tokens[i] = token;
}

// Sizes of the structs above: the host's mirrors must agree.
extern "C" __global__ void step_sizes(uint32_t *sizes) {
    sizes[0] = sizeof(Product);
    sizes[1] = sizeof(Embed);
    sizes[2] = sizeof(Seat);
}
