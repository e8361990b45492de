// The operations as Python sees them.
#pragma once

#include <pybind11/pybind11.h>

namespace octavo::python {

// Define the operations and the class Weight in `module`.
void define_operations(pybind11::module_& module);

}  // namespace octavo::python
