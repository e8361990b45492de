// The operations octavo::linear and octavo::linear_backward of PyTorch's dispatcher.
#pragma once

#include <pybind11/pybind11.h>

namespace octavo::python {

// Give the operations, which Python has defined, their kernels for CPU and CUDA tensors. It is called once, when
// PyTorch is loaded. Throws ImportError for a PyTorch before 2.10. `recorded`: octavo::linear for calls that autograd
// records.
void register_torch_operations(const pybind11::function& recorded);

// What `register_torch_operations` was given.
pybind11::handle recorded_torch_linear();

}  // namespace octavo::python
