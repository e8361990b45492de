// Rows in blocks of b features times the Hadamard matrix over sqrt(b) (octavo/quantize.hpp), without what is excluded,
// into float32; times 2^-8 where their sums overflow, if the caller takes note of it. For the weight-only product, and
// for quantization where it can't rotate in registers (quantize.cu).
//
// A block of threads has 256 features of a row, a thread one (rotation.cuh).
#include "bits.cuh"
#include "criterion.cuh"
#include "device.cuh"
#include "marks.cuh"
#include "operations.hpp"
#include "rotation.cuh"

namespace octavo::cuda {
namespace {

constexpr int threads = most_rotation;

template <class T>
__global__ void __launch_bounds__(threads)
    rotate_kernel(View<const T> x, int rotation, Exclusion exclusion, float factor, float* out, std::int64_t width,
                  std::uint8_t* small) {
    __shared__ float values[2][threads];
    const int thread = static_cast<int>(threadIdx.x);
    const std::int64_t chunks = (width + threads - 1) / threads;
    const std::int64_t row = blockIdx.x / chunks;
    const std::int64_t column = blockIdx.x % chunks * threads + thread;
    float value = 0.0F;
    if (column < x.cols) {
        value = to_float(*x.at(row, column));
        const bool left_out =
            exclusion.per_element
                ? is_outlier(value, static_cast<std::int32_t>(column), limit_of_row(exclusion.elements, row))
                : (marked_word(exclusion.marks, words_for(x.cols), column / 32) >> (column % 32) & 1U) != 0;
        value = left_out ? 0.0F : value * factor;
    }
    const float given = value;
    value = rotated(given, thread, rotation, values);
    if (small != nullptr) {
        const bool overflows = __syncthreads_or(static_cast<int>(!is_finite(value))) != 0;
        if (overflows) value = rotated(given * rotation_factor, thread, rotation, values);
        if (thread == 0) small[blockIdx.x] = static_cast<std::uint8_t>(overflows);
    }
    if (column < width) out[row * width + column] = value;
}

}  // namespace

void rotate(ConstMatrix x, std::int32_t rotation, const Exclusion& exclusion, float factor, float* out,
            cudaStream_t stream, std::uint8_t* small) {
    const std::int64_t width = rotated_size(x.cols, rotation);
    const std::int64_t blocks = x.rows * blocks_for(width, threads);
    if (blocks == 0) return;
    with_float(x.dtype, [&]<class T>(Type<T>) {
        launch(rotate_kernel<T>, Grid{static_cast<unsigned>(blocks), threads}, stream, view_of<T>(x), rotation,
               exclusion, factor, out, width, small);
    });
}

}  // namespace octavo::cuda
