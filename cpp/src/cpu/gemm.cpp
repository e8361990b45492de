#include "cpu/gemm.hpp"

#include <unistd.h>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>
#include <vector>

#include "backend.hpp"
#include "cpu/rows.hpp"
#include "cpu/threads.hpp"
#include "octavo/error.hpp"
#include "octavo/runtime.hpp"

namespace octavo::cpu {
namespace {

constexpr std::int64_t up(std::int64_t value, std::int64_t multiple) {
    return (value + multiple - 1) / multiple * multiple;
}

constexpr std::int64_t line = 64;  // bytes of a cache line

constexpr std::int64_t ceiling(std::int64_t value, std::int64_t divisor) { return (value + divisor - 1) / divisor; }

// Number of parts of at most max_int32_depth.
std::int64_t parts_of(std::int64_t depth) { return std::max<std::int64_t>(1, ceiling(depth, max_int32_depth)); }

// Whether so many bytes of W stay in the first-level cache while X and sums pass by. (Yes where it is not known.)
bool is_nearest(std::int64_t bytes) {
#ifdef _SC_LEVEL1_DCACHE_SIZE
    static const std::int64_t cache = sysconf(_SC_LEVEL1_DCACHE_SIZE);
    return cache <= 0 || bytes <= cache / 4 * 3;
#else
    return true;
#endif
}

// Bytes of X beside which the second-level cache also holds the slices of W that pass by.
std::int64_t near_size() {
    constexpr std::int64_t least = std::int64_t{256} << 10;
#ifdef _SC_LEVEL2_CACHE_SIZE
    static const auto cache = std::max<std::int64_t>(sysconf(_SC_LEVEL2_CACHE_SIZE), least);
    return cache / 2;
#else
    return least / 2;
#endif
}

// The depth of a slice. Where the first-level cache is too small for a plan's, W comes from the second-level cache for
// every panel, which is fast enough if it does, and deeper slices read and write sums less often.
std::int64_t slice_of(const Plan& plan) {
    if (plan.regroup != nullptr || is_nearest(plan.cols * plan.depth)) return plan.depth;
    return std::max(plan.depth, near_size() / 2 / plan.cols / 64 * 64);
}

// Whether the sums of a plan's `multiply` are too large by anything.
bool has_offsets(const Plan& plan) { return plan.x_is_unsigned || plan.regroup != nullptr; }

// The tile registers, or whatever a plan wants set up while it multiplies.
class Entered {
public:
    Entered(const Plan& plan, std::int64_t rows) : plan_(plan) {
        if (plan_.enter != nullptr) plan_.enter(std::min(rows, plan.rows));
    }
    ~Entered() {
        if (plan_.leave != nullptr) plan_.leave();
    }
    Entered(const Entered&) = delete;
    Entered& operator=(const Entered&) = delete;

private:
    const Plan& plan_;
};

// The sums of a block over one part of k.
class BlockProduct {
public:
    BlockProduct(const XPanels& x, const PackedPanel& w, const Block& block, std::int64_t lines)
        : x_(x),
          w_(w),
          block_(block),
          plan_(x.plan()),
          cols_(whole_blocks(block.cols())),
          panels_(ceiling(block.rows(), plan_.rows)),
          strip_(x.is_deep() || x.bytes(block.rows()) <= near_size() ? plan_.cols : cols_),
          acc_(panels_ * tile_size() * ceiling(strip_, plan_.cols)),
          whole_(plan_.run_rows > 0 ? tile_size() : 0),
          regrouped_(plan_.cols * std::min(plan_.depth, x.depth()) * plan_.regrouped),
          offsets_(cols_),
          together_(block.rows() <= few_rows ? block.rows() : std::max(plan_.rows, few_rows / plan_.rows * plan_.rows)),
          lines_of_finish_(is_finished_at_once() && plan_.begin == nullptr ? lines : 0) {}

