// Whether mma.sync and wgmma give a sum the same bits where columns come in the same sixteens, on a Hopper card:
//
//     nvcc -std=c++17 -I paged-kernels/kernels -gencode arch=compute_90a,code=sm_90a models/benches/same_bits.cu -o same_bits
//
// If they do, a step of few texts could take one and a step of many the other, and a text would not know.

#include <cuda_bf16.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "hopper.cuh"

using bf16 = __nv_bfloat16;

constexpr int INNER = 4096, ROWS = 64, COLUMNS = 64, ROUNDS = 8;

// A warp: 16 rows of a and 8 of b.
__global__ void by_warp(const bf16 *a, const bf16 *b, float *out) {
    const int lane = threadIdx.x, row = blockIdx.x * 16 + lane / 4, column = blockIdx.y * 8;
    float c[4] = {};
    for (int k = 0; k < INNER; k += 16) {
        auto pair = [&](const bf16 *rows, int row, int beyond) {
            return *reinterpret_cast<const uint32_t *>(rows + row * INNER + k + lane % 4 * 2 + beyond);
        };
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                     : "r"(pair(a, row, 0)), "r"(pair(a, row + 8, 0)), "r"(pair(a, row, 8)), "r"(pair(a, row + 8, 8)),
                       "r"(pair(b, column + lane / 4, 0)), "r"(pair(b, column + lane / 4, 8)));
    }
    for (int i = 0; i < 4; i++) out[(row + i / 2 * 8) * COLUMNS + column + lane % 4 * 2 + i % 2] = c[i];
}

// Four warps: all rows of both, 64 columns of which lie in shared memory at a time.
__global__ void by_group(const bf16 *a, const bf16 *b, float *out) {
    __shared__ __align__(1024) unsigned char tiles[2][ROWS * 128];
    const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
    float c[COLUMNS / 2] = {};
    for (int k = 0; k < INNER; k += 64) {
        __syncthreads();
        for (int i = threadIdx.x; i < 2 * ROWS * 8; i += 128) {
            const int which = i / (ROWS * 8), row = i / 8 % ROWS, chunk = i % 8;
            const bf16 *from = (which ? b : a) + row * INNER + k + chunk * 8;
            *reinterpret_cast<uint4 *>(tiles[which] + row * 128 + ((chunk ^ (row & 7)) << 4)) = *reinterpret_cast<const uint4 *>(from);
        }
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        __syncthreads();
        auto at = [&](int which) { return hopper::tile(uint32_t(__cvta_generic_to_shared(tiles[which]))); };
        hopper::wgmma_begin();
        for (int i = 0; i < 4; i++) hopper::wgmma<COLUMNS>(c, at(0) + i * 2, at(1) + i * 2);
        hopper::wgmma_commit();
        hopper::wgmma_wait<0>();
        hopper::wgmma_end(c);
    }
    for (int i = 0; i < COLUMNS / 2; i++) out[(row + i / 2 % 2 * 8) * COLUMNS + i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2] = c[i];
}

int main() {
    constexpr int SUMS = ROWS * COLUMNS;
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    std::vector<bf16> a(ROWS * INNER), b(COLUMNS * INNER);
    std::vector<float> sums[2] = {std::vector<float>(SUMS), std::vector<float>(SUMS)};
    bf16 *on_card[2];
    float *out[2];
    for (int i = 0; i < 2; i++) cudaMalloc(&on_card[i], a.size() * sizeof(bf16)), cudaMalloc(&out[i], SUMS * sizeof(float));
    for (int round = 0; round < ROUNDS; round++) {
        // Every second time of sizes that are 2^16 apart.
        auto draw = [&]() { return __float2bfloat16(std::ldexp(normal(random), round % 2 ? int(random() % 16) - 8 : 0)); };
        for (bf16 &x : a) x = draw();
        for (bf16 &x : b) x = draw();
        cudaMemcpy(on_card[0], a.data(), a.size() * sizeof(bf16), cudaMemcpyHostToDevice);
        cudaMemcpy(on_card[1], b.data(), b.size() * sizeof(bf16), cudaMemcpyHostToDevice);
        by_warp<<<dim3(ROWS / 16, COLUMNS / 8), 32>>>(on_card[0], on_card[1], out[0]);
        by_group<<<1, 128>>>(on_card[0], on_card[1], out[1]);
        for (int i = 0; i < 2; i++) cudaMemcpy(sums[i].data(), out[i], SUMS * sizeof(float), cudaMemcpyDeviceToHost);
        if (cudaError_t error = cudaGetLastError(); error != cudaSuccess) return std::puts(cudaGetErrorString(error)), 1;
        int differ = 0;
        for (int i = 0; i < SUMS; i++) differ += std::memcmp(&sums[0][i], &sums[1][i], sizeof(float)) != 0;
        std::printf("%d of %d sums differ; the first is %g\n", differ, SUMS, sums[0][0]);
    }
}
