// native.cpp as a program of its own, for processors that an emulator stands in for, and for what only C++ can reach.
//
//   native_main                       prints the width of panels, and the structs
//   native_main FILE ADDRESS THREADS  runs the Program at the start of a file, mapped to that address
//   native_main products              compares products with a loop; prints what differs

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <cstdio>
#include <cstdlib>
#include <random>

#include NATIVE_SOURCE

namespace {

int run_file(const char* path, const char* address, const char* threads) {
    void* const wanted = (void*)std::strtoull(address, nullptr, 0);
    const int file = open(path, O_RDWR);
    struct stat status;
    if (file < 0 || fstat(file, &status) != 0) return std::perror(path), 1;
    void* found = mmap(wanted, status.st_size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED_NOREPLACE, file, 0);
    if (found != wanted) return std::perror("mmap"), 1;
    run((const Program*)found, std::atoi(threads), nullptr, nullptr);
    return 0;
}

std::vector<float> draw(int64_t n) {
    static std::mt19937 generator(1);
    std::vector<float> values(n);
    for (float& value : values) value = std::uniform_real_distribution<float>(-1, 1)(generator);
    return values;
}

// To the nearest number in bfloat16, halfway to even.
float rounded(float value) {
    int exponent;
    std::frexp(value, &exponent);
    const float unit = std::ldexp(1.0f, exponent - 8);
    return std::nearbyint(value / unit) * unit;
}

// Where a panel has the k-th weight of a column, and so many after it.
template <class In>
float* place(std::vector<float>& panels, int64_t in, int64_t k, int64_t column) {
    return &panels[column / PANEL * panel_size<In>(in) + (HEAD<In> + k / VALUES<In>) * PANEL + column % PANEL];
}

// Packs a weight [in, out] as panels of operands of type In; it becomes what they mean.
void pack(std::vector<float>& weight, int64_t in, int64_t out, std::vector<float>& panels, float) {
    for (int64_t k = 0; k < in; k++)
        for (int64_t column = 0; column < out; column++) *place<float>(panels, in, k, column) = weight[k * out + column];
}

void pack(std::vector<float>& weight, int64_t in, int64_t out, std::vector<float>& panels, Pair) {
    for (int64_t k = 0; k < in; k++)
        for (int64_t column = 0; column < out; column++) {
            float& value = weight[k * out + column] = rounded(weight[k * out + column]);
            uint16_t* const half = (uint16_t*)place<Pair>(panels, in, k, column) + k % 2;
            std::memcpy(half, (const char*)&value + 2, sizeof *half);
        }
}

void pack(std::vector<float>& weight, int64_t in, int64_t out, std::vector<float>& panels, Quad) {
    for (int64_t column = 0; column < out; column++) {
        const float unit = (1 + column) / 1000.0f;
        place<Quad>(panels, in, 0, column)[-PANEL] = unit;
        for (int64_t k = 0; k < in; k++) {
            const float whole = std::nearbyint(weight[k * out + column] * 127);
            ((uint8_t*)place<Quad>(panels, in, k, column))[k % 4] = (uint8_t)(128 + whole);
            weight[k * out + column] = whole * unit;
        }
    }
}

// Rows of `in` numbers as operands of type In; they become what these mean.
struct Operands {
    std::vector<float>& a;
    std::vector<Pair> pairs;
    std::vector<Quad> quads;
    std::vector<Scale> scales;

    Rows<const float> rows(int64_t, int64_t in, float) { return {a.data(), in}; }

    Rows<const Pair> rows(int64_t num_rows, int64_t in, Pair) {
        pairs.resize(num_rows * num_pairs(in));
        for (int64_t row = 0; row < num_rows; row++) round(&pairs[row * num_pairs(in)], &a[row * in], in);
        for (float& value : a) value = rounded(value);
        return {pairs.data(), num_pairs(in)};
    }

    Rows<const Quad> rows(int64_t num_rows, int64_t in, Quad) {
        const int64_t stride = quads_of_row(in);
        quads.resize(num_rows * stride);
        for (int64_t row = 0; row < num_rows; row++) {
            Quad* const quad = &quads[row * stride];
            scales.push_back(quantise(quad, &a[row * in], in));
            for (int64_t k = 0; k < in; k++) {
#if defined(__AVX512VNNI__)
                const float whole = (int8_t)(quad[k / 4].bits >> 8 * (k % 4));
#else
                const float whole = quad[k / 4].values[k % 4];
#endif
                float& value = a[row * in + k];
                if (!(std::abs(value - whole * scales[row].unit) <= 0.5001f * scales[row].unit)) value = NAN;
                value = value * 0.0f + whole * scales[row].unit;
            }
        }
        return {quads.data(), stride, scales.data()};
    }
};

// Returns whether a product of this shape is what a loop makes of it, and nothing beside it is written.
template <class In>
bool product_is_right(int64_t rows, int64_t in, int64_t out, Epilogue epilogue) {
    const std::vector<float> added = draw(rows * out), bias = draw(out);
    std::vector<float> a = draw(rows * in), weight = draw(in * out), panels(num_panels(out) * panel_size<In>(in));
    Operands operands{a, {}, {}, {}};
    const Rows<const In> operand = operands.rows(rows, in, In());
    pack(weight, in, out, panels, In());
    for (int64_t column = 0; column < out; column++)
        panels[column / PANEL * panel_size<In>(in) + column % PANEL] = bias[column];
    const float untouched = 7.0f;
    std::vector<float> c(rows * out + PANEL, untouched);
    product(Rows<float>{c.data(), out}, operand, rows, {panels.data(), (int32_t)in, (int32_t)out}, epilogue, RELU,
            added.data());
    bool right = true;
    for (int64_t row = 0; row < rows; row++)
        for (int64_t column = 0; column < out; column++) {
            double sum = bias[column];
            for (int64_t k = 0; k < in; k++) sum += (double)a[row * in + k] * weight[k * out + column];
            if (epilogue == ACTIVATE) sum = std::max(sum, 0.0);
            if (epilogue == ADD_TO_ROWS) sum += added[row * out + column];
            right &= std::abs(c[row * out + column] - sum) <= 1e-6 * (1 + in);
        }
    for (int64_t i = rows * out; i < (int64_t)c.size(); i++) right &= c[i] == untouched;
    return right;
}

int compare_products() {
    int wrong = 0, compared = 0;
    for (int64_t rows = 1; rows <= 3 * TILE; rows++)
        for (int64_t out = 1; out <= 3 * PANEL; out += out < PANEL ? 1 : PANEL / 2 - 1)
            for (int64_t in : {1, 2, 7, 33, 64})
                for (Epilogue epilogue : {STORE, ACTIVATE, ADD_TO_ROWS}) {
                    compared++;
                    if (product_is_right<float>(rows, in, out, epilogue) && product_is_right<Pair>(rows, in, out, epilogue) &&
                        product_is_right<Quad>(rows, in, out, epilogue)) continue;
                    wrong++;
                    std::printf("%d rows, %d to %d, epilogue %d\n", (int)rows, (int)in, (int)out, epilogue);
                }
    std::printf("%d of %d products differ\n", wrong, compared);
    return wrong != 0;
}

}  // namespace

int main(int argc, char** argv) {
    if (argc == 4) return run_file(argv[1], argv[2], argv[3]);
    if (argc == 2) return compare_products();
    std::printf("%d\n%s", panel_width(), structs());
}
