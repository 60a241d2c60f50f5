"""Write an OLMoE-shaped model with random weights, file by file: 5.2 GB in bfloat16 with the default sizes.

Run: python benchmarks/edgemoe_decode/make_model.py FOLDER [--layers 6 --hidden 2048 ...]
"""

from __future__ import annotations

import argparse
import inspect
import sys

from poise.errors import PoiseError
from poise_edgemoe.synthetic import write_olmoe


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder")
    for name, option in inspect.signature(write_olmoe).parameters.items():
        if name != "path":
            parser.add_argument(f"--{name}", type=int, default=option.default)
    given = vars(parser.parse_args())
    try:
        folder = write_olmoe(given.pop("folder"), **given)
    except PoiseError as error:
        print(f"make_model: {error}", file=sys.stderr)
        return error.exit_code
    bytes_ = sum(p.stat().st_size for p in folder.iterdir())
    print(f"{folder}: {bytes_ / 1e9:.2f} GB in {len(list(folder.glob('*.safetensors')))} files")
    return 0


if __name__ == "__main__":
    sys.exit(main())
