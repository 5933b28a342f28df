// From hidden states to drop bits: a surrogate's scores of every token for every kv head, held against a threshold. A
// linear surrogate is W h + b; an MLP is W2 gelu(W1 h + b1) + b2 with the exact, erf, GELU.
//
// All sums are f32. To match torch's bf16 modules a value is rounded to bf16 where those store one: after W1 with its
// bias, after GELU, after W2 with its bias. A bit is set where score < threshold, so a NaN is kept. Sums are taken in
// a fixed order, parts of other blocks too: the same inputs give the same bits. Scores of a token differ in their last bits
// between the kernels, of which the number of tokens decides.
//
// Products of bf16 go to the tensor cores, GELU's results too: whole if they are rounded to bf16, and if not as three
// terms that add up to the f32, so that nothing is lost.

#include <cuda_bf16.h>

#include <cstdint>

#include "hopper.cuh"

namespace scores {

using bf16 = __nv_bfloat16;

constexpr uint32_t LANES = 32;
constexpr uint32_t TEAM = 8;  // warps of a block
constexpr uint32_t THREADS = TEAM * LANES;
constexpr uint32_t GROUP = 8;  // heads that the tensor cores take at once

struct Scores {
    const bf16 *hidden;        // [tokens][dim], rows `stride` elements apart
    int64_t stride;
    const bf16 *first;         // W1 [width][dim]
    const float *first_bias;   // [pitch], 0 past the last unit
    const bf16 *second;        // W2, or a linear surrogate's W: rows of heads, a multiple of GROUP, `pitch` elements apart,
                               // 0 past the surrogate's
    const float *second_bias;  // [heads]
    uint32_t *bits;            // [heads][words]: token t is bit t % 32 of word t / 32
    float *scores;             // [heads][tokens], or null
    float *parts;              // what blocks hand to each other
    uint32_t *arrivals;        // blocks that have come; 0 between launches
    uint32_t tokens;
    uint32_t dim;
    uint32_t width;            // units of the hidden layer; 0 for a linear surrogate
    uint32_t pitch;
    uint32_t heads;
    uint32_t words;
    float threshold;
    uint32_t torch;            // whether to round where torch does
    uint32_t stages;           // of the pipeline in kernels that have one
    uint32_t unused;
};

__device__ float rounded(float x) { return __bfloat162float(__float2bfloat16(x)); }

// A hidden unit from its sum.
template <bool TORCH>
__device__ float activate(float x, float bias) {
    x += bias;
    if (TORCH) x = rounded(x);
    x = x * 0.5f * (1.0f + erff(x * 0.70710678118654752f));
    return TORCH ? rounded(x) : x;
}

__device__ float activate(const Scores &call, float x, float bias) {
    return call.torch ? activate<true>(x, bias) : activate<false>(x, bias);
}

// A score from its sum, stored if wanted; says whether it drops the token.
__device__ bool drops(const Scores &call, uint32_t head, uint32_t token, float x) {
    x += call.second_bias[head];
    if (call.torch) x = rounded(x);
    if (call.scores) call.scores[uint64_t(head) * call.tokens + token] = x;
    return x < call.threshold;
}

// The same for a word of 32 tokens, a lane a token, past the last of which `x` is not looked at.
__device__ void decide(const Scores &call, uint32_t head, uint32_t word, float x) {
    const uint32_t lane = threadIdx.x % LANES, token = word * 32 + lane;
    const bool drop = token < call.tokens && drops(call, head, token, x);
    const uint32_t bits = __ballot_sync(~0u, drop);
    if (lane == 0 && word < call.words) call.bits[uint64_t(head) * call.words + word] = bits;
}

__device__ uint32_t shared_address(const void *p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

__device__ void multiply(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// The high halves of two f32: bf16 by truncation.
__device__ uint32_t high_halves(float low, float high) {
    return __byte_perm(__float_as_uint(low), __float_as_uint(high), 0x7632);
}

// What truncation leaves: exact. Of an infinity nothing is left.
__device__ float rest(float x) {
    const float left = x - __uint_as_float(__float_as_uint(x) & 0xffff0000u);
    return left == left ? left : 0.0f;
}

// Keeps the compiler from fetching for all of an unrolled loop first, for which there are no registers.
__device__ void in_turn() { asm volatile("" ::: "memory"); }

// The second layer over units from `unit` on, by a warp that has 16 tokens' sums of them as the tensor cores leave
// them, a multiple of 8: lane 4 g + c holds of each 8 units those at 2 c and 2 c + 1, for tokens g and g + 8. Puts the product at
// `to[head * pitch + token]`, or adds it.
template <bool TORCH, int COUNT>
__device__ void second_layer(const Scores &call, const float (&sums)[COUNT], uint32_t unit, float *to, uint32_t pitch,
                             bool add) {
    const uint32_t lane = threadIdx.x % LANES, g = lane / 4, c = lane % 4;
    const float *biases = call.first_bias + unit + c * 2;
    // More than a group of heads is rare, and registers to keep the units in there are none: they are made again.
#pragma unroll 1
    for (uint32_t group = 0; group < call.heads; group += GROUP) {
        const bf16 *weights = call.second + uint64_t(group + g) * call.pitch + unit + c * 2;
        float product[4] = {};
#pragma unroll
        for (int i = 0; i < COUNT; i += 8) {
            const uint32_t b0 = *reinterpret_cast<const uint32_t *>(weights + i * 2);
            const uint32_t b1 = *reinterpret_cast<const uint32_t *>(weights + i * 2 + 8);
            float x[8] = {};
#pragma unroll
            for (int j = 0; j < 8; j += 4) {
                // Units past the last are not units at all: infinite hidden states make NaN of their zeros.
                if (unit + (i + j) * 2 >= call.width) continue;
                const float2 bias = *reinterpret_cast<const float2 *>(biases + (i + j) * 2);
#pragma unroll
                for (int k = 0; k < 4; k++) x[j + k] = activate<TORCH>(sums[i + j + k], k % 2 ? bias.y : bias.x);
            }
            multiply(product, high_halves(x[0], x[1]), high_halves(x[2], x[3]), high_halves(x[4], x[5]),
                     high_halves(x[6], x[7]), b0, b1);
            if constexpr (!TORCH) {
#pragma unroll
                for (int term = 1; term < 3; term++) {
#pragma unroll
                    for (int j = 0; j < 8; j++) x[j] = rest(x[j]);
                    multiply(product, high_halves(x[0], x[1]), high_halves(x[2], x[3]), high_halves(x[4], x[5]),
                             high_halves(x[6], x[7]), b0, b1);
                }
            }
            in_turn();
        }
        float *place = to + (group + c * 2) * pitch + g;
        if (add) {
            product[0] += place[0], product[1] += place[pitch];
            product[2] += place[8], product[3] += place[pitch + 8];
        }
        place[0] = product[0], place[pitch] = product[1];
        place[8] = product[2], place[pitch + 8] = product[3];
    }
}

template <int COUNT>
__device__ void second_layer(const Scores &call, const float (&sums)[COUNT], uint32_t unit, float *to, uint32_t pitch,
                             bool add) {
    if (call.torch) {
        second_layer<true>(call, sums, unit, to, pitch, add);
    } else {
        second_layer<false>(call, sums, unit, to, pitch, add);
    }
}

__device__ float warp_sum(float x) {
#pragma unroll
    for (int i = LANES / 2; i > 0; i /= 2) x += __shfl_xor_sync(~0u, x, i);
    return x;
}

// Whether a block is the last of `blocks` to come to a counter, whose parts it may then read. The last one clears it.
__device__ bool last_of(uint32_t *arrivals, uint32_t blocks) {
    __shared__ uint32_t arrived;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) arrived = atomicAdd(arrivals, 1u);
    __syncthreads();
    if (arrived != blocks - 1) return false;
    if (threadIdx.x == 0) *arrivals = 0;
    __threadfence();
    return true;
}

// 32 tokens times rows of weights, by a block whose warps share the columns and are merged in their order. A lane takes
// 8 columns that lie together where the tensor cores want them apart: the sum is over all of them, so both sides may be
// permuted alike, and nothing passes through shared memory.
constexpr uint32_t THIN_PITCH = 36;  // of tokens in shared memory: no two lanes meet in a bank

template <int GROUPS, uint32_t WARPS>
__device__ void thin_product(const Scores &call, uint32_t token, const bf16 *weights, uint32_t rows,
                             float (*merged)[GROUPS * 8 * THIN_PITCH]) {
    constexpr int AHEAD = GROUPS == 1 ? 4 : 2;
    const uint32_t lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, g = lane / 4, c = lane % 4;
    const bf16 *tokens[4], *row[GROUPS];
#pragma unroll
    for (int i = 0; i < 4; i++) tokens[i] = call.hidden + min(token + g + 8 * i, call.tokens - 1) * call.stride + c * 8;
#pragma unroll
    for (int i = 0; i < GROUPS; i++) row[i] = weights + uint64_t(min(g + 8 * i, rows - 1)) * call.dim + c * 8;
    float sums[GROUPS][2][4] = {};
    for (uint32_t k = warp * 32; k < call.dim; k += WARPS * 32 * AHEAD) {
        uint4 a[AHEAD][4], b[AHEAD][GROUPS];
#pragma unroll
        for (int s = 0; s < AHEAD; s++) {
            const uint32_t at = k + s * WARPS * 32;
            const bool is = at < call.dim;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                a[s][i] = is ? *reinterpret_cast<const uint4 *>(tokens[i] + at) : make_uint4(0, 0, 0, 0);
            }
#pragma unroll
            for (int i = 0; i < GROUPS; i++) {
                b[s][i] = is ? __ldg(reinterpret_cast<const uint4 *>(row[i] + at)) : make_uint4(0, 0, 0, 0);
            }
        }
#pragma unroll
        for (int s = 0; s < AHEAD; s++) {
#pragma unroll
            for (int i = 0; i < GROUPS; i++) {
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    const uint4 &low = a[s][2 * j], &high = a[s][2 * j + 1], &w = b[s][i];
                    multiply(sums[i][j], low.x, high.x, low.y, high.y, w.x, w.y);
                    multiply(sums[i][j], low.z, high.z, low.w, high.w, w.z, w.w);
                }
            }
        }
    }
#pragma unroll
    for (int i = 0; i < GROUPS; i++) {
#pragma unroll
        for (int j = 0; j < 2; j++) {
            float *to = merged[warp] + (i * 8 + c * 2) * THIN_PITCH + j * 16 + g;
            to[0] = sums[i][j][0], to[THIN_PITCH] = sums[i][j][1];
            to[8] = sums[i][j][2], to[THIN_PITCH + 8] = sums[i][j][3];
        }
    }
    __syncthreads();
}

