// LLM.int8() on the GPU (paper Figure 2). The host enqueues three launches at most and never waits:
//
//   1. mark the outlier columns of X (one scale for all of X: and find the ranges of the columns). None for `static`
//      and `none`
//   2. quantize the rest of X, row by row or, with one scale for all of X, after its blocks have met; list the marked
//      columns, and write them and their weights side by side
//   3. int8 product, scales, outlier columns times 16-bit weights, bias
//
// The launches before the product ask memory for a part of W (ahead.cuh).
//
// Before sm_80 the product is cuBLASLt's, and what follows it a launch of its own. Several layers of one X share the
// first two steps.
//
// Few rows go by the weight-only product instead, one launch or two that are bound by reading the weights;
// selection.hpp says how many.
#include "octavo/linear.hpp"

#include <algorithm>
#include <limits>
#include <span>
#include <vector>

#include "memory.hpp"
#include "operations.hpp"
#include "selection.hpp"

namespace octavo::cuda {
namespace {

// Rows of codes begin at multiples of 16 bytes, which every int8 product can read at once.
constexpr std::int64_t codes_alignment = 16;

// What one layer needs between its kernels, and what is written beside the quantization for it.
struct Plan {
    const LinearLayer& layer;
    FusedLinear fused;
    std::int64_t first_ticket = 0;
    Workspace::Part<float> panel_w{};
    bool in_bits = false;
    Workspace::Part<std::int32_t> places{};
    Workspace::Part<std::int8_t> panel_codes{};
    Workspace::Part<std::int32_t> excluded_codes{};
    Panels panels{};
};

// What launch `index` of `launches` before the product of `m` rows asks for.
Ahead part_ahead(std::int64_t m, const ConstMatrix& codes, std::int64_t index, std::int64_t launches) {
    const double bytes = device_facts().bytes_ahead;
    const std::int64_t row_bytes = codes.cols / codes_alignment * codes_alignment;
    const std::int64_t of_row = whole(row_bytes, ahead_chunk);
    const std::int64_t chunks = codes.rows * of_row;
    const bool aligned = codes.col_stride == 1 && codes.row_stride % codes_alignment == 0 &&
                         reinterpret_cast<std::uintptr_t>(codes.data) % codes_alignment == 0;
    if (m > most_rows_ahead || bytes <= 0.0 || !aligned || chunks == 0 ||
        chunks > std::numeric_limits<std::int32_t>::max()) {
        return {};
    }
    const std::int64_t every = every_ahead(codes.rows, row_bytes, bytes, launches);
    const std::int64_t first = index * (every / launches);
    return {.codes = static_cast<const std::int8_t*>(codes.data),
            .row_stride = codes.row_stride,
            .row_bytes = static_cast<std::int32_t>(row_bytes),
            .chunks_of_row = static_cast<std::uint32_t>(of_row),
            .first = static_cast<std::uint32_t>(first),
            .every = static_cast<std::uint32_t>(every),
            .count = static_cast<std::uint32_t>(whole(std::max<std::int64_t>(chunks - first, 0), every))};
}

// Of at most `most_layers` layers.
void int8_linear(const ConstMatrix& x, std::span<const LinearLayer> layers, const LinearOptions& options,
                 cudaStream_t stream) {
    const WeightView& weight = layers.front().weight;  // which quantizes X as all do
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
    const bool has_ranges = one_scale && finds_outliers && !has_limits && weight.rotation == 0;
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
        const bool is_listed = !finds_outliers;
        marks.parts = has_ranges   ? range_parts(x)
                      : is_listed  ? 0
                      : has_limits ? criterion_parts(m, per_element)
                                   : mark_parts(x);
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
    std::vector<Plan> plans;
    Workspace::Part<float> panel_x;
    Workspace::Part<std::uint16_t> panel_x_bits;
    std::int64_t ticket_count = 0;
    std::int64_t most_sums = 0;  // of one layer: the next comes when it is done
    for (const LinearLayer& layer : layers) {
        const std::int64_t n = layer.out.cols;
        Plan plan{.layer = layer, .fused{m, layer.weight, options}, .first_ticket = ticket_count};
        if (!is_fused) {
            most_sums = std::max(most_sums, product_parts(depth) * m * n);
        } else {
            plan.panels.weight = &layer.weight;
            plan.panels.width = has_outliers ? plan.fused.panel_width() : 0;
            if (plan.panels.width > 0 && FusedLinear::takes_bits(x, layer.weight, options)) {
                plan.in_bits = true;
                if (!panel_x_bits.present) panel_x_bits = workspace.reserve<std::uint16_t>(m * plan.panels.width);
                if (layer.weight.outlier_columns.size > 0) {
                    plan.places = workspace.reserve<std::int32_t>(plan.panels.width);
                }
                if (options.outliers != Outliers::static_) {
                    plan.panels.pickers = plan.fused.pickers();
                    plan.panel_codes = workspace.reserve<std::int8_t>(plan.panels.code_count(n));
                }
            } else if (plan.panels.width > 0) {
                if (!panel_x.present) panel_x = workspace.reserve<float>(m * plan.panels.width);
                plan.panel_w = workspace.reserve<float>(n * plan.panels.width);
            }
            if (has_outliers && plan.fused.wants_excluded_codes()) {
                plan.excluded_codes = workspace.reserve<std::int32_t>(n);
            }
            ticket_count += plan.fused.tickets();
            if (plan.fused.tickets() > 0) most_sums = std::max(most_sums, plan.fused.partial_sums());
        }
        plans.push_back(plan);
    }
    Workspace::Part<unsigned> tickets;
    Workspace::Part<std::int32_t> acc;
    if (ticket_count > 0) tickets = workspace.reserve<unsigned>(ticket_count);
    if (most_sums > 0) acc = workspace.reserve<std::int32_t>(most_sums);
    workspace.allocate();
    std::vector<Panels> panels;
    for (Plan& plan : plans) {
        plan.panels.x = workspace.at(panel_x);
        plan.panels.w = workspace.at(plan.panel_w);
        if (plan.in_bits) plan.panels.x_bits = workspace.at(panel_x_bits);
        plan.panels.places = workspace.at(plan.places);
        plan.panels.codes = workspace.at(plan.panel_codes);
        plan.panels.excluded_codes = workspace.at(plan.excluded_codes);
        if (plan.panels.width > 0 || plan.excluded_codes.present) panels.push_back(plan.panels);
    }

    marks.words = workspace.at(words);
    const ColumnList list{workspace.at(columns), workspace.at(count)};
    const bool finds = finds_outliers && k > 0;
    const auto part_of_launch = [&, launches = finds ? 2 : 1](std::int64_t index) {
        return is_fused ? part_ahead(m, weight.codes, index, launches) : Ahead{};
    };
    if (finds) {
        const Ahead ahead = part_of_launch(0);
        if (has_limits) {
            apply_criterion(x, options, marks, workspace.at(maxima), workspace.at(limits), ahead, stream);
        } else if (has_ranges) {
            find_column_ranges(x, weight.scheme, per_element, options.threshold, marks, workspace.at(ranges), ahead,
                               stream);
        } else {
            mark_outliers(x, options.threshold, marks, ahead, stream);
        }
    }
    const Exclusion exclusion{.marks = marks,
                              .per_element = per_element,
                              .elements = {options.threshold, workspace.at(limits)},
                              .list = list,
                              .ranges = workspace.at(ranges),
                              .panels = panels,
                              .tickets = workspace.at(tickets),
                              .ticket_count = ticket_count,
                              .ahead = part_of_launch(finds ? 1 : 0)};
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
    for (const Plan& plan : plans) {
        const LinearLayer& layer = plan.layer;
        if (is_fused) {
            unsigned* const own = tickets.present ? workspace.at(tickets) + plan.first_ticket : nullptr;
            plan.fused.start(coded, x, layer, exclusion, plan.panels, own, workspace.at(acc), stream);
            continue;
        }
        multiply(x_codes, layer.weight.codes, workspace.at(acc), Copies::none, stream);
        finish_linear(workspace.at(acc), coded, x, layer.weight, layer.bias, list, per_element, exclusion.elements,
                      layer.out, stream);
    }
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
    rotate(x, weight.rotation, 0x1p-8F, workspace.at(rotated), stream);
    weight_only_linear({workspace.at(rotated), DType::f32, x.device, x.rows, width, width, 1}, 0x1p8F, weight, bias,
                       out, stream);
}

}  // namespace

void linear(ConstMatrix x, std::span<const LinearLayer> layers, const LinearOptions& options, cudaStream_t stream) {
    const auto is_weight_only = [&](const LinearLayer& layer) {
        if (options.path != Path::auto_) return options.path == Path::weight_only;
        const bool by_mma = layer.weight.rotation == 0 && weight_only_uses_mma(x, layer.weight);
        return x.rows <= most_weight_only_rows(device_facts().architecture, by_mma, x.cols, layer.out.cols);
    };
    while (!layers.empty()) {
        const std::size_t most = std::min<std::size_t>(layers.size(), most_layers);
        std::size_t count = 0;
        while (count < most && !is_weight_only(layers[count])) ++count;
        if (count > 0) {
            int8_linear(x, layers.first(count), options, stream);
        } else {
            const LinearLayer& layer = layers[count++];
            rotated_weight_only(x, layer.weight, layer.bias, layer.out, stream);
        }
        layers = layers.subspan(count);
    }
}

}  // namespace octavo::cuda
