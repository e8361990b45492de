"""octavo.onnx: the operator in ONNX Runtime, and the pass that puts it into a model."""

from __future__ import annotations

import importlib
import math
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import octavo
import pytest
import reference as ref
from octavo.options import Options
from support import make

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

octavo_onnx = importlib.import_module("octavo.onnx")
TensorProto, helper, numpy_helper = onnx.TensorProto, onnx.helper, onnx.numpy_helper
TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
F = np.float32


def model(nodes: list[Any], constants: dict[str, Any], k: int, n: int, dtype: str = "float32") -> Any:
    """A graph of x of dtype [b, s, k] -> y [b, s, n]."""
    x = helper.make_tensor_value_info("x", TYPES[dtype], ["b", "s", k])
    y = helper.make_tensor_value_info("y", TYPES[dtype], ["b", "s", n])
    initializers = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "g", [x], [y], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def linear_model(w: Any, bias: Any = None, dtype: str = "float32") -> Any:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y" if bias is None else "h"], "product")]
    if bias is not None:
        nodes.append(helper.make_node("Add", ["h", "bias"], ["y"]))
    constants = {"w": w.T} if bias is None else {"w": w.T, "bias": bias}
    return model(nodes, constants, w.shape[1], w.shape[0], dtype)


def run(given: Any, x: Any, threads: int | None = 1) -> Any:
    session = ort.InferenceSession(given.SerializeToString(), octavo_onnx.session_options(threads))
    return session.run(None, {"x": x})[0]


def operators(given: Any) -> list[str]:
    return [node.op_type for node in given.graph.node]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(
    "options",
    [
        Options(),
        Options(scheme="zeropoint"),
        Options(granularity="tensor"),
        Options(granularity="row", outliers="none"),
        Options(threshold=3.5, cap=0.1, outliers="rows"),
        Options(outliers="static"),
        Options(path="weight_only"),
        octavo.recipe("best"),
    ],
    ids=str,
)
def test_outputs_are_those_of_linear(dtype: str, options: Options) -> None:
    """Bit for bit, with the kept columns and a bias, in any number of rows and with any number of threads."""
    w = make("normal", (70, 130), dtype).astype(dtype)
    bias = make("normal", (70,), dtype).astype(dtype)
    columns = [3, 77]
    int8 = octavo_onnx.quantize_model(linear_model(w, bias, dtype), options, outlier_columns={"w": columns})
    assert operators(int8) == ["Linear"]
    weight = octavo.quantize_weight(w, options=options, outlier_columns=columns)
    for shape in ((1, 1, 130), (3, 20, 130), (2, 0, 130)):
        x = make("outliers", shape, dtype).astype(dtype)
        expected = octavo.linear(x, weight, bias.astype(F), options=options)
        for threads in (1, 2, None):
            np.testing.assert_array_equal(run(int8, x, threads), expected)


def test_bfloat16() -> None:
    """ONNX Runtime's Python has no such arrays: the model casts."""
    w = ref.round_to(make("normal", (24, 40), "float32"), "bfloat16")
    x = ref.round_to(make("outliers", (1, 5, 40), "float32"), "bfloat16")
    given = linear_model(w)
    int8 = octavo_onnx.quantize_model(given)
    (node,) = int8.graph.node
    node.input[0], node.output[0] = "cast", "wide"
    into = helper.make_node("Cast", ["x"], ["cast"], to=TensorProto.BFLOAT16)
    out = helper.make_node("Cast", ["wide"], ["y"], to=TensorProto.FLOAT)
    int8.graph.node.insert(0, into)
    int8.graph.node.append(out)
    y = octavo.linear(x, octavo.quantize_weight(w))
    np.testing.assert_array_equal(run(int8, x), ref.round_to(y, "bfloat16"))


