// The linear layer with int8 weights and X as it is (W8A16), in one launch, or two:
//
//   y[i, j] = scale[j] * sum_k x[i, k] * (codes[j, k] + zeropoint[j]) + bias[j]
//
// Its bound is reading the n * k bytes of codes once. A block of 8 warps owns some output features for a tile of rows
// of X: `splits` warps share a feature, each takes its part of the depth k, and their float32 sums are added in shared
// memory in the order of the warps. Where there are so few features that this leaves multiprocessors idle, several
// blocks share the depth, too; each leaves its sums in memory, and a second launch adds them in the order of the parts.
// So no sum depends on timing.
//
// Two ways, chosen by what they cost per code. An H200 can issue 6 to 7 instructions per lane in the time in which one
// byte arrives (132 multiprocessors * 128 lanes * 1.75 to 1.98 GHz / 4.8 TB/s), an A100 9:
//
//   dot product     2.25 to make a byte float32, m to multiply and add, m / 4 to make X float32, 0.2 for loads:
//                   3.7 for m = 1, 5.0 for m = 2, but 7.5 for m = 4
//   tensor cores    1.25 (f16) or 2.5 (bf16) to make a byte 16 bit, 1 / 8 for each 8 rows of X to multiply, 1 / 4 for
//                   loads: 1.6 and 2.9 for m up to 8; 2.5 and 3.8 for m = 64, where the products themselves need 614
//                   TFLOPS to keep up with the memory
//
// So the dot product serves what tensor cores do not take: X in float32, and sm_75. Operands whose rows do not begin at
// multiples of 16 bytes are read an element at a time, for dot products too.
//
// The zeropoint is split into a near part, an integer small enough that code + near is exact in what the products are
// made of, and the rest, which multiplies the sum of a row of X. The rest is 0 unless a weight's range is far from
// zero; and then it has the sign of every code + near, so that the two sums do not cancel (a fraction, which
// `quantize_weight` never makes, is as harmless: it is at most 1/2).
#include <algorithm>

#include "device.cuh"
#include "division.hpp"
#include "memory.hpp"
#include "operations.hpp"
#include "ptx.cuh"

namespace octavo::cuda {
namespace {

constexpr int warps = 8;
constexpr int threads = warps * warp_size;
constexpr int codes_per_load = 16;

template <class T>
__device__ T smaller(T a, T b) {
    return b < a ? b : a;
}

// An output matrix of any floating-point dtype.
struct Target {
    void* data;
    DType dtype;
    std::int64_t row_stride;
    std::int64_t col_stride;

    __device__ void set(std::int64_t row, std::int64_t col, float value) const {
        const std::int64_t at = row * row_stride + col * col_stride;
        switch (dtype) {
            case DType::f16: static_cast<__half*>(data)[at] = from_float<__half>(value); break;
            case DType::bf16: static_cast<__nv_bfloat16*>(data)[at] = from_float<__nv_bfloat16>(value); break;
            default: static_cast<float*>(data)[at] = value;
        }
    }
};

// zeropoint = near + rest, near an integer from `near_low` to `near_high`.
struct Shift {
    float near = 0.0F;
    float rest = 0.0F;
};

template <class X>
struct Layer {
    View<const X> x;
    float scale_x;
    View<const std::int8_t> codes;
    Span<const float> scale;
    Span<const float> zeropoint;
    FloatSpan bias;
    Target out;
    int splits = 1;            // warps that share the depth: 1, 2, 4 or 8
    std::int64_t depth = 0;    // of k, that each of gridDim.y blocks has
    float* partial = nullptr;  // [gridDim.y, m, n]; null: a block has all of k
    float near_low = 0.0F;     // between which integers the near part of a zeropoint is
    float near_high = 0.0F;

    __device__ Shift shift(std::int64_t feature) const {
        if (!zeropoint.present()) return {};
        const float value = zeropoint.of_group(feature);
        const float near = fminf(fmaxf(rintf(value), near_low), near_high);
        return {near, value - near};
    }

    // `sum` over k of x * (code + near); `x_sum` over k of x, needed only where there is a rest.
    __device__ void finish(std::int64_t row, std::int64_t feature, float sum, float rest, float x_sum) const {
        if (rest != 0.0F) sum += rest * x_sum;
        const float factor = scale.of_group(feature);
        const float y = (sum - sum == 0.0F ? sum * factor : small_sum(row, feature) * factor / small) * scale_x;
        out.set(row, feature, bias.present() ? y + bias[feature] : y);
    }

    // What of k the block has.
    __device__ std::int64_t begin() const { return blockIdx.y * depth; }
    __device__ std::int64_t end() const { return smaller(codes.cols, begin() + depth); }

    // Where the sum of a part is.
    __device__ float& part(unsigned index, std::int64_t row, std::int64_t feature) const {
        return partial[(index * x.rows + row) * codes.rows + feature];
    }

