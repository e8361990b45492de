#include "bindings/shared_input.hpp"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <new>
#include <optional>
#include <utility>

#include "octavo/error.hpp"
#include "octavo/runtime.hpp"

namespace octavo::python {
namespace {

std::atomic<bool> shares_in_inference_mode{false};

constexpr std::size_t most_followers = 8;
// How often a product must follow again before it is computed ahead once more, after that was in vain.
constexpr int mistrust = 16;
// A product that so many inputs were for alone is watched for one in `seldom` only: to watch costs .2 us.
constexpr unsigned often_alone = 64;
constexpr unsigned seldom = 16;

// A weak reference to a tensor, or None.
py::object weak_reference(py::handle tensor, py::handle callback = {}) {
    if (tensor.is_none()) return py::none();
    return checked(PyWeakref_NewRef(tensor.ptr(), callback.ptr()));
}

// What such a reference refers to: a tensor, None, or nothing, if that is no more.
py::object referent(const py::object& reference) {
    if (!reference || reference.is_none()) return reference;
#if PY_VERSION_HEX >= 0x030D0000
    PyObject* found = nullptr;
    if (PyWeakref_GetRef(reference.ptr(), &found) < 0) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(found);
#else
    PyObject* const found = PyWeakref_GetObject(reference.ptr());
    return found == Py_None ? py::object() : py::reinterpret_borrow<py::object>(found);
#endif
}

// Empties a list; the argument is the reference whose tensor has died.
PyObject* empty(PyObject* list, PyObject* /*reference*/) {
    if (PyList_SetSlice(list, 0, PyList_GET_SIZE(list), nullptr) != 0) return nullptr;
    return py::none().release().ptr();
}

py::object emptying(const py::object& list) {
    static PyMethodDef definition{"empty", &empty, METH_O, nullptr};
    return checked(PyCFunction_New(&definition, list.ptr()));
}

template <class A, class B>
bool is_same(const A& a, const B& b) {  // weak or shared pointers
    return !a.owner_before(b) && !b.owner_before(a);
}

// How often an input has been written to; nothing where nobody counts, nor need count.
std::optional<std::int64_t> changes_of(py::handle tensor, bool is_inferring) {
    const std::optional<std::int64_t> version = torch_version(tensor);
    return !version && is_inferring && shares_in_inference_mode ? 0 : version;
}

// An input as it was when it was multiplied, in inference mode or not: results of the one are no use in the other.
class InputMark {
public:
    InputMark(const Array& x, std::int64_t changes, bool is_inferring)
        : changes_(changes),
          is_inferring_(is_inferring),
          data_(x.data()),
          dtype_(x.dtype()),
          device_(x.device()),
          stream_(x.stream().handle),
          capture_(capture_of(x)),
          shape_(x.shape()),
          strides_(x.strides()) {}

    // Whether the tensor, read as `x`, is as it was, and results of then are ready for whoever comes now.
    [[nodiscard]] bool holds(py::handle tensor, const Array& x) const {
        return x.data() == data_ && x.dtype() == dtype_ && x.device() == device_ && x.shape() == shape_ &&
               x.strides() == strides_ && x.stream().handle == stream_ && torch_is_inferring() == is_inferring_ &&
               changes_of(tensor, is_inferring_) == changes_ && capture_of(x) == capture_;
    }

private:
    static std::uint64_t capture_of(const Array& x) {
        return x.device().kind == DeviceKind::cuda ? octavo::capture_of(x.stream().handle) : 0;
    }

    std::int64_t changes_;
    bool is_inferring_;
    const void* data_;
    DType dtype_;
    Device device_;
    void* stream_;
    std::uint64_t capture_;  // what was computed outside of a graph is not in it, nor the other way round
    Shape shape_;
    Shape strides_;
};

}  // namespace

// What a thread was last asked for: products of one input.
class SharedInput {
public:
    static SharedInput& of_this_thread() {
        constexpr auto name = "octavo.shared_input";
        static const py::handle key = py::str(name).release();
        PyObject* const state = PyThreadState_GetDict();
        if (state == nullptr) throw std::bad_alloc();
        PyObject* const found = PyDict_GetItemWithError(state, key.ptr());
        if (found != nullptr) return *static_cast<SharedInput*>(PyCapsule_GetPointer(found, name));
        if (PyErr_Occurred() != nullptr) throw py::error_already_set();
        auto* const made = new SharedInput();
        const py::capsule capsule(made, name, [](PyObject* own) {
            delete static_cast<SharedInput*>(PyCapsule_GetPointer(own, PyCapsule_GetName(own)));
        });
        if (PyDict_SetItem(state, key.ptr(), capsule.ptr()) != 0) throw py::error_already_set();
        return *made;
    }

