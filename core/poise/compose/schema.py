"""From overrides to a checked `RunConfig`: the only module that imports Hydra and OmegaConf.

Registered components become typed nodes of Hydra's config store, so a new entry can be chosen and
overridden without a YAML file. Nothing is instantiated from configuration: the registry builds
components by name. Every composition error leaves here as one line.
"""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir, initialize_config_module
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, MissingConfigException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import RunMode
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import (
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from poise.config import PARTS, RunConfig, Train
from poise.errors import ConfigError, PoiseError, RunError, nearest
from poise.options import default_of, option_fields
from poise.registry import installed

HYDRA_VERSION_BASE = "1.3"
CONF = "POISE_CONF"
_OUTSIDE = ("paths", "hydra")  # keys of the composed file that are not part of a RunConfig


def conf_root() -> str:
    """Return where the YAML lives: `POISE_CONF`, the clone's `conf/`, or the wheel's `poise_conf`."""
    if os.environ.get(CONF):
        return str(Path(os.environ[CONF]).resolve())
    clone = Path(__file__).parents[2] / "conf"
    return str(clone) if (clone / "config.yaml").is_file() else "pkg://poise_conf"


class _PoiseSearchPath(SearchPathPlugin):
    """Keeps core's own groups on the path whatever --config-path says, and adds plugins' ones."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        root = conf_root()
        root = root if root.startswith("pkg://") else f"file://{root}"
        have = {item.path for item in search_path.get_path()}
        for provider, path in [("poise", root), *_plugin_conf()]:
            if path not in have:
                search_path.append(provider=provider, path=path)


def _plugin_conf() -> list[tuple[str, str]]:
    return [("poise-plugin", p) for p in sorted(installed().conf_packages)]


@dataclass
class _Paths:
    out: str = "runs"


@dataclass
class _Root:
    """The shape of `conf/config.yaml`; anything else at the top level is refused."""

    recipe: Any = MISSING
    data: Any = MISSING
    model: Any = MISSING
    quantizer: Any = MISSING
    adapter: Any = MISSING
    aggregator: Any = MISSING
    tracker: Any = MISSING
    train: Any = MISSING
    paths: _Paths = field(default_factory=_Paths)
    seed: int = 0
    threads: int | None = None
    device: str = "cpu"
    tag: str = "run"
    version: int = RunConfig.version


def install() -> None:
    """Make the search path and a node for every registered component known to Hydra; idempotent."""
    Plugins.instance().register(_PoiseSearchPath)
    store = ConfigStore.instance()
    store.store(name="poise_schema", node=_Root)
    store.store(group="train", name="default", node=_node("Train", Train, entry=None))
    for kind in PARTS:
        for entry in installed().entries(kind):
            try:
                component = entry.load()
            except ConfigError as error:
                print(f"poise: {error}", file=sys.stderr)
                continue
            node = _node(f"{kind}_{entry.name}", component, entry.name)
            store.store(group=kind, name=entry.name, node=node)


def _node(label: str, component: type, entry: str | None) -> type:
    """Return a typed, mutable twin of a component for Hydra to override."""
    import typing

    hints = typing.get_type_hints(component)
    fields: list[Any] = [("entry", str, field(default=entry))] if entry else []
    for f in option_fields(component):
        default = default_of(f)
        if default is dataclasses.MISSING:
            fields.append((f.name, hints[f.name], field(default=MISSING)))
        elif isinstance(default, (list, dict)):
            fields.append((f.name, hints[f.name], field(default_factory=lambda d=default: type(d)(d))))
        else:
            fields.append((f.name, hints[f.name], field(default=default)))
    return make_dataclass(label, fields)


# ------------------------------------------------------------------ composing


@dataclass(frozen=True)
class Composed:
    """A checked configuration, None for an experiment that sweeps, and where Hydra wants it to run."""

    config: RunConfig | None
    run_dir: Path
    explicit_dir: bool


def compose(overrides: list[str]) -> Composed:
    """Compose `conf/config.yaml` with overrides and check the result strictly.

    Raises
    ------
    ConfigError
        One line that names the key, what was given and what is allowed.
    """
    install()
    check_overrides(overrides)
    overrides = [open_key(o) for o in overrides]
    with one_line_errors(overrides), _initialized():
        whole = hydra_compose("config", overrides=overrides, return_hydra_config=True)
        HydraConfig.instance().set_config(whole)
        hydra = whole.hydra
        if not whole.paths.out:
            raise ConfigError("paths.out is empty: write paths.out=DIR, the folder runs are written to")
        config = None if hydra.mode == RunMode.MULTIRUN else from_hydra(whole)
        explicit = any(o.startswith("hydra.run.dir=") for o in overrides)
        return Composed(config, Path(hydra.run.dir), explicit)


def _initialized():
    if GlobalHydra.instance().is_initialized():
        GlobalHydra.instance().clear()
    root = conf_root()
    if root.startswith("pkg://"):
        return initialize_config_module(root[len("pkg://"):], version_base=HYDRA_VERSION_BASE)
    return initialize_config_dir(root, version_base=HYDRA_VERSION_BASE)


def experiments() -> list[str]:
    """Return the names of all experiments on the search path."""
    install()
    with _initialized():
        loader = GlobalHydra.instance().config_loader()
        return sorted(loader.get_group_options("experiment"))


def from_hydra(whole: DictConfig) -> RunConfig:
    """Turn a composed Hydra config into a `RunConfig`, strictly."""
    values = {}
    for key in whole:
        if key not in _OUTSIDE:
            node = whole[key]
            is_node = OmegaConf.is_config(node)
            values[key] = (
                OmegaConf.to_container(node, resolve=True, throw_on_missing=True) if is_node else node
            )
    if values.get("threads") is None:
        values["threads"] = len(os.sched_getaffinity(0))
    return RunConfig.from_plain(values)


def check_overrides(overrides: list[str]) -> None:
    """Refuse what Hydra answers poorly, before it is asked.

    Raises
    ------
    ConfigError
        For `group=null`, an unknown key or group choice, a value that needs quotes.
    """
    parser = OverridesParser.create()
    for text in overrides:
        try:
            parsed = parser.parse_override(text)
        except HydraException:
            raise ConfigError(_grammar_help(text)) from None
        key = parsed.key_or_group
        if key in (*PARTS, "train", "experiment") and parsed.value() is None and not parsed.is_delete():
            raise ConfigError(f"{text}: a group has no null; write {key}=none")


def open_key(text: str) -> str:
    """Let an override add keys to an option that is a free mapping, as if it were written with ++.

    `recipe.base_options.lightgbm.grid=11` is what a person writes; Hydra knows only the keys that are
    there already.
    """
    kind, _, rest = text.partition("=")[0].partition(".")
    if kind not in PARTS or not rest:
        return text
    return f"++{text}" if rest.partition(".")[0] in _mappings(kind) else text


def _mappings(kind: str) -> set[str]:
    """Return the names of the options of a kind's components that are mappings."""
    import typing

    found = set()
    for entry in installed().entries(kind):
        try:
            component = entry.load()
        except ConfigError:
            continue
        hints = typing.get_type_hints(component)
        found |= {name for name, hint in hints.items() if typing.get_origin(hint) is dict}
    return found


def _grammar_help(text: str) -> str:
    key, has, value = text.partition("=")
    if not has:
        return f"{text!r} is not an override: write KEY=VALUE (flags such as --multirun start with --)"
    value = value.replace("\\", "\\\\").replace('"', '\\"')
    return (
        f"{text}: the value holds a character of Hydra's grammar; quote it twice, "
        f"once for Hydra and once for the shell: '{key}=\"{value}\"'"
    )


class one_line_errors:  # noqa: N801 - reads as a statement
    """Turn Hydra's and OmegaConf's errors within the block into one-line `ConfigError`s."""

    def __init__(self, overrides: list[str]) -> None:
        self.overrides = overrides

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, PoiseError) or error is None:
            return
        if isinstance(error, (HydraException, OmegaConfBaseException)):
            raise ConfigError(explain(error, self.overrides)) from None


