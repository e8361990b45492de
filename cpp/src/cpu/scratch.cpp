#include "cpu/scratch.hpp"

#include <algorithm>
#include <array>
#include <new>

namespace octavo::cpu {
namespace {

constexpr std::size_t alignment = 64;
// What a thread keeps at most. Larger calls are long enough not to notice their page faults.
constexpr std::size_t most_kept = std::size_t{32} << 20U;

void free_memory(MemoryBlock block) noexcept { ::operator delete(block.data, std::align_val_t{alignment}); }

// The blocks that a thread has released and not taken again.
class KeptBlocks {
public:
    KeptBlocks() = default;
    ~KeptBlocks() {
        for (std::size_t i = 0; i < count_; ++i) free_memory(blocks_[i]);
    }
    KeptBlocks(const KeptBlocks&) = delete;
    KeptBlocks& operator=(const KeptBlocks&) = delete;

    // The smallest block that is large enough, and not so large that it had better wait for a larger request.
    MemoryBlock take(std::size_t bytes) noexcept {
        std::size_t best = count_;
        for (std::size_t i = 0; i < count_; ++i) {
            const bool fits = blocks_[i].bytes >= bytes && blocks_[i].bytes / 4 <= bytes + 4096;
            if (fits && (best == count_ || blocks_[i].bytes < blocks_[best].bytes)) best = i;
        }
        if (best == count_) return {nullptr, 0};
        const MemoryBlock taken = blocks_[best];
        blocks_[best] = blocks_[--count_];
        kept_ -= taken.bytes;
        return taken;
    }

    bool keep(MemoryBlock block) noexcept {
        // Make room by letting go of the oldest.
        while (count_ > 0 && (count_ == blocks_.size() || kept_ + block.bytes > most_kept)) {
            free_memory(blocks_[0]);
            kept_ -= blocks_[0].bytes;
            std::move(blocks_.begin() + 1, blocks_.begin() + static_cast<std::ptrdiff_t>(count_), blocks_.begin());
            --count_;
        }
        if (kept_ + block.bytes > most_kept) return false;
        blocks_[count_++] = block;
        kept_ += block.bytes;
        return true;
    }

private:
    std::array<MemoryBlock, 16> blocks_{};
    std::size_t count_ = 0;
    std::size_t kept_ = 0;
};

thread_local KeptBlocks kept_blocks;

}  // namespace

MemoryBlock acquire_memory(std::size_t bytes) {
    bytes = (bytes + alignment - 1) / alignment * alignment;
#ifndef __SANITIZE_ADDRESS__  // which can only watch over memory that it hands out itself
    if (const MemoryBlock kept = kept_blocks.take(bytes); kept.data != nullptr) return kept;
#endif
    return {::operator new(bytes, std::align_val_t{alignment}), bytes};
}

void release_memory(MemoryBlock block) noexcept {
#ifndef __SANITIZE_ADDRESS__
    if (kept_blocks.keep(block)) return;
#endif
    free_memory(block);
}

}  // namespace octavo::cpu
