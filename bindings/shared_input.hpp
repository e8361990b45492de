// Layers that take the same input, such as q, k and v of an attention, as one call of the core.
//
// Nobody says which layers these are: they show it. A product remembers which others were asked for after it with the
// very same tensor. The next time they are computed along with it, and the result of each waits until it is asked for.
// It is given out once, and only where a call now would compute the same: of this tensor, unchanged, with this weight
// and bias, unchanged, in this thread and on this stream, and in the same CUDA graph where one is being captured. It
// does not outlive the input, nor the thread's next input.
#pragma once

#include <pybind11/pybind11.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "bindings/tensor.hpp"
#include "octavo/linear.hpp"

namespace octavo::python {

// A weight, and the options of products with it.
struct Product {
    // A weight and a bias as they were.
    struct Mark {
        std::int64_t weight_version = 0;
        TorchMark bias;

        friend bool operator==(const Mark&, const Mark&) = default;
    };

    // Another product that was asked for after this one, with its input.
    struct Follower {
        std::weak_ptr<Product> product;
        py::object bias;  // a weak reference, or None; this and the next as they were when it was last asked for
        Mark mark;
        int trust = 1;  // from 1 on it is computed ahead
    };

    py::object owner;  // keeps the next two
    const WeightView& weight;
    const LinearOptions& options;
    std::vector<py::object> arrays;  // the tensors that hold the weight's values
    std::mutex mutex{};              // of the next, for interpreters that have no lock of their own
    std::vector<Follower> followers{};
    std::atomic<bool> is_followed{false};  // one of them is to be computed ahead
    std::atomic<unsigned> alone{0};        // how many inputs in a row were for this product alone
};

// What x is multiplied with: a product's weight, and a bias or None.
struct Factor {
    std::shared_ptr<Product> product;
    py::object bias;
};

// How products are computed: one, or several in one call of the core. For arguments that octavo cannot multiply they
// throw octavo::Error or pybind11::builtin_exception.
struct Multiplier {
    py::object (*one)(Array& x, const Factor& factor);
    py::list (*many)(Array& x, const std::vector<Factor>& factors);
};

// Whether inputs count as unchanged in inference mode, where PyTorch does not tell; at first not.
void share_in_inference_mode(bool enabled);

// The product with `tensor`, which was read as `x`, where PyTorch wants nothing of it but its result.
py::object shared_product(const Factor& factor, py::handle tensor, Array& x, const Multiplier& multiplier);

}  // namespace octavo::python
