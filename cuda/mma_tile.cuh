// A tile of the int8 product on tensor cores by warp-wide instructions (mma.sync), for operands of any shape and
// strides:
//
//   sum[i, j] = sum_k a[i, k] * b[j, k]
//
// exact in int32. What becomes of the sums is the business of who includes this (gemm_mma.cu, linear_mma.cu).
//
// A block computes a tile of the output. It walks along k in slices of 64 bytes, brought to shared memory a few slices
// ahead (cp.async), so that their way from memory is hidden. Each warp owns a part of the tile, 64 x 64 or 32 x 32, as
// fragments of 16 x 8 in registers; for every 32 of k it reads the fragments of a and b (ldmatrix), one step ahead of
// the products that use them.
//
// Why 64 x 64 per warp: on an A100 a multiprocessor multiplies 2048 pairs a clock and moves 128 bytes a clock from or
// to shared memory. A slice of 128 x 128 takes 512 clocks of products; four warps then read 4 * 8 KB (256 clocks) and
// the copies write 16 KB (128 clocks): 75 % of what shared memory can do. 256 x 128 with eight warps needs 69 % and
// three quarters of the reads of global memory; 64 x 64 in warps of 32 x 32 is bound by shared memory, at two thirds of
// the peak, but makes four times as many blocks; 96 x 64 in warps of 48 x 32, at four fifths, serves few rows beyond 64
// and what tiles of 64 rows divide badly. Before sm_80 a
// multiprocessor multiplies half as many pairs a clock, and the copies take registers: 64 x 32 per warp.
//
// Shared memory has no bank conflicts: the four 16-byte chunks of a row are permuted by the number of the row
// (`chunk_of_a`, `chunk_of_b`), such that the eight rows of a matrix that ldmatrix reads lie in different banks.
//
// The columns of two neighbouring fragments of b are interleaved, so that a lane holds four columns side by side: rows
// of the output are then stored 16 bytes at a time.
//
// The same way through shared memory serves matrices of float32, in whose rows 16 elements take the place of 64 codes:
// matrix instructions for tf32 hold them in the registers where those for int8 hold four codes.
#pragma once

#include <algorithm>
#include <type_traits>

#include "device.cuh"
#include "gemm.hpp"
#include "memory.hpp"
#include "ptx.cuh"

namespace octavo::cuda {

constexpr int slice = 64;  // of k, in shared memory
constexpr int step = 32;   // of k, in registers
constexpr int steps = slice / step;
constexpr int chunk = 16;              // bytes of one copy
constexpr int chunks = slice / chunk;  // of a row of a slice
constexpr int together = 4;            // columns that a lane holds side by side
constexpr int bundle = 4 * together;   // columns that a row of lanes holds: two fragments

template <int rows_, int cols_, int warp_rows_, int warp_cols_, int resident_>
struct Tile {
    static constexpr int rows = rows_;
    static constexpr int cols = cols_;
    static constexpr int warp_rows = warp_rows_;
    static constexpr int warp_cols = warp_cols_;
    static constexpr int resident = resident_;  // blocks in a multiprocessor, as registers allow
    static constexpr int stages = 4;            // slices in shared memory
    static constexpr int warps_across = cols / warp_cols;
    static constexpr int threads = rows / warp_rows * warps_across * warp_size;
    static constexpr int row_fragments = warp_rows / 16;
    static constexpr int col_fragments = warp_cols / 8;
    static constexpr int stage_bytes = (rows + cols) * slice;
};
using Large = Tile<256, 128, 64, 64, 1>;
using Medium = Tile<128, 128, 64, 64, 2>;
using Tall = Tile<96, 64, 48, 32, 3>;
using Turing = Tile<128, 128, 64, 32, 1>;
using Small = Tile<64, 64, 32, 32, 4>;

// An operand of the product, as codes.
struct Operand {
    const std::int8_t* data;
    std::int64_t rows;
    std::int64_t row_stride;
    std::int64_t col_stride;
};

// Where the 16-byte chunk of a row of a slice is, in the order of banks.
__device__ inline int chunk_of_a(int row, int index) { return index ^ (row / 2 % chunks); }
__device__ inline int chunk_of_b(int row, int index) { return index ^ (row / 4 % chunks); }

// --- from global to shared memory -----------------------------------------------------------------------------------

// What a thread copies of the slices of one operand: chunk `index` of every `pitch`-th row from `first` on.
template <int tile_rows, int threads, bool is_b>
struct Share {
    static constexpr int pitch = threads / chunks;
    static constexpr int count = (tile_rows + pitch - 1) / pitch;
    static constexpr int row_bytes = slice;
    static_assert(pitch % 16 == 0);  // the permutation of all these rows is the same

