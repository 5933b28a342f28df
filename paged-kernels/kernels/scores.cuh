// What the score kernels share. From hidden states to drop bits: a surrogate's scores of every token for every kv head,
// held against a threshold. A linear surrogate is W h + b; an MLP is W2 gelu(W1 h + b1) + b2 with the exact, erf, GELU.
//
// All sums are f32. To match torch's bf16 modules a value is rounded to bf16 where those store one: after W1 with its
// bias, after GELU, after W2 with its bias. A bit is set where score < threshold, so a NaN is kept. Sums are taken in
// a fixed order, parts of other blocks too: the same inputs give the same bits. Scores of a token differ in their last bits
// between the kernels, of which the number of tokens decides.

#pragma once

#include "second_level.cuh"

#include <cuda_bf16.h>

#include <cmath>
#include <cstdint>

namespace scores {

using bf16 = __nv_bfloat16;

constexpr uint32_t LANES = 32;
constexpr uint32_t TEAM = 8;  // warps of a block
constexpr uint32_t THREADS = TEAM * LANES;
constexpr uint32_t GROUP = 8;  // heads that are scored at once

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

// x times the share of the normal distribution below x. The share beyond |x| is a polynomial of 1 / (1 + p |x|) times
// exp(-x x / 2), 1.5e-7 off at most (Abramowitz and Stegun 7.1.26): what 1 + erf loses by itself in f32, in a third of its
// instructions and without a branch.
__device__ float gelu(float x) {
    const float size = fabsf(x);
    float t, beyond;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(t) : "f"(fmaf(size, 0.23164190f, 1.0f)));
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(beyond) : "f"(x * x * -0.72134752f));
    beyond *= t * fmaf(t, fmaf(t, fmaf(t, fmaf(t, 0.53070271f, -0.72657601f), 0.71070687f), -0.14224837f), 0.12741480f);
    // Of +infinity nothing lies beyond; of -infinity that is no number, as in torch.
    return fmaxf(x, 0.0f) + fmaxf(-size, x > 0.0f ? -32.0f : -INFINITY) * beyond;
}

// A hidden unit from its sum.
template <bool TORCH>
__device__ float activate(float x, float bias) {
    x += bias;
    return TORCH ? rounded(gelu(rounded(x))) : gelu(x);
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

__device__ float warp_sum(float x) {
#pragma unroll
    for (int i = LANES / 2; i > 0; i /= 2) x += __shfl_xor_sync(~0u, x, i);
    return x;
}

// The sum of `count` numbers that blocks have left `pitch` apart, in their order; AT_ONCE are looked for together.
template <int AT_ONCE>
__device__ float collect(float *parts, uint32_t count, uint32_t pitch) {
    float sum = 0.0f;
#pragma unroll 1
    for (uint32_t i = 0; i < count; i += AT_ONCE, parts += AT_ONCE * pitch) {
        auto is = [&](uint32_t j) { return i + j < count; };
        float found[AT_ONCE][1];
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++) found[j][0] = -0.0f;
        bool all;
        do {
            all = true;
#pragma unroll
            for (int j = 0; j < AT_ONCE; j++) look(is(j), found[j], parts + j * pitch);
#pragma unroll
            for (int j = 0; j < AT_ONCE; j++) all = all & have_come(found[j]);
        } while (!all);
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++) {
            clear<1>(is(j), parts + j * pitch);
            sum += found[j][0];
        }
    }
    return sum;
}

}  // namespace scores
