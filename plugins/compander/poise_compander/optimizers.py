"""Optimizers for companded weights: a subclass of torch's own, which drives all else as it always does.

What both paths share: parameter groups, clipping, what is refused, checkpoints. How a step is taken stands
with each path.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from poise.errors import ConfigError, FileError, RunError
from poise.walk import matches
from poise_compander.attached import AttachedCompander
from poise_compander.plain import parameter_names
from poise_compander.scales import Scales, number

Live = tuple[str, nn.Parameter, dict[str, Any]]  # name, parameter and group of a companded weight
ADAPTIVE = (torch.optim.Adam, torch.optim.AdamW)
_EPS = 1e-6  # as torch.nn.utils.clip_grad_norm_


def companded_optimizer(
    attached: AttachedCompander, path: type[CompandedOptimizer], cls: type, options: dict[str, Any]
) -> Any:
    """Build a path's optimizer by torch's class; see `AttachedCompander.optimizer`."""
    _refuse(attached, path, cls)
    clip, wanted = options.pop("max_grad_norm", None), options.pop("groups", None) or []
    if clip is not None and (isinstance(clip, bool) or not isinstance(clip, int | float) or not clip > 0):
        raise ConfigError(f"compander: max_grad_norm={clip!r}: allowed is a number > 0")
    kind = type(f"Companded{cls.__name__}", (path, cls), {"rule": cls})
    optimizer: Any = kind(_groups(attached, wanted), **options)
    optimizer.start(attached, clip)
    return optimizer


def _refuse(attached: AttachedCompander, path: type[CompandedOptimizer], cls: Any) -> None:
    """Raise `ConfigError` for a class that cannot drive companded weights, or a model that is not ready."""
    if attached.gone:
        raise ConfigError("compander: it was detached for good: attach again")
    if attached.folded:
        raise ConfigError("compander: the model is folded: call unfold() before making an optimizer")
    if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
        raise ConfigError(f"compander: {cls!r} is no torch optimizer class")
    path.refuse_rule(cls)
    closure = inspect.signature(cls.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ConfigError(f"compander: {cls.__name__} takes many gradients a step, of its closure; on the "
                          f"reference path v are ordinary parameters: {cls.__name__}(model.parameters())")


def _groups(attached: AttachedCompander, wanted: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return torch's parameter groups: companded weights, learned pairs and all else are never mixed."""
    names = {id(attached.parameter(name)): name for name in attached.companded}
    learned = {id(p) for pair in attached.pairs for p in pair.parameters()}  # no pattern names them
    public = {i: n for i, n in parameter_names(attached.model).items() if i not in learned}
    groups = []
    taken: set[int] = set()
    for options in wanted:
        _check_group(options)
    for group in attached.trainable():
        left = list(group["params"])
        for options in wanted:
            mine = [p for p in left
                    if id(p) in public and any(matches(public[id(p)], x) for x in options["params"])]
            taken |= {id(x) for x in mine}
            left = [p for p in left if not any(p is q for q in mine)]
            if mine:
                groups.append({**options, "params": mine, "companded": id(mine[0]) in names})
        if left:
            groups.append({**group, "params": left, "companded": id(left[0]) in names})
    for options in wanted:
        for pattern in options["params"]:
            if not any(matches(public[i], pattern) for i in taken & public.keys()):
                raise ConfigError(f"compander: the group pattern {pattern!r} matches no parameter that is "
                                  f"left")
    return groups


def _check_group(options: Any) -> None:
    patterns = options.get("params") if isinstance(options, dict) else None
    if not isinstance(patterns, list | tuple) or not all(isinstance(x, str) for x in patterns):
        raise ConfigError(f"compander: the group {options!r} is none: allowed is a dict with params, a "
                          f"list of patterns of parameter names ('layers.0.*'), and options of the class")


