// linear: literal cases, every scheme, granularity, policy and dtype against the reference, then what must hold for any
// data: layouts, non-finite values, batch invariance, kept outlier weights, and errors.
#include <cmath>
#include <iterator>
#include <limits>
#include <numbers>
#include <optional>
#include <utility>
#include <vector>

#include "arrays.hpp"
#include "calls.hpp"
#include "check.hpp"
#include "device.hpp"
#include "octavo/linear.hpp"
#include "reference.hpp"

using octavo::DType;
using octavo::Granularity;
using octavo::LinearOptions;
using octavo::Outliers;
using octavo::Path;
using octavo::Scheme;

namespace {

constexpr double quiet_nan = std::numeric_limits<double>::quiet_NaN();
constexpr double infinity = std::numeric_limits<double>::infinity();

// A quantized weight with its memory, as the library and as the reference see it.
class Weight {
public:
    Weight(const Array& weight, Scheme scheme, Granularity granularity,
           std::optional<std::vector<std::int32_t>> kept = std::nullopt, Layout layout = Layout::contiguous)
        : codes_(quantize_weight(weight, scheme, granularity, layout)), scheme_(scheme), granularity_(granularity) {
        if (!kept) return;
        const auto r = static_cast<std::int64_t>(kept->size());
        Values original(weight.matrix().rows, r);
        for (std::int64_t j = 0; j < original.rows; ++j) {
            for (std::int64_t o = 0; o < r; ++o) original(j, o) = weight.get(j, (*kept)[static_cast<std::size_t>(o)]);
        }
        outlier_columns_.emplace(int32_array(*kept, layout));
        outlier_weight_.emplace(weight.matrix().dtype, original, layout);
    }

    [[nodiscard]] octavo::WeightView view() const {
        octavo::WeightView view{.codes = codes_.codes.matrix(),
                                .scale = codes_.scale.vector(),
                                .zeropoint = vector_of(codes_.zeropoint),
                                .code_sums = codes_.code_sums.vector(),
                                .outlier_columns = vector_of(outlier_columns_),
                                .scheme = scheme_,
                                .granularity = granularity_};
        if (outlier_weight_) view.outlier_weight = outlier_weight_->matrix();
        return view;
    }

    [[nodiscard]] reference::Weight reference() const {
        reference::Weight weight{codes_.codes.values(), codes_.scale.values().v, {}, {}, {}};
        if (codes_.zeropoint) weight.zeropoint = codes_.zeropoint->values().v;
        if (outlier_columns_) {
            for (const double column : outlier_columns_->values().v) {
                weight.outlier_columns.push_back(static_cast<std::int32_t>(column));
            }
        }
        if (outlier_weight_) weight.outlier_weight = outlier_weight_->values();
        return weight;
    }

    [[nodiscard]] Scheme scheme() const { return scheme_; }
    [[nodiscard]] Granularity granularity() const { return granularity_; }

private:
    Codes codes_;
    std::optional<Array> outlier_columns_;
    std::optional<Array> outlier_weight_;
    Scheme scheme_;
    Granularity granularity_;
};

// `auto` is the int8 path here, on every device: what it is on a GPU, `auto_picks_by_shape` tests.
Array linear(const Array& x, const Weight& weight, const std::optional<Array>& bias, LinearOptions options, DType dtype,
             Layout layout = Layout::contiguous) {
    if (options.path == Path::auto_) options.path = Path::int8;
    Array out(dtype, x.matrix().rows, weight.view().codes.rows, layout);
    octavo::linear(x.matrix(), weight.view(), vector_of(bias), out.matrix(), options);
    return out;
}

// The library's result, compared with the reference.
void check_linear(const Array& x, const Weight& weight, const std::optional<Array>& bias, const LinearOptions& options,
                  DType dtype) {
    const Array actual = linear(x, weight, bias, options, dtype);
    const auto expected =
        reference::linear(x.values(), weight.reference(), bias ? bias->values().v : std::vector<double>{},
                          weight.scheme(), weight.granularity() == Granularity::tensor, options, dtype);
    for (std::int64_t i = 0; i < expected.y.rows; ++i) {
        for (std::int64_t j = 0; j < expected.y.cols; ++j) {
            const double y = expected.y(i, j);
            const double got = actual.get(i, j);
            const bool good = std::isfinite(y) ? std::fabs(got - y) <= expected.bound(i, j) : check::equal(got, y);
            if (good) continue;
            const check::Context context("row ", i, ", column ", j, ", bound ", expected.bound(i, j));
            CHECK_EQ(got, y);
        }
    }
}

constexpr Granularity granularities[] = {Granularity::tensor, Granularity::row, Granularity::vector};

// The four policies of the int8 path, and the weight-only path.
constexpr LinearOptions all_options[] = {
    {.outliers = Outliers::columns, .path = Path::int8},        {.outliers = Outliers::rows, .path = Path::int8},
    {.outliers = Outliers::static_, .path = Path::int8},        {.outliers = Outliers::none, .path = Path::int8},
    {.outliers = Outliers::columns, .path = Path::weight_only},
};

std::string describe(const Weight& weight, const LinearOptions& options) {
    return "scheme " + check::show(weight.scheme()) + " granularity " + check::show(weight.granularity()) +
           " outliers " + check::show(options.outliers) + " path " + check::show(options.path);
}

// Activations of a transformer in small: bell-shaped, with systematic outlier columns (the first, and one in eight)
// and single values at the threshold.
Values activations(Random& random, std::int64_t m, std::int64_t k) {
    Values x = random_normal(random, m, k);
    for (std::int64_t j = 0; j < k; j += 8) {
        for (std::int64_t i = 0; i < m; ++i) x(i, j) *= 20;
    }
    if (m > 0 && k > 0) x(m - 1, k - 1) = -6;
    return x;
}

// Kept columns: some that are outlying, and one that is not.
std::vector<std::int32_t> kept_columns(std::int64_t k) {
    std::vector<std::int32_t> columns;
    for (const std::int32_t column : {0, 5, 8, 40}) {
        if (column < k) columns.push_back(column);
    }
    return columns;
}

}  // namespace

