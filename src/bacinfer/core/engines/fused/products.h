// Products of rows with packed weights, in tiles.

#pragma once

#include <array>
#include <type_traits>
#include <utility>
#include <vector>

#include "bytes.h"
#include "halves.h"

// x W + b, as panels of PANEL columns, padded with zeros: the bias [PANEL]; of a weight in bytes, its columns' units
// [PANEL]; then the weight, [in, PANEL] in single precision, [in / 2, PANEL, 2] in bfloat16 or [in / 4, PANEL, 4] in bytes,
// 128 more than they mean: as much memory as [in / 2, PANEL] or [in / 4, PANEL] in single precision.
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

// Rows of bytes have scales.
template <>
struct Rows<const Quad> {
    const Quad* first;
    int64_t stride;
    const Scale* scales;

    const Quad* operator[](int64_t row) const { return first + row * stride; }
};

// They without what comes before a row and a column.
template <class T>
inline Rows<T> from(Rows<T> rows, int64_t row, int64_t column) {
    rows.first += row * rows.stride + column;
    if constexpr (std::is_same_v<T, const Quad>) rows.scales += row;
    return rows;
}

// How many values an operand holds. A product of Pairs is one with a weight in bfloat16, of Quads with one in bytes.
template <class T>
constexpr int64_t VALUES = std::is_same_v<T, Quad> ? 4 : std::is_same_v<T, Pair> ? 2 : 1;

// How many operands hold n values.
template <class T>
inline int64_t length(int64_t n) {
    return (n + VALUES<T> - 1) / VALUES<T>;
}

// Which of them holds the n-th value.
template <class T>
inline int64_t operand_at(int64_t n) {
    return n / VALUES<T>;
}

// Rows of a panel before its weight, and all.
template <class T>
constexpr int64_t HEAD = std::is_same_v<T, Quad> ? 2 : 1;
template <class T>
inline int64_t panel_size(int64_t in) {
    return PANEL * (HEAD<T> + length<T>(in));
}

// One of several equal parts of some work.
struct Part {
    int64_t index = 0, count = 1;

    int64_t begin(int64_t n) const { return n * index / count; }
    int64_t end(int64_t n) const { return n * (index + 1) / count; }
};

