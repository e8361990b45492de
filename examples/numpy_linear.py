"""LLM.int8() with NumPy arrays: quantize a weight, run the linear layer, and compare with float32.

Run: python examples/numpy_linear.py
"""

import numpy as np
import octavo

tokens, in_features, out_features, outlier = 16, 512, 256, 17
rng = np.random.default_rng(0)
x = rng.standard_normal((tokens, in_features), dtype=np.float32)
x[:, outlier] *= 40  # a systematic outlier feature, as in large language models
weight = rng.standard_normal((out_features, in_features), dtype=np.float32) / np.sqrt(np.float32(in_features))
bias = rng.standard_normal(out_features, dtype=np.float32)

# One byte per weight and a scale per output feature; the outlier's column also keeps its original values.
quantized = octavo.quantize_weight(weight, outlier_columns=[outlier])
y = octavo.linear(x, quantized, bias)

# Rounding to codes changes a value by at most half of its scale. With |ex| <= sx/2 and |ew| <= sw/2 a term
# (x + ex)(w + ew) is off by at most sx/2 |w| + sw/2 |x| + sx sw/4; outlier columns are off by nothing.
outliers = octavo.find_outliers(x)
assert outliers.tolist() == [outlier]
inner, inner_weight = (np.abs(np.delete(a, outliers, axis=1)).astype(np.float64) for a in (x, weight))
scale_x = inner.max(axis=1, keepdims=True) / 127
scale_w = quantized.scale.astype(np.float64)
bound = scale_x / 2 * inner_weight.sum(axis=1) + scale_w / 2 * inner.sum(axis=1, keepdims=True)
bound += scale_x * scale_w / 4 * inner.shape[1] + 1e-4  # and the rounding of float32 itself

error = np.abs(y - (x.astype(np.float64) @ weight.T.astype(np.float64) + bias))
print(f"outlier columns {outliers.tolist()}, weight of {weight.nbytes} bytes as {quantized.nbytes}")
print(f"largest error {error.max():.3g}, at most {(error / bound).max():.0%} of its bound")
assert (error <= bound).all()
