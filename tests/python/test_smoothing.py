"""octavo.torch.smooth_: SmoothQuant. The function stays, the equation holds, and what cannot be smoothed is left."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from support import TORCH

if TORCH.missing:
    pytest.skip(TORCH.missing, allow_module_level=True)

import octavo.torch
import torch
from tiny_models import FAMILIES, tiny_inputs, tiny_model
from torch import Tensor, nn

# Normalizations of two layers whose output only linear layers take. GPT-J has one for attention and feed-forward;
# Mixtral's second goes into a router and stacked experts; T5's decoder has three; BERT's residual takes all but the
# last, which goes into the head's transform.
FOLDED = dict.fromkeys(FAMILIES, 4) | {
    "GPTJForCausalLM": 2,
    "MixtralForCausalLM": 2,
    "T5ForConditionalGeneration": 10,
    "BertForMaskedLM": 1,
}
# Relative error of the logits. LayerNorms compute in the model's dtype, RMSNorms in float32 always; float32 sums of
# 32 to 96 products are off by some 1e-7 each, and layers of random weights magnify that.
LOGITS = {torch.float32: 5e-5, torch.float64: 1e-11}
LOGITS_OF_RMS_NORMS = 5e-5


@pytest.fixture(autouse=True)
def _needs_transformers(request: pytest.FixtureRequest) -> None:
    if request.cls is TestFamilies:
        pytest.importorskip("transformers", reason="the models are those of transformers, which is not installed")


def quietly(model: nn.Module, batches: Any, **options: Any) -> dict[str, Tensor]:
    return octavo.torch.smooth_(model, batches, progress=False, **options)


class Block(nn.Module):
    """norm -> first, second; further uses of the norm's output as wanted."""

    def __init__(self, norm: nn.Module, after: Callable[[Any, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.norm, self.first, self.second = norm, nn.Linear(4, 3), nn.Linear(4, 2, bias=False)
        self.after = after

    def forward(self, x: Tensor) -> Any:
        z = self.norm(x)
        found = torch.cat([self.first(z), self.second(z.view(-1, 4)).view(*x.shape[:-1], 2)], -1)
        return found if self.after is None else (found, self.after(self, z))


def block(after: Callable[[Any, Tensor], Tensor] | None = None, norm: nn.Module | None = None) -> Block:
    torch.manual_seed(0)
    made = Block(norm or nn.LayerNorm(4), after).double().requires_grad_(False)
    for parameter in made.norm.parameters():
        parameter.add_(torch.rand_like(parameter))
    return made


def inputs(count: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 3, 4, generator=generator, dtype=torch.float64) for _ in range(count)]


class TestFamilies:
    @pytest.mark.parametrize("dtype", LOGITS, ids=str)
    @pytest.mark.parametrize("name", FAMILIES)
    def test_the_function_stays(self, name: str, dtype: torch.dtype) -> None:
        model = tiny_model(name).to(dtype)
        given = tiny_inputs(model, seed=7)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        expected = model(**given).logits
        found = quietly(model, [tiny_inputs(model, seed=seed) for seed in range(3)])
        assert len(found) == FOLDED[name]
        logits = model(**given).logits
        error = float((logits - expected).norm() / expected.norm())
        rms = any("RMSNorm" in type(m).__name__ or "T5LayerNorm" in type(m).__name__ for m in model.modules())
        assert error < (LOGITS_OF_RMS_NORMS if rms else LOGITS[dtype])
        # The same modules and parameters, and those that it says, changed.
        after = model.state_dict()
        assert before.keys() == after.keys()
        changed = {key.rpartition(".")[0] for key in before if not torch.equal(before[key], after[key])}
        assert set(found) <= changed
        assert all(float(scale.max() / scale.min()) > 1.2 for scale in found.values())
        assert all(value.dtype == dtype for value in after.values() if value.is_floating_point())

    def test_a_model_normalized_after_each_block(self) -> None:
        model = tiny_model("BertForMaskedLM").bert
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(ValueError, match=r"got none in BertModel \(.*also goes into aten.add") as caught:
            quietly(model, [tiny_inputs(model)])
        assert str(caught.value).count("\n") == 0
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    def test_divided_in_front_of_the_layers_where_the_residual_takes_it_too(self) -> None:
        model = tiny_model("BertForMaskedLM").bert.double()
        given = tiny_inputs(model, seed=7)
        expected = model(**given).last_hidden_state
        norms = {key: value.clone() for key, value in model.state_dict().items() if "LayerNorm" in key}
        found = quietly(model, [tiny_inputs(model)], insert=True)
        assert len(found) == 4  # of the embeddings, two of the first layer, the first of the second
        torch.testing.assert_close(model(**given).last_hidden_state, expected, atol=0, rtol=1e-10)
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in norms.items())
        query = model.encoder.layer[0].attention.self.query
        assert isinstance(query, nn.Sequential)
        octavo.torch.quantize_(model.float(), progress=False)
        assert isinstance(query[1], octavo.torch.Int8Linear)

    def test_post_norm_opt_and_bloom_with_the_residual_behind_the_norm_are_left(self) -> None:
        opt = tiny_model("OPTForCausalLM", do_layer_norm_before=False)
        with pytest.raises(ValueError, match="also goes into"):
            quietly(opt, [tiny_inputs(opt)])
        bloom = tiny_model("BloomForCausalLM", apply_residual_connection_post_layernorm=True)
        with pytest.raises(ValueError, match="also goes into"):
            quietly(bloom, [tiny_inputs(bloom)])

    def test_a_norm_before_the_head_is_left(self) -> None:
        """Also where the head is tied to the embedding, and where it is not named lm_head."""
        for name in ("OPTForCausalLM", "GPTNeoXForCausalLM"):
            model = tiny_model(name)
            found = quietly(model, [tiny_inputs(model)], skip=["*embed_out", "*lm_head"])
            assert not any("final_layer_norm" in key and "layers" not in key for key in found)

    def test_what_it_is_for(self) -> None:
        """An outlier feature costs vector-wise int8 much less when smoothed."""
        model = tiny_model("LlamaForCausalLM")
        for layer in model.model.layers:
            layer.input_layernorm.weight[3] = layer.post_attention_layernorm.weight[3] = 60.0
            for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj, layer.mlp.up_proj):
                linear.weight[:, 3] /= 60
            layer.mlp.gate_proj.weight[:, 3] /= 60
        given = tiny_inputs(model, seed=7)
        expected = model(**given).logits
        smoothed = copy.deepcopy(model)
        quietly(smoothed, [tiny_inputs(model, seed=seed) for seed in range(3)])
        errors = []
        for one in (model, smoothed):
            octavo.torch.quantize_(one, outliers="none", path="int8", progress=False)
            errors.append(float((one(**given).logits - expected).norm() / expected.norm()))
        assert errors[1] < errors[0] / 3


