// Each operation: read the arguments, allocate results in the caller's framework, call the core.
// The documentation is that of python/octavo/functional.py, which adds defaults and keywords.
//
// The operations are CPython's own functions of positional arguments (METH_FASTCALL), not pybind11's: reading arguments
// is most of what a small product costs, and pybind11's dispatch alone would double it.
#include "bindings/ops.hpp"

#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <span>
#include <stdexcept>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "bindings/errors.hpp"
#include "bindings/interpreter.hpp"
#include "bindings/scratch.hpp"
#include "bindings/shared_input.hpp"
#include "bindings/tensor.hpp"
#include "bindings/torch_api.hpp"
#include "bindings/torch_op.hpp"
#include "octavo/octavo.hpp"

namespace octavo::python {
namespace {

// --- names of schemes and policies -----------------------------------------------------------------------------------

template <class Value>
struct Name {
    std::string_view name;
    Value value;
};

constexpr std::array schemes{Name{"absmax", Scheme::absmax}, Name{"zeropoint", Scheme::zeropoint}};
constexpr std::array granularities{Name{"tensor", Granularity::tensor}, Name{"row", Granularity::row},
                                   Name{"vector", Granularity::vector}};
constexpr std::array outlier_policies{Name{"columns", Outliers::columns}, Name{"rows", Outliers::rows},
                                      Name{"static", Outliers::static_}, Name{"none", Outliers::none}};
constexpr std::array paths{Name{"auto", Path::auto_}, Name{"int8", Path::int8}, Name{"weight_only", Path::weight_only}};
constexpr std::array float_dtypes{Name{"float32", DType::f32}, Name{"float16", DType::f16},
                                  Name{"bfloat16", DType::bf16}};

template <class Value, std::size_t count>
Value parse(const std::array<Name<Value>, count>& allowed, py::handle given, Argument argument) {
    std::string expected;
    const bool is_text = PyUnicode_Check(given.ptr()) != 0;
    if (is_text) {
        Py_ssize_t size = 0;
        const char* const text = PyUnicode_AsUTF8AndSize(given.ptr(), &size);  // kept by the string: no copy
        if (text == nullptr) PyErr_Clear();                                    // lone surrogates: no name has them
        for (const auto& entry : allowed) {
            if (text != nullptr && entry.name == std::string_view(text, static_cast<std::size_t>(size))) {
                return entry.value;
            }
        }
    }
    for (const auto& entry : allowed) expected += (expected.empty() ? "'" : ", '") + std::string(entry.name) + "'";
    const std::string message = std::string(argument.function) + ": " + argument.name + ": expected one of " +
                                expected + ", got " + py::repr(given).cast<std::string>();
    if (!is_text) throw py::type_error(message);
    throw py::value_error(message);
}

// A Python number. (As a float32 a double beyond its range becomes Inf, which as a threshold means the same.)
double parse_number(py::handle given, Argument argument) {
    const double value = PyFloat_AsDouble(given.ptr());
    if (value == -1.0 && PyErr_Occurred() != nullptr) {
        PyErr_Clear();
        throw py::type_error(std::string(argument.function) + ": " + argument.name + ": expected a number, got " +
                             py::repr(given).cast<std::string>());
    }
    return value;
}

std::int64_t parse_extent(py::handle given, Argument argument) {
    const long long value = PyLong_AsLongLong(given.ptr());
    if (value < 0) {
        const bool is_integer = PyLong_Check(given.ptr()) != 0;
        PyErr_Clear();  // of what is no integer, or too large for this one
        const std::string message = std::string(argument.function) + ": " + argument.name +
                                    ": expected an integer from 0 to 2^63 - 1, got " +
                                    py::repr(given).cast<std::string>();
        if (is_integer) throw py::value_error(message);
        throw py::type_error(message);
    }
    return value;
}

// A number, or None for `absent`.
double parse_optional(py::handle given, double absent, Argument argument) {
    return given.is_none() ? absent : parse_number(given, argument);
}

// --- options ---------------------------------------------------------------------------------------------------------

// octavo.Options, read and checked once: what a weight is quantized with, and what products are made with.
class Options {
public:
    Options(py::handle scheme, py::handle granularity, py::handle rotation, py::handle outliers, py::handle threshold,
            py::handle relative, py::handle cap, py::handle path)
        : quantize{.scheme = parse(schemes, scheme, {function, "scheme"}),
                   .granularity = parse(granularities, granularity, {function, "granularity"}),
                   .rotation = parse_rotation(rotation)},
          linear{.threshold = static_cast<float>(parse_number(threshold, {function, "threshold"})),
                 .relative = static_cast<float>(parse_optional(relative, 0.0, {function, "relative"})),
                 .cap = parse_optional(cap, 1.0, {function, "cap"}),
                 .outliers = parse(outlier_policies, outliers, {function, "outliers"}),
                 .path = parse(paths, path, {function, "path"})} {
        octavo::check_options(linear, function);
    }

    QuantizeOptions quantize;
    LinearOptions linear;

private:
    static constexpr auto function = "Options";