TEST(literal) {
    // Codes of w: [127, -64, 0] with scale 2/127 and [0, 127, 64] with scale 1/127.
    const Weight weight(Array(DType::f32, Values(2, 3, {2, -1, 0, 0, 1, 0.5})), Scheme::absmax, Granularity::vector);
    const Array bias(DType::f32, {10, 20});
    // Codes of the rows of x: [127, 0, 64] with scale 1/127, and zeros.
    const Array x(DType::f32, Values(2, 3, {1, 0, 0.5, 0, 0, 0}));
    const Array y = linear(x, weight, bias, {}, DType::f32);
    const double unit = 1.0 / (127.0 * 127.0);
    CHECK(std::fabs(y.get(0, 0) - (127 * 127 * 2 * unit + 10)) < 2e-6);
    CHECK(std::fabs(y.get(0, 1) - (64 * 64 * unit + 20)) < 2e-6);
    check_values("bias", Array(DType::f32, {y.get(1, 0), y.get(1, 1)}), {10, 20});
}

// An outlier is multiplied in full, and does not coarsen the scale of its row.
TEST(literal_decomposition) {
    const Weight weight(Array(DType::f32, Values(1, 2, {127, 1})), Scheme::absmax, Granularity::vector);
    const Array x(DType::f32, Values(1, 2, {1, 1000}));
    const auto y = [&](Outliers outliers) {
        return linear(x, weight, std::nullopt, {.outliers = outliers}, DType::f32).get(0, 0);
    };
    CHECK_EQ(y(Outliers::columns), 1127.0);
    CHECK_EQ(y(Outliers::rows), 1127.0);
    // Without decomposition the 1 is lost: its code is rint(127 / 1000) = 0. y = 127 * 1 * (1000 / 127)
    CHECK(std::fabs(y(Outliers::none) - 1000) < 1e-3);
}

TEST(literal_weight_only) {
    const Weight weight(Array(DType::f32, Values(1, 3, {127, 1, -3})), Scheme::absmax, Granularity::vector);
    const Array x(DType::f32, Values(2, 3, {0.25, 1000, 0.125, 0, 0, 1}));
    const Array y = linear(x, weight, Array(DType::f16, {1}), {.path = Path::weight_only}, DType::f32);
    check_values("y", y, Values(2, 1, {31.75 + 1000 - 0.375 + 1, -2}));
}

TEST(matches_the_reference) {
    struct Shape {
        std::int64_t m, n, k;
    };
    Random random(91);
    std::size_t next = 0;  // so that each shape has another dtype of W with each of X
    for (const Shape s : {Shape{1, 1, 1}, Shape{3, 5, 17}, Shape{5, 67, 66}}) {
        for (const DType x_dtype : float_dtypes) {
            const Array x(x_dtype, activations(random, s.m, s.k));
            const DType w_dtype = float_dtypes[next++ % std::size(float_dtypes)];
            const Array w(w_dtype, random_normal(random, s.n, s.k, 0.05));
            const Array bias(w_dtype, random_normal(random, 1, s.n));
            for (const Scheme scheme : schemes) {
                for (const Granularity granularity : granularities) {
                    const Weight weight(w, scheme, granularity, kept_columns(s.k));
                    for (const LinearOptions& options : all_options) {
                        for (const DType out_dtype : float_dtypes) {
                            const check::Context context(s.m, " x ", s.n, " x ", s.k, " x ", name_of(x_dtype), " w ",
                                                         name_of(w_dtype), " out ", name_of(out_dtype), " ",
                                                         describe(weight, options));
                            check_linear(x, weight, bias, options, out_dtype);
                        }
                    }
                }
            }
        }
        ++next;
    }
}

TEST(matches_the_reference_on_random_cases) {
    Random random(92);
    const auto pick = [&](const auto& values) {
        return values[static_cast<std::size_t>(random.integer(0, static_cast<std::int64_t>(std::size(values)) - 1))];
    };
    for (int round = 0; round < 300; ++round) {
        const std::int64_t m = random.integer(1, 12);
        const std::int64_t n = random.integer(1, 80);
        const std::int64_t k = random.integer(1, 150);
        Values x_values = activations(random, m, k);
        if (round % 5 == 0) x_values(random.integer(0, m - 1), random.integer(0, k - 1)) = infinity;
        const Array x(pick(float_dtypes), x_values, pick(layouts));
        const Array w(pick(float_dtypes), random_normal(random, n, k, 0.05), pick(layouts));
        std::optional<Array> bias;
        if (round % 3 != 0) bias.emplace(pick(float_dtypes), random_normal(random, 1, n));
        const Weight weight(w, pick(schemes), pick(granularities), kept_columns(k), pick(layouts));
        LinearOptions options = pick(all_options);
        options.threshold = static_cast<float>(random.uniform(0.5, 8));
        const check::Context context("round ", round, " ", m, " x ", n, " x ", k, " ", describe(weight, options));
        check_linear(x, weight, bias, options, pick(float_dtypes));
    }
}

