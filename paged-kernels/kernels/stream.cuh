// Decode attention at the speed of memory: bf16, fp16 or fp8, pages of 16 rows or 16 times a power of two, one new token a sequence,
// up to 16 query heads a kv head. Computes what plain_attend computes, with sums in f32 and probabilities rounded to the type of the values.
//
// The slabs of a layer, 16 rows of a page each, lie in one order, head after head, and each block takes a share of it
// (stream-K). A head that several blocks share is cut into parts. In a part each warp takes every eighth slab through a
// pipeline of its own, which runs on into the next part: 16-byte asynchronous copies into swizzled shared memory, then mma.sync with the query heads
// as rows. One block fills a multiprocessor: two of half the size would keep as much in flight and leave twice as many
// parts to fold. A part goes to a workspace; the block with a head's end folds them in their order, so the same cuts give the
// same bits. Fast cuts move when a neighbour grows, and then a head's bits may change; invariant ones do not.
//
// A slim block leaves room for a block of the kernel that follows, which may then fetch what it needs while this one runs. The
// others' successors begin as they end, and ask for what they will need beyond their own room (`announce`).

#pragma once

#include "tile.cuh"

#include <type_traits>

namespace stream {

using namespace tile;

// Parts of a head on their way to a lane at once. Of a head that has few no more are asked for, since each wants its code.
template <int D, int TEAM>
constexpr int FEW = D > 128 ? 3 : TEAM < 8 ? 6 : 8;
template <int D, int TEAM>
constexpr int MANY = D > 128 || TEAM < 8 ? FEW<D, TEAM> : 12;
constexpr int ANNOUNCED = 4;  // slabs that a warp has brought into the second-level cache while it waits for its turn

// A part of a head: [group][D] sums, and for each row its best score and the sum of its weights. It begins where a lane can
// read four sums at once.
template <int D>
__device__ uint32_t part_fours(const Stream &call) { return (call.attend.group * (D + 2) + 3) / 4; }

template <int D>
__device__ float *part_at(const Stream &call, uint32_t i) { return call.parts + uint64_t(i) * part_fours<D>(call) * 4; }

// Folds a head's parts in their order as they come, a warp a row. With few rows several warps share one,
// each taking every n-th part, and meet in shared memory: the more loads are on their way at once the better.
template <int D, int TEAM>
__device__ void fold(const Stream &call, const Head &head, float *merged, float2 *totals) {
    const uint32_t warp = threadIdx.x / LANES, group = call.attend.group;
    const uint32_t teams = group < TEAM ? TEAM / group : 1, team = group < TEAM ? warp / group : 0;
    const uint32_t stride = call.cut == FAST ? 2 : 1, later = head.opening & ~(stride - 1);
    const uint32_t fours = part_fours<D>(call), pace = teams * stride * fours;
    auto fold_row = [&](uint32_t row, auto at_once) {
        constexpr int AT_ONCE = decltype(at_once)::value;
        Lane<D> all = {};
        float best = -INFINITY, sum = 0.0f;
        // What the lane has of the first of the parts that lie evenly; where it has that of another is then one instruction.
        auto *sums = reinterpret_cast<char *>(part_at<D>(call, later) + row * D + threadIdx.x % LANES * (D / LANES));
        auto *pairs = reinterpret_cast<char *>(part_at<D>(call, later) + group * D + row * 2);
        asm volatile("" : "+l"(sums), "+l"(pairs));
#pragma unroll 1
        for (uint32_t j = team; j < head.parts; j += AT_ONCE * teams) {
            uint32_t from = j;
            auto is = [&](int k) { return from + k * teams < head.parts; };
            auto place = [&](int k) {
                const uint32_t evenly = from * stride * fours + k * pace;
                return uint64_t(k == 0 && from == 0 ? (head.opening - later) * fours : evenly) * 16;
            };
            float theirs[AT_ONCE][D / LANES], their[AT_ONCE][2];  // sums; best and sum
#pragma unroll
            for (int k = 0; k < AT_ONCE; k++) {
                their[k][0] = -INFINITY, their[k][1] = -0.0f;
#pragma unroll
                for (int i = 0; i < D / LANES; i++) theirs[k][i] = -0.0f;
            }
            bool come;
            do {
                asm volatile("" : "+r"(from));  // there are no registers for all places
                come = true;
#pragma unroll
                for (int k = 0; k < AT_ONCE; k++) look(is(k), theirs[k], sums + place(k)), look(is(k), their[k], pairs + place(k));
#pragma unroll
                for (int k = 0; k < AT_ONCE; k++) come = come & have_come(theirs[k]) & have_come(their[k]);
            } while (!__all_sync(~0u, come));
            asm volatile("" : "+r"(from));
            float top = best;
#pragma unroll
            for (int k = 0; k < AT_ONCE; k++) {
                clear<D / LANES>(is(k), sums + place(k)), clear<2>(is(k), pairs + place(k));
                top = fmaxf(top, their[k][0]);
            }
            const float base = anchor(top), old = exp2_of(best - base);
            best = top;
            sum *= old;
            all.scale(old);
#pragma unroll
            for (int k = 0; k < AT_ONCE; k++) {
                const float weight = exp2_of(their[k][0] - base);
                sum += weight * their[k][1];
                all.add(weight, theirs[k]);
            }
        }
        if (teams == 1) {
            finish<D>(call.attend, head.kv_head * group + row, head.first, all, best, sum);
        } else {
            write_row<D>(merged + (team * group + row) * D, all.x);
            totals[team * group + row] = make_float2(best, sum);
        }
    };
    constexpr int FEWER = FEW<D, TEAM>, MORE = MANY<D, TEAM>;
    for (uint32_t row = warp - team * group; team < teams && row < group; row += TEAM) {
        if (MORE > FEWER && head.parts > FEWER * teams) {
            fold_row(row, std::integral_constant<int, MORE>());
        } else {
            fold_row(row, std::integral_constant<int, FEWER>());
        }
    }
    if (teams == 1) return;
    __syncthreads();
    if (warp < group) {
        float best = -INFINITY, sum = 0.0f;
        for (uint32_t i = 0; i < teams; i++) best = fmaxf(best, totals[i * group + warp].x);
        const float base = anchor(best);
        Lane<D> all = {};
        for (uint32_t i = 0; i < teams; i++) {
            const float2 their = totals[i * group + warp];
            const float weight = exp2_of(their.x - base);
            float theirs[D / LANES];
            read_row<D>(theirs, merged + (i * group + warp) * D);
            sum += weight * their.y;
            all.add(weight, theirs);
        }
        finish<D>(call.attend, head.kv_head * group + warp, head.first, all, best, sum);
    }
}

constexpr uint32_t UNKNOWN = 0xffffffffu;  // no page

// The slab after a head's last, in the order of the layer's.
__device__ uint32_t past(const Head &head) { return head.slabs + (head.len + SLAB - 1) / SLAB; }

// A block's share. `WIDE` is for more than 8 query heads a kv head: the lower half of the tensor cores' rows.
// `TEAM` warps have `STAGES` slabs each on their way.
template <class T, int D, int TEAM, int STAGES, bool WIDE>
__device__ void attend_share(const Stream &call) {
    constexpr bool SCALED = T::BYTES == 1;
    constexpr int CHUNKS = D * T::BYTES / 16;
    constexpr int HALF = SLAB * PITCH<D, T::BYTES>;  // bytes of a slab's keys in shared memory
    constexpr int STAGE = 2 * HALF + (SCALED ? 2 * SLAB * int(sizeof(float)) : 0);  // scales come last
    constexpr int KEY_BYTES = SLAB * D * T::BYTES;  // of a slab's keys, or values, in a page
    constexpr bool ANNOUNCES = OVERLAPS && TEAM * STAGES * STAGE > 96 << 10;  // not slim blocks, which begin long before their turn
    constexpr int STEPS = D / 16;
    constexpr int HALVES = WIDE ? 2 : 1;
    extern __shared__ __align__(128) unsigned char shared[];
    __shared__ Head opening;  // the block's first
    const Attend &attend = call.attend;
    const uint32_t group = attend.group;
    float *merged = reinterpret_cast<float *>(shared + TEAM * STAGES * STAGE);        // [TEAM][group][D]
    float2 *totals = reinterpret_cast<float2 *>(merged + TEAM * group * D);           // [TEAM][group]: best, sum

    start_next();
    const Share share = call.shares[blockIdx.x];
    const uint32_t begin = share.begin, end = share.end;
    if (begin == end) return;
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    const uint32_t stage0 = shared_address(shared) + warp * STAGES * STAGE;
    const auto *pool = static_cast<const unsigned char *>(attend.pool.data);

    // Where the block's part of a head ends that begins at a slab.
    const uint32_t whole = call.cut == FAST ? ~0u : 0;
    auto part_end = [&](const Head &head, uint32_t at) {
        const uint32_t last = past(head);
        return at + min(min(last, end) - at, piece_of(last - head.slabs) | whole);
    };
    // The warp's slabs of a part are its first + warp, and every eighth. `ahead` is the next to be fetched, of the part
    // that ends at `source_stop`. While memory is busy a load takes as long as several slabs, so its page's number is known
    // early, and so are the head that follows, `upcoming`, and the number of the warp's first page there: where there are
    // registers for it.
    constexpr bool LOOKS = D <= 128;
    uint32_t index = share.head;
    Head head = attend.heads[index];
    if (threadIdx.x == 0) opening = head;
    uint32_t ahead = begin + warp, filled = 0, used = 0;
    uint32_t source_index = index, source_stop = part_end(head, begin);
    Head source = head, upcoming = head;
    uint32_t upcoming_id = UNKNOWN;
    auto look_ahead = [&]() {
        if (LOOKS && past(source) < end) upcoming = attend.heads[source_index + 1];
        upcoming_id = UNKNOWN;
    };
    look_ahead();
    const uint32_t shift = slabs_log2(attend.pool);
    const int64_t to_values = int64_t(attend.pool.page_size) * D * T::BYTES;  // bytes from a key to its value
    auto next_page = [&]() -> uint32_t {
        uint32_t known = UNKNOWN;
        const bool stays = ahead < source_stop;
        while (ahead >= source_stop) {
            if (source_stop == end) return 0;
            known = UNKNOWN;
            while (source_stop == past(source) || source.tokens == 0) {
                known = upcoming_id;
                source_index++;
                if constexpr (LOOKS) source = upcoming;
                else source = attend.heads[source_index];
                look_ahead();
            }
            ahead = source_stop + warp;
            source_stop = part_end(source, source_stop);
        }
        if (known == UNKNOWN) known = attend.tables[(ahead - source.slabs >> shift) + source.table];
        if (LOOKS && stays && upcoming_id == UNKNOWN && warp < past(upcoming) - upcoming.slabs) {
            upcoming_id = attend.tables[(warp >> shift) + upcoming.table];
        }
        return known;
    };
    uint32_t id = next_page();
    // Until the kernel before has ended a long share is fetched half a slab after the other: what that kernel's last blocks
    // load would come after all that was asked for before.
    bool paced = call.early && end - begin > STAGES * TEAM;
    auto land = [&]() {
        commit();
        wait<0>();
    };
    auto page_at = [&](uint32_t id) {
        return pool + (uint64_t(id) << shift) * (2 * SLAB * (D * T::BYTES + (SCALED ? sizeof(float) : 0)));
    };
    auto inside_page = [&](uint32_t slab) { return slab & (1u << shift) - 1; };  // in slabs
    auto fetch = [&]() {
        if (ahead < end) {
            const uint64_t policy = read_once();
            // Where lines lie in the slab is counted anew each time: rows of 256 bytes leave no registers to keep it in.
            uint32_t lane = threadIdx.x % LANES;
            if constexpr (SCALED && D == 256) asm volatile("" : "+r"(lane));
            const uint32_t inside = inside_page(ahead - source.slabs);
            const unsigned char *page = page_at(id), *from = page + inside * KEY_BYTES + lane * 16;
            const uint32_t to = stage0 + filled * STAGE;
            if (SCALED && lane < 8) {
                const unsigned char *scales = page + 2 * to_values + (lane < 4 ? 0 : attend.pool.page_size * sizeof(float));
                copy16(to + 2 * HALF + lane * 16, scales + inside * SLAB * sizeof(float) + lane % 4 * 16, policy);
            }
#pragma unroll
            for (int i = 0; i < 2 * CHUNKS * SLAB / LANES; i++) {
                constexpr int KEYS = CHUNKS * SLAB / LANES;
                const uint32_t chunk = i * LANES + lane, row = chunk / CHUNKS;  // keys, then values: 32 rows
                if (i == KEYS && paced) land();
                copy16(to + swizzled<D, T::BYTES>(row, chunk % CHUNKS), from + (i < KEYS ? 0 : to_values) + i % KEYS * LANES * 16, policy);
            }
        }
        commit();
        ahead += TEAM;
        filled = filled + 1 == STAGES ? 0 : filled + 1;
        id = next_page();
    };
    if (!call.early) settle();
#pragma unroll 1
    for (int i = 0; i < STAGES - 1; i++) {
        // Since the step was planned nothing has changed in the pages but the rows of its own tokens.
        if (call.early && ahead < end) {
            const uint64_t slab = (uint64_t(id) << shift) + inside_page(ahead - source.slabs);
            if (slab == attend.slots[source_index] / SLAB) settle(), paced = false;
        }
        fetch();
        if (paced) land();
    }
    // While that kernel's last blocks fold memory would have nothing to do once this one's have all that they have room for. So
    // lanes ask for the warp's slabs that follow.
    if (ANNOUNCES && paced && lane < ANNOUNCED) {
        const uint32_t at = ahead + lane * TEAM;
        const Head owner = LOOKS && at >= past(source) ? upcoming : source;
        if (at < min(past(owner), end)) {
            const uint32_t slab = at - owner.slabs;
            const unsigned char *from = page_at(attend.tables[(slab >> shift) + owner.table]) + inside_page(slab) * KEY_BYTES;
            announce(from, KEY_BYTES);
            announce(from + to_values, KEY_BYTES);
        }
    }
    __syncwarp();
    settle();
    paced = false;

    const float scale = attend.scale * LOG2E;
    constexpr int QUERIES = SCALED ? 4 : 2;  // of a row of 16, that lie together in a lane
    uint32_t number = share.part;  // of the part under way
    uint32_t query[STEPS][4];
    auto load_queries = [&](uint32_t kv_head, uint32_t token) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const uint32_t row = lane / 4 + 8 * half;
            const auto *from = static_cast<const __nv_bfloat16 *>(attend.queries.data) +
                               attend.queries.at(kv_head * group + row, token) + lane % 4 * QUERIES;
#pragma unroll
            for (int k = 0; k < STEPS; k++) {
                query[k][half] = query[k][half + 2] = 0;
                if (half < HALVES && row < group) {
                    query[k][half] = *reinterpret_cast<const uint32_t *>(from + k * 16);
                    query[k][half + 2] = *reinterpret_cast<const uint32_t *>(from + k * 16 + (SCALED ? 2 : 8));
                }
            }
        }
    };
    auto raise_queries = [&]() {
#pragma unroll
        for (int k = 0; k < STEPS; k++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float2 x = T::unpack(query[k][i]);
                if constexpr (SCALED) query[k][i] = T::pack(x.x * T::UP, x.y * T::UP);
            }
        }
    };
    load_queries(head.kv_head, head.first);
    bool fresh = true;
    for (uint32_t at = begin;;) {
        if constexpr (SCALED) {
            if (fresh) raise_queries();
            fresh = false;
        }
        const uint32_t first = head.slabs, stop = part_end(head, at);
        const bool leaves = stop == past(head) && stop < end;
        const Head *next = attend.heads + index + leaves;
        const uint32_t next_kv_head = next->kv_head, next_token = next->first;
        float out[D / 8][4], best[HALVES], sum[HALVES];
#pragma unroll
        for (int half = 0; half < HALVES; half++) best[half] = -INFINITY, sum[half] = 0.0f;
#pragma unroll
        for (int i = 0; i < D / 8; i++) out[i][0] = out[i][1] = out[i][2] = out[i][3] = 0.0f;

#pragma unroll 1
        for (uint32_t slab = at + warp; slab < stop; slab += TEAM) {
            wait<STAGES - 2>();
            __syncwarp();
            fetch();
            const uint32_t keys = stage0 + used * STAGE, values = keys + HALF;
            used = used + 1 == STAGES ? 0 : used + 1;
            float score[2][4] = {};
            const uint32_t key_row = lane / 16 * 8 + lane % 8, key_chunk = lane / 8 & 1;
            if constexpr (SCALED) {
                // A chunk is 16 elements of a row, of which a lane gets four that lie together: the queries lie alike.
#pragma unroll
                for (int k = 0; k < STEPS; k += 2) {
                    uint32_t b[4];
                    load_matrices(b, keys + swizzled<D, 1>(key_row, k + key_chunk));
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        const uint32_t low = T::widen(__byte_perm(b[j], 0, 0x1404)), high = T::widen(__byte_perm(b[j], 0, 0x3424));
                        T::template multiply<WIDE>(score[j / 2], query[k + j % 2], low, high);
                    }
                }
            } else {
#pragma unroll
                for (int k = 0; k < STEPS; k++) {
                    uint32_t b[4];
                    load_matrices(b, keys + swizzled<D>(key_row, 2 * k + key_chunk));
                    T::template multiply<WIDE>(score[0], query[k], b[0], b[1]);
                    T::template multiply<WIDE>(score[1], query[k], b[2], b[3]);
                }
            }
            const uint32_t live = head.len - (slab - first) * SLAB;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const uint32_t row = i * 8 + lane % 4 * 2;
                float2 scales = make_float2(scale, scale);
                if constexpr (SCALED) {
                    scales = load_pair(values + HALF + row * 4);
                    scales.x *= scale * T::UP, scales.y *= scale * T::UP;
                }
#pragma unroll
                for (int j = 0; j < 2 * HALVES; j++) {
                    score[i][j] = row + j % 2 < live ? score[i][j] * (j % 2 ? scales.y : scales.x) : -INFINITY;
                }
            }
            if (!SCALED && live < SLAB) {
                // What lies past the end may be NaN, which a weight of 0 does not silence.
#pragma unroll 1
                for (uint32_t i = live * CHUNKS + lane; i < SLAB * CHUNKS; i += LANES) {
                    uint32_t to = values + swizzled<D>(i / CHUNKS, i % CHUNKS);
                    asm volatile("st.shared.v4.b32 [%0], {%1,%1,%1,%1};" ::"r"(to), "r"(0) : "memory");
                }
                __syncwarp();
            }
            // The weights of a pair of rows, each times its value's scale. What lies past the end may be NaN.
            auto pack = [&](uint32_t row, float low, float high) {
                if constexpr (SCALED) {
                    row += lane % 4 * 2;
                    const float2 scales = load_pair(values + HALF + (SLAB + row) * 4);
                    low *= row < live ? T::UP * scales.x : 0.0f, high *= row + 1 < live ? T::UP * scales.y : 0.0f;
                }
                return T::pack(low, high);
            };
            auto add = [](float (&o)[4], const uint32_t (&weights)[4], uint32_t b0, uint32_t b1, const float (&fade)[HALVES]) {
#pragma unroll
                for (int half = 0; half < HALVES; half++) o[2 * half] *= fade[half], o[2 * half + 1] *= fade[half];
                T::template multiply<WIDE>(o, weights, b0, b1);
            };
            uint32_t weights[4] = {};
            float fade[HALVES];
