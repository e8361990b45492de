#include "bindings/scratch.hpp"

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>

#include "bindings/torch_api.hpp"

namespace py = pybind11;

namespace octavo::python {
namespace {

// Whether PyTorch has what is needed to take memory from it.
bool gives_memory(const TorchApi& torch) {
    // The numbers of int8 and CUDA are neither of them 0.
    return torch.empty_strided != nullptr && torch.get_data_ptr != nullptr && torch.delete_tensor != nullptr &&
           torch.i8 != 0 && torch.cuda != 0;
}

}  // namespace

FrameworkScratch::FrameworkScratch(Framework framework, Device device) {
    if (device.kind != DeviceKind::cuda) return;
    if (framework == Framework::torch && gives_memory(torch_api())) {
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
    const TorchApi& torch = torch_api();
    const auto bytes = static_cast<std::int64_t>(size);
    const std::int64_t stride = 1;
    Piece piece;
    if (torch.empty_strided(1, &bytes, &stride, torch.i8, torch.cuda, device, &piece.holder) != 0) return nullptr;
    void* kept = nullptr;
    if (torch.get_data_ptr(piece.holder, &piece.memory) == 0) kept = static_cast<FrameworkScratch*>(self)->keep(piece);
    if (kept == nullptr) torch.delete_tensor(piece.holder);
    return kept;
}

void FrameworkScratch::release_torch(void* self, void* memory, std::size_t /*size*/, std::int32_t /*device*/,
                                     void* /*stream*/) {
    torch_api().delete_tensor(static_cast<FrameworkScratch*>(self)->forget(memory));
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
