// The exact int8 product, shared by `int8_matmul` and `linear`: the one driver of the kernels of every instruction set.
//
// X comes in row by row, as codes, and is laid out in panels (XPanels). The output is cut into blocks that threads take
// in turn (for_each_block), and each block is multiplied slice by slice along k; every tile of sums is handed over as
// soon as it is whole, while it is in the first-level cache (multiply). Plan (kernels/table.hpp) says how an
// instruction set wants it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>

#include "cpu/isa.hpp"
#include "cpu/pack.hpp"
#include "cpu/scratch.hpp"

namespace octavo::cpu {

// The plan for a product of `rows` rows of X.
const Plan& plan_for(std::int64_t rows);

// How the output is cut: blocks of it are at most `block_rows` high and begin at multiples of `rows` and `cols`.
struct Blocking {
    std::int64_t rows = 0;
    std::int64_t block_rows = 0;
    std::int64_t cols = 64;
    std::int64_t speed = 40;  // as Plan's
};

// The codes of X as a plan's kernel reads them, and what its rows' sums will be too large by:
//
//   slice of k -> panel of Plan::rows rows -> what Plan::place_row makes of a slice of a row
//
// A product deeper than max_int32_depth goes in parts of so many columns; no slice is in two of them.
class XPanels {
public:
    XPanels(const Plan& plan, std::int64_t rows, std::int64_t k);

    // The codes of row `row`: padded_depth(k) of them, zeros behind k.
    void place(std::int64_t row, const std::int8_t* codes) const;

    [[nodiscard]] const Plan& plan() const noexcept { return plan_; }
    // Whether W is to come from the second-level cache for every panel, so that X need not stay there.
    [[nodiscard]] bool is_deep() const noexcept { return slice_ > plan_.depth; }
    [[nodiscard]] Blocking blocking() const noexcept {
        // X passes once for each tile's width of W; the more of its rows do, the less often W comes from memory.
        const std::int64_t block_rows = is_deep() ? 3 * plan_.block_rows : plan_.block_rows;
        return {.rows = plan_.rows, .block_rows = block_rows, .speed = plan_.speed};
    }
    [[nodiscard]] std::int64_t depth() const noexcept { return depth_; }
    // Where the slice that begins at `begin` ends.
    [[nodiscard]] std::int64_t slice_end(std::int64_t begin) const noexcept;
    // A slice of the panel that begins at row `row`.
    [[nodiscard]] const std::int8_t* panel(std::int64_t row, std::int64_t begin) const noexcept;
    // The numbers of rows `row` and on, for sums over the part that begins at `begin`.
    [[nodiscard]] const std::int32_t* offsets(std::int64_t row, std::int64_t begin) const noexcept;
    // Bytes of X that a block of so many rows reads.
    [[nodiscard]] std::int64_t bytes(std::int64_t rows) const noexcept { return rows * depth_ * plan_.x_size; }

private:
    const Plan& plan_;
    std::int64_t rows_;  // a multiple of the plan's
    std::int64_t depth_;
    std::int64_t slice_;
    Scratch<std::int8_t> memory_;
    Scratch<std::int32_t> offsets_;
};

// A rectangle of the output that one thread computes: at most most_cols wide. It begins at a multiple of Plan::rows and
// of 16 columns.
struct Block {
    std::int64_t row_begin, row_end;
    std::int64_t col_begin, col_end;
    [[nodiscard]] std::int64_t rows() const noexcept { return row_end - row_begin; }
    [[nodiscard]] std::int64_t cols() const noexcept { return col_end - col_begin; }
};

// A block, of those that one thread computes one after the other, and what is known of the one behind it.
struct Turn {
    std::size_t output;  // which of them it is a block of
    Block block;
    Block next;     // nothing where it is the last or of another output, or where is_deep
    bool is_first;  // so that nobody has fetched its outputs
    bool is_deep;   // so that what is fetched now would not be in the second-level cache when the next one is written
};

// Cut outputs `[m, n]`, one for each n of `widths`, of products of the same X, k deep, into blocks of about equal size
// and share them among threads: rows before columns, whose blocks each read their part of X anew.
void for_each_block(const Blocking& blocking, std::int64_t m, std::span<const std::int64_t> widths, std::int64_t k,
                    const std::function<void(const Turn&)>& work);

// A tile of a block, or of few rows all that are below each other, whole: sum_k x[row + i, k] * w[col + j, k] for i <
// rows, j < cols.
struct SumsTile {
    std::int64_t row = 0;
    std::int64_t col = 0;
    const std::int64_t* wide = nullptr;  // not null where k > max_int32_depth: the sums themselves, as far apart
    // The sums, and room for what else an epilogue needs. (In place: a copy would wait for the stores that have just
    // made it, behind all of the tile's.)
    EpilogueTile product;

