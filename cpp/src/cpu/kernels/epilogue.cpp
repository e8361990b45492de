// What turns a row of the int8 product into a row of the output (paper Eq. 8).
//
// Compiled with floating-point contraction, unlike everything else: where the instruction set has fused multiply-add,
// products and sums here are rounded once. No code or integer depends on them.
#include "cpu/kernels/functions.hpp"

namespace octavo::cpu::OCTAVO_ISA {
namespace {

using Floats [[gnu::vector_size(64)]] = float;
using Ints [[gnu::vector_size(64)]] = std::int32_t;
constexpr std::int64_t width = 16;

// By reference: how such a vector is returned depends on the instruction set.
template <class Vector, class T>
void read(const T* p, Vector& vector) {
    __builtin_memcpy(&vector, p, sizeof vector);
}

}  // namespace

void epilogue(const EpilogueRow& row, std::int64_t cols, DType dtype, void* y) {
    float sums[tile_cols];
    for (std::int64_t j = 0; j < cols; j += width) {
        Floats sum;
        if (row.scaled == nullptr) {
            Ints acc;
            Floats scale;
            read(row.acc + j, acc);
            read(row.scale_w + j, scale);
            sum = __builtin_convertvector(acc, Floats) * (row.scale_x * scale);
        } else {
            read(row.scaled + j, sum);
        }
        for (std::int64_t o = 0; o < row.outliers; ++o) {
            const std::int64_t place = row.outlier_places != nullptr ? row.outlier_places[o] : o;
            Floats weight;
            read(row.outlier_w + place * tile_cols + j, weight);
            sum += row.outlier_x[o] * weight;
        }
        if (row.bias != nullptr) {
            Floats bias;
            read(row.bias + j, bias);
            sum += bias;
        }
        __builtin_memcpy(sums + j, &sum, sizeof sum);
    }
    store(sums, cols, dtype, y, 1);
}

}  // namespace octavo::cpu::OCTAVO_ISA
