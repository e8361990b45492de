"""octavo in Hugging Face Transformers: int8 models from `from_pretrained`.

>>> import octavo.transformers                                                          # doctest: +SKIP
>>> model = AutoModelForCausalLM.from_pretrained("opt-6.7b", quantization_config=OctavoConfig())   # doctest: +SKIP
>>> model.save_pretrained("opt-6.7b-int8")                                              # doctest: +SKIP
>>> model = AutoModelForCausalLM.from_pretrained("opt-6.7b-int8")                       # doctest: +SKIP

Importing this module registers the method "octavo" with Transformers (5.23 or later). **It has to be imported before an
int8 model is loaded, too**: Transformers finds quantizers in a table of its own and has no way for other packages to
announce theirs. Without the import it refuses: ``ValueError: The model's quantization config from the arguments has no
`quant_method` attribute``. (A method that it does not know, it ignores with a warning, takes the codes for weights and
computes nonsense; so config.json says no method, and this module fills it in.) For Transformers' command line there is
``python -m octavo.transformers serve MODEL``.

**Converting.** Weights are converted one by one as they are read, so the 16-bit model is never held. What becomes int8:
``nn.Linear``, GPT-2's ``Conv1D``, and expert weights that a model keeps stacked in one parameter (`Int8Experts`).
What stays: embeddings, the output head and weights tied to others, the last module (a classifier, a pooler), routers,
modules that Transformers keeps in float32 for the dtype asked for, biases of experts, stacked experts of a module that
computes something of its own (Llama 4; a warning names them), layers that the checkpoint has no weights for.

**Loading int8.** The file decides which layers are int8, with which options; it may come from `save_pretrained` or from
``octavo quantize`` (`octavo.checkpoint`). Transformers reads it, so its checksums are not compared here: ``octavo
inspect --verify`` does that.

**Memory.** While a 16-bit model is converted: the int8 model, one weight of the 16-bit one (where a model stacks its
experts, those of one layer) and its codes. Transformers maps the files; the pages of them that have been read count as
resident until the system takes them back or loading ends. `save_pretrained` makes a second copy of the codes.

**Compiling.** ``torch.compile(model, fullgraph=True)`` works but for mixtures of experts, whose loop over the experts
that a batch needs breaks the graph.

**Devices.** ``device_map`` may name what octavo has a backend for, and "cpu" beside it: such layers are brought to the
device for each call (`octavo.distributed.offloadable_`). Layers cannot be offloaded to disk.
"""

from octavo.transformers.config import OctavoConfig
from octavo.transformers.experts import Int8Experts
from octavo.transformers.quantizer import OctavoQuantizer

__all__ = ["Int8Experts", "OctavoConfig", "OctavoQuantizer"]
