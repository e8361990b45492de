"""octavo in ONNX Runtime: the operator octavo.Linear, and a pass that puts it into a model.

```python
int8 = octavo.onnx.quantize_model("model.onnx")
onnx.save(int8, "int8.onnx")
session = onnxruntime.InferenceSession("int8.onnx", octavo.onnx.session_options())
```

It computes what `octavo.linear` does, bit for bit, on the CPU. Models of standard operators, without it, come from
`torch.onnx.export` of an `octavo.torch` model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import octavo
from octavo._text import expect, expect_patterns, matches, unexpected
from octavo.options import Options

__all__ = ["library_path", "quantize_model", "session_options"]

_MOST_LAYERS = 4  # of one operator
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)


def library_path() -> str:
    """The library for ``onnxruntime.SessionOptions.register_custom_ops_library``, ONNX Runtime 1.16 or later."""
    return str(Path(octavo.__file__).with_name("libonnx_ops.so"))


def session_options(threads: int | None = None) -> Any:
    """``onnxruntime.SessionOptions`` with the operator registered.

    Args:
        threads: how many ONNX Runtime and the operator use; default: the number of each (`octavo.get_num_threads`).
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if threads is not None:
        expect("session_options: threads", threads, int, "an integer")
        if not 1 <= threads <= 1024:
            raise unexpected("session_options: threads", "1 to 1024", threads)
        options.intra_op_num_threads = threads
        options.add_session_config_entry("octavo.threads", str(threads))
    options.register_custom_ops_library(library_path())
    return options


def quantize_model(
    model: onnx.ModelProto | str | Path,
    options: Options | None = None,
    *,
    outlier_columns: Mapping[str, Sequence[int]] | None = None,
    skip: Sequence[str] = ("*lm_head*",),
) -> onnx.ModelProto:
    """A model with octavo.Linear in place of every product with a constant weight; of one x, up to four in one.

    Those are ``MatMul`` of x and a weight ``[k, n]``, with the ``Add`` of a bias ``[n]`` that follows, and ``Gemm`` of
    an x as it is, unscaled, in the model's main graph. The input may be float32, float16 or bfloat16. So are what ONNX
    Runtime's tools make of them: ``MatMulInteger`` between ``DynamicQuantizeLinear`` and the scales, and
    ``MatMulNBits``. Their weights are dequantized and quantized anew: int8 codes with a scale for each output feature
    stay as they are (absmax, "vector", without rotation), others are rounded a second time. The operator also
    computes a ``Gelu`` that alone reads a product, unless it is the approximation by tanh.

    Args:
        model: a model, or its file; data beside it are read, too.
        options: how weights are quantized and products run; default: `octavo.Options`.
        outlier_columns: input features to keep in 16 bit, as found by a calibration, by name of a weight or node.
        skip: patterns of names of weights or nodes that stay.

    Returns:
        A new model. Save one of more than 2 GiB with ``save_as_external_data=True``.

    Raises:
        ValueError: a weight holds NaN or Inf; a name in `outlier_columns` is not among those converted.
    """
    expect("quantize_model: model", model, (onnx.ModelProto, str, PathLike), "a model or its path")
    if options is not None:
        expect("quantize_model: options", options, Options, "octavo.Options")
    if outlier_columns is not None:
        expect("quantize_model: outlier_columns", outlier_columns, Mapping, "a mapping")
    expect_patterns("quantize_model: skip", skip)
    options = options or Options()
    if isinstance(model, onnx.ModelProto):
        given, model = model, onnx.ModelProto()
        model.CopyFrom(given)
    else:
        model = onnx.load(str(model))
    _tell_shapes(model)
    columns, graph = dict(outlier_columns or {}), _Graph(model.graph)
    by_input: dict[tuple[str, str], list[_Product]] = {}
    for found in map(graph.product, list(model.graph.node)):
        if found is not None and not any(matches(name, skip) for name in found.names):
            found.kept = next((columns.pop(name) for name in found.names if name in columns), None)
            by_input.setdefault((found.x, found.activation), []).append(found)
    if columns:
        raise ValueError(f"quantize_model: outlier_columns: expected weights that are converted, got {sorted(columns)}")
    for products in by_input.values():
        for first in range(0, len(products), _MOST_LAYERS):
            graph.replace(products[first : first + _MOST_LAYERS], options)
    graph.finish()
    if all(entry.domain != "octavo" for entry in model.opset_import):
        model.opset_import.append(helper.make_opsetid("octavo", 1))
    return model


