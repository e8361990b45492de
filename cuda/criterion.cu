// The outlier criterion where it is relative to a median, or capped (octavo/outlier.hpp), over the magnitudes of a row
// or the largest ones of the columns.
//
// Everything comes down to one limit in the order of magnitudes (of equal ones the first column on top), from which on
// elements are outliers: t, or where the cap allows fewer the last element that it allows. A block has a row, and
// counts; counts are integers, so no order of threads matters.
//
// The median, cut to 16 bits, is found bit by bit: a thread holds the upper halves of 16 magnitudes, two in a register,
// and a step takes 44 instructions (sm_80 to sm_120), one of them a barrier. What else is wanted of a given rank is
// found digit by digit, by counting the elements that have each value of 8 bits: the last element that the cap allows,
// and the median of rows that are longer than registers hold. That is slower, as many elements have the same value, and
// few calls come to it.
#include <algorithm>

#include "ahead.cuh"
#include "criterion.cuh"
#include "device.cuh"
#include "memory.hpp"
#include "octavo/outlier.hpp"
#include "operations.hpp"
#include "ptx.cuh"

namespace octavo::cuda {
namespace {

constexpr int most_threads = 1024;
constexpr int held = 16;  // magnitudes of a thread
constexpr int least_threads_of_columns = 256;
constexpr int rows_under_way = 8;
constexpr int digits = 256;
constexpr Limit infinite_limit = Limit{infinite_magnitude} << 32;

// The criterion as the device needs it.
struct Criterion {
    float times_median;      // 0: absolute
    std::uint32_t absolute;  // the magnitude of the threshold
    std::int64_t most;
};

__device__ std::int32_t sum_of_warp(std::int32_t value) {
#if defined(OCTAVO_SIMT) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800)
    return __reduce_add_sync(whole_warp, value);
#else
    return reduce_warp(value, [](std::int32_t a, std::int32_t b) { return a + b; });
#endif
}

// The sum of a number of each thread. All threads of the block must take part, here and below.
class BlockSum {
public:
    __device__ std::int32_t operator()(std::int32_t own) {
        // Two, used in turn: whoever writes one again has passed the barrier of the other, after all have read it.
        __shared__ std::int32_t partial[2][warp_size];
        const int lane = static_cast<int>(threadIdx.x) % warp_size;
        const int warps = static_cast<int>(blockDim.x) / warp_size;
        own = sum_of_warp(own);
        if (lane == 0) partial[turn_][threadIdx.x / warp_size] = own;
        __syncthreads();
        own = sum_of_warp(lane < warps ? partial[turn_][lane] : 0);
        turn_ ^= 1;
        return own;
    }

private:
    int turn_ = 0;
};

// The upper halves of the magnitudes of a thread's elements, the thread-th and every blockDim.x-th after it; each has
// bit 15 set, from which a subtraction may borrow.
struct UpperHalves {
    std::uint32_t pairs[held / 2] = {};

