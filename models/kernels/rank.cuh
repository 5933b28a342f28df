// Scores in order, as numbers that atomics can compare.

#pragma once

#include <cstdint>

// Grows with the score; a NaN is the largest, whatever its sign.
inline __device__ uint32_t order_of(float score) {
    const uint32_t bits = __float_as_uint(score);
    return score != score ? ~0u : bits >> 31 ? ~bits : bits | 0x80000000u;
}

// The same with its token, the lowest token first among equals.
inline __device__ unsigned long long ranked(float score, uint32_t token) {
    return (unsigned long long)order_of(score) << 32 | (~token);
}

inline __device__ float score_of(uint32_t order) {
    return __uint_as_float(order >> 31 ? order & 0x7fffffffu : ~order);
}