class TestEquation:
    def test_by_hand(self) -> None:
        model = block()
        x = inputs(2)
        expected = model(x[0])
        z = torch.cat([model.norm(batch).reshape(-1, 4) for batch in x]).abs().amax(0)
        w = torch.cat([model.first.weight, model.second.weight]).abs().amax(0)
        first, gain, bias = model.first.weight.clone(), model.norm.weight.clone(), model.norm.bias.clone()
        scale = quietly(model, x, alpha=0.7)["norm"]
        torch.testing.assert_close(scale, (z**0.7 / w**0.3).float())
        exact = z.float().double() ** 0.7 / w**0.3
        torch.testing.assert_close(model.first.weight, first * exact)
        torch.testing.assert_close(model.norm.weight, gain / exact)
        torch.testing.assert_close(model.norm.bias, bias / exact)
        torch.testing.assert_close(model(x[0]), expected)

    @pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
    def test_alpha_shares_the_difficulty(self, alpha: float) -> None:
        """At 0 the weights' columns have the magnitude 1, at 1 the inputs'; at 1/2 both have the same."""
        model, x = block(), inputs()
        quietly(model, x, alpha=alpha)
        z = model.norm(x[0]).reshape(-1, 4).abs().amax(0)
        w = torch.cat([model.first.weight, model.second.weight]).abs().amax(0)
        expected = {0.0: (w, torch.ones(4)), 0.5: (w, z), 1.0: (z, torch.ones(4))}[alpha]
        torch.testing.assert_close(expected[0].float(), expected[1].float())

    def test_a_feature_that_is_zero_is_left(self) -> None:
        model, x = block(), inputs()
        model.norm.weight[1] = model.norm.bias[1] = 0
        model.first.weight[:, 2] = model.second.weight[:, 2] = 0
        scale = quietly(model, x)["norm"]
        assert scale[1] == scale[2] == 1
        assert (scale[[0, 3]] != 1).all()

    def test_the_model_s_tensors_are_not_written_to(self) -> None:
        model = block()
        held = dict(model.named_parameters())
        before = {name: parameter.clone() for name, parameter in held.items()}
        quietly(model, inputs())
        assert all(torch.equal(parameter, before[name]) for name, parameter in held.items())
        assert not model.first.weight.requires_grad

    def test_modes_and_hooks_are_as_they_were(self) -> None:
        model = block().train()
        model.first.eval()
        quietly(model, inputs())
        assert (model.training, model.first.training) == (True, False)
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())

    def test_recorded_columns_are_forgotten(self) -> None:
        """They were those of what the layer took before."""
        model, x = block(), inputs()
        octavo.torch.calibrate_(model, x, threshold=0.5, progress=False)
        quietly(model, x)
        with pytest.raises(ValueError, match="expected a calibrated layer"):
            octavo.torch.quantize_(model.float(), outliers="static", progress=False)


