#include "cpu/quantize.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "cpu/operations.hpp"
#include "cpu/rows.hpp"
#include "cpu/threads.hpp"
#include "octavo/error.hpp"
#include "octavo/pack.hpp"

namespace octavo::cpu {
namespace {

// How the values of one group (a row, or the whole tensor) become codes.
class Coding {
public:
    // `range` is that of the group's values, nothing where it has none.
    Coding(Scheme scheme, const std::optional<Range>& range) : scheme_(scheme) {
        if (range && !range->finite) {
            scale_ = std::numeric_limits<float>::quiet_NaN();
        } else if (scheme == Scheme::absmax) {
            absmax_ = range ? std::max({0.0F, -range->min, range->max}) : 0.0F;  // 0 first: never -0
            scale_ = absmax_ / 127.0F;
            codes_are_zero_ = absmax_ == 0.0F;
        } else if (range) {
            set_zeropoint(range->min, range->max);
        } else {
            scale_ = 1.0F;
        }
    }

    [[nodiscard]] float scale() const noexcept { return scale_; }
    [[nodiscard]] float zeropoint() const noexcept { return zeropoint_; }

    // `row` of a matrix, k codes.
    void encode(RowReader& x, std::int64_t row, std::int64_t k, std::int8_t* codes) const {
        if (codes_are_zero_) {
            std::fill(codes, codes + k, std::int8_t{0});
        } else if (scheme_ == Scheme::absmax) {
            kernels().encode_absmax(x.dtype(), x.row(row), k, absmax_, codes);
        } else if (nd_ != 0.0F) {
            kernels().encode_zeropoint(x.floats(row), k, nd_, zeropoint_, codes);
        } else {
            const float* const values = x.floats(row);
            for (std::int64_t i = 0; i < k; ++i) {
                const double code = std::nearbyint(wide_nd_ * values[i]) - wide_zeropoint_;
                // NaN is possible in columns that are left out, whose codes do not count.
                codes[i] = static_cast<std::int8_t>(std::isnan(code) ? 0.0 : std::clamp(code, -127.0, 127.0));
            }
        }
    }

private:
    void set_zeropoint(float min, float max) {
        codes_are_zero_ = false;
        const float constant = max == 0.0F ? 1.0F : std::fabs(max);  // the scale of a constant group
        const double wide_spread = static_cast<double>(max) - min;
        scale_ = wide_spread != 0.0 ? static_cast<float>(wide_spread / 254.0) : constant;
        const float spread = max - min;
        const float nd = spread != 0.0F ? 254.0F / spread : 1.0F / constant;
        if (std::isfinite(spread) && std::isfinite(nd)) {
            nd_ = nd;
            zeropoint_ = std::nearbyint(nd * min) + 127.0F;
            return;
        }
        // A spread beyond float32's range, or so small that its inverse is: the same in float64.
        wide_nd_ = wide_spread != 0.0 ? 254.0 / wide_spread : 1.0 / static_cast<double>(constant);
        wide_zeropoint_ = std::nearbyint(wide_nd_ * min) + 127.0;
        zeropoint_ = static_cast<float>(wide_zeropoint_);
    }

