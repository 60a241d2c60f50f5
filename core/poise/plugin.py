"""Core's own entries, registered the same way as any plugin's."""

from __future__ import annotations

from typing import Any

CLASSIFY, LANGUAGE, QUANTILE, ANY = ("classification",), ("causal_lm",), ("quantile",), ()
RESNET = "arXiv 1512.03385"
EDGEMOE = "arXiv 2308.14352 section III-B"

_IMAGES = {"in_channels": 1, "classes": 3}
_GROUPED = {"bits": 4, "group": 8}

# name, component, summary, tasks, paper, example
Line = tuple[str, str, str, tuple[str, ...], str, dict[str, Any]]
MODELS: tuple[Line, ...] = (
    ("mlp", "MLP", "fully connected network", CLASSIFY, "",
     {"in_features": 12, "classes": 3, "hidden": [8]}),
    ("resnet20", "ResNet20", "CIFAR-style residual network, 20 layers", CLASSIFY, RESNET,
     {**_IMAGES, "width": 4}),
    ("cnn", "CNN", "small convolutional network with batch norm", CLASSIFY, "",
     {**_IMAGES, "widths": [4, 8]}),
    ("resnet18", "ResNet18", "residual network of four stages for small images", CLASSIFY, RESNET,
     {**_IMAGES, "width": 4, "blocks": [1, 1, 1, 1]}),
    ("causal_lm", "CausalLM", "a local transformers directory, or a tiny random model of any class",
     LANGUAGE, "", {"architecture": "LlamaForCausalLM", "hidden_size": 32}),
    ("smollm2", "SmolLM2", "SmolLM2-135M-Instruct from its packaged GGUF", LANGUAGE, "", {}),
)
DATA: tuple[Line, ...] = (
    ("tabular", "Tabular", "a packaged table, a scikit-learn one, CSV or Parquet", QUANTILE, "",
     {"name": "diabetes"}),
    ("digits", "Digits", "1,797 grey 8x8 digits of scikit-learn", CLASSIFY, "", {}),
    ("mnist5k", "Mnist5k", "5,000 grey 28x28 MNIST digits (500 per class)", CLASSIFY, "", {}),
    ("images", "Images", "an IDX pair, or a folder of PNG files by class", CLASSIFY, "", {}),
    ("cifar10", "Cifar10", "CIFAR-10 from its binary files, or from JPEG files", CLASSIFY, "", {}),
    ("sotu", "Sotu", "12 MB of State of the Union speeches", LANGUAGE, "", {}),
    ("text", "Text", "any UTF-8 text file", LANGUAGE, "", {}),
    ("gsm_symbolic", "GsmSymbolic", "generated grade-school problems with worked solutions", LANGUAGE, "",
     {}),
    ("gsm8k", "Gsm8k", "grade-school problems from a JSONL file", LANGUAGE, "", {}),
    ("metamath", "MetaMath", "MetaMathQA, from its JSON file", LANGUAGE, "arXiv 2309.12284", {}),
)
QUANTIZERS: tuple[Line, ...] = (
    ("absmax", "AbsMax", "symmetric, scale by the largest magnitude of a tensor, row or group", ANY,
     EDGEMOE, _GROUPED),
    ("affine", "Affine", "asymmetric, scale and minimum per group", ANY,
     f"{EDGEMOE} (asymmetric form)", _GROUPED),
    ("q8_0", "GgmlQ8", "ggml's blocks of 8 bits, as GGUF files have them", ANY, "", {}),
    ("q4_0", "GgmlQ4", "ggml's blocks of 4 bits, as GGUF files have them", ANY, "", {}),
    ("q4_k", "GgmlQ4K", "ggml's blocks of 4 bits, with minima (extra: ggml)", ANY, "", {}),
    ("q3_k", "GgmlQ3K", "ggml's blocks of 3 bits (extra: ggml)", ANY, "", {}),
    ("q2_k", "GgmlQ2K", "ggml's blocks of 2 bits, with minima (extra: ggml)", ANY, "", {}),
)
RECIPES: tuple[Line, ...] = (
    ("classify", "Classify", "train a classifier", CLASSIFY, "", {}),
    ("finetune", "Finetune", "adapt or train a causal language model, loss on completions", LANGUAGE, "",
     {}),
)
TRACKERS: tuple[Line, ...] = (
    ("tensorboard", "TensorBoard", "mirror records as event files", ANY, "", {}),
    ("mlflow", "MLflow", "mirror records into a local sqlite store", ANY, "", {}),
    ("wandb", "WandB", "mirror records offline for Weights & Biases", ANY, "", {}),
)
ROOMS = (
    ("model", "poise.models.components", MODELS),
    ("data", "poise.data.components", DATA),
    ("quantizer", "poise.quantizers.components", QUANTIZERS),
    ("recipe", "poise.recipes.components", RECIPES),
    ("tracker", "poise.runs.trackers", TRACKERS),
)


def register(registry) -> None:
    """Add core's models, data, quantizers, recipes and trackers."""
    for kind, home, lines in ROOMS:
        for name, component, summary, tasks, paper, example in lines:
            registry.add(kind, name, f"{home}:{component}", summary, tasks=tasks, paper=paper,
                         example=dict(example))
