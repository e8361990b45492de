#include "octavo/quantize.hpp"

#include <string>

#include "backend.hpp"
#include "check.hpp"

namespace octavo {
namespace {

// codes, scale and zeropoint for `source` quantized in `groups` groups.
void check_outputs(const char* function, const ConstMatrix& source, const QuantizeOptions& options, std::int64_t groups,
                   const Matrix& codes, const Vector& scale, const Vector& zeropoint,
                   Layout layout = Layout::row_major) {
    const Scheme scheme = options.scheme;
    check::rotation({function, "rotation"}, options.rotation);
    check::has_layout({function, "codes"}, codes, layout);
    check::is_dtype({function, "codes"}, check::memory_of(codes, layout), DType::i8);
    check::has_shape({function, "codes"}, codes, source.rows, rotated_size(source.cols, options.rotation));
    check::on_device({function, "codes"}, codes.device, source.device);
    check::is_dtype({function, "scale"}, scale, DType::f32);
    check::has_size({function, "scale"}, scale.size, groups);
    check::on_device({function, "scale"}, scale.device, source.device);
    check::is_present({function, "zeropoint"}, zeropoint.present, scheme == Scheme::zeropoint,
                      scheme == Scheme::zeropoint ? "for scheme zeropoint" : "for scheme absmax");
    if (!zeropoint.present) return;
    check::is_dtype({function, "zeropoint"}, zeropoint, DType::f32);
    check::has_size({function, "zeropoint"}, zeropoint.size, groups);
    check::on_device({function, "zeropoint"}, zeropoint.device, source.device);
}

}  // namespace

void quantize(ConstMatrix x, const QuantizeOptions& options, ConstVector exclude, Matrix codes, Vector scale,
              Vector zeropoint, Stream stream) {
    constexpr auto function = "quantize";
    check::is_float({function, "x"}, x);
    if (options.granularity == Granularity::vector) {
        check::fail(ErrorKind::value, {function, "granularity"}, "'tensor' or 'row'", "'vector'");
    }
    if (exclude.present) {
        check::is_dtype({function, "exclude"}, exclude, DType::i32);
        check::on_device({function, "exclude"}, exclude.device, x.device);
    }
    const std::int64_t groups = options.granularity == Granularity::tensor ? 1 : x.rows;
    check_outputs(function, x, options, groups, codes, scale, zeropoint);
    check::are_apart(function, {{"codes", codes}, {"scale", scale}, {"zeropoint", zeropoint}},
                     {{"x", x}, {"exclude", exclude}});
    backend_for(x.device, function).quantize(x, options, exclude, codes, scale, zeropoint, stream);
}

void quantize_weight(ConstMatrix weight, const QuantizeOptions& options, Matrix codes, Vector scale, Vector zeropoint,
                     Vector code_sums, Stream stream, Layout layout, const Requantization& again) {
    constexpr auto function = "quantize_weight";
    if (again.seed && (options.scheme != Scheme::absmax || options.rotation != 0)) {
        check::fail(ErrorKind::value, {function, "seed"}, "scheme 'absmax' and rotation 0, which it rounds for",
                    options.scheme == Scheme::absmax ? "rotation " + std::to_string(options.rotation)
                                                     : std::string("'zeropoint'"));
    }
    check::is_float({function, "weight"}, weight);
    check::depth({function, "weight"}, weight.cols);
    const std::int64_t groups = options.granularity == Granularity::vector ? weight.rows : 1;
    check_outputs(function, weight, options, groups, codes, scale, zeropoint, layout);
    check::is_dtype({function, "code_sums"}, code_sums, DType::i32);
    check::has_size({function, "code_sums"}, code_sums.size, weight.rows);
    check::on_device({function, "code_sums"}, code_sums.device, weight.device);
    check::are_apart(function,
                     {{"codes", check::memory_of(codes, layout)},
                      {"scale", scale},
                      {"zeropoint", zeropoint},
                      {"code_sums", code_sums}},
                     {{"weight", weight}});
    backend_for(weight.device, function)
        .quantize_weight(weight, options, codes, scale, zeropoint, code_sums, layout, again, stream);
}

void sum_codes(ConstMatrix codes, Vector code_sums, Stream stream) {
    constexpr auto function = "sum_codes";
    check::is_dtype({function, "codes"}, codes, DType::i8);
    check::depth({function, "codes"}, codes.cols);
    check::is_dtype({function, "code_sums"}, code_sums, DType::i32);
    check::has_size({function, "code_sums"}, code_sums.size, codes.rows);
    check::on_device({function, "code_sums"}, code_sums.device, codes.device);
    check::are_apart(function, {{"code_sums", code_sums}}, {{"codes", codes}});
    backend_for(codes.device, function).sum_codes(codes, code_sums, stream);
}

}  // namespace octavo
