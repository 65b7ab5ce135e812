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

// A weight [in, out] as panels, and rows [in], as operands of type In.
void pack(const std::vector<float>& weight, int64_t in, int64_t out, std::vector<float>& panels, float) {
    for (int64_t k = 0; k < in; k++)
        for (int64_t column = 0; column < out; column++)
            panels[(column / PANEL * (1 + in) + 1 + k) * PANEL + column % PANEL] = weight[k * out + column];
}

void pack(const std::vector<float>& weight, int64_t in, int64_t out, std::vector<float>& panels, Pair) {
    for (int64_t k = 0; k < in; k++)
        for (int64_t column = 0; column < out; column++) {
            const int64_t row = column / PANEL * (1 + num_pairs(in)) + 1 + k / 2;
            uint16_t* const half = (uint16_t*)&panels[row * PANEL + column % PANEL] + k % 2;
            std::memcpy(half, (const char*)&weight[k * out + column] + 2, sizeof *half);
        }
}

std::vector<float> operands(const std::vector<float>& a, int64_t, int64_t, float) { return a; }

std::vector<Pair> operands(const std::vector<float>& a, int64_t rows, int64_t in, Pair) {
    std::vector<Pair> pairs(rows * num_pairs(in));
    for (int64_t row = 0; row < rows; row++) round(&pairs[row * num_pairs(in)], &a[row * in], in);
    return pairs;
}

bool equal(const float* found, const float* expected, int64_t n, int64_t in) {
    for (int64_t i = 0; i < n; i++)
        if (!(std::abs(found[i] - expected[i]) <= 1e-6 * (1 + in))) return false;
    return true;
}

// Pairs: each of two numbers by itself, to within a rounding; and a zero beside one that is left over.
bool equal(const Pair* found, const float* expected, int64_t n, int64_t in) {
    for (int64_t i = 0; i < 2 * num_pairs(n); i++) {
        float value;
#if defined(__AVX512BF16__)
        const uint32_t bits = i % 2 ? found[i / 2].bits & 0xffff0000u : found[i / 2].bits << 16;
        std::memcpy(&value, &bits, sizeof value);
#else
        value = i % 2 ? found[i / 2].odd : found[i / 2].even;
#endif
        const float wanted = i < n ? expected[i] : 0.0f;
        if (!(std::abs(value - wanted) <= 1e-6 * (1 + in) + std::abs(wanted) / 256)) return false;
    }
    return true;
}

// Returns whether a product of this shape is what a loop makes of it, and nothing beside it is written.
template <class In, class Out>
bool product_is_right(int64_t rows, int64_t in, int64_t out, Epilogue epilogue) {
    constexpr bool halves = std::is_same_v<In, Pair>;
    const std::vector<float> added = draw(rows * out), bias = draw(out);
    std::vector<float> a = draw(rows * in), weight = draw(in * out), panels(num_panels(out) * (1 + length<In>(in)) * PANEL);
    const std::vector<In> operand = operands(a, rows, in, In());
    if (halves)
        for (std::vector<float>* values : {&a, &weight})
            for (float& value : *values) value = rounded(value);
    for (int64_t column = 0; column < out; column++)
        panels[column / PANEL * (1 + length<In>(in)) * PANEL + column % PANEL] = bias[column];
    pack(weight, in, out, panels, In());
    std::vector<float> expected(rows * out);
    for (int64_t row = 0; row < rows; row++)
        for (int64_t column = 0; column < out; column++) {
            double sum = bias[column];
            for (int64_t k = 0; k < in; k++) sum += (double)a[row * in + k] * weight[k * out + column];
            if (epilogue == ACTIVATE) sum = std::max(sum, 0.0);
            if (epilogue == ADD_TO_ROWS) sum += added[row * out + column];
            expected[row * out + column] = sum;
        }
    const int64_t stride = length<Out>(out);
    const Out untouched = Out();
    std::vector<Out> c(rows * stride + PANEL, untouched);
    product(Rows<Out>{c.data(), stride}, Rows<const In>{operand.data(), length<In>(in)}, rows,
            {panels.data(), (int32_t)in, (int32_t)out}, epilogue, RELU, added.data());
    bool right = true;
    for (int64_t row = 0; row < rows; row++) right &= equal(&c[row * stride], &expected[row * out], out, in);
    for (int64_t i = rows * stride; i < (int64_t)c.size(); i++) right &= !std::memcmp(&c[i], &untouched, sizeof untouched);
    return right;
}

int compare_products() {
    int wrong = 0, compared = 0;
    for (int64_t rows = 1; rows <= 3 * TILE; rows++)
        for (int64_t out = 1; out <= 3 * PANEL; out += out < PANEL ? 1 : PANEL / 2 - 1)
            for (int64_t in : {1, 2, 7, 33, 64})
                for (Epilogue epilogue : {STORE, ACTIVATE, ADD_TO_ROWS}) {
                    compared++;
                    if (product_is_right<float, float>(rows, in, out, epilogue) &&
                        product_is_right<Pair, float>(rows, in, out, epilogue) &&
                        (epilogue == ADD_TO_ROWS || product_is_right<Pair, Pair>(rows, in, out, epilogue))) continue;
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
