#include "backend.hpp"

#include <string>

#include "cuda.hpp"
#include "octavo/error.hpp"

namespace octavo {

const Backend& backend_for(Device device, const char* function) {
    static const cpu::Backend cpu_backend;
    if (device.kind == DeviceKind::cpu) return cpu_backend;
    try {
        return cuda_backend();
    } catch (const Error& error) {
        throw Error(error.kind(), std::string(function) + ": " + error.what());
    }
}

}  // namespace octavo