    // The whole sum times `small`, where it came out as Inf or NaN: sums of large numbers overflow where the result
    // does not, and infinities whose parts would cancel come out as they should.
    static constexpr float small = 0x1p-64F;
    __device__ float small_sum(std::int64_t row, std::int64_t feature) const {
        float sum = 0.0F;
#pragma unroll 1
        for (std::int64_t depth = 0; depth < x.cols; ++depth) {
            const float code = static_cast<float>(*codes.at(feature, depth)) + zeropoint_of(feature);
            sum += to_float(*x.at(row, depth)) * small * code;
        }
        return sum;
    }
    __device__ float zeropoint_of(std::int64_t feature) const {
        return zeropoint.present() ? zeropoint.of_group(feature) : 0.0F;
    }
};

// sums[i] = sum_k x[first + i, k], by the whole block; all threads must take part. Rows from the last on are left out.
template <class X>
__device__ void sum_rows(const View<const X>& x, std::int64_t first, int rows, float* sums) {
    const int lane = static_cast<int>(threadIdx.x) % warp_size;
    for (int i = static_cast<int>(threadIdx.x) / warp_size; i < rows && first + i < x.rows; i += warps) {
        float sum = 0.0F;
#pragma unroll 4
        for (std::int64_t depth = lane; depth < x.cols; depth += warp_size) sum += to_float(*x.at(first + i, depth));
        sum = reduce_warp(sum, [](float a, float b) { return a + b; });
        if (lane == 0) sums[i] = sum;
    }
    __syncthreads();
}

// --- dot products ---------------------------------------------------------------------------------------------------

// A warp does `rows` rows of X times 4 features. Its lanes take 16 codes of the depth each, next to each other, with
// two such steps of all features on their way (4 KiB per warp) while one is computed.

constexpr int dot_features = 4;
constexpr int dot_stride = codes_per_load * warp_size;  // codes of a row in one step of a warp

// 2^23 + u for a byte u, as float32, is the byte below the exponent of 2^23. With u = code + 128, subtracting
// 2^23 + 128 - near is exact while near is an integer of at most 2^22.
constexpr std::uint32_t dot_magic = 0x4B000000U;
constexpr float dot_near = 4194304.0F;

__device__ float dot_offset(float near) { return 8388736.0F - near; }

__device__ float code_to_float(std::uint32_t flipped, int byte, std::uint32_t magic, float offset) {
    return __uint_as_float(select_bytes(flipped, magic, 0x7650U | static_cast<unsigned>(byte))) - offset;
}

// Elements of X as they lie in memory.
template <class X, int loads>
struct Words {
    uint4 values[loads];

    __device__ void load(const X* source) {
#pragma unroll
        for (int i = 0; i < loads; ++i) values[i] = *reinterpret_cast<const uint4*>(source + i * per_access<X>);
    }

    __device__ std::uint32_t word(int index) const {
        const uint4& four = values[index / 4];
        return index % 4 == 0 ? four.x : index % 4 == 1 ? four.y : index % 4 == 2 ? four.z : four.w;
    }
};

template <int loads>
__device__ float element(const Words<float, loads>& words, int index) {
    return __uint_as_float(words.word(index));
}

template <int loads>
__device__ float element(const Words<__half, loads>& words, int index) {
    const std::uint32_t word = words.word(index / 2);
    const auto pair = *reinterpret_cast<const __half2*>(&word);
    return index % 2 == 0 ? __low2float(pair) : __high2float(pair);
}

template <int loads>
__device__ float element(const Words<__nv_bfloat16, loads>& words, int index) {
    const std::uint32_t word = words.word(index / 2);
    return __uint_as_float(index % 2 == 0 ? word << 16 : word & 0xFFFF0000U);
}

// Which sums a warp is to make.
template <int rows, int features>
struct DotPlace {
    std::int64_t first_row;
    std::int64_t block_feature;  // the first of the block
    std::int64_t first_feature;  // the first of the warp

