#include "cpu/quantize.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "backend.hpp"
#include "cpu/pack.hpp"
#include "cpu/rows.hpp"
#include "cpu/threads.hpp"
#include "octavo/error.hpp"
#include "octavo/pack.hpp"
#include "octavo/quantize.hpp"

namespace octavo::cpu {
namespace {

// What a group is rotated times where its sums, of up to 256 numbers, overflow.
constexpr float small = 0x1p-8F;

// The rows of a matrix as they are quantized: without what is excluded, and rotated.
class QuantizedRows {
public:
    QuantizedRows(const ConstMatrix& x, const QuantizeOptions& options)
        : x_(x),
          options_(options),
          // Only absmax codes are made of 16-bit values, and of the matrix's own memory, directly.
          in_place_(x.col_stride == 1 && options.scheme == Scheme::absmax && options.rotation == 0),
          dtype_(in_place_ ? x.dtype : DType::f32),
          copy_(in_place_ ? 0 : rotated_size(x.cols, options.rotation)) {}

    [[nodiscard]] DType dtype() const noexcept { return dtype_; }

    // `size` values of `dtype`, valid until the next call. Excluded ones are 0 or, where a 0 could widen the range, the
    // first that is not excluded; in the matrix's own memory they are what they were. Rotated ones are times `factor`.
    const void* read(std::int64_t row, std::span<const std::int32_t> excluded, float factor) {
        if (in_place_) {
            exclude(excluded);
            return at(x_, row, 0);
        }
        float* const values = copy_.data();
        const bool is_loaded = options_.rotation == 0 || factor != 1.0F || x_.col_stride != 1;
        if (is_loaded) load_row(x_, row, 0, x_.cols, values);
        if (options_.rotation != 0) {
            if (factor != 1.0F) std::for_each_n(values, x_.cols, [factor](float& value) { value *= factor; });
            largest_ = kernels().rotate(is_loaded ? DType::f32 : x_.dtype, is_loaded ? values : at(x_, row, 0), x_.cols,
                                        options_.rotation, excluded.data(), std::ssize(excluded), values);
            return values;
        }
        const bool fills = options_.scheme == Scheme::zeropoint;
        const std::int64_t first = fills ? first_kept(excluded) : x_.cols;
        const float filler = first < x_.cols ? values[first] : 0.0F;
        for (const std::int32_t column : excluded) values[column] = filler;
        return values;
    }

    // The range of what `read` gave; nothing where the row has no values. For absmax, the range [-absmax, absmax].
    [[nodiscard]] std::optional<Range> range(const void* values, std::span<const std::int32_t> excluded) const {
        const std::int64_t size = rotated_size(x_.cols, options_.rotation);
        if (options_.scheme == Scheme::absmax) {
            const std::uint32_t largest = options_.rotation != 0 ? largest_
                                          : in_place_ && !excluded.empty()
                                              ? kernels().largest_masked(dtype_, values, mask_.data(), size)
                                              : kernels().largest_magnitude(dtype_, values, size);
            const float absmax = magnitude_of(dtype_, largest);
            return Range{-absmax, absmax, std::isfinite(absmax)};
        }
        const bool none = size == 0 || (options_.rotation == 0 && first_kept(excluded) == x_.cols);
        if (none) return std::nullopt;
        return kernels().range(static_cast<const float*>(values), size);
    }

private:
    [[nodiscard]] static std::int64_t first_kept(std::span<const std::int32_t> excluded) {
        std::int64_t kept = 0;
        for (const std::int32_t column : excluded) {
            if (column != kept) break;
            ++kept;
        }
        return kept;
    }

    // The mask of magnitudes without these columns, which are those of the row before, most of the time. (A copy of the
    // row with zeros there would have to wait for them.)
    void exclude(std::span<const std::int32_t> columns) {
        if (std::ranges::equal(columns, excluded_)) return;
        const auto item = size_of(dtype_);
        const std::uint32_t all = item == 4 ? 0x7FFFFFFFU : 0x7FFF7FFFU;
        if (mask_.data() == nullptr) {
            mask_ = Scratch<std::uint32_t>(x_.cols);
            std::fill_n(mask_.data(), x_.cols, all);
        }
        const auto put = [&](std::span<const std::int32_t> where, std::uint32_t bits) {
            auto* const mask = reinterpret_cast<char*>(mask_.data());
            for (const std::int32_t column : where) {
                __builtin_memcpy(mask + column * item, &bits, static_cast<std::size_t>(item));
            }
        };
        put(excluded_, all);
        put(columns, 0);
        excluded_.assign(columns.begin(), columns.end());
    }

