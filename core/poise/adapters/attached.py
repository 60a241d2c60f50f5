"""An adapter's layers on a model, from attach to merge: several may be there, by name."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from poise.adapters.layer import AdaptedLayer, adapter_parameters, freezers, refuse_inactive
from poise.errors import ConfigError, RunError
from poise.files import copy_checked
from poise.holding import adopt, freeze, hold, release, tensor_of, thaw, trains, who_holds
from poise.walk import checkpoint, refuse_tied, weights
from poise.walk.experts import Experts, ExpertSlot
from poise.walk.memory import in_storages, shared_storages
from poise.walk.weight import Slot


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
        self._slots, self._freezes = slots, object()
        self.gone = False
        freeze(base, self._freezes)
        for layer in layers.values() if adapter.freezes_base else ():
            layer.freezes = self._freezes

    # ------------------------------------------------------------ training

    def trainable(self) -> list[dict[str, Any]]:
        """Return one group with the method's own parameters; weight decay acts as the optimizer says."""
        self._refuse_gone()
        return [{"params": [t for _, t in self.tensors() if isinstance(t, nn.Parameter)]}]

    def optimizer(self, cls: type, **options: Any) -> torch.optim.Optimizer:
        """Return a torch optimizer over this adapter's parameters."""
        return cls(self.trainable(), **options)

    # ------------------------------------------------------------ acting

    @property
    def active(self) -> bool:
        """Whether the change acts. May be set; a folded adapter is unfolded first."""
        return not self.gone and all(layer.active for layer in self.layers.values())

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
            Where an earlier adapter still acts on a weight: it is folded first. Where the parameters have
            changed since they were folded: the weights are unfolded first.
        """
        self._fold("fold", keep=True)

    def _fold(self, verb: str, keep: bool) -> None:
        self._refuse_gone()
        self._refuse_order(verb)
        self._refuse_retrained(verb)
        self._refuse_read_only(verb)
        self._refuse_tied()
        try:
            made = [p for layer in self.layers.values() if (p := layer.fold()) is not None]
        except BaseException:  # all of them or none
            for layer in self.layers.values():
                layer.unfold()
            raise
        for p in made:
            adopt(p, freezers(self.model))
        if not keep:
            for layer in self.layers.values():
                layer.forget()

    def _refuse_read_only(self, verb: str) -> None:
        """Raise `ConfigError` for a weight that lies in a file: before any other one is changed."""
        for name, layer in self.layers.items():
            if where := layer.weight_beneath.lies_in:
                raise ConfigError(f"{self.name}: {name} lies in {where}, which {verb}() does not write to: "
                                  f"save the adapter and load it on the model in memory "
                                  f"(poise.load_adapter), or write folded_weights()")

    def _refuse_tied(self) -> None:
        """Raise `ConfigError` for a weight that was tied since `attach`: another layer would change."""
        shared = shared_storages(self.model)
        if any(in_storages(tensor_of(layer.weight_beneath), shared) for layer in self.layers.values()):
            mine = (w for w in weights(self.model) if {w.name, *w.tied_with} & self.layers.keys())
            refuse_tied(mine, self.name)

    def unfold(self) -> None:
        """Restore the weights exactly; without `fold`, nothing changes.

        A warning tells of parameters that have changed since `fold`: what acts then is not what was folded.

        Raises
        ------
        ConfigError
            Where a later adapter is folded: it is unfolded first. Where a weight was written to meanwhile.
        """
        retrained = self._retrained()
        self._restore()
        if retrained:
            warnings.warn(f"{self.name}: its parameters were changed after fold(): from here on the "
                          f"changed ones act, not those that were in the weights", stacklevel=2)

    def _restore(self) -> None:
        self._refuse_gone()
        if self.folded:
            self._refuse_folded_above("unfold")
            if touched := [n for n, layer in self.layers.items() if not layer.untouched]:
                raise ConfigError(f"{self.name}: {touched[0]} was written to after fold(), which unfold() "
                                  f"would lose: call merge() to keep it, or write back what fold() left")
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
        self._refuse_gone()
        self._refuse_order("merge", folded_too=True)
        self._fold("merge", keep=False)
        return self._leave()

    def detach(self) -> nn.Module:
        """Remove the adapter and its change; weights are bit for bit as before `attach`."""
        self._restore()
        return self._leave()

    def _leave(self) -> nn.Module:
        apart = self._experts_apart()
        for name, layer in self.layers.items():
            slot = self._slots[name]
            above = list(_above(slot.get(), layer))
            if above:  # later adapters stand on it
                above[-1].base = layer.base
            else:
                slot.put(layer.base)
        for module, parameter, flags in apart:  # what is one parameter again trains as its parts did
            fused = getattr(module, parameter)
            if isinstance(fused, nn.Parameter):
                adopt(fused, freezers(self.model), when_free=all(flags))
        self.gone = True
        thaw(self._freezes)
        return self.model

    def _experts_apart(self) -> list[tuple[nn.Module, str, list[bool]]]:
        """Return where this adapter acts on experts of which each is a parameter, and what trains there."""
        places = {(id(s.module), s.parameter): s for s in self._slots.values() if isinstance(s, ExpertSlot)}
        found = []
        for slot in places.values():
            held = getattr(slot.module, slot.parameter)
            if isinstance(held, Experts) and held.fused is None:
                found.append((slot.module, slot.parameter, [trains(p) for p in held.plain_parameters()]))
        return found

    # ------------------------------------------------------------ saving

    def folded_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the plain checkpoint that `fold` would leave, a tensor at a time; the model is untouched.

        Other adapters' changes are in it where they are folded.
        """
        self._refuse_gone()
        self._refuse_order("fold")
        self._refuse_retrained("fold")
        return checkpoint(self.model, ((n, layer.folded_weight) for n, layer in self.layers.items()))

    def folded_state_dict(self) -> dict[str, Tensor]:
        """Return `folded_weights` as a dict; a whole model in memory."""
        return dict(self.folded_weights())

    def state_dict(self) -> dict[str, Tensor]:
        """Return the method's own tensors by layer name, `NAME.D`."""
        return {name: tensor.detach() for name, tensor in self.tensors()}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the method's own tensors, live, each once, with their names in `state_dict`."""
        for name, layer in self.layers.items():
            yield from ((f"{name}.{key}", tensor) for key, tensor in layer.own().items())

    @torch.no_grad()
    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Load the method's own tensors.

        Raises
        ------
        ConfigError
            While the weights hold the change: they would hold that of the tensors before.
        FileError
            When names or shapes differ, naming the first; nothing is changed then.
        """
        self._refuse_gone()
        if self.folded:
            raise ConfigError(f"{self.name}: it is folded into the weights: unfold() before loading")
        copy_checked(self.state_dict(), tensors, self.name)

    def over(self) -> list[str]:
        """Return the earlier adapters on whose changes this one's depends: alone, it would be another."""
        return list(dict.fromkeys(name for layer in self.layers.values() for name in layer.over()))

    def report(self) -> dict[str, Any]:
        """Return counts and bytes."""
        own = [t for _, t in self.tensors() if isinstance(t, nn.Parameter)]
        return {
            "name": self.name, "layers": len(self.layers),
            "trainable_parameters": sum(p.numel() for p in own),
            "bytes": sum(p.numel() * p.element_size() for p in own),
        }

    # ------------------------------------------------------------ order

    def _refuse_gone(self) -> None:
        if self.gone:
            raise RunError(f"{self.name}: it was merged or detached: attach again")

    def _refuse_order(self, verb: str, folded_too: bool = False) -> None:
        for layer in self.layers.values():
            refuse_inactive(layer, verb)
            # what an earlier one keeps to unfold does not know of a later one's change
            earlier = [one.adapter for one in layer.chain()
                       if one is not layer and (one.acts or (folded_too and one.folded))]
            if earlier:
                raise ConfigError(f"{self.name}: {earlier[-1]!r} acts before it on the same weights: "
                                  f"{verb} {earlier[-1]!r} first")

    def _retrained(self) -> bool:
        return any(layer.retrained for layer in self.layers.values())

    def _refuse_retrained(self, verb: str) -> None:
        """Raise `ConfigError` where the weights hold other parameters than these."""
        if self._retrained():
            raise ConfigError(f"{self.name}: its parameters were changed after fold(), and the weights "
                              f"hold those of before: unfold(), then {verb}")

    def _refuse_folded_above(self, verb: str) -> None:
        for name, layer in self.layers.items():
            top = self._slots[name].get()
            later = [one.adapter for one in _above(top, layer) if one.folded]
            if later:
                raise ConfigError(f"{self.name}: {later[0]!r}, attached later, is folded into the same "
                                  f"weights: unfold {later[0]!r} before {verb}")


