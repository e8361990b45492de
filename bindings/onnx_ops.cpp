// octavo::linear as the operator octavo.Linear of ONNX Runtime: a library of its own, for
// SessionOptions.register_custom_ops_library. Python has no part in it.
//
//   x f32, f16 or bf16 [..., k]; codes i8 [n, k'], or [ceil(n / 16), ceil(k' / 64) * 16, 16, 4] in packed order;
//   scale f32; code_sums i32 [n]; then, each of which may be left out: zeropoint f32; outlier_columns i32 [r];
//   outlier_weight f32 [n, r]; bias f32 [n]                                              ->  y [..., n], dtype of x
//
// After them those of up to three further weights, from codes to bias, may follow: each has an output of its own
// (octavo::linear_many). Attributes are the fields of octavo.Options, in_features, k, and activation, "none" or "gelu"
// (octavo::Activation). What is left out has its default there.
#include <algorithm>
#include <array>
#include <cstdlib>
#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "bindings/onnxruntime.hpp"
#include "octavo/octavo.hpp"

namespace octavo::ort {
namespace {

// What an interface's function returned that failed.
struct Failure {
    Status* status;
};
void check(Status* status) {
    if (status != nullptr) throw Failure{status};
}

// After x, for each layer:
enum Input : std::size_t { codes_at, scale_at, code_sums_at, zeropoint_at, columns_at, kept_at, bias_at, layer_inputs };
constexpr std::size_t most_layers = 4;
constexpr std::size_t inputs = 1 + most_layers * layer_inputs;

DType dtype_of(ElementType type) {
    switch (type) {
        case ElementType::f32: return DType::f32;
        case ElementType::f16: return DType::f16;
        case ElementType::bf16: return DType::bf16;
        case ElementType::i8: return DType::i8;
        case ElementType::i32: return DType::i32;
        case ElementType::undefined: break;
    }
    throw Error(ErrorKind::type, "octavo.Linear: expected float32, float16 or bfloat16, got another dtype");
}

// --- attributes ------------------------------------------------------------------------------------------------------

class Attributes {
public:
    Attributes(const Api& api, const KernelInfo* info) : api_(api), info_(info) {}

    [[nodiscard]] float number(const char* name, float otherwise) const {
        float value = otherwise;
        return has(api_.float_attribute(info_, name, &value)) ? value : otherwise;
    }
    [[nodiscard]] std::int64_t integer(const char* name, std::int64_t otherwise) const {
        std::int64_t value = otherwise;
        return has(api_.int_attribute(info_, name, &value)) ? value : otherwise;
    }
    [[nodiscard]] std::string text(const char* name, const char* otherwise) const {
        std::array<char, 64> value{};
        std::size_t size = value.size();
        return has(api_.text_attribute(info_, name, value.data(), &size)) ? value.data() : otherwise;
    }
    // The place of a word among those that are allowed; the first is the default.
    template <class Value, std::size_t count>
    [[nodiscard]] Value word(const char* name, const std::array<const char*, count>& allowed) const {
        const std::string value = text(name, allowed[0]);
        const auto* const found = std::find(allowed.begin(), allowed.end(), value);
        if (found != allowed.end()) return static_cast<Value>(found - allowed.begin());
        throw Error(ErrorKind::value, "octavo.Linear: " + std::string(name) + ": got '" + value + "'");
    }

private:
    bool has(Status* status) const {
        if (status != nullptr) api_.release_status(status);
        return status == nullptr;
    }

    const Api& api_;
    const KernelInfo* info_;
};

// --- threads ---------------------------------------------------------------------------------------------------------

struct Threads {
    int count;      // 0: octavo's own number
    bool are_lent;  // whether sessions can lend theirs
};

// The call that this thread is in, whose session lends its threads.
struct Call {
    const Api* api;
    const KernelContext* context;
};
thread_local Call call{};

bool run_on_session_threads(int threads, void (*work)(void* context, int thread), void* context) {
    struct Work {
        void (*work)(void* context, int thread);
        void* context;
    } given{work, context};
    const auto body = [](void* of, std::size_t thread) {
        const auto& [part, argument] = *static_cast<const Work*>(of);
        part(argument, static_cast<int>(thread));
    };
    Status* const refused = call.api->parallel_for(call.context, body, static_cast<std::size_t>(threads), 0, &given);
    if (refused != nullptr) call.api->release_status(refused);
    return refused == nullptr;
}

// --- the kernel ------------------------------------------------------------------------------------------------------

struct Tensor {
    void* data = nullptr;  // null: left out
    DType dtype = DType::f32;
    std::vector<std::int64_t> dims;

