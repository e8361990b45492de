"""Where the inputs of linear layers are outlying, and which features are so systematically.

As the paper counts (section 4): a feature i has a column in each hidden state, that is in the input of query, key and
value, of the attention output and of the feed-forward's first layer. At a position of a layer it is outlying where its
magnitude reaches the threshold in any of these three. Shares of positions are of all positions of all layers.
"""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from ..models.language import Language, Window
from ..models.modules import HIDDEN_STATES, Projection, hooked, projections
from ..progress import Progress
from ..tables import Table

_LISTED = 12  # columns that a cell names


@dataclass(frozen=True)
class Feature:
    """One outlier feature."""

    number: int
    layers: float  # share of layers that it is outlying in
    positions: float  # share of all positions of all layers
    largest: float  # magnitude
    one_sided: bool  # all its outlying values have one sign


@dataclass(frozen=True)
class Observation:
    """What was seen over all positions."""

    positions: int  # of all windows
    magnitudes: Tensor  # float32 [layers, width], the largest of each feature in the layer's hidden states
    where: Tensor  # int64 [found, 3], layer, position and feature of each outlying value of a hidden state
    values: Tensor  # float32 [found], those values
    counts: dict[Projection, Tensor]  # int64 [k], by linear layer: positions at which each column is outlying
    largest: dict[Projection, Tensor]  # float32 [k], the largest magnitudes

    @property
    def width(self) -> int:
        """Of the hidden states."""
        return self.magnitudes.shape[1]

    def shares(self) -> Tensor:
        """Of each layer's positions at which a feature is outlying, float64 [layers, width]."""
        once = self.where.unique(dim=0)  # outlying in two of a layer's hidden states is outlying once
        counts = torch.zeros(self.magnitudes.shape, dtype=torch.float64)
        counts.index_put_((once[:, 0], once[:, 2]), torch.ones(len(once), dtype=torch.float64), accumulate=True)
        return counts / self.positions

    def ever_outlying(self) -> list[int]:
        """The features that are outlying at some position of some layer, ascending."""
        return self.where[:, 2].unique().tolist()

    def features(self, min_layers: float, min_positions: float) -> list[Feature]:
        """The features that are outlying in enough layers and at enough positions, the most common first."""
        share = self.shares()
        layers, positions = (share > 0).double().mean(0), share.mean(0)
        found = []
        chosen = (positions > 0) & (layers >= min_layers) & (positions >= min_positions)
        for number in chosen.nonzero()[:, 0].tolist():
            own = self.values[self.where[:, 2] == number]
            one_sided = bool((own > 0).all() or (own < 0).all())
            largest = float(self.magnitudes[:, number].max())
            found.append(Feature(number, float(layers[number]), float(positions[number]), largest, one_sided))
        return sorted(found, key=lambda feature: (-feature.positions, -feature.largest, feature.number))


def observe(language: Language, windows: Sequence[Window], threshold: float, progress: Progress) -> Observation:
    """Run the windows and count. As in octavo.find_outliers, NaN and Inf are outlying."""
    found = projections(language.model)
    layers, width = 1 + max(each.layer for each in found), language.model.config.hidden_size
    # One linear layer for each different hidden state of each layer: query, key and value take the same one. An
    # attention output of another width than the hidden states' (some models have such heads) is not among them.
    states = [each for each in found if each.takes in HIDDEN_STATES and each.module.in_features == width]
    hidden = {(each.layer, each.takes): each for each in reversed(states)}.values()
    largest = {each: torch.zeros(each.module.in_features) for each in found}
    counts = {each: torch.zeros(each.module.in_features, dtype=torch.int64) for each in found}
    where, values, begin = [torch.empty(0, 3, dtype=torch.int64)], [torch.empty(0)], 0

    def see(projection: Projection, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].detach().reshape(-1, args[0].shape[-1]).float()
        mask = ~(x.abs() < threshold)
        largest[projection] = torch.maximum(largest[projection], x.abs().amax(0))
        counts[projection] += mask.sum(0)
        if projection in hidden:
            places = mask.nonzero()
            layer = torch.full_like(places[:, :1], projection.layer)
            where.append(torch.cat([layer, places + torch.tensor([begin, 0])], 1))
            values.append(x[mask])

    for window in windows:
        with (
            progress.step("looking for outlier features"), torch.inference_mode(),
            hooked((each.module, partial(see, each)) for each in found),
        ):  # fmt: skip
            language.model(**window.inputs)
            begin += window.ids.shape[1]
    magnitudes = torch.zeros(layers, width)
    for each in hidden:
        magnitudes[each.layer] = torch.maximum(magnitudes[each.layer], largest[each])
    return Observation(begin, magnitudes, torch.cat(where), torch.cat(values), counts, largest)


def model_table(
    seen: Observation, features: Sequence[Feature], settings: Namespace, top: float, without: float | None
) -> Table:
    """A row of the paper's Table 4. `top`, `without`: the top-1 probability with the features and without."""
    mine = torch.isin(seen.where[:, 2], torch.tensor([feature.number for feature in features], dtype=torch.int64))
    here = seen.where[mine][:, :2].unique(dim=0)  # layers and positions
    layers = len(seen.magnitudes)
    quartiles: list[float | None] = [None, None, None]
    if features:
        values = seen.values[seen.where[:, 2] == features[0].number]
        quartiles = np.quantile(values.double(), (0.25, 0.5, 0.75), method="nearest").tolist()
    return Table(
        f"Features of magnitude {settings.threshold:g} or more in {settings.min_layers:.0%} of layers and at "
        f"{settings.min_positions:.0%} of positions",
        {
            "": "", "count": "d", "one-sided": "d", "layers, %": ".1f", "positions, %": ".1f", "lower quartile": ".1f",
            "median": ".1f", "upper quartile": ".1f", "top-1 with": ".4f", "top-1 without": ".4f",
        },
        [[
            "outlier features", len(features), sum(feature.one_sided for feature in features),
            100 * len(here[:, 0].unique()) / layers, 100 * len(here) / (layers * seen.positions), *quartiles,
            top, without,
        ]],
        "Quartiles: outlying values of the most common one. Top-1: mean of the largest softmax probability (of the "
        "next token; in an encoder of attention), with them and with them zeroed in front of query, key and value.",
    )  # fmt: skip


def feature_table(features: Sequence[Feature]) -> Table:
    """Each outlier feature."""
    columns = {"feature": "", "layers, %": ".1f", "positions, %": ".1f", "largest magnitude": ".1f", "one-sided": ""}
    sides = {True: "yes", False: "no"}
    rows = [[str(f.number), 100 * f.layers, 100 * f.positions, f.largest, sides[f.one_sided]] for f in features]
    return Table("Outlier features, the most common first", columns, rows, "" if features else "None.")


def projection_table(seen: Observation) -> Table:
    """The outlier columns of each linear layer."""
    rows = []
    for found, counts in seen.counts.items():
        count = int(counts.count_nonzero())
        named = ", ".join(map(str, counts.argsort(descending=True, stable=True)[: min(count, _LISTED)].tolist()))
        more = ", ..." if count > _LISTED else ""
        rows.append([f"{found.layer} {found.name}", float(seen.largest[found].max()), count, named + more])
    columns = {"layer, projection": "", "largest magnitude": ".1f", "columns": "d", "which, the most common first": ""}
    return Table("Columns that are outlying at any position, by linear layer", columns, rows)
