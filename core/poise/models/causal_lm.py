"""Causal language models from local directories, random ones, and writing them back."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from poise.errors import ConfigError, FileError, nearest, require
from poise.files import make_folder, read_json, sync_folder, write_shards
from poise.models.tokenizers import ByteTokenizer, load_tokenizer
from poise.walk import checkpoint

if TYPE_CHECKING:
    from torch import Tensor, nn

# names that configs of transformers have for one thing; all that a config has are set
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_SHARD = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
_READ = ("config", "generation_config", "adapter_config", "model.")  # JSON files of transformers
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")

__all__ = ["ByteTokenizer", "load", "load_tokenizer", "random", "save_model"]


# ------------------------------------------------------------------ local directories


def load(options) -> nn.Module:
    """Load a directory of safetensors; nothing is fetched and no code of its own is run.

    Raises
    ------
    ConfigError
        For a directory that is missing, of an unknown kind, or has only pickled weights.
    FileError
        For files that are torn, no regular files, or lack a weight.
    """
    transformers = require("transformers", "bone")
    import torch

    directory = Path(options.path)
    _check_directory(directory, transformers)
    try:
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            directory, local_files_only=True, use_safetensors=True, trust_remote_code=False,
            dtype=getattr(torch, options.dtype), output_loading_info=True,
        )
    except Exception as error:  # damaged weights and configurations fail in any way
        torn = type(error).__name__ == "SafetensorError"
        fault = "has a torn safetensors file" if torn else "does not load"
        raise FileError(f"{directory} {fault}: {_line(error)}") from error
    if lost := sorted(found["missing_keys"]):  # transformers would leave random numbers there
        raise FileError(f"{directory} lacks {lost[0]} ({len(lost)} weight{'s' * (len(lost) > 1)} of "
                        f"{type(model).__name__}): it is torn or altered, or another kind of model")
    return model.eval()


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _check_directory(directory: Path, transformers: Any) -> None:
    """Refuse what cannot or must not be loaded, before anything is."""
    if not directory.is_dir():
        raise ConfigError(f"CausalLM.path={str(directory)!r} is not a directory on this machine "
                          f"(nothing is fetched from a hub)")
    if not (directory / "config.json").is_file():
        raise ConfigError(f"{directory} has no config.json: it is no transformers model")
    _check_files(directory)
    config = read_json(directory / "config.json")
    if not isinstance(config, dict):
        raise FileError(f"{directory / 'config.json'} is no model's configuration")
    kind = config.get("model_type")
    kind = kind if isinstance(kind, str) else None
    if kind not in transformers.CONFIG_MAPPING:
        own = " (its auto_map names code of its own, which is never run)"
        raise ConfigError(
            f"{directory}: transformers {transformers.__version__} does not know model_type "
            f"{kind!r}{own if 'auto_map' in config else ''}"
            f"{nearest(str(kind), list(transformers.CONFIG_MAPPING))}"
        )
    if not any(directory.glob("*.safetensors")):
        pickles = sorted(p.name for pattern in _PICKLES for p in directory.glob(pattern))
        found = f"only pickled weights ({', '.join(pickles)}), which are never loaded" \
            if pickles else "no weights"
        raise ConfigError(f"{directory} has {found}: save the model as safetensors")


def _check_files(directory: Path) -> None:
    """Refuse what transformers may open and never finish reading: pipes, devices, broken or huge JSON."""
    for path in sorted(directory.iterdir()):
        if not path.is_file() and not path.is_dir():
            raise FileError(f"cannot read {path}: it is no regular file")
        if path.suffix == ".json" and path.name.startswith(_READ):
            read_json(path)


def save_model(
    model: Any, tokenizer: Any, directory: Path | str,
    pairs: Iterable[tuple[str, Tensor]] | None = None,
) -> Path:
    """Write a plain transformers directory: config, safetensors, tokenizer; one shard in memory.

    Files are moved into place when all are written, config.json last.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    tokenizer : ByteTokenizer, FastTokenizer or None
    directory : path
        Made when missing; files of the same names are replaced.
    pairs : iterable of (key, tensor), optional
        Weights to write instead of the model's own (an adapter's `folded_weights`).

    Raises
    ------
    ConfigError
        For a model that transformers cannot save.
    FileError
        When the directory cannot be written.
    """
    if not hasattr(model, "save_pretrained"):
        raise ConfigError(f"{type(model).__name__} is no transformers model: it cannot be saved "
                          f"as a directory")
    directory = Path(directory)
    try:
        make_folder(directory)
        with tempfile.TemporaryDirectory(dir=directory, prefix=".saving-") as fresh:
            _write(model, tokenizer, Path(fresh), directory, checkpoint(model) if pairs is None else pairs)
    except OSError as error:
        raise FileError(f"cannot write {directory}: {error.strerror or error}") from error
    return directory


def _write(
    model: Any, tokenizer: Any, fresh: Path, directory: Path, pairs: Iterable[tuple[str, Tensor]]
) -> None:
    """Write to `fresh`, then move every file to `directory`."""
    model.save_pretrained(fresh, state_dict={})  # all but the weights
    write_shards(_as_on_disk(model, pairs), fresh)
    if tokenizer is not None:
        tokenizer.save(fresh)
    fresh_names = {p.name for p in fresh.iterdir()}
    for old in directory.iterdir():
        if _SHARD.fullmatch(old.name) and old.name not in fresh_names:  # of an earlier save
            old.unlink()
    for path in sorted(fresh.iterdir(), key=lambda p: p.name == "config.json"):
        os.replace(path, directory / path.name)
    sync_folder(directory)


def _as_on_disk(model: Any, pairs: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield a checkpoint's entries as transformers writes them: experts apart, tied tensors once."""
    from transformers.core_model_loading import revert_weight_conversion

    pairs_of = (getattr(model, "all_tied_weights_keys", None) or {}).items()
    live = dict(model.named_parameters(remove_duplicate=False))
    # a key that transformers knows as tied may have a weight of its own by now
    tied = {key for key, source in pairs_of if key in live and live[key] is live.get(source)}
    for key, tensor in pairs:
        if key not in tied:
            yield from revert_weight_conversion(model, {key: tensor}).items()


