// The kernels of every instruction set give bit for bit what the scalar ones give, at every length and alignment, and
// touch nothing outside their arrays. What the scalar ones give is tested with the operations that use them.
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "arrays.hpp"
#include "check.hpp"
#include "cpu/pack.hpp"
#include "memory.hpp"
#include "reference.hpp"
#include "tables.hpp"

using octavo::DType;
using octavo::cpu::Kernels;

namespace {

constexpr std::int64_t longest = 200;  // several vectors of 64 and a tail
constexpr float infinity = std::numeric_limits<float>::infinity();

// An array that ends at a guard page.
template <class T>
class Guarded {
public:
    explicit Guarded(std::size_t size) : memory_(size * sizeof(T)) {}
    explicit Guarded(const std::vector<T>& values) : Guarded(values.size()) {
        if (!values.empty()) std::memcpy(memory_.data(), values.data(), values.size() * sizeof(T));
    }
    [[nodiscard]] T* data() const { return reinterpret_cast<T*>(memory_.data()); }
    [[nodiscard]] std::string bytes() const { return {reinterpret_cast<const char*>(memory_.data()), memory_.size()}; }

private:
    GuardedMemory memory_;
};

std::vector<float> random_floats(Random& random, std::int64_t size, double deviation = 1.0) {
    std::vector<float> values(static_cast<std::size_t>(size));
    for (float& value : values) value = static_cast<float>(deviation * random.normal());
    return values;
}

// Compare `run(table, size)`, which returns the bytes it made, between the scalar table and the others.
template <class Run>
void compare(const char* kernel, std::int64_t least_size, Run run) {
    const auto all = tables();
    for (std::int64_t size = least_size; size <= longest; ++size) {
        const std::string expected = run(*all[0], size);
        for (const Kernels* table : all) {
            const check::Context context(kernel, " of ", table->isa, ", size ", size);
            CHECK(run(*table, size) == expected);
        }
    }
}

template <class T>
std::string bytes_of(const T& value) {
    const auto bytes = std::bit_cast<std::array<char, sizeof(T)>>(value);
    return {bytes.begin(), bytes.end()};
}

}  // namespace

TEST(load_and_store_agree) {
    for (const DType dtype : float_dtypes) {
        compare("load and store", 0, [&](const Kernels& table, std::int64_t size) {
            Random random(7);
            const auto item = static_cast<std::size_t>(octavo::size_of(dtype));
            const Guarded<float> source(random_floats(random, size, 100));
            const Guarded<std::byte> narrow(static_cast<std::size_t>(size) * item);
            const Guarded<float> back(static_cast<std::size_t>(size));
            table.store(source.data(), size, dtype, narrow.data(), 1);
            table.load(dtype, narrow.data(), 1, size, back.data());
            return narrow.bytes() + back.bytes();
        });
    }
}

TEST(range_agrees) {
    const float specials[] = {0.0F, infinity, -infinity, std::nanf(""), std::numeric_limits<float>::max()};
    compare("range", 1, [&](const Kernels& table, std::int64_t size) {
        Random random(static_cast<std::uint64_t>(size));
        std::string result;
        for (const float special : specials) {
            auto values = random_floats(random, size);
            if (special != 0.0F) values[static_cast<std::size_t>(random.integer(0, size - 1))] = special;
            const Guarded<float> x(values);
            const octavo::cpu::Range range = table.range(x.data(), size);
            CHECK_EQ(range.finite, std::isfinite(special));
            if (range.finite) {
                CHECK_EQ(range.min, std::ranges::min(values));
                CHECK_EQ(range.max, std::ranges::max(values));
                result += bytes_of(range.min) + bytes_of(range.max);
            }
        }
        return result;
    });
}

