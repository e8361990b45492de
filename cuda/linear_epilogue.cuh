// What becomes of the sums of a tile (linear_mma.cu, linear_wgmma.cu): y, in the registers that hold them.
//
//   y[i, j] = acc[i, j] * (scale_x[i] * scale_w[j]) + sum_{o in O} x[i, o] * w[j, o] + bias[j]
//
// in float32, rounded once (paper Eq. 8; zeropoint: Eq. 4-5).
//
// O and its size are read on the device. Few columns (`most_in_order`) are added one after the other in ascending order
// by the instructions of float32, so that y is the CPU's, bit for bit. More are a product on tensor cores, in the way
// of the codes. Where X has 16 bits and kept columns of W the same ones, others codes, these are made 16-bit numbers,
// too (`add_bits`): products are exact, one instruction multiplies 16 columns, and sums of codes get their scale of W
// behind it. Else there are panels of float32 (outlier_columns.cuh), which tf32 instructions multiply. A number of 16
// bits is one of tf32; a weight of more is split in two (`low_part`), of which 22 bits remain. Columns behind the
// panels, of which there are many only where something is wrong with X, are made here as they are needed.
//
// Under the policy `rows`, and where X is float32, all columns are added in order: a row's result must not depend on
// which columns the other rows list, and float32 has more bits than its half.
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>

#include "bits.cuh"
#include "device.cuh"
#include "mma_tile.cuh"
#include "operations.hpp"
#include "outlier_columns.cuh"

// Below compute capability 8.0 no kernel of these has a body, and nothing uses what they are made of.
#ifdef __CUDACC__
#pragma nv_diag_suppress 177
#endif

namespace octavo::cuda {

constexpr float largest_float = std::numeric_limits<float>::max();
constexpr int most_in_order = 8;
constexpr int chunk_columns = slice / static_cast<int>(sizeof(float));  // that are added in order at a time

// What becomes of the sums.
struct Rest {
    const float* scale_x = nullptr;
    const float* zeropoint_x = nullptr;  // null for absmax
    const std::int32_t* sums_x = nullptr;
    bool one_scale = false;  // for all rows of X
    Span<const float> scale_w;
    Span<const float> zeropoint_w;
    Span<const std::int32_t> code_sums;
    std::int64_t depth = 0;
    FloatSpan bias;
    OutlierColumns columns;
    ColumnList list;  // count null: none
    Panels panels;
    int picked_height = 0;  // rows of X of a row of tiles that picks codes; 0: none does
    bool in_order = false;  // all columns
    bool in_pairs = false;  // see `Entry`
    bool is_exact = false;  // whether all weights in the panel are numbers of tf32
    std::int32_t* partial = nullptr;
    unsigned* tickets = nullptr;
    Matrix out;
    bool wide = false;  // whether four columns can be stored at once

    __device__ float scale_of_row(std::int64_t i) const { return scale_x[one_scale ? 0 : i]; }
    __device__ float zeropoint_of_row(std::int64_t i) const { return zeropoint_x[one_scale ? 0 : i]; }

    // How many columns of codes of W come before those that the row of tiles keeps, and where its codes are.
    __device__ int first_picked(const Job& job) const {
        return static_cast<int>(job.row0) / picked_height * static_cast<int>(most_picked);
    }
    // Which of the kept columns the `e`-th outlier column is, of those in the panels; -1: none.
    __device__ int place_of(std::int32_t e) const { return panels.places != nullptr ? panels.places[e] : -1; }
    __device__ const std::int8_t* codes_of(const Job& job, std::int32_t outliers) const {
        return panels.codes +
               (picked_height > 0 && outliers <= most_picked ? first_picked(job) * out.cols : std::int64_t{0});
    }
};

template <class Tile>
using Values = float[Tile::row_fragments][Tile::col_fragments][4];

// Where a lane's values of a tile are: row `row + 16 * t + 8 * h`, column `col + bundle * (u / 2) + c` for value
// 2 * h + c % 2 of fragment (t, u + c / 2), with u even and c < 4. `col_of_tile`: of the tile, not of the output.
template <class Tile>
struct Corner {
    std::int64_t row;
    std::int64_t col;
    int col_of_tile;

    __device__ explicit Corner(const Job& job) {
        const Place<Tile> place(made_again(static_cast<int>(threadIdx.x)));
        col_of_tile = place.col + place.lane % 4 * together;
        row = made_again(job.row0) + place.row + place.lane / 4;
        col = made_again(job.col0) + col_of_tile;
    }
};

// --- codes of outlier columns that the product passes ---------------------------------------------------------------

namespace {  // each file has shared variables of its own

// While a block reads all codes of its rows of W, it keeps those of outlier columns, in memory, where other blocks that
// share the depth of the tile put theirs. What that takes is in shared memory: registers are full of sums.
//
// `RowPlace::of(row, byte)`: where a byte of a row of b is in a slice.
template <int cols, int threads, class RowPlace>
class Picker {
public:
    __device__ Picker(const Rest& rest, const Job& job) : rest_(rest), job_(job) {}

