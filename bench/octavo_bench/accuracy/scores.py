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

from ..models.language import Language, Window, log_probabilities
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
        self._exact: dict[int, Tensor] = {}  # what the model as it is says, by window

    @torch.inference_mode()
    def score(self, model: nn.Module, progress: Progress, doing: str) -> Scores:
        """Run all windows. One step of progress for each."""
        found = Scores()
        for index, window in enumerate(self.windows):
            with progress.step(doing):
                mine, top = self._says(model, window)
                exact = self._exact.get(index)
                if exact is None:
                    as_it_is = self._language.model
                    exact = mine if model is as_it_is else self._says(as_it_is, window)[0]
                    if exact.nbytes + sum(each.nbytes for each in self._exact.values()) <= KEPT_BYTES:
                        self._exact[index] = exact
                if self._language.causal:
                    divergence = float((exact.exp() * (exact - mine)).sum(-1).double().sum())
                    agreed = float((exact.argmax(-1) == mine.argmax(-1)).sum())
                    loss = -float(mine.gather(1, window.ids[0, window.first :, None]).double().sum())
                    found.add(len(mine), loss=loss, divergence=divergence, agreed=agreed, top=top)
                else:
                    found.add(1, loss=1 - float(mine @ exact), top=top)
                    found.embeddings.append(mine)
        return found

    def _says(self, model: nn.Module, window: Window) -> tuple[Tensor, float]:
        """Log-probabilities, or an embedding; the sum of the tokens' top-1 probabilities, or `embed`'s."""
        if not self._language.causal:
            return embed(model, window)
        likelihood = log_probabilities(model, window)
        return likelihood, float(likelihood.amax(-1).double().exp().sum())


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
    units = [torch.stack(each.embeddings) for each in (found, reference)]
    mine, its = ((unit @ unit.T).fill_diagonal_(-torch.inf).argmax(1) for unit in units)
    return int((mine == its).sum())
