"""Checkpoints: 16/32-bit models in, int8 models out, in bounded memory.

>>> octavo.checkpoint.quantize("opt-6.7b", "opt-6.7b-int8", jobs=2)      # doctest: +SKIP
>>> weights = octavo.checkpoint.load("opt-6.7b-int8")                    # doctest: +SKIP

On the command line: ``octavo quantize``, ``octavo inspect``. Needs NumPy and safetensors; PyTorch for tensors of it and
for files that ``torch.save`` wrote; Transformers, where it is there, says which layers a model has.

**Layout.** That of Hugging Face: ``model.safetensors``, or shards with ``model.safetensors.index.json``, one for each
shard of the source; ``config.json`` with a ``quantization_config`` added (the options, the layers that stayed; its
``quant_method`` is null, so that Transformers without octavo refuses the model); all other files that are no weights
copied, and the modules of a sentence transformer whole. diffusers' names of files stay.

**Tensors.** An int8 weight ``<name>`` ("model.layers.0.mlp.up_proj.weight") is no tensor of that name, but:

| tensor | dtype and shape | |
|---|---|---|
| ``<name>.codes`` | int8 ``[n, k]`` | row by row: out by in features, also where GPT-2 has ``[in, out]`` |
| ``.scale`` | float32 ``[n]`` | ``weight ~ (codes + zeropoint) * scale``; ``[1]`` for granularity "tensor" and "row" |
| ``.zeropoint`` | float32, as scale | integers; scheme "zeropoint" only |
| ``.outlier_columns`` | int32 ``[r]`` | ascending; calibrated layers only |
| ``.outlier_weight`` | ``[n, r]`` | original values of those columns, in the source's dtype |
| ``.options`` | uint8 | JSON: ``format_version`` 2, ``dtype`` of the source, and `octavo.Options` |

Everything else (biases, embeddings, norms, the output head) is copied as it was. Threshold, outliers and path are what
a layer computes with unless whoever loads it says otherwise. Version 1 is read, too: int8 ``<layer>.weight`` beside
``<layer>.scale``, ..., ``<layer>._extra_state``.

**Metadata** of each file, strings: ``format`` "pt"; ``octavo.format_version`` "2"; and as JSON ``octavo.crc32``, by
tensor the CRC-32 of its bytes as eight hexadecimal digits (it finds accidents, not forgeries); ``octavo.tied``, by name
that is not in the file the name of the tensor it shares; ``octavo.kept``, by linear layer that stayed why.
``octavo.made_of`` is a hash of what the file was made of.

**bitsandbytes.** ``format="bitsandbytes"`` writes, and reading understands, its ``Linear8bitLt``: int8
``<layer>.weight``, float32 ``<layer>.SCB`` ``[n]`` (the absmax of a row, 127 times the scale), uint8
``<layer>.weight_format`` 0.

**Memory.** A tensor is read once. All that are converted at a time stay within ``memory`` (default: the float32 size of
the largest one, and at least the largest weight as it is stored) and 10 % of it. A handful of files is open at a
time.

**Interruptions.** All is written in ``<output>.partial``. A second run reads what the finished files were made of,
compares it with their hash, and their data with the checksums, and makes the others: the same bytes as without the
interruption. The folder gets its name by a rename when everything is on the disk. A model that changes while it is read
is an error.

**Trust.** A checkpoint brings no code: none is ever run. Links that lead out of the model's folder are not copied.
"""

from octavo.checkpoint.calibrate import calibrate
from octavo.checkpoint.convert import Report, quantize
from octavo.checkpoint.dial import Choice, choose_options
from octavo.checkpoint.reader import Checkpoint, load
from octavo.checkpoint.summary import LayerSummary, Summary, inspect

__all__ = [
    "Checkpoint",
    "Choice",
    "LayerSummary",
    "Report",
    "Summary",
    "calibrate",
    "choose_options",
    "inspect",
    "load",
    "quantize",
]
