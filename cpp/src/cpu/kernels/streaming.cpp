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

void mark_outliers(const float* x, std::int64_t size, float threshold, std::uint8_t* mask) {
    for (std::int64_t i = 0; i < size; ++i) {
        mask[i] = static_cast<std::uint8_t>(mask[i] | (__builtin_fabsf(x[i]) < threshold ? 0 : 1));
    }
}

void encode_absmax(const float* x, std::int64_t size, float absmax, std::int8_t* codes) {
    // |x| <= absmax, so |x * 127 / absmax| <= 127 * (1 + 2^-23) and rounds to at most 127: no clip needed.
    if (absmax <= 0x1.fffffep127F / 127.0F) {
        for (std::int64_t i = 0; i < size; ++i) codes[i] = to_code(x[i] * 127.0F / absmax);
    } else {
        for (std::int64_t i = 0; i < size; ++i) {
            const float product = x[i] * 127.0F;
            codes[i] = to_code(__builtin_isinf(product) ? x[i] / absmax * 127.0F : product / absmax);
        }
    }
}

void encode_zeropoint(const float* x, std::int64_t size, float nd, float zeropoint, std::int8_t* codes) {
    for (std::int64_t i = 0; i < size; ++i) {
        float code = round_half_even(nd * x[i]) - zeropoint;
        code = code > 127.0F ? 127.0F : code;
        code = code < -127.0F ? -127.0F : code;
        codes[i] = to_code(code);
    }
}

void scale_sums(const std::int32_t* acc, std::int64_t size, float a, const float* scale, float* y) {
    for (std::int64_t i = 0; i < size; ++i) y[i] = static_cast<float>(acc[i]) * (a * scale[i]);
}

void add_scaled(std::int64_t size, float a, const float* x, float* y) {
    for (std::int64_t i = 0; i < size; ++i) y[i] += a * x[i];
}

void add_products(std::int64_t size, std::int64_t count, const float* values, const std::int32_t* positions,
                  const float* rows, std::int64_t stride, float* y) {
    // Sixteen sums stay in registers over all products.
    using Floats [[gnu::vector_size(64)]] = float;
    constexpr std::int64_t width = 16;
    std::int64_t i = 0;
    for (; i + width <= size; i += width) {
        Floats sums;
        __builtin_memcpy(&sums, y + i, sizeof sums);
        for (std::int64_t o = 0; o < count; ++o) {
            Floats row;
            __builtin_memcpy(&row, rows + (positions != nullptr ? positions[o] : o) * stride + i, sizeof row);
            sums += values[o] * row;
        }
        __builtin_memcpy(y + i, &sums, sizeof sums);
    }
    for (; i < size; ++i) {
        for (std::int64_t o = 0; o < count; ++o)
            y[i] += values[o] * rows[(positions != nullptr ? positions[o] : o) * stride + i];
    }
}

float dot(const float* a, const float* b, std::int64_t size) {
    float sums[lanes] = {};
    std::int64_t i = 0;
    for (; i + lanes <= size; i += lanes) {
        for (std::int64_t lane = 0; lane < lanes; ++lane) sums[lane] += a[i + lane] * b[i + lane];
    }
    for (std::int64_t lane = 0; i < size; ++i, ++lane) sums[lane] += a[i] * b[i];
    for (std::int64_t width = lanes / 2; width > 0; width /= 2) {
        for (std::int64_t lane = 0; lane < width; ++lane) sums[lane] += sums[lane + width];
    }
    return sums[0];
}

std::int32_t sum(const std::int8_t* codes, std::int64_t size) {
    std::int32_t total = 0;
    for (std::int64_t i = 0; i < size; ++i) total += codes[i];
    return total;
}

}  // namespace octavo::cpu::OCTAVO_ISA
