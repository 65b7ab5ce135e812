// The processor's vectors, and what works on rows of numbers.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

// The processor's vectors are the compiler's; all that differs between processors is here. A product is computed in
// tiles of up to TILE rows and VECTORS vectors of columns, whose sums have to stay in registers.
#if defined(__AVX512F__)  // 32 registers
constexpr int LANES = 16, VECTORS = 2, TILE = 6;
#elif defined(__AVX__)  // 16 registers
constexpr int LANES = 8, VECTORS = 2, TILE = 6;
#elif defined(__aarch64__)  // 32 registers
constexpr int LANES = 4, VECTORS = 2, TILE = 8;
#else  // 16 registers, as SSE has
constexpr int LANES = 4, VECTORS = 2, TILE = 6;
#endif
constexpr int PANEL = VECTORS * LANES;  // columns that are computed at once

typedef float Vec __attribute__((vector_size(LANES * sizeof(float))));
typedef int32_t IntVec __attribute__((vector_size(LANES * sizeof(int32_t))));

struct Norm {
    const float* weight;
    const float* bias;
    float epsilon;
};

enum Activation : int32_t { GELU, RELU, GELU_TANH, MISH };

namespace {

inline Vec load(const float* p) {
    Vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

// The first n numbers, and zeros.
inline Vec load(const float* p, int64_t n) {
    if (n >= LANES) return load(p);
    float values[LANES];
    for (int i = 0; i < LANES; i++) values[i] = i < n ? p[i] : 0.0f;  // a call would take what is in registers
    return load(values);
}

inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

inline Vec splat(float value) { return value - Vec{}; }

// f over n numbers, a power of 2: of one half with the other, until one is left.
template <int n, class F>
inline float folded(const float* x, F f) {
    if constexpr (n == 1) {
        return *x;
    } else {
        typedef float Half __attribute__((vector_size(n / 2 * sizeof(float))));
        Half low, high;
        float both[n / 2];
        std::memcpy(&low, x, sizeof low);
        std::memcpy(&high, x + n / 2, sizeof high);
        low = f(low, high);
        std::memcpy(both, &low, sizeof low);
        return folded<n / 2>(both, f);
    }
}

template <class F>
inline float folded(Vec v, F f) {
    float x[LANES];
    store(x, v);
    return folded<LANES>(x, f);
}

inline float sum(Vec v) {
    return folded(v, [](auto a, auto b) { return a + b; });
}

// Where x is no number, the result is none.
inline Vec at_least(float bound, Vec x) { return bound > x ? splat(bound) : x; }

constexpr float LOWEST_EXPONENT = -87.3f;  // of a normal number

// Of x <= 88, to within 2 units in the last place: 2^n times a polynomial of the rest (Cephes' expf). Numbers only.
inline Vec exponential(Vec x) {
    x = at_least(LOWEST_EXPONENT, x);
    const Vec shifted = x * 1.44269504f + 12582912.0f;  // its low bits are the nearest integer
    const Vec n = shifted - 12582912.0f;
    const Vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Vec p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return (Vec)((IntVec)p + ((IntVec)shifted << 23));
}

// x Phi(x) to within 6e-7, as PyTorch's is: Phi(x) - 1/2 is x times a polynomial in 2 (x / 5.4)^2 - 1, fitted for the
// least largest error of the result (Lawson's iterations), and beyond 5.4 as good as 1/2. A third of the operations of an
// exponential and a division.
inline Vec gelu(Vec x) {
    constexpr float COEFFICIENTS[] = {
        3.18737992e-04f, -9.66155378e-04f, 1.09223556e-03f, -1.36277184e-03f, 3.41361389e-03f,
        -6.52528089e-03f, 9.78511479e-03f, -1.40602989e-02f, 1.96088105e-02f, -2.57227905e-02f,
        3.21210884e-02f, -3.92092392e-02f, 4.84993942e-02f, -6.53279871e-02f, 1.30928114e-01f};
    Vec z = at_least(-5.4f, x);
    z = z > 5.4f ? splat(5.4f) : z;
    const Vec u = z * z * 0.0685871056f - 1.0f;
    Vec p{};
    for (float coefficient : COEFFICIENTS) p = p * u + coefficient;
    return x * (z * p + 0.5f);
}

// x Phi(x) by the hyperbolic tangent (Hendrycks and Gimpel, 2016), as x times the logistic function.
inline Vec gelu_tanh(Vec x) {
    const Vec power = -1.59576912f * (x + 0.044715f * x * x * x);
    return x / (1.0f + exponential(power > 88.0f ? splat(88.0f) : power));
}

// Calls f(i) for the vectors of [0, n) and g(i) for the rest.
template <class F, class G>
inline void each(int64_t n, F f, G g) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) f(i);
    for (; i < n; i++) g(i);
}

inline void add(float* y, const float* x, int64_t n) {
    each(n, [&](int64_t i) { store(y + i, load(y + i) + load(x + i)); }, [&](int64_t i) { y[i] += x[i]; });
}

inline void add_scaled(float* y, const float* x, float scale, int64_t n) {
    each(n, [&](int64_t i) { store(y + i, load(y + i) + scale * load(x + i)); }, [&](int64_t i) { y[i] += scale * x[i]; });
}

inline void multiply_by(float* y, const float* x, int64_t n) {
    each(n, [&](int64_t i) { store(y + i, load(y + i) * load(x + i)); }, [&](int64_t i) { y[i] *= x[i]; });
}

