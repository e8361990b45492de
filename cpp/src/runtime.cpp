#include "octavo/runtime.hpp"

namespace octavo {

const char* version() noexcept { return OCTAVO_VERSION; }

}  // namespace octavo
