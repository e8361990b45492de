// How many instructions the inner loops take: a gate that no other program on the machine can move.
//
//   test_instructions BOUNDS          compares with a file (.ci/cpu_bounds.txt)
//   test_instructions BOUNDS --renew  writes what this machine's instruction sets take into it; others' lines stay
//
// The processor's own counters are missing on most virtual machines, and no emulator of CI knows AVX-512 or AMX. So the
// trap flag is set, and each instruction is a signal: exact, and two microseconds an instruction.
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <map>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "cpu/pack.hpp"
#include "cpu/scratch.hpp"
#include "random.hpp"
#include "tables.hpp"

namespace {

using octavo::DType;
using octavo::cpu::EpilogueTile;
using octavo::cpu::Kernels;
using octavo::cpu::Plan;
using octavo::cpu::Scratch;

volatile std::sig_atomic_t trapped = 0;  // an int is enough: a case takes some ten thousand

void on_trap(int /*signal*/) { trapped = trapped + 1; }

// Instructions that `call` takes, and the few that switch the flag.
template <class Call>
std::int64_t count(const Call& call) {
    call();  // so that page faults and first uses are over
    trapped = 0;
    // Below the 128 bytes under the stack pointer that a function may use without asking.
    __asm__ volatile("lea -128(%%rsp), %%rsp\n\tpushfq\n\torq $0x100, (%%rsp)\n\tpopfq\n\tlea 128(%%rsp), %%rsp" ::
                         : "memory", "cc");
    call();
    __asm__ volatile("lea -128(%%rsp), %%rsp\n\tpushfq\n\tandq $~0x100, (%%rsp)\n\tpopfq\n\tlea 128(%%rsp), %%rsp" ::
                         : "memory", "cc");
    return trapped;
}

template <class T>
Scratch<T> values(std::int64_t size) {
    Random random(1);
    Scratch<T> made(size);
    for (std::int64_t i = 0; i < size; ++i) made[i] = static_cast<T>(random.integer(-100, 100));
    return made;
}

// A register tile of the product, 512 deep.
std::int64_t product(const Plan& plan) {
    constexpr std::int64_t depth = 512;
    const auto x = values<std::int8_t>(plan.rows * depth * plan.x_size);
    const auto w = values<std::int8_t>(plan.cols * depth * std::max<std::int64_t>(plan.regrouped, 1));
    const Scratch<std::int32_t> acc(plan.rows * plan.cols);
    if (plan.enter != nullptr) plan.enter(plan.rows);
    const std::int64_t found = count([&] {
        plan.multiply({.x = x.data(),
                       .rows = plan.rows,
                       .w = w.data(),
                       .w_stride = 16 * depth * std::max<std::int64_t>(plan.regrouped, 1),
                       .cols = plan.cols,
                       .depth = depth,
                       .acc = acc.data()});
    });
    if (plan.leave != nullptr) plan.leave();
    return found;
}

// 16 rows by 64 output features as bfloat16, with so many shared outliers, whose weights are floats or codes.
std::int64_t epilogue(const Kernels& table, std::int64_t outliers, bool from_codes) {
    constexpr std::int64_t rows = 16;
    constexpr std::int64_t cols = 64;
    constexpr std::int64_t depth = 128;
    const auto acc = values<std::int32_t>(rows * cols);
    const auto scale_x = values<float>(rows);
    const auto scale_w = values<float>(cols);
    const auto outlier_x = values<float>(outliers * rows);
    const auto outlier_w = values<float>(outliers * octavo::cpu::outlier_stride);
    const auto w = values<std::int8_t>(cols * depth);
    const Scratch<std::int32_t> columns(outliers);
    for (std::int64_t o = 0; o < outliers; ++o) columns[o] = static_cast<std::int32_t>(o * 3);
    const Scratch<std::uint16_t> y(rows * cols);
    const EpilogueTile tile{.rows = rows,
                            .cols = cols,
                            .acc = acc.data(),
                            .stride = cols,
                            .scale_x = scale_x.data(),
                            .scale_w = scale_w.data(),
                            .outliers = outliers,
                            .outlier_x = outlier_x.data(),
                            .outlier_x_stride = rows,
                            .outlier_columns = from_codes ? columns.data() : nullptr,
                            .w = w.data(),
                            .w_stride = 16 * depth,
                            .outlier_w = outlier_w.data()};
    return count([&] { table.epilogue(tile, DType::bf16, y.data(), cols * 2); });
}

std::int64_t dequantized_columns(const Kernels& table) {
    constexpr std::int64_t cols = 64;
    constexpr std::int64_t depth = 128;
    const std::vector<std::int32_t> columns{0, 5, 17, 18, 47, 50, 90, 127};
    const std::vector<std::int32_t> rows{0, 1, 2, 3, 4, 5, 6, 7};
    const auto w = values<std::int8_t>(cols * depth);
    const auto scale = values<float>(cols);
    const Scratch<float> target(8 * octavo::cpu::outlier_stride);
    return count([&] {
        table.dequantize_columns(w.data(), 16 * depth, columns.data(), rows.data(), 8, cols, nullptr, scale.data(),
                                 target.data());
    });
}

// Products with float32, of 16 output features, 256 deep.
std::int64_t weight_only(const Kernels& table, std::int64_t rows, bool in_pairs) {
    constexpr std::int64_t depth = 256;
    const auto x = values<float>(rows * depth);
    const auto pairs = values<std::uint16_t>(4 * rows * depth);
    const auto w = values<std::int8_t>(16 * depth);
    const Scratch<float> sums(rows * 4 * 16);
    return count([&] {
        table.multiply_floats({.x = x.data(),
                               .x_pairs = in_pairs ? pairs.data() : nullptr,
                               .x_stride = depth,
                               .rows = rows,
                               .w = w.data(),
                               .w_floats = nullptr,
                               .zeropoint = nullptr,
                               .depth = depth,
                               .places = 4,
                               .first = true,
                               .sums = sums.data()});
    });
}

// A slice of the gradient through an int8 weight, of as many rows as registers hold, and of its weights.
std::int64_t gradient(const Kernels& table) {
    constexpr std::int64_t rows = 12;
    constexpr std::int64_t depth = octavo::cpu::float_slice;
    const auto x = values<float>(rows * depth);
    const auto w = values<float>(depth * table.gradient_cols);
    const auto sums = values<float>(rows * table.gradient_cols);
    return count([&] {
        table.multiply_floats({.x = x.data(),
                               .x_stride = depth,
                               .rows = rows,
                               .w = nullptr,
                               .w_floats = w.data(),
                               .zeropoint = nullptr,
                               .depth = depth,
                               .places = 1,
                               .first = false,
                               .sums = sums.data()});
    });
}

std::int64_t dequantized_square(const Kernels& table) {
    constexpr std::int64_t features = octavo::cpu::float_slice;
    constexpr std::int64_t depth = 64;
    const auto w = values<std::int8_t>(features * depth);
    const auto zeropoint = values<float>(features);
    const auto scale = values<float>(features);
    const Scratch<float> target(features * table.gradient_cols);
    return count([&] {
        table.dequantize_square(w.data(), 16 * depth, features, zeropoint.data(), scale.data(), target.data());
    });
}

using Counts = std::map<std::pair<std::string, std::string>, std::int64_t>;  // instruction set and loop

Counts counted() {
    Counts found;
    constexpr std::int64_t row = 1024;
    const Scratch<std::uint16_t> x(row);
    for (std::int64_t i = 0; i < row; ++i) x[i] = static_cast<std::uint16_t>(0x3F80 + i % 64);  // 1 to 1.5
    const auto floats = values<float>(row);
    const Scratch<std::int8_t> codes(row);
    const Scratch<std::uint16_t> maxima(row);
    std::fill(maxima.data(), maxima.data() + row, std::uint16_t{0});
    for (const Kernels* table : tables()) {
        if (table->isa == std::string("scalar")) continue;  // which calls the system's fma
        const auto put = [&](const std::string& loop, std::int64_t instructions) {
            found[{table->isa, loop}] = instructions;
        };
        put("product", product(*table->many));
        put("product_few", product(*table->few));
        put("product_some", product(*table->some));
        put("epilogue", epilogue(*table, 0, false));
        put("outliers", epilogue(*table, 32, false));
        put("outliers_codes", epilogue(*table, 32, true));
        put("dequantize_columns", dequantized_columns(*table));
        for (const std::int64_t rows : {1, 2, 3, 4}) {
            put("weight_only_" + std::to_string(rows), weight_only(*table, rows, false));
            if (table->pair == nullptr) continue;
            put("weight_only_in_pairs_" + std::to_string(rows), weight_only(*table, rows, true));
        }
        put("gradient", gradient(*table));
        put("dequantize_square", dequantized_square(*table));
        put("largest_magnitude",
            count([&] { static_cast<void>(table->largest_magnitude(DType::bf16, x.data(), row)); }));
        put("raise_maxima", count([&] { table->raise_maxima(DType::bf16, x.data(), row, maxima.data()); }));
        put("encode_absmax", count([&] { table->encode_absmax(DType::bf16, x.data(), row, 1.5F, codes.data()); }));
        put("rotate", count([&] { table->rotate(DType::f32, floats.data(), row, 64, nullptr, 0, floats.data()); }));
    }
    return found;
}

Counts read(const char* path) {
    Counts bounds;
    std::ifstream file(path);
    for (std::string line; std::getline(file, line);) {
        std::istringstream words(line);
        std::string isa;
        std::string loop;
        std::int64_t instructions = 0;
        if (line.empty() || line[0] == '#' || !(words >> isa >> loop >> instructions)) continue;
        bounds[{isa, loop}] = instructions;
    }
    return bounds;
}

void renew(const char* path, Counts bounds, const Counts& found) {
    for (const auto& [key, instructions] : found) bounds[key] = instructions;
    std::ofstream file(path);
    file << "# Instructions of the inner loops (tests/cpp/test_instructions.cpp says of what), GCC, release build:\n"
            "# build/release/tests/cpp/test_instructions .ci/cpu_bounds.txt --renew\n";
    for (const auto& [key, instructions] : bounds) {
        file << key.first << ' ' << key.second << ' ' << instructions << '\n';
    }
}

}  // namespace

