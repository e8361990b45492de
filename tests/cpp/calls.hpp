// The library's operations with the outputs allocated, and comparisons of what comes out.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <vector>

#include "arrays.hpp"
#include "check.hpp"
#include "octavo/octavo.hpp"
#include "reference.hpp"

inline constexpr octavo::Scheme schemes[] = {octavo::Scheme::absmax, octavo::Scheme::zeropoint};

inline octavo::Vector vector_of(const std::optional<Array>& array) {
    return array ? array->vector() : octavo::absent_vector;
}

inline Array int32_array(const std::vector<std::int32_t>& values, Layout layout = Layout::contiguous) {
    return {octavo::DType::i32, std::vector<double>(values.begin(), values.end()), layout};
}

// What `quantize` and `quantize_weight` write.
struct Codes {
    Codes(const Array& x, octavo::Scheme scheme, std::int64_t groups, Layout layout)
        : codes(octavo::DType::i8, x.matrix().rows, x.matrix().cols, layout),
          scale(octavo::DType::f32, 1, groups, layout),
          code_sums(octavo::DType::i32, 1, x.matrix().rows, layout) {
        if (scheme == octavo::Scheme::zeropoint) zeropoint.emplace(octavo::DType::f32, 1, groups, layout);
    }

    Array codes;
    Array scale;
    Array code_sums;  // by `quantize_weight` only
    std::optional<Array> zeropoint;
};

inline Codes quantize(const Array& x, octavo::Scheme scheme, octavo::Granularity granularity,
                      const std::vector<std::int32_t>& exclude = {}, Layout layout = Layout::contiguous) {
    const std::int64_t groups = granularity == octavo::Granularity::tensor ? 1 : x.matrix().rows;
    Codes result(x, scheme, groups, layout);
    const Array excluded = int32_array(exclude, layout);
    octavo::quantize(x.matrix(), scheme, granularity, excluded.vector(), result.codes.matrix(), result.scale.vector(),
                     vector_of(result.zeropoint));
    return result;
}

inline Codes quantize_weight(const Array& weight, octavo::Scheme scheme, octavo::Granularity granularity,
                             Layout layout = Layout::contiguous) {
    const std::int64_t groups = granularity == octavo::Granularity::vector ? weight.matrix().rows : 1;
    Codes result(weight, scheme, groups, layout);
    octavo::quantize_weight(weight.matrix(), scheme, granularity, result.codes.matrix(), result.scale.vector(),
                            vector_of(result.zeropoint), result.code_sums.vector());
    return result;
}

// Every element equal (NaN to NaN, signs of zeros too).
inline void check_values(const char* what, const Values& actual, const Values& expected) {
    CHECK_EQ(actual.rows, expected.rows);
    CHECK_EQ(actual.cols, expected.cols);
    for (std::int64_t i = 0; i < expected.rows; ++i) {
        for (std::int64_t j = 0; j < expected.cols; ++j) {
            if (check::equal(actual(i, j), expected(i, j))) continue;
            const check::Context context(what, " at row ", i, ", column ", j);
            CHECK_EQ(actual(i, j), expected(i, j));
        }
    }
}

inline void check_values(const char* what, const Array& actual, const Values& expected) {
    check_values(what, actual.values(), expected);
}

inline void check_values(const char* what, const Array& actual, const std::vector<double>& expected) {
    check_values(what, actual.values(), Values(expected));
}

inline void check_values(const char* what, const Array& actual, std::initializer_list<double> expected) {
    check_values(what, actual, std::vector<double>(expected));
}

inline void check_codes(const Codes& actual, const reference::Quantized& expected) {
    check_values("codes", actual.codes, expected.codes);
    check_values("scale", actual.scale, expected.scale);
    CHECK_EQ(actual.zeropoint.has_value(), !expected.zeropoint.empty());
    if (actual.zeropoint) check_values("zeropoint", *actual.zeropoint, expected.zeropoint);
}
