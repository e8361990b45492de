// The defect suite: small kernels, each with one mistake that CUDA programs make, and each also without it.
// test_defects runs both in every order of threads: the sound one must pass, the broken one must be caught.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <vector>

#include "check.hpp"
#include "launch.cuh"

namespace defects {

// The builds of the emulator that catch a defect: as it is, with AddressSanitizer, with race detection.
enum Build : unsigned { plain = 1, asan = 2, race = 4, every = 7 };

struct Defect {
    const char* name;
    unsigned caught_by;
    bool (*run)(bool broken);  // whether the results are right; may not return where it is broken
};

std::vector<Defect>& all();

struct Registration {
    explicit Registration(const Defect& defect) { all().push_back(defect); }
};

//   DEFECT(name, builds) { ... return results are right; }      with `broken` in scope
#define DEFECT(name, builds)                                                                                \
    static bool run_##name(bool broken);                                                                    \
    static const defects::Registration register_##name({#name, static_cast<unsigned>(builds), run_##name}); \
    static bool run_##name(bool broken)

// `count` elements of device memory.
template <class T>
class Buffer {
public:
    explicit Buffer(std::size_t count) : count_(count) {
        octavo::cuda::check(cudaMalloc(reinterpret_cast<void**>(&data_), count * sizeof(T)), "cudaMalloc");
    }
    Buffer(std::size_t count, T value) : Buffer(count) {
        for (std::size_t i = 0; i < count; ++i) data_[i] = value;
    }
    ~Buffer() { cudaFree(data_); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;

    [[nodiscard]] T* data() const { return data_; }
    T& operator[](std::size_t index) { return data_[index]; }
    [[nodiscard]] bool holds(T value) const {
        for (std::size_t i = 0; i < count_; ++i) {
            if (!(data_[i] == value)) return false;
        }
        return true;
    }

private:
    T* data_ = nullptr;
    std::size_t count_;
};

// Runs `sound` or `faulty`.
template <class... Parameters, class... Arguments>
void launch_one(bool broken, void (*faulty)(Parameters...), void (*sound)(Parameters...),
                const octavo::cuda::Grid& grid, Arguments... arguments) {
    octavo::cuda::launch(broken ? faulty : sound, grid, nullptr, arguments...);
}

}  // namespace defects