    void run(std::int64_t begin, std::int64_t end, const std::int32_t* w_sums,
             const std::function<void(SumsTile&)>& finish) const {
        for (std::int64_t j = 0; j < cols_; ++j) {
            offsets_[j] =
                plan_.x_is_unsigned ? static_cast<std::int32_t>(128U * static_cast<std::uint32_t>(w_sums[j])) : 0;
        }
        if (begin == end) std::fill(acc_.data(), acc_.data() + panels_ * tile_size() * ceiling(strip_, plan_.cols), 0);
        const Entered entered(plan_, block_.rows());
        // Of all tiles, because to clear one takes longer than to set what differs.
        ProductTile tile{.bytes_ahead = fetches_streams() ? 0 : 32 * line};
        ProductTile after;  // the one that comes next, if it has any depth
        for (std::int64_t strip = 0; strip < cols_; strip += strip_) {
            const std::int64_t strip_end = std::min(strip + strip_, cols_);
            std::int64_t slice = begin;
            do {
                const std::int64_t slice_end = std::min(x_.slice_end(slice), end);
                for (std::int64_t j = strip; j < strip_end; j += plan_.cols) {
                    const bool last_of_strip = j + plan_.cols >= strip_end;
                    const bool last_of_slices = slice_end == end;
                    tile.w = w_.data() + j * w_.depth() + slice * block_cols;
                    tile.w_stride = w_.stride();
                    tile.cols = std::min(plan_.cols, cols_ - j);
                    tile.depth = slice_end - slice;
                    tile.first = slice == begin;
                    tile.acc = acc_.data() + (j - strip) / plan_.cols * panels_ * tile_size();
                    tile.begun = after.begun;
                    tile.finish = nullptr;
                    tile.ahead = nullptr;
                    tile.ahead_depth = 0;
                    const std::int64_t next = !last_of_strip ? slice : last_of_slices ? begin : slice_end;
                    const std::int64_t next_j = !last_of_strip ? j + plan_.cols : last_of_slices ? strip_end : strip;
                    if (next_j < cols_) {
                        tile.ahead = w_.data() + next_j * w_.depth() + next * block_cols;
                        tile.ahead_depth = std::min(x_.slice_end(next), end) - next;
                        tile.ahead_stride = w_.stride();
                    }
                    after.depth = 0;
                    after.begun = 0;
                    if (plan_.begin != nullptr && panels_ == 1 && slice_end - slice == end - begin &&
                        next_j + plan_.cols <= cols_) {
                        after = tile;
                        after.x = x_.panel(block_.row_begin, slice);
                        after.w = tile.ahead;
                        after.begun = 0;
                    }
                    column(tile, slice, j, last_of_slices ? &finish : nullptr, begin, after);
                }
                slice = slice_end;
            } while (slice < end);
        }
    }

private:
    [[nodiscard]] std::int64_t tile_size() const { return plan_.rows * plan_.cols; }
    [[nodiscard]] bool is_finished_at_once() const {
        return block_.rows() <= (plan_.run_rows == 0 ? std::max(plan_.rows, few_rows) : plan_.rows);
    }

