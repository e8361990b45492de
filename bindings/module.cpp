// The extension module octavo._core.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/ops.hpp"
#include "octavo/octavo.hpp"

namespace py = pybind11;

namespace {

void translate(std::exception_ptr pointer) {
    try {
        if (pointer) std::rethrow_exception(pointer);
    } catch (const octavo::Error& error) {
        switch (error.kind()) {
            case octavo::ErrorKind::type: return PyErr_SetString(PyExc_TypeError, error.what());
            case octavo::ErrorKind::value: return PyErr_SetString(PyExc_ValueError, error.what());
            case octavo::ErrorKind::device: return PyErr_SetString(PyExc_RuntimeError, error.what());
        }
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
