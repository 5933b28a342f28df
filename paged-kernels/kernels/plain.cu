// Plain kernels: any head dim up to 512, any page size, f32, bf16 or fp16. The twin that fast kernels are held to on the
// card, and the way of shapes that have no fast kernel. Written for reading.
//
// Softmax is in f32, in a fixed order, so a result depends on its own head alone and is the same bits in every run.

#include "attend.cuh"

namespace plain {

constexpr uint32_t NO_ROW = 0xffffffffu;
constexpr int MOST_PER_LANE = 16;

}  // namespace plain

using namespace plain;

struct Store {
    Pool pool;
    View keys;
    View values;
    const uint32_t *rows;  // [heads][tokens], NO_ROW where a token is not kept
    uint32_t heads;
    uint32_t tokens;
};

// Keys and values of new tokens into their rows. A warp a row.
extern "C" __global__ void plain_store(Store call) {
    int64_t warps = int64_t(gridDim.x) * WARPS;
    int64_t count = int64_t(call.heads) * call.tokens;
    for (int64_t i = int64_t(blockIdx.x) * WARPS + threadIdx.x / LANES; i < count; i += warps) {
        uint32_t row = call.rows[i];
        if (row == NO_ROW) continue;
        int64_t head = i / call.tokens, token = i % call.tokens;
        store_row(call.pool, call.keys, call.values, head, token, row);
    }
}

struct Move {
    Pool pool;
    const uint32_t *rows;  // [count][2]: from, to; no row is in two of them
    uint64_t count;
};

// Rows into the holes that a burst of dropped tokens has left.
extern "C" __global__ void plain_move(Move call) {
    int64_t warps = int64_t(gridDim.x) * WARPS;
    for (int64_t i = int64_t(blockIdx.x) * WARPS + threadIdx.x / LANES; i < int64_t(call.count); i += warps) {
        copy_row(call.pool, call.rows[2 * i], call.rows[2 * i + 1]);
    }
}

// The result of a row from its sums: one element, and with the first the logarithm.
__device__ void finish(const Attend &call, uint32_t query_head, uint32_t token, uint32_t d, float x, float most,
                              float total) {
    save(call.out.data, call.out.type, call.out.at(query_head, token) + d, total == 0.0f ? 0.0f : x / total);
    if (call.lse && d == 0) {
        call.lse[uint64_t(query_head) * call.tokens + token] = total == 0.0f ? -INFINITY : most + logf(total);
    }
}

// A block a query row. Its warps take every fourth slot each and are merged in their order.
extern "C" __global__ void __launch_bounds__(WARPS *LANES) plain_attend(Attend call) {
    __shared__ float best[WARPS], sums[WARPS];
    extern __shared__ float rows[];  // [WARPS][dim]
    const uint32_t query_head = blockIdx.x / call.tokens, token = blockIdx.x % call.tokens;
    const uint32_t kv_head = query_head / call.group, dim = call.pool.dim, page_size = call.pool.page_size;
    const Head head = call.heads[uint64_t(kv_head) * call.sequences + call.owners[token]];
    const uint32_t *slots = call.slots + uint64_t(kv_head) * call.tokens;
    const uint32_t end = head.first + head.tokens;
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;

    // Tokens that were appended in their order hide the head's end from those before them. Others are looked for.
    bool appended = true;
    for (uint32_t i = token + 1 + threadIdx.x; i < end; i += blockDim.x) appended &= slots[i] == head.len - (end - i);
    appended = __syncthreads_and(appended);
    const uint32_t len = appended ? head.len - (end - 1 - token) : head.len;

    float query[MOST_PER_LANE], sum[MOST_PER_LANE];
#pragma unroll
    for (int i = 0; i < MOST_PER_LANE; i++) {
        uint32_t d = lane + i * LANES;
        query[i] = d < dim ? load(call.queries.data, call.queries.type, call.queries.at(query_head, token) + d) : 0.0f;
        sum[i] = 0.0f;
    }
    const int64_t page_elements = call.pool.page();
    const bool eight = call.pool.type == F8;
    float most = -INFINITY, total = 0.0f;
    for (uint32_t slot = warp; slot < len; slot += WARPS) {
        bool later = false;
        for (uint32_t i = token + 1; i < end && !appended; i++) later |= slots[i] == slot;
        if (later) continue;
        const int64_t page = call.tables[head.table + slot / page_size] * page_elements;
        const int64_t key = page + slot % page_size * dim, value = key + page_size * dim;
        float score = 0.0f;
#pragma unroll
        for (int i = 0; i < MOST_PER_LANE; i++) {
            uint32_t d = lane + i * LANES;
            if (d < dim) score += query[i] * load(call.pool.data, call.pool.type, key + d);
        }
        for (int i = LANES / 2; i > 0; i /= 2) score += __shfl_xor_sync(~0u, score, i);
        const float *scales = reinterpret_cast<const float *>(static_cast<const char *>(call.pool.data) + page + page_elements) -
                              2 * page_size + slot % page_size;
        score *= eight ? call.scale * scales[0] : call.scale;
        float raised = fmaxf(most, score);
        // Of minus infinity from itself there is no difference; a NaN goes through to the sums.
        float fade = most == -INFINITY ? 0.0f : expf(most - raised);
        float weight = score == -INFINITY ? 0.0f : expf(score - raised);
        most = raised;
        total = total * fade + weight;
        if (eight) weight *= scales[page_size];
#pragma unroll
        for (int i = 0; i < MOST_PER_LANE; i++) {
            uint32_t d = lane + i * LANES;
            if (d < dim) sum[i] = sum[i] * fade + weight * load(call.pool.data, call.pool.type, value + d);
        }
    }

#pragma unroll
    for (int i = 0; i < MOST_PER_LANE; i++) {
        uint32_t d = lane + i * LANES;
        if (d < dim) rows[warp * dim + d] = sum[i];
    }
    if (lane == 0) {
        best[warp] = most;
        sums[warp] = total;
    }
    __syncthreads();
    most = -INFINITY;
    for (int w = 0; w < WARPS; w++) most = fmaxf(most, best[w]);
    float weights[WARPS];
    total = 0.0f;
    for (int w = 0; w < WARPS; w++) {
        weights[w] = best[w] == -INFINITY ? 1.0f : expf(best[w] - most);  // then its sums are 0, or NaN
        total += sums[w] * weights[w];
    }
    for (uint32_t d = threadIdx.x; d < dim; d += blockDim.x) {
        float x = 0.0f;
        for (int w = 0; w < WARPS; w++) x += rows[w * dim + d] * weights[w];
        finish(call, query_head, token, d, x, most, total);
    }
}

// Sizes of the structs above, in their order: the host's mirror must agree.
extern "C" __global__ void plain_sizes(uint32_t *sizes) {
    sizes[0] = sizeof(View);
    sizes[1] = sizeof(Pool);
    sizes[2] = sizeof(Store);
    sizes[3] = sizeof(Move);
    sizes[4] = sizeof(Head);
    sizes[5] = sizeof(Attend);
}