    __device__ static int first() { return static_cast<int>(threadIdx.x) / chunks; }
    __device__ static int index() { return static_cast<int>(threadIdx.x) % chunks; }
    __device__ static int offset() {
        const int place = is_b ? chunk_of_b(first(), index()) : chunk_of_a(first(), index());
        return first() * slice + place * chunk;
    }
};

// What a block computes: a tile of the output, over columns begin to end - 1 of a and b.
struct Job {
    std::int64_t row0;
    std::int64_t col0;
    std::int64_t begin;
    std::int64_t end;
};

// What a thread copies of the slices of a job, without waiting, of the `tile_rows` rows of an operand from `row0` on.
// `skips`: of a thread's turns nothing is written from that on in which no thread's row is in the operand.
template <class Share, int tile_rows, bool skips = false>
class AsyncSlices {
public:
    __device__ AsyncSlices(const Operand& operand, std::int64_t row0, const Job& job)
        : source_(operand.data + (row0 + Share::first()) * operand.row_stride + job.begin + Share::index() * chunk),
          row_stride_(operand.row_stride),
          rows_(operand.rows - row0 < tile_rows ? static_cast<int>(operand.rows - row0) : tile_rows),
          end_(static_cast<int>(job.end - job.begin)) {}

    // That from column `begin` of the job on. Its columns are counted in 32 bits, as registers are few. Zeros stand for
    // what is not in the operand or in the job.
    __device__ void copy(int begin, std::int8_t* shared) const {
        std::int8_t* const target = shared + Share::offset();
        const int rest = end_ - begin - Share::index() * chunk;
        const int bytes = rest < 0 ? 0 : rest < chunk ? rest : chunk;
#pragma unroll
        for (int i = 0; i < Share::count; ++i) {
            const int row = Share::first() + i * Share::pitch;
            if (skips && i * Share::pitch >= rows_) break;
            if (tile_rows % Share::pitch != 0 && row >= tile_rows) break;
            const bool inside = row < rows_;
            copy_async_16(target + i * Share::pitch * Share::row_bytes,
                          source_ + begin + i * Share::pitch * row_stride_, inside ? bytes : 0);
        }
    }

private:
    const std::int8_t* source_;  // the first chunk of the first slice
    std::int64_t row_stride_;
    int rows_;  // of the operand, that are in the tile
    int end_;
};

// How slices come to shared memory.
enum class SliceCopy : std::uint8_t {
    async,    // rows aligned to 16 bytes: without waiting, where there is cp.async
    wide,     // such rows where there is not: 16 bytes at a time by way of registers
    shifted,  // contiguous rows that begin anywhere: the words that hold 16 bytes of one, shifted to their places
    bytes     // codes that lie apart: one by one
};

// A chunk by way of registers.
using Chunk = Pack<std::uint32_t, chunk / 4>;

// `count` codes, at most 4, as a register; zeros behind them.
__device__ inline std::uint32_t gather(const std::int8_t* source, std::int64_t stride, std::int64_t count) {
    std::uint32_t word = 0;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
        if (e < count) word |= static_cast<std::uint32_t>(static_cast<std::uint8_t>(source[e * stride])) << 8 * e;
    }
    return word;
}

// A chunk of a row, from `source` on, of which `count` codes are in the operand.
__device__ inline Chunk gather_chunk(const std::int8_t* source, std::int64_t stride, std::int64_t count) {
    Chunk chunk_of_row;
#pragma unroll
    for (int w = 0; w < chunk / 4; ++w) chunk_of_row[w] = gather(source + 4 * w * stride, stride, count - 4 * w);
    return chunk_of_row;
}

// Where a thread's chunk of a row begins, and how many codes of the operand there are from there on.
template <class Share>
struct Source {
    const std::int8_t* data;
    std::int64_t count;

    __device__ Source(const Operand& operand, std::int64_t row0, std::int64_t begin, std::int64_t end, int i) {
        const std::int64_t col = begin + Share::index() * chunk;
        const std::int64_t row = row0 + Share::first() + i * Share::pitch;
        count = row < operand.rows ? end - col : 0;
        data = operand.data + row * operand.row_stride + col * operand.col_stride;
    }
};

// How many bytes before an address its word begins.
__device__ inline unsigned place_in_word(const std::int8_t* address) {
    return static_cast<unsigned>(reinterpret_cast<std::uintptr_t>(address) % 4);
}

// Whether a whole chunk of a row can be read as words. Where they are shifted, the first begins before the chunk and
// the last ends behind it: neither may leave the operand.
template <SliceCopy copy, class Share>
__device__ bool reads_words(const Operand& operand, const Source<Share>& source) {
    if constexpr (copy != SliceCopy::shifted) return source.count >= chunk;
    const unsigned before = place_in_word(source.data);
    return source.data - before >= operand.data && source.count >= chunk + static_cast<int>((4 - before) % 4);
}

template <SliceCopy copy>
__device__ Chunk load_chunk(const std::int8_t* source) {
    if constexpr (copy != SliceCopy::shifted) return load<chunk / 4>(reinterpret_cast<const std::uint32_t*>(source));
    const unsigned before = place_in_word(source);
    const auto* const words = reinterpret_cast<const std::uint32_t*>(source - before);
    const unsigned selector = 0x3210U + 0x1111U * before;
    Chunk chunk_of_row;
    std::uint32_t word = words[0];
#pragma unroll
    for (int w = 0; w < chunk / 4; ++w) {
        const bool is_needed = w + 1 < chunk / 4 || before != 0;
        const std::uint32_t next = is_needed ? words[w + 1] : 0;
        chunk_of_row[w] = select_bytes(word, next, selector);
        word = next;
    }
    return chunk_of_row;
}

// Contiguous rows.
template <SliceCopy copy, class Share>
__device__ void fetch_slice(const Operand& operand, std::int64_t row0, std::int64_t begin, std::int64_t end,
                            Chunk (&values)[Share::count]) {
#pragma unroll
    for (int i = 0; i < Share::count; ++i) {
        const Source<Share> source(operand, row0, begin, end, i);
        values[i] = reads_words<copy>(operand, source) ? load_chunk<copy>(source.data)
                                                       : gather_chunk(source.data, 1, source.count);
    }
}

// Any rows, a chunk at a time: all of a thread's codes and their addresses would take more registers than there are.
template <class Share>
__device__ void copy_bytes(const Operand& operand, std::int64_t row0, std::int64_t begin, std::int64_t end,
                           std::int8_t* target) {
#pragma unroll 1
    for (int i = 0; i < Share::count; ++i) {
        const Source<Share> source(operand, row0, begin, end, i);
        store(reinterpret_cast<std::uint32_t*>(target + i * Share::pitch * slice),
              gather_chunk(source.data, operand.col_stride, source.count));
    }
}

template <class Share>
__device__ void put_slice(const Chunk (&values)[Share::count], std::int8_t* target) {
#pragma unroll
    for (int i = 0; i < Share::count; ++i) {
        store(reinterpret_cast<std::uint32_t*>(target + i * Share::pitch * slice), values[i]);
    }
}

// --- from shared memory to registers, and the product ---------------------------------------------------------------

