// The CPU backend's threads: what parallel_for promises, that results do not depend on their number, and that callers
// may be many, may fork, and may throw.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "arrays.hpp"
#include "calls.hpp"
#include "check.hpp"
#include "cpu/threads.hpp"
#include "octavo/octavo.hpp"

#ifdef __SANITIZE_THREAD__
// A forked child that starts threads is what is tested here.
extern "C" __attribute__((visibility("default"))) const char* __tsan_default_options() { return "die_after_fork=0"; }
#endif

using octavo::DType;
using octavo::cpu::parallel_for;

namespace {

// Sets the number of threads, and back when it goes.
class Threads {
public:
    explicit Threads(int count) { octavo::set_num_threads(count); }
    ~Threads() { octavo::set_num_threads(before_); }
    Threads(const Threads&) = delete;
    Threads& operator=(const Threads&) = delete;

private:
    int before_ = octavo::num_threads();
};

// What every operation makes of the data of one seed, as bytes. Large enough for several threads to share, on
// whichever instruction set.
std::string run_everything(std::uint64_t seed) {
    constexpr std::int64_t m = 300;
    constexpr std::int64_t n = 520;
    constexpr std::int64_t k = 1030;
    Random random(seed);
    const Array x(DType::bf16, random_normal(random, m, k, 3));
    const Array w(DType::f16, random_normal(random, n, k));
    std::string result;
    for (const octavo::Scheme scheme : schemes) {
        const Codes codes = quantize(x, scheme, octavo::Granularity::tensor);
        result += codes.codes.bytes() + codes.scale.bytes();
        const Codes weight = quantize_weight(w, scheme, octavo::Granularity::vector);
        result += weight.codes.bytes() + weight.code_sums.bytes();
        const Array product(DType::i32, m, n);
        octavo::int8_matmul(codes.codes.matrix(), weight.codes.matrix(), product.matrix());
        result += product.bytes();
        const Array back(DType::f16, n, k);
        octavo::dequantize(weight.codes.matrix(), weight.scale.vector(), vector_of(weight.zeropoint), back.matrix());
        result += back.bytes();
        const octavo::WeightView view{.codes = weight.codes.matrix(),
                                      .scale = weight.scale.vector(),
                                      .zeropoint = vector_of(weight.zeropoint),
                                      .code_sums = weight.code_sums.vector(),
                                      .scheme = scheme};
        const Array y(DType::bf16, m, n);
        for (const octavo::LinearOptions& options : {octavo::LinearOptions{.outliers = octavo::Outliers::columns},
                                                     octavo::LinearOptions{.outliers = octavo::Outliers::rows},
                                                     octavo::LinearOptions{.path = octavo::Path::weight_only}}) {
            octavo::linear(x.matrix(), view, octavo::absent_vector, y.matrix(), options);
            result += y.bytes();
        }
    }
    const Array columns(DType::i32, std::vector<double>(k));
    const Array count(DType::i32, 1, 1);
    octavo::find_outliers(x.matrix(), {.threshold = 8.0F}, columns.vector(), count.vector());
    return result + columns.bytes() + count.bytes();
}

}  // namespace

TEST(ranges_cover_everything_once) {
    for (const int threads : {1, 2, 3, 8}) {
        const Threads set(threads);
        for (const std::int64_t count : {0, 1, 2, 7, 64, 1000}) {
            for (const std::int64_t grain : {-1, 0, 1, 3, 64, 5000}) {
                const check::Context context("threads ", threads, " count ", count, " grain ", grain);
                std::vector<std::atomic<int>> visits(static_cast<std::size_t>(count));
                std::atomic<int> small_ranges{0};
                parallel_for(count, grain, [&](std::int64_t begin, std::int64_t end) {
                    if (end - begin < grain) ++small_ranges;
                    for (std::int64_t i = begin; i < end; ++i) ++visits[static_cast<std::size_t>(i)];
                });
                for (const auto& visit : visits) CHECK_EQ(visit.load(), 1);
                CHECK(small_ranges <= 1);
            }
        }
    }
}

