// Functions of PyTorch's own libraries that cost a few nanoseconds where their Python counterparts cost fifty.
#pragma once

namespace octavo::python {

// PyTorch is not linked and none of its headers is used: the functions are looked up by name in the libraries that
// `import torch` has loaded. A pointer is null where this PyTorch has no such function; callers then ask Python.
struct TorchSymbols {
    int (*get_num_threads)();                   // at::get_num_threads
    bool (*grad_mode_is_enabled)();             // c10::GradMode::is_enabled
    bool (*is_neg)(const void* tensor);         // at::native::is_neg, of an at::Tensor
    bool (*requires_grad)(const void* tensor);  // c10::TensorImpl::requires_grad, of a c10::TensorImpl
};

[[nodiscard]] TorchSymbols find_torch_symbols();

}  // namespace octavo::python
