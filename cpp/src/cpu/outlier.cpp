#include "cpu/outlier.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <iterator>
#include <memory>
#include <mutex>
#include <numeric>
#include <utility>

#include "backend.hpp"
#include "cpu/rows.hpp"
#include "cpu/threads.hpp"
#include "octavo/outlier.hpp"

namespace octavo::cpu {
namespace {

// The magnitude of element `index` as a bit pattern.
std::uint32_t magnitude_bits(DType dtype, const void* values, std::int64_t index) {
    if (dtype == DType::f32) {
        std::uint32_t bits = 0;
        __builtin_memcpy(&bits, static_cast<const char*>(values) + index * 4, 4);
        return bits & 0x7FFFFFFFU;
    }
    std::uint16_t bits = 0;
    __builtin_memcpy(&bits, static_cast<const char*>(values) + index * 2, 2);
    return bits & 0x7FFFU;
}

// The least bit pattern of a magnitude that is not below the threshold. Inf and NaN never are.
std::uint32_t limit_of(DType dtype, float threshold) {
    std::uint32_t bits = 0;
    kernels().store(&threshold, 1, dtype, &bits, 1);
    bits &= dtype == DType::f32 ? 0x7FFFFFFFU : 0x7FFFU;  // no sign: -0 is a threshold too
    return magnitude_of(dtype, bits) < threshold ? bits + 1 : bits;
}

std::uint32_t infinity_of(DType dtype) { return limit_of(dtype, INFINITY); }

// How many halves are below a bound.
std::int64_t below(const std::vector<std::uint16_t>& halves, int bound) {
    return kernels().count_below(DType::bf16, halves.data(), std::ssize(halves), static_cast<std::uint16_t>(bound));
}

constexpr float number_of(int half) {
    constexpr int infinity = 0x7F80;  // NaN is as large
    return std::bit_cast<float>(static_cast<std::uint32_t>(std::min(half, infinity)) << 16U);
}

}  // namespace

Criterion::Criterion(DType dtype, std::int64_t k, std::int64_t rows, const LinearOptions& options)
    : dtype_(dtype),
      k_(k),
      relative_(times_median(options, rows)),
      limit_(limit_of(dtype, options.threshold)),
      most_(most_outliers(options, k)),
      halves_(options.relative > 0.0F ? static_cast<std::size_t>(k) : 0),
      mask_(static_cast<std::size_t>(k)) {}

// By counting those below a bound, which moves from the last median to where the rank would lie among normal values,
// and a little beyond, until the half is bracketed; then by halving the bracket.
void Criterion::narrow(int width) {
    constexpr std::int64_t sharers = 430;  // near the median of magnitudes, a 430th of normal values share a half
    int bound = median_;
    for (int beyond = 1; high_ - low_ > width; beyond = std::min(2 * beyond, 0x8000)) {
        bound = low_ > 0 && high_ < 0x8000 ? low_ + (high_ - low_) / 2 : std::clamp(bound, low_ + 1, high_ - 1);
        const std::int64_t smaller = below(halves_, bound);
        const bool above = smaller <= rank_;
        (above ? low_ : high_) = bound;
        bound += static_cast<int>((rank_ - smaller) * sharers / std::ssize(halves_)) + (above ? beyond : -beyond);
    }
    median_ = low_ + (high_ - low_) / 2;
}

std::uint32_t Criterion::limit_at(int median) const {
    return std::max(limit_of(dtype_, relative_ * number_of(median)), 1U);
}

std::uint32_t Criterion::least_limit(const void* values, std::uint32_t largest) {
    low_ = high_ = 0;
    if (halves_.empty()) return limit_;
    // The median of rows without outliers need not be known: that it is large enough is one count. (Zeros, which do not
    // take part in it, would only raise it.)
    const float magnitude = magnitude_of(dtype_, largest);
    const float least = magnitude / relative_;
    if (least < 0x1p120F) {
        const auto enough = static_cast<std::uint16_t>((std::bit_cast<std::uint32_t>(least) >> 16U) + 2);
        const bool is_enough = kernels().count_below(dtype_, values, k_, enough) <= (k_ - 1) / 2;
        if (is_enough && relative_ * number_of(enough) > magnitude) return largest + 1;
    }
    kernels().upper_halves(dtype_, values, k_, halves_.data());
    std::int64_t zeros = below(halves_, 1);
    // A float32 can be smaller than any half and yet not be zero.
    for (std::int64_t j = 0; zeros > 0 && dtype_ == DType::f32 && j < k_; ++j) {
        zeros -= halves_[static_cast<std::size_t>(j)] == 0 && magnitude_bits(dtype_, values, j) != 0 ? 1 : 0;
    }
    if (zeros == k_) return infinity_of(dtype_);
    rank_ = zeros + (k_ - zeros - 1) / 2;
    high_ = 0x8000;
    constexpr int width = 16;  // an eighth: few values are as close to the limit
    narrow(width);
    return limit_at(low_);
}

std::span<const std::int32_t> Criterion::find(const void* values) {
    found_.clear();
    const std::uint32_t largest = kernels().largest_magnitude(dtype_, values, k_);
    const std::uint32_t limit = least_limit(values, largest);
    if (largest < limit) return found_;
    kernels().mark_magnitudes(dtype_, values, k_, limit, mask_.data());
    const auto marks_at = [&](std::int64_t j) {  // eight of them
        std::uint64_t marks = 0;
        __builtin_memcpy(&marks, mask_.data() + j, sizeof marks);
        return marks;
    };
    std::int64_t j = 0;
    for (; j + 32 <= k_; j += 32) {  // marks are few
        if ((marks_at(j) | marks_at(j + 8) | marks_at(j + 16) | marks_at(j + 24)) == 0) continue;
        for (std::int64_t part = j; part < j + 32; part += 8) {
            for (std::uint64_t marks = marks_at(part); marks != 0; marks &= marks - 1) {
                found_.push_back(static_cast<std::int32_t>(part + std::countr_zero(marks) / 8));
            }
        }
    }
    for (; j < k_; ++j) {
        if (mask_[static_cast<std::size_t>(j)] != 0) found_.push_back(static_cast<std::int32_t>(j));
    }
    if (high_ - low_ > 1) {  // the median is not known to the last place, which few rows need
        const auto is_below = [&](std::uint32_t bound) {
            return
                [this, values, bound](std::int32_t column) { return magnitude_bits(dtype_, values, column) < bound; };
        };
        if (std::ranges::any_of(found_, is_below(limit_at(high_ - 1)))) {
            narrow(1);
            std::erase_if(found_, is_below(limit_at(low_)));
        }
    }
    if (std::cmp_greater(found_.size(), most_)) keep_largest(values);
    return found_;
}

void Criterion::keep_largest(const void* values) {
    const std::uint32_t infinity = infinity_of(dtype_);
    const auto magnitude = [&](std::int32_t j) { return std::min(magnitude_bits(dtype_, values, j), infinity); };
    const auto is_before = [&](std::int32_t a, std::int32_t b) {
        return magnitude(a) != magnitude(b) ? magnitude(a) > magnitude(b) : a < b;
    };
    const auto infinite = std::ranges::count_if(found_, [&](std::int32_t j) { return magnitude(j) == infinity; });
    const auto end = found_.begin() + std::max<std::int64_t>(most_, infinite);
    std::ranges::nth_element(found_, end, is_before);
    found_.erase(end, found_.end());
    std::ranges::sort(found_);
}

std::vector<std::int32_t> outlier_columns(const ConstMatrix& x, const LinearOptions& options) {
    if (x.rows == 0 || x.cols == 0) return {};
    RowReader first(x);
    Criterion criterion(first.dtype(), x.cols, x.rows, options);
    if (x.rows == 1) {
        const auto found = criterion.find(first.row(0));
        return {found.begin(), found.end()};
    }
    std::vector<std::uint32_t> maxima(static_cast<std::size_t>(x.cols));  // or, of 16 bits, half of it
    std::mutex mutex;                                                     // guards maxima
    parallel_for(x.rows, row_grain(x.cols), [&](std::int64_t begin, std::int64_t end) {
        RowReader reader(x);
        std::vector<std::uint32_t> mine(maxima.size());
        for (std::int64_t i = begin; i < end; ++i) {
            kernels().raise_maxima(reader.dtype(), reader.row(i), x.cols, mine.data());
        }
        const std::scoped_lock lock(mutex);
        kernels().raise_maxima(reader.dtype(), mine.data(), x.cols, maxima.data());
    });
    const auto found = criterion.find(maxima.data());
    return {found.begin(), found.end()};
}

void Backend::find_outliers(ConstMatrix x, const LinearOptions& options, Vector columns, Vector count,
                            Stream /*stream*/) const {
    const auto found = outlier_columns(x, options);
    for (std::size_t i = 0; i < found.size(); ++i) put(columns, static_cast<std::int64_t>(i), found[i]);
    put(count, 0, static_cast<std::int32_t>(found.size()));
}

OutlierElements::OutlierElements(const ConstMatrix& x, const WeightView& weight, const LinearOptions& options)
    : x_(x), options_(options), per_row_(options.outliers == Outliers::rows) {
    switch (options.outliers) {
        case Outliers::none: return;
        case Outliers::columns: columns_ = outlier_columns(x, options); break;
        case Outliers::static_:
            for (std::int64_t i = 0; i < weight.outlier_columns.size; ++i) {
                columns_.push_back(get<std::int32_t>(weight.outlier_columns, i));
            }
            break;
        case Outliers::rows:
            found_ = x.cols == 0;
            row_begin_.resize(static_cast<std::size_t>(x.rows) + 1);
            return;
    }
    // Whole cache lines; of several no power of two, or columns would push each other out of the cache.
    stride_ = x.rows <= 16 ? 16 : (x.rows + 15) / 16 * 16 + 16;
    shared_ = Scratch<float>(stride_ * std::ssize(columns_));
}

std::function<std::span<const std::int32_t>(std::int64_t)> OutlierElements::finder(std::int64_t begin) {
    if (per_row_ && found_) {
        return [this](std::int64_t row) { return columns_of(row); };
    }
    if (!per_row_) {
        return [this](std::int64_t row) {
            if (!columns_.empty()) load_columns(x_, row, columns_, shared_.data() + row, stride_);
            return std::span<const std::int32_t>(columns_);
        };
    }
    struct Search {
        Search(const ConstMatrix& x, const LinearOptions& options)
            : rows(x), criterion(rows.dtype(), x.cols, 1, options) {}
        RowReader rows;
        Criterion criterion;
    };
    Piece* piece = nullptr;
    {
        const std::scoped_lock lock(mutex_);
        piece = &pieces_.emplace_back(Piece{.begin = begin, .columns = {}, .values = {}});
    }
    return [this, piece, search = std::make_shared<Search>(x_, options_)](std::int64_t row) {
        const auto found = search->criterion.find(search->rows.row(row));
        row_begin_[static_cast<std::size_t>(row) + 1] = std::ssize(found);
        piece->columns.insert(piece->columns.end(), found.begin(), found.end());
        piece->values.resize(piece->columns.size());
        load_columns(x_, row, found, piece->values.data() + piece->values.size() - found.size(), 1);
        return found;
    };
}

void OutlierElements::find_all() {
    if (!per_row_ || found_) return;
    parallel_for(x_.rows, row_grain(x_.cols), [&](std::int64_t begin, std::int64_t end) {
        const auto find = finder(begin);
        for (std::int64_t i = begin; i < end; ++i) find(i);
    });
    gather();
}

void OutlierElements::gather() {
    if (!per_row_ || found_) return;
    found_ = true;
    std::partial_sum(row_begin_.begin(), row_begin_.end(), row_begin_.begin());
    pieces_.sort([](const Piece& a, const Piece& b) { return a.begin < b.begin; });
    std::vector<std::int32_t> places(static_cast<std::size_t>(x_.cols), -1);  // of a column in columns_
    for (const Piece& piece : pieces_) {
        values_.insert(values_.end(), piece.values.begin(), piece.values.end());
        row_columns_.insert(row_columns_.end(), piece.columns.begin(), piece.columns.end());
        for (const std::int32_t column : piece.columns) places[static_cast<std::size_t>(column)] = 0;
    }
    if (values_.empty()) return;
    for (std::size_t j = 0; j < places.size(); ++j) {
        if (places[j] < 0) continue;
        places[j] = static_cast<std::int32_t>(columns_.size());
        columns_.push_back(static_cast<std::int32_t>(j));
    }
    for (const std::int32_t column : row_columns_) positions_.push_back(places[static_cast<std::size_t>(column)]);
}

OutlierElements::Bounds OutlierElements::bounds(std::int64_t row) const noexcept {
    const auto index = static_cast<std::size_t>(row);
    const auto begin = static_cast<std::size_t>(row_begin_[index]);
    return {begin, static_cast<std::size_t>(row_begin_[index + 1]) - begin};
}

OutlierElements::Row OutlierElements::row(std::int64_t index) const noexcept {
    if (!per_row_) return {std::ssize(columns_), nullptr};
    const auto [begin, size] = bounds(index);
    return {static_cast<std::int64_t>(size), positions_.data() + begin};
}

void OutlierElements::describe(std::int64_t first, EpilogueTile& tile) const noexcept {
    if (per_row_) {
        const std::int64_t* const begin = row_begin_.data() + first;
        if (begin[0] == begin[tile.rows]) return;  // then nothing is to be looked up for each row
        tile.outlier_x = values_.data();
        tile.outlier_begin = begin;
        tile.outlier_places = positions_.data();
        tile.outlier_columns = row_columns_.data();
    } else if (!columns_.empty()) {
        tile.outliers = std::ssize(columns_);
        tile.outlier_x = shared_.data() + first;
        tile.outlier_x_stride = stride_;
        tile.outlier_columns = columns_.data();
    }
}

std::span<const std::int32_t> OutlierElements::columns_of(std::int64_t row) const noexcept {
    const auto [begin, size] = bounds(row);
    return std::span(row_columns_).subspan(begin, size);
}

}  // namespace octavo::cpu
