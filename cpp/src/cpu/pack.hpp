// The packed order of the codes of a weight: what the product instructions of all processors want to read in a row.
//
//   packed[n / 16][k / 4][n % 16][k % 4]
//
// Sixteen output features by four neighbors along k fill a cache line: one operand of AVX-512 VNNI, two of AVX-VNNI,
// one row of an AMX tile, four of Neon. n is padded with zeros to a multiple of 16, k to one of 64 (an AMX tile).
#pragma once

#include <cstdint>
#include <optional>

#include "cpu/scratch.hpp"
#include "octavo/linear.hpp"
#include "octavo/pack.hpp"
#include "octavo/types.hpp"

namespace octavo::cpu {

inline constexpr std::int64_t block_cols = 16;  // output features of a block

// A number of output features, up to a whole number of blocks.
[[nodiscard]] constexpr std::int64_t whole_blocks(std::int64_t cols) noexcept {
    return (cols + block_cols - 1) / block_cols * block_cols;
}

// The order's own position of output feature `row` at `col`, in a weight of padded depth `depth`.
[[nodiscard]] constexpr std::int64_t packed_index(std::int64_t row, std::int64_t col, std::int64_t depth) noexcept {
    return row / 16 * 16 * depth + col / 4 * 64 + row % 16 * 4 + col % 4;
}

// Asks the system for pages of 2 MiB, for memory that codes are about to be written to. A product reads codes from end
// to end, and each change of the page makes it wait. Only whole large pages inside the memory are asked for, so it
// takes no more of it; where the system gives none, nothing changes.
void ask_for_large_pages(const void* memory, std::int64_t size) noexcept;

// `count` values of a vector of output features (or its only one as often) from `begin` on as float32, then zeros up to
// a whole number of blocks.
void gather_features(const ConstVector& values, std::int64_t begin, std::int64_t count, float* target);

// Output features [begin, end) of codes in packed order, as `product` reads them: the weight's own memory where it is
// packed (then begin is a multiple of 16), else packed here.
class PackedPanel {
public:
    PackedPanel(const ConstMatrix& codes, Layout layout, std::int64_t begin, std::int64_t end);

    [[nodiscard]] const std::int8_t* data() const noexcept { return data_; }
    // Bytes from one block of 16 output features to the next.
    [[nodiscard]] std::int64_t stride() const noexcept { return block_cols * depth_; }
    [[nodiscard]] std::int64_t depth() const noexcept { return depth_; }

    // The same output features from column `begin` on, a multiple of 64.
    [[nodiscard]] PackedPanel from(std::int64_t begin) const { return {data_ + begin * block_cols, depth_}; }

    // The code of output feature `row`, counted from the panel's first, at column `col`.
    [[nodiscard]] std::int8_t code(std::int64_t row, std::int64_t col) const noexcept {
        return data_[packed_index(row, col, depth_)];
    }

private:
    PackedPanel(const std::int8_t* data, std::int64_t depth) : depth_(depth), data_(data) {}

    std::int64_t depth_;
    std::optional<Scratch<std::int8_t>> memory_;
    const std::int8_t* data_;
};

}  // namespace octavo::cpu
