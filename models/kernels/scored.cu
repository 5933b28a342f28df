// The norm before a layer's projections, and a KVzap surrogate's scores of what it gives, from one reading of the residual
// stream. A warp has 16 tokens: it reads their rows into registers, in the order in which tensor cores take them, norms them there,
// writes them out and multiplies them by the first map. Rounded is what torch's bf16 modules round: hidden states, units
// before and after GELU, scores. Mirrored in src/card/driver/scored.rs.
//
// An MLP comes out right (`scored_9`, 72 units), but its weights, read again and again through the first-level cache, made a prompt a
// sixth longer: they want shared memory. Until then there is a kernel for linear ones alone, of rows that registers hold.

#include <cuda_bf16.h>

#include <cstdint>

#include "launch.cuh"

namespace scored {

constexpr int LANES = 32;
constexpr int THREADS = 64;
constexpr int ROWS = 16;   // tokens of a warp
constexpr int CHUNK = 32;  // columns of a row that four lanes read at once, eight each
constexpr int HEADS = 8;

using bf16 = __nv_bfloat16;

struct Eight {
    uint32_t pairs[4];
};

__device__ Eight read(const bf16 *from) {
    const uint4 x = __ldg(reinterpret_cast<const uint4 *>(from));
    return {{x.x, x.y, x.z, x.w}};
}

__device__ float2 wide(uint32_t pair) { return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)); }

__device__ uint32_t narrow(float a, float b) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
    return *reinterpret_cast<const uint32_t *>(&pair);
}

__device__ float rounded(float x) { return __bfloat162float(__float2bfloat16(x)); }

// The exact one.
__device__ float gelu(float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678118654752440f)); }

// Sums of rows g and g + 8 of the tile, columns 2 q and 2 q + 1, where g and q are the lane's quotient and rest by four.
__device__ void multiply(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ float squares(const Eight &x) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 pair = wide(x.pairs[i]);
        sum += pair.x * pair.x + pair.y * pair.y;
    }
    return sum;
}

__device__ void norm(Eight &x, const Eight &weight, float factor) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 pair = wide(x.pairs[i]), by = wide(weight.pairs[i]);
        x.pairs[i] = narrow(pair.x * factor * by.x, pair.y * factor * by.y);
    }
}

}  // namespace scored

using namespace scored;

struct Scored {
    const bf16 *residual;     // [all][dim]
    const bf16 *norm;         // [dim]
    bf16 *hidden;             // [all][dim]
    const bf16 *first;        // [8 tiles][dim]
    const bf16 *first_bias;   // [8 tiles]
    const bf16 *second;       // [heads, or more][units], units even; null where the first map gives scores
    const bf16 *second_bias;  // [heads, or more]
    bf16 *scores;             // [all / tokens][heads][tokens]
    uint32_t all;             // tokens of all texts
    uint32_t tokens;          // of a text
    uint32_t dim;             // chunks of 32
    uint32_t units;
    uint32_t tiles;  // of 8 rows of the first map
    uint32_t heads;  // at most 8
    float epsilon;
    uint32_t unused;
};

