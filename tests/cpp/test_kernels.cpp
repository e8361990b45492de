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

TEST(mark_outliers_agrees) {
    compare("mark_outliers", 0, [&](const Kernels& table, std::int64_t size) {
        Random random(3);
        auto values = random_floats(random, size, 3);
        for (std::size_t i = 0; i < values.size(); i += 17) values[i] = i % 2 == 0 ? 6.0F : std::nanf("");
        const Guarded<float> x(values);
        std::vector<std::uint8_t> marks(static_cast<std::size_t>(size));
        for (std::size_t i = 0; i < marks.size(); i += 5) marks[i] = 1;
        const Guarded<std::uint8_t> mask(marks);
        table.mark_outliers(x.data(), size, 6.0F, mask.data());
        for (std::size_t i = 0; i < marks.size(); ++i) {
            CHECK_EQ(mask.data()[i], marks[i] != 0 || !(std::fabs(values[i]) < 6.0F) ? 1 : 0);
        }
        return mask.bytes();
    });
}

TEST(encode_agrees) {
    compare("encode_absmax", 0, [&](const Kernels& table, std::int64_t size) {
        std::string result;
        // The last ones are where x * 127 overflows, and just before.
        for (const double absmax : {1.0, 6.0, 1e-40, 2.6e36, 3e36, 3.4e38}) {
            Random random(5);
            std::vector<float> values(static_cast<std::size_t>(size));
            for (float& value : values) value = static_cast<float>(random.uniform(-absmax, absmax));
            const Guarded<float> x(values);
            const Guarded<std::int8_t> codes(static_cast<std::size_t>(size));
            table.encode_absmax(x.data(), size, static_cast<float>(absmax), codes.data());
            result += codes.bytes();
        }
        return result;
    });
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

// Eq. 1 for every float16 x in range of some absmaxes: the code of the real numbers.
TEST(encode_absmax_is_ideal_for_float16) {
    Random random(11);
    std::vector<float> absmaxes{0x1p-24F, 0x1p-14F, 1.0F, 6.0F, 65504.0F};
    for (int i = 0; i < 20; ++i) {
        absmaxes.push_back(
            static_cast<float>(decode16(DType::f16, static_cast<std::uint16_t>(random.integer(1, 0x7BFF)))));
    }
    for (const float absmax : absmaxes) {
        std::vector<float> x;
        for (std::uint16_t bits = 0; decode16(DType::f16, bits) <= absmax && bits < 0x7C00; ++bits) {
            x.push_back(static_cast<float>(decode16(DType::f16, bits)));
            x.push_back(-x.back());
        }
        for (const Kernels* table : tables()) {
            std::vector<std::int8_t> codes(x.size());
            table->encode_absmax(x.data(), static_cast<std::int64_t>(x.size()), absmax, codes.data());
            for (std::size_t i = 0; i < x.size(); ++i) {
                const double expected = reference::ideal_absmax_code(x[i], absmax);
                if (codes[i] == expected) continue;
                const check::Context context(table->isa, " absmax ", absmax, " x ", x[i]);
                CHECK_EQ(int{codes[i]}, static_cast<int>(expected));
            }
        }
    }
}

TEST(float_updates_agree) {
    compare("scale_sums", 0, [&](const Kernels& table, std::int64_t size) {
        Random random(9);
        std::vector<std::int32_t> sums(static_cast<std::size_t>(size));
        for (std::int32_t& sum : sums) sum = static_cast<std::int32_t>(random.bits());
        const Guarded<std::int32_t> acc(sums);
        const Guarded<float> scale(random_floats(random, size));
        const Guarded<float> y(static_cast<std::size_t>(size));
        table.scale_sums(acc.data(), size, 0.37F, scale.data(), y.data());
        for (std::int64_t i = 0; i < size; ++i) {
            const float expected = static_cast<float>(acc.data()[i]) * (0.37F * scale.data()[i]);
            CHECK_EQ(y.data()[i], expected);
        }
        return y.bytes();
    });
    compare("add_scaled", 0, [&](const Kernels& table, std::int64_t size) {
        Random random(9);
        const Guarded<float> x(random_floats(random, size));
        const Guarded<float> y(random_floats(random, size));
        table.add_scaled(size, 1.3F, x.data(), y.data());
        return y.bytes();
    });
    compare("add_products", 0, [&](const Kernels& table, std::int64_t size) {
        Random random(9);
        const std::int64_t stride = size + 2;
        const Guarded<float> rows(random_floats(random, 4 * stride + size));
        const Guarded<float> values(random_floats(random, 5));
        const Guarded<std::int32_t> positions(std::vector<std::int32_t>{4, 0, 3, 3, 1});
        std::string result;
        for (const std::int32_t* chosen : {static_cast<std::int32_t*>(nullptr), positions.data()}) {
            for (const std::int64_t count : {0, 1, 5}) {
                const auto start = random_floats(random, size);
                const Guarded<float> y(start);
                table.add_products(size, count, values.data(), chosen, rows.data(), stride, y.data());
                for (std::int64_t i = 0; i < size; ++i) {
                    float expected = start[static_cast<std::size_t>(i)];
                    for (std::int64_t o = 0; o < count; ++o) {
                        const std::int64_t row = chosen != nullptr ? chosen[o] : o;
                        expected += values.data()[o] * rows.data()[row * stride + i];
                    }
                    CHECK_EQ(y.data()[i], expected);
                }
                result += y.bytes();
            }
        }
        return result;
    });
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

namespace {

// One product of `table` in guarded memory, compared with sums of its own.
void check_gemm(const Kernels& table, std::int64_t m, std::int64_t n, std::int64_t k, Random& random) {
    const check::Context context(table.isa, " gemm ", m, " x ", n, " x ", k);
    // Rows further apart than k; the last row ends at the guard page.
    const std::int64_t a_stride = k + random.integer(0, 3);
    const std::int64_t b_stride = k + random.integer(0, 3);
    const std::int64_t acc_stride = n + random.integer(0, 3);
    const bool extreme = random.integer(0, 3) == 0;  // all -128, the value without a negative
    const auto fill = [&](std::int64_t size) {
        std::vector<std::int8_t> values(static_cast<std::size_t>(size));
        for (std::int8_t& value : values) value = static_cast<std::int8_t>(extreme ? -128 : random.integer(-128, 127));
        return values;
    };
    const Guarded<std::int8_t> a(fill((m - 1) * a_stride + k));
    const Guarded<std::int8_t> b(fill((n - 1) * b_stride + k));
    const Guarded<std::int32_t> b_sums(static_cast<std::size_t>(n));
    for (std::int64_t j = 0; j < n; ++j) b_sums.data()[j] = table.sum(b.data() + j * b_stride, k);
    const Guarded<std::int32_t> acc(static_cast<std::size_t>((m - 1) * acc_stride + n));
    table.gemm(a.data(), a_stride, b.data(), b_stride, b_sums.data(), m, n, k, acc.data(), acc_stride);
    for (std::int64_t i = 0; i < m; ++i) {
        for (std::int64_t j = 0; j < n; ++j) {
            std::int64_t expected = 0;
            for (std::int64_t h = 0; h < k; ++h) {
                expected += std::int64_t{a.data()[i * a_stride + h]} * b.data()[j * b_stride + h];
            }
            if (acc.data()[i * acc_stride + j] != expected) CHECK_EQ(acc.data()[i * acc_stride + j], expected);
        }
    }
}

}  // namespace

TEST(gemm_is_exact) {
    for (const Kernels* table : tables()) {
        Random random(21);
        // Every tail of k, with every remainder of a block of 4 rows and 4 columns.
        for (std::int64_t k = 0; k <= 130; ++k) {
            for (const std::int64_t m : {1, 2, 3, 4, 6}) {
                for (const std::int64_t n : {1, 2, 3, 4, 5}) check_gemm(*table, m, n, k, random);
            }
        }
        // Many rows, for which a kernel may lay out B anew, a slice at a time.
        for (const std::int64_t k : {1, 3, 4, 5, 511, 513, 1029}) {
            for (const std::int64_t m : {63, 64, 66, 71}) {
                for (const std::int64_t n : {1, 16, 17, 63, 64, 70}) check_gemm(*table, m, n, k, random);
            }
        }
    }
}

// At the greatest depth every sum fits, though AVX-512's shifted sums have wrapped on the way.
TEST(gemm_at_the_greatest_depth) {
    constexpr std::int64_t k = octavo::cpu::max_int32_depth;
    struct Case {
        int a;
        int b;
    };
    for (const Case& c : {Case{-128, -128}, Case{-128, 127}, Case{127, -128}, Case{127, 127}}) {
        const std::vector<std::int8_t> a(k, static_cast<std::int8_t>(c.a));
        const std::vector<std::int8_t> b(k, static_cast<std::int8_t>(c.b));
        for (const Kernels* table : tables()) {
            const check::Context context(table->isa, " ", c.a, " times ", c.b);
            const std::int32_t b_sum = table->sum(b.data(), k);
            for (const std::int64_t m : {1, 64}) {
                // All rows of A are one.
                std::vector<std::int32_t> acc(static_cast<std::size_t>(m));
                table->gemm(a.data(), 0, b.data(), k, &b_sum, m, 1, k, acc.data(), 1);
                for (const std::int32_t sum : acc) CHECK_EQ(sum, k * c.a * c.b);
            }
        }
    }
}
