// Runs a denoising program (see program.py) from a list of instructions, without Python and without a call for each
// operation. native.py compiles this file, packs the weights and writes the list; the structs below and in the
// headers are its own.
//
// Everything is single precision, row-major, but for the operands of products in bfloat16 (halves.h) or bytes (bytes.h).
// Shapes: B batch, N tokens of the stack, M = B N rows, T horizon, A trajectory width, D width, F feed-forward width, H heads, J condition tokens.
//
// Threads work in teams. A team takes some of the batch's entries, which never meet, and runs the whole program on
// them; only where there are fewer entries than threads do several threads share one, and meet at barriers.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <sstream>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "products.h"

extern "C" {

enum BlockKind : int32_t { SELF_ATTENTION, CROSS_ATTENTION, FEED_FORWARD };

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
    COMPUTE,        // residuals[first] = that block of x; where it has a source [2, H, D] (the two `last` apart) and
                    // offset [H], they are the first token of its condition
    FOLD,           // slots last.. of a condition = folded source [B, count, D]
    PREDICT,        // output = head(norm(x))
    STEP,           // x0 = clamp((a x + b y) / s); x = c x0 + d x + e y + f last x0 + source [B, T, A]
    MODULATE,       // modulation = source [3, D] + offset [B, 3, D], for that block
    LINEAR,         // target [B, count, out] = map of source [B, count, in], with activation `first` (-1: none), or plus
                    // offset [B, count, out]
    REMEMBER        // kept[first] = a kept[first] + b trajectory
};

struct Instruction {
    int32_t operation;
    int32_t first;
    int32_t last;
    int32_t count;
    float coefficients[7];
    const float* source;
    const float* offset;
    float* target;
    Affine map;
};

enum Precision : int32_t { SINGLE, BFLOAT16, INT8 };

struct Program {
    int64_t batch, rows, horizon, trajectory_width, width, hidden_width, heads, condition_tokens;
    float clip;  // infinite: none
    int32_t precision;  // of products with the weights of self-attention and feed-forward
    float* x;          // [M, D]
    float* embedded;   // [M, D]
    float* tokens;     // [M, A]
    float* residuals;  // [blocks, M, D]
    float* total;      // [M, D]
    float* qkv;        // [M, 3 D]
    float* output;     // [M, A]
    float* x0;         // [B, T, A], of the last step
    float* kept;       // [memories, B, T, A]
    const float* given;       // [B, T, A]
    const uint8_t* is_given;  // [B, T, A]
    float* hidden;            // [M, F]
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
            << AT(Instruction, offset) << AT(Instruction, target) << AT(Instruction, map) << "\n";
        out << STRUCT(Program) << AT(Program, batch) << AT(Program, rows) << AT(Program, horizon)
            << AT(Program, trajectory_width) << AT(Program, width) << AT(Program, hidden_width) << AT(Program, heads)
            << AT(Program, condition_tokens) << AT(Program, clip) << AT(Program, precision) << AT(Program, x) << AT(Program, embedded)
            << AT(Program, tokens) << AT(Program, residuals) << AT(Program, total) << AT(Program, qkv)
            << AT(Program, output) << AT(Program, x0) << AT(Program, kept) << AT(Program, given) << AT(Program, is_given)
            << AT(Program, hidden) << AT(Program, input) << AT(Program, head) << AT(Program, stack_norm)
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

// -- teams -----------------------------------------------------------------------------------------------------------

// Others are a few microseconds away, unless somebody else has their processor.
template <class F>
void spin_until(F ready) {
    for (int i = 0; !ready(); i++)
        if (i >= 2000) std::this_thread::yield();
}

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
        spin_until([&] { return phase_.load(std::memory_order_acquire) != phase; });
    }

private:
    const int size_;
    std::atomic<int> arrived_{0}, phase_{0};
};

// What the threads share that run the program on the batch entries first..last-1.
struct Team {
    const int64_t first, last;
    const int size;
    Barrier barrier;
    std::vector<float> parts;  // of a sum, [size, M, D], where there are several threads

