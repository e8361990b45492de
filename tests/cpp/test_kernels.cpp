// The kernels of every instruction set give bit for bit what the scalar ones give, at every length and alignment, and
// touch nothing outside their arrays. What the scalar ones give is tested with the operations that use them.
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <iterator>
#include <limits>
#include <numbers>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "arrays.hpp"
#include "check.hpp"
#include "cpu/pack.hpp"
#include "memory.hpp"
#include "octavo/quantize.hpp"
#include "reference.hpp"
#include "tables.hpp"

namespace octavo::cpu::emulated {
extern const Plan few;
extern const Plan some;
extern const Plan many;
}  // namespace octavo::cpu::emulated

using octavo::DType;
using octavo::cpu::Kernels;
using octavo::cpu::Plan;

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

std::vector<std::int8_t> random_codes(Random& random, std::int64_t size) {
    std::vector<std::int8_t> codes(static_cast<std::size_t>(size));
    for (std::int8_t& code : codes) code = static_cast<std::int8_t>(random.integer(-128, 127));
    return codes;
}

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

// Every second column has a place; what is between rows and behind them is not touched.
TEST(load_transposed_puts_columns_into_their_places) {
    constexpr std::int64_t dst_stride = 96;
    for (const DType dtype : float_dtypes) {
        const std::int64_t item = octavo::size_of(dtype);
        for (const std::int64_t cols : {1, 16, 31, 80}) {
            for (const std::int64_t count : {1, 3, 30, 64, 81}) {
                for (const std::int64_t stride : {count, count + 5, std::int64_t{0}}) {
                    Random random(11);
                    const std::int64_t size = (cols - 1) * stride + count;
                    const Guarded<std::byte> source(static_cast<std::size_t>(size * item));
                    tables()[0]->store(random_floats(random, size).data(), size, dtype, source.data(), 1);
                    std::vector<std::int32_t> places(static_cast<std::size_t>(count), -1);
                    for (std::size_t i = 0; i < places.size(); i += 2) {
                        places[i] = static_cast<std::int32_t>(places.size() - 1 - i);
                    }
                    std::vector<float> expected(static_cast<std::size_t>(count * dst_stride), -3.0F);
                    for (std::int64_t i = 0; i < count; i += 2) {
                        float* const row = expected.data() + (count - 1 - i) * dst_stride;
                        std::fill(row, row + (cols + 15) / 16 * 16, 0.0F);
                        tables()[0]->load(dtype, source.data() + i * item, stride, cols, row);
                    }
                    for (const Kernels* table : tables()) {
                        const check::Context context(table->isa, ", ", cols, " of ", count, ", stride ", stride);
                        std::vector<float> found(expected.size(), -3.0F);
                        table->load_transposed(dtype, source.data(), stride, cols, count, places.data(), found.data(),
                                               dst_stride);
                        CHECK(found == expected);
                    }
                }
            }
        }
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

TEST(magnitudes_agree) {
    for (const DType dtype : float_dtypes) {
        const auto item = static_cast<std::size_t>(octavo::size_of(dtype));
        // As halves: 6.0, what only Inf and NaN reach, what everything does, and nothing.
        constexpr std::uint16_t limits[] = {0x40C0, 0x7F80, 0, 0x8000};
        for (const std::uint16_t limit : limits) {
            compare("magnitudes", 0, [&](const Kernels& table, std::int64_t size) {
                Random random(3);
                auto values = random_floats(random, size, 3);
                for (std::size_t i = 0; i < values.size(); i += 17) values[i] = i % 2 == 0 ? -6.0F : std::nanf("");
                for (std::size_t i = 9; i < values.size(); i += 31) values[i] = -infinity;
                const Guarded<std::byte> x(values.size() * item);
                table.store(values.data(), size, dtype, x.data(), 1);
                const Guarded<std::byte> maxima(std::vector<std::byte>(values.size() * item));
                const Guarded<std::int32_t> places(values.size());
                const Guarded<std::uint16_t> halves(values.size());
                table.raise_maxima(dtype, x.data(), size, maxima.data());
                table.upper_halves(dtype, x.data(), size, halves.data());
                for (std::size_t i = 0; i < values.size(); i += 2) halves.data()[i] |= 0x8000U;  // signs are ignored
                const octavo::cpu::Survey survey = table.survey(halves.data(), size, 0x3F80);
                const std::int64_t found = table.find_halves(halves.data(), size, limit, places.data());

                const Guarded<std::byte> left(std::vector<std::byte>(values.size() * item));  // every third is masked
                std::uint32_t largest = 0;
                std::uint32_t largest_left = 0;
                std::int64_t below = 0;
                std::int64_t zeros = 0;
                std::int64_t reached = 0;
                std::uint16_t largest_half = 0;
                for (std::size_t i = 0; i < values.size(); ++i) {
                    std::uint32_t bits = 0;
                    std::uint32_t raised = 0;
                    std::memcpy(&bits, x.data() + i * item, item);
                    std::memcpy(&raised, maxima.data() + i * item, item);
                    bits &= dtype == DType::f32 ? 0x7FFFFFFFU : 0x7FFFU;
                    largest = std::max(largest, bits);
                    const std::uint32_t kept = i % 3 == 0 ? 0 : 0x7FFF7FFFU;
                    std::memcpy(left.data() + i * item, &kept, item);
                    largest_left = std::max(largest_left, bits & kept);
                    const auto half = static_cast<std::uint16_t>(halves.data()[i] & 0x7FFFU);
                    largest_half = std::max(largest_half, half);
                    below += half < 0x3F80 ? 1 : 0;
                    zeros += half == 0 ? 1 : 0;
                    if (half >= limit) CHECK_EQ(places.data()[reached++], static_cast<std::int32_t>(i));
                    float value = 0.0F;
                    table.load(dtype, x.data() + i * item, 1, 1, &value);
                    CHECK_EQ(raised, bits);
                    CHECK_EQ(half, (std::bit_cast<std::uint32_t>(value) & 0x7FFFFFFFU) >> 16U);
                }
                CHECK_EQ(table.largest_magnitude(dtype, x.data(), size), largest);
                CHECK_EQ(table.largest_masked(dtype, x.data(), left.data(), size), largest_left);
                CHECK_EQ(survey.largest, largest_half);
                CHECK_EQ(survey.below, below);
                CHECK_EQ(survey.zeros, zeros);
                CHECK_EQ(found, reached);
                table.raise_maxima(dtype, x.data(), size / 2, maxima.data());  // what is larger already stays
                return maxima.bytes() + halves.bytes();
            });
        }
    }
}

TEST(rotation_agrees) {
    for (const DType dtype : float_dtypes) {
        for (const std::int64_t block : {16, 64, 256}) {
            for (const std::int64_t size : {block, 5 * block, 3 * block + 7, std::int64_t{5}}) {
                for (const bool excludes : {false, true}) {
                    Random random(11);
                    std::vector<std::byte> source(static_cast<std::size_t>(size * octavo::size_of(dtype)));
                    const std::int64_t whole = octavo::rotated_size(size, static_cast<std::int32_t>(block));
                    std::vector<float> expected(static_cast<std::size_t>(whole));
                    tables()[0]->store(random_floats(random, size).data(), size, dtype, source.data(), 1);
                    tables()[0]->load(dtype, source.data(), 1, size, expected.data());
                    std::vector<std::int32_t> excluded;  // of some blocks none, of some several
                    for (std::int64_t i = 3; excludes && i < size; i += i % 5 == 0 ? 3 : block + 1) {
                        excluded.push_back(static_cast<std::int32_t>(i));
                        expected[static_cast<std::size_t>(i)] = 0.0F;
                    }
                    for (std::int64_t distance = 1; distance < block; distance *= 2) {
                        for (std::int64_t i = 0; i < whole; ++i) {
                            if ((i & distance) != 0) continue;
                            float& u = expected[static_cast<std::size_t>(i)];
                            float& v = expected[static_cast<std::size_t>(i + distance)];
                            const float sum = u + v;
                            v = u - v;
                            u = sum;
                        }
                    }
                    for (float& value : expected) value *= 1.0F / std::sqrt(static_cast<float>(block));
                    for (const Kernels* table : tables()) {
                        const check::Context context("rotation of ", size, " in blocks of ", block, " by ", table->isa);
                        const Guarded<std::byte> x(source);
                        const Guarded<float> target(expected.size());
                        const std::uint32_t largest = table->rotate(dtype, x.data(), size, block, excluded.data(),
                                                                    std::ssize(excluded), target.data());
                        CHECK_EQ(largest, table->largest_magnitude(DType::f32, target.data(), whole));
                        CHECK(std::ranges::equal(std::span(target.data(), expected.size()), expected));
                        table->load(dtype, x.data(), 1, size, target.data());
                        CHECK_EQ(largest, table->rotate(DType::f32, target.data(), size, block, excluded.data(),
                                                        std::ssize(excluded), target.data()));
                        CHECK(std::ranges::equal(std::span(target.data(), expected.size()), expected));
                    }
                }
            }
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

// Next to where codes change, a quotient that is wrong in its last place is another code.
TEST(encode_absmax_of_float32_is_the_quotient_rounded_once) {
    Random random(12);
    for (int part = 0; part < 400; ++part) {
        const auto absmax = static_cast<float>(std::ldexp(random.uniform(1, 2), (part % 101) - 50));
        std::vector<float> x;
        for (int code = -127; code < 127; ++code) {
            auto value = static_cast<float>((code + 0.5) * absmax / 127);
            for (int places = 0; places < 4; ++places) value = std::nextafterf(value, -INFINITY);
            for (int places = 0; places < 9; ++places, value = std::nextafterf(value, INFINITY)) x.push_back(value);
        }
        for (const Kernels* table : tables()) {
            std::vector<std::int8_t> codes(x.size());
            table->encode_absmax(DType::f32, x.data(), std::ssize(x), absmax, codes.data());
            for (std::size_t i = 0; i < x.size(); ++i) {
                const float product = x[i] * 127.0F;
                const float quotient = product / absmax;
                if (static_cast<float>(codes[i]) == std::nearbyint(quotient)) continue;
                const check::Context context(table->isa, " absmax ", absmax, " x ", x[i]);
                CHECK_EQ(int{codes[i]}, static_cast<int>(std::nearbyint(quotient)));
            }
        }
    }
}

TEST(product_of_floats_is_the_equation_to_the_bit) {
    for (const Kernels* table : tables()) {
        Random random(12);
        for (const std::int64_t rows : {1, 2, 3, 4, 5, 7, 13}) {
            for (const auto& [has_zeropoint, is_half] : {std::pair{false, false}, {true, false}, {false, true}}) {
                const check::Context context(table->isa, ", rows ", rows, ", zeropoint ", has_zeropoint, ", half ",
                                             is_half);
                constexpr std::int64_t depth = 64 + 16;
                constexpr std::int64_t first_depth = 48;
                std::vector<float> values = random_floats(random, rows * depth);
                if (is_half) {
                    for (float& value : values) {
                        value = std::bit_cast<float>(std::bit_cast<std::uint32_t>(value) & 0xFFFF0000U);
                    }
                }
                const Guarded<float> x(values);
                std::vector<std::int8_t> codes(16 * depth);
                for (auto& code : codes) code = static_cast<std::int8_t>(random.integer(-128, 127));
                const Guarded<std::int8_t> w(codes);
                const Guarded<float> zeropoints(random_floats(random, 16, 30));
                const Guarded<float> scale(random_floats(random, 16));
                const float* const zeropoint = has_zeropoint ? zeropoints.data() : nullptr;

                std::vector<float> expected;
                for (std::int64_t i = 0; i < rows; ++i) {
                    for (std::int64_t j = 0; j < 16; ++j) {
                        float parts[4] = {};
                        for (std::int64_t p = 0; p < 4; ++p) {
                            float slices[2] = {};
                            for (std::int64_t k = p; k < depth; k += 4) {
                                const auto code =
                                    static_cast<float>(codes[static_cast<std::size_t>(k / 4 * 64 + j * 4 + p)]);
                                const float weight = has_zeropoint ? code + zeropoint[j] : code;
                                float& sum = slices[k < first_depth ? 0 : 1];
                                sum = std::fma(x.data()[i * depth + k], weight, sum);
                            }
                            parts[p] = slices[0] + slices[1];
                        }
                        expected.push_back(((parts[0] + parts[1]) + (parts[2] + parts[3])) * scale.data()[j]);
                    }
                }
                constexpr std::int64_t pairs_stride = 4 * depth;
                const Guarded<std::uint16_t> pairs(static_cast<std::size_t>(rows * pairs_stride));
                for (std::int64_t i = 0; is_half && table->pair != nullptr && i < rows; ++i) {
                    CHECK(table->pair(x.data() + i * depth, depth, pairs.data() + i * pairs_stride));
                }
                for (const auto& [widened, in_pairs] : {std::pair{false, false}, {true, false}, {false, true}}) {
                    if (in_pairs && (!is_half || table->pair == nullptr)) continue;
                    const Guarded<float> sums(static_cast<std::size_t>(rows * 64));
                    for (std::int64_t begin = 0; begin < depth;) {
                        const std::int64_t end = begin == 0 ? first_depth : depth;
                        const Guarded<float> floats(static_cast<std::size_t>((end - begin) * 16));
                        table->widen(w.data() + begin * 16, end - begin, zeropoint, floats.data());
                        table->multiply_floats({.x = x.data() + begin,
                                                .x_pairs = in_pairs ? pairs.data() + 4 * begin : nullptr,
                                                .x_stride = depth,
                                                .rows = rows,
                                                .w = w.data() + begin * 16,
                                                .w_floats = widened ? floats.data() : nullptr,
                                                .zeropoint = zeropoint,
                                                .depth = end - begin,
                                                .places = 4,
                                                .first = begin == 0,
                                                .sums = sums.data()});
                        begin = end;
                    }
                    const Guarded<float> y(static_cast<std::size_t>(rows * 16));
                    table->finish_floats(sums.data(), rows, scale.data(), y.data());
                    CHECK(y.bytes() == Guarded<float>(expected).bytes());
                }
            }
        }
    }
}

// Pairs of numbers that are so small that their sums might be subnormal, or not finite, are refused.
TEST(pairs_are_of_ordinary_numbers) {
    for (const Kernels* table : tables()) {
        if (table->pair == nullptr) continue;
        for (const float value : {0.0F, -0.0F, 0x1p-119F, -0x1p-119F, 1.0F, 0x1.FEp127F, -0x1.FEp127F, 0x1.FEp-120F,
                                  -0x1p-133F, INFINITY, -INFINITY, NAN}) {
            const bool is_ordinary = value == 0 || (std::abs(value) >= 0x1p-119F && std::isfinite(value));
            for (const std::size_t place : {0U, 3U, 7U, 15U}) {
                std::vector<float> x(16, 1.0F);
                x[place] = value;
                std::vector<std::uint16_t> pairs(64);
                const check::Context context(table->isa, ", ", value, " at ", place);
                CHECK_EQ(table->pair(x.data(), 16, pairs.data()), is_ordinary);
            }
        }
    }
}

TEST(backward_product_of_floats_is_the_equation_to_the_bit) {
    for (const Kernels* table : tables()) {
        Random random(13);
        for (const std::int64_t rows : {1, 2, 5, 6, 11, 12, 31}) {
            const check::Context context(table->isa, ", rows ", rows);
            constexpr std::int64_t features = 48;
            constexpr std::int64_t depth = features - 3;
            const std::int64_t cols = table->gradient_cols;
            const Guarded<float> x(random_floats(random, (rows - 1) * octavo::cpu::float_slice + depth));
            std::vector<std::int8_t> codes(64 * features);
            for (auto& code : codes) code = static_cast<std::int8_t>(random.integer(-128, 127));
            const Guarded<std::int8_t> w(codes);
            const Guarded<float> zeropoint(random_floats(random, features, 30));
            const Guarded<float> scale(random_floats(random, features));
            const auto before = random_floats(random, rows * cols);
            std::vector<float> floats;
            for (std::int64_t j = 0; j < features; ++j) {
                for (std::int64_t h = 0; h < cols; ++h) {
                    const auto place = static_cast<std::size_t>(j / 16 * 1024 + h / 4 * 64 + j % 16 * 4 + h % 4);
                    floats.push_back((static_cast<float>(codes[place]) + zeropoint.data()[j]) * scale.data()[j]);
                }
            }
            std::vector<float> expected;
            for (std::int64_t i = 0; i < rows; ++i) {
                for (std::int64_t h = 0; h < cols; ++h) {
                    float sum = 0;
                    for (std::int64_t j = 0; j < depth; ++j) {
                        sum = std::fma(x.data()[i * octavo::cpu::float_slice + j],
                                       floats[static_cast<std::size_t>(j * cols + h)], sum);
                    }
                    expected.push_back(before[static_cast<std::size_t>(i * cols + h)] + sum);
                }
            }
            const Guarded<float> square(static_cast<std::size_t>(features * cols));
            table->dequantize_square(w.data(), 1024, features, zeropoint.data(), scale.data(), square.data());
            CHECK(square.bytes() == Guarded<float>(floats).bytes());
            const Guarded<float> sums(before);
            table->multiply_floats({.x = x.data(),
                                    .x_stride = octavo::cpu::float_slice,
                                    .rows = rows,
                                    .w = nullptr,
                                    .w_floats = square.data(),
                                    .zeropoint = nullptr,
                                    .depth = depth,
                                    .places = 1,
                                    .first = false,
                                    .sums = sums.data()});
            CHECK(sums.bytes() == Guarded<float>(expected).bytes());
        }
    }
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

namespace {

// A tile with everything an epilogue can have, of `rows` x `cols`.
struct Tile {
    static constexpr std::int64_t outliers = 5;
    static constexpr std::int64_t stride = 96;
    static constexpr std::int64_t most_rows = 21;

    Tile(Random& random, std::int64_t cols)
        : width(static_cast<std::size_t>((cols + 15) / 16 * 16)),
          acc(static_cast<std::size_t>((most_rows - 1) * stride) + width),
          row_offsets(most_rows),
          col_offsets(width),
          scaled(random_floats(random, (most_rows - 1) * stride + static_cast<std::int64_t>(width))),
          scale_x(random_floats(random, most_rows)),
          scale_w(random_floats(random, static_cast<std::int64_t>(width), 1e-6)),
          bias(random_floats(random, static_cast<std::int64_t>(width))),
          outlier_x(random_floats(random, most_rows * outliers)),
          outlier_w(
              random_floats(random, (outliers - 1) * octavo::cpu::outlier_stride + static_cast<std::int64_t>(width))),
          w(random_codes(random, static_cast<std::int64_t>(width) * depth)) {
        for (const auto* ints : {&acc, &row_offsets, &col_offsets}) {
            for (std::size_t i = 0; i < ints->bytes().size() / 4; ++i) {
                ints->data()[i] = static_cast<std::int32_t>(random.bits());
            }
        }
    }

    std::size_t width;
    Guarded<std::int32_t> acc;
    Guarded<std::int32_t> row_offsets;
    Guarded<std::int32_t> col_offsets;
    Guarded<float> scaled;
    Guarded<float> scale_x;
    Guarded<float> scale_w;
    Guarded<float> bias;
    Guarded<float> outlier_x;
    Guarded<float> outlier_w;
    static constexpr std::int64_t depth = 64;  // of packed codes
    Guarded<std::int8_t> w;
};

// The weight of column `column` for output feature j of packed codes.
float dequantized(const std::int8_t* w, std::int64_t column, std::int64_t j, float zeropoint, float scale) {
    const std::int8_t code = w[octavo::cpu::packed_index(j, column, Tile::depth)];
    return (static_cast<float>(code) + zeropoint) * scale;
}

// Every step rounded once, in the order that the table promises.
float expected_output(const octavo::cpu::EpilogueTile& tile, std::int64_t i, std::int64_t j) {
    float y = 0;
    if (tile.scaled != nullptr) {
        y = tile.scaled[i * tile.stride + j];
    } else {
        const auto sum = static_cast<std::int32_t>(static_cast<std::uint32_t>(tile.acc[i * tile.stride + j]) -
                                                   static_cast<std::uint32_t>(tile.row_offsets[i]) -
                                                   static_cast<std::uint32_t>(tile.col_offsets[j]));
        y = static_cast<float>(sum) * (tile.scale_x[i] * tile.scale_w[j]);
    }
    const bool own = tile.outlier_begin != nullptr;
    const std::int64_t begin = own ? tile.outlier_begin[i] : 0;
    const std::int64_t end = own ? tile.outlier_begin[i + 1] : begin + tile.outliers;
    for (std::int64_t o = begin; o < end; ++o) {
        const std::int64_t place = own ? tile.outlier_places[o] : o;
        const float x = tile.outlier_x[own ? o : o * tile.outlier_x_stride + i];
        const float weight = tile.outlier_columns == nullptr
                                 ? tile.outlier_w[place * octavo::cpu::outlier_stride + j]
                                 : dequantized(tile.w, tile.outlier_columns[o], j, 0.0F, tile.scale_w[j]);
        y = std::fma(x, weight, y);
    }
    return tile.bias != nullptr ? y + tile.bias[j] : y;
}

}  // namespace

TEST(epilogue_is_the_equation_to_the_bit) {
    std::vector<std::int64_t> begins{0};
    std::vector<std::int32_t> all_places;
    for (std::int64_t i = 0; i < Tile::most_rows; ++i) {
        for (std::int64_t o = 0; o < i * 3 % 4; ++o) {
            all_places.push_back(static_cast<std::int32_t>((i + o * o) % Tile::outliers));
        }
        begins.push_back(std::ssize(all_places));
    }
    const Guarded<std::int64_t> begin(begins);
    const Guarded<std::int32_t> places(all_places);
    const std::vector<std::int32_t> shared{0, 7, 22, 41, 63};
    std::vector<std::int32_t> all_columns;
    all_columns.reserve(all_places.size());
    for (const std::int32_t place : all_places) all_columns.push_back(shared[static_cast<std::size_t>(place)]);
    const Guarded<std::int32_t> columns(shared);
    const Guarded<std::int32_t> own_columns(all_columns);
    for (const Kernels* table : tables()) {
        Random random(9);
        for (std::int64_t cols = 1; cols <= Tile::stride; cols += cols < 40 ? 1 : 19) {
            const Tile given(random, cols);
            for (std::int64_t kind = 0; kind < 32; ++kind) {
                const std::int64_t rows = 1 + (cols + 5 * kind) % Tile::most_rows;
                const check::Context context("epilogue of ", table->isa, ", ", rows, " x ", cols, ", kind ", kind);
                const bool scaled = (kind & 1) != 0;
                const bool own = kind / 4 % 2 != 0;
                const std::int32_t* const met = own ? own_columns.data() : columns.data();
                const octavo::cpu::EpilogueTile tile{.rows = rows,
                                                     .cols = cols,
                                                     .acc = scaled ? nullptr : given.acc.data(),
                                                     .row_offsets = scaled ? nullptr : given.row_offsets.data(),
                                                     .col_offsets = scaled ? nullptr : given.col_offsets.data(),
                                                     .scaled = scaled ? given.scaled.data() : nullptr,
                                                     .stride = Tile::stride,
                                                     .scale_x = given.scale_x.data(),
                                                     .scale_w = given.scale_w.data(),
                                                     .outliers = kind / 2 % 2 * Tile::outliers,
                                                     .outlier_x = given.outlier_x.data(),
                                                     .outlier_x_stride = Tile::most_rows,
                                                     .outlier_columns = kind >= 16 ? met : nullptr,
                                                     .w = given.w.data(),
                                                     .w_stride = 16 * Tile::depth,
                                                     .outlier_begin = own ? begin.data() : nullptr,
                                                     .outlier_places = places.data(),
                                                     .outlier_w = given.outlier_w.data(),
                                                     .bias = kind / 8 % 2 != 0 ? given.bias.data() : nullptr,
                                                     .ahead = given.w.data(),
                                                     .ahead_lines = kind % 3};
                const std::int64_t y_cols = cols + kind % 3;  // the last row ends at the guard page
                const auto size = static_cast<std::size_t>((rows - 1) * y_cols + cols);
                const Guarded<float> y{std::vector<float>(size)};  // zeros, which stay between the rows
                table->epilogue(tile, DType::f32, y.data(), y_cols * 4);
                std::vector<float> expected(size);
                for (std::int64_t i = 0; i < rows; ++i) {
                    for (std::int64_t j = 0; j < cols; ++j) {
                        expected[static_cast<std::size_t>(i * y_cols + j)] = expected_output(tile, i, j);
                    }
                }
                CHECK(y.bytes() == Guarded<float>(expected).bytes());
                for (const DType dtype : {DType::f16, DType::bf16}) {
                    const Guarded<std::uint16_t> narrow{std::vector<std::uint16_t>(size)};
                    const Guarded<std::uint16_t> rounded{std::vector<std::uint16_t>(size)};
                    table->epilogue(tile, dtype, narrow.data(), y_cols * 2);
                    for (std::int64_t i = 0; i < rows; ++i) {
                        table->store(y.data() + i * y_cols, cols, dtype, rounded.data() + i * y_cols, 1);
                    }
                    CHECK(narrow.bytes() == rounded.bytes());
                }
            }
        }
    }
}

// y Phi(y), off by less than it says, and the same everywhere.
TEST(gelu_is_close_and_agrees) {
    std::vector<float> values{0.0F, -0.0F, 1e-40F, -1e-40F, 1e-20F, 3e38F, -3e38F, infinity, NAN, 5.5F, -5.5F};
    for (int i = -64000; i <= 64000; ++i) values.push_back(static_cast<float>(i) * 1.25e-4F);
    values.resize((values.size() + 15) / 16 * 16);
    const auto size = std::ssize(values);
    std::string expected;
    for (const Kernels* table : tables()) {
        const check::Context context("gelu of ", table->isa);
        const Guarded<float> given(values);
        const Guarded<float> result{std::vector<float>(values.size())};
        const octavo::cpu::EpilogueTile tile{
            .rows = 1, .cols = size, .scaled = given.data(), .stride = size, .gelu = true};
        table->epilogue(tile, DType::f32, result.data(), size * 4);
        if (expected.empty()) expected = result.bytes();
        CHECK(result.bytes() == expected);
        double worst = 0.0;
        for (std::size_t i = 0; i < values.size(); ++i) {
            const double y = values[i];
            const double exact = y * std::erfc(-y / std::numbers::sqrt2) / 2.0;
            const double got = result.data()[i];
            CHECK(std::isnan(got) == std::isnan(exact));
            if (std::isfinite(y) && y != 0.0) worst = std::max(worst, std::fabs(got - exact) / std::fabs(y));
        }
        CHECK(worst < 2e-7);
    }
}

TEST(columns_are_dequantized_to_the_bit) {
    const std::vector<std::int32_t> columns{3, 4, 18, 63};
    const std::vector<std::int32_t> rows{0, 2, 3, 1};
    for (const Kernels* table : tables()) {
        Random random(10);
        for (std::int64_t cols = 1; cols <= Tile::stride; cols += 5) {
            const Tile given(random, cols);
            for (const bool has_zeropoint : {false, true}) {
                const check::Context context("columns of ", table->isa, ", ", cols, ", zeropoint ", has_zeropoint);
                const auto width = static_cast<std::int64_t>(given.width);
                const float* const zeropoint = has_zeropoint ? given.bias.data() : nullptr;
                std::vector<float> expected(static_cast<std::size_t>(3 * octavo::cpu::outlier_stride + width));
                const Guarded<float> target(expected);
                table->dequantize_columns(given.w.data(), 16 * Tile::depth, columns.data(), rows.data(), 4, cols,
                                          zeropoint, given.scale_w.data(), target.data());
                for (std::size_t c = 0; c < columns.size(); ++c) {
                    for (std::int64_t j = 0; j < width; ++j) {
                        expected[static_cast<std::size_t>(rows[c] * octavo::cpu::outlier_stride + j)] =
                            dequantized(given.w.data(), columns[c], j, has_zeropoint ? zeropoint[j] : 0.0F,
                                        given.scale_w.data()[j]);
                    }
                }
                CHECK(target.bytes() == Guarded<float>(expected).bytes());
            }
        }
    }
}

TEST(columns_are_rotated_back_to_the_bit) {
    constexpr std::int64_t depth = 320;
    for (const std::int64_t block : {16, 64, 256}) {
        Random random(12);
        std::vector<std::int8_t> codes(48 * depth);
        for (std::int8_t& code : codes) code = static_cast<std::int8_t>(random.integer(-128, 127));
        // The largest sums.
        for (std::int64_t h = 0; h < block; ++h) {
            codes[static_cast<std::size_t>(octavo::cpu::packed_index(0, h, depth))] = -128;
        }
        const Guarded<std::int8_t> w(codes);
        const Guarded<float> zeropoint(random_floats(random, 48));
        const Guarded<float> scale(random_floats(random, 48));
        const float root = std::sqrt(static_cast<float>(block));
        for (const Kernels* table : tables()) {
            for (std::int64_t place = 0; place < block; ++place) {
                const std::int64_t cols = 48 - place % 48;
                const check::Context context("column ", place, " of ", block, " by ", table->isa, ", ", cols);
                std::vector<float> expected(static_cast<std::size_t>((cols + 15) / 16 * 16));
                const Guarded<float> target(expected);
                table->rotate_back_column(w.data(), 16 * depth, block, place, cols, zeropoint.data(), scale.data(),
                                          target.data());
                for (std::size_t j = 0; j < expected.size(); ++j) {
                    const auto row = static_cast<std::int64_t>(j);
                    if (row >= cols) {  // may be written or not
                        expected[j] = target.data()[j];
                        continue;
                    }
                    int sum = 0;
                    for (std::int64_t h = 0; h < block; ++h) {
                        const int sign = std::popcount(static_cast<std::uint64_t>(h & place)) % 2 == 0 ? 1 : -1;
                        sum += sign * w.data()[octavo::cpu::packed_index(row, h, depth)];
                    }
                    const float rotated = static_cast<float>(sum) * (1.0F / root);
                    expected[j] = (rotated + zeropoint.data()[j] * (place == 0 ? root : 0.0F)) * scale.data()[j];
                }
                CHECK(target.bytes() == Guarded<float>(expected).bytes());
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

// What a run of panels hands over: sums that are whole by then, each row once, none from two panels at a time.
struct Finished {
    const Plan& plan;
    const std::int32_t* whole;  // of a panel
    std::vector<std::int32_t> sums;

    static void take(const void* context, std::int64_t row, std::int64_t rows) {
        Finished& finished = **static_cast<Finished* const*>(context);
        CHECK_EQ(row * finished.plan.cols, std::ssize(finished.sums));
        CHECK_EQ(row / finished.plan.rows, (row + rows - 1) / finished.plan.rows);
        const std::int32_t* const begin = finished.whole + row % finished.plan.rows * finished.plan.cols;
        finished.sums.insert(finished.sums.end(), begin, begin + rows * finished.plan.cols);
    }
};

// The product of `plan` over slices of k that end at `ends`, as the driver goes: panels of X and slices of W in guarded
// memory. `begun`: pieces of the product that are begun before, in two goes. -> [rows, cols] sums.
std::vector<std::int32_t> multiply(const Plan& plan, const std::vector<std::int8_t>& x, std::int64_t rows,
                                   const Guarded<std::int8_t>& w, std::int64_t cols,
                                   const std::vector<std::int64_t>& ends, std::int64_t begun = 0) {
    const std::int64_t depth = ends.back();
    const std::int64_t placed = (rows + plan.rows - 1) / plan.rows * plan.rows;
    const Guarded<std::int32_t> acc(static_cast<std::size_t>(placed * plan.cols));
    std::vector<std::uint32_t> row_offsets(static_cast<std::size_t>(rows));
    std::vector<std::int32_t> col_offsets(static_cast<std::size_t>(cols));
    if (plan.enter != nullptr) plan.enter(std::min(rows, plan.rows));
    for (std::int64_t begin = 0; const std::int64_t end : ends) {
        const std::int64_t size = end - begin;
        const Guarded<std::int8_t> panels(static_cast<std::size_t>(placed * size * plan.x_size));
        for (std::int64_t i = 0; i < rows; ++i) {
            std::int8_t* const panel = panels.data() + i / plan.rows * plan.rows * size * plan.x_size;
            row_offsets[static_cast<std::size_t>(i)] +=
                static_cast<std::uint32_t>(plan.place_row(x.data() + i * depth + begin, size, i % plan.rows, panel));
        }
        octavo::cpu::ProductTile tile{.x = panels.data(),
                                      .rows = rows,
                                      .w = w.data() + begin * 16,
                                      .w_stride = depth * 16,
                                      .cols = cols,
                                      .depth = size,
                                      .first = begin == 0,
                                      .acc = acc.data(),
                                      .ahead = w.data(),
                                      .ahead_depth = ends.front(),
                                      .ahead_stride = depth * 16};
        const Guarded<std::int8_t> slice(static_cast<std::size_t>(cols * size * plan.regrouped));
        if (plan.regroup != nullptr) {
            plan.regroup(tile.w, tile.w_stride, cols, size, slice.data(), col_offsets.data());
            tile.w = slice.data();
            tile.w_stride = 16 * size * plan.regrouped;
        }
        const Guarded<std::int32_t> whole(static_cast<std::size_t>(plan.rows * plan.cols));
        Finished finished{.plan = plan, .whole = whole.data(), .sums = {}};
        Finished* const context = &finished;  // NOLINT(misc-const-correctness): rows are added to it
        if (plan.run_rows > 0 && end == depth) {
            tile.finish = Finished::take;
            tile.whole = whole.data();
            tile.context = static_cast<const void*>(&context);
        }
        if (begun > 0) {
            plan.begin(tile, begun / 2);
            plan.begin(tile, begun - begun / 2);
        }
        plan.multiply(tile);
        if (tile.finish != nullptr) {
            CHECK_EQ(std::ssize(finished.sums), rows * plan.cols);
            std::ranges::copy(finished.sums, acc.data());
        }
        begin = end;
    }
    if (plan.leave != nullptr) plan.leave();

    std::vector<std::int32_t> sums;
    for (std::int64_t i = 0; i < rows; ++i) {
        for (std::int64_t j = 0; j < cols; ++j) {
            auto sum = static_cast<std::uint32_t>(acc.data()[i * plan.cols + j]);
            sum -= row_offsets[static_cast<std::size_t>(i)];
            sum -= static_cast<std::uint32_t>(col_offsets[static_cast<std::size_t>(j)]);
            for (std::int64_t k = 0; plan.x_is_unsigned && k < depth; ++k) {
                sum -= 128U * static_cast<std::uint32_t>(w.data()[octavo::cpu::packed_index(j, k, depth)]);
            }
            sums.push_back(static_cast<std::int32_t>(sum));
        }
    }
    return sums;
}

// One product of `plan`, compared with sums of its own.
void check_product(const Plan& plan, std::int64_t rows, std::int64_t cols, const std::vector<std::int64_t>& ends,
                   Random& random, std::int64_t begun = 0) {
    const std::int64_t depth = ends.back();
    // All of them extreme, the least, or anything.
    const auto fill = [&](std::int64_t size) {
        const std::int64_t kind = random.integer(0, 3);
        std::vector<std::int8_t> values(static_cast<std::size_t>(size));
        for (std::int8_t& value : values) {
            const std::int64_t any = random.integer(-128, 127);
            value = static_cast<std::int8_t>(kind == 0 ? (any < 0 ? -128 : 127) : kind == 1 ? -128 : any);
        }
        return values;
    };
    const std::vector<std::int8_t> x = fill(rows * depth);
    const Guarded<std::int8_t> w(fill(cols * depth));
    const auto sums = multiply(plan, x, rows, w, cols, ends, begun);
    for (std::int64_t i = 0; i < rows; ++i) {
        for (std::int64_t j = 0; j < cols; ++j) {
            std::int32_t expected = 0;
            for (std::int64_t k = 0; k < depth; ++k) {
                expected +=
                    x[static_cast<std::size_t>(i * depth + k)] * w.data()[octavo::cpu::packed_index(j, k, depth)];
            }
            const std::int32_t got = sums[static_cast<std::size_t>(i * cols + j)];
            if (got != expected) CHECK_EQ(got, expected);
        }
    }
}

struct NamedPlan {
    std::string name;
    const Plan* plan;
};

// Of every table, and those of emulated_product.cpp.
std::vector<NamedPlan> plans() {
    std::vector<NamedPlan> all{{"emulated few", &octavo::cpu::emulated::few},
                               {"emulated some", &octavo::cpu::emulated::some},
                               {"emulated many", &octavo::cpu::emulated::many}};
    for (const Kernels* table : tables()) {
        all.push_back({std::string(table->isa) + " few", table->few});
        all.push_back({std::string(table->isa) + " some", table->some});
        all.push_back({std::string(table->isa) + " many", table->many});
    }
    return all;
}

}  // namespace

TEST(product_is_exact) {
    for (const auto& [name, plan] : plans()) {
        Random random(21);
        std::vector<std::int64_t> all_rows;
        for (std::int64_t rows = 1; rows <= plan->rows; ++rows) all_rows.push_back(rows);
        // Runs of panels, with a last one of every kind.
        for (const std::int64_t rows : {33, 48, 49, 64, 80, 96}) {
            if (rows <= plan->run_rows) all_rows.push_back(rows);
        }
        for (const std::int64_t rows : all_rows) {
            for (std::int64_t cols = 16; cols <= plan->cols; cols += 16) {
                for (const std::vector<std::int64_t>& ends :
                     {std::vector<std::int64_t>{64}, {128}, {plan->depth, plan->depth + 64}, {64, 256, 320}}) {
                    const check::Context context(name, " ", rows, " x ", cols, " x ", ends.back());
                    check_product(*plan, rows, cols, ends, random);
                }
            }
            for (const std::int64_t begun : {1, 2, 7, 100}) {  // pieces, of the ten that there are with AMX
                const check::Context context(name, " ", rows, " rows, ", begun, " pieces begun before");
                if (plan->begin != nullptr) check_product(*plan, rows, plan->cols, {320}, random, begun);
            }
        }
    }
}

// At the greatest depth every sum fits, though numbers on the way to it have wrapped.
TEST(product_at_the_greatest_depth) {
    constexpr std::int64_t depth = octavo::cpu::max_int32_depth;
    for (const auto& [x_code, w_code] : {std::pair{-128, -128}, {-128, 127}, {127, -128}, {127, 127}}) {
        const Guarded<std::int8_t> w(
            std::vector<std::int8_t>(static_cast<std::size_t>(16 * depth), static_cast<std::int8_t>(w_code)));
        for (const auto& [name, plan] : plans()) {
            const check::Context context(name, " ", x_code, " times ", w_code);
            const std::vector<std::int8_t> x(static_cast<std::size_t>(plan->rows * depth),
                                             static_cast<std::int8_t>(x_code));
            for (const std::int64_t rows : {std::int64_t{1}, plan->rows}) {
                for (const std::int32_t sum : multiply(*plan, x, rows, w, 16, {depth})) {
                    CHECK_EQ(sum, depth * x_code * w_code);
                }
            }
        }
    }
}

// Every pair of codes, four times in a group and twice: where sums of two products could saturate.
TEST(product_of_every_pair_of_codes) {
    for (const auto& [name, plan] : plans()) {
        const check::Context context(name);
        for (int x_code = -128; x_code <= 127; ++x_code) {
            std::vector<std::int8_t> all(64);
            std::fill_n(all.begin(), 4, static_cast<std::int8_t>(x_code));
            std::vector<std::int8_t> half = all;
            half[1] = half[2] = 0;
            // Output feature j has the code w_code + j.
            for (int w_code = -128; w_code <= 112; w_code += 16) {
                std::vector<std::int8_t> packed(std::size_t{16} * 64);
                for (std::size_t i = 0; i < 64; ++i)
                    packed[i] = static_cast<std::int8_t>(w_code + static_cast<int>(i) / 4);
                const Guarded<std::int8_t> w(packed);
                const auto sums = multiply(*plan, all, 1, w, 16, {64});
                const auto half_sums = multiply(*plan, half, 1, w, 16, {64});
                for (std::size_t j = 0; j < 16; ++j) {
                    const int product = x_code * (w_code + static_cast<int>(j));
                    if (sums[j] != 4 * product) CHECK_EQ(sums[j], 4 * product);
                    if (half_sums[j] != 2 * product) CHECK_EQ(half_sums[j], 2 * product);
                }
            }
        }
    }
}
