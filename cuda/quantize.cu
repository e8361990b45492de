// Quantization to int8 codes (paper Eq. 1-3), as octavo/quantize.hpp defines it, bit for bit:
//
//   absmax      q = clip(rint(x * 127 / absmax), -127, 127)                            scale = absmax / 127
//   zeropoint   nd = 254 / (max - min), zp = rint(nd * min) + 127
//               q = clip(rint(nd * x) - zp, -127, 127)                                 scale = 1 / nd
//
// A team of threads, a block or, for short rows, a warp, has a row: it reads the row, finds its range, and makes codes
// of it. A thread keeps up to four accesses of 16 bytes in registers meanwhile, so that rows of up to 20480 columns
// (float32: 8192; fewer where a thread needs more registers, see `most_threads`) are read once; longer ones a second
// time, from the caches. Which columns are left out is the same for all rows of a team and stays in a register too.
// Where there are rows enough to fill the device, a thread has all four accesses, and a block several rows one after
// another; where there are few, a row has as many threads as can have one access each. A row is never split over
// blocks: each would have to read all of it for its range, and one block of 640 threads reads 40 KiB in less time than
// a launch takes.
//
// A row is rotated between being read and being coded, in registers: the neighbours that a warp reads by one access are
// whole blocks of the rotation, or of float32 by two. Sums that overflow float32 are found by the range, which they
// make infinite, and taken anew times 2^-8.
//
// With one scale for the whole matrix its range comes first. Where outlier columns had to be found before, their launch
// has found the ranges of columns too (column_ranges.cu). Else the blocks of one launch wait for each other between the
// two: each writes the range of its rows, and all combine those.
#include <algorithm>
#include <limits>
#include <string>

#include "ahead.cuh"
#include "bits.cuh"
#include "criterion.cuh"
#include "device.cuh"
#include "marks.cuh"
#include "memory.hpp"
#include "octavo/error.hpp"
#include "octavo/stochastic.hpp"
#include "operations.hpp"
#include "outlier_columns.cuh"
#include "ptx.cuh"
#include "ranges.cuh"
#include "rotation.cuh"

namespace octavo::cuda {
namespace {

// Threads of a block, at most. The addresses of elements that lie apart, divisions (float32 elements, see `Coding`),
// float64 numbers, rotated ones, and Turing's instructions need more registers than the 96 that a thread of 640 can
// have.
constexpr int most_threads(std::int64_t size_of_element, Scheme scheme, bool wide, bool rotates, int architecture) {
    if (!wide) return 256;
    return !rotates && size_of_element == 2 && scheme == Scheme::absmax && architecture >= 80 ? 640 : 512;
}
constexpr int accesses = 4;

// --- ranges ---------------------------------------------------------------------------------------------------------

template <Scheme scheme>
__device__ Range range_of_warp(Range range) {
    range.high = max_of_warp(range.high);
    if constexpr (scheme == Scheme::zeropoint) range.low = max_of_warp(range.low);
    return range;
}

// All threads of the block must take part. `partial` is shared memory for one value per warp.
template <Scheme scheme>
__device__ Range range_of_block(Range range, Range* partial) {
    const int lane = static_cast<int>(threadIdx.x) % warp_size;
    const int warp = static_cast<int>(threadIdx.x) / warp_size;
    const int warps = static_cast<int>(blockDim.x) / warp_size;
    range = range_of_warp<scheme>(range);
    if (lane == 0) partial[warp] = range;
    __syncthreads();
    return range_of_warp<scheme>(partial[lane < warps ? lane : 0]);
}

// --- coding ---------------------------------------------------------------------------------------------------------

// The low byte is rint(value) for |value| <= 127.5: after adding 1.5 * 2^23 a float's last bits are the integer.
__device__ inline std::uint32_t to_code(float value) { return __float_as_uint(__fadd_rn(value, 0x1.8p23F)) & 0xFFU; }

// How the values of one group (a row, or the whole matrix) become codes. `rotates`: rotated ones.
template <class T, Scheme scheme, bool rotates>
class Coding;

template <class T, bool rotates>
class Coding<T, Scheme::absmax, rotates> {
public:
    Coding() = default;
    __device__ explicit Coding(const Range& range) : absmax_(number_of<T>(range.high)) {
        if (!is_finite(absmax_) || absmax_ == 0.0F) return;
        if constexpr (rotates) {
            inverse_ = 127.0F / absmax_;
            way_ = is_finite(inverse_) ? Way::multiplied : Way::small;
        } else {
            // Where no step overflows, nor loses bits of what is not 0 anyway.
            const bool can_correct = sizeof(T) == 2 && absmax_ >= 0x1p-100F && absmax_ <= 0x1p100F;
            way_ = can_correct ? Way::corrected : Way::divided;
            inverse_ = 1.0F / absmax_;
        }
    }

    __device__ bool finite() const { return is_finite(absmax_); }
    __device__ float scale() const { return finite() ? absmax_ / 127.0F : __uint_as_float(0x7FC00000U); }
    __device__ float zeropoint() const { return 0.0F; }