    // What no launch of this layer writes, weights and their scales, is read while X is still being quantized.
    __device__ void before_a() { wait_for_launch_before(); }
    __device__ void prepare() {
        if (rest_.picked_height == 0) return;
        const std::int32_t count = *rest_.list.count;
        for (int i = static_cast<int>(threadIdx.x); i <= most_picked; i += threads) {
            const bool is_listed = count <= most_picked && i < count;
            own().columns[i] = is_listed ? static_cast<std::uint16_t>(rest_.list.columns[i]) : none;
        }
        if (threadIdx.x > 0) return;
        own().begin = static_cast<int>(job_.begin);
        own().end = static_cast<int>(job_.end);
        own().rows = static_cast<int>(rest_.out.cols - job_.col0 < cols ? rest_.out.cols - job_.col0 : cols);
        own().target = rest_.panels.codes + rest_.first_picked(job_) * rest_.out.cols + job_.col0;
    }
    __device__ void begin() {
        if (rest_.picked_height == 0) return;
        next_ = static_cast<int>(lower_bound(own().columns, most_picked, 1, own().begin));
        column_ = own().columns[next_] - own().begin;
    }
    // Of bytes `begin` to `end` - 1 of the rows of b in the job. A thread has a row.
    __device__ void take(int begin, int end, const std::int8_t* b) {
        static_assert(cols <= threads);
#pragma unroll 1
        while (column_ < end) {
            if (column_ >= own().end - own().begin) return;
            const int row = static_cast<int>(threadIdx.x);
            if (row < own().rows) own().target[next_ * rest_.out.cols + row] = b[RowPlace::of(row, column_ - begin)];
            column_ = own().columns[++next_] - own().begin;
        }
    }

private:
    static constexpr std::uint16_t none = std::numeric_limits<std::uint16_t>::max();
    // At most 256 bytes, with which three blocks of 64 x 64 fit a multiprocessor of 100 KB.
    struct Shared {
        std::uint16_t columns[most_picked + 1];
        int begin;  // of the job
        int end;
        int rows;  // of b
        std::int8_t* target;
    };
    __device__ static Shared& own() {
        __shared__ Shared shared;
        return shared;
    }
    const Rest& rest_;
    const Job& job_;
    int column_ = std::numeric_limits<int>::max();  // the next, of the job
    int next_ = 0;                                  // its place among all
};

// Of mma_tile.cuh.
struct PlaceInSlice {
    __device__ static int of(int row, int byte) {
        return row * slice + chunk_of_b(row, byte / chunk) * chunk + byte % chunk;
    }
};

}  // namespace

// --- blocks that share the depth of a tile --------------------------------------------------------------------------

namespace {

// Leaves the block's sums in memory; if it is the last of its tile, it makes of `totals` those of all blocks. `totals`
// can be `sums`, or in 64 bits: as many blocks as that takes share a depth whose sums do not fit 32.
template <class Tile, class Total>
__device__ bool add_parts(const Sums<Tile>& sums, const Parts& parts, const Rest& rest,
                          Total (&totals)[Tile::row_fragments][Tile::col_fragments][4]) {
    __shared__ bool is_last;
    constexpr int fragments = Tile::row_fragments * Tile::col_fragments;
    constexpr int between = Tile::threads * 4;  // of fragments
    // Counted by four in 32 bits, which reach 64 GiB: in 64 they would take a register too much.
    const auto first_of = [&](unsigned block) {
        return rest.partial + std::int64_t{block * (fragments * Tile::threads) + threadIdx.x} * 4;
    };
    std::int32_t* const target = first_of(blockIdx.x);
#pragma unroll
    for (int f = 0; f < fragments; ++f) {
        const auto& own = sums[f / Tile::col_fragments][f % Tile::col_fragments];
        store(target + f * between, Pack<std::int32_t, 4>{{own[0], own[1], own[2], own[3]}});
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) is_last = atomicAdd(&rest.tickets[blockIdx.x / parts.count], 1U) == parts.count - 1;
    __syncthreads();
    if (!is_last) return false;
    __threadfence();
#pragma unroll
    for (int f = 0; f < fragments; ++f) {
#pragma unroll
        for (int e = 0; e < 4; ++e) totals[f / Tile::col_fragments][f % Tile::col_fragments][e] = 0;
    }
    const unsigned first = blockIdx.x - blockIdx.x % parts.count;
#pragma unroll 1
    for (unsigned block = first; block < first + parts.count; ++block) {
        const std::int32_t* const from = first_of(block);
#pragma unroll
        for (int f = 0; f < fragments; ++f) {
            const auto pack = load<4>(from + f * between);
#pragma unroll
            for (int e = 0; e < 4; ++e) totals[f / Tile::col_fragments][f % Tile::col_fragments][e] += pack[e];
        }
    }
    return true;
}

}  // namespace

// --- scales of W, and bias, of the columns of a lane: those of fragments u and u + 1 -------------------------------

// Read where they are needed.
template <class Tile>
struct ColumnsInMemory {
    const Rest& rest;
    static constexpr bool know_the_largest = false;

