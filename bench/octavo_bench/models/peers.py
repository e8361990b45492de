"""Other engines for `whole`: models of Transformers in their files and through their interfaces."""

import ctypes
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import find

LONGEST = 640  # tokens of a sequence


def _state(folder: Path) -> tuple[dict[str, Any], Any]:
    """The config and the state dict of a folder's model, in float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return json.loads((folder / "config.json").read_text()), model


# --- llama.cpp --------------------------------------------------------------------------------------------------------


def _gguf(folder: Path) -> Path:
    """A Llama as GGUF, all matrices in Q8_0, without a vocabulary."""
    import gguf

    path = find.cache() / f"{folder.name}-q8_0.gguf"
    if path.exists():
        return path
    config, model = _state(folder)
    heads, pairs = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(path.with_suffix(".partial"), "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(pairs)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    rope = config.get("rope_parameters") or config
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.get("tie_word_embeddings"):
            continue
        array = tensor.numpy()
        for part, count in (("q_proj", heads), ("k_proj", pairs)):
            if part in name:  # llama.cpp turns neighbours, Transformers halves
                array = array.reshape(count, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        kind = gguf.GGMLQuantizationType.Q8_0 if array.ndim == 2 else gguf.GGMLQuantizationType.F32
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(stored, gguf.quants.quantize(np.ascontiguousarray(array), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.with_suffix(".partial").rename(path)
    return path


class _Params(ctypes.Structure):
    """Parameters of a model or a context, of which the first four of the latter are set; large enough for both."""

    _fields_ = [("first", ctypes.c_uint32 * 4), ("rest", ctypes.c_uint8 * 1008)]


_QUIET = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)


class _Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", ctypes.c_int32), ("token", ctypes.POINTER(ctypes.c_int32)), ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)), ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))), ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]  # fmt: skip


def llama_cpp(folder: Path) -> Any:
    """llama.cpp, as the package xllamacpp carries it, by its C interface."""
    import xllamacpp

    library = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("xllamacpp*.so"))))
    for name in ("llama_model_default_params", "llama_context_default_params"):
        getattr(library, name).restype = _Params
    for name in ("llama_model_load_from_file", "llama_init_from_model", "llama_get_memory"):
        getattr(library, name).restype = ctypes.c_void_p
    library.llama_get_logits_ith.restype = ctypes.POINTER(ctypes.c_float)
    library.llama_batch_init.restype = _Batch
    library.llama_log_set(_QUIET, None)
    library.llama_backend_init()
    path = str(_gguf(folder)).encode()
    model = ctypes.c_void_p(library.llama_model_load_from_file(path, library.llama_model_default_params()))
    params = library.llama_context_default_params()
    params.first[:] = [8 * LONGEST, LONGEST, LONGEST, 8]  # n_ctx, n_batch, n_ubatch, n_seq_max
    context = ctypes.c_void_p(library.llama_init_from_model(model, params))
    if not model or not context:
        raise RuntimeError(f"llama.cpp: expected to load {path.decode()}, got nothing")
    threads = torch.get_num_threads()
    library.llama_set_n_threads(context, threads, threads)
    words = json.loads((folder / "config.json").read_text())["vocab_size"]
    batch = library.llama_batch_init(LONGEST, 0, 1)

    def feed(ids: Any, start: int) -> Any:
        """Logits ``[b, words]`` of the last of ids ``[b, t]``, whose first position is `start`."""
        rows, count = ids.shape
        batch.n_tokens = ids.size
        for place, token in enumerate(ids.reshape(-1).tolist()):
            batch.token[place], batch.pos[place] = token, start + place % count
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, place // count
            batch.logits[place] = place % count == count - 1
        if library.llama_decode(context, batch):
            raise RuntimeError("llama.cpp: llama_decode failed")
        last = [library.llama_get_logits_ith(context, row * count + count - 1) for row in range(rows)]
        return np.stack([np.ctypeslib.as_array(each, (words,)) for each in last])

    def run(ids: Tensor, mask: Tensor, new: int) -> Any:
        library.llama_memory_clear(ctypes.c_void_p(library.llama_get_memory(context)), True)
        logits, length = feed(ids.numpy(), 0), ids.shape[1]
        for step in range(new - 1):
            logits = feed(logits.argmax(-1)[:, None], length + step)
        return logits.copy()

    return run


# --- CTranslate2 ------------------------------------------------------------------------------------------------------


def ctranslate2_decoder(folder: Path) -> Any:
    """CTranslate2 with int8 weights."""
    import ctranslate2
    from ctranslate2.converters import transformers as loaders

    path = find.cache() / f"{folder.name}-ctranslate2"
    if not (path / "model.bin").exists():
        config, model = _state(folder)
        model.config.rope_theta = (config.get("rope_parameters") or config).get("rope_theta", 10000.0)
        model.config.rope_scaling = None
        spec = loaders.LlamaLoader().get_model_spec(model)
        spec.register_vocabulary([str(word) for word in range(config["vocab_size"])])
        spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = "0"
        spec.validate()
        spec.optimize(quantization="int8")
        path.mkdir(parents=True, exist_ok=True)
        spec.save(str(path))
    model = ctranslate2.Generator(str(path), intra_threads=torch.get_num_threads(), compute_type="int8")

    def run(ids: Tensor, mask: Tensor, new: int) -> Any:
        if not new:
            return np.array(model.forward_batch(ids.tolist()).to(ctranslate2.DataType.float32))[:, -1]
        prompts = [[str(token) for token in row] for row in ids.tolist()]
        options = {"max_length": new, "min_length": new, "include_prompt_in_result": False, "sampling_topk": 1}
        return model.generate_batch(prompts, **options)

    return run


# --- OpenVINO and ONNX Runtime ----------------------------------------------------------------------------------------


class _Step(torch.nn.Module):
    """A call of a Llama whose cache is made of arguments and results, which is how a traced model can have one."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, *past: Tensor) -> Any:
        """Logits ``[b, words]`` of the last of ids, and the keys and values ``[b, h, t, d]`` of each layer."""
        from transformers.cache_utils import DynamicCache, DynamicLayer

        cache = DynamicCache()
        for keys, values in zip(past[::2], past[1::2], strict=True):
            layer = DynamicLayer()
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
            cache.layers.append(layer)
        found = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return found.logits[:, -1], *(each for layer in cache.layers for each in (layer.keys, layer.values))


