// Threads of the CPU backend.
#pragma once

#include <cstdint>
#include <functional>

namespace octavo::cpu {

// Call body(begin, end) for consecutive ranges that cover [0, count), each of at least `grain` items (the last may be
// smaller), from up to num_threads() threads. Returns when all are done; an exception of the body is thrown here.
//
// The threads are a framework's (octavo::ThreadLimit), or octavo's own. These are kept: after a job they wait 50 us for
// the next without going to sleep, where there are more processors than threads; then they sleep, and are woken for at
// least `to_wake` items, since that takes tens of microseconds. Where they are busy with another caller's work, or
// there is too little work to share, the calling thread does all of it. Results must not depend on how [0, count) is
// cut.
void parallel_for(std::int64_t count, std::int64_t grain,
                  const std::function<void(std::int64_t begin, std::int64_t end)>& body, std::int64_t to_wake = 0);

// Throws Interrupted where nobody wants the work that this thread does any more: its caller was interrupted
// (octavo::Interruptible), or another thread's part failed. For bodies whose items take more than a few milliseconds.
void interruption_point();

}  // namespace octavo::cpu
