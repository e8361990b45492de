// int8_matmul: literal cases, shapes and layouts, the extremes of int8, and sums at the edges of int32.
#include <limits>
#include <vector>

#include "arrays.hpp"
#include "calls.hpp"
#include "check.hpp"
#include "octavo/gemm.hpp"
#include "reference.hpp"

using octavo::DType;

namespace {

Values product(const Array& a, const Array& b, Layout layout = Layout::contiguous) {
    const Array out(DType::i32, a.matrix().rows, b.matrix().rows, layout);
    octavo::int8_matmul(a.matrix(), b.matrix(), out.matrix());
    CHECK(out.gaps_untouched());
    return out.values();
}

// A row of k codes: the first `count` are `head`, the others `tail`.
Array row(std::int64_t k, double head, std::int64_t count, double tail = 0) {
    Array codes(DType::i8, 1, k);
    for (std::int64_t h = 0; h < k; ++h) codes.set(0, h, h < count ? head : tail);
    return codes;
}

}  // namespace

TEST(literal) {
    const Array a(DType::i8, Values(2, 3, {1, 2, 3, -4, 5, -6}));
    const Array b(DType::i8, Values(2, 3, {1, 0, -1, 127, -128, 10}));
    check_values("product", product(a, b), Values(2, 2, {-2, -99, 2, -1208}));
    const Array least(DType::i8, {-128});
    CHECK_EQ(product(least, least)(0, 0), 16384.0);
}

TEST(shapes) {
    struct Shape {
        std::int64_t m, n, k;
    };
    // The last ones have several slices of k: one panel of rows, few, and more than a block of them.
    const Shape shapes[] = {{1, 1, 1},     {1, 1, 0},     {0, 3, 5},      {3, 0, 5},      {2, 3, 5},
                            {7, 11, 13},   {1, 67, 31},   {67, 1, 5},     {64, 64, 64},   {65, 66, 127},
                            {3, 130, 64},  {131, 3, 65},  {4, 4, 1000},   {1, 200, 129},  {200, 70, 17},
                            {3, 20, 2000}, {13, 33, 700}, {37, 80, 1100}, {300, 270, 600}};
    Random random(71);
    for (const Shape& s : shapes) {
        const check::Context context(s.m, " x ", s.n, " x ", s.k);
        const Array a(DType::i8, random_codes(random, s.m, s.k));
        const Array b(DType::i8, random_codes(random, s.n, s.k));
        check_values("product", product(a, b), reference::int8_matmul(a.values(), b.values()));
    }
    for (std::int64_t k = 1; k <= 130; ++k) {
        const check::Context context("k ", k);
        const Array a(DType::i8, random_codes(random, 3, k));
        const Array b(DType::i8, random_codes(random, 6, k));
        check_values("product", product(a, b), reference::int8_matmul(a.values(), b.values()));
    }
}

TEST(all_codes_at_their_least) {
    for (const std::int64_t k : {1, 15, 16, 17, 63, 64, 65, 1000}) {
        const Array a(DType::i8, Values(5, k, std::vector<double>(static_cast<std::size_t>(5 * k), -128)));
        check_values("product", product(a, a), Values(5, 5, std::vector<double>(25, 16384.0 * static_cast<double>(k))));
    }
}

TEST(layouts_give_the_same_result) {
    Random random(73);
    const Values a = random_codes(random, 9, 70);
    const Values b = random_codes(random, 13, 70);
    const Values expected = reference::int8_matmul(a, b);
    for (const Layout of_a : layouts) {
        for (const Layout of_b : layouts) {
            for (const Layout of_out : layouts) {
                const check::Context context("layouts ", check::show(of_a), check::show(of_b), check::show(of_out));
                const Array a_array(DType::i8, a, of_a);
                const Array b_array(DType::i8, b, of_b);
                const std::string before = a_array.bytes() + b_array.bytes();
                check_values("product", product(a_array, b_array, of_out), expected);
                CHECK(a_array.bytes() + b_array.bytes() == before);
            }
        }
    }
}

