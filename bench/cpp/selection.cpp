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
//   selection targets WORTH           for GPUs with a model of torch's float16 product, shapes and m, lines
//                                     "ARCHITECTURE K N M HALF AUTO COLUMNS KEPT SHARED": the time of that, of `auto`
//                                     with 6 outlier columns, and with 64; how many times as long 64 kept columns take,
//                                     which are the outlier columns, as 6; and the time of `auto` with 6 for each of
//                                     three layers of one X
//   selection candidates WORTH        for tiles that there are not, a line "NAME GAIN K N M TWENTIETH MOST STEP": how
//                                     many times less time the better path would take, where it gains most of the
//                                     targets; of 800 products (`some_extents`) at how many by a twentieth, and the
//                                     most; and the most that a row more would multiply the time by
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
    double torch;       // operations of the float16 product of torch; 0: no model
    std::int64_t multiprocessors;
    double clock;
    std::int64_t shared;  // bytes of shared memory that a block can have
    bool has_wgmma;

    // Bytes of W that a launch before the product asks for, by peaks of which `memory` and `cache_size` are shares.
    [[nodiscard]] double ahead() const { return octavo::cuda::bytes_ahead(memory / 0.87, cache_size / 0.8); }
    [[nodiscard]] double issued() const { return static_cast<double>(multiprocessors) * 4 * clock; }  // of warps
    // The time of blocks on the multiprocessor that has most of them, by what it would be if all had the same.
    [[nodiscard]] double uneven(std::int64_t blocks) const {
        return static_cast<double>(whole(blocks, multiprocessors) * multiprocessors) / static_cast<double>(blocks);
    }
};