    // Calls `body(code)`, with `code(x)` the code of a value in its low byte, whatever for one that is left out.
    template <class Body>
    __device__ void encode(Body&& body) const {
        switch (way_) {
            case Way::zeros: return body([](float) { return 0U; });
            case Way::corrected:
                if constexpr (!rotates) {
                    // The quotient of a division, proven in cpp/src/cpu/kernels/streaming.cpp.
                    body([this](float x) {
                        const float a = __fmul_rn(x, 127.0F);
                        const float quotient = __fmul_rn(a, inverse_);
                        return to_code(__fmaf_rn(__fmaf_rn(-quotient, absmax_, a), inverse_, quotient));
                    });
                }
                return;
            case Way::multiplied:
                if constexpr (rotates) body([this](float x) { return to_code(__fmul_rn(x, inverse_)); });
                return;
            case Way::small:
                if constexpr (rotates) body([this](float x) { return to_code(__fmul_rn(x / absmax_, 127.0F)); });
                return;
            case Way::divided:
                if constexpr (!rotates) {
                    body([this](float x) {
                        const float product = __fmul_rn(x, 127.0F);
                        return to_code(is_finite(product) ? product / absmax_ : __fmul_rn(x / absmax_, 127.0F));
                    });
                }
                return;
        }
    }

private:
    enum class Way : std::uint8_t { zeros, corrected, divided, multiplied, small };  // the last two: rotated
    Way way_ = Way::zeros;
    float absmax_ = 0.0F;
    float inverse_ = 0.0F;
};

template <class T, bool rotates>
class Coding<T, Scheme::zeropoint, rotates> {
public:
    Coding() = default;
    __device__ explicit Coding(const Range& range) : min_(from_ordered(~range.low)), max_(from_ordered(range.high)) {
        if (range.low == 0 && range.high == 0) {
            min_ = max_ = 0.0F;  // no values: the scale of a group of zeros
            return;
        }
        if (!finite()) return;
        const float constant = constant_scale();
        const float spread = max_ - min_;
        nd_ = spread != 0.0F ? 254.0F / spread : 1.0F / constant;
        if (is_finite(spread) && is_finite(nd_)) {
            way_ = Way::narrow;
            zeropoint_ = __fadd_rn(rintf(__fmul_rn(nd_, min_)), 127.0F);
            return;
        }
        // A spread beyond float32's range, or so small that its inverse is: the same in float64.
        way_ = Way::wide;
        const double wide_spread = static_cast<double>(max_) - static_cast<double>(min_);
        wide_nd_ = wide_spread != 0.0 ? 254.0 / wide_spread : 1.0 / static_cast<double>(constant);
        wide_zeropoint_ = rint(wide_nd_ * static_cast<double>(min_)) + 127.0;
        zeropoint_ = static_cast<float>(wide_zeropoint_);
    }

    __device__ bool finite() const { return is_finite(min_) && is_finite(max_); }
    __device__ float scale() const {
        if (!finite()) return __uint_as_float(0x7FC00000U);
        const double spread = static_cast<double>(max_) - static_cast<double>(min_);
        return spread != 0.0 ? static_cast<float>(spread / 254.0) : constant_scale();
    }
    __device__ float zeropoint() const { return zeropoint_; }

    template <class Body>
    __device__ void encode(Body&& body) const {
        switch (way_) {
            case Way::zeros: return body([](float) { return 0U; });
            case Way::narrow:
                return body([this](float x) {
                    const float code = __fadd_rn(rintf(__fmul_rn(nd_, x)), -zeropoint_);
                    return to_code(fmaxf(fminf(code, 127.0F), -127.0F));
                });
            case Way::wide:
                return body([this](float x) {
                    const double code = rint(wide_nd_ * static_cast<double>(x)) - wide_zeropoint_;
                    return to_code(static_cast<float>(fmax(fmin(code, 127.0), -127.0)));
                });
        }
    }

private:
    enum class Way : std::uint8_t { zeros, narrow, wide };

    // The scale of a constant group.
    __device__ float constant_scale() const { return max_ == 0.0F ? 1.0F : fabsf(max_); }

