// LLM.int8()'s product with everything after it, in one kernel (paper Eq. 8; zeropoint: Eq. 4-5), from sm_80 on:
//
//   y[i, j] = acc[i, j] * (scale_x[i] * scale_w[j]) + sum_{o in O} x[i, o] * w[j, o] + bias[j]
//
// in float32, rounded once. The sums of a tile (mma_tile.cuh) become y in the registers that hold them; no int32 goes
// to memory but where several blocks share the depth of a tile: then each writes its sums, and the last to come adds
// them.
//
// O and its size are read on the device. Few columns (`most_in_order`) are added one after the other in ascending order
// by the instructions of float32, so that y is the CPU's, bit for bit. More are a product on tensor cores, of slices
// that take the way of the codes: panels of float32 (outlier_columns.cuh), which tf32 instructions multiply. A number
// of 16 bits is one of tf32; a weight of more is split in two (`SplitProduct`), of which 22 bits remain. Columns behind
// the panels, of which there are many only where something is wrong with X, are made here as they are needed.
//
// Under the policy `rows`, and where X is float32, all columns are added in order: a row's result must not depend on
// which columns the other rows list, and float32 has more bits than its half.
#include <algorithm>
#include <limits>
#include <type_traits>

#include "device.cuh"
#include "gemm.hpp"
#include "memory.hpp"
#include "mma_tile.cuh"
#include "operations.hpp"
#include "outlier_columns.cuh"

// Below compute capability 8.0 the kernel has no body, and nothing uses what it is made of.
#ifdef __CUDACC__
#pragma nv_diag_suppress 177
#endif

namespace octavo::cuda {
namespace {

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
    bool in_order = false;  // all columns
    bool in_pairs = false;  // see `Entry`
    bool is_exact = false;  // whether all weights in the panel are numbers of tf32
    std::int32_t* partial = nullptr;
    unsigned* tickets = nullptr;
    Matrix out;
    bool wide = false;  // whether four columns can be stored at once

    __device__ float scale_of_row(std::int64_t i) const { return scale_x[one_scale ? 0 : i]; }
    __device__ float zeropoint_of_row(std::int64_t i) const { return zeropoint_x[one_scale ? 0 : i]; }
};

template <class Tile>
using Values = float[Tile::row_fragments][Tile::col_fragments][4];

// Where a lane's values of a tile are: row `row + 16 * t + 8 * h`, column `col + bundle * (u / 2) + c` for value
// 2 * h + c % 2 of fragment (t, u + c / 2), with u even and c < 4.
template <class Tile>
struct Corner {
    std::int64_t row;
    std::int64_t col;

