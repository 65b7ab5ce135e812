// Products of rows with packed weights, in tiles.

#pragma once

#include <array>
#include <type_traits>
#include <utility>
#include <vector>

#include "halves.h"

// x W + b, as panels of PANEL columns, padded with zeros: the bias [PANEL], then the weight, [in, PANEL] in single
// precision, or [in / 2, PANEL, 2] in bfloat16, which takes as much memory as [in / 2, PANEL] in single precision.
struct Affine {
    const float* panels;
    int32_t in;
    int32_t out;
};

namespace {

enum Epilogue { STORE, ACTIVATE, ADD_TO_ROWS };

// Rows of a matrix, `stride` apart.
template <class T>
struct Rows {
    T* first;
    int64_t stride;

    T* operator[](int64_t row) const { return first + row * stride; }
};

// How many operands hold n values: themselves, or Pairs. A product of Pairs is one with a weight in bfloat16.
template <class T>
inline int64_t length(int64_t n) {
    return std::is_same_v<T, Pair> ? num_pairs(n) : n;
}

// Which of them holds the n-th value.
template <class T>
inline int64_t operand_at(int64_t n) {
    return std::is_same_v<T, Pair> ? n / 2 : n;
}

// One of several equal parts of some work.
struct Part {
    int64_t index = 0, count = 1;