    // The sum of row i and column j, whichever way it is kept.
    [[nodiscard]] std::int64_t sum(std::int64_t i, std::int64_t j) const noexcept {
        if (wide != nullptr) return wide[i * product.stride + j];
        auto sum = static_cast<std::uint32_t>(product.acc[i * product.stride + j]);
        if (product.row_offsets != nullptr) {
            sum -= static_cast<std::uint32_t>(product.row_offsets[i]);
            sum -= static_cast<std::uint32_t>(product.col_offsets[j]);
        }
        return static_cast<std::int32_t>(sum);
    }
};

// A block of an output so large that the caches do not hold it. Tiles are made one below the other: written so, each
// line of it would be fetched before it is filled, and lines of rows whose distance is a power of two push each other
// out. So tiles wait here until whole rows of the block can be written past the caches.
class OutputBlock {
public:
    OutputBlock(const Matrix& out, const Turn& turn);

    // Where element (row, col) of the output goes, and the bytes from row to row there; only where the output's rows
    // are contiguous.
    [[nodiscard]] void* at(std::int64_t row, std::int64_t col) const;
    [[nodiscard]] std::int64_t stride() const noexcept { return stride_; }
    // That this part of the block is about to be written: others that will be are fetched. Of the next block, if there
    // is one, row after row; in the order of tiles, a line of each row, memory is half as fast. Else of the rows below.
    void fetch(std::int64_t row, std::int64_t col, std::int64_t rows, std::int64_t cols);
    // Put all of the block where it belongs.
    void write() const;

private:
    Matrix out_;
    Block block_;
    bool waits_;
    std::int64_t stride_;
    // Fetch so many bytes of next_, or somewhat more, and remember what is left.
    void fetch_next(std::int64_t bytes);

    Block next_;                // begins at the row that is fetched next; no rows: all are, or there is no next block
    std::int64_t fetched_ = 0;  // bytes of that row
    std::int64_t due_ = 0;      // bytes to be fetched
    bool looks_below_;
    Scratch<char> memory_;
};

// The sums of a tile that are not wide, as int32 into rows `stride` bytes apart.
void put_sums(const SumsTile& tile, void* out, std::int64_t stride);

// sums[j] = sum of the codes of each of `cols` output features, a multiple of 16, over [begin, end) of the padded
// depth, where some plan has X unsigned.
void sum_packed(const PackedPanel& w, std::int64_t cols, std::int64_t begin, std::int64_t end, std::int32_t* sums);

// The sums of a block, tile by tile. `w` holds the output features of the block; `w_sums[j]` = sum_k w[j, k] where the
// plan has X unsigned and k <= max_int32_depth, else it may be null.
// `finish` may not multiply.
// Of the part of W that comes next, `finish` fetches up to `lines` cache lines (EpilogueTile::ahead) where one panel
// has all rows and they lie in a row: what takes long beside a product of few rows may wait for memory as well.
void multiply(const XPanels& x, const PackedPanel& w, const std::int32_t* w_sums, const Block& block,
              const std::function<void(SumsTile&)>& finish, std::int64_t lines = 0);

}  // namespace octavo::cpu
