// The fused product of linear_mma.cu in tiles that warpgroups multiply (sm_90a): 128 x 256, 192 x 128 and 128 x 128.
// Instructions take both operands from shared memory and multiply on while the warps copy; they reach what tensor cores
// of this architecture do, of which those of mma_tile.cuh reach three fifths.
//
// A block walks along k in slices of 128 bytes, brought to shared memory by cp.async a few slices ahead. Of each slice
// a warpgroup multiplies its 64 rows of a by all rows of b, in four steps, and begins with the next slice before that
// is done. So there are two stages more than slices ahead: the one that is multiplied, and the one before it, which the
// other warpgroup may still be multiplying.
//
// Rows of b are put into shared memory in such an order that a lane holds four columns of the output side by side, as
// everywhere else: then what becomes of the sums is what becomes of those of other tiles (linear_epilogue.cuh). It has
// more columns to a lane, so their scales and bias come by way of shared memory.
#include "linear_wgmma.cuh"
#include "ptx.cuh"

namespace octavo::cuda {
namespace {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(OCTAVO_SIMT)
constexpr bool has_wgmma = true;
#else
constexpr bool has_wgmma = false;
#endif

constexpr int group_threads = 4 * warp_size;
constexpr int group_rows = 64;
constexpr std::size_t matrix_alignment = 1024;  // of shared memory

// What a thread copies of the slices of one operand: chunk `index` of every `pitch`-th row from `first` on.
template <class Tile, int tile_rows, bool is_b>
struct GroupShare {
    static constexpr int row_bytes = Tile::slice;
    static constexpr int chunks = row_bytes / chunk;
    static constexpr int pitch = Tile::threads / chunks;
    static constexpr int count = (tile_rows + pitch - 1) / pitch;
    static_assert(pitch % bundle == 0);  // the order of all these rows is the same

