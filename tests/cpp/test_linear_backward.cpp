// linear_backward: literal cases, every scheme, granularity, rotation and dtype against the product with what
// `dequantize` gives, then what must hold for any data: layouts, independence of rows and threads, non-finite values,
// kept columns, and errors.
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "arrays.hpp"
#include "calls.hpp"
#include "check.hpp"
#include "device.hpp"
#include "octavo/octavo.hpp"

using octavo::DType;
using octavo::Granularity;
using octavo::LinearOptions;
using octavo::Outliers;
using octavo::Path;
using octavo::QuantizeOptions;
using octavo::Scheme;

namespace {

constexpr double quiet_nan = std::numeric_limits<double>::quiet_NaN();
constexpr double infinity = std::numeric_limits<double>::infinity();

// A quantized weight, its kept columns, and the matrix that gradients are multiplied with.
class Weight {
public:
    Weight(const Array& weight, const QuantizeOptions& options, const std::vector<std::int32_t>& kept,
           Layout layout = Layout::contiguous)
        : k_(weight.matrix().cols),
          options_(options),
          codes_(DType::i8, weight.matrix().rows, octavo::rotated_size(k_, options.rotation), layout),
          scale_(DType::f32, 1, options.granularity == Granularity::vector ? weight.matrix().rows : 1, layout),
          code_sums_(DType::i32, 1, weight.matrix().rows, layout),
          columns_(int32_array(kept, layout)),
          kept_(weight.matrix().dtype, columns_of(weight, kept), layout),
          dequantized(DType::f32, weight.matrix().rows, k_) {
        if (options.scheme == Scheme::zeropoint) zeropoint_.emplace(DType::f32, 1, scale_.matrix().cols, layout);
        octavo::quantize_weight(weight.matrix(), options, codes_.matrix(), scale_.vector(), vector_of(zeropoint_),
                                code_sums_.vector());
        octavo::dequantize(codes_.matrix(), scale_.vector(), vector_of(zeropoint_), options.rotation,
                           dequantized.matrix());
        wait_for_device();
    }

    [[nodiscard]] octavo::WeightView view() const {
        return {.codes = codes_.matrix(),
                .scale = scale_.vector(),
                .zeropoint = vector_of(zeropoint_),
                .code_sums = code_sums_.vector(),
                .outlier_columns = columns_.vector(),
                .outlier_weight = kept_.matrix(),
                .scheme = options_.scheme,
                .granularity = options_.granularity,
                .rotation = options_.rotation,
                .k = k_};
    }

    // With the kept columns, or without.
    [[nodiscard]] Values values(bool with_kept) const {
        Values result = dequantized.values();
        for (std::int64_t o = 0; with_kept && o < columns_.matrix().cols; ++o) {
            for (std::int64_t j = 0; j < result.rows; ++j) {
                result(j, static_cast<std::int64_t>(columns_.get(o))) = kept_.get(j, o);
            }
        }
        return result;
    }
    [[nodiscard]] std::int64_t rotation() const { return options_.rotation; }
    [[nodiscard]] double scale(std::int64_t group) const { return scale_.get(0, group); }
    [[nodiscard]] double code(std::int64_t j, std::int64_t h) const { return codes_.get(j, h); }

private:
    static Values columns_of(const Array& weight, const std::vector<std::int32_t>& kept) {
        Values columns(weight.matrix().rows, static_cast<std::int64_t>(kept.size()));
        for (std::int64_t j = 0; j < columns.rows; ++j) {
            for (std::int64_t o = 0; o < columns.cols; ++o) {
                columns(j, o) = weight.get(j, kept[static_cast<std::size_t>(o)]);
            }
        }
        return columns;
    }

