"""`octavo inspect`: what a checkpoint holds, and what int8 saves."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from octavo import file_format as names
from octavo._text import shown, table
from octavo.checkpoint.files import Entry
from octavo.checkpoint.reader import Checkpoint
from octavo.options import Options


@dataclass(frozen=True)
class LayerSummary:
    """An int8 layer's weight.

    Attributes:
        name, format: of the layer; "octavo", "packed" or "bitsandbytes".
        scheme, granularity, options: see `octavo.Options`, all of which `options` has by name.
        shape: ``[n, k]``.
        bytes: codes, scales, zeropoints and kept columns.
        bytes_16bit: of the weight in 16 bit.
        outlier_columns: how many are kept in 16 bit; None where the layer was not calibrated.
    """

    name: str
    format: str
    scheme: str
    granularity: str
    shape: list[int]
    bytes: int
    bytes_16bit: int
    outlier_columns: int | None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Summary:
    """A checkpoint.

    Attributes:
        path, files: where it is, and the names of its files.
        layers: int8 layers.
        other_tensors, other_bytes: everything else (embeddings, norms, biases, the output head).
        expert_tensors, expert_bytes: of these, weights of stacked experts, which `quantize` leaves as they are.
        bytes: of all tensors.
        bytes_16bit: of the same parameters in 16 bit.
        ratio: bytes_16bit / bytes.
        checksums: tensors with a CRC-32.
        verified: whether they were compared.
        kept: linear layers that `quantize` left in 16 bit, and why.
        measured: see `Checkpoint`.
    """

    path: str
    files: list[str]
    layers: list[LayerSummary]
    other_tensors: int
    other_bytes: int
    expert_tensors: int
    expert_bytes: int
    bytes: int
    bytes_16bit: int
    ratio: float
    checksums: int
    verified: bool
    kept: dict[str, str] = field(default_factory=dict)
    measured: dict[str, str] = field(default_factory=dict)

    def as_json(self) -> str:
        """For programs."""
        return json.dumps(asdict(self), indent=2)

    def as_table(self) -> str:
        """For people."""
        rows = [("layer", "options", "n x k", "MiB", "of 16 bit", "kept columns")]
        default = Options().to_dict()
        for layer in self.layers:
            kept = "-" if layer.outlier_columns is None else str(layer.outlier_columns)
            more = [f"{name} {value}" for name, value in layer.options.items() if value != default[name]]
            more = [each for each in more if not each.startswith(("scheme", "granularity"))]
            options = ", ".join([layer.scheme, layer.granularity, *more])
            sizes = _mib(layer.bytes), _mib(layer.bytes_16bit)
            rows.append((shown(layer.name), options, " x ".join(map(str, layer.shape)), *sizes, kept))
        checksums = "all correct" if self.verified else "not compared (--verify does)"
        if not self.checksums:
            checksums = "in these files, so that damage to data cannot be told"
        lines = [*table(rows, left=(0, 1)), ""] if self.layers else []
        if self.kept:
            kept_rows = [(shown(name), shown(why)) for name, why in self.kept.items()]
            lines += [*table([("in 16 bit", ""), *kept_rows], (0, 1)), ""]
        formats = ", ".join(sorted({layer.format for layer in self.layers})) or "16/32 bit"
        lines += [
            f"{shown(self.path)}: {len(self.files)} file{'s' * (len(self.files) != 1)}, format {formats}",
            f"int8 layers    {len(self.layers):6}  {_mib(sum(layer.bytes for layer in self.layers)):>12} MiB",
            f"other tensors  {self.other_tensors:6}  {_mib(self.other_bytes):>12} MiB",
        ]
        if self.expert_tensors:
            experts = f"  of experts   {self.expert_tensors:6}  {_mib(self.expert_bytes):>12} MiB"
            lines += [f"{experts}, stacked: quantize leaves them, octavo.transformers converts most while loading"]
        lines += [
            f"all                    {_mib(self.bytes):>12} MiB, 16 bit would take {self.ratio:.2f} times as much",
            f"checksums      {self.checksums:6}  {checksums}",
            *(f"{shown(name):14} {shown(value):>6}" for name, value in self.measured.items()),
        ]
        return "\n".join(lines)


def inspect(path: str | Path, *, verify: bool = False) -> Summary:
    """Summarize a checkpoint from its headers and scales; see `Summary`.

    Args:
        path: a folder or a file: int8 or not.
        verify: also read all data and compare them with their checksums.

    Raises OSError or ValueError as `Checkpoint` does.
    """
    checkpoint = Checkpoint(path, framework="numpy")
    if verify:
        checkpoint.verify()
    layers = [_layer(checkpoint, layer) for layer in checkpoint.layers]
    inside = {name for stored in checkpoint.layers.values() for name in stored.parts.values()}
    own = [entry for name, entry in checkpoint.entries.items() if name not in checkpoint.ties]
    others = [entry for entry in own if entry.name not in inside]
    experts = [entry for entry in others if len(entry.shape) == 3 and "experts" in entry.name]
    floats = sum(2 * each.numel if each.dtype in ("F64", "F32", "F16", "BF16") else each.nbytes for each in others)
    size, size_16bit = _bytes(own), floats + sum(layer.bytes_16bit for layer in layers)
    return Summary(
        path=str(path),
        files=[shard.path.name for shard in checkpoint.shards],
        layers=layers,
        other_tensors=len(others),
        other_bytes=_bytes(others),
        expert_tensors=len(experts),
        expert_bytes=_bytes(experts),
        bytes=size,
        bytes_16bit=size_16bit,
        ratio=size_16bit / size if size else 1.0,
        checksums=checkpoint.checksums,
        verified=verify and checkpoint.checksums > 0,
        kept=checkpoint.kept,
        measured=checkpoint.measured,
    )


def _layer(checkpoint: Checkpoint, layer: str) -> LayerSummary:
    options, stored, (n, k) = checkpoint.options(layer), checkpoint.layers[layer], checkpoint.shape(layer)
    parts = {part: checkpoint.entries[name] for part, name in stored.parts.items()}
    columns = parts.get(names.OUTLIER_COLUMNS)
    return LayerSummary(
        name=layer,
        format="packed" if names.CODE_SUMS in parts else stored.format,
        scheme=options.scheme,
        granularity=options.granularity,
        shape=[n, k],
        bytes=_bytes(parts.values()),
        bytes_16bit=2 * n * k,
        outlier_columns=None if columns is None else columns.shape[0],
        options=options.to_dict(),
    )


def _bytes(entries: Iterable[Entry]) -> int:
    return sum(entry.nbytes for entry in entries)


def _mib(count: int) -> str:
    return f"{count / 2**20:,.2f}"
