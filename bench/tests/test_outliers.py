"""`octavo analyze`, and models with outlier features put in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import row
from octavo import cli
from octavo_bench import commands, tables
from octavo_bench.models import language, modules, systematic
from octavo_bench.models.language import read_windows
from octavo_bench.outliers import analysis, observe
from octavo_bench.progress import Progress
from tiny_models import FAMILIES, tiny_model, write_language_model


def test_the_planted_feature_is_found(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = f"--text {tiny / 'text.txt'} --window 32 --limit 4 --ablate --draws 1 --quiet --threads 1"
    words += f" --json {tmp_path / 'a.json'} --plots {tmp_path / 'plots'}"
    assert cli.main(["analyze", str(tiny / "model"), *words.split()]) == 0
    assert "Outlier features, the most common first" in capsys.readouterr().out
    report = tables.read(tmp_path / "a.json")
    found = row(report, "Features of magnitude", "outlier features")
    assert (found["count"], found["one-sided"], found["layers, %"], found["positions, %"]) == (1, 1, 100.0, 100.0)
    assert 15 < found["lower quartile"] <= found["median"] <= found["upper quartile"] < 25
    assert report.table("Outlier features").rows[0][0] == "5"
    columns = row(report, "Columns that are outlying", "1 fc1")
    assert (columns["columns"], columns["which, the most common first"]) == (1, "5")
    assert row(report, "Columns that are outlying", "0 self_attn.out_proj")["columns"] == 0
    zeroed = report.table("What zeroing")
    assert [line[0] for line in zeroed.rows] == [
        "nothing", "the 1 outlier features", "1 random features (mean of 1 draws)"
    ]  # fmt: skip
    assert zeroed.rows[0][2] == 0.0
    assert abs(zeroed.rows[1][2]) > abs(zeroed.rows[2][2])
    assert (tmp_path / "plots" / "outliers.png").is_file()


def test_counting_by_hand() -> None:
    """Two layers, four positions; feature 1 is outlying in two hidden states of one position: that counts once."""
    where = torch.tensor([[0, 0, 1], [0, 0, 1], [0, 1, 1], [1, 3, 1], [0, 2, 2]])
    values = torch.tensor([7.0, -8.0, 9.0, 7.0, 6.0])
    seen = observe.Observation(4, torch.zeros(2, 3), where, values, {}, {})
    assert seen.shares().tolist() == [[0, 0.5, 0.25], [0, 0.25, 0]]
    assert seen.ever_outlying() == [1, 2]
    (first,) = seen.features(0.6, 0.2)
    assert (first.number, first.layers, first.positions, first.one_sided) == (1, 1.0, 0.375, False)
    assert [feature.number for feature in seen.features(0.0, 0.0)] == [1, 2]
    table = observe.model_table(seen, [first], commands.settings(commands.analyze), 0.5, None)
    assert table.rows[0][3:5] == [100.0, 37.5]


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - {"T5ForConditionalGeneration", "MixtralForCausalLM"}))
def test_linear_layers_are_known_by_what_they_take(name: str) -> None:
    """In each layer of every architecture: attention's input and output, the feed-forward's input and inside."""
    model = tiny_model(name)
    language.use_linear_(model)
    for layer in range(2):
        takes = [each.takes for each in modules.projections(model) if each.layer == layer]
        assert set(takes) == {*modules.HIDDEN_STATES, modules.FEED_FORWARD_HIDDEN}, (name, takes)
        assert takes.count(modules.ATTENTION_OUTPUT) == 1


def test_a_model_without_outliers(tmp_path: Path, facts: Any, progress: Progress) -> None:
    write_language_model(tmp_path / "m", tiny_model("OPTForCausalLM"))
    (tmp_path / "t.txt").write_text("w1 w2 w3 w4 " * 20)
    settings = commands.settings(commands.analyze, threshold=1e4, ablate=True, limit=2)
    report, _ = analysis.run(language.load(tmp_path / "m"), tmp_path / "t.txt", settings, facts, progress)
    assert report.table("Outlier features").note == "None."
    assert report.table("What zeroing").note == "There are no outlier features to be zeroed."


@pytest.mark.parametrize("name", ["OPTForCausalLM", "BertForMaskedLM"])
def test_systematic_outliers_leave_the_function(name: str, tmp_path: Path) -> None:
    """In a model that normalizes before each block by its LayerNorms, in another one by modules in front."""
    model = tiny_model(name)
    write_language_model(tmp_path / "m", model if name.startswith("OPT") else model.bert)
    (tmp_path / "t.txt").write_text("\n".join("w1 w5 w2 w9 w3 w7 w4 w8" for _ in range(3)))
    loaded = language.load(tmp_path / "m")
    inputs = [window.inputs for window in read_windows(loaded, tmp_path / "t.txt")]
    seen = systematic.observe(loaded.model, inputs)
    features = systematic.largest_features(seen, 2)
    rescaled = systematic.with_outliers(loaded.model, features, systematic.Size(40.0, 6.0), seen)
    exact, found = loaded.model(**inputs[0])[0], rescaled(**inputs[0])[0]
    assert (exact - found).norm() < 1e-4 * exact.norm()
    again = systematic.observe(rescaled, inputs)
    for group, own in again.items():
        assert own.mean[features].tolist() == pytest.approx([-40.0, -40.0], abs=0.1), group
        assert own.largest[features].min() > 30
        others = [k for k in range(32) if k not in features]
        assert (
            torch.equal(own.largest[others], seen[group].largest[others])
            or (own.largest[others] - seen[group].largest[others]).abs().max() < 1e-3
        )