    __device__ explicit Corner(const Job& job) {
        const Place<Tile> place;
        row = made_again(job.row0) + place.row + place.lane / 4;
        col = made_again(job.col0) + place.col + place.lane % 4 * together;
    }
};

// --- blocks that share the depth of a tile --------------------------------------------------------------------------

// Leaves the block's sums in memory, and adds those of all blocks of its tile, if it is the last. Sums are in 64 bits:
// as many blocks as that takes share a depth whose sums do not fit 32.
template <class Tile>
__device__ bool add_parts(const Sums<Tile>& sums, const Rest& rest,
                          std::int64_t (&totals)[Tile::row_fragments][Tile::col_fragments][4]) {
    __shared__ bool is_last;
    constexpr int fragments = Tile::row_fragments * Tile::col_fragments;
    const auto place = [&](unsigned part, int fragment) {
        const std::int64_t block = static_cast<std::int64_t>(blockIdx.x) * gridDim.y + part;
        return rest.partial + ((block * fragments + fragment) * Tile::threads + threadIdx.x) * 4;
    };
#pragma unroll
    for (int f = 0; f < fragments; ++f) {
        const auto& own = sums[f / Tile::col_fragments][f % Tile::col_fragments];
        store(place(blockIdx.y, f), Pack<std::int32_t, 4>{{own[0], own[1], own[2], own[3]}});
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) is_last = atomicAdd(&rest.tickets[blockIdx.x], 1U) == gridDim.y - 1;
    __syncthreads();
    if (!is_last) return false;
    __threadfence();
#pragma unroll 1
    for (unsigned part = 0; part < gridDim.y; ++part) {
#pragma unroll
        for (int f = 0; f < fragments; ++f) {
            const auto pack = load<4>(place(part, f));
#pragma unroll
            for (int e = 0; e < 4; ++e) totals[f / Tile::col_fragments][f % Tile::col_fragments][e] += pack[e];
        }
    }
    return true;
}

// --- scales ---------------------------------------------------------------------------------------------------------

// With zeropoints the other terms of Eq. 4-5 are large and cancel, so they are added as float64, where they are exact
// unless zeropoints are beyond 2^20. That takes registers, of which the sums have half: so the sums of a row of
// fragments wait in shared memory, each thread's own, for one loop over them.
template <class Tile, class Sum>
__device__ void unroll_zeropoints(const Sum (&sums)[Tile::row_fragments][Tile::col_fragments][4], const Job& job,
                                  std::int64_t m, std::int64_t n, const Rest& rest, std::int32_t outliers,
                                  std::int8_t* shared, Values<Tile>& y) {
    constexpr int count = Tile::col_fragments * 4;
    static_assert(Tile::threads * count * sizeof(std::int64_t) <= Tile::stages * Tile::stage_bytes);
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
            const double zx = rest.zeropoint_of_row(i);
            const double zw = rest.zeropoint_w.of_group(j);
            const double sum_w = rest.code_sums[j] - (excludes ? rest.panels.excluded_codes[j] : 0);
            const double sum =
                static_cast<double>(own[e * Tile::threads]) + zw * rest.sums_x[i] + zx * sum_w + depth * zx * zw;
            const double scale = static_cast<double>(rest.scale_of_row(i)) * rest.scale_w.of_group(j);
            reinterpret_cast<float&>(own[e * Tile::threads]) = static_cast<float>(sum * scale);
        }
#pragma unroll
        for (int e = 0; e < count; ++e) y[t][e / 4][e % 4] = reinterpret_cast<const float&>(own[e * Tile::threads]);
    }
}

