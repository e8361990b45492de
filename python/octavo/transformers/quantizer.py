"""`OctavoQuantizer`: what Transformers asks of a quantization method while it loads and saves a model."""

from __future__ import annotations

import copy
import fnmatch
import re
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers.core_model_loading import MergeModulelist, WeightConverter
from transformers.integrations.accelerate import get_device
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantizer
from transformers.utils import logging

from octavo.checkpoint import format as names
from octavo.checkpoint.layers import DEFAULT_SKIP
from octavo.torch import Int8Linear
from octavo.transformers.config import METHOD, OctavoConfig
from octavo.transformers.experts import PROJECTIONS, Int8Experts, is_convertible
from octavo.transformers.loading import PARTS, DeserializeExperts, DeserializeLayer, Finish, Quantize

if TYPE_CHECKING:
    from octavo.transformers.parallel import TensorParallel

logger = logging.get_logger(__name__)


@register_quantizer(METHOD)
class OctavoQuantizer(HfQuantizer):  # type: ignore[misc]
    """Converts a model while it is loaded, or loads one that is int8. Made by `from_pretrained`; see the package."""

    quantization_config: OctavoConfig

    def __init__(self, quantization_config: OctavoConfig, **kwargs: Any) -> None:
        # The caller may use his for other models.
        super().__init__(copy.deepcopy(quantization_config), **kwargs)
        self._layers: set[str] = set()  # that are converted on loading, by qualified name
        self._loaders: list[WeightConverter] = []
        self._parallel: TensorParallel | None = None  # while a model is loaded over several processes
        self._is_parallel = False  # and ever after
        self._places: dict[str, Any] | None = None  # of modules, where accelerate takes some away between calls
        self._sums: dict[Int8Linear, Tensor] = {}  # of the codes of such layers

    # --- what Transformers asks beforehand ----------------------------------------------------------------------------

    def validate_environment(self, *, device_map: Any = None, **_: Any) -> None:
        """Raise ValueError for what cannot be loaded so: "static" without calibration, layers on disk."""
        if not self.pre_quantized and self.quantization_config.outliers == "static":
            raise ValueError(
                "OctavoConfig: outliers: expected 'columns', 'rows' or 'none' when converting while loading, got "
                "'static', which needs calibrated columns (octavo quantize --calibrate, or octavo.torch.calibrate_)"
            )
        places = device_map.values() if isinstance(device_map, dict) else [device_map]
        if any(str(place) == "disk" for place in places):
            raise ValueError(
                "from_pretrained: device_map: expected devices for an int8 model, got 'disk': octavo's layers are not "
                "offloaded to it"
            )
        # accelerate leaves on the CPU what has its place there, unless everything has.
        offloads = isinstance(device_map, dict) and "cpu" in device_map.values() and len(set(device_map.values())) > 1
        self._places = device_map if offloads else None

    @property
    def quantized_element_size(self) -> float:
        """Bytes of a code; scales and sums are not counted."""
        return 1

    def is_serializable(self) -> bool:
        """`save_pretrained` works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Not through Transformers' Trainer."""
        return False

    @property
    def is_compileable(self) -> bool:
        """`torch.compile` works."""
        return True

    # --- loading ------------------------------------------------------------------------------------------------------

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        left = _Left(model, self.quantization_config.modules_to_not_convert)
        special = []
        for name, module in list(model.named_modules()):
            stacked = any(parameter.dim() == 3 and "experts" in f"{name}.{own}" for own, parameter in _own(module))
            # Which layers of an int8 model are int8, its file says.
            if not self.pre_quantized and name in left:
                continue
            if is_convertible(module):
                model.set_submodule(name, Int8Experts(module))
                self._layers |= {f"{name}.{own}" for own, _ in _own(module) if own in PROJECTIONS}
            elif stacked and not self.pre_quantized:
                special.append(name)
            elif type(module) in (nn.Linear, Conv1D):
                self._layers.add(f"{name}.{names.WEIGHT}")
        if special:
            logger.warning(
                f"octavo: the expert weights of {len(special)} modules stay as they are, so that they take their full "
                f"memory: {', '.join(special[:3])}{', ...' if len(special) > 3 else ''}. octavo converts stacked "
                "experts whose module has Transformers' use_experts_implementation, without norms of their own."
            )
        model._resolve_parallel_plans = partial(self._resolve_parallel_plans, model, left)

    def _resolve_parallel_plans(self, model: Any, left: _Left, config: Any) -> tuple[dict[str, str], ...]:
        """In the place of the model's method: its plans without what octavo shards itself.

        Transformers asks for them once the mesh is there, and before it makes placeholders.
        """
        if (config.dp_size, config.ep_size, config.pp_size) != (1, 1, 1):
            raise ValueError(
                "from_pretrained: distributed_config: expected tensor parallelism alone (tp_size) for an int8 model, "
                f"got dp_size={config.dp_size}, ep_size={config.ep_size}, pp_size={config.pp_size}"
            )
        from octavo.transformers.parallel import TensorParallel

        plan, *others = type(model)._resolve_parallel_plans(model, config)
        # Of an int8 model the file says which layers are int8, and config.json which are not.
        parameters = {name for name in self._layers if not self.pre_quantized or name.rpartition(".")[0] not in left}
        self._parallel = TensorParallel(model, plan, parameters)
        self._is_parallel = True
        return plan, *others

    def _finish(self, parameter: str, layer: Int8Linear) -> None:
        if self._parallel is not None:
            self._parallel.shard(parameter, layer)
        elif self._places is not None and get_device(self._places, parameter) == "cpu":
            from octavo.distributed import offloadable_

            offloadable_(layer)
            layer._complete()
            self._sums[layer] = layer.code_sums

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        """Whether a parameter of the model, by qualified name, is a weight that is or becomes int8."""
        return param_name in self._layers

    def get_quantize_ops(self) -> Quantize:
        """What a 16-bit weight goes through."""
        return Quantize(self.quantization_config.options(), self.param_needs_quantization, self._finish)

    def get_new_dtype(self, converter: Any, param: Any, dtype: Any) -> Any:
        """Tensors that may be those of an int8 layer are read as they are; the operation casts where they are not."""
        operation = next(iter(getattr(converter, "operations", ())), None)
        if isinstance(operation, (DeserializeLayer, DeserializeExperts)):
            operation.dtype = dtype
            return None
        return super().get_new_dtype(converter, param, dtype)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """The model's own conversions, of which those of experts also take int8 tensors, and octavo's."""
        if not self.pre_quantized:
            return weight_conversions
        stacked = {name for name, module in model.named_modules() if isinstance(module, Int8Experts)}
        targets = [f"{name}.{projection}" for name in stacked for projection in PROJECTIONS]
        for last in {name.rpartition(".")[2] for name in stacked}:  # as save_pretrained names them
            for projection in PROJECTIONS:
                source = f"{last}.{projection}.*.{names.WEIGHT}"
                operation = DeserializeExperts([source], [MergeModulelist(dim=0)], self._finish)
                self._loaders.append(
                    WeightConverter(DeserializeExperts.patterns([source]), f"{last}.{projection}", [operation])
                )
        others: list[Any] = []
        for conversion in weight_conversions:
            loader = _experts_loader(conversion, targets, self._finish)
            (others if loader is None else self._loaders).append(loader or conversion)
        sources = [rf"\.{part}" for part in PARTS]
        layers = WeightConverter(sources, f".{names.WEIGHT}", [DeserializeLayer(self._finish)])
        conversions = [*self._loaders, *others, layers]
        self._loaders.append(layers)
        return conversions

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        model.__dict__.pop("_resolve_parallel_plans", None)
        if self._parallel is not None:
            self._parallel.finish(model)
            self._parallel = None
        elif getattr(model, "_tp_size", None) not in (None, 1):
            raise RuntimeError(
                "from_pretrained: tp_plan: this version of Transformers shards a model in another way than octavo "
                "knows (tested: 5.23): load it without, and use octavo.distributed.transformers_plan"
            )
        linear = [(name, module) for name, module in model.named_modules() if type(module) in (nn.Linear, Conv1D)]
        for name, module in linear:
            if not module.weight.is_floating_point():
                raise ValueError(
                    f"{name}: expected {names.SCALE} and {names.EXTRA_STATE} beside an int8 weight, got none that "
                    "Transformers brings to this layer: convert the model with from_pretrained instead"
                )
        int8 = {name: module for name, module in model.named_modules() if isinstance(module, Int8Linear)}
        _detach_from_files(model, keep={id(layer.weight) for layer in int8.values()})
        for layer in int8.values():
            # The loader empties buffers that are in no file, and accelerate has taken some layers' codes away by now.
            if layer in self._sums:
                layer.code_sums = self._sums.pop(layer).to(layer.code_sums.device)
            else:
                layer._complete()
        if not int8:
            logger.warning("octavo: the model has no layer that was converted: nothing is int8")
        self.quantization_config.modules_to_not_convert = sorted(name for name, _ in linear)
        # Int8 layers are saved under the names that they have in the model, not taken apart again.
        weights = "\n".join(f"{name}.{names.WEIGHT}" for name in int8)
        model._weight_conversions = [
            conversion
            for conversion in model._weight_conversions
            if conversion not in self._loaders
            and not (isinstance(conversion, WeightConverter) and _reaches(conversion, weights))
        ]
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, str]]:
        """The state dict is the model's; the metadata is that of octavo's checkpoint format."""
        if self._is_parallel:
            raise ValueError(
                "save_pretrained: expected a whole int8 model, got one that is spread over several processes: save it "
                "in one, or convert it with octavo quantize"
            )
        return None, self.quantization_config.options().metadata()


