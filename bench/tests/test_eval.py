"""`octavo eval`, and what it shares with `octavo analyze`: models of Hugging Face folders, text in windows."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from octavo import cli
from octavo_bench import eval as evaluation

torch = pytest.importorskip("torch", reason="octavo eval runs PyTorch models, and PyTorch is not installed")
transformers = pytest.importorskip("transformers", reason="octavo eval loads models with transformers, not installed")
pytest.importorskip("matplotlib", reason="octavo eval plots with matplotlib, which is not installed")

from octavo.torch import Int8Linear
from octavo_bench.eval import order, perplexity, plots, report, tasks, variants
from octavo_bench.measuring import language, modules, peers, schemes
from octavo_bench.measuring.progress import Progress
from tiny_models import tiny_model, tiny_opt, write_language_model
from torch import nn


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

    def test_an_encoder_decoder_is_refused(self, tmp_path: Path) -> None:
        write_language_model(tmp_path, tiny_model("T5ForConditionalGeneration"))
        message = "expected a causal language model or an encoder, got an encoder-decoder, T5ForConditionalGeneration"
        with pytest.raises(ValueError, match=message):
            language.load(tmp_path)

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
        assert [scheme.key for scheme in variants.chosen(["kept-static", "absmax"])] == ["absmax", "kept-static"]
        assert len(variants.chosen(None)) == 16
        assert len({scheme.key for scheme in variants.SCHEMES}) == 16
        with pytest.raises(ValueError, match=r"--schemes: expected some of float32, absmax, .*; got int4"):
            variants.chosen(["int4"])


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
        assert list(results) == [scheme.key for scheme in variants.SCHEMES]
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
        assert lost["smoothquant"] < lost["absmax-vector"]
        assert results["float32"]["linear_bytes"] > 3 * results["llm-int8"]["linear_bytes"]
        assert sorted(path.name for path in (tmp_path / "p").iterdir()) == ["perplexity.png", "table.png"]
        for path in (tmp_path / "p").iterdir():
            assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
            assert path.stat().st_size > 10_000

    def test_a_picture_that_fails_loses_no_results(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def fails(report: Any) -> Any:
            raise RuntimeError("no font")

        monkeypatch.setattr(plots, "draw_perplexity", fails)
        words = ["--schemes", "float32", "--window", 16, "--limit", 2, "--quiet"]
        assert self._run(folder, *words, "--json", tmp_path / "e.json", "--plots", tmp_path / "p") == 1
        captured = capsys.readouterr()
        assert captured.err == "octavo eval: no font\n"
        assert "30 tokens in 2 windows" in captured.out
        written = json.loads((tmp_path / "e.json").read_text())
        assert written["plots"] == ["perplexity.png", "table.png"]
        assert [row["key"] for row in written["results"]] == ["float32"]

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
            (tmp_path, ["--stride", "2"], "--stride: expected a causal language model in config.json's architectures"),
            (tmp_path, ["--task", "t"], "--task: expected a causal language model in config.json's architectures"),
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


def write_task(folder: Path, count: int = 6) -> Path:
    """Questions of five words in front, and of one or two words to choose from."""
    lines = []
    for number in range(count):
        prompt = " ".join(f"w{(number + place) % 16}" for place in range(5))
        lines.append({"prompt": prompt, "choices": [f" w{number}", f" w{number + 1} w3", " w9"], "answer": number % 3})
    path = folder / "task.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + "\n")
    return path


class TestTasks:
    def test_answers_by_hand(self, folder: Path, tmp_path: Path) -> None:
        """Summed log-likelihoods of the choice after the prompt, from the logits themselves."""
        loaded = language.load(folder)
        questions = tasks.read(write_task(tmp_path), loaded)
        assert [len(question.choices) for question in questions] == [3] * 6
        with Progress(1, show=False) as progress:
            found = tasks.answers(loaded.model, questions, progress, "")
        for number, answer in enumerate(found):
            context = [(number + place) % 16 for place in range(5)]
            sums = []
            for choice in ([number], [number + 1, 3], [9]):
                with torch.no_grad():
                    likelihood = loaded.model(torch.tensor([context + choice])).logits[0].log_softmax(-1)
                sums.append(sum(float(likelihood[4 + place, token]) for place, token in enumerate(choice)))
            assert answer == sums.index(max(sums))
        assert len(set(found)) > 1

    def test_accuracy_by_hand(self) -> None:
        questions = [tasks.Question([], answer) for answer in (0, 0, 1, 2)]
        variant = variants.Variant("a", "A", lambda: nn.Identity(), lambda model: 0)
        found = tasks.compare(variant, [0, 0, 1, 0], [0, 1, 1, 2], questions)
        assert found.accuracy == 0.75
        assert found.standard_error == pytest.approx(math.sqrt(0.75 * 0.25 / 3))
        assert found.difference == 0  # one gained, one lost
        assert found.difference_error == pytest.approx(math.sqrt((2 / 3) / 4))
        assert found.changed == 2

    def test_long_prompts_lose_their_beginning(self, folder: Path, tmp_path: Path) -> None:
        loaded = language.load(folder)
        line = {"prompt": " ".join(["w1"] * 80) + "  ", "choices": [" w2 w3", "w4"], "answer": 0}
        (tmp_path / "t").write_text(json.dumps(line))
        question = tasks.read(tmp_path / "t", loaded)[0]
        assert [window.ids.shape[1] for window in question.choices] == [65, 65]  # the model is given all but the last
        with Progress(1, show=False) as progress:
            assert tasks.answers(loaded.model, [question], progress, "")[0] in (0, 1)
        assert [window.scored for window in question.choices] == [2, 1]
        assert question.choices[0].ids[0, -2:].tolist() == [2, 3]

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("{", r"t:2: expected a JSON object, got"),
            ("[]", r"t:2: expected an object with prompt, choices and answer, got \[\]"),
            ('{"prompt": " ", "choices": ["a", "b"], "answer": 0}', "prompt: expected text, got ' '"),
            ('{"prompt": "a", "choices": ["b"], "answer": 0}', "choices: expected a list of at least two texts"),
            ('{"prompt": "a", "choices": ["b", " "], "answer": 0}', "choices: expected a list of at least two texts"),
            ('{"prompt": "a", "choices": ["b", "c"], "answer": 2}', "answer: expected the place of a choice, 0 to 1"),
            ('{"prompt": "a", "choices": ["b", "c"], "answer": true}', "answer: expected the place of a choice"),
            ("", "expected at least one question, got none"),
        ],
    )
    def test_wrong_files(self, folder: Path, tmp_path: Path, line: str, message: str) -> None:
        (tmp_path / "t").write_text("\n" + line)
        with pytest.raises(ValueError, match=message):
            tasks.read(tmp_path / "t", language.load(folder))


class TestOrder:
    @staticmethod
    def _result(key: str, *sums: float) -> perplexity.Result:
        scores = perplexity.Scores([10, 10, 10], list(sums), 0.5)
        reference = perplexity.Scores([10, 10, 10], [0.0, 0.0, 0.0], 0.5)
        variant = variants.Variant(key, key, lambda: nn.Identity(), lambda model: 0)
        return perplexity.compare(variant, scores, reference, 0)

    def test_met_and_not_met(self) -> None:
        """Losses of .3 and .2, told apart; of .2 and .19 +- .02; and of .0001 and .0003."""
        found = order.checks(
            [
                self._result("float32", 0, 0, 0),
                self._result("absmax", -3.0, -3.1, -2.9),
                self._result("absmax-row", -2.0, -2.1, -1.9),
                self._result("absmax-vector", -1.5, -2.3, -1.9),
                self._result("zeropoint-vector", -1.7, -2.2, -2.0),
                self._result("llm-int8", -0.001, -0.001, -0.001),
                self._result("llm-int8-zeropoint", -0.003, -0.003, -0.003),
            ]
        )
        assert [(check.left, check.right, check.verdict) for check in found] == [
            ("absmax", "absmax-row", "met"),
            ("absmax-row", "absmax-vector", "met"),
            ("absmax-vector", "zeropoint-vector", "not met"),
            ("zeropoint-vector", "llm-int8", "met"),
            ("llm-int8", "float32", "met"),
            ("llm-int8-zeropoint", "float32", "not met"),
        ]
        assert found[0].difference == pytest.approx(0.1)
        assert found[0].standard_error == pytest.approx(0, abs=1e-9)
        assert found[4].difference == pytest.approx(1e-4)

    def test_no_less(self) -> None:
        worse = self._result("absmax-vector", -2.5, -2.6, -2.4)
        (check,) = order.checks([self._result("absmax-row", -2.0, -2.1, -1.9), worse])
        assert check.verdict == "not met"

    def test_too_little_text_to_tell(self) -> None:
        """A loss of .0001, or of .0003, that is as often .0012 less or more."""
        for loss in (-0.001, -0.003):
            rows = [self._result("llm-int8", loss, loss - 0.012, loss + 0.012), self._result("float32", 0, 0, 0)]
            assert [check.verdict for check in order.checks(rows)] == ["undecided"]

    def test_one_window_tells_nothing(self) -> None:
        def result(key: str, total: float) -> perplexity.Result:
            variant = variants.Variant(key, key, lambda: nn.Identity(), lambda model: 0)
            return perplexity.compare(
                variant, perplexity.Scores([10], [total], 0.5), perplexity.Scores([10], [0.0], 0.5), 0
            )

        rows = [result("float32", 0), result("absmax", -3.0), result("absmax-row", -2.0), result("llm-int8", 0.0)]
        assert [check.verdict for check in order.checks(rows)] == ["not met", "undecided"]

    def test_not_finite_is_not_met(self) -> None:
        (check,) = order.checks([self._result("llm-int8", math.nan, 0, 0), self._result("float32", 0, 0, 0)])
        assert check.verdict == "not met"


class TestPeers:
    def test_both_in_the_table_with_times(self, folder: Path, tmp_path: Path) -> None:
        pytest.importorskip("bitsandbytes", reason="a peer that is compared, bitsandbytes, is not installed")
        pytest.importorskip("torchao", reason="a peer that is compared, torchao, is not installed")
        settings = evaluation.Settings(
            ["llm-int8", "absmax-vector"], window=16, limit=4, peers=True, seconds=0, task=write_task(tmp_path)
        )
        found = evaluation.run(folder, folder / "text.txt", settings, show_progress=False, command="the command")
        assert found.left_out == {}
        rows = {row.key: row for row in found.results}
        assert list(rows) == ["absmax-vector", "llm-int8", "bitsandbytes", "torchao"]
        assert all(math.isfinite(row.difference) and row.difference != 0 for row in rows.values())
        held = {key: row.linear_bytes for key, row in rows.items()}
        codes = 2 * 12 * 64 * 64
        for key in rows:
            assert codes < held[key] < 1.2 * codes, key
        assert [timed.key for timed in found.times] == ["llm-int8", "float32", "bitsandbytes", "torchao"]
        assert found.times[0].ratio == 1
        assert all(timed.milliseconds.median > 0 and timed.milliseconds.calls == 15 for timed in found.times)
        assert [row.key for row in found.accuracies] == list(rows)
        assert {"bitsandbytes", "torchao"} <= set(found.machine["packages"])
        others = found.machine["cores_taken_by_others"]
        said = "other programs' use unknown" if others is None else f"other programs took {others:.2f} cores"
        assert f"Meanwhile {said}." in report.text(found)

    def test_their_layers_are_what_they_are_called(self) -> None:
        """Outlier columns in bitsandbytes, as LLM.int8(), and none in torchao, as vector-wise; a bias in both."""
        torch.manual_seed(0)
        linear = nn.Linear(64, 48).requires_grad_(False)
        linear.weight.copy_(linear.weight.half())
        linear.bias.copy_(linear.bias.half() + 8)
        x = torch.randn(20, 64)
        x[:, 5] += 60
        error = {}
        with torch.inference_mode():
            for outliers in ("columns", "none"):
                own = Int8Linear.from_linear(linear, outliers=outliers, path="int8")
                error[outliers] = float((own(x) - linear(x)).norm())
            for peer in peers.PEERS:
                pytest.importorskip(peer.package, reason=f"a peer that is compared, {peer.package}, is not installed")
                model = peers.convert(nn.Sequential(linear), peer)
                error[peer.key] = float((model(x) - linear(x)).norm())
                assert type(linear) is nn.Linear
        assert error["columns"] < error["none"] / 2
        assert error["bitsandbytes"] == pytest.approx(error["columns"], rel=0.3)
        assert error["torchao"] == pytest.approx(error["none"], rel=0.3)

    def _one_peer(self, monkeypatch: pytest.MonkeyPatch, make: Callable[[nn.Linear], nn.Module]) -> None:
        """A peer of a package that is installed, whose layers are what `make` makes."""
        peer = peers.Peer("peer", "Peer", "numpy", make, lambda module: 1)
        monkeypatch.setattr(variants, "PEERS", (peer,))

    def test_a_peer_that_fails_on_the_task_has_no_row(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It is left out, and not a row as well."""
        self._one_peer(monkeypatch, lambda linear: linear)
        answers = tasks.answers

        def failing(model: nn.Module, questions: Any, progress: Progress, doing: str) -> list[int]:
            if doing.startswith("Peer"):
                raise OSError("a library is missing")
            return answers(model, questions, progress, doing)

        monkeypatch.setattr(tasks, "answers", failing)
        settings = evaluation.Settings(
            ["float32"], window=16, limit=2, peers=True, seconds=0, task=write_task(tmp_path)
        )
        found = evaluation.run(folder, folder / "text.txt", settings, show_progress=False)
        assert list(found.left_out.values()) == ["OSError: a library is missing"]
        assert [row.key for row in found.results] == [row.key for row in found.accuracies] == ["float32"]
        assert [timed.key for timed in found.times] == ["llm-int8", "float32"]

    def test_a_peer_that_cannot_be_timed_keeps_its_row(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        made: list[nn.Linear] = []

        def once(linear: nn.Linear) -> nn.Module:
            if len(made) == 12:  # two layers of six: this is the second time
                raise RuntimeError("no memory")
            made.append(linear)
            return linear

        self._one_peer(monkeypatch, once)
        settings = evaluation.Settings(["float32"], window=16, limit=2, peers=True, seconds=0)
        found = evaluation.run(folder, folder / "text.txt", settings, show_progress=False)
        assert found.left_out == {}
        assert [row.key for row in found.results] == ["float32", "peer"]
        assert [timed.key for timed in found.times] == ["llm-int8", "float32"]
        assert list(found.untimed.values()) == ["RuntimeError: no memory"]
        (table,) = (each for each in report.tables(found) if each.title.startswith("Time of"))
        assert table.rows[-1] == [next(iter(found.untimed)), "left out", "", ""]
        assert "RuntimeError: no memory" in table.note

    def test_what_is_not_installed_is_said(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(linear: nn.Linear) -> nn.Module:
            raise RuntimeError("no such kernel\nhere")

        monkeypatch.setattr(
            variants,
            "PEERS",
            (
                peers.Peer("a", "A", "octavo-no-such-package", broken, lambda module: 0),
                peers.Peer("b", "B", "numpy", broken, lambda module: 0),
            ),
        )
        settings = evaluation.Settings(["float32"], window=16, limit=2, peers=True, seconds=0)
        found = evaluation.run(folder, folder / "text.txt", settings, show_progress=False)
        reasons = list(found.left_out.values())
        assert reasons == ["octavo-no-such-package is not installed", "RuntimeError: no such kernel"]
        printed = report.text(found)
        assert "Left out: A: octavo-no-such-package is not installed." in printed
        assert "left out" in printed


class TestSmoothQuant:
    def test_a_model_that_cannot_be_smoothed(self, tmp_path: Path) -> None:
        """Left out with the reason by default; where it was asked for, an error."""
        torch.manual_seed(0)
        model = tiny_opt(layers=1, width=16)
        config = model.config
        config.do_layer_norm_before = False
        write_language_model(tmp_path, transformers.OPTForCausalLM(config))
        (tmp_path / "text.txt").write_text(" ".join(f"w{number % 16}" for number in range(100)))
        settings = evaluation.Settings(window=16, limit=2, calibration_windows=2)
        found = evaluation.run(tmp_path, tmp_path / "text.txt", settings, show_progress=False)
        assert len(found.results) == sum(not scheme.smooth for scheme in variants.SCHEMES)
        assert list(found.left_out) == [schemes.SMOOTH_VECTOR.name, schemes.SMOOTH_LLM_INT8.name]
        assert all("also goes into" in reason for reason in found.left_out.values())
        with pytest.raises(ValueError, match="smooth_: model: expected LayerNorms or RMSNorms"):
            evaluation.run(
                tmp_path,
                tmp_path / "text.txt",
                evaluation.Settings(["smoothquant"], window=16, calibration_windows=2),
                show_progress=False,
            )


class TestEncoder:
    def test_the_whole(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        model = tiny_model("BertForMaskedLM").bert
        model.config.architectures = ["BertModel"]
        # An outlier feature in front of every layer; not behind the last, where it would be all of the embeddings.
        for part in (model.embeddings, model.encoder.layer[0].output):
            part.LayerNorm.weight[3] = 40.0
        write_language_model(tmp_path, model)
        lines = [" ".join(f"w{(7 * line + step * step) % 16}" for step in range(line % 5 + 3)) for line in range(24)]
        (tmp_path / "text.txt").write_text("\n\n".join(lines))
        words = ["eval", tmp_path, "--text", tmp_path / "text.txt", "--calibration-windows", 4]
        words += ["--json", tmp_path / "e.json", "--plots", tmp_path / "p", "--threads", 1]
        assert cli.main([str(word) for word in words]) == 0
        captured = capsys.readouterr()
        written = json.loads((tmp_path / "e.json").read_text())
        assert written["command"] == "octavo " + " ".join(map(str, words))
        assert written["plots"] == ["embeddings.png", "table.png"]
        assert written["windows"] == 20
        rows: dict[str, dict[str, Any]] = {row["key"]: row for row in written["similarities"]}
        assert list(rows) == [scheme.key for scheme in variants.SCHEMES]
        for row in rows.values():
            assert f"{row['mean_cosine']:.6f}" in captured.out
            assert row["mean_cosine"] == pytest.approx(sum(row["cosines"]) / 20)
            assert row["min_cosine"] == pytest.approx(min(row["cosines"]))
        assert rows["float32"]["mean_cosine"] == pytest.approx(1, abs=1e-12)
        assert rows["float32"]["neighbors_kept"] == 20
        assert 1 / 7 < rows["float32"]["top_probability"] < 1
        lost = {key: 1 - row["mean_cosine"] for key, row in rows.items()}
        assert lost["llm-int8"] < lost["absmax-vector"] < lost["absmax"]
        # Divided in front of the layers: the residual takes what these normalizations put out, too.
        assert lost["smoothquant"] < lost["absmax-vector"]

    def test_embeddings_are_those_of_transformers(self, tmp_path: Path) -> None:
        from octavo_bench.eval import embeddings

        model = tiny_model("BertForMaskedLM").bert
        model.config.architectures = ["BertModel"]
        write_language_model(tmp_path, model)
        (tmp_path / "text.txt").write_text("w1 w2 w3\n\n  \nw4 w5\n")
        loaded = language.load(tmp_path)
        passages = embeddings.read_passages(loaded, tmp_path / "text.txt", None)
        assert [passage.ids.tolist() for passage in passages] == [[[1, 2, 3]], [[4, 5]]]
        with Progress(1, show=False) as progress:
            found = embeddings.embed(loaded.model, passages, progress, "")
        with torch.no_grad():
            hidden = model(torch.tensor([[4, 5]])).last_hidden_state[0].double().mean(0)
        torch.testing.assert_close(found.embeddings[1], hidden / hidden.norm(), atol=1e-6, rtol=0)
        (tmp_path / "text.txt").write_text("w1\n")
        with pytest.raises(ValueError, match="expected at least two lines of text, got 1"):
            embeddings.read_passages(loaded, tmp_path / "text.txt", None)
