"""Bone on a model: which layers, and what is attached."""

from __future__ import annotations

import logging
import math
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from poise.adapters import AdaptedLayer, AttachedLayers, attach_layers, choose_layers
from poise.errors import ConfigError
from poise.walk import Weight, matches
from poise_bone.functional import block_shape, combine
from poise_bone.layers import LAYERS, BlockLayer, Blocks
from poise_bone.other_layers import ConvLayer, EmbeddingLayer, conv_shape, embedding_shape
from poise_bone.variants import ADDED

_KINDS = {
    "linear": ("linear", "linears"), "router": ("router", "routers"), "expert": ("matrix", "matrices"),
    "conv": ("convolution", "convolutions"), "embedding": ("embedding", "embeddings"),
}
_log = logging.getLogger("poise.bone")


@dataclass(frozen=True)
class _Form:
    """The options that make a layer."""

    variant: str
    r: int
    mini_r: int | None
    tiles: tuple[int, int]
    scale: float | str
    dropout: float
    rank_pattern: Mapping[str, int]

    def rank(self, name: str) -> int:
        found = [r for pattern, r in self.rank_pattern.items() if matches(name, pattern)]
        return found[-1] if found else self.r

    def shape(self, w: Weight) -> tuple[int, ...]:
        """Return the shape of a weight's block; refused with its name."""
        r = self.rank(w.name)
        try:
            if w.role == "conv":
                return conv_shape(w.module, self.variant, r, self.mini_r)
            if w.role == "embedding":
                return embedding_shape(w.module, self.variant, r)
            return block_shape(self.variant, *w.shape, r, self.mini_r, self.tiles)
        except ConfigError as error:
            raise ConfigError(f"bone: {w.name} {w.shape}: {error}") from None

    def factor(self, w: Weight, shape: tuple[int, ...]) -> float:
        """Return what the change is multiplied by: sqrt(r / inputs) gives the tiling rows of norm 1."""
        return math.sqrt(shape[0] / w.shape[1]) if isinstance(self.scale, str) else float(self.scale)

    def layer(self, w: Weight, shared: tuple[Blocks, int] | None) -> BlockLayer:
        shape = self.shape(w)
        options: dict[str, Any] = {"scale": self.factor(w, shape), "dropout": self.dropout}
        if w.role == "conv":
            conv: Any = w.module
            return ConvLayer(w.layer, self.variant, conv.in_channels, shape, **options)
        if w.role == "embedding":
            return EmbeddingLayer(w.layer, shape, **options)
        return LAYERS[self.variant](w.layer, shape, shared=shared, **options)


def adapt(
    model: nn.Module, *, adapter: Any, name: str, target_modules: list[str] | None,
    exclude_modules: list[str] | None, tiles: Sequence[int], **form: Any,
) -> AttachedBone:
    """Put Bone's layers on the matching weights and freeze all else; see `Bone.attach`."""
    wanted = None if target_modules == ["all_linear"] else target_modules
    chosen = choose_layers(model, "bone", wanted, exclude_modules, ("linear", "expert"),
                           if_named=("conv", "embedding"))
    made = _Form(tiles=(tiles[0], tiles[1]), **form)
    _check_ranks(chosen, made)
    shared = _shared_blocks(chosen, made)
    layers = {w.name: made.layer(w, shared.get(w.name)) for w in chosen}
    attached: AttachedBone = attach_layers(
        model, layers, chosen, adapter=adapter, name=name, cls=AttachedBone)
    attached.matched = _matched(chosen)
    attached.fused = {w.name: w.state_key for w in chosen if w.name in shared}
    _log.info("bone: %s adapts %s", name, attached.matched)
    return attached


def _check_ranks(chosen: list[Weight], form: _Form) -> None:
    for pattern in form.rank_pattern:
        if not any(matches(w.name, pattern) for w in chosen):
            raise ConfigError(f"bone: rank_pattern {pattern!r} matches none of the {len(chosen)} layers")
    if form.variant == "mini" and form.mini_r == 1:
        warnings.warn("bone: mini_r=1 gives all outputs of a layer the same change: raise it", stacklevel=4)
    for w in chosen:
        form.shape(w)


