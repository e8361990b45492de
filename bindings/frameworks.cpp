#include "bindings/frameworks.hpp"

#include <dlfcn.h>
#include <pybind11/numpy.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <mutex>
#include <string_view>

#include "bindings/torch_api.hpp"

namespace octavo::python {
namespace {

py::object interned(const char* text) { return py::reinterpret_steal<py::object>(PyUnicode_InternFromString(text)); }

// Objects of the frameworks that are looked up once. A framework is imported by whoever made the array, so looking one
// up costs no import of our own. They are never destroyed: the interpreter may be gone before they would be.
struct TorchNames {
    py::object torch = py::module_::import("torch");
    py::object tensor = torch.attr("Tensor");
    py::object dispatch = tensor.attr("__torch_dispatch__");
    py::object strided = torch.attr("strided");
    // Of its C interface, which is faster than Python's functions; null in versions before it.
    const TorchApi& api = torch_api();
    py::object is_grad_enabled = torch.attr("is_grad_enabled");
    py::object get_num_threads = torch.attr("get_num_threads");
    py::object new_empty = tensor.attr("new_empty");  // unbound: of any tensor
    py::object forward_ad = py::module_::import("torch.autograd.forward_ad");
    py::object forward_level = interned("_current_level");
    // Each true of a tensor, or where anything is active, that an operation must not go past the dispatcher.
    py::object has_torch_function = torch.attr("_C").attr("_has_torch_function_unary");
    py::object dispatch_modes = torch.attr("_C").attr("_len_torch_dispatch_stack");
    py::object are_transforms_active = torch.attr("_C").attr("_are_functorch_transforms_active");
    py::object is_tracing = torch.attr("_C").attr("_is_tracing");
    py::object is_autocast_enabled = torch.attr("_C").attr("_is_any_autocast_enabled");
    py::object dtype_keyword = py::make_tuple(interned("dtype"));
    py::object requires_grad = interned("requires_grad");
    py::object is_neg = tensor.attr("is_neg");  // unbound, too
    py::object version = py::module_::import("inspect").attr("getattr_static")(tensor, "_version");
    py::object is_inference_mode_enabled = torch.attr("is_inference_mode_enabled");
    // In the order of octavo::DType.
    std::array<py::object, 5> dtypes{torch.attr("float32"), torch.attr("float16"), torch.attr("bfloat16"),
                                     torch.attr("int8"), torch.attr("int32")};
    const DLPackExchangeAPI* exchange = find_exchange(tensor);

    static const DLPackExchangeAPI* find_exchange(const py::object& tensor_type) {
        if (!py::hasattr(tensor_type, "__dlpack_c_exchange_api__")) return nullptr;
        const py::capsule capsule = tensor_type.attr("__dlpack_c_exchange_api__");
        const auto* api =
            static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
        if (api == nullptr) throw py::error_already_set();
        return api->header.version.major == 1 ? api : nullptr;
    }
};

struct TorchModuleNames {
    py::module_ module = py::module_::import("torch.nn.modules.module");
    py::object type = module.attr("Module");
    py::handle entries = reinterpret_cast<PyTypeObject*>(type.ptr())->tp_dict;
    py::object call_name = interned("__call__");
    py::object call = type.attr("__call__");
    py::object parameters = interned("_parameters");
    py::object weight = interned("weight");
    py::object bias = interned("bias");
    // Of a layer: what it has in place of its class's; empty without hooks; and of all modules, the same.
    std::array<py::object, 3> replaced{interned("forward"), interned("_call_impl"), interned("_compiled_call_impl")};
    std::array<py::object, 4> hooks{interned("_forward_hooks"), interned("_forward_pre_hooks"),
                                    interned("_backward_hooks"), interned("_backward_pre_hooks")};
    std::array<py::object, 4> all_hooks{module.attr("_global_forward_hooks"), module.attr("_global_forward_pre_hooks"),
                                        module.attr("_global_backward_hooks"),
                                        module.attr("_global_backward_pre_hooks")};
};

struct NumpyNames {
    py::module_ numpy = py::module_::import("numpy");
    py::object array = numpy.attr("ndarray");
    py::object masked_array = numpy.attr("ma").attr("MaskedArray");
    py::object empty = numpy.attr("empty");
    // In the order of octavo::DType; bfloat16 is not NumPy's own.
    std::array<py::object, 5> dtypes{numpy.attr("dtype")("float32"), numpy.attr("dtype")("float16"), py::none(),
                                     numpy.attr("dtype")("int8"), numpy.attr("dtype")("int32")};
};

// The package that gives NumPy bfloat16.
struct MlDtypes {
    py::object bfloat16 = find();

