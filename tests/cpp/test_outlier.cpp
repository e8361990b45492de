// find_outliers: literal cases at and around the threshold, then the reference.
#include <limits>
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

std::vector<std::int32_t> find_outliers(const Array& x, float threshold, Layout layout = Layout::contiguous) {
    const Array columns(DType::i32, 1, x.matrix().cols, layout);
    const Array count(DType::i32, 1, 1, layout);
    octavo::find_outliers(x.matrix(), threshold, columns.vector(), count.vector());
    std::vector<std::int32_t> found(static_cast<std::size_t>(count.get(0)));
    for (std::size_t i = 0; i < found.size(); ++i) {
        found[i] = static_cast<std::int32_t>(columns.get(static_cast<std::int64_t>(i)));
    }
    return found;
}

using Columns = std::vector<std::int32_t>;

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
    CHECK_THROWS(find_outliers(Array(DType::i32, 1, 1), 6.0F), type, "find_outliers: x: expected dtype float32");
    CHECK_THROWS(octavo::find_outliers(x.matrix(), 6, count.vector(), count.vector()), value,
                 "find_outliers: columns: expected shape [3], got [1]");
    CHECK_THROWS(octavo::find_outliers(x.matrix(), 6, columns.vector(), columns.vector()), value,
                 "find_outliers: count: expected shape [1], got [3]");
    CHECK_THROWS(octavo::find_outliers(x.matrix(), 6, x.vector(), count.vector()), type,
                 "find_outliers: columns: expected dtype int32, got float32");
    octavo::Vector point = columns.vector();
    point.stride = 0;
    CHECK_THROWS(octavo::find_outliers(x.matrix(), 6, point, count.vector()), value, "share no memory");
}
