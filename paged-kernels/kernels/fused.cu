// What stands between a layer's projections and its attention in a step of one token a text, in one launch: norms of queries
// and keys, rotary positions, the cache's rows, and the second layer of a surrogate with its drop bits.
//
// Arithmetic is in f32 and each result is rounded once, to the type that it is stored in.

#include "resident.cuh"

namespace fused {

constexpr int THREADS = WARPS * LANES;

}  // namespace fused

using namespace fused;

struct Fused {
    State state;
    View qkv;        // [1][texts][(Hq + 2 H) * dim]: queries, keys, values
    View positions;  // f32 [1 or H][texts][1]
    View queries;    // out: [Hq][texts][dim]
    const float *inverse;    // [dim / 2]: angle of a position of 1
    const void *query_norm;  // [dim], or null
    const void *key_norm;
    View units;              // [1][texts][width]: of the surrogate, before GELU
    const void *second;      // [H][width]
    const void *second_bias;  // [H]
    const uint32_t *rows;    // [H][texts]: the layer's, of Begin
    const uint64_t *marks;
    uint32_t texts;
    uint32_t group;
    uint32_t position_heads;
    uint32_t norm_type;
    uint32_t width;  // 0 without a surrogate
    uint32_t weight_type;
    float epsilon;
    float threshold;
    uint32_t torch;  // the surrogate rounds where torch's bf16 modules do
    uint32_t unused;
};

__device__ float warp_sum(float x) {
#pragma unroll
    for (int i = LANES / 2; i > 0; i /= 2) x += __shfl_xor_sync(~0u, x, i);
    return x;
}

__device__ float torch_round(float x, uint32_t torch) { return torch ? __bfloat162float(__float2bfloat16(x)) : x; }

// Cosine and sine of the f32 product of position and frequency, reduced in full: in turns, in f64.
__device__ float2 turn(float position, float inverse) {
    const double turns = double(position * inverse) * 0.15915494309189533577;
    float sine, cosine;
    sincospif(float(2.0 * (turns - rint(turns))), &sine, &cosine);
    return make_float2(cosine, sine);
}

// A row of queries or keys, normed and rotated, by a warp; dimension i is paired with i + dim / 2.
__device__ void rotate_row(const Fused &call, int64_t from, const void *norm, float position, void *to, uint32_t type,
                           int64_t at) {
    const uint32_t pairs = call.state.pool.dim / 2, lane = threadIdx.x % LANES;
    float scale = 1.0f;
    if (norm) {
        float squares = 0.0f;
        for (uint32_t i = lane; i < 2 * pairs; i += LANES) {
            const float x = load(call.qkv.data, call.qkv.type, from + i);
            squares += x * x;
        }
        scale = rsqrtf(warp_sum(squares) / float(2 * pairs) + call.epsilon);
    }
    for (uint32_t i = lane; i < pairs; i += LANES) {
        float x = load(call.qkv.data, call.qkv.type, from + i) * scale;
        float y = load(call.qkv.data, call.qkv.type, from + pairs + i) * scale;
        if (norm) {
            x *= load(norm, call.norm_type, i);
            y *= load(norm, call.norm_type, pairs + i);
        }
        const float2 angle = turn(position, call.inverse[i]);
        save(to, type, at + i, x * angle.x - y * angle.y);
        save(to, type, at + pairs + i, y * angle.x + x * angle.y);
    }
}

// A block a kv head of a text: its query heads and its key are a row a warp, then its value, then its score.
extern "C" __global__ void __launch_bounds__(THREADS) fused_append(Fused call) {
    __shared__ float sums[WARPS];
    const State &state = call.state;
    const Pool &pool = state.pool;
    const uint32_t text = blockIdx.x / state.kv_heads, kv_head = blockIdx.x % state.kv_heads;
    const uint32_t warp = threadIdx.x / LANES, query_heads = state.kv_heads * call.group;
    const uint32_t i = kv_head * call.texts + text, row = call.rows[i];
    if (row == NO_ROW) return;
    const int64_t key = pool.key(row), value = key + int64_t(pool.page_size) * pool.dim;
    const float position = load(call.positions.data, F32, call.positions.at(kv_head % call.position_heads, text));
    for (uint32_t r = warp; r <= call.group; r += WARPS) {
        const bool is_key = r == call.group;
        const uint32_t head = is_key ? query_heads + kv_head : kv_head * call.group + r;
        const int64_t from = call.qkv.at(0, text) + int64_t(head) * pool.dim;
        if (is_key) {
            rotate_row(call, from, call.key_norm, position, pool.data, pool.type, key);
        } else {
            rotate_row(call, from, call.query_norm, position, call.queries.data, call.queries.type,
                       call.queries.at(head, text));
        }
    }
    const int64_t from = call.qkv.at(0, text) + int64_t(query_heads + state.kv_heads + kv_head) * pool.dim;
    for (uint32_t d = threadIdx.x; d < pool.dim; d += THREADS) {
        save(pool.data, pool.type, value + d, load(call.qkv.data, call.qkv.type, from + d));
    }
    if (call.width == 0) return;
    float sum = 0.0f;
    for (uint32_t u = threadIdx.x; u < call.width; u += THREADS) {
        const float x = load(call.units.data, call.units.type, call.units.at(0, text) + u);
        const float gelu = torch_round(0.5f * x * (1.0f + erff(x * 0.70710678118654752f)), call.torch);
        sum += gelu * load(call.second, call.weight_type, int64_t(kv_head) * call.width + u);
    }
    sum = warp_sum(sum);
    if (threadIdx.x % LANES == 0) sums[warp] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        float score = load(call.second_bias, call.weight_type, kv_head);
#pragma unroll
        for (int w = 0; w < WARPS; w++) score += sums[w];
        // A NaN compares false, and stays.
        if (torch_round(score, call.torch) < call.threshold) state.rings[call.marks[i]] |= 1;
    }
}

// Size of the struct above: the host's mirror must agree.
extern "C" __global__ void fused_sizes(uint32_t *sizes) { sizes[0] = sizeof(Fused); }
