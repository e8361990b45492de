// The extension module octavo._core.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#ifdef __linux__
#include <malloc.h>
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <cstdint>

#include "bindings/errors.hpp"
#include "bindings/interpreter.hpp"
#include "bindings/jax_ops.hpp"
#include "bindings/ops.hpp"
#include "bindings/shared_input.hpp"
#include "bindings/torch_op.hpp"
#include "octavo/octavo.hpp"

namespace py = pybind11;

namespace {

void translate(std::exception_ptr pointer) {
    try {
        if (pointer) std::rethrow_exception(pointer);
    } catch (const octavo::Error& error) {
        octavo::python::set_error(error);
    }
}

// octavo::cuda_info as a dict: either what is `missing`, or the devices.
py::dict cuda_info() {
    const octavo::CudaInfo info = octavo::cuda_info();
    py::dict result;
    if (!info.missing.empty()) {
        result["missing"] = info.missing;
        return result;
    }
    py::list devices;
    for (const octavo::CudaDevice& device : info.devices) {
        py::dict entry;
        entry["name"] = device.name;
        entry["compute_capability"] = std::to_string(device.major) + "." + std::to_string(device.minor);
        entry["multiprocessors"] = device.multiprocessors;
        entry["memory"] = device.memory;
        devices.append(entry);
    }
    result["devices"] = devices;
    result["cublaslt"] = info.cublaslt;
    result["wgmma"] = info.wgmma;
    return result;
}

// Gives memory back to the system: whole pages of a mapped file from `first` to `end`, which it reads again where they
// are needed, and, where the C library can, what malloc keeps of memory that was freed.
void give_back(std::uintptr_t first, std::uintptr_t end) {
#ifdef __linux__
    const auto page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
    first = (first + page - 1) / page * page;
    end = end / page * page;
    // NOLINTNEXTLINE(performance-no-int-to-ptr): as Python has addresses
    if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_DONTNEED);
#endif
#ifdef __GLIBC__
    malloc_trim(0);
#endif
}

}  // namespace

// PyInit__octavo_core, which PyInit__core below calls.
PYBIND11_MODULE(_octavo_core, module, py::mod_gil_not_used()) {
    module.doc() = "The C++ core of octavo. Use the functions of the package `octavo`, which document it.";
    py::register_exception_translator(translate);
    octavo::python::define_operations(module);
    module.def("jax_targets", &octavo::python::jax_targets);
    module.def("register_torch_operations", &octavo::python::register_torch_operations);
    module.def("version", &octavo::version);
    module.def("cpu_isa", &octavo::cpu_isa);
    module.def("cpu_isas_available", &octavo::cpu_isas_available);
    module.def("num_threads", &octavo::num_threads);
    module.def("cuda_info", &cuda_info);
    module.def("release_cuda_memory", &octavo::release_cuda_memory, py::call_guard<py::gil_scoped_release>());
    module.def("give_back", &give_back, py::arg("first"), py::arg("end"));
    module.def("set_num_threads", &octavo::set_num_threads, py::arg("count"));
    module.def("share_in_inference_mode", &octavo::python::share_in_inference_mode, py::arg("enabled"));
}

// In a second interpreter pybind11 would wait for ever for the lock of the first.
PyMODINIT_FUNC PyInit__core() {
    if (octavo::python::is_main_interpreter()) return PyInit__octavo_core();
    PyErr_SetString(PyExc_ImportError,
                    "octavo: expected the main interpreter: octavo cannot be used in subinterpreters");
    return nullptr;
}
