#include "octavo/pack.hpp"

#include "backend.hpp"
#include "check.hpp"

namespace octavo {
namespace {

void check_packed(const char* function, const ConstVector& packed, const ConstMatrix& codes) {
    check::is_dtype({function, "codes"}, codes, DType::i8);
    check::is_dtype({function, "packed"}, packed, DType::i8);
    check::has_layout({function, "codes"}, codes, Layout::packed);
    check::has_size({function, "packed"}, packed.size, packed_size(codes.rows, codes.cols));
    check::on_device({function, "packed"}, packed.device, codes.device);
    if (packed.stride != 1 && packed.size > 1) {
        check::fail(ErrorKind::value, {function, "packed"}, "stride 1", "stride " + std::to_string(packed.stride));
    }
}

}  // namespace

void pack(ConstMatrix codes, Vector packed, Stream stream) {
    constexpr auto function = "pack";
    check_packed(function, packed, codes);
    check::are_apart(function, {{"packed", packed}}, {{"codes", codes}});
    backend_for(codes.device, function).pack(codes, packed, stream);
}

void unpack(ConstVector packed, Matrix codes, Stream stream) {
    constexpr auto function = "unpack";
    check_packed(function, packed, codes);
    check::are_apart(function, {{"codes", codes}}, {{"packed", packed}});
    backend_for(codes.device, function).unpack(packed, codes, stream);
}

}  // namespace octavo