template <int GROUPS, uint32_t WARPS>
__device__ float thin_sum(float (*merged)[GROUPS * 8 * THIN_PITCH], uint32_t row) {
    float x = 0.0f;
#pragma unroll
    for (uint32_t w = 0; w < WARPS; w++) x += merged[w][row * THIN_PITCH + threadIdx.x % LANES];
    return x;
}

// A linear surrogate, a block a word.
template <int GROUPS, uint32_t WARPS>
__device__ void linear(const Scores &call) {
    __shared__ float merged[WARPS][GROUPS * 8 * THIN_PITCH];
    thin_product<GROUPS, WARPS>(call, blockIdx.x * 32, call.second, call.heads, merged);
    for (uint32_t head = threadIdx.x / LANES; head < call.heads; head += WARPS) {
        decide(call, head, blockIdx.x, thin_sum<GROUPS, WARPS>(merged, head));
    }
}

// Tiles of the portable MLP, in shared memory as rows of 128 bytes.
constexpr uint32_t TILE_TOKENS = 64;
constexpr uint32_t TILE_UNITS = 128;
constexpr uint32_t TILE_BYTES = (TILE_TOKENS + TILE_UNITS) * 128;
constexpr uint32_t TILE_STAGES = 3;
constexpr uint32_t TILE_PITCH = 68;

