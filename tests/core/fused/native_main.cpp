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

// Returns whether a product of this shape is what a loop makes of it, and nothing beside it is written.
bool product_is_right(int64_t rows, int64_t in, int64_t out, Epilogue epilogue) {
    const std::vector<float> a = draw(rows * in), added = draw(rows * out);
    const std::vector<float> panels = draw(num_panels(out) * (1 + in) * PANEL);
    std::vector<float> c(rows * out + PANEL, 7.0f);
    product({c.data(), out}, {a.data(), in}, rows, {panels.data(), (int32_t)in, (int32_t)out}, 0, num_panels(out),
            epilogue, RELU, added.data());
    bool right = true;
    for (int64_t row = 0; row < rows; row++)
        for (int64_t column = 0; column < out; column++) {
            const float* weight = &panels[column / PANEL * (1 + in) * PANEL + column % PANEL];
            double expected = weight[0];
            for (int64_t k = 0; k < in; k++) expected += (double)a[row * in + k] * weight[(1 + k) * PANEL];
            if (epilogue == ACTIVATE) expected = std::max(expected, 0.0);
            if (epilogue == ADD_TO_ROWS) expected += added[row * out + column];
            right &= std::abs(c[row * out + column] - expected) <= 1e-6 * (1 + in);
        }
    for (int64_t i = rows * out; i < (int64_t)c.size(); i++) right &= c[i] == 7.0f;
    return right;
}

int compare_products() {
    int wrong = 0, compared = 0;
    for (int64_t rows = 1; rows <= 3 * TILE; rows++)
        for (int64_t out = 1; out <= 3 * PANEL; out += out < PANEL ? 1 : PANEL / 2 - 1)
            for (int64_t in : {1, 2, 7, 33, 64})
                for (Epilogue epilogue : {STORE, ACTIVATE, ADD_TO_ROWS}) {
                    compared++;
                    if (product_is_right(rows, in, out, epilogue)) continue;
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
