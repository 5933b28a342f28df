// What a decode step does where a model lies on several cards: adds a sum over the ranks to the residual stream. Mirrored in
// src/card/ranks.rs.

#include <cuda_bf16.h>

#include <cstdint>

namespace {

constexpr int LANES = 32;
constexpr int THREADS = 512;
constexpr int WARPS = THREADS / LANES;

using bf16 = __nv_bfloat16;

}  // namespace

struct Join {
    const float *sums;   // [columns][width]: what a branch adds, of all ranks
    float *residual;     // [columns][width]
    const bf16 *norm;    // [width]: the next norm's weight
    bf16 *normed;        // [columns][width]: residual * norm
    float *squares;      // [columns][4]: of the residual stream, in the first of the four
    uint32_t width;      // a multiple of 4
    uint32_t unused;
};

// A block a column: what it gets depends on no other.
extern "C" __global__ void __launch_bounds__(THREADS) ranks_join(Join call) {
    __shared__ float parts[WARPS];
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
    const uint64_t from = uint64_t(blockIdx.x) * call.width;
    const float4 *sums = reinterpret_cast<const float4 *>(call.sums + from);
    float4 *residual = reinterpret_cast<float4 *>(call.residual + from);
    __nv_bfloat162 *normed = reinterpret_cast<__nv_bfloat162 *>(call.normed + from);
    const __nv_bfloat162 *norm = reinterpret_cast<const __nv_bfloat162 *>(call.norm);
    float square = 0.0f;
    for (uint32_t i = threadIdx.x; i < call.width / 4; i += THREADS) {
        const float4 added = sums[i];
        float4 x = residual[i];
        const float2 low = __bfloat1622float2(norm[2 * i]), high = __bfloat1622float2(norm[2 * i + 1]);
        x.x += added.x, x.y += added.y, x.z += added.z, x.w += added.w;
        residual[i] = x;
        normed[2 * i] = __floats2bfloat162_rn(x.x * low.x, x.y * low.y);
        normed[2 * i + 1] = __floats2bfloat162_rn(x.z * high.x, x.w * high.y);
        square += (x.x * x.x + x.y * x.y) + (x.z * x.z + x.w * x.w);
    }
#pragma unroll
    for (int i = LANES / 2; i > 0; i /= 2) square += __shfl_xor_sync(~0u, square, i);
    if (threadIdx.x % LANES == 0) parts[threadIdx.x / LANES] = square;
    __syncthreads();
    if (threadIdx.x > 0) return;
    for (int i = 1; i < WARPS; i++) square += parts[i];
    reinterpret_cast<float4 *>(call.squares)[blockIdx.x] = make_float4(square, 0.0f, 0.0f, 0.0f);
}

extern "C" __global__ void ranks_sizes(uint32_t *sizes) { sizes[0] = sizeof(Join); }
