"""`octavo eval`, and what it shares with `octavo analyze`: models of Hugging Face folders, text in windows."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from octavo import cli
from octavo import eval as evaluation

torch = pytest.importorskip("torch", reason="octavo eval runs PyTorch models, and PyTorch is not installed")
transformers = pytest.importorskip("transformers", reason="octavo eval loads models with transformers, not installed")
pytest.importorskip("matplotlib", reason="octavo eval plots with matplotlib, which is not installed")

from octavo.eval import perplexity  # noqa: E402
from octavo.measuring import language, modules, schemes  # noqa: E402
from octavo.measuring.progress import Progress  # noqa: E402
from octavo.torch import Int8Linear  # noqa: E402
from tiny_models import tiny_opt, write_language_model  # noqa: E402
from torch import nn  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny OPT of random weights, large enough for its predictions to differ, with an outlier feature; and a text."""
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = tiny_opt(layers=2, width=64)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(8)
    for layer in model.model.decoder.layers:
        for norm in (layer.self_attn_layer_norm, layer.final_layer_norm):
            norm.bias.data[3] = -60.0  # one outlier feature
    write_language_model(path, model)
    generator = torch.Generator().manual_seed(0)
    words = [f"w{i}" for i in torch.randint(0, 16, (200,), generator=generator).tolist()]
    (path / "text.txt").write_text(" ".join(words))
    return path