    static py::object find() {
        try {
            return py::dtype::from_args(py::module_::import("ml_dtypes").attr("bfloat16"));
        } catch (py::error_already_set& error) {
            if (!error.matches(PyExc_ImportError)) throw;
            throw py::type_error("octavo: NumPy has bfloat16 only where the package ml_dtypes is installed");
        }
    }
};

struct CupyNames {
    py::module_ cupy = py::module_::import("cupy");
    py::object empty = cupy.attr("empty");
    py::object device = cupy.attr("cuda").attr("Device");
    py::object current_stream = cupy.attr("cuda").attr("get_current_stream");
    py::object alloc = cupy.attr("cuda").attr("alloc");
    // In the order of octavo::DType; CuPy has no bfloat16.
    std::array<py::object, 5> dtypes{cupy.attr("dtype")("float32"), cupy.attr("dtype")("float16"), py::none(),
                                     cupy.attr("dtype")("int8"), cupy.attr("dtype")("int32")};
};

template <class Names>
const Names& names() {
    PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<Names> storage;
    return storage.call_once_and_store_result([] { return Names(); }).get_stored();
}

bool is_true(const py::object& object) { return object.ptr() == Py_True; }

// What a function without arguments returns.
py::object call(const py::object& function) { return checked(PyObject_CallNoArgs(function.ptr())); }

py::object attribute(py::handle object, const py::object& name) {
    return checked(PyObject_GetAttr(object.ptr(), name.ptr()));
}

// The entry of a dictionary, or nothing.
py::object entry(py::handle dict, const py::object& name) {
#if PY_VERSION_HEX >= 0x030D0000
    PyObject* found = nullptr;
    if (PyDict_GetItemRef(dict.ptr(), name.ptr(), &found) < 0) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(found);
#else
    PyObject* const found = PyDict_GetItemWithError(dict.ptr(), name.ptr());
    if (found == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
    return py::reinterpret_borrow<py::object>(found);
#endif
}

bool has(py::handle dict, const py::object& name) {
    const py::object found = entry(dict, name);
    return found && !found.is_none();
}

bool is_empty_dict(const py::object& object) {
    return object && PyDict_Check(object.ptr()) != 0 && PyDict_Size(object.ptr()) == 0;
}

// A module that somebody has imported, or nothing.
py::object loaded(const char* module) {
    PyObject* const found = PyImport_GetModule(py::str(module).ptr());
    if (found == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(found);
}

// Whether `type` is derived from the class that a loaded module has under that name.
bool derives(py::handle type, const char* module, const char* name) {
    const py::object found = loaded(module);
    if (!found || !py::hasattr(found, name)) return false;
    const py::object base = found.attr(name);
    return PyType_Check(base.ptr()) != 0 && PyType_IsSubtype(reinterpret_cast<PyTypeObject*>(type.ptr()),
                                                             reinterpret_cast<PyTypeObject*>(base.ptr())) != 0;
}

TypeFacts examine(py::handle type) {
    if (derives(type, "numpy", "ndarray")) {
        return {Framework::numpy, PyObject_IsSubclass(type.ptr(), names<NumpyNames>().masked_array.ptr()) == 0};
    }
    if (derives(type, "torch", "Tensor")) {
        return {Framework::torch, py::object(type.attr("__torch_dispatch__")).is(names<TorchNames>().dispatch)};
    }
    if (derives(type, "cupy", "ndarray")) return {Framework::cupy, true};
    if (type.is(py::type::of<OwnArray>())) return {Framework::own, true};
    if (py::hasattr(type, "__dlpack__") && py::hasattr(type, "__dlpack_device__")) return {Framework::other, true};
    return {};
}

// How the other frameworks take an array over: the loaded module that their arrays' types come from, and the function.
struct Takeover {
    std::string_view root;  // of the type's module
    const char* module;
    const char* function;
    bool takes_capsule;  // of DLPack before 1.0, instead of an object that gives one
};
constexpr std::array takeovers{
    Takeover{"jaxlib", "jax.dlpack", "from_dlpack", false},
    Takeover{"tensorflow", "tensorflow.experimental.dlpack", "from_dlpack", true},
    Takeover{"paddle", "paddle", "from_dlpack", false},
    Takeover{"tvm_ffi", "tvm_ffi", "from_dlpack", false},
};

py::object allocate_numpy(const Shape& shape, DType dtype) {
    const auto& numpy = names<NumpyNames>();
    const py::tuple extents = to_tuple(shape);
    const py::object element =
        dtype == DType::bf16 ? names<MlDtypes>().bfloat16 : numpy.dtypes[static_cast<std::size_t>(dtype)];
    PyObject* const arguments[] = {extents.ptr(), element.ptr()};
    return checked(PyObject_Vectorcall(numpy.empty.ptr(), arguments, 2, nullptr));
}

// What `make` gives with a device as CuPy's current one.
template <class Make>
py::object on_cupy_device(Device where, const Make& make) {
    const auto& cupy = names<CupyNames>();
    const py::object outer = cupy.device();
    const py::object device = cupy.device(where.index);
    device.attr("use")();
    py::object result;
    try {
        result = make(cupy);
    } catch (...) {
        outer.attr("use")();
        throw;
    }
    outer.attr("use")();
    return result;
}

py::object allocate_cupy(Device where, const Shape& shape, DType dtype) {
    if (dtype == DType::bf16) throw py::type_error("CuPy has no bfloat16; expected dtype float32 or float16");
    return on_cupy_device(where, [&](const CupyNames& cupy) {
        const py::tuple extents = to_tuple(shape);
        PyObject* const arguments[] = {extents.ptr(), cupy.dtypes[static_cast<std::size_t>(dtype)].ptr()};
        return checked(PyObject_Vectorcall(cupy.empty.ptr(), arguments, 2, nullptr));
    });
}

// like.new_empty(*shape, dtype=dtype). Of PyTorch's ways this is the cheapest that keeps its rules (device, mode,
// resizable storage); a tuple of extents costs it 350 ns more, dtype another 150.
py::object allocate_torch(py::handle like, const Shape& shape, DType like_dtype, DType dtype) {
    const auto& torch = names<TorchNames>();
    SmallArray<PyObject*> arguments(shape.size() + 2);
    arguments[0] = like.ptr();
    for (std::size_t i = 0; i < shape.size(); ++i) arguments[i + 1] = py::int_(shape[i]).release().ptr();
    arguments.back() = torch.dtypes[static_cast<std::size_t>(dtype)].ptr();
    PyObject* const keywords = dtype == like_dtype ? nullptr : torch.dtype_keyword.ptr();
    PyObject* const result = PyObject_Vectorcall(torch.new_empty.ptr(), arguments.begin(), shape.size() + 1, keywords);
    for (std::size_t i = 0; i < shape.size(); ++i) Py_DECREF(arguments[i + 1]);
    if (result == nullptr && PyErr_ExceptionMatches(PyExc_RuntimeError) != 0) {
        py::raise_from(PyExc_MemoryError, "octavo: PyTorch cannot allocate the result");
    }
    return checked(result);
}

}  // namespace

TypeFacts facts_of(py::handle object) {
    // Remembered for the few types that a program uses. The types are kept alive, so that no other type can come to
    // have the address of one of them. Entries are only ever added, so that readers need no lock.
    struct Entry {
        PyTypeObject* type;
        TypeFacts facts;
    };
    static std::array<Entry, 64> entries;
    static std::atomic<std::size_t> count{0};
    static std::mutex adding;
    PyTypeObject* const type = Py_TYPE(object.ptr());
    const std::size_t known = count.load(std::memory_order_acquire);
    for (std::size_t i = 0; i < known; ++i) {
        if (entries[i].type == type) return entries[i].facts;
    }
    const TypeFacts facts = examine(reinterpret_cast<PyObject*>(type));
    if (!facts.framework) return facts;  // its framework may be half imported
    const std::lock_guard lock(adding);
    const std::size_t next = count.load(std::memory_order_relaxed);
    if (next < entries.size()) {
        Py_INCREF(type);
        entries[next] = {type, facts};
        count.store(next + 1, std::memory_order_release);
    }
    return facts;
}

void* symbol_of(const char* library, const char* name) {
    void* const handle = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
    return handle == nullptr ? nullptr : dlsym(handle, name);
}

std::string type_name(py::handle object) {
    const py::handle type = reinterpret_cast<PyObject*>(Py_TYPE(object.ptr()));
    const auto module = py::str(type.attr("__module__")).cast<std::string>();
    const auto name = py::str(type.attr("__qualname__")).cast<std::string>();
    return module == "builtins" ? name : module + "." + name;
}

py::object checked(PyObject* result) {
    if (result == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(result);
}

py::tuple to_tuple(const Shape& shape) {
    py::tuple result(shape.size());
    for (std::size_t i = 0; i < shape.size(); ++i) result[i] = py::int_(shape[i]);
    return result;
}

std::optional<DType> dtype_of(const py::dtype& dtype) {
    constexpr int numpy_half = 23;                                                  // NPY_HALF
    constexpr int first_user_dtype = 256;                                           // NPY_USERDEF
    if (dtype.byteorder() == '>' || dtype.byteorder() == '<') return std::nullopt;  // native is '=' or '|'
    const int number = dtype.normalized_num();
    if (number == py::dtype::num_of<float>()) return DType::f32;
    if (number == numpy_half) return DType::f16;
    if (number == py::dtype::num_of<std::int8_t>()) return DType::i8;
    if (number == py::dtype::num_of<std::int32_t>()) return DType::i32;
    if (number >= first_user_dtype && loaded("ml_dtypes") && dtype.is(names<MlDtypes>().bfloat16)) return DType::bf16;
    return std::nullopt;
}

const DLPackExchangeAPI* torch_exchange() { return names<TorchNames>().exchange; }

bool torch_requires_grad(py::handle tensor) { return is_true(attribute(tensor, names<TorchNames>().requires_grad)); }

bool torch_records(py::handle tensor, py::handle other) {
    const auto& torch = names<TorchNames>();
    const bool has_other = !other.is_none();
    const bool enabled =
        torch.api.is_grad_enabled != nullptr ? torch.api.is_grad_enabled() : is_true(call(torch.is_grad_enabled));
    if (enabled && (torch_requires_grad(tensor) || (has_other && torch_requires_grad(other)))) return true;
    if (PyLong_AsLong(attribute(torch.forward_ad, torch.forward_level).ptr()) < 0) return false;
    const py::object unpack = torch.forward_ad.attr("unpack_dual");
    return !unpack(tensor).attr("tangent").is_none() || (has_other && !unpack(other).attr("tangent").is_none());
}

bool torch_is_plain_below_autograd(py::handle tensor) {
    const auto& torch = names<TorchNames>();
    return py::type::handle_of(tensor).is(torch.tensor) && PyLong_AsLong(call(torch.dispatch_modes).ptr()) == 0 &&
           !is_true(call(torch.are_transforms_active));
}

bool torch_is_plain(py::handle tensor) {
    const auto& torch = names<TorchNames>();
    PyObject* const arguments[] = {tensor.ptr()};
    return torch_is_plain_below_autograd(tensor) &&
           !is_true(checked(PyObject_Vectorcall(torch.has_torch_function.ptr(), arguments, 1, nullptr))) &&
           !is_true(call(torch.is_tracing)) && !is_true(call(torch.is_autocast_enabled));
}

bool torch_calls_forward_alone(py::handle module) {
    const auto& known = names<TorchModuleNames>();
    if (!entry(known.entries, known.call_name).is(known.call)) return false;
    if (!std::ranges::all_of(known.all_hooks, is_empty_dict)) return false;
    const py::object own = checked(PyObject_GenericGetDict(module.ptr(), nullptr));
    return std::ranges::none_of(known.replaced, [&](const py::object& name) { return has(own, name); }) &&
           std::ranges::all_of(known.hooks, [&](const py::object& name) { return is_empty_dict(entry(own, name)); });
}

std::optional<TorchParameters> torch_parameters(py::handle layer) {
    const auto& known = names<TorchModuleNames>();
    const py::object parameters = entry(checked(PyObject_GenericGetDict(layer.ptr(), nullptr)), known.parameters);
    if (!parameters || PyDict_Check(parameters.ptr()) == 0) return std::nullopt;
    TorchParameters result{entry(parameters, known.weight), entry(parameters, known.bias)};
    if (!result.weight || !result.bias) return std::nullopt;  // pruned or parametrized
    return result;
}

// As that of `x.conj().imag` does.
bool torch_is_negated(py::handle tensor) {
    PyObject* const arguments[] = {tensor.ptr()};
    return is_true(checked(PyObject_Vectorcall(names<TorchNames>().is_neg.ptr(), arguments, 1, nullptr)));
}

std::optional<std::int64_t> torch_version(py::handle tensor) {
    // Of the property itself: to look it up costs as much again.
    const py::handle property = names<TorchNames>().version;
    PyObject* const version = Py_TYPE(property.ptr())->tp_descr_get(property.ptr(), tensor.ptr(), nullptr);
    if (version == nullptr) PyErr_Clear();
    const auto held = py::reinterpret_steal<py::object>(version);
    return held ? std::optional(PyLong_AsLongLong(held.ptr())) : std::nullopt;
}

std::optional<TorchMark> torch_mark(py::handle tensor) {
    const DLPackExchangeAPI* const exchange = torch_exchange();
    const std::optional<std::int64_t> version = torch_version(tensor);
    DLTensor memory{};
    if (!version || exchange == nullptr) return std::nullopt;
    if (exchange->dltensor_from_py_object_no_sync(tensor.ptr(), &memory) != 0) {
        PyErr_Clear();
        return std::nullopt;
    }
    return TorchMark{*version, static_cast<const char*>(memory.data) + memory.byte_offset};
}

bool torch_is_inferring() { return is_true(call(names<TorchNames>().is_inference_mode_enabled)); }

bool torch_is_dense(py::handle tensor) { return py::object(tensor.attr("layout")).is(names<TorchNames>().strided); }

py::object allocate(Framework framework, py::handle like, Device device, const Shape& shape, DType like_dtype,
                    DType dtype) {
    switch (framework) {
        case Framework::numpy: return allocate_numpy(shape, dtype);
        case Framework::torch: return allocate_torch(like, shape, like_dtype, dtype);
        case Framework::cupy: return allocate_cupy(device, shape, dtype);
        case Framework::own:
        case Framework::other: break;
    }
    if (device.kind != DeviceKind::cpu) {
        throw py::value_error("octavo: expected arrays of PyTorch or CuPy on a CUDA device, where it cannot make a " +
                              type_name(like));
    }
    return py::cast(std::make_shared<OwnArray>(shape, dtype));
}

py::object cupy_memory(Device device, std::size_t size) {
    return on_cupy_device(device, [&](const CupyNames& cupy) { return cupy.alloc(size); });
}

py::object handed_over(const py::object& own, py::handle like) {
    const auto module = py::str(py::type::handle_of(like).attr("__module__")).cast<std::string>();
    const std::string_view root = std::string_view(module).substr(0, module.find('.'));
    for (const Takeover& takeover : takeovers) {
        if (root != takeover.root || !loaded(std::string(root).c_str())) continue;
        const py::object take = py::module_::import(takeover.module).attr(takeover.function);
        return takeover.takes_capsule ? take(own.attr("__dlpack__")()) : take(own);
    }
    return own;
}

Stream stream_of(Framework framework, Device device) {
    if (device.kind == DeviceKind::cpu) return {};
    if (framework == Framework::cupy) {
        const py::object stream = names<CupyNames>().current_stream(device.index);
        return {reinterpret_cast<void*>(stream.attr("ptr").cast<std::uintptr_t>())};
    }
    if (framework != Framework::torch) return {};  // CUDA's default stream
    const auto& torch = names<TorchNames>();
    if (torch.exchange == nullptr) {
        const py::object current = torch.torch.attr("cuda").attr("current_stream")(device.index);
        return {reinterpret_cast<void*>(current.attr("cuda_stream").cast<std::uintptr_t>())};
    }
    constexpr std::int32_t cuda = 2;
    void* stream = nullptr;
    if (torch.exchange->current_work_stream(cuda, device.index, &stream) != 0) throw py::error_already_set();
    return {stream};
}

int threads_of(Framework framework) {
    if (framework != Framework::torch) return 0;
    const auto& torch = names<TorchNames>();
    std::uint32_t count = 0;
    if (torch.api.get_num_threads != nullptr && torch.api.get_num_threads(&count) == 0) {
        return static_cast<int>(count);
    }
    return static_cast<int>(PyLong_AsLong(call(torch.get_num_threads).ptr()));
}

}  // namespace octavo::python
