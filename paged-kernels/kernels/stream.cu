// Decode attention at the speed of memory: bf16, pages of 16 rows, one new token a sequence, up to 16 query heads a kv
// head. Computes what plain_attend computes, with sums in f32 and probabilities rounded to bf16 for the product.
//
// The pages of a layer lie in one list, head after head. Each block takes an equal share of that list, whatever heads it
// cuts (stream-K). In a block each warp takes every fourth page through a pipeline of its own: 16-byte asynchronous
// copies into swizzled shared memory, then mma.sync with the query heads as rows. What a block has of a head that it
// shares with others goes to a workspace; the last of them to arrive folds the parts in the order of the blocks, so the
// same inputs give the same bits. Shares move when a neighbour grows, and then a head's bits may change.

#include "attend.cuh"

namespace {

constexpr int PAGE = 16;
constexpr int STAGES = 3;
constexpr int ROWS = 16;
constexpr float LOG2E = 1.4426950408889634f;
constexpr float LN2 = 0.6931471805599453f;

__device__ uint32_t shared_address(const void *p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

__device__ void copy16(uint32_t to, const void *from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

__device__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int N>
__device__ void wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

__device__ void load_matrices(uint32_t (&r)[4], uint32_t from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(from)
                 : "memory");
}

__device__ void load_transposed(uint32_t (&r)[4], uint32_t from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(from)
                 : "memory");
}

__device__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ uint32_t pack(float low, float high) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<uint32_t *>(&pair);
}

__device__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ float quad_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

// Of minus infinity from itself there is no difference.
__device__ float fade(float from, float to) { return from == -INFINITY ? 0.0f : exp2f(from - to); }

// Where a 16-byte chunk of a row lies, so that eight rows of one chunk fall into all banks.
template <int D>
__device__ uint32_t swizzled(uint32_t row, uint32_t chunk) {
    return row * D * 2 + ((chunk ^ (row & 7)) << 4);
}