__device__ void copy16(uint32_t to, const void *from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

__device__ void load_matrices(uint32_t (&r)[4], uint32_t from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(from)
                 : "memory");
}

// Where a 16-byte chunk of a row of 128 bytes lies, so that eight rows of one chunk fall into all banks.
__device__ uint32_t swizzled(uint32_t row, uint32_t chunk) { return row * 128 + ((chunk ^ (row & 7)) << 4); }

}  // namespace scores

using namespace scores;

// Any shape and any address, a block a word. The twin that the other kernels are held to, written for reading.
extern "C" __global__ void __launch_bounds__(THREADS) scores_plain(Scores call) {
    extern __shared__ float units[];  // [width]
    __shared__ uint32_t word[32];     // a head's
    const uint32_t lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    if (threadIdx.x < 32) word[threadIdx.x] = 0;
    for (uint32_t t = 0; t < 32 && blockIdx.x * 32 + t < call.tokens; t++) {
        const uint32_t token = blockIdx.x * 32 + t;
        const bf16 *hidden = call.hidden + token * call.stride;
        __syncthreads();
        for (uint32_t unit = warp; unit < call.width; unit += TEAM) {
            const bf16 *weights = call.first + uint64_t(unit) * call.dim;
            float x = 0.0f;
            for (uint32_t k = lane; k < call.dim; k += LANES) x += __bfloat162float(hidden[k]) * __bfloat162float(weights[k]);
            x = warp_sum(x);
            if (lane == 0) units[unit] = activate(call, x, call.first_bias[unit]);
        }
        __syncthreads();
        for (uint32_t head = warp; head < call.heads; head += TEAM) {
            const bf16 *weights = call.second + uint64_t(head) * call.pitch;
            float x = 0.0f;
            for (uint32_t k = lane; k < (call.width ? call.width : call.dim); k += LANES) {
                x += (call.width ? units[k] : __bfloat162float(hidden[k])) * __bfloat162float(weights[k]);
            }
            x = warp_sum(x);
            if (lane == 0 && drops(call, head, token, x)) word[head] |= 1u << t;
        }
    }
    __syncthreads();
    if (threadIdx.x < call.heads) call.bits[uint64_t(threadIdx.x) * call.words + blockIdx.x] = word[threadIdx.x];
}