    __device__ Pack<float, together> scales(const Corner<Tile>& corner, int u) const {
        Pack<float, together> found;
#pragma unroll
        for (int c = 0; c < together; ++c) {
            const std::int64_t j = corner.col + u / 2 * bundle + c;
            found[c] = j < rest.out.cols ? rest.scale_w.of_group(j) : 0.0F;
        }
        return found;
    }
    __device__ Pack<float, together> bias(const Corner<Tile>& corner, int u) const {
        Pack<float, together> found;
#pragma unroll
        for (int c = 0; c < together; ++c) {
            const std::int64_t j = corner.col + u / 2 * bundle + c;
            found[c] = rest.bias.present() && j < rest.out.cols ? rest.bias[j] : 0.0F;
        }
        return found;
    }
};

// Of a tile with many columns to a lane: all of its columns are read before the product, to shared memory.
template <class Tile>
struct ColumnsInShared {
    static constexpr bool know_the_largest = true;
    static constexpr int warps = Tile::threads / warp_size;
    static constexpr std::size_t bytes = (2 * Tile::cols + warps) * sizeof(float);

    float*
        scale_w;  // [Tile::cols], behind them as many of bias, and behind those the largest scale that each warp read

    // Others see them behind a barrier.
    __device__ void read(const Rest& rest, const Job& job) const {
        float largest = 0.0F;
        for (int c = static_cast<int>(threadIdx.x); c < Tile::cols; c += Tile::threads) {
            const std::int64_t j = job.col0 + c;
            const float scale = j < rest.out.cols ? rest.scale_w.of_group(j) : 0.0F;
            scale_w[c] = scale;
            scale_w[Tile::cols + c] = rest.bias.present() && j < rest.out.cols ? rest.bias[j] : 0.0F;
            largest = fmaxf(largest, scale);
        }
        largest = reduce_warp(largest, [](float a, float b) { return fmaxf(a, b); });
        if (threadIdx.x % warp_size == 0) scale_w[2 * Tile::cols + threadIdx.x / warp_size] = largest;
    }
    __device__ float largest_scale() const {
        float largest = 0.0F;
#pragma unroll
        for (int w = 0; w < warps; ++w) largest = fmaxf(largest, scale_w[2 * Tile::cols + w]);
        return largest;
    }
    // By all lanes of a warp, and for all u in ascending order.
    __device__ Pack<float, together> scales(const Corner<Tile>& corner, int u) const {
        if (u % 8 == 0) __syncwarp();  // or the compiler reads all of them at once, for which registers are too few
        return load<together>(scale_w + corner.col_of_tile + u / 2 * bundle);
    }
    __device__ Pack<float, together> bias(const Corner<Tile>& corner, int u) const {
        return load<together>(scale_w + Tile::cols + corner.col_of_tile + u / 2 * bundle);
    }
};

// --- scales ---------------------------------------------------------------------------------------------------------

// acc * (scale_x * scale_w); the smaller scale first where the product of the scales alone overflows.
__device__ inline float scaled(float sum, float scale_x, float scale_w) {
    const float scale = scale_x * scale_w;
    return scale > largest_float ? sum * fminf(scale_x, scale_w) * fmaxf(scale_x, scale_w) : sum * scale;
}

// One value after the other, where that takes more than a product. All threads of the block must take part.
//
// With zeropoints the other terms of Eq. 4-5 are large and cancel, so they are added as float64, where they are exact
// unless zeropoints are beyond 2^20. That takes registers, of which the sums have half: so the sums of a row of
// fragments wait in shared memory, each thread's own, for one loop over them.
template <class Tile, class Sum>
__device__ void scale_one_by_one(const Sum (&sums)[Tile::row_fragments][Tile::col_fragments][4], const Job& job,
                                 std::int64_t m, std::int64_t n, const Rest& rest, std::int32_t outliers,
                                 std::int8_t* shared, Values<Tile>& y) {
    constexpr int count = Tile::col_fragments * 4;
    static_assert(Tile::threads * count * sizeof(Sum) <= Tile::stages * Tile::stage_bytes);
    const Corner<Tile> corner(job);
    const bool excludes = rest.panels.excluded_codes != nullptr;
    const auto depth = static_cast<double>(rest.depth - (excludes ? outliers : 0));
    Sum* const own = reinterpret_cast<Sum*>(shared) + threadIdx.x;
    __syncthreads();
#pragma unroll
    for (int t = 0; t < Tile::row_fragments; ++t) {
#pragma unroll
        for (int e = 0; e < count; ++e) own[e * Tile::threads] = sums[t][e / 4][e % 4];
#pragma unroll 1
        for (int e = 0; e < count; ++e) {
            const std::int64_t i = corner.row + 16 * t + 8 * (e % 4 / 2);
            const std::int64_t j = corner.col + e / 8 * bundle + e / 4 % 2 * 2 + e % 2;
            if (i >= m || j >= n) continue;
            float& value = reinterpret_cast<float&>(own[e * Tile::threads]);
            if (rest.zeropoint_x == nullptr) {
                value =
                    scaled(static_cast<float>(own[e * Tile::threads]), rest.scale_of_row(i), rest.scale_w.of_group(j));
                continue;
            }
            const double zx = rest.zeropoint_of_row(i);
            const double zw = rest.zeropoint_w.of_group(j);
            const double sum_w = rest.code_sums[j] - (excludes ? rest.panels.excluded_codes[j] : 0);
            const double sum =
                static_cast<double>(own[e * Tile::threads]) + zw * rest.sums_x[i] + zx * sum_w + depth * zx * zw;
            const double scale = static_cast<double>(rest.scale_of_row(i)) * rest.scale_w.of_group(j);
            value = static_cast<float>(sum * scale);
        }
#pragma unroll
        for (int e = 0; e < count; ++e) y[t][e / 4][e % 4] = reinterpret_cast<const float&>(own[e * Tile::threads]);
    }
}

// The same, all at once. Where the columns know their largest scale, no product of scales overflows.
//
// `of_x`: without the scales of W.
template <class Tile, class Sum, class Columns>
__device__ void scale_sums(const Sum (&sums)[Tile::row_fragments][Tile::col_fragments][4], const Job& job,
                           std::int64_t m, const Rest& rest, const Columns& columns, bool of_x, Values<Tile>& y) {
    const Corner<Tile> corner(job);
    float scale_x[Tile::row_fragments][2];
    float largest_x = 0.0F;
#pragma unroll
    for (int t = 0; t < Tile::row_fragments; ++t) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const std::int64_t i = corner.row + 16 * t + 8 * h;
            scale_x[t][h] = i < m ? rest.scale_of_row(i) : 0.0F;
            largest_x = fmaxf(largest_x, scale_x[t][h]);
        }
    }
