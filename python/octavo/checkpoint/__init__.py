"""Checkpoints: 16/32-bit models in, int8 models out, in bounded memory.

>>> octavo.checkpoint.quantize("opt-6.7b", "opt-6.7b-int8", jobs=2)      # doctest: +SKIP
>>> weights = octavo.checkpoint.load("opt-6.7b-int8")                    # doctest: +SKIP

On the command line: ``octavo quantize``, ``octavo inspect``. Needs NumPy; PyTorch only to get tensors of it.

**Layout.** That of Hugging Face: ``model.safetensors``, or shards with ``model.safetensors.index.json``, one for each
shard of the source; ``config.json`` with a ``quantization_config`` added (the options, the layers that were left; its
``quant_method`` is null, so that Transformers without `octavo.transformers` refuses the model instead of taking codes
for weights); all other files that are no weights copied.

**Tensors.** An int8 layer has exactly the state dict of `octavo.torch.Int8Linear`:

| tensor | dtype and shape | |
|---|---|---|
| ``<layer>.weight`` | int8 ``[n, k]`` | codes, row by row: out by in features, also where GPT-2 has ``[in, out]`` |
| ``.scale`` | float32 ``[n]`` | ``weight ~ (codes + zeropoint) * scale``; ``[1]`` for granularity "tensor" and "row" |
| ``.zeropoint`` | float32, as scale | scheme "zeropoint" only |
| ``.outlier_columns`` | int32 ``[r]`` | ascending; calibrated layers only |
| ``.outlier_weight`` | ``[n, r]`` | original values of those columns, in the source's dtype |
| ``._extra_state`` | uint8 | JSON: ``format_version`` 1, and the options that the metadata has |
| ``.bias`` | as in the source | where the layer has one |

Everything else (embeddings, norms, the output head) is copied as it was.

**Metadata** of each file, all strings: ``format`` "pt"; ``octavo.format_version`` "1"; ``octavo.scheme``,
``.granularity``, ``.threshold``, ``.outliers``, ``.path``; ``octavo.crc32``, JSON, by tensor the CRC-32 of its bytes as
eight hexadecimal digits (it finds accidents, not forgeries); ``octavo.tied``, JSON, where the source had one tensor
under several names: by name that is not in the file the name of the tensor it shares.

**bitsandbytes.** ``format="bitsandbytes"`` writes, and reading understands, its ``Linear8bitLt``: int8
``<layer>.weight``, float32 ``<layer>.SCB`` ``[n]`` (the absmax of a row, 127 times the scale), uint8
``<layer>.weight_format`` 0.

**Memory.** A conversion holds blocks of rows, read with ``pread`` and written where they belong, never a whole tensor.
All jobs together stay within ``memory`` (default: the float32 size of the largest weight), so more jobs mean smaller
blocks, not more memory. What grows with the model is the list of its tensors.

**Interruptions.** All is written in ``<output>.partial``, with a journal of finished tensors and their checksums. A
second run compares those with the data, redoes what differs or lacks, and gives the same bytes as an uninterrupted one.
The folder gets its name by a rename when everything is on the disk.
"""

from octavo.checkpoint.calibrate import calibrate
from octavo.checkpoint.convert import Report, quantize
from octavo.checkpoint.reader import Checkpoint, load
from octavo.checkpoint.summary import LayerSummary, Summary, inspect

__all__ = ["Checkpoint", "LayerSummary", "Report", "Summary", "calibrate", "inspect", "load", "quantize"]
