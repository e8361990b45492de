"""octavo plan: parameters from configs, and the paper's Table 2."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from octavo import cli
from octavo.plan import Plan, plan

pytest.importorskip("transformers", reason="transformers is not installed")

GIB = 2**30


def opt(hidden: int, layers: int) -> dict[str, Any]:
    return {
        "model_type": "opt",
        "hidden_size": hidden,
        "ffn_dim": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, hidden // 128),
        "vocab_size": 50272,
        "max_position_embeddings": 2048,
    }


# Dimensions as published with the models.
MODELS: dict[str, dict[str, Any]] = {
    "OPT-6.7B": opt(4096, 32),
    "OPT-13B": opt(5120, 40),
    "OPT-30B": opt(7168, 48),
    "OPT-66B": opt(9216, 64),
    "OPT-175B": opt(12288, 96),
    "BLOOM": {"model_type": "bloom", "n_embed": 14336, "n_layer": 70, "num_attention_heads": 112, "vocab_size": 250880},
    "GPT-J-6B": {
        "model_type": "gptj",
        "n_embd": 4096,
        "n_layer": 28,
        "n_head": 16,
        "n_inner": None,
        "vocab_size": 50400,
    },
    "GPT-2 XL": {"model_type": "gpt2", "n_embd": 1600, "n_layer": 48, "n_head": 25, "vocab_size": 50257},
    "T5-3B": {"model_type": "t5", "d_model": 1024, "d_kv": 128, "d_ff": 16384, "num_layers": 24, "num_heads": 32},
    "T5-11B": {"model_type": "t5", "d_model": 1024, "d_kv": 128, "d_ff": 65536, "num_layers": 24, "num_heads": 128},
    "GPT-NeoX-20B": {
        **{"model_type": "gpt_neox", "hidden_size": 6144, "intermediate_size": 24576, "num_hidden_layers": 44},
        **{"num_attention_heads": 64, "vocab_size": 50432},
    },
    "Llama-2-7B": {
        **{"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32},
        **{"num_attention_heads": 32, "vocab_size": 32000},
    },
    "Llama-3-8B": {
        **{"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
        **{"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256},
    },
    "Mistral-7B": {
        **{"model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
        **{"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000},
    },
    "Qwen2-7B": {
        **{"model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28},
        **{"num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064},
    },
}
for _t5 in ("T5-3B", "T5-11B"):
    MODELS[_t5]["vocab_size"] = 32128

PARAMETERS = {
    "BLOOM": 176_247_271_424,
    "GPT-J-6B": 6_050_882_784,
    "GPT-2 XL": 1_557_611_200,
    "T5-11B": 11_307_321_344,
    "Llama-2-7B": 6_738_415_616,
    "Llama-3-8B": 8_030_261_248,
    "Mistral-7B": 7_241_732_096,
    "Qwen2-7B": 7_615_616_512,
    "GPT-NeoX-20B": 20_554_567_680,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_the_published_ones(name: str) -> None:
    assert plan(MODELS[name], gpu_memory=GIB).parameters == PARAMETERS[name]


@pytest.mark.parametrize("name", ["OPT-13B", "OPT-175B"])
def test_opt_is_named_after_its_parameters(name: str) -> None:
    billions = float(name[4:-1])
    assert plan(MODELS[name], gpu_memory=GIB).parameters / 1e9 == pytest.approx(billions, rel=0.02)


def test_experts_count_as_from_pretrained_makes_them() -> None:
    mixtral = {"model_type": "mixtral", "vocab_size": 32000, "num_local_experts": 8, "num_key_value_heads": 8}
    mixtral |= {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    found = plan(mixtral, gpu_memory=80 * GIB, gpus=2)
    assert found.parameters == 46_702_792_704  # as published with Mixtral-8x7B
    assert found.int8.cache == 32 * 4 * 1024 * 2048
    # Experts are int8, however Transformers keeps them; embedding, head, routers and norms are not.
    rows = 32 * (4096 + 1024 + 1024 + 4096 + 8 * (14336 + 14336 + 4096))
    others = 2 * 32000 * 4096 + 32 * (8 * 4096 + 2 * 4096) + 4096
    assert found.int8.weights == found.parameters - others + 4 * rows + 2 * others
    assert found.stacked_experts == 32 * 8 * 2
    assert found.as_text().splitlines()[-1].startswith("512 weights of experts count as int8, as from_pretrained")
    # gpt-oss keeps [experts, in, out].
    oss = {
        "model_type": "gpt_oss",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "vocab_size": 10,
    }
    oss |= {"num_local_experts": 4, "head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
    found = plan(oss, gpu_memory=GIB)
    elements = 4 * (192 * 64 + 64 * 96) + 64 * 16 * (4 + 2 + 2 + 4)
    rows = 4 * (192 + 64) + 16 * (4 + 2 + 2) + 64
    assert found.int8.weights == elements + 4 * rows + 2 * (found.parameters - elements)


def test_caches() -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 99}
    bert = {"model_type": "bert", "architectures": ["BertModel"], "num_attention_heads": 4, **sizes}
    assert plan(bert, gpu_memory=GIB).int8.cache == 0  # it does not generate
    assert plan({"model_type": "mamba", "state_size": 8, **sizes}, gpu_memory=GIB).int8.cache == 0  # no attention
    # T5's decoder caches its own tokens, and as many of the encoder's.
    assert plan(MODELS["T5-3B"], gpu_memory=GIB).int8.cache == 24 * 2 * 4 * 32 * 128 * 2048
    caches = [plan(MODELS[name], gpu_memory=GIB).int8.cache for name in ("Llama-2-7B", "Llama-3-8B")]
    assert caches[0] == 4 * caches[1] == 32 * 4 * 4096 * 2048  # grouped queries cache less


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "expected a model_type, got none"),
        ({"model_type": ["opt"]}, "expected a model_type, got none"),
        ({"model_type": "tiny"}, "model_type: expected one that Transformers has, got 'tiny'"),
        ({"model_type": "llama", "hidden_size": "64"}, "expected sizes that make a model, got .*hidden_size"),
        ({**MODELS["Llama-2-7B"], "num_attention_heads": 0}, "expected sizes that make a model"),
    ],
)
def test_wrong_configs(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s)config: {message}"):
        plan(config, gpu_memory=GIB)


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(RuntimeError, match=r"needs PyTorch and Transformers: pip install"):
        plan({"model_type": "bert"}, gpu_memory=GIB)


# --- the paper's Table 2 ----------------------------------------------------------------------------------------------

# (GPUs, GiB of each, runs in 8 bit, runs in 16 bit, does not run in 8 bit, does not run in 16 bit). The first two are
# the table's "largest model that can be run"; the others are the next larger ones here. Of T0/T5-11B, T5's dimensions
# are taken (T0's differ in the gate only); "GPT-2 1.3B" is no published size, the larger GPT-2 XL stands in for it.
# In 16 bit GPT-J-6B takes 11.3 of those 12 GiB: by this arithmetic it fits, narrowly; the table does not list it there.
TABLE_2: list[tuple[int, int, list[str], list[str], list[str], list[str]]] = [
    (8, 80, ["OPT-175B", "BLOOM"], ["OPT-175B", "BLOOM"], [], []),
    (8, 40, ["OPT-175B", "BLOOM"], ["OPT-66B"], [], ["OPT-175B", "BLOOM"]),
    (8, 24, ["OPT-175B", "BLOOM"], ["OPT-66B"], [], ["OPT-175B", "BLOOM"]),
    (4, 24, ["OPT-66B"], ["OPT-30B"], ["OPT-175B", "BLOOM"], ["OPT-66B"]),
    (1, 15, ["OPT-13B"], ["GPT-J-6B"], ["OPT-30B"], ["OPT-13B"]),
    (1, 12, ["T5-11B"], ["GPT-2 XL"], ["OPT-13B"], ["T5-11B"]),
]


@pytest.mark.parametrize(("gpus", "gib", "int8", "bits16", "not_int8", "not_bits16"), TABLE_2)
def test_table_2(
    gpus: int, gib: int, int8: list[str], bits16: list[str], not_int8: list[str], not_bits16: list[str]
) -> None:
    def found(name: str) -> Plan:
        # The table does not say how much context; T5-11B's cache, of 128 heads, leaves room for few hundred tokens.
        return plan(MODELS[name], gpu_memory=gib * GIB, gpus=gpus, context=256)

    assert [name for name in int8 if not found(name).int8.fits] == []
    assert [name for name in bits16 if not found(name).bits16.fits] == []
    assert [name for name in not_int8 if found(name).int8.fits] == []
    assert [name for name in not_bits16 if found(name).bits16.fits] == []


def test_bloom_takes_half() -> None:
    """The paper reports a reduction by 1.96 for BLOOM-176B (its 16-bit embedding stays)."""
    found = plan(MODELS["BLOOM"], gpu_memory=24 * GIB, gpus=8)
    assert f"{found.ratio:.2f}" == "1.96"
    assert found.bits16.weights == 2 * PARAMETERS["BLOOM"]


# --- arithmetic -------------------------------------------------------------------------------------------------------


def test_by_hand() -> None:
    """One layer of width 2, a vocabulary of 5."""
    config = {**opt(2, 1), "ffn_dim": 8, "vocab_size": 5}
    config["max_position_embeddings"] = 4
    found = plan(config, gpu_memory=1000, gpus=1, batch=3, context=4, reserve=0)
    linear = 4 * 2 * 2 + 2 * 8 * 2
    rows = 4 * 2 + 8 + 2
    others = 5 * 2 + 6 * 2 + rows + 2 * 2 * 2 + 2 * 2  # embeddings, biases, norms
    assert found.parameters == linear + others
    assert found.int8.weights == linear + 4 * rows + 2 * others
    assert found.bits16.weights == 2 * (linear + others)
    assert found.int8.cache == found.bits16.cache == 2 * 2 * 2 * 3 * 4  # key and value, width 2, 2 bytes, 12 tokens
    assert found.int8.total == found.int8.weights + found.int8.cache


def test_layers_are_not_split() -> None:
    """Three GPUs that would hold two and a half layers each hold two."""
    config = {**opt(1024, 5), "vocab_size": 8, "max_position_embeddings": 8}
    layer = 12 * 1024**2 * 2
    for gpus, memory, fits in ((2, 2.7, False), (3, 2.7, True), (3, 1.9, False), (5, 1.9, True), (100, 0.9, False)):
        found = plan(config, gpu_memory=int(memory * layer), gpus=gpus, context=1, reserve=0)
        assert found.bits16.fits == fits, (gpus, memory)
    assert plan(config, gpu_memory=int(0.9 * layer), context=1, reserve=0).bits16.gpus_needed is None
    assert plan(config, gpu_memory=int(2.7 * layer), context=1, reserve=0).bits16.gpus_needed == 3
    assert plan(config, gpu_memory=int(2.7 * layer), context=1, reserve=int(1.0 * layer)).bits16.gpus_needed == 5


# --- the command ------------------------------------------------------------------------------------------------------


class TestCommand:
    def config(self, tmp_path: Path, name: str) -> str:
        (tmp_path / "config.json").write_text(json.dumps(MODELS[name]))
        return str(tmp_path)

    def test_fits(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        folder = self.config(tmp_path, "BLOOM")
        assert cli.main(["plan", folder, "--gpu-memory", "24GB", "--gpus", "8", "--context", "1024"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert "176.25 billion parameters, on 8 x 24.00 GiB" in lines[0]
        assert lines[2].split()[0] == "int8"
        assert lines[2].split()[-2:] == ["yes", "8"]
        assert lines[3].split()[-2] == "no"
        assert lines[4] == "weights in 16 bit take 1.96 times as much"

    def test_does_not_fit(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = ["plan", self.config(tmp_path, "OPT-66B") + "/config.json", "--gpu-memory", "24GB", "--json"]
        assert cli.main(arguments) == 3
        found = json.loads(capsys.readouterr().out)
        assert (found["int8"]["fits"], found["int8"]["gpus_needed"]) == (False, 3)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (None, "expected a model's config.json, got no such file"),
            ("{", "expected JSON"),
            ("[]", "expected a JSON object, got list"),
            ("{}", "config: expected a model_type, got none"),
            ('{"model_type": "nothing"}', "model_type: expected one that Transformers has, got 'nothing'"),
            ("[" * 100_000, "expected JSON"),
        ],
    )
    def test_wrong_configs_are_one_line(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, message: str
    ) -> None:
        if content is not None:
            (tmp_path / "config.json").write_text(content)
        assert cli.main(["plan", str(tmp_path), "--gpu-memory", "24GB"]) == 1
        error = capsys.readouterr().err
        assert error.startswith("octavo plan: ")
        assert message in error
        assert error.count("\n") == 1

    @pytest.mark.parametrize(
        "arguments",
        [[], ["--gpu-memory", "much"], ["--gpu-memory", "24"], ["--gpu-memory", "1GB", "--gpus", "0"]],
    )
    def test_wrong_arguments(self, tmp_path: Path, arguments: list[str]) -> None:
        with pytest.raises(SystemExit) as exit_info:
            cli.main(["plan", str(tmp_path), *arguments])
        assert exit_info.value.code == 2
