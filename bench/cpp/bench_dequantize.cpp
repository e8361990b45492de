// Dequantization of the codes of a weight, a scale for each row.
#include <benchmark/benchmark.h>

#include <cmath>

#include "inputs.hpp"
#include "machine.hpp"

namespace {

using octavo::DType;

void dequantize(benchmark::State& state) {
    const std::int64_t n = state.range(0);
    const std::int64_t k = state.range(1);
    const DType dtype = state.range(2) == 16 ? DType::bf16 : DType::f32;
    const bench::Array codes = bench::codes(n, k, 1);
    const bench::Array scale = bench::normal(DType::f32, 1, n);
    const bench::Array out(dtype, n, k);
    const auto call = [&] { octavo::dequantize(codes.matrix(), scale.vector(), octavo::absent_vector, out.matrix()); };
    call();
    const float rounding = dtype == DType::bf16 ? 0x1p-8F : 0.0F;
    for (std::int64_t i = 0; i < n; ++i) {
        for (std::int64_t j = 0; j < k; ++j) {
            const float expected = static_cast<float>(codes.as<std::int8_t>()[i * k + j]) * scale.at(0, i);
            bench::require(std::fabs(out.at(i, j) - expected) <= rounding * std::fabs(expected),
                           "dequantize: wrong value");
        }
    }
    bench::time_calls(state, call);
    bench::report_bytes(state, codes.bytes() + out.bytes());
}
BENCHMARK(dequantize)
    ->ArgNames({"n", "k", "bits"})
    ->ArgsProduct({{3072}, {768}, {16, 32}})
    ->ArgsProduct({{4096}, {4096}, {16, 32}})
    ->UseRealTime()
    ->Unit(benchmark::kMicrosecond);

}  // namespace
