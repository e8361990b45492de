// What is read of marked columns (ColumnMarks): single words, and the ordered list of all of them.
#pragma once

#include <cstdint>

#include "device.cuh"
#include "operations.hpp"

namespace octavo::cuda {

// How many of ascending numbers are less than `value`.
template <class Number>
__device__ std::int64_t lower_bound(const Number* numbers, std::int64_t size, std::int64_t stride, std::int64_t value) {
    std::int64_t begin = 0;
    std::int64_t end = size;
    while (begin < end) {
        const std::int64_t middle = (begin + end) / 2;
        if (numbers[middle * stride] < value) {
            begin = middle + 1;
        } else {
            end = middle;
        }
    }
    return begin;
}

// Which of the columns 32 * index to 32 * index + 31 are marked.
__device__ inline std::uint32_t marked_word(const ColumnMarks& marks, std::int64_t words, std::int64_t index) {
    std::uint32_t found = 0;
    if (marks.listed != nullptr) {
        const std::int64_t first = 32 * index;
        std::int64_t place = lower_bound(marks.listed, marks.listed_size, marks.listed_stride, first);
        for (; place < marks.listed_size; ++place) {
            const std::int64_t bit = marks.listed[place * marks.listed_stride] - first;
            if (bit >= 32) break;
            if (first + bit < marks.columns) found |= 1U << bit;
        }
    }
    for (std::int64_t part = 0; part < marks.parts; ++part) found |= marks.words[part * words + index];
    return found;
}

// Writes the marked columns of `k` in ascending order, from place `first_place` on as many as `columns` has room for,
// and how many there are. All threads of one block must take part, in whole warps.
//
// A thread has one word at a time; the places of its columns are a running sum over the words before it. Static, so
// that its shared variable is each kernel file's own, which the emulated GPU can put a red zone around.
__device__ static inline void list_marked(const ColumnMarks& marks, std::int64_t k, Span<std::int32_t> columns,
                                          Span<std::int32_t> count, std::int32_t first_place = 0) {
    __shared__ std::int32_t warp_totals[warp_size];
    const int lane = static_cast<int>(threadIdx.x) % warp_size;
    const int warp = static_cast<int>(threadIdx.x) / warp_size;
    const int warps = static_cast<int>(blockDim.x) / warp_size;
    const std::int64_t words = words_for(k);
    std::int32_t listed = 0;
    for (std::int64_t first = 0; first < words; first += blockDim.x) {
        const std::int64_t index = first + threadIdx.x;
        std::uint32_t word = index < words ? marked_word(marks, words, index) : 0;
        std::int32_t upto = __popc(word);  // columns up to this lane's, in the warp
        const std::int32_t own = upto;
        for (int distance = 1; distance < warp_size; distance *= 2) {
            const std::int32_t before = __shfl_up_sync(whole_warp, upto, static_cast<unsigned>(distance));
            if (lane >= distance) upto += before;
        }
        if (lane == warp_size - 1) warp_totals[warp] = upto;
        __syncthreads();
        std::int32_t place = listed + upto - own;
        for (int other = 0; other < warps; ++other) {
            const std::int32_t total = warp_totals[other];
            if (other < warp) place += total;
            listed += total;
        }
        for (; word != 0; word &= word - 1) {
            const std::int32_t target = place++ - first_place;
            if (target < 0 || target >= columns.size) continue;
            columns[target] = static_cast<std::int32_t>(index * 32 + __ffs(static_cast<int>(word)) - 1);
        }
        __syncthreads();  // warp_totals is written again
    }
    if (threadIdx.x == 0) count[0] = listed;
}

}  // namespace octavo::cuda
