// The main function of every benchmark: says what is measured on, then lets google-benchmark run.
//
// One thread, unless OMP_NUM_THREADS says otherwise.
#include <benchmark/benchmark.h>

#include <cstdlib>
#include <exception>
#include <string>

#include "inputs.hpp"
#include "machine.hpp"

int main(int argc, char** argv) {
    try {
        if (std::getenv("OMP_NUM_THREADS") == nullptr) octavo::set_num_threads(1);
        benchmark::AddCustomContext("octavo", octavo::version());
        benchmark::AddCustomContext("instruction_set", octavo::cpu_isa());
        benchmark::AddCustomContext("threads", std::to_string(octavo::num_threads()));
        for (const bench::Peak& peak : bench::peaks()) {
            if (!peak.missing.empty())
                benchmark::AddCustomContext(peak.name, "not measured: " + std::string(peak.missing));
        }
        benchmark::Initialize(&argc, argv);
        if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
        if (benchmark::RunSpecifiedBenchmarks() == 0) bench::fail("no benchmark has such a name");
    } catch (const std::exception& error) {
        bench::fail(error.what());
    }
    return 0;
}
