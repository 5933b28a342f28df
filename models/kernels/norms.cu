// Norms that need all of a row before any of it goes on, and so cannot stand at the ends of products: those of OLMo 2, over
// what attention and MLP write, and over queries and keys whole. A block a column. Mirrored in src/card/driver/norms.rs.

#include <cuda_bf16.h>

#include <cstdint>

#include "launch.cuh"

namespace norms {

constexpr int LANES = 32;
constexpr int THREADS = 256;

using bf16 = __nv_bfloat16;

// The sum over the block. Every thread calls it.
__device__ float block_sum(float x) {
    __shared__ float sums[THREADS / LANES];
    x = warp_sum(x);
    if (threadIdx.x % LANES == 0) sums[threadIdx.x / LANES] = x;
    __syncthreads();
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < THREADS / LANES; i++) sum += sums[i];
    __syncthreads();
    return sum;
}

}  // namespace norms

using namespace norms;

struct AddNormed {
    const float *written;  // [columns][width]
    const bf16 *bias;      // [width], or null
    const bf16 *own;       // [width]: the weight of the norm over what is written
    float *residual;       // [columns][width]
    const bf16 *next;      // [width]: of the next norm's weight
    bf16 *normed;          // [columns][width]: residual * next
    float *squares;        // [columns][4]: of the residual, as step.cu reads them
    uint32_t width;
    float epsilon;
};

// residual += norm(written + bias).
extern "C" __global__ void __launch_bounds__(THREADS) norms_add(AddNormed call) {
    start_next();
    settle();
    const uint64_t at = uint64_t(blockIdx.x) * call.width;
    const auto written = [&](uint32_t i) {
        return call.written[at + i] + (call.bias ? __bfloat162float(call.bias[i]) : 0.0f);
    };
    float sum = 0.0f;
    for (uint32_t i = threadIdx.x; i < call.width; i += THREADS) sum += written(i) * written(i);
    const float factor = rsqrtf(block_sum(sum) / float(call.width) + call.epsilon);
    float square = 0.0f;
    for (uint32_t i = threadIdx.x; i < call.width; i += THREADS) {
        const float x = call.residual[at + i] + written(i) * factor * __bfloat162float(call.own[i]);
        call.residual[at + i] = x;
        call.normed[at + i] = __float2bfloat16(x * __bfloat162float(call.next[i]));
        square += x * x;
    }
    square = block_sum(square);
    if (threadIdx.x == 0) reinterpret_cast<float4 *>(call.squares)[blockIdx.x] = make_float4(square, 0.0f, 0.0f, 0.0f);
}

struct NormWhole {
    bf16 *projected;         // [columns][stride]: queries, keys, and what stays as it is
    const bf16 *weights[2];  // of all queries, of all keys
    uint32_t widths[2];
    uint32_t stride;
    float epsilon;
};

// Norms a column's queries, or its keys, where they lie: two blocks a column.
extern "C" __global__ void __launch_bounds__(THREADS) norms_whole(NormWhole call) {
    start_next();
    settle();
    const uint32_t keys = blockIdx.x % 2, width = keys ? call.widths[1] : call.widths[0];
    bf16 *row = call.projected + uint64_t(blockIdx.x / 2) * call.stride + (keys ? call.widths[0] : 0);
    const bf16 *weight = keys ? call.weights[1] : call.weights[0];
    float sum = 0.0f;
    for (uint32_t i = threadIdx.x; i < width; i += THREADS) {
        const float x = __bfloat162float(row[i]);
        sum += x * x;
    }
    const float factor = rsqrtf(block_sum(sum) / float(width) + call.epsilon);
    for (uint32_t i = threadIdx.x; i < width; i += THREADS)
        row[i] = __float2bfloat16(__bfloat162float(row[i]) * factor * __bfloat162float(weight[i]));
}

// Sizes of the structs above: the host's mirrors must agree.
extern "C" __global__ void norms_sizes(uint32_t *sizes) {
    sizes[0] = sizeof(AddNormed);
    sizes[1] = sizeof(NormWhole);
}
