"""`OctavoConfig`: the options of a conversion, and the ``quantization_config`` of an int8 model's config.json."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from enum import Enum
from typing import Any

import octavo_autoload
from transformers.quantizers import auto
from transformers.utils.quantization_config import QuantizationConfigMixin

from octavo.file_format import HEAD, READABLE_VERSIONS, VERSION
from octavo.options import WHOLE_MODELS, Options
from octavo.options import recipe as options_of


class Method(str, Enum):
    """What Transformers and diffusers call a way to quantize."""

    OCTAVO = "octavo"


METHOD = Method.OCTAVO
_NAMES = [field.name for field in fields(Options)]


@auto.register_quantization_config(METHOD)
class OctavoConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """How `from_pretrained` is to convert a model, or how a model that is int8 already is to compute.

    Args:
        recipe: the options that are not given; see `octavo.recipe`.
        options: those of `octavo.Options`, each by its name, and each an attribute: ``OctavoConfig(outliers="rows")``.
            "static" outliers need calibrated columns, so a 16-bit model cannot be converted with them: use ``octavo
            quantize --calibrate``, or `octavo.torch.calibrate_` and `octavo.torch.quantize_`.
        modules_to_not_convert: layers to leave as they are: qualified names or patterns as in a shell, each also for
            all that is below it and as the last parts of a name ("lm_head", "model.layers.0", "*.mlp.*"). None: the
            routers of mixtures of experts, and the output head unless `head` says otherwise. See
            `octavo.torch.choice.choose_layers`.
        head: convert the output head, too, or not; one that is tied to the embedding gets a weight of its own, which
            takes memory and makes decoding faster on CPUs. None: where the model is on the CPU and `rotation` is not 0.
        drop_padding: False: int8 layers of encoders (BERT and its family, MPNet) compute padded rows, too; see
            `octavo.transformers.drop_padding_`.
        format_version: of the checkpoint.
        quant_method: "octavo", or None, as config.json has it: without a method Transformers refuses to load the model
            where octavo is not installed.
        octavo: what config.json says to whoever reads it; ignored.

    Of a model that is int8 already, also of one that bitsandbytes has made, the options that are given here are
    followed; the others are those of its file, layer by layer. Its scheme, granularity and rotation are fixed: others
    are refused.

    Raises ValueError or TypeError for values that octavo does not have.
    """

    def __init__(
        self,
        *,
        recipe: str = WHOLE_MODELS,
        modules_to_not_convert: Sequence[str] | None = None,
        head: bool | None = None,
        drop_padding: bool | None = None,
        format_version: int = VERSION,
        quant_method: str | None = METHOD,
        octavo: str | None = None,
        **options: Any,
    ) -> None:
        if quant_method not in (METHOD, None):
            raise ValueError(f"OctavoConfig: quant_method: expected 'octavo', got {quant_method!r}")
        if format_version not in READABLE_VERSIONS:
            raise ValueError(f"OctavoConfig: format_version: expected 1 to 3, got {format_version!r}: update octavo")
        if isinstance(modules_to_not_convert, str):
            raise TypeError("OctavoConfig: modules_to_not_convert: expected a sequence of names, got a string")
        self.quant_method = METHOD
        self.modules_to_not_convert = None if modules_to_not_convert is None else list(modules_to_not_convert)
        self.head = head
        self.drop_padding = drop_padding
        chosen = Options.from_dict(options, "OctavoConfig", options_of(recipe))
        self.__dict__.update({name: getattr(chosen, name) for name in _NAMES})
        self.given = {name: getattr(chosen, name) for name in options}

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **more: Any) -> Any:
        """The config of a config.json, where nothing is the caller's wish."""
        if "format_version" in config_dict:  # of an older version, which had fewer options, all as in the paper
            config_dict = {"recipe": "paper", **config_dict}
        config = super().from_dict(config_dict, **more)
        (config[0] if isinstance(config, tuple) else config).given = {}
        return config

    def options(self) -> Options:
        """The options of a layer."""
        return Options(**{name: getattr(self, name) for name in _NAMES})

    def get_loading_attributes(self) -> dict[str, Any]:
        """What of a caller's config counts when a model is loaded that is int8 already: what he gave."""
        more = {} if self.drop_padding is None else {"drop_padding": self.drop_padding}
        return {**self.given, "given": self.given, **more}

    def to_dict(self) -> dict[str, Any]:
        """What config.json carries."""
        more = {"drop_padding": False} if self.drop_padding is False else {}
        left = {"modules_to_not_convert": self.modules_to_not_convert}
        return {**HEAD, "format_version": VERSION, **self.options().to_dict(), **left, **more}


_merge = auto.AutoHfQuantizer.merge_quantization_configs


def _merge_bitsandbytes(stored: Any, given: Any) -> Any:
    """Transformers' method, which lets an OctavoConfig read what bitsandbytes has made, too."""
    if not (isinstance(given, OctavoConfig) and isinstance(stored, dict) and stored.get("load_in_8bit")):
        return _merge(stored, given)
    threshold = stored.get("llm_int8_threshold", 6.0)
    theirs = {"threshold": threshold} if threshold else {"outliers": "none"}  # which bitsandbytes means by 0
    left = stored.get("llm_int8_skip_modules")
    return OctavoConfig(
        **{"recipe": "paper", **theirs, **given.given}, modules_to_not_convert=left, drop_padding=given.drop_padding
    )


auto.AutoHfQuantizer.merge_quantization_configs = staticmethod(_merge_bitsandbytes)
# Transformers asks only configs of these classes what the caller gave.
auto.LOADING_ATTRIBUTES_CONFIG_TYPES += (OctavoConfig,)
octavo_autoload.install()  # where PyTorch has not done so
