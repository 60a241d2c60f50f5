"""The compander and its control: options, and the contract's `attach`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from poise.options import check_options, option

if TYPE_CHECKING:
    from torch import nn

    from poise_compander.attached import AttachedCompander
    from poise_compander.controls import AttachedLrMatched


@dataclass(frozen=True)
class Compander:
    """w = Psi(v) = a arctan(v / b) on every weight of linears and convolutions; v is what trains.

    The network's output does not change at attach: v = b tan(w / a). Weight decay is L2 on w with
    the chain rule; adaptive optimizers work on dL/dw and their step is multiplied by Psi'.

    Source: arXiv 2306.16993 sections III-A to III-C; the default pair leaves the learning rate
    near zero unchanged, (a / b)^2 = 1.
    """

    function: str = option("arctan", "the map from v to w", choices=("arctan",))
    a: float = option(0.7, "scale; |w| stays below a pi / 2", above=0)
    b: float = option(0.7, "stretch along v", above=0)
    bound: str = option(
        "raise", "what to do with weights at or over the bound at attach",
        choices=("raise", "clamp"),
    )
    exclude: list[str] = option([], "patterns of layers to leave alone")

    freezes_base: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_options(self)

    def attach(self, model: nn.Module, name: str = "default") -> AttachedCompander:
        """Reparameterize in place.

        Raises
        ------
        ConfigError
            When no layer matches, a weight is tied, or a weight reaches the bound.
        """
        from poise_compander.attached import attach

        return attach(self, model, name)


@dataclass(frozen=True)
class LrMatched:
    """Plain training with the weights' learning rate times (a / b)^2; biases and norms as they are.

    What a compander with the same (a, b) does to first order near zero: the comparison that tells
    a better function from a better learning rate.
    """

    a: float = option(0.7, "the compander's a", above=0)
    b: float = option(0.7, "the compander's b", above=0)
    exclude: list[str] = option([], "patterns of layers to leave alone")

    freezes_base: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_options(self)

    def attach(self, model: nn.Module, name: str = "default") -> AttachedLrMatched:
        """Choose the same weights as the compander would; the model is not changed."""
        from poise_compander.controls import attach

        return attach(self, model, name)