class CompandedOptimizer(torch.optim.Optimizer):
    """What both paths share."""

    rule: type
    attached: Any  # the path's own attachment
    clip: float | None
    saves_v = False  # whether v goes with the optimizer's state, the model having none

    @classmethod
    def refuse_rule(cls, rule: type) -> None:
        """Raise `ConfigError` for a class of torch's that this path cannot drive."""

    def start(self, attached: AttachedCompander, clip: float | None) -> None:
        """Learn whom the optimizer belongs to; once, after construction."""
        self.attached, self.clip = attached, clip
        self._step_supports_amp_scaling = False  # a gradient scaler divides first, `fused` or not
        self.names = {id(attached.parameter(name)): name for name in attached.companded}
        self.learned = [p for pair in attached.pairs for p in pair.parameters()]
        for group in self.param_groups:
            if group["companded"]:
                group["belongs_to"] = {n: attached.scales(n).spec.tolist()
                                       for n in (self.names[id(p)] for p in group["params"])}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add plain parameters, a new layer's say."""
        param_group.setdefault("companded", False)
        super().add_param_group(param_group)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise RunError("compander: an optimizer of companded weights belongs to its model and is not "
                       "copied or pickled: attach to the copy, and load state_dict() into its optimizer")

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take one step; returns what the closure returns.

        Raises
        ------
        RunError
            When something else has written to a weight, or the model is folded.
        """
        if self.attached.folded:
            raise RunError("compander: the model is folded: call unfold() before training goes on (after "
                           "detach(), take an optimizer of the plain model)")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.attached.check_untouched()
        self.take(list(self.live()), self.others())
        return loss

    def take(self, live: list[Live], others: list[nn.Parameter]) -> None:
        """Take the step of companded weights and of plain parameters, given those with a gradient."""
        raise NotImplementedError

    def live(self) -> Iterator[Live]:
        """Yield name, parameter and group of each companded weight that has a gradient."""
        for group in self.param_groups:
            if group["companded"]:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        yield self.names[id(parameter)], parameter, group

    def others(self) -> list[nn.Parameter]:
        """Return the plain parameters that have a gradient."""
        pair = {id(p) for p in self.learned}
        return [p for group in self.param_groups if not group["companded"] for p in group["params"]
                if p.grad is not None and id(p) not in pair]

    def inner_step(self, but: Sequence[nn.Parameter] = ()) -> None:
        """Take torch's own step, on all parameters but some, without a second round of its hooks."""
        step = self.rule.step
        hidden = [(p, p.grad) for p in but]
        for p in but:
            p.grad = None
        try:
            (step.__wrapped__ if getattr(step, "hooked", False) else step)(self)
        finally:
            for p, own in hidden:
                p.grad = own

    def decouples(self, group: dict[str, Any]) -> bool:
        """Return whether the rule decays weights beside the gradient's step, as AdamW does."""
        return issubclass(self.rule, torch.optim.AdamW) or bool(group.get("decoupled_weight_decay"))

    def factor(self, gradients: list[Tensor]) -> float:
        """Return what clipping multiplies every gradient by, given those with respect to w and the rest."""
        if self.clip is None or not gradients:
            return 1.0
        norm = torch.nn.utils.get_total_norm(gradients)
        factor = self.clip / (number(norm) + _EPS)
        return 1.0 if factor > 1 else factor  # NaN comes through, as with torch

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load; raises `FileError` for the state of another optimizer, function, or (a, b)."""
        for saved, own in zip(state_dict["param_groups"], self.param_groups):
            states = [state_dict["state"].get(number) for number in saved["params"]]
            fits = not own["companded"] or all(("v" in s) == self.saves_v for s in states if s)
            if not fits or bool(saved.get("companded")) != own["companded"]:
                raise FileError("compander: this is the state of another kind of optimizer, a plain one or "
                                "one of the other path: load what an optimizer like this has saved")
            for name in own.get("belongs_to") or {}:
                theirs = (saved.get("belongs_to") or {}).get(name)
                pair = self.attached.scales(name)
                if theirs is not None and (fault := pair.mismatch(torch.tensor(theirs, dtype=torch.uint8))):
                    raise FileError(f"compander, optimizer state of {name}: {fault}")
        self.load_checked(state_dict)

    def load_checked(self, state_dict: dict[str, Any]) -> None:
        """Load a state that is one of this kind."""
        super().load_state_dict(state_dict)


def gradient(parameter: nn.Parameter) -> Tensor:
    """Return the gradient of a parameter that has one."""
    assert parameter.grad is not None
    return parameter.grad


def sign(group: dict[str, Any]) -> float:
    """Return what `maximize` multiplies a gradient by."""
    return -1.0 if group.get("maximize") else 1.0


def set_gradients(pair: Scales, loss: Tensor) -> None:
    """Set the gradients of what trains of a pair, or add to them."""
    trained = [p for p in pair.parameters() if p.requires_grad]
    for p, found in zip(trained, torch.autograd.grad(loss, trained) if trained else ()):
        p.grad = found if p.grad is None else p.grad + found
