// What turns a row of the int8 product into a row of the output (paper Eq. 8), and the outlier weights that it needs.
//
// Compiled with floating-point contraction, unlike everything else: where the instruction set has fused multiply-add,
// products and sums here are rounded once. No code or integer depends on them.
#include "cpu/kernels/functions.hpp"
#include "cpu/kernels/unroll.hpp"

namespace octavo::cpu::OCTAVO_ISA {
namespace {

// Vectors as wide as a register: GCC keeps wider ones in memory and, on Arm, converts them one number at a time.
#if defined(__AVX512F__)
constexpr int register_size = 64;
#elif defined(__AVX2__)
constexpr int register_size = 32;
#else
constexpr int register_size = 16;
#endif
using Floats [[gnu::vector_size(register_size)]] = float;
using Ints [[gnu::vector_size(register_size)]] = std::int32_t;
using Bits [[gnu::vector_size(register_size)]] = std::uint32_t;
using Halves [[gnu::vector_size(register_size / 2)]] = std::uint16_t;
constexpr std::int64_t width = register_size / 4;

// By reference, here and below: how such a vector is passed depends on the instruction set.
template <class Vector, class T>
void read(const T* p, Vector& vector) {
    __builtin_memcpy(&vector, p, sizeof vector);
}

// A vector of sums as `Type`, as in convert.hpp.
template <DType Type>
[[gnu::always_inline]] inline void write(const Floats& sum, char* y) {
    if constexpr (Type == DType::f32) {
        __builtin_memcpy(y, &sum, sizeof sum);
        return;
    }
    Bits bits;
    __builtin_memcpy(&bits, &sum, sizeof bits);
    const Bits magnitude = bits & 0x7FFFFFFFU;
    Bits result;
    if constexpr (Type == DType::bf16) {
        const Bits rounded = (bits + 0x7FFFU + ((bits >> 16U) & 1U)) >> 16U;
        const Bits quiet = (bits >> 16U) | 0x40U;
        result = magnitude > 0x7F800000U ? quiet : rounded;
    } else {
        const Bits normal = (magnitude - 0x38000000U + 0xFFFU + ((magnitude >> 13U) & 1U)) >> 13U;
        Floats shifted;
        __builtin_memcpy(&shifted, &magnitude, sizeof shifted);
        shifted += 0.5F;
        Bits subnormal;
        __builtin_memcpy(&subnormal, &shifted, sizeof subnormal);
        subnormal -= 0x3F000000U;
        result = magnitude < 0x38800000U ? subnormal : normal;
        result = magnitude >= 0x477FF000U ? Bits{} + 0x7C00U : result;
        result = magnitude > 0x7F800000U ? Bits{} + 0x7E00U : result;
        result |= (bits >> 16U) & 0x8000U;
    }
    const Halves halves = __builtin_convertvector(result, Halves);
    __builtin_memcpy(y, &halves, sizeof halves);
}

// `Vectors` vectors of sums, from column j on.
template <DType Type, int Vectors>
[[gnu::always_inline]] inline void finish_columns(const EpilogueRow& row, std::int64_t j, char* y) {
    Floats sums[Vectors];
    if (row.scaled == nullptr) {
        unroll<Vectors>([&](auto v) OCTAVO_INLINE {
            Ints acc;
            Floats scale;
            read(row.acc + j + v * width, acc);
            read(row.scale_w + j + v * width, scale);
            sums[v] = __builtin_convertvector(acc, Floats) * (row.scale_x * scale);
        });
    } else {
        unroll<Vectors>([&](auto v) OCTAVO_INLINE { read(row.scaled + j + v * width, sums[v]); });
    }
    for (std::int64_t o = 0; o < row.outliers; ++o) {
        const std::int64_t place = row.outlier_places != nullptr ? row.outlier_places[o] : o;
        const float* const weights = row.outlier_w + place * tile_cols + j;
        const float x = row.outlier_x[o];
        unroll<Vectors>([&](auto v) OCTAVO_INLINE {
            Floats weight;
            read(weights + v * width, weight);
            sums[v] += x * weight;
        });
    }
    if (row.bias != nullptr) {
        unroll<Vectors>([&](auto v) OCTAVO_INLINE {
            Floats bias;
            read(row.bias + j + v * width, bias);
            sums[v] += bias;
        });
    }
    unroll<Vectors>([&](auto v) OCTAVO_INLINE { write<Type>(sums[v], y + v * width * size_of(Type)); });
}

template <DType Type>
void finish_row(const EpilogueRow& row, std::int64_t cols, char* y) {
    constexpr int vectors = 4;
    std::int64_t j = 0;
    for (; j + vectors * width <= cols; j += vectors * width) {
        finish_columns<Type, vectors>(row, j, y + j * size_of(Type));
    }
    for (; j + width <= cols; j += width) finish_columns<Type, 1>(row, j, y + j * size_of(Type));
    if (j == cols) return;
    char last[64];
    finish_columns<Type, 1>(row, j, last);
    __builtin_memcpy(y + j * size_of(Type), last, static_cast<unsigned long>((cols - j) * size_of(Type)));
}

}  // namespace

void dequantize_column(const std::int8_t* w, std::int64_t w_stride, std::int64_t col, std::int64_t cols,
                       const float* zeropoint, const float* scale, float* target) {
    // A cache line holds the 4 codes of each of 16 output features: shift the wanted byte to the top, and down again
    // with its sign.
    const std::int8_t* line = w + col / 4 * 64;
    const int left = static_cast<int>(24 - col % 4 * 8);
    for (std::int64_t first = 0; first < cols; first += 16, line += w_stride) {
        unroll<16 / width>([&](auto v) OCTAVO_INLINE {
            const std::int64_t j = first + v * width;
            Ints codes;
            Floats zeropoints;
            Floats scales;
            read(line + v * register_size, codes);
            read(zeropoint + j, zeropoints);
            read(scale + j, scales);
            codes = (codes << left) >> 24;
            const Floats weight = (__builtin_convertvector(codes, Floats) + zeropoints) * scales;
            __builtin_memcpy(target + j, &weight, sizeof weight);
        });
    }
}

void epilogue(const EpilogueRow& row, std::int64_t cols, DType dtype, void* y) {
    switch (dtype) {
        case DType::f32: return finish_row<DType::f32>(row, cols, static_cast<char*>(y));
        case DType::f16: return finish_row<DType::f16>(row, cols, static_cast<char*>(y));
        case DType::bf16: return finish_row<DType::bf16>(row, cols, static_cast<char*>(y));
        case DType::i8:
        case DType::i32: break;  // refused by cpp/src before any kernel runs
    }
    __builtin_trap();
}

}  // namespace octavo::cpu::OCTAVO_ISA