    std::int64_t k_;
    QuantizeOptions options_;
    Array codes_;
    Array scale_;
    Array code_sums_;
    Array columns_;
    Array kept_;
    std::optional<Array> zeropoint_;

public:
    Array dequantized;
};

Array backward(const Array& grad, const octavo::WeightView& weight, DType dtype, const LinearOptions& options = {},
               Layout layout = Layout::contiguous) {
    Array out(dtype, grad.matrix().rows, octavo::features_of(weight), layout);
    octavo::linear_backward(grad.matrix(), weight, out.matrix(), options);
    wait_for_device();
    return out;
}

// Every output is within what sums in float32 and the rounding to `out` may be off by. A rotated sum is off by as much
// as its block of the weight is long.
void check_backward(const Array& grad, const Weight& weight, const Array& out, bool with_kept) {
    const Values w = weight.values(with_kept);
    const Values gradients = grad.values();
    const std::int64_t block = weight.rotation() == 0 ? 1 : weight.rotation();
    Values lengths(w.rows, (w.cols + block - 1) / block);
    for (std::int64_t j = 0; j < w.rows; ++j) {
        for (std::int64_t h = 0; h < w.cols; ++h) lengths(j, h / block) += w(j, h) * w(j, h);
    }
    for (double& length : lengths.v) length = std::sqrt(length);
    const double unit = out.matrix().dtype == DType::f32   ? 0x1p-24
                        : out.matrix().dtype == DType::f16 ? 0x1p-11
                                                           : 0x1p-8;
    for (std::int64_t i = 0; i < out.matrix().rows; ++i) {
        for (std::int64_t h = 0; h < w.cols; ++h) {
            double sum = 0;
            double magnitude = 0;
            for (std::int64_t j = 0; j < w.rows; ++j) {
                sum += gradients(i, j) * w(j, h);
                magnitude += std::fabs(gradients(i, j)) * lengths(j, h / block);
            }
            const double bound =
                static_cast<double>(w.rows + 16) * 0x1p-24 * magnitude + unit * std::fabs(sum) + 0x1p-24 * unit;
            if (std::fabs(out.get(i, h) - sum) <= bound) continue;
            const check::Context context("row ", i, ", column ", h, ", bound ", bound);
            CHECK_EQ(out.get(i, h), sum);
        }
    }
}

}  // namespace

TEST(literal) {
    // Codes [127, -64, 0] with scale 2/127 * 63.5 = 1 and [0, 127, 32] with scale 0.5; column 2 is kept as it was.
    const Array original(DType::f32, Values(2, 3, {127, -64, 0.25, 0, 63.5, 16}));
    const Weight weight(original, {}, {2});
    const Array grad(DType::f16, Values(2, 2, {1, 2, -0.5, 0}));
    check_values("kept", backward(grad, weight.view(), DType::f32),
                 Values(2, 3, {127, -64 + 127, 0.25 + 32, -63.5, 32, -0.125}));
    const Values without(2, 3, {127, -64 + 127, 32, -63.5, 32, 0});
    check_values("none", backward(grad, weight.view(), DType::f32, {.outliers = Outliers::none}), without);
    check_values("weight_only", backward(grad, weight.view(), DType::f32, {.path = Path::weight_only}), without);
}

TEST(matches_the_product_with_the_dequantized_weight) {
    Random random(61);
    struct Shape {
        std::int64_t m, n, k;
    };
    for (const Shape s : {Shape{1, 1, 1}, Shape{7, 17, 66}, Shape{35, 300, 330}}) {
        for (const Scheme scheme : schemes) {
            for (const std::int32_t rotation : {0, 16, 256}) {
                for (const DType dtype : float_dtypes) {
                    if (s.m == 35 && dtype != (scheme == Scheme::absmax ? DType::f32 : DType::bf16)) continue;
                    const Granularity granularity = dtype == DType::f32 ? Granularity::vector : Granularity::row;
                    const check::Context context(s.m, " x ", s.n, " x ", s.k, " scheme ", check::show(scheme),
                                                 " rotation ", rotation, " ", name_of(dtype));
                    const std::vector<std::int32_t> kept =
                        s.k > 64 ? std::vector<std::int32_t>{0, 5, 65} : std::vector<std::int32_t>{};
                    const Weight weight(Array(dtype, random_normal(random, s.n, s.k, 0.05)),
                                        {scheme, granularity, rotation}, kept);
                    const Array grad(dtype, random_normal(random, s.m, s.n));
                    check_backward(grad, weight, backward(grad, weight.view(), dtype), true);
                }
            }
        }
    }
}

