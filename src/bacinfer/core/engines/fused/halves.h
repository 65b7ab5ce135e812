// Numbers in bfloat16: the upper half of a float's bits. Rounding is to the nearest, halfway to even.

#pragma once

#include "vectors.h"
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

// What two rows of a weight in bfloat16 are multiplied with: a row's values of two columns, rounded to it.
#if defined(__AVX512BF16__)
struct Pair {
    uint32_t bits;  // even, odd
};
#else
struct Pair {
    float even, odd;
};
#endif

namespace {

// How many Pairs hold n values.
inline int64_t num_pairs(int64_t n) { return (n + 1) / 2; }

#if defined(__AVX512BF16__)

typedef uint32_t PairVec __attribute__((vector_size(LANES * sizeof(uint32_t))));

inline PairVec splat(Pair value) { return value.bits + PairVec{}; }

// PANEL values.
inline void round(Pair* pairs, const float* x) {
    const __m512bh rounded = _mm512_cvtne2ps_pbh(load(x + LANES), load(x));
    std::memcpy(pairs, &rounded, sizeof rounded);
}

// sums + the products of two rows of weights, lane by lane.
inline Vec add_products(Vec sums, Vec weights, PairVec values) {
    return _mm512_dpbf16_ps(sums, (__m512bh)weights, (__m512bh)values);
}

#else

typedef uint32_t BitVec __attribute__((vector_size(LANES * sizeof(uint32_t))));

// The float with these upper bits in the lower (even) or upper (odd) half.
inline Vec even_half(Vec weights) { return (Vec)((BitVec)weights << 16); }
inline Vec odd_half(Vec weights) { return (Vec)((BitVec)weights & 0xffff0000u); }

inline void round(Pair* pairs, const float* x) {
    float* const values = &pairs->even;
    for (int v = 0; v < VECTORS; v++) {
        const Vec value = load(x + v * LANES);
        const BitVec bits = (BitVec)value, rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) & 0xffff0000u;
        store(values + v * LANES, value == value ? (Vec)rounded : value);
    }
}

#endif

// n values; one that is left over has a zero beside it.
inline void round(Pair* pairs, const float* x, int64_t n) {
    for (; n >= PANEL; n -= PANEL, x += PANEL, pairs += PANEL / 2) round(pairs, x);
    if (n == 0) return;
    float values[PANEL] = {};
    Pair rounded[PANEL / 2];
    std::memcpy(values, x, n * sizeof(float));
    round(rounded, values);
    std::memcpy(pairs, rounded, num_pairs(n) * sizeof(Pair));
}

}  // namespace