    __device__ static int first() { return static_cast<int>(threadIdx.x) / chunks; }
    __device__ static int index() { return static_cast<int>(threadIdx.x) % chunks; }
    __device__ static int place(int row, int index) {
        if (is_b) {
            // Column 4q + 2f + e of the tile is column 2q + e of fragment f of two.
            const int q = row % bundle / together;
            row = row / bundle * bundle + row % together / 2 * 8 + 2 * q + row % 2;
        }
        return row * row_bytes + (index ^ row % 8) * chunk;
    }
    __device__ static int offset() { return place(first(), index()); }
    __device__ static int of(int row, int byte) { return place(row, byte / chunk) + byte % chunk; }
};

template <class Tile, class Also = NothingElse>
__device__ void sum_by_groups(const Operand& a, const Operand& b, const Job& job, std::int8_t* shared, Sums<Tile>& sums,
                              Also also = {}) {
    static_assert(Tile::row_fragments == 1);
    constexpr int ahead = Tile::stages - 2;
    constexpr int bytes_of_a = Tile::rows * Tile::slice;
    const AsyncSlices<GroupShare<Tile, Tile::rows, false>, Tile::rows> slices_a(a, job.row0, job);
    const AsyncSlices<GroupShare<Tile, Tile::cols, true>, Tile::cols> slices_b(b, job.col0, job);
    const auto end = static_cast<int>(job.end - job.begin);
    const auto copy_a = [&](int begin, int stage) {
        if (begin < end) slices_a.copy(begin, shared + stage * Tile::stage_bytes);
        copy_async_commit();  // also where nothing was copied: waiting counts groups
    };
    const auto copy_b = [&](int begin, int stage) {
        if (begin < end) slices_b.copy(begin, shared + stage * Tile::stage_bytes + bytes_of_a);
    };

    // The same for all lanes, as the compiler cannot know.
    const int group = __shfl_sync(whole_warp, static_cast<int>(threadIdx.x) / group_threads, 0);
    const bool works = job.row0 + group * group_rows < a.rows;  // else the group only copies
    const std::uint64_t first_a = wgmma_matrix(shared + group * group_rows * Tile::slice);
    const std::uint64_t first_b = wgmma_matrix(shared + bytes_of_a);
#pragma unroll
    for (int stage = 0; stage < ahead; ++stage) copy_b(stage * Tile::slice, stage);
    also.before_a();
#pragma unroll
    for (int stage = 0; stage < ahead; ++stage) copy_a(stage * Tile::slice, stage);
    also.prepare();
    __syncthreads();
    also.begin();
    int stage = 0;     // of the slice that is being multiplied
    int free = ahead;  // of the slice before the one before it, which all groups have multiplied
    for (int begin = 0; begin < end; begin += Tile::slice) {
        copy_async_wait<ahead - 1>();
        fence_async_proxy();
        __syncthreads();
        if (works) {
            wgmma_fence();
#pragma unroll
            for (int s = 0; s < Tile::slice / step; ++s) {
                const auto place = static_cast<std::uint64_t>(stage * Tile::stage_bytes + s * step) / chunk;
                wgmma_s8<Tile::cols>(sums[0], first_a + place, first_b + place);
            }
            wgmma_commit();
        }
        copy_b(begin + ahead * Tile::slice, free);
        copy_a(begin + ahead * Tile::slice, free);
        also.take(begin, begin + Tile::slice, shared + stage * Tile::stage_bytes + bytes_of_a);
        wgmma_wait<1>();
        stage = stage + 1 == Tile::stages ? 0 : stage + 1;
        free = free + 1 == Tile::stages ? 0 : free + 1;
    }
    wgmma_wait<0>();
}

// Products of panels of outlier columns, of as many slices at a time as there is room for. Fragments are read when they
// are needed: the registers are full of y. A warp has few rows to multiply a fragment of b by, so that its parts are
// made but once for all warps, in shared memory: the high ones in its place, and the low ones behind the rows of b.
template <class Tile>
__device__ void add_panels(const Operand& a, const Operand& b, const Job& job, bool is_exact, std::int8_t* shared,
                           Values<Tile>& y) {
    constexpr int bytes_of_a = Tile::rows * slice;
    constexpr int bytes_of_b = Tile::cols * slice;
    constexpr int slice_bytes = bytes_of_a + 2 * bytes_of_b;
    constexpr int batch = Tile::stages * Tile::stage_bytes / slice_bytes;
    const Place<Tile> place;
    const AsyncSlices<Share<Tile::rows, Tile::threads, false>, Tile::rows> slices_a(a, job.row0, job);
    const AsyncSlices<Share<Tile::cols, Tile::threads, true>, Tile::cols> slices_b(b, job.col0, job);
    const auto end = static_cast<int>(job.end);
#pragma unroll 1
    for (int first = 0; first < end; first += batch * slice) {
        const int count = min((end - first) / slice, batch);
        if (first > 0) __syncthreads();
#pragma unroll 1
        for (int s = 0; s < count; ++s) {
            std::int8_t* const target = shared + s * slice_bytes;
            slices_a.copy(first + s * slice, target);
            slices_b.copy(first + s * slice, target + bytes_of_a);
        }
        copy_async_commit();
        copy_async_wait<0>();
        __syncthreads();
        if (!is_exact) {
            constexpr int per_slice = bytes_of_b / chunk;
#pragma unroll 1
            for (int i = static_cast<int>(threadIdx.x); i < count * per_slice; i += Tile::threads) {
                std::int8_t* const place = shared + i / per_slice * slice_bytes + bytes_of_a + i % per_slice * chunk;
                const Chunk all = load<chunk / 4>(reinterpret_cast<const std::uint32_t*>(place));
                Chunk high;
                Chunk low;
#pragma unroll
                for (int e = 0; e < chunk / 4; ++e) {
                    high[e] = high_part(all[e]);
                    low[e] = low_part(all[e]);
                }
                store(reinterpret_cast<std::uint32_t*>(place), high);
                store(reinterpret_cast<std::uint32_t*>(place + bytes_of_b), low);
            }
            __syncthreads();
        }
#pragma unroll 1
        for (int s = 0; s < count * steps; ++s) {
            const std::int8_t* const from = shared + s / steps * slice_bytes;
            std::uint32_t own[4];
            std::uint32_t finite[4];
            load_matrices(own, matrices_of_a<Tile>(from, s % steps, place));
            finite_part(own, finite);
            const std::int8_t* const rows_of_b = matrices_of_b<Tile>(from, s % steps, place);
#pragma unroll
            for (int u = 0; u < Tile::col_fragments; u += 2) {
                std::uint32_t pair[4];
                load_matrices(pair, rows_of_b + u * 8 * slice);
                multiply_add_tf32(y[0][u], own, {pair[0], pair[1]});
                multiply_add_tf32(y[0][u + 1], own, {pair[2], pair[3]});
                if (is_exact) continue;
                load_matrices(pair, rows_of_b + bytes_of_b + u * 8 * slice);
                multiply_add_tf32(y[0][u], finite, {pair[0], pair[1]});
                multiply_add_tf32(y[0][u + 1], finite, {pair[2], pair[3]});
            }
        }
    }
}

// --- kernels --------------------------------------------------------------------------------------------------------

template <class Tile>
constexpr std::size_t shared_of_groups =
    matrix_alignment + Tile::stages * Tile::stage_bytes + ColumnsInShared<Tile>::bytes;

// Where the first stage is.
__device__ inline std::int8_t* aligned_shared(std::int8_t* shared) {
    constexpr unsigned mask = matrix_alignment - 1;
    return shared + ((mask + 1 - (shared_address(shared) & mask)) & mask);
}

template <class Tile>
__global__ void __launch_bounds__(Tile::threads, Tile::resident)
    wgmma_kernel(Operand a, Operand b, std::int64_t k, Parts parts, Rest rest) {
    if constexpr (has_wgmma) {
        OCTAVO_DYNAMIC_SHARED(std::int8_t, memory);
        std::int8_t* const shared = aligned_shared(memory);
        const Job job = job_of<Tile>(a.rows, b.rows, k, parts);
        a.rows = rows_until(a.rows, job, parts);
        const ColumnsInShared<Tile> columns{reinterpret_cast<float*>(shared + Tile::stages * Tile::stage_bytes)};
        columns.read(rest, job);
        Sums<Tile> sums = {};
        using RowPlace = GroupShare<Tile, Tile::cols, true>;
        sum_by_groups<Tile>(a, b, job, shared, sums, Picker<Tile::cols, Tile::threads, RowPlace>(rest, job));
        __syncthreads();
        if (parts.count > 1 && !add_parts<Tile>(sums, parts, rest, sums)) return;
        const std::int32_t outliers = rest.list.count != nullptr ? *rest.list.count : 0;
        Values<Tile> y;
        const bool of_x = multiplies_codes<Tile>(job, a.rows, rest, outliers);
        start_values<Tile>(sums, job, a.rows, b.rows, rest, columns, outliers, of_x, shared, y);
        finish<Tile>(y, job, a.rows, b.rows, rest, columns, outliers, of_x, shared,
                     [&](const Operand& panel_x, const Operand& panel_w, const Job& part) {
                         add_panels<Tile>(panel_x, panel_w, part, rest.is_exact, shared, y);
                     });
    } else {
        must_not_run();
    }
}

// A depth for which stages are used again, and the last slice is not whole.
template <class Tile>
constexpr int tried_depth = (Tile::stages + 2) * Tile::slice + 48;

// Multiplies codes that it makes, in `codes` [rows + cols, tried_depth], and says in `verdict` whether the sums, which
// it leaves in `sums` [rows, cols], are right.
template <class Tile>
__global__ void __launch_bounds__(Tile::threads, Tile::resident)
    try_kernel(std::int8_t* codes, std::int32_t* sums, Wgmma* verdict) {
    if constexpr (has_wgmma) {
        OCTAVO_DYNAMIC_SHARED(std::int8_t, memory);
        constexpr int depth = tried_depth<Tile>;
        constexpr int rows = Tile::rows + Tile::cols;
        const int thread = static_cast<int>(threadIdx.x);
        for (int i = thread; i < rows * depth; i += Tile::threads) {
            codes[i] = static_cast<std::int8_t>(static_cast<unsigned>(i) * 2654435761U >> 23);
        }
        __syncthreads();
        const std::int8_t* const b = codes + Tile::rows * depth;
        Sums<Tile> own = {};
        sum_by_groups<Tile>({codes, Tile::rows, depth, 1}, {b, Tile::cols, depth, 1}, {0, 0, 0, depth},
                            aligned_shared(memory), own);
        const Corner<Tile> corner({0, 0, 0, depth});
#pragma unroll
        for (int f = 0; f < Tile::col_fragments; ++f) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const std::int64_t col = corner.col + f / 2 * bundle + f % 2 * 2 + e % 2;
                sums[(corner.row + e / 2 * 8) * Tile::cols + col] = own[0][f][e];
            }
        }
        __syncthreads();
        bool right = true;
        for (int i = thread; i < Tile::rows * Tile::cols; i += Tile::threads) {
            const auto* const row = reinterpret_cast<const int*>(codes + i / Tile::cols * depth);
            const auto* const col = reinterpret_cast<const int*>(b + i % Tile::cols * depth);
            int sum = 0;
            for (int h = 0; h < depth / 4; ++h) sum = __dp4a(row[h], col[h], sum);
            right = right && sum == sums[i];
        }
        right = __syncthreads_and(right ? 1 : 0) != 0;
        if (thread == 0) *verdict = right ? Wgmma::right : Wgmma::wrong;
    } else {
        if (threadIdx.x == 0) *verdict = Wgmma::none;
    }
}

