// Where matrix instructions hold the elements of their operands, as CuTe's traits have it (NVIDIA's CUTLASS): a witness
// that has nothing of ours. Kernels and emulator share one description of these places (ptx.cuh, ptx.hpp), so that a
// mistake in it would go unnoticed. Registers are filled, and results read, by CuTe's places; between them is ours.
//
// ldmatrix serves all of them: it is compared with CuTe's places too. What wgmma multiplies is put into shared memory
// by CuTe's layout, and said to be there by CuTe's descriptor.
#include <array>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "check.hpp"
#include "defects/defects.hpp"
#include "ptx.hpp"

// CuTe's own warnings are its business.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wall"
#pragma GCC diagnostic ignored "-Wextra"
#include <cute/atom/copy_traits_sm75.hpp>
#include <cute/atom/mma_traits_sm80.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>
#pragma GCC diagnostic pop

using defects::Buffer;
using octavo::cuda::Grid;
using octavo::cuda::launch;

namespace {

constexpr int lanes = 32;

// An instruction of ptx.cuh: what it multiplies, and the kernel that calls it with the registers of a warp.
template <class T, class Sum, void (*multiply)(Sum (&)[4], const std::uint32_t (&)[4], const std::uint32_t (&)[2])>
struct Instruction {
    using Element = T;
    using Total = Sum;

