// LLM.int8() on the CPU (paper Figure 2): find the outliers, quantize the rest of X row by row, multiply, and finish
// each row of a tile of the product while it is in the cache.
#include <algorithm>
#include <span>

#include "cpu/gemm.hpp"
#include "cpu/operations.hpp"
#include "cpu/outlier.hpp"
#include "cpu/quantize.hpp"
#include "cpu/rows.hpp"
#include "cpu/threads.hpp"

namespace octavo::cpu {
namespace {

// Scales and zeropoints are one for all, or one each.
float of_group(const ConstVector& values, std::int64_t index, float absent) {
    if (!values.present) return absent;
    return get<float>(values, values.size == 1 ? 0 : index);
}

// X as codes, in memory of its own.
struct QuantizedX {
    QuantizedX(const ConstMatrix& x, const WeightView& weight, const OutlierElements& outliers)
        : memory(x.rows * x.cols), scales(x.rows), zeropoints(x.rows), sums(x.rows) {
        const auto groups = weight.granularity == Granularity::tensor ? Granularity::tensor : Granularity::row;
        const std::int64_t count = groups == Granularity::tensor ? 1 : x.rows;
        const bool has_zeropoint = weight.scheme == Scheme::zeropoint;
        scale = {.data = scales.data(), .size = count};
        zeropoint = {.data = zeropoints.data(), .size = count, .present = has_zeropoint};
        codes = {memory.data(), DType::i8, {}, x.rows, x.cols, x.cols, 1};
        quantize_rows(x, weight.scheme, groups, [&](std::int64_t row) { return outliers.columns_of(row); }, codes,
                      scale, zeropoint,
                      {.data = sums.data(), .dtype = DType::i32, .size = x.rows, .present = has_zeropoint});
    }

    Scratch<std::int8_t> memory;
    Scratch<float> scales;
    Scratch<float> zeropoints;
    Scratch<std::int32_t> sums;  // of each row's codes; only for zeropoint
    Matrix codes;
    Vector scale;
    Vector zeropoint;
};

// What the epilogue needs of the weight for the columns of one panel, gathered so that its loops are contiguous.
class PanelWeight {
public:
    // NOLINTNEXTLINE(cppcoreguidelines-pro-type-member-init): only the panel's columns of the arrays are used
    PanelWeight(const WeightView& weight, const ConstVector& bias, const Panel& panel) : cols_(panel.cols()) {
        for (std::int64_t j = 0; j < cols_; ++j) {
            scale[j] = of_group(weight.scale, panel.col_begin + j, 0.0F);
            zeropoint[j] = of_group(weight.zeropoint, panel.col_begin + j, 0.0F);
            code_sums[j] = get<std::int32_t>(weight.code_sums, panel.col_begin + j);
            bias_[j] = 0.0F;
            if (bias.present) kernels().load(bias.dtype, at(bias, panel.col_begin + j), 1, 1, bias_ + j);
        }
    }

    // The weights of the outlier columns. Each element lies in a cache line of its own, so this is done after the
    // first product of the panel, which has brought them all near.
    void gather_outliers(const WeightView& weight, std::span<const std::int32_t> columns, const Panel& panel) {
        if (gathered_) return;
        gathered_ = true;
        const auto count = static_cast<std::int64_t>(columns.size());
        outlier_weight_ = Scratch<float>(count * tile_cols);
        outlier_codes_ = Scratch<std::int8_t>(count * tile_cols);
        const ConstVector& list = weight.outlier_columns;
        std::int64_t kept = 0;  // both lists ascend
        for (std::int64_t o = 0; o < count; ++o) {
            const std::int32_t column = columns[static_cast<std::size_t>(o)];
            while (kept < list.size && get<std::int32_t>(list, kept) < column) ++kept;
            const bool is_kept = kept < list.size && get<std::int32_t>(list, kept) == column;
            for (std::int64_t j = 0; j < cols_; ++j) {
                const std::int64_t row = panel.col_begin + j;
                const std::int8_t code = code_at(weight.codes, row, column);
                float& target = outlier_weight_[o * tile_cols + j];
                outlier_codes_[o * tile_cols + j] = code;
                if (is_kept) {
                    load_row(weight.outlier_weight, row, kept, 1, &target);
                } else {
                    target = (static_cast<float>(code) + zeropoint[j]) * scale[j];
                }
            }
        }
    }

    // y[j] += sum_{o in O} x[row, o] * w[j, o]
    void add_outliers(const OutlierElements& outliers, std::int64_t row, float* y) const {
        const auto elements = outliers.row(row);
        if (elements.values.empty()) return;
        kernels().add_products(cols_, static_cast<std::int64_t>(elements.values.size()), elements.values.data(),
                               elements.positions, outlier_weight_.data(), tile_cols, y);
    }

    // sums[j] = sum_k of the codes of w[j] over the columns that are not outliers of the row
    void sum_codes_outside(const OutlierElements& outliers, std::int64_t row, std::int32_t* sums) const {
        std::copy(code_sums, code_sums + cols_, sums);
        const auto elements = outliers.row(row);
        for (std::size_t o = 0; o < elements.values.size(); ++o) {
            const auto position = elements.positions != nullptr ? elements.positions[o] : static_cast<std::int64_t>(o);
            for (std::int64_t j = 0; j < cols_; ++j) sums[j] -= outlier_codes_[position * tile_cols + j];
        }
    }

    void add_bias(float* y) const { kernels().add_scaled(cols_, 1.0F, bias_, y); }