def _above(top: nn.Module, layer: AdaptedLayer) -> Iterator[AdaptedLayer]:
    """Yield the layers between the top of a chain and one of its members, top first."""
    if not isinstance(top, AdaptedLayer):
        raise ConfigError(f"{layer.adapter}: another layer ({type(top).__name__}) was put over it: undo "
                          f"that first")
    for one in top.chain():
        if one is layer:
            return
        yield one


class ReparameterizedLayers(HoldsAlone, AttachedLayers):  # type: ignore[misc]
    """The layers of an adapter whose base trains too (`freezes_base = False`)."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        held = (tensor_of(layer.weight_beneath) for layer in self.layers.values())
        self._alone = [tensor for tensor in held if tensor is not None]
        for tensor in self._alone:
            hold(tensor, self.name)

    def _leave(self) -> nn.Module:
        for tensor in self._alone:
            release(tensor)
        return super()._leave()

    def trainable(self) -> list[dict[str, Any]]:
        """Return all that trains, the weights beneath the layers too."""
        self._refuse_gone()
        own = {id(p) for layer in self.layers.values() for p in layer.own_parameters()}
        mine = own | {id(p) for p in self._alone}
        theirs = adapter_parameters(self.model) - own
        return [{"params": [p for p in self.model.parameters() if p.requires_grad and id(p) not in theirs
                            and (id(p) in mine or not who_holds(p))]}]

    def detach(self) -> nn.Module:
        """Put the present values into plain weights and take the layers away, as `merge` does."""
        return self.merge()
