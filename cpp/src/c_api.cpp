// The C ABI: octavo.h in terms of the C++ functions. It checks what C's types leave open (NULL, unknown enum values)
// and turns exceptions into status codes.
#include <cstdint>
#include <cstdio>
#include <exception>
#include <new>
#include <string>
#include <string_view>
#include <vector>

#include "check.hpp"
#include "cuda.hpp"
#include "octavo/octavo.h"
#include "octavo/octavo.hpp"

namespace octavo {
namespace {

#define OCTAVO_TEXT(number) #number
#define OCTAVO_JOINED(major, minor, patch) OCTAVO_TEXT(major) "." OCTAVO_TEXT(minor) "." OCTAVO_TEXT(patch)
static_assert(std::string_view(OCTAVO_VERSION) ==
                  OCTAVO_JOINED(OCTAVO_VERSION_MAJOR, OCTAVO_VERSION_MINOR, OCTAVO_VERSION_PATCH),
              "octavo.h and CMakeLists.txt tell different versions");

using check::Argument;

// Of fixed size, so that a message can be kept when there is no memory left.
thread_local char last_error[1024];

octavo_status failed(octavo_status status, const char* message) noexcept {
    // Longer messages lose their end.
    static_cast<void>(std::snprintf(last_error, sizeof last_error, "%s", message));
    return status;
}

octavo_status status_of(ErrorKind kind) noexcept {
    switch (kind) {
        case ErrorKind::type: return octavo_status_type;
        case ErrorKind::value: return octavo_status_value;
        case ErrorKind::device: return octavo_status_device;
    }
    return octavo_status_internal;
}

template <class Body>
octavo_status report(Body body) noexcept {
    last_error[0] = '\0';
    try {
        body();
        return octavo_status_ok;
    } catch (const Error& error) {
        return failed(status_of(error.kind()), error.what());
    } catch (const std::bad_alloc&) {
        return failed(octavo_status_memory, "octavo: not enough memory");
    } catch (const std::exception& error) {
        return failed(octavo_status_internal, error.what());
    } catch (...) {
        return failed(octavo_status_internal, "octavo: unknown exception");
    }
}

[[noreturn]] void unknown_value(const Argument& argument, const char* type, std::int32_t value) {
    check::fail(ErrorKind::value, argument, std::string("a value of ") + type, std::to_string(value));
}

DType dtype_of(const Argument& argument, octavo_dtype value) {
    switch (value) {
        case octavo_dtype_f32: return DType::f32;
        case octavo_dtype_f16: return DType::f16;
        case octavo_dtype_bf16: return DType::bf16;
        case octavo_dtype_i8: return DType::i8;
        case octavo_dtype_i32: return DType::i32;
        default: unknown_value(argument, "octavo_dtype", value);
    }
}

Device device_of(const Argument& argument, octavo_device value) {
    switch (value.kind) {
        case octavo_device_cpu: return {DeviceKind::cpu, value.index};
        case octavo_device_cuda: return {DeviceKind::cuda, value.index};
        default: unknown_value(argument, "octavo_device_kind", value.kind);
    }
}

Scheme scheme_of(const Argument& argument, octavo_scheme value) {
    switch (value) {
        case octavo_scheme_absmax: return Scheme::absmax;
        case octavo_scheme_zeropoint: return Scheme::zeropoint;
        default: unknown_value(argument, "octavo_scheme", value);
    }
}

Granularity granularity_of(const Argument& argument, octavo_granularity value) {
    switch (value) {
        case octavo_granularity_tensor: return Granularity::tensor;
        case octavo_granularity_row: return Granularity::row;
        case octavo_granularity_vector: return Granularity::vector;
        default: unknown_value(argument, "octavo_granularity", value);
    }
}

Layout layout_of(const Argument& argument, octavo_layout value) {
    switch (value) {
        case octavo_layout_row_major: return Layout::row_major;
        case octavo_layout_packed: return Layout::packed;
        default: unknown_value(argument, "octavo_layout", value);
    }
}

Outliers outliers_of(const Argument& argument, octavo_outliers value) {
    switch (value) {
        case octavo_outliers_columns: return Outliers::columns;
        case octavo_outliers_rows: return Outliers::rows;
        case octavo_outliers_static: return Outliers::static_;
        case octavo_outliers_none: return Outliers::none;
        default: unknown_value(argument, "octavo_outliers", value);
    }
}

Path path_of(const Argument& argument, octavo_path value) {
    switch (value) {
        case octavo_path_auto: return Path::auto_;
        case octavo_path_int8: return Path::int8;
        case octavo_path_weight_only: return Path::weight_only;
        default: unknown_value(argument, "octavo_path", value);
    }
}

template <class T>
const T& not_null(const Argument& argument, const T* pointer) {
    if (pointer == nullptr) check::fail(ErrorKind::value, argument, "a pointer", "NULL");
    return *pointer;
}

Matrix matrix_of(const Argument& argument, const octavo_matrix* pointer) {
    const octavo_matrix& view = not_null(argument, pointer);
    return {view.data,
            dtype_of(argument, view.dtype),
            device_of(argument, view.device),
            view.rows,
            view.cols,
            view.row_stride,
            view.col_stride};
}

Vector vector_of(const Argument& argument, const octavo_vector* pointer) {
    const octavo_vector& view = not_null(argument, pointer);
    return {view.data, dtype_of(argument, view.dtype), device_of(argument, view.device), view.size, view.stride, true};
}

Vector optional_vector_of(const Argument& argument, const octavo_vector* pointer) {
    return pointer == nullptr ? absent_vector : vector_of(argument, pointer);
}

WeightView weight_of(const char* function, const octavo_weight_view* pointer) {
    const octavo_weight_view& view = not_null({function, "weight"}, pointer);
    WeightView weight;
    weight.codes = matrix_of({function, "weight.codes"}, &view.codes);
    weight.scale = vector_of({function, "weight.scale"}, &view.scale);
    weight.zeropoint = optional_vector_of({function, "weight.zeropoint"}, view.zeropoint);
    weight.code_sums = vector_of({function, "weight.code_sums"}, &view.code_sums);
    weight.outlier_columns = optional_vector_of({function, "weight.outlier_columns"}, view.outlier_columns);
    if (weight.outlier_columns.present) {
        weight.outlier_weight = matrix_of({function, "weight.outlier_weight"}, view.outlier_weight);
    }
    weight.scheme = scheme_of({function, "weight.scheme"}, view.scheme);
    weight.granularity = granularity_of({function, "weight.granularity"}, view.granularity);
    weight.layout = layout_of({function, "weight.layout"}, view.layout);
    weight.rotation = view.rotation;
    weight.k = view.k;
    return weight;
}

LinearOptions options_of(const char* function, const octavo_linear_options* pointer) {
    if (pointer == nullptr) return {};
    LinearOptions options;
    options.threshold = pointer->threshold;
    options.relative = pointer->relative;
    if (pointer->cap != 0.0) options.cap = pointer->cap;
    options.outliers = outliers_of({function, "outliers"}, pointer->outliers);
    options.path = path_of({function, "path"}, pointer->path);
    return options;
}

QuantizeOptions options_of(const char* function, const octavo_quantize_options* pointer) {
    const octavo_quantize_options& options = not_null({function, "options"}, pointer);
    return {scheme_of({function, "scheme"}, options.scheme),
            granularity_of({function, "granularity"}, options.granularity), options.rotation};
}

}  // namespace
}  // namespace octavo

