// The operations of the CUDA backend and the stages they are made of. All enqueue work on `stream` of the current
// device and return at once, unless they say otherwise. Arguments have been checked (cpp/src/<stem>.cpp).
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <span>

#include "division.hpp"
#include "memory.hpp"
#include "octavo/linear.hpp"
#include "octavo/options.hpp"
#include "octavo/quantize.hpp"
#include "octavo/types.hpp"

namespace octavo::cuda {

// --- ahead.cuh ------------------------------------------------------------------------------------------------------

// What a launch before the product asks memory for: of the chunks of W, which lie row by row, every `every`-th from
// `first` on.
struct Ahead {
    const std::int8_t* codes = nullptr;  // null: nothing
    std::int64_t row_stride = 0;
    std::int32_t row_bytes = 0;
    std::uint32_t chunks_of_row = 1;
    std::uint32_t first = 0;
    std::uint32_t every = 1;
    std::uint32_t count = 0;
};

// --- outlier.cu -----------------------------------------------------------------------------------------------------

// Which columns of X are set apart: bit j % 32 of word j / 32. Blocks of rows are marked apart from each other, without
// atomics, so a column is marked where any part has its bit; those of an ascending list are, too.
struct ColumnMarks {
    std::uint32_t* words = nullptr;  // [parts, words_for(k)]
    std::int64_t parts = 0;
    const std::int32_t* listed = nullptr;  // null: none
    std::int64_t listed_size = 0;
    std::int64_t listed_stride = 1;
    std::int64_t columns = 0;  // those of the list from here on, k, and below 0 are ignored
};
__host__ __device__ constexpr std::int64_t words_for(std::int64_t k) { return (k + 31) / 32; }

// Columns in ascending order, and how many, both known to the device only.
struct ColumnList {
    std::int32_t* columns = nullptr;  // [k]
    std::int32_t* count = nullptr;    // [1]
};

// The parts in which `mark_outliers` marks the columns of `x`.
std::int64_t mark_parts(const ConstMatrix& x);

// Mark the columns that hold an x with not (|x| < threshold)   (paper section 3.2). Writes all words.
void mark_outliers(ConstMatrix x, float threshold, ColumnMarks marks, const Ahead& ahead, cudaStream_t stream);

// Mark the columns of a list, in one part. Numbers outside 0 to k - 1 are ignored.
void mark_listed(ConstVector columns, std::int64_t k, ColumnMarks marks, cudaStream_t stream);

void find_outliers(ConstMatrix x, const LinearOptions& options, Vector columns, Vector count, cudaStream_t stream);

// The architecture that the kernels which the current device runs were compiled for, as `compiled_for` in them: older
// than the device's where its code was made of PTX. Throws Error (device) where there is none for the device.
int architecture_of_code();

// --- criterion.cu ---------------------------------------------------------------------------------------------------

// A place in the order of magnitudes (criterion.cuh), from which on elements are outliers.
using Limit = unsigned long long;

// Which elements of a row are outliers under the policy `rows`.
struct ElementCriterion {
    float threshold = 0.0F;         // those with not (|x| < threshold),
    const Limit* limits = nullptr;  // or, where not null, from the row's limit on
};

// Whether the criterion is more than a threshold.
inline bool needs_limits(const LinearOptions& options) { return options.relative > 0.0F || options.cap < 1.0; }

// The parts in which `apply_criterion` marks the columns of a matrix of `rows` rows.
std::int64_t criterion_parts(std::int64_t rows, bool per_row);

// Mark the outlier columns. `maxima` [k] is scratch. With `limits` [m] not null every row is a call of its own: they
// receive the rows' limits, and all their columns are marked.
void apply_criterion(ConstMatrix x, const LinearOptions& options, ColumnMarks marks, std::uint32_t* maxima,
                     Limit* limits, const Ahead& ahead, cudaStream_t stream);

// --- column_ranges.cu -----------------------------------------------------------------------------------------------

// The range of some values. Both numbers are largest patterns, 0 where there are no values.
//   absmax      high: the largest magnitude, in the dtype of x; low unused
//   zeropoint   high: the greatest value, low: the least one, as ordered patterns of float32 (ranges.cuh)
struct Range {
    std::uint32_t high = 0;
    std::uint32_t low = 0;
};

// The parts of the rows in which `find_column_ranges` marks columns and finds their ranges.
std::int64_t range_parts(const ConstMatrix& x);

// Mark the columns that hold an outlier, and find the range of each column in each part of the rows, into `ranges`
// [marks.parts, k]; where `per_element` that of its elements with |x| < threshold.
void find_column_ranges(ConstMatrix x, Scheme scheme, bool per_element, float threshold, ColumnMarks marks,
                        Range* ranges, const Ahead& ahead, cudaStream_t stream);

// --- quantize.cu ----------------------------------------------------------------------------------------------------

// The first outlier columns of X and of W side by side, for the product that follows (outlier_columns.cuh), and what
// else is made ready for it.
inline constexpr std::int64_t most_panel_width = 256;
inline constexpr std::int64_t panel_multiple = 16;
struct Panels {
    const WeightView* weight = nullptr;      // W
    float* x = nullptr;                      // [m, width], the same for all layers of a call
    float* w = nullptr;                      // [n, width]
    std::int64_t width = 0;                  // a multiple of panel_multiple, at most most_panel_width
    std::int32_t* excluded_codes = nullptr;  // [n], or null: sums of the codes of all outlier columns
    // Where not null: instead of `x`, X's own 16 bits, [m, width], the same for all such layers. Of W kept columns are
    // then read where they are, in the same dtype, and others as codes.
    std::uint16_t* x_bits = nullptr;
    std::int32_t* places = nullptr;  // [width]: which of the kept columns each is, or -1; null: none is
    // The codes of all columns, one column after the other, [width, n]; null where all are kept. Where `pickers` > 0
    // and there are no more than `most_picked` columns, it is not written but by the product, of which each row of
    // tiles takes them as they pass: [pickers, most_picked, n].
    std::int8_t* codes = nullptr;
    std::int64_t pickers = 0;

