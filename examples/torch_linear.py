"""LLM.int8() in PyTorch: calibrate and quantize a model in place, and compare it with itself before.

Run: python examples/torch_linear.py
"""

import copy

import octavo.torch
import torch

torch.manual_seed(0)
hidden, outlier = 256, 17
model = torch.nn.Sequential(
    torch.nn.Linear(hidden, 4 * hidden),
    torch.nn.GELU(),
    torch.nn.Linear(4 * hidden, hidden),
).to(torch.bfloat16)
x = torch.randn(64, hidden, dtype=torch.bfloat16)
x[:, outlier] *= 40  # a systematic outlier feature, as in large language models

quantized = copy.deepcopy(model)
columns = octavo.torch.calibrate_(quantized, [x], progress=False)  # finds the features to keep in 16 bit
octavo.torch.quantize_(quantized, progress=False)

with torch.no_grad():
    exact = model.float()(x.float())
    y = quantized(x).float()
error = ((y - exact).norm() / exact.norm()).item()
print(quantized)
print(f"calibrated columns {[found.tolist() for found in columns.values()]}, relative error {error:.3g}")
assert outlier in columns["0"].tolist()
# bfloat16 holds 8 bits (an error of about 0.002), codes another 7: an error of some 0.01 is what two layers add up to.
assert error < 0.02
