// Memory that ends at a page nobody may touch, so that reading or writing one byte past the end faults, in any build
// and in vector instructions that sanitizers cannot see into. For tests on a GPU it is pinned memory without such a
// page.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstring>
#include <new>

#include "device.hpp"

class GuardedMemory {
public:
    // `size` bytes, of which the last one lies `slack` bytes before the guard page. All bytes start as `filler`.
    explicit GuardedMemory(std::size_t size, std::size_t slack = 0)
        : pinned_(static_cast<std::byte*>(allocate_pinned(size + slack))), size_(size) {
        if (pinned_ != nullptr) {
            data_ = pinned_;
            std::memset(data_, filler, size);
            return;
        }
        const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
        const std::size_t usable = (size + slack + page - 1) / page * page;
        mapped_ = usable + page;
        base_ =
            static_cast<std::byte*>(mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        if (base_ == MAP_FAILED || mprotect(base_ + usable, page, PROT_NONE) != 0) throw std::bad_alloc();
        data_ = base_ + usable - slack - size;
        std::memset(data_, filler, size);
        announce(data_, size);
    }
    ~GuardedMemory() {
        if (pinned_ != nullptr) {
            free_pinned(pinned_);
        } else {
            withdraw(data_);
            munmap(base_, mapped_);
        }
    }
    GuardedMemory(const GuardedMemory&) = delete;
    GuardedMemory& operator=(const GuardedMemory&) = delete;

    [[nodiscard]] std::byte* data() const noexcept { return data_; }
    [[nodiscard]] std::size_t size() const noexcept { return size_; }

    static constexpr int filler = 0xA5;

private:
    std::byte* pinned_;  // null where the tests run on the CPU or the emulated GPU
    std::byte* base_ = nullptr;
    std::byte* data_ = nullptr;
    std::size_t size_;
    std::size_t mapped_ = 0;
};
