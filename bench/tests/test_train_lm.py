"""bench/train_lm.py and what it uses: the corpus, the training, and the outlier features put into a model."""

from __future__ import annotations

import gzip
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="bench/train_lm.py trains with PyTorch, which is not installed")
pytest.importorskip("transformers", reason="bench/train_lm.py writes models of transformers, which is not installed")

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
import corpus
import lm_outliers
import muon
import numpy as np
import train_lm
from octavo_bench import analysis
from octavo_bench.measuring import language
from tiny_models import tiny_opt, write_language_model

SENTENCE = "This is the documentation of number {} and it says what the function of that name does with a list.\n"


def document(number: int, lines: int = 8) -> str:
    return "".join(SENTENCE.format(number * 100 + line) for line in range(lines))


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two hundred documents under two roots."""
    found = []
    for name in ("a", "b"):
        root = tmp_path_factory.mktemp(name)
        (root / "deep").mkdir()
        for number in range(100):
            own = number + (1000 if name == "b" else 0)
            (root / "deep" / f"{name}{number}.txt").write_text(document(own))
        found.append(root)
    return found


class TestCorpus:
    def test_split_by_file(self, roots: list[Path]) -> None:
        found = corpus.load(10**9, roots)
        parts = [set(part) for part in (found.train, found.heldout, found.calibration)]
        assert sum(len(part) for part in parts) == 200
        assert all(not one & other for one in parts for other in parts if one is not other)
        assert 0.85 < len(found.train) / 200 < 0.98
        assert found == corpus.load(10**9, roots)

    def test_less_of_it_is_its_beginning(self, roots: list[Path]) -> None:
        some, everything = corpus.load(120 * len(document(1)), roots), corpus.load(10**9, roots)
        assert some.train == everything.train[: len(some.train)]
        assert len(some.train) < len(everything.train)

    def test_a_text_counts_once(self, roots: list[Path], tmp_path: Path) -> None:
        """Also where it is in another file, which another part might get."""
        for path in roots[0].rglob("*.txt"):
            (tmp_path / ("copy-" + path.name)).write_text(path.read_text())
        found = corpus.load(10**9, [*roots, tmp_path])
        assert sum(found.files.values()) == 200

    def test_a_paragraph_of_training_is_not_held_out(self, roots: list[Path], tmp_path: Path) -> None:
        """Wrapped and indented in another way, too; the rest of such a text stays."""
        copied = "This paragraph is in the documentation of more than one package, word for word."
        wrapped = copied.replace(" more ", "\n    more ")
        own = []
        for root, paragraph in zip(roots, (copied, wrapped), strict=True):
            own.append(tmp_path / root.name)
            for path in root.rglob("*.txt"):
                target = own[-1] / path.relative_to(root)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(f"{path.read_text()}\n \n  {paragraph}\n")
        without, found = corpus.load(10**9, roots), corpus.load(10**9, own)
        assert all(copied in " ".join(text.split()) for text in found.train)
        for part in ("heldout", "calibration"):
            texts = [[" ".join(text.split()) for text in getattr(each, part)] for each in (without, found)]
            assert texts[0] == texts[1]

    def test_a_folder_above_the_root_may_have_any_name(self, tmp_path: Path) -> None:
        for number in range(100):
            path = tmp_path / "tests" / f"{number}.txt"
            path.parent.mkdir(exist_ok=True)
            path.write_text(document(number))
        assert sum(corpus.load(10**9, [tmp_path / "tests"]).files.values()) == 100

    def test_what_is_read(self, tmp_path: Path) -> None:
        (tmp_path / "m.py").write_text('"""Module."""\nx = 1\n\n\ndef f():\n    """Function."""\n    return "no"\n')
        (tmp_path / "README.gz").write_bytes(gzip.compress(b"packed"))
        (tmp_path / "broken.py").write_text("def")
        (tmp_path / "broken.gz").write_bytes(b"\x1f\x8bnothing")
        (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
        assert corpus.read(tmp_path / "m.py") == "Module.\n\nFunction."
        assert corpus.read(tmp_path / "README.gz") == "packed"
        for name in ("broken.py", "broken.gz", "latin.txt", "missing.txt"):
            assert corpus.read(tmp_path / name) == ""

    def test_what_is_left_out(self, tmp_path: Path) -> None:
        for name in ("LICENSE.txt", "changelog.gz", "data.csv", "tests/a.txt", "x.dist-info/top.txt"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(document(1))
        (tmp_path / "numbers.txt").write_text("1 2 3 4 5 6 7 8 9\n" * 100)
        (tmp_path / "short.txt").write_text("Too short.")
        with pytest.raises(ValueError, match="expected text for train, got none in 0 characters"):
            corpus.load(1000, [tmp_path])


TINY = train_lm.Setting(200_000, 300, 1, 16, 2, 16, 4, 6, 1e-2, 2, 4)


class TestTraining:
    def test_resumed_training_gives_the_same_model(self, roots: list[Path], tmp_path: Path) -> None:
        tokens = train_lm.prepare(TINY, tmp_path / "one", roots)
        assert int(tokens.max()) < 300
        losses = train_lm.train(TINY, tmp_path / "one", tokens)
        again = train_lm.prepare(TINY, tmp_path / "two", roots)
        assert np.array_equal(tokens, again)
        # Stopped after three steps, and the text that it began with is what it goes on with.
        assert train_lm.train(TINY, tmp_path / "two", again, until=3) == losses[:3]
        kept = train_lm.prepare(TINY, tmp_path / "two", [])
        assert train_lm.train(TINY, tmp_path / "two", kept) == losses
        one, two = (language.load(tmp_path / name / "model").model.state_dict() for name in ("one", "two"))
        assert all(torch.equal(one[name], two[name]) for name in one)
        assert not any(path.name.startswith(".") for path in tmp_path.rglob("*"))  # nothing half written

    def test_another_setting_is_refused(self, roots: list[Path], tmp_path: Path) -> None:
        train_lm.prepare(TINY, tmp_path, roots)
        with pytest.raises(ValueError, match="expected a folder of this setting and corpus"):
            train_lm.prepare(replace(TINY, width=32), tmp_path, roots)

    def test_learning_rate(self) -> None:
        setting = replace(TINY, steps=100)
        rates = [train_lm.rate(setting, step) for step in range(100)]
        assert rates[:5] == pytest.approx([0.002, 0.004, 0.006, 0.008, 0.01])
        assert rates[5:] == sorted(rates[5:], reverse=True)
        assert rates[-1] == pytest.approx(0.001, rel=0.05)

    def test_the_whole(self, roots: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        setting = replace(TINY, steps=40, width=32)
        train_lm.run(setting, tmp_path, 1, roots)
        written = json.loads((tmp_path / "training.json").read_text())
        assert written["losses"][-1] < written["losses"][0] - 1  # it learns
        found = written["perplexity"]
        assert list(found) == ["model", *lm_outliers.SIZES]
        printed = capsys.readouterr().out
        for name, perplexity in found.items():
            assert perplexity == pytest.approx(found["model"], rel=1e-6)
            assert f"{name}: held-out perplexity {perplexity:.6f}" in printed
        for name in found:
            loaded = language.load(tmp_path / name)
            assert loaded.causal
            assert loaded.model.num_parameters() == written["parameters"]

    def test_full_size(self) -> None:
        model = train_lm.new_model(train_lm.SETTINGS["full"])
        assert 4.3e6 < model.num_parameters() < 4.7e6
        assert type(model).__name__ == "OPTForCausalLM"


class TestMuon:
    @pytest.mark.parametrize("shape", [(3, 24, 24), (2, 16, 40), (2, 40, 16)])
    def test_orthogonal(self, shape: tuple[int, int, int]) -> None:
        """All singular values near 1, with the singular vectors of the matrix."""
        matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        found = muon.orthogonal(matrices)
        u, _, v = torch.linalg.svd(matrices, full_matrices=False)
        inner = u.mT @ found @ v.mT
        values = inner.diagonal(dim1=1, dim2=2)
        assert 0.2 < float(values.min()) < float(values.max()) < 1.3
        assert float((inner - torch.diag_embed(values)).abs().max()) < 1e-3
        assert float((values > 0.65).float().mean()) > 0.9  # what is small to begin with stays behind

    def test_steps(self) -> None:
        """Of the equation: momentum, the size of the update, and decay."""
        gradients = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(0))
        weight = torch.nn.Parameter(torch.ones(8, 4))
        unused = torch.nn.Parameter(torch.ones(2, 2))
        optimizer = muon.Muon([weight, unused], lr=0.1, weight_decay=0.5, momentum=0.9)
        expected, kept = torch.ones(8, 4), torch.zeros(8, 4)
        for gradient in gradients:
            weight.grad = gradient.clone()
            optimizer.step()
            kept = 0.9 * kept + gradient
            update = muon.orthogonal((gradient + 0.9 * kept)[None])[0]
            expected = expected * (1 - 0.1 * 0.5) - 0.2 * 8**0.5 * 0.1 * update
            torch.testing.assert_close(weight.detach(), expected)
        assert torch.equal(unused.detach(), torch.ones(2, 2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plain")
    torch.manual_seed(1)
    model = tiny_opt(layers=3, width=32)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(5)
        elif "norm" in name:
            parameter.data.add_(torch.rand_like(parameter) - 0.5)
    write_language_model(path, model)
    numbers = torch.randint(0, 16, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    (path / "text.txt").write_text(" ".join(f"w{number}" for number in numbers))
    return path


class TestOutliers:
    @pytest.mark.parametrize("name", lm_outliers.SIZES)
    def test_the_same_function(self, folder: Path, tmp_path: Path, name: str) -> None:
        loaded = language.load(folder)
        windows = language.read_windows(loaded, folder / "text.txt", 40)
        before = {key: value.clone() for key, value in loaded.model.state_dict().items()}
        seen = lm_outliers.observe(loaded.model, windows)
        features = lm_outliers.largest_features(seen, 6)
        size = lm_outliers.SIZES[name]
        model = lm_outliers.with_outliers(loaded.model, features, size, seen)

        plain = torch.cat([language.log_likelihoods(loaded.model, window)[0] for window in windows])
        rescaled = torch.cat([language.log_likelihoods(model, window)[0] for window in windows])
        assert float((rescaled.mean() - plain.mean()).exp()) == pytest.approx(1, abs=1e-6)
        # Values of 60 carry rounding errors of 4e-6, which the scale, some 13 to 60, divides again.
        torch.testing.assert_close(rescaled, plain, atol=1e-4, rtol=0)
        in_double = [self._double(one, windows) for one in (loaded.model, model)]
        torch.testing.assert_close(*in_double, atol=2e-5, rtol=0)

        for own in lm_outliers.observe(model, windows).values():
            torch.testing.assert_close(own.mean[features], torch.full((6,), -size.magnitude), atol=1e-2, rtol=0)
            torch.testing.assert_close(own.deviation[features], torch.full((6,), size.deviation), atol=0, rtol=1e-3)
        assert all(torch.equal(value, before[key]) for key, value in loaded.model.state_dict().items())

        # What octavo analyze says of it, from the saved model.
        write_language_model(tmp_path, model)
        settings = analysis.Settings(window=40, min_positions=0.5)
        found = analysis.run(tmp_path, folder / "text.txt", settings, show_progress=False)
        assert {feature.number for feature in found.features} == set(features)
        assert all(feature.layers == 1 for feature in found.features)
        if name == "outliers-40":
            assert all(feature.one_sided for feature in found.features)
        if name == "outliers-two-sided":
            assert not any(feature.one_sided for feature in found.features)

    @staticmethod
    def _double(model: Any, windows: list[language.Window]) -> Any:
        import copy

        wide = copy.deepcopy(model).double()
        with torch.no_grad():
            return torch.cat([wide(window.ids).logits[0] for window in windows])

    def test_a_model_normalized_after_each_block_is_refused(self, folder: Path) -> None:
        model = language.load(folder).model
        model.config.do_layer_norm_before = False
        with pytest.raises(ValueError, match="expected an OPT that normalizes before each block"):
            lm_outliers.with_outliers(model, [0], lm_outliers.SIZES["outliers-40"], {})