    Team(const Program& program, int64_t first, int64_t last, int size)
        : first(first), last(last), size(size), barrier(size),
          parts(size > 1 ? size * (last - first) * program.rows * program.width : 0) {}
};

// One of those threads.
struct Member {
    const Program& p;
    const int64_t first, last;
    const Part part;  // of what the team shares
    Barrier& barrier;
    std::vector<float>& parts;
    std::vector<float> normalised, scores;
    std::vector<float> mixed;  // by self-attention, [M, D]: other columns than those of this member's heads stay 0
    std::vector<Pair> pairs;  // rows of operands, [M, D or F]; or
    std::vector<Quad> quads;
    std::vector<Scale> scales;
    Panels keys, values;  // of one head of self-attention

    Member(const Program& program, Team& team, int index)
        : p(program), first(team.first), last(team.last), part{index, team.size}, barrier(team.barrier), parts(team.parts),
          normalised((last - first) * std::max(p.rows, p.condition_tokens) * 2 * p.width),
          scores(std::max(p.rows * whole_vectors(p.rows), whole_vectors(p.condition_tokens * p.heads))),
          mixed((last - first) * p.rows * p.width),
          pairs(p.precision == BFLOAT16 ? (last - first) * p.rows * num_pairs(std::max(p.width, p.hidden_width)) : 0),
          quads(p.precision == INT8 ? (last - first) * p.rows * quads_of_row(std::max(p.width, p.hidden_width)) : 0),
          scales(p.precision == INT8 ? (last - first) * p.rows : 0),
          keys(p.width / p.heads, p.rows), values(p.rows, p.width / p.heads) {}

    // Rows of the stack that are this member's.
    int64_t first_row() const { return first * p.rows + part.begin((last - first) * p.rows); }
    int64_t last_row() const { return first * p.rows + part.end((last - first) * p.rows); }

