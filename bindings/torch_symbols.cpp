#include "bindings/torch_symbols.hpp"

#include <dlfcn.h>

namespace octavo::python {
namespace {

// A function of a library that is loaded already; null where either is not there.
template <class Function>
Function find(const char* library, const char* name) {
    void* const handle = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
    if (handle == nullptr) return nullptr;
    return reinterpret_cast<Function>(dlsym(handle, name));
}

}  // namespace

TorchSymbols find_torch_symbols() {
    return {
        .get_num_threads = find<int (*)()>("libtorch_cpu.so", "_ZN2at15get_num_threadsEv"),
        .grad_mode_is_enabled = find<bool (*)()>("libc10.so", "_ZN3c108GradMode10is_enabledEv"),
        .is_neg = find<bool (*)(const void*)>("libtorch_cpu.so", "_ZN2at6native6is_negERKNS_6TensorE"),
        .to_dlpack = find<void (*)(const void*, DLTensor*)>("libtorch_cpu.so",
                                                            "_ZN2at17toDLPackNonOwningERKNS_6TensorEP8DLTensor"),
        .requires_grad = find<bool (*)(const void*)>("libc10.so", "_ZNK3c1010TensorImpl13requires_gradEv"),
    };
}

}  // namespace octavo::python
