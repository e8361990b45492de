#include "cpu/outlier.hpp"

#include <algorithm>
#include <cmath>
#include <mutex>
#include <utility>

#include "cpu/operations.hpp"
#include "cpu/rows.hpp"
#include "cpu/threads.hpp"

namespace octavo::cpu {
namespace {

// The least bit pattern of a magnitude that is not below the threshold. Inf and NaN never are.
std::uint32_t limit_of(DType dtype, float threshold) {
    std::uint32_t bits = 0;
    kernels().store(&threshold, 1, dtype, &bits, 1);
    bits &= dtype == DType::f32 ? 0x7FFFFFFFU : 0x7FFFU;  // no sign: -0 is a threshold too
    return magnitude_of(dtype, bits) < threshold ? bits + 1 : bits;
}

}  // namespace

OutlierScan::OutlierScan(const ConstMatrix& x, float threshold) : largest_regular(static_cast<std::size_t>(x.rows)) {
    std::vector<std::uint8_t> mask(static_cast<std::size_t>(x.cols));
    std::mutex mutex;  // guards mask and any
    bool any = false;
    parallel_for(x.rows, row_grain(x.cols), [&](std::int64_t begin, std::int64_t end) {
        RowReader reader(x);
        const std::uint32_t limit = limit_of(reader.dtype(), threshold);
        std::vector<std::uint8_t> marks;  // of these rows
        for (std::int64_t i = begin; i < end; ++i) {
            const void* const row = reader.row(i);
            const Magnitudes found = kernels().magnitudes(reader.dtype(), row, x.cols, limit);
            largest_regular[static_cast<std::size_t>(i)] = magnitude_of(reader.dtype(), found.largest_below);
            if (found.largest < limit || x.cols == 0) continue;
            marks.resize(mask.size());
            kernels().mark_outliers(reader.dtype(), row, x.cols, limit, marks.data());
        }
        if (marks.empty()) return;
        const std::scoped_lock lock(mutex);
        any = true;
        for (std::size_t j = 0; j < marks.size(); ++j) mask[j] = static_cast<std::uint8_t>(mask[j] | marks[j]);
    });
    for (std::size_t j = 0; any && j < mask.size(); ++j) {
        if (mask[j] != 0) columns.push_back(static_cast<std::int32_t>(j));
    }
}

void find_outliers(ConstMatrix x, float threshold, Vector columns, Vector count) {
    const auto found = OutlierScan(x, threshold).columns;
    for (std::size_t i = 0; i < found.size(); ++i) put(columns, static_cast<std::int64_t>(i), found[i]);
    put(count, 0, static_cast<std::int32_t>(found.size()));
}

OutlierElements::OutlierElements(const ConstMatrix& x, const WeightView& weight, const LinearOptions& options) {
    switch (options.outliers) {
        case Outliers::none: break;
        case Outliers::columns: {
            OutlierScan scan(x, options.threshold);
            columns_ = std::move(scan.columns);
            largest_regular_ = std::move(scan.largest_regular);
            gather(x);
            break;
        }
        case Outliers::static_:
            for (std::int64_t i = 0; i < weight.outlier_columns.size; ++i) {
                columns_.push_back(get<std::int32_t>(weight.outlier_columns, i));
            }
            gather(x);
            break;
        case Outliers::rows: gather_per_row(x, options.threshold); break;
    }
}

void OutlierElements::gather(const ConstMatrix& x) {
    values_.resize(static_cast<std::size_t>(x.rows) * columns_.size());
    if (values_.empty()) return;
    const auto width = static_cast<std::int64_t>(columns_.size());
    parallel_for(x.rows, row_grain(width), [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin; i < end; ++i) {
            for (std::int64_t o = 0; o < width; ++o) {
                load_row(x, i, columns_[static_cast<std::size_t>(o)], 1, values_.data() + i * width + o);
            }
        }
    });
}

void OutlierElements::gather_per_row(const ConstMatrix& x, float threshold) {
    per_row_ = true;
    RowReader reader(x);
    const std::uint32_t limit = limit_of(reader.dtype(), threshold);
    std::vector<std::uint8_t> mask(static_cast<std::size_t>(x.cols));
    row_begin_.push_back(0);
    for (std::int64_t i = 0; i < x.rows; ++i) {
        const void* const row = reader.row(i);
        const Magnitudes found = kernels().magnitudes(reader.dtype(), row, x.cols, limit);
        largest_regular_.push_back(magnitude_of(reader.dtype(), found.largest_below));
        if (found.largest >= limit && x.cols > 0) {
            std::ranges::fill(mask, std::uint8_t{0});
            kernels().mark_outliers(reader.dtype(), row, x.cols, limit, mask.data());
            for (std::int64_t j = 0; j < x.cols; ++j) {
                if (mask[static_cast<std::size_t>(j)] == 0) continue;
                row_columns_.push_back(static_cast<std::int32_t>(j));
                load_row(x, i, j, 1, &values_.emplace_back());
            }
        }
        row_begin_.push_back(static_cast<std::int64_t>(row_columns_.size()));
    }
    columns_ = row_columns_;
    sort_unique(columns_);
    for (const std::int32_t column : row_columns_) {
        const auto place = std::ranges::lower_bound(columns_, column);
        positions_.push_back(static_cast<std::int32_t>(place - columns_.begin()));
    }
}

OutlierElements::Bounds OutlierElements::bounds(std::int64_t row) const noexcept {
    if (per_row_) return {row_begin_[static_cast<std::size_t>(row)], row_begin_[static_cast<std::size_t>(row) + 1]};
    const auto width = static_cast<std::int64_t>(columns_.size());
    return {row * width, (row + 1) * width};
}

OutlierElements::Row OutlierElements::row(std::int64_t index) const noexcept {
    const auto [begin, end] = bounds(index);
    const auto values =
        std::span(values_).subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(end - begin));
    return {values, per_row_ ? positions_.data() + begin : nullptr};
}

std::optional<float> OutlierElements::absmax_outside(std::int64_t row) const noexcept {
    if (largest_regular_.empty()) return std::nullopt;
    const float largest = largest_regular_[static_cast<std::size_t>(row)];
    // It may lie in a column that holds an outlier in another row.
    for (const float value : this->row(row).values) {
        if (std::fabs(value) == largest && largest != 0.0F) return std::nullopt;
    }
    return largest;
}

std::span<const std::int32_t> OutlierElements::columns_of(std::int64_t row) const noexcept {
    if (!per_row_) return columns_;
    const auto [begin, end] = bounds(row);
    return std::span(row_columns_).subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(end - begin));
}

}  // namespace octavo::cpu