class TestWindows:
    def test_windows_that_do_not_overlap(self) -> None:
        found = language.cut(list(range(10)), 4, 4)
        assert [(w.ids.tolist(), w.first, w.begin) for w in found] == [
            ([[0, 1, 2, 3]], 1, 0),
            ([[4, 5, 6, 7]], 1, 4),
            ([[8, 9]], 1, 8),
        ]

    def test_a_last_window_of_one_token_scores_nothing(self) -> None:
        assert [w.ids.tolist() for w in language.cut([1, 2, 3], 2, 2)] == [[[1, 2]]]

    def test_overlapping_windows_score_each_token_once(self) -> None:
        found = language.cut(list(range(11)), 4, 2)
        scored = [token for w in found for token in w.ids[0, w.first :].tolist()]
        assert scored == list(range(1, 11))
        assert all(w.first == 2 for w in found[1:-1])  # with at least two tokens of context

    def test_calibration_and_evaluation_share_no_token(self) -> None:
        for stride in (2, 3, 4):
            aside, rest = perplexity.set_aside(language.cut(list(range(50)), 4, stride), 3)
            assert len(aside) == 3
            assert rest
            seen = {token for w in aside for token in w.ids[0].tolist()}
            assert not seen & {token for w in rest for token in w.ids[0].tolist()}

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"window": 1}, "window: expected 2 to 64 tokens, got 1"),
            ({"window": 65}, "window: expected 2 to 64 tokens, got 65"),
            ({"window": 8, "stride": 9}, "stride: expected at most the window's 8 tokens, got 9"),
        ],
    )
    def test_wrong_windows(self, folder: Path, options: dict[str, int], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            language.read_windows(language.load(folder), folder / "text.txt", **options)

    def test_wrong_texts(self, folder: Path, tmp_path: Path) -> None:
        loaded = language.load(folder)
        (tmp_path / "short").write_text("w1")
        (tmp_path / "latin").write_bytes(b"caf\xe9")
        with pytest.raises(ValueError, match="expected text of at least two tokens"):
            language.read_windows(loaded, tmp_path / "short")
        with pytest.raises(ValueError, match="expected UTF-8"):
            language.read_windows(loaded, tmp_path / "latin")


class TestModel:
    def test_log_likelihoods_are_those_of_transformers(self, folder: Path) -> None:
        loaded = language.load(folder)
        windows = language.read_windows(loaded, folder / "text.txt", 16)
        own, top = language.log_likelihoods(loaded.model, windows[0])
        with torch.no_grad():
            output = loaded.model(windows[0].ids, labels=windows[0].ids)
        assert -float(own.mean()) == pytest.approx(float(output.loss), rel=1e-6)
        assert float(top[0]) == pytest.approx(float(output.logits[0, 0].softmax(-1).max()), rel=1e-6)
        overlapping = language.read_windows(loaded, folder / "text.txt", 16, 4)[1]
        own, _ = language.log_likelihoods(loaded.model, overlapping)
        with torch.no_grad():
            labels = overlapping.ids.clone()
            labels[:, : overlapping.first] = -100
            output = loaded.model(overlapping.ids, labels=labels)
        assert -float(own.mean()) == pytest.approx(float(output.loss), rel=1e-6)

    def test_conversion_leaves_the_head(self, folder: Path) -> None:
        loaded = language.load(folder)
        assert modules.output_head(loaded.model) == "lm_head"
        converted = schemes.convert(loaded.model, schemes.LLM_INT8)
        assert type(converted.lm_head) is nn.Linear
        assert converted.lm_head.weight.dtype == torch.float32
        found = [module for _, module in modules.linear_layers(converted)]
        assert len(found) == 12  # two layers of six
        assert all(isinstance(module, Int8Linear) for module in found)
        assert not any(isinstance(module, Int8Linear) for module in loaded.model.modules())

    def test_gpt2_has_linear_layers_of_the_same_function(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        config = transformers.GPT2Config(
            vocab_size=17, n_positions=64, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
        )
        model = transformers.GPT2LMHeadModel(config).eval()
        write_language_model(tmp_path, model)
        loaded = language.load(tmp_path)
        ids = torch.tensor([[1, 2, 3]])
        with torch.no_grad():
            torch.testing.assert_close(loaded.model(ids).logits, model(ids).logits)
        assert sum(1 for _ in modules.linear_layers(loaded.model)) == 4

    def test_a_folder_without_a_model(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"expected a Hugging Face folder with config\.json"):
            language.load(tmp_path)


class TestComparison:
    def test_paired_difference_by_hand(self) -> None:
        reference = perplexity.Scores([10, 10], [-20.0, -30.0], 0.5)
        found = perplexity.Scores([10, 10], [-22.0, -34.0], 0.5)
        mean, error = perplexity.paired_difference(found, reference)
        assert mean == pytest.approx(-0.3)
        # Per window -0.2 and -0.4 a token: a sample deviation of 0.1414, over the root of two.
        assert error == pytest.approx(0.1)
        uneven = perplexity.paired_difference(
            perplexity.Scores([10, 30], [-22.0, -39.0], 0.5), perplexity.Scores([10, 30], [-20.0, -30.0], 0.5)
        )
        assert uneven[0] == pytest.approx(-11 / 40)
        assert uneven[1] == pytest.approx(math.sqrt(2 * ((-2 + 2.75) ** 2 + (-9 + 8.25) ** 2)) / 40)

    def test_one_window_has_no_error(self) -> None:
        one = perplexity.Scores([3], [-3.0], 0.5)
        mean, error = perplexity.paired_difference(one, one)
        assert mean == 0
        assert math.isnan(error)

    def test_the_error_is_that_of_repeated_draws(self) -> None:
        """Over many sets of windows drawn anew the mean varies as the standard error of one set says."""
        generator = torch.Generator().manual_seed(0)
        means, errors = [], []
        for _ in range(400):
            tokens = torch.randint(20, 60, (40,), generator=generator)
            drawn = tokens * (0.1 + 0.05 * torch.randn(40, generator=generator))
            found = perplexity.Scores(tokens.tolist(), drawn.tolist(), 0.5)
            mean, error = perplexity.paired_difference(found, perplexity.Scores(tokens.tolist(), [0.0] * 40, 0.5))
            means.append(mean)
            errors.append(error)
        assert torch.tensor(means).std().item() == pytest.approx(sum(errors) / 400, rel=0.15)

    def test_perplexity_of_a_model_that_knows_nothing(self, tmp_path: Path) -> None:
        """A model whose logits are all alike has the vocabulary's size as its perplexity."""
        model = tiny_opt(layers=1, width=16)
        model.model.decoder.embed_tokens.weight.data.zero_()
        write_language_model(tmp_path, model)
        (tmp_path / "text.txt").write_text("w1 w2 w3 w4 w5")
        settings = evaluation.Settings(schemes=["float32", "llm-int8"])
        found = evaluation.run(tmp_path, tmp_path / "text.txt", settings, show_progress=False)
        assert [result.perplexity for result in found.results] == pytest.approx([17, 17])
        assert [result.difference for result in found.results] == pytest.approx([0, 0], abs=1e-7)
        assert found.tokens == 4

    def test_chosen_schemes(self) -> None:
        assert [scheme.key for scheme in perplexity.chosen(["kept-static", "absmax"])] == ["absmax", "kept-static"]
        assert len(perplexity.chosen(None)) == 13
        assert len({scheme.key for scheme in perplexity.SCHEMES}) == 13
        with pytest.raises(ValueError, match=r"--schemes: expected some of float32, absmax, .*; got int4"):
            perplexity.chosen(["int4"])


class TestCommand:
    def _run(self, folder: Path, *more: object) -> int:
        words = ["eval", folder, "--text", folder / "text.txt", "--threads", 1, *more]
        return cli.main([str(word) for word in words])

    def test_the_whole(self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert self._run(folder, "--window", 16, "--json", tmp_path / "new" / "e.json", "--plots", tmp_path / "p") == 0
        captured = capsys.readouterr()
        assert "float32" in captured.err  # the progress bar
        written = json.loads((tmp_path / "new" / "e.json").read_text())
        results: dict[str, dict[str, Any]] = {result["key"]: result for result in written["results"]}
        assert list(results) == [scheme.key for scheme in perplexity.SCHEMES]
        for result in results.values():
            assert result["name"] in captured.out
            assert f"{result['perplexity']:.4f}" in captured.out
            assert result["perplexity"] == pytest.approx(math.exp(-result["log_likelihood"]))
        assert results["float32"]["difference"] == results["float32"]["standard_error"] == 0
        # 200 tokens are 13 windows of 16, the last of 8; the first 8 are for the calibration.
        assert (written["windows"], written["tokens"]) == (5, 4 * 15 + 7)
        assert results["float32"]["scores"]["tokens"] == [15, 15, 15, 15, 7]
        lost = {key: abs(result["difference"]) for key, result in results.items()}
        # With an outlier among them, the other features are left few of the 8 bits; kept weights are the best.
        assert lost["llm-int8"] < lost["absmax-vector"]
        assert lost["kept-columns"] < lost["llm-int8"]
        assert results["float32"]["linear_bytes"] > 3 * results["llm-int8"]["linear_bytes"]
        assert sorted(path.name for path in (tmp_path / "p").iterdir()) == ["perplexity.png", "table.png"]
        for path in (tmp_path / "p").iterdir():
            assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
            assert path.stat().st_size > 10_000

    def test_a_text_to_calibrate_with(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        text = folder / "text.txt"
        words = ["--schemes", "kept-columns", "--calibration", text, "--window", 16, "--limit", 2, "--quiet"]
        assert self._run(folder, *words) == 0
        captured = capsys.readouterr()
        assert "30 tokens in 2 windows" in captured.out
        assert captured.err == ""

    def test_failures_are_one_line(self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        model = transformers.BertModel(
            transformers.BertConfig(
                vocab_size=17, hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16
            )
        )
        write_language_model(tmp_path, model)
        (tmp_path / "text.txt").write_text("w1 w2")
        for model_folder, more, message in (
            (tmp_path, [], "expected a causal language model in config.json's architectures, got ['BertModel']"),
            (folder, ["--schemes", "int4"], "got int4"),
            (folder, ["--window", "64"], "expected more than the 8 windows of the calibration, got 4"),
            (folder, ["--calibration", folder / "none"], "none"),
        ):
            assert self._run(model_folder, "--quiet", *more) == 1
            captured = capsys.readouterr()
            assert captured.out == ""
            assert captured.err.startswith("octavo eval: ")
            assert message in captured.err
            assert captured.err.count("\n") == 1


def test_scores_see_the_windows_alone(folder: Path) -> None:
    """A window's score does not depend on the others: one call each."""
    loaded = language.load(folder)
    windows = language.read_windows(loaded, folder / "text.txt", 16)
    converted = schemes.convert(loaded.model, schemes.LLM_INT8)
    with Progress(1, show=False) as progress:
        together = perplexity.score(converted, windows[:3], progress, "")
        alone = perplexity.score(converted, windows[1:2], progress, "")
    assert together.log_likelihoods[1] == alone.log_likelihoods[0]