TEST(work_is_shared) {
    const Threads set(3);
    std::mutex mutex;
    std::vector<std::thread::id> seen;
    std::atomic<int> waiting{0};
    // Three ranges that each wait for two others to have begun can end only on three threads.
    parallel_for(3, 1, [&](std::int64_t, std::int64_t) {
        ++waiting;
        while (waiting < 3) std::this_thread::yield();
        const std::scoped_lock lock(mutex);
        seen.push_back(std::this_thread::get_id());
    });
    CHECK_EQ(seen.size(), std::size_t{3});
    CHECK(seen[0] != seen[1] && seen[1] != seen[2] && seen[0] != seen[2]);
}

TEST(results_do_not_depend_on_the_number_of_threads) {
    std::string expected;
    {
        const Threads set(1);
        expected = run_everything(1);
    }
    for (const int threads : {2, 3, 4, 7}) {
        const Threads set(threads);
        const check::Context context("threads ", threads);
        CHECK(run_everything(1) == expected);
    }
}

TEST(concurrent_callers) {
    const Threads set(3);
    constexpr int callers = 4;
    std::vector<std::string> expected(callers);
    for (std::size_t i = 0; i < callers; ++i) expected[i] = run_everything(i);
    std::vector<std::thread> threads;
    std::atomic<int> wrong{0};
    threads.reserve(callers);
    for (int i = 0; i < callers; ++i) {
        threads.emplace_back([&, i] {
            for (int round = 0; round < 3; ++round) {
                // The number of threads may change under others' calls.
                octavo::set_num_threads(1 + (i + round) % 4);
                if (run_everything(static_cast<std::uint64_t>(i)) != expected[static_cast<std::size_t>(i)]) ++wrong;
            }
        });
    }
    for (auto& thread : threads) thread.join();
    CHECK_EQ(wrong.load(), 0);
}

TEST(exceptions_reach_the_caller) {
    for (const int threads : {1, 2, 4}) {
        const Threads set(threads);
        const check::Context context("threads ", threads);
        for (const std::int64_t thrower : {0, 1, 500, 999}) {
            std::string message;
            try {
                parallel_for(1000, 1, [&](std::int64_t begin, std::int64_t end) {
                    if (begin <= thrower && thrower < end)
                        throw std::runtime_error("of item " + std::to_string(thrower));
                });
            } catch (const std::runtime_error& error) {
                message = error.what();
            }
            CHECK_EQ(message, "of item " + std::to_string(thrower));
        }
        // All throw: one is reported, and the threads go on working for the next call.
        CHECK_THROWS(parallel_for(100, 1, [](auto, auto) { throw octavo::Error(octavo::ErrorKind::value, "all"); }),
                     value, "all");
        std::atomic<std::int64_t> sum{0};
        parallel_for(100, 1, [&](std::int64_t begin, std::int64_t end) { sum += end - begin; });
        CHECK_EQ(sum.load(), 100);
    }
}

TEST(number_of_threads) {
    const Threads set(5);
    CHECK_EQ(octavo::num_threads(), 5);
    for (const int count : {0, -1, 1025}) {
        CHECK_THROWS(octavo::set_num_threads(count), value,
                     "set_num_threads: count: expected 1 to 1024, got " + std::to_string(count));
    }
    CHECK_EQ(octavo::num_threads(), 5);
    octavo::set_num_threads(1024);
    CHECK_EQ(octavo::num_threads(), 1024);
}