    Way way_ = Way::zeros;
    float min_ = 0.0F;
    float max_ = 0.0F;
    float nd_ = 0.0F;
    float zeropoint_ = 0.0F;
    double wide_nd_ = 0.0;
    double wide_zeropoint_ = 0.0;
};

// --- stochastic rounding --------------------------------------------------------------------------------------------

constexpr int stochastic_threads = 256;

// The codes anew, by the scales that there are; a thread has four elements of a row, which have one counter.
__global__ void __launch_bounds__(stochastic_threads)
    round_kernel(FloatView x, std::int64_t cols, std::uint64_t seed, Span<float> scale, View<std::int8_t> codes) {
    const std::int64_t quads = (cols + 3) / 4;
    const std::int64_t chunks = (quads + stochastic_threads - 1) / stochastic_threads;
    const std::int64_t row = blockIdx.x / chunks;
    const std::int64_t quad = blockIdx.x % chunks * stochastic_threads + threadIdx.x;
    if (quad >= quads) return;
    const RandomWords random = words_of(row, quad, seed);
    const float of_row = scale.of_group(row);
#pragma unroll
    for (int part = 0; part < 4; ++part) {
        const std::int64_t col = 4 * quad + part;
        if (col < cols) *codes.at(row, col) = stochastic_code(x(row, col), of_row, random.words[part]);
    }
}

void round_stochastically(const ConstMatrix& weight, const std::optional<std::uint64_t>& seed, const Matrix& codes,
                          const Vector& scale, const Vector& code_sums, cudaStream_t stream) {
    if (!seed || weight.rows == 0 || weight.cols == 0) return;
    const std::int64_t blocks = weight.rows * blocks_for(blocks_for(weight.cols, 4), stochastic_threads);
    launch(round_kernel, Grid{static_cast<unsigned>(blocks), stochastic_threads}, stream, float_view_of(weight),
           weight.cols, *seed, span_of<float>(scale), view_of<std::int8_t>(codes));
    sum_codes(codes, code_sums, stream);
}

// --- kernel ---------------------------------------------------------------------------------------------------------

enum class Step : std::uint8_t {
    rows,    // a range and a scale for each row, and its codes
    matrix,  // those of all rows, in a launch of blocks that wait for each other, by `partial`
    encode,  // codes by the range of all rows, from `column_ranges`
};

// The range of the rows of a block; `small`: times `rotation_factor`, because it is more than a float32 can hold.
struct PartialRange {
    Range range;
    bool small;
};

struct Task {
    Step step = Step::rows;
    bool rows_of_warps = false;  // a team is a warp, not the block
    bool per_element = false;
    int rotation = 0;  // of x, by this kernel, in blocks that end at `rotated_width`
    std::int64_t rotated_width = 0;
    ElementCriterion elements;
    ColumnMarks marks;
    ColumnList list;
    PanelTasks panels;
    unsigned* tickets = nullptr;
    std::int64_t ticket_count = 0;
    View<std::int8_t> codes{};
    std::int64_t width = 0;
    Span<float> scale;
    Span<float> zeropoint;
    Span<std::int32_t> code_sums;
    PartialRange* partial = nullptr;                 // [blocks]
    const Range* column_ranges = nullptr;            // [marks.parts, k]
    unsigned long long* first_not_finite = nullptr;  // where not null: receives the least row that is not finite
    Ahead ahead;
};

// The threads that share a row, and which rows they have.
struct Team {
    int rank;
    int size;
    std::int64_t first_row;
    std::int64_t row_step;
};

// What a thread holds of a row: bit `access * elements + e` of `left_out` is set where the element takes no part, be it
// excluded or beyond the row.
struct Held {
    Quad quads[accesses];
    std::uint32_t left_out;
};

// The same of a row that is rotated as it is read.
template <class T>
struct Rotated {
    float values[accesses][per_access<T>];
    std::uint32_t left_out;  // what is beyond the row's blocks
};

template <class T>
__device__ float value_of(const Held& held, int index) {
    return element<T>(held.quads[index / per_access<T>], index % per_access<T>);
}
template <class T>
__device__ float value_of(const Rotated<T>& held, int index) {
    return held.values[index / per_access<T>][index % per_access<T>];
}

// Where a thread's elements lie: those of an access are neighbours, or neighbouring threads have neighbouring columns.
// `pairs`: a warp has neighbours by two accesses, one after the other.
enum class Columns : std::uint8_t { apart, neighbours, pairs };

template <class T>
__host__ __device__ constexpr Columns columns_of(bool wide, bool rotates) {
    if (rotates && warp_size * per_access<T> < most_rotation) return Columns::pairs;
    return wide || rotates ? Columns::neighbours : Columns::apart;
}

template <class T, Columns columns>
__device__ std::int64_t column_of(const Team& team, std::int64_t chunk, int access, int e) {
    constexpr int elements = per_access<T>;
    const std::int64_t index = chunk * accesses + access;
    if constexpr (columns == Columns::apart) {
        return (index * elements + e) * team.size + team.rank;
    } else if constexpr (columns == Columns::neighbours) {
        return (index * team.size + team.rank) * elements + e;
    } else {
        static_assert(accesses % 2 == 0);
        const int lane = team.rank % warp_size;
        return (index / 2 * 2 * team.size + 2 * (team.rank - lane) + index % 2 * warp_size + lane) * elements + e;
    }
}

// The columns of a thread that no row of the matrix has or takes.
template <class T, Columns columns>
__device__ std::uint32_t columns_left_out(const Team& team, std::int64_t chunk, std::int64_t k,
                                          const ColumnMarks& marks) {
    constexpr int elements = per_access<T>;
    constexpr std::uint32_t all = (1U << elements) - 1;
    const std::int64_t words = words_for(k);
    std::uint32_t left_out = 0;
#pragma unroll
    for (int access = 0; access < accesses; ++access) {
        std::uint32_t bits = 0;
        if constexpr (columns != Columns::apart) {
            const std::int64_t column = column_of<T, columns>(team, chunk, access, 0);
            if (column < k) {
                const std::int64_t rest = k - column;
                bits = rest < elements ? all << rest & all : 0;
                bits |= marked_word(marks, words, column / 32) >> (column % 32) & all;
            } else {
                bits = all;
            }
        } else {
            for (int e = 0; e < elements; ++e) {
                const std::int64_t column = column_of<T, columns>(team, chunk, access, e);
                const bool is_left_out =
                    column >= k || (marked_word(marks, words, column / 32) >> (column % 32) & 1U) != 0;
                bits |= static_cast<std::uint32_t>(is_left_out) << e;
            }
        }
        left_out |= bits << (access * elements);
    }
    return left_out;
}

// Reads a thread's elements of a row, by one access each where `wide`; those left out become 0.
template <class T, Columns columns, bool wide>
__device__ void read_row(const Team& team, std::int64_t chunk, const View<const Bits<T>>& x, std::int64_t row,
                         const Task& task, Held& held) {
    constexpr int elements = per_access<T>;
    constexpr std::uint32_t all = (1U << elements) - 1;
    const Bits<T>* const source = x.row(row);
#pragma unroll
    for (int access = 0; access < accesses; ++access) {
        held.quads[access] = Quad{};
        if constexpr (wide) {
            const std::int64_t column = column_of<T, columns>(team, chunk, access, 0);
            if (column + elements <= x.cols) {
                held.quads[access] = load<4>(reinterpret_cast<const std::uint32_t*>(source + column));
            }
        } else {
#pragma unroll
            for (int e = 0; e < elements; ++e) {
                const std::int64_t column = column_of<T, columns>(team, chunk, access, e);
                if (column < x.cols) put_element<T>(held.quads[access], e, source[column * x.col_stride]);
            }
        }
    }
    if (wide && x.cols % elements != 0) {  // the elements after the last whole access
#pragma unroll
        for (int access = 0; access < accesses; ++access) {
            const std::int64_t column = column_of<T, columns>(team, chunk, access, 0);
            if (column >= x.cols || column + elements <= x.cols) continue;
            const auto rest = static_cast<int>(x.cols - column);
#pragma unroll
            for (int e = 0; e < elements - 1; ++e) {
                if (e < rest) put_element<T>(held.quads[access], e, source[column + e]);
            }
        }
    }
    if (task.per_element) {
        const RowLimit limit = limit_of_row(task.elements, row);
#pragma unroll
        for (int access = 0; access < accesses; ++access) {
            const RowLimit own = limit.from(column_of<T, columns>(team, chunk, access, 0));
#pragma unroll
            for (int e = 0; e < elements; ++e) {
                const bool is_left_out =
                    is_outlier(element<T>(held.quads[access], e), columns == Columns::apart ? e * team.size : e, own);
                held.left_out |= static_cast<std::uint32_t>(is_left_out) << (access * elements + e);
            }
        }
    }
    if (held.left_out == 0) return;
#pragma unroll
    for (int access = 0; access < accesses; ++access) {
        if ((held.left_out >> (access * elements) & all) == 0) continue;
#pragma unroll
        for (int e = 0; e < elements; ++e) {
            if ((held.left_out >> (access * elements + e) & 1U) != 0) clear_element<T>(held.quads[access], e);
        }
    }
}

// Rotates a row, times `factor`, that a whole warp has read.
template <class T, Columns columns>
__device__ void rotate_row(const Team& team, std::int64_t chunk, const Task& task, float factor, const Held& read,
                           Rotated<T>& rotated) {
    constexpr int elements = per_access<T>;
    constexpr int together = columns == Columns::pairs ? 2 : 1;  // accesses of a block
    rotated.left_out = 0;
#pragma unroll
    for (int first = 0; first < accesses; first += together) {
        const std::int64_t column = column_of<T, columns>(team, chunk, first, 0);
        bool is_inside = false;
#pragma unroll
        for (int access = first; access < first + together; ++access) {
            const std::int64_t own = column + (access - first) * warp_size * elements;
#pragma unroll
            for (int e = 0; e < elements; ++e) {
                rotated.values[access][e] = element<T>(read.quads[access], e) * factor;
            }
            if (own >= task.rotated_width) rotated.left_out |= ((1U << elements) - 1) << (access * elements);
            is_inside |= own < task.rotated_width;
        }
        // The same for the whole warp, as the compiler cannot know.
        if (__any_sync(whole_warp, static_cast<int>(is_inside)) != 0) {
            rotate_in_warp<together, elements>(&rotated.values[first], task.rotation);
        }
    }
}

// Whether sums of a block of such numbers can be larger than a float32.
template <class T>
constexpr bool can_overflow = !std::is_same_v<T, __half>;

template <class T, Scheme scheme>
__device__ void take_in(Range& range, const Held& held) {
    constexpr int elements = per_access<T>;
    if constexpr (scheme == Scheme::absmax) {
        std::uint32_t largest = 0;
#pragma unroll
        for (int access = 0; access < accesses; ++access) {
#pragma unroll
            for (int w = 0; w < 4; ++w) largest = max_magnitudes<T>(largest, held.quads[access][w]);
        }
        widen(range.high, max_of_word<T>(largest));
    } else {
#pragma unroll
        for (int i = 0; i < accesses * elements; ++i) {
            if ((held.left_out >> i & 1U) != 0) continue;
            widen<T, scheme>(range, static_cast<Bits<T>>(element_bits<T>(held.quads[i / elements], i % elements)));
        }
    }
}

template <class T, Scheme scheme>
__device__ void take_in(Range& range, const Rotated<T>& held) {
#pragma unroll
    for (int i = 0; i < accesses * per_access<T>; ++i) {
        // To a magnitude a 0 that is left out does nothing.
        if (scheme == Scheme::zeropoint && (held.left_out >> i & 1U) != 0) continue;
        widen<float, scheme>(range, __float_as_uint(value_of(held, i)));
    }
}

// Writes the codes of what a thread holds, zeros up to `width`, and returns their sum.
template <class T, Scheme scheme, Columns columns, bool wide, class Numbers, class Code>
__device__ std::int32_t write_codes(const Team& team, std::int64_t chunk, std::int64_t row, const Task& task,
                                    const Numbers& held, Code code) {
    constexpr int elements = per_access<T>;
    constexpr int words = elements / 4;
    std::int32_t sum = 0;
#pragma unroll
    for (int access = 0; access < accesses; ++access) {
        Pack<std::uint32_t, words> pack{};
#pragma unroll
        for (int e = 0; e < elements; ++e) {
            std::uint32_t byte = code(value_of<T>(held, access * elements + e));
            // A 0 has the code 0 by itself where there is no zeropoint.
            if (scheme == Scheme::zeropoint && (held.left_out >> (access * elements + e) & 1U) != 0) byte = 0;
            pack[e / 4] |= byte << (8 * (e % 4));
        }
#pragma unroll
        for (int w = 0; w < words; ++w) sum = __dp4a(static_cast<int>(pack[w]), 0x01010101, sum);
        const std::int64_t column = column_of<T, columns>(team, chunk, access, 0);
        if (wide && column + elements <= task.width) {
            store(reinterpret_cast<std::uint32_t*>(task.codes.row(row) + column), pack);
        } else {
#pragma unroll
            for (int e = 0; e < elements; ++e) {
                const std::int64_t target = column_of<T, columns>(team, chunk, access, e);
                if (target < task.width) {
                    *task.codes.at(row, target) = static_cast<std::int8_t>(pack[e / 4] >> (8 * (e % 4)));
                }
            }
        }
    }
    return sum;
}

// The range of the whole matrix, of which each thread of a block has a part: from the ranges of columns in parts of the
// rows, of which the ones that are excluded now do not count.
__device__ inline Range range_of_columns(const Task& task, std::int64_t k, int thread, int threads) {
    Range range;
    for (std::int64_t column = thread; column < k; column += threads) {
        // The lanes of a warp have the columns of one word, which is read once for all of them.
        const std::uint32_t word = task.per_element ? 0 : marked_word(task.marks, words_for(k), column / 32);
        if ((word >> (column % 32) & 1U) != 0) continue;
        for (std::int64_t part = 0; part < task.marks.parts; ++part) {
            widen(range, task.column_ranges[part * k + column]);
        }
    }
    return range;
}

// The same from the ranges of blocks of rows; `small` becomes whether any is: then all are made so.
template <Scheme scheme>
__device__ Range range_of_blocks(const PartialRange* partial, std::int64_t blocks, int thread, int threads,
                                 bool& small) {
    small = false;
    for (std::int64_t i = thread; i < blocks; i += threads) small |= partial[i].small;
    small = __syncthreads_or(static_cast<int>(small)) != 0;
    Range range;
    for (std::int64_t i = thread; i < blocks; i += threads) {
        Range own = partial[i].range;
        if (small && !partial[i].small) {
            if (scheme == Scheme::absmax) {
                own.high = __float_as_uint(__uint_as_float(own.high) * rotation_factor);
            } else if (own.high != 0) {  // there are values
                own.high = ordered(from_ordered(own.high) * rotation_factor);
                own.low = ~ordered(from_ordered(~own.low) * rotation_factor);
            }
        }
        widen(range, own);
    }
    return range;
}

template <class GroupCoding>
__device__ void write_group(const Task& task, std::int64_t group, const GroupCoding& coding, bool small) {
    task.scale[group] = small ? coding.scale() / rotation_factor : coding.scale();
    if (task.zeropoint.present()) task.zeropoint[group] = coding.zeropoint();
    if (task.first_not_finite != nullptr && !coding.finite()) {
        atomicMin(task.first_not_finite, static_cast<unsigned long long>(group));
    }
}

template <class T, Scheme scheme, bool wide, bool rotates>
__global__ void __launch_bounds__(most_threads(sizeof(T), scheme, wide, rotates, compiled_for), 1)
    quantize_kernel(View<const Bits<T>> x, Task task) {
    // Two of each, used in turn: whoever writes one again has passed the barrier of the other, after all have read it.
    __shared__ Range partial_ranges[2][warp_size];
    __shared__ std::int32_t partial_sums[2][warp_size];
    wait_for_launch_before();
    let_next_launch_begin();
    ask_for(task.ahead);
    const int thread = static_cast<int>(threadIdx.x);
    const int threads = static_cast<int>(blockDim.x);
    // Lists and panels are other blocks' work, or, where blocks wait for each other and are few, that of all of them.
    const bool meets = task.step == Step::matrix;
    const std::int64_t others = task.list.columns != nullptr ? 1 + task.panels.blocks : 0;
    for (std::int64_t index = blockIdx.x; index < others; index += gridDim.x) {
        if (index == 0) {
            list_marked(task.marks, x.cols, {task.list.columns, x.cols, 1}, {task.list.count, 1, 1});
        } else {
            write_panels(task.panels, task.marks, x.cols, index - 1);
        }
        if (!meets) return;
        __syncthreads();  // its shared memory is written again
    }
    const std::int64_t block = blockIdx.x - (meets ? 0 : others);
    const std::int64_t blocks = gridDim.x - (meets ? 0 : others);
    for (std::int64_t i = block * threads + thread; i < task.ticket_count; i += blocks * threads) task.tickets[i] = 0;
    const int teams = task.rows_of_warps ? threads / warp_size : 1;
    if (!meets && block > 0 && block * teams >= x.rows) return;  // it was there to ask
    const Team team{task.rows_of_warps ? thread % warp_size : thread, threads / teams,
                    block * teams + (task.rows_of_warps ? thread / warp_size : 0), blocks * teams};

    constexpr Columns columns = columns_of<T>(wide, rotates);
    const std::int64_t covered = team.size * accesses * per_access<T>;
    const std::int64_t chunks = (task.width + covered - 1) / covered;
    const ColumnMarks excluded = task.per_element ? ColumnMarks{} : task.marks;
    const std::uint32_t left_out = columns_left_out<T, columns>(team, 0, x.cols, excluded);
    Held own{};
    Rotated<T> turned{};
    const auto held = [&]() -> const auto& {
        if constexpr (rotates) {
            return turned;
        } else {
            return own;
        }
    };
    bool small = false;  // rotated times `rotation_factor`
    const auto read = [&](std::int64_t row, std::int64_t chunk) {
        own.left_out = chunk == 0 ? left_out : columns_left_out<T, columns>(team, chunk, x.cols, excluded);
        read_row<T, columns, wide>(team, chunk, x, row, task, own);
        if constexpr (rotates) rotate_row<T, columns>(team, chunk, task, small ? rotation_factor : 1.0F, own, turned);
    };
    using OwnCoding = Coding<std::conditional_t<rotates, float, T>, scheme, rotates>;
    const auto must_be_small = [&](const OwnCoding& coding) {
        return rotates && can_overflow<T> && !small && !coding.finite();
    };

    Range range;
    OwnCoding coding;
    if (task.step == Step::matrix) {
        bool again = false;
        do {
            range = Range{};
            for (std::int64_t row = team.first_row; row < x.rows; row += team.row_step) {
                for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
                    read(row, chunk);
                    take_in<T, scheme>(range, held());
                }
            }
            range = range_of_block<scheme>(range, partial_ranges[0]);
            again = must_be_small(OwnCoding(range));
            small |= again;
            __syncthreads();  // `partial_ranges` is written again
        } while (again);
        if (thread == 0) task.partial[block] = {range, small};
        synchronize_grid();
        range = range_of_blocks<scheme>(task.partial, blocks, thread, threads, small);
    } else if (task.step == Step::encode) {
        range = range_of_columns(task, x.cols, thread, threads);
    }
    if (task.step != Step::rows) {
        coding = OwnCoding(range_of_block<scheme>(range, partial_ranges[0]));
        if (block == 0 && thread == 0) write_group(task, 0, coding, small);
    }
    int turn = 1;
    for (std::int64_t row = team.first_row; row < x.rows; row += team.row_step, turn ^= 1) {
        if (task.step == Step::rows) {
            small = false;
            bool again = false;
            do {
                range = Range{};
                for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
                    read(row, chunk);
                    take_in<T, scheme>(range, held());
                }
                range = task.rows_of_warps ? range_of_warp<scheme>(range)
                                           : range_of_block<scheme>(range, partial_ranges[turn]);
                coding = OwnCoding(range);
                again = must_be_small(coding);
                if (again) {
                    small = true;
                    if (!task.rows_of_warps) __syncthreads();  // `partial_ranges` of this turn is written once more
                }
            } while (again);
            if (team.rank == 0) write_group(task, row, coding, small);
        }
        std::int32_t sum = 0;
        for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
            if (chunks > 1 || task.step != Step::rows) read(row, chunk);
            coding.encode(
                [&](auto code) { sum += write_codes<T, scheme, columns, wide>(team, chunk, row, task, held(), code); });
        }
        if (!task.code_sums.present()) continue;
        const auto add = [](std::int32_t a, std::int32_t b) { return a + b; };
        sum = reduce_warp(sum, add);
        if (!task.rows_of_warps) {
            if (thread % warp_size == 0) partial_sums[turn][thread / warp_size] = sum;
            __syncthreads();
            if (thread < warp_size) {
                sum = reduce_warp(thread < threads / warp_size ? partial_sums[turn][thread] : 0, add);
            }
        }
        if (team.rank == 0) task.code_sums[row] = sum;
    }
}

