"""LLM.int8() in ONNX Runtime: the products of an exported model as octavo's operator.

Run: python examples/onnx_linear.py
"""

import numpy as np
import octavo
import octavo.onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

tokens, in_features, out_features, outlier = 16, 512, 256, 17
rng = np.random.default_rng(0)
x = rng.normal(size=(tokens, in_features)).astype(np.float32)
x[:, outlier] *= 40
w = (rng.normal(size=(out_features, in_features)) / in_features**0.5).astype(np.float32)

graph = helper.make_graph(
    [helper.make_node("MatMul", ["x", "w"], ["y"])],
    "a model as frameworks export it",
    [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["tokens", in_features])],
    [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["tokens", out_features])],
    [numpy_helper.from_array(w.T, "w")],
)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)

int8 = octavo.onnx.quantize_model(model)
session = onnxruntime.InferenceSession(int8.SerializeToString(), octavo.onnx.session_options(threads=2))
(y,) = session.run(None, {"x": x})

error = float(np.linalg.norm(y - x @ w.T) / np.linalg.norm(x @ w.T))
print(f"relative error {error:.3g}, as octavo.linear: {np.array_equal(y, octavo.linear(x, octavo.quantize_weight(w)))}")
# Codes hold 7 bits and a sign: of two factors each is off by some 0.005 of its row's largest value.
assert error < 0.02
