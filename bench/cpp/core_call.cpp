// Time octavo::linear of C++ on one tiny product, for bench/call_overhead.py:
//
//   core_call POLICY M K N CALLS      prints the ns that each of CALLS calls took; POLICY is "none" or "columns"
//
// The arrays are those of the Python side: float32, contiguous, packed codes, a bias, no outliers in X.
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <string_view>
#include <vector>

#include "octavo/octavo.hpp"

namespace {

// A number of the command line; 0, which makes an empty product, where it is none.
std::int64_t number(const char* text) { return std::strtoll(text, nullptr, 10); }

}  // namespace

int main(int count, char* const* arguments) try {
    if (count != 6) {
        std::fputs("usage: core_call POLICY M K N CALLS\n", stderr);
        return 2;
    }
    const octavo::LinearOptions options{
        .outliers = std::string_view(arguments[1]) == "columns" ? octavo::Outliers::columns : octavo::Outliers::none};
    const std::int64_t m = number(arguments[2]);
    const std::int64_t k = number(arguments[3]);
    const std::int64_t n = number(arguments[4]);
    const std::int64_t calls = number(arguments[5]);
    const auto size = [](std::int64_t extent) { return static_cast<std::size_t>(extent); };
    const std::vector<float> x(size(m * k), 0.5F);
    const std::vector<float> values(size(n * k), 0.25F);
    const std::vector<float> bias(size(n), 1.0F);
    std::vector<float> y(size(m * n));
    std::vector<std::int8_t> codes(size(n * k));
    std::vector<float> scale(size(n));
    std::vector<std::int32_t> sums(size(n));

    const octavo::Matrix code_matrix{
        .data = codes.data(), .dtype = octavo::DType::i8, .rows = n, .cols = k, .row_stride = k};
    const octavo::Vector scales{.data = scale.data(), .size = n};
    const octavo::Vector code_sums{.data = sums.data(), .dtype = octavo::DType::i32, .size = n};
    octavo::quantize_weight({.data = values.data(), .rows = n, .cols = k, .row_stride = k}, octavo::Scheme::absmax,
                            octavo::Granularity::vector, code_matrix, scales, octavo::absent_vector, code_sums);
    std::vector<std::int8_t> packed(size(octavo::packed_size(n, k)));
    octavo::pack(code_matrix, {.data = packed.data(), .dtype = octavo::DType::i8, .size = octavo::packed_size(n, k)});
    octavo::WeightView weight{.codes = code_matrix, .scale = scales, .code_sums = code_sums};
    weight.codes.data = packed.data();
    weight.layout = octavo::Layout::packed;

    const octavo::ConstMatrix x_matrix{.data = x.data(), .rows = m, .cols = k, .row_stride = k};
    const octavo::ConstVector bias_vector{.data = bias.data(), .size = n};
    const octavo::Matrix out{.data = y.data(), .rows = m, .cols = n, .row_stride = n};
    const auto run = [&] { octavo::linear(x_matrix, weight, bias_vector, out, options); };
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
