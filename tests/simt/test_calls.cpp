// What a call does besides computing, on the emulated GPU, which counts: launches, what waits and what allocates;
// capture in graphs; streams, devices, host threads, and offsets beyond 32 bits.
#include <cuda_runtime_api.h>
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <iterator>
#include <new>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "arrays.hpp"
#include "calls.hpp"
#include "check.hpp"
#include "device.hpp"
#include "division.hpp"
#include "octavo/octavo.hpp"
#include "runtime.hpp"
#include "selection.hpp"

using octavo::DType;
using octavo::Granularity;
using octavo::LinearOptions;
using octavo::Outliers;
using octavo::Path;
using octavo::Scheme;
using octavo::Stream;

extern "C" int cuCtxGetCurrent(void** context);  // of the emulated driver

namespace {

constexpr LinearOptions all_options[] = {
    {.outliers = Outliers::columns, .path = Path::int8},        {.outliers = Outliers::rows, .path = Path::int8},
    {.outliers = Outliers::static_, .path = Path::int8},        {.outliers = Outliers::none, .path = Path::int8},
    {.outliers = Outliers::columns, .path = Path::weight_only}, {.outliers = Outliers::columns, .path = Path::auto_},
};

std::string describe(const LinearOptions& options) {
    return "outliers " + check::show(options.outliers) + " path " + check::show(options.path);
}

void must(cudaError_t status) {
    if (status != cudaSuccess) throw octavo::Error(octavo::ErrorKind::device, cudaGetErrorName(status));
}

simt::Counters counted(const std::function<void()>& call) {
    octavo_simt_reset_counters();
    call();
    simt::Counters counters;
    octavo_simt_counters(&counters);
    return counters;
}

// All that a GPU would start: kernels, the product of cuBLASLt, copies.
long started(const simt::Counters& counters) { return counters.launches + counters.host_functions + counters.copies; }

class OwnStream {
public:
    OwnStream() { must(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking)); }
    ~OwnStream() { cudaStreamDestroy(stream_); }
    OwnStream(const OwnStream&) = delete;
    OwnStream& operator=(const OwnStream&) = delete;

    [[nodiscard]] cudaStream_t native() const { return stream_; }
    [[nodiscard]] Stream get() const { return {stream_}; }

private:
    cudaStream_t stream_ = nullptr;
};

Values outlying(Random& random, std::int64_t m, std::int64_t k) {
    Values x = random_normal(random, m, k);
    for (std::int64_t j = 3; j < k; j += 16) {
        for (std::int64_t i = 0; i < m; ++i) x(i, j) *= 20;
    }
    return x;
}

// One layer with its input and output: a weight with kept columns, and a bias.
class Problem {
public:
    Problem(std::int64_t m, std::int64_t n, std::int64_t k, DType dtype, Scheme scheme = Scheme::absmax,
            Granularity granularity = Granularity::vector, std::uint64_t seed = 1)
        : random_(seed),
          x(dtype, outlying(random_, m, k)),
          weight_(dtype, random_normal(random_, n, k, 0.05)),
          codes_(quantize_weight(weight_, scheme, granularity)),
          kept_columns_(int32_array({0, 3})),
          kept_(dtype, n, 2),
          bias_(dtype, random_normal(random_, 1, n)),
          y(dtype, m, n),
          scheme_(scheme),
          granularity_(granularity) {
        keep({0, 3});
    }

    // These columns in 16 bits.
    void keep(const std::vector<std::int32_t>& columns) {
        const std::int64_t n = y.matrix().cols;
        kept_columns_ = int32_array(columns);
        kept_ = Array(x.matrix().dtype, n, static_cast<std::int64_t>(columns.size()));
        for (std::int64_t j = 0; j < n; ++j) {
            for (std::size_t o = 0; o < columns.size(); ++o) {
                kept_.set(j, static_cast<std::int64_t>(o), weight_.get(j, columns[o]));
            }
        }
    }

    [[nodiscard]] octavo::WeightView view() const {
        octavo::WeightView view{.codes = codes_.codes.matrix(),
                                .scale = codes_.scale.vector(),
                                .zeropoint = vector_of(codes_.zeropoint),
                                .code_sums = codes_.code_sums.vector(),
                                .scheme = scheme_,
                                .granularity = granularity_,
                                .rotation = rotation};
        if (!keeps) return view;
        view.outlier_columns = kept_columns_.vector();
        view.outlier_weight = kept_.matrix();
        return view;
    }
    [[nodiscard]] octavo::Vector bias() const { return bias_.vector(); }

    void linear(const LinearOptions& options, Stream stream = {}) const {
        octavo::linear(x.matrix(), view(), bias(), y.matrix(), options, stream);
    }
    // Into `out`, all memory taken for that of another device; the emulated GPUs share theirs, with the CPU too.
    void linear_on(octavo::Device device, const LinearOptions& options, octavo::Matrix out, Stream stream) const {
        const auto moved = [device](auto view) {
            view.device = device;
            return view;
        };
        octavo::WeightView weight = view();
        weight.codes = moved(weight.codes);
        weight.scale = moved(weight.scale);
        weight.zeropoint = moved(weight.zeropoint);
        weight.code_sums = moved(weight.code_sums);
        weight.outlier_columns = moved(weight.outlier_columns);
        weight.outlier_weight = moved(weight.outlier_weight);
        octavo::linear(moved(x.matrix()), weight, moved(bias()), moved(out), options, stream);
    }
    void new_input() {
        const Values values = outlying(random_, x.matrix().rows, x.matrix().cols);
        for (std::int64_t i = 0; i < values.rows; ++i) {
            for (std::int64_t j = 0; j < values.cols; ++j) x.set(i, j, values(i, j));
        }
    }

private:
    Random random_;

public:
    Array x;

private:
    Array weight_;
    Codes codes_;
    Array kept_columns_;
    Array kept_;
    Array bias_;

public:
    Array y;
    bool keeps = true;          // columns in 16 bits
    std::int32_t rotation = 0;  // in blocks of which the codes are taken to be of a rotated weight

private:
    Scheme scheme_;
    Granularity granularity_;
};

