// Runs a denoising program (see program.py) from a list of instructions, without Python and without a call for each
// operation. native.py compiles this file, packs the weights and writes the list; the structs below are its own.
//
// Everything is single precision, row-major. Shapes: B batch, N tokens of the stack, M = B N rows, T horizon,
// A trajectory width, D width, F feed-forward width, H heads, J condition tokens.
//
// Threads work in teams. A team takes some of the batch's entries, which never meet, and runs the whole program on
// them; only where there are fewer entries than threads do several threads share one, and meet at barriers.

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <future>
#include <memory>
#include <sstream>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

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

extern "C" {

struct Norm {
    const float* weight;
    const float* bias;
    float epsilon;
};

// x W + b, as panels of PANEL columns: the bias [PANEL], then the weight [in, PANEL], padded with zeros.
struct Affine {
    const float* panels;
    int32_t in;
    int32_t out;
};

enum BlockKind : int32_t { SELF_ATTENTION, CROSS_ATTENTION, FEED_FORWARD };
enum Activation : int32_t { GELU, RELU, GELU_TANH };

struct Block {
    int32_t kind;
    int32_t activation;
    Norm norm;
    Affine first;             // queries, keys and values; hidden; keys and values of the condition
    Affine second;            // of the output; not for cross-attention
    const float* query;       // cross-attention: [H, D / H, D]
    const float* query_bias;  // [H, D / H]
    const float* out;         // [H, D / H, D]
    const float* out_bias;    // [D]
    const float* mask;        // self-attention: [N, N] or null; cross-attention: [N, J]
    float* vectors;           // [2, B, J, H, D]
    float* offset;            // [B, N, J, H]
    const float* rotation;    // self-attention: cosines and sines [2, N, D / H], or null
    float* modulation;        // of all blocks: shift, scale and gate [B, 3, D], or null
};

enum Operation : int32_t {
    PAINT,          // trajectory = given, where it is
    TIME_TOKEN,     // first row of embedded = source [D]
    EMBED,          // x = embedded + tokens W
    ADD_RESIDUALS,  // x += residuals[first..last-1]
    STORE_TOTAL,    // total = sum of residuals
    ADD_TOTAL,      // x += total
    COMPUTE,        // residuals[first] = that block of x
    LOAD_TIME,      // slot 0 of a condition = source [2, H, D] (stride between the two: last), offset [H]
    FOLD,           // slots last.. of a condition = folded source [B, count, D]
    PREDICT,        // output = head(norm(x))
    STEP,           // x0 = clamp((a x + b y) / s); x = c x0 + d x + e y + noise
    MODULATE        // modulation = source [3, D] + offset [B, 3, D], for that block
};

struct Instruction {
    int32_t operation;
    int32_t first;
    int32_t last;
    int32_t count;
    float coefficients[6];
    const float* source;
    const float* offset;
};

struct Program {
    int64_t batch, rows, horizon, trajectory_width, width, hidden_width, heads, condition_tokens;
    float clip;  // infinite: none
    float* x;          // [M, D]
    float* embedded;   // [M, D]
    float* tokens;     // [M, A]
    float* residuals;  // [blocks, M, D]
    float* total;      // [M, D]
    float* qkv;        // [M, 3 D]
    float* mixed;      // [M, D]
    float* hidden;     // [M, F]
    float* output;     // [M, A]
    const float* given;       // [B, T, A]
    const uint8_t* is_given;  // [B, T, A]
    Affine input;             // its bias is in embedded
    Affine head;
    Norm stack_norm;  // weight null: none; so of the next
    Norm final_norm;
    const Block* blocks;
    int64_t num_blocks;
    const Instruction* instructions;
    int64_t num_instructions;
};

int32_t panel_width() { return PANEL; }

// The structs as this compiler lays them out, a line each: name, size, fields with their offsets.
const char* structs() {
#define STRUCT(type) #type " " << sizeof(type)
#define AT(type, field) " " #field " " << offsetof(type, field)
    static const std::string text = [] {
        std::ostringstream out;
        out << STRUCT(Norm) << AT(Norm, weight) << AT(Norm, bias) << AT(Norm, epsilon) << "\n";
        out << STRUCT(Affine) << AT(Affine, panels) << AT(Affine, in) << AT(Affine, out) << "\n";
        out << STRUCT(Block) << AT(Block, kind) << AT(Block, activation) << AT(Block, norm) << AT(Block, first)
            << AT(Block, second) << AT(Block, query) << AT(Block, query_bias) << AT(Block, out) << AT(Block, out_bias)
            << AT(Block, mask) << AT(Block, vectors) << AT(Block, offset) << AT(Block, rotation) << AT(Block, modulation)
            << "\n";
        out << STRUCT(Instruction) << AT(Instruction, operation) << AT(Instruction, first) << AT(Instruction, last)
            << AT(Instruction, count) << AT(Instruction, coefficients) << AT(Instruction, source)
            << AT(Instruction, offset) << "\n";
        out << STRUCT(Program) << AT(Program, batch) << AT(Program, rows) << AT(Program, horizon)
            << AT(Program, trajectory_width) << AT(Program, width) << AT(Program, hidden_width) << AT(Program, heads)
            << AT(Program, condition_tokens) << AT(Program, clip) << AT(Program, x) << AT(Program, embedded)
            << AT(Program, tokens) << AT(Program, residuals) << AT(Program, total) << AT(Program, qkv)
            << AT(Program, mixed) << AT(Program, hidden) << AT(Program, output) << AT(Program, given)
            << AT(Program, is_given) << AT(Program, input) << AT(Program, head) << AT(Program, stack_norm)
            << AT(Program, final_norm) << AT(Program, blocks) << AT(Program, num_blocks) << AT(Program, instructions)
            << AT(Program, num_instructions) << "\n";
        return out.str();
    }();
    return text.c_str();
#undef STRUCT
#undef AT
}

}  // extern "C"

