// Everything octavo offers to C++.
#pragma once

#include "octavo/dequantize.hpp"  // IWYU pragma: export
#include "octavo/error.hpp"       // IWYU pragma: export
#include "octavo/gemm.hpp"        // IWYU pragma: export
#include "octavo/linear.hpp"      // IWYU pragma: export
#include "octavo/options.hpp"
#include "octavo/outlier.hpp"   // IWYU pragma: export
#include "octavo/pack.hpp"      // IWYU pragma: export
#include "octavo/quantize.hpp"  // IWYU pragma: export
#include "octavo/runtime.hpp"   // IWYU pragma: export
#include "octavo/types.hpp"     // IWYU pragma: export
