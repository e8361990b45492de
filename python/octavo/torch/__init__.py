"""octavo for PyTorch: the weight as a tensor, `Int8Tensor`, and the conversion of whole models in place.

>>> model = calibrate_(model, batches)      # doctest: +SKIP
>>> quantize_(model)                        # doctest: +SKIP

The operation is ``torch.ops.octavo.linear``, to be compiled, exported and differentiated.
"""

import octavo.torch.sharding  # noqa: F401 - makes Int8Tensor known to FSDP2
from octavo.torch.convert import calibrate_, quantize_, systematic_columns
from octavo.torch.layer import Int8Linear, share_in_inference_mode
from octavo.torch.smoothing import smooth_
from octavo.torch.tensor import Int8Tensor
from octavo.torch.training import train_, untrain_

__all__ = [
    "Int8Linear", "Int8Tensor", "calibrate_", "quantize_", "share_in_inference_mode", "smooth_", "systematic_columns",
    "train_", "untrain_",
]  # fmt: skip