def test_what_is_converted() -> None:
    """Gemm of either layout, weights behind a Transpose; not products of two inputs, scaled ones, or those skipped."""
    w = make("normal", (16, 16), "float32")
    bias = make("normal", (16,), "float32")
    nodes = [
        helper.make_node("Reshape", ["x", "rows"], ["a"]),
        helper.make_node("Gemm", ["a", "w", "bias"], ["b"], "one", transB=1),
        helper.make_node("Gemm", ["b", "w2"], ["c"], "two"),
        helper.make_node("Transpose", ["w3"], ["turned"], perm=[1, 0]),
        helper.make_node("MatMul", ["c", "turned"], ["d"], "three"),
        helper.make_node("Gemm", ["d", "w", "bias"], ["e"], "scaled", alpha=0.5),
        helper.make_node("MatMul", ["e", "w4"], ["f"], "head"),
        helper.make_node("MatMul", ["f", "f2"], ["g"], "data"),
        helper.make_node("Identity", ["w"], ["f2"]),
        helper.make_node("Add", ["g", "d"], ["h"]),
        helper.make_node("Reshape", ["h", "shape"], ["y"]),
    ]
    nodes[7], nodes[8] = nodes[8], nodes[7]
    constants = dict.fromkeys(("w", "w2", "w3", "w4"), w)
    given = model(
        nodes, {**constants, "bias": bias, "rows": np.array([-1, 16]), "shape": np.array([1, -1, 16])}, 16, 16
    )
    onnx.checker.check_model(given)
    int8 = octavo_onnx.quantize_model(given, skip=["head"])
    assert [node.name for node in int8.graph.node if node.domain == "octavo"] == [
        "one.octavo",
        "two.octavo",
        "three.octavo",
    ]
    assert "Transpose" not in operators(int8)
    names = {tensor.name for tensor in int8.graph.initializer}
    assert not {"w2", "w3"} & names  # nobody reads them any more
    assert {"w", "w4", "bias"} <= names
    assert operators(given).count("Linear") == 0  # as it was
    x = make("normal", (1, 4, 16), "float32")
    exact = ort.InferenceSession(given.SerializeToString()).run(None, {"x": x})[0]
    assert np.abs(run(int8, x) - exact).max() < 0.05 * np.abs(exact).max()


@pytest.mark.parametrize("options", [Options(), Options(scheme="zeropoint"), octavo.recipe("best")], ids=str)
def test_products_of_one_input_are_one_operator(options: Options) -> None:
    """Four at a time, with the outputs that each has alone; with a bias or not, kept columns or not."""
    sizes = {"q": 48, "k": 16, "v": 7, "gate": 33, "up": 40}
    weights = {name: make("normal", (n, 64), "float32", n) for name, n in sizes.items()}
    bias = make("normal", (16,), "float32")
    nodes = [helper.make_node("MatMul", ["x", name], [f"of_{name}"], name) for name in weights]
    nodes.insert(2, helper.make_node("Add", ["of_k", "bias"], ["biased"]))
    outputs = ["biased" if name == "k" else f"of_{name}" for name in weights]
    nodes.append(helper.make_node("Concat", outputs, ["y"], axis=-1))
    given = model(nodes, {**{name: w.T for name, w in weights.items()}, "bias": bias}, 64, sum(sizes.values()))
    int8 = octavo_onnx.quantize_model(given, options, outlier_columns={"v": [5, 9]})
    assert operators(int8) == ["Linear", "Linear", "Concat"]
    assert [len(node.output) for node in int8.graph.node] == [4, 1, 1]
    x = make("outliers", (2, 9, 64), "float32")
    parts = []
    for name, w in weights.items():
        weight = octavo.quantize_weight(w, options=options, outlier_columns=[5, 9] if name == "v" else None)
        parts.append(octavo.linear(x, weight, bias if name == "k" else None, options=options))
    for threads in (1, 2):
        np.testing.assert_array_equal(run(int8, x, threads), np.concatenate(parts, -1))