template <int D>
__device__ void stream_attend(const Stream &call) {
    constexpr int CHUNKS = D / 8;
    constexpr int HALF = PAGE * D * 2;  // bytes of a page's keys
    constexpr int STEPS = D / 16;
    extern __shared__ __align__(128) unsigned char shared[];
    __shared__ uint32_t arrived;
    const Attend &attend = call.attend;
    const uint32_t group = attend.group;
    float *merged = reinterpret_cast<float *>(shared + WARPS * STAGES * 2 * HALF);  // [WARPS][group][D]
    float *bests = merged + WARPS * group * D;                                      // [WARPS][group]
    float *sums = bests + WARPS * group;

    const uint32_t block = blockIdx.x, total = call.shares[0], blocks = call.shares[1];
    if (block >= blocks) return;
    uint32_t index = call.shares[2 + block];
    const uint32_t begin = uint64_t(total) * block / blocks, end = uint64_t(total) * (block + 1) / blocks;
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    const uint32_t stage0 = shared_address(shared) + warp * STAGES * 2 * HALF;
    const auto *pool = static_cast<const unsigned char *>(attend.pool.data);

    // The warp's pages are begin + warp, every fourth; `ahead` is the next to be fetched, its number known early.
    uint32_t ahead = begin + warp, filled = 0, used = 0;
    uint32_t id = ahead < end ? attend.pages[ahead] : 0;
    auto fetch = [&]() {
        if (ahead < end) {
            const unsigned char *page = pool + uint64_t(id) * 2 * HALF;
            uint32_t to = stage0 + filled * 2 * HALF;
#pragma unroll
            for (int i = 0; i < 2 * CHUNKS * PAGE / LANES; i++) {
                uint32_t chunk = i * LANES + lane, row = chunk / CHUNKS;  // keys, then values: 32 rows
                copy16(to + swizzled<D>(row, chunk % CHUNKS), page + chunk * 16);
            }
        }
        commit();
        ahead += WARPS;
        filled = filled + 1 == STAGES ? 0 : filled + 1;
        if (ahead < end) id = attend.pages[ahead];
    };
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) fetch();

    const float scale = attend.scale * LOG2E;
    uint32_t page = begin + warp;
    for (uint32_t at = begin; at < end; index++) {
        const Head head = attend.heads[index];
        const uint32_t first = uint32_t(head.pages), last = first + (head.len + PAGE - 1) / PAGE;
        if (last <= at || head.tokens == 0) continue;
        const uint32_t stop = min(last, end), kv_head = index / attend.sequences;
        const uint32_t r0 = lane / 4, r1 = r0 + 8;

        uint32_t query[STEPS][4];
        const auto *queries = static_cast<const __nv_bfloat16 *>(attend.queries.data);
        const __nv_bfloat16 *q0 = queries + attend.queries.at(kv_head * group + r0, head.first) + lane % 4 * 2;
        const __nv_bfloat16 *q1 = q0 + 8 * attend.queries.head_stride;
#pragma unroll
        for (int k = 0; k < STEPS; k++) {
            query[k][0] = r0 < group ? *reinterpret_cast<const uint32_t *>(q0 + k * 16) : 0;
            query[k][1] = r1 < group ? *reinterpret_cast<const uint32_t *>(q1 + k * 16) : 0;
            query[k][2] = r0 < group ? *reinterpret_cast<const uint32_t *>(q0 + k * 16 + 8) : 0;
            query[k][3] = r1 < group ? *reinterpret_cast<const uint32_t *>(q1 + k * 16 + 8) : 0;
        }
        float out[D / 8][4];
#pragma unroll
        for (int i = 0; i < D / 8; i++) out[i][0] = out[i][1] = out[i][2] = out[i][3] = 0.0f;
        float best0 = -INFINITY, best1 = -INFINITY, sum0 = 0.0f, sum1 = 0.0f;

        for (; page < stop; page += WARPS) {
            wait<STAGES - 2>();
            __syncwarp();
            fetch();
            const uint32_t keys = stage0 + used * 2 * HALF, values = keys + HALF;
            used = used + 1 == STAGES ? 0 : used + 1;
            float score[2][4] = {};
            const uint32_t key_row = lane / 16 * 8 + lane % 8, key_chunk = lane / 8 & 1;
#pragma unroll
            for (int k = 0; k < STEPS; k++) {
                uint32_t b[4];
                load_matrices(b, keys + swizzled<D>(key_row, 2 * k + key_chunk));
                multiply(score[0], query[k], b[0], b[1]);
                multiply(score[1], query[k], b[2], b[3]);
            }
            const uint32_t live = head.len - (page - first) * PAGE;
#pragma unroll
            for (int i = 0; i < 2; i++) {
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    uint32_t row = i * 8 + lane % 4 * 2 + (j & 1);
                    score[i][j] = row < live ? score[i][j] * scale : -INFINITY;
                }
            }
            if (live < PAGE) {
                // What lies past the end may be NaN, which a weight of 0 does not silence.
                for (uint32_t i = live * CHUNKS + lane; i < PAGE * CHUNKS; i += LANES) {
                    uint32_t to = values + swizzled<D>(i / CHUNKS, i % CHUNKS);
                    asm volatile("st.shared.v4.b32 [%0], {%1,%1,%1,%1};" ::"r"(to), "r"(0) : "memory");
                }
                __syncwarp();
            }
            float raised0 = fmaxf(best0, quad_max(fmaxf(fmaxf(score[0][0], score[0][1]), fmaxf(score[1][0], score[1][1]))));
            float raised1 = fmaxf(best1, quad_max(fmaxf(fmaxf(score[0][2], score[0][3]), fmaxf(score[1][2], score[1][3]))));
            float base0 = raised0 == -INFINITY ? 0.0f : raised0, base1 = raised1 == -INFINITY ? 0.0f : raised1;
            float fade0 = fade(best0, base0), fade1 = fade(best1, base1);
            best0 = raised0;
            best1 = raised1;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                score[i][0] = exp2f(score[i][0] - base0);
                score[i][1] = exp2f(score[i][1] - base0);
                score[i][2] = exp2f(score[i][2] - base1);
                score[i][3] = exp2f(score[i][3] - base1);
            }
            sum0 = sum0 * fade0 + (score[0][0] + score[0][1]) + (score[1][0] + score[1][1]);
            sum1 = sum1 * fade1 + (score[0][2] + score[0][3]) + (score[1][2] + score[1][3]);
            const uint32_t weights[4] = {pack(score[0][0], score[0][1]), pack(score[0][2], score[0][3]),
                                         pack(score[1][0], score[1][1]), pack(score[1][2], score[1][3])};
            const uint32_t value_row = (lane / 8 & 1) * 8 + lane % 8, value_chunk = lane / 16;
#pragma unroll
            for (int i = 0; i < D / 16; i++) {
                uint32_t b[4];
                load_transposed(b, values + swizzled<D>(value_row, 2 * i + value_chunk));
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    float(&o)[4] = out[2 * i + j];
                    o[0] *= fade0;
                    o[1] *= fade0;
                    o[2] *= fade1;
                    o[3] *= fade1;
                    multiply(o, weights, b[2 * j], b[2 * j + 1]);
                }
            }
        }

        // The four warps' parts into one.
        sum0 = quad_sum(sum0);
        sum1 = quad_sum(sum1);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const uint32_t row = half ? r1 : r0;
            if (row >= group) continue;
            float *to = merged + (warp * group + row) * D + lane % 4 * 2;
