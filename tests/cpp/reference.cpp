#include "reference.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

namespace reference {
namespace {

constexpr double quiet_nan = std::numeric_limits<double>::quiet_NaN();

double f32(double value) { return static_cast<float>(value); }

// Integers have no -0.
double clipped(double code) { return std::clamp(code, -127.0, 127.0) + 0.0; }

double at_group(const std::vector<double>& values, std::int64_t index, double absent) {
    if (values.empty()) return absent;
    return values[values.size() == 1 ? 0 : static_cast<std::size_t>(index)];
}

bool is_set(const Mask& mask, const Values& x, std::int64_t i, std::int64_t j) {
    return !mask.empty() && mask[static_cast<std::size_t>(i * x.cols + j)] != 0;
}

// Eq. 1
double absmax_code(double x, double absmax) {
    const double product = f32(x * 127);
    const double quotient = std::isfinite(product) ? f32(product / absmax) : f32(f32(x / absmax) * 127);
    return clipped(std::nearbyint(quotient));
}

// Eq. 2-3 for one group, in float32 or, where that overflows, in double.
struct Zeropoint {
    Zeropoint(double min, double max)
        : constant(max == 0 ? 1 : std::fabs(max)),
          spread(f32(max - min)),
          nd(spread != 0 ? f32(254 / spread) : f32(1 / constant)),
          scale(max != min ? f32((max - min) / 254) : constant),
          narrow(std::isfinite(spread) && std::isfinite(nd)) {
        if (!narrow) nd = max != min ? 254 / (max - min) : 1 / constant;
        zeropoint = round(round(std::nearbyint(round(nd * min))) + 127);
    }
    [[nodiscard]] double round(double value) const { return narrow ? f32(value) : value; }
    [[nodiscard]] double code(double x) const { return clipped(round(std::nearbyint(round(nd * x)) - zeropoint)); }