    [[nodiscard]] std::int64_t last() const {
        if (dims.empty()) throw Error(ErrorKind::value, "octavo.Linear: expected a dimension, got none");
        return dims.back();
    }
    [[nodiscard]] std::int64_t rows() const {
        std::int64_t rows = 1;
        for (std::size_t i = 0; i + 1 < dims.size(); ++i) rows *= dims[i];
        return rows;
    }
    [[nodiscard]] Matrix matrix() const {
        return {.data = data, .dtype = dtype, .rows = rows(), .cols = last(), .row_stride = last()};
    }
    [[nodiscard]] Vector vector() const { return {.data = data, .dtype = dtype, .size = rows() * last()}; }
};

class Kernel {
public:
    Kernel(const Api& api, const KernelInfo* info, const Threads& threads) : api_(api), threads_(threads) {
        const Attributes given(api, info);
        weight_.scheme = given.word<Scheme>("scheme", std::array{"absmax", "zeropoint"});
        // The default comes first.
        const auto granularity = given.text("granularity", "vector");
        weight_.granularity = granularity == "vector"
                                  ? Granularity::vector
                                  : given.word<Granularity>("granularity", std::array{"tensor", "row"});
        weight_.rotation = static_cast<std::int32_t>(given.integer("rotation", 0));
        weight_.k = given.integer("in_features", -1);
        options_.threshold = given.number("threshold", options_.threshold);
        options_.relative = given.number("relative", options_.relative);
        options_.cap = std::strtod(given.text("cap", "1").c_str(), nullptr);  // float64, which no attribute is
        options_.outliers = given.word<Outliers>("outliers", std::array{"columns", "rows", "static", "none"});
        activation_ = given.word<Activation>("activation", std::array{"none", "gelu"});
        options_.path = given.word<Path>("path", std::array{"auto", "int8", "weight_only"});
    }

    void compute(KernelContext* context) const {
        call = {&api_, context};
        const ThreadLimit limit(threads_.count, threads_.are_lent ? run_on_session_threads : nullptr);
        std::size_t count = 0;
        check(api_.input_count(context, &count));
        const Tensor x = input(context, 0);
        std::vector<LinearLayer> layers;
        for (std::size_t first = 1; first < count; first += layer_inputs) {
            std::array<Tensor, layer_inputs> in;
            const std::size_t end = std::min(count - first, in.size());
            for (std::size_t i = 0; i < end; ++i) in[i] = input(context, first + i);
            LinearLayer layer = layer_of(in);
            std::vector<std::int64_t> dims = x.dims;
            if (!dims.empty()) dims.back() = layer.weight.codes.rows;
            Tensor out{.dtype = x.dtype, .dims = dims};
            Value* value = nullptr;
            check(api_.output(context, layers.size(), dims.data(), dims.size(), &value));
            check(api_.data(value, &out.data));
            layer.out = out.matrix();
            layers.push_back(layer);
        }
        linear_many(x.matrix(), layers, options_);
    }

private:
    [[nodiscard]] LinearLayer layer_of(const std::array<Tensor, layer_inputs>& in) const {
        WeightView weight = weight_;
        weight.scale = in[scale_at].vector();
        weight.code_sums = in[code_sums_at].vector();
        if (in[codes_at].dims.size() == 4) {
            weight.layout = Layout::packed;
            const std::int64_t n = weight.code_sums.size;
            const std::int64_t width = rotated_size(weight.k, weight.rotation);
            if (in[codes_at].dims[0] * in[codes_at].dims[1] * 64 != packed_size(n, width)) {
                throw Error(ErrorKind::value, "octavo.Linear: codes: expected those of n = " + std::to_string(n) +
                                                  ", k = " + std::to_string(weight.k));
            }
            weight.codes = {in[codes_at].data, DType::i8, {}, n, width, width, 1};
        } else {
            weight.codes = in[codes_at].matrix();
        }
        if (in[zeropoint_at].data != nullptr) weight.zeropoint = in[zeropoint_at].vector();
        if (!in[columns_at].dims.empty() && !in[kept_at].dims.empty()) {
            weight.outlier_columns = in[columns_at].vector();
            weight.outlier_weight = in[kept_at].matrix();
        }
        return {.weight = weight,
                .bias = in[bias_at].data != nullptr ? in[bias_at].vector() : Vector(absent_vector),
                .activation = activation_};
    }

    [[nodiscard]] Tensor input(KernelContext* context, std::size_t index) const {
        const Value* value = nullptr;
        check(api_.input(context, index, &value));
        Tensor tensor;
        if (value == nullptr) return tensor;
        TypeAndShape* found = nullptr;
        check(api_.type_and_shape(value, &found));
        const std::unique_ptr<TypeAndShape, void (*)(TypeAndShape*)> owner(found, api_.release_type_and_shape);
        ElementType type{};
        std::size_t rank = 0;
        check(api_.element_type(found, &type));
        check(api_.rank(found, &rank));
        tensor.dtype = dtype_of(type);
        tensor.dims.resize(rank);
        check(api_.dims(found, tensor.dims.data(), rank));
        check(api_.data(const_cast<Value*>(value), &tensor.data));  // the interface has one function for both
        return tensor;
    }

