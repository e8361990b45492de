// quantize, quantize_weight and sum_codes: literal cases, the edges of the number formats, then the reference.
#include <cmath>
#include <limits>
#include <optional>
#include <utility>
#include <vector>

#include "arrays.hpp"
#include "calls.hpp"
#include "check.hpp"
#include "device.hpp"
#include "octavo/pack.hpp"
#include "octavo/quantize.hpp"
#include "octavo/stochastic.hpp"
#include "reference.hpp"

using octavo::DType;
using octavo::Granularity;
using octavo::Scheme;

namespace {

constexpr double quiet_nan = std::numeric_limits<double>::quiet_NaN();
constexpr double infinity = std::numeric_limits<double>::infinity();
constexpr double greatest = std::numeric_limits<float>::max();
constexpr double least = std::numeric_limits<float>::denorm_min();

struct Case {
    const char* what;
    std::vector<double> x;
    std::vector<double> codes;
    double scale;
    double zeropoint = 0;
};

void check_rows(Scheme scheme, const std::vector<Case>& cases) {
    for (const Case& c : cases) {
        for (const Granularity granularity : {Granularity::row, Granularity::tensor}) {
            const check::Context context(c.what);
            const Codes result = quantize(Array(DType::f32, c.x), scheme, granularity);
            check_values("codes", result.codes, c.codes);
            CHECK_EQ(result.scale.get(0), static_cast<float>(c.scale));
            if (result.zeropoint) CHECK_EQ(result.zeropoint->get(0), c.zeropoint);
        }
    }
}

// Rows of random size, with a few special values strewn in.
Values random_rows(Random& random, std::int64_t m, std::int64_t k, const std::vector<double>& specials = {}) {
    Values x = random_normal(random, m, k);
    for (std::int64_t i = 0; i < m; ++i) {
        const double size = std::ldexp(1.0, static_cast<int>(random.integer(-10, 10)));
        for (std::int64_t j = 0; j < k; ++j) x(i, j) *= size;
    }
    for (const double special : specials) x(random.integer(0, m - 1), random.integer(0, k - 1)) = special;
    return x;
}

Values as_held(DType dtype, Values values) {
    for (double& value : values.v) value = rounded(dtype, value);
    return values;
}

}  // namespace

TEST(absmax_literal) {
    check_rows(Scheme::absmax,
               {
                   {"half to even", {127, -63.5, 0.5, 1.5, -0.5, 2.5}, {127, -64, 0, 2, 0, 2}, 1},
                   {"negative absmax", {-2, 1, 0, 0.5}, {-127, 64, 0, 32}, 2 / 127.0},
                   {"one value", {-0.3F}, {-127}, 0.3F / 127.0},
                   {"zeros", {0, -0.0, 0}, {0, 0, 0}, 0},
                   {"minus zero alone", {-0.0}, {0}, 0},
                   {"NaN", {1, quiet_nan, 3}, {0, 0, 0}, quiet_nan},
                   {"Inf", {1, infinity, 3}, {0, 0, 0}, quiet_nan},
                   {"-Inf", {1, -infinity, 3}, {0, 0, 0}, quiet_nan},
                   {"empty", {}, {}, 0},
                   // x * 127 overflows for the first two, not for the third
                   {"greatest", {greatest, -greatest / 2, greatest / 200, 0}, {127, -64, 1, 0}, greatest / 127},
                   {"subnormal", {127 * least, -64 * least, 0.0, least}, {127, -64, 0, 1}, least},
                   {"a scale below float32", {least}, {127}, 0},
               });
}

TEST(zeropoint_literal) {
    check_rows(Scheme::zeropoint,
               {
                   {"nd of 1, half to even", {0, 1.5, 2.5, 254}, {-127, -125, -125, 127}, 1, 127},
                   {"both signs", {-1, 3, 0}, {-127, 127, -63}, 4 / 254.0, 63},
                   {"one-sided", {100, 101, 100.5}, {-127, 127, 0}, 1 / 254.0, 25527},
                   {"constant", {5, 5}, {-127, -127}, 5, 128},
                   {"negative constant", {-5, -5}, {-127, -127}, 5, 126},
                   {"zeros", {0, -0.0}, {-127, -127}, 1, 127},
                   {"NaN", {1, quiet_nan, 3}, {0, 0, 0}, quiet_nan, 0},
                   {"Inf", {-infinity, 1}, {0, 0}, quiet_nan, 0},
                   {"empty", {}, {}, 1, 0},
                   // max - min overflows float32: in float64 nd = 127 / greatest, zp = -127 + 127
                   {"greatest spread", {-greatest, greatest, 0, greatest / 2}, {-127, 127, 0, 64}, greatest / 127, 0},
                   // nd overflows float32: in float64 nd = 1 / least, zp = 0 + 127
                   {"least spread", {0, 254 * least, 3 * least}, {-127, 127, -124}, least, 127},
                   {"subnormal constant", {3 * least, 3 * least}, {-127, -127}, 3 * least, 128},
               });
}