#pragma unroll
    for (int u = 0; u < Tile::col_fragments; u += 2) {
        const Pack<float, together> scales = columns.scales(corner, u);
#pragma unroll
        for (int c = 0; c < together; ++c) {
            const float scale_w = of_x ? 1.0F : scales[c];
            const bool overflows = !Columns::know_the_largest && largest_x * scale_w > largest_float;
#pragma unroll
            for (int r = 0; r < 2 * Tile::row_fragments; ++r) {
                const float own = scale_x[r / 2][r % 2];
                const auto sum = static_cast<float>(sums[r / 2][u + c / 2][2 * (r % 2) + c % 2]);
                y[r / 2][u + c / 2][2 * (r % 2) + c % 2] =
                    overflows ? scaled(sum, own, scale_w) : sum * (own * scale_w);
            }
        }
    }
}

// --- outlier columns in order ---------------------------------------------------------------------------------------

// Elements `e` of what is added for outlier columns: x * w of one each. With zeropoints under the policy `rows`, where
// the elements that are left out differ from row to row, they come in pairs: the second takes out what the zeropoint of
// X made of the code 0.
struct Entry {
    const Rest& rest;
    const std::int8_t* codes;  // of the panel of W, where it has these

    __device__ float of_x(std::int64_t i, std::int32_t e) const {
        if (e < rest.panels.width) {
            const std::int64_t place = i * rest.panels.width + e;
            return rest.panels.x_bits != nullptr ? read_float(rest.panels.x_bits, rest.columns.x.dtype, place)
                                                 : rest.panels.x[place];
        }
        if (!rest.in_pairs) return rest.columns.of_x(i, rest.list.columns[e]);
        const std::int32_t column = rest.list.columns[e / 2];
        if (e % 2 == 0) return rest.columns.of_x(i, column);
        return rest.columns.takes_part(rest.columns.x(i, column), i, column)
                   ? -(rest.scale_of_row(i) * rest.zeropoint_of_row(i))
                   : 0.0F;
    }
    __device__ float of_w(std::int64_t j, std::int32_t e) const {
        if (e < rest.panels.width) {
            if (rest.panels.x_bits == nullptr) return rest.panels.w[j * rest.panels.width + e];
            if (const int place = rest.place_of(e); place >= 0) return rest.columns.kept_weight(j, place);
            if (codes != nullptr) return static_cast<float>(codes[e * rest.out.cols + j]) * rest.scale_w.of_group(j);
        }
        if (!rest.in_pairs) return rest.columns.of_w(j, rest.list.columns[e]);
        const std::int32_t column = rest.list.columns[e / 2];
        return e % 2 == 0 ? rest.columns.of_w(j, column) : rest.columns.dequantized(j, column);
    }
};

// Adds entries `first` to `end` - 1. A chunk of them is in shared memory at a time, rows of X beside those of W.
template <class Tile>
__device__ void add_in_order(const Job& job, std::int64_t m, std::int64_t n, const Rest& rest, const std::int8_t* codes,
                             std::int32_t first, std::int32_t end, float* shared, Values<Tile>& y) {
    constexpr int width = Tile::rows + Tile::cols;
    const Place<Tile> place(made_again(static_cast<int>(threadIdx.x)));
    const Entry entry{rest, codes};
#pragma unroll 1
    for (std::int32_t begin = first; begin < end; begin += chunk_columns) {
        const int count = end - begin < chunk_columns ? end - begin : chunk_columns;
        __syncthreads();
#pragma unroll 1
        for (int place_of = static_cast<int>(threadIdx.x); place_of < count * width; place_of += Tile::threads) {
            const std::int32_t e = begin + place_of / width;
            const int r = place_of % width;
            const std::int64_t i = made_again(job.row0) + r;
            const std::int64_t j = made_again(job.col0) + r - Tile::rows;
            float value = 0.0F;
            if (r < Tile::rows) {
                if (i < m) value = entry.of_x(i, e);
            } else {
                if (j < n) value = entry.of_w(j, e);
            }
            shared[place_of] = value;
        }
        __syncthreads();
#pragma unroll 1
        for (int e = 0; e < count; ++e) {
            const float* const row = shared + e * width;
            float x[Tile::row_fragments][2];
            bool any = false;
#pragma unroll
            for (int r = 0; r < 2 * Tile::row_fragments; ++r) {
                x[r / 2][r % 2] = row[place.row + place.lane / 4 + 8 * r];
                any = any || x[r / 2][r % 2] != 0.0F;
            }
            // Outliers of other rows alone are nothing to add.
            if (__any_sync(whole_warp, any) == 0) continue;
#pragma unroll
            for (int u = 0; u < Tile::col_fragments; u += 2) {
                const auto w =
                    load<together>(row + Tile::rows + place.col + u / 2 * bundle + place.lane % 4 * together);
#pragma unroll
                for (int r = 0; r < 2 * Tile::row_fragments; ++r) {
#pragma unroll
                    for (int c = 0; c < together; ++c) {
                        float& sum = y[r / 2][u + c / 2][2 * (r % 2) + c % 2];
                        sum = fmaf(x[r / 2][r % 2], w[c], sum);
                    }
                }
            }
        }
    }
}

