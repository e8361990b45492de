// Quantization of rows with elements left out, shared by `quantize`, `quantize_weight` and `linear`.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <span>

#include "octavo/options.hpp"
#include "octavo/types.hpp"

namespace octavo::cpu {

// What is particular to each row.
struct RowTraits {
    // The columns of a row that take no part in its quantization, ascending and unique; valid until the next row is
    // asked for. Each piece of work has such a function of its own and asks for its rows from row `begin` on, each
    // once.
    using Excluded = std::function<std::span<const std::int32_t>(std::int64_t row)>;
    std::function<Excluded(std::int64_t begin)> excluded;
    // Given the codes of each row, with zeros up to padded_depth(k) where the matrix of codes has no data; may be
    // empty.
    std::function<void(std::int64_t row, const std::int8_t* codes)> done = nullptr;
    // Where they have none: as many rows at a time, padded_depth(k) apart, the first one's number a multiple of it.
    std::int64_t together = 1;
    // Of stochastic rounding (octavo/stochastic.hpp), where rows are neither rotated nor have a zeropoint.
    std::optional<std::uint64_t> seed = std::nullopt;
};

// octavo::quantize with the excluded columns chosen row by row. `codes` without data are kept by nobody but
// RowTraits::done. `code_sums` (i32 [m], or absent) receives the sum of each row's codes.
void quantize_rows(ConstMatrix x, const QuantizeOptions& options, const RowTraits& traits, Matrix codes, Vector scale,
                   Vector zeropoint, Vector code_sums);

}  // namespace octavo::cpu