// What a constant group stands for is the constant itself, in every dtype.
TEST(zeropoint_reproduces_constants) {
    for (const DType dtype : float_dtypes) {
        for (const double value : {1.0, -1.0, 0.1, -7.3, 1e-7, -6e-8, 60000.0}) {
            const double held = rounded(dtype, value);
            const Codes result = quantize(Array(dtype, {value, value, value}), Scheme::zeropoint, Granularity::row);
            const double zeropoint = result.zeropoint ? result.zeropoint->get(0) : 0;
            CHECK_EQ((result.codes.get(1) + zeropoint) * result.scale.get(0), held);
        }
    }
}

TEST(excluded_columns) {
    for (const Scheme scheme : schemes) {
        // The NaN and the large values are in excluded columns; order and repetition of the list do not matter.
        const Array x(DType::f32, Values(2, 5, {1, quiet_nan, 900, -2, 4, 3, 1e30, infinity, 0, -6}));
        const auto result = quantize(x, scheme, Granularity::row, {2, 1, 2});
        const reference::Mask mask{0, 1, 1, 0, 0, 0, 1, 1, 0, 0};
        check_codes(result, reference::quantize(x.values(), scheme, true, mask));
        CHECK_EQ(result.codes.get(0, 1), 0.0);
        CHECK_EQ(result.scale.get(0), scheme == Scheme::absmax ? 4 / 127.0F : 6 / 254.0F);

        const auto all = quantize(x, scheme, Granularity::row, {0, 1, 2, 3, 4});
        check_values("codes", all.codes, Values(2, 5));
        CHECK_EQ(all.scale.get(1), scheme == Scheme::absmax ? 0.0 : 1.0);
        const auto tensor = quantize(x, scheme, Granularity::tensor, {1, 2});
        CHECK_EQ(tensor.scale.get(0), scheme == Scheme::absmax ? 6 / 127.0F : 10 / 254.0F);
    }
}

TEST(matches_the_reference) {
    struct Shape {
        std::int64_t m, k;
    };
    Random random(31);
    for (const Shape shape : {Shape{1, 1}, Shape{1, 64}, Shape{5, 63}, Shape{3, 65}, Shape{7, 129}, Shape{2, 1000}}) {
        for (const DType dtype : float_dtypes) {
            for (const Scheme scheme : schemes) {
                for (const Granularity granularity : {Granularity::row, Granularity::tensor}) {
                    for (const auto& specials : {std::vector<double>{}, {quiet_nan}, {-infinity, 0}, {3e38, -2e38}}) {
                        const check::Context context(shape.m, " x ", shape.k, " ", name_of(dtype), " scheme ",
                                                     check::show(scheme), " granularity ", check::show(granularity));
                        const Array x(dtype, random_rows(random, shape.m, shape.k, specials));
                        std::vector<std::int32_t> exclude;
                        if (shape.k > 4) exclude = {0, static_cast<std::int32_t>(random.integer(1, shape.k - 1))};
                        reference::Mask mask(x.values().v.size());
                        for (const std::int32_t column : exclude) {
                            for (std::int64_t i = 0; i < shape.m; ++i) {
                                mask[static_cast<std::size_t>(i * shape.k + column)] = 1;
                            }
                        }
                        const bool per_row = granularity == Granularity::row;
                        check_codes(quantize(x, scheme, granularity, exclude),
                                    reference::quantize(x.values(), scheme, per_row, mask));
                    }
                }
            }
        }
    }
}

// Magnitudes near the ends of float32's range, where products, spreads and inverses overflow.
TEST(matches_the_reference_at_the_ends_of_the_range) {
    Random random(37);
    for (const double size : {1e-45, 1e-44, 1e-40, 1e-38, 1e-37, 1e-36, 1.0, 2.67e36, 2.69e36, 1e38, 3.4e38}) {
        for (const Scheme scheme : schemes) {
            // The later ones lie close together, far from 0: zeropoints beyond 2^24.
            for (const double offset : {0.0, 0.3, 0.999, 0.999999, 1.0}) {
                const check::Context context("size ", size, " scheme ", check::show(scheme), " offset ", offset);
                Values x(20, 70);
                for (double& value : x.v) value = size * (offset + (1 - offset) * random.uniform(-1, 1));
                const Array array(DType::f32, x);
                check_codes(quantize(array, scheme, Granularity::row),
                            reference::quantize(array.values(), scheme, true));
            }
        }
    }
}