    // The product with `tensor`, which was read as `x`.
    py::object product(const Factor& factor, py::handle tensor, Array& x, const Multiplier& multiplier) {
        const bool is_next = referent(input_).is(tensor) && !is_same(first_, factor.product);
        return is_next ? next(factor, tensor, x, multiplier) : first(factor, tensor, x, multiplier);
    }

private:
    using Follower = Product::Follower;

    // A result that nobody has asked for yet.
    struct Waiting {
        Follower whose;
        std::size_t place;  // in `results`
    };

    struct Ahead {
        InputMark input;
        std::vector<Waiting> waiting;
        py::list results;
    };

    py::object first(const Factor& factor, py::handle tensor, Array& x, const Multiplier& multiplier) {
        if (factor.product->alone >= often_alone) {
            const unsigned turn = ++factor.product->alone;
            if (turn % seldom != 0) return multiplier.one(x, factor);
        }
        learn();
        // Where memory is allocated or freed, Python may run, and come here again: what is here is whole at all times.
        input_ = {};
        first_.reset();
        next_.clear();
        std::unique_ptr<Ahead> previous = std::move(ahead_);
        const bool is_inferring = torch_is_inferring();
        if (is_inferring && !shares_in_inference_mode) return multiplier.one(x, factor);
        py::object y;
        std::unique_ptr<Ahead> ahead;
        if (factor.product->is_followed) ahead = compute_ahead(factor, tensor, x, is_inferring, multiplier, y);
        if (!y) y = multiplier.one(x, factor);
        input_ = weak_reference(tensor, ahead ? emptying(ahead->results) : py::object());
        first_ = factor.product;
        next_.clear();
        previous = std::exchange(ahead_, std::move(ahead));
        return y;
    }

    py::object next(const Factor& factor, py::handle tensor, Array& x, const Multiplier& multiplier) {
        const std::optional<Product::Mark> mark = mark_of(factor);
        const auto is_it = [&](const Follower& other) { return is_same(other.product, factor.product); };
        if (mark && next_.size() < most_followers && std::ranges::none_of(next_, is_it)) {
            next_.push_back({factor.product, weak_reference(factor.bias), *mark});
        }
        if (!ahead_) return multiplier.one(x, factor);
        const auto found = std::ranges::find_if(ahead_->waiting, is_it, &Waiting::whose);
        if (found == ahead_->waiting.end()) return multiplier.one(x, factor);
        const Waiting taken = std::move(*found);
        ahead_->waiting.erase(found);
        const py::object y = ahead_->results[taken.place];
        ahead_->results[taken.place] = py::none();
        const bool holds =
            ahead_->input.holds(tensor, x) && referent(taken.whose.bias).is(factor.bias) && mark == taken.whose.mark;
        return holds ? y : multiplier.one(x, factor);
    }

    // `y` of the first product, and the results of those that follow it; nothing where that cannot be.
    static std::unique_ptr<Ahead> compute_ahead(const Factor& first, py::handle tensor, Array& x, bool is_inferring,
                                                const Multiplier& multiplier, py::object& y) {
        std::vector<Factor> factors{first};
        std::vector<Waiting> waiting;
        for (Follower& follower : expected_after(*first.product)) {
            Factor factor{follower.product.lock(), referent(follower.bias)};
            if (!factor.product || !factor.bias || !fits(*factor.product, *first.product)) continue;
            waiting.push_back({std::move(follower), factors.size()});
            factors.push_back(std::move(factor));
        }
        if (waiting.empty()) return {};
        if (const std::optional<std::int64_t> changes = changes_of(tensor, is_inferring)) {
            const InputMark input(x, *changes,
                                  is_inferring);  // of before: what is written to meanwhile counts as changed
            if (const auto results = py::reinterpret_borrow<py::list>(multiply_all(factors, x, multiplier))) {
                y = results[0];
                results[0] = py::none();
                return std::make_unique<Ahead>(input, std::move(waiting), results);
            }
        }
        const std::scoped_lock guard(first.product->mutex);
        for (Follower& follower : first.product->followers) follower.trust = -mistrust;
        first.product->is_followed = false;
        return {};
    }

