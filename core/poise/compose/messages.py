"""What an error of Hydra's or OmegaConf's means for the person who typed the overrides, in one line."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator

from hydra import compose as hydra_compose
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig
from omegaconf.errors import InterpolationResolutionError, MissingMandatoryValue, OmegaConfBaseException

from poise.compose.overrides import is_sweep, several_values
from poise.compose.schema import GROUPS, TOP, initialized
from poise.config import PARTS, Train
from poise.errors import ConfigError, PoiseError, nearest

SHOWN = 80  # characters of a long override
KNOWN = (HydraException, OmegaConfBaseException)


@contextlib.contextmanager
def one_line_errors(overrides: list[str], of: tuple[type[Exception], ...] = (Exception,)) -> Iterator[None]:
    """Turn errors within the block into one-line `ConfigError`s.

    Where nothing but composing goes on, every error means that the configuration cannot be composed: of odd
    ones Hydra raises many a ValueError, AssertionError and RecursionError. Elsewhere, `of` is `KNOWN`.
    """
    try:
        yield
    except PoiseError:
        raise
    except of as error:
        raise ConfigError(explain(error, overrides)) from None


def explain(error: BaseException, overrides: list[str]) -> str:
    """Say in one line what a Hydra or OmegaConf error means for the person who typed the overrides."""
    text = " ".join(str(error).split())
    cause = error.__cause__ or error
    if isinstance(error, MissingConfigException):
        return _missing_choice(str(error.missing_cfg_file or ""), list(error.options or []), text)
    if unknown := re.search(r"Could not (?:override|append|delete)[^']*'([^']+)'", text):
        return _unknown_key(unknown[1], overrides, text)
    if isinstance(cause, MissingMandatoryValue) or "Missing mandatory value" in text:
        key = getattr(cause, "full_key", None) or text.split(":")[-1].strip()
        return f"{key} has no value: write {key}=VALUE"
    if isinstance(cause, InterpolationResolutionError):
        return _unresolved(getattr(cause, "full_key", ""), text)
    if ambiguous := re.search(r"Ambiguous value for argument '([^']+)'", text):
        return several_values(ambiguous[1])
    if isinstance(error, KNOWN):
        return _as_said(error, overrides)
    blamed = _blamed(overrides)
    if isinstance(error, RecursionError):
        return f"{blamed}it is nested too deeply, or a defaults list leads back to itself"
    return f"{blamed}{text or type(error).__name__}"


def _blamed(overrides: list[str]) -> str:
    """Return the override without which the others compose."""
    for given in overrides:
        try:
            with initialized():
                hydra_compose("config", overrides=[o for o in overrides if o != given and not is_sweep(o)])
        except Exception:
            continue
        return f"{given[:SHOWN]}: "
    return ""


def _missing_choice(missing: str, options: list[str], text: str) -> str:
    group, _, name = missing.rpartition("/")
    if not group:
        return text
    if missing == "hydra/launcher/joblib":
        return "launcher=joblib needs hydra-joblib-launcher: pip install 'poise[sweep]'"
    if not options:
        return f"{group}={name}: there is no group {group!r}{nearest(group, [*GROUPS, 'launcher'])}"
    return (
        f"{group}={name}: no {group} named {name!r}{nearest(name, options)} "
        f"(have: {', '.join(sorted(options))})"
    )


def _unknown_key(key: str, overrides: list[str], text: str) -> str:
    given = next((o for o in overrides if o.lstrip("+~").split("=")[0] == key), key)
    head, _, rest = key.partition(".")
    if head in [f.name for f in dataclasses.fields(Train)]:
        return f"{given}: no key or group {head!r}; did you mean 'train.{key}'?"
    if not rest and head in TOP:
        return f"{given}: {text}"
    if head not in TOP:
        return f"{given}: no key or group {head!r}{nearest(head, [*TOP, 'experiment', 'launcher'])}"
    chosen, options = _options_of(head, [o for o in overrides if o != given])
    where = f"{head}={chosen}" if chosen else head
    return (
        f"{given}: {where} has no option {rest!r}{nearest(rest, options)} "
        f"(options: {', '.join(options) or 'none'})"
    )


def _options_of(head: str, overrides: list[str]) -> tuple[str, list[str]]:
    """Return the choice made under a key and its options, as composed without the wrong override."""
    try:
        with initialized():
            single = [o for o in overrides if not is_sweep(o)]
            node = hydra_compose("config", overrides=single)[head]
    except (HydraException, OmegaConfBaseException):
        return "", []
    if not isinstance(node, DictConfig):
        return "", []
    keys = [str(k) for k in node if k != "entry"]
    return str(node.get("entry", "")) if head in PARTS else "", keys


def _unresolved(key: str, text: str) -> str:
    if variable := re.search(r"[Ee]nvironment variable '([^']+)'", text):
        return f"{key} needs the environment variable {variable[1]}, which is not set: export it"
    return f"{key}: an interpolation does not resolve: {text}"


def _as_said(error: BaseException, overrides: list[str]) -> str:
    """Return what OmegaConf says, after the override, or the key in a file, that it says it of."""
    root = _root_cause(error)
    key = getattr(root, "full_key", None) or "".join(re.findall(r"full_key: (\S+)", str(root))[:1])
    given = next((o for o in overrides if key and _holds(o.lstrip("+").partition("=")[0], key)), key)
    said = _short(" ".join(str(root).split()))
    return f"{given[:SHOWN]}: {said}" if given else said


def _holds(given: str, key: str) -> bool:
    """Tell whether an override of one key gives another its value: model.hidden gives model.hidden[0]."""
    return key == given or key.startswith((f"{given}.", f"{given}["))


def _root_cause(error: BaseException) -> BaseException:
    """Return the first OmegaConf error behind an error of Hydra's, which says what is wrong."""
    while error.__cause__ is not None and isinstance(error.__cause__, OmegaConfBaseException):
        error = error.__cause__
    return error


def _short(text: str) -> str:
    text = re.sub(r"full_key: \S+|object_type=\S+|reference_type=\S+", "", text)
    return re.sub(r"Set the environment variable HYDRA_FULL_ERROR.*", "", text).strip()
