"""PEFT on int8 models, as on bitsandbytes' 8-bit ones: what of PEFT's own tests for those can be adapted.

The weight of an int8 layer is a tensor in an ordinary ``nn.Linear``, so PEFT needs nothing of octavo's.
"""

from __future__ import annotations

import copy
import importlib.util
import warnings
from pathlib import Path
from typing import Any

import pytest

if any(importlib.util.find_spec(name) is None for name in ("torch", "transformers", "accelerate", "peft")):
    pytest.skip("PyTorch, Transformers, accelerate and PEFT: not all are installed", allow_module_level=True)

import peft
import torch
import transformers
from model_families import family_inputs, relative_error
from octavo.torch import Int8Tensor, calibrate_, quantize_
from octavo.transformers import OctavoConfig
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from tiny_models import tiny_inputs, tiny_model

MODELS = ["LlamaForCausalLM", "BertForMaskedLM"]
TARGETS = {"LlamaForCausalLM": ["q_proj", "v_proj", "down_proj"], "BertForMaskedLM": ["query", "value", "dense"]}
FEEDFORWARD = {"LlamaForCausalLM": ["down_proj"], "BertForMaskedLM": ["dense"]}
METHODS = ["LoRA", "DoRA", "IA3"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("models")
    for name in MODELS:
        tiny_model(name).save_pretrained(root / name)
    return root


def load(folders: Path, name: str) -> Any:
    config = OctavoConfig(outliers="rows")
    return getattr(transformers, name).from_pretrained(folders / name, quantization_config=config)


def adapter(method: str, name: str, **more: Any) -> Any:
    if method == "IA3":
        return IA3Config(target_modules=TARGETS[name], feedforward_modules=FEEDFORWARD[name], **more)
    return LoraConfig(r=4, target_modules=TARGETS[name], use_dora=method == "DoRA", **more)


def logits(model: Any, of: Any = None) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**tiny_inputs(of or model)).logits
    return found


def codes(model: Any) -> list[torch.Tensor]:
    return [weight.int8_weight.codes for weight in model.parameters() if isinstance(weight, Int8Tensor)]


def train(tuned: Any, steps: int = 5) -> list[float]:
    inputs = tiny_inputs(tuned.get_base_model())
    trained = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = tuned(**inputs, labels=inputs["input_ids"]).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in trained)
        optimizer.step()
    return losses


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_train_save_load_merge(tmp_path: Path, folders: Path, name: str, method: str) -> None:
    model = load(folders, name)
    before, base = codes(model), logits(model)
    tuned = get_peft_model(model, adapter(method, name))
    assert relative_error(logits(tuned, model), base) < 1e-5  # an adapter that does nothing yet
    losses = train(tuned)
    assert losses[-1] < losses[0]
    assert all(map(torch.equal, codes(tuned), before))
    tuned.eval()
    expected = logits(tuned, model)

    tuned.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(load(folders, name), tmp_path)
    assert torch.equal(logits(again, model), expected)
    with tuned.disable_adapter():
        assert torch.equal(logits(tuned, model), base)
    if method != "DoRA":  # whose magnitudes Transformers' own way does not find, of a float model either
        other = load(folders, name)
        other.load_adapter(str(tmp_path))
        assert torch.equal(logits(other), expected)

    with pytest.warns(UserWarning, match="changed and quantized anew: its relative error is now about 0.0"):
        merged = again.merge_and_unload()
    assert len(codes(merged)) == len(before)
    assert relative_error(logits(merged), expected) < 0.05
    assert not any("lora" in key or "ia3" in key for key in merged.state_dict())
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(getattr(transformers, name).from_pretrained(tmp_path / "merged")), logits(merged))
    assert torch.equal(logits(tuned.unload()), base)


