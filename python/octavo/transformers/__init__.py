"""octavo in Hugging Face Transformers: int8 models from `from_pretrained`.

>>> model = AutoModelForCausalLM.from_pretrained("opt-6.7b", quantization_config=OctavoConfig())   # doctest: +SKIP
>>> model.save_pretrained("opt-6.7b-int8")                                              # doctest: +SKIP
>>> model = AutoModelForCausalLM.from_pretrained("opt-6.7b-int8")                       # doctest: +SKIP

Transformers (5.23 or later) knows int8 models without an import of octavo: `docs/guide/transformers.md` says how.

**Converting.** Weights are converted one by one as they are read, so the 16-bit model is never held. What becomes int8:
the linear layers that `octavo.torch.choice.choose_layers` names, expert weights that a model keeps stacked in one
parameter (`Int8Stack`), and by default on CPUs the output head (``OctavoConfig(head=False)`` keeps it). Everything else
stays as it is: embeddings, routers, biases. A model that `octavo.torch.quantize_` converted is in the same state.

**The model stays the model's own.** An int8 weight is an `octavo.torch.Int8Tensor`, a parameter of the original shape
and dtype, in the model's own layers. So PEFT, accelerate and the Trainer work with it as with the 16-bit one, and
``model.dequantize()`` makes it one again.

**Loading int8.** The file decides which layers are int8; it may come from `save_pretrained`, from ``octavo quantize``
(`octavo.checkpoint`), or, where an `OctavoConfig` is given, from bitsandbytes. How a layer computes (threshold,
outliers, path) is what the given `OctavoConfig` says, and what the file says where none is given. Transformers reads
the file, so its checksums are not compared here: ``octavo inspect --verify`` does that.

**Memory.** While a 16-bit model is converted: the int8 model, one weight of the 16-bit one (where a model stacks its
experts, those of one layer) and its codes. Pages of the files, which Transformers maps, are given back to the system as
they are read, where weights keep the dtype of the file. `save_pretrained` makes a second copy of the codes. A folder of
``octavo quantize --format packed`` stays mapped, and codes and all else lie in it as they are used.

**Compiling.** ``torch.compile(model, fullgraph=True)`` works but for mixtures of experts, whose loop over the experts
that a batch needs breaks the graph.

**Devices.** ``device_map`` may name what octavo has a backend for, and "cpu" as well. Layers cannot be offloaded to
disk.
"""

from octavo.transformers.config import OctavoConfig
from octavo.transformers.experts import Int8Stack
from octavo.transformers.padding import drop_padding_
from octavo.transformers.quantizer import OctavoQuantizer

__all__ = ["Int8Stack", "OctavoConfig", "OctavoQuantizer", "drop_padding_"]