#pragma unroll
            for (int half = 0; half < HALVES; half++) {
                float &s0 = score[0][2 * half], &s1 = score[0][2 * half + 1];
                float &s2 = score[1][2 * half], &s3 = score[1][2 * half + 1];
                const float raised = fmaxf(best[half], quad_max(fmaxf(fmaxf(s0, s1), fmaxf(s2, s3))));
                const float base = anchor(raised);
                fade[half] = exp2_of(best[half] - base);
                best[half] = raised;
                s0 = exp2_of(s0 - base), s1 = exp2_of(s1 - base), s2 = exp2_of(s2 - base), s3 = exp2_of(s3 - base);
                sum[half] = sum[half] * fade[half] + (s0 + s1) + (s2 + s3);
                weights[half] = pack(0, s0, s1);
                weights[half + 2] = pack(8, s2, s3);
            }
            const uint32_t value_row = (lane / 8 & 1) * 8 + lane % 8, value_chunk = lane / 16;
#pragma unroll
            for (int i = 0; i < CHUNKS / 2; i++) {
                uint32_t b[4];
                load_transposed(b, values + swizzled<D, T::BYTES>(value_row, 2 * i + value_chunk));
                if constexpr (SCALED) {
                    // Of two rows each, a pair of elements: the even ones of a chunk, then the odd ones.
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        const int shift = j % 2 ? 0 : 8;
                        const uint32_t low = T::widen(b[j / 2 * 2] << shift), high = T::widen(b[j / 2 * 2 + 1] << shift);
                        add(out[4 * i + j], weights, low, high, fade);
                    }
                } else {
#pragma unroll
                    for (int j = 0; j < 2; j++) add(out[2 * i + j], weights, b[2 * j], b[2 * j + 1], fade);
                }
            }
        }

        if (leaves) load_queries(next_kv_head, next_token), fresh = true;  // they come while the warps meet

        // The warps' parts into one.
