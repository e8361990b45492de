// version, OCTAVO_CPU_ISA, OMP_NUM_THREADS and ThreadLimit. The environment is read once per process, so each case of
// it runs in a child of this process, which itself asks for neither before the last test.
#include <sched.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

#include "arrays.hpp"
#include "calls.hpp"
#include "check.hpp"
#include "octavo/octavo.hpp"

using octavo::DType;

namespace {

// What `body` returns in a child with this environment variable; unset where `value` is null.
template <class Body>
std::string in_child(const char* variable, const char* value, Body body) {
    int ends[2];
    if (pipe(ends) != 0) return "no pipe";
    const pid_t child = fork();
    if (child == 0) {
        value == nullptr ? unsetenv(variable) : setenv(variable, value, 1);
        std::string text;
        try {
            text = body();
        } catch (const octavo::Error& error) {
            text = error.what();
        }
        for (std::size_t at = 0; at < text.size();) {
            const auto written = write(ends[1], text.data() + at, text.size() - at);
            if (written <= 0) _exit(1);
            at += static_cast<std::size_t>(written);
        }
        _exit(0);
    }
    close(ends[1]);
    std::string result;
    char buffer[4096];
    for (ssize_t size = 0; (size = read(ends[0], buffer, sizeof buffer)) > 0;) {
        result.append(buffer, static_cast<std::size_t>(size));
    }
    close(ends[0]);
    int status = 0;
    waitpid(child, &status, 0);
    return status == 0 ? result : "the child failed";
}

std::string default_threads(const char* environment) {
    return in_child("OMP_NUM_THREADS", environment, [] { return std::to_string(octavo::num_threads()); });
}

std::string used_isa(const char* environment) {
    return in_child("OCTAVO_CPU_ISA", environment, [] { return std::string(octavo::cpu_isa()); });
}

// Outputs of the operations on awkward sizes: those of `linear`, and those that no sum of floats is part of.
std::string results(bool of_linear) {
    Random random(5);
    std::string result;
    for (const std::int64_t k : {1, 63, 130, 1000}) {
        const Array x(DType::f16, random_normal(random, 9, k, 3));
        const Array w(DType::bf16, random_normal(random, 70, k));
        const Array bias(DType::f32, random_normal(random, 1, 70));
        for (const octavo::Scheme scheme : schemes) {
            const Codes weight = quantize_weight(w, scheme, octavo::Granularity::vector);
            const octavo::WeightView view{.codes = weight.codes.matrix(),
                                          .scale = weight.scale.vector(),
                                          .zeropoint = vector_of(weight.zeropoint),
                                          .code_sums = weight.code_sums.vector(),
                                          .scheme = scheme};
            for (const DType dtype : float_dtypes) {
                const Array y(dtype, 9, 70);
                for (const auto path : {octavo::Path::int8, octavo::Path::weight_only}) {
                    if (!of_linear) continue;
                    octavo::linear(x.matrix(), view, bias.vector(), y.matrix(), {.path = path});
                    result += y.bytes();
                }
                const Array back(dtype, 70, k);
                octavo::dequantize(view.codes, view.scale, view.zeropoint, back.matrix());
                if (!of_linear) result += weight.codes.bytes() + weight.scale.bytes() + back.bytes();
            }
        }
    }
    return result;
}

}  // namespace

TEST(version) { CHECK_EQ(octavo::version(), OCTAVO_EXPECTED_VERSION); }

