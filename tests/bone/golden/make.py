"""Make the golden files: adapters of PEFT 0.15.2's `bone`, with inputs and outputs.

PEFT 0.19 dropped it, so this was run once, with that version first on the path:

    pip install --no-deps --target OLD peft==0.15.2
    PYTHONPATH=OLD python tests/bone/golden/make.py
"""

from __future__ import annotations

import json
from pathlib import Path

import peft
import torch
from safetensors.torch import load_file, save_file
from torch import nn

CASES = {"bone": (True, 4, 12, 8), "uneven": (True, 5, 12, 8), "bat": ("bat", 4, 12, 8)}


def make(folder: Path, init: bool | str, r: int, o: int, i: int) -> None:
    """Write a directory as PEFT saves it, and `case.safetensors`: weight, bias, x, y, merged."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(i, o))
    W, b = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    adapted = peft.get_peft_model(model, peft.BoneConfig(r=r, target_modules=["0"], init_weights=init))
    for name, p in adapted.named_parameters():
        if "bone_block" in name:
            p.data.copy_(0.3 * torch.randn(p.shape))
    x = torch.randn(6, i)
    y = adapted(x).detach()
    adapted.save_pretrained(str(folder))
    (folder / "README.md").unlink()
    merged = adapted.merge_and_unload()[0].weight.detach().clone()
    save_file({"weight": W, "bias": b, "x": x, "y": y, "merged": merged}, folder / "case.safetensors")
    print(folder.name, sorted(load_file(folder / "adapter_model.safetensors")),
          json.loads((folder / "adapter_config.json").read_text())["peft_type"])


if __name__ == "__main__":
    assert peft.__version__ == "0.15.2", f"needs peft 0.15.2, this is {peft.__version__}"
    for case, arguments in CASES.items():
        make(Path(__file__).parent / case, *arguments)