    template <class X>
    __device__ explicit DotPlace(const Layer<X>& layer) {
        const std::int64_t row_tiles = (layer.x.rows + rows - 1) / rows;
        first_row = blockIdx.x % row_tiles * rows;
        block_feature = blockIdx.x / row_tiles * (warps / layer.splits * features);
        first_feature = block_feature + static_cast<int>(threadIdx.x) / warp_size / layer.splits * features;
    }
};

// Adds the lanes' sums, then those of the warps that share the depth, and writes y. All threads must take part.
template <int rows, int features, class X>
__device__ void finish_dot(const Layer<X>& layer, const DotPlace<rows, features>& place,
                           const float (&sums)[rows][features]) {
    __shared__ float partial[warps][rows * features];
    __shared__ float x_sums[rows];
    const int lane = static_cast<int>(threadIdx.x) % warp_size;
    const int warp = static_cast<int>(threadIdx.x) / warp_size;
#pragma unroll
    for (int i = 0; i < rows; ++i) {
#pragma unroll
        for (int j = 0; j < features; ++j) {
            const float sum = reduce_warp(sums[i][j], [](float a, float b) { return a + b; });
            if (lane == (i * features + j) % warp_size) partial[warp][i * features + j] = sum;
        }
    }
    __syncthreads();

    constexpr int turns = (warps * rows * features + threads - 1) / threads;  // a sum of each thread in each
#pragma unroll 1
    for (int turn = 0; turn < turns; ++turn) {
        const int index = static_cast<int>(threadIdx.x) + turn * threads;
        const int group = index / (rows * features);
        const int i = index / features % rows;
        const int j = index % features;
        const std::int64_t feature = place.block_feature + group * features + j;
        const bool writes =
            group < warps / layer.splits && place.first_row + i < layer.x.rows && feature < layer.codes.rows;
        const bool is_part = layer.partial != nullptr;
        const float rest = writes && !is_part ? layer.shift(feature).rest : 0.0F;
        const bool has_rest = !is_part && layer.zeropoint.present() && __syncthreads_or(rest != 0.0F) != 0;
        if (has_rest) sum_rows(layer.x, place.first_row, rows, x_sums);
        if (!writes) continue;
        float sum = 0.0F;
        for (int part = 0; part < layer.splits; ++part) {
            sum += partial[group * layer.splits + part][i * features + j];
        }
        if (is_part) {
            layer.part(blockIdx.y, place.first_row + i, feature) = sum;
            continue;
        }
        layer.finish(place.first_row + i, feature, sum, rest, has_rest ? x_sums[i] : 0.0F);
    }
}

// Whether `mma_kernel` is launched on the architecture that is being compiled for: older ones lack its instructions.
constexpr int first_mma_architecture = 80;
constexpr bool has_mma = compiled_for == 0 || compiled_for >= first_mma_architecture;

// Blocks of `dot_kernel` that a multiprocessor is to have room for. Four rows need more registers on sm_75 and sm_120,
// more rows everywhere.
template <int rows>
constexpr int dot_resident = rows < 4 || (rows == 4 && has_mma && compiled_for < 120) ? 2 : 1;

template <class X, int rows>
__global__ void __launch_bounds__(threads, dot_resident<rows>) dot_kernel(Layer<X> layer) {
    constexpr int dot_steps = rows > 6 ? 1 : 2;  // as registers allow
    const DotPlace<rows, dot_features> place(layer);
    const int lane = static_cast<int>(threadIdx.x) % warp_size;
    const int part = static_cast<int>(threadIdx.x) / warp_size % layer.splits;

    // Where this lane is to read. Rows and features beyond the last one repeat it; they are not written.
    const std::int64_t begin = layer.begin();
    const int first = part * dot_stride + lane * codes_per_load;
    const int step = layer.splits * dot_stride;
    const X* x_at[rows];
    const std::int8_t* codes_at[dot_features];
    float offset[dot_features];
#pragma unroll
    for (int i = 0; i < rows; ++i) {
        x_at[i] = layer.x.row(smaller(place.first_row + i, layer.x.rows - 1)) + begin + first;
    }
#pragma unroll
    for (int j = 0; j < dot_features; ++j) {
        const std::int64_t feature = smaller(place.first_feature + j, layer.codes.rows - 1);
        codes_at[j] = layer.codes.row(feature) + begin + first;
        offset[j] = dot_offset(layer.shift(feature).near);
    }
    const std::uint32_t magic = in_register(dot_magic);
    const std::uint64_t policy = read_once_policy();

    std::int64_t left = layer.end() - begin - first;
    uint4 coming[dot_steps][dot_features];
#pragma unroll
    for (int s = 0; s < dot_steps; ++s) {
#pragma unroll
        for (int j = 0; j < dot_features; ++j) {
            coming[s][j] = left > s * step ? load_16_once(codes_at[j] + s * step, policy) : uint4{0, 0, 0, 0};
        }
    }
    // Elements of a row of X at a time: for all 16 of many rows there are not registers enough.
    constexpr int width = rows > 4 ? per_access<X> : codes_per_load;
    constexpr int loads = width / per_access<X>;
    float sums[rows][dot_features] = {};
    for (; left > 0; left -= dot_steps * step) {
#pragma unroll
        for (int s = 0; s < dot_steps; ++s) {
            std::uint32_t words[dot_features][4];
#pragma unroll
            for (int from = 0; from < codes_per_load; from += width) {
                Words<X, loads> x[rows] = {};
                if (left > s * step) {
#pragma unroll
                    for (int i = 0; i < rows; ++i) x[i].load(x_at[i] + s * step + from);
                }
                if (from == 0) {
#pragma unroll
                    for (int j = 0; j < dot_features; ++j) {
                        const uint4 codes = coming[s][j];
                        words[j][0] = codes.x ^ 0x80808080U;
                        words[j][1] = codes.y ^ 0x80808080U;
                        words[j][2] = codes.z ^ 0x80808080U;
                        words[j][3] = codes.w ^ 0x80808080U;
                        coming[s][j] = uint4{0, 0, 0, 0};
                        if (left > (s + dot_steps) * step) {
                            coming[s][j] = load_16_once(codes_at[j] + (s + dot_steps) * step, policy);
                        }
                    }
                }
#pragma unroll
                for (int e = from; e < from + width; ++e) {
#pragma unroll
                    for (int j = 0; j < dot_features; ++j) {
                        const float code = code_to_float(words[j][e / 4], e % 4, magic, offset[j]);
#pragma unroll
                        for (int i = 0; i < rows; ++i) sums[i][j] = fmaf(element(x[i], e - from), code, sums[i][j]);
                    }
                }
            }
        }
#pragma unroll
        for (int i = 0; i < rows; ++i) x_at[i] += dot_steps * step;
#pragma unroll
        for (int j = 0; j < dot_features; ++j) codes_at[j] += dot_steps * step;
    }
    finish_dot(layer, place, sums);
}

// Any strides and any k: an element at a time.
constexpr int strided_rows = 4;

// Three blocks to a multiprocessor: left to itself the compiler spills, to have more of them.
template <class X>
__global__ void __launch_bounds__(threads, 3) strided_dot_kernel(Layer<X> layer) {
    const DotPlace<strided_rows, 1> place(layer);
    const int part = static_cast<int>(threadIdx.x) / warp_size % layer.splits;
    const std::int64_t feature = smaller(place.first_feature, layer.codes.rows - 1);
    const float near = layer.shift(feature).near;
    std::int64_t row[strided_rows];
#pragma unroll
    for (int i = 0; i < strided_rows; ++i) row[i] = smaller(place.first_row + i, layer.x.rows - 1);
    float sums[strided_rows][1] = {};
    const std::int64_t first = layer.begin() + part * warp_size + static_cast<int>(threadIdx.x) % warp_size;
    const std::int64_t end = layer.end();
#pragma unroll 4
    for (std::int64_t depth = first; depth < end; depth += layer.splits * warp_size) {
        const float code = static_cast<float>(*layer.codes.at(feature, depth)) + near;
#pragma unroll
        for (int i = 0; i < strided_rows; ++i) {
            sums[i][0] = fmaf(to_float(*layer.x.at(row[i], depth)), code, sums[i][0]);
        }
    }
    finish_dot(layer, place, sums);
}

// --- tensor cores ---------------------------------------------------------------------------------------------------

// A warp does 32 features times `8 * tiles` rows of X, by products of 16 features * 8 rows * 16 of the depth. Per step
// it takes 64 of the depth: lane 4g + q loads 16 codes of features g, g + 8, g + 16, g + 24, from 16q on. A product's
// lane wants columns 2q, 2q + 1, 2q + 8, 2q + 9 of its rows; it is given codes 16q + 4s to 16q + 4s + 3 instead, in the
// s-th product of four, and X is read in the same order: a sum over k may take k in any order.
//
// Codes and X pass through a ring in shared memory, filled by asynchronous copies: what is on its way needs no
// registers. Codes are read back by the lane that copied them, 16 bytes at a place of its own. Three stages, 48 KiB of
// codes, are on their way while one is computed: with one block to a multiprocessor 6 MB, where 4.8 TB/s times 0.8 us
// are 4.

constexpr int mma_depth = 64;
constexpr int mma_features = 32;
constexpr int mma_loads = 4;  // of 16 codes, per lane and step
constexpr int stages = 4;
constexpr int partial_pitch = mma_features + 4;  // a warp's stores of sums then fall into 32 banks

// code + near is exact in f16 and bf16 for these: at most 256 in magnitude. At the ends no code + near changes its
// sign.
constexpr float mma_near_low = -128.0F;
constexpr float mma_near_high = 129.0F;

// Where the parts of a stage lie, in bytes.
template <int tiles>
struct Stage {
    static constexpr int rows = 8 * tiles;
    static constexpr int codes = threads * mma_loads * codes_per_load;
    // 16 more than a row of X: lanes of even and odd g then read from different banks.
    __host__ __device__ static constexpr int pitch(int splits) { return splits * mma_depth * 2 + 16; }
    __host__ __device__ static constexpr int size(int splits) { return codes + rows * pitch(splits); }
    // Of a block's shared memory: all stages, and what a block needs with the sums of rows of X.
    static constexpr std::size_t ring(int splits) { return static_cast<std::size_t>(stages) * size(splits); }
    static constexpr std::size_t needed(int splits) { return ring(splits) + rows * sizeof(float); }
};

template <class X>
__device__ X make_pair(const std::uint32_t& bits) {
    return *reinterpret_cast<const X*>(&bits);
}

template <class X>
__device__ std::uint32_t bits_of(const X& pair) {
    return *reinterpret_cast<const std::uint32_t*>(&pair);
}

// Codes as pairs of X's type.
template <class X>
class PairsOf;

// 0x6400 + u is 1024 + u in f16, for a byte u = code + 128.
template <>
class PairsOf<__half> {
public:
    __device__ explicit PairsOf(float near) : offset_(__float2half2_rn(1152.0F - near)) {}