    // All rows by the output features of `tile`, which is at column j and slice `begin`. Whole tiles go to `finish`,
    // which may begin the one that is `after` it, if that has any depth.
    void column(ProductTile& tile, std::int64_t begin, std::int64_t j, const std::function<void(SumsTile&)>* finish,
                std::int64_t part, ProductTile& after) const {
        if (plan_.regroup != nullptr && tile.depth > 0) {
            plan_.regroup(tile.w, tile.w_stride, tile.cols, tile.depth, regrouped_.data(), offsets_.data() + j);
            tile.w = regrouped_.data();
            tile.w_stride = block_cols * tile.depth * plan_.regrouped;
        }
        const std::int8_t* for_finish = nullptr;
        std::int64_t lines = 0;
        if (tile.ahead != nullptr && finish != nullptr) {
            lines = std::min(lines_of_finish_ * block_cols / tile.cols, tile.ahead_depth * block_cols / line);
            for_finish = tile.ahead;
            tile.ahead += lines * line;
            tile.ahead_depth -= lines * line / block_cols;
        }
        // Panels are even, where that spares one of few rows, which takes as long as one of more. (A single row does
        // not.)
        const bool is_even = plan_.is_row_major && block_.rows() % plan_.rows > 1;
        const std::int64_t run = is_even ? ceiling(block_.rows(), panels_) : std::max(plan_.rows, plan_.run_rows);
        std::int32_t* const first_acc = tile.acc;
        std::int64_t handed_over = block_.row_begin;
        for (std::int64_t row = block_.row_begin; row < block_.row_end; row += run) {
            tile.x = x_.panel(row, begin);
            tile.rows = std::min(run, block_.row_end - row);
            const bool finishes = finish != nullptr && plan_.run_rows > 0 && tile.depth > 0;
            const auto hand_over = [&](std::int64_t first, std::int64_t rows) {
                const std::int32_t* const acc =
                    finishes ? whole_.data() + first % plan_.rows * plan_.cols : tile.acc + first * plan_.cols;
                SumsTile sums{.row = row + first,
                              .col = block_.col_begin + j,
                              .product = {.rows = rows,
                                          .cols = std::min(tile.cols, block_.cols() - j),
                                          .acc = acc,
                                          .stride = plan_.cols,
                                          .ahead = for_finish,
                                          .ahead_lines = lines,
                                          .ahead_stride = tile.ahead_stride,
                                          .next = after.depth > 0 ? &after : nullptr}};
                if (has_offsets(plan_)) {
                    sums.product.row_offsets = x_.offsets(row + first, part);
                    sums.product.col_offsets = offsets_.data() + j;
                }
                (*finish)(sums);
            };
            if (finishes) {
                tile.context = &hand_over;
                tile.whole = whole_.data();
                tile.finish = [](const void* context, std::int64_t first, std::int64_t rows) {
                    (*static_cast<const decltype(hand_over)*>(context))(first, rows);
                };
            }
            if (panels_ > 1) {
                const std::int64_t size = tile.ahead_depth * block_cols;  // of a block of output features
                const std::int64_t part = up(ceiling(size, panels_), line);
                tile.ahead_begin = std::min((row - block_.row_begin) / run * part, size);
                tile.ahead_end = std::min(tile.ahead_begin + part, size);
            }
            if (tile.depth > 0) plan_.multiply(tile);
            const std::int64_t end = row + tile.rows;
            // The sums of panels lie in a row.
            while (finish != nullptr && !finishes &&
                   (end - handed_over >= together_ || (end == block_.row_end && handed_over < end))) {
                const std::int64_t rows = std::min(together_, end - handed_over);
                hand_over(handed_over - row, rows);
                handed_over += rows;
            }
            // Sums of one slice alone are in the first-level cache, over and over in the same place.
            const bool begins_again = tile.first && handed_over == end;
            tile.acc = begins_again ? first_acc : tile.acc + tile.rows * plan_.cols;
        }
    }

