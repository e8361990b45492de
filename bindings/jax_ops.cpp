// octavo's operations as handlers of XLA's foreign function interface, for octavo.jax. Buffers are contiguous, and
// their memory is XLA's. Python has no part in a call.
#include "bindings/jax_ops.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "bindings/ops.hpp"
#include "bindings/xla_ffi.hpp"
#include "octavo/octavo.hpp"

namespace octavo::python {
namespace {

namespace py = pybind11;

// --- a call ----------------------------------------------------------------------------------------------------------

DType dtype_of(xla::DataType dtype) {
    switch (dtype) {
        case xla::DataType::f32: return DType::f32;
        case xla::DataType::f16: return DType::f16;
        case xla::DataType::bf16: return DType::bf16;
        case xla::DataType::s8: return DType::i8;
        case xla::DataType::s32: return DType::i32;
        case xla::DataType::s64: break;
    }
    throw Error(ErrorKind::type, "octavo.jax: expected float32, float16, bfloat16, int8 or int32, got another dtype");
}

// Its arguments, results and attributes.
class Call {
public:
    Call(const xla::CallFrame& frame, DeviceKind kind) : frame_(frame), device_{kind} {
        if (kind == DeviceKind::cpu) return;
        xla::StreamArguments stream{sizeof stream, nullptr, frame.context, nullptr};
        xla::DeviceArguments device{sizeof device, nullptr, frame.context, 0};
        if (frame.api->get_stream(&stream) != nullptr || frame.api->get_device(&device) != nullptr) {
            throw std::runtime_error("octavo.jax: XLA named no stream");
        }
        stream_.handle = stream.stream;
        device_.index = device.device;
    }

    [[nodiscard]] Stream stream() const { return stream_; }
    [[nodiscard]] bool is_on_cpu() const { return device_.kind == DeviceKind::cpu; }

    [[nodiscard]] std::string_view text(std::string_view name) const {
        const auto& value = *static_cast<const xla::Text*>(attribute(name, xla::AttributeType::text));
        return {value.data, value.size};
    }
    [[nodiscard]] std::int64_t number(std::string_view name) const {
        const auto& value = *static_cast<const xla::Scalar*>(attribute(name, xla::AttributeType::scalar));
        return *static_cast<const std::int64_t*>(value.value);
    }

    // The next argument, and the next result.
    [[nodiscard]] const xla::Buffer& argument() { return next(frame_.arguments, argument_); }
    [[nodiscard]] const xla::Buffer& result() { return next(frame_.results, result_); }

    // All leading dimensions folded into rows.
    [[nodiscard]] Matrix matrix(const xla::Buffer& buffer) const {
        Matrix matrix{.data = buffer.data, .dtype = dtype_of(buffer.dtype), .device = device_, .rows = 1};
        if (buffer.rank == 0) throw Error(ErrorKind::value, "octavo.jax: expected a dimension, got none");
        matrix.cols = matrix.row_stride = buffer.dims[buffer.rank - 1];
        for (std::int64_t i = 0; i + 1 < buffer.rank; ++i) matrix.rows *= buffer.dims[i];
        return matrix;
    }
    [[nodiscard]] Vector vector(const xla::Buffer& buffer) const {
        const Matrix matrix = this->matrix(buffer);
        return {.data = matrix.data, .dtype = matrix.dtype, .device = device_, .size = matrix.rows * matrix.cols};
    }

    // The next arguments as a weight: codes, scale, code_sums, and those of zeropoint, outlier_columns and
    // outlier_weight that `parts`, a word of the attribute `weight`, names.
    [[nodiscard]] WeightView weight(const NativeOptions& options, std::string_view parts) {
        const auto has = [parts](char part) { return parts.find(part) != std::string_view::npos; };
        WeightView weight{.codes = matrix(argument()),
                          .scale = vector(argument()),
                          .code_sums = vector(argument()),
                          .scheme = options.quantize.scheme,
                          .granularity = options.quantize.granularity,
                          .layout = has('p') ? Layout::packed : Layout::row_major,
                          .rotation = options.quantize.rotation,
                          .k = number("in_features")};
        if (has('p')) {
            weight.codes.rows = weight.code_sums.size;
            weight.codes.cols = weight.codes.row_stride = rotated_size(weight.k, weight.rotation);
        }
        if (has('z')) weight.zeropoint = vector(argument());
        if (has('o')) {
            weight.outlier_columns = vector(argument());
            weight.outlier_weight = matrix(argument());
        }
        return weight;
    }

    // Those that the thread's last call had, most of the time.
    [[nodiscard]] const NativeOptions& options() const {
        thread_local std::string last;
        thread_local const NativeOptions* known = nullptr;
        const std::string_view given = text("options");
        if (known == nullptr || last != given) {
            known = &read_options(std::string(given));
            last = given;
        }
        return *known;
    }

private:
    [[nodiscard]] const void* attribute(std::string_view name, xla::AttributeType type) const {
        const xla::Attributes& all = frame_.attributes;
        for (std::int64_t i = 0; i < all.size; ++i) {
            if (std::string_view(all.names[i]->data, all.names[i]->size) == name && all.types[i] == type) {
                return all.values[i];
            }
        }
        throw std::invalid_argument("octavo.jax: expected an attribute " + std::string(name) + ", got none");
    }
    static const xla::Buffer& next(const xla::Values& values, std::int64_t& position) {
        if (position >= values.size) throw std::invalid_argument("octavo.jax: expected more arrays, got too few");
        return *values.buffers[position++];
    }