    // Codes 0 and 1 of a word, and 2 and 3.
    __device__ void convert(std::uint32_t word, std::uint32_t& first, std::uint32_t& second) const {
        const std::uint32_t flipped = word ^ 0x80808080U;
        first = pair(select_bytes(flipped, 0x64646464U, 0x4140U));
        second = pair(select_bytes(flipped, 0x64646464U, 0x4342U));
    }

private:
    __device__ std::uint32_t pair(std::uint32_t bits) const {
        return bits_of(__hsub2(make_pair<__half2>(bits), offset_));
    }

    __half2 offset_;
};

// A bf16 has 7 bits below its exponent. 0x4300 + (the low 7 bits of a code) is 128 + them; 0x4300 + (its sign bit) is
// 128, or 256 for a negative code, which is the low bits less 128.
template <>
class PairsOf<__nv_bfloat16> {
public:
    __device__ explicit PairsOf(float near) : near_(__float2bfloat162_rn(near)), magic_(in_register(0x43004300U)) {}

    __device__ void convert(std::uint32_t word, std::uint32_t& first, std::uint32_t& second) const {
        first = pair(select_bytes(word, 0U, 0x4140U));
        second = pair(select_bytes(word, 0U, 0x4342U));
    }

private:
    __device__ std::uint32_t pair(std::uint32_t bytes) const {
        const std::uint32_t low = mask_or(bytes, 0x007F007FU, magic_);
        const std::uint32_t sign = mask_or(bytes, 0x00800080U, magic_);
        const auto codes = __hsub2(make_pair<__nv_bfloat162>(low), make_pair<__nv_bfloat162>(sign));
        return bits_of(__hadd2(codes, near_));
    }

