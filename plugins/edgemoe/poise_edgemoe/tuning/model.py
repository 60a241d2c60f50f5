"""A model to be tuned whose hot weights are in memory, and whose experts are in a store."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from poise.errors import ConfigError
from poise.quantizers.whole import stored_bytes
from poise.walk import replace, weights
from poise.walk.experts import Experts
from poise_edgemoe.kernels import bound_kernels
from poise_edgemoe.loading import Head, give_back, load_hot
from poise_edgemoe.store.index import EXPERTS, Index
from poise_edgemoe.tuning.layers import StreamedExpert
from poise_edgemoe.tuning.shelf import Shelf


def open_streamed(
    folder: Path | str, *, dtype: str | None = None, recompute: bool = True, direct: bool = True
) -> Any:
    """Return the model of a store, to be tuned: its experts by an adapter, all else like any model.

    It computes what transformers' plain loop over experts computes with the matrices that the store holds,
    bit for bit, gradients too. Experts are read when their layer is reached, forward and backward: those of
    one layer are in memory at a time.

    Parameters
    ----------
    folder : path
        A store.
    dtype : "float32", optional
        What is computed in, whatever the store's type: hot weights are cast once, experts at each use.
    recompute : bool
        Whether activations within a layer are made again in the backward pass (of a model in training)
        rather than kept: one layer's are in memory at a time.
    direct : bool
        Whether to read past the page cache where the file system allows it.

    Raises
    ------
    FileError
        For a store that is torn, altered, or of a newer version.
    """
    shelf = Shelf(folder, direct=direct)
    bound_kernels(getattr(torch, dtype or shelf.index.dtype))  # batches of many lengths leave none behind
    model = load_hot(Path(folder), shelf.index).requires_grad_(True)
    _plain_head(model)
    _stream_experts(model, shelf)
    _put_biases(model, shelf)
    if recompute:
        _recompute(model)
    return model if dtype is None else model.to(getattr(torch, dtype))


def open_told(folder: Path, **how: Any) -> Any:
    """Open a store as `open_streamed` does, and say on stderr what will be in memory."""
    model = open_streamed(folder, **how)
    if model.config.is_encoder_decoder:
        raise ConfigError(f"{folder} holds a {type(model).__name__}, an encoder with a decoder: runs tune "
                          f"models that continue a text; tune it over open_streamed, in a loop of your own")
    shelf = shelf_of(model)
    hot, experts = stored_bytes(model)["total"], shelf.index.files[EXPERTS]["bytes"]
    print(f"poise: {hot / 1e6:.1f} MB of hot weights are in memory, and of {experts / 1e6:.1f} MB of "
          f"experts in {folder} those of one layer at a time, at most {shelf.layer_bytes / 1e6:.1f} MB; "
          f"experts train by an adapter only",
          file=sys.stderr, flush=True)
    return model


def shelf_of(model: nn.Module) -> Shelf:
    """Return what a streamed model reads its experts from."""
    return next(m._shelf[0] for m in model.modules() if isinstance(m, StreamedExpert))


def _plain_head(model: Any) -> None:
    """Put an ordinary layer in the place of the one that multiplies in parts, which no adapter can take."""
    head = model.get_output_embeddings()
    if type(head) is Head:
        with torch.device("meta"):
            plain = nn.Linear(head.in_features, head.out_features, bias=head.bias is not None)
        plain.weight, plain.bias = head.weight, head.bias
        model.set_output_embeddings(plain.train(head.training))


def _stream_experts(model: nn.Module, shelf: Shelf) -> None:
    numbers = {layer.path: n for n, layer in enumerate(shelf.index.layers)}
    for w in [w for w in weights(model) if w.role == "expert"]:
        assert w.expert is not None
        n = numbers[w.name.rsplit(".", 2)[0]]
        replace(w, StreamedExpert(shelf, n, w.expert.number, w.expert.part, w).train(model.training))
    for module in model.modules():
        if isinstance(module, Experts):
            module.unfuse()  # all have a layer of their own: the empty parameter goes
    for path, n in numbers.items():
        model.get_submodule(path).register_forward_pre_hook(_announcer(shelf, n), with_kwargs=True)


def _announcer(shelf: Shelf, n: int) -> Any:
    """Return a hook that has a layer's experts read, in the order in which the loop over them asks."""

    def announce(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        give_back()  # what the layer before has left in pieces
        shelf.announce(n, used_experts((*args, *kwargs.values()), len(shelf.index.layers[n].experts)))

    return announce


def used_experts(given: Iterable[Any], experts: int) -> list[int]:
    """Return the experts that a block's experts are called for: by their numbers, or one-hot (Switch)."""
    chosen = next(t for t in given if isinstance(t, Tensor) and not t.is_floating_point())
    if chosen.ndim == 3:  # (rows, time, experts)
        return torch.where(chosen.flatten(0, 1).any(0))[0].tolist()
    return [e for e in torch.unique(chosen).tolist() if e < experts]  # one more is nobody: masked


def _put_biases(model: nn.Module, shelf: Shelf) -> None:
    """Read biases of experts, which are few numbers: they stay in memory with the hot weights."""
    index: Index = shelf.index
    for n, layer in enumerate(index.layers):
        module = model.get_submodule(layer.path)
        for part in layer.biased:
            read = [shelf.matrix(n, e, part)[1] for e in range(len(layer.experts))]
            made = torch.stack([bias for bias in read if bias is not None])
            module.register_parameter(f"{part}_proj_bias", nn.Parameter(made))


def _recompute(model: Any) -> None:
    how = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=how)
    else:  # of an earlier transformers
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
    # with it comes a hook that has embeddings require a gradient: layers below what trains would be gone
    # through backward too
    model.disable_input_require_grads()
