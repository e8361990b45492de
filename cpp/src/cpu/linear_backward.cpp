// The gradient of X: grad times the dequantized weight, of which there is one tile of 256 output features by 16 or 32
// input features at a time, in the first-level cache; or the int8 product of grad with the transposed codes.
#include <algorithm>
#include <utility>
#include <vector>

#include "backend.hpp"
#include "cpu/gemm.hpp"
#include "cpu/rows.hpp"
#include "cpu/threads.hpp"

namespace octavo::cpu {
namespace {

constexpr std::int64_t slice = float_slice;  // output features
// Rows of a block: what registers hold, and, with a slice of `grad` and the sums, the second-level cache.
constexpr std::int64_t tile_rows = 12;
constexpr std::int64_t block_rows = 192;

// What the gradient is multiplied by: the dequantized weight, in which kept columns may stand in their places, or kept
// columns alone, side by side.
enum class Columns : std::uint8_t { all, with_kept, kept };

// A kept column of the weight, and where it goes.
struct KeptColumn {
    std::int64_t index;  // in weight.outlier_weight
    std::int64_t place;  // counted from the first column of the block
};

std::vector<KeptColumn> kept_columns_in(const WeightView& weight, const Block& block, Columns columns) {
    std::vector<KeptColumn> kept;
    for (std::int64_t i = 0; columns != Columns::all && i < weight.outlier_columns.size; ++i) {
        const std::int64_t column = columns == Columns::kept ? i : get<std::int32_t>(weight.outlier_columns, i);
        if (column >= block.col_begin && column < block.col_end) kept.push_back({i, column - block.col_begin});
    }
    return kept;
}

// Codes of output features [begin, end) and the input features of the block, in packed order.
PackedPanel codes_of(const WeightView& weight, std::int64_t begin, std::int64_t end, const Block& block) {
    if (weight.layout == Layout::packed) {
        return PackedPanel(weight.codes, weight.layout, begin, end).from(block.col_begin);
    }
    ConstMatrix part = weight.codes;
    part.data = at(part, 0, block.col_begin);
    part.cols = block.cols();
    return {part, weight.layout, begin, end};
}

// Tiles of `tile_cols` columns of the matrix, for one slice of output features after the other.
class WeightTiles {
public:
    WeightTiles(const WeightView& weight, const Block& block, Columns columns)
        : weight_(weight), block_(block), columns_(columns), kept_(kept_columns_in(weight, block, columns)) {}

    // The block's columns, up to whole tiles: never more than packed codes are padded to.
    [[nodiscard]] std::int64_t cols() const { return (block_.cols() + tile_cols_ - 1) / tile_cols_ * tile_cols_; }

    // Calls use(column, tile) with each tile [end - begin, tile_cols].
    template <class Use>
    void for_each(std::int64_t begin, std::int64_t end, Use use) {
        if (columns_ == Columns::kept) {
            for (std::int64_t col = 0; col < cols(); col += tile_cols_) {
                std::fill(tile_.data(), tile_.data() + slice * tile_cols_, 0.0F);
                put_kept(col, begin, end);
                use(col, tile_.data());
            }
            return;
        }
        const PackedPanel codes = codes_of(weight_, begin, end, block_);
        gather_features(weight_.scale, begin, end - begin, scale_);
        if (weight_.zeropoint.present) gather_features(weight_.zeropoint, begin, end - begin, zeropoint_);
        for (std::int64_t col = 0; col < cols(); col += tile_cols_) {
            kernels().dequantize_square(codes.data() + col * block_cols, codes.stride(), whole_blocks(end - begin),
                                        zeropoint_, scale_, tile_.data());
            put_kept(col, begin, end);
            use(col, tile_.data());
        }
    }

private:
    // Kept columns into their places in the tile that begins at `col`.
    void put_kept(std::int64_t col, std::int64_t begin, std::int64_t end) {
        const ConstMatrix& original = weight_.outlier_weight;
        for (const KeptColumn& kept : kept_) {
            if (kept.place / tile_cols_ != col / tile_cols_) continue;
            float values[slice];
            kernels().load(original.dtype, at(original, begin, kept.index), original.row_stride, end - begin, values);
            float* const target = tile_.data() + kept.place - col;
            for (std::int64_t j = 0; j < end - begin; ++j) target[j * tile_cols_] = values[j];
        }
    }