// --- outlier columns on tensor cores --------------------------------------------------------------------------------

constexpr std::uint32_t tf32_bits = 0xFFFFE000U;
constexpr std::uint32_t exponent_bits = 0x7F800000U;

// What a weight has beyond tf32 is multiplied apart, by the x that are finite, which are numbers of tf32: Inf times 0
// would be NaN.
__device__ inline std::uint32_t high_part(std::uint32_t weight) { return weight & tf32_bits; }
__device__ inline std::uint32_t low_part(std::uint32_t weight) {
    const float rest = __fadd_rn(__uint_as_float(weight), -__uint_as_float(weight & tf32_bits));
    return (weight & exponent_bits) == exponent_bits ? 0 : __float_as_uint(rest) & tf32_bits;
}
__device__ inline void finite_part(const std::uint32_t (&from)[4], std::uint32_t (&finite)[4]) {
#pragma unroll
    for (int r = 0; r < 4; ++r) finite[r] = (from[r] & exponent_bits) == exponent_bits ? 0 : from[r];
}

// A panel as rows of bytes.
__device__ inline Operand bytes_of(const float* panel, std::int64_t rows, std::int64_t width) {
    return {reinterpret_cast<const std::int8_t*>(panel), rows, width * static_cast<std::int64_t>(sizeof(float)), 1};
}

// --- outlier columns in 16 bits -------------------------------------------------------------------------------------

__device__ inline void multiply_add(float (&sums)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                                    __half /*type*/) {
    multiply_add_f16(sums, a, b);
}
__device__ inline void multiply_add(float (&sums)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                                    __nv_bfloat16 /*type*/) {
    multiply_add_bf16(sums, a, b);
}

// Codes of two columns as numbers of 16 bits: those in byte `row` of words whose bytes are 128 more than codes. Such a
// byte behind the upper one of 1024, or of 2^23, is a number of float16 or float32 that is as much more.
__device__ inline std::uint32_t pair_of_codes(std::uint32_t first, std::uint32_t second, unsigned row,
                                              __half /*type*/) {
    const std::uint32_t both = select_bytes(first, second, 0x0400U + 0x0101U * row);
    const std::uint32_t larger = (both & 0x00FF00FFU) | 0x64006400U;
    const __half2 pair = __hsub2(reinterpret_cast<const __half2&>(larger), __float2half2_rn(1024.0F + 128.0F));
    return reinterpret_cast<const std::uint32_t&>(pair);
}
__device__ inline std::uint32_t pair_of_codes(std::uint32_t first, std::uint32_t second, unsigned row,
                                              __nv_bfloat16 /*type*/) {
    const auto number = [row](std::uint32_t word) {
        const float larger = __uint_as_float(select_bytes(word, 0x4B000000U, 0x7440U + row));
        return __float_as_uint(__fadd_rn(larger, -(0x1p23F + 128.0F)));
    };
    return select_bytes(number(first), number(second), 0x7632U);  // upper halves, which have all bits of a code
}

// Whether sums that lack the scales of W cannot overflow: all numbers of the panel of X, and the scales of X, are
// finite and not huge. All threads of the block must take part; what they wrote before, all see after it.
template <class Tile, class T>
__device__ bool are_moderate(const Job& job, std::int64_t m, const Rest& rest, int chunks_of_row) {
    constexpr float huge = 0x1p64F;
    constexpr int across = 4;  // threads that have a row
    std::uint32_t largest = 0;
    float scale = 0.0F;
#pragma unroll 1
    for (int r = static_cast<int>(threadIdx.x) / across; r < Tile::rows; r += Tile::threads / across) {
        const std::int64_t row = job.row0 + r;
        if (row >= m) break;
        scale = fmaxf(scale, rest.scale_of_row(row));
#pragma unroll 1
        for (int c = static_cast<int>(threadIdx.x) % across; c < chunks_of_row; c += across) {
            const auto* const from = rest.panels.x_bits + row * rest.panels.width + c * per_access<T>;
            const Quad quad = load<4>(reinterpret_cast<const std::uint32_t*>(from));
#pragma unroll
            for (int w = 0; w < 4; ++w) largest = max_magnitudes<T>(largest, quad[w]);
        }
    }
    const bool is_moderate = number_of<T>(max_of_word<T>(largest)) < huge && scale < huge;
    return __syncthreads_or(is_moderate ? 0 : 1) == 0;
}