    const Api& api_;
    Threads threads_;
    WeightView weight_{};
    Activation activation_ = Activation::none;
    LinearOptions options_;
};

// --- the operator ----------------------------------------------------------------------------------------------------

// Calls `body`; what it throws becomes a status.
template <class Body>
Status* status_of(const Api& api, const Body& body) {
    try {
        body();
        return nullptr;
    } catch (const Failure& failure) {
        return failure.status;
    } catch (const Error& error) {
        const bool is_argument = error.kind() == ErrorKind::type || error.kind() == ErrorKind::value;
        return api.create_status(is_argument ? Code::invalid_argument : Code::fail, error.what());
    } catch (const std::exception& error) {
        return api.create_status(Code::fail, error.what());
    }
}

// With the threads of the sessions that it was registered for.
struct Linear : CustomOp {
    const Api* api;
    Threads threads;
};

struct CreatedKernel {
    const Api* api;
    Kernel kernel;
};

Status* create(const CustomOp* op, const Api* api, const KernelInfo* info, void** kernel) {
    return status_of(
        *api, [&] { *kernel = new CreatedKernel{api, Kernel(*api, info, static_cast<const Linear*>(op)->threads)}; });
}

Status* compute(void* kernel, KernelContext* context) {
    const auto& created = *static_cast<const CreatedKernel*>(kernel);
    return status_of(*created.api, [&] { created.kernel.compute(context); });
}

Linear make_linear(const Api& api, const Threads& threads) {
    Linear op{};
    op.version = version;
    op.name = [](const CustomOp*) { return "Linear"; };
    op.provider = [](const CustomOp*) -> const char* { return nullptr; };
    op.input_type = [](const CustomOp*, std::size_t index) {
        constexpr auto f32 = ElementType::f32;
        constexpr auto i32 = ElementType::i32;
        constexpr std::array types{ElementType::i8, f32, i32, f32, i32, f32, f32};
        static_assert(types.size() == layer_inputs);
        return index == 0 ? ElementType::undefined : types.at((index - 1) % layer_inputs);
    };
    op.input_count = [](const CustomOp*) -> std::size_t { return inputs; };
    op.output_type = [](const CustomOp*, std::size_t) { return ElementType::undefined; };  // that of x
    op.output_count = [](const CustomOp*) -> std::size_t { return most_layers; };
    op.destroy = [](void* kernel) { delete static_cast<CreatedKernel*>(kernel); };
    op.input_characteristic = [](const CustomOp*, std::size_t index) {
        return index > 1 + code_sums_at ? Characteristic::optional : Characteristic::required;
    };
    op.output_characteristic = [](const CustomOp*, std::size_t index) {
        return index > 0 ? Characteristic::optional : Characteristic::required;
    };
    op.input_memory = [](const CustomOp*, std::size_t) { return 0; };
    std::fill(std::begin(op.variadic), std::end(op.variadic), [](const CustomOp*) { return 1; });
    op.create_or_fail = create;
    op.compute_or_fail = compute;
    op.api = &api;
    op.threads = threads;
    return op;
}

}  // namespace
}  // namespace octavo::ort

// Called by ONNX Runtime when the library is registered. The session's entry octavo.threads, where there is one, is how
// many threads the operator uses.
extern "C" __attribute__((visibility("default"))) octavo::ort::Status* RegisterCustomOps(
    octavo::ort::SessionOptions* options, const octavo::ort::ApiBase* base) {
    using namespace octavo::ort;
    const Api* const api = base->api(version);
    if (api == nullptr) {  // older than 1.16, which has said so: its first function is where it always was
        return base->api(1)->create_status(Code::fail, "octavo: expected ONNX Runtime 1.16 or later");
    }
    return status_of(*api, [&] {
        std::array<char, 16> threads{};
        std::size_t size = threads.size();
        if (Status* const missing = api->config_entry(options, "octavo.threads", threads.data(), &size)) {
            api->release_status(missing);
        }
        // They live for as long as any session may, which nothing tells.
        static std::mutex mutex;
        static std::list<Linear> operators;
        const std::lock_guard lock(mutex);
        const bool lends = std::atoi(base->version_text() + std::string_view("1.").size()) >= 18;
        const auto& op = operators.emplace_back(make_linear(*api, {std::atoi(threads.data()), lends}));
        Domain* domain = nullptr;
        check(api->create_domain("octavo", &domain));
        check(api->add_op(domain, &op));
        check(api->add_domain(options, domain));
    });
}