// More than a GPU multiplies side by side, or than any list has room for at once; and some in between.
TEST(many_outlier_columns) {
    constexpr std::int64_t k = 610;
    Random random(102);
    const Array w(DType::f16, random_normal(random, 70, k, 0.05));
    for (const Scheme scheme : schemes) {
        for (const bool is_kept : {true, false}) {
            if (!is_kept && scheme != Scheme::absmax) continue;
            const Weight weight(w, scheme, Granularity::vector,
                                is_kept ? std::optional(kept_columns(k)) : std::nullopt);
            for (const DType dtype : float_dtypes) {
                Values values = activations(random, 66, k);
                values(3, 11) = infinity;
                values(65, 600) = quiet_nan;
                const Array x(dtype, values);
                for (const Outliers outliers : {Outliers::columns, Outliers::rows}) {
                    if (!is_kept && outliers == Outliers::rows) continue;
                    for (const float threshold : {6.0F, 3.2F, 1.0F, 0.0F}) {
                        const check::Context context(check::show(scheme), " kept ", is_kept, " ", name_of(dtype), " ",
                                                     check::show(outliers), " threshold ", threshold);
                        check_linear(x, weight, std::nullopt, {.threshold = threshold, .outliers = outliers},
                                     DType::f32);
                    }
                }
            }
        }
    }
}

// So many rows that on a GPU codes of outlier columns are read apart from the product: a few columns, more than are
// added in order, and more than fit a panel.
TEST(many_rows_with_outlier_columns) {
    constexpr std::int64_t k = 270;
    Random random(104);
    const Weight weight(Array(DType::f16, random_normal(random, 20, k, 0.05)), Scheme::absmax, Granularity::vector);
    for (const std::int64_t outliers : {3, 30, 260}) {
        Values values = random_normal(random, 600, k, 0.5);
        for (std::int64_t o = 0; o < outliers; ++o) values(o * 17 % 600, o * 7 % k) = 8;
        for (const DType dtype : {DType::f16, DType::bf16}) {
            const check::Context context(outliers, " columns ", name_of(dtype));
            check_linear(Array(dtype, values), weight, std::nullopt, {}, DType::f32);
        }
    }
}

// Few rows of which columns are outliers: more of them than are made float32 at a time, and, with AMX, beside which the
// product of the next tile begins: none of it, some, and all.
TEST(few_rows_with_outlier_columns) {
    constexpr std::int64_t k = 300;
    Random random(103);
    const Array w(DType::bf16, random_normal(random, 140, k, 0.05));
    const Array bias(DType::f32, random_normal(random, 1, 140, 1));
    for (const Scheme scheme : schemes) {
        for (const bool is_kept : {false, true}) {
            const Weight weight(w, scheme, Granularity::vector,
                                is_kept ? std::optional(kept_columns(k)) : std::nullopt);
            for (const std::int64_t m : {1, 4, 7, 13, 16, 30}) {
                for (const std::int64_t outliers : {1, 7, 30, 64, 100, 300}) {
                    Values values = random_normal(random, m, k, 0.5);
                    for (std::int64_t o = 0; o < outliers; ++o) values(o % m, o * 7 % k) = 8;
                    const check::Context context(check::show(scheme), " kept ", is_kept, " ", m, " rows, ", outliers);
                    const DType dtype = m % 2 == 0 ? DType::f16 : DType::bf16;
                    check_linear(Array(dtype, values), weight, bias, {}, DType::f32);
                }
            }
        }
    }
}

// Larger than a tile of any instruction set (48 x 256), without bias and without kept columns.
TEST(matches_the_reference_over_many_tiles) {
    Random random(93);
    const Array x(DType::bf16, activations(random, 130, 70));
    const Array w(DType::bf16, random_normal(random, 300, 70, 0.05));
    for (const Scheme scheme : schemes) {
        for (const Granularity granularity : granularities) {
            const Weight weight(w, scheme, granularity);
            for (const LinearOptions& options : all_options) {
                if (options.outliers == Outliers::static_) continue;
                const check::Context context(describe(weight, options));
                check_linear(x, weight, std::nullopt, options, DType::f16);
            }
        }
    }
}

// The ways in which a GPU multiplies few rows: dot products, and matrix instructions for tiles of 8 to 64 rows, each
// with the depth shared by 1 to 8 warps; rows of 16 codes and others.
TEST(weight_only_of_few_rows) {
    Random random(94);
    struct Shape {
        std::int64_t n, k;
    };
    for (const Shape s : {Shape{5, 16}, Shape{33, 240}, Shape{9, 1040}, Shape{300, 64}}) {
        for (const std::int64_t m : {1, 2, 3, 4, 7, 8, 9, 16, 17, 31, 32, 33, 64, 65}) {
            for (const DType dtype : float_dtypes) {
                const Array x(dtype, activations(random, m, s.k));
                const Array w(dtype, random_normal(random, s.n, s.k, 0.05));
                const Array bias(dtype, random_normal(random, 1, s.n));
                const Scheme scheme = m % 2 == 0 ? Scheme::absmax : Scheme::zeropoint;
                const Weight weight(w, scheme, Granularity::vector);
                const check::Context context(m, " x ", s.n, " x ", s.k, " ", name_of(dtype));
                check_linear(x, weight, bias, {.path = Path::weight_only}, dtype);
            }
        }
    }
}