// Of as many rows of W as many outlier columns, from `column` of `columns` on, a multiple of them: codes, from `codes`
// on, and codes 0 for columns that are kept; as bytes that are 128 more, a word for each column.
constexpr int rows_of_codes = 4;
using FourCodes = Pack<std::uint32_t, rows_of_codes>;
__device__ inline FourCodes read_codes(const Rest& rest, const std::int8_t* codes, int column, int columns) {
    FourCodes words;
#pragma unroll
    for (int e = 0; e < rows_of_codes; ++e, codes += rest.out.cols) {
        words[e] = column + e < columns ? *reinterpret_cast<const std::uint32_t*>(codes) : 0;
    }
    if (rest.panels.places != nullptr) {
#pragma unroll
        for (int e = 0; e < rows_of_codes; ++e) words[e] = rest.panels.places[column + e] < 0 ? words[e] : 0;
    }
#pragma unroll
    for (int e = 0; e < rows_of_codes; ++e) words[e] ^= 0x80808080U;
    return words;
}

// The same of kept weights, and zeros for columns that are not. Where they follow each other in a row that others lie
// around, they are read as the words that hold them.
template <class T>
__device__ Chunk chunk_of_kept(const Rest& rest, const std::uint16_t* row, bool is_between, int column, int columns) {
    if (column >= columns) return {};
    constexpr int count = per_access<T>;
    const std::int32_t* const places = rest.panels.places + column;
    const int first = places[0];
    if (is_between && first >= 0 && places[count - 1] == first + count - 1) {
        return load_chunk<SliceCopy::shifted>(reinterpret_cast<const std::int8_t*>(row + first));
    }
    Chunk numbers{};
#pragma unroll
    for (int e = 0; e < count; ++e) {
        const std::uint32_t bits = places[e] >= 0 ? row[places[e]] : std::uint16_t{0};
        numbers[e / 2] |= bits << (16 * (e % 2));
    }
    return numbers;
}

// y += x * w of the outlier columns that are kept, or of the others by their codes, [columns, n]. They become 16-bit
// numbers in shared memory, where they take the place that codes have in a product: row by row, of 32 columns a slice.
// All threads of the block must take part.
template <class Tile, class T>
__device__ void add_bits(const Job& job, std::int64_t m, std::int64_t n, const Rest& rest, const std::int8_t* codes,
                         bool are_kept, int columns, std::int8_t* shared, Values<Tile>& y) {
    constexpr int of_slice = slice / static_cast<int>(sizeof(T));
    constexpr int slice_bytes = (Tile::rows + Tile::cols) * slice;
    constexpr int batch = Tile::stages * Tile::stage_bytes / slice_bytes;
    const Place<Tile> place(made_again(static_cast<int>(threadIdx.x)));
    constexpr int multiple = static_cast<int>(panel_multiple);
    const int bytes = (columns + multiple - 1) / multiple * multiple * static_cast<int>(sizeof(T));  // of a row of X
    const int slices = (bytes + slice - 1) / slice;
    const Job of_panel{made_again(job.row0), made_again(job.col0), 0, bytes};
    const Operand x{reinterpret_cast<const std::int8_t*>(rest.panels.x_bits), m,
                    rest.panels.width * static_cast<std::int64_t>(sizeof(T)), 1};
    const AsyncSlices<Share<Tile::rows, Tile::threads, false>, Tile::rows> slices_x(x, of_panel.row0, of_panel);
    const auto rows_of_w = static_cast<int>(n - of_panel.col0 < Tile::cols ? n - of_panel.col0 : Tile::cols);
    const bool works = fragments_present(place, m - of_panel.row0) > 0;
    bool has_any = false;
    for (int o = static_cast<int>(threadIdx.x); o < columns; o += Tile::threads) {
        has_any = has_any || (rest.place_of(o) >= 0) == are_kept;
    }
    if (__syncthreads_or(has_any ? 1 : 0) == 0) return;
#pragma unroll 1
    for (int first = 0; first < slices; first += batch) {
        const int count = min(slices - first, batch);
        if (first > 0) __syncthreads();
#pragma unroll 1
        for (int s = 0; s < count; ++s) slices_x.copy((first + s) * slice, shared + s * slice_bytes);
        copy_async_commit();
        const int across = count * chunks;
        // Of rows of W; those of four rows from a multiple of four on lie a slice apart.
        const auto place_of_chunk = [&](int row, int own) {
            return shared + own / chunks * slice_bytes + (Tile::rows + row) * slice +
                   chunk_of_b(row, own % chunks) * chunk;
        };
        // Neighbours read what lies side by side: of codes rows, of kept weights columns.
        if (are_kept) {
            // By which i / across is a product: too large by no more than i / 2^20, which is less than 1 / across.
            static_assert(batch * chunks * batch * chunks * Tile::cols < 1 << 20);
            const unsigned reciprocal = (1U << 20) / static_cast<unsigned>(across) + 1;
            const FloatView& kept = rest.columns.kept_weight;
#pragma unroll 1
            for (int i = static_cast<int>(threadIdx.x); i < across * Tile::cols; i += Tile::threads) {
                const int row = static_cast<int>(static_cast<unsigned>(i) * reciprocal >> 20);
                const int own = i - row * across;  // chunk of all
                const std::int64_t j = of_panel.col0 + min(row, rows_of_w - 1);
                const Chunk numbers =
                    chunk_of_kept<T>(rest, static_cast<const std::uint16_t*>(kept.data) + j * kept.row_stride,
                                     row > 0 && row + 1 < rows_of_w, first * of_slice + own * per_access<T>, columns);
                store(reinterpret_cast<std::uint32_t*>(place_of_chunk(row, own)), numbers);
            }
        } else {
#pragma unroll 1
            for (int i = static_cast<int>(threadIdx.x); i < across * Tile::cols / 2; i += Tile::threads) {
                // Half a chunk of four rows, of which a neighbour has the other half.
                constexpr unsigned quads = Tile::cols / rows_of_codes;
                const unsigned half = static_cast<unsigned>(i) % 2;
                const auto row = static_cast<int>(static_cast<unsigned>(i) / 2 % quads * rows_of_codes);
                const auto own = static_cast<int>(static_cast<unsigned>(i) / 2 / quads);
                const int column = first * of_slice + own * per_access<T> + static_cast<int>(half) * rows_of_codes;
                const std::int64_t j = of_panel.col0 + min(row, rows_of_w - rows_of_codes);
                const FourCodes words = read_codes(rest, codes + column * rest.out.cols + j, column, columns);
                std::int8_t* const target = place_of_chunk(row, own) + half * (chunk / 2);
#pragma unroll
                for (unsigned r = 0; r < rows_of_codes; ++r) {
                    const Pack<std::uint32_t, 2> numbers{
                        {pair_of_codes(words[0], words[1], r, T{}), pair_of_codes(words[2], words[3], r, T{})}};
                    store(reinterpret_cast<std::uint32_t*>(target + r * slice), numbers);
                }
            }
        }
        copy_async_wait<0>();
        __syncthreads();
        if (!works) continue;
#pragma unroll 1
        for (int s = 0; s < count * steps; ++s) {
            const std::int8_t* const from = shared + s / steps * slice_bytes;
            std::uint32_t own[Tile::row_fragments][4];
#pragma unroll
            for (int t = 0; t < Tile::row_fragments; ++t) {
                load_matrices(own[t], matrices_of_a<Tile>(from, s % steps, place) + t * fragment_rows * slice);
            }
            const std::int8_t* const rows_of_b = matrices_of_b<Tile>(from, s % steps, place);
#pragma unroll
            for (int u = 0; u < Tile::col_fragments; u += 2) {
                std::uint32_t pair[4];
                load_matrices(pair, rows_of_b + u * 8 * slice);
#pragma unroll
                for (int t = 0; t < Tile::row_fragments; ++t) {
                    multiply_add(y[t][u], own[t], {pair[0], pair[1]}, T{});
                    multiply_add(y[t][u + 1], own[t], {pair[2], pair[3]}, T{});
                }
            }
        }
    }
}

