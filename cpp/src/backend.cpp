#include "backend.hpp"

#include "check.hpp"

namespace octavo {

const Backend& backend_for(Device device, const char* function) {
    switch (device.kind) {
        case DeviceKind::cpu: return cpu_backend();
        case DeviceKind::cuda: break;
    }
    throw Error(ErrorKind::device, std::string(function) + ": expected arrays on the cpu, got " +
                                       check::to_string(device) + " (this build of octavo has no CUDA backend)");
}

}  // namespace octavo
