// What a weight is quantized with and what a linear layer is run with. Each option is one field of one of the two
// structs.
#pragma once

#include <cstdint>

namespace [[gnu::visibility("default")]] octavo {

// How values map to codes (paper Eq. 1 and Eq. 2-5).
enum class Scheme : std::uint8_t {
    absmax,     // x ~ code * scale, scale = absmax / 127
    zeropoint,  // x ~ (code + zeropoint) * scale, scale = (max - min) / 254
};

// What shares one scale. It names the product: tensor-wise (one scale for X, one for W), row-wise (one per row of X,
// one for W), vector-wise (one per row of X and one per output feature, i.e. row, of W).
enum class Granularity : std::uint8_t { tensor, row, vector };

// Which elements of X go through the 16-bit product.
enum class Outliers : std::uint8_t {
    columns,  // columns of X holding a magnitude >= threshold (or NaN, Inf) anywhere in this call: the paper's rule
    rows,     // each row's own such elements: with Path::int8 a row's result does not depend on the other rows
    static_,  // the calibrated columns kept with the weight: independent of the data of the call, likewise
    none,     // no decomposition
};

// Which product to use. `auto_` is `int8` on the CPU; on CUDA devices `weight_only` for few rows, else `int8`.
enum class Path : std::uint8_t {
    auto_,
    int8,         // LLM.int8(): quantize X, int8 product, 16-bit outliers; and so for gradients (`linear_backward`)
    weight_only,  // int8 weights, activations left as they are (W8A16); on CUDA devices how its sums are rounded
                  // depends on the number of rows
};

// How a matrix is quantized. A weight keeps it (WeightView): X is quantized in the same way.
struct QuantizeOptions {
    Scheme scheme = Scheme::absmax;
    Granularity granularity = Granularity::vector;
    std::int32_t rotation = 0;  // 0, or the features of a block: 16, 64 or 256 (octavo/quantize.hpp)
};

// How `linear` runs.
struct LinearOptions {
    float threshold = 6.0F;  // magnitude from which `columns` and `rows` call an element of X an outlier; >= 0
    float relative = 0.0F;   // > 0: instead of `threshold`, times the median (octavo/outlier.hpp); 0: absolute
    double cap = 1.0;        // the most outlier columns, or elements of a row, as a part of k; 0 to 1
    Outliers outliers = Outliers::columns;
    Path path = Path::auto_;

    friend bool operator==(const LinearOptions&, const LinearOptions&) = default;
};

// Throws Error (value) naming the option that is out of its range. `function` is the name to use in the message.
void check_options(const LinearOptions& options, const char* function);

}  // namespace octavo