    float scale[tile_cols];
    float zeropoint[tile_cols];
    std::int32_t code_sums[tile_cols];

private:
    std::int64_t cols_;
    bool gathered_ = false;
    Scratch<float> outlier_weight_{0};       // [|O|, tile_cols]
    Scratch<std::int8_t> outlier_codes_{0};  // [|O|, tile_cols]
    float bias_[tile_cols];
};

void scale_sums(const std::int32_t* acc, std::int64_t size, float scale_x, const float* scale_w, float* y) {
    kernels().scale_sums(acc, size, scale_x, scale_w, y);
}

void scale_sums(const std::int64_t* acc, std::int64_t size, float scale_x, const float* scale_w, float* y) {
    for (std::int64_t j = 0; j < size; ++j) y[j] = static_cast<float>(acc[j]) * (scale_x * scale_w[j]);
}

// The zeropoint product (Eq. 4-5) of row i, over the columns that are not its outliers:
//   y[j] = (acc + zw * sum_k qx + zx * sum_k qw + k * zx * zw) * scale_x * scale_w
// The terms are large and cancel, so they are added as float64, where they are exact unless zeropoints are beyond 2^20.
template <class Sum>
void unroll_zeropoint(const Sum* acc, const QuantizedX& x, const OutlierElements& outliers, std::int64_t row,
                      const PanelWeight& weight, const Panel& panel, float* y) {
    const double zx = of_group(x.zeropoint, row, 0.0F);
    const double scale_x = of_group(x.scale, row, 0.0F);
    const double sum_x = x.sums[row];
    const auto depth = static_cast<double>(x.codes.cols - static_cast<std::int64_t>(outliers.columns_of(row).size()));
    std::int32_t sums_w[tile_cols];
    weight.sum_codes_outside(outliers, row, sums_w);
    for (std::int64_t j = 0; j < panel.cols(); ++j) {
        const double zw = weight.zeropoint[j];
        const double sum = static_cast<double>(acc[j]) + zw * sum_x + zx * sums_w[j] + depth * zx * zw;
        y[j] = static_cast<float>(sum * (scale_x * static_cast<double>(weight.scale[j])));
    }
}

void store_row(const float* y, const Panel& panel, std::int64_t row, const Matrix& out) {
    kernels().store(y, panel.cols(), out.dtype, at(out, row, panel.col_begin), out.col_stride);
}

void int8_linear(const ConstMatrix& x, const WeightView& weight, const ConstVector& bias, const Matrix& out,
                 const LinearOptions& options) {
    const OutlierElements outliers(x, weight, options);
    const QuantizedX quantized(x, weight, outliers);
    const ContiguousCodes x_codes(quantized.codes);
    const ContiguousCodes w_codes(weight.codes);
    for_each_panel(out.rows, out.cols, x.cols, [&](const Panel& panel) {
        PanelWeight panel_weight(weight, bias, panel);
        const auto finish = [&](std::int64_t row, const auto* acc) {
            panel_weight.gather_outliers(weight, outliers.columns(), panel);
            float y[tile_cols];
            if (weight.scheme == Scheme::zeropoint) {
                unroll_zeropoint(acc, quantized, outliers, row, panel_weight, panel, y);
            } else {
                scale_sums(acc, panel.cols(), of_group(quantized.scale, row, 0.0F), panel_weight.scale, y);
            }
            panel_weight.add_outliers(outliers, row, y);
            panel_weight.add_bias(y);
            store_row(y, panel, row, out);
        };
        multiply_panel(x_codes, w_codes, panel_weight.code_sums, panel, x.cols, finish);
    });
}

// y = scale_w * (X (q + zeropoint)^T) + bias, with the codes of a panel made float32 once for all its rows.
void weight_only_linear(const ConstMatrix& x, const WeightView& weight, const ConstVector& bias, const Matrix& out) {
    constexpr std::int64_t rows_at_a_time = 16;
    const std::int64_t k = x.cols;
    for_each_panel(out.rows, out.cols, k, [&](const Panel& panel) {
        const PanelWeight panel_weight(weight, bias, panel);
        const Scratch<float> w(panel.cols() * k);
        for (std::int64_t j = 0; j < panel.cols(); ++j) {
            for (std::int64_t depth = 0; depth < k; ++depth) {
                const auto code = static_cast<float>(code_at(weight.codes, panel.col_begin + j, depth));
                w[j * k + depth] = code + panel_weight.zeropoint[j];
            }
        }
        const Scratch<float> x_rows(std::min(rows_at_a_time, out.rows) * k);
        float y[rows_at_a_time][tile_cols];
        for (std::int64_t first = panel.row_begin; first < panel.row_end; first += rows_at_a_time) {
            const std::int64_t rows = std::min(rows_at_a_time, panel.row_end - first);
            for (std::int64_t i = 0; i < rows; ++i) load_row(x, first + i, 0, k, x_rows.data() + i * k);
            for (std::int64_t j = 0; j < panel.cols(); ++j) {
                for (std::int64_t i = 0; i < rows; ++i) {
                    y[i][j] = panel_weight.scale[j] * kernels().dot(x_rows.data() + i * k, w.data() + j * k, k);
                }
            }
            for (std::int64_t i = 0; i < rows; ++i) {
                panel_weight.add_bias(y[i]);
                store_row(y[i], panel, first + i, out);
            }
        }
    });
}

}  // namespace

void linear(ConstMatrix x, const WeightView& weight, ConstVector bias, Matrix out, const LinearOptions& options) {
    switch (options.path) {
        case Path::auto_:
        case Path::int8: return int8_linear(x, weight, bias, out, options);
        case Path::weight_only: return weight_only_linear(x, weight, bias, out);
    }
}

}  // namespace octavo::cpu