// So few features that on a GPU several blocks share the depth of them: dot products, also of rows of 16 codes and
// others, and matrix instructions. Zeropoints of which a part is left to the sums of rows of X.
TEST(weight_only_of_few_features) {
    Random random(95);
    struct Shape {
        std::int64_t m, n, k;
    };
    for (const Shape s :
         {Shape{1, 3, 40016}, Shape{3, 5, 33000}, Shape{6, 20, 8208}, Shape{17, 40, 4112}, Shape{40, 33, 4112}}) {
        for (const DType dtype : float_dtypes) {
            for (const Scheme scheme : schemes) {
                const Array x(dtype, activations(random, s.m, s.k));
                Values far = random_normal(random, s.n, s.k, 0.05);
                for (double& value : far.v) value += scheme == Scheme::zeropoint ? 0.5 : 0.0;
                const Weight weight({dtype, far}, scheme, Granularity::vector);
                const check::Context context(s.m, " x ", s.n, " x ", s.k, " ", describe(weight, {}), name_of(dtype));
                check_linear(x, weight, Array(dtype, random_normal(random, 1, s.n)), {.path = Path::weight_only},
                             dtype);
            }
        }
    }
}

// Sums of products that need 64 bits.
TEST(deep) {
    constexpr std::int64_t k = 200000;
    const Array x(DType::f32, Values(2, k, std::vector<double>(2 * k, 1.5)));
    const Array w(DType::f32, Values(3, k, std::vector<double>(3 * k, -0.25)));
    for (const Scheme scheme : schemes) {
        const Weight weight(w, scheme, Granularity::vector);
        for (const LinearOptions& options : all_options) {
            if (options.outliers == Outliers::static_) continue;
            const check::Context context(describe(weight, options));
            check_linear(x, weight, std::nullopt, options, DType::f32);
        }
    }
}

TEST(no_rows_or_no_columns) {
    const Array bias(DType::f32, {1, -2});
    for (const Scheme scheme : schemes) {
        for (const Granularity granularity : granularities) {
            for (const LinearOptions& options : all_options) {
                const Weight deepless(Array(DType::f32, 2, 0), scheme, granularity, std::vector<std::int32_t>{});
                const check::Context context(describe(deepless, options));
                const Array empty_rows(DType::f16, 3, 0);
                check_values("bias only", linear(empty_rows, deepless, bias, options, DType::f32),
                             Values(3, 2, {1, -2, 1, -2, 1, -2}));
                check_values("zeros", linear(empty_rows, deepless, std::nullopt, options, DType::bf16), Values(3, 2));
                CHECK_EQ(linear(Array(DType::f16, 0, 0), deepless, bias, options, DType::f16).values().rows, 0);
                const Weight featureless(Array(DType::f32, 0, 4), scheme, granularity, std::vector<std::int32_t>{1});
                CHECK_EQ(linear(Array(DType::f16, 3, 4), featureless, std::nullopt, options, DType::f16).values().cols,
                         0);
            }
        }
    }
}

TEST(layouts_give_the_same_result) {
    Random random(95);
    const Array x(DType::bf16, activations(random, 9, 41));
    const Array w(DType::f16, random_normal(random, 21, 41, 0.05));
    const Array bias(DType::f16, random_normal(random, 1, 21));
    for (const Scheme scheme : schemes) {
        for (const Granularity granularity : granularities) {
            for (const LinearOptions& options : all_options) {
                const Weight plain(w, scheme, granularity, kept_columns(41));
                const Values expected = linear(x, plain, bias, options, DType::bf16).values();
                for (const Layout layout : layouts) {
                    const check::Context context(describe(plain, options), " layout ", check::show(layout));
                    const Weight weight(w, scheme, granularity, kept_columns(41), layout);
                    const Array source(DType::bf16, x.values(), layout);
                    const Array moved_bias(DType::f16, bias.values(), layout);
                    const std::string before = source.bytes();
                    const Array y = linear(source, weight, moved_bias, options, DType::bf16, layout);
                    check_values("y", y, expected);
                    CHECK(y.gaps_untouched());
                    CHECK(source.bytes() == before);
                }
            }
        }
    }
}

// Kept columns are multiplied with their original weights, others with dequantized ones.
TEST(kept_outlier_weights) {
    // w's codes cannot tell 0.001 from 0.
    const Array w(DType::f32, Values(1, 3, {100, 0.001F, 0.002F}));
    const Array x(DType::f32, Values(2, 3, {1, 1000, 0, 1, 0, 0}));
    const auto y = [&](std::vector<std::int32_t> kept, Outliers outliers) {
        return linear(x, Weight(w, Scheme::absmax, Granularity::vector, std::move(kept)), std::nullopt,
                      {.outliers = outliers}, DType::f32);
    };
    const auto near = [](double actual, double expected) { return std::fabs(actual - expected) < 1e-4; };
    for (const Outliers outliers : {Outliers::columns, Outliers::rows, Outliers::static_}) {
        CHECK(near(y({1, 2}, outliers).get(0, 0), 101));
        CHECK(near(y({1, 2}, outliers).get(1, 0), 100));
    }
    CHECK(near(y({2}, Outliers::columns).get(0, 0), 100));  // dequantized: 0
    CHECK(near(y({}, Outliers::rows).get(0, 0), 100));
    // Not outlying, but kept: the 16-bit way under `static` only. Else the 5 makes the 1 a code of 25.
    const Array calm(DType::f32, Values(1, 3, {1, 5, 0}));
    const Weight weight(w, Scheme::absmax, Granularity::vector, std::vector<std::int32_t>{1});
    const LinearOptions calibrated{.outliers = Outliers::static_};
    CHECK(near(linear(calm, weight, std::nullopt, calibrated, DType::f32).get(0, 0), 100.005));
    CHECK(near(linear(calm, weight, std::nullopt, {}, DType::f32).get(0, 0), 25 * 5.0 / 127 * 100));
}

