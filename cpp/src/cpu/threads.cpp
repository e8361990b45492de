#include "cpu/threads.hpp"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "octavo/error.hpp"
#include "octavo/runtime.hpp"

namespace octavo {
namespace {

constexpr int most_threads = 1024;

// That this process may run on.
int processors() {
#ifdef __linux__
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) return std::max(1, CPU_COUNT(&allowed));
#endif
    return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

int default_threads() {
    if (const char* text = std::getenv("OMP_NUM_THREADS")) {
        // OpenMP allows a list, one number per nesting level; the first is the outermost.
        const long count = std::strtol(text, nullptr, 10);
        if (count >= 1) return static_cast<int>(std::min<long>(count, most_threads));
    }
    return processors();
}

// What set_num_threads was given; 0 before.
std::atomic<int> chosen_threads{0};

// What the innermost ThreadLimit of this thread says; 0 and null without one.
thread_local int thread_limit = 0;
thread_local RunTogether run_together = nullptr;

using Clock = std::chrono::steady_clock;

// The innermost Interruptible of this thread, and when it was asked last.
thread_local bool (*is_unwanted)() = nullptr;
thread_local Clock::duration last_asked{};  // on that clock

}  // namespace

int num_threads() noexcept {
    const int chosen = chosen_threads.load(std::memory_order_relaxed);
    if (chosen > 0) return chosen;
    if (thread_limit > 0) return thread_limit;
    static const int by_default = default_threads();
    return by_default;
}

void set_num_threads(int count) {
    if (count < 1 || count > most_threads) {
        throw Error(ErrorKind::value, "set_num_threads: count: expected 1 to " + std::to_string(most_threads) +
                                          ", got " + std::to_string(count));
    }
    chosen_threads.store(count, std::memory_order_relaxed);
}

ThreadLimit::ThreadLimit(int count, RunTogether together) noexcept
    : outer_(std::exchange(thread_limit, std::clamp(count, 0, most_threads))),
      outer_together_(std::exchange(run_together, together)) {}

ThreadLimit::~ThreadLimit() {
    thread_limit = outer_;
    run_together = outer_together_;
}

Interruptible::Interruptible(bool (*unwanted)()) noexcept : outer_(std::exchange(is_unwanted, unwanted)) {
    last_asked = Clock::now().time_since_epoch();
}

Interruptible::~Interruptible() { is_unwanted = outer_; }

namespace cpu {
namespace {

class Job;
thread_local const Job* current_job = nullptr;  // that this thread works on

// A range of work that threads take pieces of until none is left. Each has a run of pieces of its own, the same one in
// each job of as many pieces, since what it has read and written is in its caches; then it takes others'.
class Job {
public:
    Job(std::int64_t count, std::int64_t pieces, int threads,
        const std::function<void(std::int64_t, std::int64_t)>& body)
        : count_(count), pieces_(pieces), threads_(std::max(threads, 1)), body_(body) {
        if (threads_ > few_threads) more_ = std::vector<Run>(static_cast<std::size_t>(threads_));
        for (int i = 0; i < threads_; ++i) {
            run(i).next.store(begin_of(i, pieces_, threads_), std::memory_order_relaxed);
            run(i).end = begin_of(i + 1, pieces_, threads_);
        }
    }

    // As thread number `thread`, below that of all.
    void work(int thread) noexcept {
        current_job = this;
        for (int i = 0; i < threads_; ++i) {
            Run& from = run((thread + i) % threads_);
            while (work_on_piece(from)) {
            }
        }
        current_job = nullptr;
    }

    [[nodiscard]] bool has_failed() const noexcept { return failed_.load(std::memory_order_relaxed); }

    void rethrow() const {
        if (error_) std::rethrow_exception(error_);
    }

private:
    struct alignas(64) Run {
        std::atomic<std::int64_t> next{0};
        std::int64_t end = 0;
    };
    static constexpr int few_threads = 8;

    Run& run(int thread) { return threads_ > few_threads ? more_[static_cast<std::size_t>(thread)] : few_[thread]; }