// acc * (scale_x * scale_w); the smaller scale first where the product of the scales alone overflows.
template <class Tile, class Sum>
__device__ void scale_sums(const Sum (&sums)[Tile::row_fragments][Tile::col_fragments][4], const Job& job,
                           std::int64_t m, std::int64_t n, const Rest& rest, Values<Tile>& y) {
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
#pragma unroll
        for (int c = 0; c < together; ++c) {
            const std::int64_t j = corner.col + u / 2 * bundle + c;
            const float scale_w = j < n ? rest.scale_w.of_group(j) : 0.0F;
            const bool overflows = largest_x * scale_w > largest_float;
#pragma unroll
            for (int r = 0; r < 2 * Tile::row_fragments; ++r) {
                const float own = scale_x[r / 2][r % 2];
                const auto sum = static_cast<float>(sums[r / 2][u + c / 2][2 * (r % 2) + c % 2]);
                y[r / 2][u + c / 2][2 * (r % 2) + c % 2] = overflows && own * scale_w > largest_float
                                                               ? sum * fminf(own, scale_w) * fmaxf(own, scale_w)
                                                               : sum * (own * scale_w);
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

    __device__ float of_x(std::int64_t i, std::int32_t e) const {
        if (!rest.in_pairs) {
            return e < rest.panels.width ? rest.panels.x[i * rest.panels.width + e]
                                         : rest.columns.of_x(i, rest.list.columns[e]);
        }
        const std::int32_t column = rest.list.columns[e / 2];
        if (e % 2 == 0) return rest.columns.of_x(i, column);
        return rest.columns.takes_part(rest.columns.x(i, column), i, column)
                   ? -(rest.scale_of_row(i) * rest.zeropoint_of_row(i))
                   : 0.0F;
    }
    __device__ float of_w(std::int64_t j, std::int32_t e) const {
        if (!rest.in_pairs) {
            return e < rest.panels.width ? rest.panels.w[j * rest.panels.width + e]
                                         : rest.columns.of_w(j, rest.list.columns[e]);
        }
        const std::int32_t column = rest.list.columns[e / 2];
        return e % 2 == 0 ? rest.columns.of_w(j, column) : rest.columns.dequantized(j, column);
    }
};

// Adds entries `first` to `end` - 1. A chunk of them is in shared memory at a time, rows of X beside those of W.
template <class Tile>
__device__ void add_in_order(const Job& job, std::int64_t m, std::int64_t n, const Rest& rest, std::int32_t first,
                             std::int32_t end, float* shared, Values<Tile>& y) {
    constexpr int width = Tile::rows + Tile::cols;
    const Place<Tile> place;
    const Entry entry{rest};
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

// Products of a step of 8 outlier columns; x are numbers of tf32. What a weight has beyond tf32 is multiplied apart, by
// the x that are finite: Inf times 0 would be NaN.
template <class Tile>
struct SplitProduct {
    bool is_exact;

    __device__ void operator()(const Fragments<Tile>& from, Values<Tile>& y) const {
#pragma unroll
        for (int u = 0; u < Tile::col_fragments; ++u) {
            const std::uint32_t high[2] = {from.b[u][0] & tf32_bits, from.b[u][1] & tf32_bits};
#pragma unroll
            for (int t = 0; t < Tile::row_fragments; ++t) multiply_add_tf32(y[t][u], from.a[t], high);
        }
        if (is_exact) return;
#pragma unroll
        for (int t = 0; t < Tile::row_fragments; ++t) {
            std::uint32_t finite[4];
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                finite[r] = (from.a[t][r] & exponent_bits) == exponent_bits ? 0 : from.a[t][r];
            }
#pragma unroll
            for (int u = 0; u < Tile::col_fragments; ++u) {
                std::uint32_t low[2];
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    const std::uint32_t bits = from.b[u][r];
                    const float rest = __fadd_rn(__uint_as_float(bits), -__uint_as_float(bits & tf32_bits));
                    low[r] = (bits & exponent_bits) == exponent_bits ? 0 : __float_as_uint(rest) & tf32_bits;
                }
                multiply_add_tf32(y[t][u], finite, low);
            }
        }
    }
};

// A panel as rows of bytes.
__device__ inline Operand bytes_of(const float* panel, std::int64_t rows, std::int64_t width) {
    return {reinterpret_cast<const std::int8_t*>(panel), rows, width * static_cast<std::int64_t>(sizeof(float)), 1};
}

// --- output ---------------------------------------------------------------------------------------------------------

template <class Tile, class Y>
__device__ void store_values(const Values<Tile>& y, const Job& job, const Rest& rest, Y* out) {
    const Corner<Tile> corner(job);
#pragma unroll
    for (int u = 0; u < Tile::col_fragments; u += 2) {
        const std::int64_t j = corner.col + u / 2 * bundle;
        if (j >= rest.out.cols) continue;
        const int count = rest.out.cols - j < together ? static_cast<int>(rest.out.cols - j) : together;
        float bias[together];
#pragma unroll
        for (int c = 0; c < together; ++c) bias[c] = rest.bias.present() && c < count ? rest.bias[j + c] : 0.0F;
#pragma unroll
        for (int r = 0; r < 2 * Tile::row_fragments; ++r) {
            const std::int64_t i = corner.row + 8 * r;
            if (i >= rest.out.rows) continue;
            Pack<Y, together> pack;
#pragma unroll
            for (int c = 0; c < together; ++c) {
                pack[c] = from_float<Y>(y[r / 2][u + c / 2][2 * (r % 2) + c % 2] + bias[c]);
            }
            Y* const target = out + i * rest.out.row_stride + j * rest.out.col_stride;
            if (rest.wide) {
                store(target, pack);
            } else {
#pragma unroll
                for (int c = 0; c < together; ++c) {
                    if (c < count) target[c * rest.out.col_stride] = pack[c];
                }
            }
        }
    }
}

// --- kernel ---------------------------------------------------------------------------------------------------------

template <class Tile, class Sum>
__device__ void start_values(const Sum (&sums)[Tile::row_fragments][Tile::col_fragments][4], const Job& job,
                             std::int64_t m, std::int64_t n, const Rest& rest, std::int32_t outliers,
                             std::int8_t* shared, Values<Tile>& y) {
    if (rest.zeropoint_x != nullptr) return unroll_zeropoints<Tile>(sums, job, m, n, rest, outliers, shared, y);
    scale_sums<Tile>(sums, job, m, n, rest, y);
}

// Everything after the scales. All threads of the block must take part.
template <class Tile>
__device__ void finish(Values<Tile>& y, const Job& job, std::int64_t m, std::int64_t n, const Rest& rest,
                       std::int32_t outliers, std::int8_t* shared) {
    std::int32_t added = 0;
    if (!rest.in_order && outliers > most_in_order) {
        const auto width = static_cast<std::int32_t>(rest.panels.width);
        added = outliers < width ? outliers : width;
        const std::int64_t end = (added + panel_multiple - 1) / panel_multiple * slice;
        __syncthreads();
        sum_async<Tile>(bytes_of(rest.panels.x, m, width), bytes_of(rest.panels.w, n, width),
                        {made_again(job.row0), made_again(job.col0), 0, end}, shared, y,
                        SplitProduct<Tile>{rest.is_exact});
    }
    add_in_order<Tile>(job, m, n, rest, added, rest.in_pairs ? 2 * outliers : outliers,
                       reinterpret_cast<float*>(shared), y);
    switch (rest.out.dtype) {
        case DType::f16: return store_values<Tile>(y, job, rest, static_cast<__half*>(rest.out.data));
        case DType::bf16: return store_values<Tile>(y, job, rest, static_cast<__nv_bfloat16*>(rest.out.data));
        default: return store_values<Tile>(y, job, rest, static_cast<float*>(rest.out.data));
    }
}

template <class Tile, SliceCopy copy>
__global__ void __launch_bounds__(Tile::threads, copy == SliceCopy::async ? Tile::resident : 1)
    linear_kernel(Operand a, Operand b, std::int64_t k, std::int64_t depth, Rest rest) {
    if constexpr (has_fused_linear) {
        OCTAVO_DYNAMIC_SHARED(std::int8_t, shared);
        const Job job = job_of<Tile>(a.rows, b.rows, k, depth);
        wait_for_launch_before();
        Sums<Tile> sums = {};
        sum_products<Tile, copy>(a, b, job, shared, sums);
        const std::int32_t outliers = rest.list.count != nullptr ? *rest.list.count : 0;
        Values<Tile> y = {};
        if (std::is_same_v<Tile, Small> && gridDim.y > 1) {
            if constexpr (std::is_same_v<Tile, Small>) {
                std::int64_t totals[Tile::row_fragments][Tile::col_fragments][4] = {};
                if (!add_parts<Tile>(sums, rest, totals)) return;
                start_values<Tile>(totals, job, a.rows, b.rows, rest, outliers, shared, y);
            }
        } else {
            start_values<Tile>(sums, job, a.rows, b.rows, rest, outliers, shared, y);
        }
        finish<Tile>(y, job, a.rows, b.rows, rest, outliers, shared);
    } else {
        must_not_run();
    }
}

// --- launch ---------------------------------------------------------------------------------------------------------

template <class Tile, SliceCopy copy>
void launch_tiles(const ConstMatrix& a, const ConstMatrix& b, std::int64_t parts, const Rest& rest,
                  cudaStream_t stream) {
    constexpr std::size_t shared = shared_of<Tile, SliceCopy::async>;  // panels come so, however codes do
    const auto kernel = linear_kernel<Tile, copy>;
    if constexpr (shared > std::size_t{48} << 10) {
        static OncePerDevice set_up;
        set_up([&] { allow_shared(kernel, shared); });
    }
    const std::int64_t depth = depth_of_part(b.cols, parts);
    const auto with_work = static_cast<unsigned>(parts_with_work(b.cols, depth));
    launch(
        kernel,
        {dim3(static_cast<unsigned>(tiles_of<Tile>(a.rows, b.rows)), with_work), Tile::threads, shared, begins_early()},
        stream, operand_of(a), operand_of(b), b.cols, depth, rest);
}

// Codes of X are always aligned; how those of W are, decides.
SliceCopy copy_of(const ConstMatrix& codes) {
    return rows_are_aligned(codes, chunk) ? SliceCopy::async
           : rows_are_aligned(codes, 1)   ? SliceCopy::shifted
                                          : SliceCopy::bytes;
}

// Of the tiles there is only the small one where rows of W are not aligned.
Size tile_for(std::int64_t m, const ConstMatrix& codes) {
    const SliceCopy copy = copy_of(codes);
    return copy == SliceCopy::async ? size_for(m, codes.rows, copy) : Size::small;
}

}  // namespace