// The codes of float16 and bfloat16 values are those of the real numbers.
TEST(absmax_codes_are_ideal_for_16_bit_inputs) {
    Random random(41);
    for (const DType dtype : {DType::f16, DType::bf16}) {
        const Array x(dtype, random_rows(random, 300, 200));
        const Codes result = quantize(x, Scheme::absmax, Granularity::row);
        for (std::int64_t i = 0; i < 300; ++i) {
            double absmax = 0;
            for (std::int64_t j = 0; j < 200; ++j) absmax = std::max(absmax, std::fabs(x.get(i, j)));
            for (std::int64_t j = 0; j < 200; ++j) {
                const double expected = reference::ideal_absmax_code(x.get(i, j), absmax);
                if (result.codes.get(i, j) != expected) CHECK_EQ(result.codes.get(i, j), expected);
            }
        }
    }
}

// Where the absmax times 127 overflows, the smaller values' products do not, and are still divided once. Values
// half-way between two codes tell the formulas apart.
TEST(absmax_codes_near_overflow) {
    Random random(42);
    Values x(50, 128);
    for (std::int64_t i = 0; i < x.rows; ++i) {
        const double absmax = greatest / 127 * random.uniform(0.99, 2);
        for (std::int64_t j = 0; j < 127; ++j) x(i, j) = (static_cast<double>(j) + 0.5) / 127 * absmax;
        x(i, 127) = -absmax;
    }
    const Array array(DType::f32, x);
    check_codes(quantize(array, Scheme::absmax, Granularity::row),
                reference::quantize(array.values(), Scheme::absmax, true));
}

TEST(codes_do_not_change_with_powers_of_two) {
    Random random(43);
    const Values x = as_held(DType::f32, random_normal(random, 5, 100));
    const Codes plain = quantize(Array(DType::f32, x), Scheme::absmax, Granularity::row);
    for (const int exponent : {-100, -3, 1, 60, 120}) {
        Values scaled = x;
        for (double& value : scaled.v) value = std::ldexp(value, exponent);
        const Codes result = quantize(Array(DType::f32, scaled), Scheme::absmax, Granularity::row);
        check_values("codes", result.codes, plain.codes.values());
        CHECK_EQ(result.scale.get(3), std::ldexp(plain.scale.get(3), exponent));
    }
}

// Nor those of rotated rows, where the sums of a block overflow although no element does.
TEST(rotated_codes_do_not_change_with_powers_of_two) {
    Random random(44);
    constexpr std::int64_t rows = 5;
    constexpr std::int64_t cols = 640;
    for (const DType dtype : {DType::f32, DType::bf16}) {
        Values x(rows, cols);
        for (double& value : x.v) value = random.uniform(-4, 4);
        for (const auto& [granularity, block] :
             {std::pair{Granularity::row, 16}, std::pair{Granularity::row, 64}, std::pair{Granularity::row, 256},
              std::pair{Granularity::tensor, 64}, std::pair{Granularity::tensor, 256}}) {
            const std::int64_t groups = granularity == Granularity::row ? rows : 1;
            const std::int64_t width = octavo::rotated_size(cols, block);
            const auto quantized = [&, granularity = granularity, block = block](
                                       int exponent, Layout layout, const Array& codes, const Array& scale) {
                Values scaled = x;
                for (double& value : scaled.v) value = std::ldexp(value, exponent);
                octavo::quantize(Array(dtype, scaled, layout).matrix(), {Scheme::absmax, granularity, block},
                                 octavo::absent_vector, codes.matrix(), scale.vector(), octavo::absent_vector);
            };
            const Array plain(DType::i8, rows, width);
            const Array plain_scale(DType::f32, 1, groups);
            quantized(0, Layout::contiguous, plain, plain_scale);
            for (const auto& [exponent, layout] : {std::pair{1, Layout::contiguous}, std::pair{125, Layout::contiguous},
                                                   std::pair{125, Layout::unaligned}}) {
                const check::Context context(name_of(dtype), " in blocks of ", block, ", times 2^", exponent);
                const Array codes(DType::i8, rows, width);
                const Array scale(DType::f32, 1, groups);
                quantized(exponent, layout, codes, scale);
                check_values("codes", codes, plain.values());
                for (std::int64_t i = 0; i < groups; ++i) {
                    CHECK_EQ(scale.get(i), std::ldexp(plain_scale.get(i), exponent));
                }
            }
        }
    }
}

TEST(layouts_give_the_same_result) {
    Random random(47);
    const Values x = random_rows(random, 6, 37);
    for (const DType dtype : float_dtypes) {
        for (const Scheme scheme : schemes) {
            const Codes plain = quantize(Array(dtype, x), scheme, Granularity::row, {3, 30});
            for (const Layout layout : layouts) {
                const check::Context context("layout ", check::show(layout));
                const Array source(dtype, x, layout);
                const std::string before = source.bytes();
                const Codes result = quantize(source, scheme, Granularity::row, {3, 30}, layout);
                check_values("codes", result.codes, plain.codes.values());
                check_values("scale", result.scale, plain.scale.values());
                CHECK(source.bytes() == before);
                CHECK(result.codes.gaps_untouched());
                CHECK(result.scale.gaps_untouched());
            }
        }
    }
    // A row repeated by a stride of 0.
    const Array one_row(DType::f32, std::vector<double>(x.v.begin(), x.v.begin() + 37));
    octavo::Matrix repeated = one_row.matrix();
    repeated.rows = 3;
    repeated.row_stride = 0;
    const Array codes(DType::i8, 3, 37);
    const Array scale(DType::f32, 1, 3);
    octavo::quantize(repeated, Scheme::absmax, Granularity::row, octavo::absent_vector, codes.matrix(), scale.vector(),
                     octavo::absent_vector);
    CHECK_EQ(codes.get(2, 11), codes.get(0, 11));
    CHECK_EQ(scale.get(2), scale.get(0));
}

