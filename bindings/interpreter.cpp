#include "bindings/interpreter.hpp"

#include <cxxabi.h>
#include <pybind11/pybind11.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <exception>

#include "octavo/runtime.hpp"

namespace py = pybind11;

namespace octavo::python {
namespace {

// Only the main thread runs handlers of signals, and only it is still there when the interpreter ends.
bool is_main_thread() { return syscall(SYS_gettid) == getpid(); }

bool handler_raised() {
    const PyGILState_STATE state = PyGILState_Ensure();
    const bool raised = PyErr_CheckSignals() != 0;
    PyGILState_Release(state);
    return raised;
}

void take_lock_back(PyThreadState* state) {
    try {
        PyEval_RestoreThread(state);
    } catch (
        const abi::__forced_unwind&) {  // how Python before 3.14 ends such a thread; our frames hold Python objects
        for (;;) pause();
    }
}

}  // namespace

void without_lock(const std::function<void()>& work) {
    PyThreadState* const state = PyEval_SaveThread();
    std::exception_ptr error;
    try {
        const Interruptible interruptible(is_main_thread() ? &handler_raised : nullptr);
        work();
    } catch (...) {
        error = std::current_exception();
    }
    take_lock_back(state);
    if (!error) return;
    try {
        std::rethrow_exception(error);
    } catch (const Interrupted&) {
        throw py::error_already_set();  // the handler's
    }
}

bool is_main_interpreter() { return PyInterpreterState_Get() == PyInterpreterState_Main(); }

}  // namespace octavo::python