    const xla::CallFrame& frame_;
    Device device_;
    Stream stream_;
    std::int64_t argument_ = 0;
    std::int64_t result_ = 0;
};

// --- operations ------------------------------------------------------------------------------------------------------

void linear_op(Call& call) {
    const NativeOptions& options = call.options();
    const Matrix x = call.matrix(call.argument());
    const auto next_layer = [&](std::string_view parts) {
        LinearLayer layer{.weight = call.weight(options, parts)};
        if (parts.ends_with('b')) layer.bias = call.vector(call.argument());
        layer.out = call.matrix(call.result());
        return layer;
    };
    std::string_view words = call.text("weight");  // one for each layer
    if (words.find(',') == std::string_view::npos) {
        const LinearLayer layer = next_layer(words);
        return linear(x, layer.weight, layer.bias, layer.out, options.linear, call.stream());
    }
    std::vector<LinearLayer> layers;
    for (std::size_t end = 0; end != std::string_view::npos; words.remove_prefix(std::min(end + 1, words.size()))) {
        end = words.find(',');
        layers.push_back(next_layer(words.substr(0, end)));
    }
    linear_many(x, layers, options.linear, call.stream());
}

void linear_backward_op(Call& call) {
    const NativeOptions& options = call.options();
    const Matrix grad = call.matrix(call.argument());
    const WeightView weight = call.weight(options, call.text("weight"));
    linear_backward(grad, weight, call.matrix(call.result()), options.linear, call.stream());
}

void quantize_weight_op(Call& call) {
    const NativeOptions& options = call.options();
    const Matrix weight = call.matrix(call.argument());
    const Matrix codes = call.matrix(call.result());
    const Vector scale = call.vector(call.result());
    const Vector code_sums = call.vector(call.result());
    const Vector zeropoint =
        options.quantize.scheme == Scheme::zeropoint ? call.vector(call.result()) : Vector(absent_vector);
    if (!call.is_on_cpu()) {
        return quantize_weight(weight, options.quantize, codes, scale, zeropoint, code_sums, call.stream());
    }
    const std::int64_t width = rotated_size(weight.cols, options.quantize.rotation);
    std::vector<std::int8_t> rows(static_cast<std::size_t>(weight.rows * width));
    const Matrix unpacked{rows.data(), DType::i8, weight.device, weight.rows, width, width, 1};
    quantize_weight(weight, options.quantize, unpacked, scale, zeropoint, code_sums);
    pack(unpacked, {.data = codes.data, .dtype = DType::i8, .size = packed_size(weight.rows, width)});
}

void dequantize_op(Call& call) {
    const NativeOptions& options = call.options();
    WeightView weight = call.weight(options, call.text("weight"));
    const Matrix out = call.matrix(call.result());
    std::vector<std::int8_t> rows;
    if (weight.layout == Layout::packed) {
        const auto [data, dtype, device, n, width, row_stride, col_stride] = weight.codes;
        rows.resize(static_cast<std::size_t>(n * width));
        const Matrix unpacked{rows.data(), DType::i8, device, n, width, width, 1};
        unpack({.data = data, .dtype = DType::i8, .size = packed_size(n, width)}, unpacked);
        weight.codes = unpacked;
    }
    dequantize(weight.codes, weight.scale, weight.zeropoint, weight.rotation, out, call.stream());
}

void find_outliers_op(Call& call) {
    const Matrix x = call.matrix(call.argument());
    const Vector columns = call.vector(call.result());
    find_outliers(x, call.options().linear, columns, call.vector(call.result()), call.stream());
}

void int8_matmul_op(Call& call) {
    const Matrix a = call.matrix(call.argument());
    const Matrix b = call.matrix(call.argument());
    int8_matmul(a, b, call.matrix(call.result()), Layout::row_major, call.stream());
}

// --- handlers --------------------------------------------------------------------------------------------------------

xla::Error* error_of(const xla::CallFrame& frame, xla::ErrorCode code, const char* message) {
    xla::ErrorArguments arguments{sizeof arguments, nullptr, message, code};
    return frame.api->create_error(&arguments);
}

template <DeviceKind kind, void (*operation)(Call&)>
xla::Error* handler(xla::CallFrame* frame) {
    if (frame->extensions != nullptr && frame->extensions->type == xla::metadata_extension) {
        xla::Metadata& metadata = *reinterpret_cast<xla::MetadataExtension*>(frame->extensions)->metadata;
        metadata.version = xla::version;
        metadata.traits = operation == quantize_weight_op ? 0 : xla::can_be_captured;  // which waits
        metadata.state_type = 0;
        return nullptr;
    }
    try {
        Call call(*frame, kind);
        operation(call);
        return nullptr;
    } catch (const Error& error) {
        const bool is_argument = error.kind() != ErrorKind::device;
        return error_of(*frame, is_argument ? xla::ErrorCode::invalid_argument : xla::ErrorCode::internal,
                        error.what());
    } catch (const std::exception& error) {
        return error_of(*frame, xla::ErrorCode::internal, error.what());
    }
}

template <DeviceKind kind>
py::dict targets() {
    py::dict result;
    const auto add = [&result](const char* name, xla::Handler* function) {
        result[name] = py::capsule(reinterpret_cast<void*>(function));
    };
    add("octavo_linear", handler<kind, linear_op>);
    add("octavo_linear_backward", handler<kind, linear_backward_op>);
    add("octavo_quantize_weight", handler<kind, quantize_weight_op>);
    add("octavo_dequantize", handler<kind, dequantize_op>);
    add("octavo_find_outliers", handler<kind, find_outliers_op>);
    add("octavo_int8_matmul", handler<kind, int8_matmul_op>);
    return result;
}

}  // namespace

py::dict jax_targets() {
    py::dict result;
    result["cpu"] = targets<DeviceKind::cpu>();
    result["CUDA"] = targets<DeviceKind::cuda>();
    return result;
}

}  // namespace octavo::python
