// The int8 product alone, on shapes of linear layers, beside what the instructions allow.
#include <benchmark/benchmark.h>

#include <vector>

#include "inputs.hpp"
#include "machine.hpp"

namespace {

using octavo::DType;

// B as the product takes it, packed: the one place that knows how its codes lie in memory.
octavo::ConstMatrix operand(const bench::Array& codes, const bench::Array& packed) {
    octavo::ConstMatrix matrix = codes.matrix();
    matrix.data = packed.vector().data;
    return matrix;
}

// The whole product: out r = A (B^T r) holds exactly for right sums, and for a wrong one only by chance of r.
void check(const bench::Array& a, const bench::Array& b, const bench::Array& out) {
    const std::int64_t k = a.cols();
    const std::int64_t n = b.rows();
    std::vector<std::int64_t> r(static_cast<std::size_t>(n));
    std::vector<std::int64_t> b_r(static_cast<std::size_t>(k));
    Random random(3);
    for (std::int64_t j = 0; j < n; ++j) {
        const std::int64_t weight = random.integer(-1000, 1000);
        r[static_cast<std::size_t>(j)] = weight;
        const auto* row = b.as<std::int8_t>() + j * k;
        for (std::int64_t c = 0; c < k; ++c) b_r[static_cast<std::size_t>(c)] += weight * row[c];
    }
    for (std::int64_t i = 0; i < a.rows(); ++i) {
        std::int64_t expected = 0;
        std::int64_t got = 0;
        const auto* a_row = a.as<std::int8_t>() + i * k;
        const auto* out_row = out.as<std::int32_t>() + i * n;
        for (std::int64_t c = 0; c < k; ++c) expected += a_row[c] * b_r[static_cast<std::size_t>(c)];
        for (std::int64_t j = 0; j < n; ++j) got += out_row[j] * r[static_cast<std::size_t>(j)];
        bench::require(got == expected, "int8_matmul: wrong sums");
    }
}

void int8_matmul(benchmark::State& state) {
    const std::int64_t k = state.range(0);
    const std::int64_t n = state.range(1);
    const std::int64_t m = state.range(2);
    const bench::Array a = bench::codes(m, k, 1);
    const bench::Array b = bench::codes(n, k, 2);
    const bench::Array packed = bench::packed(b);
    const bench::Array out(DType::i32, m, n);
    const auto call = [&] {
        octavo::int8_matmul(a.matrix(), operand(b, packed), out.matrix(), octavo::Layout::packed);
    };
    call();
    check(a, b, out);
    const double seconds = bench::time_calls(state, call);
    bench::report_product(state, seconds, m, n, k, a.bytes() + b.bytes() + out.bytes(), packed.as<void>(),
                          packed.bytes());
}
BENCHMARK(int8_matmul)
    ->ArgNames({"k", "n", "m"})
    ->ArgsProduct({{768}, {3072}, {1, 4, 16, 64, 512}})
    ->ArgsProduct({{2048}, {8192}, {1, 16, 512}})
    ->ArgsProduct({{4096}, {4096}, {1, 16, 512}})
    ->ArgsProduct({{4096}, {16384}, {1, 16, 512}})
    ->UseRealTime()
    ->Unit(benchmark::kMicrosecond);

}  // namespace