    bool work_on_piece(Run& from) noexcept {
        const std::int64_t piece = from.next.fetch_add(1, std::memory_order_relaxed);
        if (piece >= from.end || has_failed()) return false;  // the rest is not worth doing
        try {
            interruption_point();
            body_(begin_of(piece, count_, pieces_), begin_of(piece + 1, count_, pieces_));
        } catch (...) {
            const std::scoped_lock lock(error_mutex_);
            if (!error_) error_ = std::current_exception();
            failed_.store(true, std::memory_order_relaxed);
        }
        return true;
    }

    // Of `parts` parts of [0, count), which differ by one at most: a small last one would leave threads waiting for the
    // others.
    static std::int64_t begin_of(std::int64_t part, std::int64_t count, std::int64_t parts) noexcept {
        return part * (count / parts) + std::min(part, count % parts);
    }

    std::int64_t count_;
    std::int64_t pieces_;
    int threads_;
    const std::function<void(std::int64_t, std::int64_t)>& body_;
    Run few_[few_threads];
    std::vector<Run> more_;
    std::atomic<bool> failed_{false};
    std::mutex error_mutex_;
    std::exception_ptr error_;
};

// Wait a moment for `ready` without going to sleep; false where it has not come true.
//
// A layer's work comes in two or three jobs, and the next layer's soon after. A helper that has gone to sleep takes
// tens of microseconds to wake, and often wakes on its caller's processor, where the two then share one's time: so who
// waits lets others have it. Longer than this moment it does not keep a processor from them, and not at all where there
// are fewer than threads.
template <class Ready>
bool spin_until(bool spin, const Ready& ready) {
    constexpr auto moment = std::chrono::microseconds(50);
    if (!spin) return ready();
    const auto end = Clock::now() + moment;
    do {
        for (int i = 0; i < 32; ++i) {
            if (ready()) return true;
#if defined(__x86_64__)
            __builtin_ia32_pause();
#elif defined(__aarch64__)
            __asm__ volatile("yield");
#endif
        }
        sched_yield();
    } while (Clock::now() < end);
    return ready();
}

// Helpers of one caller at a time, asleep while there is nothing to do. Nobody waits for a helper that has not begun:
// one that wakes late finds the job gone.
class Pool {
public:
    // Do the job with up to `helpers` more threads, of which those that sleep are woken only if `wakes`.
    void run(Job& job, int helpers, bool wakes) {
        if (!wakes && awake_.load(std::memory_order_relaxed) == 0) return job.work(0);
        {
            const std::scoped_lock lock(mutex_);
            try {
                while (std::cmp_less(threads_.size(), helpers)) {
                    threads_.emplace_back(&Pool::help, this, static_cast<int>(threads_.size()));
                }
            } catch (const std::system_error&) {  // no more threads to be had: work with those there are
                helpers = static_cast<int>(threads_.size());
            }
            job_ = &job;
            wanted_ = helpers;
            spin_ = helpers < available_;
            generation_.fetch_add(1, std::memory_order_release);
        }
        if (wakes) wake_.notify_all();
        job.work(0);
        {
            const std::scoped_lock lock(mutex_);
            job_ = nullptr;
        }
        const auto done = [&] { return running_.load(std::memory_order_acquire) == 0; };
        if (!spin_until(spin_, done)) {
            std::unique_lock lock(mutex_);
            done_.wait(lock, done);
        }
    }

private:
    void help(int index) {
#ifdef __linux__
        pthread_setname_np(pthread_self(), "octavo");  // for whoever lists the threads of a process
#endif
        awake_.fetch_add(1, std::memory_order_relaxed);
        std::unique_lock lock(mutex_);
        std::uint64_t seen = generation_ - 1;  // started for the job that is being handed out
        for (;;) {
            const auto called = [&] { return generation_.load(std::memory_order_acquire) != seen; };
            if (!called()) {
                awake_.fetch_sub(1, std::memory_order_relaxed);
                wake_.wait(lock, called);
                awake_.fetch_add(1, std::memory_order_relaxed);
            }
            seen = generation_.load(std::memory_order_acquire);
            Job* const job = job_;
            if (index >= wanted_ || job == nullptr) continue;
            running_.fetch_add(1, std::memory_order_relaxed);
            const bool spin = spin_;
            lock.unlock();
            job->work(index + 1);
            if (running_.fetch_sub(1, std::memory_order_acq_rel) == 1) {
                // Under the lock, so that the caller cannot miss it between looking and going to sleep.
                const std::scoped_lock last(mutex_);
                done_.notify_one();
            }
            static_cast<void>(spin_until(spin, called));
            lock.lock();
        }
    }

