"""The matrices among an ordinary module's own parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrize import ParametrizationList

from poise.walk.weight import Weight

_TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED_CONVOLUTIONS)


def joined(*parts: str) -> str:
    """Join parts of a dotted path, leaving out empty ones."""
    return ".".join(p for p in parts if p)


def computed(module: nn.Module) -> dict[str, ParametrizationList]:
    """Return what torch's parametrize computes in a module, by name; a child of one's own may be called
    `parametrizations` too."""
    parts = module._modules.get("parametrizations")
    if not isinstance(parts, nn.ModuleDict):
        return {}
    return {name: one for name, one in parts.items() if isinstance(one, ParametrizationList)}


def children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the children that are the model's own, by name."""
    for name, child in module._modules.items():
        if child is not None and not (name == "parametrizations" and computed(module)):
            yield name, child


def own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield a module's own parameters of two or more dimensions that are no biases, as the model sees them:
    parametrized ones under their public name."""
    names = [n for n, p in module._parameters.items() if p is not None]
    for name in [*names, *computed(module)]:
        tensor = getattr(module, name)
        if isinstance(tensor, Tensor) and tensor.ndim > 1 and not name.endswith("bias"):
            yield name, tensor


def matrix(module: nn.Module, path: str, name: str, tensor: Tensor) -> Weight:
    """Return a module's own parameter as a weight."""
    to, back = _orientation(module, tensor)
    seen = to(tensor.detach())
    role, replaceable = _role(module, name)
    return Weight(
        joined(path, "" if name == "weight" else name) or name, role, (seen.shape[0], seen.shape[1]),
        tensor.dtype, joined(path, name), module, name, tensor_key(module, name),
        _read=reader(lambda: to(getattr(module, name))),
        _write=lambda m: _assign(module, name, back(m)), replaceable=replaceable, plain=back,
        beside=lambda: (kv for kv in own_state(module, path) if kv[0] != joined(path, name)),
    )


def own_state(module: nn.Module, path: str) -> Iterator[tuple[str, Tensor]]:
    """Yield what a module itself adds to a plain `state_dict`; a parametrized tensor counts as itself."""
    prefix = f"{path}." if path else ""
    for name in computed(module):
        yield f"{prefix}{name}", getattr(module, name).detach()
    kept: dict[str, Tensor] = {}
    module._save_to_state_dict(kept, prefix, keep_vars=False)
    yield from kept.items()


def reader(get: Callable[[], Tensor]) -> Callable[[slice | None], Tensor]:
    """Return a weight's `read` from a function that gets the whole matrix."""

    def read(rows: slice | None) -> Tensor:
        with torch.no_grad():
            whole = get().detach()
        return whole if rows is None else whole[rows]

    return read


def tensor_key(module: nn.Module, name: str) -> tuple[Any, ...]:
    """Return what is the same for two names of one tensor."""
    if (inner := computed(module).get(name)) is not None:
        return (id(inner.original if inner.is_tensor else inner.original0),)
    return (id(getattr(module, name)),)


def is_conv1d(module: nn.Module) -> bool:
    """Tell whether a module is GPT-2's transposed linear, by name: transformers need not be imported."""
    names = [cls.__name__ for cls in type(module).__mro__]  # parametrize makes a subclass
    return "Conv1D" in names and hasattr(module, "nf")


def has_own_forward(layer: nn.Module) -> bool:
    """Tell whether a layer does more than its kind: forward hooks, or a `forward` set on the object."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks or "forward" in layer.__dict__)


def _orientation(module: nn.Module, tensor: Tensor) -> tuple[Callable, Callable]:
    """Return the maps from a parameter to its matrix (out, in) and back."""
    if is_conv1d(module):
        return (lambda t: t.T), (lambda m: m.T)
    if isinstance(module, _TRANSPOSED_CONVOLUTIONS):
        swapped = tensor.transpose(0, 1).shape
        return (lambda t: t.transpose(0, 1).flatten(1)), (lambda m: m.reshape(swapped).transpose(0, 1))
    shape = tensor.shape
    return (lambda t: t.flatten(1)), (lambda m: m.reshape(shape))


def _role(module: nn.Module, name: str) -> tuple[str, bool]:
    """Return the role of a module's own parameter, and whether a layer can stand in its product."""
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return "linear", False
    if isinstance(module, nn.MultiheadAttention) and name.endswith("proj_weight"):
        return "linear", False
    if name != "weight":
        return "other", False
    if isinstance(module, nn.Linear):
        # a router may be a Linear with arithmetic of its own; attention reads its output weight itself
        own = type(module).forward is not nn.Linear.forward or _keeps_more(module)
        return "linear", not own and not isinstance(module, NonDynamicallyQuantizableLinear)
    if is_conv1d(module):
        return "linear", True
    if isinstance(module, _CONVOLUTIONS):
        return "conv", True
    return ("embedding", True) if isinstance(module, nn.Embedding) else ("other", False)


def _keeps_more(linear: nn.Module) -> bool:
    """Tell whether a linear of somebody's own keeps what a layer in its place would lose."""
    return bool({*linear._parameters, *linear._buffers} - {"weight", "bias"}) or any(children(linear))


@torch.no_grad()
def _assign(module: nn.Module, name: str, tensor: Tensor) -> None:
    if name in computed(module):
        setattr(module, name, tensor)  # goes through right_inverse
    else:
        getattr(module, name).copy_(tensor)  # not through .data: adapters see writes by the version counter
