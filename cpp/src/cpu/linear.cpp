// LLM.int8() on the CPU (paper Figure 2): find the outliers, quantize the rest of X row by row, multiply, and finish
// each tile of the product while it is in the first-level cache.
#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <iterator>
#include <span>
#include <vector>

#include "backend.hpp"
#include "cpu/gemm.hpp"
#include "cpu/outlier.hpp"
#include "cpu/quantize.hpp"
#include "cpu/rows.hpp"
#include "cpu/threads.hpp"

namespace octavo::cpu {
namespace {

// X as codes, in memory of its own.
struct QuantizedX {
    QuantizedX(const ConstMatrix& x, const WeightView& weight, OutlierElements& outliers)
        : codes(plan_for(x.rows), x.rows, weight.codes.cols),
          scales(x.rows),
          zeropoints(weight.scheme == Scheme::zeropoint ? x.rows : 0),
          sums(weight.scheme == Scheme::zeropoint ? x.rows : 0) {
        const QuantizeOptions options{
            .scheme = weight.scheme,
            .granularity = weight.granularity == Granularity::tensor ? Granularity::tensor : Granularity::row,
            .rotation = weight.rotation};
        const std::int64_t count = options.granularity == Granularity::tensor ? 1 : x.rows;
        const bool has_zeropoint = weight.scheme == Scheme::zeropoint;
        if (options.granularity == Granularity::tensor) outliers.find_all();  // rows will be read twice
        const RowTraits traits{
            .excluded = [&](std::int64_t begin) { return outliers.finder(begin); },
            .done = [&](std::int64_t row, const std::int8_t* row_codes) { codes.place(row, row_codes); }};
        const Matrix not_kept{.dtype = DType::i8, .rows = x.rows, .cols = weight.codes.cols};
        quantize_rows(x, options, traits, not_kept, {.data = scales.data(), .size = count},
                      {.data = zeropoints.data(), .size = count, .present = has_zeropoint},
                      {.data = sums.data(), .dtype = DType::i32, .size = x.rows, .present = has_zeropoint});
        outliers.gather();
        std::fill(scales.data() + count, scales.data() + x.rows, scales[0]);
        if (has_zeropoint) std::fill(zeropoints.data() + count, zeropoints.data() + x.rows, zeropoints[0]);
    }

    XPanels codes;
    Scratch<float> scales;       // of each row
    Scratch<float> zeropoints;   // of each row; this and the next only for zeropoint
    Scratch<std::int32_t> sums;  // of each row's codes
};

// What the epilogue needs of the weight for the columns of one block, gathered so that its loops are contiguous.
class BlockWeight {
public:
    // NOLINTNEXTLINE(cppcoreguidelines-pro-type-member-init): only the block's columns of the arrays are used
    BlockWeight(const LinearLayer& layer, const Block& block) : layer_(layer), weight_(layer.weight), block_(block) {
        const ConstVector& bias = layer.bias;
        const std::int64_t cols = block.cols();
        gather_features(weight_.scale, block.col_begin, cols, scale);
        if (weight_.zeropoint.present) {
            gather_features(weight_.zeropoint, block.col_begin, cols, zeropoint);
        } else {
            std::fill(zeropoint, zeropoint + whole_blocks(cols), 0.0F);
        }
        if (weight_.code_sums.stride == 1) {
            __builtin_memcpy(code_sums, at(weight_.code_sums, block.col_begin),
                             static_cast<std::size_t>(cols) * sizeof *code_sums);
        } else {
            for (std::int64_t j = 0; j < cols; ++j) {
                code_sums[j] = get<std::int32_t>(weight_.code_sums, block.col_begin + j);
            }
        }
        std::fill(code_sums + cols, code_sums + whole_blocks(cols), 0);
        if (bias.present) {
            kernels().load(bias.dtype, at(bias, block.col_begin), bias.stride, cols, bias_);
            std::fill(bias_ + cols, bias_ + whole_blocks(cols), 0.0F);
        }
    }

