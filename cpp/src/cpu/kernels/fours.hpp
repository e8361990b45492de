// Fours of codes along k: the unit of the packed order.
#pragma once

#include <cstdint>

#include "cpu/kernels/unroll.hpp"

namespace octavo::cpu::OCTAVO_ISA {

using Quad [[gnu::vector_size(16)]] = std::uint32_t;

// Four of four: columns[i] = source[0, i], source[1, i], ..., of rows that are so many bytes apart.
[[gnu::always_inline]] inline void transpose_fours(const std::int8_t* source, std::int64_t source_stride,
                                                   Quad (&columns)[4]) {
    Quad row[4];
    unroll<4>([&](auto j) OCTAVO_INLINE { __builtin_memcpy(&row[j], source + j * source_stride, 16); });
    const Quad low_a = __builtin_shufflevector(row[0], row[1], 0, 4, 1, 5);
    const Quad low_b = __builtin_shufflevector(row[2], row[3], 0, 4, 1, 5);
    const Quad high_a = __builtin_shufflevector(row[0], row[1], 2, 6, 3, 7);
    const Quad high_b = __builtin_shufflevector(row[2], row[3], 2, 6, 3, 7);
    columns[0] = __builtin_shufflevector(low_a, low_b, 0, 1, 4, 5);
    columns[1] = __builtin_shufflevector(low_a, low_b, 2, 3, 6, 7);
    columns[2] = __builtin_shufflevector(high_a, high_b, 0, 1, 4, 5);
    columns[3] = __builtin_shufflevector(high_a, high_b, 2, 3, 6, 7);
}

// The same into rows that are so many bytes apart.
[[gnu::always_inline]] inline void transpose_fours(const std::int8_t* source, std::int64_t source_stride,
                                                   std::int8_t* target, std::int64_t target_stride) {
    Quad columns[4];
    transpose_fours(source, source_stride, columns);
    unroll<4>([&](auto i) OCTAVO_INLINE { __builtin_memcpy(target + i * target_stride, &columns[i], 16); });
}

}  // namespace octavo::cpu::OCTAVO_ISA
