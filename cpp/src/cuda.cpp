#include "cuda.hpp"

#include <dlfcn.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <filesystem>
#include <string>
#include <utility>

#include "octavo/error.hpp"

namespace octavo {
namespace {

constexpr auto library_name = "liboctavo_cuda.so";

// Where the environment says; or beside the library or program that this code is part of.
std::string library_path() {
    if (const char* path = std::getenv("OCTAVO_CUDA_LIBRARY"); path != nullptr && *path != '\0') return path;
    Dl_info here{};
    if (dladdr(reinterpret_cast<const void*>(&library_path), &here) != 0 && here.dli_fname != nullptr) {
        const auto folder = std::filesystem::path(here.dli_fname).parent_path();
        // In a wheel the library for C is one folder further in than the extension and the backend.
        for (const auto& path : {folder / library_name, folder / ".." / library_name}) {
            if (access(path.c_str(), F_OK) == 0) return path.string();
        }
    }
    return library_name;
}

const CudaBackend* load() {
    const std::string path = library_path();
    void* const library = dlopen(path.c_str(), RTLD_LAZY | RTLD_LOCAL);
    if (library == nullptr) {
        throw Error(ErrorKind::device,
                    std::string("CUDA: this installation of octavo has no CUDA backend (") + dlerror() + ")");
    }
    // The library stays loaded: what it gave out lives as long as the process.
    auto* const entry = reinterpret_cast<CudaEntry*>(dlsym(library, cuda_entry_name));
    if (entry == nullptr) throw Error(ErrorKind::device, "CUDA: " + path + " is not a backend of octavo");
    return entry(version(), &scratch_in_use);
}

std::atomic<const CudaBackend*> loaded{nullptr};

thread_local const Scratch* scratch_of_thread = nullptr;

}  // namespace

const Scratch* scratch_in_use() noexcept { return scratch_of_thread; }
void use_scratch(const Scratch* scratch) noexcept { scratch_of_thread = scratch; }

ScratchFrom::ScratchFrom(const Scratch* scratch) noexcept : outer_(std::exchange(scratch_of_thread, scratch)) {}
ScratchFrom::~ScratchFrom() { scratch_of_thread = outer_; }

const CudaBackend& cuda_backend() {
    const CudaBackend* known = loaded.load(std::memory_order_acquire);
    if (known == nullptr) {
        known = load();  // twice at the same time leaves one unused
        loaded.store(known, std::memory_order_release);
    }
    return *known;
}

CudaInfo cuda_info() {
    CudaInfo info;
    try {
        const CudaBackend& backend = cuda_backend();
        info.devices = backend.devices();
        info.cublaslt = backend.cublaslt();
        info.wgmma = backend.wgmma();
    } catch (const Error& error) {
        info.missing = error.what();
    }
    return info;
}

std::uint64_t capture_of(void* stream) noexcept {
    const CudaBackend* const known = loaded.load(std::memory_order_acquire);
    return known != nullptr ? known->capture_of({stream}) : 0;
}

void release_cuda_memory() {
    const CudaBackend* const known = loaded.load(std::memory_order_acquire);
    if (known != nullptr) known->release_memory();
}

}  // namespace octavo
