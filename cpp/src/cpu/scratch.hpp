// Uninitialized working memory that a thread keeps for its next call: fresh memory costs a page fault for each 4 KiB,
// which for the codes of a few hundred tokens is a tenth of the product.
#pragma once

#include <cstddef>
#include <cstdint>

namespace octavo::cpu {

// A block of memory, cache-line aligned. `bytes` is what was asked for, rounded up.
struct MemoryBlock {
    void* data;
    std::size_t bytes;
};
MemoryBlock acquire_memory(std::size_t bytes);
void release_memory(MemoryBlock block) noexcept;

// Memory for `size` elements of a trivial type; of none, none.
template <class T>
class Scratch {
public:
    explicit Scratch(std::int64_t size) {
        if (size > 0) block_ = acquire_memory(static_cast<std::size_t>(size) * sizeof(T));
    }
    ~Scratch() {
        if (block_.data != nullptr) release_memory(block_);
    }
    Scratch(Scratch&& other) noexcept : block_(other.block_) { other.block_ = {nullptr, 0}; }
    Scratch& operator=(Scratch&& other) noexcept {
        const MemoryBlock mine = block_;
        block_ = other.block_;
        other.block_ = mine;
        return *this;
    }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    [[nodiscard]] T* data() const noexcept { return static_cast<T*>(block_.data); }
    T& operator[](std::int64_t index) const noexcept { return data()[index]; }

private:
    MemoryBlock block_{nullptr, 0};
};

}  // namespace octavo::cpu