    const std::int64_t tile_cols_ = kernels().gradient_cols;
    const WeightView& weight_;
    const Block& block_;
    const Columns columns_;
    const std::vector<KeptColumn> kept_;
    float scale_[slice]{};
    float zeropoint_[slice]{};
    Scratch<float> tile_{slice * tile_cols_};
};

// The product with these columns of the weight, in float32.
void float_backward(const ConstMatrix& grad, const WeightView& weight, const Matrix& out, Columns columns) {
    const Blocking blocking{
        .rows = tile_rows, .block_rows = block_rows, .cols = std::max<std::int64_t>(64, weight.rotation)};
    const std::int64_t width = columns == Columns::kept ? weight.outlier_columns.size
                               : weight.rotation != 0   ? weight.codes.cols
                                                        : out.cols;
    for_each_block(blocking, out.rows, {&width, 1}, grad.cols, [&](const Turn& turn) {
        const Block& block = turn.block;
        WeightTiles weights(weight, block, columns);
        const std::int64_t rows = block.rows();
        const Scratch<float> sums(rows * weights.cols());  // tile after tile
        std::fill(sums.data(), sums.data() + rows * weights.cols(), 0.0F);
        const Scratch<float> grad_rows(rows * slice);
        for (std::int64_t begin = 0; begin < grad.cols; begin += slice) {
            const std::int64_t end = std::min(begin + slice, grad.cols);
            for (std::int64_t i = 0; i < rows; ++i) {
                load_row(grad, block.row_begin + i, begin, end - begin, grad_rows.data() + i * slice);
            }
            weights.for_each(begin, end, [&](std::int64_t col, const float* tile) {
                kernels().multiply_floats({.x = grad_rows.data(),
                                           .x_stride = slice,
                                           .rows = rows,
                                           .w = nullptr,
                                           .w_floats = tile,
                                           .zeropoint = nullptr,
                                           .depth = end - begin,
                                           .places = 1,
                                           .first = false,
                                           .sums = sums.data() + rows * col});
            });
        }
        const std::int64_t tile_cols = kernels().gradient_cols;
        const Scratch<float> row(weights.cols());
        const auto put = [&](std::int64_t i, std::int64_t col, const float* values, std::int64_t cols) {
            kernels().store(values, cols, out.dtype, at(out, block.row_begin + i, col), out.col_stride);
        };
        for (std::int64_t i = 0; i < rows; ++i) {
            for (std::int64_t col = 0; col < weights.cols(); col += tile_cols) {
                std::copy_n(sums.data() + rows * col + i * tile_cols, tile_cols, row.data() + col);
            }
            if (columns == Columns::kept) {
                for (std::int64_t c = 0; c < block.cols(); ++c) {
                    put(i, get<std::int32_t>(weight.outlier_columns, block.col_begin + c), row.data() + c, 1);
                }
            } else {
                if (weight.rotation != 0) rotate(row.data(), block.cols(), weight.rotation);
                put(i, block.col_begin, row.data(), std::min(block.cols(), out.cols - block.col_begin));
            }
        }
    });
}

// Codes [n, k] as packed codes [k, n], for a product of `rows` rows, and the sums of their rows where it needs them.
struct TransposedCodes {
    TransposedCodes(const WeightView& weight, std::int64_t rows)
        : codes(packed_size(weight.codes.cols, weight.codes.rows)), sums(whole_blocks(weight.codes.cols)) {
        const std::int64_t n = weight.codes.rows;
        const std::int64_t k = weight.codes.cols;
        std::fill_n(sums.data(), whole_blocks(k), 0);
        if (n == 0) return;
        const std::int64_t depth = padded_depth(n);
        const bool needs_sums = plan_for(rows).x_is_unsigned && depth <= max_int32_depth;
        const PackedPanel packed(weight.codes, weight.layout, 0, n);
        parallel_for(
            whole_blocks(k) / block_cols, row_grain(block_cols * n), [&](std::int64_t begin, std::int64_t end) {
                for (std::int64_t h = begin * block_cols; h < end * block_cols; h += block_cols) {
                    std::int8_t* const target = codes.data() + h * depth;
                    kernels().transpose(packed.data() + h * block_cols, packed.stride(), whole_blocks(n), target);
                    std::fill(target + whole_blocks(n) * block_cols, target + depth * block_cols, std::int8_t{0});
                    const ConstMatrix block{.data = target, .dtype = DType::i8, .rows = block_cols, .cols = n};
                    if (needs_sums)
                        sum_packed({block, Layout::packed, 0, block_cols}, block_cols, 0, depth, sums.data() + h);
                }
            });
    }

