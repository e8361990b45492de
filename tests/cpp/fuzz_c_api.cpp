// Random calls of the C ABI: views of any strides over memory that is exactly as large as each view spans, so that a
// sanitizer sees what reads or writes beyond it; and, in one of four calls, an argument that lies about its extents,
// strides or dtype, or is missing, which must be refused, not followed.
//
//   fuzz_c_api [SECONDS [SEED]]
//
// Each call has its own seed, which a failure names: fuzz_c_api 0 SEED makes that call alone. Built with Clang and
// OCTAVO_FUZZER it is libFuzzer's, whose inputs are what the choices are made from, and whose options it takes.
#include <algorithm>
#include <array>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <limits>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "octavo/octavo.h"

namespace {

constexpr std::int64_t most = std::numeric_limits<std::int64_t>::max();

std::int64_t size_of(octavo_dtype dtype) {
    if (dtype == octavo_dtype_i8) return 1;
    return dtype == octavo_dtype_f16 || dtype == octavo_dtype_bf16 ? 2 : 4;
}

class Generator {
public:
    explicit Generator(std::uint64_t seed) : random_(seed) {}
    // Choices are made from these bytes as long as there are any.
    explicit Generator(std::span<const std::uint8_t> bytes) : bytes_(bytes), random_(bytes.size()) {}

    // A number in [low, high), which are at most 256 apart.
    std::int64_t number(std::int64_t low, std::int64_t high) {
        std::uint64_t value = 0;
        if (bytes_.empty()) {
            value = random_();
        } else {
            value = bytes_.front();
            bytes_ = bytes_.subspan(1);
        }
        return low + static_cast<std::int64_t>(value % static_cast<std::uint64_t>(high - low));
    }
    bool chance(int percent) { return number(0, 100) < percent; }
    template <class Values>
    auto one_of(const Values& values) {
        return values.at(static_cast<std::size_t>(number(0, std::ssize(values))));
    }
    std::int64_t extent() { return chance(8) ? 0 : chance(15) ? 1 : chance(80) ? number(1, 70) : number(60, 300); }
    octavo_dtype floats() { return static_cast<octavo_dtype>(number(0, 3)); }

    octavo_matrix matrix(octavo_dtype dtype, std::int64_t rows, std::int64_t cols, bool written) {
        std::int64_t col_stride = chance(60) ? 1 : number(1, 4);
        std::int64_t row_stride = cols * col_stride + (chance(60) ? 0 : number(0, 5));
        if (chance(15)) {
            row_stride = number(1, 3);
            col_stride = rows * row_stride + number(0, 2);
        }
        if (!written && chance(8)) row_stride = 0;
        if (chance(15)) row_stride = -row_stride;
        if (chance(15)) col_stride = -col_stride;
        std::int64_t low = 0;
        std::int64_t high = 0;
        if (rows > 0 && cols > 0) {
            const std::int64_t last_row = (rows - 1) * row_stride;
            const std::int64_t last_col = (cols - 1) * col_stride;
            low = std::min<std::int64_t>(last_row, 0) + std::min<std::int64_t>(last_col, 0);
            high = std::max<std::int64_t>(last_row, 0) + std::max<std::int64_t>(last_col, 0) + 1;
        }
        char* const data = memory((high - low) * size_of(dtype), dtype);
        return {data - low * size_of(dtype), dtype, {0, 0}, rows, cols, row_stride, col_stride};
    }
    octavo_vector vector(octavo_dtype dtype, std::int64_t size, bool written) {
        const octavo_matrix row = matrix(dtype, 1, size, written);
        return {row.data, dtype, {0, 0}, size, row.col_stride};
    }
    // Ascending columns of [0, k), most of the time.
    octavo_vector columns(std::int64_t count, std::int64_t k) {
        const octavo_vector vector = this->vector(octavo_dtype_i32, count, true);
        auto column = static_cast<std::int32_t>(number(0, 2));
        for (std::int64_t i = 0; i < count; ++i, column += static_cast<std::int32_t>(number(1, 4))) {
            const auto value = chance(97) ? static_cast<std::int32_t>(column % std::max<std::int64_t>(k, 1))
                                          : static_cast<std::int32_t>(random_());
            std::memcpy(static_cast<char*>(vector.data) + i * vector.stride * 4, &value, 4);
        }
        return vector;
    }