extern "C" __global__ void __launch_bounds__(16 * LANES, 2) scores_linear_8(Scores call) { linear<1, 16>(call); }
extern "C" __global__ void __launch_bounds__(THREADS) scores_linear_32(Scores call) { linear<4, TEAM>(call); }

// An MLP for few tokens: a block has 8 units and 32 tokens. Its part of the second layer goes to the last block of those
// tokens, which adds the parts up in the order of the units. `arrivals` is [words].
extern "C" __global__ void __launch_bounds__(THREADS) scores_thin(Scores call) {
    __shared__ float merged[TEAM][8 * THIN_PITCH];
    __shared__ float units[8][LANES];
    const uint32_t lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, unit = blockIdx.x * 8, word = blockIdx.y;
    thin_product<1, TEAM>(call, word * 32, call.first + uint64_t(unit) * call.dim, min(call.width - unit, 8u), merged);
    const float x = thin_sum<1, TEAM>(merged, warp);
    units[warp][lane] = unit + warp < call.width ? activate(call, x, call.first_bias[unit + warp]) : 0.0f;
    __syncthreads();
    float *parts = call.parts + uint64_t(word) * gridDim.x * call.heads * LANES;  // [blocks][heads][32]
    for (uint32_t head = warp; head < call.heads; head += TEAM) {
        float sum = 0.0f;
        for (uint32_t i = 0; i < 8 && unit + i < call.width; i++) {
            sum += units[i][lane] * __bfloat162float(call.second[uint64_t(head) * call.pitch + unit + i]);
        }
        parts[(blockIdx.x * call.heads + head) * LANES + lane] = sum;
    }
    if (!last_of(call.arrivals + word, gridDim.x)) return;
    for (uint32_t head = warp; head < call.heads; head += TEAM) {
        float sum = 0.0f;
#pragma unroll 16
        for (uint32_t i = 0; i < gridDim.x; i++) sum += __ldcg(parts + (i * call.heads + head) * LANES + lane);
        decide(call, head, word, sum);
    }
}

