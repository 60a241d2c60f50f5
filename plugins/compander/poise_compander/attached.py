"""What attach returns: what is alike in all methods, and what both paths of a compander share."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from poise.adapters import HoldsAlone, adapter_parameters
from poise.errors import FileError, RunError
from poise.files import copy_checked
from poise.holding import give_name, hold, release, take_name, who_holds
from poise.walk import checkpoint
from poise_compander.bounds import Finding
from poise_compander.coverage import Coverage
from poise_compander.diagnostics import Watched, saturated_share
from poise_compander.functions import named
from poise_compander.plain import Home, Place
from poise_compander.scales import Scales
from poise_compander.settings import Settings


class Attachment(HoldsAlone, Watched):
    """A method on a model; what is alike in all that reparameterize its weights.

    Parameters
    ----------
    adapter : component
        The one whose `attach` was called; nothing here looks into it.
    model : nn.Module
    name : str
    homes : iterable of Home
        Where the weights are that are reparameterized, while they are still plain.
    coverage : Coverage
        What share of the model they are; told here, and part of every report.
    """

    method = "compander"  # who speaks in messages

    def __init__(self, adapter: Any, model: nn.Module, name: str, homes: Iterable[Home],
                 coverage: Coverage) -> None:
        take_name(model, name)
        self.adapter, self.model, self.name, self.coverage = adapter, model, name, coverage
        self.folded = self.gone = False
        self._places = {home: Place.of(home) for home in homes}
        self._held = [home.plain for home in self._places]
        for weight in self._held:
            hold(weight, self.method)
        coverage.tell(self.method)

    # -------------------------------------------------------------- what the methods differ in

    def _fold(self) -> None:
        """Put present values into plain weights, in place, where they are not plain already."""

    def _unfold(self) -> None:
        """Reparameterize plain weights again."""

    def _release(self) -> None:
        """Take off hooks and marks, once the weights are plain for good."""

    # -------------------------------------------------------------- alike

    def fold(self) -> None:
        """Put present values into plain weights, in place; a second time changes nothing.

        Raises
        ------
        RunError
            After `merge` or `detach`.
        """
        self.check_here()
        if not self.folded:
            self._fold()
            self.folded = True

    def unfold(self) -> None:
        """Reparameterize again; what was there before comes back exactly where no weight was changed.

        Raises
        ------
        RunError
            After `merge` or `detach`.
        """
        self.check_here()
        if self.folded:
            self._unfold()
            self.folded = False

    def folded_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the plain model's checkpoint, a tensor at a time: each key once, in its order.

        Weights that are plain already are yielded as they are, not copied.
        """
        return checkpoint(self.model)

    def folded_state_dict(self) -> dict[str, Tensor]:
        """Return the plain model's checkpoint, a copy; the live model is untouched."""
        return copy.deepcopy(dict(self.folded_weights()))  # what shares its memory goes on sharing it

    def merge(self) -> nn.Module:
        """Leave present values in plain weights for good and return the plain model.

        Layers, parametrizations and hooks are gone, tied weights stay tied, and weights train if they did
        before attach. A second time changes nothing.
        """
        if not self.gone:
            self.fold()
            self._release()
            for place in self._places.values():
                place.release()
            for weight in self._held:
                release(weight)
            give_name(self.model, self.name)
            self.gone = True
        return self.model

    def detach(self) -> nn.Module:
        """Let go of the model: as `merge`, for there is no other weight than the present one."""
        return self.merge()

    def everything_else(self) -> list[nn.Parameter]:
        """Return what trains of the model besides: nothing that another adapter has."""
        theirs, own = adapter_parameters(self.model), {id(p) for p in self._held}
        return [p for p in self.model.parameters()
                if p.requires_grad and id(p) not in theirs and (id(p) in own or not who_holds(p))]

    def check_here(self) -> None:
        """Raise `RunError` once the model is plain for good."""
        if self.gone:
            raise RunError(f"{self.method}: it was detached for good: attach again")


@dataclass
class Layer:
    """One companded weight: where it is (in several places when it is tied), and its pair."""

    name: str
    homes: list[Home]
    scales: Scales
    finding: Finding

    @property
    def home(self) -> Home:
        """The first place where it is."""
        return self.homes[0]