// Under `rows` and `static` (and on the weight-only path of the CPU) a row's result does not depend on the rest of the
// batch. On CUDA devices weight-only sums are added in an order that depends on the number of rows; where k is such
// that they are not, nothing would be tested.
TEST(batch_invariance) {
    constexpr std::int64_t k = 600;  // more than a slice
    Random random(97);
    const Values x = activations(random, 70, k);
    const Array w(DType::f16, random_normal(random, 30, k, 0.05));
    for (const Scheme scheme : schemes) {
        const Weight weight(w, scheme, Granularity::vector, kept_columns(k));
        for (const LinearOptions& options : all_options) {
            if (options.outliers == Outliers::columns && options.path == Path::int8) continue;
            if (options.path == Path::weight_only && test_device().kind == octavo::DeviceKind::cuda) continue;
            const check::Context context(describe(weight, options));
            const Values together = linear(Array(DType::f16, x), weight, std::nullopt, options, DType::f32).values();
            for (const std::int64_t first : {0, 1, 33, 69}) {
                // Alone, and with a few others.
                for (const std::int64_t rows : {1, 3, 9}) {
                    if (first + rows > 70) continue;
                    Values alone(rows, k);
                    for (std::int64_t i = 0; i < rows; ++i) {
                        for (std::int64_t h = 0; h < k; ++h) alone(i, h) = x(first + i, h);
                    }
                    const Array y = linear(Array(DType::f16, alone), weight, std::nullopt, options, DType::f32);
                    for (std::int64_t i = 0; i < rows; ++i) {
                        for (std::int64_t j = 0; j < 30; ++j) CHECK_EQ(y.get(i, j), together(first + i, j));
                    }
                }
            }
        }
    }
}

// So many that each thread has several groups of rows where they share one scale.
TEST(many_rows_with_one_scale) {
    Random random(101);
    for (const DType dtype : {DType::f16, DType::f32}) {
        const Array x(dtype, activations(random, 1100, 44));
        const Array w(dtype, random_normal(random, 3, 44, 0.05));
        for (const Scheme scheme : schemes) {
            const Weight weight(w, scheme, Granularity::tensor, kept_columns(44));
            for (const LinearOptions& options : all_options) {
                if (options.path == Path::weight_only) continue;
                const check::Context context(describe(weight, options));
                check_linear(x, weight, std::nullopt, options, dtype);
            }
        }
    }
}

TEST(non_finite_values) {
    Random random(99);
    const Array w(DType::f32, random_normal(random, 4, 12, 0.05));
    for (const double special : {quiet_nan, infinity, -infinity}) {
        Values x = random_normal(random, 3, 12);
        x(1, 7) = special;
        for (const Scheme scheme : schemes) {
            for (const Granularity granularity : granularities) {
                const Weight weight(w, scheme, granularity, std::vector<std::int32_t>{3});
                for (const LinearOptions& options : all_options) {
                    const check::Context context(describe(weight, options), " special ", special);
                    const Array y = linear(Array(DType::f32, x), weight, std::nullopt, options, DType::f32);
                    const bool decomposes = options.path == Path::weight_only ||
                                            options.outliers == Outliers::columns || options.outliers == Outliers::rows;
                    const bool whole_tensor = !decomposes && granularity == Granularity::tensor;
                    for (std::int64_t j = 0; j < 4; ++j) {
                        CHECK(!std::isfinite(y.get(1, j)));
                        if (!decomposes) CHECK(std::isnan(y.get(1, j)));
                        CHECK_EQ(std::isnan(y.get(0, j)), whole_tensor);
                        CHECK_EQ(std::isnan(y.get(2, j)), whole_tensor);
                    }
                    check_linear(Array(DType::f32, x), weight, std::nullopt, options, DType::f32);
                }
                // In a kept column it goes the 16-bit way under `static` too.
                Values kept = random_normal(random, 2, 12);
                kept(0, 3) = special;
                check_linear(Array(DType::f32, kept), weight, std::nullopt, {.outliers = Outliers::static_},
                             DType::f32);
            }
        }
    }
}

// Results beyond float16's range reach a bfloat16 output: nothing on the way is float16.
TEST(large_results) {
    const Array x(DType::bf16, Values(1, 64, std::vector<double>(64, 64)));
    const Weight weight(Array(DType::f16, Values(1, 64, std::vector<double>(64, 64))), Scheme::absmax,
                        Granularity::vector);
    for (const float threshold : {6.0F, 100.0F}) {
        const LinearOptions options{.threshold = threshold};
        CHECK_EQ(linear(x, weight, std::nullopt, options, DType::bf16).get(0, 0), 262144.0);
        CHECK_EQ(linear(x, weight, std::nullopt, options, DType::f16).get(0, 0), infinity);
    }
}