// Of every policy and criterion; few columns have outliers.
std::vector<LinearOptions> every_kind() {
    std::vector<LinearOptions> all;
    for (const Outliers outliers : {Outliers::columns, Outliers::rows, Outliers::static_, Outliers::none}) {
        all.push_back({.threshold = 50, .outliers = outliers, .path = Path::int8});
        if (outliers == Outliers::static_ || outliers == Outliers::none) continue;
        all.push_back({.relative = 20, .outliers = outliers, .path = Path::int8});
        all.push_back({.threshold = 20, .cap = 0.02, .outliers = outliers, .path = Path::int8});
    }
    return all;
}

// Whether one kernel multiplies and finishes: on the GPU of default, unless its code was made of older PTX.
bool is_fused() { return std::getenv("OCTAVO_SIMT_CODE_ARCH") == nullptr; }

// The most that linear may start.
long most_started(const LinearOptions& options, const octavo::ConstMatrix& x, std::int64_t n) {
    const bool by_mma = is_fused() && octavo::size_of(x.dtype) == 2 && x.cols % 16 == 0;
    const std::int64_t few = octavo::cuda::most_weight_only_rows(is_fused() ? 90 : 75, by_mma, x.cols, n);
    if (options.path == Path::weight_only || (options.path == Path::auto_ && x.rows <= few)) return 1;
    const bool finds_outliers = options.outliers == Outliers::columns || options.outliers == Outliers::rows;
    return (finds_outliers ? 3 : 2) + (is_fused() ? 0 : 1);
}

}  // namespace

TEST(launches_of_linear) {
    struct Shape {
        std::int64_t m, n, k;
    };
    for (const Shape& s : {Shape{1, 40, 64}, Shape{5, 33, 70}, Shape{64, 48, 160}, Shape{70, 136, 272}}) {
        for (const DType dtype : float_dtypes) {
            for (const Granularity granularity : {Granularity::tensor, Granularity::row, Granularity::vector}) {
                for (const Scheme scheme : schemes) {
                    const Problem problem(s.m, s.n, s.k, dtype, scheme, granularity);
                    for (const LinearOptions& options : all_options) {
                        const check::Context context(s.m, " x ", s.n, " x ", s.k, " dtype ", check::show(dtype),
                                                     " granularity ", check::show(granularity), " ", describe(options));
                        const auto call = [&] { problem.linear(options); };
                        CHECK_EQ(counted(call).synchronizations, 0);
                        const simt::Counters again = counted(call);
                        CHECK(again.launches >= 1);
                        CHECK_EQ(started(again), most_started(options, problem.x.matrix(), s.n));
                        CHECK_EQ(again.synchronizations, 0);
                        CHECK_EQ(again.allocations, 0);
                        CHECK_EQ(again.copies, 0);
                    }
                }
            }
        }
    }
}

// Nothing more is started where rows of W are not aligned, and the product is so large that it would pay to copy them.
TEST(launches_of_linear_with_a_weight_that_is_not_aligned) {
    const Problem problem(256, 256, 70, DType::f16);
    const auto call = [&] { problem.linear({.path = Path::int8}); };
    counted(call);
    const simt::Counters again = counted(call);
    CHECK_EQ(started(again), is_fused() ? 3 : 4);
    CHECK_EQ(again.synchronizations, 0);
    CHECK_EQ(again.allocations, 0);
}

// Nor where few blocks share a depth that is long enough. The product by itself has its sums zeroed before.
TEST(launches_of_linear_where_blocks_share_the_depth) {
    const Problem problem(70, 33, 1030, DType::f16);
    const auto call = [&] { problem.linear({.path = Path::int8}); };
    counted(call);
    const simt::Counters again = counted(call);
    CHECK_EQ(started(again), is_fused() ? 3 : 5);
    CHECK_EQ(again.synchronizations, 0);
    CHECK_EQ(again.allocations, 0);
}

// Weight-only, it takes a launch more, which adds the parts, and memory for them, where features are few.
TEST(launches_of_weight_only_where_blocks_share_the_depth) {
    for (const std::int64_t n : {33, 4096}) {
        const std::int64_t k = n == 33 ? 33008 : 16;
        const check::Context context("n ", n);
        const Problem problem(2, n, k, DType::f16);
        const auto call = [&] { problem.linear({.path = Path::weight_only}); };
        counted(call);
        const simt::Counters again = counted(call);
        CHECK_EQ(started(again), n == 33 ? 2 : 1);
        CHECK_EQ(again.synchronizations, 0);
        CHECK_EQ(again.allocations, 0);
    }
}

// Several layers share what is started before the product, four at a time.
TEST(launches_of_linear_many) {
    constexpr std::int64_t m = 70;
    std::vector<Problem> problems;
    for (const std::int64_t n : {136, 33, 40, 16, 8}) {
        problems.emplace_back(m, n, 272, DType::f16, Scheme::absmax, Granularity::vector, 7);
    }
    for (const LinearOptions& options : all_options) {
        if (options.path == Path::auto_) continue;  // by shape
        for (const std::size_t count : {1UL, 3UL, 5UL}) {
            const check::Context context(count, " layers ", describe(options));
            std::vector<octavo::LinearLayer> layers;
            for (std::size_t i = 0; i < count; ++i) {
                layers.push_back({problems[i].view(), problems[i].bias(), problems[i].y.matrix()});
                layers.back().weight.outlier_columns = problems[0].view().outlier_columns;
            }
            const auto call = [&] { octavo::linear_many(problems[0].x.matrix(), layers, options); };
            counted(call);
            const simt::Counters again = counted(call);
            const long own = is_fused() || options.path == Path::weight_only ? 1 : 2;  // of each layer
            const long before = most_started(options, problems[0].x.matrix(), 136) - own;
            const auto layer_count = static_cast<long>(count);
            CHECK_EQ(started(again), own * layer_count + before * ((layer_count + 3) / 4));
            CHECK_EQ(again.synchronizations, 0);
            CHECK_EQ(again.allocations, 0);
        }
    }
}

