// XLA's foreign function interface, version 0.3: as much of xla/ffi/api/c_api.h as a handler needs, so that octavo is
// built without JAX. XLA promises to serve handlers of an older version. tests/python/test_jax.py compares sizes and
// offsets with the header that jaxlib carries.
#pragma once

#include <cstddef>
#include <cstdint>

namespace octavo::python::xla {

struct Error;
struct ExecutionContext;

enum class ErrorCode : std::int32_t { invalid_argument = 3, internal = 13 };
enum class DataType : std::int32_t { s8 = 2, s32 = 4, s64 = 5, f16 = 10, f32 = 11, bf16 = 16 };

struct Extension {
    std::size_t struct_size;
    std::int32_t type;
    Extension* next;
};

struct Version {
    std::size_t struct_size;
    Extension* extensions;
    std::int32_t major;
    std::int32_t minor;
};
constexpr Version version{sizeof(Version), nullptr, 0, 3};

// With this extension a call asks what the handler is.
constexpr std::int32_t metadata_extension = 1;
struct Metadata {
    std::size_t struct_size;
    Version version;
    std::uint32_t traits;
    std::int64_t state_type;  // 0: a handler without state
};
constexpr std::uint32_t can_be_captured = 1;  // a trait: what it enqueues can be part of a CUDA graph
struct MetadataExtension {
    Extension base;
    Metadata* metadata;
};

struct Buffer {
    std::size_t struct_size;
    Extension* extensions;
    DataType dtype;
    void* data;
    std::int64_t rank;
    std::int64_t* dims;
};

struct Text {
    const char* data;
    std::size_t size;
};

struct Scalar {
    DataType dtype;
    void* value;
};

// Arguments and results: buffers all.
struct Values {
    std::size_t struct_size;
    Extension* extensions;
    std::int64_t size;
    std::int32_t* types;
    Buffer** buffers;
};

enum class AttributeType : std::int32_t { scalar = 3, text = 4 };
struct Attributes {
    std::size_t struct_size;
    Extension* extensions;
    std::int64_t size;
    AttributeType* types;
    Text** names;
    void** values;  // a Scalar or a Text
};

struct ErrorArguments {
    std::size_t struct_size;
    Extension* extensions;
    const char* message;
    ErrorCode code;
};

struct StreamArguments {
    std::size_t struct_size;
    Extension* extensions;
    ExecutionContext* context;
    void* stream;  // out
};

struct DeviceArguments {
    std::size_t struct_size;
    Extension* extensions;
    ExecutionContext* context;
    std::int32_t device;  // out
};

struct Api {
    std::size_t struct_size;
    Extension* extensions;
    Version version;
    const void* internal;
    Error* (*create_error)(ErrorArguments*);
    void* others_before_stream[3];
    Error* (*get_stream)(StreamArguments*);
    void* others_before_device[12];
    Error* (*get_device)(DeviceArguments*);
};

struct CallFrame {
    std::size_t struct_size;
    Extension* extensions;
    const Api* api;
    ExecutionContext* context;
    std::int32_t stage;
    Values arguments;
    Values results;
    Attributes attributes;
    void* future;
};

using Handler = Error*(CallFrame*);

}  // namespace octavo::python::xla
