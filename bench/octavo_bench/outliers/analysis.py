"""`octavo analyze`, from top to bottom: the outlier features of a model, and what they carry.

What they carry is what a model without them lacks: they are set to zero in front of query, key and value of every
layer, as the paper does (section 4). The residual stream and the feed-forward see them as before.
"""

import random
import statistics
from argparse import Namespace
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..accuracy.scores import LOSS, TOP, Judge, Scores, perplexity
from ..machine import Facts
from ..models.find import find
from ..models.language import Language, read_windows
from ..models.modules import ATTENTION_INPUT, hooked, projections
from ..pictures import BLUE, GRAY, GREEN, ORANGE, VERMILION, Figures, quiet
from ..progress import Progress
from ..tables import Report, Table
from . import observe
from .observe import Feature, Observation

SEED = 0  # of the features that are drawn
_STYLES = [(color, marker) for marker in "oDs^" for color in (VERMILION, BLUE, GREEN, ORANGE)]


def command(args: Namespace, facts: Facts, progress: Progress) -> tuple[Report, Figures]:
    """`octavo analyze`."""
    loaded = find(args.model, trust_remote_code=args.trust_remote_code)
    report, figures = run(loaded, args.text, args, facts, progress)
    return report, figures if args.plots else {}


def run(loaded: Language, text: Path, settings: Namespace, facts: Facts, progress: Progress) -> tuple[Report, Figures]:
    """Measure everything; `settings` are the options of `octavo analyze`.

    Raises ValueError and OSError for a model or text that cannot be used.
    """
    windows = read_windows(loaded, text, settings.window, limit=settings.limit)
    progress.begin(len(windows) * (3 + (settings.draws if settings.ablate else 0)))

    # 1. Which features are outliers, where, and what their values are like.
    seen = observe.observe(loaded, windows, settings.threshold, progress)
    features = seen.features(settings.min_layers, settings.min_positions)
    numbers = [feature.number for feature in features]

    # 2. What they carry.
    without_features = partial(ablate, loaded, Judge(loaded, windows), progress=progress)
    untouched = without_features([], doing="as it is")
    zeroed, without = {"nothing": [untouched]}, None
    if numbers:
        without = without_features(numbers, doing="without the outlier features")
        zeroed[f"the {len(numbers)} outlier features"] = [without]
    excluded = seen.ever_outlying()  # more than the outlier features: those in a few layers, too
    others = min(len(numbers), seen.width - len(excluded))  # as many, where there are as many
    if settings.ablate and others:
        generator, candidates = random.Random(SEED), sorted(set(range(seen.width)) - set(excluded))
        drawn = [sorted(generator.sample(candidates, others)) for _ in range(settings.draws)]
        found = [without_features(chosen, doing="without random features") for chosen in drawn]
        zeroed[f"{others} random features (mean of {len(found)} draws)"] = found

    top = without.mean(TOP) if without else None
    tables = [observe.model_table(seen, features, settings, untouched.mean(TOP), top)]
    tables += [observe.feature_table(features), observe.projection_table(seen)]
    if settings.ablate:
        tables.append(ablation_table(zeroed, causal=loaded.causal))
    about = {"model": str(loaded.path), "parameters": loaded.model.num_parameters(), "text": str(text)}
    about |= {"windows": len(windows), "positions": seen.positions, "threshold": settings.threshold}
    report = Report(f"octavo analyze: {loaded.path.name}", facts.now(**about, seed=SEED), tables)
    return report, {"outliers.png": partial(draw, seen, features, settings)}


def ablate(language: Language, judge: Judge, features: Sequence[int], progress: Progress, doing: str) -> Scores:
    """Measure with `features` set to zero. The first run of a judge must be one that zeroes none."""
    consumers = [each.module for each in projections(language.model) if each.takes == ATTENTION_INPUT]
    if not consumers:
        raise ValueError(f"model: expected query, key and value layers, got none in {type(language.model).__name__}")
    columns = torch.tensor(features, dtype=torch.int64)
    # Nothing else of the model sees that.
    with hooked((each, lambda _, args: (args[0].index_fill(-1, columns, 0.0), *args[1:])) for each in consumers):
        return judge.score(language.model, progress, doing)


def ablation_table(zeroed: Mapping[str, Sequence[Scores]], *, causal: bool) -> Table:
    """By what was set to zero, first nothing: what the model then says, the mean of the runs."""
    means = {
        name: [statistics.fmean(each.mean(of) for each in own) for of in (LOSS, TOP)] for name, own in zeroed.items()
    }
    (untouched, first), *_ = means.values()
    rows = []
    for name, (loss, top) in means.items():
        change = 100 * (perplexity(loss) / perplexity(untouched) - 1) if causal else None
        rows.append([name, perplexity(loss) if causal else loss, change, top, 100 * (top / first - 1)])
    quality = "perplexity" if causal else "1 - cosine"
    columns = {"set to zero": "", quality: ".5g", "change, %": "+.1f", "top-1": ".4f", "top-1 change, %": "+.1f"}
    note = "There are no outlier features to be zeroed."
    if len(zeroed) > 1:
        note = "The feed-forward sees them as before, also those that are outlying there. Random: of those that are "
        note += "outlying nowhere."
    return Table("What zeroing features in front of query, key and value does", columns, rows, note)


def draw(seen: Observation, features: Sequence[Feature], settings: Namespace) -> Figure:
    """The largest magnitude of every feature; at what share of positions the outlier features are outlying."""
    figure: Figure = plt.figure(figsize=(13, 4.6))
    left, right = figure.subplots(1, 2)
    share = 100 * seen.shares().numpy()  # [layers, width]
    layers = range(len(share))
    for magnitudes in seen.magnitudes.numpy():
        left.plot(magnitudes, ".", color=GRAY, markersize=3)
    for place, (feature, (color, marker)) in enumerate(zip(features, _STYLES, strict=False)):
        name = f"feature {feature.number}"
        of_feature = seen.magnitudes[:, feature.number].numpy()
        left.plot([feature.number] * len(share), of_feature, marker, color=color, markersize=5, label=name)
        size = max(4.0, 12.0 - 2.0 * place)  # lines that lie on each other stay to be seen
        right.plot(layers, share[:, feature.number], marker + "-", color=color, label=name, markersize=size)
    left.axhline(settings.threshold, color="black", linewidth=1, linestyle="--", label="threshold")
    left.set_ylim(bottom=0)
    left.set(xlabel="feature of the hidden states (a dot for each layer)", ylabel="largest magnitude at any position")
    right.bar(layers, (share > 0).mean(1) * 100, color=GRAY, alpha=0.4, label="features that ever are, %")
    right.set(xlabel="layer", ylabel=f"positions with magnitude >= {settings.threshold:g}, %", ylim=(-2, 104))
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in (left, right):
        axis.legend(frameon=False, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.15))
        quiet(axis, "y")
    figure.suptitle("Outlier features" if features else "No feature is outlying systematically")
    figure.tight_layout()
    return figure
