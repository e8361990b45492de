"""`octavo analyze`, on models whose outlier features are known because they were put there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from octavo import cli
from octavo_bench import analysis

torch = pytest.importorskip("torch", reason="octavo analyze runs PyTorch models, and PyTorch is not installed")
transformers = pytest.importorskip(
    "transformers", reason="octavo analyze loads models with transformers, not installed"
)
pytest.importorskip("matplotlib", reason="octavo analyze plots with matplotlib, which is not installed")

from octavo_bench.analysis import blocks, plots, report
from octavo_bench.measuring import language
from tiny_models import tiny_model, tiny_opt, write_language_model

WIDTH = 16
# Twenty words in windows of ten: w1 at 5 of 20 positions, w2 at 1, else w0.
WORDS = ["w1", *["w0"] * 7, "w2", "w0", "w1", "w1", *["w0"] * 6, "w1", "w1"]


def known_model() -> Any:
    """Four layers that add nothing to the residual stream: each LayerNorm sees the embedding of its token.

    Embeddings are +1 and -1, half of each, which the LayerNorm leaves as they are, but for its epsilon: its output is
    weight * (+-1) + bias. Words w0 and w1 are each other's negative: w0 is +1 at even features and -1 at odd ones. w2
    is w0.
    """
    model = tiny_opt(layers=4, width=WIDTH)
    signs = torch.tensor([1.0, -1.0]).repeat(WIDTH // 2)
    embedding = model.model.decoder.embed_tokens.weight.data
    embedding[:] = signs
    embedding[1] = -signs
    model.model.decoder.embed_positions.weight.data.zero_()
    for layer in model.model.decoder.layers:
        for linear in (layer.self_attn.v_proj, layer.self_attn.out_proj, layer.fc1, layer.fc2):
            linear.weight.data.zero_()
            linear.bias.data.zero_()
        for norm in (layer.self_attn_layer_norm, layer.final_layer_norm):
            norm.weight.data.fill_(1.0)
            norm.bias.data.zero_()
    return model


def set_feature(model: Any, layers: tuple[int, ...], norm: str, feature: int, weight: float, bias: float) -> None:
    for layer in layers:
        module = getattr(model.model.decoder.layers[layer], norm)
        module.weight.data[feature] = weight
        module.bias.data[feature] = bias


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("known")
    model = known_model()
    attention, feed_forward = "self_attn_layer_norm", "final_layer_norm"
    # 2: -40 +- 2 in the attention input of all layers, at all positions: one-sided.
    set_feature(model, (0, 1, 2, 3), attention, 2, 2.0, -40.0)
    # 5: +-20, in the feed-forward input of one layer of four: the least that counts; two-sided.
    set_feature(model, (3,), feed_forward, 5, 20.0, 0.0)
    # 7: 15 at w1 (at an odd feature w1 is +1), -5 elsewhere, in two layers: 5/20 * 2/4 = 12.5 % of positions.
    set_feature(model, (0, 1), attention, 7, 10.0, 5.0)
    # 9: 8 at w1 in one layer: 25 % of layers, 6.25 % of positions, which is just enough.
    set_feature(model, (1,), feed_forward, 9, 5.0, 3.0)
    # 11: too small by the last bit, everywhere. 12: 6 exactly, in one layer.
    set_feature(model, (0, 1, 2, 3), attention, 11, 0.0, 5.9999995)
    set_feature(model, (2,), attention, 12, 0.0, 6.0)
    write_language_model(path, model)
    (path / "text.txt").write_text(" ".join(WORDS))
    return path


def near(value: Any) -> Any:
    return pytest.approx(value, rel=1e-5)  # the LayerNorm's epsilon


def analyze(folder: Path, **settings: Any) -> report.Report:
    options = analysis.Settings(window=10, **settings)
    return analysis.run(folder, folder / "text.txt", options, show_progress=False)


def test_known_features(folder: Path) -> None:
    found = analyze(folder)
    assert found.settings["positions"] == 20
    seen = {f.number: (f.layers, f.positions, f.largest, f.one_sided) for f in found.features}
    assert seen == {
        2: (1.0, 1.0, near(42.0), True),
        5: (0.25, 0.25, near(20.0), False),
        7: (0.5, 0.125, near(15.0), True),
        9: (0.25, 0.0625, near(8.0), True),
        12: (0.25, 0.25, 6.0, True),
    }
    assert [feature.number for feature in found.features] == [2, 5, 12, 7, 9]  # the most common first
    assert (found.spread.layers, found.spread.positions, found.spread.most_common) == (1.0, 1.0, 2)
    # Feature 2 is even: -38 at w0 and w2, -42 at w1, a quarter of the positions: the quarter falls between.
    assert found.spread.quartiles == near([-39.0, -38.0, -38.0])


def test_criteria(folder: Path) -> None:
    assert [f.number for f in analyze(folder, min_positions=0.0626).features] == [2, 5, 12, 7]
    assert [f.number for f in analyze(folder, min_layers=0.26).features] == [2, 7]
    assert [f.number for f in analyze(folder, threshold=30.0).features] == [2]
    # Of the first window only: w1 is 1 of 10 positions there, and 7 and 9 fall below 6 %.
    assert [f.number for f in analyze(folder, limit=1).features] == [2, 5, 12]
    none = analyze(folder, threshold=100.0, ablate=True)
    assert none.features == []
    assert none.spread.most_common is None
    assert none.without is None
    assert "There are no outlier features" in report.text(none)


def test_columns_by_layer_and_projection(folder: Path) -> None:
    found = {(seen.layer, seen.name): seen for seen in analyze(folder).projections}
    assert len(found) == 4 * 6
    for name in ("q_proj", "k_proj", "v_proj"):
        columns = [found[layer, f"self_attn.{name}"].columns for layer in range(4)]
        assert columns == [[2, 7], [2, 7], [2, 12], [2]]
        assert found[0, f"self_attn.{name}"].share == [1.0, 0.25]
        assert found[0, f"self_attn.{name}"].largest == near(42.0)
        assert found[0, f"self_attn.{name}"].takes == blocks.ATTENTION_INPUT
    assert [found[layer, "fc1"].columns for layer in range(4)] == [[], [9], [], [5]]
    assert [found[layer, "self_attn.out_proj"].columns for layer in range(4)] == [[]] * 4
    assert found[1, "fc1"].share == [0.25]
    assert found[0, "fc2"].takes == blocks.FEED_FORWARD_HIDDEN


def test_the_contraction_counts_for_no_feature_but_is_listed(tmp_path: Path) -> None:
    model = known_model()
    for layer in model.model.decoder.layers:
        layer.fc1.bias.data[40] = 50.0
    write_language_model(tmp_path, model)
    (tmp_path / "text.txt").write_text(" ".join(WORDS))
    found = analyze(tmp_path)
    assert found.features == []
    listed = [seen for seen in found.projections if seen.columns]
    assert [(seen.layer, seen.name, seen.columns, seen.share) for seen in listed] == [
        (layer, "fc2", [40], [1.0]) for layer in range(4)
    ]


def test_values_that_are_not_finite_are_outlying(tmp_path: Path) -> None:
    model = known_model()
    set_feature(model, (0,), "final_layer_norm", 3, 1.0, float("inf"))
    write_language_model(tmp_path, model)
    (tmp_path / "text.txt").write_text(" ".join(WORDS))
    assert 3 in [feature.number for feature in analyze(tmp_path).features]


def test_a_picture_that_fails_loses_no_results(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(report: Any) -> Any:
        raise RuntimeError("no font")

    monkeypatch.setattr(plots, "draw_emergence", fails)
    words = ["analyze", folder, "--text", folder / "text.txt", "--window", 10, "--threads", 1, "--quiet"]
    words += ["--json", tmp_path / "a.json", "--plots", tmp_path / "p"]
    assert cli.main([str(word) for word in words]) == 1
    assert capsys.readouterr().err == "octavo analyze: no font\n"
    written = json.loads((tmp_path / "a.json").read_text())
    assert [feature["number"] for feature in written["features"]] == [2, 5, 12, 7, 9]
    assert written["plots"] == ["emergence.png", "magnitudes.png", "columns.png", "worth.png", "tables.png"]


def test_an_encoder_decoder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_language_model(tmp_path, tiny_model("T5ForConditionalGeneration"))
    (tmp_path / "text.txt").write_text(" ".join(WORDS))
    assert cli.main(["analyze", str(tmp_path), "--text", str(tmp_path / "text.txt"), "--quiet"]) == 1
    assert capsys.readouterr().err == (
        f"octavo analyze: {tmp_path}: expected a causal language model or an encoder, got an encoder-decoder, "
        "T5ForConditionalGeneration\n"
    )


def test_ablation_is_the_model_without_the_weights_columns(tmp_path: Path) -> None:
    """Zeroing an input feature of query, key and value is zeroing their weights' column."""
    torch.manual_seed(0)
    model = tiny_opt(layers=2, width=WIDTH)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(10)
    set_feature(model, (0, 1), "self_attn_layer_norm", 2, 2.0, -40.0)
    set_feature(model, (0, 1), "self_attn_layer_norm", 6, 9.0, 30.0)
    for layer in model.model.decoder.layers:
        layer.self_attn.v_proj.weight.data[:, [2, 6]] *= 0.02  # else they make outliers of what attention puts out
    write_language_model(tmp_path, model)
    (tmp_path / "text.txt").write_text(" ".join(f"w{i * i % 16}" for i in range(40)))
    found = analyze(tmp_path, ablate=True, draws=2)
    assert found.without is not None
    assert {2, 6} <= set(found.without.features)
    ever = {feature for layer in found.by_layer for feature, share in enumerate(layer) if share > 0}
    assert ever >= set(found.without.features)
    assert [set(draw.features) & ever for draw in found.random] == [set(), set()]
    assert [len(draw.features) for draw in found.random] == [len(found.without.features)] * 2

    loaded = language.load(tmp_path)
    windows = language.read_windows(loaded, tmp_path / "text.txt", 10)
    for ablation in (found.untouched, found.without, *found.random):
        changed = language.load(tmp_path).model
        for layer in changed.model.decoder.layers:
            for name in ("q_proj", "k_proj", "v_proj"):
                getattr(layer.self_attn, name).weight.data[:, ablation.features] = 0.0
        own, top = (
            torch.cat(parts) for parts in zip(*(language.log_likelihoods(changed, w) for w in windows), strict=True)
        )
        assert ablation.perplexity == pytest.approx(float((-own.mean()).exp()), rel=1e-5)
        assert ablation.top_probability == pytest.approx(float(top.mean()), rel=1e-5)
    assert found.without.perplexity != pytest.approx(found.untouched.perplexity, rel=1e-2)