    __nv_bfloat162 near_;
    std::uint32_t magic_;
};

__device__ void multiply_add(float (&sums)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2], __half /*x*/) {
    multiply_add_f16(sums, a, b);
}

__device__ void multiply_add(float (&sums)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                             __nv_bfloat16 /*x*/) {
    multiply_add_bf16(sums, a, b);
}

template <int tiles>
constexpr int mma_resident = tiles <= 4 ? 2 : 1;

template <class X, int tiles>
__global__ void __launch_bounds__(threads, mma_resident<tiles>) mma_kernel(Layer<X> layer) {
    if constexpr (!has_mma) return must_not_run();
    using Place = Stage<tiles>;
    constexpr int rows = Place::rows;
    OCTAVO_DYNAMIC_SHARED(unsigned char, ring);
    __shared__ float x_sums[rows];
    const int thread = static_cast<int>(threadIdx.x);
    const int lane = thread % warp_size;
    const int warp = thread / warp_size;
    const int g = lane / 4;
    const int q = lane % 4;
    const int splits = layer.splits;
    const int part = warp % splits;
    const std::int64_t m = layer.x.rows;
    const std::int64_t n = layer.codes.rows;
    const std::int64_t begin = layer.begin();
    const std::int64_t depth = layer.end() - begin;
    const std::int64_t row_tiles = (m + rows - 1) / rows;
    const std::int64_t first_row = blockIdx.x % row_tiles * rows;
    const int block_features = warps / splits * mma_features;
    const std::int64_t block_feature = blockIdx.x / row_tiles * block_features;
    const int present_rows = static_cast<int>(smaller<std::int64_t>(rows, m - first_row));
    const int pitch = Place::pitch(splits);
    const int stage_size = Place::size(splits);
    const int stage_depth = splits * mma_depth;
    const auto steps = static_cast<int>((depth + stage_depth - 1) / stage_depth);

    // What this lane copies of the codes next. Features beyond the last one repeat it; they are not written.
    const int lane_depth = part * mma_depth + q * codes_per_load;
    const std::int64_t first_feature = block_feature + warp / splits * mma_features + g;
    const std::int8_t* codes_at[mma_loads];
    float near[mma_loads];
#pragma unroll
    for (int load = 0; load < mma_loads; ++load) {
        const std::int64_t feature = smaller(first_feature + 8 * load, n - 1);
        codes_at[load] = layer.codes.row(feature) + begin + lane_depth;
        near[load] = layer.shift(feature).near;
    }
    std::int64_t codes_left = depth - lane_depth;
    const std::uint64_t policy = read_once_policy();

    // What this thread copies of X next: a column of 16 bytes, of every `x_step`-th row.
    constexpr int x_width = per_access<X>;
    const int x_columns = stage_depth / x_width;
    const int x_row = thread / x_columns;
    const int x_depth = thread % x_columns * x_width;
    const int x_step = threads / x_columns;
    const X* x_at = layer.x.row(first_row + x_row) + begin + x_depth;
    std::int64_t x_left = depth - x_depth;
    const int x_place = Place::codes + x_row * pitch + x_depth * 2;

    // A source that is not read, behind the end of a row, is the beginning of all.
    const auto fetch = [&](unsigned char* stage) {
        const bool has_codes = codes_left > 0;
#pragma unroll
        for (int load = 0; load < mma_loads; ++load) {
            copy_async_16_once(stage + (load * threads + thread) * codes_per_load,
                               has_codes ? codes_at[load] : layer.codes.data, has_codes ? 16 : 0, policy);
            codes_at[load] += stage_depth;
        }
        codes_left -= stage_depth;
        const bool has_x = x_left > 0;
        const X* source = x_at;
        unsigned char* target = stage + x_place;
#pragma unroll 1
        for (int i = x_row; i < present_rows; i += x_step) {
            copy_async_16(target, has_x ? source : layer.x.data, has_x ? 16 : 0);
            source += x_step * layer.x.row_stride;
            target += x_step * pitch;
        }
        x_at += stage_depth;
        x_left -= stage_depth;
        copy_async_commit();
    };

#pragma unroll 1
    for (int slot = 0; slot + 1 < stages; ++slot) fetch(ring + slot * stage_size);
    // Rows of the tile that X does not have.
    for (int slot = 0; slot < stages; ++slot) {
        unsigned char* const x = ring + slot * stage_size + Place::codes;
#pragma unroll 1
        for (int i = present_rows + x_row; i < rows; i += x_step) {
            *reinterpret_cast<uint4*>(x + i * pitch + x_depth * 2) = uint4{0, 0, 0, 0};
        }
    }

    const PairsOf<X> pairs[mma_loads] = {PairsOf<X>(near[0]), PairsOf<X>(near[1]), PairsOf<X>(near[2]),
                                         PairsOf<X>(near[3])};
    float sums[2][tiles][4] = {};
    const unsigned char* stage = ring;
    unsigned char* next = ring + (stages - 1) * stage_size;
    unsigned char* const last = next;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
        copy_async_wait<stages - 2>();
        __syncthreads();  // the stage is there, and the one before it has been read by all
        fetch(next);
        next = next == last ? ring : next + stage_size;

        std::uint32_t a[2][4][4];  // [16 features][product][register]
#pragma unroll
        for (int load = 0; load < mma_loads; ++load) {
            const auto words = *reinterpret_cast<const uint4*>(stage + (load * threads + thread) * codes_per_load);
            const std::uint32_t word[] = {words.x, words.y, words.z, words.w};
#pragma unroll
            for (int s = 0; s < 4; ++s) {
                pairs[load].convert(word[s], a[load / 2][s][load % 2], a[load / 2][s][load % 2 + 2]);
            }
        }
        const unsigned char* const x = stage + Place::codes + g * pitch + lane_depth * 2;
#pragma unroll
        for (int tile = 0; tile < tiles; ++tile) {
            const auto left = *reinterpret_cast<const uint4*>(x + tile * 8 * pitch);
            const auto right = *reinterpret_cast<const uint4*>(x + tile * 8 * pitch + 16);
            const std::uint32_t b[4][2] = {{left.x, left.y}, {left.z, left.w}, {right.x, right.y}, {right.z, right.w}};
#pragma unroll
            for (int s = 0; s < 4; ++s) {
#pragma unroll
                for (int half = 0; half < 2; ++half) multiply_add(sums[half][tile], a[half][s], b[s], X{});
            }
        }
        stage = stage == last ? ring : stage + stage_size;
    }

