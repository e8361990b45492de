// Kernels that read or write each element once: conversion, ranges, quantization to codes, outlier marks, updates.
//
// Plain loops that the compiler vectorizes for the instruction set this copy is built for. Reductions keep partial
// results in an array of lanes, because a compiler may not reorder float operations by itself.
#include "cpu/kernels/convert.hpp"
#include "cpu/kernels/functions.hpp"

namespace octavo::cpu::OCTAVO_ISA {
namespace {

constexpr std::int64_t lanes = 64;

template <class T>
T read(const void* base, std::int64_t index) {
    T value;
    __builtin_memcpy(&value, static_cast<const char*>(base) + index * std::int64_t{sizeof(T)}, sizeof(T));
    return value;
}

template <class T>
void write(void* base, std::int64_t index, T value) {
    __builtin_memcpy(static_cast<char*>(base) + index * std::int64_t{sizeof(T)}, &value, sizeof(T));
}

// The two loops are the same; the first has a stride the compiler knows.
template <class T, class Convert>
void load_as(const void* src, std::int64_t stride, std::int64_t size, float* dst, Convert convert) {
    if (stride == 1) {
        for (std::int64_t i = 0; i < size; ++i) dst[i] = convert(read<T>(src, i));
    } else {
        for (std::int64_t i = 0; i < size; ++i) dst[i] = convert(read<T>(src, i * stride));
    }
}

template <class T, class Convert>
void store_as(const float* src, std::int64_t size, void* dst, std::int64_t stride, Convert convert) {
    if (stride == 1) {
        for (std::int64_t i = 0; i < size; ++i) write<T>(dst, i, convert(src[i]));
    } else {
        for (std::int64_t i = 0; i < size; ++i) write<T>(dst, i * stride, convert(src[i]));
    }
}

// rint for any finite value: adding 2^23 leaves no bits for a fraction; from 2^23 on every float is an integer.
float round_half_even(float value) {
    const float magnitude = __builtin_fabsf(value);
    const float rounded = __builtin_copysignf((magnitude + 0x1p23F) - 0x1p23F, value);
    return magnitude < 0x1p23F ? rounded : value;
}

// rint(value) as int8 for |value| <= 127.5: after adding 1.5 * 2^23 the low byte of the float is the integer.
std::int8_t to_code(float value) { return static_cast<std::int8_t>(bits_of(value + 0x1.8p23F)); }

template <class Bits>
constexpr Bits magnitude_mask = sizeof(Bits) == 2 ? 0x7FFFU : 0x7FFFFFFFU;

// Integers may be reduced in any order, so that the compiler needs no lanes here. `below` masks instead of choosing:
// GCC makes branches of a choice between a value and 0, and then scalar code, for every instruction set.
template <class Bits>
Magnitudes magnitudes_as(const void* x, std::int64_t size, std::uint32_t limit_bits) {
    const auto limit = static_cast<Bits>(limit_bits);
    Bits largest = 0;
    Bits largest_below = 0;
    for (std::int64_t i = 0; i < size; ++i) {
        const auto magnitude = static_cast<Bits>(read<Bits>(x, i) & magnitude_mask<Bits>);
        const auto all_ones_if_below = static_cast<Bits>(-static_cast<int>(magnitude < limit));
        const auto below = static_cast<Bits>(magnitude & all_ones_if_below);
        largest = magnitude > largest ? magnitude : largest;
        largest_below = below > largest_below ? below : largest_below;
    }
    return {largest, largest_below};
}

template <class Bits>
void mark_as(const void* x, std::int64_t size, std::uint32_t limit, std::uint8_t* mask) {
    for (std::int64_t i = 0; i < size; ++i) {
        const auto magnitude = static_cast<Bits>(read<Bits>(x, i) & magnitude_mask<Bits>);
        mask[i] = static_cast<std::uint8_t>(mask[i] | (magnitude >= static_cast<Bits>(limit) ? 1 : 0));
    }
}

// |x| <= absmax, so |x * 127 / absmax| <= 127 * (1 + 2^-23) and rounds to at most 127: no clip needed.
template <class T, class Convert>
void encode_by_division(const void* x, std::int64_t size, float absmax, Convert convert, std::int8_t* codes) {
    if (absmax <= 0x1.fffffep127F / 127.0F) {
        for (std::int64_t i = 0; i < size; ++i) codes[i] = to_code(convert(read<T>(x, i)) * 127.0F / absmax);
    } else {
        for (std::int64_t i = 0; i < size; ++i) {
            const float value = convert(read<T>(x, i));
            const float product = value * 127.0F;
            codes[i] = to_code(__builtin_isinf(product) ? value / absmax * 127.0F : product / absmax);
        }
    }
}

// The same quotients without a division for each element, where there is fused multiply-add: a division takes as long
// as some twenty multiplications.
//
// a = x * 127 is exact, of at most 18 bits; b = absmax has at most 11. With y = 1 / b rounded, q = a * y is within 1.5
// places of a / b, so a - q * b has few enough bits to be exact, and q + (a - q * b) * y = a / b * (1 + e) with |e|
// below 2^-46. That is then rounded once, as a / b is by a division. The two could differ only if a number half way
// between two floats, of 25 bits, lay between them; but a / b, a fraction of 18 by 11 bits, is never such a number, and
// at least 2^-36 of itself away from any.
template <class Convert>
void encode_16_bit(const void* x, std::int64_t size, float absmax, Convert convert, std::int8_t* codes) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    if (absmax >= 0x1p-100F && absmax <= 0x1p100F) {  // no step overflows, nor loses bits of what is not 0 anyway
        const float inverse = 1.0F / absmax;
        for (std::int64_t i = 0; i < size; ++i) {
            const float a = convert(read<std::uint16_t>(x, i)) * 127.0F;
            const float quotient = a * inverse;
            const float remainder = __builtin_fmaf(-quotient, absmax, a);
            codes[i] = to_code(__builtin_fmaf(remainder, inverse, quotient));
        }
        return;
    }
#endif
    encode_by_division<std::uint16_t>(x, size, absmax, convert, codes);
}

}  // namespace