    static std::int32_t parse_rotation(py::handle given) {
        if (PyLong_Check(given.ptr()) == 0) {
            throw py::type_error("Options: rotation: expected an integer, got " + py::repr(given).cast<std::string>());
        }
        const long value = PyLong_AsLong(given.ptr());
        if (value == -1) PyErr_Clear();  // also of an integer that is too large for it
        for (const std::int32_t rotation : {0, 16, 64, 256}) {
            if (value == rotation) return rotation;
        }
        throw py::value_error("Options: rotation: expected 0, 16, 64 or 256, got " +
                              py::repr(given).cast<std::string>());
    }
};

// An instance of one of this module's classes, as C++. pybind11's cast, which also finds the bases of an object, costs
// 40 ns; the classes are final and have none. `expected` is what users call it.
template <class Class>
const Class& instance_of(py::handle object, Argument argument, const char* expected) {
    static const py::handle type = py::type::of<Class>().release();
    const bool is_instance = py::type::handle_of(object).is(type);
    const Class* const instance =
        is_instance ? reinterpret_cast<py::detail::instance*>(object.ptr())->get_value_and_holder().value_ptr<Class>()
                    : nullptr;
    if (instance != nullptr) return *instance;
    throw py::type_error(std::string(argument.function) + ": " + argument.name + ": expected an " + expected +
                         ", got " + (is_instance ? "one without __init__" : Py_TYPE(object.ptr())->tp_name));
}

const Options& options_of(py::handle object, const char* function) {
    return instance_of<Options>(object, {function, "options"}, "Options");
}

// --- arrays ----------------------------------------------------------------------------------------------------------

std::optional<Array> optional_array(py::handle object, Argument argument, Use use = Use::read) {
    if (object.is_none()) return std::nullopt;
    return std::make_optional<Array>(object, argument, use);
}

Vector vector_or_absent(const std::optional<Array>& array) { return array ? array->vector() : absent_vector; }

py::object result_or_none(const std::optional<Array>& array, const Array& like) {
    return array ? result_of(*array, like) : py::none();
}

// The shape of `x` with its last dimension replaced.
Shape with_last(const Array& x, std::int64_t last) {
    Shape shape = x.shape();
    shape.back() = last;
    return shape;
}

// The shape of one value per row of `x`: a rank-1 array is one row.
Shape per_row(const Array& x) {
    if (x.shape().size() == 1) return {1};
    Shape shape = x.shape();
    shape.pop_back();
    return shape;
}

// All elements of an array that `allocate` made.
Vector flat_output(const Array& array) {
    std::int64_t size = 1;
    for (const auto extent : array.shape()) size *= extent;
    return {.data = array.mutable_matrix().data, .dtype = array.dtype(), .device = array.device(), .size = size};
}

std::string text_of(const Shape& shape) {
    std::string joined;
    for (const auto extent : shape) joined += (joined.empty() ? "" : ", ") + std::to_string(extent);
    return "[" + joined + "]";
}

void need_rank(const Array& array, Argument argument, std::size_t rank) {
    if (array.shape().size() == rank) return;
    throw py::value_error(std::string(argument.function) + ": " + argument.name + ": expected an array of rank " +
                          std::to_string(rank) + ", got rank " + std::to_string(array.shape().size()));
}

// The shape of codes `[n, k]` in packed order: packed_size(n, k) bytes.
Shape packed_shape(std::int64_t n, std::int64_t k) { return {(n + 15) / 16, padded_depth(k) / 4, 16, 4}; }

// An array of that shape, contiguous, as the core takes it.
ConstVector packed_codes(const Array& array, std::int64_t n, std::int64_t k, Argument argument) {
    const Shape expected = packed_shape(n, k);
    if (array.shape() != expected || !array.is_contiguous()) {
        throw py::value_error(std::string(argument.function) + ": " + argument.name + ": expected a contiguous array " +
                              text_of(expected) + " for codes " + text_of({n, k}) + ", got " +
                              (array.is_contiguous() ? "" : "one that is not contiguous, ") + text_of(array.shape()));
    }
    return {.data = array.data(), .dtype = array.dtype(), .device = array.device(), .size = packed_size(n, k)};
}

// --- the core's calls ------------------------------------------------------------------------------------------------

// What one row of `a` costs for each of `b`, or, without one, what the elements of `a` cost.
double work_of(const ConstMatrix& a, std::int64_t b_rows = 1) {
    const auto at_least_one = [](std::int64_t extent) {
        return static_cast<double>(std::max<std::int64_t>(extent, 1));
    };
    return at_least_one(a.rows) * at_least_one(a.cols) * at_least_one(b_rows);
}

// Call the core: on the stream of `array`'s framework, with as many threads as it is set to use, and without the
// interpreter's lock, except for so little work (a few microseconds even with the scalar kernels) that another thread
// would hardly get to run in that time: giving the lock away and taking it back costs 50 ns alone, and with threads
// that wait for it a change of threads.
template <class Call>
void run(const Array& array, double work, const Call& call) {
    constexpr double small = 1 << 12;
    const FrameworkScratch scratch(array.framework(), array.device());
    const ScratchFrom scratch_from(scratch.get());
    const Stream stream = array.stream();
    const bool is_torch = array.framework() == Framework::torch;
    const ThreadLimit limit(threads_of(array.framework()), is_torch ? run_on_torch_threads : nullptr);
    if (work <= small) return call(stream);
    without_lock([&] { call(stream); });
}

// The result of an operation: the caller's `out`, or a new array. Memory that the core cannot write as a matrix (its
// leading dimensions have no common stride) is written through a temporary.
class Output {
public:
    Output(py::handle out, const Array& like, const Shape& shape, DType dtype, Argument argument)
        : like_(like), given_(optional_array(out, argument, Use::write)) {
        if (given_ && given_->shape() != shape) {
            throw py::value_error(std::string(argument.function) + ": " + argument.name + ": expected shape " +
                                  text_of(shape) + ", got " + text_of(given_->shape()));
        }
        if (given_ && given_->can_be_matrix()) return;
        if (given_ && given_->framework() == Framework::other) {
            throw py::value_error(std::string(argument.function) + ": " + argument.name +
                                  ": expected leading dimensions of one stride, got others");
        }
        fresh_.emplace(allocate(like, shape, given_ ? given_->dtype() : dtype), argument, Use::fresh);
    }