// Few outlier columns are added in order, and many under `rows`, so that outputs are the CPU's, bit for bit: also where
// blocks share the depth.
TEST(outputs_are_those_of_the_cpu) {
    struct Shape {
        std::int64_t m, n, k;
    };
    for (const Shape& s : {Shape{70, 136, 112}, Shape{5, 33, 1030}, Shape{130, 40, 70}}) {
        for (const DType dtype : float_dtypes) {
            for (const Granularity granularity : {Granularity::tensor, Granularity::row, Granularity::vector}) {
                for (const Scheme scheme : schemes) {
                    const Problem problem(s.m, s.n, s.k, dtype, scheme, granularity);
                    for (const LinearOptions& options : all_options) {
                        if (options.path != Path::int8) continue;
                        if (options.outliers == Outliers::columns && s.k > 8 * 16) continue;  // more than few columns
                        if (options.outliers == Outliers::rows && scheme == Scheme::zeropoint) continue;  // in pairs
                        const check::Context context(s.m, " x ", s.n, " x ", s.k, " dtype ", check::show(dtype),
                                                     " scheme ", check::show(scheme), " granularity ",
                                                     check::show(granularity), " ", describe(options));
                        problem.linear(options);
                        const Array of_cpu(dtype, s.m, s.n);
                        problem.linear_on({octavo::DeviceKind::cpu, 0}, options, of_cpu.matrix(), {});
                        CHECK(of_cpu.bytes() == problem.y.bytes());
                    }
                }
            }
        }
    }
}

// What two products of 16 bits come to that add in different orders.
void check_nearly(const Array& of_cpu, const Array& found) {
    const octavo::Matrix shape = found.matrix();
    double worst = 0.0;
    double largest = 0.0;
    for (std::int64_t i = 0; i < shape.rows; ++i) {
        for (std::int64_t j = 0; j < shape.cols; ++j) {
            const double expected = of_cpu.get(i, j);
            worst = std::max(worst, std::abs(found.get(i, j) - expected));
            largest = std::max(largest, std::abs(expected));
        }
    }
    CHECK(worst <= largest * (shape.dtype == DType::f16 ? 0x1p-10 : 0x1p-7));  // one rounding each
}

// A weight without kept columns, of whose codes the product keeps those of outlier columns: few columns, which are
// added in order, bit for bit as on the CPU; more of them; and more than it keeps.
void check_unkept(Problem& problem) {
    problem.keeps = false;
    const octavo::Matrix x = problem.x.matrix();
    for (const std::int64_t outliers : {3, 60, 100}) {
        for (std::int64_t o = 0; o < outliers; ++o) problem.x.set(o * 5 % x.rows, (o * 61 + 5) % x.cols, 500);
        const check::Context context(outliers, " columns of codes");
        const LinearOptions options{.threshold = 200, .outliers = Outliers::columns, .path = Path::int8};
        problem.linear(options);
        const Array of_cpu(x.dtype, x.rows, problem.y.matrix().cols);
        problem.linear_on({octavo::DeviceKind::cpu, 0}, options, of_cpu.matrix(), {});
        if (outliers == 3) CHECK(of_cpu.bytes() == problem.y.bytes());
        check_nearly(of_cpu, problem.y);
    }
}

// A weight that keeps columns in X's own 16 bits: no other outlier columns, few and many; and some of them among
// others, of which there are codes.
void check_kept(Problem& problem) {
    problem.keeps = true;
    const octavo::Matrix x = problem.x.matrix();
    for (const std::int32_t kept : {7, 45}) {
        std::vector<std::int32_t> columns;
        for (std::int32_t o = 0; o < kept; ++o) columns.push_back(o + 3);
        problem.keep(columns);
        problem.new_input();
        for (const Outliers outliers : {Outliers::static_, Outliers::columns}) {
            if (outliers == Outliers::columns) {  // kept ones side by side, and others
                for (std::int64_t o = 0; o < 40; ++o) problem.x.set(o * 5 % x.rows, o < 20 ? o + 10 : 6 * o, 500);
            }
            const check::Context context(kept, " kept columns ", check::show(outliers));
            const LinearOptions options{.threshold = 200, .outliers = outliers, .path = Path::int8};
            problem.linear(options);
            const Array of_cpu(x.dtype, x.rows, problem.y.matrix().cols);
            problem.linear_on({octavo::DeviceKind::cpu, 0}, options, of_cpu.matrix(), {});
            if (outliers == Outliers::static_ && kept < 8) CHECK(of_cpu.bytes() == problem.y.bytes());
            check_nearly(of_cpu, problem.y);
        }
    }
}

// A criterion that is relative to a median, or capped, takes no launch more than a threshold.
TEST(launches_of_criteria) {
    for (const std::int64_t m : {1, 16, 17, 70}) {
        for (const DType dtype : float_dtypes) {
            const Problem problem(m, 136, 272, dtype);
            for (const Outliers outliers : {Outliers::columns, Outliers::rows}) {
                for (const LinearOptions& options :
                     {LinearOptions{.relative = 4.0, .outliers = outliers, .path = Path::int8},
                      LinearOptions{.cap = 0.01, .outliers = outliers, .path = Path::int8},
                      LinearOptions{.relative = 4.0, .cap = 0.01, .outliers = outliers, .path = Path::int8}}) {
                    const check::Context context(m, " rows ", check::show(dtype), " ", describe(options), " relative ",
                                                 options.relative, " cap ", options.cap);
                    const auto call = [&] { problem.linear(options); };
                    counted(call);
                    const simt::Counters again = counted(call);
                    CHECK_EQ(started(again), most_started(options, problem.x.matrix(), 136));
                    CHECK_EQ(again.synchronizations, 0);
                    CHECK_EQ(again.allocations, 0);
                    if (options.cap == 1.0) continue;  // more columns than are added in order
                    const Array of_cpu(dtype, m, 136);
                    problem.linear_on({octavo::DeviceKind::cpu, 0}, options, of_cpu.matrix(), {});
                    CHECK(of_cpu.bytes() == problem.y.bytes());
                }
            }
        }
    }
}

