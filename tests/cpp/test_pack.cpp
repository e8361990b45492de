// pack and unpack: the documented order, every layout of the codes, errors; and that packed codes are multiplied as the
// codes they were made of.
#include <cstddef>
#include <fstream>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "arrays.hpp"
#include "calls.hpp"
#include "check.hpp"
#include "octavo/gemm.hpp"
#include "octavo/linear.hpp"
#include "octavo/pack.hpp"

using octavo::DType;
using octavo::Granularity;

namespace {

// Packed codes in memory that ends at a guard page.
Array packed(const Array& codes) {
    Array result(DType::i8, 1, octavo::packed_size(codes.matrix().rows, codes.matrix().cols));
    octavo::pack(codes.matrix(), result.vector());
    return result;
}

struct Shape {
    std::int64_t n, k;
};
constexpr Shape shapes[] = {{0, 0}, {0, 5}, {5, 0}, {1, 1}, {16, 64}, {17, 65}, {33, 130}, {300, 7}};

}  // namespace

TEST(literal) {
    CHECK_EQ(octavo::padded_depth(0), 0);
    CHECK_EQ(octavo::padded_depth(1), 64);
    CHECK_EQ(octavo::padded_depth(64), 64);
    CHECK_EQ(octavo::packed_size(17, 65), 32 * 128);
    const Array codes(DType::i8, Values(2, 5, {1, 2, 3, 4, 5, -1, -2, -3, -4, -5}));
    const Array result = packed(codes);
    // A group of 4 along k: 16 rows of 4 codes.
    const std::vector<double> first{1, 2, 3, 4, -1, -2, -3, -4, 0, 0, 0, 0};
    const std::vector<double> second{5, 0, 0, 0, -5, 0, 0, 0, 0, 0, 0, 0};
    for (std::size_t i = 0; i < first.size(); ++i) {
        CHECK_EQ(result.get(static_cast<std::int64_t>(i)), first[i]);
        CHECK_EQ(result.get(64 + static_cast<std::int64_t>(i)), second[i]);
    }
}

TEST(unpack_is_the_inverse_for_every_layout) {
    Random random(31);
    for (const Shape s : shapes) {
        const Values values = random_codes(random, s.n, s.k);
        for (const Layout layout : layouts) {
            const check::Context context(s.n, " x ", s.k, " layout ", check::show(layout));
            const Array codes(DType::i8, values, layout);
            const Array result = packed(codes);
            CHECK(codes.gaps_untouched());
            for (const Layout back_layout : layouts) {
                const Array back(DType::i8, s.n, s.k, back_layout);
                octavo::unpack(result.vector(), back.matrix());
                check_values("codes", back, values);
                CHECK(back.gaps_untouched());
            }
        }
    }
}

TEST(packed_codes_multiply_as_the_codes) {
    Random random(32);
    for (const Shape s : shapes) {
        const Array codes(DType::i8, random_codes(random, s.n, s.k));
        const Array memory = packed(codes);
        octavo::ConstMatrix b = codes.matrix();
        b.data = memory.vector().data;
        for (const std::int64_t m : {1, 7, 70}) {
            const check::Context context(m, " x ", s.n, " x ", s.k);
            const Array a(DType::i8, random_codes(random, m, s.k));
            const Array expected(DType::i32, m, s.n);
            const Array actual(DType::i32, m, s.n);
            octavo::int8_matmul(a.matrix(), codes.matrix(), expected.matrix());
            octavo::int8_matmul(a.matrix(), b, actual.matrix(), octavo::Layout::packed);
            check_values("product", actual, expected.values());
        }
    }
}

TEST(linear_takes_either_layout) {
    Random random(33);
    for (const Shape s : {Shape{1, 1}, Shape{17, 65}, Shape{300, 130}}) {
        const Array w(DType::bf16, random_normal(random, s.n, s.k));
        Values values = random_normal(random, 9, s.k, 3);
        for (std::int64_t i = 0; i < 9; ++i) values(i, 0) *= 10;
        const Array x(DType::bf16, values);
        const Array bias(DType::f32, random_normal(random, 1, s.n));
        for (const octavo::Scheme scheme : schemes) {
            const Codes quantized = quantize_weight(w, scheme, Granularity::vector);
            const Array memory = packed(quantized.codes);
            const octavo::WeightView view{.codes = quantized.codes.matrix(),
                                          .scale = quantized.scale.vector(),
                                          .zeropoint = vector_of(quantized.zeropoint),
                                          .code_sums = quantized.code_sums.vector(),
                                          .scheme = scheme};
            octavo::WeightView packed_view = view;
            packed_view.codes.data = memory.vector().data;
            packed_view.codes.row_stride = packed_view.codes.col_stride = -7;  // ignored
            packed_view.layout = octavo::Layout::packed;
            for (const auto path : {octavo::Path::int8, octavo::Path::weight_only}) {
                for (const auto outliers :
                     {octavo::Outliers::columns, octavo::Outliers::rows, octavo::Outliers::none}) {
                    const check::Context context(s.n, " x ", s.k, " ", check::show(scheme), check::show(path),
                                                 check::show(outliers));
                    const Array expected(DType::f32, 9, s.n);
                    const Array actual(DType::f32, 9, s.n);
                    const octavo::LinearOptions options{.outliers = outliers, .path = path};
                    octavo::linear(x.matrix(), view, bias.vector(), expected.matrix(), options);
                    octavo::linear(x.matrix(), packed_view, bias.vector(), actual.matrix(), options);
                    check_values("y", actual, expected.values());
                }
            }
        }
    }
}