// T4, A100, H200, RTX 5090; peaks of data sheets times the share that mma.sync reaches of them.
constexpr Device devices[] = {
    {75, 0.27e6, 1.2e6, 3e6, 0, 0.45 * 130e6, 0, 40, 1.2e3, 65536, false},
    {80, 1.75e6, 4.0e6, 32e6, 0.70 * 312e6, 0.68 * 624e6, 0.80 * 312e6, 108, 1.41e3, 166912, false},
    {90, 4.30e6, 5.5e6, 40e6, 0.55 * 990e6, 0.54 * 1979e6, 0.80 * 990e6, 132, 1.83e3, 232448, true},
    {120, 1.50e6, 5.0e6, 80e6, 0.70 * 210e6, 0.68 * 838e6, 0, 170, 2.40e3, 101376, false},
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
    const octavo::cuda::DotTile tile = octavo::cuda::dot_tile(m, device.architecture < 80 ? 4 : 9);
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

octavo::cuda::Choice first_tile(const Device& device) {
    return device.has_wgmma ? octavo::cuda::Choice::wide : octavo::cuda::Choice::large;
}

octavo::cuda::Division divided(const Device& device, const Layer& layer, std::int64_t m) {
    return octavo::cuda::divide_product(m, layer.n, layer.k, device.multiprocessors, first_tile(device));
}

// Bytes of W that are in the cache when the product begins, by `launches` before it; they are read beside the rest.
double read_ahead(const Device& device, const Layer& layer, std::int64_t m, std::int64_t launches) {
    if (device.architecture < 80 || m > octavo::cuda::most_rows_ahead) return 0;
    const std::int64_t every = octavo::cuda::every_ahead(layer.n, layer.k, device.ahead(), launches);
    return layer.codes() * static_cast<double>(launches) / static_cast<double>(every);
}

// Three launches: outlier columns, codes, and the product with what follows it. `marks`: whether columns are found.
// `layers`: those of one X, of which it is the time of each; W of the first is asked for ahead.
double by_int8(const Device& device, bool halves, const Layer& layer, std::int64_t m,
               const octavo::cuda::Division& division, bool marks = true, int layers = 1) {
    const auto codes = static_cast<double>(m * layer.k);
    const double size = (halves || device.architecture < 80 ? 2 : 4) * codes;
    const double kept = std::min(size, device.cache_size / 2);
    const double read = kept / device.cache + (size - kept) / device.memory;
    const double mark = marks ? launch + 0.4 + 1.15 * read : 0;
    const double quantize = launch + 0.9 + 1.2 * (read + codes / device.memory);
    const double busy = 2.06 * division.cost * static_cast<double>(device.multiprocessors) / device.int8;
    const double bytes = layer.codes() + codes + static_cast<double>(2 * m * layer.n);
    const auto product = [&](double ahead) {
        return overlapped(busy, std::max((bytes - ahead) / (0.88 * device.memory), bytes / device.cache));
    };
    const double first = product(read_ahead(device, layer, m, marks ? 2 : 1));
    return (mark + quantize + first + (layers - 1) * (0.5 * launch + product(0.0))) / layers;
}

// What outlier columns add to that, of a W that has but codes, or of kept ones in X's own 16 bits. Where few rows of
// tiles read W, each keeps codes that it passes, in the level-2 cache; else they are read one to a sector of 32 bytes,
// and written. Kept ones are read where they lie. Up to 8 columns are added one after the other, more by matrix
// instructions of 16 columns. Of a tile's rows those warps work that have any.
double of_columns(const Device& device, const Layer& layer, std::int64_t m, const octavo::cuda::Division& division,
                  std::int64_t columns, bool are_kept) {
    // Of a warp: for 32 codes that are kept, while the product waits for memory or its sums, which hides most of it,
    // and made float32 or 16 bits, or for 32 kept weights; in the order of Choice, for a product of matrices, and the
    // rows that a warp has.
    constexpr double to_keep = 0.15 * 50;
    constexpr double to_convert[] = {16, 8};
    constexpr double to_convert_kept[] = {16, 9.3};
    constexpr double of_product[] = {2.04, 2.56, 2.75, 1.72, 1.75, 2.67, 3.5};
    constexpr std::int64_t rows_of_warp[] = {16, 16, 16, 64, 64, 48, 32};
    const auto tile = static_cast<std::size_t>(division.tile);
    const octavo::cuda::TileShape& shape = octavo::cuda::tile_shapes[tile];
    const std::int64_t down = whole(m, division.height);
    const bool is_picked = down <= octavo::cuda::most_pickers && columns <= octavo::cuda::most_picked;
    const auto codes = static_cast<double>(columns * layer.n);
    const double of_w =
        are_kept    ? 2 * codes / (0.88 * device.memory) + 2 * static_cast<double>(down - 1) * codes / device.cache
        : is_picked ? 2 * static_cast<double>(down) * codes / device.cache
                    : 33 * codes / (0.88 * device.memory);
    const double moved = 2 * static_cast<double>(columns * m) / (0.88 * device.memory) + of_w;
    const auto rows = static_cast<double>(
        std::min(whole(std::min(m, division.height), rows_of_warp[tile]) * rows_of_warp[tile], shape.rows));
    const auto cols = static_cast<double>(shape.cols);
    const std::size_t many = columns > 8 ? 1 : 0;
    const double of_weight = are_kept ? to_convert_kept[many] : (is_picked ? to_keep : 0) + to_convert[many];
    double issued = cols * static_cast<double>(columns) / 32 * of_weight;
    double products = 0;
    if (columns <= 8) {
        issued += 1.3 * rows * cols * static_cast<double>(columns) / 32;
    } else {
        products = rows * cols / 128 * static_cast<double>(whole(columns, 16));
        issued += products * of_product[tile] + rows * cols / 32;
    }
    const auto all = static_cast<double>(device.multiprocessors);
    const auto tiles = static_cast<double>(whole(down * whole(layer.n, shape.cols), device.multiprocessors));
    return tiles * all * std::max(issued / (0.6 * device.issued()), products * 4096 / device.half) + moved;
}

// The float16 product of torch: tiles of 128 x 256, which share the depth where they are few.
double by_torch(const Device& device, const Layer& layer, std::int64_t m) {
    const auto tiles = static_cast<double>(whole(m, 128) * whole(layer.n, 256));
    const auto all = static_cast<double>(device.multiprocessors);
    const double share = tiles >= 4 * all ? 1.0 : tiles >= all ? tiles / (std::ceil(tiles / all) * all) : 0.85;
    const double busy = 2 * static_cast<double>(std::max<std::int64_t>(m, 64)) * layer.codes() / (device.torch * share);
    const double bytes = 2 * (layer.codes() + static_cast<double>(m * (layer.k + layer.n)));
    return launch + overlapped(busy, bytes / device.memory);
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
                         by_int8(device, by_mma, layer, m, divided(device, layer, m)));
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

// The most rows for the weight-only path: where a row more costs least, and then where the other path would save least.
// Of the one what is within `step`, of the other what is within `worth` counts as equal; of equals it is the most rows.
std::int64_t most_rows(std::span<const Times> points, double worth) {
    std::int64_t best = 0;
    auto least = std::pair(std::numeric_limits<double>::infinity(), 0.0);
    for (std::int64_t most = 0; most <= 4096; most += most < 64 ? 1 : most < 256 ? 8 : 64) {
        const Worst found = worst(points, most);
        const auto own = std::pair(std::max(step, found.more), std::max(worth, found.far));
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

// The shapes of the targets of a GPU, and those of small layers.
constexpr Layer layers[] = {{4096, 4096}, {4096, 16384}, {16384, 4096}, {768, 3072}, {2560, 10240}};
constexpr std::int64_t target_rows[] = {1, 16, 64, 128, 256, 1024, 4096};

void print_targets(double worth) {
    for (const Device& device : devices) {
        if (device.torch == 0) continue;
        for (const Layer& layer : layers) {
            const auto points = modelled(device, true, layer);
            const std::int64_t most = most_rows(points, worth);
            for (const std::int64_t m : target_rows) {
                const Times& at = *std::ranges::find(points, m, &Times::m);
                const octavo::cuda::Division division = divided(device, layer, m);
                const auto taken = [&](std::int64_t columns) {
                    return m <= most ? at.weight_only
                                     : at.int8 + of_columns(device, layer, m, division, columns, false);
                };
                const auto taken_kept = [&](std::int64_t columns) {
                    return m <= most ? at.weight_only
                                     : by_int8(device, true, layer, m, division, false) +
                                           of_columns(device, layer, m, division, columns, true);
                };
                const double shared = m <= most ? at.weight_only
                                                : by_int8(device, true, layer, m, division, true, 3) +
                                                      of_columns(device, layer, m, division, 6, false);
                std::printf("%d %lld %lld %lld %.17g %.17g %.17g %.17g %.17g\n", device.architecture,
                            static_cast<long long>(layer.k), static_cast<long long>(layer.n), static_cast<long long>(m),
                            by_torch(device, layer, m), taken(6), taken(64), taken_kept(64) / taken_kept(6), shared);
            }
        }
    }
}

// Tiles of warpgroups that there are not, at the rate of `square` times what shared memory lets them reach of what it
// lets that: products read 4 of 5 parts of what it gives, and copies the rest.
struct Candidate {
    const char* name;
    octavo::cuda::TileShape shape;
};
constexpr Candidate candidates[] = {
    // Features as the 64 rows of an instruction, rows of X as its columns.
    {"swapped_64x128", {128, 64, 32, 0.86}},
    {"swapped_64x256", {256, 64, 64, 1.04}},
    // Each of two warpgroups has a tile of its own. `square` reads as much, and two blocks of it are in a
    // multiprocessor:
    // one's epilogue runs beside the other's products, too.
    {"pingpong_128x128", {128, 128, 64, 1.04}},
    {"64x192", {64, 192, 64, 0.975}},
    {"128x192", {128, 192, 64, 1.12}},
};

// Extents of k and n, for 8 to 256 rows in steps of 8.
constexpr std::int64_t some_extents[] = {4096, 5793, 8192, 11585, 16384};

// Weight-only, and the int8 product with the candidate where it is better.
Times with_candidate(const Candidate& candidate, const Device& device, const Layer& layer, std::int64_t m) {
    const octavo::cuda::Division division = octavo::cuda::divide_by(octavo::cuda::Choice::wide, candidate.shape, m,
                                                                    layer.n, layer.k, device.multiprocessors);
    return {m, by_matrix_instructions(device, layer, m),
            std::min(by_int8(device, true, layer, m, divided(device, layer, m)),
                     by_int8(device, true, layer, m, division))};
}

// As many times less time the better path would take.
double gain_of(const Candidate& candidate, const Device& device, const Layer& layer, std::int64_t m) {
    const Times with = with_candidate(candidate, device, layer, m);
    const double before = by_int8(device, true, layer, m, divided(device, layer, m));
    return std::min(with.weight_only, before) / std::min(with.weight_only, with.int8);
}

void print_candidates(double worth) {
    for (const Device& device : devices) {
        if (!device.has_wgmma) continue;
        for (const Candidate& candidate : candidates) {
            double gain = 1.0;
            Layer where{};
            std::int64_t rows = 0;
            for (const Layer& layer : layers) {
                for (const std::int64_t m : target_rows) {
                    const double own = gain_of(candidate, device, layer, m);
                    if (own <= gain) continue;
                    gain = own;
                    where = layer;
                    rows = m;
                }
            }
            int twentieth = 0;
            double most = 1.0;
            double more = 1.0;
            for (const std::int64_t k : some_extents) {
                for (const std::int64_t n : some_extents) {
                    for (std::int64_t m = 8; m <= 256; m += 8) {
                        const double own = gain_of(candidate, device, {k, n}, m);
                        if (own >= 1.05) ++twentieth;
                        most = std::max(most, own);
                    }
                    const auto points = at_points([&](std::int64_t m) {
                        const Times with = with_candidate(candidate, device, {k, n}, m);
                        return std::pair(with.weight_only, with.int8);
                    });
                    more = std::max(more, worst(points, most_rows(points, worth)).more);
                }
            }
            std::printf("%s %.17g %lld %lld %lld %d %.17g %.17g\n", candidate.name, gain,
                        static_cast<long long>(where.k), static_cast<long long>(where.n), static_cast<long long>(rows),
                        twentieth, most, more);
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
    } else if (what == "targets" && count == 3) {
        print_targets(worth);
    } else if (what == "candidates" && count == 3) {
        print_candidates(worth);
    } else if (what == "worst" && count == 2) {
        print_worst();
    } else if (what == "decide" && count == 7) {
        const auto line = [&](int first, std::int64_t m) {
            return std::stod(arguments[first]) + std::stod(arguments[first + 1]) * static_cast<double>(m);
        };
        const auto points = at_points([&](std::int64_t m) { return std::pair(line(3, m), line(5, m)); });
        std::printf("%lld\n", static_cast<long long>(most_rows(points, worth)));
    } else {
        std::fputs(
            "usage: selection table WORTH EXTENT... | worst | targets WORTH | candidates WORTH | decide WORTH A B C "
            "D\n",
            stderr);
        return 2;
    }
    return 0;
} catch (const std::exception& error) {
    std::fprintf(stderr, "selection: %s\n", error.what());
    return 1;
}
