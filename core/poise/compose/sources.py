"""YAML files as Hydra reads them: checked first, so that a fault is told with its file and line."""

from __future__ import annotations

import io
from pathlib import Path

import yaml
from hydra._internal.core_plugins import file_config_source as hydras
from hydra._internal.sources_registry import SourcesRegistry
from hydra.plugins.config_source import ConfigResult
from omegaconf import OmegaConf
from omegaconf._utils import get_yaml_loader

from poise.errors import ConfigError, FileError
from poise.files import read_regular

LARGEST = 1 << 20  # bytes of one file
DEEPEST = 40  # nodes within nodes
MOST = 100_000  # values, each alias counted as what it stands for


class FileConfigSource(hydras.FileConfigSource):
    """Hydra's own source of `file://` folders, which refuses what is no plain configuration.

    Called as Hydra's is: its registry takes two classes of one name for the same.
    """

    def load_config(self, config_path: str) -> ConfigResult:
        text = check_file(Path(self.path) / self._normalize_file_name(config_path))
        return ConfigResult(
            config=OmegaConf.load(io.StringIO(text)), path=f"{self.scheme()}://{self.path}",
            provider=self.provider, header=self._get_header_dict(text),
        )

    def is_config(self, config_path: str) -> bool:
        """Tell whether there is such an entry; what is not a regular file is refused when it is read."""
        path = Path(self.path) / self._normalize_file_name(config_path)
        return super().is_config(config_path) or (path.exists() and not path.is_dir())


def install_sources() -> None:
    """Have Hydra read folders through the source above."""
    SourcesRegistry.instance().types[FileConfigSource.scheme()] = FileConfigSource


def check_file(path: Path) -> str:
    """Return the text of a file, unless it is not one YAML mapping of bounded size.

    Raises
    ------
    ConfigError
        Naming the file, and the line where there is one.
    """
    text = _text(path)
    try:
        node = yaml.compose(text, Loader=get_yaml_loader())
        if node is not None:
            _measure(path, node)
            _check_top(path, node)
        yaml.load(text, Loader=get_yaml_loader())
    except ConfigError:
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}" if mark else ""
        said = ", ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(f"{path}{where}: {said}") from None
    except (yaml.YAMLError, ValueError) as error:  # a control character, a date that there is not
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ConfigError(f"{path} is nested too deeply: allowed are {DEEPEST} levels") from None
    return text


def _check_top(path: Path, node: yaml.Node) -> None:
    """Refuse a file that is no mapping, or gives Hydra's own node a value that is none."""
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{path} holds no mapping of keys to values: write KEY: VALUE lines")
    for key, value in node.value:
        if key.value == "hydra" and not isinstance(value, yaml.MappingNode):
            raise ConfigError(f"{path}, line {key.start_mark.line + 1}: hydra is a mapping of its settings")


def _text(path: Path) -> str:
    try:
        return read_regular(path, LARGEST).decode("utf-8-sig")  # Windows' editors begin with a mark
    except FileError as error:
        raise ConfigError(str(error)) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from None


def _measure(path: Path, node: yaml.Node, depth: int = 0, sizes: dict[int, int] | None = None) -> int:
    """Return how many values a node stands for; an alias is a node met again, within itself or beside."""
    sizes = {} if sizes is None else sizes
    if depth > DEEPEST:
        raise ConfigError(f"{path}, line {node.start_mark.line + 1}: nested too deeply, or within itself: "
                          f"allowed are {DEEPEST} levels")
    if id(node) not in sizes:
        total = 1
        for child in _children(node):
            total += _measure(path, child, depth + 1, sizes)
        if total > MOST:
            raise ConfigError(f"{path}, line {node.start_mark.line + 1}: its aliases stand for over "
                              f"{MOST:,} values")
        sizes[id(node)] = total
    return sizes[id(node)]


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []
