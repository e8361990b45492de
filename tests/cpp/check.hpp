// A small test framework: TEST, CHECK, CHECK_EQ, CHECK_THROWS, and Context to say which case of a loop failed.
//
//   TEST(adds) { CHECK_EQ(1 + 1, 2); }
//
// A failed check prints its place and the values, and the test goes on. The main function (check.cpp) runs every
// test of the executable, or those whose names hold its first argument.
#pragma once

#include <cmath>
#include <concepts>
#include <functional>
#include <sstream>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>

#include "octavo/error.hpp"

namespace check {

// Whether a test failed is kept per process; checks may run on any thread.
void fail(const char* file, int line, const std::string& message);

struct Registration {
    Registration(const char* name, void (*body)()) noexcept;
};

// While it lives, failures of this thread also print `what`.
class Context {
public:
    template <class... Parts>
    explicit Context(const Parts&... parts) {
        std::ostringstream text;
        (text << ... << parts);
        push(text.str());
    }
    ~Context();
    Context(const Context&) = delete;
    Context& operator=(const Context&) = delete;

private:
    static void push(std::string text);
};

template <class T>
std::string show(const T& value) {
    std::ostringstream text;
    if constexpr (std::is_enum_v<T>) {
        text << "enum " << +static_cast<std::underlying_type_t<T>>(value);
    } else if constexpr (std::is_floating_point_v<T>) {
        text.precision(17);
        text << value;
    } else if constexpr (std::is_arithmetic_v<T>) {
        text << +value;  // a char type as a number
    } else {
        text << value;
    }
    return text.str();
}

// Equality as tests mean it: NaN equals NaN, 0 does not equal -0, and C strings are compared by their text.
template <class A, class B>
bool equal(const A& a, const B& b) {
    if constexpr (std::is_floating_point_v<A> && std::is_floating_point_v<B>) {
        if (std::isnan(a) || std::isnan(b)) return std::isnan(a) && std::isnan(b);
        return a == b && std::signbit(a) == std::signbit(b);
    } else if constexpr (std::is_integral_v<A> && std::is_integral_v<B> && !std::is_same_v<A, bool>) {
        return std::cmp_equal(a, b);
    } else if constexpr (std::convertible_to<A, std::string_view> && std::convertible_to<B, std::string_view>) {
        return std::string_view(a) == std::string_view(b);
    } else {
        return a == b;
    }
}

template <class A, class B>
void expect_equal(const A& a, const B& b, const char* text, const char* file, int line) {
    if (!equal(a, b)) fail(file, line, std::string(text) + ": got " + show(a) + ", expected " + show(b));
}

// The call must throw octavo::Error of this kind, with `part` in its message.
void expect_error(const std::function<void()>& call, octavo::ErrorKind kind, std::string_view part, const char* text,
                  const char* file, int line);

}  // namespace check

#define TEST(name)                                                        \
    static void test_##name();                                            \
    static const check::Registration register_##name(#name, test_##name); \
    static void test_##name()

#define CHECK(condition)                                               \
    do {                                                               \
        if (!(condition)) check::fail(__FILE__, __LINE__, #condition); \
    } while (false)

// The value under test comes first.
#define CHECK_EQ(actual, expected) check::expect_equal((actual), (expected), #actual, __FILE__, __LINE__)

#define CHECK_THROWS(call, kind, part) \
    check::expect_error([&] { call; }, octavo::ErrorKind::kind, part, #call, __FILE__, __LINE__)