TEST(no_rows_or_no_columns) {
    for (const Scheme scheme : schemes) {
        const double scale = scheme == Scheme::absmax ? 0 : 1;
        CHECK_EQ(quantize(Array(DType::f16, 0, 5), scheme, Granularity::tensor).scale.get(0), scale);
        CHECK_EQ(quantize(Array(DType::f16, 3, 0), scheme, Granularity::row).scale.get(2), scale);
        CHECK_EQ(quantize(Array(DType::f16, 0, 0), scheme, Granularity::row).scale.values().cols, 0);
        const Codes weight = quantize_weight(Array(DType::f32, 2, 0), scheme, Granularity::vector);
        check_values("code_sums", weight.code_sums, {0, 0});
    }
}

// Blocks of a matrix times the Hadamard matrix over the root of the block, every step rounded to float32.
Values rotated(const Values& x, std::int64_t block) {
    Values out(x.rows, octavo::rotated_size(x.cols, static_cast<std::int32_t>(block)));
    for (std::int64_t i = 0; i < x.rows; ++i) {
        for (std::int64_t j = 0; j < x.cols; ++j) out(i, j) = x(i, j);
        for (std::int64_t distance = 1; distance < block; distance *= 2) {
            for (std::int64_t j = 0; j < out.cols; ++j) {
                if ((j & distance) != 0) continue;
                const auto u = static_cast<float>(out(i, j));
                const auto v = static_cast<float>(out(i, j + distance));
                out(i, j) = u + v;
                out(i, j + distance) = u - v;
            }
        }
        for (std::int64_t j = 0; j < out.cols; ++j) out(i, j) /= std::sqrt(static_cast<double>(block));
    }
    return out;
}

TEST(rotation) {
    Random random(83);
    for (const DType dtype : float_dtypes) {
        for (const std::int32_t block : {16, 64, 256}) {
            for (const std::int64_t k : {5, 64, 300}) {
                for (const auto granularity : {octavo::Granularity::row, octavo::Granularity::tensor}) {
                    const check::Context context(name_of(dtype), " ", block, " k ", k);
                    const Array x(dtype, random_normal(random, 3, k), layouts[static_cast<std::size_t>(k) % 6]);
                    Values values = x.values();
                    for (std::int64_t i = 0; i < 3; ++i) values(i, k / 2) = 0;  // excluded before it is rotated
                    values = rotated(values, block);
                    const std::int64_t groups = granularity == octavo::Granularity::tensor ? 1 : 3;
                    const Array codes(DType::i8, 3, values.cols);
                    const Array scale(DType::f32, 1, groups);
                    const Array exclude = int32_array({static_cast<std::int32_t>(k / 2)});
                    octavo::quantize(x.matrix(), {octavo::Scheme::absmax, granularity, block}, exclude.vector(),
                                     codes.matrix(), scale.vector(), octavo::absent_vector);
                    for (std::int64_t i = 0; i < 3; ++i) {
                        float absmax = 0.0F;
                        for (std::int64_t r = 0; r < 3; ++r) {
                            for (std::int64_t j = 0; j < values.cols && (groups == 1 || r == i); ++j) {
                                absmax = std::max(absmax, static_cast<float>(std::fabs(values(r, j))));
                            }
                        }
                        CHECK_EQ(scale.get(groups == 1 ? 0 : i), absmax / 127.0F);
                        const float inverse = 127.0F / absmax;
                        for (std::int64_t j = 0; j < values.cols; ++j) {
                            const float product = static_cast<float>(values(i, j)) * inverse;
                            CHECK_EQ(codes.get(i, j), std::nearbyint(product) + 0.0);  // never -0
                        }
                    }
                    // And back: what was excluded is 0, the rest off by at most half a step of each of its block.
                    const Array back(DType::f32, 3, k);
                    octavo::dequantize(codes.matrix(), scale.vector(), octavo::absent_vector, block, back.matrix());
                    for (std::int64_t i = 0; i < 3; ++i) {
                        for (std::int64_t j = 0; j < k; ++j) {
                            const double step = scale.get(groups == 1 ? 0 : i) * std::sqrt(block);
                            const double expected = j == k / 2 ? 0.0 : x.values()(i, j);
                            CHECK(std::fabs(back.get(i, j) - expected) <= 0.51 * step);
                        }
                    }
                }
            }
        }
    }
}