using namespace octavo;  // NOLINT(google-build-using-namespace): this file is made of nothing else

const char* octavo_last_error(void) { return last_error; }

octavo_status octavo_quantize(const octavo_matrix* x, octavo_scheme scheme, octavo_granularity granularity,
                              const octavo_vector* exclude, const octavo_matrix* codes, const octavo_vector* scale,
                              const octavo_vector* zeropoint, void* stream) {
    const octavo_quantize_options options = {scheme, granularity, 0};
    return octavo_quantize_with(x, &options, exclude, codes, scale, zeropoint, stream);
}

octavo_status octavo_quantize_with(const octavo_matrix* x, const octavo_quantize_options* options,
                                   const octavo_vector* exclude, const octavo_matrix* codes, const octavo_vector* scale,
                                   const octavo_vector* zeropoint, void* stream) {
    return report([&] {
        constexpr auto function = "quantize";
        quantize(matrix_of({function, "x"}, x), options_of(function, options),
                 optional_vector_of({function, "exclude"}, exclude), matrix_of({function, "codes"}, codes),
                 vector_of({function, "scale"}, scale), optional_vector_of({function, "zeropoint"}, zeropoint),
                 {stream});
    });
}

octavo_status octavo_quantize_weight(const octavo_matrix* weight, octavo_scheme scheme, octavo_granularity granularity,
                                     const octavo_matrix* codes, const octavo_vector* scale,
                                     const octavo_vector* zeropoint, const octavo_vector* code_sums, void* stream) {
    const octavo_quantize_options options = {scheme, granularity, 0};
    return octavo_quantize_weight_with(weight, &options, codes, scale, zeropoint, code_sums, stream);
}

