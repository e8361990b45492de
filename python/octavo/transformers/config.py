"""`OctavoConfig`: the options of a conversion, and the ``quantization_config`` of an int8 model's config.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from transformers.quantizers.auto import AutoHfQuantizer, register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from octavo._types import Granularity, Outliers, Path, Scheme
from octavo.checkpoint.format import FORMAT_VERSION, HEAD, Options

METHOD = "octavo"


@register_quantization_config(METHOD)
class OctavoConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """How `from_pretrained` is to convert a model.

    Args:
        scheme, granularity: see `octavo.quantize_weight`.
        threshold, outliers, path: see `octavo.linear`. "static" needs calibrated columns, so it cannot be asked for
            here: use ``octavo quantize --calibrate``, or `octavo.torch.calibrate_` and `octavo.torch.quantize_`.
        modules_to_not_convert: layers to leave as they are: qualified names or patterns as in a shell, each also for
            all that is below it and as the last parts of a name ("lm_head", "model.layers.0", "*.mlp.*"). None: the
            output head, the last module, routers. Tied weights are left in any case.
        format_version: of the checkpoint; only the present one is known.
        quant_method: "octavo", or None, as config.json has it: without a method Transformers refuses to load the model
            where octavo.transformers has not been imported.
        octavo: what config.json says to whoever reads it; ignored.

    Of a model that is int8 already these are what it was made with; what counts is what each layer's file says.

    Raises ValueError or TypeError for values that octavo does not have.
    """

    def __init__(
        self,
        *,
        scheme: Scheme = "absmax",
        granularity: Granularity = "vector",
        threshold: float = 6.0,
        outliers: Outliers = "columns",
        path: Path = "auto",
        modules_to_not_convert: Sequence[str] | None = None,
        format_version: int = FORMAT_VERSION,
        quant_method: str | None = METHOD,
        octavo: str | None = None,
    ) -> None:
        if quant_method not in (METHOD, None):
            raise ValueError(f"OctavoConfig: quant_method: expected {METHOD!r}, got {quant_method!r}")
        if format_version != FORMAT_VERSION:
            raise ValueError(
                f"OctavoConfig: format_version: expected {FORMAT_VERSION}, got {format_version}: update octavo"
            )
        if isinstance(modules_to_not_convert, str):
            raise TypeError("OctavoConfig: modules_to_not_convert: expected a sequence of names, got a string")
        self.quant_method = METHOD
        self.format_version = FORMAT_VERSION
        options = Options(scheme, granularity, float(threshold), outliers, path)  # refuses wrong values
        for name, value in asdict(options).items():
            setattr(self, name, value)
        self.modules_to_not_convert = None if modules_to_not_convert is None else list(modules_to_not_convert)

    def options(self) -> Options:
        """The options of a layer."""
        return Options(self.scheme, self.granularity, self.threshold, self.outliers, self.path)

    def to_dict(self) -> dict[str, Any]:
        """What config.json carries."""
        return {**super().to_dict(), **HEAD}


def _supports(quantization_config: dict[str, Any]) -> bool:
    """`AutoHfQuantizer.supports_quant_method`, which says of int8 models without a method whose they are."""
    if quantization_config.get("quant_method") is None and "octavo" in quantization_config:
        quantization_config["quant_method"] = METHOD
    supported: bool = _supports_quant_method(quantization_config)
    return supported


_supports_quant_method = AutoHfQuantizer.supports_quant_method
AutoHfQuantizer.supports_quant_method = staticmethod(_supports)
