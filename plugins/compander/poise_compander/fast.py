"""The fast path: the model owns w, which is plain, and what attach returned owns v.

A step is one pass over memory: autograd gives dL/dw, and the kernel writes the moments, v and w. An
optimizer owns moments only; its `state_dict` takes v along, since the model's has none.

Sources: arXiv 2306.16993 section III-C (L2 on w through the chain rule; learned pairs: decay on v); the
adaptive rule on dL/dw with its step times Psi' is the one that the paper adopts from powerpropagation.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from poise.errors import ConfigError, FileError, RunError
from poise_compander import native, update, writers
from poise_compander.attached import AttachedCompander, Layer
from poise_compander.bounds import below, beyond
from poise_compander.coverage import Coverage
from poise_compander.optimizers import (
    ADAPTIVE,
    CompandedOptimizer,
    Live,
    companded_optimizer,
    gradient,
    set_gradients,
    sign,
)
from poise_compander.selection import local
from poise_compander.settings import Settings
from poise_compander.update import Step, Work

Wanted = tuple[str, Tensor, list[Tensor], Step]  # a layer's name, gradient, moments, and the step's numbers
RULES = (torch.optim.SGD, *ADAPTIVE)
VALUE = "value"  # what the saved state of a learned a or b holds beside its moments
_ULPS = 8  # Psi(v) is the same as w within so many units in the last place: kernels differ by one or two


class FastCompander(AttachedCompander):
    """A compander by the optimizer; `layer.weight` is an ordinary parameter that holds w.

    It owns v: made at attach, kept through fold and unfold, and the same for every optimizer made of it.
    """

    def __init__(
        self, adapter: Any, settings: Settings, model: nn.Module, name: str, companded: list[Layer],
        coverage: Coverage,
    ) -> None:
        super().__init__(adapter, settings, model, name, companded, coverage)
        writers.watch()
        with torch.no_grad():
            self._v = {layer.name: self._inverse(layer) for layer in companded}
        self._versions = {layer.name: self.parameter(layer.name)._version for layer in companded}
        self._hooks = [
            model.register_forward_pre_hook(_Hook(self._before_forward)),
            model.register_load_state_dict_pre_hook(_Hook(self._before_loading)),
            model.register_load_state_dict_post_hook(_Hook(self._after_loading)),
        ]

    def parameter(self, name: str) -> nn.Parameter:
        home = self.companded[name].home
        parameter = home.module._parameters[home.parameter]  # get_parameter costs a step too much
        assert parameter is not None
        return parameter

    def v(self, name: str) -> Tensor:
        return self._v[name]

    def w(self, name: str) -> Tensor:
        return self.parameter(name).detach()

    def optimizer(self, cls: type, **options: Any) -> FastOptimizer:
        return companded_optimizer(self, FastOptimizer, cls, options)

    def _inverse(self, layer: Layer) -> Tensor:
        a, b = layer.scales.numbers()
        w = local(self.parameter(layer.name))
        return self.function.inverse(w, a, b)

    # -------------------------------------------------------------- other writers

    @torch.no_grad()
    def check_untouched(self) -> None:
        for name, version in self._versions.items():
            parameter = self.parameter(name)
            version_now = parameter._version
            gathered = local(parameter).shape != self._v[name].shape  # sharded training, during forward
            if version_now == version or gathered:
                continue
            if not bool(self._belongs(name).all()):  # the same values again do no harm: DDP writes them
                raise RunError(
                    f"compander: the weight of {name} was written to by something else than the "
                    f"compander's optimizer, so v no longer belongs to it. Train with "
                    f"attached.optimizer(...), not with an optimizer of your own; load the model's "
                    f"checkpoint along with the optimizer's; after writing on purpose, call "
                    f"attached.refresh()")
            self._versions[name] = version_now

    def _belongs(self, name: str) -> Tensor:
        """Return where w is Psi(v), but for rounding."""
        w, (a, b) = local(self.parameter(name)), self.scales(name).numbers()
        found = self.function.forward(self._v[name], a, b)
        return (found - w).abs() <= _ULPS * torch.finfo(w.dtype).eps * w.abs()

    def doubt(self, name: str) -> None:
        """Have v and w compared at the next forward or step: one was loaded, perhaps without the other."""
        self._versions[name] = -1

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over weights that were written to: v = Psi^-1(w) where Psi(v) is not w already.

        Raises
        ------
        RunError
            When a new weight reaches the bound.
        """
        for name, layer in self.companded.items():
            a, b = layer.scales.numbers()
            w, v, same = local(self.parameter(name)), self._v[name], self._belongs(name)
            if fault := beyond(self.function, torch.where(same, 0, w), a, name):
                raise RunError(f"compander: {fault}")
            v.copy_(torch.where(same, v, self.function.inverse(below(self.function, w, a), a, b)))
            self._versions[name] = self.parameter(name)._version

    def _before_forward(self, module: nn.Module, arguments: Any) -> None:
        if not torch.compiler.is_compiling() and not self.folded:
            self.check_untouched()

    def _before_loading(self, module: nn.Module, tensors: Mapping[str, Any], prefix: str, *_: Any) -> None:
        """Refuse a checkpoint that does not fit below the bound before any of it is loaded."""
        if self.folded or self.options.learn != "none":
            return  # the a that it was trained with may be in the optimizer's state, to come later
        names = {id(self.parameter(name)): name for name in self.companded}
        for key, parameter in module.named_parameters(remove_duplicate=False):
            name, new = names.get(id(parameter)), tensors.get(f"{prefix}{key}")
            if name is not None and isinstance(new, Tensor):
                a = self.scales(name).numbers()[0]
                if fault := beyond(self.function, local(new), a, name):
                    raise FileError(f"compander: {fault}; none of its weights was loaded")

    def _after_loading(self, module: nn.Module, keys: Any) -> None:
        if self.folded:
            return
        if self.options.learn == "none":
            self.refresh()
            return
        for name in self.companded:
            self.doubt(name)
        with contextlib.suppress(RunError):  # then only the optimizer's state can give v; forward will ask
            self.refresh()

    # -------------------------------------------------------------- steps

    @torch.no_grad()
    def step(self, wanted: list[Wanted]) -> None:
        """Take one step of each layer that is given with its gradient and moments, in place."""
        work = [self._work(*one) for one in wanted]
        kernel, mine, others = self._split(work)
        if kernel is not None and mine:
            kernel.update(self.function, mine)
            for one in mine:
                torch.autograd.graph.increment_version(one.w)  # torch does not see it write
        for one in others:
            take = update.in_chunks if one.w.device.type == "cpu" else update.compiled
            take(self.function, one.step, flat(one.w), flat(one.v), flat(one.g),
                 [flat(m) for m in one.moments])
        for name, *_ in wanted:
            self._versions[name] = self.parameter(name)._version

    @torch.no_grad()
    def sums(self, wanted: list[Wanted]) -> list[Tensor]:
        """Return (dL/da, dL/db) of each layer, float64, shape (2,)."""
        work = [self._work(*one) for one in wanted]
        kernel, mine, others = self._split(work)
        found = {id(one): update.sums_in_chunks(self.function, one.step, *map(flat, (one.w, one.v, one.g)))
                 for one in others}
        if kernel is not None and mine:
            found |= {id(one): pair for one, pair in zip(mine, kernel.sums(self.function, mine))}
        return [found[id(one)] for one in work]

    def _work(self, name: str, gradient: Tensor, moments: list[Tensor], step: Step) -> Work:
        w, g = local(self.parameter(name)), local(gradient)
        v = self._v[name]
        for own in (v, *moments):  # the kernel trusts them: a foreign size would be written past its end
            if (own.dtype, own.device, layout(own)) != (w.dtype, w.device, layout(w)):
                raise RunError(f"compander: the weight of {name} is {w.dtype} with strides {w.stride()} "
                               f"on {w.device}, its v or a moment is {own.dtype} with "
                               f"{own.stride()} on {own.device}: convert the model before attach, "
                               f"or detach() and attach again")
        if g.dtype != w.dtype or layout(g) != layout(w):
            g = torch.empty_like(w).copy_(g)
        return Work(step, w, v, g, moments)

    def _split(self, work: list[Work]) -> tuple[native.Kernel | None, list[Work], list[Work]]:
        """Return the C kernel, the layers that it can take, and the others."""
        kernel = native.kernel() if any(one.w.device.type == "cpu" for one in work) else None
        takes = [kernel is not None and kernel.takes(self.function, one.w) for one in work]
        return (kernel, [one for one, its in zip(work, takes) if its],
                [one for one, its in zip(work, takes) if not its])

    def state_dict(self) -> dict[str, Tensor]:
        if not self.folded:
            self.check_untouched()  # such a v would be of no use
        return super().state_dict()

    # -------------------------------------------------------------- folding: the weights are plain already

    def _unfold(self) -> None:
        self.refresh()

    def _release(self) -> None:
        super()._release()
        for hook in self._hooks:
            hook.remove()

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        super().load_state_dict(tensors)
        with torch.no_grad():
            for name, layer in self.companded.items():
                w = local(self.parameter(name))
                found = self.function.forward(self._v[name], *layer.scales.numbers())
                w.copy_(torch.where(self._belongs(name), w, found))
                self._versions[name] = self.parameter(name)._version


