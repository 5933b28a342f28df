// Draws each column's next token: the likeliest, or by chance after temperature, top_k and top_p. A block a column, so what a
// column draws is the same whatever its neighbours. Mirrored in src/card/driver.rs.
//
// Nothing is sorted: a threshold is found by halving the scores' range, for the k-th score, for the nucleus, and for the
// token itself, which is the one whose share of all probability, from the top, covers the random number. Shares are whole
// numbers, so that their sums do not depend on their order. Equal scores at a threshold stay together.

#include "rank.cuh"

namespace sample {

constexpr int LANES = 32;
constexpr int THREADS = 1024;
constexpr int WARPS = THREADS / LANES;
constexpr int CUTS = 3;  // of a range, in one pass over the scores
constexpr float UNIT = 4294967296.0f;  // the likeliest token's share

}  // namespace sample

using namespace sample;

struct Sample {
    const float *scores;       // [columns][rows]
    unsigned long long *best;  // [columns]: of the scores, `ranked`; zero afterwards
    const float *temperatures;  // [columns]: 0 takes the best
    const uint32_t *tops;      // [columns]: of so many; 0 is no limit
    const float *nuclei;       // [columns]: of those that reach this probability
    const double *randoms;     // [columns]: from 0 up to 1
    uint32_t *tokens;          // [columns]: chosen; all bits set where a score was NaN
    float *positions;          // [columns]: one further
    uint32_t rows;
    uint32_t vocabulary;
};

struct Column {
    const float *scores;
    uint32_t count;
    float most;
    float scale;
    uint32_t floor;  // scores below it are out

    // A score's share of probability, or one for each.
    __device__ unsigned long long share(float score, uint32_t order, bool by_count) const {
        if (order < floor) return 0;
        return by_count ? 1 : (unsigned long long)(expf((score - most) * scale) * UNIT);
    }
};

// Sums over the block of numbers that each thread has.
template <int N>
__device__ void block_sum(unsigned long long (&x)[N]) {
    __shared__ unsigned long long parts[N][WARPS];
#pragma unroll
    for (int n = 0; n < N; n++) {
        for (int i = LANES / 2; i > 0; i /= 2) x[n] += __shfl_xor_sync(~0u, x[n], i);
        if (threadIdx.x % LANES == 0) parts[n][threadIdx.x / LANES] = x[n];
    }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < N; n++) {
        x[n] = parts[n][threadIdx.x % LANES];
        for (int i = LANES / 2; i > 0; i /= 2) x[n] += __shfl_xor_sync(~0u, x[n], i);
    }
    __syncthreads();
}

__device__ unsigned long long total(const Column &column) {
    unsigned long long sum[1] = {};
    for (uint32_t i = threadIdx.x; i < column.count; i += THREADS)
        sum[0] += column.share(column.scores[i], order_of(column.scores[i]), false);
    block_sum(sum);
    return sum[0];
}

// The highest order for which those from it on have `wanted` of all shares.
__device__ uint32_t threshold(const Column &column, unsigned long long wanted, bool by_count) {
    uint32_t low = column.floor, high = order_of(column.most);  // it is at least one, at most the other
    while (low < high) {
        uint32_t cuts[CUTS];
        const uint32_t span = high - low;
#pragma unroll
        for (int c = 0; c < CUTS; c++) cuts[c] = low + max(1u, uint32_t(uint64_t(span) * (c + 1) / (CUTS + 1)));
        unsigned long long sums[CUTS] = {};
        for (uint32_t i = threadIdx.x; i < column.count; i += THREADS) {
            const float score = column.scores[i];
            const uint32_t order = order_of(score);
            if (order < cuts[0]) continue;
            const unsigned long long share = column.share(score, order, by_count);
#pragma unroll
            for (int c = 0; c < CUTS; c++) sums[c] += order >= cuts[c] ? share : 0;
        }
        block_sum(sums);
        uint32_t above = high;
#pragma unroll
        for (int c = CUTS - 1; c >= 0; c--) {
            if (sums[c] >= wanted) {
                low = cuts[c];
                break;
            }
            above = cuts[c] - 1;
        }
        high = max(above, low);
    }
    return low;
}

extern "C" __global__ void __launch_bounds__(THREADS) sample_draw(Sample call) {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
    __shared__ uint32_t drawn;
    const uint32_t at = blockIdx.x, rows = call.rows;
    const unsigned long long best = call.best[at];
    uint32_t token = ~uint32_t(best);
    const float temperature = call.temperatures[at];
    if (best >> 32 == ~0u) {
        token = ~0u;
    } else if (temperature > 0.0f && call.tops[at] != 1) {
        Column column = {call.scores + uint64_t(at) * rows, min(rows, call.vocabulary), score_of(best >> 32),
                         1.0f / temperature, 0};
        if (call.tops[at] > 0 && call.tops[at] < column.count) column.floor = threshold(column, call.tops[at], true);
        unsigned long long all = total(column);
        if (call.nuclei[at] < 1.0f) {
            const auto wanted = (unsigned long long)ceil(double(call.nuclei[at]) * double(all));
            column.floor = threshold(column, max(wanted, 1ull), false);
            all = total(column);
        }
        const auto wanted = (unsigned long long)(call.randoms[at] * double(all)) + 1;
        const uint32_t order = threshold(column, min(wanted, all), false);
        if (threadIdx.x == 0) drawn = ~0u;
        __syncthreads();
        for (uint32_t i = threadIdx.x; i < column.count; i += THREADS)
            if (order_of(column.scores[i]) == order) atomicMin(&drawn, i);
        __syncthreads();
        token = drawn;
    }
    __syncthreads();  // all have read what is reset
    if (threadIdx.x > 0) return;
    call.best[at] = 0;
    call.tokens[at] = token;
    call.positions[at] += 1.0f;
}

extern "C" __global__ void sample_sizes(uint32_t *sizes) { sizes[0] = sizeof(Sample); }