template <class Tile>
struct Fragments {
    std::uint32_t a[Tile::row_fragments][4];
    std::uint32_t b[Tile::col_fragments][2];
};

// A warp's part of the tile.
template <class Tile>
struct Place {
    int lane;
    int row;
    int col;

    __device__ explicit Place(int thread = static_cast<int>(threadIdx.x))
        : lane(thread % warp_size),
          row(thread / warp_size / Tile::warps_across * Tile::warp_rows),
          col(thread / warp_size % Tile::warps_across * Tile::warp_cols) {}
};

// Where a lane's row of the matrices of step `s` of a slice is: of the first 16 rows of a, and, behind the rows of a,
// of the first two fragments of b.
template <class Tile>
__device__ const std::int8_t* matrices_of_a(const std::int8_t* shared, int s, const Place<Tile>& place) {
    // Matrices of a: rows 0-7 and 8-15 of the first 16 bytes, then of the next.
    const int matrix = place.lane / 8;
    const int row = place.row + matrix % 2 * 8 + place.lane % 8;
    return shared + row * slice + chunk_of_a(row, 2 * s + matrix / 2) * chunk;
}
template <class Tile>
__device__ const std::int8_t* matrices_of_b(const std::int8_t* shared, int s, const Place<Tile>& place) {
    // Matrices of b: both 16 bytes of one fragment, then of its neighbour. Column 2q + e of fragment f of the two is
    // column 4q + 2f + e of the tile.
    const int matrix = place.lane / 8;
    const int row = place.col + place.lane % 8 / 2 * together + matrix / 2 * 2 + place.lane % 2;
    return shared + (Tile::rows + row) * slice + chunk_of_b(row, 2 * s + matrix % 2) * chunk;
}

// Of a warp's rows, in how many fragments there are any, the same for all lanes: the others are neither read nor
// multiplied, so that the last rows of a take no more time than they need. 16 is a `granule` (division.hpp).
constexpr int fragment_rows = 16;
template <class Tile>
__device__ int fragments_present(const Place<Tile>& place, std::int64_t rows) {
    const std::int64_t left = rows - place.row;
    const int found = left >= Tile::warp_rows ? Tile::row_fragments
                      : left <= 0             ? 0
                                              : (static_cast<int>(left) + fragment_rows - 1) / fragment_rows;
    return __shfl_sync(whole_warp, found, 0);  // the same for all lanes, as the compiler cannot know
}

// Reads step `s` of a slice: rows of a, behind them rows of b.
template <class Tile>
__device__ void read_fragments(const std::int8_t* shared, int s, const Place<Tile>& place, int present,
                               Fragments<Tile>& to) {
    const std::int8_t* const a = matrices_of_a<Tile>(shared, s, place);
#pragma unroll
    for (int t = 0; t < Tile::row_fragments; ++t) load_matrices_if(t < present, to.a[t], a + t * fragment_rows * slice);
    const std::int8_t* const b = matrices_of_b<Tile>(shared, s, place);
#pragma unroll
    for (int t = 0; t < Tile::col_fragments; t += 2) {
        std::uint32_t pair[4];
        load_matrices_if(present > 0, pair, b + t * 8 * slice);
        to.b[t][0] = pair[0];
        to.b[t][1] = pair[1];
        to.b[t + 1][0] = pair[2];
        to.b[t + 1][1] = pair[3];
    }
}

template <class Tile>
using Sums = std::int32_t[Tile::row_fragments][Tile::col_fragments][4];

template <class Tile>
__device__ void multiply_codes(const Fragments<Tile>& from, int present, Sums<Tile>& sums) {
#pragma unroll
    for (int t = 0; t < Tile::row_fragments; ++t) {
#pragma unroll
        for (int u = 0; u < Tile::col_fragments; ++u) {
            multiply_add_s8_if(t < present, sums[t][u], from.a[t], from.b[u]);
        }
    }
}

