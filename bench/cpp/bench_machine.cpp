// The roofline: what one thread of this machine can do at best.
//
// Peaks count a multiplication and an addition as two operations, as GOPS of the products does. Read bandwidth is that
// of a sum over a buffer: of sizes of weights, which may lie in a cache, and of one much larger than the caches.
#include <benchmark/benchmark.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <string>

#include "inputs.hpp"
#include "machine.hpp"

namespace {

// A chain of multiplications, three cycles each. This and the peaks are rates of processor time, so that another
// program on the same core does not make them look smaller than they are.
void clock_rate(benchmark::State& state) {
    constexpr std::int64_t turns = 10000;
    constexpr std::int64_t cycles = 12 * turns;
    std::uint64_t value = 3;
    while (state.KeepRunning()) {
        for (std::int64_t i = 0; i < turns; ++i) {
#if defined(__x86_64__)
            asm volatile("imul %0, %0\n\timul %0, %0\n\timul %0, %0\n\timul %0, %0\n\t" : "+r"(value));
#endif
        }
    }
    benchmark::DoNotOptimize(value);
    state.counters["GHz"] = benchmark::Counter(1e-9 * cycles, benchmark::Counter::kIsIterationInvariantRate);
}

void peak_rate(benchmark::State& state, const bench::Peak& peak) {
    constexpr std::int64_t turns = 20000;
    bool right = true;
    while (state.KeepRunning()) right = peak.run(turns) && right;
    bench::require(right, peak.name + ": wrong sums");
    state.counters["GOPS"] = benchmark::Counter(1e-9 * peak.ops_per_iteration * static_cast<double>(turns),
                                                benchmark::Counter::kIsIterationInvariantRate);
}

// Ordinary pages are what an allocator gives for a framework's tensors; with huge ones fewer addresses are looked up.
void read(benchmark::State& state, bool huge_pages) {
    const std::int64_t bytes = state.range(0);
    constexpr std::size_t huge_page = std::size_t{1} << 21U;
    const bench::Array memory(octavo::DType::i8, 1, bytes + static_cast<std::int64_t>(huge_page));
    auto* begin = memory.as<std::byte>();
    begin += (huge_page - reinterpret_cast<std::uintptr_t>(begin) % huge_page) % huge_page;
#if defined(__linux__)
    // A request; a system may ignore it. Pages that are there already are given back first.
    madvise(begin, static_cast<std::size_t>(bytes), MADV_DONTNEED);
    madvise(begin, static_cast<std::size_t>(bytes), huge_pages ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
#else
    if (huge_pages) return state.SkipWithError("huge pages are asked for on Linux only");
#endif
    std::fill_n(begin, bytes, std::byte{1});
    const auto* words = reinterpret_cast<const std::uint64_t*>(begin);
    const auto count = static_cast<std::size_t>(bytes) / sizeof(std::uint64_t);
    std::uint64_t total = 0;
    while (state.KeepRunning()) benchmark::DoNotOptimize(total = bench::sum(words, count));
    bench::require(total == count * 0x0101010101010101U, "read: wrong sum");
    bench::report_bytes(state, static_cast<std::size_t>(bytes));
}

// Twice the largest cache, but no more than a quarter of the memory.
std::int64_t beyond_caches() {
    std::int64_t cache = std::int64_t{64} << 20U;
    std::int64_t memory = std::int64_t{8} << 30U;
#if defined(_SC_LEVEL3_CACHE_SIZE)
    cache = std::max<std::int64_t>(cache, sysconf(_SC_LEVEL3_CACHE_SIZE));
#endif
#if defined(_SC_PHYS_PAGES)
    memory = static_cast<std::int64_t>(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE);
#endif
    return std::min(2 * cache, memory / 4) & ~std::int64_t{4095};
}

bool register_all() noexcept {
#if defined(__x86_64__)
    benchmark::RegisterBenchmark("clock", clock_rate);
#endif
    for (const bench::Peak& peak : bench::peaks()) {
        if (!peak.missing.empty()) continue;  // main() says so
        benchmark::RegisterBenchmark(("peak/" + peak.name).c_str(), peak_rate, peak);
    }
    for (const bool huge_pages : {false, true}) {
        auto* reads = benchmark::RegisterBenchmark(huge_pages ? "read/huge_pages" : "read/pages", read, huge_pages);
        reads->ArgName("bytes")->UseRealTime()->Unit(benchmark::kMicrosecond);
        for (const std::int64_t bytes : {768 * 3072, 4096 * 4096, 4096 * 16384}) reads->Arg(bytes);
        reads->Arg(beyond_caches());
    }
    return true;
}
[[maybe_unused]] const bool registered = register_all();

}  // namespace
