// Which int8 product is used, what is done about operands that it cannot read well, and products too deep for int32.
//
// cuBLASLt where it takes the operands as they are, else our own (gemm_mma.cu), which takes any. Ours is slower where
// operands are not aligned. So where a product is large, and reads them many times, aligned copies of them are made
// first, if the caller allows it: `linear` does not, which promises how few launches it makes.
#include "gemm.hpp"

#include <algorithm>
#include <cstdint>
#include <string>

#include "check.hpp"
#include "gemm_cublaslt.hpp"
#include "memory.hpp"
#include "octavo/error.hpp"
#include "operations.hpp"

namespace octavo::cuda {
namespace {

// What rows of copies are multiples of.
constexpr std::int64_t copy_alignment = 16;

// Whether copies are worth two more launches: where the output is so large that blocks read every operand several
// times, a few more bytes read and written once replace loads that are slower (`SliceCopy`, gemm_mma.cu) and repeated.
bool copies_pay(std::int64_t m, std::int64_t n, std::int64_t k) {
    constexpr std::int64_t least_size = 256;
    constexpr std::int64_t least_depth = 64;
    return m >= least_size && n >= least_size && k >= least_depth;
}

ConstMatrix transposed(const ConstMatrix& matrix) {
    ConstMatrix result = matrix;
    result.rows = matrix.cols;
    result.cols = matrix.rows;
    result.row_stride = matrix.col_stride;
    result.col_stride = matrix.row_stride;
    return result;
}

bool by_cublaslt(const ConstMatrix& a, const ConstMatrix& b, const Matrix& out, cudaStream_t stream) {
    return cublaslt_takes(a, b, out) && cublaslt_multiply(a, b, out, stream);
}

// An operand, or its place in the workspace for an aligned copy.
class Aligned {
public:
    Aligned(const ConstMatrix& given, Workspace& workspace) : given_(given) {
        if (reads_wide(given, given)) return;
        width_ = (given.cols + copy_alignment - 1) / copy_alignment * copy_alignment;
        copy_ = workspace.reserve<std::int8_t>(given.rows * width_);
    }

    ConstMatrix made(const Workspace& workspace, cudaStream_t stream) const {
        std::int8_t* const copy = workspace.at(copy_);
        if (copy == nullptr) return given_;
        copy_aligned(given_, copy, width_, stream);
        return {copy, DType::i8, given_.device, given_.rows, width_, width_, 1};
    }

private:
    ConstMatrix given_;
    std::int64_t width_ = 0;
    Workspace::Part<std::int8_t> copy_;
};

void product(const ConstMatrix& a, const ConstMatrix& b, const Matrix& out, Copies copies, cudaStream_t stream) {
    // Columns that are contiguous are rows of the transposed product.
    if (out.col_stride != 1 && out.row_stride == 1 && out.cols > 1) {
        const ConstMatrix turned = transposed(out);
        return product(
            b, a, {out.data, out.dtype, out.device, turned.rows, turned.cols, turned.row_stride, turned.col_stride},
            copies, stream);
    }
    if (by_cublaslt(a, b, out, stream)) return;
    if (copies == Copies::none || reads_wide(a, b) || !copies_pay(out.rows, out.cols, a.cols)) {
        return mma_multiply(a, b, out, stream);
    }
    Workspace workspace(stream);
    const Aligned aligned_a(a, workspace);
    const Aligned aligned_b(b, workspace);
    workspace.allocate();
    ConstMatrix wide_a = aligned_a.made(workspace, stream);
    ConstMatrix wide_b = aligned_b.made(workspace, stream);
    // An aligned operand beside a copy may have fewer columns than it. Those behind are zeros, so they may be left out.
    wide_a.cols = wide_b.cols = std::min(wide_a.cols, wide_b.cols);
    if (!by_cublaslt(wide_a, wide_b, out, stream)) mma_multiply(wide_a, wide_b, out, stream);
}

ConstMatrix columns_of(const ConstMatrix& matrix, std::int64_t begin, std::int64_t count) {
    ConstMatrix result = matrix;
    result.data = static_cast<const std::int8_t*>(matrix.data) + begin * matrix.col_stride;
    result.cols = count;
    return result;
}

// Throws the error of a sum that does not fit, after the CPU's words. The stream has been waited for.
[[noreturn]] void report_overflow(const std::int32_t* acc, std::int64_t parts, std::int64_t size, std::int64_t place,
                                  std::int64_t n, cudaStream_t stream) {
    std::int64_t sum = 0;
    for (std::int64_t part = 0; part < parts; ++part) {
        std::int32_t value = 0;
        check(cudaMemcpyAsync(&value, acc + part * size + place, sizeof value, cudaMemcpyDeviceToHost, stream),
              "cudaMemcpyAsync");
        check(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
        sum += value;
    }
    throw Error(ErrorKind::value, "int8_matmul: out: expected sums that fit int32, got " + std::to_string(sum) +
                                      " at row " + std::to_string(place / n) + ", column " + std::to_string(place % n));
}

}  // namespace

void multiply(ConstMatrix a, ConstMatrix b, std::int32_t* acc, Copies copies, cudaStream_t stream) {
    const std::int64_t m = a.rows;
    const std::int64_t n = b.rows;
    for (std::int64_t part = 0; part < product_parts(a.cols); ++part) {
        const std::int64_t begin = part * part_depth;
        const std::int64_t depth = std::min(part_depth, a.cols - begin);
        product(columns_of(a, begin, depth), columns_of(b, begin, depth),
                {acc + part * m * n, DType::i32, a.device, m, n, n, 1}, copies, stream);
    }
}

void int8_matmul(ConstMatrix a, ConstMatrix b, Matrix out, cudaStream_t stream) {
    const std::int64_t parts = product_parts(a.cols);
    if (parts == 1) return product(a, b, out, Copies::where_they_pay, stream);
    refuse_capture(stream, "int8_matmul");
    const std::int64_t size = out.rows * out.cols;
    Workspace workspace(stream);
    const auto acc = workspace.reserve<std::int32_t>(parts * size);
    const auto overflow = workspace.reserve<unsigned long long>(1);
    workspace.allocate();
    multiply(a, b, workspace.at(acc), Copies::where_they_pay, stream);
    sum_parts(workspace.at(acc), parts, out, workspace.at(overflow), stream);
    unsigned long long place = no_overflow;
    check(cudaMemcpyAsync(&place, workspace.at(overflow), sizeof place, cudaMemcpyDeviceToHost, stream),
          "cudaMemcpyAsync");
    check(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
    if (place == no_overflow) return;
    report_overflow(workspace.at(acc), parts, size, static_cast<std::int64_t>(place), out.cols, stream);
}

}  // namespace octavo::cuda
