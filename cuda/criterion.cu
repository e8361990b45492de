// The outlier criterion where it is relative to a median, or capped (octavo/outlier.hpp), over the magnitudes of a row
// or the largest ones of the columns.
//
// Everything comes down to one limit in the order of magnitudes (of equal ones the first column on top), from which on
// elements are outliers: t, or where the cap allows fewer the last element that it allows. A block has a row. It finds
// what is wanted of a given rank digit by digit, by counting the elements that have each value of 8 bits; counts are
// integers, so no order of threads matters. The median has 16 bits: two counts. The last element allowed has 64, in
// eight; few calls come to that.
#include <algorithm>

#include "criterion.cuh"
#include "device.cuh"
#include "memory.hpp"
#include "octavo/outlier.hpp"
#include "operations.hpp"

namespace octavo::cuda {
namespace {

constexpr int threads = 256;
constexpr int digits = 256;
constexpr Limit infinite_limit = Limit{infinite_magnitude} << 32;

// The criterion as the device needs it.
struct Criterion {
    float times_median;      // 0: absolute
    std::uint32_t absolute;  // the magnitude of the threshold
    std::int64_t most;
};

// How many of [0, k) pass. All threads of the block must take part, here and below.
template <class Test>
__device__ std::int32_t count(std::int64_t k, Test test) {
    __shared__ std::int32_t total;
    if (threadIdx.x == 0) total = 0;
    __syncthreads();
    std::int32_t own = 0;
    for (std::int64_t j = threadIdx.x; j < k; j += threads) own += test(j) ? 1 : 0;
    atomicAdd(&total, own);
    __syncthreads();
    const std::int32_t result = total;
    __syncthreads();
    return result;
}

// The digit of the item of which `rank` come before, in the order of digits; then `rank` counts those of the same
// digit. `digit` is negative for what does not count.
template <class Digit>
__device__ int select(std::int64_t k, std::int32_t& rank, Digit digit) {
    __shared__ std::int32_t histogram[digits];
    __shared__ std::int32_t chosen[2];
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

// t, as a magnitude, of k of them.
template <class Magnitude>
__device__ std::uint32_t relative_limit(std::int64_t k, float times_median, Magnitude magnitude) {
    const std::int32_t above_zero = count(k, [&](std::int64_t j) { return magnitude(j) > 0; });
    if (above_zero == 0) return infinite_magnitude;
    std::int32_t rank = (above_zero - 1) / 2;
    const int upper = select(k, rank, [&](std::int64_t j) {
        const std::uint32_t bits = magnitude(j);
        return bits == 0 ? -1 : static_cast<int>(bits >> 23);
    });
    const int lower = select(k, rank, [&](std::int64_t j) {
        const std::uint32_t bits = magnitude(j);
        return bits == 0 || static_cast<int>(bits >> 23) != upper ? -1 : static_cast<int>(bits >> 16 & 0x7FU);
    });
    const float median = __uint_as_float(static_cast<std::uint32_t>(upper << 7 | lower) << 16);
    const std::uint32_t limit = magnitude_of(__fmul_rn(times_median, median));
    return limit > 0 ? limit : 1;
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

// One block for each row of `x`. Marks of several rows are added up.
template <class T>
__global__ void __launch_bounds__(threads)
    criterion_kernel(View<const T> x, Criterion criterion, Limit* limits, std::uint32_t* words) {
    const std::int64_t row = blockIdx.x;
    const std::int64_t k = x.cols;
    const auto magnitude = [&](std::int64_t j) { return magnitude_of(to_float(*x.at(row, j))); };
    const std::uint32_t least =
        criterion.times_median > 0.0F ? relative_limit(k, criterion.times_median, magnitude) : criterion.absolute;
    Limit limit = Limit{least} << 32;
    if (count(k, [&](std::int64_t j) { return magnitude(j) >= least; }) > criterion.most) {
        limit = capped_limit(k, criterion.most, magnitude);
    }
    if (limits != nullptr && threadIdx.x == 0) limits[row] = limit;
    const int lane = static_cast<int>(threadIdx.x) % warp_size;
    for (std::int64_t first = threadIdx.x - lane; first < k; first += threads) {
        const std::int64_t j = first + lane;
        const std::uint32_t word = __ballot_sync(whole_warp, j < k && rank_of(magnitude(j < k ? j : 0), j) >= limit);
        if (lane == 0 && word != 0) atomicOr(&words[first / warp_size], word);
    }
}

// The largest magnitudes of the columns; a block has a part of the rows.
template <class T>
__global__ void __launch_bounds__(threads)
    maxima_kernel(View<const T> x, std::int64_t rows_per_part, std::uint32_t* maxima) {
    const std::int64_t column = static_cast<std::int64_t>(blockIdx.x) * threads + threadIdx.x;
    if (column >= x.cols) return;
    const std::int64_t begin = blockIdx.y * rows_per_part;
    const std::int64_t end = begin + rows_per_part < x.rows ? begin + rows_per_part : x.rows;
    std::uint32_t largest = 0;
#pragma unroll 8
    for (std::int64_t row = begin; row < end; ++row) {
        const std::uint32_t magnitude = magnitude_of(to_float(*x.at(row, column)));
        largest = largest > magnitude ? largest : magnitude;
    }
    atomicMax(&maxima[column], largest);
}

}  // namespace

void apply_criterion(ConstMatrix x, const LinearOptions& options, std::uint32_t* words, std::uint32_t* maxima,
                     Limit* limits, cudaStream_t stream) {
    if (x.cols == 0) return;
    check(cudaMemsetAsync(words, 0, static_cast<std::size_t>(words_for(x.cols)) * sizeof *words, stream),
          "cudaMemsetAsync");
    if (x.rows == 0) return;
    const bool per_row = limits != nullptr;
    std::uint32_t absolute = 0;
    __builtin_memcpy(&absolute, &options.threshold, sizeof absolute);
    const Criterion criterion{.times_median = times_median(options, per_row ? 1 : x.rows),
                              .absolute = absolute & 0x7FFFFFFFU,
                              .most = most_outliers(options, x.cols)};
    if (per_row) {
        with_float(x.dtype, [&]<class T>(Type<T>) {
            launch(criterion_kernel<T>, Grid{static_cast<unsigned>(x.rows), threads}, stream, view_of<T>(x), criterion,
                   limits, words);
        });
        return;
    }
    check(cudaMemsetAsync(maxima, 0, static_cast<std::size_t>(x.cols) * sizeof *maxima, stream), "cudaMemsetAsync");
    const std::int64_t tiles = blocks_for(x.cols, threads);
    const std::int64_t parts =
        std::clamp<std::int64_t>(blocks_for(2 * device_facts().multiprocessors, tiles), 1, x.rows);
    with_float(x.dtype, [&]<class T>(Type<T>) {
        launch(maxima_kernel<T>, Grid{dim3(static_cast<unsigned>(tiles), static_cast<unsigned>(parts)), threads},
               stream, view_of<T>(x), blocks_for(x.rows, parts), maxima);
    });
    const ConstMatrix of_columns{maxima, DType::f32, x.device, 1, x.cols, x.cols, 1};
    launch(criterion_kernel<float>, Grid{1, threads}, stream, view_of<float>(of_columns), criterion,
           static_cast<Limit*>(nullptr), words);
}

}  // namespace octavo::cuda