// y *= scale_w.
template <class Tile, class Columns>
__device__ void scale_by_w(const Job& job, const Columns& columns, Values<Tile>& y) {
    const Corner<Tile> corner(job);
#pragma unroll
    for (int u = 0; u < Tile::col_fragments; u += 2) {
        const Pack<float, together> scales = columns.scales(corner, u);
#pragma unroll
        for (int r = 0; r < 2 * Tile::row_fragments; ++r) {
#pragma unroll
            for (int c = 0; c < together; ++c) y[r / 2][u + c / 2][2 * (r % 2) + c % 2] *= scales[c];
        }
    }
}

// --- output ---------------------------------------------------------------------------------------------------------

template <class Y>
__device__ void store_together(Y* target, const Pack<float, together>& values) {
    if constexpr (std::is_same_v<Y, float>) {
        store(target, values);
    } else if constexpr (std::is_same_v<Y, __half>) {
        store(reinterpret_cast<__half2*>(target),
              Pack<__half2, 2>{{__floats2half2_rn(values[0], values[1]), __floats2half2_rn(values[2], values[3])}});
    } else {
        store(reinterpret_cast<__nv_bfloat162*>(target),
              Pack<__nv_bfloat162, 2>{
                  {__floats2bfloat162_rn(values[0], values[1]), __floats2bfloat162_rn(values[2], values[3])}});
    }
}

template <class Tile, class Y, class Columns>
__device__ void store_values(const Values<Tile>& y, const Job& job, std::int64_t m, const Rest& rest,
                             const Columns& columns, Y* out) {
    const Corner<Tile> corner(job);
    const auto left = [](std::int64_t count, int most) { return count < most ? static_cast<int>(count) : most; };
    const int rows = left(m - corner.row, Tile::rows);
    const int cols = left(rest.out.cols - corner.col, Tile::cols);
    Y* const first = out + corner.row * rest.out.row_stride + corner.col * rest.out.col_stride;
    const std::int64_t between = 8 * rest.out.row_stride;
#pragma unroll
    for (int u = 0; u < Tile::col_fragments; u += 2) {
        const int col = u / 2 * bundle;
        if (col >= cols) continue;
        const Pack<float, together> bias = columns.bias(corner, u);
        Y* row = first + (rest.wide ? col : col * rest.out.col_stride);
#pragma unroll
        for (int r = 0; r < 2 * Tile::row_fragments; ++r, row += between) {
            if (8 * r >= rows) continue;
            Pack<float, together> values;
#pragma unroll
            for (int c = 0; c < together; ++c) values[c] = y[r / 2][u + c / 2][2 * (r % 2) + c % 2] + bias[c];
            if (rest.wide) {
                store_together(row, values);
            } else {
#pragma unroll
                for (int c = 0; c < together; ++c) {
                    if (col + c < cols) row[c * rest.out.col_stride] = from_float<Y>(values[c]);
                }
            }
        }
    }
}

