// Which elements of X are outliers, and their values.
#pragma once

#include <cstdint>
#include <functional>
#include <list>
#include <mutex>
#include <span>
#include <vector>

#include "cpu/kernels/table.hpp"
#include "cpu/scratch.hpp"
#include "octavo/linear.hpp"
#include "octavo/types.hpp"

namespace octavo::cpu {

// The criterion of octavo/outlier.hpp, over the largest magnitudes of the columns of `rows` rows.
class Criterion {
public:
    Criterion(DType dtype, std::int64_t k, std::int64_t rows, const LinearOptions& options);

    // Which of k values of the dtype are outliers, ascending. Signs do not matter. Valid until the next call.
    std::span<const std::int32_t> find(const void* values);

private:
    // The least magnitude of an outlier, where `median`, a half (Kernels::upper_halves), is that of the magnitudes.
    [[nodiscard]] float limit_at(int median) const;
    // The least median, a half, beside which a value of this magnitude is no outlier.
    [[nodiscard]] int least_median(float magnitude) const;
    [[nodiscard]] float magnitude(const void* values, std::int64_t index) const;
    // A bound that the median is not below.
    [[nodiscard]] int lower_bound(const void* halves, Survey survey);
    // Leave out what is no outlier of the candidates, beside a median of at least `low`.
    void decide(const void* values, const void* halves, int low);
    void keep_largest(const void* values);

    DType dtype_;
    std::int64_t k_;
    float relative_;  // times f(m); 0 where the criterion is absolute
    float threshold_;
    std::int64_t most_;
    int bound_ = 0x3EEC;     // that the next median will hardly be below; at first half an octave below normal values'
    std::int64_t rank_ = 0;  // how many are smaller than the median
    std::vector<std::uint16_t> halves_;  // of values that are not bfloat16
    Scratch<std::int32_t> places_;       // of those that may be outliers
    std::vector<std::int32_t> found_;
};

// The outlier columns of X, ascending.
std::vector<std::int32_t> outlier_columns(const ConstMatrix& x, const LinearOptions& options);

// The elements of X that the 16-bit product takes, under any of the outlier policies. Their values are gathered while X
// is quantized, when its row is near, and under `rows` they are found then, so that it is read once: by what `finder`
// gives, and then `gather` comes before all else.
class OutlierElements {
public:
    OutlierElements(const ConstMatrix& x, const WeightView& weight, const LinearOptions& options);

    // RowTraits::excluded: the columns of each row's own elements. Any thread may ask for one, and each row is to be
    // asked for once; under other policies than `rows`, as often as one likes.
    std::function<std::span<const std::int32_t>(std::int64_t row)> finder(std::int64_t begin);
    // Put together what has been found, or find all of it first.
    void gather();
    void find_all();

    [[nodiscard]] bool are_shared() const noexcept { return !per_row_; }

    // Every column with such an element, ascending.
    [[nodiscard]] std::span<const std::int32_t> columns() const noexcept { return columns_; }

    // Row i's own elements.
    struct Row {
        std::int64_t count;
        const std::int32_t* positions;  // of their columns in columns(); null: 0, 1, 2, ...
    };
    [[nodiscard]] Row row(std::int64_t index) const noexcept;

    // How many elements the rows [begin, end) have of their own; only where they are not shared.
    [[nodiscard]] std::int64_t count(std::int64_t begin, std::int64_t end) const noexcept {
        return row_begin_[static_cast<std::size_t>(end)] - row_begin_[static_cast<std::size_t>(begin)];
    }

    // Those of the rows from `first` on, as the epilogue takes them.
    void describe(std::int64_t first, EpilogueTile& tile) const noexcept;

private:
    struct Bounds {
        std::size_t begin;
        std::size_t size;
    };
    // Only under `rows`.
    [[nodiscard]] Bounds bounds(std::int64_t row) const noexcept;
    // The columns of row i's own elements. Only under `rows`.
    [[nodiscard]] std::span<const std::int32_t> columns_of(std::int64_t row) const noexcept;
    // What has been found of the rows from `begin` on.
    struct Piece {
        std::int64_t begin;
        std::vector<std::int32_t> columns;
        std::vector<float> values;
    };

    const ConstMatrix& x_;
    const LinearOptions& options_;
    bool per_row_;
    std::vector<std::int32_t> columns_;
    Scratch<float> shared_{0};  // the values, column after column, stride_ apart; under `rows` there are none
    std::int64_t stride_ = 0;
    // Only under `rows`: the values, where each row's begin, their columns, and the places of those in columns_.
    std::vector<float> values_;
    bool found_ = false;
    std::vector<std::int64_t> row_begin_;
    std::vector<std::int32_t> row_columns_;
    std::vector<std::int32_t> positions_;
    std::mutex mutex_;  // guards pieces_, whose elements stay where they are
    std::list<Piece> pieces_;
};

}  // namespace octavo::cpu
