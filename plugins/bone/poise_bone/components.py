"""The adapters: their options, and the contract's `attach`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from poise.errors import ConfigError
from poise.options import check_options, option, options_of
from poise_bone.variants import VARIANTS

if TYPE_CHECKING:
    from torch import nn

    from poise.adapters import AttachedLayers
    from poise_bone.attached import AttachedBone

SCALED = ("bone", "mini")
ROW_NORM = "row_norm"
ALL_LINEAR = "all_linear"


@dataclass(frozen=True)
class Bone:
    """A block update of frozen weights: y = W x + S D, where S sums the input's blocks of width r.

    D (r, out) is shared by all blocks, starts at zero and is what trains. The weight-guided forms
    (bat, bat_row, bat_left) change each r x r block of W by itself times a matrix, plus that matrix.
    All start as the base itself, and fold into plain weights. Works on linears and experts, packed
    ones included; named ones of Conv2d and Embedding are experimental.

    Source: arXiv 2409.15371; `poise_bone.functional` has every form's formula.
    """

    r: int = option(64, "block size; of the added forms also the rank of the change", low=1)
    variant: str = option("bone", "form of the change", choices=VARIANTS)
    mini_r: int | None = option(None, "columns of mini's block, repeated over the outputs", low=1)
    tiles: list[int] = option([1, 1], "bone_free's blocks along outputs and inputs, repeated", low=1)
    scale: float | str = option(1.0, "factor of the change; row_norm: sqrt(r / inputs), for bone and "
                                     "mini", above=0)
    dropout: float = option(0.0, "share of inputs left out of the change in training", low=0, below=1)
    target_modules: list[str] | None = option(
        None, "patterns of the layers to adapt (q_proj, mlp.*); null or [all_linear]: all linears and "
              "experts but "
              "head and routers")
    exclude_modules: list[str] | None = option(None, "patterns of layers to leave alone")
    rank_pattern: dict[str, int] = option({}, "another r for layers that match a pattern; the last match "
                                              "counts")

    freezes_base: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if isinstance(self.tiles, tuple):
            object.__setattr__(self, "tiles", list(self.tiles))
        if self.target_modules == ALL_LINEAR:
            object.__setattr__(self, "target_modules", [ALL_LINEAR])
        check_options(self)
        self._check_together()

    def _check_together(self) -> None:
        if (isinstance(self.scale, str) and self.scale != ROW_NORM) or self.scale == math.inf:
            raise ConfigError(f"Bone.scale={self.scale!r} is not allowed: it must be a number above 0, or "
                              f"{ROW_NORM}")
        if self.scale != 1.0 and self.variant not in SCALED:
            raise ConfigError(f"Bone.scale={self.scale} is not allowed with variant={self.variant}: only "
                              f"{' and '.join(SCALED)} are scaled")
        if (self.variant == "mini") != (self.mini_r is not None):
            raise ConfigError(f"Bone.mini_r={self.mini_r} is not allowed with variant={self.variant}: mini "
                              f"needs it, and no other form has it")
        if len(self.tiles) != 2:
            raise ConfigError(f"Bone.tiles={self.tiles} is not allowed: give two numbers, [p, q]")
        if self.variant != "bone_free" and self.tiles != [1, 1]:
            raise ConfigError(f"Bone.tiles={self.tiles} is not allowed with variant={self.variant}: only "
                              f"bone_free "
                              f"has tiles")
        for pattern, r in self.rank_pattern.items():
            if r < 1:
                raise ConfigError(f"Bone.rank_pattern={{{pattern!r}: {r}}} is not allowed: r must be >= 1")

    def attach(self, model: nn.Module, name: str = "default") -> AttachedBone:
        """Attach to the matching layers in place and freeze all else.

        Raises
        ------
        ConfigError
            When no layer matches; when the block does not fit a layer, with what would; when a weight is
            tied or held by an adapter that shares it with no other; when the model has an adapter of this
            name.
        """
        from poise_bone.attached import adapt

        return adapt(model, adapter=self, name=name, **options_of(self))


@dataclass(frozen=True)
class Lora:
    """LoRA through PEFT, for comparisons: y = W x + (lora_alpha / r) B A x; needs the extra `peft`.

    Source: arXiv 2106.09685; initialized and computed by PEFT's own modules.
    """

    r: int = option(8, "rank of the update", low=1)
    lora_alpha: float = option(16.0, "the update is multiplied by lora_alpha / r", above=0)
    lora_dropout: float = option(0.0, "share of inputs left out of the update in training", low=0, below=1)
    use_rslora: bool = option(False, "multiply by lora_alpha / sqrt(r)")
    target_modules: list[str] | None = option(
        None, "patterns of the layers to adapt; null: all linears but head and routers")
    exclude_modules: list[str] | None = option(None, "patterns of layers to leave alone")

    freezes_base: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_options(self)

    def attach(self, model: nn.Module, name: str = "default") -> AttachedLayers:
        """Attach to the matching linears in place and freeze all else.

        Raises
        ------
        ConfigError
            As `Bone.attach`.
        MissingExtra
            Without peft.
        """
        from poise_bone.lora import adapt

        return adapt(model, adapter=self, name=name, **options_of(self))