    const XPanels& x_;
    const PackedPanel& w_;
    const Block& block_;
    const Plan& plan_;
    std::int64_t cols_;
    std::int64_t panels_;
    // As long as all of X is in the second-level cache, or none of it is to be, one tile's width of W passes at a time,
    // read from its first byte to its last.
    std::int64_t strip_;
    Scratch<std::int32_t> acc_;    // tile after tile, down the rows first
    Scratch<std::int32_t> whole_;  // of a panel, where runs finish
    Scratch<std::int8_t> regrouped_;
    Scratch<std::int32_t> offsets_;
    std::int64_t together_;         // rows that are finished at once
    std::int64_t lines_of_finish_;  // of what comes next
};

}  // namespace

// The product with a row of codes that are 1 for a plan that has X unsigned.
void sum_packed(const PackedPanel& w, std::int64_t cols, std::int64_t begin, std::int64_t end, std::int32_t* sums) {
    const Plan& plan = *kernels().few;
    const std::int64_t depth = end - begin;
    if (depth == 0) return std::fill(sums, sums + cols, 0);
    const Scratch<std::int8_t> codes(depth);
    std::fill(codes.data(), codes.data() + depth, std::int8_t{1 - 128});
    const Scratch<std::int8_t> panel(plan.rows * depth * plan.x_size);
    plan.place_row(codes.data(), depth, 0, panel.data());
    const Scratch<std::int32_t> acc(plan.rows * plan.cols);
    for (std::int64_t j = 0; j < cols; j += plan.cols) {
        const std::int64_t tile_cols = std::min(plan.cols, cols - j);
        plan.multiply({.x = panel.data(),
                       .rows = 1,
                       .w = w.data() + j * w.depth() + begin * block_cols,
                       .w_stride = w.stride(),
                       .cols = tile_cols,
                       .depth = depth,
                       .first = true,
                       .acc = acc.data()});
        std::copy(acc.data(), acc.data() + tile_cols, sums + j);
    }
}

const Plan& plan_for(std::int64_t rows) {
    for (const Plan* const plan : {kernels().few, kernels().some}) {
        if (rows <= plan->block_rows) return *plan;
    }
    return *kernels().many;
}

XPanels::XPanels(const Plan& plan, std::int64_t rows, std::int64_t k)
    : plan_(plan),
      rows_(up(rows, plan.rows)),
      depth_(padded_depth(k)),
      // A single panel passes once, so that there is nothing of W to keep.
      slice_(rows <= plan.rows && plan.regroup == nullptr ? max_int32_depth : slice_of(plan)),
      memory_(bytes(rows_)),
      offsets_(rows_ * parts_of(depth_)) {}

void XPanels::place(std::int64_t row, const std::int8_t* codes) const {
    const std::int64_t in_panel = row % plan_.rows;
    for (std::int64_t part = 0; part < parts_of(depth_); ++part) {
        std::uint32_t offset = 0;
        const std::int64_t part_end = std::min((part + 1) * max_int32_depth, depth_);
        for (std::int64_t begin = part * max_int32_depth; begin < part_end;) {
            const std::int64_t end = slice_end(begin);
            auto* const target = memory_.data() + (panel(row - in_panel, begin) - memory_.data());
            offset += static_cast<std::uint32_t>(plan_.place_row(codes + begin, end - begin, in_panel, target));
            begin = end;
        }
        offsets_[part * rows_ + row] = static_cast<std::int32_t>(offset);
    }
}

std::int64_t XPanels::slice_end(std::int64_t begin) const noexcept {
    const std::int64_t part_end = (begin / max_int32_depth + 1) * max_int32_depth;
    return std::min({begin + slice_, part_end, depth_});
}

const std::int8_t* XPanels::panel(std::int64_t row, std::int64_t begin) const noexcept {
    return memory_.data() + (begin * rows_ + row * (slice_end(begin) - begin)) * plan_.x_size;
}

const std::int32_t* XPanels::offsets(std::int64_t row, std::int64_t begin) const noexcept {
    return offsets_.data() + begin / max_int32_depth * rows_ + row;
}

void for_each_block(const Blocking& blocking, std::int64_t m, std::span<const std::int64_t> widths, std::int64_t k,
                    const std::function<void(const Turn&)>& work) {
    constexpr std::int64_t least_rows = 64;
    // Nanoseconds that are worth a thread's taking them over, so that all that it costs (two microseconds, and that
    // lines of X and of the output are in another's caches) is made up for, and that are worth its waking.
    constexpr double least_time = 10e3;
    constexpr double time_to_wake = 100e3;
    constexpr double bytes_of_w = 29.0;  // that come in a nanosecond, from a cache
    const auto time_of = [&](std::int64_t of_rows, std::int64_t of_cols) {
        const double codes = static_cast<double>(of_cols) * static_cast<double>(std::max<std::int64_t>(k, 1));
        return codes * std::max(static_cast<double>(of_rows) / static_cast<double>(blocking.speed), 1 / bytes_of_w);
    };
    const std::int64_t n = std::accumulate(widths.begin(), widths.end(), std::int64_t{0});
    const auto blocks_of_width = [&](std::int64_t most) {
        return std::accumulate(widths.begin(), widths.end(), std::int64_t{0},
                               [&](std::int64_t sum, std::int64_t width) { return sum + ceiling(width, most); });
    };
    // Four blocks a thread even out threads of unequal speed.
    const std::int64_t threads = num_threads();
    const double most_parts = std::min(time_of(m, n) / least_time, 4.0 * static_cast<double>(threads));
    const std::int64_t wanted = threads > 1 && most_parts >= 2 ? static_cast<std::int64_t>(most_parts) : 1;
    std::int64_t row_blocks = ceiling(m, blocking.block_rows);
    std::int64_t col_blocks = blocks_of_width(most_cols);
    const auto more = [&](std::int64_t& blocks, std::int64_t others, std::int64_t most) {
        blocks = std::clamp(ceiling(wanted, others), blocks, std::max(blocks, most));
    };
    more(row_blocks, col_blocks, ceiling(m, least_rows));
    more(col_blocks, row_blocks, blocks_of_width(blocking.cols));
    // As many for each thread.
    while (wanted > 1 && row_blocks * col_blocks % threads != 0 && row_blocks < ceiling(m, least_rows)) ++row_blocks;
    const std::int64_t rows = up(ceiling(m, row_blocks), blocking.rows);
    const std::int64_t cols = up(ceiling(n, col_blocks), blocking.cols);
    row_blocks = ceiling(m, rows);
    struct Columns {
        std::size_t output;
        std::int64_t begin, end;
    };
    std::vector<Columns> columns;
    for (std::size_t output = 0; output < widths.size(); ++output) {
        const std::int64_t width = widths[output];
        const std::int64_t step = up(ceiling(width, ceiling(width, cols)), blocking.cols);
        for (std::int64_t col = 0; col < width; col += step)
            columns.push_back({output, col, std::min(col + step, width)});
    }
    col_blocks = std::ssize(columns);
    const auto columns_of = [&](std::int64_t i) { return columns[static_cast<std::size_t>(i % col_blocks)]; };
    const auto block = [&](std::int64_t i) {
        const std::int64_t row = i / col_blocks * rows;
        return Block{row, std::min(row + rows, m), columns_of(i).begin, columns_of(i).end};
    };
    const bool is_deep = (rows + cols) * k > near_size();
    const std::int64_t blocks = row_blocks * col_blocks;
    const auto blocks_of = [&](double time) {
        const double count = std::ceil(time / time_of(std::min(m, rows), std::min(n, cols)));
        return static_cast<std::int64_t>(std::min(count, 1e9));
    };
    const std::int64_t grain = std::min(blocks_of(least_time), wanted > 1 ? blocks / 2 : blocks);
    parallel_for(
        blocks, grain,
        [&](std::int64_t begin, std::int64_t end) {
            bool is_first = true;
            for (std::int64_t i = begin; i < end; ++i) {
                interruption_point();
                const std::size_t output = columns_of(i).output;
                const bool has_next = i + 1 < end && columns_of(i + 1).output == output;
                work({output, block(i), has_next && !is_deep ? block(i + 1) : Block{}, is_first, is_deep});
                is_first = !has_next;
            }
        },
        blocks_of(time_to_wake));
}

void multiply(const XPanels& x, const PackedPanel& w, const std::int32_t* w_sums, const Block& block,
              const std::function<void(SumsTile&)>& finish, std::int64_t lines) {
    const BlockProduct product(x, w, block, lines);
    if (x.depth() <= max_int32_depth) return product.run(0, x.depth(), w_sums, finish);

    const std::int64_t cols = whole_blocks(block.cols());
    const Scratch<std::int64_t> wide(block.rows() * cols);
    std::fill(wide.data(), wide.data() + block.rows() * cols, 0);
    const Scratch<std::int32_t> part_sums(cols);
    for (std::int64_t begin = 0; begin < x.depth(); begin += max_int32_depth) {
        const std::int64_t end = std::min(begin + max_int32_depth, x.depth());
        if (x.plan().x_is_unsigned) sum_packed(w, cols, begin, end, part_sums.data());
        const auto add = [&](SumsTile& tile) {
            const std::int64_t place = (tile.row - block.row_begin) * cols + tile.col - block.col_begin;
            for (std::int64_t i = 0; i < tile.product.rows; ++i) {
                for (std::int64_t j = 0; j < tile.product.cols; ++j) wide[place + i * cols + j] += tile.sum(i, j);
            }
            if (end < x.depth()) return;
            tile.product.stride = cols;
            tile.wide = wide.data() + place;
            finish(tile);
        };
        product.run(begin, end, part_sums.data(), add);
    }
}

namespace {

// Bytes of one row of a block, past the caches where the processor can.
void write_past(char* target, const char* source, std::int64_t size) {
#if defined(__SSE2__)
    const auto before = static_cast<std::int64_t>(-reinterpret_cast<std::uintptr_t>(target) % line);
    const std::int64_t head = std::min(before, size);
    __builtin_memcpy(target, source, static_cast<std::size_t>(head));
    std::int64_t i = head;
    for (; i + line <= size; i += line) {
        for (std::int64_t part = i; part < i + line; part += 16) {
            const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + part));
            _mm_stream_si128(reinterpret_cast<__m128i*>(target + part), bytes);
        }
    }
    __builtin_memcpy(target + i, source + i, static_cast<std::size_t>(size - i));
#else
    __builtin_memcpy(target, source, static_cast<std::size_t>(size));
#endif
}

}  // namespace

