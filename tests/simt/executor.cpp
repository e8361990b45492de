// Runs a kernel: block after block, each thread of a block as a fiber on a stack of its own, all on the thread that
// launched. A block of a cooperative launch that comes to a barrier of the grid is set aside, with its stacks and its
// shared memory, until all have come.
//
// Fibers switch where they wait. Who goes on then is the order under test, OCTAVO_SIMT_ORDER:
//   ascending       the first warp that can go on, its first lane; blocks from 0: low threads run far ahead
//   descending      the reverse
//   random:<seed>   any; in half of the blocks, by lot, a warp goes on as long as it can
#include <sys/mman.h>

#include <array>
#include <bit>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <numeric>
#include <set>
#include <string_view>
#include <utility>

#include "machine.hpp"

#ifndef __x86_64__
#include <ucontext.h>
#endif

uint3 threadIdx;
uint3 blockIdx;
dim3 blockDim;
dim3 gridDim;

namespace simt {
namespace {

constexpr unsigned most_threads = 1024;
constexpr unsigned warp = 32;
constexpr std::size_t page = 4096;
constexpr std::size_t stack_size = std::size_t{128} << 10;
constexpr std::size_t stack_stride = stack_size + 2 * page;  // a guard page below; room above to shift the stack's top
constexpr std::size_t most_dynamic_shared = std::size_t{256} << 10;
constexpr std::size_t free_shared = std::size_t{48} << 10;  // static and dynamic, without cudaFuncSetAttribute

enum class State : std::uint8_t { ready, in_warp, in_block, in_grid, done };

// An asynchronous copy of 16 bytes or less that has been issued and not been waited for.
struct Copy {
    void* target;
    const void* source;
    int bytes;
    int size;
    unsigned group;
    bool has_landed;
};

// The last copy to 16 bytes of dynamic shared memory, by its number among those of its thread.
struct LastCopy {
    std::uint32_t block = 0;  // counted over all launches
    std::uint32_t thread = 0;
    unsigned number = 0;
};

// A matrix that wgmma reads: rows of 128 bytes, swizzled, `begin` the address of its first row.
struct GroupMatrix {
    unsigned begin = 0;
    unsigned between_8_rows = 0;
};

// A warp's part of a wgmma that has been issued and not been waited for.
struct Product {
    GroupMatrix a;
    GroupMatrix b;
    int cols;
    std::array<std::int32_t*, 32> sums;  // of each lane, [cols / 8][4]
    unsigned group;
    bool is_done;
};

struct Fiber {
    void* context = nullptr;  // where it stopped
    void* fake_stack = nullptr;
    char* stack = nullptr;
    uint3 index{};
    unsigned thread = 0;
    State state = State::done;
    std::uint32_t warp_epoch = 0;
    bool too_early = false;
    // What it waits in.
    const char* what = "";
    unsigned mask = 0;
    Lane lane;
    WarpOp op = nullptr;
    bool needs_whole_warp = false;
    Loc loc;
    int vote = 0;
    Votes votes;
    std::vector<Copy> copies;
    unsigned copy_group = 0;
    unsigned copies_issued = 0;
    unsigned copies_waited = 0;   // the first of them
    unsigned copies_visible = 0;  // to wgmma
    bool may_multiply = false;    // by wgmma: there was a fence
};

struct Warp {
    unsigned ready = 0;    // lanes that can go on
    unsigned waiting = 0;  // in a collective
    unsigned live = 0;
    std::vector<Product> products;
    unsigned product_group = 0;
    std::uint64_t begun = 0;  // all products that were, as a hash
};

enum class Order : std::uint8_t { ascending, descending, random };

// One machine per process.
std::vector<Fiber> fibers(most_threads);
Fiber host;
Fiber* current = &host;
std::array<Warp, most_threads / warp> warps;
unsigned ready_warps = 0;
unsigned block_threads = 0;
unsigned live_threads = 0;
unsigned arrived_threads = 0;
unsigned threads_in_grid = 0;  // of the block that runs: in a barrier of the grid
Loc grid_barrier_place;        // of the first thread that came to it
Position where;
const Call* call = nullptr;
char* stacks = nullptr;
char* dynamic_memory = nullptr;  // ends at a page that nobody may touch
std::size_t dynamic_size = 0;
std::map<const void*, std::size_t> dynamic_allowed;
std::set<const void*> launched;
std::vector<LastCopy> last_copies(most_dynamic_shared / 16);
std::uint32_t blocks_run = 0;
Order order = Order::ascending;
bool keeps_warp = true;  // the running warp goes on as long as it can
std::uint64_t random_state = 1;
#ifdef OCTAVO_SIMT_ASAN
const void* host_stack = nullptr;
std::size_t host_stack_size = 0;
#endif

// Of splitmix64.
unsigned random_below(unsigned bound) {
    std::uint64_t z = random_state += 0x9E3779B97F4A7C15U;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9U;
    z = (z ^ z >> 27) * 0x94D049BB133111EBU;
    return static_cast<unsigned>((z ^ z >> 31) >> 32) % bound;
}

// One of the bits that are set, as the order says.
unsigned pick(unsigned bits) {
    if (order == Order::ascending) return static_cast<unsigned>(std::countr_zero(bits));
    if (order == Order::descending) return 31U - static_cast<unsigned>(std::countl_zero(bits));
    for (unsigned skip = random_below(static_cast<unsigned>(std::popcount(bits))); skip > 0; --skip) bits &= bits - 1;
    return static_cast<unsigned>(std::countr_zero(bits));
}

// --- switching fibers -----------------------------------------------------------------------------------------------

#ifdef __x86_64__

// Saves the registers that a function must keep, and the stack, in *save; goes on from `load`.
extern "C" void octavo_simt_switch(void** save, void* load);
asm(R"(
.text
.type octavo_simt_switch,@function
octavo_simt_switch:
    push %rbp
    push %rbx
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbx
    pop %rbp
    ret
.size octavo_simt_switch,.-octavo_simt_switch
)");

void prepare(Fiber& fiber, char* top, void (*entry)()) {
    auto** slot = reinterpret_cast<void**>(top);
    *--slot = nullptr;  // where `entry` would return to, and what aligns the stack
    *--slot = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--slot = nullptr;
    fiber.context = slot;
}
void raw_switch(Fiber& from, const Fiber& to) { octavo_simt_switch(&from.context, to.context); }

#else

ucontext_t& context_of(Fiber& fiber) {
    if (fiber.context == nullptr) fiber.context = new ucontext_t;
    return *static_cast<ucontext_t*>(fiber.context);
}
void prepare(Fiber& fiber, char* top, void (*entry)()) {
    ucontext_t& context = context_of(fiber);
    getcontext(&context);
    context.uc_stack = {fiber.stack, 0, static_cast<std::size_t>(top - fiber.stack)};
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
}
void raw_switch(Fiber& from, Fiber& to) { swapcontext(&context_of(from), &context_of(to)); }

#endif

void switch_to(Fiber& to) {
    Fiber& from = *current;
    where.warp_epoch = to.warp_epoch;
    where.too_early = to.too_early;
    if (&from == &to) return;
    current = &to;
    threadIdx = to.index;
    where.thread = static_cast<std::uint16_t>(to.thread);
#ifdef OCTAVO_SIMT_ASAN
    const bool to_host = &to == &host;
    __sanitizer_start_switch_fiber(from.state == State::done && &from != &host ? nullptr : &from.fake_stack,
                                   to_host ? host_stack : to.stack, to_host ? host_stack_size : stack_stride - page);
#endif
    raw_switch(from, to);
#ifdef OCTAVO_SIMT_ASAN
    __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

void make_ready(Fiber& fiber) {
    fiber.state = State::ready;
    warps[fiber.thread / warp].ready |= 1U << fiber.thread % warp;
    ready_warps |= 1U << fiber.thread / warp;
}

// Goes on with a fiber that can, or with the host when all are done.
void reschedule() {
    if (ready_warps == 0) {
        if (live_threads != threads_in_grid || (threads_in_grid != 0 && threads_in_grid != block_threads)) {
            fail("deadlock: a barrier or collective that not every thread reaches");
        }
        where.in_kernel = false;
        switch_to(host);
        return;
    }
    unsigned index = current->thread / warp;
    if (current == &host || !keeps_warp || warps[index].ready == 0) index = pick(ready_warps);
    Warp& next = warps[index];
    const unsigned lane = pick(next.ready);
    next.ready &= ~(1U << lane);
    if (next.ready == 0) ready_warps &= ~(1U << index);
    switch_to(fibers[index * warp + lane]);
}

// --- waiting --------------------------------------------------------------------------------------------------------

bool same_place(const Loc& a, const Loc& b) {
    return a.line() == b.line() && a.column() == b.column() &&
           std::string_view(a.file_name()) == std::string_view(b.file_name());
}

// Lets the block go on where all its threads have come to the barrier.
void try_block() {
    if (live_threads == 0 || arrived_threads != live_threads) return;
    const Fiber* first = nullptr;
    Votes votes{0, static_cast<int>(live_threads)};
    for (unsigned i = 0; i < block_threads; ++i) {
        const Fiber& fiber = fibers[i];
        if (fiber.state != State::in_block) continue;
        if (first == nullptr) first = &fiber;
        if (!same_place(fiber.loc, first->loc)) fail("divergence: threads of a block wait at different barriers");
        votes.count += fiber.vote != 0 ? 1 : 0;
    }
    arrived_threads = 0;
    ++where.block_epoch;
    for (unsigned i = 0; i < block_threads; ++i) {
        if (fibers[i].state != State::in_block) continue;
        fibers[i].votes = votes;
        make_ready(fibers[i]);
    }
}

// Lets the lanes of `mask` go on where all of them have come.
void try_warp(unsigned index, unsigned mask) {
    Warp& group = warps[index];
    const unsigned needed = mask & group.live;
    if (needed == 0 || (group.waiting & needed) != needed) return;
    Fiber* const lanes = &fibers[static_cast<std::size_t>(index) * warp];
    const Fiber& first = lanes[std::countr_zero(needed)];
    std::array<Lane, warp> operands;
    for (unsigned i = 0; i < warp; ++i) {
        if ((needed >> i & 1U) == 0) continue;
        const Fiber& fiber = lanes[i];
        if (std::string_view(fiber.what) != first.what || fiber.mask != first.mask ||
            !same_place(fiber.loc, first.loc)) {
            fail("divergence: lanes of one mask wait in different collectives");
        }
        operands[i] = fiber.lane;
    }
    if (first.needs_whole_warp && needed != whole_warp) fail("divergence: an instruction of whole warps lacks lanes");
    if (first.op != nullptr) first.op(operands.data(), needed);
    group.waiting &= ~needed;
    for (unsigned i = 0; i < warp; ++i) {
        if ((needed >> i & 1U) == 0) continue;
        if (first.op == nullptr) ++lanes[i].warp_epoch;
        make_ready(lanes[i]);
    }
}

void wait_in_warp(const char* what, unsigned mask, Lane lane, WarpOp op, bool needs_whole_warp, const Loc& loc) {
    Fiber& fiber = *current;
    const unsigned bit = 1U << fiber.thread % warp;
    fiber.state = State::in_warp;
    fiber.what = what;
    fiber.mask = mask;
    fiber.lane = lane;
    fiber.op = op;
    fiber.needs_whole_warp = needs_whole_warp;
    fiber.loc = loc;
    if ((mask & bit) == 0) fail("a lane is not in the mask of its own collective");
    warps[fiber.thread / warp].waiting |= bit;
    try_warp(fiber.thread / warp, mask);
    reschedule();
}

// --- wgmma ----------------------------------------------------------------------------------------------------------

bool is_dynamic_shared(const void* address) {
    return dynamic_shared_range().holds(reinterpret_cast<std::uintptr_t>(address));
}

// Of a descriptor (PTX ISA, "Matrix Descriptor Format").
GroupMatrix matrix_of(std::uint64_t descriptor) {
    const auto field = [&](unsigned from, unsigned bits) {
        return static_cast<unsigned>(descriptor >> from & ((std::uint64_t{1} << bits) - 1));
    };
    constexpr unsigned swizzled_by_128_bytes = 1;
    if (field(62, 2) != swizzled_by_128_bytes || field(49, 3) != 0) fail("wgmma: a layout that is not emulated");
    const GroupMatrix matrix{field(0, 14) * 16, field(32, 14) * 16};
    if (matrix.begin % 1024 >= 128 || matrix.begin % 32 != 0) fail("wgmma: a matrix that is not aligned");
    return matrix;
}

// The 16 bytes of a row from byte `begin` on, in the order of banks.
char* address_in(const GroupMatrix& matrix, int row, int begin) {
    const auto number = static_cast<unsigned>(row);
    const unsigned plain =
        matrix.begin + number / 8 * matrix.between_8_rows + number % 8 * 128 + static_cast<unsigned>(begin);
    char* const address = dynamic_memory - most_dynamic_shared + (plain ^ (plain >> 7 & 7U) << 4U);
    if (!is_dynamic_shared(address)) fail("wgmma: a matrix that is not in the block's shared memory");
    return address;
}

void read_row(const GroupMatrix& matrix, int row, std::array<std::int16_t, 32>& to) {
    for (int half = 0; half < 2; ++half) {
        const char* const from = address_in(matrix, row, 16 * half);
        for (int i = 0; i < 16; ++i) {
            to[static_cast<std::size_t>(16 * half + i)] = static_cast<std::int8_t>(from[i]);
        }
    }
}

// Fails where a copy to a row has not been shown to wgmma. Stores are not known.
void check_visible(const GroupMatrix& matrix, int row) {
    for (int half = 0; half < 2; ++half) {
        const LastCopy& last = last_copies[shared_address(address_in(matrix, row, 16 * half)) / 16];
        if (last.block == blocks_run && last.number > fibers[last.thread].copies_visible) {
            fail("wgmma of memory that was copied and not made visible to it (fence_async_proxy)");
        }
    }
}

// OCTAVO_SIMT_WGMMA=wrong: as if the hardware did not do what is thought.
bool makes_mistakes() {
    static const bool found = [] {
        const char* const text = std::getenv("OCTAVO_SIMT_WGMMA");
        return text != nullptr && std::string_view(text) == "wrong";
    }();
    return found;
}

// --- a fiber's life -------------------------------------------------------------------------------------------------

void run_thread() {
#ifdef OCTAVO_SIMT_ASAN
    const void* from = nullptr;
    std::size_t size = 0;
    __sanitizer_finish_switch_fiber(nullptr, &from, &size);
    if (host_stack == nullptr) {
        host_stack = from;
        host_stack_size = size;
    }
#endif
    call->run(call->arguments.get());
    Fiber& fiber = *current;
    if (fiber.too_early) fail("a thread of a launch that begins early never waits for the launch before");
    fiber.state = State::done;
    --live_threads;
    Warp& group = warps[fiber.thread / warp];
    group.live &= ~(1U << fiber.thread % warp);
    // Those who wait do not wait for this one any more.
    for (unsigned rest = group.waiting & group.live; rest != 0;) {
        const unsigned mask = fibers[fiber.thread / warp * warp + static_cast<unsigned>(std::countr_zero(rest))].mask;
        rest &= ~mask;
        try_warp(fiber.thread / warp, mask);
    }
    try_block();
    reschedule();
    std::abort();  // nobody goes on with a fiber that is done
}

void start_thread(unsigned thread) {
    Fiber& fiber = fibers[thread];
    fiber.index = {thread % blockDim.x, thread / blockDim.x % blockDim.y, thread / blockDim.x / blockDim.y};
    fiber.thread = thread;
    fiber.warp_epoch = 0;
    fiber.too_early = call->early;
    fiber.copies.clear();
    fiber.copy_group = fiber.copies_issued = fiber.copies_waited = fiber.copies_visible = 0;
    fiber.may_multiply = false;
    if (fiber.stack == nullptr) {
        char* const memory = stacks + thread * stack_stride;
        // Each makes the process's map longer, which has an end: the stacks of many blocks at once go without.
        constexpr int most_guards = 16384;
        static int guards = 0;
        if (guards++ < most_guards) mprotect(memory, page, PROT_NONE);
        fiber.stack = memory + page;
    }
    // Tops at different offsets in their pages: else the hot ends of all stacks share a few sets of the cache.
    const std::size_t shift = thread % 32 * 128;
#ifdef OCTAVO_SIMT_ASAN
    // The last frames of the thread before this one were never left.
    constexpr std::size_t left = 16384;
    __asan_unpoison_memory_region(fiber.stack + stack_stride - page - left, left);
#endif
    prepare(fiber, fiber.stack + stack_stride - page - shift, run_thread);
    make_ready(fiber);
}

void fill(Range range) { std::memset(reinterpret_cast<void*>(range.begin), 0xFF, range.size()); }

// The shared memory of the block: that of other kernels can wait for their launch.
std::vector<Range> shared_memory(const std::vector<SharedVariable>& variables) {
    std::vector<Range> ranges{dynamic_shared_range()};
    for (const SharedVariable& variable : variables) {
        if (variable.function == call->kernel || !launched.contains(variable.function))
            ranges.push_back(variable.range);
    }
    return ranges;
}

// Until the block has ended, or all its threads wait in a barrier of the grid.
void go_on() {
    threads_in_grid = 0;
    race_begin_block();
    where.in_kernel = true;
    reschedule();
}

void run_block(const std::vector<Range>& shared) {
    for (const Range& range : shared) fill(range);
    live_threads = block_threads;
    arrived_threads = 0;
    where.block_epoch = 0;
    for (unsigned first = 0; first < block_threads; first += warp) {
        const unsigned count = std::min(warp, block_threads - first);
        warps[first / warp] = {0, 0, count == warp ? whole_warp : (1U << count) - 1, {}, 0, 0};
    }
    ++blocks_run;
    for (unsigned i = 0; i < block_threads; ++i) start_thread(i);
    keeps_warp = order != Order::random || random_below(2) == 0;
    go_on();
    for (unsigned index = 0; index < (block_threads + warp - 1) / warp; ++index) {
        if (warps[index].begun != warps[index / 4 * 4].begun) fail("wgmma: the warps of a group began other products");
    }
}

// --- blocks that wait for each other --------------------------------------------------------------------------------

char* reserve(std::size_t size) {
    void* const memory =
        mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) fail("not enough memory for the stacks of a block");
    return static_cast<char*>(memory);
}

// The threads of a block.
struct Threads {
    char* stacks;
    std::vector<Fiber> fibers;
};
std::vector<Threads> spare_threads;

// A block in a barrier of the grid.
struct WaitingBlock {
    uint3 index;
    Position where;
    Threads threads;
    std::array<Warp, most_threads / warp> own_warps;
    bool keeps_warp;
    std::vector<std::vector<char>> shared;
};

WaitingBlock set_aside(const std::vector<Range>& shared) {
    WaitingBlock block{blockIdx, where, {stacks, std::move(fibers)}, warps, keeps_warp, {}};
    for (const Range& range : shared) {
        block.shared.emplace_back(reinterpret_cast<char*>(range.begin), reinterpret_cast<char*>(range.end));
    }
    if (spare_threads.empty()) {
        spare_threads.push_back({reserve(most_threads * stack_stride), std::vector<Fiber>(most_threads)});
    }
    stacks = spare_threads.back().stacks;
    fibers = std::move(spare_threads.back().fibers);
    spare_threads.pop_back();
    return block;
}

void take_up(WaitingBlock block, const std::vector<Range>& shared) {
    spare_threads.push_back({stacks, std::move(fibers)});
    stacks = block.threads.stacks;
    fibers = std::move(block.threads.fibers);
    warps = std::move(block.own_warps);
    keeps_warp = block.keeps_warp;
    blockIdx = block.index;
    where.block = block.where.block;
    where.block_epoch = block.where.block_epoch + 1;
    for (std::size_t i = 0; i < shared.size(); ++i) {
        std::memcpy(reinterpret_cast<void*>(shared[i].begin), block.shared[i].data(), shared[i].size());
    }
    live_threads = block_threads;
    arrived_threads = 0;
    for (unsigned i = 0; i < block_threads; ++i) make_ready(fibers[i]);
    go_on();
}

// --- setting up -----------------------------------------------------------------------------------------------------

void read_order() {
    const char* const text = std::getenv("OCTAVO_SIMT_ORDER");
    const std::string_view wanted = text == nullptr ? "ascending" : text;
    constexpr std::string_view random_prefix = "random:";
    if (wanted == "descending") {
        order = Order::descending;
    } else if (wanted.starts_with(random_prefix)) {
        order = Order::random;
        random_state = std::strtoull(text + random_prefix.size(), nullptr, 10);
    } else if (wanted != "ascending") {
        fail("OCTAVO_SIMT_ORDER: expected ascending, descending or random:<seed>");
    }
}

void set_up() {
    if (stacks != nullptr) return;
    read_order();
    stacks = reserve(most_threads * stack_stride);
    char* const memory = reserve(most_dynamic_shared + page);
    mprotect(memory + most_dynamic_shared, page, PROT_NONE);
    dynamic_memory = memory + most_dynamic_shared;
}

#ifndef OCTAVO_SIMT_ASAN

constexpr std::array fatal_signals = {SIGSEGV, SIGBUS, SIGFPE, SIGILL};

void on_signal(int signal, siginfo_t* info, void* /*context*/) {
    std::fprintf(stderr, "SIMT: %s, address %p\n", strsignal(signal), info->si_addr);
    fail("a thread accesses memory that it must not, or overflows its stack");
}

// While it lives, a fault in a kernel says which thread it was. Handlers need a stack of their own: a fiber's may be
// what overflowed.
class FaultReport {
public:
    FaultReport() {
        static std::array<char, 65536> memory;
        stack_t stack{};
        stack.ss_sp = memory.data();
        stack.ss_size = memory.size();
        sigaltstack(&stack, &outer_stack_);
        struct sigaction action{};
        action.sa_sigaction = on_signal;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESETHAND;
        for (std::size_t i = 0; i < fatal_signals.size(); ++i) sigaction(fatal_signals[i], &action, &outer_[i]);
    }
    ~FaultReport() {
        for (std::size_t i = 0; i < fatal_signals.size(); ++i) sigaction(fatal_signals[i], &outer_[i], nullptr);
        sigaltstack(&outer_stack_, nullptr);
    }
    FaultReport(const FaultReport&) = delete;
    FaultReport& operator=(const FaultReport&) = delete;

private:
    stack_t outer_stack_{};
    std::array<struct sigaction, fatal_signals.size()> outer_{};
};

#else

// AddressSanitizer reports faults itself.
struct FaultReport {
    FaultReport() noexcept {}
};

#endif

}  // namespace

void fail(const char* message) {
    if (!where.in_kernel) {
        std::fprintf(stderr, "SIMT ERROR: %s\n", message);
        std::abort();
    }
    std::fprintf(stderr, "SIMT ERROR: %s (block %u,%u,%u thread %u,%u,%u)\n", message, blockIdx.x, blockIdx.y,
                 blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z);
    // Who waits where; of neighbours at the same place, the first.
    constexpr int most_shown = 8;
    int shown = 0;
    const Fiber* before = nullptr;
    for (unsigned i = 0; i < block_threads && shown < most_shown; ++i) {
        const Fiber& fiber = fibers[i];
        if (fiber.state == State::ready || fiber.state == State::done) {
            before = nullptr;
            continue;
        }
        if (before != nullptr && before->state == fiber.state && same_place(before->loc, fiber.loc)) continue;
        std::fprintf(stderr, "  from thread %u: in %s, mask %08x, at %s:%u\n", i, fiber.what, fiber.mask,
                     fiber.loc.file_name(), static_cast<unsigned>(fiber.loc.line()));
        before = &fiber;
        ++shown;
    }
    std::abort();
}

std::recursive_mutex& machine_mutex() {
    static std::recursive_mutex& mutex = *new std::recursive_mutex;
    return mutex;
}

const Position& position() { return where; }

Range dynamic_shared_range() {
    const auto begin = reinterpret_cast<std::uintptr_t>(dynamic_shared());
    return {begin, begin + dynamic_size};
}

Range fiber_stacks() {
    const auto begin = reinterpret_cast<std::uintptr_t>(stacks);
    return {begin, begin + most_threads * stack_stride};
}

void allow_dynamic_shared(const void* kernel, std::size_t bytes) { dynamic_allowed[kernel] = bytes; }

void wait_for_launch_before() { where.too_early = current->too_early = false; }

void let_next_launch_begin() {
    if (current->too_early) fail("the next launch may begin before the launch before this one has ended");
}

unsigned lane_id() { return current->thread % warp; }

// Of a window of addresses that begins at a multiple of a page.
unsigned shared_address(const void* address) {
    return static_cast<unsigned>(static_cast<const char*>(address) - (dynamic_memory - most_dynamic_shared));
}

// As near to the guard page behind it as its alignment allows.
void* dynamic_shared() { return dynamic_memory - (dynamic_size + 15) / 16 * 16; }

Votes block_barrier(int vote, const Loc& loc) {
    Fiber& fiber = *current;
    fiber.state = State::in_block;
    fiber.what = "__syncthreads";
    fiber.mask = 0;
    fiber.loc = loc;
    fiber.vote = vote;
    ++arrived_threads;
    try_block();
    reschedule();
    return fiber.votes;
}

void grid_barrier(const Loc& loc) {
    Fiber& fiber = *current;
    if (!call->cooperative) fail("a barrier of the grid in a launch that is not cooperative");
    if (!fiber.copies.empty() || !warps[fiber.thread / warp].products.empty()) {
        fail("a barrier of the grid while copies or products are under way, which is not emulated");
    }
    if (grid_barrier_place.line() == 0) grid_barrier_place = loc;
    if (!same_place(loc, grid_barrier_place)) fail("divergence: threads of a grid wait at different barriers");
    fiber.state = State::in_grid;
    fiber.what = "synchronize_grid";
    fiber.mask = 0;
    fiber.loc = loc;
    ++threads_in_grid;
    reschedule();
}

void warp_collective(const char* what, unsigned mask, Lane lane, WarpOp op, const Loc& loc) {
    wait_in_warp(what, mask, lane, op, false, loc);
}

void whole_warp_collective(const char* what, Lane lane, WarpOp op, const Loc& loc) {
    wait_in_warp(what, whole_warp, lane, op, true, loc);
}

// Hardware may carry a copy out at any time between its issue and the end of the wait, so it counts as an access at
// both.
static void land(const Copy& copy, bool now) {
    note(copy.target, static_cast<std::size_t>(copy.size), true, false);
    if (copy.bytes > 0) note(copy.source, static_cast<std::size_t>(copy.bytes), false, false);
    if (!now) return;
    std::memset(copy.target, 0, static_cast<std::size_t>(copy.size));
    std::memcpy(copy.target, copy.source, static_cast<std::size_t>(copy.bytes));
}

void defer_copy(void* target, const void* source, int bytes, int size) {
    const auto misaligned = [size](const void* address) {
        return reinterpret_cast<std::uintptr_t>(address) % static_cast<std::uintptr_t>(size) != 0;
    };
    if (misaligned(target) || (bytes > 0 && misaligned(source)))
        fail("asynchronous copy from or to a misaligned address");
    const bool at_once = order == Order::descending || (order == Order::random && random_below(2) == 0);
    const Copy copy{target, source, bytes, size, current->copy_group, at_once};
    land(copy, at_once);
    current->copies.push_back(copy);
    ++current->copies_issued;
    if (is_dynamic_shared(target)) {
        last_copies[shared_address(target) / 16] = {blocks_run, current->thread, current->copies_issued};
    }
}

void copy_commit() { ++current->copy_group; }

void copy_wait(int keep) {
    std::vector<Copy>& copies = current->copies;
    std::size_t kept = 0;
    for (const Copy& copy : copies) {
        if (copy.group + static_cast<unsigned>(keep) >= current->copy_group) {
            copies[kept++] = copy;
        } else {
            land(copy, !copy.has_landed);
        }
    }
    copies.resize(kept);
    current->copies_waited = current->copies_issued - static_cast<unsigned>(kept);
}

// --- wgmma ----------------------------------------------------------------------------------------------------------

void fence_async_proxy() { current->copies_visible = current->copies_waited; }

void wgmma_fence() { current->may_multiply = true; }

// What a lane has a part in: so that each byte is noted once, a group's threads share the matrices.
static void note_reads(const Product& product) {
#ifdef OCTAVO_SIMT_RACE
    constexpr int group = 128;
    const int thread = static_cast<int>(current->thread) % group;
    const auto note_chunk = [](const GroupMatrix& matrix, int index) {
        note(address_in(matrix, index / 2, index % 2 * 16), 16, false, false);
    };
    note_chunk(product.a, thread);
    for (int index = thread; index < 2 * product.cols; index += group) note_chunk(product.b, index);
#else
    static_cast<void>(product);
#endif
}

static void multiply(Product& product, unsigned warp_index) {
    constexpr int depth = 32;
    constexpr int rows = 16;
    const int first_row = static_cast<int>(warp_index % 4) * rows;
    std::array<std::array<std::int16_t, depth>, rows> a;
    for (int row = 0; row < rows; ++row) read_row(product.a, first_row + row, a[static_cast<std::size_t>(row)]);
    for (int col = 0; col < product.cols; ++col) {
        std::array<std::int16_t, depth> b;
        read_row(product.b, col, b);
        for (int row = 0; row < rows; ++row) {
            std::int32_t sum = 0;
            for (std::size_t h = 0; h < depth; ++h) sum += a[static_cast<std::size_t>(row)][h] * b[h];
            const int lane = row % 8 * 4 + col % 8 / 2;
            std::int32_t& total = product.sums[static_cast<std::size_t>(lane)][col / 8 * 4 + row / 8 * 2 + col % 2];
            total = static_cast<std::int32_t>(static_cast<std::uint32_t>(total) + static_cast<std::uint32_t>(sum));
        }
    }
    if (makes_mistakes()) ++product.sums[0][0];
    product.is_done = true;
}

void wgmma(int cols, void* sums, std::uint64_t a, std::uint64_t b, const Loc& loc) {
    struct Issue {
        std::uint64_t a;
        std::uint64_t b;
        int cols;
        bool may_multiply;
    };
    const Issue mine{a, b, cols, current->may_multiply};
    note_reads({matrix_of(a), matrix_of(b), cols, {}, 0, false});
    whole_warp_collective(
        "wgmma_s8", {&mine, sums, 0},
        [](Lane* lanes, unsigned) {
            const auto& first = *static_cast<const Issue*>(lanes[0].in);
            Product product{matrix_of(first.a), matrix_of(first.b), first.cols, {}, 0, false};
            for (std::size_t lane = 0; lane < warp; ++lane) {
                const auto& own = *static_cast<const Issue*>(lanes[lane].in);
                if (own.a != first.a || own.b != first.b) fail("wgmma: lanes of a warp have different matrices");
                if (!own.may_multiply) fail("wgmma without a fence before it");
                product.sums[lane] = static_cast<std::int32_t*>(lanes[lane].out);
            }
            const unsigned index = current->thread / warp;
            Warp& own = warps[index];
            own.begun = (own.begun ^ first.a) * 0x9E3779B97F4A7C15U + first.b + static_cast<std::uint64_t>(first.cols);
            for (int row = 0; row < 64; ++row) check_visible(product.a, row);
            for (int row = 0; row < product.cols; ++row) check_visible(product.b, row);
            product.group = own.product_group;
            if (order == Order::descending || (order == Order::random && random_below(2) == 0))
                multiply(product, index);
            own.products.push_back(product);
        },
        loc);
}

void wgmma_commit(const Loc& loc) {
    current->may_multiply = false;
    whole_warp_collective(
        "wgmma_commit", {}, [](Lane*, unsigned) { ++warps[current->thread / warp].product_group; }, loc);
}

void wgmma_wait(int keep, const Loc& loc) {
    const Warp& own = warps[current->thread / warp];
    for (const Product& product : own.products) {
        if (product.group + static_cast<unsigned>(keep) < own.product_group) note_reads(product);
    }
    whole_warp_collective(
        "wgmma_wait", {nullptr, nullptr, keep},
        [](Lane* lanes, unsigned) {
            const unsigned index = current->thread / warp;
            Warp& group = warps[index];
            std::erase_if(group.products, [&](Product& product) {
                if (product.group + static_cast<unsigned>(lanes[0].arg) >= group.product_group) return false;
                if (!product.is_done) multiply(product, index);
                return true;
            });
        },
        loc);
}

cudaError_t check_launch(const void* kernel, dim3 grid, dim3 block, std::size_t shared) {
    constexpr unsigned most_yz = 65535;
    const std::uint64_t threads = std::uint64_t{block.x} * block.y * block.z;
    if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > INT32_MAX || grid.y > most_yz || grid.z > most_yz ||
        threads == 0 || threads > most_threads || block.z > 64) {
        return cudaErrorInvalidConfiguration;
    }
    const auto allowed = dynamic_allowed.find(kernel);
    const bool asked_for = allowed != dynamic_allowed.end() && shared <= allowed->second;
    if (!asked_for && shared + static_shared(kernel) > free_shared) return cudaErrorInvalidValue;
    return cudaSuccess;
}