TEST(weight) {
    const Array w(DType::bf16, Values(2, 3, {1, -2, 0.5, 0, 0.25, 8}));
    const Codes vector = quantize_weight(w, Scheme::absmax, Granularity::vector);
    check_values("codes", vector.codes, Values(2, 3, {64, -127, 32, 0, 4, 127}));
    check_values("code_sums", vector.code_sums, {-31, 131});
    CHECK_EQ(vector.scale.get(0), 2 / 127.0F);
    for (const Granularity granularity : {Granularity::tensor, Granularity::row}) {
        const Codes whole = quantize_weight(w, Scheme::absmax, granularity);
        check_values("codes", whole.codes, Values(2, 3, {16, -32, 8, 0, 4, 127}));
        check_values("scale", whole.scale, {8 / 127.0F});
        check_values("code_sums", whole.code_sums, {-8, 131});
    }
    Random random(53);
    for (const DType dtype : float_dtypes) {
        for (const Scheme scheme : schemes) {
            for (const Layout layout : layouts) {
                const Array weight(dtype, random_rows(random, 9, 131), layout);
                const Codes result = quantize_weight(weight, scheme, Granularity::vector, layout);
                check_codes(result, reference::quantize(weight.values(), scheme, true));
                const Array sums(DType::i32, 1, 9, layout);
                octavo::sum_codes(result.codes.matrix(), sums.vector());
                for (std::int64_t j = 0; j < 9; ++j) {
                    double sum = 0;
                    for (std::int64_t h = 0; h < 131; ++h) sum += result.codes.get(j, h);
                    CHECK_EQ(result.code_sums.get(j), sum);
                    CHECK_EQ(sums.get(j), sum);
                }
            }
        }
    }
}

// The codes that `pack` makes of those row by row, padding included.
TEST(packed_weight) {
    if (test_device().kind != octavo::DeviceKind::cpu) return;
    Random random(46);
    for (const auto& [n, k] : {std::pair{1, 1}, {16, 64}, {35, 70}, {50, 300}}) {
        const Array weight(DType::bf16, random_normal(random, n, k));
        for (const Scheme scheme : schemes) {
            for (const Granularity granularity : {Granularity::row, Granularity::vector}) {
                for (const std::int32_t rotation : {0, 64}) {
                    const check::Context context(n, " x ", k, " scheme ", check::show(scheme), " rotation ", rotation);
                    const octavo::QuantizeOptions options{scheme, granularity, rotation};
                    const std::int64_t groups = granularity == Granularity::vector ? n : 1;
                    const std::int64_t width = octavo::rotated_size(k, rotation);
                    const Array codes(DType::i8, n, width);
                    const Array expected(DType::i8, 1, octavo::packed_size(n, width));
                    const Array packed(DType::i8, std::vector<double>(expected.values().v.size(), 99));
                    const Array scales[] = {{DType::f32, 1, groups}, {DType::f32, 1, groups}};
                    const Array zeropoints[] = {{DType::f32, 1, groups}, {DType::f32, 1, groups}};
                    const Array sums[] = {{DType::i32, 1, n}, {DType::i32, 1, n}};
                    const auto zeropoint = [&](int which) {
                        return scheme == Scheme::zeropoint ? zeropoints[which].vector() : octavo::absent_vector;
                    };
                    octavo::quantize_weight(weight.matrix(), options, codes.matrix(), scales[0].vector(), zeropoint(0),
                                            sums[0].vector());
                    octavo::pack(codes.matrix(), expected.vector());
                    octavo::Matrix target = codes.matrix();
                    target.data = packed.matrix().data;
                    octavo::quantize_weight(weight.matrix(), options, target, scales[1].vector(), zeropoint(1),
                                            sums[1].vector(), {}, octavo::Layout::packed);
                    check_values("codes", packed, expected.values());
                    check_values("scale", scales[1], scales[0].values());
                    check_values("zeropoint", zeropoints[1], zeropoints[0].values());
                    check_values("sums", sums[1], sums[0].values());
                }
            }
        }
    }
}

// Known answers of Random123, by the authors of the paper.
TEST(philox) {
    const auto check_words = [](const octavo::RandomWords& found, const octavo::RandomWords& expected) {
        for (int i = 0; i < 4; ++i) CHECK_EQ(found.words[i], expected.words[i]);
    };
    constexpr std::uint32_t all = 0xFFFFFFFFU;
    check_words(octavo::philox({{0, 0, 0, 0}}, 0), {{0x6627E8D5U, 0xE169C58DU, 0xBC57AC4CU, 0x9B00DBD8U}});
    check_words(octavo::philox({{all, all, all, all}}, ~std::uint64_t{0}),
                {{0x408F276DU, 0x41C83B0EU, 0xA20BC7C6U, 0x6D5451FDU}});
    check_words(octavo::philox({{0x243F6A88U, 0x85A308D3U, 0x13198A2EU, 0x03707344U}}, 0x299F31D0A4093822U),
                {{0xD16CFE09U, 0x94FDCCEBU, 0x5001E420U, 0x24126EA1U}});
}