// Rotation takes no launch, nor do columns that are kept.
TEST(rotated_weights_that_keep_columns) {
    for (const DType dtype : float_dtypes) {
        for (const std::int32_t rotation : {16, 64, 256}) {
            Problem problem(70, 136, 256, dtype);
            problem.rotation = rotation;
            for (const LinearOptions& options : all_options) {
                if (options.path != Path::int8) continue;
                const check::Context context(check::show(dtype), " in blocks of ", rotation, " ", describe(options));
                const auto call = [&] { problem.linear(options); };
                counted(call);
                CHECK_EQ(started(counted(call)), most_started(options, problem.x.matrix(), 136));
            }
            if (rotation == 64 && dtype != DType::f32) check_kept(problem);
        }
    }
}

// No input takes more than three launches, nor more than two where no outlier columns are found: any layout, scale,
// scheme, policy, criterion and rotation. Outputs are the CPU's; bit for bit where outlier columns are added in order.
// More than 16 rows are marked in another way (criterion.cu).
TEST(launches_of_every_kind) {
    const auto check_calls = [](Problem& problem, bool has_few_rows) {
        const std::int64_t m = problem.x.matrix().rows;
        for (const LinearOptions& options : every_kind()) {
            if (!has_few_rows && options.relative == 0.0F && options.cap == 1.0) continue;
            const check::Context context(describe(options), " relative ", options.relative, " cap ", options.cap);
            const simt::Counters counters = counted([&] { problem.linear(options); });
            CHECK(started(counters) <= most_started(options, problem.x.matrix(), 24));
            const Array of_cpu(problem.x.matrix().dtype, m, 24);
            problem.linear_on({octavo::DeviceKind::cpu, 0}, options, of_cpu.matrix(), {});
            if (options.outliers == Outliers::rows && problem.view().scheme == Scheme::zeropoint) {  // in pairs
                check_nearly(of_cpu, problem.y);
            } else {
                CHECK(of_cpu.bytes() == problem.y.bytes());
            }
        }
    };
    for (const DType dtype : float_dtypes) {
        for (const Granularity granularity : {Granularity::tensor, Granularity::vector}) {
            for (const Scheme scheme : schemes) {
                for (const std::int64_t m : {13, 19}) {
                    Problem problem(m, 24, 256, dtype, scheme, granularity);
                    const Values x = problem.x.values();
                    for (const Layout layout : {Layout::contiguous, Layout::unaligned, Layout::transposed}) {
                        problem.x = Array(dtype, x, layout);
                        for (const std::int32_t rotation : {0, 16, 64, 256}) {
                            problem.rotation = rotation;
                            const check::Context context(
                                m, " rows, ", check::show(dtype), " granularity ", check::show(granularity), " scheme ",
                                check::show(scheme), " layout ", static_cast<int>(layout), " in blocks of ", rotation);
                            check_calls(problem, m == 13);
                        }
                    }
                }
            }
        }
    }
}

// Launches before the product of up to 256 rows ask for W once, all of it or a share of its chunks.
TEST(weights_are_asked_for_ahead) {
    for (const bool rotates : {false, true}) {
        for (const auto& [n, k] : {std::pair{3, 40}, {5, 256}, {24, 256}, {40, 1040}, {64, 3088}}) {
            for (const std::int64_t m : {1, 13, 256, 257}) {
                Problem problem(m, n, k, DType::f16);
                problem.rotation = rotates && k % 16 == 0 ? 16 : 0;
                for (const LinearOptions& options : every_kind()) {
                    const check::Context context(m, " x ", n, " x ", k, " rotation ", problem.rotation, " ",
                                                 describe(options), " relative ", options.relative);
                    const long asked = counted([&] { problem.linear(options); }).prefetched;
                    const std::int64_t launches = most_started(options, problem.x.matrix(), n) - 1;
                    // Of the emulated memory, which has 2048 bytes for a microsecond.
                    const double of_launch = octavo::cuda::bytes_ahead(2048, 50 << 20);
                    const std::int64_t every = octavo::cuda::every_ahead(n, k, of_launch, launches);
                    if (!is_fused() || m > octavo::cuda::most_rows_ahead || k % 16 != 0) {
                        CHECK_EQ(asked, 0);
                    } else if (every == launches) {
                        CHECK_EQ(asked, n * k);
                    } else {  // but for a chunk or two of each launch
                        const std::int64_t chunks = 2 * launches;
                        CHECK(std::abs(asked - n * k * launches / every) <= chunks * octavo::cuda::ahead_chunk);
                        CHECK(asked > 0);
                    }
                }
            }
        }
    }
}