// For at most 8 TILES rows of the first map. HELD chunks of a row stay in registers, what is beyond is read twice.
template <int TILES, int HELD>
__device__ void score(const Scored &call) {
    const uint32_t lane = threadIdx.x % LANES, g = lane / 4, q = lane % 4, chunks = call.dim / CHUNK;
    const uint32_t first_token = (blockIdx.x * (THREADS / LANES) + threadIdx.x / LANES) * ROWS;
    if (first_token >= call.all) return;
    const uint32_t last = call.all - 1, tokens[2] = {first_token + g, first_token + g + 8};
    const bf16 *rows[2];
    Eight held[2][HELD];
    float sums[2] = {};
#pragma unroll
    for (int r = 0; r < 2; r++) {
        rows[r] = call.residual + uint64_t(min(tokens[r], last)) * call.dim + 8 * q;
#pragma unroll
        for (uint32_t c = 0; c < HELD; c++) {
            if (c < chunks) held[r][c] = read(rows[r] + c * CHUNK);
        }
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
#pragma unroll
        for (uint32_t c = 0; c < HELD; c++) {
            if (c < chunks) sums[r] += squares(held[r][c]);
        }
        for (uint32_t c = HELD; c < chunks; c++) sums[r] += squares(read(rows[r] + c * CHUNK));
        sums[r] += __shfl_xor_sync(~0u, sums[r], 1);
        sums[r] += __shfl_xor_sync(~0u, sums[r], 2);
        sums[r] = rsqrtf(sums[r] / float(call.dim) + call.epsilon);
    }

    float units[TILES][4] = {};
    auto take = [&](uint32_t c, Eight (&x)[2]) {
        const Eight by = read(call.norm + c * CHUNK + 8 * q);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            norm(x[r], by, sums[r]);
            if (tokens[r] > last) continue;
            bf16 *to = call.hidden + uint64_t(tokens[r]) * call.dim + c * CHUNK + 8 * q;
            *reinterpret_cast<uint4 *>(to) = make_uint4(x[r].pairs[0], x[r].pairs[1], x[r].pairs[2], x[r].pairs[3]);
        }
#pragma unroll
        for (uint32_t t = 0; t < TILES; t++) {
            if (t >= call.tiles) break;
            // Columns go to tensor cores in another order, which is that of both.
            const Eight w = read(call.first + uint64_t(t * 8 + g) * call.dim + c * CHUNK + 8 * q);
#pragma unroll
            for (int half = 0; half < 4; half += 2) {
                const uint32_t a[4] = {x[0].pairs[half], x[1].pairs[half], x[0].pairs[half + 1], x[1].pairs[half + 1]};
                multiply(units[t], a, w.pairs[half], w.pairs[half + 1]);
            }
        }
    };
#pragma unroll
    for (uint32_t c = 0; c < HELD; c++) {
        if (c >= chunks) break;
        Eight x[2] = {held[0][c], held[1][c]};
        take(c, x);
    }
    for (uint32_t c = HELD; c < chunks; c++) {
        Eight x[2] = {read(rows[0] + c * CHUNK), read(rows[1] + c * CHUNK)};
        take(c, x);
    }

    auto store = [&](uint32_t head, int r, float score) {
        if (head >= call.heads || tokens[r] > last) return;
        const uint64_t text = tokens[r] / call.tokens;
        call.scores[(text * call.heads + head) * call.tokens + tokens[r] % call.tokens] = __float2bfloat16(score);
    };
    float scores[HEADS][2] = {};
#pragma unroll
    for (uint32_t t = 0; t < TILES; t++) {
        if (t >= call.tiles) break;
        const uint32_t unit = t * 8 + 2 * q;
        const float2 bias = wide(__ldg(reinterpret_cast<const uint32_t *>(call.first_bias + unit)));
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const float a = units[t][2 * r] + bias.x, b = units[t][2 * r + 1] + bias.y;
            if (!call.second) {
                store(unit, r, a);
                store(unit + 1, r, b);
                continue;
            }
            if (unit >= call.units) continue;
            const float x = rounded(gelu(rounded(a))), y = rounded(gelu(rounded(b)));
#pragma unroll
            for (uint32_t head = 0; head < HEADS; head++) {
                if (head >= call.heads) break;
                const bf16 *weights = call.second + uint64_t(head) * call.units + unit;
                const float2 by = wide(__ldg(reinterpret_cast<const uint32_t *>(weights)));
                scores[head][r] += x * by.x + y * by.y;
            }
        }
    }
    if (!call.second) return;
#pragma unroll
    for (uint32_t head = 0; head < HEADS; head++) {
        if (head >= call.heads) break;
        const float bias = __bfloat162float(call.second_bias[head]);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float sum = scores[head][r] + __shfl_xor_sync(~0u, scores[head][r], 1);
            sum += __shfl_xor_sync(~0u, sum, 2);
            if (q == 0) store(head, r, sum + bias);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) scored_1(Scored call) { score<1, 18>(call); }

// Size of the struct above: the host's mirror must agree.
extern "C" __global__ void scored_sizes(uint32_t *sizes) { sizes[0] = sizeof(Scored); }