void load(DType dtype, const void* src, std::int64_t stride, std::int64_t size, float* dst) {
    switch (dtype) {
        case DType::f32: return load_as<float>(src, stride, size, dst, [](float v) { return v; });
        case DType::f16: return load_as<std::uint16_t>(src, stride, size, dst, from_f16);
        case DType::bf16: return load_as<std::uint16_t>(src, stride, size, dst, from_bf16);
        case DType::i8:
        case DType::i32: break;  // refused by cpp/src before any kernel runs
    }
    __builtin_trap();
}

void store(const float* src, std::int64_t size, DType dtype, void* dst, std::int64_t stride) {
    switch (dtype) {
        case DType::f32: return store_as<float>(src, size, dst, stride, [](float v) { return v; });
        case DType::f16: return store_as<std::uint16_t>(src, size, dst, stride, to_f16);
        case DType::bf16: return store_as<std::uint16_t>(src, size, dst, stride, to_bf16);
        case DType::i8:
        case DType::i32: break;
    }
    __builtin_trap();
}

Range range(const float* x, std::int64_t size) {
    float low[lanes];
    float high[lanes];
    // Bits of the magnitude order like the magnitude, with Inf and NaN on top.
    std::uint32_t magnitude[lanes];
    for (std::int64_t lane = 0; lane < lanes; ++lane) {
        low[lane] = high[lane] = x[0];
        magnitude[lane] = 0;
    }
    const auto take = [&](std::int64_t lane, float value) {
        low[lane] = value < low[lane] ? value : low[lane];
        high[lane] = value > high[lane] ? value : high[lane];
        const std::uint32_t bits = bits_of(value) & 0x7FFFFFFFU;
        magnitude[lane] = bits > magnitude[lane] ? bits : magnitude[lane];
    };
    std::int64_t i = 0;
    for (; i + lanes <= size; i += lanes) {
        for (std::int64_t lane = 0; lane < lanes; ++lane) take(lane, x[i + lane]);
    }
    for (; i < size; ++i) take(0, x[i]);
    for (std::int64_t lane = 1; lane < lanes; ++lane) {
        low[0] = low[lane] < low[0] ? low[lane] : low[0];
        high[0] = high[lane] > high[0] ? high[lane] : high[0];
        magnitude[0] = magnitude[lane] > magnitude[0] ? magnitude[lane] : magnitude[0];
    }
    return {low[0], high[0], magnitude[0] < 0x7F800000U};
}

Magnitudes magnitudes(DType dtype, const void* x, std::int64_t size, std::uint32_t limit) {
    if (dtype == DType::f32) return magnitudes_as<std::uint32_t>(x, size, limit);
    return magnitudes_as<std::uint16_t>(x, size, limit);
}

void mark_outliers(DType dtype, const void* x, std::int64_t size, std::uint32_t limit, std::uint8_t* mask) {
    if (dtype == DType::f32) return mark_as<std::uint32_t>(x, size, limit, mask);
    return mark_as<std::uint16_t>(x, size, limit, mask);
}

void encode_absmax(DType dtype, const void* x, std::int64_t size, float absmax, std::int8_t* codes) {
    switch (dtype) {
        case DType::f32: return encode_by_division<float>(x, size, absmax, [](float v) { return v; }, codes);
        case DType::f16: return encode_16_bit(x, size, absmax, from_f16, codes);
        case DType::bf16: return encode_16_bit(x, size, absmax, from_bf16, codes);
        case DType::i8:
        case DType::i32: break;
    }
    __builtin_trap();
}

void encode_zeropoint(const float* x, std::int64_t size, float nd, float zeropoint, std::int8_t* codes) {
    for (std::int64_t i = 0; i < size; ++i) {
        float code = round_half_even(nd * x[i]) - zeropoint;
        code = code > 127.0F ? 127.0F : code;
        code = code < -127.0F ? -127.0F : code;
        codes[i] = to_code(code);
    }
}

std::int32_t sum(const std::int8_t* codes, std::int64_t size) {
    std::int32_t total = 0;
    for (std::int64_t i = 0; i < size; ++i) total += codes[i];
    return total;
}

}  // namespace octavo::cpu::OCTAVO_ISA
