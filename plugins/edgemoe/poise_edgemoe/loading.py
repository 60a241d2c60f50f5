"""A model with its hot weights in memory that is its own, and its experts nowhere.

It is made on the meta device, so that experts never take room; hot weights are read, not mapped: pages of a
file that is mapped would come and go at the kernel's will.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import json
import math
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from poise.errors import FileError, require
from poise.models.serving import steps
from poise.quantizers import PackedEmbedding, PackedLinear, ggml
from poise.quantizers.kernel import kernel
from poise.quantizers.layers import Stored
from poise.registry import build
from poise.walk import FAMILIES, Weight, replace_module, weights
from poise.walk.families import holds_experts
from poise_edgemoe import fused
from poise_edgemoe.kernels import bound_kernels
from poise_edgemoe.models import empty_model, in_full, model_class
from poise_edgemoe.store.index import CONFIG, HOT, Index, read_index
from poise_edgemoe.store.reader import mapped
from poise_edgemoe.store.schemes import BLOCKS, read_quantizer

HEAD_ROWS = 4096
GENERATION = "generation_config.json"
_CHUNK = 1 << 22
_LIBC = ctypes.CDLL(None)
_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}


def read_config(folder: Path) -> Any:
    """Return transformers' configuration of a store."""
    transformers = require("transformers", "edgemoe")
    try:
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileError(f"{folder}/config.json is not read by transformers: {error}") from None


def prepare(folder: Path) -> Index:
    """Read the index, and let libraries set themselves up: what they take is the process's, no model's."""
    index = read_index(folder)
    model_class(read_config(folder))
    _settle(getattr(torch, index.dtype))
    forms = [*index.quantizers, *([index.hot["quantizer"]] if index.hot else [])]
    if any(form["entry"] != "raw" for form in forms):  # compilers, the first time: not under a limit
        kernel()
        fused.library()
    if any(form["entry"] in BLOCKS for form in forms):
        ggml.kernel()
    give_back()
    return index


@cache
def _settle(dtype: torch.dtype) -> None:
    bound_kernels(dtype)  # before the first product
    warm(dtype)
    gc.collect()


def load_hot(folder: Path, index: Index) -> Any:
    """Return the model of a store with all but its routed experts loaded.

    Raises
    ------
    FileError
        For hot weights that are torn, altered, missing, or not this model's.
    """
    config = read_config(folder)
    model = empty_model(config, getattr(torch, index.dtype))
    _check_experts(model, index, folder)
    tensors = {k: v for path in hot_files(folder, index) for k, v in read_tensors(path, index).items()}
    experts = tuple(f"{layer.path}." for layer in index.layers)
    packed = {k: tensors.pop(k) for k in list(tensors) if ".packed." in k}
    _check_dtype(tensors, index, in_full(config), folder)
    try:
        _, extra = model.load_state_dict(tensors, strict=False, assign=True)
    except RuntimeError as error:  # of another shape
        raise FileError(f"{folder}: {str(error).splitlines()[-1].strip()}") from None
    model.tie_weights()
    _put_packed(model, index, packed)
    extra += list(packed)
    lost = [n for n, p in model.named_parameters() if p.is_meta and not n.startswith(experts)]
    if extra or lost:
        what = f"{extra[0]} is not of this model" if extra else f"{lost[0]} is missing"
        raise FileError(f"{folder}: {what} (hot weights of another model?)")
    _fill_buffers(model)
    _put_head(model)
    if GENERATION in index.files:  # it may name other end tokens than config.json; unlisted, nobody's
        model.generation_config = _generation(folder)
    return model.requires_grad_(False)


def _generation(folder: Path) -> Any:
    transformers = require("transformers", "edgemoe")
    try:
        return transformers.GenerationConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileError(f"{folder}/{GENERATION} is not read by transformers: {error}") from None


def _check_experts(model: nn.Module, index: Index, folder: Path) -> None:
    """Refuse an index whose layers are not the model's, in their order: bytes would be read as others.

    The model's modules are asked, not walked: of many experts the walk would hold too much.
    """
    own = {path: module for path, module in model.named_modules() if holds_experts(path)}
    paths = sorted(own, key=lambda path: not path.startswith("encoder."))
    if paths != (said := [layer.path for layer in index.layers]):
        raise FileError(f"{folder}: the index has experts in {', '.join(said)}, the model of {CONFIG} in "
                        f"{', '.join(paths)}")
    transposed = FAMILIES[index.family].transposed
    for layer in index.layers:
        shapes, biased, experts = expert_shapes(own[layer.path], transposed)
        facts = {"experts": (len(layer.experts), experts), "shapes": (layer.shapes, shapes),
                 "biased": (layer.biased, biased), "transposed": (layer.transposed, transposed),
                 "encoder": (layer.encoder, layer.path.startswith("encoder."))}
        for name, (here, there) in facts.items():
            if here != there:
                raise FileError(f"{folder}: the index says {name}={here} of {layer.path}, the model of "
                                f"{CONFIG} has {there}")


