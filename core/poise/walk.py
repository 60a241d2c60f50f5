"""The one walk over a model's weights.

All that quantizes, adapts, plans, converts, counts or selects goes through `weights(model)`: it
meets every matrix exactly once, whatever module holds it, and gives it a stable, readable name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from poise.errors import ConfigError, nearest

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Weight:
    """One matrix of a model, seen as (out, in).

    Parameters
    ----------
    name : str
        `model.layers.3.mlp.experts.5.gate_up`, `model.layers.0.self_attn.q_proj`, ...
    kind : str
        linear, conv1d (GPT-2's transposed linear), conv, embedding, expert, packed, or matrix (a
        bare 2-D or higher parameter such as a router's).
    shape : (out, in)
        Convolutions are flattened per filter.
    module : nn.Module
        The module that holds the tensor.
    parameter : str
        The attribute of `module` that holds it.
    tied_with : tuple of str
        Other names of the same tensor.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    module: nn.Module
    parameter: str
    key: tuple[Any, ...]
    _read: Callable[[], Tensor] = field(repr=False)
    _write: Callable[[Tensor], None] = field(repr=False)
    _rows: Callable[[slice], Tensor] | None = field(default=None, repr=False)
    index: int | None = None
    tied_with: tuple[str, ...] = ()

    @property
    def numel(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]

    def read(self, rows: slice | None = None) -> Tensor:
        """Return the matrix, or some of its output rows, detached; a view where possible."""
        if rows is not None and self._rows is not None:
            return self._rows(rows)
        with torch.no_grad():
            matrix = self._read().detach()
        return matrix if rows is None else matrix[rows]

    def write(self, tensor: Tensor) -> None:
        """Replace the values in place.

        Raises
        ------
        ConfigError
            When the shape differs from `shape`.
        """
        if tuple(tensor.shape) != self.shape:
            raise ConfigError(
                f"{self.name} has shape {self.shape}, not {tuple(tensor.shape)}: write its own shape"
            )
        with torch.no_grad():
            self._write(tensor)


def weights(model: nn.Module) -> Iterator[Weight]:
    """Yield every weight matrix of a model exactly once.

    Covers linears, GPT-2's Conv1D (as its transpose), convolutions, embeddings, packed layers,
    each expert of a fused 3-D parameter, and any other parameter of two or more dimensions that is
    not a bias. Tied tensors are met under their first name; `tied_with` lists the others.
    """
    found: dict[tuple[Any, ...], list[Weight]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if _is_inside_adapter(model, path):
            continue
        for weight in _of_module(_public_path(model, path), module):
            found.setdefault(weight.key, []).append(weight)
    for group in found.values():
        first, others = group[0], tuple(dict.fromkeys(w.name for w in group[1:]))
        yield _with_ties(first, tuple(n for n in others if n != first.name))


def select(
    model: nn.Module,
    include: list[str] | None = None,
    exclude: list[str] | None = None,
    kinds: tuple[str, ...] | None = None,
) -> list[Weight]:
    """Return the weights whose names match.

    Parameters
    ----------
    include, exclude : list of str, optional
        Shell patterns on whole names or on their last parts (`q_proj`, `experts.*.down`).
    kinds : tuple of str, optional
        Keep only these kinds.

    Raises
    ------
    ConfigError
        When a pattern, or the whole selection, matches nothing; with candidates.
    """
    candidates = [w for w in weights(model) if kinds is None or w.kind in kinds]
    for pattern in [*(include or []), *(exclude or [])]:
        if not any(matches(w.name, pattern) for w in candidates):
            endings = sorted({w.name.rsplit(".", 1)[-1] for w in candidates})
            raise ConfigError(
                f"pattern {pattern!r} matches no weight{nearest(pattern, endings)} "
                f"(weights end in: {', '.join(endings[:20])})"
            )
    chosen = [
        w for w in candidates
        if (not include or any(matches(w.name, p) for p in include))
        and not any(matches(w.name, p) for p in exclude or [])
    ]
    if not chosen:
        have = sorted({w.kind for w in weights(model)})
        raise ConfigError(
            f"no weight is selected (kinds asked for: {kinds or 'any'}; the model has: {have})"
        )
    return chosen


def matches(name: str, pattern: str) -> bool:
    """Tell whether a pattern covers a whole name or its last parts."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def refuse_tied(chosen: list[Weight], what: str) -> None:
    """Raise `ConfigError` when a chosen weight is shared, since changing it changes another layer."""
    for w in chosen:
        if w.tied_with:
            raise ConfigError(
                f"{what}: {w.name} is tied with {', '.join(w.tied_with)}; changing one changes the "
                f"other: exclude it or untie it first"
            )


def count(model: nn.Module) -> dict[str, int]:
    """Return the numbers of parameters: all, trainable, and weights met by the walk."""
    parameters = list(model.parameters())
    return {
        "parameters": sum(p.numel() for p in parameters),
        "trainable": sum(p.numel() for p in parameters if p.requires_grad),
        "weights": sum(w.numel for w in weights(model)),
    }


def replace_module(model: nn.Module, path: str, new: nn.Module) -> None:
    """Put a module in the place of the one at a dotted path.

    Raises
    ------
    ConfigError
        For the empty path: the model itself has no parent to hold another module.
    """
    if not path:
        kind = type(model).__name__
        raise ConfigError(f"the model itself is the layer ({kind}): wrap it, nn.Sequential(model)")
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, new)


def path_of(model: nn.Module, module: nn.Module) -> str:
    """Return the first dotted path of a module inside a model."""
    return next(path for path, m in model.named_modules() if m is module)


# ------------------------------------------------------------------ the cases


def _of_module(path: str, module: nn.Module) -> Iterator[Weight]:
    if hasattr(module, "packed_weights"):
        yield from _packed(path, module)
        return
    for name in _own_names(module):
        tensor = getattr(module, name)
        if not isinstance(tensor, Tensor) or tensor.ndim < 2 or name.endswith("bias"):
            continue
        if tensor.ndim == 3 and _holds_experts(module):
            yield from _experts(path, module, name, tensor)
        else:
            yield _matrix(path, module, name, tensor)


def _own_names(module: nn.Module) -> list[str]:
    """Names of a module's own parameters, parametrized ones under their public name."""
    names = [n for n, p in module._parameters.items() if p is not None]
    if parametrize.is_parametrized(module):
        names += list(module.parametrizations)  # type: ignore[arg-type]
    return names


def _matrix(path: str, module: nn.Module, name: str, tensor: Tensor) -> Weight:
    kind = _kind(module) if name == "weight" else "matrix"
    if kind == "conv1d":
        to, back = (lambda t: t.T), (lambda m: m.T)
    elif kind == "conv" and isinstance(module, _TRANSPOSED_CONVOLUTIONS):
        swapped = tensor.transpose(0, 1).shape
        to = lambda t: t.transpose(0, 1).reshape(t.shape[1], -1)  # noqa: E731
        back = lambda m: m.reshape(swapped).transpose(0, 1)  # noqa: E731
    else:
        shape = tensor.shape
        to = lambda t: t.reshape(t.shape[0], -1)  # noqa: E731
        back = lambda m: m.reshape(shape)  # noqa: E731
    label = path if name == "weight" else f"{path}.{name}".lstrip(".")
    seen = to(tensor.detach())
    return Weight(
        label or name, kind, (seen.shape[0], seen.shape[1]), module, name, _key(module, name),
        _read=lambda: to(getattr(module, name)),
        _write=lambda m: _assign(module, name, back(m)),
    )


def _kind(module: nn.Module) -> str:
    # attention reads its output projection's weight directly: that one cannot be replaced by a layer
    if isinstance(module, nn.Linear) and type(module) is not NonDynamicallyQuantizableLinear:
        return "linear"
    if isinstance(module, (*_CONVOLUTIONS, *_TRANSPOSED_CONVOLUTIONS)):
        return "conv"
    if isinstance(module, nn.Embedding):
        return "embedding"
    # transformers' Conv1D is recognised by name so that transformers need not be imported
    return "conv1d" if type(module).__name__ == "Conv1D" and hasattr(module, "nf") else "matrix"


def _holds_experts(module: nn.Module) -> bool:
    return "expert" in type(module).__name__.lower() or hasattr(module, "num_experts")


def experts_are_transposed(module: nn.Module) -> bool:
    """Tell whether a fused parameter is (experts, in, out); transformers marks such modules."""
    return bool(getattr(module, "is_transposed", False))


def expert_name(path: str, index: int, parameter: str) -> str:
    """Return the name of one expert's matrix: `PATH.5.gate_up` for `gate_up_proj`."""
    return f"{path}.{index}.{parameter.removesuffix('_proj')}"


def _experts(path: str, module: nn.Module, name: str, tensor: Tensor) -> Iterator[Weight]:
    flip = experts_are_transposed(module)
    for e in range(tensor.shape[0]):
        rows, columns = tensor.shape[1:] if not flip else (tensor.shape[2], tensor.shape[1])

        def read(e: int = e) -> Tensor:
            one = getattr(module, name)[e]
            return one.T if flip else one

        def write(m: Tensor, e: int = e) -> None:
            getattr(module, name)[e].copy_(m.T if flip else m)

        yield Weight(
            expert_name(path, e, name), "expert", (rows, columns), module, name,
            (*_key(module, name), e), _read=read, _write=write, index=e,
        )


def _packed(path: str, module: nn.Module) -> Iterator[Weight]:
    for name, index, get in module.packed_weights(path):  # type: ignore[operator]
        stored = get()
        is_plain = isinstance(stored, Tensor)
        yield Weight(
            name, "expert" if is_plain else "packed", (stored.shape[0], stored.shape[1]), module,
            "packed", (id(module), index),
            _read=get if is_plain else lambda get=get: get().dequantize(),
            _write=lambda m, index=index: module.requantize(m, index),  # type: ignore[operator]
            _rows=None if is_plain else lambda rows, get=get: get().dequantize(rows),
            index=index,
        )


def _key(module: nn.Module, name: str) -> tuple[Any, ...]:
    if parametrize.is_parametrized(module, name):
        held = module.parametrizations[name]  # type: ignore[index]
        return (id(held.original if hasattr(held, "original") else held.original0),)
    return (id(getattr(module, name)),)


def _assign(module: nn.Module, name: str, tensor: Tensor) -> None:
    if parametrize.is_parametrized(module, name):
        setattr(module, name, tensor)  # goes through right_inverse
    else:
        getattr(module, name).copy_(tensor)  # not through .data: adapters see writes by the version counter


# Adapter layers wrap a layer as their child `base`. The walk looks through them, so names do not
# change when an adapter is attached, and an adapter's own tensors are not weights of the model.


def _is_inside_adapter(model: nn.Module, path: str) -> bool:
    parts = path.split(".") if path else []
    if "parametrizations" in parts:
        return True
    module = model
    if not parts:
        return getattr(model, "wraps_base", False)
    for i, part in enumerate(parts):
        if getattr(module, "wraps_base", False) and part != "base":
            return True
        module = getattr(module, part) if not isinstance(module, nn.ModuleDict) else module[part]
        if i == len(parts) - 1 and getattr(module, "wraps_base", False):
            return True
    return False


def _public_path(model: nn.Module, path: str) -> str:
    parts, module, kept = path.split(".") if path else [], model, []
    for part in parts:
        if not (getattr(module, "wraps_base", False) and part == "base"):
            kept.append(part)
        module = getattr(module, part) if not isinstance(module, nn.ModuleDict) else module[part]
    return ".".join(kept)


def _with_ties(weight: Weight, names: tuple[str, ...]) -> Weight:
    from dataclasses import replace

    return replace(weight, tied_with=names) if names else weight
