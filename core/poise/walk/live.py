"""The walk over a live model, and what is chosen by it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from poise.errors import ConfigError, nearest
from poise.walk.experts import fused_weights
from poise.walk.families import Family, family, holds_experts, placed
from poise.walk.foreign import foreign_weights
from poise.walk.memory import overlapping
from poise.walk.plain import children, joined, matrix, own_tensors
from poise.walk.weight import Child, Weight


def weights(model: nn.Module) -> Iterator[Weight]:
    """Yield every weight matrix of a model exactly once.

    Covers linears, GPT-2's Conv1D (as its transpose), convolutions, embeddings, each expert of a fused
    3-D parameter, whatever a module with `held_weights` holds for them, and any other parameter of two or
    more dimensions that is not a bias. Tied tensors are met under their first name; `tied_with` lists the
    others. Parameters that are not one and share memory are met each; `overlaps` says so.
    """
    kinds, shared = _families(model), overlapping(model)
    found: dict[tuple[Any, ...], list[Weight]] = {}
    for weight in placed(held(model, ""), kinds):
        found.setdefault(weight.key, []).append(weight)
    for first, *others in found.values():
        names = tuple(dict.fromkeys(w.name for w in others if w.name != first.name))
        mine = first.module, first.parameter
        again = {w.name: w.slot for w in others if (w.module, w.parameter) == mine}
        overlaps = shared.get(first.key[0], ())
        more = names or overlaps
        yield replace(first, tied_with=names, again=again, overlaps=overlaps) if more else first


def held(module: nn.Module, path: str) -> Iterator[Weight]:
    """Yield every weight below a module, descending each path once.

    A module that packs, adapts or otherwise stands in for layers has a method
    `held_weights(path) -> Iterator[Weight]`, which speaks for all below it.
    """
    if (spoken := speaks(module, path)) is not None:
        yield from spoken
        return
    for name, tensor in own_tensors(module):
        if tensor.ndim == 3 and holds_experts(path):
            yield from fused_weights(module, path, name)
        else:
            yield matrix(module, path, name, tensor)
    for name, child in children(module):
        for weight in held(child, joined(path, name)):
            # the parent of whatever holds the weight is where another layer would be put
            yield weight if weight.slot else replace(weight, slot=Child(module, name))


def speaks(module: nn.Module, path: str) -> Iterator[Weight] | None:
    """Return what a module says that it holds, or what is known of another library's; None otherwise.

    A child called `held_weights` says nothing.
    """
    hook: Any = getattr(module, "held_weights", None)
    if callable(hook) and not isinstance(hook, nn.Module):
        said: Any = hook(path)
        return said
    return foreign_weights(module, path)


def _families(model: nn.Module) -> dict[str, Family]:
    """Return the family of every transformers model at or below a module, by its path."""
    found: dict[str, Family] = {}
    for path, module in model.named_modules():
        kind = getattr(getattr(module, "config", None), "model_type", None)
        if isinstance(kind, str) and not any(path == p or path.startswith(f"{p}.") or not p for p in found):
            found[path] = family(kind)
    return found


def select(
    model: nn.Module, include: list[str] | None = None, exclude: list[str] | None = None,
    roles: tuple[str, ...] | None = None,
) -> list[Weight]:
    """Return the weights whose names match; see `choose`."""
    return choose(weights(model), include, exclude, roles)


def choose(
    everything: Iterable[Weight], include: list[str] | None = None, exclude: list[str] | None = None,
    roles: tuple[str, ...] | None = None, *, replaceable: bool = False,
    if_named: tuple[str, ...] = ("router",),
) -> list[Weight]:
    """Return those of some weights whose names match.

    Parameters
    ----------
    include, exclude : list of str, optional
        Shell patterns on whole names or on their last parts (`q_proj`, `experts.*.down`).
    roles : tuple of str, optional
        Keep only these roles.
    if_named : tuple of str
        Roles that are kept besides where a pattern names them and nothing else.
    replaceable : bool
        Keep what no layer can stand in for only where a pattern names it and nothing else.

    Raises
    ------
    ConfigError
        When a pattern, or the whole selection, matches nothing, with candidates; for an empty list.
    """
    everything = list(everything)

    def only_if_named(w: Weight) -> bool:
        return (roles is not None and w.role not in roles) or (replaceable and not w.replaceable)

    candidates = [w for w in everything if roles is None or w.role in (*roles, *if_named)]
    _check_patterns(everything, candidates, include, exclude)
    unnamed = include is None
    taken = {id(w) for p in include or ["*"] for w in covered(candidates, p, only_if_named, unnamed)}
    chosen = [w for w in candidates
              if id(w) in taken and not any(matches(w.name, p) for p in exclude or [])]
    if not chosen:
        have = sorted({w.role for w in everything})
        raise ConfigError(
            f"no weight is selected (roles asked for: {roles or 'any'}; the model has: {have})"
        )
    return chosen


def _check_patterns(
    everything: list[Weight], candidates: list[Weight], include: list[str] | None,
    exclude: list[str] | None,
) -> None:
    for what, patterns in (("included", include), ("excluded", exclude)):
        if patterns is not None and not patterns:
            raise ConfigError(f"an empty list of {what} patterns names no weight: leave it out (null), or "
                              f"give patterns of names")
    for pattern in include or []:
        if hit := named_tie(everything, pattern):
            raise ConfigError(f"pattern {pattern!r} names {hit[0]}, which is tied with {hit[1].name}: the "
                              f"two are one weight, of that name")
    for pattern in [*(include or []), *(exclude or [])]:
        if not any(matches(w.name, pattern) for w in candidates) and not named_tie(everything, pattern):
            endings = sorted({w.name.rsplit(".", 1)[-1] for w in candidates})
            raise ConfigError(
                f"pattern {pattern!r} matches no weight{nearest(pattern, endings)} "
                f"(weights end in: {', '.join(endings[:20])})"
            )


def covered(
    candidates: Iterable[Weight], pattern: str, only_if_named: Callable[[Weight], bool], never: bool = False
) -> list[Weight]:
    """Return the weights that a pattern covers; some only where it names nothing else, or never."""
    hits = [w for w in candidates if matches(w.name, pattern)]
    usual = [w for w in hits if not only_if_named(w)]
    return usual if never or usual else hits


def matches(name: str, pattern: str) -> bool:
    """Tell whether a pattern covers a whole name or its last parts."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def named_tie(found: Iterable[Weight], pattern: str) -> tuple[str, Weight] | None:
    """Return a further name of a tied weight, and that weight, where a pattern covers it and no first name:
    the output head, say, that is the input embedding."""
    found = list(found)
    if any(matches(w.name, pattern) for w in found):
        return None
    return next(((n, w) for w in found for n in w.tied_with if matches(n, pattern)), None)