# ------------------------------------------------------------------ random models


def random(options) -> nn.Module:
    """Return a random model of a transformers class (torch's global generator decides).

    Raises
    ------
    ConfigError
        For a class that does not exist, options it has no use for, or sizes it refuses.
    """
    import torch

    transformers = require("transformers", "bone")
    cls = _architecture(options.architecture, transformers)
    fields = _fields(options, cls.config_class)
    try:
        config = cls.config_class(**{**fields, **options.overrides})
        # not model.to(dtype), which would round the rotary tables too
        return cls._from_config(config, dtype=getattr(torch, options.dtype))
    # configs validate themselves, each with errors of its own
    except Exception as error:
        raise ConfigError(
            f"{options.architecture} refuses these options ({_line(error)}): see `overrides`"
        ) from error


def _architecture(name: str, transformers: Any) -> Any:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    known = sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()))
    if name not in known:
        raise ConfigError(
            f"CausalLM.architecture={name!r} is no causal language model of transformers "
            f"{transformers.__version__}{nearest(name, known)} ({len(known)} are known)"
        )
    return getattr(transformers, name)


def _fields(options, config_class: type) -> dict[str, Any]:
    """Put the options under the names that this config class has for them."""
    plain = config_class()
    wide = options.intermediate_size or 2 * options.hidden_size
    # byte tokens: 256 ends a text; other vocabularies get their last token
    last = min(ByteTokenizer.eos_id, options.vocab_size - 1)
    wanted = {
        "vocab_size": options.vocab_size,
        "hidden_size": options.hidden_size,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.heads,
        "num_key_value_heads": options.kv_heads or options.heads,
        "head_dim": options.hidden_size // options.heads,
        "max_position_embeddings": options.context,
        "intermediate_size": wide,
        "moe_intermediate_size": wide,
        "shared_expert_intermediate_size": wide,
        "n_inner": wide,
        # without padding: a padding token's embedding would never train
        "bos_token_id": last, "eos_token_id": last, "pad_token_id": None,
        **_experts(options, plain),
    }
    if hasattr(plain, "qk_rope_head_dim"):
        # multi-head latent attention derives head_dim from its parts
        del wanted["head_dim"]
    alias = getattr(config_class, "attribute_map", None) or {}
    return {alias.get(k, k): v for k, v in wanted.items() if hasattr(plain, k)}


def _experts(options, plain: Any) -> dict[str, int]:
    names = [name for name in _EXPERTS if hasattr(plain, name)]
    if not names:
        if options.experts or options.experts_per_token:
            raise ConfigError(f"{options.architecture} has no experts: leave `experts` and "
                              f"`experts_per_token` out, or take OlmoeForCausalLM")
        return {}
    experts = options.experts or 4
    used = options.experts_per_token or min(2, experts)
    if used > experts:
        raise ConfigError(f"CausalLM.experts_per_token={used} is more than experts={experts}")
    return {**dict.fromkeys(names, experts), "num_experts_per_tok": used}