// The same of the tiles that warpgroups multiply: with two multiprocessors (CMakeLists.txt) the first shape takes those
// of 128 x 128, of which one has rows for the first of two warpgroups only, the second those of 192 x 128, which have
// rows for two of three, the third those of 128 x 256, and more outlier columns than there is room for at a time. Many
// are added in another order.
TEST(outputs_of_warpgroups) {
    using octavo::cuda::Choice;
    struct Shape {
        std::int64_t m, n, k;
        Choice tile;
    };
    struct Kind {
        DType dtype;
        Scheme scheme;
        Granularity granularity;
    };
    for (const Shape& s : {Shape{185, 300, 400, Choice::square}, Shape{253, 264, 400, Choice::high},
                           Shape{253, 500, 1200, Choice::wide}}) {
        CHECK(octavo::cuda::divide_product(s.m, s.n, s.k, 2, Choice::wide).tile == s.tile);
        for (const Kind& kind : {Kind{DType::f16, Scheme::absmax, Granularity::vector},
                                 Kind{DType::bf16, Scheme::zeropoint, Granularity::tensor},
                                 Kind{DType::f32, Scheme::absmax, Granularity::row}}) {
            const Problem problem(s.m, s.n, s.k, kind.dtype, kind.scheme, kind.granularity);
            for (const LinearOptions& options : all_options) {
                if (options.path != Path::int8) continue;
                if (options.outliers == Outliers::rows && kind.scheme == Scheme::zeropoint) continue;  // in pairs
                const check::Context context(s.m, " x ", s.n, " x ", s.k, " dtype ", check::show(kind.dtype), " ",
                                             describe(options));
                problem.linear(options);
                const Array of_cpu(kind.dtype, s.m, s.n);
                problem.linear_on({octavo::DeviceKind::cpu, 0}, options, of_cpu.matrix(), {});
                if (options.outliers != Outliers::columns || kind.dtype == DType::f32) {
                    CHECK(of_cpu.bytes() == problem.y.bytes());
                    continue;
                }
                check_nearly(of_cpu, problem.y);
            }
        }
        for (const DType dtype : {DType::f16, DType::bf16}) {
            Problem other(s.m, s.n, s.k, dtype);
            check_unkept(other);
            check_kept(other);
        }
    }
    // Found out at the first use of the device.
    const bool is_wrong = std::getenv("OCTAVO_SIMT_WGMMA") != nullptr;
    CHECK_EQ(octavo::cuda_info().wgmma,
             is_wrong ? "device 0: not used, because products were wrong" : "device 0: used");
}

// Of every tile, with rows and columns that do not fill it, and a depth that blocks share or fewer rows than it could
// have, as few multiprocessors (CMakeLists.txt) have it chosen: bit for bit those of the CPU.
TEST(outputs_of_divided_products) {
    using octavo::cuda::Choice;
    struct Case {
        std::int64_t m, n, k, multiprocessors;
        Choice tile;
        std::int64_t parts;
        std::int64_t height;
    };
    const char* const count = std::getenv("OCTAVO_SIMT_MULTIPROCESSORS");
    const std::string multiprocessors = count == nullptr ? "132" : count;
    long tried = 0;
    for (const Case& c : {Case{253, 400, 4112, 3, Choice::wide, 3, 128}, Case{97, 72, 3088, 3, Choice::square, 3, 128},
                          Case{161, 520, 2064, 2, Choice::high, 2, 192}, Case{129, 520, 4112, 2, Choice::large, 2, 256},
                          Case{261, 72, 1040, 2, Choice::large, 1, 144}, Case{99, 264, 3088, 2, Choice::medium, 2, 128},
                          Case{133, 72, 1040, 2, Choice::medium, 1, 80}, Case{261, 40, 3088, 2, Choice::tall, 2, 96},
                          Case{101, 40, 1040, 2, Choice::tall, 1, 64}, Case{19, 40, 3088, 3, Choice::small, 3, 64},
                          Case{69, 40, 1040, 2, Choice::small, 1, 48}}) {
        if (std::to_string(c.multiprocessors) != multiprocessors) continue;
        ++tried;
        const check::Context context(c.m, " x ", c.n, " x ", c.k);
        const octavo::cuda::Division division =
            octavo::cuda::divide_product(c.m, c.n, c.k, c.multiprocessors, Choice::wide);
        CHECK(division.tile == c.tile);
        CHECK_EQ(division.parts, c.parts);
        CHECK_EQ(division.height, c.height);
        const Problem problem(c.m, c.n, c.k, DType::f16, Scheme::absmax, Granularity::vector);
        const LinearOptions options{.outliers = Outliers::static_, .path = Path::int8};
        problem.linear(options);
        const Array of_cpu(DType::f16, c.m, c.n);
        problem.linear_on({octavo::DeviceKind::cpu, 0}, options, of_cpu.matrix(), {});
        CHECK(of_cpu.bytes() == problem.y.bytes());
        Problem other(c.m, c.n, c.k, tried % 2 == 0 ? DType::f16 : DType::bf16);
        check_unkept(other);
        check_kept(other);
    }
    CHECK(tried > 0);
}

// Each capture has a number of its own, on the stream that it records.
TEST(captures_are_told_apart) {
    const OwnStream stream;
    const OwnStream other;
    Problem(1, 8, 16, DType::f16).linear({.path = Path::int8});  // loads the backend
    CHECK_EQ(octavo::capture_of(stream.native()), 0U);
    CHECK_EQ(octavo::capture_of(nullptr), 0U);
    std::uint64_t numbers[2] = {};
    for (std::uint64_t& number : numbers) {
        cudaGraph_t graph = nullptr;
        must(cudaStreamBeginCapture(stream.native(), cudaStreamCaptureModeThreadLocal));
        number = octavo::capture_of(stream.native());
        CHECK_EQ(octavo::capture_of(stream.native()), number);
        CHECK_EQ(octavo::capture_of(other.native()), 0U);
        must(cudaStreamEndCapture(stream.native(), &graph));
        must(cudaGraphDestroy(graph));
        CHECK(number != 0);
        CHECK_EQ(octavo::capture_of(stream.native()), 0U);
    }
    CHECK(numbers[0] != numbers[1]);
}

// What the pool has kept serves the next call; what it has given back, it takes again.
TEST(workspace_is_kept_until_it_is_released) {
    const Problem problem(70, 40, 64, DType::f16);
    const auto call = [&] { problem.linear({.path = Path::int8}); };
    octavo::release_cuda_memory();
    CHECK(counted(call).allocations >= 1);
    CHECK_EQ(counted(call).allocations, 0);
    octavo::release_cuda_memory();
    CHECK(counted(call).allocations >= 1);
}