#pragma unroll
        for (int half = 0; half < HALVES; half++) {
            const uint32_t row = lane / 4 + 8 * half;
            const float total = quad_sum(sum[half]);
            if (row < group) {
                float *to = merged + (warp * group + row) * D + lane % 4 * QUERIES;
#pragma unroll
                for (int i = 0; i < D / 8; i++) {
                    if constexpr (!SCALED) {
                        *reinterpret_cast<float2 *>(to + i * 8) = make_float2(out[i][2 * half], out[i][2 * half + 1]);
                    } else if (i % 2 == 0) {
                        const float *even = out[i] + 2 * half, *odd = out[i + 1] + 2 * half;
                        *reinterpret_cast<float4 *>(to + i * 8) =
                            make_float4(even[0] * T::UP, odd[0] * T::UP, even[1] * T::UP, odd[1] * T::UP);
                    }
                }
                if (lane % 4 == 0) totals[warp * group + row] = make_float2(best[half], total);
            }
        }
        __syncthreads();
        float *part = part_at<D>(call, number);
#pragma unroll 1
        for (uint32_t row = warp; row < group; row += TEAM) {
            float2 their[TEAM];
            float theirs[TEAM][D / LANES], most = -INFINITY, all_sum = 0.0f;
#pragma unroll
            for (int w = 0; w < TEAM; w++) {
                their[w] = totals[w * group + row];
                read_row<D>(theirs[w], merged + (w * group + row) * D);
            }
#pragma unroll
            for (int w = 0; w < TEAM; w++) most = fmaxf(most, their[w].x);
            const float base = anchor(most);
            Lane<D> all = {};
#pragma unroll
            for (int w = 0; w < TEAM; w++) {
                const float weight = exp2_of(their[w].x - base);
                all_sum += weight * their[w].y;
                all.add(weight, theirs[w]);
            }
            if (head.parts == 1) {
                finish<D>(attend, head.kv_head * group + row, head.first, all, most, all_sum);
            } else {
                leave(part + row * D + lane * (D / LANES), all.x);
                if (lane == 0) leave(part + group * D + row * 2, {most, all_sum});
            }
        }
        // A head is folded by the block that has its end; one that others have parts of, the block's first, last of all.