    // The ring becomes the sums of the warps: [warp, row, feature].
    copy_async_wait<0>();
    __syncthreads();
    auto* const partial = reinterpret_cast<float*>(ring);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int tile = 0; tile < tiles; ++tile) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int row = tile * 8 + 2 * q + e % 2;
                const int feature = half * 16 + g + e / 2 * 8;
                partial[(warp * rows + row) * partial_pitch + feature] = sums[half][tile][e];
            }
        }
    }
    __syncthreads();

    // A thread finishes one feature of some rows.
    const int feature = thread % block_features;
    const int group = feature / mma_features;
    const bool writes = block_feature + feature < n;
    const bool is_part = layer.partial != nullptr;
    const float rest = writes && !is_part ? layer.shift(block_feature + feature).rest : 0.0F;
    const bool has_rest = !is_part && layer.zeropoint.present() && __syncthreads_or(rest != 0.0F) != 0;
    if (has_rest) sum_rows(layer.x, first_row, rows, x_sums);
    if (!writes) return;
    for (int i = thread / block_features; i < present_rows; i += threads / block_features) {
        const float* const first = partial + (group * splits * rows + i) * partial_pitch + feature % mma_features;
        float sum = 0.0F;
        for (int p = 0; p < splits; ++p) sum += first[p * rows * partial_pitch];
        if (is_part) {
            layer.part(blockIdx.y, first_row + i, block_feature + feature) = sum;
            continue;
        }
        layer.finish(first_row + i, block_feature + feature, sum, rest, has_rest ? x_sums[i] : 0.0F);
    }
}

