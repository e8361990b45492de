// find_outliers: literal cases at and around the threshold, then the reference.
#include <algorithm>
#include <bit>
#include <cmath>
#include <iterator>
#include <limits>
#include <utility>
#include <vector>

#include "arrays.hpp"
#include "calls.hpp"
#include "check.hpp"
#include "octavo/outlier.hpp"
#include "reference.hpp"

using octavo::DType;

namespace {

constexpr float quiet_nan = std::numeric_limits<float>::quiet_NaN();
constexpr double infinity = std::numeric_limits<double>::infinity();

std::vector<std::int32_t> find_outliers(const Array& x, const octavo::LinearOptions& options,
                                        Layout layout = Layout::contiguous) {
    const Array columns(DType::i32, 1, x.matrix().cols, layout);
    const Array count(DType::i32, 1, 1, layout);
    octavo::find_outliers(x.matrix(), options, columns.vector(), count.vector());
    std::vector<std::int32_t> found(static_cast<std::size_t>(count.get(0)));
    for (std::size_t i = 0; i < found.size(); ++i) {
        found[i] = static_cast<std::int32_t>(columns.get(static_cast<std::int64_t>(i)));
    }
    return found;
}

std::vector<std::int32_t> find_outliers(const Array& x, float threshold, Layout layout = Layout::contiguous) {
    return find_outliers(x, {.threshold = threshold}, layout);
}

using Columns = std::vector<std::int32_t>;

// The criterion of octavo/outlier.hpp, by sorting.
Columns expected_columns(const Values& x, const octavo::LinearOptions& options) {
    std::vector<float> maxima(static_cast<std::size_t>(x.cols));
    std::vector<float> sorted;
    for (std::int64_t j = 0; j < x.cols; ++j) {
        float& largest = maxima[static_cast<std::size_t>(j)];
        for (std::int64_t i = 0; i < x.rows; ++i) largest = std::max(largest, static_cast<float>(std::fabs(x(i, j))));
        if (largest > 0.0F) sorted.push_back(largest);
    }
    std::ranges::sort(sorted);
    float limit = options.threshold;
    if (options.relative > 0.0F) {
        const std::uint32_t bits = std::bit_cast<std::uint32_t>(sorted[(sorted.size() - 1) / 2]) & 0xFFFF0000U;
        limit = octavo::times_median(options, x.rows) * std::bit_cast<float>(bits);
    }
    std::vector<std::int32_t> found;
    for (std::int32_t j = 0; std::cmp_less(j, maxima.size()); ++j) {
        if (maxima[static_cast<std::size_t>(j)] >= limit) found.push_back(j);
    }
    std::ranges::sort(found, {}, [&](std::int32_t j) { return std::pair(-maxima[static_cast<std::size_t>(j)], j); });
    const auto most = static_cast<std::size_t>(octavo::most_outliers(options, x.cols));
    if (found.size() > most) found.resize(most);
    std::ranges::sort(found);
    return found;
}

}  // namespace

TEST(literal) {
    const float below = 5.9999995F;
    const Array x(DType::f32, Values(2, 8,
                                     {0, 6, below, 1, 2, 3, 7, 0,  //
                                      0, 1, -below, -6, 2, quiet_nan, -1e30, -infinity}));
    CHECK((find_outliers(x, 6.0F) == Columns{1, 3, 5, 6, 7}));
    CHECK((find_outliers(x, 0.0F) == Columns{0, 1, 2, 3, 4, 5, 6, 7}));
    CHECK((find_outliers(x, static_cast<float>(infinity)) == Columns{5, 7}));
    CHECK((find_outliers(x, 2.0F) == Columns{1, 2, 3, 4, 5, 6, 7}));
}

TEST(relative_and_capped) {
    // Maxima 1, 2, 3, 40: the lower median is 2, f(2) = sqrt(5), so t = 4 * 2.236 * 2 = 17.9.
    CHECK(
        (find_outliers(Array(DType::f32, Values(2, 4, {1, -2, 3, 17, 0, 1, 3, -40})), {.relative = 4}) == Columns{3}));
    // One row, without its zeros: f(1) = sqrt(10), t = 3.16 * 4.
    CHECK((find_outliers(Array(DType::f16, Values(1, 5, {0, 2, 4, 30, 0})), {.relative = 1}) == Columns{3}));
    CHECK(find_outliers(Array(DType::bf16, Values(3, 4)), {.relative = 4}).empty());
    // A median whose upper half is 0: all that is not 0.
    CHECK((find_outliers(Array(DType::f32, Values(1, 4, {1e-42, 0, -2e-42, 1})), {.relative = 4}) == Columns{0, 2, 3}));
    const Array ties(DType::f32, Values(1, 6, {7, 9, 7, 7, 1, 8}));
    CHECK((find_outliers(ties, {.cap = 0.5}) == Columns{0, 1, 5}));
    CHECK(find_outliers(ties, {.cap = 0}).empty());
    const Array infinite(DType::f32, Values(1, 5, {7, quiet_nan, -infinity, 8, 9}));
    CHECK((find_outliers(infinite, {.cap = 0.2}) == Columns{1, 2}));
    CHECK((find_outliers(infinite, {.cap = 0.6}) == Columns{1, 2, 4}));
}

