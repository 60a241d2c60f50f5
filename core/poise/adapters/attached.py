"""An adapter that freezes its base, on a model: several may be there, by name."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from poise.adapters.holding import freeze, hold, refuse_held, release, thaw
from poise.adapters.layer import AdaptedLayer, refuse_inactive
from poise.errors import ConfigError, RunError
from poise.files import copy_checked
from poise.walk import Weight, checkpoint, choose, refuse_tied, weights
from poise.walk.weight import Slot


def choose_layers(
    model: nn.Module, what: str, target_modules: list[str] | None, exclude_modules: list[str] | None,
    roles: tuple[str, ...] = ("linear",),
) -> list[Weight]:
    """Choose the weights that an adapter of layers takes.

    Parameters
    ----------
    what : str
        The adapter's name, for messages.
    target_modules : list of str or None
        Patterns of weights; None: every one of these roles but a language model's head and routers.

    Raises
    ------
    ConfigError
        When nothing matches, or a weight that is named is tied, held by another adapter, or part of its
        module's own arithmetic.
    """
    chosen = choose(weights(model), target_modules, exclude_modules, roles, replaceable=True)
    if target_modules is None:  # the output head stays as it is unless it is asked for
        chosen = [w for w in chosen if w.name.rpartition(".")[2] != "lm_head"]
        if not chosen:
            raise ConfigError(f"{what}: no linear layer to adapt (the head is adapted only when named)")
    refuse_tied(chosen, what)
    refuse_held(chosen, what)
    for w in chosen:
        w.layer  # noqa: B018 - refuses what no layer can stand in for
    return chosen


def attach_layers(
    model: nn.Module, layers: Mapping[str, AdaptedLayer], chosen: list[Weight], *, adapter: Any, name: str,
    cls: type[AttachedLayers] | None = None,
) -> Any:
    """Put a layer before each chosen weight, freeze all else, and return what is attached.

    Parameters
    ----------
    layers : mapping of weight name to layer, each made around `Weight.layer`
    adapter : component
        Whose options these are.
    name : str
        Of this adapter on this model.
    cls : type, optional
        A subclass of `AttachedLayers`, for a method with a report of its own.

    Raises
    ------
    ConfigError
        When the model has an adapter of this name.
    """
    if name in (have := names_on(model)):
        raise ConfigError(f"the model has an adapter named {name!r} (it has {', '.join(have)}): attach "
                          f"this one under another name, or detach that one first")
    if not adapter.freezes_base:
        _refuse_shared(chosen, name)
    theirs = {id(p) for m in model.modules() if isinstance(m, AdaptedLayer) for p in m.own_parameters()}
    base = [p for p in model.parameters() if id(p) not in theirs] if adapter.freezes_base else []
    slots = {}
    for w in chosen:
        layers[w.name].adapter = name
        assert w.slot is not None
        w.slot.put(layers[w.name])
        slots[w.name] = w.slot
    made = cls or (AttachedLayers if adapter.freezes_base else ReparameterizedLayers)
    attached = made(adapter, model, name, dict(layers), slots, base)
    freeze(base, attached)
    return attached


def _refuse_shared(chosen: list[Weight], name: str) -> None:
    """Raise `ConfigError` for a weight that an adapter whose base trains cannot have to itself."""
    for w in chosen:
        if w.adapters:
            raise ConfigError(f"{name}: {w.name} is adapted by {w.adapters[0]!r}, and this adapter holds "
                              f"its weights alone: call merge() or detach() on that first")
        if w.stored is not None:
            raise ConfigError(f"{name}: {w.name} is packed and cannot train: exclude it, or take an "
                              f"adapter that freezes its base")


def names_on(model: nn.Module) -> list[str]:
    """Return the names of the adapters on a model, in the order in which they act on a weight."""
    found = {}
    for w in weights(model):
        found |= dict.fromkeys(w.adapters)
    return list(found)


class HoldsAlone:
    """What an adapter answers that reparameterizes weights: it holds them alone, and always acts."""

    name: str

    @property
    def active(self) -> bool:
        """True: the weights are what the adapter holds, and there are no others to fall back to."""
        return True

    @active.setter
    def active(self, value: bool) -> None:
        if not value:
            raise ConfigError(f"{self.name}: an adapter that reparameterizes holds its weights alone: it "
                              f"cannot be switched off; use detach()/merge(), which leave plain weights")

    def disable(self) -> contextlib.AbstractContextManager[None]:
        """Raise `ConfigError`, as `active = False` does."""
        self.active = False
        return contextlib.nullcontext()


class AttachedLayers:
    """An adapter's layers on a model.

    Parameters
    ----------
    adapter : component
    layers : dict of weight name to AdaptedLayer
    """

    def __init__(
        self, adapter: Any, model: nn.Module, name: str, layers: dict[str, Any], slots: dict[str, Slot],
        base: list[nn.Parameter],
    ) -> None:
        self.adapter, self.model, self.name, self.layers = adapter, model, name, layers
        self._slots, self._base = slots, base
        self.gone = False

    # ------------------------------------------------------------ training

    def trainable(self) -> list[dict[str, Any]]:
        """Return one group with the method's own parameters; weight decay acts as the optimizer says."""
        return [{"params": [p for layer in self.layers.values() for p in layer.own_parameters()]}]

    def optimizer(self, cls: type, **options: Any) -> torch.optim.Optimizer:
        """Return a torch optimizer over this adapter's parameters."""
        return cls(self.trainable(), **options)

    # ------------------------------------------------------------ acting

    @property
    def active(self) -> bool:
        """Whether the change acts. May be set; a folded adapter is unfolded first."""
        return all(layer.active for layer in self.layers.values())

    @active.setter
    def active(self, value: bool) -> None:
        if value == self.active:
            return
        self._refuse_gone()
        if self.folded:
            raise ConfigError(f"{self.name}: it is folded into the weights: unfold() before switching it")
        self._refuse_folded_above("switching it")
        for layer in self.layers.values():
            layer.active = value

    @contextlib.contextmanager
    def disable(self) -> Iterator[None]:
        """Return a context in which the change does not act."""
        before, self.active = self.active, False
        try:
            yield
        finally:
            self.active = before

    # ------------------------------------------------------------ into the weights and out again

    @property
    def folded(self) -> bool:
        """Whether the weights hold the change."""
        return any(layer.folded for layer in self.layers.values())

    def fold(self) -> None:
        """Put the changes into the weights, in place; a second time changes nothing.

        Raises
        ------
        ConfigError
            Where an earlier adapter still acts on a weight: it is folded first.
        """
        self._fold("fold", keep=True)

    def _fold(self, verb: str, keep: bool) -> None:
        self._refuse_gone()
        if self.folded:
            return
        self._refuse_order(verb)
        for layer in self.layers.values():
            layer.fold(keep)

    def unfold(self) -> None:
        """Restore the weights exactly; without `fold`, nothing changes.

        Raises
        ------
        ConfigError
            Where a later adapter is folded: it is unfolded first.
        """
        self._refuse_gone()
        if self.folded:
            self._refuse_folded_above("unfold")
            for layer in self.layers.values():
                layer.unfold()

    def merge(self) -> nn.Module:
        """Put the changes into plain weights for good, take the layers away, and return the model.

        An adapted packed layer becomes a plain one; other packed layers stay packed.

        Raises
        ------
        ConfigError
            Where an earlier adapter still acts on a weight: it is merged first.
        """
        self._fold("merge", keep=False)
        return self._leave()

    def detach(self) -> nn.Module:
        """Remove the adapter and its change; weights are bit for bit as before `attach`."""
        self.unfold()
        return self._leave()

    def _leave(self) -> nn.Module:
        for name, layer in self.layers.items():
            slot = self._slots[name]
            top = slot.get()
            if top is layer:
                slot.put(layer.base)
            else:  # a later adapter stands on it
                above = next(one for one in top.chain() if one.base is layer)  # type: ignore[operator]
                above.base = layer.base
        self.gone = True
        thaw(self._base, self)
        return self.model

    # ------------------------------------------------------------ saving

    def folded_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the plain checkpoint that `fold` would leave, a tensor at a time; the model is untouched.

        Other adapters' changes are in it where they are folded.
        """
        self._refuse_gone()
        if self.folded:
            return checkpoint(self.model)
        self._refuse_order("fold")
        return checkpoint(self.model, ((n, layer.folded_weight) for n, layer in self.layers.items()))

    def folded_state_dict(self) -> dict[str, Tensor]:
        """Return `folded_weights` as a dict; a whole model in memory."""
        return dict(self.folded_weights())

    def state_dict(self) -> dict[str, Tensor]:
        """Return the method's own tensors by layer name, `NAME.D`."""
        return {f"{name}.{key}": tensor.detach()
                for name, layer in self.layers.items() for key, tensor in layer.own().items()}

    @torch.no_grad()
    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Load the method's own tensors; where the weights hold the change, they hold the new one then.

        Raises
        ------
        FileError
            When names or shapes differ, naming the first; nothing is changed then.
        """
        self._refuse_gone()
        folded = self.folded
        if folded:
            self.unfold()
        try:
            copy_checked(self.state_dict(), tensors, self.name)
        finally:
            if folded:
                self.fold()

    def report(self) -> dict[str, Any]:
        """Return counts and bytes."""
        own = [p for layer in self.layers.values() for p in layer.own_parameters()]
        return {
            "name": self.name, "layers": len(self.layers),
            "trainable_parameters": sum(p.numel() for p in own),
            "bytes": sum(p.numel() * p.element_size() for p in own),
        }

    # ------------------------------------------------------------ order

    def _refuse_gone(self) -> None:
        if self.gone:
            raise RunError(f"{self.name}: it was merged or detached: attach again")

    def _refuse_order(self, verb: str) -> None:
        for layer in self.layers.values():
            refuse_inactive(layer, verb)
            earlier = [one.adapter for one in layer.chain() if one is not layer and one.acts]
            if earlier:
                raise ConfigError(f"{self.name}: {earlier[-1]!r} acts before it on the same weights: "
                                  f"{verb} {earlier[-1]!r} first")

    def _refuse_folded_above(self, verb: str) -> None:
        for name, layer in self.layers.items():
            top = self._slots[name].get()
            later = [one.adapter for one in _above(top, layer) if one.folded]
            if later:
                raise ConfigError(f"{self.name}: {later[0]!r}, attached later, is folded into the same "
                                  f"weights: unfold {later[0]!r} before {verb}")


def _above(top: nn.Module, layer: AdaptedLayer) -> Iterator[AdaptedLayer]:
    """Yield the layers between the top of a chain and one of its members, top first."""
    assert isinstance(top, AdaptedLayer)
    for one in top.chain():
        if one is layer:
            return
        yield one


class ReparameterizedLayers(HoldsAlone, AttachedLayers):  # type: ignore[misc]
    """The layers of an adapter whose base trains too (`freezes_base = False`)."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        beneath = [layer.weight_beneath for layer in self.layers.values()]
        self._alone = [getattr(w.module, w.parameter) for w in beneath]
        for tensor in self._alone:
            hold(tensor, self.name)

    def _leave(self) -> nn.Module:
        for tensor in self._alone:
            release(tensor)
        return super()._leave()

    def trainable(self) -> list[dict[str, Any]]:
        """Return all that trains, the weights beneath the layers too."""
        return [{"params": [p for p in self.model.parameters() if p.requires_grad]}]

    def detach(self) -> nn.Module:
        """Put the present values into plain weights and take the layers away, as `merge` does."""
        return self.merge()