def test_gelu_is_part_of_the_operator() -> None:
    """The exact one, where nothing else reads the product; q stays apart from what has none."""
    w, bias = make("normal", (32, 32), "float32"), make("normal", (32,), "float32")

    def graph(approximate: str, of: str = "h") -> Any:
        nodes = [
            helper.make_node("MatMul", ["x", "w"], ["product"]),
            helper.make_node("Add", ["product", "bias"], ["h"]),
            helper.make_node("MatMul", ["x", "q"], ["of_q"]),
            helper.make_node("Gelu", [of], ["g"], approximate=approximate),
            helper.make_node("Add", ["g", "of_q"], ["y"]),
        ]
        return octavo_onnx.quantize_model(model(nodes, {"w": w.T, "q": w.T, "bias": bias}, 32, 32))

    int8 = graph("none")
    assert operators(int8) == ["Linear", "Linear", "Add"]
    x = make("outliers", (2, 3, 32), "float32")
    weight = octavo.quantize_weight(w)
    h = octavo.linear(x, weight, bias)
    phi = np.vectorize(lambda value: math.erfc(-value / 2**0.5) / 2)(h.astype(np.float64))
    np.testing.assert_allclose(run(int8, x), h * phi + octavo.linear(x, weight), atol=1e-6)
    assert "Gelu" in operators(graph("tanh"))
    assert "Gelu" in operators(graph("none", of="product"))  # which has another reader