def test_what_kept_outlier_weights_are_worth(tmp_path: Path) -> None:
    """Weights that int8 holds exactly, but those of the outlier column, whose codes are zero.

    The activations beside the outliers are +-1: their codes are exact, too. So all that dequantized weights lose is
    x_2 * w_2, and kept ones lose nothing but their rounding to 16 bits.
    """
    model = known_model()
    large, small = 127 / 128, 0.3 / 128  # a scale of 1/128: codes 127 and 0
    for layer in model.model.decoder.layers:
        for name in ("q_proj", "k_proj", "v_proj"):
            linear = getattr(layer.self_attn, name)
            linear.weight.data.zero_()
            linear.weight.data[:, 0], linear.weight.data[:, 2] = large, small
            linear.bias.data.zero_()
        layer.self_attn.out_proj.weight.data.zero_()
    set_feature(model, (0, 1, 2, 3), "self_attn_layer_norm", 2, 2.0, -40.0)  # -38 at w0, -42 at w1
    set_feature(model, (1,), "self_attn_layer_norm", 7, 10.0, 5.0)  # 15 at w1, -5 elsewhere
    set_feature(model, (2,), "self_attn_layer_norm", 2, 0.0, 1.0)  # no outlier
    write_language_model(tmp_path, model)
    # Two windows: kept columns are found in the first, where there is no w1, and the second one is measured.
    (tmp_path / "text.txt").write_text(" ".join(["w0"] * 10 + ["w0"] * 9 + ["w1"]))
    found = {(worth.layer, worth.name): worth for worth in analyze(tmp_path).worths}
    x0, x2 = torch.tensor([1.0] * 9 + [-1.0]), torch.tensor([-38.0] * 9 + [-42.0])
    lost = float((x2 * small).norm() / (x0 * large + x2 * small).norm())
    for name in ("q_proj", "k_proj", "v_proj"):
        own = found[0, f"self_attn.{name}"]
        assert own.kept == [2]
        for policy in ("dequantized-columns", "dequantized-rows"):
            assert own.errors[policy] == pytest.approx(lost, rel=1e-3)
        for policy in ("kept-columns", "kept-rows", "kept-static"):
            assert 0 < own.errors[policy] < 2**-11
        # Feature 7 reaches 6 in the last row only, and in none that the kept columns were found in.
        rare = found[1, f"self_attn.{name}"]
        assert rare.kept == [2]
        assert rare.errors["kept-columns"] < 2**-11  # its 5 goes through 16 bit in all rows
        assert 2**-11 < rare.errors["kept-rows"] < rare.errors["kept-static"]  # in the last one, and in none
        none = found[2, f"self_attn.{name}"]
        assert none.kept == []
        assert len(set(none.errors.values())) == 1  # int8 for every column, whatever the policy
    assert set(found[0, "fc1"].errors.values()) == {0.0}
    with_all = analyze(tmp_path, limit=1).worths  # one window: for both
    assert with_all[0].errors["kept-static"] < 2**-11 < with_all[0].errors["dequantized-columns"]


