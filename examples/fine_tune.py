"""LoRA over an int8 model reaches the loss of LoRA over the float32 one: a small Llama, three seeds.

Run: python examples/fine_tune.py
"""

import copy
import statistics

import octavo.torch
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.nn import functional

WORDS, LENGTH, SEEDS = 16, 24, (0, 1, 2)
torch.set_num_threads(1)


def texts(count: int, step: int, seed: int) -> torch.Tensor:
    """Sequences that count by `step`, with every eighth word at random: something to learn, and something not to."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, WORDS, (count, 1), generator=generator)
    words = (starts + step * torch.arange(LENGTH)) % WORDS
    noise = torch.rand(count, LENGTH, generator=generator) < 1 / 8
    return torch.where(noise, torch.randint(0, WORDS, (count, LENGTH), generator=generator), words)


def loss(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each word after the first."""
    logits = model(input_ids=ids).logits
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def train(model: torch.nn.Module, step: int, steps: int, rate: float, seed: int) -> float:
    """Train on texts of one step; returns the loss on others."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate)
    for i in range(steps):
        optimizer.zero_grad()
        loss(model, texts(16, step, 1000 * seed + i)).backward()
        optimizer.step()
    with torch.no_grad():
        return loss(model.eval(), texts(128, step, -1)).item()


torch.manual_seed(0)
config = transformers.LlamaConfig(
    vocab_size=WORDS, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4
)
base = transformers.LlamaForCausalLM(config)
before = train(base, step=3, steps=100, rate=3e-3, seed=9)
int8 = octavo.torch.quantize_(copy.deepcopy(base), outliers="rows", progress=False)
with torch.no_grad():
    untuned = loss(base, texts(128, 5, -1)).item()
print(f"trained on steps of 3: loss {before:.3f}; on steps of 5 it has {untuned:.3f}. LoRA on those:")

found: dict[str, list[float]] = {"float32": [], "int8": []}
for seed in SEEDS:
    for name, model in (("float32", base), ("int8", int8)):
        torch.manual_seed(seed)
        tuned = get_peft_model(copy.deepcopy(model), LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
        found[name].append(train(tuned, step=5, steps=100, rate=3e-3, seed=seed))
    print(f"seed {seed}: float32 {found['float32'][-1]:.4f}, int8 {found['int8'][-1]:.4f}", flush=True)

means = {name: statistics.mean(losses) for name, losses in found.items()}
spread = statistics.stdev(found["float32"])
print(f"mean: float32 {means['float32']:.4f}, int8 {means['int8']:.4f}; float32 spreads by {spread:.4f} over the seeds")
assert means["int8"] < 0.7 * untuned
assert abs(means["int8"] - means["float32"]) <= max(2 * spread, 0.01)
