// LLM.int8() from C++: quantize the weight of a small linear layer, keep the weights of a known outlier column, run the
// layer, and compare with float.
//
// The layer is y = x w^T + bias with x [tokens, in] and w [out, in].
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "octavo/octavo.hpp"

namespace {

constexpr std::int64_t tokens = 4;
constexpr std::int64_t in = 96;
constexpr std::int64_t out = 48;
constexpr std::int32_t outlier = 17;  // the column of x with large values

using octavo::DType;

// A row-major matrix that owns its memory.
template <class T, DType Type>
struct Matrix {
    Matrix(std::int64_t row_count, std::int64_t col_count)
        : rows(row_count), cols(col_count), values(static_cast<std::size_t>(rows * cols)) {}
    T& operator()(std::int64_t i, std::int64_t j) { return values[static_cast<std::size_t>(i * cols + j)]; }
    octavo::Matrix view() { return {values.data(), Type, {}, rows, cols, cols, 1}; }
    octavo::Vector vector() { return {values.data(), Type, {}, rows * cols, 1, true}; }

    std::int64_t rows;
    std::int64_t cols;
    std::vector<T> values;
};

int run() {
    Matrix<float, DType::f32> x(tokens, in);
    Matrix<float, DType::f32> w(out, in);
    Matrix<float, DType::f32> bias(1, out);
    for (std::int64_t i = 0; i < tokens; ++i) {
        for (std::int64_t k = 0; k < in; ++k) {
            x(i, k) = std::sin(1.7F * static_cast<float>(i * in + k)) * (k == outlier ? 60.0F : 1.0F);
        }
    }
    for (std::int64_t j = 0; j < out; ++j) {
        for (std::int64_t k = 0; k < in; ++k) w(j, k) = 0.05F * std::cos(0.9F * static_cast<float>(j * in + k));
        bias(0, j) = static_cast<float>(j);
    }

    Matrix<std::int8_t, DType::i8> codes(out, in);
    Matrix<float, DType::f32> scale(1, out);
    Matrix<std::int32_t, DType::i32> code_sums(1, out);
    octavo::quantize_weight(w.view(), octavo::Scheme::absmax, octavo::Granularity::vector, codes.view(), scale.vector(),
                            octavo::absent_vector, code_sums.vector());

    // The column of w that meets the outliers, as it was.
    Matrix<std::int32_t, DType::i32> outlier_columns(1, 1);
    Matrix<float, DType::f32> outlier_weight(out, 1);
    outlier_columns(0, 0) = outlier;
    for (std::int64_t j = 0; j < out; ++j) outlier_weight(j, 0) = w(j, outlier);

    const octavo::WeightView weight{.codes = codes.view(),
                                    .scale = scale.vector(),
                                    .code_sums = code_sums.vector(),
                                    .outlier_columns = outlier_columns.vector(),
                                    .outlier_weight = outlier_weight.view()};
    Matrix<float, DType::f32> y(tokens, out);
    octavo::linear(x.view(), weight, bias.vector(), y.view());

    // Rounding to codes changes a value by at most half of its scale. For |ex| <= sx / 2 and |ew| <= sw / 2 a term
    // (x + ex) (w + ew) is off by at most sx / 2 |w| + sw / 2 |x| + sx sw / 4. The outlier column is off by nothing.
    double largest = 0;
    double nearest = 0;  // an error as a fraction of its bound
    for (std::int64_t i = 0; i < tokens; ++i) {
        double absmax = 0;
        for (std::int64_t k = 0; k < in; ++k) {
            if (k != outlier) absmax = std::max(absmax, std::fabs(double{x(i, k)}));
        }
        const double scale_x = absmax / 127;
        for (std::int64_t j = 0; j < out; ++j) {
            double exact = bias(0, j);
            double bound = 1e-5 * std::fabs(exact);  // and the rounding of float itself
            for (std::int64_t k = 0; k < in; ++k) {
                const double xk = x(i, k);
                const double wk = w(j, k);
                exact += xk * wk;
                bound += 1e-5 * std::fabs(xk * wk);
                if (k == outlier) continue;
                bound += scale_x / 2 * std::fabs(wk) + scale(0, j) / 2 * std::fabs(xk) + scale_x * scale(0, j) / 4;
            }
            const double error = std::fabs(y(i, j) - exact);
            largest = std::max(largest, error);
            nearest = std::max(nearest, error / bound);
        }
    }
    std::printf("octavo %s (%s): largest error %.3g, at most %.0f %% of its bound\n", octavo::version(),
                octavo::cpu_isa(), largest, 100 * nearest);
    return nearest <= 1 ? EXIT_SUCCESS : EXIT_FAILURE;
}

}  // namespace

int main() {
    try {
        return run();
    } catch (const octavo::Error& error) {
        std::fprintf(stderr, "%s\n", error.what());
        return EXIT_FAILURE;
    }
}