TEST(criteria_match_sorting) {
    Random random(67);
    for (const DType dtype : float_dtypes) {
        for (const std::int64_t m : {1, 2, 40}) {
            for (const std::int64_t k : {1, 33, 600, 5000, 20000}) {
                if (m == 40 && k > 600) continue;  // nothing new, and slow where a device is emulated
                for (const octavo::LinearOptions& options :
                     {octavo::LinearOptions{.relative = 2}, octavo::LinearOptions{.relative = 0.5F, .cap = 0.1},
                      octavo::LinearOptions{.threshold = 1, .cap = 0.02}}) {
                    const check::Context context(name_of(dtype), " ", m, " x ", k, " relative ", options.relative);
                    Values values = random_normal(random, m, k, 2);
                    for (int i = 0; i < 9; ++i) values(random.integer(0, m - 1), random.integer(0, k - 1)) = 9;
                    const Array x(dtype, values, layouts[static_cast<std::size_t>(k) % std::size(layouts)]);
                    CHECK(find_outliers(x, options) == expected_columns(x.values(), options));
                }
            }
        }
    }
}

TEST(nothing_to_find) {
    CHECK(find_outliers(Array(DType::f32, Values(3, 4)), 6.0F).empty());
    CHECK(find_outliers(Array(DType::f16, 0, 4), 0.0F).empty());
    CHECK(find_outliers(Array(DType::bf16, 4, 0), 6.0F).empty());
}

TEST(matches_the_reference) {
    Random random(61);
    for (const DType dtype : float_dtypes) {
        for (const std::int64_t m : {1, 3, 70}) {
            for (const std::int64_t k : {1, 63, 64, 65, 513, 1100}) {
                for (const Layout layout : layouts) {
                    const check::Context context(name_of(dtype), " ", m, " x ", k, " layout ", check::show(layout));
                    Values values = random_normal(random, m, k, 2);
                    for (int i = 0; i < 5; ++i) values(random.integer(0, m - 1), random.integer(0, k - 1)) = 6;
                    const Array x(dtype, values, layout);
                    const std::string before = x.bytes();
                    CHECK(find_outliers(x, 6.0F, layout) == reference::find_outliers(x.values(), 6.0));
                    CHECK(x.bytes() == before);
                }
            }
        }
    }
}

TEST(argument_errors) {
    const Array x(DType::f32, 2, 3);
    const Array columns(DType::i32, 1, 3);
    const Array count(DType::i32, 1, 1);
    CHECK_THROWS(find_outliers(x, -1.0F), value, "find_outliers: threshold: expected a number >= 0, got -1");
    CHECK_THROWS(find_outliers(x, quiet_nan), value, "got nan");
    CHECK_THROWS(find_outliers(x, {.relative = -1}), value, "find_outliers: relative: expected a finite number >= 0");
    CHECK_THROWS(find_outliers(x, {.cap = 1.5}), value, "find_outliers: cap: expected a number from 0 to 1, got 1.5");
    CHECK_THROWS(find_outliers(Array(DType::i32, 1, 1), 6.0F), type, "find_outliers: x: expected dtype float32");
    CHECK_THROWS(octavo::find_outliers(x.matrix(), {}, count.vector(), count.vector()), value,
                 "find_outliers: columns: expected shape [3], got [1]");
    CHECK_THROWS(octavo::find_outliers(x.matrix(), {}, columns.vector(), columns.vector()), value,
                 "find_outliers: count: expected shape [1], got [3]");
    CHECK_THROWS(octavo::find_outliers(x.matrix(), {}, x.vector(), count.vector()), type,
                 "find_outliers: columns: expected dtype int32, got float32");
    octavo::Vector point = columns.vector();
    point.stride = 0;
    CHECK_THROWS(octavo::find_outliers(x.matrix(), {}, point, count.vector()), value, "share no memory");
}