def test_what_onnx_runtime_quantized_to_int8(tmp_path: Path) -> None:
    """Its codes for each output feature stay as they are."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    w = make("normal", (40, 64), "float32")
    bias = make("normal", (40,), "float32")
    onnx.save(linear_model(w, bias), tmp_path / "m.onnx")
    x = make("normal", (2, 5, 64), "float32")
    for number, (weight_type, per_channel) in enumerate([(QuantType.QInt8, True), (QuantType.QUInt8, False)]):
        theirs = tmp_path / f"{number}.onnx"
        quantize_dynamic(tmp_path / "m.onnx", theirs, weight_type=weight_type, per_channel=per_channel)
        assert "MatMulInteger" in operators(onnx.load(theirs))
        int8 = octavo_onnx.quantize_model(theirs)
        assert operators(int8) == ["Linear"]
        exact = x @ w.T + bias
        error, their_error = (
            np.abs(y - exact).mean() for y in (run(int8, x), ort.InferenceSession(str(theirs)).run(None, {"x": x})[0])
        )
        assert error < (1 if per_channel else 1.5) * their_error  # one scale: rounded a second time
        if per_channel:
            given = onnx.load(theirs).graph.initializer
            (codes,) = (each for each in given if each.data_type == TensorProto.INT8 and len(each.dims) == 2)
            constants = {each.name.rpartition(".")[2]: numpy_helper.to_array(each) for each in int8.graph.initializer}
            weight = octavo.Int8Weight(
                constants["codes"], constants["scale"], code_sums=constants["code_sums"], shape=(40, 64)
            )
            np.testing.assert_array_equal(weight.codes, numpy_helper.to_array(codes).T)


@pytest.mark.parametrize(("bits", "zero"), [(4, None), (4, "uint8"), (4, "float32"), (8, None), (8, "uint8")])
def test_what_onnx_runtime_quantized_in_blocks(bits: int, zero: str | None) -> None:
    n, k, block = 24, 70, 32
    blocks, rng = 3, np.random.default_rng(bits)
    codes = rng.integers(0, 2**bits, (n, blocks * block), dtype=np.uint8)
    scales = rng.uniform(0.01, 0.02, n * blocks).astype(F)
    zeros = rng.integers(1, 2**bits - 1, (n, 4), dtype=np.uint8)  # of the last no block knows

    def packed(values: Any) -> Any:
        return values if bits == 8 else values[..., ::2] | values[..., 1::2] << 4

    constants = {"w": packed(codes).reshape(n, blocks, -1), "scales": scales}
    names = ["x", "w", "scales"]
    if zero is not None:
        of_blocks = packed(zeros) if bits == 4 else zeros[:, :blocks]
        constants["zeros"] = np.ascontiguousarray(of_blocks if zero == "uint8" else zeros[:, :blocks].astype(F)).ravel()
        names.append("zeros")
    node = helper.make_node(
        "MatMulNBits", names, ["y"], domain="com.microsoft", K=k, N=n, bits=bits, block_size=block, accuracy_level=1
    )
    given = model([node], constants, k, n)
    given.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    x = make("normal", (1, 6, k), "float32")
    theirs = ort.InferenceSession(given.SerializeToString()).run(None, {"x": x})[0]
    int8 = octavo_onnx.quantize_model(given)
    assert operators(int8) == ["Linear"]
    assert np.abs(run(int8, x) - theirs).max() < 0.02 * np.abs(theirs).max()


def test_external_data(tmp_path: Path) -> None:
    w = make("normal", (64, 64), "float32")
    onnx.save(linear_model(w), tmp_path / "m.onnx", save_as_external_data=True, location="m.bin", size_threshold=0)
    int8 = octavo_onnx.quantize_model(tmp_path / "m.onnx")
    onnx.save(int8, tmp_path / "int8.onnx", save_as_external_data=True, location="int8.bin", size_threshold=0)
    x = make("outliers", (1, 3, 64), "float32")
    session = ort.InferenceSession(str(tmp_path / "int8.onnx"), octavo_onnx.session_options())
    np.testing.assert_array_equal(session.run(None, {"x": x})[0], octavo.linear(x, octavo.quantize_weight(w)))


def test_onnx_runtime_joins_what_follows(tmp_path: Path) -> None:
    """It does so where it knows the shapes of what the operator gives."""
    w, bias = make("normal", (32, 32), "float32"), make("normal", (32,), "float32")
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["product"]),
        helper.make_node("Add", ["product", "bias"], ["h"]),
        helper.make_node("Add", ["h", "x"], ["sum"]),
        helper.make_node("LayerNormalization", ["sum", "one", "zero"], ["y"]),
    ]
    constants = {"w": w.T, "bias": bias, "one": np.ones(32, F), "zero": np.zeros(32, F)}
    int8 = octavo_onnx.quantize_model(model(nodes, constants, 32, 32))
    options = octavo_onnx.session_options(1)
    options.optimized_model_filepath = str(tmp_path / "as_run.onnx")
    session = ort.InferenceSession(int8.SerializeToString(), options)
    assert operators(onnx.load(tmp_path / "as_run.onnx")) == ["Linear", "SkipLayerNormalization"]
    x = make("outliers", (2, 3, 32), "float32")
    sums = octavo.linear(x, octavo.quantize_weight(w), bias) + x
    spread = np.sqrt(sums.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(
        session.run(None, {"x": x})[0], (sums - sums.mean(-1, keepdims=True)) / spread, atol=1e-5
    )


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/task of Linux")
def test_the_sessions_threads_do_the_work(tmp_path: Path) -> None:
    """Two pools on the same processors keep each other from them: octavo starts no threads of its own."""
    w = make("normal", (512, 512), "float32")
    onnx.save(octavo_onnx.quantize_model(linear_model(w)), tmp_path / "model.onnx")
    code = """
        import os, pathlib, sys, time
        import numpy, octavo.onnx, onnxruntime
        x = numpy.ones((1, 1024, 512), numpy.float32)
        octavo.linear(x[0], octavo.quantize_weight(x[0])) if sys.argv[1] == "calls itself" else None
        session = onnxruntime.InferenceSession("model.onnx", octavo.onnx.session_options(3))
        for _ in range(20):
            session.run(None, {"x": x})
            time.sleep(0.01)
        print([pathlib.Path(f"/proc/self/task/{task}/comm").read_text() for task in os.listdir("/proc/self/task")])
    """
    names = {}
    for way in ("calls itself", "operator alone"):
        words = [sys.executable, "-c", textwrap.dedent(code), way]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True)
        names[way] = done.stdout.count("octavo\\n")
    assert names == {"calls itself": octavo.get_num_threads() - 1, "operator alone": 0}


def test_what_is_refused() -> None:
    w = make("normal", (8, 16), "float32")
    with pytest.raises(ValueError, match=r"^quantize_model: outlier_columns: expected weights .*\['v'\]"):
        octavo_onnx.quantize_model(linear_model(w), outlier_columns={"v": [1]})
    with pytest.raises(ValueError, match="expected finite values"):
        octavo_onnx.quantize_model(linear_model(w * np.inf))
    for threads in (0, 2000):
        with pytest.raises(ValueError, match=r"^session_options: threads: expected 1 to 1024, got"):
            octavo_onnx.session_options(threads)
    for kind in (1.5, "2"):
        with pytest.raises(TypeError, match=r"^session_options: threads: expected an integer, got"):
            octavo_onnx.session_options(kind)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"scheme": "other"}, "scheme: got 'other'"),
        ({"activation": "relu"}, "activation: got 'relu'"),
        ({"in_features": 15}, r"linear_many\[0\]: x: expected"),
        ({"in_features": 2**62}, "expected"),
        ({"threshold": -1.0}, "threshold: expected"),
        ({"rotation": 3}, "rotation: expected"),
        ({"scheme": "zeropoint"}, "zeropoint: expected"),
    ],
)
def test_a_model_that_is_wrong_is_an_error_of_the_session(change: dict[str, Any], match: str) -> None:
    """Not a crash: what a model's file says is checked like any argument."""
    int8 = octavo_onnx.quantize_model(linear_model(make("normal", (8, 16), "float32")))
    (node,) = int8.graph.node
    for attribute in [each for each in node.attribute if each.name in change]:
        node.attribute.remove(attribute)
    node.attribute.extend(helper.make_attribute(name, value) for name, value in change.items())
    with pytest.raises(Exception, match=match):
        run(int8, np.ones((1, 2, 16), F))


