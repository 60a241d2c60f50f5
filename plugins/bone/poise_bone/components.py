"""The Bone adapter: its options, and the contract's `attach`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from poise.options import check_options, option

if TYPE_CHECKING:
    from torch import nn

    from poise_bone.attached import AttachedBone


@dataclass(frozen=True)
class Bone:
    """y = W x + S D: S sums the input's blocks of width r, D (r, out) is what trains.

    D starts at zero, so attaching changes nothing; folding adds D^T to every r-wide column block of
    W. There is no scaling factor. Works on linears, packed ones included.

    Source: arXiv 2409.15371 v12 section 3 (efficient form); the tiling is the one of the code, not
    of the paper's figure 3.
    """

    r: int = option(64, "block size, which is also the rank of the update", low=1)
    variant: str = option("bone", "form of the update", choices=("bone",))
    target_modules: list[str] | None = option(
        None, "patterns of the layers to adapt (q_proj, mlp.*); null: all linears but head and routers")
    exclude_modules: list[str] | None = option(None, "patterns of layers to leave alone")

    freezes_base: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_options(self)

    def attach(self, model: nn.Module, name: str = "default") -> AttachedBone:
        """Attach to the matching linears in place and freeze all else.

        Raises
        ------
        ConfigError
            When no layer matches, r exceeds a layer's inputs, a weight is tied or held by an adapter that
            shares it with no other, or the model has an adapter of this name.
        """
        from poise_bone.attached import adapt

        return adapt(model, adapter=self, name=name, r=self.r, target_modules=self.target_modules,
                     exclude_modules=self.exclude_modules)
