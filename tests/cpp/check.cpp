#include "check.hpp"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <iostream>
#include <mutex>
#include <vector>

#include "device.hpp"
#include "octavo/runtime.hpp"

namespace check {
namespace {

struct Case {
    const char* name;
    void (*body)();
};

// Function statics, because registrations run before main, in any order.
std::vector<Case>& cases() {
    static std::vector<Case> all;
    return all;
}

std::atomic<int> failures{0};
std::mutex output_mutex;
thread_local std::vector<std::string> contexts;

constexpr int most_failures_shown = 20;  // per test
constexpr int skipped = 77;              // SKIP_RETURN_CODE in CMakeLists.txt

// Whether this machine has the instruction set that the environment asks the library to use.
bool has_wanted_isa() {
    const char* wanted = std::getenv("OCTAVO_CPU_ISA");
    if (wanted == nullptr || *wanted == '\0') return true;
    const auto available = octavo::cpu_isas_available();
    if (std::ranges::find(available, wanted) != available.end()) return true;
    std::cout << "skipped: this build and processor have no " << wanted << '\n';
    return false;
}

// Whether the environment says, by names between commas, that a test is not to run: instrumented builds leave out what
// is about values alone.
bool is_left_out(std::string_view name) {
    const char* names = std::getenv("OCTAVO_TEST_EXCEPT");
    const std::string list = names == nullptr ? "" : "," + std::string(names) + ",";
    return list.find("," + std::string(name) + ",") != std::string::npos;
}

// True where the test passed.
bool run(const Case& test) {
    failures = 0;
    try {
        test.body();
    } catch (const std::exception& error) {
        fail(test.name, 0, std::string("exception: ") + error.what());
    }
    if (failures > most_failures_shown) {
        std::cout << "... and " << failures - most_failures_shown << " more failures in " << test.name << '\n';
    }
    return failures == 0;
}

}  // namespace

void fail(const char* file, int line, const std::string& message) {
    if (++failures > most_failures_shown) return;
    const std::scoped_lock lock(output_mutex);
    std::cout << file << ':' << line << ": " << message << '\n';
    for (const auto& context : contexts) std::cout << "    with " << context << '\n';
    std::cout << std::flush;
}

Registration::Registration(const char* name, void (*body)()) noexcept { cases().push_back({name, body}); }

void Context::push(std::string text) { contexts.push_back(std::move(text)); }
Context::~Context() { contexts.pop_back(); }

void expect_error(const std::function<void()>& call, octavo::ErrorKind kind, std::string_view part, const char* text,
                  const char* file, int line) {
    try {
        call();
    } catch (const octavo::Error& error) {
        if (error.kind() != kind) {
            fail(file, line, std::string(text) + ": error of another kind: " + error.what());
        } else if (std::string_view(error.what()).find(part) == std::string_view::npos) {
            fail(file, line, std::string(text) + ": got '" + error.what() + "', expected '" + std::string(part) + "'");
        }
        return;
    }
    fail(file, line, std::string(text) + ": no error, expected '" + std::string(part) + "'");
}

}  // namespace check

int main(int argc, char** argv)  // NOLINT(misc-const-correctness): as the standard has it
{
    if (!check::has_wanted_isa()) return check::skipped;
    if (const std::string missing = missing_device(); !missing.empty()) {
        std::cout << "skipped: " << missing << '\n';
        return check::skipped;
    }
    const std::string_view wanted = argc > 1 ? argv[1] : "";
    int passed = 0;
    int failed = 0;
    for (const auto& test : check::cases()) {
        if (std::string_view(test.name).find(wanted) == std::string_view::npos) continue;
        if (check::is_left_out(test.name)) {
            std::cout << "left out, as OCTAVO_TEST_EXCEPT says: " << test.name << '\n';
            continue;
        }
        const bool good = check::run(test);
        (good ? passed : failed) += 1;
        if (!good) std::cout << "FAILED " << test.name << '\n';
    }
    std::cout << passed << " passed, " << failed << " failed\n";
    if (passed + failed == 0) std::cout << "no test ran\n";
    return passed > 0 && failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
