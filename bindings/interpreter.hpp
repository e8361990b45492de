// The interpreter's lock around calls of the core, and its signals meanwhile.
#pragma once

#include <functional>

namespace octavo::python {

// Call `work` without the interpreter's lock. A signal whose Python handler raises, such as Ctrl-C, ends the call
// within a fraction of a second, with that handler's error. A daemon thread whose interpreter is gone when it wants the
// lock back never returns from here, as it may no longer touch an object.
void without_lock(const std::function<void()>& work);

// Whether this is the process's first interpreter: the core's types belong to one only.
bool is_main_interpreter();

}  // namespace octavo::python
