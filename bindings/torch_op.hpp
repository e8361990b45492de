// The operation octavo::linear of PyTorch's dispatcher.
#pragma once

namespace octavo::python {

// Give octavo::linear, which Python has defined, its kernels for CPU and CUDA tensors. It is called once, when PyTorch
// is loaded. Throws ImportError for a PyTorch before 2.10.
void register_torch_operation();

}  // namespace octavo::python