    [[nodiscard]] Matrix matrix() const { return fresh_ ? fresh_->mutable_matrix() : given_->mutable_matrix(); }

    [[nodiscard]] py::object finish() const {
        if (!given_) return result_of(*fresh_, like_);
        if (fresh_) given_->object()[py::ellipsis()] = fresh_->object();
        return given_->object();
    }

private:
    const Array& like_;
    std::optional<Array> given_;
    std::optional<Array> fresh_;
};

// --- operations ------------------------------------------------------------------------------------------------------

py::object quantize_op(py::handle x_object, py::handle options_object, py::handle exclude) {
    constexpr auto function = "quantize";
    Array x(x_object, {function, "x"}, Use::differentiable);
    const QuantizeOptions& options = options_of(options_object, function).quantize;
    const auto columns = optional_array(exclude, {function, "exclude", "int32", &x});
    const ConstMatrix source = x.matrix();
    const Shape groups = options.granularity == Granularity::tensor ? Shape{1} : per_row(x);

    const Array codes(allocate(x, with_last(x, rotated_size(source.cols, options.rotation)), DType::i8),
                      {function, "codes"});
    const Array scale(allocate(x, groups, DType::f32), {function, "scale"});
    std::optional<Array> zeropoint;
    if (options.scheme == Scheme::zeropoint) {
        zeropoint.emplace(allocate(x, groups, DType::f32), Argument{function, "zeropoint"});
    }
    run(x, work_of(source), [&](Stream stream) {
        octavo::quantize(source, options, vector_or_absent(columns), codes.mutable_matrix(), flat_output(scale),
                         zeropoint ? flat_output(*zeropoint) : absent_vector, stream);
    });
    return py::make_tuple(result_of(codes, x), result_of(scale, x), result_or_none(zeropoint, x));
}

py::object quantize_weight_op(py::handle weight_object, py::handle options_object) {
    constexpr auto function = "quantize_weight";
    Array weight(weight_object, {function, "weight"});
    need_rank(weight, {function, "weight"}, 2);
    const QuantizeOptions& options = options_of(options_object, function).quantize;
    const ConstMatrix source = weight.matrix();
    const Shape groups{options.granularity == Granularity::vector ? source.rows : 1};

    const Array codes(allocate(weight, {source.rows, rotated_size(source.cols, options.rotation)}, DType::i8),
                      {function, "codes"});
    const Array scale(allocate(weight, groups, DType::f32), {function, "scale"});
    const Array code_sums(allocate(weight, {source.rows}, DType::i32), {function, "code_sums"});
    std::optional<Array> zeropoint;
    if (options.scheme == Scheme::zeropoint) {
        zeropoint.emplace(allocate(weight, groups, DType::f32), Argument{function, "zeropoint"});
    }
    run(weight, work_of(source), [&](Stream stream) {
        octavo::quantize_weight(source, options, codes.mutable_matrix(), scale.vector(), vector_or_absent(zeropoint),
                                code_sums.vector(), stream);
    });
    return py::make_tuple(result_of(codes, weight), result_of(scale, weight), result_or_none(zeropoint, weight),
                          result_of(code_sums, weight));
}

// As quantize_weight, into the arrays of a weight: codes [n, k'] or, in CPU memory, packed. Nothing is allocated.
py::object requantize_op(py::handle weight_object, py::handle options_object, py::handle codes_object,
                         py::handle scale_object, py::handle zeropoint_object, py::handle code_sums_object,
                         py::handle seed_object, py::handle enqueue_object) {
    constexpr auto function = "quantize_weight";
    Array weight(weight_object, {function, "weight"});
    need_rank(weight, {function, "weight"}, 2);
    const QuantizeOptions& options = options_of(options_object, function).quantize;
    const ConstMatrix source = weight.matrix();
    const Array codes(codes_object, {function, "out.codes", "int8", &weight}, Use::write);
    const Array scale(scale_object, {function, "out.scale", "float32", &weight}, Use::write);
    const auto zeropoint =
        optional_array(zeropoint_object, {function, "out.zeropoint", "float32", &weight}, Use::write);
    const Array code_sums(code_sums_object, {function, "out.code_sums", "int32", &weight}, Use::write);
    const std::int64_t width = rotated_size(source.cols, options.rotation);
    const bool packed = codes.shape().size() == 4;
    Matrix target;
    if (packed) {
        static_cast<void>(packed_codes(codes, source.rows, width, {function, "out.codes"}));
        target = {codes.data(), codes.dtype(), codes.device(), source.rows, width, 0, 1};
    } else {
        need_rank(codes, {function, "out.codes"}, 2);
        target = codes.mutable_matrix();
    }
    Requantization again{.enqueue = enqueue_object.cast<bool>()};
    if (!seed_object.is_none()) again.seed = seed_object.cast<std::uint64_t>();
    run(weight, work_of(source), [&](Stream stream) {
        octavo::quantize_weight(source, options, target, scale.vector(), vector_or_absent(zeropoint),
                                code_sums.vector(), stream, packed ? Layout::packed : Layout::row_major, again);
    });
    return py::none();
}

py::object find_outliers_op(py::handle x_object, py::handle options_object) {
    constexpr auto function = "find_outliers";
    const LinearOptions& options = options_of(options_object, function).linear;
    Array x(x_object, {function, "x"});
    const ConstMatrix source = x.matrix();
    // The number of columns is known only after the work, so they go by way of other memory: of our own for the CPU.
    if (source.device.kind == DeviceKind::cuda) {
        const Array all(allocate(x, {source.cols}, DType::i32), {function, "columns", "int32"}, Use::write);
        const Array found(allocate(x, {1}, DType::i32), {function, "count", "int32"}, Use::write);
        run(x, work_of(source),
            [&](Stream stream) { octavo::find_outliers(source, options, all.vector(), found.vector(), stream); });
        const py::object part = all.object()[py::slice(0, item(found.object()), 1)];
        return part.attr(x.framework() == Framework::torch ? "clone" : "copy")();
    }
    std::vector<std::int32_t> columns(static_cast<std::size_t>(source.cols));
    std::int32_t count = 0;
    run(x, work_of(source), [&](Stream stream) {
        octavo::find_outliers(
            source, options,
            {.data = columns.data(), .dtype = DType::i32, .device = source.device, .size = source.cols},
            {.data = &count, .dtype = DType::i32, .device = source.device, .size = 1}, stream);
    });
    const Array result(allocate(x, {count}, DType::i32), {function, "columns", "int32"}, Use::write);
    std::copy_n(columns.data(), count, static_cast<std::int32_t*>(result.vector().data));
    return result_of(result, x);
}

py::object pack_op(py::handle codes_object) {
    constexpr auto function = "pack";
    Array codes(codes_object, {function, "codes", "int8"});
    need_rank(codes, {function, "codes"}, 2);
    const ConstMatrix source = codes.matrix();
    const std::int64_t size = packed_size(source.rows, source.cols);
    const Array packed(allocate_aligned(codes, packed_shape(source.rows, source.cols)), {function, "packed", "int8"},
                       Use::write);
    run(codes, work_of(source), [&](Stream stream) {
        octavo::pack(source, {.data = packed.data(), .dtype = DType::i8, .device = source.device, .size = size},
                     stream);
    });
    return result_of(packed, codes);
}

py::object shape_op(py::handle object) { return to_tuple(Array(object, {"shape_of", "array"}).shape()); }

py::object unpack_op(py::handle packed_object, py::handle n_object, py::handle k_object) {
    constexpr auto function = "unpack";
    const Array packed(packed_object, {function, "packed", "int8"});
    const std::int64_t n = parse_extent(n_object, {function, "n"});
    const std::int64_t k = parse_extent(k_object, {function, "k"});
    const ConstVector source = packed_codes(packed, n, k, {function, "packed"});
    const Array codes(allocate(packed, {n, k}, DType::i8), {function, "codes", "int8"}, Use::write);
    run(packed, work_of(codes.mutable_matrix()),
        [&](Stream stream) { octavo::unpack(source, codes.mutable_matrix(), stream); });
    return result_of(codes, packed);
}

// The columns of a weight in CPU memory and their indices, both of its framework.
py::object take_columns_op(py::handle weight_object, py::handle indices_object) {
    constexpr auto function = "quantize_weight";
    Array weight(weight_object, {function, "weight"});
    need_rank(weight, {function, "weight"}, 2);
    const Array indices(indices_object, {function, "outlier_columns", "int32"});
    const ConstVector taken = indices.vector();
    const ConstMatrix source = weight.matrix();
    if (source.device.kind != DeviceKind::cpu || taken.device.kind != DeviceKind::cpu || taken.dtype != DType::i32) {
        throw py::value_error("quantize_weight: outlier_columns: expected int32 indices and a weight on the CPU");
    }
    const Array columns(allocate(weight, {taken.size}, DType::i32), {function, "outlier_columns", "int32"}, Use::write);
    const Array values(allocate(weight, {source.rows, taken.size}, source.dtype), {function, "outlier_weight"},
                       Use::write);
    const auto item = size_of(source.dtype);
    const auto* const index = static_cast<const std::int32_t*>(taken.data);
    for (std::int64_t c = 0; c < taken.size; ++c) {
        static_cast<std::int32_t*>(columns.data())[c] = index[c * taken.stride];
    }
    auto* target = static_cast<char*>(values.data());
    for (std::int64_t i = 0; i < source.rows; ++i) {
        for (std::int64_t c = 0; c < taken.size; ++c, target += item) {
            const std::int64_t offset = i * source.row_stride + index[c * taken.stride] * source.col_stride;
            std::copy_n(static_cast<const char*>(source.data) + offset * item, item, target);
        }
    }
    return py::make_tuple(result_of(columns, weight), result_of(values, weight));
}

py::object int8_matmul_op(py::handle a_object, py::handle b_object, py::handle out) {
    constexpr auto function = "int8_matmul";
    Array a(a_object, {function, "a", "int8"});
    Array b(b_object, {function, "b", "int8", &a});
    need_rank(b, {function, "b"}, 2);
    const ConstMatrix a_matrix = a.matrix();
    const ConstMatrix b_matrix = b.matrix();
    const Output result(out, a, with_last(a, b_matrix.rows), DType::i32, {function, "out", "int32", &a});
    run(a, work_of(a_matrix, b_matrix.rows),
        [&](Stream stream) { octavo::int8_matmul(a_matrix, b_matrix, result.matrix(), Layout::row_major, stream); });
    return result.finish();
}

py::object dequantize_op(py::handle codes_object, py::handle scale_object, py::handle zeropoint_object,
                         py::handle rotation_object, py::handle k_object, py::handle dtype_name) {
    constexpr auto function = "dequantize";
    Array codes(codes_object, {function, "codes", "int8"});
    Array scale(scale_object, {function, "scale", "float32", &codes});
    auto zeropoint = optional_array(zeropoint_object, {function, "zeropoint", "float32", &codes});
    const auto dtype = parse(float_dtypes, dtype_name, {function, "dtype"});
    const ConstMatrix source = codes.matrix();
    const ConstVector scales = scale.flat();
    const ConstVector zeropoints = zeropoint ? zeropoint->flat() : absent_vector;
    const auto rotation = static_cast<std::int32_t>(parse_extent(rotation_object, {function, "rotation"}));
    const std::int64_t k = rotation == 0 ? source.cols : parse_extent(k_object, {function, "k"});
    const Output result(py::none(), codes, with_last(codes, k), dtype, {function, "out"});
    run(codes, work_of(source),
        [&](Stream stream) { octavo::dequantize(source, scales, zeropoints, rotation, result.matrix(), stream); });
    return result.finish();
}

// A weight whose arrays have been read and checked once, so that `linear` need not. Its codes are a matrix, or in
// packed order; `shape` is (n, k), and only of a matrix of k columns may be missing.
class Weight {
public:
    using Shape2 = std::optional<std::pair<std::int64_t, std::int64_t>>;

