// The interface that every backend fills: the stems of the public headers, with arguments already validated.
#pragma once

#include <span>

#include "octavo/linear.hpp"
#include "octavo/options.hpp"
#include "octavo/quantize.hpp"
#include "octavo/types.hpp"

namespace octavo {

// How the int8 product of `linear_backward` quantizes a gradient (octavo/linear.hpp).
inline constexpr LinearOptions gradient_options{
    .relative = 6.3F, .cap = 0.02, .outliers = Outliers::rows, .path = Path::int8};

// A backend may assume what cpp/src/<stem>.cpp has checked: dtypes, shapes, devices, ranges of scalars, no overlap of
// `out` with an input, and that there is at least one output element (for `linear` k may still be 0).
class Backend {
public:
    virtual ~Backend() = default;
    virtual void quantize(ConstMatrix x, const QuantizeOptions& options, ConstVector exclude, Matrix codes,
                          Vector scale, Vector zeropoint, Stream stream) const = 0;
    virtual void quantize_weight(ConstMatrix weight, const QuantizeOptions& options, Matrix codes, Vector scale,
                                 Vector zeropoint, Vector code_sums, Layout layout, const Requantization& again,
                                 Stream stream) const = 0;
    virtual void sum_codes(ConstMatrix codes, Vector code_sums, Stream stream) const = 0;
    virtual void pack(ConstMatrix codes, Vector packed, Stream stream) const = 0;
    virtual void unpack(ConstVector packed, Matrix codes, Stream stream) const = 0;
    virtual void find_outliers(ConstMatrix x, const LinearOptions& options, Vector columns, Vector count,
                               Stream stream) const = 0;
    virtual void int8_matmul(ConstMatrix a, ConstMatrix b, Matrix out, Layout b_layout, Stream stream) const = 0;
    virtual void dequantize(ConstMatrix codes, ConstVector scale, ConstVector zeropoint, std::int32_t rotation,
                            Matrix out, Stream stream) const = 0;
    // At least one layer; all quantize X in the same way (`linear_many`).
    virtual void linear(ConstMatrix x, std::span<const LinearLayer> layers, const LinearOptions& options,
                        Stream stream) const = 0;
    // `uses_kept`: whether the weight has kept columns that are to be used. `int8`: whether the product is the int8
    // one; then the scheme is absmax.
    virtual void linear_backward(ConstMatrix grad, const WeightView& weight, Matrix out, bool uses_kept, bool int8,
                                 Stream stream) const = 0;
};

// The backend for memory on `device`. Throws Error (device) where this build has none for it.
const Backend& backend_for(Device device, const char* function);

}  // namespace octavo

namespace octavo::cpu {

// The CPU backend; each stem is defined in cpp/src/cpu/<stem>.cpp. It has no streams: a call returns when its work is
// done.
class Backend final : public octavo::Backend {
public:
    void quantize(ConstMatrix x, const QuantizeOptions& options, ConstVector exclude, Matrix codes, Vector scale,
                  Vector zeropoint, Stream stream) const override;
    void quantize_weight(ConstMatrix weight, const QuantizeOptions& options, Matrix codes, Vector scale,
                         Vector zeropoint, Vector code_sums, Layout layout, const Requantization& again,
                         Stream stream) const override;
    void sum_codes(ConstMatrix codes, Vector code_sums, Stream stream) const override;
    void pack(ConstMatrix codes, Vector packed, Stream stream) const override;
    void unpack(ConstVector packed, Matrix codes, Stream stream) const override;
    void find_outliers(ConstMatrix x, const LinearOptions& options, Vector columns, Vector count,
                       Stream stream) const override;
    void int8_matmul(ConstMatrix a, ConstMatrix b, Matrix out, Layout b_layout, Stream stream) const override;
    void dequantize(ConstMatrix codes, ConstVector scale, ConstVector zeropoint, std::int32_t rotation, Matrix out,
                    Stream stream) const override;
    void linear(ConstMatrix x, std::span<const LinearLayer> layers, const LinearOptions& options,
                Stream stream) const override;
    void linear_backward(ConstMatrix grad, const WeightView& weight, Matrix out, bool uses_kept, bool int8,
                         Stream stream) const override;
};

}  // namespace octavo::cpu