def test_merging_twice_and_unmerging(folders: Path) -> None:
    tuned = get_peft_model(load(folders, MODELS[0]), adapter("LoRA", MODELS[0], init_lora_weights=False)).eval()
    base = tuned.get_base_model()
    expected = logits(tuned, base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for safe in (False, True):
            tuned.merge_adapter(safe_merge=safe)
            assert relative_error(logits(tuned, base), expected) < 0.05
            tuned.unmerge_adapter()
            assert relative_error(logits(tuned, base), expected) < 0.05


def test_kept_columns_stay_kept(folders: Path) -> None:
    """A merge begins with the 16-bit weights of calibrated columns, and ends with some."""
    model = tiny_model(MODELS[0])
    calibrate_(model, [tiny_inputs(model)], recipe="paper", threshold=1.0, progress=False)
    quantize_(model, recipe="paper", threshold=1.0, outliers="static", progress=False)
    name = "model.layers.0.self_attn.q_proj"
    columns = model.get_submodule(name).outlier_columns.clone()
    assert len(columns)
    tuned = get_peft_model(model, adapter("LoRA", MODELS[0], init_lora_weights=False)).eval()
    layer = tuned.get_base_model().get_submodule(name)
    exact = layer.base_layer.weight.dequantize() + layer.get_delta_weight("default")
    with pytest.warns(UserWarning, match="quantized anew"):
        merged = tuned.merge_and_unload().get_submodule(name)
    assert torch.equal(merged.outlier_columns, columns)
    assert torch.equal(merged.outlier_weight, exact[:, columns.long()])


def test_all_linear(folders: Path) -> None:
    model = load(folders, MODELS[0])
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    wrapped = {key.split(".lora_A")[0] for key, _ in tuned.named_parameters() if ".lora_A." in key}
    assert len(wrapped) == 2 * 7  # all but the head


def test_quantize_after_an_adapter(folders: Path) -> None:
    """The adapter's own matrices stay."""
    tuned = get_peft_model(tiny_model(MODELS[0]), adapter("LoRA", MODELS[0], init_lora_weights=False)).eval()
    expected = logits(tuned, tuned.get_base_model())
    quantize_(tuned, progress=False)
    assert relative_error(logits(tuned, tuned.get_base_model()), expected) < 0.1
    int8 = [key for key, parameter in tuned.named_parameters() if isinstance(parameter, Int8Tensor)]
    assert len(int8) == 14 + 1  # the head
    assert not [key for key in int8 if "lora_" in key]


@pytest.mark.parametrize("method", [*METHODS, "prompt tuning"])
def test_trainer(tmp_path: Path, folders: Path, method: str) -> None:
    """With gradient checkpointing, after `prepare_model_for_kbit_training`."""
    model = peft.prepare_model_for_kbit_training(load(folders, MODELS[0]), use_gradient_checkpointing=True)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    config = (
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
        if method == "prompt tuning"
        else adapter(method, MODELS[0], task_type="CAUSAL_LM")
    )
    tuned = get_peft_model(model, config)
    before = codes(tuned)
    ids = tiny_inputs(model)["input_ids"][0]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), report_to=[], use_cpu=True, max_steps=2, save_strategy="no", disable_tqdm=True,
        learning_rate=1e-2,
    )  # fmt: skip
    data: Any = [{"input_ids": ids, "labels": ids}] * 4
    loss = transformers.Trainer(model=tuned, args=arguments, train_dataset=data).train().training_loss
    assert 0 < loss < 100
    assert all(map(torch.equal, codes(tuned), before))


def test_the_trainer_refuses_without_an_adapter(tmp_path: Path, folders: Path) -> None:
    """Nothing of an int8 weight would be trained."""
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    with pytest.raises(ValueError, match="quantized"):
        transformers.Trainer(model=load(folders, MODELS[0]), args=arguments)


def test_gradients_are_those_of_the_dequantized_model(folders: Path) -> None:
    """Of the adapter, with weight-only products: the same up to rounding."""
    model = transformers.LlamaForCausalLM.from_pretrained(
        folders / MODELS[0], quantization_config=OctavoConfig(path="weight_only")
    )
    tuned = get_peft_model(model, adapter("LoRA", MODELS[0], init_lora_weights=False))
    plain = copy.deepcopy(tuned)
    plain.get_base_model().dequantize()
    inputs = family_inputs(model)
    for each in (tuned, plain):
        each(**inputs, labels=inputs["input_ids"]).loss.backward()
    for (name, own), other in zip(tuned.named_parameters(), plain.parameters(), strict=True):
        if own.grad is not None and "lora" in name:
            assert relative_error(own.grad, other.grad) < 1e-3, name