// Strides, packed codes, threads, the rows of a call and the device change no bit.
TEST(layouts_threads_rows_and_devices_change_nothing) {
    Random random(62);
    const Array original(DType::bf16, random_normal(random, 70, 300));
    const Values grads = random_normal(random, 40, 70);
    for (const std::int32_t rotation : {0, 64}) {
        const QuantizeOptions options{.scheme = Scheme::zeropoint, .rotation = rotation};
        const std::vector<std::int32_t> kept{3, 64, 299};
        const Weight weight(original, options, kept);
        const Array grad(DType::f32, grads);
        const Values expected = backward(grad, weight.view(), DType::f16).values();
        for (const Layout layout : layouts) {
            const check::Context context("rotation ", rotation, " layout ", check::show(layout));
            const Array out = backward(Array(DType::f32, grads, layout), Weight(original, options, kept, layout).view(),
                                       DType::f16, {}, layout);
            check_values("out", out, expected);
            CHECK(out.gaps_untouched());
        }
        for (const std::int64_t row : {0, 17, 39}) {
            const auto begin = grads.v.begin() + row * grads.cols;
            const Array one =
                backward(Array(DType::f32, std::vector<double>(begin, begin + grads.cols)), weight.view(), DType::f16);
            const auto expected_row = expected.v.begin() + row * expected.cols;
            check_values("one row", one, std::vector<double>(expected_row, expected_row + expected.cols));
        }
        if (test_device().kind != octavo::DeviceKind::cpu) {
            octavo::WeightView view = weight.view();
            octavo::ConstMatrix source = grad.matrix();
            const Array out(DType::f16, expected.rows, expected.cols);
            octavo::Matrix target = out.matrix();
            for (octavo::Device* device :
                 {&view.codes.device, &view.scale.device, &view.zeropoint.device, &view.code_sums.device,
                  &view.outlier_columns.device, &view.outlier_weight.device, &source.device, &target.device}) {
                *device = {};  // whose memory the host reads, too
            }
            octavo::linear_backward(source, view, target);
            check_values("CPU", out, expected);
            continue;
        }
        const auto threads = octavo::num_threads();
        octavo::set_num_threads(3);
        check_values("threads", backward(grad, weight.view(), DType::f16), expected);
        octavo::set_num_threads(threads);
        octavo::WeightView view = weight.view();
        const Array packed(DType::i8, 1, octavo::packed_size(view.codes.rows, view.codes.cols));
        octavo::pack(view.codes, packed.vector());
        view.codes.data = packed.matrix().data;
        view.layout = octavo::Layout::packed;
        check_values("packed", backward(grad, view, DType::f16), expected);
    }
}

