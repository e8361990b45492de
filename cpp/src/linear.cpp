#include "octavo/linear.hpp"

#include <cmath>
#include <string>

#include "backend.hpp"
#include "check.hpp"
#include "octavo/quantize.hpp"

namespace octavo {

void check_options(const LinearOptions& options, const char* function) {
    check::threshold({function, "threshold"}, options.threshold);
    const bool is_relative = options.relative >= 0.0F && std::isfinite(options.relative);  // false of NaN
    if (!is_relative) {
        check::fail(ErrorKind::value, {function, "relative"}, "a finite number >= 0", std::to_string(options.relative));
    }
    const bool is_part = options.cap >= 0.0 && options.cap <= 1.0;
    if (!is_part) {
        check::fail(ErrorKind::value, {function, "cap"}, "a number from 0 to 1", std::to_string(options.cap));
    }
}

namespace {

// Of a list in CPU memory.
std::int32_t column_at(const ConstVector& columns, std::int64_t index) {
    std::int32_t column = 0;
    __builtin_memcpy(&column, static_cast<const char*>(columns.data) + index * columns.stride * 4, sizeof column);
    return column;
}

}  // namespace

void check_weight(const WeightView& weight, const char* function) {
    const auto& codes = weight.codes;
    const std::int64_t groups = weight.granularity == Granularity::vector ? codes.rows : 1;
    check::has_layout({function, "weight.codes"}, codes, weight.layout);
    check::is_dtype({function, "weight.codes"}, check::memory_of(codes, weight.layout), DType::i8);
    check::depth({function, "weight.codes"}, codes.cols);
    check::rotation({function, "weight.rotation"}, weight.rotation);
    const std::int64_t k = features_of(weight);
    if (k < 0 || codes.cols != rotated_size(k, weight.rotation)) {
        check::fail(ErrorKind::value, {function, "weight.codes"},
                    std::to_string(rotated_size(k, weight.rotation)) + " columns for k = " + std::to_string(k) +
                        " and rotation " + std::to_string(weight.rotation),
                    check::shape_of(codes));
    }
    check::is_dtype({function, "weight.scale"}, weight.scale, DType::f32);
    check::has_size({function, "weight.scale"}, weight.scale.size, groups);
    check::on_device({function, "weight.scale"}, weight.scale.device, codes.device);
    const bool zeropoint = weight.scheme == Scheme::zeropoint;
    check::is_present({function, "weight.zeropoint"}, weight.zeropoint.present, zeropoint,
                      zeropoint ? "for scheme zeropoint" : "for scheme absmax");
    if (zeropoint) {
        check::is_dtype({function, "weight.zeropoint"}, weight.zeropoint, DType::f32);
        check::has_size({function, "weight.zeropoint"}, weight.zeropoint.size, groups);
        check::on_device({function, "weight.zeropoint"}, weight.zeropoint.device, codes.device);
    }
    check::is_dtype({function, "weight.code_sums"}, weight.code_sums, DType::i32);
    check::has_size({function, "weight.code_sums"}, weight.code_sums.size, codes.rows);
    check::on_device({function, "weight.code_sums"}, weight.code_sums.device, codes.device);
    const auto& columns = weight.outlier_columns;
    if (!columns.present) return;
    check::is_dtype({function, "weight.outlier_columns"}, columns, DType::i32);
    check::on_device({function, "weight.outlier_columns"}, columns.device, codes.device);
    check::is_float({function, "weight.outlier_weight"}, weight.outlier_weight);
    check::has_shape({function, "weight.outlier_weight"}, weight.outlier_weight, codes.rows, columns.size);
    check::on_device({function, "weight.outlier_weight"}, weight.outlier_weight.device, codes.device);
    if (codes.device.kind != DeviceKind::cpu) return;  // the values can be read here on the CPU only
    std::int32_t previous = -1;
    for (std::int64_t i = 0; i < columns.size; ++i) {
        const std::int32_t column = column_at(columns, i);
        if (column <= previous || column >= k) {
            check::fail(ErrorKind::value, {function, "weight.outlier_columns"},
                        "ascending columns of the weight, 0 to " + std::to_string(k - 1),
                        std::to_string(column) + " after " + std::to_string(previous));
        }
        previous = column;
    }
}

namespace {

// That `out` shares no memory with what is read.
void are_apart(const char* function, const Matrix& out, const check::Memory& in, const WeightView& weight,
               const ConstVector& bias) {
    check::are_apart(function, {{"out", out}},
                     {in,
                      {"weight.codes", check::memory_of(weight.codes, weight.layout)},
                      {"weight.scale", weight.scale},
                      {"weight.zeropoint", weight.zeropoint},
                      {"weight.code_sums", weight.code_sums},
                      {"weight.outlier_columns", weight.outlier_columns},
                      {"weight.outlier_weight", weight.outlier_weight},
                      {"bias", bias}});
}

// What `linear` and `linear_backward` ask of the weight and of their matrices. `extent`: what `in_features` is called.
void check_matrices(const char* function, const check::Memory& in, const std::string& extent, std::int64_t in_features,
                    const WeightView& weight, const Matrix& out, std::int64_t out_features, const ConstVector& bias) {
    check::is_float({function, in.name}, in.view);
    check_weight(weight, function);
    if (in.view.cols != in_features) {
        check::fail(ErrorKind::value, {function, in.name},
                    extent + " = " + std::to_string(in_features) + " columns for a weight of shape [" +
                        std::to_string(weight.codes.rows) + ", " + std::to_string(features_of(weight)) + "]",
                    check::shape_of(in.view));
    }
    check::on_device({function, "weight.codes"}, weight.codes.device, in.view.device);
    if (bias.present) {
        check::is_float({function, "bias"}, bias);
        check::has_size({function, "bias"}, bias.size, weight.codes.rows);
        check::on_device({function, "bias"}, bias.device, in.view.device);
    }
    check::is_float({function, "out"}, out);
    check::has_shape({function, "out"}, out, in.view.rows, out_features);
    check::on_device({function, "out"}, out.device, in.view.device);
    are_apart(function, out, in, weight, bias);
}

void check_layer(const char* function, const ConstMatrix& x, const LinearLayer& layer, const LinearOptions& options) {
    const WeightView& weight = layer.weight;
    check_matrices(function, {"x", x}, "k", features_of(weight), weight, layer.out, weight.codes.rows, layer.bias);
    check_options(options, function);
    if (options.outliers == Outliers::static_ && options.path != Path::weight_only && !weight.outlier_columns.present) {
        check::fail(ErrorKind::value, {function, "outliers"}, "a weight with calibrated outlier_columns for 'static'",
                    "a weight without");
    }
    if (layer.activation != Activation::none && x.device.kind != DeviceKind::cpu) {
        check::fail(ErrorKind::value, {function, "activation"}, "none on a device", "gelu");
    }
}

// Whether two lists name the same columns, as far as that can be seen here.
bool are_same(const ConstVector& a, const ConstVector& b) {
    if (a.size != b.size) return false;
    if (a.data == b.data && a.stride == b.stride) return true;
    if (a.device.kind != DeviceKind::cpu) return false;
    for (std::int64_t i = 0; i < a.size; ++i) {
        if (column_at(a, i) != column_at(b, i)) return false;
    }
    return true;
}

// Whether the codes of X for one layer are those for the other.
bool quantize_alike(const LinearLayer& a, const LinearLayer& b, const LinearOptions& options) {
    const bool by_tensor = a.weight.granularity == Granularity::tensor;
    return a.weight.scheme == b.weight.scheme && a.weight.rotation == b.weight.rotation &&
           by_tensor == (b.weight.granularity == Granularity::tensor) &&
           (options.outliers != Outliers::static_ || are_same(a.weight.outlier_columns, b.weight.outlier_columns));
}

}  // namespace

void linear(ConstMatrix x, const WeightView& weight, ConstVector bias, Matrix out, const LinearOptions& options,
            Stream stream) {
    constexpr auto function = "linear";
    const LinearLayer layer{.weight = weight, .bias = bias, .out = out};
    check_layer(function, x, layer, options);
    const Backend& backend = backend_for(x.device, function);
    if (out.rows == 0 || out.cols == 0) return;
    backend.linear(x, {&layer, 1}, options, stream);
}

void linear_many(ConstMatrix x, std::span<const LinearLayer> layers, const LinearOptions& options, Stream stream) {
    check::is_float({"linear_many", "x"}, x);
    for (std::size_t i = 0; i < layers.size(); ++i) {
        const std::string function = "linear_many[" + std::to_string(i) + "]";
        check_layer(function.c_str(), x, layers[i], options);
        for (const LinearLayer& other : layers) {
            if (&other == &layers[i]) continue;
            check::are_apart(function.c_str(), {{"out", layers[i].out}}, {{"the out of another layer", other.out}});
            are_apart(function.c_str(), layers[i].out, {"x", x}, other.weight, other.bias);
        }
    }
    const Backend& backend = backend_for(x.device, "linear_many");
    while (!layers.empty() && x.rows > 0) {
        const LinearLayer& first = layers.front();
        std::size_t count = 1;
        const auto has_work = [](const LinearLayer& layer) { return layer.out.cols > 0; };
        while (has_work(first) && count < layers.size() && has_work(layers[count]) &&
               quantize_alike(first, layers[count], options)) {
            ++count;
        }
        if (has_work(first)) backend.linear(x, layers.first(count), options, stream);
        layers = layers.subspan(count);
    }
}

void linear_backward(ConstMatrix grad, const WeightView& weight, Matrix out, const LinearOptions& options,
                     Stream stream) {
    constexpr auto function = "linear_backward";
    check_matrices(function, {"grad", grad}, "n", weight.codes.rows, weight, out, features_of(weight), absent_vector);
    check_options(options, function);
    const Backend& backend = backend_for(grad.device, function);
    if (out.rows == 0 || out.cols == 0) return;
    const bool uses_kept = weight.outlier_columns.present && weight.outlier_columns.size > 0 &&
                           options.outliers != Outliers::none && options.path != Path::weight_only;
    const bool int8 = options.path == Path::int8 && weight.scheme == Scheme::absmax;
    backend.linear_backward(grad, weight, out, uses_kept, int8, stream);
}

}  // namespace octavo