    // Which of the outlier columns are kept.
    // `in_registers`: if none are kept the epilogue may dequantize them.
    void sort_outliers(std::span<const std::int32_t> columns, const PackedPanel& codes, bool in_registers) {
        const auto count = std::ssize(columns);
        if (count == 0) return;
        w_ = &codes;
        if (in_registers && weight_.rotation == 0 && weight_.outlier_columns.size == 0) return;
        outlier_weight_ = Scratch<float>(count * outlier_stride);
        const bool needs_codes = weight_.scheme == Scheme::zeropoint && weight_.rotation == 0;
        if (needs_codes) outlier_codes_ = Scratch<std::int8_t>(count * most_cols);
        const ConstVector& list = weight_.outlier_columns;
        kept_places_.assign(static_cast<std::size_t>(list.size), -1);
        std::int64_t kept = 0;  // both lists ascend
        for (std::int64_t o = 0; o < count; ++o) {
            const std::int32_t column = columns[static_cast<std::size_t>(o)];
            while (kept < list.size && get<std::int32_t>(list, kept) < column) ++kept;
            if (kept < list.size && get<std::int32_t>(list, kept) == column) {
                kept_places_[static_cast<std::size_t>(kept)] = static_cast<std::int32_t>(o);
            } else {
                not_kept_.push_back(column);
                not_kept_places_.push_back(static_cast<std::int32_t>(o));
            }
        }
    }

    // The weights of the outlier columns for columns [first, first + cols) of the block, once sort_outliers has been
    // called. In W they lie apart from each other, so this is done for one tile after the other, when the product has
    // brought them near.
    void gather_outliers(std::span<const std::int32_t> columns, const PackedPanel& codes, std::int64_t first,
                         std::int64_t cols) {
        if (outlier_weight_.data() == nullptr || first == gathered_) return;
        gathered_ = first;
        if (outlier_codes_.data() != nullptr) {
            for (std::size_t o = 0; o < columns.size(); ++o) {
                std::int8_t* const target = outlier_codes_.data() + static_cast<std::int64_t>(o) * most_cols;
                for (std::int64_t j = first; j < first + cols; ++j) target[j] = codes.code(j, columns[o]);
            }
        }
        gather_kept(first, cols);
        if (weight_.rotation != 0) {
            for (std::size_t i = 0; i < not_kept_.size(); ++i) {
                const std::int32_t in_block = not_kept_[i] % weight_.rotation;
                const std::int32_t block_begin = not_kept_[i] - in_block;
                kernels().rotate_back_column(codes.data() + first * codes.depth() + block_begin * block_cols,
                                             codes.stride(), weight_.rotation, in_block, cols, zeropoint + first,
                                             scale + first,
                                             outlier_weight_.data() + not_kept_places_[i] * outlier_stride);
            }
            return;
        }
        kernels().dequantize_columns(codes.data() + first * codes.depth(), codes.stride(), not_kept_.data(),
                                     not_kept_places_.data(), std::ssize(not_kept_), cols,
                                     weight_.zeropoint.present ? zeropoint + first : nullptr, scale + first,
                                     outlier_weight_.data());
    }

    // How many codes of a row take no part in the product. With rotation all do.
    [[nodiscard]] std::int64_t left_out(const OutlierElements::Row& outliers) const {
        return weight_.rotation != 0 ? 0 : outliers.count;
    }

    // sums[i] = the sum of the codes of column first + i of the block, over the inputs that are not outliers of the row
    void sum_codes_outside(const OutlierElements::Row& outliers, std::int64_t first, std::int64_t count,
                           std::int32_t* sums) const {
        std::copy(code_sums + first, code_sums + first + count, sums);
        for (std::int64_t o = 0; o < left_out(outliers); ++o) {
            const auto position = outliers.positions != nullptr ? outliers.positions[o] : o;
            const std::int8_t* const codes = outlier_codes_.data() + position * most_cols + first;
            for (std::int64_t i = 0; i < count; ++i) sums[i] -= codes[i];
        }
    }

