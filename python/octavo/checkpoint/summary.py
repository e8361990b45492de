"""`octavo inspect`: what a checkpoint holds, and what int8 saves."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from octavo import file_format as names
from octavo._sizes import shown, table
from octavo.checkpoint.reader import Checkpoint


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
        kept: linear layers that `quantize` left in 16 bit, and why.
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

    def as_json(self) -> str:
        """For programs."""
        return json.dumps(asdict(self), indent=2)

    def as_table(self) -> str:
        """For people."""
        rows = [("layer", "scheme", "n x k", "MiB", "of 16 bit", "kept columns")]
        for layer in self.layers:
            kept = "-" if layer.outlier_columns is None else str(layer.outlier_columns)
            scheme, shape = f"{layer.scheme}, {layer.granularity}", " x ".join(map(str, layer.shape))
            rows.append((shown(layer.name), scheme, shape, _mib(layer.bytes), _mib(layer.bytes_16bit), kept))
        int8 = sum(layer.bytes for layer in self.layers)
        formats = sorted({layer.format for layer in self.layers})
        checksums = "not compared (--verify does)"
        if not self.checksums:
            checksums = "in these files, so that damage to data cannot be told"
        elif self.verified:
            checksums = "all correct"
        lines = [*table(rows, left=(0, 1)), ""] if self.layers else []
        if self.kept:
            lines += [*table([("in 16 bit", ""), *((shown(name), why) for name, why in self.kept.items())], (0, 1)), ""]
        lines += [
            f"{shown(self.path)}: {len(self.files)} file{'s' * (len(self.files) != 1)}, "
            f"format {', '.join(formats) if formats else '16/32 bit'}",
            f"int8 layers    {len(self.layers):6}  {_mib(int8):>12} MiB",
            f"other tensors  {self.other_tensors:6}  {_mib(self.other_bytes):>12} MiB",
        ]
        if self.expert_tensors:
            experts = f"  of experts   {self.expert_tensors:6}  {_mib(self.expert_bytes):>12} MiB"
            lines += [f"{experts}, stacked: quantize leaves them, octavo.transformers converts most while loading"]
        lines += [
            f"all                    {_mib(self.bytes):>12} MiB, 16 bit would take {self.ratio:.2f} times as much",
            f"checksums      {self.checksums:6}  {checksums}",
        ]
        return "\n".join(lines)


def inspect(path: str | Path, *, verify: bool = False) -> Summary:
    """Summarize a checkpoint from its headers and scales; see `Summary`.

    Args:
        path: a folder or a file: int8 or not.
        verify: also read all data and compare them with their checksums.

    Raises OSError and ValueError as `Checkpoint` does.
    """
    checkpoint = Checkpoint(path, framework="numpy")
    checksums = checkpoint.verify() if verify else checkpoint.checksums
    layers = [_layer(checkpoint, layer) for layer in checkpoint.layers]
    inside = {name for stored in checkpoint.layers.values() for name in stored.parts.values()}
    stored = [entry for name, entry in checkpoint.entries.items() if name not in checkpoint.ties]
    others = [entry for entry in stored if entry.name not in inside]
    experts = [entry for entry in others if len(entry.shape) == 3 and "experts" in entry.name]
    size = sum(entry.nbytes for entry in stored)
    floats = sum(2 * entry.numel if entry.dtype in ("F64", "F32", "F16", "BF16") else entry.nbytes for entry in others)
    size_16bit = floats + sum(layer.bytes_16bit for layer in layers)
    return Summary(
        path=str(path),
        files=[shard.path.name for shard in checkpoint.source.shards],
        layers=layers,
        other_tensors=len(others),
        other_bytes=sum(entry.nbytes for entry in others),
        expert_tensors=len(experts),
        expert_bytes=sum(entry.nbytes for entry in experts),
        bytes=size,
        bytes_16bit=size_16bit,
        ratio=size_16bit / size if size else 1.0,
        checksums=checksums,
        verified=verify and checksums > 0,
        kept=checkpoint.kept,
    )


def _layer(checkpoint: Checkpoint, layer: str) -> LayerSummary:
    options, stored = checkpoint.options(layer), checkpoint.layers[layer]
    parts = {part: checkpoint.entries[name] for part, name in stored.parts.items()}
    columns = parts.get(names.OUTLIER_COLUMNS)
    return LayerSummary(
        name=layer,
        format=stored.format,
        scheme=options.scheme,
        granularity=options.granularity,
        shape=list(parts[names.CODES].shape),
        bytes=sum(entry.nbytes for entry in parts.values()),
        bytes_16bit=2 * parts[names.CODES].numel,
        outlier_columns=None if columns is None else columns.shape[0],
    )


def _mib(count: int) -> str:
    return f"{count / 2**20:,.2f}"