    ConstMatrix x_;
    QuantizeOptions options_;
    bool in_place_;
    DType dtype_;
    Scratch<float> copy_;
    Scratch<std::uint32_t> mask_{0};  // only in place, where columns were excluded
    std::vector<std::int32_t> excluded_;
    std::uint32_t largest_ = 0;  // magnitude of what was rotated last
};

// How the values of one group (a row, or the whole tensor) become codes.
class Coding {
public:
    // `range` is that of the group's values times `factor`, nothing where it has none.
    Coding(const QuantizeOptions& options, const std::optional<Range>& range, float factor)
        : options_(options), factor_(factor) {
        if (range && !range->finite) {
            scale_ = std::numeric_limits<float>::quiet_NaN();
        } else if (options.scheme == Scheme::absmax) {
            absmax_ = range ? std::max({0.0F, -range->min, range->max}) : 0.0F;  // 0 first: never -0
            scale_ = absmax_ / 127.0F;
            codes_are_zero_ = absmax_ == 0.0F;
        } else if (range) {
            set_zeropoint(range->min, range->max);
        } else {
            scale_ = 1.0F;
        }
    }

    [[nodiscard]] float factor() const noexcept { return factor_; }
    [[nodiscard]] float scale() const noexcept { return scale_ / factor_; }
    [[nodiscard]] float zeropoint() const noexcept { return zeropoint_; }