TEST(stochastic_weight) {
    Random random(54);
    constexpr std::int64_t n = 18;
    constexpr std::int64_t k = 70;
    for (const DType dtype : float_dtypes) {
        for (const Granularity granularity : {Granularity::row, Granularity::vector}) {
            const Array w(dtype, random_normal(random, n, k));
            const Values values = w.values();
            const std::int64_t groups = granularity == Granularity::vector ? n : 1;
            const Array codes(DType::i8, n, k);
            const Array scale(DType::f32, 1, groups);
            const Array sums(DType::i32, 1, n);
            const auto requantize = [&](std::optional<std::uint64_t> seed) {
                octavo::quantize_weight(w.matrix(), {Scheme::absmax, granularity}, codes.matrix(), scale.vector(),
                                        octavo::absent_vector, sums.vector(), {}, octavo::Layout::row_major,
                                        {.seed = seed});
            };
            requantize({});
            const Values nearest = scale.values();
            constexpr int draws = 64;
            std::vector<double> means(n * k, 0.0);
            for (std::uint64_t seed = 0; seed < draws; ++seed) {
                requantize(seed << 40U);
                check_values("scale", scale, nearest);
                for (std::int64_t j = 0; j < n; ++j) {
                    double sum = 0;
                    const auto of_row = static_cast<float>(scale.get(groups == 1 ? 0 : j));
                    for (std::int64_t h = 0; h < k; ++h) {
                        const double code = codes.get(j, h);
                        const auto words = octavo::words_of(j, h / 4, seed << 40U);
                        const auto x = static_cast<float>(values(j, h));
                        CHECK_EQ(code, octavo::stochastic_code(x, of_row, words.words[h % 4]));
                        CHECK(std::fabs(code - static_cast<double>(x) / of_row) < 1 + 1e-5);
                        sum += code;
                        means[static_cast<std::size_t>(j * k + h)] += code / draws;
                    }
                    CHECK_EQ(sums.get(j), sum);
                }
            }
            // A mean of 64 draws is off by 1 / 16 at most in the standard deviation, by less than five of them, and
            // the mean of those errors is 0: to the nearest it would be so only by chance.
            double bias = 0;
            for (std::int64_t i = 0; i < n * k; ++i) {
                const double exact = values(i / k, i % k) / scale.get(groups == 1 ? 0 : i / k);
                CHECK(std::fabs(means[static_cast<std::size_t>(i)] - exact) < 5.0 / 16);
                bias += (means[static_cast<std::size_t>(i)] - exact) / (n * k);
            }
            CHECK(std::fabs(bias) < 5.0 / 16 / std::sqrt(static_cast<double>(n * k)));
        }
    }
}

TEST(stochastic_weight_is_the_same_packed) {
    if (test_device().kind != octavo::DeviceKind::cpu) return;
    Random random(55);
    const Array w(DType::f32, random_normal(random, 35, 70));
    const Array codes(DType::i8, 35, 70);
    const Array expected(DType::i8, 1, octavo::packed_size(35, 70));
    const Array packed(DType::i8, std::vector<double>(expected.values().v.size(), 99));
    const Array scale(DType::f32, 1, 35);
    const Array sums(DType::i32, 1, 35);
    octavo::Matrix target = codes.matrix();
    const auto requantize = [&](octavo::Layout layout) {
        octavo::quantize_weight(w.matrix(), {}, target, scale.vector(), octavo::absent_vector, sums.vector(), {},
                                layout, {.seed = 3});
    };
    requantize(octavo::Layout::row_major);
    octavo::pack(codes.matrix(), expected.vector());
    target.data = packed.matrix().data;
    requantize(octavo::Layout::packed);
    check_values("codes", packed, expected.values());
}

