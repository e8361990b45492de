#include "bindings/errors.hpp"

#include <pybind11/pybind11.h>

#include <exception>
#include <new>
#include <stdexcept>

namespace py = pybind11;

namespace octavo::python {

void set_error(const Error& error) noexcept {
    switch (error.kind()) {
        case ErrorKind::type: return PyErr_SetString(PyExc_TypeError, error.what());
        case ErrorKind::value: return PyErr_SetString(PyExc_ValueError, error.what());
        case ErrorKind::device: return PyErr_SetString(PyExc_RuntimeError, error.what());
    }
}

void set_error_of_exception() noexcept {
    try {
        throw;
    } catch (py::error_already_set& error) {
        error.restore();
    } catch (const py::builtin_exception& error) {
        error.set_error();
    } catch (const Error& error) {
        set_error(error);
    } catch (const std::bad_alloc& error) {
        PyErr_SetString(PyExc_MemoryError, error.what());
    } catch (const std::length_error& error) {  // more elements than a container can ever hold
        PyErr_SetString(PyExc_MemoryError, error.what());
    } catch (const std::invalid_argument& error) {
        PyErr_SetString(PyExc_ValueError, error.what());
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_RuntimeError, error.what());
    }
}

}  // namespace octavo::python