class TestUses:
    """What else the output goes into decides."""

    @pytest.mark.parametrize(
        ("after", "use"),
        [
            (lambda self, z: z + 1, "aten.add"),
            (lambda self, z: z.view(-1, 4).add_(1), "aten.add_"),
            (lambda self, z: z, "the model's result"),
            (lambda self, z: z[0].transpose(0, 1), "the model's result"),
            (lambda self, z: nn.functional.linear(z, self.first.weight), "aten"),
        ],
    )
    def test_elsewhere(self, after: Callable[[Any, Tensor], Tensor], use: str) -> None:
        with pytest.raises(ValueError, match=f"norm: its output also goes into .*{use}"):
            quietly(block(after), inputs())

    def test_a_part_of_the_features(self) -> None:
        model = block(lambda self, z: self.third(z[..., :2]))
        model.third = nn.Linear(2, 2).double()
        with pytest.raises(ValueError, match="a part of the input of third"):
            quietly(model, inputs())

    def test_a_layer_with_another_input(self) -> None:
        model = block(lambda self, z: self.first(torch.ones(1, 4, dtype=torch.float64)))
        for options in ({}, {"insert": True}):
            with pytest.raises(ValueError, match="norm: first takes other inputs, too"):
                quietly(model, inputs(), **options)

    def test_shared_parameters(self) -> None:
        model = block()
        model.other = nn.Linear(4, 3).double()
        model.other.weight = model.first.weight
        with pytest.raises(ValueError, match="the weight of first is shared"):
            quietly(model, inputs())
        model = block()
        model.other = nn.LayerNorm(4).double()
        model.other.bias = model.norm.bias
        with pytest.raises(ValueError, match="its parameters are shared"):
            quietly(model, inputs())

    def test_a_norm_without_gain_and_something_else_by_that_name(self) -> None:
        class NoNorm(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.ones(4))

            def forward(self, x: Tensor) -> Tensor:
                return x * self.weight.square()

        for norm in (nn.LayerNorm(4, elementwise_affine=False), NoNorm()):
            with pytest.raises(ValueError, match="is no LayerNorm or RMSNorm with a gain"):
                quietly(block(norm=norm), inputs())
        x = inputs()
        model = block(norm=nn.LayerNorm(4, elementwise_affine=False))
        expected = model(x[0])
        with pytest.raises(ValueError, match="is no LayerNorm"):
            quietly(model, x)
        model.norm = nn.RMSNorm(4, dtype=torch.float64).requires_grad_(False)
        expected = model(x[0])
        assert list(quietly(model, x)) == ["norm"]
        torch.testing.assert_close(model(x[0]), expected)

    def test_a_skipped_layer_takes_it_too(self) -> None:
        with pytest.raises(ValueError, match="norm: its output also goes into"):
            quietly(block(), inputs(), skip=["second"])


class TestPairs:
    def test_given(self) -> None:
        model, x = nn.ModuleDict({"a": block(), "b": block()}), inputs()
        model.forward = lambda x: (model["a"](x), model["b"](x))  # type: ignore[assignment]
        assert set(quietly(copy.deepcopy(model["a"]), x, pairs={"norm": ["second", "first"]})) == {"norm"}
        assert set(quietly(copy.deepcopy(model["a"]), x)) == {"norm"}

    @pytest.mark.parametrize(
        ("pairs", "message"),
        [
            ({"norm": ["first"]}, r"norm: expected the layers that take its output, \['first', 'second'\], got"),
            ({"norms": ["first"]}, "expected qualified names of the model's modules, got 'norms'"),
            ({"norm": ["first", "third"]}, "got 'third'"),
            ({"first": ["second"]}, "first cannot be smoothed: its output goes into no linear layer but into aten.cat"),
        ],
    )
    def test_wrong(self, pairs: dict[str, list[str]], message: str) -> None:
        model = block()
        before = model.first.weight
        with pytest.raises(ValueError, match=message):
            quietly(model, inputs(), pairs=pairs)
        assert model.first.weight is before


class TestErrors:
    def test_wrong_arguments(self) -> None:
        for options, message in (
            ({"alpha": 1.5}, r"alpha: expected a number in \[0, 1\], got 1.5"),
            ({"batches": []}, "batches: expected at least one"),
            ({"skip": ["*"]}, "model: expected linear layers, got none"),
        ):
            with pytest.raises(ValueError, match=message):
                quietly(block(), **{"batches": inputs(), **options})
        converted = octavo.torch.quantize_(block().float(), progress=False)
        with pytest.raises(ValueError, match="expected the 16/32-bit model, got one that quantize_ has converted"):
            quietly(converted, inputs())

    def test_values_that_are_not_finite(self) -> None:
        x = inputs()
        x[0][0, 0, 0] = torch.nan
        with pytest.raises(ValueError, match="norm: expected finite values, got NaN or Inf in its output"):
            quietly(block(), x)
        model = block()
        model.second.weight[0, 0] = torch.inf
        with pytest.raises(ValueError, match="first, second: expected finite weights"):
            quietly(model, inputs())

    def test_overflow_changes_nothing(self) -> None:
        model = block().half()
        model.norm.weight[2] = 6e4
        model.first.weight[0, 2] = 6e4
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=r"weight: expected values that torch.float16 holds, got larger ones"):
            quietly(model, [inputs()[0].half()], alpha=1.0)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
