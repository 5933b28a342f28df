// Scores on any card; see scores.cuh.
//
// Products of bf16 go to the tensor cores, GELU's results too: whole if they are rounded to bf16, and if not as three
// terms that add up to the f32, so that nothing is lost.

#include "scores.cuh"

namespace scores {

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
// tokens, which adds the parts up in the order of the units.
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
        leave(parts + (blockIdx.x * call.heads + head) * LANES + lane, {sum});
    }
    if (blockIdx.x + 1 < gridDim.x) return;
    for (uint32_t head = warp; head < call.heads; head += TEAM) {
        decide(call, head, word, collect<16>(parts + head * LANES + lane, gridDim.x, call.heads * LANES));
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