    // What QuantizedRows::read gave.
    void encode(DType dtype, const void* values, std::int64_t size, std::int8_t* codes) const {
        const auto* const floats = static_cast<const float*>(values);  // unless it is absmax, unrotated
        if (codes_are_zero_) {
            std::fill(codes, codes + size, std::int8_t{0});
        } else if (options_.scheme == Scheme::absmax && options_.rotation != 0) {
            kernels().encode_rotated(floats, size, absmax_, codes);
        } else if (options_.scheme == Scheme::absmax) {
            kernels().encode_absmax(dtype, values, size, absmax_, codes);
        } else if (nd_ != 0.0F) {
            kernels().encode_zeropoint(floats, size, nd_, zeropoint_, codes);
        } else {
            for (std::int64_t i = 0; i < size; ++i) {
                const double code = std::nearbyint(wide_nd_ * floats[i]) - wide_zeropoint_;
                codes[i] = static_cast<std::int8_t>(std::clamp(code, -127.0, 127.0));
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

    QuantizeOptions options_;
    float factor_;  // of the values that are encoded
    bool codes_are_zero_ = true;
    float scale_ = 0.0F;
    float zeropoint_ = 0.0F;
    float absmax_ = 0.0F;
    float nd_ = 0.0F;  // 0 where wide_nd_ is used
    double wide_nd_ = 0.0;
    double wide_zeropoint_ = 0.0;
};

std::optional<Range> merge(const std::optional<Range>& a, const std::optional<Range>& b) {
    if (!a) return b;
    if (!b) return a;
    return Range{std::min(a->min, b->min), std::max(a->max, b->max), a->finite && b->finite};
}

// Whether a group of this range is to be read again, times `small`.
bool overflows(const QuantizeOptions& options, const std::optional<Range>& range) {
    return options.rotation != 0 && range && !range->finite;
}

std::optional<Range> range_of(const ConstMatrix& x, const QuantizeOptions& options, const RowTraits& traits,
                              float factor) {
    std::vector<std::optional<Range>> of_row(static_cast<std::size_t>(x.rows));
    parallel_for(x.rows, row_grain(x.cols), [&](std::int64_t begin, std::int64_t end) {
        QuantizedRows rows(x, options);
        const auto excluded_of = traits.excluded(begin);
        for (std::int64_t i = begin; i < end; ++i) {
            const auto excluded = excluded_of(i);
            of_row[static_cast<std::size_t>(i)] = rows.range(rows.read(i, excluded, factor), excluded);
        }
    });
    std::optional<Range> whole;
    for (const auto& range : of_row) whole = merge(whole, range);
    return whole;
}

}  // namespace

void quantize_rows(ConstMatrix x, const QuantizeOptions& options, const RowTraits& traits, Matrix codes, Vector scale,
                   Vector zeropoint, Vector code_sums) {
    const auto put_group = [&](std::int64_t group, const Coding& coding) {
        put(scale, group, coding.scale());
        if (zeropoint.present) put(zeropoint, group, coding.zeropoint());
    };
    std::optional<Coding> whole;
    if (options.granularity == Granularity::tensor) {
        auto range = range_of(x, options, traits, 1.0F);
        const float factor = overflows(options, range) ? small : 1.0F;
        if (factor != 1.0F) range = range_of(x, options, traits, factor);
        whole.emplace(options, range, factor);
        put_group(0, *whole);
    }
    const std::int64_t together = traits.together;
    const std::int64_t depth = padded_depth(codes.cols);
    const auto work = [&](std::int64_t begin, std::int64_t end) {
        QuantizedRows rows(x, options);
        const bool in_place = codes.data != nullptr && codes.col_stride == 1;
        const Scratch<float> row_values(traits.seed ? x.cols : 0);
        const Scratch<std::int8_t> row_codes(in_place ? 0 : together * depth);
        for (std::int64_t r = 0; !in_place && r < together; ++r) {
            std::fill(row_codes.data() + r * depth + codes.cols, row_codes.data() + (r + 1) * depth, std::int8_t{0});
        }
        const std::int64_t last = std::min(end * together, x.rows);
        const auto excluded_of = traits.excluded(begin * together);
        for (std::int64_t i = begin * together; i < last; ++i) {
            if (i + 1 < last) fetch_row(x, i + 1);
            const auto excluded = excluded_of(i);
            const void* values = rows.read(i, excluded, whole ? whole->factor() : 1.0F);
            const auto coding_of_row = [&] {
                const auto range = rows.range(values, excluded);
                if (!overflows(options, range)) return Coding(options, range, 1.0F);
                values = rows.read(i, excluded, small);
                return Coding(options, rows.range(values, excluded), small);
            };
            const Coding coding = whole ? *whole : coding_of_row();
            if (!whole) put_group(i, coding);

            std::int8_t* const target =
                in_place ? static_cast<std::int8_t*>(at(codes, i, 0)) : row_codes.data() + i % together * depth;
            if (traits.seed) {
                load_row(x, i, 0, x.cols, row_values.data());
                kernels().encode_stochastic(row_values.data(), x.cols, coding.scale(), i, *traits.seed, target);
            } else {
                coding.encode(rows.dtype(), values, codes.cols, target);
            }
            if (options.rotation == 0) {
                for (const std::int32_t column : excluded) target[column] = 0;
            }
            if (codes.data != nullptr && !in_place) {
                for (std::int64_t j = 0; j < codes.cols; ++j) *static_cast<std::int8_t*>(at(codes, i, j)) = target[j];
            }
            if (code_sums.present) put(code_sums, i, kernels().sum(target, codes.cols));
            const bool is_last = i % together == together - 1 || i == x.rows - 1;
            if (traits.done && is_last) traits.done(i - i % together, together == 1 ? target : row_codes.data());
        }
    };
    constexpr std::int64_t to_wake = 16;
    const std::int64_t grain = (row_grain(x.cols) + together - 1) / together;
    parallel_for((x.rows + together - 1) / together, grain, work, grain * to_wake);
}

void Backend::quantize(ConstMatrix x, const QuantizeOptions& options, ConstVector exclude, Matrix codes, Vector scale,
                       Vector zeropoint, Stream /*stream*/) const {
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
    const RowTraits traits{
        .excluded = [&](std::int64_t) { return [&](std::int64_t) { return std::span<const std::int32_t>(columns); }; }};
    quantize_rows(x, options, traits, codes, scale, zeropoint, absent_vector);
}

void Backend::quantize_weight(ConstMatrix weight, const QuantizeOptions& options, Matrix codes, Vector scale,
                              Vector zeropoint, Vector code_sums, Layout layout, const Requantization& again,
                              Stream /*stream*/) const {
    QuantizeOptions of_rows = options;
    of_rows.granularity = options.granularity == Granularity::vector ? Granularity::row : Granularity::tensor;
    RowTraits traits{
        .excluded = [](std::int64_t) { return [](std::int64_t) { return std::span<const std::int32_t>(); }; },
        .seed = again.seed};
    if (layout == Layout::packed) {
        ask_for_large_pages(codes.data, packed_size(codes.rows, codes.cols));
        traits.together = block_cols;
        traits.done = [=](std::int64_t row, const std::int8_t* block) {
            const std::int64_t depth = padded_depth(codes.cols);
            kernels().pack(block, depth, std::min(block_cols, codes.rows - row), codes.cols,
                           static_cast<std::int8_t*>(codes.data) + row * depth);
        };
    }
    const Matrix not_kept{.dtype = DType::i8, .rows = codes.rows, .cols = codes.cols};
    quantize_rows(weight, of_rows, traits, layout == Layout::packed ? not_kept : codes, scale, zeropoint, code_sums);
    for (std::int64_t i = 0; i < scale.size; ++i) {
        if (std::isnan(get<float>(scale, i))) {
            const std::string where = scale.size == 1 ? "" : " in row " + std::to_string(i);
            throw Error(ErrorKind::value, "quantize_weight: weight: expected finite values, got NaN or Inf" + where);
        }
    }
}

void Backend::sum_codes(ConstMatrix codes, Vector code_sums, Stream /*stream*/) const {
    parallel_for(codes.rows, row_grain(codes.cols), [&](std::int64_t begin, std::int64_t end) {
        const Scratch<std::int8_t> copy(codes.cols);
        for (std::int64_t i = begin; i < end; ++i) {
            put(code_sums, i, kernels().sum(contiguous_codes(codes, i, copy.data()), codes.cols));
        }
    });
}

}  // namespace octavo::cpu