class _Left:
    """The modules that are left as they are, by qualified name.

    Args:
        model: the model before its weights are loaded, in the dtype that it is loaded in.
        patterns: see `OctavoConfig.modules_to_not_convert`.
    """

    def __init__(self, model: Any, patterns: Sequence[str] | None) -> None:
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        self._tied = {key.removesuffix(".weight") for pair in tied.items() for key in pair}
        self._patterns = [*DEFAULT_SKIP, *_last_modules(model)] if patterns is None else patterns
        self._float32 = [re.compile(pattern.replace("*", ".*")) for pattern in model._get_dtype_plan(model.dtype)]

    def __contains__(self, name: object) -> bool:
        assert isinstance(name, str)
        if name in self._tied or any(pattern.search(f"{name}.{names.WEIGHT}") for pattern in self._float32):
            return True
        parts = name.split(".")
        above = [".".join(parts[:length]) for length in range(1, len(parts) + 1)]
        return any(
            name.endswith(f".{pattern}") or any(fnmatch.fnmatchcase(module, pattern) for module in above)
            for pattern in self._patterns
        )


def _detach_from_files(model: nn.Module, keep: set[int]) -> None:
    """Copy what Transformers reads in place, but not the tensors of the ids `keep`, which octavo has made.

    A tensor of a mapped safetensors file holds the map, and with it all that was read of the file, in memory.
    """
    for tensor in [*model.parameters(), *model.buffers()]:
        if id(tensor) not in keep and tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()


