// The operations as cpp/include/octavo defines them, naively and in double precision: what the library is compared
// with.
//
// Codes, scales and zeropoints are defined in float32 with one rounding per operation. Each operation is done here in
// double and rounded to float32 (for +, -, *, / that gives what float32 gives). Products are exact in double.
#pragma once

#include <cstdint>
#include <vector>

#include "arrays.hpp"
#include "octavo/linear.hpp"

namespace reference {

using Mask = std::vector<char>;  // [rows * cols], row-major: 1 or 0, not bits, which instrumented code reads slowly
using octavo::DType;
using octavo::Scheme;

struct Quantized {
    Values codes;
    std::vector<double> scale;
    std::vector<double> zeropoint;  // empty for absmax
};

// One group per row, or one for all. Elements in `excluded` (which may be empty: none) take no part and have code 0.
Quantized quantize(const Values& x, Scheme scheme, bool per_row, const Mask& excluded = {});

// Eq. 1 in double, with nothing rounded but the code.
double ideal_absmax_code(double x, double absmax);

std::vector<std::int32_t> find_outliers(const Values& x, double threshold);

Values int8_matmul(const Values& a, const Values& b);

struct Weight {
    Values codes;
    std::vector<double> scale;
    std::vector<double> zeropoint;  // empty for absmax
    std::vector<std::int32_t> outlier_columns;
    Values outlier_weight;
};

// A product and how far a float32 epilogue, rounded to the output's dtype, may be from it.
struct Output {
    Values y;
    Values bound;
};

// `x_per_tensor`: granularity `tensor`. `bias` may be empty.
Output linear(const Values& x, const Weight& weight, const std::vector<double>& bias, Scheme scheme, bool x_per_tensor,
              const octavo::LinearOptions& options, DType out_dtype);

}  // namespace reference
