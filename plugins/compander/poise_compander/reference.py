"""The reference path: the model owns v, and torch's parametrize computes w = Psi(v) at every use.

Autograd gives dL/dv; decay, clipping and the adaptive rule are put around torch's own step.

Sources: arXiv 2306.16993 section III-C (L2 on w through the chain rule; learned pairs: decay on v); the
adaptive rule on dL/dw with its step times Psi' is the one that the paper adopts from powerpropagation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from poise.errors import ConfigError, FileError, RunError
from poise.walk.plain import computed
from poise_compander import update
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
from poise_compander.scales import Scales
from poise_compander.settings import Settings

# whose decay is known to be L2, or decoupled where the group says so; it can be taken on w
KNOWN_DECAY = (torch.optim.SGD, *ADAPTIVE, torch.optim.ASGD, torch.optim.Adadelta, torch.optim.Adagrad,
               torch.optim.Adamax, torch.optim.NAdam, torch.optim.RAdam, torch.optim.RMSprop)


class Psi(nn.Module):
    """The parametrization w = Psi(v), and its exact inverse."""

    def __init__(self, scales: Scales) -> None:
        super().__init__()
        self.scales = scales
        self.given = _Given()

    def forward(self, v: Tensor) -> Tensor:
        """Return w, same shape as v."""
        w = self.scales.function.forward(v, self.scales.a, self.scales.b)
        if not torch.compiler.is_compiling():
            self.given.remember(w)
        return w

    def right_inverse(self, w: Tensor) -> Tensor:
        """Return v with Psi(v) = w.

        Raises
        ------
        ConfigError
            When a weight is over the bound, where there is no v.
        """
        a, b = self.scales.numbers()
        if fault := beyond(self.scales.function, w, a, "the layer"):
            raise ConfigError(f"compander: {fault}")
        return self.scales.function.inverse(below(self.scales.function, w, a), a, b)

    def derivative(self, v: Tensor) -> Tensor:
        """Return Psi'(v), same shape as v."""
        return self.scales.function.derivative(v, self.scales.a, self.scales.b)


class _Given:
    """The last w that a layer was given: a write to it, which nothing would keep, shows in its version."""

    def __init__(self) -> None:
        self.last: tuple[Tensor, int] | None = None

    def remember(self, w: Tensor) -> None:
        self.check()
        seen = w.detach()  # shares the version counter, not the graph
        self.last = seen, seen._version

    def check(self) -> None:
        if self.last is not None and self.last[0]._version != self.last[1]:
            self.last = None
            raise RunError("compander: the weight of a companded layer was written to in place; on the "
                           "reference path such a write is lost, since w is computed from v at every use: "
                           "assign it (layer.weight = tensor), or initialise before attach")

    def __deepcopy__(self, memo: dict) -> _Given:
        return _Given()

    def __reduce__(self) -> Any:
        return _Given, ()


