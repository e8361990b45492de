// Finding outlier columns, none of them there and six.
#include <benchmark/benchmark.h>

#include "inputs.hpp"
#include "machine.hpp"

namespace {

using octavo::DType;

void find_outliers(benchmark::State& state) {
    const std::int64_t m = state.range(0);
    const std::int64_t k = state.range(1);
    const std::int64_t outliers = state.range(2);
    const bench::Array x = bench::activations(DType::bf16, m, k, outliers);
    const bench::Array columns(DType::i32, 1, k);
    const bench::Array count(DType::i32, 1, 1);
    const auto call = [&] { octavo::find_outliers(x.matrix(), {}, columns.vector(), count.vector()); };
    call();
    bench::require(*count.as<std::int32_t>() == outliers, "find_outliers: wrong count");
    for (std::int64_t o = 0; o < outliers; ++o) {
        bench::require(columns.as<std::int32_t>()[o] == bench::outlier_column(o, outliers, k),
                       "find_outliers: wrong column");
    }
    bench::time_calls(state, call);
    bench::report_bytes(state, x.bytes());
}
BENCHMARK(find_outliers)
    ->ArgNames({"m", "k", "outliers"})
    ->ArgsProduct({{1, 16, 512}, {768, 4096, 16384}, {0, 6}})
    ->UseRealTime()
    ->Unit(benchmark::kMicrosecond);

}  // namespace
