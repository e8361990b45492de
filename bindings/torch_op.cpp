// octavo::linear, linear_many and linear_backward as PyTorch's dispatcher calls them, without Python in between, by the
// functions of PyTorch 2.10.
#include "bindings/torch_op.hpp"

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bindings/frameworks.hpp"
#include "bindings/ops.hpp"
#include "bindings/scratch.hpp"
#include "bindings/torch_api.hpp"
#include "octavo/octavo.hpp"

namespace octavo::python {
namespace {

namespace py = pybind11;

// --- PyTorch's interface ---------------------------------------------------------------------------------------------

using Status = TorchApi::Status;
using Value = TorchApi::Value;
constexpr std::uint64_t torch_2_10 = (std::uint64_t{2} << 56) | (std::uint64_t{10} << 48);

const TorchApi& torch() { return torch_api(); }

void check(Status status) {
    if (status != 0) throw std::runtime_error("octavo::linear: PyTorch refused a call of its C interface");
}

// PyTorch knows no other exception of which it makes a ValueError.
[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument("octavo::linear: " + message); }

// --- arguments -------------------------------------------------------------------------------------------------------

// A tensor that this kernel owns a reference to.
class Tensor {
public:
    Tensor(Value handle, const char* name) : handle_(reinterpret_cast<void*>(handle)), name_(name) {
        std::int64_t dim = 0;
        std::int64_t* sizes = nullptr;
        std::int64_t* strides = nullptr;
        std::int32_t device_type = 0;
        check(torch().get_dim(handle_, &dim));
        check(torch().get_sizes(handle_, &sizes));
        check(torch().get_strides(handle_, &strides));
        check(torch().get_dtype(handle_, &dtype_));
        check(torch().get_device_type(handle_, &device_type));
        check(torch().get_device_index(handle_, &device_.index));
        check(torch().get_data_ptr(handle_, &data_));
        device_.kind = device_type == torch().cuda ? DeviceKind::cuda : DeviceKind::cpu;
        device_.index = std::max(device_.index, 0);  // of the CPU it is -1
        sizes_ = {sizes, static_cast<std::size_t>(dim)};
        strides_ = {strides, static_cast<std::size_t>(dim)};
    }
    Tensor(Tensor&& other) noexcept { *this = std::move(other); }
    Tensor& operator=(Tensor&& other) noexcept {
        std::swap(handle_, other.handle_);
        name_ = other.name_;
        data_ = other.data_;
        dtype_ = other.dtype_;
        device_ = other.device_;
        sizes_ = other.sizes_;
        strides_ = other.strides_;
        return *this;
    }
    Tensor(const Tensor&) = delete;
    Tensor& operator=(const Tensor&) = delete;
    ~Tensor() {
        if (handle_ != nullptr) torch().delete_tensor(handle_);
    }

    // A new one, contiguous and uninitialized, of the dtype and device of `like`.
    static Tensor empty(const Tensor& like, std::span<const std::int64_t> sizes) {
        std::vector<std::int64_t> strides(sizes.size());
        std::int64_t stride = 1;
        for (std::size_t i = sizes.size(); i-- > 0;) {
            strides[i] = stride;
            stride *= std::max<std::int64_t>(sizes[i], 1);
        }
        void* handle = nullptr;
        const bool is_cuda = like.device_.kind == DeviceKind::cuda;
        check(torch().empty_strided(std::ssize(sizes), sizes.data(), strides.data(), like.dtype_,
                                    is_cuda ? torch().cuda : 0, is_cuda ? like.device_.index : -1, &handle));
        return {reinterpret_cast<Value>(handle), "out"};
    }

    [[nodiscard]] Value release() noexcept { return reinterpret_cast<Value>(std::exchange(handle_, nullptr)); }
    [[nodiscard]] std::span<const std::int64_t> sizes() const noexcept { return sizes_; }
    [[nodiscard]] const Device& device() const noexcept { return device_; }