def explain(error: BaseException, overrides: list[str]) -> str:
    """Say in one line what a Hydra or OmegaConf error means for the person who typed the overrides."""
    text = " ".join(str(error).split())
    cause = error.__cause__ or error
    if isinstance(error, MissingConfigException):
        return _missing_choice(str(error.missing_cfg_file or ""), list(error.options or []), text)
    if unknown := re.search(r"Could not (?:override|append|delete)[^']*'([^']+)'", text):
        return _unknown_key(unknown[1], overrides)
    if isinstance(cause, MissingMandatoryValue) or "Missing mandatory value" in text:
        key = getattr(cause, "full_key", None) or text.split(":")[-1].strip()
        return f"{key} has no value: write {key}=VALUE"
    if isinstance(cause, InterpolationResolutionError):
        key = getattr(cause, "full_key", "")
        if variable := re.search(r"[Ee]nvironment variable '([^']+)'", text):
            return f"{key} needs the environment variable {variable[1]}, which is not set: export it"
        return f"{key}: an interpolation does not resolve: {text}"
    if ambiguous := re.search(r"Ambiguous value for argument '([^']+)'", text):
        key, _, value = ambiguous[1].partition("=")
        return (
            f"{ambiguous[1]}: several values; to sweep over them add --multirun, "
            f"for one list write '{key}=[{value}]', for one string quote it"
        )
    root = _root_cause(error)
    key = getattr(root, "full_key", None)
    given = next((o for o in overrides if key and o.lstrip("+").startswith(f"{key}=")), "")
    said = _short(" ".join(str(root).split()))
    return f"{given}: {said}" if given else said


