"""A dense model as a mixture of experts that says the same: feed-forward layers cut into slices.

A gated feed-forward layer is down(act(gate x) * up x), a sum over its inner columns. Experts that each have
a slice of them, all of them chosen for every token, sum to it again. A Mixtral does so when its routers are
0: softmax over equal logits gives each of n experts 1/n, which `down` times n undoes. Ours: a model whose
answers are known, to run an engine on; not a part of the paper.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from poise.errors import ConfigError, require
from poise_edgemoe.models import empty_model

DENSE = ("llama", "mistral")  # blocks that differ from Mixtral's in nothing but the feed-forward layer
_MATRICES = ("gate_proj", "up_proj", "down_proj")


def split_feed_forward(model: Any, experts: int = 8) -> Any:
    """Turn a dense model into a `MixtralForCausalLM` with the same logits, to rounding.

    The model is used up: what is no feed-forward layer goes over as it is, and each of those is let go as
    soon as it is split, so that one block at most is in memory twice. Nothing is taken from a model that is
    refused.

    Parameters
    ----------
    model : LlamaForCausalLM or MistralForCausalLM
        On the CPU, without biases.
    experts : int
        Slices of each feed-forward layer, all of which every token uses. A power of two scales exactly.

    Raises
    ------
    ConfigError
        For another model, one that is packed or adapted, or an inner width that the experts do not divide.
    """
    _check(model, experts)
    split = empty_model(_config(model.config, experts), model.dtype)
    wanted = {k: v.shape for k, v in split.state_dict().items() if ".mlp." not in k}
    shared = {k: v for k, v in model.state_dict().items() if ".mlp." not in k}
    blocks, made = model.model.layers, split.model.layers
    for block in blocks:
        _check_block(block.mlp, model.config)
    if odd := sorted(wanted.items() ^ {k: v.shape for k, v in shared.items()}.items()):
        raise ConfigError(f"{type(model).__name__} is not a plain Llama: {odd[0][0]} is more than a "
                          f"Mixtral has, or missing; only models without biases and adapters are split")
    split.load_state_dict(shared, strict=False, assign=True)
    split.tie_weights()
    split.model.rotary_emb = type(split.model.rotary_emb)(split.config)
    for dense, block in zip(blocks, made, strict=True):
        block.mlp.experts.gate_up_proj, block.mlp.experts.down_proj = _slices(dense.mlp, experts)
        block.mlp.gate.weight = nn.Parameter(torch.zeros_like(block.mlp.gate.weight, device="cpu"))
        dense.mlp = nn.Identity()
    split.set_experts_implementation("eager")
    return split


def _check(model: Any, experts: int) -> None:
    """Refuse what cannot be split, by its configuration."""
    config: Any = getattr(model, "config", None)
    kind = getattr(config, "model_type", type(model).__name__)
    if kind not in DENSE or not hasattr(model, "lm_head"):
        raise ConfigError(f"{type(model).__name__} is of the family {kind!r}: only dense language models "
                          f"of {', '.join(DENSE)} are split into experts")
    if isinstance(experts, bool) or not isinstance(experts, int) or experts < 2:
        raise ConfigError(f"experts={experts!r} is not allowed: it must be a whole number >= 2")
    if config.intermediate_size % experts:
        raise ConfigError(f"experts={experts} do not divide the inner width {config.intermediate_size} of "
                          f"the feed-forward layers: give a divisor")


def _check_block(mlp: nn.Module, config: Any) -> None:
    """Refuse a feed-forward layer that is not three plain matrices."""
    inner, hidden = config.intermediate_size, config.hidden_size
    shapes = {f"{name}.weight": (inner, hidden) for name in _MATRICES[:2]}
    shapes["down_proj.weight"] = (hidden, inner)
    if {k: tuple(v.shape) for k, v in mlp.state_dict().items()} != shapes:
        there = ", ".join(mlp.state_dict()) or "nothing"
        raise ConfigError(f"a feed-forward layer holds {there}: only plain {', '.join(_MATRICES)} without "
                          f"biases are split (was this model split before?)")


def _config(dense: Any, experts: int) -> Any:
    """Return a Mixtral's configuration for a dense one's."""
    transformers = require("transformers", "edgemoe")
    same = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_parameters",
            "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings")
    return transformers.MixtralConfig(
        **{name: getattr(dense, name) for name in same}, dtype=dense.dtype,
        sliding_window=getattr(dense, "sliding_window", None), num_local_experts=experts,
        num_experts_per_tok=experts, intermediate_size=dense.intermediate_size // experts)


def _slices(mlp: Any, experts: int) -> tuple[nn.Parameter, nn.Parameter]:
    """Return gate and up, (n, 2 inner / n, hidden), and down, (n, hidden, inner / n), of n experts."""
    gate, up = (m.weight.detach().unflatten(0, (experts, -1)) for m in (mlp.gate_proj, mlp.up_proj))
    down: Tensor = mlp.down_proj.weight.detach().unflatten(1, (experts, -1)).transpose(0, 1)
    return nn.Parameter(torch.cat((gate, up), 1)), nn.Parameter(down.contiguous().mul_(experts))