    // Memory of exactly so many bytes, at any address, filled with numbers of a dtype, or whatever bits.
    char* memory(std::int64_t bytes, octavo_dtype dtype) {
        const std::int64_t offset = chance(30) ? number(0, 4) : 0;
        held_.push_back(std::make_unique<char[]>(static_cast<std::size_t>(bytes + offset)));
        char* const data = held_.back().get() + offset;
        const bool any_bits = chance(20);
        const std::int64_t size = size_of(dtype);
        for (std::int64_t i = 0; i + size <= bytes; i += size) {
            auto bits = static_cast<std::uint32_t>(random_());
            const std::uint32_t sign = bits & 0x8000U;
            if (!any_bits && dtype == octavo_dtype_f16) bits = (0x3000U + (bits & 0x7FFFU) % 0x1800U) | sign;
            if (!any_bits && dtype == octavo_dtype_bf16) bits = (0x3F00U + (bits & 0x1FFU)) | sign;
            if (!any_bits && dtype == octavo_dtype_f32) {
                const float value = static_cast<float>(static_cast<std::int32_t>(bits)) / 2e8F;
                std::memcpy(&bits, &value, sizeof bits);
            }
            std::memcpy(data + i, &bits, static_cast<std::size_t>(size));
        }
        return data;
    }

private:
    std::span<const std::uint8_t> bytes_;
    std::mt19937_64 random_;
    std::vector<std::unique_ptr<char[]>> held_;
};

// The arguments of a call, of which one may be made to lie.
struct Arguments {
    std::vector<octavo_matrix*> matrices;
    std::vector<octavo_vector*> vectors;

