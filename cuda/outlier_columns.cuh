// The outlier columns of X, and the weights that they meet (octavo/linear.hpp): elements of float32, and panels of
// them.
//
// A panel holds the first `width` outlier columns side by side, for every row of X and every row of W, with zeros up to
// a multiple of 16. It is written once, beside the quantization of X, so that the product reads it as it reads codes.
// Where W's kept columns are of X's own 16 bits, there is none of W: the product reads these where they are, and of
// other columns the codes, a column after the other; and where there are few rows of tiles, not even they are gathered,
// each of which is 32 bytes away from the next: the product, which reads all of W, keeps them.
#pragma once

#include <algorithm>
#include <cstdint>

#include "criterion.cuh"
#include "device.cuh"
#include "marks.cuh"
#include "operations.hpp"
#include "rotation.cuh"

namespace octavo::cuda {

struct OutlierColumns {
    FloatView x;
    bool per_element = false;
    ElementCriterion elements;
    View<const std::int8_t> codes{};
    Span<const float> scale;
    Span<const float> zeropoint;
    Span<const std::int32_t> kept_columns;
    FloatView kept_weight;  // [n, r]
    int rotation = 0;

    // Whether an element of a listed column takes part.
    __device__ bool takes_part(float value, std::int64_t i, std::int32_t column) const {
        return !per_element || is_outlier(value, column, limit_of_row(elements, i));
    }
    __device__ float of_x(std::int64_t i, std::int32_t column) const {
        const float value = x(i, column);
        return takes_part(value, i, column) ? value : 0.0F;
    }