int main(int argc, char** argv)  // NOLINT(misc-const-correctness): as the standard has it
{
    if (argc < 2) return std::fprintf(stderr, "usage: test_instructions BOUNDS [--renew]\n"), 2;
    std::signal(SIGTRAP, on_trap);
    const Counts found = counted();
    const Counts bounds = read(argv[1]);
    if (argc > 2 && std::string(argv[2]) == "--renew") {
        renew(argv[1], bounds, found);
        return 0;
    }
    constexpr double slack = 1.05;  // what another version of the compiler may do
    int failures = 0;
    for (const auto& [key, instructions] : found) {
        const auto bound = bounds.find(key);
        const double most = bound == bounds.end() ? 0.0 : slack * static_cast<double>(bound->second);
        const bool is_more = static_cast<double>(instructions) > most;
        const bool is_less = static_cast<double>(instructions) * slack * slack < most;
        std::printf("%-12s %-18s %6lld%s\n", key.first.c_str(), key.second.c_str(),
                    static_cast<long long>(instructions),
                    is_more   ? "  MORE than its bound"
                    : is_less ? "  fewer than its bound by more than 5 %: renew it"
                              : "");
        failures += is_more || is_less ? 1 : 0;
    }
    return failures == 0 && !found.empty() ? 0 : 1;
}