def test_an_encoder(tmp_path: Path) -> None:
    """Attention's softmax, read out: it is even where query and key see nothing but the outlier, zeroed."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=17,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
    )
    model = transformers.BertModel(config, add_pooling_layer=False).requires_grad_(False).eval()
    norms = [model.embeddings.LayerNorm, *(layer.output.LayerNorm for layer in model.encoder.layer)]
    for norm in norms:
        norm.weight.data[4] = 30.0
    for layer in model.encoder.layer:
        for linear in (layer.attention.self.query, layer.attention.self.key):
            linear.weight.data.zero_()
            linear.weight.data[:, 4] = 1.0
            linear.bias.data.zero_()
    write_language_model(tmp_path, model)
    (tmp_path / "text.txt").write_text(" ".join(WORDS))
    found = analyze(tmp_path, ablate=True, draws=1)
    assert not found.causal
    assert [feature.number for feature in found.features] == [4]
    assert found.without is not None
    assert found.without.top_probability == pytest.approx(0.1)  # ten tokens, all alike
    assert found.untouched.top_probability > 0.5
    assert found.untouched.mean_cosine == pytest.approx(1.0)
    assert found.without.mean_cosine is not None
    assert found.random[0].mean_cosine is not None
    assert found.without.mean_cosine < found.random[0].mean_cosine < 1.0
    assert found.without.perplexity is None
    assert "of attention" in report.text(found)
    assert "mean cosine" in report.text(found)
    assert [seen.name for seen in found.projections[:6]] == [
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    ]


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (
            "GPT2",
            {
                "attn.c_attn": "attention input",
                "attn.c_proj": "attention output",
                "mlp.c_fc": "feed-forward input",
                "mlp.c_proj": "feed-forward hidden",
            },
        ),
        (
            "GPTNeoX",
            {
                "attention.query_key_value": "attention input",
                "attention.dense": "attention output",
                "mlp.dense_h_to_4h": "feed-forward input",
                "mlp.dense_4h_to_h": "feed-forward hidden",
            },
        ),
        (
            "Llama",
            {
                "self_attn.q_proj": "attention input",
                "self_attn.k_proj": "attention input",
                "self_attn.v_proj": "attention input",
                "self_attn.o_proj": "attention output",
                "mlp.gate_proj": "feed-forward input",
                "mlp.up_proj": "feed-forward input",
                "mlp.down_proj": "feed-forward hidden",
            },
        ),
    ],
)
def test_what_a_linear_layer_takes(config: str, names: dict[str, str]) -> None:
    sizes = {"vocab_size": 17, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {} if config == "GPT2" else {"intermediate_size": 40}
    head = "GPT2LMHeadModel" if config == "GPT2" else f"{config}ForCausalLM"
    model = getattr(transformers, head)(getattr(transformers, f"{config}Config")(**sizes))
    language.use_linear_(model)
    assert {found.name: found.takes for found in blocks.projections(model)} == names


def test_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["analyze", folder, "--text", folder / "text.txt", "--window", 10, "--threads", 1, "--ablate", "--draws", 2]
    assert cli.main([str(w) for w in [*words, "--json", tmp_path / "a.json", "--plots", tmp_path / "plots"]]) == 0
    captured = capsys.readouterr()
    assert "outlier features" in captured.err  # the progress bar
    written = json.loads((tmp_path / "a.json").read_text())
    assert [feature["number"] for feature in written["features"]] == [2, 5, 12, 7, 9]
    assert len(written["random"]) == 2
    assert [len(table["rows"]) for table in written["tables"]] == [1, 5, 24, 25, 3]
    row = next(line for line in captured.out.splitlines() if line.startswith("outlier features"))
    assert row.split()[2:7] == ["5", "4", "100.0", "100.0", "-39.0,"]
    names = sorted(path.name for path in (tmp_path / "plots").iterdir())
    assert names == ["columns.png", "emergence.png", "magnitudes.png", "tables.png", "worth.png"]
    for path in (tmp_path / "plots").iterdir():
        assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        assert path.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--threshold", "-1"], "--threshold: expected a number >= 0, got -1.0"),
        (["--min-layers", "2"], "--min-layers: expected a number in [0, 1], got 2.0"),
        (["--min-positions", "nan"], "--min-positions: expected a number in [0, 1], got nan"),
        (["--window", "100"], "window: expected 2 to 64 tokens, got 100"),
    ],
)
def test_failures_are_one_line(folder: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["analyze", str(folder), "--text", str(folder / "text.txt"), "--quiet", *more]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"octavo analyze: {message}\n"


def test_random_features_are_outlying_nowhere(tmp_path: Path) -> None:
    """What is outlying in one layer is no outlier feature where half of the layers are asked for, nor is it drawn."""
    model = known_model()
    for feature in range(WIDTH - 2):
        set_feature(model, (0, 1, 2, 3) if feature < 2 else (1,), "final_layer_norm", feature, 1.0, 20.0)
    write_language_model(tmp_path, model)
    (tmp_path / "text.txt").write_text(" ".join(WORDS))
    found = analyze(tmp_path, ablate=True, draws=3, min_layers=0.5)
    assert [feature.number for feature in found.features] == [0, 1]
    assert [ablation.features for ablation in found.random] == [[WIDTH - 2, WIDTH - 1]] * 3


def test_more_outlier_features_than_others(tmp_path: Path) -> None:
    """Fewer random features are left to draw from, or none."""
    for count, drawn in ((WIDTH - 3, 3), (WIDTH, 0)):
        model = known_model()
        for feature in range(count):
            set_feature(model, (0, 1, 2, 3), "self_attn_layer_norm", feature, 1.0, 20.0)
        write_language_model(tmp_path, model)
        (tmp_path / "text.txt").write_text(" ".join(WORDS))
        found = analyze(tmp_path, ablate=True, draws=1)
        assert [len(ablation.features) for ablation in found.random] == ([drawn] if drawn else [])
        assert f"the {count} outlier features" in report.text(found)