    Weight(py::handle codes, const Shape2& shape, py::handle scale, py::handle zeropoint, py::handle code_sums,
           py::handle outlier_columns, py::handle outlier_weight, py::handle options)
        : Weight(codes, shape, scale, zeropoint, code_sums, outlier_columns, outlier_weight,
                 options_of(options, function).quantize, Use::keep) {}

    // `use`: read for a weight that lives no longer than the arrays.
    Weight(py::handle codes, const Shape2& shape, py::handle scale, py::handle zeropoint, py::handle code_sums,
           py::handle outlier_columns, py::handle outlier_weight, const QuantizeOptions& options, Use use)
        : codes_(codes, {function, "codes", "int8"}, use),
          scale_(scale, {function, "scale", "float32"}, use),
          zeropoint_(optional_array(zeropoint, {function, "zeropoint", "float32"}, use)),
          code_sums_(optional_array(code_sums, {function, "code_sums", "int32"}, use)),
          outlier_columns_(optional_array(outlier_columns, {function, "outlier_columns", "int32"}, use)),
          outlier_weight_(optional_array(outlier_weight, {function, "outlier_weight"}, use)) {
        if (codes_.dtype() != DType::i8) {
            throw py::type_error(std::string("Int8Weight: codes: expected dtype int8, got ") + name_of(codes_.dtype()));
        }
        const bool packed = shape && codes_.shape().size() != 2;
        if (packed) {
            const std::int64_t width = rotated_size(shape->second, options.rotation);
            const ConstVector memory = packed_codes(codes_, shape->first, width, {function, "codes"});
            view_.codes = {memory.data, DType::i8, memory.device, shape->first, width, 0, 1};
            view_.layout = Layout::packed;
        } else {
            need_rank(codes_, {function, "codes"}, 2);
            view_.codes = codes_.matrix();
        }
        view_.rotation = options.rotation;
        view_.k = shape ? shape->second : 0;
        view_.scale = scale_.vector();
        view_.zeropoint = vector_or_absent(zeropoint_);
        view_.scheme = options.scheme;
        view_.granularity = options.granularity;
        if (outlier_columns_.has_value() != outlier_weight_.has_value()) {
            throw py::value_error(std::string("Int8Weight: ") +
                                  (outlier_columns_
                                       ? "outlier_weight: expected an array, as outlier_columns is one, got None"
                                       : "outlier_columns: expected an array, as outlier_weight is one, got None"));
        }
        if (outlier_columns_) {
            need_rank(*outlier_weight_, {function, "outlier_weight"}, 2);
            view_.outlier_columns = outlier_columns_->vector();
            view_.outlier_weight = outlier_weight_->matrix();
        }
        if (!code_sums_) {
            if (packed) throw py::value_error("Int8Weight: code_sums: expected an array with packed codes, got None");
            code_sums_.emplace(allocate(codes_, {view_.codes.rows}, DType::i32), Argument{function, "code_sums"},
                               Use::keep);
            run(codes_, work_of(view_.codes),
                [&](Stream stream) { octavo::sum_codes(view_.codes, code_sums_->vector(), stream); });
        }
        view_.code_sums = code_sums_->vector();
        octavo::check_weight(view_, function);
    }