    [[nodiscard]] DType dtype() const {
        for (const auto& [number, dtype] : {std::pair{torch().f32, DType::f32}, std::pair{torch().bf16, DType::bf16},
                                            std::pair{torch().f16, DType::f16}, std::pair{torch().i8, DType::i8},
                                            std::pair{torch().i32, DType::i32}}) {
            if (number == dtype_) return dtype;
        }
        refuse(std::string(name_) + ": expected float32, float16, bfloat16, int8 or int32, got another dtype");
    }

    // All leading dimensions folded into rows; copied where they have no common stride.
    [[nodiscard]] Matrix matrix() {
        if (sizes_.empty()) refuse(std::string(name_) + ": expected at least one dimension, got none");
        if (!folds()) {
            Tensor copy = empty(*this, sizes_);
            check(torch().copy(copy.handle_, handle_, 0));
            *this = std::move(copy);
        }
        Matrix result{.data = data_, .dtype = dtype(), .device = device_, .rows = 1, .cols = sizes_.back()};
        result.col_stride = strides_.back();
        for (std::size_t i = sizes_.size() - 1; i-- > 0;) {
            if (result.rows == 1) result.row_stride = strides_[i];
            result.rows *= sizes_[i];
        }
        return result;
    }

    [[nodiscard]] Vector vector() const {
        if (sizes_.size() != 1)
            refuse(std::string(name_) + ": expected one dimension, got " + std::to_string(sizes_.size()));
        return {.data = data_, .dtype = dtype(), .device = device_, .size = sizes_[0], .stride = strides_[0]};
    }

    // Codes `[n, k]` in packed order.
    [[nodiscard]] ConstMatrix packed(std::int64_t n, std::int64_t k) const {
        const std::int64_t expected[] = {(n + 15) / 16, padded_depth(k) / 4, 16, 4};
        const std::int64_t strides[] = {expected[1] * 64, 64, 4, 1};
        if (!std::ranges::equal(sizes_, expected) ||
            (packed_size(n, k) > 0 && !std::ranges::equal(strides_, strides))) {
            refuse("codes: expected contiguous packed ones of [" + std::to_string(n) + ", " + std::to_string(k) +
                   "], got other ones");
        }
        return {.data = data_, .dtype = dtype(), .device = device_, .rows = n, .cols = k};
    }

private:
    [[nodiscard]] bool folds() const noexcept {
        std::int64_t inner = -1;  // the dimension inside of which the next must lie; of extent 1 they lie anywhere
        for (std::size_t i = sizes_.size() - 1; i-- > 0;) {
            if (sizes_[i] == 1) continue;
            if (inner >= 0 &&
                strides_[i] != strides_[static_cast<std::size_t>(inner)] * sizes_[static_cast<std::size_t>(inner)]) {
                return false;
            }
            inner = static_cast<std::int64_t>(i);
        }
        return true;
    }

    void* handle_ = nullptr;
    const char* name_ = "";
    void* data_ = nullptr;
    std::int32_t dtype_ = 0;
    Device device_{};
    std::span<const std::int64_t> sizes_;
    std::span<const std::int64_t> strides_;
};

std::optional<Tensor> optional_tensor(Value value, const char* name) {
    auto* const held = reinterpret_cast<Value*>(value);
    if (held == nullptr) return std::nullopt;
    const Value handle = *held;
    delete held;
    return Tensor(handle, name);
}

// The elements of a list, which is deleted.
std::vector<Value> elements_of(Value value) {
    auto* const list = reinterpret_cast<void*>(value);
    std::size_t size = 0;
    check(torch().list_size(list, &size));
    std::vector<Value> elements(size);
    for (std::size_t i = 0; i < size; ++i) check(torch().list_item(list, i, &elements[i]));
    check(torch().delete_list(list));
    return elements;
}

Vector vector_or_absent(const std::optional<Tensor>& tensor) { return tensor ? tensor->vector() : absent_vector; }

std::string string_of(Value value) {
    auto* const handle = reinterpret_cast<void*>(value);
    std::size_t length = 0;
    const char* data = nullptr;
    check(torch().string_length(handle, &length));
    check(torch().string_data(handle, &data));
    std::string result(data, length);
    check(torch().delete_string(handle));
    return result;
}

// --- the kernel ------------------------------------------------------------------------------------------------------

// The arguments that an int8 weight is, and what it is multiplied with.
class WeightArguments {
public:
    // From `stack[0]` on: Tensor codes, Tensor scale, Tensor code_sums, Tensor? zeropoint, Tensor? outlier_columns,
    // Tensor? outlier_weight.
    explicit WeightArguments(const Value* stack)
        : codes_(stack[0], "codes"),
          scale_(stack[1], "scale"),
          code_sums_(stack[2], "code_sums"),
          zeropoint_(optional_tensor(stack[3], "zeropoint")),
          outlier_columns_(optional_tensor(stack[4], "outlier_columns")),
          outlier_weight_(optional_tensor(stack[5], "outlier_weight")) {}
    // The same of a list, where none of the first three may be absent.
    explicit WeightArguments(std::optional<Tensor>* arrays)
        : codes_(present(arrays[0], "codes")),
          scale_(present(arrays[1], "scale")),
          code_sums_(present(arrays[2], "code_sums")),
          zeropoint_(std::move(arrays[3])),
          outlier_columns_(std::move(arrays[4])),
          outlier_weight_(std::move(arrays[5])) {}