// --- launch ---------------------------------------------------------------------------------------------------------

// A stream of its own, so that nothing waits that is not this.
class OwnStream {
public:
    OwnStream() { check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreateWithFlags"); }
    ~OwnStream() { cudaStreamDestroy(stream_); }
    OwnStream(const OwnStream&) = delete;
    OwnStream& operator=(const OwnStream&) = delete;
    [[nodiscard]] cudaStream_t get() const { return stream_; }

private:
    cudaStream_t stream_ = nullptr;
};

template <class Tile>
Wgmma try_tile(cudaStream_t stream) {
    constexpr std::size_t code_bytes = static_cast<std::size_t>(Tile::rows + Tile::cols) * tried_depth<Tile>;
    constexpr std::size_t sum_bytes = sizeof(std::int32_t) * Tile::rows * Tile::cols;
    static_assert(code_bytes % 16 == 0);
    void* memory = nullptr;
    check(cudaMallocAsync(&memory, code_bytes + sum_bytes + sizeof(Wgmma), stream), "cudaMallocAsync");
    auto* const codes = static_cast<std::int8_t*>(memory);
    auto* const verdict = reinterpret_cast<Wgmma*>(codes + code_bytes + sum_bytes);
    allow_shared(try_kernel<Tile>, shared_of_groups<Tile>);
    launch(try_kernel<Tile>, {1, Tile::threads, shared_of_groups<Tile>}, stream, codes,
           reinterpret_cast<std::int32_t*>(codes + code_bytes), verdict);
    Wgmma found = Wgmma::wrong;
    check(cudaMemcpyAsync(&found, verdict, sizeof found, cudaMemcpyDeviceToHost, stream), "cudaMemcpyAsync");
    check(cudaFreeAsync(memory, stream), "cudaFreeAsync");
    check(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
    return found;
}

}  // namespace

Wgmma try_wgmma() {
    const OwnStream stream;
    Wgmma found = Wgmma::right;
    for (const auto& each : {try_tile<Wide>, try_tile<High>, try_tile<Square>}) {
        if (found == Wgmma::right) found = each(stream.get());
    }
    return found;
}

template <class Tile>
void start_wgmma(const ConstMatrix& a, const ConstMatrix& b, const Division& division, const Rest& rest,
                 cudaStream_t stream) {
    static OncePerDevice set_up;
    set_up([] { allow_shared(wgmma_kernel<Tile>, shared_of_groups<Tile>); });
    const Parts own = parts_of(b.cols, division.parts, division.height);
    const auto blocks = static_cast<unsigned>(tiles_of<Tile>(a.rows, b.rows, own.height) * own.count);
    launch(wgmma_kernel<Tile>, {blocks, Tile::threads, shared_of_groups<Tile>, begins_early()}, stream, operand_of(a),
           operand_of(b), b.cols, own, rest);
}
template void start_wgmma<Wide>(const ConstMatrix&, const ConstMatrix&, const Division&, const Rest&, cudaStream_t);
template void start_wgmma<High>(const ConstMatrix&, const ConstMatrix&, const Division&, const Rest&, cudaStream_t);
template void start_wgmma<Square>(const ConstMatrix&, const ConstMatrix&, const Division&, const Rest&, cudaStream_t);

}  // namespace octavo::cuda
