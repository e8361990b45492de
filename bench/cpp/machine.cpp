// Instruction peaks and read bandwidth of one thread (machine.hpp).
//
// A peak loop must not touch memory: accumulators are named variables in one asm statement, because GCC 12 spills
// arrays of them. Twelve chains cover the latency (5 cycles, at most 2 instructions a cycle) with some to spare.
#include "machine.hpp"

#include <algorithm>
#include <cstring>
#include <ctime>
#include <limits>

#include "inputs.hpp"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace bench {
namespace {

#if defined(__x86_64__)

constexpr int chains = 12;

// Each instruction adds 1 * 1 four times to every 32-bit lane. The sums may wrap, as the instruction does.
#define OCTAVO_TWELVE(instruction)                                                                              \
    instruction("%0") instruction("%1") instruction("%2") instruction("%3") instruction("%4") instruction("%5") \
        instruction("%6") instruction("%7") instruction("%8") instruction("%9") instruction("%10") instruction("%11")
#define OCTAVO_VPDPBUSD(accumulator) "vpdpbusd %[a], %[b], " accumulator "\n\t"

// Whether each of the 32-bit lanes of `sums` holds `expected`.
bool all_are(const void* sums, std::size_t bytes, std::uint32_t expected) {
    for (std::size_t offset = 0; offset < bytes; offset += sizeof expected) {
        std::uint32_t lane = 0;
        std::memcpy(&lane, static_cast<const std::byte*>(sums) + offset, sizeof lane);
        if (lane != expected) return false;
    }
    return true;
}

// NOLINTBEGIN(misc-const-correctness): the asm statements write the accumulators
__attribute__((target("avx512f,avx512vnni"))) bool vpdpbusd_zmm(std::int64_t iterations) {
    const __m512i a = _mm512_set1_epi8(1);
    const __m512i b = a;
    __m512i c0 = _mm512_setzero_si512();
    __m512i c1 = c0, c2 = c0, c3 = c0, c4 = c0, c5 = c0, c6 = c0, c7 = c0, c8 = c0, c9 = c0, c10 = c0, c11 = c0;
    for (std::int64_t i = 0; i < iterations; ++i) {
        asm volatile(OCTAVO_TWELVE(OCTAVO_VPDPBUSD)
                     : "+v"(c0), "+v"(c1), "+v"(c2), "+v"(c3), "+v"(c4), "+v"(c5), "+v"(c6), "+v"(c7), "+v"(c8),
                       "+v"(c9), "+v"(c10), "+v"(c11)
                     : [a] "v"(a), [b] "v"(b));
    }
    const __m512i sums[chains] = {c0, c1, c2, c3, c4, c5, c6, c7, c8, c9, c10, c11};
    return all_are(sums, sizeof sums, static_cast<std::uint32_t>(4 * iterations));
}

__attribute__((target("avx512f,avx512vl,avx512vnni"))) bool vpdpbusd_ymm(std::int64_t iterations) {
    const __m256i a = _mm256_set1_epi8(1);
    const __m256i b = a;
    __m256i c0 = _mm256_setzero_si256();
    __m256i c1 = c0, c2 = c0, c3 = c0, c4 = c0, c5 = c0, c6 = c0, c7 = c0, c8 = c0, c9 = c0, c10 = c0, c11 = c0;
    for (std::int64_t i = 0; i < iterations; ++i) {
        asm volatile(OCTAVO_TWELVE(OCTAVO_VPDPBUSD)
                     : "+v"(c0), "+v"(c1), "+v"(c2), "+v"(c3), "+v"(c4), "+v"(c5), "+v"(c6), "+v"(c7), "+v"(c8),
                       "+v"(c9), "+v"(c10), "+v"(c11)
                     : [a] "v"(a), [b] "v"(b));
    }
    const __m256i sums[chains] = {c0, c1, c2, c3, c4, c5, c6, c7, c8, c9, c10, c11};
    return all_are(sums, sizeof sums, static_cast<std::uint32_t>(4 * iterations));
}

// AVX2's best exact loop, pairs (cpp/src/cpu/kernels/product/avx2.hpp): two additions, a multiplication and an addition
// for 32 products. All in 16 bit are 1: (1 + 1) (1 + 1), twice for each 32-bit lane.
#define OCTAVO_PAIRS(accumulator)            \
    "vpaddw %[a], %[b], %%ymm14\n\t"         \
    "vpaddw %[b], %[a], %%ymm15\n\t"         \
    "vpmaddwd %%ymm14, %%ymm15, %%ymm15\n\t" \
    "vpaddd %%ymm15, " accumulator ", " accumulator "\n\t"
__attribute__((target("avx2"))) bool pairs_ymm(std::int64_t iterations) {
    const __m256i a = _mm256_set1_epi16(1);
    const __m256i b = a;
    __m256i c0 = _mm256_setzero_si256();
    __m256i c1 = c0, c2 = c0, c3 = c0, c4 = c0, c5 = c0, c6 = c0, c7 = c0;
    for (std::int64_t i = 0; i < iterations; ++i) {
        asm volatile(OCTAVO_PAIRS("%0") OCTAVO_PAIRS("%1") OCTAVO_PAIRS("%2") OCTAVO_PAIRS("%3") OCTAVO_PAIRS("%4")
                         OCTAVO_PAIRS("%5") OCTAVO_PAIRS("%6") OCTAVO_PAIRS("%7")
                     : "+x"(c0), "+x"(c1), "+x"(c2), "+x"(c3), "+x"(c4), "+x"(c5), "+x"(c6), "+x"(c7)
                     : [a] "x"(a), [b] "x"(b)
                     : "xmm14", "xmm15");
    }
    const __m256i sums[8] = {c0, c1, c2, c3, c4, c5, c6, c7};
    return all_are(sums, sizeof sums, static_cast<std::uint32_t>(8 * iterations));
}

// The same for AVX-512 without VNNI (cpp/src/cpu/kernels/product/avx512bw.hpp): a multiplication and an addition for 32
// products.
#define OCTAVO_WORDS(accumulator) "vpmaddwd %[a], %[b], %%zmm16\n\tvpaddd %%zmm16, " accumulator ", " accumulator "\n\t"
__attribute__((target("avx512f,avx512bw"))) bool words_zmm(std::int64_t iterations) {
    const __m512i a = _mm512_set1_epi16(1);
    const __m512i b = a;
    __m512i c0 = _mm512_setzero_si512();
    __m512i c1 = c0, c2 = c0, c3 = c0, c4 = c0, c5 = c0, c6 = c0, c7 = c0, c8 = c0, c9 = c0, c10 = c0, c11 = c0;
    for (std::int64_t i = 0; i < iterations; ++i) {
        asm volatile(OCTAVO_TWELVE(OCTAVO_WORDS)
                     : "+v"(c0), "+v"(c1), "+v"(c2), "+v"(c3), "+v"(c4), "+v"(c5), "+v"(c6), "+v"(c7), "+v"(c8),
                       "+v"(c9), "+v"(c10), "+v"(c11)
                     : [a] "v"(a), [b] "v"(b)
                     : "xmm16");
    }
    const __m512i sums[chains] = {c0, c1, c2, c3, c4, c5, c6, c7, c8, c9, c10, c11};
    return all_are(sums, sizeof sums, static_cast<std::uint32_t>(2 * iterations));
}

// What a product of float32 is made of, for comparison: 1 * 1 added to the bit pattern of 0 stays exact up to 2^24.
#define OCTAVO_FMA(accumulator) "vfmadd231ps %[a], %[b], " accumulator "\n\t"
__attribute__((target("avx2,fma"))) bool vfmadd_ymm(std::int64_t iterations) {
    const __m256 a = _mm256_set1_ps(1.0F);
    const __m256 b = a;
    __m256 c0 = _mm256_setzero_ps();
    __m256 c1 = c0, c2 = c0, c3 = c0, c4 = c0, c5 = c0, c6 = c0, c7 = c0, c8 = c0, c9 = c0, c10 = c0, c11 = c0;
    for (std::int64_t i = 0; i < iterations; ++i) {
        asm volatile(OCTAVO_TWELVE(OCTAVO_FMA)
                     : "+x"(c0), "+x"(c1), "+x"(c2), "+x"(c3), "+x"(c4), "+x"(c5), "+x"(c6), "+x"(c7), "+x"(c8),
                       "+x"(c9), "+x"(c10), "+x"(c11)
                     : [a] "x"(a), [b] "x"(b));
    }
    const __m256 sums[chains] = {c0, c1, c2, c3, c4, c5, c6, c7, c8, c9, c10, c11};
    const auto expected = static_cast<float>(std::min<std::int64_t>(iterations, std::int64_t{1} << 24U));
    std::uint32_t bits = 0;
    std::memcpy(&bits, &expected, sizeof bits);
    return all_are(sums, sizeof sums, bits);
}
// NOLINTEND(misc-const-correctness)

// AMX: 16 x 16 sums of 64 products each. Four accumulators (tmm0 to 3), as a product has them that loads two tiles of
// each operand; an instruction takes 16 cycles, its result 52. Tiles are named by hand: the compiler uses none.
struct alignas(64) TileConfiguration {
    std::uint8_t palette = 1;
    std::uint8_t start_row = 0;
    std::uint8_t reserved[14] = {};
    std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

bool tdpbssd(std::int64_t iterations) {
    const TileConfiguration configuration;
    alignas(64) std::uint8_t ones[16][64];
    std::memset(ones, 1, sizeof ones);
    alignas(64) std::uint32_t sums[16][16];
    const std::int64_t stride = 64;
    asm volatile(
        "ldtilecfg %[configuration]\n\t"
        "tilezero %%tmm0\n\ttilezero %%tmm1\n\ttilezero %%tmm2\n\ttilezero %%tmm3\n\t"
        "tileloadd (%[ones],%[stride]), %%tmm4\n\ttileloadd (%[ones],%[stride]), %%tmm5\n\t"
        "tileloadd (%[ones],%[stride]), %%tmm6\n\ttileloadd (%[ones],%[stride]), %%tmm7\n\t"
        :
        : [configuration] "m"(configuration), [ones] "r"(ones), [stride] "r"(stride)
        : "memory");
    for (std::int64_t i = 0; i < iterations; ++i) {
        asm volatile(
            "tdpbssd %%tmm6, %%tmm4, %%tmm0\n\ttdpbssd %%tmm7, %%tmm4, %%tmm1\n\t"
            "tdpbssd %%tmm6, %%tmm5, %%tmm2\n\ttdpbssd %%tmm7, %%tmm5, %%tmm3\n\t" ::);
    }
    bool right = true;
    const auto expected = static_cast<std::uint32_t>(64 * iterations);
    asm volatile("tilestored %%tmm0, (%[sums],%[stride])" : : [sums] "r"(sums), [stride] "r"(stride) : "memory");
    right = right && all_are(sums, sizeof sums, expected);
    asm volatile("tilestored %%tmm3, (%[sums],%[stride])" : : [sums] "r"(sums), [stride] "r"(stride) : "memory");
    right = right && all_are(sums, sizeof sums, expected);
    asm volatile("tilerelease");
    return right;
}

// Why AMX cannot be used; empty where it can. The system grants the tiles only to who asks.
std::string_view amx_missing() {
    unsigned eax = 0;
    unsigned ebx = 0;
    unsigned ecx = 0;
    unsigned edx = 0;
    constexpr unsigned tile_bit = 1U << 24U;
    constexpr unsigned int8_bit = 1U << 25U;
    if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0 || (edx & tile_bit) == 0 || (edx & int8_bit) == 0) {
        return "the processor has no AMX int8";
    }
#if defined(__linux__)
    constexpr long request_permission = 0x1023;  // ARCH_REQ_XCOMP_PERM
    constexpr long tile_data = 18;               // XFEATURE_XTILEDATA
    if (syscall(SYS_arch_prctl, request_permission, tile_data) != 0) return "the system does not grant AMX";
    return "";
#else
    return "asking for AMX is known for Linux only";
#endif
}

std::string_view avx2_missing() {
    const bool has = __builtin_cpu_supports("avx2") != 0 && __builtin_cpu_supports("fma") != 0;
    return has ? "" : "the processor has no AVX2";
}

std::string_view avx512bw_missing() {
    return __builtin_cpu_supports("avx512bw") != 0 ? "" : "the processor has no AVX512-BW";
}

std::string_view vnni_missing(bool with_vl) {
    const bool has = __builtin_cpu_supports("avx512vnni") != 0 && __builtin_cpu_supports("avx512f") != 0 &&
                     (!with_vl || __builtin_cpu_supports("avx512vl") != 0);
    return has ? "" : "the processor has no AVX512-VNNI";
}

// Four sums of a quarter each: additions do not wait for each other, and there are four streams to be fetched ahead, as
// in the kernels that are compared with this.
__attribute__((target("avx512f"))) std::uint64_t sum_avx512(const std::uint64_t* words, std::size_t count) {
    __m512i s0 = _mm512_setzero_si512();
    __m512i s1 = s0;
    __m512i s2 = s0;
    __m512i s3 = s0;
    const std::size_t quarter = count / 32 * 8;
    for (std::size_t i = 0; i < quarter; i += 8) {
        s0 = _mm512_add_epi64(s0, _mm512_loadu_si512(words + i));
        s1 = _mm512_add_epi64(s1, _mm512_loadu_si512(words + quarter + i));
        s2 = _mm512_add_epi64(s2, _mm512_loadu_si512(words + 2 * quarter + i));
        s3 = _mm512_add_epi64(s3, _mm512_loadu_si512(words + 3 * quarter + i));
    }
    const __m512i all = _mm512_add_epi64(_mm512_add_epi64(s0, s1), _mm512_add_epi64(s2, s3));
    // Not _mm512_reduce_add_epi64: GCC 12 warns inside it.
    std::uint64_t lanes[8];
    std::memcpy(lanes, &all, sizeof lanes);
    std::uint64_t total = 0;
    for (const std::uint64_t lane : lanes) total += lane;
    for (std::size_t i = count - count % 32; i < count; ++i) total += words[i];
    return total;
}

// The same for processors without it.
__attribute__((target("avx2"))) std::uint64_t sum_avx2(const std::uint64_t* words, std::size_t count) {
    __m256i s0 = _mm256_setzero_si256();
    __m256i s1 = s0;
    __m256i s2 = s0;
    __m256i s3 = s0;
    const auto at = [&](std::size_t i) { return reinterpret_cast<const __m256i*>(words + i); };
    const std::size_t quarter = count / 16 * 4;
    for (std::size_t i = 0; i < quarter; i += 4) {
        s0 = _mm256_add_epi64(s0, _mm256_loadu_si256(at(i)));
        s1 = _mm256_add_epi64(s1, _mm256_loadu_si256(at(quarter + i)));
        s2 = _mm256_add_epi64(s2, _mm256_loadu_si256(at(2 * quarter + i)));
        s3 = _mm256_add_epi64(s3, _mm256_loadu_si256(at(3 * quarter + i)));
    }
    const __m256i all = _mm256_add_epi64(_mm256_add_epi64(s0, s1), _mm256_add_epi64(s2, s3));
    std::uint64_t lanes[4];
    std::memcpy(lanes, &all, sizeof lanes);
    std::uint64_t total = lanes[0] + lanes[1] + lanes[2] + lanes[3];
    for (std::size_t i = count - count % 16; i < count; ++i) total += words[i];
    return total;
}
#endif

std::uint64_t sum_portable(const std::uint64_t* words, std::size_t count) {
    std::uint64_t sums[8] = {};
    for (std::size_t i = 0; i + 8 <= count; i += 8) {
        for (std::size_t j = 0; j < 8; ++j) sums[j] += words[i + j];
    }
    std::uint64_t total = 0;
    for (const std::uint64_t part : sums) total += part;
    for (std::size_t i = count - count % 8; i < count; ++i) total += words[i];
    return total;
}

}  // namespace