// --- blocks that share the depth ------------------------------------------------------------------------------------

// A block adds the parts of `warps` rows of y times 32 features.
template <class X>
__global__ void __launch_bounds__(threads) add_kernel(Layer<X> layer, unsigned parts) {
    wait_for_launch_before();
    __shared__ float x_sums[warps];
    const int warp = static_cast<int>(threadIdx.x) / warp_size;
    const std::int64_t row_tiles = (layer.x.rows + warps - 1) / warps;
    const std::int64_t first_row = blockIdx.x % row_tiles * warps;
    const std::int64_t row = first_row + warp;
    const std::int64_t feature = blockIdx.x / row_tiles * warp_size + threadIdx.x % warp_size;
    const bool writes = row < layer.x.rows && feature < layer.codes.rows;
    const float rest = writes ? layer.shift(feature).rest : 0.0F;
    const bool has_rest = layer.zeropoint.present() && __syncthreads_or(rest != 0.0F) != 0;
    if (has_rest) sum_rows(layer.x, first_row, warps, x_sums);
    if (!writes) return;
    float sum = 0.0F;
#pragma unroll 4
    for (unsigned part = 0; part < parts; ++part) sum += layer.part(part, row, feature);
    layer.finish(row, feature, sum, rest, has_rest ? x_sums[warp] : 0.0F);
}

// --- launchers ------------------------------------------------------------------------------------------------------

template <class X>
Layer<X> layer_of(const ConstMatrix& x, float scale_x, const WeightView& weight, const ConstVector& bias,
                  const Matrix& out) {
    return {.x = view_of<X>(x),
            .scale_x = scale_x,
            .codes = view_of<std::int8_t>(weight.codes),
            .scale = span_of<float>(weight.scale),
            .zeropoint = span_of<float>(weight.zeropoint),
            .bias = float_span_of(bias),
            .out = {out.data, out.dtype, out.row_stride, out.col_stride}};
}

// Of `parts` blocks that share the depth each has some of its `steps` steps. Where there are several, their sums are
// added by a launch more.
template <class X>
void launch_parts(void (*kernel)(Layer<X>), Layer<X> layer, const Grid& grid, std::int64_t parts, std::int64_t step,
                  cudaStream_t stream) {
    const std::int64_t steps = std::max<std::int64_t>(blocks_for(layer.codes.cols, step), 1);
    const std::int64_t own = blocks_for(steps, parts);
    parts = blocks_for(steps, own);
    layer.depth = own * step;
    Workspace workspace(stream);
    if (parts > 1) {
        const auto sums = workspace.reserve<float>(parts * layer.x.rows * layer.codes.rows);
        workspace.allocate();
        layer.partial = workspace.at(sums);
    }
    launch(kernel, Grid{dim3(grid.blocks.x, static_cast<unsigned>(parts)), grid.threads, grid.shared}, stream, layer);
    if (parts == 1) return;
    const std::int64_t blocks = blocks_for(layer.x.rows, warps) * blocks_for(layer.codes.rows, warp_size);
    launch(add_kernel<X>, Grid{static_cast<unsigned>(blocks), threads, 0, begins_early()}, stream, layer,
           static_cast<unsigned>(parts));
}

// `depth`: what a warp takes of k at a time.
template <int rows, int features, class X>
void launch_dot(void (*kernel)(Layer<X>), Layer<X> layer, int depth, cudaStream_t stream) {
    layer.near_low = -dot_near;
    layer.near_high = dot_near;
    const std::int64_t row_tiles = blocks_for(layer.x.rows, rows);
    const auto blocks = [&] { return row_tiles * blocks_for(layer.codes.rows, warps / layer.splits * features); };
    // Two blocks to a multiprocessor, nearly, as long as every warp has some depth to itself.
    const std::int64_t enough = device_facts().multiprocessors * 3 / 2;
    while (layer.splits < warps && blocks() < enough && layer.splits * depth < layer.codes.cols) layer.splits *= 2;
    // Where all warps share it and most multiprocessors are idle, several blocks do, of four such steps at least.
    const std::int64_t step = layer.splits * depth;
    const std::int64_t parts = 3 * blocks() > device_facts().multiprocessors
                                   ? 1
                                   : std::clamp<std::int64_t>(layer.codes.cols / (4 * step), 1, enough / blocks());
    launch_parts(kernel, layer, Grid{static_cast<unsigned>(blocks()), threads}, parts, step, stream);
}

