// The gradient of X:  out[i, h] = sum_j grad[i, j] * w[j, h],  w the dequantized weight, in float32, with the sums in
// the order of octavo/linear.hpp, so that they are those of the CPU.
//
// A block has a tile of 32 rows by 256 columns of the output. It brings 16 output features at a time to shared memory,
// dequantized; a thread sums 8 rows by 4 columns. At the end the tile goes through shared memory row by row, where it
// is rotated back, a thread for each column. Kept columns are a second product, whose columns replace those of the
// first.
//
// The int8 product is `linear` with one scale: of grad, which a kernel multiplies by the scales of the output features,
// by codes that another has brought together along n.
#include "device.cuh"
#include "gemm.hpp"
#include "memory.hpp"
#include "operations.hpp"
#include "rotation.cuh"

namespace octavo::cuda {
namespace {

constexpr int tile_rows = 32;
constexpr int tile_cols = most_rotation;
constexpr int depth = 16;
constexpr int slice = 256;  // features that are summed before they are added to the sums of the others
constexpr int thread_rows = 8;
constexpr int thread_cols = 4;
constexpr int threads = tile_rows / thread_rows * (tile_cols / thread_cols);
static_assert(threads == tile_cols);  // a thread loads, rotates and stores one column

// The weight as columns of floats, and where their sums go.
struct DequantizedColumns {
    View<const std::int8_t> codes;
    Span<const float> scale;
    Span<const float> zeropoint;
    int rotation;

    __device__ float operator()(std::int64_t feature, std::int64_t col) const {
        const auto code = static_cast<float>(*codes.at(feature, col));
        const float shift = zeropoint.present() ? zeropoint.of_group(feature) : 0.0F;
        return __fmul_rn(__fadd_rn(code, shift), scale.of_group(feature));
    }
    __device__ std::int64_t features() const { return codes.rows; }
    __device__ std::int64_t cols() const { return codes.cols; }
    __device__ std::int64_t place(std::int64_t col) const { return col; }
};

struct KeptColumns {
    FloatView values;
    Span<const std::int32_t> columns;
    std::int64_t rows;
    static constexpr int rotation = 0;