class ReferenceCompander(AttachedCompander):
    """A compander by parametrizations; `layer.weight` is computed, and v is a parameter of the model."""

    def __init__(
        self, adapter: Any, settings: Settings, model: nn.Module, name: str, companded: list[Layer],
        coverage: Coverage,
    ) -> None:
        super().__init__(adapter, settings, model, name, companded, coverage)
        self._unfolded: dict[str, tuple[Tensor, Tensor]] = {}
        for layer in companded:
            _register(layer)
        self._hook = model.register_load_state_dict_pre_hook(_take_plain)

    def parameter(self, name: str) -> nn.Parameter:
        return self.companded[name].home.parts.original

    def v(self, name: str) -> Tensor:
        return self._unfolded[name][0] if self.folded else self.parameter(name)

    def w(self, name: str) -> Tensor:
        with torch.no_grad():
            return self.companded[name].home.tensor.detach()

    def psi(self, name: str) -> Psi:
        """Return the parametrization of a layer."""
        return self.companded[name].home.parts[0]

    def optimizer(self, cls: type, **options: Any) -> ReferenceOptimizer:
        return companded_optimizer(self, ReferenceOptimizer, cls, options)

    def cached(self) -> contextlib.AbstractContextManager:
        return parametrize.cached()

    def check_untouched(self) -> None:
        if not self.folded:
            for name in self.companded:
                self.psi(name).given.check()

    @torch.no_grad()
    def _fold(self) -> None:
        self.check_untouched()  # before the first weight is made plain
        for name, layer in self.companded.items():
            v = self.parameter(name).detach().clone()
            for home in layer.homes:
                home.parts.original.data.copy_(v)  # the home before has left w there
                self._places[home].free()
            self._unfolded[name] = v, layer.home.tensor.detach().clone()

    def _unfold(self) -> None:
        for name, layer in self.companded.items():  # nothing is changed before every weight is known to fit
            a = layer.scales.numbers()[0]
            if fault := beyond(self.function, layer.home.tensor, a, name):
                raise ConfigError(f"compander: {fault}")
        for name, (v, w) in self._unfolded.items():
            layer = self.companded[name]
            untouched = torch.equal(layer.home.tensor, w)
            _register(layer)
            if untouched:
                self.parameter(name).data.copy_(v)
        self._unfolded = {}

    def _release(self) -> None:
        super()._release()
        self._hook.remove()


def _register(layer: Layer) -> None:
    """Parametrize every home of a weight by the same v."""
    plain = layer.home.tensor.detach().clone()
    for home in layer.homes:
        home.plain.data.copy_(plain)  # the home before has put v there
        home.compute_by(Psi(layer.scales))


def _take_plain(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let a plain checkpoint load: `X.weight` becomes v where the model has `X` companded."""
    for path, held in module.named_modules(remove_duplicate=False):
        where = f"{prefix}{path}.".lstrip(".")
        for parameter, parts in computed(held).items():
            plain = state_dict.get(f"{where}{parameter}")
            if plain is not None and isinstance(psi := parts[0], Psi):
                if fault := beyond(psi.scales.function, plain, psi.scales.numbers()[0], path):
                    raise FileError(f"compander: {fault}; none of its weights was loaded")
                del state_dict[f"{where}{parameter}"]
                state_dict[f"{where}parametrizations.{parameter}.original"] = psi.right_inverse(plain)
                for key, value in psi.state_dict().items():
                    state_dict.setdefault(f"{where}parametrizations.{parameter}.0.{key}", value)


class ReferenceOptimizer(CompandedOptimizer):
    """torch's own step on v, with decay and the adaptive rule taken on w around it."""

    attached: ReferenceCompander

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
        slope = {name: self.attached.psi(name).derivative(p) for name, p, _ in live}
        by_w = [update.by_slope(gradient(p), slope[name]) for name, p, _ in live]
        scale = self.factor([*by_w, *(gradient(p) for p in others)])
        if scale != 1.0:
            for p in [*others, *(p for _, p, _ in live), *(p for p in self.learned if p.grad is not None)]:
                gradient(p).mul_(scale)
        pulls = {name: self._decay(name, p, group, slope[name]) for name, p, group in live}
        starts = {}
        if issubclass(self.rule, ADAPTIVE):  # the rule sees dL/dw, and its step alone is left in p
            for name, p, _ in live:
                gradient(p).copy_(update.by_slope(gradient(p), slope[name]))
                starts[name] = p.clone()
                p.zero_()
        with self._without_decay():
            self.inner_step()
        for name, p, _ in live:
            if name in starts:
                p.mul_(slope[name]).add_(starts[name])
            if (pull := pulls[name]) is not None:
                p.sub_(pull)

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
        if self.decouples(group):
            return group["lr"] * decay * pull
        decay = sign(group) * decay
        gradient(p).add_(pull, alpha=decay)
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
            set_gradients(pair, decay * 0.5 * w.square().sum())