    // Rows of n numbers as what a product takes, until the next ones.
    template <class Operand>
    Rows<const Operand> operands(Rows<const float> x, int64_t num_rows, int64_t n) {
        if constexpr (std::is_same_v<Operand, float>) {
            return x;
        } else if constexpr (std::is_same_v<Operand, Pair>) {
            const int64_t stride = num_pairs(n);
            for (int64_t row = 0; row < num_rows; row++) round(&pairs[row * stride], x[row], n);
            return {pairs.data(), stride};
        } else {
            const int64_t stride = quads_of_row(n);
            for (int64_t row = 0; row < num_rows; row++) scales[row] = quantise(&quads[row * stride], x[row], n);
            return {quads.data(), stride, scales.data()};
        }
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
            case COMPUTE: compute(instruction); break;
            case FOLD: fold(p.blocks[instruction.first], instruction); break;
            case PREDICT: predict(begin, end); break;
            case STEP: step(instruction, begin, end); break;
            case MODULATE: modulate(p.blocks[instruction.first], instruction); break;
            case LINEAR: linear(instruction); break;
            case REMEMBER: remember(instruction, begin, end); break;
        }
    }

    void add_residuals(float* y, int64_t from, int64_t to, int64_t offset, int64_t n) {
        for (int64_t b = from; b < to; b++) add(y, p.residuals + b * p.batch * p.rows * p.width + offset, n);
    }

    void compute(const Instruction& instruction) {
        const Block& block = p.blocks[instruction.first];
        float* residual = p.residuals + instruction.first * p.batch * p.rows * p.width;
        if (block.kind == CROSS_ATTENTION) return cross_attention(block, residual, instruction);
        barrier.wait();
        if (p.precision == INT8) compute<Quad>(block, residual);
        else if (p.precision == BFLOAT16) compute<Pair>(block, residual);
        else compute<float>(block, residual);
        barrier.wait();
        if (part.count > 1) add_parts(residual);
        if (block.modulation) gate(block, residual);
    }

    // Each member sums over the hidden columns, or the heads, that it computed itself: there is nothing to wait for.
    template <class Operand>
    void compute(const Block& block, float* residual) {
        const int64_t D = p.width, start = first * p.rows, num_rows = (last - first) * p.rows;
        for (int64_t row = 0; row < num_rows; row++)  // by every member, for itself: cheaper than to wait
            normalise(&normalised[row * D], p.x + (start + row) * D, norm_of(block, start + row), D);
        const Rows<const Operand> x = operands<Operand>({normalised.data(), D}, num_rows, D);
        const Rows<float> sum{part.count > 1 ? &parts[part.index * num_rows * D] : residual + start * D, D};
        if (block.kind == FEED_FORWARD) {
            const int64_t panels = num_panels(block.first.out), width = block.first.out;
            const int64_t begin = part.begin(panels) * PANEL, end = std::min(part.end(panels) * PANEL, width);
            const Inner inner{operand_at<Operand>(begin), length<Operand>(end), part.index == 0};
            const Rows<float> hidden{p.hidden + start * p.hidden_width + begin, p.hidden_width};
            product(hidden, x, num_rows, columns_of<Operand>(block.first, begin, end), ACTIVATE, block.activation);
            const Rows<const float> summands{hidden.first, hidden.stride};
            product(sum, operands<Operand>(summands, num_rows, end - begin), num_rows, block.second, inner);
        } else {
            product(Rows<float>{p.qkv + start * 3 * D, 3 * D}, x, num_rows, block.first, STORE, 0, nullptr, part);
            barrier.wait();
            const int64_t begin = part.begin(p.heads), end = part.end(p.heads), head_width = D / p.heads;
            for (int64_t entry = first; entry < last; entry++)
                for (int64_t head = begin; head < end; head++) attend(entry, head, block);
            const Inner inner{operand_at<Operand>(begin * head_width), length<Operand>(end * head_width), part.index == 0};
            const Rows<const Operand> summands = operands<Operand>({mixed.data(), D}, num_rows, D);
            product(sum, from(summands, 0, inner.first), num_rows, block.second, inner);
        }
    }

    // The rows of a residual that are this member's, from the parts of the sum.
    void add_parts(float* residual) {
        const int64_t D = p.width, begin = first_row(), n = (last_row() - begin) * D;
        const float* summands = parts.data() + (begin - first * p.rows) * D;
        std::memcpy(residual + begin * D, summands, n * sizeof(float));
        for (int64_t i = 1; i < part.count; i++) add(residual + begin * D, summands + i * (last - first) * p.rows * D, n);
    }

    // No barrier at its end: what reads the rows of other members begins with one.
    void linear(const Instruction& instruction) {
        barrier.wait();
        const Affine& map = instruction.map;
        const int64_t start = first * instruction.count, num_rows = (last - first) * instruction.count;
        const float* const added = instruction.offset ? instruction.offset + start * map.out : nullptr;
        const Epilogue epilogue = added ? ADD_TO_ROWS : instruction.first < 0 ? STORE : ACTIVATE;
        product(Rows<float>{instruction.target + start * map.out, map.out},
                Rows<const float>{instruction.source + start * map.in, map.in}, num_rows, map, epilogue,
                instruction.first, added, part);
    }

    // No barrier at its end: the block that it is for begins with one.
    void modulate(const Block& block, const Instruction& instruction) {
        barrier.wait();
        const int64_t n = 3 * p.width, begin = part.begin(n), end = part.end(n);
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

    // Gates the rows of a residual that are this member's.
    void gate(const Block& block, float* residual) {
        const int64_t D = p.width;
        for (int64_t row = first_row(); row < last_row(); row++)
            multiply_by(residual + row * D, block.modulation + (row / p.rows * 3 + 2) * D, D);
    }

    // One head of self-attention, from qkv to `mixed`.
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
        product(probabilities, query, N, keys);
        for (int64_t i = 0; i < N; i++) {
            float* row = probabilities[i];
            for (int64_t j = 0; j < N; j++) {
                const float added = mask ? mask[i * N + j] : 0.0f;
                row[j] = added == -INFINITY ? -INFINITY : row[j] * scale + added;
            }
            std::fill(row + N, row + probabilities.stride, -INFINITY);
            softmax(row, N);
        }
        const Rows<float> to{&mixed[(entry - first) * N * D + head * head_width], D};
        product(to, Rows<const float>{scores.data(), probabilities.stride}, N, values);
    }

    void cross_attention(const Block& block, float* residual, const Instruction& time) {
        const int64_t D = p.width, H = p.heads, J = p.condition_tokens, half = p.batch * J * H * D;
        const int64_t timed = time.source ? H : 0;  // of the J H logits and values
        for (int64_t row = first_row(); row < last_row(); row++) {
            const float* const logits = block.vectors + (row / p.rows) * J * H * D;
            const float* const offset = block.offset + row * J * H;
            float* const y = residual + row * D;
            normalise(normalised.data(), p.x + row * D, block.norm, D);
            const float masked = block.mask[row % p.rows * J];
            for (int64_t i = 0; i < timed; i++)
                scores[i] = dot(normalised.data(), time.source + i * D, D) + time.offset[i] + masked;
            for (int64_t i = timed; i < J * H; i++) scores[i] = dot(normalised.data(), logits + i * D, D) + offset[i];
            softmax(scores.data(), J, H);
            combine(y, block.out_bias, time.source + time.last, scores.data(), timed, D);
            combine(y, y, logits + half + timed * D, &scores[timed], J * H - timed, D);
        }
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
                if (i % part.count != part.index) continue;
                const int64_t token = i / H, head = i % H, j = instruction.last + token;
                const float* key = key_value + token * 2 * D + head * head_width;
                for (int side = 0; side < 2; side++) {
                    float* vector = block.vectors + side * half + ((entry * J + j) * H + head) * D;
                    const float* matrix = (side == 0 ? block.query : block.out) + head * head_width * D;
                    std::fill(vector, vector + D, 0.0f);
                    combine(vector, vector, matrix, key + side * D, head_width, D);
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

    void remember(const Instruction& instruction, int64_t begin, int64_t end) {
        const float old = instruction.coefficients[0], now = instruction.coefficients[1];
        float* kept = p.kept + instruction.first * p.batch * p.horizon * p.trajectory_width;
        each_trajectory_value(begin, end, [&](int64_t token, int64_t i) {
            kept[i] = (old == 0.0f ? 0.0f : old * kept[i]) + now * p.tokens[token];  // 0: whatever it held
        });
    }

    void step(const Instruction& instruction, int64_t begin, int64_t end) {
        const float* c = instruction.coefficients;
        each_trajectory_value(begin, end, [&](int64_t token, int64_t i) {
            const float x = p.tokens[token], y = p.output[token];
            const float x0 = std::min(std::max((c[0] * x + c[1] * y) * c[2], -p.clip), p.clip);
            const float added = instruction.source ? instruction.source[i] : 0.0f;
            const float previous = c[6] == 0.0f ? 0.0f : c[6] * p.x0[i];  // 0: whatever it held
            p.tokens[token] = c[3] * x0 + c[4] * x + c[5] * y + previous + added;
            p.x0[i] = x0;
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
        const int64_t batch = program_.batch;
        for (int team = 0; team < teams; team++)
            teams_.push_back(std::make_unique<Team>(program_, batch * team / teams, batch * (team + 1) / teams,
                                                    team_size(team, count)));
        count_.store(count, std::memory_order_release);
    }

    void work(int thread) {
        spin_until([&] { return count_.load(std::memory_order_acquire) > 0; });
        const int teams = num_teams(count_.load(std::memory_order_relaxed));
        Member(program_, *teams_[thread % teams], thread / teams).run();
    }

    int next_thread() { return next_.fetch_add(1); }

private:
    int num_teams(int count) const { return (int)std::min<int64_t>(program_.batch, count); }
    int team_size(int team, int count) const {
        const int teams = num_teams(count);
        return count / teams + (team < count % teams ? 1 : 0);
    }

    const Program& program_;
    std::atomic<int> next_{0}, count_{0};  // threads that came, and all of them once they may begin
    std::vector<std::unique_ptr<Team>> teams_;
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
