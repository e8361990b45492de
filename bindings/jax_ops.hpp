// The operations as XLA calls them, for octavo.jax.
#pragma once

#include <pybind11/pybind11.h>

namespace octavo::python {

// For each platform of XLA ("cpu", "CUDA"), the handlers of octavo's operations by name, as capsules for
// jax.ffi.register_ffi_target.
[[nodiscard]] pybind11::dict jax_targets();

}  // namespace octavo::python
