#include "octavo/gemm.hpp"

#include "backend.hpp"
#include "check.hpp"

namespace octavo {

void int8_matmul(ConstMatrix a, ConstMatrix b, Matrix out, Layout b_layout, Stream stream) {
    constexpr auto function = "int8_matmul";
    check::is_dtype({function, "a"}, a, DType::i8);
    check::has_layout({function, "b"}, b, b_layout);
    const ConstMatrix b_memory = check::memory_of(b, b_layout);
    check::is_dtype({function, "b"}, b_memory, DType::i8);
    check::has_shape({function, "b"}, b, b.rows, a.cols);
    check::on_device({function, "b"}, b.device, a.device);
    check::is_dtype({function, "out"}, out, DType::i32);
    check::has_shape({function, "out"}, out, a.rows, b.rows);
    check::on_device({function, "out"}, out.device, a.device);
    check::are_apart(function, {{"out", out}}, {{"a", a}, {"b", b_memory}});
    const Backend& backend = backend_for(a.device, function);
    if (out.rows == 0 || out.cols == 0) return;
    backend.int8_matmul(a, b, out, b_layout, stream);
}

}  // namespace octavo