    [[nodiscard]] const WeightView& view() const noexcept { return view_; }
    // Of the framework of the codes, however they came.
    [[nodiscard]] py::object code_sums() const { return result_of(*code_sums_, codes_); }
    // The arrays that its products depend on.
    [[nodiscard]] std::vector<py::object> values() const {
        std::vector<py::object> found{codes_.object(), scale_.object()};
        for (const auto* array : {&zeropoint_, &code_sums_, &outlier_columns_, &outlier_weight_}) {
            if (*array) found.push_back((*array)->object());
        }
        return found;
    }
    [[nodiscard]] bool is_on_cpu() const noexcept { return view_.codes.device.kind == DeviceKind::cpu; }

private:
    static constexpr auto function = "Int8Weight";
    Array codes_;
    Array scale_;
    std::optional<Array> zeropoint_;
    std::optional<Array> code_sums_;
    std::optional<Array> outlier_columns_;
    std::optional<Array> outlier_weight_;
    WeightView view_;
};

py::object product(Array& x, const WeightView& weight, py::handle bias_object, const LinearOptions& options,
                   py::handle out) {
    constexpr auto function = "linear";
    const auto bias = optional_array(bias_object, {function, "bias", float_dtype_names, &x});
    const ConstMatrix source = x.matrix();
    const std::int64_t n = weight.codes.rows;
    const Output result(out, x, with_last(x, n), x.dtype(), {function, "out", float_dtype_names, &x});
    run(x, work_of(source, n), [&](Stream stream) {
        octavo::linear(source, weight, vector_or_absent(bias), result.matrix(), options, stream);
    });
    return result.finish();
}

// A layer of several with one x.
struct LayerArguments {
    const WeightView& weight;
    py::handle bias;
    py::handle out;
};

py::list products(Array& x, std::span<const LayerArguments> given, const LinearOptions& options) {
    constexpr auto function = "linear_many";
    const ConstMatrix source = x.matrix();
    const std::size_t count = given.size();
    std::vector<std::string> names;  // none of these is moved
    std::vector<std::optional<Array>> biases;
    std::vector<Output> outputs;
    std::vector<LinearLayer> layers;
    names.reserve(count);
    biases.reserve(count);
    outputs.reserve(count);
    layers.reserve(count);
    double work = 0;
    for (std::size_t i = 0; i < count; ++i) {
        const auto& [weight, bias, out] = given[i];
        const char* const layer = names.emplace_back(function + ("[" + std::to_string(i) + "]")).c_str();
        biases.push_back(optional_array(bias, {layer, "bias", float_dtype_names, &x}));
        outputs.emplace_back(out, x, with_last(x, weight.codes.rows), x.dtype(),
                             Argument{layer, "out", float_dtype_names, &x});
        layers.push_back({weight, vector_or_absent(biases.back()), outputs.back().matrix()});
        work += work_of(source, weight.codes.rows);
    }
    run(x, work, [&](Stream stream) { octavo::linear_many(source, layers, options, stream); });
    py::list results(count);
    for (std::size_t i = 0; i < count; ++i) results[i] = outputs[i].finish();
    return results;
}

py::object linear_many_op(py::handle x_object, py::handle weights_object, py::handle biases_object,
                          py::handle options_object, py::handle outs_object) {
    constexpr auto function = "linear_many";
    Array x(x_object, {function, "x"}, Use::differentiable);
    const LinearOptions& options = options_of(options_object, function).linear;
    const auto weights = weights_object.cast<py::list>();
    const auto biases = biases_object.cast<py::list>();
    const auto outs = outs_object.cast<py::list>();
    std::vector<LayerArguments> layers;
    for (std::size_t i = 0; i < weights.size(); ++i) {
        const std::string layer = function + ("[" + std::to_string(i) + "]");
        layers.push_back(
            {instance_of<Weight>(weights[i], {layer.c_str(), "weight"}, "Int8Weight").view(), biases[i], outs[i]});
    }
    return products(x, layers, options);
}

py::object linear_op(py::handle x_object, py::handle weight_object, py::handle bias, py::handle options,
                     py::handle out) {
    constexpr auto function = "linear";
    Array x(x_object, {function, "x"}, Use::differentiable);
    const auto& weight = instance_of<Weight>(weight_object, {function, "weight"}, "Int8Weight");
    return product(x, weight.view(), bias, options_of(options, function).linear, out);
}

// Whether PyTorch wants nothing of an operation on `x` but its result.
py::object is_plain_op(py::handle x) { return py::bool_(torch_is_plain(x) && !torch_records(x)); }

// The tensor x of a product, where PyTorch, to which it is plain, wants nothing but the result, and x can be read.
std::optional<Array> unrecorded(py::handle x, py::handle bias) {
    if ((!bias.is_none() && !facts_of(bias).plain) || torch_records(x, bias)) return std::nullopt;
    try {
        return optional_array(x, {"linear", "x"});
    } catch (const py::builtin_exception&) {  // nested or on the meta device: PyTorch's way may know what to do
        return std::nullopt;
    }
}

// octavo::linear as autograd calls it: where nothing is to be recorded, the product, past the rest of the dispatcher;
// else what `register_torch_operations` was given.
py::object torch_linear_op(py::handle x_object, py::handle codes, py::handle scale, py::handle code_sums,
                           py::handle zeropoint, py::handle outlier_columns, py::handle outlier_weight, py::handle bias,
                           py::handle text_object) {
    std::optional<Array> x = torch_is_plain_below_autograd(x_object) ? unrecorded(x_object, bias) : std::nullopt;
    if (!x) {
        return recorded_torch_linear()(x_object, codes, scale, code_sums, zeropoint, outlier_columns, outlier_weight,
                                       bias, text_object);
    }
    const auto text = text_object.cast<std::string>();
    const WeightText weight_text = read_weight_text(text);
    const NativeOptions& options = weight_text.options;
    const Array sums(code_sums, {"linear", "code_sums", "int32"});
    const std::pair shape{sums.vector().size, weight_text.in_features};
    const Weight weight(codes, shape, scale, zeropoint, code_sums, outlier_columns, outlier_weight, options.quantize,
                        Use::read);
    return product(*x, weight.view(), bias, options.linear, py::none());
}

py::object linear_backward_op(py::handle grad_object, py::handle weight_object, py::handle options_object,
                              py::handle out) {
    constexpr auto function = "linear_backward";
    Array grad(grad_object, {function, "grad"}, Use::differentiable);
    const auto& weight = instance_of<Weight>(weight_object, {function, "weight"}, "Int8Weight");
    const LinearOptions& options = options_of(options_object, function).linear;
    const ConstMatrix source = grad.matrix();
    const std::int64_t k = features_of(weight.view());
    const Output result(out, grad, with_last(grad, k), grad.dtype(), {function, "out", float_dtype_names, &grad});
    run(grad, work_of(source, k),
        [&](Stream stream) { octavo::linear_backward(source, weight.view(), result.matrix(), options, stream); });
    return result.finish();
}

// --- as CPython calls them -------------------------------------------------------------------------------------------

template <auto operation, std::size_t... index>
py::object apply(PyObject* const* arguments, std::index_sequence<index...>) {
    return operation(py::handle(arguments[index])...);
}

template <auto operation, std::size_t arity>
PyObject* entry(PyObject* /*module*/, PyObject* const* arguments, Py_ssize_t count) noexcept {
    if (std::cmp_not_equal(count, arity)) {
        return PyErr_Format(PyExc_TypeError, "expected %zu positional arguments, got %zd", arity, count);
    }
    try {
        return apply<operation>(arguments, std::make_index_sequence<arity>()).release().ptr();
    } catch (...) {
        set_error_of_exception();
        return nullptr;
    }
}

template <class... Handles>
constexpr std::size_t arity_of(py::object (*)(Handles...)) {
    return sizeof...(Handles);
}

py::object product_of_factor(Array& x, const Factor& factor) {
    return product(x, factor.product->weight, factor.bias, factor.product->options, py::none());
}

py::list products_of_factors(Array& x, const std::vector<Factor>& factors) {
    static const py::handle none = py::none().release();
    std::vector<LayerArguments> layers;
    layers.reserve(factors.size());
    for (const Factor& factor : factors) layers.push_back({factor.product->weight, factor.bias, none});
    return products(x, layers, factors.front().product->options);
}

// The product of x where PyTorch wants nothing of it but its result, else None. `own`: of `plain_linear`.
py::object plain_product(py::handle own, py::handle x_object, py::handle bias) {
    std::optional<Array> x = torch_is_plain(x_object) ? unrecorded(x_object, bias) : std::nullopt;
    if (!x) return py::none();
    const auto& product = *static_cast<std::shared_ptr<Product>*>(PyCapsule_GetPointer(own.ptr(), nullptr));
    return shared_product({product, py::reinterpret_borrow<py::object>(bias)}, x_object, *x,
                          {product_of_factor, products_of_factors});
}

// The product of a layer's parameters where PyTorch wants nothing of it but its result, else None. `types`: that of the
// weight, and None or that of a layer of which, if nobody has changed what its call comes to, this is the call.
py::object plain_layer_product(py::handle types, py::handle layer, py::handle x) {
    const py::handle weight_type = PyTuple_GET_ITEM(types.ptr(), 0);
    const py::handle layer_type = PyTuple_GET_ITEM(types.ptr(), 1);
    const bool is_call = !layer_type.is_none();
    if (is_call && !(py::type::handle_of(layer).is(layer_type) && torch_calls_forward_alone(layer))) return py::none();
    const std::optional<TorchParameters> parameters = torch_parameters(layer);
    if (!parameters || !py::type::handle_of(parameters->weight).is(weight_type)) return py::none();
    static const py::handle is_transposed = py::str("_transposed").release();
    static const py::handle arrays_of = py::str("_arrays").release();
    static const py::handle product_of = py::str("product").release();
    const py::handle weight = parameters->weight;
    if (checked(PyObject_GetAttr(weight.ptr(), is_transposed.ptr())).ptr() != Py_False) return py::none();
    const py::object arrays = checked(PyObject_GetAttr(weight.ptr(), arrays_of.ptr()));
    const py::object product = checked(PyObject_GetAttr(arrays.ptr(), product_of.ptr()));
    PyObject* const arguments[] = {x.ptr(), parameters->bias.ptr()};
    return checked(PyObject_Vectorcall(product.ptr(), arguments, 2, nullptr));
}

// A function of two arguments that also has what it was made with.
template <auto function>
PyObject* bound_entry(PyObject* own, PyObject* const* arguments, Py_ssize_t count) noexcept {
    if (count != 2) return PyErr_Format(PyExc_TypeError, "expected 2 arguments, got %zd", count);
    try {
        return function(own, arguments[0], arguments[1]).release().ptr();
    } catch (...) {
        set_error_of_exception();
        return nullptr;
    }
}

template <auto function>
py::object bound(const char* name, const py::object& own) {
    static PyMethodDef definition{name,
                                  reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(bound_entry<function>)),
                                  METH_FASTCALL, nullptr};
    return checked(PyCFunction_New(&definition, own.ptr()));
}

// A function of x and bias: see `plain_product`.
py::object plain_linear_op(py::handle weight_object, py::handle options) {
    const auto& weight = instance_of<Weight>(weight_object, {"linear", "weight"}, "Int8Weight");
    const LinearOptions& linear = options_of(options, "linear").linear;
    auto* const made = new std::shared_ptr<Product>(
        new Product{py::make_tuple(weight_object, options), weight.view(), linear, weight.values()});
    return bound<plain_product>(
        "product", py::capsule(made, [](void* own) { delete static_cast<std::shared_ptr<Product>*>(own); }));
}

// A function of a layer and x: see `plain_layer_product`.
py::object plain_layer_op(py::handle weight_type, py::handle layer_type) {
    return bound<plain_layer_product>("plain_layer_product", py::make_tuple(weight_type, layer_type));
}

// `signature` is shown by help() and checked against _core.pyi.
template <auto operation>
PyMethodDef method(const char* name, const char* signature) {
    auto* const function = entry<operation, arity_of(operation)>;
    return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, signature};
}

}  // namespace

