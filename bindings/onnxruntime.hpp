// ONNX Runtime's C interface: as much of onnxruntime_c_api.h (version 16, ONNX Runtime 1.16) as a custom operator
// needs, so that octavo is built without it. Of the functions, which later versions only append to, each has the place
// that the header's static_asserts fix.
#pragma once

#include <cstddef>
#include <cstdint>

namespace octavo::ort {

struct Status;
struct Value;
struct TypeAndShape;
struct KernelInfo;
struct KernelContext;
struct SessionOptions;
struct Domain;
struct CustomOp;

constexpr std::uint32_t version = 16;

enum class Code : std::int32_t { fail = 1, invalid_argument = 2 };
enum class ElementType : std::int32_t { undefined = 0, f32 = 1, i8 = 3, i32 = 6, f16 = 10, bf16 = 16 };
enum class Characteristic : std::int32_t { required = 0, optional = 1 };

struct Api {
    Status* (*create_status)(Code, const char* message);
    void* before_domain[25];
    Status* (*create_domain)(const char* name, Domain** out);
    Status* (*add_op)(Domain*, const CustomOp*);
    Status* (*add_domain)(SessionOptions*, Domain*);
    void* before_data[22];
    Status* (*data)(Value*, void** out);
    void* before_element_type[8];
    Status* (*element_type)(const TypeAndShape*, ElementType* out);
    Status* (*rank)(const TypeAndShape*, std::size_t* out);
    Status* (*dims)(const TypeAndShape*, std::int64_t* out, std::size_t count);
    void* before_type_and_shape[2];
    Status* (*type_and_shape)(const Value*, TypeAndShape** out);
    void* before_attributes[19];
    Status* (*float_attribute)(const KernelInfo*, const char* name, float* out);
    Status* (*int_attribute)(const KernelInfo*, const char* name, std::int64_t* out);
    Status* (*text_attribute)(const KernelInfo*, const char* name, char* out, std::size_t* size);
    Status* (*input_count)(const KernelContext*, std::size_t* out);
    void* before_input;
    Status* (*input)(const KernelContext*, std::size_t index, const Value** out);  // null: an optional one, left out
    Status* (*output)(KernelContext*, std::size_t index, const std::int64_t* dims, std::size_t count, Value** out);
    void* before_release_status;
    void (*release_status)(Status*);
    void* before_release_type_and_shape[5];
    void (*release_type_and_shape)(TypeAndShape*);
    void* before_config_entry[138];
    Status* (*config_entry)(const SessionOptions*, const char* key, char* out, std::size_t* size);
    void* before_parallel_for[35];
    // Since ONNX Runtime 1.18. Calls body(data, i) for each i below `total`, by the session's threads.
    Status* (*parallel_for)(const KernelContext*, void (*body)(void* data, std::size_t i), std::size_t total,
                            std::size_t batches, void* data);
};
static_assert(offsetof(Api, release_type_and_shape) / sizeof(void*) == 99);
static_assert(offsetof(Api, config_entry) / sizeof(void*) == 238);
static_assert(offsetof(Api, parallel_for) / sizeof(void*) == 274);

struct ApiBase {
    const Api* (*api)(std::uint32_t version);
    const char* (*version_text)();
};

struct CustomOp {
    std::uint32_t version;
    void* (*create)(const CustomOp*, const Api*, const KernelInfo*);  // before version 16
    const char* (*name)(const CustomOp*);
    const char* (*provider)(const CustomOp*);  // null: the CPU's
    ElementType (*input_type)(const CustomOp*, std::size_t index);
    std::size_t (*input_count)(const CustomOp*);
    ElementType (*output_type)(const CustomOp*, std::size_t index);
    std::size_t (*output_count)(const CustomOp*);
    void (*compute)(void* kernel, KernelContext*);  // before version 16
    void (*destroy)(void* kernel);
    Characteristic (*input_characteristic)(const CustomOp*, std::size_t index);
    Characteristic (*output_characteristic)(const CustomOp*, std::size_t index);
    std::int32_t (*input_memory)(const CustomOp*, std::size_t index);
    std::int32_t (*variadic[4])(const CustomOp*);
    Status* (*create_or_fail)(const CustomOp*, const Api*, const KernelInfo*, void** kernel);
    Status* (*compute_or_fail)(void* kernel, KernelContext*);
};

}  // namespace octavo::ort
