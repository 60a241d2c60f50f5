"""Core's own entries, registered the same way as any plugin's."""

from __future__ import annotations


def register(registry) -> None:
    """Add core's models, data, quantizers, recipes and trackers."""
    add = registry.add
    models = "poise.models.components"
    add("model", "mlp", f"{models}:MLP", "fully connected network",
        tasks=("classification",), example={"in_features": 12, "classes": 3, "hidden": [8]})
    add("model", "resnet20", f"{models}:ResNet20", "CIFAR-style residual network, 20 layers",
        tasks=("classification",),
        example={"in_channels": 1, "classes": 3, "width": 4}, paper="arXiv 1512.03385")
    add("model", "cnn", f"{models}:CNN", "small convolutional network with batch norm",
        tasks=("classification",), example={"in_channels": 1, "classes": 3, "widths": [4, 8]})
    add("model", "resnet18", f"{models}:ResNet18", "residual network of four stages for small images",
        tasks=("classification",), paper="arXiv 1512.03385",
        example={"in_channels": 1, "classes": 3, "width": 4, "blocks": [1, 1, 1, 1]})
    add("model", "causal_lm", f"{models}:CausalLM",
        "a local transformers directory, or a tiny random model of any class",
        tasks=("causal_lm",), example={"architecture": "LlamaForCausalLM", "hidden_size": 32})
    add("model", "smollm2", f"{models}:SmolLM2", "SmolLM2-135M-Instruct from its packaged GGUF",
        tasks=("causal_lm",))

    data = "poise.data.components"
    add("data", "tabular", f"{data}:Tabular", "a packaged table, a scikit-learn one, CSV or Parquet",
        tasks=("quantile",), example={"name": "diabetes"})
    add("data", "digits", f"{data}:Digits", "1,797 grey 8x8 digits of scikit-learn",
        tasks=("classification",))
    add("data", "mnist5k", f"{data}:Mnist5k", "5,000 grey 28x28 MNIST digits (500 per class)",
        tasks=("classification",))
    add("data", "images", f"{data}:Images", "an IDX pair, or a folder of PNG files by class",
        tasks=("classification",))
    add("data", "cifar10", f"{data}:Cifar10", "CIFAR-10 from its binary files, or from JPEG files",
        tasks=("classification",))
    add("data", "sotu", f"{data}:Sotu", "12 MB of State of the Union speeches",
        tasks=("causal_lm",))
    add("data", "text", f"{data}:Text", "any UTF-8 text file", tasks=("causal_lm",))
    add("data", "gsm_symbolic", f"{data}:GsmSymbolic",
        "generated grade-school problems with worked solutions", tasks=("causal_lm",))
    add("data", "gsm8k", f"{data}:Gsm8k", "grade-school problems from a JSONL file",
        tasks=("causal_lm",))

    quantizers = "poise.quantizers.components"
    add("quantizer", "absmax", f"{quantizers}:AbsMax",
        "symmetric, scale by the largest magnitude of a tensor, row or group",
        example={"bits": 4, "group": 8}, paper="arXiv 2308.14352 section III-B")
    add("quantizer", "affine", f"{quantizers}:Affine",
        "asymmetric, scale and minimum per group", example={"bits": 4, "group": 8},
        paper="arXiv 2308.14352 section III-B (asymmetric form)")

    recipes = "poise.recipes.components"
    add("recipe", "classify", f"{recipes}:Classify", "train a classifier",
        tasks=("classification",))
    add("recipe", "finetune", f"{recipes}:Finetune",
        "adapt or train a causal language model, loss on completions",
        tasks=("causal_lm",))

    trackers = "poise.runs.trackers"
    add("tracker", "tensorboard", f"{trackers}:TensorBoard", "mirror records as event files")
    add("tracker", "mlflow", f"{trackers}:MLflow", "mirror records into a local sqlite store")
    add("tracker", "wandb", f"{trackers}:WandB", "mirror records offline for Weights & Biases")
