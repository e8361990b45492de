// Rows in blocks of b features times the Hadamard matrix over sqrt(b) (octavo/quantize.hpp), into float32, for the
// weight-only product. (What becomes codes is rotated as it is quantized.)
//
// A block of threads has 256 features of a row, a thread one (rotation.cuh).
#include "device.cuh"
#include "operations.hpp"
#include "rotation.cuh"

namespace octavo::cuda {
namespace {

constexpr int threads = most_rotation;

template <class T>
__global__ void __launch_bounds__(threads)
    rotate_kernel(View<const T> x, int rotation, float factor, float* out, std::int64_t width) {
    __shared__ float values[2][threads];
    const int thread = static_cast<int>(threadIdx.x);
    const std::int64_t chunks = (width + threads - 1) / threads;
    const std::int64_t row = blockIdx.x / chunks;
    const std::int64_t column = blockIdx.x % chunks * threads + thread;
    float value = 0.0F;
    if (column < x.cols) value = to_float(*x.at(row, column)) * factor;
    value = rotated(value, thread, rotation, values);
    if (column < width) out[row * width + column] = value;
}

}  // namespace

void rotate(ConstMatrix x, std::int32_t rotation, float factor, float* out, cudaStream_t stream) {
    const std::int64_t width = rotated_size(x.cols, rotation);
    const std::int64_t blocks = x.rows * blocks_for(width, threads);
    if (blocks == 0) return;
    with_float(x.dtype, [&]<class T>(Type<T>) {
        launch(rotate_kernel<T>, Grid{static_cast<unsigned>(blocks), threads}, stream, view_of<T>(x), rotation, factor,
               out, width);
    });
}

}  // namespace octavo::cuda