TEST(errors) {
    const Array codes(DType::i8, 17, 65);
    const Array memory(DType::i8, 1, octavo::packed_size(17, 65));
    const Array small(DType::i8, 1, 4095);
    const Array floats(DType::f32, 1, 4096);
    CHECK_THROWS(octavo::pack(codes.matrix(), small.vector()), value,
                 "pack: packed: expected shape [4096], got [4095]");
    CHECK_THROWS(octavo::pack(codes.matrix(), floats.vector()), type, "pack: packed: expected dtype int8, got float32");
    CHECK_THROWS(octavo::unpack(memory.vector(), floats.matrix()), type,
                 "unpack: codes: expected dtype int8, got float32");
    octavo::Vector strided = memory.vector();
    strided.stride = 2;
    CHECK_THROWS(octavo::pack(codes.matrix(), strided), value, "pack: packed: expected stride 1, got stride 2");
    octavo::Matrix inside = codes.matrix();
    inside.data = memory.vector().data;
    CHECK_THROWS(octavo::pack(inside, memory.vector()), value,
                 "pack: packed: expected memory apart from codes, got memory that overlaps it");
    CHECK_THROWS(octavo::unpack(memory.vector(), inside), value,
                 "unpack: codes: expected memory apart from packed, got memory that overlaps it");

    const Array a(DType::i8, 2, 65);
    const Array out(DType::i32, 2, 17);
    octavo::ConstMatrix elsewhere = inside;
    elsewhere.device = {octavo::DeviceKind::cuda, 0};
    octavo::ConstMatrix a_elsewhere = a.matrix();
    a_elsewhere.device = elsewhere.device;
    CHECK_THROWS(octavo::int8_matmul(a_elsewhere, elsewhere, out.matrix(), octavo::Layout::packed), value,
                 "int8_matmul: b: expected packed codes on cpu, got cuda:0");
    octavo::Matrix overlapping = out.matrix();
    overlapping.data = static_cast<char*>(memory.vector().data) + 4000;
    CHECK_THROWS(octavo::int8_matmul(a.matrix(), inside, overlapping, octavo::Layout::packed), value,
                 "int8_matmul: out: expected memory apart from b, got memory that overlaps it");
}

#ifdef __linux__

namespace {

// Whether the system was asked for large pages at an address: the flag hg of its mapping.
bool were_large_pages_asked_for(const void* memory) {
    const auto address = reinterpret_cast<std::uintptr_t>(memory);
    std::ifstream mappings("/proc/self/smaps");
    bool is_inside = false;
    for (std::string line; std::getline(mappings, line);) {
        std::uintptr_t begin = 0;
        std::uintptr_t end = 0;
        char dash = 0;
        std::istringstream words(line);
        if (words >> std::hex >> begin >> dash >> end && dash == '-') {
            is_inside = begin <= address && address < end;
        } else if (is_inside && line.starts_with("VmFlags:")) {
            return line.find(" hg") != std::string::npos;
        }
    }
    return false;
}

void* map_memory(std::size_t size) {
    void* const memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(memory != MAP_FAILED);
    return memory;
}

// Whether a mapping shows what madvise was asked: an emulator of processes (qemu-user) answers it and asks nobody.
bool are_requests_shown() {
    constexpr std::int64_t size = std::int64_t{4} << 20U;
    void* const memory = map_memory(size);
    const bool is_shown = madvise(memory, size, MADV_HUGEPAGE) == 0 && were_large_pages_asked_for(memory);
    munmap(memory, size);
    return is_shown;
}

}  // namespace

// Codes of several MiB are written to memory for which large pages were asked, as far as it is made of whole ones.
TEST(large_pages_are_asked_for) {
    if (!are_requests_shown()) {
        std::cout << "large_pages_are_asked_for: skipped: this system shows no requests for large pages\n";
        return;
    }
    constexpr std::int64_t n = 2048;
    constexpr std::int64_t k = 4096;
    constexpr std::int64_t size = octavo::packed_size(n, k);
    Random random(32);
    const Array weight(DType::f32, random_normal(random, n, k));
    const Array codes(DType::i8, n, k);
    const Array scale(DType::f32, 1, n);
    const Array code_sums(DType::i32, 1, n);
    for (const bool by_pack : {false, true}) {
        const check::Context context(by_pack ? "pack" : "quantize_weight");
        void* const memory = map_memory(size);
        if (by_pack) {
            octavo::pack(codes.matrix(), {.data = memory, .dtype = DType::i8, .size = size});
        } else {
            octavo::quantize_weight(weight.matrix(), {octavo::Scheme::absmax, Granularity::vector},
                                    {.data = memory, .dtype = DType::i8, .rows = n, .cols = k, .row_stride = k},
                                    scale.vector(), octavo::absent_vector, code_sums.vector(), {},
                                    octavo::Layout::packed);
        }
        CHECK(were_large_pages_asked_for(static_cast<char*>(memory) + size / 2));
        munmap(memory, size);
    }
}

#endif
