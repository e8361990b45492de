"""Checkpoints: 16/32-bit models in, int8 models out, in bounded memory.

>>> octavo.checkpoint.quantize("opt-6.7b", "opt-6.7b-int8", jobs=2)      # doctest: +SKIP
>>> weights = octavo.checkpoint.load("opt-6.7b-int8")                    # doctest: +SKIP

On the command line: ``octavo quantize``, ``octavo inspect``. Needs NumPy and safetensors; PyTorch for tensors of it and
for files that ``torch.save`` wrote; Transformers, where it is there, says which layers a model has.

What the files are called and hold: ``docs/reference/checkpoint.md``. ``format="packed"`` stores codes as CPUs use them,
for models that open at once. ``format="bitsandbytes"`` writes, and reading
understands, bitsandbytes' ``Linear8bitLt``, too.

**Memory.** A tensor is read once. All that are converted at a time stay within ``memory`` (default: the float32 size of
the largest one, and at least the largest weight as it is stored) and 10 % of it. A handful of files is open at a
time.

**Interruptions.** All is written in ``<output>.partial``, which gets its name by a rename when everything is on the
disk. A second run reads what the finished files were made of, compares it with their hash, and their data with the
checksums, and makes the others. A model that changes while it is read is an error.

**Trust.** A checkpoint brings no code: none is ever run. Links that lead out of the model's folder are not copied.
"""

from octavo.checkpoint.calibrate import calibrate
from octavo.checkpoint.convert import Report, quantize
from octavo.checkpoint.dial import Choice, choose_options
from octavo.checkpoint.reader import Checkpoint, load
from octavo.checkpoint.summary import LayerSummary, Summary, inspect

__all__ = [
    "Checkpoint", "Choice", "LayerSummary", "Report", "Summary", "calibrate", "choose_options", "inspect", "load",
    "quantize",
]  # fmt: skip