    // Everything after the product, for the rows and columns of `tile`, which has all of X's side and gets the
    // layer's. (By reference: a copy would wait for each of the stores that have just made it.)
    void finish(EpilogueTile& tile, std::int64_t row, std::int64_t col, OutputBlock& rows) const {
        const Matrix& out = layer_.out;
        const std::int64_t j = col - block_.col_begin;
        tile.scale_w = scale + j;
        if (outlier_weight_.data() != nullptr) {
            tile.outlier_w = outlier_weight_.data() + j - gathered_;
            tile.outlier_columns = nullptr;
        } else if (tile.outlier_columns != nullptr) {
            tile.w = w_->data() + j * w_->depth();
            tile.w_stride = w_->stride();
        }
        tile.bias = layer_.bias.present ? bias_ + j : nullptr;
        tile.gelu = layer_.activation == Activation::gelu;
        if (out.col_stride == 1) {
            rows.fetch(row, col, tile.rows, tile.cols);
            return kernels().epilogue(tile, out.dtype, rows.at(row, col), rows.stride());
        }
        const Scratch<float> y(tile.rows * tile.cols);
        kernels().epilogue(tile, DType::f32, y.data(), tile.cols * size_of(DType::f32));
        for (std::int64_t i = 0; i < tile.rows; ++i) {
            kernels().store(y.data() + i * tile.cols, tile.cols, out.dtype, at(out, row + i, col), out.col_stride);
        }
    }

    float scale[most_cols];
    float zeropoint[most_cols];
    std::int32_t code_sums[most_cols];

private:
    void gather_kept(std::int64_t first, std::int64_t cols) {
        const ConstMatrix& original = weight_.outlier_weight;
        const std::int64_t count = std::ssize(kept_places_);
        if (count == 0) return;
        if (original.col_stride == 1) {
            return kernels().load_transposed(original.dtype, at(original, block_.col_begin + first, 0),
                                             original.row_stride, cols, count, kept_places_.data(),
                                             outlier_weight_.data(), outlier_stride);
        }
        for (std::int64_t i = 0; i < count; ++i) {
            const std::int32_t place = kept_places_[static_cast<std::size_t>(i)];
            if (place < 0) continue;
            float* const target = outlier_weight_.data() + place * outlier_stride;
            kernels().load(original.dtype, at(original, block_.col_begin + first, i), original.row_stride, cols,
                           target);
            std::fill(target + cols, target + whole_blocks(cols), 0.0F);
        }
    }