TEST(magnitudes_and_marks_agree) {
    for (const DType dtype : float_dtypes) {
        const auto item = static_cast<std::size_t>(octavo::size_of(dtype));
        const std::uint32_t infinite = dtype == DType::f32 ? 0x7F800000U : dtype == DType::f16 ? 0x7C00U : 0x7F80U;
        // 6.0, what only Inf and NaN reach, and what everything does.
        const std::uint32_t six = dtype == DType::f32 ? 0x40C00000U : dtype == DType::f16 ? 0x4600U : 0x40C0U;
        for (const std::uint32_t limit : {six, infinite, 0U}) {
            compare("magnitudes and marks", 0, [&](const Kernels& table, std::int64_t size) {
                Random random(3);
                auto values = random_floats(random, size, 3);
                for (std::size_t i = 0; i < values.size(); i += 17) values[i] = i % 2 == 0 ? -6.0F : std::nanf("");
                for (std::size_t i = 9; i < values.size(); i += 31) values[i] = -infinity;
                const Guarded<std::byte> x(values.size() * item);
                table.store(values.data(), size, dtype, x.data(), 1);
                std::vector<std::uint8_t> marks(values.size());
                for (std::size_t i = 0; i < marks.size(); i += 5) marks[i] = 1;
                const Guarded<std::uint8_t> mask(marks);
                table.mark_outliers(dtype, x.data(), size, limit, mask.data());
                const octavo::cpu::Magnitudes found = table.magnitudes(dtype, x.data(), size, limit);

                octavo::cpu::Magnitudes expected{0, 0};
                for (std::size_t i = 0; i < values.size(); ++i) {
                    std::uint32_t bits = 0;
                    std::memcpy(&bits, x.data() + i * item, item);
                    bits &= dtype == DType::f32 ? 0x7FFFFFFFU : 0x7FFFU;
                    expected.largest = std::max(expected.largest, bits);
                    if (bits < limit) expected.largest_below = std::max(expected.largest_below, bits);
                    CHECK_EQ(mask.data()[i], marks[i] != 0 || bits >= limit ? 1 : 0);
                }
                CHECK_EQ(found.largest, expected.largest);
                CHECK_EQ(found.largest_below, expected.largest_below);
                return mask.bytes();
            });
        }
    }
}

TEST(encode_agrees) {
    for (const DType dtype : float_dtypes) {
        compare("encode_absmax", 1, [&](const Kernels& table, std::int64_t size) {
            std::string result;
            // The outer ones are where x * 127 overflows or its inverse would, and just before.
            for (const double largest : {1.0, 6.0, 5e-8, 1e-40, 2.6e36, 3e36, 3.3e38}) {
                if (dtype == DType::f16 && (largest < 5e-8 || largest > 65504)) continue;
                Random random(5);
                const auto item = static_cast<std::size_t>(octavo::size_of(dtype));
                std::vector<float> values(static_cast<std::size_t>(size));
                for (float& value : values) value = static_cast<float>(random.uniform(-largest, largest));
                const Guarded<std::byte> x(values.size() * item);
                table.store(values.data(), size, dtype, x.data(), 1);
                table.load(dtype, x.data(), 1, size, values.data());
                float absmax = 0;
                for (const float value : values) absmax = std::max(absmax, std::fabs(value));
                if (absmax == 0.0F) continue;
                const Guarded<std::int8_t> codes(values.size());
                table.encode_absmax(dtype, x.data(), size, absmax, codes.data());
                result += codes.bytes();
            }
            return result;
        });
    }
    compare("encode_zeropoint", 0, [&](const Kernels& table, std::int64_t size) {
        Random random(5);
        const Guarded<float> x(random_floats(random, size, 50));
        const Guarded<std::int8_t> codes(static_cast<std::size_t>(size));
        std::string result;
        for (const float nd : {1.5F, 1e5F, 1e8F}) {
            for (const float zeropoint : {0.0F, -31.0F, 127.0F, -1e9F, 1e9F}) {
                table.encode_zeropoint(x.data(), size, nd, zeropoint, codes.data());
                result += codes.bytes();
                for (std::int64_t i = 0; i < size; ++i) {
                    const float code = std::nearbyint(nd * x.data()[i]) - zeropoint;
                    CHECK_EQ(codes.data()[i], static_cast<int>(std::clamp(code, -127.0F, 127.0F)));
                }
            }
        }
        return result;
    });
}