#pragma unroll 1
        for (int turn = 0; turn < 2; turn++) {
            const Head ended = turn ? opening : head;
            const bool now = turn ? stop == end && past(ended) <= end : index != share.head && stop == past(ended);
            if (!now || ended.parts <= 1) continue;
            __syncthreads();
            fold<D, TEAM>(call, ended, merged, totals);
        }
        if (stop == end) return;
        __syncthreads();  // `merged` is free again
        at = stop;
        number++;
        if (!leaves) continue;
        index++;
        head = *next;
        if (head.tokens == 0) {
            while (head.tokens == 0) head = attend.heads[++index];
            load_queries(head.kv_head, head.first), fresh = true;
        }
        number = head.opening;
    }
}

}  // namespace stream

// Kernels of a type, one a head dim and one more for over 8 query heads a kv head. Slabs on their way get what the warps'
// sums leave, which is less the more query heads there are. Mirrored in src/cuda/driver/attend.rs.
#define STREAM_ATTEND(NAME, T, D, TEAM, STAGES, WIDE)                                                       \
    extern "C" __global__ void __launch_bounds__(TEAM *LANES, 1) stream_attend_##NAME(Stream call) {        \
        stream::attend_share<stream::T, D, TEAM, STAGES, WIDE>(call);                                       \
    }
