"""Optimizers for companded weights: a subclass of torch's own, which drives all else as it always does.

Fast path: the parameters are w, autograd gives dL/dw, and each step goes through the kernel.
Reference path: the parameters are v, autograd gives dL/dv; decay, clipping and the adaptive rule are put
around torch's own step.

Sources: arXiv 2306.16993 section III-C (L2 on w through the chain rule; learned pairs: decay on v); the
adaptive rule on dL/dw with its step times Psi' is the one that the paper adopts from powerpropagation.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from poise.errors import ConfigError, FileError, RunError
from poise.walk import matches
from poise_compander import update
from poise_compander.update import Step

if TYPE_CHECKING:
    from poise_compander.attached import AttachedCompander
    from poise_compander.scales import Scales

Live = tuple[str, nn.Parameter, dict[str, Any]]  # name, parameter and group of a companded weight
ADAPTIVE = (torch.optim.Adam, torch.optim.AdamW)
RULES = (torch.optim.SGD, *ADAPTIVE)
# whose decay is known to be L2, or decoupled where the group says so; it can be taken on w
KNOWN_DECAY = (*RULES, torch.optim.ASGD, torch.optim.Adadelta, torch.optim.Adagrad, torch.optim.Adamax,
               torch.optim.NAdam, torch.optim.RAdam, torch.optim.RMSprop)
VALUE = "value"  # what the state of a learned a or b holds beside its moments
_EPS = 1e-6  # as torch.nn.utils.clip_grad_norm_


def companded_optimizer(
    attached: AttachedCompander, cls: type, options: dict[str, Any]
) -> torch.optim.Optimizer:
    """Build the optimizer; see `AttachedCompander.optimizer`."""
    from poise_compander.fast import FastCompander

    fast = isinstance(attached, FastCompander)
    _refuse(attached, cls, fast)
    clip, wanted = options.pop("max_grad_norm", None), options.pop("groups", None) or []
    if clip is not None and (isinstance(clip, bool) or not isinstance(clip, int | float) or not clip > 0):
        raise ConfigError(f"compander: max_grad_norm={clip!r}: allowed is a number > 0")
    kind = type(f"Companded{cls.__name__}", (_Fast if fast else _Reference, cls), {"rule": cls})
    optimizer: Any = kind(_groups(attached, wanted), **options)
    optimizer.start(attached, clip)
    return optimizer


def _refuse(attached: AttachedCompander, cls: Any, fast: bool) -> None:
    """Raise `ConfigError` for a class that cannot drive companded weights, or a model that is not ready."""
    if attached.gone:
        raise ConfigError("compander: it was detached for good: attach again")
    if attached.folded:
        raise ConfigError("compander: the model is folded: call unfold() before making an optimizer")
    if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
        raise ConfigError(f"compander: {cls!r} is no torch optimizer class")
    if fast and cls not in RULES:
        raise ConfigError(f"compander: the fast path has no rule for {cls.__name__}; it drives SGD, Adam "
                          f"and AdamW. path='reference' takes other optimizers, on dL/dv")
    closure = inspect.signature(cls.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ConfigError(f"compander: {cls.__name__} takes many gradients a step, of its closure; on the "
                          f"reference path v are ordinary parameters: {cls.__name__}(model.parameters())")


def _groups(attached: AttachedCompander, wanted: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return torch's parameter groups: companded weights, learned pairs and all else are never mixed."""
    names = {id(attached.parameter(name)): name for name in attached.companded}
    learned = {id(p) for pair in attached.pairs for p in pair.parameters()}  # no pattern names them
    public = {id(p): n.replace("parametrizations.weight.original", "weight")
              for n, p in attached.model.named_parameters() if id(p) not in learned}
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


