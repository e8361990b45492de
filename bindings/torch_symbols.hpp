// Functions of PyTorch's own libraries that cost a few nanoseconds where their Python counterparts cost fifty.
#pragma once

#include "bindings/dlpack.hpp"

namespace octavo::python {

// PyTorch is not linked and none of its headers is used: the functions are looked up by name in the libraries that
// `import torch` has loaded. A pointer is null where this PyTorch has no such function; callers then ask Python.
struct TorchSymbols {
    // at::get_num_threads and c10::GradMode::is_enabled
    int (*get_num_threads)();
    bool (*grad_mode_is_enabled)();
    // at::native::is_neg and at::toDLPackNonOwning, which may throw, of an at::Tensor
    bool (*is_neg)(const void* tensor);
    void (*to_dlpack)(const void* tensor, DLTensor* out);
    // c10::TensorImpl::requires_grad, of a c10::TensorImpl
    bool (*requires_grad)(const void* implementation);

    [[nodiscard]] bool can_read_tensors() const noexcept {
        return is_neg != nullptr && to_dlpack != nullptr && requires_grad != nullptr;
    }
};

[[nodiscard]] TorchSymbols find_torch_symbols();

}  // namespace octavo::python
