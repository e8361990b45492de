// The extension module octavo._core.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/errors.hpp"
#include "bindings/ops.hpp"
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

}  // namespace

PYBIND11_MODULE(_core, module, py::mod_gil_not_used()) {
    module.doc() = "The C++ core of octavo. Use the functions of the package `octavo`, which document it.";
    py::register_exception_translator(translate);
    octavo::python::define_operations(module);
    module.def("version", &octavo::version);
    module.def("cpu_isa", &octavo::cpu_isa);
    module.def("cpu_isas_available", &octavo::cpu_isas_available);
    module.def("num_threads", &octavo::num_threads);
    module.def("set_num_threads", &octavo::set_num_threads, py::arg("count"));
}