template <class X, int rows>
void launch_dot(const Layer<X>& layer, cudaStream_t stream) {
    launch_dot<rows, dot_features>(dot_kernel<X, rows>, layer, dot_stride, stream);
}

// Tiles of more than four rows are those of X in float32: of 16 bits it is multiplied so on sm_75 alone.
template <class X>
void launch_dot(const Layer<X>& layer, cudaStream_t stream) {
    constexpr int most = sizeof(X) == 4 ? 9 : 4;
    const std::int64_t rows = dot_tile(layer.x.rows, most).rows;
    if (rows == 1) return launch_dot<X, 1>(layer, stream);
    if (rows == 2) return launch_dot<X, 2>(layer, stream);
    if constexpr (most > 4) {
        if (rows == 5) return launch_dot<X, 5>(layer, stream);
        if (rows == 6) return launch_dot<X, 6>(layer, stream);
        if (rows == 8) return launch_dot<X, 8>(layer, stream);
        if (rows == 9) return launch_dot<X, 9>(layer, stream);
    }
    launch_dot<X, 4>(layer, stream);
}

// False where the ring does not fit shared memory.
template <class X, int tiles>
bool launch_mma(Layer<X> layer, cudaStream_t stream) {
    using Place = Stage<tiles>;
    const DeviceFacts& facts = device_facts();
    int most = 0;
    for (int splits = 1; splits <= warps && Place::needed(splits) <= facts.shared; splits *= 2) most = splits;
    if (most == 0) return false;
    layer.near_low = mma_near_low;
    layer.near_high = mma_near_high;
    const std::int64_t m = layer.x.rows;
    const std::int64_t n = layer.codes.rows;
    const Split split =
        split_weight_only(m, n, layer.codes.cols, facts.multiprocessors, Place::rows, mma_resident<tiles>, most);
    layer.splits = static_cast<int>(split.warps);
    static_assert(Place::ring(1) >= sizeof(float) * warps * Place::rows * partial_pitch,
                  "the ring must hold the sums of the warps");
    // All that any call can need: another thread may be between this and its launch.
    static OncePerDevice set_up;
    set_up([&] { allow_shared(mma_kernel<X, tiles>, Place::ring(most)); });
    const std::int64_t blocks = blocks_for(m, Place::rows) * blocks_for(n, warps / layer.splits * mma_features);
    launch_parts(mma_kernel<X, tiles>, layer, Grid{static_cast<unsigned>(blocks), threads, Place::ring(layer.splits)},
                 split.parts, layer.splits * mma_depth, stream);
    return true;
}

template <class X>
bool launch_mma(const Layer<X>& layer, cudaStream_t stream) {
    const std::int64_t m = layer.x.rows;
    if (m <= 8) return launch_mma<X, 1>(layer, stream);
    if (m <= 16) return launch_mma<X, 2>(layer, stream);
    if (m > 32 && launch_mma<X, 8>(layer, stream)) return true;
    return launch_mma<X, 4>(layer, stream);
}

// Whether X and the codes are read 16 bytes at a time.
bool reads_wide(const ConstMatrix& x, const WeightView& weight) {
    return x.cols % codes_per_load == 0 && rows_are_aligned(weight.codes, 16) && rows_are_aligned(x, 16);
}

}  // namespace

bool weight_only_uses_mma(const ConstMatrix& x, const WeightView& weight) {
    return size_of(x.dtype) == 2 && reads_wide(x, weight) && device_facts().architecture >= first_mma_architecture;
}

void weight_only_linear(ConstMatrix x, float scale_x, const WeightView& weight, ConstVector bias, Matrix out,
                        cudaStream_t stream) {
    const std::int64_t m = out.rows;
    if (m == 0 || out.cols == 0) return;
    const bool wide = reads_wide(x, weight);
    with_float(x.dtype, [&]<class X>(Type<X>) {
        const Layer<X> layer = layer_of<X>(x, scale_x, weight, bias, out);
        if constexpr (sizeof(X) == 2) {
            // Also a single row: a tile of eight takes fewer instructions than a dot product of one.
            if (weight_only_uses_mma(x, weight) && launch_mma(layer, stream)) return;
        }
        if (!wide) return launch_dot<strided_rows, 1>(strided_dot_kernel<X>, layer, 4 * warp_size, stream);
        launch_dot(layer, stream);
    });
}

}  // namespace octavo::cuda
