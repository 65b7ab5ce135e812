// Numbers in bytes: 8 bits times the scale of what they belong to, a row of operands or a column of a weight, whose largest
// value is 127 of them.

#pragma once

#include "vectors.h"
#if defined(__AVX512VNNI__)
#include <immintrin.h>
#endif

// What four rows of a weight in bytes are multiplied with: a row's values of four columns, as whole numbers.
#if defined(__AVX512VNNI__)
struct Quad {
    uint32_t bits;
};
#else
struct Quad {
    float values[4];
};
#endif

// Of a row of them: what 1 stands for, and the sum of all.
struct Scale {
    float unit;
    int32_t sum;
};

namespace {

constexpr float WHOLE = 12582912.0f;  // added to a small number, it leaves the nearest whole one in the low bits

#if defined(__AVX512VNNI__)

inline void put(Quad* quads, Vec shifted) {
    typedef int8_t Bytes __attribute__((vector_size(LANES)));
    const Bytes bytes = __builtin_convertvector((IntVec)shifted, Bytes);
    std::memcpy(quads, &bytes, sizeof bytes);
}

// Sums are whole numbers in the place of floats, and weights without a sign, 128 too large: so sums begin with what that
// makes of a row.
inline Vec first_sum(const Scale& scale) { return (Vec)(IntVec{} - 128 * scale.sum); }
inline Vec single(Vec sums) { return __builtin_convertvector((IntVec)sums, Vec); }

inline IntVec splat(Quad quad) { return (int32_t)quad.bits + IntVec{}; }

// sums + the products of four rows of weights, lane by lane.
inline Vec add_products(Vec sums, Vec weights, IntVec values) {
    return (Vec)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)weights, (__m512i)values);
}

#else

inline void put(Quad* quads, Vec shifted) { store(quads->values, shifted - WHOLE); }
inline Vec first_sum(const Scale&) { return Vec{}; }
inline Vec single(Vec sums) { return sums; }

// The i-th of every four weights.
inline Vec byte(Vec weights, int i) { return __builtin_convertvector(((IntVec)weights >> 8 * i & 255) - 128, Vec); }

#endif

// How many Quads a row of n values takes: whole vectors.
inline int64_t quads_of_row(int64_t n) { return whole_vectors(n) / 4; }

// n values, and zeros up to a whole vector. With a number among them that is not finite, the unit is none.
inline Scale quantise(Quad* quads, const float* x, int64_t n) {
    IntVec bits{};  // without their signs: those of the largest are the largest, and of what is not finite larger still
    for (int64_t i = 0; i < n; i += LANES) {
        const IntVec size = (IntVec)load(x + i, n - i) & 0x7fffffff;
        bits = size > bits ? size : bits;
    }
    const Vec zeros = (Vec)bits * 0.0f;  // or none
    const float unit = folded((Vec)bits / 127.0f, [](auto a, auto b) { return a > b ? a : b; });
    const float inverse = unit > 1e-32f ? 1.0f / unit : 0.0f;  // of less, nothing is left
    Vec total{};
    for (int64_t i = 0; i < n; i += LANES) {
        const Vec shifted = load(x + i, n - i) * inverse + WHOLE;
        put(quads + i / 4, shifted);
        total += shifted - WHOLE;
    }
    const float whole = sum(total + zeros);
    return {unit + sum(zeros), std::isfinite(whole) ? (int32_t)whole : 0};
}

}  // namespace
