// What octavo::linear of C++ takes on one tiny product, for `octavo bench --overhead`:
//
//   core_call POLICY M K N CALLS      prints the ns that each of CALLS calls took; POLICY is "none" or "columns"
//
// The arrays are as Python's: float32, contiguous, packed codes, a bias, no outliers in X.
#include <chrono>
#include <cstdio>
#include <exception>
#include <string>
#include <string_view>

#include "inputs.hpp"

int main(int count, char* const* arguments) try {
    if (count != 6) {
        std::fputs("usage: core_call POLICY M K N CALLS\n", stderr);
        return 2;
    }
    const octavo::LinearOptions options{
        .outliers = std::string_view(arguments[1]) == "columns" ? octavo::Outliers::columns : octavo::Outliers::none};
    const std::int64_t m = std::stoll(arguments[2]);
    const std::int64_t k = std::stoll(arguments[3]);
    const std::int64_t n = std::stoll(arguments[4]);
    const std::int64_t calls = std::stoll(arguments[5]);
    const bench::Array x = bench::normal(octavo::DType::f32, m, k);
    const bench::Array bias = bench::normal(octavo::DType::f32, 1, n);
    const bench::Array out(octavo::DType::f32, m, n);
    const bench::Weight weight(bench::normal(octavo::DType::f32, n, k));
    const octavo::WeightView view = weight.view();
    const auto run = [&] { octavo::linear(x.matrix(), view, bias.vector(), out.matrix(), options); };
    for (std::int64_t i = 0; i < calls / 10; ++i) run();  // warm
    const auto start = std::chrono::steady_clock::now();
    for (std::int64_t i = 0; i < calls; ++i) run();
    const std::chrono::duration<double, std::nano> elapsed = std::chrono::steady_clock::now() - start;
    std::printf("%.3f\n", elapsed.count() / static_cast<double>(calls));
    return 0;
} catch (const std::exception& error) {
    std::fprintf(stderr, "core_call: %s\n", error.what());
    return 1;
}
