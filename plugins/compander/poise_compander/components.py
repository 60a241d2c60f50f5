"""Options of the compander and of the methods it is compared with, and the contract's `attach`."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from poise.errors import ConfigError
from poise.options import check_options, option
from poise_compander.names import FUNCTION_NAMES
from poise_compander.presets import LEARNED, pair
from poise_compander.settings import Settings

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from poise_compander.attached import AttachedCompander
    from poise_compander.controls import AttachedLrMatched
    from poise_compander.quantizer import CompandedMatrix
    from poise_compander.weight_norm import AttachedWeightNorm

_TARGETS = "patterns of layers to take; null: all linears, convolutions and experts"
_EXCLUDED = "patterns of layers to leave alone; null: none"
_EXTREME = 1e6  # of a and b: beyond it float32 has no digits left for v, or for its square


def _check_patterns(component: Any) -> None:
    """Raise `ConfigError` for a list of patterns that names nothing, which is not the same as none."""
    for name, none in (("target_modules", "take all"), ("exclude_modules", "leave none alone")):
        if getattr(component, name) == []:
            raise ConfigError(f"{type(component).__name__}.{name}=[]: it names no layer; leave it out "
                              f"(null) to {none}, or give patterns of names")


def _check_function(name: str) -> None:
    """Raise `ConfigError` for an unknown function, with those there are."""
    if name not in FUNCTION_NAMES:
        from poise_compander.functions import named

        named(name)  # registered, or refused with the names there are


@dataclass(frozen=True)
class WeightCompander:
    """w = Psi(v) = a psi(v / b) on every weight of linears, convolutions and experts; v is what trains.

    The network's output does not change at attach: v = Psi^-1(w). On the fast path the model keeps plain
    weights w, and what attach returns owns v; on the reference path the model owns v, and torch's
    parametrize computes w from it at every use. Both train the same numbers.

    Source: arXiv 2306.16993 sections III-A to III-D; the default pair leaves the learning rate near zero
    unchanged, (a / b)^2 = 1.
    """

    function: str = option("arctan", "the map from v to w: arctan, erf, arsinh, tanh, or a registered one")
    a: float = option(0.7, "scale of w, and its bound", above=0)
    b: float = option(0.7, "stretch along v", above=0)
    learn: str = option("none", "train a and b too: one pair for each layer, or for the network",
                        choices=("none", "layer", "network"))
    decay_on: str | None = option(
        None, "what weight decay acts on: w (through the chain rule) or v; null: w for fixed a and b, v "
        "for learned ones, as in the paper", choices=(None, "w", "v"))
    bound_policy: str = option(
        "raise", "what to do with weights at or over the bound at attach; grow: a larger a",
        choices=("raise", "clamp", "grow"))
    guard: str = option("softplus", "what keeps learned a and b positive; none: the paper",
                        choices=("softplus", "exp", "none"))
    path: str = option("fast", "who computes w: a step (fast), or torch's parametrize (reference)",
                       choices=("fast", "reference"))
    target_modules: list[str] | None = option(None, _TARGETS)
    exclude_modules: list[str] | None = option(None, _EXCLUDED)

    freezes_base: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_options(self)
        _check_patterns(self)
        for name, value in (("a", self.a), ("b", self.b)):
            if not 1 / _EXTREME <= value <= _EXTREME:  # nor is NaN
                raise ConfigError(f"WeightCompander.{name}={value!r}: allowed is a number > 0, from "
                                  f"{1 / _EXTREME:g} to {_EXTREME:g}")
        _check_function(self.function)

    @property
    def settings(self) -> Settings:
        """The options as the method takes them, without those that choose layers."""
        return Settings(self.function, self.a, self.b, self.learn, self.decay_on, self.bound_policy,
                        self.guard, self.path)

    def attach(self, model: nn.Module, name: str = "default") -> AttachedCompander:
        """Reparameterize the model, in place.

        Raises
        ------
        ConfigError
            When no layer matches, a weight is attached already, is of half precision, is not finite, or
            reaches the bound (with "raise"). The model is then as it was.
        """
        return _compand(model, self, self, name)


def _compand(model: nn.Module, options: WeightCompander, adapter: Any, name: str) -> AttachedCompander:
    """Compand by some options on behalf of the component whose `attach` was called."""
    from poise_compander.paths import compand

    return compand(model, options.settings, adapter=adapter, name=name,
                   target_modules=options.target_modules, exclude_modules=options.exclude_modules)


@dataclass(frozen=True)
class PaperCompander:
    """The compander with the pair (a, b) that the paper chose for a model on a data set.

    Source: arXiv 2306.16993 sections IV-A to IV-C: the best of 36 pairs, searched on one of the seeds that
    the paper reports; with `learned`, one pair for each layer from (0.5, 1.0), unguarded, decay on v.
    """

    model: str = option("resnet18", "resnet18, resnet34, resnet50, vgg16, vgg19 or wrn28_10")
    data: str = option("cifar10", "cifar10, cifar100, tinyimagenet or imagenet")
    learned: bool = option(False, "train the pairs, one for each layer; model and data do not matter then")
    bound_policy: str = option("raise", "what to do with weights at or over the bound at attach",
                               choices=("raise", "clamp", "grow"))
    path: str = option("fast", "who computes w: a step (fast), or torch's parametrize (reference)",
                       choices=("fast", "reference"))
    target_modules: list[str] | None = option(None, _TARGETS)
    exclude_modules: list[str] | None = option(None, _EXCLUDED)

    freezes_base: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_options(self)
        _check_patterns(self)
        self.options  # noqa: B018 - refuses what the paper did not train

    @property
    def options(self) -> WeightCompander:
        """The compander that this stands for."""
        chosen: dict[str, Any] = LEARNED if self.learned else dict(zip("ab", pair(self.model, self.data)))
        return WeightCompander(**chosen, bound_policy=self.bound_policy, path=self.path,
                               target_modules=self.target_modules, exclude_modules=self.exclude_modules)

    def attach(self, model: nn.Module, name: str = "default") -> AttachedCompander:
        """Reparameterize the model, in place; see `WeightCompander.attach`."""
        return _compand(model, self.options, self, name)


@dataclass(frozen=True)
class LrMatched:
    """Plain training with the weights' learning rate times (a / b)^2; biases and norms as they are.

    What a compander with the same (a, b) does to first order near zero: the comparison that tells
    a better function from a better learning rate.
    """

    a: float = option(0.7, "the compander's a", above=0)
    b: float = option(0.7, "the compander's b", above=0)
    decay_on: str = option("w", "what the compander's decay acts on; v: these weights' is divided by "
                           "(a / b)^2, since that of v is not slowed", choices=("w", "v"))
    target_modules: list[str] | None = option(None, _TARGETS)
    exclude_modules: list[str] | None = option(None, _EXCLUDED)

    freezes_base: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_options(self)
        _check_patterns(self)

    def attach(self, model: nn.Module, name: str = "default") -> AttachedLrMatched:
        """Choose the same weights as the compander would; the model is not changed."""
        from poise_compander.controls import match_rates

        return match_rates(model, self.a, self.b, decay_on=self.decay_on, adapter=self, name=name,
                           target_modules=self.target_modules, exclude_modules=self.exclude_modules)


@dataclass(frozen=True)
class PowerPropagation:
    """w = v |v|^(alpha - 1): small weights slow down and large ones speed up, the compander's opposite.

    Source: Powerpropagation (arXiv 2110.00296), which the compander's paper compares with and takes the
    adaptive rule from.
    """

    alpha: float = option(2.0, "the power; 1: plain training", low=1.0)
    decay_on: str = option("v", "what weight decay acts on", choices=("w", "v"))
    target_modules: list[str] | None = option(None, _TARGETS)
    exclude_modules: list[str] | None = option(None, _EXCLUDED)

    freezes_base: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_options(self)
        _check_patterns(self)
        if not math.isfinite(self.alpha):
            raise ConfigError(f"PowerPropagation.alpha={self.alpha!r}: allowed is a finite number >= 1")

    def attach(self, model: nn.Module, name: str = "default") -> AttachedCompander:
        """Reparameterize the model, in place, on the fast path; see `WeightCompander.attach`."""
        from poise_compander.functions import power

        options = WeightCompander(power(self.alpha).name, a=1.0, b=1.0, decay_on=self.decay_on,
                                  target_modules=self.target_modules, exclude_modules=self.exclude_modules)
        return _compand(model, options, self, name)


@dataclass(frozen=True)
class WeightNorm:
    """w = g v / ||v|| for each output row, by torch's own parametrization; decay acts on g and v.

    Source: weight normalization (arXiv 1602.07868), which the compander's paper compares with.
    """

    target_modules: list[str] | None = option(None, _TARGETS)
    exclude_modules: list[str] | None = option(None, _EXCLUDED)

    freezes_base: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_options(self)
        _check_patterns(self)

    def attach(self, model: nn.Module, name: str = "default") -> AttachedWeightNorm:
        """Reparameterize linears and convolutions, in place.

        Raises
        ------
        ConfigError
            When no layer matches, a weight is reparameterized or tied, or one of its rows is zero.
        """
        from poise_compander.weight_norm import normalize_rows

        return normalize_rows(model, adapter=self, name=name, target_modules=self.target_modules,
                              exclude_modules=self.exclude_modules)


@dataclass(frozen=True)
class Companded:
    """Levels that are uniform in the companded domain: dense near zero, wide apart at the largest weights.

    All 2^bits codes are used, symmetric, none of them zero. Takes bits + 16 / group bits per weight.
    """

    bits: int = option(4, "bits per weight", low=2, high=8, unit="bits")
    group: int = option(64, "columns that share a scale; 0: a whole row (per channel); -1: the tensor",
                        low=-1)
    function: str = option("arctan", "what compresses: arctan, erf, arsinh, tanh, or a registered one")
    sharpness: float = option(1.5, "how far into the function the largest weight reaches; near 0: uniform",
                              above=0, high=10)
    scale_dtype: str = option("float16", "how scales are stored; float32 where float16 does not hold them",
                              choices=("float16", "float32"))

    def __post_init__(self) -> None:
        check_options(self)
        _check_function(self.function)

    def at(self, bits: int) -> Companded:
        """Return the same quantizer at another number of bits; raises `ConfigError` outside 2 to 8."""
        return replace(self, bits=bits)

    def layout(
        self, shape: tuple[int, int], dtype: torch.dtype
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return name, shape and dtype of the tensors that a weight of this shape is stored in."""
        from poise.quantizers.packing import layout

        return layout(self.bits, self.group, shape, self.scale_dtype, with_minimum=False)

    def quantize(self, weight: Tensor) -> CompandedMatrix:
        """Quantize a matrix (out, in).

        Raises
        ------
        DataError
            For NaN or Inf, and for a weight whose scales float16 does not hold; give scale_dtype=float32.
        """
        from poise_compander.quantizer import quantize

        return quantize(weight, self._table, self.bits, self.group, self.scale_dtype)

    def from_tensors(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
    ) -> CompandedMatrix:
        """Rebuild what `CompandedMatrix.tensors` returned; raises `FileError` for what does not fit."""
        from poise_compander.quantizer import rebuild

        return rebuild(tensors, self._table, self.bits, self.group, self.scale_dtype, shape, dtype)

    @property
    def _table(self) -> Tensor:
        return _levels(self.function, self.sharpness, self.bits)


@functools.lru_cache(maxsize=64)
def _levels(function: str, sharpness: float, bits: int) -> Tensor:
    from poise_compander.functions import named
    from poise_compander.quantizer import levels

    return levels(named(function), sharpness, bits)