namespace {

// Eq. 1 for every x of a 16-bit dtype in range of some absmaxes: the code of the real numbers.
void check_ideal_codes(DType dtype) {
    Random random(11);
    const std::uint16_t infinite = dtype == DType::f16 ? 0x7C00 : 0x7F80;
    std::vector<std::uint16_t> absmaxes{1, 2, 0x3C00, 0x4600, static_cast<std::uint16_t>(infinite - 1)};
    for (int i = 0; i < 20; ++i) absmaxes.push_back(static_cast<std::uint16_t>(random.integer(1, infinite - 1)));
    for (const std::uint16_t absmax_bits : absmaxes) {
        const auto absmax = static_cast<float>(decode16(dtype, absmax_bits));
        std::vector<std::uint16_t> x;
        for (std::uint16_t bits = 0; bits <= absmax_bits; ++bits) {
            x.push_back(bits);
            x.push_back(static_cast<std::uint16_t>(bits | 0x8000U));
        }
        for (const Kernels* table : tables()) {
            std::vector<std::int8_t> codes(x.size());
            table->encode_absmax(dtype, x.data(), static_cast<std::int64_t>(x.size()), absmax, codes.data());
            for (std::size_t i = 0; i < x.size(); ++i) {
                const double expected = reference::ideal_absmax_code(decode16(dtype, x[i]), absmax);
                if (codes[i] == expected) continue;
                const check::Context context(table->isa, " absmax ", absmax, " x ", decode16(dtype, x[i]));
                CHECK_EQ(int{codes[i]}, static_cast<int>(expected));
            }
        }
    }
}

}  // namespace

TEST(encode_absmax_is_ideal_for_float16) { check_ideal_codes(DType::f16); }
TEST(encode_absmax_is_ideal_for_bfloat16) { check_ideal_codes(DType::bf16); }

TEST(flip_sign_bits_adds_128) {
    compare("flip_sign_bits", 0, [&](const Kernels& table, std::int64_t size) {
        Random random(6);
        std::vector<std::int8_t> values(static_cast<std::size_t>(size));
        for (std::int8_t& value : values) value = static_cast<std::int8_t>(random.integer(-128, 127));
        const Guarded<std::int8_t> codes(values);
        table.flip_sign_bits(codes.data(), size);
        for (std::int64_t i = 0; i < size; ++i) {
            const auto flipped = static_cast<std::uint8_t>(codes.data()[i]);
            CHECK_EQ(int{flipped}, values[static_cast<std::size_t>(i)] + 128);
        }
        return codes.bytes();
    });
}

TEST(dot_agrees) {
    compare("dot", 0, [&](const Kernels& table, std::int64_t size) {
        Random random(9);
        const Guarded<float> a(random_floats(random, size));
        const Guarded<float> b(random_floats(random, size));
        const float result = table.dot(a.data(), b.data(), size);
        double exact = 0;
        for (std::int64_t i = 0; i < size; ++i) exact += double{a.data()[i]} * double{b.data()[i]};
        CHECK(std::fabs(result - exact) <= 1e-5);
        return bytes_of(result);
    });
}

TEST(sum_is_exact) {
    compare("sum", 0, [&](const Kernels& table, std::int64_t size) {
        Random random(2);
        std::vector<std::int8_t> values;
        std::int32_t expected = 0;
        for (std::int64_t i = 0; i < size; ++i) {
            values.push_back(static_cast<std::int8_t>(random.integer(-128, 127)));
            expected += values.back();
        }
        const Guarded<std::int8_t> codes(values);
        CHECK_EQ(table.sum(codes.data(), size), expected);
        return bytes_of(expected);
    });
    // The deepest: 2^24 codes of -128 make exactly -2^31.
    const std::vector<std::int8_t> deep(std::size_t{1} << 24U, std::int8_t{-128});
    for (const Kernels* table : tables()) {
        CHECK_EQ(table->sum(deep.data(), static_cast<std::int64_t>(deep.size())),
                 std::numeric_limits<std::int32_t>::min());
    }
}

