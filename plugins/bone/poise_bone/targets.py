"""Which layers a configuration of PEFT means on a model.

Source: `check_target_module_exists` and `_maybe_include_all_linear_layers` of peft 0.21.
Run as a program, it reads a configuration and names from stdin: a regular expression of a file may take for
ever, and there it can be ended. It therefore imports nothing but the standard library at its top.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

SECONDS = 5.0  # that expressions of a file may take
ALL_LINEAR = "all-linear"
_EXPRESSION = "a regular expression of the adapter (target_modules, exclude_modules, layers_pattern)"
CLASSIFIERS = ("score", "classifier")  # heads of a model for SEQ_CLS, by PEFT's convention


def refuse_gaps(fields: Mapping[str, Any], blocks: Mapping[str, Any], model: nn.Module) -> None:
    """Raise `FileError` where a directory's blocks are not for the layers that its configuration means.

    Parameters
    ----------
    fields : mapping
        The configuration of the directory.
    blocks : mapping
        By the name of their layer.

    Raises
    ------
    FileError
        Naming layers without a block, and blocks without a layer; for a configuration that PEFT refuses.
    MissingExtra
        Where target_modules is null, which PEFT alone has a table for, without peft.
    """
    from poise.errors import FileError

    meant = set(layers_meant(fields, model))
    if lost := sorted(meant - blocks.keys()):
        raise FileError(f"the adapter's configuration means {_listed(lost)}, and there is no block "
                        f"for that: the file is not whole")
    if extra := sorted(blocks.keys() - meant):
        raise FileError(f"the adapter has a block for {_listed(extra)}, which its configuration does not "
                        f"mean (target_modules and the fields beside it): PEFT would leave that out")


def _listed(names: list[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def layers_meant(fields: Mapping[str, Any], model: nn.Module) -> list[str]:
    """Return the names of the linears of a model that PEFT would adapt."""
    linears = list(_linears(model))
    named = fields.get("target_modules")
    _check(fields)
    if named is None:
        named = _defaults(model)
    if isinstance(named, str) and named.lower() == ALL_LINEAR:
        heads = _heads(model, fields)
        named = [name for name in linears if name not in heads]
    wanted = {**fields, "target_modules": named}
    return _in_time(wanted, linears) if _has_expressions(wanted) else covered(wanted, linears)


def _check(fields: Mapping[str, Any]) -> None:
    from poise.errors import FileError

    layers, pattern = fields.get("layers_to_transform"), fields.get("layers_pattern")
    numbers = layers if isinstance(layers, list) else [layers]
    if layers is not None and not all(type(n) is int for n in numbers):
        raise FileError(f"layers_to_transform={layers!r} of the adapter is no number of a layer, and no "
                        f"list of such")
    names = pattern if isinstance(pattern, list) else [pattern]
    if pattern is not None and not all(isinstance(n, str) for n in names):
        raise FileError(f"layers_pattern={pattern!r} of the adapter is no name, and no list of names")
    if isinstance(fields.get("target_modules"), str) and (layers is not None or pattern is not None):
        raise FileError("layers_to_transform or layers_pattern of the adapter stands beside target_modules "
                        "that are no list, which PEFT refuses: write names")


def _linears(model: nn.Module) -> Iterator[str]:
    """Yield the paths of linears, packed or adapted ones too, and of a head tied to the embedding."""
    from torch.nn import Linear

    from poise.walk import weights
    from poise.walk.plain import is_conv1d

    modules = dict(model.named_modules(remove_duplicate=False))
    for w in weights(model):
        linear = w.stored is not None or isinstance(w.module, Linear) or (w.module and is_conv1d(w.module))
        path = w.state_key.removesuffix(".weight")
        if linear and w.index is None and path != w.state_key:
            yield path
        yield from (n for n in w.tied_with if n not in w.again and isinstance(modules.get(n), Linear))


def _heads(model: nn.Module, fields: Mapping[str, Any]) -> set[str]:
    """Return the path of the output head, which all-linear leaves out."""
    from poise.walk import path_of

    ask: Any = getattr(model, "get_output_embeddings", None)
    if not callable(ask):
        return set()
    head: Any = ask()
    if head is not None:
        return {path_of(model, head)}
    there = next((n for n in CLASSIFIERS if getattr(model, n, None) is not None), None)
    return {there} if there and fields.get("task_type") == "SEQ_CLS" else set()


def _defaults(model: nn.Module) -> Any:
    """Return what PEFT takes for a model of this type where nothing is named."""
    from poise.errors import FileError, require

    kind = getattr(getattr(model, "config", None), "model_type", None)
    table = require("peft.utils", "peft").TRANSFORMERS_MODELS_TO_MISS_TARGET_MODULES_MAPPING
    if kind not in table:
        raise FileError(f"target_modules of the adapter is null, and PEFT has no default for a model of "
                        f"type {kind!r}: write the names of its layers")
    return table[kind]


# ------------------------------------------------------------------ names


def covered(fields: Mapping[str, Any], names: list[str]) -> list[str]:
    """Return those of some names that the configuration covers; strings in it are run as expressions."""
    return [n for n in names if not _matches(fields.get("exclude_modules"), n)
            and _matches(fields["target_modules"], n) and _in_layers(fields, n)]


def _matches(wanted: Any, name: str) -> bool:
    """Tell whether a name is meant by an expression, or ends in one of some names."""
    if isinstance(wanted, str):
        return bool(wanted) and re.fullmatch(wanted, name) is not None
    return any(name == one or name.endswith(f".{one}") for one in wanted or ())


def _in_layers(fields: Mapping[str, Any], name: str) -> bool:
    """Tell whether a name lies in one of layers_to_transform; one written out is meant anyhow."""
    layers, lists = fields.get("layers_to_transform"), fields.get("layers_pattern")
    named = fields["target_modules"]
    if layers in (None, []) or isinstance(named, str) or name in named:
        return True
    patterns = [lists] if isinstance(lists, str) and lists else lists or [None]
    for pattern in patterns:
        before = r".*?\.[^.]*\." if pattern is None else rf"(?:^|.*?\.){pattern}\."
        if hit := re.match(rf"{before}(?P<idx>\d+)\.", name):
            return int(hit["idx"]) in (layers if isinstance(layers, list) else [layers])
    return False


# ------------------------------------------------------------------ expressions


def _has_expressions(fields: Mapping[str, Any]) -> bool:
    """Tell whether a configuration has expressions, which are not to be run here."""
    lists = fields.get("layers_pattern") or []
    plain = all(re.fullmatch(r"\w*", one) for one in ([lists] if isinstance(lists, str) else lists))
    return not plain or any(isinstance(fields.get(k), str) for k in ("target_modules", "exclude_modules"))


def _in_time(fields: Mapping[str, Any], names: list[str]) -> list[str]:
    """Return what `covered` does, from a process that is ended when it takes too long."""
    from poise.errors import FileError

    keys = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    given = json.dumps([{k: fields.get(k) for k in keys}, names])
    try:
        done = subprocess.run([sys.executable, "-I", "-S", __file__], input=given, capture_output=True,
                              text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise FileError(f"{_EXPRESSION} takes more than {SECONDS:g} s: write names") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]
        raise FileError(f"{_EXPRESSION} cannot be read: {last}")
    return json.loads(done.stdout)


if __name__ == "__main__":
    json.dump(covered(*json.load(sys.stdin)), sys.stdout)