def refuse_tied(chosen: Iterable[Weight], what: str) -> None:
    """Raise `ConfigError` when a chosen weight is shared, since changing it changes another layer."""
    for w in chosen:
        if w.tied_with:
            raise ConfigError(f"{what}: {untied(w.name, w)}")
        refuse_overlap(w, what)


def untied(name: str, w: Weight) -> str:
    """Say with what a weight is tied that is called so, and how to give it values of its own."""
    others = ", ".join(n for n in (w.name, *w.tied_with) if n != name)
    again = ("; set config.tie_word_embeddings = False too, which is saved with the model: a reload would "
             "tie them again") if w.role == "embedding" else ""
    return (f"{name} is tied with {others}, and changing one changes the other: exclude it, or untie it "
            f"first by a weight of its own, nn.Parameter(weight.detach().clone()){again}")


def refuse_overlap(w: Weight, what: str) -> None:
    """Raise `ConfigError` for a weight whose memory is in part that of another parameter."""
    if w.overlaps:
        raise ConfigError(
            f"{what}: {w.name} shares memory with {', '.join(w.overlaps)}, another parameter: changing "
            f"one changes the other; give it its own, nn.Parameter(weight.detach().clone()), or make the "
            f"two one parameter"
        )


def count(model: nn.Module) -> dict[str, int]:
    """Return the numbers of parameters: all, trainable, and weights met by the walk."""
    parameters = list(model.parameters())
    return {
        "parameters": sum(p.numel() for p in parameters),
        "trainable": sum(p.numel() for p in parameters if p.requires_grad),
        "weights": sum(w.numel for w in weights(model)),
    }
