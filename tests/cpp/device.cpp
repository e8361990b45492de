#include "device.hpp"

#include <dlfcn.h>

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <string_view>

#include "octavo/runtime.hpp"

namespace {

// The few functions of the CUDA driver that the tests need; there is nothing to link with.
class Driver {
public:
    static const Driver& get() {
        static const Driver driver;
        return driver;
    }

    [[nodiscard]] void* allocate(std::size_t size) const {
        void* memory = nullptr;
        constexpr unsigned portable_and_mapped = 3;
        check(allocate_(&memory, size == 0 ? 1 : size, portable_and_mapped), "cuMemHostAlloc");
        return memory;
    }
    void free(void* memory) const { free_(memory); }
    void synchronize() const { check(synchronize_(), "cuCtxSynchronize"); }

private:
    Driver() : library_(dlopen("libcuda.so.1", RTLD_NOW)) {
        if (library_ == nullptr) throw std::runtime_error("libcuda.so.1 not found");
        const auto init = find<int (*)(unsigned)>("cuInit");
        const auto retain = find<int (*)(void**, int)>("cuDevicePrimaryCtxRetain");
        const auto set_current = find<int (*)(void*)>("cuCtxSetCurrent");
        void* context = nullptr;
        check(init(0), "cuInit");
        check(retain(&context, 0), "cuDevicePrimaryCtxRetain");
        check(set_current(context), "cuCtxSetCurrent");
        allocate_ = find<int (*)(void**, std::size_t, unsigned)>("cuMemHostAlloc");
        free_ = find<int (*)(void*)>("cuMemFreeHost");
        synchronize_ = find<int (*)()>("cuCtxSynchronize");
    }

    template <class Function>
    Function find(const char* name) const {
        void* const symbol = dlsym(library_, name);
        if (symbol == nullptr) throw std::runtime_error(std::string("no ") + name + " in libcuda.so.1");
        return reinterpret_cast<Function>(symbol);
    }
    static void check(int status, const char* call) {
        if (status != 0) throw std::runtime_error(std::string(call) + ": CUresult " + std::to_string(status));
    }

    void* library_;
    int (*allocate_)(void**, std::size_t, unsigned) = nullptr;
    int (*free_)(void*) = nullptr;
    int (*synchronize_)() = nullptr;
};

bool on_cuda() {
    const char* const wanted = std::getenv("OCTAVO_TEST_DEVICE");
    return wanted != nullptr && std::string_view(wanted) == "cuda";
}

// What the emulated backend exports besides what every one does (tests/simt/runtime.hpp).
struct Emulator {
    void (*announce)(void*, std::size_t) = nullptr;
    void (*withdraw)(void*) = nullptr;

    Emulator() {
        const char* const path = std::getenv("OCTAVO_CUDA_LIBRARY");
        void* const library = on_cuda() && path != nullptr ? dlopen(path, RTLD_LAZY | RTLD_LOCAL) : nullptr;
        if (library == nullptr) return;
        announce = reinterpret_cast<void (*)(void*, std::size_t)>(dlsym(library, "octavo_simt_register"));
        withdraw = reinterpret_cast<void (*)(void*)>(dlsym(library, "octavo_simt_unregister"));
    }
    [[nodiscard]] bool present() const { return announce != nullptr; }
    static const Emulator& get() {
        static const Emulator emulator;
        return emulator;
    }
};

bool on_gpu() { return on_cuda() && !Emulator::get().present(); }

}  // namespace

octavo::Device test_device() {
    static const bool cuda = on_cuda();
    return {cuda ? octavo::DeviceKind::cuda : octavo::DeviceKind::cpu, 0};
}

std::string missing_device() { return on_cuda() ? octavo::cuda_info().missing : ""; }

void* allocate_pinned(std::size_t size) { return on_gpu() ? Driver::get().allocate(size) : nullptr; }
void free_pinned(void* memory) { Driver::get().free(memory); }

void announce(void* memory, std::size_t size) {
    if (Emulator::get().present()) Emulator::get().announce(memory, size);
}
void withdraw(void* memory) {
    if (Emulator::get().present()) Emulator::get().withdraw(memory);
}

void wait_for_device() {
    static const bool gpu = on_gpu();
    if (gpu) Driver::get().synchronize();
}
