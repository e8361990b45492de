// The int8 product on the emulated GPU, its stages one by one: every tile and every way of reading operands, against a
// plain loop; what cuBLASLt is given and what happens where it does not do it; capture.
//
// Which tile is chosen depends on the multiprocessors and the architecture, which the environment sets (CMakeLists.txt
// runs this with several).
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <string_view>
#include <vector>

#include "check.hpp"
#include "gemm.hpp"
#include "gemm_cublaslt.hpp"
#include "memory.hpp"
#include "octavo/error.hpp"
#include "operations.hpp"
#include "random.hpp"
#include "runtime.hpp"

using octavo::ConstMatrix;
using octavo::ConstVector;
using octavo::DType;
using octavo::Matrix;

namespace cuda = octavo::cuda;

namespace {

void must(cudaError_t status) {
    if (status != cudaSuccess) throw octavo::Error(octavo::ErrorKind::device, cudaGetErrorString(status));
}

// Device memory, which the emulator lets the host read between launches. Its end is the end of what may be touched.
template <class T>
class Memory {
public:
    explicit Memory(std::int64_t count) : count_(count) {
        must(cudaMalloc(reinterpret_cast<void**>(&data_), static_cast<std::size_t>(count) * sizeof(T)));
    }
    ~Memory() { cudaFree(data_); }
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;

