// What stands between a layer's projections and its attention in a step of one token a text, in one launch: norms of queries
// and keys, rotary positions, the cache's rows, and the second layer of a surrogate with its drop bits.
//
// A warp has a task: the score of a kv head, the row of a query head, of a key or of a value. All that a task reads is on
// its way at once, its row's number too, and no warp waits for another: blocks that did a kv head's tasks in turn took
// twice as long. Arithmetic is in f32 and each result is rounded once, to the type that it is stored in.

#include "resident.cuh"

namespace fused {

constexpr int THREADS = WARPS * LANES;
constexpr int PAIRS = 8;  // of a row, that a lane holds at most
constexpr int UNITS = 16;  // of a surrogate, that a lane has on their way at once
constexpr int READ = 8;    // of what positions are read from

}  // namespace fused

using namespace fused;

struct Fused {
    State state;
    View qkv;        // [1][texts][(Hq + 2 H) * dim]: queries, keys, values
    View positions;  // f32 [1 or H][texts][1]; or what they are read from, [1][texts][2 * read]: gates, then contents
    View queries;    // out: [Hq][texts][dim]
    const float *inverse;    // [dim / 2]: angle of a position of 1
    const void *query_norm;  // [dim], or null
    const void *key_norm;
    View units;              // [1][texts][width]: of the surrogate, before GELU
    const void *second;      // [H][width]; null where the units are the scores, one for each kv head
    const void *second_bias;  // [H]
    const void *last;        // [H][read], of what is read from gates and contents
    const float *index;      // [texts]: stands beside what is read; or null
    const uint32_t *rows;    // [H][texts]: the layer's, of Begin
    const uint64_t *marks;
    uint32_t texts;
    uint32_t group;
    uint32_t position_heads;
    uint32_t read;
    uint32_t last_type;
    uint32_t norm_type;
    uint32_t width;  // 0 without a surrogate
    uint32_t weight_type;
    float epsilon;
    float threshold;
    uint32_t torch;  // the surrogate rounds where torch's bf16 modules do
    float turned;    // what is turned grows by this (YaRN)
    float of_read;   // what is read is multiplied by this, and the index by that
    float of_index;
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

__device__ float widen(float x) { return x; }
__device__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ float widen(__half x) { return __half2float(x); }

// Calls `work` with a pointer of the type that a number stands for, so that loads in it need not ask each time.
template <class Work>
__device__ void typed(const void *data, uint32_t type, Work work) {
    if (type == F32) work(static_cast<const float *>(data));
    else if (type == BF16) work(static_cast<const __nv_bfloat16 *>(data));
    else work(static_cast<const __half *>(data));
}

// A lane's elements of a row from `at` on: x[k] and y[k] are `pairs` apart.
__device__ void load_pairs(const void *data, uint32_t type, int64_t at, uint32_t pairs, float (&x)[PAIRS],
                           float (&y)[PAIRS]) {
    typed(data, type, [&](auto *from) {
#pragma unroll
        for (int k = 0; k < PAIRS; k++) {
            const uint32_t i = threadIdx.x % LANES + k * LANES;
            x[k] = i < pairs ? widen(from[at + i]) : 0.0f;
            y[k] = i < pairs ? widen(from[at + pairs + i]) : 0.0f;
        }
    });
}

// A lane's elements of a row of `width` that begins at `at`, from `base` on.
template <int COUNT>
__device__ void load_units(const void *data, uint32_t type, int64_t at, uint32_t width, uint32_t base,
                           float (&x)[COUNT]) {
    typed(data, type, [&](auto *from) {
#pragma unroll
        for (int k = 0; k < COUNT; k++) {
            const uint32_t i = base + threadIdx.x % LANES + k * LANES;
            x[k] = i < width ? widen(from[at + i]) : 0.0f;
        }
    });
}

// The score of a kv head: the surrogate's second layer, and its drop bit.
__device__ void score(const Fused &call, uint32_t i, uint32_t kv_head, uint32_t text) {
    const uint32_t lane = threadIdx.x % LANES, row = call.rows[i];
    const uint64_t mark = call.marks[i];
    float sum = 0.0f;
    if (!call.second) {
        settle();
        sum = load(call.units.data, call.units.type, call.units.at(0, text) + kv_head);
    } else {
        const float bias = load(call.second_bias, call.weight_type, kv_head);
        const int64_t weights = int64_t(kv_head) * call.width, units = call.units.at(0, text);
        float x[UNITS], weight[UNITS];
        load_units(call.second, call.weight_type, weights, call.width, 0, weight);
        settle();
        for (uint32_t base = 0; base < call.width; base += UNITS * LANES) {
            if (base > 0) load_units(call.second, call.weight_type, weights, call.width, base, weight);
            load_units(call.units.data, call.units.type, units, call.width, base, x);
#pragma unroll
            for (int k = 0; k < UNITS; k++) {
                const float gelu = 0.5f * x[k] * (1.0f + erff(x[k] * 0.70710678118654752f));
                sum += torch_round(gelu, call.torch) * weight[k];
            }
        }
        sum = bias + warp_sum(sum);
    }
    // A NaN compares false, and stays.
    if (lane == 0 && row != NO_ROW && torch_round(sum, call.torch) < call.threshold) call.state.rings[mark] |= 1;
}

// Where a kv head's token stands by its maps, last · (silu(gate) * content), and by its index, if that counts. The first
// `weight`s are there already.
__device__ float read_position(const Fused &call, uint32_t kv_head, uint32_t text, float (&weight)[READ]) {
    const int64_t at = call.positions.at(0, text), weights = int64_t(kv_head) * call.read;
    float sum = 0.0f, gate[READ], content[READ];
    for (uint32_t base = 0; base < call.read; base += READ * LANES) {
        if (base > 0) load_units(call.last, call.last_type, weights, call.read, base, weight);
        load_units(call.positions.data, call.positions.type, at, call.read, base, gate);
        load_units(call.positions.data, call.positions.type, at + call.read, call.read, base, content);
#pragma unroll
        for (int k = 0; k < READ; k++) sum += gate[k] / (1.0f + __expf(-gate[k])) * content[k] * weight[k];
    }
    const float position = warp_sum(sum);
    return call.index ? call.of_read * position + call.of_index * call.index[text] : position;
}

template <bool READS>
__device__ void append(const Fused &call) {
    start_next();
    const State &state = call.state;
    const Pool &pool = state.pool;
    const uint32_t count = state.kv_heads * call.texts, task = blockIdx.x * WARPS + threadIdx.x / LANES;
    uint32_t kind = task / count;  // the longest first: the score, if there is one, then queries, key, value
    const uint32_t i = task - kind * count, kv_head = i / call.texts, text = i - kv_head * call.texts;
    if (call.width > 0 && kind-- == 0) return score(call, i, kv_head, text);
    if (kind > call.group + 1) return;
    const bool is_query = kind < call.group, is_value = kind > call.group;
    const uint32_t query_heads = state.kv_heads * call.group, pairs = pool.dim / 2;
    const uint32_t head = is_query ? kv_head * call.group + kind
                                   : query_heads + (is_value ? state.kv_heads : 0) + kv_head;
    const uint32_t row = call.rows[i];
    // What the kernel before does not write is on its way before that has ended.
    const void *norm = is_query ? call.query_norm : call.key_norm;
    float x[PAIRS], y[PAIRS], a[PAIRS], b[PAIRS], inverse[PAIRS];
    if (!is_value && norm) load_pairs(norm, call.norm_type, 0, pairs, a, b);
#pragma unroll
    for (int k = 0; k < PAIRS; k++) {
        const uint32_t at = threadIdx.x % LANES + k * LANES;
        inverse[k] = at < pairs && !is_value ? call.inverse[at] : 0.0f;
    }
    float weight[READ];
    if (READS && !is_value) load_units(call.last, call.last_type, int64_t(kv_head) * call.read, call.read, 0, weight);
    settle();
    load_pairs(call.qkv.data, call.qkv.type, call.qkv.at(0, text) + int64_t(head) * pool.dim, pairs, x, y);
    if (!is_value) {
        const float position =
            READS ? read_position(call, kv_head, text, weight)
                  : load(call.positions.data, F32, call.positions.at(kv_head % call.position_heads, text));
        if (norm) {
            float squares = 0.0f;
#pragma unroll
            for (int k = 0; k < PAIRS; k++) squares += x[k] * x[k] + y[k] * y[k];
            const float scale = rsqrtf(warp_sum(squares) / float(2 * pairs) + call.epsilon);
#pragma unroll
            for (int k = 0; k < PAIRS; k++) x[k] *= scale * a[k], y[k] *= scale * b[k];
        }
#pragma unroll
        for (int k = 0; k < PAIRS; k++) {
            if (k * LANES >= pairs) break;
            float2 angle = turn(position, inverse[k]);
            angle.x *= call.turned, angle.y *= call.turned;
            const float from = x[k];
            x[k] = from * angle.x - y[k] * angle.y;
            y[k] = y[k] * angle.x + from * angle.y;
        }
    }
    if (row == NO_ROW) return;
    const int64_t at = is_query ? call.queries.at(head, text) : pool.key_or_value(row, is_value);
    if (!is_query && pool.type == F8) {
        float most = 0.0f, odd = 0.0f;
#pragma unroll
        for (int k = 0; k < PAIRS; k++) {
            most = fmaxf(most, fmaxf(fabsf(x[k]), fabsf(y[k])));
            odd += (x[k] - x[k]) + (y[k] - y[k]);
        }
        const float scale = row_scale(most, odd);
        if (threadIdx.x % LANES == 0) *pool.scale(row, is_value) = scale;
        const float inverse = 1.0f / scale;
#pragma unroll
        for (int k = 0; k < PAIRS; k++) x[k] *= inverse, y[k] *= inverse;
    }
    void *to = is_query ? call.queries.data : pool.data;
    const uint32_t type = is_query ? call.queries.type : pool.type;
#pragma unroll
    for (int k = 0; k < PAIRS; k++) {
        const uint32_t pair = threadIdx.x % LANES + k * LANES;
        if (pair < pairs) save(to, type, at + pair, x[k]), save(to, type, at + pairs + pair, y[k]);
    }
}

// Two kernels, since the registers that reading takes would leave the products of a step no room beside the other.
extern "C" __global__ void __launch_bounds__(THREADS) fused_append(Fused call) { append<false>(call); }
extern "C" __global__ void __launch_bounds__(THREADS) fused_append_reading(Fused call) { append<true>(call); }

// Size of the struct above: the host's mirror must agree.
extern "C" __global__ void fused_sizes(uint32_t *sizes) { sizes[0] = sizeof(Fused); }