    static void kernel(const std::uint32_t* a, const std::uint32_t* b, Sum* sums) {
        const int lane = static_cast<int>(threadIdx.x);
        std::uint32_t own_a[4];
        std::uint32_t own_b[2];
        Sum own[4] = {};
        for (int r = 0; r < 4; ++r) own_a[r] = a[lane * 4 + r];
        for (int r = 0; r < 2; ++r) own_b[r] = b[lane * 2 + r];
        multiply(own, own_a, own_b);
        for (int r = 0; r < 4; ++r) sums[lane * 4 + r] = own[r];
    }
};

// Small integers, which every type has and every sum of products has exactly.
template <class T>
T number(int value) {
    return static_cast<T>(static_cast<float>(value));
}

// Fills the registers of a and b for the atom's shape by the atom's layouts, multiplies, and reads the sums by its
// layout. Layouts map (lane, place among its elements) to column-major places in the matrix.
template <class Atom, class Instruction>
void compare() {
    using Traits = cute::MMA_Traits<Atom>;
    using T = typename Instruction::Element;
    using Sum = typename Instruction::Total;
    constexpr int m = cute::size<0>(typename Traits::Shape_MNK{});
    constexpr int n = cute::size<1>(typename Traits::Shape_MNK{});
    constexpr int k = cute::size<2>(typename Traits::Shape_MNK{});
    static_assert(m == 16 && n == 8 && k * sizeof(T) == 32);
    std::vector<int> a(m * k);
    std::vector<int> b(n * k);
    for (int i = 0; i < m * k; ++i) a[static_cast<std::size_t>(i)] = i * 7 % 23 - 11;
    for (int i = 0; i < n * k; ++i) b[static_cast<std::size_t>(i)] = i * 5 % 19 - 9;

    Buffer<std::uint32_t> registers_a(lanes * 4);
    Buffer<std::uint32_t> registers_b(lanes * 2);
    Buffer<Sum> sums(lanes * 4);
    const auto fill = [](auto layout, const std::vector<int>& matrix, std::uint32_t* registers, int bytes) {
        const int elements = bytes / static_cast<int>(sizeof(T));
        for (int lane = 0; lane < lanes; ++lane) {
            for (int e = 0; e < elements; ++e) {
                const T value = number<T>(matrix[static_cast<std::size_t>(layout(lane, e))]);
                std::memcpy(reinterpret_cast<char*>(registers) + lane * bytes + e * static_cast<int>(sizeof(T)), &value,
                            sizeof value);
            }
        }
    };
    fill(typename Traits::ALayout{}, a, registers_a.data(), 16);
    fill(typename Traits::BLayout{}, b, registers_b.data(), 8);
    launch(Instruction::kernel, Grid{1, lanes}, nullptr, static_cast<const std::uint32_t*>(registers_a.data()),
           static_cast<const std::uint32_t*>(registers_b.data()), sums.data());
    for (int lane = 0; lane < lanes; ++lane) {
        for (int r = 0; r < 4; ++r) {
            const int place = static_cast<int>(typename Traits::CLayout{}(lane, r));
            const int row = place % m;
            const int col = place / m;
            int expected = 0;
            for (int h = 0; h < k; ++h) {
                expected += a[static_cast<std::size_t>(row + h * m)] * b[static_cast<std::size_t>(col + h * n)];
            }
            const check::Context context("lane ", lane, ", register ", r);
            CHECK_EQ(static_cast<int>(sums.data()[lane * 4 + r]), expected);
        }
    }
}

void read_matrices(const std::uint8_t* rows, std::uint32_t* registers) {
    __shared__ __align__(16) std::uint8_t shared[lanes * 16];
    const int lane = static_cast<int>(threadIdx.x);
    for (int i = 0; i < 16; ++i) shared[lane * 16 + i] = rows[lane * 16 + i];
    __syncthreads();
    std::uint32_t own[4];
    octavo::cuda::load_matrices(own, shared + lane * 16);
    for (int r = 0; r < 4; ++r) registers[lane * 4 + r] = own[r];
}

// Multiplies 64 rows of 128 bytes by `cols` of them, which lie in `matrices` one behind the other as they shall lie in
// shared memory. The descriptors are of an address of 0.
template <int cols>
void multiply_group(const std::uint8_t* matrices, std::uint64_t a, std::uint64_t b, std::int32_t* sums) {
    OCTAVO_DYNAMIC_SHARED(std::uint8_t, memory);
    const unsigned skip = (1024 - octavo::cuda::shared_address(memory) % 1024) % 1024;
    std::uint8_t* const shared = memory + skip;
    const int thread = static_cast<int>(threadIdx.x);
    for (int i = thread; i < (64 + cols) * 128; i += 128) shared[i] = matrices[i];
    octavo::cuda::fence_async_proxy();
    __syncthreads();
    const std::uint64_t begin = octavo::cuda::shared_address(shared) / 16;
    std::int32_t own[cols / 8][4] = {};
    octavo::cuda::wgmma_fence();
    for (std::uint64_t s = 0; s < 4; ++s) {
        octavo::cuda::wgmma_s8<cols>(own, a + begin + 2 * s, b + begin + 64 * 128 / 16 + 2 * s);
    }
    octavo::cuda::wgmma_commit();
    octavo::cuda::wgmma_wait<0>();
    for (int u = 0; u < cols / 8; ++u) {
        for (int r = 0; r < 4; ++r) sums[(thread * cols / 8 + u) * 4 + r] = own[u][r];
    }
}

// A matrix of bytes as CuTe puts it into shared memory, behind what is there; and its descriptor, for an address of 0.
template <int rows>
std::uint64_t put_matrix(const std::vector<int>& matrix, std::vector<std::uint8_t>& memory) {
    namespace gmma = cute::SM90::GMMA;
    const auto layout =
        cute::tile_to_shape(gmma::Layout_K_SW128_Atom<std::int8_t>{}, cute::Shape<cute::Int<rows>, cute::Int<128>>{});
    const std::size_t begin = memory.size();
    memory.resize(begin + rows * 128);
    for (int row = 0; row < rows; ++row) {
        for (int k = 0; k < 128; ++k) {
            memory[begin + static_cast<std::size_t>(layout(row, k))] =
                static_cast<std::uint8_t>(matrix[static_cast<std::size_t>(row * 128 + k)]);
        }
    }
    cute::GmmaDescriptor descriptor;
    descriptor.desc_ = 0;
    descriptor.bitfield.leading_byte_offset_ = 1;
    descriptor.bitfield.stride_byte_offset_ = static_cast<std::uint16_t>((layout(8, 0) - layout(0, 0)) / 16);
    descriptor.bitfield.layout_type_ = static_cast<std::uint8_t>(gmma::LayoutType::B128);
    return descriptor.desc_;
}

template <class Atom, int cols>
void compare_group() {
    using Traits = cute::MMA_Traits<Atom>;
    static_assert(cute::size<0>(typename Traits::Shape_MNK{}) == 64 &&
                  cute::size<1>(typename Traits::Shape_MNK{}) == cols);
    std::vector<int> a(64 * 128);
    std::vector<int> b(cols * 128);
    for (std::size_t i = 0; i < a.size(); ++i)
        a[i] = static_cast<int>(i * 7 % 251) - 128 + static_cast<int>(i / 128 % 5);
    for (std::size_t i = 0; i < b.size(); ++i)
        b[i] = static_cast<int>(i * 5 % 241) - 120 - static_cast<int>(i / 128 % 7);
    std::vector<std::uint8_t> memory;
    const std::uint64_t descriptor_a = put_matrix<64>(a, memory);
    const std::uint64_t descriptor_b = put_matrix<cols>(b, memory);
    CHECK_EQ(descriptor_a,
             octavo::cuda::wgmma_matrix(static_cast<char*>(simt::dynamic_shared()) - 1024) & ~std::uint64_t{0x3FFF});
    CHECK_EQ(descriptor_b, descriptor_a);
    Buffer<std::uint8_t> matrices(memory.size());
    std::memcpy(matrices.data(), memory.data(), memory.size());
    Buffer<std::int32_t> sums(64 * cols);
    const std::size_t shared = memory.size() + 1024;
    octavo::cuda::allow_shared(multiply_group<cols>, shared);
    launch(multiply_group<cols>, Grid{1, 128, shared}, nullptr, static_cast<const std::uint8_t*>(matrices.data()),
           descriptor_a, descriptor_b, sums.data());
    int wrong = 0;
    for (int thread = 0; thread < 128; ++thread) {
        for (int r = 0; r < cols / 2; ++r) {
            const auto place = static_cast<int>(typename Traits::CLayout{}(thread, r));
            int expected = 0;
            for (int k = 0; k < 128; ++k) {
                expected += a[static_cast<std::size_t>(place % 64 * 128 + k)] *
                            b[static_cast<std::size_t>(place / 64 * 128 + k)];
            }
            wrong += sums.data()[thread * cols / 2 + r] == expected ? 0 : 1;
        }
    }
    CHECK_EQ(wrong, 0);
}

}  // namespace

