// Quantization of activations: one scale per row, absmax, without and with excluded columns; and of a weight, anew or
// in place.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "inputs.hpp"
#include "machine.hpp"

namespace {

using octavo::DType;

// Eq. 1 of the paper, element by element.
void check(const bench::Array& x, const bench::Array& exclude, const bench::Array& codes, const bench::Array& scale) {
    for (std::int64_t i = 0; i < x.rows(); ++i) {
        const auto excluded = [&](std::int64_t j) {
            const auto* first = exclude.as<std::int32_t>();
            return std::find(first, first + exclude.cols(), j) != first + exclude.cols();
        };
        float absmax = 0;
        for (std::int64_t j = 0; j < x.cols(); ++j) {
            if (!excluded(j)) absmax = std::max(absmax, std::fabs(x.at(i, j)));
        }
        bench::require(scale.at(0, i) == absmax / 127.0F, "quantize: wrong scale");
        for (std::int64_t j = 0; j < x.cols(); ++j) {
            const float expected = excluded(j) ? 0.0F : std::rint(x.at(i, j) * 127.0F / absmax);
            bench::require(static_cast<float>(codes.as<std::int8_t>()[i * x.cols() + j]) == expected,
                           "quantize: wrong code");
        }
    }
}

void quantize(benchmark::State& state) {
    const std::int64_t m = state.range(0);
    const std::int64_t k = state.range(1);
    const std::int64_t outliers = state.range(2);
    const bench::Array x = bench::activations(DType::bf16, m, k, outliers);
    const bench::Array exclude(DType::i32, 1, outliers);
    for (std::int64_t o = 0; o < outliers; ++o) {
        exclude.as<std::int32_t>()[o] = static_cast<std::int32_t>(bench::outlier_column(o, outliers, k));
    }
    const bench::Array codes(DType::i8, m, k);
    const bench::Array scale(DType::f32, 1, m);
    const octavo::ConstVector excluded = outliers > 0 ? exclude.vector() : octavo::absent_vector;
    const auto call = [&] {
        octavo::quantize(x.matrix(), octavo::Scheme::absmax, octavo::Granularity::row, excluded, codes.matrix(),
                         scale.vector(), octavo::absent_vector);
    };
    call();
    check(x, exclude, codes, scale);
    bench::time_calls(state, call);
    bench::report_bytes(state, x.bytes() + codes.bytes());
}
BENCHMARK(quantize)
    ->ArgNames({"m", "k", "outliers"})
    ->ArgsProduct({{1, 16, 512}, {768, 4096, 16384}, {0, 6}})
    ->UseRealTime()
    ->Unit(benchmark::kMicrosecond);

void quantize_weight(benchmark::State& state) {
    const std::int64_t n = state.range(0);
    const std::int64_t k = state.range(1);
    const bench::Array weight = bench::normal(DType::bf16, n, k);
    const bench::Weight quantized(weight);
    check(weight, bench::Array(DType::i32, 1, 0), quantized.codes, quantized.scale);
    const auto call = [&] {
        octavo::quantize_weight(weight.matrix(), octavo::Scheme::absmax, octavo::Granularity::vector,
                                quantized.codes.matrix(), quantized.scale.vector(), octavo::absent_vector,
                                quantized.code_sums.vector());
    };
    bench::time_calls(state, call);
    bench::report_bytes(state, weight.bytes() + quantized.codes.bytes());
}
BENCHMARK(quantize_weight)
    ->ArgNames({"n", "k"})
    ->Args({3072, 768})
    ->Args({4096, 4096})
    ->UseRealTime()
    ->Unit(benchmark::kMicrosecond);

// A weight that is trained, quantized anew into the packed codes that it has; and a copy of it, which is as fast as the
// memory is.
void requantize_weight(benchmark::State& state) {
    const std::int64_t n = state.range(0);
    const std::int64_t k = state.range(1);
    const bench::Array weight = bench::normal(DType::f32, n, k);
    const bench::Weight quantized(weight);
    const bench::Array packed(DType::i8, 1, octavo::packed_size(n, k));
    const octavo::Matrix target{packed.as<void>(), DType::i8, {}, n, k, k, 1};
    const auto call = [&] {
        octavo::quantize_weight(weight.matrix(), {}, target, quantized.scale.vector(), octavo::absent_vector,
                                quantized.code_sums.vector(), {}, octavo::Layout::packed);
    };
    call();
    const auto* const expected = quantized.packed_codes.as<std::int8_t>();
    bench::require(std::equal(expected, expected + packed.cols(), packed.as<std::int8_t>()), "wrong packed codes");
    bench::time_calls(state, call);
    bench::report_bytes(state, weight.bytes() + packed.bytes());
}

void copy_weight(benchmark::State& state) {
    const bench::Array weight = bench::normal(DType::f32, state.range(0), state.range(1));
    const bench::Array copy(DType::f32, weight.rows(), weight.cols());
    const auto call = [&] { std::memcpy(copy.as<void>(), weight.as<void>(), weight.bytes()); };
    bench::time_calls(state, call);
    bench::report_bytes(state, 2 * weight.bytes());
}
BENCHMARK(requantize_weight)
    ->ArgNames({"n", "k"})
    ->Args({3072, 768})
    ->Args({4096, 4096})
    ->UseRealTime()
    ->Unit(benchmark::kMicrosecond);
BENCHMARK(copy_weight)
    ->ArgNames({"n", "k"})
    ->Args({3072, 768})
    ->Args({4096, 4096})
    ->UseRealTime()
    ->Unit(benchmark::kMicrosecond);

}  // namespace
