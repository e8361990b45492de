// LLM.int8() on the GPU (paper Figure 2). The host enqueues three launches and never waits:
//
//   1. mark the outlier columns of X (one scale for all of X: and find the ranges of the columns). None for `static`
//   and
//      `none`; a criterion that is relative or capped takes one launch more, for the largest magnitudes of the columns
//   2. quantize the rest of X row by row; list the marked columns, and write them and their weights side by side.
//      Rotation takes two launches more, one scale for all of X without outlier columns one
//   3. int8 product, scales, outlier columns times 16-bit weights, bias
//
// Before sm_80 the product is cuBLASLt's, and what follows it a launch of its own.
//
// Few rows go by the weight-only product instead, one launch that is bound by reading the weights; selection.hpp says
// how many.
#include "octavo/linear.hpp"

#include "memory.hpp"
#include "operations.hpp"
#include "selection.hpp"

namespace octavo::cuda {
namespace {

// Rows of codes begin at multiples of 16 bytes, which every int8 product can read at once.
constexpr std::int64_t codes_alignment = 16;

void int8_linear(const ConstMatrix& x, const WeightView& weight, const ConstVector& bias, const Matrix& out,
                 const LinearOptions& options, cudaStream_t stream) {
    const std::int64_t m = x.rows;
    const std::int64_t k = x.cols;
    const std::int64_t depth = weight.codes.cols;
    const std::int64_t width = (depth + codes_alignment - 1) / codes_alignment * codes_alignment;
    const bool has_zeropoint = weight.scheme == Scheme::zeropoint;
    const bool finds_outliers = options.outliers == Outliers::columns || options.outliers == Outliers::rows;
    const bool has_outliers = options.outliers != Outliers::none && k > 0;
    const QuantizeOptions quantize_options{
        .scheme = weight.scheme,
        .granularity = weight.granularity == Granularity::tensor ? Granularity::tensor : Granularity::row,
        .rotation = weight.rotation};
    const bool one_scale = quantize_options.granularity == Granularity::tensor;
    const bool per_element = options.outliers == Outliers::rows;
    const bool has_limits = finds_outliers && needs_limits(options);
    // The ranges of columns are of no use where the columns are not known by a threshold, or are rotated.
    const bool has_ranges = one_scale && !has_limits && weight.rotation == 0;
    const std::int64_t groups = one_scale ? 1 : m;

    Workspace workspace(stream);
    const auto codes = workspace.reserve<std::int8_t>(m * width);
    const auto scale = workspace.reserve<float>(groups);
    Workspace::Part<float> zeropoint;
    Workspace::Part<std::int32_t> sums;
    if (has_zeropoint) {
        zeropoint = workspace.reserve<float>(groups);
        sums = workspace.reserve<std::int32_t>(m);
    }
    ColumnMarks marks;
    Workspace::Part<std::uint32_t> words;
    Workspace::Part<std::int32_t> columns;
    Workspace::Part<std::int32_t> count;
    Workspace::Part<Range> ranges;
    Workspace::Part<Limit> limits;
    Workspace::Part<std::uint32_t> maxima;
    if (has_outliers) {
        const bool is_listed = !finds_outliers && !has_ranges;
        marks.parts = has_ranges ? range_parts(x) : is_listed ? 0 : has_limits ? 1 : mark_parts(x);
        if (is_listed) {
            marks.listed = static_cast<const std::int32_t*>(weight.outlier_columns.data);
            marks.listed_size = weight.outlier_columns.size;
            marks.listed_stride = weight.outlier_columns.stride;
            marks.columns = k;
        }
        if (has_ranges) ranges = workspace.reserve<Range>(marks.parts * k);
        if (has_limits && per_element) limits = workspace.reserve<Limit>(m);
        if (has_limits && !per_element) maxima = workspace.reserve<std::uint32_t>(k);
        words = workspace.reserve<std::uint32_t>(marks.parts * words_for(k));
        columns = workspace.reserve<std::int32_t>(k);
        count = workspace.reserve<std::int32_t>(1);
    }
    const bool is_fused = device_facts().architecture >= first_fused_architecture;
    const FusedLinear fused(m, weight, options);
    Workspace::Part<float> panel_x;
    Workspace::Part<float> panel_w;
    Workspace::Part<std::int32_t> excluded_codes;
    Workspace::Part<unsigned> tickets;
    Workspace::Part<std::int32_t> acc;
    if (is_fused) {
        if (has_outliers && fused.panel_width() > 0) {
            panel_x = workspace.reserve<float>(m * fused.panel_width());
            panel_w = workspace.reserve<float>(out.cols * fused.panel_width());
        }
        if (has_outliers && fused.wants_excluded_codes()) excluded_codes = workspace.reserve<std::int32_t>(out.cols);
        if (fused.tickets() > 0) tickets = workspace.reserve<unsigned>(fused.tickets());
        if (fused.tickets() > 0) acc = workspace.reserve<std::int32_t>(fused.partial_sums());
    } else {
        acc = workspace.reserve<std::int32_t>(product_parts(depth) * m * out.cols);
    }
    workspace.allocate();

    marks.words = workspace.at(words);
    const ColumnList list{workspace.at(columns), workspace.at(count)};
    if (has_outliers) {
        if (has_limits) {
            apply_criterion(x, options, marks.words, workspace.at(maxima), workspace.at(limits), stream);
        } else if (has_ranges) {
            find_column_ranges(x, weight.scheme, options.outliers, options.threshold, weight.outlier_columns, marks,
                               workspace.at(ranges), stream);
        } else if (finds_outliers) {
            mark_outliers(x, options.threshold, marks, stream);
        }
    }
    const Exclusion exclusion{.marks = marks,
                              .per_element = per_element,
                              .elements = {options.threshold, workspace.at(limits)},
                              .list = list,
                              .ranges = workspace.at(ranges),
                              .weight = panel_x.present || excluded_codes.present ? &weight : nullptr,
                              .panels = {.x = workspace.at(panel_x),
                                         .w = workspace.at(panel_w),
                                         .width = panel_x.present ? fused.panel_width() : 0,
                                         .excluded_codes = workspace.at(excluded_codes)},
                              .tickets = workspace.at(tickets),
                              .ticket_count = tickets.present ? fused.tickets() : 0};
    const Matrix x_codes{workspace.at(codes), DType::i8, x.device, m, depth, width, 1};
    quantize_rows(
        x, quantize_options, exclusion, x_codes, width,
        {.data = workspace.at(scale), .dtype = DType::f32, .device = x.device, .size = groups},
        {.data = workspace.at(zeropoint),
         .dtype = DType::f32,
         .device = x.device,
         .size = groups,
         .present = has_zeropoint},
        {.data = workspace.at(sums), .dtype = DType::i32, .device = x.device, .size = m, .present = has_zeropoint},
        stream);
    const CodedX coded{x_codes, workspace.at(scale), workspace.at(zeropoint), workspace.at(sums), groups};
    if (is_fused) return fused.start(coded, x, weight, bias, exclusion, workspace.at(acc), out, stream);
    multiply(x_codes, weight.codes, workspace.at(acc), Copies::none, stream);
    finish_linear(workspace.at(acc), coded, x, weight, bias, list, per_element, exclusion.elements, out, stream);
}

// `weight_only_linear` of an x that is rotated first where the weight is; times 2^-8 meanwhile, as a rotated number can
// be larger than a float32, and the sums that make it, up to 256 numbers, too.
void rotated_weight_only(const ConstMatrix& x, const WeightView& weight, const ConstVector& bias, const Matrix& out,
                         cudaStream_t stream) {
    if (weight.rotation == 0) return weight_only_linear(x, 1.0F, weight, bias, out, stream);
    const std::int64_t width = weight.codes.cols;
    Workspace workspace(stream);
    const auto rotated = workspace.reserve<float>(x.rows * width);
    workspace.allocate();
    rotate(x, weight.rotation, {}, 0x1p-8F, workspace.at(rotated), stream);
    weight_only_linear({workspace.at(rotated), DType::f32, x.device, x.rows, width, width, 1}, 0x1p8F, weight, bias,
                       out, stream);
}

}  // namespace

void linear(ConstMatrix x, const WeightView& weight, ConstVector bias, Matrix out, const LinearOptions& options,
            cudaStream_t stream) {
    const auto few_rows = [&] {
        const bool by_mma = weight.rotation == 0 && weight_only_uses_mma(x, weight);
        return x.rows <= most_weight_only_rows(device_facts().architecture, by_mma, x.cols, out.cols);
    };
    if (options.path == Path::weight_only || (options.path == Path::auto_ && few_rows()))
        return rotated_weight_only(x, weight, bias, out, stream);
    int8_linear(x, weight, bias, out, options, stream);
}

}  // namespace octavo::cuda