// What else is done with slices while they are in shared memory: nothing.
struct NothingElse {
    __device__ void before_a() {}                                                  // the first rows of b are under way;
    __device__ void prepare() {}                                                   // behind it is a barrier,
    __device__ void begin() {}                                                     // and this
    __device__ void take(int /*begin*/, int /*end*/, const std::int8_t* /*b*/) {}  // columns of the job, rows of b
};

// Slices come by cp.async, `stages - 1` ahead. `multiply(fragments, present, sums)` adds the products of a step.
// `skips`: fragments without rows of a have any contents; else zeros.
template <class Tile, bool skips, class Sums, class Multiply, class Also = NothingElse>
__device__ void sum_async(const Operand& a, const Operand& b, const Job& job, std::int8_t* shared, Sums& sums,
                          const Multiply& multiply, Also also = {}) {
    constexpr int ahead = Tile::stages - 1;
    const Place<Tile> place;
    const AsyncSlices<Share<Tile::rows, Tile::threads, false>, Tile::rows, skips> slices_a(a, job.row0, job);
    const AsyncSlices<Share<Tile::cols, Tile::threads, true>, Tile::cols> slices_b(b, job.col0, job);
    const int present = skips ? fragments_present(place, a.rows - job.row0) : Tile::row_fragments;
    const auto end = static_cast<int>(job.end - job.begin);
    const auto copy_a = [&](int begin, int stage) {
        if (begin < end) slices_a.copy(begin, shared + stage * Tile::stage_bytes);
        copy_async_commit();  // also where nothing was copied: waiting counts groups
    };
    const auto copy_b = [&](int begin, int stage) {
        if (begin < end) slices_b.copy(begin, shared + stage * Tile::stage_bytes + Tile::rows * slice);
    };

#pragma unroll
    for (int stage = 0; stage < ahead; ++stage) copy_b(stage * slice, stage);
    also.before_a();
#pragma unroll
    for (int stage = 0; stage < ahead; ++stage) copy_a(stage * slice, stage);
    also.prepare();
    copy_async_wait<ahead - 1>();
    __syncthreads();
    also.begin();
    Fragments<Tile> fragments[2];
    read_fragments(shared, 0, place, present, fragments[0]);
    int stage = 0;     // of the slice that is being multiplied
    int free = ahead;  // of the slice before it, which all threads have read
    for (int begin = 0; begin < end; begin += slice) {
        const int next = stage + 1 == Tile::stages ? 0 : stage + 1;
        also.take(begin, begin + slice, shared + stage * Tile::stage_bytes + Tile::rows * slice);
#pragma unroll
        for (int s = 0; s < steps; ++s) {
            if (s + 1 < steps) {
                read_fragments(shared + stage * Tile::stage_bytes, s + 1, place, present, fragments[(s + 1) % 2]);
            } else {
                // The next slice has landed, and all threads have read this one. Behind the last slice is an old one,
                // read in vain.
                copy_async_wait<ahead - 1>();
                __syncthreads();
                read_fragments(shared + next * Tile::stage_bytes, 0, place, present, fragments[(s + 1) % 2]);
            }
            if (s == 0) {
                copy_b(begin + ahead * slice, free);
                copy_a(begin + ahead * slice, free);
            }
            multiply(fragments[s % 2], present, sums);
        }
        free = stage;
        stage = next;
    }
}