    [[nodiscard]] T* data() const { return data_; }
    [[nodiscard]] std::vector<T> read() const {
        std::vector<T> values(static_cast<std::size_t>(count_));
        must(cudaMemcpy(values.data(), data_, values.size() * sizeof(T), cudaMemcpyDeviceToHost));
        return values;
    }
    void write(const std::vector<T>& values) const {
        must(cudaMemcpy(data_, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
    }

private:
    std::int64_t count_;
    T* data_ = nullptr;
};

enum class Order : std::uint8_t {
    contiguous,   // aligned where k is a multiple of 16
    padded,       // rows aligned to 16 bytes, whatever k is
    shifted,      // one byte behind an aligned address
    column_major  // contiguous along the rows' axis
};
constexpr Order orders[] = {Order::contiguous, Order::padded, Order::shifted, Order::column_major};

std::int64_t round_up(std::int64_t value, std::int64_t to) { return (value + to - 1) / to * to; }

// Codes on the device; the whole range of int8, -128 included.
class Codes {
public:
    Codes(Random& random, std::int64_t rows, std::int64_t cols, Order order)
        : row_stride_(order == Order::column_major ? 1
                      : order == Order::padded     ? round_up(cols, 16) + 16
                                                   : cols),
          col_stride_(order == Order::column_major ? rows : 1),
          offset_(order == Order::shifted ? 1 : 0),
          rows_(rows),
          cols_(cols),
          memory_(std::max<std::int64_t>(
              1, rows * cols == 0 ? 0 : offset_ + (rows - 1) * row_stride_ + (cols - 1) * col_stride_ + 1)) {
        std::vector<std::int8_t> all = memory_.read();
        for (std::int8_t& code : all) code = static_cast<std::int8_t>(random.integer(-128, 127));
        memory_.write(all);
        values_.resize(static_cast<std::size_t>(rows * cols));
        for (std::int64_t i = 0; i < rows; ++i) {
            for (std::int64_t j = 0; j < cols; ++j) {
                values_[static_cast<std::size_t>(i * cols + j)] =
                    all[static_cast<std::size_t>(offset_ + i * row_stride_ + j * col_stride_)];
            }
        }
    }

    [[nodiscard]] ConstMatrix matrix() const {
        return {
            memory_.data() + offset_, DType::i8, {octavo::DeviceKind::cuda, 0}, rows_, cols_, row_stride_, col_stride_};
    }
    [[nodiscard]] const std::int8_t* row(std::int64_t i) const { return values_.data() + i * cols_; }

private:
    std::int64_t row_stride_;
    std::int64_t col_stride_;
    std::int64_t offset_;
    std::int64_t rows_;
    std::int64_t cols_;
    Memory<std::int8_t> memory_;
    std::vector<std::int8_t> values_;
};

std::int64_t dot(const Codes& a, const Codes& b, std::int64_t i, std::int64_t j, std::int64_t begin, std::int64_t end) {
    std::int64_t sum = 0;
    for (std::int64_t h = begin; h < end; ++h) sum += a.row(i)[h] * b.row(j)[h];
    return sum;
}

// An output of int32 in which what is not written stays -1 (the emulator's 0xFF bytes).
struct Sums {
    Sums(std::int64_t rows, std::int64_t cols, std::int64_t row_stride, std::int64_t col_stride)
        : memory((rows - 1) * row_stride + (cols - 1) * col_stride + 1),
          matrix{memory.data(), DType::i32, {octavo::DeviceKind::cuda, 0}, rows, cols, row_stride, col_stride} {}

    void check(const Codes& a, const Codes& b) const {
        const std::vector<std::int32_t> found = memory.read();
        std::vector<bool> written(found.size());
        std::int64_t wrong = 0;
        for (std::int64_t i = 0; i < matrix.rows; ++i) {
            for (std::int64_t j = 0; j < matrix.cols; ++j) {
                const auto place = static_cast<std::size_t>(i * matrix.row_stride + j * matrix.col_stride);
                written[place] = true;
                if (found[place] != dot(a, b, i, j, 0, a.matrix().cols)) ++wrong;
            }
        }
        CHECK_EQ(wrong, 0);
        for (std::size_t place = 0; place < found.size(); ++place) {
            if (!written[place]) CHECK_EQ(found[place], -1);
        }
    }

    Memory<std::int32_t> memory;
    Matrix matrix;
};

struct Shape {
    std::int64_t m, n, k;
};

bool mode_is(std::string_view mode) {
    const char* const text = std::getenv("OCTAVO_SIMT_CUBLASLT");
    return text != nullptr && mode == text;
}
bool cublaslt_works() { return std::getenv("OCTAVO_SIMT_CUBLASLT") == nullptr || mode_is("refuses-first"); }

// Of the three that the stand-in's heuristic finds.
long tries_refused(int again) { return mode_is("refuses") && again == 0 ? 3 : 0; }

simt::Counters counted() {
    simt::Counters counters;
    octavo_simt_counters(&counters);
    return counters;
}

}  // namespace

TEST(our_product) {
    const Shape shapes[] = {{1, 1, 0},     {1, 1, 1},      {3, 5, 7},      {64, 64, 64},  {65, 67, 129},
                            {130, 4, 256}, {17, 300, 520}, {259, 131, 67}, {16, 32, 1100}};
    Random random(1);
    for (const Shape& s : shapes) {
        for (const Order order : orders) {
            const check::Context context(s.m, " x ", s.n, " x ", s.k, ", order ", check::show(order));
            const Codes a(random, s.m, s.k, order);
            const Codes b(random, s.n, s.k, order);
            const Sums out(s.m, s.n, s.n, 1);
            cuda::mma_multiply(a.matrix(), b.matrix(), out.matrix, nullptr);
            out.check(a, b);
        }
    }
}

TEST(strides_of_the_output) {
    Random random(2);
    const Codes a(random, 37, 96, Order::contiguous);
    const Codes b(random, 44, 96, Order::contiguous);
    for (const auto& [rows, cols] : {std::pair<std::int64_t, std::int64_t>{44, 1},
                                     {48, 1},
                                     {45, 1},
                                     {1, 37},
                                     {1, 40},
                                     {1, 39},
                                     {100, 2},
                                     {3, 120}}) {
        const check::Context context("strides ", rows, ", ", cols);
        const Sums ours(37, 44, rows, cols);
        cuda::mma_multiply(a.matrix(), b.matrix(), ours.matrix, nullptr);
        ours.check(a, b);
        const Sums any(37, 44, rows, cols);
        cuda::int8_matmul(a.matrix(), b.matrix(), any.matrix, nullptr);
        any.check(a, b);
    }
}

// Large enough for aligned copies of operands.
TEST(large_and_not_aligned) {
    Random random(3);
    for (const Shape& s : {Shape{256, 260, 70}, Shape{257, 256, 68}}) {
        for (const Order order_a : orders) {
            for (const Order order_b : {Order::padded, Order::shifted, Order::column_major}) {
                const check::Context context(s.k, ", orders ", check::show(order_a), check::show(order_b));
                const Codes a(random, s.m, s.k, order_a);
                const Codes b(random, s.n, s.k, order_b);
                const Sums out(s.m, s.n, s.n, 1);
                cuda::int8_matmul(a.matrix(), b.matrix(), out.matrix, nullptr);
                out.check(a, b);
            }
        }
    }
}

TEST(copies) {
    Random random(4);
    for (const Order order : orders) {
        const Codes codes(random, 67, 70, order);
        const Memory<std::int8_t> copy(67 * 80);
        cuda::copy_aligned(codes.matrix(), copy.data(), 80, nullptr);
        const std::vector<std::int8_t> found = copy.read();
        std::int64_t wrong = 0;
        for (std::int64_t i = 0; i < 67; ++i) {
            for (std::int64_t j = 0; j < 80; ++j) {
                wrong += found[static_cast<std::size_t>(i * 80 + j)] != (j < 70 ? codes.row(i)[j] : 0) ? 1 : 0;
            }
        }
        CHECK_EQ(wrong, 0);
    }
}

// Rows that are contiguous and not aligned, in any order, or one row in place of all; and beside an aligned operand.
TEST(rows_in_any_order) {
    Random random(10);
    const std::int64_t k = 150;
    const Codes shifted(random, 70, k, Order::shifted);
    const Codes other(random, 36, k, Order::shifted);
    const Codes aligned(random, 36, k, Order::padded);
    const auto product = [&](const ConstMatrix& a, const Codes& b, auto row_of_a) {
        const Sums out(a.rows, 36, 36, 1);
        cuda::mma_multiply(a, b.matrix(), out.matrix, nullptr);
        const std::vector<std::int32_t> found = out.memory.read();
        std::int64_t wrong = 0;
        for (std::int64_t i = 0; i < a.rows; ++i) {
            for (std::int64_t j = 0; j < 36; ++j) {
                const std::int64_t sum = dot(shifted, b, row_of_a(i), j, 0, k);
                wrong += found[static_cast<std::size_t>(i * 36 + j)] != sum ? 1 : 0;
            }
        }
        CHECK_EQ(wrong, 0);
    };
    for (const Codes* const b : {&other, &aligned}) {
        CHECK(!cuda::reads_wide(shifted.matrix(), b->matrix()));
        product(shifted.matrix(), *b, [](std::int64_t i) { return i; });
        ConstMatrix backward = shifted.matrix();
        backward.data = static_cast<const std::int8_t*>(backward.data) + 69 * backward.row_stride;
        backward.row_stride = -backward.row_stride;
        product(backward, *b, [](std::int64_t i) { return 69 - i; });
        for (const std::int64_t row : {0, 5, 69}) {
            ConstMatrix repeated = shifted.matrix();
            repeated.data = static_cast<const std::int8_t*>(repeated.data) + row * repeated.row_stride;
            repeated.row_stride = 0;
            product(repeated, *b, [row](std::int64_t) { return row; });
        }
    }
}

// Copies of operands are made where they pay, if they may be.
TEST(copies_only_where_they_may_be) {
    if (mode_is("fails")) return;
    Random random(11);
    const Codes a(random, 256, 70, Order::shifted);
    const Codes b(random, 256, 70, Order::shifted);
    for (const cuda::Copies copies : {cuda::Copies::none, cuda::Copies::where_they_pay}) {
        const Sums out(256, 256, 256, 1);
        octavo_simt_reset_counters();
        cuda::multiply(a.matrix(), b.matrix(), out.memory.data(), copies, nullptr);
        CHECK_EQ(counted().launches + counted().host_functions, copies == cuda::Copies::none ? 1 : 3);
        out.check(a, b);
    }
}

// Deeper than int32 sums can be: in parts.
TEST(parts) {
    CHECK_EQ(cuda::product_parts(0), 1);
    CHECK_EQ(cuda::product_parts(cuda::part_depth), 1);
    CHECK_EQ(cuda::product_parts(cuda::part_depth + 1), 2);
    static_assert(cuda::part_depth * 128 * 128 <= std::numeric_limits<std::int32_t>::max());
    Random random(5);
    const std::int64_t k = cuda::part_depth + 36;
    for (const Order order : {Order::contiguous, Order::shifted}) {
        const Codes a(random, 3, k, order);
        const Codes b(random, 4, k, order);
        const Memory<std::int32_t> acc(2 * 12);
        cuda::multiply(a.matrix(), b.matrix(), acc.data(), cuda::Copies::none, nullptr);
        const std::vector<std::int32_t> found = acc.read();
        for (std::int64_t i = 0; i < 3; ++i) {
            for (std::int64_t j = 0; j < 4; ++j) {
                CHECK_EQ(found[static_cast<std::size_t>(i * 4 + j)], dot(a, b, i, j, 0, cuda::part_depth));
                CHECK_EQ(found[static_cast<std::size_t>(12 + i * 4 + j)], dot(a, b, i, j, cuda::part_depth, k));
            }
        }
        const Sums out(3, 4, 4, 1);
        cuda::int8_matmul(a.matrix(), b.matrix(), out.matrix, nullptr);
        out.check(a, b);
    }
}

// The first of several sums that do not fit, whatever the order of blocks.
TEST(first_overflow) {
    const std::int64_t k = 140000;
    const std::int64_t n = 300;
    const Memory<std::int8_t> a(2 * k);
    const Memory<std::int8_t> b(n * k);
    must(cudaMemset(a.data(), 1, static_cast<std::size_t>(k)));
    must(cudaMemset(a.data() + k, 127, static_cast<std::size_t>(k)));
    must(cudaMemset(b.data(), 0, static_cast<std::size_t>(n * k)));
    must(cudaMemset(b.data() + 270 * k, 127, static_cast<std::size_t>(30 * k)));
    const octavo::Device device{octavo::DeviceKind::cuda, 0};
    const Sums out(2, n, n, 1);
    CHECK_THROWS(cuda::int8_matmul({a.data(), DType::i8, device, 2, k, k, 1}, {b.data(), DType::i8, device, n, k, k, 1},
                                   out.matrix, nullptr),
                 value,
                 "int8_matmul: out: expected sums that fit int32, got " + std::to_string(std::int64_t{127} * 127 * k) +
                     " at row 1, column 270");
}

TEST(what_cublaslt_takes) {
    Random random(7);
    const Codes a(random, 8, 64, Order::contiguous);
    const Codes b(random, 12, 64, Order::contiguous);
    const Sums out(8, 12, 12, 1);
    CHECK(cuda::cublaslt_takes(a.matrix(), b.matrix(), out.matrix));
    const auto refused = [&](auto change) {
        ConstMatrix of_a = a.matrix();
        ConstMatrix of_b = b.matrix();
        Matrix of_out = out.matrix;
        change(of_a, of_b, of_out);
        CHECK(!cuda::cublaslt_takes(of_a, of_b, of_out));
    };
    refused([](auto& x, auto& w, auto&) { x.cols = w.cols = 62; });
    refused([](auto& x, auto& w, auto&) { x.cols = w.cols = 0; });
    refused([](auto& x, auto&, auto&) { x.row_stride = 66; });
    refused([](auto& x, auto&, auto&) { x.row_stride = 0; });
    refused([](auto&, auto& w, auto&) { w.col_stride = 2; });
    refused([](auto& x, auto&, auto&) { x.data = static_cast<const std::int8_t*>(x.data) + 4; });
    refused([](auto&, auto& w, auto& y) { w.rows = y.cols = 10; });
    refused([](auto&, auto&, auto& y) { y.row_stride = 14; });
    refused([](auto&, auto&, auto& y) { y.col_stride = 8; });
}

// With the library, it multiplies; without one that does, our kernel. Both give the same.
TEST(cublaslt_or_ours) {
    Random random(8);
    const Codes a(random, 8, 64, Order::padded);
    const Codes b(random, 12, 64, Order::contiguous);
    cuda::device_facts();  // what is done once for a device is not counted
    for (int again = 0; again < 2; ++again) {
        const Sums out(8, 12, 16, 1);
        octavo_simt_reset_counters();
        if (mode_is("fails")) {
            CHECK_THROWS(cuda::int8_matmul(a.matrix(), b.matrix(), out.matrix, nullptr), device,
                         "CUDA: cublasLtMatmul: status 13 (the GPU program failed to execute)");
            continue;
        }
        cuda::int8_matmul(a.matrix(), b.matrix(), out.matrix, nullptr);
        CHECK_EQ(counted().launches, cublaslt_works() ? 0 : 1);
        CHECK_EQ(counted().host_functions, cublaslt_works() ? 1 : 0);
        CHECK_EQ(counted().synchronizations, 0);
        // Each try has a workspace. What was refused once is not tried again.
        const bool works_at_once = !mode_is("refuses-first") || again > 0;
        CHECK_EQ(counted().pool_allocations, !cublaslt_works() ? tries_refused(again) : works_at_once ? 1 : 2);
        out.check(a, b);
    }
    const std::string status = cuda::cublaslt_status();
    const char* const expected = mode_is("missing")       ? "not found (none for the emulated GPU)"
                                 : mode_is("no-function") ? "unusable (no function cublasLtMatmul)"
                                                          : "13.1.2 (";
    CHECK_EQ(status.substr(0, std::strlen(expected)), expected);
    CHECK_EQ(status.ends_with("; no handle for device 0: status 1 (another status)"), mode_is("no-handle"));
}

// The first product of a shape, captured: nothing runs until the graph does, which can do so again.
TEST(captured) {
    if (mode_is("fails")) return;
    Random random(9);
    cudaStream_t stream = nullptr;
    must(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    const Codes a(random, 20, 80, Order::contiguous);
    const Codes b(random, 24, 80, Order::contiguous);
    const Codes c(random, 20, 66, Order::contiguous);
    const Codes d(random, 24, 66, Order::contiguous);
    const Sums first(20, 24, 24, 1);
    const Sums second(20, 24, 24, 1);
    const Codes deep(random, 1, cuda::part_depth + 1, Order::contiguous);
    const Sums third(1, 1, 1, 1);
    must(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    cuda::int8_matmul(a.matrix(), b.matrix(), first.matrix, stream);
    cuda::int8_matmul(c.matrix(), d.matrix(), second.matrix, stream);
    CHECK_THROWS(cuda::int8_matmul(deep.matrix(), deep.matrix(), third.matrix, stream), device,
                 "int8_matmul: expected a stream that is not being captured");
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t executable = nullptr;
    must(cudaStreamEndCapture(stream, &graph));
    must(cudaGraphInstantiate(&executable, graph, 0));
    for (int again = 0; again < 2; ++again) {
        must(cudaMemset(first.matrix.data, 0xFF, 20 * 24 * 4));
        must(cudaMemset(second.matrix.data, 0xFF, 20 * 24 * 4));
        must(cudaGraphLaunch(executable, stream));
        must(cudaStreamSynchronize(stream));
        first.check(a, b);
        second.check(c, d);
    }
    must(cudaGraphExecDestroy(executable));
    must(cudaGraphDestroy(graph));
    must(cudaStreamDestroy(stream));
}
