// float16 and bfloat16 to and from float32, in every kernel table: all 65536 patterns up, and down every value where
// the result changes (each 16-bit number, each half-way point, and their neighbors in float32).
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "arrays.hpp"
#include "check.hpp"
#include "tables.hpp"

using octavo::DType;
using octavo::cpu::Kernels;

namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();

// Conversions of this many values at once, so that the vector loops and their tails both run.
constexpr std::size_t chunk = 1000;

std::vector<float> load(const Kernels& table, DType dtype, const std::vector<std::uint16_t>& bits) {
    std::vector<float> values(bits.size());
    for (std::size_t at = 0; at < bits.size(); at += chunk) {
        const auto size = static_cast<std::int64_t>(std::min(chunk, bits.size() - at));
        table.load(dtype, bits.data() + at, 1, size, values.data() + at);
    }
    return values;
}

std::vector<std::uint16_t> store(const Kernels& table, DType dtype, const std::vector<float>& values) {
    std::vector<std::uint16_t> bits(values.size());
    for (std::size_t at = 0; at < values.size(); at += chunk) {
        const auto size = static_cast<std::int64_t>(std::min(chunk, values.size() - at));
        table.store(values.data() + at, size, dtype, bits.data() + at, 1);
    }
    return bits;
}

template <class Body>
void for_each_table(Body body) {
    for (const Kernels* table : tables()) {
        for (const DType dtype : {DType::f16, DType::bf16}) {
            const check::Context context(table->isa, dtype == DType::f16 ? " float16" : " bfloat16");
            body(*table, dtype);
        }
    }
}

// The pattern of infinity: those below it are finite.
std::uint16_t infinity_bits(DType dtype) { return dtype == DType::f16 ? 0x7C00 : 0x7F80; }

// What the 16-bit pattern `bits` + 1/2 stands for, `bits` finite. After the greatest one the exponent goes on.
double half_way(DType dtype, std::uint16_t bits) {
    const double low = decode16(dtype, bits);
    const double step = bits + 1 == infinity_bits(dtype) ? low - decode16(dtype, static_cast<std::uint16_t>(bits - 1))
                                                         : decode16(dtype, static_cast<std::uint16_t>(bits + 1)) - low;
    return low + step / 2;
}

}  // namespace

TEST(literal_values) {
    struct Case {
        DType dtype;
        std::uint16_t bits;
        float value;
    };
    const Case cases[] = {
        {DType::f16, 0x0000, 0.0F},        {DType::f16, 0x8000, -0.0F},     {DType::f16, 0x3C00, 1.0F},
        {DType::f16, 0xC000, -2.0F},       {DType::f16, 0x7BFF, 65504.0F},  {DType::f16, 0x0400, 0x1p-14F},
        {DType::f16, 0x0001, 0x1p-24F},    {DType::f16, 0x7C00, infinity},  {DType::f16, 0xFC00, -infinity},
        {DType::f16, 0x3555, 0.33325195F}, {DType::bf16, 0x3F80, 1.0F},     {DType::bf16, 0xC0C0, -6.0F},
        {DType::bf16, 0x0001, 0x1p-133F},  {DType::bf16, 0x7F80, infinity}, {DType::bf16, 0x8000, -0.0F},
    };
    for (const Kernels* table : tables()) {
        for (const Case& c : cases) {
            const check::Context context(table->isa, " bits ", c.bits);
            CHECK_EQ(load(*table, c.dtype, {c.bits})[0], c.value);
            CHECK_EQ(store(*table, c.dtype, {c.value})[0], c.bits);
        }
    }
}

TEST(every_pattern_up) {
    std::vector<std::uint16_t> patterns;
    for (int bits = 0; bits <= 0xFFFF; ++bits) patterns.push_back(static_cast<std::uint16_t>(bits));
    for_each_table([&](const Kernels& table, DType dtype) {
        const auto values = load(table, dtype, patterns);
        for (const std::uint16_t bits : patterns) {
            const float value = values[bits];
            if (check::equal(value, decode16(dtype, bits)) && std::signbit(value) == (bits > 0x7FFF)) continue;
            const check::Context context("bits ", bits);
            CHECK_EQ(value, decode16(dtype, bits));
            CHECK_EQ(std::signbit(value), bits > 0x7FFF);
        }
    });
}