// Slices come by way of registers, one ahead; byte by byte, when they are needed.
template <class Tile, SliceCopy copy>
__device__ void sum_by_registers(const Operand& a, const Operand& b, const Job& job, std::int8_t* shared,
                                 Sums<Tile>& sums) {
    using ShareA = Share<Tile::rows, Tile::threads, false>;
    using ShareB = Share<Tile::cols, Tile::threads, true>;
    const Place<Tile> place;
    Chunk from_a[ShareA::count];
    Chunk from_b[ShareB::count];
    const auto fetch = [&](std::int64_t begin) {
        if constexpr (copy != SliceCopy::bytes) {
            fetch_slice<copy, ShareA>(a, job.row0, begin, job.end, from_a);
            fetch_slice<copy, ShareB>(b, job.col0, begin, job.end, from_b);
        }
    };
    const auto put = [&](std::int64_t begin, int stage) {
        std::int8_t* const target_a = shared + stage * Tile::stage_bytes + ShareA::offset();
        std::int8_t* const target_b = shared + stage * Tile::stage_bytes + Tile::rows * slice + ShareB::offset();
        if constexpr (copy != SliceCopy::bytes) {
            put_slice<ShareA>(from_a, target_a);
            put_slice<ShareB>(from_b, target_b);
        } else {
            copy_bytes<ShareA>(a, job.row0, begin, job.end, target_a);
            copy_bytes<ShareB>(b, job.col0, begin, job.end, target_b);
        }
    };
    if (job.begin >= job.end) return;
    fetch(job.begin);
    put(job.begin, 0);
    __syncthreads();
    int stage = 0;
    for (std::int64_t begin = job.begin; begin < job.end; begin += slice) {
        const bool more = begin + slice < job.end;
        if (more) fetch(begin + slice);
#pragma unroll
        for (int s = 0; s < steps; ++s) {
            Fragments<Tile> fragments;
            read_fragments(shared + stage * Tile::stage_bytes, s, place, Tile::row_fragments, fragments);
            multiply_codes<Tile>(fragments, Tile::row_fragments, sums);
        }
        stage = 1 - stage;
        if (more) put(begin + slice, stage);
        __syncthreads();
    }
}

// The sums of a job, whatever way its slices come.
template <class Tile, SliceCopy copy, class Also = NothingElse>
__device__ void sum_products(const Operand& a, const Operand& b, const Job& job, std::int8_t* shared, Sums<Tile>& sums,
                             const Also& also = {}) {
    if constexpr (copy == SliceCopy::async) {
        sum_async<Tile, true>(
            a, b, job, shared, sums,
            [](const Fragments<Tile>& from, int present, Sums<Tile>& to) { multiply_codes<Tile>(from, present, to); },
            also);
    } else {
        sum_by_registers<Tile, copy>(a, b, job, shared, sums);
    }
}

// --- kernel ---------------------------------------------------------------------------------------------------------

constexpr int first_with_async_copies = 80;

// Whether `copy_for` can choose it on the architecture that is being compiled for.
#ifdef __CUDA_ARCH__
template <SliceCopy copy>
constexpr bool is_used = copy != (__CUDA_ARCH__ / 10 >= first_with_async_copies ? SliceCopy::wide : SliceCopy::async);
#else
template <SliceCopy copy>
constexpr bool is_used = true;
#endif

// How the depth of each tile is shared, by blocks that follow each other; and how many rows of a there are to a tile.
struct Parts {
    std::int64_t depth;  // of each
    unsigned count;
    int height;
};

// What the block computes: of rows of a no more than `parts.height`.
template <class Tile>
__device__ Job job_of(std::int64_t m, std::int64_t n, std::int64_t k, const Parts& parts) {
    // Tiles of eight rows of tiles are computed together, so that blocks that run at a time read the same rows of a and
    // b.
    constexpr std::int64_t group = 8;
    const std::int64_t rows = m / parts.height;  // full ones
    const std::int64_t cols = (n + Tile::cols - 1) / Tile::cols;
    const unsigned tile = blockIdx.x / parts.count;
    const std::int64_t begin = blockIdx.x % parts.count * parts.depth;
    const std::int64_t end = k - begin < parts.depth ? k : begin + parts.depth;
    // Tiles that are not full take less time: they come last, so that they fill what the others leave.
    if (tile >= rows * cols) return {rows * parts.height, (tile - rows * cols) * Tile::cols, begin, end};
    const std::int64_t first = tile / (group * cols) * group;
    const std::int64_t height = rows - first < group ? rows - first : group;
    const std::int64_t place = tile % (group * cols);
    return {(first + place % height) * parts.height, place / height * Tile::cols, begin, end};
}