TEST(instruction_sets) {
    const auto available = octavo::cpu_isas_available();
    CHECK(!available.empty());
    CHECK_EQ(available.back(), "scalar");
    const std::string& best = available.front();
    // Set where the processor is known, because it is emulated (CMakeLists.txt).
    if (const char* expected = std::getenv("OCTAVO_TEST_BEST_ISA")) CHECK_EQ(best, expected);
    CHECK_EQ(used_isa(nullptr), best);
    CHECK_EQ(used_isa(""), best);
    for (const char* isa :
         {"scalar", "avx2", "avx512bw", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx", "neon_dotprod", "neon_i8mm"}) {
        const bool has = std::ranges::find(available, isa) != available.end();
        if (has) CHECK_EQ(used_isa(isa), isa);
        if (!has) CHECK(used_isa(isa).find(std::string("got '") + isa + "'") != std::string::npos);
    }
    std::string names = "(";
    for (const auto& name : available) names += name + (name == "scalar" ? ")" : ", ");
    CHECK_EQ(used_isa("sse9"),
             "environment variable OCTAVO_CPU_ISA: expected one this processor has " + names + ", got 'sse9'");
}

// An operation reports a wrong OCTAVO_CPU_ISA, and works once it is right.
TEST(operations_report_an_unknown_instruction_set) {
    const auto first_code = [] {
        const Array x(DType::f32, {1, 2});
        return std::to_string(
            static_cast<int>(quantize(x, octavo::Scheme::absmax, octavo::Granularity::row).codes.get(1)));
    };
    CHECK(in_child("OCTAVO_CPU_ISA", "sse9", first_code).starts_with("environment variable OCTAVO_CPU_ISA: expected"));
    CHECK_EQ(in_child("OCTAVO_CPU_ISA", "sse9",
                      [&] {
                          try {
                              first_code();
                          } catch (const octavo::Error&) {
                              setenv("OCTAVO_CPU_ISA", "scalar", 1);
                          }
                          return first_code() + octavo::cpu_isa();
                      }),
             "127scalar");
}

TEST(codes_and_scales_do_not_depend_on_the_instruction_set) {
    const auto run = [] { return results(false); };
    const std::string expected = in_child("OCTAVO_CPU_ISA", "scalar", run);
    CHECK(expected.size() > 100000);
    for (const auto& isa : octavo::cpu_isas_available()) {
        const check::Context context(isa);
        CHECK(in_child("OCTAVO_CPU_ISA", isa.c_str(), run) == expected);
    }
}

// The scalar kernels have no fused multiply-add; how far they may be off is for the tests of `linear` to say.
TEST(outputs_do_not_depend_on_the_instruction_set_where_all_fuse) {
    const auto run = [] { return results(true); };
    const auto available = octavo::cpu_isas_available();
    const std::string expected = in_child("OCTAVO_CPU_ISA", available.front().c_str(), run);
    CHECK(expected.size() > 10000);
    for (const auto& isa : available) {
        const check::Context context(isa);
        if (isa != "scalar") CHECK(in_child("OCTAVO_CPU_ISA", isa.c_str(), run) == expected);
    }
}

// The other causes are met by .ci/cuda_wheel.py (the driver) and by tests/simt (devices).
TEST(a_cuda_backend_that_is_not_there) {
    const auto missing = [] { return octavo::cuda_info().missing; };
    const std::string absent = in_child("OCTAVO_CUDA_LIBRARY", "/nowhere/liboctavo_cuda.so", missing);
    CHECK(absent.starts_with("CUDA: this installation of octavo has no CUDA backend (/nowhere/liboctavo_cuda.so: "));
    CHECK_EQ(in_child("OCTAVO_CUDA_LIBRARY", "libm.so.6", missing), "CUDA: libm.so.6 is not a backend of octavo");
    const std::string call = in_child("OCTAVO_CUDA_LIBRARY", "/nowhere/liboctavo_cuda.so", [] {
        std::int32_t memory = 0;
        std::int8_t code = 0;
        const octavo::Device cuda{octavo::DeviceKind::cuda, 0};
        const octavo::Matrix codes{.data = &code, .dtype = DType::i8, .device = cuda, .rows = 1, .cols = 1};
        const octavo::Vector sums{.data = &memory, .dtype = DType::i32, .device = cuda, .size = 1};
        octavo::sum_codes(codes, sums);
        return std::string("no error");
    });
    CHECK_EQ(call, "sum_codes: " + absent);
}

TEST(default_number_of_threads) {
    cpu_set_t allowed;
    CHECK_EQ(sched_getaffinity(0, sizeof allowed, &allowed), 0);
    const std::string processors = std::to_string(CPU_COUNT(&allowed));
    struct Case {
        const char* environment;
        std::string threads;
    };
    const Case cases[] = {{nullptr, processors}, {"", processors}, {"0", processors}, {"-3", processors},
                          {"many", processors},  {"1", "1"},       {"7", "7"},        {"4,2", "4"},
                          {"100000", "1024"}};
    for (const Case& c : cases) {
        const check::Context context("OMP_NUM_THREADS=", c.environment == nullptr ? "(unset)" : c.environment);
        CHECK_EQ(default_threads(c.environment), c.threads);
    }
    // In the affinity mask, not in the machine.
    const auto pinned = in_child("OMP_NUM_THREADS", nullptr, [&] {
        cpu_set_t one;
        CPU_ZERO(&one);
        for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
            if (!CPU_ISSET(cpu, &allowed)) continue;
            CPU_SET(cpu, &one);
            break;
        }
        return sched_setaffinity(0, sizeof one, &one) == 0 ? std::to_string(octavo::num_threads()) : "no affinity";
    });
    CHECK_EQ(pinned, "1");
}

// Before set_num_threads a limit holds in its own thread; after it, nowhere. Last of these tests: there is no way back.
TEST(limits_of_threads) {
    const int by_default = octavo::num_threads();
    {
        const octavo::ThreadLimit five(5);
        CHECK_EQ(octavo::num_threads(), 5);
        int elsewhere = 0;
        std::thread([&] { elsewhere = octavo::num_threads(); }).join();
        CHECK_EQ(elsewhere, by_default);
        {
            const octavo::ThreadLimit one(1);
            CHECK_EQ(octavo::num_threads(), 1);
            const octavo::ThreadLimit too_many(100000);
            CHECK_EQ(octavo::num_threads(), 1024);
            const octavo::ThreadLimit none(0);
            CHECK_EQ(octavo::num_threads(), by_default);
            const octavo::ThreadLimit negative(-1);
            CHECK_EQ(octavo::num_threads(), by_default);
        }
        CHECK_EQ(octavo::num_threads(), 5);
        octavo::set_num_threads(3);
        CHECK_EQ(octavo::num_threads(), 3);
        const octavo::ThreadLimit two(2);
        CHECK_EQ(octavo::num_threads(), 3);
    }
    CHECK_EQ(octavo::num_threads(), 3);
}
