#include "octavo/dequantize.hpp"

#include "backend.hpp"
#include "check.hpp"
#include "octavo/quantize.hpp"

namespace octavo {

void dequantize(ConstMatrix codes, ConstVector scale, ConstVector zeropoint, std::int32_t rotation, Matrix out,
                Stream stream) {
    constexpr auto function = "dequantize";
    check::is_dtype({function, "codes"}, codes, DType::i8);
    check::is_dtype({function, "scale"}, scale, DType::f32);
    if (scale.size != 1) check::has_size({function, "scale"}, scale.size, codes.rows);
    check::on_device({function, "scale"}, scale.device, codes.device);
    if (zeropoint.present) {
        check::is_dtype({function, "zeropoint"}, zeropoint, DType::f32);
        check::has_size({function, "zeropoint"}, zeropoint.size, scale.size);
        check::on_device({function, "zeropoint"}, zeropoint.device, codes.device);
    }
    check::is_float({function, "out"}, out);
    check::rotation({function, "rotation"}, rotation);
    if (rotation == 0 || rotated_size(out.cols, rotation) != codes.cols) {
        check::has_shape({function, "out"}, out, codes.rows, codes.cols);
    }
    check::has_shape({function, "out"}, out, codes.rows, out.cols);
    check::on_device({function, "out"}, out.device, codes.device);
    check::are_apart(function, {{"out", out}}, {{"codes", codes}, {"scale", scale}, {"zeropoint", zeropoint}});
    const Backend& backend = backend_for(codes.device, function);
    if (out.rows == 0 || out.cols == 0) return;
    backend.dequantize(codes, scale, zeropoint, rotation, out, stream);
}

}  // namespace octavo