TEST(stochastic_weight_at_the_ends) {
    constexpr float largest = 3e38F;
    CHECK_EQ(octavo::stochastic_code(largest, largest / 127, 0), 127);
    CHECK_EQ(octavo::stochastic_code(-largest, largest / 127, ~0U), -127);
    CHECK_EQ(octavo::stochastic_code(0.5F, 0.0F, 0), 0);
    CHECK_EQ(octavo::stochastic_code(1.0F, static_cast<float>(quiet_nan), 0), 0);
    CHECK_EQ(octavo::stochastic_code(-0.25F, 1.0F, 0), 0);     // u 0: up
    CHECK_EQ(octavo::stochastic_code(-0.25F, 1.0F, ~0U), -1);  // u nearly 1: down
    CHECK_EQ(octavo::stochastic_code(5.0F, 1.0F, 0), 5);
    const Array x(DType::f32, 2, 3);
    const Array codes(DType::i8, 2, 3);
    const Array scale(DType::f32, 1, 2);
    const Array sums(DType::i32, 1, 2);
    for (const octavo::QuantizeOptions options :
         {octavo::QuantizeOptions{Scheme::zeropoint}, octavo::QuantizeOptions{.rotation = 16}}) {
        const Array wide(DType::i8, 2, octavo::rotated_size(3, options.rotation));
        CHECK_THROWS(octavo::quantize_weight(x.matrix(), options, wide.matrix(), scale.vector(), octavo::absent_vector,
                                             sums.vector(), {}, octavo::Layout::row_major, {.seed = 1}),
                     value, "quantize_weight: seed: expected scheme 'absmax' and rotation 0, which it rounds for, got");
    }
}

TEST(weight_that_is_only_enqueued) {
    if (test_device().kind == octavo::DeviceKind::cpu) return;  // an error, as ever
    const Array w(DType::f32, Values(3, 2, {1, 2, 3, quiet_nan, 4, 5}));
    const Array codes(DType::i8, 3, 2);
    const Array scale(DType::f32, 1, 3);
    const Array sums(DType::i32, 1, 3);
    octavo::quantize_weight(w.matrix(), {}, codes.matrix(), scale.vector(), octavo::absent_vector, sums.vector(), {},
                            octavo::Layout::row_major, {.enqueue = true});
    CHECK(std::isnan(scale.get(1)));
    check_values("codes", codes, Values(3, 2, {64, 127, 0, 0, 102, 127}));
    check_values("sums", sums, {191, 0, 229});
}

TEST(weight_must_be_finite) {
    for (const double value : {quiet_nan, infinity, -infinity}) {
        for (const Scheme scheme : schemes) {
            const Array w(DType::f32, Values(3, 2, {1, 2, 3, 4, value, 5}));
            CHECK_THROWS(quantize_weight(w, scheme, Granularity::vector), value,
                         "quantize_weight: weight: expected finite values, got NaN or Inf in row 2");
            CHECK_THROWS(quantize_weight(w, scheme, Granularity::tensor), value, "expected finite values");
        }
    }
}

TEST(argument_errors) {
    const Array x(DType::f32, 2, 3);
    const Array codes(DType::i8, 2, 3);
    const Array scale(DType::f32, 1, 2);
    const Array sums(DType::i32, 1, 2);
    const auto absent = octavo::absent_vector;
    const auto call = [&](const octavo::Matrix& source, Scheme scheme, Granularity granularity,
                          const octavo::Vector& exclude, const octavo::Matrix& to, const octavo::Vector& scales,
                          const octavo::Vector& zeropoints) {
        octavo::quantize(source, scheme, granularity, exclude, to, scales, zeropoints);
    };
    const auto plain = [&](const octavo::Matrix& source, const octavo::Matrix& to, const octavo::Vector& scales) {
        call(source, Scheme::absmax, Granularity::row, absent, to, scales, absent);
    };
    CHECK_THROWS(plain(codes.matrix(), codes.matrix(), scale.vector()), type,
                 "quantize: x: expected dtype float32, float16 or bfloat16, got int8");
    CHECK_THROWS(plain(x.matrix(), x.matrix(), scale.vector()), type, "quantize: codes: expected dtype int8");
    CHECK_THROWS(plain(x.matrix(), Array(DType::i8, 3, 2).matrix(), scale.vector()), value,
                 "quantize: codes: expected shape [2, 3], got [3, 2]");
    CHECK_THROWS(plain(x.matrix(), codes.matrix(), sums.vector()), type,
                 "quantize: scale: expected dtype float32, got int32");
    CHECK_THROWS(plain(x.matrix(), codes.matrix(), Array(DType::f32, 1, 3).vector()), value,
                 "quantize: scale: expected shape [2], got [3]");
    CHECK_THROWS(call(x.matrix(), Scheme::absmax, Granularity::vector, absent, codes.matrix(), scale.vector(), absent),
                 value, "quantize: granularity: expected 'tensor' or 'row', got 'vector'");
    CHECK_THROWS(
        call(x.matrix(), Scheme::absmax, Granularity::row, absent, codes.matrix(), scale.vector(), scale.vector()),
        value, "quantize: zeropoint: expected none for scheme absmax");
    CHECK_THROWS(call(x.matrix(), Scheme::zeropoint, Granularity::row, absent, codes.matrix(), scale.vector(), absent),
                 value, "quantize: zeropoint: expected an array for scheme zeropoint");
    if (test_device().kind == octavo::DeviceKind::cpu) {
        CHECK_THROWS(quantize(x, Scheme::absmax, Granularity::row, {0, 3}), value,
                     "quantize: exclude: expected columns of x, 0 to 2, got 3");
        CHECK_THROWS(quantize(x, Scheme::absmax, Granularity::row, {-1}), value, "got -1");
    } else {  // no result could be read back without waiting: such columns are ignored
        check_values("codes", quantize(x, Scheme::absmax, Granularity::row, {0, 3, -1}).codes,
                     quantize(x, Scheme::absmax, Granularity::row, {0}).codes.values());
    }

    octavo::Matrix in_place = x.matrix();
    in_place.dtype = DType::i8;
    CHECK_THROWS(plain(x.matrix(), in_place, scale.vector()), value, "quantize: codes: expected memory apart from x");
    octavo::Matrix folded = codes.matrix();
    folded.row_stride = 1;
    CHECK_THROWS(plain(x.matrix(), folded, scale.vector()), value, "share no memory with each other");
    octavo::Vector point = scale.vector();
    point.stride = 0;
    CHECK_THROWS(plain(x.matrix(), codes.matrix(), point), value, "quantize: scale: expected elements that share no");

    octavo::Matrix elsewhere = x.matrix();
    elsewhere.device = {octavo::DeviceKind::cuda, 1};
    CHECK_THROWS(plain(elsewhere, codes.matrix(), scale.vector()), value,
                 "quantize: codes: expected memory on cuda:1, got c");  // cpu or cuda:0
    CHECK_THROWS(octavo::sum_codes(codes.matrix(), scale.vector()), type,
                 "sum_codes: code_sums: expected dtype int32, got float32");
    CHECK_THROWS(octavo::sum_codes(codes.matrix(), Array(DType::i32, 1, 3).vector()), value, "expected shape [2]");
}