namespace {

// Captures the first call, launches the graph twice, with another input the second time, and compares with direct
// calls.
void check_capture(const std::function<void(Stream)>& call, const std::vector<const Array*>& outputs,
                   const std::function<void()>& new_input) {
    const OwnStream stream;
    const auto all_bytes = [&] {
        std::string bytes;
        for (const Array* const output : outputs) bytes += output->bytes();
        return bytes;
    };
    const std::string before = all_bytes();
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t executable = nullptr;
    const simt::Counters captured = counted([&] {
        must(cudaStreamBeginCapture(stream.native(), cudaStreamCaptureModeGlobal));
        call(stream.get());
        must(cudaStreamEndCapture(stream.native(), &graph));
    });
    CHECK_EQ(started(captured), 0);
    CHECK_EQ(captured.synchronizations, 0);
    CHECK(all_bytes() == before);
    must(cudaGraphInstantiate(&executable, graph, 0));
    for (int again = 0; again < 2; ++again) {
        const simt::Counters replayed = counted([&] { must(cudaGraphLaunch(executable, stream.native())); });
        CHECK(started(replayed) >= 1);
        CHECK_EQ(replayed.allocations, 0);
        const std::string by_graph = all_bytes();
        CHECK(by_graph != before || again > 0);
        call(stream.get());
        CHECK(all_bytes() == by_graph);
        new_input();
    }
    must(cudaGraphExecDestroy(executable));
    must(cudaGraphDestroy(graph));
}

}  // namespace

TEST(linear_can_be_captured) {
    for (const std::int64_t m : {1, 4, 17, 70}) {
        for (const DType dtype : {DType::f16, DType::f32}) {
            for (const LinearOptions& options : all_options) {
                const check::Context context(m, " dtype ", check::show(dtype), " ", describe(options));
                Problem problem(m, 56, m == 4 ? 4112 : 96, dtype, Scheme::absmax,
                                Granularity::vector);  // shared by blocks, too
                check_capture([&](Stream stream) { problem.linear(options, stream); }, {&problem.y},
                              [&] { problem.new_input(); });
            }
        }
    }
}

// The first call of all on a device, whose pool and handle of cuBLASLt are made meanwhile.
TEST(first_call_can_be_captured) {
    constexpr int unused = 2;
    const Problem problem(70, 40, 64, DType::f16);
    problem.linear({.path = Path::int8});
    const Values expected = problem.y.values();
    const Array y(DType::f16, 70, 40);
    must(cudaSetDevice(unused));
    {
        const OwnStream stream;
        must(cudaStreamBeginCapture(stream.native(), cudaStreamCaptureModeGlobal));
        problem.linear_on({octavo::DeviceKind::cuda, unused}, {.path = Path::int8}, y.matrix(), stream.get());
        cudaGraph_t graph = nullptr;
        must(cudaStreamEndCapture(stream.native(), &graph));
        cudaGraphExec_t executable = nullptr;
        must(cudaGraphInstantiate(&executable, graph, 0));
        must(cudaGraphLaunch(executable, stream.native()));
        check_values("y", y, expected);
        must(cudaGraphExecDestroy(executable));
        must(cudaGraphDestroy(graph));
    }
    must(cudaSetDevice(0));
    // What the thread may do during captures is as it was.
    cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
    must(cudaThreadExchangeStreamCaptureMode(&mode));
    CHECK_EQ(mode, cudaStreamCaptureModeGlobal);
}

TEST(other_operations_can_be_captured) {
    for (const Scheme scheme : schemes) {
        for (const Granularity granularity : {Granularity::tensor, Granularity::row}) {
            const check::Context context("scheme ", check::show(scheme), " granularity ", check::show(granularity));
            Problem problem(37, 1, 96, DType::f16);
            const std::int64_t groups = granularity == Granularity::tensor ? 1 : 37;
            const Codes codes(problem.x, scheme, groups, Layout::contiguous);
            const Array exclude = int32_array({3, 40});
            std::vector<const Array*> outputs = {&codes.codes, &codes.scale};
            if (codes.zeropoint) outputs.push_back(&*codes.zeropoint);
            check_capture(
                [&](Stream stream) {
                    octavo::quantize(problem.x.matrix(), scheme, granularity, exclude.vector(), codes.codes.matrix(),
                                     codes.scale.vector(), vector_of(codes.zeropoint), stream);
                },
                outputs, [&] { problem.new_input(); });
        }
    }
    Random random(5);
    Array codes(DType::i8, random_codes(random, 21, 64));
    const auto new_codes = [&] {
        const Values values = random_codes(random, 21, 64);
        for (std::int64_t i = 0; i < 21; ++i) {
            for (std::int64_t j = 0; j < 64; ++j) codes.set(i, j, values(i, j));
        }
    };
    const Array scale(DType::f32, Values(1, 21, std::vector<double>(21, 0.25)));
    const Array values(DType::f16, 21, 64);
    check_capture(
        [&](Stream stream) {
            octavo::dequantize(codes.matrix(), scale.vector(), octavo::absent_vector, values.matrix(), stream);
        },
        {&values}, new_codes);
    const Array product(DType::i32, 21, 21);
    check_capture(
        [&](Stream stream) {
            octavo::int8_matmul(codes.matrix(), codes.matrix(), product.matrix(), octavo::Layout::row_major, stream);
        },
        {&product}, new_codes);
    const Array sums(DType::i32, 1, 21);
    check_capture([&](Stream stream) { octavo::sum_codes(codes.matrix(), sums.vector(), stream); }, {&sums}, new_codes);
    Problem problem(9, 1, 96, DType::bf16);
    const Array columns(DType::i32, 1, 96);
    const Array count(DType::i32, 1, 1);
    check_capture(
        [&](Stream stream) { octavo::find_outliers(problem.x.matrix(), {}, columns.vector(), count.vector(), stream); },
        {&columns, &count}, [&] { problem.new_input(); });
}