namespace {

// The exit status of a forked child that runs `body`.
template <class Body>
int in_child(Body body) {
    const pid_t child = fork();
    if (child == 0) _exit(body() ? 0 : 1);
    int status = -1;
    waitpid(child, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

}  // namespace

namespace {

std::atomic<int> lent{0};

// A framework's threads.
bool lend(int threads, void (*work)(void* context, int thread), void* context) {
    ++lent;
    std::vector<std::thread> others;
    for (int i = 1; i < threads; ++i) others.emplace_back(work, context, i);
    work(context, 0);
    for (auto& other : others) other.join();
    return true;
}

bool lend_one(int /*threads*/, void (*work)(void* context, int thread), void* context) {
    ++lent;
    work(context, 0);
    return true;
}

bool lend_none(int /*threads*/, void (* /*work*/)(void* context, int thread), void* /*context*/) {
    ++lent;
    return false;
}

// How many threads each had a part of three that wait for so many to have begun.
std::size_t threads_that_share(int expected) {
    std::mutex mutex;
    std::set<std::thread::id> seen;
    std::atomic<int> waiting{0};
    parallel_for(3, 1, [&](std::int64_t, std::int64_t) {
        ++waiting;
        while (waiting < expected) std::this_thread::yield();
        const std::scoped_lock lock(mutex);
        seen.insert(std::this_thread::get_id());
    });
    return seen.size();
}

}  // namespace

TEST(lent_threads) {
    const Threads set(3);
    lent = 0;
    {
        const octavo::ThreadLimit limit(3, lend);
        CHECK_EQ(threads_that_share(3), std::size_t{3});
        CHECK_EQ(lent.load(), 1);
        std::string message;
        try {
            parallel_for(3, 1, [](std::int64_t, std::int64_t) { throw std::runtime_error("of an item"); });
        } catch (const std::runtime_error& error) {
            message = error.what();
        }
        CHECK_EQ(message, "of an item");
        CHECK_EQ(lent.load(), 2);
        CHECK_EQ(in_child([&] { return threads_that_share(3) == 3 && lent == 2; }), 0);
        const octavo::ThreadLimit inner(3);
        CHECK_EQ(threads_that_share(3), std::size_t{3});
        CHECK_EQ(lent.load(), 2);
    }
    {
        const octavo::ThreadLimit fewer(2, lend);  // than set_num_threads asks for
        CHECK_EQ(threads_that_share(3), std::size_t{3});
        CHECK_EQ(lent.load(), 2);
    }
    const octavo::ThreadLimit one(3, lend_one);
    CHECK_EQ(threads_that_share(1), std::size_t{1});
    CHECK_EQ(lent.load(), 3);
    const octavo::ThreadLimit none(3, lend_none);
    CHECK_EQ(threads_that_share(3), std::size_t{3});
    CHECK_EQ(lent.load(), 4);
    const std::string expected = run_everything(3);
    const octavo::ThreadLimit all(3, lend);
    CHECK(run_everything(3) == expected);
}

// Helpers of more threads than processors often wake when their job is gone, and must leave it alone.
TEST(late_helpers) {
    const Threads set(8);
    for (int i = 0; i < 2000; ++i) {
        std::atomic<std::int64_t> sum{0};
        parallel_for(8, 1, [&](std::int64_t begin, std::int64_t end) { sum += end - begin; });
        CHECK_EQ(sum.load(), 8);
    }
}

// A child has none of its parent's threads; it starts its own.
TEST(fork_after_use) {
    const Threads set(3);
    const std::string expected = run_everything(2);
    CHECK_EQ(in_child([&] { return run_everything(2) == expected; }), 0);
    // A child of a child, and the parent after both.
    CHECK_EQ(in_child([&] {
                 return run_everything(2) == expected && in_child([&] { return run_everything(2) == expected; }) == 0;
             }),
             0);
    CHECK(run_everything(2) == expected);
}

TEST(fork_while_others_work) {
    const Threads set(2);
    std::atomic<bool> stop{false};
    std::thread other([&] {
        while (!stop) {
            parallel_for(64, 1, [](std::int64_t, std::int64_t) { std::this_thread::yield(); });
        }
    });
    for (int i = 0; i < 20; ++i) {
        CHECK_EQ(in_child([] {
                     std::atomic<std::int64_t> sum{0};
                     parallel_for(1000, 1, [&](std::int64_t begin, std::int64_t end) { sum += end - begin; });
                     return sum == 1000;
                 }),
                 0);
    }
    stop = true;
    other.join();
}
