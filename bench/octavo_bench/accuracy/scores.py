"""What a variant of a model says of a text, against what the model as it is says of it.

Of a causal language model, token by token: the Kullback-Leibler divergence of its probabilities from the model's,
whether its likeliest token is the model's, and what it loses of the log-likelihood. Of an encoder, passage by passage:
1 - the cosine of its embedding with the model's. Losses are positive where the variant is worse.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from ..models.language import Language, Window, log_probabilities, own
from ..progress import Progress

KEPT_BYTES = 4 << 30  # of what the model as it is says, at most; more is computed anew for each variant

LOSS, DIVERGENCE, AGREED, TOP = "loss", "divergence", "agreed", "top"


@dataclass
class Scores:
    """Sums over the tokens of each window (over an encoder's passage: one), by measure."""

    counts: list[int] = field(default_factory=list)
    sums: dict[str, list[float]] = field(default_factory=dict)
    embeddings: list[Tensor] = field(default_factory=list)  # of an encoder: float64 [width], of length 1

    def add(self, count: int, **sums: float) -> None:
        """A window."""
        self.counts.append(count)
        for measure, value in sums.items():
            self.sums.setdefault(measure, []).append(value)

    def mean(self, measure: str) -> float:
        """Per token."""
        return math.fsum(self.sums[measure]) / sum(self.counts)

    def error(self, measure: str) -> float:
        """The standard error of `mean`."""
        return ratio_of_sums(self.sums[measure], self.counts)[1]

    def paired(self, other: "Scores", measure: str = LOSS) -> tuple[float, float]:
        """The mean difference from another's, and its standard error, paired over the windows."""
        pairs = zip(self.sums[measure], other.sums[measure], strict=True)
        return ratio_of_sums([left - right for left, right in pairs], self.counts)


def ratio_of_sums(sums: Sequence[float], counts: Sequence[int]) -> tuple[float, float]:
    """sum(d) / sum(n) over windows of n tokens, and its standard error; NaN for one window.

    The error is that of a ratio of sums, windows being drawn independently:
    sqrt(w / (w - 1) * sum((d - mean * n)**2)) / sum(n) for w windows.
    """
    d, n = np.array(sums, np.float64), np.array(counts, np.float64)
    mean = float(d.sum() / n.sum())
    if len(n) < 2:
        return mean, math.nan
    return mean, float(np.sqrt(len(n) / (len(n) - 1) * ((d - mean * n) ** 2).sum()) / n.sum())


def perplexity(loss: float) -> float:
    """Of a mean loss in nats per token."""
    return math.exp(loss) if loss < 700 else math.inf


class Judge:
    """Compares variants of a model with the model as it is, window by window, each in a call of its own."""

    def __init__(self, language: Language, windows: Sequence[Window]) -> None:
        self._language, self.windows = language, windows
        self._kept: dict[int, Tensor] = {}
        self._bytes = 0

    @torch.inference_mode()
    def score(self, model: nn.Module, progress: Progress, doing: str) -> Scores:
        """Run all windows. One step of progress for each."""
        found = Scores()
        for index, window in enumerate(self.windows):
            with progress.step(doing):
                if self._language.causal:
                    self._tokens(model, index, window, found)
                else:
                    self._passage(model, index, window, found)
        return found

    def _reference(self, index: int, window: Window, model: nn.Module, mine: Tensor) -> Tensor:
        """What the model as it is says: log-probabilities, or an embedding. `mine`: what `model` says."""
        if index in self._kept:
            return self._kept[index]
        as_it_is = self._language.model
        if model is as_it_is:
            found = mine
        else:
            found = log_probabilities(as_it_is, window) if self._language.causal else embed(as_it_is, window)[0]
        if self._bytes + found.nbytes <= KEPT_BYTES:
            self._kept[index] = found
            self._bytes += found.nbytes
        return found

    def _tokens(self, model: nn.Module, index: int, window: Window, found: Scores) -> None:
        mine = log_probabilities(model, window)
        exact = self._reference(index, window, model, mine)
        found.add(
            window.scored,
            loss=-float(own(mine, window).sum()),
            divergence=float((exact.exp() * (exact - mine)).sum(-1).double().sum()),
            agreed=float((exact.argmax(-1) == mine.argmax(-1)).sum()),
            top=float(mine.amax(-1).double().exp().sum()),
        )  # fmt: skip

    def _passage(self, model: nn.Module, index: int, window: Window, found: Scores) -> None:
        embedding, top = embed(model, window)
        found.add(1, loss=1 - float(embedding @ self._reference(index, window, model, embedding)), top=top)
        found.embeddings.append(embedding)


def embed(model: nn.Module, passage: Window) -> tuple[Tensor, float]:
    """An encoder's embedding, float64 [width] of length 1, and the largest softmax probability of attention.

    The embedding is the mean of the last hidden states over the tokens; the probability a mean over layers, heads and
    tokens.
    """
    output = model(**passage.inputs, output_attentions=True)
    embedding = nn.functional.normalize(output.last_hidden_state[0].double().mean(0), dim=0)
    return embedding, float(torch.stack([p.amax(-1).mean() for p in output.attentions]).double().mean())


def neighbors_kept(found: Scores, reference: Scores) -> int:
    """Passages whose nearest other one, by cosine, is the same for the variant as for the model as it is."""
    return int((_nearest(found) == _nearest(reference)).sum())


def _nearest(scores: Scores) -> Tensor:
    unit = torch.stack(scores.embeddings)
    return (unit @ unit.T).fill_diagonal_(-torch.inf).argmax(1)