TEST(epilogue_is_the_equation) {
    constexpr std::int64_t width = 16;
    constexpr std::int64_t rows = 5;  // of outlier weights
    for (const Kernels* table : tables()) {
        Random random(9);
        for (std::int64_t cols = 1; cols <= octavo::cpu::tile_cols; cols += cols < 40 ? 1 : 27) {
            const check::Context context("epilogue of ", table->isa, ", columns ", cols);
            const auto size = static_cast<std::size_t>((cols + width - 1) / width * width);
            const Guarded<std::int32_t> acc(size);
            for (std::size_t j = 0; j < size; ++j) acc.data()[j] = static_cast<std::int32_t>(random.bits() >> 8U);
            const Guarded<float> scaled(random_floats(random, static_cast<std::int64_t>(size)));
            const Guarded<float> scale(random_floats(random, static_cast<std::int64_t>(size), 1e-6));
            const Guarded<float> bias(random_floats(random, static_cast<std::int64_t>(size)));
            const Guarded<float> weight(
                random_floats(random, (rows - 1) * octavo::cpu::tile_cols + static_cast<std::int64_t>(size)));
            const Guarded<float> values(random_floats(random, rows));
            const Guarded<std::int32_t> places(std::vector<std::int32_t>{4, 0, 3, 3, 1});
            for (int kind = 0; kind < 8; ++kind) {
                const octavo::cpu::EpilogueRow row{.acc = (kind & 1) != 0 ? nullptr : acc.data(),
                                                   .scaled = (kind & 1) != 0 ? scaled.data() : nullptr,
                                                   .scale_x = 0.37F,
                                                   .scale_w = scale.data(),
                                                   .outliers = kind / 2 % 2 * rows,
                                                   .outlier_x = values.data(),
                                                   .outlier_places = kind >= 6 ? places.data() : nullptr,
                                                   .outlier_w = weight.data(),
                                                   .bias = kind >= 4 ? bias.data() : nullptr};
                const Guarded<float> y(static_cast<std::size_t>(cols));
                table->epilogue(row, cols, DType::f32, y.data());
                for (std::int64_t j = 0; j < cols; ++j) {
                    double sum = row.scaled != nullptr ? double{row.scaled[j]}
                                                       : static_cast<double>(acc.data()[j]) * 0.37F * row.scale_w[j];
                    double terms = std::fabs(sum);
                    for (std::int64_t o = 0; o < row.outliers; ++o) {
                        const std::int64_t place = row.outlier_places != nullptr ? row.outlier_places[o] : o;
                        const double term =
                            double{values.data()[o]} * weight.data()[place * octavo::cpu::tile_cols + j];
                        sum += term;
                        terms += std::fabs(term);
                    }
                    if (row.bias != nullptr) sum += row.bias[j];
                    if (row.bias != nullptr) terms += std::fabs(row.bias[j]);
                    // Each of at most 9 operations is off by half a place of the sum of magnitudes.
                    const double slack = 9 * 0x1p-24 * terms;
                    CHECK(std::fabs(y.data()[j] - sum) <= slack);
                }
                for (const DType dtype : {DType::f16, DType::bf16}) {
                    const Guarded<std::uint16_t> narrow(static_cast<std::size_t>(cols));
                    const Guarded<std::uint16_t> expected(static_cast<std::size_t>(cols));
                    table->epilogue(row, cols, dtype, narrow.data());
                    table->store(y.data(), cols, dtype, expected.data(), 1);
                    CHECK(narrow.bytes() == expected.bytes());
                }
            }
        }
    }
}

TEST(pack_is_the_packed_order) {
    for (const Kernels* table : tables()) {
        Random random(4);
        for (const std::int64_t k : {1, 3, 4, 63, 64, 65, 130, 192}) {
            for (const std::int64_t rows : {1, 2, 15, 16}) {
                const check::Context context("pack of ", table->isa, ", ", rows, " x ", k);
                const std::int64_t stride = k + random.integer(0, 3);
                std::vector<std::int8_t> values(static_cast<std::size_t>((rows - 1) * stride + k));
                for (std::int8_t& value : values) value = static_cast<std::int8_t>(random.integer(-128, 127));
                const Guarded<std::int8_t> codes(values);
                const Guarded<std::int8_t> packed(static_cast<std::size_t>(octavo::packed_size(rows, k)));
                table->pack(codes.data(), stride, rows, k, packed.data());
                const std::int64_t depth = octavo::padded_depth(k);
                for (std::int64_t j = 0; j < 16; ++j) {
                    for (std::int64_t h = 0; h < depth; ++h) {
                        const int expected = j < rows && h < k ? codes.data()[j * stride + h] : 0;
                        CHECK_EQ(int{packed.data()[octavo::cpu::packed_index(j, h, depth)]}, expected);
                    }
                }
            }
        }
    }
}