    static std::vector<Follower> expected_after(Product& product) {
        std::vector<Follower> expected;
        const std::scoped_lock guard(product.mutex);
        std::ranges::copy_if(product.followers, std::back_inserter(expected),
                             [](const Follower& follower) { return follower.trust > 0; });
        return expected;
    }

    // Whether the core computes the two in one call, and quantizes their input once.
    static bool fits(const Product& a, const Product& b) {
        return a.options == b.options && a.weight.codes.device == b.weight.codes.device &&
               features_of(a.weight) == features_of(b.weight) && a.weight.scheme == b.weight.scheme &&
               a.weight.rotation == b.weight.rotation;
    }

    // A list; nothing where an argument is at fault: the call of the layer that has it will say so.
    static py::object multiply_all(const std::vector<Factor>& factors, Array& x, const Multiplier& multiplier) {
        try {
            return multiplier.many(x, factors);
        } catch (const Error&) {
            return {};
        } catch (const py::builtin_exception&) {
            return {};
        }
    }

    // Nothing where PyTorch does not count how often a tensor is written to.
    static std::optional<Product::Mark> mark_of(const Factor& factor) {
        Product::Mark mark;
        for (const py::object& array : factor.product->arrays) {
            const std::optional<std::int64_t> version = torch_version(array);
            if (!version) return std::nullopt;
            mark.weight_version += *version;  // they only grow
        }
        if (factor.bias.is_none()) return mark;
        const std::optional<TorchMark> bias = torch_mark(factor.bias);
        if (!bias) return std::nullopt;
        mark.bias = *bias;
        return mark;
    }

    // Let the first product remember who followed it, and who was computed in vain.
    void learn() {
        const std::shared_ptr<Product> first = first_.lock();
        if (!first) return;
        first->alone = next_.empty() ? first->alone + 1 : 0;
        if (next_.empty() && (!ahead_ || ahead_->waiting.empty())) return;
        const auto is = [](const Follower& a) {
            return [&](const Follower& b) { return is_same(a.product, b.product); };
        };
        const std::scoped_lock guard(first->mutex);
        auto& known = first->followers;
        std::erase_if(known, [](const Follower& follower) { return follower.product.expired(); });
        for (Follower& follower : known) {
            if (ahead_ && std::ranges::any_of(ahead_->waiting, is(follower), &Waiting::whose)) {
                follower.trust = -mistrust;
            }
        }
        for (const Follower& follower : next_) {
            const auto found = std::ranges::find_if(known, is(follower));
            if (found == known.end()) {
                if (known.size() < most_followers) known.push_back(follower);
            } else {
                const int trust = std::min(found->trust + 1, 1);
                *found = follower;
                found->trust = trust;
            }
        }
        first->is_followed = std::ranges::any_of(known, [](const auto& follower) { return follower.trust > 0; });
    }

    // What it was asked for last. Nothing of it keeps a tensor but the results that wait, and these die with the input.
    py::object input_;  // a weak reference
    std::weak_ptr<Product> first_;
    std::vector<Follower> next_;  // asked for after it, with the same input
    std::unique_ptr<Ahead> ahead_;
};

void share_in_inference_mode(bool enabled) { shares_in_inference_mode = enabled; }

py::object shared_product(const Factor& factor, py::handle tensor, Array& x, const Multiplier& multiplier) {
    // To quantize fewer elements on the CPU takes no longer than what is done here (SmolLM2 decodes in 1.01 of the
    // time).
    constexpr std::int64_t least = 2048;
    std::int64_t elements = 1;
    for (const std::int64_t extent : x.shape()) elements *= extent;
    if (x.device().kind == DeviceKind::cpu && elements < least) return multiplier.one(x, factor);
    return SharedInput::of_this_thread().product(factor, tensor, x, multiplier);
}

}  // namespace octavo::python