// Sums of weight_only overflow before the scale makes them small: products of large numbers by codes, however many
// rows.
TEST(weight_only_of_large_numbers) {
    constexpr std::int64_t k = 64;
    Values w(2, k);
    for (std::int64_t h = 0; h < k; ++h) {
        w(0, h) = 0x1p-10;
        w(1, h) = h % 2 == 0 ? 0x1p-10 : 0x1p-11;
    }
    for (const Scheme scheme : schemes) {
        const Weight weight(Array(DType::f32, w), scheme, Granularity::vector);
        for (const DType dtype : {DType::f32, DType::bf16}) {
            for (const std::int64_t m : {1, 2, 3, 20}) {
                Values x(m, k);
                for (double& value : x.v) value = 0x1p126;
                if (m > 1) x(1, 5) = infinity;
                const Array y = linear(Array(dtype, x), weight, std::nullopt, {.path = Path::weight_only}, DType::f32);
                for (std::int64_t i = 0; i < m; ++i) {
                    const check::Context context(check::show(scheme), " ", name_of(dtype), " row ", i, " of ", m);
                    if (i == 1) {
                        CHECK_EQ(y.get(i, 0), infinity);
                    } else {
                        CHECK(std::fabs(y.get(i, 0) / 0x1p122 - 1) < 1e-5);
                        CHECK(std::fabs(y.get(i, 1) / (0.75 * 0x1p122) - 1) < 1e-2);
                    }
                }
            }
        }
    }
}

TEST(argument_errors) {
    const Array x(DType::f32, 2, 3);
    const Array w(DType::f32, 4, 3);
    const Array out(DType::f32, 2, 4);
    const Weight plain(w, Scheme::absmax, Granularity::vector, std::vector<std::int32_t>{0, 2});
    const Weight with_zeropoint(w, Scheme::zeropoint, Granularity::vector);
    const auto call = [&](const octavo::WeightView& weight, const LinearOptions& options = {}) {
        octavo::linear(x.matrix(), weight, octavo::absent_vector, out.matrix(), options);
    };
    const auto changed = [&](const Weight& weight, auto change) {
        octavo::WeightView view = weight.view();
        change(view);
        return view;
    };
    CHECK_THROWS(linear(Array(DType::i8, 2, 3), plain, std::nullopt, {}, DType::f32), type,
                 "linear: x: expected dtype float32, float16 or bfloat16, got int8");
    CHECK_THROWS(linear(Array(DType::f32, 2, 4), plain, std::nullopt, {}, DType::f32), value,
                 "linear: x: expected k = 3 columns for a weight of shape [4, 3], got [2, 4]");
    CHECK_THROWS(linear(x, plain, Array(DType::f32, 1, 3), {}, DType::f32), value,
                 "linear: bias: expected shape [4], got [3]");
    CHECK_THROWS(linear(x, plain, Array(DType::i32, 1, 4), {}, DType::f32), type,
                 "linear: bias: expected dtype float32");
    CHECK_THROWS(linear(x, plain, std::nullopt, {}, DType::i32), type, "linear: out: expected dtype float32");
    CHECK_THROWS(linear(x, plain, std::nullopt, {.threshold = -1}, DType::f32), value,
                 "linear: threshold: expected a number >= 0, got -1");
    CHECK_THROWS(linear(x, with_zeropoint, std::nullopt, {.outliers = Outliers::static_}, DType::f32), value,
                 "linear: outliers: expected a weight with calibrated outlier_columns for 'static'");
    linear(x, with_zeropoint, std::nullopt, {.outliers = Outliers::static_, .path = Path::weight_only}, DType::f32);

    CHECK_THROWS(call(changed(plain, [](auto& view) { view.scheme = Scheme::zeropoint; })), value,
                 "linear: weight.zeropoint: expected an array for scheme zeropoint, got none");
    CHECK_THROWS(call(changed(with_zeropoint, [](auto& view) { view.scheme = Scheme::absmax; })), value,
                 "linear: weight.zeropoint: expected none for scheme absmax, got an array");
    CHECK_THROWS(call(changed(plain, [](auto& view) { view.granularity = Granularity::row; })), value,
                 "linear: weight.scale: expected shape [1], got [4]");
    CHECK_THROWS(call(changed(plain, [](auto& view) { view.codes.dtype = DType::f32; })), type,
                 "linear: weight.codes: expected dtype int8");
    CHECK_THROWS(call(changed(plain, [](auto& view) { view.code_sums.size = 3; })), value,
                 "linear: weight.code_sums: expected shape [4], got [3]");
    CHECK_THROWS(call(changed(plain, [](auto& view) { view.outlier_weight.cols = 1; })), value,
                 "linear: weight.outlier_weight: expected shape [4, 2], got [4, 1]");
    for (const auto& [columns, message] : {std::pair{std::vector<std::int32_t>{2, 0}, "got 0 after 2"},
                                           std::pair{std::vector<std::int32_t>{1, 1}, "got 1 after 1"},
                                           std::pair{std::vector<std::int32_t>{0, 3}, "0 to 2, got 3 after 0"},
                                           std::pair{std::vector<std::int32_t>{-1, 0}, "got -1 after -1"}}) {
        if (test_device().kind != octavo::DeviceKind::cpu) break;  // checked where they can be read without waiting
        const Array list = int32_array(columns);
        CHECK_THROWS(call(changed(plain, [&](auto& view) { view.outlier_columns = list.vector(); })), value, message);
        CHECK_THROWS(
            octavo::check_weight(changed(plain, [&](auto& view) { view.outlier_columns = list.vector(); }), "load"),
            value, "load: weight.outlier_columns: expected ascending columns of the weight");
    }
    octavo::check_weight(plain.view(), "load");
}