    Scratch<std::int8_t> codes;
    Scratch<std::int32_t> sums;
};

// The int8 product: `linear` of the gradient, times the scales of the output features, by the transposed codes.
void int8_backward(const octavo::Backend& backend, const ConstMatrix& grad, const WeightView& weight,
                   const Matrix& out) {
    const std::int64_t n = grad.cols;
    const Scratch<float> scale(whole_blocks(n));
    gather_features(weight.scale, 0, n, scale.data());
    const Scratch<float> scaled(grad.rows * n);
    parallel_for(grad.rows, row_grain(n), [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin; i < end; ++i) {
            float* const row = scaled.data() + i * n;
            load_row(grad, i, 0, n, row);
            for (std::int64_t j = 0; j < n; ++j) row[j] *= scale[j];
        }
    });
    const TransposedCodes codes(weight, grad.rows);
    const std::int64_t width = weight.codes.cols;
    constexpr float one = 1;
    const WeightView transposed{
        .codes = {.data = codes.codes.data(), .dtype = DType::i8, .rows = width, .cols = n},
        .scale = {.data = &one, .dtype = DType::f32, .size = 1},
        .code_sums = {.data = codes.sums.data(), .dtype = DType::i32, .size = width},
        .granularity = Granularity::row,
        .layout = Layout::packed,
    };
    const ConstMatrix x{.data = scaled.data(), .rows = grad.rows, .cols = n, .row_stride = n};
    LinearLayer layer{.weight = transposed, .out = out};
    if (weight.rotation == 0) return backend.linear(x, {&layer, 1}, gradient_options, {});
    const Scratch<float> rotated(grad.rows * width);
    layer.out = {.data = rotated.data(), .rows = grad.rows, .cols = width, .row_stride = width};
    backend.linear(x, {&layer, 1}, gradient_options, {});
    parallel_for(grad.rows, row_grain(width), [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin; i < end; ++i) {
            rotate(rotated.data() + i * width, width, weight.rotation);
            kernels().store(rotated.data() + i * width, out.cols, out.dtype, at(out, i, 0), out.col_stride);
        }
    });
}

}  // namespace

void Backend::linear_backward(ConstMatrix grad, const WeightView& weight, Matrix out, bool uses_kept, bool int8,
                              Stream /*stream*/) const {
    const bool are_kept_apart = int8 || weight.rotation != 0;
    if (int8) {
        int8_backward(*this, grad, weight, out);
    } else {
        float_backward(grad, weight, out, uses_kept && !are_kept_apart ? Columns::with_kept : Columns::all);
    }
    if (uses_kept && are_kept_apart) float_backward(grad, weight, out, Columns::kept);
}

}  // namespace octavo::cpu