def _tell_shapes(model: onnx.ModelProto) -> None:
    """Write the shapes of all values into a model: ONNX Runtime knows none of an operator that is not its own.

    Without them it does not join the additions and layer norms that follow. A model of more than 2 GiB goes without.
    """
    if model.ByteSize() < onnx.checker.MAXIMUM_PROTOBUF:
        shapes = onnx.shape_inference.infer_shapes(model).graph.value_info
        del model.graph.value_info[:]
        model.graph.value_info.extend(shapes)


class _Product:
    """``output = x weight^T + bias``, or its gelu, computed by nodes of a graph."""

    kept: Sequence[int] | None = None

    def __init__(self, nodes: list[Any], gelu: list[Any], x: str, weight: str, values: Any, bias: Any) -> None:
        self.nodes, self.x, self.values, self.bias = [*nodes, *gelu], x, values, bias
        self.activation = "gelu" if gelu else "none"
        self.names = (weight, nodes[0].name)
        self.output = self.nodes[-1].output[0]


class _Graph:
    def __init__(self, graph: Any) -> None:
        self.graph = graph
        inputs = {value.name for value in graph.input}  # an initializer that is an input, too, is no constant
        self.constants = {tensor.name: tensor for tensor in graph.initializer if tensor.name not in inputs}
        for node in graph.node:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self.constants[node.output[0]] = node.attribute[0].t
        self.makers = {output: node for node in graph.node for output in node.output}
        self.readers: dict[str, list[Any]] = {value.name: [value] for value in graph.output}
        for node in graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.replaced: dict[int, Any] = {}  # by id of a node: what takes its place, None for nothing

    def product(self, node: Any) -> _Product | None:
        """The product that begins with a node."""
        attributes = {each.name: helper.get_attribute_value(each) for each in node.attribute}
        nodes, x, bias = [node], node.input[0] if node.input else "", None
        values: Any = None
        if node.op_type in ("MatMul", "Gemm") and not node.domain:
            name, values = self._weight(node.input[1])
            scaled = any(attributes.get(key, 1.0) != 1.0 for key in ("alpha", "beta"))
            if values is None or attributes.get("transA") or scaled:
                return None
            values = values if attributes.get("transB") else values.T
            bias = node.input[2] if len(node.input) > 2 else None
        elif node.op_type == "MatMulInteger" and not node.domain:
            name, x, values, nodes = self._of_integers(node)
        elif node.op_type == "MatMulNBits" and node.domain == "com.microsoft":
            name, values = node.input[1], self._of_blocks(node, attributes)
            bias = node.input[5] if len(node.input) > 5 else None
        given = self._bias(bias, len(values)) if bias and values is not None else None
        if values is None or (bias and given is None):
            return None
        add = self._reader(nodes[-1], "Add")
        if not bias and add is not None:
            others = [other for other in add.input if other != nodes[-1].output[0]]
            given = self._bias(others[0], len(values)) if others else None
            nodes = [*nodes, add] if given is not None else nodes
        gelu = self._reader(nodes[-1], "Gelu")
        is_exact = gelu is not None and all(helper.get_attribute_value(each) == b"none" for each in gelu.attribute)
        return _Product(nodes, [gelu] if is_exact else [], x, name, values, given)

    def replace(self, products: Sequence[_Product], options: Options) -> None:
        """Put one operator where the first node of products of one input is."""
        names, last = [products[0].x], 0
        for product in products:
            values = np.ascontiguousarray(product.values)
            weight = octavo.quantize_weight(values, options=options, outlier_columns=product.kept)
            for part, array in {**weight._arrays(), "bias": product.bias}.items():
                names.append("" if array is None else f"{product.output}.octavo.{part}")
                if array is not None:
                    values = np.asarray(array, np.float32) if part == "outlier_weight" else np.asarray(array)
                    self.graph.initializer.append(numpy_helper.from_array(values, names[-1]))
                    last = len(names)
        attributes = {key: value for key, value in asdict(options).items() if value is not None}
        attributes |= {"cap": repr(options.cap)} if options.cap is not None else {}
        attributes |= {"in_features": weight.shape[1], "threshold": float(options.threshold)}
        attributes |= {"activation": products[0].activation}
        outputs = [product.output for product in products]
        name = f"{products[0].nodes[0].name or outputs[0]}.octavo"
        operator = helper.make_node("Linear", names[:last], outputs, name, domain="octavo", **attributes)
        self.replaced |= {id(node): None for product in products for node in product.nodes}
        self.replaced[id(products[0].nodes[0])] = operator

    def finish(self) -> None:
        """Replace what was to be replaced; what nobody reads any more goes."""
        nodes = [new for node in self.graph.node if (new := self.replaced.get(id(node), node)) is not None]
        count = None
        while count != len(nodes):
            count = len(nodes)
            read = {name for node in nodes for name in (*node.input, *_outer_names(node))}
            read |= {value.name for value in self.graph.output}
            nodes = [node for node in nodes if read & set(node.output)]
        initializers = [tensor for tensor in self.graph.initializer if tensor.name in read]
        made = {name for node in nodes for name in node.output}
        shapes = [value for value in self.graph.value_info if value.name in made]
        del self.graph.node[:], self.graph.initializer[:], self.graph.value_info[:]
        self.graph.node.extend(nodes)
        self.graph.initializer.extend(initializers)
        self.graph.value_info.extend(shapes)

    def _weight(self, name: str) -> tuple[str, Any]:
        """Name and values of a constant matrix, or of the transpose of one."""
        maker = self.makers.get(name)
        if maker is None or maker.op_type != "Transpose":
            return name, self._constant(name, rank=2)
        values = self._constant(maker.input[0], rank=2)
        return maker.input[0], None if values is None else values.T

    def _of_integers(self, node: Any) -> tuple[str, str, Any, list[Any]]:
        """Name of the weight, x, values and nodes of a product of an x that DynamicQuantizeLinear quantized.

        ``MatMulInteger(codes of x, codes of W, ...)``, ``Cast``, and ``Mul`` by the product of both scales.
        """
        quantizer, cast = self.makers.get(node.input[0]), self._reader(node, "Cast")
        mul = None if cast is None else self._reader(cast, "Mul")
        codes, zero = self._constant(node.input[1]), self._constant(node.input[3]) if len(node.input) > 3 else 0
        if quantizer is None or quantizer.op_type != "DynamicQuantizeLinear" or mul is None or codes is None:
            return "", "", None, []
        scales = next((self.makers[name] for name in mul.input if name in self.makers and name != cast.output[0]), None)
        if scales is None or scales.op_type != "Mul" or quantizer.output[1] not in scales.input or codes.ndim != 2:
            return "", "", None, []
        scale = next((self._constant(name) for name in scales.input if name != quantizer.output[1]), None)
        if scale is None or zero is None:
            return "", "", None, []
        values = (codes.astype(np.float32) - np.asarray(zero, np.float32)) * scale.astype(np.float32)
        return node.input[1], quantizer.input[0], values.T, [node, cast, mul]

    def _of_blocks(self, node: Any, attributes: Mapping[str, Any]) -> Any:
        """The values ``[n, k]`` of a weight of MatMulNBits: codes of few bits, a scale for each block of a row."""
        n, k, bits, block = (attributes.get(name, 4) for name in ("N", "K", "bits", "block_size"))
        arrays = [self._constant(name) if name else None for name in [*node.input[1:5], *[""] * 3][:4]]
        codes, scale, zero, order = arrays
        if codes is None or scale is None or order is not None or bits not in (2, 4, 8):
            return None
        if any(name and array is None for name, array in zip(node.input[3:5], arrays[2:], strict=False)):
            return None

        def unpacked(array: Any) -> Any:  # the lower bits come first
            shifts = np.arange(0, 8, bits, dtype=np.uint8)
            parts = array.astype(np.uint8)[..., None] >> shifts & (2**bits - 1)
            return parts.reshape(n, -1).astype(np.float32)

        blocks = -(-k // block)
        if zero is None:
            zero = np.full((n, blocks), 2.0 ** (bits - 1), np.float32)
        elif zero.dtype == np.uint8:
            zero = unpacked(zero)[:, :blocks]
        values = unpacked(codes).reshape(n, blocks, block) - zero.reshape(n, blocks, 1).astype(np.float32)
        return (values * scale.reshape(n, blocks, 1).astype(np.float32)).reshape(n, -1)[:, :k]

    def _constant(self, name: str, rank: int | None = None) -> Any:
        """A constant's values; with a rank, of a floating-point one of that rank; else None."""
        tensor = self.constants.get(name)
        if tensor is None or (rank and (len(tensor.dims) != rank or tensor.data_type not in _FLOATS)):
            return None
        return numpy_helper.to_array(tensor)

    def _reader(self, node: Any, op_type: str) -> Any:
        """The only node that reads the output of another, if it is of that type."""
        readers = self.readers.get(node.output[0], [])
        return readers[0] if len(readers) == 1 and getattr(readers[0], "op_type", "") == op_type else None

    def _bias(self, name: str, n: int) -> Any:
        values = self._constant(name, rank=1)
        return None if values is None or len(values) != n else values.astype(np.float32)


def _outer_names(node: Any) -> set[str]:
    """What the graphs inside of a node read, of the graph that it is in among others."""
    names: set[str] = set()
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            for inner in graph.node:
                names |= {*inner.input, *_outer_names(inner)}
            names |= {value.name for value in graph.output}
    return names
