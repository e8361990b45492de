// The packed order of a weight's codes, which the CPU backend multiplies fastest.
#pragma once

#include <cstdint>

#include "octavo/types.hpp"

namespace [[gnu::visibility("default")]] octavo {

// Codes `[n, k]` in packed order:
//
//   packed[n / 16][k / 4][n % 16][k % 4]
//
// with n padded with zeros to a multiple of 16 and k to one of 64. It is the same on every processor, so packed codes
// may be kept in a file; a weight is packed once, and `linear` then reads it as it is (`WeightView::layout`).
[[nodiscard]] constexpr std::int64_t padded_depth(std::int64_t k) noexcept { return (k + 63) / 64 * 64; }

// Bytes of packed codes `[n, k]`: n rounded up to 16 times k rounded up to 64; -1 where n or k is negative or that is
// no number of 64 bits.
[[nodiscard]] constexpr std::int64_t packed_size(std::int64_t n, std::int64_t k) noexcept {
    constexpr std::int64_t most = std::int64_t{1} << 62;  // that can be rounded up
    if (n < 0 || k < 0 || n > most || k > most) return -1;
    const std::int64_t rows = (n + 15) / 16 * 16;
    const std::int64_t cols = padded_depth(k);
    return cols != 0 && rows > INT64_MAX / cols ? -1 : rows * cols;
}

// Bring codes into packed order.
//
//   codes   [n, k] i8, any strides, in CPU memory
//   packed  i8 [packed_size(n, k)], contiguous, on the device of `codes`, apart from it; aligned to 64 bytes it is read
//           fastest
//
// CPU: returns when done. Throws Error (type, value, device) naming the argument.
void pack(ConstMatrix codes, Vector packed, Stream stream = {});

// The codes again: `codes` [n, k] i8, any strides, apart from `packed`. Throws as `pack`.
void unpack(ConstVector packed, Matrix codes, Stream stream = {});

}  // namespace octavo
