// LLM.int8() on the CPU (paper Figure 2): find the outliers, quantize the rest of X row by row, multiply, and finish
// each row of a tile of the product while it is in the cache.
#include <algorithm>
#include <span>
#include <type_traits>

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
        : codes(x.rows, x.cols),
          scales(x.rows),
          zeropoints(weight.scheme == Scheme::zeropoint ? x.rows : 0),
          sums(weight.scheme == Scheme::zeropoint ? x.rows : 0) {
        const auto groups = weight.granularity == Granularity::tensor ? Granularity::tensor : Granularity::row;
        const std::int64_t count = groups == Granularity::tensor ? 1 : x.rows;
        const bool has_zeropoint = weight.scheme == Scheme::zeropoint;
        scale = {.data = scales.data(), .size = count};
        zeropoint = {.data = zeropoints.data(), .size = count, .present = has_zeropoint};
        const RowTraits traits{.excluded = [&](std::int64_t row) { return outliers.columns_of(row); },
                               .absmax = [&](std::int64_t row) { return outliers.absmax_outside(row); },
                               .done = [&](std::int64_t row) { codes.finish_row(row); }};
        quantize_rows(x, weight.scheme, groups, traits,
                      {codes.row(0), DType::i8, {}, x.rows, x.cols, codes.stride(), 1}, scale, zeropoint,
                      {.data = sums.data(), .dtype = DType::i32, .size = x.rows, .present = has_zeropoint});
    }

    XCodes codes;
    Scratch<float> scales;
    Scratch<float> zeropoints;   // this and the next only for zeropoint
    Scratch<std::int32_t> sums;  // of each row's codes
    Vector scale;
    Vector zeropoint;
};

// `count` values of a vector from `begin` on, or its only one as often; then zeros up to a multiple of 16, the width of
// the epilogue.
void gather(const ConstVector& values, std::int64_t begin, std::int64_t count, float* target) {
    if (values.size == 1) {
        std::fill(target, target + count, get<float>(values, 0));
    } else {
        kernels().load(values.dtype, at(values, begin), values.stride, count, target);
    }
    std::fill(target + count, target + whole_blocks(count), 0.0F);
}

// What the epilogue needs of the weight for the columns of one panel, gathered so that its loops are contiguous.
class PanelWeight {
public:
    // NOLINTNEXTLINE(cppcoreguidelines-pro-type-member-init): only the panel's columns of the arrays are used
    PanelWeight(const WeightView& weight, const ConstVector& bias, const Panel& panel)
        : weight_(weight), panel_(panel), has_bias_(bias.present) {
        const std::int64_t cols = panel.cols();
        gather(weight.scale, panel.col_begin, cols, scale);
        if (weight.zeropoint.present) {
            gather(weight.zeropoint, panel.col_begin, cols, zeropoint);
        } else {
            std::fill(zeropoint, zeropoint + whole_blocks(cols), 0.0F);
        }
        if (weight.code_sums.stride == 1) {
            __builtin_memcpy(code_sums, at(weight.code_sums, panel.col_begin),
                             static_cast<std::size_t>(cols) * sizeof *code_sums);
        } else {
            for (std::int64_t j = 0; j < cols; ++j) {
                code_sums[j] = get<std::int32_t>(weight.code_sums, panel.col_begin + j);
            }
        }
        std::fill(code_sums + cols, code_sums + whole_blocks(cols), 0);
        if (has_bias_) {
            kernels().load(bias.dtype, at(bias, panel.col_begin), bias.stride, cols, bias_);
            std::fill(bias_ + cols, bias_ + whole_blocks(cols), 0.0F);
        }
    }

    // The weights of the outlier columns. They lie apart from each other in memory, so this is done after the first
    // product of the panel, which has brought them all near.
    void gather_outliers(std::span<const std::int32_t> columns, const PackedPanel& codes) {
        if (gathered_) return;
        gathered_ = true;
        const auto count = static_cast<std::int64_t>(columns.size());
        outlier_weight_ = Scratch<float>(count * tile_cols);
        if (weight_.scheme == Scheme::zeropoint) outlier_codes_ = Scratch<std::int8_t>(count * tile_cols);
        const ConstVector& list = weight_.outlier_columns;
        std::int64_t kept = 0;  // both lists ascend
        for (std::int64_t o = 0; o < count; ++o) {
            const std::int32_t column = columns[static_cast<std::size_t>(o)];
            if (weight_.scheme == Scheme::zeropoint) {
                for (std::int64_t j = 0; j < panel_.cols(); ++j) {
                    outlier_codes_[o * tile_cols + j] = codes.code(j, column);
                }
            }
            float* const target = outlier_weight_.data() + o * tile_cols;
            while (kept < list.size && get<std::int32_t>(list, kept) < column) ++kept;
            if (kept < list.size && get<std::int32_t>(list, kept) == column) {
                const ConstMatrix& original = weight_.outlier_weight;
                kernels().load(original.dtype, at(original, panel_.col_begin, kept), original.row_stride, panel_.cols(),
                               target);
                std::fill(target + panel_.cols(), target + whole_blocks(panel_.cols()), 0.0F);
            } else {
                kernels().dequantize_column(codes.data(), codes.stride(), column, panel_.cols(), zeropoint, scale,
                                            target);
            }
        }
    }

    // sums[j] = sum_k of the codes of w[j] over the columns that are not outliers of the row
    void sum_codes_outside(const OutlierElements::Row& outliers, std::int32_t* sums) const {
        std::copy(code_sums, code_sums + panel_.cols(), sums);
        for (std::size_t o = 0; o < outliers.values.size(); ++o) {
            const auto position = outliers.positions != nullptr ? outliers.positions[o] : static_cast<std::int64_t>(o);
            for (std::int64_t j = 0; j < panel_.cols(); ++j) sums[j] -= outlier_codes_[position * tile_cols + j];
        }
    }

