// The CPU backend: the operations of operations.hpp behind the interface of cpp/src/backend.hpp. There is no stream.
#include "backend.hpp"

#include "cpu/operations.hpp"

namespace octavo {
namespace {

class CpuBackend final : public Backend {
public:
    void quantize(ConstMatrix x, const QuantizeOptions& options, ConstVector exclude, Matrix codes, Vector scale,
                  Vector zeropoint, Stream /*stream*/) const override {
        cpu::quantize(x, options, exclude, codes, scale, zeropoint);
    }
    void quantize_weight(ConstMatrix weight, const QuantizeOptions& options, Matrix codes, Vector scale,
                         Vector zeropoint, Vector code_sums, Stream /*stream*/) const override {
        cpu::quantize_weight(weight, options, codes, scale, zeropoint, code_sums);
    }
    void sum_codes(ConstMatrix codes, Vector code_sums, Stream /*stream*/) const override {
        cpu::sum_codes(codes, code_sums);
    }
    void pack(ConstMatrix codes, Vector packed, Stream /*stream*/) const override {
        cpu::pack(codes, static_cast<std::int8_t*>(packed.data));
    }
    void unpack(ConstVector packed, Matrix codes, Stream /*stream*/) const override {
        cpu::unpack(static_cast<const std::int8_t*>(packed.data), codes);
    }
    void find_outliers(ConstMatrix x, const LinearOptions& options, Vector columns, Vector count,
                       Stream /*stream*/) const override {
        cpu::find_outliers(x, options, columns, count);
    }
    void int8_matmul(ConstMatrix a, ConstMatrix b, Matrix out, Layout b_layout, Stream /*stream*/) const override {
        cpu::int8_matmul(a, b, out, b_layout);
    }
    void dequantize(ConstMatrix codes, ConstVector scale, ConstVector zeropoint, std::int32_t rotation, Matrix out,
                    Stream /*stream*/) const override {
        cpu::dequantize(codes, scale, zeropoint, rotation, out);
    }
    void linear(ConstMatrix x, const WeightView& weight, ConstVector bias, Matrix out, const LinearOptions& options,
                Stream /*stream*/) const override {
        cpu::linear(x, weight, bias, out, options);
    }
};

}  // namespace

const Backend& cpu_backend() {
    static const CpuBackend backend;
    return backend;
}

}  // namespace octavo
