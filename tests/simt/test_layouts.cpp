// Where matrix instructions hold the elements of their operands, as CuTe's traits have it (NVIDIA's CUTLASS): a witness
// that has nothing of ours. Kernels and emulator share one description of these places (ptx.cuh, ptx.hpp), so that a
// mistake in it would go unnoticed. Registers are filled, and results read, by CuTe's places; between them is ours.
//
// ldmatrix serves all of them: it is compared with CuTe's places too.
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
