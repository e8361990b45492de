#include "cpu/outlier.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <iterator>
#include <limits>
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

constexpr int infinity = 0x7F80;  // as a half
constexpr int beyond_all = 0x8000;

constexpr float number_of(int half) {  // NaN is as large as Inf
    return std::bit_cast<float>(static_cast<std::uint32_t>(std::min(half, infinity)) << 16U);
}

int half_of(float magnitude) { return static_cast<int>(std::bit_cast<std::uint32_t>(magnitude) >> 16U); }

Survey survey_at(const void* halves, std::int64_t size, int bound) {
    return kernels().survey(halves, size, static_cast<std::uint16_t>(bound));
}

}  // namespace

Criterion::Criterion(DType dtype, std::int64_t k, std::int64_t rows, const LinearOptions& options)
    : dtype_(dtype),
      k_(k),
      relative_(times_median(options, rows)),
      threshold_(std::fabs(options.threshold)),  // -0 is a threshold, too
      most_(most_outliers(options, k)),
      halves_(dtype != DType::bf16 ? static_cast<std::size_t>(k) : 0),
      places_(k) {}

float Criterion::magnitude(const void* values, std::int64_t index) const {
    const std::uint32_t bits = magnitude_bits(dtype_, values, index);
    if (dtype_ == DType::f16) return magnitude_of(dtype_, bits);
    return std::bit_cast<float>(dtype_ == DType::f32 ? bits : bits << 16U);
}

float Criterion::limit_at(int median) const {  // zero never is one
    return std::max(relative_ * number_of(median), std::numeric_limits<float>::denorm_min());
}

int Criterion::least_median(float magnitude) const {
    int half = std::min(half_of(magnitude / relative_), infinity);  // but for how the product is rounded
    while (half > 0 && magnitude < limit_at(half - 1)) --half;
    while (half <= infinity && !(magnitude < limit_at(half))) ++half;
    return half <= infinity ? half : beyond_all;
}

// One walk most of the time: medians of rows that follow each other are alike, and since outliers are many times as
// large, a bound will do that is merely near. Where the last row's is not, it moves to where the rank would lie among
// normal values, and a little beyond, until the median is bracketed; then the bracket is halved.
int Criterion::lower_bound(const void* halves, Survey survey) {
    constexpr std::int64_t sharers = 430;  // near the median of magnitudes, a 430th of normal values share a half
    constexpr int near = 64;               // half an octave
    const std::int64_t zeros = survey.zeros;
    int low = 0;
    int high = beyond_all;
    const auto distance = [&](std::int64_t below) {
        return static_cast<int>((rank_ - below) * sharers / (k_ - zeros));
    };
    for (int beyond = near;; beyond = std::min(2 * beyond, beyond_all)) {
        const bool is_below = survey.below <= rank_;
        (is_below ? low : high) = bound_;
        const int away = distance(survey.below);
        const int expected = std::clamp(bound_ + away - near, 1, infinity);
        // Whether it will do: nothing is as large as an outlier, or few values lie between it and the median.
        if (is_below && (number_of(survey.largest + 1) <= limit_at(low) || away < 3 * near)) {
            bound_ = expected;
            return low;
        }
        if (high - low <= near) {
            bound_ = std::max(low, 1);
            return low;
        }
        bound_ = low > 0 && high < beyond_all
                     ? low + (high - low) / 2
                     : std::clamp(expected + (is_below ? beyond - near : near - beyond), low + 1, high - 1);
        survey = survey_at(halves, k_, bound_);
    }
}

// A candidate is none if the median is at least so much: each such count decides about others, too.
void Criterion::decide(const void* values, const void* halves, int low) {
    const auto leave_out = [&](float limit) {
        std::erase_if(found_, [&](std::int32_t column) { return magnitude(values, column) < limit; });
    };
    leave_out(limit_at(low));
    int high = beyond_all;
    for (auto next = found_.begin(); next != found_.end();) {
        const int median = least_median(magnitude(values, *next));
        if (median >= high) {
            ++next;
            continue;
        }
        if (survey_at(halves, k_, median).below > rank_) {
            high = median;
            ++next;
            continue;
        }
        const auto known = next - found_.begin();  // all before are outliers, however large the median
        leave_out(limit_at(median));
        next = found_.begin() + known;
    }
}

std::span<const std::int32_t> Criterion::find(const void* values) {
    found_.clear();
    const void* halves = values;
    if (dtype_ != DType::bf16) {
        kernels().upper_halves(dtype_, values, k_, halves_.data());
        halves = halves_.data();
    }
    Survey survey = survey_at(halves, k_, bound_);
    // A float32 can be smaller than any half and yet not be zero.
    for (std::int64_t j = 0; survey.zeros > 0 && dtype_ == DType::f32 && j < k_; ++j) {
        survey.zeros -= halves_[static_cast<std::size_t>(j)] == 0 && magnitude_bits(dtype_, values, j) != 0 ? 1 : 0;
    }
    const bool is_relative = relative_ > 0.0F;
    if (is_relative && survey.zeros == k_) return found_;
    rank_ = survey.zeros + (k_ - survey.zeros - 1) / 2;
    const int low = is_relative && survey.largest > 0 ? lower_bound(halves, survey) : 0;
    const float limit = is_relative ? limit_at(low) : threshold_;
    if (survey.largest < half_of(limit)) return found_;
    const auto count = kernels().find_halves(halves, k_, static_cast<std::uint16_t>(half_of(limit)), places_.data());
    found_.assign(places_.data(), places_.data() + count);
    if (is_relative) {
        decide(values, halves, low);
    } else {
        std::erase_if(found_, [&](std::int32_t column) { return magnitude(values, column) < threshold_; });
    }
    if (std::cmp_greater(found_.size(), most_)) keep_largest(values);
    return found_;
}

void Criterion::keep_largest(const void* values) {
    const auto of = [&](std::int32_t j) {
        const float value = magnitude(values, j);
        return std::isnan(value) ? INFINITY : value;
    };
    const auto is_before = [&](std::int32_t a, std::int32_t b) { return of(a) != of(b) ? of(a) > of(b) : a < b; };
    const auto infinite = std::ranges::count_if(found_, [&](std::int32_t j) { return std::isinf(of(j)); });
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
        if (found.empty()) return found;
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