template <class In>
struct Tile {
    Rows<const In> a;     // [R, steps]
    const float* panel;   // with its bias
    const float* weight;  // of it, from the row that the first column of a meets
    bool has_bias;
    Rows<float> c;        // [R, columns]
    const float* added;   // rows to add to those of c (ADD_TO_ROWS), as far apart
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

// The same for a Quad of columns, and a row of fours of weights.
template <int R>
inline void accumulate(Sums<R>& sums, const Rows<const Quad>& a, int64_t k, const Vec* weights) {
#if defined(__AVX512VNNI__)
    for (int r = 0; r < R; r++) {
        const IntVec value = splat(a[r][k]);
        for (int v = 0; v < VECTORS; v++) sums[r][v] = add_products(sums[r][v], weights[v], value);
    }
#else
    const Rows<const float> values{a.first->values, 4 * a.stride};
    for (int i = 0; i < 4; i++) {
        Vec bytes[VECTORS];
        for (int v = 0; v < VECTORS; v++) bytes[v] = byte(weights[v], i);
        accumulate<R>(sums, values, 4 * k + i, bytes);
    }
#endif
}

inline void put(float* c, const float* values, int64_t n) {
    if (n == PANEL) std::memcpy(c, values, PANEL * sizeof(float));  // of a known size: a few stores instead of a call
    else std::memcpy(c, values, n * sizeof(float));
}

// R rows of a product with one panel.
template <int R, class In>
void multiply(const Tile<In>& tile) {
    constexpr bool bytes = std::is_same_v<In, Quad>;
    Vec bias[VECTORS] = {};
    for (int v = 0; tile.has_bias && v < VECTORS; v++) bias[v] = load(tile.panel + v * LANES);
    Sums<R> sums;
    for (int r = 0; r < R; r++)
        for (int v = 0; v < VECTORS; v++)
            if constexpr (bytes) sums[r][v] = first_sum(tile.a.scales[r]);
            else sums[r][v] = bias[v];
    const float* weight = tile.weight;
    for (int64_t k = 0; k < tile.steps; k++, weight += PANEL) {
        Vec weights[VECTORS];
        for (int v = 0; v < VECTORS; v++) {
            weights[v] = load(weight + v * LANES);
            __builtin_prefetch(weight + tile.panel_size + v * LANES, 0, 2);  // the next panel, into the second level
        }
        accumulate<R>(sums, tile.a, k, weights);
    }
    if constexpr (bytes)
        for (int v = 0; v < VECTORS; v++) {
            const Vec units = load(tile.panel + PANEL + v * LANES);
            for (int r = 0; r < R; r++) sums[r][v] = single(sums[r][v]) * (tile.a.scales[r].unit * units) + bias[v];
        }
    if (tile.epilogue == ACTIVATE) activate(sums[0], R * VECTORS, tile.activation);
    for (int r = 0; r < R; r++) {
        float* const values = (float*)sums[r];
        if (tile.epilogue == ADD_TO_ROWS) add(values, tile.added + r * tile.c.stride, tile.columns);
        put(tile.c[r], values, tile.columns);
    }
}

template <class In>
using Multiply = void (*)(const Tile<In>&);

template <class In, int... R>
constexpr std::array<Multiply<In>, sizeof...(R)> multiplies(std::integer_sequence<int, R...>) {
    return {multiply<R + 1, In>...};
}

template <class In>
constexpr auto MULTIPLY = multiplies<In>(std::make_integer_sequence<int, TILE>());  // by the number of rows, less 1

inline int64_t num_panels(int64_t columns) { return (columns + PANEL - 1) / PANEL; }

// The columns begin..end-1 of x W + b, `begin` that of a panel.
template <class In>
inline Affine columns_of(const Affine& affine, int64_t begin, int64_t end) {
    return {affine.panels + begin / PANEL * panel_size<In>(affine.in), affine.in, (int32_t)(end - begin)};
}

// Rows first..last-1 of a weight, in operands; of the parts of a sum over them, one has the bias.
struct Inner {
    int64_t first, last;
    bool has_bias;
};

// c = a W + b over some rows of W, or a part of its tiles; a [num_rows, last - first], outside of which a row of bytes is 0.
template <class In>
void product(Rows<float> c, Rows<const In> a, int64_t num_rows, const Affine& affine, Inner inner,
             Epilogue epilogue = STORE, int32_t activation = 0, const float* added = nullptr, Part part = {}) {
    const int64_t tall = (num_rows + TILE - 1) / TILE, num_tiles = num_panels(affine.out) * tall;
    const int64_t size = panel_size<In>(affine.in);
    for (int64_t tile = part.begin(num_tiles); tile < part.end(num_tiles); tile++) {
        const int64_t p = tile / tall, t = tile % tall;
        const float* const panel = affine.panels + p * size;
        const int64_t column = p * PANEL, columns = std::min<int64_t>(PANEL, affine.out - column);
        const int64_t start = t * num_rows / tall, end = (t + 1) * num_rows / tall;  // of nearly equal height
        MULTIPLY<In>[end - start - 1]({from(a, start, 0), panel, panel + PANEL * (HEAD<In> + inner.first), inner.has_bias,
                                       from(c, start, column), added + start * c.stride + column,
                                       inner.last - inner.first, size, columns, epilogue, activation});
    }
}

// Over all of W.
template <class In>
void product(Rows<float> c, Rows<const In> a, int64_t num_rows, const Affine& affine, Epilogue epilogue = STORE,
             int32_t activation = 0, const float* added = nullptr, Part part = {}) {
    product(c, a, num_rows, affine, {0, length<In>(affine.in), true}, epilogue, activation, added, part);
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
            put(place(row, column), x + column, std::min<int64_t>(PANEL, out_ - column));
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