octavo_status octavo_quantize_weight_with(const octavo_matrix* weight, const octavo_quantize_options* options,
                                          const octavo_matrix* codes, const octavo_vector* scale,
                                          const octavo_vector* zeropoint, const octavo_vector* code_sums,
                                          void* stream) {
    return report([&] {
        constexpr auto function = "quantize_weight";
        quantize_weight(matrix_of({function, "weight"}, weight), options_of(function, options),
                        matrix_of({function, "codes"}, codes), vector_of({function, "scale"}, scale),
                        optional_vector_of({function, "zeropoint"}, zeropoint),
                        vector_of({function, "code_sums"}, code_sums), {stream});
    });
}

octavo_status octavo_sum_codes(const octavo_matrix* codes, const octavo_vector* code_sums, void* stream) {
    return report([&] {
        constexpr auto function = "sum_codes";
        sum_codes(matrix_of({function, "codes"}, codes), vector_of({function, "code_sums"}, code_sums), {stream});
    });
}

int64_t octavo_packed_size(int64_t n, int64_t k) { return packed_size(n, k); }

int64_t octavo_rotated_size(int64_t k, int32_t rotation) { return rotated_size(k, rotation); }

octavo_status octavo_pack(const octavo_matrix* codes, const octavo_vector* packed, void* stream) {
    return report([&] {
        constexpr auto function = "pack";
        pack(matrix_of({function, "codes"}, codes), vector_of({function, "packed"}, packed), {stream});
    });
}

octavo_status octavo_unpack(const octavo_vector* packed, const octavo_matrix* codes, void* stream) {
    return report([&] {
        constexpr auto function = "unpack";
        unpack(vector_of({function, "packed"}, packed), matrix_of({function, "codes"}, codes), {stream});
    });
}

octavo_status octavo_find_outliers(const octavo_matrix* x, float threshold, const octavo_vector* columns,
                                   const octavo_vector* count, void* stream) {
    octavo_linear_options options = OCTAVO_LINEAR_OPTIONS_DEFAULT;
    options.threshold = threshold;
    return octavo_find_outliers_with(x, &options, columns, count, stream);
}

octavo_status octavo_find_outliers_with(const octavo_matrix* x, const octavo_linear_options* options,
                                        const octavo_vector* columns, const octavo_vector* count, void* stream) {
    return report([&] {
        constexpr auto function = "find_outliers";
        find_outliers(matrix_of({function, "x"}, x), options_of(function, options),
                      vector_of({function, "columns"}, columns), vector_of({function, "count"}, count), {stream});
    });
}