// --- all of it ------------------------------------------------------------------------------------------------------

template <class Tile, class Sum, class Columns>
__device__ void start_values(const Sum (&sums)[Tile::row_fragments][Tile::col_fragments][4], const Job& job,
                             std::int64_t m, std::int64_t n, const Rest& rest, const Columns& columns,
                             std::int32_t outliers, bool of_x, std::int8_t* shared, Values<Tile>& y) {
    bool is_simple = rest.zeropoint_x == nullptr;
    if (of_x) return scale_sums<Tile>(sums, job, m, rest, columns, true, y);
    if constexpr (Columns::know_the_largest) {
        const Corner<Tile> corner(job);
        float largest_x = 0.0F;
#pragma unroll
        for (int r = 0; r < 2 * Tile::row_fragments; ++r) {
            const std::int64_t i = corner.row + 8 * r;
            if (i < m) largest_x = fmaxf(largest_x, rest.scale_of_row(i));
        }
        is_simple = __syncthreads_or(largest_x * columns.largest_scale() > largest_float ? 1 : 0) == 0 && is_simple;
    }
    if (!is_simple) return scale_one_by_one<Tile>(sums, job, m, n, rest, outliers, shared, y);
    scale_sums<Tile>(sums, job, m, rest, columns, false, y);
}

// Whether codes of outlier columns are multiplied, before the scales of W. All threads of the block must take part.
template <class Tile>
__device__ bool multiplies_codes(const Job& job, std::int64_t m, const Rest& rest, std::int32_t outliers) {
    if (rest.panels.codes == nullptr || outliers <= most_in_order) return false;
    const auto columns = static_cast<int>(outliers < rest.panels.width ? outliers : rest.panels.width);
    const int chunks_of_row = (columns + 7) / 8;
    return rest.columns.x.dtype == DType::f16 ? are_moderate<Tile, __half>(job, m, rest, chunks_of_row)
                                              : are_moderate<Tile, __nv_bfloat16>(job, m, rest, chunks_of_row);
}

// Everything after the scales; after those of X alone where `of_x`. All threads of the block must take part.
// `multiply_panels(x, w, job)` adds the products of panels to y.
template <class Tile, class Columns, class MultiplyPanels>
__device__ void finish(Values<Tile>& y, const Job& job, std::int64_t m, std::int64_t n, const Rest& rest,
                       const Columns& columns, std::int32_t outliers, bool of_x, std::int8_t* shared,
                       const MultiplyPanels& multiply_panels) {
    std::int32_t added = 0;
    const auto width = static_cast<std::int32_t>(rest.panels.width);
    const std::int8_t* const codes = rest.panels.codes != nullptr ? rest.codes_of(job, outliers) : nullptr;
    if (of_x || (rest.panels.x_bits != nullptr && codes == nullptr && outliers > most_in_order)) {
        added = outliers < width ? outliers : width;
        const int kinds = rest.panels.places != nullptr ? 2 : 1;
#pragma unroll 1
        for (int kind = of_x ? 0 : 1; kind < kinds; ++kind) {  // codes, then what is kept
            if (rest.columns.x.dtype == DType::f16) {
                add_bits<Tile, __half>(job, m, n, rest, codes, kind > 0, added, shared, y);
            } else {
                add_bits<Tile, __nv_bfloat16>(job, m, n, rest, codes, kind > 0, added, shared, y);
            }
            if (kind == 0) scale_by_w<Tile>(job, columns, y);
        }
    } else if (rest.panels.x_bits == nullptr && !rest.in_order && outliers > most_in_order) {
        added = outliers < width ? outliers : width;
        const std::int64_t end = (added + panel_multiple - 1) / panel_multiple * slice;
        __syncthreads();
        multiply_panels(bytes_of(rest.panels.x, m, width), bytes_of(rest.panels.w, n, width),
                        Job{made_again(job.row0), made_again(job.col0), 0, end});
    }
    add_in_order<Tile>(job, m, n, rest, codes, added, rest.in_pairs ? 2 * outliers : outliers,
                       reinterpret_cast<float*>(shared), y);
    switch (rest.out.dtype) {
        case DType::f16: return store_values<Tile>(y, job, m, rest, columns, static_cast<__half*>(rest.out.data));
        case DType::bf16:
            return store_values<Tile>(y, job, m, rest, columns, static_cast<__nv_bfloat16*>(rest.out.data));
        default: return store_values<Tile>(y, job, m, rest, columns, static_cast<float*>(rest.out.data));
    }
}

}  // namespace octavo::cuda