TEST(every_rounding_down) {
    struct Point {
        float value;
        std::uint16_t expected;
    };
    for_each_table([&](const Kernels& table, DType dtype) {
        std::vector<Point> points;
        const auto add = [&](double value, int expected) {
            points.push_back({static_cast<float>(value), static_cast<std::uint16_t>(expected)});
            points.push_back({static_cast<float>(-value), static_cast<std::uint16_t>(expected | 0x8000)});
        };
        for (std::uint16_t bits = 0; bits < infinity_bits(dtype); ++bits) {
            // The number itself, and its neighbors in float32, which lie nearer to it than to any other.
            const auto exact = static_cast<float>(decode16(dtype, bits));
            add(exact, bits);
            add(std::nextafter(exact, infinity), bits);
            if (bits > 0) add(std::nextafter(exact, 0.0F), bits);
            // Half-way to the next pattern: to the even one. Just below and above it: to the nearer one.
            const auto middle = static_cast<float>(half_way(dtype, bits));
            add(middle, bits % 2 == 0 ? bits : bits + 1);
            add(std::nextafter(middle, 0.0F), bits);
            add(std::nextafter(middle, infinity), bits + 1);
        }
        add(double{std::numeric_limits<float>::max()}, infinity_bits(dtype));
        add(std::numeric_limits<double>::infinity(), infinity_bits(dtype));
        add(std::numeric_limits<float>::denorm_min(), 0);

        std::vector<float> values(points.size());
        std::ranges::transform(points, values.begin(), &Point::value);
        const auto bits = store(table, dtype, values);
        for (std::size_t i = 0; i < points.size(); ++i) {
            if (bits[i] == points[i].expected) continue;
            const check::Context context("value ", check::show(points[i].value));
            CHECK_EQ(bits[i], points[i].expected);
        }
    });
}

TEST(nan_stays_nan) {
    std::vector<float> values;
    for (const std::uint32_t bits : {0x7F800001U, 0x7F801FFFU, 0x7FC00000U, 0x7FFFFFFFU, 0x7F80FFFFU}) {
        for (const std::uint32_t sign : {0U, 0x80000000U}) {
            const std::uint32_t pattern = bits | sign;
            float value = 0;
            std::memcpy(&value, &pattern, sizeof value);
            values.push_back(value);
        }
    }
    for_each_table([&](const Kernels& table, DType dtype) {
        const auto bits = store(table, dtype, values);
        for (std::size_t i = 0; i < bits.size(); ++i) {
            const check::Context context("NaN ", i);
            CHECK(std::isnan(decode16(dtype, bits[i])));
            CHECK_EQ(bits[i] > 0x7FFF, std::signbit(values[i]));
        }
    });
}

TEST(random_values_down) {
    Random random(1);
    std::vector<float> values;
    for (int i = 0; i < 200000; ++i) {
        const auto bits = static_cast<std::uint32_t>(random.bits());
        float value = 0;
        std::memcpy(&value, &bits, sizeof value);
        if (!std::isnan(value)) values.push_back(value);
    }
    for_each_table([&](const Kernels& table, DType dtype) {
        const auto bits = store(table, dtype, values);
        for (std::size_t i = 0; i < bits.size(); ++i) {
            if (bits[i] == encode16(dtype, values[i])) continue;
            const check::Context context("value ", check::show(values[i]));
            CHECK_EQ(bits[i], encode16(dtype, values[i]));
        }
    });
}

TEST(strides_and_alignment) {
    for_each_table([&](const Kernels& table, DType dtype) {
        // Five numbers, two patterns apart, at an odd address; read and written back in the opposite order.
        std::byte memory[1 + 2 * 9];
        const auto at = [&](std::size_t i) { return memory + 1 + 2 * i; };
        for (std::uint16_t i = 0; i < 9; ++i) {
            const auto bits = static_cast<std::uint16_t>(0x3C00 + i);
            std::memcpy(at(i), &bits, 2);
        }
        float values[5];
        table.load(dtype, at(8), -2, 5, values);
        for (std::uint16_t i = 0; i < 5; ++i) {
            CHECK_EQ(values[i], decode16(dtype, static_cast<std::uint16_t>(0x3C00 + 8 - 2 * i)));
        }
        table.store(values, 5, dtype, at(0), 2);
        for (std::uint16_t i = 0; i < 9; ++i) {
            std::uint16_t bits = 0;
            std::memcpy(&bits, at(i), 2);
            CHECK_EQ(bits, i % 2 == 0 ? 0x3C00 + 8 - i : 0x3C00 + i);
        }
    });
}