// Strides of 0: one row, or one column, for all.
TEST(repeated_inputs) {
    const Array a(DType::i8, {3, -2, 7});
    octavo::Matrix rows = a.matrix();
    rows.rows = 2;
    rows.row_stride = 0;
    octavo::Matrix cols = a.matrix();
    cols.col_stride = 0;
    const Array out(DType::i32, 2, 1);
    octavo::int8_matmul(rows, cols, out.matrix());
    check_values("product", out, Values(2, 1, {24, 24}));
}

// Beyond 131071 products the sums of a result may need 64 bits; those that fit 32 bits are exact.
TEST(deep) {
    Random random(79);
    for (const std::int64_t k : {131071, 131072, 200000, 262143, 262145}) {
        const check::Context context("k ", k);
        const Array a(DType::i8, random_codes(random, 3, k), k == 200000 ? Layout::padded : Layout::contiguous);
        const Array b(DType::i8, random_codes(random, 5, k));
        check_values("product", product(a, b), reference::int8_matmul(a.values(), b.values()));
    }
}

TEST(edges_of_int32) {
    constexpr double most = std::numeric_limits<std::int32_t>::max();
    constexpr double least = std::numeric_limits<std::int32_t>::min();
    struct Case {
        const char* what = nullptr;
        Array a;
        Array b;
        double sum = 0;
    };
    // Rows that differ in their last codes only.
    const auto with = [](Array codes, std::int64_t at, double value) {
        codes.set(0, at, value);
        return codes;
    };
    const Case cases[] = {
        {"131071 * 2^14", row(131071, -128, 131071), row(131071, -128, 131071), 2147467264},
        {"2^31", row(131072, -128, 131072), row(131072, -128, 131072), 2147483648},
        {"-2^31 + 2^14", row(131072, -128, 131072), row(131072, 127, 131072), -2130706432},
        // 131071 * 2^14 + 127 * 127 + 2 * 127 = 2^31 - 1
        {"2^31 - 1", with(row(131073, -128, 131071, 127), 131072, 2), row(131073, -128, 131071, 127), most},
        {"2^31 - 1 + 1", with(with(row(131074, -128, 131071, 127), 131072, 2), 131073, 1),
         with(row(131074, -128, 131071, 127), 131073, 1), most + 1},
        // 132104 * 127 * -128 - 8 * 128 = -2^31
        {"-2^31", row(132105, 127, 132104, 8), row(132105, -128, 132105), least},
        {"-2^31 - 1", with(row(132106, 127, 132104, 8), 132105, 1), with(row(132106, -128, 132105), 132105, -1),
         least - 1},
        {"more than 2^31", row(200000, 127, 200000), row(200000, 127, 200000), 127.0 * 127 * 200000},
    };
    for (const Case& c : cases) {
        const check::Context context(c.what);
        if (c.sum >= least && c.sum <= most) {
            CHECK_EQ(product(c.a, c.b)(0, 0), c.sum);
        } else {
            CHECK_THROWS(product(c.a, c.b), value,
                         "int8_matmul: out: expected sums that fit int32, got " +
                             std::to_string(static_cast<std::int64_t>(c.sum)) + " at row 0, column 0");
        }
    }
}

// The error of one sum among many threads' work.
TEST(overflow_names_its_place) {
    Array a(DType::i8, 70, 140000);
    for (std::int64_t i = 0; i < 70; ++i) {
        for (std::int64_t h = 0; h < 140000; ++h) a.set(i, h, i == 68 ? 127 : 1);
    }
    const Array b = row(140000, 127, 140000);
    CHECK_THROWS(product(a, b), value, "got 2258060000 at row 68, column 0");
}