@pytest.mark.parametrize("part", ["codes", "scale", "code_sums"])
def test_arrays_of_another_size_are_refused(part: str) -> None:
    int8 = octavo_onnx.quantize_model(linear_model(make("normal", (40, 16), "float32")))
    for tensor in int8.graph.initializer:
        if tensor.name.endswith(part):
            values = numpy_helper.to_array(tensor)
            tensor.CopyFrom(numpy_helper.from_array(values[:1], tensor.name))
    with pytest.raises(Exception, match=r"(codes|scale|code_sums): expected"):
        run(int8, np.ones((1, 2, 16), F))


def test_an_encoder(tmp_path: Path) -> None:
    """Exported by PyTorch, with external data: layer by layer octavo's, and embeddings as near as octavo.torch's."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript, which PyTorch's export needs, is not installed")
    transformers = pytest.importorskip("transformers", reason="Transformers is not installed")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    config = transformers.BertConfig(vocab_size=50, attn_implementation="eager", **sizes)
    encoder = transformers.BertModel(config, add_pooling_layer=False).eval()

    class Embeddings(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, ids: Any) -> Any:
            return self.encoder(input_ids=ids).last_hidden_state

    shapes = ({0: torch.export.Dim("b", min=1, max=64), 1: torch.export.Dim("s", min=2, max=64)},)
    ids = torch.randint(0, 50, (2, 7))
    program = torch.onnx.export(
        Embeddings(), (ids,), dynamo=True, dynamic_shapes=shapes, input_names=["ids"], verbose=False
    )
    program.save(tmp_path / "m.onnx", external_data=True)
    int8 = octavo_onnx.quantize_model(tmp_path / "m.onnx")
    layers = [node for node in int8.graph.node if node.domain == "octavo"]
    assert [len(node.output) for node in layers] == [3, 1, 1, 1] * 2  # q, k and v are one
    for name in {layers[-1].input[0], layers[-1].output[0]}:
        int8.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    session = ort.InferenceSession(int8.SerializeToString(), octavo_onnx.session_options(2))
    exact = ort.InferenceSession(str(tmp_path / "m.onnx"))
    from octavo.torch import quantize_

    last = encoder.encoder.layer[-1].output.dense
    weight = octavo.quantize_weight(last.weight.detach().numpy())
    bias = last.bias.detach().numpy()
    quantize_(encoder)
    for batch in ((1, 2), (5, 33)):
        ids = torch.randint(0, 50, batch)
        results = dict(
            zip([each.name for each in session.get_outputs()], session.run(None, {"ids": ids.numpy()}), strict=True)
        )
        y = next(iter(results.values()))
        np.testing.assert_array_equal(
            results[layers[-1].output[0]], octavo.linear(results[layers[-1].input[0]], weight, bias)
        )
        true = exact.run(None, {"ids": ids.numpy()})[0]
        with torch.no_grad():
            of_torch = Embeddings()(ids).numpy()
        error, of_theirs = (np.abs(each - true).mean() for each in (y, of_torch))
        assert 0 < error < 1.2 * of_theirs < 0.05 * np.abs(true).mean()
