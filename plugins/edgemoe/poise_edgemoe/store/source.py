"""Where a store's weights come from: a transformers directory, tensor by tensor, or a live model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from poise.errors import ConfigError, FileError, require
from poise.walk import FAMILIES, Weight, open_others, open_weights, weights
from poise_edgemoe.models import in_full
from poise_edgemoe.store.index import PARTS, SERVED

if TYPE_CHECKING:
    from torch import Tensor

BIAS = re.compile(r"(?P<experts>.*\bexperts)\.(?P<part>\w+)_proj_bias")


@dataclass(frozen=True)
class MoELayer:
    """The experts of one block.

    Parameters
    ----------
    path : str
        Of the module that holds them, `model.layers.3.mlp.experts`.
    encoder : bool
        Whether it lies in an encoder.
    transposed : bool
        Whether the model keeps them as (in, out).
    experts : list of dict
        Part (of `PARTS`, in their order) to weight, for each expert.
    """

    path: str
    encoder: bool
    transposed: bool
    experts: list[dict[str, Weight]]


@dataclass(frozen=True)
class Source:
    """A mixture-of-experts model as it is read for a store.

    Parameters
    ----------
    config : transformers' configuration
    layers : list of MoELayer
        Encoder before decoder.
    others : callable
        Yields (key, read) of every tensor, keys as in memory; experts' matrices may be left out.
    directory : Path or None
        Where it lies, when in files.
    """

    config: Any
    layers: list[MoELayer]
    others: Callable[[], Iterator[tuple[str, Callable[[], Tensor]]]]
    directory: Path | None = None

    @property
    def family(self) -> str:
        """transformers' `model_type`."""
        return self.config.model_type

    def rest(self) -> dict[str, Callable[[], Tensor]]:
        """Return what reads each tensor that is no expert's matrix, by key."""
        experts = {w.state_key for layer in self.layers for one in layer.experts for w in one.values()}
        return {key: read for key, read in self.others() if key not in experts}

    def biases(self) -> dict[str, dict[str, Tensor]]:
        """Return biases of experts, (experts, out), by path and part; most families have none."""
        found: dict[str, dict[str, Tensor]] = {}
        for key, read in self.rest().items():
            if hit := BIAS.fullmatch(key):
                found.setdefault(hit["experts"], {})[hit["part"]] = read()
        return found


def open_source(model: Any) -> Source:
    """Return a model's weights as a store needs them.

    Parameters
    ----------
    model : path or nn.Module
        A transformers directory, or a transformers model.

    Raises
    ------
    ConfigError
        For a family that is not served, or a model without routed experts.
    FileError
        For files that are missing or torn.
    """
    if isinstance(model, (str, Path)):
        return _directory(Path(model))
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "model_type"):
        raise ConfigError(f"{type(model).__name__} is neither a directory nor a transformers model")
    _check_family(config.model_type, type(model).__name__)

    found = list(weights(model))
    _refuse_live(model, found)

    def others() -> Iterator[tuple[str, Callable[[], Tensor]]]:
        return ((key, lambda t=tensor: t) for key, tensor in model.state_dict().items())

    return Source(config, _layers(iter(found), type(model).__name__, config.model_type), others)


def _refuse_live(model: Any, found: list[Weight]) -> None:
    """Refuse a model whose weights are not there, or whose experts are not each its own."""
    for key, tensor in model.state_dict().items():
        if tensor.is_meta:
            raise ConfigError(f"{key} lies on the meta device, which holds no numbers: load the model's "
                              f"weights before it is converted")
    for w in found:
        if w.role == "expert" and (others := (*w.tied_with, *w.overlaps)):
            raise ConfigError(f"{w.name} is one weight with {others[0]}, and a store has each expert by "
                              f"itself: give each its own, nn.Parameter(weight.detach().clone())")


def _directory(directory: Path) -> Source:
    transformers = require("transformers", "edgemoe")
    if not (directory / "config.json").is_file():
        raise FileError(f"{directory} has no config.json: give a transformers directory")
    try:
        config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileError(f"{directory}/config.json is not read by transformers: {error}") from None
    _check_family(config.model_type, str(directory))
    full = in_full(config)
    return Source(config, _layers(open_weights(directory), str(directory), config.model_type),
                  lambda: open_others(directory, full), directory)


def _check_family(family: Any, what: str) -> None:
    if family not in SERVED:
        raise ConfigError(f"{what} is of the family {family!r}, which is not served (known: "
                          f"{', '.join(SERVED)})")


def _layers(found: Iterator[Weight], what: str, family: str) -> list[MoELayer]:
    """Group the experts' matrices by block and expert."""
    blocks: dict[str, dict[int, dict[str, Weight]]] = {}
    for w in found:
        if w.role == "expert" and w.expert is not None:
            path = w.name.rsplit(".", 2)[0]
            blocks.setdefault(path, {}).setdefault(w.expert.number, {})[w.expert.part] = w
    if not blocks:
        raise ConfigError(f"{what} has no routed experts: a store is for mixture-of-experts models")
    layers = []
    for path, experts in blocks.items():
        parts = {frozenset(one) for one in experts.values()}
        if sorted(experts) != list(range(len(experts))) or len(parts) != 1:
            raise FileError(f"{what}: the experts of {path} are not whole")
        ordered = [{p: experts[e][p] for p in PARTS if p in experts[e]} for e in range(len(experts))]
        flipped = FAMILIES[family].transposed
        layers.append(MoELayer(path, path.startswith("encoder."), flipped, ordered))
    return sorted(layers, key=lambda one: not one.encoder)
