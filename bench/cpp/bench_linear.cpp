// The whole layer, LLM.int8(), bfloat16 in and out, without outlier columns and with six.
#include <benchmark/benchmark.h>

#include <cmath>

#include "inputs.hpp"
#include "machine.hpp"

namespace {

using octavo::DType;

// Of columns spread over all n, against the float64 product. Rounding to 8 bits is off by about 1 % of the norm.
void check(const bench::Array& x, const bench::Array& weight, const bench::Array& out) {
    const std::int64_t n = weight.rows();
    const std::int64_t step = std::max<std::int64_t>(1, n / 16 - 1);  // odd places too
    double difference = 0;
    double norm = 0;
    for (std::int64_t j = 0; j < n; j += step) {
        for (std::int64_t i = 0; i < x.rows(); ++i) {
            double exact = 0;
            for (std::int64_t c = 0; c < x.cols(); ++c) exact += double{x.at(i, c)} * double{weight.at(j, c)};
            difference += (out.at(i, j) - exact) * (out.at(i, j) - exact);
            norm += exact * exact;
        }
    }
    bench::require(std::sqrt(difference / norm) < 0.02, "linear: off by more than its arithmetic explains");
}

void linear(benchmark::State& state) {
    const std::int64_t k = state.range(0);
    const std::int64_t n = state.range(1);
    const std::int64_t m = state.range(2);
    const std::int64_t outliers = state.range(3);
    const bench::Array original = bench::normal(DType::bf16, n, k, 1.0F / std::sqrt(static_cast<float>(k)));
    const bench::Weight weight(original);
    const bench::Array x = bench::activations(DType::bf16, m, k, outliers);
    const bench::Array out(DType::bf16, m, n);
    const octavo::WeightView view = weight.view();
    const auto call = [&] { octavo::linear(x.matrix(), view, octavo::absent_vector, out.matrix()); };
    call();
    check(x, original, out);
    const double seconds = bench::time_calls(state, call);
    bench::report_product(state, seconds, m, n, k, x.bytes() + weight.codes.bytes() + out.bytes(),
                          weight.packed_codes.as<void>(), weight.packed_codes.bytes());
}
BENCHMARK(linear)
    ->ArgNames({"k", "n", "m", "outliers"})
    ->ArgsProduct({{768}, {3072}, {1, 4, 16, 64, 512}, {0, 6}})
    ->ArgsProduct({{2048}, {8192}, {1, 16, 512}, {0, 6}})
    ->ArgsProduct({{4096}, {4096}, {1, 16, 512}, {0, 6}})
    ->ArgsProduct({{4096}, {16384}, {1, 16, 512}, {0, 6}})
    ->UseRealTime()
    ->Unit(benchmark::kMicrosecond);

}  // namespace