    // Everything after the product, for one row: `acc` int32 sums, or `scaled` ones.
    void finish(const std::int32_t* acc, const float* scaled, float scale_x, const OutlierElements::Row& outliers,
                std::int64_t row, const Matrix& out) const {
        const EpilogueRow epilogue{.acc = acc,
                                   .scaled = scaled,
                                   .scale_x = scale_x,
                                   .scale_w = scale,
                                   .outliers = static_cast<std::int64_t>(outliers.values.size()),
                                   .outlier_x = outliers.values.data(),
                                   .outlier_places = outliers.positions,
                                   .outlier_w = outlier_weight_.data(),
                                   .bias = has_bias_ ? bias_ : nullptr};
        if (out.col_stride == 1) {
            return kernels().epilogue(epilogue, panel_.cols(), out.dtype, at(out, row, panel_.col_begin));
        }
        float y[tile_cols];
        kernels().epilogue(epilogue, panel_.cols(), DType::f32, y);
        kernels().store(y, panel_.cols(), out.dtype, at(out, row, panel_.col_begin), out.col_stride);
    }

    float scale[tile_cols];
    float zeropoint[tile_cols];
    std::int32_t code_sums[tile_cols];

private:
    const WeightView& weight_;
    Panel panel_;
    bool has_bias_;
    bool gathered_ = false;
    Scratch<float> outlier_weight_{0};       // [|O|, tile_cols]
    Scratch<std::int8_t> outlier_codes_{0};  // [|O|, tile_cols]; only for zeropoint
    float bias_[tile_cols];
};

// The zeropoint product (Eq. 4-5) of row i, over the columns that are not its outliers:
//   y[j] = (acc + zw * sum_k qx + zx * sum_k qw + k * zx * zw) * scale_x * scale_w
// The terms are large and cancel, so they are added as float64, where they are exact unless zeropoints are beyond 2^20.
template <class Sum>
void unroll_zeropoint(const Sum* acc, const QuantizedX& x, const OutlierElements::Row& outliers, std::int64_t row,
                      std::int64_t k, const PanelWeight& weight, std::int64_t cols, float* y) {
    const double zx = of_group(x.zeropoint, row, 0.0F);
    const double scale_x = of_group(x.scale, row, 0.0F);
    const double sum_x = x.sums[row];
    const auto depth = static_cast<double>(k - static_cast<std::int64_t>(outliers.values.size()));
    std::int32_t sums_w[tile_cols];
    weight.sum_codes_outside(outliers, sums_w);
    for (std::int64_t j = 0; j < cols; ++j) {
        const double zw = weight.zeropoint[j];
        const double sum = static_cast<double>(acc[j]) + zw * sum_x + zx * sums_w[j] + depth * zx * zw;
        y[j] = static_cast<float>(sum * (scale_x * static_cast<double>(weight.scale[j])));
    }
}

void int8_linear(const ConstMatrix& x, const WeightView& weight, const ConstVector& bias, const Matrix& out,
                 const LinearOptions& options) {
    const OutlierElements outliers(x, weight, options);
    const QuantizedX quantized(x, weight, outliers);
    for_each_panel(out.rows, out.cols, x.cols, [&](const Panel& panel) {
        const PackedPanel w(weight.codes, weight.layout, panel.col_begin, panel.col_end);
        PanelWeight panel_weight(weight, bias, panel);
        const auto finish = [&](std::int64_t row, const auto* acc) {
            panel_weight.gather_outliers(outliers.columns(), w);
            const OutlierElements::Row elements = outliers.row(row);
            const float scale_x = of_group(quantized.scale, row, 0.0F);
            alignas(64) float y[tile_cols];
            if (weight.scheme == Scheme::zeropoint) {
                unroll_zeropoint(acc, quantized, elements, row, x.cols, panel_weight, panel.cols(), y);
                panel_weight.finish(nullptr, y, scale_x, elements, row, out);
            } else if constexpr (std::is_same_v<decltype(acc), const std::int32_t*>) {
                panel_weight.finish(acc, nullptr, scale_x, elements, row, out);
            } else {
                for (std::int64_t j = 0; j < panel.cols(); ++j) {
                    y[j] = static_cast<float>(acc[j]) * (scale_x * panel_weight.scale[j]);
                }
                panel_weight.finish(nullptr, y, scale_x, elements, row, out);
            }
        };
        multiply_panel(quantized.codes, w, panel_weight.code_sums, panel, finish);
    });
}

// y = scale_w * (X (q + zeropoint)^T) + bias, with the codes of a panel made float32 once for all its rows.
void weight_only_linear(const ConstMatrix& x, const WeightView& weight, const ConstVector& bias, const Matrix& out) {
    constexpr std::int64_t rows_at_a_time = 16;
    const std::int64_t k = x.cols;
    for_each_panel(out.rows, out.cols, k, [&](const Panel& panel) {
        const PackedPanel codes(weight.codes, weight.layout, panel.col_begin, panel.col_end);
        const PanelWeight panel_weight(weight, bias, panel);
        const Scratch<float> w(panel.cols() * k);
        for (std::int64_t j = 0; j < panel.cols(); ++j) {
            for (std::int64_t depth = 0; depth < k; ++depth) {
                const auto code = static_cast<float>(codes.code(j, depth));
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
                panel_weight.finish(nullptr, y[i], 1.0F, {}, first + i, out);
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