    __device__ void put(int element, std::uint32_t magnitude) {
        pairs[element / 2] |= (magnitude >> 16 | 0x8000U) << (16 * (element % 2));
    }
    // Which of them are at least `least`, at most 0x7FFF: a bit for each.
    __device__ std::uint32_t from(std::uint32_t least) const {
        constexpr std::uint32_t spare = 0x80008000U;
        std::uint32_t found = 0;
#pragma unroll
        for (int i = 0; i < held / 2; ++i) found |= (pairs[i] - least * 0x10001U) >> i & spare >> i;
        return found;
    }
    __device__ static int place_of(int element) { return 16 * (element % 2) + 15 - element / 2; }
};

// The digit of the item of which `rank` come before, in the order of digits; then `rank` counts those of the same
// digit. `digit` is negative for what does not count.
template <class Digit>
__device__ int select(std::int64_t k, std::int32_t& rank, Digit digit) {
    __shared__ std::int32_t histogram[digits];
    __shared__ std::int32_t chosen[2];
    const auto threads = static_cast<int>(blockDim.x);
    for (int i = static_cast<int>(threadIdx.x); i < digits; i += threads) histogram[i] = 0;
    __syncthreads();
    for (std::int64_t j = threadIdx.x; j < k; j += threads) {
        const int own = digit(j);
        if (own >= 0) atomicAdd(&histogram[own], 1);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        int place = 0;
        std::int32_t left = rank;
        while (place < digits - 1 && left >= histogram[place]) left -= histogram[place++];
        chosen[0] = place;
        chosen[1] = left;
    }
    __syncthreads();
    const int result = chosen[0];
    rank = chosen[1];
    __syncthreads();
    return result;
}

// The upper half of the median of those above 0, which are `above_zero`.
__device__ std::uint32_t median_of(const UpperHalves& halves, std::int32_t above_zero, BlockSum& sum) {
    const std::int32_t as_large = above_zero - (above_zero - 1) / 2;  // as the median, at least
    std::uint32_t median = 0;
#pragma unroll 1
    for (std::uint32_t bit = 0x4000U; bit != 0; bit >>= 1) {
        if (sum(__popc(halves.from(median | bit))) >= as_large) median |= bit;
    }
    return median;
}
template <class Magnitude>
__device__ std::uint32_t median_of(std::int64_t k, std::int32_t above_zero, Magnitude magnitude) {
    std::int32_t rank = (above_zero - 1) / 2;
    const int upper = select(k, rank, [&](std::int64_t j) {
        const std::uint32_t bits = magnitude(j);
        return bits == 0 ? -1 : static_cast<int>(bits >> 23);
    });
    const int lower = select(k, rank, [&](std::int64_t j) {
        const std::uint32_t bits = magnitude(j);
        return bits == 0 || static_cast<int>(bits >> 23) != upper ? -1 : static_cast<int>(bits >> 16 & 0x7FU);
    });
    return static_cast<std::uint32_t>(upper << 7 | lower);
}

// The rank of the `most`-th element from the top.
template <class Magnitude>
__device__ Limit capped_limit(std::int64_t k, std::int64_t most, Magnitude magnitude) {
    if (most == 0) return infinite_limit;
    auto rank = static_cast<std::int32_t>(most - 1);
    Limit found = 0;
    for (int shift = 56; shift >= 0; shift -= 8) {
        const int fromtop = select(k, rank, [&](std::int64_t j) {
            const Limit own = rank_of(magnitude(j), j);
            if (shift < 56 && own >> (shift + 8) != found >> (shift + 8)) return -1;
            return 255 - static_cast<int>(own >> shift & 0xFFU);
        });
        found |= static_cast<Limit>(255 - fromtop) << shift;
    }
    return found < infinite_limit ? found : infinite_limit;
}

// Finds the limit of a row of `x`, from which on its elements are outliers, and marks those in `words`
// [words_for(k)]: writes all words, or, where `adds`, only adds to what is marked there. `sum` is the block's only one.
template <class T>
__device__ Limit apply_to_row(const View<const T>& x, std::int64_t row, const Criterion& criterion, bool adds,
                              std::uint32_t* words, BlockSum& sum) {
    const std::int64_t k = x.cols;
    const auto threads = static_cast<int>(blockDim.x);
    const auto thread = static_cast<int>(threadIdx.x);
    const auto magnitude = [&](std::int64_t j) { return magnitude_of(to_float(*x.at(row, j))); };
    const auto count = [&](auto test) {
        std::int32_t own = 0;
#pragma unroll 1  // the rest of the registers is taken
        for (std::int64_t j = thread; j < k; j += threads) own += test(magnitude(j)) ? 1 : 0;
        return sum(own);
    };
    const bool fits = k <= std::int64_t{held} * threads;
    UpperHalves halves;
    std::int32_t above_zero = 0;
    if (fits) {
        const T* next = x.at(row, thread);  // one address: of all at once there would be too many for the registers
        const auto size = static_cast<int>(k);
#pragma unroll
        for (int e = 0; e < held; ++e, next += threads * x.col_stride) {
            const std::uint32_t own = e * threads + thread < size ? magnitude_of(to_float(*next)) : 0U;
            halves.put(e, own);
            above_zero += own > 0 ? 1 : 0;
        }
    }
    std::uint32_t least = criterion.absolute;
    if (criterion.times_median > 0.0F) {
        above_zero = fits ? sum(above_zero) : count([](std::uint32_t own) { return own > 0; });
        least = infinite_magnitude;
        if (above_zero > 0) {
            const std::uint32_t median =
                fits ? median_of(halves, above_zero, sum) : median_of(k, above_zero, magnitude);
            least = max(magnitude_of(__fmul_rn(criterion.times_median, __uint_as_float(median << 16))), 1U);
        }
    }
    Limit limit = Limit{least} << 32;
    // At most as many as their upper halves would have it.
    const bool may_be_more = !fits || sum(__popc(halves.from(least >> 16))) > criterion.most;
    if (may_be_more && count([&](std::uint32_t own) { return own >= least; }) > criterion.most) {
        limit = capped_limit(k, criterion.most, magnitude);
    }
    const std::uint32_t found = fits ? halves.from(static_cast<std::uint32_t>(limit >> 48)) : ~0U;
    if (adds && __ballot_sync(whole_warp, found != 0 ? 1 : 0) == 0) return limit;
    const int lane = thread % warp_size;
    int e = 0;
    for (std::int64_t first = thread - lane; first < k; first += threads, ++e) {
        const std::int64_t j = first + lane;
        const bool is_candidate = j < k && (!fits || (found >> UpperHalves::place_of(e) & 1U) != 0);
        const bool is_marked = is_candidate && rank_of(magnitude(j), j) >= limit;
        const std::uint32_t word = __ballot_sync(whole_warp, is_marked ? 1 : 0);
        if (lane != 0) continue;
        if (!adds) {
            words[first / warp_size] = word;
        } else if (word != 0) {
            atomicOr(&words[first / warp_size], word);
        }
    }
    return limit;
}

// Every row as a call of its own. Few have a part of the marks each; of more all have one part, which blocks that wait
// for each other clear first.
template <class T>
__global__ void __launch_bounds__(most_threads)
    rows_kernel(View<const T> x, Criterion criterion, Limit* limits, ColumnMarks marks, Ahead ahead) {
    let_next_launch_begin();
    ask_for(ahead);
    const bool adds = marks.parts < x.rows;
    const auto words = static_cast<unsigned>(words_for(x.cols));
    if (adds) {
        const unsigned threads = gridDim.x * blockDim.x;
        for (unsigned w = blockIdx.x * blockDim.x + threadIdx.x; w < words; w += threads) marks.words[w] = 0;
        synchronize_grid();
    }
    BlockSum sum;
    for (unsigned row = blockIdx.x; row < x.rows; row += gridDim.x) {
        const Limit limit = apply_to_row(x, row, criterion, adds, marks.words + (adds ? 0 : row * words), sum);
        if (threadIdx.x == 0) limits[row] = limit;
    }
}

// All rows as one call: the largest magnitudes of the columns, of which one block makes the marks. A launch of blocks
// that wait for each other.
template <class T>
__global__ void __launch_bounds__(most_threads)
    columns_kernel(View<const T> x, Criterion criterion, std::uint32_t* maxima, std::uint32_t* words, Ahead ahead) {
    let_next_launch_begin();
    ask_for(ahead);
    const std::int64_t threads = blockDim.x;
    const std::int64_t blocks = gridDim.x;
    for (std::int64_t j = blockIdx.x * threads + threadIdx.x; j < x.cols; j += blocks * threads) maxima[j] = 0;
    synchronize_grid();
    const std::int64_t tiles = (x.cols + threads - 1) / threads;
    const std::int64_t parts = blocks > tiles ? blocks / tiles : 1;
    const std::int64_t rows_per_part = (x.rows + parts - 1) / parts;
    for (std::int64_t tile = blockIdx.x; tile < tiles * parts; tile += blocks) {
        const std::int64_t column = tile % tiles * threads + threadIdx.x;
        const std::int64_t begin = tile / tiles * rows_per_part;
        const std::int64_t end = begin + rows_per_part < x.rows ? begin + rows_per_part : x.rows;
        if (column >= x.cols || begin >= end) continue;
        std::uint32_t largest = 0;
#pragma unroll rows_under_way
        for (std::int64_t row = begin; row < end; ++row) {
            const std::uint32_t magnitude = magnitude_of(to_float(*x.at(row, column)));
            largest = largest > magnitude ? largest : magnitude;
        }
        atomicMax(&maxima[column], largest);
    }
    synchronize_grid();
    if (blockIdx.x > 0) return;
    const View<const float> of_columns{reinterpret_cast<const float*>(maxima), 1, x.cols, x.cols, 1};
    BlockSum sum;
    apply_to_row(of_columns, 0, criterion, false, words, sum);
}

}  // namespace

std::int64_t criterion_parts(std::int64_t rows, bool per_row) {
    // As many as cost whoever reads them less than to clear one part first.
    constexpr std::int64_t most_parts = 16;
    return per_row && rows <= most_parts ? std::max<std::int64_t>(rows, 1) : 1;
}

void apply_criterion(ConstMatrix x, const LinearOptions& options, ColumnMarks marks, std::uint32_t* maxima,
                     Limit* limits, const Ahead& ahead, cudaStream_t stream) {
    if (x.cols == 0) return;
    if (x.rows == 0) {
        return check(
            cudaMemsetAsync(marks.words, 0, static_cast<std::size_t>(words_for(x.cols)) * sizeof *marks.words, stream),
            "cudaMemsetAsync");
    }
    const bool per_row = limits != nullptr;
    std::uint32_t absolute = 0;
    __builtin_memcpy(&absolute, &options.threshold, sizeof absolute);
    const Criterion criterion{.times_median = times_median(options, per_row ? 1 : x.rows),
                              .absolute = absolute & 0x7FFFFFFFU,
                              .most = most_outliers(options, x.cols)};
    const std::int64_t threads = std::clamp<std::int64_t>(blocks_for(blocks_for(x.cols, held), warp_size) * warp_size,
                                                          per_row ? warp_size : least_threads_of_columns, most_threads);
    // Blocks that wait for each other are no more than are resident at the registers of a thread of `most_threads`.
    constexpr std::int64_t most_blocks = 16;  // of a multiprocessor
    const std::int64_t resident =
        device_facts().multiprocessors * std::min<std::int64_t>(most_blocks, most_threads / threads);
    const bool meets = !per_row || marks.parts < x.rows;
    const std::int64_t wanted = std::max(
        per_row ? x.rows : blocks_for(x.cols, threads) * blocks_for(x.rows, rows_under_way), blocks_to_ask(ahead));
    const Grid grid{.blocks = static_cast<unsigned>(meets ? std::min(resident, wanted) : wanted),
                    .threads = static_cast<unsigned>(threads),
                    .cooperative = meets};
    with_float(x.dtype, [&]<class T>(Type<T>) {
        if (per_row) {
            launch(rows_kernel<T>, grid, stream, view_of<T>(x), criterion, limits, marks, ahead);
        } else {
            launch(columns_kernel<T>, grid, stream, view_of<T>(x), criterion, maxima, marks.words, ahead);
        }
    });
}

}  // namespace octavo::cuda
