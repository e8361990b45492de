// The emulated GPU itself: what its instructions compute, on cases worked out by hand, and what its runtime answers.
#include <algorithm>
#include <set>
#include <string>
#include <thread>

#include "check.hpp"
#include "defects/defects.hpp"
#include "runtime.hpp"

using defects::Buffer;
using octavo::cuda::Grid;
using octavo::cuda::launch;

namespace {

// --- shuffles -------------------------------------------------------------------------------------------------------

// out[case * 32 + lane]; the value of a lane is its number.
__global__ void shuffles(int* out) {
    const int lane = static_cast<int>(threadIdx.x);
    out[0 * 32 + lane] = __shfl_sync(0xFFFFFFFFU, lane, 5);
    out[1 * 32 + lane] = __shfl_sync(0xFFFFFFFFU, lane, 5, 8);
    out[2 * 32 + lane] = __shfl_xor_sync(0xFFFFFFFFU, lane, 3);
    out[3 * 32 + lane] = __shfl_xor_sync(0xFFFFFFFFU, lane, 4, 4);
    out[4 * 32 + lane] = __shfl_down_sync(0xFFFFFFFFU, lane, 2, 8);
    out[5 * 32 + lane] = __shfl_up_sync(0xFFFFFFFFU, lane, 2, 8);
    out[6 * 32 + lane] = __shfl_sync(0xFFFFFFFFU, lane, 37);
}

TEST(shuffles_of_whole_warps_and_parts) {
    Buffer<int> out(7 * 32);
    launch(shuffles, {1, 32}, nullptr, out.data());
    const auto row = [&](std::size_t number) { return out.data() + number * 32; };
    CHECK_EQ(row(0)[0], 5);
    CHECK_EQ(row(0)[31], 5);
    // Groups of 8: lane 5 of each.
    CHECK_EQ(row(1)[0], 5);
    CHECK_EQ(row(1)[9], 13);
    CHECK_EQ(row(1)[31], 29);
    CHECK_EQ(row(2)[0], 3);
    CHECK_EQ(row(2)[30], 29);
    // Groups of 4, exchanged: a lane may read from a group before its own, not from one behind.
    CHECK_EQ(row(3)[1], 1);
    CHECK_EQ(row(3)[5], 1);
    // Past the end of its group a lane keeps its value.
    CHECK_EQ(row(4)[5], 7);
    CHECK_EQ(row(4)[6], 6);
    CHECK_EQ(row(4)[15], 15);
    CHECK_EQ(row(5)[9], 9);
    CHECK_EQ(row(5)[10], 8);
    // A source beyond the warp counts from its beginning.
    CHECK_EQ(row(6)[0], 5);
}

template <class T>
__global__ void shuffle_one(const T* in, T* out) {
    out[threadIdx.x] = __shfl_down_sync(0xFFFFFFFFU, in[threadIdx.x], 1);
}

template <class T>
void check_shuffle(T first, T second) {
    Buffer<T> in(32, second);
    in[0] = first;
    Buffer<T> out(32);
    launch(shuffle_one<T>, {1, 32}, nullptr, static_cast<const T*>(in.data()), out.data());
    CHECK(std::memcmp(&out[0], &second, sizeof(T)) == 0);
}

TEST(shuffles_of_every_size) {
    check_shuffle<signed char>(-1, 7);
    check_shuffle(__float2half_rn(1.5F), __float2half_rn(-2.25F));
    check_shuffle(__float2bfloat16_rn(1.5F), __float2bfloat16_rn(-2.25F));
    check_shuffle(1.5F, -2.25F);
    check_shuffle(1.5, -2.25);
    check_shuffle<long long>(1, 1LL << 40);
    check_shuffle(make_float4(1, 2, 3, 4), make_float4(5, 6, 7, 8));
}

// Two halves of a warp, apart from each other.
__global__ void halves(int* out) {
    const unsigned mask = threadIdx.x < 16 ? 0x0000FFFFU : 0xFFFF0000U;
    int value = 1;
    if (threadIdx.x < 16) {
        for (int distance = 8; distance > 0; distance /= 2) value += __shfl_xor_sync(mask, value, distance, 16);
    } else {
        value = static_cast<int>(__popc(__ballot_sync(mask, static_cast<int>(threadIdx.x % 3 == 0))));
    }
    out[threadIdx.x] = value;
}

TEST(masks_of_half_a_warp) {
    Buffer<int> out(32);
    launch(halves, {1, 32}, nullptr, out.data());
    CHECK_EQ(out[0], 16);
    CHECK_EQ(out[31], 5);  // 18, 21, 24, 27, 30
}

// --- barriers of the grid -------------------------------------------------------------------------------------------

// Each block passes a number on, twice; what it has in shared memory and registers stays its own.
__global__ void pass_on(int* numbers, int* out) {
    __shared__ int own[64];
    OCTAVO_DYNAMIC_SHARED(int, dynamic);
    const auto block = static_cast<int>(blockIdx.x);
    const auto blocks = static_cast<int>(gridDim.x);
    const auto thread = static_cast<int>(threadIdx.x);
    own[thread] = 1000 * block + thread;
    dynamic[thread] = own[thread] + 1;
    int last = block;
    for (int turn = 0; turn < 2; ++turn) {
        if (thread == 0) numbers[turn * blocks + block] = last;
        octavo::cuda::synchronize_grid();
        last = numbers[turn * blocks + (block + 1) % blocks];
    }
    __syncthreads();
    const int other = (thread + 32) % 64;
    out[64 * block + thread] = last + own[other] + dynamic[other];
}

TEST(barriers_of_the_grid) {
    constexpr int blocks = 5;
    Buffer<int> numbers(2 * blocks);
    Buffer<int> out(64 * blocks);
    for (int again = 0; again < 2; ++again) {
        launch(pass_on, {blocks, 64, 64 * sizeof(int), false, true}, nullptr, numbers.data(), out.data());
        for (int block = 0; block < blocks; ++block) {
            for (int thread = 0; thread < 64; ++thread) {
                const int expected = (block + 2) % blocks + 2 * (1000 * block + (thread + 32) % 64) + 1;
                CHECK_EQ(out[static_cast<std::size_t>(64 * block + thread)], expected);
            }
        }
    }
    // More blocks than are resident together can never meet.
    const cudaError_t refused =
        simt::launch(pass_on, 1 << 20, 64, 64 * sizeof(int), false, true, nullptr, numbers.data(), out.data());
    CHECK_EQ(static_cast<int>(refused), static_cast<int>(cudaErrorCooperativeLaunchTooLarge));
    cudaGetLastError();
}

// --- votes and reductions -------------------------------------------------------------------------------------------

__global__ void votes(unsigned* out) {
    const int lane = static_cast<int>(threadIdx.x);
    const unsigned ballot = __ballot_sync(0xFFFFFFFFU, lane % 4 == 1);
    const int any = __any_sync(0xFFFFFFFFU, lane == 40);
    const int all = __all_sync(0xFFFFFFFFU, lane < 32);
    const int sum = __reduce_add_sync(0xFFFFFFFFU, lane - 16);
    const int least = __reduce_min_sync(0xFFFFFFFFU, 3 - lane);
    const unsigned most = __reduce_max_sync(0xFFFFFFFFU, threadIdx.x);
    const unsigned bits = __reduce_or_sync(0xFFFFFFFFU, 1U << lane / 2);
    const unsigned same = __match_any_sync(0xFFFFFFFFU, lane / 30);
    if (lane != 0) return;
    out[0] = ballot;
    out[1] = static_cast<unsigned>(any);
    out[2] = static_cast<unsigned>(all);
    out[3] = static_cast<unsigned>(sum);
    out[4] = static_cast<unsigned>(least);
    out[5] = most;
    out[6] = bits;
    out[7] = same;
}

TEST(votes_and_reductions) {
    Buffer<unsigned> out(8);
    launch(votes, {1, 32}, nullptr, out.data());
    CHECK_EQ(out[0], 0x22222222U);
    CHECK_EQ(out[1], 0U);
    CHECK_EQ(out[2], 1U);
    CHECK_EQ(static_cast<int>(out[3]), -16);
    CHECK_EQ(static_cast<int>(out[4]), -28);
    CHECK_EQ(out[5], 31U);
    CHECK_EQ(out[6], 0xFFFFU);
    CHECK_EQ(out[7], 0x3FFFFFFFU);
}

// Some threads are gone: those who are left are all.
__global__ void barriers(int* out) {
    if (threadIdx.x >= 70) return;
    const int odd = __syncthreads_count(static_cast<int>(threadIdx.x % 2));
    const int any = __syncthreads_or(static_cast<int>(threadIdx.x == 69));
    const int all = __syncthreads_and(static_cast<int>(threadIdx.x < 69));
    if (threadIdx.x > 0) return;
    out[0] = odd;
    out[1] = any;
    out[2] = all;
}

TEST(barriers_that_count) {
    Buffer<int> out(3);
    launch(barriers, {1, 100}, nullptr, out.data());
    CHECK_EQ(out[0], 35);
    CHECK_EQ(out[1], 1);
    CHECK_EQ(out[2], 0);
}

// --- threads and blocks ---------------------------------------------------------------------------------------------

struct Place {
    uint3 block;
    uint3 thread;
};

__global__ void where_am_i(Place* out) {
    const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    out[block * (blockDim.x * blockDim.y * blockDim.z) + thread] = {blockIdx, threadIdx};
}

TEST(every_thread_of_every_block_runs_once) {
    Buffer<Place> out(24 * 30);
    launch(where_am_i, {dim3(2, 3, 4), dim3(5, 3, 2)}, nullptr, out.data());
    std::set<std::string> places;
    for (std::size_t i = 0; i < 24 * 30; ++i) {
        const Place& at = out[i];
        std::string name;
        for (const unsigned number : {at.block.x, at.block.y, at.block.z, at.thread.x, at.thread.y, at.thread.z}) {
            name += std::to_string(number) + ' ';
        }
        places.insert(name);
    }
    CHECK_EQ(places.size(), 24U * 30U);
    CHECK_EQ(out[24 * 30 - 1].block.z, 3U);
    CHECK_EQ(out[24 * 30 - 1].thread.y, 2U);
}

// Shared memory, static and dynamic, begins anew for every block.
__global__ void first_contents(int* out) {
    __shared__ int fixed[32];
    OCTAVO_DYNAMIC_SHARED(int, dynamic);
    out[blockIdx.x * 64 + threadIdx.x] = fixed[threadIdx.x];
    out[blockIdx.x * 64 + 32 + threadIdx.x] = dynamic[threadIdx.x];
    fixed[threadIdx.x] = dynamic[threadIdx.x] = 1;
}

TEST(shared_memory_begins_as_all_ones) {
    Buffer<int> out(4 * 64);
    launch(first_contents, {4, 32, 32 * sizeof(int)}, nullptr, out.data());
    CHECK(out.holds(-1));
}

// --- atomics and arithmetic -----------------------------------------------------------------------------------------

__global__ void atomics(int* numbers, unsigned* ring, float* sum, unsigned long long* big) {
    const int i = static_cast<int>(threadIdx.x);
    atomicAdd(&numbers[0], i);
    atomicMax(&numbers[1], i - 100);
    atomicMin(&numbers[2], -i);
    atomicOr(&numbers[3], 1 << i % 8);
    atomicCAS(&numbers[4], 0, i + 1000);
    atomicInc(ring, 9);
    atomicAdd(sum, 0.5F);
    atomicMax(big, 1ULL << i % 40);
}

TEST(atomic_operations) {
    Buffer<int> numbers(5, 0);
    numbers[1] = -1000;
    Buffer<unsigned> ring(1, 0);
    Buffer<float> sum(1, 0.0F);
    Buffer<unsigned long long> big(1, 0);
    launch(atomics, {1, 64}, nullptr, numbers.data(), ring.data(), sum.data(), big.data());
    CHECK_EQ(numbers[0], 2016);
    CHECK_EQ(numbers[1], -37);
    CHECK_EQ(numbers[2], -63);
    CHECK_EQ(numbers[3], 0xFF);
    CHECK(numbers[4] >= 1000 && numbers[4] < 1064);
    CHECK_EQ(ring[0], 4U);  // 64 steps on a ring of 10
    CHECK_EQ(sum[0], 32.0F);
    CHECK_EQ(big[0], 1ULL << 39);
}

TEST(dp4a_takes_signed_bytes) {
    CHECK_EQ(__dp4a(0x01020304, 0x01010101, 5), 15);
    // (-1)(2) + (-128)(-128) + 0 + (127)(-1)
    CHECK_EQ(__dp4a(static_cast<int>(0xFF80007FU), static_cast<int>(0x028000FFU), 0), -2 + 16384 - 127);
    CHECK_EQ(__dp4a(static_cast<int>(0x80808080U), static_cast<int>(0x80808080U), INT32_MAX), INT32_MIN + 65535);
    CHECK_EQ(__dp4a(0xFFU, 0xFFU, 1U), 65026U);
}

TEST(conversions_and_bits) {
    CHECK_EQ(__float2int_rn(2.5F), 2);
    CHECK_EQ(__float2int_rn(-3.5F), -4);
    CHECK_EQ(__float2int_rn(1e30F), INT32_MAX);
    CHECK_EQ(__float2int_rn(-1e30F), INT32_MIN);
    CHECK_EQ(__float2int_rn(std::nanf("")), 0);
    CHECK_EQ(__float2int_rz(-3.9F), -3);
    CHECK_EQ(__vmaxu2(0x00018000U, 0xFFFF7FFFU), 0xFFFF8000U);
    CHECK_EQ(__vmaxu2(0x80000002U, 0x7FFF0003U), 0x80000003U);
    CHECK_EQ(__clz(0), 32);
    CHECK_EQ(__clz(1), 31);
    CHECK_EQ(__ffs(0), 0);
    CHECK_EQ(__ffs(8), 4);
    CHECK_EQ(__brev(1U), 0x80000000U);
    CHECK_EQ(__byte_perm(0x33221100U, 0x77665544U, 0x5410U), 0x55441100U);
    CHECK_EQ(__byte_perm(0x00000080U, 0, 0x0008U), 0x808080FFU);
    CHECK_EQ(__funnelshift_l(0x80000000U, 1U, 1U), 3U);
    CHECK_EQ(__funnelshift_r(0x80000000U, 1U, 31U), 3U);
    CHECK_EQ(max(1, 2.5F), 2.5F);
    CHECK_EQ(max(std::nanf(""), 1.0F), 1.0F);
    CHECK_EQ(min(-1, 3LL), -1LL);
}

// --- asynchronous copies --------------------------------------------------------------------------------------------

// Two groups of copies; of the second, 4 of 16 bytes are copied, and the others zeroed.
__global__ void copy_in_groups(const int4* in, int4* out) {
    __shared__ int4 tile[2];
    if (threadIdx.x > 0) return;
    simt::defer_copy(&tile[0], &in[0], 16);
    simt::copy_commit();
    simt::defer_copy(&tile[1], &in[1], 4);
    simt::copy_commit();
    simt::copy_wait(1);
    out[0] = tile[0];
    simt::copy_wait(0);
    out[1] = tile[1];
}

TEST(deferred_copies) {
    Buffer<int4> in(2, {1, 2, 3, 4});
    Buffer<int4> out(2);
    launch(copy_in_groups, {1, 32}, nullptr, static_cast<const int4*>(in.data()), out.data());
    CHECK_EQ(out[0].w, 4);
    CHECK_EQ(out[1].x, 1);
    CHECK_EQ(out[1].y, 0);
    CHECK_EQ(out[1].w, 0);
}

// --- the runtime ----------------------------------------------------------------------------------------------------

__global__ void add_one(int* out) { atomicAdd(out, 1); }
__global__ void use_shared(int* out) {
    OCTAVO_DYNAMIC_SHARED(int, values);
    values[0] = 1;
    *out = values[0];
}

// 32 KiB of shared memory of its own, before any that a launch gives it.
__global__ void use_both(int* out) {
    __shared__ int fixed[8192];
    OCTAVO_DYNAMIC_SHARED(int, values);
    fixed[gridDim.x] = 1;
    values[0] = 1;
    *out = values[0] + fixed[blockDim.x];
}

cudaError_t try_launch(dim3 grid, dim3 block, std::size_t shared, int* out) {
    return simt::launch(use_shared, grid, block, shared, false, false, nullptr, out);
}

TEST(refuses_what_hardware_refuses) {
    Buffer<int> out(1);
    CHECK_EQ(try_launch(1, 1025, 0, out.data()), cudaErrorInvalidConfiguration);
    CHECK_EQ(try_launch(1, 0, 0, out.data()), cudaErrorInvalidConfiguration);
    CHECK_EQ(try_launch(0, 1, 0, out.data()), cudaErrorInvalidConfiguration);
    CHECK_EQ(try_launch(dim3(1, 65536), 1, 0, out.data()), cudaErrorInvalidConfiguration);
    CHECK_EQ(try_launch(1, dim3(1, 1, 65), 0, out.data()), cudaErrorInvalidConfiguration);
    // More than 48 KiB of shared memory must be asked for.
    constexpr std::size_t large = 100 << 10;
    CHECK_EQ(try_launch(1, 1, large, out.data()), cudaErrorInvalidValue);
    CHECK_EQ(cudaGetLastError(), cudaErrorInvalidValue);
    CHECK_EQ(cudaGetLastError(), cudaSuccess);
    octavo::cuda::allow_shared(use_shared, large);
    CHECK_EQ(try_launch(1, 1, large, out.data()), cudaSuccess);
    CHECK_EQ(out[0], 1);
    CHECK_THROWS(octavo::cuda::allow_shared(use_shared, 1 << 20), device, "cudaFuncSetAttribute");
}

TEST(static_and_dynamic_shared_memory_are_one) {
    Buffer<int> out(1);
    const auto with = [&](std::size_t dynamic) {
        const cudaError_t status = simt::launch(use_both, 1, 1, dynamic, false, false, nullptr, out.data());
        cudaGetLastError();
        return status;
    };
    CHECK_EQ(with(4 << 10), cudaSuccess);
    CHECK_EQ(out[0], 2);
    CHECK_EQ(with(20 << 10), cudaErrorInvalidValue);
    octavo::cuda::allow_shared(use_both, 20 << 10);
    CHECK_EQ(with(20 << 10), cudaSuccess);
    constexpr std::size_t most = 227 << 10;  // of sm_90
    octavo::cuda::allow_shared(use_shared, most);
    CHECK_THROWS(octavo::cuda::allow_shared(use_both, most), device, "cudaFuncSetAttribute");
}

simt::Counters counted() {
    simt::Counters counters;
    octavo_simt_counters(&counters);
    return counters;
}

TEST(pools_keep_memory) {
    cudaMemPoolProps properties{};
    cudaMemPool_t pool = nullptr;
    CHECK_EQ(cudaMemPoolCreate(&pool, &properties), cudaSuccess);
    octavo_simt_reset_counters();
    for (int i = 0; i < 3; ++i) {
        unsigned char* memory = nullptr;
        CHECK_EQ(cudaMallocFromPoolAsync(reinterpret_cast<void**>(&memory), 1000, pool, nullptr), cudaSuccess);
        CHECK_EQ(reinterpret_cast<std::uintptr_t>(memory) % 256, 0U);
        CHECK_EQ(memory[999], 0xFF);
        CHECK_EQ(cudaFreeAsync(memory, nullptr), cudaSuccess);
    }
    CHECK_EQ(counted().pool_allocations, 3);
    CHECK_EQ(counted().allocations, 1);
    CHECK_EQ(counted().synchronizations, 0);
    CHECK_EQ(cudaDeviceSynchronize(), cudaSuccess);
    CHECK_EQ(counted().synchronizations, 1);
    CHECK_EQ(cudaMemPoolDestroy(pool), cudaSuccess);
}

TEST(graphs_run_when_they_are_launched) {
    cudaStream_t stream = nullptr;
    CHECK_EQ(cudaStreamCreate(&stream), cudaSuccess);
    Buffer<int> out(1, 0);
    octavo_simt_reset_counters();
    CHECK_EQ(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), cudaSuccess);
    int* scratch = nullptr;
    CHECK_EQ(cudaMallocAsync(reinterpret_cast<void**>(&scratch), 4, stream), cudaSuccess);
    CHECK_EQ(cudaMemsetAsync(scratch, 0, 4, stream), cudaSuccess);
    launch(add_one, {1, 32}, stream, scratch);
    CHECK_EQ(cudaMemcpyAsync(out.data(), scratch, 4, cudaMemcpyDeviceToDevice, stream), cudaSuccess);
    CHECK_EQ(cudaFreeAsync(scratch, stream), cudaSuccess);
    cudaGraph_t graph = nullptr;
    CHECK_EQ(cudaStreamEndCapture(stream, &graph), cudaSuccess);
    CHECK_EQ(counted().launches, 0);
    CHECK_EQ(out[0], 0);
    cudaGraphExec_t executable = nullptr;
    CHECK_EQ(cudaGraphInstantiate(&executable, graph, 0), cudaSuccess);
    for (int i = 1; i <= 2; ++i) {
        out[0] = 0;
        CHECK_EQ(cudaGraphLaunch(executable, stream), cudaSuccess);
        CHECK_EQ(out[0], 32);
        CHECK_EQ(counted().launches, i);
    }
    CHECK_EQ(cudaGraphExecDestroy(executable), cudaSuccess);
    CHECK_EQ(cudaGraphDestroy(graph), cudaSuccess);
    CHECK_EQ(cudaStreamDestroy(stream), cudaSuccess);
}