// A query or key [2 half], by the cosines and sines of its position.
inline void rotate(float* x, const float* cosines, const float* sines, int64_t half) {
    for (int64_t i = 0; i < half; i++) {
        const float first = x[i], second = x[half + i];
        x[i] = first * cosines[i] - second * sines[i];
        x[half + i] = second * cosines[half + i] + first * sines[half + i];
    }
}

// y = bias + the `count` rows of x [count, n], each scaled; bias may be y.
inline void combine(float* y, const float* bias, const float* x, const float* scales, int64_t count, int64_t n) {
    constexpr int together = 4;
    int64_t i = 0;
    for (; i + together * LANES <= n; i += together * LANES) {
        Vec total[together];
        for (int v = 0; v < together; v++) total[v] = load(bias + i + v * LANES);
        for (int64_t j = 0; j < count; j++)
            for (int v = 0; v < together; v++) total[v] += scales[j] * load(x + j * n + i + v * LANES);
        for (int v = 0; v < together; v++) store(y + i + v * LANES, total[v]);
    }
    std::memmove(y + i, bias + i, (n - i) * sizeof(float));
    for (int64_t j = 0; j < count; j++) add_scaled(y + i, x + j * n + i, scales[j], n - i);
}

// The sum of f(i), vectors, over those of [0, n), and of g(i) over the rest. Two sums, as one has to wait for itself.
template <class F, class G>
inline float sum_of(int64_t n, F f, G g) {
    Vec total{}, other{};
    float rest = 0;
    int64_t i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES) total += f(i), other += f(i + LANES);
    for (; i + LANES <= n; i += LANES) total += f(i);
    for (; i < n; i++) rest += g(i);
    return sum(total + other) + rest;
}

inline float dot(const float* x, const float* y, int64_t n) {
    return sum_of(n, [=](int64_t i) { return load(x + i) * load(y + i); }, [=](int64_t i) { return x[i] * y[i]; });
}

void normalise(float* y, const float* x, const Norm& norm, int64_t n) {
    const float mean = sum_of(n, [=](int64_t i) { return load(x + i); }, [=](int64_t i) { return x[i]; }) / n;
    const float variance = sum_of(n,
                                  [=](int64_t i) { const Vec d = load(x + i) - mean; return d * d; },
                                  [=](int64_t i) { return (x[i] - mean) * (x[i] - mean); }) / n;
    // PyTorch's result is no number where its squares of parts' means overflow; zeros, which an infinite variance would
    // make here, are never right. All of these squares are below 4 times the sum of squares.
    const bool overflows = !std::isfinite(4 * n * (variance + mean * mean));
    const float scale = overflows ? NAN : 1.0f / std::sqrt(variance + norm.epsilon);
    each(n,
         [&](int64_t i) { store(y + i, (load(x + i) - mean) * scale * load(norm.weight + i) + load(norm.bias + i)); },
         [&](int64_t i) { y[i] = (x[i] - mean) * scale * norm.weight[i] + norm.bias[i]; });
}

inline int64_t whole_vectors(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

// exp(x) for x <= 88; no number where x is none, and nothing where it is masked or so low that nothing is left.
inline Vec power(Vec x) {
    const Vec powers = exponential(x);
    return x < LOWEST_EXPONENT ? Vec{} : x == x ? powers : x;
}

// x tanh(log(1 + e^x)) (Misra, 2019): with e = e^x the hyperbolic tangent is e (e + 2) / (e (e + 2) + 2), and 1 beyond 20.
inline Vec mish(Vec x) {
    const Vec e = power(x > 20.0f ? splat(20.0f) : x), product = e * (e + 2.0f);
    return x * product / (product + 2.0f);
}

// n vectors, in place.
inline void activate(Vec* x, int n, int32_t activation) {
    if (activation == GELU)
        for (int i = 0; i < n; i++) x[i] = gelu(x[i]);
    else if (activation == RELU)
        for (int i = 0; i < n; i++) x[i] = at_least(0.0f, x[i]);
    else if (activation == MISH)
        for (int i = 0; i < n; i++) x[i] = mish(x[i]);
    else
        for (int i = 0; i < n; i++) x[i] = gelu_tanh(x[i]);
}

// Over x [n], in place; it is followed by -infinity up to a whole vector. No number where one of x is none.
inline void softmax(float* x, int64_t n) {
    Vec highest = load(x);
    for (int64_t i = LANES; i < n; i += LANES) highest = load(x + i) > highest ? load(x + i) : highest;
    const float shift = folded(highest, [](auto a, auto b) { return b > a ? b : a; });
    Vec total{};
    for (int64_t i = 0; i < n; i += LANES) {
        const Vec powers = power(load(x + i) - shift);
        total += powers;
        store(x + i, powers);
    }
    const float inverse = 1.0f / sum(total);
    for (int64_t i = 0; i < n; i += LANES) store(x + i, load(x + i) * inverse);
}

// Over the n rows of each column of x [n, columns], in place; what follows x up to a whole vector is written as well. No
// number where one of a column is none; nothing is left of what is masked.
inline void softmax(float* x, int64_t n, int64_t columns) {
    for (int64_t c = 0; c < columns; c++) {
        float highest = -INFINITY;
        for (int64_t i = c; i < n * columns; i += columns) highest = std::max(highest, x[i]);
        for (int64_t i = c; i < n * columns; i += columns) x[i] -= highest;
    }
    for (int64_t i = 0; i < n * columns; i += LANES) store(x + i, power(load(x + i)));
    for (int64_t c = 0; c < columns; c++) {
        float total = 0;
        for (int64_t i = c; i < n * columns; i += columns) total += x[i];
        const float inverse = 1.0f / total;
        for (int64_t i = c; i < n * columns; i += columns) x[i] *= inverse;
    }
}

}  // namespace
