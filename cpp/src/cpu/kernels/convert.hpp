// float16 and bfloat16 to and from float32, branch-free so that compilers vectorize loops over them.
#pragma once

#include <cstdint>

namespace octavo::cpu::OCTAVO_ISA {

static inline std::uint32_t bits_of(float value) { return __builtin_bit_cast(std::uint32_t, value); }
static inline float float_of(std::uint32_t bits) { return __builtin_bit_cast(float, bits); }

static inline float from_bf16(std::uint16_t value) { return float_of(std::uint32_t{value} << 16U); }

// Exponent and mantissa are shifted into place and the exponent's bias is mended by a multiplication, which also
// normalizes subnormals. Inf and NaN come out of that as numbers >= 2^16; they get the exponent they had.
static inline float from_f16(std::uint16_t value) {
    const std::uint32_t magnitude = (std::uint32_t{value} & 0x7FFFU) << 13U;
    const std::uint32_t sign = (std::uint32_t{value} & 0x8000U) << 16U;
    const std::uint32_t scaled = bits_of(float_of(magnitude) * 0x1p112F);
    const std::uint32_t exponent_255 = scaled >= 0x47800000U ? 0x7F800000U : 0U;
    return float_of(scaled | exponent_255 | sign);
}

// Round half to even by adding just under half of the last kept bit; NaN stays NaN, made quiet.
static inline std::uint16_t to_bf16(float value) {
    const std::uint32_t bits = bits_of(value);
    const std::uint32_t rounded = (bits + 0x7FFFU + ((bits >> 16U) & 1U)) >> 16U;
    const std::uint32_t quiet = (bits >> 16U) | 0x40U;
    return static_cast<std::uint16_t>((bits & 0x7FFFFFFFU) > 0x7F800000U ? quiet : rounded);
}

// Normal results round as in to_bf16. Subnormal ones let an addition round them: 0.5 has its last bit where a
// subnormal float16 has its own. From 65520 on (half way to 2^16) the result is Inf.
static inline std::uint16_t to_f16(float value) {
    const std::uint32_t bits = bits_of(value);
    const std::uint32_t magnitude = bits & 0x7FFFFFFFU;
    const std::uint32_t normal = (magnitude - 0x38000000U + 0xFFFU + ((magnitude >> 13U) & 1U)) >> 13U;
    const std::uint32_t subnormal = bits_of(float_of(magnitude) + 0.5F) - 0x3F000000U;
    std::uint32_t result = magnitude < 0x38800000U ? subnormal : normal;
    result = magnitude >= 0x477FF000U ? 0x7C00U : result;
    result = magnitude > 0x7F800000U ? 0x7E00U : result;
    return static_cast<std::uint16_t>(result | ((bits >> 16U) & 0x8000U));
}

}  // namespace octavo::cpu::OCTAVO_ISA