// Where the rows of a end that the block multiplies.
__device__ inline std::int64_t rows_until(std::int64_t m, const Job& job, const Parts& parts) {
    return m - job.row0 < parts.height ? m : job.row0 + parts.height;
}

// --- launch ---------------------------------------------------------------------------------------------------------

// How slices get to shared memory, by what operands and device allow.
inline SliceCopy copy_for(const ConstMatrix& a, const ConstMatrix& b) {
    if (!rows_are_aligned(a, 1) || !rows_are_aligned(b, 1)) return SliceCopy::bytes;
    if (!reads_wide(a, b)) return SliceCopy::shifted;
    return device_facts().architecture >= first_with_async_copies ? SliceCopy::async : SliceCopy::wide;
}

enum class Size : std::uint8_t { large, medium, small };

template <class Tile>
std::int64_t tiles_of(std::int64_t m, std::int64_t n, std::int64_t height = Tile::rows) {
    return blocks_for(m, height) * blocks_for(n, Tile::cols);
}

// What tiles reach (see above), of what the largest does.
constexpr double large_rate = 1.0;
constexpr double medium_rate = 0.95;
constexpr double small_rate = 0.6;

// Clocks that a product takes, up to a factor.
template <class Tile>
double clocks(std::int64_t m, std::int64_t n, double rate) {
    const std::int64_t multiprocessors = device_facts().multiprocessors;
    const std::int64_t at_once = multiprocessors * Tile::resident;
    const std::int64_t tiles = tiles_of<Tile>(m, n);
    // The last wave can leave a multiprocessor fewer tiles than it has room for.
    const std::int64_t of_one = tiles / at_once * Tile::resident + blocks_for(tiles % at_once, multiprocessors);
    return static_cast<double>(of_one * Tile::rows * Tile::cols) / rate;
}

inline Size size_for(std::int64_t m, std::int64_t n, SliceCopy copy) {
    // Byte by byte, reading is what takes time, whatever the tile. Large products are read so only where there may be
    // no copies (gemm.cpp).
    if (copy == SliceCopy::bytes) return Size::small;
    const double medium = clocks<Medium>(m, n, medium_rate);
    const double small = clocks<Small>(m, n, small_rate);
    if (copy == SliceCopy::async && clocks<Large>(m, n, large_rate) <= std::min(medium, small)) return Size::large;
    return medium <= small ? Size::medium : Size::small;
}

// The stride of a single row may be any, so it is made one that keeps the rows behind it aligned: copies of these read
// no byte, but their addresses must be aligned all the same.
inline Operand operand_of(const ConstMatrix& matrix) {
    return {static_cast<const std::int8_t*>(matrix.data), matrix.rows, matrix.rows <= 1 ? 0 : matrix.row_stride,
            matrix.col_stride};
}

// Bytes of shared memory of a block.
template <class Tile, SliceCopy copy>
constexpr std::size_t shared_of =
    static_cast<std::size_t>(copy == SliceCopy::async ? Tile::stages : 2) * Tile::stage_bytes;

// How many blocks should share the depth of a small tile, so that every multiprocessor has work.
inline std::int64_t parts_for(std::int64_t m, std::int64_t n, std::int64_t k) {
    constexpr std::int64_t least_depth = 8 * slice;
    const std::int64_t wanted = device_facts().multiprocessors / tiles_of<Small>(m, n);
    return std::max<std::int64_t>(1, std::min(wanted, k / least_depth));
}

// `wanted` parts in whole slices, or fewer, where that leaves some without work.
inline Parts parts_of(std::int64_t k, std::int64_t wanted, std::int64_t height) {
    const std::int64_t depth = blocks_for(blocks_for(k, slice), wanted) * slice;
    return {depth, depth == 0 ? 1U : static_cast<unsigned>(blocks_for(k, depth)), static_cast<int>(height)};
}

// Whether rows of the output can be written four columns at a time.
inline bool writes_wide(const Matrix& out) {
    return out.cols % together == 0 && rows_are_aligned(out, together * size_of(out.dtype));
}

}  // namespace octavo::cuda
