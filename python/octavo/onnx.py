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
from octavo._text import expect, expect_patterns, matches
from octavo.options import Options

__all__ = ["library_path", "quantize_model", "session_options"]

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
        if not isinstance(threads, int) or not 1 <= threads <= 1024:
            raise ValueError(f"session_options: threads: expected 1 to 1024, got {threads!r}")
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
    """A model with octavo.Linear in place of every product with a constant weight.

    Those are ``MatMul`` of x and a weight ``[k, n]``, with the ``Add`` of a bias ``[n]`` that follows, and ``Gemm`` of
    an x as it is, unscaled, in the model's main graph. The input may be float32, float16 or bfloat16.

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
    columns = dict(outlier_columns or {})
    graph = _Graph(model.graph)
    for node in list(model.graph.node):
        found = graph.product(node)
        if found is None or any(matches(name, skip) for name in found.names):
            continue
        kept = next((columns.pop(name) for name in found.names if name in columns), None)
        graph.replace(found, options, kept)
    if columns:
        raise ValueError(f"quantize_model: outlier_columns: expected weights that are converted, got {sorted(columns)}")
    graph.finish()
    if all(entry.domain != "octavo" for entry in model.opset_import):
        model.opset_import.append(helper.make_opsetid("octavo", 1))
    return model


class _Product:
    """``output = x weight^T + bias``, computed by nodes of a graph, the last of which is at `place`."""

    def __init__(self, nodes: list[Any], x: str, weight: str, values: Any, bias: Any) -> None:
        self.nodes, self.x, self.values, self.bias = nodes, x, values, bias
        self.names = (weight, nodes[0].name)
        self.output = nodes[-1].output[0]


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
        self.weights: set[str] = set()

    def product(self, node: Any) -> _Product | None:
        """The product that begins with a node."""
        if node.domain or node.op_type not in ("MatMul", "Gemm") or id(node) in self.replaced:
            return None
        attributes = {each.name: helper.get_attribute_value(each) for each in node.attribute}
        name, values = self._weight(node.input[1])
        scaled = any(attributes.get(key, 1.0) != 1.0 for key in ("alpha", "beta"))
        if values is None or attributes.get("transA") or scaled:
            return None
        if not attributes.get("transB"):
            values = values.T
        nodes, bias = [node], None
        if len(node.input) > 2 and node.input[2]:
            bias = self._bias(node.input[2], len(values))
            if bias is None:
                return None
        readers = self.readers.get(node.output[0], [])
        if node.op_type == "MatMul" and len(readers) == 1 and getattr(readers[0], "op_type", "") == "Add":
            others = [other for other in readers[0].input if other != node.output[0]]
            bias = self._bias(others[0], len(values)) if others else None
            nodes += [readers[0]] if bias is not None else []
        return _Product(nodes, node.input[0], name, values, bias)

    def replace(self, product: _Product, options: Options, kept: Sequence[int] | None) -> None:
        """Put the operator where the last node of a product is."""
        weight = octavo.quantize_weight(np.ascontiguousarray(product.values), options=options, outlier_columns=kept)
        has_kept = weight.outlier_columns is not None
        arrays = {
            "codes": weight.packed if weight.is_packed else weight.codes,
            "scale": weight.scale,
            "code_sums": weight.code_sums,
            "zeropoint": weight.zeropoint,
            "outlier_columns": weight.outlier_columns,
            "outlier_weight": np.asarray(weight.outlier_weight, np.float32) if has_kept else None,
            "bias": product.bias,
        }
        names = [product.x]
        for part, array in arrays.items():
            names.append("" if array is None else f"{product.output}.octavo.{part}")
            if array is not None:
                self.graph.initializer.append(numpy_helper.from_array(np.asarray(array), names[-1]))
        while not names[-1]:
            names.pop()
        attributes = {key: value for key, value in asdict(options).items() if value is not None}
        attributes |= {"cap": repr(options.cap)} if options.cap is not None else {}
        attributes |= {"in_features": weight.shape[1], "threshold": float(options.threshold)}
        name = f"{product.nodes[0].name or product.output}.octavo"
        operator = helper.make_node("Linear", names, [product.output], name, domain="octavo", **attributes)
        self.replaced |= {id(node): None for node in product.nodes} | {id(product.nodes[-1]): operator}

    def finish(self) -> None:
        """Replace what was to be replaced; constants that nobody reads any more go."""
        nodes = [self.replaced.get(id(node), node) for node in self.graph.node]
        nodes = [node for node in nodes if node is not None]
        while True:
            read = {name for node in nodes for name in node.input} | {value.name for value in self.graph.output}
            read |= {name for node in nodes for name in _outer_names(node)}
            live = [n for n in nodes if n.op_type not in ("Constant", "Transpose") or read & set(n.output)]
            if len(live) == len(nodes):
                break
            nodes = live
        initializers = [tensor for tensor in self.graph.initializer if tensor.name in read]
        del self.graph.node[:], self.graph.initializer[:]
        self.graph.node.extend(nodes)
        self.graph.initializer.extend(initializers)

    def _weight(self, name: str) -> tuple[str, Any]:
        """Name and values of a constant matrix, or of the transpose of one."""
        maker = self.makers.get(name)
        turned = maker if maker is not None and maker.op_type == "Transpose" else None
        source = name if turned is None else turned.input[0]
        tensor = self.constants.get(source)
        if tensor is None or len(tensor.dims) != 2 or tensor.data_type not in _FLOATS:
            return source, None
        values = numpy_helper.to_array(tensor)
        return source, values if turned is None else values.T

    def _bias(self, name: str, n: int) -> Any:
        tensor = self.constants.get(name)
        if tensor is None or list(tensor.dims) != [n] or tensor.data_type not in _FLOATS:
            return None
        return numpy_helper.to_array(tensor).astype(np.float32)


def _outer_names(node: Any) -> set[str]:
    """What the graphs inside of a node read, of the graph that it is in among others."""
    names: set[str] = set()
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            for inner in graph.node:
                names |= {*inner.input, *_outer_names(inner)}
            names |= {value.name for value in graph.output}
    return names
