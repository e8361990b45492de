"""Options per layer such that a model stays as close to itself as is asked for: ``octavo quantize --kl``.

How far an int8 model is from the one it was made of is the Kullback-Leibler divergence of its next tokens, in nats a
token. To second order it is the sum of what each layer adds, for the errors of layers are independent: with g the
gradient of the log-probability of a token drawn from the model's own distribution, and e the error of a layer's output,
half the mean of (g e)^2 (the Fisher information, along e). One pass forward and back gives g of all layers; each way to
run a layer has its e on the same inputs. How layers choose by it, and what is measured, `docs/guide/checkpoints.md`
tells; where the whole model is not within the bound, the sum is corrected by what was measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

import octavo
from octavo._text import unexpected
from octavo.checkpoint.calibrate import Running
from octavo.checkpoint.layers import Patterns
from octavo.options import Options

TEXT = Path(__file__).with_name("text.txt")  # of the public domain: from Jefferson to Wells
# The ways to run a layer, by what they cost, in units of a vector-wise product: of time, as docs/guide/schemes.md has
# it of a model, and for weights that stay in 16 bit of memory, too.
WAYS: tuple[tuple[Options | None, float], ...] = (
    (Options(outliers="none"), 1.0),  # vector-wise
    (Options(rotation=64, outliers="none"), 1.05),  # rotation
    (octavo.recipe("best"), 1.08),  # both
    (Options(outliers="rows", relative=6.3, cap=0.02), 1.1),  # the criterion alone
    (Options(path="weight_only"), 1.5),
    (None, 3.0),  # 16 bit
)
_ROUNDS, _ATTEMPTS = 3, 6  # of bounds, and of choices for each
_SEQUENCES = 8  # of text, at most, for the pass, for choosing again, and for the figure


@dataclass(frozen=True)
class Choice:
    """What `choose_options` found.

    Attributes:
        options: of each layer, by the checkpoint's names; None: it stays in 16 bit.
        kl: measured on held-out text, nats a token.
        asked: the bound.
        tokens: of the held-out text.
    """

    options: dict[str, Options | None]
    kl: float
    asked: float
    tokens: int

    def notes(self) -> dict[str, str]:
        """What is noted in the files."""
        return {"kl": f"{self.kl:.3g}", "kl_asked": f"{self.asked:g}", "held_out_tokens": str(self.tokens)}


def choose_options(
    model: str | Path,
    kl: float,
    text: str | Path | None = None,
    *,
    include: Patterns = None,
    skip: Patterns = None,
    head: bool | None = None,
    progress: bool = True,
    trust_remote_code: bool = False,
) -> Choice:
    """Choose how each linear layer of a checkpoint is run, for `quantize` to write (``layer_options``).

    Layers that Transformers rearranges while it reads them, as stacked experts, stay in 16 bit.

    Args:
        model: a folder with weights, config and tokenizer, of a model that Transformers has and that gives logits. It
            is run in float32, in memory, with the activations of all layers.
        kl: the divergence from the model in float32 that is allowed, nats a token.
        text: a file; the layers choose by its first two thirds, its last third is for measuring. Default: one that
            octavo has.
        include, skip, progress, trust_remote_code: see `calibrate`.
        head: let the output head choose, too; None: of a model that Transformers has.

    Raises:
        RuntimeError, OSError: see `calibrate`.
        ValueError: too; or a bound that was not reached, with the closest that was.
    """
    if not 0 < kl < float("inf"):
        raise unexpected("quantize: kl", "a number above 0", kl)
    running = Running("quantize", model, trust_remote_code, include=include, skip=skip, head=head)
    sequences = running.batches(TEXT if text is None else text, 1)[: 3 * _SEQUENCES]
    if len(sequences) < 3:
        raise unexpected(str(text), "text of more than 512 tokens", "less")
    third = len(sequences) // 3
    import torch

    loaded, modules = running.load(progress, dtype=torch.float32)
    loaded.eval().requires_grad_(False)
    layers = _Layers(modules)
    with tqdm(total=third + _ROUNDS * (_ATTEMPTS + 1), desc="choose", disable=not progress) as bar:
        effects = layers.effects(loaded, sequences[:third], bar)
        steering, judge = _Judge(loaded, sequences[third : 2 * third]), _Judge(loaded, sequences[2 * third :])
        bound, closest = kl, float("inf")
        for _ in range(_ROUNDS):
            ways, found = _choose(layers, effects, steering, bound, bar)
            if ways is None:
                closest = min(closest, max(found, kl))  # later bounds are smaller than what was asked
                break
            with layers.run_as(ways):
                found = judge.divergence()
            bar.update()
            closest = min(closest, found)
            if found <= kl:
                break
            bound *= 0.95 * kl / found
    if ways is None or closest > kl:
        raise unexpected("quantize: kl", "a bound that was reached", f"{kl:g}: the closest is {closest:.3g}")
    options: dict[str, Options | None] = {name.removesuffix(".weight"): None for name in running.stored}
    options |= {name: WAYS[ways[layers.first[name]]][0] for name in layers.first}
    return Choice(options, found, kl, judge.tokens)


def _choose(
    layers: _Layers, effects: Mapping[str, Sequence[float]], steering: _Judge, bound: float, bar: Any
) -> tuple[dict[str, int] | None, float]:
    """The cheapest ways of the layers that are within `bound` on the text of `steering`, and what was measured of them.

    None where none were, and the closest that was measured.
    """
    best: tuple[float, dict[str, int], float] | None = None  # cost, choice, KL
    closest, correction = float("inf"), 1.0
    for _ in range(_ATTEMPTS):
        ways = layers.cheapest(effects, bound / correction)
        with layers.run_as(ways):
            found = steering.divergence()
        bar.update()
        cost = sum(layers.cost(*own) for own in ways.items())
        if found <= bound and (best is None or cost < best[0]):
            best = cost, ways, found
        closest = min(closest, found)
        predicted = sum(effects[name][way] for name, way in ways.items())
        before, correction = correction, max(found, 1e-12) / max(predicted, 1e-12) * (1.1 if found > bound else 1.0)
        if abs(correction / before - 1) < 0.02:
            break
    return (None, closest) if best is None else best[1:]


class _Judge:
    """Tells how far a model is from what it was when this was made, on some sequences."""

    def __init__(self, model: Any, sequences: Sequence[Mapping[str, Any]]) -> None:
        self._model, self._sequences = model, sequences
        self._exact = [_log_probabilities(model, each) for each in sequences]
        self.tokens = sum(map(len, self._exact))

    def divergence(self) -> float:
        """Nats a token."""
        found = (_log_probabilities(self._model, each) for each in self._sequences)
        pairs = zip(self._exact, found, strict=True)
        return sum(float((exact.exp() * (exact - own)).sum()) for exact, own in pairs) / self.tokens


class _Layers:
    """The linear layers that are run, by name."""

    def __init__(self, layers: Mapping[str, Any]) -> None:
        names: dict[int, str] = {}
        # Of every layer the first one with its weight, and these.
        self.first = {name: names.setdefault(id(layer.weight), name) for name, layer in layers.items()}
        self.modules = {name: layers[name] for name in names.values()}
        self._every = layers

    def effects(self, model: Any, batches: Sequence[Mapping[str, Any]], bar: Any) -> dict[str, list[float]]:
        """What each way to run a layer adds to the divergence, by layer, nats a token."""
        import torch

        from octavo.torch.choice import oriented

        effects = {name: [0.0] * len(WAYS) for name in self.modules}
        generator = torch.Generator().manual_seed(0)
        calls: list[tuple[str, Any, Any]] = []  # layer, input, output

        def note(name: str, module: Any, arguments: tuple[Any, ...], output: Any) -> None:
            output.retain_grad()
            calls.append((self.first[name], arguments[0].detach(), output))

        tokens = 0
        embeddings = model.get_input_embeddings()
        handles = [layer.register_forward_hook(partial(note, name)) for name, layer in self._every.items()]
        handles.append(embeddings.register_forward_hook(lambda module, arguments, output: output.requires_grad_()))
        try:
            for batch in batches:
                calls.clear()
                logits = _logits(model(**batch))
                drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)
                logits.log_softmax(-1).gather(-1, drawn).sum().backward()
                tokens += len(logits)
                for name, x, output in calls:
                    if output.grad is None:
                        continue
                    gradient, x = output.grad.reshape(-1, output.shape[-1]), x.reshape(-1, x.shape[-1])
                    own = oriented(self.modules[name], self.modules[name].weight.detach())
                    exact = x @ own.t()
                    for way, (options, _) in enumerate(WAYS):
                        if options is not None:
                            weight = octavo.quantize_weight(own, options=options)
                            error = octavo.linear(x, weight, options=options) - exact
                            effects[name][way] += float((gradient * error).sum(1).square().sum()) / 2
                bar.update()
        finally:
            for handle in handles:
                handle.remove()
        return {name: [value / tokens for value in own] for name, own in effects.items()}

    def cheapest(self, effects: Mapping[str, Sequence[float]], bound: float) -> dict[str, int]:
        """The way of each layer: from the cheapest on, what lessens the sum most for its cost, until it is in bound."""
        ways = dict.fromkeys(self.modules, 0)
        left = sum(effects[name][0] for name in ways)

        def gain(name: str, way: int) -> float:
            saved = effects[name][ways[name]] - effects[name][way]
            return saved / (self.cost(name, way) - self.cost(name, ways[name]))

        while left > bound:
            steps = [(name, way) for name, now in ways.items() for way in range(now + 1, len(WAYS))]
            best, name, way = max(((gain(*step), *step) for step in steps), default=(0.0, "", 0))
            if best <= 0:
                break
            left -= effects[name][ways[name]] - effects[name][way]
            ways[name] = way
        return ways

    def cost(self, name: str, way: int) -> float:
        """Of a layer."""
        return WAYS[way][1] * float(self.modules[name].weight.numel())

    @contextmanager
    def run_as(self, ways: Mapping[str, int]) -> Iterator[None]:
        """Run the layers with int8 weights; afterwards they have their own again."""
        from torch import nn

        from octavo.torch import Int8Tensor
        from octavo.torch.choice import oriented

        own = {name: layer.weight for name, layer in self._every.items()}
        try:
            for name, way in ways.items():
                options, layer = WAYS[way][0], self.modules[name]
                if options is not None:
                    weight = Int8Tensor.from_float(oriented(layer, layer.weight), options)
                    layer.weight = nn.Parameter(oriented(layer, weight), requires_grad=False)
            for name, first in self.first.items():
                self._every[name].weight = self.modules[first].weight
            yield
        finally:
            for name, weight in own.items():
                self._every[name].weight = weight


def _logits(output: Any) -> Any:
    if getattr(output, "logits", None) is None:
        raise unexpected("quantize: kl", "a model that gives logits", type(output).__name__)
    return output.logits.float().flatten(0, -2)


def _log_probabilities(model: Any, batch: Mapping[str, Any]) -> Any:
    import torch

    with torch.no_grad():
        return _logits(model(**batch)).log_softmax(-1)