class _Companded(torch.optim.Optimizer):
    """What both paths share."""

    rule: type
    attached: AttachedCompander
    clip: float | None
    holds_v = False  # whether v is state of the optimizer, and not a parameter

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

    def inner_step(self) -> None:
        """Take torch's own step, without a second round of its hooks."""
        step = self.rule.step
        (step.__wrapped__ if getattr(step, "hooked", False) else step)(self)

    def factor(self, gradients: list[Tensor]) -> float:
        """Return what clipping multiplies every gradient by, given those with respect to w and the rest."""
        if self.clip is None or not gradients:
            return 1.0
        norm = torch.nn.utils.get_total_norm(gradients)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # type: ignore[operator]
        factor = self.clip / (float(norm) + _EPS)
        return 1.0 if factor > 1 else factor  # NaN comes through, as with torch

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load; raises `FileError` for the state of another optimizer, function, or (a, b)."""
        for saved, own in zip(state_dict["param_groups"], self.param_groups):
            states = [state_dict["state"].get(number) for number in saved["params"]]
            fits = not own["companded"] or all(("v" in s) == self.holds_v for s in states if s)
            if not fits or bool(saved.get("companded")) != own["companded"]:
                raise FileError("compander: this is the state of another kind of optimizer, a plain one or "
                                "one of the other path: load what an optimizer like this has saved")
            for name in own.get("belongs_to") or {}:
                theirs = (saved.get("belongs_to") or {}).get(name)
                pair = self.attached.scales(name)
                if theirs is not None and (fault := pair.mismatch(torch.tensor(theirs, dtype=torch.uint8))):
                    raise FileError(f"compander, optimizer state of {name}: {fault}")
        super().load_state_dict(state_dict)


class _Fast(_Companded):
    holds_v = True

    def take(self, live: list[Live], others: list[nn.Parameter]) -> None:
        attached = self.attached
        scale = self.factor([p.grad for _, p, _ in live] + [p.grad for p in others])  # type: ignore[misc]
        if scale != 1.0:
            for p in others:
                p.grad.mul_(scale)  # type: ignore[union-attr]
        before = {name: attached.scales(name).numbers() for name, _, _ in live}
        if self.learned:
            self._pair_gradients(live, scale, before)
        hidden = [(p, p.grad) for _, p, _ in live]
        for p, _ in hidden:
            p.grad = None
        try:
            self.inner_step()
        finally:
            for p, gradient in hidden:
                p.grad = gradient
        steps: dict[Any, Step] = {}  # most layers share one
        work = []
        for name, p, group in live:
            moments, count = self._moments(p, name, group)
            after = attached.scales(name).numbers()
            key = id(group), count, before[name], after
            if key not in steps:
                steps[key] = _numbers(self, group, count, scale, before[name], after)
            work.append((name, p.grad, moments, steps[key]))
        attached.step(work)  # type: ignore[attr-defined]

    def _moments(self, p: nn.Parameter, name: str, group: dict[str, Any]) -> tuple[list[Tensor], int]:
        """Return the moments of a weight, made where they are not there, and the number of their step."""
        state = self.state[p]
        keys = self._keys(group)
        if not state:
            state["step"] = 0
            state["v"] = self.attached.v(name)
        missing = [key for key in keys if key not in state]  # momentum may be switched on later
        for key in missing:
            state[key] = torch.zeros_like(state["v"])
        state["step"] = int(state["step"]) + 1  # torch's Adam makes a tensor of it when it loads
        first = "momentum_buffer" in missing  # which takes the first gradient whole
        return [state[key] for key in keys], 1 if first else state["step"]

    def _keys(self, group: dict[str, Any]) -> tuple[str, ...]:
        if issubclass(self.rule, ADAPTIVE):
            return ("exp_avg", "exp_avg_sq") + (("max_exp_avg_sq",) if group["amsgrad"] else ())
        return ("momentum_buffer",) if group["momentum"] else ()

    def _pair_gradients(self, live, scale: float, before: dict[str, tuple[float, float]]) -> None:
        """Set the gradients of learned pairs: sums of g dw/da and g dw/db, through the guard."""
        attached = self.attached
        totals: dict[int, Tensor] = {}
        work = [(name, p.grad, [], _numbers(self, group, 1, scale, before[name], before[name]))
                for name, p, group in live]
        for (name, p, group), found in zip(live, attached.sums(work)):  # type: ignore[attr-defined]
            if hasattr(p, "device_mesh"):
                torch.distributed.all_reduce(found, group=p.device_mesh.get_group())  # type: ignore[attr-defined]
            pair = attached.scales(name)
            totals[id(pair)] = totals.get(id(pair), 0) + _sign(group) * found  # torch's step has it again
        for pair in attached.pairs:
            pair.zero_grad()  # model.zero_grad() does not reach it, and the sums hold all that w.grad does
            if id(pair) in totals:
                by_a, by_b = totals[id(pair)].to(pair.raw_a.dtype)
                with torch.enable_grad():
                    _set_gradients(pair, pair.a * by_a + pair.b * by_b)

    def state_dict(self) -> dict[str, Any]:
        """Return torch's state and the values of learned pairs, which the model does not hold."""
        saved = super().state_dict()
        state = dict(saved["state"])
        for number, parameter in self._pairs(saved):
            state[number] = {**state.get(number, {}), VALUE: parameter.detach().clone()}
        return {**saved, "state": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state = dict(state_dict["state"])
        values = {}
        for number, parameter in self._pairs(state_dict):
            rest = dict(state.get(number, {}))
            if VALUE not in rest:
                raise FileError("compander: the optimizer's state holds no values of the learned pairs: "
                                "load one that was saved by an optimizer of this kind")
            values[parameter] = rest.pop(VALUE)  # torch's own rules do not know it
            state[number] = rest
        super().load_state_dict({**state_dict, "state": {k: v for k, v in state.items() if v}})
        with torch.no_grad():
            for parameter, value in values.items():
                parameter.copy_(value)
            for group in self.param_groups:
                for p in group["params"] if group["companded"] else ():
                    state = self.state.get(p)
                    if state:  # one v, the attached one
                        own = self.attached.v(self.names[id(p)])
                        own.copy_(state["v"])
                        state["v"] = own
                        self.attached.doubt(self.names[id(p)])  # type: ignore[attr-defined]

    def _pairs(self, saved: dict[str, Any]) -> Iterator[tuple[int, nn.Parameter]]:
        """Yield the number of each learned parameter in a saved state, and the parameter."""
        learned = {id(p) for p in self.learned}
        for theirs, own in zip(saved["param_groups"], self.param_groups):
            for number, parameter in zip(theirs["params"], own["params"]):
                if id(parameter) in learned:
                    yield number, parameter


def _numbers(optimizer: _Companded, group: dict[str, Any], count: int, scale: float,
             now: tuple[float, float], after: tuple[float, float]) -> Step:
    usual = {"lr": float(group["lr"]), "weight_decay": float(group["weight_decay"]),
             "scale": scale * _sign(group), "decay_on_v": optimizer.attached.options.decays_v}
    if issubclass(optimizer.rule, ADAPTIVE):
        beta1, beta2 = (float(x) for x in group["betas"])
        return Step(*now, *after, **usual, adaptive=True, decoupled=_decoupled(optimizer.rule, group),
                    beta1=beta1, beta2=beta2, eps=float(group["eps"]), amsgrad=bool(group["amsgrad"]),
                    correct1=1 - beta1**count, correct2=math.sqrt(1 - beta2**count))
    return Step(*now, *after, **usual, momentum=float(group["momentum"]), nesterov=bool(group["nesterov"]),
                keep=1.0 if count == 1 else 1 - float(group["dampening"]))


def _sign(group: dict[str, Any]) -> float:
    return -1.0 if group.get("maximize") else 1.0


def _set_gradients(pair: Scales, loss: Tensor) -> None:
    """Set the gradients of what trains of a pair, or add to them."""
    trained = [p for p in pair.parameters() if p.requires_grad]
    for p, gradient in zip(trained, torch.autograd.grad(loss, trained) if trained else ()):
        p.grad = gradient if p.grad is None else p.grad + gradient


def _decoupled(rule: type, group: dict[str, Any]) -> bool:
    return issubclass(rule, torch.optim.AdamW) or bool(group.get("decoupled_weight_decay"))


def is_own(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether an optimizer was made by `AttachedCompander.optimizer`."""
    return isinstance(optimizer, _Companded)


class _Reference(_Companded):
    def start(self, attached: AttachedCompander, clip: float | None) -> None:
        super().start(attached, clip)
        decayed = any(group["companded"] and group.get("weight_decay") for group in self.param_groups)
        if decayed and not self.decay_is_known and not attached.options.decays_v:
            raise ConfigError(f"compander: how {self.rule.__name__} decays is not known, so it cannot be "
                              f"taken on w: give decay_on='v', or weight_decay=0")

    @property
    def decay_is_known(self) -> bool:
        """Whether the decay is taken here; what is not known acts on v, by torch's own step."""
        return self.rule in KNOWN_DECAY

    def take(self, live: list[Live], others: list[nn.Parameter]) -> None:
        slope = {name: self.attached.psi(name).derivative(p) for name, p, _ in live}  # type: ignore[attr-defined]
        by_w = [update.by_slope(p.grad, slope[name]) for name, p, _ in live]  # type: ignore[arg-type]
        scale = self.factor([*by_w, *(p.grad for p in others)])  # type: ignore[misc]
        if scale != 1.0:
            for p in [*others, *(p for _, p, _ in live), *(p for p in self.learned if p.grad is not None)]:
                p.grad.mul_(scale)  # type: ignore[union-attr]
        pulls = {name: self._decay(name, p, group, slope[name]) for name, p, group in live}
        starts = {}
        if issubclass(self.rule, ADAPTIVE):  # the rule sees dL/dw, and its step alone is left in p
            for name, p, _ in live:
                p.grad.copy_(update.by_slope(p.grad, slope[name]))  # type: ignore[union-attr,arg-type]
                starts[name] = p.clone()
                p.zero_()
        with self._without_decay():
            self.inner_step()
        for name, p, _ in live:
            if name in starts:
                p.mul_(slope[name]).add_(starts[name])
            if pulls[name] is not None:
                p.sub_(pulls[name])  # type: ignore[arg-type]

    @contextlib.contextmanager
    def _without_decay(self) -> Iterator[None]:
        """Keep torch's own step from decaying v where that is done here."""
        decays = [(group, group["weight_decay"]) for group in self.param_groups
                  if group["companded"] and self.decay_is_known and "weight_decay" in group]
        for group, _ in decays:
            group["weight_decay"] = 0.0
        try:
            yield
        finally:
            for group, decay in decays:
                group["weight_decay"] = decay

    def _decay(self, name: str, p: nn.Parameter, group: dict[str, Any], slope: Tensor) -> Tensor | None:
        """Return what a decoupled decay takes off v after the step; add an L2 one to dL/dv."""
        decay = group.get("weight_decay") if self.decay_is_known else None
        if not decay:
            return None
        pull = p.clone() if self.attached.options.decays_v else slope * self.attached.w(name)
        if _decoupled(self.rule, group):
            return group["lr"] * decay * pull
        decay = _sign(group) * decay
        p.grad.add_(pull, alpha=decay)  # type: ignore[union-attr]
        if not self.attached.options.decays_v:
            self._decay_of_pair(name, p, decay)
        return None

    def _decay_of_pair(self, name: str, p: nn.Parameter, decay: float) -> None:
        """Add to the gradients of a learned pair what L2 on w gives them."""
        pair, function = self.attached.scales(name), self.attached.function
        if not pair.learned:
            return
        with torch.enable_grad():
            w = function.forward(p.detach(), pair.a, pair.b)
            _set_gradients(pair, decay * 0.5 * w.square().sum())
