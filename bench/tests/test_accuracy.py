"""`octavo eval`: divergence, losses with their errors, peers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import row
from octavo import cli
from octavo_bench import commands, tables
from octavo_bench.accuracy import measurement
from octavo_bench.accuracy.scores import Judge, ratio_of_sums
from octavo_bench.models import language, variants
from octavo_bench.models.language import Window, cut
from octavo_bench.models.modules import linear_bytes, rows_at_a_time
from octavo_bench.progress import Progress
from tiny_models import tiny_model, write_language_model


def test_an_error_is_that_of_a_ratio_of_sums() -> None:
    assert ratio_of_sums([2.0, 4.0], [1, 2]) == (2.0, 0.0)
    mean, error = ratio_of_sums([1.0, 3.0], [1, 1])
    assert (mean, error) == (2.0, pytest.approx(1.0))  # stdev sqrt(2), over sqrt(2) windows
    assert math.isnan(ratio_of_sums([1.0], [4])[1])


def test_windows_score_each_token_once() -> None:
    windows = cut(list(range(10)), window=4, stride=2)
    scored = [int(token) for window in windows for token in window.ids[0, window.first :]]
    assert scored == list(range(1, 10))
    assert [window.begin for window in windows] == [0, 2, 4, 6]


class Fixed(torch.nn.Module):
    """A language model that says the same of each token: the logarithms of some probabilities."""

    def __init__(self, *probabilities: float) -> None:
        super().__init__()
        self.logits = torch.tensor(probabilities).log()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        return type("Output", (), {"logits": self.logits.expand(*input_ids.shape, -1)})


def test_divergence_and_argmax_by_hand(progress: Progress) -> None:
    exact, other = Fixed(0.5, 0.25, 0.25), Fixed(0.25, 0.5, 0.25)
    loaded = language.Language(Path("m"), exact, None, causal=True)
    judge = Judge(loaded, [Window(torch.tensor([[0, 1, 0]]), 1, 0), Window(torch.tensor([[2, 2]]), 1, 3)])
    progress.begin(4)
    same, found = judge.score(exact, progress, ""), judge.score(other, progress, "")
    assert (same.mean("divergence"), same.mean("agreed")) == (0.0, 1.0)
    # 0.5 ln 2 + 0.25 ln 0.5 + 0
    assert found.mean("divergence") == pytest.approx(0.25 * math.log(2))
    assert found.mean("agreed") == 0.0
    # Tokens 1, 0 and 2: ln 2 gained, ln 2 lost, nothing.
    assert found.paired(same)[0] == pytest.approx(0.0, abs=1e-9)
    assert found.sums["loss"][0] == pytest.approx(-math.log(0.5) - math.log(0.25))


def test_eval_of_a_language_model(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = f"--text {tiny / 'text.txt'} --window 32 --limit 6 --calibration-windows 2"
    words += f" --json {tmp_path / 'eval.json'} --plots {tmp_path / 'plots'} --peers --seconds 0 --quiet --threads 1"
    assert cli.main(["eval", str(tiny / "model"), *words.split()]) == 0
    assert "Against the model as it is: 186 tokens in 6 windows" in capsys.readouterr().out
    report = tables.read(tmp_path / "eval.json")
    against = report.table(measurement.AGAINST)
    assert set(against.column("name for --schemes")) >= {each.key for each in variants.TABLE_1}
    exact = row(report, measurement.AGAINST, "float32")
    assert (exact["KL"], exact["same argmax, %"], exact["loss"]) == (0.0, 100.0, 0.0)
    whole, decomposed = (row(report, measurement.AGAINST, each.name) for each in (variants.ABSMAX, variants.LLM_INT8))
    # Feature 5 is 20 everywhere: with one scale for all the others are lost, with decomposition they are not.
    assert whole["KL"] > 3 * decomposed["KL"] > 0
    assert exact["MiB"] == pytest.approx(12 * 32 * 32 * 2 * 4 / 2**20, rel=0.1)
    assert 0.25 <= decomposed["MiB"] / exact["MiB"] < 0.5
    for peer in ("bitsandbytes", "torchao"):
        assert peer in against.column("name for --schemes") or f"Left out: {peer}: " in against.note
    assert report.table(measurement.TIMES).rows[0][-1] == 1.0
    assert {each.name for each in (tmp_path / "plots").iterdir()} >= {"kl.png", "loss.png"}


def test_eval_of_an_encoder(tmp_path: Path, facts: Any, progress: Progress) -> None:
    write_language_model(tmp_path / "bert", tiny_model("BertForMaskedLM").bert)
    (tmp_path / "text.txt").write_text("\n".join(f"w{i} w{i + 1} w{(3 * i) % 15} w2" for i in range(12)))
    loaded = language.load(tmp_path / "bert")
    assert not loaded.causal
    settings = commands.settings(
        commands.evaluate, schemes=["absmax", "llm-int8", "smoothquant"], calibration_windows=4
    )
    report = measurement.run(loaded, tmp_path / "text.txt", settings, facts, progress)
    exact = row(report, measurement.AGAINST, "float32")
    assert exact["loss"] == pytest.approx(0, abs=1e-9)
    assert exact["neighbors kept"] == 8
    assert 0 < row(report, measurement.AGAINST, "absmax LLM.int8() (vector-wise + decomp)")["loss"] < 0.01


class Noting(torch.nn.Linear):
    """Notes the shapes it is given."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = [*getattr(self, "seen", []), tuple(x.shape)]
        return super().forward(x)