FusedLinear::FusedLinear(std::int64_t m, const WeightView& weight, const LinearOptions& options) {
    const ConstMatrix& codes = weight.codes;
    const bool has_zeropoint = weight.scheme == Scheme::zeropoint;
    const bool per_element = options.outliers == Outliers::rows;
    if (tile_for(m, codes) == Size::small) parts_ = parts_for(m, codes.rows, codes.cols);
    // Where sums do not fit int32, blocks share the depth however many tiles there are. No code of X is -128.
    parts_ = std::max(parts_, product_parts(codes.cols));
    parts_ = parts_with_work(codes.cols, depth_of_part(codes.cols, parts_));
    if (parts_ > 1) {
        tickets_ = tiles_of<Small>(m, codes.rows);
        partial_sums_ = tickets_ * parts_ * Small::rows * Small::cols;
    }
    if (options.outliers == Outliers::none) return;
    in_pairs_ = has_zeropoint && per_element && weight.rotation == 0;
    in_order_ = per_element;
    wants_excluded_codes_ = has_zeropoint && !per_element && weight.rotation == 0;
    const bool is_listed = options.outliers == Outliers::static_;
    is_exact_ = is_listed && weight.outlier_weight.dtype != DType::f32;
    if (in_pairs_) return;
    const std::int64_t most = is_listed ? weight.outlier_columns.size : codes.cols;
    panel_width_ = std::min(most_panel_width, blocks_for(most, panel_multiple) * panel_multiple);
}

