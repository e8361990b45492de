// What the machine can do, measured beside what octavo does with it: instruction peaks and read bandwidth of one
// thread.
#pragma once

#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "octavo/runtime.hpp"

namespace bench {

// An instruction that the products are made of, in a loop of independent chains that touches no memory.
struct Peak {
    std::string name;
    double ops_per_iteration;              // multiplications and additions, counted apart, of one turn of the loop
    bool (*run)(std::int64_t iterations);  // whether the sums came out right
    std::string_view missing;              // why this processor cannot run it; empty where it can
};

// vfmadd_ymm (float32, for comparison) and pairs_ymm (AVX2's best exact loop), words_zmm (that of AVX-512 without
// VNNI), vpdpbusd_zmm, vpdpbusd_ymm (AVX512-VNNI), tdpbssd (AMX): also those that cannot run here.
[[nodiscard]] const std::vector<Peak>& peaks();

// Operations per second: the best of several short runs, some 10 ms together. Fails where the sums are wrong.
[[nodiscard]] double measure(const Peak& peak);

// The sum of `count` words, read in order with the widest loads of this processor.
[[nodiscard]] std::uint64_t sum(const std::uint64_t* words, std::size_t count);

// Bytes per second of `sum` over this memory: the best of a few passes, after a first one that is not counted.
[[nodiscard]] double read_bandwidth(const void* memory, std::size_t bytes);

// Sets the counters of a product [m, k] x [n, k] that took `seconds`: GOPS (2 m n k), GB/s (`bytes` moved), and, in per
// cent, of each instruction's peak and of the bandwidth of reading `weight` (times the threads in use). Peaks are
// measured here, right after the product: compare only what stands in one line.
void report_product(benchmark::State& state, double seconds, std::int64_t m, std::int64_t n, std::int64_t k,
                    std::size_t bytes, const void* weight, std::size_t weight_bytes);

// Sets GB/s of an operation that moves `bytes` and has no product.
void report_bytes(benchmark::State& state, std::size_t bytes);

// Seconds on the clock of this thread's own processor time, which other programs on the same core do not make longer.
[[nodiscard]] double thread_seconds();

// Times `call` in google-benchmark's loop; returns the seconds of one call: of processor time as long as octavo uses
// this thread alone.
template <class Call>
double time_calls(benchmark::State& state, const Call& call);

}  // namespace bench

template <class Call>
double bench::time_calls(benchmark::State& state, const Call& call) {
    const auto now = [] {
        if (octavo::num_threads() == 1) return thread_seconds();
        return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
    };
    const double begin = now();
    while (state.KeepRunning()) {
        call();
        benchmark::ClobberMemory();
    }
    return (now() - begin) / static_cast<double>(std::max<std::int64_t>(state.iterations(), 1));
}
