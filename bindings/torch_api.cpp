#include "bindings/torch_api.hpp"

#include "bindings/frameworks.hpp"

namespace octavo::python {
namespace {

TorchApi find_all() {
    TorchApi api;
    const auto find = [&]<class Function>(Function*& function, const char* name) {
        function = reinterpret_cast<Function*>(symbol_of("libtorch_cpu.so", name));
        if (function == nullptr && api.missing == nullptr) api.missing = name;
    };
    const auto number = [&](std::int32_t& result, const char* name) {
        std::int32_t (*function)() = nullptr;
        find(function, name);
        if (function != nullptr) result = function();
    };
    find(api.get_data_ptr, "aoti_torch_get_data_ptr");
    find(api.get_dtype, "aoti_torch_get_dtype");
    find(api.get_device_type, "aoti_torch_get_device_type");
    find(api.get_device_index, "aoti_torch_get_device_index");
    find(api.get_dim, "aoti_torch_get_dim");
    find(api.get_sizes, "aoti_torch_get_sizes");
    find(api.get_strides, "aoti_torch_get_strides");
    find(api.empty_strided, "aoti_torch_empty_strided");
    find(api.copy, "aoti_torch_copy_");
    find(api.delete_tensor, "aoti_torch_delete_tensor_object");
    find(api.string_length, "torch_string_length");
    find(api.string_data, "torch_string_c_str");
    find(api.delete_string, "torch_delete_string");
    find(api.new_list, "torch_new_list_reserve_size");
    find(api.list_size, "torch_list_size");
    find(api.list_item, "torch_list_get_item");
    find(api.append, "torch_list_push_back");
    find(api.delete_list, "torch_delete_list");
    find(api.get_num_threads, "torch_get_num_threads");
    find(api.parallel_for, "torch_parallel_for");
    find(api.library_init, "aoti_torch_library_init_impl");
    find(api.library_impl, "torch_library_impl");
    number(api.f32, "aoti_torch_dtype_float32");
    number(api.f16, "aoti_torch_dtype_float16");
    number(api.bf16, "aoti_torch_dtype_bfloat16");
    number(api.i8, "aoti_torch_dtype_int8");
    number(api.i32, "aoti_torch_dtype_int32");
    number(api.cuda, "aoti_torch_device_type_cuda");
    api.is_grad_enabled = reinterpret_cast<decltype(api.is_grad_enabled)>(
        symbol_of("libtorch_cpu.so", "aoti_torch_grad_mode_is_enabled"));
    api.get_current_cuda_stream = reinterpret_cast<decltype(api.get_current_cuda_stream)>(
        symbol_of("libtorch_cuda.so", "aoti_torch_get_current_cuda_stream"));
    return api;
}

}  // namespace

const TorchApi& torch_api() {
    static const TorchApi found = find_all();
    return found;
}

bool run_on_torch_threads(int threads, void (*work)(void* context, int thread), void* context) {
    if (torch_api().parallel_for == nullptr) return false;
    struct Work {
        void (*work)(void* context, int thread);
        void* context;
    } given{work, context};
    const auto body = [](std::int64_t begin, std::int64_t /*end*/, void* of) {
        const auto& [call, argument] = *static_cast<const Work*>(of);
        call(argument, static_cast<int>(begin));
    };
    return torch_api().parallel_for(0, threads, 1, body, &given) == 0;
}

}  // namespace octavo::python
