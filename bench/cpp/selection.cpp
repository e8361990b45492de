// A model of what the two paths of `auto` take on a GPU: bytes over bandwidths, instructions as the machine code has
// them (.ci/cuda_bounds.txt), products over shares of the peak, divided among multiprocessors by cuda/division.hpp.
// `python -m octavo_bench.layers.selection` compiles it, and makes cuda/selection_table.hpp of what it prints:
//
//   selection table WORTH EXTENT...   for each GPU, kernel and k of the extents a line "ARCHITECTURE BY_MMA ROWS...":
//                                     for each n of them, up to how many rows of X are weight-only
//   selection worst                   reads lines "ARCHITECTURE BY_MMA K N ROWS", where ROWS are weight-only; prints
//                                     the most that a row more multiplies the time by, and the most of it to the
//                                     better path
//   selection decide WORTH A B C D    such rows, where m of them take A + B m weight-only, C + D m by the int8 product
//
// WORTH: as many times as long as the int8 product may take what rounds no activations, and counts as equal.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <iostream>
#include <iterator>
#include <limits>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "division.hpp"

namespace {

using octavo::cuda::whole;

// What a GPU does in a microsecond, as far as kernels that are written so get there.
struct Device {
    int architecture;
    double memory;      // bytes
    double cache;       // bytes of the level-2 cache
    double cache_size;  // bytes that are found there again
    double half;        // operations of 16-bit matrix instructions in the weight-only kernel; 0: it has none
    double int8;        // operations of int8 ones in the largest tile of the int8 product
    std::int64_t multiprocessors;
    double clock;
    std::int64_t shared;  // bytes of shared memory that a block can have
    bool has_wgmma;

    [[nodiscard]] double issued() const { return static_cast<double>(multiprocessors) * 4 * clock; }  // of warps
    // The time of blocks on the multiprocessor that has most of them, by what it would be if all had the same.
    [[nodiscard]] double uneven(std::int64_t blocks) const {
        return static_cast<double>(whole(blocks, multiprocessors) * multiprocessors) / static_cast<double>(blocks);
    }
};

// T4, A100, H200, RTX 5090; peaks of data sheets times the share that mma.sync reaches of them.
constexpr Device devices[] = {
    {75, 0.27e6, 1.2e6, 3e6, 0, 0.45 * 130e6, 40, 1.2e3, 65536, false},
    {80, 1.75e6, 4.0e6, 32e6, 0.70 * 312e6, 0.68 * 624e6, 108, 1.41e3, 166912, false},
    {90, 4.30e6, 5.5e6, 40e6, 0.55 * 990e6, 0.54 * 1979e6, 132, 1.83e3, 232448, true},
    {120, 1.50e6, 5.0e6, 80e6, 0.70 * 210e6, 0.68 * 838e6, 170, 2.40e3, 101376, false},
};

// A tile of weight_only.cu: the instructions of a warp for 2048 codes, and how many blocks a multiprocessor has.
struct Tile {
    std::int64_t rows;
    double issued;
    std::int64_t resident;

    // Bytes of shared memory, where so many warps share the depth.
    [[nodiscard]] std::int64_t needed(std::int64_t warps) const {
        return 4 * (16384 + rows * (warps * 128 + 16)) + 4 * rows;
    }
};
constexpr Tile tiles[] = {{8, 179, 2}, {16, 194, 2}, {32, 215, 2}, {64, 259, 1}};

constexpr double step = 1.3;  // as many times as long as before a row more should take at most
// Microseconds until the first block starts and after the last has ended; between launches, half of it.
constexpr double launch = 2.0;

struct Layer {
    std::int64_t k;
    std::int64_t n;