// An MLP for many tokens on any card: a block has 64 tokens and goes over all units, 128 at a time.
extern "C" __global__ void __launch_bounds__(THREADS, 2) scores_tile(Scores call) {
    extern __shared__ __align__(128) unsigned char shared[];
    float *merged = reinterpret_cast<float *>(shared + TILE_STAGES * TILE_BYTES);  // [4][heads, padded][TILE_PITCH]
    const uint32_t lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, part = warp % 4;
    const uint32_t first_token = blockIdx.x * TILE_TOKENS, row = warp / 4 * 32, padded = (call.heads + 7) / 8 * 8;
    const uint32_t steps = (call.dim + 63) / 64, tiles = (call.width + TILE_UNITS - 1) / TILE_UNITS;
    const uint32_t base = shared_address(shared), chunk = threadIdx.x % 8, line = threadIdx.x / 8;
    float *to = merged + part * padded * TILE_PITCH + row;

    auto fetch = [&](uint32_t i) {
        if (i < steps * tiles) {
            const uint32_t stage = base + i % TILE_STAGES * TILE_BYTES, k = i % steps * 64 + chunk * 8;
#pragma unroll
            for (int j = 0; j < TILE_TOKENS / 32; j++) {
                const uint32_t at = line + j * 32, token = min(first_token + at, call.tokens - 1);
                copy16(stage + swizzled(at, chunk), call.hidden + token * call.stride + k);
            }
#pragma unroll
            for (int j = 0; j < TILE_UNITS / 32; j++) {
                const uint32_t at = line + j * 32, unit = min(i / steps * TILE_UNITS + at, call.width - 1);
                copy16(stage + TILE_TOKENS * 128 + swizzled(at, chunk), call.first + uint64_t(unit) * call.dim + k);
            }
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    };
    for (uint32_t i = 0; i < TILE_STAGES - 1; i++) fetch(i);
    float sums[2][16] = {};
#pragma unroll 1
    for (uint32_t i = 0; i < steps * tiles; i++) {
        asm volatile("cp.async.wait_group %0;" ::"n"(TILE_STAGES - 2) : "memory");
        __syncthreads();
        fetch(i + TILE_STAGES - 1);
        const uint32_t stage = base + i % TILE_STAGES * TILE_BYTES, weights = stage + TILE_TOKENS * 128;
#pragma unroll
        for (int k = 0; k < 8; k += 2) {
            uint32_t a[2][4], b[2][4];
#pragma unroll
            for (int j = 0; j < 2; j++) {
                load_matrices(a[j], stage + swizzled(row + j * 16 + lane % 16, k + lane / 16));
                load_matrices(b[j], weights + swizzled(part * 32 + j * 16 + lane / 16 * 8 + lane % 8, k + lane / 8 % 2));
            }
#pragma unroll
            for (int j = 0; j < 2; j++) {
#pragma unroll
                for (int n = 0; n < 4; n++) {
                    float(&c)[4] = *reinterpret_cast<float(*)[4]>(&sums[j][n * 4]);
                    multiply(c, a[j][0], a[j][1], a[j][2], a[j][3], b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
                }
            }
        }
        if ((i + 1) % steps == 0) {
            const uint32_t unit = i / steps * TILE_UNITS + part * 32;
#pragma unroll
            for (int j = 0; j < 2; j++) {
                second_layer(call, sums[j], unit, to + j * 16, TILE_PITCH, i >= steps);
#pragma unroll
                for (int n = 0; n < 16; n++) sums[j][n] = 0.0f;
            }
        }
    }
    __syncthreads();
    for (uint32_t i = warp; i < call.heads * 2; i += TEAM) {
        const uint32_t head = i / 2, word = i % 2;
        float sum = 0.0f;
        for (uint32_t p = 0; p < 4; p++) sum += merged[(p * padded + head) * TILE_PITCH + word * 32 + lane];
        decide(call, head, blockIdx.x * 2 + word, sum);
    }
}

extern "C" __global__ void scores_sizes(uint32_t *sizes) { sizes[0] = sizeof(Scores); }

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

namespace scores {

using namespace hopper;

// Hopper starts a kernel while the one before still runs. What that one writes may be read only after `settle`, and what
// it reads be written only then.
__device__ void settle() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ void start_next() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// An MLP for few tokens: a cluster of 8 blocks has 32 units and 64 tokens, or the first 8 * TILES of them, and shares
// the columns. Weights are on their way before the kernel before has ended. Sums meet by warp, then by block, in order;
// then each block goes on with 8 tokens. `arrivals` is [tiles of 64 tokens][8].
constexpr uint32_t SHORT_TOKENS = 64;
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
    const uint32_t first_token = blockIdx.y * SHORT_TOKENS, first_unit = share * SHORT_UNITS;
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
    uint32_t row = first_token + g;
    while (k < call.dim) {
#pragma unroll
        for (int t = 0; t < TILES; t++) {
            // Later tokens only where there are some; and registers for all loads at once there are none.
            if ((t == 4 || t == 6) && first_token + t * 8 >= call.tokens) break;
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

    const uint32_t bytes = call.words * 4, byte = blockIdx.y * SHORT_BLOCKS + rank;
    auto *bits = reinterpret_cast<uint8_t *>(call.bits);
    const bool busy = first_token + rank * 8 < call.tokens;
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
        // [tiles][8 blocks][shares][8 tokens][heads]
        float *parts = call.parts + uint64_t(byte) * shares * 8 * call.heads;
        if (lane < call.heads) parts[(share * 8 + warp) * call.heads + lane] = mine;
        if (last_of(call.arrivals + byte, shares)) {
            const uint32_t t = threadIdx.x % 8, head = threadIdx.x / 8;
            const bool here = head < call.heads && first_token + rank * 8 + t < call.tokens;
            float sum = 0.0f;
            if (here) {
#pragma unroll 16
                for (uint32_t i = 0; i < shares; i++) sum += __ldcg(parts + (i * 8 + t) * call.heads + head);
            }
            const bool drop = here && drops(call, head, first_token + rank * 8 + t, sum);
            const uint32_t four = __ballot_sync(~0u, drop);
            if (t == 0 && head < call.heads) bits[uint64_t(head) * bytes + byte] = uint8_t(four >> lane);
        }
    } else if (share == 0 && threadIdx.x < call.heads && byte < bytes) {
        bits[uint64_t(threadIdx.x) * bytes + byte] = 0;
    }
    __syncwarp();
    cluster_wait();
}

// An MLP for many tokens: a cluster of 4 blocks has 128 tokens and all units, N a block. The copy engine fills a
// pipeline of tiles of 64 columns; each block fetches a quarter of the tokens' tile for all four, since what the L2 can
// deliver is what bounds this. Two groups of four warps have 64 tokens each, a ninth warp fetches. Products of the second
// layer meet in the order of the blocks, each of which ends with a word.
constexpr uint32_t MANY_TOKENS = 128;
constexpr uint32_t MANY_BLOCKS = MANY_TOKENS / 32;
constexpr uint32_t MANY_THREADS = THREADS + LANES;
constexpr uint32_t MANY_PITCH = 132;

template <int N>
__device__ void many(const Scores &call, const Map *hidden, const Map *first) {
    constexpr uint32_t HIDDEN_BYTES = MANY_TOKENS * 128, STAGE = HIDDEN_BYTES + N * 128;
    extern __shared__ __align__(1024) unsigned char shared[];
    const uint32_t base = shared_address(shared);
    const uint32_t stages = call.stages, full = base + stages * STAGE, empty = full + stages * 8;
    const uint32_t lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    const uint32_t steps = (call.dim + 63) / 64;
    start_next();
    if (threadIdx.x == 0) {
        for (uint32_t i = 0; i < stages; i++) {
            barrier_init(full + i * 8, 1);
            barrier_init(empty + i * 8, MANY_BLOCKS * TEAM);
        }
        barriers_ready();
    }
    cluster_arrive();
    cluster_wait();
    settle();

    if (warp == TEAM) {
        if (lane == 0) {
            const uint32_t rank = cluster_rank(), first_token = blockIdx.x / MANY_BLOCKS * MANY_TOKENS;
            uint32_t stage = 0, round = 0;
            for (uint32_t k = 0; k < steps; k++) {
                if (round > 0) barrier_wait(empty + stage * 8, (round - 1) & 1);
                const uint32_t to = base + stage * STAGE, barrier = full + stage * 8;
                barrier_expect(barrier, STAGE);
                copy_box_to(to + rank * (HIDDEN_BYTES / MANY_BLOCKS), hidden, k * 64,
                            first_token + rank * (MANY_TOKENS / MANY_BLOCKS), barrier, (1 << MANY_BLOCKS) - 1);
                copy_box(to + HIDDEN_BYTES, first, k * 64, rank * N, barrier);
                if (++stage == stages) stage = 0, round++;
            }
        }
        __syncwarp();
    } else {
        float sums[N / 2] = {};
        uint32_t stage = 0, round = 0, before = 0;
        // The warp's word that a stage is free, to all four blocks, since all four write into it.
        auto release = [&](uint32_t which) {
            if (lane < MANY_BLOCKS) barrier_arrive(in_block(empty + which * 8, lane));
        };
#pragma unroll 1
        for (uint32_t k = 0; k < steps; k++) {
            barrier_wait(full + stage * 8, round & 1);
            const uint64_t a = tile(base + stage * STAGE + warp / 4 * 64 * 128);
            const uint64_t b = tile(base + stage * STAGE + HIDDEN_BYTES);
            wgmma_begin();
#pragma unroll
            for (int i = 0; i < 4; i++) wgmma<N>(sums, a + i * 2, b + i * 2);
            wgmma_commit();
            wgmma_wait<1>();
            if (k > 0) release(before);
            before = stage;
            if (++stage == stages) stage = 0, round++;
        }
        wgmma_wait<0>();
        wgmma_end(sums);
        asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory");  // all tiles have come and been read
        // [heads, padded][MANY_PITCH], over the tiles.
        float *merged = reinterpret_cast<float *>(shared);
        second_layer(call, sums, cluster_rank() * N, merged + warp * 16, MANY_PITCH, false);
    }
    __syncwarp();
    cluster_arrive();
    cluster_wait();
    for (uint32_t head = warp; head < call.heads; head += MANY_THREADS / LANES) {
        const uint32_t at = base + (head * MANY_PITCH + cluster_rank() * 32 + lane) * 4;
        float sum = 0.0f;
#pragma unroll
        for (uint32_t r = 0; r < MANY_BLOCKS; r++) sum += read(in_block(at, r));
        decide(call, head, blockIdx.x, sum);  // as many blocks in a cluster as words in its tokens
    }
    cluster_arrive();  // nobody leaves while others read what is theirs
    cluster_wait();
}

}  // namespace scores

// Two blocks must fit a multiprocessor, or the next kernel can't start while this one ends.
#define SCORES_FEW(NAME, TILES)                                                                               \
    extern "C" __global__ void __cluster_dims__(8, 1, 1) __launch_bounds__(THREADS, 2) scores_few_##NAME(Scores call) { \
        few<TILES>(call);                                                                                     \
    }
SCORES_FEW(8, 1)
SCORES_FEW(32, 4)
SCORES_FEW(64, 8)

#define SCORES_MANY(N, BLOCKS)                                                                        \
    extern "C" __global__ void __cluster_dims__(4, 1, 1) __launch_bounds__(MANY_THREADS, BLOCKS) scores_many_##N( \
        Scores call, const __grid_constant__ Map hidden, const __grid_constant__ Map first) {         \
        many<N>(call, &hidden, &first);                                                               \
    }
SCORES_MANY(64, 2)
SCORES_MANY(128, 2)
SCORES_MANY(160, 1)
SCORES_MANY(256, 1)

#endif