// Each layer has the outputs that it has alone, whether X was quantized for it or for another, too.
TEST(many) {
    Random random(103);
    constexpr std::int64_t k = 130;
    const Array x(DType::f16, activations(random, 37, k));
    std::vector<Weight> weights;
    const auto add = [&](std::int64_t n, Scheme scheme, Granularity granularity, std::vector<std::int32_t> kept) {
        weights.emplace_back(Array(DType::f16, random_normal(random, n, k, 0.05)), scheme, granularity, kept);
    };
    for (const std::int64_t n : {33, 64, 5, 16, 40, 1}) add(n, Scheme::absmax, Granularity::vector, kept_columns(k));
    add(7, Scheme::absmax, Granularity::row, {0, 5, 8});
    add(0, Scheme::absmax, Granularity::vector, kept_columns(k));
    for (const Granularity granularity : granularities) {
        add(9, Scheme::zeropoint, granularity, kept_columns(k));
        add(17, Scheme::zeropoint, granularity, kept_columns(k));
    }
    add(8, Scheme::absmax, Granularity::vector, kept_columns(k));
    for (const std::int64_t n : {21, 80}) add(n, Scheme::absmax, Granularity::vector, {});
    for (LinearOptions options : all_options) {
        std::vector<Array> biases;
        std::vector<Array> outs;
        std::vector<octavo::LinearLayer> layers;
        for (const Weight& weight : weights) {
            const std::int64_t n = weight.view().codes.rows;
            biases.emplace_back(DType::f32, random_normal(random, 1, n));
            outs.emplace_back(n % 2 == 0 ? DType::f16 : DType::f32, x.matrix().rows, n);
            layers.push_back({weight.view(), biases.back().vector(), outs.back().matrix()});
        }
        octavo::linear_many(x.matrix(), layers, options);
        for (std::size_t i = 0; i < weights.size(); ++i) {
            const check::Context context("layer ", i, " ", describe(weights[i], options));
            const Array alone = linear(x, weights[i], biases[i], options, outs[i].matrix().dtype);
            check_values("y", outs[i], alone.values());
        }
    }
    octavo::linear_many(x.matrix(), {});
}

// However the outputs of all layers are cut into blocks and shared among threads.
TEST(many_on_threads) {
    Random random(109);
    constexpr std::int64_t k = 320;
    const LinearOptions options{.path = Path::int8};
    const int before = octavo::num_threads();
    std::vector<Weight> weights;
    for (const std::int64_t n : {300, 17, 700, 64}) {
        weights.emplace_back(Array(DType::bf16, random_normal(random, n, k, 0.05)), Scheme::absmax, Granularity::vector,
                             kept_columns(k));
    }
    for (const std::int64_t m : {1, 21, 300}) {
        const Array x(DType::bf16, activations(random, m, k));
        std::vector<Array> alone;
        octavo::set_num_threads(1);
        alone.reserve(weights.size());
        for (const Weight& weight : weights) alone.push_back(linear(x, weight, std::nullopt, options, DType::bf16));
        for (const int threads : {1, 2, 5, 64}) {
            octavo::set_num_threads(threads);
            std::vector<Array> outs;
            std::vector<octavo::LinearLayer> layers;
            for (const Weight& weight : weights) {
                outs.emplace_back(DType::bf16, m, weight.view().codes.rows);
                layers.push_back({.weight = weight.view(), .out = outs.back().matrix()});
            }
            octavo::linear_many(x.matrix(), layers, options);
            const check::Context context(m, " rows, ", threads, " threads");
            for (std::size_t i = 0; i < weights.size(); ++i) check_values("y", outs[i], alone[i].values());
        }
    }
    octavo::set_num_threads(before);
}

// The activation is of the float32 outputs, before they are rounded: as if a layer of float32 were asked for first.
TEST(activation_comes_before_rounding) {
    Random random(107);
    const Array x(DType::f32, activations(random, 37, 70));
    const Array bias(DType::f32, random_normal(random, 1, 33));
    for (const Scheme scheme : {Scheme::absmax, Scheme::zeropoint}) {
        const Weight weight(Array(DType::f32, random_normal(random, 33, 70, 0.3)), scheme, Granularity::vector);
        for (const LinearOptions& options : all_options) {
            if (options.outliers == Outliers::static_) continue;  // the weight keeps no columns
            const check::Context context(describe(weight, options));
            const auto outputs = [&](DType dtype, octavo::Activation activation) {
                Array out(dtype, 37, 33);
                const octavo::LinearLayer layer{weight.view(), bias.vector(), out.matrix(), activation};
                octavo::linear_many(x.matrix(), {&layer, 1}, options);
                return out;
            };
            if (test_device().kind != octavo::DeviceKind::cpu) {
                CHECK_THROWS(outputs(DType::f32, octavo::Activation::gelu), value,
                             "linear_many[0]: activation: expected none on a device, got gelu");
                continue;
            }
            const Array plain = outputs(DType::f32, octavo::Activation::none);
            const Array gelu = outputs(DType::f32, octavo::Activation::gelu);
            for (std::int64_t i = 0; i < 37; ++i) {
                for (std::int64_t j = 0; j < 33; ++j) {
                    const double y = plain.get(i, j);
                    CHECK(std::fabs(gelu.get(i, j) - y * std::erfc(-y / std::numbers::sqrt2) / 2.0) <=
                          2e-7 * std::fabs(y));
                }
            }
            check_values("rounded", outputs(DType::f16, octavo::Activation::gelu),
                         Array(DType::f16, gelu.values()).values());
        }
    }
}