    const LinearLayer& layer_;
    const WeightView& weight_;
    Block block_;
    std::vector<std::int32_t> kept_places_;  // of the kept columns, among the outlier columns; -1: it is none
    std::vector<std::int32_t> not_kept_;
    std::vector<std::int32_t> not_kept_places_;
    const PackedPanel* w_ = nullptr;
    std::int64_t gathered_ = -1;             // the block's column that the tile gathered last begins at
    Scratch<float> outlier_weight_{0};       // [|O|, outlier_stride], of the columns from gathered_ on
    Scratch<std::int8_t> outlier_codes_{0};  // [|O|, most_cols]; only for zeropoint
    float bias_[most_cols];
};

// The zeropoint product (Eq. 4-5) of a row, over the columns that are not its outliers:
//   y[j] = (acc + zw * sum_k qx + zx * sum_k qw + k * zx * zw) * scale_x * scale_w
// The terms are large and cancel, so they are added as float64, where they are exact unless zeropoints are beyond 2^20.
void unroll_zeropoint(const SumsTile& tile, std::int64_t i, const QuantizedX& x, const OutlierElements::Row& outliers,
                      std::int64_t k, const BlockWeight& weight, std::int64_t first_col, float* y) {
    const double zx = x.zeropoints[tile.row + i];
    const double scale_x = x.scales[tile.row + i];
    const double sum_x = x.sums[tile.row + i];
    const auto depth = static_cast<double>(k - weight.left_out(outliers));
    std::int32_t sums_w[most_cols];
    weight.sum_codes_outside(outliers, first_col, tile.product.cols, sums_w);
    for (std::int64_t j = 0; j < tile.product.cols; ++j) {
        const double zw = weight.zeropoint[first_col + j];
        const double sum = static_cast<double>(tile.sum(i, j)) + zw * sum_x + zx * sums_w[j] + depth * zx * zw;
        y[j] = static_cast<float>(sum * (scale_x * static_cast<double>(weight.scale[first_col + j])));
    }
}

// acc * (scale_x * scale_w), or, where the product of the scales alone overflows, the smaller one first: then nothing
// overflows unless the result does.
float scaled_sum(float acc, float scale_x, float scale_w) {
    const float scale = scale_x * scale_w;
    if (!std::isinf(scale)) return acc * scale;
    return acc * std::min(scale_x, scale_w) * std::max(scale_x, scale_w);
}

float largest_of(const float* values, std::int64_t count) {
    float largest = 0.0F;
    for (std::int64_t i = 0; i < count; ++i) largest = std::max(largest, values[i]);  // which a NaN never is
    return largest;
}

void multiply_and_finish(const QuantizedX& quantized, const OutlierElements& outliers,
                         std::span<const LinearLayer> layers) {
    const std::int64_t m = layers.front().out.rows;
    const float largest_scale = largest_of(quantized.scales.data(), m);
    const std::int64_t k = layers.front().weight.codes.cols;
    std::vector<std::int64_t> widths;
    for (const LinearLayer& layer : layers) widths.push_back(layer.out.cols);
    for_each_block(quantized.codes.blocking(), m, widths, k, [&](const Turn& turn) {
        const Block& block = turn.block;
        const LinearLayer& layer = layers[turn.output];
        const WeightView& weight = layer.weight;
        const PackedPanel w(weight.codes, weight.layout, block.col_begin, block.col_end);
        BlockWeight block_weight(layer, block);
        OutputBlock rows(layer.out, turn);
        // What the epilogue cannot do: the zeropoints' terms, sums of more than 32 bits, scales whose product
        // overflows.
        const bool scaled_here = weight.scheme == Scheme::zeropoint || w.depth() > max_int32_depth ||
                                 std::isinf(largest_scale * largest_of(block_weight.scale, block.cols()));
        const std::int64_t most_rows = std::max(quantized.codes.plan().rows, few_rows);
        const Scratch<float> scaled(scaled_here ? most_rows * quantized.codes.plan().cols : 0);
        // What meets few rows is dequantized in registers, for each of them, and needs no memory.
        constexpr std::int64_t most_of_column = 4;  // elements that rows have of their own, on average
        const bool is_met_by_few = outliers.are_shared() ? block.rows() <= few_rows
                                                         : outliers.count(block.row_begin, block.row_end) <=
                                                               most_of_column * std::ssize(outliers.columns());
        const bool in_registers = !scaled_here && is_met_by_few;
        block_weight.sort_outliers(outliers.columns(), w, in_registers);
        const auto finish = [&](SumsTile& tile) {
            EpilogueTile& epilogue = tile.product;
            const std::int64_t first_col = tile.col - block.col_begin;
            epilogue.scale_x = quantized.scales.data() + tile.row;
            block_weight.gather_outliers(outliers.columns(), w, first_col, epilogue.cols);
            if (scaled_here) {
                const std::int64_t stride = quantized.codes.plan().cols;
                for (std::int64_t i = 0; i < epilogue.rows; ++i) {
                    float* const y = scaled.data() + i * stride;
                    if (weight.scheme == Scheme::zeropoint) {
                        unroll_zeropoint(tile, i, quantized, outliers.row(tile.row + i), k, block_weight, first_col, y);
                        continue;
                    }
                    for (std::int64_t j = 0; j < epilogue.cols; ++j) {
                        y[j] = scaled_sum(static_cast<float>(tile.sum(i, j)), quantized.scales[tile.row + i],
                                          block_weight.scale[first_col + j]);
                    }
                }
                epilogue.scaled = scaled.data();
                epilogue.stride = stride;
            }
            outliers.describe(tile.row, epilogue);
            block_weight.finish(epilogue, tile.row, tile.col, rows);
        };
        // Half of what memory brings while the outliers are added: with all of it these would wait.
        const std::int64_t lines = outliers.are_shared() ? std::ssize(outliers.columns()) * block.rows() / 4 : 0;
        multiply(quantized.codes, w, block_weight.code_sums, block, finish, lines);
        rows.write();
    });
}

void int8_linear(const ConstMatrix& x, std::span<const LinearLayer> layers, const LinearOptions& options) {
    OutlierElements outliers(x, layers.front().weight, options);
    const QuantizedX quantized(x, layers.front().weight, outliers);
    multiply_and_finish(quantized, outliers, layers);
}

// Rows with values from 2^90 on, whose sums could overflow where the result does not, are multiplied scaled down.
constexpr float small = 0x1p-64F;
bool is_any_large(const float* row, std::int64_t k) {
    return kernels().largest_magnitude(DType::f32, row, k) >= std::bit_cast<std::uint32_t>(0x1p90F);
}

// y = scale_w * (X (q + zeropoint)^T) + bias. Few rows read W as it is packed; for more a slice of 16 output features
// is made float32 once for all of them. The order of sums is that of FloatTile either way.
void weight_only_linear(const ConstMatrix& x, const LinearLayer& layer) {
    const WeightView& weight = layer.weight;
    const Matrix& out = layer.out;
    constexpr std::int64_t read_as_packed = 12;                  // rows
    constexpr std::int64_t read_in_pairs = 48;                   // rows, where X can be (Kernels::pair)
    constexpr Blocking blocking{.rows = 12, .block_rows = 240};  // what registers hold, and the second-level cache
    // Of few rows, output features that are multiplied by a slice of X while it is in the first-level cache.
    constexpr std::int64_t together = 64;
    const std::int64_t depth = padded_depth(weight.codes.cols);
    const std::int64_t x_stride = depth + 16;  // no power of two: rows would push each other out of the cache
    const Scratch<float> x_rows(x.rows * x_stride);
    // Whether one instruction adds products of two steps along k.
    std::atomic<bool> in_pairs = kernels().pair != nullptr && x.dtype == DType::bf16 && x.rows <= read_in_pairs &&
                                 weight.rotation == 0 && !weight.zeropoint.present;
    const Scratch<std::uint16_t> x_pairs(in_pairs ? 4 * x.rows * x_stride : 0);
    std::vector<std::uint8_t> is_large(static_cast<std::size_t>(x.rows));  // rows whose sums could overflow
    parallel_for(x.rows, row_grain(x.cols), [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin; i < end; ++i) {
            float* const row = x_rows.data() + i * x_stride;
            load_row(x, i, 0, x.cols, row);
            if (is_any_large(row, x.cols)) {
                is_large[static_cast<std::size_t>(i)] = 1;
                std::for_each(row, row + x.cols, [](float& value) { value *= small; });
            }
            std::fill(row + x.cols, row + depth, 0.0F);
            if (weight.rotation != 0) rotate(row, x.cols, weight.rotation);
            if (in_pairs && !kernels().pair(row, depth, x_pairs.data() + 4 * i * x_stride)) in_pairs = false;
        }
    });
    for_each_block(blocking, out.rows, {&out.cols, 1}, depth, [&](const Turn& turn) {
        const Block& block = turn.block;
        const PackedPanel codes(weight.codes, weight.layout, block.col_begin, block.col_end);
        const BlockWeight block_weight(layer, block);
        OutputBlock rows(out, turn);
        const bool widened = !in_pairs && block.rows() > read_as_packed;
        const Scratch<float> w_floats(widened ? float_slice * block_cols : 0);
        const std::int64_t step = widened ? block_cols : together;
        const Scratch<float> sums(block.rows() * step * 4);
        const Scratch<float> y(block.rows() * block_cols);
        for (std::int64_t first = 0; first < block.cols(); first += step) {
            const std::int64_t last = std::min(first + step, block.cols());
            const auto sums_of = [&](std::int64_t j) { return sums.data() + (j - first) * block.rows() * 4; };
            if (depth == 0) std::fill(sums.data(), sums.data() + block.rows() * step * 4, 0.0F);
            // The packed blocks of these output features from a line of the cache on, behind their end those that come
            // next: fetched ahead as four streams side by side, which is as fast as memory is; one by one they are not.
            // Null where there are no four.
            const auto after = [&](std::int64_t line) -> const std::int8_t* {
                const std::int64_t col = first + line / (depth / 4) * together;
                const bool is_there = weight.layout == Layout::packed && block.col_begin + col + together <= out.cols;
                return is_there ? codes.data() + col * depth + line % (depth / 4) * 64 : nullptr;
            };
            for (std::int64_t begin = 0; begin < depth; begin += float_slice) {
                for (std::int64_t j = first; j < last; j += block_cols) {
                    const std::int64_t slice = std::min(float_slice, depth - begin);
                    const FloatTile tile{
                        .x = x_rows.data() + block.row_begin * x_stride + begin,
                        .x_pairs = in_pairs ? x_pairs.data() + 4 * (block.row_begin * x_stride + begin) : nullptr,
                        .x_stride = x_stride,
                        .rows = block.rows(),
                        .w = codes.data() + j * depth + begin * block_cols,
                        .w_floats = w_floats.data(),
                        .zeropoint = weight.zeropoint.present ? block_weight.zeropoint + j : nullptr,
                        .depth = slice,
                        .places = 4,
                        .first = begin == 0,
                        .sums = sums_of(j),
                        .ahead = widened ? nullptr
                                         : after((begin + float_slice) / 4 + (j - first) / block_cols * (slice / 16)),
                        .ahead_stride = codes.stride(),
                        .far = fetches_streams() ? 4096 : 0};
                    if (widened) kernels().widen(tile.w, tile.depth, tile.zeropoint, w_floats.data());
                    kernels().multiply_floats(tile);
                }
            }
            for (std::int64_t j = first; j < last; j += block_cols) {
                kernels().finish_floats(sums_of(j), block.rows(), block_weight.scale + j, y.data());
                for (std::int64_t i = 0; i < block.rows(); ++i) {
                    if (is_large[static_cast<std::size_t>(block.row_begin + i)] == 0) continue;
                    std::for_each_n(y.data() + i * block_cols, block_cols, [](float& value) { value /= small; });
                }
                EpilogueTile epilogue{.rows = block.rows(),
                                      .cols = std::min(block_cols, block.cols() - j),
                                      .scaled = y.data(),
                                      .stride = block_cols};
                block_weight.finish(epilogue, block.row_begin, block.col_begin + j, rows);
            }
        }
        rows.write();
    });
}

}  // namespace

void Backend::linear(ConstMatrix x, std::span<const LinearLayer> layers, const LinearOptions& options,
                     Stream /*stream*/) const {
    switch (options.path) {
        case Path::auto_:
        case Path::int8: return int8_linear(x, layers, options);
        case Path::weight_only:
            for (const LinearLayer& layer : layers) weight_only_linear(x, layer);
    }
}

}  // namespace octavo::cpu