void FusedLinear::start(const CodedX& coded, ConstMatrix x, const LinearLayer& layer, const Exclusion& exclusion,
                        const Panels& panels, unsigned* tickets, std::int32_t* partial, cudaStream_t stream) const {
    const auto& [weight, bias, out] = layer;
    const Rest rest{
        .scale_x = coded.scale,
        .zeropoint_x = coded.zeropoint,
        .sums_x = coded.sums,
        .one_scale = coded.groups == 1,
        .scale_w = span_of<float>(weight.scale),
        .zeropoint_w = span_of<float>(weight.zeropoint),
        .code_sums = span_of<std::int32_t>(weight.code_sums),
        .depth = weight.codes.cols,
        .bias = float_span_of(bias),
        .columns = outlier_columns_of(x, weight, exclusion.per_element, exclusion.elements),
        .list = exclusion.list,
        .panels = panels,
        .in_order = in_order_ || x.dtype == DType::f32,
        .in_pairs = in_pairs_,
        .is_exact = is_exact_,
        .partial = partial,
        .tickets = tickets,
        .out = out,
        .wide = writes_wide(out),
    };
    const ConstMatrix& codes = weight.codes;
    const Size size = parts_ > 1 ? Size::small : tile_for(out.rows, codes);
    switch (copy_of(codes)) {
        case SliceCopy::shifted:
            return launch_tiles<Small, SliceCopy::shifted>(coded.codes, codes, parts_, rest, stream);
        case SliceCopy::bytes: return launch_tiles<Small, SliceCopy::bytes>(coded.codes, codes, parts_, rest, stream);
        case SliceCopy::wide:
        case SliceCopy::async: break;
    }
    switch (size) {
        case Size::large: return launch_tiles<Large, SliceCopy::async>(coded.codes, codes, 1, rest, stream);
        case Size::medium: return launch_tiles<Medium, SliceCopy::async>(coded.codes, codes, 1, rest, stream);
        case Size::small: return launch_tiles<Small, SliceCopy::async>(coded.codes, codes, parts_, rest, stream);
    }
}

}  // namespace octavo::cuda