#pragma unroll
            for (int i = 0; i < D / 8; i++) {
                *reinterpret_cast<float2 *>(to + i * 8) = make_float2(out[i][2 * half], out[i][2 * half + 1]);
            }
            if (lane % 4 == 0) {
                bests[warp * group + row] = half ? best1 : best0;
                sums[warp * group + row] = half ? sum1 : sum0;
            }
        }
        __syncthreads();
        const uint64_t wide = blocks;
        const uint32_t from = ((first + 1) * wide - 1) / total, to = (last * wide - 1) / total;
        const bool whole = from == to;
        float *part = call.parts + uint64_t(2 * block + (at == begin ? 0 : 1)) * ROWS * (D + 2);
        for (uint32_t i = threadIdx.x; i < group * D; i += WARPS * LANES) {
            const uint32_t row = i / D;
            float best = -INFINITY, sum = 0.0f, x = 0.0f;
#pragma unroll
            for (int w = 0; w < WARPS; w++) best = fmaxf(best, bests[w * group + row]);
#pragma unroll
            for (int w = 0; w < WARPS; w++) {
                // Without a finite score the sums are 0, or NaN, and stay so.
                float weight = bests[w * group + row] == -INFINITY ? 1.0f : exp2f(bests[w * group + row] - best);
                sum += sums[w * group + row] * weight;
                x += merged[(w * group + row) * D + i % D] * weight;
            }
            if (whole) {
                finish(attend, kv_head * group + row, head.first, i % D, x, best * LN2, sum);
            } else {
                part[i] = x;
                if (i % D == 0) {
                    part[group * D + row] = best;
                    part[group * D + group + row] = sum;
                }
            }
        }
        if (!whole) {
            __threadfence();
            __syncthreads();
            if (threadIdx.x == 0) arrived = atomicAdd(call.arrivals + index, 1u);
            __syncthreads();
            if (arrived == to - from) {
                __threadfence();
                const uint32_t opening = uint64_t(total) * from / blocks, count = to - from + 1;
                // Where the parts of a block lie: the first to own pages of the head may have those of another before.
                auto part_of = [&](uint32_t i) {
                    const bool second = i == 0 && first > opening;
                    return call.parts + uint64_t(2 * (from + i) + second) * ROWS * (D + 2);
                };
                // Each part's weight, [count][group], in place of the warps' sums: count is at most WARPS * D.
                float *weights = merged;
                for (uint32_t i = threadIdx.x; i < count * group; i += WARPS * LANES) {
                    weights[i] = __ldcg(part_of(i / group) + group * D + i % group);
                }
                __syncthreads();
                if (threadIdx.x < group) {
                    float best = -INFINITY;
                    for (uint32_t i = 0; i < count; i++) best = fmaxf(best, weights[i * group + threadIdx.x]);
                    bests[threadIdx.x] = best;
                }
                __syncthreads();
                for (uint32_t i = threadIdx.x; i < count * group; i += WARPS * LANES) {
                    weights[i] = weights[i] == -INFINITY ? 1.0f : exp2f(weights[i] - bests[i % group]);
                }
                __syncthreads();
                for (uint32_t i = threadIdx.x; i < group * D / 4; i += WARPS * LANES) {
                    const uint32_t row = i / (D / 4);
                    float4 x = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
                    float sum = 0.0f;
#pragma unroll 8
                    for (uint32_t j = 0; j < count; j++) {
                        const float *part = part_of(j);
                        const float4 their = __ldcg(reinterpret_cast<const float4 *>(part) + i);
                        const float weight = weights[j * group + row];
                        sum += weight * __ldcg(part + group * D + group + row);
                        x.x += weight * their.x;
                        x.y += weight * their.y;
                        x.z += weight * their.z;
                        x.w += weight * their.w;
                    }
                    const float values[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        const uint32_t d = i % (D / 4) * 4 + j;
                        finish(attend, kv_head * group + row, head.first, d, values[j], bests[row] * LN2, sum);
                    }
                }
                if (threadIdx.x == 0) call.arrivals[index] = 0;
            }
        }
        __syncthreads();  // `merged` is free again
        at = stop;
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(WARPS *LANES, 2) stream_attend_d64(Stream call) { stream_attend<64>(call); }
extern "C" __global__ void __launch_bounds__(WARPS *LANES, 2) stream_attend_d128(Stream call) { stream_attend<128>(call); }

extern "C" __global__ void stream_size(uint32_t *size) { *size = sizeof(Stream); }
