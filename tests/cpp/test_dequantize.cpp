// dequantize: literal cases, rounding to each output dtype, layouts and errors.
#include <limits>
#include <optional>
#include <vector>

#include "arrays.hpp"
#include "calls.hpp"
#include "check.hpp"
#include "octavo/dequantize.hpp"

using octavo::DType;

namespace {

constexpr double quiet_nan = std::numeric_limits<double>::quiet_NaN();

Array dequantize(const Array& codes, const Array& scale, const std::optional<Array>& zeropoint, DType dtype,
                 Layout layout = Layout::contiguous) {
    Array out(dtype, codes.matrix().rows, codes.matrix().cols, layout);
    octavo::dequantize(codes.matrix(), scale.vector(), vector_of(zeropoint), out.matrix());
    return out;
}

}  // namespace

TEST(literal) {
    const Array codes(DType::i8, Values(2, 3, {1, -127, 0, 4, -128, 127}));
    const Array per_row(DType::f32, {0.5, 2});
    check_values("rows", dequantize(codes, per_row, std::nullopt, DType::f32),
                 Values(2, 3, {0.5, -63.5, 0, 8, -256, 254}));
    check_values("tensor", dequantize(codes, Array(DType::f32, {3}), Array(DType::f32, {-4}), DType::f32),
                 Values(2, 3, {-9, -393, -12, 0, -396, 369}));
    check_values("zeropoints", dequantize(codes, per_row, Array(DType::f32, {127, -1}), DType::f32),
                 Values(2, 3, {64, 0, 63.5, 6, -258, 252}));
    check_values("NaN", dequantize(codes, Array(DType::f32, {quiet_nan, 1}), std::nullopt, DType::f16),
                 Values(2, 3, {quiet_nan, quiet_nan, quiet_nan, 4, -128, 127}));
}

TEST(rounded_once) {
    Random random(83);
    const Values codes = random_codes(random, 11, 67);
    Values scales(1, 11);
    Values zeropoints(1, 11);
    for (double& value : scales.v) value = static_cast<float>(random.uniform(1e-3, 1));
    for (double& value : zeropoints.v) value = static_cast<double>(random.integer(-1000, 1000));
    for (const DType dtype : float_dtypes) {
        for (const bool has_zeropoint : {false, true}) {
            Values expected(11, 67);
            for (std::int64_t i = 0; i < 11; ++i) {
                for (std::int64_t j = 0; j < 67; ++j) {
                    const double code = codes(i, j) + (has_zeropoint ? zeropoints(0, i) : 0);
                    expected(i, j) = rounded(dtype, static_cast<float>(code * scales(0, i)));
                }
            }
            for (const Layout layout : layouts) {
                const check::Context context(name_of(dtype), " layout ", check::show(layout));
                std::optional<Array> zeropoint;
                if (has_zeropoint) zeropoint.emplace(DType::f32, zeropoints, layout);
                const Array out = dequantize(Array(DType::i8, codes, layout), Array(DType::f32, scales, layout),
                                             zeropoint, dtype, layout);
                check_values("out", out, expected);
                CHECK(out.gaps_untouched());
            }
        }
    }
}

TEST(no_rows_or_no_columns) {
    const Array one(DType::f32, {1});
    CHECK_EQ(dequantize(Array(DType::i8, 0, 3), one, std::nullopt, DType::f32).values().rows, 0);
    CHECK_EQ(dequantize(Array(DType::i8, 3, 0), one, std::nullopt, DType::f32).values().cols, 0);
    CHECK_EQ(dequantize(Array(DType::i8, 0, 3), Array(DType::f32, 1, 0), std::nullopt, DType::f32).values().rows, 0);
}

TEST(argument_errors) {
    const Array codes(DType::i8, 2, 3);
    const Array scale(DType::f32, {1, 1});
    CHECK_THROWS(dequantize(scale, scale, std::nullopt, DType::f32), type,
                 "dequantize: codes: expected dtype int8, got float32");
    CHECK_THROWS(dequantize(codes, codes, std::nullopt, DType::f32), type, "dequantize: scale: expected dtype float32");
    CHECK_THROWS(dequantize(codes, Array(DType::f32, 1, 3), std::nullopt, DType::f32), value,
                 "dequantize: scale: expected shape [2], got [3]");
    CHECK_THROWS(dequantize(codes, scale, Array(DType::f32, {1}), DType::f32), value,
                 "dequantize: zeropoint: expected shape [2], got [1]");
    CHECK_THROWS(dequantize(codes, scale, std::nullopt, DType::i32), type,
                 "dequantize: out: expected dtype float32, float16 or bfloat16, got int32");
    const Array wide(DType::f32, 2, 4);
    CHECK_THROWS(octavo::dequantize(codes.matrix(), scale.vector(), octavo::absent_vector, wide.matrix()), value,
                 "dequantize: out: expected shape [2, 3], got [2, 4]");
    octavo::Matrix over_scale = wide.matrix();
    over_scale.data = scale.matrix().data;
    over_scale.cols = 3;
    CHECK_THROWS(octavo::dequantize(codes.matrix(), scale.vector(), octavo::absent_vector, over_scale), value,
                 "dequantize: out: expected memory apart from scale");
}
