// Outlier columns: the input features that LLM.int8() multiplies in 16 bit.
#pragma once

#include <cmath>
#include <cstdint>

#include "octavo/options.hpp"
#include "octavo/types.hpp"

namespace [[gnu::visibility("default")]] octavo {

// With a_j the largest |x[i, j]| of column j, infinite where it holds NaN or Inf:
//
//   absolute  O = { j : not (a_j < threshold) }   (paper section 3.2)
//   relative  O = { j : a_j > 0 and not (a_j < t) },  t = relative * f(m) * med
//
// in float32, where med is the median (of an even number the lower) of the a_j > 0, each cut to its upper 16 bits, and
// f(m) = sqrt(ln 1024 / ln 2m) for m < 512, else 1: what the maximum of few normal values lacks, so that it means the
// same for one row as for many. Of more than floor(cap * k) columns only those with the largest a_j stay (of equal ones
// the first), but all that hold NaN or Inf do. Policy `rows` of `linear` is this with each row as a call of its own.
//
//   x          [m, k] f32, f16 or bf16, any strides
//   options    threshold >= 0 (0: every column with a row; infinity: only columns with NaN or Inf), relative, cap
//   columns    i32 [k]: the first `count` entries are the outlier columns, ascending; the rest is unspecified
//   count      i32 [1]
//
// CPU: returns when done. CUDA: enqueues. Throws Error (type, value, device) naming the argument.
void find_outliers(ConstMatrix x, const LinearOptions& options, Vector columns, Vector count, Stream stream = {});

// The parts of it that do not depend on the data:

// relative * f(m): times the median of the column maxima of `rows` rows. 0 where the criterion is absolute.
inline float times_median(const LinearOptions& options, std::int64_t rows) {
    // What the maximum of few normal values lacks.
    const double factor = rows < 512 ? std::sqrt(std::log(1024.0) / std::log(2.0 * static_cast<double>(rows))) : 1.0;
    return options.relative * static_cast<float>(factor);
}

// The most columns that may be outliers, but for those that hold NaN or Inf.
inline std::int64_t most_outliers(const LinearOptions& options, std::int64_t k) {
    return static_cast<std::int64_t>(std::floor(options.cap * static_cast<double>(k)));
}

}  // namespace octavo