def openvino_int8(is_decoder: bool, folder: Path) -> Any:
    """OpenVINO with the int8 weights of `nncf.compress_weights`, all else as it is by default."""
    import nncf
    import openvino
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    layers = 2 * config.num_hidden_layers if is_decoder else 0
    width = config.hidden_size // config.num_attention_heads
    heads = config.num_key_value_heads if is_decoder else 0
    path = find.cache() / f"{folder.parent.name}-{folder.name}-openvino" / "model.xml"
    if not path.exists():
        kind = AutoModelForCausalLM if is_decoder else AutoModel
        model = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        ids = torch.ones(2, 9, dtype=torch.int64)
        past = [torch.zeros(2, heads, 5, width)] * layers
        with torch.inference_mode():
            given = (ids, *past) if is_decoder else (ids, ids)
            made = openvino.convert_model((_Step if is_decoder else _Hidden)(model), example_input=given)
        shapes = [[-1, heads, -1, width] if index and is_decoder else [-1, -1] for index in range(len(given))]
        made.reshape(dict(zip(made.inputs, shapes, strict=True)))
        openvino.save_model(nncf.compress_weights(made), path)
    options = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "NUM_STREAMS": 1}
    request = openvino.Core().compile_model(path, "CPU", options).create_infer_request()

    def run(ids: Tensor, mask: Tensor, new: int) -> Any:
        if not is_decoder:
            return torch.from_numpy(request.infer([ids.numpy(), mask.numpy()])[0])[mask.bool()]
        past = [np.zeros((len(ids), heads, 0, width), np.float32)] * layers
        logits, *past = request.infer([ids.numpy(), *past]).values()
        for _ in range(new - 1):
            logits, *past = request.infer([logits.argmax(-1)[:, None], *past]).values()
        return logits

    return run


class _Hidden(torch.nn.Module):
    """What of an encoder's results is compared."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor) -> Any:
        """Last hidden states ``[b, t, k]``."""
        return self.model(input_ids=ids, attention_mask=mask).last_hidden_state


def onnxruntime_encoder(how: str, folder: Path) -> Any:
    """An exported encoder in ONNX Runtime: "float32", its own dynamic quantization "int8", or octavo's "operator"."""
    import octavo.onnx
    import onnx
    import onnxruntime
    from onnxruntime.quantization import quantize_dynamic
    from transformers import AutoModel

    path = find.cache() / f"{folder.parent.name}-{folder.name}-{how}.onnx"
    exported = path.with_name(path.name.replace(how, "float32"))
    if not exported.exists():
        model = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
        ids = torch.ones(2, 9, dtype=torch.int64)
        axes = {"input_ids": {0: "b", 1: "t"}, "attention_mask": {0: "b", 1: "t"}}
        more: Any = {"input_names": list(axes), "output_names": ["y"], "dynamic_axes": axes, "dynamo": False}
        torch.onnx.export(_Hidden(model), (ids, ids), str(exported), **more)
    if how == "int8" and not path.exists():
        quantize_dynamic(exported, path)
    if how == "operator":  # of octavo's version here
        onnx.save(octavo.onnx.quantize_model(exported), path)
    options = octavo.onnx.session_options(torch.get_num_threads())
    session = onnxruntime.InferenceSession(str(path), options)

    def run(ids: Tensor, mask: Tensor, new: int) -> Any:
        hidden = session.run(["y"], {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})[0]
        return torch.from_numpy(hidden)[mask.bool()]

    return run
