// PyTorch's functions for C (torch/csrc/stable/c/shim.h, torch/csrc/inductor/aoti_torch/c/shim.h). PyTorch is not
// linked, and none of its headers is used: they are found in the library that `import torch` has loaded.
#pragma once

#include <cstddef>
#include <cstdint>

namespace octavo::python {

// None of them takes the interpreter's lock. Functions that this PyTorch lacks are null, numbers then 0.
struct TorchApi {
    using Status = std::int32_t;  // 0: it went well
    using Value = std::uint64_t;  // an argument: a number as it is, else the address of what the kernel now owns
    using Kernel = void (*)(Value* stack, std::uint64_t inputs, std::uint64_t outputs);

    Status (*get_data_ptr)(void* tensor, void** result) = nullptr;
    Status (*get_dtype)(void* tensor, std::int32_t* result) = nullptr;
    Status (*get_device_type)(void* tensor, std::int32_t* result) = nullptr;
    Status (*get_device_index)(void* tensor, std::int32_t* result) = nullptr;
    Status (*get_dim)(void* tensor, std::int64_t* result) = nullptr;
    Status (*get_sizes)(void* tensor, std::int64_t** result) = nullptr;
    Status (*get_strides)(void* tensor, std::int64_t** result) = nullptr;
    Status (*empty_strided)(std::int64_t dim, const std::int64_t* sizes, const std::int64_t* strides,
                            std::int32_t dtype, std::int32_t device_type, std::int32_t device_index,
                            void** result) = nullptr;
    Status (*copy)(void* target, void* source, std::int32_t non_blocking) = nullptr;
    Status (*delete_tensor)(void* tensor) = nullptr;
    Status (*string_length)(void* string, std::size_t* result) = nullptr;
    Status (*string_data)(void* string, const char** result) = nullptr;
    Status (*delete_string)(void* string) = nullptr;
    Status (*new_list)(std::size_t reserved, void** result) = nullptr;
    Status (*list_size)(void* list, std::size_t* result) = nullptr;
    Status (*list_item)(void* list, std::size_t index, Value* result) = nullptr;
    Status (*append)(void* list, Value item) = nullptr;
    Status (*delete_list)(void* list) = nullptr;
    Status (*get_num_threads)(std::uint32_t* result) = nullptr;
    Status (*parallel_for)(std::int64_t begin, std::int64_t end, std::int64_t grain,
                           void (*body)(std::int64_t begin, std::int64_t end, void* context), void* context) = nullptr;
    Status (*library_init)(const char* space, const char* key, const char* file, std::uint32_t line,
                           void** result) = nullptr;
    Status (*library_impl)(void* library, const char* name, Kernel kernel, std::uint64_t version) = nullptr;
    Status (*get_current_cuda_stream)(std::int32_t device, void** result) = nullptr;  // null without CUDA
    bool (*is_grad_enabled)() = nullptr;                                              // and null before PyTorch 2.10
    // Its numbers for what it shares with us.
    std::int32_t f32 = 0, f16 = 0, bf16 = 0, i8 = 0, i32 = 0, cuda = 0;
    // The first of these that is not there, but for the last two functions.
    const char* missing = nullptr;
};

// Looked for at the first call, which comes when PyTorch is loaded.
const TorchApi& torch_api();

// PyTorch's threads, for octavo::ThreadLimit; false where it has no function for them.
bool run_on_torch_threads(int threads, void (*work)(void* context, int thread), void* context);

}  // namespace octavo::python
