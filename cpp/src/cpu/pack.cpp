#include "cpu/pack.hpp"

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>

#include "backend.hpp"
#include "cpu/rows.hpp"
#include "cpu/threads.hpp"

namespace octavo::cpu {
namespace {

// Bring rows [begin, end) of codes into packed order.
void pack_rows(const ConstMatrix& codes, std::int64_t begin, std::int64_t end, std::int8_t* packed) {
    const std::int64_t stride = codes.col_stride == 1 ? 0 : block_cols * codes.cols;
    const Scratch<std::int8_t> copy(stride);
    for (std::int64_t row = begin; row < end; row += block_cols) {
        const std::int64_t cols = std::min(block_cols, end - row);
        std::int8_t* const target = packed + (row - begin) * padded_depth(codes.cols);
        if (codes.col_stride == 1) {
            kernels().pack(static_cast<const std::int8_t*>(at(codes, row, 0)), codes.row_stride, cols, codes.cols,
                           target);
            continue;
        }
        for (std::int64_t j = 0; j < cols; ++j) contiguous_codes(codes, row + j, copy.data() + j * codes.cols);
        kernels().pack(copy.data(), codes.cols, cols, codes.cols, target);
    }
}

}  // namespace

void ask_for_large_pages(const void* memory, std::int64_t size) noexcept {
#ifdef MADV_HUGEPAGE
    constexpr std::uintptr_t page = std::uintptr_t{2} << 20U;
    const auto address = reinterpret_cast<std::uintptr_t>(memory);
    const std::uintptr_t first = (address + page - 1) / page * page;
    const std::uintptr_t end = (address + static_cast<std::uintptr_t>(size)) / page * page;
    if (first >= end) return;
    // NOLINTNEXTLINE(performance-no-int-to-ptr): pages have addresses
    madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#else
    static_cast<void>(memory);
    static_cast<void>(size);
#endif
}

void gather_features(const ConstVector& values, std::int64_t begin, std::int64_t count, float* target) {
    if (values.size == 1) {
        std::fill(target, target + count, get<float>(values, 0));
    } else {
        kernels().load(values.dtype, at(values, begin), values.stride, count, target);
    }
    std::fill(target + count, target + whole_blocks(count), 0.0F);
}

PackedPanel::PackedPanel(const ConstMatrix& codes, Layout layout, std::int64_t begin, std::int64_t end)
    : depth_(padded_depth(codes.cols)) {
    if (layout == Layout::packed) {
        data_ = static_cast<const std::int8_t*>(codes.data) + begin * depth_;
        return;
    }
    memory_.emplace(packed_size(end - begin, codes.cols));
    pack_rows(codes, begin, end, memory_->data());
    data_ = memory_->data();
}

void Backend::pack(ConstMatrix codes, Vector packed, Stream /*stream*/) const {
    const std::int64_t blocks = (codes.rows + block_cols - 1) / block_cols;
    ask_for_large_pages(packed.data, packed_size(codes.rows, codes.cols));
    parallel_for(blocks, row_grain(block_cols * codes.cols), [&](std::int64_t begin, std::int64_t end) {
        pack_rows(codes, begin * block_cols, std::min(end * block_cols, codes.rows),
                  static_cast<std::int8_t*>(packed.data) + begin * block_cols * padded_depth(codes.cols));
    });
}

void Backend::unpack(ConstVector packed, Matrix codes, Stream /*stream*/) const {
    const std::int64_t depth = padded_depth(codes.cols);
    parallel_for(codes.rows, row_grain(codes.cols), [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t row = begin; row < end; ++row) {
            const auto* const source = static_cast<const std::int8_t*>(packed.data) + packed_index(row, 0, depth);
            for (std::int64_t col = 0; col < codes.cols; ++col) {
                *static_cast<std::int8_t*>(at(codes, row, col)) = source[col / 4 * 64 + col % 4];
            }
        }
    });
}

}  // namespace octavo::cpu