TEST(errors_of_many) {
    const Array x(DType::f32, 2, 3);
    const Array w(DType::f32, 4, 3);
    const Weight weight(w, Scheme::absmax, Granularity::vector);
    const Array outs[] = {Array(DType::f32, 2, 4), Array(DType::f32, 2, 4)};
    const auto call = [&](auto change) {
        octavo::LinearLayer layers[] = {{.weight = weight.view(), .out = outs[0].matrix()},
                                        {.weight = weight.view(), .out = outs[1].matrix()}};
        change(layers[1]);
        octavo::linear_many(x.matrix(), layers);
    };
    call([](auto&) {});
    CHECK_THROWS(call([](auto& layer) { layer.weight.scale.size = 3; }), value,
                 "linear_many[1]: weight.scale: expected shape [4], got [3]");
    CHECK_THROWS(call([](auto& layer) { layer.out.dtype = DType::i8; }), type, "linear_many[1]: out: expected dtype");
    CHECK_THROWS(call([&](auto& layer) { layer.out = outs[0].matrix(); }), value,
                 "linear_many[0]: out: expected memory apart from the out of another layer,");
    const Array scales(DType::f32, 1, 8);
    CHECK_THROWS(call([&](auto& layer) {
                     layer.weight.scale.data = scales.matrix().data;
                     layer.out.data = scales.matrix().data;
                 }),
                 value, "linear_many[1]: out: expected memory apart from weight.scale,");
    CHECK_THROWS(call([&](auto& layer) {
                     layer.bias = outs[0].vector();
                     layer.bias.size = 4;
                 }),
                 value, "linear_many[0]: out: expected memory apart from bias,");
    CHECK_THROWS(octavo::linear_many(Array(DType::i32, 2, 3).matrix(), {}), type, "linear_many: x: expected dtype");
}

// On the CPU `auto` is the int8 path; on a GPU the weight-only path for few rows, how many depends on the shape.
TEST(auto_picks_by_shape) {
    Random random(101);
    const Weight weight({DType::f32, random_normal(random, 5, 40)}, Scheme::absmax, Granularity::vector);
    for (const std::int64_t m : {1, 200}) {
        const Array x(DType::f32, random_normal(random, m, 40));
        const Array out(DType::f32, m, 5);
        octavo::linear(x.matrix(), weight.view(), octavo::absent_vector, out.matrix());
        const bool few = test_device().kind == octavo::DeviceKind::cuda && m == 1;
        const LinearOptions expected{.path = few ? Path::weight_only : Path::int8};
        const LinearOptions other{.path = few ? Path::int8 : Path::weight_only};
        check_values("auto", out, linear(x, weight, std::nullopt, expected, DType::f32).values());
        CHECK(out.get(0, 0) != linear(x, weight, std::nullopt, other, DType::f32).get(0, 0));
    }
}

// `out` may not lie in any input.
TEST(overlap) {
    const Array x(DType::f32, 2, 3);
    const Array w(DType::f32, 4, 3);
    const Array bias(DType::f32, 1, 4);
    const Weight weight(w, Scheme::zeropoint, Granularity::vector, std::vector<std::int32_t>{1});
    const octavo::WeightView view = weight.view();
    const std::pair<const void*, const char*> inputs[] = {
        {x.matrix().data, "x"},
        {view.codes.data, "weight.codes"},
        {view.scale.data, "weight.scale"},
        {view.zeropoint.data, "weight.zeropoint"},
        {view.code_sums.data, "weight.code_sums"},
        {view.outlier_columns.data, "weight.outlier_columns"},
        {view.outlier_weight.data, "weight.outlier_weight"},
        {bias.matrix().data, "bias"},
    };
    for (const auto& [data, name] : inputs) {
        // NOLINTNEXTLINE(cppcoreguidelines-pro-type-const-cast): refused before anything is written
        const octavo::Matrix out{const_cast<void*>(data), DType::f16, test_device(), 2, 4, 4, 1};
        CHECK_THROWS(octavo::linear(x.matrix(), view, bias.vector(), out), value,
                     std::string("linear: out: expected memory apart from ") + name + ",");
    }
    // Parts of the same rows, x of 3 columns and out of 4, are apart where they do not touch.
    const Array both(DType::f32, 2, 7);
    const auto part = [&](std::int64_t first, std::int64_t cols) {
        octavo::Matrix view_of_part = both.matrix();
        view_of_part.data = static_cast<float*>(view_of_part.data) + first;
        view_of_part.cols = cols;
        return view_of_part;
    };
    octavo::linear(part(0, 3), view, bias.vector(), part(3, 4));
    octavo::linear(part(4, 3), view, bias.vector(), part(0, 4));
    CHECK_THROWS(octavo::linear(part(0, 3), view, bias.vector(), part(2, 4)), value, "memory apart from x");
    CHECK_THROWS(octavo::linear(part(3, 3), view, bias.vector(), part(0, 4)), value, "memory apart from x");
}
