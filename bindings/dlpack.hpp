// The part of the DLPack C interface (version 1) that octavo uses, declared here because pybind11 has none of it.
// Names and layout are those of the standard; tests/python/test_dlpack.py checks them against another header.
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {

struct DLPackVersion {
    std::uint32_t major;
    std::uint32_t minor;
};

struct DLDevice {
    std::int32_t device_type;  // 1 CPU, 2 CUDA, 3 CUDA's pinned host memory
    std::int32_t device_id;
};

struct DLDataType {
    std::uint8_t code;  // 0 int, 1 unsigned int, 2 IEEE float, 4 bfloat, ...
    std::uint8_t bits;
    std::uint16_t lanes;
};

struct DLTensor {
    void* data;
    DLDevice device;
    std::int32_t ndim;
    DLDataType dtype;
    std::int64_t* shape;
    std::int64_t* strides;  // in elements; null means contiguous
    std::uint64_t byte_offset;
};

struct DLManagedTensor {
    DLTensor dl_tensor;
    void* manager_ctx;
    void (*deleter)(DLManagedTensor* self);
};

struct DLManagedTensorVersioned {
    DLPackVersion version;
    void* manager_ctx;
    void (*deleter)(DLManagedTensorVersioned* self);
    std::uint64_t flags;  // bit 0: read-only
    DLTensor dl_tensor;
};

// The table of functions behind a type's `__dlpack_c_exchange_api__`: DLPack without a Python call.
struct DLPackExchangeAPIHeader {
    DLPackVersion version;
    DLPackExchangeAPIHeader* prev_api;
};

struct DLPackExchangeAPI {
    DLPackExchangeAPIHeader header;
    int (*managed_tensor_allocator)(DLTensor* prototype, DLManagedTensorVersioned** out, void* error_ctx,
                                    void (*set_error)(void* error_ctx, const char* kind, const char* message));
    int (*managed_tensor_from_py_object_no_sync)(void* py_object, DLManagedTensorVersioned** out);
    int (*managed_tensor_to_py_object_no_sync)(DLManagedTensorVersioned* tensor, void** out_py_object);
    int (*dltensor_from_py_object_no_sync)(void* py_object, DLTensor* out);
    int (*current_work_stream)(std::int32_t device_type, std::int32_t device_id, void** out_current_stream);
};

}  // extern "C"

static_assert(sizeof(DLTensor) == 48);
static_assert(sizeof(DLManagedTensor) == 64);
static_assert(sizeof(DLManagedTensorVersioned) == 80);
static_assert(offsetof(DLManagedTensorVersioned, flags) == 24);
static_assert(offsetof(DLManagedTensorVersioned, dl_tensor) == 32);
static_assert(sizeof(DLPackExchangeAPI) == 56);