#define STREAM_KERNELS(T)                          \
    STREAM_ATTEND(d64, T, 64, 8, 4, false)         \
    STREAM_ATTEND(wide_d64, T, 64, 8, 4, true)     \
    STREAM_ATTEND(d96, T, 96, 8, 3, false)         \
    STREAM_ATTEND(wide_d96, T, 96, 8, 2, true)     \
    STREAM_ATTEND(d128, T, 128, 8, 3, false)       \
    STREAM_ATTEND(slim_d128, T, 128, 4, 2, false)  \
    STREAM_ATTEND(wide_d128, T, 128, 8, 2, true)   \
    STREAM_ATTEND(d256, T, 256, 4, 3, false)       \
    STREAM_ATTEND(wide_d256, T, 256, 4, 2, true)   \
    STREAM_SIZES

// Twice the slabs, of half the bytes. Rows of 256 for more query heads would want more registers than there are.
#define STREAM_SCALED_KERNELS(T)                   \
    STREAM_ATTEND(d64, T, 64, 8, 6, false)         \
    STREAM_ATTEND(wide_d64, T, 64, 8, 5, true)     \
    STREAM_ATTEND(d96, T, 96, 8, 5, false)         \
    STREAM_ATTEND(wide_d96, T, 96, 8, 4, true)     \
    STREAM_ATTEND(d128, T, 128, 8, 5, false)       \
    STREAM_ATTEND(wide_d128, T, 128, 8, 4, true)   \
    STREAM_ATTEND(d256, T, 256, 4, 5, false)       \
    STREAM_SIZES

#define STREAM_SIZES                                           \
    extern "C" __global__ void stream_sizes(uint32_t *sizes) { \
        sizes[0] = sizeof(Share);                              \
        sizes[1] = sizeof(Stream);                             \
    }
