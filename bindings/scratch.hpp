// Memory that a call on a GPU needs between its kernels, from the framework whose arrays it computes with: what lies in
// a pool of PyTorch or CuPy, these can use for others, and give back to the driver.
#pragma once

#include <array>
#include <cstddef>

#include "bindings/frameworks.hpp"
#include "octavo/runtime.hpp"

namespace octavo::python {

// That of one call. May be used without the interpreter's lock, and must outlive what it gave out.
class FrameworkScratch {
public:
    FrameworkScratch(Framework framework, Device device);
    FrameworkScratch(const FrameworkScratch&) = delete;
    FrameworkScratch& operator=(const FrameworkScratch&) = delete;

    // For octavo::ScratchFrom; null where octavo's own pool is to be used: the framework has none that we know of.
    [[nodiscard]] const Scratch* get() const { return scratch_.allocate == nullptr ? nullptr : &scratch_; }

private:
    // What holds a piece of memory: a tensor of PyTorch, a MemoryPointer of CuPy.
    struct Piece {
        void* memory = nullptr;
        void* holder = nullptr;
    };

    void* keep(Piece piece) noexcept;           // its memory; null, and nothing is kept, where there are too many
    void* forget(const void* memory) noexcept;  // its holder

    static void* allocate_torch(void* self, std::size_t size, std::int32_t device, void* stream);
    static void release_torch(void* self, void* memory, std::size_t size, std::int32_t device, void* stream);
    static void* allocate_cupy(void* self, std::size_t size, std::int32_t device, void* stream);
    static void release_cupy(void* self, void* memory, std::size_t size, std::int32_t device, void* stream);

    Scratch scratch_;
    std::array<Piece, 8> pieces_;  // a call has three at most
};

}  // namespace octavo::python
