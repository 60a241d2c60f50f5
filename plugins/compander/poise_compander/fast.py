"""The fast path: the model holds plain weights w, the optimizer owns v."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from poise.errors import FileError, RunError
from poise_compander import native, update
from poise_compander.attached import AttachedCompander, Layer, held, local
from poise_compander.bounds import below, beyond
from poise_compander.components import WeightCompander
from poise_compander.update import Step, Work

Wanted = tuple[str, Tensor, list[Tensor], Step]  # a layer's name, gradient, moments, and the step's numbers
_ULPS = 8  # Psi(v) is the same as w within so many units in the last place: kernels differ by one or two


class FastCompander(AttachedCompander):
    """A compander by the optimizer; `layer.weight` is an ordinary parameter that holds w."""

    def __init__(
        self, options: WeightCompander, model: nn.Module, name: str, companded: list[Layer]
    ) -> None:
        super().__init__(options, model, name, companded)
        _foreign.watch()
        with torch.no_grad():
            self._v = {layer.name: self._inverse(layer) for layer in companded}
        self._versions = {layer.name: self.parameter(layer.name)._version for layer in companded}
        self._hooks = [
            model.register_forward_pre_hook(_Watch(self)),
            model.register_load_state_dict_pre_hook(_Look(self)),
            model.register_load_state_dict_post_hook(_Refresh(self)),
        ]

    def parameter(self, name: str) -> nn.Parameter:
        parameter = self.companded[name].module._parameters["weight"]
        assert parameter is not None
        return parameter

    def v(self, name: str) -> Tensor:
        return self._v[name]

    def w(self, name: str) -> Tensor:
        return self.parameter(name).detach()

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
            if (own.dtype, own.device, own.stride()) != (w.dtype, w.device, w.stride()):
                raise RunError(f"compander: the weight of {name} is {w.dtype} with strides {w.stride()} "
                               f"on {w.device}, what the optimizer holds is {own.dtype} with "
                               f"{own.stride()} on {own.device}: convert the model before attach, "
                               f"or detach() and attach again")
        if g.dtype != w.dtype or g.stride() != w.stride():
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

    def fold(self) -> None:
        self.folded = True

    def unfold(self) -> None:
        super().unfold()
        if self.folded:
            self.folded = False
            self.refresh()

    def folded_state_dict(self) -> dict[str, Tensor]:
        return copy.deepcopy(dict(self.model.state_dict()))  # tied weights stay one

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        super().load_state_dict(tensors)
        with torch.no_grad():
            for name, layer in self.companded.items():
                w = local(self.parameter(name))
                found = self.function.forward(self._v[name], *layer.scales.numbers())
                w.copy_(torch.where(self._belongs(name), w, found))
                self._versions[name] = self.parameter(name)._version

    def detach(self) -> nn.Module:
        for hook in self._hooks:
            hook.remove()
        return super().detach()


def flat(tensor: Tensor) -> Tensor:
    """Return all elements of a dense tensor in the order of memory, a view."""
    return tensor.as_strided((tensor.numel(),), (1,))


class _Foreign:
    """Raises the version of companded weights that another optimizer steps: torch's fused ones do not."""

    def __init__(self) -> None:
        self.attachments = 0
        self.harmless: WeakKeyDictionary[torch.optim.Optimizer, tuple[int, int]] = WeakKeyDictionary()

    def watch(self) -> None:
        """Be called after every step of every optimizer from now on."""
        if not self.attachments:
            register_optimizer_step_post_hook(self)
        self.attachments += 1

    def __call__(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        from poise_compander.optimizers import is_own

        seen = self.attachments, sum(len(group["params"]) for group in optimizer.param_groups)
        if is_own(optimizer) or self.harmless.get(optimizer) == seen:
            return
        stepped = [p for group in optimizer.param_groups for p in group["params"] if p in held]
        for p in stepped:
            if p.grad is not None:
                torch.autograd.graph.increment_version(p)
        if not stepped:
            self.harmless[optimizer] = seen  # looking again at each step would cost others time


_foreign = _Foreign()


class _Hook:
    """A hook of the model; a copy of the model (for averaging, say) is plain and has none of its duties."""

    def __init__(self, attached: FastCompander | None) -> None:
        self.attached = attached

    def __deepcopy__(self, memo: dict) -> _Hook:
        return type(self)(None)

    def __reduce__(self) -> Any:
        return type(self), (None,)


class _Watch(_Hook):
    def __call__(self, module: nn.Module, arguments: Any) -> None:
        if torch.compiler.is_compiling() or self.attached is None or self.attached.folded:
            return
        self.attached.check_untouched()


class _Look(_Hook):
    """Refuses a checkpoint that does not fit below the bound before any of it is loaded."""

    def __call__(self, module: nn.Module, tensors: Mapping[str, Any], prefix: str, *_: Any) -> None:
        if self.attached is None or self.attached.folded:
            return
        if self.attached.options.learn != "none":
            return  # the a that it was trained with may be in the optimizer's state, to come later
        names = {id(self.attached.parameter(name)): name for name in self.attached.companded}
        for key, parameter in module.named_parameters(remove_duplicate=False):
            name, new = names.get(id(parameter)), tensors.get(f"{prefix}{key}")
            if name is not None and isinstance(new, Tensor):
                a = self.attached.scales(name).numbers()[0]
                if fault := beyond(self.attached.function, local(new), a, name):
                    raise FileError(f"compander: {fault}; none of its weights was loaded")


class _Refresh(_Hook):
    def __call__(self, module: nn.Module, keys: Any) -> None:
        attached = self.attached
        if attached is None or attached.folded:
            return
        if attached.options.learn == "none":
            attached.refresh()
            return
        for name in attached.companded:
            attached.doubt(name)
        with contextlib.suppress(RunError):  # then only the optimizer's state can give v; forward will ask
            attached.refresh()