def test_a_layer_takes_its_rows_in_calls_as_decoding_does() -> None:
    model, x = torch.nn.Sequential(Noting(4, 5)), torch.randn(2, 3, 4)
    with rows_at_a_time(model, 4):
        assert torch.allclose(model(x), torch.nn.Linear.forward(model[0], x))
    with rows_at_a_time(model, None):
        model(x)
    assert model[0].seen == [(4, 4), (2, 4), (2, 3, 4)]


def test_recipe_best_costs_the_same_for_any_number_of_rows(tiny: Path, facts: Any, progress: Progress) -> None:
    loaded = language.load(tiny / "model")
    settings = commands.settings(commands.evaluate, schemes=["best"], window=32, limit=2)
    whole = measurement.run(loaded, tiny / "text.txt", settings, facts, progress)
    settings.rows = 1
    single = measurement.run(loaded, tiny / "text.txt", settings, facts, progress)
    assert whole.table(measurement.AGAINST).rows == single.table(measurement.AGAINST).rows


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--schemes", "int3"), "--schemes: expected some of 'float32', 'absmax'"),
        (("--window", "65"), "window: expected 2 to 64 tokens, got 65"),
        (("--calibration-windows", "100"), "expected more windows than the 19 of the calibration"),
        (("--stride", "64", "--window", "32"), "stride: expected at most the window's 32 tokens"),
    ],
)
def test_failures_are_one_line(
    tiny: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    given = ["eval", str(tiny / "model"), "--text", str(tiny / "text.txt"), "--window", "32", "--quiet", *words]
    assert cli.main(given) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_peers_compute_the_layer() -> None:
    """Where their packages are installed: near the linear layer, and smaller."""
    linear = torch.nn.Linear(64, 48).requires_grad_(False).eval()
    model, x = torch.nn.Sequential(linear), torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    maker = variants.Maker(model, [])
    for peer in variants.PEERS:
        pytest.importorskip(peer.key, reason=f"{peer.key} is not installed")
        made = maker.make(peer)
        assert torch.nn.functional.cosine_similarity(made(x), model(x)).min() > 0.999
        assert 48 * 64 < linear_bytes(made) < 2 * 48 * 64


@pytest.mark.parametrize("command", ["eval", "analyze"])
@pytest.mark.parametrize("model_type", ["own", "vit"])  # of which Transformers has nothing; no language model
def test_code_that_a_model_brings_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model_type: str, command: str
) -> None:
    """Unless it is trusted; and nobody is asked: one line says what to do."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question"))
    places = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    config = {"model_type": model_type, "architectures": ["OwnForCausalLM"], "auto_map": places}
    (tmp_path / "config.json").write_text(json.dumps(config))
    was_run = tmp_path / "was_run"
    (tmp_path / "own.py").write_text(f"open({str(was_run)!r}, 'w').close()\nraise OSError('so it was run')\n")
    (tmp_path / "text").write_text("a b c")
    words = [command, str(tmp_path), "--text", str(tmp_path / "text"), "--quiet"]
    capsys.readouterr()
    assert cli.main(words) == 1
    said = f"octavo {command}: {tmp_path}: the model brings Python code of its own: --trust-remote-code runs it\n"
    assert capsys.readouterr().err == said
    assert not was_run.exists()
    assert cli.main([*words, "--trust-remote-code"]) == 1
    assert "so it was run" in capsys.readouterr().err
    assert was_run.exists()