// A call that must wait refuses a stream that is being captured, and leaves the capture as it was.
TEST(what_must_wait_refuses_capture) {
    const OwnStream stream;
    const Array weight(DType::f16, Values(2, 16, std::vector<double>(32, 1)));
    const Codes codes(weight, Scheme::absmax, 2, Layout::contiguous);
    const auto quantize = [&] {
        octavo::quantize_weight(weight.matrix(), Scheme::absmax, Granularity::vector, codes.codes.matrix(),
                                codes.scale.vector(), octavo::absent_vector, codes.code_sums.vector(), stream.get());
    };
    must(cudaStreamBeginCapture(stream.native(), cudaStreamCaptureModeGlobal));
    CHECK_THROWS(quantize(), device, "quantize_weight: expected a stream that is not being captured");
    cudaGraph_t graph = nullptr;
    CHECK_EQ(cudaStreamEndCapture(stream.native(), &graph), cudaSuccess);
    must(cudaGraphDestroy(graph));
    quantize();
    CHECK_EQ(codes.codes.get(1, 15), 127.0);
}

// Memory that the caller gives, as a framework would of its pool.
class OwnScratch {
public:
    OwnScratch() = default;
    OwnScratch(const OwnScratch&) = delete;
    OwnScratch& operator=(const OwnScratch&) = delete;

    long given = 0;
    long taken_back = 0;
    std::int32_t device = -1;
    void* stream = nullptr;
    bool is_empty = false;
    std::size_t shift = 0;
    octavo::Scratch scratch{&allocate, &release, this};

private:
    static void* allocate(void* context, std::size_t size, std::int32_t device, void* stream) {
        auto& self = *static_cast<OwnScratch*>(context);
        if (self.is_empty) return nullptr;
        void* memory = nullptr;
        must(cudaMalloc(&memory, size + self.shift));
        ++self.given;
        self.device = device;
        self.stream = stream;
        return static_cast<char*>(memory) + self.shift;
    }
    static void release(void* context, void* memory, std::size_t size, std::int32_t device, void* stream) {
        auto& self = *static_cast<OwnScratch*>(context);
        CHECK(size > 0);
        CHECK_EQ(device, self.device);
        CHECK_EQ(stream, self.stream);
        ++self.taken_back;
        must(cudaFree(static_cast<char*>(memory) - self.shift));
    }
};

TEST(scratch_memory_of_the_caller) {
    const Problem problem(70, 40, 64, DType::f16);
    for (const LinearOptions& options : all_options) {
        if (options.path == Path::auto_) continue;  // one of the others
        const check::Context context(describe(options));
        problem.linear(options);
        const Values expected = problem.y.values();
        const OwnStream stream;
        OwnScratch own;
        const Array y(DType::f16, 70, 40);
        const simt::Counters counters = counted([&] {
            const octavo::ScratchFrom from(&own.scratch);
            problem.linear_on({octavo::DeviceKind::cuda, 0}, options, y.matrix(), stream.get());
        });
        check_values("y", y, expected);
        CHECK_EQ(counters.pool_allocations, 0);
        CHECK_EQ(own.given, options.path == Path::weight_only ? 0 : 1);
        CHECK_EQ(own.taken_back, own.given);
        if (own.given == 0) continue;
        CHECK_EQ(own.device, 0);
        CHECK(own.stream == stream.native());
        const auto again = [&] {
            const octavo::ScratchFrom from(&own.scratch);
            problem.linear(options, stream.get());
        };
        own.shift = 128;
        CHECK_THROWS(again(), device, "bytes aligned to 256 of the caller's allocator, got others");
        CHECK_EQ(own.taken_back, own.given);
        own.is_empty = true;
        CHECK_THROWS(again(), device, "linear: CUDA: scratch: expected ");
        // A call without is one of the pool again.
        CHECK_EQ(counted([&] { problem.linear(options); }).pool_allocations, 1);
    }
}

// A thread that has no context gets none on the device that it does not use.
TEST(contexts_are_made_where_work_is_done) {
    const Problem problem(70, 40, 64, DType::f16);
    problem.linear({.path = Path::int8});
    const Array y(DType::f16, 70, 40);
    std::thread([&] {
        const auto call = [&] {
            problem.linear_on({octavo::DeviceKind::cuda, 1}, {.path = Path::int8}, y.matrix(), {});
        };
        CHECK_EQ(counted(call).contexts, 1);
        void* context = &context;
        CHECK_EQ(cuCtxGetCurrent(&context), 0);
        CHECK(context == nullptr);
        must(cudaSetDevice(2));
        CHECK_EQ(counted(call).contexts, 1);
        int current = -1;
        must(cudaGetDevice(&current));
        CHECK_EQ(current, 2);
    }).join();
    check_values("y", y, problem.y.values());
}

// The emulator refuses launches on a stream of a device that is not current, and its cuBLASLt handles of another one.
TEST(every_device) {
    int count = 0;
    must(cudaGetDeviceCount(&count));
    CHECK_EQ(count, 3);  // OCTAVO_SIMT_DEVICES, CMakeLists.txt
    const Problem problem(70, 40, 64, DType::f16);
    for (const LinearOptions& options : all_options) {
        problem.linear(options);
        const Values expected = problem.y.values();
        must(cudaSetDevice(1));
        const OwnStream stream;
        must(cudaSetDevice(0));
        const Array y(DType::f16, 70, 40);
        problem.linear_on({octavo::DeviceKind::cuda, 1}, options, y.matrix(), stream.get());
        int current = -1;
        must(cudaGetDevice(&current));
        CHECK_EQ(current, 0);
        check_values("y", y, expected);
    }
}

TEST(host_threads_each_with_a_stream) {
    constexpr int threads = 4;
    const Problem problem(70, 40, 64, DType::f16);
    problem.linear({.path = Path::int8});
    const Values expected = problem.y.values();
    std::vector<Array> results;
    for (int i = 0; i < threads; ++i) results.emplace_back(DType::f16, 70, 40);
    std::vector<std::thread> running;
    for (int i = 0; i < threads; ++i) {
        running.emplace_back([&, i] {
            const OwnStream stream;
            const Array& y = results[static_cast<std::size_t>(i)];
            for (int j = 0; j < 5; ++j) {
                octavo::linear(problem.x.matrix(), problem.view(), problem.bias(), y.matrix(), {.path = Path::int8},
                               stream.get());
            }
        });
    }
    for (std::thread& thread : running) thread.join();
    for (const Array& y : results) check_values("y", y, expected);
}

