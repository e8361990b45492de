"""The models that are compared: one for each scheme of octavo and for each peer, made one after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from octavo_bench.measuring import peers, schemes
from octavo_bench.measuring.modules import linear_bytes
from octavo_bench.measuring.peers import PEERS, Peer
from octavo_bench.measuring.schemes import (
    FLOAT32,
    KEPT_COLUMNS,
    KEPT_ROWS,
    KEPT_STATIC,
    KEPT_ZEROPOINT,
    ROWS,
    SMOOTH_LLM_INT8,
    SMOOTH_VECTOR,
    TABLE_1,
    Scheme,
)

# Table 1; then what the 16-bit outlier weights are worth, and what the choice of outlier columns; then SmoothQuant.
SCHEMES = (*TABLE_1, ROWS, KEPT_COLUMNS, KEPT_ZEROPOINT, KEPT_ROWS, KEPT_STATIC, SMOOTH_VECTOR, SMOOTH_LLM_INT8)


@dataclass(frozen=True)
class Variant:
    """A row of the tables. `make` converts a copy of the float32 model; `held` are the bytes of its linear layers."""

    key: str
    name: str
    make: Callable[[], nn.Module]
    held: Callable[[nn.Module], int]


def chosen(keys: Sequence[str] | None) -> list[Scheme]:
    """The schemes of these names, in the table's order; all for None.

    Raises ValueError for a name that there is not.
    """
    known = [scheme.key for scheme in SCHEMES]
    for key in keys or []:
        if key not in known:
            raise ValueError(f"--schemes: expected some of {', '.join(known)}; got {key}")
    return [scheme for scheme in SCHEMES if keys is None or scheme.key in keys]


def of_schemes(
    model: nn.Module,
    wanted: Sequence[Scheme],
    calibration: Sequence[Mapping[str, Tensor]],
    *,
    insert: bool,
    required: bool,
) -> tuple[list[Variant], dict[str, str]]:
    """The schemes' variants of the float32 `model`, float32 first, and why others are left out, by name.

    `insert`: as in octavo.torch.smooth_. Where `required`, a scheme that the model does not allow is an error.
    """
    variants = [Variant(FLOAT32.key, FLOAT32.name, lambda: model, linear_bytes)]
    left_out: dict[str, str] = {}
    ready = schemes.calibrated(model, calibration) if any(scheme.kept for scheme in wanted) else model
    smooth: nn.Module | None = None
    if any(scheme.smooth for scheme in wanted):
        try:
            smooth = schemes.smoothed(model, calibration, insert=insert)
        except ValueError as error:
            if required:
                raise
            left_out = {scheme.name: str(error) for scheme in wanted if scheme.smooth}

    def variant(scheme: Scheme, base: nn.Module) -> Variant:
        return Variant(scheme.key, scheme.name, lambda: schemes.convert(base, scheme), linear_bytes)

    for scheme in wanted:
        base = smooth if scheme.smooth else ready if scheme.kept else model
        if scheme != FLOAT32 and base is not None:
            variants.append(variant(scheme, base))
    return variants, left_out


def of_peers(model: nn.Module) -> tuple[list[Variant], dict[str, str]]:
    """The peers' variants of the float32 `model`, and why others are left out, by name."""
    variants, left_out = [], {}

    def variant(peer: Peer) -> Variant:
        return Variant(
            peer.key,
            f"{peer.name} ({peers.package_version(peer)})",
            lambda: peers.convert(model, peer),
            lambda converted: peers.linear_bytes(converted, model, peer),
        )

    for peer in PEERS:
        if peers.package_version(peer) is None:
            left_out[peer.name] = f"{peer.package} is not installed"
        else:
            variants.append(variant(peer))
    return variants, left_out