    [[nodiscard]] std::int64_t code_count(std::int64_t n) const { return std::max(width, pickers * most_picked) * n; }
};

// Layers that one quantization of X can make ready for.
inline constexpr int most_layers = 4;

// What takes no part in the quantization of X, and has code 0.
struct Exclusion {
    ColumnMarks marks{};       // these columns; under `per_element` only listed, not excluded
    bool per_element = false;  // instead, in each row its own elements
    ElementCriterion elements{};
    ColumnList list{};               // where not null: receives the marked columns
    const Range* ranges = nullptr;   // where not null: what `find_column_ranges` made of X, for granularity `tensor`
    std::span<const Panels> panels;  // of layers, at most `most_layers`: are written, with the list
    unsigned* tickets = nullptr;     // where not null: receives zeros
    std::int64_t ticket_count = 0;
    Ahead ahead{};  // is asked for meanwhile
};

// octavo::quantize with what is excluded on the device. Rows of codes have `width` >= rotated_size(k) columns, of which
// those from there on are zeroed. `code_sums` (i32 [m], or absent) receives the sum of each row's codes. One launch.
void quantize_rows(ConstMatrix x, const QuantizeOptions& options, const Exclusion& exclusion, Matrix codes,
                   std::int64_t width, Vector scale, Vector zeropoint, Vector code_sums, cudaStream_t stream);

void quantize(ConstMatrix x, const QuantizeOptions& options, ConstVector exclude, Matrix codes, Vector scale,
              Vector zeropoint, cudaStream_t stream);

// Waits for the device, to report a weight that is not finite, and cannot be captured, unless `again` says so.
void quantize_weight(ConstMatrix weight, const QuantizeOptions& options, Matrix codes, Vector scale, Vector zeropoint,
                     Vector code_sums, const Requantization& again, cudaStream_t stream);

void sum_codes(ConstMatrix codes, Vector code_sums, cudaStream_t stream);

// --- rotate.cu ------------------------------------------------------------------------------------------------------

// `x` times `factor`, rotated, to `out` [m, rotated_size(k, rotation)].
void rotate(ConstMatrix x, std::int32_t rotation, float factor, float* out, cudaStream_t stream);

// --- dequantize.cu --------------------------------------------------------------------------------------------------

void dequantize(ConstMatrix codes, ConstVector scale, ConstVector zeropoint, std::int32_t rotation, Matrix out,
                cudaStream_t stream);

// --- gemm.cpp -------------------------------------------------------------------------------------------------------

// A depth up to which the sum of products of int8 numbers, -128 included, fits int32, and a multiple of what every int8
// product wants of its depth.
inline constexpr std::int64_t part_depth = 131056;
constexpr std::int64_t product_parts(std::int64_t k) { return k == 0 ? 1 : (k + part_depth - 1) / part_depth; }

// Whether a product may enqueue copies of operands that are not aligned, where that is faster.
enum class Copies : std::uint8_t { none, where_they_pay };

// acc[p, i, j] = sum over the p-th `part_depth` columns of a[i, k] * b[j, k], exact.
//
// cuBLASLt where it takes the operands as they are, else the product of gemm_mma.cu, which is one kernel, and a memset
// before it where blocks share the depth.
//   a, b  [m, k], [n, k] i8, any strides
//   acc   [product_parts(k), m, n], contiguous
void multiply(ConstMatrix a, ConstMatrix b, std::int32_t* acc, Copies copies, cudaStream_t stream);

// Waits for the device where k > part_depth, to report a sum that does not fit int32.
void int8_matmul(ConstMatrix a, ConstMatrix b, Matrix out, cudaStream_t stream);

// --- linear_mma.cu --------------------------------------------------------------------------------------------------

// X as codes: what `quantize_rows` made.
struct CodedX {
    ConstMatrix codes;                   // [m, width], rows aligned to 16 bytes
    const float* scale = nullptr;        // [groups]
    const float* zeropoint = nullptr;    // [groups]; null for absmax
    const std::int32_t* sums = nullptr;  // [m]: of the codes of a row; null for absmax
    std::int64_t groups = 0;             // m, or 1 for `tensor`
};

// The product and everything after it (paper Eq. 8) in one launch.
inline constexpr int first_fused_architecture = 80;
class FusedLinear {
public:
    FusedLinear(std::int64_t m, const WeightView& weight, const LinearOptions& options);

