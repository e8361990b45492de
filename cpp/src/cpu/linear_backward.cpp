// The gradient of X: grad times the dequantized weight, of which there is one tile of 256 output features by 16 input
// features at a time, in the first-level cache.
#include <algorithm>
#include <utility>
#include <vector>

#include "backend.hpp"
#include "cpu/gemm.hpp"
#include "cpu/rows.hpp"
#include "cpu/threads.hpp"

namespace octavo::cpu {
namespace {

// Output features that are summed before they are added to the sums of the others.
constexpr std::int64_t slice = 256;
// Rows of a block: what registers hold, and, with a slice of `grad` and the sums, the second-level cache.
constexpr std::int64_t tile_rows = 12;
constexpr std::int64_t block_rows = 192;

// A kept column of the weight, and where it goes.
struct KeptColumn {
    std::int64_t index;   // in weight.outlier_weight
    std::int64_t column;  // counted from the first of the block
};

std::vector<KeptColumn> kept_columns_in(const WeightView& weight, const Block& block) {
    std::vector<KeptColumn> kept;
    for (std::int64_t i = 0; i < weight.outlier_columns.size; ++i) {
        const std::int64_t column = get<std::int32_t>(weight.outlier_columns, i);
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

// Tiles of `block_cols` columns of the dequantized weight, for one slice of output features after the other.
class WeightTiles {
public:
    WeightTiles(const WeightView& weight, const Block& block, std::vector<KeptColumn> kept)
        : weight_(weight), block_(block), kept_(std::move(kept)) {}

    // Tiles of the block's columns, and of as many as hold the kept ones, where they are apart because the others are
    // rotated.
    [[nodiscard]] std::int64_t rotated_cols() const { return whole_blocks(block_.cols()); }
    [[nodiscard]] std::int64_t cols() const {
        return rotated_cols() + (weight_.rotation != 0 ? whole_blocks(std::ssize(kept_)) : 0);
    }
    [[nodiscard]] const std::vector<KeptColumn>& kept() const { return kept_; }

    // Calls use(column, tile) with each tile [end - begin, block_cols].
    template <class Use>
    void for_each(std::int64_t begin, std::int64_t end, Use use) {
        const PackedPanel codes = codes_of(weight_, begin, end, block_);
        gather_features(weight_.scale, begin, end - begin, scale_);
        if (weight_.zeropoint.present) gather_features(weight_.zeropoint, begin, end - begin, zeropoint_);
        for (std::int64_t col = 0; col < rotated_cols(); col += block_cols) {
            kernels().dequantize_square(codes.data() + col * block_cols, codes.stride(), whole_blocks(end - begin),
                                        zeropoint_, scale_, tile_.data());
            if (weight_.rotation == 0) {
                for (const KeptColumn& kept : kept_) {
                    if (kept.column / block_cols == col / block_cols) put(kept, begin, end, kept.column % block_cols);
                }
            }
            use(col, tile_.data());
        }
        for (std::int64_t col = rotated_cols(); col < cols(); col += block_cols) {
            std::fill(tile_.data(), tile_.data() + slice * block_cols, 0.0F);
            const std::int64_t first = col - rotated_cols();
            for (std::int64_t i = first; i < std::min(first + block_cols, std::ssize(kept_)); ++i) {
                put(kept_[static_cast<std::size_t>(i)], begin, end, i - first);
            }
            use(col, tile_.data());
        }
    }

private:
    // A kept column as column `place` of the tile.
    void put(const KeptColumn& kept, std::int64_t begin, std::int64_t end, std::int64_t place) {
        float values[slice];
        const ConstMatrix& original = weight_.outlier_weight;
        kernels().load(original.dtype, at(original, begin, kept.index), original.row_stride, end - begin, values);
        for (std::int64_t j = 0; j < end - begin; ++j) tile_[j * block_cols + place] = values[j];
    }

    const WeightView& weight_;
    const Block& block_;
    std::vector<KeptColumn> kept_;
    float scale_[slice]{};
    float zeropoint_[slice]{};
    Scratch<float> tile_{slice * block_cols};
};

}  // namespace

void Backend::linear_backward(ConstMatrix grad, const WeightView& weight, Matrix out, bool uses_kept,
                              Stream /*stream*/) const {
    const Blocking blocking{
        .rows = tile_rows, .block_rows = block_rows, .cols = std::max<std::int64_t>(64, weight.rotation)};
    const std::int64_t width = weight.rotation != 0 ? weight.codes.cols : out.cols;
    for_each_block(blocking, out.rows, width, grad.cols, [&](const Block& block) {
        WeightTiles weights(weight, block, uses_kept ? kept_columns_in(weight, block) : std::vector<KeptColumn>{});
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
        const Scratch<float> row(weights.cols());
        for (std::int64_t i = 0; i < rows; ++i) {
            for (std::int64_t col = 0; col < weights.cols(); col += block_cols) {
                std::copy_n(sums.data() + rows * col + i * block_cols, block_cols, row.data() + col);
            }
            if (weight.rotation != 0) {
                kernels().rotate(row.data(), block.cols(), weight.rotation);
                for (std::int64_t c = 0; c < std::ssize(weights.kept()); ++c) {
                    row[weights.kept()[static_cast<std::size_t>(c)].column] = row[weights.rotated_cols() + c];
                }
            }
            const std::int64_t cols = std::min(block.cols(), out.cols - block.col_begin);
            kernels().store(row.data(), cols, out.dtype, at(out, block.row_begin + i, block.col_begin), out.col_stride);
        }
    });
}

}  // namespace octavo::cpu
