"""Where the inputs of linear layers are outlying, and which features are so systematically.

As the paper counts (section 4): a feature i has a column in each hidden state, that is in the input of query, key and
value, of the attention output and of the feed-forward's first layer. At a position of a layer it is outlying where its
magnitude reaches the threshold in any of these three. Shares of positions are of all positions of all layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo_bench.measuring.language import Language, Window
from octavo_bench.measuring.modules import hooked
from octavo_bench.measuring.progress import Progress
from octavo_bench.measuring.systematic import outlying as is_outlying

from .blocks import HIDDEN_STATES, Projection, projections


@dataclass(frozen=True)
class Columns:
    """The outlier columns of one linear layer."""

    layer: int
    name: str
    takes: str
    columns: list[int]  # ascending
    share: list[float]  # of positions at which each column is outlying
    largest: float  # magnitude, over all columns


@dataclass(frozen=True)
class Observation:
    """What was seen over all positions."""

    positions: int
    share: Tensor  # float64 [layers, width]: of the layer's positions at which a feature is outlying
    largest: Tensor  # float32 [layers, width]: magnitude in the layer's hidden states
    positive: Tensor  # int64 [width]: outlying values above 0, over all hidden states
    negative: Tensor  # int64 [width]
    projections: list[Columns]

    @property
    def width(self) -> int:
        """Of the hidden states."""
        return self.share.shape[1]


@dataclass(frozen=True)
class Feature:
    """One outlier feature."""

    number: int
    layers: float  # share of layers that it is outlying in
    positions: float  # share of all positions of all layers
    largest: float  # magnitude
    one_sided: bool  # all its outlying values have one sign


@dataclass(frozen=True)
class Spread:
    """All outlier features together, and the values of the most common one."""

    layers: float  # share of layers in which any of them is outlying
    positions: float  # share of positions
    most_common: int | None
    quartiles: list[float] | None  # of its outlying values: lower quartile, median, upper quartile


def observe(language: Language, windows: Sequence[Window], threshold: float, progress: Progress) -> Observation:
    """Run the windows and count."""
    found = projections(language.model)
    layers = 1 + max(projection.layer for projection in found)
    width = language.model.config.hidden_size
    watched = _hidden_states(found, width)
    largest = {projection: torch.zeros(projection.module.in_features) for projection in found}
    counts = {projection: torch.zeros(projection.module.in_features, dtype=torch.int64) for projection in found}
    affected = torch.zeros(layers, width, dtype=torch.int64)
    positive, negative = torch.zeros(width, dtype=torch.int64), torch.zeros(width, dtype=torch.int64)
    outlying: dict[int, Tensor] = {}  # by layer: bool [positions, width] of the window being run

    def see(projection: Projection, x: Tensor) -> None:
        mask = is_outlying(x, threshold)
        largest[projection] = torch.maximum(largest[projection], x.abs().amax(0))
        counts[projection] += mask.sum(0)
        if projection in watched:
            outlying[projection.layer] = outlying[projection.layer] | mask if projection.layer in outlying else mask
            positive.add_((mask & (x > 0)).sum(0))
            negative.add_((mask & (x < 0)).sum(0))

    def done() -> None:
        for layer, mask in outlying.items():
            affected[layer] += mask.sum(0)
        outlying.clear()

    watch(language, windows, found, see, done, progress, "looking for outlier features")
    positions = sum(window.ids.shape[1] for window in windows)
    magnitudes = torch.zeros(layers, width)
    for projection in watched:
        magnitudes[projection.layer] = torch.maximum(magnitudes[projection.layer], largest[projection])
    columns = [_columns(projection, largest[projection], counts[projection], positions) for projection in found]
    return Observation(positions, affected.double() / positions, magnitudes, positive, negative, columns)


def ever_outlying(seen: Observation) -> list[int]:
    """The features that are outlying at some position of some layer, ascending."""
    found: list[int] = (seen.share > 0).any(0).nonzero().flatten().tolist()
    return found


def outlier_features(seen: Observation, min_layers: float, min_positions: float) -> list[Feature]:
    """The features that are outlying in enough layers and at enough positions, the most common first."""
    layers = (seen.share > 0).double().mean(0)
    positions = seen.share.mean(0)
    chosen = (positions > 0) & (layers >= min_layers) & (positions >= min_positions)
    found = [
        Feature(
            number,
            float(layers[number]),
            float(positions[number]),
            float(seen.largest[:, number].max()),
            bool(seen.positive[number] == 0) != bool(seen.negative[number] == 0),
        )
        for number in chosen.nonzero().flatten().tolist()
    ]
    return sorted(found, key=lambda feature: (-feature.positions, -feature.largest, feature.number))


def spread(
    language: Language, windows: Sequence[Window], features: Sequence[int], threshold: float, progress: Progress
) -> Spread:
    """Look again at the outlier features, `features`, the most common first."""
    watched = _hidden_states(projections(language.model), language.model.config.hidden_size)
    values: list[Tensor] = []  # of the most common feature
    outlying: dict[int, Tensor] = {}  # by layer: bool [positions] of the window being run
    affected: dict[int, int] = dict.fromkeys((projection.layer for projection in watched), 0)
    index = torch.tensor(list(features), dtype=torch.int64)

    def see(projection: Projection, x: Tensor) -> None:
        if not features:
            return
        x = x[:, index]
        mask = is_outlying(x, threshold)
        values.append(x[mask[:, 0], 0])
        here = mask.any(1)
        outlying[projection.layer] = outlying[projection.layer] | here if projection.layer in outlying else here

    def done() -> None:
        for layer, mask in outlying.items():
            affected[layer] += int(mask.sum())
        outlying.clear()

    watch(language, windows, watched, see, done, progress, "measuring outlier features")
    if not features:
        return Spread(0.0, 0.0, None, None)
    positions = sum(window.ids.shape[1] for window in windows)
    quarters = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    return Spread(
        sum(count > 0 for count in affected.values()) / len(affected),
        sum(affected.values()) / (positions * len(affected)),
        features[0],
        _quantiles(torch.cat(values).double(), quarters),
    )


def _hidden_states(found: Sequence[Projection], width: int) -> list[Projection]:
    """One linear layer for each different hidden state of each layer: query, key and value take the same one.

    An attention output of another width than the hidden states' (some models have such heads) is not among them.
    """
    first = {
        (projection.layer, projection.takes): projection
        for projection in reversed(found)
        if projection.takes in HIDDEN_STATES and projection.module.in_features == width
    }
    return list(first.values())


def _columns(projection: Projection, largest: Tensor, counts: Tensor, positions: int) -> Columns:
    columns = counts.nonzero().flatten().tolist()
    share = (counts[columns].double() / positions).tolist()
    return Columns(projection.layer, projection.name, projection.takes, columns, share, float(largest.max()))


def _quantiles(values: Tensor, at: Tensor) -> list[float]:
    """As torch.quantile with linear interpolation, which refuses more than 16 million values."""
    ordered = values.sort().values
    place = at * (len(ordered) - 1)
    below = ordered[place.floor().long()]
    return (below + (place - place.floor()) * (ordered[place.ceil().long()] - below)).tolist()


def watch(
    language: Language,
    windows: Sequence[Window],
    watched: Sequence[Projection],
    see: Callable[[Projection, Tensor], None],
    done: Callable[[], None],
    progress: Progress,
    doing: str,
) -> None:
    """Run the windows; calls see(projection, x float32 [positions, k]) for each input, done() after each window."""

    def hook(projection: Projection) -> Callable[..., None]:
        return lambda module, args: see(projection, args[0].detach().reshape(-1, args[0].shape[-1]).float())

    with hooked((p.module, hook(p)) for p in watched), torch.inference_mode():
        for window in windows:
            with progress.step(doing):
                language.model(**window.inputs)
                done()
