#include "cpu/kernels/table.hpp"

#include "cpu/kernels/functions.hpp"

#define OCTAVO_NAME_OF(isa) OCTAVO_QUOTE(isa)
#define OCTAVO_QUOTE(isa) #isa

namespace octavo::cpu::OCTAVO_ISA {

extern const Kernels table;
// Of the plans only the addresses are taken. NOLINTNEXTLINE(cppcoreguidelines-interfaces-global-init)
const Kernels table{
    .isa = OCTAVO_NAME_OF(OCTAVO_ISA),
    .load = load,
    .load_transposed = load_transposed,
    .load_columns = load_columns,
    .store = store,
    .range = range,
    .largest_magnitude = largest_magnitude,
    .largest_masked = largest_masked,
    .raise_maxima = raise_maxima,
    .upper_halves = upper_halves,
    .survey = survey,
    .find_halves = find_halves,
    .rotate = rotate,
    .encode_absmax = encode_absmax,
    .encode_rotated = encode_rotated,
    .encode_stochastic = encode_stochastic,
    .encode_zeropoint = encode_zeropoint,
    .sum = sum,
    .pack = pack,
    .transpose = transpose,
    .few = &few,
    .some = &some,
    .many = &many,
    .widen = widen,
    .gradient_cols = gradient_cols,
    .dequantize_square = dequantize_square,
    .pair = pair,
    .multiply_floats = multiply_floats,
    .finish_floats = finish_floats,
    .dequantize_columns = dequantize_columns,
    .rotate_back_column = rotate_back_column,
    .epilogue = epilogue,
};

}  // namespace octavo::cpu::OCTAVO_ISA