// Sums of codes: a warp has a row.
constexpr int sum_threads = 256;

template <bool wide>
__global__ void __launch_bounds__(sum_threads)
    sum_codes_kernel(View<const std::int8_t> codes, Span<std::int32_t> code_sums) {
    const int lane = static_cast<int>(threadIdx.x) % warp_size;
    const std::int64_t row = blockIdx.x * std::int64_t{sum_threads / warp_size} + threadIdx.x / warp_size;
    if (row >= codes.rows) return;
    std::int32_t sum = 0;
    std::int64_t column = 0;
    if constexpr (wide) {
        constexpr std::int64_t step = warp_size * 16;
#pragma unroll 4
        for (std::int64_t own = lane * 16; own + 16 <= codes.cols; own += step) {
            const Quad quad = load<4>(reinterpret_cast<const std::uint32_t*>(codes.row(row) + own));
#pragma unroll
            for (int w = 0; w < 4; ++w) sum = __dp4a(static_cast<int>(quad[w]), 0x01010101, sum);
        }
        column = codes.cols / 16 * 16;
    }
    for (column += lane; column < codes.cols; column += warp_size) sum += *codes.at(row, column);
    sum = reduce_warp(sum, [](std::int32_t a, std::int32_t b) { return a + b; });
    if (lane == 0) code_sums[row] = sum;
}