def expert_shapes(module: nn.Module, transposed: bool) -> tuple[dict[str, list[int]], list[str], int]:
    """Return shapes (out, in) by part, parts with a bias, and how many experts a module holds."""
    if isinstance(module, nn.ModuleDict):  # of Switch Transformers
        one = next(iter(module.values()))
        return {part: list(getattr(one, part).weight.shape) for part in ("wi", "wo")}, [], len(module)
    held = {name.removesuffix("_proj"): p for name, p in module.named_parameters(recurse=False)}
    shapes = {part: list(held[part].shape[1:])[:: -1 if transposed else 1] for part in ("gate_up", "down")}
    biased = sorted(name.removesuffix("_proj_bias") for name in held if name.endswith("_proj_bias"))
    return shapes, biased, len(held["down"])


def _check_dtype(
    tensors: dict[str, Tensor], index: Index, full: Callable[[str], bool], folder: Path
) -> None:
    """Refuse hot weights of another type than the index says; some are kept in float32 whatever it says."""
    for key, tensor in tensors.items():
        own = str(tensor.dtype).removeprefix("torch.")
        if tensor.is_floating_point() and own != index.dtype and not full(key):
            raise FileError(f"{folder}: the index says dtype={index.dtype}, and {key} is {own}")


class Head(nn.Linear):
    """The output layer, some thousand rows at a time: some processors lay a matrix out anew to multiply."""

    def forward(self, input: Tensor) -> Tensor:
        """Return logits, each as in one product."""
        out = input.new_empty(*input.shape[:-1], self.out_features)
        for at in range(0, self.out_features, HEAD_ROWS):
            rows = slice(at, at + HEAD_ROWS)
            bias = None if self.bias is None else self.bias[rows]
            out[..., rows] = nn.functional.linear(input, self.weight[rows], bias)
        return out


def _put_head(model: Any) -> None:
    head = model.get_output_embeddings()
    if type(head) is nn.Linear and head.weight.element_size() < 4:
        with torch.device("meta"):
            sliced = Head(head.in_features, head.out_features, bias=head.bias is not None)
        sliced.weight, sliced.bias = head.weight, head.bias
        model.set_output_embeddings(sliced)


def _put_packed(model: nn.Module, index: Index, tensors: dict[str, Tensor]) -> None:
    """Put packed layers in the place of those that the store has packed, and take their tensors out."""
    if not (names := set(index.hot.get("packed", ()))):
        return
    quantizer = read_quantizer(index.hot.get("quantizer"), "the index")
    found = [w for w in weights(model) if w.name in names]
    if unknown := sorted(names - {w.name for w in found}):
        raise FileError(f"{unknown[0]} is not of this model (hot weights of another model?)")
    for w in found:
        layout = quantizer.layout(w.shape, w.dtype)
        try:
            parts = {name: tensors.pop(f"{w.name}.packed.{name}") for name in layout}
        except KeyError as error:
            raise FileError(f"{error.args[0]} is missing (hot weights of another model?)") from None
        if {name: (tuple(t.shape), t.dtype) for name, t in parts.items()} != layout:
            raise FileError(f"{w.name} is not packed as the index says (hot weights of another model?)")
        _put_layers(model, w, quantizer, quantizer.from_tensors(parts, w.shape, w.dtype))


def _put_layers(model: nn.Module, weight: Weight, quantizer: Any, stored: Any) -> None:
    """Put packed layers over one matrix in the place of all that use it."""
    packed = Stored(stored, quantizer)
    for name in (weight.name, *weight.tied_with):
        like = model.get_submodule(name)
        if isinstance(like, nn.Embedding):
            replace_module(model, name, PackedEmbedding(packed))
        else:
            replace_module(model, name, PackedLinear(packed, quantizer, getattr(like, "bias", None), like))