TEST(products_of_int8) {
    compare<cute::SM80_16x8x32_S32S8S8S32_TN, Instruction<std::int8_t, std::int32_t, octavo::cuda::multiply_add_s8>>();
}

TEST(products_of_16_bit_numbers) {
    compare<cute::SM80_16x8x16_F32F16F16F32_TN, Instruction<__half, float, octavo::cuda::multiply_add_f16>>();
    compare<cute::SM80_16x8x16_F32BF16BF16F32_TN, Instruction<__nv_bfloat16, float, octavo::cuda::multiply_add_bf16>>();
}

TEST(products_of_tf32) {
    compare<cute::SM80_16x8x8_F32TF32TF32F32_TN, Instruction<float, float, octavo::cuda::multiply_add_tf32>>();
}

TEST(products_of_warpgroups) {
    compare_group<cute::SM90::GMMA::MMA_64x128x32_S32S8S8_SS_TN, 128>();
    compare_group<cute::SM90::GMMA::MMA_64x256x32_S32S8S8_SS_TN, 256>();
}

// CuTe's places are bits: those that a lane gives the address of, and those that it receives, numbered alike.
TEST(matrices_from_shared_memory) {
    using Traits = cute::Copy_Traits<cute::SM75_U32x4_LDSM_N>;
    Buffer<std::uint8_t> rows(lanes * 16);
    Buffer<std::uint32_t> registers(lanes * 4);
    std::array<std::uint8_t, 512> of_place{};
    for (int lane = 0; lane < lanes; ++lane) {
        for (int byte = 0; byte < 16; ++byte) {
            const auto place = static_cast<int>(typename Traits::SrcLayout{}(lane, byte * 8)) / 8;
            const auto value = static_cast<std::uint8_t>(place * 37 + place / 256 * 101);
            rows.data()[lane * 16 + byte] = value;
            of_place[static_cast<std::size_t>(place)] = value;
        }
    }
    launch(read_matrices, Grid{1, lanes}, nullptr, static_cast<const std::uint8_t*>(rows.data()), registers.data());
    for (int lane = 0; lane < lanes; ++lane) {
        for (int byte = 0; byte < 16; ++byte) {
            const auto place = static_cast<int>(typename Traits::DstLayout{}(lane, byte * 8)) / 8;
            const check::Context context("lane ", lane, ", byte ", byte);
            CHECK_EQ(int{reinterpret_cast<const std::uint8_t*>(registers.data())[lane * 16 + byte]},
                     int{of_place[static_cast<std::size_t>(place)]});
        }
    }
}
