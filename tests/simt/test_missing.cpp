// What is said where a GPU is missing or too old, or cuBLASLt is: each in a child with an emulated machine of its own.
#include <dlfcn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <functional>
#include <string>

#include "arrays.hpp"
#include "check.hpp"
#include "octavo/octavo.hpp"
#include "runtime.hpp"

namespace {

constexpr octavo::Device first_gpu{octavo::DeviceKind::cuda, 0};

// What `body` says in a child with this environment variable.
std::string with(const char* variable, const char* value, const std::function<std::string()>& body) {
    int ends[2];
    if (pipe(ends) != 0) return "no pipe";
    const pid_t child = fork();
    if (child == 0) {
        setenv(variable, value, 1);
        std::string text;
        try {
            text = body();
        } catch (const octavo::Error& error) {
            text = error.what();
        }
        const bool written = write(ends[1], text.data(), text.size()) == static_cast<ssize_t>(text.size());
        _exit(written ? 0 : 1);
    }
    close(ends[1]);
    char buffer[4096];
    const ssize_t size = read(ends[0], buffer, sizeof buffer);
    close(ends[0]);
    int status = 0;
    waitpid(child, &status, 0);
    return status == 0 && size >= 0 ? std::string(buffer, static_cast<std::size_t>(size)) : "the child failed";
}

// A call on a GPU that gets as far as there is one; its memory is never read.
std::string call(octavo::Device device) {
    std::int32_t memory = 0;
    std::int8_t code = 0;
    const octavo::Matrix codes{.data = &code, .dtype = octavo::DType::i8, .device = device, .rows = 1, .cols = 1};
    octavo::sum_codes(codes, {.data = &memory, .dtype = octavo::DType::i32, .device = device, .size = 1});
    return "no error";
}

std::string missing() { return octavo::cuda_info().missing; }

// How many bytes of 64 x 1024 weights the launch before a product has asked for.
std::string asked() {
    setenv("OCTAVO_TEST_DEVICE", "cuda", 1);  // of the arrays, from the first on
    const Array x(octavo::DType::f32, 2, 1024);
    const Array codes(octavo::DType::i8, 64, 1024);
    const Array scale(octavo::DType::f32, 1, 64);
    const Array sums(octavo::DType::i32, 1, 64);
    const Array y(octavo::DType::f32, 2, 64);
    octavo::linear(x.matrix(), {.codes = codes.matrix(), .scale = scale.vector(), .code_sums = sums.vector()},
                   octavo::absent_vector, y.matrix(), {.outliers = octavo::Outliers::none, .path = octavo::Path::int8});
    void* const library = dlopen(std::getenv("OCTAVO_CUDA_LIBRARY"), RTLD_LAZY | RTLD_NOLOAD);
    const auto read = reinterpret_cast<decltype(&octavo_simt_counters)>(dlsym(library, "octavo_simt_counters"));
    simt::Counters counters;
    read(&counters);
    return std::to_string(counters.prefetched);
}

}  // namespace

TEST(no_device) {
    const std::string expected = "CUDA: a driver, but no device that this process can use";
    CHECK_EQ(with("OCTAVO_SIMT_DEVICES", "0", missing), expected);
    CHECK_EQ(with("OCTAVO_SIMT_DEVICES", "0", [] { return call(first_gpu); }), "sum_codes: " + expected);
    CHECK_EQ(with("OCTAVO_SIMT_DEVICES", "2", [] { return std::to_string(octavo::cuda_info().devices.size()); }), "2");
}

TEST(a_device_that_is_not_there) {
    const auto far = [] { return call({octavo::DeviceKind::cuda, 5}); };
    CHECK_EQ(with("OCTAVO_SIMT_DEVICES", "2", far),
             "sum_codes: CUDA: cudaSetDevice: cudaErrorInvalidDevice (cudaErrorInvalidDevice)");
}

TEST(an_architecture_that_is_too_old) {
    CHECK_EQ(with("OCTAVO_SIMT_ARCH", "70", [] { return call(first_gpu); }),
             "sum_codes: CUDA: expected a GPU of compute capability 7.5 or newer, got 7.0 (device 0)");
    // It is listed all the same, and others beside it can be used.
    CHECK_EQ(with("OCTAVO_SIMT_ARCH", "70", [] { return std::to_string(octavo::cuda_info().devices.at(0).major); }),
             "7");
}

// Between 10.0 and 12.0, whose machine code and PTX are of no use to it.
TEST(an_architecture_that_was_left_out) {
    const std::string said = with("OCTAVO_SIMT_ARCH", "110", [] { return call(first_gpu); });
    CHECK(said.starts_with("sum_codes: CUDA: cudaFuncGetAttributes: cudaErrorNoKernelImageForDevice ("));
    CHECK(said.find("; this build of octavo is for the compute capabilities 75 ") != std::string::npos);
    CHECK(said.ends_with("(11.0 needs code of its own: 110-real among OCTAVO_CUDA_ARCHITECTURES)"));
}

// To give back what nobody holds is no reason to load anything.
TEST(releasing_memory_loads_nothing) {
    const auto is_loaded = [] {
        void* const library = dlopen(std::getenv("OCTAVO_CUDA_LIBRARY"), RTLD_LAZY | RTLD_NOLOAD);
        return std::string(library == nullptr ? "not loaded" : "loaded");
    };
    CHECK_EQ(with("OCTAVO_SIMT_DEVICES", "1",
                  [&] {
                      octavo::release_cuda_memory();
                      return is_loaded();
                  }),
             "not loaded");
    CHECK_EQ(with("OCTAVO_SIMT_DEVICES", "1",
                  [&] {
                      static_cast<void>(octavo::cuda_info());
                      octavo::release_cuda_memory();
                      return is_loaded();
                  }),
             "loaded");
}

// As much as memory gives in the time, or as the cache may hold of it, where it does not say how fast it is.
TEST(memory_that_does_not_say_how_fast_it_is) {
    CHECK_EQ(with("OCTAVO_CUDA_PREFETCH", "1", asked), "3584");
    CHECK_EQ(with("OCTAVO_SIMT_NO_CLOCK", "1", asked), std::to_string(64 * 1024));
    CHECK_EQ(with("OCTAVO_CUDA_PREFETCH", "0", asked), "0");
}

TEST(no_cublaslt) {
    const auto status = [] { return octavo::cuda_info().cublaslt; };
    CHECK_EQ(with("OCTAVO_SIMT_CUBLASLT", "missing", status), "not found (none for the emulated GPU)");
    CHECK(with("OCTAVO_SIMT_CUBLASLT", "no-function", status).starts_with("unusable (no function cublasLt"));
    CHECK(!with("OCTAVO_SIMT_CUBLASLT", "", status).starts_with("not found"));
    CHECK_EQ(with("OCTAVO_SIMT_CUBLASLT", "missing", missing), "");  // octavo has a product of its own
}