    Scheme scheme_;
    bool codes_are_zero_ = true;
    float scale_ = 0.0F;
    float zeropoint_ = 0.0F;
    float absmax_ = 0.0F;
    float nd_ = 0.0F;  // 0 where wide_nd_ is used
    double wide_nd_ = 0.0;
    double wide_zeropoint_ = 0.0;
};

// The range of a row outside its excluded columns; nothing where it has no other columns. For absmax, the range
// [-absmax, absmax].
std::optional<Range> range_outside(RowReader& x, std::int64_t row, std::int64_t k, Scheme scheme,
                                   const RowTraits& traits) {
    const auto excluded = traits.excluded(row);
    if (scheme == Scheme::absmax) {
        if (traits.absmax) {
            if (const auto absmax = traits.absmax(row)) return Range{-*absmax, *absmax, true};
        }
        if (excluded.empty()) {
            constexpr std::uint32_t no_limit = 0;
            const Magnitudes found = kernels().magnitudes(x.dtype(), x.row(row), k, no_limit);
            const float absmax = magnitude_of(x.dtype(), found.largest);
            return Range{-absmax, absmax, std::isfinite(absmax)};
        }
    }
    std::int64_t kept = 0;  // the first column that is not excluded
    for (const std::int32_t column : excluded) {
        if (column != kept) break;
        ++kept;
    }
    if (kept == k) return std::nullopt;
    // Excluded places get a value that does not change the range, so that the kernel needs no mask.
    float* const values = x.floats(row);
    for (const std::int32_t column : excluded) values[column] = values[kept];
    return kernels().range(values, k);
}

std::optional<Range> merge(const std::optional<Range>& a, const std::optional<Range>& b) {
    if (!a) return b;
    if (!b) return a;
    return Range{std::min(a->min, b->min), std::max(a->max, b->max), a->finite && b->finite};
}

std::optional<Range> range_of(const ConstMatrix& x, Scheme scheme, const RowTraits& traits) {
    std::vector<std::optional<Range>> of_row(static_cast<std::size_t>(x.rows));
    parallel_for(x.rows, row_grain(x.cols), [&](std::int64_t begin, std::int64_t end) {
        RowReader reader(x);
        for (std::int64_t i = begin; i < end; ++i) {
            of_row[static_cast<std::size_t>(i)] = range_outside(reader, i, x.cols, scheme, traits);
        }
    });
    std::optional<Range> whole;
    for (const auto& range : of_row) whole = merge(whole, range);
    return whole;
}

}  // namespace

void quantize_rows(ConstMatrix x, Scheme scheme, Granularity granularity, const RowTraits& traits, Matrix codes,
                   Vector scale, Vector zeropoint, Vector code_sums) {
    const auto put_group = [&](std::int64_t group, const Coding& coding) {
        put(scale, group, coding.scale());
        if (zeropoint.present) put(zeropoint, group, coding.zeropoint());
    };
    std::optional<Coding> whole;
    if (granularity == Granularity::tensor) {
        whole.emplace(scheme, range_of(x, scheme, traits));
        put_group(0, *whole);
    }
    parallel_for(x.rows, row_grain(x.cols), [&](std::int64_t begin, std::int64_t end) {
        RowReader reader(x);
        const bool in_place = codes.data != nullptr && codes.col_stride == 1;
        const Scratch<std::int8_t> row_codes(in_place ? 0 : padded_depth(x.cols));
        if (!in_place) std::fill(row_codes.data() + x.cols, row_codes.data() + padded_depth(x.cols), std::int8_t{0});
        for (std::int64_t i = begin; i < end; ++i) {
            const Coding coding = whole ? *whole : Coding(scheme, range_outside(reader, i, x.cols, scheme, traits));
            if (!whole) put_group(i, coding);

            std::int8_t* const target = in_place ? static_cast<std::int8_t*>(at(codes, i, 0)) : row_codes.data();
            coding.encode(reader, i, x.cols, target);
            for (const std::int32_t column : traits.excluded(i)) target[column] = 0;
            if (codes.data != nullptr && !in_place) {
                for (std::int64_t j = 0; j < x.cols; ++j) *static_cast<std::int8_t*>(at(codes, i, j)) = target[j];
            }
            if (code_sums.present) put(code_sums, i, kernels().sum(target, x.cols));
            if (traits.done) traits.done(i, target);
        }
    });
}

void quantize(ConstMatrix x, const QuantizeOptions& options, ConstVector exclude, Matrix codes, Vector scale,
              Vector zeropoint) {
    std::vector<std::int32_t> columns;
    for (std::int64_t i = 0; i < exclude.size; ++i) {
        const auto column = get<std::int32_t>(exclude, i);
        if (column < 0 || column >= x.cols) {
            throw Error(ErrorKind::value, "quantize: exclude: expected columns of x, 0 to " +
                                              std::to_string(x.cols - 1) + ", got " + std::to_string(column));
        }
        columns.push_back(column);
    }
    sort_unique(columns);
    const RowTraits traits{.excluded = [&](std::int64_t) { return std::span<const std::int32_t>(columns); }};
    quantize_rows(x, options.scheme, options.granularity, traits, codes, scale, zeropoint, absent_vector);
}

void quantize_weight(ConstMatrix weight, const QuantizeOptions& options, Matrix codes, Vector scale, Vector zeropoint,
                     Vector code_sums) {
    const auto groups = options.granularity == Granularity::vector ? Granularity::row : Granularity::tensor;
    const RowTraits traits{.excluded = [](std::int64_t) { return std::span<const std::int32_t>(); }};
    quantize_rows(weight, options.scheme, groups, traits, codes, scale, zeropoint, code_sums);
    for (std::int64_t i = 0; i < scale.size; ++i) {
        if (std::isnan(get<float>(scale, i))) {
            const std::string where = scale.size == 1 ? "" : " in row " + std::to_string(i);
            throw Error(ErrorKind::value, "quantize_weight: weight: expected finite values, got NaN or Inf" + where);
        }
    }
}

void sum_codes(ConstMatrix codes, Vector code_sums) {
    parallel_for(codes.rows, row_grain(codes.cols), [&](std::int64_t begin, std::int64_t end) {
        const Scratch<std::int8_t> copy(codes.cols);
        for (std::int64_t i = begin; i < end; ++i) {
            put(code_sums, i, kernels().sum(contiguous_codes(codes, i, copy.data()), codes.cols));
        }
    });
}

}  // namespace octavo::cpu