// From so many halves of the second-level cache on, an output is written past the caches. The layer itself takes about
// as long either way, but what reads the output next finds it in the third-level cache: a gelu of 13 MiB takes 20 ms
// instead of 28, all of MiniLM with 16 sentences a twentieth less time (second-level cache: 2 MiB).
constexpr std::int64_t cached_outputs = 16;

OutputBlock::OutputBlock(const Matrix& out, const Turn& turn)
    : out_(out),
      block_(turn.block),
      waits_(out.col_stride == 1 && block_.rows() > 32 &&
             out.rows * out.cols * size_of(out.dtype) > cached_outputs * near_size()),
      stride_(waits_ ? up(block_.cols() * size_of(out.dtype), line) + line : out.row_stride * size_of(out.dtype)),
      next_(turn.is_first ? block_ : turn.next),
      looks_below_(turn.is_deep && !waits_ && out.col_stride == 1),
      memory_(waits_ ? block_.rows() * stride_ : 0) {
    if (turn.is_deep || waits_ || out.col_stride != 1) {
        next_ = Block{};
    } else if (turn.is_first) {
        fetch_next(block_.rows() * stride_);
        next_ = turn.next;
        due_ = 0;
    }
}

void* OutputBlock::at(std::int64_t row, std::int64_t col) const {
    if (!waits_) return cpu::at(out_, row, col);
    return memory_.data() + (row - block_.row_begin) * stride_ + (col - block_.col_begin) * size_of(out_.dtype);
}

