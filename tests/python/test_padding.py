"""octavo.transformers.drop_padding_: encoders compute what are tokens, and the same."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
from support import TORCH

if TORCH.missing:
    pytest.skip(TORCH.missing, allow_module_level=True)
if importlib.util.find_spec("transformers") is None:
    pytest.skip("transformers is not installed", allow_module_level=True)

import torch
import transformers
from octavo.torch import Int8Linear, quantize_
from octavo.transformers import OctavoConfig, drop_padding_
from torch import Tensor, nn

FAMILIES = (
    "BertModel",
    "CamembertModel",
    "DistilBertModel",
    "ElectraModel",
    "MPNetModel",
    "RobertaModel",
    "XLMRobertaModel",
)
SIZES = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
MASK = torch.tensor([[1] * 9, [1] * 4 + [0] * 5, [0] * 6 + [1] * 3])  # padded at the end and at the front
IDS = torch.randint(5, 50, MASK.shape, generator=torch.Generator().manual_seed(0)) * MASK + (1 - MASK)


def encoder(name: str, attention: str = "sdpa") -> Any:
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    return kind(kind.config_class(**SIZES, attn_implementation=attention)).eval()


def rows_of(model: nn.Module) -> list[int]:
    """A list to which each int8 layer adds the rows that it computes."""
    rows: list[int] = []
    for layer in model.modules():
        if isinstance(layer, Int8Linear):
            layer.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[:-1].numel()))
    return rows


def hidden(model: Any, mask: Tensor | None = MASK, mode: Any = torch.no_grad) -> Tensor:
    with mode():
        found: Tensor = model(IDS, attention_mask=mask).last_hidden_state
    return found


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_alone_are_computed_and_are_the_same(name: str, attention: str) -> None:
    if (name, attention) == ("MPNetModel", "sdpa"):
        pytest.skip("Transformers' MPNet has eager attention only")
    model = quantize_(encoder(name, attention), outliers="rows", progress=False)
    rows = rows_of(model)
    found = hidden(model)
    layers = 2 * 6
    assert rows[:layers] == [16] * layers
    rows.clear()
    expected = hidden(drop_padding_(model, False))
    assert rows[:layers] == [27] * layers
    assert torch.equal(found[MASK.bool()], expected[MASK.bool()])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_input_that_is_written_to(mode: Any) -> None:
    """The tokens that one layer has computed with are not those of the next."""

    def write(_: nn.Module, args: tuple[Tensor]) -> None:
        args[0].mul_(2)

    model = quantize_(encoder("BertModel"), outliers="rows", progress=False)
    for block in model.encoder.layer:
        block.attention.self.key.register_forward_pre_hook(write, prepend=True)
    found = hidden(model, mode=mode)
    assert torch.equal(found[MASK.bool()], hidden(drop_padding_(model, False), mode=mode)[MASK.bool()])


def test_when_nothing_is_left_out() -> None:
    model = quantize_(encoder("BertModel"), outliers="rows", progress=False)
    expected = hidden(copy.deepcopy(model), torch.ones_like(MASK))
    rows = rows_of(model)
    assert torch.equal(hidden(model, None), expected)
    assert torch.equal(hidden(model, torch.ones_like(MASK)), expected)
    with pytest.raises(RuntimeError):
        model(IDS[:, :5], attention_mask=MASK)  # what has failed leaves nothing behind
    assert torch.equal(hidden(model, None), expected)
    rows.clear()
    traced = torch.jit.trace(model, (IDS, MASK), strict=False, check_trace=False)
    assert set(rows) == {27, 3}  # and the pooler's
    other = torch.ones_like(MASK)
    other[0, 7:] = 0
    with torch.no_grad():
        torch.testing.assert_close(traced(IDS, other)["last_hidden_state"], hidden(drop_padding_(model, False), other))


def test_gradients_and_other_heads() -> None:
    """A classifier over the encoder, which is trained through it."""
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES)
    model = quantize_(transformers.BertForTokenClassification(config).eval(), outliers="rows", progress=False)
    losses = []
    for on in (True, False):
        model.zero_grad()
        loss = model(IDS, attention_mask=MASK, labels=MASK.where(MASK > 0, -100)).loss
        drop_padding_(model, on)
        loss.backward()
        losses.append((loss.detach(), model.bert.embeddings.LayerNorm.weight.grad.clone()))
        drop_padding_(model, not on)
    torch.testing.assert_close(losses[0], losses[1])


@pytest.mark.parametrize("given", [None, True, False])
def test_the_option(tmp_path: Path, given: bool | None) -> None:
    encoder("BertModel").save_pretrained(tmp_path / "m")

    def computed(folder: str, **config: Any) -> int:
        more = {"quantization_config": OctavoConfig(**config)} if config else {}
        model = transformers.BertModel.from_pretrained(tmp_path / folder, **more)
        rows = rows_of(model)
        hidden(model)
        model.save_pretrained(tmp_path / "int8")
        return rows[0]

    assert computed("m", drop_padding=given) == (27 if given is False else 16)
    assert computed("int8") == (27 if given is False else 16)
    assert computed("int8", drop_padding=True) == 16
    assert computed("int8", drop_padding=False) == 27