    const int available_ = processors();
    std::mutex mutex_;  // guards all below; the atomic ones are looked at without it, too
    std::condition_variable wake_;
    std::condition_variable done_;
    std::vector<std::thread> threads_;
    Job* job_ = nullptr;
    int wanted_ = 0;
    bool spin_ = false;
    std::atomic<int> awake_{0};
    std::atomic<int> running_{0};
    std::atomic<std::uint64_t> generation_{0};
};

// What a process has one of. The pool lives until it ends (its threads sleep in it, so it is never destroyed). A forked
// child inherits none of the threads, octavo's or a framework's, and may find anything locked: it starts with a new
// pool, made without a lock, and leaves the framework's threads alone, which in it may wait for each other for ever.
std::atomic<Pool*> pool_in_use{nullptr};
std::atomic<bool> is_taken{false};  // by a caller, with whoever's threads: others work alone meanwhile
std::atomic<bool> is_forked{false};
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] {
    pool_in_use.store(nullptr);
    is_taken.store(false);
    is_forked.store(true);
});

Pool& pool() {
    Pool* current = pool_in_use.load(std::memory_order_acquire);
    if (current != nullptr) return *current;
    auto fresh = std::make_unique<Pool>();
    if (pool_in_use.compare_exchange_strong(current, fresh.get(), std::memory_order_acq_rel)) return *fresh.release();
    return *current;
}

void work_in(Job& job, int threads, bool wakes) {
    if (threads <= 1 || is_taken.exchange(true, std::memory_order_acquire)) return job.work(0);
    struct Taken {
        Taken() = default;
        Taken(const Taken&) = delete;
        Taken& operator=(const Taken&) = delete;
        ~Taken() { is_taken.store(false, std::memory_order_release); }
    } const taken;
    const bool lent = run_together != nullptr && threads <= thread_limit && !is_forked.load(std::memory_order_relaxed);
    const auto work = [](void* context, int thread) { static_cast<Job*>(context)->work(thread); };
    if (!lent || !run_together(threads, work, &job)) pool().run(job, threads - 1, wakes);
}

}  // namespace

void interruption_point() {
    if (current_job != nullptr && current_job->has_failed()) throw Interrupted();
    if (is_unwanted == nullptr) return;
    const auto now = Clock::now().time_since_epoch();
    if (now - last_asked < std::chrono::milliseconds(100)) return;
    last_asked = now;
    if (is_unwanted()) throw Interrupted();
}

void parallel_for(std::int64_t count, std::int64_t grain, const std::function<void(std::int64_t, std::int64_t)>& body,
                  std::int64_t to_wake) {
    if (count <= 0) return;
    grain = std::max<std::int64_t>(grain, 1);
    const std::int64_t most_pieces = std::max<std::int64_t>(count / grain, 1);
    const auto threads = static_cast<int>(std::min<std::int64_t>(num_threads(), most_pieces));
    // Four pieces a thread even out threads of unequal speed; none is so large that an interruption would wait for it.
    constexpr std::int64_t most_grains = 1024;
    const std::int64_t wanted = threads <= 1 ? 1 : std::min<std::int64_t>(most_pieces, std::int64_t{4} * threads);
    const std::int64_t least = std::max(wanted, (count - 1) / grain / most_grains + 1);
    const std::int64_t pieces = least < threads ? least : least / threads * threads;  // as many for each
    if (pieces <= 1) return body(0, count);
    Job job(count, pieces, threads, body);
    work_in(job, threads, count >= to_wake);
    job.rethrow();
}

}  // namespace cpu
}  // namespace octavo