    // The place of a column among the kept ones, which ascend; -1 where it is not kept.
    __device__ int place_of(std::int32_t column) const {
        const std::int64_t place = lower_bound(kept_columns.data, kept_columns.size, kept_columns.stride, column);
        return place < kept_columns.size && kept_columns[place] == column ? static_cast<int>(place) : -1;
    }
    __device__ float dequantized(std::int64_t j, std::int32_t column) const {
        const float shift = zeropoint.present() ? zeropoint.of_group(j) : 0.0F;
        const float value = rotation != 0 ? rotated_back(codes, j, column, rotation, shift)
                                          : static_cast<float>(*codes.at(j, column)) + shift;
        return value * scale.of_group(j);
    }
    __device__ float of_w(std::int64_t j, std::int32_t column) const {
        const int place = place_of(column);
        return place >= 0 ? kept_weight(j, place) : dequantized(j, column);
    }
};

inline OutlierColumns outlier_columns_of(const ConstMatrix& x, const WeightView& weight, bool per_element,
                                         const ElementCriterion& elements) {
    return {.x = float_view_of(x),
            .per_element = per_element,
            .elements = elements,
            .codes = view_of<std::int8_t>(weight.codes),
            .scale = span_of<float>(weight.scale),
            .zeropoint = span_of<float>(weight.zeropoint),
            .kept_columns = span_of<std::int32_t>(weight.outlier_columns),
            .kept_weight = float_view_of(weight.outlier_weight),
            .rotation = weight.rotation};
}

// What blocks that write the panels of a layer need: `m` rows of X, of which only the first layer of its kind has any.
struct PanelTask {
    OutlierColumns columns;
    std::int64_t m = 0;
    std::int64_t n = 0;
    Panels panels;
    std::int64_t blocks = 0;
};

// The same for all layers. `blocks` in all: none where no panels are wanted.
struct PanelTasks {
    PanelTask of_layer[most_layers];
    std::int64_t blocks = 0;
};

// Whether there is a product that reads panels, on the architecture that is being compiled for.
inline constexpr bool has_fused_linear = compiled_for == 0 || compiled_for >= first_fused_architecture;

inline constexpr std::int64_t panel_rows = 64;  // of a block, of X and W one after the other

inline PanelTasks panel_tasks(const ConstMatrix& x, const Exclusion& exclusion) {
    PanelTasks tasks;
    PanelTask* next = tasks.of_layer;
    bool has_x[2] = {};  // as float32, and in its own 16 bits
    for (const Panels& panels : exclusion.panels) {
        bool& is_there = has_x[panels.x_bits != nullptr ? 1 : 0];
        const std::int64_t m = is_there ? 0 : x.rows;
        is_there = true;
        const bool has_w = panels.w != nullptr || panels.codes != nullptr || panels.excluded_codes != nullptr;
        const std::int64_t n = has_w ? panels.weight->codes.rows : 0;
        *next = {.columns = outlier_columns_of(x, *panels.weight, exclusion.per_element, exclusion.elements),
                 .m = m,
                 .n = n,
                 .panels = panels,
                 .blocks = std::max<std::int64_t>(blocks_for(m + n, panel_rows), 1)};
        tasks.blocks += next->blocks;
        ++next;
    }
    return tasks;
}

// Those of X's own 16 bits: `rows` rows from the `first_row`-th on, of the first `count` of the `listed` columns.
__device__ inline void write_panels_of_bits(const PanelTask& task, const std::int32_t* listed, int count,
                                            std::int64_t first_row, int rows, bool is_picked) {
    const int threads = static_cast<int>(blockDim.x);
    const int padded = (count + static_cast<int>(panel_multiple) - 1) / static_cast<int>(panel_multiple) *
                       static_cast<int>(panel_multiple);
    const auto rows_of_x = static_cast<int>(task.m - first_row < rows ? task.m - first_row : rows);
    const FloatView& x = task.columns.x;
    if (first_row == 0 && task.panels.places != nullptr) {
        for (int o = static_cast<int>(threadIdx.x); o < padded; o += threads) {
            task.panels.places[o] = o < count ? task.columns.place_of(listed[o]) : -1;
        }
    }
#pragma unroll 1
    for (int e = static_cast<int>(threadIdx.x); e < rows_of_x * padded; e += threads) {
        const std::int64_t row = first_row + e / padded;
        const int o = e % padded;
        task.panels.x_bits[row * task.panels.width + o] =
            o < count ? static_cast<const std::uint16_t*>(x.data)[row * x.row_stride + listed[o] * x.col_stride]
                      : std::uint16_t{0};
    }
    if (is_picked || task.panels.codes == nullptr) return;
    const int before = rows_of_x > 0 ? rows_of_x : 0;
    const int rows_of_w = rows - before;
#pragma unroll 1
    for (int e = static_cast<int>(threadIdx.x); e < rows_of_w * count; e += threads) {
        const std::int64_t j = first_row + before + e % rows_of_w - task.m;
        const int o = e / rows_of_w;
        task.panels.codes[o * task.n + j] = *task.columns.codes.at(j, listed[o]);
    }
}

// Block `block` of those that write panels. All its threads must take part. Static for the reason of `list_marked`.
__device__ static inline void write_panels(const PanelTasks& tasks, const ColumnMarks& marks, std::int64_t k,
                                           std::int64_t block) {
    if constexpr (has_fused_linear) {
        int layer = 0;
        while (block >= tasks.of_layer[layer].blocks) block -= tasks.of_layer[layer++].blocks;
        const PanelTask& task = tasks.of_layer[layer];
        __shared__ std::int32_t listed[most_panel_width];
        __shared__ std::int32_t total;
        const std::int64_t first_row = block * panel_rows;
        const std::int64_t rest = task.m + task.n - first_row;
        const int rows = static_cast<int>(rest < panel_rows ? rest : panel_rows);
        const int thread = static_cast<int>(threadIdx.x);
        const int threads = static_cast<int>(blockDim.x);
        const int width = static_cast<int>(task.panels.width);
        for (std::int32_t first = 0;; first += most_panel_width) {
            list_marked(marks, k, {listed, most_panel_width, 1}, {&total, 1, 1}, first);
            __syncthreads();
            const int count = total - first < most_panel_width ? total - first : most_panel_width;
            if (first == 0 && task.panels.x_bits != nullptr) {
                write_panels_of_bits(task, listed, count < width ? count : width, first_row, rows,
                                     task.panels.pickers > 0 && total <= most_picked);
            } else if (first == 0) {
                const int padded = (count + panel_multiple - 1) / panel_multiple * panel_multiple;
                const int columns = padded < width ? padded : width;
#pragma unroll 1  // registers are few where this is beside other work
                for (int e = thread; e < rows * columns; e += threads) {
                    const std::int64_t row = first_row + e / columns;
                    const int o = e % columns;
                    const bool is_x = row < task.m;
                    float value = 0.0F;
                    if (o < count)
                        value = is_x ? task.columns.of_x(row, listed[o]) : task.columns.of_w(row - task.m, listed[o]);
                    (is_x ? task.panels.x + row * width : task.panels.w + (row - task.m) * width)[o] = value;
                }
            }
            if (task.panels.excluded_codes == nullptr) return;
            for (int r = thread; r < rows; r += threads) {
                const std::int64_t j = first_row + r - task.m;
                if (j < 0) continue;
                std::int32_t sum = first == 0 ? 0 : task.panels.excluded_codes[j];
#pragma unroll 1
                for (int o = 0; o < count; ++o) sum += *task.columns.codes.at(j, listed[o]);
                task.panels.excluded_codes[j] = sum;
            }
            if (total - first <= most_panel_width) return;
            __syncthreads();
        }
    }
}

}  // namespace octavo::cuda