const NativeOptions& read_options(const std::string& text) {
    static std::shared_mutex lock;
    static std::unordered_map<std::string, NativeOptions> known;  // which moves no entry
    {
        const std::shared_lock guard(lock);
        if (const auto found = known.find(text); found != known.end()) return found->second;
    }
    const py::gil_scoped_acquire gil;
    try {
        const py::object options = py::module_::import("octavo.options").attr("Options").attr("from_text")(text);
        const py::object held = options.attr("_native");
        const Options& native = options_of(held, "octavo::linear");
        const std::unique_lock guard(lock);
        return known.try_emplace(text, NativeOptions{native.quantize, native.linear}).first->second;
    } catch (const py::error_already_set& error) {
        throw std::invalid_argument(error.what());
    }
}

WeightText read_weight_text(const std::string& text) {
    const char* const end = text.data() + text.size();
    std::int64_t in_features = -1;
    const auto [rest, error] = std::from_chars(text.data(), end, in_features);
    if (error != std::errc() || in_features < 0 || rest == end || *rest != ' ') {
        throw std::invalid_argument("octavo::linear: options: expected in_features and a text of octavo.Options, got " +
                                    text);
    }
    return {read_options(std::string(rest + 1, end)), in_features};
}

void define_operations(py::module_& module) {
    define_own_array(module);
    static std::array methods{
        method<quantize_op>("quantize", "quantize($module, x, options, exclude, /)\n--\n\n"),
        method<quantize_weight_op>("quantize_weight", "quantize_weight($module, weight, options, /)\n--\n\n"),
        method<requantize_op>("requantize",
                              "requantize($module, weight, options, codes, scale, zeropoint, code_sums, seed, enqueue, "
                              "/)\n--\n\n"),
        method<find_outliers_op>("find_outliers", "find_outliers($module, x, options, /)\n--\n\n"),
        method<shape_op>("shape_of", "shape_of($module, array, /)\n--\n\n"),
        method<pack_op>("pack", "pack($module, codes, /)\n--\n\n"),
        method<unpack_op>("unpack", "unpack($module, packed, n, k, /)\n--\n\n"),
        method<take_columns_op>("take_columns", "take_columns($module, weight, indices, /)\n--\n\n"),
        method<int8_matmul_op>("int8_matmul", "int8_matmul($module, a, b, out, /)\n--\n\n"),
        method<dequantize_op>("dequantize",
                              "dequantize($module, codes, scale, zeropoint, rotation, k, dtype, /)\n--\n\n"),
        method<linear_op>("linear", "linear($module, x, weight, bias, options, out, /)\n--\n\n"),
        method<linear_many_op>("linear_many", "linear_many($module, x, weights, biases, options, outs, /)\n--\n\n"),
        method<linear_backward_op>("linear_backward",
                                   "linear_backward($module, grad, weight, options, out, /)\n--\n\n"),
        method<is_plain_op>("is_plain", "is_plain($module, x, /)\n--\n\n"),
        method<plain_linear_op>("plain_linear", "plain_linear($module, weight, options, /)\n--\n\n"),
        method<plain_layer_op>("plain_layer", "plain_layer($module, weight_type, layer_type, /)\n--\n\n"),
        method<torch_linear_op>("torch_linear",
                                "torch_linear($module, x, codes, scale, code_sums, zeropoint, outlier_columns, "
                                "outlier_weight, bias, options, /)\n--\n\n"),
        PyMethodDef{},
    };
    if (PyModule_AddFunctions(module.ptr(), methods.data()) != 0) throw py::error_already_set();
    py::class_<Options>(module, "Options", py::is_final())
        .def(py::init<py::handle, py::handle, py::handle, py::handle, py::handle, py::handle, py::handle, py::handle>(),
             py::arg("scheme"), py::arg("granularity"), py::arg("rotation"), py::arg("outliers"), py::arg("threshold"),
             py::arg("relative"), py::arg("cap"), py::arg("path"));
    py::class_<Weight>(module, "Weight", py::is_final())
        .def(py::init<py::handle, const Weight::Shape2&, py::handle, py::handle, py::handle, py::handle, py::handle,
                      py::handle>(),
             py::arg("codes"), py::arg("shape"), py::arg("scale"), py::arg("zeropoint"), py::arg("code_sums"),
             py::arg("outlier_columns"), py::arg("outlier_weight"), py::arg("options"))
        .def_property_readonly("code_sums", &Weight::code_sums)
        .def_property_readonly("is_on_cpu", &Weight::is_on_cpu);
}

}  // namespace octavo::python