octavo_status octavo_int8_matmul(const octavo_matrix* a, const octavo_matrix* b, const octavo_matrix* out,
                                 void* stream) {
    return report([&] {
        constexpr auto function = "int8_matmul";
        int8_matmul(matrix_of({function, "a"}, a), matrix_of({function, "b"}, b), matrix_of({function, "out"}, out),
                    Layout::row_major, {stream});
    });
}

octavo_status octavo_dequantize(const octavo_matrix* codes, const octavo_vector* scale, const octavo_vector* zeropoint,
                                const octavo_matrix* out, void* stream) {
    return octavo_dequantize_rotated(codes, scale, zeropoint, 0, out, stream);
}

octavo_status octavo_dequantize_rotated(const octavo_matrix* codes, const octavo_vector* scale,
                                        const octavo_vector* zeropoint, int32_t rotation, const octavo_matrix* out,
                                        void* stream) {
    return report([&] {
        constexpr auto function = "dequantize";
        dequantize(matrix_of({function, "codes"}, codes), vector_of({function, "scale"}, scale),
                   optional_vector_of({function, "zeropoint"}, zeropoint), rotation, matrix_of({function, "out"}, out),
                   {stream});
    });
}

octavo_status octavo_linear(const octavo_matrix* x, const octavo_weight_view* weight, const octavo_vector* bias,
                            const octavo_matrix* out, const octavo_linear_options* options, void* stream) {
    return report([&] {
        constexpr auto function = "linear";
        linear(matrix_of({function, "x"}, x), weight_of(function, weight), optional_vector_of({function, "bias"}, bias),
               matrix_of({function, "out"}, out), options_of(function, options), {stream});
    });
}

octavo_status octavo_linear_many(const octavo_matrix* x, const octavo_linear_layer* layers, int64_t count,
                                 const octavo_linear_options* options, void* stream) {
    return report([&] {
        constexpr auto function = "linear_many";
        if (count < 0) check::fail(ErrorKind::value, {function, "count"}, "a count >= 0", std::to_string(count));
        if (count > 0) not_null({function, "layers"}, layers);
        std::vector<LinearLayer> many;
        for (std::int64_t i = 0; i < count; ++i) {
            const std::string name = function + ("[" + std::to_string(i) + "]");
            const auto& [weight, bias, out] = layers[i];
            many.push_back({weight_of(name.c_str(), weight), optional_vector_of({name.c_str(), "bias"}, bias),
                            matrix_of({name.c_str(), "out"}, out)});
        }
        linear_many(matrix_of({function, "x"}, x), many, options_of(function, options), {stream});
    });
}

octavo_status octavo_linear_backward(const octavo_matrix* grad, const octavo_weight_view* weight,
                                     const octavo_matrix* out, const octavo_linear_options* options, void* stream) {
    return report([&] {
        constexpr auto function = "linear_backward";
        linear_backward(matrix_of({function, "grad"}, grad), weight_of(function, weight),
                        matrix_of({function, "out"}, out), options_of(function, options), {stream});
    });
}

const char* octavo_version(void) { return version(); }

std::int32_t octavo_abi_version(void) { return OCTAVO_ABI_VERSION; }

std::int32_t octavo_num_threads(void) { return num_threads(); }

octavo_status octavo_set_num_threads(std::int32_t count) {
    return report([&] { set_num_threads(count); });
}

octavo_status octavo_set_cuda_scratch(octavo_scratch_allocate allocate, octavo_scratch_release release, void* context) {
    return report([&] {
        if ((allocate == nullptr) != (release == nullptr)) {
            throw Error(ErrorKind::value, std::string("set_cuda_scratch: ") +
                                              (allocate == nullptr ? "allocate" : "release") +
                                              ": expected a function where the other is one, got NULL");
        }
        static thread_local Scratch scratch;
        scratch = {allocate, release, context};
        use_scratch(allocate != nullptr ? &scratch : nullptr);
    });
}

octavo_status octavo_cpu_isa(const char** isa) {
    return report([&] {
        not_null({"cpu_isa", "isa"}, isa);
        *isa = cpu_isa();
    });
}
