// Which elements of X are outliers, and their values.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "octavo/linear.hpp"
#include "octavo/types.hpp"

namespace octavo::cpu {

// What one pass over X finds of its magnitudes.
struct OutlierScan {
    OutlierScan(const ConstMatrix& x, float threshold);

    std::vector<std::int32_t> columns;   // O of paper section 3.2, ascending
    std::vector<float> largest_regular;  // of each row: its largest magnitude below the threshold
};

// The elements of X that the 16-bit product takes, under any of the outlier policies.
class OutlierElements {
public:
    OutlierElements(const ConstMatrix& x, const WeightView& weight, const LinearOptions& options);

    // Every column with such an element, ascending.
    [[nodiscard]] std::span<const std::int32_t> columns() const noexcept { return columns_; }

    // The columns of row i's own elements: all of columns(), except under the policy `rows`.
    [[nodiscard]] std::span<const std::int32_t> columns_of(std::int64_t row) const noexcept;

    // Whether rows have columns of their own: the policy `rows`.
    [[nodiscard]] bool per_row() const noexcept { return per_row_; }

    // Row i's own elements.
    struct Row {
        std::span<const float> values;
        const std::int32_t* positions;  // of their columns in columns(); null: 0, 1, 2, ...
    };
    [[nodiscard]] Row row(std::int64_t index) const noexcept;

    // The largest magnitude of row i outside columns_of(i), where finding the outliers has shown it.
    [[nodiscard]] std::optional<float> absmax_outside(std::int64_t row) const noexcept;

private:
    struct Bounds {
        std::int64_t begin;
        std::int64_t end;
    };
    [[nodiscard]] Bounds bounds(std::int64_t row) const noexcept;
    void gather(const ConstMatrix& x);
    void gather_per_row(const ConstMatrix& x, float threshold);

    std::vector<std::int32_t> columns_;
    std::vector<float> values_;           // row after row
    std::vector<float> largest_regular_;  // as in OutlierScan; empty where there was none
    bool per_row_ = false;
    // Only under `rows`: where each row's elements begin, their columns, and the places of those in columns_.
    std::vector<std::int64_t> row_begin_;
    std::vector<std::int32_t> row_columns_;
    std::vector<std::int32_t> positions_;
};

}  // namespace octavo::cpu