def _root_cause(error: BaseException) -> BaseException:
    """Return the first OmegaConf error behind an error of Hydra's, which says what is wrong."""
    while error.__cause__ is not None and isinstance(error.__cause__, OmegaConfBaseException):
        error = error.__cause__
    return error


def _short(text: str) -> str:
    text = re.sub(r"full_key: \S+|object_type=\S+|reference_type=\S+", "", text)
    return re.sub(r"Set the environment variable HYDRA_FULL_ERROR.*", "", text).strip()


def _missing_choice(missing: str, options: list[str], text: str) -> str:
    group, _, name = missing.rpartition("/")
    if not group:
        return text
    groups = [*PARTS, "train", "experiment", "launcher"]
    if missing == "hydra/launcher/joblib":
        return "launcher=joblib needs hydra-joblib-launcher: pip install 'poise[sweep]'"
    if not options:
        return f"{group}={name}: there is no group {group!r}{nearest(group, groups)}"
    return (
        f"{group}={name}: no {group} named {name!r}{nearest(name, options)} "
        f"(have: {', '.join(sorted(options))})"
    )


def _unknown_key(key: str, overrides: list[str]) -> str:
    given = next((o for o in overrides if o.lstrip("+~").split("=")[0] == key), key)
    head, _, rest = key.partition(".")
    top = [f.name for f in dataclasses.fields(_Root)]
    if head in [f.name for f in dataclasses.fields(Train)]:
        return f"{given}: no key or group {head!r}; did you mean 'train.{key}'?"
    if head not in top:
        return f"{given}: no key or group {head!r}{nearest(head, [*top, 'experiment', 'launcher'])}"
    chosen, options = _options_of(head, [o for o in overrides if o != given])
    where = f"{head}={chosen}" if chosen else head
    return (
        f"{given}: {where} has no option {rest!r}{nearest(rest, options)} "
        f"(options: {', '.join(options) or 'none'})"
    )


def _options_of(head: str, overrides: list[str]) -> tuple[str, list[str]]:
    """Return the choice made under a key and its options, as composed without the wrong override."""
    try:
        with _initialized():
            single = [o for o in overrides if not _is_sweep(o)]
            node = hydra_compose("config", overrides=single)[head]
    except (HydraException, OmegaConfBaseException):
        return "", []
    if not isinstance(node, DictConfig):
        return "", []
    keys = [str(k) for k in node if k != "entry"]
    return str(node.get("entry", "")) if head in PARTS else "", keys


# ------------------------------------------------------------------ running


def run(overrides: list[str] | None = None, *, quiet: bool = True) -> Any:
    """Compose and run, as `poise run` does.

    Parameters
    ----------
    overrides : list of str
        Hydra's grammar, for example `["adapter=compander", "seed=1"]`.

    Returns
    -------
    Run, or list of Run when the overrides (or an experiment) ask for a sweep

    Raises
    ------
    PoiseError
        When the configuration is wrong or a run fails.
    """
    outcomes = run_all(list(overrides or []), quiet=quiet)
    for outcome in outcomes:
        if outcome.error is not None:
            raise outcome.error
    runs = [o.run for o in outcomes]
    return runs if len(runs) != 1 else runs[0]


def run_all(overrides: list[str], *, sweep: bool = False, quiet: bool = False, announce=None):
    """Run once or sweep, and return the outcomes.

    Parameters
    ----------
    overrides : list of str
    sweep : bool
        As `--multirun` does.
    announce : callable, optional
        Called with (config, directory) before a single run starts.
    """
    from poise.runs.execute import build_parts, execute

    sweep = sweep or "hydra.mode=MULTIRUN" in overrides
    if not sweep and any(_is_sweep(o) for o in overrides):
        check_overrides(overrides)
        raise ConfigError(explain_sweep(overrides))
    composed = None if sweep else compose(overrides)
    if composed is None or composed.config is None:
        return _sweep(overrides, quiet)
    built = build_parts(composed.config)
    directory = composed.run_dir
    if not composed.explicit_dir:
        directory = _free(directory)
    if announce:
        announce(composed.config, directory)
    return [execute(built, directory, quiet=quiet)]


def _is_sweep(text: str) -> bool:
    try:
        return OverridesParser.create().parse_override(text).is_sweep_override()
    except HydraException:
        return False


def explain_sweep(overrides: list[str]) -> str:
    """Say what to do about several values without --multirun."""
    text = next(o for o in overrides if _is_sweep(o))
    key, _, value = text.partition("=")
    return (
        f"{text}: several values; to sweep over them add --multirun, for one list write "
        f"'{key}=[{value}]', for one string quote it"
    )


