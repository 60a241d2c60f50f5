"""Options of what is tuned with its experts in a store, and of what is tuned and then served."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from poise.errors import ConfigError
from poise.hooks import Input
from poise.interfaces import Parts
from poise.options import check_options, make, option
from poise.registry import build
from poise_edgemoe.components import EdgeMoEGenerate, EdgeMoEStore
from poise_edgemoe.store.layouts import LAYOUTS
from poise_edgemoe.store.schemes import HOTS


@dataclass(frozen=True)
class EdgeMoEStreamed:
    """A mixture-of-experts model to be tuned whose experts are read from disk, layer by layer.

    Experts train by an adapter (adapter=bone); without one hot weights alone do. Of a transformers
    directory (`path`), or of the small byte model, a store is made once and kept in the cache; `store`
    names one that is there. What is tuned is the model that the store holds: with 32 bits the one in
    memory, bit for bit.
    """

    path: str | None = option(None, "a transformers directory; null: the byte model")
    byte_moe: dict[str, Any] = option({}, "options of the byte model, as model=byte_moe has them")
    store: str | None = option(None, "a store that is there already, in place of a model")
    bits: int | None = option(None, "of experts; null: 32, not quantized, or a scheme's own; 16: as bf16",
                              choices=(2, 3, 4, 8, 16, 32))
    scheme: str | None = option(None, "how experts are quantized, where they are; null: asym_group")
    group: int | None = option(None, "columns that share a scale; null: 64", low=1)
    hot: str | None = option(None, "the rest; null: bf16, with 32 bits the model's own type", choices=HOTS)
    layout: str | None = option(None, "order of packed bytes, which changes no value; null: auto",
                                choices=LAYOUTS)
    dtype: str | None = option(None, "what is computed in; null: the store's type", choices=("float32",))
    recompute: bool = option(True, "make a layer's activations again in the backward pass, to keep none")

    trained: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_options(self)
        self._store()

    def build(self, spec: Mapping[str, Any] | None = None) -> Any:
        """Return the model, which reads its experts for as long as it lives."""
        from poise_edgemoe.tuning.model import open_told

        return open_told(self._store().folder(), dtype=self.dtype, recompute=self.recompute)

    def tokenizer(self) -> Any:
        """Return the tokenizer of the directory or store, or the byte model's."""
        return self._store().tokenizer()

    def inputs(self) -> dict[str, Input]:
        """Return the files that it reads: of a directory or a store."""
        return self._store().inputs()

    def folder(self) -> Path:
        """Return the store; convert the model the first time."""
        return self._store().folder()

    def _store(self) -> EdgeMoEStore:
        exact = self.store is None and self.bits is None and self.scheme is None and self.group is None
        return EdgeMoEStore(path=self.path, byte_moe=self.byte_moe, store=self.store,
                            bits=32 if exact else self.bits, scheme=self.scheme, group=self.group,
                            hot=self.hot, layout=self.layout)


@dataclass(frozen=True)
class EdgeMoETuneAndServe:
    """Tune a mixture-of-experts model, convert what was made of it to a store, serve that under a limit.

    Three stages in the run's directory, each made of the files of the one before: `tune` (recipe=finetune
    with the run's data, model, adapter and training), `store`, and `serve` (recipe=edgemoe_generate). A
    stage that is done is not done again; a run that was interrupted goes on within the stage where it was.
    The held-out loss is reported before tuning, tuned and served, on the same windows, in nats a byte.
    """

    tune: dict[str, Any] = option({}, "options of recipe=finetune")
    bits: int | None = option(None, "of the store's experts; null: 4, or the scheme's",
                              choices=(2, 3, 4, 8, 16, 32))
    scheme: str | None = option(None, "how its experts are quantized; null: asym_group")
    group: int | None = option(None, "columns that share a scale; null: 64", low=1)
    hot: str | None = option(None, "all else; null: bf16, with 32 bits the model's own type", choices=HOTS)
    serve: dict[str, Any] = option({}, "options of recipe=edgemoe_generate")
    served: dict[str, Any] = option({}, "options of model=edgemoe_store: memory, context, policy, ...")

    def __post_init__(self) -> None:
        check_options(self)
        if self.tune.get("save_folded") is False:
            raise ConfigError("tune.save_folded=false leaves nothing to convert: leave it out")
        build("recipe", "finetune", **self.tune)
        self._serve()
        known = {"bits", "scheme", "group", "hot", "layout", "path", "byte_moe", "store"}
        if bad := sorted(known & self.served.keys()):
            raise ConfigError(f"served.{bad[0]} has no effect: what is served is the store of the tuned "
                              f"model; bits, scheme, group and hot are options of the recipe")
        make(EdgeMoEStore, {**self.served, **self._how()}, "served")

    def check(self, parts: Parts) -> None:
        """Refuse parts that do not fit, before anything is loaded."""
        for kind in ("data", "model"):
            if getattr(parts, kind) is None:
                raise ConfigError(f"{kind}=none: recipe=edgemoe_tune_and_serve needs a {kind}")
        if parts.quantizer is not None:
            raise ConfigError(f"quantizer={parts.names.get('quantizer')} has no effect: what is tuned is "
                              f"quantized when it is converted; write quantizer=none (bits: recipe.bits)")

    def run(self, parts: Parts, context: Any) -> dict[str, float]:
        """Tune, convert, serve; return losses and bytes."""
        from poise_edgemoe.tuning.serving import run

        how = {**self._how(), **({"hot": int(self.hot)} if self.hot in ("8", "4") else {})}
        return run(parts, context, tune=self.tune, convert=how, serve=self._serve(), served=self.served)

    def _how(self) -> dict[str, Any]:
        given = {"bits": self.bits, "scheme": self.scheme, "group": self.group, "hot": self.hot}
        return {k: v for k, v in given.items() if v is not None}

    def _serve(self) -> EdgeMoEGenerate:
        return make(EdgeMoEGenerate, self.serve, "serve")
