// A product of weights and a few columns, and what becomes of its sums: what step.cu and wide.cu share.

#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "launch.cuh"
#include "rank.cuh"

namespace step {

constexpr int LANES = 32;
constexpr int ROWS = 16;    // of a tile, or of a part of a taller one
constexpr int COLUMNS = 8;  // of a group
constexpr int PARTS = 4;    // of a column's squares that 16 rows, or a token, bring: a warp each

using bf16 = __nv_bfloat16;

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
    uint32_t next_parts;   // PARTS for each 16 rows, or one of each block of wide.cu, and zeros up to a multiple of four
    uint32_t run_inverse;  // 2^32 / run, rounded up
    uint32_t splits;       // blocks of a cluster that share a tile of wide.cu

    __device__ uint32_t row(uint32_t sixteen, uint32_t i) const {
        // 16 rows of a gated product are eight of each half.
        if (kind == GATED) return sixteen * (ROWS / 2) + i % 8 + (i < 8 ? 0 : rows / 2);
        return sixteen * ROWS + i;
    }
};

// The factors of the norms of COUNT columns from the `first` on, by a warp.
template <int COUNT>
__device__ void factors_of(const Product &call, uint32_t first, float *factors) {
    float sums[COUNT] = {};
#pragma unroll 1
    for (uint32_t i = threadIdx.x % LANES; call.squares && i < call.parts / PARTS; i += LANES) {
        float4 part[COUNT];
#pragma unroll
        for (int c = 0; c < COUNT; c++) {
            const auto *parts = reinterpret_cast<const float4 *>(call.squares + uint64_t(first + c) * call.parts);
            part[c] = first + c < call.columns ? parts[i] : float4{};
        }
#pragma unroll
        for (int c = 0; c < COUNT; c++) sums[c] += (part[c].x + part[c].y) + (part[c].z + part[c].w);
    }
#pragma unroll
    for (int c = 0; c < COUNT; c++) {
        const float sum = warp_sum(sums[c]);
        if (threadIdx.x % LANES == 0) factors[first + c] = call.squares ? rsqrtf(sum / float(call.inner) + call.epsilon) : 1.0f;
    }
}

// What a thread adds to the sum of its row and column, on its way while the tile is multiplied.
struct Added {
    float residual;
    float bias;
    float norm;
};

__device__ inline Added ask_added(const Product &call, uint32_t row, uint32_t column) {
    Added added = {};
    if (row < call.rows) {
        added.bias = call.bias ? __bfloat162float(call.bias[row]) : 0.0f;
        added.norm = __bfloat162float(call.norm[row]);
        if (column < call.columns) added.residual = call.residual[uint64_t(column) * call.rows + row];
    }
    return added;
}

// Where a thread stands among 16 rows and a group's columns: four warps have them.
__device__ inline uint32_t place_row() { return threadIdx.x % 128 / COLUMNS; }
__device__ inline uint32_t place_column() { return threadIdx.x % COLUMNS; }

// What becomes of the sums of 16 rows, the `sixteen`th, and a group's columns; `sum_of` gives that of a row of them. Where they are
// added, the first lane of each column gets the sum of its squares over the warp's four rows.
template <class Sum>
__device__ float finish(const Product &call, uint32_t sixteen, uint32_t group, const float *factors, const Added &added, Sum sum_of) {
    const uint32_t lane = threadIdx.x % LANES, total = call.rows + call.more_rows;
    const uint32_t i = place_row(), column = group * COLUMNS + place_column(), row = call.row(sixteen, i);
    const bool there = row < total && column < call.columns;
    if (call.kind == GATED) {
        if (i >= 8 || column >= call.columns || row >= call.rows / 2) return 0.0f;
        const float gate = sum_of(i) * factors[column], up = sum_of(i + 8) * factors[column];
        static_cast<bf16 *>(call.out)[uint64_t(column) * (call.rows / 2) + row] =
            __float2bfloat16(gate / (1.0f + __expf(-gate)) * up);
        return 0.0f;
    }
    float sum = sum_of(i);
    if (call.kind == STORE) {
        if (!there) return 0.0f;
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
            sum += added.residual + added.bias;
            call.residual[at] = sum;
            call.normed[at] = __float2bfloat16(sum * added.norm);
            square = sum * sum;
        }
        square += __shfl_xor_sync(~0u, square, 8);
        return square + __shfl_xor_sync(~0u, square, 16);
    }
    return 0.0f;
}
