"""What both paths share: choosing weights, checking bounds, reports, checkpoints of v, optimizers."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.weak import WeakIdKeyDictionary

from poise.errors import ConfigError, FileError, RunError
from poise.files import copy_checked
from poise.walk import Weight, select
from poise_compander.bounds import Finding, clamped, fitting, look, refuse, rounded_up
from poise_compander.components import WeightCompander
from poise_compander.diagnostics import Watched
from poise_compander.functions import Function, named
from poise_compander.scales import Scales

KINDS = ("linear", "conv")
_HALF = (torch.float16, torch.bfloat16)
held: WeakIdKeyDictionary = WeakIdKeyDictionary()  # parameters that a compander holds


@dataclass
class Layer:
    """One companded weight: the modules that hold it (several when it is tied), and its pair."""

    name: str
    holders: list[nn.Module]
    scales: Scales
    finding: Finding

    @property
    def module(self) -> nn.Module:
        """The first module that holds the weight."""
        return self.holders[0]


def attach(options: WeightCompander, model: nn.Module, name: str) -> AttachedCompander:
    """Reparameterize the weights of linears and convolutions; see `WeightCompander.attach`."""
    from poise_compander.fast import FastCompander
    from poise_compander.reference import ReferenceCompander

    function = named(options.function)
    chosen = companded_weights(model, options.target_modules, options.exclude)
    modules = dict(model.named_modules(remove_duplicate=False))
    holders = {w.name: [w.module, *(modules[tie] for tie in w.tied_with if tie in modules)] for w in chosen}
    for w in chosen:
        _refuse(w.name, holders[w.name])
    found = {w.name: look(function, local(_plain(w.module)), options.a, w.name) for w in chosen}
    pairs = _pairs(options, function, found, {w.name: _plain(w.module).dtype for w in chosen})
    layers = [Layer(w.name, _distinct(holders[w.name]), pairs[w.name], found[w.name]) for w in chosen]
    with torch.no_grad():  # nothing is changed before every weight is known to fit
        for layer in layers:
            if layer.finding.over and options.bound_policy == "clamp":
                w = local(_plain(layer.module))
                w.copy_(clamped(function, w, options.a))
    made = FastCompander if options.path == "fast" else ReferenceCompander
    return made(options, model, name, layers)


def companded_weights(model: nn.Module, include: list[str] | None, exclude: list[str]) -> list[Weight]:
    """Return the weights of linears and convolutions, and of embeddings where an output layer shares them.

    Raises
    ------
    ConfigError
        When a pattern, or the whole selection, matches nothing; with candidates.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    chosen = [
        w for w in select(model, include, exclude or None, (*KINDS, "embedding"))
        if w.numel and (
            w.role in KINDS or any(isinstance(modules.get(tie), nn.Linear) for tie in w.tied_with))
    ]
    if not chosen:
        raise ConfigError("compander: the layers that are named are embeddings, or empty; it takes linears "
                          "and convolutions")
    return chosen


def is_companded(module: nn.Module) -> bool:
    """Return whether a compander holds the weight of a module."""
    return not parametrize.is_parametrized(module, "weight") and _plain(module) in held


def _plain(module: nn.Module) -> nn.Parameter:
    return module.get_parameter("weight")


