"""`OctavoQuantizer`: what Transformers asks of a quantization method while it loads and saves a model."""

import copy
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantizer
from transformers.utils import logging

from octavo import file_format as names
from octavo._text import matches, unexpected
from octavo.torch import Int8Tensor
from octavo.torch.choice import converts_head, is_linear
from octavo.torch.convert import hold
from octavo.transformers.config import METHOD, OctavoConfig
from octavo.transformers.loading import UNTIED, Assemble, Quantize, conversions_of_int8, give_back
from octavo.transformers.model import adopt, dequantize_, flat, qualified, weights_to_convert

if TYPE_CHECKING:
    from octavo.transformers.parallel import TensorParallel

logger = logging.get_logger(__name__)


def _places(device_map: Any) -> set[str]:
    """The devices that a model is loaded to."""
    places = device_map.values() if isinstance(device_map, dict) else ["cpu" if device_map is None else device_map]
    return {str(place) for place in places}


@register_quantizer(METHOD)
class OctavoQuantizer(HfQuantizer):  # type: ignore[misc]
    """Converts a model while it is loaded, or loads one that is int8. Made by `from_pretrained`; see the package."""

    quantization_config: OctavoConfig
    quantized_element_size = 1.0  # bytes of a code; scales and sums are not counted
    is_trainable = True  # adapters on it
    is_compileable = True

    def __init__(self, quantization_config: OctavoConfig, **kwargs: Any) -> None:
        # The caller may use his for other models.
        super().__init__(copy.deepcopy(quantization_config), **kwargs)
        self.files: Sequence[str] = ()  # of the checkpoint
        self.keeps_files = False  # mapped, since codes lie there as they are used
        self._head = False  # it becomes int8
        self._weights: set[str] = set()  # that are or become int8, by qualified name
        self._parallel: TensorParallel | None = None  # while a model is loaded over several processes
        self._is_parallel = False  # and ever after

    def is_serializable(self) -> bool:
        """`save_pretrained` works."""
        return True

    def validate_environment(self, *, device_map: Any = None, **_: Any) -> None:
        """Raise ValueError for what cannot be loaded so: "static" without calibration, layers on disk."""
        if not self.pre_quantized and self.quantization_config.outliers == "static":
            others = "'columns', 'rows' or 'none' when converting while loading"
            needs = "'static', which needs calibrated columns (octavo quantize --calibrate, or octavo.torch.calibrate_)"
            raise unexpected("OctavoConfig: outliers", others, needs)
        if "disk" in _places(device_map):
            disk = "'disk': octavo's layers are not offloaded to it"
            raise unexpected("from_pretrained: device_map", "devices for an int8 model", disk)

    # --- loading ------------------------------------------------------------------------------------------------------

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **how: Any) -> None:
        self.files = checkpoint_files or ()
        # Which weights of an int8 model are int8, its file says.
        config = self.quantization_config
        left = [] if self.pre_quantized else config.modules_to_not_convert
        places = _places(how.get("device_map"))
        self._head = not self.pre_quantized and converts_head("OctavoConfig", config.head, config.options(), places)
        self._weights = weights_to_convert(model, left, self.pre_quantized or self._head)
        model._resolve_parallel_plans = partial(self._resolve_parallel_plans, model)

    def _resolve_parallel_plans(self, model: Any, config: Any) -> tuple[dict[str, str], ...]:
        """In the place of the model's method: its plans without what octavo shards itself.

        Transformers asks for them once the mesh is there, and before it makes placeholders.
        """
        if (config.dp_size, config.ep_size, config.pp_size) != (1, 1, 1):
            got = f"dp_size={config.dp_size}, ep_size={config.ep_size}, pp_size={config.pp_size}"
            alone = "tensor parallelism alone (tp_size) for an int8 model"
            raise unexpected("from_pretrained: distributed_config", alone, got)
        from octavo.transformers.parallel import TensorParallel

        plan, *others = type(model)._resolve_parallel_plans(model, config)
        # Of an int8 model the file says which layers are int8, and config.json which are not.
        left = qualified(self.quantization_config.modules_to_not_convert if self.pre_quantized else ())
        int8 = {name for name in self._weights if not matches(name.rpartition(".")[0], left)}
        self._parallel = TensorParallel(model, plan, int8)
        self._is_parallel = True
        return plan, *others

    def part(self, name: str, weight: Int8Tensor) -> Int8Tensor:
        """What this process holds of a new weight ``[n, k]``, by qualified name."""
        return weight if self._parallel is None else self._parallel.shard(name, weight)

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        """Whether a parameter of the model, by qualified name, is a weight that is or becomes int8."""
        return param_name in self._weights

    def get_quantize_ops(self) -> Quantize:
        """What a 16-bit weight goes through."""
        return Quantize(self)

    def get_new_dtype(self, converter: Any, param: Any, dtype: Any) -> Any:
        """The parts of an int8 weight are read as they are; the weight itself says that it has the model's dtype."""
        operation = next(iter(getattr(converter, "operations", ())), None)
        if isinstance(operation, Assemble):
            operation.dtype = dtype
            return None
        return super().get_new_dtype(converter, param, dtype)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """The model's own conversions, and before them those of int8 weights."""
        return conversions_of_int8(self, model, weight_conversions) if self.pre_quantized else weight_conversions

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        model.__dict__.pop("_resolve_parallel_plans", None)
        head = model.get_output_embeddings() if self._head else None
        if head is not None and not isinstance(head.weight, Int8Tensor):  # it was tied
            name = next(own for own, module in model.named_modules() if module is head)
            table = head.weight.full_tensor() if hasattr(head.weight, "full_tensor") else head.weight  # of a DTensor
            made = Int8Tensor.from_float(table.detach(), self.quantization_config.options())
            hold(head, nn.Parameter(self.part(f"{name}.weight", made), requires_grad=False))
        if self._parallel is not None:
            self._parallel.finish(model)
            self._parallel = None
        elif getattr(model, "_tp_size", None) not in (None, 1):
            raise RuntimeError(
                "from_pretrained: tp_plan: this version of Transformers shards a model in another way than octavo "
                "knows (tested: 5.23): load it without, and use octavo.distributed.transformers_plan"
            )
        for name, module in model.named_modules():
            weight: Any = getattr(module, "weight", None)
            if is_linear(module) and isinstance(weight, Int8Tensor):
                hold(module, weight)  # type: ignore[arg-type]
            elif is_linear(module) and not weight.is_floating_point():
                got = "none that Transformers brings to this layer: convert the model with from_pretrained instead"
                raise unexpected(name, "the scale and the options of its int8 weight", got)
        # A tensor of a mapped file holds the map, and with it all that was read of the file, in memory.
        for tensor in [*model.parameters(), *model.buffers()]:
            if not self.keeps_files and not isinstance(tensor, Int8Tensor) and tensor.device.type == "cpu":
                tensor.data = tensor.data.clone()
        give_back(self.files)  # of what became another dtype nothing is needed, and codes are read as they are used
        if not any(isinstance(parameter, Int8Tensor) for parameter in model.parameters()):
            if self.pre_quantized:
                raise unexpected("from_pretrained", "int8 weights, as config.json says", f"none in {list(self.files)}")
            logger.warning("octavo: the model has no layer that was converted: nothing is int8")
        adopt(model, self)
        return model

    # --- saving, and back to 16 bit -----------------------------------------------------------------------------------

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Any], dict[str, str]]:
        """The state dict with the parts of int8 weights in their place."""
        if self._is_parallel:
            got = "one that is spread over several processes: save it in one, or convert it with octavo quantize"
            raise unexpected("save_pretrained", "a whole int8 model", got)
        model.config.quantization_config = self.quantization_config  # a part of a model has a config of its own
        if UNTIED in model.__dict__:  # PEFT says no where an int8 head is apart, and a bias that is tied would get lost
            model.config.tie_word_embeddings = True
        return flat(model.state_dict()), {names.VERSION_KEY: str(names.VERSION)}

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        return dequantize_(model, dtype)
