#include "cpu/outlier.hpp"

#include <algorithm>

#include "cpu/operations.hpp"
#include "cpu/rows.hpp"
#include "cpu/threads.hpp"

namespace octavo::cpu {
namespace {

// Columns that one thread looks at: a piece of each row that stays in the first-level cache.
constexpr std::int64_t column_piece = 512;

}  // namespace

std::vector<std::int32_t> outlier_columns(const ConstMatrix& x, float threshold) {
    std::vector<std::uint8_t> mask(static_cast<std::size_t>(x.cols));
    // Threads share the columns, not the rows, so that no two of them write the same mark.
    const std::int64_t grain = std::max(column_piece, (std::int64_t{1} << 16) / std::max<std::int64_t>(x.rows, 1));
    parallel_for(x.cols, grain, [&](std::int64_t begin, std::int64_t end) {
        const Scratch<float> row(column_piece);
        for (std::int64_t first = begin; first < end; first += column_piece) {
            const std::int64_t size = std::min(column_piece, end - first);
            for (std::int64_t i = 0; i < x.rows; ++i) {
                load_row(x, i, first, size, row.data());
                kernels().mark_outliers(row.data(), size, threshold, mask.data() + first);
            }
        }
    });
    std::vector<std::int32_t> columns;
    for (std::size_t j = 0; j < mask.size(); ++j) {
        if (mask[j] != 0) columns.push_back(static_cast<std::int32_t>(j));
    }
    return columns;
}

void find_outliers(ConstMatrix x, float threshold, Vector columns, Vector count) {
    const auto found = outlier_columns(x, threshold);
    for (std::size_t i = 0; i < found.size(); ++i) put(columns, static_cast<std::int64_t>(i), found[i]);
    put(count, 0, static_cast<std::int32_t>(found.size()));
}

OutlierElements::OutlierElements(const ConstMatrix& x, const WeightView& weight, const LinearOptions& options) {
    switch (options.outliers) {
        case Outliers::none: break;
        case Outliers::columns:
            columns_ = outlier_columns(x, options.threshold);
            gather(x);
            break;
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
    const Scratch<float> row(x.cols);
    std::vector<std::uint8_t> mask(static_cast<std::size_t>(x.cols));
    row_begin_.push_back(0);
    for (std::int64_t i = 0; i < x.rows; ++i) {
        load_row(x, i, 0, x.cols, row.data());
        std::ranges::fill(mask, std::uint8_t{0});
        kernels().mark_outliers(row.data(), x.cols, threshold, mask.data());
        for (std::int64_t j = 0; j < x.cols; ++j) {
            if (mask[static_cast<std::size_t>(j)] == 0) continue;
            row_columns_.push_back(static_cast<std::int32_t>(j));
            values_.push_back(row[j]);
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

std::span<const std::int32_t> OutlierElements::columns_of(std::int64_t row) const noexcept {
    if (!per_row_) return columns_;
    const auto [begin, end] = bounds(row);
    return std::span(row_columns_).subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(end - begin));
}

}  // namespace octavo::cpu