    int64_t begin(int64_t n) const { return n * index / count; }
    int64_t end(int64_t n) const { return n * (index + 1) / count; }
};

template <class In, class Out>
struct Tile {
    Rows<const In> a;     // [R, steps]
    const float* bias;    // [PANEL]; null: none
    const float* weight;  // of a panel, from the row that the first column of a meets
    Rows<Out> c;          // [R, columns]
    const float* added;   // rows to add to those of c (ADD_TO_ROWS), which are floats then, as far apart
    int64_t steps, panel_size, columns;
    Epilogue epilogue;
    int32_t activation;
};

template <int R>
using Sums = Vec[R][VECTORS];

// sums += the k-th column of a times `weights`.
template <int R>
inline void accumulate(Sums<R>& sums, Rows<const float> a, int64_t k, const Vec* weights) {
    for (int r = 0; r < R; r++) {
        const Vec value = splat(a[r][k]);
        for (int v = 0; v < VECTORS; v++) sums[r][v] += value * weights[v];
    }
}

// The same for a Pair of columns, and a row of pairs of weights.
template <int R>
inline void accumulate(Sums<R>& sums, Rows<const Pair> a, int64_t k, const Vec* weights) {
#if defined(__AVX512BF16__)
    for (int r = 0; r < R; r++) {
        const PairVec value = splat(a[r][k]);
        for (int v = 0; v < VECTORS; v++) sums[r][v] = add_products(sums[r][v], weights[v], value);
    }
#else
    const Rows<const float> values{&a.first->even, 2 * a.stride};
    Vec halves[VECTORS];
    for (int v = 0; v < VECTORS; v++) halves[v] = even_half(weights[v]);
    accumulate<R>(sums, values, 2 * k, halves);
    for (int v = 0; v < VECTORS; v++) halves[v] = odd_half(weights[v]);
    accumulate<R>(sums, values, 2 * k + 1, halves);
#endif
}

inline void put(float* c, const float* values, int64_t n) { std::memcpy(c, values, n * sizeof(float)); }
inline void put(Pair* c, const float* values, int64_t n) { round(c, values, n); }

// R rows of a product with one panel.
template <int R, class In, class Out>
void multiply(const Tile<In, Out>& tile) {
    Sums<R> sums;
    for (int r = 0; r < R; r++)
        for (int v = 0; v < VECTORS; v++) sums[r][v] = tile.bias ? load(tile.bias + v * LANES) : Vec{};
    const float* weight = tile.weight;
    for (int64_t k = 0; k < tile.steps; k++, weight += PANEL) {
        Vec weights[VECTORS];
        for (int v = 0; v < VECTORS; v++) {
            weights[v] = load(weight + v * LANES);
            __builtin_prefetch(weight + tile.panel_size + v * LANES, 0, 2);  // the next panel, into the second level
        }
        accumulate<R>(sums, tile.a, k, weights);
    }
    for (int r = 0; r < R; r++) {
        float values[PANEL];
        for (int v = 0; v < VECTORS; v++)
            store(values + v * LANES, tile.epilogue == ACTIVATE ? activate(sums[r][v], tile.activation) : sums[r][v]);
        if (tile.epilogue == ADD_TO_ROWS) add(values, tile.added + r * tile.c.stride, tile.columns);
        put(tile.c[r], values, tile.columns);
    }
}

template <class In, class Out>
using Multiply = void (*)(const Tile<In, Out>&);

template <class In, class Out, int... R>
constexpr std::array<Multiply<In, Out>, sizeof...(R)> multiplies(std::integer_sequence<int, R...>) {
    return {multiply<R + 1, In, Out>...};
}

template <class In, class Out>
constexpr auto MULTIPLY = multiplies<In, Out>(std::make_integer_sequence<int, TILE>());  // by the number of rows, less 1

inline int64_t num_panels(int64_t columns) { return (columns + PANEL - 1) / PANEL; }

// The columns begin..end-1 of x W + b, `begin` that of a panel.
template <class In>
inline Affine columns_of(const Affine& affine, int64_t begin, int64_t end) {
    return {affine.panels + begin * (1 + length<In>(affine.in)), affine.in, (int32_t)(end - begin)};
}

// Rows first..last-1 of a weight, in operands; of the parts of a sum over them, one has the bias.
struct Inner {
    int64_t first, last;
    bool has_bias;
};

// c = a W + b over some rows of W, or a part of its tiles; a [num_rows, last - first].
template <class In, class Out>
void product(Rows<Out> c, Rows<const In> a, int64_t num_rows, const Affine& affine, Inner inner,
             Epilogue epilogue = STORE, int32_t activation = 0, const float* added = nullptr, Part part = {}) {
    const int64_t tall = (num_rows + TILE - 1) / TILE, num_tiles = num_panels(affine.out) * tall;
    const int64_t panel_size = PANEL * (1 + length<In>(affine.in));
    for (int64_t tile = part.begin(num_tiles); tile < part.end(num_tiles); tile++) {
        const int64_t p = tile / tall, t = tile % tall;
        const float* const panel = affine.panels + p * panel_size;
        const int64_t column = p * PANEL, columns = std::min<int64_t>(PANEL, affine.out - column);
        const int64_t start = t * num_rows / tall, end = (t + 1) * num_rows / tall;  // of nearly equal height
        MULTIPLY<In, Out>[end - start - 1]({{a[start], a.stride}, inner.has_bias ? panel : nullptr,
                                            panel + PANEL * (1 + inner.first), {c[start] + length<Out>(column), c.stride},
                                            added + start * c.stride + column, inner.last - inner.first, panel_size,
                                            columns, epilogue, activation});
    }
}

// Over all of W.
template <class In, class Out>
void product(Rows<Out> c, Rows<const In> a, int64_t num_rows, const Affine& affine, Epilogue epilogue = STORE,
             int32_t activation = 0, const float* added = nullptr, Part part = {}) {
    const Inner all{0, length<In>(affine.in), true};
    product<In, Out>(c, a, num_rows, affine, all, epilogue, activation, added, part);
}

// All of c = a W + b, where rows follow each other.
void product(float* c, const float* a, int64_t num_rows, const Affine& affine, Epilogue epilogue = STORE,
             const float* added = nullptr) {
    product(Rows<float>{c, affine.out}, Rows<const float>{a, affine.in}, num_rows, affine, epilogue, 0, added);
}

// The panels of a matrix W [in, out] that is known only now, without a bias.
class Panels {
public:
    Panels(int64_t in, int64_t out) : in_(in), out_(out), values_(num_panels(out) * (1 + in) * PANEL) {}

    void set_row(int64_t row, const float* x) {
        for (int64_t column = 0; column < out_; column += PANEL)
            std::memcpy(place(row, column), x + column, std::min<int64_t>(PANEL, out_ - column) * sizeof(float));
    }

    void set_column(int64_t column, const float* x) {
        float* const first = place(0, column);
        for (int64_t row = 0; row < in_; row++) first[row * PANEL] = x[row];
    }

    operator Affine() const { return {values_.data(), (int32_t)in_, (int32_t)out_}; }

private:
    float* place(int64_t row, int64_t column) {
        return &values_[(column / PANEL * (1 + in_) + 1 + row) * PANEL + column % PANEL];
    }

    const int64_t in_, out_;
    std::vector<float> values_;
};

}  // namespace