TEST(argument_errors) {
    const Array a(DType::i8, 2, 3);
    const Array b(DType::i8, 4, 3);
    const Array out(DType::i32, 2, 4);
    const auto call = [](const octavo::Matrix& x, const octavo::Matrix& y, const octavo::Matrix& to) {
        octavo::int8_matmul(x, y, to);
    };
    CHECK_THROWS(call(out.matrix(), b.matrix(), out.matrix()), type, "int8_matmul: a: expected dtype int8, got int32");
    CHECK_THROWS(call(a.matrix(), out.matrix(), out.matrix()), type, "int8_matmul: b: expected dtype int8");
    CHECK_THROWS(call(a.matrix(), Array(DType::i8, 4, 2).matrix(), out.matrix()), value,
                 "int8_matmul: b: expected shape [4, 3], got [4, 2]");
    CHECK_THROWS(call(a.matrix(), b.matrix(), Array(DType::i32, 4, 2).matrix()), value,
                 "int8_matmul: out: expected shape [2, 4], got [4, 2]");
    CHECK_THROWS(call(a.matrix(), b.matrix(), Array(DType::f32, 2, 4).matrix()), type,
                 "int8_matmul: out: expected dtype int32, got float32");

    octavo::Matrix broken = a.matrix();
    broken.rows = -1;
    CHECK_THROWS(call(broken, b.matrix(), out.matrix()), value,
                 "int8_matmul: a: expected rows and cols >= 0, got [-1, 3]");
    broken = a.matrix();
    broken.data = nullptr;
    CHECK_THROWS(call(broken, b.matrix(), out.matrix()), value,
                 "int8_matmul: a: expected data of shape [2, 3], got data NULL");
}

TEST(overlap) {
    // out [2, 4] of int32 inside a buffer of 64 bytes, a and b [*, 3] of int8 around and within it.
    GuardedMemory memory(64);
    const auto matrix_at = [&](std::ptrdiff_t byte, DType dtype, std::int64_t rows, std::int64_t cols,
                               std::int64_t row_stride) {
        return octavo::Matrix{memory.data() + byte, dtype, {}, rows, cols, row_stride, 1};
    };
    const octavo::Matrix out = matrix_at(16, DType::i32, 2, 4, 4);
    const octavo::Matrix before = matrix_at(0, DType::i8, 2, 3, 8);
    const octavo::Matrix behind = matrix_at(48, DType::i8, 4, 3, 4);
    const octavo::Matrix within = matrix_at(40, DType::i8, 2, 3, 3);
    octavo::int8_matmul(before, behind, out);
    CHECK_THROWS(octavo::int8_matmul(within, behind, out), value, "int8_matmul: out: expected memory apart from a");
    CHECK_THROWS(octavo::int8_matmul(before, matrix_at(45, DType::i8, 4, 3, 3), out), value,
                 "int8_matmul: out: expected memory apart from b");
    // The last byte before, and the first behind, are apart.
    octavo::int8_matmul(matrix_at(5, DType::i8, 2, 3, 8), behind, out);

    // Left and right part of the same rows: out is columns 8 to 15 (bytes), a is columns 0 to 2 and behind it nothing.
    const octavo::Matrix right = matrix_at(8, DType::i32, 2, 2, 4);
    const octavo::Matrix left = matrix_at(0, DType::i8, 2, 3, 16);
    const octavo::Matrix b = matrix_at(48, DType::i8, 2, 3, 3);
    octavo::int8_matmul(left, b, right);
    CHECK_THROWS(octavo::int8_matmul(matrix_at(6, DType::i8, 2, 3, 16), b, right), value, "memory apart from a");

    octavo::Matrix folded = out;
    folded.row_stride = 2;
    CHECK_THROWS(octavo::int8_matmul(before, behind, folded), value,
                 "expected elements that share no memory with each other, got strides [2, 1] for shape [2, 4]");
    folded.row_stride = 0;
    CHECK_THROWS(octavo::int8_matmul(before, behind, folded), value, "share no memory");
}