// --- launchers ------------------------------------------------------------------------------------------------------

// How many threads have a row, and how many blocks there are.
struct Teams {
    unsigned threads;
    bool of_warps;
    std::int64_t blocks;
};

Teams teams_for(std::int64_t rows, std::int64_t width, std::int64_t elements, std::int64_t most_threads) {
    const std::int64_t multiprocessors = device_facts().multiprocessors;
    const std::int64_t reads = blocks_for(width, elements);
    const bool few = rows <= 2 * multiprocessors;
    const std::int64_t threads = std::clamp<std::int64_t>(blocks_for(blocks_for(reads, few ? 1 : accesses), warp_size),
                                                          1, most_threads / warp_size) *
                                 warp_size;
    const bool of_warps = threads == warp_size;
    constexpr std::int64_t warps_of_block = 8;
    const std::int64_t of_block = of_warps ? warps_of_block * warp_size : threads;
    const std::int64_t wanted = of_warps ? blocks_for(rows, warps_of_block) : rows;
    // As many as are resident at the registers that a thread has then, so that each reads the marks once.
    const std::int64_t most = multiprocessors * (most_threads / of_block);
    return {static_cast<unsigned>(of_block), of_warps, std::clamp<std::int64_t>(wanted, 1, most)};
}

void launch_step(const ConstMatrix& x, Scheme scheme, bool wide, const Teams& teams, Task task, cudaStream_t stream) {
    task.rows_of_warps = teams.of_warps;
    const bool meets = task.step == Step::matrix;
    const bool lists = task.list.columns != nullptr && !meets;
    const std::int64_t wanted = teams.blocks + (lists ? 1 + task.panels.blocks : 0);
    const Grid grid{.blocks = static_cast<unsigned>(meets ? wanted : std::max(wanted, blocks_to_ask(task.ahead))),
                    .threads = teams.threads,
                    .early = begins_early() && !meets,
                    .cooperative = meets};
    with_float(x.dtype, [&]<class T>(Type<T>) {
        const auto start = [&]<Scheme s>(std::integral_constant<Scheme, s>) {
            const bool rotates = task.rotation != 0;
            const auto kernel = wide ? rotates ? quantize_kernel<T, s, true, true> : quantize_kernel<T, s, true, false>
                                : rotates ? quantize_kernel<T, s, false, true>
                                          : quantize_kernel<T, s, false, false>;
            launch(kernel, grid, stream, view_of<Bits<T>>(x), task);
        };
        switch (scheme) {
            case Scheme::absmax: return start(std::integral_constant<Scheme, Scheme::absmax>{});
            case Scheme::zeropoint: return start(std::integral_constant<Scheme, Scheme::zeropoint>{});
        }
    });
}