namespace {

// One product of `table` in guarded memory, compared with sums of its own.
void check_product(const Kernels& table, std::int64_t rows, std::int64_t cols, std::int64_t depth, Random& random) {
    const check::Context context(table.isa, " product ", rows, " x ", cols, " x ", depth);
    const std::int64_t stride = depth + random.integer(0, 3);  // the last row ends at the guard page
    const bool extreme = random.integer(0, 3) == 0;            // all -128, the value without a negative
    const auto fill = [&](std::int64_t size) {
        std::vector<std::int8_t> values(static_cast<std::size_t>(size));
        for (std::int8_t& value : values) value = static_cast<std::int8_t>(extreme ? -128 : random.integer(-128, 127));
        return values;
    };
    const std::vector<std::int8_t> x = fill((rows - 1) * stride + depth);
    const Guarded<std::int8_t> given(x);
    if (table.x_is_unsigned) table.flip_sign_bits(given.data(), static_cast<std::int64_t>(x.size()));
    const Guarded<std::int8_t> w(fill(cols * depth));
    const Guarded<std::int32_t> w_sums(static_cast<std::size_t>(cols));
    const auto code = [&](std::int64_t j, std::int64_t k) { return w.data()[octavo::cpu::packed_index(j, k, depth)]; };
    for (std::int64_t j = 0; j < cols; ++j) {
        w_sums.data()[j] = 0;
        for (std::int64_t k = 0; k < depth; ++k) w_sums.data()[j] += code(j, k);
    }
    const Guarded<std::int32_t> acc(static_cast<std::size_t>(rows * octavo::cpu::tile_cols));
    table.product({.x = given.data(),
                   .x_stride = stride,
                   .rows = rows,
                   .w = w.data(),
                   .w_stride = depth * 16,
                   .w_sums = w_sums.data(),
                   .cols = cols,
                   .depth = depth,
                   .acc = acc.data()});
    for (std::int64_t i = 0; i < rows; ++i) {
        for (std::int64_t j = 0; j < cols; ++j) {
            std::int32_t expected = 0;
            for (std::int64_t k = 0; k < depth; ++k) {
                expected += x[static_cast<std::size_t>(i * stride + k)] * code(j, k);
            }
            const std::int32_t got = acc.data()[i * octavo::cpu::tile_cols + j];
            if (got != expected) CHECK_EQ(got, expected);
        }
    }
}

}  // namespace

TEST(product_is_exact) {
    for (const Kernels* table : tables()) {
        Random random(21);
        for (std::int64_t rows = 1; rows <= table->tile_rows; ++rows) {
            for (const std::int64_t cols : {16, 48, 80}) check_product(*table, rows, cols, 64, random);
        }
        // More than a slice, at a slice, one step more; all widths of a tile.
        for (const std::int64_t depth : {0, 128, 512, 576, 1088}) {
            for (const std::int64_t rows : {std::int64_t{1}, std::int64_t{7}, table->tile_rows}) {
                for (const std::int64_t cols : {16, 32, 64, 240, 256}) check_product(*table, rows, cols, depth, random);
            }
        }
    }
}

// At the greatest depth every sum fits, though the sums of shifted codes have wrapped on the way.
TEST(product_at_the_greatest_depth) {
    constexpr std::int64_t depth = octavo::cpu::max_int32_depth;
    struct Case {
        int x;
        int w;
    };
    for (const Case& c : {Case{-128, -128}, Case{-128, 127}, Case{127, -128}, Case{127, 127}}) {
        const std::vector<std::int8_t> w(static_cast<std::size_t>(16 * depth), static_cast<std::int8_t>(c.w));
        const std::vector<std::int32_t> w_sums(16, static_cast<std::int32_t>(depth) * c.w);
        for (const Kernels* table : tables()) {
            const check::Context context(table->isa, " ", c.x, " times ", c.w);
            std::vector<std::int8_t> x(depth, static_cast<std::int8_t>(c.x));
            if (table->x_is_unsigned) table->flip_sign_bits(x.data(), depth);
            for (const std::int64_t rows : {std::int64_t{1}, table->tile_rows}) {
                const Guarded<std::int32_t> acc(static_cast<std::size_t>(rows * octavo::cpu::tile_cols));
                // All rows of X are one.
                table->product({.x = x.data(),
                                .x_stride = 0,
                                .rows = rows,
                                .w = w.data(),
                                .w_stride = 16 * depth,
                                .w_sums = w_sums.data(),
                                .cols = 16,
                                .depth = depth,
                                .acc = acc.data()});
                for (std::int64_t i = 0; i < rows; ++i) {
                    for (std::int64_t j = 0; j < 16; ++j) {
                        CHECK_EQ(acc.data()[i * octavo::cpu::tile_cols + j], depth * c.x * c.w);
                    }
                }
            }
        }
    }
}
