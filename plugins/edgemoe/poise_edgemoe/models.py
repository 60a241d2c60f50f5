"""transformers' classes for a configuration, and a model of one that holds nothing."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from poise.errors import require


def model_class(config: Any) -> Any:
    """Return transformers' class for a configuration, with a head for language."""
    auto = require("transformers.models.auto.modeling_auto", "edgemoe")
    mapping = (auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING if config.is_encoder_decoder
               else auto.MODEL_FOR_CAUSAL_LM_MAPPING)
    return mapping[type(config)]


def in_full(config: Any) -> Callable[[str], bool]:
    """Return what tells which tensors a model keeps in float32, whatever its type."""
    named = getattr(model_class(config), "_keep_in_fp32_modules_strict", None) or ()
    patterns = [re.compile(p) for p in named]
    return lambda key: any(p.search(key) for p in patterns)


def empty_model(config: Any, dtype: Any) -> Any:
    """Return the model on the meta device, in evaluation."""
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            return model_class(config)(config).eval()
    finally:
        torch.set_default_dtype(before)