const std::vector<Peak>& peaks() {
    static const std::vector<Peak> all = {
#if defined(__x86_64__)
        {"vfmadd_ymm", chains * 16.0, vfmadd_ymm, avx2_missing()},
        {"pairs_ymm", 8 * 64.0, pairs_ymm, avx2_missing()},
        {"words_zmm", chains * 64.0, words_zmm, avx512bw_missing()},
        {"vpdpbusd_zmm", chains * 128.0, vpdpbusd_zmm, vnni_missing(false)},
        {"vpdpbusd_ymm", chains * 64.0, vpdpbusd_ymm, vnni_missing(true)},
        {"tdpbssd", 4 * 2.0 * 16 * 16 * 64, tdpbssd, amx_missing()},
#endif
    };
    return all;
}

double thread_seconds() {
    timespec time{};
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
    return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

double measure(const Peak& peak) {
    const auto run = [&](std::int64_t iterations) {
        const double begin = thread_seconds();
        require(peak.run(iterations), peak.name + ": wrong sums");
        return thread_seconds() - begin;
    };
    std::int64_t iterations = 1024;
    while (run(iterations) < 1e-3) iterations *= 2;
    double best = std::numeric_limits<double>::infinity();
    for (int slice = 0; slice < 8; ++slice) best = std::min(best, run(iterations));
    return peak.ops_per_iteration * static_cast<double>(iterations) / best;
}

std::uint64_t sum(const std::uint64_t* words, std::size_t count) {
#if defined(__x86_64__)
    static const bool has_avx512 = __builtin_cpu_supports("avx512f") != 0;
    if (has_avx512) return sum_avx512(words, count);
    static const bool has_avx2 = __builtin_cpu_supports("avx2") != 0;
    if (has_avx2) return sum_avx2(words, count);
#endif
    return sum_portable(words, count);
}

double read_bandwidth(const void* memory, std::size_t bytes) {
    const auto* words = static_cast<const std::uint64_t*>(memory);
    const std::size_t count = bytes / sizeof(std::uint64_t);
    const std::uint64_t expected = sum(words, count);
    double best = std::numeric_limits<double>::infinity();
    for (int pass = 0; pass < 15; ++pass) {
        const double begin = thread_seconds();
        const std::uint64_t total = sum(words, count);
        best = std::min(best, thread_seconds() - begin);
        require(total == expected, "read_bandwidth: two sums of the same memory differ");
    }
    return static_cast<double>(bytes) / best;
}

void report_product(benchmark::State& state, double seconds, std::int64_t m, std::int64_t n, std::int64_t k,
                    std::size_t bytes, const void* weight, std::size_t weight_bytes) {
    const double threads = octavo::num_threads();
    const double ops = 2.0 * static_cast<double>(m) * static_cast<double>(n) * static_cast<double>(k);
    state.counters["GOPS"] = 1e-9 * ops / seconds;
    state.counters["GB/s"] = 1e-9 * static_cast<double>(bytes) / seconds;
    for (const Peak& peak : peaks()) {
        if (!peak.missing.empty() || peak.name == "vpdpbusd_ymm") continue;
        state.counters["%" + peak.name] = 100 * ops / seconds / (threads * measure(peak));
    }
    const double bandwidth = threads * read_bandwidth(weight, weight_bytes);
    state.counters["%bandwidth"] = 100 * static_cast<double>(weight_bytes) / seconds / bandwidth;
}

void report_bytes(benchmark::State& state, std::size_t bytes) {
    state.counters["GB/s"] =
        benchmark::Counter(1e-9 * static_cast<double>(bytes), benchmark::Counter::kIsIterationInvariantRate);
}

}  // namespace bench
