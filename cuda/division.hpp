// How the products of a layer are divided among the multiprocessors of a device, by counting what that with most to do
// has to do: the tile of the int8 product and how many blocks share its depth, and the same of the weight-only one.
// Host code; octavo_bench.layers.selection has it in Python, for its model of time, and a test compares the two.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

namespace octavo::cuda {

// --- the weight-only product by matrix instructions -----------------------------------------------------------------

// Warps of a block that share the depth, and blocks that do.
struct Split {
    std::int64_t warps = 0;  // 0: there is not enough shared memory
    std::int64_t parts = 1;
    double cost = std::numeric_limits<double>::infinity();
};

// The bytes that could be read while a launch more, which adds the sums of parts, takes its time.
inline constexpr double bytes_of_launch = 3.5e6;
inline constexpr std::int64_t most_split = 32;
// What instructions take of a code, and more of it for each row of the tile, as bytes that could be read meanwhile.
inline constexpr double least_work = 0.5;
inline constexpr double work_of_row = 0.0125;

// For tiles of `tile` rows; `resident`: blocks of a multiprocessor. `most_warps`: as shared memory allows. The cost is
// the bytes that could be read meanwhile. Codes are read by one block, rows of X by all that have features of their
// own. Two thirds of the multiprocessors can take all that the memory gives.
inline Split split_weight_only(std::int64_t m, std::int64_t n, std::int64_t k, std::int64_t multiprocessors,
                               std::int64_t tile, std::int64_t resident, std::int64_t most_warps) {
    const auto whole = [](std::int64_t count, std::int64_t size) { return (count + size - 1) / size; };
    Split best;
    const std::int64_t at_once = multiprocessors * resident;
    const auto all = static_cast<double>(multiprocessors);
    for (std::int64_t warps = 1; warps <= most_warps; warps *= 2) {
        if (warps > 1 && warps * 64 >= k + 64) break;  // some would have no work
        const std::int64_t blocks = whole(m, tile) * whole(n, 256 / warps);
        const std::int64_t steps = std::max<std::int64_t>(whole(k, 64 * warps), 1);
        const std::int64_t most = blocks < multiprocessors ? std::min(most_split, 2 * multiprocessors / blocks) : 1;
        for (std::int64_t parts = 1; parts <= std::max<std::int64_t>(most, 1); ++parts) {
            const std::int64_t own = whole(steps, parts);
            if (parts > 1 && whole(steps, own) != parts) continue;
            const std::int64_t count = blocks * parts;
            const std::int64_t last = count % at_once;
            const double waves =
                static_cast<double>(count - last) + (last > 0 ? std::max(static_cast<double>(last), all * 2 / 3) : 0.0);
            const auto bytes = static_cast<double>(n * k + 2 * std::min(m, tile) * k * blocks);
            const double read = bytes * waves / static_cast<double>(count) * static_cast<double>(own * parts) /
                                static_cast<double>(steps);
            const double work = (least_work + work_of_row * static_cast<double>(tile)) *
                                static_cast<double>(n * k * whole(m, tile) * whole(count, multiprocessors)) * all /
                                static_cast<double>(count);
            double cost = std::max(read, work) + 0.15 * std::min(read, work);
            if (parts > 1) cost += bytes_of_launch + static_cast<double>(8 * parts * m * n);
            if (cost < best.cost) best = {warps, parts, cost};
        }
    }
    return best;
}

}  // namespace octavo::cuda
