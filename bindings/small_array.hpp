// A short sequence of plain values, such as the extents of an array.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <type_traits>

namespace octavo::python {

// Needs no heap memory up to the ranks that occur in practice: a call that is to cost a few hundred nanoseconds has
// none to spare for it. Elements are uninitialized.
template <class T>
class SmallArray {
    static_assert(std::is_trivially_copyable_v<T>);

public:
    // NOLINTNEXTLINE(cppcoreguidelines-pro-type-member-init): as documented
    explicit SmallArray(std::size_t size = 0) { reset(size); }
    SmallArray(std::initializer_list<T> values) : SmallArray(values.size()) { std::ranges::copy(values, begin()); }
    SmallArray(const SmallArray& other) : SmallArray(other.size_) { std::copy(other.begin(), other.end(), begin()); }
    SmallArray(SmallArray&&) noexcept = default;
    SmallArray& operator=(const SmallArray&) = delete;
    SmallArray& operator=(SmallArray&&) noexcept = default;
    ~SmallArray() = default;

    [[nodiscard]] std::size_t size() const noexcept { return size_; }
    [[nodiscard]] T* begin() noexcept { return heap_ ? heap_.get() : inline_.data(); }
    [[nodiscard]] T* end() noexcept { return begin() + size_; }
    [[nodiscard]] const T* begin() const noexcept { return heap_ ? heap_.get() : inline_.data(); }
    [[nodiscard]] const T* end() const noexcept { return begin() + size_; }
    T& operator[](std::size_t index) noexcept { return begin()[index]; }
    const T& operator[](std::size_t index) const noexcept { return begin()[index]; }
    [[nodiscard]] T& back() noexcept { return begin()[size_ - 1]; }
    [[nodiscard]] const T& back() const noexcept { return begin()[size_ - 1]; }
    void pop_back() noexcept { --size_; }

    // Another size; the elements are uninitialized again.
    void reset(std::size_t size) {
        if (size > inline_size) heap_ = std::make_unique<T[]>(size);  // NOLINT(modernize-avoid-c-arrays)
        size_ = size;
    }

    // The elements of another.
    void assign(const SmallArray& other) {
        reset(other.size_);
        std::copy(other.begin(), other.end(), begin());
    }

    friend bool operator==(const SmallArray& a, const SmallArray& b) noexcept {
        return std::equal(a.begin(), a.end(), b.begin(), b.end());
    }

private:
    static constexpr std::size_t inline_size = 6;
    std::size_t size_ = 0;
    std::array<T, inline_size> inline_;
    std::unique_ptr<T[]> heap_;  // NOLINT(modernize-avoid-c-arrays)
};

}  // namespace octavo::python
