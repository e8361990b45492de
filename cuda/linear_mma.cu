// LLM.int8()'s product with everything after it, in one kernel (paper Eq. 8; zeropoint: Eq. 4-5), from sm_80 on. The
// sums of a tile (mma_tile.cuh) become y in the registers that hold them (linear_epilogue.cuh); no int32 goes to memory
// but where several blocks share the depth of a tile: then each writes its sums, and the last to come adds them.
//
// On sm_90a large tiles are those of linear_wgmma.cu.
#include <type_traits>

#include "division.hpp"
#include "gemm.hpp"
#include "linear_epilogue.cuh"
#include "linear_wgmma.cuh"
#include "memory.hpp"
#include "mma_tile.cuh"
#include "operations.hpp"

namespace octavo::cuda {
namespace {

// --- outlier columns ------------------------------------------------------------------------------------------------

// Products of a step of 8 of them.
template <class Tile>
struct SplitProduct {
    bool is_exact;  // whether all weights are numbers of tf32

    __device__ void operator()(const Fragments<Tile>& from, int /*present*/, Values<Tile>& y) const {
#pragma unroll
        for (int u = 0; u < Tile::col_fragments; ++u) {
            const std::uint32_t high[2] = {high_part(from.b[u][0]), high_part(from.b[u][1])};
#pragma unroll
            for (int t = 0; t < Tile::row_fragments; ++t) multiply_add_tf32(y[t][u], from.a[t], high);
        }
        if (is_exact) return;
#pragma unroll
        for (int t = 0; t < Tile::row_fragments; ++t) {
            std::uint32_t finite[4];
            finite_part(from.a[t], finite);
#pragma unroll
            for (int u = 0; u < Tile::col_fragments; ++u) {
                const std::uint32_t low[2] = {low_part(from.b[u][0]), low_part(from.b[u][1])};
                multiply_add_tf32(y[t][u], finite, low);
            }
        }
    }
};

// --- kernel ---------------------------------------------------------------------------------------------------------

template <class Tile, SliceCopy copy>
__global__ void __launch_bounds__(Tile::threads, copy == SliceCopy::async ? Tile::resident : 1)
    linear_kernel(Operand a, Operand b, std::int64_t k, Parts parts, Rest rest) {
    if constexpr (has_fused_linear) {
        OCTAVO_DYNAMIC_SHARED(std::int8_t, shared);
        const Job job = job_of<Tile>(a.rows, b.rows, k, parts);
        a.rows = rows_until(a.rows, job, parts);
        if constexpr (copy != SliceCopy::async) wait_for_launch_before();
        Sums<Tile> sums = {};
        sum_products<Tile, copy>(a, b, job, shared, sums, Picker<Tile::cols, Tile::threads, PlaceInSlice>(rest, job));
        const std::int32_t outliers = rest.list.count != nullptr ? *rest.list.count : 0;
        bool of_x = false;
        const ColumnsInMemory<Tile> columns{rest};
        Values<Tile> y = {};
        if (std::is_same_v<Tile, Small> && parts.count > 1) {
            if constexpr (std::is_same_v<Tile, Small>) {
                std::int64_t totals[Tile::row_fragments][Tile::col_fragments][4];
                if (!add_parts<Tile>(sums, parts, rest, totals)) return;
                of_x = multiplies_codes<Tile>(job, a.rows, rest, outliers);
                start_values<Tile>(totals, job, a.rows, b.rows, rest, columns, outliers, of_x, shared, y);
            }
        } else {
            if (parts.count > 1 && !add_parts<Tile>(sums, parts, rest, sums)) return;
            of_x = multiplies_codes<Tile>(job, a.rows, rest, outliers);
            start_values<Tile>(sums, job, a.rows, b.rows, rest, columns, outliers, of_x, shared, y);
        }
        finish<Tile>(y, job, a.rows, b.rows, rest, columns, outliers, of_x, shared,
                     [&](const Operand& panel_x, const Operand& panel_w, const Job& part) {
                         sum_async<Tile, false>(panel_x, panel_w, part, shared, y, SplitProduct<Tile>{rest.is_exact});
                     });
    } else {
        must_not_run();
    }
}

// --- launch ---------------------------------------------------------------------------------------------------------

template <class Tile, SliceCopy copy>
void launch_tiles(const ConstMatrix& a, const ConstMatrix& b, const Division& division, const Rest& rest,
                  cudaStream_t stream) {
    constexpr std::size_t shared = shared_of<Tile, SliceCopy::async>;  // panels come so, however codes do
    const auto kernel = linear_kernel<Tile, copy>;
    if constexpr (shared > std::size_t{48} << 10) {
        static OncePerDevice set_up;
        set_up([&] { allow_shared(kernel, shared); });
    }
    const Parts own = parts_of(b.cols, division.parts, division.height);
    const auto blocks = static_cast<unsigned>(tiles_of<Tile>(a.rows, b.rows, own.height) * own.count);
    launch(kernel, {blocks, Tile::threads, shared, begins_early()}, stream, operand_of(a), operand_of(b), b.cols, own,
           rest);
}

// Codes of X are always aligned; how those of W are, decides.
SliceCopy copy_of(const ConstMatrix& codes) {
    return rows_are_aligned(codes, chunk) ? SliceCopy::async
           : rows_are_aligned(codes, 1)   ? SliceCopy::shifted
                                          : SliceCopy::bytes;
}

// Of the tiles there is only the small one where rows of W are not aligned, or sums do not fit int32.
Division divide(std::int64_t m, const ConstMatrix& codes) {
    const std::int64_t least = product_parts(codes.cols);
    const Choice first = copy_of(codes) != SliceCopy::async || least > 1 ? Choice::small
                         : device_facts().wgmma == Wgmma::right          ? Choice::wide
                                                                         : Choice::large;
    Division found = divide_product(m, codes.rows, codes.cols, device_facts().multiprocessors, first);
    if (least > found.parts) found.parts = parts_of(codes.cols, least, found.height).count;
    return found;
}

}  // namespace

FusedLinear::FusedLinear(std::int64_t m, const WeightView& weight, const LinearOptions& options) {
    const ConstMatrix& codes = weight.codes;
    const bool has_zeropoint = weight.scheme == Scheme::zeropoint;
    const bool per_element = options.outliers == Outliers::rows;
    if (m > 0 && codes.rows > 0) division_ = divide(m, codes);
    if (division_.parts > 1) {
        const TileShape& tile = tile_shapes[static_cast<std::size_t>(division_.tile)];
        tickets_ = blocks_for(m, division_.height) * blocks_for(codes.rows, tile.cols);
        partial_sums_ = tickets_ * division_.parts * tile.rows * tile.cols;
    }
    const std::int64_t rows = m > 0 && codes.rows > 0 ? blocks_for(m, division_.height) : 0;
    if (copy_of(codes) == SliceCopy::async && codes.cols <= most_picked_depth && rows <= most_pickers) pickers_ = rows;
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

bool FusedLinear::takes_bits(const ConstMatrix& x, const WeightView& weight, const LinearOptions& options) {
    if (size_of(x.dtype) != 2) return false;
    const ConstMatrix& kept = weight.outlier_weight;
    const bool lie_side_by_side = kept.col_stride == 1 && kept.row_stride >= kept.cols;
    if (weight.outlier_columns.size > 0 && (kept.dtype != x.dtype || !lie_side_by_side)) return false;
    return options.outliers == Outliers::static_ ||
           (options.outliers == Outliers::columns && weight.scheme == Scheme::absmax && weight.rotation == 0 &&
            weight.codes.rows % rows_of_codes == 0);
}

void FusedLinear::start(const CodedX& coded, ConstMatrix x, const LinearLayer& layer, const Exclusion& exclusion,
                        const Panels& panels, unsigned* tickets, std::int32_t* partial, cudaStream_t stream) const {
    const WeightView& weight = layer.weight;
    const ConstVector& bias = layer.bias;
    const Matrix& out = layer.out;
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
        .picked_height = panels.pickers > 0 ? static_cast<int>(division_.height) : 0,
        .in_order = in_order_ || x.dtype == DType::f32,
        .in_pairs = in_pairs_,
        .is_exact = is_exact_,
        .partial = partial,
        .tickets = tickets,
        .out = out,
        .wide = writes_wide(out),
    };
    const ConstMatrix& codes = weight.codes;
    switch (copy_of(codes)) {
        case SliceCopy::shifted:
            return launch_tiles<Small, SliceCopy::shifted>(coded.codes, codes, division_, rest, stream);
        case SliceCopy::bytes:
            return launch_tiles<Small, SliceCopy::bytes>(coded.codes, codes, division_, rest, stream);
        case SliceCopy::wide:
        case SliceCopy::async: break;
    }
    switch (division_.tile) {
        case Choice::wide: return start_wgmma<Wide>(coded.codes, codes, division_, rest, stream);
        case Choice::high: return start_wgmma<High>(coded.codes, codes, division_, rest, stream);
        case Choice::square: return start_wgmma<Square>(coded.codes, codes, division_, rest, stream);
        case Choice::large: return launch_tiles<Large, SliceCopy::async>(coded.codes, codes, division_, rest, stream);
        case Choice::medium: return launch_tiles<Medium, SliceCopy::async>(coded.codes, codes, division_, rest, stream);
        case Choice::tall: return launch_tiles<Tall, SliceCopy::async>(coded.codes, codes, division_, rest, stream);
        case Choice::small: return launch_tiles<Small, SliceCopy::async>(coded.codes, codes, division_, rest, stream);
    }
}

}  // namespace octavo::cuda
