// The operations as Python sees them.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "octavo/options.hpp"

namespace octavo::python {

// octavo.Options in C++.
struct NativeOptions {
    QuantizeOptions quantize;
    LinearOptions linear;
};

// The options in a text as `octavo.Options.text` is one. Each text is read once, by Python; the result lives for as
// long as the process. Callable without the interpreter's lock. Throws std::invalid_argument.
const NativeOptions& read_options(const std::string& text);

// What the operations of PyTorch's dispatcher take as one text: `in_features`, a space, and the options.
struct WeightText {
    const NativeOptions& options;
    std::int64_t in_features;
};

// As `read_options`.
WeightText read_weight_text(const std::string& text);

// Define the operations and the class Weight in `module`.
void define_operations(pybind11::module_& module);

}  // namespace octavo::python