def _own(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return module.named_parameters(recurse=False)


def _last_modules(model: Any) -> list[str]:
    """The output head, and the module of the last parameter: a classifier, a pooler."""
    head = model.get_output_embeddings()
    heads = [name for name, module in model.named_modules() if head is not None and module is head]
    *_, (last, _) = model.named_parameters()
    return [*heads, last.rpartition(".")[0]]


def _reaches(conversion: Any, parameters: str) -> bool:
    """Whether a conversion makes any of the parameters, of which there is one in each line."""
    return any(re.search(re.escape(target), parameters) for target in conversion.target_patterns)


def _experts_loader(conversion: Any, targets: Sequence[str], finish: Finish) -> WeightConverter | None:
    """`conversion` for int8 tensors too, where it stacks experts that are among `targets`; else None."""
    if not isinstance(conversion, WeightConverter) or len(conversion.target_patterns) != 1:
        return None
    sources = list(conversion._original_source_patterns)
    if not all(source.endswith(f".{names.WEIGHT}") for source in sources):
        return None
    if not _reaches(conversion, "\n".join(targets)) or not DeserializeExperts.can_stack(conversion.operations):
        return None
    operation = DeserializeExperts(sources, conversion.operations, finish)
    return conversion.copy(
        DeserializeExperts.patterns(sources), list(conversion._original_target_patterns), operations=[operation]
    )