    // Returns whether the call must be refused: nobody can follow this argument.
    bool lie(Generator& g) const {
        constexpr std::array<std::int64_t, 5> extents{-1, most, -most - 1, -7, most - 1};
        const std::int64_t chosen = g.number(0, std::ssize(matrices) + std::ssize(vectors));
        if (chosen < std::ssize(matrices)) {
            octavo_matrix& matrix = *matrices[static_cast<std::size_t>(chosen)];
            const bool has_rows = matrix.rows > 8 && matrix.cols > 0;
            switch (g.number(0, 6)) {
                case 0:
                    if (matrix.cols == 0 || matrix.row_stride == 0) return false;  // as many as one likes
                    matrix.rows = g.one_of(extents);
                    break;
                case 1: matrix.cols = g.one_of(extents); break;
                case 2:
                    if (!has_rows) return false;
                    matrix.row_stride = g.one_of(std::array{most, most / 2, -most - 1, most / 4, -most / 3});
                    break;
                case 3: matrix.dtype = static_cast<octavo_dtype>(g.chance(50) ? -7 : 5); break;
                case 4: matrix.device.kind = static_cast<octavo_device_kind>(g.number(2, 9)); break;
                default:
                    if (matrix.rows == 0 || matrix.cols == 0) return false;
                    matrix.data = nullptr;
            }
        } else {
            octavo_vector& vector = *vectors[static_cast<std::size_t>(chosen) - matrices.size()];
            switch (g.number(0, 4)) {
                case 0: vector.size = g.one_of(extents); break;
                case 1:
                    if (vector.size <= 8) return false;
                    vector.stride = g.one_of(std::array{most, most / 2, -most - 1, most / 4});
                    break;
                case 2: vector.dtype = static_cast<octavo_dtype>(g.chance(50) ? -7 : 5); break;
                default:
                    if (vector.size == 0) return false;
                    vector.data = nullptr;
            }
        }
        return true;
    }
};

struct Outcome {
    octavo_status status;
    bool must_fail;
};

Outcome quantize(Generator& g) {
    const std::int64_t m = g.extent();
    const std::int64_t k = g.extent();
    const auto options = octavo_quantize_options{static_cast<octavo_scheme>(g.number(0, 2)),
                                                 static_cast<octavo_granularity>(g.number(0, 2)),
                                                 g.one_of(std::array{0, 0, 16, 64, 256})};
    auto x = g.matrix(g.floats(), m, k, false);
    auto codes = g.matrix(octavo_dtype_i8, m, octavo_rotated_size(k, options.rotation), true);
    const std::int64_t groups = options.granularity == octavo_granularity_tensor ? 1 : m;
    auto scale = g.vector(octavo_dtype_f32, groups, true);
    auto zeropoint = g.vector(octavo_dtype_f32, groups, true);
    auto exclude = g.columns(g.number(0, 4), k);
    const Arguments arguments{{&x, &codes}, {&scale}};
    const bool must_fail = g.chance(25) && arguments.lie(g);
    return {octavo_quantize_with(&x, &options, g.chance(50) ? &exclude : nullptr, &codes, &scale,
                                 options.scheme == octavo_scheme_zeropoint ? &zeropoint : nullptr, nullptr),
            must_fail};
}

Outcome find_outliers(Generator& g) {
    const std::int64_t k = g.extent();
    auto x = g.matrix(g.floats(), g.extent(), k, false);
    auto columns = g.vector(octavo_dtype_i32, k, true);
    auto count = g.vector(octavo_dtype_i32, 1, true);
    const Arguments arguments{{&x}, {&columns, &count}};
    const bool must_fail = g.chance(25) && arguments.lie(g);
    octavo_linear_options options = OCTAVO_LINEAR_OPTIONS_DEFAULT;
    options.relative = g.chance(50) ? 0.0F : static_cast<float>(g.number(1, 9));
    options.cap = g.chance(50) ? 0.0 : 0.01 * static_cast<double>(g.number(1, 100));
    return {octavo_find_outliers_with(&x, &options, &columns, &count, nullptr), must_fail};
}

Outcome int8_matmul(Generator& g) {
    const std::int64_t m = g.extent();
    const std::int64_t n = g.extent();
    const std::int64_t k = g.extent();
    auto a = g.matrix(octavo_dtype_i8, m, k, false);
    auto b = g.matrix(octavo_dtype_i8, n, k, false);
    auto out = g.matrix(octavo_dtype_i32, m, n, true);
    const Arguments arguments{{&a, &b, &out}, {}};
    const bool must_fail = g.chance(25) && arguments.lie(g);
    return {octavo_int8_matmul(&a, &b, &out, nullptr), must_fail};
}

Outcome dequantize(Generator& g) {
    const std::int64_t m = g.extent();
    const std::int64_t k = g.extent();
    const auto rotation = g.one_of(std::array{0, 16, 64, 256});
    auto codes = g.matrix(octavo_dtype_i8, m, octavo_rotated_size(k, rotation), false);
    const std::int64_t groups = g.chance(50) ? 1 : m;
    auto scale = g.vector(octavo_dtype_f32, groups, false);
    auto zeropoint = g.vector(octavo_dtype_f32, groups, false);
    auto out = g.matrix(g.floats(), m, k, true);
    const Arguments arguments{{&codes, &out}, {&scale}};
    const bool must_fail = g.chance(25) && arguments.lie(g);
    const octavo_vector* const given = g.chance(50) ? &zeropoint : nullptr;
    if (rotation == 0) return {octavo_dequantize(&codes, &scale, given, &out, nullptr), must_fail};
    return {octavo_dequantize_rotated(&codes, &scale, given, rotation, &out, nullptr), must_fail};
}

Outcome pack(Generator& g) {
    const std::int64_t n = g.extent();
    const std::int64_t k = g.extent();
    auto codes = g.matrix(octavo_dtype_i8, n, k, false);
    const auto back = g.matrix(octavo_dtype_i8, n, k, true);
    const std::int64_t size = octavo_packed_size(n, k);
    octavo_vector packed{g.memory(size, octavo_dtype_i8), octavo_dtype_i8, {0, 0}, size, 1};
    const Arguments arguments{{&codes}, {&packed}};
    const bool must_fail = g.chance(25) && arguments.lie(g);
    const octavo_status status = octavo_pack(&codes, &packed, nullptr);
    return {status == octavo_status_ok ? octavo_unpack(&packed, &back, nullptr) : status, must_fail};
}

// The forward product or the backward one.
Outcome linear(Generator& g, bool backward) {
    const std::int64_t m = g.extent();
    const std::int64_t n = g.extent();
    const std::int64_t k = g.extent();
    octavo_weight_view weight{};
    weight.scheme = static_cast<octavo_scheme>(g.number(0, 2));
    weight.granularity = static_cast<octavo_granularity>(g.number(0, 3));
    weight.rotation = g.one_of(std::array{0, 0, 16, 64, 256});
    weight.k = k;
    const std::int64_t width = octavo_rotated_size(k, weight.rotation);
    const std::int64_t groups = weight.granularity == octavo_granularity_vector ? n : 1;
    weight.codes = g.matrix(octavo_dtype_i8, n, width, false);
    weight.scale = g.vector(octavo_dtype_f32, groups, false);
    weight.code_sums = g.vector(octavo_dtype_i32, n, true);
    const auto zeropoint = g.vector(octavo_dtype_f32, groups, false);
    if (weight.scheme == octavo_scheme_zeropoint) weight.zeropoint = &zeropoint;
    octavo_sum_codes(&weight.codes, &weight.code_sums, nullptr);
    if (g.chance(50)) {
        const std::int64_t size = octavo_packed_size(n, width);
        const octavo_vector packed{g.memory(size, octavo_dtype_i8), octavo_dtype_i8, {0, 0}, size, 1};
        octavo_pack(&weight.codes, &packed, nullptr);
        weight.codes.data = packed.data;
        weight.codes.row_stride = g.number(-9, 9);
        weight.codes.col_stride = g.number(-9, 9);
        weight.layout = octavo_layout_packed;
    }
    const std::int64_t kept = g.number(0, std::min<std::int64_t>(k, 8) + 1);
    const auto columns = g.columns(kept, k);
    const auto values = g.matrix(g.floats(), n, kept, false);
    if (g.chance(50)) {
        weight.outlier_columns = &columns;
        weight.outlier_weight = &values;
    }
    auto bias = g.vector(g.floats(), n, false);
    auto in = g.matrix(g.floats(), m, backward ? n : k, false);
    auto out = g.matrix(g.floats(), m, backward ? k : n, true);
    const Arguments arguments{{&in, &out}, {&weight.scale, &weight.code_sums, &bias}};
    const bool must_fail = g.chance(25) && arguments.lie(g);
    octavo_linear_options options = OCTAVO_LINEAR_OPTIONS_DEFAULT;
    options.threshold = g.one_of(std::array{6.0F, 0.0F, 3.0F, std::numeric_limits<float>::infinity()});
    options.outliers = static_cast<octavo_outliers>(g.number(0, 4));
    options.path = static_cast<octavo_path>(g.number(0, 3));
    options.relative = g.chance(70) ? 0.0F : static_cast<float>(g.number(1, 9));
    if (backward) return {octavo_linear_backward(&in, &weight, &out, &options, nullptr), false};
    if (g.chance(70)) return {octavo_linear(&in, &weight, &bias, &out, &options, nullptr), must_fail};
    // One that lies may have no work.
    std::array<octavo_matrix, 5> outs{};
    std::array<octavo_linear_layer, 5> layers{};
    const std::int64_t count = g.number(0, std::ssize(layers) + 1);
    for (std::size_t i = 0; std::cmp_less(i, count); ++i) {
        outs.at(i) = i == 0 ? out : g.matrix(g.floats(), m, g.chance(95) ? n : n + 1, true);
        layers.at(i) = {&weight, g.chance(50) ? &bias : nullptr, &outs.at(i)};
    }
    layers.at(0).bias = &bias;
    return {octavo_linear_many(&in, layers.data(), count, &options, nullptr), must_fail && count > 0};
}

Outcome call(Generator& g) {
    if (g.chance(5)) octavo_set_num_threads(static_cast<std::int32_t>(g.number(1, 5)));
    switch (g.number(0, 9)) {
        case 0: return quantize(g);
        case 1: return find_outliers(g);
        case 2: return int8_matmul(g);
        case 3: return dequantize(g);
        case 4: return pack(g);
        case 5: return linear(g, true);
        default: return linear(g, false);
    }
}

// Whether a call ended as it had to; if not, that is printed.
bool is_right(const Outcome& outcome, const std::string& input) {
    const bool known = outcome.status >= 0 && outcome.status <= octavo_status_device;
    if (known && (!outcome.must_fail || outcome.status != octavo_status_ok)) return true;
    std::printf("%s: status %d, %s: %s\n", input.c_str(), outcome.status,
                outcome.must_fail ? "to be refused" : "to be done", octavo_last_error());
    return false;
}

}  // namespace

#ifdef OCTAVO_FUZZER
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    Generator generator(std::span(data, size));
    if (!is_right(call(generator), "this input")) std::abort();
    return 0;
}
#else
int main(int argc, const char* const* argv) {
    const auto end =
        std::chrono::steady_clock::now() + std::chrono::seconds(argc > 1 ? std::strtol(argv[1], nullptr, 10) : 2);
    std::uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
    std::array<std::int64_t, 6> statuses{};
    std::int64_t calls = 0;
    do {
        Generator generator(seed);
        const Outcome outcome = call(generator);
        if (!is_right(outcome, "seed " + std::to_string(seed))) return 1;
        ++statuses.at(static_cast<std::size_t>(outcome.status));
        ++calls;
        ++seed;
    } while (std::chrono::steady_clock::now() < end);
    std::printf("%lld calls: %lld done, %lld refused\n", static_cast<long long>(calls),
                static_cast<long long>(statuses[0]), static_cast<long long>(calls - statuses[0]));
    // Else the generator makes nothing that is worth a call.
    return calls < 100 || statuses[0] > calls / 3 ? 0 : 1;
}
#endif