// The int8 product, computed by `linear` of its definition: grad times the scales, the transposed codes with one scale.
Values int8_product(const Values& grads, const Weight& weight, const QuantizeOptions& options) {
    const octavo::WeightView view = weight.view();
    Values scaled = grads;
    for (std::int64_t i = 0; i < grads.rows; ++i) {
        for (std::int64_t j = 0; j < grads.cols; ++j) {
            scaled(i, j) = static_cast<float>(grads(i, j)) *
                           static_cast<float>(weight.scale(options.granularity == Granularity::vector ? j : 0));
        }
    }
    const Array x(DType::f32, scaled);
    Values across(view.codes.cols, view.codes.rows);
    for (std::int64_t j = 0; j < view.codes.rows; ++j) {
        for (std::int64_t h = 0; h < view.codes.cols; ++h) across(h, j) = weight.code(j, h);
    }
    const Array codes(DType::i8, across);
    const Array one(DType::f32, Values(1, 1, {1}));
    const Array sums(DType::i32, 1, across.rows);
    octavo::sum_codes(codes.matrix(), sums.vector());
    const Array y(DType::f32, grads.rows, across.rows);
    octavo::linear(
        x.matrix(),
        {.codes = codes.matrix(), .scale = one.vector(), .code_sums = sums.vector(), .granularity = Granularity::row},
        octavo::absent_vector, y.matrix(),
        {.relative = 6.3F, .cap = 0.02, .outliers = Outliers::rows, .path = Path::int8});
    wait_for_device();
    return y.values();
}

// Equal to its definition bit for bit, whatever the order of the codes; and, with kept columns, to the product with the
// dequantized weight there.
TEST(int8_is_linear_with_the_transposed_codes) {
    Random random(63);
    struct Shape {
        std::int64_t m, n, k;
    };
    const LinearOptions int8{.path = Path::int8};
    for (const Shape s : {Shape{1, 1, 1}, Shape{3, 17, 66}, Shape{20, 100, 70}, Shape{70, 130, 200}}) {
        for (const Granularity granularity : {Granularity::vector, Granularity::row}) {
            const check::Context context(s.m, " x ", s.n, " x ", s.k, " granularity ", static_cast<int>(granularity));
            const Array original(DType::f32, random_normal(random, s.n, s.k, 0.05));
            const QuantizeOptions options{.granularity = granularity};
            Values grads = random_normal(random, s.m, s.n);
            for (std::int64_t i = 0; i < s.m; i += 2) grads(i, i * 7 % s.n) *= 60;  // is multiplied in 16 bit
            const Array grad(DType::f32, grads);
            const Weight plain(original, options, {});
            const Values expected = int8_product(grads, plain, options);
            check_values("out", backward(grad, plain.view(), DType::f32, int8), expected);
            if (s.k > 65) {
                const Weight weight(original, options, {0, 5, 65});
                const Values floats = backward(grad, weight.view(), DType::f32).values();
                Values with_kept = expected;
                for (const std::int64_t column : {0, 5, 65}) {
                    for (std::int64_t i = 0; i < s.m; ++i) with_kept(i, column) = floats(i, column);
                }
                check_values("kept", backward(grad, weight.view(), DType::f32, int8), with_kept);
                for (const Layout layout : layouts) {
                    const check::Context of_layout("layout ", check::show(layout));
                    const Array out =
                        backward(Array(DType::f32, grads, layout), Weight(original, options, {0, 5, 65}, layout).view(),
                                 DType::f32, int8, layout);
                    check_values("layout", out, with_kept);
                    CHECK(out.gaps_untouched());
                }
                const LinearOptions none{.outliers = Outliers::none, .path = Path::int8};
                check_values("none", backward(grad, weight.view(), DType::f32, none), expected);
            }
            if (test_device().kind != octavo::DeviceKind::cpu) continue;
            octavo::WeightView view = plain.view();
            const Array packed(DType::i8, 1, octavo::packed_size(view.codes.rows, view.codes.cols));
            octavo::pack(view.codes, packed.vector());
            view.codes.data = packed.matrix().data;
            view.layout = octavo::Layout::packed;
            check_values("packed", backward(grad, view, DType::f32, int8), expected);
        }
    }
}