TEST(memory_of_a_device_without_a_backend) {
    if (octavo::cuda_info().missing.empty()) return;  // there is one
    std::int32_t memory = 0;
    std::int8_t code = 0;
    const octavo::Device cuda{octavo::DeviceKind::cuda, 0};
    const octavo::Matrix codes{.data = &code, .dtype = DType::i8, .device = cuda, .rows = 1, .cols = 1};
    const octavo::Vector sums{.data = &memory, .dtype = DType::i32, .device = cuda, .size = 1};
    CHECK_THROWS(octavo::sum_codes(codes, sums), device, "sum_codes: CUDA: ");
}

// Rows that a GPU's threads read once, several times, or from unaligned memory; and more rows than it has teams.
TEST(rows_of_every_length) {
    struct Shape {
        std::int64_t m, k;
    };
    Random random(87);
    for (const Shape shape : {Shape{1, 2048}, Shape{2, 8200}, Shape{1, 33000}, Shape{1, 40008}, Shape{700, 24}}) {
        for (const DType dtype : float_dtypes) {
            const Values values = random_normal(random, shape.m, shape.k);
            for (const Layout layout : {Layout::contiguous, Layout::unaligned}) {
                const Array x(dtype, values, layout);
                for (const Scheme scheme : schemes) {
                    for (const Granularity granularity : {Granularity::tensor, Granularity::row}) {
                        const check::Context context(shape.m, " x ", shape.k, " ", name_of(dtype));
                        const auto expected = reference::quantize(x.values(), scheme, granularity == Granularity::row);
                        check_codes(quantize(x, scheme, granularity), expected);
                    }
                }
            }
        }
    }
}

// Refused before any device is asked for.
TEST(memory_that_a_gpu_cannot_read) {
    alignas(4) std::uint16_t memory[4] = {};
    const octavo::Device cuda{octavo::DeviceKind::cuda, 0};
    const octavo::Matrix codes{.data = memory, .dtype = DType::i8, .device = cuda, .rows = 1, .cols = 1};
    const octavo::Vector sums{.data = memory + 1, .dtype = DType::i32, .device = cuda, .size = 1};
    CHECK_THROWS(octavo::sum_codes(codes, sums), value,
                 "sum_codes: code_sums: expected memory aligned to 4 bytes on cuda:0, got an address 2 beyond");
    const octavo::Matrix x{
        .data = reinterpret_cast<std::byte*>(memory) + 1, .dtype = DType::f16, .device = cuda, .rows = 1, .cols = 1};
    CHECK_THROWS(octavo::find_outliers(x, {}, sums, sums), value,
                 "find_outliers: x: expected memory aligned to 2 bytes on cuda:0, got an address 1 beyond");
}

// Depths beyond 2^24, where sums of codes no longer fit int32, are refused before memory is touched.
TEST(depth_limit) {
    std::int32_t memory = 0;
    const octavo::Matrix codes{.data = &memory, .dtype = DType::i8, .rows = 1, .cols = (std::int64_t{1} << 24U) + 1};
    const octavo::Vector sums{.data = &memory, .dtype = DType::i32, .size = 1};
    CHECK_THROWS(octavo::sum_codes(codes, sums), value,
                 "sum_codes: codes: expected at most 2^24 columns, got 16777217");
}
