// Turns the queries and keys of a prompt where libtorch's product has put them: by the index, or by positions that a layer's
// maps read, of which the last map is summed here. A block a token; a warp takes kv heads in turn, each with its queries.
// Arithmetic is in f32 and each result is rounded once. Mirrored in src/card/driver/turn.rs.

#include <cuda_bf16.h>

#include <cstdint>

#include "launch.cuh"

namespace turn {

constexpr int LANES = 32;
constexpr int THREADS = 256;
constexpr int WARPS = THREADS / LANES;
constexpr int INNER = 2048;  // the widest maps

using bf16 = __nv_bfloat16;

// Cosine and sine of the f32 product of position and frequency, reduced in full: in turns, in f64.
__device__ float2 angle_of(float position, float inverse) {
    const double turns = double(position * inverse) * 0.15915494309189533577;
    float sine, cosine;
    sincospif(float(2.0 * (turns - rint(turns))), &sine, &cosine);
    return make_float2(cosine, sine);
}

}  // namespace turn

using namespace turn;

struct Turn {
    bf16 *projected;       // [tokens][stride]: queries, keys, values
    const float *units;    // [tokens][2 * inner]: gates, then contents; null where the index counts
    const float *last;     // [kv_heads][inner]
    const float *index;    // [period]
    const float *inverse;  // [pairs]: angle of a position of 1
    uint32_t stride;
    uint32_t inner;
    uint32_t period;
    uint32_t kv_heads;
    uint32_t group;  // queries of a kv head
    uint32_t pairs;  // even
    float turned;    // what is turned grows by this (YaRN)
    uint32_t unused;
};

extern "C" __global__ void __launch_bounds__(THREADS) turn_heads(Turn call) {
    __shared__ float gated[INNER];
    const uint32_t token = blockIdx.x, warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    if (call.units) {
        const float *units = call.units + uint64_t(token) * 2 * call.inner;
        for (uint32_t i = threadIdx.x; i < call.inner; i += THREADS)
            gated[i] = units[i] / (1.0f + __expf(-units[i])) * units[call.inner + i];
        __syncthreads();
    }
    bf16 *row = call.projected + uint64_t(token) * call.stride;
    for (uint32_t kv_head = warp; kv_head < call.kv_heads; kv_head += WARPS) {
        float position = call.index[token % call.period];
        if (call.units) {
            float sum = 0.0f;
            for (uint32_t i = lane; i < call.inner; i += LANES) sum += gated[i] * call.last[kv_head * call.inner + i];
            position = warp_sum(sum);
        }
        for (uint32_t pair = 2 * lane; pair < call.pairs; pair += 2 * LANES) {
            float2 a = angle_of(position, call.inverse[pair]), b = angle_of(position, call.inverse[pair + 1]);
            a.x *= call.turned, a.y *= call.turned, b.x *= call.turned, b.y *= call.turned;
            for (uint32_t i = 0; i <= call.group; i++) {  // the key comes last
                const uint32_t head = i < call.group ? kv_head * call.group + i : call.kv_heads * call.group + kv_head;
                __nv_bfloat162 *first = reinterpret_cast<__nv_bfloat162 *>(row + head * 2 * call.pairs + pair);
                __nv_bfloat162 *second = first + call.pairs / 2;
                const float2 x = __bfloat1622float2(*first), y = __bfloat1622float2(*second);
                *first = __floats2bfloat162_rn(x.x * a.x - y.x * a.y, x.y * b.x - y.y * b.y);
                *second = __floats2bfloat162_rn(y.x * a.x + x.x * a.y, y.y * b.x + x.y * b.y);
            }
        }
    }
}

// Size of the struct above: the host's mirror must agree.
extern "C" __global__ void turn_sizes(uint32_t *sizes) { sizes[0] = sizeof(Turn); }