// Close to the product with the dequantized weight: rotation, and dtypes. A zeropoint goes by that product itself.
TEST(int8_is_near_the_product_with_the_dequantized_weight) {
    Random random(64);
    const Values grads = random_normal(random, 40, 150);
    for (const std::int32_t rotation : {0, 16, 256}) {
        for (const DType dtype : float_dtypes) {
            const check::Context context("rotation ", rotation, " ", name_of(dtype));
            const Weight weight(Array(dtype, random_normal(random, 150, 330, 0.05)), {.rotation = rotation}, {7, 300});
            const Array grad(dtype, grads);
            const Values exact = backward(grad, weight.view(), DType::f32).values();
            const Values got = backward(grad, weight.view(), dtype, {.path = Path::int8}).values();
            double error = 0;
            double square = 0;
            for (std::size_t i = 0; i < exact.v.size(); ++i) {
                error += (got.v[i] - exact.v[i]) * (got.v[i] - exact.v[i]);
                square += exact.v[i] * exact.v[i];
            }
            CHECK(std::sqrt(error / square) < 0.012);  // steps of absmax / 127, of normal values: 0.007
            CHECK(error > 0);
        }
    }
    const Weight zeropoint(Array(DType::f32, random_normal(random, 150, 33)), {.scheme = Scheme::zeropoint}, {});
    const Array grad(DType::f32, grads);
    check_values("zeropoint", backward(grad, zeropoint.view(), DType::f32, {.path = Path::int8}),
                 backward(grad, zeropoint.view(), DType::f32).values());
}

TEST(non_finite_gradients_stay_in_their_row) {
    const Weight weight(Array(DType::f32, Values(2, 2, {127, 1, -127, 1})), {}, {});
    const Array grad(DType::f32, Values(3, 2, {infinity, 0, 1, 1, 0, quiet_nan}));
    const Values expected(3, 2, {infinity, infinity, 0, 2, quiet_nan, quiet_nan});
    check_values("out", backward(grad, weight.view(), DType::f32), expected);
    check_values("int8", backward(grad, weight.view(), DType::f32, {.path = Path::int8}), expected);
}

TEST(no_rows_or_no_features) {
    const Weight weight(Array(DType::f32, Values(2, 3, {1, 2, 3, 4, 5, 6})), {}, {});
    CHECK_EQ(backward(Array(DType::f32, 0, 2), weight.view(), DType::f32).values().rows, 0);
    const Weight of_none(Array(DType::f32, 0, 3), {}, {});
    check_values("zeros", backward(Array(DType::f32, 2, 0), of_none.view(), DType::f32), Values(2, 3));
    const Weight no_inputs(Array(DType::f32, 2, 0), {}, {});
    CHECK_EQ(backward(Array(DType::f32, 2, 2), no_inputs.view(), DType::f32).values().cols, 0);
}

TEST(argument_errors) {
    const Weight weight(Array(DType::f32, Values(2, 3, {1, 2, 3, 4, 5, 6})), {}, {});
    const Array grad(DType::f32, 4, 2);
    const auto call = [&](const Array& given, const Array& out, const LinearOptions& options = {}) {
        octavo::linear_backward(given.matrix(), weight.view(), out.matrix(), options);
    };
    const Array out(DType::f32, 4, 3);
    CHECK_THROWS(call(Array(DType::i8, 4, 2), out), type,
                 "linear_backward: grad: expected dtype float32, float16 or bfloat16, got int8");
    CHECK_THROWS(call(Array(DType::f32, 4, 3), out), value,
                 "linear_backward: grad: expected n = 2 columns for a weight of shape [2, 3], got [4, 3]");
    CHECK_THROWS(call(grad, Array(DType::f32, 4, 2)), value, "linear_backward: out: expected shape [4, 3], got [4, 2]");
    CHECK_THROWS(call(grad, Array(DType::i32, 4, 3)), type, "linear_backward: out: expected dtype float32");
    CHECK_THROWS(call(grad, out, {.threshold = -1}), value, "linear_backward: threshold: expected");
    octavo::Matrix over_grad = out.matrix();
    over_grad.data = grad.matrix().data;
    CHECK_THROWS(octavo::linear_backward(grad.matrix(), weight.view(), over_grad), value,
                 "linear_backward: out: expected memory apart from grad");
}
