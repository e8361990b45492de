"""`octavo inspect`: what a checkpoint holds, and what int8 saves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from octavo.checkpoint import format as names
from octavo.checkpoint.layers import is_stacked_experts
from octavo.checkpoint.reader import Checkpoint, Int8Layer


@dataclass(frozen=True)
class LayerSummary:
    """An int8 layer's weight.

    Attributes:
        name, format, scheme, granularity: "octavo" or "bitsandbytes"; see `octavo.quantize_weight`.
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

    def as_json(self) -> str:
        """For programs."""
        return json.dumps(asdict(self), indent=2)

    def as_table(self) -> str:
        """For people."""
        rows = [("layer", "n x k", "scheme", "MiB", "of 16 bit", "kept columns")]
        for layer in self.layers:
            n, k = layer.shape
            kept = "-" if layer.outlier_columns is None else str(layer.outlier_columns)
            scheme = f"{layer.scheme}, {layer.granularity}"
            rows.append((layer.name, f"{n} x {k}", scheme, _mib(layer.bytes), _mib(layer.bytes_16bit), kept))
        int8 = sum(layer.bytes for layer in self.layers)
        formats = sorted({layer.format for layer in self.layers})
        lines = _aligned(rows) if self.layers else []
        lines += [
            "",
            f"{self.path}: {len(self.files)} file{'s' * (len(self.files) != 1)}, "
            f"format {', '.join(formats) if formats else '16/32 bit'}",
            f"int8 layers    {len(self.layers):6}  {_mib(int8):>12} MiB",
            f"other tensors  {self.other_tensors:6}  {_mib(self.other_bytes):>12} MiB",
            *self._experts(),
            f"all                    {_mib(self.bytes):>12} MiB, 16 bit would take {self.ratio:.2f} times as much",
            f"checksums      {self.checksums:6}  {self._compared()}",
        ]
        return "\n".join(lines).strip()

    def _compared(self) -> str:
        if not self.checksums:
            return "in these files, so that damage to data cannot be told"
        return "all correct" if self.verified else "not compared (--verify does)"

    def _experts(self) -> list[str]:
        if not self.expert_tensors:
            return []
        return [
            f"  of experts   {self.expert_tensors:6}  {_mib(self.expert_bytes):>12} MiB, stacked: quantize leaves them,"
            " octavo.transformers converts most while loading"
        ]


def inspect(path: str | Path, *, verify: bool = False) -> Summary:
    """Summarize a checkpoint from its headers; see `Summary`.

    Args:
        path: a folder or a file: int8 or not.
        verify: also read all data and compare them with their checksums.

    Raises OSError and ValueError as `Checkpoint` does.
    """
    checkpoint = Checkpoint(path, framework="numpy")
    checksums = checkpoint.verify() if verify else checkpoint.checksums
    layers = [_layer(checkpoint, layer) for layer in checkpoint.layers.values()]
    inside = {entry.name for layer in checkpoint.layers.values() for entry in layer.parts.values()}
    others = [entry for name, entry in checkpoint.entries.items() if name not in inside and name not in checkpoint.ties]
    experts = [entry for entry in others if is_stacked_experts(entry.name, entry.shape)]
    parts = [entry for layer in checkpoint.layers.values() for entry in layer.parts.values()]
    size = sum(entry.nbytes for entry in [*others, *parts])
    floats = sum(2 * entry.numel if entry.dtype in _FLOATS else entry.nbytes for entry in others)
    size_16bit = floats + sum(layer.bytes_16bit for layer in layers)
    return Summary(
        str(path),
        [shard.path.name for shard in checkpoint.source.shards],
        layers,
        len(others),
        sum(entry.nbytes for entry in others),
        len(experts),
        sum(entry.nbytes for entry in experts),
        size,
        size_16bit,
        size_16bit / size if size else 1.0,
        checksums,
        verify and checksums > 0,
    )


_FLOATS = ("F64", "F32", "F16", "BF16")


def _layer(checkpoint: Checkpoint, layer: Int8Layer) -> LayerSummary:
    options = checkpoint.options(layer.name)
    weight = layer.parts[names.WEIGHT]
    columns = layer.parts.get(names.OUTLIER_COLUMNS)
    return LayerSummary(
        layer.name,
        layer.format,
        options.scheme,
        options.granularity,
        list(weight.shape),
        sum(entry.nbytes for entry in layer.parts.values()),
        2 * weight.numel,
        None if columns is None else columns.shape[0],
    )


def _mib(count: int) -> str:
    return f"{count / 2**20:,.2f}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column in (0, 2) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
