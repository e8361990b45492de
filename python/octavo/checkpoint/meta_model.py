"""The model that a config.json describes, without memory: its layers, and what they are called in a checkpoint.

Transformers, or diffusers, builds it on PyTorch's meta device. Code that a model brings with it is never run.
"""

from collections.abc import Callable, Mapping
from typing import Any

from octavo._text import unexpected


def meta_model(config: Mapping[str, Any], dtype: str) -> Any:
    """The model of a config.json on the meta device; `dtype` decides which parameters some models keep in float32.

    Raises RuntimeError where PyTorch, or the library that has the model, is missing, and ValueError for a model that
    neither Transformers nor diffusers has, or sizes that they refuse.
    """
    model_type, of_diffusers = config.get("model_type"), isinstance(config.get("_class_name"), str)
    if not isinstance(model_type, str) and not of_diffusers:
        raise unexpected("config", "a model_type", "none")
    try:
        import torch
        import transformers
    except ImportError as error:
        raise RuntimeError(f'needs PyTorch and Transformers: pip install "octavo[transformers]" ({error})') from error
    if not of_diffusers and model_type not in transformers.CONFIG_MAPPING:
        raise unexpected("config: model_type", "one that Transformers has", repr(model_type))
    try:
        with torch.device("meta"):
            if of_diffusers:
                import diffusers

                model = getattr(diffusers, config["_class_name"]).from_config(dict(config))
            else:
                model = _transformers_model(config)
    except ImportError as error:
        raise RuntimeError(f"config: {error}") from error
    except Exception as error:  # each class checks its fields in its own way
        raise unexpected("config", "sizes that make a model", f"{type(error).__name__}: {error}") from error
    return model.to(getattr(torch, dtype))


def _transformers_model(config: Mapping[str, Any]) -> Any:
    import transformers

    fields = {key: value for key, value in config.items() if key not in ("model_type", "quantization_config")}
    known = transformers.AutoConfig.for_model(config["model_type"], **fields)
    own = getattr(transformers, str((known.architectures or [""])[0]), None)
    if own is not None:
        return own._from_config(known)
    kinds = (transformers.AutoModelForCausalLM, transformers.AutoModelForSeq2SeqLM, transformers.AutoModel)
    auto = next((kind for kind in kinds if type(known) in kind._model_mapping), transformers.AutoModel)
    return auto.from_config(known)


def names_in_model(model: Any) -> Callable[[str], tuple[str, Any]]:
    """A function: the name of a tensor in a checkpoint -> the parameter of `model` that it is loaded into.

    And the operations that Transformers does to it on the way; None where it is loaded as it is.
    """
    if not hasattr(model, "base_model_prefix"):
        return lambda name: (name, None)
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    conversions = get_model_conversion_mapping(model)
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    state = model.state_dict()

    def name_in_model(name: str) -> tuple[str, Any]:
        renamed, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        return renamed, next((each.operations for each in converters if pattern in each.source_patterns), None)

    return name_in_model
