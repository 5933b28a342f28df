// The norm before a layer's projections, and a linear KVzap surrogate's scores of what it gives, from one reading of the residual
// stream. A warp has 16 tokens: it reads their rows into registers, in the order in which tensor cores take them, norms them there,
// writes them out and multiplies them by the map. Rounded is what torch's bf16 modules round: hidden states, scores. Mirrored in
// src/card/driver/scored.rs.

#include <cuda_bf16.h>

#include <cstdint>

#include "launch.cuh"

namespace scored {

constexpr int LANES = 32;
constexpr int THREADS = 64;
constexpr int ROWS = 16;   // tokens of a warp
constexpr int CHUNK = 32;  // columns of a row that four lanes read at once, eight each
constexpr int HELD = 18;   // chunks of a row that registers have room for

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
    const bf16 *residual;  // [all][dim]
    const bf16 *norm;      // [dim]
    bf16 *hidden;          // [all][dim]
    const bf16 *map;       // [8][dim]
    const bf16 *bias;      // [8]
    bf16 *scores;          // [all / tokens][heads][tokens]
    uint32_t all;          // tokens of all texts
    uint32_t tokens;       // of a text
    uint32_t dim;          // at most HELD chunks
    uint32_t heads;        // at most 8
    float epsilon;
    uint32_t unused;
};

extern "C" __global__ void __launch_bounds__(THREADS) scored_linear(Scored call) {
    const uint32_t lane = threadIdx.x % LANES, g = lane / 4, q = lane % 4, chunks = call.dim / CHUNK;
    const uint32_t first_token = (blockIdx.x * (THREADS / LANES) + threadIdx.x / LANES) * ROWS;
    if (first_token >= call.all) return;
    const uint32_t last = call.all - 1, tokens[2] = {first_token + g, first_token + g + 8};
    Eight held[2][HELD];
    float factors[2] = {};
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const bf16 *row = call.residual + uint64_t(min(tokens[r], last)) * call.dim + 8 * q;
#pragma unroll
        for (uint32_t c = 0; c < HELD; c++) {
            if (c < chunks) held[r][c] = read(row + c * CHUNK);
        }
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
#pragma unroll
        for (uint32_t c = 0; c < HELD; c++) {
            if (c < chunks) factors[r] += squares(held[r][c]);
        }
        factors[r] += __shfl_xor_sync(~0u, factors[r], 1);
        factors[r] += __shfl_xor_sync(~0u, factors[r], 2);
        factors[r] = rsqrtf(factors[r] / float(call.dim) + call.epsilon);
    }

    float sums[4] = {};
    const bf16 *map = call.map + g * call.dim + 8 * q;
#pragma unroll
    for (uint32_t c = 0; c < HELD; c++) {
        if (c >= chunks) break;
        const Eight by = read(call.norm + c * CHUNK + 8 * q);
        Eight x[2] = {held[0][c], held[1][c]};
#pragma unroll
        for (int r = 0; r < 2; r++) {
            norm(x[r], by, factors[r]);
            if (tokens[r] > last) continue;
            bf16 *to = call.hidden + uint64_t(tokens[r]) * call.dim + c * CHUNK + 8 * q;
            *reinterpret_cast<uint4 *>(to) = make_uint4(x[r].pairs[0], x[r].pairs[1], x[r].pairs[2], x[r].pairs[3]);
        }
        // Columns go to tensor cores in another order, which is that of both.
        const Eight w = read(map + c * CHUNK);
#pragma unroll
        for (int half = 0; half < 4; half += 2) {
            const uint32_t a[4] = {x[0].pairs[half], x[1].pairs[half], x[0].pairs[half + 1], x[1].pairs[half + 1]};
            multiply(sums, a, w.pairs[half], w.pairs[half + 1]);
        }
    }

    const float2 bias = wide(__ldg(reinterpret_cast<const uint32_t *>(call.bias + 2 * q)));
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const uint32_t head = 2 * q + i % 2, token = tokens[i / 2];
        if (head >= call.heads || token > last) continue;
        const uint64_t text = token / call.tokens;
        call.scores[(text * call.heads + head) * call.tokens + token % call.tokens] = __float2bfloat16(sums[i] + (i % 2 ? bias.y : bias.x));
    }
}

// Size of the struct above: the host's mirror must agree.
extern "C" __global__ void scored_sizes(uint32_t *sizes) { sizes[0] = sizeof(Scored); }