class AttachedCompander(Attachment):
    """A compander on a model.

    Parameters
    ----------
    adapter : component
    settings : Settings
        What it was told.
    model : nn.Module
    name : str
    companded : list of Layer
        Weights that are known to fit.
    """

    def __init__(
        self, adapter: Any, settings: Settings, model: nn.Module, name: str, companded: list[Layer],
        coverage: Coverage,
    ) -> None:
        super().__init__(adapter, model, name, [h for layer in companded for h in layer.homes], coverage)
        self.options = settings
        self.function = named(settings.function)
        self.companded = {layer.name: layer for layer in companded}

    # -------------------------------------------------------------- what the paths differ in

    def parameter(self, name: str) -> nn.Parameter:
        """Return the parameter of the model that an optimizer is given for a layer."""
        raise NotImplementedError

    def v(self, name: str) -> Tensor:
        """Return v of a layer."""
        raise NotImplementedError

    def w(self, name: str) -> Tensor:
        """Return w of a layer, detached."""
        raise NotImplementedError

    def optimizer(self, cls: type, **options: Any) -> torch.optim.Optimizer:
        """Return an optimizer of this class that drives the model, the companded weights by the rule.

        Parameters
        ----------
        cls : type
            torch.optim.SGD, Adam or AdamW; on the reference path any.
        max_grad_norm : float, optional
            Clip the norm of the gradient, taken on dL/dw. `clip_grad_norm_` from outside sees dL/dw on the
            fast path and dL/dv on the reference path.
        groups : list of dict, optional
            Parameter groups: `params` holds patterns of parameter names ("layers.0.*", as in the plain
            model), the rest are options of the group. The first group that matches a parameter takes it;
            what none matches has the options given here.
        **options
            As for the class.

        Raises
        ------
        ConfigError
            For a class without a rule, or a pattern that matches nothing.
        """
        raise NotImplementedError

    def check_untouched(self) -> None:
        """Raise `RunError` when something other than the compander's optimizer has written to a weight."""
        raise NotImplementedError

    def cached(self) -> contextlib.AbstractContextManager:
        """Return a context in which w is computed once for each v; for evaluation loops."""
        return contextlib.nullcontext()

    # -------------------------------------------------------------- shared

    @property
    def layers(self) -> dict[str, nn.Module]:
        """The modules whose weights are companded, by name."""
        return {name: layer.home.module for name, layer in self.companded.items()}

    def weights(self) -> dict[str, Tensor]:
        return {name: self.w(name) for name in self.companded}

    @property
    def pairs(self) -> list[Scales]:
        """The distinct pairs (a, b)."""
        return list({id(layer.scales): layer.scales for layer in self.companded.values()}.values())

    def scales(self, name: str) -> Scales:
        """Return the pair of a layer."""
        return self.companded[name].scales

    def trainable(self) -> list[dict[str, Any]]:
        """Return groups: the companded weights, the learned pairs (never decayed), and all else."""
        own = [self.parameter(name) for name in self.companded]
        learned = [p for pair in self.pairs for p in pair.parameters()]
        ids = {id(p) for p in [*own, *learned]}
        rest = [p for p in self.everything_else() if id(p) not in ids]
        groups = [{"params": own}, {"params": learned, "weight_decay": 0.0}, {"params": rest}]
        return [group for group in groups if group["params"]]

    def state_dict(self) -> dict[str, Tensor]:
        """Return every v by layer name (`NAME.v`), learned pairs, and what they belong to."""
        return self._tensors()

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"{name}.v": self.v(name).detach() for name in self.companded}
        for name, pair in self._named_pairs().items():
            tensors |= {f"{name}.{key}": value.detach() for key, value in pair.state_dict().items()}
        return tensors

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Load every v and pair, and set w; all of them or, where one does not fit, none.

        Raises
        ------
        FileError
            When names or shapes differ, or the checkpoint is of another function or another (a, b).
        RunError
            After `merge` or `detach`.
        """
        self.check_here()
        for name, pair in self._named_pairs().items():
            saved = tensors.get(f"{name}.spec")
            if saved is not None and (fault := pair.mismatch(saved)):
                raise FileError(f"compander: {fault}")
        with torch.no_grad():
            copy_checked(self._tensors(), tensors, "compander")

    def _named_pairs(self) -> dict[str, Scales]:
        if len(self.pairs) == 1 and self.options.learn != "layer":
            return {"pair": self.pairs[0]}
        return {f"{name}.pair": layer.scales for name, layer in self.companded.items()}

    def metrics(self) -> dict[str, float]:
        """Return what is recorded at each evaluation: bands of the first layer, shares, learned pairs."""
        found = super().metrics() | {"saturated_share": saturated_share(self)}
        if self.options.learn != "none":
            for name, pair in self._named_pairs().items():
                layer = name.removesuffix(".pair")
                found |= {f"pair/{layer}/{which}": value for which, value in zip("ab", pair.numbers())}
        return found

    def report(self) -> dict[str, Any]:
        """Return plain values: counts, pairs, what was near or over the bound, the share nearly frozen."""
        found = {name: layer.finding for name, layer in self.companded.items()}
        report: dict[str, Any] = {
            "method": "compander", "function": self.options.function, "path": self.options.path,
            "learn": self.options.learn, "decay_on": "v" if self.options.decays_v else "w",
            **self.coverage.report(), "layers": len(found),
            "near_bound": sum(f.near for f in found.values()),
            "over_bound": sum(f.over for f in found.values()), "bound_policy": self.options.bound_policy,
            "at_bound": {n: {"largest": f.largest, "near": f.near, "over": f.over}
                         for n, f in found.items() if f.near or f.over},
        }
        pairs = {name: pair.numbers() for name, pair in self._named_pairs().items()}
        if len(pairs) == 1:
            a, b = next(iter(pairs.values()))
            report |= {"a": a, "b": b, "effective_lr_factor": (a / b) ** 2}
        else:
            report["pairs"] = {name.removesuffix(".pair"): list(pair) for name, pair in pairs.items()}
        if not self.folded:
            report["saturated_share"] = saturated_share(self)
        return report