void quantize_rows(const ConstMatrix& x, const QuantizeOptions& options, const Exclusion& exclusion,
                   const Matrix& codes, std::int64_t width, const Vector& scale, const Vector& zeropoint,
                   const Vector& code_sums, unsigned long long* first_not_finite, cudaStream_t stream) {
    const std::int64_t elements = 16 / size_of(x.dtype);
    const bool wide = rows_are_aligned(x, 16) && rows_are_aligned(codes, elements);
    const int threads =
        most_threads(size_of(x.dtype), options.scheme, wide, options.rotation != 0, device_facts().architecture);
    const Teams teams = teams_for(x.rows, width, elements, threads);
    Task task{.per_element = exclusion.per_element,
              .rotation = options.rotation,
              .rotated_width = rotated_size(x.cols, options.rotation),
              .elements = exclusion.elements,
              .marks = exclusion.marks,
              .list = exclusion.list,
              .panels = panel_tasks(x, exclusion),
              .tickets = exclusion.tickets,
              .ticket_count = exclusion.ticket_count,
              .codes = view_of<std::int8_t>(codes),
              .width = width,
              .scale = span_of<float>(scale),
              .zeropoint = span_of<float>(zeropoint),
              .code_sums = span_of<std::int32_t>(code_sums),
              .first_not_finite = first_not_finite,
              .ahead = exclusion.ahead};
    if (options.granularity != Granularity::tensor) {
        if (x.rows > 0 || task.list.columns != nullptr) launch_step(x, options.scheme, wide, teams, task, stream);
        return;
    }
    Workspace workspace(stream);
    task.column_ranges = exclusion.ranges;
    task.step = exclusion.ranges != nullptr ? Step::encode : Step::matrix;
    if (task.step == Step::matrix) {
        const auto partial = workspace.reserve<PartialRange>(teams.blocks);
        workspace.allocate();
        task.partial = workspace.at(partial);
    }
    launch_step(x, options.scheme, wide, teams, task, stream);
}

}  // namespace