// Weight-only products of different shapes, which split the depth, and so need shared memory, differently.
TEST(host_threads_with_different_weights) {
    struct Shape {
        std::int64_t n, k;
    };
    constexpr Shape shapes[] = {{16, 64}, {40, 512}, {16, 64}, {80, 256}};  // 1, 8, 1 and 4 parts
    constexpr LinearOptions options{.path = Path::weight_only};
    std::vector<std::thread> running;
    std::vector<std::string> errors(std::size(shapes));
    for (std::size_t i = 0; i < std::size(shapes); ++i) {
        running.emplace_back([&, i] {
            const Problem problem(8, shapes[i].n, shapes[i].k, DType::f16);
            const OwnStream stream;
            try {
                for (int again = 0; again < 40; ++again) problem.linear(options, stream.get());
            } catch (const octavo::Error& error) {
                errors[i] = error.what();
            }
        });
    }
    for (std::thread& thread : running) thread.join();
    for (const std::string& error : errors) CHECK_EQ(error, "");
}

// Bit for bit, in whatever order threads run (OCTAVO_SIMT_ORDER=random:<seed> has another one in every launch).
TEST(results_do_not_depend_on_timing) {
    for (const std::int64_t m : {1, 3, 17, 70}) {
        const Problem problem(m, 40, 1040, DType::f16);
        for (const LinearOptions& options : all_options) {
            const check::Context context(m, " ", describe(options));
            problem.linear(options);
            const std::string first = problem.y.bytes();
            for (int again = 0; again < 3; ++again) {
                problem.linear(options);
                CHECK(problem.y.bytes() == first);
            }
        }
    }
}

#ifndef OCTAVO_SIMT_RACE  // whose shadow is many times as large as what it shadows

namespace {

// Rows that lie more than 2^31 bytes, and elements, apart. Only the pages that are touched take memory.
class Sparse {
public:
    Sparse(DType dtype, std::int64_t rows, std::int64_t cols)
        : size_(static_cast<std::size_t>(((rows - 1) * stride + cols) * octavo::size_of(dtype))),
          memory_(mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)) {
        if (memory_ == MAP_FAILED) throw std::bad_alloc();
        matrix_ = {memory_, dtype, test_device(), rows, cols, stride, 1};
    }
    Sparse(const Array& like) : Sparse(like.matrix().dtype, like.matrix().rows, like.matrix().cols) {
        for (std::int64_t i = 0; i < matrix_.rows; ++i) std::memcpy(row(matrix_, i), row(like.matrix(), i), width());
    }
    ~Sparse() { munmap(memory_, size_); }
    Sparse(const Sparse&) = delete;
    Sparse& operator=(const Sparse&) = delete;

    [[nodiscard]] octavo::Matrix matrix() const { return matrix_; }
    [[nodiscard]] bool equals(const Array& other) const {
        for (std::int64_t i = 0; i < matrix_.rows; ++i) {
            if (std::memcmp(row(matrix_, i), row(other.matrix(), i), width()) != 0) return false;
        }
        return true;
    }

private:
    static constexpr std::int64_t stride = (std::int64_t{1} << 31) + 16;

    [[nodiscard]] std::size_t width() const {
        return static_cast<std::size_t>(matrix_.cols * octavo::size_of(matrix_.dtype));
    }
    static std::byte* row(const octavo::Matrix& matrix, std::int64_t i) {
        return static_cast<std::byte*>(matrix.data) + i * matrix.row_stride * octavo::size_of(matrix.dtype);
    }

    std::size_t size_;
    void* memory_;
    octavo::Matrix matrix_;
};

}  // namespace

TEST(offsets_beyond_32_bits) {
    for (const std::int64_t m : {2, 4}) {  // dot products, and tensor cores
        const Problem problem(m, 3, 64, DType::f16);
        const Sparse x(problem.x);
        octavo::WeightView weight = problem.view();
        Array codes(DType::i8, 3, 64);
        std::memcpy(codes.matrix().data, weight.codes.data, 3 * 64);
        const Sparse sparse_codes(codes);
        weight.codes = sparse_codes.matrix();
        const Sparse y(DType::f16, m, 3);
        for (const LinearOptions& options : all_options) {
            const check::Context context(m, " ", describe(options));
            problem.linear(options);
            octavo::linear(x.matrix(), weight, problem.bias(), y.matrix(), options);
            CHECK(y.equals(problem.y));
        }
        const Codes near(problem.x, Scheme::absmax, m, Layout::contiguous);
        const Sparse far(DType::i8, m, 64);
        for (const octavo::Matrix& target : {near.codes.matrix(), far.matrix()}) {
            octavo::quantize(target.data == far.matrix().data ? x.matrix() : problem.x.matrix(), Scheme::absmax,
                             Granularity::row, octavo::absent_vector, target, near.scale.vector(),
                             octavo::absent_vector);
        }
        CHECK(far.equals(near.codes));
        const Array near_values(DType::f16, m, 64);
        const Sparse far_values(DType::f16, m, 64);
        octavo::dequantize(near.codes.matrix(), near.scale.vector(), octavo::absent_vector, near_values.matrix());
        octavo::dequantize(far.matrix(), near.scale.vector(), octavo::absent_vector, far_values.matrix());
        CHECK(far_values.equals(near_values));
        const Array near_product(DType::i32, m, 3);
        const Sparse far_product(DType::i32, m, 3);
        octavo::int8_matmul(near.codes.matrix(), codes.matrix(), near_product.matrix());
        octavo::int8_matmul(far.matrix(), sparse_codes.matrix(), far_product.matrix());
        CHECK(far_product.equals(near_product));
    }
}

#endif