    double constant;  // the scale where max = min
    double spread, nd, scale;
    bool narrow;
    double zeropoint = 0;
};

// The elements that go the 16-bit way.
Mask outlier_mask(const Values& x, const Weight& weight, const octavo::LinearOptions& options) {
    Mask mask(x.v.size());
    std::vector<std::int32_t> columns;
    switch (options.outliers) {
        case octavo::Outliers::none: break;
        case octavo::Outliers::columns: columns = find_outliers(x, options.threshold); break;
        case octavo::Outliers::static_: columns = weight.outlier_columns; break;
        case octavo::Outliers::rows:
            for (std::size_t at = 0; at < mask.size(); ++at) mask[at] = std::fabs(x.v[at]) < options.threshold ? 0 : 1;
            break;
    }
    for (const std::int32_t column : columns) {
        for (std::int64_t i = 0; i < x.rows; ++i) mask[static_cast<std::size_t>(i * x.cols + column)] = 1;
    }
    return mask;
}

// What rounding to `dtype` may change.
double rounding(DType dtype, double value) {
    switch (dtype) {
        case DType::f16: return std::fabs(value) * 0x1p-11 + 0x1p-25;
        case DType::bf16: return std::fabs(value) * 0x1p-8 + 0x1p-134;
        default: return std::fabs(value) * 0x1p-24 + 0x1p-150;
    }
}

// One output of a linear layer: its terms added up, with the sum of their magnitudes.
struct Sum {
    double value = 0;
    double magnitude = 0;
    void add(double term) {
        value += term;
        magnitude += std::fabs(term);
    }
};

}  // namespace

Quantized quantize(const Values& x, Scheme scheme, bool per_row, const Mask& excluded) {
    const std::int64_t groups = per_row ? x.rows : 1;
    Quantized result{Values(x.rows, x.cols), std::vector<double>(static_cast<std::size_t>(groups)), {}};
    if (scheme == Scheme::zeropoint) result.zeropoint.resize(static_cast<std::size_t>(groups));
    for (std::int64_t group = 0; group < groups; ++group) {
        const std::int64_t begin = per_row ? group : 0;
        const std::int64_t end = per_row ? group + 1 : x.rows;
        const auto for_each = [&](auto body) {
            for (std::int64_t i = begin; i < end; ++i) {
                for (std::int64_t j = 0; j < x.cols; ++j) {
                    if (!is_set(excluded, x, i, j)) body(i, j);
                }
            }
        };
        double min = std::numeric_limits<double>::infinity();
        double max = -min;
        bool finite = true;
        bool empty = true;
        for_each([&](std::int64_t i, std::int64_t j) {
            min = std::min(min, x(i, j));
            max = std::max(max, x(i, j));
            finite = finite && std::isfinite(x(i, j));
            empty = false;
        });
        double& scale = result.scale[static_cast<std::size_t>(group)];
        if (!finite) {
            scale = quiet_nan;
        } else if (scheme == Scheme::absmax) {
            const double absmax = empty ? 0 : std::max(std::fabs(min), std::fabs(max));
            scale = f32(absmax / 127);
            if (absmax == 0) continue;
            for_each([&](std::int64_t i, std::int64_t j) { result.codes(i, j) = absmax_code(x(i, j), absmax); });
        } else if (empty) {
            scale = 1;
        } else {
            const Zeropoint zeropoint(min, max);
            scale = zeropoint.scale;
            result.zeropoint[static_cast<std::size_t>(group)] = f32(zeropoint.zeropoint);
            for_each([&](std::int64_t i, std::int64_t j) { result.codes(i, j) = zeropoint.code(x(i, j)); });
        }
    }
    return result;
}

double ideal_absmax_code(double x, double absmax) { return clipped(std::nearbyint(x * 127 / absmax)); }

std::vector<std::int32_t> find_outliers(const Values& x, double threshold) {
    std::vector<std::int32_t> columns;
    for (std::int64_t j = 0; j < x.cols; ++j) {
        bool outlying = false;
        for (std::int64_t i = 0; i < x.rows; ++i) outlying = outlying || !(std::fabs(x(i, j)) < threshold);
        if (outlying) columns.push_back(static_cast<std::int32_t>(j));
    }
    return columns;
}

Values int8_matmul(const Values& a, const Values& b) {
    Values out(a.rows, b.rows);
    for (std::int64_t i = 0; i < a.rows; ++i) {
        for (std::int64_t j = 0; j < b.rows; ++j) {
            for (std::int64_t h = 0; h < a.cols; ++h) out(i, j) += a(i, h) * b(j, h);
        }
    }
    return out;
}

Output linear(const Values& x, const Weight& weight, const std::vector<double>& bias, Scheme scheme, bool x_per_tensor,
              const octavo::LinearOptions& options, DType out_dtype) {
    const std::int64_t n = weight.codes.rows;
    const bool weight_only = options.path == octavo::Path::weight_only;
    const Mask mask = weight_only ? Mask(x.v.size()) : outlier_mask(x, weight, options);
    const Quantized qx = weight_only ? Quantized{} : quantize(x, scheme, !x_per_tensor, mask);

    // The weights that meet outliers: kept ones, else what the codes stand for.
    Values outlier_weight(n, x.cols);
    for (std::int64_t j = 0; j < n; ++j) {
        for (std::int64_t h = 0; h < x.cols; ++h) {
            outlier_weight(j, h) =
                f32(f32(weight.codes(j, h) + at_group(weight.zeropoint, j, 0)) * at_group(weight.scale, j, 0));
        }
        for (std::size_t o = 0; o < weight.outlier_columns.size(); ++o) {
            outlier_weight(j, weight.outlier_columns[o]) = weight.outlier_weight(j, static_cast<std::int64_t>(o));
        }
    }

    Output output{Values(x.rows, n), Values(x.rows, n)};
    for (std::int64_t i = 0; i < x.rows; ++i) {
        std::vector<std::int64_t> outlying;
        std::vector<std::int64_t> others;
        for (std::int64_t h = 0; h < x.cols; ++h) (is_set(mask, x, i, h) ? outlying : others).push_back(h);
        for (std::int64_t j = 0; j < n; ++j) {
            const double zw = at_group(weight.zeropoint, j, 0);
            const double scale_w = at_group(weight.scale, j, 0);
            const double zx = at_group(qx.zeropoint, i, 0);
            Sum sum;
            double integer = 0;
            double float_terms = 8 + static_cast<double>(outlying.size());  // 8: the roundings of the epilogue itself
            for (const std::int64_t h : outlying) sum.add(x(i, h) * outlier_weight(j, h));
            for (const std::int64_t h : others) {
                if (weight_only) {
                    sum.add(x(i, h) * (weight.codes(j, h) + zw) * scale_w);
                } else {
                    integer += (qx.codes(i, h) + zx) * (weight.codes(j, h) + zw);
                }
            }
            if (weight_only) {
                float_terms += 8 + static_cast<double>(x.cols) / 64;  // summed in 64 lanes, then over the lanes
            } else {
                sum.add(integer * (at_group(qx.scale, i, 0) * scale_w));
            }
            if (!bias.empty()) sum.add(bias[static_cast<std::size_t>(j)]);
            output.y(i, j) = sum.value;
            const double before = float_terms * 0x1p-24 * sum.magnitude + 0x1p-149 * std::fabs(integer);
            output.bound(i, j) = before + rounding(out_dtype, std::fabs(sum.value) + before);
        }
    }
    return output;
}

}  // namespace reference
