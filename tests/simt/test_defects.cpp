// Runs the defect suite, each case in a process of its own, and prints who was caught by what. Fails where a sound
// kernel is accused, or a broken one gets away in a build that is said to catch it.
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <string>

#include "defects/defects.hpp"
#include "octavo/error.hpp"

namespace defects {

std::vector<Defect>& all() {
    static std::vector<Defect> list;
    return list;
}

namespace {

#if defined(OCTAVO_SIMT_ASAN)
constexpr Build this_build = asan;
#elif defined(OCTAVO_SIMT_RACE)
constexpr Build this_build = race;
#else
constexpr Build this_build = plain;
#endif

constexpr std::array orders = {"ascending", "descending", "random:1", "random:2"};

// The exit code of the child process that runs a case. 0 is an accident's code too easily.
constexpr int right = 10;
constexpr int wrong = 11;

struct Outcome {
    bool caught = false;
    std::string how;  // the first line of what it said
};

Outcome run(const Defect& defect, bool broken, const char* order) {
    std::array<int, 2> ends{};
    if (pipe(ends.data()) != 0) return {true, "no pipe"};
    const pid_t child = fork();
    if (child == 0) {
        dup2(ends[1], STDERR_FILENO);
        dup2(ends[1], STDOUT_FILENO);
        close(ends[0]);
        close(ends[1]);
        setenv("OCTAVO_SIMT_ORDER", order, 1);
        alarm(60);
        int code = wrong;
        try {
            code = defect.run(broken) ? right : wrong;
        } catch (const std::exception& error) {
            std::fprintf(stderr, "%s\n", error.what());
        }
        std::_Exit(code);
    }
    close(ends[1]);
    std::string text;
    std::array<char, 4096> part{};
    for (ssize_t size = 0; (size = read(ends[0], part.data(), part.size())) > 0;) {
        text.append(part.data(), static_cast<std::size_t>(size));
    }
    close(ends[0]);
    int status = 0;
    waitpid(child, &status, 0);
    if (WIFEXITED(status) && WEXITSTATUS(status) == right) return {};
    if (WIFEXITED(status) && WEXITSTATUS(status) == wrong && text.empty()) return {true, "wrong result"};
    // AddressSanitizer begins with a line of '='.
    std::size_t begin = text.find_first_not_of("=\n");
    for (const char* mark : {"SIMT ERROR", "runtime error", "ERROR: AddressSanitizer"}) {
        if (const std::size_t at = text.find(mark); at != std::string::npos) {
            begin = at;
            break;
        }
    }
    return {true, begin == std::string::npos ? "crash" : text.substr(begin, text.find('\n', begin) - begin)};
}

// True where the suite's claims about a defect hold.
bool check_defect(const Defect& defect) {
    bool good = true;
    std::string caught_in;
    std::string how;
    for (const char* const order : orders) {
        if (const Outcome sound = run(defect, false, order); sound.caught) {
            std::cout << "FAILED: " << defect.name << ": the sound kernel is accused, " << order << ": " << sound.how
                      << '\n';
            good = false;
        }
        const Outcome broken = run(defect, true, order);
        caught_in += broken.caught ? 'x' : '.';
        if (broken.caught && how.empty()) how = broken.how;
    }
    const bool must_catch = (defect.caught_by & this_build) != 0;
    if (must_catch && how.empty()) {
        std::cout << "FAILED: " << defect.name << ": the broken kernel gets away\n";
        good = false;
    }
    std::printf("%-46s %s  %s\n", defect.name, caught_in.c_str(), how.empty() ? "-" : how.substr(0, 100).c_str());
    std::fflush(stdout);
    return good;
}

}  // namespace
}  // namespace defects

int main() {
    std::printf("%-46s order: ascending, descending, random:1, random:2; x: caught\n", "defect");
    int failed = 0;
    for (const defects::Defect& defect : defects::all()) failed += defects::check_defect(defect) ? 0 : 1;
    std::cout << defects::all().size() << " defects, " << failed << " failed\n";
    return failed == 0 && !defects::all().empty() ? EXIT_SUCCESS : EXIT_FAILURE;
}