def _shared_blocks(chosen: list[Weight], form: _Form) -> dict[str, tuple[Blocks, int]]:
    """Return one parameter for the experts of each fused one, and each expert's place in it."""
    groups: dict[str, list[Weight]] = {}
    for w in chosen:
        if w.index is not None:
            groups.setdefault(w.state_key, []).append(w)
    found = {}
    for key, group in groups.items():
        shapes = {form.shape(w) for w in group}
        if len(shapes) > 1:
            raise ConfigError(f"bone: experts of {key} would have blocks of shapes {sorted(shapes)}: they "
                              f"share one parameter, so give them one r")
        first = group[0]
        dtype = torch.promote_types(first.dtype, torch.float32)
        blocks = Blocks(len(group), shapes.pop(), dtype, first.read(slice(0, 1)).device)
        found |= {w.name: (blocks, number) for number, w in enumerate(group)}
    return found


def _matched(chosen: list[Weight]) -> str:
    """Say how many layers of which kind, and of how many experts."""
    kinds = Counter(("packed " if w.stored is not None else "", w.role) for w in chosen)
    experts = {(w.state_key.rpartition(".")[0], w.expert.number) for w in chosen if w.expert is not None}
    said = [f"{n} {packed}{_KINDS[role][n > 1]}" for (packed, role), n in kinds.items()]
    return ", ".join(said) + (f" of {len(experts)} experts" if experts else "")


class AttachedBone(AttachedLayers):
    """A Bone adapter on a model."""

    matched: str = ""
    """What was matched, in words."""
    fused: Mapping[str, str] = {}
    """For an expert's layer, the name of the fused parameter."""
    foreign: Mapping[str, Any] = {}
    """Fields of an adapter file of another library that say nothing here; they are written back."""

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the blocks by name; experts of a fused parameter have one, (E, ...), under its name."""
        for name, layer in self.layers.items():
            yield from ((f"{self.fused.get(name, name)}.D", t) for t in layer.own().values())

    def report(self) -> dict[str, Any]:
        """Return the variant, what was matched, parameters and bytes, and the blocks' largest entry."""
        largest = max(float(t.detach().abs().max()) for _, t in self.tensors())
        return {"method": "bone", "variant": self.adapter.variant, "r": self.adapter.r,
                "matched": self.matched, **super().report(), "largest_change": largest}


def combine_adapters(
    adapters: Sequence[AttachedBone], weights: Sequence[float], name: str = "combined"
) -> AttachedBone:
    """Attach one adapter that acts as a weighted sum of others, each on the base alone; those are switched
    off.

    Raises
    ------
    ConfigError
        When they are on different models, or differ in their options; when one is folded, merged or
        detached; when another one attached after them acts on the same weights, which would come before
        the sum then. Nothing is switched in these cases.
    """
    if len({id(a.model) for a in adapters}) != 1 or len({repr(a.adapter) for a in adapters}) != 1:
        raise ConfigError("only adapters on one model that have the same options can be combined")
    states = [a.state_dict() for a in adapters]
    summed = {key: combine([s[key] for s in states], weights) for key in states[0]}
    _refuse_uncombinable(adapters)
    active = [a for a in adapters if a.active]
    for one in adapters:
        one.active = False
    try:
        made: AttachedBone = adapters[0].adapter.attach(adapters[0].model, name)
    except ConfigError:
        for one in active:
            one.active = True
        raise
    made.load_state_dict(summed)
    return made


def _refuse_uncombinable(adapters: Sequence[AttachedBone]) -> None:
    """Raise `ConfigError` where switching these off and one on changes more than what they do."""
    names = {a.name for a in adapters}
    for one in adapters:
        if one.gone or one.folded:
            state, verb = ("gone from the model", "attach") if one.gone else ("folded", "unfold")
            raise ConfigError(f"{one.name} is {state} and cannot be combined: {verb} it first")
        for layer in one.layers.values():
            later = [a.adapter for a in _after(one.model, layer)
                     if a.adapter not in names and (a.acts or a.folded) and not _are_added(a, layer)]
            if later:
                raise ConfigError(f"{later[0]!r} was attached after {one.name!r} and would act before the "
                                  f"combination: detach or switch off {later[0]!r} first")


def _are_added(*layers: AdaptedLayer) -> bool:
    """Tell whether the order of changes says nothing."""
    return all(getattr(layer, "variant", None) in ADDED for layer in layers)


def _after(model: nn.Module, layer: BlockLayer) -> list[AdaptedLayer]:
    """Return later adapters' layers on the weight of one."""
    return [m for m in model.modules() if isinstance(m, AdaptedLayer) and m is not layer
            and any(below is layer for below in m.chain())]