namespace {

// -- vectors ---------------------------------------------------------------------------------------------------------

inline Vec load(const float* p) {
    Vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

inline Vec splat(float value) { return value - Vec{}; }

inline float sum(Vec v) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += v[i];
    return total;
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

// x Phi(x), with the error function to within 1.5e-7 (Abramowitz and Stegun, 7.1.26).
inline Vec gelu(Vec x) {
    const Vec z = (x > -x ? x : -x) * 0.70710678f;
    const Vec t = 1.0f / (1.0f + 0.3275911f * z);
    Vec p = splat(1.061405429f);
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    const Vec tail = 0.5f * p * t * exponential(-z * z);  // 1 - Phi(|x|)
    return x * (x > 0.0f ? 1.0f - tail : tail);
}

// x Phi(x) by the hyperbolic tangent (Hendrycks and Gimpel, 2016), as x times the logistic function.
inline Vec gelu_tanh(Vec x) {
    const Vec power = -1.59576912f * (x + 0.044715f * x * x * x);
    return x / (1.0f + exponential(power > 88.0f ? splat(88.0f) : power));
}

inline Vec activate(Vec x, int32_t activation) {
    return activation == GELU ? gelu(x) : activation == RELU ? at_least(0.0f, x) : gelu_tanh(x);
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

inline float dot(const float* x, const float* y, int64_t n) {
    Vec total{};
    float rest = 0;
    each(n, [&](int64_t i) { total += load(x + i) * load(y + i); }, [&](int64_t i) { rest += x[i] * y[i]; });
    return sum(total) + rest;
}

void normalise(float* y, const float* x, const Norm& norm, int64_t n) {
    Vec total{};
    float rest = 0;
    each(n, [&](int64_t i) { total += load(x + i); }, [&](int64_t i) { rest += x[i]; });
    const float mean = (sum(total) + rest) / n;
    total = Vec{};
    rest = 0;
    each(n, [&](int64_t i) { const Vec d = load(x + i) - mean; total += d * d; },
         [&](int64_t i) { rest += (x[i] - mean) * (x[i] - mean); });
    const float variance = (sum(total) + rest) / n;
    // PyTorch's result is no number where its squares of parts' means overflow; zeros, which an infinite variance would
    // make here, are never right. All of these squares are below 4 times the sum of squares.
    const bool overflows = !std::isfinite(4 * n * (variance + mean * mean));
    const float scale = overflows ? NAN : 1.0f / std::sqrt(variance + norm.epsilon);
    each(n,
         [&](int64_t i) { store(y + i, (load(x + i) - mean) * scale * load(norm.weight + i) + load(norm.bias + i)); },
         [&](int64_t i) { y[i] = (x[i] - mean) * scale * norm.weight[i] + norm.bias[i]; });
}

inline int64_t whole_vectors(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

// Over the n rows of each column of x [n, columns], in place; what follows x up to a whole vector is written as well. No
// number where one of a column is none; nothing is left of what is masked.
inline void softmax(float* x, int64_t n, int64_t columns) {
    for (int64_t c = 0; c < columns; c++) {
        float highest = -INFINITY;
        for (int64_t i = c; i < n * columns; i += columns) highest = std::max(highest, x[i]);
        for (int64_t i = c; i < n * columns; i += columns) x[i] -= highest;
    }
    for (int64_t i = 0; i < n * columns; i += LANES) {
        const Vec v = load(x + i), powers = exponential(v);
        store(x + i, v < LOWEST_EXPONENT ? Vec{} : v == v ? powers : v);
    }
    for (int64_t c = 0; c < columns; c++) {
        float total = 0;
        for (int64_t i = c; i < n * columns; i += columns) total += x[i];
        const float inverse = 1.0f / total;
        for (int64_t i = c; i < n * columns; i += columns) x[i] *= inverse;
    }
}

// -- products --------------------------------------------------------------------------------------------------------

enum Epilogue { STORE, ACTIVATE, ADD_TO_ROWS };

// Rows of a matrix, `stride` apart.
template <class T>
struct Rows {
    T* first;
    int64_t stride;

    T* operator[](int64_t row) const { return first + row * stride; }
};

struct Tile {
    Rows<const float> a;  // [R, in]
    const float* panel;   // [1 + in, PANEL]
    Rows<float> c;        // [R, columns]
    const float* added;   // rows to add to c (ADD_TO_ROWS), as far apart
    int64_t in, columns;
    Epilogue epilogue;
    int32_t activation;
};

// R rows of a product with one panel.
template <int R>
void multiply(const Tile& tile) {
    Vec sums[R][VECTORS];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < VECTORS; v++) sums[r][v] = load(tile.panel + v * LANES);
    const float* weight = tile.panel + PANEL;
    const int64_t size = (1 + tile.in) * PANEL;
    for (int64_t k = 0; k < tile.in; k++, weight += PANEL) {
        Vec weights[VECTORS];
        for (int v = 0; v < VECTORS; v++) {
            weights[v] = load(weight + v * LANES);
            __builtin_prefetch(weight + size + v * LANES, 0, 2);  // the next panel, into the second level
        }
        for (int r = 0; r < R; r++) {
            const Vec value = splat(tile.a[r][k]);
            for (int v = 0; v < VECTORS; v++) sums[r][v] += value * weights[v];
        }
    }
    for (int r = 0; r < R; r++) {
        float* c = tile.c[r];
        float values[PANEL];
        float* target = tile.columns == PANEL ? c : values;
        for (int v = 0; v < VECTORS; v++)
            store(target + v * LANES, tile.epilogue == ACTIVATE ? activate(sums[r][v], tile.activation) : sums[r][v]);
        if (tile.columns != PANEL) std::memcpy(c, values, tile.columns * sizeof(float));
        if (tile.epilogue == ADD_TO_ROWS) add(c, tile.added + r * tile.c.stride, tile.columns);
    }
}

using Multiply = void (*)(const Tile&);

template <int... R>
constexpr std::array<Multiply, sizeof...(R)> multiplies(std::integer_sequence<int, R...>) {
    return {multiply<R + 1>...};
}

constexpr auto MULTIPLY = multiplies(std::make_integer_sequence<int, TILE>());  // by the number of rows, less 1

// c = a W + b for the panels first..last-1 of W, a [num_rows, in].
void product(Rows<float> c, Rows<const float> a, int64_t num_rows, const Affine& affine, int64_t first, int64_t last,
             Epilogue epilogue = STORE, int32_t activation = 0, const float* added = nullptr) {
    const int64_t num_tiles = (num_rows + TILE - 1) / TILE;
    for (int64_t p = first; p < last; p++) {
        const float* panel = affine.panels + p * PANEL * (1 + affine.in);
        const int64_t column = p * PANEL, columns = std::min<int64_t>(PANEL, affine.out - column);
        for (int64_t t = 0; t < num_tiles; t++) {  // of nearly equal height
            const int64_t start = t * num_rows / num_tiles, end = (t + 1) * num_rows / num_tiles;
            MULTIPLY[end - start - 1]({{a[start], a.stride}, panel, {c[start] + column, c.stride},
                                       added + start * c.stride + column, affine.in, columns, epilogue, activation});
        }
    }
}

inline int64_t num_panels(int64_t columns) { return (columns + PANEL - 1) / PANEL; }

// All of c = a W + b, where rows follow each other.
void product(float* c, const float* a, int64_t num_rows, const Affine& affine, Epilogue epilogue = STORE,
             const float* added = nullptr) {
    product({c, affine.out}, {a, affine.in}, num_rows, affine, 0, num_panels(affine.out), epilogue, 0, added);
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

// -- teams -----------------------------------------------------------------------------------------------------------

class Barrier {
public:
    explicit Barrier(int size) : size_(size) {}

    void wait() {
        if (size_ == 1) return;
        const int phase = phase_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
            arrived_.store(0, std::memory_order_relaxed);
            phase_.store(phase + 1, std::memory_order_release);
            return;
        }
        // Others are a few microseconds away, unless somebody else has their processor.
        for (int i = 0; phase_.load(std::memory_order_acquire) == phase; i++)
            if (i >= 2000) std::this_thread::yield();
    }

private:
    const int size_;
    std::atomic<int> arrived_{0}, phase_{0};
};

// One of `size` threads that run the program on the batch entries first..last-1.
struct Member {
    const Program& p;
    int64_t first, last;
    int index, size;
    Barrier& barrier;
    std::vector<float> normalised, scores;
    Panels keys, values;  // of one head of self-attention

    Member(const Program& program, int64_t first, int64_t last, int index, int size, Barrier& barrier)
        : p(program), first(first), last(last), index(index), size(size), barrier(barrier),
          normalised((last - first) * std::max(p.rows, p.condition_tokens) * 2 * p.width),
          scores(std::max(p.rows * whole_vectors(p.rows), whole_vectors(p.condition_tokens * p.heads))), keys(p.width / p.heads, p.rows),
          values(p.rows, p.width / p.heads) {}

    int64_t share(int64_t n, int i) const { return n * i / size; }

    // Rows of the stack that are this member's.
    int64_t first_row() const { return first * p.rows + share((last - first) * p.rows, index); }
    int64_t last_row() const { return first * p.rows + share((last - first) * p.rows, index + 1); }

    // All columns of `c`, each member a share of them; c and a start at the team's first row.
    void shared_product(float* c, const float* a, int64_t num_rows, const Affine& affine, Epilogue epilogue = STORE,
                        int32_t activation = 0) {
        const int64_t panels = num_panels(affine.out);
        product({c, affine.out}, {a, affine.in}, num_rows, affine, share(panels, index), share(panels, index + 1),
                epilogue, activation);
    }

    void run() {
        for (int64_t i = 0; i < p.num_instructions; i++) execute(p.instructions[i]);
        barrier.wait();
    }

    // Operations on rows of the stack need no barrier among themselves: each member has its own rows.
    void execute(const Instruction& instruction) {
        const int64_t D = p.width, begin = first_row(), end = last_row(), offset = begin * D, n = (end - begin) * D;
        switch (instruction.operation) {
            case PAINT: paint(begin, end); break;
            case TIME_TOKEN:
                for (int64_t row = begin; row < end; row++)
                    if (row % p.rows == 0) std::memcpy(p.embedded + row * D, instruction.source, D * sizeof(float));
                break;
            case EMBED:
                product(p.x + offset, p.tokens + begin * p.trajectory_width, end - begin, p.input, ADD_TO_ROWS,
                        p.embedded + offset);
                break;
            case ADD_RESIDUALS: add_residuals(p.x + offset, instruction.first, instruction.last, offset, n); break;
            case STORE_TOTAL:
                std::fill(p.total + offset, p.total + offset + n, 0.0f);
                add_residuals(p.total + offset, 0, p.num_blocks, offset, n);
                break;
            case ADD_TOTAL: add(p.x + offset, p.total + offset, n); break;
            case COMPUTE: compute(instruction.first); break;
            case LOAD_TIME: load_time(p.blocks[instruction.first], instruction); break;
            case FOLD: fold(p.blocks[instruction.first], instruction); break;
            case PREDICT: predict(begin, end); break;
            case STEP: step(instruction, begin, end); break;
            case MODULATE: modulate(p.blocks[instruction.first], instruction); break;
        }
    }

    void add_residuals(float* y, int64_t from, int64_t to, int64_t offset, int64_t n) {
        for (int64_t b = from; b < to; b++) add(y, p.residuals + b * p.batch * p.rows * p.width + offset, n);
    }

    void compute(int32_t number) {
        const Block& block = p.blocks[number];
        float* residual = p.residuals + number * p.batch * p.rows * p.width;
        if (block.kind == CROSS_ATTENTION) return cross_attention(block, residual);
        const int64_t D = p.width, start = first * p.rows, num_rows = (last - first) * p.rows;
        barrier.wait();
        for (int64_t row = 0; row < num_rows; row++)  // by every member, for itself: cheaper than to wait
            normalise(&normalised[row * D], p.x + (start + row) * D, norm_of(block, start + row), D);
        if (block.kind == FEED_FORWARD) {
            float* hidden = p.hidden + start * p.hidden_width;
            shared_product(hidden, normalised.data(), num_rows, block.first, ACTIVATE, block.activation);
            barrier.wait();
            shared_product(residual + start * D, hidden, num_rows, block.second);
        } else {
            shared_product(p.qkv + start * 3 * D, normalised.data(), num_rows, block.first);
            barrier.wait();
            const int64_t pairs = (last - first) * p.heads;  // of batch entry and head
            for (int64_t i = share(pairs, index); i < share(pairs, index + 1); i++)
                attend(first + i / p.heads, i % p.heads, block);
            barrier.wait();
            shared_product(residual + start * D, p.mixed + start * D, num_rows, block.second);
        }
        if (block.modulation) gate(block, residual);
        barrier.wait();
    }

    // No barrier: the last block that read a modulation ended with one, the next one begins with one.
    void modulate(const Block& block, const Instruction& instruction) {
        const int64_t n = 3 * p.width, begin = share(n, index), end = share(n, index + 1);
        for (int64_t entry = first; entry < last; entry++) {
            float* modulation = block.modulation + entry * n;
            std::memcpy(modulation + begin, instruction.source + begin, (end - begin) * sizeof(float));
            add(modulation + begin, instruction.offset + entry * n + begin, end - begin);
        }
    }

    // Of a row before a block: with the scale and the shift of the row's entry, where there are any.
    Norm norm_of(const Block& block, int64_t row) const {
        if (!block.modulation) return block.norm;
        const float* shift = block.modulation + row / p.rows * 3 * p.width;
        return {shift + p.width, shift, block.norm.epsilon};
    }

    // Gates the columns of a residual that this member computed.
    void gate(const Block& block, float* residual) {
        const int64_t D = p.width, panels = num_panels(D);
        const int64_t begin = std::min(share(panels, index) * PANEL, D), end = std::min(share(panels, index + 1) * PANEL, D);
        for (int64_t row = first * p.rows; row < last * p.rows; row++)
            multiply_by(residual + row * D + begin, block.modulation + (row / p.rows * 3 + 2) * D + begin, end - begin);
    }

    // One head of self-attention, from qkv to mixed.
    void attend(int64_t entry, int64_t head, const Block& block) {
        const int64_t D = p.width, N = p.rows, head_width = D / p.heads;
        const float scale = 1.0f / std::sqrt((float)head_width);
        float* const queries = p.qkv + entry * N * 3 * D + head * head_width;
        for (int64_t row = 0; block.rotation && row < N; row++)
            for (int side = 0; side < 2; side++)
                rotate(queries + row * 3 * D + side * D, block.rotation + row * head_width,
                       block.rotation + (N + row) * head_width, head_width / 2);
        const float* const mask = block.mask;
        const Rows<const float> query{queries, 3 * D};
        const Rows<const float> key{query.first + D, 3 * D}, value{query.first + 2 * D, 3 * D};
        for (int64_t j = 0; j < N; j++) keys.set_column(j, key[j]), values.set_row(j, value[j]);
        const Rows<float> probabilities{scores.data(), whole_vectors(N)};
        product(probabilities, query, N, keys, 0, num_panels(N));
        for (int64_t i = 0; i < N; i++) {
            float* row = probabilities[i];
            for (int64_t j = 0; j < N; j++) {
                const float added = mask ? mask[i * N + j] : 0.0f;
                row[j] = added == -INFINITY ? -INFINITY : row[j] * scale + added;
            }
            softmax(row, N, 1);
        }
        float* mixed = p.mixed + entry * N * D + head * head_width;
        product({mixed, D}, {scores.data(), probabilities.stride}, N, values, 0, num_panels(head_width));
    }

    void cross_attention(const Block& block, float* residual) {
        const int64_t D = p.width, H = p.heads, J = p.condition_tokens, half = p.batch * J * H * D;
        for (int64_t row = first_row(); row < last_row(); row++) {
            const float* logits = block.vectors + (row / p.rows) * J * H * D;
            const float* values = logits + half;
            const float* offset = block.offset + row * J * H;
            normalise(normalised.data(), p.x + row * D, block.norm, D);
            for (int64_t i = 0; i < J * H; i++) scores[i] = dot(normalised.data(), logits + i * D, D) + offset[i];
            softmax(scores.data(), J, H);
            float* out = residual + row * D;
            std::memcpy(out, block.out_bias, D * sizeof(float));
            for (int64_t i = 0; i < J * H; i++) add_scaled(out, values + i * D, scores[i], D);
        }
    }

    void load_time(const Block& block, const Instruction& instruction) {
        const int64_t D = p.width, H = p.heads, J = p.condition_tokens, half = p.batch * J * H * D;
        barrier.wait();
        for (int64_t entry = first; entry < last; entry++)
            if (entry % size == index)
                for (int side = 0; side < 2; side++)
                    std::memcpy(block.vectors + side * half + entry * J * H * D,
                                instruction.source + side * (int64_t)instruction.last, H * D * sizeof(float));
        for (int64_t row = first_row(); row < last_row(); row++)
            for (int64_t head = 0; head < H; head++)
                block.offset[row * J * H + head] = instruction.offset[head] + block.mask[(row % p.rows) * J];
        barrier.wait();
    }

    // See CrossAttentionWeights.fold.
    void fold(const Block& block, const Instruction& instruction) {
        const int64_t D = p.width, H = p.heads, J = p.condition_tokens, half = p.batch * J * H * D;
        const int64_t head_width = D / H, count = instruction.count;
        float* key_value = normalised.data();
        barrier.wait();
        for (int64_t entry = first; entry < last; entry++) {
            product(key_value, instruction.source + entry * count * D, count, block.first);
            for (int64_t i = 0; i < count * H; i++) {
                if (i % size != index) continue;
                const int64_t token = i / H, head = i % H, j = instruction.last + token;
                const float* key = key_value + token * 2 * D + head * head_width;
                for (int side = 0; side < 2; side++) {
                    float* vector = block.vectors + side * half + ((entry * J + j) * H + head) * D;
                    const float* matrix = (side == 0 ? block.query : block.out) + head * head_width * D;
                    std::fill(vector, vector + D, 0.0f);
                    for (int64_t d = 0; d < head_width; d++) add_scaled(vector, matrix + d * D, key[side * D + d], D);
                }
                const float logit = dot(key, block.query_bias + head * head_width, head_width);
                for (int64_t n = 0; n < p.rows; n++)
                    block.offset[((entry * p.rows + n) * J + j) * H + head] = logit + block.mask[n * J + j];
            }
        }
        barrier.wait();
    }

    void predict(int64_t begin, int64_t end) {
        const int64_t D = p.width;
        for (int64_t row = begin; row < end; row++) {
            const float* x = p.x + row * D;
            for (const Norm& norm : {p.stack_norm, p.final_norm})
                if (norm.weight) {
                    normalise(normalised.data(), x, norm, D);
                    x = normalised.data();
                }
            product(p.output + row * p.trajectory_width, x, 1, p.head);
        }
    }

    // Rows of the stack that are steps of the trajectory: all, or all but the timestep's.
    template <class F>
    void each_trajectory_value(int64_t begin, int64_t end, F f) {
        const int64_t A = p.trajectory_width, time_rows = p.rows - p.horizon;
        for (int64_t row = begin; row < end; row++) {
            const int64_t t = row % p.rows - time_rows;
            if (t < 0) continue;
            for (int64_t a = 0; a < A; a++) f(row * A + a, ((row / p.rows) * p.horizon + t) * A + a);
        }
    }

    void paint(int64_t begin, int64_t end) {
        each_trajectory_value(begin, end, [&](int64_t token, int64_t i) {
            if (p.is_given[i]) p.tokens[token] = p.given[i];
        });
    }

    void step(const Instruction& instruction, int64_t begin, int64_t end) {
        const float* c = instruction.coefficients;
        each_trajectory_value(begin, end, [&](int64_t token, int64_t i) {
            const float x = p.tokens[token], y = p.output[token];
            const float x0 = std::min(std::max((c[0] * x + c[1] * y) * c[2], -p.clip), p.clip);
            p.tokens[token] = c[3] * x0 + c[4] * x + c[5] * y + (instruction.source ? instruction.source[i] : 0.0f);
        });
    }
};

}  // namespace

// OpenMP's, where PyTorch's own is known: what starts a parallel region, and the number of threads in it.
typedef void (*Parallel)(void (*)(void*), void*, unsigned, unsigned);
typedef int (*TeamSize)();

// The threads of one call. Each comes in once, in any order; the first one knows how many there are.
class Call {
public:
    explicit Call(const Program& program) : program_(program) {}

    void begin(int count) {
        const int teams = num_teams(count);
        for (int team = 0; team < teams; team++) barriers_.push_back(std::make_unique<Barrier>(team_size(team, count)));
        begun_.set_value(count);
    }

    void work(int thread) {
        const int count = count_.get(), teams = num_teams(count), team = thread % teams;
        const int64_t batch = program_.batch;
        Member(program_, batch * team / teams, batch * (team + 1) / teams, thread / teams, team_size(team, count),
               *barriers_[team]).run();
    }

    int next_thread() { return next_.fetch_add(1); }

private:
    int num_teams(int count) const { return (int)std::min<int64_t>(program_.batch, count); }
    int team_size(int team, int count) const {
        const int teams = num_teams(count);
        return count / teams + (team < count % teams ? 1 : 0);
    }

    const Program& program_;
    std::atomic<int> next_{0};
    std::promise<int> begun_;
    std::shared_future<int> count_{begun_.get_future()};
    std::vector<std::unique_ptr<Barrier>> barriers_;
};

// In OpenMP's threads where `parallel` is given: PyTorch's wait for work in a loop, and threads beside them would have
// to share their processors. Otherwise in threads of its own.
extern "C" void run(const Program* program, int32_t num_threads, Parallel parallel, TeamSize team_size) {
    Call call(*program);
    if (parallel && num_threads > 1) {
        struct Region { Call& call; TeamSize size; } region{call, team_size};
        parallel([](void* data) {
            Region& region = *static_cast<Region*>(data);
            const int thread = region.call.next_thread();
            if (thread == 0) region.call.begin(region.size());
            region.call.work(thread);
        }, &region, (unsigned)num_threads, 0);
        return;
    }
    std::vector<std::thread> helpers;
    try {
        for (int i = 1; i < num_threads; i++) helpers.emplace_back([&call, i] { call.work(i); });
    } catch (const std::system_error&) {
        // fewer threads than asked for
    }
    call.begin((int)helpers.size() + 1);
    call.work(0);
    for (std::thread& helper : helpers) helper.join();
}