TEST(waiting_breaks_a_capture) {
    cudaStream_t stream = nullptr;
    CHECK_EQ(cudaStreamCreate(&stream), cudaSuccess);
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    const auto begin = [&] {
        CHECK_EQ(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), cudaSuccess);
        CHECK_EQ(cudaStreamIsCapturing(stream, &status), cudaSuccess);
        CHECK_EQ(status, cudaStreamCaptureStatusActive);
    };
    const auto end = [&] {
        cudaGraph_t graph = nullptr;
        CHECK_EQ(cudaStreamEndCapture(stream, &graph), cudaErrorStreamCaptureInvalidated);
        CHECK(graph == nullptr);
    };
    begin();
    CHECK_EQ(cudaStreamSynchronize(stream), cudaErrorStreamCaptureUnsupported);
    end();
    begin();
    CHECK_EQ(cudaDeviceSynchronize(), cudaErrorStreamCaptureUnsupported);
    CHECK_EQ(cudaMemsetAsync(nullptr, 0, 0, stream), cudaErrorStreamCaptureInvalidated);
    end();
    begin();
    void* memory = nullptr;
    CHECK_EQ(cudaMalloc(&memory, 16), cudaErrorStreamCaptureUnsupported);
    end();
    begin();
    const cudaMemPoolProps properties{};
    cudaMemPool_t pool = nullptr;
    CHECK_EQ(cudaMemPoolCreate(&pool, &properties), cudaErrorStreamCaptureUnsupported);
    end();
    // What a thread may do that says so; what waits for the captured stream stays forbidden.
    begin();
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    CHECK_EQ(cudaThreadExchangeStreamCaptureMode(&mode), cudaSuccess);
    CHECK_EQ(mode, cudaStreamCaptureModeGlobal);
    CHECK_EQ(cudaMalloc(&memory, 16), cudaSuccess);
    CHECK_EQ(cudaMemPoolCreate(&pool, &properties), cudaSuccess);
    cudaGraph_t graph = nullptr;
    CHECK_EQ(cudaStreamEndCapture(stream, &graph), cudaSuccess);
    CHECK_EQ(cudaGraphDestroy(graph), cudaSuccess);
    begin();
    CHECK_EQ(cudaStreamSynchronize(stream), cudaErrorStreamCaptureUnsupported);
    end();
    CHECK_EQ(cudaThreadExchangeStreamCaptureMode(&mode), cudaSuccess);
    CHECK_EQ(cudaFree(memory), cudaSuccess);
    CHECK_EQ(cudaMemPoolDestroy(pool), cudaSuccess);
    CHECK_EQ(cudaStreamIsCapturing(stream, &status), cudaSuccess);
    CHECK_EQ(status, cudaStreamCaptureStatusNone);
    CHECK_EQ(cudaStreamBeginCapture(nullptr, cudaStreamCaptureModeGlobal), cudaErrorStreamCaptureUnsupported);
    CHECK_EQ(cudaStreamDestroy(stream), cudaSuccess);
    CHECK_EQ(cudaStreamSynchronize(stream), cudaErrorInvalidResourceHandle);
    cudaGetLastError();
}

TEST(host_threads_may_launch_together) {
    constexpr int launches = 20;
    Buffer<int> out(4, 0);
    std::vector<std::thread> threads;
    for (int i = 0; i < 4; ++i) {
        threads.emplace_back([at = out.data() + i] {
            for (int j = 0; j < launches; ++j) launch(add_one, {2, 64}, nullptr, at);
        });
    }
    for (std::thread& thread : threads) thread.join();
    CHECK(out.holds(launches * 128));
}

TEST(devices) {
    int count = 0;
    CHECK_EQ(cudaGetDeviceCount(&count), cudaSuccess);
    CHECK_EQ(count, 1);
    CHECK_EQ(cudaSetDevice(1), cudaErrorInvalidDevice);
    int major = 0;
    CHECK_EQ(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0), cudaSuccess);
    CHECK_EQ(major, 9);
    cudaGetLastError();
}

}  // namespace

namespace defects {
// Of the defect suite's header, which has more than its buffers.
std::vector<Defect>& all() {
    static std::vector<Defect> none;
    return none;
}
}  // namespace defects
