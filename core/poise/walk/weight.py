"""One matrix of a model: what it is, how it is stored, where its product is made."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from poise.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn

ROLES = ("linear", "conv", "embedding", "expert", "router", "other")


class Slot(Protocol):
    """The place in a model where one weight's product is made."""

    def get(self) -> nn.Module:
        """Return the layer that makes the product."""
        ...

    def put(self, layer: nn.Module) -> None:
        """Let another layer make it."""
        ...


@dataclass(frozen=True)
class Child:
    """A layer as a child of its parent."""

    parent: nn.Module
    name: str

    def get(self) -> nn.Module:
        return self.parent._modules[self.name]  # type: ignore[return-value]

    def put(self, layer: nn.Module) -> None:
        self.parent._modules[self.name] = layer


@dataclass(frozen=True)
class Expert:
    """Which matrix of which expert.

    Parameters
    ----------
    layer : int
        Running number of the block, encoder before decoder; -1 where the names have no blocks.
    number : int
        Of the expert within its block.
    part : str
        Live name of the matrix: gate_up, down, wi, wo, ...
    """

    layer: int
    number: int
    part: str


@dataclass(frozen=True, eq=False)
class Weight:
    """One matrix of a model, seen as (out, in).

    Parameters
    ----------
    name : str
        `model.layers.3.mlp.experts.5.gate_up`, `model.layers.0.self_attn.q_proj`, ...
    role : str
        linear, conv, embedding, expert, router, or other (any other parameter of two or more dimensions).
        It does not change when the weight is packed or adapted.
    shape : (out, in)
        Convolutions are flattened per filter.
    dtype : torch.dtype
        Of what `read` returns.
    state_key : str
        The key of the plain model's `state_dict` that holds it; the experts of a fused parameter share one.
    module : nn.Module or None
        The module that holds the tensor; None for a weight in files.
    parameter : str
        The attribute of `module` that holds it.
    key : tuple
        The same for two names of one tensor, and for no two tensors.
    stored : QuantizedTensor or None
        The packed form, where it has one.
    expert : Expert or None
        Which expert's it is.
    index : int or None
        Position in a fused parameter that holds all experts of a block; None for a tensor of its own.
    adapters : tuple of str
        Names of the adapters that act on it, in the order in which they do.
    replaceable : bool
        Whether another layer can stand in its product (`poise.walk.replace`): not in attention's fused
        projections, nor in LSTM and GRU, which read the tensor directly.
    tied_with : tuple of str
        Other names of the same tensor.
    again : dict of name to Slot
        Those of `tied_with` where not only the tensor but the whole layer is the same.
    overlaps : tuple of str
        Other parameters of the model with memory in common, though they are not the same one.
    lies_in : str
        Of a weight of a live model that is not in memory: the file or folder that it is read from whenever
        it is needed. It can be adapted, and is neither written nor trained. Empty for all others.
    """

    name: str
    role: str
    shape: tuple[int, int]
    dtype: Any
    state_key: str
    module: nn.Module | None
    parameter: str
    key: tuple[Any, ...]
    _read: Callable[[slice | None], Tensor] = field(repr=False)
    _write: Callable[[Tensor], None] = field(repr=False)
    stored: Any = None
    expert: Expert | None = None
    index: int | None = None
    adapters: tuple[str, ...] = ()
    replaceable: bool = False
    tied_with: tuple[str, ...] = ()
    again: dict[str, Slot | None] = field(default_factory=dict, repr=False)
    overlaps: tuple[str, ...] = ()
    lies_in: str = ""
    slot: Slot | None = field(default=None, repr=False)
    plain: Callable[[Tensor], Tensor] = field(default=lambda matrix: matrix, repr=False)
    """A matrix (out, in) in the form in which the plain model holds it."""
    beside: Callable[[], Iterable[tuple[str, Tensor]]] = field(default=tuple, repr=False)
    """What a layer that stands in for a plain one keeps beside the weight: keys and tensors (a bias)."""

    @property
    def numel(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]

    @property
    def tied_layers(self) -> tuple[str, ...]:
        """Names of other layers with the same tensor, and of parameters that share its memory; a layer that
        is registered twice is one layer."""
        return (*(name for name in self.tied_with if name not in self.again), *self.overlaps)

    @property
    def slots(self) -> tuple[Slot, ...]:
        """Every place in which the layer is registered."""
        return tuple(slot for slot in (self.slot, *self.again.values()) if slot is not None)

    @property
    def layer(self) -> nn.Module:
        """What makes the product x W^T now: the plain layer, a packed one, or what an adapter put there.

        Raises
        ------
        ConfigError
            Where no layer of its own makes it.
        """
        if not self.replaceable:
            raise ConfigError(f"{self.name} takes part in its module's own arithmetic ({self.role} of "
                              f"{type(self.module).__name__}): no layer can stand in its place")
        if self.module is None:
            raise ConfigError(f"{self.name} lies in a file: load the model to replace its layers")
        if self.slot is None:
            kind = type(self.module).__name__
            raise ConfigError(f"the model itself is the layer ({kind}): wrap it, nn.Sequential(model)")
        return self.slot.get()

    def read(self, rows: slice | None = None) -> Tensor:
        """Return the matrix, or some of its output rows, detached; a view where possible."""
        return self._read(rows)

    def write(self, tensor: Tensor) -> None:
        """Replace the values in place; a packed weight is packed again.

        Raises
        ------
        ConfigError
            When the shape differs from `shape`, or the weight lies in a file.
        """
        if tuple(tensor.shape) != self.shape:
            raise ConfigError(
                f"{self.name} has shape {self.shape}, not {tuple(tensor.shape)}: write its own shape"
            )
        self._write(tensor)