def _free(directory: Path) -> Path:
    """Return the directory, or the next free one beside it when another run took the same instant."""
    for n in range(1000):
        candidate = directory if n == 0 else directory.with_name(f"{directory.name}-{n}")
        try:
            candidate.mkdir(parents=True)
            return candidate
        except FileExistsError:
            if not candidate.is_dir():
                break
        except OSError as error:
            raise RunError(
                f"cannot make the run directory {candidate}: {error.strerror}; choose another "
                f"with paths.out=DIR or hydra.run.dir=DIR"
            ) from None
    raise RunError(f"cannot make the run directory {directory}: a file is in the way")


def _sweep(overrides: list[str], quiet: bool) -> list[Any]:
    """Let Hydra's sweeper and launcher run the jobs, in one directory fixed beforehand."""
    from poise.runs.execute import Outcome
    from poise.runs.records import find_runs, load_run

    check_overrides(overrides)
    overrides = [open_key(o) for o in overrides]
    plain = [o for o in overrides if not _is_sweep(o)]
    with one_line_errors(overrides):
        install()
        directory = compose_sweep_dir(plain)
        _hydra_main(["--multirun", *overrides, f"hydra.sweep.dir={_quoted(directory)}"], quiet)
    outcomes = []
    for path in find_runs([directory]):
        one = load_run(path)
        failed = None
        if one.state != "done":
            failed = RunError(f"{path}: {one.state}: {one.status.get('reason', '')}")
        outcomes.append(Outcome(one, failed))
    return outcomes


def compose_sweep_dir(overrides: list[str]) -> Path:
    """Return a free directory for a sweep, from `hydra.sweep.dir`."""
    with _initialized():
        whole = hydra_compose("config", overrides=overrides, return_hydra_config=True)
        HydraConfig.instance().set_config(whole)
        wanted = Path(whole.hydra.sweep.dir)
    explicit = any(o.startswith("hydra.sweep.dir=") for o in overrides)
    return wanted if explicit else _free(wanted)


def _quoted(path: Path) -> str:
    return "'" + str(path).replace("'", "\\'") + "'"


def job(whole: DictConfig) -> float | None:
    """Execute one job of a sweep; its outcome is in its records, so a failure stops no other job."""
    from poise.runs.execute import build_parts, execute

    directory = Path(HydraConfig.get().runtime.output_dir)
    try:
        with one_line_errors(list(HydraConfig.get().overrides.task)):
            built = build_parts(from_hydra(whole))
    except ConfigError as error:
        _record_refusal(directory, error)
        return None
    quiet = bool(os.environ.get("POISE_QUIET"))
    if not quiet:
        chosen = " ".join(HydraConfig.get().overrides.task)
        print(f"[{HydraConfig.get().job.num}] {chosen}", file=sys.stderr, flush=True)
    outcome = execute(built, directory, quiet=quiet)
    if outcome.exit_code == 130:
        raise KeyboardInterrupt
    return None


def _record_refusal(directory: Path, error: ConfigError) -> None:
    from poise.runs.records import Records

    records = Records(directory)
    tasks = list(HydraConfig.get().overrides.task)
    records.begin({"refused": tasks, **{k: {"entry": "none"} for k in PARTS}})
    records.status("failed", f"ConfigError: {error}")
    records.close()


def _hydra_main(argv: list[str], quiet: bool = False) -> None:
    """Hand argv to Hydra's own main, with its errors raised instead of printed."""
    import hydra

    if GlobalHydra.instance().is_initialized():
        GlobalHydra.instance().clear()
    root = conf_root()
    decorate = hydra.main(version_base=HYDRA_VERSION_BASE, config_path=root, config_name="config")
    saved, environment = sys.argv, dict(os.environ)
    sys.argv = ["poise", *argv]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    if quiet:
        os.environ["POISE_QUIET"] = "1"
    try:
        decorate(job)()
    finally:
        sys.argv = saved
        os.environ.clear()
        os.environ.update(environment)


def show(argv: list[str]) -> None:
    """Answer `--cfg`, `--info`, `--help` and Hydra's other flags, without running anything."""
    install()
    overrides = [a for a in argv if not a.startswith("-") and "=" in a]
    check_overrides(overrides)
    with one_line_errors(overrides):
        _hydra_main([open_key(a) if a in overrides else a for a in argv])


def parse_changes(overrides: list[str]) -> Mapping[str, Any]:
    """Parse plain `key=value` overrides of a resume."""
    check_overrides(overrides)
    parser = OverridesParser.create()
    for text in overrides:
        if _is_sweep(text):
            raise ConfigError(f"{text}: a run is resumed with one value, not several")
    parsed = [parser.parse_override(o) for o in overrides]
    return {p.key_or_group: p.value() for p in parsed}
