#include "bindings/scratch.hpp"

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>

namespace py = pybind11;

namespace octavo::python {
namespace {

// Of PyTorch's interface for C, in the library that `import torch` has loaded; none of it takes the interpreter's lock.
struct TorchMemory {
    using Status = std::int32_t;
    Status (*empty_strided)(std::int64_t dim, const std::int64_t* sizes, const std::int64_t* strides,
                            std::int32_t dtype, std::int32_t device_type, std::int32_t device_index,
                            void** result) = nullptr;
    Status (*get_data_ptr)(void* tensor, void** result) = nullptr;
    Status (*delete_tensor)(void* tensor) = nullptr;
    std::int32_t (*i8)() = nullptr;
    std::int32_t (*cuda)() = nullptr;

    TorchMemory() {
        const auto find = [&]<class Function>(Function*& function, const char* name) {
            function = reinterpret_cast<Function*>(symbol_of("libtorch_cpu.so", name));
        };
        find(empty_strided, "aoti_torch_empty_strided");
        find(get_data_ptr, "aoti_torch_get_data_ptr");
        find(delete_tensor, "aoti_torch_delete_tensor_object");
        find(i8, "aoti_torch_dtype_int8");
        find(cuda, "aoti_torch_device_type_cuda");
    }
    [[nodiscard]] bool complete() const {
        return empty_strided != nullptr && get_data_ptr != nullptr && delete_tensor != nullptr && i8 != nullptr &&
               cuda != nullptr;
    }
};

const TorchMemory& torch_memory() {
    static const TorchMemory found;
    return found;
}

}  // namespace

FrameworkScratch::FrameworkScratch(Framework framework, Device device) {
    if (device.kind != DeviceKind::cuda) return;
    if (framework == Framework::torch && torch_memory().complete()) {
        scratch_ = {&allocate_torch, &release_torch, this};
    } else if (framework == Framework::cupy) {
        scratch_ = {&allocate_cupy, &release_cupy, this};
    }
}

void* FrameworkScratch::keep(Piece piece) noexcept {
    const auto place = std::ranges::find(pieces_, nullptr, &Piece::holder);
    if (place == pieces_.end()) return nullptr;
    *place = piece;
    return piece.memory;
}

void* FrameworkScratch::forget(const void* memory) noexcept {
    const auto place = std::ranges::find(pieces_, memory, &Piece::memory);
    void* const holder = place->holder;
    *place = {};
    return holder;
}

void* FrameworkScratch::allocate_torch(void* self, std::size_t size, std::int32_t device, void* /*stream*/) {
    // On PyTorch's current stream, which is the one that the call was given.
    const TorchMemory& torch = torch_memory();
    const auto bytes = static_cast<std::int64_t>(size);
    const std::int64_t stride = 1;
    Piece piece;
    if (torch.empty_strided(1, &bytes, &stride, torch.i8(), torch.cuda(), device, &piece.holder) != 0) return nullptr;
    void* kept = nullptr;
    if (torch.get_data_ptr(piece.holder, &piece.memory) == 0) kept = static_cast<FrameworkScratch*>(self)->keep(piece);
    if (kept == nullptr) torch.delete_tensor(piece.holder);
    return kept;
}

void FrameworkScratch::release_torch(void* self, void* memory, std::size_t /*size*/, std::int32_t /*device*/,
                                     void* /*stream*/) {
    torch_memory().delete_tensor(static_cast<FrameworkScratch*>(self)->forget(memory));
}

void* FrameworkScratch::allocate_cupy(void* self, std::size_t size, std::int32_t device, void* /*stream*/) {
    const py::gil_scoped_acquire gil;
    try {
        py::object pointer = cupy_memory({DeviceKind::cuda, device}, size);
        Piece piece{reinterpret_cast<void*>(pointer.attr("ptr").cast<std::uintptr_t>()), pointer.ptr()};
        void* const kept = static_cast<FrameworkScratch*>(self)->keep(piece);
        if (kept != nullptr) pointer.release();
        return kept;
    } catch (const py::error_already_set&) {  // there is not enough
        return nullptr;
    }
}

void FrameworkScratch::release_cupy(void* self, void* memory, std::size_t /*size*/, std::int32_t /*device*/,
                                    void* /*stream*/) {
    const py::gil_scoped_acquire gil;
    py::handle(static_cast<PyObject*>(static_cast<FrameworkScratch*>(self)->forget(memory))).dec_ref();
}

}  // namespace octavo::python
