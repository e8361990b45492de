// The one exception type of octavo and its kinds.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace [[gnu::visibility("default")]] octavo {

// What went wrong, in the terms every language binding has a counterpart for.
enum class ErrorKind : std::uint8_t {
    type,    // an argument of the wrong dtype or kind      (Python: TypeError)
    value,   // an argument of the wrong shape, range, ...  (Python: ValueError)
    device,  // no backend, no driver, a failed launch      (Python: RuntimeError)
};

// What every octavo function throws (besides std::bad_alloc where memory runs out). Argument faults (`type`, `value`)
// name the function, the argument, what was expected and what came, and are thrown before any output is written unless
// a function's documentation says otherwise. Inputs are never modified.
// Visible, so that it can be caught across shared objects.
class __attribute__((visibility("default"))) Error : public std::runtime_error {
public:
    Error(ErrorKind kind, const std::string& message) : std::runtime_error(message), kind_(kind) {}
    [[nodiscard]] ErrorKind kind() const noexcept { return kind_; }

private:
    ErrorKind kind_;
};

}  // namespace octavo