    // Whether outlier columns can be multiplied in X's own 16 bits: those of W are kept in the same dtype, side by
    // side, or codes times one scale for a feature, where the number of features is a multiple of four.
    static bool takes_bits(const ConstMatrix& x, const WeightView& weight, const LinearOptions& options);
    // How many rows of tiles pick codes; 0: none does.
    [[nodiscard]] std::int64_t pickers() const { return pickers_; }
    [[nodiscard]] std::int64_t panel_width() const { return panel_width_; }
    [[nodiscard]] bool wants_excluded_codes() const { return wants_excluded_codes_; }
    // Where blocks share the depth of a tile: their sums, and a ticket for each tile, which must be zero.
    [[nodiscard]] std::int64_t partial_sums() const { return partial_sums_; }
    [[nodiscard]] std::int64_t tickets() const { return tickets_; }

    // `exclusion` is that of the quantization, `panels` and `tickets` are the layer's own.
    void start(const CodedX& coded, ConstMatrix x, const LinearLayer& layer, const Exclusion& exclusion,
               const Panels& panels, unsigned* tickets, std::int32_t* partial, cudaStream_t stream) const;

private:
    Division division_;
    std::int64_t panel_width_ = 0;
    std::int64_t partial_sums_ = 0;
    std::int64_t tickets_ = 0;
    std::int64_t pickers_ = 0;
    bool wants_excluded_codes_ = false;
    bool in_pairs_ = false;
    bool in_order_ = false;
    bool is_exact_ = false;
};

// --- linear_wgmma.cu ------------------------------------------------------------------------------------------------

// Whether the products of warpgroups, which devices of this architecture can have, are right on the current one: of
// small matrices, all of whose sums are compared. Waits for the device.
inline constexpr int wgmma_architecture = 90;
Wgmma try_wgmma();

// --- epilogue.cu ----------------------------------------------------------------------------------------------------

// Everything after the product (paper Eq. 8), in one launch, before sm_80. `outliers.count` null: none.
// Under `per_element` only a row's own outliers of the listed columns are, by `elements`.
void finish_linear(const std::int32_t* acc, const CodedX& coded, ConstMatrix x, const WeightView& weight,
                   ConstVector bias, const ColumnList& outliers, bool per_element, const ElementCriterion& elements,
                   Matrix out, cudaStream_t stream);

// --- weight_only.cu -------------------------------------------------------------------------------------------------

// y[i, j] = scale_x * scale_w[j] * sum_k x[i, k] * (q[j, k] + zeropoint[j]) + bias[j], any m, n, k and strides. `x` is
// rotated already where the weight is. `scale_x` is a power of two.
void weight_only_linear(ConstMatrix x, float scale_x, const WeightView& weight, ConstVector bias, Matrix out,
                        cudaStream_t stream);

// Whether that multiplies by matrix instructions.
bool weight_only_uses_mma(const ConstMatrix& x, const WeightView& weight);

// --- linear_backward.cu ---------------------------------------------------------------------------------------------

// `int8`: how the gradient is quantized for the int8 product; null: not at all.
void linear_backward(ConstMatrix grad, const WeightView& weight, Matrix out, bool uses_kept, const LinearOptions* int8,
                     cudaStream_t stream);

// --- linear.cpp -----------------------------------------------------------------------------------------------------

// All layers quantize X in the same way.
void linear(ConstMatrix x, std::span<const LinearLayer> layers, const LinearOptions& options, cudaStream_t stream);

}  // namespace octavo::cuda