def _distinct(modules: list[nn.Module]) -> list[nn.Module]:
    return list({id(m): m for m in modules}.values())


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a sharded tensor, or the tensor; a view without gradient."""
    tensor = tensor.detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[operator]


def _dense(tensor: Tensor) -> bool:
    """Return whether the elements fill their memory without gaps, in any order of axes."""
    sizes = sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape) if size > 1)
    expected = 1
    for stride, size in sizes:
        if stride != expected:
            return False
        expected *= size
    return True


def _refuse(name: str, holders: list[nn.Module]) -> None:
    """Raise `ConfigError` for a weight that cannot be companded."""
    for module in holders:
        if parametrize.is_parametrized(module, "weight"):
            raise ConfigError(f"compander: {name} is reparameterized already: detach that first")
    weight = _plain(holders[0])
    if is_companded(holders[0]):
        raise ConfigError(f"compander: {name} is companded already: call detach() on what attach returned "
                          f"before, and attach once")
    if not _dense(local(weight)):
        raise ConfigError(f"compander: {name} is a part of a larger tensor (strides {weight.stride()}): "
                          f"give the layer a weight of its own, nn.Parameter(weight.clone())")
    if not weight.is_floating_point():
        raise ConfigError(f"compander: {name} is {weight.dtype}: it takes real numbers; exclude it")
    if weight.dtype in _HALF:
        kind = str(weight.dtype).removeprefix("torch.")
        raise ConfigError(f"compander: {name} is {kind}: v needs more digits near the bound; keep weights "
                          f"in float32 (model.float()) and train under autocast")


def _pairs(options: WeightCompander, function: Function, found: Mapping[str, Finding],
           dtypes: Mapping[str, torch.dtype]) -> dict[str, Scales]:
    """Return the pair of each weight, with a grown where the policy says so."""
    if options.bound_policy == "raise":
        refuse(function, options.a, dict(found))
    by_layer = options.learn == "layer"

    def made(names: list[str]) -> Scales:
        largest = max(found[n].largest for n in names)
        grown = options.bound_policy == "grow" and any(found[n].over for n in names)
        a = rounded_up(fitting(function, largest)) if grown else options.a
        dtype = torch.float64 if any(dtypes[n] == torch.float64 for n in names) else torch.float32
        return Scales(function, a, options.b, options.learn != "none", options.guard, dtype)

    if by_layer:
        return {name: made([name]) for name in found}
    return dict.fromkeys(found, made(list(found)))


class AttachedCompander(Watched):
    """A compander on a model.

    Parameters
    ----------
    options : WeightCompander
    model : nn.Module
    name : str
    companded : list of Layer
    """

    def __init__(
        self, options: WeightCompander, model: nn.Module, name: str, companded: list[Layer]
    ) -> None:
        self.options, self.model, self.name = options, model, name
        self.function = named(options.function)
        self.companded = {layer.name: layer for layer in companded}
        self.folded = self.gone = False
        for layer in companded:
            held[self.parameter(layer.name)] = True

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

    def fold(self) -> None:
        """Put w into plain weights, in place."""
        raise NotImplementedError

    def unfold(self) -> None:
        """Reparameterize again; v comes back exactly where w was not changed meanwhile.

        Raises
        ------
        RunError
            After `detach`.
        """
        if self.gone:
            raise RunError("compander: it was detached for good: attach again")

    def folded_state_dict(self) -> dict[str, Tensor]:
        """Return a plain checkpoint with w in place of v, a copy; the live model is untouched."""
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
        return {name: layer.module for name, layer in self.companded.items()}

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
        rest = [p for p in self.model.parameters() if p.requires_grad and id(p) not in ids]
        groups = [{"params": own}, {"params": learned, "weight_decay": 0.0}, {"params": rest}]
        return [group for group in groups if group["params"]]

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
        from poise_compander.optimizers import companded_optimizer

        return companded_optimizer(self, cls, options)

    def state_dict(self) -> dict[str, Tensor]:
        """Return every v by layer name (`NAME.v`), learned pairs, and what they belong to."""
        return self._tensors()

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"{name}.v": self.v(name).detach() for name in self.companded}
        for name, pair in self._named_pairs().items():
            tensors |= {f"{name}.{key}": value.detach() for key, value in pair.state_dict().items()}
        return tensors

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Load every v and pair, and set w.

        Raises
        ------
        FileError
            When names or shapes differ, or the checkpoint is of another function or another (a, b).
        """
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

    def detach(self) -> nn.Module:
        """Fold for good and return the plain model; `unfold` raises `RunError` from then on."""
        if self.gone:
            return self.model
        parameters = [self.parameter(name) for name in self.companded] if not self.folded else []
        self.fold()
        for parameter in parameters:
            held.pop(parameter, None)
        for layer in self.companded.values():
            held.pop(_plain(layer.module), None)
        self.gone = True
        return self.model

    def metrics(self) -> dict[str, float]:
        """Return what is recorded at each evaluation: bands of the first layer, shares, learned pairs."""
        from poise_compander.diagnostics import saturated_share

        found = super().metrics() | {"saturated_share": saturated_share(self)}
        if self.options.learn != "none":
            for name, pair in self._named_pairs().items():
                layer = name.removesuffix(".pair")
                found |= {f"pair/{layer}/{which}": value for which, value in zip("ab", pair.numbers())}
        return found

    def report(self) -> dict[str, Any]:
        """Return plain values: counts, pairs, what was near or over the bound, the share nearly frozen."""
        from poise_compander.diagnostics import saturated_share

        found = {name: layer.finding for name, layer in self.companded.items()}
        report: dict[str, Any] = {
            "method": "compander", "function": self.options.function, "path": self.options.path,
            "learn": self.options.learn, "decay_on": "v" if self.options.decays_v else "w",
            "layers": len(found), "near_bound": sum(f.near for f in found.values()),
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