void OutputBlock::fetch(std::int64_t row, std::int64_t col, std::int64_t rows, std::int64_t cols) {
    if (!looks_below_) return fetch_next(rows * cols * size_of(out_.dtype));
    constexpr std::int64_t ahead = 32;  // rows, which is soon enough
    const std::int64_t end = std::min(row + rows + ahead, block_.row_end);
    for (std::int64_t i = row == block_.row_begin ? row : row + ahead; i < end; ++i) {
        const auto* const begin = static_cast<const char*>(at(i, col));
        for (std::int64_t j = 0; j < cols * size_of(out_.dtype); j += line) __builtin_prefetch(begin + j, 1, 2);
    }
}

void OutputBlock::fetch_next(std::int64_t bytes) {
    const std::int64_t width = next_.cols() * size_of(out_.dtype);
    for (due_ += bytes; due_ > 0 && next_.rows() > 0; due_ -= line) {
        const auto* const row = static_cast<const char*>(cpu::at(out_, next_.row_begin, next_.col_begin));
        __builtin_prefetch(row + fetched_, 1, 2);
        fetched_ += line;
        if (fetched_ < width) continue;
        fetched_ = 0;
        ++next_.row_begin;
    }
}

void OutputBlock::write() const {
    if (!waits_) return;
    for (std::int64_t row = block_.row_begin; row < block_.row_end; ++row) {
        write_past(static_cast<char*>(cpu::at(out_, row, block_.col_begin)),
                   static_cast<const char*>(at(row, block_.col_begin)), block_.cols() * size_of(out_.dtype));
    }
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

void put_sums(const SumsTile& tile, void* out, std::int64_t stride) {
    kernels().epilogue(tile.product, DType::i32, out, stride);
}

namespace {

void put_tile(const SumsTile& tile, const Matrix& out) {
    for (std::int64_t i = 0; i < tile.product.rows; ++i) {
        for (std::int64_t j = 0; j < tile.product.cols; ++j) {
            const std::int64_t sum = tile.sum(i, j);
            const auto value = static_cast<std::int32_t>(sum);
            if (value != sum) {
                throw Error(ErrorKind::value, "int8_matmul: out: expected sums that fit int32, got " +
                                                  std::to_string(sum) + " at row " + std::to_string(tile.row + i) +
                                                  ", column " + std::to_string(tile.col + j));
            }
            __builtin_memcpy(at(out, tile.row + i, tile.col + j), &value, sizeof value);
        }
    }
}

}  // namespace

void Backend::int8_matmul(ConstMatrix a, ConstMatrix b, Matrix out, Layout b_layout, Stream /*stream*/) const {
    const XPanels x(plan_for(a.rows), a.rows, a.cols);
    parallel_for(a.rows, row_grain(a.cols), [&](std::int64_t begin, std::int64_t end) {
        const Scratch<std::int8_t> codes(x.depth());
        std::fill(codes.data() + a.cols, codes.data() + x.depth(), std::int8_t{0});
        for (std::int64_t i = begin; i < end; ++i) {
            const std::int8_t* const source = contiguous_codes(a, i, codes.data());
            if (source != codes.data()) std::copy(source, source + a.cols, codes.data());
            x.place(i, codes.data());
        }
    });
    const bool sums_are_read = x.plan().x_is_unsigned && x.depth() <= max_int32_depth;
    // W that passes once is summed block by block, when it is about to be multiplied.
    const bool passes_again = a.rows > x.blocking().block_rows;
    const bool summed_once = sums_are_read && passes_again && b_layout == Layout::packed;
    const Scratch<std::int32_t> sums(summed_once ? whole_blocks(out.cols) : 0);
    if (summed_once) {
        parallel_for(ceiling(out.cols, most_cols), 1, [&](std::int64_t begin, std::int64_t end) {
            const std::int64_t first = begin * most_cols;
            const PackedPanel w(b, b_layout, first, std::min(end * most_cols, out.cols));
            const std::int64_t cols = std::min(end * most_cols, whole_blocks(out.cols)) - first;
            sum_packed(w, cols, 0, w.depth(), sums.data() + first);
        });
    }
    for_each_block(x.blocking(), out.rows, {&out.cols, 1}, a.cols, [&](const Turn& turn) {
        const Block& block = turn.block;
        const PackedPanel w(b, b_layout, block.col_begin, block.col_end);
        const std::int64_t cols = whole_blocks(block.cols());
        const bool summed_here = sums_are_read && !summed_once;
        const Scratch<std::int32_t> block_sums(summed_here ? cols : 0);
        if (summed_here) sum_packed(w, cols, 0, w.depth(), block_sums.data());
        const std::int32_t* const w_sums = summed_once ? sums.data() + block.col_begin : block_sums.data();
        if (out.col_stride != 1 || x.depth() > max_int32_depth) {
            return multiply(x, w, w_sums, block, [&](SumsTile& tile) { put_tile(tile, out); });
        }
        OutputBlock rows(out, turn);
        multiply(x, w, w_sums, block, [&](SumsTile& tile) {
            rows.fetch(tile.row, tile.col, tile.product.rows, tile.product.cols);
            put_sums(tile, rows.at(tile.row, tile.col), rows.stride());
        });
        rows.write();
    });
}

}  // namespace octavo::cpu