    [[nodiscard]] double codes() const { return static_cast<double>(n * k); }
};

// Of two things at once, of which the longer hides most of the other.
double overlapped(double a, double b) { return std::max(a, b) + 0.15 * std::min(a, b); }

// The weight-only product in tiles of 8 to 64 rows.
double by_matrix_instructions(const Device& device, const Layer& layer, std::int64_t m) {
    const Tile* tile = tiles;
    for (const Tile& larger : tiles) {
        if (m > larger.rows / 2 && larger.needed(1) <= device.shared) tile = &larger;
    }
    std::int64_t most = 1;
    while (most < 8 && tile->needed(2 * most) <= device.shared) most *= 2;
    const octavo::cuda::Split split =
        octavo::cuda::split_weight_only(m, layer.n, layer.k, device.multiprocessors, tile->rows, tile->resident, most);
    const auto down = static_cast<double>(whole(m, tile->rows));
    const double work = 1.2 * static_cast<double>(tile->rows) * down * layer.codes() / device.half +
                        layer.codes() / 2048 * down * tile->issued / (0.6 * device.issued());
    double time = 1.5 * launch + overlapped(split.read / (0.88 * device.memory), work * device.uneven(split.blocks));
    if (split.parts > 1) {
        time += 0.5 * launch + 0.5 + static_cast<double>(8 * split.parts * m * layer.n) / device.cache;
    }
    return time;
}

// The weight-only product in tiles of few rows: before sm_80 of 16-bit X, from there on of float32.
double by_dot_products(const Device& device, const Layer& layer, std::int64_t m) {
    const octavo::cuda::DotTile tile = octavo::cuda::dot_tile(m, device.architecture < 80 ? 4 : 8);
    const std::int64_t down = whole(m, tile.rows);
    const std::int64_t blocks = down * whole(layer.n, 4);
    const std::int64_t of_one = whole(blocks, device.multiprocessors);
    // A block by itself waits more; of two that share a multiprocessor one computes while the other waits.
    const double turns = static_cast<double>(of_one - of_one % 2) + (of_one % 2 > 0 ? 1.4 : 0.0);
    const auto all = static_cast<double>(device.multiprocessors);
    const double busy =
        layer.codes() / 2048 * tile.work / (0.7 * device.issued()) * turns * all / static_cast<double>(blocks);
    // Blocks that read the same codes do so at the same time: from memory the first does.
    const double from_memory = layer.codes() + static_cast<double>(4 * m * (layer.k + layer.n));
    const double read =
        std::max(from_memory / (0.88 * device.memory), layer.codes() * static_cast<double>(down) / device.cache);
    const double in_flight = std::min(1.0, 1.5 * static_cast<double>(blocks) / all);
    return 1.5 * launch + overlapped(read / in_flight, busy);
}

// Three launches: outlier columns, codes, and the product with what follows it.
double by_int8(const Device& device, bool by_mma, const Layer& layer, std::int64_t m) {
    const auto codes = static_cast<double>(m * layer.k);
    const double size = (by_mma || device.architecture < 80 ? 2 : 4) * codes;
    const double kept = std::min(size, device.cache_size / 2);
    const double read = kept / device.cache + (size - kept) / device.memory;
    const double mark = launch + 0.4 + 1.15 * read;
    const double quantize = launch + 0.9 + 1.2 * (read + codes / device.memory);
    using octavo::cuda::Choice;
    const octavo::cuda::Division division = octavo::cuda::divide_product(
        m, layer.n, layer.k, device.multiprocessors, device.has_wgmma ? Choice::wide : Choice::large);
    const double busy = 2.06 * division.cost * static_cast<double>(device.multiprocessors) / device.int8;
    const double bytes = layer.codes() + codes + static_cast<double>(2 * m * layer.n);
    return mark + quantize + overlapped(busy, bytes / (0.88 * device.memory));
}

struct Times {
    std::int64_t m;
    double weight_only;
    double int8;
};

// Where times can have a step: up to 512 every row counts, then those of tiles.
template <class Function>
std::vector<Times> at_points(Function times) {
    std::vector<Times> found;
    const auto add = [&](std::int64_t m) {
        const std::pair<double, double> both = times(m);
        found.push_back({m, both.first, both.second});
    };
    for (std::int64_t m = 1; m < 512; ++m) add(m);
    for (std::int64_t edge = 512; edge <= 4096; edge += 16) {
        add(edge);
        add(edge + 1);
    }
    return found;
}

std::vector<Times> modelled(const Device& device, bool by_mma, const Layer& layer) {
    return at_points([&](std::int64_t m) {
        return std::pair((by_mma ? by_matrix_instructions : by_dot_products)(device, layer, m),
                         by_int8(device, by_mma, layer, m));
    });
}

struct Worst {
    double more = 0.0;  // times the time, of a row more
    double far = 0.0;   // times the time of the better path
};

// Where up to `most` rows are weight-only.
Worst worst(std::span<const Times> points, std::int64_t most) {
    Worst found;
    const Times* before = nullptr;
    const auto taken = [&](const Times& at) { return at.m <= most ? at.weight_only : at.int8; };
    for (const Times& at : points) {
        if (before != nullptr && before->m + 1 == at.m) found.more = std::max(found.more, taken(at) / taken(*before));
        found.far = std::max(found.far, taken(at) / std::min(at.weight_only, at.int8));
        before = &at;
    }
    return found;
}

// The most rows for the weight-only path: where the worst is least, what a row more costs, and what the other path
// would save. What is within `step`, and then what is within `worth`, counts as equal; of equals it is the most rows.
std::int64_t most_rows(std::span<const Times> points, double worth) {
    std::int64_t best = 0;
    auto least = std::pair(std::numeric_limits<double>::infinity(), 0.0);
    for (std::int64_t most = 0; most <= 4096; most += most < 64 ? 1 : most < 256 ? 8 : 64) {
        const Worst found = worst(points, most);
        const double rounded = std::nearbyint(100 * std::max(found.more, found.far)) / 100;
        const auto own = std::pair(std::max(step, rounded), std::max(worth, found.far));
        if (own <= least) {
            least = own;
            best = most;
        }
    }
    return best;
}

void print_table(double worth, std::span<const std::int64_t> extents) {
    for (const Device& device : devices) {
        for (const bool by_mma : {false, true}) {
            if (by_mma && device.half == 0) continue;
            for (const std::int64_t k : extents) {
                std::printf("%d %d", device.architecture, by_mma ? 1 : 0);
                for (const std::int64_t n : extents) {
                    const auto most = most_rows(modelled(device, by_mma, {k, n}), worth);
                    std::printf(" %lld", static_cast<long long>(most));
                }
                std::printf("\n");
            }
        }
    }
}

void print_worst() {
    int architecture = 0;
    bool by_mma = false;
    Layer layer{};
    std::int64_t most = 0;
    while (std::cin >> architecture >> by_mma >> layer.k >> layer.n >> most) {
        const Device* const device = std::ranges::find(devices, architecture, &Device::architecture);
        if (device == std::end(devices)) throw std::runtime_error("no GPU of sm_" + std::to_string(architecture));
        const Worst found = worst(modelled(*device, by_mma, layer), most);
        std::printf("%.17g %.17g\n", found.more, found.far);
    }
    if (!std::cin.eof()) throw std::runtime_error("expected lines of five numbers");
}

}  // namespace

int main(int count, char* const* arguments) try {
    const std::string_view what = count > 1 ? arguments[1] : "";
    const double worth = count > 2 ? std::stod(arguments[2]) : 0.0;
    if (what == "table" && count > 3) {
        std::vector<std::int64_t> extents;
        for (int i = 3; i < count; ++i) extents.push_back(std::stoll(arguments[i]));
        print_table(worth, extents);
    } else if (what == "worst" && count == 2) {
        print_worst();
    } else if (what == "decide" && count == 7) {
        const auto line = [&](int first, std::int64_t m) {
            return std::stod(arguments[first]) + std::stod(arguments[first + 1]) * static_cast<double>(m);
        };
        const auto points = at_points([&](std::int64_t m) { return std::pair(line(3, m), line(5, m)); });
        std::printf("%lld\n", static_cast<long long>(most_rows(points, worth)));
    } else {
        std::fputs("usage: selection table WORTH EXTENT... | worst | decide WORTH A B C D\n", stderr);
        return 2;
    }
    return 0;
} catch (const std::exception& error) {
    std::fprintf(stderr, "selection: %s\n", error.what());
    return 1;
}