void run_kernel(dim3 grid, dim3 block, std::size_t shared, const Call& kernel_call) {
    set_up();
    const std::vector<SharedVariable>& variables = shared_variables(kernel_call.kernel);
    launched.insert(kernel_call.kernel);
    call = &kernel_call;
    blockDim = block;
    gridDim = grid;
    block_threads = block.x * block.y * block.z;
    dynamic_size = shared;
    ++where.launch;
#ifdef OCTAVO_SIMT_ASAN
    host_stack = nullptr;
    __asan_unpoison_memory_region(dynamic_memory - most_dynamic_shared, most_dynamic_shared);
    __asan_poison_memory_region(dynamic_memory - most_dynamic_shared, most_dynamic_shared);
    __asan_unpoison_memory_region(dynamic_shared(), shared);
#endif
    race_begin_launch(kernel_call);
    const FaultReport faults;
    const std::uint64_t blocks = std::uint64_t{grid.x} * grid.y * grid.z;
    // Random: a step that shares no factor with the number of blocks visits all of them.
    const std::vector<Range> memory = shared_memory(variables);
    std::vector<WaitingBlock> waiting;
    grid_barrier_place = {};
    std::uint64_t block_index = 0;
    std::uint64_t step = 1;
    if (order == Order::random && blocks > 1) {
        block_index = random_below(static_cast<unsigned>(std::min<std::uint64_t>(blocks, UINT32_MAX)));
        step = 1 + random_below(static_cast<unsigned>(std::min<std::uint64_t>(blocks - 1, UINT32_MAX)));
        while (std::gcd(step, blocks) != 1) ++step;
    }
    for (std::uint64_t i = 0; i < blocks; ++i) {
        const std::uint64_t id = order == Order::descending ? blocks - 1 - i : block_index;
        block_index = (block_index + step) % blocks;
        where.block = static_cast<std::uint32_t>(id);
        blockIdx = {static_cast<unsigned>(id % grid.x), static_cast<unsigned>(id / grid.x % grid.y),
                    static_cast<unsigned>(id / grid.x / grid.y)};
        run_block(memory);
        if (threads_in_grid > 0) waiting.push_back(set_aside(memory));
    }
    race_end_launch();
    while (!waiting.empty()) {
        if (waiting.size() != blocks) fail("deadlock: a barrier of the grid that not every block reaches");
        grid_barrier_place = {};
        // The barrier orders all before it and all behind it, as two launches would be.
        ++where.launch;
        race_begin_launch(kernel_call);
        std::vector<WaitingBlock> before = std::exchange(waiting, {});
        while (!before.empty()) {
            const std::size_t next =
                order == Order::random ? random_below(static_cast<unsigned>(before.size())) : before.size() - 1;
            std::swap(before[next], before.back());
            WaitingBlock block = std::move(before.back());
            before.pop_back();
            take_up(std::move(block), memory);
            if (threads_in_grid > 0) waiting.push_back(set_aside(memory));
        }
        race_end_launch();
    }
}

}  // namespace simt
