#include "octavo/outlier.hpp"

#include "backend.hpp"
#include "check.hpp"

namespace octavo {

void find_outliers(ConstMatrix x, const LinearOptions& options, Vector columns, Vector count, Stream stream) {
    constexpr auto function = "find_outliers";
    check::is_float({function, "x"}, x);
    check_options(options, function);
    check::is_dtype({function, "columns"}, columns, DType::i32);
    check::has_size({function, "columns"}, columns.size, x.cols);
    check::on_device({function, "columns"}, columns.device, x.device);
    check::is_dtype({function, "count"}, count, DType::i32);
    check::has_size({function, "count"}, count.size, 1);
    check::on_device({function, "count"}, count.device, x.device);
    check::are_apart(function, {{"columns", columns}, {"count", count}}, {{"x", x}});
    backend_for(x.device, function).find_outliers(x, options, columns, count, stream);
}

}  // namespace octavo