    [[nodiscard]] std::int64_t out_features() const { return code_sums_.vector().size; }

    [[nodiscard]] WeightView view(const WeightText& text) {
        const QuantizeOptions& options = text.options.quantize;
        const bool is_packed = codes_.sizes().size() == 4;
        const std::int64_t width = rotated_size(text.in_features, options.rotation);
        WeightView weight{.codes = is_packed ? codes_.packed(out_features(), width) : ConstMatrix(codes_.matrix()),
                          .scale = scale_.vector(),
                          .zeropoint = vector_or_absent(zeropoint_),
                          .code_sums = code_sums_.vector(),
                          .outlier_columns = vector_or_absent(outlier_columns_)};
        if (outlier_weight_) weight.outlier_weight = outlier_weight_->matrix();
        weight.scheme = options.scheme;
        weight.granularity = options.granularity;
        weight.rotation = options.rotation;
        weight.k = text.in_features;
        weight.layout = is_packed ? Layout::packed : Layout::row_major;
        return weight;
    }

private:
    static Tensor present(std::optional<Tensor>& array, const char* name) {
        if (!array) refuse(std::string(name) + ": expected a tensor, got None");
        return std::move(*array);
    }

    Tensor codes_;
    Tensor scale_;
    Tensor code_sums_;
    std::optional<Tensor> zeropoint_;
    std::optional<Tensor> outlier_columns_;
    std::optional<Tensor> outlier_weight_;
};

// A new tensor like `x`, its last extent replaced.
Tensor result_like(const Tensor& x, std::int64_t last) {
    std::vector<std::int64_t> sizes(x.sizes().begin(), x.sizes().end());
    if (sizes.empty()) refuse("x: expected at least one dimension, got none");
    sizes.back() = last;
    return Tensor::empty(x, sizes);
}

// Calls `compute(stream)` with PyTorch's stream, memory and threads.
template <class Compute>
void with_torch(const Device& device, const Compute& compute) {
    const FrameworkScratch scratch(Framework::torch, device);
    const ScratchFrom scratch_from(scratch.get());
    Stream stream;
    if (device.kind == DeviceKind::cuda) {
        if (torch().get_current_cuda_stream == nullptr) throw std::runtime_error("octavo::linear: PyTorch has no CUDA");
        check(torch().get_current_cuda_stream(device.index, &stream.handle));
    }
    std::uint32_t threads = 0;
    check(torch().get_num_threads(&threads));
    const ThreadLimit limit(static_cast<int>(threads), run_on_torch_threads);
    compute(stream);
}

// The exceptions of which PyTorch makes a ValueError or a RuntimeError.
template <class Kernel>
Value translated(const Kernel& kernel) {
    try {
        return kernel();
    } catch (const Error& error) {
        if (error.kind() == ErrorKind::device) throw std::runtime_error(error.what());
        throw std::invalid_argument(error.what());
    }
}

// linear(Tensor x, <weight>, Tensor? bias, str options) -> Tensor
void linear_kernel(Value* stack, std::uint64_t /*inputs*/, std::uint64_t /*outputs*/) {
    Tensor x(stack[0], "x");
    WeightArguments weight(stack + 1);
    const auto bias = optional_tensor(stack[7], "bias");
    const std::string options = string_of(stack[8]);
    stack[0] = translated([&] {
        const WeightText text = read_weight_text(options);
        const WeightView view = weight.view(text);
        Tensor out = result_like(x, weight.out_features());
        with_torch(x.device(), [&](Stream stream) {
            octavo::linear(x.matrix(), view, vector_or_absent(bias), out.matrix(), text.options.linear, stream);
        });
        return out.release();
    });
}

// linear_many(Tensor x, Tensor?[] arrays, str options) -> Tensor[]: for each layer its weight and its bias
void linear_many_kernel(Value* stack, std::uint64_t /*inputs*/, std::uint64_t /*outputs*/) {
    constexpr std::size_t of_layer = 7;
    Tensor x(stack[0], "x");
    std::vector<std::optional<Tensor>> arrays;
    for (const Value element : elements_of(stack[1])) arrays.push_back(optional_tensor(element, "arrays"));
    const std::string options = string_of(stack[2]);
    stack[0] = translated([&] {
        if (arrays.size() % of_layer != 0) {
            refuse("arrays: expected seven for each layer, got " + std::to_string(arrays.size()));
        }
        const WeightText text = read_weight_text(options);
        std::vector<WeightArguments> weights;
        std::vector<Tensor> outs;
        std::vector<LinearLayer> layers;
        for (std::size_t i = 0; i < arrays.size(); i += of_layer) {
            WeightArguments& weight = weights.emplace_back(&arrays[i]);
            outs.push_back(result_like(x, weight.out_features()));
            layers.push_back({weight.view(text), vector_or_absent(arrays[i + of_layer - 1]), outs.back().matrix()});
        }
        with_torch(x.device(),
                   [&](Stream stream) { octavo::linear_many(x.matrix(), layers, text.options.linear, stream); });
        void* list = nullptr;
        check(torch().new_list(outs.size(), &list));
        for (Tensor& out : outs) check(torch().append(list, out.release()));
        return reinterpret_cast<Value>(list);
    });
}

// linear_backward(Tensor grad, <weight>, str options) -> Tensor
void linear_backward_kernel(Value* stack, std::uint64_t /*inputs*/, std::uint64_t /*outputs*/) {
    Tensor grad(stack[0], "grad");
    WeightArguments weight(stack + 1);
    const std::string options = string_of(stack[7]);
    stack[0] = translated([&] {
        const WeightText text = read_weight_text(options);
        const WeightView view = weight.view(text);
        Tensor out = result_like(grad, text.in_features);
        with_torch(grad.device(), [&](Stream stream) {
            octavo::linear_backward(grad.matrix(), view, out.matrix(), text.options.linear, stream);
        });
        return out.release();
    });
}

}  // namespace

namespace {
PyObject* recorded_linear = nullptr;  // held for as long as the process runs
}

py::handle recorded_torch_linear() { return recorded_linear; }

void register_torch_operations(const py::function& recorded) {
    if (torch().missing != nullptr) {
        throw py::import_error(std::string("octavo.torch: expected PyTorch 2.10 or later, got one without ") +
                               torch().missing);
    }
    recorded_linear = py::object(recorded).release().ptr();
    for (const char* const key : {"CPU", "CUDA"}) {
        void* library = nullptr;  // never deleted: it is registered for as long as the process runs
        check(torch().library_init("octavo", key, __FILE__, __LINE__, &library));
        check(torch().library_impl(library, "linear", linear_kernel, torch_2_10));
        check(torch().library_impl(library, "linear_many", linear_many_kernel, torch_2_10));
        check(torch().library_impl(library, "linear_backward", linear_backward_kernel, torch_2_10));
    }
}

}  // namespace octavo::python
