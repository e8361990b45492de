// Bringing the codes of a weight into packed order, and back.
#include <benchmark/benchmark.h>

#include <cstring>

#include "inputs.hpp"
#include "machine.hpp"

namespace {

using octavo::DType;

// Codes [n, k], packed, and unpacked again.
struct Codes {
    Codes(std::int64_t n, std::int64_t k)
        : codes(bench::codes(n, k, 1)), packed(bench::packed(codes)), again(DType::i8, n, k) {
        octavo::unpack(packed.vector(), again.matrix());
        bench::require(std::memcmp(again.as<void>(), codes.as<void>(), codes.bytes()) == 0,
                       "pack, unpack: wrong codes");
    }
    bench::Array codes;
    bench::Array packed;
    bench::Array again;
};

void pack(benchmark::State& state) {
    const Codes arrays(state.range(0), state.range(1));
    bench::time_calls(state, [&] { octavo::pack(arrays.codes.matrix(), arrays.packed.vector()); });
    bench::report_bytes(state, arrays.codes.bytes() + arrays.packed.bytes());
}
BENCHMARK(pack)
    ->ArgNames({"n", "k"})
    ->Args({3072, 768})
    ->Args({4096, 4096})
    ->UseRealTime()
    ->Unit(benchmark::kMicrosecond);

void unpack(benchmark::State& state) {
    const Codes arrays(state.range(0), state.range(1));
    bench::time_calls(state, [&] { octavo::unpack(arrays.packed.vector(), arrays.again.matrix()); });
    bench::report_bytes(state, arrays.codes.bytes() + arrays.packed.bytes());
}
BENCHMARK(unpack)
    ->ArgNames({"n", "k"})
    ->Args({3072, 768})
    ->Args({4096, 4096})
    ->UseRealTime()
    ->Unit(benchmark::kMicrosecond);

}  // namespace