void quantize_rows(ConstMatrix x, const QuantizeOptions& options, const Exclusion& exclusion, Matrix codes,
                   std::int64_t width, Vector scale, Vector zeropoint, Vector code_sums, cudaStream_t stream) {
    quantize_rows(x, options, exclusion, codes, width, scale, zeropoint, code_sums, nullptr, stream);
}

void quantize(ConstMatrix x, const QuantizeOptions& options, ConstVector exclude, Matrix codes, Vector scale,
              Vector zeropoint, cudaStream_t stream) {
    Workspace workspace(stream);
    Exclusion exclusion;
    if (exclude.present && exclude.size > 0 && x.cols > 0) {
        const auto words = workspace.reserve<std::uint32_t>(words_for(x.cols));
        workspace.allocate();
        exclusion.marks = {.words = workspace.at(words), .parts = 1};
        mark_listed(exclude, x.cols, exclusion.marks, stream);
    }
    quantize_rows(x, options, exclusion, codes, codes.cols, scale, zeropoint, absent_vector, stream);
}

void quantize_weight(ConstMatrix weight, const QuantizeOptions& options, Matrix codes, Vector scale, Vector zeropoint,
                     Vector code_sums, const Requantization& again, cudaStream_t stream) {
    QuantizeOptions of_rows = options;
    of_rows.granularity = options.granularity == Granularity::vector ? Granularity::row : Granularity::tensor;
    if (again.enqueue) {
        quantize_rows(weight, of_rows, {}, codes, codes.cols, scale, zeropoint, code_sums, nullptr, stream);
        return round_stochastically(weight, again.seed, codes, scale, code_sums, stream);
    }
    refuse_capture(stream, "quantize_weight");
    // A row's number is never as great as this, which bytes of one value make.
    constexpr int filler = 0x7F;
    constexpr unsigned long long none = 0x7F7F7F7F7F7F7F7FULL;
    unsigned long long first = none;
    {
        Workspace workspace(stream);
        const auto place = workspace.reserve<unsigned long long>(1);
        workspace.allocate();
        check(cudaMemsetAsync(workspace.at(place), filler, sizeof first, stream), "cudaMemsetAsync");
        quantize_rows(weight, of_rows, {}, codes, codes.cols, scale, zeropoint, code_sums, workspace.at(place), stream);
        check(cudaMemcpyAsync(&first, workspace.at(place), sizeof first, cudaMemcpyDeviceToHost, stream),
              "cudaMemcpyAsync");
        check(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
    }
    if (first == none) return round_stochastically(weight, again.seed, codes, scale, code_sums, stream);
    const std::string where = scale.size == 1 ? "" : " in row " + std::to_string(first);
    throw Error(ErrorKind::value, "quantize_weight: weight: expected finite values, got NaN or Inf" + where);
}

void sum_codes(ConstMatrix codes, Vector code_sums, cudaStream_t stream) {
    if (codes.rows == 0) return;
    const Grid grid{static_cast<unsigned>(blocks_for(codes.rows, sum_threads / warp_size)), sum_threads};
    launch(rows_are_aligned(codes, 16) ? sum_codes_kernel<true> : sum_codes_kernel<false>, grid, stream,
           view_of<std::int8_t>(codes), span_of<std::int32_t>(code_sums));
}

}  // namespace octavo::cuda