@torch.no_grad()
def warm(dtype: torch.dtype) -> None:
    """Run a small model once, prompt and token: what libraries set up and read in is not a model's."""
    transformers = require("transformers", "edgemoe")
    from poise_edgemoe.kv import kept_cache

    config = transformers.MixtralConfig(
        vocab_size=512, hidden_size=256, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0)
    with torch.random.fork_rng(devices=[]):
        model = transformers.MixtralForCausalLM(config).to(dtype).eval()
        model.set_experts_implementation("eager")
        prompt, step = steps(model, torch.arange(48)[None], chunk=32, cache=kept_cache(config, 64))
        for ids in (prompt, prompt[:, :1], prompt[:, :1]):
            step(ids).float().softmax(-1).sort(-1).values.multinomial(1)
        build("quantizer", "affine", bits=4, group=64).quantize(model.lm_head.weight).dequantize()


def give_back() -> None:
    """Return memory that is free to the system: what a prompt took would stay with the process."""
    if hasattr(_LIBC, "malloc_trim"):
        _LIBC.malloc_trim(0)


def hot_files(folder: Path, index: Index) -> list[Path]:
    """Return the files of the hot weights."""
    return [folder / n for n in sorted(index.files) if n.startswith(HOT) and n.endswith(".safetensors")]


def read_tensors(path: Path, index: Index) -> dict[str, Tensor]:
    """Read a safetensors file into memory of our own, and check every byte.

    It is one place, in huge pages where the system has them: products go through all of it for every token,
    and are a half faster there.
    """
    digest, found = hashlib.sha256(), {}
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb", buffering=0) as f:
        length = int.from_bytes(_read(f, bytearray(8), path, digest), "little")
        size = index.files[path.name]["bytes"]
        if length > size:
            raise FileError(f"{path} is altered: its header says that it has {length} bytes")
        header = bytes(_read(f, bytearray(length), path, digest))
        entries = _entries(header, size - 8 - length, path)
        place, at = mapped(sum(_aligned(n) for *_, n in entries) or 1), 0
        for key, dtype, shape, nbytes in entries:
            tensor = (torch.frombuffer(place, dtype=torch.uint8, count=nbytes, offset=at) if nbytes
                      else torch.empty(0, dtype=torch.uint8))
            at += _aligned(nbytes)
            _read(f, memoryview(tensor.numpy()), path, digest)  # type: ignore[arg-type]
            found[key] = tensor.view(dtype).view(shape)
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if digest.hexdigest() != index.files[path.name]["sha256"]:
        raise FileError(f"{path} is altered: its checksum does not match")
    return found


def _aligned(nbytes: int) -> int:
    return -(-nbytes // 64) * 64


def _entries(header: bytes, size: int, path: Path) -> list[tuple[str, torch.dtype, list[int], int]]:
    """Return name, type, shape and bytes of every tensor, in the order in which they lie in the file.

    Nothing is set aside for a header that says more than the file holds.
    """
    try:
        said = {k: v for k, v in json.loads(header).items() if k != "__metadata__"}
        spans = sorted((*v["data_offsets"], k) for k, v in said.items())
        found = [(k, _TYPES[said[k]["dtype"]], list(said[k]["shape"]), end - at) for at, end, k in spans]
        whole = all(math.prod(shape) * dtype.itemsize == n for _, dtype, shape, n in found)
        follow = [at for at, _, _ in spans] == [0, *(end for _, end, _ in spans)][:-1]
        if whole and follow and sum(n for *_, n in found) == size:
            return found
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise FileError(f"{path} is altered: its header is not that of tensors which fill it")


def _read(f: Any, into: Any, path: Path, digest: Any) -> Any:
    """Fill a buffer from a file."""
    view = memoryview(into)
    for at in range(0, len(view), _CHUNK):
        part, got = view[at: at + _CHUNK], 0
        while got < len(part):
            n = f.readinto(part[got:])
            if not n:
                raise FileError(f"{path} is torn: it ends too early")
            got += n
        digest.update(part)
    return into


def _fill_buffers(model: nn.Module) -> None:
    """Make buffers that no file holds (the frequencies of rotary embeddings), as transformers does."""
    for module in model.modules():
        empty = {n: b for n, b in module._buffers.items() if b is not None and b.is_meta}
        for name, buffer in empty.items():
            module._buffers[name] = torch.empty_like(buffer, device="cpu")
        if empty:
            model._init_weights(module)  # type: ignore[operator] - of transformers' models