def layout(tensor: Tensor) -> tuple[torch.Size, list[int]]:
    """Return a tensor's shape, and the strides of the axes that have a length: of one of size 1 it says
    nothing, and torch writes it differently for the same memory (channels_last filters of 1 x 1)."""
    return tensor.shape, [stride for size, stride in zip(tensor.shape, tensor.stride()) if size > 1]


def flat(tensor: Tensor) -> Tensor:
    """Return all elements of a dense tensor in the order of memory, a view."""
    return tensor.as_strided((tensor.numel(),), (1,))


class FastOptimizer(CompandedOptimizer):
    """Steps w and the v that belongs to it in one pass; holds the moments, and nothing else of a weight."""

    attached: FastCompander
    saves_v = True

    @classmethod
    def refuse_rule(cls, rule: type) -> None:
        if rule not in RULES:
            raise ConfigError(f"compander: the fast path has no rule for {rule.__name__}; it drives SGD, "
                              f"Adam and AdamW. path='reference' takes other optimizers, on dL/dv")

    def start(self, attached: AttachedCompander, clip: float | None) -> None:
        super().start(attached, clip)
        writers.trust(self)

    def take(self, live: list[Live], others: list[nn.Parameter]) -> None:
        attached = self.attached
        scale = self.factor([gradient(p) for p in (*(p for _, p, _ in live), *others)])
        if scale != 1.0:
            for p in others:
                gradient(p).mul_(scale)
        before = {name: attached.scales(name).numbers() for name, _, _ in live}
        if self.learned:
            self._pair_gradients(live, scale, before)
        self.inner_step(but=[p for _, p, _ in live])
        steps: dict[Any, Step] = {}  # most layers share one
        work = []
        for name, p, group in live:
            moments, count = self._moments(p, name, group)
            after = attached.scales(name).numbers()
            key = id(group), count, before[name], after
            if key not in steps:
                steps[key] = self._numbers(group, count, scale, before[name], after)
            work.append((name, gradient(p), moments, steps[key]))
        attached.step(work)

    def _moments(self, p: nn.Parameter, name: str, group: dict[str, Any]) -> tuple[list[Tensor], int]:
        """Return the moments of a weight, made where they are not there, and the number of their step."""
        state = self.state[p]
        keys = self._keys(group)
        if not state:
            state["step"] = 0
        missing = [key for key in keys if key not in state]  # momentum may be switched on later
        for key in missing:
            state[key] = torch.zeros_like(self.attached.v(name))
        state["step"] = int(state["step"]) + 1  # torch's Adam makes a tensor of it when it loads
        first = "momentum_buffer" in missing  # which takes the first gradient whole
        return [state[key] for key in keys], 1 if first else state["step"]

    def _keys(self, group: dict[str, Any]) -> tuple[str, ...]:
        if issubclass(self.rule, ADAPTIVE):
            return ("exp_avg", "exp_avg_sq") + (("max_exp_avg_sq",) if group["amsgrad"] else ())
        return ("momentum_buffer",) if group["momentum"] else ()

    def _pair_gradients(
        self, live: list[Live], scale: float, before: dict[str, tuple[float, float]]
    ) -> None:
        """Set the gradients of learned pairs: sums of g dw/da and g dw/db, through the guard."""
        attached = self.attached
        totals: dict[int, Tensor] = {}
        work = [(name, gradient(p), [], self._numbers(group, 1, scale, before[name], before[name]))
                for name, p, group in live]
        for (name, p, group), found in zip(live, attached.sums(work)):
            _add_up(p, found)
            pair = attached.scales(name)
            totals[id(pair)] = totals.get(id(pair), 0) + sign(group) * found  # torch's step has it again
        for pair in attached.pairs:
            pair.zero_grad()  # model.zero_grad() does not reach it, and the sums hold all that w.grad does
            if id(pair) in totals:
                by_a, by_b = totals[id(pair)].to(pair.raw_a.dtype)
                with torch.enable_grad():
                    set_gradients(pair, pair.a * by_a + pair.b * by_b)

    def state_dict(self) -> dict[str, Any]:
        """Return torch's state, and what the model does not hold: every v, and learned pairs."""
        saved = super().state_dict()
        state = dict(saved["state"])
        for number, parameter, name in self._own(saved):
            kept = {VALUE: parameter.detach().clone()} if name is None else {"v": self.attached.v(name)}
            state[number] = {**state.get(number, {}), **kept}
        return {**saved, "state": state}

    def load_checked(self, state_dict: dict[str, Any]) -> None:
        """Load; v and learned pairs go to the attachment, which owns them."""
        state = dict(state_dict["state"])
        values, found = {}, {}
        for number, parameter, name in self._own(state_dict):  # torch's own rules know neither
            rest = dict(state.get(number, {}))
            if name is not None and "v" in rest:
                found[name] = self._fitting(name, rest.pop("v"))
            elif name is None and VALUE in rest:
                values[parameter] = rest.pop(VALUE)
            elif name is None:
                raise FileError("compander: the optimizer's state holds no values of the learned pairs: "
                                "load one that was saved by an optimizer of this kind")
            state[number] = rest
        super().load_checked({**state_dict, "state": {k: v for k, v in state.items() if v}})
        with torch.no_grad():
            for parameter, value in values.items():
                parameter.copy_(value)
            for name, v in found.items():
                self.attached.v(name).copy_(v)
                self.attached.doubt(name)

    def _fitting(self, name: str, v: Tensor) -> Tensor:
        if v.shape != self.attached.v(name).shape:
            raise FileError(f"compander, optimizer state of {name}: v has shape {tuple(v.shape)}, here "
                            f"{tuple(self.attached.v(name).shape)}")
        return v

    def _own(self, saved: dict[str, Any]) -> Iterator[tuple[int, nn.Parameter, str | None]]:
        """Yield the saved number of each companded weight and learned number, it, and the layer's name."""
        learned = {id(p) for p in self.learned}
        for theirs, own in zip(saved["param_groups"], self.param_groups):
            for number, parameter in zip(theirs["params"], own["params"]):
                name = self.names.get(id(parameter))
                if name is not None or id(parameter) in learned:
                    yield number, parameter, name

    def _numbers(self, group: dict[str, Any], count: int, scale: float, now: tuple[float, float],
                 after: tuple[float, float]) -> Step:
        usual = {"lr": float(group["lr"]), "weight_decay": float(group["weight_decay"]),
                 "scale": scale * sign(group), "decay_on_v": self.attached.options.decays_v}
        if issubclass(self.rule, ADAPTIVE):
            beta1, beta2 = (float(x) for x in group["betas"])
            return Step(*now, *after, **usual, adaptive=True, decoupled=self.decouples(group),
                        beta1=beta1, beta2=beta2, eps=float(group["eps"]), amsgrad=bool(group["amsgrad"]),
                        correct1=1 - beta1**count, correct2=math.sqrt(1 - beta2**count))
        return Step(*now, *after, **usual, momentum=float(group["momentum"]),
                    nesterov=bool(group["nesterov"]),
                    keep=1.0 if count == 1 else 1 - float(group["dampening"]))


def _add_up(parameter: Any, sums: Tensor) -> None:
    """Add sums up, in place, over the processes that hold a part of a sharded parameter."""
    if hasattr(parameter, "device_mesh"):
        torch.distributed.all_reduce(sums, group=parameter.device_mesh.get_group())


class _Hook:
    """Calls an attachment; a copy of the model (for averaging, say) is plain and has none of its duties."""

    def __init__(self, act: Callable[..., None] | None) -> None:
        self.act = act

    def __call__(self, *arguments: Any) -> None:
        if self.act is not None:
            self.act(*arguments)

    def __deepcopy__(self, memo: dict) -> _Hook:
        return _Hook(None)

    def __reduce__(self) -> Any:
        return _Hook, (None,)
