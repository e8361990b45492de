// C++ exceptions as Python's.
#pragma once

#include "octavo/error.hpp"

namespace octavo::python {

// Set Python's error of the kind.
void set_error(const Error& error) noexcept;

// Set Python's error for the exception that is being handled: for functions that CPython calls without pybind11, which
// does the same for those that it defines.
void set_error_of_exception() noexcept;

}  // namespace octavo::python