    __device__ float operator()(std::int64_t feature, std::int64_t col) const { return values(feature, col); }
    __device__ std::int64_t features() const { return rows; }
    __device__ std::int64_t cols() const { return columns.size; }
    __device__ std::int64_t place(std::int64_t col) const { return columns[col]; }
};

template <class T, class Weight>
__global__ void __launch_bounds__(threads) backward_kernel(FloatView grad, Weight weight, View<T> out) {
    __shared__ __align__(16) float grads[depth][tile_rows];
    __shared__ __align__(16) float weights[depth][tile_cols];
    __shared__ float exchange[2][tile_cols];
    const int thread = static_cast<int>(threadIdx.x);
    const std::int64_t col_tiles = (weight.cols() + tile_cols - 1) / tile_cols;
    const std::int64_t first_row = blockIdx.x / col_tiles * tile_rows;
    const std::int64_t col = blockIdx.x % col_tiles * tile_cols + thread;
    const int own_row = thread / (tile_cols / thread_cols) * thread_rows;
    const int own_col = thread % (tile_cols / thread_cols) * thread_cols;

    float total[thread_rows][thread_cols] = {};
    float sum[thread_rows][thread_cols] = {};
    for (std::int64_t begin = 0; begin < weight.features(); begin += depth) {
        for (int e = thread; e < tile_rows * depth; e += threads) {
            const std::int64_t row = first_row + e / depth;
            const std::int64_t feature = begin + e % depth;
            const bool inside = row < out.rows && feature < weight.features();
            grads[e % depth][e / depth] = inside ? grad(row, feature) : 0.0F;
        }
#pragma unroll 4  // more of them keep more addresses than sm_75 has registers for
        for (int j = 0; j < depth; ++j) {
            const bool inside = begin + j < weight.features() && col < weight.cols();
            weights[j][thread] = inside ? weight(begin + j, col) : 0.0F;
        }
        __syncthreads();
        const std::int64_t left = weight.features() - begin;
        const int deep = left < depth ? static_cast<int>(left) : depth;
        for (int j = 0; j < deep; ++j) {
            float x[thread_rows];
#pragma unroll
            for (int i = 0; i < thread_rows; i += 4) {
                const auto four = load<4>(&grads[j][own_row + i]);
#pragma unroll
                for (int e = 0; e < 4; ++e) x[i + e] = four[e];
            }
            const auto w = load<thread_cols>(&weights[j][own_col]);
#pragma unroll
            for (int i = 0; i < thread_rows; ++i) {
#pragma unroll
                for (int c = 0; c < thread_cols; ++c) sum[i][c] = fmaf(x[i], w[c], sum[i][c]);
            }
        }
        const bool last_of_slice = (begin + depth) % slice == 0 || left <= depth;
        if (last_of_slice) {
#pragma unroll
            for (int i = 0; i < thread_rows; ++i) {
#pragma unroll
                for (int c = 0; c < thread_cols; ++c) {
                    total[i][c] = __fadd_rn(total[i][c], sum[i][c]);
                    sum[i][c] = 0.0F;
                }
            }
        }
        __syncthreads();
    }

    // As many rows at a time as fit where the weights were.
    for (int part = 0; part < tile_rows; part += depth) {
        if (own_row >= part && own_row < part + depth) {
#pragma unroll
            for (int i = 0; i < thread_rows; ++i) {
#pragma unroll
                for (int c = 0; c < thread_cols; ++c) weights[own_row - part + i][own_col + c] = total[i][c];
            }
        }
        __syncthreads();
        for (int i = 0; i < depth; ++i) {
            const float value = rotated(weights[i][thread], thread, weight.rotation, exchange);
            __syncthreads();
            const std::int64_t row = first_row + part + i;
            if (row >= out.rows || col >= weight.cols()) continue;
            const std::int64_t place = weight.place(col);
            if (place >= 0 && place < out.cols) *out.at(row, place) = from_float<T>(value);
        }
    }
}

template <class Weight>
void launch_backward(const ConstMatrix& grad, const Weight& weight, std::int64_t cols, const Matrix& out,
                     cudaStream_t stream) {
    const std::int64_t blocks = blocks_for(out.rows, tile_rows) * blocks_for(cols, tile_cols);
    with_float(out.dtype, [&]<class T>(Type<T>) {
        launch(backward_kernel<T, Weight>, Grid{static_cast<unsigned>(blocks), threads}, stream, float_view_of(grad),
               weight, view_of<T>(out));
    });
}

// --- the int8 product -----------------------------------------------------------------------------------------------

constexpr int row_threads = most_rotation;

// scaled[i, j] = grad[i, j] * scale[j], contiguous; *one = 1.
__global__ void __launch_bounds__(row_threads)
    scale_kernel(FloatView grad, std::int64_t cols, Span<const float> scale, float* scaled, float* one) {
    const std::int64_t chunks = (cols + row_threads - 1) / row_threads;
    const std::int64_t row = blockIdx.x / chunks;
    const std::int64_t col = blockIdx.x % chunks * row_threads + threadIdx.x;
    if (col < cols) scaled[row * cols + col] = __fmul_rn(grad(row, col), scale.of_group(col));
    if (blockIdx.x == 0 && threadIdx.x == 0) *one = 1.0F;
}

// out = the rows of y [m, width], rotated.
template <class T>
__global__ void __launch_bounds__(row_threads)
    rotate_back_kernel(const float* y, std::int64_t width, int rotation, View<T> out) {
    __shared__ float values[2][row_threads];
    const int thread = static_cast<int>(threadIdx.x);
    const std::int64_t chunks = (width + row_threads - 1) / row_threads;
    const std::int64_t row = blockIdx.x / chunks;
    const std::int64_t col = blockIdx.x % chunks * row_threads + thread;
    const float value = rotated(col < width ? y[row * width + col] : 0.0F, thread, rotation, values);
    if (col < out.cols) *out.at(row, col) = from_float<T>(value);
}

void int8_backward(const ConstMatrix& grad, const WeightView& weight, const Matrix& out, const LinearOptions& options,
                   cudaStream_t stream) {
    const std::int64_t m = grad.rows;
    const std::int64_t n = grad.cols;
    const std::int64_t width = weight.codes.cols;
    constexpr std::int64_t alignment = 16;  // of rows of codes, for what reads 16 bytes at a time
    const std::int64_t stride = (n + alignment - 1) / alignment * alignment;
    Workspace workspace(stream);
    const auto one = workspace.reserve<float>(1);
    const auto scaled = workspace.reserve<float>(m * n);
    const auto codes = workspace.reserve<std::int8_t>(width * stride);
    const auto rotated_y = workspace.reserve<float>(weight.rotation == 0 ? 0 : m * width);
    workspace.allocate();
    const std::int64_t blocks = m * blocks_for(n, row_threads);
    launch(scale_kernel, Grid{static_cast<unsigned>(blocks), row_threads}, stream, float_view_of(grad), n,
           span_of<float>(weight.scale), workspace.at(scaled), workspace.at(one));
    ConstMatrix across = weight.codes;
    std::swap(across.rows, across.cols);
    std::swap(across.row_stride, across.col_stride);
    copy_aligned(across, workspace.at(codes), stride, stream);

    const WeightView transposed{
        .codes = {workspace.at(codes), DType::i8, grad.device, width, n, stride, 1},
        .scale = {.data = workspace.at(one), .dtype = DType::f32, .device = grad.device, .size = 1},
        .code_sums = weight.code_sums,  // of the wrong features; absmax reads none
        .granularity = Granularity::row,
    };
    const ConstMatrix x{workspace.at(scaled), DType::f32, grad.device, m, n, n, 1};
    LinearLayer layer{.weight = transposed, .out = out};
    if (weight.rotation == 0) return linear(x, {&layer, 1}, options, stream);
    float* const y = workspace.at(rotated_y);
    layer.out = {y, DType::f32, grad.device, m, width, width, 1};
    linear(x, {&layer, 1}, options, stream);
    const std::int64_t row_blocks = m * blocks_for(width, row_threads);
    with_float(out.dtype, [&]<class T>(Type<T>) {
        launch(rotate_back_kernel<T>, Grid{static_cast<unsigned>(row_blocks), row_threads}, stream,
               static_cast<const float*>(y), width, weight.rotation, view_of<T>(out));
    });
}

}  // namespace

void linear_backward(ConstMatrix grad, const WeightView& weight, Matrix out, bool uses_kept, const LinearOptions* int8,
                     cudaStream_t stream) {
    if (int8 != nullptr && grad.cols > 0) {
        int8_backward(grad, weight, out, *int8, stream);
    } else {
        const DequantizedColumns columns{view_of<std::int8_t>(weight.codes), span_of<float>(weight.scale),
                                         span_of<float>(weight.zeropoint), weight.rotation};
        launch_backward(grad, columns, weight.codes.cols, out, stream);
    }
    if (!uses_kept) return;
    const KeptColumns kept{float_view_of(weight.outlier_weight), span_of<std::int32_t>(weight.outlier_columns),
                           weight.codes.rows};
    launch_backward(grad, kept, weight.outlier_columns.size, out, stream);
}

}  // namespace octavo::cuda
